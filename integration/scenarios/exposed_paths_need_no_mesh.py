"""`Expose.Paths`: those paths and no others are reached in plain HTTP, for health checks and scrapes."""

from mesh import Web, ask, eventually
from mesh.ports import is_listening


def exposing(mesh, path, **proxy):
    port = mesh.ports.take()
    listed = [{"ListenerPort": port, "LocalPathPort": 0, **({"Path": path} if isinstance(path, str) else path)}]
    service = mesh.service("exposing", app=Web, sidecar=None, proxy={"Config": {"protocol": "http"}, **proxy})
    expose(service, listed)
    service.start()
    eventually(lambda: is_listening(port), what="the exposed port is listened on")
    return service, port


def expose(service, listed):
    service.proxy["Expose"] = {"Paths": [{**path, "LocalPathPort": path["LocalPathPort"] or service.port} for path in listed]}
    service.register()


def test_exposed_paths_and_no_others(mesh):
    service, port = exposing(mesh, "/health")
    for path, status in (("/health", 200), ("/health?full", 200), ("/", 404), ("/healthz", 404), ("/health/", 404), ("/Health", 404)):
        assert ask(port, path).status == status, path
    seen = ask(port, "/health", headers={"x-forwarded-client-cert": "URI=spiffe://forged"}).seen()
    assert "x-forwarded-client-cert" not in dict(seen["headers"])


def test_intentions_have_no_say(mesh):
    service, port = exposing(mesh, "/health")
    mesh.deny("*", service)
    assert ask(port, "/health").status == 200


def test_another_port_of_the_app_may_be_exposed(mesh):
    other = mesh.keep(Web(mesh.ports.take()))
    _, port = exposing(mesh, {"Path": "/health", "LocalPathPort": other.port})
    assert ask(port, "/health").status == 200
    assert [seen["path"] for seen in other.requests] == ["/health"]


def test_a_tcp_service_may_expose_paths_too(mesh):
    service, port = exposing(mesh, "/health", Config={"protocol": "tcp"})
    assert ask(port, "/health").status == 200 and ask(port, "/").status == 404


def test_changes_are_live(mesh):
    service, port = exposing(mesh, "/health")
    expose(service, [{"ListenerPort": port, "LocalPathPort": 0, "Path": "/ready"}])
    eventually(lambda: ask(port, "/ready").status == 200)
    assert ask(port, "/health").status == 404
    expose(service, [])
    eventually(lambda: not is_listening(port))


def test_exposed_checks_are_told_to_be_unsupported(mesh):
    service = mesh.service("exposing", app=Web, proxy={"Expose": {"Checks": True}})
    assert service.process.logged(r"Expose\.Checks is not supported")
