"""One check for all groups: have all ranks called the same operation?"""

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


def differing(*headers: Header, rank: int = 0) -> MismatchError:
    with pytest.raises(MismatchError) as caught:
        check_headers("g", rank, headers)
    return caught.value


@pytest.mark.parametrize(
    ("one", "text"),
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
def test_text_and_bytes(one: Header, text: str) -> None:
    assert str(one) == text
    packed = one.pack(5)
    assert len(packed) == SIZE
    assert Header.unpack(packed) == one._replace(number=5)
    check_headers("g", 0, [one, one, one])


def test_whoever_differs_from_most_is_named_by_all() -> None:
    most, other = header("barrier", number=4), header("all_reduce", [ONES], number=4)
    for rank, name in enumerate(("barrier", "all_reduce", "barrier")):
        error = differing(most, other, most, rank=rank)
        assert (error.missing, error.operation, error.number) == ((1,), name, 4)
        assert error.cause == "ranks 0, 2 in barrier; rank 1 in all_reduce of 7 float32"


def test_of_two_the_second_is_named() -> None:
    assert differing(header("barrier"), header("share", [ONES]), rank=1).missing == (1,)


def test_numbers_are_told_where_they_differ() -> None:
    error = differing(header("barrier", number=3), header("barrier", number=4))
    assert error.cause == "rank 0 in barrier (#3); rank 1 in barrier (#4)"


@pytest.mark.parametrize(
    "other",
    [
        header("all_gather", [ONES[:3], ONES[:4]]),
        header("all_gather", [ONES[:4], ONES[:3]], offsets=[0, 16]),
    ],
)
def test_sizes_and_places_of_parts_count(other: Header) -> None:
    error = differing(header("all_gather", [ONES[:4], ONES[:3]]), other)
    assert "the sizes of the ranks' parts differ, or their offsets" in error.cause


@pytest.mark.parametrize("wrong", [ONES[:3], ONES.int()])
def test_a_message_of_another_kind(wrong: torch.Tensor) -> None:
    expected = header("send", [ONES], number=2)
    check_message("g", 0, 1, header("send", [ONES], number=2), expected)
    with pytest.raises(MismatchError, match=r"rank 0 sends .*; rank 1 expects 7 float32") as caught:
        check_message("g", 0, 1, header("send", [wrong], number=2), expected)
    assert (caught.value.missing, caught.value.operation, caught.value.number) == ((0,), "recv", 2)


def test_each_dtype_that_travels_has_a_code_of_its_own() -> None:
    assert all(supported(dtype) for dtype in SENDABLE) and not supported(torch.complex64)
    codes = {header("send", [torch.ones(1).to(dtype)]).dtype for dtype in SENDABLE}
    assert len(codes) == len(SENDABLE) and -1 not in codes
