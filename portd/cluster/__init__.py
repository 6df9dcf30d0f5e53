"""Several hosts: what this one publishes, and what it knows of the others. Pure: no etcd, no clock, no I/O."""
