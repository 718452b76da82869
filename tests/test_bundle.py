"""The bundle of a model by hand; an export itself is looked at in test_export.py."""

import base64
import http.server
import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import yaml
from hand_made import LABEL_MAPS, MANIFEST, publish_two
from PIL import Image

from export import Runtime
from export.bundle import (
    FLAGS,
    served_name,
    write_bundle,
)
from export.messages import pb
from export.versions import parse_config, served, versions
from export.warmup import (
    read_warmup,
    write_warmup,
)

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return publish_two(tmp_path_factory.mktemp("models") / "digits")


@pytest.fixture(scope="module")
def runtime(folder):
    with Runtime(folder / "2") as runtime:
        yield runtime


@pytest.fixture(scope="module")
def bundle(folder):
    return folder / "bundle"


def config(bundle, name):
    path = bundle / name
    (model,) = parse_config(path.read_text(), path).model_config_list.config
    assert (model.name, model.base_path) == ("digits", "/models/digits")
    assert model.model_platform == "tensorflow"
    return model


def test_the_configurations_are_what_the_server_parses(bundle):
    for name in ("models.config", "models.newest.config"):
        assert not config(bundle, name).HasField("model_version_policy")
    canary = config(bundle, "models.canary.config")
    assert list(canary.model_version_policy.specific.versions) == [1, 2]
    assert dict(canary.version_labels) == {"stable": 1, "canary": 2}
    monitoring = (bundle / "monitoring.config").read_text().strip()
    metrics = (
        'prometheus_config { enable: true path: "/monitoring/prometheus/metrics" }'
    )
    assert monitoring == metrics


def test_the_tls_template_has_the_fields_of_the_server(bundle):
    lines = (bundle / "ssl.config.template").read_text().splitlines()
    fields = [x.partition(":")[0] for x in lines if not x.startswith("#")]
    assert fields == ["server_key", "server_cert", "custom_ca", "client_verify"]


def documents(bundle):
    found = list(yaml.safe_load_all((bundle / "kubernetes.yaml").read_text()))
    assert all("kind" in x and "apiVersion" in x for x in found)
    return {x["kind"]: x for x in found}


def test_compose_and_kubernetes_start_the_server_alike(bundle):
    compose = yaml.safe_load((bundle / "compose.yaml").read_text())
    service = compose["services"]["tensorflow-serving"]
    container = pod(bundle)["containers"][0]
    image = re.fullmatch(r"\$\{TENSORFLOW_SERVING_IMAGE:-(.*)\}", service["image"])[1]
    assert image == container["image"] and re.fullmatch(r".*:\d+\.\d+\.\d+", image)
    assert service["entrypoint"] == container["command"] == ["tensorflow_model_server"]
    for flags, place in (
        (service["command"], "/models/digits/bundle"),
        (container["args"], "/config"),
    ):
        assert flags == [flag.format(config=place) for flag in FLAGS]
        paths = [x.partition("=")[2] for x in flags if "_config_file=" in x]
        assert [(bundle / Path(path).name).is_file() for path in paths] == [True, True]
    (volume,) = service["volumes"]
    assert (volume["source"], volume["target"]) == ("..", "/models/digits")
    assert volume["read_only"] is True
    assert service["ports"] == ["8500:8500", "8501:8501"]
    assert {"--port=8500", "--rest_api_port=8501"} < set(FLAGS)


def pod(bundle):
    return documents(bundle)["Deployment"]["spec"]["template"]["spec"]


def test_kubernetes_objects_refer_to_each_other(bundle):
    found = documents(bundle)
    deployment = found["Deployment"]
    labels = deployment["spec"]["template"]["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == labels
    assert found["Service"]["spec"]["selector"] == labels
    assert found["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"] == labels
    scaled = found["HorizontalPodAutoscaler"]["spec"]
    assert scaled["scaleTargetRef"]["name"] == deployment["metadata"]["name"]
    assert scaled["minReplicas"] > found["PodDisruptionBudget"]["spec"]["minAvailable"]
    (rule,) = yaml.safe_load((bundle / "prometheus-adapter.yaml").read_text())
    metric = scaled["metrics"][0]["pods"]["metric"]["name"]
    assert metric == rule["name"]["as"]
    assert (
        ":tensorflow:serving:batching_session:queuing_latency" in rule["metricsQuery"]
    )
    container = pod(bundle)["containers"][0]
    ports = {x["name"]: x["containerPort"] for x in container["ports"]}
    assert ports == {"grpc": 8500, "rest": 8501}
    assert {x["targetPort"] for x in found["Service"]["spec"]["ports"]} == set(ports)
    status = "/v1/models/digits"
    for name, path in {
        "startupProbe": f"{status}/metadata",
        "readinessProbe": f"{status}/metadata",
        "livenessProbe": status,
    }.items():
        assert container[name]["httpGet"] == {"path": path, "port": "rest"}
    volumes = {x["name"]: x for x in pod(bundle)["volumes"]}
    assert {x["name"] for x in container["volumeMounts"]} == set(volumes)
    data = found["ConfigMap"]["data"]
    assert (
        volumes["config"]["configMap"]["name"] == found["ConfigMap"]["metadata"]["name"]
    )
    for name, text in data.items():
        assert text.strip() == (bundle / name).read_text().strip()


class Metadata(http.server.BaseHTTPRequestHandler):
    status = 200

    def do_GET(self):
        right = self.path == "/v1/models/digits/metadata"
        self.send_response(self.status if right else 400)
        self.end_headers()

    def log_message(self, *_):
        pass


@pytest.mark.skipif(not shutil.which("bash"), reason="as in the image, bash runs it")
@pytest.mark.parametrize("status", [200, 404, None])
def test_the_health_check_of_compose_is_that_metadata_is_there(
    bundle, status, monkeypatch
):
    monkeypatch.setattr(Metadata, "status", status)
    compose = yaml.safe_load((bundle / "compose.yaml").read_text())
    test = compose["services"]["tensorflow-serving"]["healthcheck"]["test"]
    assert test[0] == "CMD"
    server = http.server.HTTPServer(("127.0.0.1", 0), Metadata)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    port = server.server_port
    if status is None:
        server.server_close()
    command = [x.replace("$$", "$").replace("8501", str(port)) for x in test[1:]]
    done = subprocess.run(command, capture_output=True, timeout=300)
    server.shutdown()
    server.server_close()
    assert (done.returncode == 0) is (status == 200)


def inputs_of(body, signature, runtime):
    """What a server makes of a REST body."""
    assert body["signature_name"] == signature
    ((key, described),) = runtime.signatures[signature]["inputs"].items()
    if "examples" in body:
        messages = []
        for features in body["examples"]:
            message = pb.Example()
            for name, value in features.items():
                data = base64.b64decode(value["b64"])
                message.features.feature[name].bytes_list.value.append(data)
            messages.append(message.SerializeToString())
        return {key: np.array(messages, object)}
    if described["dtype"] == "DT_STRING":
        rows = [base64.b64decode(row["b64"]) for row in body["instances"]]
        return {key: np.array(rows, object)}
    dtype = {"DT_FLOAT": "float32", "DT_UINT8": "uint8"}[described["dtype"]]
    return {key: np.array(body["instances"], dtype)}


def test_every_sample_request_is_answered_alike_by_rest_and_grpc(bundle, runtime):
    for signature in runtime.signatures:
        body = json.loads((bundle / f"requests/{signature}.json").read_text())
        inputs = inputs_of(body, signature, runtime)
        data = (bundle / f"requests/{signature}.pb").read_bytes()
        message = pb.PredictRequest.FromString(data)
        assert message.model_spec.name == "digits"
        assert message.model_spec.signature_name == signature
        log = pb.PredictionLog()
        log.predict_log.request.CopyFrom(message)
        by_rest, by_grpc = (
            runtime.run(signature, **x) for x in (inputs, read_one(log, bundle))
        )
        for key, value in by_rest.items():
            np.testing.assert_array_equal(value, by_grpc[key])
    assert {x.suffix for x in (bundle / "requests").iterdir()} == {
        ".json",
        ".pb",
        ".jpg",
    }


def read_one(log, bundle):
    path = bundle.parent / ".one"
    write_warmup(path, [log.predict_log.request])
    ((_, inputs),) = read_warmup(path)
    path.unlink()
    return inputs


def test_the_sample_image_is_the_one_in_the_requests(bundle):
    assert Image.open(bundle / "requests/sample.jpg").size == (320, 240)
    body = json.loads((bundle / "requests/serving_default.json").read_text())
    sample = (bundle / "requests/sample.jpg").read_bytes()
    assert base64.b64decode(body["instances"][0]["b64"]) == sample


def test_the_readme_tells_of_every_signature_and_class(bundle, runtime):
    text = (bundle / "README.md").read_text()
    for name, signature in runtime.signatures.items():
        (row,) = [x for x in text.splitlines() if x.startswith(f"| `{name}` |")]
        assert all(
            f"`{x}`" in row for x in (*signature["inputs"], *signature["outputs"])
        )
    assert "0 cat, 1 dog, 2 émeu" in text and "50,000,000 pixels" in text
    files = re.findall(r"requests/[\w.]+", text)
    assert len(files) > 6 and all((bundle / x).is_file() for x in files)
    for x in re.findall(r"[\w.-]+\.(?:yaml|config|template)\b", text):
        assert (bundle / x).is_file()
    assert "$" not in text.replace("$host", "")


def test_the_python_of_the_readme_makes_the_sample_request(bundle, monkeypatch):
    """All of it but the call: no gRPC server is in this test."""
    code = re.search(
        r"```python\n(.*?)with grpc", (bundle / "README.md").read_text(), re.S
    )
    monkeypatch.chdir(bundle)
    names = {}
    exec(code[1], names)
    request = names["request"]
    data = (bundle / "requests/serving_default.pb").read_bytes()
    sample = type(request).FromString(data)
    assert request.inputs == sample.inputs
    assert request.model_spec.name == sample.model_spec.name


# --- one bundle after another ---


@pytest.fixture
def other(folder, tmp_path):
    """A folder of two versions with a bundle that may be changed."""
    for number in ("1", "2"):
        shutil.copytree(folder / number, tmp_path / "m" / number)
    write_bundle(tmp_path / "m", "m", MANIFEST, LABEL_MAPS)
    return tmp_path / "m"


def test_a_configuration_that_pins_versions_outlives_an_export(other):
    bundle = other / "bundle"
    shutil.copy(bundle / "models.canary.config", bundle / "models.config")
    assert served(other) == {1: ["stable"], 2: ["canary"]}
    (other / "2").rename(other / "3")
    write_bundle(other, "m", MANIFEST, LABEL_MAPS)
    assert "versions: 1 versions: 2" in (bundle / "models.config").read_text()
    canary = (bundle / "models.canary.config").read_text()
    assert "versions: 1 versions: 3" in canary
    (config,) = [
        x
        for x in yaml.safe_load_all((bundle / "kubernetes.yaml").read_text())
        if x["kind"] == "ConfigMap"
    ]
    assert "versions: 1 versions: 2" in config["data"]["models.config"]
    shutil.copy(bundle / "models.newest.config", bundle / "models.config")
    write_bundle(other, "m", MANIFEST, LABEL_MAPS)
    assert served(other) == {3: []}


def test_names_that_are_no_names_in_a_url_are_changed_or_refused(other, tmp_path):
    assert served_name(tmp_path / "my digits: été") == "my-digits-t-"
    assert served_name(tmp_path / "ViT-B_16.v2") == "ViT-B_16.v2"
    with pytest.raises(ValueError, match=r"letters, digits and _.-, got 'a b'"):
        write_bundle(other, "a b", MANIFEST, LABEL_MAPS)
    with pytest.raises(ValueError, match=r"needs a version, .* has none"):
        write_bundle(tmp_path / "none", "m", MANIFEST, LABEL_MAPS)


def test_kubernetes_names_are_host_names(other):
    write_bundle(other, "ViT_B.16-", MANIFEST, LABEL_MAPS)
    found = documents(other / "bundle")
    assert {x["metadata"]["name"] for x in found.values()} == {
        "vit-b-16",
        "vit-b-16-serving",
    }
    text = (other / "bundle/compose.yaml").read_text()
    assert yaml.safe_load(text)["name"] == "vit-b-16"


WRITER = """
import json, sys
MANIFEST, LABEL_MAPS = json.loads(sys.argv[2])
from export.bundle import write_bundle
for i in range(10_000):
    write_bundle(sys.argv[1], f"generation{i}", MANIFEST, LABEL_MAPS)
    print(i, flush=True)
"""


def generation(bundle):
    """Which one it is, of which every file must be."""
    texts = [x.read_text() for x in bundle.iterdir() if x.suffix in (".config", ".md")]
    found = {x for text in texts for x in re.findall(r"generation\d+", text)}
    assert len(found) <= 1 and len(texts) == 5
    return found


def kill_writers(folder, times):
    draw, missing, done = random.Random(0), [], threading.Event()

    def poll():
        while not done.wait(0.001):
            try:
                (folder / "bundle/README.md").read_text()
            except FileNotFoundError:
                missing.append(time.time())

    poller = threading.Thread(target=poll)
    poller.start()
    seen = set()
    for _ in range(times):
        facts = json.dumps([MANIFEST, LABEL_MAPS])
        command = [sys.executable, "-c", WRITER, str(folder), facts]
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        with subprocess.Popen(
            command, cwd=ROOT / "tests", env=environment, stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()
            time.sleep(draw.uniform(0, 0.2))
            child.send_signal(signal.SIGKILL)
        seen |= generation(folder / "bundle")
    done.set()
    poller.join()
    assert missing == []
    assert seen
    write_bundle(folder, "m", MANIFEST, LABEL_MAPS)
    names = sorted(x.name for x in folder.iterdir())
    assert names == ["1", "2", "bundle"]
    assert len(versions(folder)) == 2


def test_a_kill_while_writing_leaves_the_old_bundle_or_the_new_one(other):
    kill_writers(other, 2)


@pytest.mark.slow
def test_many_kills_while_writing_leave_the_old_bundle_or_the_new_one(other):
    kill_writers(other, 12)
