"""The trainer of token labeling: a model whose every token has a label to learn."""

import keras
from keras import layers, ops

from keras_vit import FeatureMap, MixToken
from training.accelerated import augmented
from training.loss import SoftAccuracy, SoftCrossEntropy, TokenLabelingLoss


class TokenLabeling(keras.Model):
    """Trains a vision transformer with a label for every token, and MixToken.

        trainer = TokenLabeling(LVViT("small"), TokenLabelingLoss(), MixToken())
        trainer.compile(optimizer)
        trainer.fit(dataset of (images, labels))
        trainer.network.save("lvvit.keras")

    The network shares its weights with the trainer: it is what is saved, exported and
    asked. A network without a token head, such as `ViT` and `CPVT`, is given a Dense on
    its normalised patch tokens, which is not part of the network afterwards.

    In training, where there is a `mix`, one box of tokens is exchanged between the
    images of a batch behind the patch embedding, and the token logits are brought back
    to their images. In evaluation nothing is mixed, and `loss` is the cross-entropy of
    what the network itself answers.

    Metrics: `accuracy` of the network's answer, `class_accuracy` of the class head,
    `token_accuracy` of the largest token logit of each class, all against the label of
    the image, of a mixed one against the larger label; `class_loss` and `token_loss`,
    the two cross-entropies without their weights.

    Source: Jiang et al. 2021, "All Tokens Matter: Token Labeling for Training Better
    Vision Transformers", https://arxiv.org/abs/2104.10858.

    Args:
        network: Functional model of `keras_vit` with the nodes `patches` and `pool`:
            `LVViT`, `ViT` or `CPVT`, with classes.
        loss: `TokenLabelingLoss`; None for one with its default weights.
        mix: `MixToken`; None for no mixing.

    Call arguments:
        images: `(B, H, W, 3)`, or with a plan, as `training.accelerated` takes them.

    Returns:
        Dictionary of `"class"` `(B, C)`, `"tokens"` `(B, h, w, C)`, the network's own
        `"logits"` `(B, C)`, and `"kept"` `(B,)`, the part of the tokens that are their
        image's own.

    Raises:
        ValueError: If the network has no such nodes, or no classes; if `loss` or `mix`
            is something else; if `compile` is given another loss or metrics.
    """

    def __init__(self, network, loss=None, mix=None, **kwargs):
        super().__init__(**kwargs)
        self.autocast = False  # pixels reach the network as they are
        for name, value, kind in (
            ("loss", loss, TokenLabelingLoss),
            ("mix", mix, MixToken),
        ):
            if value is not None and not isinstance(value, kind):
                raise ValueError(
                    f"{name} must be a {kind.__name__} or None, got {value!r}."
                )
        self.network = network
        self.labeling = TokenLabelingLoss() if loss is None else loss
        self.mix = mix
        self.answer = SoftCrossEntropy()
        names = [layer.name for layer in network.layers]
        if not {"patches", "tokens", "pool"} <= set(names) or "head" not in names:
            raise ValueError(
                "Token labeling is for a plain vision transformer of keras_vit with "
                f"classes, LVViT, ViT or CPVT; got {network.name!r}, without the nodes "
                "'patches', 'tokens', 'pool' and 'head'."
            )
        grid = network.get_layer("patches").output
        self.stem = keras.Model(network.input, grid, name="stem")
        outputs = {"class": network.output}
        if "token_head" in names:
            outputs["logits"] = network.output
            outputs["class"] = network.get_layer("head").output
            outputs["tokens"] = network.get_layer("token_head").output
        else:
            outputs["tokens"] = _fresh_token_head(network, grid)
        self.encoder = keras.Model(grid, outputs, name="encoder")
        self.accuracies = {
            "logits": SoftAccuracy(name="accuracy"),
            "class": SoftAccuracy(name="class_accuracy"),
            "tokens": SoftAccuracy(name="token_accuracy"),
        }
        self.class_loss = keras.metrics.Mean(name="class_loss")
        self.token_loss = keras.metrics.Mean(name="token_loss")
        self.built = True

    def compile(self, optimizer="rmsprop", loss=None, metrics=None, **kwargs):
        """As that of Keras, but that loss and metrics are the trainer's own."""
        if loss is not None or metrics is not None:
            raise ValueError(
                "TokenLabeling has its own metrics, and its loss is an argument of the "
                f"constructor; got loss={loss!r} and metrics={metrics!r}."
            )
        super().compile(optimizer, **kwargs)

    def call(self, images, training=None):
        grid = self.stem(augmented(images), training=training)
        mixes = training and self.mix is not None
        return self.label_tokens(
            grid, self.mix.draw_box(grid) if mixes else None, training
        )

    def label_tokens(self, grid, box=None, training=None):
        """Answer from a grid of tokens, a box of which is mixed.

        Args:
            grid: `(B, h, w, D)`, what `patches` gives.
            box: int32 `(4,)` as in `MixToken`; None for no mixing.
            training: Whether dropout and drop path are at work.

        Returns:
            As the call of the trainer.
        """
        mixed = grid if box is None else self.mix(grid, box)
        outputs = self.encoder(mixed, training=training)
        outputs.setdefault("logits", outputs["class"])
        outputs["kept"] = ops.ones((ops.shape(grid)[0],))
        if box is not None:
            outputs["tokens"] = self.mix(outputs["tokens"], box)
            outputs["kept"] = outputs["kept"] * self.mix.kept(grid, box)
        return outputs

    def compute_loss(
        self, x=None, y=None, y_pred=None, sample_weight=None, training=True
    ):
        if training:
            loss = self.labeling(y, y_pred, sample_weight)
        else:
            labels = y["class"] if isinstance(y, dict) else y
            loss = self.answer(labels, y_pred["logits"], sample_weight)
        return loss + sum(self.losses) if self.losses else loss

    def compute_metrics(self, x, y, y_pred, sample_weight=None):
        of_class, of_tokens = self.labeling.parts(y, y_pred)
        self.class_loss.update_state(of_class, sample_weight)
        self.token_loss.update_state(of_tokens, sample_weight)
        labels = self.labeling.image_labels(y, y_pred)
        for name, metric in self.accuracies.items():
            logits = y_pred[name]
            if name == "tokens":
                logits = ops.max(logits, axis=(1, 2))
            metric.update_state(labels, logits, sample_weight)
        return self.get_metrics_result()


def _fresh_token_head(network, grid):
    """Symbolic token logits `(B, h, w, C)` of a network without a token head."""
    tokens = network.get_layer("pool").input
    num_prefix = sum(w.shape[1] for w in network.get_layer("tokens").prefix)
    norm = network.get_layer("norm")
    if len(norm.output.shape) == 2:  # the network normalises after its pooling
        tokens = layers.LayerNormalization(epsilon=norm.epsilon, name="token_norm")(
            tokens
        )
    tokens = FeatureMap(num_prefix, name="patch_tokens")(tokens, grid)
    head = layers.Dense(network.output.shape[-1], dtype="float32", name="token_head")
    return head(tokens)
