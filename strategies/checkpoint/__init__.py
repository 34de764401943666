"""Checkpoint parts of a rank, loading of checkpoints, and synchronization of ranks."""
