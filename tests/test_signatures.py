"""The signatures of a model of a class for every pixel."""

import io

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import to_numpy
from PIL import Image
from test_export import draw, png
from test_verify import flip

from export import Runtime, StatusError, export_saved_model, verify
from export.predict import predict_files
from export.session import strings
from export.signatures import Contract, Servable, signatures
from keras_vit import PCPVT, SemanticFPN, ViT
from keras_vit.embedding import Preprocess
from keras_vit.vit import POSITIONS


def build(**kwargs):
    sizes = {"embed_dims": (8, 16, 24, 32), "num_heads": (1, 2, 3, 4)}
    backbone = PCPVT("small", depths=(1, 1, 1, 1), num_classes=0, **sizes, **kwargs)
    return SemanticFPN(backbone, 5, channels=16)


@pytest.fixture(scope="module")
def model():
    return build()


@pytest.fixture(scope="module")
def artifact(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "scenes"
    return export_saved_model(model, folder, list("abcde"), progress=False)


@pytest.fixture(scope="module")
def runtime(artifact):
    with Runtime(artifact) as runtime:
        yield runtime


def decoded(data):
    return np.asarray(Image.open(io.BytesIO(data)))


@pytest.mark.parametrize("size", [(64, 64), (96, 96), (40, 72), (30, 21)])
def test_the_label_map_has_the_size_of_the_input(model, runtime, size):
    images = draw(2, *size, 3)
    expected = to_numpy(model(images))
    logits = runtime.run("logits", images=images)["logits"]
    bound = 1e-5 * max(1.0, np.abs(expected).max())
    assert np.abs(logits - expected).max() <= bound
    label_map = runtime.run("images", images=images)["label_map"]
    assert label_map.shape == (2, *size) and label_map.dtype == "int32"
    np.testing.assert_array_equal(label_map, logits.argmax(-1))


def test_files_of_different_sizes_are_answered_with_maps_of_their_sizes(runtime):
    files = [png(40, 56), png(64, 64, 1), png(30, 21, 2)]
    answer = runtime.run("serving_default", image_bytes=strings(files))
    for file, data in zip(files, answer["label_map_bytes"], strict=True):
        pixels = decoded(file).astype("float32")
        label_map = runtime.run("images", images=pixels[None])["label_map"][0]
        np.testing.assert_array_equal(decoded(data), label_map)


def test_no_images_are_answered_with_no_maps(runtime):
    answer = runtime.run("images", images=draw(0, 64, 64, 3))
    assert answer["label_map"].shape == (0, 64, 64)
    answer = runtime.run("serving_default", image_bytes=strings([]))
    assert answer["label_map_bytes"].shape == (0,)


def test_verify_holds_and_a_flipped_weight_is_found(artifact):
    report = verify(artifact, progress=False)
    assert report.ok, report
    names = [check.name for check in report.checks]
    assert "answer for a file" in names and "logits: hostile requests" in names
    data = artifact / "variables/variables.data-00000-of-00001"
    flip(data)
    try:
        assert not verify(artifact, progress=False).ok
    finally:
        flip(data)


def test_what_is_no_image_costs_its_row_or_is_an_error_status(runtime):
    files = strings([b"no image", png(40, 56), png(40, 56)[:900], png(2000, 2000)])
    answer = runtime.run("serving_default", image_bytes=files)
    assert answer["valid"].tolist() == [False, True, False, False]
    maps = answer["label_map_bytes"]
    assert maps[0] == maps[2] == maps[3] == b""
    assert decoded(maps[1]).shape == (40, 56)
    for bad in (0, 2, 3):
        with pytest.raises(StatusError, match="INVALID_ARGUMENT"):
            runtime.run("strict", image_bytes=files[[1, bad]])


def test_files_are_described_by_the_classes_of_their_pixels(artifact, tmp_path):
    good, bad = tmp_path / "good.png", tmp_path / "bad.png"
    good.write_bytes(png(40, 56))
    bad.write_bytes(b"no image")
    folder = tmp_path / "maps"
    answers = dict(predict_files(artifact, [good, bad], 2, folder))
    assert answers[bad] is None
    saved = np.asarray(Image.open(folder / "good_labels.png"))
    assert saved.shape == (40, 56)
    largest = np.bincount(saved.reshape(-1)).argmax()
    share = (saved == largest).mean()
    assert answers[good][0] == f"{'abcde'[largest]} {share:.1%} of pixels"


@pytest.mark.slow
def test_a_fixed_size_answers_a_file_of_any_size_whole(tmp_path):
    """The file is resized, not cropped, though the row records a crop."""
    plain = {"patch_size": 8, "depth": 1, "embed_dim": 24, "num_heads": 3}
    backbone = ViT("deit_tiny", image_size=32, num_classes=0, **plain)
    model = SemanticFPN(backbone, 300, channels=16)  # more than a byte tells apart
    artifact = export_saved_model(model, tmp_path / "fixed", progress=False)
    file = png(64, 64)
    small = Image.open(io.BytesIO(file)).resize((32, 32), Image.Resampling.BICUBIC)
    with Runtime(artifact) as runtime:
        data = runtime.run("serving_default", image_bytes=strings([file, png(40, 50)]))
        maps = [decoded(x) for x in data["label_map_bytes"]]
    assert [x.shape for x in maps] == [(64, 64), (40, 50)]
    assert max(x.max() for x in maps) > 255
    logits = to_numpy(model(np.asarray(small, "float32")[None]))[0]
    agree = maps[0][::2, ::2] == logits.argmax(-1)  # not the same points: most agree
    assert agree.mean() > 0.5


@pytest.mark.slow
@pytest.mark.skipif(
    keras.backend.backend() != "tensorflow",
    reason="what is written is TensorFlow's, whatever backend has it",
)
@pytest.mark.parametrize("position", POSITIONS)
def test_every_position_is_served(tmp_path, position):
    """As the worker writes it, without its process and its checks."""
    sizes = {"patch_size": 8, "depth": 2, "embed_dim": 24, "num_heads": 3}
    anywhere = {"image_size": None, "position_grid": (4, 4), "position": position}
    model = ViT("deit_tiny", num_classes=4, **sizes, **anywhere)
    contract = Contract(Preprocess.of_model(model), list("abcd"), 3)
    functions = signatures(model, contract)
    tf.saved_model.save(Servable(model), tmp_path, functions)
    images = draw(2, 40, 24, 3)
    with Runtime(tmp_path) as runtime:
        logits = runtime.run("images", images=images)["logits"]
    np.testing.assert_allclose(logits, to_numpy(model(images)), atol=2e-5)
