"""A client of HTTP/1.1 learns how a gRPC call ended: from headers, as trailers do not reach it."""

import contextlib
import struct

import pytest

from mesh import Browser, Mesh, Rpc, Upstream, eventually, mtls_connect
from mesh.http2 import END_HEADERS, HEADERS, block
from mesh.identity import client_context
from mesh.raw import Raw, Script, data, fields
from mesh.rpc import Caller

GRPC = ("content-type", "application/grpc")


def message(body):
    return b"\0" + struct.pack(">I", len(body)) + body


BROKEN = {
    "/scenario.Calls/Reset": Script((fields(200, GRPC), data(message(b"first"))), stream_end=2),
    "/scenario.Calls/Gone": Script((fields(200, GRPC), data(message(b"first"))), then="reset"),
    "/scenario.Calls/Endless": Script((fields(200, GRPC), data(message(b"first")))),
    "/scenario.Calls/Strange": Script((fields(200, GRPC), data(message(b"first")), (HEADERS, END_HEADERS | 1, block([("grpc-status", "x")])))),
    "/scenario.Calls/Bare": Script((fields(200, GRPC), data(message(b"first"), end=True))),
}


@pytest.fixture(scope="module")
def services(shared_agent, binaries, ports, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("bridge"), stack, "bri")
        server = mesh.service("server", app=Rpc, protocol="grpc")
        broken = mesh.service("broken", app=lambda port: Raw(port, BROKEN), protocol="grpc", proxy={"Config": {"local_request_timeout_ms": 800}})
        client = mesh.service("client", [Upstream(server.name, ports.take()), Upstream(broken.name, ports.take())])
        yield mesh, server, broken, client


@pytest.fixture(params=["upstream listener", "public listener"])
def call(request, services):
    """Makes a call over HTTP/1.1: (status, headers, body)."""
    mesh, server, broken, client = services
    context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))

    def call(name, body=b"hello", of=server, **headers):
        with Browser(client.port_to(of), within=15) as browser:
            if request.param == "public listener":
                browser.conn.sock = mtls_connect(of.public, None, context=context, sni=mesh.agent.sni(of.name), within=15).sock
            # Twice: the connection is as good as before.
            for _ in range(2):
                answer = browser.ask(f"/scenario.Calls/{name}", "POST", message(body), {"content-type": "application/grpc", **headers})
            return answer
    return call, server, broken


def test_a_call_that_ends_well(call):
    call, *_ = call
    for headers in ({}, {"te": "trailers"}, {"content-type": "application/grpc+proto"}):
        answer = call("Echo", **headers)
        assert (answer.status, answer.header("grpc-status"), answer.body) == (200, "0", message(b"hello")), answer
        assert answer.header("content-length") == "10" and answer.header("transfer-encoding") is None
    answer = call("Count", b"3")
    assert (answer.status, answer.header("grpc-status"), answer.body) == (200, "0", b"".join(message(b"%d" % number) for number in range(3)))


def test_a_call_that_fails_before_the_first_message(call):
    call, *_ = call
    for name, status, text in (("Fail", "9", "as you asked"), ("Unknown", "12", None)):
        answer = call(name)
        assert (answer.header("grpc-status"), answer.body) == (status, b""), answer
        assert text in (None, answer.header("grpc-message"))


def test_a_call_that_fails_after_the_first_message(call):
    call, *_ = call
    answer = call("Late")
    assert (answer.status, answer.header("grpc-status"), answer.header("grpc-message")) == (503, "9", "after the first"), answer
    assert answer.body == message(b"hello")


@pytest.mark.parametrize(("name", "statuses"), [("Reset", ("14",)), ("Gone", ("14",)), ("Endless", ("4", "14")), ("Strange", ("x",))])
def test_a_call_that_breaks_off_is_no_success(call, name, statuses):
    call, _, broken = call
    answer = call(name, of=broken)
    assert answer.header("grpc-status") in statuses, answer
    assert answer.status == 503 or not answer.body


def test_without_a_status_nothing_is_made_up(call):
    call, _, broken = call
    answer = call("Bare", of=broken)
    assert (answer.status, answer.header("grpc-status"), answer.body) == (200, None, message(b"first"))


def test_what_is_held_back_is_bounded(call):
    call, *_ = call
    answer = call("Echo", b"x" * 1_000_000)
    assert (answer.status, answer.header("grpc-status"), len(answer.body)) == (200, "0", 1_000_005)
    answer = call("Echo", b"x" * 1_100_000)
    assert answer.header("grpc-status") == "2" and not answer.body, answer


def test_others_are_not_held_back(services):
    """Clients of HTTP/2 get each message as it comes, and trailers."""
    _, server, _, client = services
    with Caller(client.port_to(server)) as caller:
        assert caller.echo() == b"hello"
        assert [bytes(part) for part in caller.call("unary_stream", "Count")(b"3", timeout=15)] == [b"0", b"1", b"2"]


def test_what_is_refused_says_so_in_headers(services):
    mesh, server, _, client = services
    undo = mesh.deny(client, server)
    try:
        with Browser(client.port_to(server), within=15) as browser:
            def denied():
                answer = browser.ask("/scenario.Calls/Echo", "POST", message(b"hello"), {"content-type": "application/grpc"})
                return (answer.status, answer.header("grpc-status"), answer.body) == (200, "7", b"")
            eventually(denied, what="the call is denied")
    finally:
        undo()
