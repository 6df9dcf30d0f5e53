/** The client of portd: a port for this process, and the working instances of others. Seconds, where not `…Ms`. */

import type { Socket as DatagramSocket } from "node:dgram";
import type { EventEmitter } from "node:events";
import type { IncomingHttpHeaders } from "node:http";
import type { Server } from "node:net";

export type Protocol = "tcp" | "udp" | "both";
export type Hold = "shared" | "exclusive" | "none";
export type Status = "passing" | "warning" | "critical";
export type Scope = "local" | "cluster" | "lan" | "all";

export interface Check {
  kind: "http" | "tcp" | "grpc" | "listen" | "report" | "command";
  interval?: number;
  timeout?: number;
  rise?: number;
  fall?: number;
  startPeriod?: number;
  /** How long a report is good for, for `report`. */
  ttl?: number;
  path?: string;
  method?: string;
  headers?: Record<string, string>;
  expectStatus?: number[];
  expectBody?: string;
  tls?: boolean;
  tlsVerify?: boolean;
  /** The service that gRPC's health protocol is asked for. */
  service?: string;
  command?: string[];
}

export interface Announcement {
  type?: string;
  name?: string;
  txt?: Record<string, string>;
}

/** What a program may say about a lease beside the service's name. */
export interface Wish {
  instance?: string;
  endpoint?: string;
  protocol?: Protocol;
  /** What is going to be bound: 127.0.0.1 unless told otherwise; "own" is a loopback address that nobody else has. */
  address?: string;
  /** A wish: another port is given when it is taken, unless `exact`. */
  port?: number;
  exact?: boolean;
  pool?: string;
  hold?: Hold;
  /** Seconds; without it the lease lives as long as the process. It is renewed in the background. */
  ttl?: number;
  tags?: string[];
  metadata?: Record<string, string>;
  /** May be written short: "tcp", "http:/healthz". */
  check?: string | Check;
  announce?: boolean | Announcement;
}

export interface LeaseOptions extends Wish {
  client?: Client;
  /** Where no daemon answers, take a port of the kernel's choice, and warn. */
  fallback?: "ephemeral";
  /** Leave look-ups so long before the lease is given back, at exit too; serve on meanwhile. */
  drainMs?: number;
}

export interface ListenOptions extends LeaseOptions {
  /** The length of the queue of connections. */
  backlog?: number;
}

/** The process that a lease belongs to; what the kernel or the caller's rights hide is null. */
export interface Owner {
  pid: number | null;
  uid: number | null;
  user: string | null;
  exe: string | null;
  cmdline: string[] | null;
  unit: string | null;
  started_at: string | null;
  known_by: "peercred" | "socket" | "token";
}

/** A lease as the daemon shows it. Times are RFC 3339 in UTC. `token` is there once, in the answer to a grant. */
export interface LeaseDocument {
  id: string;
  service: string;
  instance: string;
  endpoint: string;
  protocol: Protocol;
  address: string;
  port: number;
  state: "held" | "bound" | "conflict" | "ended";
  health: Status | "unknown";
  drain: boolean;
  lifetime: "process" | "ttl" | "static";
  pool?: string;
  hold?: Hold;
  owner?: Owner;
  tags?: string[];
  metadata?: Record<string, string>;
  check?: Record<string, unknown> | null;
  announce?: Announcement & { published_as: string | null; problem: string | null } | null;
  host?: string;
  created_at?: string;
  renewed_at?: string | null;
  expires_at?: string | null;
  ended_at?: string | null;
  ended_because?: "released" | "owner_exited" | "expired" | "revoked" | "host_rebooted" | null;
  revision?: number;
  token?: string;
}

export interface LeaseEvents {
  /** The daemon lost the lease, and it was had again on another port: listen on that one then. */
  changed: [lease: Lease];
  /** The lease is lost and can't be had again for now; it is tried on and on. */
  lost: [error: PortdError];
}

/** A lease of this process, from `lease` or `listen` to `release`. */
export class Lease extends EventEmitter {
  private constructor();
  readonly client: Client;
  readonly document: LeaseDocument;
  /** "" where no daemon gave it (`isFallback`): there is nothing to keep, report or give back. */
  readonly id: string;
  readonly service: string;
  readonly instance: string;
  readonly endpoint: string;
  readonly protocol: Protocol;
  readonly address: string;
  readonly port: number;
  /** Whoever shows it may change the lease; undefined where no daemon gave one. */
  readonly token: string | undefined;
  /** `portd run` leased it, and this process took it over. */
  readonly isAdopted: boolean;
  /** It listens on a socket that `portd run --socket` passed. */
  readonly isPassed: boolean;
  /** No daemon answered, and the port is of the kernel's choice. */
  readonly isFallback: boolean;

  /** Make a server listen, or a datagram socket bind, on this lease. When it closes the lease is given back. */
  listen(target: Server | DatagramSocket, options?: { backlog?: number }): Promise<void>;
  /** Give the port back as taken by somebody else; afterwards `port` is another. */
  decline(): Promise<void>;
  /** Report health, for a lease whose check is `report`. */
  report(status: Status, note?: string): Promise<void>;
  /** Leave look-ups and keep the port; `drain(false)` comes back. */
  drain(on?: boolean): Promise<void>;
  /** Give the lease back; may be called twice, and never rejects. */
  release(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;

  on<Name extends keyof LeaseEvents>(name: Name, listener: (...values: LeaseEvents[Name]) => void): this;
  once<Name extends keyof LeaseEvents>(name: Name, listener: (...values: LeaseEvents[Name]) => void): this;
  off<Name extends keyof LeaseEvents>(name: Name, listener: (...values: LeaseEvents[Name]) => void): this;
}

/** Lease a port for this process, or adopt the one that `portd run` leased for it. */
export function lease(service: string, options?: LeaseOptions): Promise<Lease>;

/** Make a server listen, or a datagram socket bind, on a leased port. When it closes, or at exit, it is given back. */
export function listen(target: Server | DatagramSocket, service: string, options?: ListenOptions): Promise<Lease>;

export interface LookUp {
  /** "main" unless named. */
  endpoint?: string;
  /** Only instances that have all of them. */
  tags?: string[];
  scope?: Scope;
  client?: Client;
  signal?: AbortSignal;
}

/** One working instance. */
export class Instance {
  private constructor();
  readonly name: string;
  /** The address to connect to. */
  readonly host: string;
  readonly port: number;
  /** host:port, as a URL takes it. */
  readonly authority: string;
  readonly tags: string[];
  readonly metadata: Record<string, string>;
  /** The daemon is away, and this is what it said last. */
  readonly isStale: boolean;
  readonly document: LeaseDocument;
}

/** Return one working instance, by chance; rejects with NoInstances when there is none. */
export function resolve(service: string, options?: LookUp): Promise<Instance>;

/** Return all working instances, perhaps none. */
export function resolveAll(service: string, options?: LookUp): Promise<Instance[]>;

export interface WatchOptions extends LookUp {
  /** false: waiting for a change does not keep the process alive. */
  ref?: boolean;
}

/** Iterate over the working instances: now, and again whenever they change, until the signal. */
export function watch(service: string, options?: WatchOptions): AsyncGenerator<Instance[], never, undefined>;

/** How a call is made, beside what it says. */
export interface CallOptions {
  signal?: AbortSignal;
  timeoutMs?: number;
  /** The lease's own token; goes before the client's. */
  token?: string;
  /** false: do not keep the process alive for it. */
  ref?: boolean;
}

/** Speaks to one daemon. Calls reject with Problem when it says no, DaemonUnavailable when none answers. */
export class Client {
  constructor(options?: { url?: string; token?: string; timeoutMs?: number });
  /** The place that answered last, or that is tried first, as PORTD_URL writes it. */
  readonly url: string;
  grant(wish: ApiWish, options?: CallOptions): Promise<LeaseDocument>;
  /** Lease several ports, all or none. */
  grantAll(wishes: ApiWish[], options?: CallOptions): Promise<LeaseDocument[]>;
  leases(filters?: Record<string, Query>, options?: CallOptions): AsyncGenerator<LeaseDocument, void, undefined>;
  lease(id: string, options?: CallOptions): Promise<LeaseDocument>;
  renew(id: string, options?: CallOptions & { seconds?: number }): Promise<LeaseDocument>;
  decline(id: string, options?: CallOptions): Promise<LeaseDocument>;
  drain(id: string, on?: boolean, options?: CallOptions): Promise<LeaseDocument>;
  change(id: string, fields: Record<string, unknown>, options?: CallOptions): Promise<LeaseDocument>;
  report(id: string, status: Status, note?: string, options?: CallOptions): Promise<LeaseDocument>;
  release(id: string, options?: CallOptions): Promise<null>;
  /** Who has a port. */
  port(number: number, query?: { protocol?: "tcp" | "udp" }, options?: CallOptions): Promise<PortView>;
  /** A service's instances; with `after` and `wait` (seconds), once something changes. */
  service(name: string, query?: Record<string, Query>, options?: CallOptions): Promise<Instances>;
  /** Server-sent events until the daemon hangs up. `after` is the last revision that is known. */
  events(filters?: { after?: number; service?: string }, options?: Omit<CallOptions, "timeoutMs">):
    AsyncGenerator<{ name: string; data: string; id: string }, void, undefined>;
  /** Make any call of the API, and return its decoded body; null where there is none. */
  call(method: string, path: string, options?: ApiCall): Promise<any>;
  /** Make any call of the API, and return its status and head as well. */
  request(method: string, path: string, options?: ApiCall):
    Promise<{ status: number; headers: IncomingHttpHeaders; body: any }>;
}

export type Query = string | number | boolean | string[] | null | undefined;
export type ApiCall = CallOptions & { query?: Record<string, Query>; body?: unknown };
/** A lease request as the API takes it: the fields of a check are in snake_case, and nothing is written short. */
export type ApiWish = Omit<Wish, "check"> & { service: string; pid?: number; check?: Record<string, unknown> };

export interface Instances {
  service: string;
  revision: number;
  instances: LeaseDocument[];
}

export interface PortView {
  port: number;
  protocol: "tcp" | "udp";
  verdict: "held" | "bound" | "conflict" | "unmanaged" | "cooling" | "declined" | "static" | "free";
  lease: LeaseDocument | null;
  listeners: { address: string; pid: number | null; uid: number | null; user: string | null; exe: string | null;
    cmdline: string[] | null; unit: string | null }[];
}

/** The root of all errors of this package. `code` is stable, `message` is for people. */
export class PortdError extends Error {
  readonly code: string;
}
/** PORTD_URL, or the `url` of a client, is no URL of a daemon. */
export class InvalidUrl extends PortdError {}
/** No daemon answers. */
export class DaemonUnavailable extends PortdError {
  /** In the order in which they were tried. */
  readonly tried: readonly { url: string; reason: string }[];
}
/** A daemon is there, and says nothing. Whether it did what it was asked to is not known. */
export class NoAnswerInTime extends DaemonUnavailable {}
/** What answered does not speak the protocol: cut off in the middle, or something else listens there. */
export class ProtocolError extends PortdError {}
/** No instance of the service works now. */
export class NoInstances extends PortdError {}
/** The port's hold is exclusive, and Node can't receive sockets from the daemon: use `portd run --socket`. */
export class HandoffNeeded extends PortdError {}
/** The daemon's refusal (RFC 9457). */
export class Problem extends PortdError {
  readonly status: number;
  readonly detail: string;
  /** Names the field at fault (RFC 6901). */
  readonly pointer: string | null;
  readonly document: Record<string, unknown>;
}
/** Somebody else has exactly the port that was asked for. */
export class PortTaken extends Problem {}
/** There is no such lease (any more): it ended, or the daemon forgot it. */
export class LeaseLost extends Problem {}
/** The lease belongs to somebody else. */
export class NotOwner extends Problem {}
/** The pool has no free port. */
export class PoolExhausted extends Problem {}
/** Too much at once, or the store takes no writes: nothing has changed, and the same call may succeed later. */
export class Retryable extends Problem {}
