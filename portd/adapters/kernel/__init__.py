"""Linux: holds, processes, peers and the socket table, as the kernel reports them."""
