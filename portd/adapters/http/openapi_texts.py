"""The words of the OpenAPI document: one sentence for each name, since one name means one thing in the whole API.

A description that stands on a type (`Meta(description=…)`) goes first; `TYPE.NAME` goes before `NAME`.
"""

from __future__ import annotations

from typing import Final, NamedTuple

TAGS: Final = {
    "leases": "Grant, list, renew, change and release leases.",
    "services": "Look up the instances of a service, and wait for changes of it.",
    "events": "Follow every change as it happens.",
    "ports": "Who has a port of this host, and who had it.",
    "lan": "DNS-SD services on the LAN.",
    "names": "Host names of services below `.localhost`, which the gateway serves.",
    "daemon": "The daemon's own condition.",
}


class Texts(NamedTuple):
    """What the document says of one operation."""

    id: str
    tag: str
    description: str


OPERATIONS: Final[dict[tuple[str, str], Texts]] = {
    ("POST", "/v1/leases"): Texts(
        "grant_leases",
        "leases",
        "Grants one lease (an object) or several (an array), all or none. The same live owner that requests the same "
        "service, instance and endpoint again gets the lease that it has, with status 200 and without a token.",
    ),
    ("GET", "/v1/leases"): Texts(
        "list_leases", "leases", "Lists leases in the order of service, instance and endpoint, a page at a time."
    ),
    ("GET", "/v1/leases/{id}"): Texts(
        "show_lease", "leases", "Shows one lease, also an ended one for as long as history keeps it."
    ),
    ("PATCH", "/v1/leases/{id}"): Texts(
        "change_lease", "leases", "Replaces each field that is given; null removes a check or an announcement."
    ),
    ("DELETE", "/v1/leases/{id}"): Texts(
        "release_lease", "leases", "Ends a lease. A lease that has ended already is answered 204 again."
    ),
    ("POST", "/v1/leases/{id}/renew"): Texts(
        "renew_lease", "leases", "Restarts the clock of a `ttl` lease, with a new period where one is given."
    ),
    ("POST", "/v1/leases/{id}/decline"): Texts(
        "decline_port",
        "leases",
        "Reports that another process has the port: the lease gets another one, and keeps its id and token.",
    ),
    ("POST", "/v1/leases/{id}/drain"): Texts(
        "drain_lease",
        "leases",
        "Starts draining: the instance leaves every look-up at once and keeps its ports. `false` ends draining.",
    ),
    ("POST", "/v1/leases/{id}/transfer"): Texts(
        "transfer_lease", "leases", "Makes another process the owner of the lease."
    ),
    ("PUT", "/v1/leases/{id}/health"): Texts(
        "report_health", "leases", "Reports the result of a check of kind `report`."
    ),
    ("GET", "/v1/services"): Texts(
        "list_services", "services", "Lists the names of services with live leases, and their instances by health."
    ),
    ("GET", "/v1/services/{name}"): Texts(
        "show_service",
        "services",
        "Lists the instances of a service; a name without instances gives an empty list. `after` and `wait` make a "
        "long poll that ends with the next change of this service.",
    ),
    ("GET", "/v1/prometheus"): Texts(
        "list_targets", "services", "Lists scrape targets in the format of Prometheus' `http_sd_configs`."
    ),
    ("GET", "/v1/events"): Texts(
        "follow_events",
        "events",
        "Streams events from a revision on. The data of each is an `EventView`. A browser's EventSource gets the event "
        "`gone` where other clients get status 410.",
    ),
    ("GET", "/v1/ports"): Texts(
        "list_ports", "ports", "Lists every port that is leased, static, in quarantine, or used by any process."
    ),
    ("GET", "/v1/ports/{port}"): Texts(
        "show_port", "ports", "Shows who has a port, per the kernel and per the lease table."
    ),
    ("GET", "/v1/ports/{port}/history"): Texts(
        "show_port_history", "ports", "Lists the leases of a port, live and ended ones, newest first."
    ),
    ("GET", "/v1/hosts"): Texts(
        "list_hosts", "services", "Lists the hosts of the cluster, this one first; only this one without a cluster."
    ),
    ("GET", "/v1/lan"): Texts("browse_lan", "lan", "Lists the DNS-SD services that hosts of the LAN announce."),
    ("GET", "/v1/names/ask"): Texts(
        "ask_name",
        "names",
        "Answers 200 for a host name that a live lease has, else 404: proxies query it before they get a certificate.",
    ),
    ("GET", "/v1/status"): Texts("show_status", "daemon", "Shows the condition of the daemon and of each part."),
    ("GET", "/healthz"): Texts(
        "check_health", "daemon", "Answers 200 while leases can be granted, else 503 with the reasons."
    ),
    ("GET", "/metrics"): Texts("show_metrics", "daemon", "Shows metrics in the text format of Prometheus."),
    ("GET", "/openapi.json"): Texts("show_api", "daemon", "Shows this document."),
}

RESPONSES: Final = {
    200: "The request succeeded.",
    201: "The leases are granted; each has its `token`, which is shown once.",
    204: "The lease has ended.",
    503: "No lease can be granted at the moment; `reasons` says why.",
}

DESCRIPTIONS: Final[dict[str, str]] = {
    # names
    "service": "The service: a name that many processes may serve.",
    "instance": "The instance: one process that serves the service. Without it the lowest free SERVICE-N is chosen.",
    "endpoint": "The endpoint: one of the ports of an instance; `main` unless named.",
    "name": "The name of the service.",
    "host": "The name of the host.",
    # ports
    "protocol": "The transport protocol; `both` is one number for TCP and UDP.",
    "address": "The address that the owner binds.",
    "port": "The port number.",
    "LeaseRequest.port": "The port that is preferred; another one is granted if it is taken, unless `exact`.",
    "exact": "Refuse with `port_taken` instead of granting another port.",
    "offset": "The port is that of the array's first lease plus this.",
    "adopt": "Lease the port for the process that listens on it now.",
    "pool": "The pool that the port is from.",
    "hold": "How portd keeps the port until its owner binds it: `shared` (binding needs SO_REUSEADDR), `exclusive` "
    "(handoff only) or `none`.",
    "listening": "The addresses on which the lease's own listeners are now.",
    "vouched_by": "The rule by which the listener is the lease's own.",
    "elsewhere": "Other ports that the owner listens on while it does not listen on this one.",
    "listeners": "Every socket on this number, whatever its address.",
    "socket": "What the socket does: `listening`, `bound` or `connected`.",
    "verdict": "What the port is, as one word.",
    "left_over_of": "The ended lease whose process still uses the port.",
    "ports": "The ports, in ascending order.",
    # leases
    "id": "The id of the lease.",
    "lease": "The lease.",
    "leases": "The leases.",
    "token": "The secret that lets its bearer change the lease; only in the answer to the grant.",
    "state": "`held` (nobody listens yet), `bound` (an own listener, no other), `conflict` (a foreign process "
    "listens) or `ended`.",
    "lifetime": "What ends the lease: its `process`, the end of its `ttl`, or nothing (`static`).",
    "ttl": "Seconds until the lease ends unless it is renewed. Without it the lease ends with its process.",
    "seconds": "The new period in seconds, from now on; without it the old one starts again.",
    "pid": "The process id.",
    "LeaseRequest.protocol": "`tcp` by default, or as the service's static port has it.",
    "LeaseRequest.address": "The address that the owner will bind: an address of this host (127.0.0.1 by default), "
    "`localhost`, `0.0.0.0`, `::`, or `own`.",
    "LeaseRequest.pool": "The pool that the port is granted from; `default` by default.",
    "LeaseRequest.priority": "The priority of its SRV records (RFC 2782); 0 by default.",
    "LeaseRequest.pid": "The process that the lease belongs to; the caller by default.",
    "LeaseQuery.pid": "Only leases of this process.",
    "LeaseQuery.uid": "Only leases of this user.",
    "uid": "The user id.",
    "LeaseView.uid": "The user id of the owner at the grant; rights and quotas go by it.",
    "owner": "The process that the lease belongs to, as it is now.",
    "from": "The owner before.",
    "to": "The owner after.",
    "foreign": "The foreign process that listens on the port in a conflict.",
    "user": "The user's name.",
    "exe": "The path of the executable; null for callers to whom the kernel would not show it.",
    "cmdline": "The command line; null for callers who may not see it.",
    "unit": "The systemd unit.",
    "known_by": "How the process was identified: peer credentials, the kernel's socket table, or a token.",
    "tags": "Tags, for selection.",
    "metadata": "Keys and values of the service's own.",
    "weight": "The weight among instances of the same priority (RFC 2782).",
    "priority": "The priority; lower ones are used first (RFC 2782).",
    "drain": "Whether the instance takes no new work.",
    "created_at": "When the lease was granted.",
    "renewed_at": "When its clock was restarted last.",
    "expires_at": "When the lease ends unless it is renewed.",
    "ended_at": "When the lease ended.",
    "ended_because": "Why the lease ended.",
    "started_at": "When the process started.",
    "revision": "The newest revision of what is shown; revisions only grow.",
    "workspace": "The directory of the work tree that the service was started in; left out where it is not known.",
    "branch": "The branch that is checked out in the work tree; left out likewise.",
    # health
    "check": "The health check of the lease.",
    "health": "What the check found: `passing`, `warning`, `critical`, or `unknown` before the first result.",
    "health_note": "Why the health is what it is.",
    "health_since": "Since when the health is what it is.",
    "checked_at": "When the check ran last.",
    "kind": "The kind of the check.",
    "interval": "Seconds between two runs.",
    "timeout": "Seconds after which a run fails.",
    "rise": "Passes in a row that make a critical lease pass again.",
    "fall": "Failures in a row that make a lease critical.",
    "start_period": "Seconds after the grant in which a failure does not count.",
    "start_interval": "Seconds between two runs until the first pass, growing to `interval`.",
    "path": "The path of the request, with its query.",
    "method": "The method of the request.",
    "headers": "Headers of the request; shown to the lease's owner and to admins only.",
    "expect_status": "Statuses that pass; 2xx where none is given.",
    "expect_body": "A text that the answer must have in it.",
    "tls": "Whether the check uses TLS, or its options.",
    "tls_verify": "Whether the certificate is verified.",
    "verify": "Whether the certificate is verified.",
    "server_name": "The name that the certificate must be for.",
    "ca": "The file with the certificates that are trusted.",
    "cert": "The file with the client certificate.",
    "key": "The file with the key of the client certificate.",
    "GrpcCheck.service": "The service in the request of the gRPC health protocol; empty is the whole server.",
    "ReportCheck.ttl": "Seconds in which the service must report; silence is critical.",
    "command": "The program, from the configuration's allow-list, and its arguments.",
    "HealthReport.status": "The health.",
    "note": "Why, in a few words.",
    # announcements
    "announce": "The DNS-SD service to announce on the LAN; `true` chooses type and name.",
    "LeaseView.announce": "The DNS-SD service of the lease on the LAN.",
    "type": "The DNS-SD type, as `_http._tcp`.",
    "EventView.type": "What happened.",
    "AnnounceRequest.name": "The name that people see.",
    "Announcement.name": "The name that was requested.",
    "LanService.name": "The name that people see.",
    "txt": "The keys and values of the TXT record (RFC 6763, section 6).",
    "published_as": "The name on the LAN; null while nothing is announced.",
    "problem": "Why it does not work, null where it does.",
    "addresses": "The addresses of the host.",
    "ours": "Whether this daemon announces it.",
    # look-ups
    "services": "The services.",
    "instances": "The instances.",
    "ServiceCount.instances": "How many instances there are.",
    "users": "The users that the instances belong to.",
    "serving": "Only instances that callers may use: bound, not draining, `passing` or `warning`.",
    "ServiceCount.serving": "How many instances callers may use.",
    "passing": "The same as `serving`.",
    "ServiceCount.passing": "How many instances pass their check.",
    "warning": "How many instances have a warning.",
    "critical": "How many instances are critical.",
    "unknown": "How many instances have no result of a check.",
    "ServiceQuery.health": "Only instances with exactly this health.",
    "held": "Whether instances that do not listen yet are listed too.",
    "min": "Wait until at least so many instances serve.",
    "wait": "Seconds to wait at most.",
    "scope": "Whose instances: of this host, of the cluster, of the LAN, or of all of them.",
    "tag": "Only leases with this tag; all of them where it is repeated.",
    "targets": "HOST:PORT of the target.",
    "labels": "The labels of the target.",
    "stale": "Seconds since the cluster's store was heard from.",
    "Host.address": "The address that other hosts reach it at.",
    "Host.version": "Its version of portd.",
    "Host.services": "How many services it has.",
    "Host.instances": "How many instances it has.",
    "seen": "When it was last known to be alive.",
    "self": "Whether it is this host.",
    "engine": "What keeps the entries of the cluster.",
    "node": "The name of this host in the cluster.",
    "member": "The etcd member that is used; null while none answers.",
    "ClusterStatus.lease": "The etcd lease of this host, in hexadecimal.",
    "ClusterStatus.ttl": "Seconds after which a dead host disappears.",
    "ClusterStatus.state": "Whether this host's name is claimed, refused, or waiting for a lease.",
    "published": "How many keys this host publishes.",
    "waiting": "How many changes are not written yet.",
    "ClusterStatus.hosts": "How many hosts there are.",
    "ClusterStatus.instances": "How many endpoints of other hosts are known.",
    "ClusterStatus.revision": "The revision of etcd up to which other hosts are known.",
    "follows": "Whether all services are followed, or those that were asked for.",
    "moved": "How often another member was tried.",
    "malformed": "How many entries could not be read.",
    "etcd_version": "The version of the member.",
    "db_size_bytes": "The size of etcd's database.",
    # names of the gateway
    "domain": "The host name.",
    "ServedName.service": "The service that answers.",
    "ServedName.instance": "The instance that answers; null where any of the service does.",
    # listings
    "next": "The cursor of the next page; null on the last one.",
    "limit": "How many entries are listed at most.",
    "at": "When it happened.",
    "HistoryQuery.at": "Only who had the port at this moment.",
    # status
    "version": "The version of portd.",
    "uptime": "Seconds since the start.",
    "pools": "The ports of each pool, by what they are used for.",
    "size": "How many ports the pool has.",
    "used": "How many ports are bound.",
    "PoolStatus.held": "How many ports are leased and not listened on.",
    "ranges": "The ports of the pool, `FIRST-LAST` or one port each.",
    "cooling": "How many ports are in the quarantine after a lease.",
    "declined": "How many ports were found in use by foreign processes.",
    "free": "How many ports can be granted.",
    "counts": "How many there are of leases, services, connections and other things.",
    "store": "The database.",
    "mdns": "Multicast DNS.",
    "dns": "The DNS server.",
    "cluster": "Other hosts.",
    "warnings": "What an operator should know, a sentence each.",
    "status": "`ok`, or `unhealthy`.",
    "reasons": "Why no lease can be granted.",
    "enabled": "Whether the configuration turns it on.",
    "StoreStatus.id": "The random id of the database, as in X-Portd-Store.",
    "StoreStatus.path": "The file of the database.",
    "durability": "Whether a grant is synced to the disk before it is answered.",
    "size_bytes": "The size of the database file.",
    "wal_bytes": "The size of the write-ahead log.",
    "last_commit_ms": "Milliseconds that the last commit took.",
    "responder": "Which responder announces: portd's own or Avahi.",
    "why": "Why this responder was chosen.",
    "announced": "How many services are announced.",
    "wanted": "How many leases request an announcement.",
    "damped": "How many announcements wait because their instance changed too often.",
    "browsing": "Whether the LAN's services are followed.",
    "listen": "The addresses of the DNS server.",
    "zone": "The zone.",
    "DnsStatus.ttl": "Seconds that answers may be cached.",
    "DnsStatus.services": "How many services have names.",
    "names": "How many names there are.",
    "connections": "How many TCP connections are open.",
    "failed_queries": "How many queries failed by a fault of portd's own.",
    # this document
    "openapi": "The version of OpenAPI.",
    "info": "What the API is.",
    "paths": "The operations, by path.",
    "components": "What several operations share.",
    # path and header parameters
    "Last-Event-ID": "The id of the last event seen; a browser sends it when it connects again. `after` goes first.",
}
"""Descriptions by the name of a property or parameter."""
