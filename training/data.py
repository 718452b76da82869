"""Datasets by name: embedded digits, tensorflow-datasets, folders of images.

    digits          scikit-learn's 1,797 images of 8 x 8 pixels; no download
    tfds:NAME       any image classification dataset of tensorflow-datasets
    folder:PATH     PATH/train/CLASS/*.jpg with PATH/validation/CLASS/*.jpg, or
                    PATH/CLASS/*.jpg, of which every tenth image is held out

Every source is a stream of (handle, label), where a handle leads to the encoded file;
decoding and resizing are those of `training.preprocess`.
"""

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from keras_vit.embedding import Preprocess
from training.preprocess import decode, resize
from training.recipe import unknown

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp")
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
    """

    name: str
    labels: tuple[str, ...]
    sizes: dict[str, int]
    stream: Callable[[str], tf.data.Dataset]
    read: Callable[[tf.Tensor], tf.Tensor]
    shuffle_buffer: int
    fingerprint: str

    @contextlib.contextmanager
    def naming_damaged_files(self) -> Iterator[None]:
        """Turn TensorFlow's error for an image that does not decode into its name.

        Raises:
            ValueError: With the files that cannot be read or decoded.
        """
        try:
            yield
        except tf.errors.OpError as error:
            damaged = [x for part in self.sizes for x in self._damaged(part)]
            if not damaged:
                raise
            more = f" and {len(damaged) - 5} more" if len(damaged) > 5 else ""
            raise ValueError(
                f"{', '.join(damaged[:5])}{more} must be a whole JPEG, PNG, GIF or BMP "
                "file; it could not be decoded. Repair or remove it."
            ) from error

    def _damaged(self, part):
        total = self.sizes[part]
        stream = self.stream(part).as_numpy_iterator()
        for i, (handle, _) in enumerate(tqdm(stream, "check files", total)):
            try:
                decode(self.read(tf.constant(handle)))
            except tf.errors.OpError:
                yield self.name_of(handle, part, i)

    def name_of(self, handle: bytes, part: str, index: int) -> str:
        """The file of a handle, or the place of an image that has no file."""
        is_file = self.name.startswith("folder:")
        return handle.decode() if is_file else f"image {index} of {part}"


def load_data(name: str) -> Dataset:
    """Load a dataset by name: `digits`, `tfds:NAME` or `folder:PATH`.

    Raises:
        ValueError: If the name is none of these, the dataset has no images with
            labels, or the folder no classes.
        FileNotFoundError: If the folder does not exist.
    """
    kind, _, rest = name.partition(":")
    if name == "digits":
        from training.digits import HandwrittenDigits

        return _from_builder(name, HandwrittenDigits())
    if kind == "tfds" and rest:
        import tensorflow_datasets as tfds

        try:
            return _from_builder(name, tfds.builder(rest))
        except tfds.core.DatasetNotFoundError as error:
            known = tfds.list_builders(with_community_datasets=False)
            nearest = unknown("", rest, known).partition("Did you mean ")[2]
            hint = f" Did you mean {nearest}" if nearest else ""
            raise ValueError(
                f"tensorflow-datasets has no dataset {rest!r}.{hint}"
            ) from error
    if kind == "folder" and rest:
        return _from_folder(name, Path(rest).expanduser())
    raise ValueError(
        f"data must be 'digits', 'tfds:NAME' or 'folder:PATH', got {name!r}."
    )


def training_batches(
    data: Dataset,
    preprocess: Preprocess,
    batch_size: int,
    *,
    epochs: int,
    first_epoch: int = 0,
    seed: int = 0,
    augment: Callable[[tf.Tensor, tf.Tensor], tf.Tensor] | None = None,
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
        augment: Function of a batch of images and a seed, int64 `(2,)`.

    Returns:
        Dataset of (float32 `(batch_size, H, W, 3)` of 0..255, int64 `(batch_size,)`),
        `steps_per_epoch(data, batch_size)` batches an epoch.
    """
    handles = data.stream("train")
    steps = steps_per_epoch(data, batch_size)

    def shuffled(epoch):
        def permuted(block, window):
            size = tf.shape(window[1])[0]
            key = tf.stack([seed + block * 2**32, epoch])
            order = tf.random.experimental.stateless_shuffle(tf.range(size), key)
            return tuple(tf.gather(x, order) for x in window)

        windows = handles.batch(data.shuffle_buffer).enumerate()
        return windows.map(permuted).unbatch().take(steps * batch_size)

    stream = tf.data.Dataset.range(first_epoch, epochs).flat_map(shuffled)
    batches = _load(stream, data, preprocess).batch(batch_size, drop_remainder=True)
    if augment is not None:

        def augmented(step, batch):
            images, labels = batch
            return augment(images, tf.stack([seed, step])), labels

        batches = batches.enumerate(first_epoch * steps)
        batches = batches.map(augmented, tf.data.AUTOTUNE, deterministic=True)
    return batches.prefetch(2)


def validation_batches(
    data: Dataset, preprocess: Preprocess, batch_size: int
) -> tf.data.Dataset:
    """Batches of (images, labels) of the validation part, in fixed order, all of it."""
    stream = data.stream("validation")
    return _load(stream, data, preprocess).batch(batch_size).prefetch(2)


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


def _load(stream, data, preprocess):
    def load(handle, label):
        return resize(decode(data.read(handle)), preprocess), label

    return stream.map(load, tf.data.AUTOTUNE, deterministic=True)


def _fingerprint(value) -> str:
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
        fingerprint=_fingerprint([builder.info.full_name, content]),
    )


def _images(folder: Path) -> dict[str, list[Path]]:
    """Image files of each class, a sub-folder that contains some."""
    classes = {}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            files = sorted(path.rglob("*"))
            files = [x for x in files if x.suffix.lower() in SUFFIXES]
            if files:
                classes[path.name] = files
    return classes


def _from_folder(name, folder):
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder {folder}.")
    held_out = [folder / x for x in ("validation", "val", "test")]
    held_out = next((x for x in held_out if x.is_dir()), None)
    if held_out is not None and (folder / "train").is_dir():
        train, validation = _images(folder / "train"), _images(held_out)
        extra = sorted(set(validation) - set(train))
        if extra:
            raise ValueError(
                f"Every class of {held_out} must also be in {folder / 'train'}; "
                f"missing there: {', '.join(extra)}."
            )
    else:
        classes = _images(folder)
        validation = {label: files[9::10] for label, files in classes.items()}
        train = {
            label: [x for i, x in enumerate(files) if i % 10 != 9]
            for label, files in classes.items()
        }
    labels = tuple(sorted(train))
    if len(labels) < 2:
        raise ValueError(
            f"{folder} must contain a sub-folder of images ({', '.join(SUFFIXES)}) for "
            f"each of at least 2 classes, got {len(labels)}."
        )
    if not any(validation.values()):
        raise ValueError(
            f"{folder} must contain at least 10 images of some class, so that one in "
            "ten can be held out; or make the folders 'train' and 'validation'."
        )
    parts = {"train": train, "validation": validation}
    pairs = {
        part: [
            (str(file), labels.index(label))
            for label, files in classes.items()
            for file in files
        ]
        for part, classes in parts.items()
    }

    def stream(part):
        files, targets = zip(*pairs[part], strict=True)
        files, targets = list(files), np.asarray(targets, "int64")
        return tf.data.Dataset.from_tensor_slices((files, targets))

    content = [
        [str(Path(file).relative_to(folder)), Path(file).stat().st_size]
        for part in pairs.values()
        for file, _ in part
    ]
    return Dataset(
        name=name,
        labels=labels,
        sizes={part: len(files) for part, files in pairs.items()},
        stream=stream,
        read=tf.io.read_file,
        shuffle_buffer=len(pairs["train"]),
        fingerprint=_fingerprint(content),
    )
