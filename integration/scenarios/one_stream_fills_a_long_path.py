"""Over a path that takes long, one stream is not held up by its window: that grows with what the path holds."""

import time

import pytest

from mesh import Web, ask, eventually
from mesh.path import instance
from mesh.rpc import Caller, Rpc

SIZE = 96 << 20
PIECE = bytes(1 << 20)
ONE_WAY = 0.1
# With half a megabyte for each round trip it would take some 40 s.
IN_TIME = 20
# The first window is 512 KiB; sockets on the way hold some, too.
MORE_THAN_AT_FIRST = 6 << 20


class Large(Web):
    def answer(self, request):
        if request.command == "POST":
            left = SIZE
            while left:
                left -= len(request.rfile.read(min(left, len(PIECE))))
            return self.say(request, b"all")
        request.send_response_only(200)
        request.send_header("content-length", str(SIZE))
        request.end_headers()
        for _ in range(SIZE // len(PIECE)):
            request.wfile.write(PIECE)


def download(conn):
    conn.send(b"GET / HTTP/1.1\r\nHost: x\r\n\r\n")
    while conn.line().strip():
        pass
    return len(conn.take(SIZE))


def upload(conn):
    conn.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n" % SIZE)
    for _ in range(SIZE // len(PIECE)):
        conn.send(PIECE)
    assert b"200" in conn.line()
    return SIZE


def server_on_a_long_path(mesh, app, protocol):
    """No limit of time but the scenario's own: a busy machine takes long."""
    server, path = instance(mesh, "server", delay=ONE_WAY, app=app, protocol=protocol, config={"local_request_timeout_ms": 0})
    route = {"Match": {"HTTP": {"PathPrefix": "/"}}, "Destination": {"RequestTimeout": "90s"}}
    mesh.agent.write("service-router", server.name, Routes=[route])
    return server, path


def fills(path, began):
    """In time; or, where the machine has no time for that, by as much as no window that does not grow lets out."""
    return time.monotonic() - began < IN_TIME or path.most_under_way > MORE_THAN_AT_FIRST


@pytest.mark.parametrize("transfer", [download, upload])
def test_bodies_of_http(mesh, transfer):
    server, path = server_on_a_long_path(mesh, Large, "http")
    client = mesh.service("client", [server], app=None)
    port = client.upstreams[0].port
    eventually(lambda: ask(port, method="HEAD").status == 200)
    began = time.monotonic()
    with client.dial(within=90) as conn:
        assert transfer(conn) == SIZE
    assert fills(path, began), path.most_under_way


def test_a_stream_of_grpc(mesh):
    server, path = server_on_a_long_path(mesh, Rpc, "grpc")
    client = mesh.service("client", [server], app=None)
    caller = mesh.keep(Caller(client.upstreams[0].port))
    eventually(lambda: caller.code()[0].name == "OK")
    began = time.monotonic()
    assert sum(map(len, caller.call("unary_stream", "Pour")(b"%d" % (SIZE >> 16), timeout=90))) == SIZE
    assert fills(path, began), path.most_under_way
