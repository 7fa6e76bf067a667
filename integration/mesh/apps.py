"""Apps behind and in front of sidecars: plain TCP, in threads."""

import socket
import struct
import threading

from .wait import TEST_TIMEOUT


class Conn:
    """A connection with the few things that scenarios do with one; plain or TLS."""

    def __init__(self, sock, within=TEST_TIMEOUT):
        self.sock = sock
        sock.settimeout(within)

    def send(self, data):
        self.sock.sendall(data)
        return self

    def take(self, size):
        """Exactly `size` bytes, or what came before the end."""
        got = bytearray()
        while len(got) < size:
            part = self.sock.recv(min(size - len(got), 1 << 20))
            if not part:
                break
            got += part
        return bytes(got)

    def line(self):
        got = bytearray()
        while not got.endswith(b"\n"):
            part = self.sock.recv(1)
            if not part:
                break
            got += part
        return bytes(got)

    def rest(self):
        """Everything up to the end of the stream."""
        got = bytearray()
        while part := self.sock.recv(1 << 20):
            got += part
        return bytes(got)

    def ask(self, data):
        """Sends, and takes as much back."""
        return self.send(data).take(len(data))

    def finish(self):
        """Ends our direction: a FIN."""
        self.sock.shutdown(socket.SHUT_WR)
        return self

    def reset(self):
        """Ends abruptly: a RST."""
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.sock.close()

    def end(self, within=TEST_TIMEOUT):
        """How the peer ended the connection, waited for at most `within` seconds: "fin", "reset", or "open" when it did not."""
        self.sock.settimeout(within)
        try:
            while self.sock.recv(65536):
                pass
            return "fin"
        except TimeoutError:
            return "open"
        except ConnectionError:
            return "reset"

    def is_open(self):
        """Whether nothing has ended the connection up to now (for a connection with nothing to read)."""
        return self.end(within=0.001) == "open"

    def close(self):
        self.sock.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def dial(port, within=TEST_TIMEOUT, host="127.0.0.1"):
    """A connection to a local port, or to a unix socket when `port` is a path."""
    if isinstance(port, int):
        sock = socket.create_connection((host, port), within)
        sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    else:
        sock = socket.socket(socket.AF_UNIX)
        sock.settimeout(within)
        sock.connect(str(port))
    return Conn(sock, within)


class App:
    """Accepts on a port and serves each connection in a thread of its own."""

    def __init__(self, port, host="127.0.0.1"):
        self.port, self.served = port, 0
        self._open, self._lock = set(), threading.Lock()
        if isinstance(port, int):
            self._listener = socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET)
            self._listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            self._listener.bind((host, port))
        else:
            self._listener = socket.socket(socket.AF_UNIX)
            self._listener.bind(str(port))
        self._listener.listen(4096)
        threading.Thread(target=self._accept, daemon=True).start()

    def serve(self, conn):
        raise NotImplementedError

    def open(self):
        with self._lock:
            return len(self._open)

    def close(self):
        """Ends the listener and every connection."""
        try:
            self._listener.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass
        self._listener.close()
        with self._lock:
            still = list(self._open)
        for sock in still:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def _accept(self):
        while True:
            try:
                sock, _ = self._listener.accept()
            except OSError:
                return
            with self._lock:
                self.served += 1
                self._open.add(sock)
            threading.Thread(target=self._serve, args=(sock,), daemon=True).start()

    def _serve(self, sock):
        try:
            if sock.family != socket.AF_UNIX:
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            self.serve(Conn(sock, None))
        except OSError:
            pass
        finally:
            with self._lock:
                self._open.discard(sock)
            sock.close()


class Echo(App):
    """Sends back what comes, up to the end; with a `greeting` it first says who it is."""

    def __init__(self, port, greeting=b"", host="127.0.0.1"):
        self.greeting = greeting
        self.ends = []
        super().__init__(port, host)

    def serve(self, conn):
        conn.send(self.greeting)
        try:
            while data := conn.sock.recv(1 << 18):
                conn.send(data)
            self.ends.append("fin")
        except ConnectionError:
            self.ends.append("reset")


class HalfCloser(App):
    """Ends its own direction at once after a greeting, then collects what the client goes on to send."""

    def __init__(self, port):
        self.got = []
        super().__init__(port)

    def serve(self, conn):
        conn.send(b"that was all\n").finish()
        self.got.append(conn.rest())


class Resetter(App):
    """Takes a line, then ends with a reset."""

    def serve(self, conn):
        conn.line()
        conn.reset()


class Silent(App):
    """Never says a word, and keeps the connection until the client ends it."""

    def serve(self, conn):
        conn.rest()


class Blackhole:
    """Listens, but answers no connect: its backlog is full of connections that nobody takes."""

    def __init__(self, port, host="127.0.0.1"):
        self._sockets = [socket.socket()]
        self._sockets[0].setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._sockets[0].bind((host, port))
        self._sockets[0].listen(0)
        # The kernel takes one more than it is told. The others ask again and again, so that it stays full.
        for _ in range(8):
            filler = socket.socket()
            filler.setblocking(False)
            filler.connect_ex((host, port))
            self._sockets.append(filler)

    def close(self):
        for each in self._sockets:
            each.close()
