// The end of the process: what it still has is given back, for whoever does not do so by itself.

package portd

import (
	"os"
	"os/signal"
	"runtime"
	"sync"
	"syscall"
)

// ReleaseOnSignal closes all leases when one of the signals comes (SIGTERM and SIGINT where none is named), and then lets
// the process end by that signal, as it would have: a Go program that minds no signals ends by them without running what
// it deferred. A program that minds its signals itself does not need this: it closes its listeners when it stops. The
// returned function takes it back, and waits where a signal has come already.
func ReleaseOnSignal(signals ...os.Signal) (stop func()) {
	if len(signals) == 0 {
		signals = []os.Signal{syscall.SIGTERM, syscall.SIGINT}
	}
	came, done := make(chan os.Signal, 1), make(chan struct{})
	signal.Notify(came, signals...)
	go func() {
		defer close(done)
		if number, isSignal := <-came; isSignal {
			signal.Stop(came) // so that a second one does not wait; who asked for the signal too decides what it means
			openLeases.closeAll()
			endBy(number)
		}
	}()
	var once sync.Once
	return func() {
		once.Do(func() {
			signal.Stop(came)
			close(came) // after Stop nothing is sent; what was sent before is still read
			<-done
		})
	}
}

// endBy sends the signal once more: where nobody minds it any more, the process dies of it, and whoever waits sees why. It
// goes to this very thread, so that nothing else happens first.
func endBy(number os.Signal) {
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	_ = syscall.Tgkill(os.Getpid(), syscall.Gettid(), number.(syscall.Signal))
}

// openLeases are those of this process that are not given back yet.
var openLeases leaseSet

// A leaseSet is leases that something is to be done to all at once.
type leaseSet struct {
	mu   sync.Mutex
	open map[*Lease]bool
}

func (s *leaseSet) add(l *Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.open == nil {
		s.open = map[*Lease]bool{}
	}
	s.open[l] = true
}

func (s *leaseSet) remove(l *Lease) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.open, l)
}

// closeAll closes them at the same time, so that it takes no longer than one.
func (s *leaseSet) closeAll() {
	s.mu.Lock()
	var closing sync.WaitGroup
	for l := range s.open {
		closing.Add(1)
		go func(l *Lease) {
			defer closing.Done()
			l.Close()
		}(l)
	}
	s.mu.Unlock()
	closing.Wait()
}
