/**
 * Releasing what is open when the process ends: at a normal exit, and at signals where the program asks for that. A crash,
 * or process.exit(), needs nothing: the daemon notices it.
 */

const open = new Set();

/** Release a lease when the process ends. */
export function releaseAtExit(lease) {
  open.add(lease);
  if (open.size === 1) process.on("beforeExit", releaseAll);
}

/** Forget a lease that is released; with the last one nothing is left on the process. */
export function forget(lease) {
  open.delete(lease);
  if (!open.size) process.off("beforeExit", releaseAll);
}

/**
 * Release all leases when one of the signals comes (SIGTERM and SIGINT where none is named), then die of it, as without
 * portd. A second one does not wait. A program that handles the signal itself keeps it, and closes its servers there.
 * Returns a function that undoes it.
 */
export function releaseOnSignal(...signals) {
  const handled = signals.length ? signals : ["SIGTERM", "SIGINT"];
  for (const signal of handled) if (!process.listeners(signal).includes(onSignal)) process.prependListener(signal, onSignal);
  return () => {
    for (const signal of handled) process.off(signal, onSignal);
  };
}

async function releaseAll() {
  await Promise.all([...open].map((lease) => lease.release()));
}

async function onSignal(signal) {
  process.off(signal, onSignal); // first of all: others decide by the count of listeners whether the process is to die
  if (process.listenerCount(signal)) return; // the program handles it, and stops in its own time
  await releaseAll();
  process.kill(process.pid, signal); // die of the signal, as without us: whoever waits sees why
}
