"""Precedence of job file, environment and overrides, and the source named in errors."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from distplat.platform.errors import Problem, SpecError
from distplat.platform.job_file import read_job
from distplat.platform.spec import Job

LINES = """\
name: digits
task: model:Digits
strategy:
  name: ring
  timeout_s: 5
optimizer:
  name: SGD
  lr: 1e-1
  momentum: 0.9
steps: 10
global_batch_size: 64
scaling: {num_workers: 2}
"""
QUOTE = "hint: YAML reads no, off, yes and on as true or false: quote it"


@pytest.fixture(autouse=True)
def _in_empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def read(
    text: str = LINES, overrides: Sequence[str] = (), environ: Mapping[str, str] | None = None
) -> Job:
    Path("job.yaml").write_text(text)
    return read_job(Path("job.yaml"), overrides=overrides, environ=environ or {})


def refusal(*args: Any) -> str:
    with pytest.raises(SpecError) as caught:
        read(*args)
    return str(caught.value)


def test_all_problems_are_reported_in_file_order() -> None:
    text = LINES.replace("ring", "yes").replace("0.9", "x").replace("2}", "-1}")
    message = refusal(text, ["steps=no", "nonsense"], {"DISTPLAT_SEDE": "4"})
    locations = [
        line.split(": ")[0] for line in message.splitlines() if not line.startswith("  hint")
    ]
    assert sorted(locations[:3]) == ["--set", "--set steps", "DISTPLAT_SEDE"]
    assert locations[3:] == ["job.yaml:4:3", "job.yaml:9:3", "job.yaml:12:11"]


def test_precedence_of_overrides_environment_file_and_defaults() -> None:
    environ = {"DISTPLAT_STEPS": "20", "DISTPLAT_SEED": "1e1", "DISTPLAT_OPTIMIZER__LR": "0.5"}
    job = read(overrides=["steps=30", "data.shuffle=off"], environ=environ)
    assert (job.steps, job.seed, job.optimizer.lr) == (30, 10, 0.5)
    assert (job.data.shuffle, job.global_batch_size, job.gradient_accumulation) == (False, 64, 1)


def test_unrelated_environment_variables_are_ignored() -> None:
    assert read(environ={"HOME": "/", "DISTPLATE": "1", "_DISTPLAT_JOB": "{}"}) == read()


@pytest.mark.parametrize(
    ("overrides", "environ", "message"),
    [
        ([], {"DISTPLAT_SCALING__NUM_WORKERS": "x"},
         "DISTPLAT_SCALING__NUM_WORKERS: scaling.num_workers: must be a whole number (got 'x')"),
        ([], {"DISTPLAT_CHEKPOINT__SAVE_FINAL": "no"},
         "DISTPLAT_CHEKPOINT__SAVE_FINAL: chekpoint: unknown field (value {'save_final': False})\n"
         "  hint: did you mean 'checkpoint'?"),
        ([], {"DISTPLAT_NAME": "no"}, f"DISTPLAT_NAME: name: must be text (got false)\n  {QUOTE}"),
        ([], {"DISTPLAT_SEED": "[1"}, "DISTPLAT_SEED:1:3: expected ',' or ']'"),
        ([], {"DISTPLAT_NAME__X": "1"},
         "DISTPLAT_NAME__X: name.x: cannot be set: name is 'digits', not a mapping"),
        (["optimizer.lr=-1"], {}, "--set optimizer.lr: optimizer.lr: must be > 0 (got -1)"),
        (["optimizer={name: SGD, lr: 0}"], {},
         "--set optimizer: optimizer.lr: must be > 0 (got 0)"),
        (["steps"], {}, "--set: must be field=value or field.subfield=value (got 'steps')"),
        ([".a=1"], {}, "--set: must be field=value or field.subfield=value (got '.a=1')"),
        (["a: b"], {}, "--set: must be field=value or field.subfield=value (got 'a: b')"),
        (["task_args." + "a." * 60 + "b=1"], {}, "nested deeper than 50"),
        (["name=!!str x"], {}, "--set name:1:1: tags (words that begin with '!')"),
    ],
)  # fmt: skip
def test_problems_outside_the_file_name_their_source(
    overrides: list[str], environ: dict[str, str], message: str
) -> None:
    assert message in refusal(LINES, overrides, environ)


@pytest.mark.parametrize(
    ("overrides", "name", "options"),
    [
        (["strategy=tree"], "tree", {}),
        (["strategy.name=tree"], "tree", {}),
        (["strategy=ring"], "ring", {"timeout_s": 5}),
        (["strategy.timeout_s=9"], "ring", {"timeout_s": 9}),
        (["strategy.depth=2", "strategy=tree"], "tree", {"depth": 2}),
        (["strategy={name: tree, depth: 3}"], "tree", {"depth": 3}),
    ],
)
def test_new_strategy_drops_the_options_of_the_old(
    overrides: list[str], name: str, options: dict[str, object]
) -> None:
    strategy = read(overrides=overrides).strategy
    assert (strategy.name, strategy.options) == (name, options)


def test_override_adds_options_to_a_strategy_name() -> None:
    plain = LINES.replace("strategy:\n  name: ring\n  timeout_s: 5\n", "strategy: ring\n")
    assert read(plain, ["strategy.timeout_s=9"]).strategy.options == {"timeout_s": 9}
    assert read(plain, environ={"DISTPLAT_STRATEGY": "tree"}).strategy.name == "tree"


def test_problems_of_check_get_their_location() -> None:
    def check(job: Job) -> list[Problem]:
        return [
            Problem(("strategy", "timeout_s"), "too short"),
            Problem(("strategy", "absent"), "is needed"),
            Problem((), "all is wrong"),
            Problem(("steps",), "too few"),
        ]

    Path("job.yaml").write_text(LINES)
    with pytest.raises(SpecError) as caught:
        read_job(Path("job.yaml"), overrides=["steps=1"], check=check)
    assert str(caught.value).splitlines() == [
        "job.yaml: all is wrong",
        "--set steps: steps: too few",
        "job.yaml:3:1: strategy.absent: is needed",
        "job.yaml:5:3: strategy.timeout_s: too short",
    ]
    with pytest.raises(SpecError, match=r"\A--set strategy: strategy\.timeout_s"):
        read_job(Path("job.yaml"), overrides=["strategy=x"], check=lambda job: check(job)[:1])
