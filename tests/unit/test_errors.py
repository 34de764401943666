"""The error classes: the documented tree, pickling, exit codes and messages."""

import inspect
import pickle
import re
from types import SimpleNamespace
from typing import Any

import pytest
import ray

from distplat.actors.launch import failures_of_ray
from distplat.platform import errors
from distplat.platform.errors import DistplatError, Problem, SpecError

TREE = [
    cls for _, cls in inspect.getmembers(errors, inspect.isclass) if issubclass(cls, DistplatError)
]
PROBLEM = Problem(("optimizer", "lr"), "must be > 0", "try 0.1", "job.yaml", 7, 13)
ARGUMENTS: dict[str, tuple[object, ...]] = {
    "SpecError": (PROBLEM, "and more"),
    "UserCodeError": (3, 17, "ValueError: x", "Traceback:\n  x\n", "try y", True, "ranks 1, 2"),
    "ActorLost": ("worker 1", 12, "process died", "resubmit"),
    "NonFiniteError": (1, 6, "the loss is NaN or infinite", True),
    "DeadlineExceeded": ("pull", ("server 0", "server 2"), 30.0, "failure.step_timeout_s", "x"),
    "CollectiveError": ("world", "all_reduce", 12, (1, 3), "timed out"),
    "MismatchError": ("world", "all_reduce", 12, (1,), "rank 1 is in broadcast"),
    "StateLost": ("stage 1",),
    "RestartsExhausted": ("spent", ("attempt 0: lost", "attempt 1: lost again")),
    "Interrupted": (15,),
}


def example(cls: type[DistplatError]) -> DistplatError:
    return cls(*ARGUMENTS.get(cls.__name__, ("some message",)))


@pytest.mark.parametrize("cls", TREE)
def test_pickle_round_trip(cls: type[DistplatError]) -> None:
    error = example(cls)
    unpickled = pickle.loads(pickle.dumps(error))  # noqa: S301 - our own bytes
    assert type(unpickled) is cls
    assert str(unpickled) == str(error)
    assert vars(unpickled) == vars(error)
    assert unpickled.exit_code == error.exit_code


@pytest.mark.parametrize("cls", TREE)
def test_own_constructors_keep_all_arguments(cls: type[DistplatError]) -> None:
    assert example(cls).args == ARGUMENTS.get(cls.__name__, ("some message",))
    has_own_constructor = cls.__init__ is not DistplatError.__init__
    assert has_own_constructor == (cls.__name__ in ARGUMENTS), (
        "a constructor that is missing in ARGUMENTS"
    )


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("DistplatError", 70),
        ("SpecError", 2),
        ("ClusterUnreachable", 3),
        ("UserCodeError", 1),
        ("ScriptFailed", 1),
        ("InfrastructureError", 4),
        ("ActorLost", 4),
        ("DeadlineExceeded", 4),
        ("CollectiveError", 4),
        ("ProtocolError", 4),
        ("GapError", 4),
        ("StaleError", 4),
        ("FencedError", 4),
        ("NotReadyError", 4),
        ("StorageError", 5),
        ("Interrupted", 143),
    ],
)
def test_exit_codes(name: str, code: int) -> None:
    assert example(getattr(errors, name)).exit_code == code


@pytest.mark.parametrize("cls", TREE)
def test_ipython_shows_the_message_without_frames(cls: type[DistplatError]) -> None:
    """IPython calls a method of this name."""
    assert example(cls)._render_traceback_() == [f"{cls.__name__}: {example(cls)}"]


def test_interrupt_has_the_exit_code_of_the_shell() -> None:
    assert errors.Interrupted(2).exit_code == 130


def test_documented_tree_is_complete() -> None:
    documented: dict[str, str] = {}
    above: dict[int, str] = {}
    for line in (errors.__doc__ or "").splitlines():
        match = re.match(r"    ([ |`-]*)([A-Z]\w+)  ", line)
        if match:
            depth, name = len(match[1]), match[2]
            above[depth] = name
            documented[name] = max(
                (d, n) for d, n in [(-1, "Exception"), *above.items()] if d < depth
            )[1]
            for deeper in [d for d in above if d > depth]:
                del above[deeper]
    assert documented == {cls.__name__: cls.__bases__[0].__name__ for cls in TREE}


@pytest.mark.parametrize(
    ("problem", "text"),
    [
        (PROBLEM, "job.yaml:7:13: optimizer.lr: must be > 0\n  hint: try 0.1"),
        (Problem((), "is empty", file="job.yaml"), "job.yaml: is empty"),
        (Problem(("a", 0, "b"), "no"), "a.0.b: no"),
        (Problem((), "no"), "no"),
        (Problem(("\x1b[2J\n",), "no"), "\\x1b[2J\\n: no"),
        (Problem(("k" * 80,), "no"), "k" * 57 + "...: no"),
    ],
)
def test_problem_as_text(problem: Problem, text: str) -> None:
    assert str(problem) == text


def test_spec_error_lists_all_problems() -> None:
    error = SpecError(PROBLEM, "and more")
    assert error.problems == (PROBLEM, Problem((), "and more"))
    assert str(error) == f"{PROBLEM}\nand more"


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (
            errors.UserCodeError(3, None, "ValueError: x", "Traceback\n"),
            "Traceback\n\nyour task failed on rank 3, before the first step: ValueError: x",
        ),
        (
            errors.UserCodeError(0, 4, "ValueError: x", "ValueError: x\n", "try y", True),
            "your task failed on rank 0, in the evaluation after step 4: ValueError: x\n"
            "  hint: try y",
        ),
        (
            errors.ActorLost("worker 1", 12, "it died", "resubmit"),
            "worker 1 was lost after step 12: it died; resubmit",
        ),
        (
            errors.NonFiniteError(1, 6, "the loss is NaN or infinite"),
            "step 7, rank 1: the loss is NaN or infinite; the step was not applied (lower the "
            "learning rate or set `clip_norm`; `failure.non_finite: skip` leaves such steps out, "
            "`ignore` applies them)",
        ),
        (
            errors.DeadlineExceeded("pull", ("server 0",), 30.0, "failure.step_timeout_s"),
            "pull: waited 30 s, missing: server 0; `failure.step_timeout_s` changes this deadline",
        ),
        (
            errors.DeadlineExceeded("start", ("controller",), 30.0, "", "mend it"),
            "start: waited 30 s, missing: controller; mend it",
        ),
        (
            errors.CollectiveError("world", "all_reduce", 12, (1, 3), "timed out"),
            "all_reduce #12 of group 'world' failed; missing ranks: 1, 3; timed out",
        ),
        (errors.Interrupted(2), "interrupted by SIGINT"),
        (errors.Interrupted(9), "interrupted by 9"),
    ],
)
def test_errors_as_text(error: DistplatError, text: str) -> None:
    assert str(error) == text


@pytest.mark.parametrize(
    ("operation", "environment", "field"),
    [
        ("start", {"py_executable": "/nowhere"}, "py_executable"),
        ("starting processes", {"env_vars": {"A": "1"}, "image_uri": "them/it"}, "image_uri"),
        ("start", {"env_vars": {"A": "1"}}, ""),
        ("a step", {"py_executable": "/nowhere"}, ""),
    ],
)
def test_start_deadline_names_the_field_of_the_runtime_env(
    operation: str, environment: dict[str, Any], field: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    context = SimpleNamespace(runtime_env=environment)
    monkeypatch.setattr(ray, "get_runtime_context", lambda: context)
    deadline = errors.DeadlineExceeded(operation, ("worker-0",), 30.0, "failure.start_timeout_s")
    with pytest.raises(errors.DeadlineExceeded) as caught, failures_of_ray():
        raise deadline
    note = str(caught.value).removeprefix(str(deadline))
    assert note.startswith(f"; Ray starts processes with `{field}` of the") if field else not note


def test_cancelled_actor_creation_is_an_infrastructure_error() -> None:
    with pytest.raises(errors.InfrastructureError, match="cancelled") as caught, failures_of_ray():
        raise ray.exceptions.RaySystemError("Actor creation cancelled.")
    assert caught.value.exit_code == 4
