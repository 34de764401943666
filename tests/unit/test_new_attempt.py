"""A shard server in a new attempt: waiting pushes end, late messages are rejected."""

import threading

import pytest
import torch
from control_records import full_record
from delayed import async_plan, noise
from torch import Tensor

from distplat.actors.servers.vector_transport import as_bytes, as_type, from_bytes
from distplat.platform.errors import FencedError
from distplat.platform.ledger import PullId, PushId
from distplat.platform.spec import SYNCHRONOUS, Consistency
from distplat.strategies.server.server import ServerLimits, ShardServer

SIZE, WORLD, STEPS = 9, 2, 6
LONG = ServerLimits(10.0, 10.0)

RECORD = full_record()


def open_server(consistency: Consistency) -> ShardServer:
    server = ShardServer("server-0", async_plan(WORLD, STEPS, consistency), LONG, torch.zeros(SIZE))
    server.restore(0, lambda params: params.fill_(1.0))
    return server


def push(server: ShardServer, rank: int, seq: int, attempt: int, task: int | None = None) -> int:
    values = torch.zeros(SIZE)
    name = PushId("run", attempt, rank, seq, task)
    answer = server.push(
        name, noise(SIZE, rank, seq), RECORD, lambda new, version: values.copy_(new)
    )
    assert torch.equal(values, server.params) or attempt == 1
    return answer.version


def push_from_all(server: ShardServer, seq: int, attempt: int) -> None:
    threads = [threading.Thread(target=push, args=(server, r, seq, attempt)) for r in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_renew_ends_a_push_that_waits_for_a_lost_rank() -> None:
    server = open_server(SYNCHRONOUS)
    push_from_all(server, 0, 1)
    errors: list[BaseException] = []
    waiting = threading.Event()

    def wait() -> None:
        waiting.set()
        try:
            push(server, 0, 1, 1)
        except FencedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waiting.wait(60)
    while not server.exclusively(lambda: _staged(server) == [0]):
        pass
    server.exclusively(lambda: server.renew(2))
    thread.join(60)
    assert not thread.is_alive()
    assert ["attempt 1 is over" in str(error) for error in errors] == [True]


def _staged(server: ShardServer) -> list[int]:
    missing: list[int] = server.store.ledger.missing()
    return [rank for rank in range(WORLD) if rank not in missing]


def test_all_ranks_push_a_step_in_flight_again() -> None:
    server, unfailed = open_server(SYNCHRONOUS), open_server(SYNCHRONOUS)
    push_from_all(server, 0, 1)
    server.store.push(PushId("run", 1, 0, 1), noise(SIZE, 0, 1))
    server.exclusively(lambda: server.renew(2))
    with pytest.raises(FencedError, match="attempt 1 refused"):
        push(server, 1, 1, 1)  # of the lost rank: must not count in addition to the new rank's
    push_from_all(server, 1, 2)
    for seq in range(2):
        push_from_all(unfailed, seq, 1)
    assert torch.equal(server.params, unfailed.params)


def test_asynchronous_pushes_restart_at_0_and_tasks_stay_done() -> None:
    server = open_server(Consistency(asynchronous=True))
    for seq, task in enumerate((0, 1, 3)):
        push(server, 0, seq, 1, task)
    server.exclusively(lambda: server.renew(2))
    answers = [server.pull(PullId(2, rank, 0), _discard) for rank in range(WORLD)]
    assert [answer.done for answer in answers] == [1, 1]
    with pytest.raises(FencedError):
        push(server, 0, 3, 1, 2)
    server.forget_push_reply(0)  # the worker has new vectors
    push(server, 0, 0, 2, 3)
    push(server, 1, 0, 2, 2)
    assert (server.store.version, server.store.steps) == (4, 2)


def test_pull_of_an_earlier_attempt_is_rejected() -> None:
    server = open_server(SYNCHRONOUS)
    server.pull(PullId(1, 0, 7), _discard)
    server.exclusively(lambda: server.renew(2))
    server.pull(PullId(2, 0, 0), _discard)
    with pytest.raises(FencedError, match="a pull of attempt 1 refused"):
        server.pull(PullId(1, 0, 8), _discard)


def test_forget_push_reply_delivers_the_last_answer_again() -> None:
    server = open_server(Consistency(asynchronous=True))
    delivered: list[Tensor] = []

    def deliver(values: Tensor, version: int) -> None:
        delivered.append(values)

    name, gradient = PushId("run", 1, 0, 0, 0), noise(SIZE, 0, 0)
    server.push(name, gradient, RECORD, deliver)
    server.push(name, gradient, RECORD, deliver)
    assert len(delivered) == 1
    server.forget_push_reply(0)
    server.push(name, gradient, RECORD, deliver)
    assert len(delivered) == 2
    assert server.store.version == 1


def test_second_renew_keeps_staged_pushes() -> None:
    server = open_server(SYNCHRONOUS)
    server.exclusively(lambda: server.renew(2))
    server.store.push(PushId("run", 2, 0, 0), noise(SIZE, 0, 0))
    server.exclusively(lambda: server.renew(2))
    assert _staged(server) == [0]


@pytest.mark.parametrize("wire", [None, "float16", "bfloat16"])
def test_vectors_are_rounded_to_the_wire_dtype(wire: str | None) -> None:
    vector = torch.tensor([0.0, 1.0, -2.5, 1e-3])
    dtype = torch.float32 if wire is None else getattr(torch, wire)
    sent = as_bytes(as_type(vector, wire))
    sent.flags.writeable = False  # as from Ray's object store
    assert sent.nbytes == vector.numel() * dtype.itemsize
    assert torch.equal(from_bytes(sent, dtype), vector.to(dtype))


def _discard(values: Tensor, version: int) -> None:
    """Discard the values."""
