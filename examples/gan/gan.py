"""
A generative adversarial network: two models and two optimizers in one loop of one's own.

The data are points around eight places on a circle. A generator that works comes to all eight; one
that has collapsed knows a few of them.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import distplat

PLACES, SPREAD = 8, 0.05
NOISE = 8
"""Numbers that the generator makes a point of."""


def train(config: dict[str, Any]) -> None:
    """
    Train both; every worker calls this.

    Args:
        config: `task_args` of the job file: `epochs`, `lr`, `width`, `samples`, and `batch_size` of
            one worker.
    """
    generator, critic = mlp(NOISE, 2, config["width"]), mlp(2, 1, config["width"])
    moves = torch.optim.Adam(generator.parameters(), lr=config["lr"], betas=(0.5, 0.9))
    judges = torch.optim.Adam(critic.parameters(), lr=config["lr"], betas=(0.5, 0.9))
    loader = DataLoader(points(config["samples"]), batch_size=config["batch_size"], shuffle=True)
    generator, critic, loader = distplat.prepare(generator, critic, loader)
    moves, judges = distplat.prepare(moves, judges)

    for epoch in range(config["epochs"]):
        loader.set_epoch(epoch)
        for (real,) in loader:
            made = generator(torch.randn(len(real), NOISE))
            doubt = F.softplus(-critic(real)).mean() + F.softplus(critic(made.detach())).mean()
            judges.zero_grad()
            torch.autograd.backward(doubt)
            judges.step()

            loss = F.softplus(-critic(made)).mean()
            moves.zero_grad()
            torch.autograd.backward(
                loss
            )  # the critic gets gradients, too; its next step begins anew
            moves.step()
        with torch.no_grad():
            found = covered(generator(torch.randn(1000, NOISE)))
        distplat.report({"loss": loss.item(), "critic_loss": doubt.item(), "covered": found})


def mlp(inputs: int, outputs: int, width: int) -> nn.Module:
    """Give two hidden layers: [batch, inputs] -> [batch, outputs]."""
    hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width)]
    return nn.Sequential(*hidden, nn.LeakyReLU(0.2), nn.Linear(width, outputs))


def places() -> Tensor:
    """Give the eight places, shape [8, 2]."""
    angles = torch.arange(PLACES) * (2 * math.pi / PLACES)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def points(count: int) -> TensorDataset:
    """Give so many points of the data, shape [2] each."""
    draw = torch.Generator().manual_seed(0)
    near = places()[torch.randint(PLACES, (count,), generator=draw)]
    return TensorDataset(near + SPREAD * torch.randn(count, 2, generator=draw))


def covered(made: Tensor) -> int:
    """Count the places to which one point of a hundred, or more, has come within three spreads."""
    near = torch.cdist(made, places()) < 3 * SPREAD
    return int((near.float().mean(0) >= 0.01).sum())
