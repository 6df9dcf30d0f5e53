// Where a daemon may be: PORTD_URL, else the user's socket, the system's socket, loopback TCP; and the way there.

package portd

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
)

const (
	systemSocket = "/run/portd/portd.sock"
	loopbackURL  = "http://127.0.0.1:7783"
)

// A place is one way to a daemon.
type place struct {
	url  string // as PORTD_URL writes it
	path string // of the unix socket; "" over TCP
	base string // what a call's path is added to
	http *http.Client
}

// parsePlace reads a PORTD_URL: unix:///path/portd.sock, http://host:port or https://host:port.
func parsePlace(text string) (*place, error) {
	if path := strings.TrimPrefix(text, "unix://"); path != text && strings.HasPrefix(path, "/") {
		return &place{url: text, path: path, base: "http://localhost", http: oneCallEach(path)}, nil
	}
	parsed, err := url.Parse(strings.TrimRight(text, "/"))
	if err == nil && (parsed.Scheme == "http" || parsed.Scheme == "https") && parsed.Hostname() != "" &&
		isPort(parsed.Port()) && *parsed == (url.URL{Scheme: parsed.Scheme, Host: parsed.Host}) {
		base := parsed.String()
		return &place{url: base, base: base, http: oneCallEach("")}, nil
	}
	return nil, fmt.Errorf("%w: %q: write unix:///path/portd.sock or http://host:port", ErrInvalidURL, text)
}

func isPort(text string) bool {
	number, err := strconv.ParseUint(text, 10, 16)
	return err == nil && number > 0
}

// oneCallEach makes a client that opens a connection a call: a daemon's restart between two calls is nothing to recover
// from, and no idle connection's goroutines outlive a call.
func oneCallEach(unixPath string) *http.Client {
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true}
	if unixPath != "" {
		var dialer net.Dialer
		transport.DialContext = func(ctx context.Context, _, _ string) (net.Conn, error) {
			return dialer.DialContext(ctx, "unix", unixPath)
		}
	}
	return &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // portd redirects nobody: whatever does is not portd, and gets no token
	}}
}

// handoffPath returns the path of the handoff socket, the neighbour of the unix socket; "" where none leads there.
func (p *place) handoffPath() string {
	if p.path == "" {
		return ""
	}
	return filepath.Join(filepath.Dir(p.path), "handoff.sock")
}

// places lists where to look, best first.
func places(getenv func(string) string, uid int) ([]*place, error) {
	if text := getenv("PORTD_URL"); text != "" {
		given, err := parsePlace(text)
		return []*place{given}, err
	}
	var found []*place
	for _, text := range append(userURL(getenv, uid), "unix://"+systemSocket, loopbackURL) {
		one, err := parsePlace(text)
		if err != nil {
			return nil, err
		}
		found = append(found, one)
	}
	return found, nil
}

// userURL returns the URL of the user daemon (XDG Base Directory Specification), or none where somebody else's directory
// stands for it: anybody can make one under the temporary directory, and pose as portd.
func userURL(getenv func(string) string, uid int) []string {
	runtime := getenv("XDG_RUNTIME_DIR")
	if runtime == "" {
		temporary := "/tmp"
		for _, name := range []string{"TMP", "TEMP", "TMPDIR"} {
			if value := getenv(name); value != "" {
				temporary = value
			}
		}
		runtime = filepath.Join(temporary, fmt.Sprintf("portd-runtime-%d", uid))
		if info, err := os.Stat(runtime); err == nil && info.Sys().(*syscall.Stat_t).Uid != uint32(uid) {
			return nil
		}
	}
	return []string{"unix://" + filepath.Join(runtime, "portd/portd.sock")}
}
