"""What a model is trained for: a class an image, one for each pixel, or for each token.

The rank of the model's output decides between the first two: logits `(B, C)` or
`(B, H, W, C)`; token labeling, and a teacher of the first, are asked for by the recipe.
"""

import dataclasses

import keras
from keras import ops

import keras_vit
from keras_vit.embedding import Preprocess
from training.accelerated import Augmented
from training.data import Dataset
from training.distillation import Distillation, read_teacher
from training.loss import SoftAccuracy, TokenLabelingLoss, classification_loss
from training.recipe import Recipe
from training.token_labeling import TokenLabeling

IGNORED = 255  # in a mask: this pixel does not count


@keras.saving.register_keras_serializable("training")
class PixelAccuracy(keras.metrics.SparseCategoricalAccuracy):
    """Part of the pixels whose largest logit is that of their class.

    Differs from Keras' metric in that a pixel of class 255 does not count.

    Call arguments:
        y_true: Classes `(B, H, W)`.
        y_pred: Logits `(B, H, W, C)`.
    """

    def update_state(self, y_true, y_pred, sample_weight=None):
        counts = ops.cast(ops.not_equal(y_true, IGNORED), self.dtype)
        if sample_weight is not None:
            counts = counts * ops.cast(sample_weight, self.dtype)
        return super().update_state(y_true, y_pred, counts)


def is_segmentation(model: keras.Model) -> bool:
    """Whether the model has logits for each pixel."""
    return len(model.output_shape) == 4


def objective(
    model: keras.Model, loss: str = "softmax"
) -> tuple[keras.Loss, list[keras.Metric]]:
    """Cross-entropy and metrics for a model of logits.

    A classifier is told its accuracy; its labels are classes or probabilities. A model
    with logits for each pixel is told the accuracy over pixels and the mean over
    classes of intersection / union, classes that neither truth nor prediction has left
    out. There pixels of class 255 count nowhere, and the loss is the mean over all
    others of a batch.

    Args:
        model: With logits `(B, C)` or `(B, H, W, C)`.
        loss: Which cross-entropy of a classifier, as `Recipe.loss` says.

    Raises:
        ValueError: If the loss is unknown, or not the softmax and there are pixels.
    """
    if not is_segmentation(model):
        return classification_loss(loss), [SoftAccuracy(name="accuracy")]
    if loss != "softmax":
        raise ValueError(f"loss must be 'softmax' for logits of pixels, got {loss!r}.")
    of_pixels = keras.losses.SparseCategoricalCrossentropy(
        from_logits=True, ignore_class=IGNORED
    )
    mean_iou = keras.metrics.MeanIoU(
        model.output_shape[-1],
        ignore_class=IGNORED,
        sparse_y_pred=False,
        name="mean_iou",
    )
    return of_pixels, [PixelAccuracy(name="accuracy"), mean_iou]


def trainer(network: keras.Model, recipe: Recipe) -> keras.Model:
    """What `fit` is called on: the network, or what trains it in a way of its own.

    Returns:
        The network, or a `TokenLabeling`, a `Distillation` or an `Augmented` around it.

    Raises:
        FileNotFoundError: If there is no such teacher.
        ValueError: If the recipe labels tokens and the network has none to label, or it
            has no teacher or one that does not fit.
    """
    if recipe.teaching is not None:
        how = recipe.teaching
        if how.teacher is None:
            recipe.check_complete()  # which says so
        return Distillation(
            network,
            read_teacher(how.teacher),
            recipe.loss,
            how.distillation,
            how.distillation_weight,
            how.temperature,
        )
    how = recipe.token_labeling
    if how is None:
        on_accelerator = recipe.augmentation.on_accelerator
        return Augmented(network) if on_accelerator else network
    loss = TokenLabelingLoss(how.dense_weight, how.class_weight, how.ground_truth)
    mix = None if how.mix_token is None else keras_vit.MixToken(how.mix_token)
    return TokenLabeling(network, loss, mix)


def network_of(model: keras.Model) -> keras.Model:
    """The network inside of what `trainer` returns."""
    own = isinstance(model, TokenLabeling | Distillation | Augmented)
    return model.network if own else model


def has_own_loss(model: keras.Model) -> bool:
    """Whether loss and metrics are those of a trainer around the network."""
    return isinstance(model, TokenLabeling | Distillation)


def run_variables(model: keras.Model) -> list:
    """What of a model a run keeps: every variable that is not a teacher's."""
    if not isinstance(model, Distillation):
        return model.variables
    others = {id(variable) for variable in model.teacher.variables}
    return [variable for variable in model.variables if id(variable) not in others]


def token_grid(
    network: keras.Model, preprocess: Preprocess, recipe: Recipe
) -> tuple[int, int] | None:
    """`(h, w)` of the tokens that the recipe labels; None where it labels none."""
    if recipe.token_labeling is None:
        return None
    patch_size = network.get_layer("patches").patch_size
    height, width = preprocess.image_size
    return -(-height // patch_size), -(-width // patch_size)


def check_fits(model: keras.Model, data: Dataset) -> None:
    """Refuse data that the model has no logits for.

    Raises:
        ValueError: If the data have masks and the model one answer an image, or the
            other way round, or the number of classes differs.
    """
    if data.masks != is_segmentation(model):
        wanted = "(B, H, W, C) for masks" if data.masks else "(B, C) for images"
        raise ValueError(
            f"The model must give logits {wanted} of {data.name!r}, "
            f"got {model.output_shape}."
        )
    if model.output_shape[-1] != len(data.labels):
        raise ValueError(
            f"The model must have one logit for each of the {len(data.labels)} "
            f"labels of {data.name!r}, got {model.output_shape[-1]}."
        )


def preprocess_for(
    model: keras.Model, data: Dataset, image_size: tuple[int, int] | None = None
) -> Preprocess:
    """How the files of `data` become images for `model`.

    Args:
        model: It records its size, its crop and its interpolation.
        data: What it will read.
        image_size: `(H, W)`; None for the model's own, or where it takes any size for
            that of the data, or what the model records where the data have none.

    Raises:
        ValueError: If the model does not take images of `image_size`.
    """
    if image_size is None and data.image_size is not None:
        own = model.input_shape[1:3]
        image_size = [a or b for a, b in zip(own, data.image_size, strict=True)]
    return preprocess_for_size(model, image_size)


def preprocess_for_size(
    model: keras.Model, image_size: tuple[int, int] | None = None
) -> Preprocess:
    """How files become images of `(H, W)` for `model`; None for what it records.

    Raises:
        ValueError: If the model does not take images of `image_size`.
    """
    preprocess = Preprocess.of_model(model)
    own = model.input_shape[1:3]
    if image_size is None:
        pairs = zip(own, preprocess.image_size, strict=True)
        image_size = [a or b for a, b in pairs]
    sides = zip(own, image_size, strict=True)
    if any(side not in (None, asked) for side, asked in sides):
        raise ValueError(
            f"The model takes images of {_by(own)} pixels only, got "
            f"{_by(image_size)}; one that is built with image_size=None takes any."
        )
    return dataclasses.replace(preprocess, image_size=tuple(image_size))


def _by(size):
    return " x ".join("any" if side is None else str(side) for side in size)
