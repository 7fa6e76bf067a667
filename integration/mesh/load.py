"""Loads without a pause, and the mesh's root replaced under them."""

import threading

from .identity import Authority
from .wait import eventually


class Churn:
    """Makes connections without a pause, and keeps what went wrong."""

    def __init__(self, client, count=1):
        self.made, self.failures, self._client, self._stop = 0, [], client, threading.Event()
        self._threads = [threading.Thread(target=self._run) for _ in range(count)]
        for thread in self._threads:
            thread.start()

    def _run(self):
        while not self._stop.is_set():
            try:
                assert self._client.reaches(), "no answer"
            except (OSError, AssertionError) as error:
                self.failures.append(error)
            self.made += 1

    def end(self):
        self._stop.set()
        for thread in self._threads:
            thread.join()
        return self.failures


def rotate_root_under(load, mesh, shows, more):
    """Replaces the root twice, goes on for so many `more` of what `load` makes, and returns what of it failed.

    `shows(root, identity)` asks whether what the server shows chains to this root alone, as a peer would check that has
    new roots only.
    """
    agent = mesh.agent
    try:
        # By a root that the scenario has made (P-256), then by one that Consul makes (RSA 2048).
        for authority in (Authority(agent.trust_domain), None):
            before = agent.active_root()
            agent.rotate_root(authority)
            eventually(lambda: agent.active_root() != before)
            new = agent.leaf(mesh.name("new"))
            eventually(lambda: shows(agent.active_root(), new), 60, "the leaf of the new root is served", every=0.2)
        made = load.made
        eventually(lambda: load.made > made + more)
    finally:
        failures = load.end()
    return failures
