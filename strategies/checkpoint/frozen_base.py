"""What a checkpoint may leave out: frozen parameters that are as they were when the run began."""

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
    The frozen parameters of a model, or of a rank's part of it, as a run began with them.

    Args:
        flat: the model, before it is trained.
        saved: of the checkpoint that it was filled from; None: of none that leaves something out.
    """

    def __init__(self, flat: FlatModel, saved: Checksums | None) -> None:
        self._flat = flat
        frozen = dict(_frozen(flat.model))
        names = frozen.keys() if saved is None else frozen.keys() & saved.keys()
        self._sums = {name: checksum(frozen[name]) for name in names}

    def unchanged(self) -> dict[str, tuple[int, ...]]:
        """Give the checksums, by name, of those that nothing has written or begun to train."""
        trained = self._flat.trained_names()
        return {
            name: self._sums[name]
            for name, one in _frozen(self._flat.model)
            if name in self._sums and name not in trained and checksum(one) == self._sums[name]
        }


def check_trained_only(job: Job, model: nn.Module) -> None:
    """
    See that `checkpoint.trained_only` has something to leave out.

    Args:
        job: the run.
        model: the whole one.

    Raises:
        SpecError: there is nothing.
    """
    if job.checkpoint.trained_only and not any(_frozen(model)):
        where = "checkpoint", "trained_only"
        text = "has no effect: the model has no frozen parameters"
        raise SpecError(Problem(where, text, "remove it"))


def check_base(model: Mapping[str, Tensor], saved: Checksums) -> None:
    """
    See that what a checkpoint leaves out has the values that it was trained with.

    Args:
        model: by name.
        saved: of the checkpoint.

    Raises:
        SpecError: it has others; names one.
    """
    other = [n for n, sums in saved.items() if n in model and checksum(model[n]) != (*sums,)]
    if other:
        text = f"the frozen parameter {other[0]!r}"
        text += f", and {len(other) - 1} more," * (len(other) > 1)
        text += " has other values here than where the checkpoint was made, which leaves it out"
        hint = "begin from the same base: `initial_weights`, or the task's model()"
        raise SpecError(Problem(("task",), text, hint))


def _frozen(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Give frozen parameters by all of their names."""
    for name, one in model.state_dict(keep_vars=True).items():
        if isinstance(one, nn.Parameter) and not one.requires_grad:
            yield name, one
