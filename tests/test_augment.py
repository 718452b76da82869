import numpy as np
import tensorflow as tf

from training.augment import random_affine

SEED = tf.constant([3, 4], tf.int64)
AMOUNTS = {"rotation_degrees": 20.0, "zoom": 0.2, "shift": 0.2}


def test_random_affine_with_zero_amounts_is_the_identity():
    x = tf.random.stateless_uniform((3, 7, 9, 3), (1, 2), 0, 255)
    y = random_affine(x, tf.constant([0, 1], tf.int64))
    np.testing.assert_allclose(y, x, atol=1e-3)


def test_random_affine_moves_by_what_it_was_told():
    """A single bright pixel in the middle never leaves the allowed square."""
    x = np.zeros((200, 21, 21, 1), "float32")
    x[:, 10, 10] = 1
    y = random_affine(tf.constant(x), tf.constant([3, 4], tf.int64), shift=0.1).numpy()
    rows, columns = np.nonzero(y.sum((0, 3)))
    assert rows.min() >= 7 and rows.max() <= 13 and columns.max() <= 13
    assert np.ptp(rows) >= 4 and np.ptp(columns) >= 4


def quarters(count=16, side=32):
    """Images of four squares, 50, 100, 150 and 200 bright, with masks 1, 2, 3 and 4."""
    square = np.ones((side // 2, side // 2), "uint8")
    masks = np.tile(np.kron([[1, 2], [3, 4]], square).astype("uint8"), (count, 1, 1))
    return tf.constant(masks[..., None] * 50, tf.float32), tf.constant(masks)


def test_masks_move_with_their_images():
    images, masks = random_affine(quarters()[0], SEED, **AMOUNTS, masks=quarters()[1])
    assert masks.dtype == tf.uint8 and masks.shape == (16, 32, 32)
    images, masks = images.numpy()[..., 0] / 50, masks.numpy()
    assert set(np.unique(masks)) == {1, 2, 3, 4, 255}  # never between two classes
    inside = masks != 255
    pure = np.abs(images - np.round(images)) < 1e-3  # no edge within reach
    assert 0.6 < (inside & pure).mean() < 0.95
    near = np.abs(images - masks) > 0.5  # of two classes the nearer, but for 2 and 3
    assert near[inside & pure].mean() < 0.02 and near[inside].mean() < 0.1
    assert np.abs(masks.astype(int) - quarters()[1].numpy()).max() > 1  # it did move


def test_masks_are_255_where_the_image_was_filled():
    ones = tf.ones((16, 32, 32, 1))
    images, masks = random_affine(ones, SEED, **AMOUNTS, masks=quarters()[1])
    images, outside = images.numpy()[..., 0], masks.numpy() == 255
    assert 0.03 < outside.mean() < 0.5
    assert images[outside].max() <= 0.5 + 1e-3 and images[~outside].min() >= 0.25 - 1e-3


def test_masks_change_nothing_in_the_images():
    images, masks = quarters()
    alone = random_affine(images, SEED, **AMOUNTS)
    with_masks, _ = random_affine(images, SEED, **AMOUNTS, masks=masks)
    np.testing.assert_array_equal(alone, with_masks)


def test_masks_stay_as_they_are_with_zero_amounts():
    _, masks = random_affine(quarters()[0], SEED, masks=quarters()[1])
    np.testing.assert_array_equal(masks, quarters()[1])
