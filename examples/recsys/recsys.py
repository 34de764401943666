"""
Click prediction with a million ids: a DLRM with its tables on servers.

    python recsys.py runs/RUN auc.png       draw the AUC of a run by the frequency of items

The clicks are generated from a known model: every user and every item has a hidden vector, items of
a category are similar, and a click depends on the dot product, on the item, and on four visible
features. So the optimal AUC with and without ids is known, and printed with that of the model.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Task
from distplat.nn import ShardedEmbedding, connect

TABLES = {"user": 900_000, "item": 100_000, "category": 1_000}
HIDDEN, FEATURES = 4, 4
HEAD = 8.0  # popularity: half of the samples fall on 0.5 ** HEAD = 0.4 % of the ids
ALIKE = 0.8  # correlation of an item with its category


class Clicks(Task):
    """
    Predict clicks from a user, an item, its category and four features.

    Args:
        samples: number of training samples.
        width: size of a row of a table.
        ids: whether the model uses the ids; without them its job needs no `embeddings`.
    """

    def __init__(self, samples: int = 1_000_000, width: int = 16, ids: bool = True) -> None:
        self.samples, self.width, self.ids = samples, width, ids
        names = ("auc", "auc_best_without_ids", "auc_best_of_all")
        self.curves = {name: AreaUnderCurve() for name in names}

    def model(self) -> nn.Module:
        return DLRM(self.width, TABLES if self.ids else {})

    def train_data(self) -> Dataset[Any]:
        return Samples(*make_clicks(self.samples, seed=1))

    def eval_data(self) -> Dataset[Any]:
        return Samples(*make_clicks(40_000, seed=2))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets[:, 0])

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        """Return the area under the ROC curve of this model and of the two optimal models."""
        clicks, without_ids, with_all = targets.unbind(1)
        scores = outputs, without_ids, with_all
        for curve, curve_scores in zip(self.curves.values(), scores, strict=True):
            curve.update(curve_scores, clicks)
        return self.curves


class DLRM(nn.Module):
    """
    DLRM (Naumov et al. 2019): dot products of all pairs of vectors, between two small networks.

    Args:
        width: size of a row, and of the bottom network's output.
        tables: number of ids of each table, in the order of the ids' columns.
    """

    pairs: Tensor

    def __init__(self, width: int, tables: Mapping[str, int]) -> None:
        super().__init__()
        self.tables = nn.ModuleDict(
            {name: ShardedEmbedding(ids, width, init_std=0.1) for name, ids in tables.items()}
        )
        self.bottom = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, width))
        vectors = 1 + len(tables)
        self.top = nn.Sequential(
            nn.Linear(width + vectors * (vectors - 1) // 2, 32), nn.ReLU(), nn.Linear(32, 1)
        )
        self.register_buffer("pairs", torch.tril_indices(vectors, vectors, -1), persistent=False)

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Return a logit per sample: (ids [n, tables], features [n, 4]) -> [n]."""
        ids, features = inputs
        dense: Tensor = self.bottom(features)
        rows = [table(ids[:, place]) for place, table in enumerate(self.tables.values())]
        vectors = torch.stack([dense, *rows], 1)
        products = (vectors @ vectors.transpose(1, 2))[:, self.pairs[0], self.pairs[1]]
        logits: Tensor = self.top(torch.cat([dense, products], 1))
        return logits.squeeze(1)


class Samples(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Samples whose inputs are a pair of ids and features."""

    def __init__(self, ids: Tensor, features: Tensor, targets: Tensor) -> None:
        self.ids, self.features, self.targets = ids, features, targets

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.ids[index], self.features[index]), self.targets[index]


class AreaUnderCurve:
    """The area under the ROC curve of the samples of all workers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.scores: list[Tensor] = []
        self.clicks: list[Tensor] = []

    def update(self, scores: Tensor, clicks: Tensor) -> None:
        self.scores.append(scores.detach())
        self.clicks.append(clicks)

    def merge(self, other: AreaUnderCurve) -> None:
        self.scores += other.scores
        self.clicks += other.clicks

    def compute(self) -> float:
        return area_under_curve(torch.cat(self.scores), torch.cat(self.clicks))


def make_clicks(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Generate samples.

    Returns:
        Ids of user, item and category, shape [count, 3]; features, [count, 4]; and [count, 3]:
        the click, the true logit of the features only, and the true logit.
    """
    model = torch.Generator().manual_seed(0)
    users = torch.randn(TABLES["user"], HIDDEN, generator=model)
    category = torch.randint(TABLES["category"], (TABLES["item"],), generator=model)
    shared = torch.randn(TABLES["category"], HIDDEN + 1, generator=model)
    individual = torch.randn(TABLES["item"], HIDDEN + 1, generator=model)
    # The last column of `items` is a bias.
    items = ALIKE * shared[category] + (1 - ALIKE**2) ** 0.5 * individual
    slope = torch.tensor([0.5, -0.4, 0.3, 0.2])

    generator = torch.Generator().manual_seed(seed)
    popular = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** HEAD
    user, item = (popular * torch.tensor([TABLES["user"], TABLES["item"]])).long().unbind(1)
    features = torch.randn(count, FEATURES, generator=generator)
    from_features = features @ slope
    match = (users[user] * items[item, :HIDDEN]).sum(1)
    logits = from_features + items[item, HIDDEN] + match - 0.5
    clicks = torch.rand(count, generator=generator) < torch.sigmoid(logits)
    ids = torch.stack([user, item, category[item]], 1)
    return ids, features, torch.stack([clicks.float(), from_features, logits], 1)


def area_under_curve(scores: Tensor, clicks: Tensor) -> float:
    """Return the probability that a positive sample scores above a negative one; shapes [n]."""
    clicked = clicks > 0.5
    positive = int(clicked.sum())
    negative = len(clicks) - positive
    if positive == 0 or negative == 0:
        return 0.5
    _, indices, counts = torch.unique(scores, return_inverse=True, return_counts=True)
    ranks = (counts.cumsum(0) - (counts - 1) / 2)[indices].double()  # ties have their mean rank
    above = float(ranks[clicked].sum()) - positive * (positive + 1) / 2
    return above / (positive * negative)


def draw(run: Path, picture: Path) -> None:
    """Draw the area under the curve by the frequency of items in a run's training data."""
    import matplotlib.pyplot as plt
    from safetensors.torch import load_file

    task = Clicks()
    model = task.model()
    model.load_state_dict(load_file(run / "model.safetensors"))
    connect(model.eval(), run)  # reads the tables into this process
    ids, features, targets = make_clicks(100_000, seed=3)
    with torch.no_grad():
        scores = model((ids, features))
    seen = make_clicks(task.samples, seed=1)[0][:, 1].bincount(minlength=TABLES["item"])
    frequency, bounds = seen[ids[:, 1]], (0, 3, 10, 30, 100, 1000, 10**9)
    names = [f"{low} to {high - 1}" for low, high in pairwise(bounds)]
    names[-1] = f"{bounds[-2]} or more"
    figure, axis = plt.subplots(figsize=(8, 3.2), layout="constrained")
    lines = {"best of all": targets[:, 2], "this run": scores, "best without ids": targets[:, 1]}
    masks = [(frequency >= low) & (frequency < high) for low, high in pairwise(bounds)]
    for (name, values), color in zip(lines.items(), ("0.6", "tab:blue", "0.8"), strict=True):
        areas = [area_under_curve(values[mask], targets[mask, 0]) for mask in masks]
        axis.plot(names, areas, "o-", color=color, label=name)
    axis.set(xlabel="times an item comes in training", ylabel="area under the curve")
    axis.set_ylim(0.5, 1.0)
    axis.legend(loc="upper left", ncols=3)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
