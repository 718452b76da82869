"""What is trained, how fast, how much it decays: groups of parameters and schedules."""

import contextlib
import dataclasses
import math
from collections.abc import Iterator

import keras
from keras import ops

from training.optimizer import SGD, AdamW, Lamb
from training.recipe import Recipe

EPSILON = 1e-8  # of AdamW and LAMB
DECAYED = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


@dataclasses.dataclass(frozen=True)
class Group:
    """Variables that are trained alike.

    Args:
        name: Where they are in the model: `"embedding"`, `"block 3"`, `"head"`.
        variables: The variables, in the order of the model.
        learning_rate_factor: What multiplies the learning rate of the recipe.
        weight_decay: Decay, times the learning rate.
        trained: Whether they are trained at all.
    """

    name: str
    variables: list
    learning_rate_factor: float
    weight_decay: float
    trained: bool


def groups(model: keras.Model, recipe: Recipe) -> list[Group]:
    """Every variable that a gradient could train, by how the recipe trains it.

    The blocks are counted through the stages of a pyramid. What lies before the first
    block is the embedding; what follows a block, such as a PEG or the patches of the
    next stage, goes with it; what follows the last are norm and head. Where the recipe
    says `layer_decay`, the learning rate of block i of n has the factor
    layer_decay ** (n - i), i from 0, that of the embedding layer_decay ** (n + 1), that
    of norm and head 1.

    Only the kernels of Dense and convolution layers are decayed; biases, norms, scales,
    class tokens, probes, position tables and depthwise kernels are not.

    Source of the factors: Clark et al. 2020, "ELECTRA", https://arxiv.org/abs/2003.10555,
    and Bao et al. 2022, "BEiT", https://arxiv.org/abs/2106.08254.

    Args:
        model: A network of `keras_vit`, or a trainer around one.
        recipe: How to train.

    Returns:
        The groups from the embedding to the head, first the decayed of each.

    Raises:
        ValueError: If the recipe freezes more blocks than there are.
    """
    kernels = _kernels(model)
    places, depth = _places(model)
    if isinstance(recipe.frozen, int) and recipe.frozen > depth:
        raise ValueError(
            f"frozen must be at most the {depth} blocks of {model.name!r}, or "
            f"'backbone', got {recipe.frozen}."
        )
    found = {}
    for variable in _trainable(model):
        place = places.get(id(variable), depth + 2)
        decays = id(variable) in kernels
        key = (place, not decays, not _is_trained(variable, place, depth, recipe))
        found.setdefault(key, []).append(variable)
    return [
        Group(
            name=_name(place, depth),
            variables=variables,
            learning_rate_factor=recipe.layer_decay ** max(0, depth + 1 - place),
            weight_decay=0.0 if undecayed else float(recipe.weight_decay),
            trained=not still,
        )
        for (place, undecayed, still), variables in sorted(
            found.items(), key=lambda item: item[0]
        )
    ]


@contextlib.contextmanager
def frozen(model: keras.Model, recipe: Recipe) -> Iterator[None]:
    """Freeze what the recipe does not train, and give it LoRA if it says so.

    On exit all is as before, but for the LoRA, which is a part of the kernels then.

    Args:
        model: As that of `groups`.
        recipe: Its `frozen` and `lora_rank`.

    Raises:
        ValueError: Those of `groups`, or if there is no block to adapt.
    """
    adapted = [] if recipe.lora_rank is None else _adapt(model, recipe.lora_rank)
    still = [v for g in groups(model, recipe) if not g.trained for v in g.variables]
    norms = [  # in a frozen part they keep their statistics
        layer
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        and {id(v) for v in layer.trainable_variables} & {id(v) for v in still}
    ]
    for variable in still:
        variable.trainable = False
    for layer in norms:
        layer.trainable = False
    try:
        yield
    finally:
        for layer in norms:
            layer.trainable = True
        for layer in adapted:
            _merge(layer)
        if adapted:  # what was compiled still adds it
            for x in (model, getattr(model, "network", model)):
                x.train_function = x.test_function = x.predict_function = None
        for variable in still:
            variable.trainable = True


@keras.saving.register_keras_serializable("training")
class Schedule(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, a cosine to a floor, and a cooldown on the floor.

    Args:
        peak: Learning rate after the warm-up.
        floor: Learning rate at the end of the cosine.
        start: Learning rate of update 0, if there is a warm-up.
        warmup: Updates of the warm-up; update `warmup` has the peak.
        updates: Updates of warm-up and cosine; from update `updates` on the rate is
            the floor.

    Call arguments:
        step: Number of updates done.
    """

    def __init__(self, peak, floor, start, warmup, updates):
        self.peak = peak
        self.floor = floor
        self.start = start
        self.warmup = warmup
        self.updates = updates

    def __call__(self, step):
        step = ops.cast(step, "float32")
        rising = self.start + (self.peak - self.start) * step / max(1, self.warmup)
        done = (step - self.warmup) / max(1, self.updates - self.warmup)
        wave = ops.cos(math.pi * ops.clip(done, 0.0, 1.0))
        falling = self.floor + (self.peak - self.floor) * (1 + wave) / 2
        return ops.where(step < self.warmup, rising, falling)

    def get_config(self):
        names = ("peak", "floor", "start", "warmup", "updates")
        return {name: getattr(self, name) for name in names}


def schedule(recipe: Recipe, updates_per_epoch: int) -> Schedule:
    """The learning rate of a recipe, from the number of updates done."""
    warmup = recipe.warmup_steps
    if warmup is None:
        warmup = round(recipe.warmup_epochs * updates_per_epoch)
    updates = round((recipe.epochs - recipe.cooldown_epochs) * updates_per_epoch)
    if warmup >= updates:
        raise ValueError(
            f"warmup_steps must be below the {updates} updates before the cooldown, "
            f"got {warmup}."
        )
    return Schedule(
        recipe.learning_rate,
        recipe.final_learning_rate,
        recipe.warmup_learning_rate,
        warmup,
        updates,
    )


def optimizer(
    model: keras.Model, recipe: Recipe, updates_per_epoch: int
) -> keras.optimizers.Optimizer:
    """The optimizer of a recipe for the trainable variables of a model.

    Raises:
        ValueError: Those of `groups`, or if the warm-up is too long.
    """
    rules = {id(v): group for group in groups(model, recipe) for v in group.variables}
    own = [rules[id(v)] for v in model.trainable_variables]
    common = {
        "learning_rate": schedule(recipe, updates_per_epoch),
        "factors": [group.learning_rate_factor for group in own],
        "decays": [group.weight_decay for group in own],
        "ema": recipe.ema,
        "accumulation_steps": recipe.accumulation_steps,
        "global_clipnorm": recipe.clip_norm,
    }
    if recipe.optimizer == "sgd":
        return SGD(momentum=recipe.momentum, **common)
    kind = AdamW if recipe.optimizer == "adamw" else Lamb
    return kind(beta_1=recipe.momentum, beta_2=recipe.beta_2, epsilon=EPSILON, **common)


def _kernels(model):
    """Identities of the variables that are decayed."""
    return {
        id(variable)
        for layer in model._flatten_layers()  # the public `layers` is not recursive
        if isinstance(layer, DECAYED)
        for variable in layer.weights
        if variable.name == "kernel"
    }


def _trainable(model):
    """What a gradient could train: not the statistics of norms, nor a teacher."""
    still = {
        id(v)
        for layer in model._flatten_layers()
        if isinstance(layer, keras.layers.BatchNormalization)
        for v in (layer.moving_mean, layer.moving_variance)
    } | {id(v) for v in getattr(getattr(model, "teacher", None), "variables", ())}
    return [v for v in model.weights if id(v) not in still]


def _places(model):
    """From the identity of a variable to its place, and the number of blocks.

    Place 0 is the embedding, i + 1 block i of n, n + 1 the norm, and what is not told
    the head.
    """
    network = getattr(model, "network", model)
    depth = sum(_is_block(layer) for layer in network.layers)
    places, place = {}, 0
    for layer in network.layers:
        place += _is_block(layer)
        if layer.name == "norm":
            places |= {id(v): depth + 1 for v in layer.weights}
        elif place < depth or _is_block(layer) or "peg" in layer.name:
            places |= {id(v): place for v in layer.weights}
    return places, depth


def _is_block(layer):
    kind, _, index = layer.name.rpartition("block")
    return index.isdecimal() and (not kind or kind.startswith("stage"))


def _is_trained(variable, place, depth, recipe):
    if recipe.lora_rank is not None:
        return place == depth + 2 or variable.name.startswith("lora")
    if recipe.frozen == "backbone":
        return place == depth + 2
    return recipe.frozen is None or place > recipe.frozen


def _name(place, depth):
    names = {0: "embedding", depth + 1: "norm", depth + 2: "head"}
    return names.get(place, f"block {place - 1}")


def _adapt(model, rank):
    """Give LoRA to the Dense layers in the blocks; return them."""
    network = getattr(model, "network", model)
    adapted = [
        layer
        for block in network.layers
        if _is_block(block)
        for layer in block._flatten_layers()
        if isinstance(layer, keras.layers.Dense)
    ]
    if not adapted:
        raise ValueError(f"lora_rank needs blocks to adapt, {model.name!r} has none.")
    for layer in adapted:
        layer.enable_lora(rank)
    return adapted


def _merge(layer):
    """Add the LoRA of a layer to its kernel, and take it away."""
    merged = ops.convert_to_numpy(layer.kernel)
    layer.lora_enabled = False
    layer.lora_rank = None
    layer._tracker.unlock()
    for variable in (layer.lora_kernel_a, layer.lora_kernel_b):
        layer._untrack_variable(variable)
    layer._tracker.lock()
    layer.lora_kernel_a = layer.lora_kernel_b = None
    layer._kernel.trainable = True
    layer._kernel.assign(merged)
