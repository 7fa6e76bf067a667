"""The admin server: probes, what may be changed, who may not, and where it listens."""

import http.client
import json
import socket

from mesh import ask, eventually
from mesh.ports import is_listening
from mesh.service import admin_port


def test_it_is_ready_when_the_sidecar_serves(own_mesh):
    mesh = own_mesh(start=False)
    process = mesh.proxy("-service", "web", "-upstream", f"db:{mesh.ports.take()}")
    port = admin_port(process)
    assert ask(port, "/livez").status == 200
    assert (ask(port, "/ready").status, ask(port, "/ready").body) == (503, b"INITIALIZING\n")
    verbose = ask(port, "/readyz?verbose")
    assert verbose.status == 503 and b"[-]configuration" in verbose.body
    mesh.agent.start()
    eventually(lambda: ask(port, "/ready").status == 200, 40)
    assert ask(port, "/ready").body == b"LIVE\n" and ask(port, "/readyz").status == 200
    assert json.loads(ask(port, "/server_info").body)["state"] == "LIVE"


def test_probes_and_the_level_of_the_log_are_set_by_post_alone(mesh):
    web = mesh.service("web")
    for path in ("/healthcheck/fail", "/logging?level=debug", "/drain_listeners", "/quitquitquit"):
        assert web.admin(path).status == 405, path
    assert web.admin("/healthcheck/fail", "POST").body == b"OK\n"
    assert (web.admin("/ready").status, web.admin("/ready").body) == (503, b"DRAINING\n")
    web.admin("/healthcheck/ok", "POST")
    assert web.admin("/ready").status == 200
    assert web.admin("/logging", "POST").body == b"active loggers:\n  lictor: info\n"
    assert web.admin("/logging?level=debug", "POST").body == b"active loggers:\n  lictor: debug\n"
    mesh.deny("nobody", web)
    web.process.logged(r"\[DEBUG\] control: configuration has changed")
    assert web.admin("/logging?level=loud", "POST").status == 400
    assert web.admin("/nope").status == 404


def test_a_page_of_another_site_neither_reads_nor_changes(mesh):
    web = mesh.service("web")
    assert web.admin("/stats", headers={"Host": "evil.example"}).status == 403
    assert web.admin("/stats", headers={"Host": "localhost:1"}).status == 200
    for headers in ({"Origin": "http://evil.example"}, {"Sec-Fetch-Site": "cross-site"}, {"Origin": "null"}):
        assert web.admin("/quitquitquit", "POST", headers).status == 403
        # Not even to hold the places of those who look on.
        assert [web.admin(path, headers=headers).status for path in ("/events", "/status", "/")] == [403] * 3
    link = {"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate", "Sec-Fetch-Dest": "document"}
    assert (web.admin("/", headers=link).status, web.admin("/events", headers=link).status) == (200, 403)
    assert web.process.running()


def test_it_can_be_told_to_drain_and_to_quit(mesh):
    web = mesh.service("web")
    web.admin("/drain_listeners", "POST")
    eventually(lambda: not is_listening(web.public))
    assert web.process.running() and web.admin("/livez").status == 200
    web.admin("/quitquitquit", "POST")
    assert web.process.wait() == 0


def test_what_comes_from_the_mesh_can_be_drained_alone(mesh):
    db, other = mesh.service("db"), mesh.service("other")
    web = mesh.service("web", [db])
    caller = mesh.service("caller", [web], app=None)
    web.eventually_reaches(db)
    caller.eventually_reaches(web)
    with caller.dial(web) as held:
        assert held.ask(b"before\n") == b"before\n"
        assert web.admin("/drain_listeners?inboundonly&graceful&skip_exit", "POST").body == b"OK\n"
        eventually(lambda: not is_listening(web.public))
        # What is open goes on, the app's own connections are made as ever, and the registration is followed.
        assert held.ask(b"after\n") == b"after\n" and web.reaches(db)
        web.add_upstream(other)
        web.register()
        web.eventually_reaches(other)
        assert not is_listening(web.public)
        # A new denial still ends what is open.
        mesh.deny(caller, web)
        eventually(lambda: held.end() is not None)
    assert web.admin("/livez").status == 200 and web.admin("/ready").body == b"DRAINING\n"
    web.admin("/quitquitquit", "POST")
    assert web.process.wait() == 0


def test_the_default_address_gives_way_and_others_do_not(mesh, tmp_path):
    web = mesh.service("web", sidecar=None)
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    refused = mesh.proxy("-sidecar-for", web.id, "-admin-bind", f"127.0.0.1:{port}")
    assert refused.wait() == 1 and f"can't listen on 127.0.0.1:{port} for the admin server" in refused.err()
    first = mesh.proxy("-sidecar-for", web.id, env={"LICTOR_ADMIN_BIND": ""})
    second = mesh.proxy("-sidecar-for", web.id, env={"LICTOR_ADMIN_BIND": ""})
    ports = {admin_port(first), admin_port(second)}
    assert len(ports) == 2 and min(ports) >= 19000
    assert first.look("default admin address is taken") or second.look("default admin address is taken")
    off = mesh.proxy("-sidecar-for", web.id, "-admin-bind", "off")
    off.logged("configuration is complete")
    assert not off.look("Admin server started")
    path = tmp_path / "admin.sock"
    local = mesh.proxy("-sidecar-for", web.id, "-admin-bind", f"unix://{path}")
    local.logged("Admin server started: address=unix://")
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(str(path))
        connection.sendall(b"GET /livez HTTP/1.1\r\nHost: any.example\r\nConnection: close\r\n\r\n")
        assert b"200 OK" in connection.recv(1000)
    local.stop()
    assert not path.exists()


def test_a_ready_listener_gives_nothing_else(mesh):
    web = mesh.service("web", sidecar=None)
    port = mesh.ports.take()
    web.start("lictor", "-envoy-ready-bind-address", "127.0.0.1", "-envoy-ready-bind-port", str(port))
    eventually(lambda: ask(port, "/ready").status == 200)
    assert [ask(port, path).status for path in ("/stats", "/livez", "/")] == [404, 404, 404]
    assert ask(port, "/quitquitquit", "POST").status == 404


def test_a_slow_client_holds_no_place_for_ever(mesh):
    web = mesh.service("web")
    port = admin_port(web.process)
    held = [mesh.keep(socket.create_connection(("127.0.0.1", port))) for _ in range(64)]
    assert held

    def answers():
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=2)
        connection.request("GET", "/livez")
        return connection.getresponse().status == 200
    eventually(answers, 40)


def test_certificates_are_told_and_no_key(mesh):
    web = mesh.service("web")
    answer = web.admin("/certs")
    [entry] = json.loads(answer.body)["certificates"]
    leaf = entry["cert_chain"][0]
    assert leaf["subject_alt_names"][0]["uri"].endswith(f"/ns/default/dc/dc1/svc/{web.name}")
    assert leaf["days_until_expiration"] == "2" and leaf["expiration_time"].endswith("Z") and int(leaf["serial_number"], 16)
    assert entry["ca_cert"][0]["subject_alt_names"][0]["uri"].startswith("spiffe://")
    assert b"PRIVATE" not in answer.body
