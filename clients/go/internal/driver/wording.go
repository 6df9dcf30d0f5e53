package main

import (
	"context"
	"encoding/json"
	"errors"
	"os"
	"path/filepath"
	"runtime"
	"strings"
	"time"

	portd "github.com/portd/portd/clients/go"
)

// leaseOptions says what a case asks for as a Go program would.
func leaseOptions(a arguments) ([]portd.LeaseOption, error) {
	options := []portd.LeaseOption{portd.Protocol(a.Protocol), portd.Address(a.Address), portd.InstanceName(a.Instance),
		portd.Endpoint(a.Endpoint), portd.Pool(a.Pool), portd.Hold(a.Hold), portd.TTL(seconds(a.TTL)), portd.Port(a.Port),
		portd.DrainFor(seconds(a.DrainS)), portd.Backlog(a.Backlog)}
	if a.Tags != nil {
		options = append(options, portd.Tags(a.Tags...))
	}
	if a.Metadata != nil {
		options = append(options, portd.Metadata(a.Metadata))
	}
	if a.Exact {
		options = append(options, portd.ExactPort(a.Port))
	}
	if a.Fallback == "ephemeral" {
		options = append(options, portd.OrEphemeral())
	}
	var short string
	var check portd.HealthCheck
	if len(a.Check) > 0 && json.Unmarshal(a.Check, &short) == nil {
		options = append(options, portd.Check(short))
	} else if len(a.Check) > 0 {
		if err := json.Unmarshal(a.Check, &check); err != nil {
			return nil, err
		}
		options = append(options, portd.CheckWith(check))
	}
	var announcement portd.Announcement
	if string(a.Announce) == "true" {
		options = append(options, portd.Announce())
	} else if len(a.Announce) > 0 && json.Unmarshal(a.Announce, &announcement) == nil {
		options = append(options, portd.AnnounceAs(announcement))
	}
	return options, nil
}

func lookupOptions(a arguments) []portd.LookupOption {
	options := []portd.LookupOption{portd.Endpoint(orElse(a.Endpoint, "main")), portd.Scope(a.Scope)}
	if a.Min > 0 || a.WaitS > 0 {
		options = append(options, portd.AtLeast(a.Min), portd.WaitFor(seconds(a.WaitS)))
	}
	if a.Tag != "" {
		options = append(options, portd.Tags(a.Tag))
	}
	return options
}

func shownLease(handle string, l *portd.Lease) object {
	now := l.Document()
	shown := object{"handle": handle, "lease": now.ID, "service": now.Service, "instance": now.Instance,
		"endpoint": now.Endpoint, "protocol": now.Protocol, "address": now.Address, "port": now.Port,
		"revision": now.Revision, "is_adopted": l.IsAdopted(), "is_fallback": l.IsFallback(), "is_passed": l.IsPassed()}
	if l.IsFallback() {
		shown["lease"] = nil
	}
	return shown
}

func shownInstance(one portd.Instance) object {
	return object{"host": one.Host, "port": one.Port, "instance": one.Name, "is_stale": one.IsStale}
}

func shownInstances(all []portd.Instance) []object {
	shown := make([]object, len(all))
	for i, one := range all {
		shown[i] = shownInstance(one)
	}
	return shown
}

// failure says what kind of error it is.
func failure(err error) object {
	made := object{"kind": "usage", "message": err.Error()}
	var problem *portd.Problem
	var unavailable *portd.DaemonUnavailable
	switch {
	case errors.As(err, &problem):
		made["kind"], made["code"], made["status"] = "problem", problem.Code, problem.Status
		if problem.Pointer != "" {
			made["pointer"] = problem.Pointer
		}
		if errors.Is(err, portd.ErrLeaseLost) {
			made["kind"] = "lease_lost"
		}
	case errors.Is(err, context.DeadlineExceeded):
		made["kind"] = "timeout"
	case errors.As(err, &unavailable):
		made["kind"], made["tried"] = "daemon_unavailable", tried(unavailable)
	case errors.Is(err, portd.ErrProtocol):
		made["kind"], made["tried"] = "daemon_unavailable", []string{}
	case errors.Is(err, portd.ErrPortTaken):
		made["kind"], made["code"], made["status"] = "problem", "port_taken", 409
	case errors.Is(err, portd.ErrNoInstances):
		made["kind"] = "no_instances"
	}
	return made
}

func tried(unavailable *portd.DaemonUnavailable) []string {
	places := make([]string, len(unavailable.Tried))
	for i, attempt := range unavailable.Tried {
		places[i] = attempt.URL
	}
	return places
}

func codeOf(err error) string {
	var problem *portd.Problem
	if errors.As(err, &problem) {
		return problem.Code
	}
	return ""
}

// remainsFor is how long what ends by itself may take: a closed connection's goroutines do not end in the same instant.
const remainsFor = 5 * time.Second

// remaining closes everything and counts the client's goroutines and the process' sockets that are left.
func (c *calls) remaining() (any, error) {
	c.close()
	left := count()
	for end := time.Now().Add(remainsFor); left > 0 && time.Now().Before(end); left = count() {
		runtime.Gosched()
	}
	return object{"remaining": left}, nil
}

// count leaves out the goroutine that handles signals: the driver started it itself.
func count() int {
	stacks := make([]byte, 1<<20)
	left := 0
	for _, stack := range strings.Split(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		ofClient := strings.Contains(stack, "clients/go.") && !strings.Contains(stack, "clients/go.ReleaseOnSignal")
		if ofClient || strings.Contains(stack, "net/http.") {
			left++
		}
	}
	descriptors, _ := filepath.Glob("/proc/self/fd/*")
	for _, descriptor := range descriptors {
		if target, err := os.Readlink(descriptor); err == nil && strings.HasPrefix(target, "socket:") {
			left++
		}
	}
	return left
}
