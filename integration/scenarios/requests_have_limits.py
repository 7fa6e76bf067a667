"""Early ends of a request: limits, timeouts, and no instance; and the words of the answers."""

import time

import pytest

from mesh import Browser, Upstream, ask, dial, eventually, who

NO_CONNECTION = "503 upstream connect error or disconnect/reset before headers. reset reason: "


def pair(mesh, proxy=None, **config):
    server = mesh.web("server", proxy={"Config": proxy} if proxy else None)
    client = mesh.web("client", [Upstream(server.name, mesh.ports.take(), {"Config": config} if config else {})])
    return server, client, client.upstreams[0].port


@pytest.mark.parametrize("limit", ["max_concurrent_requests", "max_connections", "max_pending_requests"])
def test_over_a_limit_the_answer_is_503_and_says_so(mesh, workers, limit):
    server, client, port = pair(mesh, limits={limit: 2 if limit == "max_concurrent_requests" else 0})
    if limit == "max_concurrent_requests":
        eventually(lambda: who(port) == "server")
        server.app.delay = 3
        held = [workers.submit(who, port) for _ in range(2)]
        eventually(lambda: server.app.waiting == 2)
        server.app.delay = 0
    answer = eventually(lambda: (got := ask(port)).status == 503 and got.header("x-envoy-overloaded") and got)
    assert answer.body.decode() == NO_CONNECTION.removeprefix("503 ") + "overflow" and answer.header("x-envoy-overloaded") == "true"
    client.process.logged(limit)
    if limit == "max_concurrent_requests":
        assert [each.result(10) for each in held] == ["server"] * 2
        eventually(lambda: who(port) == "server")


def test_requests_wait_for_one_of_few_connections(mesh, workers):
    server, _, port = pair(mesh, limits={"max_connections": 1})
    eventually(lambda: who(port) == "server")
    server.app.delay = 0.2
    held = [workers.submit(who, port) for _ in range(20)]
    assert [each.result(30) for each in held] == ["server"] * 20


def test_without_limits_there_is_none(mesh, workers):
    server, _, port = pair(mesh)
    eventually(lambda: who(port) == "server")
    server.app.delay = 1
    held = [workers.submit(who, port) for _ in range(60)]
    assert [each.result(30) for each in held] == ["server"] * 60


def test_the_local_request_timeout(mesh):
    server, _, port = pair(mesh, {"local_request_timeout_ms": 500})
    eventually(lambda: who(port) == "server")
    server.app.delay = 60
    began = time.monotonic()
    assert who(port) == "504 upstream request timeout" and time.monotonic() - began < 10


def test_the_local_idle_timeout(mesh):
    mesh.agent.needs((1, 15), "local_idle_timeout_ms")
    server, _, port = pair(mesh, {"local_idle_timeout_ms": 500})
    eventually(lambda: who(port) == "server")
    server.app.delay = 60
    began = time.monotonic()
    assert who(port) == "504 stream timeout" and time.monotonic() - began < 10
    # It was the client's turn.
    with dial(port) as conn:
        conn.send(b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nhalf")
        assert b" 408 " in conn.line()


def test_a_change_of_the_local_request_timeout_reaches_the_next_request(mesh):
    server, _, port = pair(mesh)
    eventually(lambda: who(port) == "server")
    server.app.delay = 1.5
    with Browser(port) as browser:
        assert browser.ask().status == 200
        server.proxy = {"Config": {"local_request_timeout_ms": 200}}
        server.register()
        eventually(lambda: browser.ask().status == 504)


def test_the_app_is_down_and_back(mesh):
    server, _, port = pair(mesh)
    eventually(lambda: who(port) == "server")
    server.app.close()
    began = time.monotonic()
    answer = eventually(lambda: (got := ask(port)).status == 503 and got)
    assert answer.body.decode() == NO_CONNECTION.removeprefix("503 ") + "remote connection failure" and time.monotonic() - began < 5
    server.process.logged(r"(?i)refused")
    server.app = mesh.keep(type(server.app)(server.port, name="back"))
    eventually(lambda: who(port) == "back", 45, "the app's return is seen")


def test_no_instance_and_none_that_passes(mesh):
    missing = mesh.name("missing")
    mesh.agent.write("service-defaults", missing, Protocol="http")
    server = mesh.web("server")
    client = mesh.web("client", [missing, server])
    ports = [upstream.port for upstream in client.upstreams]
    eventually(lambda: who(ports[1]) == "server")
    assert who(ports[0]) == "503 no healthy upstream"
    client.process.logged(missing)
    with Browser(ports[1]) as browser:
        assert browser.ask().status == 200
        server.passing("fail")
        eventually(lambda: browser.ask().status == 503)
        answer = browser.ask()
        assert (answer.status, answer.body, answer.header("content-type")) == (503, b"no healthy upstream", "text/plain")
        server.passing("pass")
        eventually(lambda: browser.ask().status == 200)


def test_an_app_that_breaks_off_is_told_as_such(mesh):
    server, _, port = pair(mesh)
    eventually(lambda: who(port) == "server")
    server.app.answer = lambda request: request.connection.close() or setattr(request, "close_connection", True)
    assert ask(port, "/", "POST", b"x").status == 503


def test_a_try_that_takes_too_long_is_given_up_for_another(mesh):
    server, _, port = pair(mesh, lictor_per_try_timeout_ms=700, lictor_expose_cause=True)
    retried = {"Match": {"HTTP": {"PathPrefix": "/retried"}}, "Destination": {"NumRetries": 2, "RetryOnStatusCodes": [504], "PrefixRewrite": "/again"}}
    mesh.agent.write("service-router", server.name, Routes=[retried])
    eventually(lambda: ask(port, "/retried").seen()["path"] == "/again")
    delays, show = [], server.app.show

    def slowly(request, *what):
        time.sleep(delays.pop(0) if delays else 0)
        show(request, *what)
    server.app.show = slowly
    for path, given, status, left in (("/retried", [8], 200, 0), ("/retried", [8, 8], 200, 0), ("/retried", [8] * 4, 504, 1), ("/plain", [8, 8], 504, 1)):
        delays[:] = given
        began = time.monotonic()
        answer = ask(port, path, "POST", b"kept for later")
        assert (answer.status, len(delays)) == (status, left) and time.monotonic() - began < 7, (path, given)
        assert status == 200 or "lictor_per_try_timeout_ms" in answer.header("x-lictor-cause")


@pytest.mark.parametrize("exposes", [True, False])
def test_the_cause_is_told_in_a_header_where_that_is_asked(mesh, exposes):
    config = {"lictor_expose_cause": True} if exposes else {}
    server, client, port = pair(mesh, config, **config)
    eventually(lambda: who(port) == "server")
    server.app.close()
    answer = eventually(lambda: (got := ask(port)).status == 503 and got)
    cause = answer.header("x-lictor-cause")
    assert "refused" in cause and "local app" in cause if exposes else cause is None, cause
    server.passing("fail")
    answer = eventually(lambda: (got := ask(port)).body == b"no healthy upstream" and got)
    cause = answer.header("x-lictor-cause")
    assert server.name in cause and "passing" in cause if exposes else cause is None, cause


@pytest.mark.parametrize("exposes", [True, False])
def test_the_cause_that_another_sidecar_tells_is_passed_on_only_where_that_is_asked(mesh, exposes):
    """And what an app says under that name is nobody's cause."""
    server, _, port = pair(mesh, {"lictor_expose_cause": True}, **({"lictor_expose_cause": True} if exposes else {}))
    server.app.answer = lambda request: server.app.say(request, b"", 200, [("x-lictor-cause", "the app's")])
    answer = eventually(lambda: (got := ask(port)).status == 200 and got)
    assert answer.header("x-lictor-cause") == ("the app's" if exposes else None)
    server.app.close()
    answer = eventually(lambda: (got := ask(port)).status == 503 and got)
    cause = answer.header("x-lictor-cause")
    assert "local app" in cause if exposes else cause is None, cause
