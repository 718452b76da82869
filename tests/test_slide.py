import numpy as np
import pytest
import tensorflow as tf

from training import augment


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize(
    ("slope", "shift"), [(0.3, 0), (0, -0.2), (-0.25, 0.4), (0, 2)]
)
def test_what_slides_along_one_axis_is_warped_as_by_the_general_way(
    axis, slope, shift, mirrored
):
    matrix = np.eye(3, dtype="float32")
    matrix[axis, 1 - axis], matrix[axis, 2] = slope, shift
    if mirrored:
        matrix = np.asarray([[-1, 0, 1], [0, 1, 0], [0, 0, 1]], "float32") @ matrix
    images = tf.random.stateless_uniform((1, 19, 33, 3), (1, 2), 0, 255)
    matrices = tf.constant(matrix[None])
    expected = augment._warp(images, matrices, "BILINEAR", 0.0)
    np.testing.assert_allclose(augment.warp(images, matrices), expected, atol=0.02)
