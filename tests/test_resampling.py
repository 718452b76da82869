from pathlib import Path

import keras
import numpy as np
import pytest
import reference
from conftest import to_numpy

from keras_vit.resampling import METHODS, resample, resize, resize_matrix

GOLDEN = Path(__file__).parent / "golden" / "position_resampling.npz"
SIZES = [(7, 7), (7, 12), (9, 4), (5, 1), (1, 3), (2, 6)]


@pytest.mark.parametrize("old, new", SIZES)
def test_bicubic_antialias_is_the_equation(old, new):
    expected = reference.resize_axis(np.eye(old), new)
    np.testing.assert_allclose(resize_matrix(new, old), expected, atol=1e-6)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("old, new", SIZES)
def test_a_size_of_run_time_gives_the_same_matrix(method, old, new):
    expected = resize_matrix(new, old, method)
    np.testing.assert_allclose(expected.sum(1), 1, atol=1e-6)
    sides = [keras.ops.convert_to_tensor(side) for side in (new, old)]
    for args in ((sides[0], old), sides):
        found = to_numpy(resize_matrix(*args, method))
        np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    "source, method",
    [
        ("timm_bicubic_antialias", "bicubic_antialias"),
        ("deit_bicubic_noaa", "bicubic"),
        ("jax_zoom_order1", "linear_corners"),
    ],
)
def test_resampling_equals_the_published_code(source, method):
    golden = np.load(GOLDEN)
    names = [x for x in golden.files if x.startswith(source)]
    assert names
    table = golden["table"]
    for name in names:
        height, width = (int(x) for x in name.split("_")[3].split("x"))
        grid = to_numpy(resample(table[:, 1:], (7, 7), (height, width), method))
        expected = golden[name]
        if source.startswith("timm"):
            np.testing.assert_array_equal(expected[:, :1], table[:, :1])
            expected = expected[:, 1:]
        np.testing.assert_allclose(
            grid.reshape(-1, 8), expected.reshape(-1, 8), atol=1e-4
        )


def test_linear_is_a_triangle_between_pixel_centres():
    x = np.array([0.0, 4.0, 8.0], "float32")
    expected = [
        0.0,
        1.0,
        3.0,
        5.0,
        7.0,
        8.0,
    ]  # the border repeats, the inside is a line
    np.testing.assert_allclose(resize_matrix(6, 3, "linear") @ x, expected, atol=1e-6)


def test_maps_are_resized_one_by_one():
    x = np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("float32")
    y = to_numpy(resize(x, (6, 2), "linear"))
    assert y.shape == (2, 6, 2, 5)
    rows, columns = resize_matrix(6, 3, "linear"), resize_matrix(2, 4, "linear")
    expected = np.einsum("hi,wj,bijd->bhwd", rows, columns, x)
    np.testing.assert_allclose(y, expected, atol=1e-5)


def test_an_unknown_method_is_refused():
    with pytest.raises(ValueError, match=r"resampling must be one of .*, got 'cubic'"):
        resize_matrix(3, 4, "cubic")
