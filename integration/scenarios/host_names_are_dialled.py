"""Hosts that are registered by name: several addresses, a dead one among them, and a resolver that does not answer."""

import re
import socket
import subprocess
import time

import pytest

from mesh import Blackhole, Echo, Gate, Service, Upstream, Web, ask, eventually
from mesh.ports import is_listening

DEAD, LIVE, RESOLVER = "127.0.0.41", "127.0.0.42", "127.0.0.43"
NAME = "host.lictor.test"


@pytest.fixture
def named(mesh):
    """A mesh whose sidecars go by a hosts file and a resolver of their own."""
    hosts, resolv, program = (mesh.directory / name for name in ("hosts", "resolv.conf", "lictor-with-names"))
    hosts.write_text(f"127.0.0.1 localhost\n{DEAD} {NAME}\n{LIVE} {NAME}\n")
    resolv.write_text(f"nameserver {RESOLVER}\noptions timeout:30 attempts:1\n")
    mount = f"mount --bind {hosts} /etc/hosts && mount --bind {resolv} /etc/resolv.conf"
    if subprocess.run(["unshare", "-m", "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("THE NAMES OF A SIDECAR'S OWN NEED A MOUNT NAMESPACE, which is not to be had here")
    program.write_text(f"#!/bin/sh\nexec unshare -m sh -c '{mount} && exec \"$0\" \"$@\"' {mesh.binaries['lictor']} \"$@\"\n")
    program.chmod(0o755)
    mesh.binaries = {**mesh.binaries, "lictor": program}
    # All addresses of a name, and in this order.
    shown = subprocess.run(["unshare", "-m", "sh", "-c", f"{mount} && getent ahostsv4 {NAME}"], capture_output=True, text=True).stdout
    found = list(dict.fromkeys(re.findall(r"^(\S+)", shown, re.M)))
    if found != [DEAD, LIVE]:
        pytest.skip(f"THE SYSTEM'S RESOLVER GIVES {found} FOR A NAME WITH TWO ADDRESSES")
    return mesh


def quickly(act, within=3):
    """What it gives, which must not take a large part of the time for a connect, which is 5 s."""
    began = time.monotonic()
    got = act()
    assert time.monotonic() - began < within
    return got


@pytest.mark.parametrize("kind", ["tcp", "http"])
def test_an_app_is_reached_over_the_next_of_its_addresses(named, kind):
    server = named.service("server", app=None, proxy={"LocalServiceAddress": NAME}, protocol=kind if kind == "http" else None)
    named.keep(Blackhole(server.port, DEAD))
    if kind == "http":
        named.keep(Web(server.port, LIVE, "server"))
    else:
        named.keep(Echo(server.port, host=LIVE))
    client = named.service("client", [server], protocol=kind if kind == "http" else None)
    if kind == "http":
        eventually(lambda: ask(client.upstreams[0].port).status == 200)
        assert quickly(lambda: ask(client.upstreams[0].port).status) == 200
    else:
        client.eventually_reaches()
        assert all(quickly(client.reaches) for _ in range(5))


def test_an_instance_is_reached_over_the_next_of_its_addresses(named):
    server = named.service("server", sidecar_fields={"Address": NAME}, proxy={"Config": {"bind_address": LIVE}}, sidecar=None)
    server.process = named.proxy("-sidecar-for", server.id)
    named.keep(Blackhole(server.public, DEAD))
    client = named.service("client", [server])
    client.eventually_reaches()
    for _ in range(5):
        # So late that no session is free.
        time.sleep(0.1)
        assert quickly(client.reaches)


def test_the_agent_is_reached_over_whichever_of_its_addresses_answers(named):
    """Also when that is another one than before."""
    agent = named.agent
    port = named.ports.take()
    dead, live = Blackhole(port, DEAD), named.keep(Gate(port, agent.port, LIVE))
    server = named.service("server")
    client = named.service("client", [server], sidecar=None)
    # Several connections, some of them one after another.
    quickly(lambda: client.start(env={"CONSUL_HTTP_ADDR": f"{NAME}:{port}"}), within=4)
    client.eventually_reaches()
    assert live.requests
    dead.close()
    moved = named.keep(Gate(port, agent.port, DEAD))
    live.close()
    # Nobody listens at the second address any more, and what is new is heard over the first.
    other = named.service("other")
    upstream = client.add_upstream(other)
    client.register()
    eventually(lambda: is_listening(upstream.port), 30, "the new upstream is listened on")
    client.eventually_reaches(other)
    assert moved.requests


def test_a_resolver_that_does_not_answer_delays_nobody_who_dials_an_address(named):
    silent = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        silent.bind((RESOLVER, 53))
    except PermissionError:
        pytest.skip("THE RESOLVER'S PORT CAN'T BE BOUND HERE")
    with silent:
        server = named.service("server")
        lost = Service(named, named.name("lost"), sidecar_fields={"Address": "nobody.lictor.test"}).register()
        client = named.service("client", [server, Upstream(lost.name, named.ports.take())])
        client.eventually_reaches(server)
        waiting = [client.dial(lost) for _ in range(300)]
        assert all(quickly(lambda: client.reaches(server)) for _ in range(20))
        status = open(f"/proc/{client.process.pid}/status").read()
        threads = int(re.search(r"^Threads:\s+(\d+)", status, re.M)[1])
        assert threads < 50, f"{threads} threads for one name"
        assert waiting[0].is_open()
