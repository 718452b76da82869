"""Do labels for every token, and MixToken, help where images are few?

    python benchmarks/token_labeling.py --seeds 0,1,2,3,4

The recipe `digits_token_labeling` on 300 of its training images, drawn anew for each
seed, with the loss of the class alone, with exact labels of the tokens, and with these
and MixToken; equal epochs, equal everything else. The score is the accuracy on the
360 held-out images after the last epoch. Interrupted, the same command goes on.
"""

import statistics

from arms import HEADS, cells, compare, markdown, parse

import training

RECIPE = training.RECIPES["digits_token_labeling"].replace(
    train_images=300, epochs=60, batch_size=30
)
ARMS = {
    "class loss only": RECIPE.replace(token_labeling=None, token_weight=0.0),
    "+ token labels": RECIPE.replace(mix_token=None),
    "+ token labels, MixToken (paper)": RECIPE.replace(mix_token="paper"),
}


def table(rows: list[dict]) -> str:
    """Markdown: mean, standard deviation and range over the seeds."""
    lines = []
    for name in ARMS:
        of_arm = [row for row in rows if row["arm"] == name]
        means = {
            key: statistics.mean(row[key] for row in of_arm)
            for key in ("class_head", "cross_entropy")
        }
        lines.append(
            [
                *cells(of_arm),
                f"{means['class_head']:.1%}",
                f"{means['cross_entropy']:.3f}",
            ]
        )
    return markdown([*HEADS, "class head alone", "cross-entropy"], lines)


def main() -> None:
    seeds, runs, epochs = parse(__doc__, "runs/token_labeling")
    rows = compare(
        lambda arm, seed: ARMS[arm].replace(seed=seed), ARMS, seeds, runs, epochs
    )
    print(table(rows))


if __name__ == "__main__":
    main()
