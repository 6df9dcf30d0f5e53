/** How a Node process ends, and what becomes of its leases and of its own handlers. */

import assert from "node:assert/strict";
import test from "node:test";

import { Client } from "portd-client";

import { firstLine, run, start } from "./programs.mjs";
import { until } from "./waiting.mjs";

const daemon = new Client();

function endedBecause(id) {
  return until(async () => (await daemon.lease(id)).ended_because, "the lease ends");
}

test("a lease does not keep a program from ending, and is given back then", async () => {
  const { status, output, errors } = await run(`console.log((await lease("brief", { ttl: 3600 })).id);`);
  assert.deepEqual([status, errors], [0, ""]);
  assert.equal(await endedBecause(output), "released");
});

test("a watch with ref: false does not keep a program from ending, a plain one does", async () => {
  const { status, output } = await run(`
    for await (const now of watch("nobody", { ref: false })) console.log(now.length);`);
  assert.deepEqual([status, output], [13, "0"]); // 13: what the program awaited at its top can't come any more
});

test("process.exit and an error that nobody catches leave it to the daemon", async () => {
  for (const ending of ["process.exit(3)", "throw new Error('meant')"]) {
    const { output } = await run(`console.log((await lease("abrupt")).id); ${ending};`);
    assert.equal(await endedBecause(output), "owner_exited");
  }
});

test("at SIGTERM and SIGINT the lease is given back, and the process dies of the signal", async () => {
  for (const signal of ["SIGTERM", "SIGINT"]) {
    const program = start(`releaseOnSignal(); console.log((await listen(createServer(), "stopped", { ttl: 60 })).id);`);
    const id = await firstLine(program);
    program.kill(signal);
    assert.equal((await program.ended).signal, signal);
    assert.equal(await endedBecause(id), "released");
  }
});

test("a handler of the program's own, from before or after, decides alone whether the process dies", async () => {
  const handler = `process.on("SIGTERM", () => server.close());`;
  const leasing = `const one = await listen(server, "minded", { ttl: 60 });`;
  for (const steps of [[handler, leasing], [leasing, handler]]) {
    const program = start(`releaseOnSignal(); const server = createServer(); ${steps.join(" ")} console.log(one.id);`);
    const id = await firstLine(program);
    program.kill("SIGTERM");
    const { status, signal } = await program.ended;
    assert.deepEqual([status, signal], [0, null]);
    assert.equal(await endedBecause(id), "released");
  }
});

test("a library that counts the handlers of a signal to decide whether to die finds only its own", async () => {
  const program = start(`
    releaseOnSignal();
    console.log((await listen(createServer(), "counted")).id);
    process.on("SIGTERM", function hear() {
      if (process.listenerCount("SIGTERM") !== 1) return; // as npm's signal-exit does
      process.off("SIGTERM", hear);
      process.kill(process.pid, "SIGTERM");
    });`);
  const id = await firstLine(program);
  program.kill("SIGTERM");
  assert.equal((await program.ended).signal, "SIGTERM");
  assert.match(await endedBecause(id), /released|owner_exited/);
});

test("a lease that is drained before it ends leaves look-ups, and its server serves on until then", async () => {
  const program = start(`
    releaseOnSignal();
    const server = http.createServer((_, response) => response.end("served"));
    const one = await listen(server, "drained", { drainS: 60 });
    console.log(one.port);`);
  const port = await firstLine(program);
  const [held] = (await daemon.call("GET", "/v1/leases", { query: { service: "drained" } })).leases;
  program.kill("SIGTERM");
  await until(async () => (await daemon.lease(held.id)).drain, "it is drained");
  assert.equal(await (await fetch(`http://127.0.0.1:${port}/`)).text(), "served");
  program.kill("SIGTERM"); // the second one does not wait
  assert.equal((await program.ended).signal, "SIGTERM");
  assert.equal(await endedBecause(held.id), "owner_exited");
});

test("no signal handler is installed unasked, and what was asked for can be undone", async () => {
  const { output } = await run(`
    const counts = () => ["SIGTERM", "SIGINT", "beforeExit"].map((name) => process.listenerCount(name));
    const held = [await lease("counted"), await lease("counted")];
    const seen = [counts()];
    const undo = releaseOnSignal();
    seen.push(counts());
    undo();
    await Promise.all(held.map((one) => one.release()));
    console.log(JSON.stringify([...seen, counts()]));`);
  assert.deepEqual(JSON.parse(output), [[0, 0, 1], [1, 1, 1], [0, 0, 0]]);
});
