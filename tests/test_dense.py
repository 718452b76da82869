import zipfile

import keras
import numpy as np
import pytest
from conftest import first, to_numpy
from keras import layers

from keras_vit import CPVT, PCPVT, LVViT, ViT
from keras_vit.embedding import PixelNormalization, Preprocess
from training.dense import dense_classifier, dense_scores, load_annotator

pytestmark = pytest.mark.heavy  # many networks, and JAX compiles each
SIZE = (32, 48)
TINY = {"image_size": SIZE, "patch_size": 8, "embed_dim": 24, "depth": 1}
PYRAMID = {
    "embed_dims": (8, 16, 24, 32),
    "depths": (1, 1, 1, 1),
    "num_heads": (1, 1, 1, 1),
}


def network(classes=3, size=SIZE, pool="GlobalAveragePooling2D", end=(), **kwargs):
    """A convolutional classifier with maps of 4 x 6 places; `end` follows its Dense."""
    images = keras.Input((*size, 3))
    x = layers.Rescaling(1 / 255)(images)
    x = layers.Conv2D(8, 8, 8, activation="relu", name="last")(x)
    x = getattr(layers, pool)(name="pooled", **kwargs)(x)
    x = layers.Flatten()(x)
    x = layers.Dense(classes, name="scores")(layers.Dropout(0.5)(x))
    for layer in end:
        x = layer(x)
    return keras.Model(images, x, name="network")


def random_weights(model):
    """Every weight at random, so that no head is zero."""
    rng = np.random.default_rng(0)
    model.set_weights(
        [np.abs(rng.normal(0, 0.3, w.shape)) * _sign(rng, w) for w in model.weights]
    )
    return model


def _sign(rng, weight):
    return 1 if "variance" in weight.name else rng.choice([-1, 1], weight.shape)


def pictures(size=SIZE, count=2):
    shape = (count, *size, 3)
    return np.random.default_rng(1).uniform(0, 255, shape).astype("float32")


def ask(model, images):
    return to_numpy(model.predict_on_batch(images))


def softmax(x):
    x = np.exp(x - x.max(-1, keepdims=True))
    return x / x.sum(-1, keepdims=True)


def test_mean_of_the_dense_logits_is_the_pooled_logit():
    teacher = random_weights(network())
    scores, are_logits = dense_scores(teacher)
    logits = ask(scores, pictures())
    assert are_logits and logits.shape == (2, 4, 6, 3) and np.ptp(logits) > 1
    expected = ask(teacher, pictures())
    np.testing.assert_allclose(logits.mean((1, 2)), expected, rtol=1e-4, atol=1e-5)


def test_logits_become_probabilities_and_probabilities_stay():
    logits = random_weights(network())
    ends = {
        "softmax layer": [layers.Softmax()],
        "activation": [layers.Dropout(0.1), layers.Activation("softmax")],
        "float32 after mixed precision": [
            layers.Activation("linear"),
            layers.Activation("softmax", dtype="float32"),
        ],
        "shape": [layers.Softmax(), layers.Reshape((1, 1, 3)), layers.Flatten()],
    }
    expected = softmax(ask(dense_scores(logits)[0], pictures()))
    np.testing.assert_allclose(
        ask(dense_classifier(logits), pictures()), expected, atol=1e-6
    )
    for end in ends.values():
        teacher = network(end=end)
        teacher.set_weights(logits.get_weights())
        assert not dense_scores(teacher)[1]
        found = ask(dense_classifier(teacher), pictures())
        np.testing.assert_allclose(found, expected, atol=1e-6)


def assert_each_place_is_asked_as_if_it_filled_the_map(teacher, pool, images):
    """The pooling of a map of one vector is that vector."""
    last = teacher.get_layer(pool).input
    dense = dense_classifier(teacher)
    both = keras.Model(teacher.inputs[0], [last, dense.output])
    maps, found = map(to_numpy, both.predict_on_batch(images))
    assert found.shape[:3] == maps.shape[:3] and found.dtype == "float32"
    assert np.abs(found - found.mean((1, 2), keepdims=True)).max() > 0.01
    vectors = maps.reshape(-1, 1, 1, maps.shape[-1])
    filled = np.broadcast_to(vectors, (len(vectors), *maps.shape[1:]))
    after = keras.Model(last, teacher.outputs[0])
    expected = ask(after, np.ascontiguousarray(filled))
    np.testing.assert_allclose(found.reshape(expected.shape), expected, atol=1e-5)


@pytest.mark.parametrize(
    "options",
    [
        {"pool": "GlobalMaxPooling2D"},
        {"keepdims": True},
        {"end": [layers.ReLU(), layers.BatchNormalization(), layers.Dense(5)]},
    ],
    ids=["maximum", "keepdims", "two Dense"],
)
def test_the_tail_is_applied_at_each_place(options):
    end = [type(x).from_config(x.get_config()) for x in options.get("end", [])]
    end = [*end, layers.Softmax()]
    teacher = random_weights(network(**{**options, "end": end}))
    assert_each_place_is_asked_as_if_it_filled_the_map(teacher, "pooled", pictures())


@pytest.mark.parametrize(
    "name, pool, options",
    [
        first("MobileNetV2", "global_average_pooling2d", {"alpha": 0.35}),
        first("MobileNetV3Small", "global_average_pooling2d", {}),
    ],
)
def test_networks_of_keras_applications_are_teachers(name, pool, options):
    """The second has poolings in side branches too, and keepdims in the last one."""
    size = (64, 96)
    build = getattr(keras.applications, name)
    teacher = build(weights=None, input_shape=(*size, 3), classes=7, **options)
    pools = [x.name for x in teacher.layers if x.name.startswith(pool)]
    for layer in teacher.layers:
        if isinstance(layer, layers.BatchNormalization):
            layer.momentum = 0.0
    teacher(pictures(size), training=True)  # statistics that let something through
    assert_each_place_is_asked_as_if_it_filled_the_map(
        teacher, pools[-1], pictures(size)
    )


def test_a_network_in_a_network_is_a_teacher_where_the_pooling_is_outside():
    images = keras.Input((*SIZE, 3))
    x = layers.Conv2D(6, 8, 8)(images)
    backbone = keras.Model(images, x, name="backbone")
    head = [layers.GlobalAveragePooling2D(name="pooled"), layers.Dense(4)]
    teacher = random_weights(
        keras.Sequential([keras.Input((*SIZE, 3)), backbone, *head])
    )
    scores, _ = dense_scores(teacher)
    expected = ask(teacher, pictures())
    found = ask(scores, pictures()).mean((1, 2))
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-3)


OURS = {
    "class": (lambda: ViT("tiny", num_registers=2, num_classes=5, **TINY), 3),
    "mean": (
        lambda: ViT("tiny", pool="mean", num_registers=2, num_classes=5, **TINY),
        2,
    ),
    "distilled": (lambda: ViT("deit_small_distilled", num_classes=5, **TINY), 2),
    "norm after pool": (
        lambda: ViT("deit_tiny", pool="mean", num_classes=5, **TINY),
        0,
    ),
    "cpvt": (lambda: CPVT("tiny", num_classes=5, **TINY, peg_positions=(-1, 0)), 1),
}


@pytest.mark.parametrize("name", OURS)
def test_the_heads_of_our_models_are_asked_about_patch_tokens(name):
    build, num_prefix = OURS[name]
    teacher = random_weights(build())
    tokens = to_numpy(
        keras.Model(teacher.input, teacher.get_layer("pool").input).predict_on_batch(
            pictures()
        )
    )[:, num_prefix:]
    assert tokens.shape == (2, 24, 24)
    if name == "norm after pool":
        tokens = to_numpy(teacher.get_layer("norm")(tokens))
    names = [x.name for x in teacher.layers if x.name in ("head", "head_dist")]
    assert len(names) == (2 if name == "distilled" else 1)
    logits = np.mean([to_numpy(teacher.get_layer(x)(tokens)) for x in names], axis=0)
    found = ask(dense_classifier(teacher), pictures())
    np.testing.assert_allclose(
        found, softmax(logits).reshape(2, 4, 6, 5), rtol=1e-3, atol=1e-5
    )


def test_the_grid_of_a_pyramid_is_that_of_its_last_stage():
    teacher = random_weights(
        PCPVT("small", image_size=(64, 96), num_classes=5, **PYRAMID)
    )
    scores, _ = dense_scores(teacher)
    logits = ask(scores, pictures((64, 96)))
    assert logits.shape == (2, 2, 3, 5) and np.ptp(logits) > 0.1
    expected = ask(teacher, pictures((64, 96)))
    np.testing.assert_allclose(logits.mean((1, 2)), expected, rtol=1e-3, atol=1e-4)


def test_a_token_head_is_the_answer_where_there_is_one():
    teacher = LVViT("small", num_classes=5, stem_width=8, num_heads=3, **TINY)
    random_weights(teacher)
    head = keras.Model(teacher.input, teacher.get_layer("token_head").output)
    found = ask(dense_classifier(teacher), pictures())
    np.testing.assert_allclose(found, softmax(ask(head, pictures())), atol=1e-5)


def test_a_model_of_any_size_answers_at_any_size():
    options = {**TINY, "image_size": None}
    dense = dense_classifier(CPVT("tiny", num_classes=5, **options))
    assert ask(dense, pictures((30, 41))).shape == (2, 4, 6, 5)
    assert ask(dense, pictures((16, 8))).shape == (2, 2, 1, 5)


def bright_or_dark(size=SIZE):
    """A teacher that answers "bright" (class 1) where the 8 x 8 pixels are."""
    images = keras.Input((*size, 3))
    x = layers.AveragePooling2D(8)(layers.Rescaling(1 / 255)(images))
    x = layers.GlobalAveragePooling2D()(x)
    teacher = keras.Model(images, layers.Dense(2, name="scores")(x))
    kernel = np.array([[0.0, 10.0]] * 3, "float32")
    teacher.get_layer("scores").set_weights([kernel, np.array([0.0, -15.0])])
    return teacher


def test_the_map_is_the_right_way_up():
    images = np.zeros((1, *SIZE, 3), "float32")
    images[:, :8, -16:] = 255  # top right
    expected = np.zeros((1, 4, 6))
    expected[:, 0, -2:] = 1
    found = ask(dense_classifier(bright_or_dark()), images)
    np.testing.assert_allclose(found[..., 1], expected, atol=1e-5)


def test_a_teacher_stays_as_it_was():
    teacher = random_weights(ViT("tiny", num_classes=5, **TINY))
    before = ask(teacher, pictures())
    first = ask(dense_classifier(teacher), pictures())
    np.testing.assert_array_equal(ask(dense_classifier(teacher), pictures()), first)
    np.testing.assert_array_equal(ask(teacher, pictures()), before)
    cut = keras.Model(teacher.input, teacher.get_layer("head").output)
    np.testing.assert_array_equal(ask(cut, pictures()), before)


def without_pooling():
    images = keras.Input((8, 8, 3))
    x = layers.Dense(4, name="answer")(layers.Flatten(name="flat")(images))
    return keras.Model(images, x, name="flattened")


def with_two_outputs():
    images = keras.Input((8, 8, 3))
    x = layers.GlobalAveragePooling2D()(images)
    return keras.Model(images, [layers.Dense(4)(x), layers.Dense(4)(x)])


def nested():
    return keras.Sequential([keras.Input((*SIZE, 3)), network()])


def features(variant, **options):
    return ViT(variant, **{**TINY, **options}, num_classes=0)


def without_a_grid():
    images = keras.Input((8, 3))
    x = layers.Reshape((8, 1, 3))(images)
    return keras.Model(images, layers.Dense(4)(layers.GlobalAveragePooling2D()(x)))


def channels_first():
    images = keras.Input((*SIZE, 3))
    x = layers.Permute((3, 1, 2))(images)
    x = layers.GlobalAveragePooling2D(data_format="channels_first", name="pooled")(x)
    return keras.Model(images, layers.Dense(4)(x))


def hidden_patches():
    """Tokens and a pooling of ours, but no grid by its name."""
    from keras_vit.embedding import PatchEmbedding, PrefixTokens
    from keras_vit.head import MeanPool

    images = keras.Input((*SIZE, 3))
    x = PrefixTokens(class_token=False)(PatchEmbedding(8, 8, name="cells")(images))
    return keras.Model(images, layers.Dense(4)(MeanPool(name="pool")(x)))


@pytest.mark.first
@pytest.mark.parametrize(
    "build, sentence",
    [
        (without_pooling, "no such pooling, its end is .*Flatten 'flat', Dense 'answ"),
        (nested, "not of a model in it.* ends in Functional 'network'"),
        (lambda: network(end=[layers.Activation("sigmoid")]), "the sigmoid of Activ"),
        (lambda: network(end=[layers.ReLU(name="end")]), "ends in ReLU 'end'"),
        (lambda: features("tiny"), "ends in TokenPool 'pool'"),
        (lambda: features("deit_tiny", pool="mean"), "ends in LayerNormalization"),
        (lambda: features("deit_tiny_distilled"), "'pool' and TokenPool 'pool_dist'"),
        (
            lambda: ViT("tiny", pool="attention", num_classes=5, **TINY),
            "pool='attention' has no classifier of single tokens",
        ),
        (with_two_outputs, r"gives \(None, 4\), \(None, 4\)"),
        (lambda: network(classes=1), r"gives \(None, 1\)"),
        (without_a_grid, r"must take images \(B, H, W, 3\), .* takes \(None, 8, 3\)"),
        (channels_first, "'channels_last', got 'channels_first' in 'pooled'"),
        (hidden_patches, "must have a node 'patches' or 'stage3_patches'.*cells"),
        (lambda: keras.Sequential([layers.Dense(2)]), "one that is built; got the Seq"),
    ],
)
def test_what_is_no_teacher_is_told_why(build, sentence):
    with pytest.raises(ValueError, match=sentence):
        dense_classifier(build())


def test_an_annotator_names_the_best_classes_first(tmp_path):
    teacher = random_weights(network(classes=6))
    teacher.save(tmp_path / "teacher.keras")
    annotator = load_annotator(tmp_path / "teacher.keras", 4, None, None)
    values, classes = map(to_numpy, annotator.predict_on_batch(pictures()))
    every = ask(dense_classifier(teacher), pictures())
    assert values.shape == classes.shape == (2, 4, 6, 4) and classes.dtype == "int32"
    np.testing.assert_allclose(values, -np.sort(-every)[..., :4], atol=1e-6)
    np.testing.assert_allclose(
        np.take_along_axis(every, classes, -1), values, atol=1e-6
    )
    assert Preprocess.of_model(annotator) == Preprocess(SIZE, None, "bilinear")


def test_an_annotator_normalises_for_a_teacher_that_does_not(tmp_path):
    plain = random_weights(network())
    images = keras.Input((*SIZE, 3))
    x = PixelNormalization("imagenet", SIZE, 0.9, "bicubic")(images)
    for layer in plain.layers[1:]:
        x = layer(x)
    keras.Model(images, x).save(tmp_path / "own.keras")
    plain.save(tmp_path / "plain.keras")
    own = load_annotator(tmp_path / "own.keras", None, None, None)
    other = load_annotator(tmp_path / "plain.keras", None, "imagenet", None)
    raw = load_annotator(tmp_path / "plain.keras", None, None, None)
    found = [to_numpy(x.predict_on_batch(pictures())[0]) for x in (own, other, raw)]
    np.testing.assert_allclose(found[0], found[1], atol=1e-6)
    assert np.abs(found[0] - found[2]).max() > 0.01
    assert Preprocess.of_model(own) == Preprocess(SIZE, None, "bicubic")
    with pytest.raises(ValueError, match=r"must be None for .* itself, got 'imagenet'"):
        load_annotator(tmp_path / "own.keras", None, "imagenet", None)
    with pytest.raises(ValueError, match="got 'caffe'"):
        load_annotator(tmp_path / "plain.keras", None, "caffe", None)


@pytest.mark.first
def test_an_annotator_needs_a_size_where_any_is_taken(tmp_path):
    network(size=(None, None)).save(tmp_path / "any.keras")
    network().save(tmp_path / "fixed.keras")
    annotator = load_annotator(tmp_path / "any.keras", None, None, (16, 40))
    assert annotator.input_shape == (None, 16, 40, 3)
    assert annotator.outputs[0].shape == (None, 2, 5, 3)
    with pytest.raises(ValueError, match="image_size must be given for 'network'"):
        load_annotator(tmp_path / "any.keras", None, None, None)
    with pytest.raises(ValueError, match=r"\(32, 48\) with None for any, got \(16"):
        load_annotator(tmp_path / "fixed.keras", None, None, (16, 48))
    load_annotator(tmp_path / "fixed.keras", None, None, SIZE)


@pytest.mark.first
def test_an_annotator_needs_a_whole_file(tmp_path):
    path = tmp_path / "teacher.keras"
    with pytest.raises(
        FileNotFoundError, match=r"There is no model file .*teacher\.keras"
    ):
        load_annotator(path, None, None, None)
    network().save(path)
    with pytest.raises(ValueError, match=r"top must be in 1\.\.3, .*, got 4"):
        load_annotator(path, 4, None, None)
    whole = path.read_bytes()
    path.write_bytes(whole[:100])
    with pytest.raises(ValueError, match="it is damaged or another kind"):
        load_annotator(path, None, None, None)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("config.json", "{}")
    with pytest.raises(ValueError, match=r"teacher\.keras cannot be loaded: "):
        load_annotator(path, None, None, None)
