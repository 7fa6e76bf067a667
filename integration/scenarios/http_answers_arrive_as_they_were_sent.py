"""Responses of an app that says the very bytes, asked for by clients that others wrote: directly, and through both sidecars.

What is whole arrives whole and the same, what is broken never looks whole, and what two readers may take for two things is refused.
"""

import collections
import contextlib
import re

import pytest

from mesh import Mesh, Upstream
from mesh.answers import by_hand, generated, over_http2
from mesh.clients import CLIENTS, CURL_HTTP2
from mesh.raw import Raw
from mesh.servers import Absent

SEED = 9110
FOR_ONE_HOP = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "trailer", "x-hop"}


@pytest.fixture(scope="module")
def legs(shared_agent, binaries, ports, tmp_path_factory):
    """(answers by path, the app's port, the port that leads to it through two sidecars, a directory)"""
    answers = {f"/answer/{number}": answer for number, answer in enumerate([*by_hand(), *generated(150, SEED)])}
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("answers"), stack, "ans")
        server = mesh.service("server", app=lambda port: Raw(port, {path: answer.script for path, answer in answers.items()}), protocol="http")
        client = mesh.service("client", [Upstream(server.name, ports.take())])
        yield answers, server.port, client.port_to(server), mesh.directory


@pytest.fixture(scope="module")
def direct(legs):
    """The result of each client for each answer without sidecars, by path. Some are lax where others are strict."""
    answers, port, _, directory = legs
    found = {}
    # The app answers in HTTP/1.1, whoever asks.
    for name in set(CLIENTS) - {"HTTP/1.0"}:
        with contextlib.suppress(Absent):
            found[name] = {result["path"]: result for result in CLIENTS[name](port, list(answers), directory)}
    return {path: [result[path] for result in found.values() if path in result and (result[path]["status"] or 200) >= 200] for path in answers}


def headers(result):
    """End-to-end headers and their values, without the length, which may be left out where it adds nothing."""
    return sorted((name, re.sub(r"[ \t]+", " ", value.strip(" \t"))) for name, value in result["headers"] if name not in FOR_ONE_HOP | {"content-length"})


def length(result):
    return [value for name, value in result["headers"] if name == "content-length"]


def refused(result):
    return result["status"] in (502, 503) and result["body"].startswith("upstream connect error")


def is_wrong(answer, direct, through):
    """What is wrong with what came through the sidecars, by what came directly to any client; "" if nothing is."""
    if not through["complete"]:
        return "" if answer.ambiguous or not all(result["complete"] for result in direct) else "whole, and arrives broken"
    if refused(through):
        return "" if answer.ambiguous or answer.cut or not all(result["complete"] for result in direct) else "whole, and refused"
    if length(through) and through["body"] and length(through) != [str(len(through["body"]))]:
        return "the length is of another body"
    same = [result for result in direct if result["complete"] and (result["status"], result["body"]) == (through["status"], through["body"])]
    if not same:
        return "taken for another, or broken and looks whole"
    return "" if any(headers(result) == headers(through) for result in same) else "other headers"


@pytest.mark.parametrize("client", [*CLIENTS, "curl over HTTP/2"])
def test_what_arrives_is_what_was_sent(legs, direct, client):
    answers, _, port, directory = legs
    try:
        through = {result["path"]: result for result in {**CLIENTS, "curl over HTTP/2": CURL_HTTP2}[client](port, list(answers), directory)}
    except Absent as absent:
        pytest.skip(f"responses are NOT TESTED with {client}: {absent}")
    tally, wrong = collections.Counter(), []
    for path, answer in answers.items():
        result = through[path]
        tally["refused" if refused(result) else "whole" if result["complete"] else "broken"] += 1
        if what := is_wrong(answer, direct[path], result):
            wrong.append((what, b"".join(answer.script.pieces)[:200], answer.script.then, str(direct[path])[:300], str(result)[:300]))
    print(client, dict(tally))
    assert not wrong, "\n".join(map(str, [f"{len(wrong)} of {len(answers)}", *wrong[:30]]))
    assert tally["whole"] > 100 and tally["broken"] + tally["refused"] > 30, tally


@pytest.fixture(scope="module")
def http2_leg(shared_agent, binaries, ports, tmp_path_factory):
    """(scripts with what arrives of each, by path, the port that leads to their app through two sidecars, a directory)"""
    answers = {f"/answer/{number}": answer for number, answer in enumerate(over_http2())}
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("answers-http2"), stack, "an2")
        server = mesh.service("server", app=lambda port: Raw(port, {path: script for path, (script, _) in answers.items()}), protocol="http2")
        client = mesh.service("client", [Upstream(server.name, ports.take())])
        yield answers, client.port_to(server), mesh.directory


@pytest.mark.parametrize("client", [*CLIENTS, "curl over HTTP/2"])
def test_what_an_app_sends_over_http2(http2_leg, client):
    answers, port, directory = http2_leg
    try:
        through = {result["path"]: result for result in {**CLIENTS, "curl over HTTP/2": CURL_HTTP2}[client](port, list(answers), directory)}
    except Absent as absent:
        pytest.skip(f"responses are NOT TESTED with {client}: {absent}")
    wrong = []
    for path, (script, arrives) in answers.items():
        result = through[path]
        came = (result["status"], result["body"]) if result["complete"] and not refused(result) else None
        if came != arrives:
            wrong.append((script, arrives and str(arrives)[:60], str(result)[:300]))
    assert not wrong, "\n".join(map(str, [f"{len(wrong)} of {len(answers)}", *wrong[:30]]))
