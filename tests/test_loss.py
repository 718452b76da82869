import keras
import numpy as np
import pytest
from conftest import to_numpy
from reference import softmax

from training import recipe
from training.loss import (
    LOSSES,
    BinaryCrossEntropy,
    DistillationLoss,
    SigmoidCrossEntropy,
    SoftAccuracy,
    SoftCrossEntropy,
    TokenLabelingLoss,
    classification_loss,
)

rng = np.random.default_rng(0)
CLASS, TRUTH = (rng.dirichlet(np.ones(5), 4).astype("float32") for _ in range(2))
TOKENS = rng.dirichlet(np.ones(5), (4, 2, 3)).astype("float32")
LOGITS = {
    "class": rng.normal(size=(4, 5)).astype("float32"),
    "tokens": rng.normal(size=(4, 2, 3, 5)).astype("float32"),
}
LABELS = {"class": CLASS, "truth": TRUTH, "tokens": TOKENS}


def cross_entropy(labels, logits):
    return -(labels * np.log(softmax(logits))).sum(-1)


def test_loss_is_the_weighted_sum_over_image_and_tokens():
    loss = TokenLabelingLoss(dense_weight=0.3, class_weight=2.0)
    expected = (
        2 * cross_entropy(CLASS, LOGITS["class"]).mean()
        + 0.3 * cross_entropy(TOKENS, LOGITS["tokens"]).mean()
    )
    assert float(loss(LABELS, LOGITS)) == pytest.approx(expected, rel=1e-5)


def test_one_label_an_image_is_the_label_of_its_tokens_too():
    loss = TokenLabelingLoss(dense_weight=0.5)
    tiled = np.broadcast_to(CLASS[:, None, None], TOKENS.shape)
    expected = float(loss({"class": CLASS, "tokens": tiled}, LOGITS))
    assert float(loss(CLASS, LOGITS)) == pytest.approx(expected, rel=1e-6)
    classes = np.array([3, 0, 4, 4])
    one_hot = np.eye(5, dtype="float32")[classes]
    expected = float(loss(one_hot, LOGITS))
    assert float(loss(classes, LOGITS)) == pytest.approx(expected, rel=1e-6)
    assert float(loss(classes[:, None], LOGITS)) == pytest.approx(expected, rel=1e-6)


def test_the_image_s_label_is_mixed_as_its_tokens_were():
    kept = np.full(4, 0.7, "float32")
    labels = 0.7 * CLASS + 0.3 * CLASS[::-1]
    expected = (
        cross_entropy(labels, LOGITS["class"]).mean()
        + cross_entropy(TOKENS, LOGITS["tokens"]).mean()
    )
    found = TokenLabelingLoss()(LABELS, {**LOGITS, "kept": kept})
    assert float(found) == pytest.approx(expected, rel=1e-5)
    whole = TokenLabelingLoss()(LABELS, {**LOGITS, "kept": np.ones(4, "float32")})
    assert float(whole) == pytest.approx(float(TokenLabelingLoss()(LABELS, LOGITS)))


def test_truth_weighs_half_where_both_agree_and_a_tenth_elsewhere():
    classes = CLASS.argmax(-1) + np.array([0, 1, 0, -1])
    labels = {"class": CLASS, "truth": np.eye(5, dtype="float32")[classes % 5]}
    agree = np.array([True, False, True, False])
    weight = np.where(agree, 0.5, 0.9)[:, None]
    expected = weight * CLASS + (1 - weight) * labels["truth"]
    found = TokenLabelingLoss(ground_truth=True).image_labels(labels, LOGITS)
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-6)
    alone = TokenLabelingLoss(ground_truth=True).image_labels(CLASS, LOGITS)
    np.testing.assert_array_equal(to_numpy(alone), CLASS)  # these are the truth


def test_images_can_be_weighted():
    weights = np.array([0, 1, 0, 1], "float32")
    of_class, of_tokens = TokenLabelingLoss().parts(LABELS, LOGITS)
    expected = (to_numpy(of_class) + to_numpy(of_tokens)) * weights
    found = TokenLabelingLoss()(LABELS, LOGITS, weights)
    assert float(found) == pytest.approx(expected.mean(), rel=1e-6)


def test_configuration_round_trip():
    loss = TokenLabelingLoss(0.5, 0.25, True)
    copy = TokenLabelingLoss.from_config(loss.get_config())
    assert copy.get_config() == loss.get_config()
    assert (copy.dense_weight, copy.class_weight, copy.ground_truth) == (
        0.5,
        0.25,
        True,
    )


def test_wrong_arguments_are_refused():
    with pytest.raises(ValueError, match=r"must be >= 0, got -1 and 1\.0"):
        TokenLabelingLoss(-1)
    with pytest.raises(ValueError, match=r"needs labels with .* got no 'truth'"):
        TokenLabelingLoss(ground_truth=True)({"class": CLASS}, LOGITS)
    with pytest.raises(ValueError, match=r"probabilities \(B, 5\), got \(4, 4\)"):
        TokenLabelingLoss()(CLASS[:, :4], LOGITS)
    with pytest.raises(ValueError, match=r"must have 'class', .* got 'tokens'"):
        TokenLabelingLoss()({"tokens": TOKENS}, LOGITS)
    for tokens in (TOKENS[:, :1], TOKENS[..., :4], TOKENS.reshape(4, 6, 5)):
        with pytest.raises(ValueError, match=r"of the token logits, .*, got \(4, "):
            TokenLabelingLoss()({**LABELS, "tokens": tokens}, LOGITS)


@pytest.mark.parametrize("wrong", [5, -1])
def test_a_class_that_does_not_exist_is_not_a_number(wrong):
    classes = np.array([3, wrong, 4, 4])
    assert np.isnan(float(SoftCrossEntropy()(classes, LOGITS["class"])))
    assert np.isnan(float(TokenLabelingLoss()(classes, LOGITS)))


def test_soft_cross_entropy_and_accuracy_take_classes_and_probabilities():
    logits, classes = LOGITS["class"], np.array([3, 0, 4, 4])
    keras_s = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    expected = float(keras_s(classes, logits))
    assert float(SoftCrossEntropy()(classes, logits)) == pytest.approx(expected, 1e-5)
    expected = cross_entropy(CLASS, logits).mean()
    assert float(SoftCrossEntropy()(CLASS, logits)) == pytest.approx(expected, 1e-5)
    for labels, largest in ((classes, classes), (CLASS, CLASS.argmax(-1))):
        metric = SoftAccuracy()
        metric.update_state(labels, logits)
        expected = (logits.argmax(-1) == largest).mean()
        assert float(metric.result()) == pytest.approx(expected)


def of_sigmoids(labels, logits):
    """Cross-entropy for each class, in float64 by the definition."""
    p = 1 / (1 + np.exp(-logits.astype("float64")))
    return -labels * np.log(p) - (1 - labels) * np.log(1 - p)


def test_sigmoid_loss_is_the_sum_over_the_classes():
    logits, classes = LOGITS["class"], np.array([3, 0, 4, 4])
    for labels, rows in ((CLASS, CLASS), (classes, np.eye(5)[classes])):
        expected = of_sigmoids(rows, logits).sum(-1).mean()
        found = float(SigmoidCrossEntropy()(labels, logits))
        assert found == pytest.approx(expected, rel=1e-5)


def test_binary_loss_is_their_mean_and_any_part_of_a_label_is_all_of_it():
    logits, classes = LOGITS["class"], np.array([3, 0, 4, 4])
    expected = of_sigmoids(np.eye(5)[classes], logits).mean()
    loss = BinaryCrossEntropy()
    assert float(loss(classes, logits)) == pytest.approx(expected, rel=1e-5)
    mixed = 0.9 * np.eye(5)[classes] + 0.1 * np.eye(5)[classes[::-1]]
    expected = of_sigmoids(1.0 * (mixed > 0), logits).mean()
    assert float(loss(mixed, logits)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("name", ["sigmoid", "binary"])
def test_large_logits_are_finite_and_exact(name):
    logits = np.array([[1000.0, -1000.0], [-1000.0, 1000.0], [40.0, -40.0]], "float32")
    scale = {"sigmoid": 1, "binary": 0.5}[name]
    found = classification_loss(name).call(np.zeros(3, "int64"), logits)
    expected = scale * np.array([0, 2000, 2 * np.exp(-40)])
    np.testing.assert_allclose(to_numpy(found), expected, rtol=1e-5)


@pytest.mark.parametrize("name", LOSSES)
def test_the_first_step_from_zero_logits_goes_the_right_way(name):
    """A head that starts at zero gives logits of 0, where a max(z, 0) has no slope."""
    head = keras.layers.Dense(2, use_bias=False, kernel_initializer="zeros")
    model = keras.Sequential([keras.Input((1,)), head])
    model.compile(keras.optimizers.SGD(1.0), classification_loss(name))
    model.train_on_batch(np.ones((1, 1)), np.array([1]))
    expected = {"softmax": 0.5, "sigmoid": 0.5, "binary": 0.25}[name]
    np.testing.assert_allclose(to_numpy(head.kernel), [[-expected, expected]], 1e-6)


@pytest.mark.parametrize("name", LOSSES)
def test_losses_of_labels_are_float32_and_know_no_class_that_is_not(name):
    loss, logits = classification_loss(name), LOGITS["class"]
    half = loss(CLASS, logits.astype("float16"))
    assert keras.backend.standardize_dtype(half.dtype) == "float32"
    assert float(half) == pytest.approx(float(loss(CLASS, logits)), rel=1e-3)
    assert np.isnan(float(loss(np.array([3, 5, 4, 4]), logits)))


def test_every_loss_of_a_recipe_is_built_by_its_name():
    assert tuple(LOSSES) == recipe.LOSSES
    with pytest.raises(ValueError, match=r"got 'sigmod'. Did you mean 'sigmoid'"):
        classification_loss("sigmod")


STUDENT, TEACHER = rng.normal(0, 2, (2, 4, 5)).astype("float32")
TAUGHT = {"class": LOGITS["class"], "distillation": STUDENT, "teacher": TEACHER}


def test_hard_distillation_is_the_cross_entropy_of_the_teacher_s_class():
    labels = np.eye(5)[TEACHER.argmax(-1)]
    own = cross_entropy(CLASS, LOGITS["class"]).mean()
    expected = 0.7 * own + 0.3 * cross_entropy(labels, STUDENT).mean()
    found = DistillationLoss(kind="hard", weight=0.3)(CLASS, TAUGHT)
    assert float(found) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_soft_distillation_is_the_divergence_over_all_logits_of_the_batch(temperature):
    p, q = softmax(TEACHER / temperature), softmax(STUDENT / temperature)
    divergence = (p * np.log(p / q)).sum() * temperature**2 / STUDENT.size
    own = cross_entropy(CLASS, LOGITS["class"]).mean()
    loss = DistillationLoss(kind="soft", weight=0.3, temperature=temperature)
    expected = 0.7 * own + 0.3 * divergence
    assert float(loss(CLASS, TAUGHT)) == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", ["hard", "soft"])
@pytest.mark.parametrize("name", LOSSES)
def test_without_weight_distillation_is_the_loss_of_the_labels(name, kind):
    found = DistillationLoss(name, kind, weight=0.0)(CLASS, TAUGHT)
    assert float(found) == float(classification_loss(name)(CLASS, LOGITS["class"]))


def test_a_sure_teacher_and_a_wrong_student_are_finite():
    answers = {**TAUGHT, "teacher": np.eye(5)[[0] * 4] * 1e4}
    answers["distillation"] = np.eye(5)[[1] * 4] * 1e4
    for kind, expected in (("hard", 1e4), ("soft", 1e4 / 5)):
        loss = DistillationLoss(kind=kind, weight=1.0)
        found = float(loss(CLASS, answers))
        assert found == pytest.approx(expected, rel=1e-5)


def test_distillation_configuration_round_trip_and_wrong_arguments():
    loss = DistillationLoss("binary", "soft", 0.1, 3.0)
    copy = DistillationLoss.from_config(loss.get_config())
    assert float(copy(CLASS, TAUGHT)) == float(loss(CLASS, TAUGHT))
    for arguments, message in (
        ({"kind": "sofft"}, "kind must be .* got 'sofft'. Did you mean 'soft'"),
        ({"loss": "hinge"}, "loss must be one of 'softmax', .* got 'hinge'"),
        ({"weight": 1.5}, r"weight must be in \[0, 1\], got 1.5"),
        ({"temperature": 0.0}, "temperature must be positive, got 0.0"),
    ):
        with pytest.raises(ValueError, match=message):
            DistillationLoss(**arguments)
