/**
 * Measures what the client adds to a process' start: node start_bench.mjs bare|portd
 *
 * `bare` listens on a port of the kernel's choice, `portd` imports the client, leases and listens. Prints the
 * milliseconds from the process' begin until it listens, those of import, lease and listening alone, and its memory.
 */

import { once } from "node:events";
import { createServer } from "node:net";

const server = createServer();
const began = performance.now();
if (process.argv[2] === "portd") {
  const { listen } = await import("../lib/index.js");
  await listen(server, "bench-start");
} else {
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
}
const now = performance.now(); // its origin is the process' begin
const rss_kib = Math.round(process.memoryUsage.rss() / 1024);
console.log(JSON.stringify({ ms: now, listen_ms: now - began, rss_kib }));
server.close();
