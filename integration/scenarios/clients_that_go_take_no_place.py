"""A client that has gone gives back at once what it had: its place in every limit, and the app's work. One that sends no more is answered."""

import contextlib
import shutil
import struct
import subprocess
import time

import pytest

from mesh import Upstream, ask, eventually, mtls_connect
from mesh.apps import App
from mesh.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PSEUDO, RST_STREAM, Http2, block, frame
from mesh.identity import client_context
from mesh.raw import read_head

REQUEST = b"GET / HTTP/1.1\r\nHost: shop\r\n\r\n"
UPLOAD = b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 1000000000\r\n\r\n"
CANCEL = struct.pack(">I", 8)


class Thinker(App):
    """Reads the head of a request, says nothing, and notices when nobody waits any more. With `reads` off it takes no body."""
    reads = True

    def __init__(self, port):
        self.arrived = self.left = 0
        super().__init__(port)

    def serve(self, conn):
        if not read_head(conn):
            return
        with self._lock:
            self.arrived += 1
        try:
            if not self.reads:
                while not conn.sock.getsockopt(SOL_TCP, TCP_INFO, 1)[0] in GONE:
                    time.sleep(0.02)
            with contextlib.suppress(ConnectionError):
                conn.rest()
        finally:
            with self._lock:
                self.left += 1


# States of TCP (linux/include/net/tcp_states.h): the sidecar has ended its direction, or all of it.
SOL_TCP, TCP_INFO, GONE = 6, 11, (7, 8)


def http1(connect, request=REQUEST):
    return connect().send(request)


def http2(connect, *frames):
    return Http2(connect()).send(*(frames or (frame(HEADERS, END_HEADERS | END_STREAM, 1, block(PSEUDO)),)))


LEAVING = {
    "closes": (http1, lambda conn: conn.close()),
    "resets": (http1, lambda conn: conn.reset()),
    "resets its stream": (http2, lambda conn: conn.send(frame(RST_STREAM, 0, 1, CANCEL))),
    "closes HTTP/2": (http2, lambda conn: conn.close()),
    "resets HTTP/2": (http2, lambda conn: conn.conn.reset()),
}


def listener_of(mesh, way):
    """An app that does not answer, and how a client reaches it: by the upstream listener, or as a peer at the public one."""
    limits = {"Config": {"limits": {"max_concurrent_requests": 3}}}
    server = mesh.web("server", app=Thinker)
    client = mesh.web("client", [Upstream(server.name, mesh.ports.take(), limits)])

    def peer(protocol=None):
        context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
        context.set_alpn_protocols([protocol] if protocol else [])
        return mtls_connect(server.public, None, context=context, sni=mesh.agent.sni(server.name))

    if way == "upstream":
        return server.app, lambda protocol=None: client.dial()
    return server.app, peer


@pytest.mark.parametrize("leaving", LEAVING)
@pytest.mark.parametrize("way", ["upstream", "public"])
def test_who_has_gone_takes_no_place_and_the_app_is_told(mesh, way, leaving):
    app, connect = listener_of(mesh, way)
    begin, leave = LEAVING[leaving]
    protocol = "h2" if begin is http2 else None
    # More than the limit, one after the other: each has the place of one that has gone.
    for turn in range(3):
        clients = [begin(lambda: connect(protocol)) for _ in range(3)]
        eventually(lambda: app.arrived == 3 * (turn + 1), 10, "each is asked for")
        assert app.left == 3 * turn
        for client in clients:
            leave(client)
        eventually(lambda: app.left == 3 * (turn + 1), 10, "the app is told of each")


@pytest.mark.parametrize("leaving", ["resets", "resets its stream", "closes HTTP/2", "resets HTTP/2"])
@pytest.mark.parametrize("way", ["upstream", "public"])
def test_who_has_gone_while_nobody_took_its_body_takes_no_place_either(mesh, way, leaving):
    app, connect = listener_of(mesh, way)
    app.reads = False
    begin, leave = LEAVING[leaving]
    if begin is http1:
        client = begin(connect, UPLOAD)
        fill(client)
    else:
        fields = [(":method", "POST"), *PSEUDO[1:]]
        client = begin(lambda: connect("h2"), frame(HEADERS, END_HEADERS, 1, block(fields)), *[frame(DATA, 0, 1, bytes(16_000))] * 4)
    eventually(lambda: app.arrived == 1)
    leave(client)
    eventually(lambda: app.left == 1, 10, "the app is told")


def fill(conn):
    """Sends until nobody takes any more."""
    conn.sock.settimeout(1)
    with contextlib.suppress(TimeoutError):
        while True:
            conn.sock.sendall(bytes(1 << 16))


def test_busybox_wget_gets_its_answer_although_it_ends_its_direction(mesh):
    if not shutil.which("busybox"):
        pytest.skip("busybox is not installed")
    server = mesh.web("server")
    client = mesh.web("client", [server])
    port = client.upstreams[0].port
    eventually(lambda: ask(port).status == 200)
    server.app.delay = 2
    for words in ([], ["--post-data", "x=1"]):
        done = subprocess.run(["busybox", "wget", "-q", "-O", "-", *words, f"http://127.0.0.1:{port}/wget"], capture_output=True, timeout=30)
        assert done.returncode == 0 and b'"/wget"' in done.stdout, done
