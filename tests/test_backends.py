"""The same tests on every other backend that is installed, each in a child process.

`pytest` runs the backend of KERAS_BACKEND in its own process; a process of Keras has
one. Only what is backend-agnostic runs again: the library, the fit loop, losses and
metrics, the optimizer, and the export of a model of that backend.
"""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import keras
import pytest

TESTS = Path(__file__).parent
LIBRARY = sorted((TESTS.parent / "keras_vit").glob("[a-z]*.py"))
OTHER_NAMES = ("package", "optimize", "loop", "task")
FILES = [
    path
    for name in [*(module.stem for module in LIBRARY), *OTHER_NAMES]
    if (path := TESTS / f"test_{name}.py").exists()
]
EXPORT = TESTS / "test_export.py"
PARITY = f"{EXPORT}::test_one_cpvt_artifact_answers_every_size"
SLOW = f"{EXPORT}::test_every_position_is_exported"
OTHERS = [
    name
    for name in ("tensorflow", "jax", "torch")
    if name != keras.backend.backend() and importlib.util.find_spec(name)
]


one_backend = pytest.mark.skipif(
    os.environ.get("KERAS_VIT_ONE_BACKEND") == "1", reason="asked for one backend only"
)


@one_backend
@pytest.mark.parametrize("backend", OTHERS)
def test_on_another_backend(backend):
    assert len(FILES) >= 6
    run(backend, "not slow", *FILES, PARITY)


@one_backend
@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_every_position_is_exported_from_another_backend(backend):
    run(backend, "slow", SLOW)


def run(backend, marks, *tests):
    command = [sys.executable, "-m", "pytest", "-m", marks, *map(str, tests)]
    result = subprocess.run(
        [*command, "-p", "no:cacheprovider"],
        cwd=TESTS.parent,
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    tail = result.stdout[-6000:]
    print(backend, tail.strip().splitlines()[-1])
    assert result.returncode == 0, tail
