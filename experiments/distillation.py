"""Distillation: does a teacher help, and does it need a token of its own?

    python experiments/distillation.py

DeiT finds that a hard label from a teacher helps more than its soft answers, and most
through a token of its own. Here the teacher is the small convolutional network of
`convnet.py`, trained on all 1,437 training digits of scikit-learn; the student is a
small DeiT that sees 200 of them, slightly turned, zoomed and shifted, 24,000 images in
all: with their labels alone, or with the teacher's answers to the same images besides.
What the teacher knows of the other 1,237 digits reaches the student through its answers
alone, so this is no measure of learning from 200 images. The teacher's part of the loss
is DeiT's half for hard answers; for soft ones it is nine tenths at temperature 3, as in
the recipe `digits_distilled`, where it was tried on the same test digits.
"""

import figures
import keras
import lab
from convnet import convnet
from images import enlarge, read_pictures
from train import dataset, logits, recipe, scores, shared, shown, train

import keras_vit
import training
from training.recipe_parts import Teaching

LABELED = 200  # images that the student sees
SEEN = 24_000  # in all
BATCH = 25
SIDE, PATCH = 32, 8  # pixels
TEACHER_SEED = 10_000  # and the seed of the student
HARD = {"distillation": "hard", "distillation_weight": 0.5}
SOFT = {"distillation": "soft", "distillation_weight": 0.9, "temperature": 3.0}
BASE = "labels alone"
ARMS = {  # the teacher's answers, whether they have a token
    BASE: (None, False),
    "labels alone, with the token": (None, True),
    "soft": (SOFT, False),
    "hard": (HARD, False),
    "soft, token": (SOFT, True),
    "hard, token": (HARD, True),
}
PAIRS = (  # of what the last table has the differences
    ("hard", "soft"),
    ("hard, token", "soft, token"),
    ("soft, token", "soft"),
    ("hard, token", "hard"),
)
AFFINE = {"rotation_degrees": 20.0, "zoom": 0.2, "shift": 0.12}


def jobs(setting):
    return [{"arm": arm} for arm in ARMS]


def teacher_of(pictures, setting, seed, folder):
    """The teacher of a seed, trained on all training pictures: its file, its accuracy.

    The students of a seed have the same.
    """
    images, test = (enlarge(x[0], SIDE) for x in (pictures.train, pictures.test))
    train_part = images, pictures.train[1]
    data = dataset("teacher", train_part, (test, pictures.test[1]), pictures.labels)
    how = recipe(
        "teacher",
        epochs=setting.pick(12, 1),
        learning_rate=4e-3,
        warmup_steps=setting.pick(30, 1),
        augmentation=training.Augmentation(random_affine=AFFINE),
        seed=TEACHER_SEED + seed,
    )
    widths = setting.pick((24, 48, 88), (8, 8, 8))

    def build():
        return convnet(SIDE, len(pictures.labels), widths)

    name = f"{seed}-{keras.backend.backend()}.keras"
    path = setting.beside("teachers") / name
    model = shared(path, lambda: train(build, data, how, folder / "of"))
    return path, scores(logits(model, test), pictures.test[1])["accuracy"]


def run(job, setting, folder):
    """Train one student, and its teacher before."""
    arm, seed = job["arm"], job["seed"]
    answers, has_token = ARMS[arm]
    everything = read_pictures(setting)
    pictures = everything.few(setting.pick(LABELED, 50), seed)
    images, test = (enlarge(x[0], SIDE) for x in (pictures.train, pictures.test))
    classes, truth, labels = pictures.train[1], pictures.test[1], pictures.labels
    teaching, teacher = None, ""
    if answers is not None:
        path, teacher = teacher_of(everything, setting, seed, folder)
        teaching = Teaching(teacher=str(path), **answers)
    rows, epochs = shown(len(images), setting.pick(SEEN, 100))
    updates = epochs * (len(rows) // BATCH)
    how = recipe(
        "distillation",
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=job.get("learning_rate") or setting.learning_rates[arm],
        warmup_steps=max(1, updates // 10),
        teaching=teaching,
        augmentation=training.Augmentation(random_affine=AFFINE),
        seed=seed,
    )

    def build():
        return keras_vit.ViT(
            "deit_tiny_distilled" if has_token else "deit_tiny",
            image_size=SIDE,
            patch_size=PATCH,
            num_classes=len(labels),
            initialization="jax",
            normalization="inception",
            crop_ratio=None,
            embed_dim=setting.pick(48, 16),
            depth=setting.pick(3, 1),
            num_heads=setting.pick(3, 2),
        )

    data = dataset("distillation", (images[rows], classes[rows]), (test, truth), labels)
    model = train(build, data, how, folder)
    rows = [{"head": "answer", **scores(logits(model, test), truth)}]
    for head in ("head", "head_dist") if has_token and not setting.choosing else ():
        part = keras.Model(model.input, model.get_layer(head).output)
        rows.append({"head": head, **scores(logits(part, test), truth)})
    return [{**row, "teacher": teacher} for row in rows]


def report(rows, setting):
    base = figures.by_seed(rows, "accuracy", arm=BASE, head="answer")
    table = []
    for arm in figures.arms_in(rows, ARMS):
        answers, has_token = ARMS[arm]
        found = figures.by_seed(rows, "accuracy", arm=arm, head="answer")
        heads = ["-", "-"]
        if has_token:
            heads = [
                figures.percent(
                    figures.by_seed(rows, "accuracy", arm=arm, head=head).values()
                )
                for head in ("head", "head_dist")
            ]
        gain = "-" if arm == BASE else figures.points(figures.paired(found, base))
        known = figures.by_seed(rows, "teacher", arm=arm, head="answer").values()
        teacher = "-" if answers is None else figures.percent(known)
        table.append([arm, figures.percent(found.values()), gain, *heads, teacher])
    heads = ["student", "accuracy, %", "gain, paired", "class token"]
    heads += ["distillation token", "its teacher"]
    pairs = []
    for names in PAIRS:
        if not set(names) <= set(figures.arms_in(rows, ARMS)):
            continue
        found = [
            figures.by_seed(rows, "accuracy", arm=arm, head="answer") for arm in names
        ]
        pairs.append(
            [f"{names[0]} *less* {names[1]}", figures.points(figures.paired(*found))]
        )
    parts = (
        "Accuracy with 95 % intervals; a student answers with the mean of its heads.",
        figures.markdown(heads, table),
        "Points, paired by seed.",
        figures.markdown(["difference", "points"], pairs),
    )
    return "\n\n".join(parts)


def picture(rows, setting, path):
    dots = {
        arm: list(figures.by_seed(rows, "accuracy", arm=arm, head="answer").values())
        for arm in figures.arms_in(rows, ARMS)
    }
    title = "200 labels, and a teacher's answers"
    figures.dots_picture(path, {"": dots}, "accuracy, %", title)


EXPERIMENT = lab.Experiment(
    name="distillation",
    about=__doc__,
    factors=("arm",),
    labels=("head",),
    jobs=jobs,
    run=run,
    report=report,
    draw=picture,
    quick=(BASE, "soft", "soft, token"),
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
