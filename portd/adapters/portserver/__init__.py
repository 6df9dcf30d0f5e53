"""The port servers of test frameworks: portpicker's over a unix socket, gRPC's over HTTP."""
