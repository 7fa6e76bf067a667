"""Proof, by packet capture and by probes, that what is measured is mutual TLS between two sidecars."""

import os
import re
import socket
import ssl
import struct
import tempfile
import threading
import time

from system import Bad, alive, now, tail

MARK = b"LICTOR-BENCH-PLAIN-TEXT-MARKER--"


class Sniff:
    """Records loopback TCP payloads of the given ports (needs CAP_NET_RAW)."""

    def __init__(self, ports):
        self.ports, self.flows, self.seen, self.stopped = set(ports), {}, set(), False
        self.s = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.ntohs(0x0800))
        self.s.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 << 20)
        self.s.bind(("lo", 0))
        self.s.settimeout(0.1)
        self.t = threading.Thread(target=self.run, daemon=True)
        self.t.start()

    def run(self):
        while not self.stopped:
            try:
                b, addr = self.s.recvfrom(70000)
            except socket.timeout:
                continue
            if addr[2] == 4 or b[23] != 6:  # outgoing copy, or not TCP
                continue
            ih = (b[14] & 15) * 4 + 14
            sp, dp, seq = struct.unpack("!HHI", b[ih:ih + 8])
            if not ({sp, dp} & self.ports):
                continue
            total = struct.unpack("!H", b[16:18])[0] + 14
            pay = b[ih + (b[ih + 12] >> 4) * 4:total if total > 14 else None]
            if pay and (sp, dp, seq) not in self.seen:
                self.seen.add((sp, dp, seq))
                self.flows.setdefault((sp, dp), bytearray()).extend(pay)

    def stop(self):
        time.sleep(0.15)
        self.stopped = True
        self.t.join()
        self.s.close()
        return self.flows


def server_hello(b):
    """Facts of the first ServerHello in a server-to-client TLS stream."""
    recs, i = [], 0
    while i + 5 <= len(b):
        n = struct.unpack("!H", b[i + 3:i + 5])[0]
        recs.append((b[i], bytes(b[i + 5:i + 5 + n])))
        i += 5 + n
    if not recs or recs[0][0] != 22 or recs[0][1][0] != 2:
        return None
    h = recs[0][1]
    off = 4 + 2 + 32
    off += 1 + h[off]
    cipher = struct.unpack("!H", h[off:off + 2])[0]
    off += 3
    hl = 4 + int.from_bytes(h[1:4], "big")
    ver, group, psk = struct.unpack("!H", h[4:6])[0], None, False
    if off + 2 <= hl:
        end = off + 2 + struct.unpack("!H", h[off:off + 2])[0]
        off += 2
        while off + 4 <= end:
            t, n = struct.unpack("!HH", h[off:off + 4])
            d = h[off + 4:off + 4 + n]
            if t == 43:
                ver = struct.unpack("!H", d)[0]
            elif t == 51:
                group = struct.unpack("!H", d[:2])[0]
            elif t == 41:
                psk = True
            off += 4 + n
    if ver != 0x304:  # in TLS 1.2 a full handshake shows a Certificate in clear
        hs = b"".join(r[1] for r in recs if r[0] == 22)
        j, types = 0, []
        for _ in range(8):
            if j + 4 > len(hs):
                break
            types.append(hs[j])
            if hs[j] == 12:  # ServerKeyExchange names the curve
                group = struct.unpack("!H", hs[j + 5:j + 7])[0]
            j += 4 + int.from_bytes(hs[j + 1:j + 4], "big")
        psk = 11 not in types
    names = {0x1301: "AES_128_GCM", 0x1302: "AES_256_GCM", 0x1303: "CHACHA20", 0xC02B: "ECDHE_ECDSA_AES128_GCM", 0xC02C: "ECDHE_ECDSA_AES256_GCM", 0xCCA9: "ECDHE_ECDSA_CHACHA20"}
    groups = {29: "X25519", 23: "P-256", 24: "P-384", 0x11EC: "X25519MLKEM768", 0x6399: "X25519Kyber768"}
    return {"version": {0x304: "TLS1.3", 0x303: "TLS1.2"}.get(ver, hex(ver)), "cipher": names.get(cipher, hex(cipher)),
            "group": groups.get(group, group and hex(group)), "resumed": psk}


def http_get(port, path, timeout=5, sock=None, keep=False):
    s = sock or socket.create_connection(("127.0.0.1", port), timeout)
    s.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    s.settimeout(timeout)
    try:
        s.sendall(f"GET {path} HTTP/1.1\r\nHost: app\r\n\r\n".encode())
        b = b""
        while b"\r\n\r\n" not in b:
            d = s.recv(65536)
            if not d:
                raise Bad("closed")
            b += d
        h, _, body = b.partition(b"\r\n\r\n")
        m = re.search(rb"content-length: *(\d+)", h, re.I)
        if not h.startswith(b"HTTP/1.1 200") or not m:
            raise Bad("status " + h[:40].decode("latin1"))
        while len(body) < int(m[1]):
            d = s.recv(65536)
            if not d:
                raise Bad("closed in the body")
            body += d
        return body
    finally:
        if not keep:
            s.close()


def body_ok(body, n):
    return body == (MARK * (n // 32 + 1))[:n]


def tls_ctx(ctx, agent, leaf):
    c = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    c.check_hostname = False
    c.load_verify_locations(cadata=agent.roots)
    if leaf:
        fd, f = tempfile.mkstemp(dir=ctx.tmp, suffix=".pem")
        os.write(fd, (leaf["CertPEM"] + "\n" + leaf["PrivateKeyPEM"]).encode())
        os.close(fd)
        c.load_cert_chain(f)
        os.unlink(f)
    return c


def mtls_get(pair, c, path="/1024", timeout=5, grpc=False):
    raw = socket.create_connection(("127.0.0.1", pair.public), timeout)
    raw.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)  # else Nagle and delayed ACK add 40 ms of ours
    with c.wrap_socket(raw, server_hostname=pair.agent.sni(pair.app)) as s:
        if grpc:  # only that HTTP/2 answers
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
            got = s.recv(9)
            return (b"h2" if got[3:4] == b"\4" else b""), s.getpeercert(True), s.version(), s.cipher()[0]
        return http_get(0, path, timeout, s, keep=True), s.getpeercert(True), s.version(), s.cipher()[0]


def verify(ctx, peer, pair, mode):
    """Fails loudly unless client app -> sidecar -> mTLS -> sidecar -> app is what happens."""
    if not pair.tls:
        if not body_ok(http_get(pair.upstream, "/1024"), 1024):
            raise Bad("wrong body")
        pair.facts = {"tls": "none (floor)"}
        return
    nonce = "nonce" + os.urandom(8).hex()
    sniff = Sniff([pair.upstream, pair.public, ctx.origin_port]) if ctx.sniff else None
    hellos = []
    try:
        end = now() + 20
        while True:  # the upstream may need a moment to know its endpoints
            try:
                if mode == "grpc":
                    ctx.run_load(["h2", pair.upstream, 1, 1, 0.05])
                else:
                    if not body_ok(http_get(pair.upstream, f"/1024?{nonce}"), 1024):
                        raise Bad("wrong body through the pair")
                break
            except (Bad, OSError) as e:
                for p in pair.procs():
                    alive(p)
                if now() > end:
                    raise Bad(f"no traffic through the pair: {e}: {[tail(p, 3) for p in pair.procs()]}")
                time.sleep(0.05)
        if mode == "tcp":
            for _ in range(5):
                http_get(pair.upstream, f"/1024?{nonce}")
                time.sleep(0.02)
    finally:
        flows = sniff.stop() if sniff else {}
    if sniff:
        mesh = {k: v for k, v in flows.items() if pair.public in k}
        edge = [v for k, v in flows.items() if pair.upstream in k]
        app = [v for k, v in flows.items() if ctx.origin_port in k]
        if not mesh:
            raise Bad("nothing went over the public listener: the pair was bypassed")
        if not any(MARK in v for v in edge) or not any(MARK in v for v in app):
            raise Bad("the sniffer did not see the plain text where it must be")
        for k, v in mesh.items():
            if MARK in v or nonce.encode() in v:
                raise Bad("PLAIN TEXT between the sidecars")
            if v[0] not in (20, 21, 22, 23) or v[1] != 3:
                raise Bad("not TLS between the sidecars")
            if k[0] == pair.public and (h := server_hello(v)):
                hellos.append(h)
        if not hellos:
            raise Bad("no TLS handshake seen between the sidecars")
    if mode != "tcp":
        prove_l7(ctx, pair, mode)
    a = pair.agent
    leaf = a.leaf(pair.cli)
    try:
        with socket.create_connection(("127.0.0.1", pair.public), 3) as s:
            if MARK in plain_probe(s):
                raise Bad("the public listener answers PLAIN TEXT")
    except OSError:
        pass
    try:
        got = mtls_get(pair, tls_ctx(ctx, a, None), timeout=3, grpc=mode == "grpc")[0]
    except (OSError, Bad, ssl.SSLError):
        got = b""
    if got:
        raise Bad("the public listener serves clients WITHOUT a certificate")
    got, der, ver, cipher = mtls_get(pair, tls_ctx(ctx, a, leaf), grpc=mode == "grpc")
    if not (body_ok(got, 1024) or (mode == "grpc" and got == b"h2")):
        raise Bad("mTLS to the public listener: wrong answer")
    if a.spiffe(pair.app).encode() not in der:
        raise Bad("the public listener shows a certificate of another service")
    pair.facts = {"first": hellos[0] if hellos else None, "resumed": f"{sum(h['resumed'] for h in hellos)}/{len(hellos)}", "openssl-probe": [ver, cipher]}


def prove_l7(ctx, pair, mode):
    """A sidecar that reads HTTP opens nothing to the app before a whole request is there; a byte pipe does."""
    before = ctx.stats()["accepted"]
    with socket.create_connection(("127.0.0.1", pair.upstream), 5) as s:
        if mode == "grpc":
            s.sendall(b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0")
        else:
            s.sendall(b"GET /64 HTTP/1.1\r\nHost: app\r\n")
        time.sleep(0.3)
        after = ctx.stats()["accepted"] - 1
    if after != before:
        raise Bad(f"not L7 (service protocol {mode}): half a request already reached the app")


def plain_probe(s):
    s.settimeout(1.0)
    b = b""
    try:
        s.sendall(b"GET /1024 HTTP/1.1\r\nHost: app\r\n\r\n")
        while True:
            d = s.recv(65536)
            if not d:
                break
            b += d
    except OSError:
        pass
    return b

