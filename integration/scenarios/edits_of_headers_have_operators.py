"""`%…%` in the values of headers that routes and splits edit mean what they mean in Envoy."""

import pytest

from mesh import Web, ask, eventually, who

# A value, and what becomes of it in a request and in a response; None: the header is left out. As Envoy 1.40 does.
VALUES = {
    "plain": ("plain", "plain", "plain"),
    "percent": ("100%%", "100%", "100%"),
    "protocol": ("%PROTOCOL%", "HTTP/1.1", "HTTP/1.1"),
    "method": ("%REQ(:METHOD)% %REQ(:AUTHORITY)%", "GET shop.example", "GET shop.example"),
    # Paths are rewritten after the request's headers are edited.
    "path": ("%REQ(:PATH)%", "/old/x?a=b", "/new/x?a=b"),
    "original": ("%REQ(X-ENVOY-ORIGINAL-PATH?:PATH)%", "/old/x?a=b", "/old/x?a=b"),
    "header": ("%REQ(x-in)%", "in", "in"),
    "other": ("%REQ(X-None?X-In):1%", "i", "i"),
    "beside": ("a%REQ(x-none)%b", "ab", "ab"),
    "missing": ("%REQ(x-none)%", None, None),
    "response": ("%RESP(x-app)%", None, "of the app"),
    "code": ("%RESPONSE_CODE%", "0", "200"),
    "flags": ("%RESPONSE_FLAGS%", "-", "-"),
    "details": ("%RESPONSE_CODE_DETAILS%", None, "via_upstream"),
    "address": ("%DOWNSTREAM_REMOTE_ADDRESS_WITHOUT_PORT%", "127.0.0.1", "127.0.0.1"),
    "never": ("%HOSTNAME%x", "x", "x"),
    "seen": ("%REQ(x-set)%", "found", "made"),
}


class Named(Web):
    def show(self, request, body, status=200, headers=()):
        super().show(request, body, status, [("x-app", "of the app"), ("x-set", "of the app")])


@pytest.fixture
def pair(mesh):
    mesh.agent.needs((1, 10), "header edits of routes")
    server = mesh.web("server", app=lambda port: Named(port, name="server"))
    client = mesh.web("client", [server])
    eventually(lambda: who(client.upstreams[0].port) == "server")
    return server, client, client.upstreams[0].port


def route(server, edits, **more):
    return {"Match": {"HTTP": {"PathPrefix": "/old/"}},
            "Destination": {"Service": server.name, "PrefixRewrite": "/new/", "RequestHeaders": edits, "ResponseHeaders": edits, **more}}


@pytest.mark.parametrize("kind", ["Set", "Add"])
def test_operators_stand_for_what_is_known_then(mesh, pair, kind):
    server, client, port = pair
    values = {f"x-{name}": value for name, (value, _, _) in VALUES.items()}
    edits = {kind: values, "Remove": ["x-gone"]}
    if kind == "Set":
        edits["Set"] |= {"x-set": "made", "x-of-gone": "%REQ(x-gone)%", "x-kept": "%REQ(x-none)%"}
    mesh.agent.write("service-router", server.name, Routes=[route(server, edits)])
    eventually(lambda: ask(port, "/old/x").seen()["path"] == "/new/x")
    given = {"host": "shop.example", "x-in": "in", "x-set": "found", "x-gone": "gone", "x-kept": "kept"}
    answer = ask(port, "/old/x?a=b", headers=given)
    seen = dict(answer.seen()["headers"])
    for name, (value, request, response) in VALUES.items():
        response = "found" if name == "seen" and kind == "Add" else response
        assert (seen.get(f"x-{name}"), answer.header(f"x-{name}")) == (request, response), f"{name}: {value}"
    if kind == "Set":
        # What is removed is not seen, no value sees another, and what comes to nothing leaves what was there.
        assert (seen["x-set"], seen.get("x-of-gone"), seen["x-kept"]) == ("made", None, "kept")
    assert client.process.look("HOSTNAME")


@pytest.mark.parametrize("value", ["50% off", "%NO_SUCH_OPERATOR%", "%protocol%", "%REQ(x", "%REQ%"])
def test_what_envoy_refuses_changes_nothing(mesh, pair, value):
    server, client, port = pair
    edits = lambda made: {"Set": {"x-made": made}}
    mesh.agent.write("service-router", server.name, Routes=[route(server, edits("%PROTOCOL%"))])
    eventually(lambda: ask(port, "/old/x").header("x-made") == "HTTP/1.1")
    mesh.agent.write("service-router", server.name, Routes=[route(server, edits(value))])
    client.process.logged("x-made.* can't be sent")
    assert ask(port, "/old/x").header("x-made") == "HTTP/1.1"


def test_edits_of_a_split_come_before_those_of_its_route(mesh, pair):
    server, _, port = pair
    by = lambda who: {"Add": {"x-by": who}, "Set": {"x-last": f"{who}%REQ(x-last)%"}}
    mesh.agent.write("service-splitter", server.name, Splits=[{"Weight": 100, "RequestHeaders": by("split"), "ResponseHeaders": by("split")}])
    mesh.agent.write("service-router", server.name, Routes=[route(server, by("route"))])
    answer = eventually(lambda: (got := ask(port, "/old/x")).header("x-last") and got)
    seen = answer.seen()["headers"]
    assert [value for name, value in seen if name == "x-by"] == ["split", "route"]
    # The response's values are made of the request as it was sent.
    assert dict(seen)["x-last"] == "routesplit"
    assert answer.header("x-last").startswith("route")
