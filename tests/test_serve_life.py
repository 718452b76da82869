"""What happens around requests: versions, a dead runtime, the end, the beginning."""

import asyncio
import json
import os
import shutil
import signal
import socket
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor

import pytest
from serving import Serving, ask, b64, png, run_command, shared_artifact

from export.server import Server
from export.server_metrics import Metrics
from export.server_models import Model
from export.server_service import Limits
from export.session import strings
from export.warmup import request, write_warmup

pytestmark = [pytest.mark.first, pytest.mark.slow]


@pytest.fixture(scope="module")
def artifact(tmp_path_factory):
    return shared_artifact(tmp_path_factory)


@pytest.fixture
def folder(artifact, tmp_path):
    """A folder of versions of its own, with version 1."""
    shutil.copytree(artifact, tmp_path / "tiny" / "1")
    return tmp_path / "tiny"


class Load:
    """Requests without a pause, from several threads, until told to end."""

    def __init__(self, serving, threads=4):
        self.statuses, self._ended = [], threading.Event()
        self._body = {"instances": [b64(png())]}
        self._serving = serving
        self._threads = [threading.Thread(target=self._ask) for _ in range(threads)]

    def _ask(self):
        while not self._ended.is_set():
            self.statuses.append(self._serving.post(self._body)[0])

    def __enter__(self):
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *exception):
        self._ended.set()
        for thread in self._threads:
            thread.join()


def wait_for(holds, seconds=300):
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.05)


def states(serving):
    found = serving.get()[1].get("model_version_status", [])
    return {int(x["version"]): x["state"] for x in found}


def test_versions_are_switched_under_load_and_no_request_fails(folder, tmp_path):
    with Serving(folder) as serving, Load(serving) as load:
        shutil.copytree(folder / "1", tmp_path / "copy")
        (tmp_path / "copy").rename(folder / "2")
        wait_for(lambda: states(serving) == {1: "END", 2: "AVAILABLE"})
        assert serving.get("/metadata")[1]["model_spec"]["version"] == "2"
        (folder / "2").rename(tmp_path / "gone")
        wait_for(lambda: states(serving) == {1: "AVAILABLE", 2: "END"})
        (folder / "1").rename(tmp_path / "gone too")
        before = len(load.statuses)
        assert set(load.statuses) == {200} and before > 20
        wait_for(lambda: set(load.statuses[before:]) >= {404})


def test_a_version_that_does_not_load_leaves_the_one_before(folder):
    with Serving(folder) as serving:
        (folder / "2").mkdir()
        (folder / "2" / "saved_model.pb").write_bytes(b"no model")
        wait_for(lambda: states(serving).get(2) == "END")
        (broken,) = serving.get("/versions/2")[1]["model_version_status"]
        assert broken["status"]["error_code"] != "OK"
        assert serving.post({"instances": [b64(png())]})[0] == 200


def in_loop(folder, follow):
    """Run a coroutine function of a model that has loaded what is there."""

    async def run():
        model = Model(folder, None, Metrics())
        await model.poll()
        try:
            async with asyncio.timeout(300):
                return await follow(model)
        finally:
            await model.close()

    return asyncio.run(run())


def test_a_version_is_unloaded_when_all_who_asked_are_answered(folder, tmp_path):
    """As a large request that is still being read while the version goes."""

    async def follow(model):
        with model.find("tiny") as served:
            (folder / "1").rename(tmp_path / "gone")
            await model.poll()
            await asyncio.sleep(0.5)
            assert model.served is None and model.states[1].state == "UNLOADING"
            inputs = {"image_bytes": strings([png()])}
            return await served.batcher.submit("serving_default", inputs, 1)

    assert in_loop(folder, follow)["valid"].tolist() == [True]


@pytest.mark.parametrize("odd", [b"max_batch_size { value: 0x20 }", b"# \xe9"])
def test_a_version_with_odd_parameters_stops_nothing(folder, odd):
    async def follow(model):
        shutil.copytree(folder / "1", folder / "2")
        (folder / "2" / "batching_params.pbtxt").write_bytes(odd)
        await model.poll()
        assert model.served.number == 1
        (folder / "2").rename(folder / "left")
        shutil.copytree(folder / "1", folder / "3")
        await model.poll()
        return model.served.number, model.states[2].message

    number, told = in_loop(folder, follow)
    assert number == 3 and "batching_params.pbtxt cannot be read" in told


def test_a_folder_that_cannot_be_listed_is_not_one_without_versions(folder, tmp_path):
    async def follow(model):
        folder.rename(tmp_path / "unmounted")
        await model.poll()
        there = model.served
        folder.mkdir()
        await model.poll()
        return there, model.served

    there, gone = in_loop(folder, follow)
    assert there is not None and gone is None


def test_version_0_is_version_0(folder):
    (folder / "1").rename(folder / "0")

    async def follow(model):
        return model.served.number

    assert in_loop(folder, follow) == in_loop(folder / "0", follow) == 0


def write_warm_up(version, signature):
    """One record for a signature."""
    inputs = {"image_bytes": strings([png()])}
    path = version / "assets.extra" / "tf_serving_warmup_requests"
    write_warmup(path, [request("tiny", signature, inputs)])


def test_a_version_is_warmed_up_before_it_is_served(folder, tmp_path):
    write_warm_up(folder / "1", "serving_default")
    with Serving(folder) as serving:
        shutil.copytree(folder / "1", tmp_path / "copy")
        write_warm_up(tmp_path / "copy", "none")  # which fails the load in a server
        (tmp_path / "copy").rename(folder / "2")
        wait_for(lambda: states(serving).get(2) == "END")
        (broken,) = serving.get("/versions/2")[1]["model_version_status"]
        assert broken["status"]["error_code"] == "FAILED_PRECONDITION"
        assert serving.post({"instances": [b64(png())]})[0] == 200
        serving.signal(signal.SIGTERM)
        assert "Version 2 is not served: " in serving.wait()[1]


def test_a_killed_runtime_comes_back_and_fails_only_what_it_was_answering(folder):
    with Serving(folder) as serving, Load(serving) as load:
        for _ in range(2):
            count = len(load.statuses)
            first = serving.runtime_pid
            os.kill(first, signal.SIGKILL)
            wait_for(lambda count=count: load.statuses[count:].count(200) > 8)
            assert serving.runtime_pid != first
    assert set(load.statuses) <= {200, 503}
    assert load.statuses.count(503) <= 8  # what was in flight, twice


def test_what_a_client_no_longer_waits_for_is_dropped(folder):
    with Serving(folder) as serving:
        host, port = serving.rest.removeprefix("http://").split(":")
        body = json.dumps({"instances": [b64(png(i)) for i in range(32)]}).encode()
        head = f"POST /v1/models/tiny:predict HTTP/1.1\r\nHost: {host}\r\n"
        request = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
        sockets = [socket.create_connection((host, int(port))) for _ in range(20)]
        for one in sockets:
            one.sendall(request)
        wait_for(lambda: serving.metric("batching_session:queuing_latency_count"))
        for one in sockets:
            one.close()
        assert serving.post({"instances": [b64(png())]})[0] == 200
        assert serving.metric("batching_session:processed_batch_size_count") < 20


def test_a_term_signal_ends_it_after_the_last_answer(folder):
    with Serving(folder) as serving:
        body = {"instances": [b64(png(i)) for i in range(32)]}
        with ThreadPoolExecutor(8) as pool:
            runtime = serving.runtime_pid
            os.kill(runtime, signal.SIGSTOP)  # nothing is answered before they are sent
            answers = [pool.submit(serving.post, body) for _ in range(8)]
            time.sleep(2)
            serving.signal(signal.SIGTERM)
            time.sleep(0.5)
            os.kill(runtime, signal.SIGCONT)
            status, told = serving.wait()
            codes = [x.result()[0] for x in answers]
    assert status == 0 and codes == [200] * 8
    assert "every request in flight was answered" in told
    assert "Traceback" not in told


def refused(*arguments, **kwargs):
    """The one sentence of a command that must fail."""
    result = run_command("serve", *arguments, **kwargs)
    assert result.returncode == 1
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1, result.stderr
    return lines[0]


def test_what_cannot_be_served_is_refused_in_a_sentence(folder, tmp_path):
    assert "must be an exported version" in refused(tmp_path / "none")
    with socket.socket() as other:
        other.bind(("127.0.0.1", 0))
        other.listen()
        port = other.getsockname()[1]
        free = ("--grpc-port", 0)
        told = refused(folder, "--rest-port", port, *free)
        assert f"127.0.0.1:{port} cannot be listened on" in told
        told = refused(folder, "--grpc-port", port, "--rest-port", 0)
        assert f"127.0.0.1:{port} cannot be listened on" in told
    warm_up = folder / "1" / "assets.extra" / "tf_serving_warmup_requests"
    warm_up.write_bytes(bytes(7))
    assert f"{warm_up} is damaged at byte 0" in refused(folder)
    warm_up.unlink()
    (folder / "1" / "saved_model.pb").write_bytes(b"no model")
    assert "does not load" in refused(folder)


def test_other_servers_are_started_or_their_absence_is_told(folder, tmp_path):
    program = tmp_path / "bin" / "tensorflow_model_server"
    program.parent.mkdir()
    told = refused(folder, "--tensorflow-serving", env={"PATH": "/nowhere"})
    assert "needs the program tensorflow_model_server" in told
    program.write_text('#!/bin/sh\necho "asked: $*"\n')
    program.chmod(0o755)
    path = {"PATH": f"{program.parent}{os.pathsep}{os.environ['PATH']}"}
    result = run_command("serve", folder, "--tensorflow-serving", env=path)
    assert result.returncode == 0
    assert f"--model_name=tiny --model_base_path={folder}" in result.stdout
    assert "needs the program docker" in refused(
        folder, "--docker", env={"PATH": "/nowhere"}
    )
    docker = program.with_name("docker")
    docker.write_text(
        "#!/bin/sh\necho 'Cannot connect to the Docker daemon.' >&2\nexit 1\n"
    )
    docker.chmod(0o755)
    told = refused(folder, "--docker", env=path)
    assert "Docker that runs: Cannot connect" in told


def test_batching_parameters_of_the_artifact_hold(folder):
    (folder / "1" / "batching_params.pbtxt").write_text(
        "max_batch_size { value: 2 }  # small\nallowed_batch_sizes: 1\n"
        "allowed_batch_sizes: 2\nmax_enqueued_batches { value: 2 }\n"
        "batch_timeout_micros { value: 1000 }\n"
    )
    with Serving(folder) as serving:
        row = b64(png())
        status, answer = serving.post({"instances": [row] * 3})
        assert status == 400 and "larger than maximum input batch size 2" in str(answer)
        assert serving.post({"instances": [row] * 2})[0] == 200
        with ThreadPoolExecutor(32) as pool:
            bodies = [{"instances": [row] * 2}] * 64
            statuses = [x for x, _ in pool.map(serving.post, bodies)]
        assert set(statuses) == {200, 503}  # a full queue refuses, and nothing else
        assert serving.post({"instances": [row] * 2})[0] == 200


def in_process(folder, limits, asked):
    """Answers of a server with other limits to a function that asks `url`."""

    async def run():
        server = Server(folder, rest_port=0, grpc_port=0, limits=limits)
        await server.start()
        url = f"http://127.0.0.1:{server.rest_port}/v1/models/tiny:predict"
        try:
            return await asyncio.to_thread(asked, url)
        finally:
            await server.stop()

    return asyncio.run(run())


def test_limits_are_kept_and_told(folder):
    def post(rows):
        body = json.dumps({"instances": [b64(png(i)) for i in range(rows)]}).encode()
        return lambda url: ask(urllib.request.Request(url, body))

    status, answer = in_process(folder, Limits(seconds=1e-4), post(8))
    assert status == 504 and "Timed out" in answer["error"]
    limits = Limits(rows=4, body_bytes=40_000)

    def several(url):
        return post(5)(url), post(20)(url), post(4)(url)

    many, large, good = in_process(folder, limits, several)
    assert many[0] == 400 and "must not exceed 4 rows" in many[1]["error"]
    assert large[0] == 400 and "must not exceed 40000 bytes" in large[1]["error"]
    assert good[0] == 200
    status, answer = in_process(folder, Limits(requests=0), post(1))
    assert status == 503 and "at once" in answer["error"]
