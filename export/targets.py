"""A model as one file for ONNX Runtime, LiteRT or OpenVINO, checked in that runtime.

Raw pixels of 0..255 in (`images`, float32 `(N, H, W, 3)`), `logits` and `probabilities`
out (of a model of a class for every pixel `label_map`, int32 `(N, H, W)`). The file
also tells the labels and how an image file becomes those pixels. A process with
TensorFlow (`export.target_worker`) writes it; here its runtime, without TensorFlow,
must give the logits of the backend that trained the model, before it gets its name.
"""

import importlib.util
import json
import os
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path

import keras
import numpy as np
from tqdm.auto import tqdm

import keras_vit
from export.checks import reference_images
from export.saved_model import labels_of, logits_on_cpu, prepare, run_worker
from export.versions import staging
from keras_vit.embedding import Preprocess
from keras_vit.model_file import read_model, replacing

TARGETS = {  # suffix: name, packages that write and run it, whether one file is < 2 GiB
    ".onnx": ("ONNX", ("tf2onnx", "onnx", "onnxruntime"), True),
    ".tflite": ("LiteRT", ("ai_edge_litert",), True),
    ".xml": ("OpenVINO", ("openvino",), False),
}
METADATA = "keras_vit"  # the name under which a file keeps what it tells
BOUND = 1e-4  # of max(1, max |logit|), in float32
STAGES = ("save", "rebuild", "convert", "check", "publish")


def export_to(
    model_or_file: keras.Model | str | Path,
    path: str | Path,
    labels: Sequence[str] | None = None,
    *,
    progress: bool = True,
) -> Path:
    """Write a model for another runtime; a file that is there is replaced.

    The number of images is free in all three; so are height and width where they are
    in the model. Weights are float32: a model of mixed precision is written with the
    same weights and computes in float32.

    Args:
        model_or_file: A model of this package, or a `.keras` file of one; any backend.
        path: `.onnx`, `.tflite` (LiteRT), or `.xml` (OpenVINO, weights beside it as
            `.bin`).
        labels: Name of each class; None for those of the model, or else "0", "1", ...
        progress: Whether to show a progress bar.

    Returns:
        The path.

    Raises:
        FileNotFoundError: If the model file does not exist.
        ValueError: If the suffix is another, the file is no model, `labels` does not
            fit, the model is too large for the format or cannot be converted, or the
            runtime does not give its logits within 1e-4 x max(1, max |logit|) (of
            mixed precision, within the bound of `export_saved_model`).
        RuntimeError: If a package is missing, or the child process fails.
    """
    path = Path(path)
    name = check_target(path)
    model = model_or_file
    if not isinstance(model, keras.Model):
        model = read_model(model_or_file)
    labels = labels_of(model, labels)
    size = 4 * model.count_params()
    if TARGETS[path.suffix][2] and size >= 2**31:
        raise ValueError(
            f"{name} holds less than 2 GiB in a file, and the weights take "
            f"{size / 2**30:.1f} GiB: export to OpenVINO (.xml) or a SavedModel."
        )
    bar = tqdm(total=len(STAGES), unit=" stages", disable=not progress)
    # Beside the path, so that its files get their names by renaming.
    with staging(path.parent) as scratch, bar:
        scratch.mkdir()
        bar.set_description(STAGES[0])
        metadata = _metadata(model, labels)
        job = prepare(model, scratch, scratch / path.name, labels)
        job["metadata"] = json.dumps(metadata)
        run_worker(job, bar, "export.target_worker")
        bar.set_description("check")
        _check(model, scratch / path.name, metadata, job["tolerance"])
        bar.update()
        bar.set_description("publish")
        _publish(scratch / path.name, path)
        bar.update()
        bar.set_description("exported")
    return path


class TargetModel:
    """A file of `export_to` in its own runtime, on the CPU, in float32.

    Attributes:
        metadata: `{"model", "task", "labels", "preprocess", ...}`, of the file.

    Args:
        path: `.onnx`, `.tflite` or `.xml`.

    Raises:
        ValueError: If the suffix is another.
        RuntimeError: If a package is missing.
    """

    def __init__(self, path: str | Path):
        path = Path(path)
        check_target(path)
        self._run, text = _OPENERS[path.suffix](str(path))
        self.metadata = json.loads(text)

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs, by name, for images float32 `(N, H, W, 3)` of 0..255."""
        return self._run(images)


def check_target(path: str | Path) -> str:
    """The name of the target that a path asks for.

    Raises:
        ValueError: If its suffix is of none.
        RuntimeError: If a package is missing.
    """
    suffix = Path(path).suffix
    if suffix not in TARGETS:
        raise ValueError(
            f"A target's file must end in {', '.join(TARGETS)}, got {str(path)!r}; a "
            "new folder of versions has no ending."
        )
    name, packages, _ = TARGETS[suffix]
    missing = [x for x in packages if importlib.util.find_spec(x) is None]
    if missing:
        raise RuntimeError(
            f'{name} needs {", ".join(missing)}: pip install "keras-vit[targets]"'
        )
    return name


def _metadata(model, labels):
    preprocess = Preprocess.of_model(model)
    return {
        "model": model.name,
        "task": "segmentation" if len(model.output_shape) == 4 else "classification",
        "labels": labels,
        "pixels": "RGB, 0 to 255, float32, (N, H, W, 3)",
        "preprocess": {
            "image_size": list(preprocess.image_size),
            "crop_ratio": preprocess.crop_ratio,
            "interpolation": preprocess.interpolation,
        },
        "trained_with": keras.backend.backend(),
        "keras_vit": keras_vit.__version__,
    }


def _check(model, path, metadata, tolerance):
    """Raise unless the runtime gives the logits of this process's backend."""
    name = TARGETS[path.suffix][0]
    try:
        target = TargetModel(path)
    except Exception as error:  # each runtime has errors of its own
        raise ValueError(
            f"{name} cannot load this model: {_first_line(error)}"
        ) from error
    if target.metadata != metadata:
        raise ValueError(f"{name} must keep {metadata}, it gives {target.metadata}.")
    for size in _sizes(model):
        images = reference_images(1, (3, *size, 3)).astype("float32")
        expected = logits_on_cpu(model, images)
        bound = max(BOUND, tolerance) * max(1.0, np.abs(expected).max())
        for number in (1, 3):
            told = f"{number} images of {size[0]} x {size[1]}"
            try:
                logits = target(images[:number])["logits"]
            except Exception as error:
                raise ValueError(
                    f"{name} cannot run this model on {told}: {_first_line(error)}"
                ) from error
            _compare(name, told, logits, expected[:number], bound)


def _compare(name, told, logits, expected, bound):
    if logits.shape != expected.shape:
        raise ValueError(
            f"{name} must give logits {expected.shape} for {told}, got {logits.shape}."
        )
    difference = np.abs(logits - expected).max()
    if not difference <= bound:
        raise ValueError(
            f"{name} must give the logits of {keras.backend.backend()} within "
            f"{bound:.3g} for {told}, got a difference of {difference:.3g}."
        )


def _sizes(model):
    """The size that is recorded, and an odd one where the model takes any."""
    height, width = Preprocess.of_model(model).image_size
    yield height, width
    if None in model.input_shape[1:3]:
        yield height + 5, 2 * width - 3


def _first_line(error):
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _publish(written: Path, path: Path) -> None:
    """Give a file its name; an .xml is never seen beside weights of another."""
    if path.suffix == ".xml":
        path.unlink(missing_ok=True)
        with replacing(path.with_suffix(".bin")) as temporary:
            os.replace(written.with_suffix(".bin"), temporary)
    with replacing(path) as temporary:
        os.replace(written, temporary)


def _open_onnx(path: str) -> tuple[Callable, str]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]

    def run(images):
        return dict(zip(names, session.run(names, {"images": images}), strict=True))

    return run, session.get_modelmeta().custom_metadata_map[METADATA]


def _open_litert(path: str) -> tuple[Callable, str]:
    from ai_edge_litert.interpreter import Interpreter

    runner = Interpreter(path).get_signature_runner("serving_default")
    with zipfile.ZipFile(path) as archive:
        text = archive.read(f"{METADATA}.json").decode()
    return lambda images: dict(runner(images=images)), text


def _open_openvino(path: str) -> tuple[Callable, str]:
    import openvino

    core = openvino.Core()
    model = core.read_model(path)
    # Some processors would else compute in bfloat16.
    precision = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = core.compile_model(model, "CPU", precision)

    def run(images):
        answer = compiled(images)
        return {x.any_name: answer[x] for x in compiled.outputs}

    return run, model.get_rt_info(METADATA).astype(str)


_OPENERS = {".onnx": _open_onnx, ".tflite": _open_litert, ".xml": _open_openvino}
