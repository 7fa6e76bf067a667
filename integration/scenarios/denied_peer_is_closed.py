"""Intentions decide who gets through, by precedence, and a change of them is effective at once."""

from mesh import Upstream, eventually, mtls_connect, stays


def pair(mesh):
    server = mesh.service("server")
    return server, mesh.service("client", [server])


def test_a_denied_client_gets_a_clean_end_and_the_app_sees_nothing(mesh):
    server, client = pair(mesh)
    mesh.deny(client, server)
    assert client.eventually_refused() == "fin"
    served = server.app.served
    assert client.refused() == "fin"
    assert server.app.served == served


def test_the_denial_is_logged_with_source_and_deciding_intention(mesh):
    server, client = pair(mesh)
    mesh.deny(client, server)
    client.eventually_refused()
    line = server.process.logged(rf"[^\n]*svc/{client.name}[^\n]*").group()
    lines = [line for line in server.process.text().splitlines() if f"svc/{client.name}" in line and "den" in line.lower()]
    assert lines, server.process.text()
    assert client.name in lines[0] and server.name in lines[0] and "9" in lines[0], lines[0]


def test_a_deny_reaches_new_connections_within_a_second_and_so_does_its_end(mesh):
    server, client = pair(mesh)
    client.eventually_reaches()
    undo = mesh.deny(client, server)
    client.eventually_refused(within=1)
    undo()
    client.eventually_reaches(within=1)


def test_open_connections_that_are_denied_end_within_a_second_and_only_those(mesh):
    server = mesh.service("server")
    bad, good = mesh.service("bad", [server]), mesh.service("good", [server])
    bad_conns, good_conn = [bad.dial() for _ in range(5)], good.dial()
    for conn in [*bad_conns, good_conn]:
        assert conn.ask(b"open") == b"open"
    mesh.deny(bad, server)
    assert [conn.end(within=1) for conn in bad_conns] == ["fin"] * 5
    assert good_conn.ask(b"still open") == b"still open"
    eventually(lambda: server.app.open() == 1, what="the app's side of the cut connections ends too")


def test_the_cut_is_a_clean_end_of_tls_at_the_public_listener_too(mesh):
    server = mesh.service("server")
    name = mesh.name("client")
    with mtls_connect(server.public, mesh.agent.roots(), mesh.agent.leaf(name), mesh.agent.sni(server.name)) as conn:
        assert conn.ask(b"open") == b"open"
        mesh.deny(name, server)
        # Python's TLS raises at an end without close_notify; "fin" is an orderly one.
        assert conn.end(within=1) == "fin"


def test_exact_source_beats_any_source(mesh):
    server = mesh.service("server")
    friend, stranger = mesh.service("friend", [server]), mesh.service("stranger", [server])
    mesh.deny("*", server)
    mesh.allow(friend, server)
    stranger.eventually_refused()
    friend.eventually_reaches()
    stays(friend.reaches, 0.5)
    assert stranger.refused()


def test_exact_destination_beats_any_destination(own_mesh):
    mesh = own_mesh()
    open_, shut = mesh.service("open"), mesh.service("shut")
    client = mesh.service("client", [open_, shut])
    # Precedence 8 (any source, exact destination) beats 6 (exact source, any destination), which beats 5.
    mesh.deny(client, "*")
    mesh.allow("*", open_)
    client.eventually_refused(shut)
    client.eventually_reaches(open_)


def test_any_to_any_can_be_denied_and_one_pair_allowed(own_mesh):
    mesh = own_mesh()
    server = mesh.service("server")
    friend, stranger = mesh.service("friend", [server]), mesh.service("stranger", [server])
    mesh.deny("*", "*")
    undo = mesh.allow(friend, server)
    stranger.eventually_refused()
    friend.eventually_reaches()
    undo()
    friend.eventually_refused()


def test_permissions_for_requests_mean_deny_where_there_are_only_bytes(mesh):
    mesh.agent.needs((1, 9), "an intention with permissions")
    # The service is HTTP to Consul, else it would not take the intention; the proxy's registration says tcp.
    server = mesh.service("server", proxy={"Config": {"protocol": "tcp"}}, sidecar=None)
    mesh.agent.write("service-defaults", server.name, Protocol="http")
    server.start()
    client = mesh.service("client", [Upstream(server.name, mesh.ports.take(), {"Config": {"protocol": "tcp"}})])
    client.eventually_reaches()
    mesh.agent.write("service-intentions", server.name, Sources=[
        {"Name": client.name, "Permissions": [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}]}])
    client.eventually_refused()
