import keras
import numpy as np
import pytest
import reference
from conftest import first, to_numpy

from keras_vit import PEG, LearnedPosition, SinCosPosition, ViT
from keras_vit.resampling import METHODS, resample


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
    with pytest.raises(ValueError, match="resampling must be one of 'bicubic_anti"):
        LearnedPosition(resampling="cubic")
    with pytest.raises(ValueError, match="dimensions must be 1 or 2, got 3"):
        SinCosPosition(dimensions=3)
    with pytest.raises(ValueError, match="D must be a multiple of 4, got D=6"):
        SinCosPosition()(draw(1, 6, 6), draw(1, 2, 3, 6))
    for size in (2, 0, "3"):
        with pytest.raises(ValueError, match=f"must be odd, such as 3, got {size!r}"):
            PEG(size)
    with pytest.raises(ValueError, match="padding must be 'zeros', 'circular' or"):
        PEG(padding="same")


@pytest.mark.parametrize("resampling", METHODS)
def test_each_resampling_can_be_chosen(check_layer, resampling):
    layer = LearnedPosition(1, 1, (4, 4), resampling=resampling)
    tokens, grid = np.zeros((1, 1 + 15, 8), "float32"), draw(1, 3, 5, 8)
    y = check_layer(layer, tokens, grid)
    table = layer.get_weights()[0]
    expected = to_numpy(resample(table[:, 1:], (4, 4), (3, 5), resampling))
    np.testing.assert_allclose(y[:, 1:], expected, atol=1e-6)


@pytest.mark.parametrize("dimensions", [1, 2])
def test_sincos_is_the_equation(check_layer, dimensions):
    tokens, grid = draw(2, 1 + 15, 12), draw(2, 3, 5, 12)
    y = check_layer(SinCosPosition(1, dimensions), tokens, grid)
    np.testing.assert_array_equal(y[:, 0], tokens[:, 0])
    encode = reference.sincos_1d if dimensions == 1 else reference.sincos_2d
    expected = tokens[:, 1:] + encode(3, 5, 12)
    np.testing.assert_allclose(y[:, 1:], expected, atol=1e-5)


@pytest.mark.parametrize("padding", ["zeros", "circular", "none"])
@pytest.mark.parametrize("kernel_size", [first(1), 3, first(5)])
@pytest.mark.parametrize(
    "num_prefix, sides", [first(0, (4, 7)), (2, (5, 5)), first(1, (1, 2))]
)
def test_peg_is_the_equation(check_layer, padding, kernel_size, num_prefix, sides):
    length = num_prefix + sides[0] * sides[1]
    tokens, grid = draw(2, length, 3), draw(2, *sides, 3)
    layer = PEG(kernel_size, padding, num_prefix)
    y = check_layer(layer, tokens, grid)
    kernel, bias = layer.get_weights()
    x = tokens[:, num_prefix:].reshape(2, *sides, 3)
    expected = x + [reference.peg(image, kernel, bias, padding) for image in x]
    np.testing.assert_array_equal(y[:, :num_prefix], tokens[:, :num_prefix])
    patches = y[:, num_prefix:].reshape(expected.shape)
    np.testing.assert_allclose(patches, expected, atol=1e-5)


def test_peg_with_a_zero_kernel_is_the_identity():
    layer, tokens, grid = PEG(num_prefix=1), draw(2, 7, 4), draw(2, 2, 3, 4)
    layer(tokens, grid)
    layer.set_weights([np.zeros_like(w) for w in layer.get_weights()])
    np.testing.assert_array_equal(to_numpy(layer(tokens, grid)), tokens)


@pytest.mark.parametrize("policy", ["mixed_float16", "mixed_bfloat16"])
def test_peg_learns_in_half_precision(policy):
    keras.config.set_dtype_policy(policy)
    tokens, grid = keras.Input((12, 8)), keras.Input((3, 4, 8))
    model = keras.Model([tokens, grid], PEG()(tokens, grid))
    model.compile("sgd", "mse")
    before = model.get_weights()[0]
    x = [draw(4, 12, 8), draw(4, 3, 4, 8)]
    model.fit(x, np.zeros((4, 12, 8)), verbose=0)
    assert np.abs(model.get_weights()[0] - before).max() > 0
