"""Requests that two readers might read in two ways: by hand, and out of the pieces that such are made of."""

import dataclasses
import random

# Of names, values and targets; what is not ASCII is UTF-8 or a lone byte of Latin-1.
HOSTS = ("public.example", "public.example", "public.example", "public.example:80", "admin.example", "ADMIN.example", "admin.example.",
         "admin.example:80", "Admin.Example.:80", "admin.example:8080", "public.example:", "user@admin.example", "public.example@admin.example",
         "admin.example/", "admin.example,public.example", "[::1]", "[::1]:80", "127.0.0.1:80", "", "admin.example\\", "%61dmin.example",
         "admin.example:080", "admin_example", "public.example;admin.example", "xn--admin.example", "admin.example:99999", "*.example")
METHODS = ("GET", "GET", "GET", "GET", "POST", "POST", "PUT", "HEAD", "OPTIONS", "DELETE", "PATCH", "delete", "Delete", "PROPFIND", "M-SEARCH",
           "TRACE", "GETS", "post")
PIECES = ("/", "/", "/", "public", "admin", "secret", "a", ".", "..", "%2e", "%2E%2e", "%2f", "%5C", "\\", "%", "%25", "%61dmin", "%2561dmin",
          "%c3%a9", "%00", ";", ";x=1", "..;", "//", "\"", "<", ">", "|", "^", "`", "{", "}", "~", "%7e", "*", "[", "]", "@", ":", "&", "=", "+", "'",
          "!", "$", "(", ")", ",", "%u0061", "%0a", "%20", "%3f", "%23")
QUERIES = ("", "", "", "?", "?a=b", "?a=b&c=%20", "?/../admin", "??x", "?\"<>", "?a=[1]{2}|\\^`", "?%zz", "?%00", "?a=1;b=2", "?x=/admin#no", "?é")
FIELDS = (
    ("x-role", "user"), ("x-role", "admin"), ("X-Role", "admin"), ("x-role", "Admin"), ("x-role", ""), ("x-role", "user, admin"), ("x-role", "\tadmin  "),
    ("x_role", "admin"), ("x-role ", "admin"), ("x-env", "production"), ("x-env", "test"), ("x-deny", "1"), ("x-deny", ""),
    ("connection", "x-role"), ("connection", "keep-alive, x-deny"), ("connection", "host"), ("connection", "content-length"),
    ("connection", "transfer-encoding"), ("connection", "te, x-env"), ("keep-alive", "timeout=5"), ("proxy-connection", "keep-alive"),
    ("te", "trailers"), ("te", "gzip"), ("trailer", "x-role"), ("upgrade", "h2c"), ("upgrade", "websocket, h2c"), ("http2-settings", "AAMAAABk"),
    ("cookie", "a=1"), ("cookie", "b=2; c=\"3\""), ("x-forwarded-for", "192.0.2.1"), ("x-forwarded-host", "admin.example"), ("x-original-url", "/admin"),
    ("x-envoy-original-path", "/admin"), ("x-http-method-override", "DELETE"), ("forwarded", "host=admin.example"), ("x-latin", "caf\xe9"),
    ("content-type", "text/plain"), ("accept", "*/*"), ("range", "bytes=0-1"), ("if-none-match", "\"x\""), ("x-long", "y" * 3000), ("content-encoding", "gzip"),
    ("x-forwarded-client-cert", "By=spiffe://made/up;URI=spiffe://made/up"), ("authorization", "Basic YTpi"), ("proxy-authorization", "Basic YTpi"),
)


@dataclasses.dataclass
class Probe:
    """A request as a client writes it. `hosts` are the lines of `Host`, or for HTTP/2 the `:authority` and then those."""
    target: str = "/public/"
    method: str = "GET"
    hosts: tuple = ("public.example",)
    fields: tuple = ()
    body: bytes | None = None
    chunks: tuple | None = None  # sizes
    trailers: tuple = ()
    version: str = "1.1"
    raw: bytes | None = None  # instead of all this; @id@ is filled in

    def http1(self, id):
        if self.raw:
            return self.raw.replace(b"@id@", id.encode())
        lines = [f"{self.method} {self.target} HTTP/{self.version}", *(f"Host: {host}" for host in self.hosts), f"x-request-id: {id}",
                 *(f"{name}: {value}" for name, value in self.fields)]
        body = self.body or b""
        if self.chunks is not None:
            lines.append("Transfer-Encoding: chunked")
            body = chunked(body, self.chunks, self.trailers)
        elif self.body is not None:
            lines.append(f"Content-Length: {len(body)}")
        return encoded("\r\n".join([*lines, "", ""])) + body

    def __str__(self):
        return repr(self.http1("")[:300])

    def http2(self, id):
        """The header fields; a body follows as DATA."""
        authority, hosts = (self.hosts[0], self.hosts[1:]) if self.hosts else (None, ())
        pseudo = [(":method", self.method), (":scheme", "http"), (":path", self.target)] + ([(":authority", authority)] if authority is not None else [])
        fields = pseudo + [("host", host) for host in hosts] + [("x-request-id", id)] + [(name.lower(), value) for name, value in self.fields]
        length = [("content-length", str(len(self.body)))] if self.body is not None and self.chunks is None else []
        return [(name, encoded(value)) for name, value in fields + length]


def encoded(text):
    """Latin-1 where that is possible, so that lone bytes can be written."""
    return text.encode("utf-8" if any(ord(c) > 255 for c in text) else "latin-1")


def chunked(body, sizes, trailers=()):
    pieces, at = [], 0
    for size in [*sizes, len(body)]:
        if piece := body[at:at + size]:
            pieces.append(b"%x\r\n%s\r\n" % (len(piece), piece))
        at += size
    return b"".join(pieces) + b"0\r\n" + b"".join(encoded(f"{name}: {value}\r\n") for name, value in trailers) + b"\r\n"


def generated(count, seed):
    """Requests out of the pieces above, the same for a seed."""
    dice = random.Random(seed)
    for _ in range(count):
        path = "/" + ("public/" if dice.random() < 0.5 else "") + "".join(dice.choices(PIECES, k=dice.choice((0, 1, 1, 2, 2, 3, 4, 6))))
        target = path + dice.choice(QUERIES)
        if dice.random() < 0.08:
            target = dice.choice(("http://", "https://", "HTTP://", "ftp://")) + dice.choice(HOSTS) + target
        elif dice.random() < 0.02:
            target = dice.choice(("*", "public", "", "?x", "http://public.example?x=1", "http:///public/", "//admin.example/public/"))
        hosts = tuple(dice.choices(HOSTS, k=dice.choice((1,) * 16 + (0, 2))))
        fields = tuple(dice.choices(FIELDS, k=dice.choice((0, 0, 1, 1, 2, 3, 4))))
        probe = Probe(target, dice.choice(METHODS), hosts, fields, version=dice.choice(("1.1",) * 12 + ("1.0",)))
        if dice.random() < 0.4:
            probe.body = dice.choice((b"", b"a=b", b"hello\r\n\r\n", bytes(range(256)), b"0\r\n\r\nGET /admin HTTP/1.1\r\nHost: admin.example\r\n\r\n", b"z" * 70_000))
            if dice.random() < 0.5:
                probe.chunks = tuple(dice.choices((1, 2, 7, 100), k=dice.randrange(3)))
                probe.trailers = dice.choice(((), (), (("x-role", "admin"),), (("content-length", "1"), ("host", "admin.example"))))
        yield probe


def by_hand():
    """Each kind of doubt once, in the words of those that found them first (RFC 9110 to 9113, request smuggling, path confusion)."""
    for method in ("GET", "HEAD", "POST", "PUT", "OPTIONS", "DELETE", "PATCH", "delete", "post", "PROPFIND", "TRACE", "CONNECT", "GE T", ""):
        yield Probe(method=method)
    for host in HOSTS:
        yield Probe(hosts=(host,))
        yield Probe(target=f"http://{host}/public/x")
        yield Probe(target="http://public.example/public/x", hosts=(host,))
    for hosts in ((), ("public.example", "admin.example"), ("admin.example", "public.example"), ("public.example", "public.example")):
        yield Probe(hosts=hosts)
        yield Probe(hosts=hosts, version="1.0")
    for piece in PIECES:
        yield Probe(target=f"/public/{piece}")
        yield Probe(target=f"/public/a{piece}b/c")
        yield Probe(target=f"/public/{piece}/../../admin")
    for spelling in ("/admin", "/%61dmin", "/public/../admin", "/public/%2e%2e/admin", "/public/..%2fadmin", "/public/..;/admin", "/public\\..\\admin",
                     "//admin", "/./admin", "/admin/", "/ADMIN", "/public/..%5cadmin", "/admin;x", "/%2561dmin", "/public/%252e%252e/admin", "/;/admin",
                     "/admin%00", "/admin%20", "/admin?", "/admin#", "/secret", "/secret/", "/secret;x=1", "/secre%74", "*", "admin", "/public/.%2e/admin"):
        yield Probe(target=spelling)
    for query in QUERIES:
        yield Probe(target="/public/q" + query)
    for field in FIELDS:
        yield Probe(fields=(field,))
        yield Probe(fields=(("x-role", "user"), field))
        yield Probe(fields=(field, ("x-role", "user")), method="POST", body=b"hello")
    for name in ("content-length", "transfer-encoding", "host", "te", "x-role", "x-request-id", "cookie", "authorization", "x-forwarded-proto", "close", "upgrade"):
        yield Probe(fields=(("connection", name), ("x-role", "admin"), ("x-env", "test")), method="POST", body=b"hello")
    for method in ("GET", "HEAD", "DELETE", "OPTIONS", "POST"):
        for body in (b"", b"hello", b"z" * 200_000):
            yield Probe(method=method, body=body)
            yield Probe(method=method, body=body, chunks=(1, 3))
        yield Probe(method=method, body=b"hello", chunks=(), trailers=(("x-role", "admin"), ("content-length", "2")), fields=(("trailer", "x-role"),))
    for version in ("1.0", "1.1", "1.2", "2.0", "0.9", "11", "1.1 "):
        yield Probe(version=version)


# Over HTTP/1 alone: framing that two readers may see two requests in. One that is served says @id@, one that hides @id@-hidden.
HEAD = b"POST /public/ HTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n"
HIDDEN = b"GET /public/hidden HTTP/1.1\r\nHost: public.example\r\nConnection: close\r\nx-request-id: @id@-hidden\r\n\r\n"
LENGTHS = (b"Content-Length: 0", b"Content-Length: 4", b"Content-Length: 40", b"Content-Length: 4, 4", b"Content-Length: +4", b"Content-Length: 0x4",
           b"Content-Length: 4 ", b"Content-Length:4", b"Content-Length : 4", b"Content_Length: 4", b"content-length: 04", b"Content-Length: -1",
           b"Content-Length: \x0b4", b"X: y\nContent-Length: 4", b"X: y\rContent-Length: 4", b"X: y\r\n Content-Length: 4")
CODINGS = (b"Transfer-Encoding: chunked", b"Transfer-Encoding: Chunked", b"Transfer-Encoding:chunked", b"Transfer-Encoding : chunked", b"Transfer-Encoding: xchunked",
           b"Transfer-Encoding: chunked, identity", b"Transfer-Encoding: identity, chunked", b"Transfer-Encoding: gzip, chunked", b"Transfer-Encoding: \x0bchunked",
           b"Transfer-Encoding: chunked\r\nTransfer-Encoding: x", b"Transfer-Encoding\r\n : chunked", b"X: y\nTransfer-Encoding: chunked", b"Transfer_Encoding: chunked",
           b"Transfer-Encoding: \"chunked\"", b"Transfer-Encoding: chunked;q=1", b"TE: chunked\r\nTransfer-Encoding: chunked", b"Transfer-Encoding:\tchunked\t")
CHUNKS = (b"4\r\nabcd\r\n0\r\n\r\n", b"4;x=y\r\nabcd\r\n0\r\n\r\n", b"04\r\nabcd\r\n0\r\n\r\n", b"4\nabcd\n0\n\n", b"4 \r\nabcd\r\n0\r\n\r\n", b"0x4\r\nabcd\r\n0\r\n\r\n",
          b"4\r\nabcdX0\r\n\r\n", b"4;\n\r\nabcd\r\n0\r\n\r\n", b"4\r\nabcd\r\n0\r\nx-role: admin\r\n\r\n", b"4\r\nabcd\r\n00000\r\n\r\n", b"-4\r\nabcd\r\n0\r\n\r\n",
          b"4\r\n\r\nabcd\r\n0\r\n\r\n", b"100000004\r\nabcd\r\n0\r\n\r\n", b"4\rabcd\r\n0\r\n\r\n", b"4\r\nabcd\r\n0\r\n\n", b"4\r\nabcd\r\n0\r\nA: b\nB: c\r\n\r\n")


def smuggling():
    for line in LENGTHS + CODINGS:
        for body in (b"", b"abcd", b"0\r\n\r\n", b"4\r\nabcd\r\n0\r\n\r\n"):
            yield Probe(raw=HEAD + line + b"\r\n\r\n" + body + HIDDEN)
    for one in LENGTHS[:5]:
        for other in CODINGS:
            for lines in ((one, other), (other, one)):
                yield Probe(raw=HEAD + b"\r\n".join(lines) + b"\r\n\r\n0\r\n\r\n" + HIDDEN)
    for chunks in CHUNKS:
        yield Probe(raw=HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunks + HIDDEN)
    for start in (b"GET /public/ HTTP/1.1\nHost: public.example\nx-request-id: @id@\n\n", b"GET\t/public/\tHTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n",
                  b"GET  /public/ HTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n", b" GET /public/ HTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n",
                  b"\r\n\r\nGET /public/ HTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n", b"\nGET /public/ HTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n",
                  b"GET /public/ HTTP/1.1\r\n Host: public.example\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n", b"GET /public/\r\n\r\n",
                  b"GET /public/ http/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n", b"GET /public/ HTTP/1.1 \r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n",
                  b"GET /public/\x00 HTTP/1.1\r\nHost: public.example\r\nx-request-id: @id@\r\n\r\n", b"GET /public/ HTTP/1.1\r\nHost: public.example\r\nX\x00: y\r\nx-request-id: @id@\r\n\r\n",
                  b"GET /public/ HTTP/1.1\r\nHost: public.example\r\n: y\r\nx-request-id: @id@\r\n\r\n", b"GET /public/ HTTP/1.1\r\nHost: public.example\r\nX(y): z\r\nx-request-id: @id@\r\n\r\n",
                  b"GET /public/ HTTP/1.1\r\nHost: public.example\r\nno colon\r\nx-request-id: @id@\r\n\r\n", b"GET /public/ HTTP/1.1\r\nHost: public.example\r\nX: \xff\x80\r\nx-request-id: @id@\r\n\r\n",
                  b"GET /public/ HTTP/1.1\r\nHost: public.example\r\nX: a\x7fb\r\nx-request-id: @id@\r\n\r\n", b"GET /public/ HTTP/1.1\r\nHost: public.example\r\nX: a\x01b\r\nx-request-id: @id@\r\n\r\n"):
        yield Probe(raw=start + HIDDEN)
    # Cut off by the client's going away: nothing whole of it may arrive anywhere.
    for cut in (b"Content-Length: 40\r\n\r\nabcd", b"Transfer-Encoding: chunked\r\n\r\n4\r\nab", b"Transfer-Encoding: chunked\r\n\r\n4\r\nabcd\r\n", b"Content-Le"):
        yield Probe(raw=HEAD + cut)
