"""
A causal language model like those of Hugging Face: batches are dicts, and the model returns a loss.

The samples are lines of Python's standard library, of any length; they are padded to the longest of
a micro-batch. Any model with the same interface may replace `GPT`:

    transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=98, n_layer=2, ...))
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset, Subset

from distplat import Task

MODULES = (
    "argparse ast calendar configparser csv dataclasses difflib enum inspect ipaddress".split()
)
FIRST, LAST = ord(" "), ord("~")
VOCABULARY = LAST - FIRST + 3
"""The printable characters, one for all others, and the end of a line."""
END = VOCABULARY - 1
IGNORED = -100
"""Label of padding, as in Hugging Face and torch's cross entropy."""


class CausalLM(Task):
    """Predict the next character of a line of Python."""

    def __init__(
        self, longest: int = 64, layers: int = 2, width: int = 64, heads: int = 4, lines: int = 4000
    ) -> None:
        """
        Initialize the task with the `task_args` of the job file.

        Args:
            longest: maximum number of characters of a line, including its end.
            layers: transformer blocks.
            width: features of a character inside the model.
            heads: attention heads of each block.
            lines: samples; every tenth is held out for evaluation.
        """
        self.longest, self.layers, self.width, self.heads = longest, layers, width, heads
        self.lines = lines

    def model(self) -> nn.Module:
        return GPT(self.longest, self.layers, self.width, self.heads)

    def train_data(self) -> Dataset[Any]:
        return self._data(held_out=False)

    def eval_data(self) -> Dataset[Any]:
        return self._data(held_out=True)

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        ids = pad_sequence(samples, batch_first=True)
        labels = pad_sequence(samples, batch_first=True, padding_value=IGNORED)
        return {"input_ids": ids, "attention_mask": (labels != IGNORED).long(), "labels": labels}

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        predicted = (
            batch["labels"][:, 1:] != IGNORED
        ).sum()  # the first character of a line is not predicted
        return outputs["loss"] * predicted, predicted

    def metrics(self, outputs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
        predicted, labels = outputs["logits"][:, :-1].argmax(-1), batch["labels"][:, 1:]
        accuracies = (predicted == labels).sum(1) / (labels != IGNORED).sum(1).clamp(min=1)
        return {"line_accuracy": accuracies.mean()}

    def _data(self, *, held_out: bool) -> Dataset[Any]:
        lines = Lines(self.longest, self.lines)
        indices = [i for i in range(len(lines)) if (i % 10 == 0) == held_out]
        return Subset(lines, indices)


class Lines(Dataset[Tensor]):
    """Non-empty lines of source code, as character ids."""

    def __init__(self, longest: int, count: int) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        texts = [(folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES]
        lines = [line for text in texts for line in text.splitlines() if line.strip()]
        self.lines, self.longest = lines[:count], longest

    def __len__(self) -> int:
        return len(self.lines)

    def __getitem__(self, index: int) -> Tensor:
        codes = [ord(character) - FIRST for character in self.lines[index][: self.longest - 1]]
        known = [code if 0 <= code <= LAST - FIRST else LAST - FIRST + 1 for code in codes]
        return torch.tensor([*known, END])


class GPT(nn.Module):
    """A small decoder with the interface of `GPT2LMHeadModel`."""

    def __init__(self, longest: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.token, self.place = nn.Embedding(VOCABULARY, width), nn.Embedding(longest, width)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(
                width, heads, 4 * width, dropout=0.0, batch_first=True, norm_first=True
            )
            for _ in range(layers)
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.head.weight = self.token.weight  # tied, as in GPT-2
        nn.init.normal_(self.token.weight, std=0.02)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """[batch, length] each -> logits of shape [batch, length, VOCABULARY], and the loss."""
        length = input_ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=input_ids.device).triu(1)
        positions = torch.arange(length, device=input_ids.device)
        features = self.token(input_ids) + self.place(positions)
        for block in self.blocks:
            features = block(features, src_mask=causal, src_key_padding_mask=attention_mask == 0)
        logits = self.head(self.norm(features))
        if labels is None:
            return {"logits": logits}
        predicted, targets = logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
        loss = F.cross_entropy(predicted, targets, ignore_index=IGNORED)
        return {"loss": loss, "logits": logits}
