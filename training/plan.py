"""What is drawn for images and what is done by it: a plan, small beside the pixels.

Everything random is drawn here, from the seed. The pixels are then changed here too, in
TensorFlow, or, with `Augmentation.on_accelerator`, by `training.accelerated` within the
training step.

A plan has, as far as the augmentation asks for it:

    rand_augment, three_augment, color_jitter
                (n, 2) an image: number and amount of each step (`training.colors`)
    box, noise  what is erased: (4,), top, left, height and width; the seed, (2,)

Shapes: B images of H x W pixels.
"""

import functools

import numpy as np
import tensorflow as tf

from training import augment, colors
from training.erasing import erased, random_erasing_draws
from training.recipe_parts import Augmentation
from training.targets import mix_draws

Plan = dict[str, tf.Tensor]


def image_plan(key: tf.Tensor, augmentation: Augmentation, size: tuple) -> Plan:
    """The plan of one image of `size` (H, W)."""
    plan = {}
    if augmentation.rand_augment is not None:
        draws = augment.rand_augment_draws(key, 1, **augmentation.rand_augment)
        plan["rand_augment"] = colors.rand_augment_steps(*draws)
    if augmentation.three_augment:
        plan["three_augment"] = colors.three_augment_draws(key)
    if augmentation.color_jitter:
        jitter = augmentation.color_jitter
        plan["color_jitter"] = colors.color_jitter_draws(key, jitter)
    if augmentation.random_erasing:
        probability = augmentation.random_erasing
        plan["box"], plan["noise"] = random_erasing_draws(key, size, probability)
    return plan


def coloured(image: tf.Tensor, plan: Plan) -> tf.Tensor:
    """An image after the steps that move no pixel."""
    for name in colors.STEPS:
        if name in plan:
            image = colors.done(image, name, plan[name])
    return image


def matrices_of(
    plan: Plan,
    key: tf.Tensor,
    augmentation: Augmentation,
    size: tuple,
    batch_size: int,
    own: np.ndarray,
) -> tf.Tensor | None:
    """The matrix of each image, by all steps that have one; None without such a step.

    Args:
        plan: Of the images.
        key: Draws for the whole batch.
        augmentation: What is done.
        size: `(H, W)` of the images.
        batch_size: Of the whole batch.
        own: Which of its rows the images are.
    """
    steps = []
    if augmentation.random_flip:
        steps.append(tf.gather(augment.flips(key, batch_size), own))
    if augmentation.rand_augment is not None:
        drawn, amounts = tf.unstack(tf.transpose(plan["rand_augment"], (2, 1, 0)))
        drawn = tf.cast(drawn, tf.int32)
        steps.append(augment.rand_augment_matrices(drawn, amounts, size))
    if augmentation.random_affine is not None:
        amounts = augmentation.random_affine
        matrices = augment.affines(key, batch_size, size, **amounts)
        steps.append(tf.gather(matrices, own))
    return functools.reduce(tf.matmul, steps) if steps else None


def placed(images: tf.Tensor, plan: Plan, matrices: tf.Tensor | None) -> tf.Tensor:
    """Images `(B, H, W, 3)` that are moved, and of which boxes are erased then."""
    parts = {"images": images}
    if matrices is not None:
        parts["matrices"] = matrices
    if "box" in plan:
        parts |= {"box": plan["box"], "noise": plan["noise"]}
    if len(parts) == 1:
        return images

    def one(parts):
        image = parts["images"]
        if "matrices" in parts:
            image = augment.warp_one(image, parts["matrices"])
        if "box" in parts:
            image = erased(image, parts["box"], parts["noise"])
        return tf.ensure_shape(image, images.shape[1:])

    spec = tf.TensorSpec(images.shape[1:], images.dtype)
    return tf.map_fn(one, parts, fn_output_signature=spec)


def mix_of(key: tf.Tensor, augmentation: Augmentation, size: tuple) -> tf.Tensor | None:
    """How the images of a batch are mixed: what `mix_draws` gives."""
    names = ("mixup", "cutmix", "mix_probability", "cutmix_probability")
    return mix_draws(key, size, *(getattr(augmentation, name) for name in names))


def packed(
    images: tf.Tensor,
    plan: Plan,
    matrices: tf.Tensor | None,
    mix: tf.Tensor | None,
) -> Plan:
    """What `training.accelerated` takes: images, uint8, and what is to be done to them.

    Matrices are those of `training.augment`, `(B, 3, 3)`; how images are mixed stands
    in each row, `(B, 5)`; of the noise there is the state of the generator, int32
    `(B, 6)`: two words of its key, four of its counter, the lowest first.
    """
    batch = {"images": images, **plan}
    if matrices is not None:
        batch["matrices"] = matrices
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
