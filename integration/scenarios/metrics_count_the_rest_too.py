"""What alerts in the wild use besides: requests and upgraded connections that are open, answers that are cut off, resumed sessions, limits, calls of
gRPC; and that nothing that a stranger invents becomes a series."""

import concurrent.futures
import contextlib
import socket
import ssl
import threading

from mesh import Upstream, Web, ask, eventually, mtls_connect
from mesh.identity import client_context
from mesh.rpc import Caller, Rpc
from mesh.series import Metrics

PUBLIC = {"envoy_http_conn_manager_prefix": "public_listener"}
LOCAL_APP = {"envoy_cluster_name": "local_app"}


class Held(Web):
    """Holds answers until it is told to go on: before their head, or (`/half`) after a part of the body and then breaks off. Upgrades at /upgrade."""

    def __init__(self, port):
        super().__init__(port)
        self.go_on = threading.Event()

    def answer(self, request):
        if request.path == "/hold":
            self.go_on.wait(30)
        elif request.path == "/half":
            request.send_response_only(200)
            request.send_header("content-length", "100")
            request.end_headers()
            request.wfile.write(b"half")
            request.wfile.flush()
            self.go_on.wait(30)
            request.close_connection = True
            return request.connection.shutdown(socket.SHUT_RDWR)
        elif request.path == "/upgrade":
            request.send_response_only(101)
            request.send_header("upgrade", "websocket")
            request.send_header("connection", "Upgrade")
            request.end_headers()
            request.close_connection = True
            while data := request.rfile.read1(1000):
                request.wfile.write(data)
            return None
        return self.show(request, self.take(request), 200)


def pair(mesh, app=Held, **config):
    db = mesh.service("db", app=app, protocol="http")
    upstream = Upstream(db.name, mesh.ports.take(), {"Config": {"protocol": "http", **config}})
    web = mesh.service("web", [upstream], app=None, protocol="http")
    eventually(lambda: ask(upstream.port).status == 200)
    return db, web, upstream.port


def test_requests_that_are_open_are_counted_on_both_sides(mesh, workers):
    db, web, port = pair(mesh)
    target = {"consul_destination_service": db.name}

    def active():
        return [Metrics(web)("envoy_cluster_upstream_rq_active", **target), Metrics(db)("envoy_cluster_upstream_rq_active", **LOCAL_APP),
                Metrics(web, "/metrics")("lictor_upstream_requests_active"), Metrics(db)("envoy_http_downstream_rq_active", **PUBLIC)]
    eventually(lambda: active() == [0] * 4)
    held = [workers.submit(ask, port, "/hold", within=60) for _ in range(3)]
    eventually(lambda: active() == [3] * 4)
    db.app.go_on.set()
    assert [each.result(60).status for each in held] == [200] * 3
    eventually(lambda: active() == [0] * 4)


def test_an_answer_that_breaks_off_is_a_reset_of_ours(mesh):
    db, web, port = pair(mesh)
    before = Metrics(db)("envoy_http_downstream_rq_tx_reset", **PUBLIC)
    with mesh.dial(port) as conn:
        conn.send(b"GET /half HTTP/1.1\r\nHost: x\r\n\r\n")
        assert b" 200 " in conn.line()
        db.app.go_on.set()
        with contextlib.suppress(ConnectionError):
            conn.rest()
    upstream = {"envoy_http_conn_manager_prefix": "upstream", "consul_upstream_service": db.name}
    eventually(lambda: Metrics(db)("envoy_http_downstream_rq_tx_reset", **PUBLIC) == before + 1)
    eventually(lambda: Metrics(web)("envoy_http_downstream_rq_tx_reset", **upstream) == 1)
    assert Metrics(web, "/metrics")("lictor_requests_cut_off_total", direction="outbound") == 1
    assert Metrics(web)("envoy_http_downstream_rq_rx_reset", **upstream) == 0


def test_all_bytes_of_http_are_counted_while_they_pass(mesh):
    db, web, port = pair(mesh)
    request = b"GET /x HTTP/1.1\r\nHost: x\r\nX-Long: " + b"x" * 500 + b"\r\n\r\n"
    listener, target = {"direction": "outbound"}, {"consul_destination_service": db.name}

    def counts():
        ours, envoy = Metrics(web, "/metrics"), Metrics(web)
        return [ours("lictor_received_bytes_total", **listener), ours("lictor_sent_bytes_total", **listener),
                envoy("envoy_cluster_upstream_cx_tx_bytes_total", **target), envoy("envoy_cluster_upstream_cx_rx_bytes_total", **target)]
    with mesh.dial(port) as conn:
        before, answered = counts(), 0
        for _ in range(3):
            conn.send(request)
            head = b""
            while not head.endswith(b"\r\n\r\n"):
                head += conn.line()
            [length] = [int(line.split(b":")[1]) for line in head.split(b"\r\n") if line.lower().startswith(b"content-length:")]
            answered += len(head) + len(conn.take(length))
        # The connection is still open.
        eventually(lambda: [now - then for now, then in zip(counts(), before)][:2] == [3 * len(request), answered])
        sent, received = [now - then for now, then in zip(counts(), before)][2:]
    # Between the sidecars it is HTTP/2, with heads that are packed; bodies of answers are as they were.
    assert 0 < sent < 3 * len(request) + 300 and received > 0


def test_upgraded_connections_are_counted_while_they_last(mesh):
    db, web, port = pair(mesh)
    upstream = {"envoy_http_conn_manager_prefix": "upstream", "consul_upstream_service": db.name}
    upgraded = lambda: [Metrics(web)("envoy_http_downstream_cx_upgrades_active", **upstream), Metrics(db)("envoy_http_downstream_cx_upgrades_active", **PUBLIC)]  # noqa: E731
    assert upgraded() == [0, 0]
    with mesh.dial(port) as conn:
        conn.send(b"GET /upgrade HTTP/1.1\r\nHost: x\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n")
        assert b" 101 " in conn.line()
        while conn.line().strip():
            pass
        assert conn.ask(b"hello") == b"hello"
        assert upgraded() == [1, 1]
    eventually(lambda: upgraded() == [0, 0])


def test_each_limit_counts_what_it_turned_away(mesh, workers):
    db, web, port = pair(mesh, limits={"max_concurrent_requests": 1})
    turned_away = lambda limit: Metrics(web, "/metrics")("lictor_upstream_overflows_total", limit=limit)  # noqa: E731
    held = workers.submit(ask, port, "/hold", within=60)
    eventually(lambda: Metrics(web, "/metrics")("lictor_upstream_limit_reached", limit="request") == 1)
    before = turned_away("request")
    assert [ask(port).status for _ in range(4)] == [503] * 4
    assert turned_away("request") == before + 4
    assert [turned_away(limit) for limit in ("pending_request", "connection", "retry")] == [0, 0, 0]
    series = Metrics(web)
    assert series("envoy_cluster_upstream_rq_pending_overflow") == turned_away("request") and series("envoy_cluster_circuit_breakers_default_rq_open") == 1
    db.app.go_on.set()
    assert held.result(60).status == 200
    eventually(lambda: Metrics(web)("envoy_cluster_circuit_breakers_default_rq_open") == 0)


def test_resumed_sessions_are_counted(mesh):
    db = mesh.service("db")
    context = client_context(mesh.agent.roots(), mesh.agent.leaf(mesh.name("client")), ssl.TLSVersion.TLSv1_3)
    at = {"envoy_listener_address": f"0.0.0.0_{db.public}"}
    names = ("envoy_listener_ssl_handshake", "envoy_listener_ssl_session_reused")
    before = [Metrics(db)(name, **at) for name in names]
    session = None
    for number in range(3):
        with mtls_connect(db.public, None, context=context, session=session) as conn:
            # Tickets come with the first bytes of data.
            assert conn.ask(b"hello") == b"hello" and conn.sock.session_reused == (number > 0)
            session = conn.sock.session
    assert [Metrics(db)(name, **at) for name in names] == [before[0] + 3, before[1] + 2]
    now = Metrics(db)
    assert now("envoy_listener_ssl_versions", envoy_ssl_version="TLSv1.3", **at) == before[0] + 3 and now("envoy_listener_ssl_versions", envoy_ssl_version="TLSv1.2", **at) == 0
    assert now("envoy_listener_ssl_certificate_expiration_unix_time_seconds", **at) == Metrics(db, "/metrics")("lictor_certificate_expiry_timestamp_seconds")
    assert Metrics(db, "/metrics")("lictor_tls_handshakes_total", side="server", result="complete", resumed="yes") == before[1] + 2


def test_calls_of_grpc_are_counted_by_methods_that_there_are(mesh):
    db = mesh.service("db", app=Rpc, protocol="grpc")
    web = mesh.service("web", [Upstream(db.name, mesh.ports.take(), {"Config": {"protocol": "grpc"}})], app=None, protocol="grpc")
    names = lambda service: {(name, tuple(sorted(labels.items()))) for name, all in Metrics(service).series.items() for labels, _ in all}  # noqa: E731
    with Caller(web.upstreams[0].port) as caller:
        eventually(lambda: caller.code()[0].value[0] == 0)
        calls = lambda service, **labels: Metrics(service, "/metrics")("lictor_upstream_grpc_calls_total", **labels)  # noqa: E731
        before = calls(web, status="0")
        assert [caller.code()[0].value[0] for _ in range(5)] == [0] * 5
        assert [caller.code("Fail")[0].value[0] for _ in range(2)] == [9] * 2
        for service in (web, db):
            eventually(lambda service=service: calls(service, status="0") == before + 5)
        [(labels, _)] = Metrics(web, "/metrics").series["lictor_upstream_grpc_calls_total"]
        assert labels["method"].endswith(".Echo")
        name = f"envoy_cluster_grpc_{labels['method'].replace('.', '_')}"
        assert (Metrics(db)(f"{name}_success", **LOCAL_APP), Metrics(db)(f"{name}_total", **LOCAL_APP)) == (before + 5, before + 5)
        # A method that never went well is none that is known, whoever calls it and how often.
        known = {service: names(service) for service in (web, db)}
        with concurrent.futures.ThreadPoolExecutor(16) as many:
            codes = set(many.map(lambda number: caller.code(f"Invented{number}")[0].value[0], range(1000)))
        assert codes == {12}
        assert all(names(service) == known[service] for service in (web, db))


def test_a_thousand_paths_and_invented_names_add_no_series(mesh):
    db, web, port = pair(mesh)
    names = lambda service, path="/stats/prometheus": {  # noqa: E731
        (name, tuple(sorted(labels.items()))) for name, all in Metrics(service, path).series.items() for labels, _ in all}
    known = {(service, path): names(service, path) for service in (web, db) for path in ("/stats/prometheus", "/metrics")}
    with mesh.dial(port) as conn:
        for number in range(1000):
            conn.send(f"GET /{number}?q={number} HTTP/1.1\r\nHost: h{number}.example\r\nUser-Agent: a{number}\r\nX-{number}: 1\r\n\r\n".encode())
            assert b" 200 " in conn.line()
            length = 0
            while line := conn.line().strip():
                if line.lower().startswith(b"content-length:"):
                    length = int(line.split(b":")[1])
            conn.take(length)
    # Server names and protocols, of one who proves itself and of one who does not.
    leaf = mesh.agent.leaf(mesh.name("client"))
    for number in range(100):
        with mtls_connect(db.public, mesh.agent.roots(), leaf, f"sni{number}.example"):
            pass
    for (service, path), before in known.items():
        # What is asked of the agent has nothing to do with clients, and comes as it is asked.
        gained = {series for series in names(service, path) if series not in before and not series[0].startswith("lictor_agent_")}
        assert not gained, gained
