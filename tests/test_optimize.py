import json

import keras
import numpy as np
import pytest
from conftest import first, to_numpy

from keras_vit import CPVT, PCPVT, LVViT, ViT
from training import RECIPES, compile_model
from training.optimize import frozen, groups, optimizer, schedule
from training.optimizer import SGD, AdamW, Lamb, weights_average

RECIPE = RECIPES["digits"].replace(warmup_epochs=0, clip_norm=None)


def tiny(**arguments):
    return ViT(
        "deit_tiny",
        **{"image_size": 32, "depth": 2, "num_classes": 3, **arguments},
    )


def paths(found, **wanted):
    return {
        v.path
        for group in found
        for v in group.variables
        if all(getattr(group, key) == value for key, value in wanted.items())
    }


# --- groups


@pytest.mark.first
def test_only_kernels_are_decayed():
    model = ViT(
        "deit3_small",
        image_size=32,
        depth=1,
        num_classes=3,
        qk_norm=True,
        num_registers=2,
    )
    found = groups(model, RECIPE)
    assert paths(found, weight_decay=0.05) == {
        "patches/project/kernel",
        "block0/attention/qkv/kernel",
        "block0/attention/project/kernel",
        "block0/mlp/expand/kernel",
        "block0/mlp/reduce/kernel",
        "head/kernel",
    }
    left_alone = paths(found, weight_decay=0.0)
    assert {"tokens/class_token", "tokens/registers", "position/table"} <= left_alone
    assert {"block0/scale1/gamma", "block0/attention/query_norm/gamma"} <= left_alone
    everything = [v.path for group in found for v in group.variables]
    assert sorted(everything) == sorted(v.path for v in model.trainable_variables)


@pytest.mark.first
def test_the_learning_rate_decays_from_the_head_to_the_embedding():
    recipe = RECIPE.replace(layer_decay=0.5)
    found = groups(tiny(), recipe)
    factors = {(g.name, g.learning_rate_factor) for g in found}
    assert factors == {
        ("embedding", 0.125),
        ("block 0", 0.25),
        ("block 1", 0.5),
        ("norm", 1.0),
        ("head", 1.0),
    }
    embedding = {x.partition("/")[0] for x in paths(found, name="embedding")}
    assert embedding == {"patches", "tokens", "position"}


@pytest.mark.first
def test_a_peg_goes_with_its_block_and_a_stage_with_the_block_before_it():
    found = groups(CPVT("tiny", image_size=32, depth=2, peg_positions=(-1, 1)), RECIPE)
    assert {"peg1/kernel", "peg1/bias"} <= paths(found, name="block 1")
    assert {"peg_before/kernel", "peg_before/bias"} <= paths(found, name="embedding")
    small = {"embed_dims": (8, 8, 8, 8), "num_heads": (1, 1, 1, 1)}
    model = PCPVT("small", image_size=32, depths=(1, 2, 1, 1), num_classes=3, **small)
    found = groups(model, RECIPE)
    assert [g.name for g in found if g.weight_decay][-2:] == ["block 4", "head"]
    assert "stage1_patches/project/kernel" in paths(found, name="block 0")
    assert "stage1_block1/mlp/expand/kernel" in paths(found, name="block 2")


# --- steps


def gradients(model, seed):
    generator = np.random.default_rng(seed)
    return [
        keras.ops.convert_to_tensor(generator.normal(size=v.shape).astype("float32"))
        for v in model.trainable_variables
    ]


def two_variables(seed=0):
    generator = np.random.default_rng(seed)
    layer = keras.layers.Dense(3)
    model = keras.Sequential([keras.Input((4,)), layer])
    for v in model.trainable_variables:
        v.assign(generator.normal(size=v.shape))
    return model


def reference(kind, weights, steps, rates, factors, decays, ema):
    """The equations of the docstrings, in NumPy."""
    weights = [w.astype("float64") for w in weights]
    first = [np.zeros_like(w) for w in weights]
    second = [np.zeros_like(w) for w in weights]
    averages = [w.copy() for w in weights]
    for t, step in enumerate(steps):
        for i, g in enumerate(step):
            rate = rates(t) * factors[i]
            if kind == "sgd":
                weights[i] -= rate * decays[i] * weights[i]
                first[i] = 0.9 * first[i] - rate * g
                weights[i] += first[i]
            else:
                first[i] = 0.9 * first[i] + 0.1 * g
                second[i] = 0.999 * second[i] + 0.001 * g * g
                m = first[i] / (1 - 0.9 ** (t + 1))
                v = second[i] / (1 - 0.999 ** (t + 1))
                u = m / (np.sqrt(v) + 1e-8)
                if kind == "adamw":
                    weights[i] -= rate * decays[i] * weights[i]
                elif decays[i]:
                    u = u + decays[i] * weights[i]
                    u *= np.linalg.norm(weights[i]) / np.linalg.norm(u)
                weights[i] -= rate * u
            averages[i] = ema * averages[i] + (1 - ema) * weights[i]
    return weights, averages


KINDS = {"adamw": AdamW, "lamb": Lamb, "sgd": SGD}


def rate(step):
    return 0.1 / (1.0 + keras.ops.cast(step, "float32"))


@pytest.mark.parametrize("parts", [1, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_steps_are_the_equations_also_of_a_batch_in_parts(kind, parts):
    model = two_variables()
    arguments = {"momentum": 0.9} if kind == "sgd" else {"epsilon": 1e-8}
    ours = KINDS[kind](
        rate,
        factors=[0.5, 1.0],
        decays=[0.2, 0.0],
        ema=0.75,
        accumulation_steps=parts,
        **arguments,
    )
    before = [to_numpy(v.value) for v in model.trainable_variables]
    steps = []
    for update in range(3):
        of_parts = [gradients(model, 10 * update + part) for part in range(parts)]
        for part in of_parts:
            ours.apply(part, model.trainable_variables)
        means = [
            np.mean([to_numpy(g) for g in gs], 0) for gs in zip(*of_parts, strict=True)
        ]
        steps.append(means)
    assert int(ours.iterations) == 3
    weights, averages = reference(
        kind, before, steps, lambda t: 0.1 / (1 + t), [0.5, 1.0], [0.2, 0.0], 0.75
    )
    for variable, expected in zip(model.trainable_variables, weights, strict=True):
        np.testing.assert_allclose(to_numpy(variable.value), expected, atol=2e-6)
    for average, expected in zip(weights_average(ours), averages, strict=True):
        np.testing.assert_allclose(to_numpy(average.value), expected, atol=2e-6)


def test_the_whole_batch_and_its_parts_train_the_same_model():
    x = np.random.default_rng(0).normal(size=(24, 4)).astype("float32")
    y = np.random.default_rng(1).normal(size=(24, 3)).astype("float32")
    found = []
    for parts in (1, 4):
        model = two_variables()
        ours = AdamW(
            rate, decays=[0.1, 0.0], accumulation_steps=parts, global_clipnorm=0.5
        )
        model.compile(ours, "mse")
        model.fit(x, y, batch_size=12 // parts, epochs=3, shuffle=False, verbose=0)
        found.append([to_numpy(v.value) for v in model.trainable_variables])
    for whole, in_parts in zip(*found, strict=True):
        np.testing.assert_allclose(in_parts, whole, atol=2e-6)


def test_the_average_starts_with_the_first_weights_in_a_plain_fit_too():
    model = two_variables()
    model.compile(SGD(0.1, ema=0.75), "mse")
    start = [to_numpy(v.value) for v in model.trainable_variables]
    model.fit(np.ones((4, 4)), np.zeros((4, 3)), verbose=0)
    averages = weights_average(model.optimizer)
    for before, average, end in zip(
        start, averages, model.trainable_variables, strict=True
    ):
        expected = 0.75 * before + 0.25 * to_numpy(end.value)
        assert np.abs(before - to_numpy(end.value)).max() > 1e-3
        np.testing.assert_allclose(to_numpy(average.value), expected, atol=1e-6)


def test_half_precision_accumulation_average_and_clipping_work_together():
    recipe = RECIPE.replace(
        ema=0.5, accumulation_steps=2, batch_size=8, clip_norm=1.0, layer_decay=0.7
    )
    keras.config.set_dtype_policy("mixed_float16")
    model = tiny(depth=1, embed_dim=24)
    compile_model(model, recipe, 2)
    assert type(model.optimizer).__name__ == "LossScaleOptimizer"
    start = [to_numpy(v.value) for v in model.trainable_variables]
    x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3))
    model.fit(x, np.arange(8) % 3, batch_size=4, epochs=4, verbose=0)
    assert int(model.optimizer.inner_optimizer.iterations) == 4
    last = [to_numpy(v.value) for v in model.trainable_variables]
    averages = [to_numpy(v.value) for v in weights_average(model.optimizer)]
    moved = 0
    for a, b, c in zip(start, averages, last, strict=True):
        assert np.isfinite(b).all()
        moved += np.abs(b - a).max() > 0 and np.abs(b - c).max() > 0
    assert moved > len(start) / 2


def test_an_optimizer_is_saved_with_its_model(tmp_path):
    model = two_variables()
    model.compile(optimizer(model, RECIPE.replace(ema=0.9), 5), "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert json.dumps(loaded.optimizer.get_config()) == json.dumps(
        model.optimizer.get_config()
    )
    assert int(loaded.optimizer.iterations) == 1
    with pytest.raises(ValueError, match=r"factors must be one for .* 2 .* got 1"):
        AdamW(0.1, factors=[1.0]).build(model.trainable_variables)


# --- schedule


@pytest.mark.parametrize(
    "changes",
    [
        first({}),
        first({"warmup_epochs": 0.5}),
        {"warmup_epochs": 3, "warmup_learning_rate": 0.01, "cooldown_epochs": 2},
        first({"warmup_steps": 7}),
        first({"final_learning_rate": 0.3}),
    ],
)
def test_learning_rate_is_a_warm_up_a_cosine_and_a_cooldown(changes):
    values = {"epochs": 10, "learning_rate": 0.3, "final_learning_rate": 0.03}
    recipe = RECIPE.replace(**{**values, **changes})
    found = schedule(recipe, updates_per_epoch=20)
    warmup = recipe.warmup_steps or round(20 * recipe.warmup_epochs)
    cosine = 20 * (10 - recipe.cooldown_epochs) - warmup
    start, low, high = recipe.warmup_learning_rate, recipe.final_learning_rate, 0.3
    for step in range(210):
        done = min(1, (step - warmup) / cosine)
        expected = low + (high - low) * (1 + np.cos(np.pi * done)) / 2
        if step < warmup:
            expected = start + (high - start) * step / warmup
        np.testing.assert_allclose(float(found(step)), expected, rtol=1e-4, atol=1e-7)


def test_a_warm_up_longer_than_the_run_is_refused():
    recipe = RECIPE.replace(epochs=2, warmup_steps=40)
    with pytest.raises(ValueError, match=r"below the 40 updates .* got 40"):
        schedule(recipe, 20)


# --- what is frozen


@pytest.mark.parametrize(
    ("changes", "trained"),
    [
        first({"frozen": "backbone"}, {"head"}),
        first({"frozen": 0}, {"block0", "block1", "norm", "head"}),
        ({"frozen": 1}, {"block1", "norm", "head"}),
        first({"frozen": 2}, {"norm", "head"}),
        ({"lora_rank": 2}, {"block0", "block1", "head"}),
    ],
)
def test_what_is_frozen_stays_and_all_else_moves(changes, trained):
    recipe = RECIPE.replace(**changes)
    model = tiny(embed_dim=24)
    before = {v.path: to_numpy(v.value) for v in model.variables}
    with frozen(model, recipe):
        compile_model(model, recipe, 2)
        moving = {v.path.partition("/")[0] for v in model.trainable_variables}
        x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3))
        model.fit(x, np.arange(8) % 3, batch_size=4, epochs=2, verbose=0)
    assert moving == trained
    after = {v.path: to_numpy(v.value) for v in model.variables}
    assert after.keys() == before.keys()
    assert all(v.trainable for v in model.weights)
    for path, value in after.items():
        moves = path.partition("/")[0] in trained
        if "lora_rank" in changes:
            moves = path.startswith("head") or (
                path.endswith("kernel") and path.startswith("block")
            )
        assert (np.abs(value - before[path]).max() > 0) == moves, path


@pytest.mark.heavy
def test_lora_is_a_part_of_the_kernels_of_the_file_and_afterwards(tmp_path):
    model = tiny(embed_dim=24)
    x = np.random.default_rng(0).uniform(0, 255, (8, 32, 32, 3)).astype("float32")
    recipe = RECIPE.replace(lora_rank=3)
    with frozen(model, recipe):
        compile_model(model, recipe, 2)
        model.fit(x, np.arange(8) % 3, batch_size=4, epochs=2, verbose=0)
        adapted = model.predict(x, verbose=0)
        names = [v.name for v in model.trainable_variables]
        assert sorted(set(names)) == [
            "bias",
            "kernel",
            "lora_kernel_a",
            "lora_kernel_b",
        ]
        plain = keras.Model(model.input, model.output)
        plain.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert [v.path for v in loaded.variables] == [v.path for v in model.variables]
    np.testing.assert_allclose(loaded.predict(x, verbose=0), adapted, atol=1e-5)
    np.testing.assert_allclose(model.predict(x, verbose=0), adapted, atol=1e-5)


@pytest.mark.first
def test_statistics_of_a_frozen_stem_stay():
    model = LVViT(
        "tiny",
        image_size=16,
        patch_size=4,
        embed_dim=16,
        depth=1,
        num_classes=3,
        num_heads=2,
        stem_width=8,
    )
    x = np.random.default_rng(0).uniform(0, 255, (8, 16, 16, 3))
    for value, moves in ((0, False), (None, True)):
        recipe = RECIPE.replace(frozen=value)
        before = {v.path: to_numpy(v.value) for v in model.non_trainable_variables}
        with frozen(model, recipe):
            compile_model(model, recipe, 2)
            model.fit(x, np.arange(8) % 3, batch_size=4, epochs=1, verbose=0)
        assert any("moving_mean" in path for path in before)
        for v in model.non_trainable_variables:
            if "moving" in v.path:
                moved = np.abs(to_numpy(v.value) - before[v.path]).max() > 0
                assert moved == moves


@pytest.mark.first
def test_more_frozen_blocks_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"frozen must be at most the 2 blocks .* 3"):
        groups(tiny(), RECIPE.replace(frozen=3))
