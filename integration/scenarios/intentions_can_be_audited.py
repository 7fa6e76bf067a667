"""Audit mode: denied traffic is logged and let through, for the one service that asks for it, and enforced again at once."""

import json
import re
import ssl
import subprocess

import pytest

from mesh import Authority, Web, ask, eventually, mtls_connect, stays
from mesh.service import admin_port
from mesh.tokens import Issuer

AUDIT = {"Config": {"lictor_intentions_audit": True}}
ON, OFF = "AUDIT MODE IS ON", "Audit mode is off"


def status(service):
    return json.loads(service.admin("/status").body)


def inbound(service):
    [entry] = status(service)["inbound"]
    return entry


def caller(service, of):
    return next((each for each in inbound(service)["callers"] if each["service"] == of.name), None)


def series(service, path, name, label=""):
    """The value of the only series with that name and label."""
    lines = service.admin(path).body.decode().splitlines()
    [line] = [line for line in lines if re.split(r"[{ ]", line)[0] == name and label in line]
    return int(float(line.rsplit(" ", 1)[1]))


def set_audit(service, on):
    service.proxy = AUDIT if on else {}
    service.register()
    eventually(lambda: inbound(service)["audit"] == on, what=f"audit mode is {on}")


def test_connections_are_let_through_counted_and_told_and_cut_when_it_ends(mesh):
    server = mesh.service("server", proxy=AUDIT)
    server.process.logged(ON)
    client = mesh.service("client", [server])
    friend = mesh.service("friend", [server])
    mesh.deny(client, server)
    eventually(lambda: client.reaches() and caller(server, client)["would_deny"], what="a connection would be denied")
    conns = [client.dial() for _ in range(3)]
    with friend.dial() as kept:
        for conn in [*conns, kept]:
            assert conn.ask(b"open") == b"open"
        about = inbound(server)
        counts = {each["service"]: each for each in about["callers"]}
        assert about["audit"] and about["denied"] == 0 and counts[client.name]["denied"] == 0
        assert counts[friend.name] == {"service": friend.name, "allowed": 1, "denied": 0, "would_deny": 0}
        assert counts[client.name]["would_deny"] == about["would_deny"] >= 3
        assert series(server, "/metrics", 'lictor_intention_decisions_total', 'decision="would_deny"') == about["would_deny"]
        assert series(server, "/stats/prometheus", "envoy_rbac_shadow_denied") == about["would_deny"]
        line = server.process.logged(r"Audit mode: would deny this (?:open )?connection[^\n]*")[0]
        assert f"svc/{client.name}" in line and f"{client.name} => {server.name} (deny" in line
        problem = next(each for each in status(server)["problems"] if each["reason"] == "WouldDeny")
        assert problem["who"] == client.name and f"{client.name} => {server.name} (deny" in problem["cause"]
        assert len([each for each in status(server)["problems"] if each["reason"] == "WouldDeny"]) == 1
        set_audit(server, False)
        assert [conn.end(5) for conn in conns] == ["fin"] * len(conns)
        server.process.logged(OFF)
        client.eventually_refused()
        assert kept.ask(b"still open") == b"still open"
    set_audit(server, True)
    client.eventually_reaches()
    assert server.process.count(ON) == 2


def test_each_request_is_let_through_and_a_stream_is_cut_when_it_ends(mesh):
    server = mesh.web("server", proxy=AUDIT)
    client = mesh.service("client", [server], app=None)
    port = client.port_to(server)
    eventually(lambda: ask(port).status == 200)
    mesh.deny(client, server)
    eventually(lambda: (caller(server, client) or {}).get("would_deny") or ask(port, "/secret?token=x").status != 200)
    before = inbound(server)
    assert [ask(port, f"/{n}").status for n in range(5)] == [200] * 5
    after = inbound(server)
    assert after["would_deny"] - before["would_deny"] == 5 and after["allowed"] == before["allowed"] and after["denied"] == 0
    assert series(server, "/metrics", 'lictor_intention_decisions_total', 'decision="would_deny"') == after["would_deny"]
    assert series(server, "/stats/prometheus", "envoy_http_rbac_shadow_denied") == after["would_deny"]
    assert series(server, "/stats/prometheus", "envoy_http_rbac_denied") == 0
    server.process.logged(r"Audit mode: would deny this request[^\n]*")
    set_audit(server, False)
    assert ask(port).status == 403
    assert inbound(server)["would_deny"] == after["would_deny"]


class Upgrades(Web):
    """Switches protocols where it is asked to, and gives back then what it gets."""

    def answer(self, request):
        if not request.headers.get("upgrade"):
            return super().answer(request)
        request.send_response_only(101)
        request.send_header("upgrade", "websocket")
        request.send_header("connection", "Upgrade")
        request.end_headers()
        request.close_connection = True
        while data := request.rfile.read1(1000):
            request.wfile.write(data)


def upgraded(conn):
    conn.send(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
    assert b" 101 " in conn.line()
    while conn.line().strip():
        pass
    assert conn.ask(b"hello") == b"hello"


@pytest.mark.parametrize("kind", ["tcp", "websocket"])
def test_what_is_open_when_a_deny_comes_goes_on_and_counts_once(mesh, kind):
    server = mesh.service("server", proxy=AUDIT) if kind == "tcp" else mesh.service("server", app=Upgrades, protocol="http", proxy=AUDIT)
    client = mesh.service("client", [server], app=None)
    port = client.port_to(server)
    eventually(lambda: client.reaches() if kind == "tcp" else ask(port).status == 200)
    conns = [mesh.keep(mesh.dial(port)) for _ in range(2)]
    for conn in conns:
        upgraded(conn) if kind == "websocket" else conn.ask(b"hello")
    mesh.deny(client, server)
    about = eventually(lambda: (about := inbound(server))["would_revoke"] == 2 and about)
    assert (about["revoked"], about["denied"], about["would_deny"]) == (0, 0, 0)
    assert series(server, "/metrics", "lictor_connections_would_revoke_total", 'direction="inbound"') == 2
    assert any(each["reason"] == "WouldDeny" and f"{client.name} => {server.name} (deny" in each["cause"] for each in status(server)["problems"])
    # What comes now counts as what is let through, and not again when the intentions change once more; neither do the others.
    with mesh.dial(port) as later:
        upgraded(later) if kind == "websocket" else later.ask(b"hello")
        eventually(lambda: inbound(server)["would_deny"] == 1)
        other = mesh.service("other", sidecar=None)
        mesh.deny(other, server)
        eventually(lambda: len(inbound(server)["intentions"]) == 2)
        assert [conn.ask(b"still open") for conn in (*conns, later)] == [b"still open"] * 3
    assert (inbound(server)["would_revoke"], inbound(server)["would_deny"]) == (2, 1)
    set_audit(server, False)
    assert [conn.end(5) for conn in conns] == ["fin"] * 2


def test_rules_for_requests_and_missing_tokens_would_deny(mesh):
    mesh.agent.needs((1, 16), "JWT providers")
    mesh.agent.put("/v1/config", {
        "Kind": "jwt-provider", "Name": "okta", "Issuer": "https://issuer.example",
        "JSONWebKeySet": {"Local": {"JWKS": Issuer().key_set_base64()}}, "Forwarding": {"HeaderName": "x-claims"},
    })
    server = mesh.web("server", proxy=AUDIT)
    client = mesh.service("client", [server], app=None)
    port = client.port_to(server)
    eventually(lambda: ask(port).status == 200)
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": client.name, "Permissions": [
        {"Action": "deny", "HTTP": {"PathPrefix": "/admin"}},
        {"Action": "allow", "HTTP": {"PathPrefix": "/open"}},
        {"Action": "allow", "HTTP": {"PathPrefix": "/"}, "JWT": {"Providers": [{"Name": "okta"}]}},
    ]}])
    eventually(lambda: inbound(server)["intentions"] and ask(port, "/token").status and inbound(server)["would_deny"])
    before = inbound(server)
    for path, headers in (("/admin", {}), ("/token", {}), ("/token", {"Authorization": "Bearer not.a.token", "x-claims": "forged"})):
        answer = ask(port, path, headers=headers)
        assert answer.status == 200
        # What only a verified token brings is never the client's own.
        assert b"forged" not in answer.body
    assert ask(port, "/open").status == 200
    after = inbound(server)
    assert (after["would_deny"] - before["would_deny"], after["allowed"] - before["allowed"]) == (3, 1)
    assert any("want of a token" in each["cause"] for each in status(server)["problems"])
    # Malformed is no matter of intentions.
    with client.dial(server) as conn:
        conn.send(b"GET / HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n")
        assert b" 400 " in conn.line()
    set_audit(server, False)
    assert [ask(port, path).status for path in ("/admin", "/token", "/open")] == [403, 403, 200]
    mesh.agent.delete(f"/v1/config/service-intentions/{server.name}")
    mesh.agent.delete("/v1/config/jwt-provider/okta")


def test_a_stranger_is_not_let_in(mesh):
    """Audit mode does not let in peers without a certificate of the mesh."""
    server = mesh.service("server", proxy=AUDIT)
    eventually(lambda: inbound(server)["audit"])
    forged = Authority(mesh.agent.trust_domain).issue(mesh.agent.spiffe("client"))
    for identity in (None, forged):
        try:
            with mtls_connect(server.public, mesh.agent.roots(), identity) as conn:
                conn.send(b"let me in\n")
                got = conn.take(1)
        except (ssl.SSLError, ConnectionError):
            got = b""
        assert got == b""
    assert server.app.served == 0 and inbound(server)["would_deny"] == inbound(server)["allowed"] == 0


def test_proxy_defaults_do_not_turn_it_on_for_all(own_mesh):
    mesh = own_mesh()
    mesh.agent.write("proxy-defaults", "global", Config={"lictor_intentions_audit": True})
    server = mesh.service("server")
    client = mesh.service("client", [server])
    mesh.deny(client, server)
    client.eventually_refused()
    server.process.logged("it is not followed, and intentions are enforced")
    # What the agent merges can't be told apart, so that the registration's own counts when there is no entry for all.
    server.proxy = AUDIT
    server.register()
    stays(lambda: client.refused() and not inbound(server)["audit"], 2)
    mesh.agent.delete("/v1/config/proxy-defaults/global")
    eventually(lambda: inbound(server)["audit"])
    client.eventually_reaches()
    mesh.agent.write("proxy-defaults", "global", Config={"lictor_intentions_audit": False})
    eventually(lambda: not inbound(server)["audit"])
    client.eventually_refused()


def suggested(service, *words):
    """The output of `intentions suggest` for this sidecar."""
    argv = [service.mesh.binaries["lictor"], "intentions", "suggest", "-admin", str(admin_port(service.process)), *words]
    return subprocess.run(argv, text=True, timeout=60, capture_output=True)


def test_the_intentions_that_are_missing_are_written(mesh, tmp_path):
    """From allowing all to denying by default, without a refused caller."""
    mesh.agent.needs((1, 9), "service-intentions")
    server = mesh.service("server", proxy=AUDIT)
    friend, late, silent = (mesh.service(name, [server]) for name in ("friend", "late", "silent"))
    nobody = suggested(server)
    assert nobody.returncode == 2 and "nobody has called" in nobody.stderr and not nobody.stdout
    friend.eventually_reaches()
    mesh.deny(late, server)
    eventually(lambda: late.reaches() and caller(server, late)["would_deny"])
    made = {}
    for form, words in (("hcl", ()), ("json", ("-json",))):
        for included in (False, True):
            answer = made[form, included] = suggested(server, *words, *(("-include-denied",) if included else ()))
            assert answer.returncode == 0 and (form == "json") == bool(answer.stderr), answer
            assert included or f'"{late.name}" was seen' in answer.stdout + answer.stderr
    # Consul takes each of them.
    for (form, included), answer in made.items():
        file = tmp_path / f"entry.{form}"
        file.write_text(answer.stdout)
        mesh.agent.consul("config", "write", str(file))
        entry = mesh.agent.get(f"/v1/config/service-intentions/{server.name}")
        actions = {source["Name"]: source["Action"] for source in entry["Sources"]}
        assert actions == {friend.name: "allow", **({late.name: "allow"} if included else {}), "*": "deny"}
    set_audit(server, False)
    assert friend.reaches() and late.reaches()
    silent.eventually_refused()
    # What a request may do is not made more by a plain allow.
    mesh.agent.write("service-defaults", server.name, Protocol="http")
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": friend.name, "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]}])
    eventually(lambda: f'"{friend.name}" was seen' in suggested(server).stdout)
    assert "copy its source" in suggested(server).stdout and f'Name   = "{friend.name}"' not in suggested(server).stdout


def test_the_access_log_names_the_rule(own_mesh):
    mesh = own_mesh()
    mesh.agent.needs((1, 15), "AccessLogs of proxy-defaults")
    mesh.agent.write("proxy-defaults", "global", AccessLogs={"Enabled": True})
    server = mesh.web("server", proxy=AUDIT)
    client = mesh.service("client", [server], app=None)
    mesh.deny(client, server)
    port = client.port_to(server)
    eventually(lambda: ask(port).status == 200 and inbound(server)["would_deny"])
    line = json.loads(server.process.logged(r'\{[^\n]*"would_be_denied_by":[^\n]*\}')[0])
    assert line["response_code"] == 200 and f"{client.name} => {server.name} (deny" in line["would_be_denied_by"]
    text = "%RESPONSE_CODE% %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)% %DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)%"
    mesh.agent.write("proxy-defaults", "global", AccessLogs={"Enabled": True, "TextFormat": text})
    eventually(lambda: ask(port).status == 200 and server.process.look(rf"200 denied intention {client.name} => {server.name} \(deny"))
