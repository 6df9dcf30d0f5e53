"""The pure core: what a lease is and what may happen to it. No await, no I/O, no clock, no randomness."""
