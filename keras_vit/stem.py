"""The convolutional stem of LV-ViT.

Shapes in this file:
    B batch, H x W pixels, C channels, P patch side, h x w patch grid, D embedding.
"""

import keras
from keras import layers, ops

from keras_vit.embedding import PatchEmbedding, check_patches, grid_shape
from keras_vit.initialization import initializer

serializable = keras.saving.register_keras_serializable("keras_vit")


@serializable
class ConvStem(layers.Layer):
    """Patch embedding by convolutions that see over the edge of a patch.

        7 x 7, stride 2;  3 x 3;  3 x 3;  P/2 x P/2, stride P/2, with bias

    The first three have no bias, `width` channels, and a BatchNorm and a ReLU behind
    them.

    Source: Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better
    Vision Transformers", https://arxiv.org/abs/2104.10858.
    Differs from the source in that an image whose size is only known at run time is
    padded with zeros on the right and at the bottom to a multiple of P.

    Args:
        embed_dim: D, width of a token.
        patch_size: P, side of a patch in pixels; even, must divide a static H and W.
        width: Channels of the convolutions.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        images: `(B, H, W, C)`; H and W may be dynamic.

    Returns:
        Grid `(B, h, w, D)`.

    Raises:
        ValueError: If P is odd or does not divide a static H or W.
    """

    def __init__(
        self, embed_dim, patch_size=16, width=64, initialization="deit", **kwargs
    ):
        super().__init__(**kwargs)
        if patch_size % 2:
            raise ValueError(
                f"patch_size must be even for a convolutional stem, got {patch_size}."
            )
        self.patch_size = patch_size
        self.width = width
        self.initialization = initialization
        self.norms = [
            layers.BatchNormalization(
                momentum=0.9, epsilon=1e-5, dtype=self.dtype_policy, name=f"norm{i}"
            )
            for i in (1, 2, 3)
        ]
        self.project = PatchEmbedding(
            embed_dim,
            patch_size // 2,
            initialization,
            dtype=self.dtype_policy,
            name="project",
        )

    def build(self, images_shape):
        _, height, width, channels = images_shape
        check_patches(self.patch_size, height, width)
        self.convolutions = [
            self._convolution("convolution1", 7, channels, strides=2),
            self._convolution("convolution2", 3, self.width, padding="same"),
            self._convolution("convolution3", 3, self.width, padding="same"),
        ]
        for norm in self.norms:
            norm.build((None, None, None, self.width))
        self.project.build((None, None, None, self.width))

    def _convolution(self, name, side, channels, **kwargs):
        fans = side**2 * channels, side**2 * self.width
        layer = layers.Conv2D(
            self.width,
            side,
            use_bias=False,
            kernel_initializer=initializer(self.initialization, "patch_kernel", *fans),
            data_format="channels_last",
            dtype=self.dtype_policy,
            name=name,
            **kwargs,
        )
        layer.build((None, None, None, channels))
        return layer

    def compute_output_shape(self, images_shape):
        return grid_shape(images_shape, self.patch_size, self.project.embed_dim)

    def call(self, images, training=None):
        _, height, width, _ = ops.shape(images)
        bottom, right = -height % self.patch_size, -width % self.patch_size
        # Keras' "same" would pad 2 and 3 pixels where the source pads 3 and 3.
        x = ops.pad(images, ((0, 0), (3, 3 + bottom), (3, 3 + right), (0, 0)))
        for convolution, norm in zip(self.convolutions, self.norms, strict=True):
            x = ops.relu(norm(convolution(x), training=training))
        return self.project(x)  # (B, h, w, D)
