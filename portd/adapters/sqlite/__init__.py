"""The durable memory, in one SQLite file."""
