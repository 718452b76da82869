import numpy as np
import pytest
import tensorflow as tf

from keras_vit.embedding import Preprocess
from training.augment import (
    affines,
    flips,
    rand_augment_geometry,
    random_resized_crop,
    warp,
)
from training.preprocess import geometry, resize
from training.targets import image_labels, mix, smooth, token_labels

SEED = tf.constant([3, 4], tf.int64)
FILE, IMAGE, GRID = (90, 132), (48, 64), (6, 8)  # tokens of 8 x 8 pixels
CLASSES = 4


def score_maps(count, rows=6, columns=5, classes=CLASSES):
    """Probabilities of every class, no two cells alike: float32 `(count, m, n, C)`."""
    scores = np.random.default_rng(5).normal(0, 1.5, (count, rows, columns, classes))
    return np.exp(scores) / np.exp(scores).sum(-1, keepdims=True)


def sparse(maps, k=None):
    """The k best of each cell, as a store of maps keeps them."""
    order = np.argsort(-maps, axis=-1)[..., :k]
    values = np.take_along_axis(maps, order, -1)
    return tf.constant(values, tf.float16), tf.constant(order, tf.int32)


def painted(maps, size=FILE):
    """The maps as images of one channel a class, 255 for probability 1."""
    return tf.image.resize(tf.constant(maps, tf.float32), size, "bilinear") * 255


def as_labels(images, grid=GRID):
    """Mean of each token's pixels; what is missing to 1 belongs to all classes."""
    batch, height, width, classes = images.shape
    shape = (batch, grid[0], height // grid[0], grid[1], width // grid[1], classes)
    means = np.reshape(images, shape).mean((2, 4)) / 255
    return means + (1 - means.sum(-1, keepdims=True)) / classes


WARPS = {
    "nothing": lambda count: tf.eye(3, batch_shape=[count]),
    "flips": lambda count: flips(SEED, count),
    "affines": lambda count: affines(SEED, count, IMAGE, 20.0, 0.15, 0.15),
    "rand_augment": lambda count: rand_augment_geometry(SEED, count, IMAGE, 5),
    "all": lambda count: (
        WARPS["flips"](count) @ WARPS["rand_augment"](count) @ WARPS["affines"](count)
    ),
}


def augmented(maps, crop, warps):
    """Images that carry their maps in their channels, and the crops they went through.

    The crop is None (the file resized), "central" or "random".
    """
    preprocess = Preprocess(IMAGE, 0.7 if crop == "central" else None, "bilinear")
    images, crops = [], []
    for i, image in enumerate(painted(maps)):
        if crop == "random":
            image, matrix = random_resized_crop(image, preprocess, SEED + i, (0.2, 0.6))
        else:
            image, matrix = resize(image, preprocess), geometry(FILE, preprocess)
        images.append(image)
        crops.append(matrix)
    return warp(tf.stack(images), warps).numpy(), tf.stack(crops)


@pytest.mark.parametrize("crop", [None, "central", "random"])
@pytest.mark.parametrize("name", WARPS)
def test_the_map_goes_where_its_image_goes(crop, name):
    count = 9
    maps, warps = score_maps(count), WARPS[name](count)
    images, crops = augmented(maps, crop, warps)
    labels = token_labels(*sparse(maps), warps, GRID, CLASSES, 8, crops).numpy()
    assert labels.shape == (count, *GRID, CLASSES)
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-5)
    far = np.abs(labels - as_labels(images))
    inside = images.sum(-1).reshape(count, 6, 8, 8, 8).min((2, 4)) > 254
    assert inside.mean() > 0.3
    assert far[inside].max() < 0.01 and far[inside].mean() < 0.0015
    assert far.max() < 0.03 and far.mean() < 0.002  # with tokens on the very edge

    def error_with(warps, crops):
        labels = token_labels(*sparse(maps), warps, GRID, CLASSES, 8, crops)
        return np.abs(labels - as_labels(images)).mean()

    identity = WARPS["nothing"](count)
    if name != "nothing":
        assert error_with(identity, crops) > 0.04
    if name not in ("nothing", "flips"):  # these are their own inverse
        assert error_with(tf.linalg.inv(warps), crops) > 0.04
    if crop is not None:
        assert error_with(warps, identity) > 0.04
    if crop == "random":  # a box read as (top, left, bottom, right): x for y
        exchanged = tf.gather(tf.gather(crops, [1, 0, 2], axis=1), [1, 0, 2], axis=2)
        assert error_with(warps, exchanged) > 0.04


def test_one_product_of_matrices_serves_where_nothing_comes_from_outside():
    maps = score_maps(5)
    warps = WARPS["flips"](5)
    _, crops = augmented(maps, "random", warps)
    apart = token_labels(*sparse(maps), warps, GRID, CLASSES, crops=crops)
    product = token_labels(*sparse(maps), crops @ warps, GRID, CLASSES)
    np.testing.assert_allclose(apart, product, atol=1e-5)


def test_what_a_warp_brings_from_outside_a_crop_has_no_label():
    """The file has content there, but the image shows none of it."""
    aside = tf.constant([[[1.0, 0, 0.5], [0, 1, 0], [0, 0, 1]]])
    crop = tf.constant([[[0.5, 0, 0], [0, 0.5, 0], [0, 0, 1]]])
    labels = token_labels(*sparse(score_maps(1)), aside, (2, 2), CLASSES, crops=crop)
    np.testing.assert_allclose(labels[0, :, 1], 1 / CLASSES, atol=1e-6)
    assert np.abs(labels[0, :, 0] - 1 / CLASSES).max() > 0.1


@pytest.mark.parametrize("batch", [1, 3])
def test_a_map_of_pixels_gives_the_exact_overlap(batch):
    pixels = np.random.default_rng(0).integers(0, 10, (batch, 32, 48, 1))
    ones, eye = tf.ones(pixels.shape, tf.float16), tf.eye(3, batch_shape=[batch])
    labels = token_labels(ones, tf.constant(pixels, tf.int32), eye, (4, 3), 10)
    dense = np.eye(10)[pixels[..., 0]].reshape(batch, 4, 8, 3, 16, 10)
    np.testing.assert_allclose(labels, dense.mean((2, 4)), atol=1e-5)
    whole = image_labels(ones, tf.constant(pixels, tf.int32), eye, 10)
    np.testing.assert_allclose(whole, dense.mean((1, 2, 3, 4)), atol=1e-5)


def test_a_map_of_the_size_of_the_grid_is_read_between_its_centres():
    """Two points a token, a quarter of a cell off its centre, by hand."""
    values = tf.constant([1.0, 0.0, 0.0], tf.float16)[None, None, :, None]
    classes = tf.zeros(values.shape, tf.int32)
    labels = token_labels(values, classes, tf.eye(3)[None], (1, 3), 2).numpy()
    scores = np.array([(1 + 0.75) / 2, 0.25 / 2, 0])
    np.testing.assert_allclose(labels[0, 0, :, 0], (1 + scores) / 2, atol=1e-6)
    labels = token_labels(values, classes, tf.eye(3)[None], (1, 3), 2, 1).numpy()
    np.testing.assert_allclose(labels[0, 0, :, 0], [1, 0.5, 0.5], atol=1e-6)


def test_more_samples_than_asked_for_change_little():
    maps, warps = sparse(score_maps(4)), WARPS["all"](4)
    few = token_labels(*maps, warps, GRID, CLASSES).numpy()
    many = token_labels(*maps, warps, GRID, CLASSES, samples=16).numpy()
    assert np.abs(few - many).mean() < 0.01


def test_what_a_map_leaves_out_belongs_to_all_classes_alike():
    maps = score_maps(3, classes=10)
    values, classes = sparse(maps, k=4)
    kept = np.where(maps >= np.sort(maps, -1)[..., [-4]], maps, 0)
    kept += (1 - kept.sum(-1, keepdims=True)) / 10
    eye = tf.eye(3, batch_shape=[3])
    labels = token_labels(values, classes, eye, GRID, 10)
    expected = token_labels(*sparse(kept), eye, GRID, 10)
    np.testing.assert_allclose(labels, expected, atol=1e-3)
    assert labels.numpy().min() > 0


def test_a_map_that_rounding_brings_above_1_gives_no_negative_label():
    values = tf.fill((1, 3, 3, 2), tf.constant(0.5005, tf.float16))
    classes = tf.tile(tf.constant([2, 0]), [9])
    classes = tf.reshape(classes, (1, 3, 3, 2))
    labels = token_labels(values, classes, tf.eye(3)[None], (2, 2), 3).numpy()
    assert labels.min() == 0
    np.testing.assert_allclose(labels.sum(-1), 1, atol=1e-6)


def test_a_token_from_outside_belongs_to_all_classes_alike():
    away = tf.constant([[[1.0, 0, 2], [0, 1, 0], [0, 0, 1]]])
    maps = sparse(score_maps(1))
    for labels in (
        token_labels(*maps, away, GRID, CLASSES),
        image_labels(*maps, away, CLASSES),
    ):
        np.testing.assert_allclose(labels, np.full(labels.shape, 0.25), atol=1e-6)


@pytest.mark.parametrize("wrong", [-1, 4])
def test_a_class_that_does_not_exist_is_an_error(wrong):
    values, classes = sparse(score_maps(1))
    classes = tf.where(classes == 2, wrong, classes)
    with pytest.raises(tf.errors.InvalidArgumentError, match=r"must be in 0\.\.3"):
        token_labels(values, classes, tf.eye(3)[None], GRID, CLASSES)


def examples(batch=5, size=(16, 24), grid=(4, 6), classes=5):
    """Image i is i bright everywhere and of class i; so are its tokens."""
    numbers = np.arange(batch)
    images = np.ones((batch, *size, 3)) * numbers[:, None, None, None]
    one_hot = np.eye(classes)[numbers]
    tokens = np.ones((batch, *grid, 1)) * one_hot[:, None, None]
    targets = {"class": one_hot, "truth": one_hot, "tokens": tokens}
    targets = {name: tf.constant(x, tf.float32) for name, x in targets.items()}
    return tf.constant(images, tf.float32), targets


def test_mixup_mixes_everything_by_lambda():
    images, targets = examples()
    mixed, soft = mix(images, targets, SEED, mixup=0.8)
    kept = soft["class"].numpy()[0, 0]
    assert 0.01 < kept < 0.99
    expected = kept * images + (1 - kept) * images[::-1]
    np.testing.assert_allclose(mixed, expected, atol=1e-5)
    for name, target in targets.items():
        expected = kept * target + (1 - kept) * target[::-1]
        np.testing.assert_allclose(soft[name], expected, atol=1e-6)


@pytest.mark.parametrize("grid", [(4, 6), (5, 7), (16, 24)])
def test_cutmix_mixes_images_by_area_and_tokens_by_what_of_them_is_in_the_box(grid):
    images, targets = examples(grid=grid)
    areas = []
    for i in range(12):
        mixed, soft = mix(images, targets, SEED + i, cutmix=1.0)
        box = mixed.numpy()[0, ..., 0] == 4  # the first image shows the last one there
        assert np.isin(mixed[0], [0, 4]).all() and (mixed[2].numpy() == 2).all()
        areas.append(box.mean())
        for name in ("class", "truth"):
            target = soft[name].numpy()
            np.testing.assert_allclose(target[0, [0, 4]], [1 - areas[-1], areas[-1]])
        pixels = np.kron(box, np.ones(grid))  # each token is 16 x 24 of these
        part = pixels.reshape(grid[0], 16, grid[1], 24).mean((1, 3))
        tokens = soft["tokens"].numpy()
        np.testing.assert_allclose(tokens[0, ..., 4], part, atol=1e-6)
        np.testing.assert_allclose(tokens[0, ..., 0], 1 - part, atol=1e-6)
        np.testing.assert_allclose(tokens[3, ..., 1], part, atol=1e-6)
    assert min(areas) < 0.1 and max(areas) > 0.4  # they differ, and none is whole


def lambdas(count, size=(40, 60), **amounts):
    """lambda of as many batches, and whether their images were cut."""
    images, targets = examples(2, size, (2, 2), 2)

    def draw(i):
        mixed, soft = mix(images, targets, tf.stack([i, 1]), **amounts)
        whole = (mixed[0, :, :, 0] == 0) | (mixed[0, :, :, 0] == 1)
        return soft["class"][0, 0], tf.reduce_all(whole)

    stream = tf.data.Dataset.range(count).map(draw).batch(count)
    return next(stream.as_numpy_iterator())


@pytest.mark.parametrize("alpha", [0.2, 1.0, 3.0])
def test_lambda_has_the_beta_distribution(alpha):
    kept, _ = lambdas(2000, (1, 1), mixup=alpha)
    assert abs(kept.mean() - 0.5) < 0.03
    assert abs(kept.var() * 4 * (2 * alpha + 1) - 1) < 0.12


def test_the_box_has_the_share_that_lambda_says():
    """E of the cut box for lambda uniform, centre uniform, by drawing it in NumPy."""
    kept, cut = lambdas(2000, cutmix=1.0)
    random = np.random.default_rng(0)
    side = np.sqrt(1 - random.uniform(size=(200_000, 1)))
    centre = random.uniform(size=(200_000, 2))
    low, high = np.maximum(centre - side / 2, 0), np.minimum(centre + side / 2, 1)
    areas = (high - low).prod(-1)
    assert cut.all()
    assert abs((1 - kept).mean() - areas.mean()) < 0.03
    assert abs((1 - kept).std() - areas.std()) < 0.03


def test_with_both_each_has_probability_one_half():
    _, cut = lambdas(600, mixup=0.8, cutmix=1.0)
    assert 0.42 < cut.mean() < 0.58


def test_how_often_batches_are_mixed_and_cut_can_be_told():
    kept, cut = lambdas(600, mixup=0.8, cutmix=1.0, cutmix_probability=0.2)
    assert 0.14 < cut.mean() < 0.26
    kept, _ = lambdas(600, (1, 1), mixup=3.0, mix_probability=0.3)
    assert 0.64 < (kept == 1).mean() < 0.76  # the others are mixed
    for alone in ({"mixup": 0.8}, {"cutmix": 1.0}):  # there is no other to go to
        for probability in (0.0, 1.0):
            _, cut = lambdas(60, **alone, cutmix_probability=probability)
            assert cut.all() if "cutmix" in alone else not cut.any()


def test_a_batch_that_is_not_mixed_stays_to_the_pixel():
    images, targets = examples()
    seen = set()
    for i in range(20):
        mixed, soft = mix(images, targets, SEED + i, 0.8, 1.0, mix_probability=0.5)
        same = np.array_equal(soft["class"], targets["class"])
        seen.add(same)
        if same:
            np.testing.assert_array_equal(mixed, images)
            np.testing.assert_array_equal(soft["tokens"], targets["tokens"])
    assert seen == {True, False}


def test_without_either_nothing_is_mixed():
    images, targets = examples()
    mixed, soft = mix(images, targets, SEED)
    assert mixed is images and soft is targets


@pytest.mark.parametrize("amounts", [{"mixup": 0.8}, {"cutmix": 1}])
def test_an_image_alone_in_its_batch_stays_as_it_is(amounts):
    images, targets = examples(1)
    mixed, soft = mix(images + 7, targets, SEED, **amounts)
    np.testing.assert_allclose(mixed, images + 7, atol=1e-5)
    for name, target in targets.items():
        np.testing.assert_allclose(soft[name], target, atol=1e-6)


def test_the_seed_decides_the_mix():
    for amounts in ({"mixup": 1}, {"cutmix": 1}, {"mixup": 0.8, "cutmix": 1}):
        first, again, other = (
            mix(*examples(), seed, **amounts) for seed in (SEED, SEED, SEED + 1)
        )
        np.testing.assert_array_equal(first[0], again[0])
        np.testing.assert_array_equal(first[1]["tokens"], again[1]["tokens"])
        assert np.abs(first[0] - other[0]).max() > 0.01


def test_a_negative_amount_is_an_error():
    for amounts in ({"mixup": -0.1}, {"cutmix": -1.0}):
        with pytest.raises(ValueError, match="must not be negative, got"):
            mix(*examples(), SEED, **amounts)


@pytest.mark.parametrize("name", ["mix_probability", "cutmix_probability"])
def test_a_probability_must_be_one(name):
    with pytest.raises(ValueError, match=r"must be in 0\.\.1, got"):
        mix(*examples(), SEED, 0.8, 1.0, **{name: 1.2})


def test_smoothing_keeps_the_sums_of_rows():
    _, targets = examples()
    soft = smooth(targets, 0.1)
    for name, target in targets.items():
        expected = np.where(target.numpy() == 1, 0.92, 0.02)
        np.testing.assert_allclose(soft[name], expected, atol=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_the_whole_way_runs_in_a_dataset_and_repeats_itself(batch):
    """Files of any size in, batches out; rows sum to 1 after all of it."""
    preprocess = Preprocess(IMAGE, None, "bicubic")
    maps = tf.data.Dataset.from_generator(
        lambda: zip(*sparse(score_maps(6), 3), strict=True),
        output_signature=(
            tf.TensorSpec((None, None, None), tf.float16),
            tf.TensorSpec((None, None, None), tf.int32),
        ),
    )

    def load(i, maps):
        image = tf.cast(tf.fill([40 + 9 * i, 70 - 7 * i, 3], 100 + i), tf.uint8)
        image, crop = random_resized_crop(image, preprocess, tf.stack([0, i]))
        return image, crop, *maps

    def augment(step, batch):
        images, crops, values, classes = batch
        seed, count = tf.stack([0, step]), tf.shape(images)[0]
        warps = flips(seed, count) @ rand_augment_geometry(seed, count, IMAGE)
        warps = warps @ affines(seed, count, IMAGE, 20.0, 0.1, 0.3)
        targets = {
            "class": image_labels(values, classes, warps, CLASSES, crops),
            "tokens": token_labels(values, classes, warps, GRID, CLASSES, crops=crops),
        }
        targets = smooth(targets, 0.1)
        return mix(warp(images, warps), targets, seed, mixup=0.8, cutmix=1.0)

    stream = tf.data.Dataset.range(6)
    stream = tf.data.Dataset.zip(stream, maps).map(load).batch(batch)
    stream = stream.enumerate().map(augment)
    first, again = list(stream), list(stream)
    assert len(first) == 6 // batch
    for (images, targets), (same, labels) in zip(first, again, strict=True):
        np.testing.assert_array_equal(images, same)
        np.testing.assert_array_equal(targets["tokens"], labels["tokens"])
        assert images.shape == (batch, *IMAGE, 3)
        assert targets["class"].shape == (batch, CLASSES)
        assert targets["tokens"].shape == (batch, *GRID, CLASSES)
        for target in targets.values():
            np.testing.assert_allclose(target.numpy().sum(-1), 1, atol=1e-5)
