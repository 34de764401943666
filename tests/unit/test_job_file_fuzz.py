"""Fuzzed job files: reading returns a job or raises SpecError."""

import random
from pathlib import Path

import pytest
from pydantic import BaseModel

from distplat.platform.errors import SpecError
from distplat.platform.job_file import job_of, read_job
from distplat.platform.lr_schedules import Schedule
from distplat.platform.optimizers import SGD
from distplat.platform.spec import CheckpointConfig, Data, Evaluation, Failure, Job, Scaling

VALID = b"""\
name: digits
task: model:Digits
strategy: {name: ring, timeout_s: 5}
optimizer:
  name: AdamW
  lr: 1e-3
  betas: [0.9, 0.95]
steps: 10
global_batch_size: 64
scaling: {num_workers: 2}
task_args: &x {depth: "3", wide: [1, *y]}
"""
FRAGMENTS = [
    *(bytes([code]) for code in range(256)),
    *b"!! &a *a *x << 1e999 -.inf .nan 0x no ~ null --- ... %YAML ? | > {} []".split(),
    b'"\\ud8',
    b"\xc3",
    b"\n  ",
    b"\n- ",
    b": ",
    b"\r\n",
    b"\xe2\x80\xa8",
    b"9" * 400,
    b"[" * 60,
]


def fuzz(rng: random.Random) -> bytes:
    """Delete, duplicate or overwrite pieces of the file, one to four times."""
    text = VALID.replace(b", *y", b"") if rng.random() < 0.9 else VALID
    for _ in range(rng.randint(1, 4)):
        start = rng.randrange(len(text) + 1)
        end = min(len(text), start + rng.choice([0, 1, 1, 2, 8, 40]))
        target = rng.randrange(len(text) + 1)
        text = rng.choice(
            [
                text[:start] + text[end:],
                text[:target] + text[start:end] + text[target:],
                text[:start] + rng.choice(FRAGMENTS) + text[end:],
            ]
        )
    return text


@pytest.mark.sweep(2)
@pytest.mark.parametrize("seed", range(20))
def test_fuzzed_file_is_read_or_refused(seed: int, tmp_path: Path) -> None:
    rng, path = random.Random(seed), tmp_path / "job.yaml"
    outcomes = {"job": 0, "refusal": 0}
    for _ in range(100):
        path.write_bytes(fuzz(rng))
        try:
            assert isinstance(read_job(path), Job)
            outcomes["job"] += 1
        except SpecError as error:
            assert error.problems
            assert all(problem.file == str(path) for problem in error.problems)
            str(error).encode()
            outcomes["refusal"] += 1
    assert min(outcomes.values()) > 0, "both outcomes occur"


@pytest.mark.parametrize(
    ("section", "model"),
    [
        ("", Job),
        ("optimizer", SGD),
        ("lr_schedule", Schedule),
        ("scaling", Scaling),
        ("data", Data),
        ("evaluation", Evaluation),
        ("checkpoint", CheckpointConfig),
        ("failure", Failure),
    ],
)
def test_transposed_letters_of_a_field_get_a_suggestion(
    section: str, model: type[BaseModel]
) -> None:
    for name in model.model_fields:
        typo = name[:-2] + name[-1] + name[-2]
        inner = {"name": "SGD", typo: 1} if section == "optimizer" else {typo: 1}
        with pytest.raises(SpecError) as caught:
            job_of({section: inner} if section else inner)
        (problem,) = [p for p in caught.value.problems if p.where[-1:] == (typo,)]
        assert problem.hint.startswith(f"did you mean {name!r}?"), typo
