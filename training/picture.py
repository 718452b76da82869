"""Pictures of what a model says of held-out images."""

from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np

from training.batches import validation_batches
from training.data import Dataset
from training.task import IGNORED, check_fits, is_segmentation, preprocess_for

ROWS = ("image", "truth", "prediction")
# Background, then ten colours that differ, most of them Okabe's and Ito's.
COLOURS = (
    *("#1b1b1f", "#e69f00", "#56b4e9", "#009e73", "#f0e442", "#0072b2", "#d55e00"),
    *("#cc79a7", "#f7f7f7", "#9a6bff", "#999933"),
)


def draw_answers(
    files: Sequence[Path], answers: Sequence[tuple[str, float, str]], path: Path
) -> None:
    """Write a picture: up to 24 images with what a classifier says of them.

    Args:
        files: Image files.
        answers: Class, score and true class of each; the wrong ones are red.
        path: PNG file.
    """
    from matplotlib.figure import Figure
    from PIL import Image

    figure = Figure(figsize=(8, 6.2), layout="constrained")
    grid = figure.subplots(4, 6)
    figure.suptitle("Held-out digits, answered by the exported model (wrong: all, red)")
    for axes, file, (name, score, truth) in zip(
        grid.flat, files, answers, strict=False
    ):
        with Image.open(file) as image:
            axes.imshow(np.asarray(image.convert("L")), cmap="gray", vmin=0, vmax=255)
        right = name == truth
        text = f"{name}  {score:.0%}" + ("" if right else f"  (is {truth})")
        axes.set_title(text, fontsize=10, color="black" if right else "crimson")
    for axes in grid.flat:
        axes.set_axis_off()
    figure.savefig(path, dpi=120)


def draw_held_out(
    data: Dataset,
    classify: Callable[[Sequence[bytes]], Sequence[tuple[str, float]]],
    directory: Path,
) -> tuple[float, Path]:
    """Ask a classifier about every held-out file, and draw 24 of its answers.

    Args:
        data: What `load_data` returns, of image files.
        classify: Given the files' content, returns the class and the score of each.
        directory: Gets `predictions.png`, and `images` with the files that it shows:
            all that were answered wrongly, then the first ones.

    Returns:
        Accuracy, and the path of the picture.
    """
    examples = list(data.stream("validation").as_numpy_iterator())
    files = [data.read(handle) for handle, _ in examples]
    files = [x if isinstance(x, bytes) else x.numpy() for x in files]
    truth = [data.labels[label] for _, label in examples]
    answers = classify(files)

    folder = directory / "images"
    folder.mkdir(parents=True, exist_ok=True)
    wrong = [i for i, (name, _) in enumerate(answers) if name != truth[i]]
    right = [i for i in range(len(files)) if i not in wrong]
    shown = [*right[: max(0, 24 - len(wrong))], *wrong][:24]
    paths = [folder / f"{i:03d}_is_{truth[i]}.png" for i in shown]
    for path, i in zip(paths, shown, strict=True):
        path.write_bytes(files[i])
    picture = directory / "predictions.png"
    draw_answers(paths, [(*answers[i], truth[i]) for i in shown], picture)
    return 1 - len(wrong) / len(files), picture


def draw_segmentation(
    model: keras.Model,
    data: Dataset,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
    count: int = 6,
) -> None:
    """Write a picture: image, truth and prediction of the first held-out images.

    Args:
        model: With logits `(B, H, W, C)`.
        data: With masks.
        path: PNG file.
        image_size: As in `training.evaluation.evaluate`.
        count: Number of images.

    Raises:
        ValueError: If the model answers once an image, or does not fit the data.
    """
    if not is_segmentation(model):
        raise ValueError(
            "A picture is made of a model with logits for each pixel (B, H, W, C), got "
            f"{model.output_shape}."
        )
    check_fits(model, data)
    preprocess = preprocess_for(model, data, image_size)
    with data.naming_damaged_files():
        images, masks = next(iter(validation_batches(data, preprocess, count)))
    images, masks = images.numpy(), masks.numpy()
    classes = np.argmax(model.predict(images, verbose=0), axis=-1)
    palette = colours(len(data.labels))
    truth = palette[np.where(masks == IGNORED, len(data.labels), masks)]
    shown = np.unique([*masks[masks != IGNORED], *classes.ravel()])
    _figure(
        [images.astype("uint8"), truth, palette[classes]],
        [(data.labels[i], palette[i]) for i in shown],
        Path(path),
    )


def colours(count):
    """RGB of 0..1 for each of `count` classes, and grey for what does not count."""
    from matplotlib import colormaps, colors

    if count <= len(COLOURS):
        chosen = [colors.to_rgb(x) for x in COLOURS[:count]]
    else:
        chosen = [colormaps["turbo"](x)[:3] for x in np.linspace(0, 1, count)]
    return np.array([*chosen, colors.to_rgb("#808080")])


def _figure(rows, legend, path):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = len(rows[0])
    height, width = rows[0][0].shape[:2]
    size = 1.7 * columns + 0.5, 1.7 * len(rows) * height / width + 0.6
    figure = Figure(figsize=size, layout="constrained")
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for name, images, line in zip(ROWS, rows, grid, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image, interpolation="nearest")
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=12)
    patches = [
        Patch(facecolor=colour, edgecolor="#808080", label=label)
        for label, colour in legend
    ]
    figure.legend(
        handles=patches,
        loc="outside lower center",
        ncols=min(len(patches), 11),
        frameon=False,
        handlelength=1,
        handleheight=1,
        columnspacing=1.2,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
