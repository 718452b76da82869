"""TensorFlow Serving's messages, and tensors as messages, without TensorFlow's Python.

Importing TensorFlow takes seconds and half a gigabyte; its messages need neither.
"""

import importlib.util
import sys
import types

import numpy as np

from export.session import DTYPES, StatusError, described, strings


def _load():
    """Import the messages; an empty package stands in for TensorFlow meanwhile."""
    stand_in = "tensorflow" not in sys.modules
    if stand_in:
        found = importlib.util.find_spec("tensorflow")
        if found is None:
            raise ImportError("No module named 'tensorflow'", name="tensorflow")
        package = types.ModuleType("tensorflow")
        package.__path__ = list(found.submodule_search_locations)
        sys.modules["tensorflow"] = package
    try:
        from tensorflow.core.example import example_pb2
        from tensorflow.core.framework import tensor_pb2, types_pb2
        from tensorflow_serving.apis import (
            classification_pb2,
            get_model_metadata_pb2,
            get_model_status_pb2,
            model_service_pb2_grpc,
            predict_pb2,
            prediction_log_pb2,
            prediction_service_pb2_grpc,
        )
    finally:
        if stand_in:  # a later import of TensorFlow must find the whole of it
            for name in [x for x in sys.modules if x.partition(".")[0] == "tensorflow"]:
                del sys.modules[name]
    from google.protobuf.message import DecodeError

    return types.SimpleNamespace(
        DecodeError=DecodeError,
        Example=example_pb2.Example,
        TensorProto=tensor_pb2.TensorProto,
        DataType=types_pb2.DataType,
        PredictRequest=predict_pb2.PredictRequest,
        PredictResponse=predict_pb2.PredictResponse,
        ClassificationRequest=classification_pb2.ClassificationRequest,
        ClassificationResponse=classification_pb2.ClassificationResponse,
        GetModelMetadataRequest=get_model_metadata_pb2.GetModelMetadataRequest,
        GetModelMetadataResponse=get_model_metadata_pb2.GetModelMetadataResponse,
        SignatureDefMap=get_model_metadata_pb2.SignatureDefMap,
        GetModelStatusRequest=get_model_status_pb2.GetModelStatusRequest,
        GetModelStatusResponse=get_model_status_pb2.GetModelStatusResponse,
        ModelVersionStatus=get_model_status_pb2.ModelVersionStatus,
        PredictionLog=prediction_log_pb2.PredictionLog,
        ModelServiceStub=model_service_pb2_grpc.ModelServiceStub,
        PredictionServiceStub=prediction_service_pb2_grpc.PredictionServiceStub,
    )


try:
    pb = _load()
except ImportError as error:
    raise ImportError(
        f'{error}. Serving and its client need pip install "keras-vit[serve]".'
    ) from error

CODES = {name: code for code, name in DTYPES.items()}
FIELDS = {
    "float32": "float_val",
    "float64": "double_val",
    "int64": "int64_val",
    "bool": "bool_val",
    "object": "string_val",
}  # the others: int_val


def numpy_dtype(name: str) -> str:
    """`"DT_FLOAT"` to `"float32"`; strings are `"object"`.

    Raises:
        StatusError: UNIMPLEMENTED, if the runtime takes no such tensor.
    """
    dtype = DTYPES.get(pb.DataType.Value(name))
    if dtype is None:
        raise StatusError("UNIMPLEMENTED", f"tensors of {name} are not served")
    return dtype


def describe(signatures) -> dict[str, dict]:
    """A `SignatureDefMap` in the form of `Runtime.signatures`."""

    return described(signatures.signature_def, pb.DataType.Name)


def to_message(array: np.ndarray):
    """A tensor as a server sends it: values in the field of their type."""
    name = "object" if array.dtype == object else array.dtype.name
    message = pb.TensorProto(dtype=CODES[name])
    for size in array.shape:
        message.tensor_shape.dim.add(size=size)
    getattr(message, FIELDS.get(name, "int_val")).extend(array.reshape(-1).tolist())
    return message


def from_message(message, max_bytes: int) -> np.ndarray:
    """The tensor that a message holds; a single value may stand for all.

    Raises:
        StatusError: INVALID_ARGUMENT, if it is none, or of more than `max_bytes`.
    """
    name = DTYPES.get(message.dtype)
    if name is None:
        raise _invalid(f"tensors of type {message.dtype} are not served")
    shape = [dim.size for dim in message.tensor_shape.dim]
    if message.tensor_shape.unknown_rank or any(x < 0 for x in shape) or len(shape) > 8:
        raise _invalid(
            f"a tensor must have a known shape of rank 8 at most, got {shape}"
        )
    size = 1
    for x in shape:
        size *= x
    itemsize = 8 if name == "object" else np.dtype(name).itemsize
    if max([1, size, *shape]) * itemsize > max_bytes:
        raise _invalid(f"a tensor of shape {shape} exceeds {max_bytes} bytes")
    if message.tensor_content:
        content = message.tensor_content
        if name == "object" or len(content) != size * itemsize:
            raise _invalid(
                f"tensor_content of {len(content)} bytes is no {name} {shape}"
            )
        return np.frombuffer(content, name).reshape(shape)
    values = getattr(message, FIELDS.get(name, "int_val"))
    if len(values) != size and not (len(values) == 1 and size):
        raise _invalid(f"{len(values)} values do not fill a tensor of shape {shape}")
    if name == "object":
        array = strings(list(values))
    else:
        wide = np.fromiter(values, "int64" if name in _NARROW else name, len(values))
        array = wide.astype(name)
        if name in _NARROW and (array != wide).any():
            raise _invalid(f"a value is outside the range of {name}")
    if array.size != size:
        array = np.repeat(array, size)
    return array.reshape(shape)


_NARROW = {"uint8", "int8", "int16", "uint16", "int32"}


def _invalid(message: str) -> StatusError:
    return StatusError("INVALID_ARGUMENT", message)
