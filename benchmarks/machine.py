"""What every benchmark prints and writes: tables, the machine, the versions."""

import argparse
import csv
import importlib.metadata
import json
import os
import platform
import re
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

DISTRIBUTIONS = "keras-vit keras keras-hub tensorflow jax torch timm openvino numpy"


def print_table(rows: Sequence[Mapping]) -> None:
    """Columns are those of the first row, in its order."""
    if not rows:
        print("No rows.")
        return
    lines = [list(rows[0]), *([row.get(x, "") for x in rows[0]] for row in rows)]
    lines = [[str(x) for x in line] for line in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    for line in lines:
        print("  ".join(map(str.ljust, line, widths)).rstrip())


def show(rows: Sequence[Mapping], output: Path | None = None) -> None:
    """Print rows and where they were measured, and write them where asked."""
    print_table(rows)
    print(*machine(), sep="\n")
    if output:
        write_table(rows, output)


def options_of(command: argparse.ArgumentParser, **given: Any) -> argparse.Namespace:
    """What a command is given, with other values than its own."""
    options = command.parse_args([])
    vars(options).update(given)
    return options


def write_table(rows: Sequence[Mapping], path: Path) -> None:
    """Write a `.csv` or, told by the name, a `.json` file."""
    if path.suffix == ".json":
        text = json.dumps({"rows": list(rows), "machine": machine()}, indent=2)
        path.write_text(text + "\n")
        return
    columns = dict.fromkeys(column for row in rows for column in row)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(columns))
        writer.writeheader()
        writer.writerows(rows)


def run_python(code: str, *arguments: str, **environment: str) -> str:
    """What Python code prints, in a new process that finds the package and benchmarks.

    Raises:
        RuntimeError: If it fails: the last line of what it says.
    """
    here = Path(__file__).resolve().parent
    path = [str(here), str(here.parent), os.environ.get("PYTHONPATH", "")]
    environment |= {"PYTHONPATH": os.pathsep.join(path), "TF_CPP_MIN_LOG_LEVEL": "3"}
    result = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | environment,
        capture_output=True,
        text=True,
    )
    if result.returncode:
        last = (result.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(last)
    return result.stdout


def peak_memory() -> int:
    """Bytes that this process has had in memory at most, on Linux.

    `ru_maxrss` would not do: a process starts with that of the one that started it.
    """
    status = Path("/proc/self/status").read_text()
    return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024


def machine() -> list[str]:
    """Lines of text: processor and its bfloat16 instructions, GPUs, versions."""
    lscpu, gpus = map(subprocess.getoutput, ("lscpu", "nvidia-smi -L"))
    model = re.search(r"Model name:\s*(.*)", lscpu)
    flags = re.findall(r"\b(?:amx|avx512)_bf16\b", lscpu)
    count = getattr(os, "sched_getaffinity", lambda _: range(os.cpu_count() or 1))
    processor = f"Processor: {model[1] if model else platform.machine()}"
    half = " ".join(flags) or "no bfloat16 known"
    found = [f"Python {platform.python_version()}"]
    for name in DISTRIBUTIONS.split():
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            found.append(f"{name} not installed")
    return [
        f"{processor}, {len(count(0))} cores, {half}",
        *(re.findall(r"^GPU \d+: .*", gpus, re.MULTILINE) or ["No NVIDIA GPU"]),
        ", ".join(found),
    ]
