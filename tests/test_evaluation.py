import csv
import dataclasses
import json

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy
from PIL import Image
from sklearn import metrics
from test_data import few_scenes, tiny_segmenter, write_images

import training
from keras_vit import ViT
from training.evaluation import _judged, in_words
from training.preprocess import decode_mask
from training.report import BINS, Report, write_report
from training.report_picture import draw_calibration, draw_confusion
from training.task import IGNORED, objective, preprocess_for

COUNT = 8


@pytest.fixture(scope="module")
def answers():
    """Logits `(90, 8)` and classes; class 6 is never true, 7 never answered."""
    random = np.random.default_rng(0)
    truth = random.integers(0, 6, 90)
    truth[:4] = 7
    logits = random.normal(0, 2, (90, COUNT)).astype("float32")
    logits[np.arange(90), truth] += 2
    logits[:, 7] -= 20
    return logits, truth


def identity(*shape):
    inputs = keras.Input(shape)
    return keras.Model(inputs, keras.layers.Activation("linear")(inputs))


@pytest.fixture(scope="module")
def report(answers):
    """The answers counted in batches of 40, 40 and 10."""
    logits, truth = answers
    judge = _judged(identity(COUNT))
    report = Report(tuple("abcdefgh"))
    for start in range(0, 90, 40):
        batch = slice(start, start + 40)
        report.add(
            truth[batch], **judge.predict_on_batch([logits[batch], truth[batch]])
        )
    report.images = 90
    return report


def slow_calibration_error(probabilities, truth):
    confidence, predicted = probabilities.max(-1), probabilities.argmax(-1)
    error = 0
    for i in range(BINS):
        chosen = (confidence > i / BINS) & (confidence <= (i + 1) / BINS)
        if chosen.any():
            accuracy = (predicted == truth)[chosen].mean()
            error += chosen.mean() * abs(accuracy - confidence[chosen].mean())
    return error


def softmax(logits):
    parts = np.exp(logits - logits.max(-1, keepdims=True))
    return parts / parts.sum(-1, keepdims=True)


def test_the_figures_are_those_of_scikit_learn(answers, report):
    logits, truth = answers
    probabilities = softmax(logits.astype("float64"))
    classes = np.arange(COUNT)
    expected = {
        "loss": metrics.log_loss(truth, probabilities, labels=classes),
        "accuracy": metrics.accuracy_score(truth, logits.argmax(-1)),
        "top5_accuracy": metrics.top_k_accuracy_score(
            truth, logits, k=5, labels=classes
        ),
        "calibration_error": slow_calibration_error(probabilities, truth),
    }
    found = report.figures()
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-5, err_msg=name)
    assert 0.05 < found["calibration_error"] and found["top5_accuracy"] < 1
    confidence = probabilities.max(-1)
    for row in report.calibration():
        chosen = (confidence > row["above"]) & (confidence <= row["to"])
        assert row["answers"] == chosen.sum() > 0
        assert row["confidence"] == pytest.approx(confidence[chosen].mean(), rel=1e-5)


def test_the_classes_are_those_of_scikit_learn(answers, report):
    logits, truth = answers
    predicted = logits.argmax(-1)
    expected = metrics.precision_recall_fscore_support(
        truth, predicted, labels=np.arange(COUNT), zero_division=np.nan
    )
    matrix = metrics.confusion_matrix(truth, predicted, labels=np.arange(COUNT))
    np.testing.assert_array_equal(report.matrix(), matrix)
    rows = report.classes()
    for name, values in zip(
        ("precision", "recall", "f1", "images"), expected, strict=True
    ):
        found = [np.nan if row[name] is None else row[name] for row in rows]
        np.testing.assert_allclose(found, values, rtol=1e-12, err_msg=name)
    assert rows[6]["recall"] is rows[7]["precision"] is None
    wrong = matrix * (1 - np.eye(COUNT, dtype=int))
    assert [row["confused"] for row in rows] == wrong.max(1).tolist()
    for i, row in enumerate(rows[:6]):
        assert wrong[i, "abcdefgh".index(row["confused_with"])] == row["confused"]
    assert rows[6]["confused_with"] is None
    assert [count for *_, count in report.confusions()] == sorted(
        wrong[wrong > 0], reverse=True
    )


@pytest.mark.parametrize(
    "count, names", [(2, set()), (3, {"top2_accuracy"}), (4, {"top3_accuracy"})]
)
def test_few_classes_have_another_top_or_none(count, names):
    report = Report(tuple("abcd"[:count]))
    x = np.zeros(3, int)
    report.add(x, x, x + 0.5, x, np.array([0, count - 1, count - 2]))
    found = report.figures()
    assert found.keys() - {"loss", "accuracy", "calibration_error"} == names
    assert all(found[name] == pytest.approx(2 / 3) for name in names)
    assert in_words(found).count("top-") == len(names)


def with_ignored(data):
    """The same scenes, where class 3 is 255 in the masks."""

    def change(handle, mask):
        mask = decode_mask(mask)
        mask = tf.where(mask == 3, tf.cast(IGNORED, mask.dtype), mask)
        return handle, tf.io.encode_png(mask)

    stream = data.stream
    return dataclasses.replace(data, stream=lambda part: stream(part).map(change))


@pytest.mark.heavy
def test_pixels_are_judged_as_in_training_and_by_slow_numpy():
    model, data = tiny_segmenter(), with_ignored(few_scenes(size=32))
    report = training.examine(model, data, batch_size=5)  # 5, 5 and 2 scenes
    preprocess = preprocess_for(model, data)
    pairs = list(training.validation_batches(data, preprocess, 12).as_numpy_iterator())
    ((images, masks),) = pairs
    logits = model.predict_on_batch(images)
    counts = masks != IGNORED
    assert 0 < (~counts).sum() and report.answers == counts.sum()
    loss, scores = objective(model)
    model.compile(loss=loss, metrics=scores)
    expected = model.evaluate(images, masks, 12, verbose=0, return_dict=True)
    found = report.figures()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-4, err_msg=name)
    truth, probabilities = masks[counts], softmax(logits)[counts]
    error = slow_calibration_error(probabilities, truth)
    np.testing.assert_allclose(found["calibration_error"], error, atol=1e-5)
    predicted = probabilities.argmax(-1)
    for i, row in enumerate(report.classes()):
        a, b = truth == i, predicted == i
        iou = (a & b).sum() / (a | b).sum() if (a | b).any() else None
        assert row["iou"] == pytest.approx(iou) and row["pixels"] == a.sum()
    assert report.images == 12


@pytest.mark.heavy
def test_evaluating_leaves_a_compiled_model_as_it_was(tmp_path):
    folder = write_images(tmp_path / "images", {"a": 20, "b": 20})
    data = training.load_data(f"folder:{folder}")
    model = ViT(
        "tiny", image_size=16, patch_size=8, embed_dim=24, depth=1, num_classes=2
    )
    model.compile(keras.optimizers.SGD(0.1), "mse")
    before = model.optimizer
    found = training.evaluate(model, data, batch_size=3)
    assert model.optimizer is before and model.loss == "mse"
    batches = training.validation_batches(data, preprocess_for(model, data), 4)
    ((images, labels),) = list(batches.as_numpy_iterator())
    right = to_numpy(model(images)).argmax(-1) == labels
    assert found["accuracy"] == pytest.approx(right.mean()) and len(labels) == 4


@pytest.mark.first
def test_a_report_is_written_as_it_was_counted(report, tmp_path):
    paths = write_report(report, tmp_path / "new", model="m", data="d")
    names = ["report.json", "classes.csv", "confusion.png", "calibration.png"]
    assert [path.name for path in paths] == names
    content = json.loads(paths[0].read_text())
    assert content["data"] == "d" and content["images"] == 90
    assert content["top5_accuracy"] == report.figures()["top5_accuracy"]
    assert sum(row["answers"] for row in content["calibration"]) == 90
    i, j, times = report.confusions()[0]
    first = {"class": "abcdefgh"[i], "confused_with": "abcdefgh"[j], "times": times}
    assert content["confusions"][0] == first
    with paths[1].open() as file:
        rows = list(csv.DictReader(file))
    assert [row["class"] for row in rows] == list("abcdefgh")
    assert float(rows[0]["f1"]) == report.classes()[0]["f1"]
    assert rows[7]["precision"] == ""  # of a class that was never answered
    for path in paths[2:]:
        with Image.open(path) as image:
            assert image.format == "PNG" and min(image.size) > 400


def many(count, wrong):
    """A report of 3 images a class; the first classes are taken for the next one."""
    report = Report(tuple(f"class {i}" for i in range(count)))
    truth = np.repeat(np.arange(count), 3)
    predicted = truth + (truth < wrong)
    confidence = np.linspace(0.1, 1, len(truth))
    report.add(truth, predicted, confidence, 0.5 + 0 * truth, 0 * truth)
    report.images = len(truth)
    return report


@pytest.mark.first
@pytest.mark.parametrize("count, wrong", [(30, 3), (31, 0), (1000, 40)])
def test_pictures_of_any_number_of_classes_have_a_bounded_size(tmp_path, count, wrong):
    report = many(count, wrong)
    draw_confusion(report, tmp_path / "a.png")
    draw_calibration(report, tmp_path / "b.png")
    for name in ("a.png", "b.png"):
        with Image.open(tmp_path / name) as image:
            assert 250 < min(image.size) and max(image.size) < 1400
            blue = np.asarray(image.convert("RGB")).astype(int) - [0, 0x72, 0xB2]
    assert (np.abs(blue).sum(-1) < 60).sum() > 50  # the points of the calibration
