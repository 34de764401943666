"""An NCCL group of two GPUs: the contract with CPU tensors, and operations on GPU tensors."""

from collections.abc import Iterator
from typing import Any

import pytest
import ray
import torch
from collective_contract import CHECKS

from distplat.actors.collectives.ray_groups import create_group
from distplat.actors.collectives.rendezvous import GroupSettings
from distplat.platform.errors import CollectiveError
from distplat.strategies.collective import ReduceOp

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(torch.cuda.device_count() < 2, reason="fewer than two CUDA devices"),
]
TIMEOUT_S = 5.0


class Member:
    """One rank with one GPU."""

    def join(self, name: str, rank: int, operation_s: float) -> str:
        self.group = create_group(name, "auto", rank, 2, GroupSettings(operation_s, 60.0))
        return self.group.choice.backend

    def contract(self) -> None:
        """Run the contract; its tensors are on the CPU and use gloo."""
        for check in CHECKS.values():
            check(self.group)

    def run_gpu_operations(self) -> None:
        """Call each operation once with GPU tensors, of uneven sizes if supported."""
        group, rank = self.group, self.group.rank
        tensor = torch.full((1000,), rank + 1.0, device="cuda")
        group.all_reduce(tensor, ReduceOp.AVG)
        assert tensor.eq(1.5).all()
        handles = [group.start_all_reduce(t) for t in torch.split(tensor, 300)]
        for handle in handles:
            handle.wait()
        assert tensor.eq(3.0).all()
        parts = [torch.full((n,), rank + 1.0, device="cuda") for n in (3, 5)]
        output = torch.zeros_like(parts[rank])
        group.reduce_scatter(output, parts)
        assert output.eq(3.0).all()
        group.all_gather(parts, output)
        assert all(part.eq(3.0).all() for part in parts)
        group.broadcast(tensor.fill_(rank), 1)
        assert tensor.eq(1.0).all()
        for source in (0, 1):
            if rank == source:
                group.send(tensor.fill_(7.0), 1 - rank)
            else:
                group.recv(tensor, source)
        assert tensor.eq(7.0).all()

    def late(self) -> tuple[int, ...]:
        """Wait for rank 1 on rank 0; return the missing ranks."""
        self.group.all_reduce(torch.ones(8, device="cuda"))
        if self.group.rank == 1:
            return ()
        with pytest.raises(CollectiveError) as caught:
            self.group.all_reduce(torch.ones(8, device="cuda"))
        return caught.value.missing

    def leave(self) -> None:
        self.group.close()


@pytest.fixture
def members() -> Iterator[list[Any]]:
    ray.init(address="local", include_dashboard=False, num_cpus=4, logging_level="warning")
    cls = ray.remote(Member).options(num_cpus=1, num_gpus=1)
    yield [cls.remote() for _ in range(2)]
    ray.shutdown()


def call_all(members: list[Any], method: str, *args: object) -> list[Any]:
    return list(ray.get([getattr(m, method).remote(*args) for m in members], timeout=120))


def join(members: list[Any], operation_s: float) -> None:
    calls = [m.join.remote("gpus", rank, operation_s) for rank, m in enumerate(members)]
    assert ray.get(calls, timeout=120) == ["nccl", "nccl"]


def test_operations_on_cpu_and_gpu_tensors(members: list[Any]) -> None:
    join(members, 60.0)
    call_all(members, "contract")
    call_all(members, "run_gpu_operations")
    call_all(members, "leave")


def test_late_rank_is_named(members: list[Any]) -> None:
    join(members, TIMEOUT_S)
    assert call_all(members, "late")[0] == (1,)
    call_all(members, "leave")
