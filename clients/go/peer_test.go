package portd

import (
	"context"
	"net"
	"os"
	"strconv"
	"syscall"
	"testing"
)

const anotherUID = 4242

func TestListenersThatCanAcceptAreFoundWithTheirUser(t *testing.T) {
	for _, one := range []struct{ network, bound, asked string }{
		{"tcp4", "127.0.0.1:0", "127.0.0.1"}, {"tcp4", "0.0.0.0:0", "127.0.0.1"}, {"tcp", "[::]:0", "127.0.0.1"},
		{"tcp6", "[::1]:0", "::1"}, {"tcp6", "[::]:0", "::1"},
	} {
		listener := must[net.Listener](t)(net.Listen(one.network, one.bound))
		port := listener.Addr().(*net.TCPAddr).Port
		found := must[map[string]int](t)(loopbackListeners(net.ParseIP(one.asked), port))
		if len(found) != 1 {
			t.Errorf("%s for %s: %v", one.bound, one.asked, found)
		}
		for _, uid := range found {
			if uid != os.Geteuid() {
				t.Errorf("%s belongs to user %d", one.bound, uid)
			}
		}
		listener.Close()
	}
}

func TestLoopbackListenerOfAnotherUserIsRefused(t *testing.T) {
	if os.Geteuid() != 0 {
		t.Skip("only root can give a socket away")
	}
	listener := must[*net.TCPListener](t)(net.ListenTCP("tcp", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1)}))
	defer listener.Close()
	port := listener.Addr().(*net.TCPAddr).Port
	raw := must[syscall.RawConn](t)(listener.SyscallConn())
	if err := raw.Control(func(fd uintptr) {
		if err := syscall.Fchown(int(fd), anotherUID, anotherUID); err != nil {
			t.Error(err)
		}
	}); err != nil {
		t.Fatal(err)
	}
	at := must[*endpoint](t)(parseEndpoint("http://127.0.0.1:" + strconv.Itoa(port)))
	conn, err := at.dial(context.Background(), "tcp", "127.0.0.1:"+strconv.Itoa(port))
	if err == nil || !isRefusedConnection(err) {
		t.Errorf("%v, %v", conn, err)
	}
}

func TestRuntimeDirectoryThatOthersCanWriteIsRefused(t *testing.T) {
	directory := t.TempDir()
	for mode, want := range map[os.FileMode]bool{0o700: true, 0o755: true, 0o770: false, 0o702: false} {
		if err := os.Chmod(directory, mode); err != nil {
			t.Fatal(err)
		}
		if isPrivate(directory, os.Geteuid()) != want {
			t.Errorf("mode %o", mode)
		}
	}
	if isPrivate(directory, os.Geteuid()+1) {
		t.Error("another user's directory is taken for private")
	}
}
