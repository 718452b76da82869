"""Rematerialisation: blocks that are computed again for the gradient, to save memory.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost",
https://arxiv.org/abs/1604.06174. `keras.RematScope` says which layers; what is here
makes it right on every backend for layers that draw random numbers.
"""

import keras
from keras import ops

DEEPEST = 200  # blocks of a model, or of one of the four stages of a pyramid

BLOCKS = frozenset(
    f"{stage}block{i}"
    for stage in ("", "stage0_", "stage1_", "stage2_", "stage3_")
    for i in range(DEEPEST)
)


def remat_blocks():
    """A `keras.RematScope` for the building of a model, each block once.

        with keras_vit.remat_blocks():
            model = keras_vit.ViT("large")

    Training then keeps of each block the input alone, and computes the rest again for
    the gradient, which is the same. Layers know it from their making: a model that is
    loaded from a file forgets it, unless it is loaded within this scope. Weights,
    names, configuration and what the model answers are the same with and without.

    The mode `"full"` of a plain `keras.RematScope()` is no substitute: it computes
    the model as a whole again, and every layer in it, and every layer in that.
    """
    return keras.RematScope("list_of_layers", layer_names=BLOCKS)


class Rematerialized:
    """What a layer inherits first, to be computed again with the same random numbers.

    Keras' own second computation draws the next numbers of a dropout (PyTorch: a wrong
    gradient), refuses `training` among the arguments (JAX, TensorFlow), and loses what
    the draws leave behind (JAX). Here the states of the seeds are set to what they
    were, and afterwards to what they were before that.
    """

    def rematerialized_call(self, layer_call, *args, **kwargs):
        """`layer_call`, computed again for a gradient if the layer's scope says so.

        Only in training: a graph that is exported has nothing of it.
        """
        if not kwargs.get("training"):
            return layer_call
        values = [*args, *kwargs.values()]
        tensors = [x for x in values if ops.is_tensor(x)]
        seeds = _seeds(self)
        starts = _states(seeds)

        def compute(*tensors):
            now = _states(seeds)
            _assign(seeds, starts)
            given = iter(tensors)
            every = [next(given) if ops.is_tensor(x) else x for x in values]
            named = dict(zip(kwargs, every[len(args) :], strict=True))
            outputs = layer_call(*every[: len(args)], **named)
            ends = _states(seeds)
            _assign(seeds, now)
            return outputs, ends

        again = super().rematerialized_call(compute, *args, **kwargs)
        if again is compute:
            return layer_call

        def call(*_, **__):
            outputs, ends = again(*tensors)
            _assign(seeds, ends)
            return outputs

        return call


def _seeds(layer):
    """The states of the random numbers that a layer and its sublayers draw."""
    own = (x for x in layer.non_trainable_variables if x.name == "seed_generator_state")
    return list(own)


def _states(seeds):
    return [ops.copy(seed.value) for seed in seeds]  # PyTorch assigns in place


def _assign(seeds, states):
    for seed, state in zip(seeds, states, strict=True):
        seed.assign(state)
