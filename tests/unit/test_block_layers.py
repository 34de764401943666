"""`hybrid` cuts a model that calls a list of blocks in its forward, or rejects it with a reason."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hybrid_models import grid_of, hybrid_job, merge_parts
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
    """A block with features, a mask and a keyword argument."""

    wide = True

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor, mask: Tensor, *, scale: float) -> Any:
        out: Tensor = x + scale * torch.tanh(self.linear(x * mask))
        return out


class Lm(nn.Module):
    """A language model without `Sequential`, whose `forward` computes masks."""

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


class WithTupleBlocks(Lm):
    """Blocks return tuples, as older models of Hugging Face do."""

    class Pair(Block):
        def forward(self, x: Tensor, mask: Tensor, *, scale: float) -> Any:
            return super().forward(x, mask, scale=scale), mask.sum()

    block = Pair

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = block(x, mask, scale=0.5)[0]
        return out


def small_model(name: str, config: str, **more: Any) -> Callable[[], nn.Module]:
    """Return a factory of a small model of transformers."""
    sizes = {"num_hidden_layers": 4, "hidden_size": WIDTH, "intermediate_size": 16}
    ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
    fields = {"vocab_size": WORDS, "num_attention_heads": 2, **sizes, **ends, **more}

    def make() -> nn.Module:
        settings = getattr(transformers, config)(attn_implementation="eager", **fields)
        model: nn.Module = getattr(transformers, name)(settings)
        return model

    return make


GROUPED = {"num_key_value_heads": 1, "tie_word_embeddings": False}
GPT2 = {"n_positions": LENGTH, "tie_word_embeddings": False}
NO_DROPOUT = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
SLIDING = {**GROUPED, "head_dim": 4, "sliding_window": 3, "sliding_window_pattern": 2}
IMAGES = {"image_size": 8, "patch_size": 4, "num_channels": 1, "num_labels": WORDS}
MODELS: dict[str, Callable[[], nn.Module]] = {
    "own": Lm,
    "tuples": WithTupleBlocks,
    "gpt2": small_model("GPT2LMHeadModel", "GPT2Config", **GPT2, **NO_DROPOUT),
    "tied": small_model("GPT2LMHeadModel", "GPT2Config", n_positions=LENGTH, **NO_DROPOUT),
    "tied twice": small_model(
        "BertForMaskedLM",
        "BertConfig",
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    ),
    "llama": small_model("LlamaForCausalLM", "LlamaConfig", **GROUPED),
    "gemma3": small_model("Gemma3ForCausalLM", "Gemma3TextConfig", **SLIDING),
    "vit": small_model("ViTForImageClassification", "ViTConfig", **IMAGES),
    "bert": small_model(
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
    class WordTask(Task):
        def model(self) -> nn.Module:
            return (make or MODELS[name])().double()

        def train_data(self) -> TensorDataset:
            return data_of(name)

        def loss(self, outputs: Any, targets: Tensor) -> Tensor:
            logits = getattr(outputs, "logits", outputs)
            return F.cross_entropy(logits.flatten(0, -2), targets.flatten())

    return WordTask


def train_plain(name: str, clip: float | None = None) -> dict[str, Tensor]:
    task, data = task_of(name)(), data_of(name)
    torch.manual_seed(5)
    model = task.model()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        inputs, targets = (t[step % 2 * BATCH :][:BATCH] for t in data.tensors)
        torch.autograd.backward(mean_loss(task, model(inputs), targets))
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
    return {key: value.detach() for key, value in model.state_dict().items()}


def run_of(task: type[Task], stages: int = 2, **options: Any) -> LocalRun:
    grid, workers = grid_of(stages, 1, 1, **options)
    job = hybrid_job(grid, workers, steps=STEPS, data={"shuffle": False})
    return train(job, task)


@pytest.mark.sweep(5)
@pytest.mark.parametrize("name", MODELS)
def test_matches_training_in_one_process(name: str) -> None:
    stages = 4 if name in ("own", "llama") else 2
    cut = "even" if name == "tuples" else "auto"
    options = {"schedule": "zb-h1"} if name == "gemma3" else {"recompute": name == "gpt2"}
    tolerance = (
        1e-10 if name in ("own", "tuples", "gpt2", "tied") else 1e-7
    )  # norms and softmax in float32
    run = run_of(task_of(name), stages, cut=cut, **options)
    params, expected = merge_parts(run), train_plain(name)
    assert params.keys() == expected.keys()
    for key in expected:
        assert (params[key] - expected[key]).abs().max() < tolerance, key


TIED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "clipped, two replicas": ({"data": 2}, {"clip_norm": 0.1}),
    "on servers": ({"data": 2, "data_strategy": "ps-sync"}, {"clip_norm": 0.1}),
    "four stages": ({"pipeline": 4, "schedule": "zb-h1"}, {}),
    "interleaved": ({"schedule": "interleaved", "virtual": 2}, {}),
    "recompute": ({"recompute": True}, {}),
}


@pytest.mark.sweep(2)
@pytest.mark.parametrize("setting", TIED)
def test_trains_tied_embeddings(setting: str) -> None:
    """Each micro-batch sends the weight to the last stage, and its gradient back."""
    options, fields = TIED[setting]
    options = {"pipeline": 2, "data": 1, **options}
    grid, workers = grid_of(options.pop("pipeline"), 1, options.pop("data"), **options)
    job = hybrid_job(grid, workers, steps=STEPS, data={"shuffle": False}, **fields)
    params = merge_parts(train(job, task_of("tied")))
    expected = train_plain("tied", fields.get("clip_norm"))
    assert params.keys() == expected.keys()
    for key in expected:
        assert (params[key] - expected[key]).abs().max() < 1e-10, key


def test_tied_model_resumes_under_another_strategy() -> None:
    hybrid, workers = grid_of(2, 1, 1)
    fields: dict[str, Any] = {"data": {"shuffle": False}, "checkpoint": {"every_steps": 1}}
    first = train(hybrid_job(hybrid, workers, steps=2, **fields), task_of("tied"))
    saved = first.checkpoints[1]
    for strategy, count in ((hybrid, workers), ({"name": "ring"}, 2)):
        job = hybrid_job(strategy, count, steps=STEPS, **fields)
        params = merge_parts(train(job, task_of("tied"), saved=saved))
        for key, value in train_plain("tied").items():
            assert (params[key] - value).abs().max() < 1e-10, key


def test_layers_are_named_by_their_parts() -> None:
    layers = find_layers(Lm())
    assert [layer.name for layer in layers] == ["place", *(f"blocks.{n}" for n in range(4)), "norm"]
    assert [*layers[0].parts] == ["place", "scale", "factor", "embed", "drop"]
    assert [*layers[-1].parts] == ["drop", "norm", "head"]


def test_rotary_embedding_is_in_first_and_last_layer() -> None:
    """Its buffers are computed, and checkpoints do not include them."""
    layers = find_layers(MODELS["llama"]())
    refuse_tied(layers, [2])
    assert "model.rotary_emb" in layers[0].parts
    assert "model.rotary_emb" in layers[-1].parts


def test_layers_keep_no_activations() -> None:
    layers, value = find_layers(Lm()), torch.zeros(2, LENGTH, dtype=torch.long)
    activations = []
    for layer in layers:
        value = layer.module(value)
        leaves = [t for t in tree_leaves(value) if getattr(t, "grad_fn", None) is not None]
        activations += [weakref.ref(leaf) for leaf in leaves]
    del value, leaves
    gc.collect()
    assert [ref() for ref in activations if ref() is not None] == []


class ComputesBetweenBlocks(Lm):
    """Applies dropout between the blocks in training."""

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        return super().step(block, F.dropout(x, 0.5, self.training), mask)


class SkipsBlock(Lm):
    """Does not call the last block."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        for block in self.blocks[:3]:
            x = self.step(block, x, ids.unsqueeze(-1) > 2)
        out: Tensor = self.head(x)
        return out


class Residual(Lm):
    """Uses the embedded input again after the blocks."""

    def forward(self, ids: Tensor) -> Tensor:
        embedded = x = self.embed(ids)
        for block in self.blocks:
            x = self.step(block, x, ids.unsqueeze(-1) > 2)
        out: Tensor = self.head(self.norm(x + embedded))
        return out


class Regularised(Lm):
    """Uses the embedded input again after the blocks, only in training."""

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        out = super().forward(ids)
        return out + x.square().mean() if self.training else out


class UsesBlockOutputs(Lm):
    """Uses a block's output after the blocks, only in training."""

    def forward(self, ids: Tensor) -> Tensor:
        features = []

        def keep(_: nn.Module, args: object, out: Tensor) -> None:
            features.append(out)

        handles = [block.register_forward_hook(keep) for block in self.blocks]
        out = super().forward(ids)
        for handle in handles:
            handle.remove()
        return out + self.head(features[1]) if self.training else out


@pytest.mark.parametrize("model", [Regularised, UsesBlockOutputs])
def test_rejects_use_of_earlier_values_after_the_blocks(model: type[Lm]) -> None:
    with pytest.raises(SpecError, match="in training its forward uses behind the blocks what"):
        run_of(task_of("own", model))


class WithStep(Task):
    """A task with `step`, which calls the model and may read its parameters."""

    def __init__(self) -> None:
        self.calls = 0

    def model(self) -> nn.Module:
        return task_of("own", Lm)().model()

    def train_data(self) -> TensorDataset:
        return data_of("own")

    def step(self, model: nn.Module, batch: Any) -> Tensor:
        ids, words = batch
        return F.cross_entropy(model(ids).flatten(0, -2), words.flatten()) + self.penalty(model)

    def penalty(self, model: nn.Module) -> Tensor:
        return torch.zeros((), dtype=torch.float64)


class PenaltyOfAllParameters(WithStep):
    """Adds the squares of all parameters, of which each stage has some, in training."""

    def penalty(self, model: nn.Module) -> Tensor:
        penalty = super().penalty(model)
        if model.training:
            penalty = penalty + sum(p.square().sum() for p in model.parameters())
        return penalty


class PenaltyOfEmbedding(WithStep):
    """Adds the square of a weight of the first stage."""

    def penalty(self, model: Any) -> Tensor:
        penalty: Tensor = model.embed.weight.square().mean()
        return penalty


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (PenaltyOfAllParameters, "not compute what Lm does in training"),
        (PenaltyOfEmbedding, "not compute what Lm does"),
    ],
)
def test_rejects_step_that_reads_parameters_of_other_stages(task: type[Task], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        run_of(task)


class CountsCalls(WithStep):
    def step(self, model: nn.Module, batch: Any) -> Tensor:
        self.calls += 1
        shifted = (batch[0] + self.calls) % WORDS, batch[1]
        return super().step(model, shifted) * min(1.0, self.calls / 20)


def test_trial_does_not_change_the_state_of_the_task() -> None:
    params, expected = (merge_parts(run_of(CountsCalls, n, micro_batches=4)) for n in (2, 1))
    for key, value in expected.items():
        assert (params[key] - value).abs().max() < 1e-10, key


def model_that_writes(write: Callable[[Any], object], *, after: bool) -> type[Lm]:
    """Return a model that writes its own buffer in training, before or after its blocks."""

    class Writing(Lm):
        def forward(self, ids: Tensor) -> Tensor:
            if self.training and not after:
                write(self)
            out = super().forward(ids)
            if self.training and after:
                write(self)
            return out

    return Writing


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize(
    "write", [lambda m: m.factor.mul_(0.9), lambda m: setattr(m, "factor", m.factor * 0.9)]
)
def test_rejects_buffer_writes_of_forward(write: Callable[[Any], object], after: bool) -> None:
    with pytest.raises(SpecError, match="its forward writes `factor`, and two stages run it"):
        run_of(task_of("own", model_that_writes(write, after=after)))


class ReadsBlockAttributes(Lm):
    """Reads an attribute that its blocks set, in training: a load-balancing loss of experts."""

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
            out = out + sum(getattr(block, "aux_loss") for block in self.blocks)  # noqa: B009
        return out


class PassesListToBlocks(Lm):
    """Blocks append to a list, whose sum is added in training."""

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


class CustomFloat(float):
    """A type that messages between stages do not support."""


class PassesCustomType(Lm):
    """Calls blocks with an argument of a type that messages do not support."""

    def step(self, block: Any, x: Tensor, mask: Tensor) -> Tensor:
        out: Tensor = block(x, mask, scale=CustomFloat(0.5))
        return out


REJECTED: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "between": (ComputesBetweenBlocks, "computes something between blocks 0 and the next"),
    "skipped": (SkipsBlock, "goes on before all blocks are called"),
    "residual": (Residual, "do not compute what Residual does"),
    "attributes": (ReadsBlockAttributes, "reads what they may have kept, `aux_loss`"),
    "list": (PassesListToBlocks, "called with kept, an empty container, which they may fill"),
    "custom type": (
        PassesCustomType,
        "called with scale, a CustomFloat, and stages hand on tensors",
    ),
}


@pytest.mark.parametrize("name", REJECTED)
def test_rejects_unsupported_forwards(name: str) -> None:
    model, message = REJECTED[name]
    with pytest.raises(SpecError) as caught:
        run_of(task_of("own", model))
    assert message in str(caught.value)


def test_errors_of_the_model_propagate_unchanged() -> None:
    first = find_layers(Lm())[0].module
    with pytest.raises(IndexError, match="index out of range"):
        first(torch.full((2, LENGTH), WORDS))
    assert first(torch.zeros(2, LENGTH, dtype=torch.long))["features"].shape == (2, LENGTH, WIDTH)


def test_rejects_random_forward_in_evaluation() -> None:
    class Random(Lm):
        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(ids) + torch.rand(())

    with pytest.raises(SpecError, match="draws random numbers in evaluation"):
        run_of(task_of("own", Random))
