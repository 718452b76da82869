"""Any backend in, one pure TensorFlow SavedModel out, published by one rename.

The parent saves the model and computes reference logits with the backend that trained
it. A child process with TensorFlow (`export.worker`) rebuilds the model, compares,
traces the signatures and writes. The C++ runtime checks what was written
(`export.verify`). Only then does the version directory get its number, which is what a
server looks for.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
from tqdm.auto import tqdm

import keras_vit
from export.bundle import pinned, served_name, write_bundle
from export.checks import reference_images, sampled
from export.precision import (
    TOLERANCES,
    check_precision,
    check_samples,
    compare,
    computes_in,
)
from export.verify import Report, verify
from export.versions import publish, staging, versions
from keras_vit.embedding import Preprocess
from keras_vit.head import class_labels
from keras_vit.model_file import read_model

STAGES = ("save", "rebuild", "trace", "write", "verify", "publish")


def export_saved_model(
    model_or_file: keras.Model | str | Path,
    directory: str | Path,
    labels: Sequence[str] | None = None,
    *,
    version: int | None = None,
    top_k: int = 5,
    max_pixels: int | None = None,
    features: Sequence[int | str] | None = None,
    precision: str | None = None,
    freeze: bool | None = None,
    samples: np.ndarray | tuple[np.ndarray, np.ndarray] | None = None,
    progress: bool = True,
) -> Path:
    """Export a model as `<directory>/<version>/` for TensorFlow Serving.

    A client asks for probabilities and best classes of encoded files (`serving_default`
    and `strict`) or of raw pixels (`images`, `images_uint8`), for `features`,
    `feature_maps`, or by the Classify API; of a model of a class for every pixel
    (`SemanticFPN`) for label maps of the size of the file. `export.signatures` lists
    what each takes and gives. Files are decoded, turned, resized and cropped as the
    model records it. A model of label maps of any size sees a file as it is; one of
    fixed size sees it resized, never cropped, and its logits are resized back.

    Constant factors (LayerScale, the scale of attention, mean and deviation of pixels)
    are multiplied into the weights; in float32 the answers are those of the model
    within 1e-5 of max(1, max |logit|).

    Args:
        model_or_file: A model of this package, or a `.keras` file of one; any backend.
        directory: Folder of the model's versions, the `base_path` of the server.
        labels: Name of each class; None for those that the model carries
            (`ViT(labels=...)`), or else "0", "1", ...
        version: Number of the version; None for the next one.
        top_k: Number of best classes that are named, C at most.
        max_pixels: The most pixels of a file; a larger one is not decoded. None for
            2^26, of a model of label maps 2^22, or 2^20 where it sees files as they
            are.
        features: Whose outputs `feature_maps` answers, each as `(N, h, w, D)` by the
            name of its block: numbers or names as for `keras_vit.features`, such as
            `[3, 7, -1]`. None for the last one, normalised as the head sees it.
        precision: `"float32"`, `"bfloat16"`, or None for what the model computes in.
            Pixels and logits are float32 in each. Where it is less than the model's,
            what it costs is measured on the artifact and written to its report.
        freeze: Whether weights are constants of the graph, which TensorFlow packs
            once on a CPU, and of which a server has a copy for each signature that is
            asked; or variables, which are shared. None for constants in half precision
            up to 256 MiB.
        samples: Images that a lower precision is judged on: raw pixels `(N, H, W, 3)`
            of 0..255, or a pair of them and their labels; None for 32 of noise.
        progress: Whether to show a progress bar.

    Returns:
        The version directory.

    Raises:
        FileNotFoundError: If the file does not exist.
        FileExistsError: If the version exists already; versions are never changed.
        ValueError: If the file is no model, `labels` does not fit, the rebuilt model
            answers differently, the artifact does not pass `verify`, `precision` is
            unknown, `samples` or `features` do not fit, weights of 2 GiB are to be
            frozen, or `bundle/models.config` was changed by hand and cannot be read.
        RuntimeError: If the child process fails.
    """
    directory = Path(directory)
    taken = [x.number for x in versions(directory)]
    if version is not None and (version < 0 or version in taken):
        raise FileExistsError(
            f"version must be a new number; {directory} has {taken}, got {version}."
        )
    check_precision(precision)
    pinned(directory)  # before anything is written
    model = model_or_file
    if not isinstance(model, keras.Model):
        model = read_model(model_or_file)
    labels = labels_of(model, labels)
    is_lower = precision == "bfloat16" != computes_in(model)
    if samples is not None and not is_lower:
        raise ValueError(
            "samples are for a lower precision than that of the model, such as "
            f"precision='bfloat16' of one of float32, got {precision!r} of one of "
            f"{computes_in(model)}."
        )
    samples = check_samples(samples, model)
    features = check_features(model, features)
    bar = tqdm(total=len(STAGES), unit=" stages", disable=not progress)
    with staging(directory) as target, tempfile.TemporaryDirectory() as scratch, bar:
        bar.set_description(STAGES[0])
        job = prepare(model, Path(scratch), target, labels, top_k, max_pixels)
        job |= {"precision": precision, "freeze": freeze, "features": features}
        run_worker(job, bar)
        bar.set_description("verify")
        report = verify(target, progress=False)
        if not report.ok:
            hint = "\nPass precision=None for the model's own." if is_lower else ""
            raise ValueError(f"The artifact does not pass verify:\n{report}{hint}")
        answer = _answering_on_cpu(model)
        cost = compare(target, *samples, answer) if is_lower else None
        _record(target, report, cost)
        bar.update()
        bar.set_description("publish")
        published = publish(target, directory, version)
        newest = versions(directory)[-1].path
        manifest = json.loads((newest / "assets.extra" / "manifest.json").read_text())
        write_bundle(
            directory, served_name(directory), manifest, manifest["signatures"]
        )
        bar.update()
        bar.set_description("exported")
    return published


def labels_of(model, labels):
    shape = model.output_shape
    if not isinstance(shape, tuple) or len(shape) not in (2, 4):
        raise ValueError(
            f"The model must give logits (N, C) or (N, H, W, C), got {shape}; of the "
            "features of its blocks export the model itself, with features=[...]."
        )
    if labels is None:
        labels = class_labels(model) or map(str, range(shape[-1]))
    labels = list(labels)
    if len(labels) != shape[-1]:
        raise ValueError(
            f"labels must name the model's {shape[-1]} classes, got {len(labels)}."
        )
    return labels


def check_features(model, layers):
    """The layers, once each; None for none.

    Raises:
        ValueError: If there is none such, or the model has a class for every pixel.
    """
    if layers is None:
        return None
    if len(model.output_shape) == 4:
        raise ValueError(
            f"features are those of a classifier, got {layers!r} and {model.name!r} of "
            "a class for every pixel; export its backbone."
        )
    return list(keras_vit.features(model, layers).output)


def prepare(model, scratch, target, labels, top_k=1, max_pixels=None):
    """Save the model and its reference logits; return what the worker must know."""
    plain = keras.Model(model.input, model.output, name=model.name)
    plain.save(scratch / "model.keras")
    height, width = Preprocess.of_model(model).image_size
    reference = {"seed": 0, "shape": [4, height, width, 3], "step": 1}
    if len(model.output_shape) == 4:  # one image, some thousand of its pixels
        reference |= {"shape": [1, height, width, 3], "step": -(-width // 32)}
    images = reference_images(reference["seed"], reference["shape"]).astype("float32")
    logits = sampled(logits_on_cpu(model, images), reference)
    return {
        "model": str(scratch / "model.keras"),
        "target": str(target),
        "labels": labels,
        "top_k": min(top_k, len(labels)),
        "max_pixels": max_pixels,
        "tolerance": TOLERANCES[computes_in(model)],
        "reference": {**reference, "logits": logits.tolist()},
        "trained_with": keras.backend.backend(),
        "scratch": str(scratch),
    }


def logits_on_cpu(model, images):
    """Logits by the backend of this process, computed on the CPU."""
    return _answering_on_cpu(model)(images)


def _answering_on_cpu(model):
    weights = [
        [keras.ops.convert_to_numpy(v) for v in variables]
        for variables in (model.trainable_variables, model.non_trainable_variables)
    ]

    def answer(images):
        flash = keras.config.is_flash_attention_enabled()
        keras.config.disable_flash_attention()  # JAX would take the GPU's for the CPU
        try:
            with keras.device("cpu:0"):
                logits, _ = model.stateless_call(*weights, images, training=False)
        finally:
            if flash is not False:
                keras.config.enable_flash_attention()
        return keras.ops.convert_to_numpy(logits)

    return answer


def run_worker(job, bar, module="export.worker"):
    path = Path(job["scratch"]) / "job.json"
    path.write_text(json.dumps(job))
    root = str(Path(keras_vit.__file__).parent.parent)
    environment = {
        **os.environ,
        "KERAS_BACKEND": "tensorflow",
        "CUDA_VISIBLE_DEVICES": "-1",
        "TF_CPP_MIN_LOG_LEVEL": "2",
        "PYTHONPATH": os.pathsep.join(
            filter(None, [root, os.environ.get("PYTHONPATH")])
        ),
    }
    with tempfile.TemporaryFile("w+") as log:
        worker = subprocess.Popen(
            [sys.executable, "-m", "export.lean", module, str(path)],
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env=environment,
        )
        problem = None
        with worker.stdout:
            for line in worker.stdout:  # one JSON a line: a stage done, or a problem
                message = json.loads(line)
                problem = message.get("problem", problem)
                if "next" in message:
                    bar.update()
                    bar.set_description(message["next"])
        if problem:
            worker.wait()
            raise ValueError(problem)
        if worker.wait():
            log.seek(0)
            raise RuntimeError(
                f"The export process ended with status {worker.returncode}:\n"
                + log.read()[-4000:]
            )


def _record(target: Path, report: Report, cost: dict | None) -> None:
    path = target / "assets.extra" / "report.json"
    told = report.as_dict() | {"precision": cost}
    path.write_text(json.dumps(told, indent=2) + "\n")
