"""Files of published checkpoints: their tensors by name, and what stands beside them.

    .npz           Google's ViT, AugReg and big_vision       NumPy
    .safetensors   timm, Hugging Face, ours                  safetensors
    .pth, .bin     DeiT, LV-ViT, Twins                       torch's safe loader

The kind is read from the content of a file, not from its name. No tensor is read before
it is asked for.
"""

import argparse
import dataclasses
import hashlib
import json
import math
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import ml_dtypes
import numpy as np

from keras_vit.model_file import replacing

WEIGHTS = (  # in a folder, the first of these that is there
    "model.safetensors",
    "model.safetensors.index.json",
    "pytorch_model.bin",
)
SUFFIXES = (".safetensors", ".npz", ".pth", ".pt", ".bin", ".tar")
WRAPPERS = ("model", "state_dict", "model_state_dict", "module")
BROKEN = (  # what reading a damaged archive raises
    ValueError,
    OSError,
    EOFError,
    RuntimeError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
OURS = "keras_vit"  # key of our own description in the header of a safetensors file


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor that is read when it is asked for.

    Args:
        names: Its name in the file; several, where it is put together from several.
        shape: Its shape.
        read: Reads it, as float32.
    """

    names: tuple[str, ...]
    shape: tuple[int, ...]
    read: Callable[[], np.ndarray]

    def map(self, function, shape=None):
        """What `function` makes of it; `shape` is needed where that is another."""
        shape = self.shape if shape is None else tuple(shape)
        return Tensor(self.names, shape, lambda: function(self.read()))


@dataclasses.dataclass(frozen=True)
class CheckpointFile:
    """An opened checkpoint.

    Args:
        location: What a message calls it.
        kind: `"npz"`, `"safetensors"` or `"torch"`.
        tensors: By their names in the file.
        config: Hugging Face's or timm's `config.json`; empty without one.
        preprocessor: `preprocessor_config.json`, likewise.
        description: What `to_checkpoint` wrote of the model; empty in files of others.
        left_out: Reasons, by the names of entries that hold no weights.
    """

    location: str
    kind: str
    tensors: dict[str, Tensor]
    config: dict = dataclasses.field(default_factory=dict)
    preprocessor: dict = dataclasses.field(default_factory=dict)
    description: dict = dataclasses.field(default_factory=dict)
    left_out: dict[str, str] = dataclasses.field(default_factory=dict)


def open_checkpoint(source) -> CheckpointFile:
    """Open a file, a folder, or `hf:OWNER/NAME[@REVISION]` on the Hugging Face hub.

    Raises:
        FileNotFoundError: If there is none.
        ValueError: If it is damaged, or holds something else.
        ImportError: If a library that it needs is not installed.
    """
    text = str(source)
    if text.startswith("hf:"):
        from keras_vit.checkpoint_hub import download

        folder = download(text)
        return dataclasses.replace(_open_folder(folder), location=text)
    path = Path(source).expanduser()
    if path.is_dir():
        return _open_folder(path)
    if not path.is_file():
        hint = (
            f" On the Hugging Face hub it would be 'hf:{text}'." if "/" in text else ""
        )
        raise FileNotFoundError(f"There is no checkpoint {text}.{hint}")
    return _open_file(path)


def _open_folder(folder):
    named = [folder / name for name in WEIGHTS if (folder / name).is_file()]
    if not named:
        named = sorted(x for x in folder.iterdir() if x.suffix in SUFFIXES)
        if len(named) > 1:
            raise ValueError(
                f"{folder} must hold one checkpoint, got "
                f"{', '.join(x.name for x in named)}; name the file."
            )
    if not named:
        raise FileNotFoundError(
            f"{folder} must hold a checkpoint, such as {WEIGHTS[0]}; there is none."
        )
    if named[0].name.endswith(".index.json"):
        file = _open_shards(named[0])
    else:
        file = _open_file(named[0])
    return dataclasses.replace(
        file,
        location=str(folder),
        config=_json(folder / "config.json"),
        preprocessor=_json(folder / "preprocessor_config.json"),
    )


def _json(path):
    if not path.is_file():
        return {}
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} must be JSON, it is damaged: {error}.") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object.")
    return value


def _open_shards(index):
    """Several safetensors files, as Hugging Face cuts large models."""
    shards = _json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise ValueError(f"{index} must say in 'weight_map' which file holds what.")
    tensors = {}
    for name in sorted(set(map(str, shards.values()))):
        path = index.with_name(Path(name).name)
        if not path.is_file():
            raise FileNotFoundError(f"{index.name} names {name}, which is not there.")
        tensors |= _open_file(path).tensors
    lost = sorted(set(shards) - set(tensors))
    if lost:
        raise ValueError(f"{index.parent} lacks the tensors {', '.join(lost[:5])}.")
    return CheckpointFile(str(index.parent), "safetensors", tensors)


def _open_file(path):
    with path.open("rb") as file:
        start = file.read(16)
    names = None
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                names = archive.namelist()
    except BROKEN as error:
        raise ValueError(f"{path} is damaged: {error}.") from error
    if names is not None:
        if any(name.endswith("data.pkl") for name in names):
            return _open_torch(path)
        if names and all(name.endswith(".npy") for name in names):
            return _open_npz(path)
    elif len(start) == 16 and start[8:9] == b"{":
        return _open_safetensors(path)
    elif start[:1] == b"\x80":
        return _open_torch(path)
    raise ValueError(
        f"{path} must be a whole .npz, .safetensors or .pth file with the weights of a "
        "vision transformer; it is damaged or something else."
    )


def damaged(path, name, error):
    """A ValueError for a tensor that cannot be read."""
    reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
    return ValueError(f"{path} is damaged: the tensor {name} cannot be read: {reason}")


def _floats(array):
    """float32 of any floating-point array; 2-byte void is NumPy's word for bfloat16."""
    if array.dtype == np.dtype("V2"):
        array = array.view(ml_dtypes.bfloat16)
    if array.dtype.kind not in "fV":
        raise ValueError(f"weights must be floating-point numbers, got {array.dtype}.")
    return np.asarray(array).astype("float32", copy=False)


# --- .npz


def _open_npz(path):
    tensors = {}
    with zipfile.ZipFile(path) as archive:
        for member in archive.namelist():
            name = member.removesuffix(".npy")
            try:
                with archive.open(member) as file:
                    shape = _npy_shape(file, archive.getinfo(member).file_size)
            except BROKEN as error:
                raise damaged(path, name, error) from error
            read = _npy_reader(path, member, name)
            tensors[name] = Tensor((name,), shape, read)
    return CheckpointFile(str(path), "npz", tensors)


def _npy_shape(file, size):
    version = np.lib.format.read_magic(file)
    if version == (1, 0):
        shape, _, dtype = np.lib.format.read_array_header_1_0(file)
    else:
        shape, _, dtype = np.lib.format.read_array_header_2_0(file)
    if dtype.hasobject:
        raise ValueError("it is a pickled object, which is never loaded")
    if file.tell() + math.prod(shape) * dtype.itemsize != size:
        raise ValueError(f"its shape {shape} does not fit its {size} bytes")
    return shape


def _npy_reader(path, member, name):
    def read():
        try:
            with zipfile.ZipFile(path) as archive, archive.open(member) as file:
                array = np.lib.format.read_array(file, allow_pickle=False)
                file.read()  # to the end, where the checksum is compared
            return _floats(array)
        except BROKEN as error:
            raise damaged(path, name, error) from error

    return read


# --- .safetensors


def _open_safetensors(path):
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(
            f"{path} is a safetensors file: pip install safetensors."
        ) from error
    try:
        with safe_open(path, framework="numpy") as file:
            metadata = file.metadata() or {}
            shapes = {x: file.get_slice(x).get_shape() for x in [*file.keys()]}
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(f"{path} is damaged: {error}.") from error

    def reader(name):
        def read():
            try:  # opened anew, or what was read would stay mapped in memory
                with safe_open(path, framework="numpy") as file:
                    return _floats(file.get_tensor(name))
            except (SafetensorError, OSError, ValueError, TypeError, KeyError) as error:
                raise damaged(path, name, error) from error

        return read

    tensors = {
        name: Tensor((name,), tuple(shape), reader(name))
        for name, shape in shapes.items()
    }
    description = _description(path, metadata, tensors)
    return CheckpointFile(str(path), "safetensors", tensors, description=description)


def _description(path, metadata, tensors):
    """What `write_safetensors` said of the model, after its checksum was compared."""
    if OURS not in metadata:
        return {}
    try:
        described = json.loads(metadata[OURS])
        expected, description = described["sha256"], described["model"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: its description is not whole.") from error
    if checksum(tensors, description) != expected:
        raise ValueError(
            f"{path} is damaged: its bytes are not those that were written (SHA-256). "
            "Copy or convert it again."
        )
    return description


def checksum(tensors, description) -> str:
    """SHA-256 of a description and of names, shapes and bytes of float32 tensors."""
    digest = hashlib.sha256(json.dumps(description, sort_keys=True).encode())
    for name in sorted(tensors):
        digest.update(f"{name} {list(tensors[name].shape)}".encode())
        digest.update(np.ascontiguousarray(tensors[name].read()).data)
    return digest.hexdigest()


def write_safetensors(path: Path, arrays: dict, description: dict) -> None:
    """Write float32 arrays, with a description of the model and a checksum.

    Raises:
        ImportError: If safetensors is not installed.
    """
    try:
        from safetensors.numpy import save_file
    except ImportError as error:
        raise ImportError("To write: pip install safetensors.") from error
    tensors = {
        name: Tensor((name,), array.shape, lambda array=array: array)
        for name, array in arrays.items()
    }
    ours = {"model": description, "sha256": checksum(tensors, description)}
    metadata = {"format": "pt", OURS: json.dumps(ours, sort_keys=True)}
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        save_file(arrays, temporary, metadata=metadata)


# --- .pth


def _open_torch(path):
    try:
        import torch
    except ImportError as error:
        raise ImportError(
            f"{path} is a PyTorch file, which only torch reads safely: pip install "
            "torch, or save its tensors once as .safetensors where torch is installed."
        ) from error
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                broken = archive.testzip()
            if broken is not None:
                raise ValueError(f"the checksum of {broken} is another")
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # of a damaged pickle anything can come
        reason = (str(error).strip() or repr(error)).splitlines()[0]
        raise ValueError(
            f"{path} is damaged, or holds more than tensors, and is not unpickled: "
            f"{reason}"
        ) from error
    state, left_out = _unwrap(content, torch.is_tensor)
    tensors = {}
    for name, x in state.items():
        counter = name.endswith("num_batches_tracked")
        plain = x.layout == torch.strided and x.device.type == "cpu"
        if not (plain and (x.is_floating_point() or counter)):
            raise damaged(path, name, f"it is {x.dtype}, {x.layout}, on {x.device}")
        if x.numel() * x.element_size() > x.untyped_storage().nbytes():
            raise damaged(path, name, f"its shape {tuple(x.shape)} has too few values")
        tensors[name] = Tensor(
            (name,), tuple(x.shape), lambda x=x: x.detach().float().numpy()
        )
    return CheckpointFile(str(path), "torch", tensors, left_out=left_out)


def _unwrap(content, is_tensor):
    """The state dict in what a `.pth` file holds, and why the rest is left out."""
    if not isinstance(content, dict):
        return {}, {}
    state = {key: x for key, x in content.items() if is_tensor(x)}
    inside = []
    if state:
        rest = "not a tensor"
    else:
        inside = [x for x in WRAPPERS if isinstance(content.get(x), dict)]
        if not inside:
            return {}, {}
        state, _ = _unwrap(content[inside[0]], is_tensor)
        rest = f"stands beside the weights {inside[0]!r}"
    left_out = {
        str(key): rest
        for key, value in content.items()
        if key not in state and key not in inside[:1] and value is not None
    }
    return state, left_out


def size_in_words(tensors) -> str:
    """Number of values of tensors, for a message."""
    return f"{sum(math.prod(x.shape) for x in tensors):,}"
