"""The client against a real server, over both wires."""

import os
import signal
import subprocess
import sys
import threading

import numpy as np
import pytest
from serving import Serving, environment, png, run_command, shared_artifact

from export import Runtime
from export.client import Client, ask_files
from export.client_wires import ADVICE, ServerError
from export.session import CODES, strings

pytestmark = pytest.mark.first


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return shared_artifact(tmp_path_factory)


@pytest.fixture(scope="module")
def serving(artifact):
    with Serving(artifact.parent) as serving:
        yield serving


@pytest.fixture(params=["http", "grpc"])
def client(serving, request):
    url = serving.rest if request.param == "http" else f"grpc://{serving.grpc}"
    with Client(url, serving.name, batch_size=2) as client:
        yield client


@pytest.fixture
def files(tmp_path):
    """Three whole files and one that is none."""
    paths = [tmp_path / f"{i}.png" for i in range(4)]
    for i, path in enumerate(paths):
        path.write_bytes(b"no image" if i == 2 else png(i))
    return paths


def test_files_are_sent_in_batches_and_answered_in_order(client, artifact, files):
    whole = [files[0], str(files[1]), files[3].read_bytes()]
    answer = client.predict(whole, progress=False)
    with Runtime(artifact) as runtime:
        data = strings([png(0), png(1), png(3)])
        expected = runtime.run("serving_default", image_bytes=data)
    for key in ("probabilities", "scores"):
        np.testing.assert_allclose(answer[key], expected[key], atol=1e-6)
    assert (answer["classes"] == expected["classes"]).all()


def test_a_damaged_file_costs_its_own_row(client, files):
    answers = dict(ask_files(client, files, top=2))
    assert [*answers] == files and answers[files[2]] is None
    assert len(answers[files[0]]) == 2 and "%" in answers[files[0]][0]


def test_the_state_of_each_version_is_told(client):
    assert client.status() == {1: "AVAILABLE"}


@pytest.mark.parametrize("code", CODES[1:])
def test_each_status_says_what_to_do(code):
    error = ServerError(code, "what the server says")
    assert error.code == code
    assert str(error) == f"{code}: what the server says. {ADVICE[code]}"


def test_what_the_server_refuses_is_told_with_its_code(client, serving):
    with pytest.raises(ServerError, match=r"INVALID_ARGUMENT: .*The request is wrong"):
        client.predict(np.zeros((1, 3)), "images")
    with pytest.raises(ServerError, match=r"FAILED_PRECONDITION: .*no signature 'x'"):
        client.predict([png()], "x")
    url = f"grpc://{serving.grpc}" if "Grpc" in repr(client._wire) else serving.rest
    with pytest.raises(ServerError, match=r"NOT_FOUND: .*No such model"):
        Client(url, "other").status()
    with pytest.raises(ServerError, match="NOT_FOUND"):
        Client(url, "tiny", version=9).metadata()


def test_a_time_limit_holds(serving):
    for url in (serving.rest, f"grpc://{serving.grpc}"):
        client = Client(url, "tiny")
        client.metadata()
        client._timeout = 0.005
        with pytest.raises(ServerError, match=r"DEADLINE_EXCEEDED: .*smaller batches"):
            client.predict([png(i, 100) for i in range(32)])


def test_nobody_there_is_told_after_some_attempts():
    for url in ("http://127.0.0.1:1", "grpc://127.0.0.1:1"):
        with pytest.raises(ServerError, match=r"UNAVAILABLE: .*Nothing answers there"):
            Client(url, "tiny", timeout_seconds=0.5).status()


def test_a_server_that_is_no_url_is_refused():
    for url in ("localhost:8501", "ftp://localhost", "http://"):
        with pytest.raises(ValueError, match=r"must be http://HOST:PORT"):
            Client(url, "tiny")
    with pytest.raises(ValueError, match="does not tell its model: give its name"):
        Client("grpc://localhost:1")


def test_the_model_of_the_embedded_server_need_not_be_named(serving):
    assert Client(serving.rest).model == "tiny"
    assert Client(serving.url("")).model == "tiny"


@pytest.mark.slow
def test_a_runtime_that_dies_is_asked_again(artifact, tmp_path):
    (tmp_path / "tiny").symlink_to(artifact.parent)
    with Serving(tmp_path / "tiny") as serving, Client(serving.rest) as client:
        rows = [png()] * 8
        expected = client.predict(rows)["probabilities"]
        kill = threading.Timer(0.05, os.kill, (serving.runtime_pid, signal.SIGKILL))
        kill.start()
        for _ in range(30):
            got = client.predict(rows)["probabilities"]
            np.testing.assert_allclose(got, expected, atol=1e-6)
        assert serving.metric("runtime_restarts") == 1


@pytest.mark.slow
def test_tensorflow_is_not_imported_and_can_be_afterwards():
    code = (
        "import sys\n"
        "import export.client\n"
        "import export.server\n"
        "assert not any(x.partition('.')[0] in ('tensorflow', 'keras') "
        "for x in sys.modules)\n"
        "import tensorflow as tf\n"
        "from export.messages import from_message, pb\n"
        "message = tf.make_tensor_proto([1.5])\n"
        "assert isinstance(message, pb.TensorProto)\n"
        "assert from_message(message, 99) == [1.5]\n"
    )
    command = [sys.executable, "-c", code]
    result = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_predict_asks_a_server(serving, files):
    wide = {"COLUMNS": "200"}
    folder = files[0].parent
    result = run_command("predict", "--server", serving.rest, folder, env=wide)
    assert result.returncode == 1
    assert "2.png must be a whole JPEG, PNG, GIF or BMP file" in result.stderr
    assert all(f"{i}.png" in result.stdout for i in (0, 1, 3)), result.stdout
    alone = run_command("predict", serving.rest)
    assert alone.returncode == 1 and "needs an image" in alone.stderr
    url = f"grpc://{serving.grpc}"
    arguments = ("--server", url, "--model", "tiny", files[0])
    assert "%" in run_command("predict", *arguments).stdout
