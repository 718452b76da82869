"""Small data needs bias: how many images does a transformer want?

    python experiments/small_data.py

The ViT paper finds that a transformer, which knows nothing of neighbourhood, falls
behind a convolutional network where images are few, and not where they are many. Here
five networks of about as many weights see 200 to all 1,437 training digits of
scikit-learn, 32 px large, slightly turned, zoomed and shifted: a plain ViT, CPVT (one
PEG), the pyramid PCPVT, LV-ViT's convolutional stem before a plain transformer, and a
small convolutional network. Every one sees 24,000 images in all, however many are
different; of two sets of one seed the smaller is part of the larger, and all networks
see the same.
"""

import figures
import lab
from convnet import convnet
from images import available, enlarge, read_pictures
from train import dataset, logits, recipe, scores, shown, train

import keras_vit
import training

COUNTS = (200, 500, 1437)
SEEN = 24_000  # images, in all
BATCH = 50
PLAIN = {"embed_dim": 48, "depth": 5, "num_heads": 4, "mlp_ratio": 3.75}
TINY = {"embed_dim": 192, "depth": 12, "num_heads": 3, "mlp_ratio": 4.0}
AS_VIT = {"qkv_bias": True}  # as the blocks of the plain one
ARMS = {  # family, arguments, arguments on a GPU
    "ViT": ("ViT", PLAIN, TINY),
    "CPVT": ("CPVT", PLAIN, TINY),
    "PCPVT": (
        "PCPVT",
        {
            "embed_dims": (24, 32, 40, 48),
            "depths": (1, 1, 1, 1),
            "num_heads": (1, 2, 4, 4),
            "mlp_ratios": (4, 4, 4, 4),
        },
        {
            "embed_dims": (48, 96, 192, 256),
            "depths": (2, 2, 4, 2),
            "num_heads": (1, 2, 4, 8),
            "mlp_ratios": (4, 4, 4, 4),
        },
    ),
    "LV-ViT stem": (
        "LVViT",
        PLAIN | AS_VIT | {"stem_width": 8},
        TINY | AS_VIT | {"stem_width": 32},
    ),
    "CNN": (None, {"widths": (24, 48, 88)}, {"widths": (72, 144, 288, 536)}),
}
AUGMENTATION = training.Augmentation(
    random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.08}
)


def counts(setting):
    """Numbers of training images."""
    return available(setting, setting.pick(COUNTS, (64,)))


def jobs(setting):
    return [{"arm": arm, "images": x} for arm in ARMS for x in counts(setting)]


def build(arm, setting, num_classes):
    """Build the network of an arm."""
    family, *sizes = ARMS[arm]
    own = sizes[setting.scale == "gpu"]
    side, patch = setting.pick((32, 8), (32, 8), (96, 8))
    if family is None:
        return convnet(side, num_classes, **own)
    if family == "LVViT":
        own = own | {"token_weight": 0}
    if family != "PCPVT":
        own = own | {"patch_size": patch}
    return getattr(keras_vit, family)(
        "small" if family == "PCPVT" else "tiny",
        image_size=side,
        num_classes=num_classes,
        initialization="jax",
        normalization="inception",
        crop_ratio=None,
        **own,
    )


def run(job, setting, folder):
    """Train one network on so many images."""
    arm, seed = job["arm"], job["seed"]
    side = setting.pick(32, 32, 96)
    pictures = read_pictures(setting).few(job["images"], seed)
    (images, classes), (test, truth) = pictures.train, pictures.test
    images, test = enlarge(images, side), enlarge(test, side)
    rows, epochs = shown(len(images), setting.pick(SEEN, 128, 8 * SEEN))
    steps = epochs * (len(rows) // BATCH)
    how = recipe(
        "small_data",
        epochs=epochs,
        batch_size=BATCH,
        learning_rate=job.get("learning_rate") or setting.learning_rates[arm],
        warmup_steps=max(1, steps // 10),
        augmentation=AUGMENTATION,
        seed=seed,
    )
    labels = pictures.labels
    data = dataset("small_data", (images[rows], classes[rows]), (test, truth), labels)
    model = train(lambda: build(arm, setting, len(labels)), data, how, folder)
    found = scores(logits(model, test), truth)
    return [{"weights": model.count_params(), **found}]


def report(rows, setting):
    table, gaps = [], []
    for arm in figures.arms_in(rows, ARMS):
        weights = next(row["weights"] for row in rows if row["arm"] == arm)
        found = figures.by_images(rows, arm, counts(setting))
        cells = [figures.percent(x.values()) for x in found]
        table.append([arm, f"{weights:,}", *cells])
        if arm != "CNN":
            cnn = figures.by_images(rows, "CNN", counts(setting))
            gaps.append([arm, *figures.gains(found, cnn)])
    heads = [f"{x} images" for x in counts(setting)]
    return (
        "Accuracy in percent by number of training images, with 95 % intervals.\n\n"
        + figures.markdown(["network", "weights", *heads], table)
        + "\n\nPoints more or less than the CNN, paired by seed.\n\n"
        + figures.markdown(["network", *heads], gaps)
    )


def picture(rows, setting, path):
    arms = figures.arms_in(rows, ARMS)
    title = "Few images, equal numbers of updates"
    figures.images_picture(path, rows, arms, counts(setting), title)


EXPERIMENT = lab.Experiment(
    name="small_data",
    about=__doc__,
    factors=("arm", "images"),
    jobs=jobs,
    run=run,
    report=report,
    draw=picture,
    quick=("PCPVT", "LV-ViT stem", "CNN"),
    gpu=True,
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
