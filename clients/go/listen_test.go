package portd

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"reflect"
	"sync"
	"syscall"
	"testing"
	"time"
)

func TestAListenerServesHTTPOnTheLeasedPortAndTheDaemonSeesIt(t *testing.T) {
	leavesNothing(t)
	listener := must[*Listener](t)(Listen(bounded(t), "heard", Check("http:/healthz")))
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { io.WriteString(w, "ok") })}
	served := make(chan error)
	go func() { served <- server.Serve(listener) }()
	client := &http.Client{Transport: &http.Transport{DisableKeepAlives: true}}
	response := must[*http.Response](t)(client.Get("http://" + listener.Addr().String()))
	body := must[[]byte](t)(io.ReadAll(response.Body))
	response.Body.Close()
	if string(body) != "ok" {
		t.Errorf("it answers %q", body)
	}
	if !listener.Lease().IsPassed() || listener.Addr().(*net.TCPAddr).Port != listener.Lease().Port() {
		t.Errorf("%v stands not on %v by handoff", listener.Addr(), listener.Lease())
	}
	waitFor(t, "the daemon sees it bound and passing", func() bool {
		now := shared.lease(t, listener.Lease().ID())
		return now.State == "bound" && now.Health == Passing && now.Owner.PID == os.Getpid()
	})
	if err := server.Shutdown(bounded(t)); err != nil {
		t.Error(err)
	}
	<-served
	if now := shared.lease(t, listener.Lease().ID()); now.EndedBecause != "released" {
		t.Errorf("after Shutdown the lease is %s, %s", now.State, now.EndedBecause)
	}
}

func TestEveryOptionReachesTheDaemon(t *testing.T) {
	verify := false
	check := HealthCheck{Kind: "http", Path: "/up", Method: "HEAD", Interval: 1500 * time.Millisecond, Timeout: time.Second,
		StartPeriod: time.Minute, Rise: 3, Fall: 4, Headers: map[string]string{"x-a": "b"}, ExpectStatus: []int{200, 204},
		ExpectBody: "fine", TLS: true, TLSVerify: &verify}
	l := must[*Lease](t)(Acquire(bounded(t), "optional", InstanceName("blue"), Endpoint("metrics"), ExactPort(firstPort+80),
		Address("127.0.0.2"), Protocol("tcp"), Pool("default"), Hold("none"), TTL(90*time.Second), Tags("a", "b"),
		Metadata(map[string]string{"version": "2"}), CheckWith(check)))
	defer l.Close()
	now := shared.lease(t, l.ID())
	if now.Instance != "blue" || now.Endpoint != "metrics" || now.Port != firstPort+80 || now.Address != "127.0.0.2" ||
		now.Hold != "none" || now.Lifetime != "ttl" || now.Metadata["version"] != "2" || len(now.Tags) != 2 {
		t.Errorf("the daemon has %+v", now)
	}
	if now.Check == nil || !reflect.DeepEqual(*now.Check, check) {
		t.Errorf("its check is %+v", now.Check)
	}
	if period := now.ExpiresAt.Sub(now.CreatedAt); period < 90*time.Second || period > 90*time.Second+deadline {
		t.Errorf("its clock is set to %v", period)
	}
}

func TestACheckInShortThatSaysTooMuchIsTheCallersMistake(t *testing.T) {
	if _, err := Acquire(bounded(t), "short", Check("tcp:8080")); err == nil {
		t.Error("it was granted")
	}
}

func TestAHandedSocketIsNotInheritedByChildren(t *testing.T) {
	leavesNothing(t)
	listener := must[*Listener](t)(Listen(bounded(t), "private"))
	defer listener.Close()
	raw := must[syscall.RawConn](t)(listener.SyscallConn())
	raw.Control(func(fd uintptr) {
		flags, _, _ := syscall.Syscall(syscall.SYS_FCNTL, fd, syscall.F_GETFD, 0)
		if flags&syscall.FD_CLOEXEC == 0 {
			t.Error("a child inherits it")
		}
	})
}

func TestUDPIsAPacketConnAndBothHaveOneNumber(t *testing.T) {
	leavesNothing(t)
	conn := must[*PacketConn](t)(ListenPacket(bounded(t), "datagrams"))
	defer conn.Close()
	sender := must[net.Conn](t)(net.Dial("udp", conn.LocalAddr().String()))
	defer sender.Close()
	sender.Write([]byte("hello"))
	received := make([]byte, 16)
	conn.SetReadDeadline(time.Now().Add(deadline))
	if n, _, err := conn.ReadFrom(received); err != nil || string(received[:n]) != "hello" {
		t.Errorf("it received %q, %v", received[:n], err)
	}

	l := must[*Lease](t)(Acquire(bounded(t), "doubled", Protocol("both")))
	stream, datagram := must[*Listener](t)(l.Listen(bounded(t))), must[*PacketConn](t)(l.ListenPacket(bounded(t)))
	defer datagram.Close()
	defer stream.Close()
	if stream.Addr().(*net.TCPAddr).Port != l.Port() || datagram.LocalAddr().(*net.UDPAddr).Port != l.Port() {
		t.Errorf("port %d is leased, %v and %v are bound", l.Port(), stream.Addr(), datagram.LocalAddr())
	}
}

func TestASocketOfAnotherProtocolOrOfAClosedLeaseIsRefused(t *testing.T) {
	l := must[*Lease](t)(Acquire(bounded(t), "refusing"))
	if _, err := l.ListenPacket(bounded(t)); err == nil {
		t.Error("a TCP lease has a UDP socket")
	}
	l.Close()
	if _, err := l.Listen(bounded(t)); !errors.Is(err, net.ErrClosed) {
		t.Errorf("a closed lease is listened on: %v", err)
	}
}

// overTCP is a client that no socket can be handed to: it binds over the daemon's hold.
func overTCP(t *testing.T) *Client {
	return newClient(t, Config{URL: "http://" + sharedHTTP})
}

func TestWhereNothingIsHandedOverThePortIsBound(t *testing.T) {
	leavesNothing(t)
	listener := must[*Listener](t)(overTCP(t).Listen(bounded(t), "bound", Backlog(7)))
	defer listener.Close()
	if listener.Lease().IsPassed() || listener.Addr().(*net.TCPAddr).Port != listener.Lease().Port() {
		t.Errorf("%v is on %v", listener.Lease(), listener.Addr())
	}
	waitFor(t, "the daemon sees its owner", func() bool { return shared.lease(t, listener.Lease().ID()).State == "bound" })
}

func TestAnAddressOfIPv4StaysOutOfIPv6(t *testing.T) {
	listener := must[*Listener](t)(overTCP(t).Listen(bounded(t), "everywhere", Address("0.0.0.0")))
	defer listener.Close()
	if address := listener.Addr().(*net.TCPAddr).IP; address.To4() == nil {
		t.Errorf("it listens on %v", address)
	}
}

func TestAPortBoundByAForeignProcessIsDeclinedUnderTheSameLease(t *testing.T) {
	for name, c := range map[string]*Client{"by handoff": shared.client(t), "bound": overTCP(t)} {
		t.Run(name, func(t *testing.T) {
			leavesNothing(t)
			l := must[*Lease](t)(c.Acquire(bounded(t), "raced", Hold("none")))
			defer l.Close()
			id, first := l.ID(), l.Port()
			occupy(t, l.Address(), first)
			listener := must[*Listener](t)(l.Listen(bounded(t)))
			defer listener.Close()
			if l.ID() != id || l.Port() == first || listener.Addr().(*net.TCPAddr).Port != l.Port() {
				t.Errorf("lease %s on %d became %s on %d, and %v is bound", id, first, l.ID(), l.Port(), listener.Addr())
			}
		})
	}
}

func TestAnExactPortOfAForeignProcessIsErrPortTaken(t *testing.T) {
	occupy(t, "127.0.0.1", firstPort+90)
	_, err := Listen(bounded(t), "refused", ExactPort(firstPort+90))
	if problem := asProblem(t, err); !errors.Is(err, ErrPortTaken) || problem.Status != 409 || problem.Pointer != "/port" {
		t.Errorf("%#v", problem)
	}
	l := must[*Lease](t)(overTCP(t).Acquire(bounded(t), "refused", ExactPort(firstPort+91), Hold("none")))
	defer l.Close()
	occupy(t, "127.0.0.1", firstPort+91)
	if _, err := l.Listen(bounded(t)); !errors.Is(err, ErrPortTaken) {
		t.Errorf("taken after the grant it is %v", err)
	}
}

func TestFiftyGoroutinesAtOnceGetFiftyPorts(t *testing.T) {
	leavesNothing(t)
	var all sync.WaitGroup
	var mu sync.Mutex
	ports := map[int]bool{}
	for i := 0; i < 50; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			listener, err := Listen(bounded(t), "crowd")
			if err != nil {
				t.Error(err)
				return
			}
			t.Cleanup(func() { listener.Close() })
			mu.Lock()
			defer mu.Unlock()
			ports[listener.Addr().(*net.TCPAddr).Port] = true
		}()
	}
	all.Wait()
	if len(ports) != 50 {
		t.Errorf("%d ports", len(ports))
	}
}

func TestALeaseIsSafeForConcurrentUseUpToItsEnd(t *testing.T) {
	leavesNothing(t)
	l := must[*Lease](t)(shared.client(t).Acquire(bounded(t), "shared", TTL(time.Second), Check("report")))
	var all sync.WaitGroup
	for _, use := range []func(context.Context) error{
		func(ctx context.Context) error { return l.Renew(ctx, 0) }, l.Decline, func(ctx context.Context) error { return l.Drain(ctx, false) },
		func(ctx context.Context) error { return l.Report(ctx, Passing, "") },
		func(ctx context.Context) error { _ = l.String(); return nil },
	} {
		all.Add(1)
		go func(use func(context.Context) error) {
			defer all.Done()
			for i := 0; i < 10; i++ {
				if err := use(bounded(t)); err != nil {
					t.Error(err)
				}
			}
		}(use)
	}
	all.Wait()
	for i := 0; i < 3; i++ {
		all.Add(1)
		go func() {
			defer all.Done()
			l.Close()
			if now := shared.lease(t, l.ID()); now.EndedBecause != "released" {
				t.Errorf("Close returned, and it is %s", now.State)
			}
		}()
	}
	all.Wait()
}
