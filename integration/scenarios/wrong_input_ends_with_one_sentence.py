"""Invalid settings end the process at once: one sentence that names the setting and the remedy, and status 1."""

import re

import pytest

from mesh.process import run

CASES = {
    "unknown flag": (["-sidecar-four", "x"], {}, "sidecar-four"),
    "flag without its value": (["-sidecar-for"], {}, "sidecar-for"),
    "no proxy chosen": ([], {}, "-sidecar-for|-proxy-id"),
    "arguments that are no flags": (["-sidecar-for", "x", "surplus"], {}, "surplus|[Nn]on-flag"),
    "another scheme": (["-sidecar-for", "x", "-http-addr", "ftp://127.0.0.1:8500"], {}, "ftp"),
    "another scheme in the environment": (["-sidecar-for", "x"], {"CONSUL_HTTP_ADDR": "ftp://127.0.0.1:8500"}, "ftp"),
    "an address that is none": (["-sidecar-for", "x", "-http-addr", "http://"], {}, "http-addr|http://|address"),
    "a port that is none": (["-sidecar-for", "x", "-http-addr", "127.0.0.1:eighty"], {}, "eighty"),
    "unknown log level": (["-sidecar-for", "x", "-log-level", "LOUD"], {}, "LOUD"),
    "token file that is missing": (["-sidecar-for", "x", "-token-file", "/nonexistent/token"], {}, "/nonexistent/token"),
    "CA file that is missing": (["-sidecar-for", "x", "-http-addr", "https://127.0.0.1:1", "-ca-file", "/nonexistent/ca"], {}, "/nonexistent/ca"),
    "CA path that is missing": (["-sidecar-for", "x", "-http-addr", "https://127.0.0.1:1", "-ca-path", "/nonexistent/cas"], {}, "/nonexistent/cas"),
    "CA file that is no PEM": (["-sidecar-for", "x", "-http-addr", "https://127.0.0.1:1", "-ca-file", "/etc/passwd"], {}, "/etc/passwd"),
    "client certificate without its key": (["-sidecar-for", "x", "-http-addr", "https://127.0.0.1:1", "-client-cert", "/etc/passwd"], {}, "client-key"),
    "a switch that is neither true nor false": (["-sidecar-for", "x"], {"CONSUL_HTTP_SSL_VERIFY": "flase"}, "CONSUL_HTTP_SSL_VERIFY"),
    "drain time that is none": (["-sidecar-for", "x", "-drain-time", "soon"], {}, "soon"),
    "-listen without -service-addr": (["-service", "x", "-listen", "127.0.0.1:1"], {}, "service-addr"),
    "-register without -listen": (["-service", "x", "-register"], {}, "-register"),
    "upstream without a port": (["-service", "x", "-upstream", "db"], {}, "db"),
    "upstream of an unknown type": (["-service", "x", "-upstream", "db.mystery:1"], {}, "mystery"),
    "upstream port out of range": (["-service", "x", "-upstream", "db:99999"], {}, "99999"),
    "-listen that is no address": (["-service", "x", "-service-addr", "127.0.0.1:1", "-listen", "here"], {}, "here"),
}


def one_sentence(status, out, err, pattern):
    lines = [line for line in err.splitlines() if line.strip()]
    assert status == 1, (status, out, err)
    assert len(lines) == 1, f"not one line: {err!r}"
    assert re.search(pattern, lines[0]), f"{lines[0]!r} does not name {pattern}"
    assert "panicked" not in out + err and "backtrace" not in err.lower()


@pytest.mark.parametrize("case", CASES)
def test_it_says_so(binaries, case):
    words, env, pattern = CASES[case]
    one_sentence(*run([binaries["lictor"], "connect", "proxy", *words], env), pattern)


@pytest.mark.parametrize("words", [[], ["connect"], ["connect", "envoy"], ["serve"]])
def test_another_command_is_refused(binaries, words):
    status, out, err = run([binaries["lictor"], *words])
    assert status == 1 and "lictor connect proxy" in out + err


def test_no_sidecar_is_registered(mesh):
    name = mesh.name("nobody")
    one_sentence(*run([mesh.binaries["lictor"], "connect", "proxy", "-sidecar-for", name], mesh.agent.env), f"No sidecar.*{name}|no sidecar.*{name}")


def test_a_service_without_a_sidecar(mesh):
    name = mesh.name("bare")
    mesh.agent.put("/v1/agent/service/register", {"Name": name, "Port": 1})
    one_sentence(*run([mesh.binaries["lictor"], "connect", "proxy", "-sidecar-for", name], mesh.agent.env), f"(?i)no sidecar.*{name}")


def test_several_sidecars_are_registered(mesh):
    server = mesh.service("server", sidecar=None)
    second = f"{server.id}-second"
    mesh.agent.put("/v1/agent/service/register", {
        "Kind": "connect-proxy", "ID": second, "Name": second, "Port": mesh.ports.take(),
        "Proxy": {"DestinationServiceName": server.name, "DestinationServiceID": server.id}})
    result = run([mesh.binaries["lictor"], "connect", "proxy", "-sidecar-for", server.id], mesh.agent.env)
    one_sentence(*result, "(?i)more than one sidecar")
    assert all(word in result[2] for word in (server.proxy_id, second, "-proxy-id"))
