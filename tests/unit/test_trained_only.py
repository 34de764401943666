"""`checkpoint.trained_only`: what is not trained is in no file, and its values are looked at."""

from pathlib import Path
from typing import Any

import pytest
import torch
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat import Task
from distplat.platform.errors import SpecError

FROZEN = {"base.weight", "base.bias", "tied.weight"}


class Adapted(nn.Module):
    """A frozen layer in bfloat16, used under two names, and a small one that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.tied = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.base.weight
        for one in (self.base, self.tied):
            one.to(torch.bfloat16).requires_grad_(False)
        self.adapter, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.tied(self.base(inputs.bfloat16()))
        outputs: Tensor = self.norm(self.adapter(hidden.float()))
        return outputs


class Lora(Task):
    def model(self) -> nn.Module:
        return Adapted()

    def train_data(self) -> TensorDataset:
        made = torch.Generator().manual_seed(1)
        return TensorDataset(torch.randn(16, 4, generator=made), torch.randn(16, 2, generator=made))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Other(Lora):
    """With another base."""

    def model(self) -> nn.Module:
        model = Adapted()
        model.base.bias.data += 1
        return model


class Written(Lora):
    """With a frozen parameter that forwards move, as a momentum teacher's."""

    def forward(self, model: Any, batch: Any) -> Tensor:
        if model.training:
            model.base.bias.data += 0.25
        outputs: Tensor = model(batch[0])
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(outputs, batch[1])


def job(strategy: Any = "ring", workers: int = 1, **more: Any) -> Any:
    checkpoint = {"every_steps": 2, "trained_only": True}
    optimizer = {"name": "AdamW", "lr": 0.01}
    return job_of(strategy, workers, checkpoint=checkpoint, optimizer=optimizer, **more)


def names(run: LocalRun, version: int) -> set[str]:
    return {*run.checkpoints[version].file("model")}


@pytest.mark.parametrize(
    ("strategy", "workers"),
    [("ring", 2), ({"name": "ring", "shard_optimizer": True}, 2), ("ps-sync", 2), ("ps-async", 1)],
)
def test_what_is_frozen_is_in_no_file_and_a_run_goes_on_as_ever(
    strategy: Any, workers: int
) -> None:
    run = train(job(strategy, workers, ema=None), Lora)
    whole = {*run.parameters()}
    assert whole > FROZEN
    assert names(run, 2) == {*run.trained[0]} == whole - FROZEN
    again = train(job(strategy, workers), Lora, saved=run.checkpoints[2])
    for name, value in run.parameters().items():
        assert torch.equal(again.parameters()[name], value), name


class Adapter(nn.Module):
    """A frozen layer, and one beside it that is trained."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.own = nn.Linear(4, 4), nn.Linear(4, 4)
        self.base.requires_grad_(requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.base(inputs) + self.own(inputs))


class Stages(Lora):
    """Each stage but the last one has something frozen."""

    bias = 0.0

    def model(self) -> nn.Module:
        model = nn.Sequential(Adapter(), nn.BatchNorm1d(4), Adapter(), nn.Tanh(), nn.Linear(4, 2))
        model.get_submodule("2.base").get_parameter("bias").data += self.bias
        return model


class OtherStages(Stages):
    bias = 1.0


STAGES = {"name": "hybrid", "pipeline": 3, "micro_batches": 2, "cut": ["2", "4"]}


def trained(run: LocalRun) -> dict[str, Tensor]:
    """Put the ranks' parts together."""
    return {name: value for part in run.trained for name, value in part.items()}


@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
def test_stages_leave_out_what_is_frozen_of_each(data_strategy: str) -> None:
    of = job({**STAGES, "data_strategy": data_strategy}, 3, ema={"decay": 0.5})
    run = train(of, Stages)
    every = {*Stages().model().state_dict()}
    frozen = {name for name in every if ".base." in name}
    assert len(frozen) == 4
    assert names(run, 2) == every - frozen
    assert {name.removeprefix("ema:") for name in trained(run)} == every - frozen
    again = train(of, Stages, saved=run.checkpoints[2])
    for name, value in trained(run).items():
        assert torch.equal(trained(again)[name], value), name
    with pytest.raises(SpecError, match=r"frozen parameter '2.base.bias' has other values here"):
        train(of, OtherStages, saved=run.checkpoints[2])


def test_whole_models_go_on_from_stages_and_the_other_way_round() -> None:
    ring = job("ring", 1, ema={"decay": 0.5})
    other = job({**STAGES, "micro_batches": 1}, 3, ema={"decay": 0.5})
    for origin, to in ((ring, other), (other, ring)):
        run = train(origin, Stages)
        again = train(to, Stages, saved=run.checkpoints[2])
        for name, value in trained(run).items():
            torch.testing.assert_close(trained(again)[name], value)


def test_an_average_is_of_what_is_trained() -> None:
    run = train(job(ema={"decay": 0.5}), Lora)
    averaged = {name.removeprefix("ema:") for name in run.trained[0] if name.startswith("ema:")}
    assert averaged
    assert not averaged & FROZEN


def test_another_base_is_refused() -> None:
    run = train(job(), Lora)
    with pytest.raises(SpecError, match=r"frozen parameter 'base.bias' has other values here"):
        train(job(), Other, saved=run.checkpoints[2])
    plain = job().model_copy(update={"checkpoint": job_of().checkpoint})
    with pytest.raises(SpecError, match=r"frozen parameter 'base.bias' has other values here"):
        train(plain, Other, saved=run.checkpoints[2])
    assert train(plain, Lora, saved=run.checkpoints[2])


def test_what_a_forward_moves_is_kept() -> None:
    run = train(job(steps=6), Written)
    assert "base.bias" in names(run, 2)
    assert "base.weight" not in names(run, 2)
    again = train(job(steps=6), Written, saved=run.checkpoints[2])
    assert "base.bias" in names(again, 4)
    third = train(job(steps=6), Written, saved=again.checkpoints[4])
    for name, value in run.parameters().items():
        assert torch.equal(third.parameters()[name], value), name


def test_base_and_adapters_together_are_weights_to_begin_from(tmp_path: Path) -> None:
    run = train(job(), Other)
    base = {name: one for name, one in Other().model().state_dict().items() if name in FROZEN}
    torch.save({k: v for k, v in run.parameters().items() if k in base}, tmp_path / "base.pt")
    torch.save(run.trained[0], tmp_path / "lora.pt")
    paths = [str(tmp_path / name) for name in ("base.pt", "lora.pt")]
    tiny = {"name": "SGD", "lr": 1e-12}
    again = train(job_of(initial_weights=paths, optimizer=tiny, steps=1), Lora)
    for name, value in run.parameters().items():
        if "running" not in name and "tracked" not in name:
            assert torch.allclose(again.parameters()[name], value), name


def test_where_it_does_nothing_it_is_refused() -> None:
    class Trained(Lora):
        def model(self) -> nn.Module:
            return nn.Linear(4, 2)

    with pytest.raises(SpecError, match="the model has no frozen parameters"):
        train(job(), Trained)
    with pytest.raises(SpecError, match="`tensor: 2` cuts them"):
        job({"name": "hybrid", "tensor": 2, "tensor_plan": {"0": "colwise"}}, 2)
    with pytest.raises(SpecError, match="without checkpoints and without `save_final`"):
        job_of(checkpoint={"trained_only": True, "save_final": False})
