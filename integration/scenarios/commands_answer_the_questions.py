"""Commands that ask a running sidecar: their text, their JSON, and how they exit."""

import fcntl
import itertools
import json
import os
import pty
import re
import select
import signal
import struct
import subprocess
import termios

import pytest

from mesh import Upstream, ask, eventually
from mesh.load import Churn
from mesh.service import admin_port
from mesh.wait import TEST_TIMEOUT

FINE, WRONG, UNKNOWN = 0, 1, 2


@pytest.fixture
def lictor(binaries):
    """Runs a command of the program, which is to exit with `exit` and to say a sentence if that is UNKNOWN; gives what it printed."""
    def run(*words, exit=FINE, env=None):
        environment = {"PATH": os.environ["PATH"], **(env or {})}
        ended = subprocess.run([binaries["lictor"], *map(str, words)], env=environment, text=True, timeout=60, capture_output=True)
        assert ended.returncode == exit, (words, ended)
        if exit == UNKNOWN:
            assert not ended.stdout and ended.stderr.count("\n") == 1, ended
            return ended.stderr
        assert not ended.stderr, ended
        return ended.stdout
    return run


def test_the_sidecars_of_this_host_are_found(mesh, lictor, tmp_path):
    """By a port that nobody chose, by a file, and each by its service, or by the id that it was started with."""
    web, api = mesh.service("web"), mesh.service("api", sidecar=None)
    with_socket = mesh.proxy("-sidecar-for", api.id, "-admin-bind", f"unix://{tmp_path}/a.sock")
    with_socket.logged("configuration is complete")
    for name in (web.name, web.id, api.name):
        assert name in lictor("status", "-service", name)
    assert web.name in lictor("status", "-admin", admin_port(web.process))
    assert web.name in lictor("status", env={"LICTOR_ADMIN": f"127.0.0.1:{admin_port(web.process)}"})
    everything = lictor("status", "--json", "--service=" + web.name)
    assert [each["sidecar"]["service"] for each in json.loads(everything)["sidecars"]] == [web.name]
    # A sidecar that is gone is found no more.
    with_socket.stop()
    assert f'no sidecar of "{api.name}" was found' in lictor("status", "-service", api.name, exit=UNKNOWN)


def test_a_sidecar_without_an_admin_server_is_not_found(mesh, lictor):
    web = mesh.service("web", sidecar=None)
    mesh.proxy("-sidecar-for", web.id, "-admin-bind", "off").logged("configuration is complete")
    assert f'no sidecar of "{web.name}" was found' in lictor("status", "-service", web.name, exit=UNKNOWN)


def test_wrong_lines_and_addresses_are_one_sentence(mesh, lictor):
    port = mesh.ports.take()
    for words, sentence in {
        ("status", "-jsn"): "did you mean -json?",
        ("status", "now"): "takes flags alone",
        ("status", "-admin", "nonsense:"): "write host:port, port or unix:///path",
        ("status", "-admin", port): "no sidecar runs with this -admin-bind",
        ("status", "-admin", "unix:///nowhere.sock"): "can't connect to the admin server at unix:///nowhere.sock",
        ("status", "-admin", mesh.agent.port): "is no admin server of lictor",
    }.items():
        assert sentence in lictor(*words, exit=UNKNOWN)
    assert "Exit codes" in lictor("status", "-help") and "  status " in lictor("help")


def test_status_shows_who_calls_whom_and_what_failed(mesh, lictor):
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    port = web.port_to(db)
    eventually(lambda: ask(port).status == 200)
    mesh.deny(web, db)
    # The first that is denied may have been under way, which is told without the rule.
    rule = f"{web.name} => {db.name} (deny, precedence 9)"
    eventually(lambda: ask(port, "/secret?token=x").status == 403 and rule in lictor("status", "-service", db.name))
    text = lictor("status", "-service", db.name)
    assert "Denied from " + web.name in text
    assert f"{db.name} (127.0.0.1:{admin_port(db.process)}): ready" in text and "days left" in text and "token=x" not in text
    assert "    do: " in text and f"from {web.name}: " in text
    text = lictor("status", "-service", web.name)
    assert f"upstream {db.name} at 127.0.0.1:{port} (http): " in text and "1 of 1 endpoints up" in text
    [status] = json.loads(lictor("status", "-service", web.name, "-json"))["sidecars"]
    assert status["wrong"] == [] and status["address"] == f"127.0.0.1:{admin_port(web.process)}"


def test_a_sidecar_that_is_not_ready_is_told(own_mesh, lictor):
    """It has no name yet but the one that it was started with."""
    mesh = own_mesh(start=False)
    name = f"web-{os.urandom(4).hex()}"
    process = mesh.proxy("-sidecar-for", name)
    port = admin_port(process)
    text = lictor("status", "-service", name, exit=WRONG)
    assert f"{name} (127.0.0.1:{port}): NOT WELL" in text and "the configuration from the agent is not complete" in text
    [status] = json.loads(lictor("status", "-admin", port, "-json", exit=WRONG))["sidecars"]
    assert status["sidecar"]["service"] is None and len(status["wrong"]) == 1
    assert "no upstream" in lictor("explain", "-admin", port, "-upstream", "db", exit=UNKNOWN)
    assert "has no public listener yet" in lictor("intentions", "check", "-from", "x", "-admin", port, exit=UNKNOWN)
    # Told to fail its health check, it is not ready either.
    ask(port, "/healthcheck/fail", "POST")
    assert "not ready" in lictor("status", "-admin", port, exit=WRONG)


def test_explain_names_the_config_entry_of_each_step(mesh, lictor):
    old, new = mesh.web("old"), mesh.web("new")
    mesh.agent.write("service-resolver", old.name, ConnectTimeout="3s")
    mesh.agent.write("service-splitter", new.name, Splits=[{"Weight": 75, "Service": new.name}, {"Weight": 25, "Service": old.name}])
    mesh.agent.write("service-router", old.name, Routes=[
        {"Match": {"HTTP": {"PathPrefix": "/new", "Header": [{"Name": "x-beta", "Exact": "1"}]}},
         "Destination": {"Service": new.name, "RequestTimeout": "3s", "PrefixRewrite": "/"}},
        {"Match": {"HTTP": {"PathPrefix": "/old", "Methods": ["PUT"]}}, "Destination": {"NumRetries": 2, "RetryOnStatusCodes": [503]}}])
    web = mesh.service("web", [old], app=None)
    router = f"service-router/{old.name}"
    eventually(lambda: ask(web.port_to(old), "/new", headers={"x-beta": "1"}).status == 200)
    eventually(lambda: router + ", route 1" in lictor("explain", "-upstream", old.name, "/new/x", "-H", "x-beta: 1"))

    text = lictor("explain", "-upstream", old.name, "GET", "/new/x?y", "-H", "x-beta: 1")
    for line in (
        f"sidecar {web.name} (127.0.0.1:{admin_port(web.process)})",
        "request GET /new/x?y",
        f'  router: route 1 of 3 is the first that matches: path begins with "/new", header x-beta is "1" ({router}, route 1)',
        f"  router: the path becomes //x?y ({router}, route 1)",
        f"  splitter: each request draws one of 2 ways by weight (service-splitter/{new.name})",
        f"  request timeout 3s ({router}, route 1)",
        "  idle timeout 300s (default)",
        "  75.00 % of the requests", "  25.00 % of the requests",
        f'  resolver: service "{new.name}" in dc1 (there is no service-resolver/{new.name})',
        f'  resolver: service "{old.name}" in dc1 (service-resolver/{old.name})',
        "  balancer: of two random instances the one with less in flight (default)",
        "=> it leads to instances that are used",
    ):
        assert line in text.splitlines(), (line, text)
    # Where a newer agent merges it in is not to be told.
    assert f"  protocol http (" in text and f"service-defaults/{old.name}" in text
    assert f"connect timeout 3s (service-resolver/{old.name})" in text and "connect timeout 5s (default)" in text
    assert f"    127.0.0.1:{new.public} healthy, weight 1, " in text
    text = lictor("explain", "-upstream", old.name, "PUT", "/old")
    assert f'path begins with "/old", method PUT ({router}, route 2)' in text and f"  retries 2 ({router}, route 2)" in text
    assert "  request timeout 15s (default)" in text
    report = json.loads(lictor("explain", "-upstream", old.name, "/", "--json"))
    assert report["steps"][0]["from"] == f"{router}, route 3" and report["fault"] is None and report["ways"][0]["share"] == 100
    # Of the upstream, where nothing but its registration says it.
    assert "no upstream" in lictor("explain", "-upstream", "nobody", "-service", web.name, exit=UNKNOWN)
    assert "write name: value" in lictor("explain", "-upstream", old.name, "-H", "nonsense", exit=UNKNOWN)
    assert "write a method and a path" in lictor("explain", "-upstream", old.name, "GET", "x", exit=UNKNOWN)


def test_explain_names_the_resolver_that_redirects(mesh, lictor):
    """Behind a router and behind a splitter, where the resolver of the service that they name leads to another one."""
    api, old, new = mesh.web("api"), mesh.web("old"), mesh.web("new")
    mesh.agent.write("service-resolver", old.name, Redirect={"Service": new.name})
    mesh.agent.write("service-splitter", api.name, Splits=[{"Weight": 50}, {"Weight": 50, "Service": old.name}])
    mesh.agent.write("service-router", api.name, Routes=[{"Match": {"HTTP": {"PathPrefix": "/old"}}, "Destination": {"Service": old.name}}])
    web = mesh.service("web", [api], app=None)
    redirected = f'  resolver: service "{new.name}" in dc1 (service-resolver/{old.name} redirects to it)'
    eventually(lambda: redirected in lictor("explain", "-upstream", api.name, "/old", "-service", web.name).splitlines())
    text = lictor("explain", "-upstream", api.name, "/", "-service", web.name)
    assert f'  resolver: service "{api.name}" in dc1 (there is no service-resolver/{api.name})' in text.splitlines()
    # An older agent does not say which service a split names.
    if mesh.agent.version >= (1, 10):
        assert redirected in text.splitlines()


def test_explain_says_when_nothing_is_reached(mesh, lictor):
    db = mesh.service("db")
    own = {"Config": {"connect_timeout_ms": 700, "limits": {"max_connections": 9}}}
    web = mesh.service("web", [Upstream(db.name, mesh.ports.take(), own)], app=None)
    eventually(lambda: "healthy, weight 1" in web.admin(f"/explain?upstream={db.name}").body.decode())
    text = lictor("explain", "-upstream", db.name)
    assert "connect timeout 700ms (connect_timeout_ms of the upstream's config)" in text and "  max_connections 9 (limits of the upstream's config)" in text
    assert "protocol tcp" in text and "request timeout" not in text and "=> it leads to instances that are used" in text
    db.passing("fail")
    eventually(lambda: "no usable instance of 1 registered" in web.admin(f"/explain?upstream={db.name}").body.decode())
    assert "=> it leads to no usable instance" in lictor("explain", "-upstream", db.name, exit=WRONG)
    assert json.loads(lictor("explain", "-upstream", db.name, "-json", exit=WRONG))["fault"]


def test_intentions_check_names_the_rule(mesh, lictor):
    db, web = mesh.service("db"), mesh.name("web")

    def check(*words, **how):
        return lictor("intentions", "check", "-service", db.name, "-from", web, *words, **how)
    text = check()
    assert text.startswith(f"{web} => {db.name}: allowed\n") and "allowed by " in text and "(allow)" in text
    mesh.deny(web, db)
    rule = f"denied by intention {web} => {db.name} (deny, precedence 9)"
    eventually(lambda: rule in json.loads(db.admin(f"/intentions/check?from={web}").body)["why"])
    assert check(exit=WRONG) == f"{web} => {db.name}: denied\n  {rule}\n"
    report = json.loads(check("-json", exit=WRONG))
    assert report["rule"]["intention"] == {
        "source": web, "source_namespace": "default", "source_partition": "default", "destination": db.name, "action": "deny",
        "precedence": 9, "permissions": 0, "token_of": None}
    # Others, and the same name elsewhere, are none of its business.
    assert "allowed" in lictor("intentions", "check", "-service", db.name, "-from", "somebody")
    assert "allowed" in lictor("intentions", "check", "-service", db.name, "-from", f"team/{web}")
    assert "requests are not looked into" in check("GET", "/x", exit=WRONG)
    mesh.deny("*", db)
    eventually(lambda: "* => " in json.loads(db.admin("/intentions/check?from=somebody").body)["why"])
    assert f"denied by intention * => {db.name} (deny, precedence 8)" in lictor("intentions", "check", "-service", db.name, "-from", "somebody", exit=WRONG)
    assert "the calling service is missing" in lictor("intentions", "check", "-service", db.name, exit=UNKNOWN)
    assert "is no source" in lictor("intentions", "check", "-service", db.name, "-from", "*", exit=UNKNOWN)
    assert "`lictor intentions check`" in lictor("intentions", exit=UNKNOWN)


def test_intentions_check_judges_a_request_as_the_sidecar_does(mesh, lictor, binaries):
    mesh.agent.needs((1, 9), "permissions")
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    mesh.agent.write("service-intentions", db.name, Sources=[{"Name": web.name, "Permissions": [
        {"Action": "deny", "HTTP": {"PathPrefix": "/admin"}},
        {"Action": "allow", "HTTP": {"PathPrefix": "/", "Methods": ["GET"]}}]}])
    port = web.port_to(db)
    eventually(lambda: (ask(port, "/x").status, ask(port, "/admin").status) == (200, 403))

    def check(*words, **how):
        return lictor("intentions", "check", "-service", db.name, "-from", web.name, *words, **how)
    assert f"allowed by permission 2 (allow) of intention {web.name} => {db.name} (permissions, precedence 9)" in check("GET", "/x")
    # Spelt in another way, the path is the same to the sidecar and here.
    assert ask(port, "/x/../%61dmin/y").status == 403
    text = check("GET", "/x/../%61dmin/y", exit=WRONG)
    assert "denied by permission 1 (deny)" in text and 'permission 1 is for: path begins with "/admin"' in text
    report = json.loads(check("PUT", "/x", "-json"))
    # The default policy of this agent allows.
    assert report["rule"]["kind"] == "no_permission" and report["rule"]["default"]["action"] == "allow"
    # Without a request it depends.
    text = subprocess.run([binaries["lictor"], "intentions", "check", "-service", db.name, "-from", web.name], text=True, capture_output=True)
    assert text.returncode == UNKNOWN and "depends on the request" in text.stdout and not text.stderr


class Asking:
    """What asks a port, for a load."""

    def __init__(self, port):
        self.port = port

    def reaches(self):
        return ask(self.port).status == 200


class InTerminal:
    """The program on a terminal of its own, of 80 columns and 24 lines, and what stands on it."""

    # A control sequence, with its parameters and its end, or a character.
    TOKEN = re.compile(r"\x1b\[([\d;?]*)([A-Za-z])|([^\x1b])")

    def __init__(self, argv):
        self.master, self.terminal = pty.openpty()
        self.resize(24, 80)
        self.settings = termios.tcgetattr(self.terminal)
        self.unread, self.cells, self.line, self.column, self.is_given_back = "", {}, 1, 1, False
        self.process = subprocess.Popen(
            argv, stdin=self.terminal, stdout=self.terminal, stderr=self.terminal, start_new_session=True,
            env={"PATH": os.environ["PATH"], "TERM": "xterm"}, preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))

    def resize(self, lines, columns):
        fcntl.ioctl(self.terminal, termios.TIOCSWINSZ, struct.pack("HHHH", lines, columns, 0, 0))

    def type(self, keys):
        os.write(self.master, keys)

    def read(self):
        """Takes what is drawn, for a moment: a terminal that nobody reads stops the program."""
        if select.select([self.master], [], [], 0.1)[0]:
            self.unread += os.read(self.master, 65536).decode("latin-1")
        while token := self.TOKEN.match(self.unread):
            self.unread = self.unread[token.end():]
            self.draw(*token.groups())

    def draw(self, parameters, end, character):
        if character:
            self.cells[self.line, self.column] = character
            self.column += 1
        elif end == "H":
            self.line, self.column = (int(number or 1) for number in (parameters + ";").split(";")[:2])
        elif end == "J":
            self.cells.clear()
        elif (parameters, end) == ("?1049", "l"):
            self.is_given_back = True

    def text(self):
        lines = [[" "] * 80 for _ in range(24)]
        for (line, column), character in self.cells.items():
            if line <= 24 and column <= 80:
                lines[line - 1][column - 1] = character
        return "\n".join(map("".join, lines))

    def shows(self, text, within=TEST_TIMEOUT):
        """Reads on until this stands there."""
        def is_there():
            self.read()
            return text in self.text()
        eventually(is_there, within, what=f"{text!r} on the terminal, where there is {self.text().strip()!r}")

    def ends(self):
        """What it exits with, once the terminal is as it was."""
        def is_over():
            self.read()
            return self.process.poll() is not None and self.is_given_back
        eventually(is_over, what="the end of the program, and the terminal given back")
        assert termios.tcgetattr(self.terminal) == self.settings
        return self.process.returncode

    def close(self):
        self.process.kill()
        self.process.wait()
        os.close(self.master)
        os.close(self.terminal)


def test_top_prints_rates_as_lines_of_json(mesh, lictor):
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    eventually(lambda: ask(web.port_to(db)).status == 200)

    def rows(name):
        looks = [json.loads(line) for line in lictor("top", "--json", "-count", 2, "-service", name).splitlines()]
        assert len(looks) == 2 and [look["service"] for look in looks] == [name, name] and looks[0]["time"] < looks[1]["time"]
        return [row for look in looks for row in look["rows"]]
    load = Churn(Asking(web.port_to(db)))
    try:
        def has_rate(direction, name, of):
            return [row for row in rows(of) if (row["direction"], row["name"]) == (direction, name) and row["per_second"]]
        [row, *_] = eventually(lambda: has_rate("outbound", db.name, of=web.name))
        assert row["counts"] == "requests" and row["errors_per_second"] == 0 and 0 < row["p50_ms"] <= row["p99_ms"] and row["state"] == "ok"
        assert row["endpoints"] == {"usable": 1, "registered": 1, "ejected": 0, "unreachable": 0}
        eventually(lambda: has_rate("inbound", db.name, of=db.name))
    finally:
        assert not load.end()
    # Without a terminal there is nothing to draw on.
    assert "draws on a terminal" in lictor("top", "-service", web.name, exit=UNKNOWN)
    assert "invalid value" in lictor("top", "-count", "many", exit=UNKNOWN)


def test_top_asks_on_when_the_sidecar_is_gone(mesh, binaries):
    web, port = mesh.service("web", sidecar=None), mesh.ports.take()

    def sidecar():
        process = mesh.proxy("-sidecar-for", web.id, "-admin-bind", f"127.0.0.1:{port}")
        process.logged("configuration is complete")
        return process
    first = sidecar()
    with subprocess.Popen([binaries["lictor"], "top", "-json", "-admin", str(port)], stdout=subprocess.PIPE, text=True) as top:
        try:
            assert json.loads(top.stdout.readline())["service"] == web.name
            first.stop()
            look = next(look for look in map(json.loads, top.stdout) if "error" in look)
            assert "can't connect to the admin server" in look["error"]
            sidecar()
            assert next(look for look in map(json.loads, top.stdout) if "rows" in look)["service"] == web.name
        finally:
            top.kill()


def test_top_draws_on_a_terminal_and_gives_it_back(mesh, lictor, binaries):
    db = mesh.web("db")
    web = mesh.service("web", [db], app=None)
    eventually(lambda: ask(web.port_to(db)).status == 200)

    def top():
        terminal = mesh.keep(InTerminal([binaries["lictor"], "top", "-service", web.name]))
        terminal.shows(db.name)
        assert termios.tcgetattr(terminal.terminal) != terminal.settings
        return terminal
    terminal = top()
    # The first row is the public listener, whose callers are shown. A key counts also where the size changes with it.
    below = {b"j": f"endpoints of {db.name}", b"k": f"callers of {web.name}", b"\x1b[B": f"endpoints of {db.name}", b"\x1bOA": f"callers of {web.name}"}
    for size, key in zip(itertools.cycle([(10, 40), (1, 1), (24, 80)]), [*below] * 6):
        terminal.resize(*size)
        terminal.type(key)
        terminal.resize(20, 60)
        terminal.shows(below[key])
    terminal.type(b"q")
    assert terminal.ends() == FINE
    for end in (lambda: terminal.type(b"\x03"), lambda: terminal.process.send_signal(signal.SIGINT), lambda: terminal.process.terminate()):
        terminal = top()
        end()
        assert terminal.ends() == FINE
