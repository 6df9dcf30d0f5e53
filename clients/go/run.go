// What `portd run` gives to the command that it becomes: a lease in the environment, and perhaps its listening sockets.

package portd

import (
	"context"
	"errors"
	"os"
	"strconv"
	"strings"
	"sync"
	"syscall"
)

// given is a lease that the environment names.
type given struct {
	id    string
	token string
	host  string
	port  int
}

// givenByRun reads the environment; nil where `portd run` did not start this process, or without that endpoint.
func givenByRun(getenv func(string) string, endpoint string) *given {
	suffix := ""
	if endpoint != "" && endpoint != "main" {
		suffix = "_" + strings.ToUpper(strings.ReplaceAll(endpoint, "-", "_"))
	}
	id := getenv("PORTD_LEASE" + suffix)
	port, err := strconv.ParseUint(getenv("PORT"+suffix), 10, 16)
	if id == "" || err != nil {
		return nil
	}
	return &given{id, getenv("PORTD_TOKEN" + suffix), orElse(getenv("HOST"), "127.0.0.1"), int(port)}
}

// adopt returns the given lease and where it is known, or nil where it is another service's or has ended. Without an
// answer the environment is taken at its word: the port is ours as long as this process lives.
func (g *given) adopt(ctx context.Context, c *Client, wanted wish) (*Document, *endpoint, error) {
	found := &Document{}
	answered, err := c.call(ctx, request{method: "GET", path: leasePath(g.id)}, found)
	switch {
	case errors.Is(err, ErrDaemonUnavailable):
		return &Document{ID: g.id, Service: wanted.Service, Instance: wanted.Instance, Address: g.host, Port: g.port,
			Endpoint: orElse(wanted.Endpoint, "main"), Protocol: orElse(wanted.Protocol, "tcp"), Lifetime: "process",
		}, c.candidates(nil)[0], nil
	case errors.Is(err, ErrLeaseLost):
		return nil, nil, nil
	case err != nil:
		return nil, nil, err
	case found.State == "ended" || found.Service != wanted.Service:
		return nil, nil, nil
	}
	return found, answered.at, nil
}

// firstPassed is where passed sockets start (sd_listen_fds(3), SD_LISTEN_FDS_START).
const firstPassed = 3

var (
	takenMu sync.Mutex
	taken   = map[int]bool{} // passed descriptors that somebody has by now: once closed, their numbers may be anything's
)

// takePassed takes what `portd run --socket` laid from descriptor 3 on for an endpoint, if it is meant for this process.
func takePassed(endpoint string) []*os.File {
	count, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return nil
	}
	takenMu.Lock()
	defer takenMu.Unlock()
	var passed []*os.File
	for i, name := range strings.Split(os.Getenv("LISTEN_FDNAMES"), ":") {
		fd := firstPassed + i
		if i < count && name == endpoint && !taken[fd] {
			taken[fd] = true
			syscall.CloseOnExec(fd)
			passed = append(passed, os.NewFile(uintptr(fd), "passed by portd"))
		}
	}
	return passed
}
