"""A path between two sidecars that carries nothing any more and says nothing: noticed while somebody waits."""

import http.client
import os
import shutil
import subprocess
import threading
import time

import pytest

from mesh import Web, ask, eventually
from mesh.path import instance
from mesh.rpc import Caller, Rpc


@pytest.mark.parametrize("workers_of_client", ["1", "2"])
def test_requests_go_on_when_an_instance_is_cut_off(mesh, workers, workers_of_client):
    """Requests that can be sent again all succeed, and those that come later wait for nobody."""
    first, path = instance(mesh, "first", app=lambda port: Web(port, name="first"), protocol="http")
    instance(mesh, "second", of=first, app=lambda port: Web(port, name="second"))
    client = mesh.service("client", [first], app=None, sidecar=None)
    client.start("lictor", "-workers", workers_of_client)
    port = client.upstreams[0].port
    eventually(lambda: {ask(port).seen()["app"] for _ in range(8)} == {"first", "second"})
    over, cut = threading.Event(), []
    def load():
        took = []
        while not over.is_set():
            began = time.monotonic()
            try:
                status = ask(port, within=30).status
            except http.client.IncompleteRead:
                # Nobody can send again what was answered in part when the path was cut.
                assert began < cut[0]
                continue
            took.append((began, time.monotonic() - began, status))
            time.sleep(0.02)
        return took
    loads = [workers.submit(load) for _ in range(16)]
    time.sleep(1)
    made = path.made
    path.whole.clear()
    cut.append(time.monotonic())
    time.sleep(12)
    over.set()
    took = [each for load in loads for each in load.result()]
    assert {status for _, _, status in took} == {200}
    # What was under way finds out in some three seconds; this machine may be busy.
    assert max(time for _, time, _ in took) < 9
    later = [time for began, time, _ in took if began > cut[0] + 9]
    assert later and sorted(later)[len(later) // 2] < 1
    assert path.made - made <= 40, "few connections are tried meanwhile"


def test_a_call_of_grpc_on_a_path_that_is_cut_ends(mesh):
    server, path = instance(mesh, "server", app=Rpc, protocol="grpc")
    client = mesh.service("client", [server], app=None)
    caller = mesh.keep(Caller(client.upstreams[0].port))
    eventually(lambda: caller.code()[0].name == "OK")
    watcher = caller.call("unary_unary", "Wait").future(b"", timeout=60)
    assert server.app.waiting.acquire(timeout=10)
    path.whole.clear()
    began = time.monotonic()
    assert watcher.exception(20) is not None
    assert time.monotonic() - began < 15
    path.whole.set()
    eventually(lambda: caller.code()[0].name == "OK", what="calls go over a new connection")


def test_who_waits_long_on_a_path_that_is_well_is_not_disturbed(mesh):
    server, path = instance(mesh, "server", app=Rpc, protocol="grpc")
    client = mesh.service("client", [server], app=None)
    caller = mesh.keep(Caller(client.upstreams[0].port))
    eventually(lambda: caller.code()[0].name == "OK")
    made = path.made
    watcher = caller.call("unary_unary", "Wait").future(b"x", timeout=60)
    assert server.app.waiting.acquire(timeout=10)
    for _ in range(6):
        time.sleep(1.5)
        assert caller.echo() == b"hello"
    assert not watcher.done() and path.made == made


@pytest.mark.parametrize("method", ["GET", "POST"])
def test_a_path_to_an_envoy_that_is_cut_is_noticed_by_the_kernel(mesh, workers, method):
    """It speaks HTTP/1.1, which has no PING; and packets must be lost for the kernel to see it."""
    needs_iptables()
    first = mesh.web("first")
    second = mesh.web("second", of=first, sidecar=None)
    second.process = mesh.envoy(second)
    client = mesh.service("client", [first], protocol="http")
    port = client.upstreams[0].port
    eventually(lambda: {ask(port).seen()["app"] for _ in range(8)} == {"first", "second"})
    # Some have an answer to wait for when the path is cut, and others are sent later.
    second.app.delay = 60
    held = [workers.submit(ask, port, "/", method, within=50) for _ in range(4)]
    eventually(lambda: second.app.waiting > 0)
    drop(mesh, second.public)
    began = time.monotonic()
    later = [ask(port, "/", "GET", within=50).status for _ in range(10)]
    assert later == [200] * 10
    # What is safe goes on elsewhere where its connection had been used before.
    assert {each.result(50).status for each in held} <= {200, 503}
    assert time.monotonic() - began < 30


class Reader(Web):
    """Reads the beginning of a body, and the rest of it `after` so many seconds."""

    def __init__(self, port):
        self.began, self.after = threading.Event(), 0
        super().__init__(port)

    def take(self, request):
        first = request.rfile.read1(1)
        self.began.set()
        time.sleep(self.after)
        return first + request.rfile.read(int(request.headers["content-length"]) - 1)


def upload(mesh, size, after=0):
    """A client that has begun an upload of `size` bytes to an app behind an Envoy, which reads on `after` some seconds."""
    server = mesh.service("server", app=Reader, protocol="http", sidecar=None)
    server.process = mesh.envoy(server)
    client = mesh.service("client", [server], app=None)
    port = client.upstreams[0].port
    eventually(lambda: ask(port, "/", "POST", b"x").status == 200)
    server.app.began.clear()
    server.app.after = after
    conn = mesh.dial(port).send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: %d\r\n\r\n%b" % (size, bytes(1000)))
    conn.sock.settimeout(50)
    assert server.app.began.wait(20)
    return conn, server


def test_an_upload_on_a_path_to_an_envoy_that_is_cut_ends(mesh):
    """Without a sign of life it would wait for as long as the kernel sends again: 15 minutes."""
    needs_iptables()
    conn, server = upload(mesh, 1 << 20)
    drop(mesh, server.public)
    began = time.monotonic()
    for _ in range(10):
        conn.send(bytes(1000))
    assert conn.line().split()[1] == b"503"
    assert time.monotonic() - began < 30


def test_an_app_behind_an_envoy_that_reads_nothing_for_long_still_gets_the_whole_body(mesh):
    """Unread data is not acknowledged, but the peer answers with a closed window."""
    size = 64 << 20
    conn, server = upload(mesh, size, after=8)
    conn.send(bytes(size - 1000))
    assert conn.line().split()[1] == b"200"
    assert len(server.app.requests[-1]["body"]) == size


def needs_iptables():
    if os.getuid() != 0 or not shutil.which("iptables"):
        pytest.skip("packets can't be dropped: that takes root and iptables")


def drop(mesh, port):
    """Loses all packets from and to a port, up to the end of the scenario."""
    for words in (["--dport", str(port)], ["--sport", str(port)]):
        rule = ["INPUT", "-i", "lo", "-p", "tcp", *words, "-j", "DROP"]
        subprocess.run(["iptables", "-w", "-I", *rule], check=True, capture_output=True)
        mesh.stack.callback(subprocess.run, ["iptables", "-w", "-D", *rule], capture_output=True)
