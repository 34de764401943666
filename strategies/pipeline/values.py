"""
Values passed between stages: pytrees of tensors and constants, each sent as one message.

A pytree consists of nested lists, tuples, dicts and classes registered with torch's pytree. Only
tensors are sent. Constants (None, bool, int, float, str) and keys belong to the layout, which both
ends know from the first micro-batch of a size.

    value       (hidden, {"mask": mask, "causal": True})
    layout      tuple of two, dict of two; True; float32 [4, 9, 64] with a gradient, bool [4, 9]
    message     | hidden ........................ | mask ... |     bytes, tensors at multiples of 64
    gradient    of hidden, unpacked: a single tensor needs no packing
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.collective import SENDABLE
from distplat.strategies.torch_compat import (
    structure_from_text,
    structure_text,
    tree_flatten,
    tree_leaves,
    tree_map,
    tree_paths,
    tree_unflatten,
)

_ALIGN_BYTES = 64
"""Alignment of tensors in a message; as torch's own allocations on a CPU."""
_DTYPES = (*SENDABLE, torch.complex64, torch.complex128)
"""Dtypes of tensors between stages; complex ones, such as rotary angles, are sent as bytes."""
_CONSTANTS: tuple[type, ...] = (type(None), bool, int, float, str)

Form = tuple[torch.dtype, tuple[int, ...]]
"""(Dtype, shape) of a tensor."""


class Packing:
    """
    Packs tensors into one message: a single real tensor as it is, others as bytes of one vector.

    Args:
        forms: of the tensors, in order; empty: there is no message.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        self.forms = tuple(forms)
        self._offsets: list[int] = []
        end = 0
        for dtype, shape in forms:
            start = -(-end // _ALIGN_BYTES) * _ALIGN_BYTES
            self._offsets.append(start)
            end = start + prod(shape) * dtype.itemsize
        self.form: Form | None = (torch.uint8, (end,)) if forms else None  #: of the message
        self._is_single = len(self.forms) == 1 and self.forms[0][0] in SENDABLE
        if self._is_single:
            self.form = self.forms[0]

    def with_header(self, length: int) -> "Packing":
        """Return a packing of the tensors after a header of `length` bytes."""
        return Packing([(torch.uint8, (length,)), *self.forms])

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Return the message; for a single real, contiguous tensor the tensor itself."""
        if self._is_single:
            return tensors[0].contiguous()
        assert self.form is not None, "there is a message"
        message = torch.empty(self.form[1], dtype=torch.uint8, device=tensors[0].device)
        for part, tensor in zip(self.unpack(message), tensors, strict=True):
            part.copy_(tensor)
        return message

    def unpack(self, message: Tensor) -> list[Tensor]:
        """Return the tensors, as views of the message."""
        if self._is_single:
            return [message]
        tensors = []
        for start, (dtype, shape) in zip(self._offsets, self.forms, strict=True):
            stop = start + prod(shape) * dtype.itemsize
            tensors.append(message[start:stop].view(dtype).view(shape))
        return tensors


class _TensorForm(NamedTuple):
    """Path, dtype and shape of a tensor within a value."""

    where: str
    """Path in the value; empty: the tensor is the value."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    gradient: bool
    """Whether a gradient is sent back."""

    @override
    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class _Constant:
    where: str
    value: bool | int | float | str | None

    @override
    def __str__(self) -> str:
        return repr(self.value)


class ValueLayout:
    """
    Layout of the inputs of a virtual stage, the same for all micro-batches of one size.

    Args:
        virtual_stage: for errors.
        structure: torch's TreeSpec of the value.
        leaves: of the tree, in order.
    """

    def __init__(
        self, virtual_stage: int, structure: Any, leaves: Sequence[_TensorForm | _Constant]
    ) -> None:
        self._virtual_stage, self._structure, self._leaves = virtual_stage, structure, tuple(leaves)
        self._tensors = [leaf for leaf in leaves if isinstance(leaf, _TensorForm)]
        self._is_tensor = len(leaves) == 1 and len(self._tensors) == 1 and not leaves[0].where
        self.gradient_indices = [n for n, tensor in enumerate(self._tensors) if tensor.gradient]
        """Indices of the tensors whose gradients are sent back."""
        forms = [(tensor.dtype, tensor.shape) for tensor in self._tensors]
        self.values = Packing(forms)
        self.gradients = Packing([forms[n] for n in self.gradient_indices])

    @classmethod
    def of(cls, virtual_stage: int, value: Any) -> "ValueLayout":
        """
        Return the layout of a value computed under autograd; see `read`.

        Raises:
            SpecError: the layout cannot be serialized.
        """
        layout = cls.read(virtual_stage, value)
        layout.check_serializable()
        return layout

    @classmethod
    def read(cls, virtual_stage: int, value: Any) -> "ValueLayout":
        """
        Return the layout of a value.

        Gradients are sent back for tensors that require one. If no tensor does, they are sent for
        all floating-point tensors: another micro-batch may pass through trained layers.

        Raises:
            SpecError: the value has no tensor, or leaves other than tensors and constants.
        """
        paths = tree_paths(value)
        leaves, structure = tree_flatten(value)
        tensors = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        for where, leaf in zip(paths, leaves, strict=True):
            _check_leaf(virtual_stage, where, leaf)
        if not tensors:
            raise _problem(
                virtual_stage, f"has no tensor ({type(value).__name__})", "cut elsewhere"
            )
        depends = any(tensor.requires_grad for tensor in tensors)
        forms = [
            _TensorForm(
                where,
                leaf.dtype,
                tuple(leaf.shape),
                leaf.requires_grad if depends else leaf.is_floating_point() or leaf.is_complex(),
            )
            if isinstance(leaf, Tensor)
            else _Constant(where, leaf)
            for where, leaf in zip(paths, leaves, strict=True)
        ]
        return cls(virtual_stage, structure, forms)

    @property
    def key(self) -> tuple[Any, ...]:
        """A hashable key of the layout."""
        return (self._structure, *map(repr, self._leaves))

    def check_serializable(self) -> None:
        """
        Check that `from_bytes` restores the layout from `to_bytes`.

        Raises:
            SpecError: it does not.
        """
        try:
            same = structure_from_text(structure_text(self._structure)) == self._structure
        except Exception:  # torch raises several error types for classes that it cannot serialize
            same = False
        if not same:
            text = f"has containers that cannot be serialized, {_format_structure(self._structure)}"
            raise _problem(
                self._virtual_stage, text, "pass on lists, tuples, or dicts with string keys"
            )

    def to_bytes(self) -> bytes:
        """Serialize the layout as text, for `from_bytes`."""
        leaves = [
            [leaf.where, _DTYPES.index(leaf.dtype), leaf.shape, leaf.gradient]
            if isinstance(leaf, _TensorForm)
            else [leaf.where, leaf.value]
            for leaf in self._leaves
        ]
        return json.dumps([structure_text(self._structure), leaves]).encode()

    @classmethod
    def from_bytes(cls, virtual_stage: int, text: bytes) -> "ValueLayout":
        """Restore the layout that another rank sent."""
        structure, leaves = json.loads(text)
        forms: list[_TensorForm | _Constant] = []
        for where, *rest in leaves:
            if len(rest) == 1:
                forms.append(_Constant(where, rest[0]))
            else:
                forms.append(_TensorForm(where, _DTYPES[rest[0]], tuple(rest[1]), rest[2]))
        return cls(virtual_stage, structure_from_text(structure), forms)

    def value(self, tensors: Sequence[Tensor]) -> Any:
        """Build a value from its tensors, in order."""
        if self._is_tensor:
            return tensors[0]
        rest = iter(tensors)
        leaves = [
            next(rest) if isinstance(leaf, _TensorForm) else leaf.value for leaf in self._leaves
        ]
        return tree_unflatten(leaves, self._structure)

    def tensors(self, value: Any) -> list[Tensor]:
        """
        Return the tensors of a value, in order.

        Raises:
            SpecError: the value has another layout, or a gradient would be lost.
        """
        if self._is_tensor and isinstance(value, Tensor):
            leaves = [value]
        else:
            leaves, structure = tree_flatten(value)
            if structure != self._structure:
                got, expected = _format_structure(structure), _format_structure(self._structure)
                raise self._layout_error(f"it is {got}, not {expected}")
        tensors = []
        for expected_leaf, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(expected_leaf, _Constant):
                if not isinstance(leaf, _CONSTANTS) or repr(leaf) != repr(expected_leaf.value):
                    raise self._leaf_error(expected_leaf, leaf)
                continue
            form = expected_leaf.dtype, expected_leaf.shape
            if not isinstance(leaf, Tensor) or (leaf.dtype, leaf.shape) != form:
                raise self._leaf_error(expected_leaf, leaf)
            if leaf.requires_grad and not expected_leaf.gradient:
                name = expected_leaf.where or "it"
                raise self._layout_error(
                    f"{name} needs a gradient, and did not when first computed"
                )
            tensors.append(leaf)
        return tensors

    def _leaf_error(self, expected: _TensorForm | _Constant, leaf: Any) -> SpecError:
        got = repr(leaf) if isinstance(leaf, _CONSTANTS) else type(leaf).__name__
        if isinstance(leaf, Tensor):
            got = str(_TensorForm("", leaf.dtype, tuple(leaf.shape), False))
        return self._layout_error(f"{expected.where or 'it'} is {got}, not {expected}")

    def _layout_error(self, text: str) -> SpecError:
        text = f"differs from the first micro-batch of its size: {text}"
        hint = (
            "let layers return the same structure and shapes in training and evaluation, or cut "
            "elsewhere; they may differ where batches are dicts, or the task has its own collate()"
        )
        return _problem(self._virtual_stage, text, hint)


def _check_leaf(virtual_stage: int, where: str, leaf: Any) -> None:
    at = f" at {where}" if where else ""
    if not isinstance(leaf, Tensor):
        if type(leaf) not in _CONSTANTS:
            text = f"has {type(leaf).__name__}{at}, and stages pass on tensors and constants"
            raise _problem(
                virtual_stage,
                text,
                "pass on tensors, None, bool, int, float, str, or cut elsewhere",
            )
        return
    if leaf.dtype not in _DTYPES or leaf.layout is not torch.strided:
        found = str(leaf.dtype if leaf.layout is torch.strided else leaf.layout)
        raise _problem(
            virtual_stage, f"has a tensor of {found}{at}, which cannot be sent", "cut elsewhere"
        )


def _problem(virtual_stage: int, text: str, hint: str) -> SpecError:
    return SpecError(
        Problem(("strategy", "cut"), f"the input of virtual stage {virtual_stage} {text}", hint)
    )


def _format_structure(structure: Any) -> str:
    """Format a structure with `*` for leaves, such as `(*, {'mask': *})`."""
    try:
        return repr(tree_unflatten([_Leaf()] * structure.num_leaves, structure))
    except Exception:  # of a class that inspects its contents, such as PackedSequence
        return " ".join(str(structure).split())


class _Leaf:
    @override
    def __repr__(self) -> str:
        return "*"


def is_value(tree: Any) -> bool:
    """Return whether all leaves are tensors or constants, and at least one is a tensor."""
    leaves = tree_leaves(tree)
    supported = all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves)
    return supported and any(isinstance(leaf, Tensor) for leaf in leaves)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """Return the tensors among a tree's leaves, in order."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def clone_tensors(tree: Any) -> Any:
    """Return a tree with clones of its tensors, for layers that work in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def move_tensors(tree: Any, device: torch.device) -> Any:
    """Return a tree with its tensors moved to a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
