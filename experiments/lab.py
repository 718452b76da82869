"""What all experiments share: the command line, the runs, the record of them.

A run trains one model, of one arm, with one seed, and measures it. Its results are rows
of `results.csv`, written when it ends. Interrupted, the same command goes on: runs that
have their rows are not run again, and one that was killed within its training goes on
where that was saved (`training.fit`). As many runs go on at once as there are cores,
each on one.
"""

import argparse
import dataclasses
import json
import math
import os
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # before TensorFlow is imported

import joblib
import keras
from figures import compared
from processes import in_processes
from record import read_rows, write_rows, write_text
from setting import Experiment, Setting
from tqdm.auto import tqdm

from keras_vit import kernels

HOME = Path(__file__).parent
RECORD = HOME / "results"  # what is committed, laid out as the folder of the runs
CHOICE = "choose"  # the folder of that, within the experiment's
CHOICE_SEED = 100  # the results are of lower ones
GPU_RATES = (2.5e-4, 5e-4, 1e-3, 2e-3)  # larger models want lower learning rates


def main(experiment: Experiment, arguments: list[str] | None = None) -> list[dict]:
    """Run what a command line asks for; the rows of all its runs."""
    given = parse(experiment, arguments)
    scale = "quick" if given.quick else "gpu" if given.gpu else "full"
    suffix = "" if scale == "full" else f"-{scale}"
    if given.data != "digits":
        suffix += "-" + "".join(x if x.isalnum() else "_" for x in given.data)
    folder = given.runs / (experiment.name + suffix)
    setting = Setting(
        folder=folder / CHOICE if given.choose else folder,
        suffix=suffix,
        data=given.data,
        scale=scale,
        choosing=given.choose,
    )
    if given.gpu and kernels.half_precision() is None:
        raise SystemExit(
            f"--gpu trains models that want a GPU, and {keras.backend.backend()} sees "
            "none here: leave --gpu out, or say another backend by KERAS_BACKEND."
        )
    _check_data(setting)
    jobs = experiment.jobs(setting)
    if setting.quick:
        jobs = [job for job in jobs if job["arm"] in experiment.quick]
    if not given.choose:
        rates = _learning_rates(experiment, setting, jobs)
        setting = dataclasses.replace(setting, learning_rates=rates)
    if given.choose:
        arms = {job["arm"]: job for job in jobs}  # with the most images
        rates = given.rates or (GPU_RATES if given.gpu else experiment.rates)
        jobs = [{**x, "learning_rate": y} for x in arms.values() for y in rates]
        seeds = [CHOICE_SEED]
    else:
        seeds = given.seeds[:1] if given.quick else given.seeds
    jobs = [{**job, "seed": seed} for seed in seeds for job in jobs]
    _describe(experiment, setting)
    rows = _run_all(experiment, setting, jobs, given.workers)
    if given.choose:
        _choose(experiment, setting)
        return rows
    if experiment.after is not None:
        experiment.after(setting)
    table = experiment.report(rows, setting)
    write_text(folder / "table.md", table + "\n")
    experiment.draw(rows, setting, folder / "picture.png")
    print(f"\n{table}\n\nEvery run: {folder / 'results.csv'}")
    print(f"Picture: {folder / 'picture.png'}")
    if scale == "full" and given.data == "digits":
        names = (*experiment.factors, *experiment.labels)
        record = read_rows(_record(experiment))
        print(compared(rows, record, names, experiment.measure))
    return rows


def parse(experiment, arguments):
    parser = argparse.ArgumentParser(
        prog=f"python experiments/{experiment.name}.py",
        description=experiment.about,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    add = parser.add_argument
    seeds = _listed(int, "0,1")
    add("--seeds", type=seeds, default=[0, 1, 2, 3, 4], help="such as 0,1")
    add("--data", default="digits", help="pictures: digits, tfds:NAME, folder:PATH ...")
    add("--runs", type=Path, default=Path("runs/experiments"), help="where to keep it")
    add("--workers", type=int, help="runs at once; by default one for each core")
    add("--quick", action="store_true", help="to see that it runs: some arms, one seed")
    if not experiment.choice:
        add("--choose", action="store_true", help="choose the learning rates, no test")
        rates = _listed(float, "1e-3,2e-3")
        add("--rates", type=rates, help="what --choose tries, such as 1e-3,2e-3")
    if experiment.gpu:
        add("--gpu", action="store_true", help="real sizes; one run at a time")
    given = parser.parse_args(arguments)
    given.gpu = experiment.gpu and given.gpu
    given.choose = not experiment.choice and given.choose
    rates = getattr(given, "rates", None) or []
    if rates and not given.choose:
        parser.error(
            "--rates is what --choose tries: say --choose too, or leave it out"
        )
    if rates and min(rates) <= 0:
        parser.error(f"--rates must be above 0, got {min(rates)}")
    if given.quick and given.gpu:
        parser.error("--quick or --gpu, not both")
    if min(given.seeds) < 0 or len(set(given.seeds)) < len(given.seeds):
        parser.error(f"--seeds must be different numbers >= 0, got {given.seeds}")
    if max(given.seeds) >= CHOICE_SEED:
        parser.error(
            f"--seeds must be below {CHOICE_SEED}, got {max(given.seeds)}: those "
            "above choose learning rates, draw test images and train teachers"
        )
    if given.workers is None:
        given.workers = 1 if given.gpu else joblib.cpu_count()
    if given.workers < 1:
        parser.error(f"--workers must be at least 1, got {given.workers}")
    return given


def _listed(kind, example):
    """What reads numbers of a command line that stand between commas."""

    def read(text):
        try:
            return [kind(x) for x in text.split(",")]
        except ValueError as error:
            told = f"must be numbers such as {example}, got {text!r}"
            raise argparse.ArgumentTypeError(told) from error

    return read


def _describe(experiment, setting):
    """Write down what the folder is of, or see that it is of the same.

    Raises:
        SystemExit: If it holds results of another setting, which are not mixed.
    """
    path = setting.folder / "setting.json"
    own = {
        "experiment": experiment.name,
        "data": setting.data,
        "scale": setting.scale,
        "backend": keras.backend.backend(),
        "learning_rates": setting.learning_rates,
    }
    if not path.exists():
        versions = {"keras": keras.__version__}
        write_text(path, json.dumps(own | versions, indent=2) + "\n")
    known = json.loads(path.read_text())
    for name, value in own.items():
        if known[name] != value:
            raise SystemExit(
                f"{setting.folder} holds results with {name}={known[name]!r}, and this "
                f"is {name}={value!r}: move the folder away, or say --runs ANOTHER."
            )


def _run_all(experiment, setting, jobs, workers):
    """Run what has no rows yet; the rows of all jobs, in their order."""
    path = setting.folder / "results.csv"
    found = {}
    for row in read_rows(path):
        found.setdefault(_key(experiment, row), []).append(row)
    left = [job for job in jobs if _key(experiment, job) not in found]
    print(_plan(experiment, setting, jobs, left, workers), flush=True)
    bar = tqdm(total=len(jobs), initial=len(jobs) - len(left), unit=" runs")
    with bar:
        for job, rows in in_processes(experiment, left, setting, workers):
            found[_key(experiment, job)] = rows
            write_rows(path, [row for each in found.values() for row in each])
            bar.set_postfix_str(", ".join(str(x) for x in job.values()))
            bar.update()
    return [row for job in jobs for row in found[_key(experiment, job)]]


def _plan(experiment, setting, jobs, left, workers):
    """What is going to be done, and how long it took when the record was made."""
    arms = list(dict.fromkeys(job["arm"] for job in jobs))
    seeds = list(dict.fromkeys(job["seed"] for job in jobs))
    lines = [
        f"{experiment.name}: {len(arms)} arms ({'; '.join(arms)}), seeds {seeds}, "
        f"{len(jobs)} runs on {setting.data}; {len(jobs) - len(left)} are done.",
        f"Runs and results: {setting.folder}; interrupted, the same command goes on.",
    ]
    seconds = _estimate(experiment, setting, left)
    workers = min(workers, max(1, len(left)))
    if seconds is not None:
        lines.append(
            f"Estimate: {seconds / 60 / workers:.0f} minutes, {workers} at once, by "
            "what the runs of the record took on 2 cores."
        )
    elif left:
        lines.append(
            f"No estimate, for there is no record of this; {workers} at once, and the "
            "bar knows more after the first."
        )
    return "\n".join(lines)


def _estimate(experiment, setting, left):
    """Seconds that the runs which are left took when the record was made, or None.

    Where the models are another experiment's, which it may have trained already, its
    runs count too.
    """
    if setting.scale != "full" or setting.data != "digits":
        return None
    total = 0.0
    for name in dict.fromkeys((experiment.name, experiment.choice or experiment.name)):
        known = read_rows(RECORD / name / "results.csv")
        seconds = {_key(experiment, row): row["seconds"] for row in known}
        if not seconds:
            return None
        mean = sum(seconds.values()) / len(seconds)
        done = []
        if name != experiment.name:
            done = read_rows(setting.beside(name) / "results.csv")
        done = {_key(experiment, row) for row in done}
        keys = [_key(experiment, job) for job in left]
        total += sum(seconds.get(key, mean) for key in keys if key not in done)
    return total


def _choose(experiment, setting):
    """Write the learning rate of each arm that validated best, of all tried so far."""
    rows = read_rows(setting.folder / "results.csv")
    chosen, lines = {}, []
    for arm in dict.fromkeys(row["arm"] for row in rows):
        own = [row for row in rows if row["arm"] == arm]
        scores = {row["learning_rate"]: row[experiment.score] for row in own}
        finite = {rate: score for rate, score in scores.items() if math.isfinite(score)}
        if not finite:
            raise SystemExit(f"No learning rate trains {arm!r}: say lower --rates.")
        chosen[arm] = min(finite, key=finite.get)
        found = ", ".join(f"{rate:g}: {score:.4f}" for rate, score in scores.items())
        lines.append(f"{arm}: {chosen[arm]:g} ({found})")
    path = setting.folder / "chosen.json"
    write_text(path, json.dumps(chosen, indent=2) + "\n")
    print(f"\n{experiment.score} of the validation pictures by learning rate:")
    print("\n".join(lines))
    print(f"\nWritten down in {path}, which the same command without --choose reads.")


def _check_data(setting):
    """Read pictures that are not the digits before anything is begun.

    Raises:
        SystemExit: If there are none.
    """
    if setting.data == "digits":
        return
    from images import read_pictures

    try:
        read_pictures(setting)
    except (ValueError, OSError) as error:
        raise SystemExit(str(error)) from error


def _learning_rates(experiment, setting, jobs):
    """Those that were chosen here, or else those of the record, of its small models.

    Raises:
        SystemExit: If there are none, and it is not only to be seen that it runs.
    """
    name, gpu = experiment.choice or experiment.name, setting.scale == "gpu"
    places = [setting.beside(name)] if gpu else [setting.beside(name), RECORD / name]
    for folder in places:
        path = folder / CHOICE / "chosen.json"
        if path.exists():
            print(f"Learning rates: {path}")
            return json.loads(path.read_text())
    if setting.quick:
        return {job["arm"]: experiment.rates[0] for job in jobs}
    raise SystemExit(
        "No learning rates were chosen yet for models of this size: "
        f"python experiments/{name}.py --choose{' --gpu' if gpu else ''}"
    )


def _record(experiment):
    return RECORD / experiment.name / "results.csv"


def _key(experiment, row):
    names = (*experiment.factors, "seed", "learning_rate")
    return tuple(row[name] for name in names if name in row)
