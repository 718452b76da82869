"""How the models of keras_vit are trained: recipes, data, fit loops.

The names below are imported when they are first used, so that reading a recipe does
not wait for TensorFlow.
"""

import importlib

_HOMES = {
    "RECIPES": "training.recipes",
    "Augmentation": "training.recipe_parts",
    "Augmented": "training.accelerated",
    "BinaryCrossEntropy": "training.loss",
    "Dataset": "training.data",
    "Devices": "training.distribution",
    "Distillation": "training.distillation",
    "DistillationLoss": "training.loss",
    "Recipe": "training.recipe",
    "SigmoidCrossEntropy": "training.loss",
    "SoftCrossEntropy": "training.loss",
    "TokenLabeling": "training.token_labeling",
    "TokenLabelingLoss": "training.loss",
    "TokenLabels": "training.recipe_parts",
    "Teaching": "training.recipe_parts",
    "annotate": "training.annotator",
    "callbacks": "training.loop",
    "compile_model": "training.loop",
    "draw_mixing": "training.token_picture",
    "draw_tokens": "training.token_picture",
    "evaluate": "training.evaluation",
    "examine": "training.evaluation",
    "fit": "training.loop",
    "from_arrays": "training.arrays",
    "load_data": "training.data",
    "open_labels": "training.labels",
    "resume": "training.checkpoints",
    "training_batches": "training.batches",
    "validation_batches": "training.batches",
    "with_label_maps": "training.labels",
}

__all__ = sorted(_HOMES)


def __getattr__(name):
    if name not in _HOMES:
        raise AttributeError(f"module 'training' has no attribute {name!r}")
    return getattr(importlib.import_module(_HOMES[name]), name)
