"""Thousands of wrong requests among good ones: each gets its status, nothing grows."""

import gzip
import http.client
import json
import random
from collections import Counter
from urllib.parse import urlsplit

import grpc
import numpy as np
import pytest
from serving import Serving, b64, png, rows_for, shared_artifact

from export.client import Client
from export.messages import pb, to_message
from export.session import strings

pytestmark = pytest.mark.first
REST = {200, 400, 404, 405, 408, 413, 414, 415, 417, 429, 431, 501, 503, 504}
GRPC = {
    *("OK", "INVALID_ARGUMENT", "FAILED_PRECONDITION", "NOT_FOUND", "OUT_OF_RANGE"),
    *("UNIMPLEMENTED", "RESOURCE_EXHAUSTED", "UNAVAILABLE", "DEADLINE_EXCEEDED"),
}
MARGIN = 32 * 2**20  # bytes that memory may differ by
SERVICE = "/tensorflow.serving.PredictionService/"
METHODS = ("Predict", "Classify", "GetModelMetadata", "Regress", "MultiInference", "?")


class Fuzz:
    """Requests drawn from a seed, and what they were answered with."""

    def __init__(self, serving, seed):
        self.random = random.Random(seed)
        self.serving = serving
        self.statuses = Counter()
        self.signatures = [
            *serving.get("/metadata")[1]["metadata"]["signature_def"]["signature_def"]
        ]
        self._channel = grpc.insecure_channel(serving.grpc)
        self._connection = None
        self.expected = self.good()

    def good(self):
        """What a whole file is answered with."""
        status, answer = self.serving.post({"instances": [b64(png())]})
        assert status == 200
        return answer["predictions"][0]["probabilities"]

    def send(self):
        kinds = (self.body, self.json, self.pixels, self.files, self.address)
        kinds += (self.packed, self.message, self.tensor)
        self.random.choice(kinds)()

    # --- REST ---

    def body(self):
        """A good body with bytes changed, or no body at all."""
        good = json.dumps({"instances": [b64(png(size=8))]}).encode()
        self.post(self.random.choice([self.mutated(good), self.bytes(), b""]))

    def json(self):
        """A document of the right form with anything in it."""
        key = self.random.choice(["instances", "inputs", "examples", "?"])
        document = {key: self.value(4)}
        if self.random.random() < 0.7:
            names = [*self.signatures, "none", "", 3]
            document["signature_name"] = self.random.choice(names)
        text = json.dumps(document)
        if self.random.random() < 0.1:
            text = text.replace("[", "[" * self.random.choice([2, 10, 5000]))
        tail = self.random.choice([":predict", ":predict", ":classify", ":regress"])
        self.post(text.encode(), tail)

    def pixels(self):
        """Pixels of a wrong shape or type."""
        shape = [self.random.choice([0, 1, 2, 3, 32]) for _ in range(5)]
        values = np.zeros(shape[: self.random.randrange(6)], "float32").tolist()
        names = ("images", "images_uint8", "logits")
        name = self.random.choice(names)
        key = self.random.choice(["instances", "inputs"])
        self.post(json.dumps({"signature_name": name, key: values}).encode())

    def files(self):
        """Files that are damaged, among whole ones."""
        count = self.random.randrange(1, 5)
        files = [
            self.random.choice([png(size=9), self.mutated(png(size=9)), self.bytes()])
            for _ in range(count)
        ]
        self.post(json.dumps({"instances": [b64(x) for x in files]}).encode())

    def address(self):
        """A wrong address or method."""
        good = f"/v1/models/{self.serving.name}/versions/1:predict"
        path = "".join(
            x if self.random.random() < 0.9 else self.random.choice("/:%aA1?&.~")
            for x in good
        )
        methods = ("GET", "POST", "PUT", "DELETE", "HEAD", "OPTIONS", "PATCH")
        self.ask(self.random.choice(methods), path, self.bytes())

    def packed(self):
        """A body that claims to be compressed."""
        data = gzip.compress(b'{"instances": []}')
        body = self.random.choice([self.mutated(data), self.bytes(), data])
        coding = self.random.choice(["gzip", "deflate", "br", "?"])
        self.post(body, headers={"Content-Encoding": coding})

    def post(self, body, tail=":predict", headers=None):
        self.ask("POST", f"/v1/models/{self.serving.name}{tail}", body, headers)

    def ask(self, method, path, body, headers=None):
        if self._connection is None:
            address = urlsplit(self.serving.rest)
            self._connection = http.client.HTTPConnection(address.netloc, timeout=300)
        try:
            self._connection.request(method, path, body, headers or {})
            answer = self._connection.getresponse()
            answer.read()
        except TimeoutError:
            raise AssertionError((method, path, body[:200], headers)) from None
        except (http.client.HTTPException, ConnectionError):
            self._connection.close()  # the server ends what it cannot follow
            self._connection = None
            self.statuses["closed"] += 1
            return
        assert answer.status in REST, (answer.status, method, path, body[:200])
        self.statuses[answer.status] += 1

    # --- gRPC ---

    def message(self):
        """Bytes that are no message, or almost one."""
        data = self.random.choice([self.bytes(), self.mutated(self.request())])
        self.call(self.random.choice(METHODS), data)

    def tensor(self):
        """A tensor that contradicts itself or the signature."""
        shape = [self.random.choice([-1, 0, 1, 2, 32, 2**40]) for _ in range(5)]
        tensor = pb.TensorProto(dtype=self.random.randrange(25))
        for size in shape[: self.random.randrange(6)]:
            tensor.tensor_shape.dim.add(size=size)
        field = self.random.choice(["float_val", "int_val", "string_val", "bool_val"])
        value = self.bytes() if field == "string_val" else self.random.randrange(2)
        getattr(tensor, field).extend([value] * self.random.randrange(4))
        if self.random.random() < 0.3:
            tensor.tensor_content = self.bytes()
        self.call("Predict", self.request(tensor))

    def request(self, tensor=None):
        request = pb.PredictRequest()
        request.model_spec.name = self.random.choice([self.serving.name] * 9 + ["?"])
        names = [*self.signatures, "none", ""]
        request.model_spec.signature_name = self.random.choice(names)
        key = self.random.choice(["image_bytes", "images", "inputs"])
        tensor = tensor or to_message(strings([png(size=9)]))
        request.inputs[key].CopyFrom(tensor)
        return request.SerializeToString()

    def call(self, method, data):
        try:
            self._channel.unary_unary(SERVICE + method)(data, timeout=300)
            code = "OK"
        except grpc.RpcError as error:
            code = error.code().name
            assert code in GRPC, (method, data[:200], error)
        self.statuses[code] += 1

    # --- values ---

    def bytes(self):
        return self.random.randbytes(self.random.randrange(200))

    def mutated(self, data):
        data = bytearray(data)
        for _ in range(self.random.randrange(1, 4)):
            i = self.random.randrange(len(data))
            data[i : i + self.random.randrange(3)] = self.random.randbytes(
                self.random.randrange(3)
            )
        return bytes(data)

    def value(self, depth):
        kind = self.random.randrange(9 if depth else 6)
        plain = (None, True, -1, 1e300, float("nan"), "text", b64(b"x"))
        if kind < 7:
            return plain[kind]
        values = [self.value(depth - 1) for _ in range(self.random.randrange(4))]
        if kind == 7:
            return values
        return {self.random.choice(["b64", "image_bytes", "?"]): x for x in values}


@pytest.mark.parametrize("count", [300, pytest.param(10_000, marks=pytest.mark.slow)])
def test_wrong_requests_harm_nothing(tmp_path_factory, count):
    artifact = shared_artifact(tmp_path_factory)
    with Serving(artifact.parent) as serving:
        fuzz = Fuzz(serving, seed=count)
        with Client(serving.rest) as client:  # the first run of each takes memory
            for name, description in client.metadata().items():
                client.predict(rows_for(description, 4)[1], name)
        runtime = serving.runtime_pid
        for i in range(count):
            fuzz.send()
            if i % 10 == 0:
                np.testing.assert_allclose(fuzz.good(), fuzz.expected, atol=1e-6)
            if i == count // 4:
                memory = serving.memory()
        assert serving.is_alive() and serving.runtime_pid == runtime
        assert serving.memory() <= memory + MARGIN
        assert serving.metric("runtime_restarts") == 0
        assert sum(fuzz.statuses.values()) == count
        assert len(fuzz.statuses) > 6 and fuzz.statuses["closed"] < count / 20
