"""Checkpoints of the Hugging Face hub: a small one of our own, on this machine."""

import contextlib
import hashlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
from conftest import to_numpy

from keras_vit import ViT, to_checkpoint

pytest.importorskip("huggingface_hub")
pytestmark = pytest.mark.first  # nothing of it depends on the backend

ROOT = Path(__file__).parent.parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"
OLD = "fedcba9876543210fedcba9876543210fedcba98"
CHILD = """
import json, os, sys, warnings
from pathlib import Path
import keras
import keras_vit
warnings.simplefilter("ignore")
answers = []
for source in sys.argv[1:]:
    if source.startswith("damage "):  # one bit of each large file of it in the cache
        folder = "models--" + source[7:].replace("/", "--")
        for path in Path(os.environ["HF_HOME"], "hub", folder).rglob("blobs/*"):
            if len(path.name) == 64:
                data = bytearray(path.read_bytes())
                data[-100] ^= 1
                path.write_bytes(data)
        continue
    try:
        model = keras_vit.from_checkpoint(source)
        bias = keras.ops.convert_to_numpy(model.get_layer("head").bias)
        answers.append([float(x) for x in bias])
    except (ValueError, OSError) as error:
        answers.append(f"{type(error).__name__}: {error}")
print()
print(json.dumps(answers))
"""


class Hub(http.server.BaseHTTPRequestHandler):
    """What huggingface_hub asks for when it downloads a file.

    The server's `repos` are files by name, by revision, by repository.
    """

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.asked.append(self.path)

    def do_GET(self):
        self._answer(with_body=True)

    def do_HEAD(self):
        self._answer(with_body=False)

    def _answer(self, with_body):
        status, headers, data = self._find()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if with_body:
            self.wfile.write(data)

    def _find(self):
        match = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", self.path)
        if not match or match[1] not in self.server.repos:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        commit = {"main": COMMIT, "v1": OLD}.get(match[2], match[2])
        revisions = self.server.repos[match[1]]
        if commit not in revisions:
            return 404, {"X-Error-Code": "RevisionNotFound"}, b""
        headers = {"X-Repo-Commit": commit}
        if match[3] not in revisions[commit]:
            return 404, {**headers, "X-Error-Code": "EntryNotFound"}, b""
        data = revisions[commit][match[3]]
        if match[3].endswith(".json"):
            return 200, {**headers, "ETag": f'"{hashlib.sha1(data).hexdigest()}"'}, data
        headers["ETag"] = '"of the place where large files are"'
        headers["X-Linked-Etag"] = f'"{hashlib.sha256(data).hexdigest()}"'
        return 200, {**headers, "X-Linked-Size": str(len(data))}, data


@contextlib.contextmanager
def serve(repos):
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos, server.asked = repos, []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def publish(folder, seed, *left_out):
    """A model as it lies on the hub, in the layout of transformers; its head's bias."""
    sizes = {"image_size": 32, "embed_dim": 24, "depth": 1, "num_heads": 3}
    model = ViT("tiny", **sizes, num_classes=5, normalization="inception")
    generator = np.random.default_rng(seed)
    for weight in model.weights:
        weight.assign(generator.normal(size=weight.shape).astype("float32"))
    to_checkpoint(model, folder, layout="hf")
    from safetensors.numpy import load_file, save_file

    path = folder / "model.safetensors"
    save_file(load_file(path), path)  # without our description
    files = {x.name: x.read_bytes() for x in folder.iterdir() if x.name not in left_out}
    return files, to_numpy(model.get_layer("head").bias).tolist()


def ask(server, home, *sources, **environment):
    """What a process of its own makes of sources: a head's bias, or the sentence."""
    environment = {
        **os.environ,
        "HF_HOME": str(home),
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
        "NO_PROXY": "127.0.0.1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        **environment,
    }
    environment.pop("HF_HUB_CACHE", None)
    answer = subprocess.run(
        [sys.executable, "-c", CHILD, *sources],
        capture_output=True,
        text=True,
        cwd=ROOT,
        env=environment,
    )
    assert answer.returncode == 0, answer.stderr[-3000:]
    answers = json.loads(answer.stdout.splitlines()[-1])
    for sentence in answers:
        assert not isinstance(sentence, str) or "\n" not in sentence
    return answers


def test_a_model_of_the_hub_is_loaded_cached_and_checked(tmp_path):
    new, new_bias = publish(tmp_path / "new", 0, "preprocessor_config.json")
    old, old_bias = publish(tmp_path / "old", 1)
    repos = {
        "own/tiny": {COMMIT: new, OLD: old},
        "own/whole": {COMMIT: old},
        "own/empty": {COMMIT: {"config.json": b"{}"}},
    }
    home = tmp_path / "hub"
    with serve(repos) as server:
        answers = ask(
            server,
            home,
            *("hf:own/tiny", "hf:own/tiny@v1", "hf:own/whole"),
            *("damage own/whole", "hf:own/whole", "hf:own/whole"),
            *("hf:own/tiny@v9", "hf:own/empty", "hf:own/nothing"),
            *("hf:tiny", "hf:own/tiny/x"),
        )
        assert answers[:3] == [new_bias, old_bias, old_bias]
        assert answers[4] == old_bias  # fetched anew
        said(
            [answers[3], *answers[5:]],
            ("ValueError: hf:own/whole is damaged in the cache", "was removed there"),
            ("FileNotFoundError", "no public model hf:own/tiny@v9"),
            ("FileNotFoundError", "hf:own/empty holds none of model.safetensors"),
            ("FileNotFoundError", "no public model hf:own/nothing", "hf auth login"),
            ("ValueError", "hf:OWNER/NAME, got 'hf:tiny'"),
            ("ValueError", "hf:OWNER/NAME, got 'hf:own/tiny/x'"),
        )
        assert server.asked.count("/own/whole/resolve/main/config.json")

        server.asked.clear()
        sources = ("hf:own/tiny", "hf:own/tiny@v1", "hf:own/empty", "hf:own/other")
        offline = ask(
            server,
            home,
            *sources,
            *("damage own/tiny", "hf:own/tiny", "hf:own/tiny"),
            HF_HUB_OFFLINE="1",
        )
        assert server.asked == []
        assert offline[:2] == [new_bias, old_bias]
        said(
            offline[2:],
            ("OSError", "hf:own/empty is not in the cache"),
            ("OSError", "hf:own/other is not in the cache"),
            ("ValueError", "hf:own/tiny is damaged in the cache (SHA-256)"),
            ("OSError", "hf:own/tiny is not in the cache"),
        )


@pytest.mark.slow  # huggingface_hub tries again and again, 23 s a file
def test_without_a_hub_the_cache_answers_or_a_sentence(tmp_path):
    files, bias = publish(tmp_path / "files", 0)
    with serve({"own/whole": {COMMIT: files}}) as server:
        assert ask(server, tmp_path / "hub", "hf:own/whole") == [bias]
    whole, other = ask(server, tmp_path / "hub", "hf:own/whole", "hf:own/other")
    assert whole == bias
    said([other], ("OSError", "not in the cache, and the hub cannot be reached"))


def said(answers, *parts):
    """Each answer has all of its parts."""
    for answer, some in zip(answers, parts, strict=True):
        assert all(part in answer for part in some), answer
