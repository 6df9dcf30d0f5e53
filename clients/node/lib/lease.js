/**
 * A lease of this process: adopted from `portd run` or granted, kept in the background, and released at exit.
 *
 * One timer keeps each lease; it does not keep the process alive, and ends with the lease.
 */

import { EventEmitter } from "node:events";
import { setTimeout as sleep } from "node:timers/promises";

import { Client } from "./client.js";
import { DaemonUnavailable, HandoffNeeded, isPassing, PortdError } from "./errors.js";
import { adopt, blank, CHECK_MS, fromEnvironment, keep, pauseMs, requestOf, RETRY_MS } from "./keeping.js";
import { forget, releaseAtExit } from "./leaving.js";
import { ephemeralPort, opened, passed } from "./listening.js";

/** Seconds that a release may take: a process that hangs because a daemon does is worse. */
const RELEASE_TIMEOUT_S = 2;
/** Ports that are declined in a row before listening gives up: then something else is wrong than a busy port. */
const DECLINES_MAX = 8;

/**
 * Lease a port for this process, or adopt the one that `portd run` leased for it.
 *
 * `fallback: "ephemeral"` takes a port of the kernel's choice where no daemon answers, and warns. With `drainS` the
 * lease leaves look-ups that many seconds before it is released, at exit too; its server serves on meanwhile.
 * Rejects with DaemonUnavailable or the Problem.
 */
export function lease(service, options) {
  return Lease.open(service, options);
}

/**
 * Make a net.Server (http, https, http2) listen, or a dgram.Socket bind, on a leased port; returns the lease, which is
 * released when the server closes, or at exit. A port that turns out to be in use is declined for another.
 */
export async function listen(target, service, { backlog, ...options } = {}) {
  const made = await Lease.open(service, options);
  try {
    await made.listen(target, { backlog });
  } catch (error) {
    await made.release();
    throw error;
  }
  return made;
}

/**
 * A lease as its holder sees it. `id` is "" for a fallback.
 *
 * Emits `changed` (lease) when the lease was lost and granted again on another port: listen there then. Without a listener
 * for it, or where exactly that port was asked for, the port never changes. Emits `lost` (error) when the daemon lost
 * the lease and it can't be had again, which is tried on and on; without a listener that is a warning.
 */
export class Lease extends EventEmitter {
  #client;
  #document;
  #isAdopted = false;
  #isPassed = false;
  #request;
  #token;
  #drainS;
  #timer;
  #keeping = Promise.resolve();
  #patience = new AbortController();
  #released;
  #isOver = false;
  #isLost = false;

  constructor(client, request, drainS) {
    super();
    this.#drainS = drainS;
    this.#client = client;
    this.#request = request;
    this.#document = blank(request);
  }

  /** Lease or adopt; see `lease`. */
  static async open(service, { client = new Client(), fallback, drainS = 0, ...options } = {}) {
    const made = new Lease(client, requestOf(service, options), drainS);
    try {
      await made.#acquire();
    } catch (error) {
      if (!(error instanceof DaemonUnavailable) || fallback !== "ephemeral") throw error;
      await made.#fallBack(error);
    }
    return made;
  }

  /** The lease as the daemon showed it last. */
  get document() { return this.#document; }
  get id() { return this.#document.id; }
  get service() { return this.#document.service; }
  get instance() { return this.#document.instance; }
  get endpoint() { return this.#document.endpoint; }
  get protocol() { return this.#document.protocol; }
  get address() { return this.#document.address; }
  get port() { return this.#document.port; }
  /** Whoever shows it may change the lease; undefined where no daemon gave one. */
  get token() { return this.#token; }
  /** Whether `portd run` leased it, for this process or one before it. */
  get isAdopted() { return this.#isAdopted; }
  /** Whether it listens on a socket that `portd run --socket` passed. */
  get isPassed() { return this.#isPassed; }
  /** Whether no daemon answered, and the port is of the kernel's choice. */
  get isFallback() { return !this.id; }

  /**
   * Make a net.Server listen, or a dgram.Socket bind, on this lease; for a lease of `both` protocols once with each.
   * When it closes the lease is released. `backlog` is the length of the queue of connections, by default Node's.
   */
  async listen(target, { backlog } = {}) {
    const fd = this.isAdopted ? passed(this, target) : undefined; // a service of another name has a port of its own
    this.#isPassed = fd !== undefined;
    if (this.isPassed) await opened(target, { fd, backlog });
    else if (this.#document.hold === "exclusive") throw new HandoffNeeded(this.service, this.port);
    else await this.#bind(target, backlog);
    const { port } = this;
    target.once("close", () => {
      if (this.port !== port) return; // it moves: what closed is the old port's listener
      this.#drainS = 0; // nobody serves any more
      this.release();
    });
  }

  /** Restart the clock of a ttl lease, which the background does by itself; `seconds` is a new period. */
  renew(seconds) {
    return this.#change((options) => this.#client.renew(this.id, { ...options, seconds }));
  }

  /** Give the port back as used by somebody else; afterwards `port` is another. */
  async decline() {
    if (this.isFallback) this.#document.port = await ephemeralPort(this);
    else await this.#change((options) => this.#client.decline(this.id, options));
  }

  /** Hand the lease over to another process of this host; this one neither keeps nor releases it any more. */
  async transfer(pid) {
    if (this.isFallback) return;
    await this.#change((options) => this.#client.transfer(this.id, pid, options));
    this.#isOver = true;
    clearTimeout(this.#timer);
    forget(this);
    this.#released = Promise.resolve();
  }

  /** Replace tags, metadata, weight, check or announce. */
  async change(fields) {
    await this.#change((options) => this.#client.change(this.id, fields, options));
    this.#request = { ...this.#request, ...fields };
  }

  /** Report health ("passing", "warning", "critical"), for a lease whose check is `report`. */
  report(status, note = "") {
    return this.#change((options) => this.#client.report(this.id, status, note, options));
  }

  /** Leave look-ups and keep the port; `drain(false)` comes back. */
  drain(on = true) {
    return this.#change((options) => this.#client.drain(this.id, on, options));
  }

  /** Release the lease, after draining; may be called twice, and an absent daemon is no error here. */
  release() {
    this.#released ??= this.#release();
    return this.#released;
  }

  [Symbol.asyncDispose ?? Symbol.for("Symbol.asyncDispose")]() {
    return this.release();
  }

  /** Make a call that answers with the lease as it is now. A fallback has no daemon to call. */
  async #change(call) {
    if (this.id) this.#document = await call({ token: this.#token });
  }

  // --- acquiring ---

  async #acquire() {
    const found = fromEnvironment(process.env, this.#request.endpoint);
    const adopted = found && await adopt(this.#client, found, this.#request);
    this.#isAdopted = Boolean(adopted);
    this.#token = adopted ? found.token : undefined;
    this.#hold(adopted || await this.#client.grant(this.#request));
    releaseAtExit(this);
    this.#keepAfter(pauseMs(this.#document));
  }

  async #fallBack(error) {
    if (this.address === "own" || this.protocol === "both") throw error;
    this.#document.port = await ephemeralPort(this);
    process.emitWarning(`${error.message}; using a port of the kernel's choice for ${this.service}`,
      { type: "PortdWarning", code: "PORTD_FALLBACK" });
  }

  async #bind(target, backlog) {
    for (let declines = 0; ; declines += 1) {
      try {
        // in a worker of node:cluster an own lease is the worker's own, and what the primary leased is shared
        return await opened(target, { host: this.address, port: this.port, backlog, exclusive: !this.isAdopted });
      } catch (error) {
        const isOurs = this.isFallback || this.#isMine; // what a parent leased and listens on is not ours to give back
        if (error.code !== "EADDRINUSE" || !isOurs || declines === DECLINES_MAX) throw error;
        await this.decline();
      }
    }
  }

  // --- keeping ---

  #hold(document) {
    this.#document = document;
    this.#token = document.token ?? this.#token;
  }

  #keepAfter(ms) {
    this.#timer = setTimeout(() => { this.#keeping = this.#keep(); }, ms).unref();
  }

  async #keep() {
    const held = {
      document: this.#document, token: this.#token, request: this.#request,
      mayMove: this.listenerCount("changed") > 0 && !this.#request.exact,
    };
    let pause;
    try {
      this.#update(await keep(this.#client, held, { ref: false, signal: this.#patience.signal }));
      pause = pauseMs(this.#document);
    } catch (error) {
      if (!(error instanceof PortdError)) throw error;
      if (!isPassing(error)) this.#miss(error);
      pause = isPassing(error) ? Math.min(RETRY_MS, pauseMs(this.#document)) : CHECK_MS;
    }
    if (!this.#isOver) this.#keepAfter(pause);
  }

  #update(document) {
    const { port, id } = this;
    this.#hold(document);
    this.#isAdopted = this.#isAdopted && id === this.id;
    this.#isLost = false;
    // on the next tick: what a listener throws is the program's, and must not end the keeping
    if (port !== this.port && !this.#released) process.nextTick(() => this.emit("changed", this));
  }

  #miss(error) {
    if (this.#isLost) return;
    this.#isLost = true;
    if (this.listenerCount("lost")) process.nextTick(() => this.emit("lost", error));
    else {
      process.emitWarning(`the lease of ${this.service} on port ${this.port} is lost, and can't be had again: `
        + error.message, { type: "PortdWarning", code: "PORTD_LOST" });
    }
  }

  // --- releasing ---

  /** Whether it is this process' to give back: an adopted one may belong to a parent that serves on. */
  get #isMine() {
    return this.isAdopted ? this.#document.owner?.pid === process.pid : Boolean(this.id);
  }

  async #release() {
    if (this.#drainS && this.#isMine) await this.#drainOut();
    this.#isOver = true;
    clearTimeout(this.#timer);
    if (!this.id) return;
    const limit = setTimeout(() => this.#patience.abort(), RELEASE_TIMEOUT_S * 1000);
    await this.#keeping.catch(() => {}); // it may be about to lease again: what it gets is to be released
    clearTimeout(limit);
    if (this.#isMine) {
      await this.#client.release(this.id, { token: this.#token, timeoutS: RELEASE_TIMEOUT_S }).catch(() => {});
    } // the daemon ends the lease when this process is gone, or when its clock runs out
    forget(this);
  }

  async #drainOut() {
    try {
      await this.#client.drain(this.id, true, { token: this.#token, timeoutS: RELEASE_TIMEOUT_S });
    } catch {
      return; // no daemon answers, so there is nothing to wait for
    }
    await sleep(this.#drainS * 1000);
  }
}
