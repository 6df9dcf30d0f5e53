// Small programs that the tests start as processes of their own: this test's binary, with PORTD_TEST_PROGRAM set.

package portd

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log"
	"os"
	"os/exec"
	"os/signal"
	"strings"
	"syscall"
	"testing"
)

var programs = map[string]func(){
	// "minds nothing" has its lease given back at a signal.
	"minds nothing": func() {
		ReleaseOnSignal()
		say(listenOrDie("ending").Lease().ID())
		select {}
	},
	// "minds signals" asks for the signal itself, too.
	"minds signals": func() {
		came := make(chan os.Signal, 2)
		signal.Notify(came, syscall.SIGTERM)
		ReleaseOnSignal(syscall.SIGTERM)
		say(listenOrDie("minding").Lease().ID())
		<-came
		say("mine")
	},
	// "takes it back" is as if it had never asked.
	"takes it back": func() {
		ReleaseOnSignal()()
		say(listenOrDie("unminding").Lease().ID())
		select {}
	},
	// "offspring" is not the service that `portd run` leased for.
	"offspring": func() {
		listener := listenOrDie("offspring")
		defer listener.Close()
		say(fmt.Sprint(listener.Lease().IsAdopted(), listener.Addr().String() == fmt.Sprintf("127.0.0.1:%d", listener.Lease().Port())))
	},
	// "adopter" is.
	"adopter": func() {
		listener := listenOrDie("adopter")
		defer listener.Close()
		l := listener.Lease()
		say(fmt.Sprint(l.ID() == os.Getenv("PORTD_LEASE"), l.IsAdopted(), l.IsPassed(),
			listener.Addr().String() == "127.0.0.1:"+os.Getenv("PORT")))
	},
}

func listenOrDie(service string) *Listener {
	listener, err := Listen(context.Background(), service)
	if err != nil {
		log.Fatal(err)
	}
	return listener
}

func say(line string) { fmt.Println(line) }

// A program is one of them, running.
type program struct {
	*exec.Cmd
	output *bufio.Reader
}

// startProgram starts a program of the map; words before it start it (`portd run … --`).
func startProgram(t *testing.T, name string, before ...string) *program {
	t.Helper()
	words := append(before, os.Args[0])
	p := &program{Cmd: exec.Command(words[0], words[1:]...)}
	p.Env = append(os.Environ(), "PORTD_TEST_PROGRAM="+name)
	p.Stderr = os.Stderr
	p.output = bufio.NewReader(must[io.ReadCloser](t)(p.StdoutPipe()))
	if err := p.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		p.Process.Kill()
		p.Wait()
	})
	return p
}

func (p *program) line(t *testing.T) string {
	t.Helper()
	return strings.TrimSpace(must[string](t)(p.output.ReadString('\n')))
}

// endedBy waits for its end and returns the signal that it died of; 0 for an end of its own.
func (p *program) endedBy() syscall.Signal {
	p.Wait()
	status := p.ProcessState.Sys().(syscall.WaitStatus)
	if !status.Signaled() {
		return 0
	}
	return status.Signal()
}

func TestAProgramThatMindsNoSignalsGivesBackAndDiesOfTheSignal(t *testing.T) {
	for _, number := range []syscall.Signal{syscall.SIGTERM, syscall.SIGINT} {
		p := startProgram(t, "minds nothing")
		id := p.line(t)
		p.Process.Signal(number)
		if by := p.endedBy(); by != number {
			t.Errorf("it died of %v, not of %v", by, number)
		}
		if now := shared.lease(t, id); now.EndedBecause != "released" {
			t.Errorf("its lease is %s: %s", now.State, now.EndedBecause)
		}
	}
}

func TestAProgramThatMindsItsSignalsDecidesItsOwnEnd(t *testing.T) {
	p := startProgram(t, "minds signals")
	p.line(t)
	p.Process.Signal(syscall.SIGTERM)
	if word := p.line(t); word != "mine" {
		t.Errorf("it said %q", word)
	}
	if by := p.endedBy(); by != 0 {
		t.Errorf("it died of %v", by)
	}
}

func TestTakenBackASignalEndsAProgramAsEver(t *testing.T) {
	p := startProgram(t, "takes it back")
	id := p.line(t)
	p.Process.Signal(syscall.SIGTERM)
	if by := p.endedBy(); by != syscall.SIGTERM {
		t.Errorf("it died of %v", by)
	}
	waitFor(t, "the daemon sees that its owner is gone", func() bool {
		return shared.lease(t, id).EndedBecause == "owner_exited"
	})
}

func TestThePassedSocketOfPortdRunIsAdopted(t *testing.T) {
	p := startProgram(t, "adopter", portdWords("run", "adopter", "--socket", "--")...)
	if said := p.line(t); said != "true true true true" {
		t.Errorf("is it the lease, adopted, passed, on the port: %s", said)
	}
}

func TestThePassedSocketOfAnotherServiceIsLeftAlone(t *testing.T) {
	p := startProgram(t, "offspring", portdWords("run", "parent", "--socket", "--")...)
	if said := p.line(t); said != "false true" {
		t.Errorf("is it adopted, is it on its own port: %s", said)
	}
}
