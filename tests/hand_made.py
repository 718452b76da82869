"""A model by hand with the signatures of an export, and two versions of it."""

import json
import shutil

import tensorflow as tf

from export import Runtime
from export.bundle import complete, write_bundle
from export.versions import publish, staging

MANIFEST = {
    "model": "vit_tiny",
    "task": "classification",
    "labels": ["cat", "dog", "émeu"],
    "preprocess": {"image_size": [16, 24]},
    "max_pixels": 50_000_000,
    "batch_sizes": [1, 2, 4, 8, 16, 32],
}

LABEL_MAPS = {
    "serving_default": {
        "inputs": {"image_bytes": {"dtype": "DT_STRING", "shape": [-1]}},
        "outputs": {"label_map_bytes": {"dtype": "DT_STRING", "shape": [-1]}},
    }
}  # of a model that answers with label maps


def save(path):
    """A SavedModel that decodes, averages and multiplies."""
    model = tf.Module()
    model.weights = tf.Variable(tf.ones((3, 3)))

    def images(images):
        logits = tf.reduce_mean(tf.cast(images, tf.float32), (1, 2)) @ model.weights
        return {"logits": logits, "valid": tf.reduce_all(tf.math.is_finite(logits), -1)}

    def decode(data):
        image = tf.io.decode_image(data, channels=3, expand_animations=False)
        return tf.image.resize(tf.ensure_shape(image, (None, None, 3)), (16, 24))

    def image_bytes(image_bytes):
        spec = tf.TensorSpec((16, 24, 3), tf.float32)
        return images(tf.map_fn(decode, image_bytes, fn_output_signature=spec))

    def inputs(inputs):
        feature = {"image/encoded": tf.io.FixedLenFeature((), tf.string)}
        data = tf.io.parse_example(inputs, feature)["image/encoded"]
        return {"scores": image_bytes(data)["logits"]}

    def trace(function, dtype, *shape):
        spec = tf.TensorSpec((None, *shape), dtype, name=function.__name__)
        traced = tf.function(function, input_signature=[spec])
        return traced.get_concrete_function()

    signatures = {
        "serving_default": trace(image_bytes, tf.string),
        "strict": trace(image_bytes, tf.string),
        "classify": trace(inputs, tf.string),
        "images": trace(images, tf.float32, None, None, 3),
        "images_uint8": trace(images, tf.uint8, 16, 24, 3),
    }
    tf.saved_model.save(model, str(path), signatures)


def publish_two(folder):
    """Versions 1 and 2 in a folder, and their bundle."""
    with staging(folder) as target:
        save(target)
        with Runtime(target) as runtime:
            complete(target, MANIFEST, runtime.signatures)
        shutil.copytree(target, target.with_name("copy"))
        publish(target.with_name("copy"), folder)
        published = publish(target, folder)
    (published / "assets.extra/manifest.json").write_text(json.dumps(MANIFEST))
    write_bundle(folder, "digits", MANIFEST, runtime.signatures)
    return folder
