"""
Load a checkpoint: each rank reads its own part, independent of which rank saved it.

A checkpoint has whole tensors under the model's names; a rank loads its range or slice of them.
So a run can resume under another strategy, or with another number of workers or servers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from distplat.platform.errors import Problem, SpecError
from distplat.platform.resume import FROZEN, name_differences
from distplat.platform.sampler import ENDLESS
from distplat.platform.shard_map import TableSpec, file_of
from distplat.platform.tensor_slices import RawTensor, TensorSlice, extract_part
from distplat.strategies.checkpoint.frozen_base import Checksums, check_base
from distplat.strategies.model.ema import AVERAGE, AVERAGED
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.optimizer_state import NUMBERS, PER_PARAMETER, TREE, USED, WHOLE
from distplat.strategies.model.parameter_layout import dtype_name

Load = Callable[[str], Mapping[str, RawTensor]]
"""Loads the tensors of one file, such as `model` or `optimizer`."""


class SavedState:
    """
    The checkpoint that a run resumes from.

    Args:
        state: content of `state.json`.
        load: loads the tensors of a file; called lazily.
    """

    def __init__(self, state: Mapping[str, Any], load: Load) -> None:
        self.state, self._load = state, load

    @property
    def step(self) -> int:
        """Number of steps completed at the checkpoint."""
        return int(self.state["step"])

    @property
    def left_out(self) -> Checksums | None:
        """Checksums of the parameters that the checkpoint omits; None: it is complete."""
        return self.state.get(FROZEN)

    def check_data(self, samples: int) -> None:
        """
        Check that the data set has the checkpoint's size.

        Raises:
            SpecError: the sizes differ, so the saved position is meaningless.
        """
        had = self.state.get("samples", samples)
        if had != samples:
            was, now = (str(n) if n != ENDLESS else "a stream of unknown" for n in (had, samples))
            text = f"the checkpoint was made with {was} training samples, the task has {now}"
            raise SpecError(Problem(("task",), text))

    def check_tables(self, tables: Sequence[TableSpec]) -> None:
        """
        Check that the model has the checkpoint's embedding tables.

        Raises:
            SpecError: the tables differ; lists the differences.
        """
        had = {facts["name"]: facts for facts in self.state.get("tables", [])}
        has = {table.name: asdict(table) for table in tables}
        lines = name_differences({*had}, {*has})
        for name in had.keys() & has.keys():
            differ = [f for f, value in has[name].items() if had[name].get(f) != value]
            lines += [f"{name!r} has {f} {has[name][f]}, had {had[name].get(f)}" for f in differ]
        if lines:
            text = f"the checkpoint has other embedding tables: {'; '.join(sorted(lines)[:6])}"
            raise SpecError(Problem(("task",), text))

    @property
    def table_files(self) -> tuple[str, ...]:
        """Names of the files with embedding tables."""
        servers = self.state.get("embeddings", {}).get("servers", 0)
        return tuple(file_of(server) for server in range(servers))

    def file(self, name: str) -> dict[str, Tensor]:
        """Return writable copies of a file's whole tensors, by name."""
        raw = self._load(name).items()
        return {k: tensor_of(v, TensorSlice(v.shape)).view(v.shape).clone() for k, v in raw}

    def tables(self) -> Iterator[Mapping[str, RawTensor]]:
        """Load the embedding tables, one file at a time."""
        return (self._load(name) for name in self.table_files)

    def load_model(self, flat: FlatModel, slices: Mapping[str, TensorSlice] | None = None) -> None:
        """
        Load the weights into a model, in place, and set its version.

        Args:
            flat: the model.
            slices: slice of the whole tensor that each split parameter has. If the model is a part
                of the whole, `slices` must have its unsplit parameters too.

        Raises:
            SpecError: the checkpoint is of another model; lists the differences.
        """
        saved = self._load("model")
        state = flat.state_dict()
        left_out = {n: sums for n, sums in (self.left_out or {}).items() if n not in saved}
        check_base(state, left_out)
        state = {name: tensor for name, tensor in state.items() if name not in left_out}
        _check_model(saved, state, slices)
        for name, tensor in state.items():
            tensor_slice = (slices or {}).get(name, TensorSlice(tuple(tensor.shape)))
            tensor.copy_(tensor_of(saved[name], tensor_slice).view(tensor.shape))
        flat.fill_tail()
        flat.version = self.step

    def optimizer(
        self,
        flat: FlatModel,
        start: int = 0,
        stop: int | None = None,
        slices: Mapping[str, TensorSlice] | None = None,
    ) -> dict[str, Tensor]:
        """
        Return the optimizer state of a range of the flat vector, by torch's names.

        Args:
            flat: the model.
            start: first element of the range.
            stop: end of the range, exclusive; None: the end of the vector.
            slices: see `load_model`.

        Returns:
            See `FlatOptimizer.state`; parameters without state in the checkpoint start without it.
            For a task's own optimizer the whole state, see `TaskUpdate.memory`.
        """
        saved = self._load("optimizer")
        if not saved:
            return {}
        if TREE in saved:
            return self.file("optimizer")
        stop = flat.size if stop is None else stop
        used = torch.zeros(len(flat.slots), dtype=torch.bool)
        result: dict[str, Tensor] = {}
        for kind in dict.fromkeys(key.partition("/")[0] for key in saved):
            if kind == WHOLE.rstrip("/"):
                result |= _whole_tensors(saved, flat, (start, stop))
            elif kind in saved or kind in NUMBERS:
                result[PER_PARAMETER + kind] = _numbers(saved, kind, flat, used)
            else:
                result[kind] = _vector(saved, kind, flat, (start, stop), used, slices or {})
        return {**result, USED: used}


def _numbers(saved: Mapping[str, RawTensor], kind: str, flat: FlatModel, used: Tensor) -> Tensor:
    """
    Return one number per parameter; older checkpoints have one for all parameters.

    Marks the parameters with state in `used`.
    """
    shared = kind in saved
    keys = [kind if shared else f"{kind}/{slot.name}" for slot in flat.slots]
    values = [tensor_of(saved[key], TensorSlice(())) if key in saved else None for key in keys]
    dtype = next((value.dtype for value in values if value is not None), torch.float32)
    result = torch.zeros(len(keys), dtype=dtype)
    for index, value in enumerate(values):
        if value is not None:
            result[index] = value
            used[index] |= not shared and kind != AVERAGED
    return result


def _whole_tensors(
    saved: Mapping[str, RawTensor], flat: FlatModel, run: tuple[int, int]
) -> dict[str, Tensor]:
    """Return state tensors of arbitrary shape, of the parameters inside a range."""
    start, stop = run
    numbers = {s.name: n for n, s in enumerate(flat.slots) if start <= s.offset and s.stop <= stop}
    result = {}
    for key, raw in saved.items():
        kind, _, name = key.removeprefix(WHOLE).partition("/")
        if key.startswith(WHOLE) and name in numbers:
            values = tensor_of(raw, TensorSlice(raw.shape)).view(raw.shape)
            result[f"{WHOLE}{kind}/{numbers[name]}"] = values
    return result


def _vector(
    saved: Mapping[str, RawTensor],
    kind: str,
    flat: FlatModel,
    run: tuple[int, int],
    used: Tensor,
    slices: Mapping[str, TensorSlice],
) -> Tensor:
    """Return a range of a state vector; marks the parameters with optimizer state in `used`."""
    start, stop = run
    for index, slot in enumerate(flat.slots):
        used[index] |= f"{kind}/{slot.name}" in saved and kind != AVERAGE
    result = flat.params.new_zeros(stop - start, device="cpu")
    if kind == AVERAGE:  # the average of a frozen parameter is its value
        result.copy_(flat.params[start:stop])
    for index, first, last in flat.slots_in(start, stop):
        slot = flat.slots[index]
        key = f"{kind}/{slot.name}"
        if key in saved:
            part, _ = flat.elements_of(slot, first, last, start)
            where = replace(slices.get(slot.name, TensorSlice(slot.shape)), run=part)
            target = result[first - start : last - start]
            values = tensor_of(saved[key], where).reshape(-1)
            (target.view(slot.dtype) if flat.mixed else target).copy_(values)
    return result


def tensor_of(whole: RawTensor, tensor_slice: TensorSlice) -> Tensor:
    """Copy a part of a whole tensor, shape [elements]; [] if the whole is a scalar."""
    part = np.ascontiguousarray(extract_part(whole, tensor_slice))
    values = torch.from_numpy(part).view(getattr(torch, whole.dtype))
    return values if tensor_slice.shape else values.view(())


def _check_model(
    saved: Mapping[str, RawTensor],
    mine: Mapping[str, Tensor],
    slices: Mapping[str, TensorSlice] | None,
) -> None:
    """Check names, shapes and dtypes; with `slices` the model may be a part of the whole."""
    names = {*saved} & {*mine} if slices is not None else {*saved}
    lines = name_differences(names, {*mine})
    for name in saved.keys() & mine.keys():
        tensor_slice = (slices or {}).get(name, TensorSlice(tuple(mine[name].shape)))
        had, has = saved[name], mine[name]
        if had.shape != tensor_slice.shape:
            lines.append(
                f"{name!r} is {[*had.shape]} in the checkpoint, {[*tensor_slice.shape]} here"
            )
        elif had.dtype != dtype_name(has):
            lines.append(f"{name!r} is {had.dtype} in the checkpoint, {dtype_name(has)} here")
    if lines:
        shown = "; ".join(sorted(lines)[:6]) + ("; ..." if len(lines) > 6 else "")
        raise SpecError(Problem(("task",), f"the checkpoint is of another model: {shown}"))
