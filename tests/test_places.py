"""How alike positions are: against loops, for every kind of position."""

import numpy as np
import pytest
from conftest import to_numpy
from test_inspection import MODELS, pictures, spread, vit

import keras_vit
from keras_vit import CPVT
from keras_vit.places import position_kind


def cosine(a, b):
    return a @ b / np.sqrt((a @ a) * (b @ b))


@pytest.mark.parametrize("position", ["learned", "sincos_1d", "sincos_2d"])
def test_vectors_are_compared_by_their_angle_prefix_tokens_left_out(position):
    model = spread(vit(position=position, num_registers=1))
    found = keras_vit.position_similarity(model)
    assert found.shape == (4, 6, 4, 6) and found.dtype == np.float32
    layer = model.get_layer("position")
    if position == "learned":
        vectors = to_numpy(layer.table)[0, 1:].reshape(4, 6, 24)
    else:
        vectors = to_numpy(layer(np.zeros((1, 26, 24)), np.zeros((1, 4, 6, 24))))
        vectors = vectors[0, 2:].reshape(4, 6, 24)
    for (y, x), (v, u) in (((0, 0), (3, 5)), ((1, 2), (1, 2)), ((2, 4), (0, 1))):
        expected = cosine(vectors[y, x], vectors[v, u])
        assert found[y, x, v, u] == pytest.approx(expected, abs=1e-5)


def test_rotary_positions_are_the_mean_cosine_of_the_turns_between_them():
    found = keras_vit.position_similarity(vit(position="rotary"))
    frequency = 100.0 ** -(np.arange(2) / 2)  # heads of 8 channels
    for (y, x), (v, u) in (((0, 0), (3, 5)), ((1, 2), (1, 2)), ((2, 4), (0, 1))):
        turns = np.concatenate([frequency * (x - u), frequency * (y - v)])
        assert found[y, x, v, u] == pytest.approx(np.cos(turns).mean(), abs=1e-5)


def test_a_relative_bias_is_shown_as_it_is_mean_over_heads():
    model = spread(vit(position="relative"))
    found = keras_vit.position_similarity(model, block=2)
    bias = model.get_layer("block2").attention.bias
    whole = to_numpy(bias(np.zeros((1, 25, 24)), np.zeros((1, 4, 6, 24))))
    expected = whole[0, :, 1:, 1:].mean(0).reshape(4, 6, 4, 6)
    np.testing.assert_allclose(found, expected, atol=1e-5)
    assert np.ptp(found) > 0.1


def test_of_a_peg_it_is_the_attention_of_the_second_block():
    model = spread(MODELS["cpvt"]())
    images = pictures(model)
    found = keras_vit.position_similarity(model, images)
    weights = keras_vit.attention_maps(model, images)["block1"][:, :, 1:, 1:]
    expected = weights.mean((0, 1)).reshape(4, 6, 4, 6)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_another_grid_resamples_the_table():
    model = spread(vit(image_size=None, position_grid=(4, 6)))
    assert keras_vit.position_similarity(model).shape == (4, 6, 4, 6)
    assert keras_vit.position_similarity(model, grid=(3, 8)).shape == (3, 8, 3, 8)


@pytest.mark.first
def test_images_tell_the_grid_and_one_block_is_the_only_one():
    for position in ("sincos_2d", "rotary", "relative"):
        model = vit(image_size=None, position=position, depth=1)
        found = keras_vit.position_similarity(model, pictures(model)[:, :21])
        assert found.shape == (3, 5, 3, 5)


@pytest.mark.first
def test_every_kind_is_known():
    kinds = {"learned": "table", "sincos_2d": "sincos", "learned_peg": "table"}
    kinds |= dict.fromkeys(("relative", "rotary", "none"))
    for position, kind in kinds.items():
        assert position_kind(vit(position=position)) == (kind or position)
    assert position_kind(MODELS["cpvt"]()) == position_kind(MODELS["pcpvt"]()) == "peg"


@pytest.mark.first
def test_what_has_no_positions_is_refused_with_what_to_do():
    with pytest.raises(ValueError, match="must have a position, a table or a PEG"):
        keras_vit.position_similarity(vit(position="none"))
    with pytest.raises(ValueError, match=r"images must be given for .*: its PEG makes"):
        keras_vit.position_similarity(MODELS["cpvt"]())
    with pytest.raises(ValueError, match=r"grid=\(h, w\), or images, must be given"):
        keras_vit.position_similarity(vit(image_size=None, position="sincos_2d"))
    blind = CPVT("tiny", image_size=32, depth=1, num_classes=2, peg_positions=())
    assert position_kind(blind) == "none"
