"""Samples of different lengths."""

from typing import Any

import torch
from torch.utils.data import Dataset

WORDS = 11


class Sentences(Dataset[Any]):
    """
    Sentences of 1 to 9 words, each word with a class.

    Args:
        samples: number of sentences.
    """

    def __init__(self, samples: int) -> None:
        generator = torch.Generator().manual_seed(0)
        lengths = torch.randint(1, 10, (samples,), generator=generator).tolist()
        self.words = [torch.randint(1, WORDS, (n,), generator=generator) for n in lengths]

    def __len__(self) -> int:
        return len(self.words)

    def __getitem__(self, index: int) -> Any:
        words = self.words[index]
        return words, words % 3
