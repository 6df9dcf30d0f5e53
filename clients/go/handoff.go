// The handoff: sockets that the daemon bound, received through its socket, so that there is no gap at all. One message
// asks, one answers, on a SOCK_SEQPACKET unix socket; the sockets come with it (SCM_RIGHTS, unix(7)).

package portd

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"syscall"
	"time"
)

const (
	// handoffMaxBytes bounds the answer: a lease with all the metadata that it may have.
	handoffMaxBytes = 256 << 10
	// handoffSockets is how many may come: a lease of both protocols has two.
	handoffSockets = 2
	// defaultBacklog is what Go's own listeners ask for; the kernel cuts it to net.core.somaxconn.
	defaultBacklog = 4096
)

// handOver has the lease's sockets handed over; none where the daemon does not do that here.
func (l *Lease) handOver(ctx context.Context) (sockets, error) {
	if l.IsFallback() || l.at.handoffPath() == "" {
		return sockets{}, nil
	}
	path := l.at.handoffPath()
	limited, cancel := context.WithTimeout(ctx, l.client.timeout)
	defer cancel()
	dialed, err := l.at.dialUnix(limited, "unixpacket", path)
	if limited.Err() != nil {
		return sockets{}, l.unanswered(ctx, path, limited.Err())
	}
	if err != nil {
		return sockets{}, nil
	}
	defer dialed.Close()
	backlog := l.settings.backlog
	if backlog == 0 {
		backlog = defaultBacklog
	}
	wanted := map[string]any{"lease": l.ID(), "listen": true, "backlog": backlog}
	data, files, err := converse(limited, dialed.(*net.UnixConn), wanted)
	if err != nil {
		return sockets{}, l.unanswered(ctx, path, err)
	}
	now, err := readHandoff(data)
	if err != nil {
		closeAll(files)
		return sockets{}, err
	}
	l.update(*now)
	return l.ofFiles(files)
}

// readHandoff reads what came with the sockets: the lease, or why there are none.
func readHandoff(data []byte) (*Document, error) {
	var answer struct {
		Lease   *Document       `json:"lease"`
		Problem json.RawMessage `json:"problem"`
	}
	if err := json.Unmarshal(data, &answer); err != nil {
		return nil, fmt.Errorf("%w: the handoff's answer: %v", ErrProtocol, err)
	}
	if answer.Problem != nil {
		var status struct{ Status int }
		_ = json.Unmarshal(answer.Problem, &status) // problemOf minds what is no problem document
		return nil, problemOf(status.Status, answer.Problem)
	}
	if answer.Lease == nil {
		return nil, fmt.Errorf("%w: the handoff's answer: neither a lease nor a problem", ErrProtocol)
	}
	return answer.Lease, nil
}

// converse asks once and returns what comes: one message, and the descriptors with it, close-on-exec.
func converse(ctx context.Context, conn *net.UnixConn, wanted any) ([]byte, []*os.File, error) {
	defer endWith(ctx, conn)()
	message, err := json.Marshal(wanted)
	if err != nil {
		return nil, nil, err
	}
	if _, err := conn.Write(message); err != nil {
		return nil, nil, err
	}
	data, ancillary := make([]byte, handoffMaxBytes), make([]byte, syscall.CmsgSpace(handoffSockets*4))
	length, space, flags, _, err := conn.ReadMsgUnix(data, ancillary)
	if err != nil {
		return nil, nil, err
	}
	files := filesOf(ancillary[:space])
	if length == 0 || flags&(syscall.MSG_TRUNC|syscall.MSG_CTRUNC) != 0 {
		closeAll(files)
		return nil, nil, fmt.Errorf("the handoff's answer is cut off")
	}
	return data[:length], files, nil
}

// endWith breaks off reads and writes when the context ends; the returned function ends that watch.
func endWith(ctx context.Context, conn net.Conn) (stop func()) {
	over, watched := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(watched)
		select {
		case <-ctx.Done():
			conn.SetDeadline(time.Unix(1, 0))
		case <-over:
		}
	}()
	return func() {
		close(over)
		<-watched
	}
}

// filesOf returns the descriptors of control messages. What is none of ours is not there: the kernel sends no other kind.
func filesOf(ancillary []byte) (files []*os.File) {
	messages, err := syscall.ParseSocketControlMessage(ancillary)
	if err != nil {
		return nil
	}
	for i := range messages {
		descriptors, _ := syscall.ParseUnixRights(&messages[i])
		for _, fd := range descriptors {
			files = append(files, os.NewFile(uintptr(fd), "handed over by portd"))
		}
	}
	return files
}

func closeAll(files []*os.File) {
	for _, file := range files {
		file.Close()
	}
}

// unanswered says that the handoff was asked and gave no answer: the caller's context ended, or nothing came.
func (l *Lease) unanswered(ctx context.Context, path string, err error) error {
	if ctx.Err() != nil {
		return fmt.Errorf("portd: unix://%s: %w", path, ctx.Err())
	}
	if errors.Is(err, os.ErrDeadlineExceeded) || errors.Is(err, context.DeadlineExceeded) {
		err = noAnswer{l.client.timeout}
	}
	return &DaemonUnavailable{[]Attempt{{"unix://" + path, err}}}
}
