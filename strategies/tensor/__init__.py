"""Tensor parallel: parts of a module's parameters on each rank of a group (Shoeybi et al. 2019)."""
