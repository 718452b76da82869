"""Throughput of ViT-S/16 at 224 pixels and 1000 classes: this package and its peers.

    python benchmarks/throughput.py --rounds 5
    python benchmarks/throughput.py --backends tensorflow,jax,torch --no-train

Contestants: keras_vit on the Keras backends asked for and, where installed, KerasHub on
TensorFlow, timm (eager; it needs torchvision) and OpenVINO on the CPU, which infers
with keras_vit's model. Each has its own process, as Keras has one backend a process.
They take turns, one alone computing at any time, so that whatever else slows the
machine slows them all. A ratio is the median over the rounds of the speed relative to
KerasHub's, in the same precision and round; ratios differ between kinds of processor.
Work beside it slows threads that wait for one another, as PyTorch's do, far more than
others: on a busy machine give all of them one core, `taskset --cpu-list 0 python ...`.

Inference is `predict_on_batch`, training is `train_on_batch` with AdamW; the batch is
on the device already, and every batch is waited for. bfloat16 is the Keras policy
`mixed_bfloat16`, autocast in timm, a hint in OpenVINO. Models are their libraries'
defaults: keras_vit's alone normalises pixels, and has the tanh approximation of GELU
where KerasHub's and timm's compute erf. float32 on a GPU is TF32 to TensorFlow and JAX.
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
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

KERAS_BACKENDS = "tensorflow", "jax", "torch"
PRECISIONS = "float32", "bfloat16"
TASKS = "inference", "training"
IMAGE_SIZE = 224
NUM_CLASSES = 1000
LEARNING_RATE = 1e-4
DISTRIBUTIONS = "keras-vit keras keras-hub tensorflow jax torch timm openvino numpy"

# the device, and task -> function that runs one batch and returns once it is done
Steps = tuple[str, dict[str, Callable[[], Any]]]


@dataclasses.dataclass(frozen=True)
class Contestant:
    """One process of the comparison."""

    name: str  # key of `BUILDERS`
    backend: str
    needs: tuple[str, ...]  # modules
    trains: bool = True

    @property
    def missing(self) -> list[str]:
        return [name for name in self.needs if importlib.util.find_spec(name) is None]

    def __str__(self) -> str:
        return f"{self.name} on {self.backend}"


OPENVINO = "OpenVINO (keras_vit)"
BASELINE = Contestant("KerasHub", "tensorflow", ("keras_hub", "tensorflow"))


def contestants(backends: Sequence[str]) -> list[Contestant]:
    """All rows of the table, in the order in which they take their turns."""
    return [
        *(Contestant("keras_vit", name, (name,)) for name in backends),
        BASELINE,
        Contestant("timm", "torch", ("timm", "torchvision", "torch")),
        Contestant(OPENVINO, "openvino", ("openvino", "tensorflow"), trains=False),
    ]


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
        (IMAGE_SIZE, IMAGE_SIZE, 3), 16, 12, 6, hidden_dim=384, mlp_dim=1536
    )  # patches of 16 pixels, 12 blocks, 6 heads
    head = keras.layers.Dense(NUM_CLASSES, dtype="float32")
    return keras.Model(backbone.input, head(backbone.output[:, 0]))


def keras_steps(
    build_model: Callable[[], Any], precision: str, batch_size: int
) -> Steps:
    """One batch through the compiled functions of a Keras model."""
    import keras

    mixed = "mixed_" if precision == "bfloat16" else ""
    keras.config.set_dtype_policy(mixed + precision)
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
            boxes = "Tensor dets, Tensor scores, float iou_threshold"
            library.define(f"{name}({boxes}) -> Tensor")
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
    OPENVINO: openvino_steps,
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


class Worker:
    """The process of a contestant, kept alive between the rounds."""

    def __init__(self, contestant: Contestant, batch_size: int):
        self.contestant = contestant
        self.device = self.failure = ""
        keras = contestant.backend in KERAS_BACKENDS
        environment = {
            "KERAS_BACKEND": contestant.backend if keras else "tensorflow",
            "TF_CPP_MIN_LOG_LEVEL": "3",
            "TF_FORCE_GPU_ALLOW_GROWTH": "true",  # the workers share the GPU
            "XLA_PYTHON_CLIENT_PREALLOCATE": "false",
        }
        task = [f"--worker={contestant.name}", f"--batch-size={batch_size}"]
        self._process = subprocess.Popen(
            [sys.executable, __file__, *task],
            env=os.environ | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def seconds(self, **request: Any) -> float | None:
        """Time of the batches of a request; None from the first failure on."""
        if self.failure:
            return None
        try:
            self._process.stdin.write(json.dumps(request) + "\n")
            self._process.stdin.flush()
            answer = json.loads(self._process.stdout.readline())
        except (BrokenPipeError, json.JSONDecodeError):
            answer = {"error": f"ended with exit code {self._process.wait()}"}
        self.failure = answer.get("error", "")
        self.device = answer.get("device", self.device)
        return answer.get("seconds")

    def close(self) -> None:
        """End the process."""
        self._process.kill()
        self._process.communicate()


Speeds = dict[tuple[Contestant, str, str], list[float]]


def measure(workers: Sequence[Worker], options: argparse.Namespace) -> Speeds:
    """Images per second of every contestant, precision, task and round."""
    from tqdm import tqdm

    rounds = range(options.rounds + 1)
    turns = itertools.product(rounds, options.precisions, options.tasks, workers)
    turns = [x for x in turns if x[2] == "inference" or x[3].contestant.trains]
    speeds: Speeds = {}
    bar = tqdm(turns, unit="turn")
    for turn, precision, task, worker in bar:
        label = f"round {turn}/{options.rounds}" if turn else "warm-up"
        bar.set_description(f"{label}: {worker.contestant}, {precision} {task}")
        seconds = worker.seconds(precision=precision, task=task, steps=options.steps)
        if turn and seconds:  # the warm-up round compiles
            speed = options.steps * options.batch_size / seconds
            speeds.setdefault((worker.contestant, precision, task), []).append(speed)
    return speeds


def table(
    rows: Sequence[Contestant], speeds: Speeds, options: argparse.Namespace
) -> list[dict[str, str]]:
    """A row for each precision and contestant, of medians over the rounds."""
    result = []
    for precision, contestant in itertools.product(options.precisions, rows):
        row = {"contestant": contestant.name, "backend": contestant.backend}
        row["precision"] = precision
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


def print_machine() -> None:
    """Print processor, its bfloat16 instructions, accelerators and versions."""
    lscpu, gpus = map(subprocess.getoutput, ("lscpu", "nvidia-smi -L"))
    model = re.search(r"Model name:\s*(.*)", lscpu)
    flags = re.findall(r"\b(?:amx|avx512)_bf16\b", lscpu)
    print(f"Processor: {model[1] if model else platform.machine()},", end=" ")
    count = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    print(f"{len(count(0))} cores,", " ".join(flags) or "no bfloat16 known")
    print(*re.findall(r"^GPU \d+: .*", gpus, re.MULTILINE) or ["No NVIDIA GPU"])
    found = [f"Python {platform.python_version()}"]
    for name in DISTRIBUTIONS.split():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    print(", ".join(found))


def compare(options: argparse.Namespace) -> None:
    """Start the workers, measure, print the table and write it to a file."""
    load = subprocess.getoutput("uptime").rpartition("load average")[-1]
    everybody = contestants(options.backends)
    rows = [contestant for contestant in everybody if not contestant.missing]
    with contextlib.ExitStack() as stack:
        workers = []
        for contestant in rows:
            workers.append(Worker(contestant, options.batch_size))
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
    print(f"Load average before the run{load}")
    print_machine()
    if options.output:
        with options.output.open("w", newline="") as file:
            writer = csv.DictWriter(file, list(lines[0]))
            writer.writeheader()
            writer.writerows(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--batch-size", type=int, default=16, metavar="IMAGES")
    add("--rounds", type=int, default=5, help="turns of each, after a warm-up round")
    add("--steps", type=int, default=3, help="batches a turn")
    add("--train", default=True, action=argparse.BooleanOptionalAction)
    add("--precisions", default=",".join(PRECISIONS), metavar="LIST")
    add("--backends", default="tensorflow", metavar="LIST", help="of keras_vit")
    add("--output", type=Path, metavar="CSV", help="file for the table")
    add("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if min(options.batch_size, options.rounds, options.steps) < 1:
        parser.error("batch size, rounds and steps must be at least 1.")
    for name, allowed in (("precisions", PRECISIONS), ("backends", KERAS_BACKENDS)):
        names = getattr(options, name).split(",")
        if not set(names) <= set(allowed):
            parser.error(f"{name} must be of {','.join(allowed)}, got {names}.")
        setattr(options, name, names)
    options.tasks = TASKS if options.train else TASKS[:1]
    if options.worker:
        work(options.worker, options.batch_size)
    else:
        compare(options)


if __name__ == "__main__":
    main()
