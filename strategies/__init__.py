"""
What is computed and exchanged.

A strategy is two modules here: `ring.py` is what the driver knows of it, without torch, and
`ring_worker.py` what a worker runs.
"""
