"""The commands that show recipes and what they do to data."""

import numpy as np
import pytest
from PIL import Image
from test_command import run

from training.recipes import RECIPES

SMALL = "--set embed_dim=24 --set depth=1".split()


def test_recipes_lists_every_recipe_in_80_columns(capsys, monkeypatch):
    code, out, _ = run(capsys, monkeypatch, "recipes", columns=80)
    assert code == 0 and "…" not in out
    assert max(len(line) for line in out.splitlines()) <= 80
    for name, recipe in RECIPES.items():
        assert f" {name} " in out and f" {recipe.data or 'your own'} " in out


def test_recipes_shows_one_with_what_is_changed(capsys, monkeypatch):
    words = "recipes deit --set mixup=0.2 --data digits --image-size 32".split()
    code, out, _ = run(capsys, monkeypatch, *words, columns=80)
    assert code == 0 and "0.2  (was 0.8)" in out
    assert "digits  (was tfds:imagenet2012)" in out
    assert "[32, 32]  (was not given)" in out and "Source, unchanged: DeiT-S" in out
    assert out.strip().endswith("Next: keras-vit recipes deit --explain")


def test_recipes_explains_the_groups_of_the_changed_model(capsys, monkeypatch):
    words = ["--set", "layer_decay=0.5", "--set", "frozen=0", "--classes", "3"]
    code, out, _ = run(
        capsys, monkeypatch, "recipes", "digits", *SMALL, *words, "--explain"
    )
    assert code == 0 and "vit_tiny8, 3 classes" in out
    row = next(x for x in out.splitlines() if "block 0" in x and "kernel" in x)
    assert row.split()[6:13:2] == ["6,912", "0.5", "0.001", "0.05"]
    # patches 8 * 8 * 3 * 24 + 24 and positions 16 * 24 are frozen
    everything = 4608 + 24 + 384 + 6912 + 24 * 13 + 48 + 24 * 3 + 3
    assert f"Trained: {everything - 5016:,} of {everything:,} parameters." in out


def test_recipes_draws_the_learning_rate(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "new" / "rate.png"
    words = ["recipes", "digits", "--set", "cooldown_epochs=20", "--picture", picture]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0 and f"Picture: {picture}, for 1,437 training images." in out
    with Image.open(picture) as image:
        pixels = np.asarray(image.convert("RGB")).astype(int)
    curve = np.abs(pixels - [0, 0x72, 0xB2]).sum(axis=-1) < 60
    heights = np.argmax(curve, axis=0)[curve.any(axis=0)]
    last = len(heights) // 2 + 10
    assert heights.argmin() < len(heights) // 8  # the peak, after 3 of 40 epochs
    assert np.ptp(heights[last:]) <= 2  # 20 of them on the floor


def test_show_data_draws_what_the_model_sees(tmp_path, capsys, monkeypatch):
    picture = tmp_path / "new" / "sheet.png"
    words = ["show-data", "digits", picture, "--set", "mixup=0.2", *SMALL]
    code, out, _ = run(capsys, monkeypatch, *words)
    assert code == 0
    assert out.splitlines()[-2:] == [
        f"Picture: {picture}, images of digits, plain on the left.",
        "Next: keras-vit train digits, with the same options",
    ]
    with Image.open(picture) as image:
        assert image.format == "PNG" and image.size[0] > 1000


@pytest.mark.parametrize(
    "arguments, sentence",
    [
        ("recipes digit", "got 'digit'. Did you mean 'digits'?"),
        ("recipes --explain", "Options are for one recipe: keras-vit recipes RECIPE"),
        ("recipes deit --set mixupp=1", "got 'mixupp'. Did you mean 'mixup'?"),
        (
            'recipes deit --set teaching={"temprature":1}',
            "got 'temprature'. Did you mean 'temperature'?",
        ),
        ("recipes deit --set epochs=9", "below epochs=9, got 5 + 10; change them"),
        ("recipes deit --picture x.pdf", "A picture must end in .png, got 'x.pdf'."),
        (
            "recipes digits --set batch_size=2000 --picture x.png",
            "1437 training images",
        ),
        ("recipes finetune --explain", "needs a checkpoint to start from: --from SOUR"),
        ("show-data digits sheet.jpg", "A picture must end in .png, got 'sheet.jpg'."),
        ("show-data finetune x.png --from y", "has no data of its own: --data folder"),
        ("show-data digits x.png --labels maps", "'digits' labels none; add --set 'to"),
        ("train deit_distilled --data digits", "needs a teacher: --set teacher=SOURCE"),
        ("train digits --devices few", "'few'"),
        ("recipes digits --data-dir x --explain", "with 'digits'; leave it out."),
        ("show-data digits x.png --data-dir x", "with 'digits'; leave it out."),
        ("train digits --data-dir x", "data_dir is where tensorflow-datasets keeps"),
        (
            "train digits --set class_weights=even",
            "class_weights must be 'balanced', a",
        ),
    ],
)
def test_a_wrong_input_is_one_sentence(
    tmp_path, capsys, monkeypatch, arguments, sentence
):
    monkeypatch.chdir(tmp_path)
    code, _, err = run(capsys, monkeypatch, *arguments.split())
    assert code == 1 and "Traceback" not in err
    last = err.strip().splitlines()[-1]
    assert last.startswith("Error: ") and sentence in last
    assert not list(tmp_path.iterdir())
