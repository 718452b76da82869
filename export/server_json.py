"""The JSON of TensorFlow Serving's REST interface, to tensors and back.

Rows: `{"instances": [...]}` to `{"predictions": [...]}`; columns: `{"inputs": ...}` to
`{"outputs": ...}`. Bytes are `{"b64": "..."}`; in answers, those of outputs whose name
ends in `_bytes`. NaN and Infinity are written as JavaScript writes them, both ways.
"""

import base64
import itertools
import json

import numpy as np

from export.messages import numpy_dtype, pb
from export.session import StatusError, strings

MAX_RANK = 8
Tensors = dict[str, np.ndarray]


def parse(body: bytes) -> dict:
    """The object in the body of a request.

    Raises:
        StatusError: INVALID_ARGUMENT, if it is none.
    """
    try:
        document = json.loads(body)
    except RecursionError:
        raise _invalid("JSON Parse error: it is nested too deeply") from None
    except ValueError as error:  # also bytes that are no text
        raise _invalid(f"JSON Parse error: {error}") from None
    if not isinstance(document, dict):
        raise _invalid("JSON Value is not an object")
    return document


def signature_name(document: dict) -> str:
    """Name of the signature that is asked; empty for the default."""
    name = document.get("signature_name", "")
    if not isinstance(name, str):
        raise _invalid("'signature_name' key must be a string value.")
    return name


def read_tensors(document: dict, description: dict) -> tuple[Tensors, bool]:
    """Inputs of a predict request.

    Args:
        document: The request.
        description: The signature: `{"inputs": {key: {dtype, shape}}}`.

    Returns:
        The tensors, and whether they came as rows.

    Raises:
        StatusError: INVALID_ARGUMENT, if they do not follow the rules.
    """
    expected = description["inputs"]
    by_row = "instances" in document
    if by_row == ("inputs" in document):
        if by_row:
            raise _invalid("Only one of 'inputs' or 'instances' keys must exist")
        raise _invalid("Missing 'inputs' or 'instances' key")
    value = document["instances" if by_row else "inputs"]
    if by_row:
        if not isinstance(value, list) or not value:
            raise _invalid("'instances' must be a list of one value at least")
        columns = _columns(value, expected)
    elif isinstance(value, dict) and not _is_base64(value):
        if set(value) < set(expected):
            missing = sorted(set(expected) - set(value))
            raise _invalid(f"Missing named input: {missing[0]} in 'inputs' object.")
        columns = {key: value[key] for key in expected if key in value}
    else:
        columns = {_only(expected, "inputs"): value}
    for key in expected:
        if key not in columns:
            raise _invalid(f"Missing named input: {key}")
    tensors = {
        key: _array(x, numpy_dtype(expected[key]["dtype"]), key)
        for key, x in columns.items()
    }
    return tensors, by_row


def _columns(rows, expected):
    """Values of each input, from a list of objects or of plain values."""
    named = isinstance(rows[0], dict) and not _is_base64(rows[0])
    if not named:
        return {_only(expected, "instances"): rows}
    for i, row in enumerate(rows):
        if not isinstance(row, dict) or set(row) != set(expected):
            raise _invalid(
                f"Failed to process element: {i} of 'instances' list. It must be an "
                f"object with the keys {', '.join(sorted(expected))}"
            )
    return {key: [row[key] for row in rows] for key in expected}


def _only(expected, what):
    if len(expected) != 1:
        raise _invalid(
            f"{what} is a plain list, but expecting objects as multiple input tensors "
            f"required: {', '.join(sorted(expected))}"
        )
    return next(iter(expected))


def _array(value, dtype: str, key: str) -> np.ndarray:
    """A tensor from nested lists, level by level: no type is guessed or mended."""
    shape, flat = [], [value]
    while flat and isinstance(flat[0], list):
        size = len(flat[0])
        if any(type(x) is not list or len(x) != size for x in flat):
            raise _invalid(f"{key}: lists of one level must be of one length")
        shape.append(size)
        if len(shape) > MAX_RANK:
            raise _invalid(f"{key}: lists are nested deeper than {MAX_RANK} levels")
        flat = list(itertools.chain.from_iterable(flat))
    types = set(map(type, flat))
    if dtype == "object":
        array = strings([_bytes(x, key) for x in flat])
    elif types <= _TYPES.get(dtype[:1], {int}):
        array = _numbers(flat, dtype, key)
    else:
        names = ", ".join(sorted(x.__name__ for x in types))
        raise _invalid(f"{key} must consist of {dtype}, got {names}")
    return array.reshape(shape)


_TYPES = {"f": {int, float}, "b": {bool}}


def _numbers(flat, dtype, key):
    try:
        wide = np.array(flat, "float64" if dtype[0] == "f" else None)
    except OverflowError:
        raise _invalid(f"{key}: a number is outside the range of {dtype}") from None
    if not flat:
        return wide.astype(dtype)
    if dtype[0] in "iu":
        limits = np.iinfo(dtype)
        fits = limits.min <= min(flat) and max(flat) <= limits.max
    else:
        with np.errstate(over="ignore"):
            fits = (np.isinf(wide.astype(dtype)) == np.isinf(wide)).all()
    if not fits:
        raise _invalid(f"{key}: a number is outside the range of {dtype}")
    return wide.astype(dtype)


def _is_base64(value) -> bool:
    return isinstance(value, dict) and set(value) == {"b64"}


def _bytes(value, key) -> bytes:
    if isinstance(value, str):
        return value.encode(errors="surrogatepass")
    if not _is_base64(value) or not isinstance(value["b64"], str):
        kind = type(value).__name__
        raise _invalid(f'{key} must consist of strings or {{"b64": text}}, got {kind}')
    text = value["b64"].rstrip("=")
    try:
        return base64.b64decode(text + "=" * (-len(text) % 4), validate=True)
    except ValueError as error:
        raise _invalid(f"{key}: Unable to base64 decode: {error}") from None


def write_tensors(outputs: Tensors, by_row: bool) -> bytes:
    """The answer to a predict request.

    Raises:
        StatusError: INVALID_ARGUMENT, if the outputs cannot be rows.
    """
    values = {key: _values(key, array) for key, array in sorted(outputs.items())}
    if not by_row:
        whole = next(iter(values.values())) if len(values) == 1 else values
        return _dump({"outputs": whole})
    sizes = {array.shape[:1] for array in outputs.values()}
    if len(sizes) != 1 or sizes == {()}:
        raise _invalid("the outputs have inconsistent batch sizes")
    if len(values) == 1:
        return _dump({"predictions": next(iter(values.values()))})
    rows = zip(*values.values(), strict=True)
    named = [dict(zip(values, row, strict=True)) for row in rows]
    return _dump({"predictions": named})


def _values(key, array):
    if array.dtype != object:
        return array.tolist()

    def text(data):
        if key.endswith("_bytes"):
            return {"b64": base64.b64encode(data).decode()}
        return data.decode(errors="replace")

    flat = np.empty(array.size, object)
    flat[:] = [text(x) for x in array.reshape(-1)]
    return flat.reshape(array.shape).tolist()


def _dump(document) -> bytes:
    return json.dumps(document, ensure_ascii=False).encode()


# --- the classify interface: examples in, labels with scores out ---


def read_examples(document: dict) -> list[bytes]:
    """Serialized `tf.Example`s of a classify request.

    Raises:
        StatusError: INVALID_ARGUMENT, if there are none.
    """
    examples = document.get("examples")
    if not isinstance(examples, list) or not examples:
        raise _invalid("'examples' must be a list of one object at least")
    context = _example(document.get("context", {}))
    return [merge(context, _example(x)) for x in examples]


def merge(context, example) -> bytes:
    """An example with the features of the context, which yield to its own."""
    merged = pb.Example()
    merged.CopyFrom(context)
    for name, feature in example.features.feature.items():
        merged.features.feature[name].CopyFrom(feature)
    return merged.SerializeToString()


def _example(value):
    if not isinstance(value, dict):
        raise _invalid("Example must be a JSON object")
    example = pb.Example()
    for name, content in value.items():
        try:
            _fill(example.features.feature[name], content, name)
        except ValueError as error:  # a name that is no text; a number out of range
            raise _invalid(f"Feature: {name!r}: {error}") from None
    return example


def _fill(feature, content, name):
    values = content if isinstance(content, list) else [content]
    types = set(map(type, values))
    if types and types <= {str, dict}:
        feature.bytes_list.value.extend(_bytes(x, name) for x in values)
    elif types == {float}:
        feature.float_list.value.extend(values)
    elif types and types <= {int, bool}:
        feature.int64_list.value.extend(values)
    elif types:
        raise _invalid(f"Feature: {name!r} has elements of unexpected or mixed types")


def check_classify(name: str, description: dict) -> None:
    """Whether a signature can answer a classify request.

    Raises:
        StatusError: FAILED_PRECONDITION, if not.
    """
    inputs, outputs = description["inputs"], set(description["outputs"])
    if [*inputs] != ["inputs"] or not outputs <= {"classes", "scores"}:
        raise StatusError(
            "FAILED_PRECONDITION",
            f"Signature {name!r} is none for classification: it must have one input "
            f"'inputs' and the outputs 'classes', 'scores'; it has {', '.join(inputs)} "
            f"-> {', '.join(sorted(outputs))}",
        )


def label_rows(outputs: Tensors) -> list[list[tuple[str, float]]]:
    """Labels and scores of each row; one that is missing is empty or 0."""
    known = next(iter(outputs.values()))
    labels = outputs.get("classes", np.full(known.shape, b"", object))
    scores = outputs.get("scores", np.zeros(known.shape, "float32"))
    return [
        [(x.decode(errors="replace"), y) for x, y in zip(a, b, strict=True)]
        for a, b in zip(labels.tolist(), scores.tolist(), strict=True)
    ]


def write_results(outputs: Tensors) -> bytes:
    """The answer to a classify request."""
    return _dump({"results": label_rows(outputs)})


def _invalid(message: str) -> StatusError:
    return StatusError("INVALID_ARGUMENT", message)
