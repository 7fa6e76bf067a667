"""Third-party servers, as apps that report each request as they understood it.

nginx, Apache and lighttpd hand requests on to a program by SCGI, as they would to any app, with the variables that CGI has (RFC 3875).
Each server has `port` for HTTP/1 and `port_http2` for HTTP/2, and `reports()` with what it has understood so far.
"""

import json
import os
import pathlib
import shutil
import subprocess
import sys
import threading

from ..apps import App
from ..ports import is_listening
from ..process import Process
from ..wait import eventually

HERE = pathlib.Path(__file__).resolve().parent
TOP = HERE.parents[2]


class Absent(Exception):
    """A server that is not installed here."""


def program(name):
    """The path of an installed program; servers are where only root looks."""
    found = shutil.which(name, path=os.environ.get("PATH", "") + ":/usr/sbin:/usr/local/sbin")
    if not found:
        raise Absent(f"{name} is not installed")
    return found


class Server(Process):
    """A program that serves on its ports until the scenario ends."""

    # Apps see headers as CGI has them: several lines joined, and no difference between `_` and `-` in names.
    is_cgi = False
    # Apps see a canonical host, and a canonical query.
    folds = False
    # Methods that may be tried over HTTP/2; None is all.
    knows_over_http2 = None
    # Headers that apps do not see.
    keeps_to_itself = frozenset()

    def __init__(self, argv, directory, label, env=None):
        super().__init__(argv, directory, label, env)
        for port in (self.port, self.port_http2):
            eventually(lambda: is_listening(port) or not self.running(), what=f"{label} listens on {port}")
        assert self.running(), f"{label} ended: {self.text()}"

    def reports(self):
        return [json.loads(line) for line in self.file.read_text().split("\n")[:-1]] if self.file.exists() else []

    def close(self):
        self.end()


class Hypercorn(Server):
    def __init__(self, ports, directory):
        self.port = self.port_http2 = ports.take()
        self.file = directory / "hypercorn.reports"
        argv = [sys.executable, "-m", "hypercorn", "--bind", f"127.0.0.1:{self.port}", "reporter_asgi:app"]
        super().__init__(argv, directory, "hypercorn", {"REPORTS": self.file, "PYTHONPATH": HERE})


class Node(Server):
    def __init__(self, ports, directory):
        self.port, self.port_http2 = ports.take(), ports.take()
        self.file = directory / "node.reports"
        env = {"REPORTS": self.file, "PORTS": f"{self.port},{self.port_http2}"}
        super().__init__([program("node"), HERE / "reporter.mjs"], directory, "node", env)


class Go(Server):
    keeps_to_itself = frozenset({"trailer"})

    def __init__(self, ports, directory):
        self.port = self.port_http2 = ports.take()
        self.file = directory / "go.reports"
        binary = directory / "reporter-go"
        built = subprocess.run([program("go"), "build", "-o", binary, HERE / "reporter.go"], capture_output=True, text=True, cwd=directory)
        if built.returncode:
            raise Absent(f"this Go can't build the server (1.24 or newer can): {built.stderr[:200]}")
        super().__init__([binary], directory, "go", {"REPORTS": self.file, "PORT": self.port})


class Cgi(Server):
    """A server in front of an SCGI program."""

    is_cgi = True

    def __init__(self, ports, directory, label):
        self.port, self.port_http2 = ports.take(), ports.take()
        self.directory = directory / label
        # Workers may be of another user.
        directory.chmod(0o755)
        self.directory.mkdir(mode=0o777)
        self.program = Scgi(ports.take())
        config = self.directory / "server.conf"
        config.write_text(self.config())
        super().__init__(self.command(config), directory, label)

    def reports(self):
        return [self.understood(variables, body) for variables, body in list(self.program.requests)]

    def understood(self, variables, body):
        target, _, _ = dict(variables)["REQUEST_URI"].partition("?")
        headers = [[name[5:].lower().replace("_", "-"), value] for name, value in variables if name.startswith("HTTP_")]
        hosts = [value for wanted in ("HTTP_HOST", "SERVER_NAME") for name, value in variables if name == wanted and value]
        variables = dict(variables)
        if variables.get("CONTENT_TYPE") and "HTTP_CONTENT_TYPE" not in variables:
            headers.append(["content-type", variables["CONTENT_TYPE"]])
        return {
            "method": variables["REQUEST_METHOD"], "target": target, "query": variables.get("QUERY_STRING", ""), "paths": self.paths(variables),
            "hosts": hosts, "headers": headers, "body": body.decode("latin-1"),
        }

    def paths(self, variables):
        return [variables.get("SCRIPT_NAME", "") + variables.get("PATH_INFO", "")]

    def close(self):
        super().close()
        self.program.close()


class Nginx(Cgi):
    def __init__(self, ports, directory):
        self.binary = program("nginx")
        super().__init__(ports, directory, "nginx")

    def command(self, config):
        return [self.binary, "-c", config, "-e", self.directory / "error.log"]

    def config(self):
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.directory}/{kind};\n" for kind in kinds)
        variables = {"REQUEST_METHOD": "request_method", "REQUEST_URI": "request_uri", "PATH_INFO": "document_uri", "QUERY_STRING": "args",
                     "SERVER_NAME": "host", "CONTENT_LENGTH": "content_length", "CONTENT_TYPE": "content_type", "SCGI": "scgi"}
        given = "".join(f"scgi_param {name} ${value};\n" for name, value in variables.items()).replace("$scgi", "1")
        return f"""
            daemon off; master_process off; pid {self.directory}/pid; error_log {self.directory}/error.log warn;
            events {{ worker_connections 512; }}
            http {{
                access_log off; {temporary}
                server {{
                    listen 127.0.0.1:{self.port};
                    listen 127.0.0.1:{self.port_http2} http2;
                    location / {{ scgi_pass 127.0.0.1:{self.program.port}; {given} }}
                }}
            }}"""


class Apache(Cgi):
    keeps_to_itself = frozenset({"authorization", "proxy-authorization"})
    MODULES = pathlib.Path("/usr/lib/apache2/modules")

    def __init__(self, ports, directory):
        self.binary = program("apache2")
        super().__init__(ports, directory, "apache")

    def command(self, config):
        return [self.binary, "-DFOREGROUND", "-f", config]

    def config(self):
        names = ("mpm_event", "authz_core", "proxy", "proxy_scgi", "http2", "env")
        modules = "".join(f"LoadModule {name}_module {self.MODULES}/mod_{name}.so\n" for name in names)
        # As root it wants another user; that of nobody needs nothing but its sockets.
        user = "User nobody\nGroup nogroup\n" if os.getuid() == 0 else ""
        return f"""{modules}{user}
ServerRoot {self.directory}
DefaultRuntimeDir {self.directory}
PidFile {self.directory}/pid
ErrorLog {self.directory}/error.log
ServerName none.example
StartServers 1
ServerLimit 1
ThreadsPerChild 16
MaxRequestWorkers 16
Listen 127.0.0.1:{self.port}
Listen 127.0.0.1:{self.port_http2}
Protocols h2c http/1.1
AllowEncodedSlashes On
UseCanonicalName Off
ProxyPass / scgi://127.0.0.1:{self.program.port}/
"""


class Lighttpd(Cgi):
    folds = True
    # 1.4.69 reads a header block over HTTP/2 no further than to a method that it does not know, and takes all later requests of the
    # connection for others.
    knows_over_http2 = ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE", "PATCH", "PROPFIND")

    def __init__(self, ports, directory):
        self.binary = program("lighttpd")
        super().__init__(ports, directory, "lighttpd")

    def command(self, config):
        return [self.binary, "-D", "-f", config]

    def config(self):
        return f"""
server.document-root = "{self.directory}"
server.bind = "127.0.0.1"
server.port = {self.port}
server.errorlog = "{self.directory}/error.log"
server.modules = ( "mod_scgi" )
$SERVER["socket"] == "127.0.0.1:{self.port_http2}" {{ }}
scgi.server = ( "/" => (( "host" => "127.0.0.1", "port" => {self.program.port}, "check-local" => "disable", "fix-root-scriptname" => "enable" )) )
"""


class Scgi(App):
    """The program behind a server: keeps the variables and the body of each request."""

    def __init__(self, port):
        self.requests, self._written = [], threading.Lock()
        super().__init__(port)

    def serve(self, conn):
        size = b""
        while not size.endswith(b":"):
            size += conn.take(1) or b":"
        if size == b":":
            return
        words = conn.take(int(size[:-1])).decode("latin-1").split("\0")[:-1]
        conn.take(1)
        variables = list(zip(words[::2], words[1::2]))
        body = conn.take(int(dict(variables).get("CONTENT_LENGTH") or 0))
        with self._written:
            self.requests.append((variables, body))
        conn.send(b"Status: 200 OK\r\nContent-Type: text/plain\r\n\r\nseen")


SERVERS = {"nginx": Nginx, "Apache httpd": Apache, "lighttpd": Lighttpd, "hypercorn": Hypercorn, "Node": Node, "Go": Go}
