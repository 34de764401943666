"""Groups of ranks that implement the port `Collective`: shared memory, gloo, NCCL, two levels."""
