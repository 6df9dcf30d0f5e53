// Who is at the other end: root, the user portd, or this process' own user. Everybody else is refused: a socket below the
// temporary directory, or port 7783 of a host without a daemon, can be anybody's.

package portd

import (
	"bufio"
	"context"
	"encoding/hex"
	"errors"
	"fmt"
	"net"
	"os"
	"os/user"
	"reflect"
	"strconv"
	"strings"
	"syscall"
	"unsafe"
)

const (
	// daemonUser is what the packaged system daemon runs as.
	daemonUser = "portd"
	// stateListen is TCP_LISTEN in /proc/net/tcp, whose listeners come before all connections (net/ipv4/tcp_ipv4.c).
	stateListen = "0A"
)

// dial connects to one endpoint, and returns only connections that a trusted user accepts. Its errors are dial errors,
// so that the next endpoint is tried.
func (e *endpoint) dial(ctx context.Context, network, address string) (net.Conn, error) {
	if e.path != "" {
		return e.dialUnix(ctx, "unix", e.path)
	}
	if e.isTLS {
		return new(net.Dialer).DialContext(ctx, network, address) // the certificate says who it is
	}
	host, service, err := net.SplitHostPort(address)
	if err != nil {
		return nil, untrusted(network, err)
	}
	port, err := strconv.Atoi(service)
	if err != nil {
		return nil, untrusted(network, err)
	}
	resolved, err := net.DefaultResolver.LookupIPAddr(ctx, host)
	if err != nil {
		return nil, untrusted(network, err)
	}
	for _, one := range resolved {
		var conn net.Conn
		if conn, err = dialTCP(ctx, one, port); err == nil {
			return conn, nil
		}
	}
	return nil, err
}

// dialUnix connects to a unix socket of the daemon: the API's ("unix"), or the handoff's ("unixpacket").
func (e *endpoint) dialUnix(ctx context.Context, network, path string) (net.Conn, error) {
	if e.runtimeDirectory != "" && !isPrivate(e.runtimeDirectory, os.Geteuid()) {
		return nil, untrusted(network, fmt.Errorf("%s is not a directory that only the user %d can write",
			e.runtimeDirectory, os.Geteuid()))
	}
	conn, err := new(net.Dialer).DialContext(ctx, network, path)
	if err != nil {
		return nil, err
	}
	uid, err := peerUID(conn.(*net.UnixConn))
	if err == nil {
		err = checkUID(uid)
	}
	if err != nil {
		conn.Close()
		return nil, untrusted(network, err)
	}
	return conn, nil
}

// dialTCP connects to one address. On loopback the same trusted listeners must be there before and after: only one that is
// there at both moments can have accepted the connection. Other addresses are another host's, and are not checked.
func dialTCP(ctx context.Context, address net.IPAddr, port int) (net.Conn, error) {
	isLocal := address.IP.IsLoopback()
	var before map[string]int
	var err error
	if isLocal {
		if before, err = loopbackListeners(address.IP, port); err != nil {
			return nil, untrusted("tcp", err)
		}
		for _, uid := range before {
			if err := checkUID(uid); err != nil {
				return nil, untrusted("tcp", err)
			}
		}
	}
	conn, err := new(net.Dialer).DialContext(ctx, "tcp", net.JoinHostPort(address.String(), strconv.Itoa(port)))
	if err != nil || !isLocal {
		return conn, err
	}
	after, err := loopbackListeners(address.IP, port)
	if err == nil && (len(before) == 0 || !reflect.DeepEqual(before, after)) {
		err = errors.New("the listener changed while connecting")
	}
	if err != nil {
		conn.Close()
		return nil, untrusted("tcp", err)
	}
	return conn, nil
}

func untrusted(network string, err error) error {
	return &net.OpError{Op: "dial", Net: network, Err: err}
}

// peerUID returns the user that listens at the other end of a unix socket (SO_PEERCRED, unix(7)).
func peerUID(conn *net.UnixConn) (int, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return 0, err
	}
	var credentials *syscall.Ucred
	var failure error
	err = raw.Control(func(fd uintptr) {
		credentials, failure = syscall.GetsockoptUcred(int(fd), syscall.SOL_SOCKET, syscall.SO_PEERCRED)
	})
	if err != nil {
		return 0, err
	}
	if failure != nil {
		return 0, failure
	}
	return int(credentials.Uid), nil
}

// checkUID returns an error unless a user may be the daemon: root, this process' own user, or portd.
func checkUID(uid int) error {
	if uid == 0 || uid == os.Geteuid() {
		return nil
	}
	if daemon, err := user.Lookup(daemonUser); err == nil && daemon.Uid == strconv.Itoa(uid) {
		return nil
	}
	return fmt.Errorf("user %d listens there, not root, %s or this user", uid, daemonUser)
}

// isPrivate reports whether a directory is the user's, and writable by nobody else. One that is missing is: connecting
// reports it.
func isPrivate(directory string, uid int) bool {
	info, err := os.Lstat(directory)
	if err != nil {
		return true
	}
	return info.IsDir() && info.Mode().Perm()&0o022 == 0 && info.Sys().(*syscall.Stat_t).Uid == uint32(uid)
}

// loopbackListeners returns the uid of every TCP listener that may accept connections to a loopback address, by its inode.
func loopbackListeners(ip net.IP, port int) (map[string]int, error) {
	tables := map[string][]net.IP{"tcp6": {ip.To16(), net.IPv6zero}}
	if plain := ip.To4(); plain != nil {
		tables["tcp"] = []net.IP{plain, net.IPv4zero.To4()}
		tables["tcp6"] = append(tables["tcp6"], net.IPv4zero.To16())
	}
	found := map[string]int{}
	for table, addresses := range tables {
		wanted := map[string]bool{}
		for _, address := range addresses {
			wanted[fmt.Sprintf("%s:%04X", kernelHex(address), port)] = true
		}
		if err := readListeners("/proc/net/"+table, wanted, found); err != nil && !errors.Is(err, os.ErrNotExist) {
			return nil, err // a kernel without IPv6 has no tcp6
		}
	}
	return found, nil
}

func readListeners(path string, wanted map[string]bool, found map[string]int) error {
	file, err := os.Open(path)
	if err != nil {
		return err
	}
	defer file.Close()
	lines := bufio.NewScanner(file)
	lines.Scan() // the heading
	for lines.Scan() {
		fields := strings.Fields(lines.Text())
		if len(fields) < 10 || fields[3] != stateListen {
			break
		}
		if !wanted[fields[1]] {
			continue
		}
		uid, err := strconv.Atoi(fields[7])
		if err != nil {
			return err
		}
		found[fields[9]] = uid
	}
	return lines.Err()
}

// kernelHex writes an address as /proc/net/tcp does: 32-bit words in the host's byte order.
func kernelHex(address net.IP) string {
	written := make([]byte, len(address))
	copy(written, address)
	one := uint16(1)
	if *(*byte)(unsafe.Pointer(&one)) == 1 {
		for at := 0; at < len(written); at += 4 {
			written[at], written[at+1], written[at+2], written[at+3] =
				written[at+3], written[at+2], written[at+1], written[at]
		}
	}
	return strings.ToUpper(hex.EncodeToString(written))
}
