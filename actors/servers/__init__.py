"""Server manager, server nodes, task scheduler, and a worker's clients of them."""
