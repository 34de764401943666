"""`torch.distributed` and DistributedDataParallel in a train function, in one process."""

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
def _single_rank_group() -> Iterator[None]:
    with as_torchrun(CONTEXT, torch_compat.single_rank_store):
        yield
    assert not dist.is_initialized()


def model_of() -> nn.Module:
    torch.manual_seed(0)
    return nn.Linear(3, 1).double()


def train_function(
    wrap: Callable[[nn.Module], nn.Module], accumulation: int, models: list[nn.Module]
) -> Callable[[Mapping[str, Any]], None]:
    """Return a function that trains three steps, each with `accumulation` backwards."""

    def train(config: Mapping[str, Any]) -> None:
        model = wrap(model_of())
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        prepared, _ = distplat.prepare(model, optimizer)
        assert prepared is model
        models.append(model)
        for step in range(3):
            for number in range(accumulation):
                inputs = torch.full((2, 3), step + number + 1.0, dtype=torch.float64)
                is_ddp = isinstance(model, DistributedDataParallel)
                if number == accumulation - 1 or not is_ddp:
                    backward(model(inputs).square().mean())
                else:
                    with model.no_sync():
                        backward(model(inputs).square().mean())
            optimizer.step()
            optimizer.zero_grad()

    return train


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.parametrize("is_static", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_only_the_strategy_averages_a_ddp_model(accumulation: int, is_static: bool) -> None:
    dist.init_process_group("gloo")
    buckets: list[Any] = []

    def hook(state: Any, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        buckets.append(bucket)
        return allreduce_hook(state, bucket)

    hook.__annotations__["bucket"] = torch_compat.dist.GradBucket  # DDP checks the annotation

    def wrap(model: nn.Module) -> nn.Module:
        wrapped = DistributedDataParallel(model, static_graph=is_static)
        wrapped.register_comm_hook(None, hook)
        return wrapped

    models: list[nn.Module] = []
    params = call_on_ranks(train_function(wrap, accumulation, models)).trained[0]
    unwrapped = train_function(lambda model: model, accumulation, models)
    expected = call_on_ranks(unwrapped).trained[0]
    assert buckets == []
    assert params.keys() == expected.keys()
    assert all(torch.equal(params[name], expected[name]) for name in params)
    wrapped = models[0]
    assert isinstance(wrapped, DistributedDataParallel)
    assert all(torch.equal(wrapped.module.state_dict()[name], params[name]) for name in params)


@pytest.mark.usefixtures("_single_rank_group")
def test_nested_ddp_does_not_average() -> None:
    dist.init_process_group("gloo")
    inner = DistributedDataParallel(model_of())
    inner.register_comm_hook(None, fail_on_average)

    def train(config: Mapping[str, Any]) -> None:
        model = distplat.prepare(nn.Sequential(inner, nn.Tanh()))
        backward(model(torch.ones(2, 3, dtype=torch.float64)).mean())

    assert [*call_on_ranks(train).trained[0]] == ["0.module.weight", "0.module.bias"]


@pytest.mark.usefixtures("_single_rank_group")
def test_prepare_for_backward_does_not_enable_averaging() -> None:
    """Lightning calls it with manual optimization."""
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        model = DistributedDataParallel(model_of())
        model.register_comm_hook(None, fail_on_average)
        distplat.prepare(model)
        loss = model(torch.ones(2, 3, dtype=torch.float64)).mean()
        assert model.require_backward_grad_sync
        model.reducer.prepare_for_backward([])
        backward(loss)

    call_on_ranks(train)


def fail_on_average(state: Any, bucket: Any) -> Any:
    raise AssertionError("DDP averages gradients")


fail_on_average.__annotations__["bucket"] = torch_compat.dist.GradBucket
fail_on_average.__annotations__["return"] = torch.futures.Future[torch.Tensor]


class ForwardsAttributes(DistributedDataParallel):
    """A common subclass: it forwards attributes to the wrapped model."""

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.module, name)


def by_no_sync(model: Any) -> Any:
    return model.no_sync()


@contextmanager
def by_flag(model: Any) -> Iterator[None]:
    model.require_backward_grad_sync = False
    yield
    model.require_backward_grad_sync = True


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.parametrize("strategy", ["ring", "ps-sync"])
@pytest.mark.parametrize("disable_sync", [by_no_sync, by_flag])
def test_no_sync_applies_to_one_model(
    disable_sync: Callable[[Any], AbstractContextManager[None]], strategy: str
) -> None:
    dist.init_process_group("gloo")
    grads: dict[tuple[int, str], list[list[float]]] = {}

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank()
        first: Any = ForwardsAttributes(model_of())
        second: Any = ForwardsAttributes(model_of())
        distplat.prepare(first, second)
        inputs = torch.full((2, 3), rank + 1.0, dtype=torch.float64)
        with disable_sync(first):
            backward(first(inputs).mean())
            backward(second(inputs).mean())
        grads[rank, "first"] = first.weight.grad.tolist()
        grads[rank, "second"] = second.weight.grad.tolist()
        backward(first(inputs).mean())
        grads[rank, "summed"] = first.weight.grad.tolist()

    call_on_ranks(train, job=function_job(2, strategy=strategy))
    # `ps-sync` averages all gradients in the backward of `second`.
    expected = [[1.0] * 3] if strategy == "ring" else [[1.5] * 3]
    assert (grads[0, "second"], grads[1, "second"]) == ([[1.5] * 3], [[1.5] * 3])
    assert grads[0, "first"] == expected
    assert (grads[0, "summed"], grads[1, "summed"]) == ([[3.0] * 3], [[3.0] * 3])


def with_join(model: DistributedDataParallel) -> nn.Module:
    distplat.prepare(model)
    with model.join():
        return model


def fsdp2(model: DistributedDataParallel) -> nn.Module:
    module: Any = model.module
    fully_shard(module, mesh=init_device_mesh("cpu", (1,)))
    return module  # type: ignore[no-any-return]


def fsdp1(model: DistributedDataParallel) -> nn.Module:
    return FullyShardedDataParallel(model.module, device_id=torch.device("cpu"))


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.filterwarnings("ignore")  # FSDP warns of a single rank
@pytest.mark.parametrize(
    ("wrap", "message"),
    [
        (with_join, r"join\(\) of a wrapper"),
        (fsdp2, "each rank has a part, by FSDPModule"),
        (fsdp1, "each rank has a part, by FullyShardedDataParallel"),
    ],
)
def test_rejects_join_and_fsdp(
    wrap: Callable[[DistributedDataParallel], nn.Module], message: str
) -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        distplat.prepare(wrap(DistributedDataParallel(model_of())))

    with pytest.raises(SpecError, match=message):
        call_on_ranks(train)


@pytest.mark.usefixtures("_single_rank_group")
def test_averaged_model_may_copy_ddp() -> None:
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
        assert torch.allclose(after, before - 0.3)  # gradients accumulate: 0.1, then 0.2
        assert torch.allclose(average.module.module.weight, before - 0.2)  # the mean of both steps

    call_on_ranks(train)


def ddp_only(wrapper: DistributedDataParallel) -> nn.Module:
    return wrapper


class WithSecondNorm(nn.Module):
    """A model with a DDP module and a batch norm outside of it, whose buffers are rank 0's."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        super().__init__()
        self.wrapper, self.other = wrapper, nn.BatchNorm1d(2, momentum=1.0)
        self.other.running_mean = running_mean_of(wrapper).clone()


def running_mean_of(module: Any) -> torch.Tensor:
    mean: torch.Tensor = getattr(module, "module", module).running_mean
    return mean


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.filterwarnings("ignore:`broadcast_buffers` is deprecated")
@pytest.mark.parametrize("per_rank", [False, True])
@pytest.mark.parametrize(
    ("strategy", "wrap"),
    [
        ("ring", ddp_only),
        ("ring", WithSecondNorm),
        ("ps-sync", WithSecondNorm),
        ("ps-async", ddp_only),
    ],
)
def test_ddp_decides_whether_buffers_are_per_rank(
    strategy: str, wrap: Callable[[DistributedDataParallel], nn.Module], per_rank: bool
) -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank()
        norm: Any = nn.BatchNorm1d(2, momentum=1.0)
        norm.running_mean += rank
        wrapper = DistributedDataParallel(norm, broadcast_buffers=not per_rank)
        model: Any = wrap(wrapper)
        others = [model.other] if isinstance(model, WithSecondNorm) else []
        distplat.prepare(model)
        first = float(rank) if per_rank else 0.0
        assert norm.running_mean.tolist() == [first, first]
        assert [running_mean_of(norm).tolist() for norm in others] == [[0.0, 0.0]] * len(others)
        if strategy == "ps-async":  # buffers are always per rank
            return
        inputs = torch.full((2, 2), rank + 1.0)
        backward(sum(module(inputs).square().mean() for module in (wrapper, *others)))
        after = rank + 1.0 if per_rank else 1.0
        assert norm.running_mean.tolist() == [after, after]
        assert [running_mean_of(norm).tolist() for norm in others] == [[1.0, 1.0]] * len(others)

    call_on_ranks(train, job=function_job(2, strategy=strategy))


@pytest.mark.usefixtures("_single_rank_group")
def test_any_enclosing_ddp_may_broadcast_a_buffer() -> None:
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        rank = distplat.get_context().get_world_rank()
        norm: Any = nn.BatchNorm1d(2)
        norm.running_mean += rank
        inner = DistributedDataParallel(norm, forward_sync_buffers=False)
        distplat.prepare(DistributedDataParallel(nn.Sequential(inner)))
        assert norm.running_mean.tolist() == [0.0, 0.0]

    call_on_ranks(train, job=function_job(2))


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.parametrize("is_static", [False, True])
def test_torch_save_of_a_ddp_model(tmp_path: Path, is_static: bool) -> None:
    """Some examples of PyTorch save the whole module."""
    dist.init_process_group("gloo")

    def train(config: Mapping[str, Any]) -> None:
        norm = nn.BatchNorm1d(1).double()
        wrapped = nn.Sequential(model_of(), norm)
        model: Any = DistributedDataParallel(wrapped, static_graph=is_static)
        distplat.prepare(model)
        backward(model(torch.ones(2, 3, dtype=torch.float64)).mean())
        torch.save(model, tmp_path / "model.pt")
        with zipfile.ZipFile(tmp_path / "model.pt") as file:
            [pickled] = [file.read(name) for name in file.namelist() if name.endswith("/data.pkl")]
        strings = [str(value) for _, value, _ in pickletools.genops(pickled)]
        assert not [text for text in strings if "distplat" in text], "must load without distplat"
        saved = torch.load(tmp_path / "model.pt", weights_only=False)
        assert type(saved) is DistributedDataParallel
        assert saved.require_backward_grad_sync and saved.will_sync_module_buffers()  # type: ignore[no-untyped-call]
        assert saved.static_graph is is_static
        assert not model.require_forward_param_sync and not model.static_graph
        assert torch.equal(saved.module[0].weight, model.module[0].weight)

    call_on_ranks(train)


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.parametrize("wrap", [lambda model: model, DistributedDataParallel])
def test_rejects_second_prepare_but_accepts_a_frozen_copy(
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
        assert all(p.grad is not None for p in model.parameters())

    call_on_ranks(train)


@pytest.mark.usefixtures("_single_rank_group")
def test_group_outlives_the_ddp_model() -> None:
    """Otherwise DDP joins the group's threads while it holds the GIL: a deadlock."""
    is_alive: list[bool] = []

    def train(config: Mapping[str, Any]) -> None:
        dist.init_process_group("gloo")
        wrapped = DistributedDataParallel(model_of())
        group = weakref.ref(wrapped.process_group)
        weakref.finalize(wrapped, lambda: is_alive.append(group() is not None))
        distplat.prepare(wrapped)
        dist.destroy_process_group()
        del wrapped.process_group  # DDP may be destroyed in this order, too

    call_on_ranks(train)
    gc.collect()
    assert is_alive == [True]


@pytest.mark.usefixtures("_single_rank_group")
def test_process_group_can_be_recreated() -> None:
    for _ in range(2):
        dist.init_process_group("gloo")
        assert (dist.get_rank(), dist.get_world_size()) == (0, 1)
        dist.new_group([0])
        dist.destroy_process_group()
    dist.init_process_group("gloo", rank=0, world_size=1)


@pytest.mark.usefixtures("_single_rank_group")
@pytest.mark.parametrize(("rank", "world"), [(0, 4), (1, 1)])
def test_rejects_process_group_with_other_ranks(rank: int, world: int) -> None:
    """A loop for four ranks on fewer workers would skip a part of the data."""
    with pytest.raises(ValueError, match=r"got (rank=1|world_size=4), and this worker has"):
        dist.init_process_group("gloo", rank=rank, world_size=world)


@pytest.mark.parametrize(("rank", "local", "node"), [(0, "0", "0"), (1, "0", "1"), (2, "1", "0")])
def test_torchrun_variables(rank: int, local: str, node: str) -> None:
    variables: dict[int, dict[str, str]] = {}

    def train(config: Mapping[str, Any]) -> None:
        context = distplat.get_context()
        variables[context.get_world_rank()] = {
            **context.variables,
            "node": str(context.get_node_rank()),
        }

    call_on_ranks(train, 3, nodes=lambda rank: "abc"[rank % 2])
    own = variables[rank]
    assert (own["RANK"], own["LOCAL_RANK"], own["GROUP_RANK"]) == (str(rank), local, node)
    assert (own["WORLD_SIZE"], own["GROUP_WORLD_SIZE"]) == ("3", "2")
    assert own["node"] == node
    assert own["LOCAL_WORLD_SIZE"] == ("1" if rank == 1 else "2")
    assert own["TORCHELASTIC_RUN_ID"] == "test"
    assert (own["ROLE_RANK"], own["ROLE_WORLD_SIZE"]) == (str(rank), "3")
    assert (own["TORCHELASTIC_RESTART_COUNT"], own["TORCHELASTIC_MAX_RESTARTS"]) == ("0", "3")
    assert {env["MASTER_ADDR"] for env in variables.values()} == {"a.cluster"}
    [port] = {int(env["MASTER_PORT"]) for env in variables.values()}
    assert port > 1023


def test_existing_process_group_is_kept() -> None:
    dist.init_process_group("gloo", store=torch_compat.single_rank_store(), rank=0, world_size=1)
    try:
        with as_torchrun(CONTEXT, torch_compat.single_rank_store):
            assert dist.is_initialized()
        assert dist.is_initialized()
    finally:
        dist.destroy_process_group()


PAIR = "[/pytorch/third_party/gloo/gloo/transport/tcp/pair.cc:553] "


@pytest.mark.parametrize(
    ("error", "is_lost"),
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
def test_lost_peer_is_not_a_user_error(error: Exception, is_lost: bool) -> None:
    peer_error = lost_peer(error)
    assert (peer_error is not None) is is_lost
    assert peer_error is None or peer_error.exit_code == 4


def test_interface_of_address() -> None:
    name = _interface_of("127.0.0.1")
    assert name in [interface for _, interface in socket.if_nameindex()]
    assert _interface_of("192.0.2.1") is None
