"""Does a position without a table help on a larger canvas than the one of training?

    python benchmarks/segmentation.py --seeds 0,1

Each row is the recipe `digits_segmentation` with another backbone under the same head
and of about the same number of parameters, trained on scenes of 64 x 64 pixels and
evaluated on them and on larger ones, whose digits are as large and as dense. The head
works on the finest map, whose pixels are 4 image pixels wide in PCPVT, a quarter of the
patch in plain backbones: 2 where nothing else is said, 4 at patch 16.

Trainings are runs of `training.fit`, one after the other: interrupted, the same command
goes on where it was, and what is finished is not trained again.
"""

import argparse
import csv
import dataclasses
import functools
import statistics
from pathlib import Path

import keras
from tqdm.auto import tqdm

import training
from training.picture import draw_segmentation
from training.recipe import Recipe

load_data = functools.cache(training.load_data)
RECIPE = training.RECIPES["digits_segmentation"]
PLAIN = {
    "variant": "tiny",
    "image_size": None,
    "patch_size": 8,
    "embed_dim": 128,
    "depth": 3,
    "num_heads": 4,
    "pool": "mean",
    "initialization": "timm",
    "normalization": "inception",
    "crop_ratio": None,
    "drop_path_rate": RECIPE.model["drop_path_rate"],
}
CONTESTANTS = {
    "PCPVT, PEG": RECIPE,
    "PCPVT, no position": RECIPE.replace(peg=False),
    "ViT, learned table": RECIPE.replace(
        family="ViT", model={**PLAIN, "position_grid": (8, 8)}
    ),
    "CPVT, PEG": RECIPE.replace(family="CPVT", model=PLAIN),
    "ViT, learned table, patch 16": RECIPE.replace(
        family="ViT", model={**PLAIN, "patch_size": 16, "position_grid": (4, 4)}
    ),
}


@dataclasses.dataclass(frozen=True)
class Result:
    """One trained model."""

    parameters: int
    seconds: float  # of training and validation in all epochs
    mean_iou: dict[int, float]  # by side of the canvas


def measure(name: str, recipe: Recipe, sizes: list[int], runs: Path) -> Result:
    """Train one contestant, or read what is trained, and evaluate it at every size."""
    run_dir = runs / f"{name.replace(', ', '_').replace(' ', '_')}_{recipe.seed}"
    keras.utils.clear_session()
    data = load_data(recipe.data)
    model = training.fit(
        lambda: recipe.build_model(len(data.labels)), data, recipe, run_dir
    )
    with (run_dir / "history.csv").open() as file:
        seconds = sum(float(row["seconds"]) for row in csv.DictReader(file))
    scores = {}
    for size in sizes:
        scenes = load_data(f"digit_scenes:{size}")
        scores[size] = training.evaluate(model, scenes)["mean_iou"]
        draw_segmentation(model, scenes, run_dir / f"scenes_{size}.png")
    return Result(model.count_params(), seconds, scores)


def table(results: dict[str, list[Result]], sizes: list[int]) -> str:
    """Markdown: means over the seeds, and the range where there are several."""
    scores = [f"mean IoU at {size} px" for size in sizes]
    heads = ["backbone", "parameters", *scores, "minutes"]
    lines = [heads, ["---"] * len(heads)]
    for name, found in results.items():
        row = [name, f"{found[0].parameters:,}"]
        for size in sizes:
            scores = [x.mean_iou[size] for x in found]
            text = f"{statistics.mean(scores):.3f}"
            if len(scores) > 1:
                text += f" ({min(scores):.3f} to {max(scores):.3f})"
            row.append(text)
        minutes = statistics.mean(x.seconds for x in found) / 60
        lines.append([*row, f"{minutes:.1f}"])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seeds", default="0", help="such as 0,1")
    parser.add_argument("--sizes", default="64,96,128", help="sides of the canvas")
    parser.add_argument("--runs", type=Path, default=Path("runs/segmentation"))
    parser.add_argument("--epochs", type=int, help="instead of the recipe's")
    arguments = parser.parse_args()
    seeds = [int(x) for x in arguments.seeds.split(",")]
    sizes = [int(x) for x in arguments.sizes.split(",")]
    jobs = [(name, seed) for seed in seeds for name in CONTESTANTS]
    results = {}
    with tqdm(jobs, unit=" runs") as bar:
        for name, seed in bar:
            bar.set_description(f"{name}, seed {seed}")
            recipe = CONTESTANTS[name].replace(seed=seed)
            if arguments.epochs:
                recipe = recipe.replace(epochs=arguments.epochs)
            result = measure(name, recipe, sizes, arguments.runs)
            results.setdefault(name, []).append(result)
            bar.write(f"{name}, seed {seed}: {result}")
    print(f"\nkeras {keras.__version__} on {keras.backend.backend()}, seeds {seeds}\n")
    print(table(results, sizes))
    print(f"\nPictures: {arguments.runs}/*/scenes_*.png")


if __name__ == "__main__":
    main()
