"""order -> invoice -> tax with the registrations of service-defs/, and the demo that shows it."""

import json
import pathlib
import shutil
import subprocess
import sys
import urllib.error
import urllib.request

import pytest

from mesh import Mesh, eventually
from mesh.process import environment, run

TOP = pathlib.Path(__file__).resolve().parents[2]
NAMES = ("order", "invoice", "tax")


class Tutorial:
    """The three apps and their definitions, on ports that are free here."""

    def __init__(self, mesh_ports):
        self.app = {name: mesh_ports.take() for name in NAMES}
        self.public = {name: mesh_ports.take() for name in NAMES}
        self.upstream = {"order": mesh_ports.take(), "invoice": mesh_ports.take()}

    def definition(self, name):
        whole = json.loads((TOP / f"service-defs/{name}.json").read_text())
        service = whole["service"]
        assert service["port"] == {"order": 5000, "invoice": 5001, "tax": 5002}[name]
        service["port"] = self.app[name]
        sidecar = service["connect"]["sidecar_service"]
        sidecar["port"] = self.public[name]
        # The usual TCP check first looks after some seconds.
        sidecar["check"] = {"name": "sidecar", "ttl": "24h", "status": "passing"}
        for upstream in sidecar.get("proxy", {}).get("upstreams", []):
            assert upstream["local_bind_port"] == {"order": 6001, "invoice": 6002}[name]
            upstream["local_bind_port"] = self.upstream[name]
        return whole

    def run(self, mesh):
        for name in NAMES:
            upstream = [self.upstream[name]] if name in self.upstream else []
            mesh.run([sys.executable, TOP / "scripts/demo_app.py", name, self.app[name], *upstream], f"{name}-app")
            mesh.proxy("-sidecar-for", name, label=f"{name}-sidecar")

    def order(self):
        try:
            with urllib.request.urlopen(f"http://127.0.0.1:{self.app['order']}/", timeout=10) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            return error.code, json.load(error)


def works(tutorial):
    return tutorial.order() == (200, {"order": 1001, "invoice": {"net": 100, "tax": 25, "gross": 125}})


def fails_because_of_tax(tutorial):
    status, body = tutorial.order()
    return status == 502 and "tax" in body["error"]


@pytest.mark.parametrize("way", ["config directory", "consul services register", "API"])
def test_deny_and_delete_with_the_consul_command(start_agent, binaries, ports, tmp_path, stack, request, way):
    tutorial = Tutorial(ports)
    directory = tmp_path / "service-defs"
    directory.mkdir()
    for name in NAMES:
        (directory / f"{name}.json").write_text(json.dumps(tutorial.definition(name)))
    services = [tutorial.definition(name)["service"] for name in NAMES]
    agent = start_agent({"services": services} if way == "config directory" else {})
    mesh = request.node.mesh = Mesh(agent, binaries, ports, tmp_path, stack, "")
    if way == "consul services register":
        agent.consul("services", "register", *sorted(directory.iterdir()))
    if way == "API":
        for service in services:
            agent.put("/v1/agent/service/register", service)
    tutorial.run(mesh)
    eventually(lambda: works(tutorial), 40)
    with urllib.request.urlopen(f"http://127.0.0.1:{tutorial.app['invoice']}/follow", timeout=10) as follow:
        assert follow.readline() == follow.readline() == b"0.25\n"
        agent.consul("intention", "create", "-deny", "invoice", "tax")
        eventually(lambda: fails_because_of_tax(tutorial), within=2)
        # Some lines are on their way when the stream is cut; it goes on for ever when it is not.
        assert b"ended\n" in (follow.readline() for _ in range(30)), "the open stream is cut"
    agent.consul("intention", "delete", "invoice", "tax")
    eventually(lambda: works(tutorial), within=2)


def test_the_service_definitions_are_a_config_directory(binaries, tmp_path):
    needed = tmp_path / "needed.json"
    needed.write_text('{"data_dir": "/nonexistent", "bind_addr": "127.0.0.1"}')
    status, out, err = run([binaries["consul"], "validate", TOP / "service-defs", needed])
    assert status == 0, out + err


def test_the_demo_does_what_it_says(binaries, tmp_path):
    done = subprocess.run(
        [TOP / "scripts/demo"], capture_output=True, text=True, timeout=120, cwd=tmp_path,
        env={**environment(), "LICTOR_BIN": binaries["lictor"], "CONSUL_BIN": binaries["consul"], "TMPDIR": str(tmp_path)})
    assert done.returncode == 0, done.stdout + done.stderr
    assert "cut at once" in done.stdout and "of 100 orders, 0 were taxed by the first version" in done.stdout and "All of it went as told." in done.stdout
    assert list(tmp_path.iterdir()) == [], "it cleans up after itself"


def test_the_demo_fails_when_a_step_does(binaries, tmp_path):
    """A sidecar that ends at once is a step that did not do what it says."""
    done = subprocess.run(
        [TOP / "scripts/demo"], capture_output=True, text=True, timeout=120,
        env={**environment(), "LICTOR_BIN": shutil.which("false"), "CONSUL_BIN": binaries["consul"], "TMPDIR": str(tmp_path)})
    assert done.returncode == 1
    assert "sidecar ended by itself" in done.stderr
