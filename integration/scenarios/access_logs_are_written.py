"""`AccessLogs` of proxy-defaults, as users of Envoy know them."""

import json

import pytest

from mesh import Upstream, Web, ask, eventually


@pytest.fixture
def mesh(own_mesh):
    made = own_mesh()
    made.agent.needs((1, 15), "AccessLogs of proxy-defaults")
    return made


def pair(mesh, protocol="http", **logs):
    mesh.agent.write("proxy-defaults", "global", AccessLogs={"Enabled": True, **logs})
    config = {"Config": {"protocol": protocol}}
    server = mesh.service("server", **({"app": Web} if protocol == "http" else {}), proxy=config)
    return server, mesh.service("client", [Upstream(server.name, mesh.ports.take(), config)])


def lines(process):
    return [json.loads(line) for line in process.out().splitlines() if line.startswith("{")]


def test_the_default_is_one_json_object_a_request_on_standard_output(mesh):
    server, client = pair(mesh)
    eventually(lambda: ask(client.upstreams[0].port).status == 200)
    ask(client.upstreams[0].port, "/path?q=1", "POST", b"body", {"host": "shop.example", "user-agent": "scenario"})
    for sidecar in (server, client):
        line = eventually(lambda: next((line for line in lines(sidecar.process) if line["path"] == "/path?q=1"), None))
        assert (line["method"], line["response_code"], line["bytes_received"], line["response_flags"]) == ("POST", 200, 4, None)
        assert (line["authority"], line["user_agent"], line["bytes_sent"] > 0) == ("shop.example", "scenario", True)
        assert line["upstream_host"] and line["start_time"].endswith("Z") and isinstance(line["duration"], int)


def test_a_text_format_in_a_file_which_may_be_rotated(mesh):
    file = mesh.directory / "access.log"
    server, client = pair(mesh, Type="file", Path=str(file), TextFormat="%REQ(:PATH)% %RESPONSE_CODE% %DYNAMIC_METADATA(consul:service)%")
    port = client.upstreams[0].port
    eventually(lambda: ask(port).status == 200)
    ask(port, "/first")
    eventually(lambda: f"/first 200 {client.name}\n" in file.read_text())
    file.rename(mesh.directory / "access.log.1")
    eventually(lambda: ask(port, "/second").status == 200 and file.exists() and f"/second 200 {client.name}\n" in file.read_text())


def test_denials_and_failures_are_logged_with_flags(mesh):
    server, client = pair(mesh, JSONFormat='{"code": "%RESPONSE_CODE%", "flags": "%RESPONSE_FLAGS%", "why": "%RESPONSE_CODE_DETAILS%"}')
    port = client.upstreams[0].port
    eventually(lambda: ask(port).status == 200)
    mesh.deny(client, server)
    eventually(lambda: ask(port).status == 403)
    eventually(lambda: {"code": 403, "flags": None, "why": "rbac_access_denied_matched_policy[none]"} in lines(server.process))
    server.passing("fail")
    eventually(lambda: ask(port).status == 503)
    eventually(lambda: {"code": 503, "flags": "UH", "why": "no_healthy_upstream"} in lines(client.process))


def test_connections_of_tcp_services_are_logged_and_it_can_be_turned_off(mesh):
    server, client = pair(mesh, "tcp")
    client.eventually_reaches()
    line = eventually(lambda: next((line for line in lines(server.process) if line["bytes_received"] == 6), None))
    assert (line["bytes_sent"], line["method"], line["upstream_cluster"]) == (6, None, "local_app")
    mesh.agent.delete("/v1/config/proxy-defaults/global")

    def is_off():
        before = len(lines(server.process))
        return client.reaches() and len(lines(server.process)) == before
    eventually(is_off, every=0.3)
