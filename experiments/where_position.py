"""Where position comes from: the zeros around the grid are all that a PEG knows of it.

    python experiments/where_position.py

CPVT says that a convolution of the tokens encodes where they are, absolutely, because
of its zero padding. The task here has nothing but position in it: in which quadrant is
the digit? A digit of scikit-learn, 8 x 8 px, is one token of a grid of 6 x 6, and the
others are black; all 36 places are as likely.

A model without position, or with a PEG whose padding is the grid's other side, gives
one answer to a digit wherever it is: each test digit stands in all four quadrants, so
of its four images one is right, 25 % exactly. `difference` says how far the logits of
the four are apart. `inside` are the images whose digit has two tokens around it on
every side, four places: there one PEG of 3 x 3 sees no zero next to a digit, nor a
digit next to a zero, so it gives one answer to all four, which are as likely. Where two
tokens are to the left and to the right alone it knows the row, and says one thing of
both columns. Of all places it can be right in 4/9 + 4/9 / 2 + 1/9 / 4 = 69.4 %.
"""

import figures
import lab
import numpy as np
from images import enlarge, read_pictures
from train import dataset, logits, recipe, scores, train

import keras_vit

PATCH, GRID = 8, 6  # pixels of a token, tokens of a side
SIDE = PATCH * GRID  # pixels
MARGIN = 2  # tokens around a digit that is inside
BATCH = 32  # with fewer updates many a model learns nothing, whatever its position
SIZES = {
    "full": {"embed_dim": 32, "depth": 6, "num_heads": 4},
    "quick": {"embed_dim": 16, "depth": 2, "num_heads": 2},
}
CIRCULAR = {"peg_padding": "circular"}
ARMS = {
    "none": ("CPVT", {"peg_positions": ()}),
    "circular PEG x 1": ("CPVT", {"peg_positions": (0,), **CIRCULAR}),
    "circular PEG x 5": ("CPVT", {"peg_positions": (0, 1, 2, 3, 4), **CIRCULAR}),
    **{
        f"PEG x {count}": ("CPVT", {"peg_positions": tuple(range(count))})
        for count in range(1, 6)
    },
    "learned": ("ViT", {"position": "learned"}),
}


def jobs(setting):
    return [{"arm": arm} for arm in ARMS]


def draw(pictures, random):
    """Each digit in all four quadrants, at one random place of a quadrant.

    Returns:
        Images `(4 N, S, S)`, quadrants `(4 N,)` and the tokens that are the digits
        `(4 N, 2)`.
    """
    digits = enlarge(pictures[0], PATCH)
    if digits.ndim == 4:  # colours
        digits = digits.mean(-1).round().astype("uint8")
    of_quadrant = random.integers(0, GRID // 2, (len(digits), 2))
    images, quadrants, places = [], [], []
    for quadrant in range(4):
        tokens = of_quadrant + GRID // 2 * np.array([quadrant // 2, quadrant % 2])
        images += [placed(*x) for x in zip(digits, tokens, strict=True)]
        quadrants.append(np.full(len(digits), quadrant))
        places.append(tokens)
    return np.stack(images), np.concatenate(quadrants), np.concatenate(places)


def placed(digit, token):
    """An image with a digit as one of its tokens."""
    image = np.zeros((SIDE, SIDE), "uint8")
    top, left = PATCH * token
    image[top : top + PATCH, left : left + PATCH] = digit
    return image


def inside(places):
    """Whether a digit has its margin on every side."""
    return ((places >= MARGIN) & (places < GRID - MARGIN)).all(axis=1)


def build(arm, scale):
    """Build the transformer of an arm."""
    family, own = ARMS[arm]
    if "peg_positions" in own:  # a quick model has fewer blocks
        depth = SIZES[scale]["depth"]
        own = own | {"peg_positions": own["peg_positions"][:depth]}
    return getattr(keras_vit, family)(
        "tiny",
        image_size=SIDE,
        patch_size=PATCH,
        num_classes=4,
        initialization="jax",
        normalization="inception",
        crop_ratio=None,
        **SIZES[scale] | own,
    )


def run(job, setting, folder):
    """Train one encoding to tell quadrants."""
    arm, seed = job["arm"], job["seed"]
    pictures = read_pictures(setting)
    images, quadrants, _ = draw(pictures.train, np.random.default_rng(seed))
    test, truth, places = draw(pictures.test, np.random.default_rng(1_000))

    how = recipe(
        "where_position",
        epochs=setting.pick(8, 1),
        batch_size=BATCH,
        learning_rate=job.get("learning_rate") or setting.learning_rates[arm],
        warmup_steps=setting.pick(60, 1),
        seed=seed,
    )
    names = ("top left", "top right", "bottom left", "bottom right")
    data = dataset("where_position", (images, quadrants), (test, truth), names)
    model = train(lambda: build(arm, setting.scale), data, how, folder)
    answers = logits(model, test)
    of_digit = answers.reshape(4, -1, 4)  # (quadrant, digit, answer)
    difference = float(np.ptp(of_digit, axis=0).max())
    rows = []
    for place, chosen in (("anywhere", ...), ("inside", inside(places))):
        found = scores(answers[chosen], truth[chosen])
        constant = np.bincount(truth[chosen]).max() / len(truth[chosen])
        extra = {"constant": round(constant, 6), "difference": f"{difference:.2g}"}
        rows.append({"place": place, **found, **extra})
    return rows[:1] if setting.choosing else rows


def report(rows, setting):
    table = []
    for arm in figures.arms_in(rows, ARMS):
        anywhere, within = (
            figures.by_seed(rows, "accuracy", arm=arm, place=place).values()
            for place in ("anywhere", "inside")
        )
        differences = figures.by_seed(rows, "difference", arm=arm, place="anywhere")
        largest = max(float(x) for x in differences.values())
        table.append(
            [arm, figures.percent(anywhere), figures.percent(within), f"{largest:.1g}"]
        )
    heads = ["position", "anywhere, %", "inside, %", "difference of logits, at most"]
    best = {row["place"]: row["constant"] for row in rows}
    head = (
        "Accuracy of the quadrant, with 95 % intervals. To say always the same is "
        f"right in {best['anywhere']:.1%} of the images, inside in "
        f"{best['inside']:.1%}."
    )
    return f"{head}\n\n{figures.markdown(heads, table)}"


def picture(rows, setting, path):
    panels = {
        place: {
            arm: list(figures.by_seed(rows, "accuracy", arm=arm, place=place).values())
            for arm in figures.arms_in(rows, ARMS)
        }
        for place in ("anywhere", "inside")
    }
    title = "In which quadrant is the digit?"
    figures.dots_picture(path, panels, "accuracy, %", title)


EXPERIMENT = lab.Experiment(
    name="where_position",
    about=__doc__,
    factors=("arm",),
    labels=("place",),
    jobs=jobs,
    run=run,
    report=report,
    draw=picture,
    rates=(5e-4, 1e-3, 2e-3),
    quick=("none", "circular PEG x 1", "PEG x 2", "learned"),
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
