"""A real Consul agent on ports of its own."""

import http.client
import json
import re
import urllib.parse

import pytest

from .identity import Identity
from .process import Process, run
from .wait import eventually


class ApiError(Exception):
    def __init__(self, status, text):
        super().__init__(f"{status} {text}")
        self.status, self.text = status, text


class Agent:
    """A development agent with `config` on top; with `persist` a server that keeps its state over a restart."""

    def __init__(self, binary, ports, directory, config=None, persist=False, token=None, datacenter="dc1", join_wan=None, label="agent"):
        self.binary, self.directory, self.token, self.label = binary, directory, token, label
        self.datacenter, self.version = datacenter, version_of(binary)
        self.port, self.wan_port = ports.take(), ports.take()
        taken = {"http": self.port, "dns": -1, "grpc": -1, "server": ports.take(), "serf_lan": ports.take(), "serf_wan": self.wan_port}
        if self.version >= (1, 14):
            taken["grpc_tls"] = -1
        self._config = {
            "node_name": f"{label}-{self.port}", "datacenter": datacenter, "bind_addr": "127.0.0.1", "client_addr": "127.0.0.1", "ports": taken,
            # The limit is shared by all sidecars that the scenarios of one worker run.
            "limits": {"http_max_conns_per_client": 4000},
            # Newer agents do that without being told: what config entries say of a service reaches its sidecar.
            "enable_central_service_config": True,
            **(config or {}),
            # After a change of root, agents renew leaves within 30 s; the scenarios want to see it sooner.
            "connect": {"enabled": True, "test_ca_leaf_root_change_spread": "1s", **(config or {}).get("connect", {})},
        }
        self._argv = [binary, "agent"]
        if persist:
            self._config |= {
                "server": True, "bootstrap_expect": 1, "data_dir": str(directory / f"{label}-data"),
                "performance": {"raft_multiplier": 1},
            }
        else:
            self._argv.append("-dev")
        if join_wan:
            self._config["retry_join_wan"] = [f"127.0.0.1:{join_wan.wan_port}"]
        self._file = directory / f"{label}.json"
        self._argv += ["-config-file", str(self._file)]
        self.process = None

    # Life

    def configure(self, more):
        """Adds to its configuration, for the next start."""
        self._config |= {key: {**self._config.get(key, {}), **value} if isinstance(value, dict) else value for key, value in more.items()}

    def start(self):
        self._file.write_text(json.dumps(self._config))
        self.process = Process(self._argv, self.directory, self.label)
        eventually(self._has_leader, 40, f"{self.label} has a leader and a root certificate", every=0.05)
        return self

    def _has_leader(self):
        if not self.process.running():
            pytest.fail(f"{self.label} ended: {self.process.text()[-2000:]}")
        try:
            return self.get("/v1/status/leader") and self.get("/v1/agent/connect/ca/roots")["Roots"]
        except (ApiError, http.client.HTTPException):
            return False

    def kill(self):
        self.process.kill()

    def stop(self):
        if self.process:
            self.process.end()

    # API

    @property
    def address(self):
        return f"127.0.0.1:{self.port}"

    @property
    def env(self):
        """Environment variables for a program that uses this agent."""
        return {"CONSUL_HTTP_ADDR": self.address, **({"CONSUL_HTTP_TOKEN": self.token} if self.token else {})}

    def call(self, method, path, body=None, token=None):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        token = token or self.token
        try:
            data = body if body is None or isinstance(body, bytes) else json.dumps(body)
            connection.request(method, path, data, {"X-Consul-Token": token} if token else {})
            answer = connection.getresponse()
            text = answer.read().decode(errors="replace")
        finally:
            connection.close()
        if answer.status >= 300:
            raise ApiError(answer.status, text)
        try:
            return json.loads(text) if text else None
        except ValueError:
            return text

    def get(self, path, token=None):
        return self.call("GET", path, token=token)

    def put(self, path, body=None, token=None):
        return self.call("PUT", path, body, token)

    def delete(self, path):
        return self.call("DELETE", path)

    def raw(self, path):
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path, headers={"X-Consul-Token": self.token} if self.token else {})
            return connection.getresponse().read()
        finally:
            connection.close()

    def headers(self, path):
        """The headers of an answer."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        try:
            connection.request("GET", path, headers={"X-Consul-Token": self.token} if self.token else {})
            return dict(connection.getresponse().getheaders())
        finally:
            connection.close()

    def consul(self, *words):
        """Runs the `consul` command against this agent; returns its output, and fails when it does."""
        status, out, err = run([self.binary, *words], env=self.env)
        assert status == 0, f"consul {' '.join(words)}: {out}{err}"
        return out

    # What scenarios say

    def needs(self, version, why):
        """Skips the scenario, saying so, on an agent that is older than `version`."""
        if self.version < version:
            have, want = (".".join(map(str, v)) for v in (self.version, version))
            pytest.skip(f"SKIPPED because the agent is {have}: {why} needs {want} or newer (set CONSUL_BIN to one)")

    @property
    def trust_domain(self):
        return self.get("/v1/agent/connect/ca/roots")["TrustDomain"]

    def roots(self):
        """Every root that the mesh trusts, as PEM."""
        return "".join(root["RootCert"].strip() + "\n" for root in self.get("/v1/agent/connect/ca/roots")["Roots"])

    def active_root(self):
        """The one that signs now, as PEM."""
        return next(root["RootCert"].strip() for root in self.get("/v1/agent/connect/ca/roots")["Roots"] if root["Active"])

    def leaf(self, service, token=None):
        got = self.get(f"/v1/agent/connect/ca/leaf/{urllib.parse.quote(service)}", token)
        return Identity(got["CertPEM"], got["PrivateKeyPEM"])

    def spiffe(self, service):
        # As Go escapes a segment of a path.
        return f"spiffe://{self.trust_domain}/ns/default/dc/{self.datacenter}/svc/{urllib.parse.quote(service, safe='$&+:=@')}"

    def sni(self, service):
        return f"{service}.default.{self.datacenter}.internal.{self.trust_domain}"

    def intention(self, source, destination, action):
        """Creates or replaces an intention; returns a function that takes it away."""
        if self.version >= (1, 9):
            where = "/v1/connect/intentions/exact?" + urllib.parse.urlencode({"source": source, "destination": destination})
            self.put(where, {"Action": action})
            return lambda: self.delete(where)
        for old in self.get("/v1/connect/intentions") or []:
            if (old["SourceName"], old["DestinationName"]) == (source, destination):
                self.put(f"/v1/connect/intentions/{old['ID']}", {"SourceName": source, "DestinationName": destination, "Action": action})
                return lambda: self.delete(f"/v1/connect/intentions/{old['ID']}")
        made = self.call("POST", "/v1/connect/intentions", {"SourceName": source, "DestinationName": destination, "Action": action})
        return lambda: self.delete(f"/v1/connect/intentions/{made['ID']}")

    def write(self, kind, name, **fields):
        """Writes a config entry."""
        self.put("/v1/config", {"Kind": kind, "Name": name, **fields})

    def health(self, check, status):
        """Sets the state of a TTL check: pass, warn or fail."""
        self.put(f"/v1/agent/check/{status}/{urllib.parse.quote(check)}")

    def rotate_root(self, authority=None):
        """Makes the agent sign with a new root (`authority`, or one that it makes itself)."""
        now = self.get("/v1/connect/ca/configuration")
        config = {k: v for k, v in now["Config"].items() if k not in ("RootCert", "PrivateKey")}
        if authority:
            config |= {"RootCert": authority.cert_pem, "PrivateKey": authority.key_pem}
        else:
            # Another kind of key than the present one is what makes Consul generate a new root.
            config |= {"PrivateKeyType": "rsa", "PrivateKeyBits": 2048}
        self.put("/v1/connect/ca/configuration", {"Provider": "consul", "Config": config})


def version_of(binary):
    status, out, err = run([binary, "version"])
    assert status == 0, out + err
    return tuple(int(part) for part in re.search(r"v(\d+)\.(\d+)\.(\d+)", out).groups())
