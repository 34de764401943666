"""
The task: the user's side of a run, and all that a user must write.

One class, unchanged under every strategy and any number of workers. It says what is trained, on
what, and how well it does; it knows nothing of ranks, servers or Ray. This module needs no torch
itself, so naming a task costs nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.utils.data import Dataset


class Task(ABC):
    """
    What to train. Subclass it; constructor arguments come from `task_args` of the job file.

    Every method may be called once in every process of the run. The global generators of python,
    numpy and torch are seeded from the job before the module is imported, before the class is
    made, and before `model`, `train_data` and `eval_data`: all ranks build the same. Samples are
    seeded one by one (docs/random_numbers.md).
    """

    @abstractmethod
    def model(self) -> nn.Module:
        """Build the model, on the CPU. Parameters that need no gradient stay as they are."""

    @abstractmethod
    def train_data(self) -> Dataset[Any]:
        """Give the training samples: `len(data)` of them, `data[i] -> (inputs, targets)`."""

    @abstractmethod
    def loss(self, outputs: Any, targets: Any) -> Tensor | tuple[Tensor, Tensor | float]:
        """
        Give the loss of one batch.

        Args:
            outputs: what the model made of the inputs, batch first.
            targets: the targets as `collate` gave them, batch first.

        Returns:
            A scalar: the **mean** over the samples of the batch. Or `(sum, weight)` for a mean over
            something else, for example tokens: a scalar, and what the sum over all ranks and
            micro-batches is divided by.

        Raises:
            ValueError: by the caller, where it is neither; names what it got.
        """

    def eval_data(self) -> Dataset[Any] | None:
        """Give the samples for evaluation, or None for no evaluation."""
        return None

    def collate(self, samples: list[Any]) -> Any:
        """
        Put the samples of a micro-batch together; override it to pad them, for example.

        Unless it is overridden: as torch's `default_collate`, and dataclasses field by field. It
        runs where samples are read, in a loader process too (`data.num_loaders`), which has a copy
        of the task. The global generators are seeded before each call.

        Args:
            samples: of the training or the evaluation data, as the data set gave them.

        Returns:
            `(inputs, targets)`: what the model and what `loss` get, batch first.
        """
        from distplat.strategies.loop.collate import collated  # here: it needs torch

        return collated(samples)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Tensor | float]:
        """Give named figures of an evaluation batch, each a mean over it; `loss` is added."""
        return {}

    def buffers(self, name: str) -> str | None:
        """
        Say what ranks do with a buffer, or a frozen parameter, that a forward changes.

        Args:
            name: of the model's `state_dict`.

        Returns:
            `"rank0"`: all have rank 0's after each step. `"mean"`: the mean over the ranks,
            weighted by their samples. `"local"`: each keeps its own, and rank 0's is saved. None:
            `"mean"` for a batch norm's running mean and variance, else `"rank0"`.
        """
        return None

    def stages(self, model: nn.Module) -> list[nn.Module]:
        """
        Cut the model into modules that follow each other, for strategies that split it by layers.

        An `nn.Sequential` is cut into its children; override this for any other model.

        Raises:
            NotImplementedError: the model is no `nn.Sequential`, or has a `forward` of its own, and
                the task does not say.
        """
        from torch import nn  # here: naming a task costs no torch

        if isinstance(model, nn.Sequential) and type(model).forward is nn.Sequential.forward:
            return list(model)
        raise NotImplementedError(f"{type(self).__name__} does not say how its model is cut")
