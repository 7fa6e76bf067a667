"""Which instance a request goes to: policies, stickiness, slow, dead and failing instances."""

import collections

import pytest

from mesh import Browser, Upstream, ask, eventually, who

NAMES = ["1", "2", "3"]


def instances(mesh, names=NAMES, **more):
    first = mesh.web(names[0], **more)
    return [first, *(mesh.web(name, of=first, **more) for name in names[1:])]


def client_of(mesh, service, **config):
    client = mesh.web("client", [Upstream(service.name, mesh.ports.take(), {"Config": config} if config else {})])
    return client.upstreams[0].port


def counted(port, requests, **more):
    return collections.Counter(who(port, **more) for _ in range(requests))


def balance(mesh, service, policy, **more):
    mesh.agent.needs((1, 9), "LoadBalancer")
    mesh.agent.write("service-resolver", service.name, LoadBalancer={"Policy": policy, **more})


def meets_all(port, names=NAMES):
    eventually(lambda: set(counted(port, 20)) == set(names), what="every instance gets requests")


def test_requests_of_one_connection_are_spread(mesh):
    first, *_ = instances(mesh)
    port = client_of(mesh, first)
    meets_all(port)
    with Browser(port) as browser:
        assert {browser.ask().seen()["app"] for _ in range(300)} == set(NAMES)


@pytest.mark.parametrize("policy, more", [("round_robin", {}), ("random", {}), ("least_request", {"LeastRequestConfig": {"ChoiceCount": 3}})])
def test_policies_spread_evenly(mesh, policy, more):
    first, *_ = instances(mesh)
    balance(mesh, first, policy, **more)
    port = client_of(mesh, first)
    meets_all(port)
    got = counted(port, 180)
    assert set(got) == set(NAMES)
    if policy == "round_robin":
        assert max(got.values()) - min(got.values()) <= 6, got
    else:
        assert min(got.values()) >= 25, got


def test_round_robin_follows_weights(mesh):
    first = mesh.web("heavy", sidecar_fields={"Weights": {"Passing": 9, "Warning": 1}})
    mesh.web("light", of=first, sidecar_fields={"Weights": {"Passing": 1, "Warning": 1}})
    balance(mesh, first, "round_robin")
    port = client_of(mesh, first)
    meets_all(port, ["heavy", "light"])
    got = counted(port, 200)
    assert 8 <= got["light"] <= 32, got


@pytest.mark.parametrize("policy", ["ring_hash", "maglev"])
def test_a_header_sticks_to_an_instance(mesh, policy):
    first, *_ = instances(mesh)
    balance(mesh, first, policy, HashPolicies=[{"Field": "header", "FieldValue": "x-user"}])
    port = client_of(mesh, first)
    meets_all(port)
    homes = {user: counted(port, 5, headers={"x-user": user}) for user in map(str, range(30))}
    assert all(len(met) == 1 for met in homes.values()), homes
    assert {name for met in homes.values() for name in met} == set(NAMES)


def test_users_of_a_dead_instance_move_and_the_others_stay(mesh):
    first, *rest = instances(mesh)
    balance(mesh, first, "ring_hash", HashPolicies=[{"Field": "header", "FieldValue": "x-user"}])
    port = client_of(mesh, first)
    meets_all(port)
    users = {user: who(port, headers={"x-user": user}) for user in map(str, range(30))}
    rest[1].process.kill()
    now = {user: who(port, headers={"x-user": user}) for user in users}
    assert all(now[user] == home for user, home in users.items() if home != "3") and set(now.values()) == {"1", "2"}


def test_a_session_cookie_is_given_and_sticks(mesh):
    first, *_ = instances(mesh)
    balance(mesh, first, "ring_hash", HashPolicies=[{"Field": "cookie", "FieldValue": "home", "CookieConfig": {"Session": True, "Path": "/"}}])
    port = client_of(mesh, first)
    eventually(lambda: ask(port).header("set-cookie"))
    met = set()
    for _ in range(12):
        answer = ask(port)
        cookie = answer.header("set-cookie")
        assert cookie.startswith("home=") and "Path=/" in cookie and "HttpOnly" in cookie and "Max-Age" not in cookie, cookie
        again = [ask(port, headers={"cookie": cookie.split(";")[0]}) for _ in range(5)]
        assert all(each.header("set-cookie") is None for each in again)
        assert {each.seen()["app"] for each in again} == {answer.seen()["app"]}
        met.add(answer.seen()["app"])
    assert len(met) > 1


def test_a_cookie_is_given_with_its_age(mesh):
    first, *_ = instances(mesh)
    balance(mesh, first, "maglev", HashPolicies=[{"Field": "cookie", "FieldValue": "home", "CookieConfig": {"TTL": "90s", "Path": "/shop"}}])
    port = client_of(mesh, first)
    cookie = eventually(lambda: ask(port).header("set-cookie"))
    assert cookie.startswith("home=") and "Max-Age=90" in cookie and "Path=/shop" in cookie and "HttpOnly" in cookie, cookie
    homes = {ask(port, headers={"cookie": cookie.split(";")[0]}).seen()["app"] for _ in range(10)}
    assert len(homes) == 1


@pytest.mark.parametrize("terminal", [True, False])
def test_a_terminal_policy_is_the_last_that_counts(mesh, terminal):
    first, *_ = instances(mesh)
    cookie = {"Field": "cookie", "FieldValue": "home", "CookieConfig": {"Session": True}}
    balance(mesh, first, "maglev", HashPolicies=[{"Field": "header", "FieldValue": "x-user", "Terminal": terminal}, cookie])
    port = client_of(mesh, first)
    # Whoever shows no user is given a cookie either way.
    eventually(lambda: ask(port).header("set-cookie"))
    answers = [ask(port, headers={"x-user": "one"}) for _ in range(40)]
    assert [answer.header("set-cookie") is None for answer in answers] == [terminal] * 40
    homes = {ask(port, headers={"x-user": "one", "cookie": f"home={number}"}).seen()["app"] for number in range(40)}
    assert len(homes) == 1 if terminal else len(homes) > 1, homes


def test_a_query_parameter_and_the_source_stick(mesh):
    first, *_ = instances(mesh)
    balance(mesh, first, "maglev", HashPolicies=[{"Field": "query_parameter", "FieldValue": "id", "Terminal": True}, {"SourceIP": True}])
    port = client_of(mesh, first)
    # All the scenario's connections come from one address.
    eventually(lambda: len(counted(port, 20)) == 1)
    homes = [counted(port, 4, path=f"/?id={number}") for number in range(20)]
    assert all(len(met) == 1 for met in homes) and len({name for met in homes for name in met}) == 3


def test_an_instance_whose_sidecar_is_gone_costs_no_request(mesh):
    first, second = instances(mesh, NAMES[:2])
    port = client_of(mesh, first)
    meets_all(port, NAMES[:2])
    # The agent goes on saying that it passes, and no retry is configured.
    second.process.kill()
    assert counted(port, 30) == {"1": 30}
    assert [ask(port, "/", "POST", b"the body").status for _ in range(30)] == [200] * 30


def test_a_slow_instance_gets_less(mesh, workers):
    quick, slow = instances(mesh, ["quick", "slow"])
    port = client_of(mesh, quick)
    meets_all(port, ["quick", "slow"])
    slow.app.delay = 0.3
    futures = [workers.submit(counted, port, 60) for _ in range(4)]
    got = sum((future.result(60) for future in futures), collections.Counter())
    assert set(got) == {"quick", "slow"} and got["slow"] <= 60, got


def fail_until_ejected(bad, port):
    """Three errors eject; that it gets nothing for a moment may have other reasons."""
    bad.app.status, before = 500, len(bad.app.requests)
    eventually(lambda: counted(port, 20) == {"good": 20} and len(bad.app.requests) >= before + 3)


def test_an_instance_that_was_slow_once_gets_its_share_soon(mesh):
    first, _, cold = instances(mesh)
    cold.app.delay = 2
    port = client_of(mesh, first)
    # It is asked until it has had one request, so that nothing but this answer is known of it.
    eventually(lambda: who(port) and cold.app.requests)
    cold.app.delay = 0
    # A third is twenty.
    eventually(lambda: counted(port, 60)["3"] >= 12, what="an instance that was slow once has its share again")


def test_a_lone_instance_is_not_ejected_for_its_own_errors(mesh):
    server = mesh.web("server")
    port = client_of(mesh, server)
    eventually(lambda: who(port) == "server")
    server.app.status = 500
    assert [ask(port).seen_status() for _ in range(30)] == [(500, "server")] * 30
    server.app.status = 200
    assert counted(port, 5) == {"server": 5}


def test_of_two_that_fail_one_goes_on_answering(mesh):
    first, second = instances(mesh, NAMES[:2])
    port = client_of(mesh, first)
    meets_all(port, NAMES[:2])
    first.app.status = second.app.status = 500
    assert {ask(port).status for _ in range(40)} == {500}
    # The one that is ejected is there for those who find no other.
    [left] = {ask(port).seen_status()[1] for _ in range(10)}
    {"1": first, "2": second}[left].process.kill()
    assert {ask(port).seen_status()[1] for _ in range(10)} == set(NAMES[:2]) - {left}


def test_a_lone_instance_is_ejected_where_that_is_asked_for(mesh):
    server = mesh.web("server")
    check = {"max_failures": 3, "interval": "100ms", "base_ejection_time": "8s", "max_ejection_percent": 100}
    port = client_of(mesh, server, passive_health_check=check)
    eventually(lambda: who(port) == "server")
    server.app.status = 500
    assert [ask(port).status for _ in range(4)] == [500, 500, 500, 503]
    assert who(port) == "503 no healthy upstream"
    server.app.status = 200
    eventually(lambda: who(port) == "server", 30, "it is used again")


def test_after_an_ejection_one_probe_decides(mesh, workers):
    good, bad = instances(mesh, ["good", "bad"])
    check = {"max_failures": 3, "interval": "100ms", "base_ejection_time": "3s", "max_ejection_percent": 50}
    port = client_of(mesh, good, passive_health_check=check)
    meets_all(port, ["good", "bad"])
    fail_until_ejected(bad, port)
    # While the one probe waits for its answer, nobody else goes there.
    bad.app.delay = 5
    probe = eventually(lambda: bad.app.waiting or workers.submit(ask, port) and None, 30, "a probe is sent")
    assert probe == 1
    before = len(bad.app.requests)
    assert counted(port, 40) == {"good": 40} and bad.app.waiting == 1 and len(bad.app.requests) == before
    # It fails, so that the circuit stays open, and longer.
    bad.app.delay = 0
    eventually(lambda: bad.app.waiting == 0)
    assert counted(port, 20) == {"good": 20} and len(bad.app.requests) == before + 1
    bad.app.status = 200
    # The next one succeeds, and closes it.
    eventually(lambda: set(counted(port, 20)) == {"good", "bad"}, 40, "it is used again")
    meets_all(port, ["good", "bad"])


def test_an_instance_that_fails_is_ejected_for_a_while(mesh):
    good, bad = instances(mesh, ["good", "bad"])
    check = {"max_failures": 3, "interval": "100ms", "base_ejection_time": "2s", "max_ejection_percent": 50}
    port = client_of(mesh, good, passive_health_check=check)
    meets_all(port, ["good", "bad"])
    fail_until_ejected(bad, port)
    seen = len(bad.app.requests)
    assert counted(port, 20) == {"good": 20} and len(bad.app.requests) == seen
    bad.app.status = 200
    eventually(lambda: set(counted(port, 20)) == {"good", "bad"}, 30, "it is used again")


def test_a_failing_check_takes_an_instance_out(mesh):
    first, second = instances(mesh, NAMES[:2])
    port = client_of(mesh, first)
    meets_all(port, NAMES[:2])
    second.passing("fail")
    eventually(lambda: counted(port, 20) == {"1": 20})
    second.passing("pass")
    meets_all(port, NAMES[:2])
