"""Tasks of the cluster tests, imported by name in the workers."""

import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import ray
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from distplat import Task


class Blobs(Task):
    """37 samples in 5 dimensions, 3 classes: the last batch is short, and parts are uneven."""

    def model(self) -> nn.Module:
        return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))

    def train_data(self) -> Dataset[Any]:
        generator = torch.Generator().manual_seed(1)
        inputs = torch.randn(37, 5, generator=generator)
        return TensorDataset(inputs, torch.randint(0, 3, (37,), generator=generator))

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return nn.functional.cross_entropy(outputs, targets)

    def eval_data(self) -> Dataset[Any] | None:
        return self.train_data()

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        return {"accuracy": (outputs.argmax(-1) == targets).float().mean()}


class Spread:
    """A metric with state: the standard deviation of all outputs is not a mean over batches."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.seen: list[Tensor] = []

    def update(self, outputs: Tensor) -> None:
        self.seen.append(outputs)

    def merge(self, other: "Spread") -> None:
        self.seen += other.seen

    def compute(self) -> Tensor:
        return torch.cat(self.seen).std()


class Tuned(Blobs):
    """A frozen first layer, and a metric with state."""

    def __init__(self) -> None:
        self.spread = Spread()

    def model(self) -> nn.Module:
        model = super().model()
        next(model.children()).requires_grad_(False)
        return model

    def metrics(self, outputs: Tensor, targets: Tensor) -> dict[str, Any]:
        self.spread.update(outputs)
        return {"spread": self.spread}


def create_marker(marker: str) -> bool:
    """Create the marker file; return False if another process has created it."""
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


class Paced(Blobs):
    """
    Sleeps in each step until a file exists, so that tests can act during the run.

    Later steps sleep longer: even on a slow machine steps remain.

    Args:
        until: the file.
        seconds: duration of each of the first hundred sleeps.
    """

    def __init__(self, until: str, seconds: float = 0.04) -> None:
        self.until, self.seconds, self.calls = until, seconds, 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if not os.path.exists(self.until):
            time.sleep(self.seconds if self.calls <= 100 else max(self.seconds, 0.5))
        return super().loss(outputs, targets)


class SlowStart(Blobs):
    """Sleeps in `train_data`, in the first process that calls it."""

    def __init__(self, marker: str, seconds: float) -> None:
        self.marker, self.seconds = marker, seconds

    def train_data(self) -> Dataset[Any]:
        if create_marker(self.marker):
            time.sleep(self.seconds)
        return super().train_data()

    def eval_data(self) -> None:
        return None


class Misbehaving(Blobs):
    """
    Injects a fault in call number `at` of `loss`, in the first process that reaches it.

    Args:
        fault: `raise`, `exit`, `kill`, `stop` or `hang`; empty: none.
        marker: file that the first process creates: only one rank misbehaves.
        at: number of the call.
    """

    def __init__(self, fault: str = "", marker: str = "", at: int = 5) -> None:
        self.fault, self.marker, self.at = fault, marker, at
        self.calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        time.sleep(0.05)  # the controller receives reports of some steps
        if self.fault and self.calls == self.at and create_marker(self.marker):
            self._misbehave()
        return super().loss(outputs, targets)

    def _misbehave(self) -> None:
        if self.fault == "raise":
            raise KeyError("no such token: 17")
        if self.fault == "exit":
            raise SystemExit(0)
        if self.fault == "hang":
            time.sleep(3600)
        os.kill(os.getpid(), signal.SIGKILL if self.fault == "kill" else signal.SIGSTOP)


class Rows(IterableDataset[Any]):
    """A stream of samples, with its position as state."""

    def __init__(self, *columns: Tensor) -> None:
        self.columns, self.position = columns, 0

    def state_dict(self) -> dict[str, int]:
        return {"place": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["place"]

    def __iter__(self) -> Iterator[Any]:
        for position in range(self.position, len(self.columns[0])):
            self.position = position + 1
            yield tuple(column[position] for column in self.columns)


class Streamed(Misbehaving):
    """Reads the samples from a stream."""

    def train_data(self) -> Dataset[Any]:
        data = super().train_data()
        assert isinstance(data, TensorDataset)
        return Rows(*data.tensors)

    def eval_data(self) -> None:
        return None


class OfRayData(Blobs):
    """Reads the samples from a Ray Dataset of several blocks; inputs are doubled, then halved."""

    def train_data(self) -> Any:
        data = super().train_data()
        assert isinstance(data, TensorDataset)
        inputs, targets = (column.numpy() for column in data.tensors)
        rows = [{"inputs": x, "targets": y} for x, y in zip(inputs, targets, strict=True)]
        return ray.data.from_items(rows, override_num_blocks=5).map_batches(_double_inputs)

    def forward(self, model: nn.Module, batch: Any) -> Tensor:
        outputs: Tensor = model(batch["inputs"] / 2)
        return outputs

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().loss(outputs, batch["targets"])

    def eval_data(self) -> None:
        return None


class OfTerms(Misbehaving):
    """A loss of two terms, each with a separate weight."""

    def weights(self, batch: Any) -> dict[str, Any]:
        first = batch[1] == 0
        return {"first": first.sum(), "others": (~first).sum()}

    def loss(self, outputs: Tensor, targets: Tensor) -> Any:
        super().loss(outputs, targets)  # counts the call, and may inject the fault
        each = nn.functional.cross_entropy(outputs, targets, reduction="none")
        return {"first": each[targets == 0].sum(), "others": each[targets != 0].sum()}


class WithOptimizers(OfTerms):
    """The same loss; the task creates two optimizers."""

    def optimizer(
        self, named_parameters: list[tuple[str, nn.Parameter]]
    ) -> list[torch.optim.Optimizer]:
        matrices = [p for _, p in named_parameters if p.ndim == 2]
        rest = [p for _, p in named_parameters if p.ndim < 2]
        return [
            torch.optim.Adafactor(matrices, lr=0.05),
            torch.optim.SGD(rest, lr=0.1, momentum=0.9),
        ]


def _double_inputs(rows: dict[str, Any]) -> dict[str, Any]:
    return {**rows, "inputs": rows["inputs"] * 2}


class Elastic(Blobs):
    """
    Kills or freezes processes in given steps. The model has batch norm and dropout.

    Args:
        folder: for the markers of faults: each fault is injected once.
        faults: `kill 1 at 6` kills rank 1 in its seventh step; `stop` freezes it. `start` instead
            of a step: while a replacement builds the model. An actor class instead of `kill`: that
            rank kills one of these actors.
        pause: minimum duration of each forward, in seconds.
        saved: folder of runs; faults wait for a checkpoint in it. Empty: faults do not wait.
    """

    def __init__(
        self, folder: str, faults: list[str], pause: float = 0.02, saved: str = ""
    ) -> None:
        self.folder, self.faults = folder, [fault.split() for fault in faults]
        self.pause, self.saved = pause, saved
        self.rank = int(str(ray.get_runtime_context().get_actor_name()).split("/")[1].split("-")[1])
        self.is_replacement = "attempt" in str(ray.get_runtime_context().get_actor_name())
        self.at: int | str = "start"

    def model(self) -> nn.Module:
        if self.is_replacement:
            self._act()
        parts = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.1), nn.Linear(16, 3)]
        return Counting(self, *parts)

    def _act(self) -> None:
        for number, (fault, rank, _, step) in enumerate(self.faults):
            mine = rank in ("all", str(self.rank)) and step == str(self.at)
            name = f"{number}-{self.rank}" if rank == "all" else str(number)
            if mine and create_marker(os.path.join(self.folder, name)):
                self._wait_for_a_checkpoint()
                victim = os.getpid() if fault in ("kill", "stop") else process_of(fault)
                os.kill(victim, signal.SIGSTOP if fault == "stop" else signal.SIGKILL)

    def _wait_for_a_checkpoint(self) -> None:
        deadline = time.monotonic() + 15
        while self.saved and not [*Path(self.saved).glob("*/checkpoints/step-" + "[0-9]" * 6)]:
            assert time.monotonic() < deadline, f"no checkpoint below {self.saved}"
            time.sleep(0.02)


def process_of(role: str) -> int:
    """Find the process of an actor of this Ray instance."""
    for process in psutil.Process().parent().children():  # type: ignore[union-attr]
        if " ".join(process.cmdline()).startswith(f"ray::{role}"):
            return process.pid
    raise LookupError(role)


class Counting(nn.Sequential):
    """Sets the step of its task, from a buffer that counts forwards in training."""

    def __init__(self, task: Elastic, *parts: nn.Module) -> None:
        super().__init__(*parts)
        self.task = task
        self.register_buffer("forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, inputs: Tensor) -> Tensor:
        if self.training:
            self.task.at = int(self.get_buffer("forwards"))
            self.get_buffer("forwards").add_(1)
            self.task._act()
            time.sleep(self.task.pause)
        elif self.task.at == 29:
            self.task.at = "evaluation"
            self.task._act()
        result: Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]
        return result


class Vast(Blobs):
    """16 Mi parameters, mostly unused: an all-reduce of 64 MB takes most of a step."""

    def model(self) -> nn.Module:
        return Slice(16 * 2**20)

    def eval_data(self) -> None:
        return None


class Slice(nn.Module):
    def __init__(self, size: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(size) * 0.1)

    def forward(self, inputs: Tensor) -> Tensor:
        middle = len(self.weight) // 2
        return inputs @ self.weight[middle : middle + 15].view(5, 3)


class Big(Blobs):
    """A million parameters: a tensor is split over several shards."""

    width = 1000

    def model(self) -> nn.Module:
        width = self.width
        layers = [nn.Linear(5, width), nn.ReLU(), nn.Linear(width, width), nn.Linear(width, 3)]
        return nn.Sequential(*layers)


class Huge(Big):
    """64 MB: two gradients do not fit into the object store of a test node."""

    width = 4000


class Deep(Blobs):
    """Enough layers for several stages."""

    def model(self) -> nn.Module:
        blocks = [nn.Sequential(nn.Linear(8, 8), nn.Tanh()) for _ in range(4)]
        return nn.Sequential(nn.Linear(5, 8), *blocks, nn.Linear(8, 3))


class Drop(Blobs):
    """Dropout and batch norm: a replay must restore both per rank."""

    def model(self) -> nn.Module:
        parts = [nn.Linear(5, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Dropout(0.2), nn.Linear(16, 3)]
        return nn.Sequential(*parts)


class SlowFirst(Blobs):
    """Rank 0 sleeps in each loss."""

    def __init__(self, seconds: float) -> None:
        name = str(ray.get_runtime_context().get_actor_name())
        self.seconds = seconds if "worker-0" in name else 0.0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        time.sleep(self.seconds)
        return super().loss(outputs, targets)

    def eval_data(self) -> None:
        return None


class Jittered(Dataset[Any]):
    """Draws from all global generators for each sample."""

    def __init__(self, data: Dataset[Any]) -> None:
        self.data = data

    def __len__(self) -> int:
        return 37

    def __getitem__(self, index: int) -> Any:
        inputs, target = self.data[index]
        return inputs + torch.rand(5) + float(np.random.rand()) + random.random(), target


class Chance(Blobs):
    """A model and data that depend on the global generators and on the hash seed."""

    def __init__(self) -> None:
        self.offset = float(np.random.rand()) + random.random()

    def model(self) -> nn.Module:
        first = nn.Linear(5, 8)
        order = "".join({"a", "b", "c", "d", "e", "f", "g"})
        first.weight.data += self.offset + random.Random(order).random()
        return nn.Sequential(first.requires_grad_(False), nn.Tanh(), nn.Linear(8, 3))

    def train_data(self) -> Dataset[Any]:
        return Jittered(super().train_data())


class Hungry(Blobs):
    """Allocates memory in a step, in the first process that reaches it."""

    def __init__(self, marker: str, max_gib: int = 10) -> None:
        self.marker, self.max_gib = marker, max_gib
        self.calls = 0

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        self.calls += 1
        if self.calls == 5 and create_marker(self.marker):
            arrays = []
            for _ in range(8 * self.max_gib):  # 128 MiB, written to
                arrays.append(np.ones(16 * 2**20))
                time.sleep(0.02)
        return super().loss(outputs, targets)
