"""The parts of a recipe that are more than one value."""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from keras_vit.encoder import unknown
from keras_vit.mixtoken import SIDES

DISTILLATIONS = ("hard", "soft")
ARGUMENTS = {  # of what a recipe gives keyword arguments, by the name of the field
    "random_resized_crop": ("scale", "ratio", "interpolation"),
    "rand_augment": ("num_ops", "magnitude", "deviation"),
    "random_affine": ("rotation_degrees", "zoom", "shift"),
}


def check_number(values, name, kind, fits, rule):
    """Refuse a field that is no number of a kind, or breaks its rule."""
    value = getattr(values, name)
    numbers = (int,) if kind is int else (int, float)
    is_number = isinstance(value, numbers) and not isinstance(value, bool)
    if not (is_number and fits(value)):
        raise ValueError(f"{name} must be {rule}, got {value!r}.")


def check_class_weights(recipe):
    """Refuse weights of classes that are none, or that what is trained cannot use."""
    weights = recipe.class_weights
    if weights is None:
        return
    for part in ("token_labeling", "teaching"):
        if getattr(recipe, part) is not None:
            raise ValueError(
                f"class_weights must be None with {part}, whose loss has parts that no "
                "class weighs; set one of them to null."
            )
    if weights == "balanced":
        return
    if isinstance(weights, Mapping):
        weights = list(weights.values())
    numbers = isinstance(weights, list | tuple) and all(
        isinstance(x, int | float) and not isinstance(x, bool) and 0 <= x < math.inf
        for x in weights
    )
    if not numbers or not any(weights):
        raise ValueError(
            "class_weights must be 'balanced', a number >= 0 for each class, of which "
            "one is positive, a mapping from names of classes to such numbers, or "
            f"None, got {recipe.class_weights!r}."
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Augmentation:
    """What is done to training images, in this order, and to their labels with them.

    Args:
        repeats: How often an image is in an epoch, each time augmented anew: its
            copies follow each other, and of the images an epoch sees so many fewer
            (repeated augmentation).
        random_resized_crop: Keyword arguments of the function of that name in
            `training.augment`; None for the crop that the model records.
        random_flip: Whether every second image is mirrored, left for right.
        rand_augment: Keyword arguments of RandAugment, such as `{"num_ops": 2,
            "magnitude": 9.0}`; None for none.
        three_augment: Whether each image is made grey, solarized or blurred, the
            3-Augment of DeiT III.
        color_jitter: Brightness, contrast and saturation are each multiplied by up to
            1 - this and 1 + this; 0 for no change.
        random_affine: Keyword arguments of `training.augment.affines`; None for none.
        random_erasing: Probability that a box of an image becomes noise.
        label_smoothing: Part of every label, 0 to below 1, that goes to all classes
            alike.
        mixup: a of lambda ~ Beta(a, a); 0 for no MixUp.
        cutmix: The same for CutMix.
        mix_probability: Part of the batches that are mixed at all.
        cutmix_probability: Part of those that go to CutMix, where there is MixUp too.
        on_accelerator: Whether pixels are changed within the training step, on its
            device, and not while they are read; what is done stays the same.

    Raises:
        ValueError: If a number is out of its range.
    """

    repeats: int = 1
    random_resized_crop: Mapping[str, Any] | None = None
    random_flip: bool = False
    rand_augment: Mapping[str, float] | None = None
    three_augment: bool = False
    color_jitter: float = 0.0
    random_affine: Mapping[str, float] | None = None
    random_erasing: float = 0.0
    label_smoothing: float = 0.0
    mixup: float = 0.0
    cutmix: float = 0.0
    mix_probability: float = 1.0
    cutmix_probability: float = 0.5
    on_accelerator: bool = False

    def __post_init__(self):
        check_number(self, "repeats", int, lambda x: x > 0, "a positive int")
        for name in ("mixup", "cutmix"):
            check_number(self, name, float, lambda x: x >= 0, "a number >= 0")
        for name in ("random_erasing", "mix_probability", "cutmix_probability"):
            check_number(self, name, float, lambda x: 0 <= x <= 1, "in [0, 1]")
        for name in ("label_smoothing", "color_jitter"):
            check_number(self, name, float, lambda x: 0 <= x < 1, "in [0, 1)")
        if not isinstance(self.on_accelerator, bool):
            raise ValueError(
                f"on_accelerator must be True or False, got {self.on_accelerator!r}."
            )
        for name, known in ARGUMENTS.items():
            self._check_arguments(name, known)

    def _check_arguments(self, name, known):
        value = getattr(self, name)
        if value is None:
            return
        if not isinstance(value, Mapping):
            example = {known[0]: "..."}
            raise ValueError(
                f"{name} must be keyword arguments, such as {example}, or None, got "
                f"{value!r}."
            )
        for key in value:
            if key not in known:
                raise ValueError(unknown(f"An argument of {name}", key, known))

    @property
    def softens_labels(self) -> bool:
        """Whether a label is no longer one class."""
        mixes = (self.mixup or self.cutmix) and self.mix_probability
        return bool(self.label_smoothing or mixes)


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
            check_number(self, name, float, lambda x: x >= 0, "a number >= 0")
        for name, known in (
            ("class_labels", ("truth", "maps")),
            ("mix_token", (*SIDES, None)),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known))


@dataclasses.dataclass(frozen=True, kw_only=True)
class Teaching:
    """How a teacher's answers are trained, by `training.Distillation`.

    Args:
        teacher: Source of the teacher: a `.keras` file, a run directory, or what
            `keras_vit.from_checkpoint` takes; None where only the user can know it.
        distillation: `"hard"`, the teacher's largest class, or `"soft"`, its
            probabilities.
        distillation_weight: alpha: the part of the loss that is the teacher's.
        temperature: tau, by which the logits are divided in soft distillation.

    Raises:
        ValueError: If a number is out of its range or a name is unknown.
    """

    teacher: str | None = None
    distillation: str = "hard"
    distillation_weight: float = 0.5
    temperature: float = 1.0

    def __post_init__(self):
        check_number(
            self, "distillation_weight", float, lambda x: 0 <= x <= 1, "in [0, 1]"
        )
        check_number(self, "temperature", float, lambda x: x > 0, "positive")
        if self.distillation not in DISTILLATIONS:
            raise ValueError(unknown("distillation", self.distillation, DISTILLATIONS))
        if not isinstance(self.teacher, str | None):
            raise ValueError(f"teacher must be text or None, got {self.teacher!r}.")
