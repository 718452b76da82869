"""A real `keras-vit serve` in a process of its own, and what is sent to it."""

import base64
import contextlib
import fcntl
import io
import json
import os
import re
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import numpy as np
from PIL import Image

ROOT = Path(__file__).parent.parent


def shared_artifact(tmp_path_factory) -> Path:
    """Version 1 of a tiny model, exported once for all the files of tests of a run."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    version = shared / "serving" / "tiny" / "1"
    with (shared / "serving.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not version.is_dir():
            from export import export_saved_model
            from keras_vit import ViT

            sizes = {"image_size": 32, "patch_size": 8, "embed_dim": 24, "depth": 1}
            model = ViT("deit_tiny", num_heads=3, num_classes=4, **sizes)
            labels = ["cat", "dog", "émeu", "yak"]
            export_saved_model(model, version.parent, labels, progress=False)
    return version


def png(seed: int = 0, size: int = 40) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (size, size, 3), "uint8")
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "PNG")
    return file.getvalue()


def example(data: bytes) -> bytes:
    """A serialized `tf.Example` of an image file."""
    from export.messages import pb

    message = pb.Example()
    message.features.feature["image/encoded"].bytes_list.value.append(data)
    return message.SerializeToString()


def b64(data: bytes) -> dict:
    """Bytes as JSON carries them."""
    return {"b64": base64.b64encode(data).decode()}


def rows_for(description: dict, count: int):
    """`(input, rows)` that a signature of one input takes."""
    (name, tensor), *_ = description["inputs"].items()
    if tensor["dtype"] == "DT_STRING":
        files = [png(i) for i in range(count)]
        return name, [example(x) for x in files] if name == "inputs" else files
    shape = [32 if x == -1 else x for x in tensor["shape"][1:]]
    pixels = np.random.default_rng(0).uniform(0, 255, (count, *shape))
    dtype = "uint8" if tensor["dtype"] == "DT_UINT8" else "float32"
    return name, pixels.astype(dtype)


def environment() -> dict:
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}


def run_command(*arguments, **kwargs) -> subprocess.CompletedProcess:
    """`keras-vit` with these arguments, to its end."""
    code = "import sys; from training.command import main; sys.exit(main())"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**environment(), **kwargs.pop("env", {})},
        capture_output=True,
        text=True,
        **{"timeout": 300, **kwargs},
    )


class Serving:
    """`keras-vit serve` on free ports.

    Attributes:
        rest, grpc: Where it listens.
        told: What it printed when it began.
    """

    def __init__(self, folder: Path):
        code = "import sys; from training.command import main; sys.exit(main())"
        self.name = folder.name
        self._process = subprocess.Popen(
            [
                *(sys.executable, "-c", code, "serve", str(folder)),
                *("--rest-port", "0", "--grpc-port", "0"),
            ],
            env={**environment(), "PYTHONUNBUFFERED": "1"},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        self.pid = self._process.pid
        self.told = ""
        while "Production is" not in self.told:
            line = self._process.stdout.readline()
            assert line, self.told  # it ended
            self.told += line
        self.rest = re.search(r"http://[\d.]+:\d+", self.told)[0]
        self.grpc = re.search(r"gRPC\s+(\S+)", self.told)[1]

    @property
    def runtime_pid(self) -> int:
        children = []
        for task in Path(f"/proc/{self.pid}/task").iterdir():
            children += (task / "children").read_text().split()
        return int(children[-1])

    def url(self, tail: str) -> str:
        return f"{self.rest}/v1/models/{self.name}{tail}"

    def post(self, body, tail: str = ":predict", url: str | None = None):
        """Status and document that a body is answered with."""
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return ask(urllib.request.Request(url or self.url(tail), data))

    def get(self, tail: str = ""):
        return ask(self.url(tail))

    def metric(self, name: str) -> float:
        with urllib.request.urlopen(f"{self.rest}/monitoring/prometheus/metrics") as x:
            text = x.read().decode()
        pattern = rf"^:tensorflow:serving:{name}(?:{{[^}}]*}})? (\S+)$"
        return sum(map(float, re.findall(pattern, text, re.M)))

    def memory(self) -> int:
        """Resident bytes of the server and its runtime."""
        pages = [
            int(Path(f"/proc/{pid}/statm").read_text().split()[1])
            for pid in (self.pid, self.runtime_pid)
        ]
        return sum(pages) * os.sysconf("SC_PAGE_SIZE")

    def signal(self, number: int) -> None:
        self._process.send_signal(number)

    def wait(self) -> tuple[int, str]:
        """Exit status, and what else was printed."""
        rest = self._process.communicate(timeout=300)[0]
        return self._process.returncode, rest

    def is_alive(self) -> bool:
        return self._process.poll() is None

    def close(self) -> None:
        if self.is_alive():
            self._process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.communicate(timeout=20)
        if self.is_alive():
            self._process.kill()
            self._process.communicate()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def ask(request):
    try:
        with urllib.request.urlopen(request, timeout=300) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        with error:
            return error.code, json.loads(error.read())
