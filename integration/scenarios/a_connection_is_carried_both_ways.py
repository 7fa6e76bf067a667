"""The main job: bytes through a pair of sidecars, on mutual TLS."""

import threading

from mesh import Echo, HalfCloser, Resetter, dial, eventually


def test_bytes_go_there_and_back(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    with client.dial() as conn:
        assert conn.ask(b"hello") == b"hello"
        assert conn.ask(b"again") == b"again"
    assert server.app.served == 1


def test_what_flows_between_the_sidecars_is_not_plain(mesh):
    server = mesh.service("server")
    with dial(server.public, within=3) as conn:
        conn.send(b"hello, in plain text\n")
        assert conn.end(12) in ("fin", "reset")
    assert server.app.served == 0


def test_many_connections_at_once_do_not_mix(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    conns = [client.dial() for _ in range(50)]
    for number, conn in enumerate(conns):
        conn.send(b"%d\n" % number)
    assert [conn.line() for conn in conns] == [b"%d\n" % number for number in range(50)]


def test_256_mib_come_back_whole(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    block = bytes(range(256)) * 4096
    blocks = 256
    with client.dial(within=60) as conn:
        def push():
            for number in range(blocks):
                conn.send(number.to_bytes(4) + block[4:])
            conn.finish()
        pusher = threading.Thread(target=push)
        pusher.start()
        for number in range(blocks):
            assert conn.take(len(block)) == number.to_bytes(4) + block[4:], f"block {number} came back changed"
        assert conn.rest() == b""
        pusher.join()


def test_the_clients_half_close_is_passed_on_and_the_answer_still_comes(mesh):
    server = mesh.service("server")
    client = mesh.service("client", [server])
    with client.dial() as conn:
        assert conn.send(b"last words").finish().rest() == b"last words"
    eventually(lambda: server.app.ends == ["fin"])


def test_the_servers_half_close_is_passed_on_and_the_client_may_go_on(mesh):
    server = mesh.service("server", app=HalfCloser)
    client = mesh.service("client", [server])
    with client.dial() as conn:
        assert conn.rest() == b"that was all\n"
        conn.send(b"still here, ").send(b"and done\n").finish()
        eventually(lambda: server.app.got == [b"still here, and done\n"])


def test_a_servers_reset_is_passed_on_as_an_abrupt_end(mesh):
    server = mesh.service("server", app=Resetter)
    client = mesh.service("client", [server])
    with client.dial() as conn:
        assert conn.send(b"go\n").end() == "reset"


def test_a_clients_reset_ends_the_servers_side(mesh):
    server = mesh.service("server", app=Echo)
    client = mesh.service("client", [server])
    conn = client.dial()
    assert conn.ask(b"hello") == b"hello"
    conn.reset()
    eventually(lambda: server.app.ends == ["reset"], what="the app sees an abrupt end")


def test_a_slow_reader_holds_the_sender_back(mesh):
    """Back-pressure: what nobody reads is not taken in without end."""
    server = mesh.service("server")
    client = mesh.service("client", [server])
    with client.dial() as conn:
        conn.sock.settimeout(2)
        sent = 0
        try:
            while sent < 512 << 20:
                sent += conn.sock.send(b"x" * 65536)
        except TimeoutError:
            pass
        # What the kernel buffers on six sockets, each way, may come to some tens of MiB.
        assert sent < 256 << 20, f"{sent} bytes were taken in that nobody read"
