"""Does a teacher help a student that has few labels?

    python benchmarks/distillation.py --seeds 0,1,2,3,4

The teacher is the recipe `digits`, trained on all 1,437 training digits. The student is
a small DeiT with a distillation token that sees 200 of them, drawn anew for each seed
as its weights are: with their labels alone, and with the teacher's answers to the same
augmented images besides, hard or soft. Equal images, equal epochs, equal
everything else; without a teacher the mean of the two heads learns the labels. What
the teacher knows of the other 1,237 digits reaches the student through its answers
alone, so this is no measure of the student's learning from 200 images. The score is
the accuracy on the 360 held-out images after the last epoch. Interrupted, the same
command goes on.
"""

import statistics

import scipy.stats
from arms import HEADS, cells, compare, markdown, parse, train

import training
from training.recipe_parts import Teaching

TEACHER = training.RECIPES["digits"]
STUDENT = training.RECIPES["digits_distilled"]
ARMS = {
    "labels alone": None,
    "+ teacher, hard": Teaching(distillation="hard"),
    "+ teacher, soft": STUDENT.teaching,
}


def table(rows: list[dict]) -> str:
    """Mean, standard deviation and range over the seeds, and the gain, pair by pair."""
    first = {
        row["seed"]: row["accuracy"] for row in rows if row["arm"] == "labels alone"
    }
    lines = []
    for name in ARMS:
        of_arm = [row for row in rows if row["arm"] == name]
        gains = [row["accuracy"] - first[row["seed"]] for row in of_arm]
        gained = [f"{statistics.mean(gains):+.1%}", interval(gains)]
        loss = statistics.mean(row["cross_entropy"] for row in of_arm)
        compared = gained if any(gains) else ["-", "-"]
        lines.append([*cells(of_arm), *compared, f"{loss:.3f}"])
    heads = [*HEADS, "gain", "95 % of the mean gain", "cross-entropy"]
    return markdown(heads, lines)


def interval(gains: list[float]) -> str:
    """95 % interval of the mean of paired differences, by Student's t."""
    if len(gains) < 2:
        return "-"
    quantile = scipy.stats.t.ppf(0.975, len(gains) - 1)
    half = quantile * statistics.stdev(gains) / len(gains) ** 0.5
    mean = statistics.mean(gains)
    return f"{mean - half:+.1%} to {mean + half:+.1%}"


def main() -> None:
    seeds, runs, epochs = parse(__doc__, "runs/distillation")
    teacher = runs / "teacher"
    found = train(TEACHER, teacher)["val_accuracy"]

    def student(arm, seed):
        recipe = STUDENT.replace(seed=seed, teaching=ARMS[arm])
        return recipe if ARMS[arm] is None else recipe.replace(teacher=str(teacher))

    rows = compare(student, ARMS, seeds, runs, epochs)
    print(f"Teacher: {found:.1%} of the held-out images.\n")
    print(table(rows))


if __name__ == "__main__":
    main()
