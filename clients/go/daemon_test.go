// Real daemons for the tests. PORTD_COMMAND says how to start one, in words between spaces; without it `portd` does.

package portd

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"
)

const deadline = 20 * time.Second // for what must happen: far more than anything takes

// The ports of these tests: 150 from PORTD_TEST_PORT on, which whoever starts them has claimed.
var (
	firstPort  = portNumber(orElse(os.Getenv("PORTD_TEST_PORT"), "25800"))
	sharedPool = fmt.Sprintf("%d-%d", firstPort, firstPort+89)
	sharedHTTP = fmt.Sprintf("127.0.0.1:%d", firstPort+99)
	ownPool    = fmt.Sprintf("%d-%d", firstPort+100, firstPort+149)
)

var shared *daemon // of the tests that do not end it, each with service names of its own

func portNumber(text string) int {
	port, err := strconv.Atoi(text)
	if err != nil {
		log.Fatal(err)
	}
	return port
}

func TestMain(m *testing.M) {
	if what := os.Getenv("PORTD_TEST_PROGRAM"); what != "" {
		programs[what]()
		return
	}
	os.Exit(runAll(m))
}

func runAll(m *testing.M) int {
	directory, err := os.MkdirTemp("", "portd-go-")
	if err != nil {
		log.Fatal(err)
	}
	defer os.RemoveAll(directory)
	shared = newDaemon(directory, sharedPool, sharedHTTP)
	if err := shared.run(); err != nil {
		log.Fatal(err)
	}
	defer shared.end(syscall.SIGTERM)
	os.Setenv("PORTD_URL", shared.url)
	return m.Run()
}

// A daemon is started and ended as often as a test wants; its state stays in its directory.
type daemon struct {
	directory string
	url       string
	process   *exec.Cmd
	output    *bytes.Buffer
}

func newDaemon(directory, pool, http string) *daemon {
	d := &daemon{directory: directory, url: "unix://" + directory + "/portd.sock"}
	config := fmt.Sprintf(`
[listen]
socket = "%[1]s/portd.sock"
handoff = "%[1]s/handoff.sock"
http = "%[3]s"
[store]
path = "%[1]s/portd.db"
[pools.default]
ranges = ["%[2]s"]
[leases]
cooldown = 0
[mdns]
enabled = false
[dns]
listen = ""
`, directory, pool, http)
	if err := os.WriteFile(directory+"/portd.toml", []byte(config), 0o600); err != nil {
		log.Fatal(err)
	}
	return d
}

// ownDaemon is a running daemon for one test alone, and a client of it that looks after leases at a quick pace.
func ownDaemon(t *testing.T) (*daemon, *Client) {
	t.Helper()
	d := newDaemon(t.TempDir(), ownPool, "")
	d.start(t)
	t.Cleanup(func() { d.end(syscall.SIGKILL) })
	return d, d.client(t)
}

func (d *daemon) client(t *testing.T) *Client {
	t.Helper()
	return newClient(t, Config{URL: d.url})
}

func newClient(t *testing.T, config Config) *Client {
	t.Helper()
	c, err := NewClient(config)
	if err != nil {
		t.Fatal(err)
	}
	c.checkEvery, c.wait = 50*time.Millisecond, 50*time.Millisecond
	return c
}

func portdWords(words ...string) []string {
	return append(strings.Fields(orElse(os.Getenv("PORTD_COMMAND"), "portd")), words...)
}

// run starts the daemon and waits until it answers.
func (d *daemon) run() error {
	words := portdWords("serve", "--config", d.directory+"/portd.toml")
	d.process, d.output = exec.Command(words[0], words[1:]...), &bytes.Buffer{}
	d.process.Stdout, d.process.Stderr = d.output, d.output
	if err := d.process.Start(); err != nil {
		return err
	}
	c, err := NewClient(Config{URL: d.url})
	if err != nil {
		return err
	}
	for end := time.Now().Add(deadline); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if _, err = c.Call(context.Background(), "GET", "/v1/status", nil, nil); err == nil {
			return nil
		}
	}
	d.end(syscall.SIGKILL)
	return fmt.Errorf("the daemon does not answer: %v\n%s", err, d.output)
}

func (d *daemon) start(t *testing.T) {
	t.Helper()
	if err := d.run(); err != nil {
		t.Fatal(err)
	}
}

// end ends the daemon; nothing happens when it does not run.
func (d *daemon) end(number syscall.Signal) {
	if d.process != nil {
		_ = d.process.Process.Signal(number)
		_ = d.process.Wait()
		d.process = nil
	}
}

// forget removes the state of a daemon that does not run, as if its disk had been lost.
func (d *daemon) forget(t *testing.T) {
	t.Helper()
	files, _ := filepath.Glob(d.directory + "/portd.db*")
	for _, file := range files {
		if err := os.Remove(file); err != nil {
			t.Fatal(err)
		}
	}
}

// lease asks for what the daemon knows of a lease.
func (d *daemon) lease(t *testing.T, id string) Document {
	t.Helper()
	var found Document
	if _, err := d.client(t).Call(context.Background(), "GET", leasePath(id), nil, &found); err != nil {
		t.Fatal(err)
	}
	return found
}

// waitFor asks until the answer is true.
func waitFor(t *testing.T, what string, isTrue func() bool) {
	t.Helper()
	for end := time.Now().Add(deadline); !isTrue(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			t.Fatalf("not within %v: %s", deadline, what)
		}
	}
}

func must[T any](t *testing.T) func(T, error) T {
	return func(value T, err error) T {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
		return value
	}
}

// bounded is a context that ends when the test's patience does.
func bounded(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), deadline)
	t.Cleanup(cancel)
	return ctx
}

// leavesNothing fails a test that leaves a goroutine of the client, or a socket.
func leavesNothing(t *testing.T) {
	before := len(openSockets())
	t.Cleanup(func() {
		waitFor(t, "no goroutine of the client is left", func() bool { return len(goroutines()) == 0 })
		waitFor(t, "no socket is left", func() bool { return len(openSockets()) <= before })
	})
}

// goroutines are those of the client, and of HTTP calls that it made.
func goroutines() (left []string) {
	stacks := make([]byte, 1<<20)
	for _, stack := range strings.Split(string(stacks[:runtime.Stack(stacks, true)]), "\n\n") {
		isOurs := strings.Contains(stack, "clients/go.") || strings.Contains(stack, "net/http.(*persistConn)")
		if isOurs && !strings.Contains(stack, "testing.") && !strings.Contains(stack, "TestMain") {
			left = append(left, stack)
		}
	}
	return left
}

func openSockets() (left []string) {
	descriptors, _ := filepath.Glob("/proc/self/fd/*")
	for _, descriptor := range descriptors {
		if target, err := os.Readlink(descriptor); err == nil && strings.HasPrefix(target, "socket:") {
			left = append(left, descriptor)
		}
	}
	return left
}

// occupy listens on a port until the test ends.
func occupy(t *testing.T, address string, port int) {
	t.Helper()
	var made sockets
	if err := made.bind(bounded(t), "tcp", address, port); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(made.close)
}

// foreign has another process listen on a port until the test ends: this process' own listeners are leased back.
func foreign(t *testing.T, address string, port int) {
	t.Helper()
	code := fmt.Sprintf("import socket, sys; s = socket.create_server((%q, %d)); print(flush=True); sys.stdin.read()", address, port)
	process := exec.Command("python3", "-c", code)
	input := must[io.WriteCloser](t)(process.StdinPipe())
	output := must[io.ReadCloser](t)(process.StdoutPipe())
	if err := process.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		input.Close()
		_ = process.Wait()
	})
	if _, err := output.Read(make([]byte, 1)); err != nil {
		t.Fatal(err)
	}
}

// asProblem returns the refusal that an error is.
func asProblem(t *testing.T, err error) *Problem {
	t.Helper()
	var problem *Problem
	if !errors.As(err, &problem) {
		t.Fatalf("no refusal: %v", err)
	}
	return problem
}
