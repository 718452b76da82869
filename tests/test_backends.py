"""The same tests on every other backend that is installed, each in a child process.

`pytest` runs the backend of KERAS_BACKEND in its own process; a process of Keras has
one. The children work beside it: they are started first and asked last. Only what is
backend-agnostic runs again: the library, the fit loop, losses and metrics, the
optimizer, and the export of a model of that backend. What is marked `first`, which no
backend can change, does not.
"""

import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import keras
import pytest

TESTS = Path(__file__).parent
LIBRARY = sorted((TESTS.parent / "keras_vit").glob("[a-z]*.py"))
OTHER_NAMES = (
    "package",
    "optimize",
    "loop",
    "checkpoints",
    "average",
    "state",
    "progress",
    "events",
    "evaluation",
    "distillation",
    "task",
    "loss",
    "token_labeling",
    "dense",
    "checkpoint_timm",
    "checkpoint_hf",
)
FILES = [
    path
    for name in [*(module.stem for module in LIBRARY), *OTHER_NAMES]
    if (path := TESTS / f"test_{name}.py").exists()
]
PARITY = TESTS / "test_export.py::test_one_cpvt_artifact_answers_every_size"
TARGET = TESTS / (
    "test_export_targets.py::test_every_target_is_written_from_any_backend[.tflite]"
)
QUICK = "not (slow or heavy or first)"
SLOW = "(slow or heavy) and not first"
OTHERS = [
    name
    for name in ("tensorflow", "jax", "torch")
    if name != keras.backend.backend() and importlib.util.find_spec(name)
]


# The children run with KERAS_VIT_ONE_BACKEND=1: they must not start their own.
one_backend = pytest.mark.skipif(
    os.environ.get("KERAS_VIT_ONE_BACKEND") == "1", reason="asked for one backend only"
)


def start(backend, cache, marks, *tests):
    """Run the tests in a child process, by the side of those of this one.

    What JAX compiled is kept in `cache`: the slow tests compile half of it again.
    """
    log = tempfile.TemporaryFile("w+")
    environment = {
        **os.environ,
        "KERAS_BACKEND": backend,
        "KERAS_VIT_ONE_BACKEND": "1",
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # of code that runs once
        "JAX_COMPILATION_CACHE_DIR": str(cache),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "OMP_NUM_THREADS": "1",  # PyTorch's threads wait for each other by spinning
    }
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-m", marks]
    command.append("-n0")
    child = subprocess.Popen(
        [*command, *map(str, tests)],
        cwd=TESTS.parent,
        env=environment,
        stdout=log,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return child, log


def finish(child, log):
    status = child.wait()
    log.seek(0)
    tail = log.read()[-6000:]
    print(tail.strip().splitlines()[-1])
    assert status == 0, tail


@pytest.fixture(scope="session")
def children(cache):
    """The quick tests on every other backend."""
    yield from running(cache, QUICK, *FILES, PARITY)


@pytest.fixture(scope="session")
def slow_children(cache):
    """The others."""
    yield from running(cache, SLOW, *FILES, TARGET)


@pytest.fixture(scope="session")
def cache(pytestconfig, tmp_path_factory):
    """Where JAX finds what it compiled in an earlier run."""
    cache = getattr(pytestconfig, "cache", None)  # none with -p no:cacheprovider
    return cache.mkdir("jax") if cache else tmp_path_factory.mktemp("jax")


def running(cache, marks, *tests):
    started = {backend: start(backend, cache, marks, *tests) for backend in OTHERS}
    yield started
    for child, _ in started.values():
        child.kill()


@one_backend
def test_other_backends_start(children):
    """First of all tests (conftest.py), so that the others run beside them."""
    assert len(FILES) >= 6
    assert all(child.poll() is None for child, _ in children.values())


@one_backend
@pytest.mark.parametrize("backend", OTHERS)
def test_on_another_backend(backend, children):
    finish(*children[backend])


@one_backend
@pytest.mark.slow
def test_slow_other_backends_start(slow_children):
    assert all(child.poll() is None for child, _ in slow_children.values())


@one_backend
@pytest.mark.slow
@pytest.mark.parametrize("backend", OTHERS)
def test_slow_on_another_backend(backend, slow_children):
    finish(*slow_children[backend])
