"""A recipe says everything that a training run needs, as data."""

import dataclasses
import inspect
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import keras

import keras_vit
from keras_vit.encoder import unknown
from training.files import checkpoint_source
from training.recipe_parts import (
    Augmentation,
    Teaching,
    TokenLabels,
    check_class_weights,
    check_number,
)

NO_AUGMENTATION = Augmentation()
LOSSES = ("softmax", "sigmoid", "binary")
OPTIMIZERS = ("adamw", "lamb", "sgd")
PRECISIONS = ("auto", "float32", "mixed_bfloat16", "mixed_float16")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """What to train, on what, and how.

    Args:
        name: Key of `RECIPES`.
        source: Where the numbers come from.
        cost: What a run takes, and on what it was measured.
        expected: Result to expect, or "not run here".
        data: Name of a dataset, as `load_data` takes it; None where only the user can
            know it.
        family: Function of `keras_vit` that builds the model; None for that of the
            checkpoint.
        model: Its keyword arguments, `num_classes` aside.
        checkpoint: Source that `keras_vit.from_checkpoint` takes, or a run directory,
            whose last model it is; `model` then holds overrides of it, and `family` is
            not used. None for a model with fresh weights.
        segmentation: Keyword arguments of `keras_vit.SemanticFPN`, which gives the
            model logits for each pixel; None for one class an image.
        epochs: Passes over the training images, the cooldown among them.
        batch_size: Images for one update of the weights, on all devices together.
        accumulation_steps: In how many parts a batch is sent through the model, to
            save memory; the update is that of the whole batch.
        optimizer: `"adamw"`, `"lamb"` or `"sgd"`.
        momentum: beta_1 of AdamW and LAMB, the momentum of SGD.
        beta_2: beta_2 of AdamW and LAMB.
        learning_rate: Peak learning rate, reached after the warm-up; it is for batches
            of `batch_size`, and nothing scales it.
        final_learning_rate: Learning rate after the last step of the cosine.
        warmup_learning_rate: Learning rate of the first step, if there is a warm-up.
        warmup_epochs: Length of the linear warm-up; a fraction is fine.
        warmup_steps: The same in updates, instead of `warmup_epochs`; None for those.
        cooldown_epochs: The last epochs, which stay at `final_learning_rate`.
        weight_decay: Decay of the kernels, times the learning rate; everything else is
            undecayed.
        layer_decay: Factor of the learning rate from each block to the one before it,
            the embedding before the first block; 1 for none.
        frozen: What is not trained: an int k for the embedding and the first k blocks,
            `"backbone"` for all but the head; None for nothing.
        lora_rank: Rank of LoRA in the Dense layers of the blocks, beside which only the
            head is trained; None for no LoRA.
        ema: Decay of the average of the weights, an update at a time, which is then
            what is validated and saved; None for no average.
        loss: `"softmax"`: cross-entropy of the softmax; `"sigmoid"`: of the sigmoids,
            summed over the classes; `"binary"`: the same, their mean, every class that
            a label has part of counting as 1 (DeiT III).
        train_images: Number of training images, drawn by the seed; None for all.
        damaged_images: How many training images, and how many held-out ones, may be
            damaged before the run stops; 0 stops it at the first.
        class_weights: What an image, or a pixel, of each class weighs in the loss: a
            number for each class, or a mapping from names of classes, where one that is
            not named weighs 1; `"balanced"`: inversely to how often the class is among
            the training images, 1 in the mean; None for 1.
        augmentation: What is done to the training images.
        token_labeling: How a label for every token is trained; None for one label an
            image.
        teaching: How a teacher's answers are trained; None for no teacher.
        clip_norm: Largest global norm of the gradient; None for no clipping.
        remat: Whether each block is computed again for the gradient, which saves the
            memory of all blocks but one for about a third more time; the gradient is
            the same.
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
    data: str | None
    family: str | None = "ViT"
    model: Mapping[str, Any]
    checkpoint: str | None = None
    segmentation: Mapping[str, Any] | None = None
    epochs: int
    batch_size: int
    accumulation_steps: int = 1
    optimizer: str = "adamw"
    momentum: float = 0.9
    beta_2: float = 0.999
    learning_rate: float
    final_learning_rate: float = 0.0
    warmup_learning_rate: float = 0.0
    warmup_epochs: float = 0.0
    warmup_steps: int | None = None
    cooldown_epochs: float = 0.0
    weight_decay: float = 0.05
    layer_decay: float = 1.0
    frozen: int | str | None = None
    lora_rank: int | None = None
    ema: float | None = None
    loss: str = "softmax"
    train_images: int | None = None
    damaged_images: int = 100
    class_weights: str | Mapping[str, float] | Sequence[float] | None = None
    augmentation: Augmentation = NO_AUGMENTATION
    token_labeling: TokenLabels | None = None
    teaching: Teaching | None = None
    clip_norm: float | None = None
    remat: bool = False
    precision: str = "auto"
    seed: int = 0

    def __post_init__(self):
        for name, kind in PARTS.items():
            object.__setattr__(self, name, _made(kind, getattr(self, name)))
        if self.checkpoint is not None:
            if not isinstance(self.checkpoint, str):
                raise ValueError(f"checkpoint must be text, got {self.checkpoint!r}.")
            object.__setattr__(self, "family", None)
        elif self.family not in (*families(), None):
            raise ValueError(unknown("family", self.family, families()))
        for name, known in (
            ("precision", PRECISIONS),
            ("optimizer", OPTIMIZERS),
            ("loss", LOSSES),
        ):
            if getattr(self, name) not in known:
                raise ValueError(unknown(name, getattr(self, name), known))
        self._check_numbers()
        self._check_lengths()
        self._check_loss()

    def _check_numbers(self):
        for name in ("epochs", "batch_size", "accumulation_steps"):
            check_number(self, name, int, lambda x: x > 0, "a positive int")
        for name in ("seed", "damaged_images"):
            check_number(self, name, int, lambda x: x >= 0, "an int >= 0")
        check_number(self, "learning_rate", float, lambda x: x > 0, "positive")
        for name in (
            "final_learning_rate",
            "warmup_learning_rate",
            "weight_decay",
            "warmup_epochs",
            "cooldown_epochs",
        ):
            check_number(self, name, float, lambda x: x >= 0, "a number >= 0")
        for name in ("momentum", "beta_2"):
            check_number(self, name, float, lambda x: 0 <= x < 1, "in [0, 1)")
        check_number(self, "layer_decay", float, lambda x: 0 < x <= 1, "in (0, 1]")
        for name in ("train_images", "lora_rank", "warmup_steps"):
            if getattr(self, name) is not None:
                check_number(self, name, int, lambda x: x > 0, "positive or None")
        if self.clip_norm is not None:
            check_number(self, "clip_norm", float, lambda x: x > 0, "positive or None")
        if self.ema is not None:
            check_number(self, "ema", float, lambda x: 0 < x < 1, "in (0, 1) or None")
        if not isinstance(self.remat, bool):
            raise ValueError(f"remat must be true or false, got {self.remat!r}.")
        if self.frozen not in (None, "backbone"):
            rule = "the number of blocks to freeze, 'backbone' or None"
            check_number(self, "frozen", int, lambda x: x >= 0, rule)

    def _check_lengths(self):
        if self.batch_size % self.accumulation_steps:
            raise ValueError(
                f"accumulation_steps must divide batch_size={self.batch_size}, got "
                f"{self.accumulation_steps}."
            )
        if self.warmup_steps is not None and self.warmup_epochs:
            raise ValueError(
                "warmup_epochs and warmup_steps are one length; give one and set the "
                f"other to 0 or null, got {self.warmup_epochs} and {self.warmup_steps}."
            )
        if not self.warmup_epochs + self.cooldown_epochs < self.epochs:
            raise ValueError(
                f"warmup_epochs + cooldown_epochs must be below epochs={self.epochs}, "
                f"got {self.warmup_epochs} + {self.cooldown_epochs}; change them along "
                f"with epochs, to warmup_epochs={self.epochs / 10:g} for example."
            )
        if self.lora_rank is not None and self.frozen is not None:
            raise ValueError(
                f"lora_rank freezes what it adapts: frozen must be None with it, got "
                f"{self.frozen!r}."
            )

    def _check_loss(self):
        if self.token_labeling is not None and self.teaching is not None:
            raise ValueError(
                "A recipe has token_labeling or teaching; got both, set one to null."
            )
        check_class_weights(self)
        single = self.token_labeling is None and self.segmentation is None
        if self.loss != "softmax" and not single:
            raise ValueError(
                "loss must be 'softmax' with token_labeling or segmentation, got "
                f"{self.loss!r}."
            )
        smoothing = self.augmentation.label_smoothing
        if self.loss == "binary" and smoothing:
            raise ValueError(
                "label_smoothing must be 0 with loss='binary', where every class that "
                f"a label has part of counts as 1; got {smoothing}."
            )

    def replace(self, **changes) -> "Recipe":
        """Return a copy with other values.

        A name that is not a field of the recipe is one of its augmentation, token
        labeling or teaching, or an argument of the model, so `replace(epochs=3,
        mixup=0.2, depth=2)` does what it says. For the model a list becomes a tuple, as
        in the rows of `VARIANTS`.

        With a `checkpoint`, a recipe of a model with fresh weights leaves the
        arguments of that model behind, for the checkpoint knows its own: only what is
        given here is changed of it.

        Raises:
            ValueError: If a name is none of these, a value is out of its range, or a
                checkpoint meets a family.
        """
        first = {x: changes.pop(x) for x in ("checkpoint", "family") if x in changes}
        if first:  # they decide what the others mean
            checkpoint = first.get("checkpoint", self.checkpoint)
            if checkpoint is not None and first.get("family") is not None:
                raise ValueError(
                    "family must be None with a checkpoint, which knows its own, got "
                    f"{first['family']!r}."
                )
            if checkpoint is not None and self.family is not None:
                first["model"] = {}
            return dataclasses.replace(self, **first).replace(**changes)
        homes = dict.fromkeys(self._model_arguments(), "model")
        for part in PARTS:
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
        """Names that `model` may hold; of a checkpoint those of every family."""
        names = families() if self.family is None else [self.family]
        taken = {"name", "num_classes", "overrides"}
        if self.family is None:
            taken.add("variant")  # of it nothing would be left but the name
        arguments = {"table_grid": None} if self.family is None else {}
        for name in names:
            function = getattr(keras_vit, name)
            rows = sys.modules[function.__module__].VARIANTS.values()
            arguments |= inspect.signature(function).parameters
            arguments |= dict.fromkeys(_names(next(iter(rows))))
        return [name for name in arguments if name not in taken]

    def check_complete(self) -> None:
        """Refuse a recipe that lacks what only its user can give.

        Raises:
            ValueError: If there is no checkpoint to start from, no data, or no teacher.
        """
        if self.family is None and self.checkpoint is None:
            raise ValueError(
                f"The recipe {self.name!r} needs a checkpoint to start from: --from "
                "SOURCE, or replace(checkpoint=SOURCE); SOURCE is a file, a folder, "
                "hf:OWNER/NAME or a run directory."
            )
        if self.data is None:
            raise ValueError(
                f"The recipe {self.name!r} has no data of its own: --data "
                "folder:PHOTOS, or another name that load_data takes."
            )
        if self.teaching is not None and self.teaching.teacher is None:
            raise ValueError(
                f"The recipe {self.name!r} needs a teacher: --set teacher=SOURCE, or "
                "replace(teacher=SOURCE); SOURCE is a .keras file, a run directory, or "
                "another checkpoint."
            )

    def build_model(
        self, num_classes: int, labels: Sequence[str] | None = None
    ) -> keras.Model:
        """Build the model under the current dtype policy.

        Args:
            num_classes: C, number of logits.
            labels: Names of the classes, which a classifier keeps in its file; None
                for those that `model` or the checkpoint says, if any.

        Raises:
            ValueError: If an argument of the model is wrong, or the checkpoint is
                missing, damaged or does not fit.
            FileNotFoundError: If there is no such checkpoint.
        """
        if self.segmentation is not None:
            backbone = self._build(num_classes=0)
            return keras_vit.SemanticFPN(backbone, num_classes, **self.segmentation)
        if labels is None:
            return self._build(num_classes=num_classes)
        return self._build(num_classes=num_classes, labels=tuple(labels))

    def _build(self, **arguments):
        arguments |= self.model
        if self.checkpoint is not None:
            source = checkpoint_source(self.checkpoint)
            return keras_vit.from_checkpoint(source, **arguments)
        if self.family is None:
            self.check_complete()
        return getattr(keras_vit, self.family)(**arguments)


PARTS = {
    "augmentation": Augmentation,
    "token_labeling": TokenLabels,
    "teaching": Teaching,
}


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
