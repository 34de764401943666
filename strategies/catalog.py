"""
The strategy registry: the files of this folder, other packages' entry points, a user's own file.

Only a strategy's name and options travel to other processes; each looks the name up for itself.
"""

import importlib
import importlib.util
import logging
import pkgutil
import sys
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from distplat.platform.job_file import job_of, read_job
from distplat.platform.spec_messages import problems_of
from pydantic import ValidationError

import distplat.strategies
from distplat.platform.errors import Problem, SpecError
from distplat.platform.registry import Registry
from distplat.platform.spec import Job
from distplat.strategies.base import Strategy

logger = logging.getLogger(__name__)

ENTRY_POINTS = "distplat.strategies"
"""Entry-point group under which other packages offer modules that register strategies."""
_NOT_STRATEGIES = {"base", "catalog", "fakes", "task"}


def _discover() -> None:
    """Import every module of this folder, then every plug-in; a broken plug-in is only logged."""
    for module in pkgutil.iter_modules(distplat.strategies.__path__):
        if not module.ispkg and module.name not in _NOT_STRATEGIES:
            importlib.import_module(f"distplat.strategies.{module.name}")
    for plugin in entry_points(group=ENTRY_POINTS):
        try:
            plugin.load()
        except Exception:
            logger.exception("strategy plug-in %r (%s) cannot be loaded", plugin.name, plugin.value)


strategies: Registry[type[Strategy[Any]]] = Registry("strategy", _discover)
"""All strategies of this process, by name."""


def load_strategy_file(path: Path) -> None:
    """
    Import a user's own file, which registers strategies as it runs.

    Raises:
        SpecError: there is no such file, it raises, or it registers a name that is taken.
    """
    where = ("--strategy-file",)
    spec = importlib.util.spec_from_file_location(f"_distplat_user_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise SpecError(Problem(where, f"{path} is not a Python file"))
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # pydantic looks annotations up there
    try:
        spec.loader.exec_module(module)
    except SpecError:
        raise
    except Exception as error:
        raise SpecError(Problem(where, f"{path} raised {type(error).__name__}: {error}")) from error


def make_strategy(job: Job) -> Strategy[Any]:
    """
    Build the job's strategy.

    Raises:
        SpecError: unknown name, wrong options, or a job that the strategy cannot do.
    """
    found: list[Problem] = []
    strategy = _build(job, found)
    if strategy is None:
        raise SpecError(*found)
    return strategy


def strategy_problems(job: Job) -> list[Problem]:
    """List what is wrong with the strategy's part of a job; empty: `make_strategy` works."""
    found: list[Problem] = []
    _build(job, found)
    return found


def _build(job: Job, found: list[Problem]) -> Strategy[Any] | None:
    try:
        kind = strategies.get(job.strategy.name)
        options = kind.options_type.model_validate(job.strategy.options)
    except SpecError as error:
        found.extend(error.problems)
        return None
    except ValidationError as error:
        found.extend(problems_of(error, kind.options_type, prefix=("strategy",)))
        return None
    strategy = kind(options)
    found.extend(strategy.problems(job))
    return None if found else strategy


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
    return read_job(Path(path), overrides=overrides, environ=environ or {}, check=strategy_problems)


def make_job(data: Mapping[str, object]) -> Job:
    """
    Build a job from a mapping, with the messages of a job file but without its lines.

    Raises:
        SpecError: everything that is wrong.
    """
    return job_of(data, check=strategy_problems)
