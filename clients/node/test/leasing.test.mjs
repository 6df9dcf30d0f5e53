/** What a lease is to a Node program: servers, sockets, handlers and events. The daemon is the one of PORTD_URL. */

import assert from "node:assert/strict";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import http from "node:http";
import http2 from "node:http2";
import { connect, createServer } from "node:net";
import { text } from "node:stream/consumers";
import test from "node:test";

import { Client, HandoffNeeded, lease, listen, PortTaken, Problem } from "portd-client";

import { until } from "./waiting.mjs";

const daemon = new Client();
const absent = new Client({ url: "unix:///nonexistent/portd.sock" });

async function occupied(port, host = "127.0.0.1") {
  const occupant = createServer().listen(port, host);
  await once(occupant, "listening");
  return occupant;
}

function isOver(id) {
  return daemon.lease(id).then(({ ended_because }) => ended_because === "released");
}

test("an HTTP server listens on the leased port, and gives it back when it closes", async () => {
  const server = http.createServer((request, response) => response.end("served"));
  const orders = await listen(server, "served");
  assert.deepEqual([server.address().address, server.address().port], [orders.address, orders.port]);
  assert.equal(await text(await new Promise((resolve) => { http.get({ port: orders.port, agent: false }, resolve); })),
    "served");
  await until(async () => (await daemon.lease(orders.id)).state === "bound", "the daemon sees it listen");
  server.close();
  await until(() => isOver(orders.id), "the lease is given back");
});

test("HTTP/2 and plain TCP servers are taken as they are", async () => {
  for (const server of [http2.createServer(), createServer()]) {
    const one = await listen(server, "anything", { backlog: 5 });
    assert.equal(server.address().port, one.port);
    server.close();
    await one.release();
  }
});

test("a datagram socket binds the leased port, and `both` is had with a server and a socket", async () => {
  const socket = createSocket("udp4");
  const one = await listen(socket, "datagrams", { protocol: "udp" });
  assert.equal(socket.address().port, one.port);
  socket.close();
  await until(() => isOver(one.id), "the lease is given back");

  const [server, beside] = [createServer(), createSocket("udp4")];
  const both = await lease("doubled", { protocol: "both" });
  await both.listen(server);
  await both.listen(beside);
  assert.deepEqual([server.address().port, beside.address().port], [both.port, both.port]);
  await both.release();
  server.close();
  beside.close();
});

test("a port that is taken after all is declined for another, without an error event", async () => {
  const one = await lease("raced", { hold: "none" });
  const { id, port } = one;
  const occupant = await occupied(port);
  const server = createServer();
  const heard = [];
  server.on("error", (error) => heard.push(error));
  server.once("error", (error) => heard.push(error));
  await one.listen(server);
  assert.notEqual(one.port, port);
  assert.equal(server.address().port, one.port);
  assert.equal(one.id, id);
  assert.deepEqual(heard, []);
  assert.equal(server.listenerCount("error"), 2);
  server.emit("error", new Error("of its own"));
  assert.deepEqual([heard.length, server.listenerCount("error")], [2, 1]);
  server.close();
  occupant.close();
  await one.release();
});

test("what else is wrong with a server rejects, and its lease is given back", async () => {
  const server = await occupied(0);
  await assert.rejects(listen(server, "twice"), { code: "ERR_SERVER_ALREADY_LISTEN" });
  assert.deepEqual((await daemon.call("GET", "/v1/leases", { query: { service: "twice" } })).leases, []);
  assert.equal(server.listenerCount("error"), 0);
  server.close();
});

test("an exact port in use is refused with the daemon's code, status and pointer", async () => {
  const occupant = await occupied(0);
  const { port } = occupant.address();
  await assert.rejects(listen(createServer(), "refused", { port, exact: true }), (error) => {
    assert(error instanceof PortTaken && error instanceof Problem && error instanceof Error);
    assert.deepEqual([error.name, error.code, error.status, error.pointer], ["PortTaken", "port_taken", 409, "/port"]);
    assert.match(error.message, new RegExp(String(port)));
    return true;
  });
  occupant.close();
});

test("an exclusive hold is refused with the way out, and nothing stays leased", async () => {
  await assert.rejects(listen(createServer(), "exclusive", { hold: "exclusive" }), (error) => {
    assert(error instanceof HandoffNeeded);
    assert.match(error.message, /portd run exclusive --socket/);
    return true;
  });
  assert.deepEqual((await daemon.call("GET", "/v1/leases", { query: { service: "exclusive" } })).leases, []);
});

test("checks are written short or in camelCase", async () => {
  const short = await lease("checked", { check: "http:/healthz" });
  assert.deepEqual([short.document.check.kind, short.document.check.path], ["http", "/healthz"]);
  const check = { kind: "http", startPeriod: 3, expectStatus: [204], headers: { "X-Odd": "1" } };
  const long = await lease("checked", { check });
  const { start_period, expect_status, headers } = long.document.check;
  assert.deepEqual([start_period, expect_status, headers], [3, [204], { "X-Odd": "1" }]);
  await assert.rejects(lease("checked", { check: "tcp:/path" }), TypeError);
  await Promise.all([short.release(), long.release()]);
});

test("drain and report reach the daemon", async () => {
  const one = await lease("reporting", { check: { kind: "report", ttl: 30 } });
  await one.report("critical", "no database");
  await until(async () => (await daemon.lease(one.id)).health === "critical", "the report is seen");
  await one.drain();
  assert.equal((await daemon.lease(one.id)).drain, true);
  await one.drain(false);
  assert.equal(one.document.drain, false);
  await one.release();
});

test("a lease is disposed of as `await using` does it, and twice is once", async () => {
  const one = await lease("disposed");
  await one[Symbol.asyncDispose]();
  await one.release();
  assert(await isOver(one.id));
});

test("without a daemon the fallback listens on a port of the kernel's choice, and warns once", async () => {
  const warnings = [];
  const hear = (warning) => warnings.push(warning);
  process.on("warning", hear);
  const server = createServer((caller) => caller.end("alone"));
  const one = await listen(server, "alone", { client: absent, fallback: "ephemeral" });
  await one.report("passing");
  await one.drain();
  assert.deepEqual([one.id, one.isFallback, one.port], ["", true, server.address().port]);
  assert.equal(await text(connect(one.port)), "alone");
  server.close();
  await once(server, "close");
  process.off("warning", hear);
  assert.deepEqual(warnings.map(({ name, code }) => [name, code]), [["PortdWarning", "PORTD_FALLBACK"]]);
  assert.match(warnings[0].message, /portd serve --user/);
});

test("a fallback's port that is taken in between is given up for another", async () => {
  const one = await lease("alone", { client: absent, fallback: "ephemeral" });
  const { port } = one;
  const occupant = await occupied(port);
  const server = createServer();
  await one.listen(server);
  assert.notEqual(one.port, port);
  assert.equal(server.address().port, one.port);
  server.close();
  occupant.close();
});
