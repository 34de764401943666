"""Models that call a list of blocks are cut as they are, or it is said why not."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hybrid_models import grid_of, hybrid_job, whole
from local_run import LocalRun, train
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from distplat.platform.errors import SpecError
from distplat.strategies.model.layers import find_layers, refuse_tied
from distplat.strategies.task import Task
from distplat.strategies.torch_compat import tree_leaves

transformers = pytest.importorskip("transformers")

SAMPLES, BATCH, STEPS, LENGTH, WORDS, WIDTH = 21, 16, 3, 6, 11, 8


class Block(nn.Module):
    """Takes features, a mask, and a setting by name."""

    wide = True

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, *, scale: float) -> Any:
        out: Tensor = x + scale * torch.tanh(self.linear(x * mask))
        return out


class Lm(nn.Module):
    """A language model as people write it: no `Sequential`, and masks that `forward` makes."""

    block: Callable[[int], nn.Module] = Block

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.place = nn.Parameter(torch.randn(LENGTH, WIDTH))
        self.scale = nn.Parameter(torch.ones(()))
        self.register_buffer("factor", torch.tensor(0.5))
        self.drop = nn.Dropout(0.0)
        self.blocks = nn.ModuleList(self.block(n) for n in range(4))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.drop(self.embed(ids) + self.place[: ids.shape[1]]) * self.factor
        odd, even = (ids % 2 == 1).unsqueeze(-1), (ids % 2 == 0).unsqueeze(-1)
        for block in self.blocks:
            mask = odd if getattr(block, "number") % 2 else even  # noqa: B009
            x = self.step(block, x, mask)
        out: Tensor = self.scale * self.head(self.norm(x) * self.factor) * (1 + mask)
        return out

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = block(x, mask, scale=0.5)
        return out


class Tupled(Lm):
    """Blocks give tuples, as older ones of Hugging Face's do."""

    class Pair(Block):
        def forward(self, x: Tensor, mask: Tensor, *, scale: float) -> Any:
            return super().forward(x, mask, scale=scale), mask.sum()

    block = Pair

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = block(x, mask, scale=0.5)[0]
        return out


def small(kind: str, config: str, **more: Any) -> Callable[[], nn.Module]:
    sizes = {"num_hidden_layers": 4, "hidden_size": WIDTH, "intermediate_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    given = {"vocab_size": WORDS, "num_attention_heads": 2, **sizes, **ends, **more}

    def make() -> nn.Module:
        settings = getattr(transformers, config)(attn_implementation="eager", **given)
        made: nn.Module = getattr(transformers, kind)(settings)
        return made

    return make


GROUPED = {"num_key_value_heads": 1, "tie_word_embeddings": False}
GPT2 = {"n_positions": LENGTH, "tie_word_embeddings": False}
DRY = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
HALVES = {**GROUPED, "head_dim": 4, "sliding_window": 3, "sliding_window_pattern": 2}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": WORDS}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": Lm,
    "tuples": Tupled,
    "gpt2": small("GPT2LMHeadModel", "GPT2Config", **GPT2, **DRY),
    "tied": small("GPT2LMHeadModel", "GPT2Config", n_positions=LENGTH, **DRY),
    "tied twice": small(
        "BertForMaskedLM",
        "BertConfig",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    "llama": small("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "gemma3": small("Gemma3ForCausalLM", "Gemma3TextConfig", **HALVES),
    "vit": small("ViTForImageClassification", "ViTConfig", **IMAGES),
    "bert": small(
        "BertForTokenClassification",
        "BertConfig",
        num_labels=WORDS,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
}


def data_of(name: str) -> TensorDataset:
    generator = torch.Generator().manual_seed(1)
    shape = (SAMPLES, 1, 8, 8) if name == "vit" else (SAMPLES, LENGTH)
    ids = torch.randint(0, WORDS, (SAMPLES, LENGTH), generator=generator)
    inputs = torch.randn(shape, generator=generator).double() if name == "vit" else ids
    return TensorDataset(inputs, ids[:, 0] if name == "vit" else ids)


def task_of(name: str, make: Callable[[], nn.Module] | None = None) -> type[Task]:
    class Words(Task):
        def model(self) -> nn.Module:
            return (make or MODELS[name])().double()

        def train_data(self) -> TensorDataset:
            return data_of(name)

        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            logits = getattr(outputs, "logits", outputs)
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    return Words


def plain(name: str, clip: float | None = None) -> dict[str, Tensor]:
    task, data = task_of(name)(), data_of(name)
    torch.manual_seed(5)
    model = task.model()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = (one[step % 2 * BATCH :][:BATCH] for one in data.tensors)
        torch.autograd.backward(mean_loss(task, model(inputs), targets))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {key: value.detach() for key, value in model.state_dict().items()}


def run_of(task: type[Task], stages: int = 2, **options: Any) -> LocalRun:
    chosen, workers = grid_of(stages, 1, 1, **options)
    job = hybrid_job(chosen, workers, steps=STEPS, data={"shuffle": False})
    return train(job, task)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("name", MODELS)
def test_they_train_as_in_one_process(name: str) -> None:
    stages = 4 if name in ("own", "llama") else 2
    cut = "even" if name == "tuples" else "auto"
    options = {"schedule": "zb-h1"} if name == "gemma3" else {"recompute": name == "gpt2"}
    within = (
        1e-10 if name in ("own", "tuples", "gpt2", "tied") else 1e-7
    )  # norms and softmax in float32
    run = run_of(task_of(name), stages, cut=cut, **options)
    found, expected = whole(run), plain(name)
    assert found.keys() == expected.keys()
    for key in expected:
        assert (found[key] - expected[key]).abs().max() < within, key


TIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clipped, two replicas": ({"data": 2}, {"clip_norm": 0.1}),
    "on servers": ({"data": 2, "data_strategy": "ps-sync"}, {"clip_norm": 0.1}),
    "four stages": ({"pipeline": 4, "schedule": "zb-h1"}, {}),
    "interleaved": ({"schedule": "interleaved", "virtual": 2}, {}),
    "computed again": ({"recompute": True}, {}),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("way", TIED)
def test_a_tied_head_trains_its_embedding(way: str) -> None:
    """Each micro-batch brings the weight to the last stage, and its gradient back."""
    options, fields = TIED[way]
    options = {"pipeline": 2, "data": 1, **options}
    chosen, workers = grid_of(options.pop("pipeline"), 1, options.pop("data"), **options)
    job = hybrid_job(chosen, workers, steps=STEPS, data={"shuffle": False}, **fields)
    found = whole(train(job, task_of("tied")))
    expected = plain("tied", fields.get("clip_norm"))
    assert found.keys() == expected.keys()
    for key in expected:
        assert (found[key] - expected[key]).abs().max() < 1e-10, key


def test_a_tied_model_goes_on_under_another_strategy() -> None:
    chosen, workers = grid_of(2, 1, 1)
    fields: dict[str, Any] = {"data": {"shuffle": False}, "checkpoint": {"every_steps": 1}}
    first = train(hybrid_job(chosen, workers, steps=2, **fields), task_of("tied"))
    saved = first.checkpoints[1]
    for grid, count in ((chosen, workers), ({"name": "ring"}, 2)):
        job = hybrid_job(grid, count, steps=STEPS, **fields)
        found = whole(train(job, task_of("tied"), saved=saved))
        for key, value in plain("tied").items():
            assert (found[key] - value).abs().max() < 1e-10, key


def test_layers_have_the_names_of_the_parts_in_them() -> None:
    layers = find_layers(Lm())
    assert [one.name for one in layers] == ["place", *(f"blocks.{n}" for n in range(4)), "norm"]
    assert [*layers[0].parts] == ["place", "scale", "factor", "embed", "drop"]
    assert [*layers[-1].parts] == ["drop", "norm", "head"]


def test_rotary_angles_are_on_both_sides_of_a_cut() -> None:
    """They are buffers that no checkpoint has, as they are computed."""
    layers = find_layers(MODELS["llama"]())
    refuse_tied(layers, [2])
    assert "model.rotary_emb" in layers[0].parts
    assert "model.rotary_emb" in layers[-1].parts


def test_nothing_of_a_batch_is_kept() -> None:
    layers, value = find_layers(Lm()), torch.zeros(2, LENGTH, dtype=torch.long)
    made = []
    for layer in layers:
        value = layer.module(value)
        found = [one for one in tree_leaves(value) if getattr(one, "grad_fn", None) is not None]
        made += [weakref.ref(one) for one in found]
    del value, found
    gc.collect()
    assert [one() for one in made if one() is not None] == []


class Between(Lm):
    """In training something is computed between the blocks."""

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        return super().step(block, F.dropout(x, 0.5, self.training), mask)


class Skipped(Lm):
    """The last block is left out."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks[:3]:
            x = self.step(block, x, ids.unsqueeze(-1) > 2)
        out: Tensor = self.head(x)
        return out


class Residual(Lm):
    """What was embedded is used again behind the blocks."""

    def forward(self, ids: Tensor) -> Tensor:
        embedded = x = self.embed(ids)
        for block in self.blocks:
            x = self.step(block, x, ids.unsqueeze(-1) > 2)
        out: Tensor = self.head(self.norm(x + embedded))
        return out


class Regularised(Lm):
    """What was embedded is used again, in training alone."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out = super().forward(ids)
        return out + x.square().mean() if self.training else out


class Deep(Lm):
    """Each block's features are used, in training alone."""

    def forward(self, ids: Tensor) -> Tensor:
        features = []

        def keep(_: nn.Module, given: object, out: Tensor) -> None:
            features.append(out)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        out = super().forward(ids)
        for handle in handles:
            handle.remove()
        return out + self.head(features[1]) if self.training else out


@pytest.mark.parametrize("made", [Regularised, Deep])
def test_what_only_other_stages_have_is_told_in_the_first_micro_batch(made: type[Lm]) -> None:
    with pytest.raises(SpecError, match="in training its forward uses behind the blocks what"):
        run_of(task_of("own", made))


class Stepwise(Task):
    """Calls the model itself, and reads what the model's parts have."""

    def __init__(self) -> None:
        self.calls = 0

    def model(self) -> nn.Module:
        return task_of("own", Lm)().model()

    def train_data(self) -> TensorDataset:
        return data_of("own")

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        ids, words = batch
        return F.cross_entropy(model(ids).flatten(0, -2), words.flatten()) + self.more(model)

    def more(self, model: nn.Module) -> Tensor:
        return torch.zeros((), dtype=torch.float64)


class Decayed(Stepwise):
    """Adds the squares of all parameters, of which a stage has some."""

    def more(self, model: nn.Module) -> Tensor:
        found = super().more(model)
        if model.training:
            found = found + sum(one.square().sum() for one in model.parameters())
        return found


class Shrunk(Stepwise):
    """Reads a weight that the first stage has."""

    def more(self, model: Any) -> Tensor:
        found: Tensor = model.embed.weight.square().mean()
        return found


@pytest.mark.parametrize(
    ("made", "words"),
    [(Decayed, "not compute what Lm does in training"), (Shrunk, "not compute what Lm does")],
)
def test_what_a_step_reads_of_other_stages_is_seen(made: type[Task], words: str) -> None:
    with pytest.raises(SpecError, match=words):
        run_of(made)


class Warming(Stepwise):
    def step(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        shifted = (batch[0] + self.calls) % WORDS, batch[1]
        return super().step(model, shifted) * min(1.0, self.calls / 20)


def test_a_step_that_counts_its_calls_counts_no_trial() -> None:
    found, expected = (whole(run_of(Warming, n, micro_batches=4)) for n in (2, 1))
    for key, value in expected.items():
        assert (found[key] - value).abs().max() < 1e-10, key


def writing(write: Callable[[Any], object], *, behind: bool) -> type[Lm]:
    """Give a model whose own buffer is written in training, before its blocks or behind."""

    class Writing(Lm):
        def forward(self, ids: Tensor) -> Tensor:
            if self.training and not behind:
                write(self)
            out = super().forward(ids)
            if self.training and behind:
                write(self)
            return out

    return Writing


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize(
    "write", [lambda m: m.factor.mul_(0.9), lambda m: setattr(m, "factor", m.factor * 0.9)]
)
def test_two_stages_run_what_a_forward_writes(write: Callable[[Any], object], behind: bool) -> None:
    with pytest.raises(SpecError, match="its forward writes `factor`, and two stages run it"):
        run_of(task_of("own", writing(write, behind=behind)))


class Keeping(Lm):
    """Blocks keep what training alone reads, as experts do for the balance of their load."""

    class Expert(Block):
        def __init__(self, number: int) -> None:
            super().__init__(number)
            self.aux_loss: Any = 0.0

        def forward(self, x: Tensor, mask: Tensor, *, scale: float) -> Any:
            self.aux_loss = x.square().mean()
            return super().forward(x, mask, scale=scale)

    block = Expert

    def forward(self, ids: Tensor) -> Tensor:
        out = super().forward(ids)
        if self.training:
            out = out + sum(getattr(one, "aux_loss") for one in self.blocks)  # noqa: B009
        return out


class Filling(Lm):
    """Blocks fill a list, of which training adds up what is in it."""

    class Writer(Block):
        def forward(self, x: Tensor, mask: Tensor, *, scale: float, kept: Any = None) -> Any:
            kept.append(x.square().mean())
            return super().forward(x, mask, scale=scale)

    block = Writer

    def forward(self, ids: Tensor) -> Tensor:
        self.kept: list[Tensor] = []
        out = super().forward(ids)
        return out + sum(self.kept) if self.training else out

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = block(x, mask, scale=0.5, kept=self.kept)
        return out


class Half(float):
    """Of a type of its own."""


class Strange(Lm):
    """Blocks are called with what no message holds."""

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = block(x, mask, scale=Half(0.5))
        return out


REFUSED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "between": (Between, "computes something between blocks 0 and the next"),
    "skipped": (Skipped, "goes on before all blocks are called"),
    "residual": (Residual, "do not compute what Residual does"),
    "keeping": (Keeping, "reads what they may have kept, `aux_loss`"),
    "filling": (Filling, "called with kept, an empty container, which they may fill"),
    "strange": (Strange, "called with scale, a Half, and stages hand on tensors"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_they_leave_out_is_refused(name: str) -> None:
    make, text = REFUSED[name]
    with pytest.raises(SpecError) as caught:
        run_of(task_of("own", make))
    assert text in str(caught.value)


def test_an_error_of_the_models_own_comes_out_as_it_is() -> None:
    first = find_layers(Lm())[0].module
    with pytest.raises(IndexError, match="index out of range"):
        first(torch.full((2, LENGTH), WORDS))
    assert first(torch.zeros(2, LENGTH, dtype=torch.long))["features"].shape == (2, LENGTH, WIDTH)


def test_a_guess_that_cannot_be_tried_is_refused() -> None:
    class Random(Lm):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + torch.rand(())

    with pytest.raises(SpecError, match="draws random numbers in evaluation"):
        run_of(task_of("own", Random))
