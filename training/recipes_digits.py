"""Recipes that run in minutes on a CPU."""

from training.recipe import Recipe
from training.recipe_parts import Augmentation, Teaching, TokenLabels

DIGITS = [
    Recipe(
        name="digits",
        source="made for this package",
        cost="about 2 minutes on 2 CPU cores",
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
        name="digits_distilled",
        source="made for this package, after https://arxiv.org/abs/2012.12877: 200 "
        "labels, and a teacher that you give by --set teacher=runs/digits",
        cost="about 2 minutes on 2 CPU cores",
        expected="84 to 91 % of the 360 held-out images in five seeds",
        data="digits",
        model={
            "variant": "deit_tiny_distilled",
            "image_size": 32,
            "patch_size": 8,
            "embed_dim": 48,
            "depth": 3,
            "normalization": "inception",
            "crop_ratio": None,
        },
        teaching=Teaching(
            distillation="soft", distillation_weight=0.9, temperature=3.0
        ),
        train_images=200,
        epochs=120,
        batch_size=25,
        learning_rate=2e-3,
        warmup_epochs=5,
        weight_decay=0.05,
        augmentation=Augmentation(
            random_affine={"rotation_degrees": 20.0, "zoom": 0.2, "shift": 0.12}
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
]
