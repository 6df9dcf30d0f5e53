"""The lease engine: the only place where effects are ordered. It knows the core, and the world through its seams."""
