"""Where models are cut, what ranks hold of them, and what is drawn on them."""

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


def equal(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_a_cut_by_name() -> None:
    run = train(hybrid_job({"pipeline": 2, "cut": ["5"]}, 2, steps=1), Mlp)
    assert names(run)[1] == ["5.weight", "5.bias"]
    assert run.ranks[0].prepared.model is None, "the rest of the model is let go"


def test_a_chunk_of_each_half() -> None:
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
def test_what_cannot_be_cut_is_named(options: dict[str, Any], message: str, hint: str) -> None:
    with pytest.raises(SpecError) as caught:
        train(hybrid_job(options, options["pipeline"]), Mlp)
    problem = caught.value.problems[0]
    assert message in problem.message and hint in problem.hint
    assert problem.field.startswith("strategy.")


class OneTrained(Mlp):
    def model(self) -> nn.Module:
        model = super().model()
        for layer in [*model.children()][1:]:
            layer.requires_grad_(requires_grad=False)
        return model


def test_fewer_trained_layers_than_stages_are_named() -> None:
    with pytest.raises(SpecError, match="each of 2 stages needs something to train, and only 0 h"):
        train(hybrid_job({"pipeline": 2}, 2), OneTrained)


class Tied(Gpt):
    def model(self) -> nn.Module:
        model = super().model()
        head = nn.Linear(8, 11, bias=False)
        head.weight = model.get_parameter("0.weight")
        return nn.Sequential(*model.children(), nn.Linear(4, 8), head)


def test_tied_weights_in_two_stages_are_named() -> None:
    with pytest.raises(SpecError, match=r"0\.weight \(stage 0\) and 8\.weight \(stage 1\)"):
        train(hybrid_job(EVEN, 2), Tied)


class Forgetful(Mlp):
    def stages(self, model: nn.Module) -> list[nn.Module]:
        return [*model.children()][:-1]


def test_a_parameter_in_no_stage_is_named() -> None:
    with pytest.raises(SpecError, match=r"in no stage: 5\.weight, 5\.bias"):
        train(hybrid_job(EVEN, 2), Forgetful)


class Branching(Mlp):
    """No Sequential: the trace finds where one tensor is all that crosses."""

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


def test_a_traced_model_is_cut_where_one_tensor_crosses() -> None:
    run = train(hybrid_job({"pipeline": 3, "cut": "even"}, 3, steps=2), Branching)
    assert [{n.split(".")[0] for n in part} for part in names(run)] == [
        {"stem"},
        {"side"},
        {"head"},
    ]


@pytest.mark.sweep(2)
@pytest.mark.usefixtures("one_at_a_time")
@pytest.mark.parametrize(("stages", "replicas"), [(3, 1), (2, 2)])
def test_values_made_by_stages_do_not_depend_on_the_cut(stages: int, replicas: int) -> None:
    """`init: meta`: no rank has had the whole model, and all grids begin with one."""

    def beginning(pipeline: int, data: int) -> dict[str, Tensor]:
        options = {**META, "pipeline": pipeline, "data": data}
        return whole(train(hybrid_job(options, pipeline * data, optimizer=STILL), Mlp))

    assert equal(beginning(2, 1), beginning(stages, replicas))


META = {"init": "meta", "cut": "even"}
STILL = {"name": "SGD", "lr": 1e-30}


def test_measured_layers_are_those_of_a_model_on_meta() -> None:
    run = train(hybrid_job({"pipeline": 2, "init": "meta", "micro_batches": 2}, 2, steps=1), Mlp)
    assert all(tensor.device.type == "cpu" for tensor in whole(run).values())


class FrozenNorm(nn.BatchNorm1d):
    """Keeps its statistics, as a pretrained one does in fine-tuning; needs no batch of two."""

    def train(self, mode: bool = True) -> "FrozenNorm":
        super().train(False)
        return self


def test_layers_are_measured_in_the_mode_that_they_train_in() -> None:
    class Frozen(Mlp):
        def model(self) -> nn.Module:
            return nn.Sequential(nn.Linear(6, 5), FrozenNorm(5), nn.Tanh(), nn.Linear(5, 4))

    job = hybrid_job({"pipeline": 2, "micro_batches": 8}, 2, steps=1, global_batch_size=8)
    run = train(job, Frozen)
    assert {"1.running_mean", "3.weight"} <= whole(run).keys()


@pytest.fixture
def one_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ranks are threads here and share one generator: seeding and drawing must not be torn."""
    lock, seeded = threading.Lock(), rank_model.Layers.seeded

    def locked(self: rank_model.Layers, inputs: Any, seed: int) -> Any:
        with lock:
            return seeded(self, inputs, seed)

    def filled(*args: Any) -> None:
        with lock:
            materialise(*args)

    def under_lock(made: Any) -> Any:
        def make(*args: Any) -> Any:
            with lock:
                return made(*args)

        return make

    def read_under_lock(made: Any) -> Any:
        def batches(*args: Any) -> Iterator[Any]:
            begin, end = under_lock(lambda: iter(made(*args))), object()
            read = under_lock(next)  # a sample is made under a seed of its own
            source = begin()
            while (batch := read(source, end)) is not end:
                yield batch

        return batches

    for owner, name in ((stage_compute, "micro_batches"), (EvalLoader, "batches")):
        monkeypatch.setattr(owner, name, read_under_lock(getattr(owner, name)))
    look = MeanCheck.look
    monkeypatch.setattr(MeanCheck, "look", under_lock(look))  # puts generators back
    # What a rank tries while others train is not to put their generator back.
    monkeypatch.setattr(torch.random, "fork_rng", lambda **kept: nullcontext())
    monkeypatch.setattr(rank_model.Layers, "seeded", locked)
    monkeypatch.setattr(rank_model, "materialise", filled)


@pytest.mark.usefixtures("one_at_a_time")
def test_dropout_repeats_and_does_not_depend_on_the_cut() -> None:
    """Updates of vectors of other lengths may round otherwise; what is dropped is the same."""

    def trained(kind: type[Mlp] = Dropping, stages: int = 2, **options: Any) -> dict[str, Tensor]:
        return whole(train(hybrid_job({**EVEN, "pipeline": stages, **options}, stages), kind))

    first = trained()
    assert equal(first, trained())
    for other in (trained(cut=["1"]), trained(stages=3), trained(schedule="interleaved")):
        assert all(torch.allclose(first[name], other[name], atol=1e-6) for name in first)
    without = trained(Mlp)
    assert not all(torch.allclose(first[name], without[name], atol=1e-3) for name in first)


def test_nobody_leaves_before_the_trained_model_is_put_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """What is sent may be in the sender's memory until it is read, however late that is."""
    order: list[str] = []
    gather, trained = gather_full, ranks.HybridWorker.trained

    def late(state: Any, specs: Any, group: Any) -> dict[str, Tensor]:
        if group.rank == 0:
            time.sleep(0.3)
        found = gather(state, specs, group)
        order.append("read" if group.rank == 0 else "sent")
        return found

    def leaving(self: ranks.HybridWorker, flat: FlatModel) -> dict[str, Tensor]:
        found = trained(self, flat)
        order.append("left")
        return found

    monkeypatch.setattr(ranks, "gather_full", late)
    monkeypatch.setattr(ranks.HybridWorker, "trained", leaving)
    train(hybrid_job({"tensor": 2, "tensor_plan": MLP_PLAN}, 2, steps=1), Mlp)
    assert order == ["sent", "read", "left", "left"]


class Counting(nn.Module):
    """Writes into what is not trained, whatever the mode."""

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


def counting(frozen: bool) -> type[Mlp]:
    def model(self: Mlp) -> nn.Module:
        return nn.Sequential(
            nn.Linear(6, 12), Counting(frozen=frozen), nn.Linear(12, 12), nn.Linear(12, 4)
        )

    return type("Counted", (Mlp,), {"model": model, "eval_data": lambda self: None})


def test_layers_are_called_once_for_each_micro_batch() -> None:
    """A pass that agrees on shapes, or one that measures, leaves no trace."""
    for cut in ("even", "auto"):
        options = {**EVEN, "cut": cut}
        run = train(hybrid_job(options, 2, steps=3), counting(frozen=False))
        assert whole(run)["1.calls"] == whole(run)["1.times"] == 3 * 4


@pytest.mark.parametrize(("frozen", "name"), [(True, "1.mean"), (False, "1.calls, 1.times")])
def test_what_a_forward_writes_cannot_be_computed_again(frozen: bool, name: str) -> None:
    for options, workers in ((EVEN, 2), ({}, 1)):
        job = hybrid_job({**options, "recompute": True}, workers)
        with pytest.raises(SpecError, match=f"writes into {name}, and `recompute`"):
            train(job, counting(frozen))


class Drawing(nn.Module):
    """Adds numbers of numpy's and python's generators."""

    def forward(self, inputs: Tensor) -> Tensor:
        return inputs + float(np.random.rand()) + random.random() + torch.rand(())


def test_what_layers_draw_does_not_depend_on_the_cut() -> None:
    model = nn.Sequential(*(Drawing() for _ in range(4)))
    layers = layers_of(model, [*model])

    def outputs(*cuts: int) -> float:
        value = torch.zeros((), dtype=torch.float64)
        for first, stop in itertools.pairwise((0, *cuts, 4)):
            np.random.rand(), random.random(), torch.rand(3)
            value = rank_model.Layers(layers[first:stop], first).run(value, seed=5)
        return value.item()

    assert outputs() == outputs(2) == outputs(1, 3)


def test_layers_have_every_parameter_once() -> None:
    layers = rank_model.layers_for(Mlp(), Mlp().model())
    assert [layer.name for layer in layers] == [*"012345"]
    assert all(isinstance(layer, Layer) for layer in layers)


def test_weights_tied_by_their_memory_are_refused_wherever_they_would_be() -> None:
    class Tied(Mlp):
        def model(self) -> nn.Module:
            model = super().model()
            first = model.get_parameter("1.0.weight")
            model.get_parameter("4.0.weight").data = first.data
            return model

    with pytest.raises(SpecError, match=r"'1.0.weight' and '4.0.weight' are different tensors"):
        train(hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1), Tied)


def test_what_a_task_keeps_of_a_weight_is_refused() -> None:
    class Anchored(Mlp):
        def model(self) -> nn.Module:
            model = super().model()
            self.anchors = {"first": model.get_parameter("0.weight").detach()}
            return model

    for job in (job_of("ring"), hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1)):
        with pytest.raises(SpecError, match=r"'0.weight' and 'task:anchors.first' are different"):
            train(job, Anchored)
