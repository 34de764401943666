"""A shard that outlives an attempt: who waits is let go, late messages are refused."""

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


def opened(consistency: Consistency) -> ShardServer:
    made = ShardServer("server-0", async_plan(WORLD, STEPS, consistency), LONG, torch.zeros(SIZE))
    made.restore(0, lambda params: params.fill_(1.0))
    return made


def push(to: ShardServer, rank: int, seq: int, attempt: int, task: int | None = None) -> int:
    values = torch.zeros(SIZE)
    name = PushId("run", attempt, rank, seq, task)
    answer = to.push(name, noise(SIZE, rank, seq), RECORD, lambda new, version: values.copy_(new))
    assert torch.equal(values, to.params) or attempt == 1
    return answer.version


def both(to: ShardServer, seq: int, attempt: int) -> None:
    threads = [threading.Thread(target=push, args=(to, r, seq, attempt)) for r in range(WORLD)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()


def test_who_waits_for_a_lost_rank_is_let_go() -> None:
    service = opened(SYNCHRONOUS)
    both(service, 0, 1)
    errors: list[BaseException] = []
    waits = threading.Event()

    def wait() -> None:
        waits.set()
        try:
            push(service, 0, 1, 1)
        except FencedError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    assert waits.wait(60)
    while not service.exclusively(lambda: _staged(service) == [0]):
        pass
    service.exclusively(lambda: service.renew(2))
    thread.join(60)
    assert not thread.is_alive()
    assert ["attempt 1 is over" in str(error) for error in errors] == [True]


def _staged(service: ShardServer) -> list[int]:
    missing: list[int] = service.store.ledger.missing()
    return [rank for rank in range(WORLD) if rank not in missing]


def test_a_synchronous_step_in_flight_is_pushed_once_more_by_all() -> None:
    service, whole = opened(SYNCHRONOUS), opened(SYNCHRONOUS)
    both(service, 0, 1)
    service.store.push(PushId("run", 1, 0, 1), noise(SIZE, 0, 1))
    service.exclusively(lambda: service.renew(2))
    with pytest.raises(FencedError, match="attempt 1 refused"):
        push(service, 1, 1, 1)  # late, of the lost rank: it must not count beside the new one's
    both(service, 1, 2)
    for seq in range(2):
        both(whole, seq, 1)
    assert torch.equal(service.params, whole.params)


def test_asynchronous_ranks_number_their_pushes_anew_and_tasks_stay_made() -> None:
    service = opened(Consistency(asynchronous=True))
    for seq, task in enumerate((0, 1, 3)):
        push(service, 0, seq, 1, task)
    service.exclusively(lambda: service.renew(2))
    answers = [service.pull(PullId(2, rank, 0), _nowhere) for rank in range(WORLD)]
    assert [answer.done for answer in answers] == [1, 1]
    with pytest.raises(FencedError):
        push(service, 0, 3, 1, 2)
    service.forget_push_reply(0)  # it has new vectors
    push(service, 0, 0, 2, 3)
    push(service, 1, 0, 2, 2)
    assert (service.store.version, service.store.steps) == (4, 2)


def test_a_pull_of_an_earlier_attempt_is_refused() -> None:
    service = opened(SYNCHRONOUS)
    service.pull(PullId(1, 0, 7), _nowhere)
    service.exclusively(lambda: service.renew(2))
    service.pull(PullId(2, 0, 0), _nowhere)
    with pytest.raises(FencedError, match="a pull of attempt 1 refused"):
        service.pull(PullId(1, 0, 8), _nowhere)


def test_a_worker_with_new_memory_gets_its_last_answer_delivered_again() -> None:
    service = opened(Consistency(asynchronous=True))
    delivered: list[Tensor] = []

    def deliver(values: Tensor, version: int) -> None:
        delivered.append(values)

    name, gradient = PushId("run", 1, 0, 0, 0), noise(SIZE, 0, 0)
    service.push(name, gradient, RECORD, deliver)
    service.push(name, gradient, RECORD, deliver)
    assert len(delivered) == 1
    service.forget_push_reply(0)
    service.push(name, gradient, RECORD, deliver)
    assert len(delivered) == 2
    assert service.store.version == 1


def test_renewing_twice_takes_nothing_back() -> None:
    service = opened(SYNCHRONOUS)
    service.exclusively(lambda: service.renew(2))
    service.store.push(PushId("run", 2, 0, 0), noise(SIZE, 0, 0))
    service.exclusively(lambda: service.renew(2))
    assert _staged(service) == [0]


@pytest.mark.parametrize("wire", [None, "float16", "bfloat16"])
def test_what_travels_arrives_as_its_type_holds_it(wire: str | None) -> None:
    vector = torch.tensor([0.0, 1.0, -2.5, 1e-3])
    dtype = torch.float32 if wire is None else getattr(torch, wire)
    sent = as_bytes(as_type(vector, wire))
    sent.flags.writeable = False  # as Ray's store gives it
    assert sent.nbytes == vector.numel() * dtype.itemsize
    assert torch.equal(from_bytes(sent, dtype), vector.to(dtype))


def _nowhere(values: Tensor, version: int) -> None:
    """Deliver nothing."""
