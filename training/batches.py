"""Batches of images and labels for `model.fit`.

Shapes: B images of H x W pixels, `(h, w)` tokens, C classes.
"""

import math
from collections.abc import Callable

import numpy as np
import tensorflow as tf

from keras_vit.embedding import Preprocess
from training import augment
from training.data import Dataset
from training.mending import CHUNK, load_each, mended, without_damaged
from training.order import examples
from training.plan import coloured, mix_of, packed, placed, plan_of
from training.preprocess import geometry, resize, resize_mask
from training.recipe_parts import Augmentation
from training.service import DataService
from training.sharding import filled, own_rows, part_of, rows
from training.targets import image_labels, mixed, smooth, token_labels
from training.weights import label_weights


def training_batches(
    data: Dataset,
    preprocess: Preprocess,
    batch_size: int,
    *,
    epochs: int,
    first_epoch: int = 0,
    first_step: int = 0,
    seed: int = 0,
    augmentation: Augmentation | None = None,
    token_grid: tuple[int, int] | None = None,
    class_labels: str = "truth",
    accumulation_steps: int = 1,
    part: tuple[int, int] = (0, 1),
    class_weights: np.ndarray | None = None,
    damaged: Callable[[np.ndarray], None] | None = None,
    service: DataService | None = None,
) -> tf.data.Dataset:
    """Batches of (images, labels) of the epochs from `first_epoch` on.

    The order depends on the seed and the number of the epoch alone, and augmentation on
    the place in that order, so a resumed run sees what it would have seen. Each epoch
    leaves out the incomplete last batch.

    Args:
        data: What to read.
        preprocess: How a file becomes an image of the model's size.
        batch_size: Images for an update of the weights.
        epochs: Number of the last epoch.
        first_epoch: Number of epochs that are done already.
        first_step: Number of batches of the next epoch that are done too; they are
            skipped before their images are decoded.
        seed: Seed of order and augmentation.
        augmentation: What is done to the images, and to their labels with them; None
            for nothing.
        token_grid: `(h, w)` of a model whose tokens have labels; None for no such
            labels. They are read off the label maps of the data; where it has none, a
            token has the label of its image.
        class_labels: Where the label of an image comes from then: `"truth"`, or
            `"maps"`, the mean of the label map over what is seen of it.
        accumulation_steps: In how many batches the images of an update come, each of
            B = batch_size / accumulation_steps; its images are mixed with each other.
        part: (p, P): which process of how many this is. It has B / P rows of each
            batch (`training.sharding.rows`), the same ones as a process that has all.
        class_weights: float32 `(C,)`, of `training.weights`; None for no weights.
        damaged: Told the places in the order of images that do not decode, from 0 at
            the first of the first epoch; each is replaced by the next of its batch that
            does. None lets them be errors.
        service: Whose workers make the batches, the same ones: what
            `training.service.connect` returns. They cannot tell of damaged images.

    Returns:
        Dataset of (images float32 `(B, H, W, 3)` of 0..255, or, `on_accelerator`, what
        `training.accelerated` takes, labels),
        `steps_per_epoch(data, batch_size)` updates an epoch. The labels are int64
        `(B,)`; or, where they are mixed or smoothed, probabilities `(B, C)`; or, with a
        `token_grid`, a dictionary of `"class"` and `"truth"` `(B, C)` and `"tokens"`
        `(B, h, w, C)`; or masks, uint8 `(B, H, W)`. With `class_weights` there is
        a third element, what each label weighs: float32 `(B,)`, or `(B, H, W)`.

    Raises:
        ValueError: If there is not one complete batch, `first_step` is not in the
            epoch, or masks are to be cropped, mixed, smoothed or made labels of tokens,
            or labels from maps are asked for and there are none. With a `service` if
            `damaged` is given, or the data are read by Python functions.
    """
    if service is not None and damaged is not None:
        raise ValueError("The workers of a service tell of no damage: damaged=None.")
    augmentation = augmentation or Augmentation()
    check_labels(data, augmentation, token_grid, class_labels)
    steps = steps_per_epoch(data, batch_size) * accumulation_steps
    if not 0 <= first_step <= steps:
        raise ValueError(
            f"first_step must be in 0..{steps}, the batches of an epoch, got "
            f"{first_step}."
        )
    batch_size //= accumulation_steps
    follows = token_grid is not None and data.label_maps is not None
    own = rows(batch_size, part, bool(augmentation.mixup or augmentation.cutmix))
    count = steps * batch_size
    size = preprocess.image_size

    def planned(numbers, examples):
        """Draw for the whole batch: one op for all images, not some for each."""
        key = tf.stack([seed, numbers[0] // batch_size])
        plan = plan_of(key, augmentation, size, batch_size)
        plan = {name: tf.gather(x, own) for name, x in plan.items()}
        return numbers, (*examples, plan)

    def load(i, example):
        handle, label, *score_map, plan = example
        plan = {**plan}
        if augmentation.random_resized_crop is None:
            image, label = data.decode(handle, label)
            crop = geometry(tf.shape(image)[:2], preprocess)
            image = resize(image, preprocess)
        else:
            options = {**augmentation.random_resized_crop}
            options.pop("scale", None)
            file = data.read(handle)
            image, crop = augment.drawn_crop(
                file, preprocess, plan.pop("crop"), **options
            )
        if data.masks:
            label = resize_mask(label, preprocess)
        if augmentation.on_accelerator:
            image = tf.cast(tf.round(image), tf.uint8)
        else:
            image = placed(coloured(image, plan), plan)
        return (image, label, i, crop, plan, *score_map)

    def finish(step, batch):
        images, labels, _, crops, plan, *score_map = batch
        key = tf.stack([seed, step])
        matrices = plan.get("matrices")
        drawn = mix_of(key, augmentation, size)
        if augmentation.on_accelerator:
            images = packed(images, plan, drawn)
        elif drawn is not None:
            images = mixed(images, drawn, size)
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
                matrices = tf.eye(3, batch_shape=[len(own)])
            where = (*score_map, matrices)
            count = len(data.labels)
            targets["tokens"] = token_labels(*where, token_grid, count, crops=crops)
            if class_labels == "maps":
                targets["class"] = image_labels(*where, count, crops=crops)
        targets = smooth(targets, augmentation.label_smoothing)
        if drawn is not None:
            targets = {name: mixed(x, drawn, size) for name, x in targets.items()}
        return images, targets if token_grid is not None else targets["class"]

    def loaded(first_epoch, epochs, first_step=0, worker=None):
        follow = (data, follows, count, first_epoch, epochs, seed, augmentation.repeats)
        images = examples(*follow).enumerate(first_epoch * count)
        images = own_rows(images.skip(first_step * batch_size), batch_size, own)
        if worker is not None:
            images = service.share(images, len(own), worker)
        images = images.batch(len(own), drop_remainder=True)
        images = images.map(planned, tf.data.AUTOTUNE, deterministic=True).unbatch()
        if damaged is not None:
            return load_each(images, load, chunk)
        images = images.map(load, tf.data.AUTOTUNE, deterministic=True)
        return images.batch(len(own), drop_remainder=True)

    def made(step, batch):
        images, labels = finish(step, batch)
        if class_weights is None:
            return images, labels
        return images, labels, label_weights(labels, class_weights, data.masks)

    def share(worker):
        def numbered(*batch):
            step = batch[2][0] // batch_size  # of the number of an image
            return step, made(step, batch)

        batches = loaded(first_epoch, epochs, first_step, worker)
        return batches.map(numbered, tf.data.AUTOTUNE, deterministic=True)

    if data.whole:
        damaged = None
    first = first_epoch * steps + first_step
    total = epochs * steps - first
    if service is not None:
        shares = [share(worker) for worker in range(service.workers)]
        return service.read(shares, first, total).prefetch(2)
    chunk = math.gcd(CHUNK, len(own))
    batches = loaded(first_epoch, epochs, first_step)
    if damaged is not None:
        spare = loaded(epochs, epochs + 1)
        batches = mended(batches, spare, len(own), total, damaged)
    batches = batches.enumerate(first).map(
        lambda step, *batch: made(step, batch[0]),
        tf.data.AUTOTUNE,
        deterministic=True,
    )
    # Keras begins anew with every epoch where it knows how many there are.
    return batches.filter(lambda *batch: True).prefetch(2)


def validation_batches(
    data: Dataset,
    preprocess: Preprocess,
    batch_size: int,
    *,
    devices: int = 1,
    part: tuple[int, int] = (0, 1),
    damaged: Callable[[np.ndarray], None] | None = None,
) -> tf.data.Dataset:
    """Batches of (images, labels) of the validation part, in fixed order, all of it.

    Args:
        data: What to read.
        preprocess: How a file becomes an image of the model's size.
        batch_size: Images a batch.
        devices: D, how many share a batch. More than one are given (images, labels,
            weights), the last batch filled up to a multiple of D by images without
            weight; see `training.sharding.filled`.
        part: As that of `training_batches`.
        damaged: Told the numbers of images that do not decode, which are left out. None
            lets them be errors.
    """

    def load(i, example):
        image, label = data.decode(*example)
        if data.masks:
            label = resize_mask(label, preprocess)
        return resize(image, preprocess), label

    stream = data.stream("validation").enumerate()
    if damaged is None or data.whole:
        stream = stream.map(load, tf.data.AUTOTUNE, deterministic=True)
    else:
        stream = without_damaged(load_each(stream, load, CHUNK), CHUNK, damaged)
    batches = stream.batch(batch_size)
    if devices > 1:
        count = data.sizes["validation"]
        batches = filled(batches, count, batch_size, devices, data.masks)
    # The tuning of a pipeline keeps who gives it back waiting, for seconds: after every
    # epoch. Untuned, each stage has a thread for each core.
    options = tf.data.Options()
    options.autotune.enabled = False
    return part_of(batches, part).prefetch(2).with_options(options)


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


def _tiled(labels, grid):
    """`(B, C)` to `(B, h, w, C)`: every token has the label of its image."""
    shape = (tf.shape(labels)[0], *grid, labels.shape[-1])
    return tf.broadcast_to(labels[:, None, None], shape)
