"""A real Prometheus that scrapes the sidecars of a scenario, and its promtool."""

import json
import math
import os
import pathlib
import re
import shutil
import subprocess
import urllib.parse

import pytest

from .process import Process
from .wait import TEST_TIMEOUT, eventually
from .web import ask

TOP = pathlib.Path(__file__).resolve().parents[2]
DOCS = TOP / "docs/prometheus"


def program(name, variable):
    """The path of a program of Prometheus; skips the scenario, saying so, where there is none."""
    named = os.environ.get(variable) or shutil.which(name) or str(TOP / ".cache/prometheus/usr/bin" / name)
    if not os.path.exists(named):
        pytest.skip(f"SKIPPED because there is no {name}: install Debian's package prometheus, or name the program in {variable}")
    return named


def promtool(*words, text=None):
    """(status, output and errors)"""
    done = subprocess.run([program("promtool", "PROMTOOL_BIN"), *map(str, words)], input=text, capture_output=True, text=True, timeout=TEST_TIMEOUT)
    return done.returncode, done.stdout + done.stderr


class Prometheus(Process):
    """Runs the configuration of docs/prometheus, and looks each second.

    Debian's Prometheus is built without what asks Consul. Targets therefore come from a file, with the labels that it would give them.
    """

    def __init__(self, binary, port, directory, agent):
        self.port = port
        targets, file = directory / "targets.json", directory / "prometheus.yml"
        targets.write_text(json.dumps(list(discovered(agent))))
        text = (DOCS / "prometheus.yml").read_text().replace("alerts.yml", str(DOCS / "alerts.yml"))
        text, found = re.subn(r"consul_sd_configs: &consul\n( *)- server: .*", rf"file_sd_configs: &consul\n\1- files: [{targets}]", text)
        text = text.replace("consul_sd_configs: *consul", "file_sd_configs: *consul")
        assert found == 1 and "consul_sd" not in text
        file.write_text(f"global: {{scrape_interval: 1s, evaluation_interval: 1s}}\n{text}")
        super().__init__([binary, f"--config.file={file}", f"--storage.tsdb.path={directory / 'tsdb'}",
                          f"--web.listen-address=127.0.0.1:{port}", "--log.level=warn"], directory, "prometheus")
        eventually(lambda: not self.running() or ask(port, "/-/ready").status == 200, 60, "Prometheus is ready")
        assert self.running(), self.text()

    def get(self, path, **query):
        answer = ask(self.port, f"/api/v1/{path}?{urllib.parse.urlencode(query)}")
        content = json.loads(answer.body)
        assert content["status"] == "success", f"{query}: {content}"
        return content["data"]

    def query(self, text):
        """The present answer: [(labels, number)]."""
        return [(each["metric"], float(each["value"][1])) for each in self.get("query", query=text)["result"]]

    def number(self, text):
        """The only number that it answers, `None` where there is none."""
        found = self.query(text)
        assert len(found) <= 1, f"{text}: {found}"
        return found[0][1] if found and not math.isnan(found[0][1]) else None

    def sees(self, sidecars):
        """Waits until each of the sidecars is scraped by both jobs, without an error."""
        def holds():
            targets = self.get("targets")["activeTargets"]
            faults = [each["lastError"] for each in targets if each["health"] != "up"]
            assert not faults, faults
            assert sorted(each["labels"]["sidecar"] for each in targets) == sorted(2 * sidecars), targets
            return True
        eventually(holds, 40, "Prometheus scrapes every sidecar", every=0.2)

    def looked(self):
        """Waits until every target has been scraped since now."""
        now = self.number("vector(time())")
        eventually(lambda: self.number("min(timestamp(up))") > now, 40, "Prometheus has looked once more", every=0.1)


def discovered(agent):
    """Every instance as Prometheus finds it in Consul, whether it has metrics or not."""
    for service in agent.get("/v1/catalog/services"):
        for row in agent.get(f"/v1/health/service/{service}"):
            node, about = row["Node"], row["Service"]
            meta = {f"__meta_consul_service_metadata_{re.sub(r'[^a-zA-Z0-9_]', '_', key)}": value for key, value in (about["Meta"] or {}).items()}
            yield {"targets": [f"{about['Address'] or node['Address']}:{about['Port']}"], "labels": {
                "__meta_consul_service": about["Service"], "__meta_consul_service_id": about["ID"], "__meta_consul_address": node["Address"],
                "__meta_consul_service_address": about["Address"], "__meta_consul_dc": node["Datacenter"], **meta}}
