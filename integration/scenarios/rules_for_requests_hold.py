"""Permissions, tokens and spellings: the table of `mesh.rules`, with a real agent, and with answers recorded from newer ones.

So these rules are tested whatever the version of the agent at hand. `scripts/record-agent` makes the recordings.
"""

import pytest

from mesh import Web, ask, eventually
from mesh.double import Double, Keys, Recording, recordings
from mesh.ports import is_listening
from mesh.rules import SINCE_JWT, TABLE, agent_config, check, eventually_holds, services, write
from mesh.tokens import Issuer

NAMES = ("agent", "api", "api-public", "web", "web-public", "upstream")


@pytest.fixture(scope="module")
def issuer():
    return Issuer()


@pytest.fixture
def taken(ports):
    return {name: ports.take() for name in NAMES}


@pytest.fixture(params=recordings(), ids=lambda file: file.stem)
def recording(request):
    return Recording(request.param)


def sidecar(own, name, port):
    process = own.proxy("-sidecar-for", name, label=f"lictor-{name}")
    eventually(lambda: is_listening(port) or not process.running(), what=f"the sidecar of {name} listens")
    assert process.running(), process.text()
    return process


@pytest.fixture
def stage(request, binaries, tmp_path, stack, ports, taken, issuer):
    """What is common to both kinds of agents: `api`, an app that shows what it was asked, and a server of keys."""
    from mesh import Mesh
    keys = ports.take()
    stack.callback(Keys(keys, issuer).close)
    stack.callback(Web(taken["api"]).close)

    def on(agent):
        own = Mesh(agent, binaries, ports, tmp_path, stack, "")
        request.node.mesh = own
        return own
    on.keys = keys
    return on


@pytest.fixture
def double(recording, taken, issuer, stack, stage):
    made = Double(recording, taken, issuer, stage.keys)
    stack.callback(made.close)
    return made


@pytest.mark.parametrize("rules", TABLE, ids=lambda rules: rules.name.replace(" ", "-"))
def test_on_a_recorded_agent(double, stage, taken, issuer, rules):
    if not double.recording.has(rules.name):
        assert double.version < rules.since, f"not recorded: run scripts/record-agent again ({double.recording.name})"
        pytest.skip(f"the agent that was recorded is older than {rules.since}")
    double.show(rules.name, rules.default)
    sidecar(stage(double), "api", taken["api-public"])
    eventually_holds(rules, taken["api-public"], double.roots(), double.leaf("web"), issuer)
    assert double.unknown == []


@pytest.fixture(scope="module")
def real_agents(binaries, ports, tmp_path_factory):
    """One agent for each default, started when first wanted."""
    from mesh import Agent
    started = {}

    def get(default):
        if default not in started:
            agent = Agent(binaries["consul"], ports, tmp_path_factory.mktemp(f"rules-{default}"), agent_config(default), label=default)
            agent.needs((1, 18), "a default for intentions without ACLs, on which the table of rules rests")
            started[default] = agent.start()
        return started[default]
    yield get
    for agent in started.values():
        agent.stop()


@pytest.mark.parametrize("rules", TABLE, ids=lambda rules: rules.name.replace(" ", "-"))
def test_on_a_real_agent(real_agents, stage, taken, issuer, rules):
    agent = real_agents(rules.default)
    agent.needs(rules.since, rules.name)
    services(agent, taken)
    write(agent, rules, issuer, stage.keys)
    sidecar(stage(agent), "api", taken["api-public"])
    eventually_holds(rules, taken["api-public"], agent.roots(), agent.leaf("web"), issuer)


def test_a_recorded_agent_serves_both_sides_and_tells_changes(double, stage, taken, issuer):
    if double.version < SINCE_JWT:
        pytest.skip("recorded from an agent without tokens")
    by_name = {rules.name: rules for rules in TABLE}
    first, then = by_name["all of a source is allowed"], by_name["a token for everything"]
    double.show(first.name, first.default)
    own = stage(double)
    sidecar(own, "api", taken["api-public"])
    sidecar(own, "web", taken["upstream"])
    port = taken["upstream"]
    eventually(lambda: ask(port).status == 200)
    where = (taken["api-public"], double.roots(), double.leaf("web"), issuer)
    check(first, *where)
    double.show(then.name, then.default)
    eventually_holds(then, *where)
    assert ask(port).status == 403
    seen = ask(port, headers={"authorization": f"Bearer {issuer.token('valid')}"}).seen()
    assert "authorization" not in dict(seen["headers"])
    double.show(first.name, first.default)
    eventually(lambda: ask(port).status == 200)
    assert double.unknown == []
