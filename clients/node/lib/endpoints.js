/** Where a daemon may be: PORTD_URL, else the user's socket, the system's socket, loopback TCP. It opens nothing. */

import { InvalidUrl } from "./errors.js";

const SYSTEM_URL = "unix:///run/portd/portd.sock";
/** Where systemd makes XDG_RUNTIME_DIR of each user with a session, or with lingering (pam_systemd(8)). */
const SESSIONS = "/run/user";
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
  return [...userPlaces(environ, uid), parse(SYSTEM_URL), parse(LOOPBACK_URL)];
}

/**
 * The user daemon's socket (XDG Base Directory Specification). Without a session's environment (cron, su, sudo, ssh) the
 * daemon may have been started in a session, or just like this: `runtimeDirectory` must be the user's alone then.
 */
function userPlaces(environ, uid) {
  if (environ.XDG_RUNTIME_DIR) return [userPlace(environ.XDG_RUNTIME_DIR)];
  const temporary = (environ.TMPDIR || environ.TEMP || environ.TMP || "/tmp").replace(/\/+$/, "");
  return [`${SESSIONS}/${uid}`, `${temporary}/portd-runtime-${uid}`]
    .map((runtimeDirectory) => ({ ...userPlace(runtimeDirectory), runtimeDirectory }));
}

function userPlace(directory) {
  return parse(`unix://${directory}/portd/portd.sock`);
}
