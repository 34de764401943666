"""The strategy catalog: built-in strategies, invalid options, and strategy files of users."""

import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec import Job
from distplat.strategies import catalog
from distplat.strategies.catalog import (
    Registry,
    complete,
    load_strategy_file,
    make_job,
    make_strategy,
    strategies,
    strategy_problems,
)
from distplat.strategies.ps_sync import PsSync
from distplat.strategies.ring import Ring
from distplat.strategies.strategy_spec import GroupSpec, Roles, Strategy
from distplat.strategies.worker_strategy import WorkerStrategy, make_worker_strategy


def fields(strategy: object) -> dict[str, object]:
    return {
        "name": "x",
        "task": "model:Digits",
        "strategy": strategy,
        "optimizer": {"name": "SGD", "lr": 0.1},
        "steps": 1,
        "global_batch_size": 8,
    }


def job(strategy: object) -> Job:
    return Job.model_validate(fields(strategy))


OWN = """
from pydantic import Field
from distplat.strategy import Options, Strategy, WorkerStrategy, register

class OwnOptions(Options):
    period: int = Field(3, ge=1)

class OwnWorker(WorkerStrategy[OwnOptions]):
    def setup(self, context): ...
    def exchange(self, step, local): ...
    def update(self, step, total): ...

@register("{name}")
class Own(Strategy[OwnOptions]):
    summary = "a user's own"
    options_type = OwnOptions
    worker = OwnWorker
"""


@pytest.fixture
def own_catalog(monkeypatch: pytest.MonkeyPatch) -> Registry[type[Strategy[Any]]]:
    """Replace the catalog by a new one, in which a test may register strategies."""
    fresh: Registry[type[Strategy[Any]]] = Registry("strategy")
    fresh.register("ring")(Ring)
    fresh.register("ps-sync")(PsSync)
    monkeypatch.setattr(catalog, "strategies", fresh)
    return fresh


def test_finds_built_in_strategies() -> None:
    assert {"ring", "ps-sync"} <= set(strategies.names())
    assert (strategies.get("ring"), strategies.get("ps-sync")) == (Ring, PsSync)
    assert all(strategies.get(name).summary for name in strategies.names())


def test_new_process_finds_the_same_strategies() -> None:
    code = "from distplat.strategies.catalog import strategies as s; print(s.names())"
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert process.stdout.strip() == str(strategies.names())


@pytest.mark.parametrize(
    ("strategy", "cls", "roles"),
    [
        ("ring", Ring, Roles(collective=GroupSpec("auto", 60.0, setting="strategy.timeout_s"))),
        (
            {"name": "ring", "timeout_s": 5},
            Ring,
            Roles(collective=GroupSpec("auto", 5.0, setting="strategy.timeout_s")),
        ),
        ("ps-sync", PsSync, Roles(servers=1, server_resources={"CPU": 0.0}, resizes=True)),
        (
            {"name": "ps-sync", "num_servers": 3, "resources_per_server": {"CPU": 1}},
            PsSync,
            Roles(servers=3, server_resources={"CPU": 1.0}, resizes=True),
        ),
        (
            {"name": "ps-sync", "num_servers": 2, "split": "load"},
            PsSync,
            Roles(servers=2, server_resources={"CPU": 0.0}, resizes=True, split_by_load=True),
        ),
    ],
)
def test_make_strategy_parses_options(
    strategy: object, cls: type[Strategy[Any]], roles: Roles
) -> None:
    instance = make_strategy(job(strategy))
    assert type(instance) is cls
    assert instance.roles(job(strategy)) == roles
    assert strategy_problems(job(strategy)) == []


@pytest.mark.parametrize(
    ("strategy", "field", "message", "hint"),
    [
        ("rnig", "strategy", "unknown strategy 'rnig'", "did you mean 'ring'?"),
        (
            "fakes",
            "strategy",
            "unknown strategy 'fakes'",
            "allowed: hybrid, ps-async, ps-sync, ring",
        ),
        ({"name": "ring", "timeout": 5}, "strategy.timeout", "", "did you mean 'timeout_s'?"),
        (
            {"name": "ring", "num_servers": 2},
            "strategy.num_servers",
            "",
            "ps-async, ps-sync have it",
        ),
        ({"name": "ring", "timeout_s": 0}, "strategy.timeout_s", "0", ""),
        ({"name": "ring", "backend": "ncll"}, "strategy.backend", "gloo", ""),
        ({"name": "ps-sync", "num_servers": 0}, "strategy.num_servers", "1", ""),
        ({"name": "ps-sync", "num_servers": "2"}, "strategy.num_servers", "", ""),
        ({"name": "ps-sync", "split": "load"}, "strategy.split", "no effect with one server", ""),
        ({"name": "ps-sync", "num_servers": 2, "split": "lod"}, "strategy.split", "", "'load'"),
    ],
)
def test_error_names_the_field(strategy: object, field: str, message: str, hint: str) -> None:
    (problem,) = strategy_problems(job(strategy))
    assert problem.field == field
    assert message in problem.message and hint in problem.hint
    with pytest.raises(SpecError) as caught:
        make_strategy(job(strategy))
    assert caught.value.problems == (problem,)


def test_reports_all_problems_at_once() -> None:
    invalid = {"name": "ring", "timeout": 5, "backend": "mpi"}
    names = {problem.field for problem in strategy_problems(job(invalid))}
    assert names == {"strategy.timeout", "strategy.backend"}


def test_make_job_checks_the_strategy() -> None:
    assert make_job(fields("ring")) == job("ring")
    with pytest.raises(SpecError, match=r"strategy\.timeout"):
        make_job(fields({"name": "ring", "timeout": 5}))


@pytest.mark.parametrize(
    ("strategy", "changes", "message"),
    [
        ("ring", {"scaling": {"num_workers": 64}}, ""),
        (
            "ring",
            {"scaling": {"num_workers": 65}},
            "64 samples cannot be cut into 65 workers x 1 micro-batches = 65 parts"
            "\n  hint: at least 65",
        ),
        (
            "ps-sync",
            {"scaling": {"num_workers": 0}, "gradient_accumulation": 100},
            "64 samples cannot be cut into 1 workers x 100 micro-batches = 100 parts"
            "\n  hint: at least 100",
        ),
        (
            {"name": "hybrid", "pipeline": 2, "data": 2},
            {"scaling": {"num_workers": 4}, "global_batch_size": 2},
            "",
        ),
        (
            {"name": "hybrid", "pipeline": 2, "data": 2},
            {"scaling": {"num_workers": 4}, "global_batch_size": 1},
            "1 samples cannot be cut into 2 copies of the model x 1 micro-batches = 2 parts"
            "\n  hint: at least 2",
        ),
    ],
)
def test_batch_has_a_sample_for_each_part(
    strategy: object, changes: dict[str, Any], message: str
) -> None:
    partial = Job.model_validate({**fields(strategy), "global_batch_size": 64, **changes})
    messages = [str(problem) for problem in strategy_problems(complete(partial))]
    assert messages == ([f"global_batch_size: {message}"] if message else [])


def test_own_loop_needs_no_batch_size() -> None:
    """The default of `global_batch_size` has fewer samples than workers, and does not apply."""
    own_loop = {"name": "own", "strategy": "ring", "own_loop": True, "scaling": {"num_workers": 4}}
    assert strategy_problems(make_job(own_loop)) == []


def test_strategy_can_reject_a_job(own_catalog: Registry[type[Strategy[Any]]]) -> None:
    problem = Problem(("scaling",), "needs two workers")

    class Picky(Ring):
        def problems(self, job: Job) -> list[Problem]:
            return [problem]

    own_catalog.register("picky")(Picky)
    with pytest.raises(SpecError) as caught:
        make_strategy(job("picky"))
    assert caught.value.problems == (problem,)


def test_loads_strategy_file(tmp_path: Path, own_catalog: Registry[type[Strategy[Any]]]) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN.format(name="own"))
    load_strategy_file(path)
    assert own_catalog.names() == ["own", "ps-sync", "ring"]
    strategy = make_strategy(job({"name": "own", "period": 5}))
    assert strategy.options.period == 5
    (problem,) = strategy_problems(job({"name": "own", "perod": 5}))
    assert "did you mean 'period'?" in problem.hint


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1 / 0", "own.py raised ZeroDivisionError: division by zero"),
        ("import no_such_module_at_all", "own.py raised ModuleNotFoundError"),
        ("def broken(:", "own.py raised SyntaxError"),
        (OWN.format(name="ring"), "strategy 'ring' is already distplat.strategies.ring.Ring; give"),
    ],
    ids=["raises", "imports", "syntax", "clash"],
)
@pytest.mark.usefixtures("own_catalog")
def test_rejects_broken_strategy_file(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "own.py"
    path.write_text(text)
    with pytest.raises(SpecError, match=message):
        load_strategy_file(path)


def test_strategy_file_is_pickled_as_text(
    tmp_path: Path, own_catalog: Registry[type[Strategy[Any]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "own.py"
    path.write_text(OWN.format(name="own"))
    loaded = load_strategy_file(path)
    path.unlink()
    copy = pickle.loads(pickle.dumps(loaded))  # noqa: S301  our own bytes
    assert copy == loaded
    copy.load()  # already registered: no effect
    other_catalog: Registry[type[Strategy[Any]]] = Registry("strategy")
    monkeypatch.setattr(catalog, "strategies", other_catalog)
    copy.load()
    assert other_catalog.names() == ["own"]


@pytest.mark.timeout(20)
@pytest.mark.parametrize(
    "name", ["missing.py", "folder.py", "folder", "notes.txt", "latin.py", "pipe.py"]
)
def test_rejects_files_that_are_not_python(name: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.py")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder.py").mkdir()
    (tmp_path / "latin.py").write_bytes(b"x = '\xe9'")
    (tmp_path / "notes.txt").write_text("hello")
    with pytest.raises(SpecError, match=f"{name} is not a Python file"):
        load_strategy_file(tmp_path / name)


def test_rejects_name_of_a_built_in_strategy(tmp_path: Path) -> None:
    """Also at the first access to the catalog; in a new process, as it changes global state."""
    path = tmp_path / "own.py"
    path.write_text(OWN.format(name="ring"))
    code = (
        "from pathlib import Path; from distplat.strategies.catalog import load_strategy_file; "
        f"load_strategy_file(Path({str(path)!r}))"
    )
    process = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert "'ring' is already distplat.strategies.ring.Ring; give _distplat_user_own.Own" in (
        process.stderr
    )


@pytest.mark.parametrize("name", ["ps-sync", "ps-async"])
def test_removed_option_is_reported_with_other_problems(name: str) -> None:
    problems = strategy_problems(job({"name": name, "overlap": True, "num_servers": 0}))
    hints = {problem.where[-1]: problem.hint for problem in problems}
    assert hints.keys() == {"overlap", "num_servers"}
    assert "was removed" in hints["overlap"]


OLD_IMPORT = "from distplat.strategies.base import Options, Strategy"
OLD_CLASS = """
from distplat.strategy import Strategy, register

@register("old")
class Old(Strategy):
    summary = "of one class"
    def setup(self, context): return 0
    def exchange(self, step, local): return local
    def update(self, step, total): ...
"""
NO_WORKER = """
from distplat.strategy import Strategy, register

@register("halved")
class Halved(Strategy):
    summary = "without its second half"
"""


@pytest.mark.parametrize(
    ("base", "old", "new"),
    [
        (Strategy, "survivors_go_on", "survives_worker_loss"),
        (WorkerStrategy, "can_thaw", "can_unfreeze"),
    ],
)
def test_renamed_method_raises_with_both_names(base: Any, old: str, new: str) -> None:
    with pytest.raises(TypeError, match=rf"Mine\.{old}\(\) was renamed to {new}\(\)"):
        type("Mine", (base,), {old: lambda self: True})
    mixin = type("Mixin", (), {old: lambda self: True})
    with pytest.raises(TypeError, match=rf"Mine\.{old}\(\) was renamed to {new}\(\)"):
        type("Mine", (mixin, base), {})


@pytest.mark.parametrize("text", [OLD_IMPORT, OLD_CLASS], ids=["import", "class"])
@pytest.mark.usefixtures("own_catalog")
def test_strategy_of_one_class_raises_with_reference_to_docs(text: str, tmp_path: Path) -> None:
    path = tmp_path / "old.py"
    path.write_text(text)
    with pytest.raises(SpecError, match=r"WorkerStrategy.*docs/own_strategies\.md"):
        load_strategy_file(path)


@pytest.mark.usefixtures("own_catalog")
def test_rejects_strategy_without_worker(tmp_path: Path) -> None:
    path = tmp_path / "halved.py"
    path.write_text(NO_WORKER)
    load_strategy_file(path)
    with pytest.raises(SpecError, match="Halved does not name a WorkerStrategy"):
        make_worker_strategy(job("halved"))


@pytest.mark.parametrize("name", ["hybrid", "ps-async", "ps-sync", "ring"])
def test_make_worker_strategy(name: str) -> None:
    spec = job({"name": name} if name != "hybrid" else {"name": name, "data": 1})
    worker = make_worker_strategy(spec)
    assert type(worker.strategy) is strategies.get(name)
    assert worker.options == make_strategy(spec).options
    has_own_checkpoint = type(worker).checkpoint is not WorkerStrategy.checkpoint
    assert worker.strategy.has_checkpoints == has_own_checkpoint
