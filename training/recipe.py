"""A recipe says everything that a training run needs, as data."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import keras

import keras_vit
from keras_vit.encoder import unknown
from keras_vit.mixtoken import SIDES

PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")


def _check_number(values, name, kind, fits, rule):
    value = getattr(values, name)
    numbers = (int,) if kind is int else (int, float)
    is_number = isinstance(value, numbers) and not isinstance(value, bool)
    if not (is_number and fits(value)):
        raise ValueError(f"{name} must be {rule}, got {value!r}.")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images, in this order, and to their labels with them.

    Args:
        random_resized_crop: Keyword arguments of the function of that name in
            `training.augment`; None for the crop that the model records.
        random_flip: Whether every second image is mirrored, left for right.
        rand_augment_geometry: The same; None for none.
        random_affine: Keyword arguments of `training.augment.affines`; None for none.
        label_smoothing: Part of every label, 0 to below 1, that goes to all classes
            alike.
        mixup: a of lambda ~ Beta(a, a); 0 for no MixUp.
        cutmix: The same for CutMix; where both are given each has probability 1/2.

    Raises:
        ValueError: If a number is out of its range.
    """

    random_resized_crop: Mapping[str, Any] | None = None
    random_flip: bool = False
    rand_augment_geometry: Mapping[str, float] | None = None
    random_affine: Mapping[str, float] | None = None
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0

    def __post_init__(self):
        for name in ("mixup", "cutmix"):
            _check_number(self, name, float, lambda x: x >= 0, "a number >= 0")
        _check_number(self, "label_smoothing", float, lambda x: 0 <= x < 1, "in [0, 1)")

    @property
    def softens_labels(self) -> bool:
        """Whether a label is no longer one class."""
        return bool(self.label_smoothing or self.mixup or self.cutmix)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenLabels:
    """How a label for every token is trained, by `training.TokenLabeling`.

    Args:
        dense_weight: Weight of the tokens in the loss.
        class_weight: Weight of the image.
        class_labels: `"truth"`, the class of the image, or `"maps"`, the mean of its
            label map over what is seen of it.
        ground_truth: Whether labels from maps are corrected by the truth, as in
            `TokenLabelingLoss`.
        mix_token: `"paper"` or `"unbiased"`, the `sides` of `keras_vit.MixToken`; None
            for no mixing of tokens.

    Raises:
        ValueError: If a number is out of its range or a name is unknown.
    """

    dense_weight: float = 1.0
    class_weight: float = 1.0
    class_labels: str = "truth"
    ground_truth: bool = False
    mix_token: str | None = "paper"

    def __post_init__(self):
        for name in ("dense_weight", "class_weight"):
            _check_number(self, name, float, lambda x: x >= 0, "a number >= 0")
        for name, known in (
            ("class_labels", ("truth", "maps")),
            ("mix_token", (*SIDES, None)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how.

    Args:
        name: Key of `RECIPES`.
        source: Where the numbers come from.
        cost: What a run takes, and on what it was measured.
        expected: Result to expect, or "not run here".
        data: Name of a dataset, as `load_data` takes it.
        family: Function of `keras_vit` that builds the model.
        model: Its keyword arguments, `num_classes` aside.
        segmentation: Keyword arguments of `keras_vit.SemanticFPN`, which gives the
            model logits for each pixel; None for one class an image.
        epochs: Passes over the training images.
        batch_size: Images a step.
        learning_rate: Peak learning rate, reached after the warm-up.
        final_learning_rate: Learning rate after the last step of the cosine.
        warmup_epochs: Length of the linear warm-up from 0; a fraction is fine.
        weight_decay: Decoupled decay of the kernels; everything else is undecayed.
        train_images: Number of training images, drawn by the seed; None for all.
        augmentation: What is done to the training images.
        token_labeling: How a label for every token is trained; None for one label an
            image.
        clip_norm: Largest global norm of the gradient; None for no clipping.
        precision: `"float32"`, `"mixed_bfloat16"`, `"mixed_float16"`, or `"auto"`:
            the half precision that the accelerator is made for, float32 on a CPU.
        seed: Seed of the weights, the dropout and the order of the data.

    Raises:
        ValueError: If a number is out of its range or a name is unknown.
    """

    name: str
    source: str
    cost: str
    expected: str
    data: str
    family: str = "ViT"
    model: Mapping[str, Any]
    segmentation: Mapping[str, Any] | None = None
    epochs: int
    batch_size: int
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_epochs: float = 0.0
    weight_decay: float = 0.05
    train_images: int | None = None
    augmentation: Augmentation = Augmentation()
    token_labeling: TokenLabels | None = None
    clip_norm: float | None = None
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name, kind in (
            ("augmentation", Augmentation),
            ("token_labeling", TokenLabels),
        ):
            object.__setattr__(self, name, _made(kind, getattr(self, name)))
        if self.family not in families():
            raise ValueError(unknown("family", self.family, families()))
        for name in ("epochs", "batch_size"):
            _check_number(self, name, int, lambda x: x > 0, "a positive int")
        _check_number(self, "seed", int, lambda x: x >= 0, "an int >= 0")
        _check_number(self, "learning_rate", float, lambda x: x > 0, "positive")
        for name in ("final_learning_rate", "weight_decay", "warmup_epochs"):
            _check_number(self, name, float, lambda x: x >= 0, "a number >= 0")
        if self.train_images is not None:
            _check_number(
                self, "train_images", int, lambda x: x > 0, "positive or None"
            )
        if self.clip_norm is not None:
            _check_number(self, "clip_norm", float, lambda x: x > 0, "positive or None")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs must be in [0, epochs={self.epochs}), "
                f"got {self.warmup_epochs}; change it along with epochs."
            )
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))

    def replace(self, **changes) -> "Recipe":
        """Return a copy with other values.

        A name that is not a field of the recipe is one of its augmentation, of its
        token labeling, or an argument of the model, so `replace(epochs=3, mixup=0.2,
        depth=2)` does what it says. For the model a list becomes a tuple, as in the
        rows of `VARIANTS`.

        Raises:
            ValueError: If a name is none of these, or a value is out of its range.
        """
        if "family" in changes:
            family = changes.pop("family")
            return dataclasses.replace(self, family=family).replace(**changes)
        homes = dict.fromkeys(self._model_arguments(), "model")
        for part in ("augmentation", "token_labeling"):
            if getattr(self, part) is not None:
                homes |= dict.fromkeys(_names(getattr(self, part)), part)
        homes |= dict.fromkeys(_names(self))
        own, inner = {}, {}
        for name, value in changes.items():
            if name not in homes:
                raise ValueError(unknown("A field", name, homes))
            place = inner.setdefault(homes[name], {}) if homes[name] else own
            place[name] = value
        for part, values in inner.items():
            old = own.get(part, getattr(self, part))
            if part == "model":
                own[part] = {**old, **{k: _plain(x) for k, x in values.items()}}
            else:
                own[part] = dataclasses.replace(old, **values)
        return dataclasses.replace(self, **own)

    def _model_arguments(self):
        function = getattr(keras_vit, self.family)
        rows = sys.modules[function.__module__].VARIANTS.values()
        overrides = dataclasses.fields(next(iter(rows)))
        signature = inspect.signature(function).parameters
        taken = ("name", "num_classes", "overrides")
        own = [name for name in signature if name not in taken]
        return [*own, *(field.name for field in overrides)]

    def build_model(self, num_classes: int) -> keras.Model:
        """Build the model under the current dtype policy."""
        family = getattr(keras_vit, self.family)
        if self.segmentation is None:
            return family(**self.model, num_classes=num_classes)
        backbone = family(**self.model, num_classes=0)
        return keras_vit.SemanticFPN(backbone, num_classes, **self.segmentation)


def _names(values):
    return [field.name for field in dataclasses.fields(values)]


def _plain(value):
    return tuple(value) if isinstance(value, list) else value


def _made(kind, value):
    """A mapping as what it describes; anything else as it is."""
    if not isinstance(value, Mapping):
        return value
    for name in value:
        if name not in _names(kind):
            raise ValueError(unknown(f"A field of {kind.__name__}", name, _names(kind)))
    return kind(**value)


def families() -> list[str]:
    """Names of the functions of `keras_vit` that build a model from a row."""
    functions = {name: getattr(keras_vit, name) for name in keras_vit.__all__}
    return [
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and hasattr(sys.modules[function.__module__], "VARIANTS")
    ]
