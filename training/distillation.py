"""The trainer of distillation: a model that learns from labels and from a teacher.

Shapes in this file:
    B batch, H x W pixels, C classes.
"""

from pathlib import Path

import keras
from keras import ops

import keras_vit
from keras_vit.model_file import read_model
from keras_vit.resampling import resize
from training.accelerated import augmented
from training.files import checkpoint_source
from training.loss import DistillationLoss, SoftAccuracy


class Distillation(keras.Model):
    """Trains a classifier by labels and by what a teacher answers to the same images.

        trainer = Distillation(ViT("deit_small_distilled"), teacher)
        trainer.compile(optimizer)
        trainer.fit(dataset of (images, labels))
        trainer.network.save("student.keras")

    The network shares its weights with the trainer: it is what is saved, exported and
    asked. Where it has a distillation token, the node `head` learns the labels and
    `head_dist` the teacher, and the network answers with the mean of both; any other
    learns both with its one answer.

    The teacher sees the images that the network sees, augmented and mixed, in
    inference mode. Where it takes one other size only they are resized to it, bicubic
    and antialiased. It is frozen (its `trainable` becomes False), the optimizer does
    not know it, and a run does not save it.

    In evaluation `loss` is that of the labels and what the network itself answers.

    Metrics: `accuracy` of the network's answer, `class_accuracy` and
    `distillation_accuracy` of its two heads, `teacher_accuracy`, all against the label
    of the image, of a mixed one against the larger label; `class_loss` and
    `distillation_loss`, the two terms without their weights.

    Source: Touvron et al. 2021, "Training data-efficient image transformers &
    distillation through attention", section 4, https://arxiv.org/abs/2012.12877.

    Args:
        network: Functional model from images to logits `(B, C)`, such as
            `ViT("deit_small_distilled")`.
        teacher: Keras model from raw images `(B, H, W, 3)` of 0..255 to logits
            `(B, C)`, of the same classes in the same order.
        loss: Name of the loss of the labels, as in `DistillationLoss`.
        kind: `"hard"`, the teacher's largest class, or `"soft"`, its probabilities.
        weight: The teacher's part of the loss, in [0, 1].
        temperature: By which logits are divided in soft distillation; positive.

    Call arguments:
        images: `(B, H, W, 3)`, or with a plan, as `training.accelerated` takes them.

    Returns:
        Dictionary of `"class"`, `"distillation"`, `"teacher"` and the network's own
        `"logits"`, each `(B, C)`.

    Raises:
        ValueError: If network or teacher do not give logits `(B, C)` of as many
            classes, the teacher gives probabilities or shares weights with the
            network; if a name is unknown or a number is out of its range; if `compile`
            is given another loss or metrics.
    """

    def __init__(
        self,
        network,
        teacher,
        loss="softmax",
        kind="hard",
        weight=0.5,
        temperature=1.0,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.autocast = False  # half precision would round the pixels
        self.distilling = DistillationLoss(loss, kind, weight, temperature)
        _check_logits("network", network.output_shape, None)
        size = _image_size(teacher)
        _check_teacher(teacher, network, size)
        teacher.trainable = False
        self.network = network
        self.teacher = teacher
        self.teacher_size = size
        names = [layer.name for layer in network.layers]
        outputs = dict.fromkeys(("logits", "class", "distillation"), network.output)
        if "head_dist" in names:
            outputs["class"] = network.get_layer("head").output
            outputs["distillation"] = network.get_layer("head_dist").output
        self.heads = keras.Model(network.input, outputs, name="heads")
        self.accuracies = {
            "logits": SoftAccuracy(name="accuracy"),
            "class": SoftAccuracy(name="class_accuracy"),
            "distillation": SoftAccuracy(name="distillation_accuracy"),
            "teacher": SoftAccuracy(name="teacher_accuracy"),
        }
        self.class_loss = keras.metrics.Mean(name="class_loss")
        self.distillation_loss = keras.metrics.Mean(name="distillation_loss")
        self.built = True

    def compile(self, optimizer="rmsprop", loss=None, metrics=None, **kwargs):
        """As that of Keras, but that loss and metrics are the trainer's own."""
        if loss is not None or metrics is not None:
            raise ValueError(
                "Distillation has its own metrics, and its loss is an argument of the "
                f"constructor; got loss={loss!r} and metrics={metrics!r}."
            )
        super().compile(optimizer, **kwargs)

    def call(self, images, training=None):
        images = augmented(images)
        outputs = self.heads(images, training=training)
        outputs["teacher"] = self.ask_teacher(images)
        return outputs

    def ask_teacher(self, images):
        """Logits `(B, C)` of the teacher, float32, through which no gradient flows."""
        images = ops.cast(images, "float32")
        size = [
            a or b for a, b in zip(self.teacher_size, images.shape[1:3], strict=True)
        ]
        if tuple(images.shape[1:3]) != tuple(size):
            images = resize(images, tuple(size), "bicubic_antialias")
            images = ops.clip(images, 0.0, 255.0)  # bicubic overshoots
        logits = self.teacher(images, training=False)
        return ops.stop_gradient(ops.cast(logits, "float32"))

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if training:
            loss = self.distilling(y, y_pred, sample_weight)
        else:
            loss = self.distilling.of_labels(y, y_pred["logits"], sample_weight)
        return loss + sum(self.losses) if self.losses else loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        of_class, of_teacher = self.distilling.parts(y, y_pred)
        self.class_loss.update_state(of_class, sample_weight)
        self.distillation_loss.update_state(of_teacher, sample_weight)
        for name, metric in self.accuracies.items():
            metric.update_state(y, y_pred[name], sample_weight)
        return self.get_metrics_result()


def read_teacher(source: str) -> keras.Model:
    """The model of a `.keras` file, of a run directory, or of a published checkpoint.

    Args:
        source: A file of any Keras model, or what `keras_vit.from_checkpoint` takes.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it cannot be read.
    """
    source = checkpoint_source(source)
    if Path(source).suffix == ".keras":
        return read_model(Path(source).expanduser())
    return keras_vit.from_checkpoint(source)


def _image_size(teacher):
    """`(H, W)` that the teacher takes, None for any.

    Raises:
        ValueError: If it does not take one batch of images.
    """
    shape = getattr(teacher, "input_shape", (None,) * 4)
    if not _is_rank(shape, 4):
        raise ValueError(f"The teacher must take images (B, H, W, 3), got {shape}.")
    return shape[1:3]


def _check_teacher(teacher, network, size):
    own = {id(variable) for variable in network.variables}
    if any(id(variable) in own for variable in teacher.variables):
        raise ValueError(
            "The teacher must be another model than the network, for it is frozen; "
            f"{teacher.name!r} shares weights with {network.name!r}."
        )
    asked = [a or b or 224 for a, b in zip(size, network.input_shape[1:3], strict=True)]
    images = keras.KerasTensor((None, *asked, 3), "float32")
    answer = teacher.compute_output_spec(images, training=False)
    shape = getattr(answer, "shape", None)
    if shape is None:
        raise ValueError(
            "The teacher must give one tensor of logits (B, C), got "
            f"{type(answer).__name__}."
        )
    _check_logits("teacher", shape, network.output_shape[-1])
    last = (teacher.layers or [teacher])[-1]
    activation = getattr(last, "activation", None)
    if isinstance(last, keras.layers.Softmax) or activation in (
        keras.activations.softmax,
        keras.activations.sigmoid,
    ):
        raise ValueError(
            "The teacher must give logits, without a softmax behind them (in "
            "keras.applications: classifier_activation=None), got probabilities from "
            f"its layer {last.name!r}."
        )


def _check_logits(who, shape, num_classes):
    if not _is_rank(shape, 2) or num_classes not in (None, shape[-1]):
        classes = "C" if num_classes is None else num_classes
        raise ValueError(
            f"The {who} must give logits (B, {classes}), one for each class, got "
            f"{shape}."
        )


def _is_rank(shape, rank):
    return isinstance(shape, tuple) and len(shape) == rank
