"""Where the time of an exported model goes: oneDNN's own trace, kernel by kernel.

    python benchmarks/kernels.py
    python benchmarks/kernels.py --precision float32 --batch-size 1

ViT-S/16 is exported, and run in the C++ session of a server with `ONEDNN_VERBOSE=1`.
Each row is a kind of work in one batch, mean over the batches: how often it is done,
its time, and of products the rate. What TensorFlow computes without oneDNN, and the
time between kernels, is the difference to the whole. The trace itself costs a little.
"""

import argparse
import collections
import dataclasses
import json
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from contestants import EXPORT, PRECISIONS, Job
from machine import run_python, show

RUN = """
import sys, time
import numpy as np
from export.session import _Session
session = _Session(sys.argv[1])
batch, batches = int(sys.argv[2]), int(sys.argv[3])
images = np.random.default_rng(0).uniform(0, 255, (batch, 224, 224, 3))
images = images.astype("float32")
for i in range(2 + batches):
    print("batch", i, flush=True)
    start = time.perf_counter()
    session.run("images", {"images": images})
    print("took", time.perf_counter() - start, flush=True)
"""


def kernels(trace: str, batches: int) -> Iterator[tuple[str, str, str, float]]:
    """Kind of work, implementation, shapes and milliseconds of each kernel timed."""
    timed = trace.partition(f"batch {trace.count('took') - batches}\n")[2]
    for line in timed.splitlines():
        if line.startswith("onednn_verbose") and ",exec," in line:
            _, _, _, _, _, kind, implementation, *_, shapes, milliseconds = line.split(
                ","
            )
            after = re.findall(r"eltwise_\w+|(?<=:)sum", line)
            name = " + ".join([kind, *after])
            yield name, implementation or "gemm", shapes, float(milliseconds)


def operations(shapes: str) -> int:
    """Of a product: twice the multiplications; 0 of what is none."""
    if found := re.fullmatch(r"mb(\d+)ic(\d+)oc(\d+)", shapes):
        rows, inner, columns = map(int, found.groups())
        return 2 * rows * inner * columns
    if not re.fullmatch(r"[\dx]+:[\dx]+", shapes):
        return 0
    sides = [[int(x) for x in part.split("x")] for part in shapes.split(":")]
    if len(sides[0]) == len(sides[1]) > 1:
        *batch, rows, inner = sides[0]
        total = 2 * rows * inner * sides[1][-1]
        for side in batch:
            total *= side
        return total
    return 0


def rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """A row for each kind of work and its shapes, the longest first; then the whole."""
    job = Job(options.batch_size, options.precision, options.variant, 224)
    with tempfile.TemporaryDirectory() as folder:
        run_python(EXPORT, json.dumps(dataclasses.asdict(job)), folder)
        count = str(options.batches)
        model = os.path.join(folder, "1")
        trace = run_python(
            RUN, model, str(options.batch_size), count, ONEDNN_VERBOSE="1"
        )
    times, counts = collections.Counter(), collections.Counter()
    for *cell, milliseconds in kernels(trace, options.batches):
        times[tuple(cell)] += milliseconds / options.batches
        counts[tuple(cell)] += 1
    found = []
    for (kind, implementation, shapes), milliseconds in times.most_common():
        number = counts[kind, implementation, shapes] / options.batches
        done = operations(shapes) * number
        rate = f"{done / milliseconds / 1e6:.0f}" if done else "-"
        row = {"work": kind, "kernel": implementation, "shapes": shapes}
        row |= {"times": f"{number:g}", "ms": f"{milliseconds:.1f}", "GFLOP/s": rate}
        found.append(row)
    took = [float(x) for x in re.findall(r"took (\S+)", trace)][-options.batches :]
    whole = 1e3 * sum(took) / len(took)
    empty = {"kernel": "", "shapes": "", "times": "1", "GFLOP/s": ""}
    found.append({"work": "oneDNN", **empty, "ms": f"{sum(times.values()):.1f}"})
    found.append({"work": "a batch", **empty, "ms": f"{whole:.1f}"})
    return found


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--precision", default="bfloat16", choices=PRECISIONS)
    add("--batch-size", type=int, default=16)
    add("--batches", type=int, default=8)
    add("--variant", default="small")
    add("--output", type=Path, metavar="FILE", help="a .csv or .json file")
    return parser


def main() -> None:
    options = parser().parse_args()
    show(rows(options), options.output)


if __name__ == "__main__":
    main()
