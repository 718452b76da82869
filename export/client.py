"""A client of TensorFlow Serving, and of `keras-vit serve`: REST or gRPC.

    client = Client("http://localhost:8501", "flowers")
    client.predict(["rose.jpg", "tulip.jpg"])["classes"]

It needs no TensorFlow in its process.
"""

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from urllib.parse import urlsplit

import numpy as np
import tenacity
from tqdm.auto import tqdm

from export.client_wires import Grpc, Rest, ServerError, Tensors
from export.messages import describe, numpy_dtype, pb
from export.predict import check_names, in_words
from export.session import strings

RETRIED = ("UNAVAILABLE", "RESOURCE_EXHAUSTED")


class Client:
    """Asks one model of a server.

    Args:
        url: `http://host:8501`, `https://...` or `grpc://host:8500`; a path
            `/v1/models/NAME` names the model.
        model: Name of the model; None for the one of `keras-vit serve`, or the one
            that `url` names.
        version: Number of the version; None for the newest.
        batch_size: Rows a request; a model of label maps takes 8, others 32.
        timeout_seconds: Time of a request, with its repetitions.

    Raises:
        ValueError: If `url` is none, or names no model where one is needed.
        ServerError: If the server must be asked for its model and does not tell.
    """

    def __init__(
        self,
        url: str,
        model: str | None = None,
        *,
        version: int | None = None,
        batch_size: int = 8,
        timeout_seconds: float = 30.0,
    ):
        parts = urlsplit(url)
        wires = {"http": Rest, "https": Rest, "grpc": Grpc}
        if parts.scheme not in wires or not parts.netloc:
            raise ValueError(
                "The server must be http://HOST:PORT, https://HOST:PORT or "
                f"grpc://HOST:PORT, got {url!r}."
            )
        named = parts.path.rstrip("/").rpartition("/v1/models/")[2]
        self._wire = wires[parts.scheme](f"{parts.scheme}://{parts.netloc}")
        self._version, self._timeout = version, timeout_seconds
        self.batch_size = batch_size
        self._signatures: dict | None = None
        self.model = model or named or self._call("only_model")

    def predict(
        self,
        rows: Sequence[str | Path | bytes] | np.ndarray | Mapping[str, np.ndarray],
        signature: str = "serving_default",
        *,
        progress: bool = True,
    ) -> Tensors:
        """Outputs of a signature, in batches.

        Args:
            rows: Image files, or what they hold, for a signature of files; an array,
                converted to its dtype, for one of pixels; or tensors by input name.
            signature: Name of the signature.
            progress: Whether to show a bar of several batches.

        Raises:
            ServerError: If the server answers with an error or not at all.
            ValueError: If the signature has several inputs and one is given.
            OSError: If a file cannot be read.
        """
        answers = list(self._batches(rows, signature, progress))
        if len(answers) == 1:
            return answers[0]
        return {k: np.concatenate([x[k] for x in answers]) for k in answers[0]}

    def _batches(self, rows, signature: str, progress: bool) -> Iterator[Tensors]:
        inputs = self._signature(signature)["inputs"]
        if not isinstance(rows, Mapping):
            if len(inputs) != 1:
                raise ValueError(f"{signature} needs {', '.join(inputs)} by name.")
            rows = {next(iter(inputs)): rows}
        count = max(map(len, rows.values()))
        starts = range(0, max(count, 1), self.batch_size)
        hidden = not progress or len(starts) == 1
        for i in tqdm(starts, unit=" batches", disable=hidden):
            batch = {
                key: _tensor(x[i : i + self.batch_size], inputs.get(key))
                for key, x in rows.items()
            }
            yield self._call(
                "predict", self.model, self._version, signature, batch, self.metadata()
            )

    def metadata(self) -> dict[str, dict]:
        """`{signature: {"inputs" | "outputs": {key: {dtype, shape}}}}`.

        Raises:
            ServerError: If the server answers with an error or not at all.
        """
        if self._signatures is None:
            found = self._call("metadata", self.model, self._version)
            self._signatures = describe(found)
        return self._signatures

    def status(self) -> dict[int, str]:
        """State of each version that the server knows, such as `"AVAILABLE"`.

        Raises:
            ServerError: If the server answers with an error or not at all.
        """
        found = self._call("status", self.model, self._version)
        state = pb.ModelVersionStatus.State
        return {x.version: state.Name(x.state) for x in found.model_version_status}

    def close(self) -> None:
        """Close the connection."""
        self._wire.close()

    def __enter__(self) -> "Client":
        return self

    def __exit__(self, *exception) -> None:
        self.close()

    def _signature(self, name: str) -> dict:
        known = self.metadata()
        if name not in known:
            raise ServerError(
                "FAILED_PRECONDITION",
                f"{self.model} has no signature {name!r}, it has {', '.join(known)}",
            )
        return known[name]

    def _call(self, method: str, *arguments):
        """Ask; again, after a growing and random pause, if the server is busy."""
        end = time.monotonic() + self._timeout
        asking = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_is_passing),
            wait=tenacity.wait_random_exponential(multiplier=0.2, max=5),
            stop=tenacity.stop_after_attempt(6)
            | tenacity.stop_before_delay(self._timeout),
            reraise=True,
        )
        ask = getattr(self._wire, method)
        return asking(
            lambda: ask(*arguments, seconds=max(end - time.monotonic(), 0.01))
        )


def ask_files(
    client: Client,
    files: Sequence[Path],
    top: int = 3,
    label_maps: str | Path | None = None,
) -> Iterator[tuple[Path, list[str] | None]]:
    """Ask a server about image files, as `export.predict.predict_files` an artifact.

    Args:
        client: The client.
        files: Image files.
        top: Number of classes to name.
        label_maps: Folder for label maps; None for none.

    Yields:
        The file, and what the model says of it; None for one that it cannot decode.

    Raises:
        ServerError: If the server answers with an error or not at all.
        ValueError: If `label_maps` is given and the model answers with classes, or two
            files have one name.
    """
    check_names(files, label_maps)
    signature = "serving_default"
    if label_maps is not None:
        outputs = client.metadata()[signature]["outputs"]
        if "label_map_bytes" not in outputs:
            raise ValueError(
                f"{client.model} must answer with label maps for them to be saved, it "
                f"answers with {', '.join(outputs)}."
            )
    size = client.batch_size
    starts = range(0, len(files), size)
    for i in tqdm(starts, unit=" batches", disable=len(starts) < 2):
        batch = files[i : i + size]
        answers = _answers(client, batch, signature)
        for file, answer in zip(batch, answers, strict=True):
            if answer is not None and answer.get("valid", [True])[0]:
                yield file, in_words(file, answer, top, label_maps)
            else:
                yield file, None


def _answers(client, files, signature) -> list[Tensors | None]:
    """A row for each file; a model that refuses whole batches is asked one by one."""
    try:
        answer = client.predict(files, signature, progress=False)
    except ServerError as error:
        if error.code != "INVALID_ARGUMENT":
            raise
        if len(files) == 1:
            return [None]
        return [x for file in files for x in _answers(client, [file], signature)]
    return [{k: x[i : i + 1] for k, x in answer.items()} for i in range(len(files))]


def _tensor(rows, described: dict | None) -> np.ndarray:
    if described is None:  # a name that the server shall refuse
        return np.asarray(rows)
    dtype = numpy_dtype(described["dtype"])
    if dtype != "object":
        return np.asarray(rows).astype(dtype)
    return strings([x if isinstance(x, bytes) else Path(x).read_bytes() for x in rows])


def _is_passing(error: BaseException) -> bool:
    return (
        isinstance(error, ServerError)
        and error.code in RETRIED
        and "larger than max" not in error.message  # the same next time
    )
