"""The server group: its manager, its nodes, and a worker's way to them."""
