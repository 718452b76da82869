"""The recipes that come with the package, each with its source, cost and result."""

from keras_vit.encoder import unknown
from training.recipe import Augmentation, Recipe, TokenLabels

RECIPES = {
    recipe.name: recipe
    for recipe in [
        Recipe(
            name="digits",
            source="made for this package",
            cost="about a minute on 2 CPU cores",
            expected="97 to 99 % of the 360 held-out images",
            data="digits",
            model={
                "variant": "tiny",
                "image_size": 32,
                "patch_size": 8,
                "embed_dim": 96,
                "depth": 4,
                "pool": "mean",
                "initialization": "timm",
                "drop_path_rate": 0.1,
            },
            epochs=40,
            batch_size=64,
            learning_rate=2e-3,
            warmup_epochs=3,
            weight_decay=0.05,
            augmentation=Augmentation(
                random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.08}
            ),
            clip_norm=1.0,
        ),
        Recipe(
            name="digits_segmentation",
            source="made for this package",
            cost="about 5 minutes on 2 CPU cores",
            expected="mean IoU 0.807 over 300 held-out scenes, with seed 0",
            data="digit_scenes:64",
            family="PCPVT",
            model={
                "variant": "small",
                "image_size": None,
                "embed_dims": (24, 48, 96, 128),
                "depths": (1, 1, 2, 1),
                "num_heads": (1, 2, 4, 4),
                "mlp_ratios": (4, 4, 4, 4),
                "normalization": "inception",
                "crop_ratio": None,
                "drop_path_rate": 0.05,
            },
            segmentation={"channels": 48},
            epochs=20,
            batch_size=32,
            learning_rate=3e-3,
            warmup_epochs=1,
            weight_decay=0.05,
            augmentation=Augmentation(
                random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.1}
            ),
            clip_norm=1.0,
        ),
        Recipe(
            name="digits_token_labeling",
            source="made for this package, after https://arxiv.org/abs/2104.10858",
            cost="about 3 minutes on 2 CPU cores",
            expected="94.2 % of the 360 held-out images, with seed 0",
            data="placed_digits:24",
            family="LVViT",
            model={
                "variant": "tiny",
                "image_size": 24,
                "patch_size": 4,
                "embed_dim": 64,
                "depth": 3,
                "stem_width": 16,
                "normalization": "inception",
                "crop_ratio": None,
                "drop_path_rate": 0.05,
            },
            token_labeling=TokenLabels(),
            epochs=40,
            batch_size=32,
            learning_rate=2e-3,
            final_learning_rate=1e-5,
            warmup_epochs=3,
            weight_decay=0.05,
            augmentation=Augmentation(
                random_affine={"rotation_degrees": 10.0, "zoom": 0.1, "shift": 0.1},
                label_smoothing=0.1,
            ),
            clip_norm=1.0,
        ),
        Recipe(
            name="lvvit",
            source="LV-ViT-S of https://arxiv.org/abs/2104.10858, by its code; without "
            "its random erasing, the operations of RandAugment on colours and the "
            "average of weights; give it --labels",
            cost="not run here",
            expected="83.3 % top-1 in the paper; not run here",
            data="tfds:imagenet2012",
            family="LVViT",
            model={"variant": "small", "drop_path_rate": 0.1},
            token_labeling=TokenLabels(class_labels="maps"),
            epochs=310,
            batch_size=1024,
            learning_rate=1.6e-3,
            final_learning_rate=1e-5,
            warmup_epochs=5,
            weight_decay=0.05,
            augmentation=Augmentation(
                random_resized_crop={},
                random_flip=True,
                rand_augment_geometry={"num_ops": 2, "magnitude": 9.0},
                label_smoothing=0.1,
            ),
        ),
        Recipe(
            name="vit_small",
            source="optimisation of DeiT-S, https://arxiv.org/abs/2012.12877, table 9, "
            "at batch 1024; without its augmentation",
            cost="not run here",
            expected="not run here",
            data="tfds:imagenet2012",
            model={"variant": "deit_small", "drop_path_rate": 0.1},
            epochs=300,
            batch_size=1024,
            learning_rate=1e-3,
            final_learning_rate=1e-5,
            warmup_epochs=5,
            weight_decay=0.05,
        ),
    ]
}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ValueError: If there is none.
    """
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
