"""Unicast DNS for the instances of this host: `server.DnsServer` listens, `zone.Zone` knows the names."""
