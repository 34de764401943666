"""Loader processes: fast start, classes of scripts, and cleanup."""

import gc
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from multiprocessing import active_children, synchronize
from pathlib import Path
from typing import Any

import pytest
import torch
from function_ranks import call_on_ranks
from marks import slow
from random_draws import Dropping, Noise, job
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

import distplat
from distplat.strategies.loop.batches import (
    EvalLoader,
    Loader,
    SampleRun,
    make_sampler,
    micro_batches,
)
from distplat.strategies.loop.loaders import LoaderContext, start_loader_server

pytestmark = pytest.mark.usefixtures("loader_server")

FOLDER = Path(__file__).parent
SCRIPT = """
import sys
from multiprocessing import get_context

from distplat.strategies.catalog import make_job
from distplat.strategies.loop.loaders import start_loader_server

if __name__ == "__main__":
    start_loader_server(make_job({
        "name": "loaders", "strategy": "ring", "scaling": {"num_workers": 1}, "steps": 1,
        "optimizer": {"name": "SGD", "lr": 1}, "global_batch_size": 1, "data": {"num_workers": 1},
    }))()
    look = "import sys; sys.exit(7 if 'torch.utils.data' in sys.modules else 3)"
    child = get_context("forkserver").Process(target=exec, args=(look,))
    child.start()
    child.join()
    sys.exit(child.exitcode)
"""


def test_loader_process_has_torch_preloaded() -> None:
    process = subprocess.run([sys.executable, "-c", SCRIPT], timeout=100, check=False)
    assert process.returncode == 7


@pytest.fixture
def prefix(monkeypatch: pytest.MonkeyPatch) -> str:
    """Give this test's semaphores a unique name prefix, and return it."""
    name, numbers = f"mp-test-{os.getpid()}", itertools.count()
    make_name = staticmethod(lambda: f"/{name}-{next(numbers)}")
    monkeypatch.setattr(synchronize.SemLock, "_make_name", make_name)
    return f"sem.{name}"


def semaphores_in_memory(prefix: str) -> list[str]:
    return [name for name in os.listdir("/dev/shm") if name.startswith(prefix)]


def test_semaphores_of_loaders_are_unlinked(prefix: str) -> None:
    context = LoaderContext()
    lock = context.Lock()
    name = lock._semlock.name.removeprefix("/")  # type: ignore[attr-defined]
    assert semaphores_in_memory(prefix) == [f"sem.{name}"]
    context.unlink_semaphores(1.0)
    assert not semaphores_in_memory(prefix)
    with lock:
        assert not lock.acquire(block=False)
    start_loader_server(job(loaders=2))()
    sampler = make_sampler(job(), Noise())
    batches = micro_batches(job(loaders=2), Noise(), sampler, 0, range(6), 1)
    next(batches)
    assert not semaphores_in_memory(prefix)
    assert len([*batches]) == 5
    del batches
    assert not active_children()


KILLED = """
import os, signal, sys
from multiprocessing import active_children, current_process, forkserver
sys.path[:0] = {path!r}
current_process()._config["semprefix"] = "/mp-killed-" + str(os.getpid())
from random_draws import Noise, job
from distplat.strategies.loop.batches import make_sampler, micro_batches
if __name__ == "__main__":
    batches = micro_batches(job(loaders=2), Noise(), make_sampler(job(), Noise()), 0, range(6), 1)
    next(batches)
    server = forkserver._forkserver._forkserver_pid
    print(server, *(child.pid for child in active_children()), flush=True)
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_killed_worker_leaves_no_process_or_semaphore(tmp_path: Path) -> None:
    script = tmp_path / "killed.py"
    script.write_text(KILLED.format(path=[str(FOLDER.parent / "support")]))
    child = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    pids = child.stdout.readline().split()
    assert child.wait(60) == -signal.SIGKILL
    assert len(pids) == 3
    deadline = time.monotonic() + 20
    while remaining := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, f"left behind: {remaining}"
        time.sleep(0.05)
    assert not semaphores_in_memory(f"sem.mp-killed-{child.pid}")


def is_running(pid: str) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return ") Z " not in Path(f"/proc/{pid}/stat").read_text(encoding="utf-8")
    except (FileNotFoundError, ProcessLookupError):  # the latter if it ends during the read
        return False


class FailingSamples(Dataset[Any]):
    def __len__(self) -> int:
        return 11

    def __getitem__(self, index: int) -> Any:
        if index == 5:
            raise LookupError("sample 5 is gone")
        return index, torch.zeros(1)


class Pids(Dataset[int]):
    """Each sample is the pid of the process that reads it."""

    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> int:
        return os.getpid()


@pytest.mark.parametrize("persistent", [False, True])
def test_loader_in_a_reference_cycle_ends_its_processes(
    persistent: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """
    The garbage collector finalizes the queues of a cycle first.

    torch's iterator then waits 5 s for its processes and kills them.
    """
    processes: list[Any] = []
    start = LoaderContext.Process

    def record(self: LoaderContext, *args: Any, **named: Any) -> Any:
        processes.append(start(self, *args, **named))
        return processes[-1]

    monkeypatch.setattr(LoaderContext, "Process", record)
    loader = Loader(job(data={"num_workers": 2}), Pids(), persistent=persistent)
    cycle: list[Any] = [loader, loader.batches([SampleRun(0, 0, [n]) for n in range(9)])]
    next(cycle[1])
    cycle.append(cycle)
    del loader, cycle
    gc.collect()
    for process in processes:
        process.join(60)
    assert [process.exitcode for process in processes] == [0, 0]


@pytest.mark.parametrize("persistent", [False, True])
def test_evaluation_keeps_persistent_loader_processes(persistent: bool) -> None:
    data = {"num_workers": 2, "persistent_workers": persistent}
    samples, loader = Pids(), EvalLoader(job(data=data), Dropping())
    pids = [
        {int(pid) for batch, _ in loader.batches(samples, range(4), 2) for pid in batch}
        for _ in range(2)
    ]
    assert [len(processes) for processes in pids] == [2] * 2
    assert (pids[0] == pids[1]) == persistent
    children = {child.pid for child in active_children()}
    assert pids[1] <= children if persistent else not pids[1] & children
    del loader
    assert not pids[1] & {child.pid for child in active_children()}, "they end with the loader"


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ({}, False),
        ({"num_workers": 1}, True),
        ({"pin_memory": True}, True),
        ({"num_workers": 1, "pin_memory": False}, False),
    ],
)
def test_memory_is_pinned_for_a_gpu(data: dict[str, Any], expected: bool) -> None:
    """Checks the argument of torch's loader, which needs no GPU."""
    with_gpu = job(data=data, scaling={"num_workers": 1, "use_gpu": True})
    for spec, pinned in ((with_gpu, expected), (job(), False)):
        assert Loader(spec, Pids())._loader.pin_memory is pinned


def test_exception_in_a_loader_is_raised() -> None:
    plan = [SampleRun(0, 0, [1, 2]), SampleRun(0, 2, [4, 5])]
    batches = Loader(job(loaders=1), FailingSamples()).batches(plan)
    next(batches)
    with pytest.raises(LookupError, match="sample 5 is gone"):
        next(batches)


def test_local_classes_and_functions_are_sent_to_loaders() -> None:
    class Local(Dataset[Any]):
        def __init__(self) -> None:
            self.transform: Any = lambda value: value + 1
            self.large, self.small = torch.arange(20_000), [torch.full((1,), i) for i in range(400)]

        def __len__(self) -> int:
            return 11

        def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
            return self.transform(self.large[index]), self.small[index]

    (first, second), *rest = Loader(job(loaders=1), Local()).batches(
        [SampleRun(0, 0, [3, 4]), SampleRun(0, 2, [5])]
    )
    assert (first.tolist(), second.tolist()) == ([4, 5], [[3], [4]])
    assert len(rest) == 1


BARE = """
import collections, dataclasses, json, sys
import torch
from torch import nn
from torch.utils.data import Dataset
from distplat import Task, Trainer

print("RAN", flush=True)
Pair = collections.namedtuple("Pair", "a b")
SCALE = 0.5

@dataclasses.dataclass
class Target:
    value: torch.Tensor

class Gone(Exception):
    pass

class Mine(Dataset):
    def __init__(self, broken):
        self.broken = broken
    def __len__(self):
        return 12
    def __getitem__(self, index):
        if self.broken and index == 7:
            raise Gone("sample 7")
        inputs = Pair(torch.full((3,), index * SCALE) + torch.rand(3), __file__)
        return inputs, Target(torch.ones(1))

class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(3, 1)
    def forward(self, pair):
        assert type(pair) is Pair, type(pair)
        return self.layer(pair.a)

class Mean(Task):
    def __init__(self, broken=False):
        self.broken = broken
    def model(self):
        return Model()
    def train_data(self):
        return Mine(self.broken)
    def loss(self, outputs, targets):
        assert type(targets) is Target, type(targets)
        return ((outputs - targets.value) ** 2).mean()

def run(loaders, broken=False):
    return Trainer({
        "name": "bare", "strategy": "ring", "scaling": {"num_workers": 0}, "epochs": 2,
        "optimizer": {"name": "SGD", "lr": 0.01}, "global_batch_size": 4,
        "data": {"num_workers": loaders}, "task_args": {"broken": broken},
    }, Mean).fit()

print(json.dumps([[step.loss for step in run(loaders).history] for loaders in (0, 2)]))
try:
    run(2, broken=True)
except Exception as error:
    print(type(error).__name__, repr(str(error)))
"""


@pytest.mark.parametrize("name", [slow("bare.py"), "-"])
def test_script_trains_with_loaders_and_runs_once(tmp_path: Path, name: str) -> None:
    """Runs a file, and `python -`, for which loaders have no file to import."""
    (tmp_path / "bare.py").write_text(BARE)
    process = subprocess.run(
        [sys.executable, name],
        cwd=tmp_path,
        timeout=100,
        capture_output=True,
        text=True,
        input=BARE if name == "-" else None,
    )
    lines = process.stdout.splitlines()
    assert lines[0] == "RAN", process.stderr
    assert lines.count("RAN") == 1
    without, with_loaders = json.loads(lines[1])
    assert len(without) == 6
    assert without == with_loaders
    assert lines[2].startswith("UserCodeError")
    assert "Gone: sample 7" in lines[2]
    assert process.returncode == 0
    assert "Traceback" not in process.stderr


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Iterator[Any]:
        return iter(range(8))


@pytest.mark.parametrize("data", [range(8), Stream()], ids=["numbered", "stream"])
def test_prepared_loader_returns_batches_of_local_classes(data: Any) -> None:
    class Local:
        def __init__(self, samples: list[int]) -> None:
            self.samples = samples

    batches: list[Any] = []

    def train(config: Any) -> None:
        loader = DataLoader(data, batch_size=4, collate_fn=Local, num_workers=1, timeout=30)
        batches.extend(distplat.prepare(loader))

    call_on_ranks(train)
    assert [batch.samples for batch in batches] == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert {type(batch) for batch in batches} == {Local}
