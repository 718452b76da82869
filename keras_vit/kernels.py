"""The arithmetic that wants another form on another backend.

This is the only file of the package that may ask which backend runs; everything else
is written once, in `keras.ops`.

Shapes in this file:
    B batch, N and M tokens, D embedding, H heads, d = D / H.
"""

import contextlib
import contextvars
import functools

import keras
from keras import ops


def rows(tokens):
    """B and N of `(B, N, D)`, for a reshape; B is -1 where N is static.

    A reshape to constants costs TensorFlow nothing.
    """
    if tokens.shape[1] is None:
        return ops.shape(tokens)[:2]
    return -1, tokens.shape[1]


def dense(layer, tokens, gelu=None, residual=None):
    """Apply a `keras.layers.Dense` to every token as one two-dimensional product.

    TensorFlow makes one oneDNN kernel of the product of two matrices, its bias and
    either a GELU or the sum with a residual, if nothing stands between them; elsewhere
    the reshapes cost nothing.

    Args:
        layer: A built `keras.layers.Dense`.
        tokens: `(B, N, D)`.
        gelu: `"exact"`, `"tanh"` or `"quick"` for what follows the product; or None.
        residual: `(B, N, units)`, added to the result; or None.

    Returns:
        `(B, N, units)`.
    """
    batch, length = rows(tokens)
    x = layer(ops.reshape(tokens, (-1, tokens.shape[-1])))  # (B N, units)
    if gelu is not None:
        x = _gelu(x, gelu)
    if residual is not None:
        x = _add(ops.reshape(residual, (-1, layer.units)), x)
    return ops.reshape(x, (batch, length, layer.units))


def _gelu(x, kind):
    if kind == "quick":
        return x * ops.sigmoid(1.702 * x)
    # TensorFlow sorts factors by name before it looks for a GELU, which it knows only
    # if what comes in stands first: "expand" before "gelu".
    with keras.name_scope("gelu"):
        return ops.gelu(x, approximate=kind == "tanh")


def _add(x, y):
    if keras.backend.backend() != "tensorflow":
        return x + y
    import tensorflow as tf

    return tf.add_n([x, y])  # of one shape by definition, so it can be fused


@contextlib.contextmanager
def serving():
    """While the graph of a TensorFlow server is traced: the forms that it fuses.

    They are for a server's processor and its session alone. XLA would compute the
    variance of a LayerNorm as a difference of two large sums.
    """
    token = _SERVING.set(True)
    try:
        yield
    finally:
        _SERVING.reset(token)


_SERVING = contextvars.ContextVar("serving", default=False)


def is_serving():
    """Whether the graph of a server is being traced."""
    return _SERVING.get()


def fused_layer_norm(x, gamma, beta, epsilon):
    """Normalise the last axis, in TensorFlow, in the form that a server fuses.

        (x - mean) / sqrt(variance + epsilon) * gamma + beta

    It is written as a batch normalisation of B N channels: the remapper makes one
    oneDNN kernel of just that on a CPU. Mean and variance are float32 in any case.

    Args:
        x: `(B, N, D)`, float32 or bfloat16.
        gamma: float32 `(D,)`.
        beta: float32 `(D,)`.
        epsilon: Added to the variance.

    Returns:
        `(B, N, D)`, of the dtype of `x`.
    """
    import tensorflow as tf

    shape = tf.shape(x)
    rows = tf.reduce_prod(shape[:-1])
    one, nothing = tf.fill([rows], 1.0), tf.fill([rows], 0.0)
    y, *_ = tf.raw_ops.FusedBatchNormV3(
        x=tf.reshape(x, [1, rows, x.shape[-1], 1]),
        scale=one,
        offset=nothing,
        mean=tf.constant([], tf.float32),
        variance=tf.constant([], tf.float32),
        epsilon=epsilon,
        is_training=True,
        data_format="NCHW",
    )
    y = tf.reshape(y, shape)
    return y * tf.cast(gamma, y.dtype) + tf.cast(beta, y.dtype)


@contextlib.contextmanager
def watched_attention():
    """The weights of every attention that is computed within, in a list.

    Each `(B, H, N, M)`, float32, in the order of the calls; no fused kernel is used.
    """
    found = []
    token = _WATCHED.set(found)
    try:
        with _without_gradient():
            yield found
    finally:
        _WATCHED.reset(token)


def _without_gradient():
    """PyTorch would keep all that leads to what is watched."""
    if keras.backend.backend() != "torch":
        return contextlib.nullcontext()
    import torch

    return torch.no_grad()


_WATCHED = contextvars.ContextVar("watched", default=None)


def attention(query, key, value, scale, dropout=None, bias=None):
    """Scaled dot-product attention; the softmax is float32 under every policy.

        softmax(scale q k^T + bias) v

    PyTorch, and JAX on an accelerator, use their fused kernel; which one follows
    `keras.config.is_flash_attention_enabled`. TensorFlow has none, and plain products
    are faster there than `keras.ops.dot_product_attention`. JAX's own for a CPU is no
    faster and cannot be compiled in float16. Dropout of the weights needs them plain.
    While `serving`, a softmax of bfloat16 is left to a kernel that sums in float32.

    Args:
        query: `(B, H, N, d)`.
        key: `(B, H, M, d)`.
        value: `(B, H, M, d)`.
        scale: Factor of the products, 1 / sqrt(d) unless it is in the queries already.
        dropout: Function of the attention weights `(B, H, N, M)`, or None.
        bias: `(1, H, N, M)`, or None.

    Returns:
        `(B, H, N, d)`.
    """
    watched = _WATCHED.get()
    if dropout is None and watched is None and _has_fused_attention():
        flash = keras.config.is_flash_attention_enabled() and None  # False or automatic
        query, key, value = (
            ops.transpose(x, (0, 2, 1, 3)) for x in (query, key, value)
        )
        x = ops.dot_product_attention(
            query, key, value, bias, scale=scale, flash_attention=flash
        )
        return ops.transpose(x, (0, 2, 1, 3))
    query = query if scale == 1 else query * scale
    logits = ops.matmul(query, ops.transpose(key, (0, 1, 3, 2)))
    if bias is not None or not (is_serving() and _sums_in_float32(logits.dtype)):
        logits = ops.cast(logits, "float32")
    if bias is not None:
        logits = logits + ops.cast(bias, "float32")
    if logits.shape[-1] == 1:  # Keras warns of a softmax over one
        weights = ops.exp(ops.log_softmax(logits))
    else:
        weights = ops.softmax(logits)  # (B, H, N, M)
    if watched is not None:
        watched.append(weights)
    if dropout is not None:
        weights = dropout(weights)
    return ops.matmul(ops.cast(weights, value.dtype), value)


@functools.cache
def _sums_in_float32(dtype):
    """Whether TensorFlow's softmax of `dtype` is that of float32, rounded once.

    oneDNN's of bfloat16 is, which spares two casts of the largest tensor of a block.
    It is asked, as the kernel for a processor without oneDNN sums in bfloat16.
    """
    import tensorflow as tf

    with tf.init_scope():
        x = tf.cast(tf.linspace(-4.0, 4.0, 197)[None], dtype)
        rounded = tf.cast(tf.nn.softmax(tf.cast(x, "float32")), dtype)
        return bool(tf.reduce_all(tf.nn.softmax(x) == rounded))


def _has_fused_attention():
    if keras.backend.backend() == "jax":
        import jax

        return jax.default_backend() != "cpu"
    return keras.backend.backend() == "torch"


def depthwise_convolution(grid, kernel):
    """Convolve each channel with its own k x k kernel, k odd, zeros around the grid.

    XLA's CPU code for such a convolution is tens of times slower than one product for
    each place of the kernel, which it fuses; the others have a kernel for it.

    Args:
        grid: `(B, h, w, D)`.
        kernel: `(k, k, D, 1)`.

    Returns:
        `(B, h, w, D)`.
    """
    kernel = ops.cast(kernel, grid.dtype)
    if keras.backend.backend() != "jax":
        return ops.depthwise_conv(
            grid, kernel, padding="same", data_format="channels_last"
        )
    _, height, width, _ = grid.shape
    size = kernel.shape[0]
    margin = (size // 2, size // 2)
    padded = ops.pad(grid, ((0, 0), margin, margin, (0, 0)))
    return sum(
        padded[:, i : i + height, j : j + width] * kernel[i, j, :, 0]
        for i in range(size)
        for j in range(size)
    )


def half_precision():
    """Mixed precision policy that the accelerator of this backend is made for.

    Returns:
        `"mixed_bfloat16"` on an accelerator that computes in bfloat16,
        `"mixed_float16"` on an older one, and None on a plain CPU.
    """
    return {
        "tensorflow": _half_precision_tensorflow,
        "jax": _half_precision_jax,
        "torch": _half_precision_torch,
    }.get(keras.backend.backend(), lambda: None)()


def _half_precision_tensorflow():
    import tensorflow as tf

    devices = tf.config.list_physical_devices
    if devices("TPU"):
        return "mixed_bfloat16"
    if not devices("GPU"):
        return None
    details = tf.config.experimental.get_device_details(devices("GPU")[0])
    return _half_precision_cuda(details.get("compute_capability", (0, 0)))


def _half_precision_jax():
    import jax

    device = jax.devices()[0]
    if device.platform == "tpu":
        return "mixed_bfloat16"
    if device.platform not in ("gpu", "cuda", "rocm"):
        return None
    version = str(getattr(device, "compute_capability", "0.0")).split(".")
    return _half_precision_cuda([int(x) for x in version if x.isdigit()] or [0])


def _half_precision_torch():
    import torch

    if not torch.cuda.is_available():
        return None
    return _half_precision_cuda(torch.cuda.get_device_capability())


def _half_precision_cuda(capability):
    return "mixed_bfloat16" if capability[0] >= 8 else "mixed_float16"
