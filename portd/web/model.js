// What the page knows: leases, ports and status, and the events that change them. Knows nothing of the document.

const EVENTS_KEPT = 200;
const PORTS_EVERY_MS = 5000;
const RETRY_MS = [500, 1000, 2000, 5000];

export const EVENT_TYPES = ["granted", "bound", "unbound", "conflict", "declined", "draining", "undrained", "updated",
  "health", "announced", "passed", "ended"];

/** A refusal of the API: `message` is the problem document's detail. */
export class Problem extends Error {}

/** Call the API; returns the decoded answer (null for 204) and its headers. */
export async function call(method, path, body) {
  const answer = await fetch(path, {
    method,
    headers: body === undefined ? {} : { "Content-Type": "application/json" },
    body: body === undefined ? undefined : JSON.stringify(body),
  });
  const document = answer.status === 204 ? null : await answer.json();
  if (!answer.ok) throw new Problem(document.detail || answer.statusText);
  return { document, headers: answer.headers };
}

/** An instance's condition for a caller: one word, which is also a colour. */
export function condition(lease) {
  if (lease.state === "conflict") return "conflict";
  if (lease.drain) return "draining";
  if (lease.check && lease.health !== "unknown") return lease.health;
  return lease.state;
}

/** The model emits `leases` (a set of changed service names, or null for all), `ports`, `status`, `event`, `connection`. */
export class Model extends EventTarget {
  constructor() {
    super();
    this.leases = new Map();
    this.services = new Map();
    this.ports = [];
    this.byPort = new Map();
    this.status = null;
    this.events = [];
    this.connected = false;
    this.failures = 0;
  }

  emit(name, detail) { this.dispatchEvent(new CustomEvent(name, { detail })); }

  /** Load everything, then follow; starts over whenever the stream ends for good. */
  async start() {
    try {
      const [status, revision] = await Promise.all([call("GET", "/v1/status"), this.list()]);
      this.status = status.document;
      this.emit("status");
      this.follow(revision);
      this.failures = 0;
      this.pollPorts();
    } catch (error) {
      this.lost(error.message);
    }
  }

  /** List every lease, page by page; returns the position to follow from. */
  async list() {
    const leases = new Map();
    let position = null;
    let cursor = null;
    do {
      const query = "limit=2000" + (cursor ? "&cursor=" + encodeURIComponent(cursor) : "");
      const { document, headers } = await call("GET", "/v1/leases?" + query);
      position ??= headers.get("X-Portd-Store")
        ? headers.get("X-Portd-Store") + ":" + headers.get("X-Portd-Revision") : headers.get("X-Portd-Revision");
      for (const lease of document.leases) leases.set(lease.id, lease);
      cursor = document.next;
    } while (cursor);
    this.leases = leases;
    this.services = new Map();
    for (const lease of leases.values()) this.enter(lease);
    this.emit("leases", null);
    return position;
  }

  enter(lease) {
    if (!this.services.has(lease.service)) this.services.set(lease.service, new Map());
    this.services.get(lease.service).set(lease.id, lease);
  }

  follow(position) {
    const stream = new EventSource("/v1/events?after=" + encodeURIComponent(position));
    const again = () => { stream.close(); this.start(); };
    stream.onopen = () => { this.connected = true; this.failures = 0; this.emit("connection", ""); };
    stream.addEventListener("gone", again);
    stream.onerror = () => {
      this.connected = false;
      if (stream.readyState === EventSource.CLOSED) this.lost("the stream of events has ended");
      else this.emit("connection", "Not connected: this is what was seen last. Reconnecting…");
    };
    const changed = new Set();
    for (const type of EVENT_TYPES) {
      stream.addEventListener(type, (message) => {
        const event = JSON.parse(message.data);
        this.apply(event);
        if (changed.size === 0) requestAnimationFrame(() => { this.emit("leases", new Set(changed)); changed.clear(); });
        changed.add(event.lease.service);
      });
    }
  }

  apply(event) {
    const { lease } = event;
    if (event.type === "ended") {
      this.leases.delete(lease.id);
      const service = this.services.get(lease.service);
      service?.delete(lease.id);
      if (service?.size === 0) this.services.delete(lease.service);
    } else {
      this.leases.set(lease.id, lease);
      this.enter(lease);
    }
    this.events.unshift(event);
    this.events.length = Math.min(this.events.length, EVENTS_KEPT);
    this.emit("event", event);
  }

  lost(reason) {
    this.connected = false;
    this.emit("connection", `Not connected (${reason}): this is what was seen last. Trying again…`);
    const wait = RETRY_MS[Math.min(this.failures++, RETRY_MS.length - 1)];
    setTimeout(() => this.start(), wait);
  }

  /** Poll what events do not carry: listeners without a lease, pools, the LAN, hosts. Only while the page is visible. */
  async pollPorts() {
    clearTimeout(this.timer);
    if (document.visibilityState === "visible") {
      try {
        const [ports, status] = await Promise.all([call("GET", "/v1/ports"), call("GET", "/v1/status")]);
        this.ports = ports.document.ports;
        this.byPort = new Map();
        for (const view of this.ports) {
          if (!this.byPort.has(view.port)) this.byPort.set(view.port, []);
          this.byPort.get(view.port).push(view);
        }
        this.status = status.document;
        this.emit("ports");
        this.emit("status");
      } catch (error) {
        if (!(error instanceof Problem)) this.emit("connection", "Not connected: this is what was seen last.");
      }
    }
    this.timer = setTimeout(() => this.pollPorts(), PORTS_EVERY_MS);
  }
}
