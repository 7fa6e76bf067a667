"""`lictor doctor`: each thing that keeps a sidecar from working is named, with what to do about it."""

import json
import subprocess

import pytest

from mesh import Authority, Echo, Upstream, eventually
from mesh.agent import version_of
from mesh.clock import Clock
from mesh.service import admin_port

MASTER = "9f3d7c1e-5a42-4f0e-9d0a-6c1b2e8f7a55"
FINE, WRONG, UNKNOWN = 0, 1, 2


def doctor(mesh, *words, env=None):
    """How it exits, and its checks by name; `env` goes beside what leads to the agent."""
    argv = [mesh.binaries["lictor"], "doctor", "-json", *map(str, words)]
    ended = subprocess.run(argv, env={**mesh.agent.env, **(env or {})}, text=True, timeout=120, capture_output=True)
    secrets = {value for name, value in {**mesh.agent.env, **(env or {})}.items() if "TOKEN" in name and value}
    assert not any(secret in ended.stdout + ended.stderr for secret in secrets), "no token is shown"
    if ended.returncode == UNKNOWN:
        assert not ended.stdout and ended.stderr.count("\n") == 1, ended
        return UNKNOWN, ended.stderr
    checks = {check["name"]: check for check in json.loads(ended.stdout)["checks"]}
    assert all(check["next"] for check in checks.values() if check["level"] == "warn")
    assert (ended.returncode == WRONG) == any(check["level"] == "FAIL" for check in checks.values()), checks
    return ended.returncode, checks


def levels(checks, level):
    return {name for name, check in checks.items() if check["level"] == level}


def own(service):
    """So that no other sidecar of this host is looked at."""
    return ("-sidecar-for", service.id, "-admin", admin_port(service.process))


def test_all_is_well(mesh):
    db = mesh.service("db")
    web = mesh.service("web", [db])
    web.eventually_reaches()
    code, checks = doctor(mesh, *own(web))
    assert (code, levels(checks, "FAIL")) == (FINE, set()), checks
    for name in ("agent", "clock", "token", "service mesh", "registration", "sidecar", "roots", "leaf", "certificate", "intentions", "default policy",
                 "config entry mesh", "public listener", "local app", f"listener of {db.name}", f"discovery chain of {db.name}", f"endpoints of {db.name}"):
        assert checks[name]["level"] == "ok", checks[name]
    # By what runs here, without a name.
    code, checks = doctor(mesh, "-admin", admin_port(web.process))
    assert code == FINE and checks["sidecar"]["sidecar"] == web.id
    text = subprocess.run([mesh.binaries["lictor"], "doctor", *map(str, own(web))], env=mesh.agent.env, text=True, timeout=120, capture_output=True).stdout
    assert f"ok    {web.id}: sidecar: ready" in text and len(text.splitlines()) == len(checks)


def test_the_agent_is_away(mesh):
    away = {"CONSUL_HTTP_ADDR": f"127.0.0.1:{mesh.ports.take()}"}
    code, checks = doctor(mesh, "-sidecar-for", "web", env=away)
    assert code == WRONG and "is a Consul agent running there?" in checks["agent"]["found"]
    assert "registration" not in checks
    code, sentence = doctor(mesh, "-http-addr", "ftp://x")
    assert code == UNKNOWN and "-http-addr" in sentence
    code, checks = doctor(mesh, "-sidecar-for", "nobody")
    assert code == WRONG and "no sidecar of nobody is registered" in checks["registration"]["found"]


def test_upstreams_without_instances_and_ports_that_are_taken(mesh):
    sick = mesh.service("sick")
    taken = mesh.ports.take()
    mesh.keep(Echo(taken))
    web = mesh.service("web", [mesh.name("nothing"), sick, Upstream(sick.name + "-2", taken)], sidecar=None)
    web.start(ready=False)
    web.process.logged("configuration is complete")
    sick.passing("fail")
    nothing = web.upstreams[0].to
    web.app.close()

    def found():
        _, checks = doctor(mesh, *own(web))
        passes = "none of 1 registered instances is passing" not in checks[f"endpoints of {sick.name}"]["found"]
        return None if passes or checks["local app"]["level"] == "ok" else checks
    checks = eventually(found, what="the agent knows that the instance is sick")
    assert levels(checks, "FAIL") == {f"endpoints of {nothing}", f"endpoints of {sick.name}", f"endpoints of {sick.name}-2", f"listener of {sick.name}-2", "local app"}
    assert "no instance is registered" in checks[f"endpoints of {nothing}"]["found"]
    assert f"127.0.0.1:{taken} is taken by python" in checks[f"listener of {sick.name}-2"]["found"]
    assert "takes no connection" in checks["local app"]["found"]


def test_a_clock_that_is_off(mesh):
    web = mesh.service("web")
    clock = Clock(mesh.directory, "+2h")
    env = {name: str(value) for name, value in clock.env.items()}
    code, checks = doctor(mesh, *own(web), env=env)
    assert code == WRONG and checks["clock"]["level"] == "FAIL" and "s ahead of the agent" in checks["clock"]["found"]
    clock.set("-2h")
    code, checks = doctor(mesh, *own(web), env=env)
    assert code == WRONG and "s behind the agent" in checks["clock"]["found"]
    assert checks["certificate"]["level"] == "FAIL" and "compare the clocks" in checks["certificate"]["next"]


def test_an_agent_that_speaks_tls(own_mesh, tmp_path):
    authority, stranger = Authority("agents.example"), Authority("agents.example")
    server = authority.issue(dns=["consul.example"])
    for name, text in (("ca", authority.cert_pem), ("other", stranger.cert_pem), ("server", server.cert_pem), ("key", server.key_pem)):
        (tmp_path / f"{name}.pem").write_text(text)
    mesh = own_mesh()
    port = mesh.ports.take()
    mesh.agent.stop()
    mesh.agent.configure({"ports": {"https": port}, "cert_file": f"{tmp_path}/server.pem", "key_file": f"{tmp_path}/key.pem"})
    mesh.agent.start()
    web = mesh.service("web")
    right = {"CONSUL_HTTP_ADDR": f"127.0.0.1:{port}", "CONSUL_HTTP_SSL": "true", "CONSUL_CACERT": f"{tmp_path}/ca.pem", "CONSUL_TLS_SERVER_NAME": "consul.example"}
    code, checks = doctor(mesh, *own(web), env=right)
    assert code == FINE and "answers, its certificate is verified" in checks["agent"]["found"], checks
    # Another authority, that of the system, another name, and HTTP: what is wrong, and which settings are about it.
    for change, wrong, settings in (
        ({"CONSUL_CACERT": f"{tmp_path}/other.pem"}, "invalid peer certificate", ("-ca-file", "CONSUL_CACERT")),
        ({"CONSUL_CACERT": ""}, "invalid peer certificate", ("-ca-file", "CONSUL_CACERT")),
        ({"CONSUL_TLS_SERVER_NAME": "other.example"}, "invalid peer certificate", ("-tls-server-name", "CONSUL_TLS_SERVER_NAME")),
        ({"CONSUL_HTTP_SSL": "false"}, "HTTP request to an HTTPS server", ("https://", "CONSUL_HTTP_SSL=true")),
    ):
        code, checks = doctor(mesh, *own(web), env={**right, **change})
        assert code == WRONG and levels(checks, "FAIL") == {"agent"} and "registration" not in checks, (change, checks)
        assert all(text in checks["agent"]["found"] for text in (wrong, *settings)), (change, checks)
    code, sentence = doctor(mesh, *own(web), env={**right, "CONSUL_CACERT": f"{tmp_path}/nothing.pem"})
    assert code == UNKNOWN and "nothing.pem" in sentence, sentence


@pytest.fixture
def acl_mesh(own_mesh, binaries):
    key = "initial_management" if version_of(binaries["consul"]) >= (1, 11) else "master"
    return own_mesh({"primary_datacenter": "dc1", "acl": {"enabled": True, "default_policy": "deny", "tokens": {key: MASTER}}}, token=MASTER)


def token_of(mesh, name, rules):
    """A token with these rules alone."""
    policy = mesh.agent.put("/v1/acl/policy", {"Name": name, "Rules": rules})
    return {"CONSUL_HTTP_TOKEN": mesh.agent.put("/v1/acl/token", {"Policies": [{"ID": policy["ID"]}]})["SecretID"]}


def test_tokens_that_are_unknown_or_lack_a_right(acl_mesh):
    mesh = acl_mesh
    db = mesh.service("db")
    web = mesh.service("web", [db])
    mesh.allow(web, db)
    web.eventually_reaches()
    code, checks = doctor(mesh, *own(web), env={"CONSUL_HTTP_TOKEN": "00000000-dead-beef-0000-000000000000"})
    assert code == WRONG and "does not know the token" in checks["token"]["found"] and "leaf" not in checks

    enough = f'service "{web.name}" {{ policy = "write" }} service "{web.name}-sidecar-proxy" {{ policy = "write" }} '
    nodes = 'node_prefix "" { policy = "read" } '
    code, checks = doctor(mesh, *own(web), env=token_of(mesh, "all", enough + nodes + 'service_prefix "" { policy = "read" }'))
    assert code == FINE, checks
    # What an agent of its version does not read for anybody, is not read for this one.
    code, checks = doctor(mesh, "-proxy-id", web.proxy_id, "-admin", admin_port(web.process), env=token_of(mesh, "no-db", enough + nodes))
    assert f"discovery chain of {db.name}" in levels(checks, "FAIL") and f'service:read on "{db.name}"' in checks[f"discovery chain of {db.name}"]["next"]
    code, checks = doctor(mesh, *own(web), env=token_of(mesh, "no-nodes", enough + 'service_prefix "" { policy = "read" }'))
    assert levels(checks, "FAIL") == {f"endpoints of {db.name}"} and "node:read" in checks[f"endpoints of {db.name}"]["next"]
    reading = nodes + 'service_prefix "" { policy = "read" }'
    code, checks = doctor(mesh, *own(web), env=token_of(mesh, "no-write", reading))
    assert "default policy" in levels(checks, "FAIL") and f'service:write on "{web.name}"' in checks["default policy"]["next"]
    hidden = reading + f'service "{web.name}" {{ policy = "write"  intentions = "deny" }} service "{web.name}-sidecar-proxy" {{ policy = "write" }}'
    code, checks = doctor(mesh, *own(web), env=token_of(mesh, "no-intentions", hidden))
    # Who asks for the default policy has to be able to read intentions too.
    assert "intentions" in levels(checks, "FAIL") <= {"intentions", "default policy"} and f'intention:read on "{web.name}"' in checks["intentions"]["next"]
