"""Unknown fields in an agent's answers, which might restrict access, never let anybody in."""

import threading

import pytest

from mesh import Web, ask, eventually, stays
from mesh.newer import NewerAgent
from mesh.ports import is_listening
from mesh.rules import allow, jwt, provider
from mesh.tokens import Issuer

@pytest.fixture
def mesh(own_mesh):
    return own_mesh()


def put_mesh(mesh, **fields):
    mesh.agent.put("/v1/config", {"Kind": "mesh", **fields})


def newer(mesh):
    return mesh.keep(NewerAgent(mesh.ports.take(), mesh.agent))


def pair(mesh, agent, ready=True, **http):
    """A client, and a server whose sidecar asks the newer agent."""
    server = mesh.service("server", sidecar=None, **http)
    server.start(env=agent.env, ready=ready)
    return server, mesh.service("client", [server])


def add(answer, place, name, value):
    for key in place:
        answer = answer[key]
    answer[name] = value


@pytest.mark.parametrize("restriction", [("SourceCIDRs", ["192.0.2.0/24"]), ("NotAfter", "2030-01-01T00:00:00Z")], ids=lambda it: it[0])
def test_an_intention_with_an_unknown_restriction_denies(mesh, restriction):
    agent = newer(mesh)
    server, client = pair(mesh, agent)
    mesh.allow(client, server)
    client.eventually_reaches()
    agent.changes["/v1/connect/intentions/match"] = lambda lists: [row.update([restriction]) for rows in lists.values() for row in rows or []]
    # The agent has something to tell.
    mesh.deny("nobody", server)
    eventually(lambda: not client.reaches())
    server.process.logged(f'field "{restriction[0]}" that is not known')
    # What restricts nobody is what every row has.
    agent.changes["/v1/connect/intentions/match"] = lambda lists: [row.update(UnheardOf="") for rows in lists.values() for row in rows or []]
    mesh.deny("nobody-else", server)
    client.eventually_reaches()


@pytest.mark.parametrize("place", [("HTTP",), ("HTTP", "Header", 0), ()], ids=lambda place: "-".join(map(str, place)) or "permission")
def test_a_permission_with_an_unknown_restriction_allows_nothing(own_mesh, place):
    mesh = own_mesh({"acl": {"default_policy": "deny"}})
    mesh.agent.needs((1, 9), "Permissions of intentions")
    agent = newer(mesh)
    server, client = pair(mesh, agent, app=Web, protocol="http")
    port = client.upstreams[0].port
    permission = {"Action": "allow", "HTTP": {"PathPrefix": "/", "Header": [{"Name": "x-none", "Present": True, "Invert": True}]}}
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": client.name, "Permissions": [permission]}])
    eventually(lambda: ask(port).status == 200)
    agent.changes["/v1/connect/intentions/match"] = lambda lists: [
        add(one, place, "UnheardOf", "x") for rows in lists.values() for row in rows or [] for one in row.get("Permissions") or []]
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": client.name, "Permissions": [permission]}, {"Name": "nobody", "Action": "deny"}])
    eventually(lambda: ask(port).status == 403)
    server.process.logged('"UnheardOf" is not known')


MESH = "/v1/config/mesh/mesh"
UNSUPPORTED = ["TLS_ECDHE_RSA_WITH_AES_128_CBC_SHA"]


@pytest.mark.parametrize("unknown", [
    lambda entry: entry.update(TLS={"Incoming": {"TLSMinVersion": "TLSv1_4"}}),
    lambda entry: entry.update(TLS={"Incoming": {"CipherSuites": UNSUPPORTED}}),
], ids=["version", "suites"])
def test_unknown_demands_on_tls_keep_the_listener_unready_and_what_runs_as_it_is(mesh, unknown):
    mesh.agent.needs((1, 12), "TLS in the mesh config entry")
    agent = newer(mesh)
    known = lambda **more: put_mesh(mesh, TLS={"Incoming": {"TLSMinVersion": "TLSv1_2"}}, **more)
    known()
    agent.changes[MESH] = unknown
    server, client = pair(mesh, agent, ready=False)
    server.process.logged("mesh config entry: the agent's answer can't be used.*(TLSv1_4|none is supported)")
    stays(lambda: not is_listening(server.public), 1)
    agent.changes.clear()
    known(Meta={"told": "again"})
    server.ready()
    client.eventually_reaches()
    agent.changes[MESH] = unknown
    before = server.process.count("can't be used")
    known(Meta={"told": "once more"})
    eventually(lambda: server.process.count("can't be used") > before)
    assert client.reaches()


def test_cipher_suites_of_which_none_is_known_keep_the_listener_unready(mesh):
    """As a real agent tells them."""
    mesh.agent.needs((1, 12), "TLS in the mesh config entry")
    put_mesh(mesh, TLS={"Incoming": {"CipherSuites": UNSUPPORTED}})
    server = mesh.service("server", sidecar=None)
    server.start(ready=False)
    server.process.logged("none is supported")
    stays(lambda: not is_listening(server.public), 1)
    mesh.agent.delete(MESH)
    server.ready()


@pytest.mark.parametrize("place", [(), ("JSONWebKeySet",), ("Locations", 0, "Header")], ids=lambda place: "-".join(map(str, place)) or "entry")
def test_an_unknown_field_of_a_jwt_provider_keeps_the_listener_unready_and_what_runs_as_it_is(mesh, place):
    mesh.agent.needs((1, 16), "jwt-provider")
    agent, issuer = newer(mesh), Issuer()
    token = {"headers": {"x-jwt": issuer.token("valid")}}
    entry = provider(Locations=[{"Header": {"Name": "x-jwt"}}])
    fields = {key: value for key, value in entry.items() if key not in ("Kind", "Name")}
    fields["JSONWebKeySet"] = {"Local": {"JWKS": issuer.key_set_base64()}}
    mesh.agent.write("jwt-provider", "okta", **fields)
    unknown = lambda answer: add(answer, place, "UnheardOf", "x")
    agent.changes["/v1/config/jwt-provider/okta"] = unknown
    server = mesh.service("server", sidecar=None, app=Web, protocol="http")
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": "*", "Action": "allow"}], JWT=jwt())
    server.start(env=agent.env, ready=False)
    server.process.logged("jwt-provider okta: the agent's answer can't be used.*UnheardOf")
    server.process.logged("the public listener does not start before it can be")
    stays(lambda: not is_listening(server.public), 1)
    agent.changes.clear()
    mesh.agent.write("jwt-provider", "okta", **fields, Meta={"told": "again"})
    server.ready()
    client = mesh.service("client", [server])
    port = client.upstreams[0].port
    eventually(lambda: ask(port, **token).status == 200)
    # The last good one stays; and a deny does not wait for anything.
    agent.changes["/v1/config/jwt-provider/okta"] = unknown
    before = server.process.count("UnheardOf")
    mesh.agent.write("jwt-provider", "okta", **fields, Meta={"told": "once more"})
    eventually(lambda: server.process.count("UnheardOf") > before)
    assert (ask(port, **token).status, ask(port).status) == (200, 403)
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": "*", "Action": "deny"}], JWT=jwt())
    eventually(lambda: ask(port, **token).status == 403)


def test_a_rule_that_names_a_jwt_provider_denies_every_request_until_the_provider_is_known(mesh):
    """The path needs no token. A client could forge the claims of one that the app trusts, as nobody knows yet which header has them."""
    mesh.agent.needs((1, 16), "jwt-provider")
    agent, issuer = newer(mesh), Issuer()
    server = mesh.service("server", sidecar=None, app=Web, protocol="http")
    server.start(env=agent.env)
    client = mesh.service("client", [server])
    port = client.upstreams[0].port
    eventually(lambda: ask(port).status == 200)
    known = threading.Event()
    agent.changes["/v1/config/jwt-provider/okta"] = lambda answer: known.wait(20)
    entry = provider(Forwarding={"HeaderName": "x-claims"})
    fields = {key: value for key, value in entry.items() if key not in ("Kind", "Name")}
    fields["JSONWebKeySet"] = {"Local": {"JWKS": issuer.key_set_base64()}}
    mesh.agent.write("jwt-provider", "okta", **fields)
    rules = [allow(PathPrefix="/private"), allow(PathPrefix="/")]
    rules[0]["JWT"] = jwt()
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": "*", "Permissions": rules}])
    forged = {"headers": {"x-claims": "forged"}}
    # The first one may have been under way when the rules came.
    eventually(lambda: ask(port, **forged).status == 403 and server.process.count("want of a token provider that intention"))
    known.set()
    eventually(lambda: ask(port, **forged).status == 200)
    assert "x-claims" not in str(ask(port, **forged).seen()).lower()
