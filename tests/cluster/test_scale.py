"""Workers join and leave an asynchronous run that goes on; every task is made once."""

import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import ray
from small_runs import HERE, job, train

from distplat.actors.overview import Overview, one_run, overview, scale
from distplat.actors.runs import RunName
from distplat.cli.main import run as command
from distplat.cli.roles import role_lines
from distplat.platform.apply_log import FILE_NAME, flaws, read_logs
from distplat.platform.errors import SpecError
from distplat.platform.progress import Recovery, Setback

pytestmark = [pytest.mark.cluster, pytest.mark.usefixtures("local_ray"), pytest.mark.timeout(180)]

STEPS = 1000
PATIENCE_S = 60.0


class Story(threading.Thread):
    """Does something to a run from outside, then lets it end. An `Observer`."""

    def __init__(self, story: Callable[[RunName, "Story"], None], ends: Path) -> None:
        super().__init__(daemon=True)
        self.story, self.ends = story, ends
        self.training = threading.Event()
        self.setbacks: list[Setback] = []
        self.recovered = threading.Event()
        self.errors: list[BaseException] = []

    def started(self, job: object, run: str, path: Path) -> None:
        self.start()

    def stepped(self, summary: object) -> None:
        self.training.set()

    def disturbed(self, news: Setback | Recovery) -> None:
        if isinstance(news, Setback):
            self.setbacks.append(news)
        else:
            self.recovered.set()

    def run(self) -> None:
        try:
            assert self.training.wait(PATIENCE_S)
            self.story(one_run("small"), self)
        except BaseException as error:
            self.errors.append(error)
        finally:
            self.ends.touch()


def wait_until(run: RunName, what: Callable[[Overview], bool]) -> Overview:
    until = time.monotonic() + PATIENCE_S
    while not what(seen := overview(run)):
        assert time.monotonic() < until, role_lines(seen)
        time.sleep(0.1)
    return seen


def made(seen: Overview) -> dict[int, int]:
    assert seen.roster is not None
    return {entry.standing.rank: entry.standing.made for entry in seen.roster.workers}


def test_workers_join_leave_and_are_lost(tmp_path: Path) -> None:
    def story(run: RunName, mine: Story) -> None:
        before = wait_until(run, lambda seen: min(made(seen).values()) > 0)
        assert before.servers is not None and before.servers.version == 1
        assert [seat.primary for seat in before.servers.seats] == ["server-0"]
        scale(run, 4, PATIENCE_S)
        seen = wait_until(run, lambda seen: min(made(seen).values()) > 0)
        assert sorted(made(seen)) == [0, 1, 2, 3]
        assert any(line.startswith("worker-3 ") for line in role_lines(seen))
        with pytest.raises(SpecError, match="14 more workers need 7 CPU, of which"):
            scale(run, 18, PATIENCE_S)
        scale(run, 1, PATIENCE_S)
        scale(run, 2, PATIENCE_S)
        assert not mine.setbacks, "nobody was disturbed"
        wait_until(run, lambda seen: min(made(seen).values()) > 0)
        ray.kill(run.actor("worker-4"))
        assert mine.recovered.wait(PATIENCE_S)
        count = made(overview(run))
        wait_until(run, lambda seen: made(seen).get(4, 0) > count.get(4, 0) + 2)

    ends = tmp_path / "ends"
    watch = Story(story, ends)
    spec = job(
        {"name": "ps-async", "delay_compensation": 0.1},
        2,
        task="tasks_for_tests:Paced",
        task_args={"until": str(ends), "seconds": 0.1},
        optimizer={"name": "SGD", "lr": 1e-3},
        epochs=None,
        steps=STEPS,
        evaluation={"every_epochs": 0},
    )
    result = train(spec, tmp_path, observers=(watch,))
    watch.join(10)
    assert not watch.errors, watch.errors
    assert [setback.replaced for setback in watch.setbacks] == [("worker-4",)]
    steps = [summary.step for summary in result.history]
    assert (
        steps == sorted(set(steps)) and len(steps) > 0.9 * STEPS
    )  # reports are lost with a worker
    (log,) = read_logs(str(result.path / FILE_NAME))[0]
    assert flaws(log, 2, STEPS) == []
    assert {applied.rank for applied in log} == {0, 1, 2, 3, 4}
    assert command(["replay", str(result.path), "--working-dir", str(HERE)]) == 0
