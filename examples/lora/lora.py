"""
LoRA over a GPT-2 of Hugging Face: a base in bfloat16 that is not trained, adapters that are.

`Base` trains the GPT-2 on Python's source code. `Lora` takes what that run has trained and gets it
to continue English prose, Python's own documentation, by two thin matrices beside each of its
attention layers (Hu et al., LoRA: Low-Rank Adaptation of Large Language Models, 2021).
"""

from __future__ import annotations

import sysconfig
from collections.abc import Iterable
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Task

CODE = "argparse ast calendar configparser csv dataclasses difflib enum inspect ipaddress".split()
PROSE = ["pydoc_data/topics"]
FIRST, LAST = ord(" "), ord("~")
VOCABULARY = LAST - FIRST + 3
"""The printable characters, the end of a line, and one for all others."""


class Base(Task):
    """Predict the next character of Python's source code; all of the model is trained."""

    modules: Iterable[str] = CODE

    def __init__(
        self,
        length: int = 64,
        layers: int = 3,
        width: int = 96,
        heads: int = 4,
        samples: int = 4000,
    ) -> None:
        """
        Take what `task_args` of the job file says.

        Args:
            length: characters of a sample.
            layers: transformer blocks.
            width: features of a character inside the model.
            heads: attention heads of each block.
            samples: at most; every tenth is held out for evaluation.
        """
        self.length, self.layers, self.width, self.heads = length, layers, width, heads
        self.samples = samples

    def model(self) -> nn.Module:
        import transformers

        made: Any = transformers  # which may not be there to be looked at
        size = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads}
        size |= {"vocab_size": VOCABULARY, "n_positions": self.length}
        none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": None, "eos_token_id": None}
        config = made.GPT2Config(use_cache=False, **size, **none, **ends)
        model: nn.Module = made.GPT2LMHeadModel(config)
        return model

    def train_data(self) -> Dataset[Any]:
        return Text(self.modules, self.length, self.samples, held_out=False)

    def eval_data(self) -> Dataset[Any]:
        return Text(self.modules, self.length, self.samples, held_out=True)

    def step(self, model: nn.Module, batch: Tensor) -> Any:
        return model(input_ids=batch, labels=batch)  # a mean over samples: all are of one length


class Lora(Base):
    """Predict the next character of English prose; the adapters alone are trained."""

    modules = PROSE

    def __init__(self, rank: int = 8, scale: float = 2.0, **base: int) -> None:
        """
        Take what `task_args` of the job file says.

        Args:
            rank: of the adapters' product.
            scale: what it counts by; alpha / rank of the paper.
            base: see `Base`.
        """
        super().__init__(**base)
        self.rank, self.scale = rank, scale

    def model(self) -> nn.Module:
        model = super().model().to(torch.bfloat16).requires_grad_(False)
        return adapted(model, ["*.c_attn", "*.attn.c_proj"], self.rank, self.scale)


def adapted(model: nn.Module, patterns: list[str], rank: int, scale: float) -> nn.Module:
    """
    Put adapters beside layers, in place: `lora_a` and `lora_b` of the layer itself, so that the
    base's names stay as they are.

    Args:
        model: frozen.
        patterns: of the names of layers, `nn.Linear` or GPT-2's `Conv1D`.
        rank: of their product.
        scale: what it counts by.
    """
    layer: Any
    for name, layer in model.named_modules():
        if any(fnmatch(name, pattern) for pattern in patterns):
            inputs, outputs = layer.weight.shape
            if isinstance(layer, nn.Linear):
                inputs, outputs = outputs, inputs
            layer.lora_a = nn.Parameter(torch.randn(inputs, rank) / inputs**0.5)
            layer.lora_b = nn.Parameter(torch.zeros(rank, outputs))  # at first it changes nothing
            layer.lora_scale = scale
            layer.register_forward_hook(_with_adapter)
    return model


def _with_adapter(layer: Any, inputs: tuple[Any, ...], outputs: Tensor) -> Tensor:
    """Add the adapter's part, computed in float32."""
    features: Tensor = inputs[0].float() @ layer.lora_a @ layer.lora_b * layer.lora_scale
    return outputs + features.to(outputs.dtype)


class Text(Dataset[Tensor]):
    """Runs of characters of Python's standard library, as numbers."""

    def __init__(self, modules: Iterable[str], length: int, count: int, *, held_out: bool) -> None:
        folder = Path(sysconfig.get_paths()["stdlib"])
        text = "".join((folder / f"{name}.py").read_text(encoding="utf-8") for name in modules)
        runs = [text[at : at + length] for at in range(0, len(text) - length + 1, length)][:count]
        self.runs = [run for number, run in enumerate(runs) if (number % 10 == 0) == held_out]

    def __len__(self) -> int:
        return len(self.runs)

    def __getitem__(self, index: int) -> Tensor:
        codes = [ord(character) for character in self.runs[index]]
        return torch.tensor(
            [code - FIRST if FIRST <= code <= LAST else _other(code) for code in codes]
        )


def _other(code: int) -> int:
    return LAST - FIRST + (1 if code == ord("\n") else 2)
