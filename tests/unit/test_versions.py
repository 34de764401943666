"""Versions of Ray and Python that do not match are told before anything is shipped."""

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
HERE = Versions("2.60.0", "3.11.9")


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeJobApi]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    Path("job.yaml").write_text(JOB)
    Path("lin.py").write_text("class Lin: ...\n")
    with fake_job_api() as served:
        yield served


def test_the_oldest_versions_are_those_of_the_package() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    (needed,) = (one for one in project["dependencies"] if one.startswith("ray["))
    assert needed == f"ray[default]>={OLDEST_RAY[0]}.{OLDEST_RAY[1]}"
    assert OLDEST_PYTHON == OLDEST


@pytest.mark.parametrize(
    ("ray_version", "python"),
    [("2.58.0", "3.11.9"), ("1.13.0", ""), ("2.60.0", "3.10.14"), ("2.60.0", "2.7")],
)
def test_a_cluster_that_is_too_old_is_refused_with_both_versions(
    ray_version: str, python: str
) -> None:
    theirs = Versions(ray_version, python)
    with pytest.raises(ClusterUnreachable) as raised:
        check_cluster("http://h:8265", theirs, HERE, ())
    assert str(raised.value) == (
        f"the cluster at http://h:8265 has {theirs}, and distplat needs Ray 2.59 and Python 3.11 "
        "there, or later; this machine has Ray 2.60.0 on Python 3.11.9: start the cluster with that"
    )
    assert raised.value.exit_code == 3


@pytest.mark.parametrize(
    ("theirs", "given", "said"),
    [
        (HERE, [], False),
        (Versions("2.60.0", "3.11.2"), [], False),
        (Versions("2.60.0", ""), [], False),
        (Versions("2.60.0", "3.12.1"), [], True),
        (Versions("2.59.1", "3.11.9"), [], True),
        (Versions("2.61.0rc1", ""), [], True),
        (Versions("3.0.0.dev0", "3.14.0"), ["pip"], True),
        (Versions("2.60.0", "3.10.1"), ["conda"], False),
    ],
)
def test_a_cluster_that_is_new_enough_gets_a_word_if_it_differs(
    theirs: Versions, given: list[str], said: bool
) -> None:
    line = check_cluster("http://h:8265", theirs, HERE, given)
    assert bool(line) == said
    assert not said or (str(theirs) in line and str(HERE) in line)


def test_an_old_cluster_is_refused_before_anything_is_uploaded(
    api: FakeJobApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.ray_version = "2.40.0"
    assert run(["submit", "job.yaml", "--address", api.url]) == 3
    shown = capsys.readouterr().err
    assert shown.startswith(f"error: the cluster at {api.url} has Ray 2.40.0 on Python 3.11.0, and")
    assert f"this machine has {OURS}" in shown
    assert "shipping" not in shown
    assert (api.packages, api.jobs) == ([], [])


def test_another_ray_is_named_and_the_job_is_handed_in(
    api: FakeJobApi, capsys: pytest.CaptureFixture[str]
) -> None:
    api.ray_version, api.python_version = "99.1.0", None
    assert run(["submit", "job.yaml", "--address", api.url]) == 0
    shown = capsys.readouterr().err
    assert f"the cluster has Ray 99.1.0, this machine {OURS}" in shown
    assert shown.index("99.1.0") < shown.index("shipping 2 files")
    assert len(api.packages) == 2
    assert len(api.jobs) == 1


@pytest.mark.parametrize(
    ("python", "remedy"),
    [
        ("3.99.1", "install ray==2.1.0 in a Python 3.99.1 here; or give the job API"),
        (None, "install ray==2.1.0 in a Python "),
    ],
)
def test_a_driver_of_another_version_is_told_in_our_words(
    python: str | None, remedy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By what Ray really says."""
    theirs = {"ray_version": "2.1.0", "python_version": python or OURS.python}

    def refuse(*args: object, **kwargs: object) -> None:
        check_version_info(theirs, "node 10.0.0.1")

    monkeypatch.setattr("ray.init", refuse)
    monkeypatch.setattr("distplat.cli.join._check_ray", lambda address: None)
    with pytest.raises(ClusterUnreachable) as raised, connected("auto", {}):
        pass
    text = str(raised.value)
    assert text.startswith("the Ray cluster at auto has Ray 2.1.0 on Python ")
    assert f"this process {OURS}: a driver must have the same; {remedy}" in text


def test_only_a_patch_release_apart() -> None:
    minor = ".".join(OURS.python.split(".")[:2])
    with pytest.raises(RuntimeError) as raised:
        check_version_info(
            {"ray_version": ray.__version__, "python_version": f"{minor}.99"}, "node", True, "patch"
        )
    said = driver_mismatch("h:6379", str(raised.value))
    assert re.search(r"; set RAY_DEFAULT_PYTHON_VERSION_MATCH_LEVEL=minor, which lets", said)
    check_version_info(
        {"ray_version": ray.__version__, "python_version": f"{minor}.99"}, "node", True, "minor"
    )
    assert driver_mismatch("h:6379", "Connection refused") == ""
