"""`without_job_environment` hides the runtime environment on one node, and restores it."""

import json
import os
from typing import Any

import pytest

from distplat.actors.ray_compat import JOB_CONFIG_VARIABLE as VARIABLE
from distplat.cli.join import without_job_environment

OURS: dict[str, Any] = {
    "working_dir": "gcs://a.zip",
    "py_modules": ["gcs://b.zip"],
    "excludes": [".git"],
    "env_vars": {"_DISTPLAT_JOB": "{}"},
    "_ray_commit": "x",
}


@pytest.mark.parametrize(
    ("more", "hidden"),
    [
        pytest.param({}, True, id="ours-alone"),
        pytest.param({"pip": ["numpy"]}, False, id="packages"),
        pytest.param({"env_vars": {"MINE": "1"}}, False, id="variables-of-the-user"),
        pytest.param({"py_modules": ["gcs://b.zip", "gcs://c.zip"]}, False, id="modules"),
    ],
)
def test_hides_own_runtime_environment(
    more: dict[str, Any], hidden: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = json.dumps({"runtime_env": OURS | more, "metadata": {"name": "j"}})
    monkeypatch.setenv(VARIABLE, config)
    with without_job_environment() as result:
        assert result is hidden
        config_inside = json.loads(os.environ[VARIABLE])
        assert config_inside["metadata"] == {"name": "j"}
        assert (config_inside["runtime_env"] == {}) is hidden
    assert os.environ[VARIABLE] == config


def test_hides_nothing_without_a_job(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(VARIABLE, raising=False)
    with without_job_environment() as result:
        assert result is False
        assert VARIABLE not in os.environ
