"""HTTP/2 frame by frame, so that scenarios can say what no library would."""

import struct

from .wait import TEST_TIMEOUT

PREFACE = b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"
DATA, HEADERS, PRIORITY, RST_STREAM, SETTINGS, PUSH_PROMISE, PING, GOAWAY, WINDOW_UPDATE, CONTINUATION = range(10)
END_STREAM = ACK = 0x1
END_HEADERS = 0x4

PSEUDO = ((":method", "GET"), (":scheme", "http"), (":path", "/"), (":authority", "shop"))


def frame(kind, flags=0, stream=0, payload=b""):
    return struct.pack(">I", len(payload))[1:] + struct.pack(">BBI", kind, flags, stream) + payload


def block(fields):
    """Fields as HPACK literals that are not indexed."""
    return b"".join(b"\0" + literal(name) + literal(value) for name, value in fields)


def literal(text):
    text = text if isinstance(text, bytes) else text.encode("latin-1")
    return number(len(text), 7) + text


def number(value, bits, first=0):
    most = (1 << bits) - 1
    if value < most:
        return bytes([first | value])
    coded, value = [first | most], value - most
    while value >= 128:
        coded.append(value % 128 | 128)
        value //= 128
    return bytes([*coded, value])


def status_of(fields):
    """The status that a block of response fields begins with, if the block is the first on its connection."""
    while fields[0] & 0xe0 == 0x20:  # a new size of the table
        fields = fields[1:]
    if fields[0] & 0x80:
        return {8: 200, 9: 204, 10: 206, 11: 304, 12: 400, 13: 404, 14: 500}[fields[0] & 0x7f]
    length, text = fields[1] & 0x7f, fields[2:]
    return int(huffman_digits(text[:length]) if fields[1] & 0x80 else text[:length])


def huffman_digits(coded):
    bits, digits = "".join(f"{byte:08b}" for byte in coded), ""
    while len(digits) < 3:
        if (five := int(bits[:5], 2)) < 3:
            digits, bits = digits + str(five), bits[5:]
        else:
            digits, bits = digits + str(int(bits[:6], 2) - 22), bits[6:]
    return digits


def next_frame(conn):
    """(kind, flags, stream, payload) of the next frame on a `Conn`; None at the end of the stream. SETTINGS and PING are acknowledged."""
    head = conn.take(9)
    if len(head) < 9:
        return None
    kind, flags, stream = struct.unpack(">BBI", head[3:])
    payload = conn.take(int.from_bytes(head[:3]))
    if kind in (SETTINGS, PING) and not flags & ACK:
        conn.send(frame(kind, ACK, 0, payload if kind == PING else b""))
    return kind, flags, stream, payload


class Http2:
    """A client's connection, on which the preface and our settings have been sent."""

    def __init__(self, conn, within=TEST_TIMEOUT, settings=b""):
        self.conn = conn
        conn.sock.settimeout(within)
        conn.send(PREFACE + frame(SETTINGS, payload=settings))

    def send(self, *frames):
        self.conn.send(b"".join(frames))
        return self

    def next(self):
        return next_frame(self.conn)

    def outcome(self, stream=1):
        """The end of a stream: ("answer", status, body), ("reset", code), ("goaway", code) or ("closed",)."""
        status, body = None, b""
        try:
            while got := self.next():
                kind, flags, on, payload = got
                if kind == GOAWAY and (code := int.from_bytes(payload[4:8])):
                    return "goaway", code
                if on != stream:
                    continue
                if kind == RST_STREAM and status is None:
                    return "reset", int.from_bytes(payload)
                if kind == HEADERS and status is None:
                    status = status_of(payload)
                if kind == DATA:
                    body += payload
                    if payload:
                        self.send(frame(WINDOW_UPDATE, 0, 0, struct.pack(">I", len(payload))))
                if kind in (HEADERS, DATA) and flags & END_STREAM or kind == RST_STREAM:
                    return "answer", status, body
        except ConnectionError:
            pass
        return ("closed",)

    def close(self):
        self.conn.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()
