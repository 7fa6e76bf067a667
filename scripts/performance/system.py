"""The machine and the processes on it: clocks, memory, ports, a network of its own, programs that are started and stopped."""

import contextlib
import ctypes
import fcntl
import http.client
import os
import resource
import signal
import socket
import ssl
import statistics
import struct
import subprocess
import sys
import time


HZ = os.sysconf("SC_CLK_TCK")


class Bad(Exception):
    """A figure that must not be printed."""


class NA(Exception):
    """A workload that does not apply to this peer."""


FAULTS = (Bad, OSError, ValueError, KeyError, ssl.SSLError, http.client.HTTPException, subprocess.SubprocessError)


# ------------------------------------------------------------------ small helpers
def now():
    return time.monotonic()


def cpu(pid):
    """CPU seconds (user+sys, nanosecond resolution, exited threads included) of one process."""
    return time.clock_gettime((~pid << 3) | 2)


def keep_to(pid, cores):
    """Has all threads of a process run on these cores alone, and those that they start."""
    for thread in os.listdir(f"/proc/{pid}/task"):
        with contextlib.suppress(ProcessLookupError):
            os.sched_setaffinity(int(thread), cores)


def usersys(pid):
    f = open(f"/proc/{pid}/stat").read().rsplit(")", 1)[1].split()
    return int(f[11]) / HZ, int(f[12]) / HZ


def machine_ticks():
    f = [int(x) for x in open("/proc/stat").readline().split()[1:]]
    return sum(f[:8]), sum(f[:8]) - f[3] - f[4] - f[7], f[7]  # total, busy, steal


def mem(pid):
    d = {}
    for line in open(f"/proc/{pid}/smaps_rollup"):
        k, _, v = line.partition(":")
        if v.strip().endswith("kB"):
            d[k] = int(v.split()[0]) * 1024
    return {"rss": d["Rss"], "pss": d["Pss"], "anon": d.get("Anonymous", 0)}


def med(xs):
    return statistics.median(xs)


def private_network(cc):
    """A network namespace of our own: only loopback, no packet filter, no foreign ports, known congestion control."""
    if ctypes.CDLL(None, use_errno=True).unshare(0x40000000):  # CLONE_NEWNET
        return f"host ({os.strerror(ctypes.get_errno())})"
    with socket.socket() as s:  # ifconfig lo up
        fcntl.ioctl(s, 0x8914, struct.pack("16sH14x", b"lo", 1 | 8 | 64))
    try:
        with open("/proc/sys/net/ipv4/tcp_congestion_control", "w") as f:
            f.write(cc)
    except OSError as e:
        return f"private namespace (congestion control not set: {e.strerror})"
    return "private namespace"


class Ports:
    """Free ports below the ephemeral range."""

    def __init__(self, base):
        self.next = base

    def take(self):
        for _ in range(4000):
            p = self.next
            self.next += 1
            if self.next > 32000:
                self.next = 12000
            s = socket.socket()
            s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                s.bind(("0.0.0.0", p))
                return p
            except OSError:
                continue
            finally:
                s.close()
        raise Bad("no free port")


def listening():
    out = set()
    for f in ("/proc/net/tcp", "/proc/net/tcp6"):
        try:
            for line in open(f).readlines()[1:]:
                c = line.split(None, 4)
                if c[3] == "0A":
                    out.add(int(c[1].rsplit(":", 1)[1], 16))
        except OSError:
            pass
    return out


class Procs:
    """Everything started here is stopped here, by pid."""

    def __init__(self, tmp):
        self.tmp, self.all, self.n = tmp, [], 0

    def start(self, argv, name, cpus=None, **kw):
        self.n += 1
        log = os.path.join(self.tmp, f"{self.n:03d}-{name}.log")
        pre = (lambda: os.sched_setaffinity(0, cpus)) if cpus is not None else None
        with open(log, "wb") as f:
            p = subprocess.Popen(argv, stdin=kw.pop("stdin", subprocess.DEVNULL), stdout=kw.pop("stdout", f), stderr=f,
                                 preexec_fn=pre, env=dict(os.environ, CONSUL_HTTP_ADDR="", ENVOY_UID="0"), **kw)
        p.log, p.label = log, name
        self.all.append(p)
        return p

    def stop(self, p, wait=8):
        if p.poll() is None:
            p.send_signal(signal.SIGTERM)
            try:
                p.wait(wait)
            except subprocess.TimeoutExpired:
                p.kill()
                p.wait(5)
        if p in self.all:
            self.all.remove(p)

    def stop_all(self):
        for p in reversed(list(self.all)):
            try:
                self.stop(p, 4)
            except Exception as e:  # keep going, the rest must be stopped too
                print(f"# could not stop {p.label}: {e}", file=sys.stderr)


def tail(p, n=6):
    try:
        return " | ".join(open(p.log, errors="replace").read().strip().splitlines()[-n:])
    except OSError:
        return ""


def alive(p):
    if p.poll() is not None:
        raise Bad(f"{p.label} exited with {p.returncode}: {tail(p)}")


def raise_file_limit(wanted=100_000):
    """As many open files as the system lets us have; returns how many."""
    for limit in (wanted, resource.getrlimit(resource.RLIMIT_NOFILE)[1]):
        try:
            resource.setrlimit(resource.RLIMIT_NOFILE, (limit, limit))
            return limit
        except (ValueError, OSError):
            continue
    return resource.getrlimit(resource.RLIMIT_NOFILE)[0]
