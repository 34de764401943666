"""Tasks whose batches are dicts, tuples, trees, lists and dataclasses."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from local_run import LocalRun
from sentences import WORDS, Sentences
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_sequence
from torch.utils.data import Dataset

from distplat import Task
from distplat.platform.progress import EvalReport

SAMPLES, BATCH, STEPS = 22, 6, 5


class Tagger(nn.Module):
    """Classes of words, called as Hugging Face's models are."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, 8, dtype=torch.float64)
        self.head = nn.Linear(8, 3, dtype=torch.float64)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, labels: Any = None) -> Any:
        logits = self.head(self.table(input_ids) * attention_mask.unsqueeze(-1))
        if labels is None:
            return {"logits": logits}
        return {"loss": F.cross_entropy(logits.flatten(0, 1), labels.flatten()), "logits": logits}


def padded(samples: list[Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Give words, mask and classes; -100 where there is no word."""
    longest = max(len(words) for words, _ in samples)
    words = torch.stack([F.pad(one, (0, longest - len(one))) for one, _ in samples])
    classes = torch.stack([F.pad(c, (0, longest - len(c)), value=-100) for _, c in samples])
    return words, words > 0, classes


def summed(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    flat = logits.flatten(0, 1), classes.flatten()
    return F.cross_entropy(*flat, reduction="sum"), (classes >= 0).sum()


class Tags(Task):
    """What the tasks below share."""

    def model(self) -> nn.Module:
        return Tagger()

    def train_data(self) -> Dataset[Any]:
        return Sentences(SAMPLES)

    def eval_data(self) -> Dataset[Any]:
        return Sentences(SAMPLES)


class Dicts(Tags):
    """A dict goes into the model by keywords, and is what `loss` gets as targets."""

    def collate(self, samples: list[Any]) -> Any:
        words, mask, classes = padded(samples)
        return {"input_ids": words, "attention_mask": mask, "labels": classes}

    def loss(self, outputs: Any, targets: Any) -> Any:
        return summed(outputs["logits"], targets["labels"])

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": targets["attention_mask"].sum() / len(targets["labels"])}


class Triples(Tags):
    """A tuple of three, with a `forward` that takes it apart."""

    def collate(self, samples: list[Any]) -> Any:
        return padded(samples)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], batch[1])["logits"]

    def loss(self, outputs: Any, targets: Any) -> Any:
        return summed(outputs, targets[2])

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": targets[1].sum() / len(outputs)}


class Nested(Triples):
    """A tree, and a `step` of its own that gives a dict."""

    forward, loss = Task.forward, Task.loss

    def collate(self, samples: list[Any]) -> Any:
        words, mask, classes = padded(samples)
        return {"text": [{"words": words}, (mask,)], "classes": classes, "source": "a file"}

    def step(self, model: nn.Module, batch: Any) -> Any:
        [text, (mask,)] = batch["text"]
        logits = model(text["words"], attention_mask=mask)["logits"]
        return {"loss": summed(logits, batch["classes"]), "logits": logits}

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": targets["text"][1][0].sum() / len(outputs["logits"])}


class Listed(Nested):
    """No tensor of the batch has a dimension of samples: lists of sentences of any length."""

    def collate(self, samples: list[Any]) -> Any:
        return [words for words, _ in samples]

    def step(self, model: nn.Module, batch: Any) -> Any:
        terms = [self.one(model, words) for words in batch]
        return torch.stack(terms).sum(), sum(map(len, batch))

    def one(self, model: nn.Module, words: Tensor) -> Tensor:
        logits = model(words[None], torch.ones_like(words)[None])["logits"]
        return summed(logits, words % 3)[0]

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": sum(map(len, targets)) / len(targets)}


@dataclass
class Graph:
    """Sentences behind each other, and whose each word is: as batches of graphs are."""

    words: PackedSequence
    samples: int


class Packed(Listed):
    """A dataclass of the user's."""

    def collate(self, samples: list[Any]) -> Any:
        words = pack_sequence([words for words, _ in samples], enforce_sorted=False)
        return Graph(words, len(samples))

    def step(self, model: nn.Module, batch: Any) -> Any:
        words = batch.words.data
        logits = model(words[None], torch.ones_like(words)[None])["logits"]
        return summed(logits, words % 3)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": len(targets.words.data) / targets.samples}


def of_the_end(run: LocalRun) -> list[EvalReport]:
    """Give what each rank found in the last evaluation; ranks of a group have that of all."""
    reports = [one for rank in run.reports for one in rank if isinstance(one, EvalReport)]
    return [*{one.rank: one for one in reports if one.step == STEPS}.values()]


def total(reports: list[EvalReport], name: str) -> float:
    return sum(r.sums[name] for r in reports) / sum(r.counts[name] for r in reports)
