/**
 * The calls of the daemon's API, and how they travel: one connection a call, so that a daemon's restart between two
 * calls is nothing to recover from. It must not know what a lease means to this process.
 */

import http from "node:http";

import { candidates, parse } from "./endpoints.js";
import { DaemonUnavailable, NoAnswerInTime, problem, ProtocolError } from "./errors.js";
import { serverSentEvents } from "./events.js";
import { connect } from "./peers.js";

/** Seconds that a call may take: twice what the daemon itself gives its disk. */
const TIMEOUT_S = 10;
/** Milliseconds without a byte after which a stream of events counts as dead: the daemon says something every 15 s. */
const SILENCE_MS = 60_000;
/** The longest body that is gathered in memory: 10,000 leases are about 10 MB. Streams are not gathered. */
const BODY_MAX_BYTES = 64 * 1024 * 1024;

/**
 * Speaks to one daemon. Every call rejects with Problem when the daemon says no, DaemonUnavailable when none answers.
 *
 * `url` is what PORTD_URL may say; without it the client looks where every client looks. `token` is a bearer token, by
 * default PORTD_TOKEN, unless that belongs to the lease of PORTD_LEASE. `timeoutS` bounds a whole call, in seconds.
 *
 * The last argument of a call may have `signal` (an AbortSignal), `timeoutS`, a lease's `token`, and `ref: false`: do
 * not keep the process alive for it.
 */
export class Client {
  #candidates;
  #token;
  #timeoutS;

  constructor({ url, token, timeoutS = TIMEOUT_S } = {}) {
    const environ = process.env;
    this.#candidates = url ? [parse(url)] : candidates(environ, process.geteuid());
    this.#token = token ?? ("PORTD_LEASE" in environ ? undefined : environ.PORTD_TOKEN);
    this.#timeoutS = timeoutS;
  }

  /** The endpoint that answered last, or that is tried first, as PORTD_URL writes it. */
  get url() {
    return this.#candidates[0].url;
  }

  // --- the calls of the API ---

  /** Request one lease. The answer carries the lease's `token`, this once. The daemon waits up to `waitS` for a port. */
  grant(request, { waitS, ...options } = {}) {
    return this.#grant(request, waitS, options);
  }

  /** Request several leases, all or none. */
  grantAll(requests, { waitS, ...options } = {}) {
    return this.#grant(requests, waitS, options);
  }

  /** Iterate over the leases that fit all filters, page after page. */
  async *leases(filters = {}, options = {}) {
    let cursor = filters.cursor;
    do {
      const page = await this.call("GET", "/v1/leases", { ...options, query: { ...filters, cursor } });
      yield* page.leases;
      cursor = page.next;
    } while (cursor !== null);
  }

  /** Show one lease. */
  lease(id, options) {
    return this.call("GET", leasePath(id), options);
  }

  /** Restart the clock of a ttl lease, with a new period where `seconds` gives one. */
  renew(id, { seconds, ...options } = {}) {
    const body = seconds === undefined ? undefined : { seconds };
    return this.call("POST", leasePath(id, "/renew"), { ...options, body });
  }

  /** Request another port under the same lease: somebody else has this one. */
  decline(id, options) {
    return this.call("POST", leasePath(id, "/decline"), options);
  }

  /** Take an instance out of look-ups while it keeps its ports, or bring it back. */
  drain(id, on = true, options = {}) {
    return this.call("POST", leasePath(id, "/drain"), { ...options, body: { drain: on } });
  }

  /** Replace tags, metadata, weight, check or announce. */
  change(id, fields, options) {
    return this.call("PATCH", leasePath(id), { ...options, body: fields });
  }

  /** Report the result of a `report` check. */
  report(id, status, note = "", options = {}) {
    return this.call("PUT", leasePath(id, "/health"), { ...options, body: { status, note } });
  }

  /** Release; a lease that is released already stays so. */
  release(id, options) {
    return this.call("DELETE", leasePath(id), options);
  }

  /** Hand a lease over to another process of this host. */
  transfer(id, pid, options) {
    return this.call("POST", leasePath(id, "/transfer"), { ...options, body: { pid } });
  }

  /** Return every port of the host that is leased, static, cooling or listened on. */
  async ports(options) {
    return (await this.call("GET", "/v1/ports", options)).ports;
  }

  /** Return who has a port, per the kernel and per the lease table. */
  port(number, query, options) {
    return this.call("GET", `/v1/ports/${number}`, { ...options, query });
  }

  /** Return who had a port, newest first; `at` (RFC 3339) selects one moment. */
  async history(number, query, options) {
    return (await this.call("GET", `/v1/ports/${number}/history`, { ...options, query })).leases;
  }

  /** Iterate over the services' names with counts by health, page after page. */
  async *services(options = {}) {
    let cursor;
    do {
      const page = await this.call("GET", "/v1/services", { ...options, query: { cursor } });
      yield* page.services;
      cursor = page.next ?? null;
    } while (cursor !== null);
  }

  /** Return a service's instances; with `wait` (seconds) and `after` or `min`, once there is what it waits for. */
  async service(name, query = {}, options = {}) {
    return (await this.requestService(name, query, options)).body;
  }

  /** Make that call, and return `{status, headers, body}`. */
  requestService(name, query = {}, options = {}) {
    const timeoutS = (options.timeoutS ?? this.#timeoutS) + (query.wait ?? 0);
    return this.request("GET", `/v1/services/${encodeURIComponent(name)}`, { ...options, query, timeoutS });
  }

  /** Return the DNS-SD services seen on the LAN; `type` selects one, as "_http._tcp". */
  async lan(query, options) {
    return (await this.call("GET", "/v1/lan", { ...options, query })).services;
  }

  /** Return the hosts of the cluster. */
  hosts(options) {
    return this.call("GET", "/v1/hosts", options);
  }

  /** Return the daemon's condition: version, pools, counts, warnings. */
  status(options) {
    return this.call("GET", "/v1/status", options);
  }

  /**
   * Iterate over `{name, revision, data}` until the daemon closes the stream. `after` is the last revision that is known;
   * without it the events of now on follow. Rejects with Problem `revision_gone` when the daemon does not keep what
   * followed that revision: list again, then follow.
   */
  async *events({ after, service } = {}, options = {}) {
    const limit = new Limit(SILENCE_MS, options);
    try {
      const question = { ...options, query: { after, service } };
      const response = await this.#open("GET", "/v1/events", question, limit, "text/event-stream");
      if (response.statusCode !== 200) await answered(response);
      for await (const event of serverSentEvents(parts(response, () => limit.extend()))) {
        limit.pause(); // what the reader spends on an event is no silence of the daemon's
        yield event;
        limit.extend();
      }
    } catch (error) {
      throw limit.explained(error, this.url);
    } finally {
      limit.end();
    }
  }

  /** Make any call of the API, and return its decoded body; null where there is none. */
  async call(method, path, options) {
    return (await this.request(method, path, options)).body;
  }

  /** Make any call of the API, and return `{status, headers, body}`. */
  async request(method, path, options = {}) {
    const limit = new Limit((options.timeoutS ?? this.#timeoutS) * 1000, options);
    try {
      const response = await this.#open(method, path, options, limit, "application/json");
      return await answered(response);
    } catch (error) {
      throw limit.explained(error, this.url);
    } finally {
      limit.end();
    }
  }

  #grant(body, waitS, options) {
    const timeoutS = (options.timeoutS ?? this.#timeoutS) + (waitS ?? 0);
    return this.call("POST", "/v1/leases", { ...options, body, query: { wait: waitS }, timeoutS });
  }

  // --- connections ---

  /** Send a request to the first place that can be connected to, and return the response when its head is there. */
  async #open(method, path, { query, body, token, ref = true }, limit, accept) {
    const bearer = token ?? this.#token;
    const data = body === undefined ? undefined : JSON.stringify(body);
    const headers = {
      Accept: accept,
      ...(bearer && { Authorization: `Bearer ${bearer}` }),
      ...(data && { "Content-Type": "application/json" }),
      ...((data || method !== "GET") && { "Content-Length": Buffer.byteLength(data ?? "") }),
    };
    const request = { method, path: path + queryString(query), headers, signal: limit.signal };
    const tried = [];
    for (const place of this.#candidates) {
      try {
        const response = await exchange(place, request, data, ref);
        this.#candidates = [place, ...this.#candidates.filter((other) => other !== place)];
        return response;
      } catch (error) {
        if (!(error instanceof Unreached)) throw error;
        tried.push({ url: place.url, reason: error.message });
      }
    }
    throw new DaemonUnavailable(tried);
  }
}

/** No connection came about: the next place may be tried. */
class Unreached extends Error {}

/** Make one request at one place; rejects with Unreached when nobody is there, ProtocolError when it breaks off. */
async function exchange(place, request, data, ref) {
  const { url, socketPath, host, port } = place;
  let socket;
  try {
    socket = await connect(place, { signal: request.signal, ref });
  } catch (error) {
    throw new Unreached(reason(error), { cause: error });
  }
  // over a unix socket "localhost" stands for the daemon
  const authority = socketPath ? "localhost" : `${host.includes(":") ? `[${host}]` : host}:${port}`;
  return new Promise((resolve, reject) => {
    const outgoing = http.request({
      ...request, headers: { Host: authority, ...request.headers }, createConnection: () => socket,
    });
    outgoing.on("response", resolve);
    outgoing.on("error", (error) => reject(new ProtocolError(`${url}: ${broken(error)}`, { cause: error })));
    outgoing.end(data);
  });
}

const REASONS = {
  ENOENT: "no such file or directory", ECONNREFUSED: "connection refused", EACCES: "permission denied",
};

function reason({ code, message }) {
  return REASONS[code] ?? (message || code);
}

function broken({ code, message }) {
  return code?.startsWith("HPE_") ? "what answers does not speak HTTP/1.1" : `the connection broke: ${message}`;
}

/** How long a call may take, and who may break it off: its deadline, or the caller's signal. */
class Limit {
  #controller = new AbortController();
  #ms;
  #timer;
  #isPaused = false;
  #isOver = false;
  #theirs;
  #onAbort = () => this.#controller.abort(this.#theirs.reason);

  constructor(ms, { signal, ref = true }) {
    signal?.throwIfAborted();
    this.#ms = ms;
    this.#timer = setTimeout(() => {
      if (this.#isPaused) return;
      this.#isOver = true;
      this.#controller.abort();
    }, ms);
    if (!ref) this.#timer.unref();
    this.#theirs = signal;
    signal?.addEventListener("abort", this.#onAbort, { once: true });
  }

  get signal() {
    return this.#controller.signal;
  }

  /** Let no time count, until it is extended. */
  pause() {
    this.#isPaused = true;
  }

  /** Give the call its whole time again. */
  extend() {
    this.#isPaused = false;
    this.#timer.refresh();
  }

  /** Return the error to throw for `error`: breaking off comes out of the request as any odd error. */
  explained(error, url) {
    if (this.#isOver) return new NoAnswerInTime([{ url, reason: `no answer within ${this.#ms / 1000} s` }]);
    if (this.#theirs?.aborted) return this.#theirs.reason;
    return error;
  }

  end() {
    clearTimeout(this.#timer);
    this.#theirs?.removeEventListener("abort", this.#onAbort);
    this.#controller.abort(); // an unfinished stream's connection must not outlive its reader
  }
}

/** Iterate over a body's parts; `onPart` is called for each. */
async function* parts(response, onPart = () => {}) {
  try {
    for await (const part of response) {
      onPart();
      yield part;
    }
  } catch (error) {
    throw new ProtocolError(`the connection was closed in the middle of an answer: ${error.message}`, { cause: error });
  }
}

/** Read a whole answer: JSON as values, no body as null; throws the Problem that it is. */
async function answered(response) {
  const { statusCode: status, headers } = response;
  const chunks = [];
  let size = 0;
  for await (const part of parts(response)) {
    chunks.push(part);
    size += part.length;
    if (size > BODY_MAX_BYTES) throw new ProtocolError(`the answer is longer than ${BODY_MAX_BYTES} bytes`);
  }
  const text = Buffer.concat(chunks).toString();
  const isJson = headers["content-type"]?.includes("json") ?? false;
  const body = isJson && text ? parsed(text) : text || null;
  if (status >= 400) throw problem(isJson && typeof body === "object" ? body ?? {} : {}, status);
  return { status, headers, body };
}

function parsed(text) {
  try {
    return JSON.parse(text);
  } catch (error) {
    throw new ProtocolError(`an answer that should be JSON is none: ${error.message}`);
  }
}

/** Write a query: undefined and null leave a field out, a list repeats it. */
function queryString(fields = {}) {
  const query = new URLSearchParams();
  for (const [name, value] of Object.entries(fields)) {
    for (const item of [value ?? []].flat()) query.append(name, item);
  }
  const text = query.toString();
  return text && `?${text}`;
}

function leasePath(id, rest = "") {
  return `/v1/leases/${encodeURIComponent(id)}${rest}`;
}
