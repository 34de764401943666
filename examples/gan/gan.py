"""
A generative adversarial network: two models and two optimizers in a train function.

The data are points around eight centres on a circle. A good generator covers all eight centres; a
collapsed generator covers only some of them.
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
"""Dimension of the generator's input noise."""


def train(config: dict[str, Any]) -> None:
    """
    Train generator and critic; every worker calls this function.

    Args:
        config: `task_args` of the job file: `epochs`, `lr`, `width`, `samples`, and `batch_size`
            per worker.
    """
    generator, critic = mlp(NOISE, 2, config["width"]), mlp(2, 1, config["width"])
    lr, betas = config["lr"], (0.5, 0.9)
    generator_optimizer = torch.optim.Adam(generator.parameters(), lr=lr, betas=betas)
    critic_optimizer = torch.optim.Adam(critic.parameters(), lr=lr, betas=betas)
    loader = DataLoader(points(config["samples"]), batch_size=config["batch_size"], shuffle=True)
    generator, critic, loader = distplat.prepare(generator, critic, loader)
    optimizers = distplat.prepare(generator_optimizer, critic_optimizer)
    generator_optimizer, critic_optimizer = optimizers

    for epoch in range(config["epochs"]):
        loader.set_epoch(epoch)
        for (real,) in loader:
            fake = generator(torch.randn(len(real), NOISE))
            critic_loss = F.softplus(-critic(real)).mean()
            critic_loss = critic_loss + F.softplus(critic(fake.detach())).mean()
            critic_optimizer.zero_grad()
            torch.autograd.backward(critic_loss)
            critic_optimizer.step()

            loss = F.softplus(-critic(fake)).mean()
            generator_optimizer.zero_grad()
            # This also adds gradients to the critic, which its zero_grad removes.
            torch.autograd.backward(loss)
            generator_optimizer.step()
        with torch.no_grad():
            count = covered(generator(torch.randn(1000, NOISE)))
        distplat.report({"loss": loss.item(), "critic_loss": critic_loss.item(), "covered": count})


def mlp(inputs: int, outputs: int, width: int) -> nn.Module:
    """Return an MLP with two hidden layers: [batch, inputs] -> [batch, outputs]."""
    hidden = [nn.Linear(inputs, width), nn.LeakyReLU(0.2), nn.Linear(width, width)]
    return nn.Sequential(*hidden, nn.LeakyReLU(0.2), nn.Linear(width, outputs))


def places() -> Tensor:
    """Return the eight centres, shape [8, 2]."""
    angles = torch.arange(PLACES) * (2 * math.pi / PLACES)
    return torch.stack([angles.cos(), angles.sin()], dim=1)


def points(count: int) -> TensorDataset:
    """Return `count` points of the data, shape [2] each."""
    generator = torch.Generator().manual_seed(0)
    near = places()[torch.randint(PLACES, (count,), generator=generator)]
    return TensorDataset(near + SPREAD * torch.randn(count, 2, generator=generator))


def covered(points: Tensor) -> int:
    """Count the centres with at least 1 % of the points within three standard deviations."""
    near = torch.cdist(points, places()) < 3 * SPREAD
    return int((near.float().mean(0) >= 0.01).sum())
