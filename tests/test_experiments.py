"""The experiments: what they draw, what is provable of them, and their record."""

import dataclasses
import importlib
import json
import math
from pathlib import Path

import encoders
import figures
import images
import keras
import lab
import numpy as np
import pytest
import record
import scipy.stats
import small_data
import token_labeling
import train
import where_position
from conftest import to_numpy

from keras_vit import kernels
from training.digits import read_digits
from training.scenes import enlarge

EXPERIMENTS = Path(__file__).parent.parent / "experiments"
NAMES = (
    "resolution",
    "where_position",
    "token_labeling",
    "distillation",
    "small_data",
    "equivariance",
    "positions",
)
RECORDED = [x for x in NAMES if (lab.RECORD / x / "results.csv").exists()]
FULL = lab.Setting(folder=Path("runs/experiments/any"))

pytestmark = pytest.mark.first


# --- the images ---


@pytest.mark.parametrize("side", [12, 20, 32])
def test_a_digit_is_enlarged_as_it_is_in_the_datasets(side):
    digits = read_digits()["test"][0][:5]
    found = images.enlarge(digits, side)
    assert found.shape == (5, side, side)
    for digit, image in zip(digits, found, strict=True):
        assert np.abs(image.astype(int) - enlarge(digit, side)).max() <= 1


def test_a_placed_picture_is_whole_and_where_it_is_said_to_be():
    digits = read_digits()["train"][0][:50]
    found, squares = images.place(digits, 40, (10, 20), np.random.default_rng(0))
    assert set(squares[:, 2]) <= set(range(10, 21))
    assert len(set(map(tuple, squares))) > 40
    for digit, image, (top, left, side) in zip(digits, found, squares, strict=True):
        square = image[top : top + side, left : left + side]
        assert np.array_equal(square, images.enlarge(digit[None], side)[0])
        assert image.sum() == square.sum()


def test_coloured_pictures_are_placed_and_enlarged_too():
    pictures = np.random.default_rng(0).integers(0, 256, (3, 8, 8, 3), "uint8")
    found, squares = images.place(pictures, 24, (8, 8), np.random.default_rng(1))
    assert found.shape == (3, 24, 24, 3)
    top, left, side = squares[2]
    square = found[2, top : top + side, left : left + side]
    assert np.array_equal(square, pictures[2])
    canvases, _, squares = token_labeling.draw((pictures, np.arange(3)), 32, 0)
    assert canvases.shape == (3, 32, 32, 3)
    black = images.paste(pictures, 32, squares)
    bright = black > 255 - token_labeling.NOISE
    noise = np.where(bright, 0, canvases.astype(int) - black)
    assert noise.min() == 0
    assert token_labeling.NOISE // 2 < noise.max() < token_labeling.NOISE


def test_a_picture_moves_on_black_and_is_cut_off_at_the_border():
    picture = np.arange(1, 17, dtype="uint8").reshape(1, 4, 4)
    inside = images.on_black(picture, 8, 3, 2)
    assert np.array_equal(inside[0, 3:7, 2:6], picture[0])
    assert inside.sum() == picture.sum()
    outside = images.on_black(picture, 8, -1, 6)
    assert np.array_equal(outside[0, :3, 6:], picture[0, 1:, :2])
    assert outside.sum() == picture[0, 1:, :2].sum()


@pytest.mark.parametrize("factor", [0.75, 1.25, 1.5, 2.0])
def test_resized_images_show_the_same_in_the_same_place(factor):
    fine = 32 * encoders.DETAIL

    def squares(scale, canvas=1.0):
        sides = [round(x * fine * scale / canvas) for x in encoders.SIDES]
        random = np.random.default_rng(encoders.TEST_SEED)
        return images.draw_squares(1440, round(fine * scale), sides, random)

    apart = np.abs(squares(factor) - factor * squares(1.0))
    assert apart.max() <= 2  # of pixels that are resized by a third
    if factor > 1:  # on a larger canvas a picture stays as large
        assert np.abs(squares(factor, factor)[:, 2] - squares(1.0)[:, 2]).max() <= 1


def test_images_are_the_same_however_many_are_drawn_at_once(monkeypatch):
    pictures = images.read_pictures(FULL).test
    whole = encoders.draw(pictures, 32, 1.0, 2, 5)
    for module in (encoders, images):
        monkeypatch.setattr(module, "CHUNK", 100)
    parts = encoders.draw(pictures, 32, 1.0, 2, 5)
    assert all(np.array_equal(*x) for x in zip(whole, parts, strict=True))
    assert len(whole[1]) == 720


def test_few_pictures_are_a_part_of_more():
    pictures = images.read_pictures(FULL)
    assert len(pictures.train[1]) == 1437
    assert len(pictures.test[1]) == 360
    few, more = (pictures.few(x, seed=3).train for x in (200, 500))
    assert np.array_equal(few[0], more[0][:200])
    assert np.array_equal(few[1], more[1][:200])
    assert not np.array_equal(few[1], pictures.few(200, seed=4).train[1])


def test_who_chooses_a_learning_rate_does_not_see_the_test():
    choosing = lab.Setting(folder=FULL.folder, choosing=True)
    pictures = images.read_pictures(choosing)
    found = np.concatenate([pictures.train[0], pictures.test[0]])
    train = read_digits()["train"][0]

    def ordered(digits):
        return sorted(digit.tobytes() for digit in digits)

    assert len(pictures.test[1]) == 240
    assert ordered(found) == ordered(train)


# --- what is said of the arms ---


def test_all_position_encodings_have_as_many_weights():
    counts = [encoders.build(arm, FULL, 10, 32).count_params() for arm in encoders.ARMS]
    assert max(counts) < 1.002 * min(counts)


def test_all_networks_of_the_small_data_have_about_as_many_weights():
    counts = [small_data.build(arm, FULL, 10).count_params() for arm in small_data.ARMS]
    assert max(counts) < 1.03 * min(counts)


@pytest.mark.slow
def test_on_a_gpu_they_have_too():
    setting = lab.Setting(folder=FULL.folder, scale="gpu")
    counts = [
        small_data.build(arm, setting, 10).count_params() for arm in small_data.ARMS
    ]
    assert max(counts) < 1.08 * min(counts)
    encodings = [
        encoders.build(arm, setting, 10, 96).count_params() for arm in encoders.ARMS
    ]
    assert max(encodings) < 1.002 * min(encodings)
    labelled = token_labeling.build("exact labels", setting, 10)
    assert labelled.input_shape == (None, 96, 96, 3)
    assert labelled.count_params() > 5_000_000


def test_each_digit_is_in_every_quadrant_once():
    digits = read_digits()["train"][0][:100]
    labels = np.zeros(len(digits), int)
    drawn = where_position.draw((digits, labels), np.random.default_rng(0))
    found, quadrants, places = drawn
    assert found.shape == (400, 48, 48)
    assert np.array_equal(np.bincount(quadrants), [100] * 4)
    assert len(set(map(tuple, places))) == 36
    for i in range(100):
        assert len({tuple(x) for x in places[i::100] % 3}) == 1
    for i, (top, left) in enumerate(places):
        assert quadrants[i] == 2 * (top >= 3) + (left >= 3)
        token = found[i, 8 * top : 8 * top + 8, 8 * left : 8 * left + 8]
        assert np.array_equal(token, digits[i % 100])
        assert found[i].sum() == token.sum()
    inside = places[where_position.inside(places)]
    assert {tuple(x) for x in inside} == {(2, 2), (2, 3), (3, 2), (3, 3)}


@pytest.mark.parametrize(
    "arm, is_blind",
    [
        ("none", True),
        ("circular PEG x 5", True),
        ("PEG x 1", False),
        ("learned", False),
    ],
)
def test_a_digit_has_one_answer_where_the_padding_tells_nothing(arm, is_blind):
    """Of any weights: so such a model is right in one quadrant of four."""
    model = drawn_model(arm)
    digits = read_digits()["test"][0][:20]
    drawn = where_position.draw((digits, digits), np.random.default_rng(0))
    found, _, _ = drawn
    answers = ask(model, found).reshape(4, 20, 4)
    apart = np.ptp(answers, axis=0).max()
    size = np.ptp(answers)
    assert (apart < 1e-5 * size) == is_blind
    if arm == "PEG x 1":  # two tokens from the border it is blind too
        tokens = np.array([[2, 2], [2, 3], [3, 2], [3, 3]])
        moved = [[where_position.placed(x, token) for x in digits] for token in tokens]
        inside = np.stack([ask(model, np.stack(x)) for x in moved])
        assert np.ptp(inside, axis=0).max() < 1e-5 * size
        rows = [
            [where_position.placed(x, np.array([1, column])) for x in digits]
            for column in (1, 2, 3)
        ]
        near, *alike = (ask(model, np.stack(x)) for x in rows)
        assert np.ptp(alike, axis=0).max() < 1e-5 * size  # it knows the row alone
        for other in (inside[0], near):
            assert np.abs(alike[0] - other).max() > 1e-4 * size


def drawn_model(arm):
    """A model whose weights are all drawn: fresh ones hide what is multiplied by 0."""
    keras.utils.set_random_seed(0)
    model = where_position.build(arm, "quick")
    random = np.random.default_rng(0)
    model.set_weights([random.normal(0, 0.3, x.shape) for x in model.get_weights()])
    return model


def ask(model, grey):
    return to_numpy(model(np.repeat(grey[..., None], 3, -1).astype("float32")))


def test_exact_maps_are_the_squares():
    squares = np.array([[2, 3, 10], [0, 12, 12]])
    maps = list(token_labeling.exact_maps(24, np.array([7, 1]), squares)())
    for (values, classes), square, label in zip(maps, squares, (7, 1), strict=True):
        top, left, side = square
        values = values.numpy()[..., 0]
        assert values.sum() == side * side
        assert values[top : top + side, left : left + side].all()
        assert (classes.numpy() == label).all()


# --- figures ---


def test_the_interval_is_students():
    values = [0.91, 0.93, 0.94, 0.9, 0.95]
    mean, half = figures.interval(values)
    low, high = scipy.stats.t.interval(
        0.95, 4, np.mean(values), np.std(values, ddof=1) / 5**0.5
    )
    assert (mean - half, mean + half) == pytest.approx((low, high))
    assert figures.percent(values) == "92.6 ± 2.6"
    assert figures.percent(values[:1]) == "91.0"


def test_differences_are_paired_by_seed():
    first, second = {0: 0.9, 1: 0.8, 2: 0.7}, {1: 0.7, 0: 0.6}
    assert figures.paired(first, second) == pytest.approx([0.3, 0.1])
    assert figures.points([0.1, 0.1]) == "+10.0 ± 0.0"


def test_what_is_outside_the_record_is_named():
    record = [{"arm": "a", "accuracy": x} for x in (0.5, 0.6, 0.7)]
    same = figures.compared(record, record, ("arm",), "accuracy")
    assert same == "1 of 1 means lie within the record's intervals."
    other = [{"arm": "a", "accuracy": 0.95}]
    found = figures.compared(other, record, ("arm",), "accuracy")
    assert found.startswith("0 of 1")
    assert "a: 0.9500, record 0.6000 ± 0.2484" in found
    assert "no record" in figures.compared(other, [], ("arm",), "accuracy")


# --- the record ---


@pytest.mark.parametrize("name", RECORDED)
def test_the_tables_are_those_of_the_recorded_runs(name):
    experiment = importlib.import_module(name).EXPERIMENT
    setting = lab.Setting(folder=lab.RECORD / name)
    rows = record.read_rows(setting.folder / "results.csv")
    table = experiment.report(rows, setting)
    assert table + "\n" == (setting.folder / "table.md").read_text()
    text = (EXPERIMENTS / "README.md").read_text()
    assert table in text
    assert f"results/{name}/picture.png" in text
    assert f"python experiments/{name}.py" in text


@pytest.mark.parametrize("name", RECORDED)
def test_every_arm_was_run_with_five_seeds_and_the_rate_that_was_chosen(name):
    experiment = importlib.import_module(name).EXPERIMENT
    folder = lab.RECORD / name
    rows = record.read_rows(folder / "results.csv")
    for job in experiment.jobs(lab.Setting(folder=folder)):
        own = [row for row in rows if job.items() <= row.items()]
        assert {row["seed"] for row in own} >= {0, 1, 2, 3, 4}
    chooser = lab.RECORD / (experiment.choice or name) / lab.CHOICE
    chosen = json.loads((chooser / "chosen.json").read_text())
    setting = json.loads((folder / "setting.json").read_text())
    assert setting["learning_rates"] == chosen
    losses = record.read_rows(chooser / "results.csv")
    for arm, rate in chosen.items():
        of_arm = [row for row in losses if row["arm"] == arm]
        assert {row["learning_rate"] for row in of_arm} == set(experiment.rates)
        best = min(of_arm, key=lambda row: row["cross_entropy"])
        assert best["learning_rate"] == rate


# --- the command line ---


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--seeds", "1,1"], "different numbers"),
        (["--seeds", "-1"], "different numbers"),
        (["--seeds", "a"], "must be numbers such as 0,1, got 'a'"),
        (["--seeds", "0,100"], "must be below 100"),
        (["--workers", "0"], "at least 1"),
        (["--rates", "1e-3"], "say --choose too"),
        (["--choose", "--rates", "1e-3,0"], "above 0"),
        (["--gpu"], "unrecognized arguments"),
    ],
)
def test_a_wrong_command_line_is_told(arguments, message, capsys):
    with pytest.raises(SystemExit):
        lab.parse(where_position.EXPERIMENT, arguments)
    assert message in capsys.readouterr().err


def test_results_of_another_setting_are_not_mixed_in(tmp_path):
    setting = lab.Setting(folder=tmp_path / "x", learning_rates={"none": 0.1})
    lab._describe(where_position.EXPERIMENT, setting)
    lab._describe(where_position.EXPERIMENT, setting)
    other = lab.Setting(folder=tmp_path / "x", learning_rates={"none": 0.2})
    with pytest.raises(SystemExit, match=r"learning_rates=.*move the folder away"):
        lab._describe(where_position.EXPERIMENT, other)


def test_of_all_rates_that_were_tried_the_best_is_chosen(tmp_path, capsys):
    setting = lab.Setting(folder=tmp_path)
    losses = {0.001: 0.4, 0.002: 0.2, 0.004: 0.3, 0.5: math.inf}
    rows = [
        {"arm": "none", "learning_rate": rate, "cross_entropy": loss}
        for rate, loss in losses.items()
    ]
    record.write_rows(tmp_path / "results.csv", rows)
    lab._choose(where_position.EXPERIMENT, setting)
    assert json.loads((tmp_path / "chosen.json").read_text()) == {"none": 0.002}
    assert "none: 0.002 (0.001: 0.4000" in capsys.readouterr().out
    record.write_rows(tmp_path / "results.csv", rows[-1:])
    with pytest.raises(SystemExit, match="say lower --rates"):
        lab._choose(where_position.EXPERIMENT, setting)


def test_large_models_do_not_have_the_learning_rates_of_small_ones(tmp_path):
    setting = lab.Setting(folder=tmp_path / "resolution-gpu", suffix="-gpu")
    experiment = importlib.import_module("resolution").EXPERIMENT
    assert lab._learning_rates(experiment, setting, [])["PEG x 1"] > 0
    large = dataclasses.replace(setting, scale="gpu")
    with pytest.raises(SystemExit, match=r"positions\.py --choose --gpu"):
        lab._learning_rates(experiment, large, [])


@pytest.mark.skipif(kernels.half_precision() is not None, reason="there is a GPU here")
def test_a_gpu_that_is_not_there_is_missed_at_once(tmp_path):
    with pytest.raises(SystemExit, match="sees none here: leave --gpu out"):
        lab.main(small_data.EXPERIMENT, ["--gpu", "--runs", str(tmp_path)])
    assert not list(tmp_path.iterdir())


def test_other_pictures_are_placed_once():
    assert encoders.copies(FULL) == (8, 4)
    assert encoders.copies(dataclasses.replace(FULL, data="tfds:cifar10")) == (1, 1)


@pytest.mark.parametrize("count", [200, 400, 500, 800, 1437, 9000])
def test_few_images_are_shown_often_and_as_many_in_all(count):
    rows, epochs = train.shown(count, 24_000)
    assert len(rows) * epochs == 24_000 and epochs <= 4
    often = np.bincount(rows)
    assert len(often) == count and often.max() - often.min() <= 1


def test_many_images_are_shown_once():
    rows, epochs = train.shown(50_000, 24_000)
    assert epochs == 1 and rows.tolist() == list(range(50_000))
