import dataclasses

import pytest

from keras_vit import class_labels
from training import RECIPES, TokenLabels
from training.recipes import find_recipe


def test_every_recipe_builds_its_model_and_says_where_it_comes_from():
    for name, recipe in RECIPES.items():
        assert recipe.name == name and recipe.source and recipe.cost and recipe.expected
        if recipe.family is None:
            continue  # its model is that of a checkpoint: tests/test_finetune.py
        small = {"depths": (1,) * 4} if recipe.family == "PCPVT" else {"depth": 1}
        if recipe.family == "CPVT":
            small["peg_positions"] = (0,)
        shape = recipe.replace(**small).build_model(3).output_shape
        assert shape == (
            (None, 3) if recipe.segmentation is None else (None,) * 3 + (3,)
        )


def test_replace_takes_fields_of_the_recipe_and_arguments_of_the_model():
    recipe = RECIPES["digits"].replace(epochs=7, depth=2, pool="class")
    assert recipe.epochs == 7
    assert recipe.model["depth"] == 2 and recipe.model["pool"] == "class"
    assert RECIPES["digits"].epochs != 7  # recipes are values


def test_replace_reaches_the_augmentation_and_the_token_labeling():
    recipe = RECIPES["digits_token_labeling"]
    changed = recipe.replace(mixup=0.2, dense_weight=0.5, mix_token=None, depth=2)
    assert changed.augmentation.mixup == 0.2
    assert changed.augmentation.random_affine == recipe.augmentation.random_affine
    assert changed.token_labeling == TokenLabels(dense_weight=0.5, mix_token=None)
    assert changed.model["depth"] == 2 and recipe.augmentation.mixup == 0
    assert recipe.replace(token_labeling=None).token_labeling is None
    with pytest.raises(ValueError, match=r"got 'dense_weight'"):
        RECIPES["digits"].replace(dense_weight=0.5)  # it labels no tokens
    given = RECIPES["digits"].replace(token_labeling={"class_weight": 2})
    assert given.token_labeling == TokenLabels(class_weight=2)


def test_a_recipe_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        RECIPES["digits"].epochs = 3


def test_replace_knows_the_arguments_of_every_family():
    recipe = RECIPES["digits"].replace(
        family="PCPVT", model={"variant": "small"}, depths=[1, 1, 1, 1], peg=False
    )
    assert recipe.model == {"variant": "small", "depths": (1, 1, 1, 1), "peg": False}
    assert recipe.build_model(3).output_shape == (None, 3)
    changed = recipe.replace(family="CPVT", model={"depth": 1}, peg_positions=[-1])
    assert changed.model == {"depth": 1, "peg_positions": (-1,)}
    with pytest.raises(ValueError, match=r"got 'depth'. Did you mean 'depths'"):
        recipe.replace(depth=3)
    with pytest.raises(ValueError, match=r"got 'depths'. Did you mean 'depth'"):
        recipe.replace(family="CPVT", depths=[1, 1, 1, 1])


def test_a_checkpoint_leaves_nothing_of_the_model_but_what_is_given_with_it():
    recipe = RECIPES["digits"].replace(checkpoint="a.npz", image_size=48, mixup=0.2)
    assert recipe.checkpoint == "a.npz" and recipe.family is None
    assert recipe.model == {"image_size": 48} and recipe.augmentation.mixup == 0.2
    further = recipe.replace(drop_path_rate=0.1, checkpoint="b.npz", table_grid=[2, 3])
    assert further.checkpoint == "b.npz"
    assert further.model == {
        "image_size": 48,
        "drop_path_rate": 0.1,
        "table_grid": (2, 3),
    }
    for name in ("sr_ratios", "token_weight", "peg_positions", "resampling"):
        assert recipe.replace(**{name: 1}).model[name] == 1  # of every family
    back = recipe.replace(checkpoint=None, family="CPVT", model={"variant": "tiny"})
    assert back.checkpoint is None and back.model == {"variant": "tiny"}
    direct = dataclasses.replace(RECIPES["digits"], checkpoint="a.npz", model={})
    assert direct.family is None
    with pytest.raises(ValueError, match=r"got 'variant'"):
        recipe.replace(variant="base")
    for changes in ({"family": "CPVT"}, {"family": "CPVT", "checkpoint": "c.npz"}):
        with pytest.raises(ValueError, match=r"family must be None .* got 'CPVT'"):
            recipe.replace(**changes)
    with pytest.raises(ValueError, match=r"checkpoint must be text, got 3"):
        recipe.replace(checkpoint=3)


def test_a_recipe_that_lacks_what_its_user_gives_is_refused():
    recipe = RECIPES["finetune"].replace(image_size=48)
    for refuse in (recipe.check_complete, lambda: recipe.build_model(3)):
        with pytest.raises(
            ValueError, match=r"'finetune' needs a checkpoint .* --from"
        ):
            refuse()
    given = recipe.replace(checkpoint="a.npz")
    assert given.model == {"image_size": 48}
    with pytest.raises(ValueError, match=r"'finetune' has no data of its own: --data"):
        given.check_complete()
    given.replace(data="digits").check_complete()
    RECIPES["digits"].check_complete()


@pytest.mark.parametrize("name", ["digits", "digits_token_labeling"])
def test_a_model_keeps_the_labels_of_the_data(name):
    recipe = RECIPES[name].replace(depth=1)
    assert class_labels(recipe.build_model(2, ["cat", "dog"])) == ("cat", "dog")
    assert class_labels(recipe.build_model(2)) is None
    own = recipe.replace(labels=["no", "yes"])
    assert class_labels(own.build_model(2, ["cat", "dog"])) == ("no", "yes")


@pytest.mark.parametrize("family", ["ViT", "CPVT"])
def test_segmentation_wraps_the_model_of_any_family(family):
    model = {"variant": "tiny", "depth": 1, "image_size": 32, "embed_dim": 24}
    recipe = RECIPES["digits_segmentation"].replace(
        family=family, model=model, segmentation={"channels": 8}
    )
    network = recipe.build_model(3, labels=["sky", "sea", "land"])
    assert network.output_shape == (None, 32, 32, 3)
    assert network.get_layer("head").kernel.shape == (1, 1, 8, 3)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"epoch": 3}, "got 'epoch'. Did you mean 'epochs'"),
        ({"embed_dims": 3}, "got 'embed_dims'. Did you mean 'embed_dim'"),
        ({"num_classes": 3}, "got 'num_classes'"),
        ({"epochs": 0}, "epochs must be a positive int, got 0"),
        ({"epochs": "abc"}, "epochs must be a positive int, got 'abc'"),
        ({"batch_size": 1.5}, "batch_size must be a positive int, got 1.5"),
        ({"learning_rate": -1.0}, "learning_rate must be positive, got -1.0"),
        ({"weight_decay": -0.1}, "weight_decay must be a number >= 0"),
        ({"clip_norm": 0.0}, "clip_norm must be positive or None, got 0.0"),
        (
            {"warmup_epochs": 99},
            r"warmup_epochs \+ .* below epochs=40, got 99 \+ .* to warmup_epochs=4 for",
        ),
        ({"remat": "yes"}, "remat must be true or false, got 'yes'"),
        ({"precision": "float16"}, "'mixed_float16', got 'float16'. Did you mean"),
        ({"family": "VIT"}, "family must be one of .*'ViT'.* got 'VIT'. Did you mean"),
        ({"family": "SemanticFPN"}, "family must be .* got 'SemanticFPN'"),
        ({"seed": -1}, "seed must be an int >= 0, got -1"),
        ({"damaged_images": -1}, "damaged_images must be an int >= 0, got -1"),
        ({"train_images": 0}, "train_images must be positive or None, got 0"),
        ({"mixup": -0.1}, "mixup must be a number >= 0, got -0.1"),
        ({"label_smoothing": 1.0}, r"label_smoothing must be in \[0, 1\), got 1.0"),
        ({"mix_up": 1.0}, "got 'mix_up'. Did you mean 'mixup'"),
        (
            {"token_labeling": {"dense": 1}},
            "field of TokenLabels must be one of 'dense_weight', .* got 'dense'",
        ),
        (
            {"token_labeling": {"mix_token": "papper"}},
            "mix_token must be one of .* got 'papper'. Did you mean 'paper'",
        ),
        ({"token_labeling": {"class_labels": "map"}}, "Did you mean 'maps'"),
        ({"token_labeling": {"class_weight": -1}}, "class_weight must be a number"),
        ({"augmentation": {"mixupp": 1}}, "got 'mixupp'. Did you mean 'mixup'"),
        ({"rand_augment": {"num_op": 2}}, "got 'num_op'. Did you mean 'num_ops'"),
        ({"rand_augment": 3}, "rand_augment must be keyword arguments, .* got 3"),
    ],
)
def test_wrong_values_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        RECIPES["digits"].replace(**change)


def test_an_unknown_recipe_is_refused():
    with pytest.raises(ValueError, match=r"got 'digit'. Did you mean 'digits'"):
        find_recipe("digit")
