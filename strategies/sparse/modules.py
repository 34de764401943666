"""
Embeddings whose rows live on servers: drop-ins for `nn.Embedding` and `nn.EmbeddingBag`.

    ids ──▶ unique ids ──▶ pull their rows ──▶ look up in these few rows ──▶ outputs
                                │                        │
                             servers ◀── one gradient per row, duplicates summed ── backward

No worker holds the table, and strategies do not handle it. The module's only parameter, `table`,
has no elements: its `requires_grad` says whether the rows are trained.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.shard_map import TableSpec


class RowSource(Protocol):
    """Source of a connected module's rows."""

    def rows(self, module: Sharded, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """
        Return rows of the module's table.

        Args:
            module: owner of the table.
            ids: shape [n], int64 on the CPU, unique.

        Returns:
            The rows, shape [n, embedding_dim], on the CPU: their gradient is sent to the servers.
            And the index of each id among the rows, shape [n]; None: rows are in the ids' order.
        """


class Sharded(nn.Module):
    """Base of both modules: the table's properties, and access to its rows."""

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        padding_idx: int | None = None,
        *,
        init_std: float = 1.0,
        whole: bool = False,
    ) -> None:
        super().__init__()
        self.num_embeddings, self.embedding_dim = num_embeddings, embedding_dim
        self.padding_idx, self.init_std, self.whole = padding_idx, init_std, whole
        self._check()
        if padding_idx is not None and padding_idx < 0:
            self.padding_idx = padding_idx + (num_embeddings or 0)
        self.source: RowSource | None = None  #: set by a run, or by `connect`
        self.table = nn.Parameter(torch.empty(0))

    def spec(self, name: str) -> TableSpec:
        """Return the specification of the table, for servers."""
        return TableSpec(name, self.num_embeddings, self.embedding_dim, self.init_std, self.whole)

    def _check(self) -> None:
        rows, padding = self.num_embeddings, self.padding_idx
        if rows is not None and rows < 1:
            raise ValueError(f"num_embeddings must be at least 1, or None, got {rows}")
        if self.embedding_dim < 1:
            raise ValueError(f"embedding_dim must be at least 1, got {self.embedding_dim}")
        if padding is not None:
            low, high = (-rows, rows) if rows else (0, 1 << 63)
            if not low <= padding < high:
                raise ValueError(f"padding_idx must be from {low} to {high - 1}, got {padding}")
        if not 0.0 <= self.init_std < float("inf"):
            raise ValueError(f"init_std must be finite and not negative, got {self.init_std}")
        if self.whole and rows is None:
            raise ValueError("whole=True needs num_embeddings")

    @property
    def trained(self) -> bool:
        """Whether a look-up now records gradients, as for `nn.Embedding`."""
        return torch.is_grad_enabled() and self.table.requires_grad

    @override
    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        """Save the module without `table`, which is empty."""
        super()._save_to_state_dict(destination, prefix, keep_vars)
        del destination[f"{prefix}table"]

    @override
    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any) -> None:
        """Load the module; a state dict has no `table`."""
        super()._load_from_state_dict({**state_dict, f"{prefix}table": self.table}, prefix, *args)

    def _look_up(self, ids: Tensor) -> tuple[Tensor, Tensor, int | None]:
        """Return the batch's rows, the index of each id among them, and of the padding."""
        if self.source is None:
            raise RuntimeError(
                "this embedding has no rows yet: they live on servers. Train with the job's "
                "`embeddings` field, or call distplat.nn.connect(model)"
            )
        if ids.dtype not in (torch.int64, torch.int32):
            raise TypeError(f"ids must be int64 or int32, got {ids.dtype}")
        unique, inverse = torch.unique(ids.detach().to("cpu", torch.int64), return_inverse=True)
        self._check_range(unique)
        rows, order = self.source.rows(self, unique)
        padding_id = -1 if self.padding_idx is None else self.padding_idx  # ids are never -1
        padding = (unique == padding_id).nonzero().flatten()
        if order is not None:
            inverse, padding = order[inverse], order[padding]
        return rows.to(ids.device), inverse.to(ids.device), int(padding) if len(padding) else None

    def _check_range(self, unique: Tensor) -> None:
        """Check that sorted ids are in range, by the first and the last."""
        if len(unique) == 0:
            return
        low, high = int(unique[0]), int(unique[-1])
        if low < 0 or (self.num_embeddings is not None and high >= self.num_embeddings):
            wrong = low if low < 0 else high
            allowed = f"0 to {self.num_embeddings - 1}" if self.num_embeddings else "0 and more"
            raise IndexError(f"id {wrong} is out of range: allowed are {allowed}")

    @override
    def extra_repr(self) -> str:
        """Return the same text as `nn.Embedding`."""
        padding = f", padding_idx={self.padding_idx}" if self.padding_idx is not None else ""
        return f"{self.num_embeddings}, {self.embedding_dim}{padding}"


class ShardedEmbedding(Sharded):
    """
    `nn.Embedding` with its rows on servers.

    Args:
        num_embeddings: number of rows, with ids from 0; None: any non-negative id.
        embedding_dim: elements of a row, float32.
        padding_idx: an id whose row is zero and stays zero.
        init_std: standard deviation of a row's initial values (torch's is 1).
        whole: create all rows at the start, in memory and in the saved table; otherwise a row is
            created by its first gradient.

    Raises:
        ValueError: an invalid argument.
    """

    @override
    def forward(self, ids: Tensor) -> Tensor:
        """Return the rows of ids: shape [...] -> [..., embedding_dim]."""
        rows, inverse, padding = self._look_up(ids)
        return nn.functional.embedding(inverse, rows, padding)


class ShardedEmbeddingBag(Sharded):
    """
    `nn.EmbeddingBag` with its rows on servers: sums, means or maxima over bags of ids.

    Args:
        num_embeddings: see `ShardedEmbedding`.
        embedding_dim: see there.
        mode: `sum`, `mean` or `max`.
        include_last_offset: whether `offsets` ends with the number of ids.
        padding_idx: an id that is left out of its bag.
        init_std: see there.
        whole: see there.

    Raises:
        ValueError: an invalid argument.
    """

    def __init__(
        self,
        num_embeddings: int | None,
        embedding_dim: int,
        mode: str = "mean",
        include_last_offset: bool = False,
        padding_idx: int | None = None,
        *,
        init_std: float = 1.0,
        whole: bool = False,
    ) -> None:
        super().__init__(num_embeddings, embedding_dim, padding_idx, init_std=init_std, whole=whole)
        if mode not in ("sum", "mean", "max"):
            raise ValueError(f"mode must be 'sum', 'mean' or 'max', got {mode!r}")
        self.mode, self.include_last_offset = mode, include_last_offset

    @override
    def forward(
        self, ids: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
    ) -> Tensor:
        """
        Reduce bags.

        Args:
            ids: shape [bags, ids of a bag], or [n] with `offsets`.
            offsets: shape [bags]: start of each bag in `ids`.
            per_sample_weights: shape of `ids`; only for `sum`.

        Returns:
            Shape [bags, embedding_dim].
        """
        rows, inverse, padding = self._look_up(ids)
        return nn.functional.embedding_bag(
            inverse,
            rows,
            offsets,
            mode=self.mode,
            per_sample_weights=per_sample_weights,
            include_last_offset=self.include_last_offset,
            padding_idx=padding,
        )


def dense_parameters(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Return the model's named parameters without those of embedding tables."""
    tables = {id(module.table) for module in tables_of(model).values()}
    return ((name, p) for name, p in model.named_parameters() if id(p) not in tables)


def tables_of(model: nn.Module) -> dict[str, Sharded]:
    """Return the sharded embeddings of a model by their paths, without duplicates."""
    return {name: m for name, m in model.named_modules() if isinstance(m, Sharded)}
