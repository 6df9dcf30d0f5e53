// The documents of the API as Go values: a lease, its owner, its check. Durations are seconds on the wire.

package portd

import (
	"encoding/json"
	"reflect"
	"time"
)

// Health is the result of a check.
type Health string

// The results of a check; Unknown before its first one.
const (
	Passing  Health = "passing"
	Warning  Health = "warning"
	Critical Health = "critical"
	Unknown  Health = "unknown"
)

// A Document is a lease as the daemon shows it.
type Document struct {
	ID           string            `json:"id"`
	Service      string            `json:"service"`
	Instance     string            `json:"instance"`
	Endpoint     string            `json:"endpoint"`
	Protocol     string            `json:"protocol"` // "tcp", "udp", or "both"
	Address      string            `json:"address"`
	Port         int               `json:"port"`
	Pool         string            `json:"pool"`
	Hold         string            `json:"hold"`     // "shared", "exclusive", or "none"
	State        string            `json:"state"`    // "held", "bound", "conflict", or "ended"
	Lifetime     string            `json:"lifetime"` // "process", "ttl", or "static"
	Health       Health            `json:"health"`
	Drain        bool              `json:"drain"`
	Owner        Owner             `json:"owner"`
	UID          *int              `json:"uid"`       // the owner's user at the grant: rights and quota go by it
	Listening    []string          `json:"listening"` // the addresses at which its own listeners are
	VouchedBy    string            `json:"vouched_by"`
	HealthNote   string            `json:"health_note"`
	HealthSince  *time.Time        `json:"health_since"`
	CheckedAt    *time.Time        `json:"checked_at"`
	Weight       *int              `json:"weight"` // nil is 1
	Priority     int               `json:"priority"`
	Tags         []string          `json:"tags"`
	Metadata     map[string]string `json:"metadata"`
	Check        *HealthCheck      `json:"check"`
	Announce     *Announcement     `json:"announce"`
	Host         string            `json:"host"`
	CreatedAt    time.Time         `json:"created_at"`
	RenewedAt    *time.Time        `json:"renewed_at"`
	ExpiresAt    *time.Time        `json:"expires_at"` // nil without a ttl
	EndedAt      *time.Time        `json:"ended_at"`
	EndedBecause string            `json:"ended_because"`
	Revision     int64             `json:"revision"`
	Token        string            `json:"token"` // in the answer to a grant alone
}

func (d Document) weight() int {
	if d.Weight == nil {
		return 1
	}
	return *d.Weight
}

// An Owner is the process that a lease belongs to. What the kernel does not let portd see is left out.
type Owner struct {
	PID       int        `json:"pid"`
	UID       *int       `json:"uid"`
	User      string     `json:"user"`
	Exe       string     `json:"exe"`
	Cmdline   []string   `json:"cmdline"`
	Unit      string     `json:"unit"`
	StartedAt *time.Time `json:"started_at"`
	KnownBy   string     `json:"known_by"`
}

// An Announcement is the DNS-SD service that a lease is published as. Without Type and Name they follow from the lease.
type Announcement struct {
	Type string            `json:"type,omitempty"`
	Name string            `json:"name,omitempty"`
	TXT  map[string]string `json:"txt,omitempty"`
}

// A HealthCheck says how a lease is checked. Zero values are the daemon's defaults.
type HealthCheck struct {
	Kind         string            `json:"kind"` // "http", "tcp", "grpc", "listen", "report", or "command"
	Interval     time.Duration     `json:"-"`
	Timeout      time.Duration     `json:"-"`
	StartPeriod  time.Duration     `json:"-"`              // failures do not count before it has passed
	Rise         int               `json:"rise,omitempty"` // passes in a row that make it passing
	Fall         int               `json:"fall,omitempty"` // failures in a row that make it critical
	Path         string            `json:"path,omitempty"` // this and what follows up to TLS: of an "http" check
	Method       string            `json:"method,omitempty"`
	Headers      map[string]string `json:"headers,omitempty"`
	ExpectStatus []int             `json:"expect_status,omitempty"`
	ExpectBody   string            `json:"expect_body,omitempty"`
	TLSVerify    *bool             `json:"tls_verify,omitempty"` // nil: yes
	TLS          bool              `json:"tls,omitempty"`
	Service      string            `json:"service,omitempty"` // of a "grpc" check
	TTL          time.Duration     `json:"-"`                 // of a "report" check: silence after which it is critical
	Command      []string          `json:"command,omitempty"` // of a "command" check
}

// timing is the part of a check that the wire has in seconds.
type timing struct {
	Interval    float64 `json:"interval,omitempty"`
	Timeout     float64 `json:"timeout,omitempty"`
	StartPeriod float64 `json:"start_period,omitempty"`
	TTL         float64 `json:"ttl,omitempty"`
}

type plainCheck HealthCheck

// MarshalJSON writes the check as the API takes it.
func (h HealthCheck) MarshalJSON() ([]byte, error) {
	return json.Marshal(struct {
		plainCheck
		timing
	}{plainCheck(h), timing{h.Interval.Seconds(), h.Timeout.Seconds(), h.StartPeriod.Seconds(), h.TTL.Seconds()}})
}

// UnmarshalJSON reads the check as the API shows it.
func (h *HealthCheck) UnmarshalJSON(data []byte) error {
	var read struct {
		plainCheck
		timing
	}
	if err := json.Unmarshal(data, &read); err != nil {
		return err
	}
	*h = HealthCheck(read.plainCheck)
	h.Interval, h.Timeout = duration(read.timing.Interval), duration(read.timing.Timeout)
	h.StartPeriod, h.TTL = duration(read.timing.StartPeriod), duration(read.timing.TTL)
	return nil
}

func duration(seconds float64) time.Duration {
	return time.Duration(seconds * float64(time.Second))
}

// covers reports whether the check has all that another one sets; the daemon shows checks with their defaults filled in.
func (h HealthCheck) covers(wanted HealthCheck) bool {
	have, want := reflect.ValueOf(h), reflect.ValueOf(wanted)
	for i := 0; i < want.NumField(); i++ {
		if !want.Field(i).IsZero() && !reflect.DeepEqual(want.Field(i).Interface(), have.Field(i).Interface()) {
			return false
		}
	}
	return true
}
