"""The program that holds a TensorFlow C++ session, reached through ctypes.

    python session.py DIRECTORY

It loads the library of the TensorFlow wheel and nothing of its Python, forbids XLA as a
stock TensorFlow Serving does, and answers what it is sent on standard input. Only NumPy
and the standard library are imported here, so it also runs under another interpreter
that has another TensorFlow. `export.runtime` starts it and talks to it.
"""

import ctypes
import importlib.util
import itertools
import json
import os
import struct
import sys
import types
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np

DTYPES = {  # TF_DataType -> NumPy
    1: "float32",
    2: "float64",
    3: "int32",
    4: "uint8",
    5: "int16",
    6: "int8",
    7: "object",  # strings, as bytes
    9: "int64",
    10: "bool",
    17: "uint16",
}
CODES = (
    "OK CANCELLED UNKNOWN INVALID_ARGUMENT DEADLINE_EXCEEDED NOT_FOUND ALREADY_EXISTS "
    "PERMISSION_DENIED RESOURCE_EXHAUSTED FAILED_PRECONDITION ABORTED OUT_OF_RANGE "
    "UNIMPLEMENTED INTERNAL UNAVAILABLE DATA_LOSS UNAUTHENTICATED"
).split()


class StatusError(RuntimeError):
    """The session answered with an error status.

    Attributes:
        code: Name of the status, such as `"INVALID_ARGUMENT"`.
        message: What TensorFlow said.
    """

    def __init__(self, code: str, message: str):
        super().__init__(f"{code}: {message}")
        self.code = code
        self.message = message


def strings(values) -> np.ndarray:
    """Array of dtype object from a list of bytes: what a string input takes."""
    array = np.empty(len(values), object)
    array[:] = values
    return array


# --- messages: a JSON header, then the tensors, each as dtype, shape and raw bytes ---


def send(stream, header: dict, tensors: Mapping[str, np.ndarray]) -> None:
    described, payload = [], []
    for name, tensor in tensors.items():
        tensor = np.asarray(tensor)
        parts = [bytes(x) for x in tensor.flat] if tensor.dtype == object else None
        data = b"".join(parts) if parts is not None else tensor.tobytes()
        lengths = [len(x) for x in parts] if parts is not None else None
        dtype = "object" if parts is not None else tensor.dtype.name
        described.append([name, dtype, tensor.shape, lengths, len(data)])
        payload.append(data)
    head = json.dumps({**header, "tensors": described}).encode()
    stream.write(struct.pack("<Q", len(head)) + head + b"".join(payload))
    stream.flush()


def receive(stream) -> tuple[dict, dict[str, np.ndarray]]:
    (length,) = struct.unpack("<Q", _read(stream, 8))
    header = json.loads(_read(stream, length))
    tensors = {}
    for name, dtype, shape, lengths, size in header.pop("tensors"):
        data = _read(stream, size)
        if dtype == "object":
            ends = np.cumsum([0, *lengths]).tolist()
            pairs = itertools.pairwise(ends)
            tensor = strings([data[a:b] for a, b in pairs])
        else:
            tensor = np.frombuffer(data, dtype)
        tensors[name] = tensor.reshape(shape)
    return header, tensors


def _read(stream, size: int) -> bytes:
    data = stream.read(size)
    if len(data) < size:
        raise EOFError
    return data


# --- the session ---


class _Output(ctypes.Structure):
    _fields_ = [("operation", ctypes.c_void_p), ("index", ctypes.c_int)]


class _Buffer(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("length", ctypes.c_size_t),
        ("deallocator", ctypes.c_void_p),
    ]


class _Session:
    """`TF_LoadSessionFromSavedModel` and `TF_SessionRun`."""

    STRING_SIZE = 24  # sizeof(TF_TString)

    def __init__(self, directory: str):
        package = importlib.util.find_spec("tensorflow")
        if package is None:
            raise ModuleNotFoundError(f"{sys.executable} has no TensorFlow.")
        folder = package.submodule_search_locations[0]
        self.tf = _library(folder)
        self.status = ctypes.c_void_p(self.tf.TF_NewStatus())
        self.graph = ctypes.c_void_p(self.tf.TF_NewGraph())
        options = ctypes.c_void_p(self.tf.TF_NewSessionOptions())
        meta = _Buffer()
        self.session = ctypes.c_void_p(
            self.tf.TF_LoadSessionFromSavedModel(
                options,
                None,
                directory.encode(),
                (ctypes.c_char_p * 1)(b"serve"),
                1,
                self.graph,
                ctypes.byref(meta),
                self.status,
            )
        )
        self.check()
        data = ctypes.string_at(meta.data, meta.length)
        self.signatures, self.ops = _describe(folder, data)

    def check(self) -> None:
        code = self.tf.TF_GetCode(self.status)
        if code:
            message = self.tf.TF_Message(self.status).decode(errors="replace")
            raise StatusError(CODES[code] if code < len(CODES) else str(code), message)

    def run(self, name: str, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        if name not in self.signatures:
            raise StatusError("FAILED_PRECONDITION", f"no signature {name!r}")
        signature = self.signatures[name]
        if set(inputs) != set(signature["inputs"]):
            expected = sorted(signature["inputs"])
            message = f"inputs must be {expected}, got {sorted(inputs)}"
            raise StatusError("INVALID_ARGUMENT", message)
        feeds = [signature["inputs"][key]["tensor"] for key in inputs]
        fetches = [x["tensor"] for x in signature["outputs"].values()]
        values = [self.tensor(x) for x in inputs.values()]
        results = (ctypes.c_void_p * len(fetches))()
        self.tf.TF_SessionRun(
            self.session,
            None,
            self.outputs(feeds),
            (ctypes.c_void_p * len(values))(*values),
            len(values),
            self.outputs(fetches),
            results,
            len(fetches),
            None,
            0,
            None,
            self.status,
        )
        for value in values:
            self.tf.TF_DeleteTensor(ctypes.c_void_p(value))
        self.check()
        try:
            arrays = [self.array(result) for result in results]
        finally:
            for result in results:
                self.tf.TF_DeleteTensor(ctypes.c_void_p(result))
        return dict(zip(signature["outputs"], arrays, strict=True))

    def outputs(self, tensors: list[str]):
        found = (_Output * len(tensors))()
        for i, tensor in enumerate(tensors):
            name, _, index = tensor.partition(":")
            operation = self.tf.TF_GraphOperationByName(self.graph, name.encode())
            found[i] = _Output(operation, int(index or 0))
        return found

    def tensor(self, array: np.ndarray) -> int:
        codes = {dtype: code for code, dtype in DTYPES.items()}
        dims = (ctypes.c_int64 * array.ndim)(*array.shape)
        is_string = array.dtype == object
        size = array.size * self.STRING_SIZE if is_string else array.nbytes
        code = codes[array.dtype.name]
        tensor = self.tf.TF_AllocateTensor(code, dims, array.ndim, size)
        data = self.tf.TF_TensorData(ctypes.c_void_p(tensor))
        if is_string:
            for i, value in enumerate(array.flat):
                place = ctypes.c_void_p(data + i * self.STRING_SIZE)
                self.tf.TF_StringInit(place)
                self.tf.TF_StringCopy(place, value, len(value))
        elif array.nbytes:
            ctypes.memmove(data, np.ascontiguousarray(array).ctypes.data, array.nbytes)
        return tensor

    def array(self, tensor: int) -> np.ndarray:
        pointer = ctypes.c_void_p(tensor)
        rank = self.tf.TF_NumDims(pointer)
        shape = [self.tf.TF_Dim(pointer, i) for i in range(rank)]
        code = self.tf.TF_TensorType(pointer)
        if code not in DTYPES:
            raise StatusError("UNIMPLEMENTED", f"output of TF_DataType {code}")
        data = self.tf.TF_TensorData(pointer)
        if DTYPES[code] == "object":
            array = strings([self.string(data, i) for i in range(int(np.prod(shape)))])
        else:
            size = self.tf.TF_TensorByteSize(pointer)
            array = np.frombuffer(ctypes.string_at(data, size), DTYPES[code])
        return array.reshape(shape)

    def string(self, data: int, index: int) -> bytes:
        place = ctypes.c_void_p(data + index * self.STRING_SIZE)
        size = self.tf.TF_StringGetSize(place)
        return ctypes.string_at(self.tf.TF_StringGetDataPointer(place), size)


def _library(folder: str) -> ctypes.CDLL:
    path = next(Path(folder).glob("libtensorflow_cc.*"))
    # Local symbols: its BoringSSL would clash with that of hashlib.
    library = ctypes.CDLL(str(path), mode=os.RTLD_LOCAL | os.RTLD_NOW)
    pointers = (
        "NewStatus NewGraph NewSessionOptions LoadSessionFromSavedModel AllocateTensor "
        "TensorData GraphOperationByName StringGetDataPointer"
    )
    for name in pointers.split():
        getattr(library, f"TF_{name}").restype = ctypes.c_void_p
    library.TF_Message.restype = library.TF_Version.restype = ctypes.c_char_p
    library.TF_Dim.restype = ctypes.c_int64
    library.TF_TensorByteSize.restype = ctypes.c_size_t
    library.TF_StringGetSize.restype = ctypes.c_size_t
    library.TF_AllocateTensor.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_int,
        ctypes.c_size_t,
    ]
    library.TF_StringCopy.argtypes = [
        ctypes.c_void_p,
        ctypes.c_char_p,
        ctypes.c_size_t,
    ]
    library._ZN10tensorflow21DisableXlaCompilationEv()  # as the server's main does
    return library


def _describe(folder: str, data: bytes) -> tuple[dict, list[str]]:
    """Signatures and op names of a serialized MetaGraphDef."""
    package = types.ModuleType("tensorflow")  # the messages without the rest
    package.__spec__ = importlib.util.find_spec("tensorflow")  # for another session
    package.__path__ = [folder]
    sys.modules["tensorflow"] = package
    from tensorflow.core.framework import types_pb2
    from tensorflow.core.protobuf import meta_graph_pb2

    meta = meta_graph_pb2.MetaGraphDef.FromString(data)

    signatures = described(meta.signature_def, types_pb2.DataType.Name)
    functions = meta.graph_def.library.function
    nodes = [*meta.graph_def.node, *(x for f in functions for x in f.node_def)]
    return signatures, sorted({node.op for node in nodes})


def described(signatures: Mapping, dtype_name: Callable[[int], str]) -> dict[str, dict]:
    """SignatureDef messages in the form of `Runtime.signatures`."""

    def tensors(infos):
        return {
            key: {
                "tensor": info.name,
                "dtype": dtype_name(info.dtype),
                "shape": None
                if info.tensor_shape.unknown_rank
                else [dim.size for dim in info.tensor_shape.dim],
            }
            for key, info in sorted(infos.items())
        }

    return {
        name: {"inputs": tensors(x.inputs), "outputs": tensors(x.outputs)}
        for name, x in sorted(signatures.items())
        if not name.startswith("__")
    }


def main(directory: str) -> None:
    stdin = sys.stdin.buffer
    stdout = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever TensorFlow prints goes to the log
    try:
        session = _Session(directory)
    except StatusError as error:
        send(stdout, {"error": [error.code, error.message]}, {})
        return
    version = session.tf.TF_Version().decode()
    told = {"signatures": session.signatures, "ops": session.ops}
    send(stdout, {**told, "tensorflow": version}, {})
    while True:
        try:
            header, inputs = receive(stdin)
        except (EOFError, struct.error):
            return
        try:
            send(stdout, {}, session.run(header["signature"], inputs))
        except StatusError as error:
            send(stdout, {"error": [error.code, error.message]}, {})


if __name__ == "__main__":
    sys.path.pop(0)  # this folder: its file names are not top-level modules
    main(sys.argv[1])
