"""Apps that speak HTTP/1.1, and a client for them that shows what really goes over the wire."""

import contextlib
import http.client
import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .wait import TEST_TIMEOUT


class Web:
    """Answers each request with what it saw of it and its own name, as JSON, after a `delay` and with a `status`.

    Those may be changed at any time, and `answer` replaced to answer otherwise.
    """

    def __init__(self, port, host="127.0.0.1", name=""):
        self.port, self.name, self.requests, self.status, self.delay = port, name, [], 200, 0
        # Requests that are looked at and not answered yet.
        self.waiting, self._lock = 0, threading.Lock()
        app = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def __getattr__(self, name):
                if name.startswith("do_"):
                    return self.any
                raise AttributeError(name)

            def any(self):
                app.answer(self)

            def log_message(self, *_):
                pass

        self._server = Server((host, port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, request):
        body = self.take(request)
        self._count(1)
        try:
            time.sleep(self.delay)
            self.show(request, body, self.status)
        finally:
            self._count(-1)

    def _count(self, more):
        with self._lock:
            self.waiting += more

    def take(self, request):
        """The body, whole."""
        if "chunked" in request.headers.get("transfer-encoding", ""):
            body = bytearray()
            while size := int(request.rfile.readline().split(b";")[0], 16):
                body += request.rfile.read(size)
                request.rfile.readline()
            while request.rfile.readline().strip():
                pass
            return bytes(body)
        return request.rfile.read(int(request.headers.get("content-length", 0)))

    def show(self, request, body, status=200, headers=()):
        seen = {"app": self.name, "method": request.command, "path": request.path, "headers": [[k.lower(), v] for k, v in request.headers.items()],
                "body": body.decode("latin-1")}
        self.requests.append(seen)
        self.say(request, json.dumps(seen).encode(), status, headers)

    def say(self, request, body, status=200, headers=()):
        request.send_response_only(status)
        for name, value in headers:
            request.send_header(name, value)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        if request.command != "HEAD":
            request.wfile.write(body)

    def close(self):
        """Ends the listener and every connection."""
        self._server.shutdown()
        self._server.server_close()


class Server(ThreadingHTTPServer):
    # Many connections may come at once; the usual 5 would have most of them wait for a second.
    request_queue_size = 1024

    def __init__(self, *how):
        self._open = set()
        super().__init__(*how)

    def process_request(self, request, address):
        self._open.add(request)
        super().process_request(request, address)

    def shutdown_request(self, request):
        self._open.discard(request)
        super().shutdown_request(request)

    def server_close(self):
        super().server_close()
        for each in list(self._open):
            with contextlib.suppress(OSError):
                each.shutdown(socket.SHUT_RDWR)


class Answer:
    """A response, whole."""

    def __init__(self, status, headers, body):
        self.status, self.headers, self.body = status, [(k.lower(), v) for k, v in headers], body

    def header(self, name):
        """The values of a header, joined."""
        values = [value for key, value in self.headers if key == name]
        return ", ".join(values) if values else None

    def seen(self):
        """The request as the app received it."""
        assert self.status == 200, f"{self.status}: {self.body[:300]}"
        return json.loads(self.body)

    def seen_status(self):
        """The status, and which app gave it."""
        return self.status, json.loads(self.body)["app"]

    def __repr__(self):
        return f"<{self.status} {self.headers} {self.body[:200]}>"


class Browser:
    """A keep-alive connection on which requests are made one after the other."""

    def __init__(self, port, within=TEST_TIMEOUT):
        self.conn = http.client.HTTPConnection("127.0.0.1", port, timeout=within)

    def ask(self, path="/", method="GET", body=None, headers=None):
        self.conn.request(method, path, body, headers or {})
        response = self.conn.getresponse()
        return Answer(response.status, response.getheaders(), response.read())

    def close(self):
        self.conn.close()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()


def ask(port, path="/", method="GET", body=None, headers=None, within=TEST_TIMEOUT):
    """One request on a connection of its own."""
    with Browser(port, within) as browser:
        return browser.ask(path, method, body, headers)


def who(port, path="/", **more):
    """Which app answered, or the status and the text of an answer that is none of an app's."""
    answer = ask(port, path, **more)
    return answer.seen()["app"] if answer.status == 200 else f"{answer.status} {answer.body.decode()}"
