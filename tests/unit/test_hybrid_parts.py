"""Cuts of models into stages, the parts held by ranks, and their random numbers."""

import itertools
import random
import threading
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import numpy as np
import pytest
import torch
from hybrid_models import MLP_PLAN, Dropping, Gpt, Mlp, hybrid_job
from jobs import job_of
from local_run import LocalRun, train
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.loop.batches import EvalLoader
from distplat.strategies.loop.loss_check import MeanCheck
from distplat.strategies.model.flat import FlatModel
from distplat.strategies.model.layers import Layer, layers_of
from distplat.strategies.model.meta import materialise
from distplat.strategies.pipeline import rank as ranks
from distplat.strategies.pipeline import rank_model, stage_compute
from distplat.strategies.tensor.parallel_layers import gather_full

EVEN = {"pipeline": 2, "cut": "even", "micro_batches": 4}


def names(run: LocalRun) -> list[list[str]]:
    return [[*state] for state in run.trained]


def whole(run: LocalRun) -> dict[str, Tensor]:
    return {name: value for state in run.trained for name, value in state.items()}


def equal(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[k], right[k]) for k in left)


def test_cut_by_layer_name() -> None:
    run = train(hybrid_job({"pipeline": 2, "cut": ["5"]}, 2, steps=1), Mlp)
    assert names(run)[1] == ["5.weight", "5.bias"]
    assert run.ranks[0].prepared.model is None, "the whole model is released"


def test_interleaved_chunks_alternate_between_stages() -> None:
    options = {**EVEN, "schedule": "interleaved", "virtual": 3}
    run = train(hybrid_job(options, 2, steps=1), Mlp)
    layers = [[*dict.fromkeys(name.split(".")[0] for name in part)] for part in names(run)]
    assert layers == [["0", "2", "4"], ["1", "3", "5"]]


@pytest.mark.parametrize(
    ("options", "message", "hint"),
    [
        ({"pipeline": 2, "cut": ["7"]}, "no layer '7'", "allowed"),
        ({"pipeline": 7, "cut": "even"}, "6 layers, too few for 7 stages", "fewer stages"),
        ({"pipeline": 2, "memory_limit_mb": 0.001}, "no cut of 6 layers", "memory_limit_mb"),
    ],
)
def test_impossible_cut_is_named(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        train(hybrid_job(options, options["pipeline"]), Mlp)
    problem = caught.value.problems[0]
    assert message in problem.message and hint in problem.hint
    assert problem.field.startswith("strategy.")


class OneTrainedLayer(Mlp):
    def model(self) -> nn.Module:
        model = super().model()
        for layer in [*model.children()][1:]:
            layer.requires_grad_(requires_grad=False)
        return model


def test_fewer_trained_layers_than_stages_are_named() -> None:
    with pytest.raises(SpecError, match="each of 2 stages needs something to train, and only 0 h"):
        train(hybrid_job({"pipeline": 2}, 2), OneTrainedLayer)


class Tied(Gpt):
    def model(self) -> nn.Module:
        model = super().model()
        head = nn.Linear(8, 11, bias=False)
        head.weight = model.get_parameter("0.weight")
        return nn.Sequential(*model.children(), nn.Linear(4, 8), head)


def test_tied_weights_in_two_stages_are_named() -> None:
    with pytest.raises(SpecError, match=r"0\.weight \(stage 0\) and 8\.weight \(stage 1\)"):
        train(hybrid_job(EVEN, 2), Tied)


class MissingStage(Mlp):
    def stages(self, model: nn.Module) -> list[nn.Module]:
        return [*model.children()][:-1]


def test_parameter_missing_from_all_stages_is_named() -> None:
    with pytest.raises(SpecError, match=r"in no stage: 5\.weight, 5\.bias"):
        train(hybrid_job(EVEN, 2), MissingStage)


class Branching(Mlp):
    """Not a Sequential: the trace finds the cuts that a single tensor crosses."""

    def model(self) -> nn.Module:
        return Residual()


class Residual(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem, self.side, self.head = nn.Linear(6, 9), nn.Linear(9, 9), nn.Linear(9, 4)

    def forward(self, inputs: Tensor) -> Tensor:
        middle = self.stem(inputs)
        out: Tensor = self.head(torch.tanh(self.side(middle)) + middle)
        return out


def test_traced_model_is_cut_where_one_tensor_crosses() -> None:
    run = train(hybrid_job({"pipeline": 3, "cut": "even"}, 3, steps=2), Branching)
    assert [{n.split(".")[0] for n in part} for part in names(run)] == [
        {"stem"},
        {"side"},
        {"head"},
    ]


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("atomic_random_numbers")
@pytest.mark.parametrize(("stages", "replicas"), [(3, 1), (2, 2)])
def test_meta_initialization_does_not_depend_on_the_cut(stages: int, replicas: int) -> None:
    """With `init: meta` no rank ever has the whole model; all grids start with equal values."""

    def initial_values(pipeline: int, data: int) -> dict[str, Tensor]:
        options = {**META_INIT, "pipeline": pipeline, "data": data}
        return whole(train(hybrid_job(options, pipeline * data, optimizer=TINY_LR), Mlp))

    assert equal(initial_values(2, 1), initial_values(stages, replicas))


META_INIT = {"init": "meta", "cut": "even"}
TINY_LR = {"name": "SGD", "lr": 1e-30}


def test_layers_of_a_meta_model_are_materialised() -> None:
    run = train(hybrid_job({"pipeline": 2, "init": "meta", "micro_batches": 2}, 2, steps=1), Mlp)
    assert all(tensor.device.type == "cpu" for tensor in whole(run).values())


class FrozenNorm(nn.BatchNorm1d):
    """Keeps its statistics, as in fine-tuning, and so accepts a batch of one sample."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(False)
        return self


def test_layers_are_measured_in_their_training_mode() -> None:
    class Frozen(Mlp):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 5), FrozenNorm(5), nn.Tanh(), nn.Linear(5, 4))

    job = hybrid_job({"pipeline": 2, "micro_batches": 8}, 2, steps=1, global_batch_size=8)
    run = train(job, Frozen)
    assert {"1.running_mean", "3.weight"} <= whole(run).keys()


@pytest.fixture
def atomic_random_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make seeding and drawing atomic: ranks are threads and share one generator."""
    lock, seeded = threading.Lock(), rank_model.Layers.seeded

    def seeded_under_lock(self: rank_model.Layers, inputs: Any, seed: int) -> Any:
        with lock:
            return seeded(self, inputs, seed)

    def materialise_under_lock(*args: Any) -> None:
        with lock:
            materialise(*args)

    def under_lock(function: Any) -> Any:
        def call(*args: Any) -> Any:
            with lock:
                return function(*args)

        return call

    def read_under_lock(batches_of: Any) -> Any:
        def locked_batches(*args: Any) -> Iterator[Any]:
            begin, end = under_lock(lambda: iter(batches_of(*args))), object()
            read = under_lock(next)  # each sample has its own seed
            source = begin()
            while (batch := read(source, end)) is not end:
                yield batch

        return locked_batches

    for owner, name in ((stage_compute, "micro_batches"), (EvalLoader, "batches")):
        monkeypatch.setattr(owner, name, read_under_lock(getattr(owner, name)))
    check = MeanCheck.look
    monkeypatch.setattr(MeanCheck, "look", under_lock(check))  # restores generators
    # A trial of one rank must not restore the generator of ranks that train.
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())
    monkeypatch.setattr(rank_model.Layers, "seeded", seeded_under_lock)
    monkeypatch.setattr(rank_model, "materialise", materialise_under_lock)


@pytest.mark.usefixtures("atomic_random_numbers")
def test_dropout_is_reproducible_and_independent_of_the_cut() -> None:
    """The masks are equal; updates of vectors of other lengths may round differently."""

    def trained(
        task_type: type[Mlp] = Dropping, stages: int = 2, **options: Any
    ) -> dict[str, Tensor]:
        return whole(train(hybrid_job({**EVEN, "pipeline": stages, **options}, stages), task_type))

    first = trained()
    assert equal(first, trained())
    for other in (trained(cut=["1"]), trained(stages=3), trained(schedule="interleaved")):
        assert all(torch.allclose(first[name], other[name], atol=1e-6) for name in first)
    without = trained(Mlp)
    assert not all(torch.allclose(first[name], without[name], atol=1e-3) for name in first)


def test_ranks_wait_until_the_trained_model_is_gathered(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The receiver may read a slice from the sender's memory later."""
    order: list[str] = []
    gather, trained = gather_full, ranks.HybridWorker.trained

    def slow_gather(state: Any, specs: Any, group: Any) -> dict[str, Tensor]:
        if group.rank == 0:
            time.sleep(0.3)
        found = gather(state, specs, group)
        order.append("read" if group.rank == 0 else "sent")
        return found

    def record_leaving(self: ranks.HybridWorker, flat: FlatModel) -> dict[str, Tensor]:
        found = trained(self, flat)
        order.append("left")
        return found

    monkeypatch.setattr(ranks, "gather_full", slow_gather)
    monkeypatch.setattr(ranks.HybridWorker, "trained", record_leaving)
    train(hybrid_job({"tensor": 2, "tensor_plan": MLP_PLAN}, 2, steps=1), Mlp)
    assert order == ["sent", "read", "left", "left"]


class CountingLayer(nn.Module):
    """Writes into buffers or a frozen parameter, in train and eval mode."""

    def __init__(self, *, frozen: bool) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))
        self.register_buffer("times", torch.zeros(()))
        self.counted = 0
        self.mean = nn.Parameter(torch.zeros(12), requires_grad=False)
        self._frozen = frozen

    def forward(self, inputs: Tensor) -> Tensor:
        if self._frozen:
            self.mean.lerp_(inputs.detach().mean(0), 0.1)
        else:
            self.counted += 1
            self.get_buffer("calls").add_(1)
            self.get_buffer("times").fill_(self.counted)
        return inputs - self.mean


def counting_task(frozen: bool) -> type[Mlp]:
    def model(self: Mlp) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 12), CountingLayer(frozen=frozen), nn.Linear(12, 12), nn.Linear(12, 4)
        )

    return type("Counted", (Mlp,), {"model": model, "eval_data": lambda self: None})


def test_layers_are_called_once_per_micro_batch() -> None:
    """The passes that determine shapes or measure layers leave no trace."""
    for cut in ("even", "auto"):
        options = {**EVEN, "cut": cut}
        run = train(hybrid_job(options, 2, steps=3), counting_task(frozen=False))
        assert whole(run)["1.calls"] == whole(run)["1.times"] == 3 * 4


@pytest.mark.parametrize(("frozen", "name"), [(True, "1.mean"), (False, "1.calls, 1.times")])
def test_recompute_is_refused_if_forward_writes_state(frozen: bool, name: str) -> None:
    for options, workers in ((EVEN, 2), ({}, 1)):
        job = hybrid_job({**options, "recompute": True}, workers)
        with pytest.raises(SpecError, match=f"writes into {name}, and `recompute`"):
            train(job, counting_task(frozen))


class RandomLayer(nn.Module):
    """Adds random numbers of numpy, python and torch."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + float(np.random.rand()) + random.random() + torch.rand(())


def test_random_layers_do_not_depend_on_the_cut() -> None:
    model = nn.Sequential(*(RandomLayer() for _ in range(4)))
    layers = layers_of(model, [*model])

    def outputs(*cuts: int) -> float:
        value = torch.zeros((), dtype=torch.float64)
        for first, stop in itertools.pairwise((0, *cuts, 4)):
            np.random.rand(), random.random(), torch.rand(3)
            value = rank_model.Layers(layers[first:stop], first).run(value, seed=5)
        return value.item()

    assert outputs() == outputs(2) == outputs(1, 3)


def test_layers_cover_the_model() -> None:
    layers = rank_model.layers_for(Mlp(), Mlp().model())
    assert [layer.name for layer in layers] == [*"012345"]
    assert all(isinstance(layer, Layer) for layer in layers)


def test_weights_with_shared_memory_are_refused() -> None:
    class Tied(Mlp):
        def model(self) -> nn.Module:
            model = super().model()
            first = model.get_parameter("1.0.weight")
            model.get_parameter("4.0.weight").data = first.data
            return model

    with pytest.raises(SpecError, match=r"'1.0.weight' and '4.0.weight' are different tensors"):
        train(hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1), Tied)


def test_view_of_a_weight_kept_by_the_task_is_refused() -> None:
    class Anchored(Mlp):
        def model(self) -> nn.Module:
            model = super().model()
            self.anchors = {"first": model.get_parameter("0.weight").detach()}
            return model

    for job in (job_of("ring"), hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1)):
        with pytest.raises(SpecError, match=r"'0.weight' and 'task:anchors.first' are different"):
            train(job, Anchored)
