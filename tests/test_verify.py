import json
import os
import re
import shutil
import subprocess
import sys

import keras
import pytest
from serving import shared_artifact
from test_export import LABELS, draw

from export import Runtime, RuntimeCrashError, StatusError, checks, verify
from export.requests import huge_png
from export.session import strings

DATA = "variables/variables.data-00000-of-00001"


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return shared_artifact(tmp_path_factory)


def test_verify_holds_and_is_recorded(artifact):
    report = verify(artifact, progress=False)
    assert report.ok and len(report.checks) == 26, str(report)
    for check in report.checks:
        if "each row by itself" in check.name or "costs its row" in check.name:
            assert float(re.match(r"difference (\S+),", check.detail)[1]) <= 1e-6
    recorded = json.loads((artifact / "assets.extra/report.json").read_text())
    assert recorded["ok"] and len(recorded["checks"]) == 26
    manifest = json.loads((artifact / "assets.extra/manifest.json").read_text())
    assert manifest["labels"] == LABELS
    assert manifest["preprocess"] == {
        "image_size": [32, 32],
        "crop_ratio": 0.875,
        "interpolation": "bicubic",
    }
    assert manifest["trained_with"] == keras.backend.backend()


def failing(directory):
    report = verify(directory, progress=False)
    return {check.name: check.detail for check in report.checks if not check.ok}


@pytest.mark.parametrize(
    "damage, expected, file",
    [
        (lambda d: os.truncate(d / "saved_model.pb", 1000), "loads", "saved_model.pb"),
        (lambda d: flip(d / DATA), "loads", DATA),
        pytest.param(
            lambda d: (d / "variables/variables.index").unlink(),
            "logits of",
            "missing: variables/variables.index",
            marks=pytest.mark.slow,  # it loads, and then fails every request
        ),
    ],
)
def test_verify_fails_on_a_damaged_artifact(artifact, tmp_path, damage, expected, file):
    copy = tmp_path / "1"
    shutil.copytree(artifact, copy)
    damage(copy)
    failed = failing(copy)
    assert any(name.startswith(expected) for name in failed)
    assert file in failed["checksums"]


def test_what_is_not_of_a_version_is_found(artifact, tmp_path):
    copy = tmp_path / "1"
    shutil.copytree(artifact, copy)
    assert checks.of_files(copy).ok and checks.manifest_of(copy)[1].ok
    (copy / "stale.txt").touch()
    assert checks.of_files(copy).detail == "foreign: stale.txt"
    (copy / "assets.extra/manifest.json").write_text("{")
    assert "damaged: assets.extra/manifest.json" in checks.of_files(copy).detail
    assert not checks.manifest_of(copy)[1].ok
    (copy / "assets.extra/SHA256SUMS").write_bytes(b"\xe9")
    assert "SHA256SUMS: 'utf-8' codec" in checks.of_files(copy).detail


@pytest.mark.slow
def test_a_damaged_manifest_is_a_report(artifact, tmp_path):
    copy = tmp_path / "1"
    shutil.copytree(artifact, copy)
    path = copy / "assets.extra/manifest.json"
    manifest = json.loads(path.read_text())
    manifest["reference_file"]["png"] = "a"
    manifest["batch_sizes"] = None
    path.write_text(json.dumps(manifest))
    failed = failing(copy)
    assert "cannot be checked: Error Invalid base64" in failed.pop("answer for a file")
    assert "cannot be checked: TypeError" in failed.pop("warm-up")
    assert list(failed) == ["checksums"]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)


FOREIGN = """
import sys
import tensorflow as tf

class Module(tf.Module):
    @tf.function(input_signature=[tf.TensorSpec((None, 8, 8, 3), name="images")])
    def images(self, images):
        kernel = tf.ones((2, 2, 3, 4))
        if flaw == "PyFunc":
            images = tf.numpy_function(lambda x: x, [images], tf.float32)
            images.set_shape((None, 8, 8, 3))
        if flaw == "Random":
            images += tf.random.normal((1,))
        x = tf.nn.conv2d(images, kernel, 2, "VALID")
        return {"logits": tf.reduce_mean(x, (1, 2)), "probabilities": x[:, 0, 0]}

for flaw in ("PyFunc", "Random", "abort"):
    module = Module()
    folder = f"{sys.argv[1]}/{flaw}/1"
    tf.saved_model.save(module, folder, {"images": module.images})
"""


@pytest.fixture(scope="module")
def foreign(tmp_path_factory):
    """A folder of models that others made, by their flaws."""
    folder = tmp_path_factory.mktemp("foreign")
    command = [sys.executable, "-c", FOREIGN, str(folder)]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@pytest.mark.parametrize("flaw", ["PyFunc", "Random", "abort"])
def test_verify_refuses_what_a_server_cannot_run_or_survive(foreign, flaw):
    """A plain convolution aborts the process on a tensor of rank 3."""
    found = failing(foreign / flaw / "1")
    if flaw == "abort":
        assert re.search("of rank 3: .*SIGABRT", found["images: hostile requests"])
    else:
        assert flaw in found["ops"]
    assert "signatures" in found and "manifest" in found


def test_a_crash_is_told_and_the_caller_lives(foreign, tmp_path):
    with Runtime(foreign / "abort/1") as runtime:
        with pytest.raises(RuntimeCrashError, match=r"SIGABRT.*Check failed"):
            runtime.run("images", images=draw(8, 8, 3))
    with pytest.raises(StatusError, match="NOT_FOUND"):
        Runtime(tmp_path / "nowhere")


def test_huge_images_take_no_memory(artifact):
    """Five of 20 KB that would be 430 MB each."""
    with Runtime(artifact) as runtime:
        files = strings([huge_png()] * 5)
        assert len(files[0]) < 25_000
        found = runtime.run("serving_default", image_bytes=files)
        assert not found["valid"].any()
        assert runtime.peak_bytes() < 1e9
