"""What it takes to run a server on an exported model, written beside its versions.

In the version directory, before it is published (`complete`):

    batching_params.pbtxt                         how requests are put together
    assets.extra/labels.txt                       the classes, one a line
    assets.extra/tf_serving_warmup_requests       see `export.warmup`

In the folder of the versions, after it (`write_bundle`): `bundle/`, with the server's
configuration, compose and Kubernetes files, sample requests and a README. The files are
those of `export/templates`, filled in.
"""

import base64
import json
import re
import string
import textwrap
from collections.abc import Sequence
from pathlib import Path

from export.rename import replace, sync, sync_one
from export.versions import EXTRA, Version, parse_config, staging, versions

IMAGE = "tensorflow/serving:2.20.0"
BATCH_SIZES = (1, 2, 4, 8, 16, 32)
BUNDLE = "bundle"
TEMPLATES = Path(__file__).with_name("templates")
FLAGS = (
    "--port=8500",
    "--rest_api_port=8501",
    "--rest_api_timeout_in_ms=30000",
    "--model_config_file={config}/models.config",
    "--model_config_file_poll_wait_seconds=30",
    "--allow_version_labels_for_unavailable_models=true",
    "--monitoring_config_file={config}/monitoring.config",
    "--enable_batching=true",
    "--enable_per_model_batching_parameters=true",
)
LABELS_SHOWN = 20
BAD_ROWS = (
    "`valid` is false in the row of a file\nthat is damaged, too large or no image, "
    "and the other rows are answered all the same;\n`strict` fails as a whole instead."
)


def complete(version: str | Path, manifest: dict, signatures: dict) -> None:
    """Write what a server reads in the version directory beside the model.

    Args:
        version: The version directory, not published yet.
        manifest: `labels`, `preprocess` and `batch_sizes`.
        signatures: As of `Runtime.signatures`.
    """
    from export.warmup import NAME, sample_image, warmup_requests, write_warmup

    version = Path(version)
    sizes = manifest["batch_sizes"]
    (version / EXTRA).mkdir(exist_ok=True)
    (version / "batching_params.pbtxt").write_text(batching_parameters(sizes))
    labels = (" ".join(label.split("\n")) for label in manifest["labels"])
    (version / EXTRA / "labels.txt").write_text("".join(f"{x}\n" for x in labels))
    size = manifest["preprocess"]["image_size"]
    requests = warmup_requests(signatures, sizes, sample_image(64, 48), size)
    write_warmup(version / EXTRA / NAME, requests)


def batching_parameters(batch_sizes: Sequence[int] = BATCH_SIZES) -> str:
    """Text of `batching_params.pbtxt`, which a server reads in a version directory.

    Args:
        batch_sizes: To which requests are padded; the last one is the maximum.

    Raises:
        ValueError: If they do not increase from 1 or more.
    """
    sizes = list(batch_sizes)
    if not sizes or sizes[0] < 1 or sizes != sorted(set(sizes)):
        raise ValueError(f"Batch sizes must increase from 1 or more, got {sizes}.")
    lines = "\n".join(f"allowed_batch_sizes: {size}" for size in sizes)
    return _filled("batching_params.pbtxt", sizes=lines, max_batch=sizes[-1])


def served_name(directory: str | Path) -> str:
    """Name of the model in URLs: that of its folder, in letters that need no quotes."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "-", Path(directory).resolve().name)


def write_bundle(
    directory: str | Path, name: str, manifest: dict, signatures: dict
) -> Path:
    """Write `<directory>/bundle/`, in the place of the one before, as a whole.

    A `models.config` that pins versions is kept: somebody serves by it.

    Args:
        directory: Folder of the versions, at least one.
        name: Name of the model in URLs (`served_name`).
        manifest: Of the newest version: `task`, `model`, `labels`, `preprocess`,
            `batch_sizes` and `max_pixels`.
        signatures: As of `Runtime.signatures`.

    Returns:
        The folder.

    Raises:
        ValueError: If there is no version, or the name cannot stand in a URL.
    """
    directory = Path(directory)
    found = versions(directory)
    if not found:
        raise ValueError(f"A bundle needs a version, {directory} has none.")
    if not re.fullmatch(r"[A-Za-z0-9_.-]+", name):
        raise ValueError(f"name must be of letters, digits and _.-, got {name!r}.")
    sizes = manifest["batch_sizes"]
    with staging(directory) as hidden:
        hidden.mkdir()
        pins = pinned(directory)
        for file, text in _texts(name, manifest, signatures, found, pins).items():
            (hidden / file).write_text(text)
        (hidden / "batching_params.pbtxt").write_text(batching_parameters(sizes))
        _write_requests(hidden / "requests", name, manifest, signatures)
        sync(hidden)
        replace(hidden, directory / BUNDLE)
        sync_one(directory)
    return directory / BUNDLE


def pinned(directory: Path) -> str | None:
    """The text of `bundle/models.config` where it pins versions.

    Raises:
        ValueError: If it cannot be read; it is written by hand then.
    """
    config = directory / BUNDLE / "models.config"
    text = config.read_text() if config.is_file() else ""
    if "specific" not in text:
        return None
    models = parse_config(text, config).model_config_list.config
    pins = any(x.model_version_policy.HasField("specific") for x in models)
    return text if pins else None


def _texts(
    name: str,
    manifest: dict,
    signatures: dict,
    found: list[Version],
    pinned: str | None,
) -> dict[str, str]:
    newest, stable = found[-1], found[-2 if len(found) > 1 else -1]
    pins = dict.fromkeys((stable.number, newest.number))
    files = [x for x in newest.path.rglob("*") if x.is_file()]
    mebibytes = max(1, round(sum(x.stat().st_size for x in files) / 2**20))
    host = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-") or "model"
    facts = {
        "name": name,
        "host": host,
        "image": IMAGE,
        "newest": newest.path.name,
        "stable": stable.number,
        "pins": " ".join(f"versions: {number}" for number in pins),
        "memory": f"{1024 + 2 * mebibytes}Mi",
        "limit": f"{2048 + 4 * mebibytes}Mi",
        "size": f"{mebibytes} MiB",
        **_about(name, manifest, signatures),
    }
    models = pinned or _filled("models.newest.config", **facts)
    monitoring = _filled("monitoring.config", **facts)
    config = f"/models/{name}/{BUNDLE}"
    compose = _filled("compose.yaml", **facts, flags=_flags(config, 6))
    kubernetes = _filled(
        "kubernetes.yaml",
        **facts,
        flags=_flags("/config", 12),
        models=textwrap.indent(models.rstrip(), " " * 4),
        monitoring=textwrap.indent(monitoring.rstrip(), " " * 4),
    )
    plain = (
        "models.newest.config",
        "models.canary.config",
        "ssl.config.template",
        "prometheus-adapter.yaml",
        "README.md",
    )
    return {
        "models.config": models,
        "monitoring.config": monitoring,
        "compose.yaml": compose,
        "kubernetes.yaml": kubernetes,
        **{file: _filled(file, **facts) for file in plain},
    }


def _flags(config: str, indent: int) -> str:
    lines = (f"- {flag.format(config=config)}" for flag in FLAGS)
    return textwrap.indent("\n".join(lines), " " * indent)


def _about(name: str, manifest: dict, signatures: dict) -> dict:
    """What the README tells of the model."""
    labels, sizes = manifest["labels"], manifest["batch_sizes"]
    height, width = manifest["preprocess"]["image_size"]
    kinds = {
        "segmentation": "a class for every pixel of an image",
        "classification": "the class of an image",
    }
    shown = ", ".join(f"{i} {x}" for i, x in enumerate(labels[:LABELS_SHOWN]))
    more = len(labels) - LABELS_SHOWN
    shown += f" and {more} more" if more > 0 else ""
    about = (
        f"The vision transformer `{manifest['model']}` tells "
        f"{kinds[manifest['task']]}: one of {len(labels)}. It sees {height} x {width} "
        "pixels; files of any size are resized and cropped inside the model, as they "
        "were in its training."
    )
    pixels = manifest["max_pixels"]
    return {
        "about": textwrap.fill(about, 92),
        "labels": f"Classes: {shown}.",
        "signatures": "\n".join(_rows(signatures)),
        "curls": _curls(name, signatures),
        "batch_sizes": ", ".join(map(str, sizes)),
        "max_batch": sizes[-1],
        "clients": 2 * sizes[-1],
        "limits": f"an image of more than {pixels:,} pixels is not decoded. ",
        "bad_rows": BAD_ROWS,
    }


def _rows(signatures: dict):
    for name, signature in sorted(signatures.items()):
        cells = [
            ", ".join(f"`{key}` {_type(x)}" for key, x in signature[side].items())
            for side in ("inputs", "outputs")
        ]
        yield f"| `{name}` | {cells[0]} | {cells[1]} |"


def _type(tensor: dict) -> str:
    dtype = tensor["dtype"].removeprefix("DT_").lower()
    sizes = [str(x) if x >= 0 else "any" for x in tensor["shape"] or []]
    shape = f"({', '.join(['N', *sizes[1:]])})" if sizes else ""
    return f"{'float32' if dtype == 'float' else dtype} {shape}".strip()


def _curls(name: str, signatures: dict) -> str:
    lines = [
        f"curl --fail-with-body -d @requests/{signature}.json "
        f"http://localhost:8501/v1/models/{name}:{_method(signature)}"
        for signature in sorted(signatures)
        if signature != "serving_default"
    ]
    return "\n".join(["```bash", *lines, "```"])


def _method(signature: str) -> str:
    return "classify" if signature == "classify" else "predict"


def _write_requests(folder: Path, name: str, manifest: dict, signatures: dict) -> None:
    from export.warmup import request, sample_image, sample_inputs

    folder.mkdir()
    jpeg = sample_image()
    (folder / "sample.jpg").write_bytes(jpeg)
    size = manifest["preprocess"]["image_size"]
    for signature, described in signatures.items():
        inputs = sample_inputs(described, jpeg, 1, size)
        message = request(name, signature, inputs)
        (folder / f"{signature}.pb").write_bytes(message.SerializeToString())
        body = rest_body(signature, inputs, jpeg)
        (folder / f"{signature}.json").write_text(json.dumps(body) + "\n")


def rest_body(signature: str, inputs: dict, jpeg: bytes) -> dict:
    """What REST takes: the rows of an input; for `classify` examples by features."""
    from export.warmup import EXAMPLE

    if _method(signature) == "classify":
        examples = [{EXAMPLE: _b64(jpeg)}]
        return {"signature_name": signature, "examples": examples}
    (array,) = inputs.values()
    rows = [_b64(x) if isinstance(x, bytes) else x.tolist() for x in array]
    if array.dtype == "float32":  # these pixels are whole numbers, and shorter so
        rows = array.astype(int).tolist()
    return {"signature_name": signature, "instances": rows}


def _b64(data: bytes) -> dict:
    return {"b64": base64.b64encode(data).decode()}


def _filled(template: str, **facts) -> str:
    text = (TEMPLATES / template).read_text()
    return string.Template(text).substitute({k: str(v) for k, v in facts.items()})
