"""Free ports: below the range that the kernel takes from by itself, and apart for each worker."""

import os
import random
import socket

FIRST, LAST, WORKERS = 10_000, 32_000, 8
# Consul gives these to sidecars that are registered without a port.
CONSULS_OWN = range(21_000, 21_256)


class Ports:
    def __init__(self):
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % WORKERS
        share = (LAST - FIRST) // WORKERS
        self._window = range(FIRST + worker * share, FIRST + (worker + 1) * share)
        # Two runs on one machine begin at different places.
        self._next = random.randrange(share)

    def take(self):
        for _ in range(len(self._window)):
            port = self._window[self._next % len(self._window)]
            self._next += 1
            if port not in CONSULS_OWN and is_free(port):
                return port
        raise RuntimeError("no free port")


def is_free(port):
    for family, address in ((socket.AF_INET, "0.0.0.0"), (socket.AF_INET6, "::")):
        for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
            with socket.socket(family, kind) as probe:
                if kind == socket.SOCK_STREAM:
                    probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                if family == socket.AF_INET6:
                    probe.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
                try:
                    probe.bind((address, port))
                except OSError:
                    return False
    return True


def is_listening(port):
    """Whether someone listens on the TCP port, seen without connecting: a connection would be counted."""
    wanted = f":{port:04X}"
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            with open(table) as lines:
                for line in lines:
                    column = line.split(None, 4)
                    if column[3] == "0A" and column[1].endswith(wanted):
                        return True
        except OSError:
            pass
    return False
