"""Splitting of tensors into the parts of ranks, and joining of the parts."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rank_threads import on_ranks

from distplat.platform.tensor_slices import TensorEntry, TensorSlice, assemble_tensors
from distplat.strategies.checkpoint.checkpoint_reader import tensor_of
from distplat.strategies.checkpoint.parts import as_array, whole_of
from distplat.strategies.fakes import Fabric
from distplat.strategies.tensor.parallel_layers import (
    gather_full,
    join_parts,
    take,
    tensor_slice_of,
)
from distplat.strategies.tensor.parallel_plan import ShardSpec, slice_of


@given(
    st.integers(1, 5), st.integers(1, 9), st.integers(1, 3), st.integers(1, 3), st.integers(0, 1)
)
def test_join_parts_inverts_take(world: int, units: int, unit: int, blocks: int, dim: int) -> None:
    world = min(world, units)
    shape = [4, 4]
    shape[dim] = size = blocks * units * unit
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    specs = [slice_of("w", dim, units, size, r, world, blocks=blocks) for r in range(world)]
    parts = [take(whole, spec) for spec in specs]
    assert [part.shape[dim] for part in parts] == [spec.extent for spec in specs]
    assert torch.equal(join_parts(parts, specs), whole)
    # Checkpoints split and assemble the same parts.
    raw = whole_of(whole)
    slices = [tensor_slice_of(part.shape, spec) for part, spec in zip(parts, specs, strict=True)]
    for part, tensor_slice in zip(parts, slices, strict=True):
        assert torch.equal(tensor_of(raw, tensor_slice).view(part.shape), part)
    entries = [TensorEntry("model/w", tensor_slice, "int64", 0) for tensor_slice in slices]
    bundles = [
        ([as_array(part.contiguous())], (entry,))
        for part, entry in zip(parts, entries, strict=True)
    ]
    assert assemble_tensors(bundles)["model/w"].data.tobytes() == raw.data.tobytes()


def test_slices_of_branches() -> None:
    local, remote = ShardSpec(0, 0, 6, 6), ShardSpec(0, 0, 0, 6)
    assert tensor_slice_of((6, 2), local) == TensorSlice((6, 2))
    assert tensor_slice_of((0, 2), remote) == TensorSlice((6, 2), (0, 0, 0))
    assert tensor_slice_of((6,), remote) == TensorSlice((6,)), (
        "a buffer of one dimension is not emptied"
    )
    assert tensor_slice_of((), ShardSpec(0, 0, 0, 1)) == TensorSlice(())


def test_take_copies_the_part() -> None:
    whole = torch.zeros(4)
    take(whole, ShardSpec(0, 1, 3, 4)).fill_(1)
    assert not whole.any()


def test_join_parts_rejects_incomplete_parts() -> None:
    with pytest.raises(ValueError, match="do not make up 6"):
        join_parts([torch.ones(2), torch.ones(2)], [ShardSpec(0, 0, 2, 6), ShardSpec(0, 2, 4, 6)])


def test_gather_full_returns_whole_tensors_on_rank_0() -> None:
    """A split tensor, a branch and a counter of another rank, and a replicated tensor."""
    fabric = Fabric(3)

    def gather(rank: int) -> dict[str, torch.Tensor]:
        last = rank == 2
        specs = {
            "split": slice_of("split", 0, 5, 5, rank, 3),
            "branch": ShardSpec(0, 0, 2 if last else 0, 2),
            "count": ShardSpec(0, 0, 1 if last else 0, 1),
        }
        state = {
            "split": take(torch.arange(5), specs["split"]),
            "branch": torch.tensor([3, 4]) if last else torch.empty(0, dtype=torch.int64),
            "count": torch.tensor(7 if last else 0),
            "same": torch.tensor([9]),
        }
        return gather_full(state, specs, fabric.collective(rank))

    first, second, third = on_ranks(3, gather)
    assert second == third == {}
    assert {name: tensor.tolist() for name, tensor in first.items()} == {
        "split": [0, 1, 2, 3, 4],
        "branch": [3, 4],
        "count": 7,
        "same": [9],
    }
