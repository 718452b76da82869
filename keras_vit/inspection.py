"""What a vision transformer attends to.

Every function takes a trained model as it is, of any size, precision or backend, and
changes nothing in it. Images are raw pixels of 0..255, numbers come back as NumPy
arrays; `keras_vit.drawing` makes pictures of them.

Shapes in this file:
    B batch, H x W pixels, h x w patch grid, N = h * w patch tokens, R prefix tokens, A
    heads, T = R + N, L blocks.
"""

import numpy as np
from keras import ops

from keras_vit import kernels
from keras_vit.head import AttentionPool, TokenPool
from keras_vit.nodes import block_name, not_ours, prefix_length
from keras_vit.transformer import TransformerBlock

BATCH = 8  # images at a time: attention maps are large


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
    images = checked_images(model, images)
    parts = list(_batches(model, images))
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _batches(model, images):
    """`attention_maps` of some images at a time."""
    kinds = TransformerBlock | AttentionPool
    names = [layer.name for layer in model.layers if isinstance(layer, kinds)]
    deeper = [x for x in model._flatten_layers() if isinstance(x, kinds)]
    if not names or len(deeper) != len(names):
        raise ValueError(not_ours(model))
    for start in range(0, len(images), BATCH):
        with kernels.watched_attention() as found:
            model(ops.convert_to_tensor(images[start : start + BATCH]), training=False)
        if len(found) != len(names):
            raise ValueError(not_ours(model))
        yield dict(zip(names, map(ops.convert_to_numpy, found), strict=True))


def checked_images(model, images):
    """Images as float32 `(B, H, W, 3)` that the model takes.

    Raises:
        ValueError: If they have another shape, or there is none.
    """
    if ops.is_tensor(images):
        images = ops.convert_to_numpy(images)
    images = np.asarray(images, "float32")
    expected = model.input_shape
    sides = zip(expected[1:], images.shape[1:], strict=False)
    wrong = images.ndim != 4 or any(a not in (None, b) for a, b in sides)
    if wrong or not len(images):
        shown = ["any" if side is None else str(side) for side in expected[1:]]
        raise ValueError(
            f"images must be (B, {' x '.join(shown)}) for {model.name!r}, at least "
            f"one, got {images.shape}; one image alone is images[None]."
        )
    return images


def grid_of(model, images):
    """h and w of the patches of images `(B, H, W, 3)`, and R."""
    patch_size = model.get_layer("patches").patch_size
    height, width = images.shape[1:3]
    return -(-height // patch_size), -(-width // patch_size), prefix_length(model)


def check_square(model, what):
    """Refuse a model whose keys are not its queries, and one that is not ours.

    Raises:
        ValueError: If it is one.
    """
    names = [layer.name for layer in model.layers]
    if "stage0_patches" in names:
        raise ValueError(
            f"{what} must have keys that are the queries, so {model.name!r} has none: "
            "it reduces the grid of its keys. attention_maps has what it attends to."
        )
    if "patches" not in names:
        raise ValueError(not_ours(model))


def _square_batches(model, images):
    """Maps of all blocks, and that of the pool or None, of some images at a time."""
    for maps in _batches(model, images):
        pool = maps.pop("pool", None)
        yield maps, pool


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

    That is the row of the class token, with a distillation token the mean of both;
    with `pool="mean"`, and where nothing is pooled, the mean of the rows of the
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
    check_square(model, "Attention rollout")
    images, found = checked_images(model, images), []
    for maps, pool in _square_batches(model, images):
        flow = rollout(maps.values())
        found.append(_read_out(model, flow[:, None], pool))
    row = np.concatenate(found)[..., prefix_length(model) :]  # (B, 1, N)
    return _laid_out(model, images, row / row.max(-1, keepdims=True))[:, 0]


def _laid_out(model, images, rows):
    """Rows `(B, A, N)` to `(B, A, h, w)`."""
    height, width, _ = grid_of(model, images)
    return rows.reshape(*rows.shape[:2], height, width).astype("float32")


def class_attention(model, images, block=None):
    """What the answer attends to, head by head.

    The row of the class token, with a distillation token the mean of both; with
    `pool="mean"`, and where nothing is pooled, the mean of the rows of the patches.
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
    check_square(model, "Class attention")
    name = block_name(model, -1 if block is None else block)
    images, found = checked_images(model, images), []
    for maps, pool in _square_batches(model, images):
        if block is None and pool is not None:
            found.append(pool[:, :, 0])
        else:
            row = _read_out(model, maps[name], None)
            found.append(row[..., prefix_length(model) :])
    return _laid_out(model, images, np.concatenate(found))


def _read_out(model, weights, pool):
    """`(B, A, T, T)` to the row that the head reads, `(B, A, T)`."""
    patches = weights[:, :, prefix_length(model) :]
    if pool is not None:
        return np.einsum("bn,bant->bat", pool[:, :, 0].mean(1), patches)
    read = [layer.index for layer in model.layers if isinstance(layer, TokenPool)]
    return weights[:, :, read].mean(2) if read else patches.mean(2)


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
    check_square(model, "Attention distance")
    images = checked_images(model, images)
    height, width, num_prefix = grid_of(model, images)
    distance = grid_distances(height, width) * model.get_layer("patches").patch_size
    total = 0.0
    for maps, _ in _square_batches(model, images):
        rows = []
        for weights in maps.values():
            weights = weights[:, :, num_prefix:, num_prefix:]
            far = np.einsum("baij,ij->bai", weights, distance)
            if normalize:
                far = far / np.maximum(weights.sum(-1), 1e-30)
            rows.append(far.mean(2).sum(0))
        total = total + np.stack(rows)
    return (total / len(images)).astype("float32")


def grid_distances(height, width):
    """Distance of every two patches of a grid, in patches: `(N, N)`."""
    y, x = (part.reshape(-1) for part in np.mgrid[:height, :width])
    return np.hypot(y[:, None] - y, x[:, None] - x)
