"""A recipe says everything that a training run needs, as data."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping
from typing import Any

import keras

import keras_vit
from keras_vit.encoder import unknown

PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")


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
        random_affine: Keyword arguments of `training.augment.random_affine`; None for
            no augmentation.
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
    random_affine: Mapping[str, float] | None = None
    clip_norm: float | None = None
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        if self.family not in families():
            raise ValueError(unknown("family", self.family, families()))
        for name in ("epochs", "batch_size"):
            self._check_number(name, int, lambda x: x > 0, "a positive int")
        self._check_number("seed", int, lambda x: x >= 0, "an int >= 0")
        self._check_number("learning_rate", float, lambda x: x > 0, "positive")
        for name in ("final_learning_rate", "weight_decay", "warmup_epochs"):
            self._check_number(name, float, lambda x: x >= 0, "a number >= 0")
        if self.clip_norm is not None:
            self._check_number("clip_norm", float, lambda x: x > 0, "positive or None")
        if not 0 <= self.warmup_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs must be in [0, epochs={self.epochs}), "
                f"got {self.warmup_epochs}."
            )
        if self.precision not in PRECISIONS:
            raise ValueError(unknown("precision", self.precision, PRECISIONS))

    def _check_number(self, name, kind, fits, rule):
        value = getattr(self, name)
        numbers = (int,) if kind is int else (int, float)
        is_number = isinstance(value, numbers) and not isinstance(value, bool)
        if not (is_number and fits(value)):
            raise ValueError(f"{name} must be {rule}, got {value!r}.")

    def replace(self, **changes) -> "Recipe":
        """Return a copy with other values.

        A name that is not a field of the recipe is an argument of the model, so
        `replace(epochs=3, depth=2)` does what it says. There a list becomes a tuple, as
        in the rows of `VARIANTS`.

        Raises:
            ValueError: If a name is neither, or a value is out of its range.
        """
        if "family" in changes:
            family = changes.pop("family")
            return dataclasses.replace(self, family=family).replace(**changes)
        fields = [field.name for field in dataclasses.fields(self)]
        arguments = self._model_arguments()
        for name in changes:
            if name not in fields and name not in arguments:
                raise ValueError(unknown("A field", name, [*fields, *arguments]))
        own = {name: value for name, value in changes.items() if name in fields}
        model = {
            name: tuple(value) if isinstance(value, list) else value
            for name, value in changes.items()
            if name not in fields
        }
        if model:
            own["model"] = {**own.get("model", self.model), **model}
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


def families() -> list[str]:
    """Names of the functions of `keras_vit` that build a model from a row."""
    functions = {name: getattr(keras_vit, name) for name in keras_vit.__all__}
    return [
        name
        for name, function in functions.items()
        if inspect.isfunction(function)
        and hasattr(sys.modules[function.__module__], "VARIANTS")
    ]


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ValueError: If there is none.
    """
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[name]


RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            name="digits",
            source="made for this package",
            cost="about a minute on 2 CPU cores",
            expected="97 to 99 % of the 360 held-out images",
            data="digits",
            model={
                "variant": "tiny",
                "image_size": 32,
                "patch_size": 8,
                "embed_dim": 96,
                "depth": 4,
                "pool": "mean",
                "initialization": "timm",
                "drop_path_rate": 0.1,
            },
            epochs=40,
            batch_size=64,
            learning_rate=2e-3,
            warmup_epochs=3,
            weight_decay=0.05,
            random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.08},
            clip_norm=1.0,
        ),
        Recipe(
            name="digits_segmentation",
            source="made for this package",
            cost="about 5 minutes on 2 CPU cores",
            expected="mean IoU 0.807 over 300 held-out scenes, with seed 0",
            data="digit_scenes:64",
            family="PCPVT",
            model={
                "variant": "small",
                "image_size": None,
                "embed_dims": (24, 48, 96, 128),
                "depths": (1, 1, 2, 1),
                "num_heads": (1, 2, 4, 4),
                "mlp_ratios": (4, 4, 4, 4),
                "normalization": "inception",
                "crop_ratio": None,
                "drop_path_rate": 0.05,
            },
            segmentation={"channels": 48},
            epochs=20,
            batch_size=32,
            learning_rate=3e-3,
            warmup_epochs=1,
            weight_decay=0.05,
            random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.1},
            clip_norm=1.0,
        ),
        Recipe(
            name="vit_small",
            source="optimisation of DeiT-S, https://arxiv.org/abs/2012.12877, table 9, "
            "at batch 1024; without its augmentation",
            cost="not run here",
            expected="not run here",
            data="tfds:imagenet2012",
            model={"variant": "deit_small", "drop_path_rate": 0.1},
            epochs=300,
            batch_size=1024,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            warmup_epochs=5,
            weight_decay=0.05,
        ),
    ]
}
