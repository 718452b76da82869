"""A picture of what the network sees in training: a contact sheet of augmented images.

Shapes: R images of H x W pixels, `(h, w)` tokens, C classes.
"""

import dataclasses
import functools
import textwrap
from pathlib import Path

import numpy as np
import tensorflow as tf

from keras_vit.embedding import Preprocess
from training.batches import training_batches
from training.data import Dataset
from training.picture import colours
from training.recipe_parts import Augmentation
from training.task import IGNORED

CANDIDATES = 256  # images that are read, to find some of different classes
LONGEST = 13  # letters of a class in a caption
LEAST = 0.005  # part of a label that a caption tells, beyond what smoothing gives all
SIDE = 1.5  # of an image, inches


def draw_training(
    data: Dataset,
    preprocess: Preprocess,
    augmentation: Augmentation | None,
    path: str | Path,
    *,
    rows: int = 4,
    columns: int = 8,
    seed: int = 0,
    token_grid: tuple[int, int] | None = None,
) -> None:
    """Write a picture: training images as they are, and as the network sees them.

    Each of the `rows` images stands at the left without augmentation, and then as it is
    in the first `columns` epochs of `training_batches`, trained on these images alone:
    so they are mixed with each other. Where labels are mixed or smoothed a caption says
    what an image is trained towards. Under the images are their masks, or, with a
    `token_grid`, the labels of their tokens: the colour is the largest class, the
    brighter the more probable.

    Args:
        data: Of which `rows` training images are drawn, of different classes as far as
            there are some.
        preprocess: How a file becomes an image of the model's size.
        augmentation: What is done to the images; None for nothing.
        path: PNG file.
        rows: R, how many images; fewer where the data has not so many.
        columns: How many epochs.
        seed: Seed of the choice, and of order and augmentation.
        token_grid: As that of `training_batches`.

    Raises:
        ValueError: If `rows` or `columns` is not a positive int, a file is damaged, or
            `training_batches` refuses the augmentation of these data.
    """
    for name, value in (("rows", rows), ("columns", columns)):
        if isinstance(value, bool) or not (isinstance(value, int) and value > 0):
            raise ValueError(f"{name} must be a positive int, got {value!r}.")
    augmentation = augmentation or Augmentation()
    with data.naming_damaged_files():
        few, numbered = _few(data, rows, seed, with_maps=token_grid is not None)
        count = few.sizes["train"]

        def batches(data, **kwargs):
            kwargs = {"epochs": columns, "seed": seed, **kwargs}
            stream = training_batches(data, preprocess, count, **kwargs)
            return list(stream.as_numpy_iterator())

        once = dataclasses.replace(augmentation, repeats=1, on_accelerator=False)
        shown = batches(few, augmentation=once, token_grid=token_grid)
        shown = batches(few, epochs=1, token_grid=token_grid) + shown
        order = [np.argsort(numbers) for _, numbers in batches(numbered)]
    frames = [
        (images[places], _sorted(labels, places))
        for (images, labels), places in zip(shown, [order[0], *order], strict=True)
    ]
    size = " x ".join(map(str, preprocess.image_size))
    title = f"{data.name} in training, {size} pixels"
    # No phrase is divided: its spaces do not break.
    words = ", ".join(x.replace(" ", "\xa0") for x in in_words(augmentation))
    title = [title, *textwrap.wrap(words, max(40, 17 * columns))]
    _draw(frames, data.labels, augmentation, "\n".join(title), Path(path))


def in_words(augmentation: Augmentation) -> list[str]:
    """What an augmentation does, in its order, a few words for each step."""
    words = []
    if augmentation.repeats > 1:
        words.append(f"each image {augmentation.repeats} times in a row")
    if augmentation.random_resized_crop is not None:
        low, high = augmentation.random_resized_crop.get("scale", (0.08, 1.0))
        words.append(f"crops of {_percent(low)} to {_percent(high)}")
    if augmentation.random_flip:
        words.append("every second one mirrored")
    if augmentation.rand_augment is not None:
        given = {"num_ops": 2, "magnitude": 9.0, **augmentation.rand_augment}
        words.append(f"RandAugment ({given['num_ops']} at {given['magnitude']:g})")
    if augmentation.three_augment:
        words.append("grey, solarized or blurred")
    if augmentation.color_jitter:
        words.append(f"colours jittered by {_percent(augmentation.color_jitter)}")
    if augmentation.random_affine is not None:
        for name, verb, form in (
            ("rotation_degrees", "turned", "{:g} degrees".format),
            ("zoom", "zoomed", _percent),
            ("shift", "shifted", _percent),
        ):
            if augmentation.random_affine.get(name):
                amount = form(augmentation.random_affine[name])
                words.append(f"{verb} by up to {amount}")
    if augmentation.random_erasing:
        words.append(f"a box of noise in {_percent(augmentation.random_erasing)}")
    if augmentation.label_smoothing:
        words.append(f"labels smoothed by {augmentation.label_smoothing:g}")
    pairs = ("MixUp", augmentation.mixup), ("CutMix", augmentation.cutmix)
    mixes = [f"{name} {amount:g}" for name, amount in pairs if amount]
    if mixes and augmentation.mix_probability:
        chance = _percent(augmentation.mix_probability)
        often = "" if chance == "100 %" else f" in {chance} of the batches"
        words.append(" or ".join(mixes) + often)
    return words or ["no augmentation"]


def _percent(part):
    return f"{100 * part:.0f} %"


def _few(data, rows, seed, with_maps):
    """The data with the training images of the sheet alone, and these with their number
    for a label."""
    total = data.sizes["train"]
    window = min(total, data.shuffle_buffer)
    random = np.random.default_rng(seed)
    read = set(random.permutation(window)[: max(rows, CANDIDATES)].tolist())
    stream = data.stream("train").take(window).as_numpy_iterator()
    found = {i: example for i, example in enumerate(stream) if i in read}
    order = random.permutation(list(found))
    if not data.masks:
        seen = set()
        again = {i: _again(found[i][1], seen) for i in order}
        order = sorted(order, key=again.get)  # stable: of each class one, then others
    chosen = sorted(order[:rows])
    handles, labels = (np.array(x) for x in zip(*map(found.get, chosen), strict=True))

    def label_maps():
        return functools.reduce(
            lambda maps, one: maps.concatenate(one),
            map(tf.data.Dataset.from_tensors, maps),
        )

    few = {"sizes": {**data.sizes, "train": len(chosen)}, "shuffle_buffer": len(chosen)}
    follows = with_maps and data.label_maps is not None
    if follows:
        maps = data.label_maps().take(window).as_numpy_iterator()
        maps = [score_map for i, score_map in enumerate(maps) if i in set(chosen)]
    few = dataclasses.replace(
        data,
        stream=lambda part: tf.data.Dataset.from_tensor_slices((handles, labels)),
        label_maps=label_maps if follows else None,
        **few,
    )
    numbers = np.arange(len(chosen))
    numbered = dataclasses.replace(
        few,
        stream=lambda part: tf.data.Dataset.from_tensor_slices((handles, numbers)),
        label_maps=None,
        masks=False,
    )
    return few, numbered


def _again(label, seen):
    """Whether a label was seen before; now it was."""
    was = label in seen
    seen.add(label)
    return was


def _sorted(labels, places):
    if isinstance(labels, dict):
        return {name: x[places] for name, x in labels.items()}
    return labels[places]


def _caption(label, names, smoothing):
    """What an image is trained towards, such as `7 62 % + 3 38 %`."""
    if np.ndim(label) == 0:
        return _short(names[label])
    shown = [i for i in np.argsort(-label) if label[i] > smoothing / len(label) + LEAST]
    parts = [f"{_short(names[i])} {_percent(label[i])}" for i in shown[:3]]
    between = " + " if max(map(len, parts), default=0) < 10 else "\n+ "
    return between.join(parts) or "all alike"


def _short(name):
    return name if len(name) <= LONGEST else name[: LONGEST - 1] + "…"


def _colours_of(labels, classes):
    """RGB of the masks `(R, H, W)` or of the labels of tokens `(R, h, w, C)`."""
    if labels.ndim == 3:
        return colours(classes)[np.where(labels == IGNORED, classes, labels)]
    palette = colours(classes + 1)[1 : classes + 1]  # not by the black of token labels
    strength = (labels.max(-1, keepdims=True) - 1 / classes) / (1 - 1 / classes)
    return palette[labels.argmax(-1)] * np.clip(strength, 0, 1)


def _draw(frames, names, augmentation, title, path):
    from matplotlib.figure import Figure

    rows, (height, width) = len(frames[0][0]), frames[0][0].shape[1:3]
    second = [_second(labels) for _, labels in frames]
    lines = 1 if second[0] is None else 2
    side = SIDE * height / width + 0.25
    figure = Figure(
        figsize=(SIDE * len(frames) + 0.5, lines * rows * side + 0.8),
        layout="constrained",
    )
    ratios = [1, 0.06, *[1] * (len(frames) - 1)]
    grid = figure.subplots(
        lines * rows, len(ratios), squeeze=False, width_ratios=ratios
    )
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for column, (images, labels) in enumerate(frames):
        heading = f"epoch {column}" if column else "as it is"
        place = column + 1 if column else 0
        grid[0, place].set_title(heading, fontsize=11)
        truth = labels["class"] if isinstance(labels, dict) else labels
        for row, image in enumerate(images):
            axes = grid[lines * row, place]
            axes.imshow(_pixels(image), interpolation="nearest")
            if truth.ndim == 2 or (truth.ndim == 1 and not column):
                text = _caption(truth[row], names, augmentation.label_smoothing)
                axes.set_xlabel(text, fontsize=8, labelpad=3)
            if second[column] is not None:
                shown = _colours_of(second[column], len(names))[row]
                grid[lines * row + 1, place].imshow(shown, interpolation="nearest")
    if second[0] is not None:
        _legend(figure, second, names)
    figure.suptitle(title, fontsize=12)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=140, format="png")


def _second(labels):
    """What stands under the images: masks, labels of tokens, or None."""
    if isinstance(labels, dict):
        return labels["tokens"]
    return labels if labels.ndim == 3 else None


def _pixels(image):
    return np.clip(np.round(image), 0, 255).astype("uint8")


def _legend(figure, second, names):
    from matplotlib.patches import Patch

    if len(names) > 20:
        return
    masks = second[0].ndim == 3
    palette = colours(len(names)) if masks else colours(len(names) + 1)[1:]
    patches = [
        Patch(facecolor=palette[i], edgecolor="#808080", label=name)
        for i, name in enumerate(names)
    ]
    if masks and any((labels == IGNORED).any() for labels in second):
        label = "does not count"
        patches.append(Patch(facecolor=palette[-1], edgecolor="#808080", label=label))
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(patches), 12),
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
