"""Requests to an exported model: such as clients send, and such as nobody should."""

import io
import struct
import zlib
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from PIL import Image

from export.session import strings

SIDE = 12_000  # pixels: 432 MB once decoded, 20 KB in a file


def sample(description: Mapping[str, dict], rows: int, seed: int = 0) -> dict:
    """Inputs of a signature that a client could send.

    Args:
        description: Its inputs, as in `Runtime.signatures[name]["inputs"]`.
        rows: N.
        seed: Of the pixels; another gives other rows.

    Returns:
        An array `(N, ...)` for each input.
    """
    inputs = {}
    for key, told in description.items():
        pixels = [waves(48 + 8 * i, 64, seed + i) for i in range(rows)]
        if told["dtype"] == "DT_STRING":
            files = [encoded(x, "PNG") for x in pixels]
            wrapped = files if key == "image_bytes" else map(tf_example, files)
            inputs[key] = strings(list(wrapped))
            continue
        height, width = (32 if side < 0 else side for side in told["shape"][1:3])
        dtype = {"DT_FLOAT": "float32", "DT_UINT8": "uint8"}[told["dtype"]]
        images = [waves(height, width, seed + i) for i in range(rows)]
        inputs[key] = np.asarray(images, dtype).reshape(rows, height, width, 3)
    return inputs


def encoded(pixels: np.ndarray, kind: str) -> bytes:
    """An image file: uint8 `(h, w, 3)` as `"PNG"`, `"JPEG"`, `"GIF"` or `"BMP"`."""
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, kind)
    return file.getvalue()


def tf_example(image: bytes) -> bytes:
    """A serialized tf.Example whose feature "image/encoded" is a file."""

    def field(number, data):
        return bytes([number << 3 | 2]) + _varint(len(data)) + data

    feature = field(1, field(1, image))  # Feature.bytes_list.value
    entry = field(1, b"image/encoded") + field(2, feature)
    return field(1, field(1, entry))  # Example.features.feature


def mixed_files() -> tuple[np.ndarray, list[bool]]:
    """Files of which most are damaged, and which are whole."""
    png, jpeg = (encoded(waves(48, 64, 0), kind) for kind in ("PNG", "JPEG"))
    middle = len(png) // 2
    wrong_crc = png[:middle] + bytes([png[middle] ^ 0xFF]) + png[middle + 1 :]
    files = [png, jpeg[: len(jpeg) // 2], b"not an image", b"", wrong_crc, png]
    return strings(files), [True, False, False, False, False, True]


def huge_png(side: int = SIDE) -> bytes:
    """A PNG of `side` x `side` pixels, black, 1 bit each."""

    def chunk(kind, data):
        check = struct.pack(">I", zlib.crc32(kind + data))
        return struct.pack(">I", len(data)) + kind + data + check

    header = struct.pack(">IIBBBBB", side, side, 1, 0, 0, 0, 0)
    rows = zlib.compress(bytes(side * (1 + -(-side // 8))))
    parts = chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def hostile(description: Mapping[str, dict]) -> Iterator[tuple[str, dict, bool]]:
    """Requests that no server should meet and every server does.

    Args:
        description: Inputs of a signature.

    Yields:
        Name, inputs, and whether an answer of no valid rows is right; an error status
        INVALID_ARGUMENT always is.
    """
    for key, told in description.items():
        requests = _strings() if told["dtype"] == "DT_STRING" else _pixels(told)
        for name, value, acceptable in requests:
            yield name, {key: value}, acceptable


def _strings() -> Iterator[tuple[str, np.ndarray, bool]]:
    one = strings([b"x"])
    yield "of rank 0", one.reshape(()), False
    yield "of rank 2", one.reshape(1, 1), False
    yield "of float32", np.zeros(1, "float32"), False
    yield "none", strings([]), True
    yield "garbage", strings([b"garbage", b"", b"\xff\xd8\xff\xe0\xff\xff" * 9]), True


def _pixels(told: dict) -> Iterator[tuple[str, np.ndarray, bool]]:
    shape = told["shape"]
    height, width = sides = [32 if side < 0 else side for side in shape[1:3]]
    dtype = {"DT_FLOAT": "float32", "DT_UINT8": "uint8"}.get(told["dtype"], "float32")
    shapes = {
        "of rank 0": ((), False),
        "of rank 1": ((3,), False),
        "of rank 2": ((height, width), False),
        "of rank 3": ((height, width, 3), False),
        "of rank 5": ((1, 1, height, width, 3), False),
        "of the wrong size": ((16, *(x + 8 for x in sides), 3), False),
        "of no pixels": ((1, 0, 0, 3), False),
        "of one channel": ((2, height, width, 1), False),
        "none": ((0, height, width, 3), True),
    }
    if shape[1] < 0:
        shapes["of the wrong size"] = ((1, 2000, 2000, 3), False)  # too large
    for name, (size, acceptable) in shapes.items():
        yield name, np.full(size, 100, dtype), acceptable
    for other in sorted({"float32", "float64", "uint8", "int64"} - {dtype}):
        yield f"of {other}", np.zeros((1, height, width, 3), other), False
    if dtype == "float32":
        yield "not finite", np.full((1, height, width, 3), np.nan, dtype), True


def waves(height: int, width: int, seed: int = 0) -> np.ndarray:
    """A picture: uint8 `(height, width, 3)`; another seed gives another."""
    y, x = np.mgrid[0:height, 0:width].astype("float32")
    shifts = seed + np.arange(3)
    planes = [np.sin(x / 7 + i) * np.cos(y / 5 - i) * 100 + 128 for i in shifts]
    return np.stack(planes, -1).astype("uint8")


def _varint(number: int) -> bytes:
    parts: Sequence[int] = []
    while number > 0x7F:
        parts = [*parts, number & 0x7F | 0x80]
        number >>= 7
    return bytes([*parts, number])
