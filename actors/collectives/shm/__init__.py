"""Collective operations in shared memory, for ranks on one node."""
