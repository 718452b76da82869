"""Where the images of a batch prediction come from: files, or a split of a dataset.

A source is cut into parts that a worker on another machine can read by itself.
"""

import dataclasses
import glob
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from export.predict import SUFFIXES, image_files


@dataclasses.dataclass(frozen=True)
class Files:
    """Image files, by their paths."""

    paths: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.paths)

    def part(self, start: int, stop: int) -> "Files":
        """Images `start` to `stop - 1`."""
        return Files(self.paths[start:stop])

    def fingerprint(self) -> str:
        """Another one as soon as a file is another, or has changed."""
        known = hashlib.sha256()
        for path in self.paths:
            status = os.stat(path) if os.path.exists(path) else os.lstat(path)
            told = f"\0{status.st_size}\0{status.st_mtime_ns}\n"
            known.update(os.fsencode(path) + told.encode())
        return known.hexdigest()

    def read(self) -> Iterator[tuple[str, bytes | OSError]]:
        """The path, and what the file holds or why it can't be read.

        What in a path is not UTF-8 is told as the replacement character.
        """
        for path in self.paths:
            name = os.fsencode(path).decode(errors="replace")
            try:
                yield name, Path(path).read_bytes()
            except OSError as error:
                yield name, error


@dataclasses.dataclass(frozen=True)
class Split:
    """A split of a tensorflow-datasets dataset: its encoded images as they are stored.

    Nothing is encoded twice: the server's own decoding sees the stored files.
    """

    name: str
    split: str
    data_dir: str | None
    start: int
    stop: int

    def __len__(self) -> int:
        return self.stop - self.start

    def part(self, start: int, stop: int) -> "Split":
        """Images `start` to `stop - 1`."""
        start, stop = self.start + start, min(self.start + stop, self.stop)
        return dataclasses.replace(self, start=start, stop=stop)

    def fingerprint(self) -> str:
        """Another one if the dataset has another version, configuration or size."""
        return f"{_builder(self.name, self.data_dir).info.full_name} {len(self)}"

    def read(self) -> Iterator[tuple[str, bytes]]:
        """The name of the image, `NAME/SPLIT/NUMBER`, and its encoded bytes."""
        import tensorflow_datasets as tfds

        builder = _builder(self.name, self.data_dir)
        key = _image_key(builder)
        images = builder.as_dataset(
            split=f"{self.split}[{self.start}:{self.stop}]",
            decoders=tfds.decode.PartialDecoding(
                {key: builder.info.features[key]},
                decoders={key: tfds.decode.SkipDecoding()},
            ),
            # One file after the other, so that the numbers are those of the split.
            read_config=tfds.ReadConfig(interleave_cycle_length=1, try_autocache=False),
        )
        for number, image in enumerate(images.as_numpy_iterator(), self.start):
            yield f"{self.name}/{self.split}/{number}", image[key]


def open_source(source: str, data_dir: str | Path | None = None) -> Files | Split:
    """The images that `source` names.

    Args:
        source: A folder, with all its folders; a glob pattern (`**` for any folders);
            an image file; or `tfds:NAME/SPLIT`, where NAME may have a configuration
            (`tfds:imagenette/320px-v2/validation`).
        data_dir: Where tensorflow-datasets keeps its data; None for its own place.

    Raises:
        FileNotFoundError: If there is no image.
        ValueError: If the dataset has no such split, or not one uint8 image feature.
        RuntimeError: If tensorflow-datasets is not installed.
    """
    if source.startswith("tfds:"):
        return _open_split(source, data_dir)
    if glob.has_magic(source) and not Path(source).exists():
        found = sorted(glob.glob(source, recursive=True))
        paths = [x for x in found if Path(x).suffix.lower() in SUFFIXES]
        if not paths:
            raise FileNotFoundError(
                f"{source} matches no image ({', '.join(SUFFIXES)})."
            )
        return Files(tuple(paths))
    return Files(tuple(map(str, image_files(Path(source)))))


def _open_split(source, data_dir):
    name, _, split = source.removeprefix("tfds:").rpartition("/")
    if not name:
        raise ValueError(f"A split is tfds:NAME/SPLIT, got {source!r}.")
    data_dir = None if data_dir is None else str(data_dir)
    builder = _builder(name, data_dir)
    builder.download_and_prepare()  # nothing, where that was done
    if split not in builder.info.splits:
        raise ValueError(
            f"{name} has the splits {', '.join(sorted(builder.info.splits))}, got "
            f"{split!r}."
        )
    _image_key(builder)
    return Split(name, split, data_dir, 0, builder.info.splits[split].num_examples)


def _builder(name, data_dir):
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise RuntimeError(
            f'{error}. A tfds: source needs pip install "keras-vit[train]"'
        ) from error
    return tfds.builder(name, data_dir=data_dir)


def _image_key(builder):
    """The name of the one feature that is an image."""
    import tensorflow_datasets as tfds

    features = builder.info.features
    images = [k for k, x in features.items() if isinstance(x, tfds.features.Image)]
    if len(images) != 1 or np.dtype(features[images[0]].np_dtype) != "uint8":
        raise ValueError(
            f"{builder.name} must have one feature that is an image of uint8, got "
            f"{features}."
        )
    return images[0]
