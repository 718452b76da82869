"""What a classifier says of every place of an image, instead of the image as a whole.

Shapes in this file:
    B batch, H x W pixels, h x w places of the last map, N = h * w patch tokens,
    R prefix tokens, D channels, C classes, k classes that are kept of a place.
"""

from pathlib import Path

import keras
from keras import layers, ops

from keras_vit.embedding import FeatureMap, PixelNormalization, Preprocess
from keras_vit.encoder import size_pair
from keras_vit.head import AttentionPool, MeanPool, TokenPool
from keras_vit.model_file import read_model

TOP = 5
FEW_CLASSES = 16  # as many are all kept
POOLINGS = (layers.GlobalAveragePooling2D, layers.GlobalMaxPooling2D)
CLASSIFIERS = (layers.Dense, layers.Conv2D)
PASSING = (  # they leave it open whether a score is a logit or a probability
    layers.Average,
    layers.Dropout,
    layers.Flatten,
    layers.Identity,
    layers.Reshape,
)
RULE = (
    "A teacher must end in class scores (B, C): the logits or the softmax of a Dense "
    "or a 1 x 1 convolution, behind a GlobalAveragePooling2D or GlobalMaxPooling2D of "
    "the model itself (not of a model in it), or in the head of a model of keras_vit"
)


def dense_classifier(teacher: keras.Model) -> keras.Model:
    """Apply a classifier at each place of its last map, not at the pooled vector.

        p[i, j] = softmax(head(map[i, j]))

    What follows the pooling (`head`: normalisation, dropout, one or several Dense) is
    applied as it is. In a transformer of this package it is applied to every patch
    token; where there is a distillation token both heads are, and their mean is taken.
    A model with a node `token_head` of scores `(B, h, w, C)`, such as `LVViT`, has such
    an answer already.

    Source: Yun et al. 2021, "Re-labeling ImageNet", https://arxiv.org/abs/2101.05022;
    Jiang et al. 2021, "All Tokens Matter", https://arxiv.org/abs/2104.10858. The head
    of their annotator is one Dense.

    Args:
        teacher: Classifier, functional or sequential, whose pooling is at its top
            level: of keras.applications, of one's own, or of this package.

    Returns:
        `keras.Model`: images `(B, H, W, 3)` as the teacher takes them to probabilities
        `(B, h, w, C)`, float32. It shares its weights with the teacher.

    Raises:
        ValueError: If the teacher is no functional model, does not take images
            `(B, H, W, 3)`, does not end in logits or a softmax, or its pooling is not
            found or is attention.
    """
    scores, are_logits = dense_scores(teacher)
    if are_logits:
        x = layers.Softmax(dtype="float32", name="probabilities")(scores.output)
        scores = keras.Model(scores.input, x)
    return keras.Model(scores.input, scores.output, name=f"{teacher.name}_dense")


def dense_scores(teacher: keras.Model) -> tuple[keras.Model, bool]:
    """The model of `dense_classifier` before its softmax.

    Returns:
        `keras.Model`: images to scores `(B, h, w, C)`, float32, and whether these are
        logits; otherwise they are probabilities already.

    Raises:
        ValueError: Those of `dense_classifier`.
    """
    _check_shapes(teacher)
    nodes = {layer.name: layer for layer in teacher.layers}
    scores = teacher.outputs[0]
    if "token_head" in nodes and len(nodes["token_head"].output.shape) == 4:
        scores = nodes["token_head"].output
    ending = _ending(scores)
    if ending not in ("logits", "softmax"):
        raise ValueError(f"{RULE}; {teacher.name!r} ends in {ending}.")
    if len(scores.shape) == 4:
        x = layers.Identity(dtype="float32", name="dense")(scores)
    else:
        ours = isinstance(nodes.get("pool"), TokenPool | MeanPool | AttentionPool)
        grid, tail = _token_map(teacher, nodes) if ours else _pooled_map(teacher)
        x = EachPosition(tail, dtype="float32", name="dense")(grid)
    return keras.Model(teacher.inputs[0], x), ending == "logits"


def load_annotator(
    teacher: str | Path,
    top: int | None,
    normalization: str | None,
    image_size: tuple[int, int] | None,
) -> keras.Model:
    """Load a teacher and make it name the best classes of each place.

    Args: Those of `annotate`.

    Returns:
        `keras.Model`: raw images `(B, H, W, 3)` of 0..255 to the `(B, h, w, k)` largest
        probabilities, float32, and their classes, int32. It records, for
        `Preprocess.of_model`, that an image is squashed to `(H, W)`.

    Raises:
        FileNotFoundError: If there is no file.
        ValueError: Those of `annotate` that speak of the teacher.
    """
    model = read_model(teacher)
    dense = dense_classifier(model)
    has_own = any(isinstance(x, PixelNormalization) for x in model.layers)
    if has_own and normalization is not None:
        raise ValueError(
            f"normalization must be None for {model.name!r}, which normalises raw "
            f"pixels itself, got {normalization!r}."
        )
    size = _image_size(model, image_size)
    images = keras.Input((*size, 3), name="images")
    interpolation = Preprocess.of_model(model).interpolation if has_own else "bilinear"
    scores = dense(
        PixelNormalization(
            normalization, size, None, interpolation, dtype="float32", name="pixels"
        )(images)
    )
    top = _top(top, scores.shape[-1])
    best = BestClasses(top, dtype="float32", name="best_classes")(scores)
    return keras.Model(images, best, name=f"{model.name}_annotator")


class EachPosition(layers.Layer):
    """Apply a model of vectors at each place of a map. Not made to be saved.

    Args:
        tail: Model of one vector `(B, D)` or `(B, 1, 1, D)`, or of several that are the
            same here, to `(B, C)`.

    Call arguments:
        grid: `(B, h, w, D)`.

    Returns:
        `(B, h, w, C)`.
    """

    def __init__(self, tail, **kwargs):
        super().__init__(**kwargs)
        self.tail = tail

    def compute_output_shape(self, grid_shape):
        return (*grid_shape[:3], self.tail.outputs[0].shape[-1])

    def call(self, grid):
        batch, height, width, _ = ops.shape(grid)
        vector = self.tail.inputs[0].shape[1:]
        x = ops.reshape(grid, (batch * height * width, *vector))
        count = len(self.tail.inputs)
        x = self.tail(x if count == 1 else [x] * count, training=False)
        x = ops.cast(x, self.compute_dtype)
        return ops.reshape(x, (batch, height, width, x.shape[-1]))


class BestClasses(layers.Layer):
    """The k largest probabilities of each place, in falling order, and their classes.

    Args:
        top: k.

    Call arguments:
        probabilities: `(B, h, w, C)`.

    Returns:
        Values and classes, `(B, h, w, k)`.
    """

    def __init__(self, top, **kwargs):
        super().__init__(**kwargs)
        self.top = top

    def call(self, probabilities):
        values, classes = ops.top_k(probabilities, self.top)
        return values, ops.cast(classes, "int32")


def _check_shapes(teacher):
    """Refuse what does not lead from images `(B, H, W, 3)` to `(B, C)`."""
    if not (teacher.built and getattr(teacher, "outputs", None)):
        raise ValueError(
            "A teacher must be a functional model, or a sequential one that is built; "
            f"got the {type(teacher).__name__} {teacher.name!r}."
        )
    inputs = [tuple(x.shape) for x in teacher.inputs]
    if len(inputs) != 1 or len(inputs[0]) != 4 or inputs[0][-1] != 3:
        raise ValueError(
            f"A teacher must take images (B, H, W, 3), {teacher.name!r} takes "
            f"{', '.join(map(str, inputs))}."
        )
    shapes = [tuple(x.shape) for x in teacher.outputs]
    if len(shapes) != 1 or len(shapes[0]) != 2 or (shapes[0][-1] or 0) < 2:
        raise ValueError(
            f"{RULE}; {teacher.name!r} gives {', '.join(map(str, shapes))}."
        )


def _ending(tensor):
    """`"logits"`, `"softmax"`, or in words what else the tensor is the output of."""
    operation, node, _ = tensor._keras_history
    kind = type(operation).__name__
    activation = getattr(getattr(operation, "activation", None), "__name__", None)
    if kind == "Softmax" or activation == "softmax":
        return "softmax"
    if isinstance(operation, CLASSIFIERS) and activation == "linear":
        return "logits"
    nothing = kind == "Activation" and activation == "linear"
    if nothing or isinstance(operation, PASSING):
        sources = operation._inbound_nodes[node].input_tensors
        return " and ".join(sorted({_ending(x) for x in sources}))
    of = f"the {activation} of " if activation not in (None, "linear") else ""
    return f"{of}{kind} {operation.name!r}"


def _token_map(teacher, nodes):
    """Patch tokens `(B, h, w, D)` of one of our models, and the model of its heads."""
    pool = nodes["pool"]
    if isinstance(pool, AttentionPool):
        raise ValueError(
            "A model with pool='attention' has no classifier of single tokens: its "
            f"head reads what a probe gathered from all of them, in {teacher.name!r}. "
            "Take a teacher with pool='class' or pool='mean'."
        )
    if isinstance(pool, MeanPool):
        num_prefix = pool.num_prefix
    else:
        num_prefix = sum(w.shape[1] for w in nodes["tokens"].prefix)
    grid = next((x for x in ("stage3_patches", "patches") if x in nodes), None)
    if grid is None:
        raise ValueError(
            "A model with tokens must have a node 'patches' or 'stage3_patches', their "
            f"grid; {teacher.name!r} has {', '.join(nodes)}."
        )
    grid = nodes[grid].output
    x = FeatureMap(num_prefix, dtype="float32", name="patch_tokens")(pool.input, grid)
    pooled = [nodes[name].output for name in ("pool", "pool_dist") if name in nodes]
    pooled = pooled[0] if len(pooled) == 1 else pooled
    return x, keras.Model(pooled, teacher.outputs[0])


def _pooled_map(teacher):
    """Last map `(B, h, w, D)` of a network, and the model of what its pooling feeds."""
    for layer in reversed(teacher.layers):
        if not isinstance(layer, POOLINGS):
            continue
        try:
            tail = keras.Model(layer.output, teacher.outputs[0])
        except ValueError:  # a side branch, such as squeeze and excitation
            continue
        if layer.data_format != "channels_last":
            raise ValueError(
                "A teacher must pool maps (B, h, w, D), data_format='channels_last', "
                f"got {layer.data_format!r} in {layer.name!r} of {teacher.name!r}."
            )
        return layer.input, tail
    last = ", ".join(f"{type(x).__name__} {x.name!r}" for x in teacher.layers[-5:])
    raise ValueError(
        f"{RULE}; {teacher.name!r} has no such pooling, its end is {last}."
    )


def _image_size(model, image_size):
    """`(H, W)` of the images for a teacher."""
    own = tuple(model.inputs[0].shape[1:3])
    if image_size is None:
        if None in own:
            raise ValueError(
                f"image_size must be given for {model.name!r}, which takes any size: "
                "the height and width of its images in pixels."
            )
        return own
    size = size_pair(image_size)
    if None in size or any(a not in (None, b) for a, b in zip(own, size, strict=True)):
        raise ValueError(
            f"image_size must be what {model.name!r} takes, {own} with None for any, "
            f"got {image_size!r}."
        )
    return size


def _top(top, classes):
    """Number of classes to keep of `classes`."""
    if top is None:
        return classes if classes <= FEW_CLASSES else TOP
    if not (isinstance(top, int) and 0 < top <= classes):
        raise ValueError(
            f"top must be in 1..{classes}, the teacher's classes, got {top!r}."
        )
    return top
