"""What scripts of DistributedDataParallel's find in a train function; the rest is on Ray."""

import gc
import socket
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist
from function_ranks import call_on_ranks
from torch import nn
from torch.autograd import backward
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.nn.parallel import DistributedDataParallel

import distplat
from distplat.actors.collectives.default_group import _interface_of, as_torchrun
from distplat.actors.user_errors import lost_peer
from distplat.strategies import torch_compat
from distplat.strategies.function.function_session import Place

PLACE = Place(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def _alone() -> Iterator[None]:
    with as_torchrun(PLACE, torch_compat.store_of_one):
        yield
    assert not dist.is_initialized()


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def taught(
    wrap: Callable[[nn.Module], nn.Module], accumulated: int, seen: list[nn.Module]
) -> Callable[[Mapping[str, Any]], None]:
    """Give a function that trains three steps, each of some backwards."""

    def train(config: Mapping[str, Any]) -> None:
        model = wrap(model_of())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        same, _ = distplat.prepare(model, optimizer)
        assert same is model
        seen.append(model)
        for step in range(3):
            for number in range(accumulated):
                inputs = torch.full((2, 3), step + number + 1.0, dtype=torch.float64)
                last = number == accumulated - 1 or not isinstance(model, DistributedDataParallel)
                if last:
                    backward(model(inputs).square().mean())
                else:
                    with model.no_sync():
                        backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("accumulated", [1, 2])
def test_a_wrapped_model_is_averaged_by_the_strategy_alone(accumulated: int, static: bool) -> None:
    dist.init_process_group("gloo")
    averaged: list[Any] = []

    def hook(state: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        averaged.append(bucket)
        return allreduce_hook(state, bucket)

    hook.__annotations__["bucket"] = torch_compat.dist.GradBucket  # DDP looks; stubs lack it

    def wrap(model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model, static_graph=static)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    seen: list[nn.Module] = []
    found = call_on_ranks(taught(wrap, accumulated, seen)).trained[0]
    expected = call_on_ranks(taught(lambda model: model, accumulated, seen)).trained[0]
    assert averaged == []
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)
    wrapped = seen[0]
    assert isinstance(wrapped, DistributedDataParallel)
    assert all(torch.equal(wrapped.module.state_dict()[name], found[name]) for name in found)


@pytest.mark.usefixtures("_alone")
def test_a_wrapper_inside_of_a_model_averages_nothing_either() -> None:
    dist.init_process_group("gloo")
    inner = DistributedDataParallel(model_of())

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(nn.Sequential(inner, nn.Tanh()))

    found = call_on_ranks(train).trained[0]
    assert not inner.require_backward_grad_sync
    assert [*found] == ["0.module.weight", "0.module.bias"]


@pytest.mark.usefixtures("_alone")
def test_a_group_outlives_the_wrapper() -> None:
    """Or the wrapper waits for the group's threads with the GIL held, and they may for the GIL."""
    lived: list[bool] = []

    def train(config: Mapping[str, Any]) -> None:
        dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(model_of())
        group = weakref.ref(wrapped.process_group)
        weakref.finalize(wrapped, lambda: lived.append(group() is not None))
        distplat.prepare(wrapped)
        dist.destroy_process_group()
        del wrapped.process_group  # as the wrapper itself is taken apart in no certain order

    call_on_ranks(train)
    gc.collect()
    assert lived == [True]


@pytest.mark.usefixtures("_alone")
def test_a_group_is_made_again_and_others_beside_it() -> None:
    for _ in range(2):
        dist.init_process_group("gloo")
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        dist.new_group([0])
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1)


def test_a_group_that_was_there_before_stays() -> None:
    dist.init_process_group("gloo", store=torch_compat.store_of_one(), rank=0, world_size=1)
    try:
        with as_torchrun(PLACE, torch_compat.store_of_one):
            assert dist.is_initialized()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError(PAIR + "Connection closed by peer [127.0.0.1]:1"), True),
        (RuntimeError(PAIR + "Read error [127.0.0.1]:1: Connection reset by peer."), True),
        (RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 5000ms for recv"), True),
        (dist.DistBackendError("NCCL error: remote peer has exited"), True),
        (RuntimeError("[gloo/pair.cc] op.preamble.length <= op.nbytes. 8 vs 4"), False),
        (RuntimeError("a database: connection reset by peer"), False),
        (ConnectionResetError("gloo: connection reset by peer"), False),
    ],
)
def test_an_operation_that_lost_a_rank_is_no_fault_of_the_function(
    error: Exception, lost: bool
) -> None:
    found = lost_peer(error)
    assert (found is not None) is lost
    assert found is None or found.exit_code == 4


def test_the_interface_of_an_address_is_found() -> None:
    name = _interface_of("127.0.0.1")
    assert name in [one for _, one in socket.if_nameindex()]
    assert _interface_of("192.0.2.1") is None
