// The background's work on a lease: renewing it, and leasing again where the daemon lost it.

package portd

import (
	"context"
	"errors"
	"log"
	"os"
	"time"
)

const (
	// checkEvery is the time between checks of a lease without a clock: how long it goes unnoticed that a daemon lost its
	// store.
	checkEvery = 30 * time.Second
	// retryAfter is the time between tries while no daemon answers; a restart takes about as long.
	retryAfter = time.Second
	// jitter is the share of a period by which checks are early, at random: a thousand services must not renew in step.
	jitter = 0.2
)

// startKeeping keeps the lease in a goroutine from now on.
func (l *Lease) startKeeping() {
	var ctx context.Context
	ctx, l.impatient = context.WithCancel(context.Background())
	l.done = make(chan struct{})
	go func() {
		defer close(l.done)
		l.keepOn(ctx)
	}()
}

// stopKeeping ends that. A call on its way is waited for, for a while: it may be the grant of what is to be given back.
func (l *Lease) stopKeeping() {
	if l.done == nil {
		return
	}
	close(l.stop)
	timer := time.AfterFunc(releaseTimeout, l.impatient)
	<-l.done
	timer.Stop()
	l.impatient()
}

func (l *Lease) keepOn(ctx context.Context) {
	pause, isLost := l.period(), false
	for l.sleep(pause) {
		now, err := l.keepOnce(ctx)
		switch {
		case err == nil:
			if l.update(now) && l.settings.onChange != nil && !l.isClosed() {
				go l.settings.onChange(l)
			}
			pause, isLost = l.period(), false
		case isAway(err) || ctx.Err() != nil:
			pause = l.client.wait
		default:
			if !isLost {
				l.reportLoss(err)
			}
			pause, isLost = l.client.checkEvery, true
		}
	}
}

// sleep waits, and returns whether there is still a lease to keep.
func (l *Lease) sleep(pause time.Duration) bool {
	timer := time.NewTimer(pause)
	defer timer.Stop()
	select {
	case <-l.stop:
		return false
	case <-timer.C:
		return true
	}
}

// keepOnce renews the lease, or checks that it is there, and leases again by the same request where it is lost. A port that
// this process listens on is leased back as it is. The port stays the same unless the program said what to do about another
// one, and requested no exact one.
func (l *Lease) keepOnce(ctx context.Context) (Document, error) {
	now, err := l.check(ctx)
	if !errors.Is(err, ErrLeaseLost) {
		return now, err
	}
	again := l.settings.request
	again.Port, again.Exact, again.Instance = l.Port(), true, l.Instance()
	now, err = l.grantAgain(ctx, again)
	if !errors.Is(err, ErrPortTaken) {
		return now, err
	}
	if adopted, isOurs := l.adoptListener(ctx, again); isOurs {
		return adopted, nil
	}
	if l.settings.onChange != nil && !l.settings.request.Exact {
		again.Exact = false
		now, err = l.grantAgain(ctx, again)
	}
	return now, err
}

// adoptListener leases the port for this process, which listens on it; false where another process does.
func (l *Lease) adoptListener(ctx context.Context, again Request) (Document, bool) {
	again.Adopt, again.Exact, again.Hold, again.Pool = true, false, "", ""
	found, err := l.grantAgain(ctx, again)
	if err != nil || found.Owner.PID == os.Getpid() {
		return found, err == nil
	}
	_ = l.client.Release(ctx, found.ID, found.Token) // another process of this user listens there
	return Document{}, false
}

// check returns the lease as it is, renewed; ErrLeaseLost where it has ended.
func (l *Lease) check(ctx context.Context) (Document, error) {
	method, what := "GET", ""
	if l.Document().Lifetime == "ttl" {
		method, what = "POST", "/renew"
	}
	var now Document
	_, err := l.client.call(ctx, l.request(method, what, nil), &now)
	if err == nil && now.State == "ended" {
		err = ErrLeaseLost
	}
	return now, err
}

func (l *Lease) grantAgain(ctx context.Context, again Request) (Document, error) {
	var now Document
	_, err := l.client.call(ctx, request{method: "POST", path: "/v1/leases", body: again, at: l.at}, &now)
	return now, err
}

// reportLoss says, once a loss, that there is no lease for now.
func (l *Lease) reportLoss(err error) {
	if l.settings.onLost != nil {
		go l.settings.onLost(l, err)
		return
	}
	log.Printf("portd: the lease of %s is lost, and can't be granted again: %v", l, err)
}

// period returns the time until the next check: a third of the ttl, or checkEvery, less some jitter.
func (l *Lease) period() time.Duration {
	now := l.Document()
	period := l.client.checkEvery
	if now.Lifetime == "ttl" && now.ExpiresAt != nil {
		started := now.CreatedAt
		if now.RenewedAt != nil {
			started = *now.RenewedAt
		}
		period = now.ExpiresAt.Sub(started) / 3
	}
	return time.Duration(float64(period) * (1 - jitter*random()))
}
