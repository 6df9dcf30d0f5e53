// The calls of the daemon's API, each with its types. The calls about this process' own leases are methods of Lease.

package portd

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net/http"
	"net/url"
	"strconv"
	"strings"
	"time"
)

const (
	// silenceMax is how long a stream of events may be silent before it counts as dead: the daemon breaks it every 15 s.
	silenceMax = time.Minute
	// eventMaxBytes bounds one event: portd's own are about 1 KB.
	eventMaxBytes = 1 << 20
)

// A Request asks the API for a lease; only Service is required. What the options of Acquire say means the same here.
type Request struct {
	Service  string            `json:"service"`
	Instance string            `json:"instance,omitempty"`
	Endpoint string            `json:"endpoint,omitempty"`
	Protocol string            `json:"protocol,omitempty"`
	Address  string            `json:"address,omitempty"`
	Port     int               `json:"port,omitempty"`
	Exact    bool              `json:"exact,omitempty"`
	Adopt    bool              `json:"adopt,omitempty"`  // lease Port for the process that listens there now
	Offset   int               `json:"offset,omitempty"` // in GrantAll, not of its first: the first one's port plus this
	Pool     string            `json:"pool,omitempty"`
	Hold     string            `json:"hold,omitempty"`
	PID      int               `json:"pid,omitempty"` // the process that it belongs to; 0 is the caller
	TTL      float64           `json:"ttl,omitempty"` // seconds
	Tags     []string          `json:"tags,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Weight   *int              `json:"weight,omitempty"`
	Priority int               `json:"priority,omitempty"`
	Check    *HealthCheck      `json:"check,omitempty"`
	Announce any               `json:"announce,omitempty"` // true, or an Announcement
}

// A Change replaces fields of a lease; nil leaves one as it is.
type Change struct {
	Tags     []string          `json:"tags,omitempty"`
	Metadata map[string]string `json:"metadata,omitempty"`
	Weight   *int              `json:"weight,omitempty"`
	Check    *HealthCheck      `json:"check,omitempty"`
	Announce any               `json:"announce,omitempty"` // true, false, or an Announcement
}

// Filters narrow a list of leases; zero values do not.
type Filters struct {
	Service, Instance, Endpoint, Protocol, Pool, State string
	Health                                             Health
	Port, PID                                          int
	UID                                                *int
	Tag                                                string
}

// An Event says what happened to which lease.
type Event struct {
	Name     string    `json:"type"` // "granted", "bound", "health", "passed", "ended" and so on
	Revision int64     `json:"revision"`
	At       time.Time `json:"at"`
	Service  string    `json:"service"`
	Note     string    `json:"note"`
	Lease    Document  `json:"lease"`
}

// A PortView says who has a port, per the kernel and per the lease table.
type PortView struct {
	Port       int         `json:"port"`
	Protocol   string      `json:"protocol"`
	Verdict    string      `json:"verdict"` // "held", "bound", "conflict", "unmanaged", "taken", "cooling", "declined", "static", "free"
	Lease      *Document   `json:"lease"`
	LeftOverOf *Document   `json:"left_over_of"`
	Listeners  []PortOwner `json:"listeners"`
}

// A PortOwner is a socket on a port, and its process. What the kernel hides is left out.
type PortOwner struct {
	Address string   `json:"address"`
	Socket  string   `json:"socket"` // "listening", "bound", or "connected"
	PID     int      `json:"pid"`
	UID     *int     `json:"uid"`
	User    string   `json:"user"`
	Exe     string   `json:"exe"`
	Cmdline []string `json:"cmdline"`
	Unit    string   `json:"unit"`
}

// A ServiceSummary is a service's name, and how many of its instances are how.
type ServiceSummary struct {
	Name      string `json:"name"`
	Instances int    `json:"instances"`
	Passing   int    `json:"passing"`
	Warning   int    `json:"warning"`
	Critical  int    `json:"critical"`
	Unknown   int    `json:"unknown"`
}

// ServiceInstances are the instances of a service, as of a revision.
type ServiceInstances struct {
	Service   string     `json:"service"`
	Revision  int64      `json:"revision"`
	Instances []Document `json:"instances"`
}

// A LANService is a DNS-SD service that was seen on the LAN.
type LANService struct {
	Type      string            `json:"type"`
	Name      string            `json:"name"`
	Host      string            `json:"host"`
	Addresses []string          `json:"addresses"`
	Port      int               `json:"port"`
	TXT       map[string]string `json:"txt"`
	Ours      bool              `json:"ours"`
}

// A Host is one of the cluster.
type Host struct {
	Host      string    `json:"host"`
	Address   string    `json:"address"`
	Version   string    `json:"version"`
	Services  int       `json:"services"`
	Instances int       `json:"instances"`
	Seen      time.Time `json:"seen"`
	Self      bool      `json:"self"`
}

// Grant leases one port. The document carries the lease's token, this once.
func (c *Client) Grant(ctx context.Context, wanted Request) (granted Document, err error) {
	_, err = c.Call(ctx, "POST", "/v1/leases", wanted, &granted)
	return granted, err
}

// GrantAll leases several ports, all or none.
func (c *Client) GrantAll(ctx context.Context, wanted ...Request) (granted []Document, err error) {
	_, err = c.Call(ctx, "POST", "/v1/leases", wanted, &granted)
	return granted, err
}

// Leases returns all leases that match the filters.
func (c *Client) Leases(ctx context.Context, filters Filters) (found []Document, err error) {
	query := url.Values{}
	for name, text := range map[string]string{"service": filters.Service, "instance": filters.Instance,
		"endpoint": filters.Endpoint, "protocol": filters.Protocol, "pool": filters.Pool, "state": filters.State,
		"health": string(filters.Health), "tag": filters.Tag} {
		if text != "" {
			query.Set(name, text)
		}
	}
	for name, number := range map[string]int{"port": filters.Port, "pid": filters.PID} {
		if number != 0 {
			query.Set(name, strconv.Itoa(number))
		}
	}
	if filters.UID != nil {
		query.Set("uid", strconv.Itoa(*filters.UID))
	}
	for {
		var page struct {
			Leases []Document `json:"leases"`
			Next   *string    `json:"next"`
		}
		if _, err = c.Call(ctx, "GET", "/v1/leases?"+query.Encode(), nil, &page); err != nil {
			return nil, err
		}
		found = append(found, page.Leases...)
		if page.Next == nil {
			return found, nil
		}
		query.Set("cursor", *page.Next)
	}
}

// Lease returns one lease, an ended one too while the daemon remembers it; else ErrLeaseLost.
func (c *Client) Lease(ctx context.Context, id string) (found Document, err error) {
	_, err = c.Call(ctx, "GET", leasePath(id), nil, &found)
	return found, err
}

// Renew restarts the clock of a lease with a TTL; period is a new one, 0 keeps the last. Token is the lease's, or "".
func (c *Client) Renew(ctx context.Context, id string, period time.Duration, token string) (Document, error) {
	return c.changeLease(ctx, "POST", id, "/renew", renewal(period), token)
}

// Decline requests another port under the same lease: somebody else has this one.
func (c *Client) Decline(ctx context.Context, id, token string) (Document, error) {
	return c.changeLease(ctx, "POST", id, "/decline", nil, token)
}

// Drain takes an instance out of look-ups while it keeps its ports, or brings it back.
func (c *Client) Drain(ctx context.Context, id string, on bool, token string) (Document, error) {
	return c.changeLease(ctx, "POST", id, "/drain", map[string]bool{"drain": on}, token)
}

// Transfer hands a lease over to another process of this host.
func (c *Client) Transfer(ctx context.Context, id string, pid int, token string) (Document, error) {
	return c.changeLease(ctx, "POST", id, "/transfer", map[string]int{"pid": pid}, token)
}

// Change replaces a lease's tags, metadata, weight, check or announcement.
func (c *Client) Change(ctx context.Context, id string, fields Change, token string) (Document, error) {
	return c.changeLease(ctx, "PATCH", id, "", fields, token)
}

// Report reports health, for a lease whose check is "report".
func (c *Client) Report(ctx context.Context, id string, health Health, note, token string) (Document, error) {
	return c.changeLease(ctx, "PUT", id, "/health", map[string]string{"status": string(health), "note": note}, token)
}

// Release ends a lease; one that has ended stays so.
func (c *Client) Release(ctx context.Context, id, token string) error {
	_, err := c.call(ctx, request{method: "DELETE", path: leasePath(id), token: token}, nil)
	return err
}

func (c *Client) changeLease(ctx context.Context, method, id, what string, body any, token string) (now Document, err error) {
	_, err = c.call(ctx, request{method: method, path: leasePath(id) + what, body: body, token: token}, &now)
	return now, err
}

func renewal(period time.Duration) any {
	if period == 0 {
		return nil
	}
	return map[string]float64{"seconds": period.Seconds()}
}

// Ports returns every port of the host that is leased, static, cooling or listened on.
func (c *Client) Ports(ctx context.Context) ([]PortView, error) {
	var found struct{ Ports []PortView }
	_, err := c.Call(ctx, "GET", "/v1/ports", nil, &found)
	return found.Ports, err
}

// Port returns who has a port of a protocol, "tcp" or "udp".
func (c *Client) Port(ctx context.Context, protocol string, number int) (found PortView, err error) {
	_, err = c.Call(ctx, "GET", fmt.Sprintf("/v1/ports/%d?protocol=%s", number, url.QueryEscape(protocol)), nil, &found)
	return found, err
}

// History returns who had a port, newest first; a zero time is all of it.
func (c *Client) History(ctx context.Context, number int, at time.Time) ([]Document, error) {
	path := fmt.Sprintf("/v1/ports/%d/history", number)
	if !at.IsZero() {
		path += "?at=" + url.QueryEscape(at.UTC().Format(time.RFC3339Nano))
	}
	var found struct{ Leases []Document }
	_, err := c.Call(ctx, "GET", path, nil, &found)
	return found.Leases, err
}

// Services returns the services' names with counts by health.
func (c *Client) Services(ctx context.Context) (found []ServiceSummary, err error) {
	cursor := ""
	for {
		var page struct {
			Services []ServiceSummary `json:"services"`
			Next     *string          `json:"next"`
		}
		if _, err = c.Call(ctx, "GET", "/v1/services"+cursor, nil, &page); err != nil {
			return nil, err
		}
		found = append(found, page.Services...)
		if page.Next == nil {
			return found, nil
		}
		cursor = "?cursor=" + url.QueryEscape(*page.Next)
	}
}

// Service returns a service's instances, those that do not serve as well; Resolve and Watch return those that do.
func (c *Client) Service(ctx context.Context, name string, options ...LookupOption) (found ServiceInstances, err error) {
	q := questionOf(name, options)
	query := q.values()
	query.Del("passing")
	_, err = c.Call(ctx, "GET", "/v1/services/"+url.PathEscape(name)+"?"+query.Encode(), nil, &found)
	return found, err
}

// LAN returns the DNS-SD services seen on the LAN: of one type ("_http._tcp"), or all for "".
func (c *Client) LAN(ctx context.Context, kind string) ([]LANService, error) {
	path := "/v1/lan"
	if kind != "" {
		path += "?type=" + url.QueryEscape(kind)
	}
	var found struct{ Services []LANService }
	_, err := c.Call(ctx, "GET", path, nil, &found)
	return found.Services, err
}

// Hosts returns the hosts of the cluster.
func (c *Client) Hosts(ctx context.Context) (found []Host, err error) {
	_, err = c.Call(ctx, "GET", "/v1/hosts", nil, &found)
	return found, err
}

// Status returns the daemon's condition: version, pools, counts, warnings.
func (c *Client) Status(ctx context.Context) (found map[string]any, err error) {
	_, err = c.Call(ctx, "GET", "/v1/status", nil, &found)
	return found, err
}

// FromNow makes Events start with what happens next.
const FromNow int64 = -1

// Events calls each with every event after a revision (or FromNow), of one service or of all for "". It returns nil when
// each returns false, and otherwise why the stream ended: the context's error, a *Problem with the code "revision_gone" when
// the daemon does not keep what followed that revision (list again, then follow), ErrProtocol when the daemon closed it.
func (c *Client) Events(ctx context.Context, after int64, service string, each func(Event) bool) error {
	query := url.Values{}
	if after != FromNow {
		query.Set("after", strconv.FormatInt(after, 10))
	}
	if service != "" {
		query.Set("service", service)
	}
	streaming, cancel := context.WithCancel(ctx)
	defer cancel()
	silence := time.AfterFunc(silenceMax, cancel)
	defer silence.Stop()
	unavailable := &DaemonUnavailable{}
	for _, at := range c.candidates(nil) {
		response, err := at.send(streaming, request{method: "GET", path: "/v1/events?" + query.Encode(), token: c.token}, nil)
		if isRefusedConnection(err) && streaming.Err() == nil {
			unavailable.Tried = append(unavailable.Tried, Attempt{at.url, err})
			continue
		}
		if err == nil {
			defer response.Body.Close()
			err = readEvents(response, silence, each)
		}
		if ctx.Err() != nil {
			return fmt.Errorf("portd: events of %s: %w", at.url, ctx.Err())
		}
		if streaming.Err() != nil {
			return &DaemonUnavailable{[]Attempt{{at.url, noAnswer{silenceMax}}}}
		}
		return err
	}
	return unavailable
}

// readEvents reads server-sent events (WHATWG HTML, section 9.2.6) until each returns false.
func readEvents(response *http.Response, silence *time.Timer, each func(Event) bool) error {
	if response.StatusCode != http.StatusOK {
		body, err := io.ReadAll(io.LimitReader(response.Body, bodyMaxBytes))
		if err != nil {
			return fmt.Errorf("%w: %v", ErrProtocol, err)
		}
		return problemOf(response.StatusCode, body)
	}
	lines := bufio.NewScanner(response.Body)
	lines.Buffer(nil, eventMaxBytes)
	var data bytes.Buffer
	for lines.Scan() {
		silence.Reset(silenceMax)
		line := lines.Text()
		if field := strings.TrimPrefix(line, "data:"); field != line {
			data.WriteString(strings.TrimPrefix(field, " "))
		}
		if line != "" || data.Len() == 0 {
			continue
		}
		var event Event
		if err := json.Unmarshal(data.Bytes(), &event); err != nil {
			return fmt.Errorf("%w: an event that is not JSON: %v", ErrProtocol, err)
		}
		data.Reset()
		if !each(event) {
			return nil
		}
	}
	return fmt.Errorf("%w: the stream of events ended: %v", ErrProtocol, lines.Err())
}
