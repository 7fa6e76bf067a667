"""The steps of scripts/demo, once everything is there. Standard library only."""

import contextlib
import ctypes
import http.client
import json
import os
import pathlib
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.error
import urllib.request

TOP = pathlib.Path(__file__).resolve().parent.parent
LICTOR, CONSUL = os.environ["LICTOR_BIN"], os.environ["CONSUL_BIN"]
SERVICES = ("order", "invoice", "tax")
# Which version of tax an invoice of 100 was made with.
VERSIONS = {25: "v1", 20: "v2"}


class Failed(Exception):
    """A step did not do what it says."""


def main():
    # The usual signals end the demo as an error would: through the clean-up.
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, interrupted)
    directory = pathlib.Path(tempfile.mkdtemp(prefix="lictor-demo-"))
    keep_logs = False
    with contextlib.ExitStack() as stack:
        stack.callback(lambda: keep_logs or shutil.rmtree(directory, ignore_errors=True))
        demo = Demo(directory, stack)
        try:
            demo.show()
            if "--keep" in sys.argv:
                demo.keep()
        except (Failed, OSError, subprocess.SubprocessError) as error:
            keep_logs = True
            print(f"\nThe demo failed: {error}\nThe programs' logs are in {directory}", file=sys.stderr)
            return 1
    return 0


def interrupted(number, _frame):
    # A second signal must not cut the clean-up short.
    for each in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        signal.signal(each, signal.SIG_IGN)
    print("\nEnding, and cleaning up ...", file=sys.stderr)
    sys.exit(128 + number)


class Demo:
    def __init__(self, directory, stack):
        self.directory, self.stack, self.step_number = directory, stack, 0
        self.taken = set()
        self.programs = {}

    def show(self):
        print("Lictor demo: order -> invoice -> tax, each app behind a sidecar that speaks mutual TLS.\n")
        self.choose_ports()
        self.start_agent()
        self.start_apps()
        self.start_sidecars()
        self.chain_works("The order app asks invoice, which asks tax; every hop goes through two sidecars.", within=40)
        self.deny_cuts()
        self.delete_restores()
        self.second_version_starts()
        self.canary_is_split()
        self.canary_gets_all()
        print("\nAll of it went as told.")

    # Steps

    def choose_ports(self):
        self.http = self.port(8500)
        self.app_ports = {name: self.port(port) for name, port in zip(SERVICES, (5000, 5001, 5002))}
        self.upstream_ports = {"order": self.port(6001), "invoice": self.port(6002)}
        self.sidecar_ports = {name: self.port(port) for name, port in zip(SERVICES, (21000, 21001, 21002))}
        self.app_ports["tax-v2"], self.sidecar_ports["tax-v2"] = self.port(5003), self.port(21003)
        self.admin_ports = {name: self.port(port) for name, port in zip((*SERVICES, "tax-v2"), range(19000, 19004))}

    def start_agent(self):
        self.step(f"Starting a Consul agent in development mode on port {self.http}, with the three services in service-defs/.")
        config = self.directory / "agent"
        config.mkdir()
        for name in SERVICES:
            (config / f"{name}.json").write_text(json.dumps(self.definition(name)))
        # What config entries say of a service reaches its sidecar: newer agents do that without being told.
        (config / "agent.json").write_text(json.dumps({"enable_central_service_config": True, "ports": {
            "http": self.http, "dns": -1, "grpc": -1, "server": self.port(8300), "serf_lan": self.port(8301), "serf_wan": self.port(8302),
            **({"grpc_tls": -1} if newer_than_1_13() else {}),
        }}))
        self.start("consul agent", [CONSUL, "agent", "-dev", "-bind", "127.0.0.1", "-config-dir", config])
        self.wait("the agent has started", lambda: self.ask(self.http, "/v1/agent/connect/ca/roots"), 40)

    def start_apps(self):
        self.step("Starting the three apps (Flask). Each calls its dependency in plain HTTP at a port of this machine.")
        for name in SERVICES:
            upstream = [self.upstream_ports[name]] if name in self.upstream_ports else []
            self.start(f"{name} app", [sys.executable, TOP / "scripts/demo_app.py", name, self.app_ports[name], *upstream])
            say(f"{name} on port {self.app_ports[name]}" + (f", calls port {upstream[0]}" if upstream else ""))
        for name in SERVICES:
            self.wait(f"the {name} app listens", lambda: listens(self.app_ports[name]), 20)

    def start_sidecars(self):
        self.step("Starting a sidecar for each. They fetch their certificates, intentions and endpoints from the agent.")
        for name in SERVICES:
            self.start_sidecar(name)
        for name in SERVICES:
            self.wait(f"the sidecar of {name} is ready", lambda: listens(self.sidecar_ports[name]), 20)

    def chain_works(self, text, within):
        self.step(text)
        self.command_shown(f"curl localhost:{self.app_ports['order']}")
        if within > 20:
            say("(waiting until Consul's health checks have seen the sidecars: up to 10 s)")
        _, body = self.wait("order's call works", lambda: self.answered(200), within)
        say(body)

    def deny_cuts(self):
        self.step("Keeping a connection from invoice to tax open, then forbidding invoice to talk to tax.")
        follower = Follower(self.app_ports["invoice"])
        self.stack.callback(follower.close)
        self.wait("the open connection delivers", lambda: follower.lines >= 2, 10)
        say("open connection: tax streams rates to invoice")
        self.consul("intention", "create", "-deny", "invoice", "tax")
        denied_at = time.monotonic()
        self.wait("the open connection is cut within a second", lambda: follower.ended_at, 5)
        took = follower.ended_at - denied_at
        if took > 1:
            raise Failed(f"the open connection lived on for {took:.1f} s after the deny")
        say("the open connection was cut at once")
        self.step("The same call again: now it fails, and says why.")
        self.command_shown(f"curl localhost:{self.app_ports['order']}")
        _, body = self.wait("order's call fails", lambda: self.answered(502), 10)
        if "tax" not in body:
            raise Failed(f"order's error does not name tax: {body}")
        say(body)
        self.wait("the sidecar of tax logs the denial", lambda: self.denial(), 5)
        say(f"the sidecar of tax says: {self.denial()}")
        self.command_shown(f"curl localhost:{self.admin_ports['tax']}/status")
        problem = self.wait("the sidecar of tax names the intention when it is asked", self.problem, 5)
        say(f"who: {problem['who']}, reason: {problem['reason']}, cause: {problem['cause']}")
        say(f"what to do: {problem['remedy']}")
        self.lictor("intentions", "check", "-from", "invoice", sidecar="tax", names="intention invoice => tax (deny")
        self.lictor("explain", "-upstream", "tax", sidecar="invoice", names="Denied")

    def problem(self):
        """The last thing that went wrong at tax, if that is the denial."""
        _, body = self.ask(self.admin_ports["tax"], "/status")
        problems = json.loads(body)["problems"]
        return problems[0] if problems and "invoice => tax (deny" in problems[0]["cause"] else None

    def start_sidecar(self, name):
        admin = f"127.0.0.1:{self.admin_ports[name]}"
        say(f"$ lictor connect proxy -sidecar-for {name} -admin-bind {admin}")
        self.start(f"{name} sidecar", [LICTOR, "connect", "proxy", "-sidecar-for", name, "-admin-bind", admin])

    def delete_restores(self):
        self.step("Taking the intention back.")
        self.consul("intention", "delete", "invoice", "tax")
        self.chain_works("And the call works again.", within=10)

    def second_version_starts(self):
        self.step("Making tax an HTTP service while everything runs, and starting a second version of it, which taxes less.")
        self.entry("tax-protocol", {"Kind": "service-defaults", "Name": "tax", "Protocol": "http"})
        self.entry("tax-versions", {"Kind": "service-resolver", "Name": "tax", "DefaultSubset": "v1", "Subsets": {
            "v1": {"Filter": 'Service.Meta.version != "v2"'}, "v2": {"Filter": 'Service.Meta.version == "v2"'},
        }})
        definition = self.directory / "tax-v2.json"
        definition.write_text(json.dumps(self.definition_of_v2()))
        self.consul("services", "register", definition, shown="tax-v2.json")
        self.start("tax-v2 app", [sys.executable, TOP / "scripts/demo_app.py", "tax-v2", self.app_ports["tax-v2"]])
        self.wait("the tax-v2 app listens", lambda: listens(self.app_ports["tax-v2"]), 20)
        self.start_sidecar("tax-v2")
        # A newer agent takes a sidecar of its configuration files for failing from a change of its service-defaults to the next check.
        self.wait("both versions pass their health checks", self.both_versions_pass, 30)
        self.wait("tax v1 still answers", lambda: self.version() == "v1", 20)

    def canary_is_split(self):
        self.step("A canary: nine of ten requests for tax to the first version, one to the second.")
        self.split(90, 10)
        self.wait("the second version gets requests", lambda: self.version() == "v2", 20)
        # Until the splitter has reached the sidecar, which takes up to 2 s, both versions get the same.
        self.wait("the second version gets few", self.second_version_gets_few, 20)
        counts = self.counted(200)
        if not 2 <= counts["v2"] <= 60:
            raise Failed(f"of 200 requests, {counts['v2']} went to the second version")

    def canary_gets_all(self):
        self.step("It does well: from now on, all requests to the second version.")
        self.split(0, 100)
        self.wait("the second version gets all requests", lambda: all(self.version() == "v2" for _ in range(20)), 20)
        if self.counted(100)["v1"]:
            raise Failed("the first version still gets requests")

    def keep(self):
        address = "" if self.http == 8500 else f" -http-addr=127.0.0.1:{self.http}"
        print("\nStill running (Ctrl-C ends it). Things to try in another terminal:")
        for command, what in (
            (f"curl localhost:{self.app_ports['order']}", "the whole chain"),
            (f"{CONSUL} config delete{address} -kind service-splitter -name tax", "back to the first version of tax"),
            (f"{CONSUL} intention create{address} -deny invoice tax", "refuses the next request"),
            (f"{CONSUL} intention delete{address} invoice tax", "the way back"),
            (f"{LICTOR} top -admin {self.admin_ports['invoice']}", "what the sidecar of invoice does, live"),
            (f"kill {self.programs['consul agent'].pid}", "the agent goes away, traffic goes on"),
        ):
            print(f"  {command}\n      {what}")
        for name, port in self.admin_ports.items():
            print(f"  http://localhost:{port}/\n      the dashboard of {name}'s sidecar")
        print(f"The programs' logs: {self.directory}", flush=True)
        while True:
            signal.pause()

    # What the steps are made of

    def definition(self, name):
        """The service's registration of service-defs/, with the ports that are free here."""
        whole = json.loads((TOP / f"service-defs/{name}.json").read_text())
        service = whole["service"]
        service["port"] = self.app_ports[name]
        sidecar = service["connect"]["sidecar_service"]
        sidecar["port"] = self.sidecar_ports[name]
        for upstream in sidecar.get("proxy", {}).get("upstreams", []):
            upstream["local_bind_port"] = self.upstream_ports[name]
        return whole

    def definition_of_v2(self):
        whole = self.definition("tax")
        service = whole["service"]
        service |= {"id": "tax-v2", "port": self.app_ports["tax-v2"], "meta": {"version": "v2"}}
        # The check that Consul makes by itself looks every ten seconds only.
        port = self.sidecar_ports["tax-v2"]
        check = {"name": "sidecar", "tcp": f"127.0.0.1:{port}", "interval": "1s"}
        service["connect"]["sidecar_service"] |= {"port": port, "checks": [check]}
        return whole

    def both_versions_pass(self):
        _, body = self.ask(self.http, "/v1/health/connect/tax?passing")
        return len(json.loads(body)) == 2

    def second_version_gets_few(self):
        got = [self.version() for _ in range(40)]
        return got.count("v2") < 12 and set(got) <= set(VERSIONS.values())

    def entry(self, name, content):
        """Writes a config entry, and shows it."""
        file = self.directory / f"{name}.json"
        file.write_text(json.dumps(content))
        self.consul("config", "write", file, shown=f"{name}.json")
        say(f"    {json.dumps(content)}")

    def split(self, v1, v2):
        legs = [{"Weight": v1, "ServiceSubset": "v1"}, {"Weight": v2, "ServiceSubset": "v2"}]
        self.entry("tax-canary", {"Kind": "service-splitter", "Name": "tax", "Splits": legs})

    def version(self):
        """Which version of tax the next order's invoice was made with."""
        status, body = self.ask(self.app_ports["order"], "/")
        return VERSIONS[round(json.loads(body)["invoice"]["tax"])] if status == 200 else body

    def counted(self, requests):
        got = [self.version() for _ in range(requests)]
        counts = {version: got.count(version) for version in VERSIONS.values()}
        if sum(counts.values()) != requests:
            raise Failed(f"a call failed: {next(each for each in got if each not in counts)}")
        say(f"of {requests} orders, {counts['v1']} were taxed by the first version (25 of 100), {counts['v2']} by the second (20 of 100)")
        return counts

    def port(self, usual):
        port = usual
        while port in self.taken or not free(port):
            with socket.socket() as any_port:
                any_port.bind(("127.0.0.1", 0))
                port = any_port.getsockname()[1]
        self.taken.add(port)
        if port != usual:
            print(f"  port {usual} is taken: using {port} instead")
        return port

    def start(self, name, argv):
        environment = {k: v for k, v in os.environ.items() if not k.startswith(("CONSUL_", "CONNECT_")) and not k.lower().endswith("_proxy")}
        environment["CONSUL_HTTP_ADDR"] = f"127.0.0.1:{self.http}"
        log = self.directory / f"{name.replace(' ', '-')}.log"
        with open(log, "wb") as out:
            program = subprocess.Popen([str(word) for word in argv], stdin=subprocess.DEVNULL, stdout=out, stderr=out, env=environment,
                                       start_new_session=True, preexec_fn=end_with_parent)
        program.log = log
        self.programs[name] = program
        self.stack.callback(end, program)

    def consul(self, *words, shown=None):
        """Runs the command; `shown` is what it is to show in place of a file's whole path."""
        words = [str(word) for word in words]
        self.command_shown("consul " + " ".join([*words[:-1], shown or words[-1]]))
        environment = {**os.environ, "CONSUL_HTTP_ADDR": f"127.0.0.1:{self.http}"}
        done = subprocess.run([CONSUL, *words], capture_output=True, text=True, timeout=20, env=environment)
        if done.returncode != 0:
            raise Failed(f"consul {' '.join(words)}: {done.stdout}{done.stderr}".strip())

    def lictor(self, *words, sidecar, names):
        """Asks a sidecar by our own command, and shows the answer, which is to name something."""
        words = [*words, "-admin", str(self.admin_ports[sidecar])]
        self.command_shown("lictor " + " ".join(words))
        # It exits with 1 where it finds a denial.
        done = subprocess.run([LICTOR, *words], capture_output=True, text=True, timeout=20)
        if names not in done.stdout:
            raise Failed(f"lictor {' '.join(words)} does not name {names!r}: {done.stdout}{done.stderr}".strip())
        say(done.stdout)

    def answered(self, status):
        got, body = self.ask(self.app_ports["order"], "/")
        return (got, body) if got == status else None

    def ask(self, port, path):
        try:
            with OPENER.open(f"http://127.0.0.1:{port}{path}", timeout=10) as answer:
                return answer.status, answer.read().decode().strip()
        except urllib.error.HTTPError as error:
            return error.code, error.read().decode().strip()

    def denial(self):
        lines = self.programs["tax sidecar"].log.read_text(errors="replace").splitlines()
        return next((line.strip() for line in lines if "svc/invoice" in line and "den" in line.lower()), None)

    def wait(self, what, condition, within):
        """Until `condition` gives something; a program that ended on the way is the better reason to fail."""
        deadline, last = time.monotonic() + within, None
        while True:
            try:
                if got := condition():
                    return got
            except (OSError, http.client.HTTPException) as error:
                last = error
            for name, program in self.programs.items():
                if program.poll() is not None:
                    tail = program.log.read_text(errors="replace").strip()[-800:]
                    raise Failed(f"the {name} ended by itself with status {program.returncode}: {tail}")
            if time.monotonic() > deadline:
                raise Failed(f"waited {within} s in vain: {what}" + (f" ({last})" if last else ""))
            time.sleep(0.05)

    def step(self, text):
        self.step_number += 1
        print(f"\n{self.step_number}. {text}", flush=True)

    def command_shown(self, command):
        print(f"   $ {command}", flush=True)


class Follower(threading.Thread):
    """Reads invoice's stream, which lives as long as one connection from invoice to tax."""

    def __init__(self, port):
        super().__init__(daemon=True)
        self.lines, self.ended_at = 0, None
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        self.start()

    def run(self):
        try:
            self._connection.request("GET", "/follow")
            answer = self._connection.getresponse()
            while line := answer.readline():
                if line == b"ended\n":
                    break
                self.lines += 1
        except (OSError, http.client.HTTPException, ValueError, AttributeError):
            pass
        self.ended_at = time.monotonic()

    def close(self):
        self._connection.close()


OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


def say(text):
    for line in text.splitlines():
        print(f"   {line}", flush=True)


def free(port):
    for kind in (socket.SOCK_STREAM, socket.SOCK_DGRAM):
        with socket.socket(socket.AF_INET, kind) as probe:
            if kind == socket.SOCK_STREAM:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("0.0.0.0", port))
            except OSError:
                return False
    return True


def listens(port):
    with socket.create_connection(("127.0.0.1", port), 1):
        return True


def newer_than_1_13():
    version = subprocess.run([CONSUL, "version"], capture_output=True, text=True, timeout=20).stdout.split()[1]
    return tuple(map(int, version.lstrip("v").split("-")[0].split(".")[:2])) > (1, 13)


def end_with_parent():
    """Should the demo itself be killed, the kernel ends what it started."""
    parent_death_signal = 1
    ctypes.CDLL(None).prctl(parent_death_signal, signal.SIGTERM)


def end(program):
    if program.poll() is None:
        program.terminate()
        try:
            program.wait(12)
        except subprocess.TimeoutExpired:
            program.kill()
            program.wait()


if __name__ == "__main__":
    sys.exit(main())
