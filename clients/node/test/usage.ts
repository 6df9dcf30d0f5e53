/** The types as a program meets them: it is compiled in the tests, never run. */

import { createSocket } from "node:dgram";
import http from "node:http";
import http2 from "node:http2";

import express from "express";
import { Client, DaemonUnavailable, Instance, Lease, lease, listen, PortdError, PortTaken, Problem, resolve, resolveAll,
  watch } from "portd-client";

const orders: Lease = await listen(http.createServer(express()), "orders", {
  check: { kind: "http", path: "/healthz", startPeriod: 3, expectStatus: [200] }, port: 8080, ttl: 30, backlog: 64,
  tags: ["blue"], announce: { type: "_http._tcp", txt: { path: "/" } }, fallback: "ephemeral",
});
orders.on("changed", (moved) => moved.port.toFixed()).on("lost", (error) => error.code);
await listen(createSocket("udp4"), "datagrams", { protocol: "udp" });
await orders.listen(http2.createServer());
await orders.report("passing", "all is well");
await orders.drain();
{
  await using port = await lease("brief", { check: "tcp" });
  console.log(port.address, port.port, port.document.expires_at);
}

const one: Instance = await resolve("billing", { tags: ["green"], scope: "lan" });
http.get({ host: one.host, port: one.port });
for (const { authority, isStale } of await resolveAll("billing")) console.log(authority, isStale);
for await (const instances of watch("billing", { signal: AbortSignal.timeout(1000), ref: false })) {
  console.log(instances.map(({ metadata }) => metadata.version));
}

const client = new Client({ url: "unix:///run/portd/portd.sock", timeoutS: 0.5 });
for await (const { id, state } of client.leases({ service: "orders" })) console.log(id, state);
for await (const { name, data } of client.events({ after: 1 })) console.log(name, data);
try {
  await client.grant({ service: "orders", check: { kind: "http", start_period: 3 } });
} catch (error) {
  if (error instanceof PortTaken) console.log(error.pointer, error.status);
  else if (error instanceof DaemonUnavailable) console.log(error.tried.map(({ url, reason }) => url + reason));
  else if (error instanceof Problem || error instanceof PortdError) console.log(error.code);
}

// @ts-expect-error: a server listens, a lease is not listened on
await listen("orders");
// @ts-expect-error: durations and ports are numbers
await lease("orders", { port: "8080" });
// @ts-expect-error: there is no such status
await orders.report("fine");
