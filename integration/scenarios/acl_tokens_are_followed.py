"""ACLs on, with a default that denies: tokens given in every way, changed live, refused and revoked."""

import pytest

from mesh import ask, eventually, stays
from mesh.agent import version_of

MASTER = "9f3d7c1e-5a42-4f0e-9d0a-6c1b2e8f7a55"


def acl_config(agent_version):
    key = "initial_management" if agent_version >= (1, 11) else "master"
    return {"primary_datacenter": "dc1", "acl": {"enabled": True, "default_policy": "deny", "tokens": {key: MASTER}}}


@pytest.fixture
def acl_mesh(own_mesh, binaries):
    return own_mesh(acl_config(version_of(binaries["consul"])), token=MASTER)


def token_for(mesh, *services):
    made = mesh.agent.put("/v1/acl/token", {"ServiceIdentities": [{"ServiceName": name} for name in services]})
    return made["SecretID"], made["AccessorID"]


def start(mesh, service, token):
    return service.start(env={"CONSUL_HTTP_TOKEN": token})


@pytest.fixture
def pair(acl_mesh):
    server = acl_mesh.service("server", sidecar=None)
    client = acl_mesh.service("client", [server], sidecar=None)
    return acl_mesh, server, client


def test_the_default_denies_and_an_intention_allows(pair):
    mesh, server, client = pair
    start(mesh, server, token_for(mesh, server.name)[0])
    start(mesh, client, token_for(mesh, client.name)[0])
    client.eventually_refused()
    eventually(lambda: server.process.look(rf"[^\n]*svc/{client.name}[^\n]*"), what="the denial by the default is logged")
    undo = mesh.allow(client, server)
    client.eventually_reaches()
    with client.dial() as conn:
        assert conn.ask(b"open") == b"open"
        undo()
        client.eventually_refused(within=2)
        assert conn.end(within=1) == "fin"


@pytest.mark.parametrize("way", ["flag", "file flag", "environment", "file in the environment"])
def test_a_token_can_be_given_by(pair, tmp_path, way):
    mesh, server, client = pair
    mesh.allow("*", server)
    token = token_for(mesh, server.name)[0]
    file = tmp_path / "token"
    file.write_text(token + "\n")
    words, env = {
        "flag": (["-token", token], {}),
        "file flag": (["-token-file", str(file)], {}),
        "environment": ([], {"CONSUL_HTTP_TOKEN": token}),
        "file in the environment": ([], {"CONSUL_HTTP_TOKEN_FILE": str(file)}),
    }[way]
    server.start("lictor", *words, env={"CONSUL_HTTP_TOKEN": "", **env})
    start(mesh, client, MASTER)
    client.eventually_reaches()


def test_a_token_that_the_agent_refuses_ends_the_start_with_a_sentence(pair):
    mesh, server, _ = pair
    without_rights = token_for(mesh)[0]
    for token in ("00000000-dead-beef-0000-000000000000", without_rights, token_for(mesh, "something-else")[0]):
        process = mesh.proxy("-proxy-id", server.proxy_id, env={"CONSUL_HTTP_TOKEN": token})
        # One that is not known may have been created just now, and is waited for.
        assert process.wait(90) == 1
        last = process.err().strip().splitlines()
        assert len(last) == 1 and "token" in last[0], process.text()
        assert token not in process.text()


@pytest.mark.parametrize("flag", ["-sidecar-for", "-proxy-id"])
def test_a_token_that_is_created_after_the_start_is_waited_for(pair, flag):
    mesh, server, client = pair
    mesh.allow(client, server)
    secret = "5b1e7d0c-3a2f-4c58-9e61-0d2f6a7b8c9d"
    process = mesh.proxy(flag, server.id if flag == "-sidecar-for" else server.proxy_id, env={"CONSUL_HTTP_TOKEN": secret})
    process.logged("the agent does not know the token: waiting")
    stays(process.running, 3)
    mesh.agent.put("/v1/acl/token", {"SecretID": secret, "ServiceIdentities": [{"ServiceName": server.name}]})
    start(mesh, client, token_for(mesh, client.name)[0])
    client.eventually_reaches(within=60)
    assert secret not in process.text()


def test_a_changed_token_file_is_used_at_once(pair, tmp_path):
    mesh, server, client = pair
    mesh.allow(client, server)
    first, first_accessor = token_for(mesh, server.name)
    second, _ = token_for(mesh, server.name)
    file = tmp_path / "token"
    file.write_text(first)
    server.start("lictor", "-token-file", str(file), env={"CONSUL_HTTP_TOKEN": ""})
    start(mesh, client, token_for(mesh, client.name)[0])
    client.eventually_reaches()
    file.write_text(second)
    mesh.agent.delete(f"/v1/acl/token/{first_accessor}")
    stays(client.reaches, 1)
    mesh.deny(client, server)
    client.eventually_refused(within=40)
    assert server.process.running()


def test_a_revoked_token_never_ends_a_running_sidecar_and_a_new_one_is_picked_up(pair, tmp_path):
    mesh, server, client = pair
    mesh.allow(client, server)
    token, accessor = token_for(mesh, server.name)
    file = tmp_path / "token"
    file.write_text(token)
    server.start("lictor", "-token-file", str(file), env={"CONSUL_HTTP_TOKEN": ""})
    start(mesh, client, token_for(mesh, client.name)[0])
    client.eventually_reaches()
    mesh.agent.delete(f"/v1/acl/token/{accessor}")
    # A change wakes the blocking queries, which are then refused.
    mesh.allow("someone-else", server)
    server.process.logged(r"403|[Pp]ermission denied|ACL not found|token", within=60)
    stays(client.reaches, 2)
    file.write_text(token_for(mesh, server.name)[0])
    mesh.deny(client, server)
    client.eventually_refused(within=60)
    assert server.process.running()


def test_an_acl_default_of_allow_allows(own_mesh, binaries):
    config = acl_config(version_of(binaries["consul"]))
    config["acl"]["default_policy"] = "allow"
    mesh = own_mesh(config, token=MASTER)
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    mesh.deny(client, server)
    client.eventually_refused()


def test_a_default_intention_policy_goes_before_the_acl_default(own_mesh, shared_agent, binaries):
    shared_agent.needs((1, 18), "default_intention_policy")
    config = acl_config(version_of(binaries["consul"]))
    config["acl"]["default_policy"] = "allow"
    mesh = own_mesh({**config, "default_intention_policy": "deny"}, token=MASTER)
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_refused()
    mesh.allow(client, server)
    client.eventually_reaches()


def test_a_default_intention_policy_that_allows_goes_before_an_acl_default_that_denies(own_mesh, shared_agent, binaries):
    shared_agent.needs((1, 18), "default_intention_policy")
    mesh = own_mesh({**acl_config(version_of(binaries["consul"])), "default_intention_policy": "allow"}, token=MASTER)
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    mesh.deny(client, server)
    client.eventually_refused()


@pytest.mark.parametrize("protocol", ["tcp", "http"])
def test_an_acl_default_that_denies_holds_with_acls_off(own_mesh, shared_agent, protocol):
    """The agent authorizes then, and tells Envoy to deny."""
    shared_agent.needs((1, 9), "X-Consul-Default-ACL-Policy")
    mesh = own_mesh({"acl": {"enabled": False, "default_policy": "deny"}})
    server = mesh.web("server", protocol=protocol)
    client = mesh.service("client", [server])
    port = client.port_to(server)
    if protocol == "tcp":
        client.eventually_refused()
    else:
        eventually(lambda: ask(port).status == 403)
    mesh.allow(client, server)
    eventually(lambda: ask(port).status == 200)
