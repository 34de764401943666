"""
The strategy registry: built-in strategies, entry points of other packages, and a user's own file.

Only a strategy's name and options are sent to other processes. Each process looks up the name in
its own registry.
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
    A registry of objects by name.

    Args:
        kind: what the objects are, for messages (`strategy`).
        discover: registers all objects; called before the first look-up.
    """

    def __init__(self, kind: str, discover: Callable[[], None] = lambda: None) -> None:
        self.kind = kind
        self._discover: Callable[[], None] | None = discover
        self._lock = threading.RLock()
        self._items: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """
        Return a decorator that registers an object under `name`. Registering the same object twice
        is allowed.

        Raises:
            SpecError: Another object has this name.
        """

        def add(item: U) -> U:
            present = self._items.get(name)
            if present is not None and _origin(present) != _origin(item):
                raise SpecError(
                    f"{self.kind} {name!r} is already {_origin(present)}; "
                    f"give {_origin(item)} another name"
                )
            self._items[name] = item  # type: ignore[assignment]
            return item

        return add

    def get(self, name: str) -> T:
        """
        Return the object with a name.

        Raises:
            SpecError: The name is unknown; the message suggests a similar one.
        """
        self._ensure_discovered()
        if name not in self._items:
            message = f"unknown {self.kind} {name!r}"
            raise SpecError(Problem((self.kind,), message, hint(name, self._items)))
        return self._items[name]

    def names(self) -> list[str]:
        """Return all registered names in alphabetical order."""
        self._ensure_discovered()
        return sorted(self._items)

    def _ensure_discovered(self) -> None:
        with self._lock:  # several threads of the controller may look up names
            if self._discover is None:
                return
            discover, self._discover = self._discover, None  # `discover` may look up names itself
            try:
                discover()
            except BaseException:
                self._discover = discover  # else the next look-up would find an empty registry
                raise


def _origin(item: object) -> str:
    """Return the qualified name of an object's definition; equal for one class imported twice."""
    module = getattr(item, "__module__", type(item).__module__)
    return f"{module}.{getattr(item, '__qualname__', repr(item))}"


logger = logging.getLogger(__name__)


ENTRY_POINTS = "distplat.strategies"
"""Entry-point group under which other packages offer modules that register strategies."""
BUILT_IN = ("hybrid", "ps_async", "ps_sync", "ring")
"""Modules of this package that register a strategy."""


def _discover() -> None:
    """Import the built-in strategies and all plug-ins; a plug-in that fails is only logged."""
    for module in BUILT_IN:
        importlib.import_module(f"distplat.strategies.{module}")
    for plugin in entry_points(group=ENTRY_POINTS):
        try:
            plugin.load()
        except (Exception, SystemExit) as error:
            text = "strategy plug-in %r (%s) cannot be loaded; %s"
            logger.exception(text, plugin.name, plugin.value, _migration_hint(error))


def _migration_hint(error: BaseException) -> str:
    """Return the hint for code of the earlier API, in which a strategy was one class."""
    old = isinstance(error, ImportError) and (error.name or "").startswith("distplat.strategies")
    return MIGRATION_HINT if old else ""


strategies: Registry[type[Strategy[Any]]] = Registry("strategy", _discover)
"""All strategies of this process, by name."""


def register(name: str) -> Callable[[U], U]:
    """
    Register the decorated strategy class under a name.

    Raises:
        SpecError: Another strategy has this name.
    """
    return strategies.register(name)


@dataclass(frozen=True)
class LoadedStrategyFile:
    """A user's file that registers strategies. Its text is sent to workers, which have no copy."""

    name: str
    text: str

    def load(self) -> None:
        """
        Run the file, which registers strategies.

        Raises:
            SpecError: The file raises an exception, or registers a name that is already used.
        """
        strategies.names()  # built-in names first, so that a conflict is reported for the file
        module = ModuleType(f"_distplat_user_{Path(self.name).stem}")
        module.__file__ = self.name
        sys.modules[module.__name__] = module  # pydantic resolves annotations there
        try:
            exec(compile(self.text, self.name, "exec"), module.__dict__)
        except SpecError:
            raise
        except (Exception, SystemExit) as error:
            what = f"{self.name} raised {type(error).__name__}: {error}"
            raise SpecError(Problem(("--strategy-file",), what, _migration_hint(error))) from error


def load_strategy_file(path: Path) -> LoadedStrategyFile:
    """
    Read and run a user's strategy file.

    Raises:
        SpecError: The file cannot be read, raises an exception, or registers a name that is already
            used.
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
        SpecError: The name is unknown, an option is invalid, or the strategy does not support the
            job.
    """
    strategy = _strategy_of(job.strategy)
    problems = _feature_problems(job, type(strategy))
    if job.failure.spare_workers and (job.own_loop or not strategy.survives_worker_loss()):
        text = "has no effect: after a loss all workers of such a job restart"
        problems.append(Problem(("failure", "spare_workers"), text, "remove it"))
    problems += strategy.own_loop_problems(job) if job.own_loop else strategy.problems(job)
    roles = strategy.roles(job)
    if not job.own_loop:  # a train function's batches come from its own loaders
        problems += _batch_problems(job, roles)
    problems += [*_embedding_problems(job, roles), *_plateau_problems(job, roles)]
    if problems:
        raise SpecError(*problems)
    return strategy


def _strategy_of(chosen: StrategySpec) -> Strategy[Any]:
    """
    Build a strategy from its name and options, without checking the rest of the job.

    Raises:
        SpecError: The name is unknown, or an option is invalid.
    """
    cls = strategies.get(chosen.name)
    try:
        options = cls.options_type.model_validate(dict(chosen.options))
    except ValidationError as error:
        problems = problems_of(error, cls.options_type, prefix=("strategy",))
        raise SpecError(*(_hint_at_owners(problem, cls) for problem in problems)) from None
    return cls(options)


def _option_problems(chosen: StrategySpec) -> list[Problem]:
    """Return the problems of a strategy's name and options alone."""
    try:
        _strategy_of(chosen)
    except SpecError as error:
        return [*error.problems]
    return []


def _hint_at_owners(problem: Problem, cls: type[Strategy[Any]]) -> Problem:
    """If an unknown option belongs to other strategies, name these in the problem's hint."""
    name = str(problem.where[-1])
    is_option = len(problem.where) == 2 and name not in cls.options_type.removed_fields
    if not (is_option and problem.message.startswith("unknown field")):
        return problem
    others = [n for n in strategies.names() if name in strategies.get(n).options_type.model_fields]
    if not others:
        return problem
    have = "has it" if len(others) == 1 else "have it"
    return replace(problem, hint=f"{', '.join(others)} {have}: remove it, or change the strategy")


def strategy_problems(job: Job) -> list[Problem]:
    """Return the problems of a job's strategy; empty: `make_strategy` succeeds."""
    try:
        make_strategy(job)
    except SpecError as error:
        return [*error.problems]
    return []


def _feature_problems(job: Job, cls: type[Strategy[Any]]) -> list[Problem]:
    """Return the features that a job uses and its strategy class does not have."""
    problems: list[Problem] = []
    if job.checkpoint.enabled and not cls.has_checkpoints:
        text = f"the strategy {job.strategy.name!r} has no checkpoints during the run"
        field = "every_steps" if job.checkpoint.every_steps else "every_epochs"
        problems.append(Problem(("checkpoint", field), text, "remove it"))
    if job.precision == "fp16" and not cls.scales_loss:
        text = f"fp16 has no loss scale under {job.strategy.name!r}"
        problems.append(Problem(("precision",), text, "use bf16, or `strategy: ring` or `ps-sync`"))
    if job.ema is not None and not cls.averages:
        text = f"the strategy {job.strategy.name!r} keeps no average of the weights"
        problems.append(Problem(("ema",), text, "use `strategy: ring` or `ps-sync`, or remove it"))
    if isinstance(job.optimizer, TaskOptimizer) and not cls.updates_whole:
        text = f"under {job.strategy.name!r} no worker updates whole parameters of the whole model"
        hint = "use `strategy: ring`, or name it in the job, if it is one of torch.optim"
        problems.append(Problem(("optimizer", "name"), text, hint))
    return problems


def _batch_problems(job: Job, roles: Roles) -> list[Problem]:
    """
    Return a problem if the global batch has fewer samples than parts.

    All workers of a worker group share one part of a batch.
    """
    replicas, micro = roles.replicas(job.scaling.world), job.gradient_accumulation
    if job.global_batch_size >= replicas * micro:
        return []
    unit = "workers" if roles.group_size == 1 else "copies of the model"
    text = (
        f"{job.global_batch_size} samples cannot be cut into {replicas} {unit} x "
        f"{micro} micro-batches = {replicas * micro} parts"
    )
    return [Problem(("global_batch_size",), text, f"at least {replicas * micro}")]


def _embedding_problems(job: Job, roles: Roles) -> list[Problem]:
    """Return a problem if the strategy's ranks do not all push in each step, as tables require."""
    steps, name = roles.consistency, job.strategy.name
    if job.embeddings is None:
        return []
    if steps.backup_workers:
        text = "cannot be combined with `backup_workers`: tables need every rank's push"
        return [Problem(("embeddings",), text, "remove one of the two")]
    if steps.asynchronous and not job.embeddings.asynchronous:
        text = f"must be true under {name}: its ranks do not run the same steps"
        return [Problem(("embeddings", "asynchronous"), text)]
    return []


def _plateau_problems(job: Job, roles: Roles) -> list[Problem]:
    """
    Return a problem if ranks may evaluate different parameters, with a schedule that depends on the
    result.
    """
    steps, where = roles.consistency, ("lr_schedule",)
    if not isinstance(job.lr_schedule, ReduceLROnPlateau) or not steps.private:
        return []
    if steps.backup_workers:
        text = "ReduceLROnPlateau cannot be combined with `backup_workers`: workers that are not"
        text += " in one step evaluate different parameters"
        return [Problem(where, text, "remove one of the two")]
    text = (
        f"ReduceLROnPlateau is not supported by {job.strategy.name!r}: other workers train during "
        "an evaluation, so no step is the first with the new rate"
    )
    return [Problem(where, text, "use `strategy: ps-sync` or `ring`, or another schedule")]


def complete(job: Job) -> Job:
    """Return the job with strategy options filled in that follow from the rest of the job."""
    try:
        cls = strategies.get(job.strategy.name)
    except SpecError:
        return job  # checking the job reports the unknown name
    return cls.complete(job)


def _problems(job: Job) -> list[Problem]:
    return strategy_problems(complete(job))


def load_job(
    path: str | Path, *, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Job:
    """
    Read and validate a job file, including the strategy's options.

    Args:
        path: the YAML file.
        overrides: `a.b=c`, the same as `--set`.
        environ: environment variables; `DISTPLAT_*` override settings. None: no variables.

    Raises:
        SpecError: All problems, with file, line and column.
    """
    return complete(
        read_job(
            Path(path),
            overrides=overrides,
            environ=environ or {},
            check=_problems,
            check_strategy=_option_problems,
        )
    )


def make_job(data: Mapping[str, object]) -> Job:
    """
    Build a job from a mapping, with the messages of a job file but without line numbers.

    Raises:
        SpecError: All problems.
    """
    return complete(job_of(data, check=_problems, check_strategy=_option_problems))
