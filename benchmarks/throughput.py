"""Throughput of ViT-S/16 at 224 pixels and 1000 classes: this package and its peers.

    python benchmarks/throughput.py --rounds 5
    python benchmarks/throughput.py --backends tensorflow,jax,torch --no-train

Contestants: keras_vit on the Keras backends asked for and, where installed, KerasHub on
TensorFlow, timm (eager; it needs torchvision) and OpenVINO running the model of
keras_vit (inference only, on the CPU). What is not installed is listed and skipped.

Every contestant lives in a process of its own, as Keras has one backend a process. The
processes answer in turn, round by round, and one alone computes at any time, so that
whatever else slows the machine slows them all. A ratio is the median over the rounds of
the ratio to KerasHub on TensorFlow, in the same precision and round. Speeds of two
machines, or of two runs, are not comparable; ratios are, on like processors.

Inference is `predict_on_batch`, training is `train_on_batch` with AdamW; the batch is
on the device already, and every batch is waited for. bfloat16 is the policy
`mixed_bfloat16`, autocast in timm, and a precision hint in OpenVINO. Each model is its
library's default: keras_vit alone normalises its pixels, and its GELU is the tanh
approximation where KerasHub and timm compute erf. On a GPU float32 is what each library
makes of it (TensorFlow and JAX use TF32, PyTorch does not).
"""

import argparse
import contextlib
import csv
import dataclasses
import functools
import importlib.metadata
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any

KERAS_BACKENDS = ("tensorflow", "jax", "torch")
PRECISIONS = ("float32", "bfloat16")
TASKS = ("inference", "training")
IMAGE_SIZE = 224
NUM_CLASSES = 1000
LEARNING_RATE = 1e-4
DISTRIBUTIONS = "keras-vit keras keras-hub tensorflow jax torch timm openvino numpy"

# the device, and task -> function that runs one batch and returns once it is done
Steps = tuple[str, dict[str, Callable[[], Any]]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One process of the comparison.

    Args:
        name: Key of `BUILDERS`, and the name in the table.
        backend: What computes.
        needs: Modules without which there is no such process.
        trains: Whether it has a training step.
    """

    name: str
    backend: str
    needs: tuple[str, ...]
    trains: bool = True

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def __str__(self) -> str:
        return f"{self.name} on {self.backend}"


BASELINE = Contestant("KerasHub", "tensorflow", ("keras_hub", "tensorflow"))


def contestants(backends: Sequence[str]) -> list[Contestant]:
    """All rows of the table, in the order in which they take their turns."""
    return [
        *(Contestant("keras_vit", name, ("keras_vit", name)) for name in backends),
        BASELINE,
        Contestant("timm", "torch", ("timm", "torchvision", "torch")),
        Contestant(
            "OpenVINO (keras_vit)",
            "openvino",
            ("openvino", "keras_vit", "tensorflow"),
            trains=False,
        ),
    ]


# The worker process


def batch(batch_size: int) -> tuple[Any, Any]:
    """Raw float32 images `(B, 224, 224, 3)` of 0..255 and int32 labels `(B,)`."""
    import numpy as np

    generator = np.random.default_rng(0)
    shape = (batch_size, IMAGE_SIZE, IMAGE_SIZE, 3)
    images = generator.uniform(0, 255, shape).astype("float32")
    return images, generator.integers(NUM_CLASSES, size=batch_size).astype("int32")


def keras_vit_model() -> Any:
    import keras_vit

    return keras_vit.ViT("small", image_size=IMAGE_SIZE, num_classes=NUM_CLASSES)


def keras_hub_model() -> Any:
    import keras
    import keras_hub

    backbone = keras_hub.models.ViTBackbone(
        image_shape=(IMAGE_SIZE, IMAGE_SIZE, 3),
        patch_size=16,
        num_layers=12,
        num_heads=6,
        hidden_dim=384,
        mlp_dim=1536,
    )
    head = keras.layers.Dense(NUM_CLASSES, dtype="float32")
    return keras.Model(backbone.input, head(backbone.output[:, 0]))


def keras_steps(
    build_model: Callable[[], Any], precision: str, batch_size: int
) -> Steps:
    """One batch through the compiled functions of a Keras model."""
    import keras

    policy = "mixed_bfloat16" if precision == "bfloat16" else "float32"
    keras.config.set_dtype_policy(policy)
    model = build_model()
    model.compile(
        keras.optimizers.AdamW(LEARNING_RATE),
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
    )
    images, labels = map(keras.ops.convert_to_tensor, batch(batch_size))

    def train() -> None:
        model.train_on_batch(images, labels)
        # the loss is there before the update is: wait for the update
        keras.ops.convert_to_numpy(model.trainable_variables[0])

    def infer() -> None:
        model.predict_on_batch(images)  # waits, for it returns NumPy

    device = getattr(model.trainable_variables[0].value, "device", "unknown")
    return str(device), {"inference": infer, "training": train}


def import_timm() -> Any:
    """timm, also where the operators of torchvision do not fit the torch build."""
    import torch

    try:
        import timm
    except RuntimeError:  # torchvision::nms does not exist
        library = torch.library.Library("torchvision", "DEF")
        for name in ("nms", "qnms"):
            library.define(
                f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            )
        import timm
    return timm


def timm_steps(precision: str, batch_size: int) -> Steps:
    """One batch through timm's model, in eager mode."""
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = import_timm().create_model("vit_small_patch16_224").to(device)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE)
    images, labels = (torch.from_numpy(x).to(device) for x in batch(batch_size))
    images = images.permute(0, 3, 1, 2).contiguous()  # (B, 3, 224, 224)
    labels = labels.long()
    autocast = functools.partial(
        torch.autocast, device, torch.bfloat16, enabled=precision == "bfloat16"
    )

    def infer() -> None:
        model.eval()
        with torch.inference_mode(), autocast():
            model(images).float().cpu().numpy()

    def train() -> None:
        model.train()
        optimizer.zero_grad()
        with autocast():
            loss = torch.nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        if device == "cuda":
            torch.cuda.synchronize()

    return device, {"inference": infer, "training": train}


def openvino_steps(precision: str, batch_size: int) -> Steps:
    """One batch through keras_vit's model, converted from its TensorFlow graph."""
    import openvino
    import tensorflow as tf

    images, _ = batch(batch_size)
    serve = tf.function(
        functools.partial(keras_vit_model(), training=False),
        input_signature=[tf.TensorSpec(images.shape, tf.float32)],
    )
    compiled = openvino.compile_model(
        openvino.convert_model(serve.get_concrete_function()),
        "CPU",
        {"INFERENCE_PRECISION_HINT": "bf16" if precision == "bfloat16" else "f32"},
    )
    return "cpu", {"inference": lambda: compiled(images)}


BUILDERS: dict[str, Callable[[str, int], Steps]] = {
    "keras_vit": functools.partial(keras_steps, keras_vit_model),
    "KerasHub": functools.partial(keras_steps, keras_hub_model),
    "timm": timm_steps,
    "OpenVINO (keras_vit)": openvino_steps,
}


def work(name: str, batch_size: int) -> None:
    """Answer requests, a JSON line each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what libraries print is no answer
    build = functools.cache(BUILDERS[name])
    for line in sys.stdin:
        request = json.loads(line)
        try:
            device, steps = build(request["precision"], batch_size)
            start = time.perf_counter()
            for _ in range(request["steps"]):
                steps[request["task"]]()
            answer = {"seconds": time.perf_counter() - start, "device": device}
        except Exception as error:
            first_line = str(error).strip().partition("\n")[0]
            answer = {"error": f"{type(error).__name__}: {first_line}"}
        answers.write(json.dumps(answer) + "\n")


# The parent process


class Worker:
    """The process of a contestant, kept alive between the rounds."""

    def __init__(self, contestant: Contestant, batch_size: int, log: IO[bytes]):
        self.contestant = contestant
        self.device = self.failure = ""
        self._log = log
        keras = contestant.backend in KERAS_BACKENDS
        environment = {
            "KERAS_BACKEND": contestant.backend if keras else "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # the workers share the GPU
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        command = [sys.executable, __file__, "--batch-size", str(batch_size)]
        command += ["--worker", contestant.name]
        self._process = subprocess.Popen(
            command,
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )

    def seconds(self, **request: Any) -> float | None:
        """Time of the batches of a request; None from the first failure on."""
        if self.failure:
            return None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline() or "{}")
        except BrokenPipeError:
            answer = {}
        self.failure = answer.get("error", "" if answer else self._last_words())
        self.device = answer.get("device", self.device)
        return answer.get("seconds")

    def _last_words(self) -> str:
        code = self._process.wait()
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").split("\n")
        return f"exit code {code}: {next(filter(str.strip, reversed(lines)), '')}"

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


Speeds = dict[tuple[Contestant, str, str], list[float]]


def measure(workers: Sequence[Worker], options: argparse.Namespace) -> Speeds:
    """Images per second of every contestant, precision, task and round."""
    from tqdm import tqdm

    turns = [
        (turn, precision, task, worker)
        for turn, precision, task, worker in itertools.product(
            range(options.rounds + 1), options.precisions, options.tasks, workers
        )
        if task == "inference" or worker.contestant.trains
    ]
    speeds: Speeds = {}
    bar = tqdm(turns, unit="turn")
    for turn, precision, task, worker in bar:
        label = f"round {turn}/{options.rounds}" if turn else "warm-up"
        bar.set_description(f"{label}: {worker.contestant}, {precision} {task}")
        seconds = worker.seconds(precision=precision, task=task, steps=options.steps)
        if turn and seconds:  # the warm-up round compiles
            key = worker.contestant, precision, task
            speeds.setdefault(key, []).append(
                options.steps * options.batch_size / seconds
            )
    return speeds


def table(
    rows: Sequence[Contestant], speeds: Speeds, options: argparse.Namespace
) -> list[dict[str, str]]:
    """A row for each precision and contestant, of medians over the rounds."""
    result = []
    for precision, contestant in itertools.product(options.precisions, rows):
        row = {
            "contestant": contestant.name,
            "backend": contestant.backend,
            "precision": precision,
        }
        for task in options.tasks:
            ours = speeds.get((contestant, precision, task), [])
            base = speeds.get((BASELINE, precision, task), [])
            ratios = [x / y for x, y in zip(ours, base, strict=False)]
            row[f"{task} images/s"] = f"{statistics.median(ours):.1f}" if ours else "-"
            row[f"{task} ratio"] = f"{statistics.median(ratios):.2f}" if ratios else "-"
        result.append(row)
    return result


def print_table(rows: Sequence[dict[str, str]]) -> None:
    lines = [list(rows[0]), *(list(row.values()) for row in rows)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)))


def output_of(*command: str) -> str:
    """What a program prints, or nothing where there is no such program."""
    if not shutil.which(command[0]):
        return ""
    return subprocess.run(command, capture_output=True, text=True).stdout


def print_machine() -> None:
    """Print processor, its bfloat16 instructions, accelerators and versions."""
    lscpu = output_of("lscpu")
    model = re.search(r"Model name:\s*(.*)", lscpu)
    print(
        f"Processor: {model[1] if model else platform.machine()},",
        f"{os.cpu_count()} cores,",
        " ".join(re.findall(r"\b(?:amx|avx512)_bf16\b", lscpu)) or "no bfloat16 known",
    )
    print(output_of("nvidia-smi", "-L"), end="")
    found = [f"Python {platform.python_version()}"]
    for name in DISTRIBUTIONS.split():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    print(", ".join(found))


def compare(options: argparse.Namespace) -> None:
    """Start the workers, measure, print the table and write it to a file."""
    everybody = contestants(options.backends)
    rows = [contestant for contestant in everybody if not contestant.missing]
    with contextlib.ExitStack() as stack:
        workers = []
        for contestant in rows:
            log = stack.enter_context(tempfile.TemporaryFile())
            workers.append(Worker(contestant, options.batch_size, log))
            stack.callback(workers[-1].close)
        speeds = measure(workers, options)
    lines = table(rows, speeds, options)
    print_table(lines)
    print(
        f"Batch {options.batch_size}; median of {options.rounds} rounds of "
        f"{options.steps} batches; ratios to {BASELINE}, round by round."
    )
    for contestant in everybody:
        if contestant.missing:
            print(f"{contestant}: not installed: {', '.join(contestant.missing)}")
    for worker in workers:
        print(f"{worker.contestant}: {worker.failure or worker.device}")
    print_machine()
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def positive(text: str) -> int:
    if int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}.")
    return int(text)


def choices(allowed: Sequence[str]) -> Callable[[str], list[str]]:
    """Parser of a comma-separated list."""

    def parse(text: str) -> list[str]:
        names = text.split(",")
        if not set(names) <= set(allowed):
            raise argparse.ArgumentTypeError(f"must be of {allowed}, got {text!r}.")
        return names

    return parse


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = functools.partial(parser.add_argument, metavar="N", type=positive)
    add("--batch-size", default=16, help="images a batch")
    add("--rounds", default=5, help="turns of each contestant, after a warm-up")
    add("--steps", default=3, help="batches a turn")
    parser.add_argument("--train", default=True, action=argparse.BooleanOptionalAction)
    add = functools.partial(parser.add_argument, metavar="LIST")
    add("--precisions", type=choices(PRECISIONS), default=list(PRECISIONS))
    add("--backends", type=choices(KERAS_BACKENDS), default=["tensorflow"])
    parser.add_argument("--output", type=Path, metavar="CSV", help="table as CSV")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    options.tasks = TASKS if options.train else TASKS[:1]
    if options.worker:
        work(options.worker, options.batch_size)
    else:
        compare(options)


if __name__ == "__main__":
    main()
