"""
Strategies: what workers compute and exchange.

Each strategy has two modules here: `ring.py` is the driver's half and does not import torch,
`ring_worker.py` is the worker's half.
"""
