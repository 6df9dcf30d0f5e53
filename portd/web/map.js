// The port map: each pool as a grid on a canvas, a cell a port; ports outside the pools as chips beside it.

import { condition } from "./model.js";
import { el } from "./dom.js";

const CELL = 8;
const KINDS = ["free", "held", "bound", "passing", "warning", "critical", "conflict", "cooling", "unmanaged", "static"];

/** Return what a port is, as one of the map's colours. */
export function kindOf(views) {
  if (!views?.length) return "free";
  const view = views.find((each) => each.lease) ?? views[0];
  if (view.lease) return condition({ ...view.lease, drain: false });
  return { taken: "unmanaged", declined: "cooling" }[view.verdict] ?? view.verdict;
}

/** Read ranges like "20000-29999" or 80 into [first, last]. */
function ends(range) {
  const [first, last] = String(range).split("-").map(Number);
  return [first, last ?? first];
}

export class PortMap {
  constructor(model) {
    this.model = model;
    this.pools = document.querySelector("#map .pools");
    this.hint = document.getElementById("map-hint");
    this.grids = new Map();
    document.querySelector("#map .legend").append(...KINDS.map((kind) =>
      el("li", {}, el("span", { class: `dot ${kind}`, "aria-hidden": "true" }), kind)));
    addEventListener("resize", () => this.draw());
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => this.draw());
  }

  draw() {
    const pools = this.model.status?.pools ?? {};
    const inPools = new Set();
    for (const [name, pool] of Object.entries(pools)) {
      const ports = [];
      for (const range of pool.ranges ?? []) {
        const [first, last] = ends(range);
        for (let port = first; port <= last; port++) { ports.push(port); inPools.add(port); }
      }
      if (ports.length) this.drawPool(name, pool, ports);
    }
    this.drawOutside([...this.model.byPort.keys()].filter((port) => !inPools.has(port)).sort((a, b) => a - b));
  }

  drawPool(name, pool, ports) {
    let grid = this.grids.get(name);
    if (!grid) {
      grid = { canvas: el("canvas", { tabindex: "0", role: "application", "aria-roledescription": "port map" }), title: el("h3"), at: 0 };
      this.pools.append(el("div", { class: "pool" }, grid.title, grid.canvas));
      this.grids.set(name, grid);
      this.listen(grid);
    }
    grid.ports = ports;
    const used = pool.used + pool.held;
    grid.title.textContent = `Pool ${name}: ${(pool.ranges ?? []).join(", ")} · ${used} leased, ${pool.cooling} cooling, ${pool.free} free`;
    grid.canvas.setAttribute("aria-label", `${grid.title.textContent}. Arrow keys move, Enter opens a port.`);
    const width = grid.canvas.clientWidth || 800;
    grid.columns = Math.max(10, Math.floor(width / CELL));
    const rows = Math.ceil(ports.length / grid.columns);
    const scale = devicePixelRatio || 1;
    grid.canvas.width = grid.columns * CELL * scale;
    grid.canvas.height = rows * CELL * scale;
    const pen = grid.canvas.getContext("2d");
    pen.scale(scale, scale);
    const style = getComputedStyle(document.documentElement);
    const colours = Object.fromEntries(KINDS.map((kind) => [kind, style.getPropertyValue(`--${kind}`)]));
    ports.forEach((port, index) => {
      pen.fillStyle = colours[kindOf(this.model.byPort.get(port))] ?? colours.unmanaged;
      pen.fillRect((index % grid.columns) * CELL, Math.floor(index / grid.columns) * CELL, CELL - 1, CELL - 1);
    });
    if (document.activeElement === grid.canvas) {
      pen.strokeStyle = style.getPropertyValue("--ink");
      pen.lineWidth = 2;
      pen.strokeRect((grid.at % grid.columns) * CELL, Math.floor(grid.at / grid.columns) * CELL, CELL - 1, CELL - 1);
    }
  }

  listen(grid) {
    const at = (event) => {
      const box = grid.canvas.getBoundingClientRect();
      const column = Math.floor((event.clientX - box.left) / (box.width / grid.columns));
      const row = Math.floor((event.clientY - box.top) / (box.height / Math.ceil(grid.ports.length / grid.columns)));
      return grid.ports[row * grid.columns + column];
    };
    grid.canvas.addEventListener("mousemove", (event) => this.say(at(event)));
    grid.canvas.addEventListener("click", (event) => { const port = at(event); if (port) location.hash = port; });
    grid.canvas.addEventListener("keydown", (event) => {
      const step = { ArrowLeft: -1, ArrowRight: 1, ArrowUp: -grid.columns, ArrowDown: grid.columns }[event.key];
      if (event.key === "Enter") location.hash = grid.ports[grid.at];
      else if (step) {
        grid.at = Math.min(Math.max(grid.at + step, 0), grid.ports.length - 1);
        this.say(grid.ports[grid.at]);
        this.draw();
        event.preventDefault();
      }
    });
    for (const name of ["focus", "blur"]) grid.canvas.addEventListener(name, () => this.draw());
  }

  say(port) {
    if (port === undefined) return;
    const views = this.model.byPort.get(port);
    const lease = views?.find((view) => view.lease)?.lease;
    this.hint.textContent = `${port}: ${kindOf(views)}${lease ? `, ${lease.instance}` : ""}`;
  }

  drawOutside(ports) {
    let box = this.pools.querySelector(".outside");
    if (!box) {
      box = el("div", { class: "outside", role: "group", "aria-label": "Ports outside the pools" });
      this.pools.append(box);
    }
    box.replaceChildren(...ports.map((port) => {
      const kind = kindOf(this.model.byPort.get(port));
      const chip = el("a", { class: "chip", href: `#${port}`, title: kind, "aria-label": `${port}, ${kind}` }, String(port));
      chip.style.borderLeftColor = `var(--${KINDS.includes(kind) ? kind : "unmanaged"})`;
      return chip;
    }));
  }
}
