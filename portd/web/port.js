// One port: verdict, lease, sockets, check, the last day, the last owners, and what can be done about it.

import { call, condition } from "./model.js";
import { age, el, hostPort, isWide, processName, reachable } from "./dom.js";

const DAY_MS = 86_400_000;

export class PortPanel {
  constructor(model) {
    this.model = model;
    this.panel = document.getElementById("port");
    addEventListener("hashchange", () => this.open());
    addEventListener("keydown", (event) => { if (event.key === "Escape" && !this.panel.hidden) location.hash = ""; });
  }

  get port() {
    const port = Number(location.hash.slice(1));
    return Number.isInteger(port) && port > 0 && port < 65536 ? port : null;
  }

  /** Show the port of the address bar, or close. */
  async open() {
    const port = this.port;
    if (port === null) {
      this.panel.hidden = true;
      this.opener?.focus();
      return;
    }
    if (this.panel.hidden) this.opener = document.activeElement;
    try {
      const [view, history] = await Promise.all([call("GET", `/v1/ports/${port}`), call("GET", `/v1/ports/${port}/history?limit=50`)]);
      if (this.port !== port) return;
      const wasHidden = this.panel.hidden;
      this.draw(view.document, history.document.leases);
      this.panel.hidden = false;
      if (wasHidden) this.panel.focus();
    } catch (error) {
      this.panel.hidden = false;
      this.panel.replaceChildren(this.head(port), el("p", { class: "error", role: "alert" }, error.message));
    }
  }

  head(port, verdict) {
    return el("div", { class: "bar" },
      el("h2", { id: "port-title" }, String(port), " ", verdict ? el("span", { class: `badge ${verdict}` }, verdict) : null),
      el("button", { type: "button", "aria-label": "Close", onclick: () => { location.hash = ""; } }, "Close"));
  }

  draw(view, history) {
    const lease = view.lease;
    const parts = [this.head(view.port, view.verdict)];
    if (lease) parts.push(this.lease(lease), this.actions(view));
    else if (view.left_over_of) parts.push(el("p", {}, `Left over by ${view.left_over_of.instance}, whose lease has ended.`));
    if (view.listeners.length) parts.push(el("h3", {}, "Sockets"), ...view.listeners.map((each) => this.socket(each)));
    if (!lease && view.listeners.some((each) => each.socket === "listening")) parts.push(adoptForm(view.port, () => this.open(), (error) => this.fail(error)));
    if (history.length) parts.push(el("h3", {}, "The last day"), this.day(history), el("h3", {}, "Who had it"), this.past(history));
    parts.push(el("p", { class: "error", role: "alert", id: "port-error" }));
    this.panel.replaceChildren(...parts);
  }

  list(pairs) {
    return el("dl", {}, ...pairs.filter(([, value]) => value).flatMap(([term, value]) => [el("dt", {}, term), el("dd", {}, value)]));
  }

  lease(lease) {
    const check = lease.check && `${lease.check.kind}${lease.check.path ? " " + lease.check.path : ""} every ${lease.check.interval} s`;
    const health = lease.check && [lease.health, lease.health_note, lease.health_since && `since ${age(lease.health_since)}`,
      lease.checked_at && `checked ${age(lease.checked_at)} ago`].filter(Boolean).join(", ");
    return this.list([
      ["Lease", `${lease.instance}${lease.endpoint === "main" ? "" : ` (${lease.endpoint})`} of ${lease.service}`],
      ["State", condition(lease)],
      ["Address", hostPort(lease.address, lease.port)],
      ["Listening", lease.listening?.join(", ")],
      ["Elsewhere", lease.elsewhere?.map((other) => hostPort(other.address, other.port)).join(", ")],
      ["Owner", [processName(lease.owner), lease.owner.user].filter(Boolean).join(" · ")],
      ["Command", lease.owner.cmdline?.join(" ")],
      ["Unit", lease.owner.unit],
      ["Directory", lease.workspace],
      ["Check", check],
      ["Health", health],
      ["Tags", lease.tags.join(", ")],
      ["Leased", `${age(lease.created_at)} ago, ${lease.lifetime}, hold ${lease.hold}`],
    ]);
  }

  actions(view) {
    const lease = view.lease;
    const where = hostPort(reachable(lease), lease.port);
    const act = (method, path, body) => async () => {
      try {
        await call(method, path, body);
        this.open();
      } catch (error) { this.fail(error); }
    };
    const copy = el("button", { type: "button", onclick: async () => { await navigator.clipboard.writeText(where); copy.textContent = "Copied"; } }, "Copy address");
    return el("div", { class: "actions" },
      lease.protocol !== "udp" && lease.state === "bound" ? el("a", { class: "button", href: `http://${where}/`, rel: "noopener" }, "Open") : null,
      copy,
      el("button", { type: "button", onclick: act("POST", `/v1/leases/${lease.id}/drain`, { drain: !lease.drain }) }, lease.drain ? "Stop draining" : "Drain"),
      el("button", { type: "button", class: "danger", onclick: () => {
        if (confirm(`Release the lease of ${lease.instance} on port ${lease.port}? Its process goes on.`)) act("DELETE", `/v1/leases/${lease.id}`)();
      } }, "Release"));
  }

  fail(error) { document.getElementById("port-error").textContent = error.message; }

  socket(each) {
    return this.list([
      ["Socket", el("span", { class: isWide(each.address) ? "open-wide" : "" }, `${each.socket} on ${each.address}${isWide(each.address) ? " (open beyond this host)" : ""}`)],
      ["Process", [processName(each), each.user].filter(Boolean).join(" · ")],
      ["Command", each.cmdline?.join(" ")],
      ["Unit", each.unit],
    ]);
  }

  /** Draw who had the port in the last 24 hours, oldest on the left. */
  day(history) {
    const now = Date.now();
    const bar = el("div", { class: "day", role: "img", "aria-label": `${history.length} leases are remembered` });
    for (const lease of history) {
      const from = Math.max(Date.parse(lease.created_at), now - DAY_MS);
      const to = lease.ended_at ? Date.parse(lease.ended_at) : now;
      if (to < now - DAY_MS) continue;
      const stint = el("span", { title: lease.instance });
      stint.style.left = `${100 * (1 - (now - from) / DAY_MS)}%`;
      stint.style.width = `${(100 * (to - from)) / DAY_MS}%`;
      bar.append(stint);
    }
    return bar;
  }

  past(history) {
    return el("ul", { class: "past" }, ...history.slice(0, 6).map((lease) => el("li", {},
      `${lease.instance} · ${processName(lease.owner)} · `,
      el("span", { class: "soft" }, lease.ended_at ? `${(lease.ended_because ?? "moved").replaceAll("_", " ")} ${age(lease.ended_at)} ago` : "now"))));
  }
}

/** Return a form that leases a port for the process that listens on it. */
export function adoptForm(port, done, fail) {
  const input = el("input", { placeholder: "service name", "aria-label": `Service name for port ${port}`, pattern: "[a-z0-9]([a-z0-9\\-]{0,61}[a-z0-9])?", required: true });
  return el("form", { class: "adopt", onsubmit: async (event) => {
    event.preventDefault();
    try {
      await call("POST", "/v1/leases", { service: input.value, port, adopt: true });
      done();
    } catch (error) { fail(error); }
  } }, input, el("button", { type: "submit" }, "Adopt"));
}
