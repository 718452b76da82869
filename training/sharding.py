"""Which rows of a batch a process reads, and how the last batch is filled.

B images a batch, P processes, D devices that share a batch.
"""

import numpy as np
import tensorflow as tf

from training.task import IGNORED


def rows(batch_size: int, part: tuple[int, int], mixes: bool = False) -> np.ndarray:
    """Rows of a batch that one process reads.

    They follow each other, so that the processes together have the batch in its order.
    Where image i is mixed with image B - 1 - i a process has half of its rows from the
    front and the partners of these, in reversed order the same set, from the back.

    Args:
        batch_size: B, a multiple of P; of 2 P where images are mixed.
        part: (p, P): which process of how many.
        mixes: Whether images are mixed with each other.

    Returns:
        Increasing, `(B / P,)`.
    """
    process, processes = part
    if not mixes or processes == 1:
        own = batch_size // processes
        return np.arange(process * own, (process + 1) * own)
    half = batch_size // (2 * processes)
    front = np.arange(process * half, (process + 1) * half)
    return np.concatenate([front, batch_size - 1 - front[::-1]])


def own_rows(
    examples: tf.data.Dataset, batch_size: int, own: np.ndarray
) -> tf.data.Dataset:
    """Those of numbered examples, (i, ...), that are in the own rows of a batch."""
    if len(own) == batch_size:
        return examples
    is_own = np.zeros(batch_size, bool)
    is_own[own] = True
    return examples.filter(lambda i, *_: tf.constant(is_own)[i % batch_size])


def union(values: set[int], part: tuple[int, int], most: int) -> set[int]:
    """The values of all processes, of each the `most` smallest; all must call it."""
    if part[1] == 1:
        return values
    from jax.experimental import multihost_utils

    own = np.full(most, -1, "int32")
    some = sorted(values)[:most]
    own[: len(some)] = some
    return set(multihost_utils.process_allgather(own).ravel().tolist()) - {-1}


def filled(
    batches: tf.data.Dataset, count: int, batch_size: int, devices: int, masks: bool
) -> tf.data.Dataset:
    """Batches that D devices can share, with weights that undo what is filled in.

    The last batch is filled up by its own rows. With N images that are N' with those
    which fill, a row has weight N' / N, one that fills 0: the mean over N' is that over
    N. Masks that fill are of class 255, which counts nowhere; there a batch of n images
    that are n' has weight n / n' * N' / N.

    Args:
        batches: (images, labels).
        count: N.
        batch_size: B, a multiple of D.
        devices: D.
        masks: Whether the labels are masks.

    Returns:
        (images, labels, weights); weights float32 `(B,)`, with masks `(B, 1, 1)`.
    """
    rest = -(count % batch_size) % devices
    scale = (count + rest) / count if count else 1.0

    def fill(images, labels):
        size = tf.shape(images)[0]
        missing = -size % devices
        index = tf.range(size + missing) % size
        is_own = tf.range(size + missing) < size
        images, labels = tf.gather(images, index), tf.gather(labels, index)
        if masks:
            nothing = tf.cast(IGNORED, labels.dtype)
            labels = tf.where(is_own[:, None, None], labels, nothing)
            part = tf.cast(size / (size + missing) * scale, tf.float32)
            return images, labels, tf.fill((size + missing, 1, 1), part)
        return images, labels, tf.cast(is_own, tf.float32) * scale

    return batches.map(fill, tf.data.AUTOTUNE, deterministic=True)


def part_of(batches: tf.data.Dataset, part: tuple[int, int]) -> tf.data.Dataset:
    """The rows of batches that one process has, of batches that its kind can share."""
    process, processes = part
    if processes == 1:
        return batches

    def own(*batch):
        size = tf.shape(batch[0])[0] // processes
        return tuple(x[process * size : (process + 1) * size] for x in batch)

    return batches.map(own, tf.data.AUTOTUNE, deterministic=True)
