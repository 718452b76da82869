"""Whole checkpoints of every format, and ways to damage them."""

import functools
import importlib.util
import io
import json
import tempfile
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from conftest import to_numpy
from safetensors import safe_open
from safetensors.numpy import save_file

from keras_vit import ViT, to_checkpoint


def torch():
    """It writes .pth files; the test of one is skipped where it is not installed."""
    return pytest.importorskip("torch")


SIZES = {"image_size": 32, "patch_size": 16, "embed_dim": 24, "num_heads": 3}
MODEL = {**SIZES, "depth": 2, "num_classes": 7, "normalization": "imagenet"}
TOLD = {"num_heads": 3, "normalization": "imagenet"}  # what a file does not tell

NAMES = (
    "google.npz",
    "ours_timm.safetensors",
    "ours_hf.safetensors",
    "timm.safetensors",
    "zip.pth",
    "legacy.pth",
    "ours.keras",
)


def draw_model(**kwargs):
    """A model whose weights are all random, so that no two of them are equal."""
    keras.utils.clear_session(free_memory=False)
    model = ViT("tiny", **{**MODEL, **kwargs})
    generator = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape).astype("float32"))
    return model


def numbers(model):
    return {weight.path: to_numpy(weight) for weight in model.weights}


def google(model, num_heads=3):
    """Weights of a ViT by the names and in the shapes of Google's code."""
    found = numbers(model)
    dim = found["patches/project/bias"].shape[0]
    side = int((found["patches/project/kernel"].shape[0] / 3) ** 0.5)
    names = {"gamma": "scale", "beta": "bias"}
    modules = {"norm1": "LayerNorm_0", "norm2": "LayerNorm_2"}
    modules |= {"mlp/expand": "MlpBlock_3/Dense_0", "mlp/reduce": "MlpBlock_3/Dense_1"}
    tensors = {}
    for path, array in found.items():
        layer, _, weight = path.rpartition("/")
        block, _, layer = layer.partition("/")
        base = f"Transformer/encoderblock_{block[5:]}/"
        attention = f"{base}MultiHeadDotProductAttention_1/"
        if layer in modules:
            tensors[f"{base}{modules[layer]}/{names.get(weight, weight)}"] = array
        elif layer == "attention/qkv":
            for name, part in zip(
                ("query", "key", "value"), np.split(array, 3, -1), strict=True
            ):
                part = part.reshape(*part.shape[:-1], num_heads, -1)
                tensors[f"{attention}{name}/{weight}"] = part
        elif layer == "attention/project":
            shape = (num_heads, dim // num_heads, dim) if weight == "kernel" else dim
            tensors[f"{attention}out/{weight}"] = array.reshape(shape)
        elif block == "patches":
            shape = (side, side, 3, dim) if weight == "kernel" else dim
            tensors[f"embedding/{weight}"] = array.reshape(shape)
        else:
            new = {"position/table": "Transformer/posembed_input/pos_embedding"}
            new |= {
                "tokens/class_token": "cls",
                "norm/gamma": "Transformer/encoder_norm/scale",
            }
            new |= {"norm/beta": "Transformer/encoder_norm/bias"}
            tensors[new.get(path, path)] = array
    return tensors


# --- one whole file of each format


def read(path):
    """The arrays of a file by name, and what else has to be written again."""
    if path.suffix == ".npz":
        return dict(np.load(path)), None
    if path.suffix == ".safetensors":
        with safe_open(path, "numpy") as file:
            return {
                name: file.get_tensor(name) for name in file.keys()
            }, file.metadata()
    if path.suffix == ".pth":
        return {k: x.numpy() for k, x in torch().load(path)["model"].items()}, None
    arrays = {}
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with h5py.File(io.BytesIO(members["model.weights.h5"])) as file:
        file.visititems(
            lambda name, x: arrays.update({name: x[()]} if hasattr(x, "shape") else {})
        )
    return arrays, members


def write(path, arrays, rest=None):
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    elif path.suffix == ".safetensors":
        save_file(arrays, path, rest)
    elif path.suffix == ".pth":
        state = {name: torch().tensor(x) for name, x in arrays.items()}
        whole, legacy = {"model": state, "epoch": 3}, path.stem == "legacy"
        torch().save(whole, path, _use_new_zipfile_serialization=not legacy)
    else:
        memory = io.BytesIO(rest["model.weights.h5"])
        with h5py.File(memory, "r+") as file:
            old = []
            file.visititems(lambda n, x: old.append(n) if hasattr(x, "shape") else None)
            for name in old:
                del file[name]
            for name, array in arrays.items():
                file[name] = array
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in {**rest, "model.weights.h5": memory.getvalue()}.items():
                archive.writestr(name, data)


def whole_file(name):
    """The bytes of a whole file; a .pth needs torch."""
    if name.endswith(".pth"):
        torch()
    return whole()[0][name]


@functools.cache
def whole():
    """The bytes of a file of every format, and the weights that all of them hold."""
    model, files = draw_model(), {}
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        write(folder / "google.npz", google(model))
        to_checkpoint(model, folder / "ours_timm.safetensors")
        to_checkpoint(model, folder / "ours_hf.safetensors", layout="hf")
        write(folder / "hf.safetensors", read(folder / "ours_hf.safetensors")[0])
        state, _ = read(folder / "ours_timm.safetensors")
        write(folder / "timm.safetensors", state)
        if importlib.util.find_spec("torch"):
            for name in ("zip.pth", "legacy.pth"):
                write(folder / name, state)
        model.save(folder / "ours.keras")
        files = {path.name: path.read_bytes() for path in folder.iterdir()}
    return files, numbers(model)


# --- damages of bytes


def cut_to_nothing(data, generator, start, stop):
    return b""


def cut_to_8_bytes(data, generator, start, stop):
    return data[:8]


def cut_in_the_header(data, generator, start, stop):
    return data[: generator.integers(9, 400)]


def cut(data, generator, start, stop):
    return data[: generator.integers(len(data))]


def flip(data, generator, start, stop):
    """1 to 64 other bytes."""
    damaged = np.frombuffer(data, "uint8").copy()
    count = generator.choice([1, 1, 2, generator.integers(3, 65)])
    places = generator.choice(np.arange(start, stop), count, replace=False)
    damaged[places] ^= generator.integers(1, 256, count).astype("uint8")
    return damaged.tobytes()


def flip_the_structure(data, generator, start, stop):
    """Of a zip file, its directory at the end; else the start."""
    if data[:2] == b"PK":
        end = data.rindex(b"PK\5\6")
        start, stop = int.from_bytes(data[end + 16 : end + 20], "little"), len(data)
    return flip(data, generator, start, min(stop, start + 4000))


def places(name, data):
    """Where a flipped byte can be found by anybody.

    Safetensors and the old form of `.pth` hold their values without a checksum: there,
    only what stands before the values.
    """
    if name == "timm.safetensors":
        return 0, 8 + int.from_bytes(data[:8], "little")
    if name == "legacy.pth":  # each tensor is its number of values in 8 bytes, values
        return 0, len(data) - sum(8 + x.nbytes for x in whole()[1].values())
    return 0, len(data)


# --- damages of tensors; `rename` and so on take and return arrays by name


def pick(arrays, generator, rank=1):
    names = [x for x in sorted(arrays) if arrays[x].ndim >= rank and arrays[x].size > 1]
    names = [x for x in names if arrays[x].dtype == "float32"]
    return names[generator.integers(len(names))]


def rename(arrays, generator):
    name = pick(arrays, generator)
    place = generator.integers(len(name))
    new = name[:place] + "q" + name[place + 1 :]
    return {new if x == name else x: array for x, array in arrays.items()}


def remove(arrays, generator):
    name = pick(arrays, generator)
    return {x: array for x, array in arrays.items() if x != name}


def add(arrays, generator):
    name = pick(arrays, generator)
    return {**arrays, f"{name[:-1]}x": arrays[name]}


def exchange(arrays, generator):
    """Two tensors of different shapes under the names of each other."""
    one, two = pick(arrays, generator), pick(arrays, generator, rank=2)
    while arrays[one].shape == arrays[two].shape:
        two = pick(arrays, generator, rank=2)
    return {**arrays, one: arrays[two], two: arrays[one]}


def transpose(arrays, generator):
    name = pick(arrays, generator, rank=2)
    while arrays[name].shape == arrays[name].T.shape:  # else nobody can see it
        name = pick(arrays, generator, rank=2)
    return {**arrays, name: np.ascontiguousarray(arrays[name].T)}


def spoil(arrays, generator):
    """A value that is not finite."""
    name = pick(arrays, generator)
    array = arrays[name].copy()
    value = generator.choice([np.nan, np.inf, -np.inf])
    array.flat[generator.integers(array.size)] = value
    return {**arrays, name: array}


OF_BYTES = (cut_to_nothing, cut_to_8_bytes, cut_in_the_header, cut, cut)
OF_BYTES += (flip, flip, flip, flip, flip, flip_the_structure, flip_the_structure)
OF_BYTES += (flip_the_structure, flip_the_structure, flip_the_structure)
OF_TENSORS = (rename, rename, remove, remove, add, add, exchange, exchange, exchange)
OF_TENSORS += (transpose, transpose, spoil, spoil, spoil)


# --- gigantic headers


def npz_header(shape, array):
    file = io.BytesIO()
    header = {"descr": "<f4", "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + array.tobytes()


def gigantic(folder):
    """The paths of new files whose headers claim more than they hold."""
    folder.mkdir()
    files, _ = whole()
    (folder / "google.npz").write_bytes(files["google.npz"])
    arrays, _ = read(folder / "google.npz")
    members = {}
    for name in ("head/kernel", "Transformer/posembed_input/pos_embedding"):
        members[name] = npz_header((24, 10**9), arrays[name])
    members["cls"] = b"\x93NUMPY\2\0\xff\xff\xff\xff" + arrays["cls"].tobytes()
    for i, (name, member) in enumerate(members.items()):
        np.savez(folder / f"{i}.npz", **{k: x for k, x in arrays.items() if k != name})
        with zipfile.ZipFile(folder / f"{i}.npz", "a") as archive:
            archive.writestr(f"{name}.npy", member)
    data = files["timm.safetensors"]
    end = 8 + int.from_bytes(data[:8], "little")
    header, values = json.loads(data[8:end]), data[end:]
    (folder / "0.safetensors").write_bytes((2**63).to_bytes(8, "little") + data[8:])
    bias, head = header["head.bias"], header["head.weight"]
    for i, new in enumerate(
        (
            {"head.weight": {**head, "shape": [2**40, 24]}},
            {"head.weight": {**head, "shape": [2**62, 2**62]}},
            {"head.weight": {**head, "data_offsets": [0, 2**62]}},
            {"head.bias": {**bias, "data_offsets": [0, 28]}},  # overlaps
            {"blocks.99999999.norm1.bias": bias},
        ),
        start=1,
    ):
        text = json.dumps({**header, **new}).encode()
        path = folder / f"{i}.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + values)
    (folder / "timm.safetensors").write_bytes(data)
    arrays, _ = read(folder / "timm.safetensors")
    state = {name: torch().tensor(x) for name, x in arrays.items()}
    for name, shape in (("head.weight", (10**9, 24)), ("pos_embed", (1, 10**9, 24))):
        huge = {**state, name: torch().zeros(1).expand(shape)}  # one value, said often
        torch().save(huge, folder / f"{name}.pth")
        torch().save(
            huge, folder / f"old {name}.pth", _use_new_zipfile_serialization=False
        )
    for name in ("google.npz", "timm.safetensors"):
        (folder / name).unlink()
    return sorted(folder.iterdir())
