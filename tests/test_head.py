"""The classifier and the names of its classes. The poolings: test_transformer.py."""

import keras
import numpy as np
import pytest
from conftest import ask, first, to_numpy

from keras_vit import (
    CPVT,
    PCPVT,
    Classifier,
    LVViT,
    SemanticFPN,
    ViT,
    class_labels,
)

NAMES = ("cat", "émeu", "7")
PYRAMID = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}
PLAIN = {"image_size": 32, "embed_dim": 24, "num_heads": 3, "depth": 1}
MODELS = {
    "vit": (ViT, {"variant": "tiny", **PLAIN}),
    "distilled": (ViT, {"variant": "deit_tiny_distilled", **PLAIN}),
    "cpvt": (CPVT, {"variant": "tiny", **PLAIN}),
    "lvvit": (LVViT, {"variant": "tiny", "stem_width": 8, **PLAIN}),
    "pcpvt": (PCPVT, {"variant": "small", "depths": (1, 1, 1, 1), **PYRAMID}),
}


def build(name, **kwargs):
    model, settings = MODELS[name]
    return model(**settings, **{"num_classes": 3, "labels": NAMES, **kwargs})


def draw(*shape):
    return np.random.default_rng(0).normal(size=shape).astype("float32")


@pytest.mark.parametrize("labels", [None, list(NAMES)])
def test_a_classifier_is_a_dense(check_layer, labels):
    layer = Classifier(3, labels=labels)
    y = check_layer(layer, draw(2, 5))
    kernel, bias = layer.get_weights()
    np.testing.assert_allclose(y, draw(2, 5) @ kernel + bias, atol=1e-5)
    assert layer.get_config()["labels"] == labels
    assert layer.labels == (labels and NAMES)


@pytest.mark.parametrize("name", [x if x == "distilled" else first(x) for x in MODELS])
def test_labels_travel_in_the_file_of_the_model(tmp_path, name):
    model = build(name)
    assert class_labels(model) == NAMES
    assert class_labels(keras.Model(model.input, model.output)) == NAMES
    model.save(tmp_path / "model.keras")
    loaded = keras.saving.load_model(tmp_path / "model.keras")
    assert class_labels(loaded) == NAMES
    heads = [x for x in loaded.layers if isinstance(x, Classifier)]
    assert [x.labels for x in heads] == [NAMES] * len(heads)
    assert len(heads) == (2 if name in ("distilled", "lvvit") else 1)
    x = 99 + 50 * draw(2, 32, 32, 3)
    np.testing.assert_array_equal(ask(loaded, x), ask(model, x))


@pytest.mark.first
def test_a_model_may_have_no_labels():
    assert class_labels(build("vit", labels=None)) is None
    assert class_labels(build("vit", labels=None, num_classes=0)) is None
    pyramid = build("pcpvt", labels=None)
    assert class_labels(SemanticFPN(pyramid, 3)) is None  # its head is a convolution


@pytest.mark.parametrize("name", MODELS)
def test_labels_are_one_for_each_class(name):
    with pytest.raises(ValueError, match="name each of the 3 classes, got 2"):
        build(name, labels=["a", "b"])
    with pytest.raises(ValueError, match="must be None for num_classes=0, got "):
        build(name, num_classes=0)


@pytest.mark.parametrize("labels", ["abc", ("a", "b", 3), (b"a", b"b", b"c"), 3])
def test_labels_are_strings(labels):
    with pytest.raises(ValueError, match="labels must be a list of strings, got"):
        Classifier(3, labels=labels)


@pytest.mark.parametrize(
    "name, argument, meant",
    [
        ("vit", "drop_path", "drop_path_rate"),
        ("vit", "normalisation", "normalization"),
        ("cpvt", "peg_position", "peg_positions"),
        ("cpvt", "label", "labels"),
        ("lvvit", "token_wieght", "token_weight"),
        ("pcpvt", "num_class", "num_classes"),
        ("pcpvt", "embed_dim", "embed_dims"),
    ],
)
def test_a_misspelt_argument_is_compared_with_those_of_model_and_row(
    name, argument, meant
):
    with pytest.raises(ValueError, match=f"got '{argument}'. Did you mean '{meant}'"):
        build(name, **{argument: 0})


def test_the_bias_of_the_head_starts_where_it_is_told(tmp_path):
    model = ViT("tiny", image_size=16, depth=1, num_classes=3, head_bias=-1.1)
    bias = to_numpy(model.get_layer("head").bias)
    np.testing.assert_allclose(bias, [-1.1] * 3, rtol=1e-6)
    model.save(tmp_path / "model.keras")
    keras.saving.load_model(tmp_path / "model.keras")
