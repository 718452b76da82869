from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit import LearnedPosition, ViT
from keras_vit.resampling import resample, resize_matrix

GOLDEN = Path(__file__).parent / "golden" / "position_resampling.npz"


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("prefix, positions", [(0, 0), (1, 1), (3, 1), (2, 0)])
def test_layer(check_layer, prefix, positions):
    layer = LearnedPosition(prefix, positions)
    tokens, grid = draw(2, prefix + 6, 5), draw(2, 2, 3, 5)
    y = check_layer(layer, tokens, grid)
    table = layer.get_weights()[0]
    assert table.shape == (1, positions + 6, 5)
    np.testing.assert_array_equal(y[:, positions:prefix], tokens[:, positions:prefix])
    np.testing.assert_allclose(
        y[:, :positions], tokens[:, :positions] + table[:, :positions], atol=1e-6
    )
    np.testing.assert_allclose(
        y[:, prefix:], tokens[:, prefix:] + table[:, positions:], atol=1e-6
    )


@pytest.mark.parametrize("old, new", [(7, 7), (7, 12), (9, 4), (5, 1), (1, 3)])
def test_resize_matrix_is_antialiased_bicubic(old, new):
    expected = reference.resize_axis(np.eye(old), new)
    np.testing.assert_allclose(resize_matrix(new, old), expected, atol=1e-6)
    dynamic = resize_matrix(keras.ops.convert_to_tensor(new), old)
    np.testing.assert_allclose(to_numpy(dynamic), expected, atol=1e-6)


def test_resampling_equals_timm():
    golden = np.load(GOLDEN)
    names = [x for x in golden.files if x.startswith("timm_bicubic_antialias_")]
    assert len(names) >= 3
    table = golden["table"]
    for name in names:
        grid = tuple(int(x) for x in name.rsplit("_", 1)[1].split("x"))
        patches = to_numpy(resample(table[:, 1:], (7, 7), grid))
        np.testing.assert_array_equal(golden[name][:, :1], table[:, :1])
        np.testing.assert_allclose(patches, golden[name][:, 1:], atol=1e-4)


def test_the_table_is_resampled_for_the_grid_that_comes():
    layer = LearnedPosition(1, 1, table_grid=(4, 4))
    tokens, grid = np.zeros((1, 1 + 15, 8), "float32"), draw(1, 3, 5, 8)
    y = to_numpy(layer(tokens, grid))
    table = layer.get_weights()[0]
    rows = reference.resize_axis(table[0, 1:].reshape(4, 4, 8), 3)
    columns = reference.resize_axis(rows.transpose(1, 0, 2), 5).transpose(1, 0, 2)
    np.testing.assert_allclose(y[0, 1:], columns.reshape(15, 8), atol=1e-5)
    np.testing.assert_allclose(y[0, 0], table[0, 0], atol=1e-6)


@pytest.mark.parametrize("suffix", [".weights.h5", ".keras"])
@pytest.mark.parametrize("size", [(16, 64), (48, 48)])  # (16, 64): as many tokens
def test_weights_of_one_size_are_resampled_into_a_model_of_another(
    tmp_path, suffix, size
):
    def build(image_size):
        return ViT("tiny", image_size=image_size, patch_size=8, depth=1, num_classes=3)

    source, target = build(32), build(size)
    path = tmp_path / f"model{suffix}"
    source.save_weights(path) if suffix == ".weights.h5" else source.save(path)
    target.load_weights(path)
    table = source.get_layer("position").get_weights()[0]
    new = target.get_layer("position").get_weights()[0]
    grid = tuple(side // 8 for side in size)
    expected = to_numpy(resample(table[:, 1:], (4, 4), grid))
    np.testing.assert_array_equal(new[:, :1], table[:, :1])
    np.testing.assert_allclose(new[:, 1:], expected, atol=1e-6)
    if size == (16, 64):
        assert new.shape == table.shape and np.abs(new - table).max() > 1e-3


def test_a_file_with_other_prefix_tokens_is_refused(tmp_path):
    def build(row):
        return ViT(row, image_size=32, depth=1, layer_scale=None, num_classes=3)

    build("deit_small").save_weights(tmp_path / "a.weights.h5")
    with pytest.raises(ValueError, match="has 1 prefix positions and D=384, the model"):
        build("deit3_small").load_weights(tmp_path / "a.weights.h5")


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match="num_prefix_positions=2 must not exceed"):
        LearnedPosition(1, 2)
    with pytest.raises(ValueError, match="table_grid must be given"):
        LearnedPosition()(keras.Input((None, 8)), keras.Input((None, None, 8)))
