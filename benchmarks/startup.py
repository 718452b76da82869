"""What one waits for before anything is computed: import, building, export, warm-up.

    python benchmarks/startup.py --rounds 5
    python benchmarks/startup.py --backends tensorflow,jax,torch --rounds 3

- import: a process that imports `keras_vit` against one that imports `keras`, turn by
  turn; the median of the differences is what this package adds.
- build: the construction of a model, ViT-L/16 unless `--quick`, in a new process, after
  another small model, so that no library is loaded in the time that is taken.
- export: `export_saved_model` of ViT-S/16, its checks and warm-up included.
- first request: of the exported model in a C++ session, after the warm-up requests that
  a server sends itself, against the median of later ones; and without the warm-up.
"""

import argparse
import functools
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from machine import run_python, show

WORDS = {"type": lambda text: text.split(","), "metavar": "LIST"}
BACKENDS = ("tensorflow", "jax", "torch")
LATER = 20  # requests after the first


def timed(function: Callable[[], Any]) -> tuple[float, Any]:
    """Seconds that a call takes, and what it returns."""
    start = time.perf_counter()
    result = function()
    return time.perf_counter() - start, result


def child(code: str, backend: str, *arguments: str) -> str:
    """What Python code prints last, in a new process under a backend."""
    printed = run_python(code, *arguments, KERAS_BACKEND=backend)
    return (printed.splitlines() or [""])[-1]


def import_row(backend: str, rounds: int) -> dict[str, Any]:
    """What `import keras_vit` takes, and adds to `import keras`."""
    child("import keras_vit", backend)  # files into the cache of the system
    found: dict[str, list[float]] = {"keras": [], "keras_vit": []}
    for _ in range(rounds):
        for name, seconds in found.items():
            code = f"import time; t = time.perf_counter(); import {name}; "
            code += "print(time.perf_counter() - t)"
            seconds.append(float(child(code, backend)))
    pairs = list(zip(found["keras_vit"], found["keras"], strict=True))
    return {
        "seconds": statistics.median(found["keras_vit"]),
        "against": "import keras",
        "difference": statistics.median(a - b for a, b in pairs),
        "ratio": statistics.median(a / b for a, b in pairs),
    }


BUILD = """
import sys, time
import keras_vit
keras_vit.ViT("tiny", depth=1, image_size=32, num_classes=2)
t = time.perf_counter()
keras_vit.ViT(sys.argv[1])
print(time.perf_counter() - t)
"""


def build_row(backend: str, rounds: int, variant: str) -> dict[str, Any]:
    """What the construction of a model takes."""
    seconds = [float(child(BUILD, backend, variant)) for _ in range(rounds)]
    return {"seconds": statistics.median(seconds)}


EXPORT = """
import sys, time
import keras_vit, export
model = keras_vit.ViT(sys.argv[1])
t = time.perf_counter()
export.export_saved_model(model, sys.argv[2], progress=False)
print(time.perf_counter() - t)
"""


def request_rows(directory: Path) -> list[dict[str, Any]]:
    """The first request with and without the warm-up, against later ones."""
    from export.runtime import Runtime
    from export.warmup import NAME, read_warmup, sample_image, sample_inputs

    requests = read_warmup(directory / "assets.extra" / NAME)
    result = []
    for warm in (False, True):
        with Runtime(directory) as runtime:
            if warm:
                seconds = timed(lambda: [_send(runtime, *x) for x in requests])[0]
                result.append({"what": "warm-up", "seconds": seconds})
            signature = runtime.signatures["serving_default"]
            inputs = sample_inputs(signature, sample_image(), 1, (224, 224))
            first, *later = (
                timed(functools.partial(_send, runtime, "serving_default", inputs))[0]
                for _ in range(1 + LATER)
            )
        usual = statistics.median(later)
        name = "first request after warm-up" if warm else "first request, no warm-up"
        row = {"what": name, "seconds": first, "against": "later request"}
        result.append(row | {"difference": first - usual, "ratio": first / usual})
    return result


def _send(runtime, signature, inputs):
    return runtime.run(signature, **inputs)


def rows(options: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each thing that one waits for, and backend."""
    from tqdm import tqdm

    parts = [(x, part) for x in options.backends for part in ("import", "build")]
    parts += [(x, "export") for x in options.backends if x in options.exports]
    result = []
    bar = tqdm(parts, "start-up", disable=None)
    for backend, part in bar:
        bar.set_postfix_str(f"{part} on {backend}")
        try:
            found = _part(part, backend, options)
        except RuntimeError as error:
            found = [{"what": part, "error": str(error)}]
        result += [_shown(row, backend) for row in found]
    return result


def _part(part, backend, options):
    if part == "import":
        return [{"what": "import keras_vit", **import_row(backend, options.rounds)}]
    if part == "build":
        row = build_row(backend, options.rounds, options.build)
        return [{"what": f"build ViT {options.build}", **row}]
    with tempfile.TemporaryDirectory() as folder:
        seconds = float(child(EXPORT, backend, options.export, folder))
        row = {"what": f"export ViT {options.export}", "seconds": seconds}
        return [row, *request_rows(next(Path(folder).glob("[0-9]*")))]


def _shown(row, backend):
    shown = {"benchmark": "start-up", "what": row["what"], "backend": backend}
    for name in ("seconds", "against", "difference", "ratio"):
        value = row.get(name, "-")
        shown[name] = f"{value:.3f}" if isinstance(value, float) else value
    return shown | {"error": row.get("error", "")}


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--backends", default=BACKENDS, **WORDS)
    add("--build", default="large", metavar="VARIANT", help="of the model to build")
    add("--export", default="small", metavar="VARIANT", help="of the model to export")
    add(
        "--exports", default=["tensorflow"], type=lambda x: x.split(","), metavar="LIST"
    )
    add("--output", type=Path, metavar="FILE", help="a .csv or .json file")
    return parser


def main() -> None:
    options = parser().parse_args()
    show(rows(options), options.output)


if __name__ == "__main__":
    main()
