/** The conformance suite's driver of the Node client; its protocol is in clients/conformance/README.md. */

import { createHook } from "node:async_hooks";
import { createSocket } from "node:dgram";
import { once } from "node:events";
import { createServer } from "node:net";
import { createInterface } from "node:readline";
import { setImmediate as turn } from "node:timers/promises";

const left = new Set();
/** What could be left of the client: its timers, and connections and listeners over TCP and unix sockets. */
const KINDS = new Set(["Timeout", "TCPWRAP", "TCPSERVERWRAP", "PIPEWRAP", "UDPWRAP"]);
const { stdin, stdout } = process; // opened before the count begins: they are the driver's own
createHook({
  init: (id, kind) => { if (KINDS.has(kind)) left.add(id); },
  destroy: (id) => left.delete(id),
}).enable();
const portd = await import("../lib/index.js");

const greeting = `${process.argv[2]}\n`;
const leases = new Map();
const servers = new Map();
const watches = new Map();
let connected;

function client() {
  connected ??= new portd.Client();
  return connected;
}

function tell(message) {
  stdout.write(`${JSON.stringify(message)}\n`);
}

function failure(error) {
  const { message, code, status, pointer, tried } = error;
  if (error instanceof portd.LeaseLost) return { kind: "lease_lost", message, code, status, pointer };
  if (error instanceof portd.Problem) return { kind: "problem", message, code, status, pointer };
  if (error instanceof portd.NoInstances) return { kind: "no_instances", message };
  if (error instanceof portd.ProtocolError) return { kind: "daemon_unavailable", message, tried: [] };
  if (error instanceof portd.DaemonUnavailable) {
    const kind = error instanceof portd.NoAnswerInTime ? "timeout" : "daemon_unavailable";
    return { kind, message, tried: tried.map((one) => [one.url, one.reason]) };
  }
  return { kind: "usage", message };
}

function shownLease(handle, lease) {
  const { service, instance, endpoint, protocol, address, port } = lease;
  return {
    handle, lease: lease.id || null, service, instance, endpoint, protocol, address, port,
    revision: lease.document.revision ?? null, is_adopted: lease.isAdopted, is_fallback: lease.isFallback,
    is_passed: lease.isPassed,
  };
}

function shownInstance({ host, port, name, isStale }) {
  return { host, port, instance: name, is_stale: isStale };
}

function question({ tag, service, wait_s, ...filters }) {
  return [service, { client: client(), tags: tag ? [tag] : [], ...(wait_s && { waitS: wait_s }), ...filters }];
}

async function leased({ service, drain_s = 0, ...options }) {
  const handle = `l${leases.size + 1}`;
  const lease = await portd.lease(service, { client: client(), drainS: drain_s, ...options });
  lease.on("changed", () => tell({ event: "changed", handle, port: lease.port, lease: lease.id }));
  lease.on("lost", ({ code }) => tell({ event: "lost", handle, code }));
  leases.set(handle, lease);
  return [handle, lease];
}

async function released(handle) {
  await leases.get(handle).release();
  for (const server of servers.get(handle) ?? []) await once(server.close(), "close");
  servers.delete(handle);
}

function listeners(protocol) {
  const server = () => createServer((caller) => caller.on("error", () => {}).end(greeting));
  const socket = () => createSocket("udp4");
  return { tcp: () => [server()], udp: () => [socket()], both: () => [server(), socket()] }[protocol]();
}

const calls = {
  async connect({ timeout_s, ...options }) {
    connected = new portd.Client({ ...options, ...(timeout_s && { timeoutS: timeout_s }) });
    await connected.leases({ limit: 1 }).next();
    return { url: connected.url };
  },

  async lease(options) {
    return shownLease(...await leased(options));
  },

  async listen({ backlog, handle: known, ...options }) {
    const [handle, lease] = known ? [known, leases.get(known)] : await leased(options);
    const opened = listeners(lease.protocol);
    try {
      for (const one of opened) await lease.listen(one, { backlog });
    } catch (error) {
      if (!known) await lease.release();
      throw error;
    }
    servers.set(handle, opened);
    return shownLease(handle, lease);
  },

  async call({ method, path, body }) {
    try {
      const answer = await client().request(method, path, { body });
      return { status: answer.status, body: answer.body };
    } catch (error) {
      if (!(error instanceof portd.Problem)) throw error;
      return { status: error.status, body: error.document };
    }
  },

  renew: ({ handle, seconds }) => leases.get(handle).renew(seconds),
  transfer: ({ handle, pid }) => leases.get(handle).transfer(pid),
  change: ({ handle, fields }) => leases.get(handle).change(fields),

  async decline({ handle }) {
    await leases.get(handle).decline();
    return shownLease(handle, leases.get(handle));
  },

  async events({ after, service, name }) {
    for await (const { name: found, revision, data } of client().events({ after, service })) {
      if (found === name) return { name, revision, lease: data.lease.id };
    }
  },

  release: ({ handle }) => released(handle),
  drain: ({ handle }) => leases.get(handle).drain(),
  report: ({ handle, status, output }) => leases.get(handle).report(status, output),

  async resolve(options) {
    return shownInstance(await portd.resolve(...question(options)));
  },

  async resolve_all(options) {
    return { instances: (await portd.resolveAll(...question(options))).map(shownInstance) };
  },

  async watch(options) {
    const handle = `w${watches.size + 1}`;
    const stopping = new AbortController();
    const [service, filters] = question(options);
    watches.set(handle, stopping);
    follow(handle, portd.watch(service, { ...filters, signal: stopping.signal })).catch((error) => {
      if (!stopping.signal.aborted) tell({ event: "failed", handle, error: failure(error) });
    });
    return { handle };
  },

  async unwatch({ handle }) {
    watches.get(handle).abort();
  },

  async close() {
    for (const stopping of watches.values()) stopping.abort();
    for (const handle of leases.keys()) await released(handle);
    for (let turns = 0; left.size && turns < 100; turns += 1) await turn(); // closing takes a turn of the loop or two
    return { remaining: left.size };
  },
};

async function follow(handle, answers) {
  for await (const instances of answers) {
    tell({
      event: "instances", handle, is_stale: instances.some(({ isStale }) => isStale),
      instances: instances.map(shownInstance),
    });
  }
}

portd.releaseOnSignal();
process.on("warning", ({ message }) => tell({ event: "warning", message }));
const input = createInterface({ input: stdin });
input.on("line", async (line) => {
  const { id, call, with: options } = JSON.parse(line);
  try {
    tell({ id, result: (await calls[call](options)) ?? {} });
  } catch (error) {
    tell({ id, error: failure(error) });
  }
});
input.on("close", () => { // a normal exit: nothing of the driver's own keeps the process
  for (const stopping of watches.values()) stopping.abort();
  for (const server of [...servers.values()].flat()) server.unref();
});
