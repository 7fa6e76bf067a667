"""An agent double: it answers what a real agent has answered, recorded by `scripts/record-agent`.

Only what speaks of configuration is recorded. Certificates and token keys are made anew, so that nothing expires and no key is kept,
and ports are those that are free.
"""

import base64
import json
import pathlib
import threading
import urllib.parse
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from .identity import Authority
from .rules import filled

RECORDED = pathlib.Path(__file__).resolve().parent.parent / "recorded"
# Parameters that say how to answer, not what is asked.
HOW = ("index", "wait", "hash", "stale", "dc", "ns", "partition", "compile-dc")
LONGEST_WAIT = 300.0
# In every answer of an agent since 1.9.
POLICY = "X-Consul-Default-ACL-Policy"


def recordings():
    return sorted(RECORDED.glob("*.json"))


def question(method, path):
    """The key of an answer: the request without parameters that only say how to wait."""
    url = urllib.parse.urlsplit(path)
    params = [(k, v) for k, v in urllib.parse.parse_qsl(url.query, keep_blank_values=True) if k not in HOW]
    return f"{method} {url.path}" + (f"?{urllib.parse.urlencode(sorted(params))}" if params else "")


class Recording:
    def __init__(self, file):
        recorded = json.loads(file.read_text())
        self.name, self.version, self.trust_domain = file.stem, tuple(recorded["version"]), recorded["trust_domain"]
        self._common, self._states = recorded["common"], recorded["states"]

    def has(self, state):
        return state in self._states

    def answers(self, state, default):
        return {**self._common[default], **self._states[state]}


class Double:
    """Answers as the recorded agent did while it was in a state. `show` brings it into another one, which is told at once."""

    def __init__(self, recording, ports, issuer, keys_port):
        self.recording, self.ports, self.port = recording, ports, ports["agent"]
        self._issuer, self._keys_port = issuer, keys_port
        self.authority = Authority(recording.trust_domain)
        self._identities, self._answers, self._index, self._policy = {}, {}, 1, {}
        self._changed = threading.Condition()
        self.unknown = []
        double = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def do_GET(self):
                self.answer()

            def do_POST(self):
                self.rfile.read(int(self.headers.get("content-length", 0)))
                self.answer()

            do_PUT = do_POST

            def answer(self):
                status, headers, body = double.answer(self.command, self.path)
                self.send_response(status)
                for name, value in {**headers, "content-length": str(len(body))}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(body)

            def handle_one_request(self):
                try:
                    super().handle_one_request()
                except ConnectionError:
                    self.close_connection = True

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    env = property(lambda self: {"CONSUL_HTTP_ADDR": f"127.0.0.1:{self.port}"})
    version = property(lambda self: self.recording.version)

    def show(self, state, default):
        text = json.dumps(self.recording.answers(state, default))
        for name, port in self.ports.items():
            text = text.replace(f'"@{name}@"', str(port)).replace(f"@{name}@", str(port))
        answers = json.loads(filled(text, self._issuer, self._keys_port))
        with self._changed:
            self._policy = {POLICY: default}
            self._index += 1
            for key, answer in answers.items():
                before = self._answers.get(key)
                same = before and before["answer"] == answer
                self._answers[key] = before if same else {"answer": answer, "index": self._index}
            # Entries that this state does not have are gone.
            for key in self._answers.keys() - answers.keys():
                self._answers[key] = {"answer": {"status": 404, "body": "Config entry not found"}, "index": self._index}
            self._changed.notify_all()
        return self

    def answer(self, method, path):
        params = dict(urllib.parse.parse_qsl(urllib.parse.urlsplit(path).query, keep_blank_values=True))
        key = question(method, path)
        made = self._made(urllib.parse.urlsplit(path).path)
        if made:
            return self._blocking(lambda: {"answer": {"status": 200, "body": made}, "index": 1}, params, False)
        found = lambda: self._table(key) or self._answers.get(key) or self._missing(key)
        return self._blocking(found, params, key.startswith("GET /v1/agent/service/"))

    def _blocking(self, found, params, by_hash):
        wait = min(float(params.get("wait", "300000ms").removesuffix("ms")) / 1000, LONGEST_WAIT)
        unchanged = lambda: (params.get("hash") == str(found()["index"]) if by_hash else int(params.get("index", 0)) >= found()["index"])
        with self._changed:
            self._changed.wait_for(lambda: not unchanged(), wait)
            now = found()
        answer, index = now["answer"], str(now["index"])
        body = answer["body"] if isinstance(answer["body"], str) else json.dumps(answer["body"])
        headers = {"X-Consul-ContentHash": index} if by_hash else {"X-Consul-Index": index}
        return answer["status"], {**self._policy, **headers, **answer.get("headers", {})}, body.encode()

    def _table(self, key):
        """What an agent's index tells of a whole table: of nodes, services and checks here, of config entries there."""
        if key.startswith("GET /v1/internal/ui/services"):
            return {"answer": {"status": 200, "body": []}, "index": self._index}
        if key.startswith("GET /v1/config/proxy-defaults"):
            answer = self._answers.get(key) or {"answer": {"status": 404, "body": "Config entry not found"}}
            return {**answer, "index": self._index}
        return None

    def _missing(self, key):
        if not key.startswith("GET /v1/config/"):
            self.unknown.append(key)
        return {"answer": {"status": 404, "body": "Config entry not found"}, "index": 1}

    def _made(self, path):
        """Certificates, made here and not recorded."""
        if path == "/v1/agent/connect/ca/roots":
            return {"ActiveRootID": "1", "TrustDomain": self.recording.trust_domain,
                    "Roots": [{"ID": "1", "Name": "Root of the double", "RootCert": self.authority.cert_pem, "Active": True}]}
        if path.startswith("/v1/agent/connect/ca/leaf/"):
            service = urllib.parse.unquote(path.rsplit("/", 1)[1])
            identity = self.leaf(service)
            return {"CertPEM": identity.cert_pem, "PrivateKeyPEM": identity.key_pem, "Service": service, "ServiceURI": identity.uri}
        return None

    # As a real agent's, for scenarios

    def roots(self):
        return self.authority.cert_pem

    def leaf(self, service):
        if service not in self._identities:
            self._identities[service] = self.authority.issue(f"spiffe://{self.recording.trust_domain}/ns/default/dc/dc1/svc/{service}")
        return self._identities[service]

    def close(self):
        self._server.shutdown()
        self._server.server_close()


class Keys:
    """Serves a key set."""

    def __init__(self, port, issuer):
        body = json.dumps(issuer.key_set()).encode()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                self.send_response(200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_):
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", port), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()


def marked(value, ports, issuer, keys_port):
    """An answer with marks in the place of what `Double` makes anew."""
    key_set = base64.b64encode(json.dumps(issuer.key_set()).encode()).decode()
    if isinstance(value, dict):
        return {key: marked(item, ports, issuer, keys_port) for key, item in value.items()}
    if isinstance(value, list):
        return [marked(item, ports, issuer, keys_port) for item in value]
    if isinstance(value, int) and not isinstance(value, bool):
        return next((f"@{name}@" for name, port in ports.items() if port == value), value)
    if isinstance(value, str):
        return value.replace(key_set, "@key-set@").replace(f":{keys_port}/", ":@keys-port@/")
    return value
