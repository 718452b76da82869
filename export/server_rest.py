"""The REST interface of TensorFlow Serving, on aiohttp."""

import asyncio
import functools
import logging
import re
import zlib

import aiohttp
from aiohttp import web
from google.protobuf import json_format

from export import server_json
from export.server_service import Service, status_message
from export.session import StatusError

VERSION = r"(?:/(?:versions/(?P<version>\d+)|labels/(?P<label>[^/:]+)))?"
ASK = re.compile(
    rf"(?i)/v1/models/(?P<name>[^/:]+){VERSION}:(?P<method>classify|regress|predict)"
)
LOOK = re.compile(rf"(?i)/v1/models(?:/(?P<name>[^/:]+))?{VERSION}(?P<more>/metadata)?")
METRICS = "/monitoring/prometheus/metrics"
HTTP = {
    "INVALID_ARGUMENT": 400,
    "FAILED_PRECONDITION": 400,
    "OUT_OF_RANGE": 400,
    "NOT_FOUND": 404,
    "RESOURCE_EXHAUSTED": 429,
    "CANCELLED": 499,
    "UNIMPLEMENTED": 501,
    "UNAVAILABLE": 503,
    "DEADLINE_EXCEEDED": 504,
}
LOG = logging.getLogger("keras_vit.serve")
SILENT = logging.getLogger("keras_vit.serve.http")  # no traceback for each bad request
SILENT.disabled = True
LARGE = 100_000  # bytes and values above which JSON is worth a thread


def application(service: Service) -> web.Application:
    """What answers over HTTP."""
    limit = service.limits.body_bytes
    app = web.Application(
        client_max_size=limit, handler_args={"auto_decompress": False}
    )
    app.router.add_route("*", "/{tail:.*}", functools.partial(_handle, service))
    return app


async def _handle(service: Service, request: web.Request) -> web.Response:
    try:
        return await _route(service, request)
    except StatusError as error:
        status, message = HTTP.get(error.code, 500), error.message
    except Exception as error:
        LOG.exception("a request failed")
        status, message = 500, f"{type(error).__name__}: {error}"
    return web.json_response({"error": message}, status=status)


async def _route(service: Service, request: web.Request) -> web.Response:
    path, method = request.path, request.method
    if method == "GET" and path == METRICS:
        return web.Response(body=service.metrics.text(), content_type="text/plain")
    if not path.lower().startswith("/v1/"):
        return web.json_response({"error": f"Not found: {path}"}, status=404)
    if method == "POST" and (found := ASK.fullmatch(path)):
        return await _ask(service, request, found)
    if method == "GET" and (found := LOOK.fullmatch(path)):
        return _look(service, found)
    raise _invalid(f"Malformed request: {method} {path}")


async def _ask(service, request, found) -> web.Response:
    api = found["method"].capitalize()
    with service.request(found["name"], api, "REST"):
        body = await _body(request, service.limits.body_bytes)
        if api == "Regress":
            raise _invalid("No signature of this model is one for regression")
        answer = _classify if api == "Classify" else _predict
        with service.find(found["name"], _number(found), found["label"]) as served:
            document = await _maybe_in_thread(len(body), server_json.parse, body)
            body = await answer(service, served, document, len(body))
    return web.Response(body=body, content_type="application/json")


async def _body(request, limit: int) -> bytes:
    """The body, unpacked: here, since a small one can unpack to a very large one."""
    try:
        body = await request.read()
    except web.HTTPRequestEntityTooLarge:
        raise _invalid(f"The body must not exceed {limit} bytes") from None
    except (web.RequestPayloadError, aiohttp.ClientError) as error:
        raise _invalid(f"The body cannot be read: {error}") from None
    coding = request.headers.get("Content-Encoding", "identity").lower()
    if coding == "identity":
        return body
    if coding != "gzip":
        raise _invalid(f"Content-Encoding must be gzip, got {coding}")
    unpacking = zlib.decompressobj(wbits=31)
    try:
        unpacked = await asyncio.to_thread(unpacking.decompress, body, limit + 1)
    except zlib.error as error:
        raise _invalid(f"The body is no gzip: {error}") from None
    if len(unpacked) > limit or not unpacking.eof:
        raise _invalid(f"The body must be a whole gzip of {limit} bytes at most")
    return unpacked


async def _predict(service, served, document, size) -> bytes:
    name = server_json.signature_name(document)
    try:
        name, description = served.signature(name)
    except StatusError as error:
        raise _invalid(error.message) from None  # as the server says it over HTTP
    inputs, by_row = await _maybe_in_thread(
        size, server_json.read_tensors, document, description
    )
    outputs = await service.run(served, name, inputs)
    count = sum(x.size for x in outputs.values())
    write = server_json.write_tensors
    return await _maybe_in_thread(count, write, outputs, by_row)


async def _classify(service, served, document, size) -> bytes:
    name, description = served.signature(server_json.signature_name(document))
    server_json.check_classify(name, description)
    read = server_json.read_examples
    examples = await _maybe_in_thread(size, read, document)
    return server_json.write_results(await service.classify(served, name, examples))


async def _maybe_in_thread(size, function, *arguments):
    """Large JSON must not hold up the other requests."""
    if size < LARGE:
        return function(*arguments)
    return await asyncio.to_thread(function, *arguments)


def _look(service: Service, found) -> web.Response:
    name, number = found["name"], _number(found)
    if name is None:  # the server's own answer is an error; a list is of more use
        if found["more"] or number is not None:
            raise _invalid("Missing model name in request.")
        return web.json_response({"models": [service.model.name]})
    if found["more"]:
        served = service.find(name, number, found["label"])
        return web.json_response(_metadata(served))
    service.check_label(found["label"])
    message = status_message(service.model.statuses(name, number))
    return web.json_response(_as_json(message))


def _metadata(served) -> dict:
    return {
        "model_spec": {
            "name": served.model,
            "signature_name": "",
            "version": str(served.number),
        },
        "metadata": {"signature_def": _as_json(served.signature_map)},
    }


def _as_json(message) -> dict:
    return json_format.MessageToDict(
        message,
        preserving_proto_field_name=True,
        always_print_fields_with_no_presence=True,
    )


def _number(found) -> int | None:
    if found["version"] is None:
        return None
    if len(found["version"]) > 18:
        raise _invalid(f"Failed to convert version: {found['version']} to numeric.")
    return int(found["version"])


def _invalid(message: str) -> StatusError:
    return StatusError("INVALID_ARGUMENT", message)
