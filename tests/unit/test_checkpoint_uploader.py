"""A rank's part of a checkpoint: copied, sent off by a thread, skipped or waited for."""

import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from distplat.actors.checkpoint_uploader import CheckpointUploader
from distplat.platform.checkpoints import Delivery
from distplat.platform.errors import (
    Abandoned,
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    InfrastructureError,
)
from distplat.platform.tensor_slices import TensorEntry, TensorSlice
from distplat.strategies.checkpoint.checkpoint_types import CheckpointPart


class Slow:
    """Arrays that take their time to leave."""

    def __init__(self) -> None:
        self.gate, self.sent = threading.Event(), list[Delivery]()
        self.uploader = CheckpointUploader(1, 0, self.put, self.sent.append, 60.0)

    def put(self, arrays: list[Any]) -> list[Any]:
        assert self.gate.wait(60)
        return [array.copy() for array in arrays]


@pytest.fixture
def slow() -> Iterator[Slow]:
    slow = Slow()
    yield slow
    slow.gate.set()


def part(value: float, **more: Any) -> CheckpointPart:
    import torch

    entry = TensorEntry("model/w", TensorSlice((3,)), "float32", 0)
    return CheckpointPart((torch.full((3,), value),), (entry,), **more)


def test_a_part_is_copied_before_training_goes_on(slow: Slow) -> None:
    given = part(1.0)
    slow.uploader.take(5, given, {})
    given.tensors[0].fill_(9)
    slow.gate.set()
    slow.uploader.flush()
    [sent] = slow.sent
    assert sent.refs[0][0].view(np.float32).tolist() == [1, 1, 1]
    assert (sent.rank, sent.version, sent.entries) == (1, 5, (given.entries,))


def test_the_next_part_waits_for_the_last_one_or_is_skipped(slow: Slow) -> None:
    slow.uploader.take(5, part(1.0), {})
    slow.uploader._limit_s = 0.2
    with pytest.raises(DeadlineExceeded, match=r"failure\.step_timeout_s"):
        slow.uploader.take(6, part(2.0), {})
    slow.uploader._limit_s = 60.0
    slow.uploader.take(7, part(3.0, may_skip=True), {})
    assert [(d.version, d.skipped, d.failure) for d in slow.sent] == [(7, True, "")]
    slow.uploader._limit_s = 0.0
    slow.uploader.take(8, part(3.0, may_skip=True), {})
    assert "failure.step_timeout_s" in slow.sent[1].failure, "it counts as one that failed"
    slow.uploader._limit_s = 60.0
    slow.gate.set()
    slow.uploader.take(9, part(4.0), {})
    slow.uploader.flush()
    assert [d.version for d in slow.sent] == [7, 8, 5, 9]


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (None, False),
        (DeadlineExceeded("kept", ("server-0",), 1.0, "x"), False),
        (InfrastructureError("the cluster fails"), False),
        (ActorLost("server-0", None, "killed"), True),
        (Abandoned("kept"), True),
    ],
)
def test_servers_that_have_nothing_more_cost_one_checkpoint(
    slow: Slow, error: DistplatError | None, lost: bool
) -> None:
    def fetch() -> None:
        if error is not None:
            raise error

    slow.gate.set()
    slow.uploader.take(5, part(1.0, fetch=fetch), {})
    slow.uploader.flush()
    assert [d.skipped for d in slow.sent] == [True]
    assert slow.sent[0].failure == ("" if error is None else str(error))
    assert slow.sent[0].lost is lost


def test_a_rank_without_a_part_says_so(slow: Slow) -> None:
    slow.uploader.take(5, CheckpointPart(), {"a": 1})
    slow.uploader.flush()
    assert slow.sent == [Delivery(1, 0, 5, facts={"a": 1})]
