"""Clients that mean harm cost little, and others are served meanwhile."""

import contextlib
import os
import struct
import threading
import time

import pytest

from mesh import Browser, Mesh, Upstream, Web, dial, eventually, mtls_connect
from mesh.http2 import (CONTINUATION, DATA, END_HEADERS, END_STREAM, HEADERS, PING, PRIORITY, PSEUDO, RST_STREAM, SETTINGS, WINDOW_UPDATE,
                        Http2, block, frame, number)
from mesh.identity import client_context

# What one attack may send, how long it may take, and what a sidecar may grow by: all far below what harms.
SENT = 16 << 20
SECONDS = 6
GROWTH = 24 << 20
# Others are answered within this time, on a machine that the attacker shares (measured: 0.2 s, with three busy loops beside it).
SOON = 20

GET = block(PSEUDO)
CANCEL = struct.pack(">I", 8)


def streams():
    return range(1, 1 << 30, 2)


def rapid_reset():
    return (frame(HEADERS, END_HEADERS | END_STREAM, on, GET) + frame(RST_STREAM, 0, on, CANCEL) for on in streams())


def resets_by_us():
    """Each request is made so that the server resets its stream ("made you reset")."""
    return (frame(HEADERS, END_HEADERS | END_STREAM, on, GET) + frame(WINDOW_UPDATE, 0, on, bytes(4)) for on in streams())


def continuations():
    yield frame(HEADERS, END_STREAM, 1, GET)
    while True:
        yield frame(CONTINUATION, 0, 1, block([("x-a", "x" * 1000)]))


def empty_continuations():
    yield frame(HEADERS, END_STREAM, 1, GET)
    while True:
        yield frame(CONTINUATION, 0, 1)


def settings():
    while True:
        yield frame(SETTINGS, 0, 0, struct.pack(">HI", 4, 65_535))


def pings():
    while True:
        yield frame(PING, 0, 0, bytes(8))


def priorities():
    return (frame(PRIORITY, 0, on, struct.pack(">IB", 0, 1)) for on in streams())


def empty_data():
    yield frame(HEADERS, END_HEADERS, 1, block([(":method", "POST"), *PSEUDO[1:]]))
    while True:
        yield frame(DATA, 0, 1)


def window_updates():
    while True:
        yield frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", 1))


def header_floods():
    fields = block([*PSEUDO, *((f"x-{number}", "x" * 10) for number in range(2000))])
    parts = [fields[at:at + 16_000] for at in range(0, len(fields), 16_000)]
    for on in streams():
        yield (frame(HEADERS, END_STREAM, on, parts[0]) + b"".join(frame(CONTINUATION, 0, on, part) for part in parts[1:])
               + frame(CONTINUATION, END_HEADERS, on))


def compressed_headers():
    """One field of 4 KB goes into the table, and is then named a thousand times in each request, at a byte a time."""
    yield frame(HEADERS, END_HEADERS | END_STREAM, 1, GET + b"\x40\x03x-a" + number(3900, 7) + b"x" * 3900)
    for on in streams():
        yield frame(HEADERS, END_HEADERS | END_STREAM, on + 2, GET + b"\xbe" * 4000)


def open_streams():
    """Bodies that never end, on as many streams as can be had."""
    return (frame(HEADERS, END_HEADERS, on, block([(":method", "POST"), *PSEUDO[1:]])) + frame(DATA, 0, on, b"x") for on in streams())


ATTACKS = [rapid_reset, resets_by_us, continuations, empty_continuations, settings, pings, priorities, empty_data, window_updates,
           header_floods, compressed_headers, open_streams]


@pytest.fixture(scope="module")
def pair(shared_agent, binaries, ports, tmp_path_factory):
    with contextlib.ExitStack() as stack:
        mesh = Mesh(shared_agent, binaries, ports, tmp_path_factory.mktemp("attacks"), stack, "att")
        server = mesh.service("server", app=Web, proxy={"Config": {"protocol": "http"}})
        client = mesh.service("client", [Upstream(server.name, ports.take(), {"Config": {"protocol": "http"}})])
        context = client_context(mesh.agent.roots(), mesh.agent.leaf(client.name))
        context.set_alpn_protocols(["h2"])
        ways = {
            "upstream listener": lambda: dial(client.upstreams[0].port),
            "public listener": lambda: mtls_connect(server.public, None, context=context, sni=mesh.agent.sni(server.name)),
        }
        with Browser(client.upstreams[0].port) as browser:
            eventually(lambda: browser.ask().status == 200)
        yield client, server, ways


def resident(process):
    with open(f"/proc/{process.pid}/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def flood(connection, frames):
    """Sends until the other end has had enough, up to the bounds; nothing is read."""
    sent, until, batch = 0, time.monotonic() + SECONDS, bytearray()
    connection.conn.sock.settimeout(0.5)
    with contextlib.suppress(OSError):
        for part in frames:
            batch += part
            if len(batch) < 16_384:
                continue
            connection.conn.send(bytes(batch))
            sent += len(batch)
            batch.clear()
            if sent > SENT or time.monotonic() > until:
                break


@pytest.mark.parametrize("way", ["upstream listener", "public listener"])
@pytest.mark.parametrize("attack", ATTACKS, ids=lambda attack: attack.__name__)
def test_a_flood(pair, attack, way):
    client, server, ways = pair
    before = [resident(service.process) for service in (client, server)]
    with Http2(ways[way]()) as connection, Browser(client.upstreams[0].port, SOON) as other:
        attacker = threading.Thread(target=flood, args=(connection, attack()), daemon=True)
        attacker.start()
        while attacker.is_alive():
            assert other.ask().status == 200
            attacker.join(0.05)
        after = [resident(service.process) for service in (client, server)]
        assert other.ask().status == 200
    assert [now - then < GROWTH for now, then in zip(after, before)] == [True, True], (before, after)
    with Browser(client.upstreams[0].port, SOON) as later:
        assert later.ask().status == 200


def test_request_heads_that_come_slowly_are_cut_and_others_served(pair):
    client, _, _ = pair
    port = client.upstreams[0].port
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(dial(port)) for _ in range(200)]
        for number_, conn in enumerate(slow):
            conn.send(b"GET / HTTP/1.1\r\nHost: shop\r\n" if number_ % 2 else b"GET")
        other = stack.enter_context(Browser(port, SOON))
        begun, open_ones = time.monotonic(), slow
        # Never a pause that an idle limit would notice.
        while open_ones and time.monotonic() - begun < 40:
            for conn in list(open_ones):
                try:
                    conn.send(b"X")
                except OSError:
                    pass
            open_ones = [conn for conn in open_ones if conn.end(within=0.0005) == "open"]
            assert other.ask().status == 200
        assert open_ones == []


def test_header_blocks_that_do_not_end_are_cut_and_others_served(pair):
    client, _, ways = pair
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(Http2(way())) for way in ways.values() for _ in range(20)]
        for connection in slow:
            connection.send(frame(HEADERS, END_STREAM, 1, GET))
        complete = [stack.enter_context(Http2(way())) for way in ways.values()]
        for connection in complete:
            connection.send(frame(HEADERS, END_STREAM, 1, GET) + frame(CONTINUATION, END_HEADERS, 1))
        other = stack.enter_context(Browser(client.upstreams[0].port, SOON))
        begun, open_ones = time.monotonic(), slow
        while open_ones and time.monotonic() - begun < 40:
            open_ones = [connection for connection in open_ones if connection.conn.end(within=0.01) == "open"]
            assert other.ask().status == 200
        assert open_ones == []
        assert [connection.conn.end(within=0.1) for connection in complete] == ["open"] * 2


def test_bodies_that_come_slowly_hold_nobody_up(pair):
    client, _, _ = pair
    port = client.upstreams[0].port
    with contextlib.ExitStack() as stack:
        slow = [stack.enter_context(dial(port)) for _ in range(200)]
        for conn in slow:
            conn.send(b"POST / HTTP/1.1\r\nHost: shop\r\nContent-Length: 1000\r\n\r\nx")
        other = stack.enter_context(Browser(port, SOON))
        for _ in range(20):
            for conn in slow:
                conn.send(b"x")
            assert other.ask().status == 200
