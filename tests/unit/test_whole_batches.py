"""Under hybrid, whole batches enter a model of blocks: dicts, and what a task's own call takes."""

import random
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from batch_forms import Dicts, Listed, Nested, Packed, Triples, of_the_end, padded, total
from hybrid_models import grid_of, hybrid_job, whole
from hybrid_workers import WORLD, Workers, same
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
    """Called as Hugging Face's models are, and without a mask where nothing is padded."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH, dtype=torch.float64)  # called behind the blocks
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


def of_blocks(kind: type[Task], made: type[nn.Module] = Tagger) -> type[Task]:
    def model(self: Task) -> nn.Module:
        return made()

    return type(kind.__name__, (kind,), {"model": model})


class Own(Dicts):
    """The model's own loss, a mean over words, with their number."""

    def loss(self, outputs: Any, targets: Any) -> Any:
        count = (targets["labels"] != -100).sum()
        return outputs["loss"] * count, count


@cache
def plain() -> tuple[dict[str, Tensor], float]:
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


def run_of(kind: type[Task], pipeline: int = 2, data: int = 1, **options: Any) -> LocalRun:
    chosen, workers = grid_of(pipeline, 1, data, **options)
    return train(hybrid_job(chosen, workers, steps=STEPS), kind)


GRIDS: list[dict[str, Any]] = [
    {},
    {"pipeline": 4},
    {"schedule": "interleaved", "virtual": 2, "micro_batches": 8},
    {"schedule": "zb-h1", "data": 2, "cut": "auto"},
    {"data": 2, "recompute": True, "data_strategy": "ps-sync"},
]


def assert_equal(run: LocalRun) -> None:
    (expected, loss), found = plain(), whole(run)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)
    ends = [one for one in of_the_end(run) if one.sums]  # those of the last stage
    assert total(ends, "loss") == pytest.approx(loss, rel=1e-9)


@pytest.mark.sweep(2)
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_padded_dicts_train_as_a_plain_loop(grid: dict[str, Any]) -> None:
    """Micro-batches of one size have other lengths, and some need no mask."""
    assert_equal(run_of(of_blocks(Own), **grid))


@pytest.mark.parametrize("kind", [Dicts, Triples, Nested])
def test_so_do_batches_that_the_task_takes_apart(kind: type[Task]) -> None:
    assert_equal(run_of(of_blocks(kind), data=2))


class First(nn.Module):
    def __init__(self, table: nn.Module) -> None:
        super().__init__()
        self.table = table

    def forward(self, batch: dict[str, Tensor]) -> Any:
        mask = batch["attention_mask"].unsqueeze(-1)
        return self.table(batch["input_ids"]), mask, batch["labels"]


class Masked(nn.Module):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, value: Any) -> Any:
        return self.block(*value[:2]), *value[1:]


class Last(nn.Module):
    def __init__(self, norm: nn.Module, head: nn.Module) -> None:
        super().__init__()
        self.norm, self.head = norm, head

    def forward(self, value: Any) -> Any:
        logits = self.head(self.norm(value[0]))
        loss = F.cross_entropy(logits.flatten(0, 1), value[2].flatten())
        return {"loss": loss, "logits": logits}


class Staged(Dicts):
    """The first module of `stages` takes the dict; `loss` gets it, too."""

    def model(self) -> nn.Module:
        return Tagger()

    def stages(self, model: Any) -> list[nn.Module]:
        return [
            First(model.table),
            *map(Masked, model.blocks),
            Last(model.norm, model.head),
        ]


def test_stages_of_the_tasks_own_take_a_dict() -> None:
    assert_equal(run_of(Staged))


class Mapped(Dicts):
    """A dict of one tensor, for a model of one argument."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Embedding(WORDS, 8), nn.Linear(8, 8), nn.Linear(8, 3)).double()

    def collate(self, samples: list[Any]) -> Any:
        return {"input": padded(samples)[0]}

    def loss(self, outputs: Any, targets: Any) -> Any:
        return F.cross_entropy(outputs[:, 0], targets["input"][:, 0] % 3)

    def metrics(self, outputs: Any, targets: Any) -> Any:
        return {}


def test_a_model_of_one_argument_takes_a_dict_of_one() -> None:
    ways: list[tuple[Any, int]] = [({"name": "hybrid", "pipeline": 2}, 2), ("ring", 1)]
    found, expected = (whole(train(job_of(way, workers, steps=2), Mapped)) for way, workers in ways)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


class TwoKeys(Mapped):
    def collate(self, samples: list[Any]) -> Any:
        return {"input": padded(samples)[0], "labels": padded(samples)[2]}


class Drawing(Triples):
    """Draws in training alone, where no comparison sees it."""

    def forward(self, model: nn.Module, batch: Any) -> Any:
        words = batch[0]
        if model.training:
            words = words * (torch.rand(words.shape) > 0.1)
        return model(words, batch[1])["logits"]


class Picking(Triples):
    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], batch[1])["logits"] * random.choice([1.0, 1.0])


class Twice(Nested):
    """Calls the model once more in training."""

    def step(self, model: nn.Module, batch: Any) -> Any:
        found = super().step(model, batch)
        return super().step(model, batch) if model.training else found


class Cast(Tagger):
    """In training its blocks run in another precision."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.training):
            return super().forward(*args, **kwargs)


class Backwards(Tagger):
    """In training its blocks are called the other way round."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        x = self.table(input_ids)
        for block in reversed(self.blocks) if self.training else self.blocks:
            x = block(x, attention_mask.unsqueeze(-1))
        return {"logits": self.head(self.norm(x))}


REFUSED: dict[str, tuple[type[Task], str]] = {
    "draws": (of_blocks(Drawing), r"Drawing\.forward\(\) draws random numbers before it calls"),
    "draws by python": (of_blocks(Picking), r"Picking\.forward\(\) names `random`"),
    "twice": (of_blocks(Twice), "calls blocks in another order than they are listed in, or again"),
    "many": (of_blocks(Listed), "calls blocks in another order than they are listed in, or again"),
    "dataclass": (
        of_blocks(Packed),
        "a pipeline takes tensors as inputs, train_data gives a Graph",
    ),
    "autocast": (of_blocks(Dicts, Cast), r"its blocks run inside of torch\.autocast"),
    "backwards": (of_blocks(Dicts, Backwards), "calls blocks in another order"),
    "stages": (
        type("Both", (Staged,), {"forward": lambda self, model, batch: model(**batch)}),
        r"Both\.forward\(\) calls the whole model, which can be cut only if it",
    ),
    "two keys": (TwoKeys, "takes `input`, and a batch is a dict of input, labels"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_cut_so_is_refused(name: str) -> None:
    kind, told = REFUSED[name]
    with pytest.raises(SpecError, match=told):
        run_of(kind)


def test_hooks_of_the_whole_model_are_called_once_or_refused() -> None:
    class Hooked(Own):
        def model(self) -> nn.Module:
            model = Tagger()
            model.register_forward_hook(
                lambda module, inputs, out: {**out, "loss": out["loss"] * 1}
            )
            return model

    assert_equal(run_of(Hooked))

    class Before(Own):
        def model(self) -> nn.Module:
            model = Tagger()
            model.register_forward_pre_hook(lambda module, inputs: None)
            return model

    with pytest.raises(SpecError, match="has a forward pre-hook, and is called with a whole batch"):
        run_of(Before)


@pytest.mark.parametrize("victim", [0, 3])
def test_a_lost_rank_learns_the_order_of_parts_and_the_forms(victim: int) -> None:
    """Forms are told anew in each attempt; a norm that is called last is where the others know."""
    unfailed = Workers(of_blocks(Own)).attempt()
    workers, fabric = Workers(of_blocks(Own)), Fabric(WORLD)
    fabric.kill(victim, after=12, group="world")
    assert workers.attempt(fabric) is None
    workers.renew(victim)
    model = workers.attempt()
    assert model is not None and unfailed is not None and same(model, unfailed)
    assert min(workers.starts) == max(workers.starts) > 0, "survivors keep what they have"


class Mixed(nn.Linear):
    """What follows a word does not change it."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x.cumsum(1)))


class Pairs(Task):
    """Pairs of words and classes, padded by micro-batch; no list of blocks."""

    def model(self) -> nn.Module:
        layers = [Mixed(WIDTH, WIDTH) for _ in range(4)]
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
def test_pairs_that_collate_pads_train_as_under_ring(grid: dict[str, Any]) -> None:
    rule = {"name": "SGD", "lr": 0.05, "momentum": 0.9}
    job = job_of("ring", optimizer=rule, steps=STEPS, seed=5, global_batch_size=BATCH)
    alone = train(job, Pairs)
    found = whole(run_of(Pairs, **grid))
    for name, value in alone.trained[0].items():
        torch.testing.assert_close(found[name], value, rtol=1e-9, atol=1e-12)


class PaddedSentences(Sentences):
    """Pads what is asked for together, itself."""

    def __getitems__(self, ids: list[int]) -> list[Any]:
        words, _, classes = padded([self[number] for number in ids])
        return [*zip(words, classes, strict=True)]


def test_a_data_set_that_pads_by_itself_is_told_what_to_write() -> None:
    data = {"train_data": lambda self: PaddedSentences(SAMPLES), "collate": Task.collate}
    kind = type("Bare", (Pairs,), data)
    with pytest.raises(SpecError, match=r"they may differ where .* its own collate\(\)"):
        run_of(kind)
