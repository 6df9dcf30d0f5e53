/** Look-ups, watches and events as Node's own iterators and signals. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { createServer } from "node:net";
import test from "node:test";

import { Client, DaemonUnavailable, Instance, InvalidUrl, listen, NoAnswerInTime, NoInstances, ProtocolError, resolve,
  resolveAll, watch } from "portd-client";

const daemon = new Client();

/** Run `act` with the URL of a server on a port of the kernel's choice that does `answer` to every connection. */
async function posing(answer, act) {
  const callers = new Set();
  const server = createServer((caller) => {
    callers.add(caller.on("error", () => {}));
    answer(caller);
  }).listen(0, "127.0.0.1");
  await once(server, "listening");
  try {
    await act(`http://127.0.0.1:${server.address().port}`);
  } finally {
    for (const caller of callers) caller.destroy();
    server.close();
  }
}

test("an instance is what net.connect, http.get and fetch take", async () => {
  const held = await listen(createServer().unref(), "found", { tags: ["blue"], metadata: { version: "2" } });
  const found = await resolve("found", { tags: ["blue"], waitS: 10 });
  assert(found instanceof Instance);
  assert.deepEqual({ ...found, document: null }, { name: "found-1", host: "127.0.0.1", port: held.port, tags: ["blue"],
    metadata: { version: "2" }, isStale: false, document: null });
  assert.equal(found.authority, `127.0.0.1:${held.port}`);
  await assert.rejects(resolve("found", { tags: ["green"] }), NoInstances);
  assert.deepEqual(await resolveAll("found", { endpoint: "metrics" }), []);
  await held.release();
});

test("an IPv6 wildcard is reached by loopback, in brackets", () => {
  const one = new Instance({ instance: "a-1", address: "::", port: 80 });
  assert.deepEqual([one.host, one.authority], ["::1", "[::1]:80"]);
});

test("a watch tells of each change, and ends with its signal", async () => {
  const stopping = new AbortController();
  const seen = [];
  let held;
  await assert.rejects(async () => {
    for await (const instances of watch("watched", { signal: stopping.signal })) {
      seen.push(instances.map(({ name }) => name));
      if (seen.length === 1) held = await listen(createServer().unref(), "watched");
      else if (seen.length === 2) await held.release();
      else stopping.abort();
    }
  }, { name: "AbortError" });
  assert.deepEqual(seen, [[], ["watched-1"], []]);
});

test("a call ends with its signal, whose reason it rejects with", async () => {
  const reason = new Error("enough");
  await assert.rejects(resolve("anybody", { signal: AbortSignal.abort(reason) }), reason);
  await posing(() => {}, async (url) => {
    const stopping = new AbortController();
    const asked = new Client({ url }).lease("x", { signal: stopping.signal });
    setImmediate(() => stopping.abort(reason));
    await assert.rejects(asked, reason);
  });
});

test("events are an iterator that can be left", async () => {
  const held = await listen(createServer().unref(), "eventful");
  for await (const { name, data, revision } of daemon.events({ after: 0, service: "eventful" })) {
    assert.equal(name, "granted");
    assert.equal(data.revision, revision);
    break;
  }
  await held.release();
});

test("an answer that is no HTTP is a ProtocolError", async () => {
  const answers = ["", "SSH-2.0-OpenSSH\r\n\r\n", "HTTP/1.1 200 OK\r\nContent-Length: 9\r\n\r\n{",
    "HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: 1\r\n\r\n{"];
  for (const answer of answers) {
    await posing((caller) => caller.end(answer), (url) =>
      assert.rejects(new Client({ url }).lease("x"), ProtocolError, JSON.stringify(answer)));
  }
});

test("who accepts and says nothing is unavailable when the time is up", async () => {
  await posing(() => {}, (url) => assert.rejects(new Client({ url, timeoutS: 0.05 }).lease("x"), (error) => {
    assert(error instanceof NoAnswerInTime && error instanceof DaemonUnavailable);
    assert.deepEqual(error.tried, [{ url, reason: "no answer within 0.05 s" }]);
    return true;
  }));
});

test("a URL that is none of a daemon's is the caller's mistake", () => {
  for (const url of ["ftp://x:1", "http://nowhere", "http://host:0", "http://host:99999", "unix://relative.sock"]) {
    assert.throws(() => new Client({ url }), InvalidUrl);
  }
  for (const url of ["unix:///run/portd/portd.sock", "http://127.0.0.1:7783", "https://[::1]:7783"]) {
    assert.equal(new Client({ url }).url, url);
  }
});
