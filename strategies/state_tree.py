"""
Convert the state of a train function or of a user's optimizer to tensors and JSON, without pickle.

    {"model": {"0.weight": tensor}, "epoch": 3}
    tree     {"dict": [["model", {"dict": [["0.weight", {"tensor": 0}]]}], ["epoch", 3]]}
    tensors  [tensor]

Dicts keep their order and the types of their keys, so the `state_dict()` of a model, an optimizer,
a scheduler or a scaler is restored exactly.
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

_UNSUPPORTED = "which no checkpoint can hold"


def pack(tree: Any, where: str = "checkpoint") -> tuple[Any, list[Tensor]]:
    """
    Convert nested dicts, lists and tuples to a JSON tree and a list of tensors.

    Args:
        tree: tensors, numpy arrays, numbers, strings, None and directories (`Checkpoint`), in any
            nesting.
        where: the name of the value in messages.

    Returns:
        The JSON tree, and the tensors that it refers to by index.

    Raises:
        SpecError: The tree contains another type; the message says where.
    """
    tensors: list[Tensor] = []
    return _pack(tree, tensors, where), tensors


def unpack(tree: Any, tensors: Sequence[Tensor]) -> Any:
    """Restore the value that `pack` converted."""
    if not isinstance(tree, Mapping):
        return tree
    ((tag, content),) = tree.items()
    if tag == "tensor":
        return tensors[content]
    if tag == "array":
        return tensors[content].cpu().clone().numpy()
    if tag == "files":
        return Checkpoint({name: tensors[index] for name, index in content})
    if tag == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    items = [unpack(item, tensors) for item in content]
    return tuple(items) if tag == "tuple" else items


def has_tensors(tree: Any) -> bool:
    """Return whether a tree that `pack` returned refers to any tensors."""
    if not isinstance(tree, Mapping):
        return False
    ((tag, content),) = tree.items()
    if tag in ("dict", "list", "tuple"):
        return any(has_tensors(item[1] if tag == "dict" else item) for item in content)
    return True


def _pack(tree: Any, tensors: list[Tensor], where: str) -> Any:
    if isinstance(tree, Tensor):
        if dtype_name(tree) not in ITEM_BYTES or tree.layout is not torch.strided:
            sparse = "" if tree.layout is torch.strided else f" and {tree.layout}"
            found = f"a tensor of {dtype_name(tree)}{sparse}"
            hint = "torch.view_as_real() of complex numbers, to_dense() of sparse ones"
            raise SpecError(Problem(("checkpoint",), f"{where} is {found}, {_UNSUPPORTED}", hint))
        tensors.append(tree.detach().contiguous())
        return {"tensor": len(tensors) - 1}
    if tree is None or type(tree) in (bool, int, float, str):
        return tree
    if isinstance(tree, np.ndarray) and tree.shape:
        return {"array": _pack(_as_tensor(tree, where), tensors, where)["tensor"]}
    if isinstance(tree, Checkpoint):
        first = len(tensors)
        tensors.extend(tree.files.values())
        return {"files": [[name, first + n] for n, name in enumerate(tree.files)]}
    if isinstance(tree, Mapping):
        return {
            "dict": [
                [_key(k, where), _pack(v, tensors, f"{where}[{k!r}]")] for k, v in tree.items()
            ]
        }
    if isinstance(tree, list | tuple):
        items = [_pack(item, tensors, f"{where}[{n}]") for n, item in enumerate(tree)]
        return {"tuple" if isinstance(tree, tuple) else "list": items}
    if callable(getattr(tree, "item", None)) and getattr(tree, "shape", None) == ():
        return _pack(tree.item(), tensors, where)  # a numpy scalar
    raise _unsupported(where, f"a {type(tree).__name__}")


def _as_tensor(array: NDArray[Any], where: str) -> Tensor:
    """Copy an array, such as the ones in the state of numpy's generators."""
    try:
        return torch.from_numpy(array.copy())
    except (TypeError, ValueError):  # strings, objects, records, non-native byte order
        raise _unsupported(where, f"an array of {array.dtype}") from None


def _unsupported(where: str, what: str) -> SpecError:
    hint = (
        "tensors, arrays, numbers, strings and None, in dicts, lists and tuples: state_dict() of "
        "most"
    )
    return SpecError(Problem(("checkpoint",), f"{where} is {what}, {_UNSUPPORTED}", hint))


def _key(key: object, where: str) -> str | int:
    if type(key) in (str, int):
        return key  # type: ignore[return-value]
    text = f"{where} has the key {key!r}: keys are strings or whole numbers"
    raise SpecError(Problem(("checkpoint",), text))
