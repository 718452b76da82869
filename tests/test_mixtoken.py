import keras
import numpy as np
import pytest
from conftest import to_numpy
from reference import mixtoken_box

from keras_vit import MixToken

GRID = np.random.default_rng(0).normal(size=(5, 4, 6, 3)).astype("float32")
BOX = np.array([1, 2, 3, 6], "int32")


def test_layer_does_nothing_without_a_box(check_layer):
    np.testing.assert_array_equal(check_layer(MixToken(), GRID), GRID)


@pytest.mark.parametrize("batch", [1, 4, 5])
def test_inside_the_box_are_the_tokens_of_the_reversed_batch(batch):
    grid = GRID[:batch]
    y = to_numpy(MixToken()(grid, BOX))
    expected = grid.copy()
    expected[:, 1:3, 2:6] = grid[::-1, 1:3, 2:6]
    np.testing.assert_array_equal(y, expected)
    np.testing.assert_array_equal(to_numpy(MixToken()(y, BOX)), grid)


def test_an_empty_box_changes_nothing_and_keeps_everything():
    mix = MixToken()
    empty = np.array([2, 3, 2, 3], "int32")
    np.testing.assert_array_equal(to_numpy(mix(GRID, empty)), GRID)
    assert float(mix.kept(GRID, empty)) == 1
    assert float(mix.kept(GRID, BOX)) == pytest.approx(1 - 2 * 4 / 24)


def boxes(sides, side, count=20_000):
    """First and last + 1 of both axes of many boxes on a square grid: (4, count)."""
    draw = np.random.default_rng(0).uniform(size=(5, count)).astype("float32")
    mix, (kept, *others) = MixToken(sides), map(keras.ops.convert_to_tensor, draw)
    scale = keras.ops.sqrt(1 - kept)
    edges = [mix._edges(side, scale, *others[i::2]) for i in (0, 1)]
    return draw, np.stack([to_numpy(x) for edge in edges for x in edge])


def test_the_paper_s_rule_is_that_of_the_code():
    for side in (4, 7, 14):
        draw, found = boxes("paper", side, 500)
        for column, box in zip(draw.T, found.T, strict=True):
            centre = [int(x * side) for x in column[1:3]]
            row, col = mixtoken_box((side, side), column[0], centre)
            np.testing.assert_array_equal(box, [*row, *col])


# Means of 20,000 draws of the paper's code.
@pytest.mark.parametrize("side, kept", [(4, 0.857), (7, 0.762), (14, 0.729)])
def test_the_paper_s_rule_mixes_too_little_on_small_grids(side, kept):
    _, (top, bottom, left, right) = boxes("paper", side)
    found = 1 - (bottom - top) * (right - left) / side**2
    assert found.mean() == pytest.approx(kept, abs=0.01)


@pytest.mark.parametrize("side", [4, 7, 14])
def test_the_unbiased_rule_keeps_what_lambda_says(side):
    draw, (top, bottom, left, right) = boxes("unbiased", side)
    assert min(top.min(), left.min()) == 0 and max(bottom.max(), right.max()) == side
    found = 1 - (bottom - top) * (right - left) / side**2
    assert found.mean() == pytest.approx(0.5, abs=0.01)
    for low in np.arange(0, 1, 0.2):
        some = (draw[0] >= low) & (draw[0] < low + 0.2)
        assert found[some].mean() == pytest.approx(draw[0, some].mean(), abs=0.02)
    place = top[bottom - top == 2]  # uniform over all that fit
    counts = np.bincount(place.astype(int), minlength=side - 1) / len(place)
    np.testing.assert_allclose(counts, 1 / (side - 1), atol=0.04)


@pytest.mark.parametrize("sides", ["paper", "unbiased"])
def test_boxes_lie_on_the_grid_differ_and_repeat_with_the_seed(sides):
    first, second = MixToken(sides, seed=3), MixToken(sides, seed=3)
    found = np.array([to_numpy(first.draw_box(GRID)) for _ in range(12)])
    again = np.array([to_numpy(second.draw_box(GRID)) for _ in range(12)])
    np.testing.assert_array_equal(found, again)
    assert found.dtype == "int32" and len(np.unique(found, axis=0)) > 4
    assert (found[:, :2] <= found[:, 2:]).all() and (found >= 0).all()
    assert (found[:, 2] <= 4).all() and (found[:, 3] <= 6).all()


def test_an_unknown_rule_is_refused():
    with pytest.raises(
        ValueError, match=r"sides must be one of .* Did you mean 'paper'"
    ):
        MixToken("papper")
