"""Resolution: which position encoding holds at sizes that were never trained?

    python experiments/resolution.py

CPVT says that a model whose position comes from a convolution of the tokens (PEG) can
be asked at larger sizes than it was trained at, and loses less than one with a position
table. Here every encoding is trained at 32 px, with the same transformer, images and
epochs, and asked at 24 to 64 px without fine-tuning, in two ways:

    resize   the same images, drawn smaller or larger
    canvas   digits are as large as in training, somewhere on a larger canvas

The images are those of `encoders.py`: a digit of scikit-learn, somewhere on black.
What is compared is the drop of
each model from its own accuracy at 32 px.
"""

import encoders
import figures
import lab
from train import logits, scores

METHODS = ("bicubic_antialias", "bicubic", "linear", "linear_corners")


def protocols(setting):
    """Sizes that are asked for, as parts of the one that is trained."""
    return {
        "resize": setting.pick((0.75, 1.25, 1.5, 2.0), (1.5,)),
        "canvas": setting.pick((1.25, 1.5, 2.0), (1.5,)),
    }


def run(job, setting, folder):
    """Ask the model of one encoding at every size."""
    arm = job["arm"]
    model, pictures = encoders.trained(job, setting, folder)
    weights = model.get_weights()
    side, _ = encoders.sizes(setting)
    rows = []

    def ask(method, protocol, factor):
        size = round(side * factor)
        options = {"resampling": method} if method else {}
        asked = encoders.build(arm, setting, len(pictures.labels), size, **options)
        asked.set_weights(weights)
        canvas = factor if protocol == "canvas" else 1.0
        images, classes = encoders.test_images(pictures, setting, size, canvas)
        found = scores(logits(asked, images), classes)
        names = {"resampling": method, "protocol": protocol, "side": size}
        rows.append(names | found)

    ask("", "trained", 1.0)
    for method in METHODS if arm == "learned" else ("",):
        for protocol, factors in protocols(setting).items():
            for factor in factors:
                ask(method, protocol, factor)
    return rows


def lines(rows):
    """Arm and resampling of every line of the table."""
    methods = {"learned": METHODS}
    return [
        (arm, x)
        for arm in figures.arms_in(rows, encoders.ARMS)
        for x in methods.get(arm, ("",))
    ]


def accuracies(rows, line, protocol, side):
    """By seed, of one line of the table."""
    arm, method = line
    return figures.by_seed(
        rows, "accuracy", arm=arm, resampling=method, protocol=protocol, side=side
    )


def report(rows, setting):
    side, _ = encoders.sizes(setting)
    tables = []
    for protocol, factors in protocols(setting).items():
        sides, table = [round(side * x) for x in factors], []
        for line in lines(rows):
            own = accuracies(rows, (line[0], ""), "trained", side)
            others = [accuracies(rows, line, protocol, x) for x in sides]
            drops = [figures.points(figures.paired(x, own)) for x in others]
            name = ", ".join(x for x in line if x)
            table.append([name, figures.percent(own.values()), *drops])
        heads = [protocol, f"{side} px", *(f"{x} px" for x in sides)]
        tables.append(figures.markdown(heads, table))
    return (
        f"Accuracy at {side} px in percent, and points gained or lost at other sizes, "
        "with 95 % intervals.\n\n" + "\n\n".join(tables)
    )


def picture(rows, setting, path):
    side, _ = encoders.sizes(setting)
    panels = {}
    for protocol, factors in protocols(setting).items():
        panels[protocol] = {}
        for line in lines(rows):
            if line[1] not in ("", METHODS[0]):
                continue
            places = {
                round(side * x): accuracies(rows, line, protocol, round(side * x))
                for x in factors
            }
            places[side] = accuracies(rows, (line[0], ""), "trained", side)
            panels[protocol][line[0]] = {
                place: list(places[place].values()) for place in sorted(places)
            }
    figures.lines_picture(
        path,
        panels,
        "side of the images, px",
        "accuracy, %",
        f"Trained at {side} px, asked at others",
    )


EXPERIMENT = lab.Experiment(
    name="resolution",
    about=__doc__,
    factors=("arm",),
    labels=("resampling", "protocol", "side"),
    jobs=encoders.jobs,
    run=run,
    report=report,
    draw=picture,
    quick=encoders.QUICK,
    gpu=True,
    choice="positions",
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
