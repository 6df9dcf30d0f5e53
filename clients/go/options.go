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
	wish      wish
	backlog   int
	drainFor  time.Duration
	ephemeral bool
	onChange  func(*Lease)
	onLost    func(*Lease, error)
	err       error
}

// A wish is a request for one lease.
type wish struct {
	Service  string            `json:"service"`
	Instance string            `json:"instance,omitempty"`
	Endpoint string            `json:"endpoint,omitempty"`
	Protocol string            `json:"protocol,omitempty"`
	Address  string            `json:"address,omitempty"`
	Port     int               `json:"port,omitempty"`
	Exact    bool              `json:"exact,omitempty"`
	Pool     string            `json:"pool,omitempty"`
	Hold     string            `json:"hold,omitempty"`
	TTL      float64           `json:"ttl,omitempty"`
	Tags     []string          `json:"tags,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Check    *HealthCheck      `json:"check,omitempty"`
	Announce any               `json:"announce,omitempty"`
}

type leaseOption func(*settings)

func (option leaseOption) applyToLease(s *settings) { option(s) }

// InstanceName names the instance. Without it the lowest free SERVICE-N is taken.
func InstanceName(name string) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Instance = name })
}

// Protocol is "tcp", "udp", or "both": the same number for the two.
func Protocol(protocol string) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Protocol = protocol })
}

// Address is what will be bound: an address of this host, "0.0.0.0", "::", or "own" for a loopback address that no other
// instance has.
func Address(address string) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Address = address })
}

// Port is a wish: another port is granted where it is taken.
func Port(port int) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Port = port })
}

// ExactPort takes this port or none: ErrPortTaken.
func ExactPort(port int) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Port, s.wish.Exact = port, true })
}

// Pool names the pool that the port comes from.
func Pool(name string) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Pool = name })
}

// Hold says how the port is kept until it is bound: "shared", "exclusive", or "none".
func Hold(kind string) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Hold = kind })
}

// TTL makes a lease that ends unless it is renewed, which happens in the background. Without it the lease lives as long as
// the process.
func TTL(ttl time.Duration) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.TTL = ttl.Seconds() })
}

// Metadata says something about the instance to whoever looks it up.
func Metadata(metadata map[string]string) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Metadata = metadata })
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
		s.wish.Check = &check
	})
}

// CheckWith has the lease checked, with every detail.
func CheckWith(check HealthCheck) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Check = &check })
}

// Announce publishes the lease on the LAN, under a type and name that follow from the lease.
func Announce() LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Announce = true })
}

// AnnounceAs publishes the lease on the LAN.
func AnnounceAs(announcement Announcement) LeaseOption {
	return leaseOption(func(s *settings) { s.wish.Announce = announcement })
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

// OrEphemeral takes a port of the kernel's choice where no daemon answers, and logs that once.
func OrEphemeral() LeaseOption {
	return leaseOption(func(s *settings) { s.ephemeral = true })
}

// OnChange lets a lost lease be had again on another port, and calls f then, in a goroutine of its own: it should listen
// on the lease anew, and close the old listener's embedded TCPListener, which leaves the lease alone. Without it, and with
// ExactPort, the port of a lease never changes.
func OnChange(f func(*Lease)) LeaseOption {
	return leaseOption(func(s *settings) { s.onChange = f })
}

// OnLost calls f, in a goroutine of its own, when a lease was lost and can't be had again for now, instead of logging it.
func OnLost(f func(*Lease, error)) LeaseOption {
	return leaseOption(func(s *settings) { s.onLost = f })
}

type lookupOption func(*question)

func (option lookupOption) applyToLookup(q *question) { option(q) }

// Scope says how far to look: "local", "cluster", "lan", or "all". Without it this host, or its cluster if it has one.
func Scope(scope string) LookupOption {
	return lookupOption(func(q *question) { q.scope = scope })
}

type eitherOption struct {
	leaseOption
	lookupOption
}

// Endpoint names one of an instance's ports, "main" without it: the one to lease, or to look up.
func Endpoint(name string) Option {
	return eitherOption{func(s *settings) { s.wish.Endpoint = name }, func(q *question) { q.endpoint = name }}
}

// Tags are what a lease is marked with, or all of what a looked-up instance must be marked with.
func Tags(tags ...string) Option {
	return eitherOption{func(s *settings) { s.wish.Tags = tags }, func(q *question) { q.tags = strings.Join(tags, "\n") }}
}
