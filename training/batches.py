"""Batches of images and labels for `model.fit`.

Shapes: B images of H x W pixels, `(h, w)` tokens, C classes.
"""

import functools

import tensorflow as tf

from keras_vit.embedding import Preprocess
from training import augment
from training.data import Dataset
from training.preprocess import geometry, resize, resize_mask
from training.recipe import Augmentation
from training.targets import image_labels, mix, smooth, token_labels


def training_batches(
    data: Dataset,
    preprocess: Preprocess,
    batch_size: int,
    *,
    epochs: int,
    first_epoch: int = 0,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    token_grid: tuple[int, int] | None = None,
    class_labels: str = "truth",
) -> tf.data.Dataset:
    """Batches of (images, labels) of the epochs from `first_epoch` on.

    The order depends on the seed and the number of the epoch alone, so a resumed run
    sees what it would have seen. Each epoch leaves out the incomplete last batch.

    Args:
        data: What to read.
        preprocess: How a file becomes an image of the model's size.
        batch_size: Images a batch.
        epochs: Number of the last epoch.
        first_epoch: Number of epochs that are done already.
        seed: Seed of order and augmentation.
        augmentation: What is done to the images, and to their labels with them; None
            for nothing.
        token_grid: `(h, w)` of a model whose tokens have labels; None for no such
            labels. They are read off the label maps of the data; where it has none, a
            token has the label of its image.
        class_labels: Where the label of an image comes from then: `"truth"`, or
            `"maps"`, the mean of the label map over what is seen of it.

    Returns:
        Dataset of (images float32 `(B, H, W, 3)` of 0..255, labels),
        `steps_per_epoch(data, batch_size)` batches an epoch. The labels are int64
        `(B,)`; or, where they are mixed or smoothed, probabilities `(B, C)`; or, with a
        `token_grid`, a dictionary of `"class"` and `"truth"` `(B, C)` and `"tokens"`
        `(B, h, w, C)`; or masks, uint8 `(B, H, W)`.

    Raises:
        ValueError: If there is not one complete batch, or masks are to be cropped,
            mixed, smoothed or made labels of tokens, or labels from maps are asked for
            and there are none.
    """
    augmentation = augmentation or Augmentation()
    check_labels(data, augmentation, token_grid, class_labels)
    steps = steps_per_epoch(data, batch_size)
    follows = token_grid is not None and data.label_maps is not None
    stream = _examples(data, follows, steps * batch_size, first_epoch, epochs, seed)

    def load(i, example):
        handle, label, *score_map = example
        image, label = data.decode(handle, label)
        crop = geometry(tf.shape(image)[:2], preprocess)
        if data.masks:
            label = resize_mask(label, preprocess)
        if augmentation.random_resized_crop is None:
            image = resize(image, preprocess)
        else:
            image, crop = augment.random_resized_crop(
                image,
                preprocess,
                tf.stack([seed, i]),
                **augmentation.random_resized_crop,
            )
        return (image, label, crop, *score_map)

    def finish(step, batch):
        images, labels, crops, *score_map = batch
        key = tf.stack([seed, step])
        images, matrices = _warped(images, key, augmentation)
        if data.masks:
            if matrices is not None:
                labels = augment.warp_masks(labels, matrices)
            return images, labels
        if token_grid is None and not augmentation.softens_labels:
            return images, labels
        truth = tf.one_hot(labels, len(data.labels))
        targets = {"class": truth}
        if token_grid is not None:
            targets |= {"truth": truth, "tokens": _tiled(truth, token_grid)}
        if follows:
            if matrices is None:
                matrices = tf.eye(3, batch_shape=[batch_size])
            where = (*score_map, matrices)
            count = len(data.labels)
            targets["tokens"] = token_labels(*where, token_grid, count, crops=crops)
            if class_labels == "maps":
                targets["class"] = image_labels(*where, count, crops=crops)
        targets = smooth(targets, augmentation.label_smoothing)
        images, targets = mix(
            images, targets, key, augmentation.mixup, augmentation.cutmix
        )
        return images, targets if token_grid is not None else targets["class"]

    first_step = first_epoch * steps
    images = stream.enumerate(first_step * batch_size)
    images = images.map(load, tf.data.AUTOTUNE, deterministic=True)
    batches = images.batch(batch_size, drop_remainder=True).enumerate(first_step)
    batches = batches.map(
        lambda step, *batch: finish(step, batch[0]),
        tf.data.AUTOTUNE,
        deterministic=True,
    )
    return batches.prefetch(2)


def validation_batches(
    data: Dataset, preprocess: Preprocess, batch_size: int
) -> tf.data.Dataset:
    """Batches of (images, labels) of the validation part, in fixed order, all of it."""

    def load(handle, label):
        image, label = data.decode(handle, label)
        if data.masks:
            label = resize_mask(label, preprocess)
        return resize(image, preprocess), label

    stream = data.stream("validation")
    stream = stream.map(load, tf.data.AUTOTUNE, deterministic=True)
    return stream.batch(batch_size).prefetch(2)


def steps_per_epoch(data: Dataset, batch_size: int) -> int:
    """Number of complete batches in an epoch.

    Raises:
        ValueError: If there is not one.
    """
    steps = data.sizes["train"] // batch_size
    if not steps:
        raise ValueError(
            f"batch_size must be at most the {data.sizes['train']} training images "
            f"of {data.name!r}, got {batch_size}."
        )
    return steps


def check_labels(
    data: Dataset,
    augmentation: Augmentation,
    token_grid: tuple[int, int] | None,
    class_labels: str,
) -> None:
    """Refuse labels that cannot be made of the data.

    Raises:
        ValueError: Those of `training_batches` that speak of labels.
    """
    changes_labels = (
        augmentation.random_resized_crop is not None
        or augmentation.softens_labels
        or token_grid is not None
    )
    if data.masks and changes_labels:
        raise ValueError(
            f"{data.name!r} has masks: random_resized_crop, mixup, cutmix, "
            "label_smoothing and token labels are for one class an image."
        )
    if class_labels == "maps" and data.label_maps is None:
        raise ValueError(
            "class_labels='maps' needs label maps; make some with keras-vit annotate, "
            f"{data.name!r} has none."
        )


def _examples(data, follows, count, first_epoch, epochs, seed):
    """(handle, label), and with `follows` the two parts of the map: `count` an epoch,
    in the order of the epoch."""
    examples = data.stream("train")
    if follows:
        pairs = tf.data.Dataset.zip(examples, data.label_maps())
        examples = pairs.map(lambda example, score_map: (*example, *score_map))

    def shuffled(epoch):
        def permuted(block, window):
            size = tf.shape(window[1])[0]
            key = tf.stack([seed + block * 2**32, epoch])
            order = tf.random.experimental.stateless_shuffle(tf.range(size), key)
            return tuple(tf.gather(x, order) for x in window)

        windows = examples.batch(data.shuffle_buffer).enumerate()
        return windows.map(permuted).unbatch().take(count)

    return tf.data.Dataset.range(first_epoch, epochs).flat_map(shuffled)


def _warped(images, key, augmentation):
    """Images after the steps that have a matrix, and that matrix; None without one."""
    batch, size = tf.shape(images)[0], images.shape[1:3]
    steps = []
    if augmentation.random_flip:
        steps.append(augment.flips(key, batch))
    if augmentation.rand_augment_geometry is not None:
        amounts = augmentation.rand_augment_geometry
        steps.append(augment.rand_augment_geometry(key, batch, size, **amounts))
    if augmentation.random_affine is not None:
        steps.append(augment.affines(key, batch, size, **augmentation.random_affine))
    if not steps:
        return images, None
    matrices = functools.reduce(tf.matmul, steps)
    return augment.warp(images, matrices), matrices


def _tiled(labels, grid):
    """`(B, C)` to `(B, h, w, C)`: every token has the label of its image."""
    shape = (tf.shape(labels)[0], *grid, labels.shape[-1])
    return tf.broadcast_to(labels[:, None, None], shape)
