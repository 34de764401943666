"""
Push each shard's part of the gradient as soon as backward has finished it.

    backward     layer 3 | layer 2 | layer 1 | layer 0 |
    servers                        [ shard 1 ]         [ shard 0 ]
                                                       ^ finish(), then `Shards.push`: the rest

Which parts are complete is `algorithms/shard_release.py`'s; which may leave while this rank still
computes is the port's, which knows what the servers write to (docs/decisions/early_pushes.md).
"""

from collections.abc import Callable

from torch import Tensor

from distplat.strategies.algorithms.shard_release import ShardRelease
from distplat.strategies.ports import Shards
from distplat.strategies.training.flat import FlatModel
from distplat.strategies.training.listening import came_again, listen


class EarlyPush:
    """
    Tells the port about complete parts, of one attempt.

    Args:
        flat: the model.
        shards: connected.
        overlap: whether parts leave while backward goes on.
        prepare: called once per step with each part of `flat.grads`, before it leaves.
    """

    def __init__(
        self,
        flat: FlatModel,
        shards: Shards,
        *,
        overlap: bool,
        prepare: Callable[[Tensor], object] = lambda part: None,
    ) -> None:
        self._flat, self._shards, self._prepare = flat, shards, prepare
        self._bounds = shards.bounds()
        parameters = [(slot.offset, slot.stop) for slot in flat.trained_slots]
        self._release = ShardRelease(parameters, self._bounds)
        self._prepared: set[int] = set()
        self._push: tuple[int, int | None] | None = None  #: number and task of the one to come
        self._hooks = listen(flat, self._on_gradient) if overlap and len(self._bounds) > 1 else []

    def last_backward(self, push: int, task: int | None = None) -> None:
        """Be told that the last backward before a push begins; see `Shards.push`."""
        self._release.begin()
        self._push = push, task

    def finish(self) -> None:
        """Prepare what has not left; backward is over."""
        if self._push is None:
            self._release.begin()  # without samples there was no backward
        for number in self._release.rest():
            self._prepare_once(number)
        self._push = None
        self._prepared.clear()

    def close(self) -> None:
        """Take the hooks off the model."""
        self._push = None
        for hook in self._hooks:
            hook.remove()

    def _on_gradient(self, parameter: int, name: str) -> None:
        """Have complete parts leave now that one more gradient is there; autograd calls this."""
        if self._push is None or self._flat.tail_in_use:  # its gradients may come last
            return
        if self._release.has_left(parameter):
            raise came_again(name)
        self._flat.ready(parameter)
        for number in self._release.gradient(parameter):
            if self._shards.may_leave(number):
                self._prepare_once(number)
                self._release.leave(number)
                self._shards.push_part(number, *self._push)

    def _prepare_once(self, number: int) -> None:
        if number not in self._prepared:
            self._prepared.add(number)
            start, stop = self._bounds[number]
            self._prepare(self._flat.grads[start:stop])
