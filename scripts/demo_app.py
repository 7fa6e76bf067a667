"""The demo's apps: an order needs its invoice, an invoice needs the tax rate.

demo_app.py NAME PORT [UPSTREAM_PORT]

The second version of tax is named tax-v2.

Each app knows nothing of the mesh: it calls what it depends on at a port of its own machine, in plain HTTP, and
listens only there too (BIND names another address).
"""

import http.client
import json
import os
import sys
import time
import urllib.error
import urllib.request

import flask

app = flask.Flask(__name__)
NAME = sys.argv[1]
UPSTREAM = f"http://127.0.0.1:{sys.argv[3]}" if len(sys.argv) > 3 else None


class Unreachable(Exception):
    """A dependency gave no good answer; the text has the reason."""


def call(what, path):
    # A connection of its own for each call: none is kept from before an intention changed.
    try:
        with urllib.request.urlopen(UPSTREAM + path, timeout=5) as answer:
            return json.load(answer)
    except urllib.error.HTTPError as error:
        raise Unreachable(f"{what} answered {error.code}: {reason_in(error.read().decode())}")
    except (OSError, http.client.HTTPException) as error:
        reason = getattr(error, "reason", error)
        raise Unreachable(f"the connection to {what} was closed without an answer ({reason})")


def reason_in(text):
    # Our apps say it in JSON, a sidecar in plain words.
    try:
        return json.loads(text)["error"]
    except ValueError:
        return text


@app.errorhandler(Unreachable)
def unreachable(error):
    return {"error": str(error)}, 502


@app.get("/")
def answer():
    if NAME == "order":
        return {"order": 1001, "invoice": call("invoice", "/")}
    if NAME == "invoice":
        rate = call("tax", "/")["rate"]
        return {"net": 100, "tax": 100 * rate, "gross": 100 + 100 * rate}
    return {"rate": 0.2 if NAME == "tax-v2" else 0.25}


@app.get("/rates")
def rates():
    """tax: one rate a moment, without end."""
    def forever():
        while True:
            yield "0.25\n"
            time.sleep(0.1)
    return flask.Response(forever(), mimetype="text/plain")


@app.get("/follow")
def follow():
    """invoice: passes on what tax streams over one open connection, and says when that ends."""
    def lines():
        try:
            with urllib.request.urlopen(UPSTREAM + "/rates", timeout=5) as stream:
                while line := stream.readline():
                    yield line
        except (OSError, http.client.HTTPException):
            pass
        yield b"ended\n"
    return flask.Response(lines(), mimetype="text/plain")


if __name__ == "__main__":
    app.run(os.environ.get("BIND", "127.0.0.1"), int(sys.argv[2]), threaded=True)
