"""The mesh's root is replaced while connections are made all the time."""

import threading

from mesh import Authority, eventually, mtls_connect


class Load:
    """Makes connections without a pause, and keeps what went wrong."""

    def __init__(self, client):
        self.made, self.failures, self._client, self._stop = 0, [], client, threading.Event()
        self._thread = threading.Thread(target=self._run)
        self._thread.start()

    def _run(self):
        while not self._stop.is_set():
            try:
                assert self._client.reaches(), "no answer"
            except (OSError, AssertionError) as error:
                self.failures.append(error)
            self.made += 1

    def end(self):
        self._stop.set()
        self._thread.join()
        return self.failures


def active_root(agent):
    roots = agent.get("/v1/agent/connect/ca/roots")
    return next(root["RootCert"].strip() for root in roots["Roots"] if root["Active"])


def chains_to(port, root, identity):
    """Whether what the public listener shows chains to this root alone, as a peer with new roots only would check."""
    with mtls_connect(port, root, identity) as conn:
        return conn.ask(b"hello") == b"hello"


def test_a_new_root_under_load(own_mesh):
    mesh = own_mesh()
    server = mesh.service("server")
    client = mesh.service("client", [server])
    client.eventually_reaches()
    old_identity = mesh.agent.leaf(mesh.name("old"))
    with client.dial() as untouched:
        assert untouched.ask(b"before") == b"before"
        load = Load(client)
        try:
            # To a root that the scenario has made (P-256), then to one that Consul makes (RSA 2048).
            for authority in (Authority(mesh.agent.trust_domain), None):
                before = active_root(mesh.agent)
                mesh.agent.rotate_root(authority)
                eventually(lambda: active_root(mesh.agent) != before)
                new = mesh.agent.leaf(mesh.name("new"))
                eventually(lambda: chains_to(server.public, active_root(mesh.agent), new), 60, "the leaf of the new root is served", every=0.2)
            made = load.made
            eventually(lambda: load.made > made + 20)
        finally:
            failures = load.end()
        assert failures == [] and load.made > 50
        assert untouched.ask(b"after") == b"after"
    # The old roots are listed for as long as leaves of theirs may be about.
    assert chains_to(server.public, mesh.agent.roots(), old_identity)
