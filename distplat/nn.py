"""Modules for a task's model: embeddings whose rows are stored on servers (docs/embeddings.md)."""

from distplat.strategies.sparse.modules import ShardedEmbedding, ShardedEmbeddingBag
from distplat.strategies.sparse.saved import connect

__all__ = ["ShardedEmbedding", "ShardedEmbeddingBag", "connect"]
