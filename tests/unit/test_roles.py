"""The roles of a run as text and as JSON."""

import json
from typing import Any

import pytest

from distplat.actors import overview
from distplat.actors.overview import Overview, RunName
from distplat.actors.servers.scheduler import SchedulerStatus, WorkerRow
from distplat.cli.running import role_facts, role_lines
from distplat.platform.errors import ActorLost, SpecError
from distplat.platform.progress import to_json
from distplat.platform.scaling import ScaleRequest, ScaleStatus
from distplat.platform.server_group import ServerGroupStatus, ShardAssignment
from distplat.platform.shard_map import Shard
from distplat.platform.worker_stats import WorkerStats

CUTS = (Shard(0, 0, 617_296), Shard(1, 617_296, 1_234_567))
ASSIGNMENTS = (
    ShardAssignment(0, "server-2", "server-3", ready=False),
    ShardAssignment(1, "server-1", "server-4", ready=True),
)
FAST = WorkerStats(0, 121, 200, 20.04, 0.048, 0.2, False)
SLOW = WorkerStats(1, 119, 40, 4.0, 0.25, 0.4, True)
NEW = WorkerStats(7, 0, 0, None, None, 5.0, False)
WORKERS = (
    WorkerRow(FAST, (240, 249, 10), False),
    WorkerRow(SLOW, (237, 237, 1), True),
    WorkerRow(NEW, None, False),
)


def scheduler(**overrides: Any) -> SchedulerStatus:
    fields: dict[str, Any] = {
        "attempt": 1,
        "dynamic_tasks": True,
        "steps": 400,
        "parts": 2,
        "done": 118,
        "duplicates": 3,
        "workers": WORKERS,
    }
    return SchedulerStatus(**{**fields, **overrides})


def test_submitted_run_is_found_by_its_submission(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = {"line-1": "first", "line-2": None, "line-3": "gone", "line-4": "second"}

    def ask(run: RunName, role: str, question: object) -> str | None:
        if ids[run.run] == "gone":
            raise ActorLost(role, None, "the run has ended")
        return ids[run.run]

    monkeypatch.setattr(overview, "find_runs", lambda name: [RunName(run, name) for run in ids])
    monkeypatch.setattr(overview, "_ask", ask)
    assert overview.submitted_run("second", "line").run == "line-4"
    with pytest.raises(SpecError, match="'third' has no active run"):
        overview.submitted_run("third", "line")


def test_text_of_a_run_with_leases_and_backups() -> None:
    run = Overview("digits-1", "digits", ServerGroupStatus(3, CUTS, ASSIGNMENTS, True), scheduler())
    assert role_lines(run) == [
        "run digits-1",
        "",
        "server manager    map version 3, 1,234,567 elements",
        "SHARD  ELEMENTS            SERVER    BACKUP",
        "0      0..617,296          server-2  server-3 (being filled)",
        "1      617,296..1,234,567  server-1  server-4",
        "",
        "task scheduler    step 118 of 400, attempt 1, tasks of 1/2 step are leased, "
        "3 were computed twice",
        "WORKER    STEP  TASKS  TASKS/S  WORK      LEASE",
        "worker-0  121   200    20.0     48.0 ms   240..249 (10)",
        "worker-1  119   40     4.0      250.0 ms  237            straggler, leaving",
        "worker-7  0     0      -        -         -              silent for 5 s",
    ]


def test_text_of_a_synchronous_run_without_backups() -> None:
    assignments = tuple(ShardAssignment(index, f"server-{index}") for index in range(2))
    workers = (WorkerRow(FAST, None, False), WorkerRow(SLOW, None, False))
    status = scheduler(dynamic_tasks=False, attempt=0, workers=workers)
    lines = role_lines(
        Overview("digits-1", "digits", ServerGroupStatus(1, CUTS, assignments, False), status)
    )
    assert lines[3:] == [
        "SHARD  ELEMENTS            SERVER",
        "0      0..617,296          server-0",
        "1      617,296..1,234,567  server-1",
        "",
        "task scheduler    step 118 of 400, attempt 0, each worker computes its part of every step",
        "WORKER    STEP  STEPS  STEPS/S  WORK      LEASE",
        "worker-0  121   200    20.0     48.0 ms   part 0 of 2",
        "worker-1  119   40     4.0      250.0 ms  part 1 of 2  straggler",
    ]


@pytest.mark.parametrize(
    ("backup", "shown"),
    [
        (ShardAssignment(0, "server-0"), "-"),
        (ShardAssignment(0, "server-0", starting="server-9"), "server-9 (starting)"),
    ],
)
def test_text_of_missing_backups(backup: ShardAssignment, shown: str) -> None:
    lines = role_lines(Overview("r", "j", ServerGroupStatus(1, CUTS[:1], (backup,), True), None))
    assert lines[-1].endswith(f"server-0  {shown}")


@pytest.mark.parametrize(
    ("run", "last"),
    [
        (Overview("r", "j", None, None), "its strategy has neither servers nor a task scheduler"),
        (
            Overview("r", "j", ServerGroupStatus(0, (), ASSIGNMENTS, True), None),
            "server manager    no shards yet: no worker has registered",
        ),
        (
            Overview("r", "j", None, scheduler(steps=0)),
            "task scheduler    no worker has registered yet",
        ),
        (
            Overview("r", "j", None, scheduler(), ScaleStatus(ScaleRequest(2, 5), pending=True)),
            "5 workers were asked for",
        ),
        (
            Overview(
                "r", "j", None, scheduler(), ScaleStatus(ScaleRequest(2, 5), "no CPU is free")
            ),
            "5 workers were refused: no CPU is free",
        ),
    ],
)
def test_text_of_missing_parts(run: Overview, last: str) -> None:
    assert role_lines(run)[-1] == last


def test_text_of_replicated_tables() -> None:
    tables = (ShardAssignment(0, "embedding-server-0", "embedding-server-1", ready=True),)
    servers = ServerGroupStatus(0, (), (), False, tables)
    assert role_lines(Overview("r", "j", servers, None)) == [
        "run r",
        "",
        "server manager    no shards",
        "embedding tables",
        "PART  SERVER              BACKUP",
        "0     embedding-server-0  embedding-server-1",
    ]


def test_json_has_all_fields() -> None:
    run = Overview("digits-1", "digits", ServerGroupStatus(3, CUTS, ASSIGNMENTS, True), scheduler())
    found = json.loads(to_json(role_facts(run)))
    assert found["servers"]["assignments"][0]["backup"] == "server-3"
    assert found["scheduler"]["workers"][1]["stats"]["straggler"] is True
    assert found["scheduler"]["workers"][0]["lease"] == [240, 249, 10]
    scale = {name: found["scheduler"][name] for name in ("request", "refused", "pending")}
    assert scale == {"request": None, "refused": "", "pending": False}
