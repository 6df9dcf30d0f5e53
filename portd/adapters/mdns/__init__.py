"""Announcing and browsing over multicast DNS (RFC 6762, RFC 6763): by ourselves, or through a running avahi-daemon."""
