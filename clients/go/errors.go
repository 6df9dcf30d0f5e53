// The errors that a caller can distinguish: the daemon's refusals, and no daemon. Nothing here does any I/O.

package portd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"strings"
	"time"
)

// What errors.Is recognizes. A refusal is also a *Problem, and an absent daemon a *DaemonUnavailable, for errors.As.
var (
	// ErrPortTaken says that somebody else has exactly the port that was asked for.
	ErrPortTaken = errors.New("portd: the port is taken")
	// ErrLeaseLost says that there is no such lease (any more): it ended, or the daemon forgot it.
	ErrLeaseLost = errors.New("portd: the lease is lost")
	// ErrNotOwner says that the lease belongs to somebody else.
	ErrNotOwner = errors.New("portd: the lease is somebody else's")
	// ErrPoolExhausted says that the pool has no free port.
	ErrPoolExhausted = errors.New("portd: the pool has no free port")
	// ErrRetryable says that the daemon can't now: nothing has changed, and the same call may succeed later.
	ErrRetryable = errors.New("portd: not now")
	// ErrNoInstances says that no instance of the service works now.
	ErrNoInstances = errors.New("portd: no instance works now")
	// ErrDaemonUnavailable says that no daemon answers.
	ErrDaemonUnavailable = errors.New("portd: no daemon answers")
	// ErrProtocol says that what answered does not speak the protocol: cut off in the middle, or something else.
	ErrProtocol = errors.New("portd: not understood")
	// ErrInvalidURL says that PORTD_URL, or the URL of a Config, is no URL of a daemon.
	ErrInvalidURL = errors.New("portd: no URL of a daemon")
)

var sentinels = map[string]error{
	"port_taken": ErrPortTaken, "port_reserved": ErrPortTaken, "not_found": ErrLeaseLost, "lease_ended": ErrLeaseLost,
	"not_owner": ErrNotOwner, "pool_exhausted": ErrPoolExhausted, "busy": ErrRetryable, "store_unavailable": ErrRetryable,
}

// A Problem is the daemon's refusal (RFC 9457).
type Problem struct {
	Code    string `json:"code"`    // stable, for programs: "port_taken"
	Status  int    `json:"status"`  // of HTTP
	Title   string `json:"title"`   // what kind of refusal, for people
	Detail  string `json:"detail"`  // what was refused, and what to do
	Pointer string `json:"pointer"` // the field at fault (RFC 6901); "" where none is
	In      string `json:"in"`      // "query" where the pointer is into the query; "" for the body
}

func (p *Problem) Error() string {
	return fmt.Sprintf("portd: %s (%s)", p.Detail, p.Code)
}

// Is makes errors.Is(err, ErrPortTaken) and its like true by the code.
func (p *Problem) Is(target error) bool {
	return sentinels[p.Code] == target
}

// problemOf reads a refusal. A body that is no problem document (a proxy's, say) leaves only the status.
func problemOf(status int, body []byte) *Problem {
	problem := &Problem{}
	if json.Unmarshal(body, problem) != nil || problem.Code == "" {
		problem = &Problem{Code: "unknown", Detail: fmt.Sprintf("HTTP status %d", status)}
	}
	problem.Status = status
	if problem.Detail == "" {
		problem.Detail = problem.Title
	}
	return problem
}

// DaemonUnavailable says where a daemon was looked for, and how to start one.
type DaemonUnavailable struct {
	Tried []Attempt // in the order in which they were tried
}

// An Attempt is one place where no daemon answered, and why.
type Attempt struct {
	URL string
	Err error
}

func (d *DaemonUnavailable) Error() string {
	endpoints := make([]string, len(d.Tried))
	for i, attempt := range d.Tried {
		endpoints[i] = fmt.Sprintf("%s (%v)", attempt.URL, cause(attempt.Err))
	}
	return "portd: no portd answers at " + strings.Join(endpoints, ", ") +
		"; start one with 'portd serve --user', or name a running one in PORTD_URL"
}

// Is makes errors.Is(err, ErrDaemonUnavailable) true.
func (d *DaemonUnavailable) Is(target error) bool {
	return target == ErrDaemonUnavailable
}

// Unwrap returns why the last place did not answer. Where it was too slow that is a context.DeadlineExceeded: whether the
// daemon did what it was asked to is not known then.
func (d *DaemonUnavailable) Unwrap() error {
	if len(d.Tried) == 0 {
		return nil
	}
	return d.Tried[len(d.Tried)-1].Err
}

// noAnswer is a client's own time-out.
type noAnswer struct{ within time.Duration }

func (n noAnswer) Error() string { return fmt.Sprintf("no answer within %v", n.within) }

// Timeout makes it a time-out for whoever asks a net.Error.
func (n noAnswer) Timeout() bool { return true }

// Is makes it a time-out for whoever asks errors.Is.
func (n noAnswer) Is(target error) bool { return target == context.DeadlineExceeded }

// cause returns the innermost error: the kernel's reason, without the layers that repeat the address.
func cause(err error) error {
	for inner := errors.Unwrap(err); inner != nil; inner = errors.Unwrap(err) {
		err = inner
	}
	return err
}

// isAway reports whether the daemon can't answer now, so that it is worth waiting for.
func isAway(err error) bool {
	return errors.Is(err, ErrDaemonUnavailable) || errors.Is(err, ErrProtocol) || errors.Is(err, ErrRetryable)
}
