"""The nodes of a model that a client may ask for besides its logits."""

from collections.abc import Sequence

import keras

from keras_vit import nodes as parts
from keras_vit.embedding import FeatureMap

STAGES = ("stage0", "stage1", "stage2", "stage3")


def answering(
    model: keras.Model, layers: Sequence[int | str] | None = None
) -> keras.Model:
    """The same network with all of its answers, by name.

    Of a classifier: `logits` `(N, C)`; `features` `(N, D)`, what the head reads (the
    mean of two where there is a distillation token); and the last patch tokens,
    normalised as the head sees them, as `feature_map` `(N, h, w, D)`, or of a pyramid
    its stages as `level1` to `level4`; or those of the `layers` of `keras_vit.features`
    by their names, `block3`. A model that another has built has the nodes that it names
    as this package does. Of a class for every pixel: `logits`.
    """
    nodes = {layer.name: layer for layer in model.layers}
    answers = {"logits": model.output}
    heads = [nodes[x].input for x in ("head", "head_dist") if x in nodes]
    if len(model.output_shape) == 2 and heads:
        answers["features"] = heads[0] if len(heads) == 1 else sum(heads) / len(heads)
        answers |= parts.features(model, layers).output if layers else _maps(nodes)
    answers = {
        name: keras.layers.Activation("linear", dtype="float32", name=f"answer_{name}")(
            node
        )
        for name, node in answers.items()
    }
    return keras.Model(model.input, answers, name=model.name)


def _maps(nodes):
    if all(x in nodes for x in STAGES):
        return {f"level{i}": nodes[x].output for i, x in enumerate(STAGES, 1)}
    if not {"patches", "tokens", "pool"} <= nodes.keys():
        return {}
    num_prefix = sum(w.shape[1] for w in nodes["tokens"].prefix)
    lay_out = FeatureMap(num_prefix, name="answer_map")
    return {"feature_map": lay_out(nodes["pool"].input, nodes["patches"].output)}
