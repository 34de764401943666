"""
A rank's part of a checkpoint: its part of the model's state, by the names of the whole model.

    flat.params          |  0.weight  |  0.bias  |pad|  2.weight  |        entries of `model/...`
    exp_avg, elements    .....[ 16 ------------ 48 ]..............         `optimizer/exp_avg/...`
    buffers              running_mean                                      `model/1.running_mean`

A part has a few long vectors and a list of their entries. Its vectors are copied between two steps;
everything after the copy runs in the background.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence, Set
from dataclasses import replace

import torch
from torch import Tensor

from distplat.platform.tensor_slices import Bytes, RawTensor, TensorEntry, TensorSlice
from distplat.strategies.checkpoint.checkpoint_types import ALL, ArrayRefs, CheckpointPart, Holding
from distplat.strategies.model.ema import AVERAGE, AVERAGED
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optimizer_state import PER_PARAMETER, TREE, USED, WHOLE
from distplat.strategies.model.parameter_layout import dtype_name
from distplat.strategies.ports import Shards, VectorSpec

_OF_LIVE = {"model", f"optimizer/{AVERAGE}", f"optimizer/{AVERAGED}"}
"""Vectors with values of every trained parameter."""


def model_part(flat: FlatModel, holding: Holding = ALL) -> CheckpointPart:
    """
    Return a rank's model: trainable and frozen parameters, and buffers.

    Args:
        flat: the model.
        holding: the part of the whole that `flat` is.
    """
    live = flat.trained_names()
    entries = vector_entries(flat, [vector_spec_of("model", flat.params)], 0, b"", holding, live)
    return CheckpointPart((flat.params,), tuple(entries)).plus(buffer_part(flat, holding))


def buffer_part(flat: FlatModel, holding: Holding) -> CheckpointPart:
    """Return the untrained tensors of a model: buffers and frozen parameters."""
    excluded = holding.others | flat.trained_names() | flat.unsaved
    tensors = {k: v for k, v in flat.model.state_dict().items() if k not in excluded}
    return tensors_part("model", tensors, holding.slices)


def tensors_part(
    file: str, tensors: Mapping[str, Tensor], slices: Mapping[str, TensorSlice] = ALL.slices
) -> CheckpointPart:
    """
    Return tensors, each in an array of its own.

    Args:
        file: file of the checkpoint.
        tensors: tensors by name in the file.
        slices: slice of the whole tensor that each split tensor has.
    """
    entries = [
        TensorEntry(
            f"{file}/{name}",
            slices.get(name, TensorSlice(tuple(value.shape))),
            dtype_name(value),
            number,
        )
        for number, (name, value) in enumerate(tensors.items())
    ]
    return CheckpointPart((*tensors.values(),), tuple(entries))


def optimizer_part(
    flat: FlatModel, state: Mapping[str, Tensor], start: int, holding: Holding = ALL
) -> CheckpointPart:
    """
    Return the state of an optimizer for a range of the flat vector.

    Args:
        flat: the model.
        state: see `FlatOptimizer.state`, `TaskUpdate.memory`.
        start: first element of the range.
        holding: see `model_part`.
    """
    if TREE in state:
        return tensors_part("optimizer", state)
    specs, used = vector_specs_of(state)
    tensors = tuple(value for name, value in state.items() if name != USED)
    entries = vector_entries(flat, specs, start, used, holding, flat.trained_names())
    return CheckpointPart(tensors, tuple(entries))


def server_part(
    flat: FlatModel, shards: Shards, version: int, *, may_skip: bool, holding: Holding = ALL
) -> CheckpointPart:
    """
    Return the server nodes' state of a version, fetched later, and this rank's buffers.

    Args:
        flat: the model.
        shards: the port to the servers.
        version: number of steps.
        may_skip: see `CheckpointPart`.
        holding: see `model_part`.
    """
    live = flat.trained_names()  # as of this version; `fetch` may run after later steps

    def fetch() -> ArrayRefs | None:
        copies = shards.copies(version)
        if copies is None:
            return None
        return [
            (c.ref, tuple(vector_entries(flat, c.specs, c.start, c.used, holding, live)))
            for c in copies
        ]

    return replace(buffer_part(flat, holding), fetch=fetch, may_skip=may_skip)


def vector_specs_of(state: Mapping[str, Tensor]) -> tuple[list[VectorSpec], bytes]:
    """Return the specs of an optimizer's vectors, and a byte per parameter, 0: it has no state."""
    specs = [vector_spec_of(f"optimizer/{k}", v) for k, v in state.items() if k != USED]
    return specs, state[USED].numpy().tobytes() if USED in state else b""


def vector_spec_of(key: str, tensor: Tensor) -> VectorSpec:
    """Return the spec of a vector, of one number per parameter, or of one parameter's tensor."""
    if key.startswith(f"optimizer/{WHOLE}"):
        return VectorSpec(key, dtype_name(tensor), None, tuple(tensor.shape))
    plain = key.replace(f"optimizer/{PER_PARAMETER}", "optimizer/")
    return VectorSpec(plain, dtype_name(tensor), tensor.numel() if plain == key else None)


def vector_entries(
    flat: FlatModel,
    specs: Sequence[VectorSpec],
    start: int,
    used: bytes,
    holding: Holding,
    live: Set[str],
) -> list[TensorEntry]:
    """
    List the entries of vectors over one range; the n-th array is that of the n-th spec.

    Args:
        flat: the model.
        specs: specs of the vectors.
        start: first element of the range.
        used: a byte for each parameter; 0: the parameter has no optimizer state.
        holding: see `model_part`.
        live: names of the trained parameters, which have entries in `model` and in averages.
    """
    length = next((spec.length for spec in specs if spec.length is not None), 0)
    entries = [
        _parameter_entry(flat, n, spec) for n, spec in enumerate(specs) if spec.shape is not None
    ]
    for index, first, last in flat.slots_in(start, start + length):
        slot = flat.slots[index]
        if slot.name in holding.others:
            continue
        for number, (key, dtype, vector_length, shape) in enumerate(specs):
            if shape is not None:
                continue
            if slot.name not in live if key in _OF_LIVE else not used[index]:
                continue
            name = f"{key}/{slot.name}"
            if vector_length is None:
                entries.append(TensorEntry(name, TensorSlice(()), dtype, number, index))
                continue
            run, offset = flat.elements_of(slot, first, last, start)
            where = replace(holding.slices.get(slot.name, TensorSlice(slot.shape)), run=run)
            slot_dtype = str(slot.dtype).removeprefix("torch.")
            entries.append(TensorEntry(name, where, slot_dtype, number, offset))
    return entries


def _parameter_entry(flat: FlatModel, number: int, spec: VectorSpec) -> TensorEntry:
    """Return the entry of one parameter's state tensor; `spec.key` ends with the slot's index."""
    key, _, slot = spec.key.rpartition("/")
    assert spec.shape is not None, "the spec is of one parameter's tensor"
    name = f"{key}/{flat.slots[int(slot)].name}"
    return TensorEntry(name, TensorSlice(spec.shape), spec.dtype, number)


class Staging:
    """Copies of a rank's vectors, in buffers reused for every checkpoint."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def copy(self, tensors: Sequence[Tensor]) -> list[Bytes]:
        """Copy tensors of any device; the arrays are valid until the next call."""
        for number, tensor in enumerate(tensors):
            if number == len(self._copies):
                self._copies.append(torch.empty(0))
            buffer = self._copies[number]
            if (buffer.dtype, buffer.numel()) != (tensor.dtype, tensor.numel()):
                self._copies[number] = buffer = torch.empty(tensor.numel(), dtype=tensor.dtype)
            buffer.view(tensor.shape).copy_(tensor.detach())
        return [as_array(copy) for copy in self._copies[: len(tensors)]]


def whole_of(tensor: Tensor) -> RawTensor:
    """View a contiguous tensor on the CPU as a `RawTensor`."""
    return RawTensor(dtype_name(tensor), tuple(tensor.shape), as_array(tensor))


def as_array(tensor: Tensor) -> Bytes:
    """View a contiguous tensor on the CPU as bytes."""
    array: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array
