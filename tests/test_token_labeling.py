import keras
import numpy as np
import pytest
from conftest import to_numpy
from test_lvvit import GOLDEN, published_model

from keras_vit import CPVT, PCPVT, LVViT, MixToken, ViT
from training import TokenLabeling, TokenLabelingLoss

BOX = GOLDEN["mix_box_row0_col0_row1_col1"].astype("int32")
SMALL = {"image_size": 32, "num_classes": 5, "embed_dim": 24, "num_heads": 2}
LVVIT = {**SMALL, "patch_size": 8, "stem_width": 4, "depth": 1}


def images(batch=6):
    x = np.random.default_rng(0).uniform(0, 255, (batch, 32, 32, 3))
    return x.astype("float32")


def labels(batch=6):
    rng = np.random.default_rng(1)
    return {
        "class": rng.dirichlet(np.ones(5), batch).astype("float32"),
        "tokens": rng.dirichlet(np.ones(5), (batch, 4, 4)).astype("float32"),
    }


def compiled(trainer, **kwargs):
    keras.utils.set_random_seed(0)
    trainer.compile(keras.optimizers.AdamW(1e-2, **kwargs))
    return trainer


def test_mixed_outputs_equal_the_published_code():
    trainer = TokenLabeling(published_model())
    trainer.mix = MixToken()
    grid = trainer.stem.predict_on_batch(GOLDEN["images_nhwc"])
    found = trainer.label_tokens(grid, BOX)
    for name, key in (("class", "mix_cls_logits"), ("tokens", "mix_token_logits")):
        x = to_numpy(found[name]).reshape(GOLDEN[key].shape)
        np.testing.assert_allclose(x, GOLDEN[key], atol=1e-4)


@pytest.mark.parametrize("ground_truth", [False, True])
@pytest.mark.parametrize("dense_weight", [0.5, 1.0])
def test_losses_equal_the_published_code(dense_weight, ground_truth):
    truth, of_class, *tokens = np.moveaxis(GOLDEN["targets_b_c_2plusN"], -1, 0)
    tokens = np.stack(tokens, axis=1).reshape(4, 3, 3, 7)
    y_true = {"truth": truth, "class": of_class, "tokens": tokens}
    rows, columns = BOX[2:] - BOX[:2]
    y_pred = {
        "class": GOLDEN["mix_cls_logits"],
        "tokens": GOLDEN["mix_token_logits"].reshape(4, 3, 3, 7),
        "kept": np.full(4, 1 - rows * columns / 9, "float32"),
    }
    loss = TokenLabelingLoss(dense_weight, ground_truth=ground_truth)
    expected = GOLDEN[f"loss_dense{dense_weight}_gt{int(ground_truth)}"]
    assert float(loss(y_true, y_pred)) == pytest.approx(float(expected), abs=1e-4)
    if dense_weight == 0.5 and not ground_truth:  # the image's label for every token
        expected = float(GOLDEN["loss_image_label_only"])
        assert float(loss(truth, y_pred)) == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("batch", [1, 2, 5])
def test_mix_then_unmix_is_the_identity_for_a_backbone_vit_with_registers(batch):
    """Without blocks no token sees another, and positions belong to places."""
    network = ViT("tiny", **SMALL, patch_size=8, depth=0)
    trainer = TokenLabeling(network, mix=MixToken())
    grid = trainer.stem.predict_on_batch(images(batch))
    box = np.array([1, 0, 3, 3], "int32")
    plain, mixed = trainer.label_tokens(grid), trainer.label_tokens(grid, box)
    np.testing.assert_allclose(
        to_numpy(mixed["tokens"]), to_numpy(plain["tokens"]), atol=1e-6
    )
    np.testing.assert_allclose(to_numpy(mixed["kept"]), 1 - 6 / 16)
    inside = to_numpy(trainer.mix(grid, box))
    assert (batch == 1) == bool(np.allclose(inside, grid))


def test_with_peg_the_identity_holds_but_for_a_ring_of_one_token():
    network = CPVT("tiny", **SMALL, patch_size=4, depth=0, peg_positions=(-1,))
    trainer = TokenLabeling(network, mix=MixToken())
    grid = trainer.stem.predict_on_batch(images(2))  # 8 x 8 tokens
    mixed = trainer.label_tokens(grid, np.array([2, 2, 6, 8], "int32"))
    plain = trainer.label_tokens(grid)
    error = np.abs(to_numpy(mixed["tokens"]) - to_numpy(plain["tokens"])).max((0, -1))
    seam = np.zeros((8, 8), bool)
    seam[1:7, 1:] = True
    seam[3:5, 3:] = False  # inside, no neighbour is of the other image
    np.testing.assert_array_equal(error > 1e-5, seam)


def test_an_empty_box_gives_the_loss_without_mixing():
    trainer = TokenLabeling(LVViT("tiny", **LVVIT), mix=MixToken())
    grid = trainer.stem.predict_on_batch(images())
    empty = np.array([2, 2, 2, 2], "int32")
    found = trainer.labeling(labels(), trainer.label_tokens(grid, empty))
    expected = trainer.labeling(labels(), trainer.label_tokens(grid))
    assert float(found) == pytest.approx(float(expected), rel=1e-6)


def vit_with_registers():
    """It normalises after its pooling: the fresh token head has a norm of its own."""
    settings = {"pool": "mean", "norm_after_pool": True, "num_registers": 1}
    return ViT("tiny", **SMALL, depth=1, patch_size=8, **settings)


@pytest.mark.parametrize(
    "network",
    [
        lambda: LVViT("tiny", **LVVIT, drop_path_rate=0.1),
        pytest.param(vit_with_registers, marks=(pytest.mark.slow, pytest.mark.first)),
        pytest.param(
            lambda: CPVT("tiny", **SMALL, depth=1, patch_size=8),
            marks=(pytest.mark.slow, pytest.mark.first),
        ),
    ],
    ids=["lvvit", "vit", "cpvt"],
)
def test_fit_trains_both_heads_of_any_plain_vision_transformer(network):
    network = network()
    jit = keras.backend.backend() != "torch" or "auto"  # as JAX, XLA on TensorFlow too
    trainer = TokenLabeling(network, mix=MixToken("unbiased"))
    keras.utils.set_random_seed(0)
    trainer.compile(keras.optimizers.AdamW(1e-2), jit_compile=jit)
    before = {v.path: to_numpy(v) for v in trainer.trainable_variables}
    x, y = images(5), labels(5)  # an odd batch
    history = trainer.fit(x, y, batch_size=5, epochs=12, verbose=0).history
    assert history["loss"][-1] < history["loss"][0]
    assert history["token_loss"][-1] < history["token_loss"][0]
    names = {"accuracy", "class_accuracy", "token_accuracy", "class_loss", "token_loss"}
    assert names | {"loss"} == set(history)
    assert len(set(history["class_loss"])) > 6  # another box each step
    same = [
        v.path
        for v in trainer.trainable_variables
        if np.array_equal(to_numpy(v), before[v.path])
    ]
    assert same == []


@pytest.mark.heavy
def test_the_network_that_comes_out_is_plain_and_is_what_is_evaluated(tmp_path):
    network = LVViT("tiny", **LVVIT)
    trainer = compiled(TokenLabeling(network, mix=MixToken()))
    x, y = images(), np.array([0, 1, 2, 3, 4, 0])
    trainer.fit(x, y, batch_size=3, verbose=0)
    found = trainer.evaluate(x, y, verbose=0, return_dict=True)
    network.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    logits = loaded.predict_on_batch(x)
    np.testing.assert_allclose(logits, trainer.predict_on_batch(x)["logits"], atol=1e-6)
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    assert found["loss"] == pytest.approx(float(loss(y, logits)), rel=1e-5)
    assert found["accuracy"] == pytest.approx((logits.argmax(-1) == y).mean())


@pytest.mark.heavy
def test_the_same_state_repeats_the_same_training():
    """The state of the boxes is among the variables: a resumed run draws the same."""
    trainer = compiled(TokenLabeling(LVViT("tiny", **LVVIT), mix=MixToken()))
    trainer.optimizer.build(trainer.trainable_variables)
    start = state(trainer)
    random = [key for key, value in start.items() if "seed_generator" in key]
    assert len(random) == 1

    def run(**other):
        for key, variable in variables(trainer).items():
            variable.assign({**start, **other}[key])
        trainer.fit(images(), labels(), batch_size=3, verbose=0, shuffle=False)
        return state(trainer)

    first, second = run(), run()
    other = run(**{random[0]: start[random[0]] + 1})
    for key in first:
        np.testing.assert_array_equal(first[key], second[key])
    kernel = next(key for key in first if "token_head/kernel" in key)
    assert not np.array_equal(first[kernel], other[kernel])


def variables(trainer):
    both = [*trainer.variables, *trainer.optimizer.variables]
    return {f"{i} {v.path}": v for i, v in enumerate(both)}


def state(trainer):
    return {key: to_numpy(v.value) for key, v in variables(trainer).items()}


def test_pixels_are_not_rounded_to_half_precision():
    keras.config.set_dtype_policy("mixed_bfloat16")
    network = ViT("tiny", **SMALL, depth=1)
    found = TokenLabeling(network)(images())["logits"]
    np.testing.assert_array_equal(to_numpy(found), to_numpy(network(images())))


@pytest.mark.slow
def test_half_precision_averaged_weights_and_accumulated_gradients_together():
    keras.config.set_dtype_policy("mixed_float16")
    network = LVViT("tiny", **LVVIT)
    trainer = TokenLabeling(network, mix=MixToken())
    compiled(trainer, use_ema=True, ema_momentum=0.5, gradient_accumulation_steps=2)
    assert isinstance(trainer.optimizer, keras.optimizers.LossScaleOptimizer)
    start = to_numpy(network.get_layer("head").kernel)
    history = trainer.fit(images(), labels(), batch_size=3, verbose=0).history
    assert all(np.isfinite(values).all() for values in history.values())
    end = to_numpy(network.get_layer("head").kernel)
    averages = trainer.optimizer.inner_optimizer._model_variables_moving_average
    index = [v.path for v in trainer.trainable_variables].index("head/kernel")
    np.testing.assert_allclose(end, to_numpy(averages[index]), atol=1e-7)
    step = np.abs(end - start)  # two batches are one step of AdamW: 0.01, and averaged
    assert 0 < step.max() < 0.011
    outputs = trainer.label_tokens(trainer.stem(images()))
    for name in ("class", "tokens", "logits"):
        assert keras.backend.standardize_dtype(outputs[name].dtype) == "float32"


@pytest.mark.parametrize(
    "network",
    [
        lambda: ViT("tiny", **{**SMALL, "num_classes": 0}, depth=1),
        lambda: PCPVT("small", image_size=32, num_classes=3, depths=(1, 1, 1, 1)),
    ],
    ids=["no_classes", "pyramid"],
)
@pytest.mark.first
def test_other_networks_are_refused(network):
    with pytest.raises(ValueError, match=r"plain vision transformer .* got '.*without"):
        TokenLabeling(network())


def test_what_the_trainer_does_itself_cannot_be_replaced():
    network = ViT("tiny", **SMALL, depth=1)
    with pytest.raises(ValueError, match="loss must be a TokenLabelingLoss or None"):
        TokenLabeling(network, MixToken())
    with pytest.raises(
        ValueError, match=r"mix must be a MixToken or None, got 'paper'"
    ):
        TokenLabeling(network, mix="paper")
    with pytest.raises(ValueError, match=r"its own metrics, .*'accuracy'"):
        TokenLabeling(network).compile("adam", metrics=["accuracy"])
