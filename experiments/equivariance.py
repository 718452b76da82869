"""Equivariance: does a model still say the same when the picture moves a little?

    python experiments/equivariance.py

CPVT wants an encoding under which the answer to an image is that to the image moved,
and argues that a position table is none. Measured here on trained models, those of
`encoders.py`: each test digit, 20 px large, stands in the middle of the canvas that was
trained, 32 px, or of one half as large again, and is moved by so many pixels up, down,
left and right, always whole on the canvas. A move by 4, 8 or 12 px is one by whole
patches, any other changes what each patch shows.

`consistency` is the part of the digits of which the model says the same as of those in
the middle, right or wrong, in the mean over the directions.
"""

import encoders
import figures
import lab
import numpy as np
from images import enlarge, on_black
from train import logits, scores

CANVASES = {  # of the side that is trained: moves in patches
    1.0: (0, 0.25, 0.5, 0.75, 1, 1.5),
    1.5: (0, 0.5, 1, 1.5, 2, 3),
}
DIRECTIONS = ((-1, 0), (1, 0), (0, -1), (0, 1))  # down, right


def run(job, setting, folder):
    """Ask the model of one encoding about digits that move."""
    arm = job["arm"]
    model, pictures = encoders.trained(job, setting, folder)
    side, patch = encoders.sizes(setting)
    small = round(side * encoders.SIDES[0])
    digits, classes = enlarge(pictures.test[0], small), pictures.test[1]
    rows = []
    for canvas, moves in CANVASES.items():
        whole = round(side * canvas)
        asked = encoders.build(arm, setting, len(pictures.labels), whole)
        asked.set_weights(model.get_weights())
        middle = (whole - small) // 2
        first = None
        for move in moves:
            pixels = round(move * patch)
            found = []
            for down, right in DIRECTIONS if pixels else [(0, 0)]:
                top, left = middle + down * pixels, middle + right * pixels
                moved = on_black(digits, whole, top, left)
                found.append(logits(asked, moved))
            if first is None:
                first = found[0].argmax(-1)
            same = [(x.argmax(-1) == first).mean() for x in found]
            rows.append(
                {
                    "canvas": whole,
                    "move": pixels,
                    "consistency": round(float(np.mean(same)), 6),
                    **scores(np.concatenate(found), np.tile(classes, len(found))),
                }
            )
    return rows


def report(rows, setting):
    tables = []
    for canvas in dict.fromkeys(row["canvas"] for row in rows):
        on_canvas = [row for row in rows if row["canvas"] == canvas]
        moves = [x for x in dict.fromkeys(row["move"] for row in on_canvas) if x]
        table = []
        for arm in figures.arms_in(rows, encoders.ARMS):
            still = figures.by_seed(on_canvas, "accuracy", arm=arm, move=0)
            cells = [
                figures.by_seed(on_canvas, "consistency", arm=arm, move=x).values()
                for x in moves
            ]
            cells = [figures.percent(x) for x in (still.values(), *cells)]
            table.append([arm, *cells])
        heads = [f"canvas {canvas} px", "accuracy, %", *(f"{x} px" for x in moves)]
        tables.append(figures.markdown(heads, table))
    head = "Accuracy of digits in the middle, and consistency under moves, in percent, "
    return head + "with 95 % intervals.\n\n" + "\n\n".join(tables)


def picture(rows, setting, path):
    panels = {}
    for canvas in dict.fromkeys(row["canvas"] for row in rows):
        on_canvas = [row for row in rows if row["canvas"] == canvas]
        moves = dict.fromkeys(row["move"] for row in on_canvas)
        panels[f"canvas of {canvas} px"] = {
            arm: {
                move: list(
                    figures.by_seed(
                        on_canvas, "consistency", arm=arm, move=move
                    ).values()
                )
                for move in moves
            }
            for arm in figures.arms_in(rows, encoders.ARMS)
        }
    figures.lines_picture(
        path,
        panels,
        "move, px",
        "says the same, %",
        "Does the answer stay when the digit moves?",
    )


EXPERIMENT = lab.Experiment(
    name="equivariance",
    about=__doc__,
    factors=("arm",),
    labels=("canvas", "move"),
    jobs=encoders.jobs,
    run=run,
    report=report,
    draw=picture,
    quick=encoders.QUICK,
    measure="consistency",
    choice="positions",
    gpu=True,
)

if __name__ == "__main__":
    lab.main(EXPERIMENT)
