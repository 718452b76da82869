"""The bundle's README, done as it is written, on the embedded server."""

import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pytest
from hand_made import publish_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not shutil.which("curl"), reason="the README asks curl"),
]


def free_port():
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    """The bundle and how its README reads with the ports of a running server."""
    folder = publish_two(tmp_path_factory.mktemp("models") / "digits")
    rest, grpc = free_port(), free_port()
    text = (folder / "bundle/README.md").read_text()
    (words,) = re.findall(r"^keras-vit (serve .*)$", text, re.M)
    program = Path(sys.executable).with_name("keras-vit")
    ports = ["--rest-port", str(rest), "--grpc-port", str(grpc)]
    server = subprocess.Popen([program, *words.split(), *ports], cwd=folder / "bundle")
    try:
        wait(server, f"http://localhost:{rest}/v1/models/digits/metadata")
        text = text.replace("localhost:8501", f"localhost:{rest}")
        yield folder / "bundle", text.replace("localhost:8500", f"localhost:{grpc}")
    finally:
        server.terminate()
        server.wait(30)


def wait(server, url):
    for _ in range(300):
        assert server.poll() is None
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    raise TimeoutError(url)


def test_every_curl_of_the_readme_works_as_written(served):
    bundle, text = served
    blocks = re.findall(r"```bash\n(.*?)```", text, re.S)
    lines = [x for block in blocks for x in block.splitlines() if "curl" in x]
    assert len(lines) == 7
    for line in lines:
        done = subprocess.run(
            ["sh", "-c", line], cwd=bundle, capture_output=True, text=True
        )
        assert done.returncode == 0, (line, done.stdout, done.stderr)


def test_the_python_of_the_readme_works_as_written(served):
    bundle, text = served
    (code,) = re.findall(r"```python\n(.*?)```", text, re.S)
    out = subprocess.check_output([sys.executable, "-c", code], cwd=bundle, text=True)
    assert 'key: "logits"' in out and "DT_FLOAT" in out
