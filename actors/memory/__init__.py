"""Memory shared by the processes of a node, and signals between these processes."""
