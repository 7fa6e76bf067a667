"""The app that hypercorn runs: writes down each request as it was understood, a JSON object on a line of the file REPORTS."""

import json
import os

REPORTS = open(os.environ["REPORTS"], "a", buffering=1)


def latin(text):
    return text.decode("latin-1")


async def app(scope, receive, send):
    if scope["type"] == "lifespan":
        while True:
            message = await receive()
            await send({"type": message["type"] + ".complete"})
            if message["type"] == "lifespan.shutdown":
                return
    if scope["type"] != "http":
        return
    body, more = b"", True
    while more:
        message = await receive()
        if message["type"] != "http.request":
            return
        body, more = body + message.get("body", b""), message.get("more_body", False)
    headers = [[latin(name), latin(value)] for name, value in scope["headers"]]
    hosts = [value for name, value in headers if name == "host"]
    REPORTS.write(json.dumps({
        "method": scope["method"], "target": latin(scope["raw_path"]), "query": latin(scope["query_string"]), "paths": [scope["path"]],
        "hosts": hosts, "headers": headers, "body": latin(body),
    }) + "\n")
    await send({"type": "http.response.start", "status": 200, "headers": [(b"content-type", b"text/plain")]})
    await send({"type": "http.response.body", "body": b"" if scope["method"] == "HEAD" else b"seen"})
