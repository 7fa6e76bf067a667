"""A gRPC app and its client, of gRPC's own library: every kind of call, over bytes."""

import concurrent.futures
import threading

import grpc

# Loopback is never to be reached through a proxy of the machine.
OPTIONS = [("grpc.enable_http_proxy", 0)]
SERVICE = "scenario.Calls"


class Rpc:
    """Serves in plain HTTP/2; counts the calls that were cancelled. `streams`: at a time on one connection."""

    def __init__(self, port, streams=None):
        self.port, self.waiting, self.cancelled = port, threading.Semaphore(0), threading.Semaphore(0)
        handlers = {
            "Echo": grpc.unary_unary_rpc_method_handler(self._echo),
            "Count": grpc.unary_stream_rpc_method_handler(self._count),
            "Sum": grpc.stream_unary_rpc_method_handler(self._sum),
            "Chat": grpc.stream_stream_rpc_method_handler(self._chat),
            "Fail": grpc.unary_unary_rpc_method_handler(self._fail),
            "Late": grpc.unary_stream_rpc_method_handler(self._late),
            "Wait": grpc.unary_unary_rpc_method_handler(self._wait),
            "Pour": grpc.unary_stream_rpc_method_handler(self._pour),
            "Hold": grpc.stream_unary_rpc_method_handler(self._hold),
        }
        options = OPTIONS + ([("grpc.max_concurrent_streams", streams)] if streams else [])
        self._server = grpc.server(concurrent.futures.ThreadPoolExecutor(64), options=options)
        self._server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler(SERVICE, handlers),))
        assert self._server.add_insecure_port(f"127.0.0.1:{port}") == port
        self._server.start()

    def _echo(self, request, context):
        given = dict(context.invocation_metadata())
        context.set_trailing_metadata((("x-trailing", given.get("x-given", "")),))
        return request

    def _count(self, request, _context):
        return (b"%d" % number for number in range(int(request)))

    def _sum(self, requests, _context):
        return b"%d" % sum(map(int, requests))

    def _chat(self, requests, _context):
        return (b"you said " + request for request in requests)

    def _fail(self, _request, context):
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "as you asked")

    def _late(self, request, context):
        yield request
        context.abort(grpc.StatusCode.FAILED_PRECONDITION, "after the first")

    def _wait(self, request, context):
        over = threading.Event()
        context.add_callback(over.set)
        self.waiting.release()
        if over.wait(30):
            self.cancelled.release()
        return request

    def _pour(self, request, _context):
        return (bytes(65536) for _ in range(int(request)))

    def _hold(self, _requests, context):
        """Reads nothing of what it is sent."""
        return self._wait(b"", context)

    def close(self):
        self._server.stop(0).wait(10)


class Caller:
    """Calls at a local port."""

    def __init__(self, port):
        # A connection of its own for each caller.
        options = [*OPTIONS, ("grpc.use_local_subchannel_pool", 1)]
        self._channel = grpc.insecure_channel(f"127.0.0.1:{port}", options=options)

    def call(self, kind, name):
        """The call of this name; `kind` is "unary_unary" and so on."""
        return getattr(self._channel, kind)(f"/{SERVICE}/{name}")

    def echo(self, data=b"hello", **how):
        return self.call("unary_unary", "Echo")(data, **{"timeout": 10, **how})

    def code(self, name="Echo"):
        """The status of a call of one message each, and what it says."""
        try:
            self.call("unary_unary", name)(b"hello", timeout=10)
            return grpc.StatusCode.OK, ""
        except grpc.RpcError as error:
            return error.code(), error.details()

    def close(self):
        self._channel.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
