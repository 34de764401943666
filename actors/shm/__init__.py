"""Collective operations of ranks on one node, which exchange through shared memory."""
