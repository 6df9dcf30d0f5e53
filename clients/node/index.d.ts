/** The client of portd: a port for this process, and the instances of others. All durations are seconds. */

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

/** What a program may request beside the service's name. */
export interface LeaseFields {
  /** The instance's name, a DNS label. By default the lowest free SERVICE-N. */
  instance?: string;
  /** Which of the instance's ports this is, a DNS label. By default "main". */
  endpoint?: string;
  /** By default "tcp"; "both" is the same number for the two. */
  protocol?: Protocol;
  /** What will be bound. By default 127.0.0.1; "own" is a loopback address that no other instance has. */
  address?: string;
  /** The preferred port: another one is granted where it is taken, unless `exact`. By default the instance's last one. */
  port?: number;
  /** Accept no other port than `port`: PortTaken instead. By default false. */
  exact?: boolean;
  /** The pool that the port comes from. By default "default". */
  pool?: string;
  /** How portd keeps the port until it is bound. By default "shared" for TCP, "none" for UDP. */
  hold?: Hold;
  /** Seconds after which the lease ends unless renewed, which happens in the background. By default it lives as long as
   * this process. */
  ttl?: number;
  /** Marks that look-ups can select by; with `metadata` at most 16 KiB. */
  tags?: string[];
  /** What callers may know of the instance. */
  metadata?: Record<string, string>;
  /** The instance's share of the callers, beside others of the same priority. By default 1. */
  weight?: number;
  /** Callers use the instances of the lowest priority that serve. By default 0. */
  priority?: number;
  /** How the instance is checked; may be written short: "tcp", "http:/healthz". By default not at all. */
  check?: string | Check;
  /** Publish on the LAN (DNS-SD). By default false. */
  announce?: boolean | Announcement;
}

/** The fields of a lease that can be replaced, as the API accepts them. */
export interface LeaseChange {
  tags?: string[];
  metadata?: Record<string, string>;
  weight?: number;
  check?: Record<string, unknown> | null;
  announce?: boolean | Announcement | null;
}

export interface LeaseOptions extends LeaseFields {
  /** The daemon to use. By default the one that the environment leads to. */
  client?: Client;
  /** Where no daemon answers, use a port of the kernel's choice, and warn. */
  fallback?: "ephemeral";
  /** Seconds between leaving look-ups and the release, at exit too; the server serves on meanwhile. By default 0. */
  drainS?: number;
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
  /** The daemon lost the lease, and it was granted again on another port: listen on that one then. */
  changed: [lease: Lease];
  /** The lease is lost and can't be granted again for now; it is tried on and on. */
  lost: [error: PortdError];
}

/** A lease of this process, from `lease` or `listen` to `release`. */
export class Lease extends EventEmitter {
  private constructor();
  /** The lease as the daemon showed it last. */
  readonly document: LeaseDocument;
  /** "" for a fallback. */
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

  /** Make a server listen, or a datagram socket bind, on this lease. When it closes the lease is released. */
  listen(target: Server | DatagramSocket, options?: { backlog?: number }): Promise<void>;
  /** Restart the clock of a ttl lease, which the background does by itself; `seconds` is a new period. */
  renew(seconds?: number): Promise<void>;
  /** Give the port back as used by somebody else; afterwards `port` is another. */
  decline(): Promise<void>;
  /** Hand the lease over to another process of this host; this one neither keeps nor releases it any more. */
  transfer(pid: number): Promise<void>;
  /** Replace tags, metadata, weight, check or announce. */
  change(fields: LeaseChange): Promise<void>;
  /** Report health, for a lease whose check is `report`. */
  report(status: Status, note?: string): Promise<void>;
  /** Leave look-ups and keep the port; `drain(false)` comes back. */
  drain(on?: boolean): Promise<void>;
  /** Release the lease; may be called twice, and never rejects. */
  release(): Promise<void>;
  [Symbol.asyncDispose](): Promise<void>;

  on<Name extends keyof LeaseEvents>(name: Name, listener: (...values: LeaseEvents[Name]) => void): this;
  once<Name extends keyof LeaseEvents>(name: Name, listener: (...values: LeaseEvents[Name]) => void): this;
  off<Name extends keyof LeaseEvents>(name: Name, listener: (...values: LeaseEvents[Name]) => void): this;
}

/**
 * Release all leases when one of the signals comes (SIGTERM and SIGINT where none is named), then die of it. A program that
 * handles the signal itself keeps it. Returns a function that undoes it.
 */
export function releaseOnSignal(...signals: NodeJS.Signals[]): () => void;

/** Lease a port for this process, or adopt the one that `portd run` leased for it. */
export function lease(service: string, options?: LeaseOptions): Promise<Lease>;

/** Make a server listen, or a datagram socket bind, on a leased port. When it closes, or at exit, it is released. */
export function listen(target: Server | DatagramSocket, service: string, options?: ListenOptions): Promise<Lease>;

export interface Selection {
  /** By default "main". */
  endpoint?: string;
  /** Only instances that have all of them. */
  tags?: string[];
  scope?: Scope;
  client?: Client;
  signal?: AbortSignal;
}

export interface LookUp extends Selection {
  /** Seconds to wait until as many serve as are needed. By default 0: NoInstances at once. */
  waitS?: number;
}

export interface AllLookUp extends LookUp {
  /** Fewer than these reject with NoInstances. By default 0, or 1 with `waitS`. */
  min?: number;
}

/** One instance that serves. */
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

/** Return one instance that serves, at random by weight; rejects with NoInstances when there is none. */
export function resolve(service: string, options?: LookUp): Promise<Instance>;

/** Return all instances that serve, perhaps none. */
export function resolveAll(service: string, options?: AllLookUp): Promise<Instance[]>;

export interface WatchOptions extends Selection {
  /** false: waiting for a change does not keep the process alive. */
  ref?: boolean;
}

/** Iterate over the instances that serve: now, and again whenever they change, until the signal. */
export function watch(service: string, options?: WatchOptions): AsyncGenerator<Instance[], never, undefined>;

/** How a call is made, beside what it says. */
export interface CallOptions {
  signal?: AbortSignal;
  timeoutS?: number;
  /** The lease's own token; goes before the client's. */
  token?: string;
  /** false: do not keep the process alive for it. */
  ref?: boolean;
}

/** Speaks to one daemon. Calls reject with Problem when it says no, DaemonUnavailable when none answers. */
export class Client {
  constructor(options?: { url?: string; token?: string; timeoutS?: number });
  /** The endpoint that answered last, or that is tried first, as PORTD_URL writes it. */
  readonly url: string;
  grant(request: LeaseRequest, options?: CallOptions & { waitS?: number }): Promise<LeaseDocument>;
  /** Lease several ports, all or none. */
  grantAll(requests: LeaseRequest[], options?: CallOptions & { waitS?: number }): Promise<LeaseDocument[]>;
  leases(filters?: Record<string, Query>, options?: CallOptions): AsyncGenerator<LeaseDocument, void, undefined>;
  lease(id: string, options?: CallOptions): Promise<LeaseDocument>;
  renew(id: string, options?: CallOptions & { seconds?: number }): Promise<LeaseDocument>;
  decline(id: string, options?: CallOptions): Promise<LeaseDocument>;
  drain(id: string, on?: boolean, options?: CallOptions): Promise<LeaseDocument>;
  change(id: string, fields: LeaseChange, options?: CallOptions): Promise<LeaseDocument>;
  report(id: string, status: Status, note?: string, options?: CallOptions): Promise<LeaseDocument>;
  release(id: string, options?: CallOptions): Promise<null>;
  transfer(id: string, pid: number, options?: CallOptions): Promise<LeaseDocument>;
  ports(options?: CallOptions): Promise<PortView[]>;
  /** Who has a port. */
  port(number: number, query?: { protocol?: "tcp" | "udp" }, options?: CallOptions): Promise<PortView>;
  /** Who had a port, newest first; `at` (RFC 3339) selects one moment. */
  history(number: number, query?: { at?: string }, options?: CallOptions): Promise<LeaseDocument[]>;
  services(options?: CallOptions): AsyncGenerator<ServiceSummary, void, undefined>;
  lan(query?: { type?: string }, options?: CallOptions): Promise<LanService[]>;
  hosts(options?: CallOptions): Promise<Host[]>;
  status(options?: CallOptions): Promise<Record<string, any>>;
  /** A service's instances; with `wait` (seconds) and `after` or `min`, once there is what it waits for. */
  service(name: string, query?: Record<string, Query>, options?: CallOptions): Promise<Instances>;
  /** Events until the daemon closes the stream. `after` is the last revision that is known. */
  events(filters?: { after?: number; service?: string }, options?: Omit<CallOptions, "timeoutS">):
    AsyncGenerator<Event, void, undefined>;
  /** The call of `service`, with its status and header fields. */
  requestService(name: string, query?: Record<string, Query>, options?: CallOptions):
    Promise<{ status: number; headers: IncomingHttpHeaders; body: Instances }>;
  /** Make any call of the API, and return its decoded body; null where there is none. */
  call(method: string, path: string, options?: ApiCall): Promise<any>;
  /** Make any call of the API, and return its status and head as well. */
  request(method: string, path: string, options?: ApiCall):
    Promise<{ status: number; headers: IncomingHttpHeaders; body: any }>;
}

export type Query = string | number | boolean | string[] | null | undefined;
export type ApiCall = CallOptions & { query?: Record<string, Query>; body?: unknown };
/** A lease request as the API takes it: the fields of a check are in snake_case, and nothing is written short. */
export type LeaseRequest = Omit<LeaseFields, "check"> & { service: string; pid?: number; check?: Record<string, unknown> };

export interface Instances {
  service: string;
  revision: number;
  instances: LeaseDocument[];
}

/** What happened to which lease; `data` has `at`, `service`, `note` and `lease`. */
export interface Event {
  name: string;
  revision: number;
  data: { at: string; service: string; note: string; lease: LeaseDocument; [field: string]: unknown };
}

export interface ServiceSummary {
  name: string;
  instances: number;
  passing: number;
  warning: number;
  critical: number;
  unknown: number;
}

/** A DNS-SD service that was seen on the LAN. */
export interface LanService {
  type: string;
  name: string;
  host: string;
  addresses: string[];
  port: number;
  txt: Record<string, string>;
  ours: boolean;
}

/** A host of the cluster. */
export interface Host {
  host: string;
  address: string;
  version: string;
  services: number;
  instances: number;
  seen: string;
  self: boolean;
}

export interface PortView {
  port: number;
  protocol: "tcp" | "udp";
  verdict: "held" | "bound" | "conflict" | "unmanaged" | "taken" | "cooling" | "declined" | "static" | "free";
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
/** No instance of the service serves now, or fewer than were waited for. */
export class NoInstances extends PortdError {}
/** The port's hold is exclusive, and Node can't receive sockets from the daemon: use `portd run --socket`. */
export class HandoffNeeded extends PortdError {}
/** The daemon's refusal (RFC 9457). */
export class Problem extends PortdError {
  readonly status: number;
  readonly detail: string;
  /** Names the field at fault (RFC 6901). */
  readonly pointer: string | null;
  /** "query" where the pointer is into the query. */
  readonly within: string | null;
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
/** The server is busy, or its store accepts no writes: nothing has changed, and the same call may succeed later. */
export class Retryable extends Problem {}
