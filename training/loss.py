"""Losses of soft labels, of token labels, and of a teacher's answers.

Shapes in this file:
    B batch, h x w patch grid, N = h * w tokens, C classes.
"""

import keras
from keras import ops

from keras_vit.encoder import unknown
from training.recipe_parts import DISTILLATIONS

serializable = keras.saving.register_keras_serializable("training")


def soft_labels(labels, num_classes):
    """Rows of probabilities from labels of either kind.

    Args:
        labels: Classes `(B,)` or `(B, 1)`, or probabilities `(B, C)`.
        num_classes: C.

    Returns:
        float32 `(B, C)`. A class outside of 0..C - 1 makes its row, and every loss that
        it is in, not a number.

    Raises:
        ValueError: If they have another shape.
    """
    if len(labels.shape) == 2 and labels.shape[-1] == num_classes > 1:
        return ops.cast(labels, "float32")
    if len(labels.shape) != 1 and tuple(labels.shape[1:]) != (1,):
        raise ValueError(
            f"Labels must be classes (B,) or (B, 1), or probabilities (B, {num_classes}"
            f"), got {tuple(labels.shape)}."
        )
    labels = ops.cast(ops.reshape(labels, (-1,)), "int32")
    known = ops.logical_and(labels >= 0, labels < num_classes)
    rows = ops.one_hot(ops.where(known, labels, 0), num_classes, dtype="float32")
    return ops.where(known[:, None], rows, float("nan"))


def cross_entropy(labels, logits):
    """Minus the sum over classes of label * log softmax(logits), in float32.

    Args:
        labels: Probabilities `(..., C)`.
        logits: `(..., C)`.

    Returns:
        `(...)`.
    """
    logits = ops.cast(logits, "float32")
    return -ops.sum(labels * ops.log_softmax(logits, axis=-1), axis=-1)


def binary_cross_entropies(labels, logits):
    """For each class: - y log sigmoid(z) - (1 - y) log sigmoid(-z), in float32.

    Args:
        labels: y, 0 to 1, `(..., C)`.
        logits: z, `(..., C)`.

    Returns:
        `(..., C)`.
    """
    logits = ops.cast(logits, "float32")
    yes, no = ops.log_sigmoid(logits), ops.log_sigmoid(-logits)  # no logit overflows
    return -labels * yes - (1 - labels) * no


@serializable
class SoftCrossEntropy(keras.Loss):
    """Cross-entropy of logits with classes or with probabilities.

    Call arguments:
        y_true: Classes `(B,)`, or probabilities `(B, C)` as MixUp makes them.
        y_pred: Logits `(B, C)`.
    """

    def call(self, y_true, y_pred):
        return cross_entropy(soft_labels(y_true, y_pred.shape[-1]), y_pred)


@serializable
class SigmoidCrossEntropy(keras.Loss):
    """Cross-entropy of the sigmoid of each logit, summed over the classes.

    What is trained by it ranks the classes as any other classifier, by its logits, and
    is served with the softmax of them as any other.

    Source: `sigmoid_xent` of https://github.com/google-research/big_vision, which
    trained the models of Steiner et al. 2022, "How to train your ViT?",
    https://arxiv.org/abs/2106.10270.

    Call arguments:
        y_true: Classes `(B,)`, or probabilities `(B, C)` as MixUp makes them.
        y_pred: Logits `(B, C)`.
    """

    def call(self, y_true, y_pred):
        labels = soft_labels(y_true, y_pred.shape[-1])
        return ops.sum(binary_cross_entropies(labels, y_pred), axis=-1)


@serializable
class BinaryCrossEntropy(keras.Loss):
    """Cross-entropy of the sigmoid of each logit, the mean over the classes.

    A class that has any part of the label counts as 1: both of a mixed image do. So
    labels must not be smoothed, for then all would.

    Source: Touvron et al. 2022, "DeiT III: Revenge of the ViT", section 3,
    https://arxiv.org/abs/2204.07118; in the code, https://github.com/facebookresearch/
    deit, the option `bce_loss` of `engine.py`.

    Call arguments:
        y_true: Classes `(B,)`, or probabilities `(B, C)` as MixUp makes them.
        y_pred: Logits `(B, C)`.
    """

    def call(self, y_true, y_pred):
        labels = soft_labels(y_true, y_pred.shape[-1])
        whole = ops.where(labels > 0, 1.0, labels)  # not a number stays so
        return ops.mean(binary_cross_entropies(whole, y_pred), axis=-1)


LOSSES = {  # by the names of `Recipe.loss`
    "softmax": SoftCrossEntropy,
    "sigmoid": SigmoidCrossEntropy,
    "binary": BinaryCrossEntropy,
}


def classification_loss(name="softmax"):
    """The loss of a classifier by its name, a key of `LOSSES`.

    Raises:
        ValueError: If it is none.
    """
    if name not in LOSSES:
        raise ValueError(unknown("loss", name, LOSSES))
    return LOSSES[name]()


@serializable
class DistillationLoss(keras.Loss):
    """What the labels say of the class head, and a teacher of the distillation head.

        (1 - weight) * L(class logits, label) + weight * D(distillation logits, teacher)

    with, for teacher and student logits z_t and z_s,

        hard:  D = cross-entropy of z_s with the class argmax z_t, never smoothed (3)
        soft:  D = tau^2 / C * KL(softmax(z_t / tau) || softmax(z_s / tau))       (2)

    Source: Touvron et al. 2021, "Training data-efficient image transformers &
    distillation through attention", equations 2 and 3,
    https://arxiv.org/abs/2012.12877.
    Differs from equation 2 in 1 / C, as the paper's own code does: that divides the sum
    of a batch by the number of its logits, B C, so the teacher says C times less.

    Args:
        loss: L, a key of `LOSSES`.
        kind: `"hard"` or `"soft"`.
        weight: The teacher's part, alpha, in [0, 1].
        temperature: tau, positive; only for `"soft"`.

    Call arguments:
        y_true: Classes `(B,)`, or probabilities `(B, C)` as MixUp makes them.
        y_pred: Dictionary of the logits `"class"`, `"distillation"` and `"teacher"`,
            each `(B, C)`.

    Raises:
        ValueError: If a name is unknown or a number is out of its range.
    """

    def __init__(
        self, loss="softmax", kind="hard", weight=0.5, temperature=1.0, **kwargs
    ):
        super().__init__(**kwargs)
        self.of_labels = classification_loss(loss)
        if kind not in DISTILLATIONS:
            raise ValueError(unknown("kind", kind, DISTILLATIONS))
        if not 0 <= weight <= 1:
            raise ValueError(f"weight must be in [0, 1], got {weight!r}.")
        if not temperature > 0:
            raise ValueError(f"temperature must be positive, got {temperature!r}.")
        self.loss = loss
        self.kind = kind
        self.weight = weight
        self.temperature = temperature

    def get_config(self):
        names = ("loss", "kind", "weight", "temperature")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def call(self, y_true, y_pred):
        of_class, of_teacher = self.parts(y_true, y_pred)
        return (1 - self.weight) * of_class + self.weight * of_teacher

    def parts(self, y_true, y_pred):
        """L and D of each image, two `(B,)`."""
        of_class = self.of_labels.call(y_true, y_pred["class"])
        student = ops.cast(y_pred["distillation"], "float32")
        teacher = ops.stop_gradient(ops.cast(y_pred["teacher"], "float32"))
        num_classes = student.shape[-1]
        if self.kind == "hard":
            labels = ops.one_hot(ops.argmax(teacher, axis=-1), num_classes)
            return of_class, cross_entropy(labels, student)
        log_teacher = ops.log_softmax(teacher / self.temperature, axis=-1)
        log_student = ops.log_softmax(student / self.temperature, axis=-1)
        divergence = ops.exp(log_teacher) * (log_teacher - log_student)
        scale = self.temperature**2 / num_classes
        return of_class, scale * ops.sum(divergence, axis=-1)


@serializable
class SoftAccuracy(keras.metrics.Mean):
    """Part of the images whose largest logit is that of their class.

    Call arguments:
        y_true: Classes `(B,)`, or probabilities `(B, C)`, of which the largest counts.
        y_pred: Logits `(B, C)`.
    """

    def update_state(self, y_true, y_pred, sample_weight=None):
        labels = soft_labels(ops.convert_to_tensor(y_true), y_pred.shape[-1])
        right = ops.equal(ops.argmax(labels, -1), ops.argmax(y_pred, -1))
        return super().update_state(ops.cast(right, self.dtype), sample_weight)


@serializable
class CountedAccuracy(SoftAccuracy):
    """The same of images that weigh differently in the loss, each counting once.

    An image without weight, such as one that fills up a batch, does not count.
    """

    def update_state(self, y_true, y_pred, sample_weight=None):
        if sample_weight is not None:
            sample_weight = ops.cast(ops.not_equal(sample_weight, 0), self.dtype)
        return super().update_state(y_true, y_pred, sample_weight)


@serializable
class TokenLabelingLoss(keras.Loss):
    """Cross-entropy of the image's label and of a label for every token.

        class_weight * CE(class logits, label)
            + dense_weight * mean over tokens of CE(token logits, label of the token)

    Where MixToken has mixed the images, the label of image i is
    lambda' * label_i + (1 - lambda') * label_(B-1-i); the token logits are back with
    their own images, so their labels are not mixed.

    With `ground_truth` the image's label is an annotator's, corrected by the true one:
    r * label + (1 - r) * truth, r = 0.5 where both have the same largest class, else
    0.9. That is what the paper's code computes; a comment in it says the opposite, that
    the truth weighs more where they differ.

    Source: Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better
    Vision Transformers", https://arxiv.org/abs/2104.10858, and its
    code, whose default weights these are.

    Args:
        dense_weight: Weight of the tokens, beta of the paper; >= 0.
        class_weight: Weight of the image; >= 0.
        ground_truth: Whether the image's label is corrected by the true one.

    Call arguments:
        y_true: Classes `(B,)`, or probabilities `(B, C)`: the true label of the image,
            and of each of its tokens; or a dictionary of float32 probabilities:
            `"class"` `(B, C)`, and if there are such `"tokens"` `(B, h, w, C)` and
            `"truth"` `(B, C)`.
        y_pred: Dictionary of the logits `"class"` `(B, C)` and `"tokens"`
            `(B, h, w, C)`, and if tokens were mixed lambda', `"kept"` `(B,)`.

    Raises:
        ValueError: If a weight is negative, labels have other shapes, the dictionary
            has no `"class"`, or `ground_truth` is asked for and it has no `"truth"`.
    """

    def __init__(
        self, dense_weight=1.0, class_weight=1.0, ground_truth=False, **kwargs
    ):
        super().__init__(**kwargs)
        if dense_weight < 0 or class_weight < 0:
            raise ValueError(
                "dense_weight and class_weight must be >= 0, got "
                f"{dense_weight} and {class_weight}."
            )
        self.dense_weight = dense_weight
        self.class_weight = class_weight
        self.ground_truth = ground_truth

    def get_config(self):
        names = ("dense_weight", "class_weight", "ground_truth")
        return {**super().get_config(), **{name: getattr(self, name) for name in names}}

    def call(self, y_true, y_pred):
        of_class, of_tokens = self.parts(y_true, y_pred)
        return self.class_weight * of_class + self.dense_weight * of_tokens

    def parts(self, y_true, y_pred):
        """Cross-entropy of the image and of its tokens, two `(B,)`."""
        labels = self.image_labels(y_true, y_pred)
        logits = y_pred["tokens"]
        if isinstance(y_true, dict) and "tokens" in y_true:
            of_each = ops.cast(y_true["tokens"], "float32")
            _check_shape(of_each, logits)
        else:
            of_each = self._own_labels(y_true, logits.shape[-1])[:, None, None]
        of_tokens = ops.mean(cross_entropy(of_each, logits), axis=(1, 2))
        return cross_entropy(labels, y_pred["class"]), of_tokens

    def image_labels(self, y_true, y_pred):
        """What the class token must say of each image, mixed as the tokens were.

        Returns:
            float32 `(B, C)`.
        """
        labels = self._own_labels(y_true, y_pred["class"].shape[-1])
        if "kept" not in y_pred:
            return labels
        kept = y_pred["kept"][:, None]
        return kept * labels + (1 - kept) * ops.flip(labels, axis=0)

    def _own_labels(self, y_true, num_classes):
        if not isinstance(y_true, dict):
            return soft_labels(y_true, num_classes)  # that is the truth
        if "class" not in y_true:
            raise ValueError(
                "A dictionary of labels must have 'class', that of the image; got "
                f"{', '.join(map(repr, y_true))}."
            )
        labels = soft_labels(y_true["class"], num_classes)
        if not self.ground_truth:
            return labels
        if "truth" not in y_true:
            raise ValueError(
                "ground_truth=True needs labels with 'class', the annotator's, and "
                "'truth'; got no 'truth'."
            )
        truth = soft_labels(y_true["truth"], num_classes)
        agree = ops.equal(ops.argmax(labels, -1), ops.argmax(truth, -1))
        weight = ops.where(agree, 0.5, 0.9)[:, None]
        return weight * labels + (1 - weight) * truth


def _check_shape(labels, logits):
    pairs = zip(labels.shape, logits.shape, strict=False)
    differ = any(a != b for a, b in pairs if None not in (a, b))
    if differ or len(labels.shape) != len(logits.shape):
        raise ValueError(
            "Labels of tokens must have the shape (B, h, w, C) of the token logits, "
            f"{tuple(logits.shape)}, got {tuple(labels.shape)}."
        )
