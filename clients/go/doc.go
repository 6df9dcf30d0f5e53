// Package portd is the client of portd, a daemon that leases the ports of a host and knows who has which.
//
// A service asks for a listener instead of a port number:
//
//	listener, err := portd.Listen(ctx, "orders", portd.Check("http:/healthz"))
//	if err != nil {
//		log.Fatal(err)
//	}
//	defer listener.Close()
//	log.Print(http.Serve(listener, handler))
//
// and whoever looks for it asks for the service:
//
//	orders, err := portd.Resolve(ctx, "orders")
//	response, err := http.Get("http://" + orders.Addr() + "/")
//
// The functions of the package speak to the daemon that the environment names; a [Client] speaks to any. Every call ends
// when its context does. The context of a call bounds that call alone: a lease lives until it is closed, or the process
// ends. All types are safe for concurrent use.
package portd
