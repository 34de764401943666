"""The port `Collective`, and groups of ranks on gloo, NCCL, or both of memory and gloo."""
