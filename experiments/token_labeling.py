"""Token labeling: does a label for every token help, and how are they mixed best?

    python experiments/token_labeling.py

LV-ViT trains every token on a label of its own, from the score map of an annotator, and
mixes tokens behind the patch embedding (MixToken), which it finds better than CutMix of
pixels with maps mixed by region. Here an LV-ViT sees 200, 500 or all 1,437 training
digits of scikit-learn, each once in a random size (5/8 to 7/8) at a random place of a
noisy canvas of 24 px, slightly turned, zoomed and shifted anew each time; 18,000
images in all. The labels of tokens are exact (the part of a token that the square of
the digit covers) or those of an annotator, the small convolutional network of
`convnet.py`, which was trained on the same images with their classes alone.

MixToken by the paper's rule mixes less than CutMix: on this grid of 6 x 6 tokens an
image keeps 80 % of itself in the mean, with CutMix 71 %, and one batch in nine is not
mixed at all. By the rule "unbiased" it keeps 50 %, so one mixes less than CutMix and
one more. A model with token labels answers with both heads, one without has the
class head alone.
"""

import dataclasses

import figures
import keras
import lab
import numpy as np
import tensorflow as tf
from convnet import convnet
from images import available, place, read_pictures
from train import dataset, logits, recipe, scores, shared, shown, train

import keras_vit
import training
from training.recipe_parts import TokenLabels

COUNTS = (200, 500, 1437)
SEEN = 18_000  # images, in all
BATCH = 40
SIDES = (5 / 8, 7 / 8)  # of a picture, of its canvas
NOISE = 32  # it is uniform in 0..31
ANNOTATOR_SEED = 10_000  # and the seed of the run
BASE = "class loss"
ARMS = {  # whose labels the tokens have, MixToken, CutMix
    BASE: (None, None, 0.0),
    "class loss, CutMix": (None, None, 1.0),
    "exact labels": ("exact", None, 0.0),
    "exact labels, CutMix": ("exact", None, 1.0),
    "exact labels, MixToken": ("exact", "paper", 0.0),
    "exact labels, MixToken unbiased": ("exact", "unbiased", 0.0),
    "annotator": ("annotator", None, 0.0),
    "annotator, CutMix": ("annotator", None, 1.0),
    "annotator, MixToken": ("annotator", "paper", 0.0),
}
PAIRS = (  # of which the last table has the differences
    ("exact labels, MixToken", "exact labels, CutMix"),
    ("exact labels, MixToken unbiased", "exact labels, CutMix"),
    ("annotator, MixToken", "annotator, CutMix"),
    ("exact labels, MixToken", "exact labels"),
    ("annotator, MixToken", "annotator"),
)
AFFINE = {"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.1}


def counts(setting):
    """Numbers of training images."""
    return available(setting, setting.pick(COUNTS, (64,)))


def jobs(setting):
    return [{"arm": arm, "images": x} for arm in ARMS for x in counts(setting)]


def sizes(setting):
    """Side of an image and of a patch, pixels."""
    return setting.pick((24, 4), (24, 4), (96, 8))


def draw(pictures, side, seed):
    """Canvases with their classes, and where their squares are."""
    random = np.random.default_rng([1, seed])  # not as the pictures are drawn
    low, high = (round(x * side) for x in SIDES)
    canvases, squares = place(pictures[0], side, (low, high), random)
    noise = random.integers(0, NOISE, canvases.shape[:3], "uint16")
    if canvases.ndim == 4:
        noise = noise[..., None]
    return (canvases + noise).clip(0, 255).astype("uint8"), pictures[1], squares


def exact_maps(side, classes, squares):
    """Score maps: probability 1 of the class in the square, no label outside."""

    def score_map(label, square):
        top, left, size = tf.unstack(tf.cast(square, tf.int32))
        pixels = tf.range(side)
        rows = (pixels >= top) & (pixels < top + size)
        columns = (pixels >= left) & (pixels < left + size)
        inside = tf.cast(rows[:, None] & columns, tf.float16)[..., None]
        return inside, tf.fill((side, side, 1), tf.cast(label, tf.int32))

    return lambda: tf.data.Dataset.from_tensor_slices((classes, squares)).map(score_map)


def annotated(data, count, epochs, setting, seed, folder):
    """The data with label maps of a network that learned their classes; and it.

    Runs on the same images have the same.
    """
    side, _ = sizes(setting)
    how = recipe(
        "annotator",
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=4e-3,
        warmup_steps=max(1, epochs * (data.sizes["train"] // BATCH) // 10),
        augmentation=training.Augmentation(random_affine=AFFINE),
        seed=ANNOTATOR_SEED + seed,
    )
    widths = setting.pick((24, 48, 88), (8, 8, 8), (72, 144, 288, 536))

    def build():
        return convnet(side, len(data.labels), widths)

    name = f"{count}-{seed}-{keras.backend.backend()}.keras"
    path = setting.beside("annotators") / name
    model = shared(path, lambda: train(build, data, how, folder / "annotator"))
    training.annotate(path, data, folder / "maps")
    return training.with_label_maps(data, folder / "maps"), model


def build(arm, setting, num_classes):
    """Build the transformer of an arm."""
    side, patch = sizes(setting)
    return keras_vit.LVViT(
        "tiny",
        image_size=side,
        patch_size=patch,
        num_classes=num_classes,
        token_weight=0.5 if ARMS[arm][0] else 0.0,
        initialization="jax",
        normalization="inception",
        crop_ratio=None,
        **setting.pick(
            {"embed_dim": 48, "depth": 3, "num_heads": 4, "stem_width": 16},
            {"embed_dim": 16, "depth": 1, "num_heads": 2, "stem_width": 8},
            {},
        ),
    )


def run(job, setting, folder):
    """Train one LV-ViT."""
    arm, seed = job["arm"], job["seed"]
    labels, mix_token, cutmix = ARMS[arm]
    side, _ = sizes(setting)
    pictures = read_pictures(setting).few(job["images"], seed)
    images, classes, squares = draw(pictures.train, side, seed)
    test, truth, _ = draw(pictures.test, side, 1_000)
    rows, epochs = shown(len(classes), setting.pick(SEEN, 80, 8 * SEEN))
    images, classes, squares = images[rows], classes[rows], squares[rows]
    data = dataset("token_labeling", (images, classes), (test, truth), pictures.labels)
    extra = {"annotator_accuracy": ""}
    if labels == "exact":
        maps = exact_maps(side, classes, squares)
        data = dataclasses.replace(data, label_maps=maps)
    elif labels == "annotator":
        data, network = annotated(data, job["images"], epochs, setting, seed, folder)
        found = scores(logits(network, test), truth)["accuracy"]
        extra = {"annotator_accuracy": found}
    how = recipe(
        "token_labeling",
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=job.get("learning_rate") or setting.learning_rates[arm],
        warmup_steps=max(1, epochs * (len(rows) // BATCH) // 10),
        token_labeling=labels and TokenLabels(mix_token=mix_token),
        augmentation=training.Augmentation(
            random_affine=AFFINE, label_smoothing=0.1, cutmix=cutmix
        ),
        seed=seed,
    )

    def own():
        return build(arm, setting, len(pictures.labels))

    model = train(own, data, how, folder)
    return [scores(logits(model, test), truth) | extra]


def report(rows, setting):
    table, gains, annotators, mixings = [], [], [], []
    for arm in figures.arms_in(rows, ARMS):
        found = figures.by_images(rows, arm, counts(setting))
        table.append([arm, *(figures.percent(x.values()) for x in found)])
        if arm != BASE:
            base = figures.by_images(rows, BASE, counts(setting))
            gains.append([arm, *figures.gains(found, base)])
    for arm, other in PAIRS:
        if not {arm, other} <= set(figures.arms_in(rows, ARMS)):
            continue
        both = (figures.by_images(rows, x, counts(setting)) for x in (arm, other))
        mixings.append([f"{arm} less {other}", *figures.gains(*both)])
    for count in counts(setting):
        known = figures.by_seed(
            rows, "annotator_accuracy", arm="annotator, CutMix", images=count
        )
        annotators.append(figures.percent(known.values()))
    table.append(["the annotator itself", *annotators])
    heads = [f"{x} images" for x in counts(setting)]
    return (
        "Accuracy in percent by number of training images, with 95 % intervals.\n\n"
        + figures.markdown(["training", *heads], table)
        + f"\n\nPoints more or less than {BASE!r}, paired by seed.\n\n"
        + figures.markdown(["training", *heads], gains)
        + "\n\nWays to mix, paired by seed.\n\n"
        + figures.markdown(["difference", *heads], mixings)
    )


def picture(rows, setting, path):
    arms = figures.arms_in(rows, ARMS)
    title = "A label for every token, equal numbers of updates"
    figures.images_picture(path, rows, arms, counts(setting), title)


EXPERIMENT = lab.Experiment(
    name="token_labeling",
    about=__doc__,
    factors=("arm", "images"),
    jobs=jobs,
    run=run,
    report=report,
    draw=picture,
    rates=(1e-3, 2e-3, 4e-3),
    quick=(BASE, "exact labels, MixToken", "annotator, CutMix", "annotator, MixToken"),
    gpu=True,
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
