// What a program listens on: net's own listener and packet connection, with the lease that they stand on.

package portd

import (
	"context"
	"fmt"
	"net"
	"syscall"
)

// A Listener is a TCP listener on a leased port. Close closes both; closing the embedded TCPListener alone leaves the
// lease to be listened on anew.
type Listener struct {
	*net.TCPListener
	lease *Lease
}

// Lease returns the lease of the port.
func (l *Listener) Lease() *Lease { return l.lease }

// Close stops listening and gives the lease back; it is drained before, if it is to be.
func (l *Listener) Close() error {
	l.lease.drainOut()
	err := l.TCPListener.Close()
	l.lease.Close()
	return err
}

// A PacketConn is a UDP socket on a leased port. Close closes both.
type PacketConn struct {
	*net.UDPConn
	lease *Lease
}

// Lease returns the lease of the port.
func (c *PacketConn) Lease() *Lease { return c.lease }

// Close closes the socket and gives the lease back; it is drained before, if it is to be.
func (c *PacketConn) Close() error {
	c.lease.drainOut()
	err := c.UDPConn.Close()
	c.lease.Close()
	return err
}

// Listen leases a port for this process, or adopts what `portd run` gave it, and listens on it.
func Listen(ctx context.Context, service string, options ...LeaseOption) (*Listener, error) {
	c, err := ofEnvironment()
	if err != nil {
		return nil, err
	}
	return c.Listen(ctx, service, options...)
}

// ListenPacket is Listen for UDP.
func ListenPacket(ctx context.Context, service string, options ...LeaseOption) (*PacketConn, error) {
	c, err := ofEnvironment()
	if err != nil {
		return nil, err
	}
	return c.ListenPacket(ctx, service, options...)
}

// Listen is the package's Listen, with this client.
func (c *Client) Listen(ctx context.Context, service string, options ...LeaseOption) (*Listener, error) {
	l, err := c.Acquire(ctx, service, options...)
	if err != nil {
		return nil, err
	}
	listener, err := l.Listen(ctx)
	if err != nil {
		l.Close()
	}
	return listener, err
}

// ListenPacket is the package's ListenPacket, with this client.
func (c *Client) ListenPacket(ctx context.Context, service string, options ...LeaseOption) (*PacketConn, error) {
	l, err := c.Acquire(ctx, service, append([]LeaseOption{Protocol("udp")}, options...)...)
	if err != nil {
		return nil, err
	}
	conn, err := l.ListenPacket(ctx)
	if err != nil {
		l.Close()
	}
	return conn, err
}

// Listen returns the lease's TCP socket, listening: passed by `portd run`, handed over by the daemon, or bound here. A
// bound one gives a port that turns out to be taken back, and tries another.
func (l *Lease) Listen(ctx context.Context) (*Listener, error) {
	l.opening.Lock()
	defer l.opening.Unlock()
	if err := l.fill(ctx, "tcp"); err != nil {
		return nil, err
	}
	stream := l.spare.stream
	l.spare.stream = nil
	if l.settings.backlog != 0 {
		setBacklog(stream, l.settings.backlog)
	}
	return &Listener{stream, l}, nil
}

// ListenPacket returns the lease's UDP socket, bound.
func (l *Lease) ListenPacket(ctx context.Context) (*PacketConn, error) {
	l.opening.Lock()
	defer l.opening.Unlock()
	if err := l.fill(ctx, "udp"); err != nil {
		return nil, err
	}
	datagram := l.spare.datagram
	l.spare.datagram = nil
	return &PacketConn{datagram, l}, nil
}

// fill opens the lease's sockets, if the wanted one is not there since another one of them was. The caller has l.opening.
func (l *Lease) fill(ctx context.Context, wanted string) error {
	if protocol := l.Document().Protocol; protocol != wanted && protocol != "both" {
		return fmt.Errorf("portd: the lease of %s is for %s, not for %s", l, protocol, wanted)
	}
	if l.isClosed() {
		return fmt.Errorf("portd: the lease of %s: %w", l, net.ErrClosed)
	}
	if l.spare.has(wanted) {
		return nil
	}
	l.spare.close()
	opened, err := l.open(ctx)
	l.spare = opened
	return err
}

// setBacklog sets it on a socket that listens already: a second listen(2) does no more than that.
func setBacklog(listener *net.TCPListener, backlog int) {
	if raw, err := listener.SyscallConn(); err == nil {
		raw.Control(func(fd uintptr) { syscall.Listen(int(fd), backlog) })
	}
}
