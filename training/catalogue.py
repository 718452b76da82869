"""Builders of tensorflow-datasets, registered or just prepared."""

import tensorflow as tf
import tensorflow_datasets as tfds
from etils import epath

from keras_vit.encoder import unknown


def builder(name: str, data_dir: str | None = None) -> tfds.core.DatasetBuilder:
    """The builder of a dataset; of one that no code makes, by what is prepared.

    Args:
        name: As `tfds.builder` takes it: NAME, NAME/CONFIG, with :VERSION or without.
        data_dir: Folder of the datasets, each in NAME/CONFIG/VERSION, or the folder of
            this one; None for that of tensorflow-datasets.

    Raises:
        ValueError: If there is no such dataset, or the folder is of a file system that
            tensorflow-datasets does not know.
    """
    try:
        epath.Path(data_dir or "")
    except KeyError as error:
        raise ValueError(
            "data_dir must be a folder, or one of a file system that tensorflow-"
            f"datasets knows, such as gs:// or s3://, got {data_dir!r}."
        ) from error
    try:
        return tfds.builder(name, data_dir=data_dir)
    except tfds.core.DatasetNotFoundError as error:
        if data_dir is not None:
            here = [tf.io.gfile.join(data_dir, name), data_dir]
            for folder in here:
                if tf.io.gfile.exists(tf.io.gfile.join(folder, "dataset_info.json")):
                    return tfds.builder_from_directory(folder)
        known = tfds.list_builders(with_community_datasets=False)
        nearest = unknown("", name, known).partition("Did you mean ")[2]
        hint = f" Did you mean {nearest}" if nearest else ""
        place = f", and {data_dir!r} holds none of this name" if data_dir else ""
        raise ValueError(
            f"tensorflow-datasets has no dataset {name!r}{place}.{hint}"
        ) from error
