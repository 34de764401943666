"""Full tensors cut into the ranks' parts and put together again."""

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
def test_what_is_cut_can_be_joined(
    world: int, units: int, unit: int, blocks: int, dim: int
) -> None:
    world = min(world, units)
    shape = [4, 4]
    shape[dim] = size = blocks * units * unit
    whole = torch.arange(shape[0] * shape[1]).view(shape)
    specs = [slice_of("w", dim, units, size, r, world, blocks=blocks) for r in range(world)]
    parts = [take(whole, spec) for spec in specs]
    assert [part.shape[dim] for part in parts] == [spec.extent for spec in specs]
    assert torch.equal(join_parts(parts, specs), whole)
    # A checkpoint takes the same parts of it, and puts the same together.
    kept = whole_of(whole)
    slices = [tensor_slice_of(part.shape, spec) for part, spec in zip(parts, specs, strict=True)]
    for part, one in zip(parts, slices, strict=True):
        assert torch.equal(tensor_of(kept, one).view(part.shape), part)
    entries = [TensorEntry("model/w", one, "int64", 0) for one in slices]
    bundles = [
        ([as_array(part.contiguous())], (entry,))
        for part, entry in zip(parts, entries, strict=True)
    ]
    assert assemble_tensors(bundles)["model/w"].data.tobytes() == kept.data.tobytes()


def test_where_parts_of_branches_lie() -> None:
    here, elsewhere = ShardSpec(0, 0, 6, 6), ShardSpec(0, 0, 0, 6)
    assert tensor_slice_of((6, 2), here) == TensorSlice((6, 2))
    assert tensor_slice_of((0, 2), elsewhere) == TensorSlice((6, 2), (0, 0, 0))
    assert tensor_slice_of((6,), elsewhere) == TensorSlice((6,)), "a buffer, which is not emptied"
    assert tensor_slice_of((), ShardSpec(0, 0, 0, 1)) == TensorSlice(())


def test_parts_are_tensors_of_their_own() -> None:
    whole = torch.zeros(4)
    take(whole, ShardSpec(0, 1, 3, 4)).fill_(1)
    assert not whole.any()


def test_what_does_not_make_up_a_whole_is_refused() -> None:
    with pytest.raises(ValueError, match="do not make up 6"):
        join_parts([torch.ones(2), torch.ones(2)], [ShardSpec(0, 0, 2, 6), ShardSpec(0, 2, 4, 6)])


def test_one_rank_gets_all_in_full() -> None:
    """Of a split tensor, one of another rank, a counter of a branch, and one that all have."""
    fabric = Fabric(3)

    def body(rank: int) -> dict[str, torch.Tensor]:
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

    first, second, third = on_ranks(3, body)
    assert second == third == {}
    assert {name: tensor.tolist() for name, tensor in first.items()} == {
        "split": [0, 1, 2, 3, 4],
        "branch": [3, 4],
        "count": 7,
        "same": [9],
    }
