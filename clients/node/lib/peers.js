/**
 * Connections to portd and to nobody else: root, the user `portd` or this process' own user must be at the other end.
 *
 * Node can't ask the kernel who accepts on a unix socket (SO_PEERCRED). Instead every directory on the way to it, and the
 * socket itself, must belong to a trusted user and be writable by nobody else, so that no other user can have put a socket
 * there or can do so before it is connected to. This does not notice a trusted user who handed the listening socket to
 * another one, and refuses a directory that a group may write. For loopback TCP the kernel names the listener's user in
 * /proc/net/tcp. Another host is authenticated by its TLS certificate.
 */

import { lookup } from "node:dns/promises";
import { once } from "node:events";
import { closeSync, lstatSync, openSync, readFileSync, readlinkSync, readSync } from "node:fs";
import { connect as connectPlain, isIP } from "node:net";
import { endianness } from "node:os";
import { resolve } from "node:path";

/** The user that the packaged system daemon runs as. */
const DAEMON_USER = "portd";
/** TCP_LISTEN in /proc/net/tcp, whose listeners come before all connections (net/ipv4/tcp_ipv4.c). */
const LISTEN = "0A";
/** Symbolic links that are followed, as many as the kernel follows (path_resolution(7)). */
const LINKS_MAX = 40;
const WRITABLE_BY_OTHERS = 0o022;
const STICKY = 0o1000;

/** Connect to one place; rejects with the kernel's error, or with what is wrong with who listens there. */
export async function connect({ socketPath, host, port, isTls, runtimeDirectory }, { signal, ref }) {
  if (socketPath) {
    if (runtimeDirectory) checkDirectory(runtimeDirectory);
    checkSocket(socketPath);
    return opened(connectPlain({ path: socketPath, signal }), "connect", ref);
  }
  if (isTls) {
    const { connect: connectTls } = await import("node:tls");
    const servername = isIP(host) ? undefined : host;
    return opened(connectTls({ host, port, servername, signal }), "secureConnect", ref);
  }
  let failure;
  for (const { address } of isIP(host) ? [{ address: host }] : await lookup(host, { all: true })) {
    try {
      return await connectTcp(address, port, signal, ref);
    } catch (error) {
      failure = error;
    }
  }
  throw failure;
}

/**
 * On loopback the same trusted listeners must be there before and after connecting: only one that is there at both moments
 * can have accepted the connection.
 */
async function connectTcp(address, port, signal, ref) {
  const isLocal = isLoopback(address);
  const before = isLocal ? listeners(address, port) : new Map();
  for (const uid of before.values()) checkUid(uid);
  const socket = await opened(connectPlain({ host: address, port, signal }), "connect", ref);
  if (isLocal && (!before.size || !isSame(before, listeners(address, port)))) {
    socket.destroy();
    throw new Error("the listener changed while connecting");
  }
  return socket;
}

async function opened(socket, event, ref) {
  if (!ref) socket.unref();
  await once(socket, event);
  return socket;
}

function checkUid(uid) {
  if (!isTrusted(uid)) throw new Error(`user ${uid} listens there, not root, ${DAEMON_USER} or this user`);
}

/** Return whether a user may be the daemon: root, this process' own user, or `portd`. */
export function isTrusted(uid) {
  if (uid === 0 || uid === process.geteuid()) return true;
  const accounts = readFileSync("/etc/passwd", "utf8");
  return accounts.split("\n").some((line) => line.startsWith(`${DAEMON_USER}:`) && Number(line.split(":")[2]) === uid);
}

/** Refuse a runtime directory in which others may have put a socket. That it is missing is for connecting to report. */
function checkDirectory(directory) {
  const found = lstatSync(directory, { throwIfNoEntry: false });
  if (!found) return;
  const uid = process.geteuid();
  if (!found.isDirectory() || found.uid !== uid || found.mode & WRITABLE_BY_OTHERS) {
    throw new Error(`${directory} is not a directory that only the user ${uid} can write`);
  }
}

/** Refuse a socket that another user owns or could replace, by any directory or symbolic link on the way to it. */
export function checkSocket(path, links = 0) {
  const names = resolve(path).split("/").slice(1);
  let at = "";
  for (const [index, name] of ["", ...names].entries()) {
    const parent = at;
    at = index ? `${at}/${name}` : at;
    const found = lstatSync(at || "/");
    if (!isTrusted(found.uid)) throw new Error(`${at} belongs to user ${found.uid}`);
    if (found.isSymbolicLink()) {
      if (links === LINKS_MAX) throw new Error(`${path} has too many symbolic links`);
      const rest = names.slice(index);
      checkSocket([resolve(parent || "/", readlinkSync(at)), ...rest].join("/"), links + 1);
      return;
    }
    // in a sticky directory (/tmp) others can't replace what is not theirs
    if (found.isDirectory() && found.mode & WRITABLE_BY_OTHERS && !(found.mode & STICKY)) {
      throw new Error(`other users can write the directory ${at || "/"}`);
    }
  }
}

function isLoopback(address) {
  return address === "::1" || address.replace(/^::ffff:/, "").startsWith("127.");
}

function isSame(one, other) {
  return one.size === other.size && [...one].every(([inode, uid]) => other.get(inode) === uid);
}

/** Return the uid of every TCP listener that may accept connections to a loopback address, by its inode. */
export function listeners(address, port) {
  const found = new Map();
  const plain = address.replace(/^::ffff:/, "");
  const wanted = { tcp6: [Array(16).fill(0)] };
  if (plain.includes(":")) {
    wanted.tcp6.push([...Array(15).fill(0), 1]); // ::1 is the only IPv6 loopback address
  } else {
    wanted.tcp = [plain.split(".").map(Number), [0, 0, 0, 0]];
    wanted.tcp6.push(...wanted.tcp.map((bytes) => [...Array(10).fill(0), 255, 255, ...bytes]));
  }
  const number = port.toString(16).toUpperCase().padStart(4, "0");
  for (const [table, addresses] of Object.entries(wanted)) {
    const names = new Set(addresses.map((bytes) => `${kernelHex(bytes)}:${number}`));
    for (const [, local, , state, , , , uid, , inode] of lines(`/proc/net/${table}`)) {
      if (state !== LISTEN) break;
      if (names.has(local)) found.set(inode, Number(uid));
    }
  }
  return found;
}

/** Write an address as /proc/net/tcp does: 32-bit words in the host's byte order. */
function kernelHex(bytes) {
  const data = Buffer.from(bytes);
  if (endianness() === "LE") data.swap32();
  return data.toString("hex").toUpperCase();
}

/** Iterate over a table's lines as fields, without its heading; it is read no further than its reader goes. */
function* lines(path) {
  let file;
  try {
    file = openSync(path);
  } catch (error) {
    if (error.code === "ENOENT") return; // a kernel without IPv6
    throw error;
  }
  try {
    const chunk = Buffer.alloc(65536);
    let rest = "";
    let isHeading = true;
    for (let size; (size = readSync(file, chunk)) > 0;) {
      const complete = (rest + chunk.toString("latin1", 0, size)).split("\n");
      rest = complete.pop();
      for (const line of complete) {
        if (!isHeading) yield line.trim().split(/\s+/);
        isHeading = false;
      }
    }
  } finally {
    closeSync(file);
  }
}
