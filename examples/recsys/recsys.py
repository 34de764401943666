"""
Recommendation: who clicks on what, among a million ids, with the ids' rows on servers.

The clicks are made up, and how is known: every user and every item has a hidden vector, and a click
depends on their product, on the item, and on four visible features. So it is known too how well
the best model without ids could do, and the best of all: both are printed beside the model's.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Task
from distplat.nn import ShardedEmbedding

USERS, ITEMS = 900_000, 100_000
HIDDEN, FEATURES = 4, 4
HEAD = 8.0  # popularity: half of the samples fall on 0.5 ** HEAD = 0.4 % of the ids


class Clicks(Task):
    """
    Predict clicks from a user, an item and four features.

    Args:
        samples: for training.
        width: of a user's and an item's row.
        ids: whether the model sees the ids; without them its job needs no `embeddings`.
    """

    def __init__(self, samples: int = 1_000_000, width: int = 16, ids: bool = True) -> None:
        self.samples, self.width, self.ids = samples, width, ids

    def model(self) -> nn.Module:
        return TwoTowers(self.width) if self.ids else FeaturesAlone()

    def train_data(self) -> Dataset[Any]:
        return Samples(*make_clicks(self.samples, seed=1))

    def eval_data(self) -> Dataset[Any]:
        return Samples(*make_clicks(40_000, seed=2))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.binary_cross_entropy_with_logits(outputs, targets[:, 0])

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, float]:
        """Give the area under the ROC curve: of this model and of the two that know the truth."""
        clicks, without_ids, with_all = targets.unbind(1)
        return {
            "auc": area_under_curve(outputs, clicks),
            "auc_best_without_ids": area_under_curve(without_ids, clicks),
            "auc_best_of_all": area_under_curve(with_all, clicks),
        }


class TwoTowers(nn.Module):
    """Rows of user and item, their product, and a small network over all of it."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.users = ShardedEmbedding(USERS, width, init_std=0.1)
        self.items = ShardedEmbedding(ITEMS, width, init_std=0.1)
        self.network = nn.Sequential(
            nn.Linear(FEATURES + 2 * width, 32), nn.ReLU(), nn.Linear(32, 1)
        )

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Give a logit per sample: (ids [n, 2], features [n, 4]) -> [n]."""
        ids, features = inputs
        user, item = self.users(ids[:, 0]), self.items(ids[:, 1])
        rest: Tensor = self.network(torch.cat([features, user, item], 1))
        product: Tensor = (user * item).sum(1)
        return rest.squeeze(1) + product


class FeaturesAlone(nn.Module):
    """What is left of it without ids."""

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Sequential(nn.Linear(FEATURES, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, inputs: tuple[Tensor, Tensor]) -> Tensor:
        """Give a logit per sample, as `TwoTowers` does."""
        logits: Tensor = self.network(inputs[1])
        return logits.squeeze(1)


class Samples(Dataset[tuple[tuple[Tensor, Tensor], Tensor]]):
    """Inputs are a pair: ids and features."""

    def __init__(self, ids: Tensor, features: Tensor, targets: Tensor) -> None:
        self.ids, self.features, self.targets = ids, features, targets

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, index: int) -> tuple[tuple[Tensor, Tensor], Tensor]:
        return (self.ids[index], self.features[index]), self.targets[index]


def make_clicks(count: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """
    Make samples up.

    Returns:
        Ids of user and item, shape [count, 2]; features, [count, 4]; and [count, 3]: whether it
        was clicked, its true logit as far as features tell, and its true logit.
    """
    nature = torch.Generator().manual_seed(0)
    users = torch.randn(USERS, HIDDEN, generator=nature)
    items = torch.randn(ITEMS, HIDDEN, generator=nature)
    appeal = torch.randn(ITEMS, generator=nature)
    slope = torch.tensor([0.5, -0.4, 0.3, 0.2])

    chance = torch.Generator().manual_seed(seed)
    popular = torch.rand(count, 2, generator=chance, dtype=torch.float64) ** HEAD
    ids = (popular * torch.tensor([USERS, ITEMS])).long()
    features = torch.randn(count, FEATURES, generator=chance)
    from_features = features @ slope
    match = (users[ids[:, 0]] * items[ids[:, 1]]).sum(1)
    logits = from_features + appeal[ids[:, 1]] + match - 0.5
    clicks = torch.rand(count, generator=chance) < torch.sigmoid(logits)
    return ids, features, torch.stack([clicks.float(), from_features, logits], 1)


def area_under_curve(scores: Tensor, clicks: Tensor) -> float:
    """Give the chance that a clicked sample scores higher than one that was not; shapes [n]."""
    clicked = clicks > 0.5
    positive = int(clicked.sum())
    negative = len(clicks) - positive
    if positive == 0 or negative == 0:
        return 0.5
    ranks = torch.empty(len(scores), dtype=torch.float64)
    ranks[scores.argsort()] = torch.arange(1, len(scores) + 1, dtype=torch.float64)
    above = float(ranks[clicked].sum()) - positive * (positive + 1) / 2
    return above / (positive * negative)
