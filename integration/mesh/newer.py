"""A newer Consul than there is: an agent whose answers hold more than the real one's."""

import http.client
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Not passed on: they say how the answer was cut into pieces.
FRAMING = {"content-length", "transfer-encoding", "connection", "content-encoding"}


class NewerAgent:
    """Listens on a port of its own and has a real agent answer. `changes` are functions by the path of the question: they get an
    answer's JSON and change it. Set them before something asks, or have the agent's own state change after."""

    def __init__(self, port, agent):
        self.port, self.changes = port, {}
        newer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                body = self.rfile.read(int(self.headers.get("content-length", 0)))
                there = http.client.HTTPConnection("127.0.0.1", agent.port)
                try:
                    there.request(self.command, self.path, body or None, {"content-type": "application/json", "accept-encoding": "identity"})
                    answer = there.getresponse()
                    status, headers, text = answer.status, answer.getheaders(), answer.read()
                finally:
                    there.close()
                text = newer.changed(self.path.split("?")[0], status, text)
                self.send_response_only(status)
                for name, value in headers:
                    if name.lower() not in FRAMING:
                        self.send_header(name, value)
                self.send_header("content-length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            do_POST = do_PUT = do_GET

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except (OSError, http.client.HTTPException):
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    env = property(lambda self: {"CONSUL_HTTP_ADDR": f"127.0.0.1:{self.port}"})

    def changed(self, path, status, text):
        change = self.changes.get(path)
        if status != 200 or not change:
            return text
        answer = json.loads(text)
        change(answer)
        return json.dumps(answer).encode()

    def close(self):
        self._server.shutdown()
        self._server.server_close()
