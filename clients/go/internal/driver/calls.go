package main

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"net"
	"os"
	"time"

	portd "github.com/portd/portd/clients/go"
)

// arguments are those of all calls.
type arguments struct {
	URL      string            `json:"url"`
	Token    string            `json:"token"`
	TimeoutS float64           `json:"timeout_s"`
	Handle   string            `json:"handle"`
	Method   string            `json:"method"`
	Path     string            `json:"path"`
	Body     json.RawMessage   `json:"body"`
	Status   portd.Health      `json:"status"`
	Output   string            `json:"output"`
	Service  string            `json:"service"`
	Port     int               `json:"port"`
	Exact    bool              `json:"exact"`
	Instance string            `json:"instance"`
	Endpoint string            `json:"endpoint"`
	Protocol string            `json:"protocol"`
	Address  string            `json:"address"`
	Pool     string            `json:"pool"`
	TTL      float64           `json:"ttl"`
	Tags     []string          `json:"tags"`
	Metadata map[string]string `json:"metadata"`
	Check    json.RawMessage   `json:"check"`
	Announce json.RawMessage   `json:"announce"`
	DrainS   float64           `json:"drain_s"`
	Hold     string            `json:"hold"`
	Fallback string            `json:"fallback"`
	Backlog  int               `json:"backlog"`
	Tag      string            `json:"tag"`
	Scope    string            `json:"scope"`
	Min      int               `json:"min"`
	WaitS    float64           `json:"wait_s"`
	Seconds  float64           `json:"seconds"`
	PID      int               `json:"pid"`
	Fields   portd.Change      `json:"fields"`
	After    int64             `json:"after"`
	Name     string            `json:"name"`
}

// holding is a lease with what listens on it.
type holding struct {
	lease   *portd.Lease
	closing []interface{ Close() error }
}

// calls are those of one driver, and what they left open.
type calls struct {
	out     *lines
	client  *portd.Client
	stop    func()
	leases  map[string]*holding
	watches map[string]func()
	made    int
}

func (c *calls) connectByEnvironment(name string) (err error) {
	if c.client == nil && name != "connect" {
		c.client, err = portd.NewClient(portd.Config{})
	}
	return err
}

func (c *calls) connect(ctx context.Context, a arguments) (any, error) {
	client, err := portd.NewClient(portd.Config{URL: a.URL, Token: a.Token, Timeout: seconds(a.TimeoutS)})
	if err != nil {
		return nil, err
	}
	c.client = client
	_, err = client.Call(ctx, "GET", "/v1/leases?limit=1", nil, nil)
	return object{"url": client.URL()}, err
}

func (c *calls) call(ctx context.Context, a arguments) (any, error) {
	var body, result any
	if len(a.Body) > 0 {
		body = a.Body
	}
	status, err := c.client.Call(ctx, a.Method, a.Path, body, &result)
	var problem *portd.Problem
	if errors.As(err, &problem) {
		return object{"status": problem.Status, "body": problem}, nil
	}
	return object{"status": status, "body": result}, err
}

func (c *calls) lease(ctx context.Context, a arguments) (any, error) {
	handle, held, err := c.acquire(ctx, a)
	if err != nil {
		return nil, err
	}
	return shownLease(handle, held.lease), nil
}

// listen acquires a lease first, unless the arguments name one.
func (c *calls) listen(ctx context.Context, a arguments) (any, error) {
	handle, held, err := a.Handle, c.leases[a.Handle], error(nil)
	if held == nil {
		handle, held, err = c.acquire(ctx, a)
	}
	if err != nil {
		return nil, err
	}
	err = held.listen(ctx)
	if err != nil && a.Handle == "" {
		delete(c.leases, handle)
		held.close()
	}
	return shownLease(handle, held.lease), err
}

func (c *calls) acquire(ctx context.Context, a arguments) (string, *holding, error) {
	c.made++
	handle := fmt.Sprintf("l%d", c.made)
	options, err := leaseOptions(a)
	if err != nil {
		return "", nil, err
	}
	options = append(options, portd.OnChange(func(l *portd.Lease) {
		c.out.tell(object{"event": "changed", "handle": handle, "port": l.Port(), "lease": l.ID()})
	}), portd.OnLost(func(l *portd.Lease, err error) {
		c.out.tell(object{"event": "lost", "handle": handle, "code": codeOf(err)})
	}))
	lease, err := c.client.Acquire(ctx, a.Service, options...)
	if err != nil {
		return "", nil, err
	}
	held := &holding{lease: lease}
	c.leases[handle] = held
	return handle, held, nil
}

// listen opens what the protocol has, and greets whoever connects.
func (h *holding) listen(ctx context.Context) error {
	protocol := h.lease.Document().Protocol
	if protocol != "udp" {
		listener, err := h.lease.Listen(ctx)
		if err != nil {
			return err
		}
		h.closing = append(h.closing, listener)
		go greet(listener)
	}
	if protocol != "tcp" {
		conn, err := h.lease.ListenPacket(ctx)
		if err != nil {
			return err
		}
		h.closing = append(h.closing, conn)
	}
	return nil
}

func (h *holding) close() {
	for _, one := range h.closing {
		one.Close()
	}
	h.lease.Close()
}

func greet(listener net.Listener) {
	for {
		caller, err := listener.Accept()
		if err != nil {
			return
		}
		fmt.Fprintln(caller, os.Args[1])
		caller.Close()
	}
}

func (c *calls) onLease(ctx context.Context, name string, a arguments) error {
	held := c.leases[a.Handle]
	if held == nil {
		return fmt.Errorf("%s: there is no lease %q", name, a.Handle)
	}
	switch name {
	case "renew":
		return held.lease.Renew(ctx, seconds(a.Seconds))
	case "release":
		held.close()
		return nil
	case "drain":
		return held.lease.Drain(ctx, true)
	case "transfer":
		return held.lease.Transfer(ctx, a.PID)
	case "change":
		return held.lease.Change(ctx, a.Fields)
	case "report":
		return held.lease.Report(ctx, a.Status, a.Output)
	}
	return fmt.Errorf("there is no call %q", name)
}

func (c *calls) decline(ctx context.Context, a arguments) (any, error) {
	held := c.leases[a.Handle]
	if err := held.lease.Decline(ctx); err != nil {
		return nil, err
	}
	return shownLease(a.Handle, held.lease), nil
}

// events returns the first event after a revision that has the wanted name.
func (c *calls) events(ctx context.Context, a arguments) (any, error) {
	var found any
	err := c.client.Events(ctx, a.After, a.Service, func(event portd.Event) bool {
		if event.Name != a.Name {
			return true
		}
		found = object{"name": event.Name, "revision": event.Revision, "lease": event.Lease.ID}
		return false
	})
	return found, err
}

func (c *calls) resolve(ctx context.Context, a arguments) (any, error) {
	found, err := c.client.Resolve(ctx, a.Service, lookupOptions(a)...)
	if err != nil {
		return nil, err
	}
	return shownInstance(found), nil
}

func (c *calls) resolveAll(ctx context.Context, a arguments) (any, error) {
	found, err := c.client.ResolveAll(ctx, a.Service, lookupOptions(a)...)
	return object{"instances": shownInstances(found)}, err
}

// watch answers once the first update has come: what went wrong until then is the call's error.
func (c *calls) watch(ctx context.Context, a arguments) (any, error) {
	c.made++
	handle := fmt.Sprintf("w%d", c.made)
	ctx, cancel := context.WithCancel(ctx)
	updates := c.client.Watch(ctx, a.Service, lookupOptions(a)...)
	first := <-updates
	if first.Err != nil {
		cancel()
		return nil, first.Err
	}
	ended := make(chan struct{})
	go func() {
		defer close(ended)
		c.tellInstances(handle, first)
		for update := range updates {
			c.tellInstances(handle, update)
		}
	}()
	c.watches[handle] = func() {
		cancel()
		<-ended
	}
	return object{"handle": handle}, nil
}

func (c *calls) tellInstances(handle string, update portd.Update) {
	if update.Err != nil {
		c.out.tell(object{"event": "warning", "message": update.Err.Error()})
		return
	}
	isStale := false
	for _, one := range update.Instances {
		isStale = isStale || one.IsStale
	}
	c.out.tell(object{"event": "instances", "handle": handle, "is_stale": isStale,
		"instances": shownInstances(update.Instances)})
}

func (c *calls) unwatch(handle string) error {
	stop := c.watches[handle]
	if stop == nil {
		return fmt.Errorf("there is no watch %q", handle)
	}
	stop()
	delete(c.watches, handle)
	return nil
}

func (c *calls) close() {
	for handle := range c.watches {
		_ = c.unwatch(handle)
	}
	for handle, held := range c.leases {
		held.close()
		delete(c.leases, handle)
	}
}

func seconds(number float64) time.Duration {
	return time.Duration(number * float64(time.Second))
}

func orElse(text, otherwise string) string {
	if text == "" {
		return otherwise
	}
	return text
}
