// Asks for each path that stands on a line of standard input, and says what came of it, a JSON object on a line.

import http from "node:http";
import readline from "node:readline";

const port = Number(process.argv[2]);

function ask(path) {
  return new Promise((resolve) => {
    const told = { path, status: null, headers: [], body: "", complete: false };
    const end = () => resolve(told);
    const request = http.get({ host: "127.0.0.1", port, path, agent: false, headers: { host: "shop" }, timeout: 10000 }, (response) => {
      told.status = response.statusCode;
      for (let at = 0; at < response.rawHeaders.length; at += 2) {
        told.headers.push([response.rawHeaders[at].toLowerCase(), response.rawHeaders[at + 1]]);
      }
      response.on("data", (piece) => (told.body += piece.toString("latin1")));
      response.on("error", end);
      response.on("close", () => {
        told.complete = response.complete;
        end();
      });
    });
    request.on("timeout", () => request.destroy());
    request.on("error", end);
  });
}

for await (const path of readline.createInterface({ input: process.stdin })) {
  console.log(JSON.stringify(await ask(path)));
}
