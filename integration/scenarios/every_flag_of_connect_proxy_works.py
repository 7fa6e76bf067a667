"""Each flag and variable of `consul connect proxy`, on a running agent."""

import json

import pytest

from mesh import Agent, Authority, Echo, Gate, eventually, stays
from mesh.ports import is_listening
from mesh.process import run


def up(process, *ports):
    for port in ports:
        eventually(lambda: is_listening(port) or not process.running(), what=f"port {port} is listened on")
    assert process.running(), process.text()


# Which proxy

SPELLINGS = {
    "-sidecar-for x": lambda s: (["-sidecar-for", s.id], {}),
    "--sidecar-for x": lambda s: (["--sidecar-for", s.id], {}),
    "-sidecar-for=x": lambda s: ([f"-sidecar-for={s.id}"], {}),
    "--sidecar-for=x": lambda s: ([f"--sidecar-for={s.id}"], {}),
    "-sidecar-for X": lambda s: (["-sidecar-for", s.id.upper()], {}),
    "-proxy-id": lambda s: (["-proxy-id", s.proxy_id], {}),
    "CONNECT_SIDECAR_FOR": lambda s: ([], {"CONNECT_SIDECAR_FOR": s.id}),
    "CONNECT_PROXY_ID": lambda s: ([], {"CONNECT_PROXY_ID": s.proxy_id}),
    "flag before variable": lambda s: (["-sidecar-for", s.id], {"CONNECT_SIDECAR_FOR": "someone-else"}),
    "CONNECT_PROXY_ID before -sidecar-for": lambda s: (["-sidecar-for", "someone-else"], {"CONNECT_PROXY_ID": s.proxy_id}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_the_proxy_is_named_by(mesh, spelling):
    server = mesh.service("server", sidecar=None)
    words, env = SPELLINGS[spelling](server)
    up(mesh.proxy(*words, env=env), server.public)


def test_lictor_proxy_is_the_same_command(mesh):
    server = mesh.service("server", sidecar=None)
    up(mesh.run([mesh.binaries["lictor"], "proxy", "-sidecar-for", server.id], "short", mesh.agent.env), server.public)


def test_a_proxy_registered_by_itself_is_found(mesh):
    """Not as a service's SidecarService, but as a service of the kind connect-proxy."""
    app, public, name = mesh.ports.take(), mesh.ports.take(), mesh.name("server")
    mesh.keep(Echo(app))
    mesh.agent.put("/v1/agent/service/register", {"ID": name, "Name": name, "Port": app})
    mesh.agent.put("/v1/agent/service/register", {
        "Kind": "connect-proxy", "ID": f"{name}-by-hand", "Name": f"{name}-by-hand", "Port": public,
        "Proxy": {"DestinationServiceName": name, "DestinationServiceID": name, "LocalServiceAddress": "127.0.0.1", "LocalServicePort": app}})
    up(mesh.proxy("-sidecar-for", name), public)
    mesh.service("client", [name]).eventually_reaches()


# Everything from flags

def test_a_proxy_of_flags_alone(mesh):
    app, public = mesh.ports.take(), mesh.ports.take()
    mesh.keep(Echo(app))
    server, client = mesh.name("server"), mesh.name("client")
    proxy_id = f"{server}-proxy"
    mesh.proxy("-service", server, "-service-addr", f"127.0.0.1:{app}", "-listen", f"127.0.0.1:{public}")
    mesh.agent.put("/v1/agent/service/register", {
        "Kind": "connect-proxy", "ID": proxy_id, "Name": proxy_id, "Port": public, "Address": "127.0.0.1",
        "Proxy": {"DestinationServiceName": server}})
    other = mesh.service("other", app=lambda port: Echo(port, b"other\n"))
    query = mesh.name("query")
    made = mesh.agent.call("POST", "/v1/query", {"Name": query, "Service": {"Service": other.name}})
    mesh.stack.callback(mesh.agent.delete, f"/v1/query/{made['ID']}")
    plain, typed, addressed, six, queried = (mesh.ports.take() for _ in range(5))
    process = mesh.proxy(
        "-service", client, "-upstream", f"{server}:{plain}", "-upstream", f"{other.name}.service:{typed}",
        f"--upstream={mesh.service('third').name}:127.0.0.2:{addressed}", f"-upstream={mesh.service('fourth').name}:[::1]:{six}",
        "-upstream", f"{query}.query:{queried}")
    up(process, plain, typed, addressed, six, queried)
    eventually(lambda: mesh.dial(plain).ask(b"hello") == b"hello")
    eventually(lambda: mesh.dial(typed).line() == b"other\n")
    eventually(lambda: mesh.dial(addressed, host="127.0.0.2").ask(b"hello") == b"hello")
    eventually(lambda: mesh.dial(six, host="::1").ask(b"hello") == b"hello")
    eventually(lambda: mesh.dial(queried).line() == b"other\n")
    mesh.deny(client, server)
    eventually(lambda: mesh.dial(plain).end(2) == "fin", what="the proxy of flags has its service's identity")


# The agent's address

@pytest.fixture(scope="module")
def tls_agent(binaries, ports, tmp_path_factory):
    """An agent that also listens with TLS (client certificate required) and on a unix socket."""
    directory = tmp_path_factory.mktemp("tls-agent")
    authority = Authority("agents.example", name="Agents' CA")
    server = authority.issue(dns=["consul.example"])
    client = authority.issue(dns=["client.example"])
    files = {"ca": authority.cert_pem, "server": server.cert_pem, "server-key": server.key_pem, "client": client.cert_pem, "client-key": client.key_pem}
    for name, text in files.items():
        (directory / f"{name}.pem").write_text(text)
    (directory / "ca-directory").mkdir()
    (directory / "ca-directory" / "one.pem").write_text(authority.cert_pem)
    agent = Agent(binaries["consul"], ports, directory, {
        "ca_file": f"{directory}/ca.pem", "cert_file": f"{directory}/server.pem", "key_file": f"{directory}/server-key.pem",
        "verify_incoming_https": True,
        "addresses": {"http": f"127.0.0.1 unix://{directory}/agent.sock", "https": "127.0.0.1"},
    })
    agent.https = ports.take()
    agent.configure({"ports": {"https": agent.https}})
    agent.files = directory
    try:
        yield agent.start()
    finally:
        agent.stop()


ADDRESSES = {
    "-http-addr host:port": lambda a: (["-http-addr", f"127.0.0.1:{a.port}"], {}),
    "-http-addr http://": lambda a: (["-http-addr", f"http://127.0.0.1:{a.port}"], {}),
    "-http-addr http:// with a slash": lambda a: (["-http-addr", f"http://127.0.0.1:{a.port}/"], {}),
    "-http-addr unix://": lambda a: (["-http-addr", f"unix://{a.files}/agent.sock"], {}),
    "CONSUL_HTTP_ADDR unix://": lambda a: ([], {"CONSUL_HTTP_ADDR": f"unix://{a.files}/agent.sock"}),
    "CONSUL_HTTP_ADDR host:port": lambda a: ([], {"CONSUL_HTTP_ADDR": f"127.0.0.1:{a.port}"}),
    "https:// with all flags": lambda a: ([
        "-http-addr", f"https://127.0.0.1:{a.https}", "-ca-file", f"{a.files}/ca.pem", "-tls-server-name", "consul.example",
        "-client-cert", f"{a.files}/client.pem", "-client-key", f"{a.files}/client-key.pem"], {}),
    "https:// with -ca-path": lambda a: ([
        "-http-addr", f"https://127.0.0.1:{a.https}", "-ca-path", f"{a.files}/ca-directory", "-tls-server-name", "consul.example",
        "-client-cert", f"{a.files}/client.pem", "-client-key", f"{a.files}/client-key.pem"], {}),
    "https:// with all variables": lambda a: ([], {
        "CONSUL_HTTP_ADDR": f"https://127.0.0.1:{a.https}", "CONSUL_CACERT": f"{a.files}/ca.pem", "CONSUL_TLS_SERVER_NAME": "consul.example",
        "CONSUL_CLIENT_CERT": f"{a.files}/client.pem", "CONSUL_CLIENT_KEY": f"{a.files}/client-key.pem"}),
    "CONSUL_HTTP_SSL with CONSUL_CAPATH": lambda a: ([], {
        "CONSUL_HTTP_ADDR": f"127.0.0.1:{a.https}", "CONSUL_HTTP_SSL": "true", "CONSUL_CAPATH": f"{a.files}/ca-directory",
        "CONSUL_TLS_SERVER_NAME": "consul.example", "CONSUL_CLIENT_CERT": f"{a.files}/client.pem", "CONSUL_CLIENT_KEY": f"{a.files}/client-key.pem"}),
    "http:// with CONSUL_HTTP_SSL": lambda a: ([], {
        "CONSUL_HTTP_ADDR": f"http://127.0.0.1:{a.https}", "CONSUL_HTTP_SSL": "1", "CONSUL_CACERT": f"{a.files}/ca.pem",
        "CONSUL_TLS_SERVER_NAME": "consul.example", "CONSUL_CLIENT_CERT": f"{a.files}/client.pem", "CONSUL_CLIENT_KEY": f"{a.files}/client-key.pem"}),
    "CONSUL_HTTP_SSL_VERIFY=false": lambda a: ([], {
        "CONSUL_HTTP_ADDR": f"https://127.0.0.1:{a.https}", "CONSUL_HTTP_SSL_VERIFY": "false",
        "CONSUL_CLIENT_CERT": f"{a.files}/client.pem", "CONSUL_CLIENT_KEY": f"{a.files}/client-key.pem"}),
}


@pytest.mark.parametrize("way", ADDRESSES)
def test_the_agent_is_reached_by(mesh, tls_agent, way):
    mesh = mesh.on(tls_agent)
    server = mesh.service("server", sidecar=None)
    words, env = ADDRESSES[way](tls_agent)
    up(mesh.proxy("-sidecar-for", server.id, *words, env={"CONSUL_HTTP_ADDR": "127.0.0.1:1", **env}), server.public)


def test_an_agent_whose_certificate_does_not_check_is_not_believed(mesh, tls_agent):
    mesh = mesh.on(tls_agent)
    server = mesh.service("server", sidecar=None)
    certificate = ["-client-cert", f"{tls_agent.files}/client.pem", "-client-key", f"{tls_agent.files}/client-key.pem"]
    for words in (["-ca-file", f"{tls_agent.files}/ca.pem", "-tls-server-name", "wrong.example"], ["-tls-server-name", "consul.example"]):
        process = mesh.proxy("-sidecar-for", server.id, "-http-addr", f"https://127.0.0.1:{tls_agent.https}", *certificate, *words)
        process.logged(r"(?i)certificate")
        assert not is_listening(server.public)


# What goes along with each request

REQUESTS = {
    "-datacenter": (["-datacenter", "dc1"], {}, "dc=dc1"),
    "-stale": (["-stale"], {}, "stale"),
    "CONSUL_HTTP_AUTH": ([], {"CONSUL_HTTP_AUTH": "me:secret"}, "Basic bWU6c2VjcmV0"),
    "-token": (["-token", "some-token"], {}, "some-token"),
    "-namespace": (["-namespace", "team"], {}, "ns=team"),
    "CONSUL_NAMESPACE": ([], {"CONSUL_NAMESPACE": "team"}, "ns=team"),
    "-partition": (["-partition", "part"], {}, "partition=part"),
    "CONSUL_PARTITION": ([], {"CONSUL_PARTITION": "part"}, "partition=part"),
    "a path before every request": (["-http-addr", "http://127.0.0.1:{gate}/consul/"], {}, "GET /consul/v1/"),
}


@pytest.mark.parametrize("flag", REQUESTS)
def test_requests_carry(mesh, flag):
    """As seen on the wire: the community edition refuses some of these, which is its right."""
    words, env, expected = REQUESTS[flag]
    gate = mesh.keep(Gate(mesh.ports.take(), mesh.agent.port))
    server = mesh.service("server", [mesh.name("upstream")], sidecar=None)
    words = [word.format(gate=gate.port) for word in words]
    mesh.proxy("-proxy-id", server.proxy_id, *words, env={"CONSUL_HTTP_ADDR": f"127.0.0.1:{gate.port}", **env})
    eventually(lambda: gate.carried_request(expected), what=f"{expected} is in a request")


def test_stale_and_datacenter_do_no_harm(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server], sidecar=None)
    client.start("lictor", "-stale", "-datacenter", "dc1")
    client.eventually_reaches()


# Logs

def test_the_banner_and_the_layout_are_consuls(mesh):
    server = mesh.service("server")
    out = server.process.out()
    for text in ("==> Consul Connect proxy starting...", "Configuration mode: Agent API", f"Sidecar for ID: {server.id}", "==> Log data will now stream in as it occurs:"):
        assert text in out
    server.process.logged(r"(?m)^\s*\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z? \[INFO\] +proxy: ")
    server.process.logged("Proxy loaded config and ready to serve")
    assert server.process.stop() == 0
    assert "==> Consul Connect proxy shutdown" in server.process.out()


def test_json_logs_are_an_object_a_line(mesh):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", "-log-json")
    assert server.process.stop() == 0
    lines = [json.loads(line) for line in server.process.text().splitlines()]
    assert len(lines) >= 3 and all(line["@level"] and line["@message"] and line["@timestamp"] for line in lines)


@pytest.mark.parametrize("level, shown", [("TRACE", True), ("debug", True), ("INFO", True), ("WARN", False), ("ERR", False), ("ERROR", False)])
def test_log_levels(mesh, level, shown):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", "-log-level", level)
    assert bool(server.process.look(r"\[INFO\]")) == shown


def test_each_connection_is_logged_at_debug_and_not_at_info(mesh):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", "-log-level=debug")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    before = client.process.text()
    assert client.reaches()
    server.process.logged(rf"\[DEBUG\][^\n]*svc/{client.name}")
    stays(lambda: client.process.text() == before, 0.3, "no line for a connection at info")


def test_no_key_and_no_token_is_logged_at_trace(mesh):
    token = "11111111-2222-3333-4444-555555555555"
    server = mesh.service("server", sidecar=None)
    server.start("lictor", "-log-level=trace", "-token", token)
    client = mesh.service("client", [server], sidecar=None)
    client.start("lictor", "-log-level=trace", "-log-json", "-token", token)
    client.eventually_reaches()
    mesh.deny(client, server)
    client.eventually_refused()
    for process in (server.process, client.process):
        text = process.text()
        assert token not in text and "PRIVATE KEY" not in text and "PrivateKeyPEM" not in text


# Flags that mean nothing here

def test_a_flag_without_meaning_gives_one_warning(mesh):
    server = mesh.service("server", sidecar=None)
    server.start("lictor", "-pprof-addr", "127.0.0.1:1")
    assert server.process.count(r"\[WARN\][^\n]*-?pprof-addr") == 1


@pytest.mark.parametrize("words", [["-h"], ["--help"], ["-help"]])
def test_help_names_every_flag(binaries, words):
    status, out, err = run([binaries["lictor"], "connect", "proxy", *words])
    text = out + err
    assert status == 0
    for flag in ("sidecar-for", "proxy-id", "service", "service-addr", "upstream", "listen", "register", "register-id", "log-level", "log-json",
                 "http-addr", "token", "token-file", "ca-file", "ca-path", "client-cert", "client-key", "tls-server-name", "datacenter", "stale",
                 "namespace", "partition"):
        assert f"-{flag}" in text
