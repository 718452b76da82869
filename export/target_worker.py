"""The process with TensorFlow that writes a model for another runtime.

    python -m export.target_worker job.json

It says what it does as `export.worker` does. The graph is the one of the signature
`images`, from a model that computes in float32.
"""

import contextlib
import json
import sys
import tempfile
import zipfile
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

from export.signatures import Servable
from export.targets import METADATA, TARGETS
from export.worker import rebuild, say


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    model = rebuild(job)
    if model is None:
        return
    say(next="convert")
    target = Path(job["target"])
    name = TARGETS[target.suffix][0]
    try:
        with contextlib.redirect_stdout(sys.stderr):  # stdout is for what is said
            _WRITERS[target.suffix](in_float32(model), target, job["metadata"])
    except Exception as error:  # a converter raises whatever it likes
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        say(problem=f"{name} cannot hold this model: {reason}")
        return
    say(next="check")


def in_float32(model: keras.Model) -> keras.Model:
    """The same model with the same weights, every layer of which computes in float32.

    The targets know bfloat16 and float16 less well than the backends do.
    """
    if all(layer.compute_dtype == "float32" for layer in model.layers):
        return model
    copy = keras.models.clone_model(
        model,
        clone_function=lambda layer: type(layer).from_config(
            {**layer.get_config(), "dtype": "float32"}
        ),
    )
    copy.set_weights(model.get_weights())
    return copy


def _function(model):
    spec = tf.TensorSpec((None, *model.input_shape[1:]), tf.float32, name="images")

    def images(images):
        logits = model(images, training=False)
        if len(model.output_shape) == 4:
            label_map = tf.argmax(logits, -1, output_type=tf.int32)
            return {"logits": logits, "label_map": label_map}
        return {"logits": logits, "probabilities": tf.nn.softmax(logits)}

    return tf.function(images, input_signature=[spec]), spec


@contextlib.contextmanager
def _saved_model(model):
    with tempfile.TemporaryDirectory() as folder:
        function, _ = _function(model)
        tf.saved_model.save(Servable(model), folder, function.get_concrete_function())
        yield folder


def _write_onnx(model, target, metadata):
    import onnx
    import tf2onnx

    function, spec = _function(model)
    handlers = {"Erfc": (_erfc, []), "FloorMod": (_floor_mod, [])}
    proto, _ = tf2onnx.convert.from_function(
        function, [spec], opset=18, custom_op_handlers=handlers
    )
    _name_sides(proto.graph.input, "NHW")
    _name_sides(proto.graph.output, "NHW" if len(model.output_shape) == 4 else "N")
    onnx.helper.set_model_props(proto, {METADATA: metadata})
    onnx.checker.check_model(proto)
    onnx.save(proto, target)


def _name_sides(values, letters):
    """Sides of any size are `N`, `H` and `W`, where tf2onnx numbers them."""
    for value in values:
        for side, letter in zip(
            value.type.tensor_type.shape.dim, letters, strict=False
        ):
            if not side.HasField("dim_value"):
                side.dim_param = letter


def _erfc(graph, node, name, _):
    """1 - Erf, where tf2onnx 1.17 writes an Erfc that ONNX does not have."""
    node.type = "Erf"
    output = node.output[0]
    one = graph.make_const(f"{name}_one", np.float32(1)).output[0]
    result = graph.insert_new_node_on_output(
        "Sub", output, name=f"{name}_of_one", inputs=[one, output]
    )
    graph.copy_dtype(output, result.output[0])
    graph.copy_shape(output, result.output[0])


def _floor_mod(graph, node, name, _):
    """The Mod of ONNX, of integers; tf2onnx 1.17 writes the remainder of C, for -5 % 4
    -1 instead of 3, and images are padded too little."""
    node.type = "Mod"


def _write_litert(model, target, metadata):
    with _saved_model(model) as folder:
        converter = tf.lite.TFLiteConverter.from_saved_model(
            folder, signature_keys=["serving_default"]
        )
        target.write_bytes(converter.convert())
    # Files that go with a model are a ZIP archive behind it, as LiteRT Metadata says.
    with zipfile.ZipFile(target, "a") as archive:
        archive.writestr(f"{METADATA}.json", metadata)
        archive.writestr("labels.txt", "\n".join(json.loads(metadata)["labels"]) + "\n")


def _write_openvino(model, target, metadata):
    import openvino

    with _saved_model(model) as folder:
        written = openvino.Core().read_model(folder)
        written.set_rt_info(metadata, METADATA)
        openvino.save_model(written, target, compress_to_fp16=False)


_WRITERS = {".onnx": _write_onnx, ".tflite": _write_litert, ".xml": _write_openvino}


if __name__ == "__main__":
    main(sys.argv[1])
