"""Rules for requests, with requests and what must become of them: one table, for a real agent and for recorded answers.

Each `Rules` is what somebody writes into Consul about the service `api`, which speaks HTTP, and the requests that `web` then makes
of it. A request is a line such as `GET /path; name: value; token: valid`: a method, a target, and header lines in their order, of
which `token` stands for a bearer token of that kind (`mesh.tokens`). `403 RBAC` is what users of Envoy know.
"""

import base64
import dataclasses
import http.client
import json

from .identity import mtls_connect
from .tokens import AUDIENCE, ISSUER
from .wait import eventually

# The marks in config entries whose values are made anew in each run.
KEY_SET, KEYS_PORT = "@key-set@", "@keys-port@"


@dataclasses.dataclass(frozen=True)
class Rules:
    name: str
    requests: tuple  # of (request, status) or (request, status, path that the app sees)
    sources: tuple = ()  # of the service-intentions entry of `api`; none is no entry
    default: str = "deny"
    mesh: dict | None = None
    providers: tuple = ()
    token: dict | None = None  # what every request needs besides
    since: tuple = (1, 9)

    def entries(self):
        """The config entries, but for the services' own."""
        if self.mesh:
            yield {"Kind": "mesh", **self.mesh}
        yield from self.providers
        if self.sources:
            yield {"Kind": "service-intentions", "Name": "api", "Sources": list(self.sources), **({"JWT": self.token} if self.token else {})}


def allow(**http):
    return {"Action": "allow", "HTTP": http}


def deny(**http):
    return {"Action": "deny", "HTTP": http}


def header(name, **test):
    return {"Name": name, **{kind.title().replace("_", ""): value for kind, value in test.items()}}


def web(*permissions, **more):
    """An intention with `web` as its source."""
    return {"Name": "web", **({"Permissions": list(permissions)} if permissions else {}), **more}


def jwt(name="okta", *claims):
    verify = [{"Path": path.split("."), "Value": value} for path, value in claims]
    return {"Providers": [{"Name": name, **({"VerifyClaims": verify} if verify else {})}]}


def provider(name="okta", **more):
    return {"Kind": "jwt-provider", "Name": name, "Issuer": ISSUER, "JSONWebKeySet": {"Local": {"JWKS": KEY_SET}}, **more}


EVERYONE = {"Name": "*", "Action": "deny"}
SINCE_JWT, SINCE_NORMALIZATION = (1, 16), (1, 21)
NO_ADMIN = (web(deny(PathPrefix="/admin")),)


def normalization(**fields):
    return {"HTTP": {"Incoming": {"RequestNormalization": fields}}}


def bad_tokens(status=403):
    kinds = ("expired", "early", "other-audience", "other-issuer", "unknown-key", "strangers-key", "changed", "alg-none",
             "hs256-of-the-public-key", "rubbish")
    return tuple((f"GET /; token: {kind}", status) for kind in kinds)


TABLE = (
    # Who decides

    Rules("nothing is said and the default denies", (("GET /", 403),)),
    Rules("nothing is said and the default allows", (("GET /", 200),), default="allow"),
    Rules("all of a source is allowed", (("GET /", 200), ("POST /x", 200)), (web(Action="allow"),)),
    Rules("all of a source is denied", (("GET /", 403), ("POST /x", 403)), (web(Action="deny"),), "allow"),
    Rules("the first permission that matches decides", (
        ("GET /public/secret", 403), ("GET /public/open", 200), ("GET /other", 403),
    ), (web(deny(PathPrefix="/public/secret"), allow(PathPrefix="/public")),)),
    Rules("an allow before a deny of the same", (("GET /a", 200), ("GET /b", 403)),
          (web(allow(PathExact="/a"), deny(PathPrefix="/")),), "allow"),
    Rules("what no permission matches is left to a default that denies, not to an allow for everyone",
          (("GET /a", 200), ("GET /b", 403)), (web(allow(PathExact="/a")), {"Name": "*", "Action": "allow"})),
    Rules("what no permission matches is left to a default that allows, not to a deny for everyone",
          (("GET /a", 403), ("GET /b", 200)), (web(deny(PathExact="/a")), EVERYONE), "allow"),

    # Conditions

    Rules("methods", (
        ("GET /", 200), ("PUT /", 200), ("POST /", 403), ("get /", 403), ("GETS /", 403), ("HEAD /", 403),
    ), (web(allow(Methods=["GET", "PUT"])),)),
    Rules("an exact path", (
        ("GET /a", 200), ("GET /a?b=c", 200), ("GET /a?/b", 200), ("GET /a/", 403), ("GET /a/b", 403), ("GET /A", 403), ("GET /", 403),
    ), (web(allow(PathExact="/a")),)),
    Rules("a path's prefix is plain text", (
        ("GET /adm", 200), ("GET /admin", 200), ("GET /adm/x?y", 200), ("GET /Adm", 403), ("GET /x/adm", 403), ("GET /?/adm", 403),
    ), (web(allow(PathPrefix="/adm")),)),
    Rules("a pattern matches the whole path", (
        ("GET /a/1", 200), ("GET /a/12?x", 200), ("GET /a/", 403), ("GET /a/1/b", 403), ("GET /x/a/1", 403),
    ), (web(allow(PathRegex="/a/[0-9]+")),)),
    Rules("all conditions of a permission hold", (
        ("GET /a; x-role: user", 200), ("GET /a", 403), ("POST /a; x-role: user", 403), ("GET /b; x-role: user", 403),
    ), (web(allow(PathPrefix="/a", Methods=["GET"], Header=[header("x-role", exact="user")])),)),

    Rules("a header is there, or is not", (
        ("GET /p; x-a: 1", 200), ("GET /p; x-a: ", 200), ("GET /p", 403), ("GET /n", 200), ("GET /n; x-a: 1", 403),
    ), (web(allow(PathExact="/p", Header=[header("x-a", present=True)]),
            allow(PathExact="/n", Header=[header("X-A", present=True, invert=True)])),)),
    Rules("a header's value", (
        ("GET /e; x-a: abc", 200), ("GET /e; X-A: abc", 200), ("GET /e; x-a: ABC", 403), ("GET /e; x-a: abcd", 403), ("GET /e", 403),
        ("GET /p; x-a: abcd", 200), ("GET /p; x-a: xabc", 403),
        ("GET /s; x-a: xabc", 200), ("GET /s; x-a: abcx", 403),
        ("GET /r; x-a: a1", 200), ("GET /r; x-a: a1b", 403), ("GET /r; x-a: xa1", 403),
    ), (web(*(allow(PathExact=path, Header=[header("x-a", **test)]) for path, test in (
        ("/e", {"exact": "abc"}), ("/p", {"prefix": "abc"}), ("/s", {"suffix": "abc"}), ("/r", {"regex": "a[0-9]"})))),)),
    Rules("an inverted value needs the header", (
        ("GET /; x-a: other", 200), ("GET /; x-a: abc", 403), ("GET /", 403),
    ), (web(allow(Header=[header("x-a", exact="abc", invert=True)])),)),
    Rules("several headers all hold", (
        ("GET /; x-a: 1; x-b: 2", 200), ("GET /; x-a: 1", 403), ("GET /; x-b: 2", 403),
    ), (web(allow(Header=[header("x-a", exact="1"), header("x-b", exact="2")])),)),
    Rules("any of several lines is enough to deny", (
        ("GET /; x-role: user", 200), ("GET /; x-role: admin", 403), ("GET /; x-role: user; x-role: admin", 403),
        ("GET /; x-role: admin; x-role: user", 403), ("GET /; X-Role: user; x-ROLE: admin", 403),
    ), (web(deny(Header=[header("x-role", exact="admin")])),), "allow"),
    Rules("all of several lines are needed to allow", (
        ("GET /; x-role: user", 200), ("GET /; x-role: user; x-role: user", 200), ("GET /; x-role: user; x-role: admin", 403),
        ("GET /; x-role: admin; x-role: user", 403), ("GET /; x-role: user, admin", 403),
    ), (web(allow(Header=[header("x-role", exact="user")])),)),
    Rules("parts of values, of any case", (
        ("GET /c; x-a: one two three", 200), ("GET /c; x-a: ONE TWO", 403), ("GET /c", 403),
        ("GET /i; x-a: ONE TWO", 200), ("GET /i; x-a: one", 403),
        ("GET /e; x-a: ABC", 200), ("GET /e; x-a: abcd", 403), ("GET /p; x-a: aBCd", 200), ("GET /s; x-a: xAbC", 200),
        ("GET /n; x-a: xTWOx", 403), ("GET /n; x-a: one", 200),
    ), (web(*(allow(PathExact=path, Header=[header("x-a", **test)]) for path, test in (
        ("/c", {"contains": "two"}), ("/i", {"contains": "two", "ignore_case": True}), ("/e", {"exact": "abc", "ignore_case": True}),
        ("/p", {"prefix": "AbC", "ignore_case": True}), ("/s", {"suffix": "aBc", "ignore_case": True}),
        ("/n", {"contains": "two", "ignore_case": True, "invert": True})))),), since=SINCE_NORMALIZATION),

    # Tokens

    Rules("a token for everything", (
        ("GET /; token: valid", 200), ("GET /x; token: several-audiences", 200), ("GET /", 403), *bad_tokens(),
        ("GET /; token: valid; token: expired", 403), ("GET /; authorization: Basic dTpw", 403),
    ), (web(Action="allow"),), providers=(provider(Audiences=[AUDIENCE]),), token=jwt(), since=SINCE_JWT),
    Rules("a token for everything where the default allows", (
        ("GET /; token: valid", 200), ("GET /", 403), *bad_tokens(),
    ), (web(Action="allow"),), "allow", providers=(provider(Audiences=[AUDIENCE]),), token=jwt(), since=SINCE_JWT),
    Rules("a token of any audience", (
        ("GET /; token: valid", 200), ("GET /; token: other-audience", 200), ("GET /; token: other-issuer", 403),
    ), (web(Action="allow"),), providers=(provider(),), token=jwt(), since=SINCE_JWT),
    Rules("claims", (
        ("GET /; token: admin", 200), ("GET /; token: valid", 403), ("GET /", 403), ("GET /; token: changed", 403),
    ), (web(Action="allow"),), providers=(provider(),), token=jwt("okta", ("role", "admin")), since=SINCE_JWT),
    Rules("claims in lists and in objects", (
        ("GET /list; token: valid", 200), ("GET /deep; token: valid", 200), ("GET /both; token: valid", 200),
        ("GET /none; token: valid", 403), ("GET /list", 403),
    ), (web(*({**allow(PathExact=path), "JWT": jwt("okta", *claims)} for path, claims in (
        ("/list", [("groups", "staff")]), ("/deep", [("org.unit", "sales")]), ("/both", [("groups", "buyers"), ("role", "user")]),
        ("/none", [("groups", "staff"), ("role", "admin")])))),), providers=(provider(),), since=SINCE_JWT),
    Rules("a token for one permission", (
        ("GET /open", 200), ("GET /closed; token: valid", 200), ("GET /closed", 403), ("GET /closed; token: expired", 403),
        ("GET /open; token: expired", 200), ("GET /other; token: valid", 403),
    ), (web({**allow(PathPrefix="/closed"), "JWT": jwt()}, allow(PathExact="/open")),), providers=(provider(),), since=SINCE_JWT),
    Rules("a permission that wants for its token ends the search", (
        ("GET /a/b; token: valid", 200), ("GET /a/b", 403), ("GET /a", 200),
    ), (web({**allow(PathPrefix="/a/"), "JWT": jwt()}, allow(PathPrefix="/a")),), providers=(provider(),), since=SINCE_JWT),
    Rules("places of tokens", (
        ("GET /; x-jwt: Token $valid", 200), ("GET /?jwt=$valid", 200), ("GET /; cookie: a=b; cookie: jwt=$valid", 200),
        ("GET /; token: valid", 403), ("GET /; x-jwt: Token $expired", 403), ("GET /?jwt=$rubbish", 403), ("GET /?other=$valid", 403),
    ), (web(Action="allow"),), providers=(provider(Locations=[
        {"Header": {"Name": "x-jwt", "ValuePrefix": "Token "}}, {"QueryParam": {"Name": "jwt"}}, {"Cookie": {"Name": "jwt"}}]),),
        token=jwt(), since=SINCE_JWT),
    Rules("any of several providers", (
        ("GET /; x-one: $valid", 200), ("GET /; x-two: $valid", 200), ("GET /", 403), ("GET /; x-one: $expired", 403),
    ), (web(Action="allow"),),
        providers=(provider("one", Locations=[{"Header": {"Name": "x-one"}}]), provider("two", Locations=[{"Header": {"Name": "x-two"}}])),
        token={"Providers": [{"Name": "one"}, {"Name": "two"}]}, since=SINCE_JWT),
    Rules("keys that are fetched", (
        ("GET /; token: valid", 200), ("GET /; token: unknown-key", 403), ("GET /", 403),
    ), (web(Action="allow"),), providers=(provider(JSONWebKeySet={"Remote": {
        "URI": f"http://127.0.0.1:{KEYS_PORT}/keys", "RequestTimeoutMs": 2000, "FetchAsynchronously": True}}),), token=jwt(), since=SINCE_JWT),

    # Spellings

    Rules("no spelling of a path gets round a deny", (
        ("GET /public", 200, "/public"), ("GET /admin", 403), ("GET /admin?x", 403), ("GET /%61dmin", 403), ("GET /%61%64%6d%69%6e", 403),
        ("GET /public/../admin", 403), ("GET /public/%2e%2e/admin", 403), ("GET /public/..%2fadmin", 403), ("GET /./admin", 403),
        ("GET /x/..;/admin", 403), ("GET \\admin", 400), ("GET /x\\..\\admin", 403), ("GET //admin", 403), ("GET /%2fadmin", 403),
        ("GET /x/../public", 200, "/public"), ("GET /../public/", 200, "/public/"), ("GET /p%75blic", 200, "/public"),
        ("GET /a%2fb", 200, "/a%2Fb"), ("GET /a//b", 200, "/a//b"), ("GET /public?/../admin", 200, "/public?/../admin"),
    ), NO_ADMIN, "allow"),
    Rules("no spelling of a path is let in by an allow", (
        ("GET /public/a", 200), ("GET /public/../admin", 403), ("GET /public/%2e%2e/admin", 403), ("GET /public/..%2fadmin", 403),
        ("GET /public/..%5cadmin", 403), ("GET /public/..;/admin", 403), ("GET /x/../public/a", 200, "/public/a"),
    ), (web(allow(PathPrefix="/public/")),)),
    Rules("slashes are merged if asked for", (
        ("GET //admin", 403), ("GET /a//b", 200, "/a/b"), ("GET ///", 200, "/"),
    ), NO_ADMIN, "allow", normalization(MergeSlashes=True), since=SINCE_NORMALIZATION),
    Rules("escaped slashes are refused if asked for", (
        ("GET /a%2fb", 400), ("GET /a%5Cb", 400), ("GET /a/b", 200, "/a/b"), ("GET /a?%2f", 200, "/a?%2f"),
    ), NO_ADMIN, "allow", normalization(PathWithEscapedSlashesAction="REJECT_REQUEST"), since=SINCE_NORMALIZATION),
    Rules("escaped slashes are slashes if asked for", (
        ("GET /a%2fb", 200, "/a/b"), ("GET /%2fadmin", 403), ("GET /a%2f..%2fadmin", 403),
    ), NO_ADMIN, "allow", normalization(PathWithEscapedSlashesAction="UNESCAPE_AND_FORWARD"), since=SINCE_NORMALIZATION),
    Rules("escaped slashes are redirected if asked for", (
        ("GET /a%2fb", 307), ("GET /a/b", 200, "/a/b"),
    ), NO_ADMIN, "allow", normalization(PathWithEscapedSlashesAction="UNESCAPE_AND_REDIRECT"), since=SINCE_NORMALIZATION),
    Rules("headers with underscores are refused if asked for", (
        ("GET /; x_role: admin", 400), ("GET /; x-role: admin", 200),
    ), NO_ADMIN, "allow", normalization(HeadersWithUnderscoresAction="REJECT_REQUEST"), since=SINCE_NORMALIZATION),
    Rules("normalisation is off if asked for", (
        # As in Envoy, a path counts as it is written.
        ("GET /%61", 200, "/%61"), ("GET /a//b", 200, "/a//b"), ("GET /admin", 403), ("GET /%61dmin", 200, "/%61dmin"),
        ("GET /x/../public", 200, "/x/../public"), ("GET /x/..\\admin", 200, "/x/..\\admin"), ("GET /a%2fb%7E", 200, "/a%2fb%7E"),
    ), NO_ADMIN, "allow", normalization(InsecureDisablePathNormalization=True), since=SINCE_NORMALIZATION),
)


def services(agent, ports):
    """Registers `api` and `web`; `ports` has those of `api`, `api-public`, `web`, `web-public` and `upstream`."""
    agent.write("service-defaults", "api", Protocol="http")
    agent.write("service-defaults", "web", Protocol="http")
    for name, upstreams in (("api", []), ("web", [{"DestinationName": "api", "LocalBindPort": ports["upstream"]}])):
        check = {"CheckID": f"{name}-sidecar", "Name": "sidecar", "TTL": "24h", "Status": "passing"}
        agent.put("/v1/agent/service/register", {"ID": name, "Name": name, "Port": ports[name], "Connect": {"SidecarService": {
            "Port": ports[f"{name}-public"], "Checks": [check], "Proxy": {"Upstreams": upstreams}}}})


def write(agent, rules, issuer, keys_port):
    """Writes the rules, in the place of those that were written before."""
    agent.delete("/v1/config/service-intentions/api")
    for entry in agent.get("/v1/config/jwt-provider") or [] if agent.version >= SINCE_JWT else []:
        agent.delete(f"/v1/config/jwt-provider/{entry['Name']}")
    if agent.version >= (1, 10):
        agent.delete("/v1/config/mesh/mesh")
    for entry in rules.entries():
        agent.put("/v1/config", json.loads(filled(json.dumps(entry), issuer, keys_port)))


def filled(text, issuer, keys_port):
    key_set = base64.b64encode(json.dumps(issuer.key_set()).encode()).decode()
    return text.replace(KEY_SET, key_set).replace(KEYS_PORT, str(keys_port))


def agent_config(default):
    """Agent configuration with this default, without ACLs."""
    return {"default_intention_policy": default}


def check(rules, port, trust, identity, issuer):
    """Makes each request of a public listener, as whom `identity` names; raises with all that went otherwise than it must."""
    wrong = []
    for line, status, *path in rules.requests:
        answer, seen = request(line, port, trust, identity, issuer)
        if answer != status or (path and seen != path[0]):
            wrong.append(f"{line}: {answer} {seen}, and not {status} {''.join(path)}")
    assert not wrong, "\n".join([rules.name, *wrong])


def eventually_holds(rules, *where):
    eventually(lambda: check(rules, *where) is None, 8, rules.name, every=0.1)


def request(line, port, trust, identity, issuer):
    """Sends a request as it is written; returns the status, and the path that the app saw."""
    (target, *headers) = line.split("; ")
    lines = [f"{target} HTTP/1.1", "host: api", "connection: close"]
    for header_line in headers:
        name, value = header_line.split(": ", 1) if ": " in header_line else (header_line.rstrip(":"), "")
        lines.append(f"authorization: Bearer {issuer.token(value)}" if name == "token" else f"{name}: {value}")
    text = "\r\n".join([*lines, "", ""])
    for kind in ("valid", "expired", "rubbish"):
        if f"${kind}" in text:
            text = text.replace(f"${kind}", issuer.token(kind))
    with mtls_connect(port, trust, identity) as conn:
        conn.send(text.encode("latin-1"))
        response = http.client.HTTPResponse(conn.sock, method=target.split()[0])
        response.begin()
        body = response.read()
    return response.status, json.loads(body)["path"] if response.status == 200 and body else None
