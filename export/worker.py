"""The process with TensorFlow that rebuilds a model and writes the SavedModel.

    python -m export.worker job.json

Prints one JSON object a line: `{"next": stage}` or `{"problem": sentence}`.
"""

import base64
import importlib.metadata
import json
import platform
import sys
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf

import keras_vit
from export.bundle import BATCH_SIZES, complete
from export.checks import reference_images, sampled
from export.checksums import write_checksums
from export.frozen import constants, fold, set_precision
from export.precision import TOLERANCES, computes_in
from export.requests import waves
from export.signatures import Contract, Functions, Servable, signatures
from keras_vit.embedding import Preprocess

NAMES = {tf.float32: "FLOAT"}


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    model = rebuild(job)
    if model is None:
        return
    preprocess = Preprocess.of_model(model)
    reference = job["reference"]
    say(next="trace")
    precision = job["precision"] or computes_in(model)
    fold(model, pixels=precision == "float32")
    if job["precision"]:
        set_precision(model, precision)
    try:
        values = constants(model, job["freeze"])
    except ValueError as error:
        say(problem=str(error))
        return
    servable = Servable(None if values is not None else model)
    told = (job[x] for x in ("labels", "top_k", "max_pixels", "features"))
    contract = Contract(preprocess, *told)
    functions = signatures(model, contract, values)
    say(next="write")
    target = Path(job["target"])
    tf.saved_model.save(servable, str(target), functions)
    extra = target / "assets.extra"
    extra.mkdir()
    manifest = {
        "model": model.name,
        "task": "segmentation" if len(model.output_shape) == 4 else "classification",
        "labels": job["labels"],
        "preprocess": {
            "image_size": preprocess.image_size,
            "crop_ratio": preprocess.crop_ratio,
            "interpolation": preprocess.interpolation,
        },
        "batch_sizes": BATCH_SIZES[: 4 if len(model.output_shape) == 4 else None],
        "max_pixels": contract.pixels_of(model),
        "signatures": contracts(functions),
        "precision": precision,
        "weights": "variables" if values is None else "constants",
        "weight_bytes": sum(x.nbytes for x in values or model.get_weights()),
        "tolerance": max(job["tolerance"], TOLERANCES[precision]),
        "reference": reference,
        "reference_file": reference_file(functions["serving_default"]),
        "trained_with": job["trained_with"],
        "versions": {
            "python": platform.python_version(),
            "keras": keras.__version__,
            "tensorflow": tf.__version__,
            "keras-vit": keras_vit.__version__,
            "numpy": importlib.metadata.version("numpy"),
        },
    }
    (extra / "manifest.json").write_text(json.dumps(manifest, indent=2) + "\n")
    complete(target, manifest, manifest["signatures"])
    write_checksums(target)
    say(next="verify")


def contracts(functions: Functions) -> dict:
    """Names, dtypes and shapes of what signatures take and give, as a server does."""

    def side(specs):
        return {
            key: {
                "dtype": f"DT_{NAMES.get(x.dtype, x.dtype.name.upper())}",
                "shape": [-1, *(-1 if n is None else n for n in x.shape[1:])],
            }
            for key, x in sorted(specs.items())
        }

    return {
        name: {
            "inputs": side({x.name: x for x in function.structured_input_signature[0]}),
            "outputs": side(function.structured_outputs),
        }
        for name, function in sorted(functions.items())
    }


def rebuild(job: dict) -> keras.Model | None:
    """The model in TensorFlow; None, said as a problem, where it answers otherwise."""
    say(next="rebuild")
    model = keras.saving.load_model(job["model"], compile=False)
    reference = job["reference"]
    images = reference_images(reference["seed"], reference["shape"])
    logits = sampled(model(images.astype("float32"), training=False).numpy(), reference)
    expected = np.asarray(reference["logits"])
    bound = job["tolerance"] * max(1.0, np.abs(expected).max())
    difference = np.abs(logits - expected).max()
    if difference <= bound:
        return model
    say(
        problem=f"The model rebuilt in TensorFlow must give the logits of "
        f"{job['trained_with']} within {bound:.3g}, got {difference:.3g}."
    )
    return None


def reference_file(answer) -> dict:
    """A small PNG, and what the graph, run in Python, says of it."""
    png = tf.io.encode_png(waves(60, 80))
    outputs = answer(png[None])
    key = "probabilities" if "probabilities" in outputs else "label_map_bytes"
    value = outputs[key][0].numpy()
    return {
        "png": text(png.numpy()),
        key: text(value) if isinstance(value, bytes) else value.tolist(),
    }


def text(data: bytes) -> str:
    return base64.b64encode(data).decode()


def say(**message) -> None:
    print(json.dumps(message), flush=True)


if __name__ == "__main__":
    main(sys.argv[1])
