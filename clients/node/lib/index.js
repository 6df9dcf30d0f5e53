/**
 * The client of portd: a port for this process, and the instances of others.
 *
 *     import { listen, resolve } from "portd-client";
 *
 *     await listen(server, "orders", { check: "http:/healthz" });   // server listens on a leased port
 *     const billing = await resolve("billing");                     // billing.host, billing.port
 */

export { Client } from "./client.js";
export {
  DaemonUnavailable, HandoffNeeded, InvalidUrl, LeaseLost, NoAnswerInTime, NoInstances, NotOwner, PoolExhausted,
  PortdError, PortTaken, Problem, ProtocolError, Retryable,
} from "./errors.js";
export { Instance, resolve, resolveAll, watch } from "./lookup.js";
export { Lease, lease, listen } from "./lease.js";
export { releaseOnSignal } from "./leaving.js";
