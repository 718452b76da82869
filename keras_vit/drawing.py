"""Pictures of what a vision transformer sees, with matplotlib: one call each.

Every function returns a `matplotlib.figure.Figure`, which a notebook shows and
`figure.savefig("name.png")` writes; nothing is shown on a screen by itself. Images are
raw pixels of 0..255, `(B, H, W, 3)`.

Shapes in this file:
    B batch, H x W pixels, h x w patch grid, R prefix tokens, D embedding, A heads, L
    blocks, C classes.
"""

import functools
import io

import numpy as np

from keras_vit.head import class_labels
from keras_vit.inspection import (
    attention_distance,
    attention_rollout,
    checked_images,
    class_attention,
)
from keras_vit.nodes import features, stride_of
from keras_vit.places import position_kind, position_similarity, shown_block
from keras_vit.position import PEG

HEAT = "magma"
INK = "#0072b2"  # of Okabe's and Ito's colours
SIDE = 1.9  # inches of an image
TILES = 14  # a side, the most that a reader can tell apart
LONGEST = 32  # characters of the name of a class
OTHERS = 0.35  # grey of the classes without a colour


def draw_attention(model, images, block=None):
    """Each image with what the answer attends to, head by head.

    Every panel has its own scale, from the least to the most that it shows.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`.
        block: As in `class_attention`.

    Raises:
        ValueError: Those of `class_attention`.
    """
    images = checked_images(model, images)
    maps = class_attention(model, images, block)  # (B, A, h, w)
    stride = stride_of(model, "block0")
    columns = ["image", *(f"head {i}" for i in range(maps.shape[1]))]
    figure, grid = _panels(images, columns)
    for line, image, heads in zip(grid, _pixels(images), maps, strict=True):
        line[0].imshow(image)
        for axes, heat in zip(line[1:], heads, strict=True):
            _heat(axes, heat, image.shape, stride)
    return figure


def draw_rollout(model, images):
    """Each image, and over it what reaches the answer: `attention_rollout`.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`.

    Raises:
        ValueError: Those of `attention_rollout`.
    """
    images = checked_images(model, images)
    maps = attention_rollout(model, images)
    stride = stride_of(model, "block0")
    figure, grid = _panels(images, ["image", "rollout", "over the image"])
    for line, image, heat in zip(grid, _pixels(images), maps, strict=True):
        line[0].imshow(image)
        _heat(line[1], heat, image.shape, stride)
        light = image.mean(-1) / 255
        line[2].imshow(light, cmap="gray", vmin=0, vmax=1)
        low = heat.min()
        strength = (heat - low) / max(heat.max() - low, 1e-9)
        strength = 0.7 * _smooth(strength, image.shape, stride)
        _heat(line[2], heat, image.shape, stride, alpha=strength)
    return figure


def draw_distance(model, images):
    """How far each head of each block looks, in pixels: `attention_distance`.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`; the more, the less noise.

    Raises:
        ValueError: Those of `attention_distance`.
    """
    from matplotlib.ticker import MaxNLocator

    distances = attention_distance(model, images)  # (L, A)
    figure, axes = _axes((5.2, 3.4))
    blocks = np.arange(len(distances))
    axes.plot(
        blocks, distances.mean(1), "#d55e00", linewidth=1.4, label="mean over heads"
    )
    each = np.repeat(blocks, distances.shape[1])
    axes.scatter(
        each, distances.ravel(), 26, INK, alpha=0.75, linewidths=0, label="a head"
    )
    axes.set(xlabel="block", ylabel="mean attention distance, pixels", ylim=(0, None))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, loc="lower right", ncols=2)
    return figure


def draw_positions(model, images=None, *, grid=None, block=None):
    """How alike the position of each patch is to all others: a tile for each patch.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: For a PEG, as in `position_similarity`.
        grid: Likewise.
        block: Likewise.

    Raises:
        ValueError: Those of `position_similarity`.
    """
    found = position_similarity(model, images, grid=grid, block=block)
    kind = position_kind(model)
    height, width = found.shape[:2]
    rows, columns = (
        np.unique(np.linspace(0, side - 1, min(side, TILES)).round().astype(int))
        for side in (height, width)
    )
    canvas = np.full((len(rows) * (height + 1), len(columns) * (width + 1)), np.nan)
    for i, y in enumerate(rows):
        for j, x in enumerate(columns):
            top, left = i * (height + 1), j * (width + 1)
            canvas[top : top + height, left : left + width] = found[y, x]
    shape = canvas.shape[0] - 1, canvas.shape[1] - 1
    ratio = np.clip(height / width, 0.3, 2.0)
    figure, axes = _axes((6.8, 5.0 * ratio + 0.7), grid=False)
    name = shown_block(model, block) if kind in ("peg", "relative") else ""
    scale, label = _scale(kind, found, name)
    shown = axes.imshow(canvas[: shape[0], : shape[1]], aspect="auto", **scale)
    for axis, chosen, side in (("x", columns, width), ("y", rows, height)):
        every = max(1, len(chosen) // 8)
        ticks = [i * (side + 1) + (side - 1) / 2 for i in range(0, len(chosen), every)]
        axes.set(**{f"{axis}ticks": ticks, f"{axis}ticklabels": chosen[::every] + 1})
    axes.set(xlabel="patch, column", ylabel="patch, row")
    axes.spines[:].set_visible(False)
    axes.tick_params(length=0)
    figure.colorbar(shown, ax=axes, label=label, fraction=0.05, aspect=30)
    return figure


def _scale(kind, found, block):
    if kind == "peg":
        most = np.quantile(found, 0.999)
        return {"cmap": HEAT, "vmin": 0, "vmax": most}, f"attention of {block}"
    if kind == "relative":
        most = np.abs(found).max()
        label = f"bias of {block}, mean over heads"
        return {"cmap": "RdBu_r", "vmin": -most, "vmax": most}, label
    label = "cosine of query and key" if kind == "rotary" else "cosine similarity"
    return {"cmap": "RdBu_r", "vmin": -1, "vmax": 1}, label


def draw_pegs(model, channels=24):
    """The kernels of every PEG, of the channels whose kernels are largest.

    Args:
        model: With at least one `PEG`.
        channels: How many of each PEG.

    Raises:
        ValueError: If the model has none, or `channels` is not positive.
    """
    if channels < 1:
        raise ValueError(f"channels must be positive, got {channels}.")
    pegs = [layer for layer in model.layers if isinstance(layer, PEG)]
    if not pegs:
        raise ValueError(f"{model.name!r} must have a PEG to draw its kernels.")
    columns = min(channels, *(layer.kernel.shape[2] for layer in pegs))
    per_row = min(columns, 12)
    rows = -(-columns // per_row)
    size = 0.62 * per_row + 1.3, 0.62 * rows * len(pegs) + 0.35 * len(pegs) + 0.3
    figure = _new_figure(size)
    parts = np.ravel(figure.subfigures(len(pegs), 1, squeeze=False))
    for part, layer in zip(parts, pegs, strict=True):
        kernels = np.asarray(layer.kernel)[..., 0].transpose(2, 0, 1)  # (D, k, k)
        largest = np.argsort(-np.abs(kernels).max((1, 2)))[:columns]
        most = np.abs(kernels[largest]).max() or 1.0
        part.suptitle(f"{layer.name}, {len(kernels)} channels", fontsize=10)
        grid = part.subplots(rows, per_row, squeeze=False)
        for axes in grid.flat:
            axes.set_axis_off()
        for axes, i in zip(grid.flat, largest, strict=False):
            shown = axes.imshow(kernels[i], cmap="RdBu_r", vmin=-most, vmax=most)
            axes.set_title(i, fontsize=7, pad=2)
        part.colorbar(shown, ax=list(grid.flat), aspect=12 * rows, pad=0.01)
    return figure


def draw_features(model, images, layers=None):
    """Each image, and features of blocks in colours: alike tokens have alike colours.

    Red, green and blue are the three directions in which the patches of all images vary
    most, of each block on its own.

    Args:
        model: Any model of this package.
        images: `(B, H, W, 3)`.
        layers: As in `features`; None for four blocks from the first to the last.

    Raises:
        ValueError: Those of `features`.
    """
    images = checked_images(model, images)
    built = features(model, _four(model) if layers is None else layers)
    found = built.predict(images, verbose=0)
    figure, grid = _panels(images, ["image", *found])
    for line, image in zip(grid, _pixels(images), strict=True):
        line[0].imshow(image)
    for i, (name, maps) in enumerate(found.items()):
        stride = stride_of(model, name)
        for line, colours in zip(grid, _colours(maps), strict=True):
            _heat(line[i + 1], colours, images.shape[1:], stride, cmap=None)
    return figure


def _four(model):
    kind = "stage" if any(x.name == "stage0" for x in model.layers) else "block"
    names = [x.name for x in model.layers]
    names = [x for x in names if x.removeprefix(kind).isdecimal()]
    chosen = np.unique(np.linspace(0, len(names) - 1, min(4, len(names))).round())
    return [names[int(i)] for i in chosen]


def _colours(maps):
    """`(B, h, w, D)` to `(B, h, w, 3)` of 0..1: principal components."""
    tokens = np.asarray(maps, "float64").reshape(-1, maps.shape[-1])
    tokens = tokens - tokens.mean(0)
    _, _, directions = np.linalg.svd(tokens, full_matrices=False)
    x = tokens @ directions[:3].T
    x = np.pad(x, ((0, 0), (0, 3 - x.shape[1])))  # of one or two patches
    low, high = np.quantile(x, [0.01, 0.99], axis=0)
    x = np.clip((x - low) / np.maximum(high - low, 1e-9), 0, 1)
    return x.reshape(*maps.shape[:3], -1)


def draw_token_answers(model, images):
    """Each image, and what the token head answers for each patch of it.

    A patch has the colour of its class, the paler the less probable.

    Args:
        model: `LVViT` with a token head.
        images: `(B, H, W, 3)`.

    Raises:
        ValueError: If the model has no token head.
    """
    import keras
    from matplotlib.patches import Patch

    heads = [layer for layer in model.layers if layer.name == "token_head"]
    if not heads:
        raise ValueError(
            f"{model.name!r} must have a token head, as LVViT with token_weight > 0."
        )
    images = checked_images(model, images)
    cut = keras.Model(model.input, heads[0].output)
    logits = np.asarray(cut.predict(images, verbose=0))
    shares = np.exp(logits - logits.max(-1, keepdims=True))
    shares /= shares.sum(-1, keepdims=True)
    classes, certain = shares.argmax(-1), shares.max(-1)[..., None]
    colours, names = _legend(classes, class_labels(model))
    columns = _columns(names)
    bottom = 0.2 + 0.22 * -(-len(names) // columns)
    figure, grid = _panels(images, ["image", "patches"], bottom)
    stride = stride_of(model, "block0")
    for line, image, own, sure in zip(
        grid, _pixels(images), colours[classes], certain, strict=True
    ):
        line[0].imshow(image)
        shown = np.clip(sure * own + (1 - sure), 0, 1)
        _heat(line[1], shown, image.shape, stride, cmap=None)
    figure.legend(
        handles=[Patch(facecolor=colour, label=name) for name, colour in names],
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        handlelength=1,
        fontsize=9,
    )
    return figure


def _legend(classes, labels):
    """A colour for each class `(C, 3)`, and the names to tell with theirs.

    The classes that are answered most have their own, all others one together.
    """
    from matplotlib import colormaps

    found, counts = np.unique(classes, return_counts=True)
    often = found[np.argsort(-counts, kind="stable")]
    palette = colormaps["tab10" if len(often) <= 10 else "tab20"]
    own, others = often, often[:0]
    if len(often) > palette.N:
        own, others = often[: palette.N - 1], often[palette.N - 1 :]
    colours = np.full((classes.max() + 1, 3), OTHERS)
    names = []
    for i, c in enumerate(sorted(own)):
        colours[c] = palette(i)[:3]
        name = str(labels[c] if labels else c)
        short = name if len(name) <= LONGEST else f"{name[: LONGEST - 1]}…"
        names.append((short, tuple(colours[c])))
    if len(others):
        names.append((f"{len(others)} others", (OTHERS,) * 3))
    return colours, names


def _columns(names):
    """How many names of a legend stand beside each other below two images."""
    longest = max(len(name) for name, _ in names)
    return int(np.clip(40 // (longest + 5), 1, min(len(names), 5)))


# --- parts of a picture ---


@functools.cache
def _figure_class():
    """A figure that a notebook shows without `pyplot`."""
    from matplotlib.figure import Figure

    class Picture(Figure):
        def _repr_png_(self):
            buffer = io.BytesIO()
            self.savefig(buffer, format="png", dpi=100)
            return buffer.getvalue()

    return Picture


def _new_figure(size):
    return _figure_class()(figsize=size, layout="constrained")


def _pixels(images):
    return np.clip(np.asarray(images), 0, 255).astype("uint8")


def _panels(images, columns, bottom=0.0):
    """A row of axes without ticks for each image; titles over the first."""
    count, height, width = np.shape(images)[:3]
    ratio = height / width
    size = SIDE * len(columns), SIDE * ratio * count + 0.35 + bottom
    figure = _new_figure(size)
    grid = figure.subplots(count, len(columns), squeeze=False)
    for axes in grid.flat:
        axes.set(xticks=[], yticks=[])
        axes.spines[:].set_visible(False)
    for axes, title in zip(grid[0], columns, strict=True):
        axes.set_title(title, fontsize=10)
    return figure, grid


def _heat(axes, heat, shape, stride, cmap=HEAT, alpha=None):
    """A map `(h, w)` or `(h, w, 3)` over its image, whose last patches may be cut."""
    height, width = shape[:2]
    bottom, right = (side * stride - 0.5 for side in heat.shape[:2])
    if alpha is not None:
        heat = _smooth(heat, shape, stride)
        bottom, right = height - 0.5, width - 0.5
    extent = (-0.5, right, bottom, -0.5)
    axes.imshow(heat, cmap=cmap, alpha=alpha, extent=extent, interpolation="nearest")
    axes.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5))


def _smooth(heat, shape, stride):
    """A map `(h, w)` in the size of its image, linear between centres of patches."""
    for axis, side in enumerate(shape[:2]):
        centres = (np.arange(heat.shape[axis]) + 0.5) * stride
        places = np.arange(side) + 0.5
        heat = np.apply_along_axis(
            lambda line, at=places, own=centres: np.interp(at, own, line), axis, heat
        )
    return heat


def _axes(size, grid=True):
    figure = _new_figure(size)
    axes = figure.subplots()
    if grid:
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    return figure, axes
