import keras
import numpy as np
import pytest
from conftest import to_numpy

from keras_vit import ViT
from training import RECIPES, compile_model
from training.optimize import schedule, undecayed


def test_only_kernels_are_decayed():
    model = ViT(
        "deit3_small",
        image_size=32,
        depth=1,
        num_classes=3,
        qk_norm=True,
        num_registers=2,
    )
    left_alone = {v.path for v in undecayed(model)}
    decayed = {v.path for v in model.trainable_variables} - left_alone
    assert decayed == {
        "patches/project/kernel",
        "block0/attention/qkv/kernel",
        "block0/attention/project/kernel",
        "block0/mlp/expand/kernel",
        "block0/mlp/reduce/kernel",
        "head/kernel",
    }
    assert {"tokens/class_token", "tokens/registers", "position/table"} <= left_alone
    assert {"block0/scale1/gamma", "block0/attention/query_norm/gamma"} <= left_alone


def test_a_step_without_gradient_shrinks_kernels_and_nothing_else():
    recipe = RECIPES["digits"].replace(weight_decay=0.1, warmup_epochs=0)
    model = ViT("deit_tiny", image_size=32, depth=1, num_classes=3)
    compile_model(model, recipe, steps_per_epoch=10)
    before = [to_numpy(v.value) for v in model.trainable_variables]
    zeros = [keras.ops.zeros_like(v.value) for v in model.trainable_variables]
    model.optimizer.apply(zeros, model.trainable_variables)
    kept = {id(v) for v in undecayed(model)}
    for variable, old in zip(model.trainable_variables, before, strict=True):
        factor = 1.0 if id(variable) in kept else 1 - 0.1 * recipe.learning_rate
        np.testing.assert_allclose(to_numpy(variable.value), old * factor, rtol=1e-5)
    assert 0 < len(kept) < len(before)


@pytest.mark.parametrize("warmup_epochs", [0, 0.5, 3])
def test_learning_rate_is_a_linear_warm_up_and_a_cosine(warmup_epochs):
    recipe = RECIPES["digits"].replace(
        epochs=10,
        learning_rate=0.3,
        final_learning_rate=0.03,
        warmup_epochs=warmup_epochs,
    )
    rate = schedule(recipe, steps_per_epoch=20)
    warmup = round(20 * warmup_epochs)
    for step in range(200):
        if step < warmup:
            expected = 0.3 * step / warmup
        else:
            done = (step - warmup) / (200 - warmup)
            expected = 0.03 + (0.3 - 0.03) * (1 + np.cos(np.pi * done)) / 2
        np.testing.assert_allclose(float(rate(step)), expected, rtol=1e-4)
    np.testing.assert_allclose(float(rate(200)), 0.03, rtol=1e-4)
