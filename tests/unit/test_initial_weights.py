"""`initial_weights`: a run starts as plain torch does after `load_state_dict`."""

import io
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hybrid_models import grid_of, hybrid_job
from jobs import job_of
from local_run import LocalRun, train
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat import Task
from distplat.platform.errors import SpecError
from distplat.platform.spec import Job
from distplat.strategies.checkpoint.initial_weights import _read_file


class Small(Task):
    def model(self) -> nn.Module:
        hidden = nn.Sequential(nn.Linear(6, 6), nn.BatchNorm1d(6), nn.Tanh())
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), hidden, nn.Linear(6, 3))

    def train_data(self) -> TensorDataset:
        generator = torch.Generator().manual_seed(1)
        return TensorDataset(
            torch.randn(16, 4, generator=generator), torch.randint(0, 3, (16,), generator=generator)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def base_weights() -> dict[str, Tensor]:
    """Return weights that differ from the initial weights of every run."""
    torch.manual_seed(99)
    model = Small().model()
    for buffer in model.buffers():
        buffer.copy_(torch.full_like(buffer, 3))
    return {name: value.clone() for name, value in model.state_dict().items()}


def save_pt(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "base.pt")
    return folder / "base.pt"


def save_checkpoint(state: dict[str, Tensor], folder: Path) -> Path:
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    checkpoint = {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {}, "lr": [0.1]}}
    torch.save(checkpoint, folder / "last.pth")
    return folder / "last.pth"


def save_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "base.safetensors")
    return folder / "base.safetensors"


def save_sharded(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(state)
    files = {name: f"model-{n % 2 + 1:05}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def save_sharded_at_url(state: dict[str, Tensor], folder: Path) -> Any:
    return f"file://{save_sharded(state, folder)}"


def save_pt_at_url(state: dict[str, Tensor], folder: Path) -> Any:
    return f"file://{save_pt(state, folder)}"


WRITERS = [
    save_pt,
    save_checkpoint,
    save_safetensors,
    save_sharded,
    save_sharded_at_url,
    save_pt_at_url,
]


def final_weights(run: LocalRun) -> dict[str, Tensor]:
    return {name: value for part in run.trained for name, value in part.items()}


def plain_step(state: dict[str, Tensor], batch: int, lr: float) -> dict[str, Tensor]:
    """Return the weights after one step of a plain loop from `state`."""
    model = Small().model()
    model.load_state_dict(state)
    inputs, targets = Small().train_data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = nn.functional.cross_entropy(model(inputs[:batch]), targets[:batch])
    torch.autograd.backward(loss)
    optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("write", WRITERS)
def test_all_file_formats_are_read(
    write: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path
) -> None:
    state = base_weights()
    path = str(write(state, tmp_path))
    fields: dict[str, Any] = {"global_batch_size": 16, "steps": 1, "data": {"shuffle": False}}
    run = train(job_of("ring", initial_weights=path, **fields), Small)
    expected = plain_step(state, 16, 0.1)
    for name, value in final_weights(run).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


HYBRID = {"stages": grid_of(2, 1, 1), "meta": grid_of(2, 1, 1, init="meta")}
SLICED = {"tensor_plan": {"0": "colwise", "2.0": "rowwise"}, "init": "meta"}


@pytest.mark.parametrize("name", ["ring", "ps-sync", "ps-async", "stages", "meta", "slices"])
def test_all_strategies_start_from_the_file(name: str, tmp_path: Path) -> None:
    class Unnormed(Small):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 3)))

    torch.manual_seed(98)
    state = {name: value.clone() for name, value in Unnormed().model().state_dict().items()}
    path = str(save_safetensors(state, tmp_path))
    tiny = {"name": "SGD", "lr": 1e-12}
    fields: dict[str, Any] = {"initial_weights": path, "optimizer": tiny, "steps": 1}
    if name in HYBRID or name == "slices":
        options, workers = HYBRID.get(name) or grid_of(1, 2, 1, **SLICED)
        job = hybrid_job({**options, "micro_batches": 1}, workers, **fields)
    else:
        job = job_of(name, 2, **fields)
    run = train(job, Unnormed)
    found = final_weights(run)
    assert found.keys() == state.keys()
    for key, value in found.items():
        assert torch.allclose(value, state[key], atol=1e-9), key


def refusal(path: object, task_type: type[Task] = Small, **fields: Any) -> str:
    """Return the error message for a weights file."""
    job = job_of("ring", initial_weights={"path": str(path), **fields})
    with pytest.raises(SpecError) as caught:
        train(job, task_type)
    return str(caught.value)


def base_without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in base_weights().items() if key != name}


class Touch:
    """Creates a directory when unpickled, as a malicious file may."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_invalid_files_are_refused(tmp_path: Path) -> None:
    save_pt(base_weights(), tmp_path)
    assert "did you mean 'base.pt'?" in refusal(tmp_path / "bse.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "base.pt").read_bytes()[:900])
    assert "cut.pt cannot be read" in refusal(tmp_path / "cut.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "text.safetensors cannot be read" in refusal(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list, not tensors by name" in refusal(tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    assert "has none of model.safetensors" in refusal(tmp_path / "empty")
    torch.save({"w": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert "save the state dict alone" in refusal(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bad").mkdir()
    index = {"weight_map": {"0.weight": "../base.pt"}}
    (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names '../base.pt', which is not a file of this directory" in refusal(tmp_path / "bad")
    assert "there is no file" in refusal(f"file://{tmp_path}/gone.pt")


def test_oversized_index_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_sharded(base_weights(), tmp_path)
    monkeypatch.setattr("distplat.strategies.checkpoint.initial_weights._INDEX_BYTES", 20)
    assert "index.json has more than 20 bytes" in refusal(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_damaged_file_is_refused(zipped: bool, tmp_path: Path) -> None:
    """torch's readers raise various exceptions for damaged files, in both formats."""
    stream = io.BytesIO()
    torch.save(base_weights(), stream, _use_new_zipfile_serialization=zipped)
    rng, path, refusals = random.Random(5), tmp_path / "base.pt", 0
    for _ in range(150):
        data = bytearray(stream.getvalue())
        for _ in range(rng.choice((1, 3))):
            offset = rng.randrange(len(data) // 2 if zipped else 900)
            data[offset : offset + rng.choice((0, 1, 2))] = rng.randbytes(rng.choice((0, 1, 2)))
        path.write_bytes(data)
        try:
            _read_file(path)
        except SpecError as error:
            refusals += "base.pt" in str(error)
    assert refusals > 50


def test_mismatched_weights_are_named(tmp_path: Path) -> None:
    wide = {**base_weights(), "3.weight": torch.zeros(5, 6)}
    message = "'3.weight' is [5, 6] there, [3, 6] in the model"
    assert message in refusal(save_pt(wide, tmp_path))
    assert message in refusal(save_pt(wide, tmp_path), strict=False)
    renamed = {**base_without("3.weight"), "3.wieght": base_weights()["3.weight"]}
    message = refusal(save_pt(renamed, tmp_path))
    assert "no '3.weight' in the file, but '3.wieght'" in message
    assert "`strict: false`" in message
    prefixed = {f"model.{name}": value for name, value in base_weights().items()}
    assert "names of the file begin with 'model.'" in refusal(save_pt(prefixed, tmp_path))
    assert "names of the file begin with 'model.'" in refusal(
        save_pt(prefixed, tmp_path), strict=False
    )
    duplicated = {**base_weights(), "module.0.weight": base_weights()["0.weight"]}
    assert "two names of the file are '0.weight'" in refusal(save_pt(duplicated, tmp_path))


def test_mismatched_dtype_is_refused(tmp_path: Path) -> None:
    quantized = {name: value.to(torch.int8) for name, value in base_weights().items()}
    message = refusal(save_pt(quantized, tmp_path))
    assert "'0.weight' is whole numbers [6, 4] there, [6, 4] in the model" in message


def test_legacy_weight_norm_names_are_accepted(tmp_path: Path) -> None:
    class Normed(Small):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))

    state = {"0.weight_g": torch.ones(3, 1), "0.weight_v": torch.ones(3, 4)}
    state["0.bias"] = torch.full((3,), 5.0)
    tiny = {"name": "SGD", "lr": 1e-12}
    job = job_of("ring", initial_weights=str(save_pt(state, tmp_path)), optimizer=tiny, steps=1)
    found = final_weights(train(job, Normed))
    assert torch.allclose(found["0.parametrizations.weight.original0"], state["0.weight_g"])
    assert torch.allclose(found["0.parametrizations.weight.original1"], state["0.weight_v"])


def test_non_strict_loads_matching_tensors(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**base_without("3.weight"), "head.weight": torch.zeros(2)}
    weights = {"path": str(save_pt(state, tmp_path)), "strict": False}
    tiny = {"name": "SGD", "lr": 1e-12}
    run = train(job_of("ring", initial_weights=weights, optimizer=tiny, steps=1), Small)
    found = final_weights(run)
    assert torch.allclose(found["0.weight"], state["0.weight"])
    assert "no '3.weight' in the file" in caplog.text
    assert "no 'head.weight' in the model" in caplog.text


class Tied(Small):
    def model(self) -> nn.Module:
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        last.weight = first.weight
        return nn.Sequential(first, last)


def test_tied_tensors_may_be_stored_once_or_twice(tmp_path: Path) -> None:
    torch.manual_seed(97)
    state = {name: value.clone() for name, value in Tied().model().state_dict().items()}
    tiny = {"name": "SGD", "lr": 1e-12}
    once = {name: value for name, value in state.items() if name != "1.weight"}
    for weights in (state, once):
        job = job_of(
            "ring", initial_weights=str(save_pt(weights, tmp_path)), optimizer=tiny, steps=1
        )
        assert torch.allclose(final_weights(train(job, Tied))["1.weight"], state["0.weight"])
    other = {**state, "1.weight": state["1.weight"] + 1}
    assert "'0.weight' and '1.weight' are one tensor" in refusal(save_pt(other, tmp_path), Tied)


class ParameterInLoss(Small):
    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.ones(3))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs * self.scale, targets)


def test_trained_weights_of_a_run_can_be_loaded(tmp_path: Path) -> None:
    trained = final_weights(train(job_of("ring", ema={"decay": 0.5}), ParameterInLoss))
    assert "task:scale" in trained
    tiny = {"name": "SGD", "lr": 1e-12}
    path = str(save_safetensors({k: v.contiguous() for k, v in trained.items()}, tmp_path))
    run = train(job_of("ring", 2, initial_weights=path, optimizer=tiny, steps=1), ParameterInLoss)
    for name, value in final_weights(run).items():
        if "running" not in name and "tracked" not in name:
            assert torch.allclose(value, trained[name], atol=1e-6), name


def test_half_precision_file_is_cast_to_the_models_dtype(tmp_path: Path) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in base_weights().items()}
    tiny = {"name": "SGD", "lr": 1e-12}
    path = str(save_pt(half, tmp_path))
    found = final_weights(
        train(job_of("ring", initial_weights=path, optimizer=tiny, steps=1), Small)
    )
    assert found["0.weight"].dtype == torch.float32
    assert torch.equal(found["0.weight"], half["0.weight"].float())


def test_resumed_run_ignores_initial_weights(tmp_path: Path) -> None:
    path = str(save_pt(base_weights(), tmp_path))
    checkpoint = {"every_steps": 2}
    job: Job = job_of("ring", initial_weights=path, checkpoint=checkpoint, steps=4)
    uninterrupted = train(job, Small)
    resumed = train(job, Small, saved=uninterrupted.checkpoints[2])
    for name, value in final_weights(uninterrupted).items():
        assert torch.equal(value, final_weights(resumed)[name]), name
