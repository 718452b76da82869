"""Position encodings side by side: equal weights, equal epochs, and what they cost.

    python experiments/positions.py

CPVT's comparison on ImageNet, of DeiT-Ti: no position 68.2 %, learned 72.2, sines
72.3, 2-D relative 70.5, five PEGs 73.4, with mean pooling 74.9, for 1.4 % and 0.6 % of
the speed. Here the task and the models are those of `encoders.py`, whose MLPs are so
wide that all have as many weights within 0.2 %. The cost is measured when all are
trained: images a second of `predict` and of a training step, the models in turn, the
median of the rounds, as a part of the model without position.
"""

import statistics
import time

import encoders
import figures
import keras
import lab
import numpy as np
from tqdm.auto import tqdm
from train import logits, recipe, scores

from training.loop import precision

BATCH = 64


def run(job, setting, folder):
    """Accuracy of the model of one encoding."""
    model, pictures = encoders.trained(job, setting, folder)
    side, _ = encoders.sizes(setting)
    images, classes = encoders.test_images(pictures, setting, side)
    found = scores(logits(model, images), classes)
    return [{"weights": model.count_params(), **found}]


def cost(setting):
    """Measure the speed of every arm in each round, predicting and training."""
    path = setting.folder / "cost.csv"
    if path.exists():
        return
    side, _ = encoders.sizes(setting)
    images = np.random.default_rng(0).uniform(0, 255, (BATCH, side, side, 3))
    images, classes = images.astype("float32"), np.arange(BATCH) % 10
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    with precision(recipe("cost", epochs=1, learning_rate=1e-4)):
        arms = setting.pick(tuple(encoders.ARMS), ("none", "PEG x 1"))
        models = {arm: encoders.build(arm, setting, 10, side) for arm in arms}
        for model in models.values():
            model.compile(keras.optimizers.AdamW(1e-4), loss)
    work = {
        "predict": lambda model: model.predict_on_batch(images),
        "train": lambda model: model.train_on_batch(images, classes),
    }
    rounds, steps = setting.pick((15, 6), (2, 1))
    rows = []
    for number in tqdm(range(-1, rounds), "cost", unit=" rounds"):
        for kind, step in work.items():
            for arm, model in models.items():
                start = time.perf_counter()
                for _ in range(steps):
                    step(model)
                seconds = time.perf_counter() - start
                if number >= 0:  # before that it is compiled
                    rate = round(BATCH * steps / seconds, 1)
                    rows.append(
                        {"arm": arm, "round": number, "kind": kind, "images_s": rate}
                    )
    lab.write_rows(path, rows)


def speed(costs, kind, arm):
    """As a part of that without position: median and quartiles of the rounds."""
    if not any(row["arm"] == arm for row in costs):
        return "-"
    rates = {
        name: figures.by_round(costs, "images_s", arm=name, kind=kind)
        for name in (arm, "none")
    }
    parts = [rates[arm][x] / rates["none"][x] for x in rates["none"]]
    low, median, high = statistics.quantiles(parts, method="inclusive")
    return "1" if arm == "none" else f"{median:.2f} ({low:.2f} to {high:.2f})"


def report(rows, setting):
    costs = lab.read_rows(setting.folder / "cost.csv")
    base = figures.by_seed(rows, "accuracy", arm="learned")
    table = []
    for arm in figures.arms_in(rows, encoders.ARMS):
        found = figures.by_seed(rows, "accuracy", arm=arm)
        loss = figures.by_seed(rows, "cross_entropy", arm=arm).values()
        weights = next(row["weights"] for row in rows if row["arm"] == arm)
        gain = "-" if arm == "learned" else figures.points(figures.paired(found, base))
        speeds = [speed(costs, kind, arm) for kind in ("predict", "train")]
        cells = [
            figures.percent(found.values()),
            gain,
            f"{figures.interval(loss)[0]:.3f}",
        ]
        table.append([arm, f"{weights:,}", *cells, *speeds])
    heads = ["position", "weights", "accuracy, %", "less that of learned"]
    heads += ["cross-entropy", "speed, predict", "speed, train"]
    return (
        "Accuracy with 95 % intervals, the difference paired by seed; speed as a part "
        "of that without position, with the quartiles of the rounds.\n\n"
        + figures.markdown(heads, table)
    )


def picture(rows, setting, path):
    dots = {
        arm: list(figures.by_seed(rows, "accuracy", arm=arm).values())
        for arm in figures.arms_in(rows, encoders.ARMS)
    }
    title = "Position encodings, equal weights and epochs"
    figures.dots_picture(path, {"": dots}, "accuracy, %", title)


EXPERIMENT = lab.Experiment(
    name="positions",
    about=__doc__,
    factors=("arm",),
    jobs=encoders.jobs,
    run=run,
    report=report,
    draw=picture,
    quick=encoders.QUICK,
    after=cost,
    gpu=True,
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
