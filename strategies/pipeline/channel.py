"""
Messages between the stages of one replica: tensors whose shapes both ends know.

What enters a place has the same shape for all micro-batches of one size. So shapes are agreed once
per size, by a pass through the model that computes nothing else; from then on bare tensors travel,
into buffers that are used again.

    stage 0   first micro-batch of 4 ──▶ place 0 ──▶ "float32 [4, 64]" ─┐
    stage 1                                 zeros [4, 64] ──▶ place 1 ◀─┘ ──▶ ...
"""

from collections import defaultdict, deque
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from distplat.platform.errors import CollectiveError, Problem, SpecError
from distplat.strategies.collective import Collective, Handle

_ROOM = 2
"""Sends under way to one stage; who sends one more waits for the oldest."""
_MOST_DIMS = 14
_DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)

Kind = tuple[int, int]
"""(Place that a tensor enters, samples of its micro-batch)."""


class Channel:
    """
    One rank's way to the other stages.

    Args:
        group: the ranks of the replica.
        peers: by stage, its rank in `group`.
        names: by rank in `group`, its rank in the run.
        device: where tensors are.
    """

    def __init__(
        self, group: Collective, peers: Sequence[int], names: Sequence[int], device: torch.device
    ) -> None:
        self._group, self._peers, self._names, self._device = group, peers, names, device
        self._shapes: dict[Kind, tuple[torch.dtype, tuple[int, ...]]] = {}
        self._free: defaultdict[Kind, list[Tensor]] = defaultdict(list)
        self._under_way: defaultdict[int, deque[tuple[Handle, Tensor]]] = defaultdict(deque)

    def learn(self, kind: Kind, tensor: Tensor) -> None:
        """
        Note what enters a place.

        Raises:
            SpecError: no gradient can come back through it.
        """
        if tensor.dtype not in _DTYPES or tensor.ndim > _MOST_DIMS:
            text = f"what enters place {kind[0]} of the pipeline is {tensor.dtype}, not a float"
            raise SpecError(Problem(("strategy", "cut"), text, "cut elsewhere"))
        self._shapes[kind] = tensor.dtype, tuple(tensor.shape)

    def tell(self, kind: Kind, to: int) -> None:
        """Tell a stage what enters its place."""
        dtype, shape = self._shapes[kind]
        text = [_DTYPES.index(dtype), len(shape), *shape]
        self.send(self._words(text), to)

    def hear(self, kind: Kind, source: int) -> Tensor:
        """Hear from a stage what enters a place of this one; give zeros like it."""
        words = self._words([])
        self._receive(words, source)
        dtype, ndim, *shape = words.tolist()
        self._shapes[kind] = _DTYPES[dtype], tuple(shape[:ndim])
        return torch.zeros(shape[:ndim], dtype=_DTYPES[dtype], device=self._device)

    def send(self, tensor: Tensor, to: int) -> None:
        """
        Hand a tensor to a stage; waits for room, not for the tensor to be taken.

        Raises:
            CollectiveError: the stage is gone, or took nothing for too long.
        """
        pending = self._under_way[to]
        if len(pending) >= _ROOM:
            self._guarded(pending.popleft()[0].wait, to)
        travels = tensor.contiguous()
        handle: list[Handle] = []
        peer = self._peers[to]
        self._guarded(lambda: handle.append(self._group.start_send(travels, peer)), to)
        pending.append((handle[0], travels))

    def receive(self, kind: Kind, source: int) -> Tensor:
        """
        Take a stage's next tensor, in a buffer to be given back.

        Raises:
            CollectiveError: the stage is gone, or sent nothing for too long.
        """
        free = self._free[kind]
        if free:
            buffer = free.pop()
        else:
            dtype, shape = self._shapes[kind]
            buffer = torch.empty(shape, dtype=dtype, device=self._device)
        self._receive(buffer, source)
        return buffer

    def give_back(self, kind: Kind, buffer: Tensor) -> None:
        """Let a buffer be used again."""
        self._free[kind].append(buffer)

    def finish(self) -> None:
        """Wait for what is under way."""
        for to, pending in self._under_way.items():
            while pending:
                self._guarded(pending.popleft()[0].wait, to)

    def _receive(self, tensor: Tensor, source: int) -> None:
        peer = self._peers[source]
        self._guarded(lambda: self._group.recv(tensor, peer), source)

    def _guarded(self, work: Callable[[], None], stage: int) -> None:
        """Name ranks by their numbers in the run, and the stage that did not come."""
        try:
            work()
        except CollectiveError as error:
            missing = tuple(self._names[place] for place in error.missing)
            cause = f"{error.cause}; waiting for stage {stage}"
            raise type(error)(error.group, error.operation, error.number, missing, cause) from None

    def _words(self, numbers: list[int]) -> Tensor:
        padded = [*numbers, *[0] * (_MOST_DIMS + 2 - len(numbers))]
        return torch.tensor(padded, device=self._device)
