"""Do labels for every token, and MixToken, help where images are few?

    python benchmarks/token_labeling.py --seeds 0,1,2,3,4

The recipe `digits_token_labeling` on 300 of its training images, drawn anew for each
seed, with the loss of the class alone, with exact labels of the tokens, and with these
and MixToken; equal epochs, equal everything else. The score is the accuracy on the
360 held-out images after the last epoch.

Trainings are runs of `training.fit`, one after the other: interrupted, the same command
goes on where it was, and what is finished is not trained again.
"""

import argparse
import csv
import statistics
from pathlib import Path

import keras
from tqdm.auto import tqdm

import training
from training.recipe import Recipe

RECIPE = training.RECIPES["digits_token_labeling"].replace(
    train_images=300, epochs=60, batch_size=30
)
ARMS = {
    "class loss only": RECIPE.replace(token_labeling=None, token_weight=0.0),
    "+ token labels": RECIPE.replace(mix_token=None),
    "+ token labels, MixToken (paper)": RECIPE.replace(mix_token="paper"),
}


def measure(name: str, recipe: Recipe, runs: Path) -> dict:
    """Train one arm with one seed, or read what is trained: a row of the CSV file."""
    arm = "".join(x if x.isalnum() else "_" for x in name)
    run_dir = runs / f"{arm}_{recipe.seed}"
    keras.utils.clear_session()
    data = training.load_data(recipe.data)
    training.fit(lambda: recipe.build_model(len(data.labels)), data, recipe, run_dir)
    with (run_dir / "history.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    return {
        "arm": name,
        "seed": recipe.seed,
        "accuracy": float(last["val_accuracy"]),
        "cross_entropy": float(last["val_loss"]),
        "class_head": float(last.get("val_class_accuracy", last["val_accuracy"])),
    }


def table(rows: list[dict]) -> str:
    """Markdown: mean, standard deviation and range over the seeds."""
    heads = ["arm", "accuracy", "spread", "range", "class head alone", "cross-entropy"]
    lines = [heads, ["---"] * len(heads)]
    for name in ARMS:
        of_arm = [row for row in rows if row["arm"] == name]
        found, losses, alone = (
            [row[key] for row in of_arm]
            for key in ("accuracy", "cross_entropy", "class_head")
        )
        lines.append(
            [
                name,
                f"{statistics.mean(found):.1%}",
                f"{statistics.stdev(found):.1%}" if len(found) > 1 else "-",
                f"{min(found):.1%} to {max(found):.1%}",
                f"{statistics.mean(alone):.1%}",
                f"{statistics.mean(losses):.3f}",
            ]
        )
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0,1,2,3,4", help="such as 0,1")
    parser.add_argument("--runs", type=Path, default=Path("runs/token_labeling"))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    seeds = [int(x) for x in arguments.seeds.split(",")]
    jobs = [(name, seed) for seed in seeds for name in ARMS]
    rows = []
    with tqdm(jobs, unit=" runs") as bar:
        for name, seed in bar:
            bar.set_description(f"{name}, seed {seed}")
            recipe = ARMS[name].replace(seed=seed)
            if arguments.epochs:
                recipe = recipe.replace(epochs=arguments.epochs)
            rows.append(measure(name, recipe, arguments.runs))
            bar.write(str(rows[-1]))
    with (arguments.runs / "results.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"\nkeras {keras.__version__} on {keras.backend.backend()}, seeds {seeds}\n")
    print(table(rows))
    print(f"\nEvery run: {arguments.runs / 'results.csv'}")


if __name__ == "__main__":
    main()
