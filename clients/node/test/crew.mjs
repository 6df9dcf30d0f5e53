/** A service of two workers of node:cluster, which answer with their pid. */

import cluster from "node:cluster";
import http from "node:http";

import { listen } from "portd-client";

if (cluster.isPrimary) {
  cluster.fork();
  cluster.fork();
} else {
  const server = http.createServer((request, response) => {
    response.setHeader("Connection", "close").end(String(process.pid));
  });
  await listen(server, "crew");
}
