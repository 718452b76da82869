"""From encoded files to the pixels that a model takes, inside the exported graph.

What is served is `training.preprocess`: a file decoded, turned the way up that its EXIF
orientation tells, resized and cropped. Here that is done for a batch of strangers'
files, within bounds, and a bad one costs its own row only. A photograph that lies on
its side is turned after it was made small.

Only a dataset goes on after an error, and it starts anew with each request: the fewer
nodes its function has, the better. So everything that cannot fail is done outside.
"""

import tensorflow as tf

from keras_vit.embedding import Preprocess
from training.preprocess import cover, inspect, turns, window

LONGEST = 32768  # pixels of a side


def inspect_all(files: tf.Tensor, max_pixels: int) -> tuple[tf.Tensor, ...]:
    """Look at the headers of files `(N,)`.

    Returns:
        The files, of GIFs their first frames; whether each is an image of at most
        `max_pixels`; sizes `(N, 2)`, 1 x 1 where not; orientations `(N,)`.
    """
    files, sizes, orientations = _headers(files)
    fit = tf.reduce_all((sizes > 0) & (sizes <= LONGEST), 1)
    fit &= tf.reduce_prod(sizes, 1) <= max_pixels
    sizes = tf.where(fit[:, None], sizes, 1)
    return files, fit, tf.cast(sizes, tf.int32), orientations


@tf.function(input_signature=[tf.TensorSpec((None,), tf.string)], autograph=False)
def _headers(files):
    """`inspect` of each file; traced once, for all signatures."""
    spec = (
        tf.TensorSpec((), tf.string),
        tf.TensorSpec((2,), tf.int64),
        tf.TensorSpec((), tf.int32),
    )
    return tf.map_fn(inspect, files, fn_output_signature=spec)


def tolerant(
    files: tf.Tensor, preprocess: Preprocess, max_pixels: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Images `(N, H, W, 3)` of files, 0 where a file is none; and which are images."""
    files, fit, sizes, orientations = inspect_all(files, max_pixels)
    scales, offsets = _placed(sizes, orientations, preprocess)

    def read(file, scale, offset):
        return _window(file, scale, offset, preprocess)

    side = max(preprocess.image_size)
    inputs = (files, scales, offsets)
    found, valid = each(read, inputs, fit, (side, side, 3), tf.float32)
    return _turned(found, orientations, preprocess), valid


def strict(
    files: tf.Tensor, preprocess: Preprocess, max_pixels: int
) -> tuple[tf.Tensor, tf.Tensor]:
    """Images `(N, H, W, 3)` of files; one that is none is an error of all."""
    files, sizes, orientations = checked(files, max_pixels)
    scales, offsets = _placed(sizes, orientations, preprocess)
    side = max(preprocess.image_size)
    found = tf.map_fn(
        lambda x: _window(*x, preprocess),
        (files, scales, offsets),
        fn_output_signature=tf.TensorSpec((side, side, 3), tf.float32),
    )
    valid = tf.ones(tf.shape(files), tf.bool)
    return _turned(found, orientations, preprocess), valid


def checked(files: tf.Tensor, max_pixels: int) -> tuple[tf.Tensor, ...]:
    """Files, sizes, orientations; an error if the header of one does not fit."""
    files, fit, *found = inspect_all(files, max_pixels)
    check = tf.debugging.Assert(
        tf.reduce_all(fit),
        [
            "Each file must be a whole JPEG, PNG, GIF or BMP image of at most "
            f"{max_pixels} pixels; these are not:",
            tf.where(~fit)[:, 0],
        ],
    )
    with tf.control_dependencies([check]):
        return tf.identity(files), *found


def each(read, inputs, tried, shape, dtype) -> tuple[tf.Tensor, tf.Tensor]:
    """What `read` makes of each row, `(N, *shape)`, 0 where it fails.

    Args:
        read: Of a row of each input; may fail.
        inputs: Tensors `(N, ...)`.
        tried: Which rows are tried at all, `(N,)`.
        shape: Of a result.
        dtype: Of a result.

    Returns:
        The results, and where there is one, `(N,)`.
    """
    rows = tf.where(tried)[:, 0]
    chosen = (rows, *(tf.gather(x, rows) for x in inputs))
    data = tf.data.Dataset.from_tensor_slices(chosen)
    data = data.map(lambda row, *x: (row, read(*x))).ignore_errors()
    options = tf.data.Options()
    options.autotune.enabled = False
    options.experimental_optimization.apply_default_optimizations = False
    number = tf.size(tried, tf.int64)
    data = data.batch(tf.maximum(number, 1)).with_options(options)
    nothing = tf.zeros((0,), tf.int64), tf.zeros((0, *shape), dtype)
    rows, values = data.reduce(nothing, lambda _, batch: batch)
    rows = rows[:, None]
    found = tf.scatter_nd(rows, values, (number, *shape))
    ones = tf.ones(tf.shape(rows)[:1], tf.int32)
    valid = tf.scatter_nd(rows, ones, number[None]) > 0
    return tf.ensure_shape(found, (None, *shape)), valid


def _placed(sizes, orientations, preprocess):
    """Scales and offsets `(N, 2)` that make of files, as they lie, the model's images.

    The larger of height and width is taken for both: S x S pixels from the offset on.
    """
    swaps, *is_reversed = turns(orientations)
    swaps = swaps[:, None]
    target = tf.constant(preprocess.image_size)
    shapes = tf.where(swaps, sizes[:, ::-1], sizes)  # upright
    resized, offsets = tf.zeros_like(shapes) + target, tf.zeros_like(shapes)
    if preprocess.crop_ratio is not None:
        spec = (tf.TensorSpec((2,), tf.int32),) * 2
        resized, offsets = tf.map_fn(
            lambda shape: cover(shape, preprocess), shapes, fn_output_signature=spec
        )
    mirrored = resized - target - offsets
    offsets = tf.where(tf.stack(is_reversed, 1), mirrored, offsets)
    scales = resized / shapes
    return (tf.where(swaps, x[:, ::-1], x) for x in (scales, offsets))


def _window(file, scale, offset, preprocess):
    """Decode one file, and resize and crop it as it lies: float32 `(S, S, 3)`."""
    image = tf.io.decode_image(file, channels=3, expand_animations=False)
    side = max(preprocess.image_size)
    found = window(image, (side, side), scale, offset, preprocess.interpolation)
    return tf.ensure_shape(found, (side, side, 3))


def _turned(windows, orientations, preprocess):
    """Windows `(N, S, S, 3)` upright, `(N, H, W, 3)`."""
    swaps, down, left = (x[:, None, None, None] for x in turns(orientations))
    images = tf.where(swaps, tf.transpose(windows, (0, 2, 1, 3)), windows)
    height, width = preprocess.image_size
    images = images[:, :height, :width]
    images = tf.where(down, tf.reverse(images, [1]), images)
    return tf.where(left, tf.reverse(images, [2]), images)
