// From a lease to its sockets: passed by the starter, handed over by the daemon, or bound here.

package portd

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"strconv"
	"strings"
	"syscall"
)

// declinesMax bounds the ports that are given back in a row before binding gives up: then something else is wrong.
const declinesMax = 8

// sockets are those of one lease; nil where it has none of that protocol, or somebody has taken it out.
type sockets struct {
	stream   *net.TCPListener
	datagram *net.UDPConn
}

func (s *sockets) has(protocol string) bool {
	return protocol == "tcp" && s.stream != nil || protocol == "udp" && s.datagram != nil
}

// bind binds as servers do; net sets SO_REUSEADDR for TCP, which a shared hold lets in.
func (s *sockets) bind(ctx context.Context, protocol, address string, port int) error {
	network := protocol
	if !strings.Contains(address, ":") {
		network += "4" // or net takes "0.0.0.0" for all addresses, IPv6's too
	}
	var config net.ListenConfig
	at := net.JoinHostPort(address, strconv.Itoa(port))
	if protocol == "udp" {
		conn, err := config.ListenPacket(ctx, network, at)
		if err != nil {
			return fmt.Errorf("portd: %w", err)
		}
		s.datagram = conn.(*net.UDPConn)
		return nil
	}
	listener, err := config.Listen(ctx, network, at)
	if err != nil {
		return fmt.Errorf("portd: %w", err)
	}
	s.stream = listener.(*net.TCPListener)
	return nil
}

func (s *sockets) close() {
	if s.stream != nil {
		s.stream.Close()
	}
	if s.datagram != nil {
		s.datagram.Close()
	}
	*s = sockets{}
}

func (s *sockets) port() int {
	if s.stream != nil {
		return s.stream.Addr().(*net.TCPAddr).Port
	}
	return s.datagram.LocalAddr().(*net.UDPAddr).Port
}

// open returns the lease's sockets, declining ports that turn out to be taken. The caller has l.opening.
func (l *Lease) open(ctx context.Context) (sockets, error) {
	if l.IsAdopted() {
		if passed := passedFiles(l.Document().Endpoint); len(passed) > 0 {
			return l.ofFiles(passed)
		}
	}
	for declines := 0; ; declines++ {
		opened, err := l.openOnce(ctx)
		if err == nil || !isTaken(err) || declines == declinesMax {
			return opened, err
		}
		if refusal := l.Decline(ctx); refusal != nil {
			return sockets{}, refused(refusal, err)
		}
	}
}

// openOnce has the sockets handed over, and binds those that are not: UDP's of a shared hold, or all without a handoff.
func (l *Lease) openOnce(ctx context.Context) (sockets, error) {
	made, err := l.handOver(ctx)
	if err != nil {
		return sockets{}, err
	}
	now := l.Document()
	for _, protocol := range []string{"tcp", "udp"} {
		isWanted := now.Protocol == protocol || now.Protocol == "both"
		if !isWanted || made.has(protocol) {
			continue
		}
		if err := made.bind(ctx, protocol, now.Address, now.Port); err != nil {
			made.close()
			return sockets{}, err
		}
	}
	return made, nil
}

// ofFiles makes sockets of descriptors, which are closed: net works on copies of its own.
func (l *Lease) ofFiles(files []*os.File) (made sockets, err error) {
	for _, file := range files {
		if err == nil {
			err = made.adopt(file)
		}
		file.Close()
	}
	if err != nil {
		made.close()
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.passed = err == nil && len(files) > 0
	return made, err
}

func (s *sockets) adopt(file *os.File) error {
	kind, err := syscall.GetsockoptInt(int(file.Fd()), syscall.SOL_SOCKET, syscall.SO_TYPE)
	if err != nil {
		return fmt.Errorf("portd: a passed descriptor is no socket: %w", err)
	}
	if kind == syscall.SOCK_DGRAM {
		conn, err := net.FilePacketConn(file)
		if err == nil {
			s.datagram = conn.(*net.UDPConn)
		}
		return err
	}
	listener, err := net.FileListener(file)
	if err == nil {
		s.stream = listener.(*net.TCPListener)
	}
	return err
}

// isTaken reports whether the port is in use, as the kernel or the daemon reports.
func isTaken(err error) bool {
	return errors.Is(err, syscall.EADDRINUSE) || errors.Is(err, ErrPortTaken)
}

// refused returns the error to report when a taken port can't be declined: an exact one is just taken.
func refused(refusal, taken error) error {
	var problem *Problem
	if errors.As(refusal, &problem) && problem.Code == "not_declinable" {
		return fmt.Errorf("%w, and no other was wanted: %v", ErrPortTaken, taken)
	}
	return refusal
}
