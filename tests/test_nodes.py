"""Features of models as they are, on every backend."""

import keras
import numpy as np
import pytest
from test_inspection import MODELS, ask, pictures, some, spread, vit

import keras_vit


@pytest.mark.parametrize("name", some("registers")[:-1])
def test_features_are_the_tokens_of_the_blocks_as_they_lie_in_the_image(name):
    model = spread(MODELS[name]())
    images = pictures(model)
    names = ["block0", "block2"]
    nodes = [model.get_layer(x).output for x in names]
    expected = ask(keras.Model(model.input, nodes), images)
    maps = ask(keras_vit.features(model, [0, -1]), images)
    tokens = ask(keras_vit.features(model, names, "tokens"), images)
    assert list(maps) == list(tokens) == names
    for key, whole in zip(names, expected, strict=True):
        patches = whole[:, whole.shape[1] - 24 :]
        np.testing.assert_array_equal(tokens[key], patches)
        np.testing.assert_array_equal(maps[key], patches.reshape(2, 4, 6, 24))
    if expected[0].shape[1] > 24:
        both = ask(keras_vit.features(model, -1, prefix=True), images)
        prefix = expected[1][:, : expected[1].shape[1] - 24]
        np.testing.assert_array_equal(both["block2_prefix"], prefix)


def test_normalised_features_pass_the_last_layernorm_and_leave_it_alone():
    model = spread(MODELS["registers"]())
    images = pictures(model)
    cut = keras.Model(model.input, model.get_layer("norm").output)
    expected = ask(cut, images)
    built = keras_vit.features(model, [1, 2], "tokens", prefix=True, normalize=True)
    found = ask(built, images)
    np.testing.assert_allclose(found["block2"], expected[:, 3:], atol=1e-5)
    np.testing.assert_allclose(found["block2_prefix"], expected[:, :3], atol=1e-5)
    assert len(model.get_layer("norm")._inbound_nodes) == 1  # not entangled


def test_a_pyramid_has_its_stages():
    model = spread(MODELS["pcpvt"]())
    images = pictures(model)
    nodes = [model.get_layer(f"stage{i}").output for i in range(4)]
    expected = ask(keras.Model(model.input, nodes), images)
    found = ask(keras_vit.features(model, [0, 1, 2, 3]), images)
    for i, grid in enumerate(expected):
        np.testing.assert_array_equal(found[f"stage{i}"], grid)
    tokens = ask(keras_vit.features(model, [0, "stage1_block1"], "tokens"), images)
    np.testing.assert_array_equal(
        tokens["stage0"], expected[0].reshape(2, -1, expected[0].shape[-1])
    )
    assert tokens["stage1_block1"].shape == (2, 4 * 8, 16)
    inner = ask(keras_vit.features(model, "stage1_block1"), images)["stage1_block1"]
    np.testing.assert_array_equal(inner.reshape(2, 32, 16), tokens["stage1_block1"])
    with pytest.raises(ValueError, match=r"normalize must be False for 'stage0': it"):
        keras_vit.features(model, 0, normalize=True)


def test_features_of_any_size_are_saved_and_share_their_weights(tmp_path):
    model = spread(vit(image_size=None, position="sincos_2d"))
    cut = keras_vit.features(model, [0, 2], normalize=True)
    cut.save(tmp_path / "features.keras")
    loaded = keras.saving.load_model(tmp_path / "features.keras")
    images = pictures(model)[:, :21]  # 3 x 5 patches, the last row padded
    expected, found = ask(cut, images), ask(loaded, images)
    assert expected["block0"].shape == (2, 3, 5, 24)
    for name, grid in expected.items():
        np.testing.assert_array_equal(found[name], grid)
    model.get_layer("block0").mlp.reduce.bias.assign(np.ones(24))
    assert np.abs(ask(cut, images)["block0"] - expected["block0"]).max() > 0.1


@pytest.mark.first
def test_layers_are_given_in_any_form():
    model = MODELS["registers"]()
    for layers in (range(2), np.arange(2), (0, "block1"), [np.int64(0), -2]):
        found = keras_vit.features(model, layers).output
        assert list(found) == ["block0", "block1"]
    with pytest.raises(ValueError, match="layers must be at least one"):
        keras_vit.features(model, [])
    pyramid = keras_vit.features(MODELS["pcpvt"](), "norm").output["norm"]
    assert pyramid.shape == (None, 1, 2, 24)
