"""A deny ends what is open, wherever it is open: connections and requests, on a listener that has moved, and in a drain."""

import datetime
import signal
import ssl
import threading
import time

import grpc
import pytest

from mesh import Caller, Rpc, Upstream, Web, eventually, mtls_connect
from mesh.ports import is_listening


def opened(mesh, *words, count=3):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", *words)
    client = mesh.service("client", [server])
    client.eventually_reaches()
    conns = [client.dial() for _ in range(count)]
    for conn in conns:
        assert conn.ask(b"open") == b"open"
    return server, client, conns


def move(server):
    """Has the public listener at another port, and gives that."""
    before, server.public = server.public, server.mesh.ports.take()
    server.register()
    eventually(lambda: is_listening(server.public) and not is_listening(before), what="the public listener has moved")


def test_connections_of_a_listener_that_has_moved_see_a_deny(mesh):
    server, client, conns = opened(mesh)
    move(server)
    assert [conn.ask(b"still open") for conn in conns] == [b"still open"] * len(conns)
    mesh.deny(client, server)
    assert [conn.end(within=2) for conn in conns] == ["fin"] * len(conns)


def test_a_deny_during_a_drain_is_applied_at_once(mesh):
    server, client, conns = opened(mesh, "-drain-time", "60s")
    other = mesh.service("other", [server])
    with other.dial() as kept:
        assert kept.ask(b"open") == b"open"
        server.process.signal(signal.SIGTERM)
        eventually(lambda: not is_listening(server.public), what="nothing new is accepted")
        mesh.deny(client, server)
        assert [conn.end(within=2) for conn in conns] == ["fin"] * len(conns)
        assert kept.ask(b"still open") == b"still open"


def test_one_denied_connection_is_one_line_also_where_a_session_was_kept(mesh):
    server, client, conns = opened(mesh, count=20)
    for conn in conns:
        conn.finish().end()
    mesh.deny(client, server)
    client.eventually_refused()
    assert server.process.count(rf"Connection denied[^\n]*svc/{client.name}|svc/{client.name}[^\n]*Connection denied") == 1


class Stream(Web):
    """Answers with a piece every tenth of a second, for as long as it is read."""

    def answer(self, request):
        request.send_response_only(200)
        request.send_header("transfer-encoding", "chunked")
        request.end_headers()
        self._count(1)
        try:
            while True:
                request.wfile.write(b"5\r\nevent\r\n")
                time.sleep(0.1)
        finally:
            self._count(-1)


def streaming(mesh, app=Stream, protocol="http"):
    server = mesh.service("server", app=app, proxy={"Config": {"protocol": protocol}})
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), {"Config": {"protocol": protocol}})])
    return server, client


def reading(conn, path="/", more=b""):
    conn.send(b"GET " + path.encode() + b" HTTP/1.1\r\nHost: shop\r\n" + more + b"\r\n")
    assert b" 200 " in conn.line()
    while b"event" not in conn.line():
        pass
    return conn


def breaks_off(conn, within=2):
    """Whether a chunked answer ends in time without its end."""
    conn.sock.settimeout(within)
    got = b""
    try:
        while part := conn.sock.recv(65536):
            got += part
    except ConnectionError:
        pass
    return not got.endswith(b"0\r\n\r\n")


def test_a_stream_of_events_from_a_source_that_is_denied_breaks_off(mesh):
    server, client = streaming(mesh)
    other = mesh.service("other", [Upstream(server.name, mesh.ports.take(), {"Config": {"protocol": "http"}})])
    ends = [reading(client.dial()) for _ in range(3)]
    with mtls_connect(server.public, mesh.agent.roots(), mesh.agent.leaf(client.name), mesh.agent.sni(server.name)) as direct, other.dial() as kept:
        ends.append(reading(direct))
        reading(kept)
        mesh.deny(client, server)
        assert all(breaks_off(conn) for conn in ends)
        eventually(lambda: server.app.waiting == 1, what="the app's side of the denied streams ends")
        assert kept.take(100)


def test_streams_are_judged_again_by_permissions(mesh):
    mesh.agent.needs((1, 9), "an intention with permissions")
    server, client = streaming(mesh)
    mesh.agent.write("service-defaults", server.name, Protocol="http")
    kept, cut = reading(client.dial(), "/kept"), reading(client.dial(), "/cut?why=not")
    mesh.agent.write("service-intentions", server.name, Sources=[
        {"Name": client.name, "Permissions": [{"Action": "deny", "HTTP": {"PathExact": "/cut"}}, {"Action": "allow", "HTTP": {"PathPrefix": "/"}}]}])
    assert breaks_off(cut, within=4)
    assert kept.take(100)


def test_calls_of_grpc_end_with_permission_denied(mesh):
    server, client = streaming(mesh, Rpc, "grpc")
    with Caller(client.upstreams[0].port) as caller:
        over = threading.Event()

        def messages():
            while not over.wait(0.1):
                yield b"hello"

        call = caller.call("stream_stream", "Chat")(messages(), timeout=20)
        try:
            assert next(call) == b"you said hello"
            mesh.deny(client, server)
            with pytest.raises(grpc.RpcError) as error:
                for _ in call:
                    pass
            assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED
        finally:
            over.set()


def test_an_upload_is_denied_while_it_goes_on(mesh):
    server, client = streaming(mesh, Web)
    with client.dial() as conn:
        conn.send(b"POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            conn.send(b"5\r\npiece\r\n")
            time.sleep(0.1)
        mesh.deny(client, server)
        conn.sock.settimeout(2)
        assert b" 403 " in conn.line()
        assert conn.end(3) in ("fin", "reset")
    assert not server.app.requests


def test_an_identity_that_has_expired_gets_no_further_request(known):
    server = known.service("server", app=Web, proxy={"Config": {"protocol": "http"}})
    name = known.name("client")
    identity = known.authority.issue(known.agent.spiffe(name), ends=datetime.timedelta(seconds=8))
    with mtls_connect(server.public, known.agent.roots(), identity, known.agent.sni(server.name)) as conn:
        def ask():
            try:
                conn.send(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
                status, length = conn.line(), 0
                while line := conn.line().strip().lower():
                    if line.startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                conn.take(length)
                return status
            except (ssl.SSLError, OSError):
                return b""
        assert b" 200 " in ask()
        eventually(lambda: b" 200 " not in ask(), within=15, what="the expired identity is served no more")
        served = len(server.app.requests)
        assert b" 200 " not in ask() and len(server.app.requests) == served
