import math

import numpy as np
import pytest
import tensorflow as tf
from PIL import Image

from keras_vit.embedding import Preprocess
from training.augment import (
    affines,
    flips,
    rand_augment_draws,
    rand_augment_geometry,
    random_resized_crop,
    warp,
    warp_masks,
)
from training.preprocess import resize

SEED = tf.constant([3, 4], tf.int64)
AMOUNTS = {"rotation_degrees": 20.0, "zoom": 0.2, "shift": 0.2}
CROP = Preprocess((12, 20), None, "bilinear")


def ramps(height, width):
    """An image whose two channels say where each pixel is, x and y, 255 for 1."""
    y, x = (np.arange(side) + 0.5 for side in (height, width))
    pixels = np.stack(np.broadcast_arrays(x / width, y[:, None] / height), -1) * 255
    return tf.constant(pixels, tf.float32)


def places(matrices, height, width):
    """Where the matrices say that each pixel came from: `(..., H, W, 2)`, x and y."""
    points = np.concatenate(
        [ramps(height, width) / 255, np.ones((height, width, 1))], -1
    )
    return np.einsum("...ij,hwj->...hwi", matrices, points)[..., :2]


def crops(count, image, preprocess=CROP, **kwargs):
    """Crops of one image by as many seeds, and their matrices."""

    def crop(seed):
        return random_resized_crop(image, preprocess, seed, **kwargs)

    return several(crop, count)


def several(draw, count):
    """What `draw` returns for as many seeds, in a graph."""
    seeds = [[i, 7] for i in range(count)]
    stream = tf.data.Dataset.from_tensor_slices(tf.constant(seeds, tf.int64))
    return next(stream.map(draw).batch(count).as_numpy_iterator())


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_the_matrix_of_a_crop_tells_where_each_pixel_came_from(interpolation):
    preprocess = Preprocess((12, 20), None, interpolation)
    images, matrices = crops(40, ramps(70, 50), preprocess)
    inner = np.s_[:, 2:-2, 2:-2]
    far = images / 255 - places(matrices, 12, 20)
    assert np.abs(far[inner]).max() < 2e-3
    upright = matrices[:, [1, 0, 2]][:, :, [1, 0, 2]]  # x and y exchanged
    assert np.abs((images / 255 - places(upright, 12, 20))[inner]).mean() > 0.02


def test_area_and_ratio_of_a_crop_are_spread_as_they_should():
    image = tf.zeros((300, 400, 1))

    def draw(seed):
        return random_resized_crop(image, CROP, seed, (0.1, 0.3), (0.5, 0.9))[1]

    matrices = several(draw, 2000)
    area = matrices[:, 0, 0] * matrices[:, 1, 1]
    ratio = np.log(matrices[:, 0, 0] * 400 / (matrices[:, 1, 1] * 300))
    for x, low, high in (
        (area, 0.1, 0.3),
        (ratio, math.log(0.5), math.log(0.9)),
    ):
        assert low - 0.02 < x.min() and x.max() < high + 0.02
        parts = np.histogram(np.clip(x, low, high), 4, (low, high))[0] / len(x)
        assert np.abs(parts - 0.25).max() < 0.05
    assert abs(np.corrcoef(area, ratio)[0, 1]) < 0.08
    for axis in (0, 1):  # the place is uniform in the room that is left
        room = 1 - matrices[:, axis, axis]
        part = matrices[:, axis, 2] / room
        assert part.min() >= 0 and part.max() <= 1 + 1e-5
        assert np.abs(np.histogram(part, 4, (0, 1))[0] / len(part) - 0.25).max() < 0.05


def test_a_crop_never_leaves_the_image():
    image = tf.zeros((61, 40, 1))
    matrices = several(lambda seed: random_resized_crop(image, CROP, seed)[1], 500)
    size, offset = matrices[:, [0, 1], [0, 1]], matrices[:, :2, 2]
    assert size.min() > 0 and size.max() <= 1
    assert offset.min() >= 0 and (offset + size).max() <= 1 + 1e-6
    area = size.prod(-1)
    assert 0.06 < area.min() < 0.2 and 0.7 < area.max() <= 1


@pytest.mark.parametrize(
    "shape, box",  # top, left, height, width
    [
        ((10, 200), (0, 93, 10, 13)),
        ((200, 10), (93, 0, 13, 10)),
        ((1, 40), (0, 19, 1, 1)),
        ((1, 1), (0, 0, 1, 1)),
    ],
)
def test_where_no_crop_fits_the_largest_central_one_is_taken(shape, box):
    images, matrices = crops(20, tf.ones((*shape, 3), tf.uint8))
    top, left, height, width = box
    expected = np.diag([width / shape[1], height / shape[0], 1])
    expected[:2, 2] = left / shape[1], top / shape[0]
    np.testing.assert_allclose(matrices, np.tile(expected, (20, 1, 1)), atol=1e-6)
    assert images.shape == (20, 12, 20, 3) and np.allclose(images, 1)


def test_a_crop_of_the_whole_image_is_the_resized_image():
    image = tf.cast(ramps(16, 16), tf.uint8)
    crop, matrix = random_resized_crop(image, CROP, SEED, (1, 1), (1, 1))
    np.testing.assert_array_equal(matrix, np.eye(3))
    np.testing.assert_array_equal(crop, resize(image, CROP))


def test_a_small_image_and_bicubic_stay_within_0_and_255():
    image = tf.constant(np.random.default_rng(0).choice([0, 255], (5, 6, 4)), tf.uint8)
    images, _ = crops(20, image, Preprocess((32, 24), None, "bicubic"))
    assert images.shape == (20, 32, 24, 4)
    assert images.min() >= 0 and images.max() <= 255


@pytest.mark.parametrize("limits", [(0, 1), (0.5, 0.2), (-1, 1)])
@pytest.mark.parametrize("name", ["scale", "ratio"])
def test_limits_of_a_crop_must_be_positive_and_in_order(name, limits):
    with pytest.raises(ValueError, match=f"{name} must be two limits, 0 < low <= high"):
        random_resized_crop(tf.zeros((4, 4, 3)), CROP, SEED, **{name: limits})


def test_the_interpolation_of_a_crop_is_the_recorded_one_a_given_one_or_either():
    image = tf.constant(np.random.default_rng(0).integers(0, 256, (9, 9, 3)), tf.uint8)
    found = {
        name: crops(40, image, interpolation=name)[0]
        for name in (None, "bilinear", "bicubic", "random")
    }
    np.testing.assert_array_equal(found[None], found["bilinear"])  # that of CROP
    cubic = crops(40, image, Preprocess((12, 20), None, "bicubic"))[0]
    np.testing.assert_array_equal(found["bicubic"], cubic)
    kinds = [
        np.abs(found["random"] - found[name]).max((1, 2, 3)) < 1e-3
        for name in ("bilinear", "bicubic")
    ]
    assert (kinds[0] ^ kinds[1]).all() and 0.25 < kinds[0].mean() < 0.75


def test_an_unknown_interpolation_is_an_error():
    with pytest.raises(ValueError, match=r"got 'bicubik'\. Did you mean 'bicubic'"):
        random_resized_crop(tf.zeros((4, 4, 3)), CROP, SEED, interpolation="bicubik")


DRAWS = {
    "crop": lambda seed: random_resized_crop(tf.zeros((50, 60, 3)), CROP, seed)[1],
    "flips": lambda seed: flips(seed, 64),
    "affines": lambda seed: affines(seed, 5, (20, 30), 10.0, 0.1, 0.1),
    "rand_augment": lambda seed: rand_augment_geometry(seed, 64, (20, 30)),
}


@pytest.mark.parametrize("name", DRAWS)
def test_the_seed_decides(name):
    draw = DRAWS[name]
    np.testing.assert_array_equal(draw(SEED), draw(SEED))
    assert np.abs(draw(SEED) - draw(SEED + 1)).max() > 0.01


def test_one_seed_draws_flips_apart_from_the_rest():
    """Were the streams the same, each flipped image would turn to the same side."""
    flipped = flips(SEED, 400).numpy()[:, 0, 0] < 0
    turned = affines(SEED, 400, (8, 8), 10.0).numpy()[:, 1, 0] < 0
    assert abs(np.corrcoef(flipped, turned)[0, 1]) < 0.15


def test_half_of_the_images_are_flipped_and_to_the_pixel():
    count = 400
    images = tf.random.stateless_uniform((count, 5, 7, 2), (1, 2), 0, 255)
    masks = tf.cast(images[..., 0], tf.uint8)
    matrices = flips(SEED, count)
    images_out, masks_out = warp(images, matrices), warp_masks(masks, matrices)
    mirrored = matrices.numpy()[:, 0, 0] < 0
    assert 0.4 < mirrored.mean() < 0.6
    expected = np.where(mirrored[:, None, None, None], images[:, :, ::-1], images)
    np.testing.assert_allclose(images_out, expected, atol=1e-3)
    expected = np.where(mirrored[:, None, None], masks[:, :, ::-1], masks)
    np.testing.assert_array_equal(masks_out, expected)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_identity_changes_no_pixel(batch):
    images = tf.random.stateless_uniform((batch, 19, 33, 3), (1, 2), 0, 255)
    masks = tf.cast(images[..., 0], tf.uint8)
    matrices = tf.eye(3, batch_shape=[batch])
    np.testing.assert_array_equal(warp(images, matrices), images)
    np.testing.assert_array_equal(warp_masks(masks, matrices), masks)


@pytest.mark.parametrize("name", ["affines", "rand_augment"])
def test_a_warp_fetches_each_pixel_from_where_its_matrix_says(name):
    matrices = {
        "affines": lambda: affines(SEED, 31, (24, 40), 30.0, 0.2, 0.2),
        "rand_augment": lambda: rand_augment_geometry(SEED, 31, (24, 40), num_ops=4),
    }[name]()
    image = tf.concat([ramps(24, 40), tf.ones((24, 40, 1))], -1)
    warped = warp(tf.tile(image[None], (31, 1, 1, 1)), matrices).numpy()
    expected = places(matrices, 24, 40)
    inside = warped[..., 2] > 0.99999
    assert 0.4 < inside.mean() < 0.97
    np.testing.assert_allclose(warped[inside][:, :2] / 255, expected[inside], atol=1e-4)
    away = np.maximum(-expected, expected - 1).max(-1) > 1 / 24
    assert away.mean() > 0.03 and np.abs(warped[away]).max() == 0


def test_steps_compose_by_multiplication_the_first_leftmost():
    first = affines(SEED, 6, (32, 48), 10.0, 0.1, 0.05)
    second = affines(SEED + 1, 6, (32, 48), 10.0, 0.1, 0.05)
    images = tf.tile(ramps(32, 48)[None], (6, 1, 1, 1))
    twice = warp(warp(images, first), second).numpy()[:, 12:-12, 12:-12]
    once = warp(images, first @ second).numpy()[:, 12:-12, 12:-12]
    other = warp(images, second @ first).numpy()[:, 12:-12, 12:-12]
    np.testing.assert_allclose(twice, once, atol=0.1)
    assert np.abs(twice - other).max() > 1


def test_affines_turn_about_the_middle_and_keep_angles():
    """The same numbers by hand, in pixels counted from the first one's centre."""
    height, width = 20, 30
    matrices = affines(SEED, 9, (height, width), 25.0, 0.2, 0.1)
    draw = tf.random.stateless_uniform((4, 9), SEED, -1.0, 1.0).numpy()
    y, x = np.mgrid[0:height, 0:width]
    for i in range(9):
        angle, scale = np.radians(25 * draw[0, i]), 1 + 0.2 * draw[1, i]
        dx, dy = x - (width - 1) / 2, y - (height - 1) / 2
        source_x = (math.cos(angle) * dx - math.sin(angle) * dy) * scale
        source_y = (math.sin(angle) * dx + math.cos(angle) * dy) * scale
        source_x += (width - 1) / 2 + 0.1 * draw[2, i] * width
        source_y += (height - 1) / 2 + 0.1 * draw[3, i] * height
        expected = np.stack([(source_x + 0.5) / width, (source_y + 0.5) / height], -1)
        np.testing.assert_allclose(
            places(matrices[i], height, width), expected, atol=1e-5
        )


def kind_of(matrix, height, width):
    """Name and amount of the one operation that a matrix of RandAugment does."""
    pixels = matrix * np.outer([width, height, 1], [1 / width, 1 / height, 1])
    if pixels[0, 0] < 0.9999:
        return "rotate", math.degrees(math.asin(pixels[1, 0]))
    amounts = {
        "shear_x": pixels[0, 1],
        "shear_y": pixels[1, 0],
        "translate_x": pixels[0, 2],
        "translate_y": pixels[1, 2],
    }
    return max(amounts.items(), key=lambda pair: abs(pair[1]))


def by_pillow(image, name, amount):
    """The operation as timm does it."""
    if name == "rotate":
        return image.rotate(amount, Image.Resampling.BILINEAR)
    coefficients = {
        "shear_x": (1, amount, 0, 0, 1, 0),
        "shear_y": (1, 0, 0, amount, 1, 0),
        "translate_x": (1, 0, amount, 0, 1, 0),
        "translate_y": (1, 0, 0, 0, 1, amount),
    }[name]
    affine = Image.Transform.AFFINE
    return image.transform(image.size, affine, coefficients, Image.Resampling.BILINEAR)


def test_rand_augment_moves_pixels_as_pillow_does():
    height, width = 30, 44
    y, x = np.mgrid[0:height, 0:width]
    picture = 100 + 50 * np.sin(x / 5) * np.cos(y / 4) + x + 2 * y
    picture = picture.astype("float32")
    image = np.stack([picture, np.ones_like(picture)], -1)
    matrices = rand_augment_geometry(SEED, 600, (height, width), num_ops=1).numpy()
    matrices = [m for m in matrices if np.abs(m - np.eye(3)).max() > 0]
    warped = warp(tf.constant([image] * len(matrices)), tf.stack(matrices)).numpy()
    seen = set()
    for matrix, pixels in zip(matrices, warped, strict=True):
        name, amount = kind_of(matrix, height, width)
        seen.add((name, amount > 0))
        expected = by_pillow(Image.fromarray(picture), name, amount)
        inside = pixels[..., 1] > 0.99999
        assert inside.mean() > 0.4
        far = np.abs(pixels[..., 0] - np.asarray(expected))[inside]
        assert far.max() < 0.05, (name, amount)
    assert len(seen) == 10  # each of the five to either side


def test_rand_augment_does_nothing_as_often_as_it_draws_colours():
    """One of three operations is geometric, and one of two drawn is done."""
    for num_ops in (0, 1, 2, 3):
        matrices = rand_augment_geometry(SEED, 6000, (20, 30), num_ops).numpy()
        same = (np.abs(matrices - np.eye(3)).max((1, 2)) == 0).mean()
        assert abs(same - (5 / 6) ** num_ops) < 0.02
    matrices = rand_augment_geometry(SEED, 6000, (20, 30), 1).numpy()
    kinds = [kind_of(m, 20, 30) for m in matrices if np.abs(m - np.eye(3)).max() > 0]
    for name in ("rotate", "shear_x", "shear_y", "translate_x", "translate_y"):
        amounts = np.array([amount for kind, amount in kinds if kind == name])
        assert abs(len(amounts) / 6000 - 1 / 30) < 0.01
        assert abs((amounts > 0).mean() - 0.5) < 0.15


@pytest.mark.parametrize(
    "amounts, message",
    [
        ({"num_ops": -1}, "num_ops must be an int >= 0, got -1"),
        ({"num_ops": 2.0}, "num_ops must be an int >= 0, got 2.0"),
        ({"magnitude": -1}, "magnitude must be a number >= 0, got -1"),
        ({"deviation": -0.5}, "deviation must be a number >= 0, got -0.5"),
    ],
)
def test_amounts_of_rand_augment_must_make_sense(amounts, message):
    with pytest.raises(ValueError, match=message):
        rand_augment_draws(SEED, 4, **amounts)


def test_rand_augment_draws_each_of_its_operations_as_often():
    ops, shares = rand_augment_draws(SEED, 20_000, 2)
    counts = np.bincount(ops.numpy().ravel() + 1, minlength=16) / 40_000
    np.testing.assert_allclose(counts, [1 / 2, *[1 / 30] * 15], atol=0.005)
    assert np.abs(shares).max() <= 1 and abs(np.mean(shares)) < 0.02


def test_the_level_of_rand_augment_is_random_and_cut_at_10():
    largest = {"rotate": 30, "shear_x": 0.3, "shear_y": 0.3}
    largest |= {"translate_x": 0.45 * 30, "translate_y": 0.45 * 20}
    for magnitude, deviation in ((9.0, 0.5), (10.0, 0.0), (4.0, 0.0)):
        matrices = rand_augment_geometry(SEED, 6000, (20, 30), 1, magnitude, deviation)
        matrices = [m for m in matrices.numpy() if np.abs(m - np.eye(3)).max() > 0]
        kinds = [kind_of(m, 20, 30) for m in matrices]
        levels = np.array([10 * abs(x) / largest[kind] for kind, x in kinds])
        assert abs(levels.mean() - magnitude) < 0.1
        assert abs(levels.std() - deviation) < 0.1 and levels.max() < 10.001


def moved(images, masks, **amounts):
    """Images and masks, warped by the same random matrices."""
    matrices = affines(SEED, len(images), images.shape[1:3], **amounts)
    return warp(images, matrices), warp_masks(masks, matrices)


def test_affines_with_zero_amounts_are_the_identity():
    x = tf.random.stateless_uniform((3, 7, 9, 3), (1, 2), 0, 255)
    y = warp(x, affines(SEED, 3, (7, 9)))
    np.testing.assert_allclose(y, x, atol=1e-3)


def test_affines_move_by_what_they_were_told():
    """A single bright pixel in the middle never leaves the allowed square."""
    x = np.zeros((200, 21, 21, 1), "float32")
    x[:, 10, 10] = 1
    y = warp(tf.constant(x), affines(SEED, 200, (21, 21), shift=0.1)).numpy()
    rows, columns = np.nonzero(y.sum((0, 3)))
    assert rows.min() >= 7 and rows.max() <= 13 and columns.max() <= 13
    assert np.ptp(rows) >= 4 and np.ptp(columns) >= 4


def quarters(count=16, side=32):
    """Images of four squares, 50, 100, 150 and 200 bright, with masks 1, 2, 3 and 4."""
    square = np.ones((side // 2, side // 2), "uint8")
    masks = np.tile(np.kron([[1, 2], [3, 4]], square).astype("uint8"), (count, 1, 1))
    return tf.constant(masks[..., None] * 50, tf.float32), tf.constant(masks)


def test_masks_move_with_their_images():
    images, masks = moved(*quarters(), **AMOUNTS)
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
    images, masks = moved(ones, quarters()[1], **AMOUNTS)
    images, outside = images.numpy()[..., 0], masks.numpy() == 255
    assert 0.03 < outside.mean() < 0.5
    assert images[outside].max() <= 0.5 + 1e-3 and images[~outside].min() >= 0.25 - 1e-3


def test_masks_stay_as_they_are_with_zero_amounts():
    _, masks = moved(*quarters())
    np.testing.assert_array_equal(masks, quarters()[1])
