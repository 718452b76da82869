"""Images/s of DeiT's augmentation at 224 pixels, and with keras-cv's RandAugment.

    pip install keras-cv
    python benchmarks/augmentation.py --rounds 5

JPEG files of 640 x 427 pixels, scikit-learn's two photographs, go through
RandomResizedCrop, flip, RandAugment, random erasing and MixUp or CutMix. The
contestants are `training.training_batches` with and without RandAugment, and the latter
with keras-cv's behind it, in `tf.data` too and with as many operations of the same
magnitude. They take turns in one process, one alone computing at any time. Time is that
of the processor, all threads together, so what runs beside it counts for little: the
speeds are those of one core. A ratio is the median over the rounds of the speed
relative to that with keras-cv's in the same round; the last column is what RandAugment
alone takes.
"""

import argparse
import statistics
import time
import warnings

import numpy as np
import tensorflow as tf
from sklearn.datasets import load_sample_images
from tqdm.auto import tqdm

from keras_vit.embedding import Preprocess
from training import Augmentation, Dataset, training_batches

PREPROCESS = Preprocess((224, 224), None, "bicubic")
PLAIN = {
    "random_resized_crop": {},
    "random_flip": True,
    "random_erasing": 0.25,
    "label_smoothing": 0.1,
    "mixup": 0.8,
    "cutmix": 1.0,
}
OURS, BARE, PEER = (
    "keras_vit",
    "keras_vit without RandAugment",
    "keras-cv's RandAugment",
)
UNTIMED = 8  # batches before the time is taken: tracing, autotuning, full buffers


def photographs() -> Dataset:
    """Two photographs as a dataset of 4,096 images."""
    photos = load_sample_images().images
    files = [tf.io.encode_jpeg(photo, quality=90).numpy() for photo in photos]
    labels = np.arange(4096) % 2

    def stream(part):
        numbers = tf.data.Dataset.from_tensor_slices(labels.astype("int64"))
        return numbers.map(lambda i: (tf.gather(files, i), i))

    return Dataset(
        name="photographs",
        labels=tuple(str(i) for i in range(1000)),
        sizes={"train": len(labels), "validation": len(labels)},
        stream=stream,
        read=lambda handle: handle,
        shuffle_buffer=64,
        fingerprint="",
    )


def pipelines(batch_size: int) -> dict[str, tf.data.Dataset]:
    """Endless batches of every contestant whose library is installed."""

    def ours(**changes):
        return training_batches(
            photographs(),
            PREPROCESS,
            batch_size,
            epochs=10**6,
            augmentation=Augmentation(**PLAIN, **changes),
        )

    contestants = {OURS: ours(rand_augment={"num_ops": 2, "magnitude": 9.0})}
    contestants[BARE] = ours()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import keras_cv
    except ImportError:
        return contestants
    layer = keras_cv.layers.RandAugment(
        value_range=(0, 255), augmentations_per_image=2, magnitude=0.9, rate=0.5
    )
    contestants[PEER] = (
        ours()
        .map(
            lambda x, labels: (
                layer(tf.clip_by_value(x, 0, 255), training=True),
                labels,
            ),
            tf.data.AUTOTUNE,
        )
        .prefetch(2)
    )
    return contestants


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=8, help="in each round")
    parser.add_argument("--batch-size", type=int, default=32)
    settings = parser.parse_args()
    contestants = pipelines(settings.batch_size)
    speeds = {name: [] for name in contestants}
    for _ in tqdm(range(settings.rounds), "rounds"):
        for name, batches in contestants.items():
            iterator = iter(batches)
            for _ in range(UNTIMED):
                next(iterator)
            start = time.process_time()
            for _ in range(settings.batches):
                next(iterator)[0].numpy()
            seconds = time.process_time() - start
            speeds[name].append(settings.batch_size * settings.batches / seconds)
            del iterator  # so that it reads nothing while the others are timed
    bare = statistics.median(speeds[BARE])
    print(f"\n{'':34}{'images/s':>10}{'ratio':>8}{'ms/image':>10}")
    for name, found in speeds.items():
        ratio = ""
        alone = 1000 / statistics.median(found) - 1000 / bare
        if PEER in speeds:
            pairs = zip(found, speeds[PEER], strict=True)
            ratio = f"{statistics.median(a / b for a, b in pairs):.1f}"
        print(f"{name:34}{statistics.median(found):>10.0f}{ratio:>8}{alone:>10.1f}")


if __name__ == "__main__":
    main()
