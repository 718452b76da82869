"""Training on more than one device, by what Keras has for each backend.

    JAX         keras.distribution: copies of the model (data parallel), each of them
                split over several devices if asked (model parallel); also in several
                processes, on one machine or many
    TensorFlow  tf.distribute.MirroredStrategy: copies of the model in one process
    PyTorch     one device: Keras has no more for it

A batch is that of all devices together, and so are learning rate and steps an epoch:
nothing is scaled by the number of devices.
"""

import contextlib
import dataclasses
import json
import math
import os
import zlib
from collections.abc import Iterator

import keras
import numpy as np

from training.recipe import Recipe

BATCH, MODEL = "batch", "model"  # axes of the mesh
JOINS = ("KERAS_DISTRIBUTION_JOB_ADDRESSES", "JAX_COORDINATOR_ADDRESS")
SPLIT = {  # what a device of a split model has of each layer: the others are whole
    r"(.*/)?(qkv|query|key_value|expand)/kernel": (None, MODEL),
    r"(.*/)?(qkv|query|key_value|expand)/bias": (MODEL,),
    r"(.*/)?(attention/project|mlp/reduce)/kernel": (MODEL, None),
    r"(.*/)?(\w+_)?head(_\w+)?/kernel": (None, MODEL),
    r"(.*/)?(\w+_)?head(_\w+)?/bias": (MODEL,),
}


@dataclasses.dataclass(frozen=True)
class Devices:
    """Over how many devices a training is spread.

    Args:
        data: Copies of the model, among which every batch is divided.
        model: Devices a copy, among which its large kernels are divided; more than 1
            on JAX alone.

    Raises:
        ValueError: If one is not a positive int.
    """

    data: int
    model: int = 1

    def __post_init__(self):
        for name in ("data", "model"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{name} must be a positive int, got {value!r}.")


def parse_devices(text: str | None) -> str | int | Devices | None:
    """What `fit` takes as `devices`, from the text of the command line.

    Args:
        text: `"all"`, a number, or DATAxMODEL, as `"4x2"`; None for one device.

    Raises:
        ValueError: If it is something else.
    """
    if text is None or text == "all":
        return text
    parts = text.lower().split("x")
    if len(parts) > 2 or not all(x.isdecimal() and int(x) > 0 for x in parts):
        raise ValueError(
            f"--devices must be all, a number, or DATAxMODEL as 4x2, got {text!r}."
        )
    return int(parts[0]) if len(parts) == 1 else Devices(int(parts[0]), int(parts[1]))


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a training runs: what `distributed` gives.

    Args:
        devices: How many devices, and for what.
        process: Number of this process, from 0.
        processes: How many there are.
    """

    devices: Devices = Devices(1)
    process: int = 0
    processes: int = 1

    @property
    def is_chief(self) -> bool:
        """Whether this process is the one that writes files and shows progress."""
        return self.process == 0

    @property
    def part(self) -> tuple[int, int]:
        """(p, P): which process of how many, as `training.sharding` takes it."""
        return self.process, self.processes

    def check_batches(self, recipe: Recipe) -> None:
        """Refuse batches that the devices cannot share.

        Raises:
            ValueError: If what is sent through the model at once is no multiple of the
                copies of the model, or, where images are mixed, of twice the processes;
                if TensorFlow is to accumulate on several devices, or several are to
                augment.
        """
        count = self.devices.data * self.devices.model
        if recipe.augmentation.on_accelerator and count > 1:
            raise ValueError(
                "on_accelerator must be False on several devices, each of which has a "
                f"part of a batch that is mixed as a whole, got {count} devices."
            )
        unit, why = self.devices.data, f"{self.devices.data} devices"
        mixes = recipe.augmentation.mixup or recipe.augmentation.cutmix
        if mixes and self.processes > 1:
            unit = math.lcm(unit, 2 * self.processes)
            why += f", mixed in pairs in {self.processes} processes"
        on_tensorflow = keras.backend.backend() == "tensorflow"
        if on_tensorflow and unit > 1 and recipe.accumulation_steps > 1:
            raise ValueError(
                "accumulation_steps must be 1 on several TensorFlow devices, got "
                f"{recipe.accumulation_steps}; KERAS_BACKEND=jax takes more."
            )
        unit *= recipe.accumulation_steps
        if recipe.accumulation_steps > 1:
            why += f", accumulation_steps={recipe.accumulation_steps}"
        if recipe.batch_size % unit:
            nearest = max(1, round(recipe.batch_size / unit)) * unit
            raise ValueError(
                f"batch_size must be a multiple of {unit} ({why}), got "
                f"{recipe.batch_size}; the nearest is {nearest}."
            )

    def adapt(self, optimizer: keras.Optimizer) -> None:
        """Make the optimizer of a compiled model see gradients of the whole batch.

        Keras' own on TensorFlow adds up the gradients of the devices after it has
        clipped each by itself, so that the result depends on their number.
        """
        if self.devices.data > 1 and keras.backend.backend() == "tensorflow":
            _add_up_first(optimizer)

    def check_same(self, **values) -> None:
        """Refuse processes that would not train the same.

        Raises:
            ValueError: If a value, any JSON, is not the same in all processes.
        """
        if self.processes == 1:
            return
        from jax.experimental import multihost_utils

        texts = [json.dumps(value, sort_keys=True) for value in values.values()]
        codes = np.array([zlib.crc32(text.encode()) for text in texts], np.uint32)
        everywhere = multihost_utils.process_allgather(codes)
        for i, name in enumerate(values):
            if len(set(everywhere[:, i].tolist())) > 1:
                raise ValueError(
                    f"{name} must be the same in all {self.processes} processes, which "
                    f"share the run directory; in process {self.process} it is "
                    f"{texts[i]:.200}."
                )

    def wait(self, where: str) -> None:
        """Wait until all processes are here."""
        if self.processes > 1:
            from jax.experimental import multihost_utils

            multihost_utils.sync_global_devices(where)


PLAIN = Placement()  # one device of one process


def is_chief() -> bool:
    """Whether this process, of those that JAX has joined, is the one that speaks."""
    if keras.backend.backend() != "jax":
        return True
    import jax

    if not jax.distributed.is_initialized():  # nor may it be asked for its number
        return os.environ.get("KERAS_DISTRIBUTION_PROCESS_ID", "0") == "0"
    return jax.process_index() == 0


@contextlib.contextmanager
def distributed(devices: str | int | Devices | None = None) -> Iterator[Placement]:
    """Spread the models that are built inside over devices, and their training.

    In several JAX processes it joins them first, if their environment says so
    (`KERAS_DISTRIBUTION_JOB_ADDRESSES`, `_NUM_PROCESSES` and `_PROCESS_ID`, or
    `JAX_COORDINATOR_ADDRESS` and what JAX finds out by itself under Slurm, Open MPI and
    on TPUs) and nobody has called `keras.distribution.initialize` before.

    Args:
        devices: `"all"`; a number of copies of the model; `Devices`; None for one
            device.

    Raises:
        ValueError: If there are not so many devices, the backend cannot use them, or
            the processes cannot be joined.
    """
    backend = keras.backend.backend()
    if backend == "jax":
        _join(devices)
    elif backend == "tensorflow":
        _refuse_workers()
    wanted = _wanted(devices)
    if wanted == Devices(1):
        yield PLAIN
    elif backend == "jax":
        with _jax_distribution(wanted).scope():
            yield Placement(wanted, *_jax_part())
    else:
        with _mirrored(wanted).scope():
            yield Placement(wanted)


def _wanted(devices):
    """`Devices` that there are, from what `fit` was given."""
    if isinstance(devices, int) and not isinstance(devices, bool):
        devices = Devices(devices)
    if not isinstance(devices, Devices) and devices not in ("all", None):
        raise ValueError(
            f"devices must be 'all', a number, Devices or None, got {devices!r}."
        )
    if devices is None:
        return Devices(1)
    backend = keras.backend.backend()
    there = len(_names(backend))
    if devices == "all":
        devices = Devices(there)
    count = devices.data * devices.model
    if count > 1 and backend not in ("jax", "tensorflow"):
        raise ValueError(
            f"devices must be 1 or None on {backend}, for which Keras has no more than "
            f"one device, got {count}; KERAS_BACKEND=jax has."
        )
    if count > there:
        raise ValueError(
            f"devices must be at most the {there} that {backend} sees here, got "
            f"{count}."
        )
    if devices.model > 1 and backend != "jax":
        raise ValueError(
            f"model must be 1 on {backend}, got {devices.model}; only on JAX can Keras "
            "split a model."
        )
    return devices


def _names(backend):
    """The accelerators that the backend sees, or else its CPUs."""
    if backend in ("jax", "tensorflow"):
        return keras.distribution.list_devices()
    if backend == "torch":
        import torch

        return range(max(1, torch.cuda.device_count()))
    return ["cpu"]


def _join(devices):
    """Join the JAX processes that the environment tells of, and check what is asked."""
    import jax

    named = [name for name in JOINS if name in os.environ]
    if named and not jax.distributed.is_initialized():
        try:
            keras.distribution.initialize()
        except (RuntimeError, ValueError) as error:
            raise ValueError(
                f"{named[0]} is set, but the processes could not be joined ({error}). "
                "Call keras.distribution.initialize() before anything is computed."
            ) from error
    if not jax.distributed.is_initialized() or jax.process_count() == 1:
        return
    asked = devices if isinstance(devices, Devices) else Devices(jax.device_count())
    too_few = asked.data * asked.model != jax.device_count()
    across = jax.local_device_count() % asked.model
    if devices in (None, 1) or too_few or across:
        raise ValueError(
            f"In {jax.process_count()} processes devices must be 'all', or Devices "
            f"with data * model = {jax.device_count()} and a model that divides the "
            f"{jax.local_device_count()} of each process, got {devices!r}."
        )


def _jax_part():
    import jax

    return jax.process_index(), jax.process_count()


def _jax_distribution(wanted):
    import jax

    found = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    count = wanted.data * wanted.model
    names = [f"{device.platform}:{device.id}" for device in found[:count]]
    if wanted.model == 1:
        return keras.distribution.DataParallel(devices=names, auto_shard_dataset=False)
    mesh = keras.distribution.DeviceMesh(
        (wanted.data, wanted.model), (BATCH, MODEL), names
    )
    layout_map = keras.distribution.LayoutMap(mesh)
    for pattern, axes in SPLIT.items():
        layout_map[pattern] = axes
    return _SplitModel(
        layout_map=layout_map, batch_dim_name=BATCH, auto_shard_dataset=False
    )


class _SplitModel(keras.distribution.ModelParallel):
    """Model parallel where a variable that the devices do not divide stays whole."""

    def get_variable_layout(self, variable):
        layout = super().get_variable_layout(variable)
        parts = self.device_mesh.shape[1]
        sides = zip(variable.shape, layout.axes, strict=True)
        if not any(side % parts for side, axis in sides if axis == MODEL):
            return layout
        whole = [None] * len(variable.shape)
        return keras.distribution.TensorLayout(whole, self.device_mesh)


def _mirrored(wanted):
    import tensorflow as tf

    return tf.distribute.MirroredStrategy(
        [f"/{name}" for name in _names("tensorflow")[: wanted.data]]
    )


def _refuse_workers():
    """Refuse the workers of `TF_CONFIG`, in which `fit` of Keras fails."""
    cluster = json.loads(os.environ.get("TF_CONFIG") or "{}").get("cluster", {})
    count = sum(len(cluster.get(kind, ())) for kind in ("chief", "worker"))
    if count > 1:
        raise ValueError(
            f"TF_CONFIG tells of {count} workers, but Keras 3 trains in one TensorFlow "
            "process only; KERAS_BACKEND=jax trains in several."
        )


def _add_up_first(optimizer):
    """Add up the gradients of all devices before anything else is done to them."""
    import tensorflow as tf

    apply = optimizer.apply

    def apply_sum(grads, trainable_variables=None):
        found = [grad for grad in grads if grad is not None]
        context = tf.distribute.get_replica_context()
        sums = iter(context.all_reduce(tf.distribute.ReduceOp.SUM, found))
        grads = [None if grad is None else next(sums) for grad in grads]
        return apply(grads, trainable_variables)

    optimizer.apply = apply_sum
    inner = getattr(optimizer, "inner_optimizer", optimizer)
    inner._all_reduce_sum_gradients = list  # they are added up already


def to_numpy(value) -> np.ndarray:
    """The whole of a variable's value, also where its parts are on several devices.

    In several processes each has the whole of every variable among its own devices.
    """
    if isinstance(getattr(value, "values", None), tuple):  # TensorFlow: one a device
        value = value.values[0]
    if getattr(value, "is_fully_addressable", True) or value.is_fully_replicated:
        return keras.ops.convert_to_numpy(value)
    whole = np.empty(value.shape, value.dtype)
    for shard in value.addressable_shards:
        whole[shard.index] = np.asarray(shard.data)
    return whole


def portable(model: keras.Model) -> keras.Model:
    """A functional model that can be saved: itself, or a copy that is whole here."""
    values = [variable.value for variable in model.weights]
    whole = (getattr(x, "is_fully_addressable", True) for x in values)
    if all(whole) or all(x.is_fully_replicated for x in values):
        return model
    before = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        with keras.device("cpu"):
            copy = type(model).from_config(model.get_config())
            copy.set_weights([to_numpy(x) for x in values])
    finally:
        keras.distribution.set_distribution(before)
    return copy
