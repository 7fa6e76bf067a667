"""Fixtures: the binaries, one shared agent for each worker, and a `Mesh` for each scenario."""

import concurrent.futures
import contextlib
import os
import pathlib
import re
import resource
import secrets
import shutil

import pytest

from mesh import Agent, Authority, Mesh, eventually
from mesh.ports import Ports

TOP = pathlib.Path(__file__).resolve().parent.parent


def binary(variable, *candidates):
    named = os.environ.get(variable)
    found = named or next((c for c in candidates if c and os.path.exists(c)), None)
    if not found:
        pytest.exit(f"{variable} names no binary: run scripts/test, which finds or builds it", 2)
    return found


def pytest_configure(config):
    """Thousands of connections at once need as many descriptors, here and in what is started from here."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


@pytest.fixture(scope="session")
def binaries():
    return {
        "lictor": binary("LICTOR_BIN", TOP / "target/release/lictor"),
        "consul": binary("CONSUL_BIN", shutil.which("consul"), TOP / ".cache/consul/usr/bin/consul"),
    }


@pytest.fixture(scope="session")
def ports():
    return Ports()


@pytest.fixture(scope="session")
def shared_agent(binaries, ports, tmp_path_factory):
    """Development mode: no ACLs, so that whatever no intention speaks of is allowed."""
    agent = Agent(binaries["consul"], ports, tmp_path_factory.mktemp("agent"))
    try:
        yield agent.start()
    finally:
        agent.stop()


@pytest.fixture(scope="session")
def known_root(binaries, ports, tmp_path_factory):
    """An agent whose root the scenarios hold the key of: (agent, authority)."""
    agent = Agent(binaries["consul"], ports, tmp_path_factory.mktemp("known"), label="known-agent")
    try:
        agent.start()
        authority = Authority(agent.trust_domain)
        agent.rotate_root(authority)
        yield agent, authority
    finally:
        agent.stop()


@pytest.fixture
def known(request, known_root, binaries, ports, tmp_path, stack):
    """A `Mesh` with an `authority` that signs as the mesh's own root does."""
    agent, authority = known_root
    made = Mesh(agent, binaries, ports, tmp_path, stack, secrets.token_hex(2))
    made.authority = authority
    request.node.mesh = made
    return made


@pytest.fixture
def stack():
    with contextlib.ExitStack() as stack:
        yield stack


@pytest.fixture
def workers():
    """Threads beside the scenario: `workers.submit(what, …)`."""
    with concurrent.futures.ThreadPoolExecutor(64) as pool:
        yield pool


@pytest.fixture
def mesh(request, shared_agent, binaries, ports, tmp_path, stack):
    made = Mesh(shared_agent, binaries, ports, tmp_path, stack, secrets.token_hex(2))
    request.node.mesh = made
    return made


@pytest.fixture
def start_agent(binaries, ports, tmp_path, stack):
    """Makes agents of the scenario's own: `start_agent(config, persist=…)`."""
    def start(config=None, start=True, **how):
        agent = Agent(binaries["consul"], ports, tmp_path, config, **how)
        stack.callback(agent.stop)
        return agent.start() if start else agent
    return start


@pytest.fixture
def own_mesh(request, start_agent, binaries, ports, tmp_path, stack):
    """A `Mesh` on an agent of the scenario's own: `own_mesh(config, persist=…)`."""
    def make(config=None, **how):
        made = Mesh(start_agent(config, **how), binaries, ports, tmp_path, stack, "")
        request.node.mesh = made
        return made
    return make


@pytest.fixture
def federation(own_mesh, start_agent):
    """The same scenario's `Mesh` in each of two datacenters that are joined."""
    first = own_mesh({"primary_datacenter": "dc1"})
    second = first.on(start_agent({"primary_datacenter": "dc1"}, datacenter="dc2", join_wan=first.agent, label="agent-dc2"))
    eventually(lambda: len(first.agent.get("/v1/catalog/datacenters")) == 2, 40, "the datacenters have joined")
    # A secondary first signs with a root of its own, then with one that the primary's signs for.
    eventually(lambda: second.agent.trust_domain == first.agent.trust_domain, 60, "the datacenters share a trust domain")
    eventually(lambda: second.agent.leaf("probe").cert_pem.count("BEGIN CERTIFICATE") > 1, 60, "leaves are sent with what chains them to the primary's root")
    return first, second


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(item, call):
    """A failure shows the end of what each program said."""
    report = (yield).get_result()
    if report.failed and (made := getattr(item, "mesh", None)):
        for process in made.processes:
            report.sections.append((f"{process.label}: {' '.join(process.argv[:8])}", process.text()[-6000:]))


TOO_OLD = re.compile(r"SKIPPED because the agent is ([\d.]+): .* needs ([\d.]+) or newer")
SUMMARY = pytest.StashKey()


def pytest_terminal_summary(terminalreporter, config):
    reasons = [TOO_OLD.search(str(report.longrepr)) for report in terminalreporter.stats.get("skipped", [])]
    config.stash[SUMMARY] = skipped_by_version([reason.groups() for reason in reasons if reason])


def pytest_unconfigure(config):
    """The last line of a run says what an older Consul left out, and how to run it."""
    if line := config.stash.get(SUMMARY, ""):
        print(line)


def skipped_by_version(skipped):
    """One sentence about (version of the agent, version that is needed) of scenarios; empty without any."""
    if not skipped:
        return ""
    have = skipped[0][0]
    needed = max((needed for _, needed in skipped), key=lambda version: [int(part) for part in version.split(".")])
    number = f"{len(skipped)} scenarios were" if len(skipped) > 1 else "1 scenario was"
    return f"{number} skipped because Consul {have} is too old. To run them, name Consul {needed} or newer: CONSUL_BIN=/path/to/consul scripts/test"
