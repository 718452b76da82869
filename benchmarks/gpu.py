"""Inference and training on one GPU: keras_vit on JAX and PyTorch against timm.

    python benchmarks/gpu.py --output gpu.csv                # an H100 or H200
    python benchmarks/gpu.py --output gpu.csv --remat        # and with less memory
    python benchmarks/gpu.py --output quick.csv --quick      # tiny, on any machine

ViT S/16, B/16 and L/16 at 224 pixels and B/16 at 512, in bfloat16. Each contestant has
its own process; those of one model, task and batch size take turns, after a turn that
compiles and is not counted. timm runs through `torch.compile`, under autocast. A ratio
is the median over the rounds of the speed relative to timm's in the same round.

Each turn is a line of the CSV file, written before the next begins: the same command
goes on where it was stopped, however it was. Who runs out of memory, or fails, is told
in the table and left out from there on; a new file asks again. The contestants of a
cell share the memory of the GPU, which is why batches are of a size that leaves room.

Model FLOP utilisation: FLOPs of the model, those of its matrix products, attention
included, 2 for a multiplication with its addition, 3 times as many for a training step
(what rematerialisation computes again is no work of the model), times images/s, over
the peak of the device in dense bfloat16: the data sheets of the H100 (SXM and PCIe),
H200 and A100, https://www.nvidia.com/en-us/data-center/; `--peak-tflops` for others.
"""

import argparse
import contextlib
import csv
import dataclasses
import itertools
import os
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from contestants import (
    NUM_CLASSES,
    PATCH_SIZE,
    TASKS,
    TIMM_COMPILED,
    Contestant,
    Job,
    Worker,
)
from machine import show

PEAKS = {  # part of a device's name: dense bfloat16 FLOP/s; the first that fits
    "H100 PCIe": 756e12,
    "H100": 989.4e12,
    "H200": 989.4e12,
    "A100": 312e12,
}
JOBS = (  # batches of which three contestants fit into 80 GB together
    Job(128, "bfloat16", "small", 224),
    Job(64, "bfloat16", "base", 224),
    Job(32, "bfloat16", "large", 224),
    Job(16, "bfloat16", "base", 512),
)
QUICK = (Job(2, "bfloat16", "tiny", 64, depth=2),)
TIMM = Contestant(TIMM_COMPILED, "torch", ("timm", "torchvision", "torch"))
COLUMNS = ("variant", "image_size", "batch_size", "task", "contestant", "round")
COLUMNS += ("steps", "seconds", "peak_bytes", "device", "error")


def flops(job: Job, task: str) -> float:
    """FLOPs of the model for one image: matrix products alone, with a class token."""
    dim, depth, _, hidden = job.sizes
    patches = (job.image_size // PATCH_SIZE) ** 2
    tokens = patches + 1
    block = 4 * tokens * dim**2 + 2 * tokens**2 * dim + 2 * tokens * dim * hidden
    embedding = patches * 3 * PATCH_SIZE**2 * dim
    products = embedding + depth * block + dim * NUM_CLASSES
    return 2.0 * products * (3 if task == "training" else 1)


def contestants(
    backends: Iterable[str], remat: bool, timm: bool = True
) -> list[Contestant]:
    """In the order in which they take their turns."""
    plain = [*(Contestant("keras_vit", name, ("keras", name)) for name in backends)]
    plain += [TIMM] * timm
    if not remat:
        return plain
    return plain + [dataclasses.replace(x, remat=True) for x in plain]


def read(path: Path) -> list[dict[str, str]]:
    """The turns that are done; a line that a kill has cut is cut off the file."""
    if not path.exists() or not path.stat().st_size:
        with path.open("w", newline="") as file:
            csv.writer(file).writerow(COLUMNS)
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        with path.open("r+b") as file:
            file.truncate(len(whole))
    with path.open(newline="") as file:
        found = csv.DictReader(file)
        if tuple(found.fieldnames or ()) != COLUMNS:
            raise ValueError(
                "--output must be a new file or one that this benchmark wrote, with "
                f"the columns {', '.join(COLUMNS)}; {path} has {found.fieldnames}."
            )
        return list(found)


def append(path: Path, turn: dict[str, Any]) -> None:
    """Add a turn, which is then on the disk."""
    with path.open("a", newline="") as file:
        csv.DictWriter(file, COLUMNS).writerow(turn)
        file.flush()
        os.fsync(file.fileno())


def key(turn: dict[str, Any]) -> tuple[str, ...]:
    """Which cell and contestant a turn is of."""
    return tuple(str(turn[name]) for name in COLUMNS[:5])


def described(job: Job, task: str, contestant: Contestant) -> dict[str, Any]:
    """The first columns of a turn."""
    return {
        "variant": job.variant,
        "image_size": job.image_size,
        "batch_size": job.batch_size,
        "task": task,
        "contestant": str(contestant),
    }


def measure(options: argparse.Namespace) -> None:
    """Take the turns that the file has not, cell by cell."""
    from tqdm import tqdm

    done = read(options.output)
    have = {(*key(turn), int(turn["round"])) for turn in done}
    failed = {key(turn) for turn in done if turn["error"]}
    able = [x for x in options.contestants if not x.missing]
    cells = list(itertools.product(options.jobs, options.tasks))
    total = len(cells) * len(able) * (options.rounds + 1)
    with tqdm(total=total, unit="turn", disable=None) as bar:
        for job, task in cells:
            left = []
            for contestant in able:
                name = key(described(job, task, contestant))
                rounds = range(1, options.rounds + 1)
                todo = [i for i in rounds if (*name, i) not in have]
                if name not in failed and todo:
                    left.append((contestant, todo))
            _cell(job, task, left, options, bar)
            bar.n = (cells.index((job, task)) + 1) * len(able) * (options.rounds + 1)
            bar.refresh()


def _cell(job, task, left, options, bar):
    """Turns of one model, task and batch size; the warm-up is round 0, not written."""
    with contextlib.ExitStack() as stack:
        workers = {}
        for contestant, _ in left:
            workers[contestant] = Worker(contestant)
            stack.callback(workers[contestant].close)
        turns = itertools.product(range(options.rounds + 1), left)
        for number, (contestant, todo) in turns:
            worker = workers[contestant]
            if (number and number not in todo) or worker.failure:
                continue
            bar.set_description(
                f"{job.variant}/{PATCH_SIZE} at {job.image_size}, {task}, round "
                f"{number}/{options.rounds}: {contestant}"
            )
            seconds = worker.seconds(job, task, options.steps if number else 2)
            bar.update()
            if number == 0 and not worker.failure:
                continue
            turn = described(job, task, contestant) | {
                "round": number,
                "steps": options.steps,
                "seconds": sum(seconds) if seconds else "",
                "peak_bytes": worker.peak_bytes or "",
                "device": worker.device,
                "error": _reason(worker.failure),
            }
            append(options.output, turn)


def _reason(failure):
    """Out of memory is one word in every library."""
    words = ("OutOfMemory", "out of memory", "RESOURCE_EXHAUSTED", "exit code -9")
    return "out of memory" if any(x in failure for x in words) else failure


def table(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each model, task and contestant, of medians over the rounds."""
    groups: dict[tuple[str, ...], list[dict[str, str]]] = {}
    for turn in read(options.output):
        groups.setdefault(key(turn), []).append(turn)
    cells = itertools.product(options.jobs, options.tasks, options.contestants)
    return [_row(*cell, groups, options.peak_tflops) for cell in cells]


def _row(job, task, contestant, groups, peak_tflops):
    turns = groups.get(key(described(job, task, contestant)), [])
    base = groups.get(key(described(job, task, TIMM)), [])
    good = {turn["round"]: float(turn["seconds"]) for turn in turns if turn["seconds"]}
    theirs = {turn["round"]: float(turn["seconds"]) for turn in base if turn["seconds"]}
    row = {"model": f"{job.variant}/{PATCH_SIZE}", "pixels": job.image_size}
    row |= {"task": task, "batch": job.batch_size, "contestant": str(contestant)}
    row["GFLOP/image"] = f"{flops(job, task) / 1e9:.1f}"
    row |= dict.fromkeys(("images/s", "MFU", "peak GiB", "ratio to timm"), "-")
    errors = [turn["error"] for turn in turns if turn["error"]]
    if contestant.missing:
        errors = [f"not installed: {', '.join(contestant.missing)}"]
    row["device"] = [*errors, *(turn["device"] for turn in turns), "not run"][0]
    if not good:
        return row
    steps = int(turns[0]["steps"])
    speed = statistics.median(steps * job.batch_size / x for x in good.values())
    row["images/s"] = f"{speed:.1f}"
    peak = peak_of(turns[0]["device"], peak_tflops)
    if peak:
        row["MFU"] = f"{speed * flops(job, task) / peak:.1%}"
    used = [int(turn["peak_bytes"]) for turn in turns if turn["peak_bytes"]]
    if used:
        row["peak GiB"] = f"{max(used) / 2**30:.2f}"
    ratios = [theirs[number] / x for number, x in good.items() if number in theirs]
    if ratios:
        row["ratio to timm"] = f"{statistics.median(ratios):.2f}"
    return row


def peak_of(device: str, peak_tflops: float | None) -> float | None:
    """Peak FLOP/s of a device in dense bfloat16; None if it is not known."""
    if peak_tflops is not None:
        return peak_tflops * 1e12
    return next((peak for name, peak in PEAKS.items() if name in device), None)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """Take the turns that are left, and return the table."""
    measure(options)
    return table(options)


def options_of(arguments: Sequence[str] | None) -> argparse.Namespace:
    """What a command line says; None for that of this process."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--output", type=Path, required=True, metavar="CSV", help="file of the turns")
    add("--backends", default="jax,torch", help="of keras_vit")
    add("--rounds", type=int, default=None, help="5, after a warm-up")
    add("--steps", type=int, default=None, help="batches a turn, 20")
    add("--timm", default=True, action=argparse.BooleanOptionalAction)
    add("--remat", action="store_true", help="also with rematerialisation")
    add("--quick", action="store_true", help="2 blocks of Ti/16 at 64 pixels")
    add("--peak-tflops", type=float, help="of the device, dense bfloat16")
    options = parser.parse_args(arguments)
    options.jobs = QUICK if options.quick else JOBS
    options.rounds = options.rounds or (2 if options.quick else 5)
    options.steps = options.steps or (2 if options.quick else 20)
    options.tasks = TASKS
    backends = options.backends.split(",")
    options.contestants = contestants(backends, options.remat, options.timm)
    return options


def main() -> None:
    options = options_of(None)
    show(rows(options))
    print(f"Median of {options.rounds} rounds of {options.steps} batches, bfloat16.")


if __name__ == "__main__":
    main()
