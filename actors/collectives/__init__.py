"""Implementations of the port `Collective`: shared memory, gloo, NCCL and hierarchical groups."""
