"""What a vision transformer sees: its features and its attention.

Every function takes a trained model as it is, of any size, precision or backend, and
changes nothing in it. Images are raw pixels of 0..255, numbers come back as NumPy
arrays; `keras_vit.drawing` makes pictures of them.

Shapes in this file:
    B batch, H x W pixels, h x w patch grid, N = h * w patch tokens, R prefix tokens, D
    embedding, A heads, L blocks.
"""

import keras
import numpy as np
from keras import ops

from keras_vit import kernels
from keras_vit.embedding import FeatureMap
from keras_vit.encoder import unknown
from keras_vit.head import AttentionPool, MeanPool
from keras_vit.transformer import TransformerBlock

FORMATS = ("grid", "tokens")
BATCH = 8  # images at a time: attention maps are large


# --- features ---


def features(model, layers=-1, format="grid", *, prefix=False, normalize=False):
    """A Keras model of what chosen blocks put out, prefix tokens apart.

        model = keras_vit.features(vit, [3, 7, 11])
        maps = model(images)  # {"block3": (B, h, w, D), ...}

    It shares its weights with the model, and takes images of the same sizes; it can be
    saved and exported like any other.

    Args:
        model: Model of this package, or one that is built on it (`SemanticFPN`).
        layers: Which blocks, one or a list: numbers, -1 being the last, or names, such
            as `"block3"`, or `"peg0"` for what comes out of a PEG. Of a pyramid
            (`PCPVT`) numbers are those of its stages.
        format: `"grid"` for `(B, h, w, D)`, `"tokens"` for `(B, N, D)`.
        prefix: Whether class token, distillation token and registers come too,
            `(B, R, D)`, as `"block3_prefix"`.
        normalize: Whether each token passes the LayerNorm that the model has after its
            last block, with the weights that it has now.

    Returns:
        `keras.Model`: raw images `(B, H, W, 3)` to a dictionary by the name of the
        layer.

    Raises:
        ValueError: If there is no such layer or format; `prefix` is asked of a model
            without such tokens; or `normalize` of a layer that is not as wide as the
            last.
    """
    if format not in FORMATS:
        raise ValueError(unknown("format", format, FORMATS))
    given = layers if isinstance(layers, list | tuple) else [layers]
    names = [node_name(model, layer) for layer in given]
    num_prefix = prefix_length(model)
    if prefix and not num_prefix:
        raise ValueError(f"prefix must be False: {model.name!r} has no prefix tokens.")
    found = {}
    for name in names:
        x = model.get_layer(name).output
        if len(x.shape) == 4:  # a stage of a pyramid is a map already
            x = _normalized(model, name, x) if normalize else x
            tokens = keras.layers.Reshape((-1, x.shape[-1]), name=f"{name}_flat")
            found[name] = x if format == "grid" else tokens(x)
            continue
        x = _normalized(model, name, x) if normalize else x
        if format == "grid":
            grid = _gridnode_name(model, name).output
            found[name] = FeatureMap(num_prefix, name=f"{name}_map")(x, grid)
        else:
            found[name] = x[:, num_prefix:]
        if prefix:
            found[f"{name}_prefix"] = x[:, :num_prefix]
    return keras.Model(model.input, found, name=f"{model.name}_features")


def node_name(model, layer):
    """Name of the node that a number or a name of a layer means."""
    names = [x.name for x in model.layers]
    kind = "stage" if "stage0" in names else "block"
    numbered = [x for x in names if x.removeprefix(kind).isdecimal()]
    if isinstance(layer, int) and not isinstance(layer, bool):
        if not -len(numbered) <= layer < len(numbered):
            raise ValueError(
                f"layers must be in 0..{len(numbered) - 1}, the {kind}s of "
                f"{model.name!r}, or from the end, -1; got {layer}."
            )
        return numbered[layer]
    known = [x.name for x in model.layers if len(_output_shape(x)) in (3, 4)]
    if layer not in known:
        raise ValueError(unknown("layers", layer, [*numbered, *known]))
    return layer


def _output_shape(layer):
    shape = getattr(getattr(layer, "output", None), "shape", ())
    return shape or ()


def _normalized(model, name, x):
    """`x` after a copy of the model's last LayerNorm: to share it would entangle."""
    norm = model.get_layer("norm")
    if norm.gamma.shape[0] != x.shape[-1]:
        raise ValueError(
            f"normalize must be False for {name!r}: it is {x.shape[-1]} wide, the "
            f"last LayerNorm {norm.gamma.shape[0]}."
        )
    own = type(norm).from_config({**norm.get_config(), "name": f"{name}_norm"})
    y = own(x)
    own.set_weights(norm.get_weights())
    return y


def _gridnode_name(model, name):
    """The layer whose output has the grid that the tokens of a node were."""
    stage = name.partition("_")[0]
    names = [layer.name for layer in model.layers]
    own = f"{stage}_patches"
    return model.get_layer(own if own in names else "patches")


def prefix_length(model):
    """R, the number of tokens before the patches."""
    tokens = [layer for layer in model.layers if layer.name == "tokens"]
    return sum(weight.shape[1] for layer in tokens for weight in layer.prefix)


# --- attention ---


def attention_maps(model, images):
    """The attention weights of every block and head.

        A = softmax(q k^T / sqrt(d))

    No fused kernel hides them, and with a position in the attention, normalised
    queries, or half precision it is what the model does: rows sum to 1.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", equation 6,
    https://arxiv.org/abs/2010.11929.

    Args:
        model: Any model of this package.
        images: `(B, H, W, 3)`, raw pixels of 0..255.

    Returns:
        Dictionary by the name of the block, in their order: float32
        `(B, A, R + N, R + N)`, query first; in a pyramid `(B, A, N, M)` for M reduced
        keys. Pooling by attention comes last, as `"pool"`: `(B, A, 1, N)`.

    Raises:
        ValueError: If the images have another shape than the model takes, or nothing
            in the model attends.
    """
    images = _checked(model, images)
    attending = [
        layer
        for layer in model._flatten_layers(include_self=False)
        if isinstance(layer, TransformerBlock | AttentionPool)
    ]
    if not attending:
        raise ValueError(f"{model.name!r} must have blocks that attend; it has none.")
    parts = []
    for start in range(0, len(images), BATCH):
        with kernels.watched_attention() as found:
            model(ops.convert_to_tensor(images[start : start + BATCH]), training=False)
        parts.append([ops.convert_to_numpy(x) for x in found])
    names = [layer.name for layer in attending]
    whole = [np.concatenate(x) for x in zip(*parts, strict=True)]
    return dict(zip(names, whole, strict=True))


def _checked(model, images):
    images = np.asarray(images, "float32")
    expected = model.input_shape
    sides = zip(expected[1:], images.shape[1:], strict=False)
    if images.ndim != 4 or any(a not in (None, b) for a, b in sides):
        shown = " x ".join(
            "any" if side is None else str(side) for side in expected[1:]
        )
        raise ValueError(
            f"images must be (B, {shown}) for {model.name!r}, got {images.shape}; one "
            "image alone is images[None]."
        )
    return images


def grid_of(model, images):
    """h and w of the patches of images `(B, H, W, 3)`, and R."""
    patch_size = model.get_layer("patches").patch_size
    height, width = images.shape[1:3]
    return -(-height // patch_size), -(-width // patch_size), prefix_length(model)


def square_maps(model, images, what):
    """Names and arrays `(B, A, R + N, R + N)` of all blocks, and the pool's or None.

    Raises:
        ValueError: If the keys of a block are not its queries.
    """
    names = [layer.name for layer in model.layers]
    if "patches" not in names:
        raise ValueError(
            f"{what} must have keys that are the queries, so {model.name!r} has none: "
            "it reduces the grid of its keys. attention_maps has what it attends to."
        )
    maps = attention_maps(model, images)
    pool = maps.pop("pool", None)
    return maps, pool


def rollout(maps):
    """How much of each token of the input is in each of the output, by attention alone.

        A'_l = rows of (mean over heads of A_l + I), each divided by its sum
        R    = A'_L ... A'_1

    Source: Abnar and Zuidema 2020, "Quantifying Attention Flow in Transformers",
    https://arxiv.org/abs/2005.00928.

    Args:
        maps: Arrays `(B, A, T, T)`, that of the first block first.

    Returns:
        `(B, T, T)`; rows sum to 1.
    """
    result = None
    for weights in maps:
        step = weights.mean(1, dtype="float64") + np.eye(weights.shape[-1])
        step /= step.sum(-1, keepdims=True)
        result = step if result is None else step @ result
    return result


def attention_rollout(model, images):
    """Which patches reach the answer by attention: `rollout`, from what is pooled.

    That is the row of the class token; with `pool="mean"` the mean of the rows of the
    patches; with `pool="attention"` their mean as the probe weights them.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`, raw pixels of 0..255.

    Returns:
        `(B, h, w)`; the largest of an image is 1.

    Raises:
        ValueError: If the images do not fit, or the model is a pyramid, whose keys are
            not its queries.
    """
    maps, pool = square_maps(model, images, "Attention rollout")
    height, width, num_prefix = grid_of(model, np.asarray(images))
    flow = rollout(maps.values())
    row = _read_out(model, flow[:, None], pool)[..., num_prefix:]  # (B, 1, N)
    row = row / row.max(-1, keepdims=True)
    return row.reshape(-1, height, width).astype("float32")


def class_attention(model, images, block=None):
    """What the answer attends to, head by head.

    The row of the class token; with `pool="mean"` the mean of the rows of the patches.
    With `pool="attention"` and no block it is the probe's own attention.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`, raw pixels of 0..255.
        block: Number of the block; None for the last attention before the head.

    Returns:
        `(B, A, h, w)`; a head sums to 1 less what goes to prefix tokens.

    Raises:
        ValueError: If the images do not fit, there is no such block, or the model is a
            pyramid.
    """
    maps, pool = square_maps(model, images, "Class attention")
    height, width, num_prefix = grid_of(model, np.asarray(images))
    if block is None and pool is not None:
        row = pool[:, :, 0]
    else:
        weights = maps[node_name(model, -1 if block is None else block)]
        row = _read_out(model, weights, None)[..., num_prefix:]
    return row.reshape(*row.shape[:2], height, width)


def _read_out(model, weights, pool):
    """`(B, A, T, T)` to the row that the head reads, `(B, A, T)`."""
    num_prefix = prefix_length(model)
    kinds = [layer for layer in model.layers if layer.name == "pool"]
    if pool is not None:
        return np.einsum(
            "bn,bant->bat", pool[:, :, 0].mean(1), weights[:, :, num_prefix:]
        )
    if kinds and isinstance(kinds[0], MeanPool | AttentionPool):
        return weights[:, :, num_prefix:].mean(2)
    return weights[:, :, 0]


def attention_distance(model, images, normalize=True):
    """How far each head looks, in pixels: the mean distance of what it attends to.

        mean over images and patches i of  sum_j A_ij |x_i - x_j|

    Prefix tokens are left out, as queries and as keys.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", figure 7, right,
    https://arxiv.org/abs/2010.11929, which shows it over 128 images.

    Args:
        model: `ViT`, `CPVT` or `LVViT`.
        images: `(B, H, W, 3)`, raw pixels of 0..255.
        normalize: Whether the weights of a row are divided by their sum, of which a
            part is with the prefix tokens.

    Returns:
        `(L, A)`, float32.

    Raises:
        ValueError: If the images do not fit, or the model is a pyramid.
    """
    maps, _ = square_maps(model, images, "Attention distance")
    height, width, num_prefix = grid_of(model, np.asarray(images))
    distance = grid_distances(height, width) * model.get_layer("patches").patch_size
    rows = []
    for weights in maps.values():
        weights = weights[:, :, num_prefix:, num_prefix:]
        if normalize:
            weights = weights / weights.sum(-1, keepdims=True)
        rows.append((weights * distance).sum(-1).mean((0, 2)))
    return np.stack(rows).astype("float32")


def grid_distances(height, width):
    """Distance of every two patches of a grid, in patches: `(N, N)`."""
    y, x = (part.reshape(-1) for part in np.mgrid[:height, :width])
    return np.hypot(y[:, None] - y, x[:, None] - x)
