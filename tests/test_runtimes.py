"""The same artifact in the TensorFlow releases that servers run, and one that is none.

A stock server cannot be installed from a package index. Its C++ runtime can: it is in
the wheel of the same release.
"""

import json
import os
import subprocess
import sys
import venv

import pytest
from serving import run_command, shared_artifact

pytestmark = [pytest.mark.slow, pytest.mark.first]
NATIVE = """
import sys
import keras
from keras_vit import ViT

sizes = {"image_size": 16, "patch_size": 8, "depth": 1, "embed_dim": 24}
ViT("tiny", num_heads=2, num_classes=3, **sizes).export(sys.argv[1])
"""


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return shared_artifact(tmp_path_factory)


@pytest.mark.parametrize("release", ["2.17.1", "2.20.0"])
@pytest.mark.skipif(sys.version_info >= (3, 13), reason="no wheel of 2.17 for it")
def test_verify_holds_in_the_releases_that_servers_run(artifact, tmp_path, release):
    venv.create(tmp_path / "env", with_pip=True)
    python = tmp_path / "env/bin/python"
    install = [python, "-m", "pip", "install", "-q", "--no-compile"]
    subprocess.run([*install, f"tensorflow-cpu=={release}"], check=True)
    done = run_command("verify", artifact, "--json", "--runtime", python, timeout=300)
    report = json.loads(done.stdout)
    flaws = [x for x in report["checks"] if not x["ok"]]
    assert done.returncode == 0 and report["ok"] and not flaws, flaws
    assert report["tensorflow"] == release and len(report["checks"]) == 26


def test_an_export_of_jax_itself_is_refused(tmp_path):
    """A server loads it, says AVAILABLE, and answers each request with an error."""
    pytest.importorskip("jax")
    subprocess.run(
        [sys.executable, "-c", NATIVE, tmp_path / "1"],
        env={**os.environ, "KERAS_BACKEND": "jax"},
        check=True,
        capture_output=True,
    )
    done = run_command("verify", tmp_path / "1", timeout=300)
    assert done.returncode == 1 and "XlaCallModule" in done.stdout
    assert "does not hold" in done.stderr and "ops" in done.stderr
