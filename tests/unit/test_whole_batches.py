"""`hybrid` with batches that are dicts, or that the task passes to the model itself."""

import random
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_forms import (
    DataclassBatches,
    DictBatches,
    ListBatches,
    NestedBatches,
    TupleBatches,
    last_eval_reports,
    padded,
    total,
)
from hybrid_models import grid_of, hybrid_job, merge_parts
from hybrid_workers import WORLD, Workers, same_tensors
from jobs import job_of
from local_run import LocalRun, train
from sentences import WORDS, Sentences
from torch import Tensor, nn

from distplat import Task
from distplat.platform.errors import SpecError
from distplat.platform.sampler import Sampler
from distplat.strategies.fakes import Fabric

SAMPLES, BATCH, STEPS, WIDTH = 22, 16, 5, 8


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        mixed = x.cumsum(1) if mask is None else (x * mask).cumsum(1)
        return x + torch.tanh(self.linear(mixed))


class Tagger(nn.Module):
    """Called like a Hugging Face model; blocks get no mask if no sample is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)  # called after the blocks
        self.table = nn.Embedding(WORDS, WIDTH, dtype=torch.float64)
        self.blocks = nn.ModuleList(Block() for _ in range(4))
        self.head = nn.Linear(WIDTH, 3, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        x = self.table(input_ids)
        mask = None if attention_mask.all() else attention_mask.unsqueeze(-1)
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def with_blocks(cls: type[Task], model_class: type[nn.Module] = Tagger) -> type[Task]:
    def model(self: Task) -> nn.Module:
        return model_class()

    return type(cls.__name__, (cls,), {"model": model})


class ModelLoss(DictBatches):
    """The loss is the model's mean over words, with their number as weight."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        count = (targets["labels"] != -100).sum()
        return outputs["loss"] * count, count


@cache
def train_plain() -> tuple[dict[str, Tensor], float]:
    torch.manual_seed(5)
    model, data = Tagger(), Sentences(SAMPLES)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(STEPS):
        words, mask, classes = padded([data[int(i)] for i in sampler.batch_ids(step)])
        optimizer.zero_grad()
        torch.autograd.backward(model(words, mask, classes)["loss"])
        optimizer.step()
    words, mask, classes = padded([data[i] for i in range(SAMPLES)])
    return model.state_dict(), model(words, mask, classes)["loss"].item()


def run_of(cls: type[Task], pipeline: int = 2, data: int = 1, **options: Any) -> LocalRun:
    strategy, workers = grid_of(pipeline, 1, data, **options)
    return train(hybrid_job(strategy, workers, steps=STEPS), cls)


GRIDS: list[dict[str, Any]] = [
    {},
    {"pipeline": 4},
    {"schedule": "interleaved", "virtual": 2, "micro_batches": 8},
    {"schedule": "zb-h1", "data": 2, "cut": "auto"},
    {"data": 2, "recompute": True, "data_strategy": "ps-sync"},
]


def assert_equal(run: LocalRun) -> None:
    (expected, loss), actual = train_plain(), merge_parts(run)
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)
    reports = [report for report in last_eval_reports(run) if report.sums]  # of the last stage
    assert total(reports, "loss") == pytest.approx(loss, rel=1e-9)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_padded_dicts_match_plain_loop(grid: dict[str, Any]) -> None:
    """Micro-batches differ in sequence length, and some need no mask."""
    assert_equal(run_of(with_blocks(ModelLoss), **grid))


@pytest.mark.parametrize("cls", [DictBatches, TupleBatches, NestedBatches])
def test_tasks_with_forward_or_step_match_plain_loop(cls: type[Task]) -> None:
    assert_equal(run_of(with_blocks(cls), data=2))


class FirstStage(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, batch: dict[str, Tensor]) -> Any:
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.table(batch["input_ids"]), mask, batch["labels"]


class MaskedBlock(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, value: Any) -> Any:
        return self.block(*value[:2]), *value[1:]


class LastStage(nn.Module):
    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, value: Any) -> Any:
        logits = self.head(self.norm(value[0]))
        loss = F.cross_entropy(logits.flatten(0, 1), value[2].flatten())
        return {"loss": loss, "logits": logits}


class StagesTask(DictBatches):
    """The first module of `stages` and `loss` get the dict."""

    def model(self) -> nn.Module:
        return Tagger()

    def stages(self, model: Any) -> list[nn.Module]:
        return [
            FirstStage(model.table),
            *map(MaskedBlock, model.blocks),
            LastStage(model.norm, model.head),
        ]


def test_stages_of_the_task_may_take_a_dict() -> None:
    assert_equal(run_of(StagesTask))


class OneKey(DictBatches):
    """Batches are dicts of one tensor, the model has one argument."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()

    def collate(self, samples: list[Any]) -> Any:
        return {"input": padded(samples)[0]}

    def loss(self, outputs: Any, targets: Any) -> Any:
        return F.cross_entropy(outputs[:, 0], targets["input"][:, 0] % 3)

    def metrics(self, outputs: Any, targets: Any) -> Any:
        return {}


def test_model_of_one_argument_takes_a_dict_of_one_tensor() -> None:
    configs: list[tuple[Any, int]] = [({"name": "hybrid", "pipeline": 2}, 2), ("ring", 1)]
    actual, expected = (
        merge_parts(train(job_of(strategy, workers, steps=2), OneKey))
        for strategy, workers in configs
    )
    for name, value in expected.items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)


class TwoKeys(OneKey):
    def collate(self, samples: list[Any]) -> Any:
        return {"input": padded(samples)[0], "labels": padded(samples)[2]}


class DrawsTorch(TupleBatches):
    """Draws random numbers in training only, which a comparison in evaluation mode misses."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        words = batch[0]
        if model.training:
            words = words * (torch.rand(words.shape) > 0.1)
        return model(words, batch[1])["logits"]


class DrawsPython(TupleBatches):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], batch[1])["logits"] * random.choice([1.0, 1.0])


class CallsTwice(NestedBatches):
    """Calls the model twice in training."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = super().step(model, batch)
        return super().step(model, batch) if model.training else outputs


class AutocastTagger(Tagger):
    """Runs the blocks under autocast in training."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            return super().forward(*args, **kwargs)


class ReversedTagger(Tagger):
    """Calls the blocks in reverse order in training."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        x = self.table(input_ids)
        for block in reversed(self.blocks) if self.training else self.blocks:
            x = block(x, attention_mask.unsqueeze(-1))
        return {"logits": self.head(self.norm(x))}


UNSUPPORTED: dict[str, tuple[type[Task], str]] = {
    "draws": (
        with_blocks(DrawsTorch),
        r"DrawsTorch\.forward\(\) draws random numbers before it calls",
    ),
    "draws by python": (with_blocks(DrawsPython), r"DrawsPython\.forward\(\) names `random`"),
    "twice": (
        with_blocks(CallsTwice),
        "calls blocks in another order than they are listed in, or again",
    ),
    "many": (
        with_blocks(ListBatches),
        "calls blocks in another order than they are listed in, or again",
    ),
    "dataclass": (
        with_blocks(DataclassBatches),
        "a pipeline takes tensors as inputs, train_data gives a Graph",
    ),
    "autocast": (
        with_blocks(DictBatches, AutocastTagger),
        r"its blocks run inside of torch\.autocast",
    ),
    "backwards": (with_blocks(DictBatches, ReversedTagger), "calls blocks in another order"),
    "stages": (
        type("Both", (StagesTask,), {"forward": lambda self, model, batch: model(**batch)}),
        r"Both\.forward\(\) calls the whole model, which can be cut only if it",
    ),
    "two keys": (TwoKeys, "takes `input`, and a batch is a dict of input, labels"),
}


@pytest.mark.parametrize("name", UNSUPPORTED)
def test_unsupported_models_are_rejected(name: str) -> None:
    cls, message = UNSUPPORTED[name]
    with pytest.raises(SpecError, match=message):
        run_of(cls)


def test_forward_hook_runs_once_and_pre_hook_is_rejected() -> None:
    class WithForwardHook(ModelLoss):
        def model(self) -> nn.Module:
            model = Tagger()
            model.register_forward_hook(
                lambda module, inputs, out: {**out, "loss": out["loss"] * 1}
            )
            return model

    assert_equal(run_of(WithForwardHook))

    class WithPreHook(ModelLoss):
        def model(self) -> nn.Module:
            model = Tagger()
            model.register_forward_pre_hook(lambda module, inputs: None)
            return model

    with pytest.raises(SpecError, match="has a forward pre-hook, and is called with a whole batch"):
        run_of(WithPreHook)


@pytest.mark.parametrize("victim", [0, 3])
def test_replaced_rank_gets_order_of_blocks_and_shapes(victim: int) -> None:
    """Each attempt exchanges the shapes, and the new rank learns where the norm is called."""
    reference = Workers(with_blocks(ModelLoss)).attempt()
    workers, fabric = Workers(with_blocks(ModelLoss)), Fabric(WORLD)
    fabric.kill(victim, after=12, group="world")
    assert workers.attempt(fabric) is None
    workers.renew(victim)
    model = workers.attempt()
    assert model is not None and reference is not None and same_tensors(model, reference)
    assert min(workers.starts) == max(workers.starts) > 0, "surviving ranks keep their state"


class CausalLinear(nn.Linear):
    """The output at a position depends on previous positions only."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x.cumsum(1)))


class Pairs(Task):
    """Pairs of words and classes, padded by micro-batch; the model is sequential."""

    def model(self) -> nn.Module:
        layers = [CausalLinear(WIDTH, WIDTH) for _ in range(4)]
        return nn.Sequential(nn.Embedding(WORDS, WIDTH), *layers, nn.Linear(WIDTH, 3)).double()

    def train_data(self) -> Sentences:
        return Sentences(SAMPLES)

    def eval_data(self) -> Sentences:
        return Sentences(SAMPLES)

    def collate(self, samples: Any) -> Any:
        words, _, classes = padded(samples)
        return words, classes

    def loss(self, outputs: Any, targets: Any) -> Any:
        count = (targets != -100).sum()
        return F.cross_entropy(outputs.flatten(0, 1), targets.flatten(), reduction="sum"), count


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_padded_pairs_match_ring(grid: dict[str, Any]) -> None:
    optimizer = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
    job = job_of("ring", optimizer=optimizer, steps=STEPS, seed=5, global_batch_size=BATCH)
    ring = train(job, Pairs)
    actual = merge_parts(run_of(Pairs, **grid))
    for name, value in ring.trained[0].items():
        torch.testing.assert_close(actual[name], value, rtol=1e-9, atol=1e-12)


class PaddedSentences(Sentences):
    """Pads the samples of a batch in `__getitems__`."""

    def __getitems__(self, ids: list[int]) -> list[Any]:
        words, _, classes = padded([self[number] for number in ids])
        return [*zip(words, classes, strict=True)]


def test_data_set_that_pads_is_rejected() -> None:
    data = {"train_data": lambda self: PaddedSentences(SAMPLES), "collate": Task.collate}
    cls = type("Bare", (Pairs,), data)
    with pytest.raises(SpecError, match=r"they may differ where .* its own collate\(\)"):
        run_of(cls)
