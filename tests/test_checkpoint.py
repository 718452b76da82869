"""`from_checkpoint` on the golden files, its overrides, its questions, its report."""

import re
import sys
import warnings
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import first, to_numpy

import keras_vit
from benchmarks import checkpoint as benchmark
from keras_vit import from_checkpoint, inspect_checkpoint, to_checkpoint
from keras_vit.checkpoint import load
from keras_vit.checkpoint_weights import resample_patches
from keras_vit.resampling import resize_matrix

GOLDEN = Path(__file__).parent / "golden"
TOLD = {  # what the tensors do not tell
    "timm_vit": {"num_heads": 3},
    "timm_deit_distilled": {"num_heads": 3},
    "timm_twins_pcpvt": {"num_heads": (1, 2, 5, 8)},
    "hf_vit": {"num_heads": 3},
    "cpvt_cls_1peg": {"num_heads": 3},
    "lvvit": {"num_heads": 2, "residual_scale": 2.0},
    "google_vit": {},
}
FAMILIES = {"timm_twins_pcpvt": "PCPVT", "cpvt_cls_1peg": "CPVT", "lvvit": "LVViT"}


def golden(name):
    """The arrays of a golden file, and the state dict in it."""
    if name == "google_vit":
        file = dict(np.load(GOLDEN / "google_vit.golden.npz"))
        return file, dict(np.load(GOLDEN / "google_vit.checkpoint.npz"))
    file = dict(np.load(GOLDEN / f"{name}.npz"))
    return file, {k[6:]: x for k, x in file.items() if k.startswith("state/")}


def published_names(state):
    """Google's names of today to those of the files that are published."""
    for new, old in (
        ("LayerNorm_1", "LayerNorm_2"),
        ("MultiHeadDotProductAttention_0", "MultiHeadDotProductAttention_1"),
        ("MlpBlock_0", "MlpBlock_3"),
    ):
        state = {name.replace(new, old): x for name, x in state.items()}
    return state


def old_names(state):
    """Names of transformers 5.23 to those of the files on the hub."""
    table = [
        (r"vit\.layers", "vit.encoder.layer"),
        (r"attention\.(q|k|v)_proj", r"attention.attention.\1_proj"),
        (r"q_proj", "query"),
        (r"k_proj", "key"),
        (r"v_proj", "value"),
        (r"attention\.o_proj", "attention.output.dense"),
        (r"mlp\.fc1", "intermediate.dense"),
        (r"mlp\.fc2", "output.dense"),
    ]
    for new, old in table:
        state = {re.sub(new, old, name): x for name, x in state.items()}
    return state


def write(path, state):
    """A state dict as a file of the kind that its name says."""
    state = {name: np.ascontiguousarray(x) for name, x in state.items()}
    if path.suffix == ".npz":
        np.savez(path, **state)
    elif path.suffix == ".safetensors":
        from safetensors.numpy import save_file

        save_file(state, path)
    else:
        torch = pytest.importorskip("torch")  # a .pth is torch's own format
        tensors = {name: torch.from_numpy(x.copy()) for name, x in state.items()}
        torch.save({"model": tensors, "epoch": 300}, path)
    return path


def check(path, file, told):
    model, report = load(path, normalization=None, **told)
    logits = file["eval_logits"] if "eval_logits" in file else file["logits"]
    found = model.predict_on_batch(file["images_nhwc"])
    np.testing.assert_allclose(found, logits, atol=1e-4)
    assert report.parameters == model.count_params()
    return report


@pytest.mark.parametrize(
    "suffix",
    [
        ".safetensors",
        pytest.param(".npz", marks=(pytest.mark.slow, pytest.mark.first)),
        pytest.param(".pth", marks=(pytest.mark.slow, pytest.mark.first)),
    ],
)
@pytest.mark.parametrize(
    "name",  # of the others a test of the model itself asks on every backend
    [x if x in ("hf_vit", "google_vit") else first(x) for x in TOLD],
)
def test_logits_equal_the_published_code_from_every_kind_of_file(
    tmp_path, name, suffix
):
    file, state = golden(name)
    path = write(tmp_path / f"weights{suffix}", state)
    report = check(path, file, TOLD[name])
    assert report.family == FAMILIES.get(name, "ViT")
    assert report.fresh == {} and report.used == len(
        [name for name in state if name not in report.left_out]
    )
    assert all(re.search("epoch|num_batches_tracked", x) for x in report.left_out)


@pytest.mark.first
@pytest.mark.parametrize(
    "name, rename", [("google_vit", published_names), ("hf_vit", old_names)]
)
def test_published_names_are_read_too(tmp_path, name, rename):
    file, state = golden(name)
    renamed = rename(state)
    assert len(set(renamed) - set(state)) > 20
    check(write(tmp_path / "x.safetensors", renamed), file, TOLD[name])


@pytest.mark.heavy
@pytest.mark.parametrize("name", ["timm_vit", "hf_vit", "google_vit", "lvvit"])
def test_at_another_size_it_is_the_resampled_table(tmp_path, name):
    """A static size, and the same at run time: the table of the file, resampled."""
    method = {"timm_vit": "bicubic_antialias", "google_vit": "linear_corners"}
    _, state = golden(name)
    path = write(tmp_path / "x.safetensors", state)
    told = {"normalization": None, **TOLD[name]}
    dynamic = from_checkpoint(path, image_size=None, **told)
    assert dynamic.get_layer("position").resampling == method.get(name, "bicubic")
    x = np.random.default_rng(0).normal(size=(2, 32, 80, 3)).astype("float32")
    fixed = from_checkpoint(path, image_size=(32, 80), **told)
    assert fixed.input_shape == (None, 32, 80, 3)
    np.testing.assert_allclose(
        dynamic.predict_on_batch(x), fixed.predict_on_batch(x), atol=1e-4
    )
    notes = inspect_checkpoint(path, image_size=(32, 80), **told).notes
    assert "to 2 x 5" in notes[0]


@pytest.mark.heavy
def test_other_classes_are_a_fresh_head_and_that_is_said():
    path = GOLDEN / "timm_deit_distilled.npz"
    told = {"num_heads": 3, "normalization": None}
    with pytest.warns(
        UserWarning, match="num_classes=5, to be trained: head, head_dist"
    ):
        model = from_checkpoint(path, num_classes=5, **told)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        whole = from_checkpoint(path, num_classes=7, **told)  # as in the file
        bare = from_checkpoint(path, num_classes=0, **told)
    images = golden("timm_deit_distilled")[0]["images_nhwc"]
    nodes = [x.get_layer("norm").output for x in (model, whole)]
    tokens = [
        keras.Model(x.input, y).predict_on_batch(images)
        for x, y in zip((model, whole), nodes, strict=True)
    ]
    np.testing.assert_array_equal(*tokens)
    features = (tokens[1][:, 0] + tokens[1][:, 1]) / 2
    np.testing.assert_allclose(bare.predict_on_batch(images), features, atol=1e-6)
    report = inspect_checkpoint(path, num_classes=5, **told)
    assert set(report.fresh) == {
        f"{head}/{x}" for head in ("head", "head_dist") for x in ("kernel", "bias")
    }
    assert {x for x in report.left_out if "head" in x} == {
        f"state/{head}.{x}"
        for head in ("head", "head_dist")
        for x in ("weight", "bias")
    }


@pytest.mark.first
def test_a_fresh_head_of_lvvit_leaves_the_token_head_out():
    """Facts: an untrained token head would only add noise."""
    told = {"normalization": None, **TOLD["lvvit"]}
    report = inspect_checkpoint(GOLDEN / "lvvit.npz", num_classes=3, **told)
    assert report.arguments["token_weight"] == 0
    assert "noise" in report.left_out["state/aux_head.weight"]
    report = inspect_checkpoint(
        GOLDEN / "lvvit.npz", num_classes=3, token_weight=0.5, **told
    )
    assert {"token_head/kernel", "head/kernel"} <= set(report.fresh)


@pytest.mark.first
def test_what_a_file_does_not_tell_is_asked_for_at_once():
    with pytest.raises(ValueError, match=r"num_heads= .*; normalization= ") as error:
        from_checkpoint(GOLDEN / "timm_vit.npz")
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"num_heads= .*; residual_scale= "):
        from_checkpoint(GOLDEN / "lvvit.npz", normalization=None)
    with pytest.raises(ValueError, match=r"num_heads= .* of each stage"):
        from_checkpoint(GOLDEN / "timm_twins_pcpvt.npz")


@pytest.mark.first
def test_published_sizes_tell_their_heads_and_it_is_said(tmp_path):
    model = keras_vit.ViT("deit_tiny", image_size=32, depth=1, num_classes=2)
    path = tmp_path / "x.safetensors"
    to_checkpoint(model, path)
    _drop_description(path)
    with pytest.warns(UserWarning, match="assumed num_heads=3"):
        loaded = from_checkpoint(path, normalization="imagenet", epsilon=1e-6)
    assert loaded.get_layer("block0").attention.num_heads == 3


def _drop_description(path):
    from safetensors.numpy import load_file, save_file

    save_file(load_file(path), path)


@pytest.mark.first
def test_a_table_that_is_not_square_needs_its_grid(tmp_path):
    model = keras_vit.ViT("tiny", image_size=(32, 80), depth=1, num_classes=2)
    for variable in model.weights:
        variable.assign(np.random.default_rng(0).normal(size=variable.shape))
    path = tmp_path / "x.safetensors"
    to_checkpoint(model, path)
    _drop_description(path)
    told = {"normalization": "inception", "gelu": "tanh"}
    with pytest.raises(ValueError, match="table_grid= "):
        from_checkpoint(path, **told)
    with pytest.raises(ValueError, match=r"table_grid=\(3, 4\) must fit the 11 rows"):
        from_checkpoint(path, table_grid=(3, 4), **told)
    with pytest.warns(UserWarning, match="assumed num_heads=3"):
        loaded = from_checkpoint(path, table_grid=(2, 5), **told)
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 80, 3)).astype("float32")
    np.testing.assert_array_equal(loaded.predict_on_batch(x), model.predict_on_batch(x))


@pytest.mark.first
def test_resized_patches_keep_their_tokens():
    """<B x B^T, W'> = <x, W> for every patch x, where patches grow."""
    rng = np.random.default_rng(0)
    kernel = rng.normal(size=(5, 3, 8, 8)).astype("float32")
    patch = rng.normal(size=(3, 8, 8))
    for side in (8, 12, 16):
        matrix = resize_matrix(side, 8, "linear").astype("float64")
        larger = matrix @ patch @ matrix.T
        found = np.einsum("dcij,cij->d", resample_patches(kernel, side), larger)
        expected = np.einsum("dcij,cij->d", kernel, patch)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_another_patch_size_is_said_and_keeps_the_grid_of_tokens():
    """Twice the pixels in patches twice as large: nearly the same tokens."""
    told = {"num_heads": 3, "normalization": None}
    path = GOLDEN / "timm_vit.npz"
    with pytest.warns(UserWarning, match="kernel resampled from 16 x 16 to 32 x 32"):
        model = from_checkpoint(path, patch_size=32, image_size=128, **told)
    images = golden("timm_vit")[0]["images_nhwc"]
    matrix = resize_matrix(32, 16, "linear")
    patches = images.reshape(2, 4, 16, 4, 16, 3)
    large = np.einsum("ip,bhpwqc,jq->bhiwjc", matrix, patches, matrix)
    found = model.predict_on_batch(large.reshape(2, 128, 128, 3))
    expected = golden("timm_vit")[0]["logits"]
    np.testing.assert_allclose(found, expected, atol=1e-3)


@pytest.mark.first
def test_an_override_that_contradicts_the_file_is_an_error():
    told = {"num_heads": 3, "normalization": None}
    path = GOLDEN / "timm_vit.npz"
    with pytest.raises(ValueError, match=r"\(48, 3, 16, 16\).*Leave out .*embed_dim="):
        from_checkpoint(path, embed_dim=96, **told)
    with pytest.raises(ValueError, match=r"no place for: state/blocks\.2"):
        from_checkpoint(path, depth=2, **told)
    with pytest.raises(ValueError, match="Did you mean 'image_size'"):
        from_checkpoint(path, imagesize=32, **told)
    with pytest.raises(ValueError, match="must hold a vision transformer"):
        from_checkpoint(GOLDEN / "position_resampling.npz")


@pytest.mark.first
def test_a_class_token_without_a_position_is_a_guess_that_is_said(tmp_path):
    """2 x 4 patches and a class token have 9 rows, as 3 x 3 patches alone."""
    model = keras_vit.ViT("tiny", image_size=(32, 64), depth=1, num_classes=2)
    path = tmp_path / "x.safetensors"
    to_checkpoint(model, path)
    _drop_description(path)
    with pytest.warns(UserWarning, match=r"assumed table_grid=\(3, 3\)"):
        from_checkpoint(path, normalization="inception", gelu="tanh")


@pytest.mark.heavy
def test_it_is_built_again_from_our_own_file(tmp_path):
    """A `.keras` file is a checkpoint too: for another size, other classes."""
    model = keras_vit.CPVT(
        "tiny", image_size=32, depth=2, num_classes=2, labels=("cat", "dog")
    )
    model.save(tmp_path / "cpvt.keras")
    copy = from_checkpoint(tmp_path / "cpvt.keras")
    x = np.random.default_rng(0).uniform(0, 255, (2, 32, 32, 3)).astype("float32")
    np.testing.assert_array_equal(copy.predict_on_batch(x), model.predict_on_batch(x))
    assert keras_vit.class_labels(copy) == ("cat", "dog")
    with pytest.warns(UserWarning, match="fresh because of num_classes=5"):
        other = from_checkpoint(tmp_path / "cpvt.keras", num_classes=5, image_size=48)
    assert other.output_shape == (None, 5) and other.input_shape[1:3] == (48, 48)
    assert keras_vit.class_labels(other) is None
    with pytest.warns(UserWarning, match="the head is that of other labels"):
        from_checkpoint(tmp_path / "cpvt.keras", labels=("a", "b"))
    for a, b in zip(
        model.get_layer("block1").weights,
        other.get_layer("block1").weights,
        strict=True,
    ):
        np.testing.assert_array_equal(to_numpy(a), to_numpy(b))


@pytest.mark.first
def test_the_report_says_what_a_person_needs():
    told = {"normalization": None, "image_size": 96, "num_classes": 3}
    text = str(inspect_checkpoint(GOLDEN / "google_vit.checkpoint.npz", **told))
    for pattern in (
        r"model +keras_vit\.ViT",
        r"position table +4 x 4 patches",
        r"num_classes +3",
        r"note +position table resampled from 4 x 4 to 6 x 6 \(linear_corners\)",
        r"fresh +head/kernel, head/bias: num_classes=3",
        r"left out +head/bias, head/kernel: num_classes=3",
    ):
        assert re.search(pattern, text), pattern


def test_half_precision_policies_keep_the_weights_in_float32():
    keras.config.set_dtype_policy("mixed_bfloat16")
    model = from_checkpoint(GOLDEN / "timm_vit.npz", num_heads=3, normalization=None)
    assert {keras.backend.standardize_dtype(v.dtype) for v in model.weights} == {
        "float32"
    }
    state = golden("timm_vit")[1]
    kernel = to_numpy(model.get_layer("block0").attention.qkv.kernel)
    np.testing.assert_array_equal(kernel, state["blocks.0.attn.qkv.weight"].T)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    "suffix", ["safetensors", pytest.param("npz", marks=pytest.mark.first)]
)
def test_loading_takes_less_than_two_and_a_half_times_the_file(tmp_path, suffix):
    tiny = benchmark.write(tmp_path / f"tiny.{suffix}", benchmark.TINY)
    path = benchmark.write(tmp_path / f"base.{suffix}", benchmark.BASE)
    for _ in range(3):  # JAX frees when it likes: 2.0 to 2.6 from run to run
        row = benchmark.measure(path, tiny)
        if row["ratio"] < 2.5:
            break
    path.unlink()
    assert row["parameters"] == 86_567_656 and row["file"] > 346e6
    assert 1 < row["ratio"] < 2.5
