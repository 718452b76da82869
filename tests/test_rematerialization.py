"""Blocks that are computed again: the same training, in less memory."""

import contextlib

import keras
import memory
import numpy as np
import pytest
from conftest import ask, to_numpy
from machine import options_of
from test_loop import RECIPE, two_classes

import training
from keras_vit import CPVT, MLP, PCPVT, LVViT, ViT, remat_blocks

RATES = {"dropout": 0.2, "attention_dropout": 0.2, "drop_path_rate": 0.3}
MODELS = {
    "vit": lambda: ViT("tiny", depth=2, image_size=32, num_classes=0, **RATES),
    "cpvt": lambda: CPVT("tiny", depth=2, image_size=32, num_classes=0, **RATES),
    "lvvit": lambda: LVViT("tiny", depth=2, image_size=32, num_classes=0, **RATES),
    "pcpvt": lambda: PCPVT(
        depths=(1, 1, 1, 1), image_size=32, embed_dims=(8, 8, 10, 16), num_classes=0
    ),
}
JIT = keras.backend.backend() == "jax"  # the others need no compiler here
X = np.random.default_rng(0).uniform(0, 255, (4, 32, 32, 3)).astype("float32")


def build(name, scope, policy="float32"):
    keras.config.set_dtype_policy(policy)
    keras.utils.set_random_seed(0)
    with scope:
        model = MODELS[name]()
    return model


def trained(name, scope, policy="float32", steps=2):
    """Every variable after some steps: weights, and what the dropouts have drawn."""
    model = build(name, scope, policy)
    model.compile(keras.optimizers.SGD(1.0), "mse", jit_compile=JIT)
    before = [to_numpy(v) for v in model.trainable_variables]
    target = np.random.default_rng(1).normal(size=(4, model.output_shape[-1]))
    for _ in range(steps):
        model.train_on_batch(X, target)
    pairs = zip(model.trainable_variables, before, strict=True)
    change = max(np.abs(to_numpy(v) - x).max() for v, x in pairs)
    return [to_numpy(v) for v in model.variables], change


HEAVY = [pytest.param(x, marks=pytest.mark.heavy) for x in ("cpvt", "lvvit")]


@pytest.mark.parametrize("name", ["vit", "pcpvt", *HEAVY])
def test_a_training_is_the_same_dropout_and_drop_path_included(name):
    expected, change = trained(name, contextlib.nullcontext())
    found, _ = trained(name, remat_blocks())
    assert change > 1e-2  # there is a gradient
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=1e-5 * change)


@pytest.mark.heavy
def test_a_training_in_mixed_precision_is_the_same_within_its_rounding():
    expected, change = trained("vit", contextlib.nullcontext(), "mixed_bfloat16", 1)
    found, _ = trained("vit", remat_blocks(), "mixed_bfloat16", 1)
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=0, atol=0.05 * change)


def test_every_block_is_computed_twice_and_nothing_in_it_again(monkeypatch):
    model = build("vit", remat_blocks())
    count = 0
    call = MLP.call

    def counted(self, *args, **kwargs):
        nonlocal count
        count += 1
        return call(self, *args, **kwargs)

    monkeypatch.setattr(MLP, "call", counted)
    if keras.backend.backend() != "jax":  # JAX computes again what it traces once
        memory.kept_bytes(model, keras.ops.convert_to_tensor(X))
        assert count == 2 * 2
        return
    import jax

    variables = model.trainable_variables, model.non_trainable_variables
    values = [[v.value for v in group] for group in variables]
    traced = jax.make_jaxpr(lambda *v: model.stateless_call(*v, X, training=True))
    text = str(traced(*values))
    assert text.count("policy=None") == 2  # of `jax.checkpoint`, within one another too


@pytest.mark.parametrize("name", MODELS)
def test_names_configuration_answers_and_the_file_are_the_same(name, tmp_path):
    plain, model = build(name, contextlib.nullcontext()), build(name, remat_blocks())
    assert model.get_config() == plain.get_config()
    assert [v.path for v in model.weights] == [v.path for v in plain.weights]
    np.testing.assert_array_equal(ask(model, X), ask(plain, X))
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    np.testing.assert_array_equal(ask(loaded, X), ask(plain, X))


def test_a_call_outside_of_training_computes_nothing_again():
    model = build("vit", remat_blocks())
    block = model.get_layer("block0")
    assert block.rematerialized_call(block.call, X, training=False) == block.call
    assert block.rematerialized_call(block.call, X, training=True) != block.call


def test_the_memory_of_all_blocks_but_one_is_saved():
    def kept(scope):
        with scope:
            model = ViT("tiny", depth=6, image_size=64, patch_size=8, num_classes=3)
        images = np.zeros((8, 64, 64, 3), "float32")
        return memory.kept_bytes(model, keras.ops.convert_to_tensor(images))

    if keras.backend.backend() == "tensorflow":
        pytest.skip("TensorFlow tells no memory: see the slow test of the process.")
    assert kept(remat_blocks()) < 0.5 * kept(contextlib.nullcontext())


@pytest.mark.slow
@pytest.mark.first
def test_a_process_that_trains_takes_less_memory():
    backend = keras.backend.backend()
    options = options_of(
        memory.parser(),
        backends=[backend],
        variant="tiny",
        image_size=224,
        batch_size=16,
    )
    plain, again = memory.rows(options)
    assert (plain["remat"], again["remat"]) == ("no", "yes")
    assert plain["error"] == again["error"] == ""
    if backend != "tensorflow":
        assert again["kept MiB"] < 0.3 * plain["kept MiB"]
    if backend != "jax":  # on a CPU XLA undoes it
        assert again["peak MiB"] < 0.7 * plain["peak MiB"]


@pytest.mark.heavy
@pytest.mark.first
def test_fit_computes_again_what_the_recipe_says(tmp_path, tmp_path_factory):
    data = two_classes(tmp_path_factory)
    recipe = RECIPE.replace(epochs=1, warmup_epochs=0, drop_path_rate=0.2)
    weights, again = [], []
    for remat in (False, True):
        chosen = recipe.replace(remat=remat)

        def build(chosen=chosen):
            model = chosen.build_model(2)
            block = model.get_layer("block0")
            call = block.rematerialized_call(block.call, X, training=True)
            again.append(call != block.call)
            return model

        model = training.fit(build, data, chosen, tmp_path / str(remat))
        weights.append([to_numpy(v) for v in model.weights])
    assert again == [False, True]
    for a, b in zip(*weights, strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)
    # a run that is out of memory goes on with it
    training.fit(build, data, recipe.replace(remat=True), tmp_path / "False")
