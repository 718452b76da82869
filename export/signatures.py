"""What a client can ask of an exported model, pure TensorFlow.

A classifier:
    serving_default  encoded files of any size -> probabilities, classes, scores, valid
    strict           the same; one bad file is an error of the whole request
    images           raw pixels, float32       -> the same, and logits
    images_uint8     raw pixels, uint8         -> the same
    features         encoded files             -> features, valid
    feature_maps     encoded files             -> feature_map, or level1 to 4, or the
                                                  layers asked for; valid
    classify         tf.Examples               -> classes, scores
A model of a class for every pixel:
    serving_default  encoded files of any size -> label_map_bytes, valid
    strict           the same; one bad file is an error of the whole request
    images           raw pixels, float32       -> label_map, valid
    images_uint8     raw pixels, uint8         -> the same
    logits           raw pixels, float32       -> logits, valid

A row that is not valid costs itself only: its numbers are 0 and its texts are empty.
Shapes: N rows, H x W pixels, C classes, k best classes, D features.
"""

import contextlib
import dataclasses
from collections.abc import Callable, Sequence

import keras
import numpy as np
import tensorflow as tf

from export.features import answering
from export.images import checked, each, inspect_all, strict, tolerant
from keras_vit import kernels
from keras_vit.embedding import Preprocess
from training.preprocess import decode, scaled

STRINGS = tf.TensorSpec((None,), tf.string)
Functions = dict[str, tf.types.experimental.ConcreteFunction]
FILE_PIXELS = 2**26  # a photograph of 8192 x 8192
MAP_PIXELS = 2**22  # of a file whose label map has its size
MODEL_PIXELS = 2**20  # where a model of any size sees what it is sent


class Servable(tf.Module):
    """The variables of a model, once each, and nothing else that could be saved.

    Args:
        model: Whose they are; None for one whose weights are constants of the graph.
    """

    def __init__(self, model: keras.Model | None):
        super().__init__()
        weights = [] if model is None else model.weights
        self.weights = [variable.value for variable in weights]


@dataclasses.dataclass(frozen=True)
class Contract:
    """What a model is served with.

    Args:
        preprocess: How a file becomes an image.
        labels: Name of each class.
        top_k: Number of best classes that are named, C at most.
        max_pixels: The most pixels of a file; None for `FILE_PIXELS`, of a model of
            label maps `MAP_PIXELS`, or `MODEL_PIXELS` where it sees files as they are.
        features: The layers of `feature_maps`; None for the last.
    """

    preprocess: Preprocess
    labels: list[str]
    top_k: int
    max_pixels: int | None = None
    features: list[int | str] | None = None

    def pixels_of(self, model: keras.Model) -> int:
        """The most pixels of a file that `model` answers."""
        if self.max_pixels is not None:
            return self.max_pixels
        if len(model.output_shape) == 2:
            return FILE_PIXELS
        return MODEL_PIXELS if None in model.input_shape[1:3] else MAP_PIXELS


def signatures(
    model: keras.Model,
    contract: Contract,
    values: Sequence[np.ndarray] | None = None,
) -> Functions:
    """Trace the signatures of a model.

    Args:
        model: Raw images to logits `(N, C)`, or `(N, H, W, C)`, on the TensorFlow
            backend.
        contract: What it is served with.
        values: Of `model.weights`, to be constants of the graph; None for variables.
    """
    network = _network(model, values, contract.features)
    max_pixels = contract.pixels_of(model)
    if len(model.output_shape) == 4:
        return _of_segmenter(model, network, contract, max_pixels)
    return _of_classifier(model, network, contract, max_pixels)


def _of_classifier(model, network, contract, max_pixels):
    names = tf.constant(contract.labels)
    maps = [x for x in network.structured_outputs if x not in ("logits", "features")]

    def answer(images, valid):
        logits = network(images)["logits"]
        probabilities = tf.nn.softmax(logits)
        scores, best = tf.math.top_k(probabilities, contract.top_k)
        return {
            "probabilities": _rows(probabilities, valid),  # (N, C)
            "classes": _rows(tf.gather(names, best), valid),  # (N, k)
            "scores": _rows(scores, valid),  # (N, k)
            "valid": valid,  # (N,)
            "logits": _rows(logits, valid),  # (N, C)
        }

    def of_file(images, valid, left_out=("logits",)):
        found = answer(images, valid)
        return {key: x for key, x in found.items() if key not in left_out}

    @tf.function(input_signature=[STRINGS], autograph=False)
    def read(files):  # traced once, for all signatures
        return tolerant(files, contract.preprocess, max_pixels)

    def of_files(function):
        return lambda files: function(*read(files))

    def of_all_files(files):
        return of_file(*strict(files, contract.preprocess, max_pixels))

    def cut_out(*keys):
        def of_images(images, valid):
            found = network(images)
            return {key: _rows(found[key], valid) for key in keys} | {"valid": valid}

        return _of_strings(of_files(of_images))

    def classify(images, valid):
        return of_file(images, valid, ("logits", "probabilities", "valid"))

    def of_examples(examples):
        return of_files(classify)(_encoded_images(examples))

    functions = {
        "serving_default": _of_strings(of_files(of_file)),
        "strict": _of_strings(of_all_files),
        "images": _of_pixels(model, answer, tf.float32),
        "images_uint8": _of_pixels(model, answer, tf.uint8),
        "classify": _of_strings(of_examples, "inputs"),
    }
    if "features" in network.structured_outputs:
        functions["features"] = cut_out("features")
    if maps:
        functions["feature_maps"] = cut_out(*maps)
    return functions


def _encoded_images(examples):
    """Feature "image/encoded" of serialized tf.Examples `(N,)`, "" where there is none.

    One by one, since a message that is none is an error.
    """
    feature = {"image/encoded": tf.io.FixedLenFeature((), tf.string)}

    def read(example):
        return tf.io.parse_single_example(example, feature)["image/encoded"]

    all_rows = tf.ones(tf.shape(examples), tf.bool)
    return each(read, (examples,), all_rows, (), tf.string)[0]


def _of_segmenter(model, network, contract, max_pixels):
    """Each file is answered by itself: their sizes may differ."""
    dtype = tf.uint8 if model.output_shape[-1] <= 256 else tf.uint16
    blank = tf.io.encode_png(tf.zeros((32, 32, 3), tf.uint8))

    def label_map(images, valid):
        logits = network(images)["logits"]
        return {"label_map": _rows(_label_map(logits), valid), "valid": valid}

    def logits(images, valid):
        return {"logits": _rows(network(images)["logits"], valid), "valid": valid}

    def label_map_bytes(data):
        image = tf.cast(decode(data), tf.float32)
        size = tf.shape(image)[:2]
        if None not in model.input_shape[1:3]:
            size_of_model = contract.preprocess.image_size
            image = scaled(image, size_of_model, contract.preprocess.interpolation)
        logits = tf.image.resize(network(image[None])["logits"], size)
        return tf.io.encode_png(tf.cast(_label_map(logits)[0, ..., None], dtype))

    def answer(files, valid):
        spec = tf.TensorSpec((), tf.string)
        maps = tf.map_fn(label_map_bytes, files, fn_output_signature=spec)
        return {"label_map_bytes": _rows(maps, valid), "valid": valid}

    def strict(files):
        files, *_ = checked(files, max_pixels)
        return answer(files, tf.ones(tf.shape(files), tf.bool))

    def tolerant(files):
        files, fit, *_ = inspect_all(files, max_pixels)
        _, valid = each(_decoded_size, (files,), fit, (3,), tf.int32)
        return answer(tf.where(valid, files, blank), valid)

    return {
        "serving_default": _of_strings(tolerant),
        "strict": _of_strings(strict),
        "images": _of_pixels(model, label_map, tf.float32),
        "images_uint8": _of_pixels(model, label_map, tf.uint8),
        "logits": _of_pixels(model, logits, tf.float32),
    }


def _decoded_size(file):
    return tf.shape(tf.io.decode_image(file, channels=3, expand_animations=False))


def _label_map(logits):
    return tf.argmax(logits, axis=-1, output_type=tf.int32)  # (N, H, W)


def _network(model, values, layers):
    """All answers of the model, as the one function that every signature calls.

    A batch may be empty, which some kernels cannot take.
    """
    answers = answering(model, layers)
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32)

    @tf.function(input_signature=[spec], autograph=False)
    def network(images):
        number = tf.shape(images)[0]
        missing = tf.maximum(1 - number, 0)
        images = tf.pad(images, [[0, missing], [0, 0], [0, 0], [0, 0]])
        images = tf.ensure_shape(images, spec.shape)
        with _weights(model, values), kernels.serving():
            found = answers(images, training=False)
        return {key: x[:number] for key, x in found.items()}

    return network.get_concrete_function()


def _weights(model, values):
    """Scope in which the weights of a model are constants, if there are values."""
    if values is None:
        return contextlib.nullcontext()
    pairs = zip(model.weights, map(tf.constant, values), strict=True)
    return keras.StatelessScope(state_mapping=pairs)


def _rows(values, valid):
    """`values` `(N, ...)`, and 0 or "" in the rows that are not valid."""
    nothing = tf.zeros_like(values)
    return tf.where(
        tf.reshape(valid, [-1] + [1] * (values.shape.rank - 1)), values, nothing
    )


def _of_strings(function: Callable, key: str = "image_bytes"):
    """Trace a function of strings `(N,)`, which no other shape can reach."""
    spec = tf.TensorSpec((None,), tf.string, name=key)
    traced = {  # the key of a signature is the name of the argument
        "image_bytes": lambda image_bytes: function(
            tf.ensure_shape(image_bytes, [None])
        ),
        "inputs": lambda inputs: function(tf.ensure_shape(inputs, [None])),
    }
    return tf.function(
        traced[key], input_signature=[spec], autograph=False
    ).get_concrete_function()


def _of_pixels(model, function: Callable, dtype):
    """Trace a function of pixels and of which rows of them are finite.

    What comes in is checked, since a wrong shape could take the whole server down.
    """
    shape = (None, *model.input_shape[1:])
    spec = tf.TensorSpec(shape, dtype, name="images")

    def traced(images):
        images = tf.ensure_shape(images, shape)
        sides = tf.cast(tf.shape(images)[1:3], tf.int64)
        checks = [
            tf.debugging.Assert(
                tf.reduce_all(sides > 0),
                ["images must have a positive height and width, got", sides],
            )
        ]
        if None in shape[1:3]:
            few = tf.reduce_prod(sides) <= MODEL_PIXELS
            told = [f"images must have at most {MODEL_PIXELS} pixels each, got", sides]
            checks.append(tf.debugging.Assert(few, told))
        with tf.control_dependencies(checks):  # a cast to the same type is no operation
            images = tf.cast(tf.identity(images), tf.float32)
        valid = tf.reduce_all(tf.math.is_finite(images), axis=(1, 2, 3))
        return function(_rows(images, valid), valid)

    return tf.function(
        traced, input_signature=[spec], autograph=False
    ).get_concrete_function()
