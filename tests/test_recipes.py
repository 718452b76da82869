"""The recipes of the papers, against what the papers and their code say.

`pytest tests/test_recipes.py -s -k table` prints the table.
"""

import dataclasses
import inspect
import json
import math
from pathlib import Path

import pytest
from conftest import to_numpy

import training
from keras_vit import ViT, from_checkpoint, to_checkpoint
from keras_vit.embedding import Preprocess
from training import augment, command, recipe_tables
from training.optimize import schedule
from training.recipe_parts import ARGUMENTS
from training.recipes import RECIPES
from training.recipes_digits import DIGITS

GOLDEN = Path(__file__).parent / "golden"

# What is read in the code of a paper, in its words; None where it does not use it.
# big_vision: configs/vit_i1k.py (AugReg, level medium2), configs/vit_s16_i1k.py;
# weight decay is 1e-4 independent of the learning rate of 1e-3, so 0.1 times it.
BIG_VISION = {
    "optimizer": "adamw",  # Adam, and decay apart from it
    "betas": (0.9, 0.999),
    "learning rate": 1e-3,
    "floor": 0.0,
    "warm-up": "10000 updates",
    "warm-up from": 0.0,
    "cooldown": 0,
    "weight decay": 1e-4 / 1e-3,
    "clip": 1.0,
    "drop path": 0.0,
    "ema": None,
    "smoothing": 0.0,
    "cutmix": None,
    "mixed": 1.0,
    "switch": None,
    "crop": (0.05, 1.0),
    "flip": True,
    "erasing": None,
    "repeats": 1,
    "jitter": None,
    "3-augment": False,
    "image": 224,
    "interpolation": "bilinear",
}
# facebookresearch/deit, main.py: its defaults, of which batch 1024 and drop path 0.1
# are the paper's, learning rate 5e-4 x batch / 512.
DEIT = {
    "optimizer": "adamw",
    "betas": (0.9, 0.999),
    "learning rate": 5e-4 * 1024 / 512,
    "batch": 1024,
    "epochs": 300,
    "floor": 1e-5,
    "warm-up": "5 epochs",
    "warm-up from": 1e-6,
    "cooldown": 10,
    "weight decay": 0.05,
    "clip": None,
    "drop path": 0.1,
    "ema": None,  # tracked, not evaluated
    "loss": "softmax",
    "smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
    "mixed": 1.0,
    "switch": 0.5,
    "randaugment": (2, 9, 0.5),  # rand-m9-mstd0.5-inc1
    "crop": (0.08, 1.0),
    "flip": True,
    "erasing": 0.25,
    "repeats": 3,
    "jitter": None,  # given, but not with RandAugment
    "3-augment": False,
    "image": 224,
    "interpolation": "bicubic",
}
PAPERS = {
    "vit_augreg": {
        **BIG_VISION,
        "batch": 4096,
        "epochs": 300,
        "loss": "sigmoid",
        "mixup": 0.5,
        "randaugment": (2, 10, 0),  # (2, 15) there; 10 is the largest here
        "parameters": 22_050_664,
    },
    "vit_s16_i1k": {
        **BIG_VISION,
        "batch": 1024,
        "epochs": 90,
        "loss": "softmax",
        "mixup": 0.2,
        "randaugment": (2, 10, 0),
        # mean pooling; no table of 196 positions, but a Dense before the head
        "parameters": 22_049_896 - 196 * 384 + 384 * 384 + 384,
    },
    "deit": {**DEIT, "parameters": 22_050_664},
    "deit_distilled": {
        **DEIT,
        "distillation": ("hard", 0.5, 1.0),
        "parameters": 22_436_432,
    },
    # facebookresearch/deit, README_revenge.md, and apex's FusedLAMB, which clips at 1
    "deit3": {
        **DEIT,
        "optimizer": "lamb",
        "learning rate": 4e-3,
        "batch": 2048,
        "epochs": 800,
        "cooldown": 0,
        "clip": 1.0,
        "drop path": 0.05,
        "loss": "binary",
        "smoothing": 0.0,
        "randaugment": None,
        "erasing": None,
        "jitter": 0.3,
        "3-augment": True,
        "parameters": 22_059_496,
    },
    # zihangJiang/TokenLabeling, main.py and README.md
    "lvvit": {
        **DEIT,
        "learning rate": 1.6e-3,
        "ema": 0.99992,
        "mixup": None,
        "cutmix": None,
        "mixed": None,
        "switch": None,
        "repeats": 1,
        "interpolation": "random",
        "token labels": (1.0, 1.0, "maps", "paper"),
        "parameters": 26_151_824,
    },
    # CPVT: "as DeiT", at batch 2048
    "cpvt": {
        **DEIT,
        "learning rate": 5e-4 * 2048 / 512,
        "batch": 2048,
        "parameters": 21_993_832,
    },
    # Meituan-AutoML/Twins, main.py, README.md, and 300 lines in logs/pcpvt_s.txt
    "pcpvt": {**DEIT, "cooldown": 0, "clip": 5.0, "parameters": 24_106_216},
    # google-research/vision_transformer, configs/common.py and README.md
    "finetune_384": {
        **BIG_VISION,
        "optimizer": "sgd",
        "betas": (0.9,),
        "learning rate": 0.03,
        "batch": 512,
        "epochs": round(20_000 * 512 / 1_281_167),
        "warm-up": "500 updates",
        "weight decay": 0.0,
        "loss": "softmax",
        "mixup": None,
        "mixed": None,
        "randaugment": None,
        "image": 384,
        "interpolation": None,  # that of the checkpoint
    },
}
NARROW = {  # of what is built for the size of its images alone
    "ViT": {"embed_dim": 24, "num_heads": 3},
    "CPVT": {"embed_dim": 24, "num_heads": 3},
    "LVViT": {"embed_dim": 24, "num_heads": 3},
    "PCPVT": {"embed_dims": (8, 16, 16, 16), "num_heads": (1, 2, 2, 2)},
}


def said(recipe):
    """What a recipe says, in the same words."""
    how = recipe.augmentation
    mixes = how.mixup or how.cutmix
    both = how.mixup and how.cutmix
    crop = how.random_resized_crop
    draws = how.rand_augment
    warmup = f"{recipe.warmup_epochs} epochs"
    if recipe.warmup_steps is not None:
        warmup = f"{recipe.warmup_steps} updates"
    betas = (recipe.momentum, recipe.beta_2)
    row = {
        "optimizer": recipe.optimizer,
        "betas": betas[:1] if recipe.optimizer == "sgd" else betas,
        "learning rate": recipe.learning_rate,
        "batch": recipe.batch_size,
        "epochs": recipe.epochs - recipe.cooldown_epochs,
        "floor": recipe.final_learning_rate,
        "warm-up": warmup,
        "warm-up from": recipe.warmup_learning_rate,
        "cooldown": recipe.cooldown_epochs,
        "weight decay": recipe.weight_decay,
        "clip": recipe.clip_norm,
        "drop path": recipe.model.get("drop_path_rate", 0.0),
        "ema": recipe.ema,
        "loss": recipe.loss,
        "smoothing": how.label_smoothing,
        "mixup": how.mixup or None,
        "cutmix": how.cutmix or None,
        "mixed": how.mix_probability if mixes else None,
        "switch": how.cutmix_probability if both else None,
        "randaugment": draws
        and (draws["num_ops"], draws["magnitude"], draws.get("deviation", 0.5)),
        "crop": tuple(crop.get("scale", (0.08, 1.0))),
        "interpolation": crop.get("interpolation"),
        "flip": how.random_flip,
        "erasing": how.random_erasing or None,
        "repeats": how.repeats,
        "jitter": how.color_jitter or None,
        "3-augment": how.three_augment,
        "image": recipe.model.get("image_size"),
    }
    if (teaching := recipe.teaching) is not None:
        weight, tau = teaching.distillation_weight, teaching.temperature
        row["distillation"] = (teaching.distillation, weight, tau)
    if (tokens := recipe.token_labeling) is not None:
        weights = tokens.dense_weight, tokens.class_weight
        row["token labels"] = (*weights, tokens.class_labels, tokens.mix_token)
    if recipe.family is not None:
        small = {"depths": (1,) * 4} if recipe.family == "PCPVT" else {"depth": 5}
        preprocess = Preprocess.of_model(
            recipe.replace(**small, **NARROW[recipe.family]).build_model(3)
        )
        row["image"] = preprocess.image_size[0]
        row["interpolation"] = row["interpolation"] or preprocess.interpolation
    return row


def table(name, paper, ours):
    """Both in lines, those that differ marked."""
    lines = [f"{name:18} {'paper':24} recipe"]
    paper = {key: x for key, x in paper.items() if key != "parameters"}
    for key in dict.fromkeys([*paper, *ours]):
        theirs, own = paper.get(key), ours.get(key)
        mark = "" if same(theirs, own) else "   <- differs"
        lines.append(f"  {key:16} {theirs!s:24} {own!s}{mark}")
    return "\n".join(lines)


def same(theirs, own):
    if isinstance(theirs, float) and isinstance(own, float):
        return own == pytest.approx(theirs, rel=1e-12)
    return theirs == own


@pytest.mark.parametrize("name", PAPERS)
def test_a_recipe_is_that_of_its_paper_in_the_table(name):
    text = table(name, PAPERS[name], said(RECIPES[name]))
    print(f"\n{text}")
    assert "differs" not in text, text


@pytest.mark.slow
def test_the_models_have_as_many_parameters_as_those_of_the_papers():
    for name, paper in PAPERS.items():
        if RECIPES[name].family is None:
            continue
        variables = RECIPES[name].build_model(1000).trainable_variables
        count = sum(math.prod(variable.shape) for variable in variables)
        print(f"{name:18} {paper['parameters']:12,} {count:12,}")
        assert count == paper["parameters"], name


def test_every_recipe_of_a_paper_is_in_the_table():
    others = {"finetune", *(recipe.name for recipe in DIGITS)}
    assert set(RECIPES) == {*PAPERS, *others}


def test_the_images_of_imagenet_are_enough_for_every_warm_up():
    for name in PAPERS:
        recipe = RECIPES[name]
        updates = 1_281_167 // recipe.batch_size
        rate = schedule(recipe, updates)
        first, last = (float(rate(x)) for x in (0, recipe.epochs * updates))
        assert first == pytest.approx(recipe.warmup_learning_rate, abs=1e-9)
        assert last == pytest.approx(recipe.final_learning_rate, abs=1e-9)


def test_only_what_its_user_must_give_is_missing():
    for recipe in RECIPES.values():
        missing = {
            "finetune": "needs a checkpoint",
            "finetune_384": "needs a checkpoint",
            "deit_distilled": "needs a teacher: --set teacher=SOURCE",
            "digits_distilled": "needs a teacher: --set teacher=SOURCE",
        }
        if recipe.name not in missing:
            recipe.check_complete()
            continue
        with pytest.raises(ValueError, match=missing[recipe.name]):
            recipe.check_complete()
    RECIPES["deit_distilled"].replace(teacher="runs/digits").check_complete()
    RECIPES["finetune_384"].replace(checkpoint="x.npz").check_complete()


def test_a_fresh_head_is_as_the_source_of_finetune_384_says(tmp_path):
    """Zeros where the weights are Google's, random with timm's, kept where it fits."""
    golden = GOLDEN / "google_vit.checkpoint.npz"
    with pytest.warns(UserWarning, match="fresh because of num_classes=5"):
        google = from_checkpoint(golden, num_classes=5, num_heads=4)
    assert not to_numpy(google.get_layer("head").kernel).any()
    fitting = from_checkpoint(golden, num_classes=7, num_heads=4)
    assert to_numpy(fitting.get_layer("head").kernel).any()
    small = {"image_size": 16, "patch_size": 8, "embed_dim": 24, "depth": 1}
    model = ViT("tiny", num_classes=3, initialization="timm", **small)
    to_checkpoint(model, tmp_path / "timm.safetensors")
    with pytest.warns(UserWarning, match="fresh because of num_classes=5"):
        other = from_checkpoint(tmp_path / "timm.safetensors", num_classes=5)
    assert to_numpy(other.get_layer("head").kernel).any()


def test_the_names_of_arguments_are_those_of_the_functions():
    for name, function in (
        ("random_resized_crop", augment.random_resized_crop),
        ("rand_augment", augment.rand_augment_draws),
        ("random_affine", augment.affines),
    ):
        parameters = inspect.signature(function).parameters.values()
        assert ARGUMENTS[name] == tuple(
            x.name for x in parameters if x.default is not x.empty
        )


def test_every_field_is_shown_once_and_what_changed_is_told():
    heading = ("name", "source", "cost", "expected")
    fields = [x for names in recipe_tables.SECTIONS.values() for x in names]
    assert sorted([*fields, *heading]) == sorted(
        field.name for field in dataclasses.fields(training.Recipe)
    )
    before = RECIPES["deit"]
    changed = before.replace(mixup=0.2, depth=2, ema=0.99, final_learning_rate=1e-6)
    rows = [
        x for rows in recipe_tables.sections(changed, before).values() for x in rows
    ]
    told = {name: text for name, text in rows if "was" in text}
    assert told == {
        "mixup": "0.2  (was 0.8)",
        "depth": "2  (was not given)",
        "ema": "0.99  (was null)",
        "final_learning_rate": "1e-6  (was 1e-5)",
    }
    assert dict(rows)["rand_augment"] == '{"num_ops": 2, "magnitude": 9.0}'


def test_what_is_shown_is_what_set_takes():
    for recipe in RECIPES.values():
        rows = recipe_tables.sections(recipe, recipe).values()
        shown = [f"{name}={text}" for row in rows for name, text in row]
        again = recipe.replace(**command.parse_changes(shown))
        assert json.dumps(dataclasses.asdict(again)) == json.dumps(
            dataclasses.asdict(recipe)
        )


def test_groups_of_variables_are_told_from_the_embedding_to_the_head():
    recipe = RECIPES["digits"].replace(depth=3, layer_decay=0.5, frozen=1)
    model = recipe.build_model(10)
    rows = recipe_tables.explained(model, recipe)
    assert [(row[0], row[3]) for row in rows] == [
        *[("embedding", "frozen")] * 2,
        *[("block 0", "frozen")] * 2,
        *[("block 1", "0.25")] * 2,
        *[("block 2", "0.5")] * 2,
        *[("norm, head", "1"), ("head", "1")],
    ]
    assert rows[4] == ("block 1", "kernel", 12 * 96 * 96, "0.25", "0.0005", "0.05")
    assert rows[5][1:] == ("gamma, beta, bias", 13 * 96, "0.25", "0.0005", "0")
    assert rows[1][1] == "bias, position table"
    assert sum(row[2] for row in rows) == model.count_params()
    assert all(variable.trainable for variable in model.trainable_variables)


def test_groups_that_are_trained_alike_are_one_row():
    recipe = RECIPES["cpvt"].replace(embed_dim=24, depth=6, image_size=32)
    rows = recipe_tables.explained(recipe.build_model(10), recipe)
    assert [(row[0], row[5]) for row in rows] == [
        ("embedding, block 0..5, head", "0.05"),
        ("embedding, block 0..5, norm, head", "0"),
    ]
    assert "peg kernel, peg bias" in rows[1][1]
    lora = RECIPES["digits"].replace(lora_rank=2, depth=2)
    rows = recipe_tables.explained(lora.build_model(10), lora)
    trained = [row for row in rows if row[3] != "frozen"]
    assert [row[0] for row in trained] == ["block 0..1, head", "head"]
    assert "lora_kernel_a" in trained[0][1]
