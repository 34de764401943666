"""
Parallel branches on different ranks, as in Inception (Szegedy et al. 2015).

             ┌─ branch 0 ─┐          rank 0 computes branches 0 and 2, rank 1 branch 1;
    x ──f────┼─ branch 1 ─┼── join   then the ranks exchange the outputs
             └─ branch 2 ─┘

The module that contains the branches is unchanged. When its `forward` calls the first branch, every
rank computes its own branches and all outputs are exchanged; calls of the other branches return
outputs that already exist.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.tensor.exchange import TensorParallelRegion, copy_forward
from distplat.strategies.tensor.parallel_layers import Parts, set_class
from distplat.strategies.tensor.parallel_plan import ShardSpec, share_out

_ALIGN = 16
"""Alignment in bytes, because a buffer may hold outputs of several dtypes."""


@dataclass(frozen=True)
class _OutputSpec:
    """Shape and dtype of a branch's output, on any rank."""

    shape: tuple[int, ...]
    dtype: str

    @classmethod
    def of(cls, tensor: Tensor) -> "_OutputSpec":
        return cls(tuple(tensor.shape), dtype_name(tensor))

    @property
    def nbytes(self) -> int:
        """Size in bytes, including padding."""
        size = prod(self.shape) * self.torch_dtype.itemsize
        return -(-size // _ALIGN) * _ALIGN

    @property
    def torch_dtype(self) -> torch.dtype:
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    def view(self, buffer: Tensor) -> Tensor:
        """View bytes as the output."""
        elements = buffer.view(self.torch_dtype)[: prod(self.shape)]
        return elements.view(self.shape)


class Branch(nn.Module):
    """A branch, on its owner and on other ranks; mixed into the branch's own class."""

    branch_group: "Branches"
    index: int

    @override
    def forward(self, inputs: Tensor) -> Tensor:
        """Return the branch's output, computed on any rank."""
        return self.branch_group.output(self.index, inputs)

    def compute(self, inputs: Tensor) -> Tensor:
        """Compute the branch on this rank."""
        outputs: Tensor = super().forward(inputs)
        return outputs


class Branches:
    """
    The branches of a module, on a rank.

    Args:
        title: name of the module, for errors.
        owners: rank of each branch.
        region: of the model.
        trains: whether any branch has a trainable parameter.
    """

    def __init__(
        self, title: str, owners: Sequence[int], region: TensorParallelRegion, trains: bool
    ) -> None:
        self.modules: list[Branch] = []
        self._title, self._owners = title, owners
        self.region, self._trains = region, trains
        self._specs: dict[object, list[_OutputSpec]] = {}
        self._inputs: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def forget(self) -> None:
        """Discard outputs that were not fetched, for example after a failed forward."""
        self._inputs, self._outputs = None, {}
        self.region.forget()

    def output(self, index: int, inputs: Tensor) -> Tensor:
        """
        Return a branch's output.

        Raises:
            ValueError: branches have different inputs, or the shape of an output has changed.
            CollectiveError: a rank is missing.
        """
        if not self._outputs:
            self._inputs, self._outputs = inputs, dict(enumerate(self._compute(inputs)))
        if inputs is not self._inputs or index not in self._outputs:
            self.forget()
            raise ValueError(
                f"{self._title}: branches on different ranks must have one input, and each is "
                "called once; move what changes the input of one into the branch"
            )
        return self._outputs.pop(index)

    def _compute(self, inputs: Tensor) -> tuple[Tensor, ...]:
        shared = copy_forward(inputs, self.region.group)
        modules = [
            m for m, owner in zip(self.modules, self._owners, strict=True) if self._is_local(owner)
        ]
        if modules[0].training:
            self.region.begin(inputs.device)
        own = [branch.compute(shared) for branch in modules]
        self.region.end()
        specs = self._agree(inputs, own)
        # All ranks must take part in backward, even a rank whose branches have no parameters.
        grad_anchor = shared
        if not shared.requires_grad and self._trains:
            grad_anchor = torch.zeros((), device=inputs.device, requires_grad=True)
        outputs: tuple[Tensor, ...] = _Exchanged.apply(  # type: ignore[no-untyped-call]
            grad_anchor, self.region.group, self._owners, specs, *own
        )
        return outputs

    def _is_local(self, owner: int) -> bool:
        return owner == self.region.group.rank

    def _agree(self, inputs: Tensor, own: Sequence[Tensor]) -> list[_OutputSpec]:
        """Return the specs of all outputs; they are exchanged once for each kind of input."""
        local = [_OutputSpec.of(output) for output in own]
        kind = (inputs.shape, inputs.dtype, torch.is_autocast_enabled(inputs.device.type))
        if kind not in self._specs:
            shapes = [(spec.shape, spec.dtype) for spec in local]
            by_rank = [*map(iter, gather_values(shapes, self.region.group, inputs.device))]
            given = [next(by_rank[owner]) for owner in self._owners]
            self._specs[kind] = [_OutputSpec(tuple(shape), dtype) for shape, dtype in given]
        specs = self._specs[kind]
        if local != [
            f for f, owner in zip(specs, self._owners, strict=True) if self._is_local(owner)
        ]:
            raise ValueError(
                f"{self._title}: a branch on rank {self.region.group.rank} gave {specs} for one "
                f"kind of input, and now {local}; on several ranks, shapes must follow from it"
            )
        return specs


class _Exchanged(Function):
    """Forward gathers all outputs; backward needs no exchange, as gradients are complete."""

    @staticmethod
    @override
    def forward(
        ctx: Any,
        grad_anchor: Tensor,
        group: Collective,
        owners: Sequence[int],
        specs: Sequence[_OutputSpec],
        *own: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.own = [index for index, owner in enumerate(owners) if owner == group.rank]
        # Recomputation stops at the last saved tensor: this one makes every rank reach this point.
        ctx.save_for_backward(grad_anchor.new_empty(0))
        sizes, starts = [0] * group.world, []
        for owner, spec in zip(owners, specs, strict=True):
            starts.append(sizes[owner])
            sizes[owner] += spec.nbytes
        buffers = [torch.empty(size, dtype=torch.uint8, device=own[0].device) for size in sizes]
        outputs = tuple(
            spec.view(buffers[owner][start : start + spec.nbytes])
            for owner, start, spec in zip(owners, starts, specs, strict=True)
        )
        for index, output in zip(ctx.own, own, strict=True):
            outputs[index].copy_(output)
        group.all_gather(buffers, buffers[group.rank])
        return outputs

    @staticmethod
    @override
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        _ = ctx.saved_tensors
        return (None, None, None, None, *(gradients[index] for index in ctx.own))


def split_branches(
    modules: Mapping[str, nn.Module], region: TensorParallelRegion
) -> tuple[Branches, Parts]:
    """
    Keep this rank's branches; the parameters of other branches become empty.

    Args:
        modules: the branches of a module, by name.
        region: of the model.

    Returns:
        The object through which branches are called, and the rank's part of each tensor, by name.

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
    branches = Branches(title, owners, region, trains)
    parts: Parts = {}
    for index, (name, branch) in enumerate(modules.items()):
        has = owners[index] == group.rank
        parts |= _parts(name, branch, has)
        if not has:
            _empty(branch)
        cls = type(branch)
        wrapped: Branch = set_class(branch, type(f"Branch{cls.__name__}", (Branch, cls), {}))
        wrapped.branch_group, wrapped.index = branches, index
        branches.modules.append(wrapped)
    return branches, parts


def _parts(name: str, branch: nn.Module, has: bool) -> Parts:
    """Return the specs of a branch's tensors: complete, or empty."""
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
