import io
import json
import os
from pathlib import Path

import keras
import numpy as np
import pytest
from conftest import to_numpy
from PIL import Image

import export
import keras_vit
from export import Runtime, StatusError, export_saved_model
from export.session import strings
from export.warmup import NAME as WARMUP
from export.warmup import read_warmup
from keras_vit import CPVT, LVViT, ViT
from keras_vit.model_file import read_model

ROOT = Path(__file__).parent.parent
LABELS = ["cat", "dog", "émeu", "yak"]

# A model of any size is warmed up at 224 pixels, in batches of up to 32.
NARROW = {"embed_dim": 24, "num_heads": 3}


def build(**kwargs):
    settings = {
        "image_size": 32,
        "patch_size": 8,
        "depth": 2,
        "num_classes": 4,
        "dropout": 0.1,
        "drop_path_rate": 0.1,
    }
    return ViT("deit_tiny", **{**settings, **kwargs})


@pytest.fixture(scope="module")
def model():
    keras.utils.set_random_seed(1)
    return build(labels=list("abcd"))


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    return export_saved_model(model, folder, LABELS, top_k=3, progress=False)


@pytest.fixture(scope="module")
def runtime(artifact):
    with Runtime(artifact) as runtime:
        yield runtime


def draw(*shape):
    return np.random.default_rng(0).uniform(0, 255, shape).astype("float32")


def png(height, width, seed=0):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), "uint8")
    file = io.BytesIO()
    Image.fromarray(pixels).resize((width, height)).save(file, "PNG")
    return file.getvalue()


def test_logits_in_the_cpp_session_are_those_of_the_model(model, runtime):
    images = draw(5, 32, 32, 3)
    expected = to_numpy(model(images))
    answer = runtime.run("images", images=images)
    bound = 1e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(answer["logits"] - expected).max() <= bound
    sums = answer["probabilities"].sum(-1)
    np.testing.assert_allclose(sums, 1, atol=1e-5)


def test_names_dtypes_and_shapes_are_the_contract(runtime, artifact):
    probabilities = {"probabilities": ("DT_FLOAT", [-1, 4]), "valid": ("DT_BOOL", [-1])}
    best = {"classes": ("DT_STRING", [-1, 3]), "scores": ("DT_FLOAT", [-1, 3])}
    logits = {"logits": ("DT_FLOAT", [-1, 4])}
    file = {"image_bytes": ("DT_STRING", [-1])}
    pixels = {"images": ("DT_FLOAT", [-1, 32, 32, 3])}
    bytes_of_pixels = {"images": ("DT_UINT8", [-1, 32, 32, 3])}
    valid = {"valid": ("DT_BOOL", [-1])}
    described = {
        signature: [
            {key: (x["dtype"], x["shape"]) for key, x in found[side].items()}
            for side in ("inputs", "outputs")
        ]
        for signature, found in runtime.signatures.items()
    }
    assert described == {
        "serving_default": [file, {**probabilities, **best}],
        "strict": [file, {**probabilities, **best}],
        "images": [pixels, {**probabilities, **best, **logits}],
        "images_uint8": [bytes_of_pixels, {**probabilities, **best, **logits}],
        "classify": [{"inputs": ("DT_STRING", [-1])}, best],
        "features": [file, {"features": ("DT_FLOAT", [-1, 192]), **valid}],
        "feature_maps": [file, {"feature_map": ("DT_FLOAT", [-1, 4, 4, 192]), **valid}],
    }
    manifest = json.loads((artifact / "assets.extra/manifest.json").read_text())
    assert manifest["signatures"].keys() == described.keys()


def test_files_of_any_size_are_answered_as_the_models_own_pixels(model, runtime):
    """Against Pillow: DeiT resizes to 32 / 0.875 and crops the centre."""
    data = [png(36, 36), png(70, 90, 1), png(20, 50, 2)]
    answer = runtime.run("serving_default", image_bytes=strings(data))
    images = []
    for file in data:
        image = Image.open(io.BytesIO(file))
        scale = 36 / min(image.size)
        size = [max(36, int(side * scale)) for side in image.size]
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((side - 32) / 2) for side in image.size)
        images.append(np.asarray(image.crop((left, top, left + 32, top + 32))))
    logits = to_numpy(model(np.stack(images).astype("float32")))
    expected = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
    np.testing.assert_allclose(answer["probabilities"], expected, atol=1e-3)
    for row, best in enumerate(np.argsort(-answer["probabilities"])[:, :3]):
        names = [name.decode() for name in answer["classes"][row]]
        assert names == [LABELS[i] for i in best]
        scores = answer["probabilities"][row, best]
        np.testing.assert_allclose(answer["scores"][row], scores, atol=1e-6)


def test_requests_that_end_other_servers_get_a_status(runtime):
    wrong = [
        draw(32, 32, 3),  # rank 3
        draw(1, 40, 40, 3),
        draw(16, 40, 40, 3),
        draw(1, 32, 32, 3).astype("float64"),
        draw(1, 1, 32, 32, 3),
    ]
    for images in wrong:
        with pytest.raises(StatusError) as status:
            runtime.run("images", images=images)
        assert status.value.code == "INVALID_ARGUMENT"
    empty = runtime.run("images", images=draw(0, 32, 32, 3))
    assert empty["logits"].shape == (0, 4)
    with pytest.raises(StatusError) as status:
        runtime.run("strict", image_bytes=strings([png(9, 9), b"garbage"]))
    assert status.value.code == "INVALID_ARGUMENT"
    with pytest.raises(StatusError, match="FAILED_PRECONDITION: no signature"):
        runtime.run("nothing", images=empty["logits"])
    with pytest.raises(StatusError, match="inputs must be"):
        runtime.run("images", pixels=empty["logits"])
    assert runtime.run("images", images=draw(2, 32, 32, 3))["logits"].shape == (2, 4)


def test_what_a_server_reads_beside_the_model_is_in_the_artifact(artifact, runtime):
    extra = artifact / "assets.extra"
    assert (extra / "labels.txt").read_text().split() == LABELS
    assert (
        "max_batch_size { value: 32 }"
        in (artifact / "batching_params.pbtxt").read_text()
    )
    warm = [(name, len(*x.values())) for name, x in read_warmup(extra / WARMUP)]
    sizes = (1, 2, 4, 8, 16, 32)
    assert warm == [(name, x) for name in sorted(runtime.signatures) for x in sizes]
    readme = (artifact.parent / "bundle/README.md").read_text()
    assert all(f"| `{name}` |" in readme for name in runtime.signatures)


def test_weights_are_stored_once(artifact, model):
    stored = sum(path.stat().st_size for path in (artifact / "variables").iterdir())
    assert stored < 1.02 * 4 * model.count_params() + 20_000


@pytest.mark.slow
def test_versions_follow_each_other_and_are_never_changed(artifact, model):
    folder = artifact.parent
    assert artifact.name == "1"
    assert export_saved_model(model, folder, version=7, progress=False).name == "7"
    with pytest.raises(FileExistsError, match=r"has \[1, 7\], got 7"):
        export_saved_model(model, folder, version=7, progress=False)
    others = [f"other {label}" for label in LABELS]
    assert export_saved_model(model, folder, others, version=3, progress=False)
    names = sorted(path.name for path in folder.iterdir())
    assert names == ["1", "3", "7", "bundle"]
    bundle = folder / "bundle"  # is that of the newest
    assert "versions: 3 versions: 7" in (bundle / "models.canary.config").read_text()
    assert "Classes: 0 other" not in (bundle / "README.md").read_text()


@pytest.mark.slow
def test_a_model_file_brings_its_labels_where_no_others_are_given(
    artifact, model, tmp_path
):
    def labels(artifact):
        manifest = (artifact / "assets.extra/manifest.json").read_text()
        return json.loads(manifest)["labels"]

    assert labels(artifact) == LABELS  # given, and not those of the model
    file = tmp_path / "model.keras"
    model.save(file)
    assert labels(export_saved_model(file, tmp_path, progress=False)) == list("abcd")


def test_a_failed_export_leaves_nothing_behind(model, tmp_path, monkeypatch):
    bad = export.Report(tmp_path, (export.Check("parity", False, "0.5"),))
    monkeypatch.setattr("export.saved_model.verify", lambda *_, **__: bad)
    with pytest.raises(ValueError, match=r"does not pass verify:\nFAIL parity: 0.5"):
        export_saved_model(model, tmp_path / "m", progress=False)
    assert list((tmp_path / "m").iterdir()) == []


def test_nothing_is_exported_beside_a_configuration_that_cannot_be_read(
    model, tmp_path
):
    config = tmp_path / "m" / "bundle" / "models.config"
    config.parent.mkdir(parents=True)
    config.write_text("model_version_policy { specific { version 1 } }")
    with pytest.raises(ValueError, match="must be a ModelServerConfig in text form"):
        export_saved_model(model, tmp_path / "m", progress=False)
    assert list((tmp_path / "m").iterdir()) == [config.parent]


def test_a_rebuilt_model_that_differs_is_not_exported(model, tmp_path, monkeypatch):
    wrong = lambda *_: np.ones((4, 4))  # noqa: E731
    monkeypatch.setattr("export.saved_model.logits_on_cpu", wrong)
    backend = keras.backend.backend()
    with pytest.raises(ValueError, match=f"logits of {backend} within 1e-05, got"):
        export_saved_model(model, tmp_path / "m", progress=False)
    assert list((tmp_path / "m").iterdir()) == []


def test_one_cpvt_artifact_answers_every_size(tmp_path):
    sizes = {"patch_size": 8, "depth": 2, **NARROW}
    model = CPVT("tiny", num_classes=4, pool="mean", peg_positions=(0, 1), **sizes)
    artifact = export_saved_model(model, tmp_path / "any", progress=False)
    with Runtime(artifact) as runtime:
        for size in [(24, 24), (32, 32), (48, 48), (32, 64), (30, 21)]:
            images = draw(2, *size, 3)
            expected = to_numpy(model(images))
            logits = runtime.run("images", images=images)["logits"]
            bound = 1e-5 * max(1.0, np.abs(expected).max())
            assert np.abs(logits - expected).max() <= bound, size
        before = runtime.peak_bytes()
        for _ in range(3):  # each would be 62,500 tokens, if it came to the model
            with pytest.raises(StatusError, match="at most 1048576 pixels"):
                runtime.run("images", images=draw(1, 2000, 2000, 3))
        assert runtime.peak_bytes() - before < 300e6
        answer = runtime.run("serving_default", image_bytes=strings([png(30, 50)]))
        assert answer["probabilities"].shape == (1, 4)
        assert set(answer["classes"][0]) == {b"0", b"1", b"2", b"3"}


@pytest.mark.slow
def test_a_position_within_the_attention_is_exported(tmp_path):
    """`export_saved_model` publishes nothing whose logits are not the model's."""
    sizes = {"image_size": None, "position_grid": (4, 4), **NARROW}
    model = build(position="relative", **sizes)
    artifact = export_saved_model(model, tmp_path / "model", progress=False)
    images = draw(2, 40, 24, 3)
    with Runtime(artifact) as runtime:
        logits = runtime.run("images", images=images)["logits"]
    np.testing.assert_allclose(logits, to_numpy(model(images)), atol=2e-5)


@pytest.mark.slow
def test_the_maps_of_chosen_blocks_are_answered_from_files(tmp_path):
    """What is folded into weights for the export stays within the blocks."""
    sizes = {"image_size": (32, 24), "crop_ratio": None, "layer_scale": 0.1, **NARROW}
    model = build(position="learned_peg", num_registers=2, **sizes)
    artifact = export_saved_model(
        model, tmp_path / "model", features=["block0", -1, "peg0"], progress=False
    )
    files = [png(32, 24, seed) for seed in (1, 2)]
    with Runtime(artifact) as runtime:
        found = runtime.run("feature_maps", image_bytes=strings(files))
    images = [np.asarray(Image.open(io.BytesIO(file))) for file in files]
    images = np.stack(images).astype("float32")
    expected = keras_vit.features(model, ["block0", -1, "peg0"])(images)
    assert found.pop("valid").all()
    assert found.keys() == expected.keys() == {"block0", "block1", "peg0"}
    for name, grid in expected.items():
        assert found[name].shape == (2, 4, 3, 24)
        np.testing.assert_allclose(found[name], to_numpy(grid), atol=2e-5)
    with pytest.raises(ValueError, match=r"layers must be in 0\.\.1, the blocks of"):
        export_saved_model(model, tmp_path / "other", features=[2], progress=False)
    with pytest.raises(ValueError, match=r"export the model itself, with features=\["):
        some = keras_vit.features(model, [0, 1])
        export_saved_model(some, tmp_path / "other", progress=False)
    dense = keras_vit.SemanticFPN(build(num_classes=0), num_classes=3)
    with pytest.raises(ValueError, match=r"features are those of a classifier, got"):
        export_saved_model(dense, tmp_path / "other", features=[0], progress=False)
    assert not (tmp_path / "other").exists()


@pytest.mark.slow
def test_both_heads_of_an_lvvit_are_exported(tmp_path):
    """`verify`, without which nothing is published, asks for wrong ranks too."""
    sizes = {"patch_size": 8, "depth": 2, "stem_width": 8, **NARROW}
    model = LVViT("tiny", image_size=None, num_classes=4, **sizes)
    artifact = export_saved_model(model, tmp_path / "lvvit", progress=False)
    images = draw(2, 40, 20, 3)
    with Runtime(artifact) as runtime:
        logits = runtime.run("images", images=images)["logits"]
    nodes = [model.get_layer(name).output for name in ("head", "token_head")]
    of_class, of_tokens = keras.Model(model.input, nodes)(images)
    expected = to_numpy(of_class) + 0.5 * to_numpy(of_tokens).max((1, 2))
    np.testing.assert_allclose(logits, expected, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_a_mixed_precision_model_answers_in_float32(tmp_path, policy):
    keras.config.set_dtype_policy(policy)
    artifact = export_saved_model(build(), tmp_path / "half", progress=False)
    with Runtime(artifact) as runtime:
        logits = runtime.run("images", images=draw(2, 32, 32, 3))["logits"]
    assert logits.dtype == "float32" and np.isfinite(logits).all()


def test_what_cannot_be_exported_is_refused(model, tmp_path):
    with pytest.raises(ValueError, match="must name the model's 4 classes, got 2"):
        export_saved_model(model, tmp_path, ["a", "b"])
    with pytest.raises(FileNotFoundError, match="There is no model file"):
        export_saved_model(tmp_path / "nowhere.keras", tmp_path)
    model.save(tmp_path / "model.keras")
    read_model(tmp_path / "model.keras")
    os.truncate(tmp_path / "model.keras", 3000)
    with pytest.raises(ValueError, match=r"must be a .keras file; it is damaged"):
        export_saved_model(tmp_path / "model.keras", tmp_path / "out")
    assert not (tmp_path / "out").exists()
