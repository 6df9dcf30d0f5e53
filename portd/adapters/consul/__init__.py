"""The subset of Consul's HTTP API that its real clients use, in Consul's own shapes, codes and headers."""
