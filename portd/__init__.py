"""portd leases ports to the processes of a host, and takes them back the moment a process is gone."""

__version__ = "0.1.0"
