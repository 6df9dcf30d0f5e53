package portd_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log"
	"net/http"
	"time"

	portd "github.com/portd/portd/clients/go"
)

func ExampleListen() {
	listener, err := portd.Listen(context.Background(), "hello", portd.Check("http:/healthz"))
	if err != nil {
		log.Fatal(err)
	}
	defer listener.Close()
	go http.Serve(listener, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		io.WriteString(w, "hello")
	}))

	response, err := http.Get("http://" + listener.Addr().String())
	if err != nil {
		log.Fatal(err)
	}
	defer response.Body.Close()
	body, _ := io.ReadAll(response.Body)
	fmt.Printf("%s from %s", body, listener.Lease().Instance())
	// Output: hello from hello-1
}

func ExampleResolve() {
	_, err := portd.Resolve(context.Background(), "billing", portd.Tags("eu"))
	if errors.Is(err, portd.ErrNoInstances) {
		fmt.Println("nobody bills now")
	}
	// Output: nobody bills now
}

func ExampleWatch() {
	ctx, cancel := context.WithCancel(context.Background())
	defer cancel()
	for update := range portd.Watch(ctx, "workers") {
		if update.Err != nil {
			log.Fatal(update.Err)
		}
		fmt.Println(len(update.Instances), "work now")
		cancel() // enough for an example
	}
	// Output: 0 work now
}

func ExampleLease_Report() {
	ctx := context.Background()
	listener, err := portd.Listen(ctx, "reporter", portd.CheckWith(portd.HealthCheck{Kind: "report", TTL: time.Minute}))
	if err != nil {
		log.Fatal(err)
	}
	defer listener.Close()
	if err := listener.Lease().Report(ctx, portd.Warning, "the queue is long"); err != nil {
		log.Fatal(err)
	}
	fmt.Println(listener.Lease().Document().Health)
	// Output: warning
}
