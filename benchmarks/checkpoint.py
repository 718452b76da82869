"""Seconds and memory of loading a ViT-B/16 from each format of published checkpoints.

    python benchmarks/checkpoint.py --formats safetensors,npz,pth --repeats 3

Each file holds made-up weights in the names and shapes of a published one, 86.6 million
of them, and is loaded by a process of its own, from the page cache. That process loads
a tiny model first, so that what a library does once is not counted. The ratio is the
growth of its resident memory at the peak (`VmHWM` of Linux), in sizes of the file: 1 is
the model itself.
"""

import argparse
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

ROOT = Path(__file__).parent.parent
FORMATS = ("safetensors", "npz", "pth")
BASE = {"dim": 768, "depth": 12, "classes": 1000, "side": 14, "patch": 16}
TINY = {"dim": 48, "depth": 1, "classes": 2, "side": 2, "patch": 16}
HEADS = 12
LOAD = """
import json, sys, time, warnings
import keras
import keras_vit
tiny, path, heads = sys.argv[1:]
told = {"normalization": "inception", "num_heads": int(heads)}
warnings.simplefilter("ignore")
def kilobytes(name):
    with open("/proc/self/status") as file:
        return int(next(x for x in file if x.startswith(name)).split()[1])
keras_vit.from_checkpoint(tiny, **told)
before = kilobytes("VmRSS")
start = time.perf_counter()
model = keras_vit.from_checkpoint(path, **told)
seconds = time.perf_counter() - start
row = {"seconds": seconds, "bytes": 1024 * (kilobytes("VmHWM") - before)}
row |= {"backend": keras.backend.backend(), "parameters": model.count_params()}
print()
print(json.dumps(row))
"""


def timm_shapes(dim, depth, classes, side, patch):
    """Shapes of a ViT by the names of timm and DeiT."""
    shapes = {
        "cls_token": (1, 1, dim),
        "pos_embed": (1, side**2 + 1, dim),
        "patch_embed.proj.weight": (dim, 3, patch, patch),
        "patch_embed.proj.bias": (dim,),
    }
    dense = {"attn.qkv": (3 * dim, dim), "attn.proj": (dim, dim)}
    dense |= {"mlp.fc1": (4 * dim, dim), "mlp.fc2": (dim, 4 * dim)}
    for i in range(depth):
        for name in ("norm1", "norm2"):
            shapes |= {f"blocks.{i}.{name}.{x}": (dim,) for x in ("weight", "bias")}
        for name, shape in dense.items():
            shapes[f"blocks.{i}.{name}.weight"] = shape
            shapes[f"blocks.{i}.{name}.bias"] = shape[:1]
    shapes |= {"norm.weight": (dim,), "norm.bias": (dim,)}
    return {**shapes, "head.weight": (classes, dim), "head.bias": (classes,)}


def google_shapes(dim, depth, classes, side, patch):
    """Shapes of a ViT by the names of Google's code."""
    shapes = {
        "cls": (1, 1, dim),
        "Transformer/posembed_input/pos_embedding": (1, side**2 + 1, dim),
        "embedding/kernel": (patch, patch, 3, dim),
        "embedding/bias": (dim,),
    }
    attention, heads = "MultiHeadDotProductAttention_1", (HEADS, dim // HEADS)
    for i in range(depth):
        block = f"Transformer/encoderblock_{i}"
        for name in ("LayerNorm_0", "LayerNorm_2"):
            shapes |= {f"{block}/{name}/{x}": (dim,) for x in ("scale", "bias")}
        for name in ("query", "key", "value"):
            shapes[f"{block}/{attention}/{name}/kernel"] = (dim, *heads)
            shapes[f"{block}/{attention}/{name}/bias"] = heads
        shapes[f"{block}/{attention}/out/kernel"] = (*heads, dim)
        shapes[f"{block}/{attention}/out/bias"] = (dim,)
        for name, inside, outside in (("0", dim, 4 * dim), ("1", 4 * dim, dim)):
            shapes[f"{block}/MlpBlock_3/Dense_{name}/kernel"] = (inside, outside)
            shapes[f"{block}/MlpBlock_3/Dense_{name}/bias"] = (outside,)
    shapes |= {f"Transformer/encoder_norm/{x}": (dim,) for x in ("scale", "bias")}
    return {**shapes, "head/kernel": (dim, classes), "head/bias": (classes,)}


def write(path: Path, sizes: dict) -> Path:
    """Write made-up weights of a ViT in the format that the path's suffix says."""
    shapes = (google_shapes if path.suffix == ".npz" else timm_shapes)(**sizes)
    largest = max(map(math.prod, shapes.values()))
    numbers = np.random.default_rng(0).normal(0, 0.02, largest).astype("float32")
    arrays = {
        name: numbers[: math.prod(shape)].reshape(shape)
        for name, shape in shapes.items()
    }
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(arrays, path)
    else:
        import torch

        tensors = {name: torch.tensor(array) for name, array in arrays.items()}
        torch.save({"model": tensors}, path)
    return path


def measure(path: Path, tiny: Path) -> dict:
    """Load a file in a process of its own: seconds and growth of memory.

    Raises:
        RuntimeError: If it does not load.
    """
    command = [sys.executable, "-c", LOAD, str(tiny), str(path), str(HEADS)]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if answer.returncode:
        raise RuntimeError(answer.stderr[-3000:])
    row = json.loads(answer.stdout.splitlines()[-1])
    size = path.stat().st_size
    return {**row, "file": size, "ratio": row["bytes"] / size}


def table(rows: list[dict]) -> str:
    """Markdown: of each format the median time and the worst ratio."""
    lines = [["format", "file", "seconds (median)", "peak memory / file (worst)"]]
    lines.append(["---"] * 4)
    for name in dict.fromkeys(row["format"] for row in rows):
        of_format = [row for row in rows if row["format"] == name]
        seconds = statistics.median(row["seconds"] for row in of_format)
        ratio = max(row["ratio"] for row in of_format)
        size = f"{of_format[0]['file'] / 1e6:.0f} MB"
        lines.append([name, size, f"{seconds:.1f}", f"{ratio:.2f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def versions(backend: str) -> str:
    """Of everything that takes part, where it is installed."""
    said = [f"Python {platform.python_version()}"]
    names = {"keras", backend, "numpy", "safetensors", "torch"}
    for name in sorted(names):
        try:
            said.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            said.append(f"no {name}")
    return ", ".join(said)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--formats", default=",".join(FORMATS), help="such as npz,pth")
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    formats = arguments.formats.split(",")
    if unknown := set(formats) - set(FORMATS):
        parser.error(f"formats are {', '.join(FORMATS)}, got {', '.join(unknown)}")
    rows = []
    with (
        tempfile.TemporaryDirectory() as folder,
        tqdm(total=len(formats) * arguments.repeats, unit=" loads") as bar,
    ):
        for name in formats:
            bar.set_description(f"writing {name}")
            try:
                tiny = write(Path(folder, f"tiny.{name}"), TINY)
                path = write(Path(folder, f"base.{name}"), BASE)
            except ImportError as error:
                bar.write(f"{name} is left out: {error}")
                continue
            bar.set_description(f"loading {name}")
            for _ in range(arguments.repeats):
                rows.append({"format": name, **measure(path, tiny)})
                bar.update()
            path.unlink()
    backend = rows[0]["backend"]
    print(f"\n{rows[0]['parameters']:,} parameters on {backend}, {os.cpu_count()} CPUs")
    print(f"{versions(backend)}\n")
    print(table(rows))


if __name__ == "__main__":
    main()
