"""Hugging Face's models with padded dict batches under hybrid: as in a plain loop, or refused."""

from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hybrid_models import grid_of, hybrid_job, whole
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
    """Words, of which every third sample has as many as there may be, and images."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        drawn = torch.Generator().manual_seed(index)
        length = LENGTH if index % 3 == 0 else 3 + index % 4
        words = torch.randint(1, WORDS, (length,), generator=drawn)
        return words, torch.randn(1, 8, 8, generator=drawn, dtype=torch.float64)


class Words(Task):
    """Predict each next word."""

    kind, config = "GPT2LMHeadModel", "GPT2Config"
    more: dict[str, Any] = {}  # noqa: RUF012

    def model(self) -> nn.Module:
        sizes = {"num_hidden_layers": 4, "hidden_size": WIDTH, "intermediate_size": 16}
        ends = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}
        given = {"vocab_size": WORDS, "num_attention_heads": 2, **sizes, **ends, **self.more}
        config = getattr(transformers, self.config)(**given)
        made: nn.Module = getattr(transformers, self.kind)(config)
        return made.double()

    def train_data(self) -> Dataset[Any]:
        return Samples()

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        words = pad_sequence([one for one, _ in samples], batch_first=True)
        labels = words.masked_fill(words == 0, -100)
        return {"input_ids": words, "attention_mask": (words > 0).long(), "labels": labels}

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
        count = (batch["labels"][:, 1:] != -100).sum()
        return outputs.loss * count, count


class Gpt2(Words):
    more = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # noqa: RUF012


class Llama(Words):
    kind, config = "LlamaForCausalLM", "LlamaConfig"
    more = {"num_key_value_heads": 1}  # noqa: RUF012


class Opt(Words):
    """Its last norm is registered before its blocks."""

    kind, config = "OPTForCausalLM", "OPTConfig"
    more = {  # noqa: RUF012
        "ffn_dim": 16,
        "word_embed_proj_dim": WIDTH,
        "dropout": 0.0,
        "attention_dropout": 0.0,
    }


class Sentences(Words):
    """Classes of sentences: a mean over samples."""

    kind, config = "BertForSequenceClassification", "BertConfig"
    more = {  # noqa: RUF012
        "num_labels": CLASSES,
        "hidden_dropout_prob": 0.0,
        "attention_probs_dropout_prob": 0.0,
    }

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        found = super().collate(samples)
        return {**found, "labels": found["input_ids"][:, 0] % CLASSES}

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
        return outputs.loss


class Images(Sentences):
    kind, config = "ViTForImageClassification", "ViTConfig"
    more = {**Sentences.more, "image_size": 8, "patch_size": 4, "num_channels": 1}  # noqa: RUF012

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        labels = super().collate(samples)["labels"]
        return {"pixel_values": torch.stack([one for _, one in samples]), "labels": labels}


class Stepping(Gpt2):
    """The same as a `step`."""

    loss: Any = Task.loss

    def step(self, model: nn.Module, batch: Any) -> Any:
        outputs = model(**batch)
        return {**outputs, "loss": Words.loss(self, outputs, batch)}


@cache
def plain(kind: type[Task]) -> dict[str, Tensor]:
    torch.manual_seed(5)
    task = kind()
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


def run_of(kind: type[Task], pipeline: int = 2, data: int = 1, **options: Any) -> LocalRun:
    tensor = options.pop("tensor", 1)
    chosen, workers = grid_of(pipeline, tensor, data, **options)
    return train(hybrid_job(chosen, workers, steps=STEPS), kind)


def assert_equal(kind: type[Task], **options: Any) -> None:
    found, expected = whole(run_of(kind, **options)), plain(kind)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert (found[name] - value).abs().max() < 1e-7, name  # losses and norms are in float32


INTERLEAVED = {"schedule": "interleaved", "virtual": 2}
CASES: list[tuple[type[Task], dict[str, Any]]] = [
    (Gpt2, {"pipeline": 4}),
    (Gpt2, {**INTERLEAVED, "data": 2}),
    (Stepping, {"data": 2}),
    (Llama, {"data": 2, "cut": "auto"}),
    (Llama, {**INTERLEAVED}),
    (Sentences, {"pipeline": 4}),
    (Images, {"data": 2}),
    (Opt, {"pipeline": 2}),
]


@pytest.mark.sweep(4)
@pytest.mark.parametrize(("kind", "grid"), CASES, ids=str)
def test_they_train_as_in_one_process(kind: type[Task], grid: dict[str, Any]) -> None:
    assert_equal(kind, **grid)


MLP = "model.layers.*.mlp"


def test_linear_layers_of_theirs_are_sliced() -> None:
    plan = {f"{MLP}.gate_proj": "colwise", f"{MLP}.up_proj": "colwise"}
    assert_equal(Llama, tensor=2, tensor_plan={**plan, f"{MLP}.down_proj": "rowwise"})


class Grouped(Llama):
    """Two heads of queries for each of keys and values, as docs/tensor_parallel.md has it."""

    more = {"num_attention_heads": 4, "num_key_value_heads": 2}  # noqa: RUF012

    def model(self) -> nn.Module:
        model = super().model()
        blocks: Any = model.get_submodule("model.layers")
        inwards = dict.fromkeys(("q_proj", "k_proj", "v_proj"), "heads features")
        for layer in blocks:
            layer.self_attn.heads = self.more["num_attention_heads"]
            layer.self_attn.head_layout = HeadLayout(inwards=inwards, outwards="o_proj")
        return model


def test_their_heads_are_sliced_once_they_are_named() -> None:
    assert_equal(Grouped, tensor=2, tensor_plan={"model.layers.*.self_attn": "heads"})


@pytest.mark.parametrize(
    ("plan", "told"),
    [
        (
            {"transformer.h.*.mlp.c_fc": "colwise", "transformer.h.*.mlp.c_proj": "rowwise"},
            "mlp.c_fc is a Conv1D, and `colwise` splits Linear",
        ),
        ({"transformer.h.*.attn": "heads"}, "does not say where its heads are"),
    ],
    ids=["mlp", "heads"],
)
def test_layers_of_other_classes_are_not_sliced(plan: dict[str, str], told: str) -> None:
    with pytest.raises(SpecError, match=told):
        run_of(Gpt2, tensor=2, tensor_plan=plan)


class T5(Words):
    """Its blocks give each other the biases that the first one computes."""

    def model(self) -> nn.Module:
        sizes = {"d_model": WIDTH, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0}
        more = {"num_decoder_layers": 3, "dropout_rate": 0.0}
        config = transformers.T5Config(vocab_size=WORDS, **sizes, **ends, **more)
        made: Any = transformers.T5ForConditionalGeneration(config)
        made.lm_head = nn.Linear(WIDTH, WORDS, bias=False)  # its embedding is on the first stage
        made.config.scale_decoder_outputs = False
        found: nn.Module = made.double()
        return found

    def loss(self, outputs: Any, batch: dict[str, Tensor]) -> Any:
        count = (batch["labels"] != -100).sum()
        return outputs.loss * count, count


class Marian(T5):
    def model(self) -> nn.Module:
        sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
        config = transformers.MarianConfig(vocab_size=WORDS, **sizes, **heads, **ends)
        made: nn.Module = transformers.MarianMTModel(config)
        return made.double()


class Whisper(T5):
    def model(self) -> nn.Module:
        sizes = {"d_model": WIDTH, "encoder_layers": 2, "decoder_layers": 3, "num_mel_bins": 4}
        heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
        ends = {"decoder_start_token_id": 0, "pad_token_id": 0, "eos_token_id": 0}
        more = {"max_source_positions": 5, "bos_token_id": 0}
        config = transformers.WhisperConfig(vocab_size=WORDS, **sizes, **heads, **ends, **more)
        made: nn.Module = transformers.WhisperForConditionalGeneration(config)
        return made.double()

    def collate(self, samples: list[Any]) -> dict[str, Tensor]:
        labels = super().collate(samples)["labels"]
        heard = torch.stack([one.flatten()[:40].view(4, 10) for _, one in samples])
        return {"input_features": heard, "labels": labels}


@pytest.mark.parametrize(
    ("kind", "blocks"),
    [(T5, "decoder.block"), (Marian, "model.decoder.layers"), (Whisper, "model.decoder.layers")],
)
def test_it_is_told_what_to_write_for_an_encoder_and_a_decoder(
    kind: type[Task], blocks: str
) -> None:
    with pytest.raises(SpecError) as caught:
        run_of(kind)
    stages = rf"[First(model), *map(Block, model.{blocks}), Last(model)]"
    assert f"give the task a `stages(model)`, such as {stages}" in str(caught.value)


class First(nn.Module):
    """From a batch to what T5's decoder begins with."""

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
    """One block of the decoder; `biases` are None before the first."""

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


def test_a_t5_with_stages_trains_as_in_one_process() -> None:
    assert_equal(StagedT5, data=2)


def test_the_balance_of_experts_needs_stages() -> None:
    class Mixtral(Words):
        kind, config = "MixtralForCausalLM", "MixtralConfig"
        more = {  # noqa: RUF012
            "num_local_experts": 4,
            "num_key_value_heads": 1,
            "output_router_logits": True,
        }

        def model(self) -> nn.Module:
            return super().model().float()  # its experts take no float64

    with pytest.raises(SpecError, match="fail where MixtralForCausalLM does not"):
        run_of(Mixtral)
