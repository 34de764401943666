"""`checkpoint.trained_only`: checkpoints omit frozen parameters, and a resume checks them."""

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


class AdapterModel(nn.Module):
    """A frozen bfloat16 layer with a tied weight, and a trained adapter."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.tied = nn.Linear(4, 4), nn.Linear(4, 4, bias=False)
        self.tied.weight = self.base.weight
        for layer in (self.base, self.tied):
            layer.to(torch.bfloat16).requires_grad_(False)
        self.adapter, self.norm = nn.Linear(4, 2), nn.BatchNorm1d(2)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.tied(self.base(inputs.bfloat16()))
        outputs: Tensor = self.norm(self.adapter(hidden.float()))
        return outputs


class LoraTask(Task):
    def model(self) -> nn.Module:
        return AdapterModel()

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(
            torch.randn(16, 4, generator=generator), torch.randn(16, 2, generator=generator)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class OtherBaseTask(LoraTask):
    """Has other frozen values."""

    def model(self) -> nn.Module:
        model = AdapterModel()
        model.base.bias.data += 1
        return model


class MomentumBaseTask(LoraTask):
    """The forward changes a frozen parameter, as in a momentum teacher."""

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
def test_checkpoint_omits_frozen_parameters_and_resumes(strategy: Any, workers: int) -> None:
    run = train(job(strategy, workers, ema=None), LoraTask)
    all_names = {*run.parameters()}
    assert all_names > FROZEN
    assert names(run, 2) == {*run.trained[0]} == all_names - FROZEN
    resumed = train(job(strategy, workers), LoraTask, saved=run.checkpoints[2])
    for name, value in run.parameters().items():
        assert torch.equal(resumed.parameters()[name], value), name


class AdapterLayer(nn.Module):
    """A frozen layer and a parallel trained layer."""

    def __init__(self) -> None:
        super().__init__()
        self.base, self.own = nn.Linear(4, 4), nn.Linear(4, 4)
        self.base.requires_grad_(requires_grad=False)

    def forward(self, inputs: Tensor) -> Tensor:
        return torch.as_tensor(self.base(inputs) + self.own(inputs))


class StagesTask(LoraTask):
    """Each stage except the last has frozen parameters."""

    bias = 0.0

    def model(self) -> nn.Module:
        model = nn.Sequential(
            AdapterLayer(), nn.BatchNorm1d(4), AdapterLayer(), nn.Tanh(), nn.Linear(4, 2)
        )
        model.get_submodule("2.base").get_parameter("bias").data += self.bias
        return model


class OtherStagesTask(StagesTask):
    bias = 1.0


STAGES = {"name": "hybrid", "pipeline": 3, "micro_batches": 2, "cut": ["2", "4"]}


def join_stages(run: LocalRun) -> dict[str, Tensor]:
    """Return the trained parameters of all ranks."""
    return {name: value for part in run.trained for name, value in part.items()}


@pytest.mark.parametrize("data_strategy", ["ring", "ps-sync"])
def test_each_stage_omits_its_frozen_parameters(data_strategy: str) -> None:
    spec = job({**STAGES, "data_strategy": data_strategy}, 3, ema={"decay": 0.5})
    run = train(spec, StagesTask)
    all_names = {*StagesTask().model().state_dict()}
    frozen = {name for name in all_names if ".base." in name}
    assert len(frozen) == 4
    assert names(run, 2) == all_names - frozen
    assert {name.removeprefix("ema:") for name in join_stages(run)} == all_names - frozen
    resumed = train(spec, StagesTask, saved=run.checkpoints[2])
    for name, value in join_stages(run).items():
        assert torch.equal(join_stages(resumed)[name], value), name
    with pytest.raises(SpecError, match=r"frozen parameter '2.base.bias' has other values here"):
        train(spec, OtherStagesTask, saved=run.checkpoints[2])


def test_ring_and_pipeline_resume_from_each_other() -> None:
    ring = job("ring", 1, ema={"decay": 0.5})
    pipeline = job({**STAGES, "micro_batches": 1}, 3, ema={"decay": 0.5})
    for source, target in ((ring, pipeline), (pipeline, ring)):
        run = train(source, StagesTask)
        resumed = train(target, StagesTask, saved=run.checkpoints[2])
        for name, value in join_stages(run).items():
            torch.testing.assert_close(join_stages(resumed)[name], value)


def test_ema_omits_frozen_parameters() -> None:
    run = train(job(ema={"decay": 0.5}), LoraTask)
    averaged = {name.removeprefix("ema:") for name in run.trained[0] if name.startswith("ema:")}
    assert averaged
    assert not averaged & FROZEN


def test_other_frozen_values_are_rejected() -> None:
    run = train(job(), LoraTask)
    with pytest.raises(SpecError, match=r"frozen parameter 'base.bias' has other values here"):
        train(job(), OtherBaseTask, saved=run.checkpoints[2])
    plain = job().model_copy(update={"checkpoint": job_of().checkpoint})
    with pytest.raises(SpecError, match=r"frozen parameter 'base.bias' has other values here"):
        train(plain, OtherBaseTask, saved=run.checkpoints[2])
    assert train(plain, LoraTask, saved=run.checkpoints[2])


def test_changed_frozen_parameter_is_saved() -> None:
    run = train(job(steps=6), MomentumBaseTask)
    assert "base.bias" in names(run, 2)
    assert "base.weight" not in names(run, 2)
    resumed = train(job(steps=6), MomentumBaseTask, saved=run.checkpoints[2])
    assert "base.bias" in names(resumed, 4)
    third = train(job(steps=6), MomentumBaseTask, saved=resumed.checkpoints[4])
    for name, value in run.parameters().items():
        assert torch.equal(third.parameters()[name], value), name


def test_base_and_adapter_files_are_initial_weights(tmp_path: Path) -> None:
    run = train(job(), OtherBaseTask)
    base = {
        name: value
        for name, value in OtherBaseTask().model().state_dict().items()
        if name in FROZEN
    }
    torch.save({k: v for k, v in run.parameters().items() if k in base}, tmp_path / "base.pt")
    torch.save(run.trained[0], tmp_path / "lora.pt")
    paths = [str(tmp_path / name) for name in ("base.pt", "lora.pt")]
    tiny = {"name": "SGD", "lr": 1e-12}
    resumed = train(job_of(initial_weights=paths, optimizer=tiny, steps=1), LoraTask)
    for name, value in run.parameters().items():
        if "running" not in name and "tracked" not in name:
            assert torch.allclose(resumed.parameters()[name], value), name


def test_trained_only_without_effect_is_rejected() -> None:
    class FullyTrained(LoraTask):
        def model(self) -> nn.Module:
            return nn.Linear(4, 2)

    with pytest.raises(SpecError, match="the model has no frozen parameters"):
        train(job(), FullyTrained)
    with pytest.raises(SpecError, match="`tensor: 2` cuts them"):
        job({"name": "hybrid", "tensor": 2, "tensor_plan": {"0": "colwise"}}, 2)
    with pytest.raises(SpecError, match="without checkpoints and without `save_final`"):
        job_of(checkpoint={"trained_only": True, "save_final": False})
