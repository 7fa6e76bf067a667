#!/usr/bin/env python3
"""Effects on clients when one of two instances fails in a way that the agent does not see; see scripts/faults.

Every answer is checked. For each fault, protocol and kind of sidecar it prints how many requests were made and how many failed, when the
last one failed after the fault began, the slowest good answer, and when the instance was used again after the fault was over.
"""

import argparse
import collections
import contextlib
import dataclasses
import os
import pathlib
import secrets
import socket
import sys
import tempfile
import threading
import time

from mesh import Agent, Blackhole, Browser, Caller, Echo, Mesh, Rpc, Service, Upstream, Web, dial, eventually
from mesh.ports import Ports, is_listening

THREADS = 4
PAUSE = 0.02
WITHIN = 20.0
NAMES = ("one", "two")


class NamedRpc(Rpc):
    """Says its name before what it gives back."""

    def __init__(self, port, name):
        self.name = name
        super().__init__(port)

    def _echo(self, request, _context):
        return self.name.encode() + b" " + request


class Path:
    """The way to an instance's sidecar: passes bytes on until it is cut, and then drops all there is and all that comes."""

    def __init__(self, port, to):
        self.port, self._to, self._passing, self._hole = port, to, threading.Event(), None
        self._open, self._lock = [], threading.Lock()
        self.mend()

    def cut(self):
        """Nothing is passed on any more, in either direction, and nobody is told."""
        self._passing.clear()
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        self._hole = Blackhole(self.port)

    def mend(self):
        if self._hole:
            self._hole.close()
            # What hung is gone, as a host that has rebooted knows of no connection.
            self.drop()
            self._hole = None
        self._passing.set()
        self._listener = socket.socket()
        self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._listener.bind(("127.0.0.1", self.port))
        self._listener.listen(1024)
        threading.Thread(target=self._accept, args=(self._listener,), daemon=True).start()

    def close(self):
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()
        if self._hole:
            self._hole.close()
        self.drop()

    def drop(self):
        """Ends what is open."""
        with self._lock:
            dropped, self._open = self._open, []
        for sock in dropped:
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    def _accept(self, listener):
        while True:
            try:
                near, _ = listener.accept()
            except OSError:
                return
            try:
                far = socket.create_connection(("127.0.0.1", self._to), 5)
            except OSError:
                near.close()
                continue
            far.settimeout(None)
            for sock in (near, far):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            with self._lock:
                self._open += [near, far]
            for source, sink in ((near, far), (far, near)):
                threading.Thread(target=self._copy, args=(source, sink), daemon=True).start()

    def _copy(self, source, sink):
        try:
            while data := source.recv(1 << 16):
                if not self._passing.is_set():
                    # It is lost, and so is the end of the connection.
                    return
                sink.sendall(data)
            if self._passing.is_set():
                sink.shutdown(socket.SHUT_WR)
        except OSError:
            with contextlib.suppress(OSError):
                sink.shutdown(socket.SHUT_RDWR)


class Pair:
    """Two instances of a service, and a client of it."""

    def __init__(self, mesh, protocol, sidecars, grpc_port=None, upstream=None):
        self.mesh, self.protocol, self._sidecars, self._grpc_port = mesh, protocol, sidecars, grpc_port
        name = mesh.name("server")
        entry = {"tcp": None, "http": "http", "grpc": "grpc"}[protocol]
        client = mesh.name("client")
        for service in (name, client) if entry else ():
            mesh.agent.write("service-defaults", service, Protocol=entry)
        self.instances, self.paths, self.apps = [], [], []
        for number in range(2):
            public = mesh.ports.take()
            service = Service(mesh, name, id=f"{name}-{number}", public=mesh.ports.take(), proxy={"Config": {"bind_port": public}})
            self.instances.append(service)
            self.apps.append(None)
            self.start_app(number)
            service.register()
            self.start_sidecar(number)
            self.paths.append(mesh.keep(Path(service.public, public)))
        self.client = Service(mesh, client, [Upstream(name, mesh.ports.take(), upstream or {})], public=0).register()
        self._start(self.client)
        self.port = self.client.upstreams[0].port
        eventually(lambda: is_listening(self.port), 30, "the client's sidecar listens")

    def start_app(self, number):
        make = {"tcp": lambda port, name: Echo(port, name.encode() + b" "), "http": lambda port, name: Web(port, name=name), "grpc": NamedRpc}[self.protocol]
        self.apps[number] = self.mesh.keep(make(self.instances[number].port, NAMES[number]))

    def start_sidecar(self, number):
        service = self.instances[number]
        self._start(service)
        port = service.proxy["Config"]["bind_port"]
        eventually(lambda: is_listening(port), 30, "a server's sidecar listens")

    def _start(self, service):
        if self._sidecars == "lictor":
            service.process = self.mesh.proxy("-sidecar-for", service.id)
            return
        words = [self.mesh.binaries["consul"], "connect", "envoy", "-sidecar-for", service.id, "-ignore-envoy-compatibility",
                 "-envoy-binary", os.environ["ENVOY_BIN"], "-admin-bind", f"127.0.0.1:{self.mesh.ports.take()}",
                 "-grpc-addr", f"127.0.0.1:{self._grpc_port}", "--", "-l", "error", "--concurrency", "2"]
        service.process = self.mesh.run(words, f"envoy-{service.id}", self.mesh.agent.env)


class Requests:
    """Makes requests from several threads, and keeps of each when it was made, how long it took, and who answered: "" is nobody."""

    def __init__(self, pair):
        self.made, self._pair, self._stop = [], pair, threading.Event()
        self._threads = [threading.Thread(target=self._run, daemon=True) for _ in range(THREADS)]
        for thread in self._threads:
            thread.start()

    def end(self):
        self._stop.set()
        for thread in self._threads:
            thread.join(2 * WITHIN)
        return self.made

    def answered_by(self, name, since):
        return next((began + took for began, took, who in list(self.made) if who == name and began >= since), None)

    def _run(self):
        ask = {"tcp": self._tcp, "http": self._http, "grpc": self._grpc}[self._pair.protocol]()
        while not self._stop.is_set():
            payload = secrets.token_hex(40)
            began = time.monotonic()
            try:
                name, _, back = ask(payload).partition(" ")
                who = name if back == payload and name in NAMES else ""
            except Exception:
                who = ""
            self.made.append((began, time.monotonic() - began, who))
            time.sleep(PAUSE)

    def _tcp(self):
        def ask(payload):
            with dial(self._pair.port, WITHIN) as conn:
                return conn.send(payload.encode()).take(len("two ") + len(payload)).decode()
        return ask

    def _http(self):
        browsers = []

        def ask(payload):
            # As clients do: a connection for many requests, and another one after a failure.
            if not browsers:
                browsers.append(Browser(self._pair.port, WITHIN))
            try:
                seen = browsers[0].ask("/", "POST", payload).seen()
                return f"{seen['app']} {seen['body']}"
            except BaseException:
                browsers.pop().close()
                raise
        return ask

    def _grpc(self):
        caller = Caller(self._pair.port)
        return lambda payload: caller.echo(payload.encode(), timeout=WITHIN).decode()


def app_killed(pair):
    pair.apps[1].close()
    yield
    pair.start_app(1)


def sidecar_frozen(pair):
    with pair.instances[1].process.frozen():
        yield


def path_cut(pair):
    pair.paths[1].cut()
    yield
    pair.paths[1].mend()


def attempts_swallowed(pair):
    """The host has died and been heard of: what was open is reset, what is new is not answered."""
    pair.paths[1].cut()
    pair.paths[1].drop()
    yield
    pair.paths[1].mend()


FAULTS = {"app killed": app_killed, "sidecar frozen": sidecar_frozen, "path silently cut": path_cut, "SYNs swallowed": attempts_swallowed}


@dataclasses.dataclass
class Noticed:
    """Effects of a fault on clients. Times are in seconds."""
    requests: int
    failed: int
    last_failure: float | None
    slowest: float
    used_again: float | None

    def row(self):
        def shown(time):
            return "-" if time is None else f"{time:.1f}"
        return [str(self.requests), str(self.failed), shown(self.last_failure), shown(self.slowest), shown(self.used_again)]


def watch(pair, fault, lasting, limit=40.0):
    """Has the second instance fail for so many seconds under a load, and waits until it is used again."""
    requests = Requests(pair)
    eventually(lambda: all(requests.answered_by(name, 0) for name in NAMES), 60, "both instances answer")
    time.sleep(1)
    fails = FAULTS[fault](pair)
    began = time.monotonic()
    next(fails)
    time.sleep(lasting)
    next(fails, None)
    over = time.monotonic()
    while not (again := requests.answered_by("two", over)) and time.monotonic() < over + limit:
        time.sleep(0.1)
    time.sleep(0.5)
    made = [one for one in requests.end() if one[0] + one[1] >= began]
    failures = [at + took - began for at, took, who in made if not who]
    return Noticed(len(made), len(failures), max(failures, default=None), max((took for _, took, who in made if who), default=0.0),
                   again - over if again else None)


@contextlib.contextmanager
def world(binaries):
    """An agent of its own, which Envoy can be configured by too."""
    with tempfile.TemporaryDirectory() as directory, contextlib.ExitStack() as stack:
        ports = Ports()
        agent = Agent(binaries["consul"], ports, pathlib.Path(directory))
        grpc_port = ports.take()
        agent.configure({"ports": {"grpc": grpc_port}})
        stack.callback(agent.stop)
        yield Mesh(agent.start(), binaries, ports, pathlib.Path(directory), stack, secrets.token_hex(2)), grpc_port


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--fault", choices=[*FAULTS], action="append", help="only this one; may be repeated")
    parser.add_argument("--protocol", choices=["tcp", "http", "grpc"], action="append", help="only this one; may be repeated")
    parser.add_argument("--sidecars", choices=["lictor", "envoy"], action="append", help="only these; may be repeated")
    parser.add_argument("--lasting", type=float, default=8.0, help="seconds for which the instance fails")
    given = parser.parse_args()
    binaries = {"lictor": os.environ["LICTOR_BIN"], "consul": os.environ["CONSUL_BIN"]}
    sidecars = given.sidecars or ["lictor", *(["envoy"] if os.environ.get("ENVOY_BIN") else [])]
    if "envoy" not in sidecars and not given.sidecars:
        print("ENVOY_BIN names no Envoy, so there is nothing to compare with", file=sys.stderr)
    head = ["fault", "protocol", "sidecars", "requests", "failed", "last failure after", "slowest answer", "used again after"]
    print(" | ".join(head), flush=True)
    totals = collections.Counter()
    for fault in given.fault or FAULTS:
        for protocol in given.protocol or ["tcp", "http", "grpc"]:
            for kind in sidecars:
                with world(binaries) as (mesh, grpc_port):
                    noticed = watch(Pair(mesh, protocol, kind, grpc_port), fault, given.lasting)
                totals[kind] += noticed.failed
                print(" | ".join([fault, protocol, kind, *noticed.row()]), flush=True)
    print("failed in all: " + ", ".join(f"{kind} {totals[kind]}" for kind in sidecars))


if __name__ == "__main__":
    main()
