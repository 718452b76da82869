"""The machine annotator of token labeling: score maps of all training images.

Source: Yun et al. 2021, "Re-labeling ImageNet", https://arxiv.org/abs/2101.05022;
Jiang et al. 2021, "All Tokens Matter", https://arxiv.org/abs/2104.10858.

Shapes in this file:
    B images a step, H x W pixels, h x w places of a map, k classes of a place,
    N images of a shard.
"""

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from keras_vit.embedding import Preprocess
from keras_vit.model_file import sha256
from training.data import Dataset, load_data
from training.dense import load_annotator
from training.labels import LabelStore, begin, finish
from training.preprocess import resize


def annotate(
    teacher: str | Path,
    data: Dataset,
    folder: str | Path,
    *,
    top: int | None = None,
    batch_size: int = 32,
    shard_size: int = 512,
    normalization: str | None = None,
    image_size: tuple[int, int] | None = None,
    runner: str | None = None,
) -> LabelStore:
    """Write what a teacher says of every place of every training image.

    At each place of the teacher's last map the probabilities of the best k classes are
    kept (`dense_classifier`). Killed at any moment, the same call goes on with the
    shards that are missing, and ends in the same bytes; a finished store is checked,
    and what was deleted of it is made again.

    Differs from the source's code in that probabilities are stored, not logits, so
    that what is missing to 1 is known, where the code fills in logits of 0, which take
    probability from the classes that are stored; and in that a map covers the whole
    image, which is squashed to the teacher's size, where the code crops the centre.

    Args:
        teacher: The `.keras` file of a classifier with one output for each label of
            `data`, in their order.
        data: What `load_data` returns.
        folder: Where the maps are kept, a new folder or one that was begun.
        top: k; None for all classes where there are at most 16, else 5 as in the paper.
        batch_size: B. The last batch of a shard is filled up, so that every image is
            rounded alike.
        shard_size: N, images a file.
        normalization: `"inception"`, `"imagenet"` or `"clip"` for a teacher that takes
            such pixels; None for one that takes raw pixels of 0..255, as every model of
            this package does.
        image_size: `(H, W)` for a teacher that takes any size.
        runner: Name of an Apache Beam runner, such as `"DirectRunner"`, to whose
            workers `teacher`, `folder` and the name of the data must mean the same;
            None for this process.

    Returns:
        The finished store.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If the teacher is no classifier that can be asked of places
            (`dense_classifier`) or does not fit the data, an option does not fit the
            teacher, the folder holds other maps or something else, the labels are
            masks, an image or a shard is damaged, or workers cannot load the data by
            their name.
        RuntimeError: If Apache Beam is not installed, or its pipeline fails.
    """
    network = load_annotator(teacher, top, normalization, image_size)
    plan = _plan(network, Path(teacher), data, Path(folder), batch_size, shard_size)
    pipeline = None
    if runner is not None:
        pipeline = _pipeline(runner)
        _load_by_name(data.name, plan)
    store = begin(plan)
    missing = store.missing()
    if store.checksums and not missing:
        store.check()
        return store
    with tqdm(
        total=store.images,
        initial=_count_done(store),
        desc="annotate",
        unit=" images",
        unit_scale=True,
        dynamic_ncols=True,
    ) as bar:
        if pipeline is None:
            images = Images(data, Preprocess.of_model(network))
            for shard in missing:
                annotate_shard(network, images, store, shard, bar.update)
        else:
            with _watching(store, bar):
                _run(pipeline, teacher, data.name, store, missing)
    return finish(store, missing)


def annotate_shard(
    network: keras.Model,
    images: "Images",
    store: LabelStore,
    shard: int,
    progress: Callable[[int], object] | None = None,
) -> None:
    """Compute and write the maps of one shard.

    Args:
        network: What `load_annotator` returns.
        images: `Images` of the data, in the size for it.
        store: `LabelStore`, as planned.
        shard: Number of the shard.
        progress: Function of a number of images that are done.
    """
    rows = store.rows(shard)
    maps = []
    for start in range(rows.start, rows.stop, store.batch_size):
        count = min(store.batch_size, rows.stop - start)
        batch = np.zeros((store.batch_size, *store.image_size, 3), "float32")
        batch[:count] = images.read(start, count)
        values, classes = network.predict_on_batch(batch)
        maps.append((values[:count].astype("float16"), classes[:count].astype("int32")))
        if progress is not None:
            progress(count)
    store.write(shard, *(np.concatenate(x) for x in zip(*maps, strict=True)))


class Images:
    """Training images of one size, read onwards from anywhere.

    Args:
        data: What to read.
        preprocess: How; without a crop.
    """

    def __init__(self, data: Dataset, preprocess: Preprocess):
        self.data = data
        self.preprocess = preprocess
        self.next = None
        self.stream = None

    def read(self, start: int, count: int) -> list[np.ndarray]:
        """Images `start` to `start + count - 1`, float32 `(H, W, 3)` of 0..255.

        Raises:
            ValueError: With the files that are damaged.
        """
        with self.data.naming_damaged_files():
            if self.next != start:
                handles = self.data.stream("train").skip(start)
                images = handles.map(self._load, tf.data.AUTOTUNE, deterministic=True)
                self.stream = images.prefetch(tf.data.AUTOTUNE).as_numpy_iterator()
            self.next = None  # unless all goes well
            images = [next(self.stream) for _ in range(count)]
            self.next = start + count
            return images

    def _load(self, handle, label):
        image, _ = self.data.decode(handle, label)
        return resize(image, self.preprocess)


def _plan(network, teacher, data, folder, batch_size, shard_size):
    """The store that is asked for, as yet without shards."""
    for name, value in (("batch_size", batch_size), ("shard_size", shard_size)):
        if not (isinstance(value, int) and value > 0):
            raise ValueError(f"{name} must be a positive int, got {value!r}.")
    if data.masks:
        raise ValueError(
            "Label maps are for images with a class each, that of a mask is known at "
            f"every place; got {data.name!r}."
        )
    classes = network.get_layer("best_classes").input.shape[-1]
    if classes != len(data.labels):
        raise ValueError(
            f"The teacher must have one output for each of the {len(data.labels)} "
            f"labels of {data.name!r}, got {classes}."
        )
    kind, _, rest = data.name.partition(":")
    pixels = network.get_layer("pixels")
    height, width, top = network.outputs[0].shape[1:]
    return LabelStore(
        folder=folder,
        data=f"{kind}:{Path(rest).name}" if kind == "folder" else data.name,
        data_fingerprint=data.fingerprint,
        images=data.sizes["train"],
        labels=tuple(data.labels),
        teacher=teacher.name,
        teacher_sha256=sha256(teacher),
        backend=keras.backend.backend(),
        image_size=pixels.image_size,
        normalization=pixels.normalization,
        batch_size=batch_size,
        top=top,
        map_size=(height, width),
        shard_size=shard_size,
    )


def _count_done(store):
    missing = store.missing()
    return store.images - sum(len(store.rows(shard)) for shard in missing)


def _pipeline(runner):
    """An Apache Beam pipeline for a runner's name."""
    try:
        import apache_beam as beam
        from apache_beam.options.pipeline_options import PipelineOptions
        from apache_beam.runners.portability.fn_api_runner import FnApiRunner
    except ImportError as error:
        raise RuntimeError(
            f'A runner needs Apache Beam ({error}): pip install "keras-vit[beam]"'
        ) from error
    # By its name this runner would first try another one, a program to be downloaded.
    runner = FnApiRunner() if runner == "DirectRunner" else runner
    options = ["--direct_running_mode=in_memory", "--direct_num_workers=1"]
    return beam.Pipeline(runner=runner, options=PipelineOptions(options))


def _load_by_name(name, store):
    """The data that workers find under a name.

    Raises:
        ValueError: If they are not those of the store.
    """
    data = load_data(name)
    if (data.fingerprint, data.sizes["train"]) != (
        store.data_fingerprint,
        store.images,
    ):
        raise ValueError(
            f"The workers of a runner must load the data by their name, and {name!r} "
            f"gives others: {data.sizes['train']} images, not {store.images}, or other "
            "files."
        )
    return data


def _run(pipeline, teacher, name, store, missing):
    """Compute shards in the workers of a pipeline."""
    import apache_beam as beam

    class Annotate(beam.DoFn):
        def setup(self):
            self.network = load_annotator(
                teacher, store.top, store.normalization, store.image_size
            )
            preprocess = Preprocess.of_model(self.network)
            self.images = Images(_load_by_name(name, store), preprocess)

        def process(self, shard):
            annotate_shard(self.network, self.images, store, shard)

    (
        pipeline
        | "shards" >> beam.Create(missing)
        | "to all workers" >> beam.Reshuffle()
        | "annotate" >> beam.ParDo(Annotate())
    )
    pipeline.run().wait_until_finish()


@contextlib.contextmanager
def _watching(store, bar):
    """Move the bar as the shards appear that others write."""
    stop = threading.Event()

    def watch():
        while not stop.wait(1.0):
            bar.update(_count_done(store) - bar.n)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
        bar.update(_count_done(store) - bar.n)
