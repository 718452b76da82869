"""From an image file to the raw pixels that a model takes, in TensorFlow.

Training, evaluation and serving all come through here, so they see the same pixels.
The mean and the deviation are not applied: they stand in the model, which also carries
the record of the rest (`keras_vit.embedding.Preprocess`).

Where a pixel came from is told by a matrix, float32 `(3, 3)`: it takes a point of the
result `(x, y, 1)` to its place in the file. Both are in unit coordinates: x runs from 0
at the left edge of the picture to 1 at the right, y from 0 at the top to 1 at the
bottom.

What the first bytes of a file say, its size and which way up it is, is read here too
(`inspect`), in pure TensorFlow, so that it also runs inside an exported model.
"""

import tensorflow as tf

from keras_vit.embedding import Preprocess

KERNELS = {"bilinear": "triangle", "bicubic": "keyscubic"}
SEGMENTS = 512  # of a JPEG, the most that are looked at for its size
TIFF_ENTRIES = 64  # of a TIFF directory, likewise
GIF_STEPS = 65536  # blocks of a GIF, 255 bytes at most each, until its first frame ends


def decode(data: tf.Tensor) -> tf.Tensor:
    """Decode one JPEG, PNG, GIF or BMP to RGB: scalar string to uint8 `(h, w, 3)`.

    A JPEG is turned the way up that its EXIF orientation tells; of a GIF it is the
    first frame.
    """
    image = tf.io.decode_image(data, channels=3, expand_animations=False)
    return tf.ensure_shape(upright(image, orientation(data)), (None, None, 3))


def decode_mask(data: tf.Tensor) -> tf.Tensor:
    """Decode one PNG of class numbers: scalar string to uint8 `(h, w, 1)`."""
    mask = tf.io.decode_png(data)
    return tf.ensure_shape(mask, (None, None, 1))


def resize(image: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Resize and crop one image `(h, w, 3)` to float32 `(H, W, 3)` of 0..255.

    What the crop leaves out is never computed: the picture of a narrow strip, resized
    as a whole, could take gigabytes.
    """
    height, width = preprocess.image_size
    if preprocess.crop_ratio is None:
        return scaled(image, (height, width), preprocess.interpolation)
    shape = tf.shape(image)[:2]
    size, offset = cover(shape, preprocess)
    crop = window(
        image, (height, width), size / shape, offset, preprocess.interpolation
    )
    return tf.ensure_shape(crop, (height, width, image.shape[-1]))


def window(
    image: tf.Tensor,
    size: tf.Tensor,
    scale: tf.Tensor,
    offset: tf.Tensor,
    interpolation: str,
) -> tf.Tensor:
    """Part of a resized image `(h, w, 3)`, antialiased: float32 `(*size, 3)` of 0..255.

    Args:
        image: What is resized.
        size: `(height, width)` of the part.
        scale: Height and width of the whole, resized, over those of `image`.
        offset: `(top, left)` of the part.
        interpolation: `"bilinear"` or `"bicubic"`.
    """
    scale = tf.cast(scale, tf.float32)
    shift = -tf.cast(offset, tf.float32)
    for axis in (0, 1):
        image = _rows_scaled(image, size[axis], scale[axis], shift[axis], interpolation)
        image = tf.transpose(image, (1, 0, 2))  # rows become columns, and back again
    return _clipped(image)


def _rows_scaled(image, count, scale, shift, interpolation):
    """Scale and translate an image `(h, w, 3)` along its rows: `(count, w, 3)`.

    The kernel goes over the channels of a pixel at a time. Here a whole row are the
    channels of one pixel: both axes take a third of the time, for the same numbers.
    """
    height, width, channels = tf.unstack(tf.shape(image))
    found = tf.raw_ops.ScaleAndTranslate(
        images=tf.reshape(image, (1, height, 1, width * channels)),
        size=tf.stack([count, 1]),
        scale=tf.stack([scale, 1.0]),
        translation=tf.stack([shift, 0.0]),
        kernel_type=KERNELS[interpolation],
        antialias=True,
    )
    static = count if isinstance(count, int) else None
    found = tf.reshape(found, (count, width, channels))
    return tf.ensure_shape(found, (static, *image.shape[1:]))


def resize_mask(mask: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """Give a mask `(h, w, 1)` the geometry of its image: uint8 `(H, W)`, nearest."""

    height, width = preprocess.image_size
    if preprocess.crop_ratio is None:
        return tf.image.resize(mask, (height, width), "nearest")[..., 0]
    size, (top, left) = cover(tf.shape(mask)[:2], preprocess)
    mask = tf.image.resize(mask, size, "nearest")
    crop = mask[top : top + height, left : left + width, 0]
    return tf.ensure_shape(crop, (height, width))


def geometry(shape: tf.Tensor, preprocess: Preprocess) -> tf.Tensor:
    """The matrix of what `resize` does to an image of `shape` (h, w): `(3, 3)`.

    The identity without a `crop_ratio`, else that of the central crop.
    """
    if preprocess.crop_ratio is None:
        return tf.eye(3)
    size, offset = cover(shape, preprocess)
    return crop_matrix(offset, preprocess.image_size, size)


def crop_matrix(offset: tf.Tensor, size: tf.Tensor, whole: tf.Tensor) -> tf.Tensor:
    """The matrix of a crop, from its unit coordinates to those of the whole: `(3, 3)`.

    Args:
        offset: `(top, left)` of the crop, in pixels.
        size: `(height, width)` of the crop, in pixels.
        whole: `(height, width)` of the image that it is cut from, in pixels.
    """
    whole = tf.cast(whole, tf.float32)
    top, left = tf.unstack(tf.cast(offset, tf.float32) / whole)
    height, width = tf.unstack(tf.cast(size, tf.float32) / whole)
    return tf.stack([[width, 0.0, left], [0.0, height, top], [0.0, 0.0, 1.0]])


def scaled(image: tf.Tensor, size: tf.Tensor, interpolation: str) -> tf.Tensor:
    """Resize one image to `size` (H, W), antialiased: float32 of 0..255."""
    shape = tf.cast(tf.shape(image)[:2], tf.float32)
    scale = tf.cast(size, tf.float32) / shape
    return window(image, size, scale, tf.zeros(2), interpolation)


def _clipped(image):
    return tf.clip_by_value(image, 0.0, 255.0)  # bicubic overshoots


def cover(shape, preprocess):
    """Size to which an image of `shape` is resized, and offset of the central crop.

    Both int32 `(2,)`, height first: those of torchvision's Resize and CenterCrop.
    """
    height, width = preprocess.image_size
    floor = [int(side / preprocess.crop_ratio) for side in (height, width)]
    shape = tf.cast(shape, tf.float64)
    ratio = tf.reduce_max(tf.constant(floor, tf.float64) / shape)
    size = tf.maximum(tf.cast(shape * ratio, tf.int32), floor)
    offset = tf.round(tf.cast(size - [height, width], tf.float32) / 2)
    return size, tf.cast(offset, tf.int32)


# --- what the first bytes of a file say ---


def inspect(data: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """Look at what a file says of itself, before anything of it is decoded.

    A few kilobytes can decode to gigabytes, and of a GIF all frames would be.

    Args:
        data: What a file holds, scalar string.

    Returns:
        The file, of a GIF its first frame; its size as it is stored, int64 `(2,)`, 0
        for what is no JPEG, PNG, GIF or BMP; and its EXIF orientation, int32 scalar.
    """
    upright_number = tf.constant(1)

    def of_png():
        high, low = tf.unstack(tf.reshape(_words(data, 16, 4), (2, 2)), axis=1)
        return data, (high * 65536 + low)[::-1], upright_number

    def of_bmp():
        numbers = tf.reshape(_words(data, 18, 4, "little"), (2, 2))
        width, height = tf.unstack(numbers[:, 0] + 65536 * numbers[:, 1])
        # A negative height: the rows run from the top.
        height = tf.minimum(height, 2**32 - height)
        return data, tf.stack([height, width]), upright_number

    branches = [
        (b"\xff\xd8\xff", lambda: (data, *_walk_jpeg(data))),
        (b"\x89PNG\r\n\x1a\n", of_png),
        (b"GIF8", lambda: (*_first_frame(data), upright_number)),
        (b"BM", of_bmp),
    ]
    return tf.case(
        [(_has(data, 0, magic), branch) for magic, branch in branches],
        default=lambda: (data, tf.zeros(2, tf.int64), upright_number),
    )


def orientation(data: tf.Tensor) -> tf.Tensor:
    """EXIF orientation of a file: int32 scalar, 1 to 8; 1 where none is told.

    Source: JEITA CP-3451, "Exif 2.3", tag 0x0112; the segment APP1 of a JPEG.
    """
    is_jpeg = _has(data, 0, b"\xff\xd8\xff")
    tells = tf.size(tf.strings.split(data, "Exif\0\0", maxsplit=1)) > 1  # in no time
    return tf.cond(is_jpeg & tells, lambda: _walk_jpeg(data)[1], lambda: tf.constant(1))


def upright(image: tf.Tensor, number: tf.Tensor) -> tf.Tensor:
    """Turn a decoded image `(h, w, 3)` of an EXIF orientation as it was seen."""
    swaps, down, left = turns(number)
    image = tf.cond(swaps, lambda: tf.transpose(image, (1, 0, 2)), lambda: image)
    image = tf.cond(down, lambda: tf.reverse(image, [0]), lambda: image)
    return tf.cond(left, lambda: tf.reverse(image, [1]), lambda: image)


def turns(number: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor, tf.Tensor]:
    """How EXIF orientations are undone: transposed, then rows, then columns reversed.

    Args:
        number: Orientations, of any shape.

    Returns:
        Whether each of the three is done, of the same shape.
    """
    down = tf.reduce_any(number[..., None] == [3, 4, 7, 8], -1)
    left = tf.reduce_any(number[..., None] == [2, 3, 6, 7], -1)
    return number >= 5, down, left


def _walk_jpeg(data):
    """Size and orientation of a JPEG, from one marker of its header to the next."""

    def go_on(step, position, size, number):
        inside = position < tf.cast(tf.strings.length(data), tf.int64)
        return inside & (size[0] == 0) & (step < SEGMENTS)

    def segment(step, position, size, number):
        marker, length = tf.unstack(_words(data, position, 2))
        is_frame = (marker >= 0xFFC0) & (marker <= 0xFFCF)
        is_frame &= tf.reduce_all(marker != [0xFFC4, 0xFFC8, 0xFFCC])
        size = tf.where(is_frame, _words(data, position + 5, 2), size)
        is_exif = (marker == 0xFFE1) & _has(data, position + 4, b"Exif\0\0")

        def told():
            return _orientation_of_tiff(_part(data, position + 10, length))

        number = tf.cond(is_exif & (number == 0), told, lambda: number)
        is_fill = marker == 0xFFFF  # any number of bytes 0xFF may stand before a marker
        ends = (marker < 0xFF01) | (marker == 0xFFDA)
        step_size = tf.where(is_fill, tf.ones_like(length), 2 + length)
        step_size = tf.where(ends, tf.cast(2**40, tf.int64), step_size)
        return step + 1, position + step_size, size, number

    start = (0, tf.constant(2, tf.int64), tf.zeros(2, tf.int64), 0)
    _, _, size, number = tf.while_loop(go_on, segment, start)
    return size, tf.maximum(number, 1)


def _orientation_of_tiff(tiff):
    is_little = _has(tiff, 0, b"II")

    def words(position, count):
        little = _words(tiff, position, count, "little")
        return tf.where(is_little, little, _words(tiff, position, count, "big"))

    first, second = tf.unstack(words(4, 2))
    directory = tf.where(is_little, first + 65536 * second, 65536 * first + second)
    entries = tf.reshape(words(directory + 2, 6 * TIFF_ENTRIES), (TIFF_ENTRIES, 6))
    is_counted = tf.range(TIFF_ENTRIES, dtype=tf.int64) < words(directory, 1)
    is_orientation = (entries[:, 0] == 0x0112) & is_counted
    value = tf.reduce_max(tf.where(is_orientation, entries[:, 4], 1))
    return tf.cast(tf.where(value <= 8, value, 1), tf.int32)


def _first_frame(data):
    """A GIF cut off behind its first frame, and the size of that.

    The decoder would hold all frames, of whatever sizes they say they are.
    """
    file = tf.io.decode_raw(data, tf.uint8)
    end = tf.size(file, tf.int64)

    def at(position):
        position = tf.minimum(tf.cast(position, tf.int64), end - 1)
        return tf.cast(file[position], tf.int64)

    def go_on(step, position, kind, frame):
        return (kind >= 0) & (step < GIF_STEPS) & (position < end)

    def block(step, position, kind, frame):
        """`kind`: 0 between blocks, 1 in an extension, 2 in a frame, -1 at its end."""
        byte = at(position)
        begins_extension = (kind == 0) & (byte == 0x21)
        begins_frame = (kind == 0) & (byte == 0x2C)
        sides = _words(data, position + 5, 2, "little")[::-1]
        frame = tf.where(begins_frame, sides, frame)
        after_frame = position + 11 + _palette(at(position + 9))
        ends = (kind > 0) & (byte == 0)
        is_other = (kind == 0) & ~begins_extension & ~begins_frame
        position = tf.where(
            begins_extension,
            position + 2,
            tf.where(begins_frame, after_frame, position + 1 + byte),
        )
        kind = tf.where(ends, tf.where(kind == 2, -1, 0), kind)
        kind = tf.where(begins_extension, 1, tf.where(begins_frame, 2, kind))
        return step + 1, position, tf.where(is_other, -2, kind), frame

    state = (0, 13 + _palette(at(10)), 0, tf.zeros(2, tf.int64))
    _, position, kind, frame = tf.while_loop(go_on, block, state)
    return tf.strings.join([_part(data, 0, position), ";"]), frame * tf.cast(
        kind == -1, tf.int64
    )


def _palette(flags):
    """Bytes of the table of colours that the flags of a GIF tell of."""
    size = 3 * tf.bitwise.left_shift(tf.constant(2, tf.int64), flags & 7)
    return tf.where(flags >= 128, size, 0)


def _part(data, position, length):
    """`length` bytes of a file from `position` on, as far as it goes."""
    end = tf.strings.length(data)
    position, length = (
        tf.minimum(tf.cast(x, tf.int64), tf.cast(end, tf.int64))
        for x in (position, length)
    )
    return tf.strings.substr(data, position, length)


def _words(data, position, count, order="big"):
    """`count` numbers of two bytes each, int64; 0 beyond the end."""
    numbers = tf.io.decode_raw(
        _part(data, position, 2 * count)[None],
        tf.uint16,
        little_endian=order == "little",
        fixed_length=2 * count,
    )
    return tf.cast(numbers[0], tf.int64)


def _has(data, position, text):
    return _part(data, position, len(text)) == text
