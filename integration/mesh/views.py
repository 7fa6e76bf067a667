"""Two views of one request: the decision's, out of a sidecar's log, and that of the server behind it; and whether they are the same."""

import json
import posixpath
import re
import urllib.parse

# For one hop alone, or made anew at each (RFC 9110, 7.6.1; RFC 9112, 7).
FOR_ONE_HOP = {"connection", "keep-alive", "proxy-connection", "transfer-encoding", "upgrade", "http2-settings", "te", "host", "content-length"}
# Headers that a sidecar adds or replaces.
ADDED = {"x-request-id", "x-forwarded-proto", "x-forwarded-client-cert"}
# Taking these from a request by naming them in `connection` would change what it is.
NOT_BY_NAME = {"host", "te", "content-length", "authorization", "cookie", "proxy-authenticate", "proxy-authorization", *ADDED}


def decisions(log):
    """The lines that say how a request was judged, by its id, from the text of a log in JSON."""
    found = {}
    for line in log.split("\n"):
        if '"Request decided"' in line:
            entry = json.loads(line)
            found.setdefault(entry.get("request_id"), []).append(entry)
    return found


def by_id(reports):
    """Requests as a server understood them, by the id of the request."""
    found = {}
    for report in reports:
        ids = [value for name, value in report["headers"] if name == "x-request-id"] or [None]
        found.setdefault(", ".join(map(str, ids)), []).append(report)
    return found


def differences(server, probe, decision, report):
    """What the server understood otherwise than the decision did, or than the client wrote it where that goes on as it is."""
    found_differences = []

    def same(what, ours, theirs):
        if ours != theirs:
            found_differences.append(f"{what}: judged as {ours!r}, understood as {theirs!r}")

    same("method", decision["method"], report["method"])
    same("path", decision["path"], report["target"])
    authority = report["hosts"][0] if report["hosts"] else ""
    host, query = (canonical_host, urllib.parse.unquote) if server.folds else (str, str)
    same("authority", host(decision["authority"]), host(authority))
    if probe.raw is None:
        same("query", query(probe.target.partition("?")[2].partition("#")[0]), query(report["query"]))
        same("body", (probe.body or b"").decode("latin-1"), report["body"])
        sent, seen = headers(probe.fields, server.is_cgi), headers(report["headers"], server.is_cgi)
        for name in set(sent) | set(seen):
            if name not in FOR_ONE_HOP | ADDED | server.keeps_to_itself and not name.startswith(":"):
                same(f"header {name}", sent.get(name, []), seen.get(name, []))
        same("te", ["trailers"] if "trailers" in sent.get("te", []) and "te" in seen else [], seen.get("te", []))
    return found_differences


def headers(fields, is_cgi):
    """The values of each header; those of several lines, or of a list, are one after the other. What is named in `connection` is left out."""
    named = {name.strip().lower() for field, value in fields if field.lower() == "connection" for name in value.split(",")} - NOT_BY_NAME
    found = {}
    for name, value in fields:
        name = name.lower()
        # Programs behind CGI could not tell it from the name with dashes: such servers leave it out.
        if name in named or (is_cgi and "_" in name):
            continue
        values = [part.strip(" \t") for part in re.split(";" if name == "cookie" else ",", value)]
        found.setdefault(name, []).extend(part for part in values if part)
    return {name: values for name, values in found.items() if values}


def canonical_host(host):
    """As a server finds the site by it: case, the default port and a trailing dot make no difference."""
    return re.sub(r":0*80$|:$", "", host.lower()).removesuffix(".")


def readings(path):
    """A path as an app may go on to read it: as it is, with parameters cut off and slashes merged, and with dots resolved."""
    merged = re.sub(r"[/\\]+", "/", re.sub(r";[^/\\]*", "", path)) or "/"
    return {path, merged, posixpath.normpath(merged) + ("/" if merged.endswith("/") and merged != "/" else "")}


def breaks_denies(report):
    """What of a request that arrived is denied by `DENIES`, as the server understood it."""
    paths = {reading for path in report["paths"] for reading in readings(path)}
    return [what for what, broken in {
        "method": report["method"].upper() in ("DELETE", "PATCH"),
        "path": any(path.startswith("/admin") or path == "/secret" for path in paths),
        # Servers that hold several sites tell these apart by the name alone.
        "host": any(re.sub(r":\d*$", "", host.lower()).removesuffix(".") == "admin.example" for host in report["hosts"]),
        "x-role": ["x-role", "admin"] in report["headers"],
        "x-deny": any(name == "x-deny" for name, _ in report["headers"]),
    }.items() if broken]


def breaks_allows(report):
    """What of a request that arrived is not allowed by `ALLOWS`, as the server understood it."""
    paths = {reading for path in report["paths"] for reading in readings(path)}
    return [what for what, broken in {
        "method": report["method"] not in ("GET", "HEAD", "POST", "OPTIONS"),
        "path": not all(path.startswith("/public/") for path in paths),
        "host": not all(canonical_host(host) == "public.example" for host in report["hosts"]),
        "x-role": any(name == "x-role" and value != "user" for name, value in report["headers"]),
    }.items() if broken]


def header(name, **test):
    return {"Name": name, **test}


DENIES = [{"Action": "deny", "HTTP": http} for http in (
    {"Methods": ["DELETE", "PATCH"]}, {"PathPrefix": "/admin"}, {"PathExact": "/secret"}, {"Header": [header(":authority", Exact="admin.example")]},
    {"Header": [header("x-role", Exact="admin")]}, {"Header": [header("x-deny", Present=True)]},
)] + [{"Action": "allow", "HTTP": {"PathPrefix": "/"}}, {"Action": "allow", "HTTP": {"Header": [header(":method", Present=True)]}}]
ALLOWS = [
    {"Action": "deny", "HTTP": {"Header": [header("x-role", Present=True), header("x-role", Exact="user", Invert=True)]}},
    {"Action": "allow", "HTTP": {"PathPrefix": "/public/", "Methods": ["GET", "HEAD", "POST", "OPTIONS"],
                                 "Header": [header(":authority", Exact="public.example")]}},
    {"Action": "deny", "HTTP": {"Header": [header(":method", Present=True)]}},
]
