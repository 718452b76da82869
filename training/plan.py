"""What is drawn for images and what is done by it: a plan, small beside the pixels.

Everything random is drawn here, from the seed. The pixels are then changed here too, in
TensorFlow, or, with `Augmentation.on_accelerator`, by `training.accelerated` within the
training step.

A plan has, as far as the augmentation asks for it:

    crop        (12, 2) an image: what `training.augment.drawn_crop` takes
    matrices    (3, 3) an image: where it came from (`training.augment`)
    rand_augment, three_augment, color_jitter
                (n, 2) an image: number and amount of each step (`training.colors`)
    box, noise  what is erased: (4,), top, left, height and width; the seed, (2,)

Shapes: B images of H x W pixels.
"""

import functools

import tensorflow as tf

from training import augment, colors
from training.erasing import erased, random_erasing_draws
from training.recipe_parts import Augmentation
from training.targets import mix_draws

Plan = dict[str, tf.Tensor]


def plan_of(
    key: tf.Tensor, augmentation: Augmentation, size: tuple, batch: int
) -> Plan:
    """The plan of a batch of images of `size` (H, W), drawn at once: a row an image."""
    plan, steps = {}, []
    if augmentation.random_resized_crop is not None:
        limits = {**augmentation.random_resized_crop}
        limits.pop("interpolation", None)
        plan["crop"] = augment.crop_draws(key, batch, **limits)
    if augmentation.random_flip:
        steps.append(augment.flips(key, batch))
    if augmentation.rand_augment is not None:
        draws = augment.rand_augment_draws(key, batch, **augmentation.rand_augment)
        plan["rand_augment"] = colors.rand_augment_steps(*draws)
        steps.append(augment.rand_augment_matrices(*draws, size))
    if augmentation.random_affine is not None:
        affine = augment.affines(key, batch, size, **augmentation.random_affine)
        steps.append(affine)
    if steps:
        plan["matrices"] = functools.reduce(tf.matmul, steps)
    if augmentation.three_augment:
        plan["three_augment"] = colors.three_augment_draws(key, batch)
    if augmentation.color_jitter:
        jitter = augmentation.color_jitter
        plan["color_jitter"] = colors.color_jitter_draws(key, batch, jitter)
    if augmentation.random_erasing:
        drawn = random_erasing_draws(key, batch, size, augmentation.random_erasing)
        plan["box"], plan["noise"] = drawn
    return plan


def coloured(image: tf.Tensor, plan: Plan) -> tf.Tensor:
    """An image after the steps that move no pixel."""
    for name in colors.STEPS:
        if name in plan:
            image = colors.done(image, name, plan[name])
    return image


def placed(image: tf.Tensor, plan: Plan) -> tf.Tensor:
    """An image `(H, W, 3)` that is moved, and of which a box is erased then."""
    if "matrices" in plan:
        image = augment.warp_one(image, plan["matrices"])
    if "box" in plan:
        image = erased(image, plan["box"], plan["noise"])
    return image


def mix_of(key: tf.Tensor, augmentation: Augmentation, size: tuple) -> tf.Tensor | None:
    """How the images of a batch are mixed: what `mix_draws` gives."""
    names = ("mixup", "cutmix", "mix_probability", "cutmix_probability")
    return mix_draws(key, size, *(getattr(augmentation, name) for name in names))


def packed(
    images: tf.Tensor,
    plan: Plan,
    mix: tf.Tensor | None,
) -> Plan:
    """What `training.accelerated` takes: images, uint8, and what is to be done to them.

    How images are mixed stands in each row, `(B, 5)`; of the noise there is the state
    of the generator, int32 `(B, 6)`: two words of its key, four of its counter, the
    lowest first.
    """
    batch = {"images": images, **plan}
    if mix is not None:
        batch["mix"] = tf.tile(mix[None], (tf.shape(images)[0], 1))
    if "noise" in plan:
        spec = tf.TensorSpec((6,), tf.int32)
        batch["noise"] = tf.map_fn(_state, plan["noise"], fn_output_signature=spec)
    return batch


def _state(seed):
    """The words by which TensorFlow's generator Philox begins with a seed."""
    words = tf.raw_ops.StatelessRandomGetKeyCounter(seed=seed)
    words = tf.concat([words.key, words.counter], 0)
    return tf.reshape(tf.bitcast(words, tf.int32), [-1])
