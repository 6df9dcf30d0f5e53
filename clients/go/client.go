// The way to the daemon's HTTP API: one call, one connection, bounded by its context. It must not know what calls mean.

package portd

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"sync"
	"time"
)

const (
	// callTimeout bounds a call whose context has no earlier end: twice what the daemon itself gives its disk.
	callTimeout = 10 * time.Second
	// bodyMaxBytes bounds an answer: 10,000 leases are about 10 MB.
	bodyMaxBytes = 64 << 20
)

// A Config says which daemon to speak to. Its zero value is the environment's.
type Config struct {
	URL     string        // as in PORTD_URL; "" looks where the contract says
	Token   string        // a bearer token; "" takes PORTD_TOKEN, unless that belongs to the lease of PORTD_LEASE
	Timeout time.Duration // of one call; 0 is 10 seconds
}

// A Client speaks to one daemon, the first that answers.
type Client struct {
	token      string
	timeout    time.Duration
	checkEvery time.Duration
	wait       time.Duration // before the next try, while no daemon answers

	mu        sync.Mutex
	endpoints []*endpoint // the one that answered last comes first
	answers   map[question]answer
}

// NewClient makes a client. It opens nothing yet; the error is an ErrInvalidURL.
func NewClient(config Config) (*Client, error) {
	c := &Client{token: config.Token, timeout: config.Timeout, checkEvery: checkEvery, wait: retryAfter,
		answers: map[question]answer{}}
	if c.token == "" && os.Getenv("PORTD_LEASE") == "" {
		c.token = os.Getenv("PORTD_TOKEN")
	}
	if c.timeout == 0 {
		c.timeout = callTimeout
	}
	getenv := os.Getenv
	if config.URL != "" {
		getenv = func(string) string { return config.URL }
	}
	var err error
	c.endpoints, err = endpoints(getenv, os.Geteuid())
	return c, err
}

var (
	environment     *Client
	errEnvironment  error
	readEnvironment sync.Once
)

// ofEnvironment returns the client of the package's functions, made when the first of them is called.
func ofEnvironment() (*Client, error) {
	readEnvironment.Do(func() { environment, errEnvironment = NewClient(Config{}) })
	return environment, errEnvironment
}

// URL returns where the daemon was found last, or is looked for first, as PORTD_URL writes it.
func (c *Client) URL() string {
	return c.candidates(nil)[0].url
}

// Call makes any call of the API: body is sent as JSON (nil: none), the answer is decoded into result (nil: dropped).
// It returns the answer's HTTP status, and a *Problem where the daemon refuses.
func (c *Client) Call(ctx context.Context, method, path string, body, result any) (int, error) {
	answered, err := c.call(ctx, request{method: method, path: path, body: body}, result)
	return answered.status, err
}

// A request is one call of the API.
type request struct {
	method string
	path   string // with its query
	body   any
	token  string        // the lease's own; "" takes the client's
	wait   time.Duration // that the daemon may take beyond the timeout, in a long poll
	at     *endpoint     // nil: wherever a daemon answers
}

// A reply says who answered, and how.
type reply struct {
	status int
	at     *endpoint
	store  string // the id of the daemon's database, made with it; "" where it names none
}

// call makes a call at the first endpoint that can be connected to.
func (c *Client) call(ctx context.Context, r request, result any) (reply, error) {
	var data []byte
	if r.body != nil {
		var err error
		if data, err = json.Marshal(r.body); err != nil {
			return reply{}, fmt.Errorf("portd: %w", err)
		}
	}
	if r.token == "" {
		r.token = c.token
	}
	limited, cancel := context.WithTimeout(ctx, c.timeout+r.wait)
	defer cancel()
	unavailable := &DaemonUnavailable{}
	for _, at := range c.candidates(r.at) {
		response, body, err := at.exchange(limited, r, data)
		if err != nil && ctx.Err() != nil {
			return reply{}, fmt.Errorf("portd: %s %s at %s: %w", r.method, r.path, at.url, ctx.Err())
		}
		if err != nil && limited.Err() != nil {
			late := Attempt{at.url, noAnswer{c.timeout + r.wait}}
			return reply{}, &DaemonUnavailable{append(unavailable.Tried, late)}
		}
		if isRefusedConnection(err) {
			unavailable.Tried = append(unavailable.Tried, Attempt{at.url, err})
			continue
		}
		c.prefer(at)
		if err != nil {
			return reply{}, fmt.Errorf("%w: %s: %v", ErrProtocol, at.url, err)
		}
		return reply{response.StatusCode, at, response.Header.Get("X-Portd-Store")}, understand(at, response.StatusCode, body, result)
	}
	return reply{}, unavailable
}

// exchange sends a request and reads the whole answer.
func (e *endpoint) exchange(ctx context.Context, r request, data []byte) (*http.Response, []byte, error) {
	response, err := e.send(ctx, r, data)
	if err != nil {
		return nil, nil, err
	}
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(response.Body, bodyMaxBytes+1))
	if err == nil && len(body) > bodyMaxBytes {
		err = fmt.Errorf("the answer is longer than %d bytes", bodyMaxBytes)
	}
	return response, body, err
}

// send sends a request and returns when the head of the answer is there.
func (e *endpoint) send(ctx context.Context, r request, data []byte) (*http.Response, error) {
	sent, err := http.NewRequestWithContext(ctx, r.method, e.base+r.path, bytes.NewReader(data))
	if err != nil {
		return nil, err
	}
	if data != nil {
		sent.Header.Set("Content-Type", "application/json")
	}
	if r.token != "" {
		sent.Header.Set("Authorization", "Bearer "+r.token)
	}
	return e.http.Do(sent)
}

func understand(at *endpoint, status int, body []byte, result any) error {
	if status >= 400 {
		return problemOf(status, body)
	}
	if result == nil || len(body) == 0 {
		return nil
	}
	if err := json.Unmarshal(body, result); err != nil {
		return fmt.Errorf("%w: %s: the answer is not the JSON that it should be: %v", ErrProtocol, at.url, err)
	}
	return nil
}

// isRefusedConnection reports whether nobody was reached at all, so that the next endpoint may be tried.
func isRefusedConnection(err error) bool {
	var operation *net.OpError
	return errors.As(err, &operation) && operation.Op == "dial"
}

func (c *Client) candidates(pinned *endpoint) []*endpoint {
	if pinned != nil {
		return []*endpoint{pinned}
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	return append([]*endpoint(nil), c.endpoints...)
}

// prefer puts an endpoint first, for it answered.
func (c *Client) prefer(answered *endpoint) {
	c.mu.Lock()
	defer c.mu.Unlock()
	reordered := []*endpoint{answered}
	for _, one := range c.endpoints {
		if one != answered {
			reordered = append(reordered, one)
		}
	}
	c.endpoints = reordered
}
