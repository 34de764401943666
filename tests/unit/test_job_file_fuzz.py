"""Damaged job files: whatever becomes of one, the answer is a job or a SpecError."""

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
SPLINTERS = [
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


def damaged(chance: random.Random) -> bytes:
    """Delete, double, move or overwrite pieces of the file, one to four times."""
    text = VALID.replace(b", *y", b"") if chance.random() < 0.9 else VALID
    for _ in range(chance.randint(1, 4)):
        at = chance.randrange(len(text) + 1)
        end = min(len(text), at + chance.choice([0, 1, 1, 2, 8, 40]))
        to = chance.randrange(len(text) + 1)
        text = chance.choice(
            [
                text[:at] + text[end:],
                text[:to] + text[at:end] + text[to:],
                text[:at] + chance.choice(SPLINTERS) + text[end:],
            ]
        )
    return text


@pytest.mark.sweep(2)
@pytest.mark.parametrize("seed", range(20))
def test_a_damaged_file_gives_a_job_or_says_what_is_wrong(seed: int, tmp_path: Path) -> None:
    chance, path = random.Random(seed), tmp_path / "job.yaml"
    outcomes = {"job": 0, "refusal": 0}
    for _ in range(100):
        path.write_bytes(damaged(chance))
        try:
            assert isinstance(read_job(path), Job)
            outcomes["job"] += 1
        except SpecError as error:
            assert error.problems
            assert all(problem.file == str(path) for problem in error.problems)
            str(error).encode()
            outcomes["refusal"] += 1
    assert min(outcomes.values()) > 0, "the damage is too light or too heavy to tell anything"


@pytest.mark.parametrize(
    ("around", "model"),
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
def test_two_swapped_letters_of_any_field_are_seen(around: str, model: type[BaseModel]) -> None:
    for name in model.model_fields:
        typo = name[:-2] + name[-1] + name[-2]
        inner = {"name": "SGD", typo: 1} if around == "optimizer" else {typo: 1}
        with pytest.raises(SpecError) as caught:
            job_of({around: inner} if around else inner)
        (found,) = [p for p in caught.value.problems if p.where[-1:] == (typo,)]
        assert found.hint.startswith(f"did you mean {name!r}?"), typo
