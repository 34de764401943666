"""
What a train function or an optimizer of the user's keeps, as tensors and JSON: never pickle.

    {"model": {"0.weight": tensor}, "epoch": 3}
    tree     {"dict": [["model", {"dict": [["0.weight", {"tensor": 0}]]}], ["epoch", 3]]}
    tensors  [tensor]

A dict keeps its order and the types of its keys, so that `state_dict()` of a model, an optimizer, a
scheduler and a scaler come back as they were.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from distplat.platform.errors import Problem, SpecError
from distplat.platform.tensor_slices import ITEM_BYTES
from distplat.strategies.directory_checkpoint import Checkpoint
from distplat.strategies.model.parameter_layout import dtype_name

_NO = "which no checkpoint can hold"


def pack(tree: Any, where: str = "checkpoint") -> tuple[Any, list[Tensor]]:
    """
    Take nested dicts, lists and tuples apart.

    Args:
        tree: of tensors, numpy's arrays, numbers, strings, None and directories (`Checkpoint`).
        where: what it is called in messages.

    Returns:
        What JSON can hold, and the tensors that it counts.

    Raises:
        SpecError: it holds something else; says where.
    """
    tensors: list[Tensor] = []
    return _packed(tree, tensors, where), tensors


def unpack(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """Put together what `pack` took apart."""
    if not isinstance(tree, Mapping):
        return tree
    ((kind, held),) = tree.items()
    if kind == "tensor":
        return tensors[held]
    if kind == "array":
        return tensors[held].cpu().clone().numpy()
    if kind == "files":
        return Checkpoint({name: tensors[number] for name, number in held})
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in held}
    items = [unpack(one, tensors) for one in held]
    return tuple(items) if kind == "tuple" else items


def has_tensors(tree: Any) -> bool:
    """Say whether what `pack` gave counts any tensors."""
    if not isinstance(tree, Mapping):
        return False
    ((kind, held),) = tree.items()
    if kind in ("dict", "list", "tuple"):
        return any(has_tensors(one[1] if kind == "dict" else one) for one in held)
    return True


def _packed(tree: Any, tensors: list[Tensor], where: str) -> Any:
    if isinstance(tree, Tensor):
        if dtype_name(tree) not in ITEM_BYTES or tree.layout is not torch.strided:
            sparse = "" if tree.layout is torch.strided else f" and {tree.layout}"
            kind = f"a tensor of {dtype_name(tree)}{sparse}"
            hint = "torch.view_as_real() of complex numbers, to_dense() of sparse ones"
            raise SpecError(Problem(("checkpoint",), f"{where} is {kind}, {_NO}", hint))
        tensors.append(tree.detach().contiguous())
        return {"tensor": len(tensors) - 1}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, np.ndarray) and tree.shape:
        return {"array": _packed(_as_tensor(tree, where), tensors, where)["tensor"]}
    if isinstance(tree, Checkpoint):
        first = len(tensors)
        tensors.extend(tree.files.values())
        return {"files": [[name, first + n] for n, name in enumerate(tree.files)]}
    if isinstance(tree, Mapping):
        return {
            "dict": [
                [_key(k, where), _packed(v, tensors, f"{where}[{k!r}]")] for k, v in tree.items()
            ]
        }
    if isinstance(tree, list | tuple):
        items = [_packed(one, tensors, f"{where}[{n}]") for n, one in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    if callable(getattr(tree, "item", None)) and getattr(tree, "shape", None) == ():
        return _packed(tree.item(), tensors, where)  # a number of numpy
    raise _refused(where, f"a {type(tree).__name__}")


def _as_tensor(array: NDArray[Any], where: str) -> Tensor:
    """Copy an array, such as those in the state of numpy's generators."""
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError):  # texts, objects, records, another order of bytes
        raise _refused(where, f"an array of {array.dtype}") from None


def _refused(where: str, what: str) -> SpecError:
    hint = (
        "tensors, arrays, numbers, strings and None, in dicts, lists and tuples: state_dict() of "
        "most"
    )
    return SpecError(Problem(("checkpoint",), f"{where} is {what}, {_NO}", hint))


def _key(key: object, where: str) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[return-value]
    text = f"{where} has the key {key!r}: keys are strings or whole numbers"
    raise SpecError(Problem(("checkpoint",), text))
