"""`CheckpointUploader`: copies a rank's part of a checkpoint, and sends or skips it."""

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


class BlockedUpload:
    """An uploader whose `put` waits for an event."""

    def __init__(self) -> None:
        self.gate, self.sent = threading.Event(), list[Delivery]()
        self.uploader = CheckpointUploader(1, 0, self.put, self.sent.append, 60.0)

    def put(self, arrays: list[Any]) -> list[Any]:
        assert self.gate.wait(60)
        return [array.copy() for array in arrays]


@pytest.fixture
def upload() -> Iterator[BlockedUpload]:
    upload = BlockedUpload()
    yield upload
    upload.gate.set()


def part(value: float, **more: Any) -> CheckpointPart:
    import torch

    entry = TensorEntry("model/w", TensorSlice((3,)), "float32", 0)
    return CheckpointPart((torch.full((3,), value),), (entry,), **more)


def test_copies_the_part_before_take_returns(upload: BlockedUpload) -> None:
    checkpoint_part = part(1.0)
    upload.uploader.take(5, checkpoint_part, {})
    checkpoint_part.tensors[0].fill_(9)
    upload.gate.set()
    upload.uploader.flush()
    [sent] = upload.sent
    assert sent.refs[0][0].view(np.float32).tolist() == [1, 1, 1]
    assert (sent.rank, sent.version, sent.entries) == (1, 5, (checkpoint_part.entries,))


def test_next_part_waits_for_the_previous_one_or_is_skipped(upload: BlockedUpload) -> None:
    upload.uploader.take(5, part(1.0), {})
    upload.uploader._limit_s = 0.2
    with pytest.raises(DeadlineExceeded, match=r"failure\.step_timeout_s"):
        upload.uploader.take(6, part(2.0), {})
    upload.uploader._limit_s = 60.0
    upload.uploader.take(7, part(3.0, may_skip=True), {})
    assert [(d.version, d.skipped, d.failure) for d in upload.sent] == [(7, True, "")]
    upload.uploader._limit_s = 0.0
    upload.uploader.take(8, part(3.0, may_skip=True), {})
    assert "failure.step_timeout_s" in upload.sent[1].failure, "it counts as failed"
    upload.uploader._limit_s = 60.0
    upload.gate.set()
    upload.uploader.take(9, part(4.0), {})
    upload.uploader.flush()
    assert [d.version for d in upload.sent] == [7, 8, 5, 9]


@pytest.mark.parametrize(
    ("error", "is_lost"),
    [
        (None, False),
        (DeadlineExceeded("kept", ("server-0",), 1.0, "x"), False),
        (InfrastructureError("the cluster fails"), False),
        (ActorLost("server-0", None, "killed"), True),
        (Abandoned("kept"), True),
    ],
)
def test_failed_fetch_skips_one_checkpoint(
    upload: BlockedUpload, error: DistplatError | None, is_lost: bool
) -> None:
    def fetch() -> None:
        if error is not None:
            raise error

    upload.gate.set()
    upload.uploader.take(5, part(1.0, fetch=fetch), {})
    upload.uploader.flush()
    assert [d.skipped for d in upload.sent] == [True]
    assert upload.sent[0].failure == ("" if error is None else str(error))
    assert upload.sent[0].lost is is_lost


def test_rank_without_a_part_sends_an_empty_delivery(upload: BlockedUpload) -> None:
    upload.uploader.take(5, CheckpointPart(), {"a": 1})
    upload.uploader.flush()
    assert upload.sent == [Delivery(1, 0, 5, facts={"a": 1})]
