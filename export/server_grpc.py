"""The gRPC interface of TensorFlow Serving, on grpc.aio.

Messages are parsed here and not by gRPC, so that bytes that are none are the client's
error.
"""

import asyncio
import logging

import grpc
from google.protobuf.message import DecodeError
from grpc_health.v1 import health, health_pb2, health_pb2_grpc

from export import server_json
from export.messages import from_message, pb, to_message
from export.server_service import Service, status_message
from export.session import StatusError

SERVICES = ("tensorflow.serving.PredictionService", "tensorflow.serving.ModelService")
LOG = logging.getLogger("keras_vit.serve")
LARGE = 100_000  # values, or bytes, above which a message is worth a thread


async def add_services(server: grpc.aio.Server, service: Service):
    """Register what a client can call.

    Returns:
        The health service, which says SERVING until told otherwise.
    """
    methods = {
        "Predict": (_predict, pb.PredictRequest),
        "Classify": (_classify, pb.ClassificationRequest),
        "GetModelMetadata": (_metadata, pb.GetModelMetadataRequest),
        "Regress": (_regress, None),
        "MultiInference": (_unimplemented, None),
    }
    models = {
        "GetModelStatus": (_status, pb.GetModelStatusRequest),
        "HandleReloadConfigRequest": (_unimplemented, None),
    }
    for name, table in zip(SERVICES, (methods, models), strict=True):
        handlers = {
            method: _handler(service, method, *row) for method, row in table.items()
        }
        generic = grpc.method_handlers_generic_handler(name, handlers)
        server.add_generic_rpc_handlers((generic,))
    checks = health.aio.HealthServicer()
    health_pb2_grpc.add_HealthServicer_to_server(checks, server)
    for name in ("", *SERVICES):
        await checks.set(name, health_pb2.HealthCheckResponse.SERVING)
    return checks


def _handler(service, method, function, kind):
    async def call(data: bytes, context):
        try:
            request = None if kind is None else _parsed(kind, data)
            name = request.model_spec.name if request is not None else ""
            with service.request(name, method, "GRPC"):
                response = await function(service, request)
            return response.SerializeToString()
        except StatusError as error:
            code, message = error.code, error.message
        except Exception as error:
            LOG.exception("a request failed")
            code, message = "INTERNAL", f"{type(error).__name__}: {error}"
        status = getattr(grpc.StatusCode, code, grpc.StatusCode.UNKNOWN)
        await context.abort(status, message[:1024])

    return grpc.unary_unary_rpc_method_handler(call)


def _parsed(kind, data):
    try:
        return kind.FromString(data)
    except DecodeError:
        raise StatusError(
            "INVALID_ARGUMENT", f"The message is no {kind.DESCRIPTOR.name}"
        ) from None


def _find(service, spec):
    version = spec.version.value if spec.HasField("version") else None
    return service.find(spec.name, version, spec.version_label)


async def _predict(service, request):
    with _find(service, request.model_spec) as served:
        return await _predicted(service, served, request)


async def _predicted(service, served, request):
    name, description = served.signature(request.model_spec.signature_name)
    known, expected = description["outputs"], sorted(description["inputs"])
    if sorted(request.inputs) != expected:  # before any of them is unpacked
        raise StatusError(
            "INVALID_ARGUMENT",
            f"inputs must be {expected}, got {sorted(request.inputs)[:9]}",
        )
    for key in request.output_filter:
        if key not in known:
            raise StatusError(
                "INVALID_ARGUMENT",
                f"output tensor alias not found in signature: {key} Outputs expected "
                f"to be in the set {{{','.join(known)}}}.",
            )
    limit = service.limits.body_bytes
    read = lambda: {k: from_message(x, limit) for k, x in request.inputs.items()}  # noqa: E731
    small = request.ByteSize() < LARGE
    inputs = read() if small else await asyncio.to_thread(read)
    outputs = await service.run(served, name, inputs)
    outputs = {
        k: x for k, x in outputs.items() if k in (request.output_filter or known)
    }
    if sum(x.size for x in outputs.values()) < LARGE:
        return _response(served, name, outputs)
    return await asyncio.to_thread(_response, served, name, outputs)


def _response(served, name, outputs):
    response = pb.PredictResponse()
    _name(response.model_spec, served, name)
    for key, array in outputs.items():
        response.outputs[key].CopyFrom(to_message(array))
    return response


def _name(spec, served, signature):
    spec.name, spec.signature_name = served.model, signature
    spec.version.value = served.number


async def _classify(service, request):
    with _find(service, request.model_spec) as served:
        return await _classified(service, served, request)


async def _classified(service, served, request):
    name, description = served.signature(request.model_spec.signature_name)
    server_json.check_classify(name, description)
    if request.input.HasField("example_list_with_context"):
        given = request.input.example_list_with_context
        examples = [server_json.merge(given.context, x) for x in given.examples]
    else:
        given = request.input.example_list
        examples = [x.SerializeToString() for x in given.examples]
    if not examples:
        raise StatusError("INVALID_ARGUMENT", "Input is empty")
    outputs = await service.classify(served, name, examples)
    response = pb.ClassificationResponse()
    _name(response.model_spec, served, name)
    for row in server_json.label_rows(outputs):
        classes = response.result.classifications.add()
        for label, score in row:
            classes.classes.add(label=label, score=score)
    return response


async def _metadata(service, request):
    served = _find(service, request.model_spec)
    if [*request.metadata_field] != ["signature_def"]:
        raise StatusError(
            "INVALID_ARGUMENT",
            f"metadata_field must be signature_def, got {list(request.metadata_field)}",
        )
    response = pb.GetModelMetadataResponse()
    _name(response.model_spec, served, "")
    response.metadata["signature_def"].Pack(served.signature_map)
    return response


async def _status(service, request):
    spec = request.model_spec
    service.check_label(spec.version_label)
    version = spec.version.value if spec.HasField("version") else None
    return status_message(service.model.statuses(spec.name, version))


async def _regress(service, request):
    raise StatusError(
        "INVALID_ARGUMENT", "No signature of this model is one for regression"
    )


async def _unimplemented(service, request):
    raise StatusError("UNIMPLEMENTED", "The embedded server does not implement this")
