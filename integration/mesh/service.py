"""Services in the mesh: their registration, app and sidecar."""

import contextlib
import dataclasses
import itertools

from .apps import Echo, dial
from .envoy import Envoy
from .ports import is_listening
from .process import Process
from .web import Web, ask
from .wait import eventually

NUMBERS = itertools.count(1)


@dataclasses.dataclass
class Upstream:
    """A dependency: where it is to be found locally, and whatever else its registration says."""
    to: str
    port: int
    more: dict = dataclasses.field(default_factory=dict)

    def definition(self):
        return {"DestinationName": self.to, "LocalBindPort": self.port, **self.more}


class Mesh:
    """The processes of one scenario on one agent. All of them end with the scenario."""

    def __init__(self, agent, binaries, ports, directory, stack, tag):
        self.agent, self.binaries, self.ports, self.directory, self.stack, self.tag = agent, binaries, ports, directory, stack, tag
        self.processes = []

    def on(self, agent):
        """The same scenario's view of another agent."""
        other = Mesh(agent, self.binaries, self.ports, self.directory, self.stack, self.tag)
        other.processes = self.processes
        return other

    def name(self, what):
        """A service name that no other scenario on this agent has."""
        return f"{what}-{self.tag}{next(NUMBERS)}"

    def service(self, what, upstreams=(), app=Echo, sidecar="lictor", of=None, protocol=None, **more):
        """Registers a service with its sidecar, and runs both until they are ready.

        `upstreams` are services or names. `sidecar` is "lictor", "consul", or None for none. With `of` it is one more
        instance of that service, `what` telling them apart. `protocol` is what the service's defaults are to say.
        """
        name = of.name if of else self.name(what)
        if of:
            more["id"] = f"{name}-{what}"
        if protocol:
            self.agent.write("service-defaults", name, Protocol=protocol)
        service = Service(self, name, upstreams, **more)
        if app:
            service.app = self.keep(app(service.port))
        service.register()
        if sidecar:
            service.start(sidecar)
        return service

    def web(self, what, upstreams=(), protocol="http", **more):
        """A service that speaks HTTP, whose app says `what` as its name."""
        return self.service(what, upstreams, **{"app": lambda port: Web(port, name=what), "protocol": protocol, **more})

    def keep(self, closable):
        """Closes it when the scenario ends."""
        self.stack.callback(closable.close)
        return closable

    def dial(self, port, **how):
        return self.keep(dial(port, **how))

    def run(self, argv, label, env=None, cwd=None):
        """Starts a program that the scenario's end stops; a panic of it fails the scenario."""
        process = Process(argv, self.directory, f"{label}-{next(NUMBERS)}", env, cwd)
        self.processes.append(process)
        self.stack.callback(self._end, process)
        return process

    def proxy(self, *words, kind="lictor", env=None, label=None):
        """Runs `connect proxy` with these words against the scenario's agent."""
        # Many run side by side; the default port is for one.
        own = {"LICTOR_ADMIN_BIND": "127.0.0.1:0"} if kind == "lictor" else {}
        return self.run([self.binaries[kind], "connect", "proxy", *words], label or kind, {**self.agent.env, **own, **(env or {})})

    def envoy(self, service, **how):
        envoy = Envoy(service, self.directory, **how)
        self.processes.append(envoy)
        self.stack.callback(self._end, envoy)
        return envoy

    def deny(self, source, destination):
        return self.intend(source, destination, "deny")

    def allow(self, source, destination):
        return self.intend(source, destination, "allow")

    def intend(self, source, destination, action):
        source, destination = getattr(source, "name", source), getattr(destination, "name", destination)
        undo = self.agent.intention(source, destination, action)
        # The shared agent must not keep what a failed scenario left.
        self.stack.callback(quietly, undo)
        return undo

    def _end(self, process):
        assert not process.end(), f"{process.label} panicked: {process.text()[-2000:]}"


def admin_port(process):
    """Where the admin server of a lictor listens."""
    return int(process.logged(r"Admin server started: address=\S+:(\d+)")[1])


def quietly(undo):
    with contextlib.suppress(Exception):
        undo()


class Service:
    """One instance of a service and its sidecar's registration. Change its fields and `register()` again."""

    def __init__(self, mesh, name, upstreams=(), proxy=None, sidecar_fields=None, id=None, public=None, check="ttl", service_fields=None):
        self.mesh, self.name, self.id = mesh, name, id or name
        self.port = mesh.ports.take()
        self.public = mesh.ports.take() if public is None else public
        self.upstreams = [self._upstream(to) for to in upstreams]
        self.proxy, self.sidecar_fields, self.service_fields = proxy or {}, sidecar_fields or {}, service_fields or {}
        self.app = self.process = None
        # A TTL check passes at once and fails when the scenario says so; the usual TCP check first looks after 10 s.
        self.check_id = f"sidecar-{self.id}"
        # An agent that restarts forgets that, but not that an alias of a service without checks passes.
        self.checks = [{
            "ttl": {"CheckID": self.check_id, "Name": "sidecar", "TTL": "24h", "Status": "passing"},
            "alias": {"CheckID": self.check_id, "Name": "alias", "AliasService": self.id},
        }[check]]

    def _upstream(self, to):
        return to if isinstance(to, Upstream) else Upstream(getattr(to, "name", to), self.mesh.ports.take())

    @property
    def proxy_id(self):
        return f"{self.id}-sidecar-proxy"

    def definition(self):
        return {
            "ID": self.id, "Name": self.name, "Port": self.port,
            "Connect": {"SidecarService": {
                "Port": self.public, "Checks": self.checks,
                "Proxy": {"Upstreams": [upstream.definition() for upstream in self.upstreams], **self.proxy},
                **self.sidecar_fields,
            }},
            **self.service_fields,
        }

    def register(self):
        self.mesh.agent.put("/v1/agent/service/register", self.definition())
        return self

    def deregister(self):
        self.mesh.agent.put(f"/v1/agent/service/deregister/{self.id}")

    def add_upstream(self, to):
        upstream = self._upstream(to)
        self.upstreams.append(upstream)
        return upstream

    def start(self, kind="lictor", *words, env=None, ready=True):
        """Starts its sidecar; with `ready` waits until each of its ports is listened on."""
        self.process = self.mesh.proxy("-sidecar-for", self.id, *words, kind=kind, env=env, label=f"{kind}-{self.id}")
        if ready:
            self.ready()
        return self.process

    def ready(self):
        ports = [self.public] if self.public else []
        # An upstream at a unix socket has port 0.
        for port in ports + [upstream.port for upstream in self.upstreams if upstream.port]:
            eventually(lambda: is_listening(port) or not self.process.running(), what=f"the sidecar of {self.id} listens on {port}")
        assert self.process.running(), f"the sidecar of {self.id} ended: {self.process.text()}"
        return self

    def admin(self, path, method="GET", headers=None):
        """The answer of its sidecar's admin server."""
        return ask(admin_port(self.process), path, method, headers=headers)

    def passing(self, status="pass"):
        self.mesh.agent.health(self.check_id, status)

    def port_to(self, to):
        name = getattr(to, "name", to)
        return next(upstream.port for upstream in self.upstreams if upstream.to == name)

    def dial(self, to=None, within=20):
        """A connection to one of its upstreams, as its app would make it."""
        return self.mesh.keep(dial(self.port_to(to) if to else self.upstreams[0].port, within))

    def reaches(self, to=None, text=b"hello\n"):
        """Whether a new connection to the upstream carries bytes there and back."""
        with self.dial(to, within=5) as conn:
            return conn.ask(text) == text

    def eventually_reaches(self, to=None, within=20):
        eventually(lambda: self.reaches(to), within, f"{self.name} reaches {getattr(to, 'name', to) or 'its upstream'}")

    def refused(self, to=None):
        """Whether a new connection to the upstream is ended without a byte; returns how."""
        try:
            with self.dial(to, within=5) as conn:
                conn.send(b"hello\n")
                return None if conn.take(1) else conn.end(5)
        except ConnectionResetError:
            return "reset"
        except BrokenPipeError:
            return "fin"
        except TimeoutError:
            return None

    def ended(self, to=None, within=5):
        """How a new connection that says nothing is ended."""
        with self.dial(to, within) as conn:
            return conn.end(within)

    def eventually_refused(self, to=None, within=20):
        return eventually(lambda: self.refused(to), within, f"{self.name} no longer reaches {getattr(to, 'name', to) or 'its upstream'}")
