/** How a Node process ends, and what becomes of its leases and of its own handlers. */

import assert from "node:assert/strict";
import test from "node:test";

import { Client } from "portd-client";

import { firstLine, run, start } from "./programs.mjs";

const daemon = new Client();

async function endedBecause(id) {
  for (let tries = 0; tries < 2000; tries += 1) {
    const { ended_because } = await daemon.lease(id);
    if (ended_because) return ended_because;
    await new Promise((resolve) => { setTimeout(resolve, 5); });
  }
  return assert.fail("the lease did not end");
}

test("a lease does not keep a program from ending, and is given back then", async () => {
  const { status, output, errors } = await run(`console.log((await lease("brief", { ttl: 60 })).id);`);
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
    const program = start(`console.log((await listen(createServer(), "stopped", { ttl: 60 })).id);`);
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
    const program = start(`const server = createServer(); ${steps.join(" ")} console.log(one.id);`);
    const id = await firstLine(program);
    program.kill("SIGTERM");
    const { status, signal } = await program.ended;
    assert.deepEqual([status, signal], [0, null]);
    assert.equal(await endedBecause(id), "released");
  }
});

test("a library that counts the handlers of a signal to decide whether to die finds only its own", async () => {
  const program = start(`
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

test("while leases are held the process has one handler each, and none when they are given back", async () => {
  const { output } = await run(`
    const counts = () => ["SIGTERM", "SIGINT", "beforeExit"].map((name) => process.listenerCount(name));
    const held = [await lease("counted"), await lease("counted")];
    const between = counts();
    await Promise.all(held.map((one) => one.release()));
    console.log(JSON.stringify([between, counts()]));`);
  assert.deepEqual(JSON.parse(output), [[1, 1, 1], [0, 0, 0]]);
});
