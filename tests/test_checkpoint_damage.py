"""Damaged and foreign checkpoints: one sentence that names the file, or the model.

A damaged file is refused by a ValueError (or OSError), or it loads to exactly the
weights of the whole one: never another error, a crash, other weights, much memory.
"""

import json
import os
import pickle
import subprocess
import sys
import warnings
import zipfile
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from damages import (
    NAMES,
    OF_BYTES,
    OF_TENSORS,
    TOLD,
    add,
    draw_model,
    flip,
    flip_the_structure,
    gigantic,
    numbers,
    places,
    read,
    torch,
    whole,
    whole_file,
    write,
)

from keras_vit import from_checkpoint
from keras_vit.checkpoint_weights import weights

ROOT = Path(__file__).parent.parent
heavy = pytest.mark.heavy  # what reads and refuses is NumPy, on every backend
CASES = [
    (name, how, seed)
    for name in NAMES
    for seed, how in enumerate((*OF_BYTES, *OF_TENSORS))
]


def load(path, **told):
    """The weights that a file gives, or the sentence that refuses it."""
    ours = path.name.startswith("ours")
    told = {**({} if ours else TOLD), **told}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return numbers(from_checkpoint(path, **told))
    except (ValueError, OSError, ImportError) as error:
        sentence = str(error)
    assert path.name in sentence
    assert "\n" not in sentence
    assert len(sentence.replace(str(path), "")) < 500
    return sentence


def assert_whole_or_refused(found):
    expected = whole()[1]
    if isinstance(found, str):
        return
    assert set(found) == set(expected)
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, err_msg=name)


@pytest.mark.parametrize("name", NAMES)
def test_a_whole_file_is_loaded_exactly(tmp_path, name):
    (tmp_path / name).write_bytes(whole_file(name))
    found = load(tmp_path / name)
    assert isinstance(found, dict), found
    assert_whole_or_refused(found)


@pytest.mark.parametrize(
    "name, how, seed",
    [
        pytest.param(*case, marks=pytest.mark.slow if i % 5 else heavy)
        for i, case in enumerate(CASES)
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_a_damaged_file_is_refused_or_loaded_exactly(tmp_path, name, how, seed):
    generator, path = np.random.default_rng(seed), tmp_path / name
    data = whole_file(name)
    if how in OF_BYTES:
        damaged = how(data, generator, *places(name, data))
        path.write_bytes(damaged)
        assert damaged != data
    else:
        path.write_bytes(data)
        arrays, rest = read(path)
        write(path, how(arrays, generator), rest)
    found = load(path)
    assert_whole_or_refused(found)
    harmless = {flip, flip_the_structure}  # such as the date of a member of a zip file
    if name == "ours.keras":
        harmless.add(add)  # Keras ignores it
    assert isinstance(found, str) or how in harmless


# --- gigantic headers

LOAD = """
import json, resource, sys, warnings
import keras_vit  # of its memory not ru_maxrss, which a child has from its parent
warnings.simplefilter("ignore")
told, whole, paths = map(json.loads, sys.argv[1:])
def size(name):
    with open("/proc/self/status") as file:
        return 1024 * int(next(x for x in file if x.startswith(name)).split()[1])
for path in whole:  # a reader imports its library, torch's alone takes 200 MB
    keras_vit.from_checkpoint(path, **told)
limit = size("VmSize") + 2**31
resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
before, said = (size("VmHWM"), size("VmPeak")), {}
for path in paths:
    try:
        keras_vit.from_checkpoint(path, **told)
        said[path] = "loaded"
    except ValueError as error:
        said[path] = str(error)
grown = [size(x) - y for x, y in zip(("VmHWM", "VmPeak"), before)]
print(json.dumps([grown, said]))
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc, limits memory")
def test_a_gigantic_header_costs_no_memory(tmp_path):
    """Neither memory nor addresses, measured after whole files of each kind."""
    whole = [
        tmp_path / x
        for x in ("google.npz", "timm.safetensors", "zip.pth", "legacy.pth")
    ]
    for path in whole:
        path.write_bytes(whole_file(path.name))
    paths = gigantic(tmp_path / "gigantic")
    assert len(paths) == 13
    arguments = TOLD, [*map(str, whole)], [*map(str, paths)]
    command = [sys.executable, "-c", LOAD, *map(json.dumps, arguments)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr[-3000:]
    (memory, addresses), said = json.loads(answer.stdout.splitlines()[-1])
    assert {x: y for x, y in said.items() if x not in y} == {}
    assert memory < 50e6  # what they promise is 4 GB and more
    assert addresses < 500e6


# --- foreign files


class Command:
    """Runs a command where it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch '{self.marker}'",)


class Settings:
    """A class that no loader knows."""


@heavy
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin", ".keras"])
@pytest.mark.parametrize("kind", ["jpeg", "text", "hdf5", "empty", "zip", "json"])
def test_a_foreign_file_is_refused(tmp_path, kind, suffix):
    path = tmp_path / f"x{suffix}"
    if kind == "hdf5":
        with h5py.File(path, "w") as file:
            file["x"] = np.zeros(3)
    elif kind == "zip":
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("readme.txt", "hello")
    elif kind == "jpeg":
        keras.utils.save_img(path, np.zeros((8, 8, 3)), file_format="jpeg")
    else:
        text = {"text": "hello, world\n" * 9, "json": '{"a": 1}' * 9, "empty": ""}
        path.write_text(text[kind])
    assert isinstance(load(path), str)


@heavy
@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth", ".bin", ".keras"])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_is_never_run(tmp_path, suffix, protocol):
    path, marker = tmp_path / f"x{suffix}", tmp_path / "marker"
    path.write_bytes(pickle.dumps(Command(marker), protocol))
    assert isinstance(load(path), str)
    assert not marker.exists()
    pickle.loads(path.read_bytes())
    assert marker.exists()  # where it is run, this is seen


@heavy
@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("what", [Command, Settings])
def test_a_class_in_a_pth_file_is_not_unpickled(tmp_path, what, legacy):
    path, marker = tmp_path / "x.pth", tmp_path / "marker"
    thing = Command(marker) if what is Command else Settings()
    content = {"model": {"a": torch().zeros(3)}, "args": thing}
    torch().save(content, path, _use_new_zipfile_serialization=not legacy)
    sentence = load(path)
    assert isinstance(sentence, str) and "is not unpickled" in sentence
    assert not marker.exists()


@heavy
def test_an_object_array_in_npz_is_not_loaded(tmp_path):
    path, marker = tmp_path / "google.npz", tmp_path / "marker"
    path.write_bytes(whole()[0]["google.npz"])
    arrays, _ = read(path)
    arrays["head/bias"] = np.array([Command(marker)] * 7, dtype=object)
    write(path, arrays)
    sentence = load(path)
    assert "head/bias" in sentence and "object" in sentence
    assert not marker.exists()


@heavy
@pytest.mark.parametrize("name", ["timm.safetensors", "zip.pth"])
def test_two_models_in_a_file_are_named(tmp_path, name):
    path = tmp_path / name
    path.write_bytes(whole_file(name))
    arrays, _ = read(path)
    both = [(who, k) for who in ("student", "teacher") for k in arrays]
    write(path, {f"{who}.{k}": arrays[k] for who, k in both})
    sentence = load(path)
    assert "'student.'" in sentence and "'teacher.'" in sentence


# --- nothing is silently missing


def copy(name, path):
    """The tensors of a whole file, and of each the weight of ours, by its values."""
    path.write_bytes(whole_file(name))
    arrays, rest = read(path)
    ours = {}
    for tensor, array in arrays.items():
        some = array.flat[:4]
        (ours[tensor],) = (x for x, y in whole()[1].items() if np.isin(some, y).all())
    return arrays, rest, ours


@heavy
@pytest.mark.parametrize("name", ["google.npz", "timm.safetensors", "hf.safetensors"])
def test_each_tensor_that_is_missing_is_named(tmp_path, name):
    arrays, _, ours = copy(name, tmp_path / name)
    timm = {x.variable.path: x.name for x in weights(draw_model())}
    silent = []
    for tensor in arrays:
        write(tmp_path / name, {x: y for x, y in arrays.items() if x != tensor})
        found = load(tmp_path / name)
        names = tensor, ours[tensor], timm[ours[tensor]]
        if not isinstance(found, str) or not any(x in found for x in names):
            silent.append((tensor, found if isinstance(found, str) else "loaded"))
    assert not silent


@pytest.mark.parametrize("name", ["google.npz", "timm.safetensors", "hf.safetensors"])
def test_without_its_head_a_file_gives_features(tmp_path, name):
    arrays, _, ours = copy(name, tmp_path / name)
    body = {x: y for x, y in arrays.items() if not ours[x].startswith("head/")}
    assert len(arrays) - len(body) == 2
    write(tmp_path / name, body)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = from_checkpoint(tmp_path / name, **TOLD)
    assert model.output_shape == (None, 24)
    assert set(numbers(model)) == {x for x in whole()[1] if not x.startswith("head/")}


@heavy
@pytest.mark.parametrize("name", ["google.npz", "timm.safetensors", "hf.safetensors"])
@pytest.mark.parametrize("new", ["extra", "{}_x", "x.{}"])
def test_an_unknown_tensor_is_named(tmp_path, name, new):
    arrays, _, _ = copy(name, tmp_path / name)
    new = new.format(max(arrays))
    write(tmp_path / name, {**arrays, new: np.zeros((2, 3), "float32")})
    assert new in load(tmp_path / name)


@heavy
@pytest.mark.parametrize(
    "name, tensor",
    [
        ("timm.safetensors", "norm.weight"),
        ("timm.safetensors", "blocks.1.mlp.fc2.weight"),
        ("timm.safetensors", "cls_token"),
        ("timm.safetensors", "patch_embed.proj.bias"),
        ("hf.safetensors", "vit.encoder.layer.0.output.dense.bias"),
        ("google.npz", "Transformer/encoderblock_1/LayerNorm_2/scale"),
        ("google.npz", "head/bias"),
    ],
)
def test_a_wrong_shape_is_told_with_the_right_one_and_a_cause(tmp_path, name, tensor):
    arrays, _, _ = copy(name, tmp_path / name)
    right = arrays[tensor]
    wrong = np.concatenate([right, right[..., :1]], axis=-1)
    write(tmp_path / name, {**arrays, tensor: wrong})
    sentence = load(tmp_path / name)
    for part in (tensor, str(wrong.shape), str(right.shape), "damaged"):
        assert part in sentence
