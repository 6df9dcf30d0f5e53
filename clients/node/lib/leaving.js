/**
 * Giving back what is open when the process ends: at a normal exit, and at SIGTERM and SIGINT where nobody else minds
 * them. A crash, or process.exit(), needs nothing: the daemon sees it.
 */

const SIGNALS = ["SIGTERM", "SIGINT"];

const open = new Set();

/** Give a lease back when the process ends. */
export function releaseAtExit(lease) {
  open.add(lease);
  if (open.size > 1) return;
  process.on("beforeExit", releaseAll);
  for (const signal of SIGNALS) {
    if (!process.listenerCount(signal)) process.prependListener(signal, onSignal);
  }
}

/** Forget a lease that is given back; with the last one nothing is left on the process. */
export function forget(lease) {
  open.delete(lease);
  if (open.size) return;
  process.off("beforeExit", releaseAll);
  for (const signal of SIGNALS) process.off(signal, onSignal);
}

async function releaseAll() {
  await Promise.all([...open].map((lease) => lease.release()));
}

async function onSignal(signal) {
  process.off(signal, onSignal); // first of all: others decide by the count of listeners whether the process is to die
  if (process.listenerCount(signal)) return; // the program minds it, and stops in its own time
  await releaseAll();
  process.kill(process.pid, signal); // die of the signal, as without us: whoever waits sees why
}
