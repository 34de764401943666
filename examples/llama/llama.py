"""
A Llama of Hugging Face, from a config, on Python's standard library: under every strategy.

Samples are parts of source text of equal length, batches are pairs, and the model is not changed:
`hybrid` splits it between its blocks, although its head is tied to its embedding.
"""

from __future__ import annotations

import sysconfig
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Subset, TensorDataset

from distplat import Task

MODULES = "argparse calendar configparser csv dataclasses inspect ipaddress".split()
FIRST, LAST = ord(" "), ord("~")
OTHER = LAST - FIRST + 1
"""Id of line ends and other non-printable characters."""
VOCABULARY = OTHER + 1


class Llama(Task):
    """Predict the next character of Python code."""

    def __init__(
        self, length: int = 64, layers: int = 4, width: int = 64, heads: int = 4, pieces: int = 2000
    ) -> None:
        """
        Initialize the task with the `task_args` of the job file.

        Args:
            length: characters of a sample.
            layers: transformer blocks.
            width: features of a character inside the model.
            heads: attention heads of each block; half as many keys and values.
            pieces: number of samples; every tenth is held out for evaluation.
        """
        self.length, self.layers, self.width, self.heads = length, layers, width, heads
        self.pieces = pieces

    def model(self) -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=self.width,
            intermediate_size=4 * self.width,
            num_hidden_layers=self.layers,
            num_attention_heads=self.heads,
            num_key_value_heads=self.heads // 2,
            tie_word_embeddings=True,
            bos_token_id=None,
            eos_token_id=None,
        )
        model: nn.Module = LlamaForCausalLM(config)
        return model

    def train_data(self) -> Subset[Any]:
        return self._data(held_out=False)

    def eval_data(self) -> Subset[Any]:
        return self._data(held_out=True)

    def loss(self, outputs: Any, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.logits.flatten(0, 1), targets.flatten())

    def metrics(self, outputs: Any, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.logits.argmax(-1) == targets).float().mean()}

    def _data(self, *, held_out: bool) -> Subset[Any]:
        """Return pairs (characters, next characters), both of shape [length]."""
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in MODULES)
        codes = torch.tensor([ord(character) - FIRST for character in text])
        codes[(codes < 0) | (codes > LAST - FIRST)] = OTHER
        pieces = codes[: len(codes) // (self.length + 1) * (self.length + 1)]
        pieces = pieces.view(-1, self.length + 1)[: self.pieces]
        indices = [i for i in range(len(pieces)) if (i % 10 == 0) == held_out]
        return Subset(TensorDataset(pieces[:, :-1], pieces[:, 1:]), indices)
