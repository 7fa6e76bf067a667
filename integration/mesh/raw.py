"""A server that answers with given bytes, over HTTP/1 or HTTP/2, plain or as a sidecar."""

import dataclasses
import socket
import ssl
import struct

import hpack

from .apps import App, Conn
from .http2 import DATA, END_HEADERS, END_STREAM, GOAWAY, HEADERS, PREFACE, RST_STREAM, SETTINGS, WINDOW_UPDATE, block, frame, next_frame


@dataclasses.dataclass
class Script:
    """The answer of a server, piece by piece, and how it ends: it may "wait" for the client, or send a "fin" or a "reset".

    Pieces are bytes. For HTTP/2 they are (kind, flags, payload), and `stream_end` is the code of an RST_STREAM at the end.
    """
    pieces: tuple
    then: str = "wait"
    stream_end: int | None = None


class Raw(App):
    """Answers each request by its path's script; the path `/known` is answered well.

    `heads` has the head of each request over HTTP/1. With a `context` it speaks TLS.
    """

    def __init__(self, port, scripts, context=None):
        self.scripts, self.heads, self._context = scripts, [], context
        super().__init__(port)

    def serve(self, conn):
        if self._context:
            conn = Conn(self._context.wrap_socket(conn.sock, server_side=True), None)
        first = conn.take(len(PREFACE)) if self.speaks_http2(conn) else b""
        serve = self._serve_http2 if first == PREFACE else self._serve_http1
        serve(conn)

    def speaks_http2(self, conn):
        """Whether the first bytes say so: `PRI` is no method that a client has."""
        if self._context:
            return conn.sock.selected_alpn_protocol() == "h2"
        return conn.sock.recv(3, socket.MSG_PEEK) == PREFACE[:3]

    def _serve_http1(self, conn):
        while head := read_head(conn):
            self.heads.append(head)
            path = head.split(b" ", 2)[1].decode("latin-1")
            if b"\r\ncontent-length:" in head.lower():
                length = head.lower().split(b"\r\ncontent-length:")[1].split(b"\r\n")[0]
                conn.take(int(length))
            script = self.scripts.get(path, KNOWN)
            for piece in script.pieces:
                conn.send(piece)
            if script.then != "wait":
                return self._end(conn, script.then)

    def _serve_http2(self, conn):
        decoder, paths = hpack.Decoder(), {}
        conn.send(frame(SETTINGS))
        while got := next_frame(conn):
            kind, flags, stream, payload = got
            if kind == GOAWAY:
                return
            if kind == HEADERS and flags & END_HEADERS:
                paths.setdefault(stream, dict(decoder.decode(payload)).get(":path"))
            if kind == DATA and payload:
                conn.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
            if kind in (HEADERS, DATA) and flags & END_STREAM:
                script = self.scripts.get(paths.pop(stream), KNOWN_HTTP2)
                conn.send(b"".join(frame(kind, flags, stream, payload) for kind, flags, payload in script.pieces))
                if script.stream_end is not None:
                    conn.send(frame(RST_STREAM, 0, stream, struct.pack(">I", script.stream_end)))
                if script.then != "wait":
                    return self._end(conn, script.then)

    @staticmethod
    def _end(conn, then):
        if then == "reset":
            return conn.reset()
        if isinstance(conn.sock, ssl.SSLSocket):
            conn.sock.unwrap()
        conn.finish()
        conn.rest()


def read_head(conn):
    """A request's head; empty at the end of the stream."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        line = conn.line()
        if not line:
            return b""
        head += line
    return head


def fields(status, *more):
    """The head of a response over HTTP/2, as a piece of a script; more follows."""
    return HEADERS, END_HEADERS, block([(":status", str(status)), *more])


def data(payload, end=False):
    return DATA, END_STREAM if end else 0, payload


KNOWN = Script((b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nknown",))
KNOWN_HTTP2 = Script((fields(200, ("content-length", "5")), data(b"known", end=True)))
