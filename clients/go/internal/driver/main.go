// Command driver does what the conformance suite's cases say, with the Go client. Its protocol is in
// clients/conformance/README.md: a call a line comes in, an answer or an event a line goes out.
package main

import (
	"bufio"
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"os"
	"strings"
	"sync"

	portd "github.com/portd/portd/clients/go"
)

// lineMaxBytes bounds a call: a lease with all the metadata that it may have.
const lineMaxBytes = 1 << 20

type object map[string]any

// lines writes a line at a time, whoever has something to say.
type lines struct {
	mu sync.Mutex
	to io.Writer
}

func (l *lines) tell(message object) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err := json.NewEncoder(l.to).Encode(message); err != nil {
		os.Exit(1) // nobody listens any more
	}
}

// Write takes what the client logs.
func (l *lines) Write(text []byte) (int, error) {
	l.tell(object{"event": "warning", "message": strings.TrimSpace(string(text))})
	return len(text), nil
}

func main() {
	out := &lines{to: os.Stdout}
	log.SetFlags(0)
	log.SetOutput(out)
	made := &calls{out: out, stop: portd.ReleaseOnSignal(), leases: map[string]*holding{}, watches: map[string]func(){}}
	read := bufio.NewScanner(os.Stdin)
	read.Buffer(nil, lineMaxBytes)
	for read.Scan() {
		var call struct {
			ID   int             `json:"id"`
			Call string          `json:"call"`
			With json.RawMessage `json:"with"`
		}
		if err := json.Unmarshal(read.Bytes(), &call); err != nil {
			log.Fatalf("not a call: %v", err)
		}
		result, err := made.do(context.Background(), call.Call, call.With)
		if err != nil {
			out.tell(object{"id": call.ID, "error": failure(err)})
			continue
		}
		if result == nil {
			result = object{}
		}
		out.tell(object{"id": call.ID, "result": result})
	}
	made.close()
	made.stop()
}

// do makes one call.
func (c *calls) do(ctx context.Context, name string, with json.RawMessage) (any, error) {
	var a arguments
	if len(with) > 0 {
		if err := json.Unmarshal(with, &a); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if err := c.connectByEnvironment(name); err != nil {
		return nil, err
	}
	switch name {
	case "connect":
		return c.connect(ctx, a)
	case "lease":
		return c.lease(ctx, a)
	case "listen":
		return c.listen(ctx, a)
	case "call":
		return c.call(ctx, a)
	case "decline":
		return c.decline(ctx, a)
	case "events":
		return c.events(ctx, a)
	case "resolve":
		return c.resolve(ctx, a)
	case "resolve_all":
		return c.resolveAll(ctx, a)
	case "watch":
		return c.watch(ctx, a)
	case "unwatch":
		return nil, c.unwatch(a.Handle)
	case "close":
		return c.remaining()
	}
	return nil, c.onLease(ctx, name, a)
}
