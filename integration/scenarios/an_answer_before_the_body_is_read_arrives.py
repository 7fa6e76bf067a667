"""An app that answers before it has read a request's body, and closes or resets its connection: the answer arrives all the same."""

import shutil
import subprocess

import pytest

from mesh import ask, dial, eventually
from mesh.apps import App
from mesh.http2 import DATA, END_HEADERS, END_STREAM, HEADERS, PSEUDO, WINDOW_UPDATE, Http2, block, frame
from mesh.ports import is_listening
from mesh.raw import read_head


class Early(App):
    """Answers a POST by its head alone. What it does not read makes its kernel reset the connection that it closes."""

    def __init__(self, port, then):
        self.then = then
        super().__init__(port)

    def serve(self, conn):
        while head := read_head(conn):
            if not head.startswith(b"POST"):
                conn.send(b"HTTP/1.1 200 OK\r\nContent-Length: 4\r\n\r\nfine")
                continue
            conn.send(b"HTTP/1.1 403 Forbidden\r\n%sContent-Length: 5\r\n\r\nearly" % (b"Connection: close\r\n" if self.then == "closes" else b""))
            if self.then != "reads":
                return
            conn.take(int(head.lower().split(b"content-length: ")[1].split(b"\r\n")[0]))


def port_to(mesh, way, then):
    """By an exposed path straight to the app, or by two sidecars."""
    exposed = mesh.ports.take()
    server = mesh.web("server", app=lambda port: Early(port, then), sidecar=None)
    server.proxy = {"Expose": {"Paths": [{"ListenerPort": exposed, "LocalPathPort": server.port, "Path": "/x", "Protocol": "http"}]}}
    server.register().start()
    port = exposed if way == "exposed" else mesh.web("client", [server]).upstreams[0].port
    eventually(lambda: is_listening(port) and ask(port, "/x").status == 200)
    return port


WAYS = pytest.mark.parametrize("way", ["exposed", "upstream"])


@WAYS
@pytest.mark.parametrize("then", ["closes", "closes unsaid", "reads"])
def test_to_a_client_of_http1(mesh, way, then, tmp_path):
    if not shutil.which("curl"):
        pytest.skip("curl is not installed")
    port = port_to(mesh, way, then)
    body = tmp_path / "body"
    body.write_bytes(bytes(1_000_000))
    one = ["-sS", "--http1.1", "-o", "/dev/null", "-w", "%{http_code} ", f"http://127.0.0.1:{port}/x"]
    for _ in range(15):
        done = subprocess.run(["curl", *one, "-H", "Expect:", "--data-binary", f"@{body}", "--next", *one], capture_output=True, text=True, timeout=30)
        assert done.stdout == "403 200 ", done


@WAYS
@pytest.mark.parametrize("then", ["closes", "closes unsaid"])
def test_to_a_client_of_http2(mesh, way, then):
    port = port_to(mesh, way, then)
    fields = [(name, "/x" if name == ":path" else value) for name, value in PSEUDO]
    for _ in range(15):
        with Http2(dial(port)) as client:
            # Then there is room for more than the first 64 KiB.
            while client.next()[0] != WINDOW_UPDATE:
                pass
            client.send(frame(HEADERS, END_HEADERS, 1, block([(":method", "POST"), *fields[1:]])))
            client.send(*[frame(DATA, 0, 1, bytes(16_000))] * 25, frame(DATA, END_STREAM, 1))
            assert client.outcome()[:3] == ("answer", 403, b"early")
            client.send(frame(HEADERS, END_HEADERS | END_STREAM, 3, block(fields)))
            while (got := client.next())[2] != 3 or got[0] != DATA:
                pass
            assert got[3] == b"fine"
