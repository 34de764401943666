"""Rendering of a job as YAML: complete, and equal when read back."""

from typing import get_args

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from distplat.platform.errors import SpecError
from distplat.platform.job_file import job_of, read_job, render_job
from distplat.platform.optimizers import AnyOptimizer
from distplat.platform.spec import Job

JOB = job_of(
    {
        "name": "digits",
        "task": "model:Digits",
        "strategy": {"name": "ring", "timeout_s": 5},
        "optimizer": {"name": "SGD", "lr": 0.1},
        "steps": 10,
        "global_batch_size": 64,
    }
)


def test_rendered_job_has_defaults_in_field_order() -> None:
    text = render_job(JOB)
    assert text.startswith(
        "name: digits\ntask: model:Digits\ntask_args: {}\nstrategy:\n  name: ring\n"
    )
    assert "  timeout_s: 5\n" in text
    assert "  step_timeout_s: 120.0\n" in text
    keys = [line.split(":")[0] for line in text.splitlines() if not line.startswith(" ")]
    assert keys == [name for name in Job.model_fields if name != "own_loop"]


@pytest.mark.parametrize(
    ("argument", "rendered"),
    [({1}, "{1}"), (b"x", "b'x'"), ({1: 2}, "{1: 2}"), (1j, "1j")],
)
def test_unserializable_argument_is_refused(argument: object, rendered: str) -> None:
    job = JOB.model_copy(update={"task_args": {"a": [argument]}})
    with pytest.raises(SpecError) as caught:
        render_job(job)
    assert str(caught.value) == f"task_args.a.0: cannot be written as YAML (got {rendered})"


def test_recursive_argument_is_refused() -> None:
    loop: list[object] = []
    loop.append(loop)
    with pytest.raises(SpecError, match=r"task_args\.a: nested deeper"):
        render_job(JOB.model_copy(update={"task_args": {"a": loop}}))


NAMES = [cls.__name__ for cls in get_args(get_args(AnyOptimizer)[0])]
_TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | _TEXT
    | st.sampled_from(["1e-3", "010", "no", "~", "<<", "- a", "a: b", "2026-01-01", "\u2028"])
)  # fmt: skip
_TREE = st.recursive(
    _LEAF, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(_TEXT, inner, max_size=3)
)
_OPTION = st.text("abc_", min_size=1, max_size=5)
_JOB = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"\A[a-z0-9](?:[a-z0-9-]{0,9}[a-z0-9])?\Z"),
        "strategy": st.dictionaries(_OPTION, _TREE, max_size=2).map(lambda d: {"name": "x", **d}),
        "task_args": st.dictionaries(_TEXT, _TREE, max_size=3),
        "optimizer": st.fixed_dictionaries(
            {"name": st.sampled_from(NAMES), "lr": st.floats(1e-300, 1e300)}
        ),
        "lr_schedule": st.sampled_from(
            [{}, {"name": "step", "every_steps": 3}, {"name": "cosine", "final_factor": 0.1}]
        ),
        "evaluation": st.sampled_from([{}, {"every_epochs": 0}, {"every_steps": 3}]),
        "checkpoint": st.sampled_from(
            [{}, {"every_steps": 2, "num_to_keep": 5}, {"every_epochs": 1}, {"save_final": False}]
        ),
        "steps": st.integers(1, 2**40),
        "global_batch_size": st.integers(1, 2**30),
        "storage_path": st.from_regex(r"\A[^\x00-\x1f\x7f]{1,9}\Z").filter(str.isprintable),
    }
)


@settings(max_examples=100, deadline=None)
@given(_JOB)
def test_rendered_job_reads_back_equal(
    tmp_path_factory: pytest.TempPathFactory, data: dict[str, object]
) -> None:
    job = job_of(data)
    path = tmp_path_factory.getbasetemp() / "job.yaml"
    path.write_text(render_job(job))
    assert read_job(path) == job
