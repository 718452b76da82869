"""Datasets by name: embedded digits, tensorflow-datasets, folders of images.

    digits          scikit-learn's 1,797 images of 8 x 8 pixels; no download
    digit_scenes    several of them on a canvas of 64 x 64 pixels, with a class for each
                    pixel; digit_scenes:96 is the same on 96 x 96
    placed_digits   each of them once, somewhere on a noisy canvas of 24 x 24 pixels,
                    with an exact label map; placed_digits:32 is the same on 32 x 32
    tfds:NAME       any image classification dataset of tensorflow-datasets, or one that
                    is prepared in `data_dir`
    folder:PATH     PATH/train/CLASS/*.jpg with PATH/validation/CLASS/*.jpg, or
                    PATH/CLASS/*.jpg, of which every tenth image is held out
    arrays:FILE     the arrays x_train, y_train, x_test, y_test of an npz file; see
                    `training.from_arrays`

Every source is a stream of (handle, label), where a handle leads to the encoded file
and a label is a class or an encoded mask; decoding and resizing are those of
`training.preprocess`, the batches those of `training.batches`.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from training.preprocess import decode, decode_mask

NAMES = (
    "digits",
    "digit_scenes:SIZE",
    "placed_digits:SIZE",
    "tfds:NAME",
    "folder:PATH",
    "arrays:FILE.npz",
)
SHUFFLE_BUFFER = 16_384  # encoded images, about 2 GB of ImageNet
TFDS_SPLITS = ("validation", "test")  # the first that exists is held out

if keras.backend.backend() != "tensorflow":
    tf.config.set_visible_devices([], "GPU")  # leave the memory to the other backend


@dataclasses.dataclass(frozen=True)
class Dataset:
    """Encoded images with labels, in a training and a validation part.

    Args:
        name: The name it was loaded by.
        labels: Name of each class.
        sizes: Number of images of `"train"` and `"validation"`.
        stream: From a part to a `tf.data.Dataset` of (handle, label), fixed order.
        read: From a handle (scalar string) to the encoded file, in TensorFlow.
        shuffle_buffer: How many handles are shuffled at once, window after window.
        fingerprint: SHA-256 of what the images are.
        masks: Whether a label is not a class but a mask: an encoded PNG file of one
            channel and the size of the image, the class of each pixel; 255 where a
            pixel does not count.
        image_size: `(H, W)` of all images, the size for a model that takes any; None
            leaves it to the model.
        label_maps: The score maps of the training images, in the order of
            `stream("train")`: a `tf.data.Dataset` of (values float16 `(h, w, k)`,
            classes int32 `(h, w, k)`). A map covers the whole image, row 0 at its top;
            a value is the probability of its class at that place, and what is missing
            to 1 belongs to all classes alike. None for none.
        whole: Whether every image is known to decode. To look for those which do not
            takes as long as to read them, where they are small.
    """

    name: str
    labels: tuple[str, ...]
    sizes: dict[str, int]
    stream: Callable[[str], tf.data.Dataset]
    read: Callable[[tf.Tensor], tf.Tensor]
    shuffle_buffer: int
    fingerprint: str
    masks: bool = False
    image_size: tuple[int, int] | None = None
    label_maps: Callable[[], tf.data.Dataset] | None = None
    whole: bool = False

    @contextlib.contextmanager
    def naming_damaged_files(self) -> Iterator[None]:
        """Turn TensorFlow's error for an image that does not decode into its name.

        Raises:
            ValueError: With the files that cannot be read or decoded, or the damaged
                shards of the label maps.
        """
        try:
            yield
        except tf.errors.OpError as error:
            if sentence := label_map_damage(error):
                raise ValueError(sentence) from error
            damaged = [x for part in self.sizes for x in self._damaged(part)]
            if not damaged:
                raise
            mask = " with a PNG mask of one channel and its size" if self.masks else ""
            raise ValueError(
                f"{shortened(damaged)} must be a whole JPEG, PNG, GIF or BMP "
                f"file{mask}; it could not be decoded. Repair or remove it."
            ) from error

    def _damaged(self, part):
        total = self.sizes[part]
        stream = self.stream(part).as_numpy_iterator()
        for i, (handle, label) in enumerate(tqdm(stream, "check files", total)):
            try:
                self.decode(tf.constant(handle), tf.constant(label))
            except tf.errors.OpError:
                yield self.name_of(handle, part, i)

    def decode(
        self, handle: tf.Tensor, label: tf.Tensor
    ) -> tuple[tf.Tensor, tf.Tensor]:
        """Image, uint8 `(h, w, 3)`, and class or mask, uint8 `(h, w, 1)`."""
        image = decode(self.read(handle))
        if not self.masks:
            return image, label
        mask = decode_mask(label)
        tf.debugging.assert_equal(tf.shape(mask)[:2], tf.shape(image)[:2])
        return image, mask

    def name_of(self, handle: bytes, part: str, index: int) -> str:
        """The file of a handle, or the place of an image that has no file."""
        is_file = self.name.startswith("folder:")
        return handle.decode() if is_file else f"image {index} of {part}"

    def names_of(self, part: str, numbers: list[int]) -> list[str]:
        """The names of images by their number in the stream of a part."""
        if not numbers:
            return []
        stream = self.stream(part).enumerate()
        chosen = tf.constant(numbers, tf.int64)
        stream = stream.filter(lambda i, example: tf.reduce_any(i == chosen))
        found = {
            int(i): self.name_of(handle, part, int(i))
            for i, (handle, _) in stream.take(len(numbers)).as_numpy_iterator()
        }
        return [found[i] for i in numbers]


def load_data(name: str, data_dir: str | None = None) -> Dataset:
    """Load a dataset by name: one of `NAMES`.

    Args:
        name: Its name.
        data_dir: Where tensorflow-datasets keeps those of `tfds:NAME`, or will prepare
            them: a folder, also of `gs://`, `s3://` and what else it knows. None for
            its own.

    Raises:
        ValueError: If the name is none of these, a canvas would be too small or large,
            the dataset has no images with labels, the folder no classes, or a
            `data_dir` is given for another source.
        FileNotFoundError: If the folder or file does not exist.
    """
    kind, _, rest = str(name).partition(":")
    if data_dir is not None and not (kind == "tfds" and rest):
        raise ValueError(
            f"data_dir is where tensorflow-datasets keeps tfds:NAME, got {data_dir!r} "
            f"with {name!r}; leave it out."
        )
    if name == "digits":
        from training.digits import HandwrittenDigits

        return _from_builder(name, HandwrittenDigits())
    if kind == "tfds" and rest:
        from training.catalogue import builder

        return _from_builder(name, builder(rest, data_dir))
    if kind == "folder" and rest:
        from training.folder import load_folder

        return load_folder(name, Path(rest).expanduser())
    if kind == "arrays" and rest:
        from training.arrays import load_arrays

        return load_arrays(name, Path(rest).expanduser())
    if name == "digit_scenes" or (kind == "digit_scenes" and rest.isdecimal()):
        from training.scenes import load_scenes

        return load_scenes(name, int(rest or 64))
    if name == "placed_digits" or (kind == "placed_digits" and rest.isdecimal()):
        from training.canvas import load_canvas

        return load_canvas(name, int(rest or 24))
    known = ", ".join(repr(x) for x in NAMES[:-1])
    raise ValueError(f"data must be {known} or {NAMES[-1]!r}, got {name!r}.")


def subset(data: Dataset, count: int, seed: int) -> Dataset:
    """Leave `count` training images, drawn at random; the order stays.

    Args:
        data: What to draw from.
        count: How many images; the same seed draws the same.
        seed: int >= 0.

    Raises:
        ValueError: If there are not so many.
    """
    total = data.sizes["train"]
    if not 0 < count <= total:
        raise ValueError(
            f"train_images must be in 1..{total}, the training images of "
            f"{data.name!r}, got {count}."
        )
    chosen = np.zeros(total, bool)
    chosen[np.random.default_rng(seed).permutation(total)[:count]] = True

    def only(examples):
        pairs = tf.data.Dataset.zip(
            tf.data.Dataset.from_tensor_slices(chosen), examples
        )
        return pairs.filter(lambda keep, *_: keep).map(lambda _, *example: example[0])

    return dataclasses.replace(
        data,
        sizes={**data.sizes, "train": count},
        stream=lambda part: (
            only(data.stream(part)) if part == "train" else data.stream(part)
        ),
        shuffle_buffer=min(count, data.shuffle_buffer),
        label_maps=data.label_maps and (lambda: only(data.label_maps())),
    )


def shortened(names: list[str]) -> str:
    """The first five of many names, and how many there are more."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"{', '.join(names[:5])}{more}"


def label_map_damage(error: tf.errors.OpError) -> str | None:
    """The sentence of an error that names damaged shards of label maps."""
    found = re.search(r"ValueError: (.*label maps that were written.*)", str(error))
    return found and found.group(1)


def fingerprint(value) -> str:
    """SHA-256 of a value that JSON can write."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _from_builder(name, builder):
    import tensorflow_datasets as tfds

    features = builder.info.features or {}
    if not {"image", "label"} <= set(features):
        raise ValueError(
            f"{name!r} must have the features 'image' and 'label', got "
            f"{', '.join(features) or 'none'}."
        )
    builder.download_and_prepare()
    splits = builder.info.splits
    held_out = next((split for split in TFDS_SPLITS if split in splits), None)
    if "train" not in splits or held_out is None:
        raise ValueError(
            f"{name!r} must have a split 'train' and one of {', '.join(TFDS_SPLITS)}, "
            f"got {', '.join(splits)}."
        )
    parts = {"train": "train", "validation": held_out}

    def stream(part):
        examples = builder.as_dataset(
            split=parts[part],
            decoders={"image": tfds.decode.SkipDecoding()},
            shuffle_files=False,
        )
        return examples.map(lambda example: (example["image"], example["label"]))

    sizes = {part: splits[split].num_examples for part, split in parts.items()}
    content = {
        split: [splits[split].num_bytes, splits[split].shard_lengths]
        for split in parts.values()
    }
    return Dataset(
        name=name,
        labels=tuple(features["label"].names),
        sizes=sizes,
        stream=stream,
        read=lambda handle: handle,
        shuffle_buffer=min(sizes["train"], SHUFFLE_BUFFER),
        fingerprint=fingerprint([builder.info.full_name, content]),
    )
