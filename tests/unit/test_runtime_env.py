"""Validation and merging of the user's runtime environment."""

import json
import os
from pathlib import Path
from typing import Any

import pytest

from distplat.cli import join
from distplat.cli.address import Target
from distplat.cli.main import run
from distplat.cli.shipping import read_runtime_env, with_folders
from distplat.cli.submit import connection
from distplat.platform.errors import SpecError


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"excludes": "*.ckpt"}, "excludes: must be a list of texts (got '*.ckpt')"),
        ({"excludes": None}, "excludes: must be a list of texts (got null)"),
        ({"excludes": ["a", 1]}, "excludes.1: must be a text (got 1)"),
        ({"py_modules": "./lib"}, "py_modules: must be a list of texts (got './lib')"),
        ({"py_modules": {"a": 1}}, "py_modules: must be a list of texts"),
        ({"env_vars": None}, "env_vars: must be a mapping of text to text (got null)"),
        ({"env_vars": ["A=1"]}, "env_vars: must be a mapping of text to text"),
        ({"env_vars": {"A": 1}}, "env_vars.A: must be a text (got 1)"),
        ({"env_vars": {"": "x"}}, "env_vars: '' is no name of a variable"),
        ({"env_vars": {"A=B": "x"}}, "env_vars: 'A=B' is no name of a variable"),
        ({"env_vars": {"A": "x\0y"}}, "env_vars.A: may hold no NUL character"),
        ({"py_executable": 3}, "py_executable: must be a text (got 3)"),
    ],
)
def test_rejects_keys_of_wrong_type(environment: dict[str, Any], problem: str) -> None:
    with pytest.raises(SpecError) as raised:
        read_runtime_env(None, json.dumps(environment))
    assert str(raised.value).startswith(f"--runtime-env-json.{problem}")


@pytest.mark.parametrize(
    ("environment", "problem"),
    [
        ({"pip": 5}, "--runtime-env: runtime_env['pip'] must be of type"),
        ({"config": 7}, "--runtime-env: runtime_env['config'] must be of type"),
        ({"pip": ["a"], "conda": "b"}, "--runtime-env: The 'pip' field, 'uv' field, and 'conda'"),
        ({"pip": "a" * 300}, "--runtime-env: "),  # too long for a file name
        ({"env_var": {}}, "--runtime-env.env_var: unknown key\n  hint: did you mean 'env_vars'?"),
    ],
)
def test_rejects_invalid_environment_before_connecting(
    environment: dict[str, Any], problem: str, tmp_path: Path
) -> None:
    """A driver on the cluster would report the first two cases as its own errors."""
    text = json.dumps(environment)
    for kind in ("driver", "here"):
        target = Target(kind, "127.0.0.1:1", "--address")
        with pytest.raises(SpecError) as raised:
            connection(target, tmp_path, None, text, lambda package: None)
        assert str(raised.value).startswith(problem)


def test_accepts_keys_of_plugins() -> None:
    join.check_environment({"my_plugin": {"a": 1}, "pip": ["numpy"], "env_vars": {"A": "1"}})


def test_reports_all_wrong_keys_with_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "env.yaml"
    file.write_text("pip: [numpy]\nexcludes: '*.ckpt'\nenv_vars:\n  A: 1\n")
    with pytest.raises(SpecError) as raised:
        read_runtime_env(file, None)
    assert str(raised.value) == (
        f"{file}:2:1: excludes: must be a list of texts (got '*.ckpt')\n"
        f"{file}:4:3: env_vars.A: must be a text (got 1)\n  hint: quote it"
    )


def test_valid_environment_is_merged() -> None:
    text = json.dumps({"excludes": ["*.ckpt"], "py_modules": ["m"], "env_vars": {"A": "1"}})
    environment = with_folders(Path("/job"), read_runtime_env(None, text))
    assert environment["excludes"][-1] == "*.ckpt"
    assert environment["py_modules"][1:] == ["m"]
    assert environment["env_vars"] == {"A": "1"}


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000])
def test_rejects_deeply_nested_json(text: str) -> None:
    with pytest.raises(SpecError, match="--runtime-env-json: cannot be read"):
        read_runtime_env(None, text)


def test_rejects_alias_bomb_and_pipe(tmp_path: Path) -> None:
    bomb = tmp_path / "bomb.yaml"
    lines = ["a: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"b{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 9)]
    bomb.write_text("\n".join(lines))
    with pytest.raises(SpecError, match="more than 10000 values"):
        read_runtime_env(bomb, None)
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SpecError, match="is not a regular file"):
        read_runtime_env(tmp_path / "pipe", None)


def test_invalid_runtime_environment_exits_with_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    job = tmp_path / "job.yaml"
    job.write_text(
        "name: lin\ntask: lin:Lin\nstrategy: {name: ring}\noptimizer: {name: SGD, lr: 0.1}\n"
        "steps: 1\nglobal_batch_size: 4\n"
    )
    options = ["--runtime-env-json", '{"excludes": "*"}', "--address", "http://127.0.0.1:1"]
    assert run(["submit", str(job), *options]) == 2
    assert "--runtime-env-json.excludes: must be a list of texts" in capsys.readouterr().err
    options[1] = '{"pip": 5}'
    assert run(["submit", str(job), *options]) == 2
    assert "--runtime-env: runtime_env['pip'] must be" in capsys.readouterr().err
