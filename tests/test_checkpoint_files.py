"""Files as others write them: folders, shards, precisions, wrappers, prefixes."""

import argparse
import functools
import json
import re
import subprocess
import sys
from pathlib import Path

import keras
import ml_dtypes
import numpy as np
import pytest
from conftest import to_numpy
from test_checkpoint import write

from keras_vit import ViT, from_checkpoint, inspect_checkpoint, to_checkpoint
from keras_vit.checkpoint_weights import weights

ROOT = Path(__file__).parent.parent
pytestmark = pytest.mark.first  # it does not depend on the backend
SIZES = {"image_size": 32, "patch_size": 16, "embed_dim": 24, "num_heads": 3}
MODEL = {**SIZES, "depth": 1, "num_classes": 5, "normalization": "inception"}
TOLD = {"num_heads": 3, "normalization": "inception", "gelu": "tanh"}
IMAGES = np.random.default_rng(1).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
PRECISIONS = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F64": np.float64}


@functools.cache
def draw(**kwargs):
    """A model with random weights, and these by timm's names."""
    model = ViT("tiny", **{**MODEL, **kwargs})
    generator = np.random.default_rng(0)
    for weight in model.weights:
        weight.assign(generator.normal(0, 0.5, weight.shape).astype("float32"))
    return model, {x.name: x.to_theirs(to_numpy(x.variable)) for x in weights(model)}


def assert_same(model, expected, atol=1e-4):
    found = model.predict_on_batch(IMAGES)
    wanted = expected.predict_on_batch(IMAGES)
    assert np.ptp(wanted) > 0.1
    np.testing.assert_allclose(found, wanted, atol=atol)


def assert_weights(model, state):
    for weight in weights(model):
        found = weight.to_theirs(to_numpy(weight.variable))
        expected = np.asarray(state[weight.name], "float32")
        np.testing.assert_array_equal(found, expected, err_msg=weight.name)


# --- folders


def folder_of(tmp_path, layout):
    """As others publish it: without our description in the file."""
    model, _ = draw(gelu="quick", epsilon=1e-3, labels=("a", "b", "c", "d", "e"))
    to_checkpoint(model, tmp_path / layout, layout=layout)
    path = tmp_path / layout / "model.safetensors"
    from safetensors.numpy import load_file, save_file

    save_file(load_file(path), path)
    return model, path.parent


def test_the_configuration_in_a_folder_is_believed(tmp_path):
    model, folder = folder_of(tmp_path, "hf")
    assert len(list(folder.iterdir())) == 3  # the weights, two configurations
    loaded = from_checkpoint(folder)
    assert_same(loaded, model)
    arguments = inspect_checkpoint(folder).arguments
    for name, value in (("epsilon", 1e-3), ("gelu", "quick"), ("num_heads", 3)):
        assert arguments[name] == value
    assert arguments["labels"] == ("a", "b", "c", "d", "e")


def test_a_damaged_configuration_is_named(tmp_path):
    _, folder = folder_of(tmp_path, "hf")
    for text in ("{", "[1]", '{"model_type": "bert"}', '{"model_type": "vit", '):
        (folder / "config.json").write_text(text)
        with pytest.raises(ValueError, match=r"config\.json") as error:
            inspect_checkpoint(folder)
        assert "\n" not in str(error.value)


def test_a_folder_holds_one_checkpoint(tmp_path):
    model, state = draw()
    with pytest.raises(FileNotFoundError, match="must hold a checkpoint"):
        from_checkpoint(tmp_path)
    write(tmp_path / "one.npz", state)
    assert_weights(from_checkpoint(tmp_path, **TOLD), state)
    write(tmp_path / "two.safetensors", state)
    with pytest.raises(ValueError, match=r"one\.npz, two\.safetensors; name the file"):
        from_checkpoint(tmp_path, **TOLD)
    write(tmp_path / "model.safetensors", state)  # the name of all hubs
    assert_same(from_checkpoint(tmp_path, **TOLD), model)
    with pytest.raises(FileNotFoundError, match="'hf:owner/name'"):
        from_checkpoint("owner/name")


def write_shards(folder, state):
    names = sorted(state)
    parts = {"model-00001-of-00002.safetensors": names[::2]}
    parts["model-00002-of-00002.safetensors"] = names[1::2]
    for part, some in parts.items():
        write(folder / part, {name: state[name] for name in some})
    index = {name: part for part, some in parts.items() for name in some}
    text = json.dumps({"metadata": {"total_size": 1}, "weight_map": index})
    (folder / "model.safetensors.index.json").write_text(text)
    return list(parts)


def test_shards_are_one_checkpoint(tmp_path):
    model, state = draw()
    parts = write_shards(tmp_path, state)
    assert_same(from_checkpoint(tmp_path, **TOLD), model)
    assert inspect_checkpoint(tmp_path, **TOLD).used == len(state)
    *rest, lost = sorted(state)[1::2]
    write(tmp_path / parts[1], {name: state[name] for name in rest})
    with pytest.raises(ValueError, match=f"lacks the tensors {lost}"):
        from_checkpoint(tmp_path, **TOLD)
    (tmp_path / parts[1]).unlink()
    with pytest.raises(FileNotFoundError, match=f"{parts[1]}, which is not there"):
        from_checkpoint(tmp_path, **TOLD)
    (tmp_path / "model.safetensors.index.json").write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="must say in 'weight_map'"):
        from_checkpoint(tmp_path, **TOLD)


# --- precisions


def write_safetensors(path, state):
    """The format by hand: safetensors' own writer for NumPy may lack bfloat16."""
    header, place = {}, 0
    words = {np.dtype(kind): word for word, kind in PRECISIONS.items()}
    for name, array in state.items():
        header[name] = {
            "dtype": words[array.dtype],
            "shape": array.shape,
            "data_offsets": [place, place := place + array.nbytes],
        }
    text = json.dumps(header).encode()
    values = b"".join(np.ascontiguousarray(x).tobytes() for x in state.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + values)


@pytest.mark.parametrize("suffix", [".npz", ".safetensors", ".pth"])
@pytest.mark.parametrize("word", PRECISIONS)
def test_every_precision_is_loaded_as_it_is(tmp_path, word, suffix):
    _, state = draw()
    path = tmp_path / f"x{suffix}"
    if suffix == ".pth":
        torch = pytest.importorskip("torch")
        kinds = {"BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
        tensors = {k: torch.tensor(x).to(kinds[word]) for k, x in state.items()}
        torch.save(tensors, path)
    rounded = {name: x.astype(PRECISIONS[word]) for name, x in state.items()}
    if suffix == ".npz":
        write(path, rounded)
        kind = np.load(path)["norm.weight"].dtype
        assert kind == ("V2" if word == "BF16" else PRECISIONS[word])
    elif suffix == ".safetensors":
        write_safetensors(path, rounded)
    model = from_checkpoint(path, **TOLD)
    assert_weights(model, rounded)
    assert (word == "F64") == (rounded["head.bias"] == state["head.bias"]).all()


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_integers_are_no_weights(tmp_path, suffix):
    _, state = draw()
    path = tmp_path / f"x{suffix}"
    write(path, {**state, "norm.weight": np.ones(24, "int64")})
    with pytest.raises(ValueError, match=r"norm\.weight.*floating-point.*int64"):
        from_checkpoint(path, **TOLD)


# --- what stands around the weights in a .pth file


@pytest.mark.parametrize(
    "wrapper, rest",
    [
        (None, ()),
        ("model", ("optimizer", "epoch", "args")),
        ("state_dict", ("state_dict_ema", "args", "epoch", "arch")),
    ],
)
@pytest.mark.parametrize("prefix", ["", "module."])
def test_wrappers_and_prefixes_of_trainings_are_known(tmp_path, wrapper, rest, prefix):
    torch = pytest.importorskip("torch")
    _, state = draw()
    tensors = {f"{prefix}{k}": torch.tensor(x) for k, x in state.items()}
    beside = {
        "optimizer": {"state": {0: {"step": 3}}, "param_groups": [{"lr": 0.1}]},
        "state_dict_ema": {name: x + 1 for name, x in tensors.items()},
        "args": argparse.Namespace(lr=0.1, model="vit", opt_betas=None),
        "epoch": 3,
        "arch": "vit",
    }
    content = {wrapper: tensors, **{key: beside[key] for key in rest}}
    torch.save(content if wrapper else tensors, tmp_path / "x.pth")
    assert_weights(from_checkpoint(tmp_path / "x.pth", **TOLD), state)
    report = inspect_checkpoint(tmp_path / "x.pth", **TOLD)
    assert set(report.left_out) == set(rest)
    assert all(repr(wrapper) in reason for reason in report.left_out.values())
    assert report.used == len(state)


# --- Google's names, old and new


def google_names(state, heads=3):
    """The inverse of `checkpoint_layouts`: big_vision's names and shapes."""
    found = {}
    for name, array in state.items():
        if match := re.fullmatch(r"(blocks\.\d+\.attn|attn_pool)\.q?kv\.(\w+)", name):
            letters = "qkv" if "qkv" in name else "kv"
            parts = np.split(array, len(letters))
            for letter, part in zip(letters, parts, strict=True):
                found[f"{match[1]}.{letter}.{match[2]}"] = part
        else:
            found[name] = array
    table = [
        (r"patch_embed\.proj", "embedding"),
        (r"cls_token", "cls"),
        (r"pos_embed", "pos_embedding"),
        (r"blocks\.(\d+)\.", r"Transformer/encoderblock_\1/"),
        (r"/norm1", "/LayerNorm_0"),
        (r"/norm2", "/LayerNorm_1"),
        (r"^norm\.", "Transformer/encoder_norm."),
        (r"attn_pool\.latent", "MAPHead_0/probe"),
        (r"attn_pool\.norm", "MAPHead_0/LayerNorm_0"),
        (r"attn_pool\.mlp", "MAPHead_0/mlp"),
        (r"attn_pool\.", "MAPHead_0/attn."),
        (r"attn\.", "MultiHeadDotProductAttention_0/"),
        (r"mlp\.fc1", "MlpBlock_0/Dense_0"),
        (r"mlp\.fc2", "MlpBlock_0/Dense_1"),
        (r"pre_logits\.fc", "pre_logits"),
        *((rf"/{x[0]}\.", f"/{x}.") for x in ("query", "key", "value")),
        (r"_0/proj\.", "_0/out."),
        (r"(norm|LayerNorm_\d)\.weight", r"\1/scale"),
        (r"\.weight", "/kernel"),
        (r"\.bias", "/bias"),
    ]
    renamed = {}
    for name, array in found.items():
        for theirs, ours in table:
            name = re.sub(theirs, ours, name)
        renamed[name] = _google_shape(name, array, heads)
    return renamed


def _google_shape(name, array, heads):
    if name == "embedding/kernel":
        return array.transpose(2, 3, 1, 0)
    if name.endswith("out/kernel"):
        return array.T.reshape(heads, -1, array.shape[0])
    if re.search("(query|key|value)/bias", name):
        return array.reshape(heads, -1)
    if re.search("(query|key|value)/kernel", name):
        return array.T.reshape(array.shape[1], heads, -1)
    return array.T if name.endswith("/kernel") else array


def scanned(state):
    """Blocks stacked along a first axis, as `scan=True` of big_vision keeps them."""
    stacks, stacked = {}, {}
    for name, array in state.items():
        if match := re.fullmatch(r"Transformer/encoderblock_(\d+)/(.+)", name):
            stacks.setdefault(match[2], {})[int(match[1])] = array
        else:
            stacked[name] = array
    for name, arrays in stacks.items():
        rows = [arrays[i] for i in sorted(arrays)]
        stacked[f"Transformer/encoderblock/{name}"] = np.stack(rows)
    return stacked


BIG_VISION = {  # scanned or not
    "tok": (False, {"class_position": False}),
    "gap": (True, {"pool": "mean"}),
    "map": (False, {"pool": "attention"}),
    "gap with pre_logits": (True, {"pool": "mean", "representation_size": 16}),
    "features": (True, {"pool": "attention", "num_classes": 0}),
}


@pytest.mark.parametrize("kind", BIG_VISION)
def test_big_vision_is_read(tmp_path, kind):
    scan, arguments = BIG_VISION[kind]
    model, state = draw(depth=2, **arguments)
    renamed = google_names(state)
    assert renamed["pos_embedding"].shape == (1, 4, 24)
    assert ("cls" in renamed) == (kind == "tok")
    path = write(tmp_path / "x.npz", scanned(renamed) if scan else renamed)
    assert_same(from_checkpoint(path), model)  # such a file tells everything
    report = inspect_checkpoint(path)
    assert (report.layout, report.fresh, report.left_out) == ("google", {}, {})
    size = "representation_size"
    assert report.arguments[size] == arguments.get(size)


@pytest.mark.parametrize(
    "prefix, beside",
    [
        ("opt/target/", ("opt/state/step", "opt/state/param_states/head/bias/grad")),
        ("params/", ()),
        ("params/", ("opt/0/mu/head/bias", "opt/0/mu/embedding/kernel", "extra/step")),
        ("params/img/", ("params/txt/head/kernel", "params/t", "params/b")),
    ],
)
def test_only_the_image_tower_is_read_and_the_rest_is_named(tmp_path, prefix, beside):
    _, state = draw(pool="attention")
    renamed = {f"{prefix}{name}": x for name, x in google_names(state).items()}
    shapes = {"opt/0/mu/embedding/kernel": (16, 16, 3, 24)}
    rest = {name: np.zeros(shapes.get(name, 3), "float32") for name in beside}
    path = write(tmp_path / "x.npz", {**rest, **renamed})
    assert_weights(from_checkpoint(path), state)
    assert set(inspect_checkpoint(path).left_out) == set(beside)


# --- names that lie, libraries that lack


@pytest.mark.parametrize(
    "kind, name",
    [
        (".npz", "x.safetensors"),
        (".safetensors", "x.npz"),
        (".safetensors", "x.pth"),
        (".pth", "x.npz"),
        (".npz", "x"),
    ],
)
def test_the_content_of_a_file_tells_its_kind(tmp_path, kind, name):
    _, state = draw()
    write(tmp_path / f"right{kind}", state).rename(tmp_path / name)
    assert_weights(from_checkpoint(tmp_path / name, **TOLD), state)


WITHOUT = """
import json, sys, warnings
class NoTorch:
    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "torch":
            raise ModuleNotFoundError(f"No module named {name!r}")
sys.meta_path.insert(0, NoTorch)
import keras_vit
warnings.simplefilter("ignore")
told, *paths = sys.argv[1:]
answers = {}
for path in paths:
    try:
        model = keras_vit.from_checkpoint(path, **json.loads(told))
        answers[path] = model.count_params()
    except ImportError as error:
        answers[path] = str(error)
print(json.dumps(answers))
"""


@pytest.mark.skipif(
    keras.backend.backend() == "torch",
    reason="the child has no torch, and Keras on PyTorch does not start without it",
)
def test_only_pth_files_need_torch(tmp_path):
    model, state = draw()
    paths = [write(tmp_path / f"x.{x}", state) for x in ("npz", "safetensors", "pth")]
    command = [sys.executable, "-c", WITHOUT, json.dumps(TOLD), *map(str, paths)]
    answer = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert answer.returncode == 0, answer.stderr[-3000:]
    npz, safetensors, pth = json.loads(answer.stdout.splitlines()[-1]).values()
    assert npz == safetensors == model.count_params()
    for part in ("x.pth", "pip install torch", "as .safetensors"):
        assert part in pth
