"""The recipes that come with the package, each with its source, cost and result.

Where the code of a paper and ours do the same by other means, `source` says so. What
holds for all of them: the moments of the optimizers are float32, MixUp and CutMix take
the other image from the reversed batch, and weight decay leaves everything alone that
is no kernel.
"""

from keras_vit.encoder import unknown
from training.recipe import Recipe
from training.recipe_parts import Augmentation, Teaching, TokenLabels
from training.recipes_digits import DIGITS

IMAGENET = "tfds:imagenet2012"
NOT_RUN = "not run here"
BIG_VISION = (
    "There Adam's first moment is bfloat16, one in a hundred training images is held "
    "out, weight decay is 1e-4, 0.1 times the learning rate, and RandAugment is "
    "TensorFlow's, which does every operation, at one level"
)
DEIT_SCHEDULE = (
    "There the learning rate changes once an epoch and the cosine has begun below the "
    "warm-up; here it changes with every update, and the cosine begins after it"
)
DEIT_COOLDOWN = (
    "The 10 epochs of cooldown are those of its settings; its loop ends before them"
)

INCEPTION_CROP = {"scale": (0.05, 1.0)}
BIG_VISION_AUGMENTATION = {
    "random_resized_crop": INCEPTION_CROP,
    "random_flip": True,
    "rand_augment": {"num_ops": 2, "magnitude": 10.0, "deviation": 0.0},
}
BIG_VISION_RATES = {
    "learning_rate": 1e-3,
    "warmup_steps": 10_000,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
}
RAND_M9 = {"num_ops": 2, "magnitude": 9.0}  # rand-m9-mstd0.5-inc1
DEIT_AUGMENTATION = Augmentation(
    repeats=3,
    random_resized_crop={},
    random_flip=True,
    rand_augment=RAND_M9,
    random_erasing=0.25,
    label_smoothing=0.1,
    mixup=0.8,
    cutmix=1.0,
    mix_probability=1.0,
    cutmix_probability=0.5,
)
DEIT_RATES = {
    "final_learning_rate": 1e-5,
    "warmup_learning_rate": 1e-6,
    "warmup_epochs": 5,
}

PAPERS = [
    Recipe(
        name="vit_augreg",
        source="ViT-S/16 on ImageNet-1k, level medium2, of AugReg, "
        "https://arxiv.org/abs/2106.10270, by big_vision's vit_i1k.py. "
        f"{BIG_VISION}: 15, where 10 is the largest here.",
        cost=NOT_RUN,
        expected="78.8 % top-1 for the published weights; not run here",
        data=IMAGENET,
        model={"variant": "small", "head_bias": -6.9},
        epochs=300,
        batch_size=4096,
        **BIG_VISION_RATES,
        loss="sigmoid",
        augmentation=Augmentation(**BIG_VISION_AUGMENTATION, mixup=0.5),
    ),
    Recipe(
        name="vit_s16_i1k",
        source="ViT-S/16 of https://arxiv.org/abs/2205.01580, by big_vision's "
        f"vit_s16_i1k.py. {BIG_VISION}.",
        cost="6 to 7 hours on a TPU v3-8 by big_vision; not run here",
        expected="76.5 % top-1 by big_vision; not run here",
        data=IMAGENET,
        model={
            "variant": "small",
            "pool": "mean",
            "position": "sincos_2d",
            "representation_size": 384,
        },
        epochs=90,
        batch_size=1024,
        **BIG_VISION_RATES,
        augmentation=Augmentation(**BIG_VISION_AUGMENTATION, mixup=0.2),
    ),
    Recipe(
        name="deit",
        source="DeiT-S of https://arxiv.org/abs/2012.12877, table 9, and its code at "
        f"batch 1024. {DEIT_SCHEDULE}. {DEIT_COOLDOWN}. It tracks an average of the "
        "weights (0.99996) that its result is not of, so there is none here.",
        cost=NOT_RUN,
        expected="79.9 % top-1 in the paper; not run here",
        data=IMAGENET,
        model={"variant": "deit_small", "drop_path_rate": 0.1},
        epochs=310,
        batch_size=1024,
        learning_rate=1e-3,
        **DEIT_RATES,
        cooldown_epochs=10,
        weight_decay=0.05,
        augmentation=DEIT_AUGMENTATION,
    ),
    Recipe(
        name="deit_distilled",
        source="Distilled DeiT-S of https://arxiv.org/abs/2012.12877, by its code; the "
        "teacher of the paper is a RegNetY-16GF, yours is given by --set "
        "teacher=SOURCE. It sees the same augmented and mixed images. "
        f"{DEIT_SCHEDULE}. {DEIT_COOLDOWN}.",
        cost=NOT_RUN,
        expected="81.2 % top-1 in the paper, by its teacher; not run here",
        data=IMAGENET,
        model={"variant": "deit_small_distilled", "drop_path_rate": 0.1},
        epochs=310,
        batch_size=1024,
        learning_rate=1e-3,
        **DEIT_RATES,
        cooldown_epochs=10,
        weight_decay=0.05,
        augmentation=DEIT_AUGMENTATION,
        teaching=Teaching(distillation="hard", distillation_weight=0.5),
    ),
    Recipe(
        name="deit3",
        source="ViT-S of DeiT III, https://arxiv.org/abs/2204.07118, by its command "
        "for 224 pixels. The clipping is that of its optimizer, apex's FusedLAMB. "
        f"{DEIT_SCHEDULE}.",
        cost=NOT_RUN,
        expected="81.4 % top-1 in the paper; not run here",
        data=IMAGENET,
        model={"variant": "deit3_small", "drop_path_rate": 0.05},
        epochs=800,
        batch_size=2048,
        optimizer="lamb",
        learning_rate=4e-3,
        **DEIT_RATES,
        weight_decay=0.05,
        loss="binary",
        augmentation=Augmentation(
            repeats=3,
            random_resized_crop={},
            random_flip=True,
            three_augment=True,
            color_jitter=0.3,
            mixup=0.8,
            cutmix=1.0,
            mix_probability=1.0,
            cutmix_probability=0.5,
        ),
        clip_norm=1.0,
    ),
    Recipe(
        name="lvvit",
        source="LV-ViT-S of https://arxiv.org/abs/2104.10858, by its code; give it "
        f"--labels. {DEIT_SCHEDULE}.",
        cost=NOT_RUN,
        expected="83.3 % top-1 in the paper; not run here",
        data=IMAGENET,
        family="LVViT",
        model={"variant": "small", "drop_path_rate": 0.1},
        token_labeling=TokenLabels(class_labels="maps"),
        epochs=310,
        batch_size=1024,
        learning_rate=1.6e-3,
        **DEIT_RATES,
        cooldown_epochs=10,
        weight_decay=0.05,
        ema=0.99992,
        augmentation=Augmentation(
            random_resized_crop={"interpolation": "random"},
            random_flip=True,
            rand_augment=RAND_M9,
            random_erasing=0.25,
            label_smoothing=0.1,
        ),
    ),
    Recipe(
        name="cpvt",
        source="CPVT-S with mean pooling and five PEGs, https://arxiv.org/abs/"
        "2102.10882, which trains as DeiT does, at batch 2048; the learning rate is by "
        f"DeiT's rule, 5e-4 x batch / 512. {DEIT_SCHEDULE}. {DEIT_COOLDOWN}.",
        cost="1.6 days on 8 V100 in the paper; not run here",
        expected="81.5 % top-1 by the authors; not run here",
        data=IMAGENET,
        family="CPVT",
        model={
            "variant": "small",
            "pool": "mean",
            "peg_positions": (0, 1, 2, 3, 4),
            "drop_path_rate": 0.1,
        },
        epochs=310,
        batch_size=2048,
        learning_rate=2e-3,
        **DEIT_RATES,
        cooldown_epochs=10,
        weight_decay=0.05,
        augmentation=DEIT_AUGMENTATION,
    ),
    Recipe(
        name="pcpvt",
        source="Twins-PCPVT-S of https://arxiv.org/abs/2104.13840, by its code at "
        "batch 1024; its drop path is the default of that code, for the paper states "
        "none, and its log peaks at 1.25e-3 by a larger batch. "
        f"{DEIT_SCHEDULE}.",
        cost=NOT_RUN,
        expected="81.2 % top-1 in the paper; not run here",
        data=IMAGENET,
        family="PCPVT",
        model={"variant": "small", "drop_path_rate": 0.1},
        epochs=300,
        batch_size=1024,
        learning_rate=1e-3,
        **DEIT_RATES,
        weight_decay=0.05,
        augmentation=DEIT_AUGMENTATION,
        clip_norm=5.0,
    ),
]

FINE_TUNING = [
    Recipe(
        name="finetune_384",
        source="fine-tuning of https://github.com/google-research/vision_transformer "
        "on ImageNet: 20,000 updates, which are 8 epochs, its learning rate 0.03 or "
        "0.01. There the momentum is bfloat16 and the head starts at zeros; here a "
        "head for other classes does so with Google's files and is random with "
        "others, and one for as many classes is kept. AugReg cut its 384 pixels "
        "out of 448 instead.",
        cost=NOT_RUN,
        expected="83.8 % top-1 for AugReg's S/16 of ImageNet-21k; not run here",
        data=IMAGENET,
        family=None,
        model={"image_size": 384},
        epochs=8,
        batch_size=512,
        optimizer="sgd",
        momentum=0.9,
        learning_rate=0.03,
        warmup_steps=500,
        weight_decay=0.0,
        augmentation=Augmentation(random_resized_crop=INCEPTION_CROP, random_flip=True),
        clip_norm=1.0,
    ),
    Recipe(
        name="finetune",
        source="common practice of fine-tuning, no paper's numbers: AdamW whose "
        "learning rate falls by 0.75 from block to block, and is 2.5e-4 at batch 64 by "
        "the rule 1e-3 x batch / 256, as MAE does for ViT-L "
        "(https://arxiv.org/abs/2111.06377, its FINETUNE.md; 0.65 and half of that for "
        "ViT-B); without its MixUp, CutMix and erasing.",
        cost=NOT_RUN,
        expected=NOT_RUN,
        data=None,
        family=None,
        model={},
        epochs=10,
        batch_size=64,
        learning_rate=2.5e-4,
        warmup_epochs=0.5,
        weight_decay=0.05,
        layer_decay=0.75,
        augmentation=Augmentation(
            random_resized_crop={}, random_flip=True, label_smoothing=0.1
        ),
        clip_norm=1.0,
    ),
]

RECIPES = {recipe.name: recipe for recipe in [*DIGITS, *PAPERS, *FINE_TUNING]}


def find_recipe(name: str) -> Recipe:
    """Return the recipe called `name`.

    Raises:
        ValueError: If there is none.
    """
    if name not in RECIPES:
        raise ValueError(unknown("recipe", name, RECIPES))
    return RECIPES[name]
