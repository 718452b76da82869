"""The position encodings that are compared, and the task that each is trained for.

Three experiments ask the same trained models (`resolution`, `equivariance`,
`positions`): whichever runs first trains them, and keeps their weights in the folder
`encoders` beside its own.

An image of the task is one picture, a digit of scikit-learn, 5/8 to 7/8 of the canvas
large, somewhere on black. It is drawn three times as fine as it is seen, and resized,
so the same image exists at any size. Each training digit is placed eight times, each
test digit four times, other pictures once; the test images are the same for all arms
and seeds.
"""

import functools
from pathlib import Path

import keras
import numpy as np
from images import CHUNK, Pictures, draw_squares, enlarge, paste, read_pictures
from train import dataset, recipe, train

import keras_vit

SIZES = {  # of the transformer, for each scale
    "full": {"embed_dim": 48, "depth": 5, "num_heads": 4},
    "quick": {"embed_dim": 32, "depth": 2, "num_heads": 2},
    "gpu": {"embed_dim": 192, "depth": 12, "num_heads": 3},  # ViT-Ti
}
FIVE = (0, 1, 2, 3, 4)
ARMS = {
    "none": ("ViT", {"position": "none"}),
    "learned": ("ViT", {"position": "learned"}),
    "sin-cos": ("ViT", {"position": "sincos_2d"}),
    "relative": ("ViT", {"position": "relative"}),
    "rotary": ("ViT", {"position": "rotary"}),
    "PEG x 1": ("CPVT", {"peg_positions": (0,)}),
    "PEG x 5": ("CPVT", {"peg_positions": FIVE}),
    "CPVT-GAP": ("CPVT", {"peg_positions": FIVE, "pool": "mean"}),
}
QUICK = ("none", "learned", "PEG x 1", "CPVT-GAP")
DETAIL = 3  # images are drawn this much larger, and resized
SIDES = (5 / 8, 7 / 8)  # of a picture, of the canvas that is trained
TEST_SEED = 1_000
BATCH = 64
PLACED = 8 * 1437  # images of an epoch; where there are more, epochs are fewer


def jobs(setting) -> list[dict]:
    """One run for each encoding."""
    return [{"arm": arm} for arm in ARMS]


def sizes(setting) -> tuple[int, int]:
    """Side of the images that are trained, and of a patch, pixels."""
    return setting.pick((32, 4), (32, 8), (96, 8))


def build(
    arm: str,
    setting,
    num_classes: int,
    image_size: int,
    **arguments,
) -> keras.Model:
    """Build the transformer of an arm.

    Args:
        arm: Key of `ARMS`.
        setting: `lab.Setting`.
        num_classes: Number of logits.
        image_size: Side of an image, pixels.
        **arguments: Of the model, besides.
    """
    side, patch = sizes(setting)
    if arm == "learned":
        arguments["position_grid"] = (side // patch, side // patch)
    width = mlp_width(arm, setting.scale, side, patch, num_classes)
    arguments["mlp_ratio"] = width / SIZES[setting.scale]["embed_dim"]
    return _model(arm, setting.scale, num_classes, image_size, patch, **arguments)


def _model(arm, scale, num_classes, image_size, patch_size, **arguments):
    family, own = ARMS[arm]
    size = SIZES[scale]
    if "peg_positions" in own:  # a quick model has fewer blocks
        own = own | {"peg_positions": own["peg_positions"][: size["depth"]]}
    return getattr(keras_vit, family)(
        "tiny",
        image_size=image_size,
        patch_size=patch_size,
        num_classes=num_classes,
        initialization="jax",
        normalization="inception",
        crop_ratio=None,
        **size | own | arguments,
    )


@functools.cache
def mlp_width(arm: str, scale: str, side: int, patch: int, num_classes: int) -> int:
    """Hidden units of a block, so that all arms have as many weights as `none`.

    What an encoding adds is taken from the MLPs, to the nearest unit in each block.
    """
    size = SIZES[scale]
    counts = []
    for name in ("none", arm):
        with keras.StatelessScope(initialize_variables=False):
            counts.append(_model(name, scale, num_classes, side, patch).count_params())
    unit = size["depth"] * (2 * size["embed_dim"] + 1)
    return 4 * size["embed_dim"] - round((counts[1] - counts[0]) / unit)


def draw(
    pictures: tuple[np.ndarray, np.ndarray],
    side: int,
    canvas: float,
    copies: int,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Images of `side` px that show `canvas` times the canvas of the training."""
    images, classes = pictures
    fine = side * DETAIL
    low, high = (round(x * fine / canvas) for x in SIDES)
    count = copies * len(images)
    random = np.random.default_rng(seed)
    squares = draw_squares(count, fine, (low, high), random)
    found = np.empty((count, side, side, *images.shape[3:]), "uint8")
    for start in range(0, count, CHUNK):
        rows = np.arange(start, min(start + CHUNK, count))
        drawn = paste(images[rows % len(images)], fine, squares[rows])
        found[rows] = enlarge(drawn, side)
    return found, np.concatenate([classes] * copies)


def test_images(
    pictures: Pictures, setting, side: int, canvas: float = 1.0
) -> tuple[np.ndarray, np.ndarray]:
    """The test images at a size."""
    return draw(pictures.test, side, canvas, copies(setting)[1], TEST_SEED)


def copies(setting) -> tuple[int, int]:
    """How often each training and each test picture is placed."""
    return (8, 4) if setting.data == "digits" and not setting.quick else (1, 1)


def trained(job: dict, setting, folder: Path) -> tuple[keras.Model, Pictures]:
    """The model of an arm and a seed, and the pictures; trained where it was not."""
    arm, seed = job["arm"], job["seed"]
    side, _ = sizes(setting)
    pictures = read_pictures(setting)
    num_classes = len(pictures.labels)
    rate = job.get("learning_rate") or setting.learning_rates[arm]
    name = f"{arm}-{seed}-{rate:g}-{keras.backend.backend()}.weights.h5"
    kept = setting.beside("encoders") / name.replace(" ", "_")
    if not kept.exists() or setting.choosing:
        kept = _train(arm, seed, rate, setting, pictures, folder, kept)
    model = build(arm, setting, num_classes, side)
    model.load_weights(kept)
    return model, pictures


def _train(arm, seed, rate, setting, pictures, folder, kept):
    """Train a model, and keep its weights; where they are."""
    side, _ = sizes(setting)
    num_classes = len(pictures.labels)
    images = draw(pictures.train, side, 1.0, copies(setting)[0], seed)
    epochs = max(1, setting.pick(3, 0, 80) * PLACED // len(images[1]))
    updates = epochs * (len(images[1]) // BATCH)
    how = recipe(
        "encoders",
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=rate,
        warmup_steps=setting.pick(60, 1, max(1, updates // 10)),
        seed=seed,
    )
    test = test_images(pictures, setting, side)
    data = dataset("encoders", images, test, pictures.labels)
    model = train(lambda: build(arm, setting, num_classes, side), data, how, folder)
    new = folder / kept.name
    model.save_weights(new)
    if setting.choosing:
        return new
    kept.parent.mkdir(parents=True, exist_ok=True)
    return new.replace(kept)
