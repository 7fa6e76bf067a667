"""No token and no password is in any log, at whatever level and in whatever format."""

import json

import pytest

from mesh import Upstream, Web, ask, eventually
from mesh.double import Keys
from mesh.rules import jwt, provider
from mesh.tokens import Issuer

EVERYWHERE = "%REQ(:PATH)%|%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%|%REQ(REFERER)%|%REQ(AUTHORIZATION)%|%REQ(X-JWT)%|%REQ(COOKIE)%|%RESP(LOCATION)%"
FORMATS = {"text": {"TextFormat": EVERYWHERE}, "json": {"JSONFormat": json.dumps({"all": EVERYWHERE, "path": "%REQ(:PATH)%"})}, "default": {}}


@pytest.fixture
def mesh(own_mesh):
    made = own_mesh()
    made.agent.needs((1, 16), "jwt-provider")
    return made


def with_tokens(mesh, **logs):
    """A client and a server whose intention asks for tokens, which may be in places of every kind."""
    mesh.agent.write("proxy-defaults", "global", AccessLogs={"Enabled": True, **logs})
    issuer, keys_port = Issuer(), mesh.ports.take()
    mesh.keep(Keys(keys_port, issuer))
    places = [{"Header": {"Name": "x-jwt", "ValuePrefix": "Token ", "Forward": True}}, {"QueryParam": {"Name": "ticket"}}, {"Cookie": {"Name": "session"}}]
    uri = f"http://keeper:pass-word@127.0.0.1:{keys_port}/keys?key=key-of-keys"
    named = {key: value for key, value in provider(Locations=places).items() if key not in ("Kind", "Name", "JSONWebKeySet")}
    mesh.agent.write("jwt-provider", "okta", **named, JSONWebKeySet={"Remote": {"URI": uri, "RequestTimeoutMs": 2000, "FetchAsynchronously": True}})
    config = {"Config": {"protocol": "http"}}
    server = mesh.service("server", app=Web, proxy=config, sidecar=None)
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), config)], sidecar=None)
    mesh.agent.write("service-intentions", server.name, Sources=[{"Name": client.name, "Action": "allow"}], JWT=jwt())
    for service in (server, client):
        service.start("lictor", "-log-level", "trace")
    return server, client, issuer


@pytest.mark.parametrize("kind", FORMATS)
def test_tokens_and_passwords_are_in_no_log(mesh, kind):
    server, client, issuer = with_tokens(mesh, **FORMATS[kind])
    port = client.upstreams[0].port
    good, bad, bearer = issuer.token("valid"), issuer.token("strangers-key"), issuer.token("admin")
    eventually(lambda: ask(port, "/", headers={"x-jwt": f"Token {good}"}).status == 200)
    server.app.answer = lambda request: server.app.say(request, b"", 302, [("location", f"/next?ticket={good}&access_token={good}")])
    for token in (good, bad):
        for path in (f"/a?ticket={token}", f"/a?ticket={token}&b=c", f"/a?t%69cket={token}", f"/a?to=%2Fb%3Fticket%3D{token}"):
            ask(port, path, headers={"referer": f"http://x.example{path}", "cookie": f"a=b; session={token}"})
        ask(port, "/b", headers={"x-jwt": f"Token {token}"})
    # The client's sidecar does not know where the server's providers look, but where everybody does.
    for path in (f"/a?b=c&access_token={bearer}", f"/a?ACCESS%5ftoken={bearer}", f"/a?to=%2Fb%3Faccess_token%3D{bearer}"):
        ask(port, path, headers={"referer": f"http://x.example{path}", "authorization": f"Bearer {bearer}"})
    ask(port, "/last?ticket=end")
    eventually(lambda: "/last?ticket=REDACTED" in server.process.text() and "/last" in client.process.text())
    for process, secrets in ((server.process, (good, bad, bearer, "pass-word", "key-of-keys")), (client.process, (bearer,))):
        text = process.text()
        for secret in secrets:
            assert secret not in text, [line for line in text.splitlines() if secret in line][:3]
        assert "b=c&access_token=REDACTED" in text, "what is no secret is shown"


def test_the_server_of_keys_is_told_of_without_its_password(mesh):
    server, client, issuer = with_tokens(mesh)
    uri = f"http://keeper:pass-word@127.0.0.1:{mesh.ports.take()}/gone?key=key-of-keys#more"
    entry = mesh.agent.get("/v1/config/jwt-provider/okta")
    mesh.agent.put("/v1/config", {**entry, "JSONWebKeySet": {"Remote": {"URI": uri, "RequestTimeoutMs": 200, "FetchAsynchronously": True}}})
    server.process.logged("the key set of http://127.0.0.1:[0-9]+/gone can't be read")
    assert not any(secret in server.process.text() for secret in ("pass-word", "key-of-keys", "keeper"))
