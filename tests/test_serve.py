"""The embedded server over real HTTP and gRPC, with real processes."""

import asyncio
import json
import math
import re
import shutil
import subprocess
from concurrent.futures import ThreadPoolExecutor

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from serving import Serving, b64, example, png, rows_for, shared_artifact

from export import Runtime
from export.client import Client
from export.messages import pb, to_message
from export.server_batches import Batcher, BatchingParameters
from export.server_metrics import Metrics
from export.session import strings

pytestmark = pytest.mark.first
SOME = ("serving_default", "images")


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def runtime(artifact):
    with Runtime(artifact) as runtime:
        yield runtime


@pytest.fixture(scope="module")
def serving(artifact):
    with Serving(artifact.parent) as serving:
        yield serving


def predict(serving, data, signature=""):
    """One image file by REST."""
    body = {"signature_name": signature, "instances": [b64(data)]}
    return serving.post(body)


def stubs(serving):
    channel = grpc.insecure_channel(serving.grpc)
    return pb.PredictionServiceStub(channel), pb.ModelServiceStub(channel)


def request_of(serving, rows, signature="", **inputs):
    request = pb.PredictRequest()
    request.model_spec.name = serving.name
    request.model_spec.signature_name = signature
    for key, array in inputs.items() or [("image_bytes", strings(rows))]:
        request.inputs[key].CopyFrom(to_message(array))
    return request


@pytest.mark.parametrize("wire", ["rest", "grpc"])
@pytest.mark.parametrize(
    "chosen", [SOME, pytest.param(None, marks=pytest.mark.slow, id="all")]
)
def test_each_signature_answers_as_the_session_does(serving, runtime, wire, chosen):
    url = serving.rest if wire == "rest" else f"grpc://{serving.grpc}"
    with Client(url, serving.name, batch_size=4) as client:
        assert client.metadata() == runtime.signatures
        for signature in chosen or runtime.signatures:
            name, rows = rows_for(runtime.signatures[signature], 3)
            answer = client.predict(rows, signature)
            whole = rows if isinstance(rows, np.ndarray) else strings(rows)
            expected = runtime.run(signature, **{name: whole})
            assert sorted(answer) == sorted(expected)
            for key, value in expected.items():
                assert answer[key].dtype == value.dtype
                assert answer[key].shape == value.shape
                if value.dtype == object:
                    assert (answer[key] == value).all()
                else:
                    np.testing.assert_allclose(answer[key], value, atol=1e-6)


def test_rows_and_columns_are_answered_in_kind(serving):
    outputs = {"classes", "probabilities", "scores", "valid"}
    status, answer = serving.post({"instances": [b64(png(i)) for i in range(2)]})
    assert status == 200 and len(answer["predictions"]) == 2
    assert set(answer["predictions"][0]) == outputs
    named = {"instances": [{"image_bytes": b64(png(i))} for i in range(2)]}
    assert serving.post(named) == (200, answer)
    status, columns = serving.post({"inputs": {"image_bytes": [b64(png())]}})
    assert status == 200
    scores = answer["predictions"][0]["scores"]
    np.testing.assert_allclose(columns["outputs"]["scores"][0], scores, atol=1e-6)
    assert serving.post({"inputs": [b64(png())]}) == (200, columns)


def deep(depth):
    return b'{"inputs": ' + b"[" * depth + b"]" * depth + b"}"


IMAGES = {"signature_name": "images"}
CODES = [
    (b"", 400, "JSON Parse error"),
    (b'{"instances"', 400, "JSON Parse error"),
    (b"\xff\xfe", 400, "JSON Parse error"),
    ([], 400, "not an object"),
    ({}, 400, "Missing 'inputs' or 'instances'"),
    ({"instances": [1], "inputs": [1]}, 400, "Only one of"),
    ({"instances": []}, 400, "one value at least"),
    ({"instances": [3]}, 400, "must consist of strings"),
    ({"instances": [{"b64": "*"}]}, 400, "Unable to base64 decode"),
    ({"instances": [{"other": "x"}]}, 400, "keys image_bytes"),
    ({"inputs": b64(b"x")}, 400, "got a scalar"),
    ({"inputs": {}}, 400, "Missing named input: image_bytes"),
    ({"signature_name": 3, "inputs": []}, 400, "must be a string"),
    ({"signature_name": "none", "inputs": []}, 400, "not found in signature def"),
    ({**IMAGES, "instances": [[[1, 2, 3]], [[1, 2]]]}, 400, "of one length"),
    ({**IMAGES, "instances": [[[1, 2, 3]]]}, 400, "must have the shape"),
    ({**IMAGES, "instances": ["1"]}, 400, "must consist of float32, got str"),
    ({**IMAGES, "instances": [True]}, 400, "must consist of float32, got bool"),
    ({**IMAGES, "instances": [None]}, 400, "must consist of float32"),
    ({**IMAGES, "instances": [1e300]}, 400, "outside the range"),
    ({**IMAGES, "instances": [10**400]}, 400, "outside the range"),
    (deep(50), 400, "deeper than 8"),
    (deep(100_000), 400, "nested too deeply"),
]


@pytest.mark.parametrize("body, status, told", CODES)
def test_a_wrong_body_is_the_clients_error(serving, body, status, told):
    got, answer = serving.post(body)
    assert got == status and told in answer["error"]


@pytest.mark.parametrize(
    "tail, status, told",
    [
        ("/versions/7:predict", 404, "Specific(tiny, 7)"),
        (f"/versions/{10**30}:predict", 400, "Failed to convert version"),
        ("/labels/canary:predict", 400, "Unrecognized servable version label: canary"),
        (":regress", 400, "regression"),
        (":classify", 400, "is none for classification"),
        (":other", 400, "Malformed request"),
        ("other:predict", 404, "Latest(tinyother)"),
    ],
)
def test_a_wrong_address_is_the_clients_error(serving, tail, status, told):
    got, answer = serving.post({"instances": [b64(png())]}, tail)
    assert got == status and told in answer["error"]


def test_the_status_and_the_metadata_have_the_servers_form(serving):
    status = {"error_code": "OK", "error_message": ""}
    version = {"version": "1", "state": "AVAILABLE", "status": status}
    assert serving.get() == (200, {"model_version_status": [version]})
    assert serving.get("/versions/1") == (200, {"model_version_status": [version]})
    assert serving.get("/versions/2")[0] == 404
    code, metadata = serving.get("/metadata")
    assert code == 200
    spec = {"name": "tiny", "signature_name": "", "version": "1"}
    assert metadata["model_spec"] == spec
    found = metadata["metadata"]["signature_def"]["signature_def"]["serving_default"]
    assert found["method_name"] == "tensorflow/serving/predict"
    described = found["inputs"]["image_bytes"]
    assert described["dtype"] == "DT_STRING"
    shape = {"dim": [{"size": "-1", "name": ""}], "unknown_rank": False}
    assert described["tensor_shape"] == shape


def test_nan_is_written_as_the_server_writes_it(serving, runtime):
    shape = runtime.signatures["images"]["inputs"]["images"]["shape"][1:]
    images = np.full((1, *shape), np.nan, "float32")
    body = {**IMAGES, "inputs": images.tolist()}
    status, answer = serving.post(json.dumps(body).encode())
    assert status == 200
    expected = runtime.run("images", images=images)["logits"][0, 0]
    got = answer["outputs"]["logits"][0][0]
    assert got == expected or (math.isnan(got) and math.isnan(expected))


def test_a_classify_request_names_labels_and_scores(serving, runtime):
    features = {"image/encoded": b64(png())}
    body = {"signature_name": "classify", "examples": [features, features]}
    status, answer = serving.post(body, ":classify")
    expected = runtime.run("classify", inputs=strings([example(png())]))
    assert status == 200 and len(answer["results"]) == 2
    labels = [x.decode() for x in expected["classes"][0]]
    assert [label for label, _ in answer["results"][0]] == labels
    context = {"signature_name": "classify", "context": features, "examples": [{}]}
    status, alone = serving.post(context, ":classify")
    assert dict(alone["results"][0]) == pytest.approx(dict(answer["results"][0]))

    request = pb.ClassificationRequest()
    request.model_spec.name = serving.name
    request.model_spec.signature_name = "classify"
    message = pb.Example.FromString(example(png()))
    request.input.example_list.examples.append(message)
    (row,) = stubs(serving)[0].Classify(request).result.classifications
    found = {x.label: x.score for x in row.classes}
    assert found == pytest.approx(dict(answer["results"][0]))


def test_grpc_answers_what_is_asked_for(serving):
    predictions, models = stubs(serving)
    request = request_of(serving, [png()])
    request.output_filter.append("scores")
    answer = predictions.Predict(request)
    assert [*answer.outputs] == ["scores"] and answer.outputs["scores"].float_val
    assert answer.model_spec.version.value == 1
    request = pb.GetModelStatusRequest()
    request.model_spec.name = serving.name
    (version,) = models.GetModelStatus(request).model_version_status
    assert version.state == pb.ModelVersionStatus.State.AVAILABLE
    health = health_pb2_grpc.HealthStub(grpc.insecure_channel(serving.grpc))
    for name in ("", "tensorflow.serving.PredictionService"):
        found = health.Check(health_pb2.HealthCheckRequest(service=name))
        assert found.status == health_pb2.HealthCheckResponse.SERVING


def grpc_mistakes(serving):
    floats = np.zeros((1, 3), "float32")
    yield request_of(serving, [png()], "none"), "FAILED_PRECONDITION"
    yield request_of(serving, [], "images", images=floats), "INVALID_ARGUMENT"
    yield request_of(serving, [], other=floats), "INVALID_ARGUMENT"
    many = request_of(serving, [png()])
    for i in range(1000):  # 64 GB, if they were unpacked before they are refused
        many.inputs[f"{i}"].dtype = pb.DataType.Value("DT_UINT8")
        many.inputs[f"{i}"].tensor_shape.dim.add(size=64 * 2**20)
        many.inputs[f"{i}"].int_val.append(0)
    yield many, "INVALID_ARGUMENT"
    yield request_of(serving, [], image_bytes=floats), "INVALID_ARGUMENT"
    unknown = request_of(serving, [png()])
    unknown.output_filter.append("none")
    yield unknown, "INVALID_ARGUMENT"
    huge = request_of(serving, [], "images", images=floats[:1, :1])
    huge.inputs["images"].tensor_shape.dim[0].size = 2**40
    yield huge, "INVALID_ARGUMENT"
    label = request_of(serving, [png()])
    label.model_spec.version_label = "canary"
    yield label, "INVALID_ARGUMENT"
    version = request_of(serving, [png()])
    version.model_spec.version.value = 9
    yield version, "NOT_FOUND"


def test_wrong_grpc_requests_get_their_status(serving):
    predictions, _ = stubs(serving)
    for request, code in grpc_mistakes(serving):
        with pytest.raises(grpc.RpcError) as caught:
            predictions.Predict(request)
        assert caught.value.code().name == code
    channel = grpc.insecure_channel(serving.grpc)
    call = channel.unary_unary("/tensorflow.serving.PredictionService/Predict")
    with pytest.raises(grpc.RpcError, match="is no PredictRequest"):
        call(b"\xff\xff\xff")


def test_requests_at_once_are_merged_and_answered_as_alone(serving):
    files = [png(i) for i in range(24)]
    alone = [predict(serving, x)[1]["predictions"][0]["probabilities"] for x in files]
    before = serving.metric("batching_session:processed_batch_size_count")
    with ThreadPoolExecutor(24) as pool:
        answers = list(pool.map(lambda x: predict(serving, x), files))
    batches = serving.metric("batching_session:processed_batch_size_count") - before
    assert batches < 24
    for (status, answer), expected in zip(answers, alone, strict=True):
        assert status == 200
        got = answer["predictions"][0]["probabilities"]
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_a_corrupt_row_fails_no_other_request(serving):
    files = [b"no image" if i % 4 == 1 else png(i) for i in range(16)]
    with ThreadPoolExecutor(16) as pool:
        answers = list(pool.map(lambda x: predict(serving, x, "strict"), files))
    statuses = [400 if i % 4 == 1 else 200 for i in range(16)]
    assert [status for status, _ in answers] == statuses
    status, answer = serving.post({"instances": [b64(x) for x in files]})
    assert status == 200
    valid = [row["valid"] for row in answer["predictions"]]
    assert valid == [i % 4 != 1 for i in range(16)]


def test_a_request_larger_than_a_batch_is_refused(serving):
    files = [png(i) for i in range(33)]
    status, answer = serving.post({"instances": [b64(x) for x in files]})
    assert status == 400 and "maximum input batch size 32" in answer["error"]
    status, answer = serving.post({"instances": [b64(x) for x in files[:32]]})
    assert status == 200 and len(answer["predictions"]) == 32


def test_where_it_is_allowed_a_large_request_is_split():
    batches = []

    async def double(signature, inputs):
        batches.append(len(inputs["x"]))
        return {"y": 2 * inputs["x"]}

    async def ask():
        parameters = BatchingParameters((1, 2, 4), split=True)
        batcher = Batcher(double, parameters, Metrics(), "tiny")
        found = await batcher.submit("double", {"x": np.arange(11)}, 11)
        await batcher.close()
        return found["y"]

    np.testing.assert_array_equal(asyncio.run(ask()), 2 * np.arange(11))
    assert batches == [4, 4, 4]  # the last one padded


def test_the_printed_curl_line_works_as_it_is_printed(serving):
    if shutil.which("curl") is None:
        pytest.skip("what is printed is a line for curl, which is not here")
    line = re.search(r"^ *(curl .*)$", serving.told, re.M)[1]
    told = subprocess.run(line, shell=True, capture_output=True, text=True).stdout
    assert '"classes"' in told and "error" not in told
