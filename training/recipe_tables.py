"""What a recipe says, in rows of a table: its fields, and the groups of its model."""

import dataclasses
import json
import math
import re

import keras

from training.optimize import frozen, groups
from training.recipe import PARTS, Recipe
from training.recipes import RECIPES

SECTIONS = {  # every field of a recipe but those that `heading` tells
    "model": ("family", "model", "checkpoint", "segmentation"),
    "data": ("data", "train_images", "damaged_images", "augmentation"),
    "labels and loss": ("loss", "class_weights", "token_labeling", "teaching"),
    "optimisation": (
        *("epochs", "batch_size", "accumulation_steps", "optimizer", "momentum"),
        *("beta_2", "learning_rate", "final_learning_rate", "warmup_learning_rate"),
        *("warmup_epochs", "warmup_steps", "cooldown_epochs", "weight_decay"),
        *("layer_decay", "frozen", "lora_rank", "ema", "clip_norm", "remat"),
        *("precision", "seed"),
    ),
}


def overview() -> list[tuple[str, ...]]:
    """Name, model, data, cost and result of every recipe."""
    return [
        (
            recipe.name,
            model_name(recipe),
            recipe.data or "your own",
            recipe.cost,
            recipe.expected.removesuffix("; not run here"),
        )
        for recipe in RECIPES.values()
    ]


def model_name(recipe: Recipe) -> str:
    """Family and variant, or where the model comes from."""
    if recipe.family is None:
        return recipe.checkpoint or "a checkpoint"
    name = f"{recipe.family} {recipe.model.get('variant', '')}".strip()
    return name if recipe.segmentation is None else f"{name}, SemanticFPN"


def sections(recipe: Recipe, before: Recipe) -> dict[str, list[tuple[str, str]]]:
    """Fields and values by section, the values as `--set` takes them.

    Args:
        recipe: What to show.
        before: The recipe that it was; where a value is another, it is told.
    """
    now, old = (
        {name: dict(_rows(x, name)) for fields in SECTIONS.values() for name in fields}
        for x in (recipe, before)
    )
    return {
        title: [
            (key, _changed(text, old[name].get(key, "not given")))
            for name in fields
            for key, text in now[name].items()
        ]
        for title, fields in SECTIONS.items()
    }


def _rows(recipe, name):
    value = getattr(recipe, name)
    if name == "model":
        return [(key, _text(x)) for key, x in value.items()]
    if name in PARTS and value is not None:
        fields = dataclasses.fields(value)
        return [(x.name, _text(getattr(value, x.name))) for x in fields]
    return [(name, _text(value))]


def _text(value):
    """As `--set` takes it."""
    return value if isinstance(value, str) else re.sub(r"e-0", "e-", json.dumps(value))


def _changed(now, before):
    return now if now == before else f"{now}  (was {before})"


def explained(model: keras.Model, recipe: Recipe) -> list[tuple[str | int, ...]]:
    """How the variables of a model are trained, a row for those that are trained alike.

    Returns:
        Parts of the model, variables, number of parameters, factor of the learning
        rate, its peak and weight decay, or `frozen`, from the embedding to the head.
    """
    with frozen(model, recipe):
        alike = {}
        for group in groups(model, recipe):
            rule = (group.trained, group.learning_rate_factor, group.weight_decay)
            alike.setdefault(rule, []).append(group)
        return [_explained(members, recipe) for members in alike.values()]


def _explained(members, recipe):
    variables = [variable for group in members for variable in group.variables]
    first = members[0]
    how = ("frozen", "", "")
    if first.trained:
        factor = first.learning_rate_factor
        rates = (factor, factor * recipe.learning_rate, first.weight_decay)
        how = tuple(_short(rate) for rate in rates)
    count = sum(math.prod(variable.shape) for variable in variables)
    names = dict.fromkeys(_leaf(variable) for variable in variables)
    return _parts(members), ", ".join(names), count, *how


def _parts(members):
    """`embedding, block 0..11, head`."""
    names = list(dict.fromkeys(group.name for group in members))
    blocks = [int(x.removeprefix("block ")) for x in names if x.startswith("block ")]
    runs = []
    for i in blocks:
        if runs and i == runs[-1][1] + 1:
            runs[-1][1] = i
        else:
            runs.append([i, i])
    ranges = [f"block {a}" if a == b else f"block {a}..{b}" for a, b in runs]
    before = [x for x in names if x == "embedding"]
    after = [x for x in names if not x.startswith("block ") and x != "embedding"]
    return ", ".join([*before, *ranges, *after])


def _leaf(variable):
    """What a variable is called in its layer; of a position, with its layer."""
    *_, layer, name = ["", *variable.path.split("/")]
    kind = re.sub(r"^stage\d+_|\d+$", "", layer)
    return f"{kind} {name}" if kind in ("position", "peg") else name


def _short(number):
    return re.sub(r"e-0", "e-", f"{number:.4g}")
