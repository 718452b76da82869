"""A trained model as it is served: folded, in the precision asked for, constant.

What is done to the model changes its answers by rounding alone. Its weights become
constants of the graph, which TensorFlow's oneDNN kernels pack once; variables they lay
out anew at each call.
"""

import math

import keras
import numpy as np
import tensorflow as tf

from export.precision import computes_in
from keras_vit.attention import SelfAttention, SpatialReductionAttention
from keras_vit.embedding import PatchEmbedding, PixelNormalization
from keras_vit.head import AttentionPool, Classifier
from keras_vit.transformer import TransformerBlock

LARGEST = 2**31 - 2**26  # bytes of weights: a file of protobuf holds less than 2 GiB
BY_DEFAULT = 2**28  # a server holds constants several times
FLOAT32_LAYERS = ("head", "head_dist", "token_head")


def fold(model: keras.Model, pixels: bool = True) -> None:
    """Multiply constant factors into weights, in place; the model is for inference.

    LayerScale and the divisor of residuals go into the Dense before them, the scale of
    attention into the queries.

    Args:
        model: Any model, as loaded from a file: its Dense layers are plain.
        pixels: Whether mean and deviation of the pixels go into the patch embedding,
            where no zeros are added between the two. In bfloat16 that would round
            pixels of 0..255, and twice the error.
    """
    for layer in model._flatten_layers():
        if isinstance(layer, TransformerBlock):
            _fold_branch(layer.attention.project, layer.scale1, layer.residual_scale)
            _fold_branch(layer.mlp.reduce, layer.scale2, layer.residual_scale)
            layer.scale1 = layer.scale2 = None
            layer.residual_scale = 1.0
        if isinstance(layer, SelfAttention | SpatialReductionAttention | AttentionPool):
            _fold_scale(layer)
    if pixels:
        _fold_pixels(model)


def _fold_branch(dense, scale, divisor):
    factor = 1.0 if scale is None else keras.ops.convert_to_numpy(scale.gamma)
    for variable in dense.weights:  # the columns of the kernel, and the bias
        variable.assign(variable * (factor / divisor))


def _fold_scale(layer):
    if isinstance(layer, SelfAttention):
        scaled = layer.query_norm if layer.qk_norm else layer.qkv
    else:
        scaled = layer.query
    for variable in scaled.weights:
        factor = np.ones(variable.shape, "float32")
        width = variable.shape[-1]
        queries = width // 3 if scaled.name == "qkv" else width
        factor[..., :queries] = layer.scale
        variable.assign(variable * factor)
    layer.scale = 1.0


def _fold_pixels(model):
    """Raw pixels into the patch embedding: (x s + o) W + b = x (s W) + (o W + b)."""
    nodes = {layer.name: layer for layer in model.layers}
    pixels = nodes.get("normalize")
    patches = nodes.get("patches") or nodes.get("stage0_patches")
    foldable = (
        isinstance(pixels, PixelNormalization)
        and isinstance(patches, PatchEmbedding)
        and pixels.statistics is not None
        and [node.operation for node in pixels._outbound_nodes] == [patches]
        and not patches.pads
        and patches.use_bias
    )
    if not foldable:
        return
    mean, deviation = (np.asarray(x) for x in pixels.statistics)
    kernel, bias = (np.asarray(v, "float64") for v in patches.project.weights)
    kernel = kernel.reshape(-1, 3, kernel.shape[-1])  # (P P, C, D)
    offset = np.einsum("pcd,c->d", kernel, -mean / deviation)
    kernel = kernel / (255 * deviation)[:, None]
    patches.project.kernel.assign(kernel.reshape(patches.project.kernel.shape))
    patches.project.bias.assign(bias + offset)
    pixels.statistics = None


def set_precision(model: keras.Model, precision: str) -> None:
    """Let a model compute in `"float32"` or `"bfloat16"`, in place.

    What normalises pixels, a layer whose output is the model's, and one that is called
    `head`, `head_dist` or `token_head` compute in float32 in any case.
    """
    policy = "float32" if precision == "float32" else f"mixed_{precision}"
    outputs = {x._keras_history.operation for x in keras.tree.flatten(model.outputs)}
    for layer in model._flatten_layers(include_self=False):
        kept = isinstance(layer, PixelNormalization | Classifier)
        if not (kept or layer in outputs or layer.name in FLOAT32_LAYERS):
            layer.dtype_policy = keras.DTypePolicy(policy)


def constants(model: keras.Model, freeze: bool | None) -> list[np.ndarray] | None:
    """The values of `model.weights`, those of products in the dtype of the products.

    Args:
        model: The model, in the precision that it is served in.
        freeze: Whether they become constants of the graph; None for where it pays: in
            half precision, up to 256 MiB. A TensorFlow session copies the constants of
            a graph for each signature that is asked.

    Returns:
        The values; None where they stay variables.

    Raises:
        ValueError: If they must be constants, and no graph can hold them.
    """
    halves = {
        id(variable): layer.compute_dtype
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.Dense | keras.layers.Conv2D)
        for variable in layer.weights
    }
    used = [tf.as_dtype(halves.get(id(v), v.dtype)) for v in model.weights]
    pairs = list(zip(model.weights, used, strict=True))
    size = sum(math.prod(v.shape) * dtype.size for v, dtype in pairs)
    if freeze is None:
        freeze = computes_in(model) != "float32" and size <= BY_DEFAULT
    if not freeze:
        return None
    if size >= LARGEST:
        raise ValueError(
            f"freeze=True needs weights of less than {LARGEST:,} bytes, which a graph "
            f"can hold, got {size:,}: pass freeze=None."
        )
    return [
        keras.ops.convert_to_numpy(v).astype(dtype.as_numpy_dtype) for v, dtype in pairs
    ]
