import dataclasses

import numpy as np
import pytest
import tensorflow as tf

from keras_vit.embedding import Preprocess
from training import from_arrays, load_data, training_batches, validation_batches
from training.data import subset

PREPROCESS = Preprocess((5, 7), None, "bilinear")  # of the arrays below: no resizing
RNG = np.random.default_rng(0)
LABELS = np.arange(60) % 3


def images(*shape):
    return RNG.integers(0, 256, shape).astype("uint8")


def pixels(batches):
    pairs = list(batches.as_numpy_iterator())
    return np.concatenate([x for x, _ in pairs]), np.concatenate([y for _, y in pairs])


@pytest.mark.parametrize("channels", [(), (1,), (3,)])
def test_pixels_arrive_exactly(channels):
    train, held_out = images(20, 5, 7, *channels), images(6, 5, 7, *channels)
    classes = np.arange(20) % 2
    data = from_arrays((train, classes), (held_out, classes[:6]), labels=("cat", "dog"))
    assert data.labels == ("cat", "dog") and data.image_size == (5, 7)
    assert data.sizes == {"train": 20, "validation": 6}
    found, labels = pixels(validation_batches(data, PREPROCESS, 4))
    whole = np.broadcast_to(held_out.reshape(6, 5, 7, -1), (6, 5, 7, 3))
    np.testing.assert_array_equal(found, whole)
    np.testing.assert_array_equal(labels, classes[:6])
    found, labels = pixels(training_batches(data, PREPROCESS, 20, epochs=1))
    whole = np.broadcast_to(train.reshape(20, 5, 7, -1), (20, 5, 7, 3))
    order = [next(i for i in range(20) if (whole[i] == x).all()) for x in found]
    assert sorted(order) == list(range(20)) != order
    np.testing.assert_array_equal(labels, classes[order])


def test_no_damage_is_looked_for_where_none_can_be():
    """The batches are those of a look, and do not end with the first epoch."""
    data = from_arrays((images(60, 5, 7), LABELS))
    looked = dataclasses.replace(data, whole=False)
    for first_step in (0, 5):
        ways = {"seed": 1, "epochs": 2, "first_step": first_step}
        whole, other = (
            training_batches(x, PREPROCESS, 8, damaged=never, **ways)
            for x in (data, looked)
        )
        assert whole.cardinality() == other.cardinality() == tf.data.UNKNOWN_CARDINALITY
        found = pixels(whole)
        assert len(found[1]) == 8 * (12 - first_step)
        for x, y in zip(found, pixels(other), strict=True):
            np.testing.assert_array_equal(x, y)
    ways = (validation_batches(x, PREPROCESS, 8, damaged=never) for x in (data, looked))
    for x, y in zip(*map(pixels, ways), strict=True):
        np.testing.assert_array_equal(x, y)
    assert "IgnoreErrors" not in pipeline(data) and "IgnoreErrors" in pipeline(looked)


def never(numbers):
    raise AssertionError(numbers)


def pipeline(data):
    """The stages of the training, as TensorFlow writes them."""
    batches = training_batches(data, PREPROCESS, 8, epochs=1, damaged=never)
    graph = tf.raw_ops.DatasetToGraphV2(input_dataset=batches._variant_tensor)
    return str(graph.numpy())


def test_a_share_of_each_class_is_held_out():
    data = from_arrays((images(60, 5, 7), LABELS), 0.25)
    assert data.sizes == {"train": 45, "validation": 15}
    assert data.labels == ("0", "1", "2")
    held_out = [int(x) for _, x in data.stream("validation").as_numpy_iterator()]
    assert np.bincount(held_out).tolist() == [5, 5, 5]
    handles = {x for x, _ in data.stream("validation").as_numpy_iterator()}
    assert not handles & {x for x, _ in data.stream("train").as_numpy_iterator()}
    assert from_arrays((images(60, 5, 7), LABELS)).sizes["validation"] == 6


def test_arrays_are_no_constants_of_the_graph():
    train = images(400, 50, 50, 3)
    data = subset(from_arrays((train, np.arange(400) % 2)), 100, seed=0)
    batches = training_batches(data, PREPROCESS, 10, epochs=1)
    graph = batches._as_serialized_graph().numpy()
    assert len(graph) < train.nbytes / 10


def test_the_fingerprint_is_that_of_pixels_classes_and_split():
    x = images(60, 5, 7)
    one = from_arrays((x, LABELS)).fingerprint
    assert from_arrays((x.copy(), LABELS.astype("uint8"))).fingerprint == one
    other = x.copy()
    other[3, 2, 1] ^= 1
    for changed in (
        from_arrays((other, LABELS)),
        from_arrays((x, (LABELS + 1) % 3)),
        from_arrays((x, LABELS), 0.2),
        from_arrays((x, LABELS), labels=("a", "b", "c")),
    ):
        assert changed.fingerprint != one


def test_a_file_of_arrays_is_data_by_name(tmp_path):
    arrays = {"x_train": images(60, 5, 7), "y_train": LABELS[:, None]}
    np.savez(tmp_path / "some.npz", **arrays)
    data = load_data(f"arrays:{tmp_path / 'some.npz'}")
    assert data.sizes == {"train": 54, "validation": 6}
    more = {"x_test": images(9, 5, 7), "y_test": LABELS[:9]}
    np.savez_compressed(tmp_path / "all.npz", **more, **arrays)
    data = load_data(f"arrays:{tmp_path / 'all.npz'}")
    assert data.sizes == {"train": 60, "validation": 9}
    found, labels = pixels(validation_batches(data, PREPROCESS, 9))
    np.testing.assert_array_equal(found[..., 0], more["x_test"])
    np.testing.assert_array_equal(labels, more["y_test"])


def test_a_file_of_other_arrays_is_refused(tmp_path):
    path = tmp_path / "x.npz"
    with pytest.raises(FileNotFoundError, match="There is no file"):
        load_data(f"arrays:{path}")
    np.savez(path, x_train=images(60, 5, 7), x_test=images(9, 5, 7))
    with pytest.raises(
        ValueError, match=r"hold x_train and y_train, .* got x_train, x_"
    ):
        load_data(f"arrays:{path}")
    np.savez(path, x_train=np.array([{}]), y_train=LABELS)
    with pytest.raises(ValueError, match=r"must be a whole npz file \("):
        load_data(f"arrays:{path}")
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(ValueError, match=r"must be a whole npz file \("):
        load_data(f"arrays:{path}")


GOOD = images(60, 5, 7), LABELS


@pytest.mark.parametrize(
    "train, validation, labels, rule",
    [
        ((GOOD[0] / 255, LABELS), 0.1, None, r"uint8 of 0..255 .* got float64 \(60"),
        ((images(60, 35), LABELS), 0.1, None, r"\(N, H, W\), .* got uint8 \(60, 35\)"),
        ((images(60, 5, 7, 4), LABELS), 0.1, None, r"got uint8 \(60, 5, 7, 4\)"),
        (
            (GOOD[0], LABELS * 1.0),
            0.1,
            None,
            r"be integers \(60,\), .* got float64",
        ),
        ((GOOD[0], LABELS[:9]), 0.1, None, r"must be integers \(60,\), .* \(9,\)"),
        ((GOOD[0], LABELS - 1), 0.1, None, r"must be >= 0, got -1"),
        (GOOD, 0.1, ("a", "b"), r"up to 2, the highest of 'arrays'; got 2"),
        ((GOOD[0], LABELS * 0), 0.1, None, r"at least 2 .* got 1"),
        (GOOD, 1.5, None, r"or a share in \(0, 1\), got 1.5"),
        (GOOD, 0.01, None, r"at least 100 images of some class"),
        (GOOD, (images(9, 7, 5), LABELS[:9]), None, r"of one shape, got"),
        (GOOD, (images(0, 5, 7), LABELS[:0]), None, r"validation must have images"),
    ],
)
def test_what_are_no_images_with_classes_is_refused(train, validation, labels, rule):
    with pytest.raises(ValueError, match=rule):
        from_arrays(train, validation, labels)
