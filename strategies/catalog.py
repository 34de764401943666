"""
The strategy registry: our own strategies, other packages' entry points, a user's own file.

Only a strategy's name and options travel to other processes; each looks the name up for itself.
"""

import importlib
import logging
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.metadata import entry_points
from pathlib import Path
from types import ModuleType
from typing import Any, Generic, TypeVar

from pydantic import ValidationError

from distplat.platform.disk import check_regular
from distplat.platform.errors import Problem, SpecError, StorageError, hint
from distplat.platform.job_file import job_of, read_job
from distplat.platform.lr_schedules import ReduceLROnPlateau
from distplat.platform.optimizers import TaskOptimizer
from distplat.platform.spec import Job, StrategySpec
from distplat.platform.spec_messages import problems_of
from distplat.strategies.strategy_spec import MIGRATION_HINT, Roles, Strategy

T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """
    Named things of one kind.

    Args:
        kind: what is registered, for messages (`strategy`).
        discover: registers everything there is; called before the first look-up.
    """

    def __init__(self, kind: str, discover: Callable[[], None] = lambda: None) -> None:
        self.kind = kind
        self._discover: Callable[[], None] | None = discover
        self._discovering = threading.RLock()
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """
        Register what is decorated under `name`; the same thing twice is fine.

        Raises:
            SpecError: another thing has the name already.
        """

        def add(thing: U) -> U:
            present = self._things.get(name)
            if present is not None and _origin(present) != _origin(thing):
                raise SpecError(
                    f"{self.kind} {name!r} is already {_origin(present)}; "
                    f"give {_origin(thing)} another name"
                )
            self._things[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def get(self, name: str) -> T:
        """
        Look a name up.

        Raises:
            SpecError: nobody registered it; says what is known and what is near.
        """
        self._ensure_discovered()
        if name not in self._things:
            message = f"unknown {self.kind} {name!r}"
            raise SpecError(Problem((self.kind,), message, hint(name, self._things)))
        return self._things[name]

    def names(self) -> list[str]:
        """Give all registered names in alphabetical order."""
        self._ensure_discovered()
        return sorted(self._things)

    def _ensure_discovered(self) -> None:
        with self._discovering:  # threads of the controller look up at the same time
            if self._discover is None:
                return
            discover, self._discover = self._discover, None  # it may look names up itself
            try:
                discover()
            except BaseException:
                self._discover = discover  # or the next look-up would find an empty registry
                raise


def _origin(thing: object) -> str:
    """Where a thing was defined: equal for one class reached through two imports."""
    module = getattr(thing, "__module__", type(thing).__module__)
    return f"{module}.{getattr(thing, '__qualname__', repr(thing))}"


logger = logging.getLogger(__name__)


ENTRY_POINTS = "distplat.strategies"
"""Entry-point group under which other packages offer modules that register strategies."""
BUILT_IN = ("hybrid", "ps_async", "ps_sync", "ring")
"""Modules of this folder that register a strategy."""


def _discover() -> None:
    """Import our strategies, then every plug-in; a broken plug-in is only logged."""
    for module in BUILT_IN:
        importlib.import_module(f"distplat.strategies.{module}")
    for plugin in entry_points(group=ENTRY_POINTS):
        try:
            plugin.load()
        except (Exception, SystemExit) as error:
            text = "strategy plug-in %r (%s) cannot be loaded; %s"
            logger.exception(text, plugin.name, plugin.value, _way_out(error))


def _way_out(error: BaseException) -> str:
    """Give the hint for code that imports what there was when a strategy was one class."""
    old = isinstance(error, ImportError) and (error.name or "").startswith("distplat.strategies")
    return MIGRATION_HINT if old else ""


strategies: Registry[type[Strategy[Any]]] = Registry("strategy", _discover)
"""All strategies of this process, by name."""


def register(name: str) -> Callable[[U], U]:
    """
    Register the strategy that is decorated.

    Raises:
        SpecError: another one has the name.
    """
    return strategies.register(name)


@dataclass(frozen=True)
class LoadedStrategyFile:
    """A user's own file that registers strategies; its text travels, for workers have no copy."""

    name: str
    text: str

    def load(self) -> None:
        """
        Run the file, which registers strategies.

        Raises:
            SpecError: it raises, or it registers a name that is taken.
        """
        strategies.names()  # ours come first, so that a name taken twice is the user's to change
        module = ModuleType(f"_distplat_user_{Path(self.name).stem}")
        module.__file__ = self.name
        sys.modules[module.__name__] = module  # pydantic looks annotations up there
        try:
            exec(compile(self.text, self.name, "exec"), module.__dict__)
        except SpecError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{self.name} raised {type(error).__name__}: {error}"
            raise SpecError(Problem(("--strategy-file",), what, _way_out(error))) from error


def load_strategy_file(path: Path) -> LoadedStrategyFile:
    """
    Read and run a user's own file.

    Raises:
        SpecError: it cannot be read, it raises, or it registers a name that is taken.
    """
    try:
        if path.suffix != ".py":
            raise ValueError("its name does not end in .py")
        check_regular(path)
        file = LoadedStrategyFile(str(path), path.read_text(encoding="utf-8"))
    except (OSError, ValueError, StorageError) as error:
        problem = Problem(("--strategy-file",), f"{path} is not a Python file: {error}")
        raise SpecError(problem) from None
    file.load()
    return file


def make_strategy(job: Job) -> Strategy[Any]:
    """
    Build the job's strategy.

    Raises:
        SpecError: unknown name, wrong options, or a job that the strategy cannot do.
    """
    strategy = _strategy_of(job.strategy)
    kind = type(strategy)
    problems = _kind_problems(job, kind)
    if job.failure.spare_workers and (job.own_loop or not strategy.survives_worker_loss()):
        text = (
            "after a loss all workers of such a job are made anew, and none takes another's place"
        )
        problems.append(Problem(("failure", "spare_workers"), text, "remove it"))
    problems += strategy.own_loop_problems(job) if job.own_loop else strategy.problems(job)
    roles = strategy.roles(job)
    if not job.own_loop:  # whose batches are its loaders'
        problems += _batch_problems(job, roles)
    problems += [*_embedding_problems(job, roles), *_plateau_problems(job, roles)]
    if problems:
        raise SpecError(*problems)
    return strategy


def _strategy_of(chosen: StrategySpec) -> Strategy[Any]:
    """
    Build a strategy, whatever the rest of the job is.

    Raises:
        SpecError: unknown name, or wrong options.
    """
    kind = strategies.get(chosen.name)
    try:
        options = kind.options_type.model_validate(dict(chosen.options))
    except ValidationError as error:
        problems = problems_of(error, kind.options_type, prefix=("strategy",))
        raise SpecError(*(_of_another_strategy(one, kind) for one in problems)) from None
    return kind(options)


def _option_problems(chosen: StrategySpec) -> list[Problem]:
    """List what is wrong with a strategy's name and options alone."""
    try:
        _strategy_of(chosen)
    except SpecError as error:
        return [*error.problems]
    return []


def _of_another_strategy(problem: Problem, kind: type[Strategy[Any]]) -> Problem:
    """Say which strategies have an option that this one has not, and never had."""
    name = str(problem.where[-1])
    is_option = len(problem.where) == 2 and name not in kind.options_type.removed_fields
    if not (is_option and problem.message.startswith("unknown field")):
        return problem
    others = [n for n in strategies.names() if name in strategies.get(n).options_type.model_fields]
    if not others:
        return problem
    have = "has it" if len(others) == 1 else "have it"
    return replace(problem, hint=f"{', '.join(others)} {have}: remove it, or change the strategy")


def strategy_problems(job: Job) -> list[Problem]:
    """List what is wrong with the strategy's part of a job; empty: `make_strategy` works."""
    try:
        make_strategy(job)
    except SpecError as error:
        return [*error.problems]
    return []


def _kind_problems(job: Job, kind: type[Strategy[Any]]) -> list[Problem]:
    """Name what in a job a strategy has not at all, whatever its options."""
    problems: list[Problem] = []
    if job.checkpoint.wanted and not kind.has_checkpoints:
        text = f"the strategy {job.strategy.name!r} has no checkpoints during the run"
        field = "every_steps" if job.checkpoint.every_steps else "every_epochs"
        problems.append(Problem(("checkpoint", field), text, "remove it"))
    if job.precision == "fp16" and not kind.scales_loss:
        text = f"fp16 has no loss scale under {job.strategy.name!r}"
        problems.append(Problem(("precision",), text, "use bf16, or `strategy: ring` or `ps-sync`"))
    if job.ema is not None and not kind.averages:
        text = f"the strategy {job.strategy.name!r} keeps no average of the weights"
        problems.append(Problem(("ema",), text, "use `strategy: ring` or `ps-sync`, or remove it"))
    if isinstance(job.optimizer, TaskOptimizer) and not kind.updates_whole:
        text = f"under {job.strategy.name!r} no worker updates whole parameters of the whole model"
        hint = "use `strategy: ring`, or name it in the job, if it is one of torch.optim"
        problems.append(Problem(("optimizer", "name"), text, hint))
    return problems


def _batch_problems(job: Job, roles: Roles) -> list[Problem]:
    """Workers that hold one copy of the model together have one part of a batch."""
    replicas, micro = roles.replicas(job.scaling.world), job.gradient_accumulation
    if job.global_batch_size >= replicas * micro:
        return []
    who = "workers" if roles.group_size == 1 else "copies of the model"
    text = (
        f"{job.global_batch_size} samples cannot be cut into {replicas} {who} x "
        f"{micro} micro-batches = {replicas * micro} parts"
    )
    return [Problem(("global_batch_size",), text, f"at least {replicas * micro}")]


def _embedding_problems(job: Job, roles: Roles) -> list[Problem]:
    """Tables make a step when every rank has pushed; some strategies' ranks do not keep step."""
    steps, name = roles.consistency, job.strategy.name
    if job.embeddings is None:
        return []
    if steps.backup_workers:
        text = "cannot be combined with `backup_workers`: tables need every rank's push"
        return [Problem(("embeddings",), text, "remove one of the two")]
    if steps.asynchronous and not job.embeddings.asynchronous:
        text = f"must be true under {name}: its ranks make steps of their own"
        return [Problem(("embeddings", "asynchronous"), text)]
    return []


def _plateau_problems(job: Job, roles: Roles) -> list[Problem]:
    """Rates that go by evaluations need all ranks to evaluate the same parameters."""
    steps, where = roles.consistency, ("lr_schedule",)
    if not isinstance(job.lr_schedule, ReduceLROnPlateau) or not steps.private:
        return []
    if steps.backup_workers:
        text = "ReduceLROnPlateau cannot be combined with `backup_workers`: workers that are not"
        text += " in one step evaluate different parameters"
        return [Problem(where, text, "remove one of the two")]
    text = (
        f"ReduceLROnPlateau is not there under {job.strategy.name!r}: while it is evaluated others"
    )
    text += " train on, so no step is the first with the new rate"
    return [Problem(where, text, "use `strategy: ps-sync` or `ring`, or another schedule")]


def complete(job: Job) -> Job:
    """Give the job with the options that its strategy chooses by the rest of it."""
    try:
        kind = strategies.get(job.strategy.name)
    except SpecError:
        return job  # whoever checks it says so
    return kind.complete(job)


def _problems(job: Job) -> list[Problem]:
    return strategy_problems(complete(job))


def load_job(
    path: str | Path, *, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Job:
    """
    Read a job file and check all of it, the strategy's options included.

    Args:
        path: the YAML file.
        overrides: `a.b=c`, as `--set` takes them.
        environ: variables that may hold `DISTPLAT_*` settings; None: none.

    Raises:
        SpecError: everything that is wrong, with file, line and column.
    """
    given = environ or {}
    return complete(
        read_job(
            Path(path),
            overrides=overrides,
            environ=given,
            check=_problems,
            check_strategy=_option_problems,
        )
    )


def make_job(data: Mapping[str, object]) -> Job:
    """
    Build a job from a mapping, with the messages of a job file but without its lines.

    Raises:
        SpecError: everything that is wrong.
    """
    return complete(job_of(data, check=_problems, check_strategy=_option_problems))
