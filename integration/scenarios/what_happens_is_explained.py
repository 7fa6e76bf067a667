"""Questions that people put to their mesh, and where the sidecar answers them: /status, /explain, the dashboard."""

import hashlib
import base64
import json
import re
import socket

from mesh import ask, eventually
from mesh.service import admin_port


def status(service):
    return json.loads(service.admin("/status").body)


def test_why_was_this_denied(mesh):
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    port = web.port_to(db)
    eventually(lambda: ask(port).status == 200)
    mesh.deny(web, db)
    eventually(lambda: ask(port, "/").status == 403)
    assert ask(port, "/secret?token=x").status == 403
    problem = eventually(lambda: next((each for each in status(db)["problems"] if each["what"] == "GET /secret"), None))
    assert (problem["reason"], problem["direction"], problem["who"]) == ("Denied", "inbound", web.name)
    assert f"{web.name} => {db.name} (deny" in problem["cause"] and problem["remedy"]
    [inbound] = status(db)["inbound"]
    [rule] = [each for each in inbound["intentions"] if each["source"] == web.name]
    assert (rule["destination"], rule["action"], rule["precedence"], rule["allowed"]) == (db.name, "deny", 9, 0) and rule["denied"] >= 1
    [caller] = [each for each in inbound["callers"] if each["service"] == web.name]
    assert caller["denied"] >= 1 and caller["allowed"] >= 1
    # Nothing of a query is kept, as tokens may be in it.
    assert b"token=x" not in db.admin("/status").body


def test_why_503(mesh):
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    port = web.port_to(db)
    eventually(lambda: ask(port).status == 200)
    [outbound] = status(web)["outbound"]
    assert [each["state"] for each in outbound["targets"][0]["endpoints"]] == ["healthy"] and outbound["p50_ms"] is not None
    db.passing("fail")
    eventually(lambda: ask(port).status == 503)
    problem = eventually(lambda: next((each for each in status(web)["problems"] if each["reason"] == "NoInstance"), None))
    assert problem["flag"] == "UH" and "none of 1 registered instances is passing its checks" in problem["cause"]
    assert "no usable instance of 1 registered" in web.admin(f"/explain?upstream={db.name}").body.decode()


def test_where_a_request_goes(mesh):
    old, new = mesh.web("old"), mesh.web("new")
    for service in (old, new):
        mesh.agent.write("service-defaults", service.name, Protocol="http")
    mesh.agent.write("service-router", old.name, Routes=[{
        "Match": {"HTTP": {"PathPrefix": "/new", "Header": [{"Name": "x-beta", "Exact": "1"}]}}, "Destination": {"Service": new.name, "RequestTimeout": "3s"}}])
    web = mesh.service("web", [old], app=None)
    eventually(lambda: ask(web.port_to(old), "/new", headers={"x-beta": "1"}).status == 200)

    def explained(query):
        answer = web.admin(f"/explain?upstream={old.name}&{query}")
        assert answer.status == 200, answer.body
        return answer.body.decode()
    beta = explained("path=/new/x&header=x-beta:%201")
    assert "router: route 1 of" in beta and f'service "{new.name}"' in beta and f"request timeout 3s (service-router/{old.name}, route 1)" in beta
    assert f"127.0.0.1:{new.public} healthy" in beta
    assert f'service "{old.name}"' in explained("path=/new/x") and f'service "{old.name}"' in explained("path=/")
    assert web.admin("/explain?upstream=nobody").status == 404
    assert web.admin(f"/explain?upstream={old.name}&header=nonsense").status == 400


def test_the_dashboard_needs_nothing_from_elsewhere(mesh):
    web = mesh.service("web")
    answer = web.admin("/")
    page, policy = answer.body.decode(), answer.header("content-security-policy")
    assert answer.header("content-type").startswith("text/html") and "default-src 'none'" in policy and "unsafe" not in policy
    for tag in ("style", "script"):
        [inside] = re.findall(rf"<{tag}>(.*?)</{tag}>", page, re.S)
        assert f"{tag}-src 'sha256-{base64.b64encode(hashlib.sha256(inside.encode()).digest()).decode()}'" in policy
    # No other host, no handler in the markup.
    assert not re.search(r"https?://|\son\w+=|src=", page)


def test_the_state_is_told_each_second(mesh):
    web = mesh.service("web")
    with mesh.dial(admin_port(web.process), within=10) as conn:
        conn.send(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in conn.line()
        states = []
        while len(states) < 2:
            line = conn.line()
            if line.startswith(b"data: "):
                states.append(json.loads(line[6:]))
    assert states[0]["sidecar"]["service"] == web.name and states[1]["time"] > states[0]["time"]


def test_those_who_look_on_leave_room_for_probes(mesh):
    web = mesh.service("web")
    port = admin_port(web.process)
    looking = [mesh.keep(socket.create_connection(("127.0.0.1", port))) for _ in range(16)]
    for each in looking:
        each.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert b"200" in each.recv(100)
    assert ask(port, "/events").status == 503 and ask(port, "/ready").status == 200
    for each in looking:
        each.close()
    eventually(lambda: b"200" in first_bytes(port))


def first_bytes(port):
    with socket.create_connection(("127.0.0.1", port)) as one:
        one.sendall(b"GET /events HTTP/1.1\r\nHost: localhost\r\n\r\n")
        return one.recv(100)
