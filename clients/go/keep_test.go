package portd

import (
	"errors"
	"net"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"
)

func TestALeaseWithATTLIsRenewedForAsLongAsItIsHeld(t *testing.T) {
	leavesNothing(t)
	const ttl = 1500 * time.Millisecond
	l := must[*Lease](t)(Acquire(bounded(t), "renewed", TTL(ttl)))
	first := *l.Document().ExpiresAt
	waitFor(t, "it outlives its first clock", func() bool {
		now := shared.lease(t, l.ID())
		if now.State == "ended" {
			t.Fatalf("it ended: %s", now.EndedBecause)
		}
		return now.ExpiresAt.After(first.Add(ttl))
	})
	l.Close()
	if now := shared.lease(t, l.ID()); now.EndedBecause != "released" {
		t.Errorf("it is %s: %s", now.State, now.EndedBecause)
	}
}

func TestRenewalsAreSpreadOverTheLastFifthOfAThirdOfTheTTL(t *testing.T) {
	created := time.Now()
	expires := created.Add(30 * time.Second)
	l := &Lease{client: &Client{checkEvery: checkEvery}, document: Document{Lifetime: "ttl", CreatedAt: created, ExpiresAt: &expires}}
	for i := 0; i < 100; i++ {
		if period := l.period(); period < 8*time.Second || period > 10*time.Second {
			t.Fatalf("a ttl of 30 s is renewed after %v", period)
		}
	}
}

func TestALeaseOutlivesARestartOfTheDaemonUnderTheSameID(t *testing.T) {
	leavesNothing(t)
	d, c := ownDaemon(t)
	listener := must[*Listener](t)(c.Listen(bounded(t), "restarted"))
	id := listener.Lease().ID()
	d.end(syscall.SIGKILL)
	d.start(t)
	if now := d.lease(t, id); now.State == "ended" || now.Port != listener.Addr().(*net.TCPAddr).Port {
		t.Errorf("after the restart it is %s, on %d", now.State, now.Port)
	}
	listener.Close()
	if now := d.lease(t, id); now.EndedBecause != "released" || listener.Lease().ID() != id {
		t.Errorf("it is %s: %s", now.State, now.EndedBecause)
	}
}

func TestALeaseThatTheDaemonForgotIsHadAgainOnTheSamePort(t *testing.T) {
	leavesNothing(t)
	d, c := ownDaemon(t)
	l := must[*Lease](t)(c.Acquire(bounded(t), "forgotten", Tags("blue")))
	id, port := l.ID(), l.Port()
	d.end(syscall.SIGTERM)
	d.forget(t)
	d.start(t)
	waitFor(t, "it is leased again", func() bool { return l.ID() != id })
	if now := d.lease(t, l.ID()); now.Port != port || now.Instance != "forgotten-1" || now.Tags[0] != "blue" {
		t.Errorf("it is %+v", now)
	}
	l.Close()
	if now := d.lease(t, l.ID()); now.EndedBecause != "released" {
		t.Errorf("what was leased again is not given back: %s", now.State)
	}
}

// takenMeanwhile lets the daemon forget everything, and a foreign process bind a port before it is back.
func takenMeanwhile(t *testing.T, d *daemon, l *Lease) {
	t.Helper()
	d.end(syscall.SIGTERM)
	d.forget(t)
	foreign(t, l.Address(), l.Port())
	d.start(t)
}

func TestALeaseThatMovesReportsItsNewPort(t *testing.T) {
	leavesNothing(t)
	d, c := ownDaemon(t)
	moved := make(chan *Lease, 1)
	l := must[*Lease](t)(c.Acquire(bounded(t), "moved", OnChange(func(l *Lease) { moved <- l })))
	port := l.Port()
	takenMeanwhile(t, d, l)
	select {
	case <-moved:
	case <-time.After(deadline):
		t.Fatal("the program is not notified")
	}
	listener := must[*Listener](t)(l.Listen(bounded(t)))
	defer listener.Close()
	if l.Port() == port || listener.Addr().(*net.TCPAddr).Port != l.Port() {
		t.Errorf("from %d it moved to %d, and %v is bound", port, l.Port(), listener.Addr())
	}
}

func TestThePortOfALeaseNeverChangesForAProgramThatDidNotAskForIt(t *testing.T) {
	leavesNothing(t)
	d, c := ownDaemon(t)
	lost := make(chan error, 100)
	l := must[*Lease](t)(c.Acquire(bounded(t), "lost", OnLost(func(_ *Lease, err error) { lost <- err })))
	defer l.Close()
	port := l.Port()
	takenMeanwhile(t, d, l)
	select {
	case err := <-lost:
		if !errors.Is(err, ErrPortTaken) {
			t.Errorf("it is lost because %v", err)
		}
	case <-time.After(deadline):
		t.Fatal("the program is not notified")
	}
	if l.Port() != port {
		t.Errorf("the port went from %d to %d", port, l.Port())
	}
}

func TestALeaseStaysWithTheDaemonThatGaveIt(t *testing.T) {
	leavesNothing(t)
	d, c := ownDaemon(t)
	c.endpoints = append(c.endpoints, must[*endpoint](t)(parseEndpoint(shared.url)))
	l := must[*Lease](t)(c.Acquire(bounded(t), "faithful"))
	defer l.Close()
	id := l.ID()
	d.end(syscall.SIGTERM)
	if err := l.Renew(bounded(t), 0); !errors.Is(err, ErrDaemonUnavailable) {
		t.Errorf("while its daemon is away another one says: %v", err)
	}
	if _, err := c.ResolveAll(bounded(t), "anything"); err != nil {
		t.Errorf("a look-up may go elsewhere: %v", err)
	}
	d.start(t)
	waitFor(t, "its own daemon is asked again", func() bool { return isRefusal(l.Renew(bounded(t), 0), "no_clock") })
	if l.ID() != id {
		t.Error("it was leased a second time")
	}
}

func isRefusal(err error, code string) bool {
	var problem *Problem
	return errors.As(err, &problem) && problem.Code == code
}

func TestADrainedListenerServesUntilItIsClosed(t *testing.T) {
	leavesNothing(t)
	listener := must[*Listener](t)(Listen(bounded(t), "drained", DrainFor(2*time.Second)))
	go http.Serve(listener, http.NotFoundHandler())
	closed := make(chan error)
	go func() { closed <- listener.Close() }()
	waitFor(t, "it is out of look-ups, and connections are taken", func() bool {
		found := must[[]Instance](t)(ResolveAll(bounded(t), "drained"))
		conn, err := net.Dial("tcp", listener.Addr().String())
		if err == nil {
			conn.Close()
		}
		return len(found) == 0 && err == nil
	})
	if err := <-closed; err != nil {
		t.Error(err)
	}
	if now := shared.lease(t, listener.Lease().ID()); !now.Drain || now.EndedBecause != "released" {
		t.Errorf("it is %s: %s", now.State, now.EndedBecause)
	}
}

func TestALostLeaseIsLoggedForAProgramThatDidNotAskToBeTold(t *testing.T) {
	written := logged(t)
	l := &Lease{document: Document{Service: "orders", Instance: "orders-1", Address: "127.0.0.1", Port: 1}}
	l.reportLoss(ErrPortTaken)
	if !strings.Contains(written.String(), "orders/orders-1 on 127.0.0.1:1 is lost") {
		t.Errorf("it logged %q", written)
	}
}
