// Where a daemon may be: PORTD_URL, else the user's socket, the system's socket, loopback TCP.

package portd

import (
	"fmt"
	"net/http"
	"net/url"
	"path/filepath"
	"strconv"
	"strings"
)

const (
	systemSocket = "/run/portd/portd.sock"
	loopbackURL  = "http://127.0.0.1:7783"
)

// sessions is where systemd makes XDG_RUNTIME_DIR of each user with a session, or with lingering (pam_systemd(8)).
var sessions = "/run/user"

// An endpoint is one way to a daemon.
type endpoint struct {
	url              string // as PORTD_URL writes it
	path             string // of the unix socket; "" over TCP
	base             string // what a call's path is added to
	isTLS            bool
	runtimeDirectory string // where no setting named the endpoint: the directory that must be the user's alone
	http             *http.Client
}

// parseEndpoint reads a PORTD_URL: unix:///path/portd.sock, http://host:port or https://host:port.
func parseEndpoint(text string) (*endpoint, error) {
	if path := strings.TrimPrefix(text, "unix://"); path != text && strings.HasPrefix(path, "/") {
		return withClient(&endpoint{url: text, path: path, base: "http://localhost"}), nil
	}
	parsed, err := url.Parse(strings.TrimRight(text, "/"))
	if err == nil && (parsed.Scheme == "http" || parsed.Scheme == "https") && parsed.Hostname() != "" &&
		isPort(parsed.Port()) && *parsed == (url.URL{Scheme: parsed.Scheme, Host: parsed.Host}) {
		base := parsed.String()
		return withClient(&endpoint{url: base, base: base, isTLS: parsed.Scheme == "https"}), nil
	}
	return nil, fmt.Errorf("%w: %q: write unix:///path/portd.sock or http://host:port", ErrInvalidURL, text)
}

func isPort(text string) bool {
	number, err := strconv.ParseUint(text, 10, 16)
	return err == nil && number > 0
}

// withClient gives an endpoint an HTTP client that opens a connection a call: a daemon's restart between two calls is nothing
// to recover from, and no idle connection's goroutines outlive a call.
func withClient(e *endpoint) *endpoint {
	transport := &http.Transport{DisableKeepAlives: true, DisableCompression: true, DialContext: e.dial}
	e.http = &http.Client{Transport: transport, CheckRedirect: func(*http.Request, []*http.Request) error {
		return http.ErrUseLastResponse // portd redirects nobody: whatever does is not portd, and gets no token
	}}
	return e
}

// handoffPath returns the path of the handoff socket, the neighbour of the unix socket; "" where none leads there.
func (e *endpoint) handoffPath() string {
	if e.path == "" {
		return ""
	}
	return filepath.Join(filepath.Dir(e.path), "handoff.sock")
}

// endpoints lists where to look, best first.
func endpoints(getenv func(string) string, uid int) ([]*endpoint, error) {
	if text := getenv("PORTD_URL"); text != "" {
		given, err := parseEndpoint(text)
		return []*endpoint{given}, err
	}
	var found []*endpoint
	if runtime := getenv("XDG_RUNTIME_DIR"); runtime != "" {
		found = append(found, userEndpoint(runtime))
	} else { // cron, su, sudo, ssh without a session: the daemon may have been started in one, or just like this
		for _, runtime := range []string{filepath.Join(sessions, strconv.Itoa(uid)), standIn(getenv, uid)} {
			own := userEndpoint(runtime)
			own.runtimeDirectory = runtime
			found = append(found, own)
		}
	}
	for _, text := range []string{"unix://" + systemSocket, loopbackURL} {
		one, err := parseEndpoint(text)
		if err != nil {
			return nil, err
		}
		found = append(found, one)
	}
	return found, nil
}

// userEndpoint returns the user daemon's endpoint in a runtime directory (XDG Base Directory Specification).
func userEndpoint(runtime string) *endpoint {
	path := filepath.Join(runtime, "portd/portd.sock")
	return withClient(&endpoint{url: "unix://" + path, path: path, base: "http://localhost"})
}

// standIn returns the user's directory in the system's temporary directory, for hosts without /run/user/UID.
func standIn(getenv func(string) string, uid int) string {
	for _, name := range []string{"TMPDIR", "TEMP", "TMP"} {
		if temporary := getenv(name); temporary != "" {
			return filepath.Join(temporary, fmt.Sprintf("portd-runtime-%d", uid))
		}
	}
	return fmt.Sprintf("/tmp/portd-runtime-%d", uid)
}
