"""
What a stage hands on: a tree of tensors and constants, agreed once and then sent as one message.

A tree is what torch's pytree takes apart: lists, tuples and dicts, in each other, and what is
registered with it. Tensors travel. Constants (None, bool, int, float, str) belong to the form, as
do keys: both ends know them from the first micro-batch of a size.

    value       (hidden, {"mask": mask, "causal": True})
    form        tuple of two, dict of two; True; float32 [4, 9, 64] with a gradient, bool [4, 9]
    message     | hidden ........................ | mask ... |     bytes, tensors at multiples of 64
    gradient    of hidden, as it is: one tensor needs no packing
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor

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

_ALIGNED = 64
"""Bytes; as torch's own allocations on a CPU."""
_TRAVELLING = (*SENDABLE, torch.complex64, torch.complex128)
"""Types of tensors that stages hand on; complex ones, such as rotary angles, as bytes."""
_CONSTANTS: tuple[type, ...] = (type(None), bool, int, float, str)

Form = tuple[torch.dtype, tuple[int, ...]]
"""(Type, shape) of a tensor."""


class Packing:
    """
    How some tensors travel: one real one as it is, others as the bytes of one vector.

    Args:
        forms: of the tensors, in order; with none there is no message.
    """

    def __init__(self, forms: Sequence[Form]) -> None:
        self.forms = tuple(forms)
        self._offsets: list[int] = []
        end = 0
        for dtype, shape in forms:
            start = -(-end // _ALIGNED) * _ALIGNED
            self._offsets.append(start)
            end = start + prod(shape) * dtype.itemsize
        self.form: Form | None = (torch.uint8, (end,)) if forms else None  #: of the message
        self._as_it_is = len(self.forms) == 1 and self.forms[0][0] in SENDABLE
        if self._as_it_is:
            self.form = self.forms[0]

    def behind(self, length: int) -> "Packing":
        """Give how the tensors travel behind a text of so many bytes."""
        return Packing([(torch.uint8, (length,)), *self.forms])

    def pack(self, tensors: Sequence[Tensor]) -> Tensor:
        """Give the message; of one real tensor that is contiguous, the tensor itself."""
        if self._as_it_is:
            return tensors[0].contiguous()
        assert self.form is not None, "there is a message"
        message = torch.empty(self.form[1], dtype=torch.uint8, device=tensors[0].device)
        for part, tensor in zip(self.unpack(message), tensors, strict=True):
            part.copy_(tensor)
        return message

    def unpack(self, message: Tensor) -> list[Tensor]:
        """Give the tensors; they lie in the message."""
        if self._as_it_is:
            return [message]
        tensors = []
        for start, (dtype, shape) in zip(self._offsets, self.forms, strict=True):
            stop = start + prod(shape) * dtype.itemsize
            tensors.append(message[start:stop].view(dtype).view(shape))
        return tensors


class _TensorForm(NamedTuple):
    """A tensor of a value."""

    where: str
    """In the value; empty: it is the value."""
    dtype: torch.dtype
    shape: tuple[int, ...]
    gradient: bool
    """Whether one comes back."""

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')} {list(self.shape)}"


@dataclass(frozen=True)
class _Constant:
    where: str
    value: bool | int | float | str | None

    def __str__(self) -> str:
        return repr(self.value)


class ValueLayout:
    """
    The form of what enters a virtual stage, the same for all micro-batches of one size.

    Args:
        virtual_stage: along the model, for errors.
        structure: of the tree, as torch's pytree has it.
        leaves: of the tree, in order.
    """

    def __init__(
        self, virtual_stage: int, structure: Any, leaves: Sequence[_TensorForm | _Constant]
    ) -> None:
        self._virtual_stage, self._structure, self._leaves = virtual_stage, structure, tuple(leaves)
        self._tensors = [leaf for leaf in leaves if isinstance(leaf, _TensorForm)]
        self._lone = len(leaves) == 1 and len(self._tensors) == 1 and not leaves[0].where
        self.wanted = [n for n, one in enumerate(self._tensors) if one.gradient]
        """Numbers of the tensors to which gradients come back."""
        forms = [(one.dtype, one.shape) for one in self._tensors]
        self.values = Packing(forms)
        self.gradients = Packing([forms[n] for n in self.wanted])

    @classmethod
    def of(cls, virtual_stage: int, value: Any) -> "ValueLayout":
        """
        Read the form off a value that was computed with gradients; see `read`.

        Raises:
            SpecError: it cannot be told to another process.
        """
        layout = cls.read(virtual_stage, value)
        layout.check_serializable()
        return layout

    @classmethod
    def read(cls, virtual_stage: int, value: Any) -> "ValueLayout":
        """
        Read the form off a value.

        Gradients come back to the tensors that need one. Where none does, they come back to all
        floats: another micro-batch may take a way through layers that are trained.

        Raises:
            SpecError: it has leaves that are no tensors and no constants, or no tensor.
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
        """The same for the same form, and for no other."""
        return (self._structure, *map(repr, self._leaves))

    def check_serializable(self) -> None:
        """
        See that `from_bytes` gives the same form for what `to_bytes` gives.

        Raises:
            SpecError: it does not.
        """
        try:
            same = structure_from_text(structure_text(self._structure)) == self._structure
        except Exception:  # of torch: it tells by errors of several types what it cannot write
            same = False
        if not same:
            what = _shown(self._structure)
            text = f"is of containers that cannot be told to another process, {what}"
            raise _problem(self._virtual_stage, text, "hand on lists, tuples, or dicts by strings")

    def to_bytes(self) -> bytes:
        """Give the form as text, for `from_bytes`."""
        leaves = [
            [one.where, _TRAVELLING.index(one.dtype), one.shape, one.gradient]
            if isinstance(one, _TensorForm)
            else [one.where, one.value]
            for one in self._leaves
        ]
        return json.dumps([structure_text(self._structure), leaves]).encode()

    @classmethod
    def from_bytes(cls, virtual_stage: int, text: bytes) -> "ValueLayout":
        """Give the form that another rank has told."""
        structure, leaves = json.loads(text)
        forms: list[_TensorForm | _Constant] = []
        for where, *rest in leaves:
            if len(rest) == 1:
                forms.append(_Constant(where, rest[0]))
            else:
                forms.append(_TensorForm(where, _TRAVELLING[rest[0]], tuple(rest[1]), rest[2]))
        return cls(virtual_stage, structure_from_text(structure), forms)

    def value(self, tensors: Sequence[Tensor]) -> Any:
        """Put a value together; `tensors` are in order."""
        if self._lone:
            return tensors[0]
        rest = iter(tensors)
        leaves = [next(rest) if isinstance(one, _TensorForm) else one.value for one in self._leaves]
        return tree_unflatten(leaves, self._structure)

    def tensors(self, value: Any) -> list[Tensor]:
        """
        Take a value apart: give its tensors in order.

        Raises:
            SpecError: it is of another form, or a gradient would be lost.
        """
        if self._lone and isinstance(value, Tensor):
            leaves = [value]
        else:
            leaves, structure = tree_flatten(value)
            if structure != self._structure:
                raise self._other(f"it is {_shown(structure)}, not {_shown(self._structure)}")
        tensors = []
        for known, leaf in zip(self._leaves, leaves, strict=True):
            if isinstance(known, _Constant):
                if not isinstance(leaf, _CONSTANTS) or repr(leaf) != repr(known.value):
                    raise self._differs(known, leaf)
                continue
            form = known.dtype, known.shape
            if not isinstance(leaf, Tensor) or (leaf.dtype, leaf.shape) != form:
                raise self._differs(known, leaf)
            if leaf.requires_grad and not known.gradient:
                text = f"{known.where or 'it'} needs a gradient, and did not when first computed"
                raise self._other(text)
            tensors.append(leaf)
        return tensors

    def _differs(self, known: _TensorForm | _Constant, leaf: Any) -> SpecError:
        got = repr(leaf) if isinstance(leaf, _CONSTANTS) else type(leaf).__name__
        if isinstance(leaf, Tensor):
            got = str(_TensorForm("", leaf.dtype, tuple(leaf.shape), False))
        return self._other(f"{known.where or 'it'} is {got}, not {known}")

    def _other(self, text: str) -> SpecError:
        text = f"is not as it was for the first micro-batch of its size: {text}"
        hint = (
            "have layers hand on the same form in training and evaluation, or cut elsewhere; "
            "forms may differ where batches are dicts, or made by a collate() of the task's own"
        )
        return _problem(self._virtual_stage, text, hint)


def _check_leaf(virtual_stage: int, where: str, leaf: Any) -> None:
    at = f" at {where}" if where else ""
    if not isinstance(leaf, Tensor):
        if type(leaf) not in _CONSTANTS:
            text = f"has {type(leaf).__name__}{at}, and stages hand on tensors and constants"
            raise _problem(
                virtual_stage,
                text,
                "hand on tensors, None, bool, int, float, str, or cut elsewhere",
            )
        return
    if leaf.dtype not in _TRAVELLING or leaf.layout is not torch.strided:
        what = str(leaf.dtype if leaf.layout is torch.strided else leaf.layout)
        raise _problem(
            virtual_stage, f"has a tensor of {what}{at}, which no message takes", "cut elsewhere"
        )


def _problem(virtual_stage: int, text: str, hint: str) -> SpecError:
    return SpecError(
        Problem(("strategy", "cut"), f"what enters virtual stage {virtual_stage} {text}", hint)
    )


def _shown(structure: Any) -> str:
    """Show a structure with `*` for leaves, such as `(*, {'mask': *})`."""
    try:
        return repr(tree_unflatten([_Leaf()] * structure.num_leaves, structure))
    except Exception:  # of a class that looks at what it is made of, as PackedSequence does
        return " ".join(str(structure).split())


class _Leaf:
    def __repr__(self) -> str:
        return "*"


def is_value(tree: Any) -> bool:
    """Whether all leaves are tensors or constants, and one at least is a tensor."""
    leaves = tree_leaves(tree)
    known = all(isinstance(leaf, (Tensor, *_CONSTANTS)) for leaf in leaves)
    return known and any(isinstance(leaf, Tensor) for leaf in leaves)


def tensor_leaves(tree: Any) -> list[Tensor]:
    """Give the tensors among a tree's leaves, in order: those that stages can hand on."""
    if isinstance(tree, Tensor):
        return [tree]
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def copied(tree: Any) -> Any:
    """Give a tree with copies of its tensors: a layer may work in place."""
    return tree_map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, tree)


def on_device(tree: Any, device: torch.device) -> Any:
    """Give a tree with its tensors on a device."""
    return tree_map(lambda leaf: leaf.to(device) if isinstance(leaf, Tensor) else leaf, tree)
