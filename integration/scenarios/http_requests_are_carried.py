"""Requests of HTTP services: what gets through, and how it looks on the other side."""

import pytest

from mesh import Browser, Upstream, Web, ask, eventually


def http_pair(mesh, protocol="http", app=Web):
    server = mesh.service("server", app=app, proxy={"Config": {"protocol": protocol}})
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), {"Config": {"protocol": protocol}})])
    return server, client


@pytest.fixture
def pair(mesh):
    return http_pair(mesh)


def test_a_request_and_its_answer(pair):
    server, client = pair
    answer = ask(client.upstreams[0].port, "/some/path?q=1", "POST", b"the body", {"host": "shop.example", "x-own": "1"})
    seen = answer.seen()
    headers = dict(seen["headers"])
    assert (seen["method"], seen["path"], seen["body"]) == ("POST", "/some/path?q=1", "the body")
    assert headers["host"] == "shop.example" and headers["x-own"] == "1"
    assert headers["x-forwarded-proto"] == "http" and len(headers["x-request-id"]) == 36
    assert answer.header("server") is None and answer.header("date") is None


def test_many_requests_share_a_connection(pair):
    server, client = pair
    with Browser(client.upstreams[0].port) as browser:
        for number in range(50):
            assert browser.ask(f"/{number}").seen()["path"] == f"/{number}"


def test_a_head_request_has_no_body(pair):
    _, client = pair
    with Browser(client.upstreams[0].port) as browser:
        answer = browser.ask("/", "HEAD")
        assert answer.status == 200 and answer.body == b"" and int(answer.header("content-length")) > 0
        assert browser.ask("/next").seen()["path"] == "/next"


def test_a_denied_source_is_told_so_and_an_allowed_one_served_on_the_same_connection(mesh, pair):
    server, client = pair
    with Browser(client.upstreams[0].port) as browser:
        assert browser.ask().status == 200
        undo = mesh.deny(client, server)

        eventually(lambda: browser.ask().status == 403)
        answer = browser.ask()
        assert (answer.status, answer.body) == (403, b"RBAC: access denied")
        undo()
        eventually(lambda: browser.ask().status == 200)
