"""Runs of an experiment, several at once, each in a process with one core."""

import contextlib
import functools
import importlib
import math
import os
import shutil
import threading
import time
from collections.abc import Iterator

import joblib

ONE_THREAD = ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS")


def in_processes(
    experiment, jobs: list[dict], setting, workers: int
) -> Iterator[tuple[dict, list[dict]]]:
    """Each run and its rows, as they end.

    Args:
        experiment: `lab.Experiment`.
        jobs: Factors and seed of each run.
        setting: `lab.Setting`.
        workers: How many at once; several have one thread each, one has all.

    Raises:
        RuntimeError: If a run fails: with the place of its log.
    """
    name, score = experiment.name, experiment.score
    work = joblib.delayed(_work)
    calls = [work(name, score, job, setting, os.getpid()) for job in jobs]
    with _threads(workers, setting.scale):
        parallel = joblib.Parallel(workers, "loky", return_as="generator_unordered")
        yield from parallel(calls)


def _work(name, score, job, setting, parent):
    """One run; what it prints goes to a file."""
    if os.getpid() != parent:
        _end_with(parent)
    place = "-".join(str(x) for x in job.values())
    place = "".join(x if x.isalnum() or x in "-." else "_" for x in place)
    folder = setting.folder / place
    folder.mkdir(parents=True, exist_ok=True)
    start = time.perf_counter()
    log = folder / "log.txt"
    try:
        with _printing_to(log):
            experiment = importlib.import_module(name).EXPERIMENT
            measured = experiment.run(job, setting, folder)
    except Exception as error:
        diverged = isinstance(error, RuntimeError) and "run was stopped" in str(error)
        if not (setting.choosing and diverged):
            message = f"The run {job} failed, {log} says more: {error}"
            raise RuntimeError(message) from error
        measured = [{score: math.inf}]
    seconds = round(time.perf_counter() - start, 1)
    shutil.rmtree(folder)
    return job, [{**job, **row, "seconds": seconds} for row in measured]


@functools.cache
def _end_with(parent):
    """End this process when the one that started it is gone.

    Killed, the same command would else train beside what it left behind.
    """

    def watch():
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


@contextlib.contextmanager
def _printing_to(path):
    """Send everything that is printed to a file, that of C++ too."""
    kept = [os.dup(stream) for stream in (1, 2)]
    with path.open("ab") as log:
        try:
            for stream in (1, 2):
                os.dup2(log.fileno(), stream)
            yield
        finally:
            for stream, old in zip((1, 2), kept, strict=True):
                os.dup2(old, stream)
                os.close(old)


@contextlib.contextmanager
def _threads(workers, scale):
    """Let each of several processes that are started within have one thread.

    And no GPU: each would take all of its memory.
    """
    before = dict(os.environ)
    if workers > 1:
        os.environ.update(dict.fromkeys(ONE_THREAD, "1"))
        if scale != "gpu":
            os.environ["CUDA_VISIBLE_DEVICES"] = ""
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
