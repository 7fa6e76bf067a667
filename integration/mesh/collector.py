"""Collectors of traces: what takes spans as OTLP (HTTP or gRPC) or as Zipkin's JSON, and remembers them."""

import concurrent.futures
import json
import struct
import threading

import grpc

from .rpc import OPTIONS
from .web import Web

KINDS = {2: "SERVER", 3: "CLIENT"}


class Spans:
    """Spans as dictionaries of the same shape whatever they came in: trace, id, parent, kind, name, service, tags, start, duration (µs)."""

    def __init__(self):
        self._spans, self._lock = [], threading.Lock()
        # Headers or metadata of what came, in order.
        self.calls = []

    def add(self, spans, headers):
        with self._lock:
            self.calls.append(headers)
            self._spans += spans

    def all(self, **fields):
        """Those whose fields, or tags where there is no such field, are these."""
        with self._lock:
            spans = list(self._spans)
        return [span for span in spans if all((span[name] if name in span else span["tags"].get(name)) == value for name, value in fields.items())]


class Collector(Web):
    """Over HTTP. `status` may be set to refuse."""

    def __init__(self, port):
        self.spans = Spans()
        super().__init__(port, name="collector")

    def answer(self, request):
        body = self.take(request)
        if self.status == 200:
            headers = {"path": request.path, **{name.lower(): value for name, value in request.headers.items()}}
            kind = headers["content-type"]
            spans = of_otlp(body) if kind == "application/x-protobuf" else [of_zipkin(span) for span in json.loads(body)]
            self.spans.add(spans, headers)
        self.say(request, b"", self.status)


class GrpcCollector:
    """Over gRPC."""

    def __init__(self, port):
        self.port, self.spans = port, Spans()
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(4), options=OPTIONS)
        handlers = {"Export": grpc.unary_unary_rpc_method_handler(self._export)}
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("opentelemetry.proto.collector.trace.v1.TraceService", handlers),))
        assert self._server.add_insecure_port(f"127.0.0.1:{port}") == port
        self._server.start()

    def _export(self, request, context):
        self.spans.add(of_otlp(request), dict(context.invocation_metadata()))
        return b""

    def close(self):
        self._server.stop(0).wait(10)


def of_zipkin(span):
    return {"trace": span["traceId"], "id": span["id"], "parent": span.get("parentId"), "kind": span["kind"], "name": span["name"],
            "service": span["localEndpoint"]["serviceName"], "tags": span["tags"], "start": span["timestamp"], "duration": span["duration"],
            "shared": span.get("shared", False), "annotations": [note["value"] for note in span.get("annotations", [])]}


def of_otlp(body):
    """The spans of an ExportTraceServiceRequest."""
    spans = []
    for group in message(body)[1]:
        group = message(group)
        resource = attributes(message(group[1][0])[1])
        for scope in group[2]:
            spans += [otlp_span(message(span), resource) for span in message(scope)[2]]
    return spans


def otlp_span(fields, resource):
    start, end = fields[7][0], fields[8][0]
    return {"trace": fields[1][0].hex(), "id": fields[2][0].hex(), "parent": (fields.get(4) or [b""])[0].hex() or None, "kind": KINDS[fields[6][0]],
            "name": fields[5][0].decode(), "service": resource["service.name"], "resource": resource, "tags": attributes(fields.get(9, [])),
            "start": start // 1000, "duration": (end - start) // 1000, "state": (fields.get(3) or [b""])[0].decode(),
            "error": (message(fields[15][0]).get(3) or [0])[0] == 2}


def attributes(pairs):
    """Of strings."""
    pairs = [message(pair) for pair in pairs]
    return {pair[1][0].decode(): (message(pair[2][0]).get(1) or [b""])[0].decode() for pair in pairs}


def message(data):
    """The fields of a protobuf message, by number: integers, or bytes."""
    fields, at = {}, 0

    def varint():
        nonlocal at
        number = shift = 0
        while True:
            byte = data[at]
            number, shift, at = number | (byte & 0x7F) << shift, shift + 7, at + 1
            if byte < 0x80:
                return number
    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        else:
            size = {1: 8, 5: 4}.get(kind) or varint()
            value, at = data[at:at + size], at + size
            assert len(value) == size
            if kind != 2:
                value = struct.unpack("<Q" if kind == 1 else "<I", value)[0]
        fields.setdefault(key >> 3, []).append(value)
    return fields
