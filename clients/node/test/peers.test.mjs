/** Whom the client believes, and how it reads that from the kernel and the file system. */

import assert from "node:assert/strict";
import { once } from "node:events";
import { chmodSync, chownSync, mkdirSync, mkdtempSync, rmSync, symlinkSync } from "node:fs";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { after, test } from "node:test";

import { checkSocket, connect, isTrusted, listeners } from "./../lib/peers.js";

const ANOTHER = 4242;
const isRoot = process.geteuid() === 0;
const base = mkdtempSync(join(tmpdir(), "portd-peers-"));
after(() => rmSync(base, { recursive: true }));

async function listening(where) {
  const server = createServer().listen(where);
  await once(server, "listening");
  return server;
}

/** A directory of our own with a socket in it. */
async function withSocket(name) {
  mkdirSync(join(base, name), { mode: 0o700 });
  const path = join(base, name, "portd.sock");
  const server = await listening({ path });
  after(() => server.close());
  return path;
}

test("root and the own user are trusted, and others are not", () => {
  assert.deepEqual([0, process.geteuid(), ANOTHER, 65534].map(isTrusted), [true, true, false, false]);
});

for (const [bound, asked] of [["127.0.0.1", "127.0.0.1"], ["0.0.0.0", "127.0.0.1"], ["::1", "::1"], ["::", "::1"], ["::", "127.0.0.1"]]) {
  test(`the listener at ${bound} is found for ${asked}`, async () => {
    const server = await listening({ host: bound, port: 0 });
    assert.deepEqual([...listeners(asked, server.address().port).values()], [process.geteuid()]);
    server.close();
  });
}

test("a socket in a private directory is connected to", async () => {
  const socket = await connect({ socketPath: await withSocket("private") }, { ref: true });
  socket.destroy();
});

test("a socket that others could replace is refused", async () => {
  const path = await withSocket("shared");
  chmodSync(join(base, "shared"), 0o777);
  assert.throws(() => checkSocket(path), /other users can write/);
  chmodSync(join(base, "shared"), 0o1777);
  checkSocket(path);
});

test("a socket of another user is refused", { skip: !isRoot && "needs root" }, async () => {
  const path = await withSocket("foreign");
  chownSync(path, ANOTHER, ANOTHER);
  assert.throws(() => checkSocket(path), /4242/);
});

test("a link through another user's directory is refused", { skip: !isRoot && "needs root" }, async () => {
  const path = await withSocket("target");
  mkdirSync(join(base, "theirs"));
  symlinkSync(path, join(base, "theirs", "portd.sock"));
  symlinkSync(join(base, "theirs"), join(base, "link"));
  checkSocket(join(base, "link", "portd.sock"));
  chownSync(join(base, "theirs"), ANOTHER, ANOTHER);
  assert.throws(() => checkSocket(join(base, "link", "portd.sock")), /4242/);
});
