"""Hugging Face models with padded dict batches under `hybrid` match a plain loop."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hybrid_models import grid_of, hybrid_job, merge_parts
from local_run import LocalRun, train
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from distplat import Task
from distplat.platform.errors import SpecError
from distplat.platform.sampler import Sampler
from distplat.strategies.tensor.parallel_plan import HeadLayout

transformers = pytest.importorskip("transformers")

SAMPLES, BATCH, STEPS, LENGTH, WORDS, WIDTH, CLASSES = 21, 16, 3, 7, 11, 8, 4


class Samples(Dataset[Any]):
    """Token sequences and images; every third sequence has the maximum length."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        generator = torch.Generator().manual_seed(index)
        length = LENGTH if index % 3 == 0 else 3 + index % 4
        words = torch.randint(1, WORDS, (length,), generator=generator)
        return words, torch.randn(1, 8, 8, generator=generator, dtype=torch.float64)


class Words(Task):
    """A language model: predicts the next token."""

    model_name, config_name = "GPT2LMHeadModel", "GPT2Config"
    more: dict[str, Any] = {}  # noqa: RUF012

    def model(self) -> nn.Module:
        sizes = {"num_hidden_layers": 4, "hidden_size": WIDTH, "intermediate_size": 16}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        kwargs = {"vocab_size": WORDS, "num_attention_heads": 2, **sizes, **ends, **self.more}
        config = getattr(transformers, self.config_name)(**kwargs)
        model: nn.Module = getattr(transformers, self.model_name)(config)
        return model.double()

    def train_data(self) -> Dataset[Any]:
        return Samples()

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        words = pad_sequence([ids for ids, _ in samples], batch_first=True)
        labels = words.masked_fill(words == 0, -100)
        return {"input_ids": words, "attention_mask": (words > 0).long(), "labels": labels}

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
        count = (batch["labels"][:, 1:] != -100).sum()
        return outputs.loss * count, count


class Gpt2(Words):
    more = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # noqa: RUF012


class Llama(Words):
    model_name, config_name = "LlamaForCausalLM", "LlamaConfig"
    more = {"num_key_value_heads": 1}  # noqa: RUF012


class Opt(Words):
    """The final norm is registered before the blocks."""

    model_name, config_name = "OPTForCausalLM", "OPTConfig"
    more = {  # noqa: RUF012
        "ffn_dim": 16,
        "word_embed_proj_dim": WIDTH,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


class Sentences(Words):
    """Sentence classification: the loss is a mean over samples."""

    model_name, config_name = "BertForSequenceClassification", "BertConfig"
    more = {  # noqa: RUF012
        "num_labels": CLASSES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        batch = super().collate(samples)
        return {**batch, "labels": batch["input_ids"][:, 0] % CLASSES}

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
        return outputs.loss


class Images(Sentences):
    model_name, config_name = "ViTForImageClassification", "ViTConfig"
    more = {**Sentences.more, "image_size": 8, "patch_size": 4, "num_channels": 1}  # noqa: RUF012

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        labels = super().collate(samples)["labels"]
        return {"pixel_values": torch.stack([image for _, image in samples]), "labels": labels}


class StepGpt2(Gpt2):
    """The model of `Gpt2` in a task with `step`."""

    loss: Any = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(**batch)
        return {**outputs, "loss": Words.loss(self, outputs, batch)}


@cache
def plain(task_cls: type[Task]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    task = task_cls()
    model, data = task.model(), task.train_data()
    model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    sampler = Sampler(SAMPLES, BATCH, 1, seed=5)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = task.collate([data[int(i)] for i in sampler.batch_ids(step)])
        torch.autograd.backward(model(**batch).loss)
        optimizer.step()
    return {name: value.detach() for name, value in model.state_dict().items()}


def run_of(task_cls: type[Task], pipeline: int = 2, data: int = 1, **options: Any) -> LocalRun:
    tensor = options.pop("tensor", 1)
    strategy, workers = grid_of(pipeline, tensor, data, **options)
    return train(hybrid_job(strategy, workers, steps=STEPS), task_cls)


def assert_equal(task_cls: type[Task], **options: Any) -> None:
    trained, expected = merge_parts(run_of(task_cls, **options)), plain(task_cls)
    assert trained.keys() == expected.keys()
    for name, value in expected.items():
        assert (trained[name] - value).abs().max() < 1e-7, name  # losses and norms are in float32


INTERLEAVED = {"schedule": "interleaved", "virtual": 2}
CASES: list[tuple[type[Task], dict[str, Any]]] = [
    (Gpt2, {"pipeline": 4}),
    (Gpt2, {**INTERLEAVED, "data": 2}),
    (StepGpt2, {"data": 2}),
    (Llama, {"data": 2, "cut": "auto"}),
    (Llama, {**INTERLEAVED}),
    (Sentences, {"pipeline": 4}),
    (Images, {"data": 2}),
    (Opt, {"pipeline": 2}),
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("task_cls", "grid"), CASES, ids=str)
def test_matches_plain_loop(task_cls: type[Task], grid: dict[str, Any]) -> None:
    assert_equal(task_cls, **grid)


MLP = "model.layers.*.mlp"


def test_linear_layers_are_sliced() -> None:
    plan = {f"{MLP}.gate_proj": "colwise", f"{MLP}.up_proj": "colwise"}
    assert_equal(Llama, tensor=2, tensor_plan={**plan, f"{MLP}.down_proj": "rowwise"})


class Grouped(Llama):
    """Grouped-query attention with `head_layout`, as in docs/tensor_parallel.md."""

    more = {"num_attention_heads": 4, "num_key_value_heads": 2}  # noqa: RUF012

    def model(self) -> nn.Module:
        model = super().model()
        blocks: Any = model.get_submodule("model.layers")
        inwards = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "heads features")
        for layer in blocks:
            layer.self_attn.heads = self.more["num_attention_heads"]
            layer.self_attn.head_layout = HeadLayout(inwards=inwards, outwards="o_proj")
        return model


def test_heads_are_sliced_with_head_layout() -> None:
    assert_equal(Grouped, tensor=2, tensor_plan={"model.layers.*.self_attn": "heads"})


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            {"transformer.h.*.mlp.c_fc": "colwise", "transformer.h.*.mlp.c_proj": "rowwise"},
            "mlp.c_fc is a Conv1D, and `colwise` splits Linear",
        ),
        ({"transformer.h.*.attn": "heads"}, "does not say where its heads are"),
    ],
    ids=["mlp", "heads"],
)
def test_unsupported_layers_are_not_sliced(plan: dict[str, str], message: str) -> None:
    with pytest.raises(SpecError, match=message):
        run_of(Gpt2, tensor=2, tensor_plan=plan)


class T5(Words):
    """The first block computes position biases, which later blocks receive."""

    def model(self) -> nn.Module:
        sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
        more = {"num_decoder_layers": 3, "dropout_rate": 0.0}
        config = transformers.T5Config(vocab_size=WORDS, **sizes, **ends, **more)
        model: Any = transformers.T5ForConditionalGeneration(config)
        # Untied, because the embedding is on the first stage.
        model.lm_head = nn.Linear(WIDTH, WORDS, bias=False)
        model.config.scale_decoder_outputs = False
        module: nn.Module = model.double()
        return module

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
        count = (batch["labels"] != -100).sum()
        return outputs.loss * count, count


class Marian(T5):
    def model(self) -> nn.Module:
        sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
        config = transformers.MarianConfig(vocab_size=WORDS, **sizes, **heads, **ends)
        model: nn.Module = transformers.MarianMTModel(config)
        return model.double()


class Whisper(T5):
    def model(self) -> nn.Module:
        sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 4}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
        more = {"max_source_positions": 5, "bos_token_id": 0}
        config = transformers.WhisperConfig(vocab_size=WORDS, **sizes, **heads, **ends, **more)
        model: nn.Module = transformers.WhisperForConditionalGeneration(config)
        return model.double()

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        labels = super().collate(samples)["labels"]
        features = torch.stack([image.flatten()[:40].view(4, 10) for _, image in samples])
        return {"input_features": features, "labels": labels}


@pytest.mark.parametrize(
    ("task_cls", "blocks"),
    [(T5, "decoder.block"), (Marian, "model.decoder.layers"), (Whisper, "model.decoder.layers")],
)
def test_encoder_decoder_error_suggests_stages(task_cls: type[Task], blocks: str) -> None:
    with pytest.raises(SpecError) as caught:
        run_of(task_cls)
    stages = rf"[First(model), *map(Block, model.{blocks}), Last(model)]"
    assert f"give the task a `stages(model)`, such as {stages}" in str(caught.value)


class First(nn.Module):
    """The encoder and the decoder's embedding: a batch to the input of the first decoder block."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.table, self.encoder = model.shared, model.encoder

    def forward(self, batch: dict[str, Tensor]) -> Any:
        mask, labels = batch["attention_mask"], batch["labels"]
        memory = self.encoder(input_ids=batch["input_ids"], attention_mask=mask)[0]
        x = self.table(F.pad(labels, (1, -1)).clamp(min=0))
        least = torch.finfo(x.dtype).min
        later = torch.full((labels.shape[1],) * 2, least, dtype=x.dtype).triu(1)[None, None]
        unseen = x.new_zeros(mask.shape).masked_fill(mask == 0, least)[:, None, None]
        return x, (later, None, memory, unseen, None), labels


class Block(nn.Module):
    """One block of the decoder; its position biases are None before the first block."""

    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.block = block

    def forward(self, value: Any) -> Any:
        x, (later, _, memory, unseen, _), labels = value
        x, own, cross = self.block(x, *value[1])
        return x, (later, own, memory, unseen, cross), labels


class Last(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.norm, self.head = model.decoder.final_layer_norm, model.lm_head

    def forward(self, value: Any) -> Any:
        logits = self.head(self.norm(value[0]))
        loss = F.cross_entropy(logits.flatten(0, 1), value[2].flatten())
        return transformers.modeling_outputs.Seq2SeqLMOutput(loss=loss, logits=logits)


class StagedT5(T5):
    def stages(self, model: Any) -> list[nn.Module]:
        return [First(model), *map(Block, model.decoder.block), Last(model)]


def test_t5_with_stages_matches_plain_loop() -> None:
    assert_equal(StagedT5, data=2)


def test_mixtral_with_router_logits_needs_stages() -> None:
    class Mixtral(Words):
        model_name, config_name = "MixtralForCausalLM", "MixtralConfig"
        more = {  # noqa: RUF012
            "num_local_experts": 4,
            "num_key_value_heads": 1,
            "output_router_logits": True,
        }

        def model(self) -> nn.Module:
            return super().model().float()  # the experts do not support float64

    with pytest.raises(SpecError, match="fail where MixtralForCausalLM does not"):
        run_of(Mixtral)
