"""How the models of keras_vit are trained: recipes, data, fit loops.

The names below are imported when they are first used, so that reading a recipe does
not wait for TensorFlow.
"""

import importlib

_HOMES = {
    "RECIPES": "training.recipe",
    "Dataset": "training.data",
    "Recipe": "training.recipe",
    "callbacks": "training.loop",
    "compile_model": "training.loop",
    "evaluate": "training.evaluation",
    "fit": "training.loop",
    "load_data": "training.data",
    "resume": "training.loop",
    "training_batches": "training.data",
    "validation_batches": "training.data",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
