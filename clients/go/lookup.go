// Looking other services up: one instance at a time, or all changes as they come. The last answer is kept for a
// while, so that a daemon that restarts takes nobody's neighbours away; what comes from memory says so.

package portd

import (
	"context"
	"errors"
	"fmt"
	"hash/maphash"
	"net"
	"net/url"
	"reflect"
	"strconv"
	"strings"
	"time"
)

const (
	// staleMax is how long an answer is good for while no daemon answers; ports of living processes do not change by then.
	staleMax = 5 * time.Minute
	// longPoll is how long the daemon may hold an answer back: proxies cut what is silent for a minute.
	longPoll = 55 * time.Second
	// lanPoll is that of a look-up on the LAN too: the daemon is woken by changes of its own leases alone.
	lanPoll = 5 * time.Second
	// atOnce asks for what is, instead of what comes after a revision.
	atOnce = -1
)

// An Instance is one instance of a service that serves.
type Instance struct {
	Name     string // of the instance: "orders-1"
	Host     string // to connect to
	Port     int
	Tags     []string
	Metadata map[string]string
	Document Document // all of the lease
	IsStale  bool     // the daemon is away, and this is what it said last
}

// Addr returns host:port, as net.Dial and URLs take it.
func (i Instance) Addr() string { return net.JoinHostPort(i.Host, strconv.Itoa(i.Port)) }

// An Update is what a Watch has to say.
type Update struct {
	Instances []Instance // all that serve now, perhaps none
	Err       error      // why the watch ended; nil as long as it goes on
}

// A question is what a look-up asks; tags are one a line.
type question struct {
	service, endpoint, tags, scope string
	min                            int
	wait                           time.Duration
}

// An answer is the instances of a service as of a revision, and when it was given.
type answer struct {
	Revision  int64      `json:"revision"`
	Instances []Document `json:"instances"`
	at        time.Time
	store     string
}

// Resolve returns one instance that serves, at random by weight; ErrNoInstances where there is none.
func Resolve(ctx context.Context, service string, options ...LookupOption) (Instance, error) {
	c, err := ofEnvironment()
	if err != nil {
		return Instance{}, err
	}
	return c.Resolve(ctx, service, options...)
}

// ResolveAll returns all instances that serve, perhaps none.
func ResolveAll(ctx context.Context, service string, options ...LookupOption) ([]Instance, error) {
	c, err := ofEnvironment()
	if err != nil {
		return nil, err
	}
	return c.ResolveAll(ctx, service, options...)
}

// Watch sends the instances that serve at once, and again whenever they change, until ctx is done: then the channel is closed.
// Once the daemon has answered, its absence is waited out. What ends the watch before ctx does is the last Update's Err.
func Watch(ctx context.Context, service string, options ...LookupOption) <-chan Update {
	c, err := ofEnvironment()
	if err != nil {
		updates := make(chan Update, 1)
		updates <- Update{Err: err}
		close(updates)
		return updates
	}
	return c.Watch(ctx, service, options...)
}

// Resolve is the package's Resolve, with this client.
func (c *Client) Resolve(ctx context.Context, service string, options ...LookupOption) (Instance, error) {
	found, err := c.ResolveAll(ctx, service, options...)
	if err != nil {
		return Instance{}, err
	}
	if len(found) == 0 {
		return Instance{}, fmt.Errorf("%w: of %s", ErrNoInstances, service)
	}
	return pick(found), nil
}

// pick chooses one as RFC 2782 chooses a server: the lowest priority first, there at random by weight.
func pick(instances []Instance) Instance {
	lowest := instances[0].Document.Priority
	for _, one := range instances {
		if one.Document.Priority < lowest {
			lowest = one.Document.Priority
		}
	}
	var group []Instance
	total := 0
	for _, one := range instances {
		if one.Document.Priority == lowest {
			group = append(group, one)
			total += one.Document.weight()
		}
	}
	if total == 0 {
		return group[int(random()*float64(len(group)))]
	}
	rest := random() * float64(total)
	for _, one := range group {
		if rest -= float64(one.Document.weight()); rest < 0 {
			return one
		}
	}
	return group[len(group)-1]
}

// ResolveAll is the package's ResolveAll, with this client.
func (c *Client) ResolveAll(ctx context.Context, service string, options ...LookupOption) ([]Instance, error) {
	q := questionOf(service, options)
	key := q
	key.min, key.wait = 0, 0
	found, err := c.ask(ctx, q, answer{Revision: atOnce})
	c.mu.Lock()
	defer c.mu.Unlock()
	isStale := err != nil
	if isStale {
		remembered, isKnown := c.answers[key]
		if !isKnown || !isAway(err) || time.Since(remembered.at) >= staleMax {
			return nil, err
		}
		found = remembered
	} else {
		c.answers[key] = found
	}
	if len(found.Instances) < q.min {
		return nil, fmt.Errorf("%w: %d of %d instances of %s", ErrNoInstances, len(found.Instances), q.min, service)
	}
	return instances(found, isStale), nil
}

// Watch is the package's Watch, with this client.
func (c *Client) Watch(ctx context.Context, service string, options ...LookupOption) <-chan Update {
	updates := make(chan Update)
	go func() {
		defer close(updates)
		err := c.follow(ctx, questionOf(service, options), updates)
		if ctx.Err() == nil {
			send(ctx, updates, Update{Err: err})
		}
	}()
	return updates
}

// follow sends what changes until it can't; it returns why.
func (c *Client) follow(ctx context.Context, q question, updates chan<- Update) error {
	var known answer
	isKnown, after := false, answer{Revision: atOnce}
	for ctx.Err() == nil {
		newer, err := c.ask(ctx, q, after)
		var problem *Problem
		isGone := errors.As(err, &problem) && problem.Code == "revision_gone"
		if err != nil && isKnown && (isGone || isAway(err)) {
			after = answer{Revision: atOnce} // another store counts anew: request what is, then compare
			if !isGone {
				pause(ctx, c.wait)
			}
			continue
		}
		if err != nil {
			return err
		}
		if !isKnown || !reflect.DeepEqual(shown(newer), shown(known)) {
			send(ctx, updates, Update{Instances: instances(newer, false)})
		}
		known, isKnown, after = newer, true, newer
	}
	return ctx.Err()
}

func send(ctx context.Context, updates chan<- Update, update Update) {
	select {
	case updates <- update:
	case <-ctx.Done():
	}
}

func pause(ctx context.Context, long time.Duration) {
	timer := time.NewTimer(long)
	defer timer.Stop()
	select {
	case <-timer.C:
	case <-ctx.Done():
	}
}

// ask requests what is (Revision atOnce), or waits until there is something after an answer.
func (c *Client) ask(ctx context.Context, q question, after answer) (answer, error) {
	query := q.values()
	wanted := request{method: "GET"}
	switch {
	case after.Revision != atOnce:
		wanted.wait = q.poll()
		revision := strconv.FormatInt(after.Revision, 10)
		if after.store != "" {
			revision = after.store + ":" + revision
		}
		query.Set("after", revision)
	case q.wait > 0 && q.min > 0:
		wanted.wait = q.wait
		query.Set("min", strconv.Itoa(q.min))
	}
	if wanted.wait > 0 {
		query.Set("wait", strconv.FormatFloat(wanted.wait.Seconds(), 'f', -1, 64))
	}
	wanted.path = "/v1/services/" + url.PathEscape(q.service) + "?" + query.Encode()
	found := answer{at: time.Now()}
	answered, err := c.call(ctx, wanted, &found)
	found.store = answered.store
	return found, err
}

// values returns the query of a look-up.
func (q question) values() url.Values {
	query := url.Values{"passing": {"true"}, "endpoint": {q.endpoint}}
	if q.tags != "" {
		query["tag"] = strings.Split(q.tags, "\n")
	}
	if q.scope != "" {
		query.Set("scope", q.scope)
	}
	return query
}

func (q question) poll() time.Duration {
	if q.scope == "lan" || q.scope == "all" {
		return lanPoll
	}
	return longPoll
}

// random is a number from 0 up to 1. The seed of a maphash is another one each time and in each process, unlike that of
// math/rand before Go 1.20, by which all processes would choose alike.
func random() float64 {
	return float64(new(maphash.Hash).Sum64()>>11) / (1 << 53)
}

func questionOf(service string, options []LookupOption) question {
	q := question{service: service, endpoint: "main"}
	for _, option := range options {
		option.applyToLookup(&q)
	}
	if q.wait > 0 && q.min == 0 {
		q.min = 1
	}
	return q
}

func instances(of answer, isStale bool) []Instance {
	made := make([]Instance, len(of.Instances))
	for i, document := range of.Instances {
		made[i] = Instance{Name: document.Instance, Host: reachable(document.Address), Port: document.Port,
			Tags: document.Tags, Metadata: document.Metadata, Document: document, IsStale: isStale}
	}
	return made
}

// reachable returns the address that reaches a listener of this host: a wildcard listens on loopback as well.
func reachable(address string) string {
	switch address {
	case "0.0.0.0":
		return "127.0.0.1"
	case "::":
		return "::1"
	}
	return address
}

// shown is what a watcher cares about: who is where, and what it says about itself.
func shown(of answer) []Document {
	kept := make([]Document, len(of.Instances))
	for i, one := range of.Instances {
		kept[i] = Document{ID: one.ID, Address: one.Address, Port: one.Port, Tags: one.Tags, Metadata: one.Metadata, Weight: one.Weight}
	}
	return kept
}
