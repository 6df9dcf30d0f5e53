/** Where a daemon may be: PORTD_URL, else the user's socket, the system's socket, loopback TCP. It opens nothing. */

import { statSync } from "node:fs";

import { InvalidUrl } from "./errors.js";

const SYSTEM_URL = "unix:///run/portd/portd.sock";
const LOOPBACK_URL = "http://127.0.0.1:7783";

/**
 * Read a PORTD_URL: unix:///path/portd.sock, http://host:port or https://host:port; throws InvalidUrl.
 *
 * A place is `{url, socketPath}` over a unix socket, else `{url, host, port, isTls}`.
 */
export function parse(url) {
  if (url.startsWith("unix:///")) return { url, socketPath: url.slice("unix://".length) };
  const [, scheme, host, port] = /^(https?):\/\/([^/@]+):(\d{1,5})\/*$/.exec(url) ?? [];
  if (!scheme || port < 1 || port > 65535) throw new InvalidUrl(url);
  return {
    url: `${scheme}://${host}:${port}`, host: host.replace(/^\[(.*)\]$/, "$1"), port: Number(port),
    isTls: scheme === "https",
  };
}

/** List where to look, best first; throws InvalidUrl for a PORTD_URL that can't be read. */
export function candidates(environ, uid) {
  if (environ.PORTD_URL) return [parse(environ.PORTD_URL)];
  return [...userUrls(environ, uid), SYSTEM_URL, LOOPBACK_URL].map(parse);
}

/** The user daemon's socket (XDG Base Directory Specification); none where somebody else made its directory. */
function userUrls(environ, uid) {
  if (environ.XDG_RUNTIME_DIR) return [`unix://${environ.XDG_RUNTIME_DIR}/portd/portd.sock`];
  const temporary = (environ.TMPDIR || environ.TEMP || environ.TMP || "/tmp").replace(/\/+$/, "");
  const runtime = `${temporary}/portd-runtime-${uid}`;
  const owner = statSync(runtime, { throwIfNoEntry: false })?.uid ?? uid; // not there: named among what was tried
  return owner === uid ? [`unix://${runtime}/portd/portd.sock`] : []; // anybody can make one there, and pose as portd
}
