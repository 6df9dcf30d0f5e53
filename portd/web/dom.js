// Elements from data. Text is only ever set as text, so that nothing from a process or the LAN becomes markup.

/** Make an element: `attributes` are attributes, `on…` handlers, or `class`; children are elements or text. */
export function el(name, attributes = {}, ...children) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (key.startsWith("on")) element.addEventListener(key.slice(2), value);
    else element.setAttribute(key, value === true ? "" : value);
  }
  element.append(...children.filter((child) => child !== null && child !== undefined));
  return element;
}

/** Say how long ago a time was: "5s", "3m", "2h", "4d". */
export function age(time, now = Date.now()) {
  const seconds = Math.max(0, Math.round((now - Date.parse(time)) / 1000));
  if (seconds < 60) return `${seconds}s`;
  if (seconds < 3600) return `${Math.floor(seconds / 60)}m`;
  if (seconds < 86400) return `${Math.floor(seconds / 3600)}h`;
  return `${Math.floor(seconds / 86400)}d`;
}

/** Say who a process is: its program and pid. */
export function processName(process) {
  if (!process) return "unknown process";
  const program = process.exe ? process.exe.split("/").pop() : process.user ?? (process.uid === null ? "?" : `uid ${process.uid}`);
  return process.pid ? `${program}[${process.pid}]` : program;
}

/** Write host:port with brackets around IPv6 addresses (RFC 3986 section 3.2.2). */
export function hostPort(address, port) {
  return address.includes(":") ? `[${address}]:${port}` : `${address}:${port}`;
}

/** Return the address on which a browser of this host reaches a lease. */
export function reachable(lease) {
  const address = lease.listening?.[0] ?? lease.address;
  return { "0.0.0.0": "127.0.0.1", "::": "::1" }[address] ?? address;
}

/** Whether an address can be reached from other hosts. */
export function isWide(address) {
  return !(address.startsWith("127.") || address === "::1" || address === "localhost");
}

export function portLink(port) {
  return el("a", { class: "port-link", href: `#${port}` }, String(port));
}

/** Fill a list in frames of `size` rows, so that ten thousand never block the page. */
export function inFrames(items, make, target, size = 300) {
  const run = (target.run = {});
  target.replaceChildren();
  let at = 0;
  const step = () => {
    if (target.run !== run) return;
    const part = document.createDocumentFragment();
    for (const end = Math.min(at + size, items.length); at < end; at++) part.append(make(items[at]));
    target.append(part);
    if (at < items.length) requestAnimationFrame(step);
  };
  step();
}
