/** Everything that the client throws on purpose. `Problem` is the daemon's answer; the rest is about reaching it. */

/** The root of all errors of this package. `code` is stable, `message` is for people. */
export class PortdError extends Error {
  constructor(message, code, options) {
    super(message, options);
    this.code = code;
  }

  get name() {
    return this.constructor.name;
  }
}

/** PORTD_URL, or the `url` of a client, is no URL of a daemon. */
export class InvalidUrl extends PortdError {
  constructor(url) {
    super(`${JSON.stringify(url)} is no URL of a portd: write unix:///path/portd.sock or http://host:port`,
      "invalid_url");
  }
}

/** No daemon answers. `tried` lists `{url, reason}`, in the order in which they were tried. */
export class DaemonUnavailable extends PortdError {
  constructor(tried) {
    const places = tried.map(({ url, reason }) => `${url} (${reason})`).join(", ");
    super(`no portd answers at ${places}; start one with 'portd serve --user', or name a running one in PORTD_URL`,
      "daemon_unavailable");
    this.tried = tried;
  }
}

/** A daemon is there, and says nothing. Whether it did what it was asked to is not known. */
export class NoAnswerInTime extends DaemonUnavailable {}

/** What answered does not speak the protocol: cut off in the middle, or something else listens there. */
export class ProtocolError extends PortdError {
  constructor(message, options) {
    super(message, "protocol_error", options);
  }
}

/** No instance of the service serves now, or fewer than were waited for. */
export class NoInstances extends PortdError {
  constructor(service, { count = 0, min = 1, waitS = 0 } = {}) {
    const number = count ? `only ${count} of ${min} instances` : "no instance";
    super(`${number} of ${service} serves${waitS ? ` after ${waitS} s` : " now"}`, "no_instances");
  }
}

/** The port's hold is exclusive: it is opened by handoff only, and Node can't receive sockets that way. */
export class HandoffNeeded extends PortdError {
  constructor(service, port) {
    super(`port ${port} of ${service} is held exclusively, and Node can't receive sockets from the daemon: start the `
      + `program with 'portd run ${service} --socket -- node …', or lease with hold: "shared"`, "handoff_needed");
  }
}

/** The daemon's refusal (RFC 9457). `pointer` (RFC 6901) names the field at fault or is null, `within` is "query" for one of the query. */
export class Problem extends PortdError {
  constructor(document, status) {
    const code = document.code ?? "unknown";
    const detail = document.detail || document.title || `HTTP status ${status}`;
    super(`${detail} (${code})`, code);
    this.status = status;
    this.detail = detail;
    this.pointer = document.pointer ?? null;
    this.within = document.in ?? null;
    this.document = document;
  }
}

/** Somebody else has exactly the port that was asked for. */
export class PortTaken extends Problem {}

/** There is no such lease (any more): it ended, or the daemon forgot it. */
export class LeaseLost extends Problem {}

/** The lease belongs to somebody else. */
export class NotOwner extends Problem {}

/** The pool has no free port. */
export class PoolExhausted extends Problem {}

/** Too much at once, or the store takes no writes: nothing has changed, and the same call may succeed later. */
export class Retryable extends Problem {}

const CLASSES = new Map(Object.entries({
  port_taken: PortTaken, port_reserved: PortTaken, not_found: LeaseLost, lease_ended: LeaseLost, not_owner: NotOwner,
  pool_exhausted: PoolExhausted, busy: Retryable, store_unavailable: Retryable,
}));

/** Make the error that belongs to a problem document; a code that is not known here makes a plain Problem. */
export function problem(document, status) {
  const Kind = CLASSES.get(document.code) ?? Problem;
  return new Kind(document, status);
}

/** Return whether an error passes by itself: the daemon is away, restarts, or has too much to do. */
export function isPassing(error) {
  return error instanceof DaemonUnavailable || error instanceof ProtocolError || error instanceof Retryable;
}
