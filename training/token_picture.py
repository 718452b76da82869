"""Pictures of labels of tokens: what they are, what is answered, how they are mixed."""

from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from keras_vit import MixToken
from training.batches import training_batches
from training.data import Dataset, subset
from training.picture import colours, draw_segmentation
from training.targets import mix
from training.task import check_fits, is_segmentation, preprocess_for


def check_drawable(network: keras.Model, data: Dataset) -> None:
    """Refuse a model whose answers `draw` has no picture of.

    Raises:
        ValueError: If it answers once an image, or for tokens and the data have no
            label maps.
    """
    if is_segmentation(network):
        return
    if not _has_token_head(network):
        raise ValueError(
            "A picture is made of models that answer for each pixel or each token; "
            "this model gives one answer an image."
        )
    if data.label_maps is None:
        raise ValueError(
            f"A picture of tokens needs label maps, {data.name!r} has none; make some "
            "with keras-vit annotate and give them as --labels."
        )


def draw(
    network: keras.Model,
    data: Dataset,
    path: str | Path,
    image_size: tuple[int, int] | None = None,
) -> None:
    """Write the picture of a model: `draw_segmentation` or `draw_tokens`."""
    if is_segmentation(network):
        draw_segmentation(network, data, path, image_size)
    else:
        draw_tokens(network, data, path)


def _has_token_head(network):
    return "token_head" in [layer.name for layer in network.layers]


def draw_tokens(
    network: keras.Model, data: Dataset, path: str | Path, count: int = 6
) -> None:
    """Write a picture: training images, labels of their tokens, and answers.

    A token has the colour of its largest class, the brighter the more probable. The
    answers are those of the network and, before it, of the same network with fresh
    weights.

    Args:
        network: With a node `token_head`, such as `LVViT`.
        data: With label maps.
        path: PNG file.
        count: Number of images.

    Raises:
        ValueError: If the network has no token head or does not fit the data, or the
            data have no label maps.
    """
    if not _has_token_head(network):
        raise ValueError(
            "A picture of tokens is made of a model with a token head, such as LVViT "
            f"with token_weight > 0; {network.name!r} has none."
        )
    check_drawable(network, data)
    check_fits(network, data)
    preprocess = preprocess_for(network, data)
    patch_size = network.get_layer("patches").patch_size
    grid = [-(-side // patch_size) for side in preprocess.image_size]
    few = subset(data, min(count, data.sizes["train"]), seed=0)
    with data.naming_damaged_files():
        images, labels = next(
            training_batches(
                few, preprocess, few.sizes["train"], epochs=1, token_grid=grid
            ).as_numpy_iterator()
        )

    def answers(model):
        node = keras.Model(model.input, model.get_layer("token_head").output)
        return _softmax(node.predict(images, verbose=0))

    rows = {
        "image": images,
        "label map": _coloured(labels["tokens"]),
        "fresh": _coloured(answers(keras.models.clone_model(network))),
        "trained": _coloured(answers(network)),
    }
    _write(rows, data.labels, Path(path))


def draw_mixing(
    data: Dataset,
    path: str | Path,
    image_size: int = 48,
    patch_size: int = 8,
    seed: int = 25,
) -> None:
    """Write a picture: CutMix, whose tokens at the seam show two images, and MixToken.

    The frame of a token says which image it shows, blue or orange; a token that shows
    both is red.

    Args:
        data: Of which the first two training images are mixed.
        path: PNG file.
        image_size: Side of the images, in pixels; `patch_size` divides it.
        patch_size: Side of a token, in pixels.
        seed: Seed of both boxes.
    """
    from matplotlib.figure import Figure

    pair = [data.decode(*example)[0] for example in data.stream("train").take(2)]
    images = tf.stack(
        [tf.image.resize(x, (image_size,) * 2, antialias=True) for x in pair]
    )
    side = image_size // patch_size
    own = tf.broadcast_to(tf.eye(2)[:, None, None], (2, side, side, 2))
    key = tf.constant([seed, 0], tf.int64)
    cut, targets = mix(images, {"tokens": own}, key, cutmix=1.0)

    layer = MixToken(seed=seed)
    patches = _patches(images.numpy(), side)
    box = layer.draw_box(patches)
    mixed = keras.ops.convert_to_numpy(layer(patches, box))
    parts = keras.ops.convert_to_numpy(layer(own.numpy(), box))
    panels = [
        ("image A", images[0], own[0]),
        ("image B", images[1], own[1]),
        ("CutMix: pixels", cut[0], targets["tokens"][0]),
        ("MixToken: tokens", _patches(mixed, side, back=True)[0], parts[0]),
    ]
    figure = Figure(figsize=(11, 3.35), layout="constrained")
    for axes, (title, image, shares) in zip(figure.subplots(1, 4), panels, strict=True):
        _panel(axes, title, np.asarray(image), np.asarray(shares), patch_size)
    Path(path).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")


def _panel(axes, title, image, shares, patch_size):
    """One image with a frame around each token, by what part of it is of image A."""
    from matplotlib.patches import Rectangle

    axes.imshow(image.astype("uint8"))
    pure = 0
    for (row, column), share in np.ndenumerate(shares[..., 0]):
        colour = {1: "#56b4e9", 0: "#e69f00"}.get(round(float(share), 4), "#ff2a2a")
        pure += colour != "#ff2a2a"
        corner = column * patch_size + 0.1, row * patch_size + 0.1
        side = patch_size - 1.2
        frame = Rectangle(
            corner, side, side, fill=False, edgecolor=colour, linewidth=1.6
        )
        axes.add_patch(frame)
    count = shares[..., 0].size
    axes.set_title(f"{title}\n{pure} of {count} tokens pure", fontsize=11)
    axes.set_axis_off()


def _patches(images, side, back=False):
    """`(B, S, S, 3)` to the grid `(B, side, side, P P 3)` of its patches, or back."""
    if back:
        patch = round((images.shape[-1] // 3) ** 0.5)
        x = images.reshape(-1, side, side, patch, patch, 3).transpose(0, 1, 3, 2, 4, 5)
        return x.reshape(-1, side * patch, side * patch, 3)
    batch, pixels = images.shape[:2]
    patch = pixels // side
    x = images.reshape(batch, side, patch, side, patch, 3).transpose(0, 1, 3, 2, 4, 5)
    return x.reshape(batch, side, side, -1)


def _softmax(logits):
    x = np.exp(logits - logits.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def _coloured(probabilities):
    """RGB of the largest class of each token; black where all are alike: `(..., 3)`."""
    count = probabilities.shape[-1]
    palette = colours(count + 1)[1 : count + 1]
    largest = probabilities.max(-1, keepdims=True)
    strength = (largest - 1 / count) / (1 - 1 / count)
    return palette[probabilities.argmax(-1)] * np.clip(strength, 0, 1)


def _write(rows, labels, path):
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = len(rows["image"])
    figure = Figure(
        figsize=(1.6 * columns + 0.6, 1.6 * len(rows) + 0.5), layout="constrained"
    )
    grid = figure.subplots(len(rows), columns, squeeze=False)
    for (name, images), line in zip(rows.items(), grid, strict=True):
        for axes, image in zip(line, images, strict=True):
            axes.imshow(image.astype("uint8") if name == "image" else image)
            axes.set(xticks=[], yticks=[])
            axes.spines[:].set_visible(False)
        line[0].set_ylabel(name, fontsize=12)
    if len(labels) <= 20:
        palette = colours(len(labels) + 1)[1:]
        patches = [
            Patch(facecolor=colour, label=label)
            for label, colour in zip(labels, palette, strict=False)
        ]
        figure.legend(
            handles=patches,
            loc="outside lower center",
            ncols=min(len(patches), 10),
            frameon=False,
            title="colour: the largest class of a token; brightness: its probability",
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120, format="png")
