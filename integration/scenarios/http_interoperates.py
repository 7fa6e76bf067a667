"""HTTP/1.1, HTTP/2 and gRPC with Envoy as the other sidecar, both ways, and with ours at both ends."""

import time

import grpc
import pytest

from mesh import Browser, Caller, Rpc, Upstream, ask, dial, eventually, who

ENDS = pytest.mark.parametrize("ends", ["lictor to lictor", "lictor to envoy", "envoy to lictor"])


def pair(mesh, ends, protocol, denied=False, **more):
    """A client, a server and the port that leads from the one to the other."""
    near, far = ends.split(" to ")
    server = mesh.web("server", protocol=protocol, sidecar=None, **more)
    client = mesh.web("client", [server], protocol=protocol, sidecar=None)
    for service, kind in ((server, far), (client, near)):
        if kind == "envoy":
            service.process = mesh.envoy(service, protocol=protocol, endpoints={server.name: [server.public]},
                                         denied=[client.name] if denied else ())
        else:
            service.start(kind)
    return server, client, client.upstreams[0].port


@ENDS
def test_http1(mesh, ends):
    server, client, port = pair(mesh, ends, "http")
    eventually(lambda: who(port) == "server")
    with Browser(port) as browser:
        for number in range(20):
            seen = browser.ask(f"/{number}?q", "POST", b"x" * number * 1000, {"x-own": "1"}).seen()
            assert (seen["path"], len(seen["body"])) == (f"/{number}?q", number * 1000) and ["x-own", "1"] in seen["headers"]
        assert browser.ask("/", "HEAD").body == b""
        assert browser.ask("/", "POST", iter([b"one ", b"two"])).seen()["body"] == "one two"
    server.app.status = 404
    assert ask(port).status == 404


@ENDS
def test_a_deny_is_told_in_http(mesh, ends):
    server, client, port = pair(mesh, ends, "http", denied=ends.endswith("envoy"))
    if not ends.endswith("envoy"):
        eventually(lambda: who(port) == "server")
        mesh.deny(client, server)
    eventually(lambda: who(port) == "403 RBAC: access denied")


@ENDS
def test_a_large_body_both_ways(mesh, ends):
    server, client, port = pair(mesh, ends, "http")
    eventually(lambda: who(port) == "server")
    server.app.answer = lambda request: server.app.say(request, server.app.take(request))
    body = bytes(range(256)) * 40_000
    assert ask(port, "/", "POST", body).body == body


@pytest.fixture(params=["grpc", "http2"])
def calls(request, mesh):
    """Makes a pair whose app speaks gRPC; the protocol is named so, or as the HTTP/2 that it is."""
    def make(ends, **more):
        server, client, port = pair(mesh, ends, request.param, app=Rpc, **more)
        caller = mesh.keep(Caller(port))
        if not more:
            eventually(lambda: caller.code()[0] == grpc.StatusCode.OK, what="calls work", every=0.1)
        return server, client, caller
    return make


@ENDS
def test_calls_of_every_kind(calls, ends):
    _, _, caller = calls(ends)
    answer, call = caller.call("unary_unary", "Echo").with_call(b"x" * 1_000_000, timeout=10, metadata=[("x-given", "1")])
    assert answer == b"x" * 1_000_000 and ("x-trailing", "1") in list(call.trailing_metadata())
    assert list(caller.call("unary_stream", "Count")(b"100", timeout=10)) == [b"%d" % number for number in range(100)]
    assert caller.call("stream_unary", "Sum")(iter([b"1", b"2", b"3"]), timeout=10) == b"6"
    with pytest.raises(grpc.RpcError) as failed:
        caller.call("unary_unary", "Fail")(b"", timeout=10)
    assert (failed.value.code(), failed.value.details()) == (grpc.StatusCode.FAILED_PRECONDITION, "as you asked")
    with pytest.raises(grpc.RpcError) as failed:
        caller.call("unary_unary", "Nothing")(b"", timeout=10)
    assert failed.value.code() == grpc.StatusCode.UNIMPLEMENTED


@ENDS
def test_a_stream_talks_both_ways_at_once(calls, ends):
    _, _, caller = calls(ends)
    said = []

    def talk():
        # The next word is only said when the last one was answered.
        for number in range(20):
            eventually(lambda: len(said) == number)
            yield b"%d" % number
    for answer in caller.call("stream_stream", "Chat")(talk(), timeout=30):
        said.append(answer)
    assert said == [b"you said %d" % number for number in range(20)]


@ENDS
def test_a_deadline_ends_a_call_at_both_ends(calls, ends):
    server, _, caller = calls(ends)
    began = time.monotonic()
    with pytest.raises(grpc.RpcError) as failed:
        caller.call("unary_unary", "Wait")(b"", timeout=1)
    assert failed.value.code() == grpc.StatusCode.DEADLINE_EXCEEDED and time.monotonic() - began < 15
    assert server.app.cancelled.acquire(timeout=20)


@ENDS
def test_a_cancelled_call_ends_at_the_app(calls, ends):
    server, _, caller = calls(ends)
    call = caller.call("unary_unary", "Wait").future(b"", timeout=20)
    assert server.app.waiting.acquire(timeout=5)
    call.cancel()
    assert server.app.cancelled.acquire(timeout=5)


@ENDS
def test_a_deny_is_told_in_grpc(mesh, calls, ends):
    far_denies = ends.endswith("envoy")
    server, client, caller = calls(ends, **({"denied": True} if far_denies else {}))
    if not far_denies:
        mesh.deny(client, server)
    expected = (grpc.StatusCode.PERMISSION_DENIED, "RBAC: access denied")
    eventually(lambda: caller.code() == expected, every=0.1)


def test_nobody_there_is_told_in_grpc(calls):
    server, client, caller = calls("lictor to lictor")
    server.passing("fail")
    eventually(lambda: caller.code() == (grpc.StatusCode.UNAVAILABLE, "no healthy upstream"), every=0.1)
    server.passing("pass")
    eventually(lambda: caller.code()[0] == grpc.StatusCode.OK, every=0.1)


OUR_OWN = "upstream connect error or disconnect/reset before headers. reset reason: "


@pytest.mark.parametrize("config, call, expected", [
    ({"limits": {"max_connections": 0}}, "Echo", OUR_OWN + "overflow"),
    ({"limits": {"max_concurrent_requests": 0}}, "Echo", OUR_OWN + "overflow"),
    ({"lictor_per_try_timeout_ms": 700}, "Wait", "upstream request timeout"),
])
def test_limits_are_told_in_grpc(mesh, config, call, expected):
    server = mesh.service("server", app=Rpc, protocol="grpc")
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), {"Config": config})], protocol="grpc")
    caller = mesh.keep(Caller(client.upstreams[0].port))
    eventually(lambda: caller.code(call) == (grpc.StatusCode.UNAVAILABLE, expected), every=0.1)
    assert caller.code(call) == (grpc.StatusCode.UNAVAILABLE, expected)


def test_a_limit_counts_the_calls_of_grpc_that_are_under_way(mesh):
    server = mesh.service("server", app=Rpc, protocol="grpc")
    config = {"limits": {"max_concurrent_requests": 2}}
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), {"Config": config})], protocol="grpc")
    caller = mesh.keep(Caller(client.upstreams[0].port))
    eventually(lambda: caller.code()[0] == grpc.StatusCode.OK, every=0.1)
    held = [caller.call("unary_unary", "Wait").future(b"held", timeout=30) for _ in range(2)]
    assert all(server.app.waiting.acquire(timeout=10) for _ in held)
    assert caller.code() == (grpc.StatusCode.UNAVAILABLE, OUR_OWN + "overflow")
    held[0].cancel()
    eventually(lambda: caller.code()[0] == grpc.StatusCode.OK, every=0.1)
    held[1].cancel()


def test_timeouts_and_an_app_that_is_down_are_told_in_grpc(calls):
    server, _, caller = calls("lictor to lictor")
    server.proxy = {"Config": {"local_request_timeout_ms": 700}}
    server.register()
    eventually(lambda: caller.code("Wait") == (grpc.StatusCode.UNAVAILABLE, "upstream request timeout"), every=0.1)
    server.app.close()
    eventually(lambda: caller.code() == (grpc.StatusCode.UNAVAILABLE, OUR_OWN + "remote connection failure"), every=0.1)


@ENDS
def test_a_websocket_between_different_sidecars(mesh, ends):
    server, client, port = pair(mesh, ends, "http")
    eventually(lambda: who(port) == "server")

    def answer(request):
        request.send_response_only(101)
        request.send_header("upgrade", "websocket")
        request.send_header("connection", "Upgrade")
        request.end_headers()
        request.close_connection = True
        while data := request.rfile.read1(65536):
            request.wfile.write(data)
    server.app.answer = answer
    with dial(port) as conn:
        conn.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b" 101 " in conn.line()
        while conn.line().strip():
            pass
        assert conn.ask(b"hello") == b"hello" and conn.ask(b"x" * 100_000) == b"x" * 100_000
