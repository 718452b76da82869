"""What is decayed, how fast it learns: parameter groups and schedules."""

import keras

from training.recipe import Recipe

DECAYED = (
    keras.layers.Dense,
    keras.layers.EinsumDense,
    keras.layers.Conv1D,
    keras.layers.Conv2D,
    keras.layers.Conv3D,
)


def undecayed(model: keras.Model) -> list:
    """Trainable variables that weight decay must leave alone.

    Only the kernels of Dense and convolution layers are decayed; biases, norms,
    scales, class tokens, probes, position tables and depthwise kernels are not.
    """
    kernels = {
        id(layer.kernel)
        for layer in model._flatten_layers()  # the public `layers` is not recursive
        if isinstance(layer, DECAYED)
    }
    return [v for v in model.trainable_variables if id(v) not in kernels]


def schedule(recipe: Recipe, steps_per_epoch: int):
    """Linear warm-up from 0 to the peak, then a cosine to the final learning rate."""
    warmup_steps = round(recipe.warmup_epochs * steps_per_epoch)
    peak = recipe.learning_rate
    return keras.optimizers.schedules.CosineDecay(
        initial_learning_rate=0.0 if warmup_steps else peak,
        decay_steps=max(1, recipe.epochs * steps_per_epoch - warmup_steps),
        alpha=recipe.final_learning_rate / peak,
        warmup_target=peak if warmup_steps else None,
        warmup_steps=warmup_steps,
    )


def optimizer(model: keras.Model, recipe: Recipe, steps_per_epoch: int):
    """AdamW with the recipe's schedule, its decay on kernels only."""
    adamw = keras.optimizers.AdamW(
        schedule(recipe, steps_per_epoch),
        weight_decay=recipe.weight_decay,
        global_clipnorm=recipe.clip_norm,
    )
    adamw.exclude_from_weight_decay(var_list=undecayed(model))
    return adamw
