"""The TensorFlow C++ session in a process of its own: what runs inside a server.

If a request takes that process down, the caller lives on and says so.
"""

import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from export import session
from export.session import StatusError


class RuntimeCrashError(RuntimeError):
    """The process with the session died: a server would have died likewise."""


class Runtime:
    """A SavedModel in a C++ session of its own process.

    Args:
        directory: The version directory, which holds `saved_model.pb`.
        python: Interpreter whose TensorFlow is used.

    Attributes:
        signatures: `{signature: {"inputs" | "outputs": {key: {dtype, shape}}}}`.
        ops: Sorted names of all ops in the graph and its functions.
        tensorflow: Version of the TensorFlow that runs it.

    Raises:
        StatusError: If the model does not load.
        RuntimeCrashError: If loading takes the process down, or the interpreter has no
            TensorFlow.
        FileNotFoundError: If there is no such interpreter.
    """

    def __init__(self, directory: str | Path, python: str = sys.executable):
        self._command = [str(python), session.__file__, str(Path(directory).resolve())]
        self._start()

    def _start(self):
        self._log = tempfile.TemporaryFile()
        environment = {
            **os.environ,
            "CUDA_VISIBLE_DEVICES": "-1",
            "TF_CPP_MIN_LOG_LEVEL": "2",
            # What a server does on a processor with AVX-512, on every processor.
            "TF_ENABLE_ONEDNN_OPTS": "1",
        }
        if self._command[0] != sys.executable:  # else it finds our packages, not its
            environment.pop("PYTHONPATH", None)
        try:
            self._process = subprocess.Popen(
                self._command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=self._log,
                env=environment,
                process_group=0,  # an interrupt from the keyboard is the caller's
            )
        except OSError as error:
            raise FileNotFoundError(
                f"runtime must be a Python interpreter, got {self._command[0]!r}: "
                f"{error.strerror}."
            ) from error
        try:
            header, _ = self._receive()
        except BaseException:
            self.close()
            raise
        self.signatures = header["signatures"]
        self.ops = header["ops"]
        self.tensorflow = header["tensorflow"]

    def restart(self) -> None:
        """Load the model in a new process.

        Raises:
            StatusError: If the model does not load.
            RuntimeCrashError: If loading takes the process down.
        """
        self.close()
        self._start()

    @property
    def is_alive(self) -> bool:
        """Whether the process still answers."""
        return self._process.poll() is None

    @property
    def pid(self) -> int:
        """The process with the session."""
        return self._process.pid

    def kill(self) -> None:
        """End the process at once: nothing else ends a run that hangs."""
        self._process.kill()

    def peak_bytes(self) -> int:
        """The most memory that the process has had; 0 where the system tells none."""
        try:
            status = Path(f"/proc/{self._process.pid}/status").read_text()
        except OSError:  # not Linux
            return 0
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) * 1024

    def run(self, signature: str, **inputs: np.ndarray) -> dict[str, np.ndarray]:
        """Run a signature; strings are arrays of dtype object that hold bytes.

        Raises:
            StatusError: If the session answers with an error.
            RuntimeCrashError: If the request takes the process down.
        """
        try:
            session.send(self._process.stdin, {"signature": signature}, inputs)
        except BrokenPipeError:
            raise self._crash() from None
        return self._receive()[1]

    def _receive(self) -> tuple[dict, dict[str, np.ndarray]]:
        try:
            header, tensors = session.receive(self._process.stdout)
        except EOFError:
            raise self._crash() from None
        if "error" in header:
            raise StatusError(*header["error"])
        return header, tensors

    def _crash(self) -> RuntimeCrashError:
        code = self._process.wait()
        name = signal.Signals(-code).name if code < 0 else f"exit status {code}"
        self._log.seek(0)
        lines = self._log.read().decode(errors="replace").strip().splitlines()
        told = next((x for x in reversed(lines) if "Check failed" in x), "")
        told = told or (lines[-1] if lines else "")
        return RuntimeCrashError(f"The C++ runtime died with {name}. {told}")

    def close(self) -> None:
        """End the process."""
        for stream in (self._process.stdin, self._process.stdout):
            with contextlib.suppress(BrokenPipeError):  # it died with a request
                stream.close()
        try:
            self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._log.close()

    def __enter__(self) -> "Runtime":
        return self

    def __exit__(self, *exception) -> None:
        self.close()
