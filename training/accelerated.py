"""Augmentation within the training step, on the device of the backend.

Nothing is drawn here: a batch comes with what `training.plan.packed` made for it, a
dictionary of

    images          uint8 (B, H, W, 3)
    rand_augment, three_augment, color_jitter
                    (B, n, 2): number and amount of each step
    matrices        (B, 3, 3), of `training.augment`
    box, noise      int32 (B, 4): top, left, height and width of what is erased; int32
                    (B, 6): where the generator of its noise begins
    mix             (B, 5), alike in all rows: top, bottom, left and right of a box, and
                    how much of a pixel in it is the partner's

of which all but the images may be missing. What comes out is what `training.batches`
makes of the same images without `Augmentation.on_accelerator`, beyond rounding: the
images come as whole numbers. All steps that a slot may have are computed for the whole
batch, and each image takes its own: so nothing branches, and it compiles.

Shapes: B images of H x W pixels.
"""

import keras
import numpy as np
from keras import ops

from training import colors
from training.augment import LARGEST
from training.erasing import AREA, IMAGENET
from training.philox import normal

RADIUS = colors.BLUR_WIDTH


class Augmented(keras.Model):
    """Trains a network on batches whose images are still to be augmented.

        trainer = Augmented(ViT("small"))
        trainer.compile(optimizer, loss)
        trainer.fit(dataset of (images with their plan, labels))
        trainer.network.save("vit.keras")

    The network shares its weights with the trainer: it is what is saved, exported and
    asked. Images without a plan, those of evaluation, reach it as they are.

    Args:
        network: Functional model from images to logits.

    Call arguments:
        images: `(B, H, W, 3)`, or a dictionary as above.

    Returns:
        Those of the network.
    """

    def __init__(self, network, **kwargs):
        super().__init__(**kwargs)
        self.autocast = False  # half precision would round the pixels
        self.network = network
        self.built = True

    def call(self, images, training=None):
        return self.network(augmented(images), training=training)


def augmented(batch):
    """Images float32 `(B, H, W, 3)` of such a dictionary; anything else as it is."""
    if not isinstance(batch, dict):
        return batch
    images = ops.cast(batch["images"], "float32")
    for name in colors.STEPS:
        for i in range(batch[name].shape[1] if name in batch else 0):
            numbers, amounts = batch[name][:, i, 0], batch[name][:, i, 1]
            images = _step(name, images, numbers, amounts)
    if "matrices" in batch:
        images = warp(images, batch["matrices"])
    if "box" in batch:
        images = erase(images, batch["box"], batch["noise"])
    if "mix" in batch:
        images = mix(images, batch["mix"])
    return images


def _step(name, images, numbers, amounts):
    """One step on colours, which may be another one for each image."""
    first = len(LARGEST) if name == "rand_augment" else 0
    numbers, amounts = (ops.reshape(x, (-1, 1, 1, 1)) for x in (numbers, amounts))
    result = images
    for i, step in enumerate(STEPS[name].values()):
        result = ops.where(numbers == first + i, step(images, amounts), result)
    return result


# --- colours: the equations of training.colors, a number for each image ---


def _auto_contrast(images, _):
    low = ops.min(images, axis=(1, 2), keepdims=True)
    span = ops.max(images, axis=(1, 2), keepdims=True) - low
    flat = span < 1
    stretched = (images - low) * (255 / ops.where(flat, 1.0, span))
    return ops.where(flat, images, stretched)


def _equalize(images, _):
    batch, height, width, channels = images.shape
    batch = ops.shape(images)[0] if batch is None else batch
    values = ops.cast(ops.round(images), "int32")
    table = 256 * ops.arange(batch * channels, dtype="int32")
    values = values + ops.reshape(table, (batch, 1, 1, channels))
    flat = ops.reshape(values, (-1,))
    ones = ops.ones_like(flat)
    counts = ops.segment_sum(ones, flat, num_segments=batch * channels * 256)
    counts = ops.reshape(counts, (-1, 256))
    numbers = ops.arange(256, dtype="int32")
    last = ops.max(ops.where(counts > 0, numbers, 0), axis=1, keepdims=True)
    largest = ops.take_along_axis(counts, last, axis=1)
    step = (height * width - largest) // 255  # (B channels, 1)
    below = ops.cumsum(counts, axis=1) - counts
    table = (below + step // 2) // ops.maximum(step, 1)
    table = ops.where(step > 0, ops.minimum(table, 255), numbers)
    found = ops.take(ops.reshape(ops.cast(table, "float32"), (-1,)), flat)
    return ops.reshape(found, (-1, height, width, channels))


def _posterize(images, bits):
    step = ops.power(2.0, 8 - bits)
    return ops.floor(ops.round(images) / step) * step


def _solarize(images, threshold):
    return ops.where(ops.round(images) < threshold, images, 255 - images)


def _solarize_add(images, amount):
    brighter = ops.minimum(images + amount, 255.0)
    return ops.where(ops.round(images) < 128, brighter, images)


def _saturation(images, factor):
    return _blend(_brightness(images), images, factor)


def _contrast(images, factor):
    light = ops.round(_brightness(images))
    mean = ops.floor(ops.mean(light, axis=(1, 2), keepdims=True) + 0.5)
    return _blend(mean, images, factor)


def _sharpness(images, factor):
    rows = images[:, :-2] + images[:, 1:-1] + images[:, 2:]
    squares = rows[:, :, :-2] + rows[:, :, 1:-1] + rows[:, :, 2:]
    inner = images[:, 1:-1, 1:-1]
    away = inner - (squares + 4 * inner) / 13
    away = ops.pad(away, [[0, 0], [1, 1], [1, 1], [0, 0]])
    return ops.clip(images + (factor - 1) * away, 0.0, 255.0)


def _gaussian_blur(images, radius):
    steps = np.arange(-RADIUS, RADIUS + 1)
    radius = ops.reshape(radius, (-1, 1))
    weights = ops.exp(-ops.convert_to_tensor(steps**2, "float32") / (2 * radius**2))
    weights = weights / ops.sum(weights, axis=1, keepdims=True)  # (B, 17)
    for axis in (1, 2):
        count = images.shape[axis]
        pads = [[0, 0]] * 4
        pads[axis] = [RADIUS, RADIUS]
        index = np.clip(np.arange(-RADIUS, count + RADIUS), 0, count - 1)
        wide = ops.take(images, index, axis=axis)  # the border repeated
        blurred = 0.0
        for i in range(len(steps)):
            part = [slice(None)] * 4
            part[axis] = slice(i, i + count)
            weight = ops.reshape(weights[:, i], (-1, 1, 1, 1))
            blurred = blurred + weight * wide[tuple(part)]
        images = blurred
    return images


def _brightness(images):
    red, green, blue = (images[..., i : i + 1] for i in range(3))
    return colors.GREY[0] * red + colors.GREY[1] * green + colors.GREY[2] * blue


def _blend(zero, images, factor):
    return ops.clip(zero + factor * (images - zero), 0.0, 255.0)


def _factor(amount):
    return ops.maximum(1 + 0.9 * amount, 0.1)


def _up_to(largest, amount):
    return ops.floor(ops.abs(amount) * largest)


STEPS = {  # in the order of their numbers
    "rand_augment": {
        "auto_contrast": _auto_contrast,
        "equalize": _equalize,
        "invert": lambda x, _: 255 - x,
        "posterize": lambda x, amount: _posterize(x, 4 - _up_to(4, amount)),
        "solarize": lambda x, amount: _solarize(x, 256 - _up_to(256, amount)),
        "solarize_add": lambda x, amount: _solarize_add(x, _up_to(110, amount)),
        "color": lambda x, amount: _saturation(x, _factor(amount)),
        "contrast": lambda x, amount: _contrast(x, _factor(amount)),
        "brightness": lambda x, amount: _blend(0.0, x, _factor(amount)),
        "sharpness": lambda x, amount: _sharpness(x, _factor(amount)),
    },
    "three_augment": {
        "grey": lambda x, _: ops.broadcast_to(_brightness(x), ops.shape(x)),
        "solarize": lambda x, _: _solarize(x, 128),
        "gaussian_blur": _gaussian_blur,
    },
    "color_jitter": {
        "brightness": lambda x, factor: _blend(0.0, x, factor),
        "contrast": _contrast,
        "saturation": _saturation,
    },
}


# --- places ---


def warp(images, matrices):
    """Fetch each pixel from where its matrix says, bilinear; 0 from outside."""
    _, height, width, channels = images.shape
    points = [
        (np.arange(side, dtype="float32") + 0.5) / side for side in (width, height)
    ]
    x, y = (ops.convert_to_tensor(part) for part in points)
    x, y = ops.reshape(x, (1, 1, -1)), ops.reshape(y, (1, -1, 1))
    entry = [
        [ops.reshape(matrices[:, i, j], (-1, 1, 1)) for j in range(3)] for i in (0, 1)
    ]
    x, y = (a * x + b * y + c for a, b, c in entry)  # (B, H, W)
    x, y = x * width - 0.5, y * height - 0.5
    left, top = ops.floor(x), ops.floor(y)
    flat = ops.reshape(images, (-1, height * width, channels))
    found = 0.0
    for down in (0, 1):
        for right in (0, 1):
            column, row = left + right, top + down
            weight = (1 - ops.abs(x - column)) * (1 - ops.abs(y - row))
            inside = (column >= 0) & (column < width) & (row >= 0) & (row < height)
            weight = ops.where(inside, weight, 0.0)
            place = ops.clip(row, 0, height - 1) * width + ops.clip(
                column, 0, width - 1
            )
            place = ops.reshape(ops.cast(place, "int32"), (-1, height * width, 1))
            pixels = ops.take_along_axis(flat, place, axis=1)
            found = found + ops.reshape(weight, (-1, height * width, 1)) * pixels
    return ops.reshape(found, (-1, height, width, channels))


def erase(images, box, state):
    """Fill a box of each image with noise, of the generator's `state`."""
    _, height, width, channels = images.shape
    top, left, rows, columns = (ops.reshape(box[:, i], (-1, 1, 1)) for i in range(4))
    y = ops.reshape(ops.arange(height, dtype="int32"), (1, -1, 1)) - top
    x = ops.reshape(ops.arange(width, dtype="int32"), (1, 1, -1)) - left
    inside = (y >= 0) & (y < rows) & (x >= 0) & (x < columns)  # (B, H, W)
    # The sides of a box are rounded, so it may be this much larger than its part.
    most = int(AREA[1] * height * width + (height + width) / 2 + 1)
    most = min(most, height * width)
    noise = ops.reshape(normal(state, most * channels), (-1, most, channels))
    place = ops.where(inside, y * columns + x, 0)
    place = ops.reshape(place, (-1, height * width, 1))
    noise = ops.take_along_axis(noise, place, axis=1)
    mean, deviation = (ops.convert_to_tensor(x, "float32") for x in IMAGENET)
    noise = ops.reshape(noise * deviation + mean, (-1, height, width, channels))
    return ops.where(inside[..., None], noise, images)


def mix(images, drawn):
    """Mix images with those in reversed order."""
    _, height, width, _ = images.shape
    top, bottom, left, right, part = (
        ops.reshape(drawn[:, i], (-1, 1, 1, 1)) for i in range(5)
    )
    y = ops.reshape(ops.arange(height, dtype="float32"), (1, -1, 1, 1))
    x = ops.reshape(ops.arange(width, dtype="float32"), (1, 1, -1, 1))
    inside = (y >= top) & (y < bottom) & (x >= left) & (x < right)
    part = ops.where(inside, part, 0.0)
    return (1 - part) * images + part * ops.flip(images, axis=0)
