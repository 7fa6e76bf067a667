"""Commands that ask a running sidecar: their text, their JSON, and how they exit."""

import json
import os
import subprocess

import pytest

from mesh.service import admin_port

FINE, WRONG, UNKNOWN = 0, 1, 2


@pytest.fixture
def lictor(binaries):
    """Runs a command of the program, which is to exit with `exit`; gives what it printed."""
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
    assert [each["sidecar"]["service"] for each in json.loads(everything)] == [web.name]
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
