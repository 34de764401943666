"""
What a rank gives to a checkpoint: its part of the model's state, by the names of the whole.

    flat.params          |  0.weight  |  0.bias  |pad|  2.weight  |        entries of `model/...`
    exp_avg, elements    .....[ 16 ------------ 48 ]..............         `optimizer/exp_avg/...`
    buffers              running_mean                                      `model/1.running_mean`

A part is a few long vectors and a list of what is in them. It is given between two steps and
copied at once; everything after that happens behind the training's back.
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
"""Vectors that have something of every parameter that is trained."""


def model_part(flat: FlatModel, holding: Holding = ALL) -> CheckpointPart:
    """
    Give a rank's model: trainable parameters, others, and buffers.

    Args:
        flat: the model.
        holding: what of the whole it is.
    """
    live = flat.trained_names()
    entries = vector_entries(flat, [vector_spec_of("model", flat.params)], 0, b"", holding, live)
    return CheckpointPart((flat.params,), tuple(entries)).plus(buffer_part(flat, holding))


def buffer_part(flat: FlatModel, holding: Holding) -> CheckpointPart:
    """Give what of a model is not trained: buffers and frozen parameters."""
    elsewhere = holding.others | flat.trained_names() | flat.unsaved
    rest = {k: v for k, v in flat.model.state_dict().items() if k not in elsewhere}
    return tensors_part("model", rest, holding.slices)


def tensors_part(
    file: str, tensors: Mapping[str, Tensor], slices: Mapping[str, TensorSlice] = ALL.slices
) -> CheckpointPart:
    """
    Give tensors, each in an array of its own.

    Args:
        file: of the checkpoint.
        tensors: by their names in it.
        slices: where one lies in the whole one, for those that are slabs.
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
    Give the state of an optimizer over a run of the flat vector.

    Args:
        flat: the model.
        state: see `FlatOptimizer.state`, `TaskUpdate.memory`.
        start: first element of the run.
        holding: see `model_part`.
    """
    if TREE in state:
        return tensors_part("optimizer", state)
    kinds, used = vector_specs_of(state)
    tensors = tuple(value for name, value in state.items() if name != USED)
    entries = vector_entries(flat, kinds, start, used, holding, flat.trained_names())
    return CheckpointPart(tensors, tuple(entries))


def server_part(
    flat: FlatModel, shards: Shards, version: int, *, may_skip: bool, holding: Holding = ALL
) -> CheckpointPart:
    """
    Give what server nodes keep of a version, and this rank's buffers.

    Args:
        flat: the model.
        shards: the port to the servers.
        version: steps.
        may_skip: see `CheckpointPart`.
        holding: see `model_part`.
    """
    live = flat.trained_names()  # in the step that this version follows, not when it is fetched

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
    """Say what an optimizer's state is made of, and, a byte each, of which parameters it is."""
    kinds = [vector_spec_of(f"optimizer/{k}", v) for k, v in state.items() if k != USED]
    return kinds, state[USED].numpy().tobytes() if USED in state else b""


def vector_spec_of(key: str, tensor: Tensor) -> VectorSpec:
    """Say what a vector, a number for each parameter, or a tensor of one parameter is."""
    if key.startswith(f"optimizer/{WHOLE}"):
        return VectorSpec(key, dtype_name(tensor), None, tuple(tensor.shape))
    plain = key.replace(f"optimizer/{PER_PARAMETER}", "optimizer/")
    return VectorSpec(plain, dtype_name(tensor), tensor.numel() if plain == key else None)


def vector_entries(
    flat: FlatModel,
    kinds: Sequence[VectorSpec],
    start: int,
    used: bytes,
    holding: Holding,
    live: Set[str],
) -> list[TensorEntry]:
    """
    Name what is in vectors over one run; the n-th array is that of the n-th kind.

    Args:
        flat: the model.
        kinds: of the vectors.
        start: first element of the run.
        used: a byte for each parameter, 0: an optimizer remembers nothing of it.
        holding: see `model_part`.
        live: names of the parameters whose values are those in the vector `model`, and whose
            average is one.
    """
    length = next((kind.length for kind in kinds if kind.length is not None), 0)
    entries = [
        _of_parameter(flat, n, kind) for n, kind in enumerate(kinds) if kind.shape is not None
    ]
    for index, first, last in flat.slots_in(start, start + length):
        slot = flat.slots[index]
        if slot.name in holding.others:
            continue
        for number, (key, dtype, vector, shape) in enumerate(kinds):
            if shape is not None:
                continue
            if slot.name not in live if key in _OF_LIVE else not used[index]:
                continue
            name = f"{key}/{slot.name}"
            if vector is None:
                entries.append(TensorEntry(name, TensorSlice(()), dtype, number, index))
                continue
            run, offset = flat.elements_of(slot, first, last, start)
            where = replace(holding.slices.get(slot.name, TensorSlice(slot.shape)), run=run)
            kind = str(slot.dtype).removeprefix("torch.")
            entries.append(TensorEntry(name, where, kind, number, offset))
    return entries


def _of_parameter(flat: FlatModel, number: int, kind: VectorSpec) -> TensorEntry:
    """Name a tensor that an optimizer remembers of one parameter: `kind.key` ends with its slot."""
    key, _, slot = kind.key.rpartition("/")
    assert kind.shape is not None, "it is of one parameter"
    name = f"{key}/{flat.slots[int(slot)].name}"
    return TensorEntry(name, TensorSlice(kind.shape), kind.dtype, number)


class Staging:
    """Copies of a rank's vectors, in memory that is used again for every checkpoint."""

    def __init__(self) -> None:
        self._copies: list[Tensor] = []

    def copy(self, tensors: Sequence[Tensor]) -> list[Bytes]:
        """Copy tensors of any device; the arrays are good until the next call."""
        for number, tensor in enumerate(tensors):
            if number == len(self._copies):
                self._copies.append(torch.empty(0))
            buffer = self._copies[number]
            if (buffer.dtype, buffer.numel()) != (tensor.dtype, tensor.numel()):
                self._copies[number] = buffer = torch.empty(tensor.numel(), dtype=tensor.dtype)
            buffer.view(tensor.shape).copy_(tensor.detach())
        return [as_array(copy) for copy in self._copies[: len(tensors)]]


def whole_of(tensor: Tensor) -> RawTensor:
    """View a contiguous tensor on the CPU as what travels."""
    return RawTensor(dtype_name(tensor), tuple(tensor.shape), as_array(tensor))


def as_array(tensor: Tensor) -> Bytes:
    """View a contiguous tensor on the CPU as bytes."""
    array: Bytes = tensor.detach().reshape(-1).view(torch.uint8).numpy()
    return array
