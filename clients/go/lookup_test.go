package portd

import (
	"context"
	"errors"
	"syscall"
	"testing"
	"time"
)

func TestResolveChoosesAmongThoseThatFit(t *testing.T) {
	leavesNothing(t)
	for _, color := range []string{"blue", "blue", "green"} {
		l := must[*Listener](t)(Listen(bounded(t), "chosen", Tags(color, "all"), Metadata(map[string]string{"color": color})))
		defer l.Close()
	}
	all := must[[]Instance](t)(ResolveAll(bounded(t), "chosen", AtLeast(3), WaitFor(deadline)))
	if len(all) != 3 {
		t.Errorf("%d of 3 serve", len(all))
	}
	seen := map[string]bool{}
	for i := 0; i < 100; i++ {
		one := must[Instance](t)(Resolve(bounded(t), "chosen", Tags("blue", "all")))
		seen[one.Addr()] = true
		if one.Metadata["color"] != "blue" || one.IsStale {
			t.Fatalf("%+v", one)
		}
	}
	if len(seen) != 2 {
		t.Errorf("of two it chose among %v", seen)
	}
	if _, err := Resolve(bounded(t), "chosen", Endpoint("metrics")); !errors.Is(err, ErrNoInstances) {
		t.Errorf("of an endpoint that nobody has: %v", err)
	}
}

func TestChanceIsSpreadFrom0UpTo1(t *testing.T) {
	var tenths [10]int
	for i := 0; i < 10_000; i++ {
		tenths[int(random()*10)]++
	}
	for i, count := range tenths {
		if count < 700 || count > 1300 {
			t.Errorf("%d of 10,000 are in tenth %d", count, i)
		}
	}
}

func TestAWildcardIsReachedOnLoopback(t *testing.T) {
	for address, host := range map[string]string{"0.0.0.0": "127.0.0.1:80", "::": "[::1]:80", "127.77.0.1": "127.77.0.1:80"} {
		found := instances(answer{Instances: []Document{{Address: address, Port: 80}}}, false)
		if found[0].Addr() != host {
			t.Errorf("%s is reached at %s", address, found[0].Addr())
		}
	}
}

// next is the next update of a watch; it fails where none comes.
func next(t *testing.T, updates <-chan Update) (Update, bool) {
	t.Helper()
	select {
	case update, isOpen := <-updates:
		return update, isOpen
	case <-time.After(deadline):
		t.Fatal("no update comes")
		return Update{}, false
	}
}

func TestAWatchTellsWhatIsAndEachChangeAndEndsWithItsContext(t *testing.T) {
	leavesNothing(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	updates := Watch(ctx, "watched")
	if first, _ := next(t, updates); len(first.Instances) != 0 || first.Err != nil {
		t.Errorf("at first: %+v", first)
	}
	l := must[*Listener](t)(Listen(bounded(t), "watched"))
	if came, _ := next(t, updates); len(came.Instances) != 1 || came.Instances[0].Port != l.Lease().Port() {
		t.Errorf("it came: %+v", came)
	}
	l.Close()
	if went, _ := next(t, updates); len(went.Instances) != 0 {
		t.Errorf("it went: %+v", went)
	}
	cancel()
	if last, isOpen := next(t, updates); isOpen {
		t.Errorf("after the end: %+v", last)
	}
}

func TestAWatchThatCanNotBeSaysWhy(t *testing.T) {
	leavesNothing(t)
	updates := newClient(t, Config{URL: nowhere}).Watch(bounded(t), "watched")
	if only, _ := next(t, updates); !errors.Is(only.Err, ErrDaemonUnavailable) {
		t.Errorf("%v", only.Err)
	}
	if _, isOpen := next(t, updates); isOpen {
		t.Error("and goes on")
	}
}

func TestAWatchThatNobodyReadsEndsWithItsContextToo(t *testing.T) {
	leavesNothing(t)
	ctx, cancel := context.WithCancel(context.Background())
	Watch(ctx, "unread")
	cancel()
}

func TestWhatADaemonSaidLastIsGoodWhileItIsAwayAndMarkedAsStale(t *testing.T) {
	leavesNothing(t)
	d, c := ownDaemon(t)
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	l := must[*Listener](t)(c.Listen(bounded(t), "remembered"))
	defer l.Close()
	before := must[Instance](t)(c.Resolve(bounded(t), "remembered", WaitFor(deadline)))
	updates := c.Watch(ctx, "remembered")
	next(t, updates)
	d.end(syscall.SIGKILL)
	if now := must[Instance](t)(c.Resolve(bounded(t), "remembered")); !now.IsStale || before.IsStale || now.Port != l.Lease().Port() {
		t.Errorf("%+v, then %+v", before, now)
	}
	if _, err := c.Resolve(bounded(t), "never asked for"); !errors.Is(err, ErrDaemonUnavailable) {
		t.Errorf("what was never said is known: %v", err)
	}
	c.mu.Lock()
	for q, said := range c.answers {
		said.at = said.at.Add(-staleMax)
		c.answers[q] = said
	}
	c.mu.Unlock()
	if _, err := c.Resolve(bounded(t), "remembered"); !errors.Is(err, ErrDaemonUnavailable) {
		t.Errorf("what was said five minutes ago is good: %v", err)
	}
	d.start(t)
	second := must[*Listener](t)(c.Listen(bounded(t), "remembered"))
	defer second.Close()
	if came, _ := next(t, updates); len(came.Instances) != 2 {
		t.Errorf("the watch waited for the daemon, and reports %+v", came)
	}
}
