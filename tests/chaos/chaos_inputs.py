"""
Rows B1 and B2: damaged job files and checkpoints. Exit codes are those documented, never 70.

All commands run in this process. Job files are checked by `submit --dry-run`. Checkpoints are
resumed with `num_workers: 0`; if the resumed run succeeds, its model must match the original run.
"""

import json
import random
import shutil
from pathlib import Path
from typing import Any

import yaml
from chaos_trial import hash_of, run_quietly

JOBS, CHECKPOINTS = 200, 12
"""Mutants per trial."""
NASTY_VALUES = [
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
    """Submit mutants of a job file; return the problems."""
    draw = random.Random(seed)
    text = yaml.safe_dump(JOB, sort_keys=False)
    problems, refused = [], 0
    for number in range(JOBS):
        path = folder / "job.yaml"
        path.write_bytes(mutant(text, draw))
        code, errors = run_quietly(["submit", str(path), "--dry-run"])
        refused += code == 2
        if code not in (0, 2) or (code == 2 and "error:" not in errors):
            failed = folder / f"job-{number}.yaml"
            path.rename(failed)
            problems.append(f"exit code {code} for {failed}: {errors[-300:]}")
    return problems if refused else [*problems, "no mutant was refused"]


def mutant(text: str, draw: random.Random) -> bytes:
    """Change one to three values, lines or bytes of a text."""
    for _ in range(draw.randint(1, 3)):
        lines = text.splitlines()
        index = draw.randrange(len(lines)) if lines else 0
        match draw.randrange(6) if lines else 0:
            case 0:
                lines.insert(index, draw.choice(NASTY_VALUES))
            case 1:
                lines.pop(index)
            case 2:
                lines.insert(index, draw.choice(lines))
            case 3:
                lines[index] = lines[index].partition(":")[0] + ": " + draw.choice(NASTY_VALUES)
            case 4:
                lines[index] = " " * draw.randrange(5) + lines[index].strip()
            case _:
                return damage_bytes((text + "\n").encode("utf-8", "surrogatepass"), draw)
        text = "\n".join(lines) + "\n"
    return text.encode("utf-8", "surrogatepass")


def damage_bytes(content: bytes, draw: random.Random) -> bytes:
    """Change, remove or insert some bytes, or truncate the content."""
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
    """Resume from damaged checkpoints; return the problems."""
    draw = random.Random(seed)
    original, expected = _train_original(folder)
    problems = []
    for number in range(CHECKPOINTS):
        copy = folder / f"copy-{number}"
        shutil.copytree(original, copy)
        damaged_files = _damage_files(copy, draw)
        runs = folder / f"resumed-{number}"
        code, errors = _train(folder, runs, "--resume", str(copy))
        damage = f"{damaged_files} in {copy}"
        if code not in (0, 2, 5):
            problems.append(f"exit code {code} for {damage}: {errors[-300:]}")
        elif code == 0 and _first_step(runs) == 1:
            problems.append(f"trained from the first step after {damage}")
        elif code == 0 and hash_of(next(runs.glob("*/model.safetensors"))) != expected:
            problems.append(f"another model after {damage}")
        else:
            shutil.rmtree(copy)
    return problems


def _train_original(folder: Path) -> tuple[Path, str]:
    """Train; return the run directory without its last checkpoint, and the model's hash."""
    (folder / "job.yaml").write_text(yaml.safe_dump({**JOB, "scaling": {"num_workers": 0}}))
    code, errors = _train(folder, folder / "whole")
    assert code == 0, errors
    run = next((folder / "whole").iterdir())
    expected = hash_of(run / "model.safetensors")
    shutil.rmtree(max(run.glob("checkpoints/step-*")))
    return run, expected


def _train(folder: Path, runs: Path, *more: str) -> tuple[int, str]:
    here = ["--working-dir", str(Path(__file__).parent), "--set", f"storage_path={runs}"]
    return run_quietly(["submit", str(folder / "job.yaml"), *here, *more])


def _first_step(runs: Path) -> int:
    """Return the first step of the only run."""
    (path,) = runs.glob("*/metrics.jsonl")
    records = map(json.loads, path.read_text().splitlines())
    return int(next(record["step"] for record in records if record["kind"] == "step"))


def _damage_files(run: Path, draw: random.Random) -> str:
    """Damage files of the run; JSON files often remain valid JSON."""
    found = [*sorted(run.glob("checkpoints/step-*/*")), run / "job.yaml", run / "metrics.jsonl"]
    damaged_files = draw.sample(found, draw.choice((1, 1, 2, 4)))
    for path in damaged_files:
        if path.suffix == ".json" and draw.random() < 0.7:
            path.write_text(json.dumps(_replace_part(json.loads(path.read_text()), draw)))
        elif draw.random() < 0.1:
            path.unlink()
        else:
            path.write_bytes(damage_bytes(path.read_bytes(), draw))
    return ", ".join(str(path.relative_to(run)) for path in damaged_files)


def _replace_part(value: Any, draw: random.Random) -> Any:
    """Replace one part of a JSON value."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(sorted(value))
        return {**value, key: _replace_part(value[key], draw)}
    if isinstance(value, list) and value and draw.random() < 0.8:
        at = draw.randrange(len(value))
        return [*value[:at], _replace_part(value[at], draw), *value[at + 1 :]]
    return draw.choice(
        [None, -1, 2**70, 1e308, "", "..", "/etc/passwd", [], {}, True, "step", [[]]]
    )
