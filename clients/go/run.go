// What `portd run` gives to the command that it becomes: a lease in the environment, and perhaps its listening sockets.

package portd

import (
	"context"
	"errors"
	"log"
	"os"
	"reflect"
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

var (
	adoptedMu sync.Mutex
	adopted   = map[string]bool{} // leases of the environment that this process has adopted: each belongs to one Lease
	warned    = map[string]bool{} // leases of the environment that are another service's, and that was logged
)

// adoptable reads the environment; nil where `portd run` did not start this process, without that endpoint, or where this
// process has adopted that lease before: a second one is another instance.
func adoptable(getenv func(string) string, endpoint string) *given {
	suffix := ""
	if endpoint != "" && endpoint != "main" {
		suffix = "_" + strings.ToUpper(strings.ReplaceAll(endpoint, "-", "_"))
	}
	id := getenv("PORTD_LEASE" + suffix)
	port, err := strconv.ParseUint(getenv("PORT"+suffix), 10, 16)
	adoptedMu.Lock()
	defer adoptedMu.Unlock()
	if id == "" || err != nil || adopted[id] {
		return nil
	}
	return &given{id, getenv("PORTD_TOKEN" + suffix), orElse(getenv("HOST"), "127.0.0.1"), int(port)}
}

// adopt returns the given lease, with what the program requests applied to it, and where it is known; or nil where it is
// another service's or has ended. If no daemon answers, trust the environment: the lease of `portd run` lasts as long as this
// process.
func (g *given) adopt(ctx context.Context, c *Client, wanted Request) (*Document, *endpoint, error) {
	found := &Document{}
	answered, err := c.call(ctx, request{method: "GET", path: leasePath(g.id)}, found)
	switch {
	case errors.Is(err, ErrDaemonUnavailable):
		g.mark(adopted)
		return &Document{ID: g.id, Service: wanted.Service, Instance: wanted.Instance, Address: g.host, Port: g.port,
			Endpoint: orElse(wanted.Endpoint, "main"), Protocol: orElse(wanted.Protocol, "tcp"), Lifetime: "process",
		}, c.candidates(nil)[0], nil
	case errors.Is(err, ErrLeaseLost):
		return nil, nil, nil
	case err != nil:
		return nil, nil, err
	case found.State == "ended":
		return nil, nil, nil
	case found.Service != wanted.Service:
		if g.mark(warned) {
			log.Printf("portd: 'portd run' leased port %d for %s, but this program leases for %s: use one name, or the port "+
				"of 'portd run' stays unused", g.port, found.Service, wanted.Service)
		}
		return nil, nil, nil
	}
	if missing := differences(*found, wanted); missing != nil {
		_, err = c.call(ctx, request{method: "PATCH", path: leasePath(g.id), body: missing, token: g.token, at: answered.at}, found)
		if err != nil {
			return nil, nil, err
		}
	}
	g.mark(adopted)
	return found, answered.at, nil
}

// mark notes the lease, and returns whether that is new.
func (g *given) mark(among map[string]bool) bool {
	adoptedMu.Lock()
	defer adoptedMu.Unlock()
	isNew := !among[g.id] && !adopted[g.id]
	among[g.id] = true
	return isNew
}

// differences returns what a program requests and a lease does not have yet; nil where there is nothing.
func differences(now Document, wanted Request) *Change {
	missing := Change{}
	if wanted.Tags != nil && !reflect.DeepEqual(wanted.Tags, now.Tags) {
		missing.Tags = wanted.Tags
	}
	if wanted.Metadata != nil && !reflect.DeepEqual(wanted.Metadata, now.Metadata) {
		missing.Metadata = wanted.Metadata
	}
	if wanted.Weight != nil && *wanted.Weight != now.weight() {
		missing.Weight = wanted.Weight
	}
	if wanted.Check != nil && (now.Check == nil || !now.Check.covers(*wanted.Check)) {
		missing.Check = wanted.Check
	}
	if wanted.Announce != nil && (wanted.Announce != true || now.Announce == nil) {
		missing.Announce = wanted.Announce
	}
	if reflect.DeepEqual(missing, Change{}) {
		return nil
	}
	return &missing
}

// firstPassed is where passed sockets start (sd_listen_fds(3), SD_LISTEN_FDS_START).
const firstPassed = 3

var (
	passedMu sync.Mutex
	used     = map[int]bool{} // passed descriptors that were returned before: once closed, their numbers may be anything's
)

// passedFiles returns what `portd run --socket` passed from descriptor 3 on for an endpoint, if it is meant for this process,
// each file once.
func passedFiles(endpoint string) []*os.File {
	count, err := strconv.Atoi(os.Getenv("LISTEN_FDS"))
	if err != nil || os.Getenv("LISTEN_PID") != strconv.Itoa(os.Getpid()) {
		return nil
	}
	passedMu.Lock()
	defer passedMu.Unlock()
	var passed []*os.File
	for i, name := range strings.Split(os.Getenv("LISTEN_FDNAMES"), ":") {
		fd := firstPassed + i
		if i < count && name == endpoint && !used[fd] {
			used[fd] = true
			syscall.CloseOnExec(fd)
			passed = append(passed, os.NewFile(uintptr(fd), "passed by portd"))
		}
	}
	return passed
}
