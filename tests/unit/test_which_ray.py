"""Where several Rays run on this machine, the one that has the run is asked."""

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


class Rays:
    """Rays with their runs, `job: run`; None: one that does not answer."""

    def __init__(self, runs: Mapping[str, list[RunName] | None]) -> None:
        self.runs = runs
        self.at = ""  #: where this process is connected
        self.asked: list[str] = []

    @contextmanager
    def connected_to(self, address: str, *, own: bool = False) -> Iterator[None]:
        self.asked.append(address)
        if self.runs[address] is None:
            raise ClusterUnreachable(f"cannot join Ray at {address}")
        assert own, "or it would not get the token"
        self.at = address
        yield
        self.at = ""

    @contextmanager
    def connected_here(self) -> Iterator[None]:
        with self.connected_to(next(iter(self.runs)), own=True):
            yield

    def find_runs(self, name: str) -> list[RunName]:
        found = [run for run in self.runs[self.at] or () if name in (run.run, run.job)]
        if not found:
            raise SpecError(Problem((), f"no run or job {name!r} is running"))
        return found


@pytest.fixture
def rays(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> Rays:
    made = Rays(request.param)
    for name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(join, "rays_here", lambda: list(made.runs))
    monkeypatch.setattr(join, "connected_to", made.connected_to)
    monkeypatch.setattr(join, "connected_here", made.connected_here)
    monkeypatch.setattr(overview, "find_runs", made.find_runs)
    monkeypatch.setattr(
        overview, "submitted_run", lambda submission, job: made.find_runs(submission)[0]
    )
    return made


ONE, TWO, THREE = RunName("lin-1", "lin"), RunName("lin-2", "lin"), RunName("mlp-1", "mlp")


@pytest.mark.parametrize("rays", [{A: [ONE], B: None, C: [TWO, THREE]}], indirect=True)
@pytest.mark.parametrize("address", [None, "auto"])
@pytest.mark.parametrize(("name", "at"), [("lin-1", A), ("lin-2", C), ("mlp", C)])
def test_the_ray_of_the_run_is_joined(rays: Rays, address: str | None, name: str, at: str) -> None:
    with joined(address, name) as run:
        assert (rays.at, name in (run.run, run.job)) == (at, True)
    with joined(address, "unused", submission=name):
        assert rays.at == at


@pytest.mark.parametrize("rays", [{A: [ONE], B: [TWO]}], indirect=True)
def test_runs_of_one_job_on_two_rays_are_both_named(rays: Rays) -> None:
    with pytest.raises(SpecError) as raised, joined(None, "lin"):
        pass
    assert str(raised.value) == (
        f"several runs of job 'lin' are active\n  hint: name one: lin-1 at {A}, lin-2 at {B}"
    )


@pytest.mark.parametrize("rays", [{A: [ONE], B: [TWO]}], indirect=True)
def test_a_run_that_no_ray_has(rays: Rays) -> None:
    with pytest.raises(SpecError) as raised, joined(None, "mlp"):
        pass
    assert [one.message for one in raised.value.problems] == [
        f"no run or job 'mlp' is running at {A}",
        f"no run or job 'mlp' is running at {B}",
    ]


@pytest.mark.parametrize("rays", [{A: [ONE], B: None}], indirect=True)
def test_a_ray_that_did_not_answer_is_named_beside_those_without_the_run(rays: Rays) -> None:
    with pytest.raises(SpecError) as raised, joined(None, "mlp"):
        pass
    assert [one.message for one in raised.value.problems] == [
        f"no run or job 'mlp' is running at {A}",
        f"cannot join Ray at {B}",
    ]


@pytest.mark.parametrize("token", [True, False])
def test_why_a_ray_cannot_be_joined_is_told_at_once(
    token: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`ray.init` would try for minutes."""

    def check_gcs(address: str, limit_s: float) -> None:
        if token:
            raise ray.exceptions.AuthenticationError("InvalidAuthToken")
        raise ray.exceptions.RpcError("Timed out while waiting for GCS to become available.")

    monkeypatch.setattr(ray_compat, "check_gcs", check_gcs)
    monkeypatch.setattr(ray, "init", lambda **more: pytest.fail("it would not be of use"))
    monkeypatch.setattr(join, "check_listening", lambda address: None)
    monkeypatch.setattr(join, "check_is_ray", lambda address, environ: None)
    said = "requires a token.*RAY_AUTH_TOKEN" if token else "Timed out while waiting"
    with pytest.raises(ClusterUnreachable, match=f"cannot join Ray at {A}: .*{said}"):
        with join.connected(A, {}):
            pass


@pytest.mark.parametrize("rays", [{A: None, B: None}], indirect=True)
def test_rays_that_do_not_answer(rays: Rays) -> None:
    with pytest.raises(ClusterUnreachable), joined(None, "mlp"):
        pass


@pytest.mark.parametrize("rays", [{A: [ONE]}], indirect=True)
def test_a_single_ray_is_asked_once(rays: Rays) -> None:
    with joined(None, "lin"):
        pass
    assert rays.asked == [A]


@pytest.mark.parametrize("rays", [{A: [ONE], B: None}], indirect=True)
def test_who_names_a_cluster_has_no_other_asked(rays: Rays) -> None:
    with joined("http://127.0.0.1:8265", "lin"), joined("http://127.0.0.1:8265", "", "lin-1"):
        pass
    assert rays.asked == [A, A]


def test_rays_of_strangers_are_not_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray_compat, "addresses_here", lambda: {B, A, "192.0.2.7:6379"})
    monkeypatch.setattr(join, "foreign_listener", lambda address: "user 7" if address == B else "")
    assert join.rays_here() == [A, "192.0.2.7:6379"]


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_the_token_at_hand_is_used_without_a_word(
    mode: str | None, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", "a token")
    monkeypatch.setenv("RAY_AUTH_MODE", mode or "")
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    used: list[bool] = []
    monkeypatch.setattr(f"{setup.__name__}._enable_token_auth", lambda: used.append(True))
    with caplog.at_level(logging.WARNING):
        ray_compat.use_token_at_hand()
    assert used == ([True] if mode is None else [])
    assert caplog.records == []


def test_a_variable_that_names_no_token_is_the_users_mistake(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    told = "RAY_AUTH_TOKEN_PATH is set but file cannot be opened or is empty: /none"

    def use(*, warn_if_disabled: bool) -> None:
        raise ray.exceptions.AuthenticationError(told)

    monkeypatch.setattr(setup, "maybe_enable_token_auth_if_token_available", use)
    with pytest.raises(SpecError) as raised:
        ray_compat.use_token_at_hand()
    assert str(raised.value) == told


@pytest.mark.parametrize("mode", [None, "disabled"])
def test_a_ray_of_ours_asks_for_a_token_unless_the_user_has_chosen(
    mode: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """That a Ray does so then shows `test_private_ray.py`."""
    monkeypatch.setenv("RAY_AUTH_MODE", mode or "")
    if mode is None:
        monkeypatch.delenv("RAY_AUTH_MODE")
    chosen: list[bool] = []
    monkeypatch.setattr(setup, "_enable_token_auth", lambda: chosen.append(True))
    ray_compat.ask_for_token()
    assert chosen == ([True] if mode is None else [])


def test_where_nothing_runs_no_name_is_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(overview, "named_actors", lambda: {})
    with pytest.raises(SpecError, match="'mlp' is running\n  hint: the cluster has no runs"):
        overview.find_runs("mlp")
