"""Third-party clients, which request paths one by one and report the result of each.

The result: `status` (None where there was no response), `headers`, `body`, and whether it was `complete`.
"""

import concurrent.futures
import http.client
import json
import pathlib
import socket
import subprocess

from ..process import environment
from ..servers import Absent, program

HERE = pathlib.Path(__file__).resolve().parent


def result(path, status=None, headers=(), body=b"", complete=False):
    return {"path": path, "status": status, "headers": [[name.lower(), value] for name, value in headers], "body": body.decode("latin-1"), "complete": complete}


def python(port, paths, _directory):
    """http.client."""
    for path in paths:
        conn = http.client.HTTPConnection("127.0.0.1", port, timeout=10)
        try:
            conn.request("GET", path, headers={"Host": "shop"})
            response = conn.getresponse()
        except (OSError, http.client.HTTPException):
            yield result(path)
            continue
        try:
            yield result(path, response.status, response.getheaders(), response.read(), True)
        # A chunk size below zero is a ValueError.
        except (OSError, ValueError, http.client.HTTPException):
            yield result(path, response.status, response.getheaders())
        finally:
            conn.close()


def http10(port, paths, _directory):
    """A client of HTTP/1.0, to which the end of the connection is the end of the body, and a reset is none."""
    for path in paths:
        got, complete = b"", False
        with socket.create_connection(("127.0.0.1", port), 10) as sock:
            sock.sendall(f"GET {path} HTTP/1.0\r\nHost: shop\r\n\r\n".encode())
            try:
                while part := sock.recv(65536):
                    got += part
                complete = True
            except OSError:
                pass
        while got.startswith(b"HTTP/1.1 1"):
            got = got.partition(b"\r\n\r\n")[2]
        head, found, body = got.partition(b"\r\n\r\n")
        if not found or not head.split(b" ")[1:2] or not head.split(b" ")[1].isdigit():
            yield result(path)
            continue
        headers = [line.decode("latin-1").partition(":")[::2] for line in head.split(b"\r\n")[1:]]
        headers = [(name.lower(), value.strip(" \t")) for name, value in headers]
        if (length := dict(headers).get("content-length", "")).isdigit():
            complete, body = len(body) >= int(length), body[:int(length)]
        yield result(path, int(head.split(b" ")[1]), headers, body, complete)


def curl(*version):
    def ask(port, paths, directory):
        binary = program("curl")

        def one(number, path):
            head, body = directory / f"head-{number}", directory / f"body-{number}"
            done = subprocess.run([binary, "-q", "-s", *version, "-H", "Host: shop", "--max-time", "10", "-D", head, "-o", body, f"http://127.0.0.1:{port}{path}"],
                                  env=environment(), stdin=subprocess.DEVNULL)
            # Trailers come behind the head there.
            blocks = [block for block in head.read_bytes().split(b"\r\n\r\n") if block.startswith(b"HTTP/")] if head.exists() else []
            content = body.read_bytes() if body.exists() else b""
            for file in (head, body):
                file.unlink(missing_ok=True)
            if not blocks or done.returncode in (1, 8, 43):
                return result(path)
            lines = blocks[-1].decode("latin-1").rstrip("\r\n").split("\r\n")
            status = int(lines[0].split(" ")[1])
            headers = [(name, value.strip(" \t")) for name, _, value in (line.partition(":") for line in lines[1:])]
            return result(path, None if status < 200 else status, headers, content, done.returncode == 0 and status >= 200)

        with concurrent.futures.ThreadPoolExecutor(4) as pool:
            yield from pool.map(one, range(len(paths)), paths)
    return ask


def piped(argv, paths):
    done = subprocess.run([str(word) for word in argv], input="".join(f"{path}\n" for path in paths), capture_output=True, text=True, env=environment(), timeout=300)
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.split("\n")[:-1]]


def node(port, paths, _directory):
    return piped([program("node"), HERE / "client.mjs", port], paths)


def go(port, paths, directory):
    binary = directory / "client-go"
    if not binary.exists():
        built = subprocess.run([program("go"), "build", "-o", binary, HERE / "client.go"], capture_output=True, text=True, cwd=directory)
        if built.returncode:
            raise Absent(f"this Go can't build the client (1.22 or newer can): {built.stderr[:200]}")
    return piped([binary, port], paths)


CLIENTS = {"Python": python, "HTTP/1.0": http10, "curl": curl("--http1.1"), "Node": node, "Go": go}
# Of HTTP/2, through sidecars alone: a server of HTTP/1 has no such client.
CURL_HTTP2 = curl("--http2-prior-knowledge")
