"""Throughput of ViT-S/16 at 224 pixels and 1000 classes: this package and its peers.

    python benchmarks/throughput.py --rounds 5 --batch-sizes 16,1
    python benchmarks/throughput.py --backends tensorflow,jax,torch --no-train

Contestants: keras_vit on the Keras backends asked for, keras_vit exported, in the C++
session of a server, and, where installed, KerasHub on TensorFlow, timm (eager; it needs
torchvision) and OpenVINO on the CPU, which infers with keras_vit's model. Each has its
own process, as Keras has one backend a process. They take turns, one alone computing at
any time, so that whatever else slows the machine slows them all. A ratio is the median
over the rounds of the speed relative to KerasHub's, or OpenVINO's, in the same
precision, batch and round; ratios differ between kinds of processor. Work beside it
slows threads that wait for one another, as PyTorch's do, far more than others: on a
busy machine give all of them one core, `taskset --cpu-list 0 python ...`.

Inference is `predict_on_batch`, training is `train_on_batch` with AdamW; a batch of one
image infers only. See `contestants.py` for what each of them runs. float32 on a GPU is
TF32 to TensorFlow and JAX.
"""

import argparse
import contextlib
import itertools
import statistics
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from contestants import (
    COMPILED,
    EXPORTED,
    KERAS_BACKENDS,
    OPENVINO,
    PRECISIONS,
    TASKS,
    Contestant,
    Job,
    Worker,
)
from machine import show

BASELINE = Contestant("KerasHub", "tensorflow", ("keras_hub", "tensorflow"))
CONVERTED = Contestant(OPENVINO, "openvino", ("openvino", "tensorflow"), trains=False)
REFERENCES = {"KerasHub": BASELINE, "OpenVINO": CONVERTED}

# contestant, batch size, precision, task -> images per second of each round
Speeds = dict[tuple[Contestant, int, str, str], list[float]]


def contestants(backends: Sequence[str], compiled: bool) -> list[Contestant]:
    """All rows of the table, in the order in which they take their turns."""
    ours = ["keras_vit", COMPILED] if compiled else ["keras_vit"]
    return [
        *(Contestant(x, name, (name,)) for x in ours for name in backends),
        Contestant(EXPORTED, "C++ session", ("tensorflow",), trains=False),
        BASELINE,
        Contestant("timm", "torch", ("timm", "torchvision", "torch")),
        CONVERTED,
    ]


def measure(workers: Sequence[Worker], options: argparse.Namespace) -> Speeds:
    """Images per second of every contestant, batch size, precision, task and round."""
    from tqdm import tqdm

    rounds = range(options.rounds + 1)
    cells = itertools.product(options.batch_sizes, options.precisions, options.tasks)
    cells = [x for x in cells if x[2] == "inference" or x[0] > 1]
    turns = [
        (turn, *cell, worker)
        for turn, cell, worker in itertools.product(rounds, cells, workers)
        if cell[2] == "inference" or worker.contestant.trains
    ]
    speeds: Speeds = {}
    bar = tqdm(turns, unit="turn", disable=None)
    for turn, batch_size, precision, task, worker in bar:
        label = f"round {turn}/{options.rounds}" if turn else "warm-up"
        bar.set_description(f"{label}: {worker.contestant}, {precision} {task}")
        job = Job(batch_size, precision, options.variant, options.image_size)
        seconds = worker.seconds(job, task, options.steps)
        if turn and seconds:  # the warm-up round compiles
            speed = options.steps * batch_size / sum(seconds)
            cell = worker.contestant, batch_size, precision, task
            speeds.setdefault(cell, []).append(speed)
    return speeds


def table(
    competing: Sequence[Contestant], speeds: Speeds, options: argparse.Namespace
) -> list[dict[str, Any]]:
    """A row for each batch size, precision and contestant, of medians over rounds."""
    result = []
    cells = itertools.product(options.batch_sizes, options.precisions, competing)
    for batch_size, precision, contestant in cells:
        row = {"contestant": contestant.name, "backend": contestant.backend}
        row |= {"batch": batch_size, "precision": precision}
        for task in options.tasks:
            ours = speeds.get((contestant, batch_size, precision, task), [])
            row[f"{task} images/s"] = f"{statistics.median(ours):.1f}" if ours else "-"
            for name, reference in REFERENCES.items():
                if not (reference.trains or task == "inference"):
                    continue
                base = speeds.get((reference, batch_size, precision, task), [])
                ratios = [x / y for x, y in zip(ours, base, strict=False)]
                text = f"{statistics.median(ratios):.2f}" if ratios else "-"
                row[f"{task} / {name}"] = text
        result.append(row)
    return result


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Measure, and say in the last column what failed or is not installed."""
    everybody = contestants(options.backends, options.jit_compile)
    competing = [contestant for contestant in everybody if not contestant.missing]
    with contextlib.ExitStack() as stack:
        workers = []
        for contestant in competing:
            workers.append(Worker(contestant))
            stack.callback(workers[-1].close)
        speeds = measure(workers, options)
    told = {x.contestant: x.failure or x.device for x in workers}
    for contestant in everybody:
        if contestant.missing:
            told[contestant] = f"not installed: {', '.join(contestant.missing)}"
    found = table(everybody, speeds, options)
    notes = itertools.cycle(told[contestant] for contestant in everybody)
    return [{**row, "device": note} for row, note in zip(found, notes, strict=False)]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--batch-sizes", type=_numbers, default=[16], help="such as 16,1")
    add("--rounds", type=int, default=5, help="turns of each, after a warm-up round")
    add("--steps", type=int, default=3, help="batches a turn")
    add("--train", default=True, action=argparse.BooleanOptionalAction)
    add("--precisions", type=_words, default=list(PRECISIONS), metavar="LIST")
    add("--backends", type=_words, default=["tensorflow"], help="of keras_vit")
    add("--jit-compile", action="store_true", help="keras_vit with that too")
    add("--output", type=Path, metavar="FILE", help=".csv or .json, for the table")
    parser.set_defaults(variant="small", image_size=224, tasks=TASKS)
    return parser


def _words(text):
    return text.split(",")


def _numbers(text):
    return [int(x) for x in text.split(",")]


def main() -> None:
    command = parser()
    options = command.parse_args()
    if min(*options.batch_sizes, options.rounds, options.steps) < 1:
        command.error("batch sizes, rounds and steps must be at least 1.")
    for name, allowed in (("precisions", PRECISIONS), ("backends", KERAS_BACKENDS)):
        names = getattr(options, name)
        if not set(names) <= set(allowed):
            command.error(f"{name} must be of {','.join(allowed)}, got {names}.")
    options.tasks = TASKS if options.train else TASKS[:1]
    load = subprocess.getoutput("uptime").rpartition("load average")[-1]
    found = rows(options)
    show(found, options.output)
    print(
        f"Median of {options.rounds} rounds of {options.steps} batches; ratios round "
        "by round."
    )
    print(f"Load average before the run{load}")


if __name__ == "__main__":
    main()
