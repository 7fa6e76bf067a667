"""TLS sessions are resumed, so that reconnecting is cheap, and a resumed one has no more rights than a full one."""

import datetime
import ssl

import pytest

from mesh import eventually, mtls_connect, mtls_server
from mesh.identity import client_context

VERSIONS = pytest.mark.parametrize("version", [ssl.TLSVersion.TLSv1_2, ssl.TLSVersion.TLSv1_3], ids=["TLS 1.2", "TLS 1.3"])


def session_of(port, context):
    with mtls_connect(port, None, context=context) as conn:
        # TLS 1.3 sends its tickets after the handshake: with the first bytes of data they have come.
        assert conn.ask(b"hello") == b"hello"
        return conn.sock.session


@VERSIONS
def test_a_session_is_resumed_at_the_public_listener(known, version):
    server = known.service("server")
    context = client_context(known.agent.roots(), known.agent.leaf(known.name("client")), version)
    session = session_of(server.public, context)
    with mtls_connect(server.public, None, context=context, session=session) as conn:
        assert conn.ask(b"hello") == b"hello"
        assert conn.sock.session_reused


@VERSIONS
def test_a_resumed_session_does_not_get_past_a_deny(known, version):
    server = known.service("server")
    name = known.name("client")
    context = client_context(known.agent.roots(), known.agent.leaf(name), version)
    session = session_of(server.public, context)
    known.deny(name, server)

    def refused():
        try:
            with mtls_connect(server.public, None, context=context, session=session, within=5) as conn:
                return conn.send(b"hello").take(1) == b""
        except (ssl.SSLError, ConnectionError):
            return True

    def reaches_app():
        served = server.app.served
        return not refused() or server.app.served != served

    eventually(refused, within=2)
    # The app may count a connection late that was open when the deny came.
    eventually(lambda: not any(reaches_app() for _ in range(3)))


@VERSIONS
def test_a_resumed_session_does_not_outlive_its_certificate(known, version):
    server = known.service("server")
    lifetime = datetime.timedelta(seconds=4)
    identity = known.authority.issue(known.agent.spiffe(known.name("client")), ends=lifetime)
    context = client_context(known.agent.roots(), identity, version)
    session = session_of(server.public, context)

    def refused():
        try:
            with mtls_connect(server.public, None, context=context, session=session, within=5) as conn:
                return conn.send(b"hello").take(1) == b""
        except (ssl.SSLError, ConnectionError):
            return True

    eventually(refused, within=8, every=0.2)


@VERSIONS
def test_a_sidecar_resumes_its_own_sessions_with_a_server(known, version):
    server = known.service("server", app=None, sidecar=None)
    server.app = known.keep(mtls_server(server.public, known.agent.roots(), known.agent.leaf(server.name), version=version))
    client = known.service("client", [server])
    for _ in range(5):
        assert client.dial().ask(b"hello") == b"hello"
    assert server.app.resumed >= 3
