"""Versions of Ray and Python are checked before the upload."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest
import ray
from fake_job_api import JOB, FakeJobApi, fake_job_api
from ray._private.utils import check_version_info

from distplat.cli.cluster import OURS
from distplat.cli.join import connected
from distplat.cli.main import run
from distplat.cli.on_cluster import OLDEST
from distplat.cli.versions import (
    OLDEST_PYTHON,
    OLDEST_RAY,
    Versions,
    check_cluster,
    driver_mismatch,
)
from distplat.platform.errors import ClusterUnreachable

ROOT = Path(__file__).parents[2]
LOCAL_VERSIONS = Versions("2.60.0", "3.11.9")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobApi]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    Path("job.yaml").write_text(JOB)
    Path("lin.py").write_text("class Lin: ...\n")
    with fake_job_api() as fake:
        yield fake


def test_oldest_versions_match_pyproject() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (requirement,) = (item for item in project["dependencies"] if item.startswith("ray["))
    assert requirement == f"ray[default]>={OLDEST_RAY[0]}.{OLDEST_RAY[1]}"
    assert OLDEST_PYTHON == OLDEST


@pytest.mark.parametrize(
    ("ray_version", "python"),
    [("2.58.0", "3.11.9"), ("1.13.0", ""), ("2.60.0", "3.10.14"), ("2.60.0", "2.7")],
)
def test_cluster_that_is_too_old_is_rejected(ray_version: str, python: str) -> None:
    cluster_versions = Versions(ray_version, python)
    with pytest.raises(ClusterUnreachable) as raised:
        check_cluster("http://h:8265", cluster_versions, LOCAL_VERSIONS, ())
    assert str(raised.value) == (
        f"the cluster at http://h:8265 has {cluster_versions}, and distplat needs Ray 2.59 and "
        "Python 3.11 there, or later; this machine has Ray 2.60.0 on Python 3.11.9: start the "
        "cluster with that"
    )
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("cluster_versions", "isolation", "has_warning"),
    [
        (LOCAL_VERSIONS, [], False),
        (Versions("2.60.0", "3.11.2"), [], False),
        (Versions("2.60.0", ""), [], False),
        (Versions("2.60.0", "3.12.1"), [], True),
        (Versions("2.59.1", "3.11.9"), [], True),
        (Versions("2.61.0rc1", ""), [], True),
        (Versions("3.0.0.dev0", "3.14.0"), ["pip"], True),
        (Versions("2.60.0", "3.10.1"), ["conda"], False),
    ],
)
def test_cluster_with_another_version_has_a_warning(
    cluster_versions: Versions, isolation: list[str], has_warning: bool
) -> None:
    line = check_cluster("http://h:8265", cluster_versions, LOCAL_VERSIONS, isolation)
    assert bool(line) == has_warning
    assert not has_warning or (str(cluster_versions) in line and str(LOCAL_VERSIONS) in line)


def test_old_cluster_is_rejected_before_the_upload(
    api: FakeJobApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.ray_version = "2.40.0"
    assert run(["submit", "job.yaml", "--address", api.url]) == 3
    stderr = capsys.readouterr().err
    assert stderr.startswith(
        f"error: the cluster at {api.url} has Ray 2.40.0 on Python 3.11.0, and"
    )
    assert f"this machine has {OURS}" in stderr
    assert "shipping" not in stderr
    assert (api.packages, api.jobs) == ([], [])


def test_job_is_submitted_with_a_warning_about_another_ray(
    api: FakeJobApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.ray_version, api.python_version = "99.1.0", None
    assert run(["submit", "job.yaml", "--address", api.url]) == 0
    stderr = capsys.readouterr().err
    assert f"the cluster has Ray 99.1.0, this machine {OURS}" in stderr
    assert stderr.index("99.1.0") < stderr.index("shipping 2 files")
    assert len(api.packages) == 2
    assert len(api.jobs) == 1


@pytest.mark.parametrize(
    ("python", "remedy"),
    [
        ("3.99.1", "install ray==2.1.0 in a Python 3.99.1 here; or give the job API"),
        (None, "install ray==2.1.0 in a Python "),
    ],
)
def test_version_mismatch_of_ray_has_a_remedy(
    python: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The input is the message of Ray's own check."""
    cluster_versions = {"ray_version": "2.1.0", "python_version": python or OURS.python}

    def refuse(*args: object, **kwargs: object) -> None:
        check_version_info(cluster_versions, "node 10.0.0.1")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("distplat.cli.join._check_ray", lambda address: None)
    with pytest.raises(ClusterUnreachable) as raised, connected("auto", {}):
        pass
    text = str(raised.value)
    assert text.startswith("the Ray cluster at auto has Ray 2.1.0 on Python ")
    assert f"this process {OURS}: a driver must have the same; {remedy}" in text


def test_patch_release_mismatch_names_the_match_level() -> None:
    minor = ".".join(OURS.python.split(".")[:2])
    with pytest.raises(RuntimeError) as raised:
        check_version_info(
            {"ray_version": ray.__version__, "python_version": f"{minor}.99"}, "node", True, "patch"
        )
    message = driver_mismatch("h:6379", str(raised.value))
    assert re.search(r"; set RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor, which lets", message)
    check_version_info(
        {"ray_version": ray.__version__, "python_version": f"{minor}.99"}, "node", True, "minor"
    )
    assert driver_mismatch("h:6379", "Connection refused") == ""
