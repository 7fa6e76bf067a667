"""Traffic that no intention matches: the agent's two default policies, in every combination, as Envoy goes by them under the same agent.

With `ENVOY_BIN` (any version, configured by `consul connect envoy`) the same cases run with Envoy as the server's sidecar.
"""

import itertools
import os

import pytest

from mesh import ask, eventually
from mesh.ports import is_listening

MASTER = "9f3d7c1e-5a42-4f0e-9d0a-6c1b2e8f7a55"
POLICIES = ("allow", "deny")


def start_envoy(mesh, service, grpc_port):
    words = [mesh.binaries["consul"], "connect", "envoy", "-sidecar-for", service.id, "-ignore-envoy-compatibility",
             "-envoy-binary", os.environ["ENVOY_BIN"], "-admin-bind", f"127.0.0.1:{mesh.ports.take()}",
             "-grpc-addr", f"127.0.0.1:{grpc_port}", "--", "-l", "error", "--concurrency", "1"]
    service.process = mesh.run(words, f"envoy-{service.id}", mesh.agent.env)
    eventually(lambda: is_listening(service.public), 30, f"Envoy listens for {service.id}")


def start(mesh, service, sidecar, grpc_port):
    if sidecar == "envoy":
        start_envoy(mesh, service, grpc_port)
    else:
        service.start()


@pytest.mark.parametrize("sidecar", ["lictor", "envoy"])
@pytest.mark.parametrize("acls", [True, False], ids=["acls", "no acls"])
@pytest.mark.parametrize("default, intentions", itertools.product(POLICIES, POLICIES))
def test_the_policy_for_intentions_decides_whatever_that_of_acls(own_mesh, shared_agent, sidecar, acls, default, intentions):
    shared_agent.needs((1, 18), "default_intention_policy")
    if sidecar == "envoy" and not os.environ.get("ENVOY_BIN"):
        pytest.skip("SKIPPED: ENVOY_BIN names no Envoy to compare with")
    acl = {"enabled": acls, "default_policy": default, **({"tokens": {"initial_management": MASTER}} if acls else {})}
    mesh = own_mesh({"primary_datacenter": "dc1", "acl": acl, "default_intention_policy": intentions}, start=False, **({"token": MASTER} if acls else {}))
    grpc_port = mesh.ports.take()
    mesh.agent.configure({"ports": {"grpc": grpc_port}})
    mesh.agent.start()
    bytes_, web = mesh.service("bytes", sidecar=None), mesh.web("web", sidecar=None)
    ruled = mesh.web("ruled", sidecar=None)
    client = mesh.service("client", [bytes_, web, ruled], app=None)
    permission = {"Action": "allow" if intentions == "deny" else "deny", "HTTP": {"PathExact": "/named"}}
    mesh.agent.write("service-intentions", ruled.name, Sources=[{"Name": client.name, "Permissions": [permission]}])
    for service in (bytes_, web, ruled):
        start(mesh, service, sidecar, grpc_port)
    allowed, port = intentions == "allow", client.port_to
    eventually(lambda: client.reaches(bytes_) if allowed else client.refused(bytes_))
    eventually(lambda: ask(port(web)).status == (200 if allowed else 403))
    # What no permission names.
    eventually(lambda: (ask(port(ruled), "/other").status, ask(port(ruled), "/named").status) == ((200, 403) if allowed else (403, 200)))
