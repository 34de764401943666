"""What scripts of DistributedDataParallel's find in a train function; the rest is on Ray."""

import copy
import gc
import pickletools
import socket
import weakref
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from function_ranks import call_on_ranks, function_job
from torch import nn
from torch.autograd import backward
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

import distplat
from distplat.actors.collectives.default_group import _interface_of, as_torchrun
from distplat.actors.user_errors import lost_peer
from distplat.platform.errors import SpecError
from distplat.strategies import torch_compat
from distplat.strategies.function.function_session import TrainContext

CONTEXT = TrainContext(0, 1, 0, 1, torch.device("cpu"))


@pytest.fixture
def _alone() -> Iterator[None]:
    with as_torchrun(CONTEXT, torch_compat.single_rank_store):
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
    inner.register_comm_hook(None, refused)

    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(nn.Sequential(inner, nn.Tanh()))
        backward(model(torch.ones(2, 3, dtype=torch.float64)).mean())

    assert [*call_on_ranks(train).trained[0]] == ["0.module.weight", "0.module.bias"]


@pytest.mark.usefixtures("_alone")
def test_who_tells_the_wrapper_of_a_backward_has_it_average_nothing() -> None:
    """Lightning does, where a module makes its steps itself."""
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        model = DistributedDataParallel(model_of())
        model.register_comm_hook(None, refused)
        distplat.prepare(model)
        loss = model(torch.ones(2, 3, dtype=torch.float64)).mean()
        assert model.require_backward_grad_sync
        model.reducer.prepare_for_backward([])
        backward(loss)

    call_on_ranks(train)


def refused(state: Any, bucket: Any) -> Any:
    raise AssertionError("the wrapper averages")


refused.__annotations__["bucket"] = torch_compat.dist.GradBucket
refused.__annotations__["return"] = torch.futures.Future[torch.Tensor]


class Reaching(DistributedDataParallel):
    """As many write it: attributes of the model are the wrapper's."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def quiet(model: Any) -> Any:
    return model.no_sync()


@contextmanager
def flagged(model: Any) -> Iterator[None]:
    model.require_backward_grad_sync = False
    yield
    model.require_backward_grad_sync = True


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("silent", [quiet, flagged])
def test_wrappers_say_which_model_is_not_averaged(
    silent: Callable[[Any], AbstractContextManager[None]], strategy: str
) -> None:
    dist.init_process_group("gloo")
    found: dict[tuple[int, str], list[list[float]]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank()
        one: Any = Reaching(model_of())
        two: Any = Reaching(model_of())
        distplat.prepare(one, two)
        inputs = torch.full((2, 3), rank + 1.0, dtype=torch.float64)
        with silent(one):
            backward(one(inputs).mean())
            backward(two(inputs).mean())
        found[rank, "one"], found[rank, "two"] = one.weight.grad.tolist(), two.weight.grad.tolist()
        backward(one(inputs).mean())
        found[rank, "both"] = one.weight.grad.tolist()

    call_on_ranks(train, job=function_job(2, strategy=strategy))
    one = [[1.0] * 3] if strategy == "ring" else [[1.5] * 3]  # a backward of `two` averages all
    assert (found[0, "two"], found[1, "two"]) == ([[1.5] * 3], [[1.5] * 3])
    assert found[0, "one"] == one
    assert (found[0, "both"], found[1, "both"]) == ([[3.0] * 3], [[3.0] * 3])


def joined(model: DistributedDataParallel) -> nn.Module:
    distplat.prepare(model)
    with model.join():
        return model


def sharded(model: DistributedDataParallel) -> nn.Module:
    whole: Any = model.module
    fully_shard(whole, mesh=init_device_mesh("cpu", (1,)))
    return whole  # type: ignore[no-any-return]


def sharded_flat(model: DistributedDataParallel) -> nn.Module:
    return FullyShardedDataParallel(model.module, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore")  # of FSDP, that there is one rank
@pytest.mark.parametrize(
    ("made", "text"),
    [
        (joined, r"join\(\) of a wrapper"),
        (sharded, "each rank has a part, by FSDPModule"),
        (sharded_flat, "each rank has a part, by FullyShardedDataParallel"),
    ],
)
def test_what_would_part_ranks_is_refused(
    made: Callable[[DistributedDataParallel], nn.Module], text: str
) -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(made(DistributedDataParallel(model_of())))

    with pytest.raises(SpecError, match=text):
        call_on_ranks(train)


@pytest.mark.usefixtures("_alone")
def test_an_average_of_the_weights_may_copy_a_wrapper() -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        model: Any = DistributedDataParallel(model_of())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        distplat.prepare(model, optimizer)
        average: Any = AveragedModel(model)
        for _ in range(2):
            backward(model(torch.ones(2, 3, dtype=torch.float64)).mean())
            optimizer.step()
            average.update_parameters(model)
        before, after = model_of().state_dict()["weight"], model.module.weight
        assert torch.allclose(after, before - 0.3)  # 0.1, and 0.2: gradients add up
        assert torch.allclose(average.module.module.weight, before - 0.2)  # of both steps

    call_on_ranks(train)


def alone(wrapper: DistributedDataParallel) -> nn.Module:
    return wrapper


class BesideAnother(nn.Module):
    """The wrapper is a part of the model; the other part's buffers are rank 0's."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        super().__init__()
        self.wrapper, self.other = wrapper, nn.BatchNorm1d(2, momentum=1.0)
        self.other.running_mean = means_of(wrapper).clone()


def means_of(module: Any) -> torch.Tensor:
    found: torch.Tensor = getattr(module, "module", module).running_mean
    return found


@pytest.mark.usefixtures("_alone")
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize(
    ("strategy", "around"),
    [
        ("ring", alone),
        ("ring", BesideAnother),
        ("ps-sync", BesideAnother),
        ("ps-async", alone),
    ],
)
def test_a_wrapper_says_whether_ranks_have_one_set_of_buffers(
    strategy: str, around: Callable[[DistributedDataParallel], nn.Module], own: bool
) -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank()
        norm: Any = nn.BatchNorm1d(2, momentum=1.0)
        norm.running_mean += rank
        wrapper = DistributedDataParallel(norm, broadcast_buffers=not own)
        model: Any = around(wrapper)
        others = [model.other] if isinstance(model, BesideAnother) else []
        distplat.prepare(model)
        first = float(rank) if own else 0.0
        assert norm.running_mean.tolist() == [first, first]
        assert [means_of(one).tolist() for one in others] == [[0.0, 0.0]] * len(others)
        if strategy == "ps-async":  # where each rank goes on with its own in any case
            return
        inputs = torch.full((2, 2), rank + 1.0)
        backward(sum(one(inputs).square().mean() for one in (wrapper, *others)))
        after = rank + 1.0 if own else 1.0
        assert norm.running_mean.tolist() == [after, after]
        assert [means_of(one).tolist() for one in others] == [[1.0, 1.0]] * len(others)

    call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.usefixtures("_alone")
def test_a_buffer_that_any_wrapper_around_it_broadcasts_is_rank_0s() -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank()
        norm: Any = nn.BatchNorm1d(2)
        norm.running_mean += rank
        inner = DistributedDataParallel(norm, forward_sync_buffers=False)
        distplat.prepare(DistributedDataParallel(nn.Sequential(inner)))
        assert norm.running_mean.tolist() == [0.0, 0.0]

    call_on_ranks(train, job=function_job(2))


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("static", [False, True])
def test_a_wrapper_may_be_saved_whole(tmp_path: Path, static: bool) -> None:
    """As some of PyTorch's examples do."""
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        norm = nn.BatchNorm1d(1).double()
        wrapped = nn.Sequential(model_of(), norm)
        model: Any = DistributedDataParallel(wrapped, static_graph=static)
        distplat.prepare(model)
        backward(model(torch.ones(2, 3, dtype=torch.float64)).mean())
        torch.save(model, tmp_path / "model.pt")
        with zipfile.ZipFile(tmp_path / "model.pt") as file:
            [pickled] = [file.read(name) for name in file.namelist() if name.endswith("/data.pkl")]
        named = [str(value) for _, value, _ in pickletools.genops(pickled)]
        assert not [one for one in named if "distplat" in one], "it is loaded without distplat, too"
        saved = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(saved) is DistributedDataParallel
        assert saved.require_backward_grad_sync and saved.will_sync_module_buffers()  # type: ignore[no-untyped-call]
        assert saved.static_graph is static
        assert not model.require_forward_param_sync and not model.static_graph
        assert torch.equal(saved.module[0].weight, model.module[0].weight)

    call_on_ranks(train)


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel])
def test_a_model_is_prepared_once_and_its_copy_as_a_teacher(
    wrap: Callable[[nn.Module], nn.Module],
) -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(wrap(model_of()))
        teacher = copy.deepcopy(model).requires_grad_(False)
        assert distplat.prepare(teacher) is teacher
        with pytest.raises(SpecError, match="prepare each model once"):
            distplat.prepare(model)
        inputs = torch.ones(2, 3, dtype=torch.float64)
        backward((model(inputs) - teacher(inputs) + 1).square().mean())
        assert all(one.grad is not None for one in model.parameters())

    call_on_ranks(train)


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


@pytest.mark.usefixtures("_alone")
@pytest.mark.parametrize(("rank", "world"), [(0, 4), (1, 1)])
def test_a_group_of_other_ranks_is_refused(rank: int, world: int) -> None:
    """A loop that reckons with four would leave half of the data to nobody."""
    with pytest.raises(ValueError, match=r"got (rank=1|world_size=4), and this worker has"):
        dist.init_process_group("gloo", rank=rank, world_size=world)


@pytest.mark.parametrize(("rank", "local", "node"), [(0, "0", "0"), (1, "0", "1"), (2, "1", "0")])
def test_the_variables_of_torchrun_say_where_a_worker_is(rank: int, local: str, node: str) -> None:
    found: dict[int, dict[str, str]] = {}

    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        found[context.get_world_rank()] = {
            **context.variables,
            "node": str(context.get_node_rank()),
        }

    call_on_ranks(train, 3, nodes=lambda rank: "abc"[rank % 2])
    mine = found[rank]
    assert (mine["RANK"], mine["LOCAL_RANK"], mine["GROUP_RANK"]) == (str(rank), local, node)
    assert (mine["WORLD_SIZE"], mine["GROUP_WORLD_SIZE"]) == ("3", "2")
    assert mine["node"] == node
    assert mine["LOCAL_WORLD_SIZE"] == ("1" if rank == 1 else "2")
    assert mine["TORCHELASTIC_RUN_ID"] == "test"
    assert (mine["ROLE_RANK"], mine["ROLE_WORLD_SIZE"]) == (str(rank), "3")
    assert (mine["TORCHELASTIC_RESTART_COUNT"], mine["TORCHELASTIC_MAX_RESTARTS"]) == ("0", "3")
    assert {one["MASTER_ADDR"] for one in found.values()} == {"a.cluster"}
    [port] = {int(one["MASTER_PORT"]) for one in found.values()}
    assert port > 1023


def test_a_group_that_was_there_before_stays() -> None:
    dist.init_process_group("gloo", store=torch_compat.single_rank_store(), rank=0, world_size=1)
    try:
        with as_torchrun(CONTEXT, torch_compat.single_rank_store):
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
