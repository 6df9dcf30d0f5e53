/**
 * Finding other services: one working instance at a time, or all changes as they come.
 *
 * The last answer is kept for a while, so that a daemon that restarts takes nobody's neighbours away; what comes from
 * memory says so (`isStale`).
 */

import { setTimeout as sleep } from "node:timers/promises";

import { Client } from "./client.js";
import { isPassing, NoInstances } from "./errors.js";
import { RETRY_MS } from "./keeping.js";

/** Milliseconds that an answer is good for while no daemon answers; ports of living processes do not change by then. */
const STALE_MAX_MS = 300_000;
/** Seconds of one long poll: proxies cut what is silent for a minute. */
const WAIT_S = 55;
/** Seconds of one that looks at the LAN too: the daemon is woken by changes of its own leases alone. */
const LAN_WAIT_S = 5;
/** A wildcard listens on loopback as well. */
const REACHABLE = { "0.0.0.0": "127.0.0.1", "::": "::1" };

/** One working instance. `isStale`: the daemon is away, and this is what it said last. `document` is its lease. */
export class Instance {
  constructor(document, isStale = false) {
    this.name = document.instance;
    this.host = REACHABLE[document.address] ?? document.address;
    this.port = document.port;
    this.tags = document.tags ?? [];
    this.metadata = document.metadata ?? {};
    this.isStale = isStale;
    this.document = document;
  }

  /** host:port, as a URL takes it. */
  get authority() {
    return this.host.includes(":") ? `[${this.host}]:${this.port}` : `${this.host}:${this.port}`;
  }
}

const memory = new Map();

/** Return one working instance, by chance; rejects with NoInstances when there is none, or DaemonUnavailable. */
export async function resolve(service, options) {
  const instances = await resolveAll(service, options);
  if (!instances.length) throw new NoInstances(service);
  return instances[Math.floor(Math.random() * instances.length)];
}

/** Return all working instances, perhaps none. */
export async function resolveAll(service, { client = new Client(), signal, ...filters } = {}) {
  const query = queryOf(filters);
  const question = JSON.stringify([client.url, service, query]);
  try {
    const { instances } = await client.service(service, query, { signal });
    memory.set(question, { at: performance.now(), instances });
    return instances.map((document) => new Instance(document));
  } catch (error) {
    const known = memory.get(question);
    if (!isPassing(error) || !known || performance.now() - known.at > STALE_MAX_MS) throw error;
    return known.instances.map((document) => new Instance(document, true));
  }
}

/**
 * Iterate over the working instances: now, and again whenever they change, without end; a daemon's absence is waited
 * out.
 *
 * What comes and goes on the LAN is seen within LAN_WAIT_S. With `ref: false` waiting for a change does not keep the
 * process alive. Throws DaemonUnavailable only when none answers at first, and the signal's reason once it is aborted.
 */
export async function* watch(service, { client = new Client(), signal, ref = true, ...filters } = {}) {
  const query = queryOf(filters);
  const wait = ["lan", "all"].includes(query.scope) ? LAN_WAIT_S : WAIT_S;
  let found = await client.service(service, query, { signal });
  yield found.instances.map((document) => new Instance(document));
  let after = { after: found.revision, wait };
  while (true) {
    let newer;
    try {
      newer = await client.service(service, { ...query, ...after }, { signal, ref });
    } catch (error) {
      if (!isPassing(error)) throw error;
      await sleep(RETRY_MS, undefined, { signal, ref });
      after = {}; // a daemon that lost its memory counts anew: ask for what is, then compare
      continue;
    }
    if (shown(newer) !== shown(found)) yield newer.instances.map((document) => new Instance(document));
    found = newer;
    after = { after: newer.revision, wait };
  }
}

function queryOf({ endpoint = "main", tags = [], scope }) {
  return { passing: true, endpoint, tag: tags, scope };
}

/** What a watcher cares about: who is where, and what it says about itself. */
function shown({ instances }) {
  return JSON.stringify(instances.map(({ id, address, port, tags, metadata }) => [id, address, port, tags, metadata]));
}
