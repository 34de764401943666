"""The control record's way around a group: one small all-reduce beside those of the gradients."""

import torch

from distplat.strategies.collective import Collective, Handle
from distplat.strategies.training.control import StepControl, control_size


class ControlSum:
    """
    Sums the ranks' control records.

    Args:
        group: all ranks; each makes this at the same time.
        slots: of the flat vector.
        device: where the group's tensors lie.
    """

    def __init__(self, group: Collective, slots: int, device: torch.device) -> None:
        self._alone = group.world == 1
        self._group = group
        like = torch.empty(control_size(slots), dtype=torch.float64, device=device)
        self._vector = like if self._alone else group.share(like)
        self._local = StepControl()
        self._handle: Handle | None = None

    def start(self, local: StepControl) -> None:
        """Begin to sum; the next operations of the group may be begun, too."""
        self._local = local
        if self._alone:
            return
        self._vector.copy_(torch.from_numpy(local.pack()))
        self._handle = self._group.start_all_reduce(self._vector)

    def wait(self) -> StepControl:
        """
        Give the sum, the same on every rank but for the rank and parameter that it names.

        Raises:
            CollectiveError: a rank is missing.
        """
        if self._handle is None:
            return self._local
        self._handle.wait()
        self._handle = None
        return StepControl.unpack(self._vector.cpu().numpy().copy()).named(self._local)
