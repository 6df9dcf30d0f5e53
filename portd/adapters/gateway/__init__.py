"""The gateway: a reverse proxy that serves leases under names below `.localhost`, in a process of its own."""
