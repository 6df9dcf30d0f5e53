"""portd leases ports to the processes of a host, and ends a lease the moment its process exits."""

__version__ = "0.1.0"
