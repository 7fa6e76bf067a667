"""Requests that two readers might read in two ways, judged by a sidecar and served by servers that others wrote.

Each server says what it understood. That is what the decision saw, or the request was refused; and no request that arrives is one
that the rules deny, as the server understood it.
"""

import collections
import random

import hpack
import pytest

from mesh import eventually, mtls_connect
from mesh.http2 import DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, WINDOW_UPDATE, block, frame, next_frame
from mesh.identity import client_context
from mesh.probes import Probe, by_hand, generated, smuggling
from mesh.servers import SERVERS, Absent
from mesh.views import ALLOWS, DENIES, breaks_allows, breaks_denies, by_id, decisions, differences

SEED = 9112
KINDS = [(server, protocol) for server in SERVERS for protocol in ("http", "http2")]


class Front:
    """A client of the public listener that makes one request after the other, on a new connection where the last one was ended."""

    def __init__(self, connect):
        self._connect, self._conn = connect, None

    def conn(self):
        if self._conn is None:
            self._conn, self._rest = self._connect(), b""
            self.begin()
        return self._conn

    def begin(self):
        pass

    def close(self):
        if self._conn is not None:
            self._conn.close()
        self._conn = None

    def ask(self, probe, id):
        """What comes of it: the statuses that are answered, and "reset" for a stream that is."""
        try:
            return self.exchange(probe, id)
        except (OSError, EOFError):
            self.close()
            return []

    def more(self):
        part = self._conn.sock.recv(65536)
        if not part:
            raise EOFError
        self._rest += part

    def exactly(self, size):
        while len(self._rest) < size:
            self.more()
        taken, self._rest = self._rest[:size], self._rest[size:]
        return taken

    def until(self, end):
        while end not in self._rest:
            self.more()
        taken, _, self._rest = self._rest.partition(end)
        return taken


class Http1(Front):
    def exchange(self, probe, id):
        self.conn().sock.settimeout(0.25 if probe.raw else 5)
        self._conn.send(probe.http1(id))
        if not probe.raw:
            status, stays = self.answer(probe.method)
            if not stays:
                self.close()
            return [status]
        statuses = []
        try:
            while True:
                statuses.append(self.answer("GET")[0])
        except (OSError, EOFError):
            self.close()
        return statuses

    def answer(self, method):
        """The status of the next response, read to its end, and whether the connection stays."""
        head = self.until(b"\r\n\r\n").decode("latin-1").split("\r\n")
        status = int(head[0].split(" ")[1])
        if status < 200:
            return self.answer(method)
        fields = dict(line.lower().split(": ", 1) for line in head[1:])
        if fields.get("transfer-encoding") == "chunked" and method != "HEAD":
            while size := int(self.until(b"\r\n"), 16):
                self.exactly(size + 2)
            self.until(b"\r\n")
        elif method != "HEAD" and status not in (204, 304):
            self.exactly(int(fields.get("content-length", 0)))
        return status, fields.get("connection") != "close" and not head[0].startswith("HTTP/1.0")


class Http2(Front):
    def begin(self):
        self._stream, self._hpack = -1, hpack.Decoder()
        self._conn.sock.settimeout(5)
        self._conn.send(PREFACE + frame(SETTINGS) + frame(WINDOW_UPDATE, 0, 0, (1 << 30).to_bytes(4)))

    def exchange(self, probe, id):
        self.conn()
        self._stream += 2
        body = probe.body is not None
        frames = [frame(HEADERS, END_HEADERS | (0 if body else END_STREAM), self._stream, block(probe.http2(id)))]
        if body:
            pieces = [probe.body[at:at + 16_000] for at in range(0, len(probe.body), 16_000)] or [b""]
            frames += [frame(DATA, END_STREAM if number == len(pieces) else 0, self._stream, piece) for number, piece in enumerate(pieces, 1)]
        self._conn.send(b"".join(frames))
        return [self.answer()]

    def answer(self):
        status = None
        while got := next_frame(self._conn):
            kind, flags, stream, payload = got
            if kind == GOAWAY:
                raise EOFError
            if kind == HEADERS:
                found = dict(self._hpack.decode(payload)).get(":status")
                status = status or (int(found) if found and not found.startswith("1") else None)
            if stream == self._stream and kind == RST_STREAM:
                return status or "reset"
            if stream == self._stream and kind in (HEADERS, DATA) and flags & END_STREAM:
                return status
        raise EOFError


@pytest.fixture
def served(mesh, ports, tmp_path):
    """Puts a server behind a sidecar: (server, sidecar's service, fronts by version, how rules are written)."""
    def serve(kind, protocol):
        mesh.agent.needs((1, 9), "rules for requests")
        try:
            server = mesh.keep(SERVERS[kind](ports, tmp_path))
        except Absent as absent:
            pytest.skip(f"{kind} is NOT TESTED: {absent}")
        service = mesh.service("server", app=None, sidecar=None, protocol=protocol)
        service.port = server.port if protocol == "http" else server.port_http2
        service.register()
        service.start("lictor", "-log-level", "DEBUG", "-log-json")
        prober = mesh.service("prober", app=None, sidecar=None)
        context = client_context(mesh.agent.roots(), mesh.agent.leaf(prober.name))
        sni = mesh.agent.sni(service.name)
        http2 = client_context(mesh.agent.roots(), mesh.agent.leaf(prober.name))
        http2.set_alpn_protocols(["h2"])
        fronts = {"1": Http1(lambda: mtls_connect(service.public, None, context=context, sni=sni, within=5)),
                  "2": Http2(lambda: mtls_connect(service.public, None, context=http2, sni=sni, within=5))}

        def answers(probe, status):
            answered = fronts["1"].ask(probe, "ready")
            assert answered == [status], answered
            return True

        def rule(permissions, refused):
            mesh.agent.write("service-intentions", service.name, Sources=[{"Name": prober.name, "Permissions": permissions}])
            mesh.stack.callback(mesh.agent.delete, f"/v1/config/service-intentions/{service.name}")
            eventually(lambda: answers(refused, 403), what="the rules hold")
            eventually(lambda: answers(Probe(), 200), what="the server is reached")
        return server, service, fronts, rule
    return serve


PHASES = {
    "denies": (DENIES, Probe(target="/secret"), breaks_denies),
    "allows": (ALLOWS, Probe(target="/x"), breaks_allows),
}


def requests(protocol):
    """(phase, version of HTTP before the sidecar, request)"""
    dice = random.Random(SEED)
    own = "1" if protocol == "http" else "2"
    for probe in by_hand():
        yield dice.choice(("denies", "denies", "allows")), own if dice.random() < 0.7 else "12".replace(own, ""), probe
    for probe in generated(300, SEED):
        yield dice.choice(("denies", "allows")), dice.choice("12"), probe
    if protocol == "http":
        for probe in smuggling():
            yield "denies", "1", probe


@pytest.mark.parametrize(("kind", "protocol"), KINDS, ids=lambda word: word.replace(" ", "-"))
def test_what_arrives_is_what_was_judged(served, kind, protocol):
    server, service, fronts, rule = served(kind, protocol)
    sent_probes, phases = {}, {}
    known = server.knows_over_http2 if protocol == "http2" else None
    todo = [request for request in requests(protocol) if known is None or request[2].method in known]
    for phase, (permissions, refused, _) in PHASES.items():
        rule(permissions, refused)
        for number, (when, version, probe) in enumerate(todo):
            if when == phase:
                id = f"probe-{number}"
                sent_probes[id], phases[id] = (probe, version, fronts[version].ask(probe, id)), phase
    for front in fronts.values():
        front.close()
    judged, understood = decisions(service.process.out()), by_id(server.reports())
    wrong, tally = [], collections.Counter()
    for id, reports in understood.items():
        probe, version, statuses = sent_probes.get(id.removesuffix("-hidden"), (None, None, None))
        if id == "ready":
            continue
        lines = judged.get(id, [])
        if len(reports) != len(lines) or not all(line["decision"].startswith("allowed") for line in lines) or not probe:
            wrong.append((id, str(probe), version, f"{len(reports)} arrived, {[line['decision'] for line in lines]} judged"))
            continue
        for line, report in zip(lines, reports):
            hidden = id.endswith("-hidden")
            differing = differences(server, Probe(raw=b"") if hidden else probe, line, report) + PHASES[phases[id.removesuffix("-hidden")]][2](report)
            if differing:
                wrong.append((id, str(probe), version, differing, line["path"], report["paths"]))
        tally["arrived"] += 1
    for id, (probe, version, statuses) in sent_probes.items():
        tally["asked"] += 1
        tally[tuple(statuses)] += 1
        if 200 in statuses and id not in understood and f"{id}-hidden" not in understood:
            wrong.append((id, str(probe), version, f"{statuses}, and the server knows nothing of it"))
        if 503 in statuses and probe.raw:
            wrong.append((id, str(probe), version, "what the client wrote is told as a fault of the app"))
    print(kind, protocol, dict(tally))
    assert not wrong, "\n".join(map(str, [f"{len(wrong)} of {tally['asked']}", *wrong[:40]]))
    assert tally["arrived"] > tally["asked"] / 5, tally
