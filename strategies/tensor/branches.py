"""
Parallel branches on different ranks, as in Inception (Szegedy et al. 2015).

             ┌─ branch 0 ─┐          rank 0 computes branches 0 and 2, rank 1 branch 1;
    x ──f────┼─ branch 1 ─┼── join   then each gets the outputs of the others
             └─ branch 2 ─┘

The module around them is left as it is. When its `forward` calls the first branch, every rank
computes those that it has and outputs are exchanged; calls of the others find theirs ready.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.tensor.exchange import TensorParallelRegion, copy_forward
from distplat.strategies.tensor.parallel_layers import Parts, set_class
from distplat.strategies.tensor.parallel_plan import ShardSpec, share_out

_ALIGN = 16
"""Bytes: outputs of several dtypes may go together."""


@dataclass(frozen=True)
class _Form:
    """Of a branch's output, whoever has it."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "_Form":
        return cls(tuple(tensor.shape), dtype_name(tensor))

    @property
    def room(self) -> int:
        """Bytes, padding included."""
        size = prod(self.shape) * self.torch_dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def view(self, room: Tensor) -> Tensor:
        """See bytes as the output."""
        elements = room.view(self.torch_dtype)[: prod(self.shape)]
        return elements.view(self.shape)


class Branch(nn.Module):
    """One branch, on the rank that has it and on the others; mixed into the class that it has."""

    around: "Branches"
    index: int

    def forward(self, inputs: Tensor) -> Tensor:
        """Give the branch's output, whoever computes it."""
        return self.around.output(self.index, inputs)

    def compute(self, inputs: Tensor) -> Tensor:
        """Compute it here."""
        outputs: Tensor = super().forward(inputs)
        return outputs


class Branches:
    """
    The branches of one module, as a rank sees them.

    Args:
        title: the module, for errors.
        owners: rank of each branch.
        region: of the model.
        trains: whether any branch has a parameter to train.
    """

    def __init__(
        self, title: str, owners: Sequence[int], region: TensorParallelRegion, trains: bool
    ) -> None:
        self.modules: list[Branch] = []
        self._title, self._owners = title, owners
        self.region, self._trains = region, trains
        self._forms: dict[object, list[_Form]] = {}
        self._given: Tensor | None = None
        self._ready: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Drop outputs that nobody has fetched, as after a forward that has failed."""
        self._given, self._ready = None, {}
        self.region.forget()

    def output(self, index: int, inputs: Tensor) -> Tensor:
        """
        Give a branch's output.

        Raises:
            ValueError: branches have different inputs, or one does not give what it gave before.
            CollectiveError: a rank is missing.
        """
        if not self._ready:
            self._given, self._ready = inputs, dict(enumerate(self._compute(inputs)))
        if inputs is not self._given or index not in self._ready:
            self.forget()
            raise ValueError(
                f"{self._title}: branches on different ranks must have one input, and each is "
                "called once; move what changes the input of one into the branch"
            )
        return self._ready.pop(index)

    def _compute(self, inputs: Tensor) -> tuple[Tensor, ...]:
        shared = copy_forward(inputs, self.region.group)
        modules = [
            m for m, owner in zip(self.modules, self._owners, strict=True) if self._has(owner)
        ]
        if modules[0].training:
            self.region.begin(inputs.device)
        own = [branch.compute(shared) for branch in modules]
        self.region.end()
        forms = self._agree(inputs, own)
        # All ranks must agree on whether there is a backward, also one whose branches have none.
        lever = shared
        if not shared.requires_grad and self._trains:
            lever = torch.zeros((), device=inputs.device, requires_grad=True)
        outputs: tuple[Tensor, ...] = _Exchanged.apply(  # type: ignore[no-untyped-call]
            lever, self.region.group, self._owners, forms, *own
        )
        return outputs

    def _has(self, owner: int) -> bool:
        return owner == self.region.group.rank

    def _agree(self, inputs: Tensor, own: Sequence[Tensor]) -> list[_Form]:
        """Learn the forms of all outputs: asked once for each kind of input."""
        local = [_Form.of(output) for output in own]
        kind = (inputs.shape, inputs.dtype, torch.is_autocast_enabled(inputs.device.type))
        if kind not in self._forms:
            shapes = [(form.shape, form.dtype) for form in local]
            by_rank = [*map(iter, gather_values(shapes, self.region.group, inputs.device))]
            given = [next(by_rank[owner]) for owner in self._owners]
            self._forms[kind] = [_Form(tuple(shape), dtype) for shape, dtype in given]
        forms = self._forms[kind]
        if local != [f for f, owner in zip(forms, self._owners, strict=True) if self._has(owner)]:
            raise ValueError(
                f"{self._title}: a branch on rank {self.region.group.rank} gave {forms} for one "
                f"kind of input, and now {local}; on several ranks, shapes must follow from it"
            )
        return forms


class _Exchanged(Function):
    """Forward: everybody's outputs. Backward: a rank has the gradients of its own already."""

    @staticmethod
    def forward(
        ctx: Any,
        lever: Tensor,
        group: Collective,
        owners: Sequence[int],
        forms: Sequence[_Form],
        *own: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.own = [index for index, owner in enumerate(owners) if owner == group.rank]
        # Recomputation stops at the last saved tensor: with this one, no rank stops before here.
        ctx.save_for_backward(lever.new_empty(0))
        sizes, starts = [0] * group.world, []
        for owner, form in zip(owners, forms, strict=True):
            starts.append(sizes[owner])
            sizes[owner] += form.room
        rooms = [torch.empty(size, dtype=torch.uint8, device=own[0].device) for size in sizes]
        outputs = tuple(
            form.view(rooms[owner][start : start + form.room])
            for owner, start, form in zip(owners, starts, forms, strict=True)
        )
        for index, output in zip(ctx.own, own, strict=True):
            outputs[index].copy_(output)
        group.all_gather(rooms, rooms[group.rank])
        return outputs

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return (None, None, None, None, *(gradients[index] for index in ctx.own))


def split_branches(
    modules: Mapping[str, nn.Module], region: TensorParallelRegion
) -> tuple[Branches, Parts]:
    """
    Leave a rank its own branches; the parameters of the others become empty.

    Args:
        modules: the branches of one module, by name.
        region: of the model.

    Returns:
        What the branches go through, and which tensors, by name, the rank has.

    Raises:
        SpecError: fewer branches than ranks, or a parameter without a dimension.
    """
    title, group = next(iter(modules)).rpartition(".")[0] or "the model", region.group
    if len(modules) < group.world:
        text = f"{title}: {len(modules)} branches cannot be shared out to {group.world} ranks"
        raise SpecError(Problem((), text, f"take a tensor size of {len(modules)} or less"))
    costs = [sum(p.numel() for p in branch.parameters()) for branch in modules.values()]
    trains = any(p.requires_grad for branch in modules.values() for p in branch.parameters())
    owners = share_out(costs, group.world)
    around = Branches(title, owners, region, trains)
    parts: Parts = {}
    for index, (name, branch) in enumerate(modules.items()):
        has = owners[index] == group.rank
        parts |= _parts(name, branch, has)
        if not has:
            _empty(branch)
        kind = type(branch)
        wrapped: Branch = set_class(branch, type(f"Branch{kind.__name__}", (Branch, kind), {}))
        wrapped.around, wrapped.index = around, index
        around.modules.append(wrapped)
    return around, parts


def _parts(name: str, branch: nn.Module, has: bool) -> Parts:
    """Give all tensors of a branch as whole, or as absent."""
    parts = {}
    for own, tensor in (*branch.named_parameters(), *branch.named_buffers()):
        if isinstance(tensor, nn.Parameter) and tensor.ndim == 0:
            text = f"{name}.{own} has no dimension, so its branch cannot be absent from a rank"
            raise SpecError(Problem((), text, "give it the shape [1], or leave the branch out"))
        size = tensor.shape[0] if tensor.ndim else 1
        parts[f"{name}.{own}"] = ShardSpec(0, 0, size if has else 0, size)
    return parts


def _empty(branch: nn.Module) -> None:
    for module in branch.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                empty = parameter.detach().new_empty((0, *parameter.shape[1:]))
                module._parameters[name] = nn.Parameter(empty, parameter.requires_grad)
