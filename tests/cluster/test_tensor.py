"""Tensor-parallel modules in separate processes are bit-identical on all ranks and repeat."""

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import ray
import torch
from marks import slow
from members import Member, call_all, join
from torch import nn

from distplat.strategies.tensor.parallelize import parallelize

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray")]

PLAN = {
    "0": "embedding",
    "1.self_attn": "heads",
    "1.linear1": "colwise",
    "1.linear2": "rowwise",
    "2": "colwise_gather",
}
"""Dropout is inside and outside of the split layers."""


class SplitMember(Member):
    def train(self, dropout: float) -> tuple[str, str, float]:
        """Return digests of the outputs and of the replicated parameters, and the last loss."""
        torch.manual_seed(0)
        layer = nn.TransformerEncoderLayer(24, 3, 37, dropout, batch_first=True)
        model = nn.Sequential(nn.Embedding(11, 24), layer, nn.Linear(24, 11))
        specs = parallelize(model, PLAN, self.group) if self.group.world > 1 else {}
        optimizer = torch.optim.SGD(model.parameters(), lr=0.2, momentum=0.9)
        words = torch.arange(40).view(4, 10) % 11
        for step in range(6):
            torch.manual_seed(step)
            optimizer.zero_grad()
            outputs = model(words)
            loss = nn.functional.cross_entropy(outputs.flatten(0, 1), words.roll(1).flatten())
            torch.autograd.backward(loss)
            optimizer.step()
        replicated = [p for name, p in model.named_parameters() if name not in specs]
        return _digest([outputs]), _digest(replicated), loss.item()


def _digest(tensors: Sequence[torch.Tensor]) -> str:
    joined = b"".join(t.detach().numpy().tobytes() for t in tensors)
    return hashlib.sha256(joined).hexdigest()


@pytest.fixture(scope="module")
def actors(local_ray: None) -> Iterator[list[Any]]:
    members = [ray.remote(SplitMember).options(num_cpus=0.5).remote() for _ in range(2)]
    yield members
    for actor in members:
        ray.kill(actor)


@pytest.mark.parametrize("backend", ["shm", slow("gloo")])
def test_ranks_agree_and_repeat(backend: str, actors: list[Any]) -> None:
    join(actors, f"split-{backend}", backend)
    first, second = call_all(actors, "train", 0.3), call_all(actors, "train", 0.3)
    assert first[0] == first[1] == second[0] == second[1]
    split = call_all(actors, "train", 0.0)
    call_all(actors, "leave")
    join(actors[:1], "alone")
    _, _, whole = ray.get(actors[0].train.remote(0.0), timeout=60)
    call_all(actors[:1], "leave")
    assert split[0][2] == pytest.approx(whole, rel=1e-5)
