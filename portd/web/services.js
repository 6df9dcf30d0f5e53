// The sections about services: what needs attention, a row for each service, and the newest events.

import { condition } from "./model.js";
import { age, el, hostPort, inFrames, portLink, processName, reachable } from "./dom.js";

const ATTENTION_SHOWN = 5;
const DOTS_SHOWN = 24;
const NOTE_SHOWN = 120;

/** Cut a note to what fits one line. */
function shorten(note) { return note.length > NOTE_SHOWN ? note.slice(0, NOTE_SHOWN) + "…" : note; }

/** Return the text that a lease is searched by. */
function searchText(lease) {
  return [lease.service, lease.instance, lease.port, lease.owner.exe, lease.owner.user, lease.owner.unit, lease.owner.pid,
    ...lease.tags].filter(Boolean).join(" ").toLowerCase();
}

/** Whether one of the leases matches the search. */
export function matches(leases, wanted) {
  return !wanted || leases.some((lease) => searchText(lease).includes(wanted));
}

/** Return the problems of the leases and of the daemon: [port or null, sentence]. */
export function problems(model) {
  const found = [];
  for (const lease of model.leases.values()) {
    if (lease.state === "conflict") found.push([lease.port, `${lease.instance}: another process listens on its port`]);
    else if (lease.elsewhere?.length && lease.state === "held") {
      const ports = lease.elsewhere.map((other) => other.port).join(", ");
      found.push([lease.port, `${lease.instance}: its owner listens on ${ports} instead`]);
    } else if (lease.health === "critical") {
      found.push([lease.port, `${lease.instance} is critical${lease.health_note ? ": " + shorten(lease.health_note) : ""}`]);
    }
  }
  for (const view of model.ports) {
    if (view.verdict === "declined") found.push([view.port, "was declined: another process has it"]);
  }
  for (const warning of model.status?.warnings ?? []) found.push([null, warning]);
  for (const part of ["store", "mdns", "dns", "cluster"]) {
    const problem = model.status?.[part]?.problem;
    if (problem) found.push([null, `${part}: ${problem}`]);
  }
  return found;
}

export function drawAttention(model) {
  const section = document.getElementById("attention");
  const found = problems(model);
  section.hidden = found.length === 0;
  const shown = found.slice(0, ATTENTION_SHOWN).map(([port, sentence]) =>
    el("li", {}, ...(port === null ? [] : [portLink(port), " "]), sentence));
  if (found.length > ATTENTION_SHOWN) shown.push(el("li", { class: "soft" }, `and ${found.length - ATTENTION_SHOWN} more`));
  section.querySelector("ul").replaceChildren(...shown);
}

/** One row for each service; a change of one service replaces that row alone. */
export class Services {
  constructor(model) {
    this.model = model;
    this.rows = new Map();
    this.section = document.getElementById("services");
    this.list = this.section.querySelector(".rows");
    this.wanted = "";
  }

  /** Draw the services named in `changed`, or all of them (null). */
  draw(changed) {
    if (changed === null) {
      this.rows.clear();
      const names = [...this.model.services.keys()].sort();
      inFrames(names.filter((name) => this.isShown(name)), (name) => this.make(name), this.list);
    } else {
      for (const name of changed) this.replace(name);
    }
    this.section.querySelector(".empty").hidden = this.model.services.size > 0;
  }

  isShown(name) { return matches([...(this.model.services.get(name)?.values() ?? [])], this.wanted); }

  search(wanted) {
    this.wanted = wanted;
    this.draw(null);
  }

  replace(name) {
    const old = this.rows.get(name);
    if (!this.isShown(name) || !this.model.services.has(name)) {
      old?.remove();
      this.rows.delete(name);
      return;
    }
    const isOpen = old?.open ?? false;
    const hadFocus = old?.contains(document.activeElement);
    const row = this.make(name, isOpen);
    if (old) old.replaceWith(row);
    else {
      const next = [...this.rows.keys()].filter((other) => other > name).sort()[0];
      this.list.insertBefore(row, (next && this.rows.get(next)) || null);
    }
    this.rows.set(name, row);
    if (hadFocus) row.querySelector("summary").focus();
  }

  make(name, isOpen = false) {
    const leases = [...this.model.services.get(name).values()].sort((a, b) => a.instance.localeCompare(b.instance, "en", { numeric: true }) || a.endpoint.localeCompare(b.endpoint));
    const mains = leases.filter((lease) => lease.endpoint === "main");
    const first = mains[0] ?? leases[0];
    const serving = mains.filter((lease) => ["bound", "passing", "warning"].includes(condition(lease)) && lease.state === "bound").length;
    const dots = leases.slice(0, DOTS_SHOWN).map((lease) => el("span", { class: `dot ${condition(lease)}`, title: `${lease.instance}: ${condition(lease)}` }));
    const details = el("details", { class: "service", open: isOpen },
      el("summary", {},
        el("span", { class: "name" }, name, el("span", { class: "hidden" }, ` (${serving} of ${mains.length} instances serve)`)),
        el("span", { class: "dots", "aria-hidden": "true" }, ...dots, leases.length > DOTS_SHOWN ? el("span", { class: "soft" }, ` +${leases.length - DOTS_SHOWN}`) : null),
        el("span", { class: "mono" }, leases.slice(0, 3).map((lease) => lease.port).join(" ") + (leases.length > 3 ? " …" : "")),
        el("span", { class: "soft" }, [processName(first.owner), first.owner.unit].filter(Boolean).join(" · ")),
        el("span", {}, ...first.tags.slice(0, 4).map((tag) => el("span", { class: "tag" }, tag)))));
    const fill = () => { if (details.open && details.children.length === 1) details.append(...leases.map((lease) => this.instance(lease))); };
    details.addEventListener("toggle", fill);
    fill();
    this.rows.set(name, details);
    return details;
  }

  instance(lease) {
    const state = condition(lease);
    const url = lease.protocol === "tcp" && lease.state === "bound" ? `http://${hostPort(reachable(lease), lease.port)}/` : null;
    const where = hostPort(reachable(lease), lease.port);
    return el("div", { class: "row instance" },
      el("span", { class: `dot ${state}`, "aria-hidden": "true" }),
      el("span", {}, lease.instance + (lease.endpoint === "main" ? "" : ` · ${lease.endpoint}`)),
      portLink(lease.port),
      el("span", {}, url ? el("a", { href: url, rel: "noopener" }, where) : el("span", { class: "soft" }, where)),
      el("span", { class: "soft", title: lease.health_note || "" }, state + (lease.health_note ? ` · ${lease.health_note}` : "")),
      el("span", { class: "soft" }, age(lease.created_at)));
  }
}

/** The newest events; paused, they wait and nothing is lost. */
export class Events {
  constructor(model) {
    this.model = model;
    this.list = document.querySelector("#events .rows");
    this.button = document.getElementById("pause");
    this.isPaused = false;
    this.wanted = "";
    this.button.addEventListener("click", () => {
      this.isPaused = !this.isPaused;
      this.button.setAttribute("aria-pressed", String(this.isPaused));
      this.button.textContent = this.isPaused ? "Resume" : "Pause";
      this.draw();
    });
  }

  search(wanted) {
    this.wanted = wanted;
    this.draw();
  }

  draw() {
    if (this.isPaused || this.isWaiting) return;
    this.isWaiting = true;
    requestAnimationFrame(() => {
      this.isWaiting = false;
      const shown = this.model.events.filter((event) => matches([event.lease], this.wanted)).slice(0, 60);
      this.list.replaceChildren(...shown.map((event) => el("li", { class: "row event" },
        el("time", { datetime: event.at, class: "soft" }, new Date(event.at).toLocaleTimeString()),
        el("span", {}, event.type),
        el("span", { class: "name" }, event.lease.instance),
        portLink(event.lease.port),
        el("span", { class: "soft" }, event.lease.ended_because?.replaceAll("_", " ") ?? event.note ?? ""))));
    });
  }
}
