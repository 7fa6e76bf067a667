"""A gate between sidecars and their agent: it passes, shuts, or lies, and keeps what was asked for."""

import socket
import threading

from .apps import App

RUBBISH = b"\x16\x03\x01\x02\x00 this is not what was asked for {{{"
FAULT = b"HTTP/1.1 500 Internal Server Error\r\nContent-Length: 29\r\nX-Consul-Index: 1\r\nConnection: close\r\n\r\nrpc error: No cluster leader\n"
NOT_JSON = b"HTTP/1.1 200 OK\r\nContent-Length: 11\r\nX-Consul-Index: 9\r\nConnection: close\r\n\r\n{\"Roots\": ["


class Gate(App):
    """Listens on a port of its own and passes each connection on to `agent_port`.

    `mode` is "pass", "refuse" (close at once), "hang" (accept, never answer), "fault" (500 to everything),
    "broken" (200 with half a body) or "rubbish" (no HTTP at all). A change of it ends the connections of before.
    """

    def __init__(self, port, agent_port, host="127.0.0.1"):
        self.agent_port, self._mode, self.requests, self.most_open = agent_port, "pass", b"", 0
        super().__init__(port, host)

    @property
    def mode(self):
        return self._mode

    @mode.setter
    def mode(self, mode):
        self._mode = mode
        with self._lock:
            still = list(self._open)
        for sock in still:
            try:
                sock.shutdown(socket.SHUT_RDWR)
            except OSError:
                pass

    def carried_request(self, text):
        """Whether this has been in a request."""
        return text.encode() in self.requests

    def serve(self, conn):
        self.most_open = max(self.most_open, self.open())
        match self._mode:
            case "refuse":
                return
            case "pass":
                self._relay(conn.sock)
            case "hang":
                conn.rest()
            case mode:
                answer = {"fault": FAULT, "broken": NOT_JSON, "rubbish": RUBBISH}[mode]
                while conn.sock.recv(65536):
                    conn.send(answer)

    def _relay(self, near):
        try:
            far = socket.create_connection(("127.0.0.1", self.agent_port), 5)
        except OSError:
            return
        far.settimeout(None)
        back = threading.Thread(target=copy, args=(far, near), daemon=True)
        back.start()
        copy(near, far, self._remember)
        back.join()
        far.close()

    def _remember(self, data):
        with self._lock:
            self.requests += data


def copy(source, sink, look=lambda data: None):
    try:
        while data := source.recv(65536):
            look(data)
            sink.sendall(data)
    except OSError:
        pass
    for sock, how in ((sink, socket.SHUT_WR), (source, socket.SHUT_RD)):
        try:
            sock.shutdown(how)
        except OSError:
            pass
