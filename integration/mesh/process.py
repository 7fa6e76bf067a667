"""Programs under test: started with their output in files, and stopped by their id whatever happens."""

import contextlib
import os
import pathlib
import re
import signal
import subprocess

from .wait import TEST_TIMEOUT, eventually

# Should the test run itself be killed, the kernel ends what it started.
WITH_US = ("setpriv", "--pdeathsig", "KILL", "--")


class Process:
    def __init__(self, argv, directory, label, env=None, cwd=None):
        self.label, self.argv = label, [str(word) for word in argv]
        self._out_path, self._err_path = directory / f"{label}.out", directory / f"{label}.err"
        with open(self._out_path, "ab") as out, open(self._err_path, "ab") as err:
            self._process = subprocess.Popen(
                [*WITH_US, *self.argv], stdin=subprocess.DEVNULL, stdout=out, stderr=err, cwd=cwd, env=environment(env), start_new_session=True)

    @property
    def pid(self):
        return self._process.pid

    def out(self):
        return self._out_path.read_text(errors="replace")

    def err(self):
        return self._err_path.read_text(errors="replace")

    def text(self):
        return self.out() + self.err()

    def running(self):
        return self._process.poll() is None

    def wait(self, within=TEST_TIMEOUT):
        """Waits for the end and returns the exit status."""
        return self._process.wait(within)

    def signal(self, number):
        self._process.send_signal(number)

    @contextlib.contextmanager
    def frozen(self):
        """Does nothing meanwhile. The signal is sent at once and takes effect later: on a busy machine, after many connections."""
        self.signal(signal.SIGSTOP)
        try:
            eventually(lambda: self._states() <= {"T"}, what=f"each thread of {self.label} has stopped", every=0.001)
            yield
        finally:
            self.signal(signal.SIGCONT)

    def _states(self):
        """Of its threads, one letter each (proc(5))."""
        threads = pathlib.Path(f"/proc/{self.pid}/task").glob("*/stat")
        return {thread.read_text().rpartition(")")[2].split()[0] for thread in threads}

    def stop(self, within=TEST_TIMEOUT):
        """SIGTERM, then the exit status."""
        if self.running():
            self.signal(signal.SIGTERM)
        return self.wait(within)

    def kill(self):
        if self.running():
            self._process.kill()
        self._process.wait()

    def logged(self, pattern, within=TEST_TIMEOUT):
        """Waits for a line of the output that the regular expression matches, and returns the match."""
        return eventually(lambda: self.look(pattern), within, f"a line of {self.label} like {pattern!r}")

    def look(self, pattern):
        return re.search(pattern, self.text())

    def count(self, pattern):
        return len(re.findall(pattern, self.text()))

    def end(self):
        """For fixtures: ends it, kindly if that works, and says what no program may show on its way."""
        try:
            self.stop(within=15)
        except subprocess.TimeoutExpired:
            pass
        finally:
            self.kill()
        return "panicked at" in self.text()


def environment(extra=None):
    """The environment without what would steer a Consul program from outside, plus `extra`."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("CONSUL_", "CONNECT_", "LICTOR_"))}
    # Loopback is never to be reached through a proxy of the machine.
    for name in ("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy"):
        clean.pop(name, None)
    return {**clean, **{k: str(v) for k, v in (extra or {}).items()}}


def run(argv, env=None, within=TEST_TIMEOUT):
    """Runs a command to its end; returns (status, output, errors)."""
    done = subprocess.run([str(word) for word in argv], stdin=subprocess.DEVNULL, capture_output=True, text=True,
                          env=environment(env), timeout=within)
    return done.returncode, done.stdout, done.stderr
