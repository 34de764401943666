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
    """Classifier of words, with the call signature of Hugging Face's models."""

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
    """Return padded words, mask, and classes; the class of padding is -100."""
    longest = max(len(words) for words, _ in samples)
    words = torch.stack([F.pad(w, (0, longest - len(w))) for w, _ in samples])
    classes = torch.stack([F.pad(c, (0, longest - len(c)), value=-100) for _, c in samples])
    return words, words > 0, classes


def sum_loss(logits: Tensor, classes: Tensor) -> tuple[Tensor, Tensor]:
    flat = logits.flatten(0, 1), classes.flatten()
    return F.cross_entropy(*flat, reduction="sum"), (classes >= 0).sum()


class Tags(Task):
    """Base class of the tasks below."""

    def model(self) -> nn.Module:
        return Tagger()

    def train_data(self) -> Dataset[Any]:
        return Sentences(SAMPLES)

    def eval_data(self) -> Dataset[Any]:
        return Sentences(SAMPLES)


class DictBatches(Tags):
    """The batch is a dict, passed to the model as keyword arguments and to `loss` as targets."""

    def collate(self, samples: list[Any]) -> Any:
        words, mask, classes = padded(samples)
        return {"input_ids": words, "attention_mask": mask, "labels": classes}

    def loss(self, outputs: Any, targets: Any) -> Any:
        return sum_loss(outputs["logits"], targets["labels"])

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": targets["attention_mask"].sum() / len(targets["labels"])}


class TupleBatches(Tags):
    """The batch is a tuple of three; `forward` unpacks it."""

    def collate(self, samples: list[Any]) -> Any:
        return padded(samples)

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(batch[0], batch[1])["logits"]

    def loss(self, outputs: Any, targets: Any) -> Any:
        return sum_loss(outputs, targets[2])

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": targets[1].sum() / len(outputs)}


class NestedBatches(TupleBatches):
    """The batch is a tree; the task's `step` returns a dict."""

    forward, loss = Task.forward, Task.loss

    def collate(self, samples: list[Any]) -> Any:
        words, mask, classes = padded(samples)
        return {"text": [{"words": words}, (mask,)], "classes": classes, "source": "a file"}

    def step(self, model: nn.Module, batch: Any) -> Any:
        [text, (mask,)] = batch["text"]
        logits = model(text["words"], attention_mask=mask)["logits"]
        return {"loss": sum_loss(logits, batch["classes"]), "logits": logits}

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": targets["text"][1][0].sum() / len(outputs["logits"])}


class ListBatches(NestedBatches):
    """The batch is a list of sentences of different lengths."""

    def collate(self, samples: list[Any]) -> Any:
        return [words for words, _ in samples]

    def step(self, model: nn.Module, batch: Any) -> Any:
        terms = [self.sentence_loss(model, words) for words in batch]
        return torch.stack(terms).sum(), sum(map(len, batch))

    def sentence_loss(self, model: nn.Module, words: Tensor) -> Tensor:
        logits = model(words[None], torch.ones_like(words)[None])["logits"]
        return sum_loss(logits, words % 3)[0]

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": sum(map(len, targets)) / len(targets)}


@dataclass
class Graph:
    """Concatenated sentences with the sentence of each word, as in batches of graphs."""

    words: PackedSequence
    samples: int


class DataclassBatches(ListBatches):
    """The batch is a dataclass defined by the user."""

    def collate(self, samples: list[Any]) -> Any:
        words = pack_sequence([words for words, _ in samples], enforce_sorted=False)
        return Graph(words, len(samples))

    def step(self, model: nn.Module, batch: Any) -> Any:
        words = batch.words.data
        logits = model(words[None], torch.ones_like(words)[None])["logits"]
        return sum_loss(logits, words % 3)

    def metrics(self, outputs: Any, targets: Any) -> Mapping[str, Any]:
        return {"words": len(targets.words.data) / targets.samples}


def last_eval_reports(run: LocalRun) -> list[EvalReport]:
    """Return the ranks' reports of the last evaluation; ranks of a group report for the group."""
    reports = [r for rank in run.reports for r in rank if isinstance(r, EvalReport)]
    return [*{report.rank: report for report in reports if report.step == STEPS}.values()]


def total(reports: list[EvalReport], name: str) -> float:
    return sum(r.sums[name] for r in reports) / sum(r.counts[name] for r in reports)
