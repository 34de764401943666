"""
Rows B1 and B2: damaged job files and checkpoints. Exit codes are those documented, never 70.

In the calling process: job files go through `submit --dry-run`. A run with `num_workers: 0`
goes on from the checkpoints; if it succeeds, its model is that of the run that was not stopped.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from chaos_trial import hash_of, quietly

JOBS, CHECKPOINTS = 200, 12
"""Mutants of a trial."""
NASTY = [
    "-1", "0", "1e999", ".nan", "null", "~", "[]", "{}", "''", "'..'", "'/'", "\"\\0\"", "'\u202e'",
    "*a", "&a [*a]", "!!python/object/apply:os.system ['true']", "9" * 40, "true", "no", "- x",
    "? y", "'a:b'", "0x10", "1_000", "2026-01-01", "{a: {b: {c: 1}}}", "[1, [2, [3]]]",
    "\"\\ud800\"", "%", "@", "\t", "x" * 5000,
]  # fmt: skip
JOB: dict[str, Any] = {
    "name": "mutant",
    "task": "chaos_task:Watched",
    "task_args": {"pause": 0.0},
    "strategy": {"name": "ring", "timeout_s": 5.0},
    "scaling": {"num_workers": 2, "resources_per_worker": {"CPU": 0.5}},
    "optimizer": {"name": "AdamW", "lr": 0.01, "groups": [{"match": "*.bias", "weight_decay": 0}]},
    "lr_schedule": {"name": "cosine", "warmup_steps": 2},
    "steps": 8,
    "global_batch_size": 12,
    "evaluation": {"every_steps": 4},
    "checkpoint": {"every_steps": 2, "num_to_keep": 3},
    "failure": {"max_failures": 2},
}


def jobs(seed: int, folder: Path) -> list[str]:
    """Read mutants of a job file; give what is wrong."""
    draw = random.Random(seed)
    text = yaml.safe_dump(JOB, sort_keys=False)
    problems = []
    for number in range(JOBS):
        path = folder / "job.yaml"
        path.write_bytes(mutant(text, draw))
        code, said = quietly(["submit", str(path), "--dry-run"])
        if code not in (0, 2) or (code == 2 and "error:" not in said):
            kept = folder / f"job-{number}.yaml"
            path.rename(kept)
            problems.append(f"exit code {code} for {kept}: {said[-300:]}")
    return problems


def mutant(text: str, draw: random.Random) -> bytes:
    """Change a text in one to three places: a value, a line, a byte."""
    for _ in range(draw.randint(1, 3)):
        lines = text.splitlines()
        at = draw.randrange(len(lines)) if lines else 0
        match draw.randrange(6) if lines else 0:
            case 0:
                lines.insert(at, draw.choice(NASTY))
            case 1:
                lines.pop(at)
            case 2:
                lines.insert(at, draw.choice(lines))
            case 3:
                lines[at] = lines[at].partition(":")[0] + ": " + draw.choice(NASTY)
            case 4:
                lines[at] = " " * draw.randrange(5) + lines[at].strip()
            case _:
                return damaged((text + "\n").encode("utf-8", "surrogatepass"), draw)
        text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "surrogatepass")


def damaged(content: bytes, draw: random.Random) -> bytes:
    """Change, take out or add some bytes, or cut the end off."""
    at = draw.randrange(len(content)) if content else 0
    count = draw.choice((1, 1, 2, 17))
    match draw.randrange(4):
        case 0:
            return content[:at] + draw.randbytes(count) + content[at + count :]
        case 1:
            return content[:at] + content[at + count :]
        case 2:
            return content[:at] + draw.randbytes(count) + content[at:]
        case _:
            return content[:at]


def checkpoints(seed: int, folder: Path) -> list[str]:
    """Go on from checkpoints of which files are damaged; give what is wrong."""
    draw = random.Random(seed)
    whole, expected = _trained(folder)
    problems = []
    for number in range(CHECKPOINTS):
        copy = folder / f"copy-{number}"
        shutil.copytree(whole, copy)
        hit = _spoil(copy, draw)
        runs = folder / f"resumed-{number}"
        code, said = _train(folder, runs, "--resume", str(copy))
        where = f"{hit} in {copy}"
        if code not in (0, 2, 5):
            problems.append(f"exit code {code} for {where}: {said[-300:]}")
        elif code == 0 and hash_of(next(runs.glob("*/model.safetensors"))) != expected:
            problems.append(f"another model from {where}")
        else:
            shutil.rmtree(copy)
    return problems


def _trained(folder: Path) -> tuple[Path, str]:
    """Train in this process; give the run directory without its last checkpoint, and the hash."""
    (folder / "job.yaml").write_text(yaml.safe_dump({**JOB, "scaling": {"num_workers": 0}}))
    code, said = _train(folder, folder / "whole")
    assert code == 0, said
    run = next((folder / "whole").iterdir())
    expected = hash_of(run / "model.safetensors")
    shutil.rmtree(max(run.glob("checkpoints/step-*")))
    return run, expected


def _train(folder: Path, runs: Path, *more: str) -> tuple[int, str]:
    here = ["--working-dir", str(Path(__file__).parent), "--set", f"storage_path={runs}"]
    return quietly(["submit", str(folder / "job.yaml"), *here, *more])


def _spoil(run: Path, draw: random.Random) -> str:
    """Damage files of one checkpoint or of both; JSON also where its syntax stays."""
    found = [*sorted(run.glob("checkpoints/step-*/*")), run / "job.yaml", run / "metrics.jsonl"]
    hit = draw.sample(found, draw.choice((1, 1, 2, 4)))
    for path in hit:
        if path.suffix == ".json" and draw.random() < 0.7:
            path.write_text(json.dumps(_turned(json.loads(path.read_text()), draw)))
        elif draw.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(damaged(path.read_bytes(), draw))
    return ", ".join(str(path.relative_to(run)) for path in hit)


def _turned(value: Any, draw: random.Random) -> Any:
    """Put something else in the place of one part of a JSON value."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        return {**value, key: _turned(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _turned(value[at], draw), *value[at + 1 :]]
    return draw.choice(
        [None, -1, 2**70, 1e308, "", "..", "/etc/passwd", [], {}, True, "step", [[]]]
    )
