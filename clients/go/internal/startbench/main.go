// Command startbench shows what a leased listener adds to a program's start. With "portd" it leases a port and listens, with
// "bare" it listens on port 0; either way it prints the milliseconds that took and the memory that the process has then:
// {"ms": 1.9, "rss_kib": 7412}. The memory is the process' resident set, the Go runtime's included.
package main

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"log"
	"net"
	"os"
	"time"

	portd "github.com/portd/portd/clients/go"
)

func main() {
	listen, isMode := map[string]func() (io.Closer, error){
		"bare":  func() (io.Closer, error) { return net.Listen("tcp4", "127.0.0.1:0") },
		"portd": func() (io.Closer, error) { return portd.Listen(context.Background(), "startbench") },
	}[os.Args[len(os.Args)-1]]
	if !isMode {
		log.Fatal("usage: startbench bare|portd")
	}
	before := time.Now()
	listener, err := listen()
	took := time.Since(before)
	if err != nil {
		log.Fatal(err)
	}
	defer listener.Close()
	resident, err := residentKiB()
	if err != nil {
		log.Fatal(err)
	}
	report := map[string]any{"ms": float64(took.Microseconds()) / 1000, "rss_kib": resident}
	if err := json.NewEncoder(os.Stdout).Encode(report); err != nil {
		log.Fatal(err)
	}
}

// residentKiB reads the resident set (proc_pid_statm(5)).
func residentKiB() (int, error) {
	statm, err := os.ReadFile("/proc/self/statm")
	if err != nil {
		return 0, err
	}
	var size, resident int
	_, err = fmt.Sscan(string(statm), &size, &resident)
	return resident * os.Getpagesize() / 1024, err
}
