"""`initial_weights`: a run begins as plain torch does after `load_state_dict`."""

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
        made = torch.Generator().manual_seed(1)
        return TensorDataset(
            torch.randn(16, 4, generator=made), torch.randint(0, 3, (16,), generator=made)
        )

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


def base() -> dict[str, Tensor]:
    """Give weights that no run makes itself."""
    torch.manual_seed(99)
    model = Small().model()
    for buffer in model.buffers():
        buffer.copy_(torch.full_like(buffer, 3))
    return {name: value.clone() for name, value in model.state_dict().items()}


def in_pt(state: dict[str, Tensor], folder: Path) -> Path:
    torch.save(state, folder / "base.pt")
    return folder / "base.pt"


def in_checkpoint(state: dict[str, Tensor], folder: Path) -> Path:
    wrapped = {f"module._orig_mod.{name}": value for name, value in state.items()}
    held = {"epoch": 3, "state_dict": wrapped, "optimizer": {"state": {}, "lr": [0.1]}}
    torch.save(held, folder / "last.pth")
    return folder / "last.pth"


def in_safetensors(state: dict[str, Tensor], folder: Path) -> Path:
    save_file(state, folder / "base.safetensors")
    return folder / "base.safetensors"


def in_shards(state: dict[str, Tensor], folder: Path) -> Path:
    names = sorted(state)
    files = {name: f"model-{n % 2 + 1:05}-of-00002.safetensors" for n, name in enumerate(names)}
    for file in set(files.values()):
        save_file({name: state[name] for name in names if files[name] == file}, folder / file)
    index = {"metadata": {"total_size": 0}, "weight_map": files}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def at_url(state: dict[str, Tensor], folder: Path) -> Any:
    return f"file://{in_shards(state, folder)}"


def file_at_url(state: dict[str, Tensor], folder: Path) -> Any:
    return f"file://{in_pt(state, folder)}"


FILES = [in_pt, in_checkpoint, in_safetensors, in_shards, at_url, file_at_url]


def first_step(run: LocalRun) -> dict[str, Tensor]:
    return {name: value for part in run.trained for name, value in part.items()}


def plain(state: dict[str, Tensor], batch: int, lr: float) -> dict[str, Tensor]:
    """One step of a textbook loop from these weights, without batch norms to compare."""
    model = Small().model()
    model.load_state_dict(state)
    inputs, targets = Small().train_data().tensors
    optimizer = torch.optim.SGD(model.parameters(), lr=lr)
    loss = nn.functional.cross_entropy(model(inputs[:batch]), targets[:batch])
    torch.autograd.backward(loss)
    optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


@pytest.mark.parametrize("write", FILES)
def test_every_kind_of_file_is_read(
    write: Callable[[dict[str, Tensor], Path], Path], tmp_path: Path
) -> None:
    state = base()
    path = str(write(state, tmp_path))
    rest: dict[str, Any] = {"global_batch_size": 16, "steps": 1, "data": {"shuffle": False}}
    run = train(job_of("ring", initial_weights=path, **rest), Small)
    expected = plain(state, 16, 0.1)
    for name, value in first_step(run).items():
        assert torch.allclose(value, expected[name], atol=1e-6), name


HYBRID = {"stages": grid_of(2, 1, 1), "meta": grid_of(2, 1, 1, init="meta")}
SLICED = {"tensor_plan": {"0": "colwise", "2.0": "rowwise"}, "init": "meta"}


@pytest.mark.parametrize("name", ["ring", "ps-sync", "ps-async", "stages", "meta", "slices"])
def test_every_strategy_begins_from_it(name: str, tmp_path: Path) -> None:
    class Unnormed(Small):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Sequential(nn.Linear(6, 3)))

    torch.manual_seed(98)
    state = {name: value.clone() for name, value in Unnormed().model().state_dict().items()}
    path = str(in_safetensors(state, tmp_path))
    tiny = {"name": "SGD", "lr": 1e-12}
    more: dict[str, Any] = {"initial_weights": path, "optimizer": tiny, "steps": 1}
    if name in HYBRID or name == "slices":
        options, workers = HYBRID.get(name) or grid_of(1, 2, 1, **SLICED)
        of = hybrid_job({**options, "micro_batches": 1}, workers, **more)
    else:
        of = job_of(name, 2, **more)
    run = train(of, Unnormed)
    found = first_step(run)
    assert found.keys() == state.keys()
    for key, value in found.items():
        assert torch.allclose(value, state[key], atol=1e-9), key


def refused(path: object, kind: type[Task] = Small, **fields: Any) -> str:
    """Give what is said of weights."""
    of = job_of("ring", initial_weights={"path": str(path), **fields})
    with pytest.raises(SpecError) as caught:
        train(of, kind)
    return str(caught.value)


def without(name: str) -> dict[str, Tensor]:
    return {key: value for key, value in base().items() if key != name}


class Touch:
    """What a stranger's file would do if it were unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.path),)


def test_a_file_that_is_none_is_told(tmp_path: Path) -> None:
    in_pt(base(), tmp_path)
    assert "did you mean 'base.pt'?" in refused(tmp_path / "bse.pt")
    (tmp_path / "cut.pt").write_bytes((tmp_path / "base.pt").read_bytes()[:900])
    assert "cut.pt cannot be read" in refused(tmp_path / "cut.pt")
    (tmp_path / "text.safetensors").write_text("no tensors")
    assert "text.safetensors cannot be read" in refused(tmp_path / "text.safetensors")
    torch.save([1, 2], tmp_path / "list.pt")
    assert "holds a list, not tensors by name" in refused(tmp_path / "list.pt")
    (tmp_path / "empty").mkdir()
    assert "has none of model.safetensors" in refused(tmp_path / "empty")
    torch.save({"w": Touch(tmp_path / "ran")}, tmp_path / "evil.pt")
    assert "save the state dict alone" in refused(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()
    (tmp_path / "bad").mkdir()
    index = {"weight_map": {"0.weight": "../base.pt"}}
    (tmp_path / "bad" / "model.safetensors.index.json").write_text(json.dumps(index))
    assert "names '../base.pt', which is not a file of this directory" in refused(tmp_path / "bad")
    assert "there is no file" in refused(f"file://{tmp_path}/gone.pt")


def test_an_index_of_any_size_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    in_shards(base(), tmp_path)
    monkeypatch.setattr("distplat.strategies.checkpoint.initial_weights._INDEX_BYTES", 20)
    assert "index.json has more than 20 bytes" in refused(tmp_path)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_damaged_file_is_told(zipped: bool, tmp_path: Path) -> None:
    """torch's readers raise whatever they stumble at; its older format they read byte by byte."""
    stream = io.BytesIO()
    torch.save(base(), stream, _use_new_zipfile_serialization=zipped)
    draw, path, refusals = random.Random(5), tmp_path / "base.pt", 0
    for _ in range(150):
        whole = bytearray(stream.getvalue())
        for _ in range(draw.choice((1, 3))):
            at = draw.randrange(len(whole) // 2 if zipped else 900)
            whole[at : at + draw.choice((0, 1, 2))] = draw.randbytes(draw.choice((0, 1, 2)))
        path.write_bytes(whole)
        try:
            _read_file(path)
        except SpecError as error:
            refusals += "base.pt" in str(error)
    assert refusals > 50


def test_another_model_is_told_by_name(tmp_path: Path) -> None:
    wide = {**base(), "3.weight": torch.zeros(5, 6)}
    said = "'3.weight' is [5, 6] there, [3, 6] in the model"
    assert said in refused(in_pt(wide, tmp_path))
    assert said in refused(in_pt(wide, tmp_path), strict=False)
    renamed = {**without("3.weight"), "3.wieght": base()["3.weight"]}
    said = refused(in_pt(renamed, tmp_path))
    assert "no '3.weight' in the file, but '3.wieght'" in said
    assert "`strict: false`" in said
    ahead = {f"model.{name}": value for name, value in base().items()}
    assert "names of the file begin with 'model.'" in refused(in_pt(ahead, tmp_path))
    assert "names of the file begin with 'model.'" in refused(in_pt(ahead, tmp_path), strict=False)
    twice = {**base(), "module.0.weight": base()["0.weight"]}
    assert "two names of the file are '0.weight'" in refused(in_pt(twice, tmp_path))


def test_other_kinds_of_numbers_are_another_model(tmp_path: Path) -> None:
    quantized = {name: value.to(torch.int8) for name, value in base().items()}
    said = refused(in_pt(quantized, tmp_path))
    assert "'0.weight' is whole numbers [6, 4] there, [6, 4] in the model" in said


def test_names_that_torch_knows_from_before_are_known(tmp_path: Path) -> None:
    class Normed(Small):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))

    state = {"0.weight_g": torch.ones(3, 1), "0.weight_v": torch.ones(3, 4)}
    state["0.bias"] = torch.full((3,), 5.0)
    tiny = {"name": "SGD", "lr": 1e-12}
    of = job_of("ring", initial_weights=str(in_pt(state, tmp_path)), optimizer=tiny, steps=1)
    found = first_step(train(of, Normed))
    assert torch.allclose(found["0.parametrizations.weight.original0"], state["0.weight_g"])
    assert torch.allclose(found["0.parametrizations.weight.original1"], state["0.weight_v"])


def test_part_of_a_model_is_taken_if_asked(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    state = {**without("3.weight"), "head.weight": torch.zeros(2)}
    weights = {"path": str(in_pt(state, tmp_path)), "strict": False}
    tiny = {"name": "SGD", "lr": 1e-12}
    run = train(job_of("ring", initial_weights=weights, optimizer=tiny, steps=1), Small)
    found = first_step(run)
    assert torch.allclose(found["0.weight"], state["0.weight"])
    assert "no '3.weight' in the file" in caplog.text
    assert "no 'head.weight' in the model" in caplog.text


class Tied(Small):
    def model(self) -> nn.Module:
        first, last = nn.Linear(4, 4), nn.Linear(4, 4)
        last.weight = first.weight
        return nn.Sequential(first, last)


def test_tied_tensors_may_be_there_once_or_twice_alike(tmp_path: Path) -> None:
    torch.manual_seed(97)
    state = {name: value.clone() for name, value in Tied().model().state_dict().items()}
    tiny = {"name": "SGD", "lr": 1e-12}
    once = {name: value for name, value in state.items() if name != "1.weight"}
    for given in (state, once):
        of = job_of("ring", initial_weights=str(in_pt(given, tmp_path)), optimizer=tiny, steps=1)
        assert torch.allclose(first_step(train(of, Tied))["1.weight"], state["0.weight"])
    other = {**state, "1.weight": state["1.weight"] + 1}
    assert "'0.weight' and '1.weight' are one tensor" in refused(in_pt(other, tmp_path), Tied)


class Kept(Small):
    def __init__(self) -> None:
        self.scale = nn.Parameter(torch.ones(3))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return super().loss(outputs * self.scale, targets)


def test_what_a_run_has_trained_is_a_file_to_begin_from(tmp_path: Path) -> None:
    trained = first_step(train(job_of("ring", ema={"decay": 0.5}), Kept))
    assert "task:scale" in trained
    tiny = {"name": "SGD", "lr": 1e-12}
    path = str(in_safetensors({k: v.contiguous() for k, v in trained.items()}, tmp_path))
    run = train(job_of("ring", 2, initial_weights=path, optimizer=tiny, steps=1), Kept)
    for name, value in first_step(run).items():
        if "running" not in name and "tracked" not in name:
            assert torch.allclose(value, trained[name], atol=1e-6), name


def test_a_file_in_half_precision_fills_a_model_in_single(tmp_path: Path) -> None:
    half = {k: v.bfloat16() if v.is_floating_point() else v for k, v in base().items()}
    tiny = {"name": "SGD", "lr": 1e-12}
    path = str(in_pt(half, tmp_path))
    found = first_step(train(job_of("ring", initial_weights=path, optimizer=tiny, steps=1), Small))
    assert found["0.weight"].dtype == torch.float32
    assert torch.equal(found["0.weight"], half["0.weight"].float())


def test_a_run_that_goes_on_keeps_what_it_has_trained(tmp_path: Path) -> None:
    path = str(in_pt(base(), tmp_path))
    checkpoint = {"every_steps": 2}
    of: Job = job_of("ring", initial_weights=path, checkpoint=checkpoint, steps=4)
    whole = train(of, Small)
    again = train(of, Small, saved=whole.checkpoints[2])
    for name, value in first_step(whole).items():
        assert torch.equal(value, first_step(again)[name]), name
