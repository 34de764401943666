"""Frozen parameters with unchanged values, which a checkpoint may omit."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from torch import Tensor, nn

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.written_tensors import checksum

Checksums = Mapping[str, Sequence[int]]


class FrozenBase:
    """
    Initial values of the frozen parameters of a model, or of a rank's part of it.

    Args:
        flat: the model before training.
        saved: checksums of the parameters that the loaded checkpoint omits; None: it omits none.
    """

    def __init__(self, flat: FlatModel, saved: Checksums | None) -> None:
        self._flat = flat
        frozen = dict(_frozen(flat.model))
        names = frozen.keys() if saved is None else frozen.keys() & saved.keys()
        self._sums = {name: checksum(frozen[name]) for name in names}

    def unchanged(self) -> dict[str, tuple[int, ...]]:
        """Return checksums of the parameters that were neither written nor unfrozen, by name."""
        trained = self._flat.trained_names()
        return {
            name: self._sums[name]
            for name, tensor in _frozen(self._flat.model)
            if name in self._sums and name not in trained and checksum(tensor) == self._sums[name]
        }


def check_trained_only(job: Job, model: nn.Module) -> None:
    """
    Check that the model has frozen parameters if `checkpoint.trained_only` is set.

    Raises:
        SpecError: the model has no frozen parameters.
    """
    if job.checkpoint.trained_only and not any(_frozen(model)):
        where = "checkpoint", "trained_only"
        text = "has no effect: the model has no frozen parameters"
        raise SpecError(Problem(where, text, "remove it"))


def check_base(model: Mapping[str, Tensor], saved: Checksums) -> None:
    """
    Check that the parameters that a checkpoint omits have the values of its training.

    Args:
        model: the model's tensors, by name.
        saved: checksums of the omitted parameters.

    Raises:
        SpecError: values differ; names one parameter.
    """
    changed = [n for n, sums in saved.items() if n in model and checksum(model[n]) != (*sums,)]
    if changed:
        text = f"the frozen parameter {changed[0]!r}"
        text += f", and {len(changed) - 1} more," * (len(changed) > 1)
        text += " has other values here than in the checkpoint's run; the checkpoint omits it"
        hint = "start from the same base weights: `initial_weights`, or the task's model()"
        raise SpecError(Problem(("task",), text, hint))


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Return frozen parameters by name; a tied parameter has several names."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if isinstance(tensor, nn.Parameter) and not tensor.requires_grad:
            yield name, tensor
