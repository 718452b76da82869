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
from export.signatures import Servable, signatures
from export.verify import reference_images, sampled
from keras_vit.embedding import Preprocess


def main(path: str) -> None:
    job = json.loads(Path(path).read_text())
    say(next="rebuild")
    model = keras.saving.load_model(job["model"], compile=False)
    preprocess = Preprocess.of_model(model)
    reference = job["reference"]
    images = reference_images(reference["seed"], reference["shape"])
    logits = sampled(model(images.astype("float32"), training=False).numpy(), reference)
    expected = np.asarray(reference["logits"])
    bound = job["tolerance"] * max(1.0, np.abs(expected).max())
    difference = np.abs(logits - expected).max()
    if not difference <= bound:
        say(
            problem=f"The model rebuilt in TensorFlow must give the logits of "
            f"{job['trained_with']} within {bound:.3g}, got {difference:.3g}."
        )
        return
    say(next="trace")
    servable = Servable(model)
    functions = signatures(model, preprocess, job["labels"], job["top_k"])
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
        "weight_bytes": sum(int(np.prod(v.shape)) * 4 for v in model.weights),
        "tolerance": job["tolerance"],
        "reference": reference,
        "reference_file": reference_file(functions["image_bytes"]),
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
    say(next="verify")


def reference_file(answer) -> dict:
    """A small PNG, and what the graph, run in Python, says of it."""
    y, x = np.mgrid[0:60, 0:80].astype("float32")
    waves = [np.sin(x / 7 + i) * np.cos(y / 5 - i) * 100 + 128 for i in range(3)]
    png = tf.io.encode_png(np.stack(waves, -1).astype("uint8"))
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
