"""Linux: holds, processes, peers, the socket table. Everything here asks the kernel, and believes nobody else."""
