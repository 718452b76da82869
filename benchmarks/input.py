"""Images/s per core of the input pipeline at 224 pixels, beside timm's and keras-cv's.

    pip install keras-cv timm torch torchvision
    python benchmarks/input.py --rounds 5

JPEG files of 640 x 427 pixels, scikit-learn's two photographs, go through
RandomResizedCrop (bicubic), flip and random erasing, with RandAugment and without it:
in `training.training_batches`, with the arithmetic left to the accelerator, with
keras-cv's RandAugment behind it, and in timm's own transforms on Pillow's images,
`rand-m9-mstd0.5-inc1`, behind PyTorch's loader. They take turns in one process, one
alone computing at any time. Time is that of the processor, all threads together, so
what runs beside it counts for little: the speeds are those of one core. A ratio is the
median over the rounds of the speed relative to timm's with RandAugment in the same
round; without timm there is none.
"""

import argparse
import io
import statistics
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import tensorflow as tf
from contestants import import_timm
from machine import show
from sklearn.datasets import load_sample_images
from tqdm.auto import tqdm

from keras_vit.embedding import Preprocess
from training import Augmentation, Dataset, training_batches

PREPROCESS = Preprocess((224, 224), None, "bicubic")
PLAIN = {"random_resized_crop": {}, "random_flip": True, "random_erasing": 0.25}
RAND = {"rand_augment": {"num_ops": 2, "magnitude": 9.0}}
OURS = "keras_vit"
BARE = "keras_vit without RandAugment"
DEVICE = "keras_vit, arithmetic left to the accelerator"
PEER = "keras_vit with keras-cv's RandAugment"
TIMM = "timm"
TIMM_BARE = "timm without RandAugment"
UNTIMED = 8  # batches before the time is taken: tracing, autotuning, full buffers
IMAGES = 4096


def photographs() -> Dataset:
    """Two photographs as a dataset of 4,096 images."""
    files = jpeg_files()
    labels = np.arange(IMAGES) % 2

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


def jpeg_files() -> list[bytes]:
    photos = load_sample_images().images
    return [tf.io.encode_jpeg(photo, quality=90).numpy() for photo in photos]


def pipelines(batch_size: int) -> dict[str, Callable[[], Iterator]]:
    """What begins endless batches, for every contestant whose library is installed."""

    def ours(**changes):
        batches = training_batches(
            photographs(),
            PREPROCESS,
            batch_size,
            epochs=10**6,
            augmentation=Augmentation(**PLAIN, **changes),
        )
        return lambda: iter(batches)

    contestants = {
        OURS: ours(**RAND),
        BARE: ours(),
        DEVICE: ours(**RAND, on_accelerator=True),
    }
    try:
        contestants[PEER] = _keras_cv(ours)
    except ImportError:
        pass
    try:
        rand = "rand-m9-mstd0.5-inc1"
        contestants[TIMM] = _timm(rand, batch_size)
        contestants[TIMM_BARE] = _timm(None, batch_size)
    except ImportError:
        pass
    return contestants


def _keras_cv(ours):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import keras_cv
    layer = keras_cv.layers.RandAugment(
        value_range=(0, 255), augmentations_per_image=2, magnitude=0.9, rate=0.5
    )
    begin = ours()

    def augment(images):
        return layer(tf.clip_by_value(images, 0, 255), training=True)

    augment = tf.function(augment)

    def batches():
        for images, labels in begin():
            yield augment(images), labels

    return batches


def _timm(rand_augment, batch_size):
    import torch
    from PIL import Image

    timm = import_timm()
    torch.set_num_threads(1)
    transform = timm.data.create_transform(
        224,
        is_training=True,
        auto_augment=rand_augment,
        color_jitter=None,
        interpolation="bicubic",
        re_prob=0.25,
        re_mode="pixel",
    )
    files = jpeg_files()

    class Photographs(torch.utils.data.Dataset):
        def __len__(self):
            return IMAGES

        def __getitem__(self, i):
            image = Image.open(io.BytesIO(files[i % 2])).convert("RGB")
            return transform(image), i % 2

    def batches():
        while True:
            yield from torch.utils.data.DataLoader(
                Photographs(), batch_size, shuffle=True, drop_last=True
            )

    return batches


def rows(options: argparse.Namespace) -> list[dict[str, str]]:
    """Speeds in images/s per core, a row for each contestant."""
    contestants = pipelines(options.batch_size)
    speeds = {name: [] for name in contestants}
    for _ in tqdm(range(options.rounds), "rounds"):
        for name, begin in contestants.items():
            iterator = begin()
            for _ in range(UNTIMED):
                next(iterator)
            start = time.process_time()
            for _ in range(options.batches):
                next(iterator)
            seconds = time.process_time() - start
            speeds[name].append(options.batch_size * options.batches / seconds)
            del iterator  # so that it reads nothing while the others are timed
    return [
        {
            "pipeline": name,
            "images/s": f"{statistics.median(found):.0f}",
            "/ timm": _ratio(found, speeds.get(TIMM)),
        }
        for name, found in speeds.items()
    ]


def _ratio(speeds, others):
    if others is None:
        return "-"
    ratios = [a / b for a, b in zip(speeds, others, strict=True)]
    return f"{statistics.median(ratios):.2f}"


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    add = parser.add_argument
    add("--rounds", type=int, default=5)
    add("--batches", type=int, default=8, help="in each round")
    add("--batch-size", type=int, default=32)
    add("--output", type=Path, metavar="FILE", help="a .csv or .json file")
    return parser


def main() -> None:
    options = parser().parse_args()
    show(rows(options), options.output)


if __name__ == "__main__":
    main()
