"""A small convolutional network: a contestant, a teacher and an annotator."""

from keras import Input, Model, layers

import keras_vit


def convnet(
    image_size: int, num_classes: int, widths: tuple[int, ...] = (24, 48, 88)
) -> Model:
    """Two convolutions of 3 x 3 a stage, each normalised; the mean of the last map.

    Args:
        image_size: Side of an image, pixels.
        num_classes: Number of logits.
        widths: Channels of each stage; from the second on a stage halves the map.

    Returns:
        Raw images `(B, S, S, 3)` of 0..255 to logits `(B, num_classes)`.
    """
    images = Input((image_size, image_size, 3))
    x = keras_vit.PixelNormalization(
        "inception", (image_size, image_size), None, name="normalization"
    )(images)
    for stage, width in enumerate(widths):
        for i in range(2):
            name = f"stage{stage}_convolution{i}"
            strides = 2 if stage and not i else 1
            x = layers.Conv2D(width, 3, strides, "same", use_bias=False, name=name)(x)
            x = layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(x)
            x = layers.ReLU(name=f"{name}_relu")(x)
    x = layers.GlobalAveragePooling2D(name="pool")(x)
    x = layers.Dense(num_classes, dtype="float32", name="head")(x)
    return Model(images, x, name="convnet")
