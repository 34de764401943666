"""
The tasks of the soak in memory: they tell whoever listens of each moment that a worker gets to.

Ranks are threads and share torch's generator: nothing here draws from it.
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
heard: Callable[[str, str], None] = lambda moment, who: None  # noqa: E731
"""Told of a moment, and which process has got there."""


def reach(moment: str) -> None:
    """Tell of a moment; does not return in a process that is killed there."""
    process = process_here()
    if process is not None:  # else it is `distplat replay`
        process.check()
        heard(moment, process.name)
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
        return filled(nn.Sequential(*layers, nn.Linear(16, 3)))

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
    """The same of ids, whose rows are on servers."""

    def model(self) -> nn.Module:
        reach("model")
        table = ShardedEmbedding(IDS, 4, init_std=0.3)
        layers = [nn.Flatten(), nn.Linear(12, 16), Block(self.stateful), nn.Linear(16, 3)]
        return nn.Sequential(table, filled(nn.Sequential(*layers)))

    def train_data(self) -> Dataset[Any]:
        reach("data")
        generator = torch.Generator().manual_seed(1)
        ids = torch.randint(0, IDS, (SAMPLES, 3), generator=generator)
        return TensorDataset(ids, torch.randint(0, 3, (SAMPLES,), generator=generator))


class Block(nn.Module):
    """Layers that may keep state; tells of each forward and backward."""

    def __init__(self, stateful: bool) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(16) if stateful else nn.LayerNorm(16)

    def forward(self, inputs: Tensor) -> Tensor:
        outputs = torch.tanh(self.norm(inputs))
        reach("forward" if self.training else "evaluation")
        if outputs.requires_grad:
            outputs.register_hook(lambda _: reach("backward"))  # type: ignore[no-untyped-call]
        return outputs


def filled(model: nn.Module) -> nn.Module:
    """Fill the parameters with what is the same in every process."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.4 * torch.randn(parameter.shape, generator=generator))
    return model


class Loop:
    """
    What a train function trains, and how: `config` of `chaos_memory_loops.py` says it.

    Args:
        config: the job's `task_args`.
    """

    def __init__(self, config: dict[str, Any]) -> None:
        self.config, self.step = config, 0
        dense = Dense(config["stateful"])
        self.models = [dense.model() for _ in range(config["models"])]
        kind = getattr(torch.optim, config["optimizer"])
        rates = [0.5**n * config["lr"] for n in range(len(self.models))]
        made = zip(self.models, rates, strict=True)
        self.optimizers = [kind(model.parameters(), lr=lr) for model, lr in made]
        self.schedulers = [StepLR(one, 3, 0.8) for one in self.optimizers]
        loader = DataLoader(dense.train_data(), config["batch"], shuffle=True)
        things = *self.models, *self.optimizers, *self.schedulers, loader
        *_, self.loader = distplat.prepare(*things)
        self.load(distplat.get_checkpoint())

    def state(self) -> dict[str, Any]:
        """Give all that the loop goes on from."""
        parts = {name: getattr(self, name) for name in ("models", "optimizers", "schedulers")}
        states = {name: [one.state_dict() for one in some] for name, some in parts.items()}
        return {**states, "loader": self.loader.state_dict(), "step": self.step}

    def load(self, saved: Any) -> None:
        """Go on from a checkpoint, of either form; None: the run begins."""
        if saved is None:
            return
        if isinstance(saved, distplat.Checkpoint):
            with saved.as_directory() as path:
                saved = torch.load(Path(path) / "state.pt")
        for name in ("models", "optimizers", "schedulers"):
            for one, state in zip(getattr(self, name), saved[name], strict=True):
                one.load_state_dict(state)
        self.loader.load_state_dict(saved["loader"])
        self.step = saved["step"]

    def batches(self) -> Iterator[Any]:
        """Give batches without end."""
        while True:
            yield from self.loader

    def losses(self, batch: Any) -> Iterator[Tensor]:
        """Give the loss of each model; the second one learns what the first one says."""
        inputs, targets = batch
        outputs = None
        for model in self.models:
            if outputs is not None:
                targets = outputs.detach().argmax(1)
            outputs = model(inputs)
            yield nn.functional.cross_entropy(outputs, targets)

    def train(self, batches: Iterator[Any]) -> Tensor:
        """Make a step; give the first model's loss."""
        count = self.config["accumulate"]
        first = torch.zeros(())
        for n in range(count):
            with distplat.no_sync() if n + 1 < count else nullcontext():
                for at, loss in enumerate(self.losses(next(batches))):
                    (loss / count).backward()
                    first = first + loss.detach() / count if at == 0 else first
        for model, one, schedule in zip(self.models, self.optimizers, self.schedulers, strict=True):
            if self.config["clip"]:
                nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            one.step()
            one.zero_grad()
            schedule.step()
        self.step += 1
        return first

    def told(self, loss: Tensor) -> float:
        """Give the loss that is reported; talks with the other ranks, where the job says so."""
        if not self.config["talks"]:
            return loss.item()
        distplat.barrier()
        assert not distplat.should_stop()
        return float(distplat.gather_for_metrics(loss.reshape(1)).mean())


def loop(config: dict[str, Any]) -> None:
    """Train in a loop of one's own."""
    made = Loop(config)
    batches = made.batches()
    main = distplat.get_context().is_main_process
    while made.step < config["steps"]:
        loss = made.told(made.train(batches))
        reach("report")
        if not main or made.step % config["every"]:
            distplat.report({"loss": loss})
        elif not config["files"]:
            distplat.report({"loss": loss}, made.state())
        else:
            with TemporaryDirectory() as path:
                torch.save(made.state(), Path(path) / "state.pt")
                kept = distplat.Checkpoint.from_directory(path)
                distplat.report({"loss": loss}, kept)
