"""A deny ends what is open, wherever it is open: connections and requests, on a listener that has moved, and in a drain.

What is promised is one second from the agent's knowing. So scenarios wait for the agent to show the new state by its own API, and count
from then on. `SOON` is that second and one more for a machine on which much else runs. Measured with twenty others that wanted its two
cores: at most 15 ms.
"""

import datetime
import signal
import ssl
import threading
import time

import grpc
import pytest

from mesh import Authority, Caller, Rpc, Upstream, Web, eventually, mtls_connect
from mesh.http2 import END_HEADERS, END_STREAM, GOAWAY, HEADERS, PSEUDO, RST_STREAM, Http2, block, frame
from mesh.identity import client_context
from mesh.newer import NewerAgent
from mesh.ports import is_listening

SOON = 2


def known_deny(mesh, source, destination):
    """Denies, and waits for the agent to say so."""
    mesh.deny(source, destination)
    is_known(mesh, source, destination)


def is_known(mesh, source, destination):
    """Waits for the agent to have a rule for this source."""
    name = getattr(source, "name", source)
    match = f"/v1/connect/intentions/match?by=destination&name={destination.name}"
    rules = lambda: [rule for rule in mesh.agent.get(match)[destination.name] or [] if rule["SourceName"] == name]
    eventually(rules, what="the agent knows the rule", every=0.005)


def opened(mesh, *words, count=3):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", *words)
    client = mesh.service("client", [server])
    client.eventually_reaches()
    conns = [client.dial() for _ in range(count)]
    for conn in conns:
        assert conn.ask(b"open") == b"open"
    return server, client, conns


def served_by(mesh, agent, *words, **more):
    """A server whose sidecar asks this agent."""
    server = mesh.service("server", sidecar=None, **more)
    server.start("lictor", *words, env=agent.env)
    return server


def move(server):
    """Has the public listener at another port, and gives that."""
    before, server.public = server.public, server.mesh.ports.take()
    server.register()
    eventually(lambda: is_listening(server.public) and not is_listening(before), what="the public listener has moved")


def test_connections_of_a_listener_that_has_moved_see_a_deny(mesh):
    server, client, conns = opened(mesh)
    move(server)
    assert [conn.ask(b"still open") for conn in conns] == [b"still open"] * len(conns)
    known_deny(mesh, client, server)
    assert [conn.end(SOON) for conn in conns] == ["fin"] * len(conns)


def test_connections_of_a_public_listener_that_is_no_longer_registered_see_a_deny(own_mesh):
    mesh = own_mesh()
    agent = mesh.keep(NewerAgent(mesh.ports.take(), mesh.agent))
    server = served_by(mesh, agent)
    client, other = mesh.service("client", [server]), mesh.service("other", [server])
    conns = [client.dial() for _ in range(3)]
    with other.dial() as kept:
        for conn in [*conns, kept]:
            assert conn.ask(b"open") == b"open"
        # A real agent takes no sidecar without a port.
        agent.changes[f"/v1/agent/service/{server.proxy_id}"] = lambda answer: answer.update(Port=0)
        server.sidecar_fields["Meta"] = {"told": "again"}
        server.register()
        eventually(lambda: not is_listening(server.public), what="there is no public listener")
        assert [conn.ask(b"still open") for conn in conns] == [b"still open"] * len(conns)
        known_deny(mesh, client, server)
        assert [conn.end(SOON) for conn in conns] == ["fin"] * len(conns)
        assert kept.ask(b"still open") == b"still open"


def test_a_deny_during_a_drain_is_applied_at_once(mesh):
    server, client, conns = opened(mesh, "-drain-time", "60s")
    other = mesh.service("other", [server])
    with other.dial() as kept:
        assert kept.ask(b"open") == b"open"
        server.process.signal(signal.SIGTERM)
        eventually(lambda: not is_listening(server.public), what="nothing new is accepted")
        known_deny(mesh, client, server)
        assert [conn.end(SOON) for conn in conns] == ["fin"] * len(conns)
        assert kept.ask(b"still open") == b"still open"


def test_one_denied_connection_is_one_line_also_where_a_session_was_kept(mesh):
    server, client, conns = opened(mesh, count=20)
    for conn in conns:
        conn.finish().end()
    eventually(lambda: server.app.open() == 0, what="no connection is left")
    known_deny(mesh, client, server)
    client.eventually_refused()
    # The one that was refused may have been open already when the deny came, which has a line of its own. The next one of
    # the same cause is counted in a later line, then.
    if server.process.look("Open connection closed"):
        assert client.refused()
        server.process.logged(rf"Refused again[^\n]*svc/{client.name}\b[^\n]*count=1\b")
        return
    server.process.logged("Connection denied")
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


def breaks_off(conn, within=SOON):
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
        known_deny(mesh, client, server)
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
    is_known(mesh, client, server)
    assert breaks_off(cut)
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
            known_deny(mesh, client, server)
            known = time.monotonic()
            with pytest.raises(grpc.RpcError) as error:
                for _ in call:
                    pass
            assert error.value.code() == grpc.StatusCode.PERMISSION_DENIED and time.monotonic() - known < SOON
        finally:
            over.set()


def test_an_upload_is_denied_while_it_goes_on(mesh):
    server, client = streaming(mesh, Web)
    with client.dial() as conn:
        conn.send(b"POST / HTTP/1.1\r\nHost: shop\r\nTransfer-Encoding: chunked\r\n\r\n")
        for _ in range(5):
            conn.send(b"5\r\npiece\r\n")
            time.sleep(0.1)
        known_deny(mesh, client, server)
        conn.sock.settimeout(SOON)
        assert b" 403 " in conn.line()
        assert conn.end() in ("fin", "reset")
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


class Rooted:
    """A peer with a leaf of the mesh's first root, on one connection of HTTP, and on one of HTTP/2."""

    def __init__(self, mesh, server):
        leaf, roots, sni = mesh.agent.leaf(mesh.name("peer")), mesh.agent.roots(), mesh.agent.sni(server.name)
        context = client_context(roots, leaf)
        context.set_alpn_protocols(["h2"])
        self.http1 = mesh.keep(mtls_connect(server.public, roots, leaf, sni))
        self.http2 = mesh.keep(Http2(mtls_connect(server.public, None, context=context, sni=sni)))
        self.stream = -1

    def asks(self):
        """Whether HTTP/1 gives an answer of the app's."""
        try:
            self.http1.send(b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n")
            status, length = self.http1.line(), 0
            while line := self.http1.line().strip().lower():
                if line.startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            self.http1.take(length)
            return b" 200 " in status
        except OSError:
            return False

    def asks_over_http2(self):
        self.stream += 2
        try:
            self.http2.send(frame(HEADERS, END_HEADERS | END_STREAM, self.stream, block(PSEUDO)))
            ok = False
            while got := self.http2.next():
                kind, flags, stream, payload = got
                if kind == GOAWAY and int.from_bytes(payload[:4]) < self.stream:
                    return False
                if stream == self.stream:
                    # The status 200 is one byte, wherever it stands on a connection.
                    ok = ok or kind == HEADERS and payload[:1] == b"\x88"
                    if flags & END_STREAM or kind == RST_STREAM:
                        return ok
        except OSError:
            pass
        return False


def test_a_peer_whose_root_was_removed_gets_no_further_request(own_mesh):
    mesh = own_mesh()
    agent = mesh.keep(NewerAgent(mesh.ports.take(), mesh.agent))
    # A real agent goes on to list a root for as long as leaves of it may be valid. This one lists what signs now.
    agent.changes["/v1/agent/connect/ca/roots"] = lambda answer: answer.update(Roots=[root for root in answer["Roots"] if root["Active"]])
    server = served_by(mesh, agent, app=Web, proxy={"Config": {"protocol": "http"}})
    peer = Rooted(mesh, server)
    assert peer.asks() and peer.asks_over_http2() and peer.asks() and peer.asks_over_http2()
    old = mesh.agent.active_root()
    mesh.agent.rotate_root(Authority(mesh.agent.trust_domain))
    eventually(lambda: mesh.agent.active_root() != old, what="the root is another one")
    # From the first moment on, although the leaf of the sidecar itself is of the old root for some seconds more.
    eventually(lambda: not peer.asks() and not peer.asks_over_http2(), SOON, "the old root vouches for nobody")
    served = len(server.app.requests)
    assert not peer.asks() and not peer.asks_over_http2() and len(server.app.requests) == served
    # Who has a leaf of the new one is served.
    eventually(lambda: Rooted(mesh, server).asks(), 40, every=0.5)
