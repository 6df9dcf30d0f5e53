/** How a lease is requested, adopted and kept: the sequences of calls, without timers or sockets. */

import { isDeepStrictEqual } from "node:util";

import { DaemonUnavailable, LeaseLost, PortTaken, Problem } from "./errors.js";

/** Milliseconds between checks of a lease without a clock: how long it goes unnoticed that a daemon lost its store. */
export const CHECK_MS = 30_000;
/** Milliseconds between tries while no daemon answers; a restart takes about a second. */
export const RETRY_MS = 1000;
/** The share of a period by which renewals are early, at random: a thousand services must not renew in step. */
const JITTER = 0.2;

/** Make a lease request from a program's options. `check` may be written short: "tcp", "http:/healthz". */
export function requestOf(service, { check, ...options }) {
  const made = { service, ...options };
  if (typeof check === "string") made.check = shortCheck(check);
  else if (check) made.check = Object.fromEntries(Object.entries(check).map(([name, value]) => [snake(name), value]));
  return Object.fromEntries(Object.entries(made).filter(([, value]) => value !== undefined && value !== null));
}

function shortCheck(text) {
  const [, kind, rest] = /^([^:]*):?(.*)$/s.exec(text);
  if (!rest) return { kind };
  const field = { http: "path", grpc: "service" }[kind];
  if (!field) throw new TypeError(`check ${JSON.stringify(text)}: write it as an object`);
  return { kind, [field]: rest };
}

function snake(name) {
  return name.replace(/[A-Z]/g, (letter) => `_${letter.toLowerCase()}`);
}

/** The fields of a lease that PATCH replaces. */
const CHANGEABLE = ["tags", "metadata", "weight", "check", "announce"];
/** The leases of the environment that this process has adopted: each belongs to one Lease. */
const adopted = new Set();
const warned = new Set();

/** Read what `portd run` put into the environment for one endpoint; null when it did not start this process. */
export function fromEnvironment(environ, endpoint = "main") {
  const suffix = endpoint === "main" ? "" : `_${endpoint.toUpperCase().replaceAll("-", "_")}`;
  const id = environ[`PORTD_LEASE${suffix}`];
  const port = environ[`PORT${suffix}`] ?? "";
  if (!id || !/^\d+$/.test(port) || adopted.has(id)) return null;
  const token = environ[`PORTD_TOKEN${suffix}`] || undefined;
  return { id, port: Number(port), address: environ.HOST ?? "127.0.0.1", token };
}

/**
 * Adopt a lease of the environment, and apply to it what the program requests; returns its document, or null when it is
 * another service's or has ended.
 *
 * If no daemon answers, trust the environment: the lease of `portd run` lasts as long as this process.
 */
export async function adopt(client, { id, port, address, token }, request) {
  try {
    const document = await client.lease(id);
    if (document.state === "ended") return null;
    if (document.service !== request.service) {
      warnOfAnotherService(id, document, request);
      return null;
    }
    const missing = differences(document, request);
    adopted.add(id);
    return Object.keys(missing).length ? await client.change(id, missing, { token }) : document;
  } catch (error) {
    if (error instanceof LeaseLost) return null;
    if (!(error instanceof DaemonUnavailable)) throw error;
    adopted.add(id);
    return { ...blank(request), id, port, address };
  }
}

/** Return the requested fields that a lease does not have yet; a check is shown with its defaults filled in. */
export function differences(document, request) {
  const has = (actual, wanted) => {
    if (typeof wanted === "boolean") return Boolean(actual) === wanted;
    if (wanted?.kind && actual) return Object.entries(wanted).every(([name, value]) => isDeepStrictEqual(actual[name], value));
    return isDeepStrictEqual(actual, wanted);
  };
  return Object.fromEntries(CHANGEABLE.filter((name) => name in request && !has(document[name], request[name]))
    .map((name) => [name, request[name]]));
}

function warnOfAnotherService(id, { service, port }, request) {
  if (warned.has(id) || adopted.has(id)) return;
  warned.add(id);
  process.emitWarning(`'portd run' leased port ${port} for ${service}, but this program leases for ${request.service}: use `
    + "one name, or the port of 'portd run' stays unused", { type: "PortdWarning", code: "PORTD_OTHER_SERVICE" });
}

/** Make the document of a lease that no daemon has shown yet. */
export function blank(request) {
  return {
    id: "", instance: "", endpoint: "main", protocol: "tcp", address: "127.0.0.1", port: 0, ...request,
    lifetime: "process", state: "held", health: "unknown", drain: false,
  };
}

/**
 * Renew a lease (or check that it is there), and lease again by the same request where it is lost. A port that this
 * process listens on is leased back as it is.
 *
 * Returns the newest document; rejects with PortTaken when somebody else has the port by now and it may not change.
 */
export async function keep(client, { document, token, request, mayMove }, options) {
  try {
    if (document.lifetime === "ttl") return await client.renew(document.id, { ...options, token });
    const current = await client.lease(document.id, options);
    if (current.state !== "ended") return current;
  } catch (error) {
    if (!(error instanceof LeaseLost)) throw error;
  }
  const again = { ...request, port: document.port, exact: true };
  if (document.instance) again.instance = document.instance;
  try {
    return await client.grant(again, options);
  } catch (error) {
    if (!(error instanceof PortTaken)) throw error;
    const found = await adoptListener(client, again, options);
    if (found) return found;
    if (!mayMove) throw error;
    return client.grant({ ...again, exact: false }, options);
  }
}

/** Lease a port for this process, which listens on it; null where another process does. */
async function adoptListener(client, { exact, hold, pool, ...again }, options) {
  try {
    const found = await client.grant({ ...again, adopt: true }, options);
    if (found.owner?.pid === process.pid) return found;
    await client.release(found.id, { ...options, token: found.token }); // another process of this user listens there
    return null;
  } catch (error) {
    if (error instanceof Problem) return null;
    throw error;
  }
}

/** Return the milliseconds until the next check: a third of the ttl, or CHECK_MS, less some jitter. */
export function pauseMs({ lifetime, created_at, renewed_at, expires_at }) {
  const period = lifetime === "ttl" && expires_at ? (Date.parse(expires_at) - Date.parse(renewed_at ?? created_at)) / 3
    : CHECK_MS;
  return period * (1 - JITTER * Math.random());
}
