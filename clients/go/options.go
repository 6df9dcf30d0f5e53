// What a program may say about a lease or a look-up, as options. Values are not judged here: the daemon does that.

package portd

import (
	"fmt"
	"strings"
	"time"
)

// A LeaseOption is something to be said about a lease: Listen, ListenPacket and Acquire take it.
type LeaseOption interface{ applyToLease(*settings) }

// A LookupOption narrows a look-up: Resolve, ResolveAll and Watch take it.
type LookupOption interface{ applyToLookup(*question) }

// An Option is both.
type Option interface {
	LeaseOption
	LookupOption
}

// settings are what the options of a lease say: what is asked of the daemon, and what is the client's own affair.
type settings struct {
	request   Request
	backlog   int
	drainFor  time.Duration
	ephemeral bool
	onChange  func(*Lease)
	onLost    func(*Lease, error)
	err       error
}

type leaseOption func(*settings)

func (option leaseOption) applyToLease(s *settings) { option(s) }

// InstanceName names the instance. Without it the lowest free SERVICE-N is used.
func InstanceName(name string) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Instance = name })
}

// Protocol is "tcp", "udp", or "both": the same number for the two.
func Protocol(protocol string) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Protocol = protocol })
}

// Address is what will be bound: an address of this host, "0.0.0.0", "::", or "own" for a loopback address that no other
// instance has.
func Address(address string) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Address = address })
}

// Port is the preferred port: another one is granted where it is taken.
func Port(port int) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Port = port })
}

// ExactPort accepts this port or none: ErrPortTaken.
func ExactPort(port int) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Port, s.request.Exact = port, true })
}

// Pool names the pool that the port comes from.
func Pool(name string) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Pool = name })
}

// Hold says how the port is kept until it is bound: "shared", "exclusive", or "none".
func Hold(kind string) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Hold = kind })
}

// TTL makes a lease that ends unless it is renewed, which happens in the background. Without it the lease lives as long as
// the process.
func TTL(ttl time.Duration) LeaseOption {
	return leaseOption(func(s *settings) { s.request.TTL = ttl.Seconds() })
}

// Metadata says something about the instance to whoever looks it up.
func Metadata(metadata map[string]string) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Metadata = metadata })
}

// Weight is the instance's share of the callers, beside others of the same priority; 1 without it.
func Weight(weight int) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Weight = &weight })
}

// Priority has callers use the instances of the lowest priority that serve; 0 without it.
func Priority(priority int) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Priority = priority })
}

// Check has the lease checked, in short: "http:/healthz", "tcp", "grpc:SERVICE", "listen", "report".
func Check(short string) LeaseOption {
	return leaseOption(func(s *settings) {
		kind, rest, _ := strings.Cut(short, ":")
		check := HealthCheck{Kind: kind}
		switch {
		case kind == "http":
			check.Path = rest
		case kind == "grpc":
			check.Service = rest
		case rest != "":
			s.err = fmt.Errorf("portd: check %q: write it as a HealthCheck", short)
		}
		s.request.Check = &check
	})
}

// CheckWith has the lease checked, with every detail.
func CheckWith(check HealthCheck) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Check = &check })
}

// Announce publishes the lease on the LAN, under a type and name that follow from the lease.
func Announce() LeaseOption {
	return leaseOption(func(s *settings) { s.request.Announce = true })
}

// AnnounceAs publishes the lease on the LAN.
func AnnounceAs(announcement Announcement) LeaseOption {
	return leaseOption(func(s *settings) { s.request.Announce = announcement })
}

// Backlog is listen(2)'s; without it, what Go's own listeners have.
func Backlog(connections int) LeaseOption {
	return leaseOption(func(s *settings) { s.backlog = connections })
}

// DrainFor leaves look-ups that long before the lease is given back and the listener is closed: whoever found the instance
// before still comes. Close waits.
func DrainFor(long time.Duration) LeaseOption {
	return leaseOption(func(s *settings) { s.drainFor = long })
}

// OrEphemeral uses a port of the kernel's choice where no daemon answers, and logs that once.
func OrEphemeral() LeaseOption {
	return leaseOption(func(s *settings) { s.ephemeral = true })
}

// OnChange lets a lost lease be granted again on another port, and calls f then, in a goroutine of its own: it should listen
// on the lease anew, and close the old listener's embedded TCPListener, which leaves the lease alone. Without it, and with
// ExactPort, the port of a lease never changes.
func OnChange(f func(*Lease)) LeaseOption {
	return leaseOption(func(s *settings) { s.onChange = f })
}

// OnLost calls f, in a goroutine of its own, when a lease was lost and can't be granted again for now, instead of logging it.
func OnLost(f func(*Lease, error)) LeaseOption {
	return leaseOption(func(s *settings) { s.onLost = f })
}

type lookupOption func(*question)

func (option lookupOption) applyToLookup(q *question) { option(q) }

// Scope says how far to look: "local", "cluster", "lan", or "all". Without it this host, or its cluster if it has one.
func Scope(scope string) LookupOption {
	return lookupOption(func(q *question) { q.scope = scope })
}

// WaitFor waits that long until as many instances serve as are needed: one, or AtLeast so many.
func WaitFor(long time.Duration) LookupOption {
	return lookupOption(func(q *question) { q.wait = long })
}

// AtLeast makes ResolveAll return ErrNoInstances where fewer instances serve.
func AtLeast(instances int) LookupOption {
	return lookupOption(func(q *question) { q.min = instances })
}

type eitherOption struct {
	leaseOption
	lookupOption
}

// Endpoint names one of an instance's ports, "main" without it: the one to lease, or to look up.
func Endpoint(name string) Option {
	return eitherOption{func(s *settings) { s.request.Endpoint = name }, func(q *question) { q.endpoint = name }}
}

// Tags are what a lease is marked with, or all of what a looked-up instance must be marked with.
func Tags(tags ...string) Option {
	return eitherOption{func(s *settings) { s.request.Tags = tags }, func(q *question) { q.tags = strings.Join(tags, "\n") }}
}
