// Writes down each request as Node understood it, a JSON object on a line of the file REPORTS. PORTS are those for HTTP/1 and HTTP/2.

import fs from "node:fs";
import http from "node:http";
import http2 from "node:http2";

const reports = fs.openSync(process.env.REPORTS, "a");
const [one, two] = process.env.PORTS.split(",");

// As an app is taught to find the path, and as it may go on to decode it.
function paths(target, host) {
  try {
    const path = new URL(target, `http://${host || "none"}`).pathname;
    try {
      return [path, decodeURIComponent(path)];
    } catch {
      return [path];
    }
  } catch {
    return [];
  }
}

function report(request, response) {
  const pieces = [];
  request.on("data", (piece) => pieces.push(piece));
  request.on("error", () => {});
  request.on("end", () => {
    const [target, ...query] = request.url.split("?");
    const headers = [];
    for (let at = 0; at < request.rawHeaders.length; at += 2) {
      headers.push([request.rawHeaders[at].toLowerCase(), request.rawHeaders[at + 1]]);
    }
    const host = request.headers[":authority"] ?? request.headers.host;
    fs.writeSync(reports, JSON.stringify({
      method: request.method, target, query: query.join("?"), paths: paths(request.url, host), hosts: host === undefined ? [] : [host],
      headers, body: Buffer.concat(pieces).toString("latin1"),
    }) + "\n");
    response.end("seen");
  });
}

http.createServer(report).listen(Number(one), "127.0.0.1");
http2.createServer(report).listen(Number(two), "127.0.0.1");
