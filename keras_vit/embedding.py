"""From pixels to tokens: normalisation, patch embedding, prefix tokens.

Shapes in this file:
    B batch, H x W pixels, C channels, P patch side, h x w patch grid,
    N = h * w patch tokens, R prefix tokens, D embedding.
"""

import dataclasses
import math

import keras
from keras import layers, ops

from keras_vit.initialization import initializer

serializable = keras.saving.register_keras_serializable("keras_vit")

NORMALIZATIONS = {  # mean, standard deviation of R, G, B in pixels of 0..1
    "inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "imagenet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "clip": (
        (0.48145466, 0.4578275, 0.40821073),
        (0.26862954, 0.26130258, 0.27577711),
    ),
}


@dataclasses.dataclass(frozen=True)
class Preprocess:
    """How a file becomes an image of the model's size; `training.preprocess` does it.

    Args:
        image_size: `(H, W)` of the result.
        crop_ratio: The file is resized so that it covers `image_size / crop_ratio`,
            its aspect kept, and the centre is cropped; None resizes height and width
            separately to `image_size`.
        interpolation: `"bilinear"` or `"bicubic"`; antialiased in either case.
    """

    image_size: tuple[int, int]
    crop_ratio: float | None
    interpolation: str

    @classmethod
    def of_model(cls, model):
        """Read the record that a model carries in its `PixelNormalization`.

        Raises:
            ValueError: If the model has no such layer.
        """
        for layer in model.layers:
            if isinstance(layer, PixelNormalization):
                return cls(layer.image_size, layer.crop_ratio, layer.interpolation)
        raise ValueError(
            f"The model {model.name!r} must contain a PixelNormalization layer, which "
            "records how its images are made; build it with keras_vit."
        )


@serializable
class PixelNormalization(layers.Layer):
    """Raw pixels of 0..255 to the numbers that the network was made for.

        (images / 255 - mean) / standard deviation

    It stands in the model, so that it cannot be lost on the way to a server. For the
    same reason it carries the record of how a file becomes the image that the model
    takes: `image_size`, `crop_ratio` and `interpolation` change nothing here; training,
    evaluation and serving read them with `Preprocess.of_model`.

    Args:
        normalization: `"inception"` (to -1..1), `"imagenet"` (by that data set's mean
            and deviation), `"clip"` (by those of CLIP's), a pair of one's own, (mean,
            standard deviation) of three numbers each, in pixels of 0..1; or None:
            images pass as they are.
        image_size: `(H, W)` to which a file is resized.
        crop_ratio: Part of the resized image that the central crop keeps, in (0, 1];
            None resizes height and width separately and crops nothing.
        interpolation: `"bilinear"` or `"bicubic"`, antialiased.

    Call arguments:
        images: `(B, H, W, C)`, C = 3 unless `normalization` is None.

    Returns:
        `(B, H, W, C)`.

    Raises:
        ValueError: If `normalization` or `interpolation` is unknown, a pair is not of
            three finite numbers each with positive deviations, `crop_ratio` is outside
            (0, 1], or normalised images do not have three channels.
    """

    def __init__(
        self,
        normalization="inception",
        image_size=(224, 224),
        crop_ratio=None,
        interpolation="bicubic",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.statistics = _statistics(normalization)
        if interpolation not in ("bilinear", "bicubic"):
            raise ValueError(
                f"interpolation must be 'bilinear' or 'bicubic', got {interpolation!r}."
            )
        if crop_ratio is not None and not 0 < crop_ratio <= 1:
            raise ValueError(f"crop_ratio must be in (0, 1] or None, got {crop_ratio}.")
        named = normalization is None or isinstance(normalization, str)
        self.normalization = normalization if named else self.statistics
        self.image_size = tuple(image_size)
        self.crop_ratio = crop_ratio
        self.interpolation = interpolation

    def build(self, images_shape):
        if self.normalization is not None and images_shape[-1] != 3:
            raise ValueError(
                f"normalization={self.normalization!r} is for images of 3 channels, "
                f"got {images_shape[-1]}; pass normalization=None."
            )

    def compute_output_shape(self, images_shape):
        return images_shape

    def call(self, images):
        if self.statistics is None:
            return images
        mean, deviation = self.statistics
        scale = [1 / (255 * d) for d in deviation]
        offset = [-m / d for m, d in zip(mean, deviation, strict=True)]
        dtype = self.compute_dtype
        return images * ops.array(scale, dtype) + ops.array(offset, dtype)


def _statistics(normalization):
    """Mean and standard deviation by channel, or None for images as they are."""
    if normalization is None:
        return None
    pair = normalization
    if isinstance(normalization, str):
        pair = NORMALIZATIONS.get(normalization)
    if not (_is_list(pair, 2) and all(_is_list(x, 3) for x in pair)):
        known = ", ".join(repr(key) for key in NORMALIZATIONS)
        raise ValueError(
            f"normalization must be {known}, a pair (mean, standard deviation) of "
            f"three numbers each, or None, got {normalization!r}."
        )
    mean, deviation = (tuple(x) for x in pair)
    numbers = all(isinstance(x, int | float) for x in mean + deviation)
    if not (numbers and all(map(math.isfinite, mean + deviation))):
        raise ValueError(f"normalization must be finite numbers, got {pair!r}.")
    if min(deviation) <= 0:
        raise ValueError(
            "The standard deviation of a normalization must be positive, got "
            f"{deviation!r}."
        )
    return mean, deviation


def _is_list(value, length):
    return isinstance(value, list | tuple) and len(value) == length


def check_patches(patch_size, height, width):
    """Raise a ValueError if patches do not fill a static height or width."""
    sides = [side for side in (height, width) if side is not None]
    if any(side < 1 or side % patch_size for side in sides):
        raise ValueError(
            f"patch_size={patch_size} must divide the image height and width, "
            f"got {height} x {width}."
        )


def grid_shape(images_shape, patch_size, embed_dim):
    """Static shape of the grid of patches; a side that is not whole is rounded up."""
    batch, height, width, _ = images_shape
    sides = [None if x is None else -(-x // patch_size) for x in (height, width)]
    return (batch, *sides, embed_dim)


@serializable
class PatchEmbedding(layers.Layer):
    """Cut an image into P x P patches and project each one to D channels.

    The linear map E of each flattened patch, which other code writes as a convolution
    with stride P.

    Source: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words", eq. 1,
    https://arxiv.org/abs/2010.11929.
    Differs from the source in that an image whose size is only known at run time is
    padded with zeros on the right and at the bottom to a multiple of P.

    Args:
        embed_dim: D, width of a token.
        patch_size: P, side of a patch in pixels; must divide a static H and W.
        initialization: Key of `INITIALIZATIONS`.
        use_bias: Whether a bias is added.

    Call arguments:
        images: `(B, H, W, C)`; H and W may be dynamic.

    Returns:
        Grid `(B, h, w, D)`.

    Raises:
        ValueError: If P does not divide a static H or W.
    """

    def __init__(
        self, embed_dim, patch_size=16, initialization="jax", use_bias=True, **kwargs
    ):
        super().__init__(**kwargs)
        self.embed_dim = embed_dim
        self.patch_size = patch_size
        self.initialization = initialization
        self.use_bias = use_bias

    def build(self, images_shape):
        _, height, width, channels = images_shape
        check_patches(self.patch_size, height, width)
        self.pads = None in (height, width)
        fans = self.patch_size**2 * channels, self.patch_size**2 * self.embed_dim
        self.project = layers.Dense(
            self.embed_dim,
            use_bias=self.use_bias,
            kernel_initializer=initializer(self.initialization, "patch_kernel", *fans),
            bias_initializer=initializer(self.initialization, "patch_bias", *fans),
            dtype=self.dtype_policy,
            name="project",
        )
        self.project.build((None, fans[0]))

    def compute_output_shape(self, images_shape):
        return grid_shape(images_shape, self.patch_size, self.embed_dim)

    def call(self, images):
        batch, height, width, channels = ops.shape(images)
        patch = self.patch_size
        if self.pads:
            bottom, right = -height % patch, -width % patch
            images = ops.pad(images, ((0, 0), (0, bottom), (0, right), (0, 0)))
            height, width = height + bottom, width + right
        h, w = height // patch, width // patch
        x = ops.reshape(images, (batch, h, patch, w, patch, channels))
        x = ops.transpose(x, (0, 1, 3, 2, 4, 5))  # (B, h, w, P, P, C)
        x = ops.reshape(x, (batch * h * w, patch * patch * channels))
        return ops.reshape(self.project(x), (batch, h, w, self.embed_dim))


@serializable
class PrefixTokens(layers.Layer):
    """Lay the grid out as tokens, row by row, behind the learned tokens.

    Order: class token, distillation token, registers, patches.

    Source: class token: Dosovitskiy et al. 2021, "An Image is Worth 16x16 Words",
    eq. 1, https://arxiv.org/abs/2010.11929; distillation token: Touvron et al. 2021,
    "Training data-efficient image transformers & distillation through attention",
    section 4, https://arxiv.org/abs/2012.12877; registers: Darcet et al. 2024, "Vision
    Transformers Need Registers", https://arxiv.org/abs/2309.16588.

    Args:
        class_token: Whether there is a class token.
        distillation_token: Whether there is a distillation token.
        num_registers: Number of registers.
        initialization: Key of `INITIALIZATIONS`.

    Call arguments:
        grid: `(B, h, w, D)`.

    Returns:
        Tokens `(B, R + N, D)`.
    """

    def __init__(
        self,
        class_token=True,
        distillation_token=False,
        num_registers=0,
        initialization="jax",
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.class_token = class_token
        self.distillation_token = distillation_token
        self.num_registers = num_registers
        self.initialization = initialization

    def build(self, grid_shape):
        counts = {
            "class_token": int(self.class_token),
            "distillation_token": int(self.distillation_token),
            "registers": self.num_registers,
        }
        self.prefix = [
            self.add_weight(
                shape=(1, count, grid_shape[-1]),
                initializer=initializer(self.initialization, "token"),
                name=name,
            )
            for name, count in counts.items()
            if count
        ]

    def compute_output_shape(self, grid_shape):
        batch, height, width, dim = grid_shape
        if height is None or width is None:
            return (batch, None, dim)
        return (batch, sum(w.shape[1] for w in self.prefix) + height * width, dim)

    def call(self, grid):
        batch, height, width, dim = ops.shape(grid)
        tokens = ops.reshape(grid, (batch, height * width, dim))  # (B, N, D)
        prefix = [
            ops.broadcast_to(ops.cast(weight, tokens.dtype), (batch, *weight.shape[1:]))
            for weight in self.prefix
        ]
        return ops.concatenate([*prefix, tokens], axis=1)  # (B, R + N, D)


@serializable
class FeatureMap(layers.Layer):
    """Lay the patch tokens out as the grid again; prefix tokens are left out.

    Args:
        num_prefix: R, number of tokens before the patches.

    Call arguments:
        tokens: `(B, R + N, D)`.
        grid: `(B, h, w, _)`; only its shape is used.

    Returns:
        `(B, h, w, D)`.
    """

    def __init__(self, num_prefix=0, **kwargs):
        super().__init__(**kwargs)
        self.num_prefix = num_prefix

    def compute_output_shape(self, tokens_shape, grid_shape):
        return (*grid_shape[:3], tokens_shape[-1])

    def call(self, tokens, grid):
        shape = (*ops.shape(grid)[:3], tokens.shape[-1])
        return ops.reshape(tokens[:, self.num_prefix :], shape)
