"""Responses as apps send them, whole and broken, clear and not: by hand, and out of the pieces that such are made of."""

import dataclasses
import random

from .http2 import END_HEADERS, END_STREAM, HEADERS, block
from .raw import Script, data, fields

FIELDS = (b"X-Plain: yes", b"Set-Cookie: a=1; Path=/", b"Set-Cookie: b=2", b"X-Empty:", b"X-Spaces:   padded\t ", b"X-Latin: caf\xe9", b"X-Long: " + b"y" * 3000,
          b"Connection: x-hop", b"X-Hop: 1", b"Keep-Alive: timeout=5", b"Content-Type: text/plain", b"ETag: \"x\"", b"Vary: a", b"Vary: b", b"Server: raw",
          b"Content-Encoding: identity", b"Location: /elsewhere", b"Trailer: X-End", b"Upgrade: h2c", b"Proxy-Connection: keep-alive", b"X-Quote: \"a, b\"")
EARLY = (b"HTTP/1.1 100 Continue\r\n\r\n", b"HTTP/1.1 103 Early Hints\r\nLink: </a.css>\r\n\r\n", b"HTTP/1.1 102 Processing\r\n\r\n")
STATUSES = (200, 200, 200, 200, 201, 204, 206, 299, 304, 400, 404, 418, 500, 503)
WITHOUT_BODY = (204, 304)


@dataclasses.dataclass
class Answer:
    """A response over HTTP/1: what is sent, and whether it may be refused because readers may differ about it."""
    script: Script
    ambiguous: bool = False
    # Not all of it is sent. Some clients overlook that in a head.
    cut: bool = False


def generated(count, seed):
    dice = random.Random(seed)
    for _ in range(count):
        status, version = dice.choice(STATUSES), dice.choice((b"1.1",) * 8 + (b"1.0",))
        fields = dice.sample(FIELDS, dice.randrange(6))
        body = dice.choice((b"", b"hello", b"line\r\n\r\nHTTP/1.1 200 OK\r\nContent-Length: 3\r\n\r\nbad", bytes(range(256)), b"z" * 40_000))
        framing = dice.choice(("length", "length", "chunked", "chunked", "end")) if version == b"1.1" else dice.choice(("length", "end"))
        if status in WITHOUT_BODY:
            framing, body = "none", b""
        # An end that is no end of a connection to HTTP/1.0 is none to HTTP/1.1.
        then = "fin" if framing == "end" or version == b"1.0" or dice.random() < 0.2 else "wait"
        payload = body
        if framing == "length":
            fields.append(b"Content-Length: %d" % len(body))
        elif framing == "chunked":
            fields.append(b"Transfer-Encoding: chunked")
            payload = chunked(dice, body)
        reason = dice.choice((b" OK", b" ", b" Quite Something"))
        head = b"HTTP/%s %d%s\r\n" % (version, status, reason) + b"".join(field + b"\r\n" for field in fields) + b"\r\n"
        early = b"".join(dice.choices(EARLY, k=dice.choice((0, 0, 0, 1, 2))))
        text = early + head + payload
        if cut_off := dice.random() < 0.25:
            then = dice.choice(("fin", "reset"))
            text = text[:dice.choice((0, len(early), len(early) + len(head) - 1, len(early) + len(head), len(text) - 1, len(text) - 2, len(text) // 2))]
        yield Answer(Script(tuple(cut(dice, text)), then), cut=cut_off)


def chunked(dice, body):
    pieces = [b"%x%s\r\n%s\r\n" % (len(piece), dice.choice((b"", b"", b";a=b")), piece) for piece in cut(dice, body) if piece]
    trailers = dice.choice((b"", b"", b"X-End: 1\r\n", b"Content-Length: 1\r\nX-End: 2\r\n"))
    return b"".join(pieces) + b"0\r\n" + trailers + b"\r\n"


def cut(dice, text):
    """In one piece, or in several."""
    places = sorted(dice.randrange(len(text) + 1) for _ in range(dice.choice((0, 0, 1, 3))))
    return [text[start:end] for start, end in zip([0, *places], [*places, len(text)])]


def by_hand():
    ok = b"HTTP/1.1 200 OK\r\n"
    chunks = b"\r\n5\r\nhello\r\n0\r\n\r\n"
    whole = ok + b"Content-Length: 5\r\n\r\nhello"
    for text in (whole, ok + b"Transfer-Encoding: chunked\r\n" + chunks, b"HTTP/1.1 204 No Content\r\n\r\n", b"HTTP/1.1 304 Not Modified\r\nETag: \"x\"\r\n\r\n",
                 *(early + whole for early in EARLY), b"".join(EARLY) * 3 + whole, ok + b"Content-Length: 0\r\n\r\n"):
        yield Answer(Script((text,)))
        yield Answer(Script((text,), "fin"))
        yield Answer(Script(tuple(bytes([byte]) for byte in text[:200]) + (text[200:],)))
    for text in (ok + b"\r\nhello", b"HTTP/1.0 200 OK\r\n\r\nhello", b"HTTP/1.0 200 OK\r\nContent-Length: 5\r\n\r\nhello"):
        yield Answer(Script((text,), "fin"))
    # Broken off, in every way that a client can tell, and closed or reset where none can.
    for text in (b"", b"HTTP/1.1 20", ok, ok + b"Content-Length: 9\r\n\r\n", ok + b"Content-Length: 9\r\n\r\nhello", ok + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhel",
                 ok + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n", ok + b"Transfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n", EARLY[0], EARLY[1] + ok):
        yield Answer(Script((text,), "fin"), cut=True)
        yield Answer(Script((text,), "reset"), cut=True)
    yield Answer(Script((ok + b"\r\nhello",), "reset"))
    for fields in (b"Content-Length: 4\r\nTransfer-Encoding: chunked\r\n" + chunks, b"Transfer-Encoding: chunked\r\nContent-Length: 5\r\n" + chunks,
                   b"Content-Length: 5\r\nContent-Length: 5\r\n\r\nhello", b"Content-Length: 5, 5\r\n\r\nhello", b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello",
                   b"Content-Length: +5\r\n\r\nhello", b"Transfer-Encoding: gzip, chunked\r\n" + chunks, b"Transfer-Encoding: identity\r\n\r\nhello",
                   b"Transfer-Encoding: chunked\r\n\r\nzz\r\nhello\r\n0\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n-5\r\nhello\r\n0\r\n\r\n",
                   b"Transfer-Encoding: chunked\r\n\r\n5\r\nhelloX\r\n0\r\n\r\n", b"Content-Length : 5\r\n\r\nhello", b"X: a\0b\r\nContent-Length: 5\r\n\r\nhello",
                   b"X: a\r\n b\r\nContent-Length: 5\r\n\r\nhello", b" X: a\r\nContent-Length: 5\r\n\r\nhello", b"no colon\r\nContent-Length: 5\r\n\r\nhello"):
        yield Answer(Script((ok + fields,), "fin"), ambiguous=True)
    for start in (b"HTTP/2.0 200 OK\r\n", b"HTTP/1.2 200 OK\r\n", b"ICY 200 OK\r\n", b"HTTP/1.1 99 Low\r\n", b"HTTP/1.1 2000 High\r\n", b"HTTP/1.1 200\r\n", b"garbage\r\n", b"\0\1\2\r\n",
                  b"HTTP/1.1 200 OK\n"):
        yield Answer(Script((start + b"Content-Length: 5\r\n\r\nhello",), "fin"), ambiguous=True)
    for body, status in ((b"Content-Length: 5\r\n\r\nhello", b"204 No Content"), (b"Transfer-Encoding: chunked\r\n\r\n0\r\n\r\n", b"204 No Content")):
        yield Answer(Script((b"HTTP/1.1 " + status + b"\r\n" + body,), "fin"), ambiguous=True)


def over_http2():
    """Responses over HTTP/2: (script, what arrives of it). That is a status and a body, or None where nothing may arrive whole."""
    length = ("content-length", "5")

    def trailers(*more):
        return HEADERS, END_HEADERS | END_STREAM, block([("x-end", "1"), *more])

    head_alone = (HEADERS, END_HEADERS | END_STREAM, block([(":status", "404")]))
    early = (HEADERS, END_HEADERS, block([(":status", "103"), ("link", "</a.css>")]))
    for pieces in ((fields(200), data(b"hello", end=True)), (fields(200, length), data(b"hello", end=True)), (fields(200), data(b"hel"), data(b"lo"), data(b"", end=True)),
                   (fields(200), data(b"hello"), trailers()), (fields(200, length), data(b"hello"), trailers()), (fields(200), data(b"hello"), trailers(length)),
                   (early, fields(200), data(b"hello", end=True)), (early, early, fields(200, length), data(b"hello", end=True))):
        yield Script(pieces), (200, "hello")
    yield Script((head_alone,)), (404, "")
    yield Script((fields(200), data(b"", end=True))), (200, "")
    yield Script((fields(200), data(b"z" * 16_000), data(b"z" * 16_000, end=True))), (200, "z" * 32_000)
    for code in range(14):
        yield Script((fields(200), data(b"hello")), stream_end=code), None
        yield Script((fields(200),), stream_end=code), None
        yield Script((), stream_end=code), None
    for then in ("fin", "reset"):
        yield Script((), then), None
        yield Script((fields(200),), then), None
        yield Script((fields(200), data(b"hello")), then), None
        yield Script((fields(200, ("content-length", "9")), data(b"hello")), then), None
    for pieces in ((fields(200, ("content-length", "9")), data(b"hello", end=True)), (fields(200, ("content-length", "3")), data(b"hello", end=True)),
                   (fields(200, ("content-length", "9")), data(b"hello"), trailers()), (early, data(b"hello", end=True)), (data(b"hello", end=True),),
                   (fields(200, length, length), data(b"hello", end=True)), (fields(200, ("transfer-encoding", "chunked")), data(b"hello", end=True)),
                   (fields(200, ("X-Capital", "1")), data(b"hello", end=True)), (fields("20"), data(b"hello", end=True)), (fields("2000"), data(b"hello", end=True)),
                   ((HEADERS, END_HEADERS, block([("x-a", "1")])), data(b"hello", end=True)), (fields(204, length), data(b"hello", end=True))):
        yield Script(pieces), None
