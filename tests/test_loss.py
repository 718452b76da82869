import keras
import numpy as np
import pytest
from conftest import to_numpy
from reference import softmax

from training.loss import SoftAccuracy, SoftCrossEntropy, TokenLabelingLoss

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
