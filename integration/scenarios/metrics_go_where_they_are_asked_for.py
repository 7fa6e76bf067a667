"""Where metrics go: listeners for scrapes and packets to statsd, as the registration asks, followed while the sidecar runs."""

import os
import re
import socket
import ssl
import urllib.request

import pytest

from mesh import Web, ask, eventually
from mesh.identity import Authority
from mesh.ports import is_listening


def web(mesh, *words, **config):
    service = mesh.service("web", sidecar=None, proxy={"Config": config})
    service.start("lictor", *words)
    return service


def change(service, **config):
    service.proxy = {"Config": config}
    service.register()


def test_a_listener_for_prometheus_follows_the_registration(mesh):
    first, second, stats = mesh.ports.take(), mesh.ports.take(), mesh.ports.take()
    service = web(mesh, envoy_prometheus_bind_addr=f"127.0.0.1:{first}", envoy_stats_tags=["env=lab", "canary"])
    answer = eventually(lambda: ask(first, "/metrics"))
    assert answer.status == 200 and answer.header("content-type").startswith("text/plain; version=0.0.4")
    labels = f'local_cluster="{service.name}",consul_source_service="{service.name}",consul_source_namespace="default",' \
             'consul_source_partition="default",consul_source_datacenter="dc1",env="lab",canary="1"'
    assert f"envoy_server_live{{{labels}}} 1" in answer.body.decode()
    # A scraper names this host as it likes, and gets nothing else.
    assert ask(first, "/metrics?usedonly", headers={"Host": "web.example:20200"}).status == 200
    for path in ("/", "/metrics/", "/stats", "/ready", "/quitquitquit"):
        assert ask(first, path, "POST").status == 404, path
    change(service, envoy_prometheus_bind_addr=f"127.0.0.1:{second}", envoy_stats_bind_addr=f"127.0.0.1:{stats}")
    eventually(lambda: ask(second, "/metrics").status == 200 and not is_listening(first))
    assert "canary" not in ask(second, "/metrics").body.decode()
    eventually(lambda: ask(stats, "/stats?filter=server.live").body == b"server.live: 1\n")
    assert ask(stats, "/stats/prometheus").status == 200 and ask(stats, "/ready").status == 404
    change(service)
    eventually(lambda: not is_listening(second) and not is_listening(stats))
    assert service.process.running()


def test_an_address_that_is_taken_is_tried_again(mesh):
    taken = socket.create_server(("127.0.0.1", 0))
    port = taken.getsockname()[1]
    service = web(mesh, envoy_prometheus_bind_addr=f"127.0.0.1:{port}")
    service.process.logged("The listener for metrics cannot be started; trying again")
    taken.close()
    eventually(lambda: ask(port, "/metrics").status == 200)


def test_scrapes_may_be_over_tls_and_under_another_path(mesh, tmp_path):
    authority = Authority("example.consul")
    identity = authority.issue("https://web.example")
    cert, key = tmp_path / "cert.pem", tmp_path / "key.pem"
    cert.write_text(identity.cert_pem)
    key.write_text(identity.key_pem)
    port = mesh.ports.take()
    web(mesh, "-prometheus-cert-file", str(cert), "-prometheus-key-file", str(key), "-prometheus-scrape-path", "/scrape",
        envoy_prometheus_bind_addr=f"127.0.0.1:{port}")
    context = ssl.create_default_context(cadata=authority.cert_pem)
    context.check_hostname = False

    def scrape(path):
        with urllib.request.urlopen(f"https://127.0.0.1:{port}{path}", context=context, timeout=5) as answer:
            return answer.read().decode()
    assert "envoy_server_live" in eventually(lambda: scrape("/scrape"))
    with pytest.raises(urllib.error.HTTPError):
        scrape("/metrics")


def test_a_backend_may_answer_in_our_place(mesh):
    app = mesh.ports.take()
    mesh.keep(Web(app, name="merged"))
    port = mesh.ports.take()
    web(mesh, "-prometheus-backend-port", str(app), envoy_prometheus_bind_addr=f"127.0.0.1:{port}")
    seen = eventually(lambda: ask(port, "/metrics?x=1").seen())
    assert (seen["app"], seen["path"]) == ("merged", "/metrics?x=1")


def receiver(mesh, family=socket.AF_INET, address=("127.0.0.1", 0)):
    received = mesh.keep(socket.socket(family, socket.SOCK_DGRAM))
    received.bind(address)
    received.settimeout(20)
    return received


def until(received, pattern):
    """Reads packets until a line matches."""
    for _ in range(2000):
        packet = received.recv(65536)
        assert len(packet) <= 1432
        for line in packet.decode().split("\n"):
            if match := re.fullmatch(pattern, line):
                return match
    raise AssertionError(f"no line like {pattern}")


def test_packets_go_to_statsd(mesh):
    statsd = receiver(mesh)
    service = mesh.service("web", sidecar=None, proxy={"Config": {
        "envoy_statsd_url": "udp://${HOST_IP}:%d" % statsd.getsockname()[1], "envoy_stats_flush_interval": "200ms"}})
    service.start("lictor", env={"HOST_IP": "127.0.0.1"})
    until(statsd, r"envoy\.server\.live:1\|g")
    until(statsd, r"envoy\.server\.live:1\|g")


@pytest.mark.parametrize("kind", ["udp", "unix"])
def test_packets_go_to_dogstatsd_with_tags(mesh, tmp_path, kind):
    if kind == "udp":
        dogstatsd = receiver(mesh)
        url = "udp://127.0.0.1:%d" % dogstatsd.getsockname()[1]
    else:
        path = os.fspath(tmp_path / "dsd.sock")
        dogstatsd, url = receiver(mesh, socket.AF_UNIX, path), f"unix://{path}"
    service = web(mesh, envoy_dogstatsd_url=url, envoy_stats_flush_interval="200ms", envoy_stats_tags=["env=lab"])
    line = until(dogstatsd, r"envoy\.server\.live:1\|g\|#(.*)")
    tags = dict(tag.split(":", 1) for tag in line[1].split(","))
    assert (tags["local_cluster"], tags["consul.source.service"], tags["env"]) == (service.name, service.name, "lab")
