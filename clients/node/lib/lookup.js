/**
 * Looking other services up: one instance at a time, or all changes as they come.
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
/** Seconds of one that covers the LAN too: the daemon is woken by changes of its own leases alone. */
const LAN_WAIT_S = 5;
/** A wildcard listens on loopback as well. */
const REACHABLE = { "0.0.0.0": "127.0.0.1", "::": "::1" };

/** One instance that serves. `isStale`: the daemon is away, and answered this last. `document` is its lease. */
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

/**
 * Return one instance that serves; those of the lowest priority share the callers by weight, at random. `waitS` waits for
 * the first one. Rejects with NoInstances when there is none, or DaemonUnavailable.
 */
export async function resolve(service, options) {
  const instances = await resolveAll(service, options);
  if (!instances.length) throw new NoInstances(service);
  return pick(instances);
}

/** Return all instances that serve. `min` and `waitS` wait until that many do, and reject with NoInstances otherwise. */
export async function resolveAll(service, options = {}) {
  const { client = new Client(), signal, waitS = 0, min = waitS ? 1 : 0, ...filters } = options;
  const query = queryOf(filters);
  const question = JSON.stringify([client.url, service, query]);
  const waiting = waitS && min ? { min, wait: waitS } : {};
  let found;
  try {
    const { instances } = await client.service(service, { ...query, ...waiting }, { signal });
    memory.set(question, { at: performance.now(), instances });
    found = instances.map((document) => new Instance(document));
  } catch (error) {
    const known = memory.get(question);
    if (!isPassing(error) || !known || performance.now() - known.at > STALE_MAX_MS) throw error;
    found = known.instances.map((document) => new Instance(document, true));
  }
  if (found.length < min) throw new NoInstances(service, { count: found.length, min, waitS });
  return found;
}

/**
 * Iterate over the instances that serve: now, and again whenever they change, without end.
 *
 * A daemon's absence is waited out, and one that lost its store is listed again. What comes and goes on the LAN is seen
 * within LAN_WAIT_S. With `ref: false` waiting for a change does not keep the process alive. Throws DaemonUnavailable only
 * when none answers at first, and the signal's reason once it is aborted.
 */
export async function* watch(service, { client = new Client(), signal, ref, ...filters } = {}) {
  const query = queryOf(filters);
  const wait = ["lan", "all"].includes(query.scope) ? LAN_WAIT_S : WAIT_S;
  let known;
  let polling = {};
  while (true) {
    let answer;
    try {
      answer = await client.requestService(service, { ...query, ...polling }, { signal, ref: known ? ref : true });
    } catch (error) {
      const isGone = error.code === "revision_gone";
      if (known === undefined || !(isPassing(error) || isGone)) throw error;
      if (!isGone) await sleep(RETRY_MS, undefined, { signal, ref });
      polling = {}; // another store counts anew: request what is, then compare
      continue;
    }
    const { body, headers } = answer;
    const store = headers["x-portd-store"];
    polling = { after: store ? `${store}:${body.revision}` : body.revision, wait };
    const now = shown(body);
    if (now !== known) yield body.instances.map((document) => new Instance(document));
    known = now;
  }
}

/** Choose one as RFC 2782 chooses a server: the lowest priority first, there at random by weight. */
export function pick(instances) {
  const priority = ({ document }) => document.priority ?? 0;
  const lowest = Math.min(...instances.map(priority));
  const group = instances.filter((one) => priority(one) === lowest);
  const weights = group.map(({ document }) => document.weight ?? 1);
  const total = weights.reduce((sum, weight) => sum + weight, 0);
  if (!total) return group[Math.floor(Math.random() * group.length)];
  let rest = Math.random() * total;
  return group.find((_, index) => (rest -= weights[index]) < 0) ?? group.at(-1);
}

function queryOf({ endpoint = "main", tags = [], scope }) {
  return { passing: true, endpoint, tag: tags, scope };
}

/** What a watcher sees: who is where, and what it says about itself. */
function shown({ instances }) {
  return JSON.stringify(instances.map(({ id, address, port, tags, metadata, weight }) =>
    [id, address, port, tags, metadata, weight]));
}
