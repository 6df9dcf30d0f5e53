// The page: connects the model with its sections.

import { call, Model } from "./model.js";
import { el, hostPort, inFrames, isWide, portLink, processName } from "./dom.js";
import { drawAttention, Events, Services } from "./services.js";
import { PortMap } from "./map.js";
import { adoptForm, PortPanel } from "./port.js";

const model = new Model();
const services = new Services(model);
const events = new Events(model);
const map = new PortMap(model);
const panel = new PortPanel(model);
const search = document.getElementById("search");
const connection = document.getElementById("connection");

function drawHeader() {
  const status = model.status;
  if (!status) return;
  document.title = `portd · ${status.host}`;
  document.getElementById("host").textContent = `${status.host} · ${status.version}`;
  const leases = [...model.leases.values()];
  const unmanaged = model.ports.filter((view) => view.verdict === "unmanaged").length;
  const counts = [["services", model.services.size], ["leases", leases.length],
    ["critical", leases.filter((lease) => lease.health === "critical").length],
    ["conflicts", leases.filter((lease) => lease.state === "conflict").length], ["unmanaged", unmanaged]];
  document.getElementById("counts").replaceChildren(...counts.map(([name, count]) =>
    el("li", { class: count && ["critical", "conflicts"].includes(name) ? "bad" : "" }, el("b", {}, String(count)), ` ${name}`)));
}

function drawUnmanaged() {
  const section = document.getElementById("unmanaged");
  if (section.contains(document.activeElement) && document.activeElement.tagName === "INPUT") return; // somebody types
  const wanted = search.value.trim().toLowerCase();
  const shown = model.ports.filter((view) => view.verdict === "unmanaged"
    && (!wanted || JSON.stringify(view.listeners).toLowerCase().includes(wanted) || String(view.port).includes(wanted)));
  section.querySelector(".empty").hidden = shown.length > 0;
  inFrames(shown, (view) => {
    const first = view.listeners.find((each) => each.socket === "listening") ?? view.listeners[0];
    const said = el("span", { class: "error", role: "alert" });
    return el("div", { class: "row listener" },
      el("span", {}, portLink(view.port), el("span", { class: "soft" }, `/${view.protocol}`)),
      el("span", { class: isWide(first?.address ?? "") ? "open-wide" : "soft" }, first ? first.address + (isWide(first.address) ? " (open)" : "") : ""),
      el("span", { title: first?.cmdline?.join(" ") ?? "" }, processName(first)),
      el("span", { class: "soft" }, first?.user ?? ""),
      view.protocol === "tcp" ? el("span", {}, adoptForm(view.port, () => model.pollPorts(), (error) => { said.textContent = error.message; }), said) : el("span"));
  }, section.querySelector(".rows"));
}

async function drawOthers() {
  const lan = await call("GET", "/v1/lan").then((answer) => answer.document.services, () => []);
  drawTable("lan", lan.filter((each) => !each.ours), (each) => [each.name, each.type, hostPort(each.addresses[0] ?? each.host, each.port)]);
  if (!model.status?.cluster?.enabled) return;
  const hosts = await call("GET", "/v1/hosts").then((answer) => answer.document.hosts ?? answer.document, () => []);
  drawTable("hosts", hosts, (each) => [each.host, each.address, `${each.services} services, ${each.instances} instances`, each.self ? "this host" : ""]);
}

function drawTable(id, items, cells) {
  const section = document.getElementById(id);
  section.hidden = items.length === 0;
  inFrames(items, (item) => el("div", { class: "row listener" }, ...cells(item).map((cell) => el("span", {}, String(cell)))), section.querySelector(".rows"));
}

model.addEventListener("leases", ({ detail }) => { services.draw(detail); drawHeader(); drawAttention(model); });
model.addEventListener("ports", () => { map.draw(); drawUnmanaged(); });
model.addEventListener("status", () => { drawHeader(); drawAttention(model); });
model.addEventListener("event", ({ detail }) => { events.draw(); if (detail.lease.port === panel.port) panel.open(); });
model.addEventListener("connection", ({ detail }) => {
  connection.textContent = detail;
  connection.hidden = detail === "";
  document.body.classList.toggle("offline", detail !== "");
});

let typed = 0;
search.addEventListener("input", () => {
  clearTimeout(typed);
  typed = setTimeout(() => {
    const wanted = search.value.trim().toLowerCase();
    services.search(wanted);
    events.search(wanted);
    drawUnmanaged();
  }, 120);
});
document.getElementById("search-form").addEventListener("submit", (event) => {
  event.preventDefault();
  if (/^\d+$/.test(search.value.trim())) location.hash = search.value.trim();
});
addEventListener("keydown", (event) => {
  if (event.key === "/" && !["INPUT", "TEXTAREA"].includes(document.activeElement.tagName)) {
    event.preventDefault();
    search.focus();
  }
});
addEventListener("visibilitychange", () => { if (document.visibilityState === "visible") model.pollPorts(); });

await model.start();
panel.open();
drawOthers();
setInterval(drawOthers, 30_000);

