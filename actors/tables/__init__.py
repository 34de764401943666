"""Embedding tables: the servers that keep their rows, and a worker's way to them."""
