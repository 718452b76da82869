"""Datasets from folders of images."""

from pathlib import Path

import numpy as np
import tensorflow as tf

from training.data import Dataset, fingerprint

SUFFIXES = (".jpg", ".jpeg", ".png", ".gif", ".bmp")


def load_folder(name: str, folder: Path) -> Dataset:
    """Images of `folder/train/CLASS` and `folder/validation/CLASS`, or `folder/CLASS`.

    Raises:
        ValueError: If there are not two classes, or no image to hold out.
        FileNotFoundError: If the folder does not exist.
    """
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
        fingerprint=fingerprint(content),
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
