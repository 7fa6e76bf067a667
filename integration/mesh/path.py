"""The path to a sidecar, which takes time or is cut without a word."""

import collections
import contextlib
import socket
import threading
import time

from .apps import App
from .ports import is_listening
from .wait import eventually

BUFFER = 4 << 20


class Path(App):
    """Passes connections on to a port, each byte `delay` seconds after it came; nothing comes through while it is not `whole`."""

    def __init__(self, port, to, delay=0):
        self.to, self.delay, self.made, self.whole = to, delay, 0, threading.Event()
        # The most bytes of one direction of a connection that were on the path at one time.
        self.most_under_way = 0
        self.whole.set()
        super().__init__(port)

    def serve(self, conn):
        self.made += 1
        # A path that is cut carries no handshake either.
        self.whole.wait()
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", self.to)) as far:
            far.settimeout(None)
            conn.sock.settimeout(None)
            for sock in (far, conn.sock):
                sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            back = threading.Thread(target=self._pass, args=(far, conn.sock), daemon=True)
            back.start()
            self._pass(conn.sock, far)
            back.join()

    def _pass(self, source, sink):
        under_way, more, arrived = collections.deque(), threading.Semaphore(0), [0]
        came = 0
        arrive = threading.Thread(target=self._arrive, args=(under_way, more, sink, arrived), daemon=True)
        arrive.start()
        data = None
        while data != b"":
            try:
                data = source.recv(BUFFER)
            except OSError:
                data = b""
            under_way.append((time.monotonic() + self.delay, data))
            came += len(data)
            self.most_under_way = max(self.most_under_way, came - arrived[0])
            more.release()
        arrive.join()

    def _arrive(self, under_way, more, sink, arrived):
        with contextlib.suppress(OSError):
            while True:
                more.acquire()
                due, data = under_way.popleft()
                time.sleep(max(0, due - time.monotonic()))
                self.whole.wait()
                if not data:
                    return sink.shutdown(socket.SHUT_WR)
                sink.sendall(data)
                arrived[0] += len(data)

    def close(self):
        self.whole.set()
        super().close()


def instance(mesh, what, of=None, delay=0, words=(), config=None, **how):
    """An instance of a service that others reach by a path: (service, path)."""
    bound = mesh.ports.take()
    service = mesh.service(what, of=of, sidecar=None, proxy={"Config": {"bind_port": bound, **(config or {})}}, **how)
    path = mesh.keep(Path(service.public, bound, delay))
    service.start("lictor", *words, ready=False)
    eventually(lambda: is_listening(bound), what=f"{what} listens")
    return service, path
