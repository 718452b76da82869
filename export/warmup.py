"""Requests that the server sends to itself before it serves a version, and samples.

`assets.extra/tf_serving_warmup_requests` is a TFRecord of PredictionLog messages, one
for every signature and batch size: a server sends them all while it loads, so that
nobody waits for the first request of a size. One that fails fails the load, so all are
replayed before a version is published (`read_warmup`). `classify` is asked by a
PredictLog too, which a server takes for every signature.
"""

import io
import struct
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from export.messages import CODES, FIELDS, from_message, pb, to_message
from export.requests import tf_example
from export.session import DTYPES, StatusError, strings

NAME = "tf_serving_warmup_requests"  # in assets.extra
LIMIT = 1000  # records; a server refuses to load a version that has more
EXAMPLE = "image/encoded"  # the feature of a tf.Example that holds the file
GREY = 128
LARGEST = 2**31  # bytes of a tensor in a record


def sample_image(width: int = 320, height: int = 240) -> bytes:
    """A small JPEG: a disc before a sky, of no class in particular."""
    from PIL import Image, ImageDraw

    y, x = np.mgrid[0:height, 0:width]
    sky = np.stack([90 + 100 * y / height, 120 + 80 * x / width, 0 * x + 200], -1)
    image = Image.fromarray(sky.astype("uint8"))
    box = (width // 3, height // 4, width * 2 // 3, height * 3 // 4)
    ImageDraw.Draw(image).ellipse(box, fill=(250, 200, 60))
    file = io.BytesIO()
    image.save(file, "JPEG", quality=80)
    return file.getvalue()


def sample_inputs(
    signature: dict, jpeg: bytes, rows: int, image_size: Sequence[int], fill=None
) -> dict[str, np.ndarray]:
    """Inputs that a signature answers, by the names, types and shapes it has.

    Args:
        signature: `{"inputs": {key: {"dtype", "shape"}}}`, as in `Runtime.signatures`.
        jpeg: An encoded image.
        rows: How many of it.
        image_size: Height and width where the model takes any.
        fill: A grey that stands for all pixels; None for those of the image.

    Raises:
        ValueError: If the signature has an input of which nothing is known.
    """
    return {
        key: _input(key, described, jpeg, rows, image_size, fill)
        for key, described in signature["inputs"].items()
    }


def _input(key, described, jpeg, rows, image_size, fill):
    shape = described["shape"]
    if key == "image_bytes":
        return strings([jpeg] * rows)
    if key == "inputs":
        return strings([tf_example(jpeg)] * rows)
    if key != "images":
        raise ValueError(
            f"An input must be image_bytes, images or inputs (tf.Example), got {key!r}."
        )
    height, width = (
        own if own > 0 else given
        for own, given in zip(shape[1:3], image_size, strict=True)
    )
    dtype = DTYPES[pb.DataType.Value(described["dtype"])]
    if fill is not None:
        return np.broadcast_to(np.asarray(fill, dtype), (rows, height, width, 3))
    from PIL import Image

    image = Image.open(io.BytesIO(jpeg)).convert("RGB").resize((width, height))
    return np.stack([np.asarray(image)] * rows).astype(dtype)


def request(model: str, signature: str, inputs: dict[str, np.ndarray]):
    """A PredictRequest. Pixels that are all one value take the room of one."""
    message = pb.PredictRequest()
    message.model_spec.name = model
    message.model_spec.signature_name = signature
    for key, array in inputs.items():
        message.inputs[key].CopyFrom(_tensor(array))
    return message


def _tensor(array: np.ndarray):
    if array.dtype == object or any(array.strides) or not array.size:
        return to_message(array)
    tensor = pb.TensorProto(dtype=CODES[array.dtype.name])
    for size in array.shape:
        tensor.tensor_shape.dim.add(size=size)
    values = getattr(tensor, FIELDS.get(array.dtype.name, "int_val"))
    values.append(array.reshape(-1)[0].item())  # a reader repeats it
    return tensor


def warmup_requests(
    signatures: dict,
    batch_sizes: Sequence[int],
    jpeg: bytes,
    image_size: Sequence[int] = (224, 224),
    model: str = "",
) -> list:
    """A PredictRequest for every signature and batch size.

    Args:
        signatures: As of `Runtime.signatures`.
        batch_sizes: The sizes that the server pads to.
        jpeg: The encoded image that is sent; a small one.
        image_size: Height and width where the model takes any.
        model: Name of the model, which a server does not look at here.

    Raises:
        ValueError: If a signature has an input of which nothing is known.
    """
    return [
        request(model, name, sample_inputs(signature, jpeg, rows, image_size, GREY))
        for name, signature in sorted(signatures.items())
        for rows in batch_sizes
    ]


def write_warmup(path: str | Path, requests: Iterable) -> int:
    """Write PredictRequests as the warm-up file of a version.

    Args:
        path: `VERSION/assets.extra/tf_serving_warmup_requests`; its folder is made.
        requests: Of `warmup_requests`.

    Returns:
        The number of records.

    Raises:
        ValueError: If there are none or more than 1000, or one has no signature name.
    """
    requests = list(requests)
    if not 0 < len(requests) <= LIMIT:
        raise ValueError(
            f"A server takes 1 to {LIMIT} warm-up requests, got {len(requests)}."
        )
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        for message in requests:
            if not message.model_spec.signature_name:
                raise ValueError("A warm-up request must name its signature.")
            log = pb.PredictionLog()
            log.predict_log.request.CopyFrom(message)
            file.write(_record(log.SerializeToString()))
    return len(requests)


def read_warmup(path: str | Path) -> list[tuple[str, dict[str, np.ndarray]]]:
    """The requests of a warm-up file, ready for `Runtime.run`.

    Returns:
        Pairs of a signature and its inputs.

    Raises:
        ValueError: If a server would refuse the file: damaged, none or more than 1000
            records, one that is no PredictLog.
    """
    found = []
    for data in _records(Path(path)):
        try:
            log = pb.PredictionLog.FromString(data)
            message = log.predict_log.request
            inputs = {
                key: from_message(tensor, LARGEST)
                for key, tensor in sorted(message.inputs.items())
            }
        except (pb.DecodeError, StatusError) as error:
            raise ValueError(f"{path}, record {len(found)}: {error}.") from error
        if log.WhichOneof("log_type") != "predict_log":
            raise ValueError(
                f"{path} must hold PredictLogs, record {len(found)} isn't."
            )
        found.append((message.model_spec.signature_name, inputs))
    if not 0 < len(found) <= LIMIT:
        raise ValueError(f"{path} must hold 1 to {LIMIT} records, got {len(found)}.")
    return found


def replayed(runtime, version: Path, manifest: dict) -> tuple[bool, str]:
    """Whether a session answers every record, of which there is one for every size.

    Args:
        runtime: The `Runtime` of the version.
        version: The version directory.
        manifest: Its manifest, which tells the batch sizes.

    Raises:
        StatusError: If it answers with an error: the server would not load the version.
    """
    try:
        records = read_warmup(version / "assets.extra" / NAME)
    except (OSError, ValueError) as error:
        return False, str(error)
    sizes = manifest["batch_sizes"]
    missing = {(name, size) for name in runtime.signatures for size in sizes}
    for signature, inputs in records:
        rows = len(*inputs.values())
        outputs = runtime.run(signature, **inputs)
        if any(len(x) != rows for x in outputs.values()):
            return False, f"{signature} answers {rows} rows with another number"
        missing.discard((signature, rows))
    if missing:
        name, size = min(missing)
        return False, f"{len(missing)} of them are missing, as {name} of {size} rows"
    return True, f"{len(records)} requests answered"


# --- TFRecord: length, its checksum, data, its checksum ---


def _record(data: bytes) -> bytes:
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _records(path: Path) -> Iterator[bytes]:
    content = path.read_bytes()
    start = 0
    while start < len(content):
        head, check = content[start : start + 8], content[start + 8 : start + 12]
        if len(check) < 4 or _masked(head) != check:
            raise ValueError(f"{path} is damaged at byte {start}.")
        end = start + 12 + struct.unpack("<Q", head)[0]
        data = content[start + 12 : end]
        if _masked(data) != content[end : end + 4]:
            raise ValueError(f"{path} is damaged at byte {start}.")
        yield data
        start = end + 4


def _masked(data: bytes) -> bytes:
    """The CRC-32C of data, rotated and shifted as TFRecord has it."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = _TABLE[(crc ^ byte) & 0xFF] ^ (crc >> 8)
    crc ^= 0xFFFFFFFF
    masked = ((crc >> 15) | (crc << 17)) + 0xA282EAD8
    return struct.pack("<I", masked & 0xFFFFFFFF)


def _table() -> list[int]:
    table = []
    for crc in range(256):
        for _ in range(8):
            crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
        table.append(crc)
    return table


_TABLE = _table()
