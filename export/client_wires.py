"""How a client speaks: REST or gRPC, and what each status code means."""

import base64
from urllib.parse import urlsplit

import grpc
import numpy as np
import requests
from google.protobuf import json_format

from export.messages import from_message, numpy_dtype, pb, to_message
from export.session import StatusError, strings

Tensors = dict[str, np.ndarray]
CODES = {
    400: "INVALID_ARGUMENT",
    401: "UNAUTHENTICATED",
    403: "PERMISSION_DENIED",
    404: "NOT_FOUND",
    413: "RESOURCE_EXHAUSTED",
    429: "RESOURCE_EXHAUSTED",
    499: "CANCELLED",
    500: "INTERNAL",
    501: "UNIMPLEMENTED",
    502: "UNAVAILABLE",
    503: "UNAVAILABLE",
    504: "DEADLINE_EXCEEDED",
}
ADVICE = {
    "CANCELLED": "The request was given up before its answer; ask again.",
    "UNKNOWN": "The server does not say what failed; its log does.",
    "INVALID_ARGUMENT": "The request is wrong and would fail again: compare it with "
    "what `metadata()` tells of the signature.",
    "DEADLINE_EXCEEDED": "No answer came in time: send smaller batches, or give more "
    "timeout_seconds.",
    "NOT_FOUND": "No such model or version is served: look at its name, and whether "
    "it is loaded yet, with `status()`.",
    "ALREADY_EXISTS": "The server has it already; nothing need be done.",
    "PERMISSION_DENIED": "The server, or a proxy before it, refuses this client.",
    "RESOURCE_EXHAUSTED": "The request is too large, or there are too many: send "
    "smaller batches, or later.",
    "FAILED_PRECONDITION": "The model cannot answer this: look for the signature in "
    "`metadata()`, and check the artifact with `keras-vit verify`.",
    "ABORTED": "The request was ended by another one; ask again.",
    "OUT_OF_RANGE": "The model read beyond its data: check the artifact with "
    "`keras-vit verify`.",
    "UNIMPLEMENTED": "This server, or this model, does not offer what is asked.",
    "INTERNAL": "The server failed; its log says why. Check the artifact with "
    "`keras-vit verify`.",
    "UNAVAILABLE": "Nothing answers there, or the queue is full: start the server, "
    "look at the address, or ask later.",
    "DATA_LOSS": "The artifact is damaged: check it with `keras-vit verify`.",
    "UNAUTHENTICATED": "The server, or a proxy before it, asks for credentials.",
}


class ServerError(StatusError):
    """A server answered with an error, or did not answer.

    Attributes:
        code: Name of the status, such as `"NOT_FOUND"`.
        message: What the server said.
    """

    def __str__(self) -> str:
        told = self.message.strip().rstrip(".")
        return f"{self.code}: {told}. {ADVICE.get(self.code, '')}".strip()


class Rest:
    """The wire of REST."""

    def __init__(self, url: str):
        self._url = f"{url}/v1/models"
        self._session = requests.Session()

    def only_model(self, seconds: float) -> str:
        try:
            names = self._json("GET", self._url, seconds)["models"]
        except ServerError as error:
            if error.code != "INVALID_ARGUMENT":
                raise
            names = ()
        if len(names) != 1:
            raise ValueError("The server does not tell its model: give the name of it.")
        return names[0]

    def predict(self, model, version, signature, inputs, known, seconds) -> Tensors:
        body = {
            "signature_name": signature,
            "inputs": {key: _to_json(x) for key, x in inputs.items()},
        }
        url = f"{self._path(model, version)}:predict"
        answer = self._json("POST", url, seconds, json=body)["outputs"]
        outputs = known[signature]["outputs"]
        if len(outputs) == 1:
            answer = {next(iter(outputs)): answer}
        return {
            key: _from_json(x, numpy_dtype(outputs[key]["dtype"]))
            for key, x in answer.items()
        }

    def metadata(self, model, version, seconds):
        answer = self._json("GET", f"{self._path(model, version)}/metadata", seconds)
        found = answer["metadata"]["signature_def"]
        return json_format.ParseDict(
            found, pb.SignatureDefMap(), ignore_unknown_fields=True
        )

    def status(self, model, version, seconds):
        answer = self._json("GET", self._path(model, version), seconds)
        return json_format.ParseDict(answer, pb.GetModelStatusResponse())

    def close(self) -> None:
        self._session.close()

    def _path(self, model, version) -> str:
        return f"{self._url}/{model}" + (
            "" if version is None else f"/versions/{version}"
        )

    def _json(self, method, url, seconds, json=None):
        try:
            answer = self._session.request(method, url, json=json, timeout=seconds)
        except requests.Timeout as error:
            raise ServerError("DEADLINE_EXCEEDED", str(error)) from error
        except requests.ConnectionError as error:
            raise ServerError("UNAVAILABLE", f"no connection to {url}.") from error
        except requests.RequestException as error:
            raise ServerError("UNAVAILABLE", f"{url}: {error}") from error
        try:
            document = answer.json()
        except ValueError:
            document = {"error": answer.text[:1000]}
        if answer.ok:
            return document
        message = document.get("error", "") if isinstance(document, dict) else ""
        code = CODES.get(answer.status_code, "UNKNOWN")
        raise ServerError(code, message or f"HTTP status {answer.status_code}")


def _to_json(array: np.ndarray):
    if array.dtype != object:
        return array.tolist()
    return [{"b64": base64.b64encode(x).decode()} for x in array]


def _from_json(value, dtype: str) -> np.ndarray:
    if dtype != "object":
        return np.asarray(value, dtype)
    shaped = np.array(value, object)
    flat = [
        base64.b64decode(x["b64"]) if isinstance(x, dict) else x.encode()
        for x in shaped.reshape(-1)
    ]
    return strings(flat).reshape(shaped.shape)


class Grpc:
    """The wire of gRPC, on the official stubs."""

    def __init__(self, url: str):
        options = [
            ("grpc.max_receive_message_length", -1),
            ("grpc.max_send_message_length", -1),
            ("grpc.enable_retries", 0),  # the client's own rule holds
        ]
        self._channel = grpc.insecure_channel(urlsplit(url).netloc, options)
        self._predictions = pb.PredictionServiceStub(self._channel)
        self._models = pb.ModelServiceStub(self._channel)

    def only_model(self, seconds: float) -> str:
        raise ValueError("Over gRPC a server does not tell its model: give its name.")

    def predict(self, model, version, signature, inputs, known, seconds) -> Tensors:
        request = pb.PredictRequest()
        _name(request.model_spec, model, version)
        request.model_spec.signature_name = signature
        for key, array in inputs.items():
            request.inputs[key].CopyFrom(to_message(array))
        answer = self._ask(self._predictions.Predict, request, seconds)
        return {key: from_message(x, 2**40) for key, x in answer.outputs.items()}

    def metadata(self, model, version, seconds):
        request = pb.GetModelMetadataRequest(metadata_field=["signature_def"])
        _name(request.model_spec, model, version)
        answer = self._ask(self._predictions.GetModelMetadata, request, seconds)
        found = pb.SignatureDefMap()
        answer.metadata["signature_def"].Unpack(found)
        return found

    def status(self, model, version, seconds):
        request = pb.GetModelStatusRequest()
        _name(request.model_spec, model, version)
        return self._ask(self._models.GetModelStatus, request, seconds)

    def close(self) -> None:
        self._channel.close()

    def _ask(self, method, request, seconds):
        try:
            return method(request, timeout=seconds)
        except grpc.RpcError as error:
            raise ServerError(error.code().name, error.details() or "") from error


def _name(spec, model, version) -> None:
    spec.name = model
    if version is not None:
        spec.version.value = version
