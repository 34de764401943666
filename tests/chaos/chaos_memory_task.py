"""
The tasks of the soak in memory, which report each moment that a worker reaches.

Rank threads share torch's global generator, so these tasks do not use it.
"""

from collections.abc import Callable, Iterator
from contextlib import nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from in_memory_processes import process_here
from torch import Tensor, nn
from torch.optim.lr_scheduler import StepLR
from torch.utils.data import DataLoader, Dataset, TensorDataset

import distplat
from distplat import Task
from distplat.nn import ShardedEmbedding

SAMPLES, IDS = 48, 23
on_moment: Callable[[str, str], None] = lambda moment, who: None  # noqa: E731
"""Called with a moment and the name of the process; replaced by trials."""


def reach(moment: str) -> None:
    """Report a moment; does not return in a process that is killed there."""
    process = process_here()
    if process is not None:  # `distplat replay` has no process
        process.check()
        on_moment(moment, process.name)
        process.check()


class Dense(Task):
    """
    A small classifier.

    Args:
        stateful: whether layers keep buffers.
    """

    def __init__(self, stateful: bool = True) -> None:
        self.stateful = stateful

    def model(self) -> nn.Module:
        reach("model")
        inner = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
        layers = [nn.Linear(5, 16), Block(self.stateful), inner, Block(self.stateful)]
        return fill_parameters(nn.Sequential(*layers, nn.Linear(16, 3)))

    def train_data(self) -> Dataset[Any]:
        reach("data")
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(SAMPLES, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (SAMPLES,), generator=generator))

    def eval_data(self) -> Dataset[Any] | None:
        return self.train_data()

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)


class Rows(Dense):
    """A classifier of ids, whose embedding is on servers."""

    def model(self) -> nn.Module:
        reach("model")
        table = ShardedEmbedding(IDS, 4, init_std=0.3)
        layers = [nn.Flatten(), nn.Linear(12, 16), Block(self.stateful), nn.Linear(16, 3)]
        return nn.Sequential(table, fill_parameters(nn.Sequential(*layers)))

    def train_data(self) -> Dataset[Any]:
        reach("data")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, IDS, (SAMPLES, 3), generator=generator)
        return TensorDataset(ids, torch.randint(0, 3, (SAMPLES,), generator=generator))


class Block(nn.Module):
    """Layers, optionally with buffers; report each forward and backward."""

    def __init__(self, stateful: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16) if stateful else nn.LayerNorm(16)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.tanh(self.norm(inputs))
        reach("forward" if self.training else "evaluation")
        if outputs.requires_grad:
            outputs.register_hook(lambda _: reach("backward"))  # type: ignore[no-untyped-call]
        return outputs


def fill_parameters(model: nn.Module) -> nn.Module:
    """Set the parameters to the same values in every process."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


class Loop:
    """
    Models, optimizers and loader of the train function.

    Args:
        config: the job's `task_args`, see `chaos_memory_loops.py`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.step = config, 0
        dense = Dense(config["stateful"])
        self.models = [dense.model() for _ in range(config["models"])]
        cls = getattr(torch.optim, config["optimizer"])
        rates = [0.5**n * config["lr"] for n in range(len(self.models))]
        pairs = zip(self.models, rates, strict=True)
        self.optimizers = [cls(model.parameters(), lr=lr) for model, lr in pairs]
        self.schedulers = [StepLR(optimizer, 3, 0.8) for optimizer in self.optimizers]
        loader = DataLoader(dense.train_data(), config["batch"], shuffle=True)
        prepared = *self.models, *self.optimizers, *self.schedulers, loader
        *_, self.loader = distplat.prepare(*prepared)
        self.load(distplat.get_checkpoint())

    def state(self) -> dict[str, Any]:
        """Return the state of a checkpoint."""
        parts = {name: getattr(self, name) for name in ("models", "optimizers", "schedulers")}
        states = {name: [part.state_dict() for part in group] for name, group in parts.items()}
        return {**states, "loader": self.loader.state_dict(), "step": self.step}

    def load(self, saved: Any) -> None:
        """Load a checkpoint, if any: a state or a directory."""
        if saved is None:
            return
        if isinstance(saved, distplat.Checkpoint):
            with saved.as_directory() as path:
                saved = torch.load(Path(path) / "state.pt")
        for name in ("models", "optimizers", "schedulers"):
            for part, state in zip(getattr(self, name), saved[name], strict=True):
                part.load_state_dict(state)
        self.loader.load_state_dict(saved["loader"])
        self.step = saved["step"]

    def batches(self) -> Iterator[Any]:
        """Yield batches of endless epochs."""
        while True:
            yield from self.loader

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Yield the loss of each model; the second model is trained on the first one's outputs."""
        inputs, targets = batch
        outputs = None
        for model in self.models:
            if outputs is not None:
                targets = outputs.detach().argmax(1)
            outputs = model(inputs)
            yield nn.functional.cross_entropy(outputs, targets)

    def train(self, batches: Iterator[Any]) -> Tensor:
        """Train a step; return the first model's loss."""
        count = self.config["accumulate"]
        first = torch.zeros(())
        for n in range(count):
            with distplat.no_sync() if n + 1 < count else nullcontext():
                for number, loss in enumerate(self.losses(next(batches))):
                    (loss / count).backward()
                    first = first + loss.detach() / count if number == 0 else first
        parts = zip(self.models, self.optimizers, self.schedulers, strict=True)
        for model, optimizer, scheduler in parts:
            if self.config["clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
        self.step += 1
        return first

    def reported_loss(self, loss: Tensor) -> float:
        """Return the loss to report; communicates with other ranks if `talks` is set."""
        if not self.config["talks"]:
            return loss.item()
        distplat.barrier()
        assert not distplat.should_stop()
        return float(distplat.gather_for_metrics(loss.reshape(1)).mean())


def loop(config: dict[str, Any]) -> None:
    """Train with a train function."""
    training = Loop(config)
    batches = training.batches()
    main = distplat.get_context().is_main_process
    while training.step < config["steps"]:
        loss = training.reported_loss(training.train(batches))
        reach("report")
        if not main or training.step % config["every"]:
            distplat.report({"loss": loss})
        elif not config["files"]:
            distplat.report({"loss": loss}, training.state())
        else:
            with TemporaryDirectory() as path:
                torch.save(training.state(), Path(path) / "state.pt")
                checkpoint = distplat.Checkpoint.from_directory(path)
                distplat.report({"loss": loss}, checkpoint)
