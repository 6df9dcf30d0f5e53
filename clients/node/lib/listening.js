/** From a lease to a listening server: on the socket that `portd run --socket` passed, or bound here. */

import cluster from "node:cluster";
import { createSocket, Socket as DatagramSocket } from "node:dgram";
import { once } from "node:events";
import { createServer } from "node:net";

/** sd_listen_fds(3), SD_LISTEN_FDS_START. */
const FIRST_FD = 3;

/** Passed descriptors that somebody has by now: once closed, their numbers may be anything's. */
const taken = new Set();

/**
 * Take the descriptor that `portd run --socket` laid out for an endpoint; undefined where this process was given none.
 * A worker of node:cluster may name what its primary was given: it is the primary that opens it.
 */
export function passed({ endpoint, protocol }, target) {
  const { LISTEN_PID, LISTEN_FDNAMES = "", PORTD_LEASE } = process.env;
  const heir = cluster.isWorker ? process.ppid : process.pid;
  if (LISTEN_PID !== String(heir) || !PORTD_LEASE) return undefined;
  const named = LISTEN_FDNAMES.split(":").flatMap((name, at) => (name === endpoint ? [FIRST_FD + at] : []));
  const fd = named[protocol === "both" && isDatagram(target) ? 1 : 0]; // of the two, TCP is laid first
  if (fd === undefined || taken.has(fd)) return undefined;
  taken.add(fd);
  return fd;
}

/** Make a net.Server listen, or a dgram.Socket bind, at `{fd}` or `{host, port}`; rejects with what the kernel says. */
export function opened(target, { host, ...where }) {
  return begun(target, () => {
    if (isDatagram(target)) target.bind(host === undefined ? where : { ...where, address: host });
    else target.listen({ ...where, host });
  });
}

/** Return a port of the kernel's choice. It is free again at once: whoever binds it may find it taken. */
export async function ephemeralPort({ address, protocol }) {
  const socket = protocol === "udp" ? createSocket(address.includes(":") ? "udp6" : "udp4") : createServer();
  await opened(socket, { host: address, port: 0 });
  const { port } = socket.address();
  socket.close();
  await once(socket, "close");
  return port;
}

function isDatagram(target) {
  return target instanceof DatagramSocket;
}

/**
 * Start a target and wait until it listens. The program's own `error` handlers must not see a port that is tried in
 * vain, for most of them end the process: they are set aside meanwhile.
 */
function begun(target, start) {
  return new Promise((resolve, reject) => {
    const theirs = target.rawListeners("error");
    const settle = (error) => {
      target.off("listening", settle).off("error", settle);
      for (const listener of theirs) target.on("error", listener);
      if (error) reject(error);
      else resolve();
    };
    target.removeAllListeners("error");
    target.on("listening", settle).on("error", settle);
    try {
      start();
    } catch (error) {
      settle(error);
    }
  });
}
