"""etcd as the engine of the cluster: `gateway` speaks to one member, `session` keeps publisher and view up to date."""
