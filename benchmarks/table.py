"""All tables of speed and memory with one command.

    python benchmarks/table.py --output table.json
    python benchmarks/table.py --quick
    python benchmarks/table.py --parts throughput,startup --rounds 3

The parts are modules beside this file, each with `rows(options)`, a list of dicts, and
`parser()` for its options. A part that fails or is not there is told and costs the
others nothing. What needs a GPU is `gpu.py`, with its own command.
"""

import argparse
import importlib
import os
from pathlib import Path
from typing import Any

from contestants import KERAS_BACKENDS
from machine import machine, options_of, print_table, write_table

PARTS = ("throughput", "memory", "startup", "input")
WHOLE: dict[str, dict[str, Any]] = {"throughput": {"batch_sizes": [16, 1]}}
TINY = {"variant": "tiny", "image_size": 64}
QUICK: dict[str, dict[str, Any]] = {
    "throughput": {**TINY, "batch_sizes": [2, 1], "steps": 1},
    "memory": {**TINY, "batch_size": 4},
    "startup": {"build": "tiny", "export": "tiny"},
    "input": {"batches": 2, "batch_size": 8},
}


def options_for(part: str, options: argparse.Namespace) -> dict[str, Any]:
    """What a part is asked for, other than its own command would be."""
    rounds = 1 if options.quick else options.rounds
    asked = {
        "throughput": {"rounds": rounds, "backends": options.backends},
        "memory": {"backends": options.backends},
        "startup": {"rounds": rounds, "backends": options.backends},
        "input": {"rounds": rounds},
    }
    return asked[part] | (QUICK if options.quick else WHOLE).get(part, {})


def rows(part: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rows of one part; one that says why, if it fails."""
    try:
        module = importlib.import_module(part)
        given = options_for(part, options)
        found = module.rows(options_of(module.parser(), **given))
        return [{"part": part, **row} for row in found]
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        return [{"part": part, "error": f"{type(error).__name__}: {first_line}"}]


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--parts", type=_words, default=list(PARTS), help=f"of {','.join(PARTS)}")
    add("--backends", type=_words, default=["tensorflow"], help="such as jax,torch")
    add("--rounds", type=int, default=5)
    add("--quick", action="store_true", help="tiny models, one round: does it work?")
    add("--output", type=Path, metavar="FILE", help=".csv or .json, for all parts")
    return parser


def _words(text):
    return text.split(",")


def main() -> None:
    command = parser()
    options = command.parse_args()
    for name, known in (("parts", PARTS), ("backends", KERAS_BACKENDS)):
        if not set(getattr(options, name)) <= set(known):
            command.error(f"{name} must be of {known}, got {getattr(options, name)}.")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
    print(*machine(), sep="\n")
    every = []
    for part in options.parts:
        found = rows(part, options)
        every += found
        print(f"\n{part}")
        print_table(found)
        if options.output:  # what is measured is not lost with a later part
            write_table(every, options.output)


if __name__ == "__main__":
    main()
