package portd

import (
	"errors"
	"reflect"
	"testing"
)

// environ is an environment of these variables alone.
func environ(pairs map[string]string) func(string) string {
	return func(name string) string { return pairs[name] }
}

func urls(t *testing.T, pairs map[string]string, uid int) (found []string) {
	t.Helper()
	for _, one := range must[[]*endpoint](t)(endpoints(environ(pairs), uid)) {
		found = append(found, one.url)
	}
	return found
}

func TestADaemonIsLookedForWhereTheContractSaysAndInThisOrder(t *testing.T) {
	system := []string{"unix:///run/portd/portd.sock", "http://127.0.0.1:7783"}
	directory := t.TempDir()
	for _, one := range []struct {
		why     string
		environ map[string]string
		want    []string
	}{
		{"PORTD_URL alone", map[string]string{"PORTD_URL": "http://127.0.0.1:1", "XDG_RUNTIME_DIR": "/x"}, []string{"http://127.0.0.1:1"}},
		{"the user's", map[string]string{"XDG_RUNTIME_DIR": "/run/user/7"}, append([]string{"unix:///run/user/7/portd/portd.sock"}, system...)},
		{"without a session", map[string]string{"TMPDIR": directory, "TMP": "/y"}, append([]string{"unix:///run/user/7/portd/portd.sock",
			"unix://" + directory + "/portd-runtime-7/portd/portd.sock"}, system...)},
	} {
		if found := urls(t, one.environ, 7); !reflect.DeepEqual(found, one.want) {
			t.Errorf("%s: %v", one.why, found)
		}
	}
}

func TestAURLIsReadOrRefused(t *testing.T) {
	for text, handoff := range map[string]string{
		"unix:///run/x/portd.sock": "/run/x/handoff.sock", "http://localhost:7783": "", "http://[::1]:80/": "", "https://a.example:443": "",
	} {
		if found := must[*endpoint](t)(parseEndpoint(text)); found.handoffPath() != handoff {
			t.Errorf("%s hands over at %q", text, found.handoffPath())
		}
	}
	for _, text := range []string{"", "portd", "unix://portd.sock", "http://localhost", "http://:80", "http://a:0", "http://a:65536",
		"http://a:80/path", "http://user@a:80", "http://a:80?q", "ftp://a:80", "http://a b:80"} {
		if _, err := parseEndpoint(text); !errors.Is(err, ErrInvalidURL) {
			t.Errorf("%q is taken for a URL", text)
		}
	}
	if _, err := NewClient(Config{URL: "nonsense"}); !errors.Is(err, ErrInvalidURL) {
		t.Errorf("%v", err)
	}
}

func TestATokenOfALeaseIsNotShownForOtherCalls(t *testing.T) {
	t.Setenv("PORTD_TOKEN", "secret")
	if c := newClient(t, Config{}); c.token != "secret" {
		t.Errorf("PORTD_TOKEN is not taken, but %q", c.token)
	}
	t.Setenv("PORTD_LEASE", "some")
	if c := newClient(t, Config{}); c.token != "" {
		t.Errorf("the token of `portd run`'s lease is taken")
	}
}
