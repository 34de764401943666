"""
LoRA over a GPT-2 of Hugging Face: a frozen base in bfloat16, and trained adapters.

`Base` trains the GPT-2 on Python's source code. `Lora` starts from the trained base and learns to
continue English prose, Python's own documentation, with two low-rank matrices for each of its
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
    """Predict the next character of Python's source code, with all parameters trained."""

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
        Initialize the task with the `task_args` of the job file.

        Args:
            length: characters of a sample.
            layers: transformer blocks.
            width: features of a character inside the model.
            heads: attention heads of each block.
            samples: maximum number of samples; every tenth is held out for evaluation.
        """
        self.length, self.layers, self.width, self.heads = length, layers, width, heads
        self.samples = samples

    def model(self) -> nn.Module:
        import transformers

        library: Any = transformers  # untyped: the package may not be installed
        size = {"n_embd": self.width, "n_layer": self.layers, "n_head": self.heads}
        size |= {"vocab_size": VOCABULARY, "n_positions": self.length}
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        ends = {"bos_token_id": None, "eos_token_id": None}
        config = library.GPT2Config(use_cache=False, **size, **dropout, **ends)
        model: nn.Module = library.GPT2LMHeadModel(config)
        return model

    def train_data(self) -> Dataset[Any]:
        return Text(self.modules, self.length, self.samples, held_out=False)

    def eval_data(self) -> Dataset[Any]:
        return Text(self.modules, self.length, self.samples, held_out=True)

    def step(self, model: nn.Module, batch: Tensor) -> Any:
        return model(input_ids=batch, labels=batch)  # a mean over samples, which have equal lengths


class Lora(Base):
    """Predict the next character of English prose, with only the adapters trained."""

    modules = PROSE

    def __init__(self, rank: int = 8, scale: float = 2.0, **base: int) -> None:
        """
        Initialize the task with the `task_args` of the job file.

        Args:
            rank: rank of the adapters' product.
            scale: factor of the product; alpha / rank in the paper.
            base: see `Base`.
        """
        super().__init__(**base)
        self.rank, self.scale = rank, scale

    def model(self) -> nn.Module:
        model = super().model().to(torch.bfloat16).requires_grad_(False)
        return adapted(model, ["*.c_attn", "*.attn.c_proj"], self.rank, self.scale)


def adapted(model: nn.Module, patterns: list[str], rank: int, scale: float) -> nn.Module:
    """
    Add adapters to layers, in place.

    The adapters are the parameters `lora_a` and `lora_b` of the layer itself, so that the names of
    the base do not change.

    Args:
        model: the frozen model.
        patterns: patterns of layer names, `nn.Linear` or GPT-2's `Conv1D`.
        rank: rank of the adapters' product.
        scale: factor of the product.
    """
    layer: Any
    for name, layer in model.named_modules():
        if any(fnmatch(name, pattern) for pattern in patterns):
            inputs, outputs = layer.weight.shape
            if isinstance(layer, nn.Linear):
                inputs, outputs = outputs, inputs
            layer.lora_a = nn.Parameter(torch.randn(inputs, rank) / inputs**0.5)
            layer.lora_b = nn.Parameter(
                torch.zeros(rank, outputs)
            )  # zero: initially without effect
            layer.lora_scale = scale
            layer.register_forward_hook(_with_adapter)
    return model


def _with_adapter(layer: Any, inputs: tuple[Any, ...], outputs: Tensor) -> Tensor:
    """Add the adapter's output, computed in float32."""
    features: Tensor = inputs[0].float() @ layer.lora_a @ layer.lora_b * layer.lora_scale
    return outputs + features.to(outputs.dtype)


class Text(Dataset[Tensor]):
    """Parts of Python's standard library, as character ids."""

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
