"""
A character language model: a small GPT that reads the Python standard library.

The model is the pre-norm decoder of GPT-2 (Radford et al. 2019). The text is the source code of
some modules of the standard library, so no download is needed.
"""

from __future__ import annotations

import math
import sysconfig
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat.strategies.task import Task
from distplat.strategies.tensor.parallel_plan import HeadLayout

MODULES = (
    "argparse ast bdb calendar codecs configparser contextlib csv dataclasses difflib dis enum "
    "fractions ftplib functools gettext heapq imaplib inspect ipaddress mailbox optparse os pdb "
    "pickle pprint random shutil smtplib socket statistics subprocess tarfile tempfile textwrap "
    "threading tokenize traceback uuid weakref"
).split()
FIRST, LAST = ord(" "), ord("~")
NEWLINE = LAST - FIRST + 1
OTHER = NEWLINE + 1
VOCABULARY = OTHER + 1
EVAL_PART = 0.1


class CharLM(Task):
    """Predict the next character of Python source code."""

    def __init__(
        self,
        block: int = 64,
        layers: int = 4,
        width: int = 128,
        heads: int = 4,
        dropout: float = 0.0,
        tied_embeddings: bool = False,
    ) -> None:
        """
        Initialize the task with the `task_args` of the job file.

        Args:
            block: context length in characters.
            layers: transformer blocks.
            width: features of a character inside the model.
            heads: attention heads of each block.
            dropout: probability of dropping a feature in training.
            tied_embeddings: use the same matrix for the embedding and the head.

        Raises:
            ValueError: the width is not divisible by the number of heads.
        """
        if width % heads:
            raise ValueError(f"width {width} is not divisible by {heads} heads")
        self.block, self.layers, self.width, self.heads = block, layers, width, heads
        self.dropout, self.tied_embeddings = dropout, tied_embeddings

    def model(self) -> nn.Module:
        embedding = Embedding(self.block, self.width, self.dropout)
        head = nn.Linear(self.width, VOCABULARY, bias=False)
        if self.tied_embeddings:
            head.weight = embedding.token.weight
        blocks = [Block(self.width, self.heads, self.dropout) for _ in range(self.layers)]
        return nn.Sequential(embedding, *blocks, nn.LayerNorm(self.width), head)

    def stages(self, model: nn.Module) -> list[nn.Module]:
        if self.tied_embeddings:
            raise NotImplementedError("tied embeddings: the first and the last layer are one")
        return list(model.children())

    def train_data(self) -> Windows:
        return Windows(_text()[0], self.block)

    def eval_data(self) -> Windows:
        return Windows(_text()[1], self.block)

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten())

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"bits_per_char": self.loss(outputs, targets) / math.log(2)}

    def unigram_entropy(self) -> float:
        """Return the entropy of the unigram distribution of the training text, in nats."""
        counts = torch.bincount(_text()[0], minlength=VOCABULARY).double()
        return float(torch.special.entr(counts / counts.sum()).sum())


class Windows(Dataset[tuple[Tensor, Tensor]]):
    """A text split into windows of `block` characters; the targets are the next characters."""

    def __init__(self, text: Tensor, block: int) -> None:
        self.text, self.block = text, block

    def __len__(self) -> int:
        return (len(self.text) - 1) // self.block

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        if not 0 <= index < len(self):
            raise IndexError(index)
        window = self.text[index * self.block :][: self.block + 1]
        return window[:-1], window[1:]


class Embedding(nn.Module):
    """Token embedding plus position embedding."""

    def __init__(self, block: int, width: int, dropout: float) -> None:
        super().__init__()
        self.token = nn.Embedding(VOCABULARY, width)
        self.position = nn.Parameter(torch.empty(block, width))
        self.dropout = nn.Dropout(dropout)
        for weight in (self.token.weight, self.position):
            nn.init.normal_(weight, std=0.02)

    def forward(self, characters: Tensor) -> Tensor:
        features: Tensor = self.token(characters) + self.position[: characters.shape[1]]
        features = self.dropout(features)
        return features


class Block(nn.Module):
    """One layer of the transformer: attention to earlier characters, then an MLP."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention = nn.Sequential(nn.LayerNorm(width), Attention(width, heads, dropout))
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )
        self.dropout = nn.Dropout(dropout)

    def forward(self, features: Tensor) -> Tensor:
        features = features + self.dropout(self.attention(features))
        features = features + self.dropout(self.mlp(features))
        return features


class Attention(nn.Module):
    """Causal self-attention with several heads."""

    head_layout = HeadLayout(inwards={"inwards": "3 heads features"}, outwards="outwards")

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads, self.dropout = heads, dropout
        self.inwards = nn.Linear(width, 3 * width)
        self.outwards = nn.Linear(width, width)

    def forward(self, features: Tensor) -> Tensor:
        """[batch, block, width] -> the same shape."""
        split = self.inwards(features).unflatten(-1, (3, self.heads, -1))
        query, key, value = split.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(
            query, key, value, dropout_p=self.dropout if self.training else 0.0, is_causal=True
        )
        out: Tensor = self.outwards(mixed.transpose(1, 2).flatten(2))
        return out


def _text() -> tuple[Tensor, Tensor]:
    """Return the modules' text as character ids: the training part and the held-out tail."""
    folder = Path(sysconfig.get_paths()["stdlib"])
    parts = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
    code_points = np.frombuffer("".join(parts).encode("utf-32-le"), dtype="<u4")
    codes = torch.from_numpy(code_points.astype(np.int64))
    text = torch.where((codes >= FIRST) & (codes <= LAST), codes - FIRST, OTHER)
    text[codes == ord("\n")] = NEWLINE
    cut = round(len(text) * (1 - EVAL_PART))
    return text[:cut], text[cut:]
