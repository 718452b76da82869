"""The store of score maps: what the classes of each place of each training image are.

A folder of label maps holds
    labels.json                 of which data, by which teacher, and the checksums
    train-00000-of-00012.npz    `values` and `classes` of `shard_size` images, in the
                                order of the data
    plan.json                   in place of labels.json as long as shards are missing

`training.annotator` fills it. Nothing in it tells when or where it was made: the same
data, teacher and options give the same bytes.

Shapes in this file:
    N images of a shard, h x w places of a map, k classes of a place.
"""

import dataclasses
import hashlib
import io
import json
import warnings
import zipfile
from pathlib import Path

import numpy as np
import tensorflow as tf
from tqdm.auto import tqdm

from keras_vit.model_file import replacing, sha256
from training.data import Dataset, fingerprint

FORMAT = 1
FINISHED, PLAN = "labels.json", "plan.json"
NAMES_ONLY = ("data", "teacher", "checksums")  # may differ between equal stores
AGAIN = "Run annotate again, as before: it makes what is missing."


@dataclasses.dataclass(frozen=True)
class LabelStore:
    """Score maps of the training images of a dataset.

    Args:
        folder: Where it is.
        data: Name of the data; of a folder of images its last part.
        data_fingerprint: Fingerprint of the data.
        images: Number of images.
        labels: Name of each class.
        teacher: File name of the teacher.
        teacher_sha256: SHA-256 of that file.
        backend: Keras backend on which the teacher answered.
        image_size: `(H, W)` of the images that the teacher saw.
        normalization: What was done to the pixels before, as in `annotate`.
        batch_size: Images a step; another one rounds differently.
        top: k, number of classes that are kept at each place.
        map_size: `(h, w)`.
        shard_size: Images a shard; the last one has what is left.
        checksums: SHA-256 of each shard; empty as long as the store is not finished.
    """

    folder: Path
    data: str
    data_fingerprint: str
    images: int
    labels: tuple[str, ...]
    teacher: str
    teacher_sha256: str
    backend: str
    image_size: tuple[int, int]
    normalization: str | None
    batch_size: int
    top: int
    map_size: tuple[int, int]
    shard_size: int
    checksums: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the store says of itself, checksums included."""
        return fingerprint(self.description())

    @property
    def shards(self) -> list[Path]:
        """The files of the maps, in order."""
        count = -(-self.images // self.shard_size)
        names = [f"train-{i:05d}-of-{count:05d}.npz" for i in range(count)]
        return [self.folder / name for name in names]

    def description(self) -> dict:
        """What its JSON file says."""
        fields = dataclasses.asdict(self)
        del fields["folder"]
        return json.loads(json.dumps({"format": FORMAT, **fields}))

    def summary(self) -> str:
        """What it holds, in words."""
        height, width = self.map_size
        return (
            f"label maps of {self.images} images of {self.data}, {height} x {width} "
            f"places, {self.top} of {len(self.labels)} classes each, by {self.teacher}"
        )

    def rows(self, shard: int) -> range:
        """The images of a shard, counted in the order of the data."""
        start = shard * self.shard_size
        return range(start, min(start + self.shard_size, self.images))

    def missing(self) -> list[int]:
        """Numbers of the shards that are not there."""
        return [i for i, path in enumerate(self.shards) if not path.exists()]

    def write(self, shard: int, values: np.ndarray, classes: np.ndarray) -> None:
        """Write the maps of a shard, by one replacement.

        Args:
            shard: Its number.
            values: float16 `(N, h, w, k)`.
            classes: int32 `(N, h, w, k)`.
        """
        with replacing(self.shards[shard]) as path:
            np.savez(path, values=values, classes=classes)

    def check(self) -> None:
        """Compute every checksum again.

        Raises:
            ValueError: With the shards that are missing or not what was written.
        """
        paths = tqdm(self.shards, "check", unit=" shards", dynamic_ncols=True)
        damaged = [
            path.name
            for path, checksum in zip(paths, self.checksums, strict=True)
            if not path.exists() or sha256(path) != checksum
        ]
        if damaged:
            raise ValueError(self._damage(", ".join(damaged)))

    def stream(self) -> tf.data.Dataset:
        """The map of each training image, in the order of `data.stream("train")`.

        Every shard is compared with its checksum when it is read.

        Returns:
            Dataset of (values float16 `(h, w, k)`, classes int32 `(h, w, k)`).

        Raises:
            tf.errors.OpError: While it is read: with the name of a damaged shard.
        """
        shape = (None, *self.map_size, self.top)

        def load(shard):
            maps = tf.numpy_function(
                self._read, [shard], (tf.float16, tf.int32), stateful=False
            )
            return tuple(tf.ensure_shape(x, shape) for x in maps)

        shards = tf.data.Dataset.range(len(self.shards))
        maps = shards.map(load, num_parallel_calls=2, deterministic=True).unbatch()
        return maps.apply(tf.data.experimental.assert_cardinality(self.images))

    def _read(self, shard):
        path = self.shards[shard]
        content = path.read_bytes() if path.exists() else b""
        if hashlib.sha256(content).hexdigest() != self.checksums[shard]:
            raise ValueError(self._damage(path.name))
        return _arrays(content)

    def checksum(self, shard: int) -> str:
        """SHA-256 of a shard that has just been made.

        Raises:
            ValueError: If it does not hold the maps of its images.
        """
        path = self.shards[shard]
        content = path.read_bytes()
        shape = (len(self.rows(shard)), *self.map_size, self.top)
        try:
            shapes = {x.shape for x in _arrays(content)}
        except (zipfile.BadZipFile, ValueError, KeyError, OSError, EOFError) as error:
            raise ValueError(self._damage(path.name)) from error
        if shapes != {shape}:
            raise ValueError(self._damage(path.name))
        return hashlib.sha256(content).hexdigest()

    def _damage(self, names):
        return (
            f"{self.folder} must hold the label maps that were written; damaged or "
            f"missing: {names}. Delete what is damaged and run annotate again, as "
            "before: it makes just that."
        )


def open_labels(folder: str | Path) -> LabelStore:
    """Open a finished store of label maps.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is not finished, or its description is damaged.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"There is no folder of label maps {folder}.")
    found = [name for name in (FINISHED, PLAN) if (folder / name).exists()]
    if not found:
        raise FileNotFoundError(
            f"{folder} must be a folder of label maps, with {FINISHED}."
        )
    store = _read_description(folder / found[0])
    missing = len(store.missing())
    if missing or found[0] == PLAN:
        raise ValueError(
            f"The label maps of {folder} are not finished: {missing} of "
            f"{len(store.shards)} shards are missing. {AGAIN}"
        )
    return store


def with_label_maps(data: Dataset, folder: str | Path) -> Dataset:
    """Give a dataset the label maps of a store that was made for it.

    Returns:
        The data with `label_maps`; their fingerprint counts into that of the data.

    Raises:
        FileNotFoundError: If there is no store.
        ValueError: If it is not finished, or was made for other data.
    """
    store = open_labels(folder)
    before = (store.data_fingerprint, store.images, store.labels)
    now = (data.fingerprint, data.sizes["train"], tuple(data.labels))
    if before != now:
        raise ValueError(
            f"{folder} holds label maps of {_words(store.data, *before)}; they do not "
            f"fit {_words(data.name, *now)}."
        )
    return dataclasses.replace(
        data,
        label_maps=store.stream,
        fingerprint=fingerprint([data.fingerprint, store.fingerprint]),
    )


def begin(plan: LabelStore) -> LabelStore:
    """Make a store of a plan, or find the one that was begun or finished by it.

    Returns:
        The store; it has its checksums where it was finished.

    Raises:
        ValueError: If the folder holds something else, or its description is damaged.
    """
    folder = plan.folder
    for path in (folder / FINISHED, folder / PLAN):
        if path.exists():
            store = _read_description(path)
            _check_same(store, plan)
            return store
    folder.mkdir(parents=True, exist_ok=True)
    if others := sorted(x.name for x in folder.iterdir() if x.name[0] != "."):
        raise ValueError(
            f"{folder} must be a new folder or one of label maps, got one with "
            f"{', '.join(others[:3])}."
        )
    _write_description(plan, PLAN)
    return plan


def finish(store: LabelStore, made: list[int]) -> LabelStore:
    """Write down the checksums of a store whose shards are all there.

    Args:
        store: What `begin` returned.
        made: Numbers of the shards that were made since; the checksums of all others
            stay as they are, where the store has them.

    Returns:
        The finished store.

    Raises:
        ValueError: If one of these shards is damaged.
    """
    known = dict(enumerate(store.checksums))
    new = range(len(store.shards)) if not known else made
    for shard in tqdm(new, "checksums", unit=" shards", dynamic_ncols=True):
        checksum = store.checksum(shard)
        if known.get(shard, checksum) != checksum:
            warnings.warn(
                f"{store.shards[shard]} came out different from the one before: a "
                "training that goes on will take the label maps for others.",
                stacklevel=2,
            )
        known[shard] = checksum
    store = dataclasses.replace(
        store, checksums=tuple(known[i] for i in range(len(store.shards)))
    )
    _write_description(store, FINISHED)
    (store.folder / PLAN).unlink(missing_ok=True)
    for path in store.folder.glob(".*.*"):  # of processes that were killed
        if path.name.startswith((".train-", ".plan.", ".labels.")):
            path.unlink(missing_ok=True)
    return store


def _arrays(content):
    with np.load(io.BytesIO(content)) as arrays:
        return arrays["values"], arrays["classes"]


def _write_description(store, name):
    with replacing(store.folder / name) as path:
        path.write_text(json.dumps(store.description(), indent=1) + "\n")


def _read_description(path):
    """The store that a JSON file describes."""
    names = [x.name for x in dataclasses.fields(LabelStore) if x.name != "folder"]
    try:
        description = json.loads(path.read_text())
        if description["format"] != FORMAT:
            raise ValueError(f"its format is {description['format']!r}, not {FORMAT}")
        values = {name: description[name] for name in names}
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{path} must describe a store of label maps: {error}. Delete the folder "
            "and run annotate again."
        ) from error
    values = {k: tuple(x) if isinstance(x, list) else x for k, x in values.items()}
    return LabelStore(path.parent, **values)


def _check_same(store, plan):
    """Refuse a plan that would give other maps than those of the store."""
    before, now = store.description(), plan.description()
    shown = {"data_fingerprint": "data", "teacher_sha256": "teacher"}
    for key in before:
        if key in NAMES_ONLY or before[key] == now[key]:
            continue
        old, new = before[key], now[key]
        if key in shown:
            old = f"{before[shown[key]]} ({old[:12]})"
            new = f"{now[shown[key]]} ({new[:12]})"
        what = shown.get(key, key).replace("_", " ")
        raise ValueError(
            f"{store.folder} holds other label maps: their {what} is {old}, now it is "
            f"{new}. Choose another folder, or delete that one."
        )


def _words(name, digest, images, labels):
    return (
        f"{name!r} ({images} images, {len(labels)} classes, fingerprint {digest[:12]})"
    )
