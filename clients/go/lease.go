// A lease of this process: adopted from `portd run` or granted, and given back when it is closed. Sockets and the
// background's work on it stand in modules of their own.

package portd

import (
	"context"
	"errors"
	"fmt"
	"log"
	"net/url"
	"os"
	"sync"
	"time"
)

// releaseTimeout bounds giving a lease back: a process that hangs at its end because a daemon does is worse.
const releaseTimeout = 2 * time.Second

// A Lease is this process' right to a port. Close gives it back.
type Lease struct {
	client   *Client
	at       *endpoint // where it was had: another daemon that answers meanwhile knows nothing of it
	settings settings

	opening sync.Mutex // one at a time opens sockets
	spare   sockets    // opened, and asked for by nobody yet

	drain, release sync.Once

	mu       sync.Mutex
	document Document
	token    string
	adopted  bool
	passed   bool
	closed   bool

	stop      chan struct{}      // closed when the background's work is over
	impatient context.CancelFunc // breaks off the call that it is at
	done      chan struct{}      // closed when it has ended; nil: there is none
}

// Acquire leases a port for this process, or adopts the one that `portd run` leased for it. Listen and ListenPacket of the
// lease open its sockets; a program that can't take those binds Address and Port itself.
func Acquire(ctx context.Context, service string, options ...LeaseOption) (*Lease, error) {
	c, err := ofEnvironment()
	if err != nil {
		return nil, err
	}
	return c.Acquire(ctx, service, options...)
}

// Acquire is the package's Acquire, with this client.
func (c *Client) Acquire(ctx context.Context, service string, options ...LeaseOption) (*Lease, error) {
	l := &Lease{client: c, settings: settings{request: Request{Service: service}}, stop: make(chan struct{})}
	for _, option := range options {
		option.applyToLease(&l.settings)
	}
	if l.settings.err != nil {
		return nil, l.settings.err
	}
	err := l.begin(ctx)
	if errors.Is(err, ErrDaemonUnavailable) && l.settings.ephemeral {
		if err = l.fallBack(ctx, err); err == nil {
			return l, nil
		}
	}
	if err != nil {
		return nil, err
	}
	openLeases.add(l)
	l.startKeeping()
	return l, nil
}

// begin adopts or is granted the lease.
func (l *Lease) begin(ctx context.Context) error {
	wanted := &l.settings.request
	if given := adoptable(os.Getenv, wanted.Endpoint); given != nil {
		document, at, err := given.adopt(ctx, l.client, *wanted)
		if err != nil {
			return err
		}
		if document != nil {
			l.document, l.token, l.adopted, l.at = *document, given.token, true, at
			return nil
		}
	}
	answered, err := l.client.call(ctx, request{method: "POST", path: "/v1/leases", body: wanted}, &l.document)
	l.token, l.at = l.document.Token, answered.at
	return err
}

// fallBack takes a port of the kernel's choice instead of a lease. It returns why there is none where that can't be.
func (l *Lease) fallBack(ctx context.Context, why error) error {
	wanted := l.settings.request
	l.document = Document{Service: wanted.Service, Instance: wanted.Instance, Endpoint: orElse(wanted.Endpoint, "main"),
		Protocol: orElse(wanted.Protocol, "tcp"), Address: orElse(wanted.Address, "127.0.0.1"), Lifetime: "process"}
	if wanted.Address == "own" || wanted.Protocol == "both" {
		return why
	}
	log.Printf("%v; using a port of the kernel's choice for %s", why, wanted.Service)
	if err := l.spare.bind(ctx, l.document.Protocol, l.document.Address, 0); err != nil {
		return err
	}
	l.document.Port = l.spare.port()
	return nil
}

// ID returns the lease's id; "" for a port of the kernel's choice, with nothing to keep, report or give back.
func (l *Lease) ID() string { return l.Document().ID }

// Service returns the service's name.
func (l *Lease) Service() string { return l.settings.request.Service }

// Instance returns the instance's name; "" where no daemon gave it one.
func (l *Lease) Instance() string { return l.Document().Instance }

// Address returns the address to bind.
func (l *Lease) Address() string { return l.Document().Address }

// Port returns the port to bind. It changes for leases with OnChange alone.
func (l *Lease) Port() int { return l.Document().Port }

// IsAdopted reports whether `portd run` leased it, for this process or one before it.
func (l *Lease) IsAdopted() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.adopted
}

// IsFallback reports whether it is no lease, but a port of the kernel's choice.
func (l *Lease) IsFallback() bool { return l.ID() == "" }

// IsPassed reports whether its sockets came from portd, bound, and never free in between.
func (l *Lease) IsPassed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.passed
}

// Token returns the lease's token: whoever shows it may change the lease. "" for a fallback.
func (l *Lease) Token() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.token
}

// Endpoint returns the endpoint's name.
func (l *Lease) Endpoint() string { return l.Document().Endpoint }

// Protocol returns "tcp", "udp", or "both".
func (l *Lease) Protocol() string { return l.Document().Protocol }

// Document returns the lease as the daemon showed it last, without its token.
func (l *Lease) Document() Document {
	l.mu.Lock()
	defer l.mu.Unlock()
	document := l.document
	document.Token = ""
	return document
}

// String says whose port it is, for logs.
func (l *Lease) String() string {
	now := l.Document()
	return fmt.Sprintf("%s/%s on %s:%d", now.Service, now.Instance, now.Address, now.Port)
}

// Renew restarts the clock of a lease with a TTL, which the background does by itself; period is a new one, 0 keeps the last.
func (l *Lease) Renew(ctx context.Context, period time.Duration) error {
	return l.change(ctx, "POST", "/renew", renewal(period))
}

// Transfer hands the lease over to another process of this host; this one neither keeps nor releases it any more.
func (l *Lease) Transfer(ctx context.Context, pid int) error {
	if l.IsFallback() {
		return nil
	}
	if err := l.change(ctx, "POST", "/transfer", map[string]int{"pid": pid}); err != nil {
		return err
	}
	l.release.Do(func() {
		openLeases.remove(l)
		l.mu.Lock()
		l.closed = true
		l.mu.Unlock()
		l.stopKeeping()
	})
	return nil
}

// Change replaces tags, metadata, weight, check or announcement.
func (l *Lease) Change(ctx context.Context, fields Change) error {
	return l.change(ctx, "PATCH", "", fields)
}

// Decline gives the port back as taken by somebody else; afterwards Port is another. The listeners of this package do so
// by themselves.
func (l *Lease) Decline(ctx context.Context) error { return l.change(ctx, "POST", "/decline", nil) }

// Drain takes the instance out of look-ups, and keeps the port; Drain(ctx, false) brings it back.
func (l *Lease) Drain(ctx context.Context, on bool) error {
	return l.change(ctx, "POST", "/drain", map[string]bool{"drain": on})
}

// Report sets the instance's health, for a lease whose check is "report".
func (l *Lease) Report(ctx context.Context, health Health, note string) error {
	return l.change(ctx, "PUT", "/health", map[string]string{"status": string(health), "note": note})
}

// change makes a call that returns the changed lease. A fallback has no daemon to call.
func (l *Lease) change(ctx context.Context, method, what string, body any) error {
	if l.IsFallback() {
		return nil
	}
	var now Document
	if _, err := l.client.call(ctx, l.request(method, what, body), &now); err != nil {
		return err
	}
	l.update(now)
	return nil
}

// Close gives the lease back, drained if it is to be, and waits for the background's work to end. It may be called twice.
// That no daemon answers is no error here: the daemon ends the lease when this process is gone, or when its clock runs out.
func (l *Lease) Close() error {
	l.drainOut()
	l.release.Do(func() {
		defer openLeases.remove(l) // not before it is given back: a signal meanwhile has to wait for that
		l.mu.Lock()
		l.closed = true
		l.mu.Unlock()
		l.stopKeeping()
		l.opening.Lock()
		defer l.opening.Unlock()
		l.spare.close()
		if l.isOurs() {
			ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
			defer cancel()
			_, _ = l.client.call(ctx, l.request("DELETE", "", nil), nil)
		}
	})
	return nil
}

// drainOut drains the lease and waits, once, where DrainFor asks for it. If no daemon answers, there is nothing to wait
// for.
func (l *Lease) drainOut() {
	l.drain.Do(func() {
		if l.settings.drainFor == 0 || !l.isOurs() {
			return
		}
		ctx, cancel := context.WithTimeout(context.Background(), releaseTimeout)
		defer cancel()
		if l.Drain(ctx, true) == nil {
			time.Sleep(l.settings.drainFor)
		}
	})
}

func (l *Lease) isClosed() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.closed
}

// isOurs reports whether the lease is this process' to give back: an adopted one may be a parent's that serves on.
func (l *Lease) isOurs() bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.document.ID != "" && (!l.adopted || l.document.Owner.PID == os.Getpid())
}

// request makes a call on the lease as it is known now.
func (l *Lease) request(method, what string, body any) request {
	l.mu.Lock()
	defer l.mu.Unlock()
	return request{method: method, path: leasePath(l.document.ID) + what, body: body, token: l.token, at: l.at}
}

func leasePath(id string) string { return "/v1/leases/" + url.PathEscape(id) }

// update takes in what the daemon says of the lease, and returns whether the port is another one now. Of two answers that
// overtook each other the newer one counts.
func (l *Lease) update(now Document) bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	isSame := now.ID == l.document.ID
	if isSame && now.Revision < l.document.Revision {
		return false
	}
	l.adopted = l.adopted && isSame
	moved := now.Port != l.document.Port
	if now.Token != "" {
		l.token = now.Token
	}
	l.document = now
	return moved
}

func orElse(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}
