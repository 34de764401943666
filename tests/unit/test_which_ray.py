"""Search for a run among several Ray clusters on one machine."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import pytest
import ray
from ray._private.authentication import authentication_token_setup as setup

from distplat.actors import overview, ray_compat
from distplat.actors.overview import RunName
from distplat.cli import join
from distplat.cli.running import joined
from distplat.platform.errors import ClusterUnreachable, Problem, SpecError

A, B, C = "127.0.0.1:1001", "127.0.0.1:1002", "127.0.0.1:1003"


class FakeClusters:
    """Ray clusters with their runs by address; None: the cluster does not answer."""

    def __init__(self, runs: Mapping[str, list[RunName] | None]) -> None:
        self.runs = runs
        self.connected = ""  #: address of the cluster
        self.requests: list[str] = []

    @contextmanager
    def connected_to(self, address: str, *, own: bool = False) -> Iterator[None]:
        self.requests.append(address)
        if self.runs[address] is None:
            raise ClusterUnreachable(f"cannot join Ray at {address}")
        assert own, "only a cluster of this user gets the token"
        self.connected = address
        yield
        self.connected = ""

    @contextmanager
    def connected_here(self) -> Iterator[None]:
        with self.connected_to(next(iter(self.runs)), own=True):
            yield

    def find_runs(self, name: str) -> list[RunName]:
        matching = [run for run in self.runs[self.connected] or () if name in (run.run, run.job)]
        if not matching:
            raise SpecError(Problem((), f"no run or job {name!r} is running"))
        return matching


@pytest.fixture
def clusters(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> FakeClusters:
    clusters = FakeClusters(request.param)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(join, "rays_here", lambda: list(clusters.runs))
    monkeypatch.setattr(join, "connected_to", clusters.connected_to)
    monkeypatch.setattr(join, "connected_here", clusters.connected_here)
    monkeypatch.setattr(overview, "find_runs", clusters.find_runs)
    monkeypatch.setattr(
        overview, "submitted_run", lambda submission, job: clusters.find_runs(submission)[0]
    )
    return clusters


LIN_1, LIN_2, MLP_1 = RunName("lin-1", "lin"), RunName("lin-2", "lin"), RunName("mlp-1", "mlp")


@pytest.mark.parametrize("clusters", [{A: [LIN_1], B: None, C: [LIN_2, MLP_1]}], indirect=True)
@pytest.mark.parametrize("address", [None, "auto"])
@pytest.mark.parametrize(("name", "expected"), [("lin-1", A), ("lin-2", C), ("mlp", C)])
def test_joins_the_cluster_of_the_run(
    clusters: FakeClusters, address: str | None, name: str, expected: str
) -> None:
    with joined(address, name) as run:
        assert (clusters.connected, name in (run.run, run.job)) == (expected, True)
    with joined(address, "unused", submission=name):
        assert clusters.connected == expected


@pytest.mark.parametrize("clusters", [{A: [LIN_1], B: [LIN_2]}], indirect=True)
def test_runs_of_one_job_on_two_clusters_are_ambiguous(clusters: FakeClusters) -> None:
    with pytest.raises(SpecError) as raised, joined(None, "lin"):
        pass
    assert str(raised.value) == (
        f"several runs of job 'lin' are active\n  hint: name one: lin-1 at {A}, lin-2 at {B}"
    )


@pytest.mark.parametrize("clusters", [{A: [LIN_1], B: [LIN_2]}], indirect=True)
def test_unknown_run_is_an_error_of_each_cluster(clusters: FakeClusters) -> None:
    with pytest.raises(SpecError) as raised, joined(None, "mlp"):
        pass
    assert [problem.message for problem in raised.value.problems] == [
        f"no run or job 'mlp' is running at {A}",
        f"no run or job 'mlp' is running at {B}",
    ]


@pytest.mark.parametrize("clusters", [{A: [LIN_1], B: None}], indirect=True)
def test_unreachable_cluster_is_reported_with_the_others(clusters: FakeClusters) -> None:
    with pytest.raises(SpecError) as raised, joined(None, "mlp"):
        pass
    assert [problem.message for problem in raised.value.problems] == [
        f"no run or job 'mlp' is running at {A}",
        f"cannot join Ray at {B}",
    ]


@pytest.mark.parametrize("needs_token", [True, False])
def test_join_failure_is_reported_at_once(
    needs_token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray.init` would retry for minutes."""

    def check_gcs(address: str, limit_s: float) -> None:
        if needs_token:
            raise ray.exceptions.AuthenticationError("InvalidAuthToken")
        raise ray.exceptions.RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.setattr(ray_compat, "check_gcs", check_gcs)
    monkeypatch.setattr(ray, "init", lambda **kwargs: pytest.fail("ray.init must not be called"))
    monkeypatch.setattr(join, "check_listening", lambda address: None)
    monkeypatch.setattr(join, "check_is_ray", lambda address, environ: None)
    message = "requires a token.*RAY_AUTH_TOKEN" if needs_token else "Timed out while waiting"
    with pytest.raises(ClusterUnreachable, match=f"cannot join Ray at {A}: .*{message}"):
        with join.connected(A, {}):
            pass


@pytest.mark.parametrize("clusters", [{A: None, B: None}], indirect=True)
def test_unreachable_clusters_are_an_error(clusters: FakeClusters) -> None:
    with pytest.raises(ClusterUnreachable), joined(None, "mlp"):
        pass


@pytest.mark.parametrize("clusters", [{A: [LIN_1]}], indirect=True)
def test_single_cluster_is_connected_once(clusters: FakeClusters) -> None:
    with joined(None, "lin"):
        pass
    assert clusters.requests == [A]


@pytest.mark.parametrize("clusters", [{A: [LIN_1], B: None}], indirect=True)
def test_explicit_address_connects_to_one_cluster(clusters: FakeClusters) -> None:
    with joined("http://127.0.0.1:8265", "lin"), joined("http://127.0.0.1:8265", "", "lin-1"):
        pass
    assert clusters.requests == [A, A]


def test_clusters_of_other_users_are_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {B, A, "192.0.2.7:6379"})
    monkeypatch.setattr(join, "foreign_listener", lambda address: "user 7" if address == B else "")
    assert join.rays_here() == [A, "192.0.2.7:6379"]


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_available_token_is_used_without_a_warning(
    mode: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    monkeypatch.setenv("RAY_AUTH_MODE", mode or "")
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    calls: list[bool] = []
    monkeypatch.setattr(f"{setup.__name__}._enable_token_auth", lambda: calls.append(True))
    with caplog.at_level(logging.WARNING):
        ray_compat.use_token_at_hand()
    assert calls == ([True] if mode is None else [])
    assert caplog.records == []


def test_invalid_token_path_is_a_spec_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    message = "RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty: /none"

    def use(*, warn_if_disabled: bool) -> None:
        raise ray.exceptions.AuthenticationError(message)

    monkeypatch.setattr(setup, "maybe_enable_token_auth_if_token_available", use)
    with pytest.raises(SpecError) as raised:
        ray_compat.use_token_at_hand()
    assert str(raised.value) == message


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_private_ray_requires_a_token_unless_the_user_sets_the_mode(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`test_private_ray.py` checks this on a real Ray."""
    monkeypatch.setenv("RAY_AUTH_MODE", mode or "")
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    calls: list[bool] = []
    monkeypatch.setattr(setup, "_enable_token_auth", lambda: calls.append(True))
    ray_compat.ask_for_token()
    assert calls == ([True] if mode is None else [])


def test_find_runs_without_runs_has_no_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(overview, "named_actors", lambda: {})
    with pytest.raises(SpecError, match="'mlp' is running\n  hint: the cluster has no runs"):
        overview.find_runs("mlp")
