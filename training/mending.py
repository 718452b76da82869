"""Images that do not decode leave no hole in the stream of batches.

An error of one image must not hide another, of the stream that it comes from, so it is
caught around the loading alone. An example carries whether it is whole; one that is not
is told to Python by its number, which costs nothing where all are whole.

B images a batch.
"""

from collections.abc import Callable

import numpy as np
import tensorflow as tf

CHUNK = 8  # images

Tell = Callable[[np.ndarray], None]


def load_each(examples: tf.data.Dataset, load: Callable, chunk: int) -> tf.data.Dataset:
    """Load numbered examples, as many as there are, blank in place of what fails.

    An error is caught in a dataset of its own, whose making costs something: there is
    one for a chunk. An error of `examples` itself is not caught.

    Args:
        examples: (number, example).
        load: From (number, example) to tensors of fixed shapes.
        chunk: How many examples are loaded by one worker; those of a chunk that failed
            come after the others, as blanks.

    Returns:
        (number, found, what `load` gave for the example `found`, -1 for a blank).
    """

    def of_chunk(numbers, some):
        pairs = tf.data.Dataset.from_tensor_slices((numbers, some))
        good = pairs.map(lambda i, x: (i, load(i, x))).ignore_errors()
        blank = tf.nest.map_structure(
            lambda x: tf.zeros([side or 1 for side in x.shape], x.dtype),
            good.element_spec,
        )
        blank = (tf.constant(-1, tf.int64), blank[1])
        blanks = tf.data.Dataset.from_tensors(blank).repeat()
        count = tf.size(numbers, tf.int64)
        every = tf.data.Dataset.zip(
            tf.data.Dataset.from_tensor_slices(numbers), good.concatenate(blanks)
        )
        return every.take(count).map(lambda number, pair: (number, *pair))

    return examples.batch(chunk).interleave(
        of_chunk,
        cycle_length=tf.data.AUTOTUNE,
        block_length=chunk,
        num_parallel_calls=tf.data.AUTOTUNE,
        deterministic=True,
    )


def mended(
    images: tf.data.Dataset,
    spare: tf.data.Dataset,
    batch_size: int,
    total: int,
    tell: Tell,
) -> tf.data.Dataset:
    """Batches where the next whole image of the batch stands in for a damaged one.

    After the last image of a batch comes its first. Where no image of a batch is whole
    the next batch stands in for it. So a batch depends on nothing before it.

    Args:
        images: What `load_each` gives, in chunks of which B is a multiple.
        spare: The same, what comes after the last; read only if it is needed.
        batch_size: B.
        total: How many batches there are without `spare`.
        tell: Called with the numbers of images that are not whole.

    Returns:
        Dataset of batches, `total` of them; if there are not so many with a whole
        image, reading it ends in `tf.errors.FailedPreconditionError`.
    """

    def fill(numbers, found, batch):
        filled = tf.cond(
            tf.reduce_all(found >= 0),
            lambda: batch,
            lambda: _filled(numbers, found, batch, tell),
        )
        return tf.reduce_any(found >= 0), filled

    def repeats(before, numbered):
        number, batch = numbered
        return number, (number - before, batch)

    joined = images.concatenate(spare).batch(batch_size, drop_remainder=True)
    joined = joined.map(fill).enumerate()
    whole = joined.filter(lambda number, filled: filled[0])
    whole = whole.map(lambda number, filled: (number, filled[1]))
    counted = whole.scan(tf.constant(-1, tf.int64), repeats)
    filled = counted.flat_map(
        lambda times, batch: tf.data.Dataset.from_tensors(batch).repeat(times)
    )
    return filled.take(total).apply(tf.data.experimental.assert_cardinality(total))


def without_damaged(images: tf.data.Dataset, chunk: int, tell: Tell) -> tf.data.Dataset:
    """The whole ones of what `load_each` gives; `tell` is told of the others."""

    def of_chunk(numbers, found, loaded):
        told = tf.cond(
            tf.reduce_all(found >= 0),
            lambda: False,
            lambda: _tell(numbers, found, tell),
        )
        with tf.control_dependencies([told]):
            return tf.identity(found), loaded

    chunks = images.batch(chunk).map(of_chunk).unbatch()
    whole = chunks.filter(lambda found, loaded: found >= 0)
    return whole.map(lambda found, loaded: loaded)


def _filled(numbers, found, batch, tell):
    """Rows in order, the next whole one in place of a damaged one, which is told."""
    with tf.control_dependencies([_tell(numbers, found, tell)]):
        rows = tf.argsort(tf.where(found < 0, tf.int64.max, found))
    count = tf.math.count_nonzero(found >= 0, dtype=tf.int32)
    order = tf.gather(found, rows)[:count]
    after = tf.searchsorted(order, numbers) % tf.maximum(count, 1)
    index = tf.gather(rows, after)
    return tf.nest.map_structure(lambda x: tf.gather(x, index), batch)


def _tell(numbers, found, tell):
    """Tell the numbers that were not found."""

    def call(numbers, found):
        tell(np.setdiff1d(numbers, found))
        return np.False_

    return tf.numpy_function(call, [numbers, found], tf.bool)
