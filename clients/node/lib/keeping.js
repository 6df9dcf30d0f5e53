/** How a lease is wished for, taken over and kept: the sequences of calls, without timers or sockets. */

import { DaemonUnavailable, LeaseLost, PortTaken } from "./errors.js";

/** Milliseconds between looks at a lease without a clock: how long it goes unnoticed that a daemon lost its memory. */
export const CHECK_MS = 30_000;
/** Milliseconds between tries while no daemon answers; a restart takes about a second. */
export const RETRY_MS = 1000;
/** The share of a period by which renewals are early, by chance: a thousand services must not renew in step. */
const JITTER = 0.2;

/** Make a lease request from what a program says. `check` may be written short: "tcp", "http:/healthz". */
export function wishOf(service, { check, ...options }) {
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

/** Read what `portd run` put into the environment for one endpoint; null when it did not start this process. */
export function given(environ, endpoint = "main") {
  const suffix = endpoint === "main" ? "" : `_${endpoint.toUpperCase().replaceAll("-", "_")}`;
  const id = environ[`PORTD_LEASE${suffix}`];
  const port = environ[`PORT${suffix}`] ?? "";
  if (!id || !/^\d+$/.test(port)) return null;
  const token = environ[`PORTD_TOKEN${suffix}`] || undefined;
  return { id, port: Number(port), address: environ.HOST ?? "127.0.0.1", token };
}

/**
 * Take over a given lease; returns its document, or null when it is another service's or has ended.
 *
 * Without an answer the environment is taken at its word: the port is ours as long as this process lives.
 */
export async function adopt(client, { id, port, address }, wish) {
  try {
    const document = await client.lease(id);
    return document.state === "ended" || document.service !== wish.service ? null : document;
  } catch (error) {
    if (error instanceof LeaseLost) return null;
    if (error instanceof DaemonUnavailable) return { ...blank(wish), id, port, address };
    throw error;
  }
}

/** Make the document of a lease that no daemon has shown yet. */
export function blank(wish) {
  return {
    id: "", instance: "", endpoint: "main", protocol: "tcp", address: "127.0.0.1", port: 0, ...wish,
    lifetime: "process", state: "held", health: "unknown", drain: false,
  };
}

/**
 * Renew a lease (or look whether it is there), and lease again with the same wish where it is lost.
 *
 * Returns the document as it is now; rejects with PortTaken when the port is somebody else's by now and may not change.
 */
export async function keep(client, { document, token, wish, mayMove }, options) {
  try {
    if (document.lifetime === "ttl") return await client.renew(document.id, { ...options, token });
    const current = await client.lease(document.id, options);
    if (current.state !== "ended") return current;
  } catch (error) {
    if (!(error instanceof LeaseLost)) throw error;
  }
  const again = { ...wish, port: document.port, exact: true };
  if (document.instance) again.instance = document.instance;
  try {
    return await client.grant(again, options);
  } catch (error) {
    if (!(error instanceof PortTaken) || !mayMove) throw error;
    return client.grant({ ...again, exact: false }, options);
  }
}

/** Return the milliseconds until the next look: a third of the ttl, or CHECK_MS, less some jitter. */
export function pauseMs({ lifetime, created_at, renewed_at, expires_at }) {
  const period = lifetime === "ttl" && expires_at ? (Date.parse(expires_at) - Date.parse(renewed_at ?? created_at)) / 3
    : CHECK_MS;
  return period * (1 - JITTER * Math.random());
}
