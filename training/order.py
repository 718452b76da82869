"""In which order an epoch shows the training images."""

import dataclasses

import numpy as np
import tensorflow as tf

from training.data import Dataset


def places(
    data: Dataset, wanted: set[int], count: int, seed: int, repeats: int
) -> dict[int, int]:
    """Which training image is at a place of the order, without reading any.

    Args:
        data: Whose order it is.
        wanted: Places, counted from the first image of the first epoch.
        count: Images an epoch.
        seed: Seed of the order.
        repeats: As that of `training.Augmentation`.

    Returns:
        From each place to the number of the image in `data.stream("train")`.
    """
    numbers = tf.data.Dataset.range(data.sizes["train"]).map(lambda i: (i,))
    numbered = dataclasses.replace(data, stream=lambda part: numbers)
    found = {}
    for epoch in sorted({place // count for place in wanted}):
        order = examples(numbered, False, count, epoch, epoch + 1, seed, repeats)
        blocks = order.batch(65_536).as_numpy_iterator()
        shown = np.concatenate([block for (block,) in blocks])
        own = [place for place in wanted if place // count == epoch]
        found |= {place: int(shown[place % count]) for place in own}
    return found


def examples(
    data: Dataset,
    follows: bool,
    count: int,
    first_epoch: int,
    epochs: int,
    seed: int,
    repeats: int,
) -> tf.data.Dataset:
    """(handle, label), and with `follows` the two parts of the map: `count` an epoch,
    in the order of the epoch, each `repeats` times in a row.

    Of every window then so many fewer are taken, so that an epoch shows all parts of
    the data.
    """
    shown_once = data.stream("train")
    if follows:
        pairs = tf.data.Dataset.zip(shown_once, data.label_maps())
        shown_once = pairs.map(lambda example, score_map: (*example, *score_map))

    def shuffled(epoch):
        def permuted(block, window):
            size = tf.shape(window[0])[0]
            key = tf.stack([seed + block * 2**32, epoch])
            order = tf.random.experimental.stateless_shuffle(tf.range(size), key)
            before = block * data.shuffle_buffer  # of the windows so far; rounded up:
            shares = [
                -(-x // repeats) for x in (before, before + tf.cast(size, "int64"))
            ]
            order = order[: tf.cast(shares[1] - shares[0], tf.int32)]
            return tuple(tf.gather(x, order) for x in window)

        windows = shown_once.batch(data.shuffle_buffer).enumerate()
        shown = windows.map(permuted).unbatch()
        if repeats > 1:
            shown = shown.flat_map(
                lambda *x: tf.data.Dataset.from_tensors(x).repeat(repeats)
            )
        return shown.take(count)

    return tf.data.Dataset.range(first_epoch, epochs).flat_map(shuffled)
