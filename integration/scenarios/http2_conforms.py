"""h2spec, strict, against both listeners: nothing fails.

`H2SPEC_BIN` names h2spec, as `scripts/h2spec` sets it, which builds it.
"""

import contextlib
import os
import re
import select
import ssl
import subprocess
import xml.etree.ElementTree

import pytest

from mesh import Mesh, Upstream, Web, mtls_connect
from mesh.apps import App
from mesh.identity import client_context

H2SPEC = os.environ.get("H2SPEC_BIN")
pytestmark = pytest.mark.skipif(not H2SPEC, reason="H2SPEC_BIN names no h2spec: scripts/h2spec builds it with Go, and runs this")

# Version 2.2.1 has 146; a run that broke off has fewer.
CASES = 140


class TlsRelay(App):
    """h2spec has no client certificates: this adds them."""

    def __init__(self, port, public, context, sni):
        self.public, self.context, self.sni = public, context, sni
        super().__init__(port)

    def serve(self, conn):
        with mtls_connect(self.public, None, context=self.context, sni=self.sni) as mesh:
            # One thread for both directions: a TLS socket of Python's is not for two at a time.
            while True:
                ready = [mesh.sock] if mesh.sock.pending() else select.select([conn.sock, mesh.sock], [], [], 20)[0]
                if not ready:
                    return
                for source, sink in ((conn.sock, mesh.sock), (mesh.sock, conn.sock)):
                    if source in ready and (data := take(source)) is not None:
                        if not data:
                            return
                        sink.sendall(data)


def take(sock):
    """What is there; None if it is no more than TLS's own, such as a session ticket."""
    sock.setblocking(False)
    try:
        return sock.recv(65536)
    except ssl.SSLWantReadError:
        return None
    finally:
        sock.settimeout(20)


@pytest.fixture(scope="module")
def pair(shared_agent, binaries, ports, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("h2spec"), stack, "h2")
        server = mesh.service("server", app=Web, proxy={"Config": {"protocol": "http"}})
        client = mesh.service("client", [Upstream(server.name, ports.take(), {"Config": {"protocol": "http"}})])
        yield mesh, server, client


def run(port, report):
    """[total, passed, skipped, failed], and what fails."""
    done = subprocess.run([H2SPEC, "--strict", "-h", "127.0.0.1", "-p", str(port), "-o", "3", "-j", str(report)],
                          stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=400)
    total = re.search(r"(\d+) tests, (\d+) passed, (\d+) skipped, (\d+) failed", done.stdout)
    assert total, done.stdout[-2000:] + done.stderr
    print(f"{report.parent.name}: {total[0]}")
    failed = {f"{case.get('package')}: {case.get('classname')}"
              for case in xml.etree.ElementTree.parse(report).iter("testcase") if case.find("error") is not None or case.find("failure") is not None}
    return [int(number) for number in total.groups()], failed


def test_the_upstream_listener(pair, tmp_path):
    _, _, client = pair
    check(*run(client.upstreams[0].port, tmp_path / "report.xml"))


def test_the_public_listener(pair, tmp_path):
    mesh, server, client = pair
    context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
    context.set_alpn_protocols(["h2"])
    relay = mesh.keep(TlsRelay(mesh.ports.take(), server.public, context, mesh.agent.sni(server.name)))
    check(*run(relay.port, tmp_path / "report.xml"))


def check(numbers, failed):
    total, passed, skipped, failures = numbers
    assert failed == set()
    assert total >= CASES and (passed, skipped, failures) == (total, 0, 0)
