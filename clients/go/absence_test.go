package portd

import (
	"bytes"
	"context"
	"errors"
	"log"
	"net"
	"os"
	"strings"
	"syscall"
	"testing"
	"time"
)

const nowhere = "unix:///nonexistent/portd.sock"

// silent is where connections are taken and nothing is answered.
func silent(t *testing.T) string {
	t.Helper()
	path := t.TempDir() + "/portd.sock"
	listener := must[net.Listener](t)(net.Listen("unix", path))
	t.Cleanup(func() { listener.Close() })
	return "unix://" + path
}

func TestWithoutADaemonTheErrorSaysWhatWasTriedAndHowToStartOne(t *testing.T) {
	_, err := newClient(t, Config{URL: nowhere}).Listen(bounded(t), "nobody")
	var unavailable *DaemonUnavailable
	if !errors.Is(err, ErrDaemonUnavailable) || !errors.As(err, &unavailable) || !errors.Is(err, syscall.ENOENT) {
		t.Fatalf("%v", err)
	}
	if len(unavailable.Tried) != 1 || unavailable.Tried[0].URL != nowhere || errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%+v", unavailable)
	}
	want := "portd: no portd answers at unix:///nonexistent/portd.sock (no such file or directory); " +
		"start one with 'portd serve --user', or name a running one in PORTD_URL"
	if err.Error() != want {
		t.Errorf("%v", err)
	}
}

func TestACallEndsWhenItsContextDoesAndSaysSo(t *testing.T) {
	leavesNothing(t)
	c := newClient(t, Config{URL: silent(t)})
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Millisecond)
	defer cancel()
	if _, err := c.Acquire(ctx, "late"); !errors.Is(err, context.DeadlineExceeded) || errors.Is(err, ErrDaemonUnavailable) {
		t.Errorf("after the deadline: %v", err)
	}
	ctx, cancel = context.WithCancel(context.Background())
	cancel()
	if _, err := c.Resolve(ctx, "late"); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}

func TestADaemonThatSaysNothingIsATimeOutOfTheClient(t *testing.T) {
	leavesNothing(t)
	_, err := newClient(t, Config{URL: silent(t), Timeout: 10 * time.Millisecond}).Acquire(bounded(t), "late")
	if !errors.Is(err, ErrDaemonUnavailable) || !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v", err)
	}
	if !strings.Contains(err.Error(), "no answer within 10ms") {
		t.Errorf("%v", err)
	}
}

func TestWhatIsNoPortdIsErrProtocol(t *testing.T) {
	listener := must[net.Listener](t)(net.Listen("tcp4", "127.0.0.1:0"))
	defer listener.Close()
	go func() {
		for {
			caller, err := listener.Accept()
			if err != nil {
				return
			}
			caller.Read(make([]byte, 1))
			caller.Write([]byte("220 mail.example ESMTP\r\n"))
			caller.Close()
		}
	}()
	_, err := newClient(t, Config{URL: "http://" + listener.Addr().String()}).Acquire(bounded(t), "mail")
	if !errors.Is(err, ErrProtocol) {
		t.Errorf("%v", err)
	}
}

// logged collects what the client logs.
func logged(t *testing.T) *bytes.Buffer {
	var written bytes.Buffer
	log.SetOutput(&written)
	t.Cleanup(func() { log.SetOutput(os.Stderr) })
	return &written
}

func TestTheFallbackIsAPortOfTheKernelsChoiceAndIsLoggedOnce(t *testing.T) {
	leavesNothing(t)
	written := logged(t)
	listener := must[*Listener](t)(newClient(t, Config{URL: nowhere}).Listen(bounded(t), "alone", OrEphemeral()))
	defer listener.Close()
	l := listener.Lease()
	if !l.IsFallback() || l.ID() != "" || l.Port() != listener.Addr().(*net.TCPAddr).Port {
		t.Errorf("%v on %v", l, listener.Addr())
	}
	for _, err := range []error{l.Report(bounded(t), Passing, ""), l.Drain(bounded(t), true), l.Renew(bounded(t), 0)} {
		if err != nil {
			t.Errorf("without a daemon: %v", err)
		}
	}
	if _, err := l.Listen(bounded(t)); !errors.Is(err, syscall.EADDRINUSE) {
		t.Errorf("a second time on the same port: %v", err)
	}
	if lines := strings.Count(written.String(), "\n"); lines != 1 || !strings.Contains(written.String(), "alone") {
		t.Errorf("it logged %q", written)
	}
}

func TestTheFallbackIsForAnAbsentDaemonAlone(t *testing.T) {
	if _, err := Acquire(bounded(t), "Not A Label", OrEphemeral()); asProblem(t, err).Code != "invalid_request" {
		t.Errorf("%v", err)
	}
	_, err := newClient(t, Config{URL: nowhere}).Acquire(bounded(t), "alone", OrEphemeral(), Address("own"))
	if !errors.Is(err, ErrDaemonUnavailable) {
		t.Errorf("an own address of the kernel's choice: %v", err)
	}
}
