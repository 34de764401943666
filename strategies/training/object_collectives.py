"""Bytes between ranks, for what is no tensor: each rank may bring another number of them."""

import torch

from distplat.strategies.collective import Collective


def broadcast_bytes(data: bytes, source: int, group: Collective, device: torch.device) -> bytes:
    """
    Give every rank the source's bytes.

    Args:
        data: looked at on rank `source` only.
        source: a rank.
        group: all ranks; each calls this.
        device: of the tensors that carry them; the group's backend must take it.

    Raises:
        CollectiveError: a rank is missing.
    """
    length = torch.tensor([len(data)], device=device)
    group.broadcast(length, source)
    text = torch.zeros(int(length), dtype=torch.uint8, device=device)
    if group.rank == source:
        text.copy_(_tensor(data))
    group.broadcast(text, source)
    return bytes(text.cpu().numpy())


def gather_bytes(data: bytes, group: Collective, device: torch.device) -> list[bytes]:
    """
    Give every rank the bytes of all, in rank order.

    Raises:
        CollectiveError: a rank is missing.
    """
    lengths = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(group.world)]
    group.all_gather(lengths, torch.tensor([len(data)], device=device))
    # Of one size, that of the longest: not every backend gathers uneven tensors quickly.
    longest = max(int(length) for length in lengths)
    mine = torch.zeros(longest, dtype=torch.uint8, device=device)
    mine[: len(data)].copy_(_tensor(data))
    texts = [torch.zeros_like(mine) for _ in range(group.world)]
    group.all_gather(texts, mine)
    pairs = zip(texts, lengths, strict=True)
    return [bytes(text[: int(length)].cpu().numpy()) for text, length in pairs]


def _tensor(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.zeros(0)
