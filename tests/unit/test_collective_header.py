"""The header of a collective operation, and the check that all ranks call the same one."""

import pytest
import torch

from distplat.actors.collectives.header import (
    SIZE,
    Header,
    check_headers,
    check_message,
    header,
    offset_of,
    supported,
)
from distplat.platform.errors import MismatchError
from distplat.strategies.collective import SENDABLE, ReduceOp

ONES = torch.ones(7)


def mismatch_of(*headers: Header, rank: int = 0) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        check_headers("g", rank, headers)
    return caught.value


@pytest.mark.parametrize(
    ("operation", "text"),
    [
        (header("barrier"), "barrier"),
        (header("all_reduce", [ONES], ReduceOp.AVG), "all_reduce of 7 float32 by AVG"),
        (header("reduce", [ONES], ReduceOp.MAX, root=2), "reduce of 7 float32 by MAX to rank 2"),
        (header("broadcast", [ONES.long()], root=0), "broadcast of 7 int64 from rank 0"),
        (header("all_gather", [ONES, ONES[:3]]), "all_gather of 10 float32"),
        (
            header("all_reduce", [ONES], ReduceOp.SUM, offset=offset_of(3, 128)),
            "all_reduce of 7 float32 by SUM in shared vector 3 from byte 128",
        ),
    ],
)
def test_text_and_packing(operation: Header, text: str) -> None:
    assert str(operation) == text
    packed = operation.pack(5)
    assert len(packed) == SIZE
    assert Header.unpack(packed) == operation._replace(number=5)
    check_headers("g", 0, [operation, operation, operation])


def test_every_rank_names_the_minority() -> None:
    majority, other = header("barrier", number=4), header("all_reduce", [ONES], number=4)
    for rank, name in enumerate(("barrier", "all_reduce", "barrier")):
        error = mismatch_of(majority, other, majority, rank=rank)
        assert (error.missing, error.operation, error.number) == ((1,), name, 4)
        assert error.cause == "ranks 0, 2 in barrier; rank 1 in all_reduce of 7 float32"


def test_names_the_second_of_two_ranks() -> None:
    assert mismatch_of(header("barrier"), header("share", [ONES]), rank=1).missing == (1,)


def test_shows_sequence_numbers_that_differ() -> None:
    error = mismatch_of(header("barrier", number=3), header("barrier", number=4))
    assert error.cause == "rank 0 in barrier (#3); rank 1 in barrier (#4)"


@pytest.mark.parametrize(
    "other",
    [
        header("all_gather", [ONES[:3], ONES[:4]]),
        header("all_gather", [ONES[:4], ONES[:3]], offsets=[0, 16]),
    ],
)
def test_compares_sizes_and_offsets_of_parts(other: Header) -> None:
    error = mismatch_of(header("all_gather", [ONES[:4], ONES[:3]]), other)
    assert "the sizes of the ranks' parts differ, or their offsets" in error.cause


@pytest.mark.parametrize("mismatched", [ONES[:3], ONES.int()])
def test_check_message_rejects_other_size_or_dtype(mismatched: torch.Tensor) -> None:
    expected = header("send", [ONES], number=2)
    check_message("g", 0, 1, header("send", [ONES], number=2), expected)
    with pytest.raises(MismatchError, match=r"rank 0 sends .*; rank 1 expects 7 float32") as caught:
        check_message("g", 0, 1, header("send", [mismatched], number=2), expected)
    assert (caught.value.missing, caught.value.operation, caught.value.number) == ((0,), "recv", 2)


def test_each_supported_dtype_has_its_own_code() -> None:
    assert all(supported(dtype) for dtype in SENDABLE) and not supported(torch.complex64)
    codes = {header("send", [torch.ones(1).to(dtype)]).dtype for dtype in SENDABLE}
    assert len(codes) == len(SENDABLE) and -1 not in codes
