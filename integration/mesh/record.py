"""Records what a real agent answers to a sidecar under each of the rules: `python -m mesh.record CONSUL DIRECTORY`."""

import json
import pathlib
import sys
import tempfile

from .agent import Agent, ApiError
from .double import marked, question
from .ports import Ports
from .process import run
from .rules import TABLE, agent_config, services, write
from .tokens import Issuer
from .wait import eventually

# Answers that are the same under all rules are recorded once for each default.
COMMON = ("/v1/agent/services", "/v1/agent/service/api-sidecar-proxy", "/v1/agent/service/web-sidecar-proxy", "/v1/discovery-chain/api",
          "/v1/health/connect/api", "/v1/connect/intentions/match?by=destination&name=web")
INTENTIONS = "/v1/connect/intentions/match?by=destination&name=api"
AUTHORIZE = "/v1/agent/connect/authorize"
# As the sidecar asks for the default: about a source that no intention is meant for.
STRANGER = "lictor-default-policy-probe"
PROBE = {"Target": "api", "ClientCertSerial": "01", "ClientCertURI": f"spiffe://probe.consul/ns/{STRANGER}/dc/dc1/svc/{STRANGER}"}
HEADERS = ("X-Consul-Default-ACL-Policy",)


def record(binary, directory):
    ports, issuer = Ports(), Issuer()
    fixed = {name: ports.take() for name in ("api", "api-public", "web", "web-public", "upstream")}
    keys_port = ports.take()
    recording = {"common": {}, "states": {}}
    for default in ("deny", "allow"):
        with tempfile.TemporaryDirectory() as scratch:
            agent = Agent(binary, ports, pathlib.Path(scratch), agent_config(default), label=default)
            try:
                agent.start()
                services(agent, fixed)
                eventually(lambda: agent.get("/v1/health/connect/api"))
                answers = Answers(agent, lambda body: marked(body, fixed, issuer, keys_port))
                recording |= {"version": agent.version, "trust_domain": agent.trust_domain} if default == "deny" else {}
                for rules in (rules for rules in TABLE if rules.default == default and agent.version >= rules.since):
                    write(agent, rules, issuer, keys_port)
                    recording["states"][rules.name] = answers.of_rules(rules)
                # The rules are gone, so that nothing but the default decides.
                write(agent, TABLE[0], issuer, keys_port)
                recording["common"][default] = answers.common()
                if default == "allow":
                    # Names hold the trust domain, which is that of the first agent.
                    text = json.dumps(recording["common"][default]).replace(agent.trust_domain, recording["trust_domain"])
                    recording["common"][default] = json.loads(text)
            finally:
                agent.stop()
    recording["recorded_from"] = run([binary, "version"])[1].splitlines()[0]
    name = recording["recorded_from"].lower().replace(" v", "-")
    file = pathlib.Path(directory) / f"{name}.json"
    file.write_text(json.dumps(recording, indent=1, sort_keys=True) + "\n")
    print(f"{file}: {len(recording['states'])} states")


class Answers:
    def __init__(self, agent, mark):
        self._agent, self._mark = agent, mark

    def common(self):
        # As asked for by an upstream whose protocol the agent has filled in.
        chain = self._ask("POST", "/v1/discovery-chain/api", {"OverrideProtocol": "http"})
        return dict([*(self._ask("GET", path) for path in COMMON), chain])

    def of_rules(self, rules):
        paths = [INTENTIONS]
        for entry in rules.entries():
            if entry["Kind"] in ("mesh", "jwt-provider"):
                paths.append(f"/v1/config/{entry['Kind']}/{entry.get('Name', 'mesh')}")
        # The agent's answer may lag behind what it has taken.
        eventually(lambda: bool(rules.sources) == bool(self._agent.get(INTENTIONS)["api"]), what=rules.name)
        return dict([*(self._ask("GET", path) for path in paths), self._ask("POST", AUTHORIZE, PROBE)])

    def _ask(self, method, path, body=None):
        try:
            status, answer = 200, self._agent.call(method, path, body)
        except ApiError as error:
            status, answer = error.status, error.text
        recorded = {"status": status, "body": self._mark(answer)}
        headers = {name: value for name, value in self._agent.headers(path).items() if name in HEADERS} if method == "GET" else {}
        return question(method, path), {**recorded, **({"headers": headers} if headers else {})}


if __name__ == "__main__":
    record(sys.argv[1], sys.argv[2])
