"""What benchmarks share that train the same thing in several ways, with several seeds.

Trainings are runs of `training.fit`, one after the other: interrupted, the same command
goes on where it was, and what is finished is not trained again.
"""

import argparse
import csv
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path

import keras
from tqdm.auto import tqdm

import training
from training.recipe import Recipe

HEADS = ["arm", "accuracy", "spread", "range"]


def parse(description: str, runs: str) -> tuple[list[int], Path, int | None]:
    """Seeds, folder of the runs, and epochs that the command line asks for."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2,3,4", help="such as 0,1")
    parser.add_argument("--runs", type=Path, default=Path(runs))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    given = parser.parse_args()
    return [int(x) for x in given.seeds.split(",")], given.runs, given.epochs


def train(recipe: Recipe, run_dir: Path) -> dict[str, float]:
    """Train a recipe, or read what is trained: the last row of its history."""
    keras.utils.clear_session()
    data = training.load_data(recipe.data)
    training.fit(lambda: recipe.build_model(len(data.labels)), data, recipe, run_dir)
    with (run_dir / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    return {key: float(value) for key, value in last.items() if value}


def compare(
    recipes: Callable[[str, int], Recipe],
    arms: Iterable[str],
    seeds: list[int],
    runs: Path,
    epochs: int | None,
) -> list[dict]:
    """Train every arm with every seed; the rows are also in `results.csv`.

    Args:
        recipes: From an arm and a seed to what is trained.
        arms: Their names.
        seeds: One after the other, all arms with each.
        runs: Folder of the runs.
        epochs: Instead of the recipe's; None for those.
    """
    jobs = [(arm, seed) for seed in seeds for arm in arms]
    rows = []
    with tqdm(jobs, unit=" runs") as bar:
        for arm, seed in bar:
            bar.set_description(f"{arm}, seed {seed}")
            recipe = recipes(arm, seed)
            recipe = recipe.replace(epochs=epochs) if epochs else recipe
            name = "".join(x if x.isalnum() else "_" for x in arm)
            last = train(recipe, runs / f"{name}_{seed}")
            rows.append(
                {
                    "arm": arm,
                    "seed": seed,
                    "accuracy": last["val_accuracy"],
                    "cross_entropy": last["val_loss"],
                    "class_head": last.get("val_class_accuracy", last["val_accuracy"]),
                }
            )
            bar.write(str(rows[-1]))
    with (runs / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nkeras {keras.__version__} on {keras.backend.backend()}, seeds {seeds}")
    print(f"Every run: {runs / 'results.csv'}\n")
    return rows


def cells(rows: list[dict]) -> list[str]:
    """Those of `HEADS` for the rows of one arm: mean, deviation and range."""
    found = [row["accuracy"] for row in rows]
    return [
        rows[0]["arm"],
        f"{statistics.mean(found):.1%}",
        f"{statistics.stdev(found):.1%}" if len(found) > 1 else "-",
        f"{min(found):.1%} to {max(found):.1%}",
    ]


def markdown(heads: list[str], lines: list[list[str]]) -> str:
    """A table."""
    lines = [heads, ["---"] * len(heads), *lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
