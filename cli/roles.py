"""How the roles of a run are drawn: server manager and nodes, task scheduler, workers."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from distplat.cli.tables import table_lines

if TYPE_CHECKING:
    from distplat.actors.overview import Overview
    from distplat.actors.servers.scheduler import Entry, Roster
    from distplat.platform.server_group import ServersSeen, ShardAssignment


def role_lines(seen: Overview) -> list[str]:
    """Give the lines of a run's roles."""
    lines = [f"run {seen.run}"]
    if seen.servers is not None:
        lines += ["", *_server_lines(seen.servers)]
    if seen.roster is not None:
        lines += ["", *_worker_lines(seen.roster)]
    if seen.servers is None and seen.roster is None:
        lines += ["its strategy has neither servers nor a task scheduler"]
    return lines


def role_facts(seen: Overview) -> dict[str, Any]:
    """Give the roles for JSON output."""
    return {
        "run": seen.run,
        "servers": None if seen.servers is None else asdict(seen.servers),
        "scheduler": None if seen.roster is None else asdict(seen.roster),
    }


def _server_lines(servers: ServersSeen) -> list[str]:
    lines = _shard_lines(servers) if servers.seats else ["server manager    no shards"]
    if servers.tables:
        rows = [[str(seat.shard), seat.primary, _backup(seat)] for seat in servers.tables]
        lines += ["embedding tables", *table_lines(["PART", "SERVER", "BACKUP"], rows)]
    return lines


def _shard_lines(servers: ServersSeen) -> list[str]:
    if not servers.version:
        return ["server manager    no shard was given out yet: no worker has come"]
    total = servers.cuts[-1].stop if servers.cuts else 0
    head = f"server manager    map version {servers.version}, {total:,} elements"
    columns = ["SHARD", "ELEMENTS", "SERVER", "BACKUP"]
    rows = []
    for cut, seat in zip(servers.cuts, servers.seats, strict=True):
        run = f"{cut.start:,}..{cut.stop:,}"
        rows.append([str(cut.index), run, seat.primary, _backup(seat)])
    if not servers.replicated:
        columns, rows = columns[:-1], [row[:-1] for row in rows]
    return [head, *table_lines(columns, rows)]


def _backup(seat: ShardAssignment) -> str:
    if seat.backup is not None:
        return seat.backup if seat.ready else f"{seat.backup} (being filled)"
    return f"{seat.making} (starting)" if seat.making is not None else "-"


def _worker_lines(roster: Roster) -> list[str]:
    if not roster.steps:
        return ["task scheduler    no worker has come yet"]
    head = f"task scheduler    step {roster.done} of {roster.steps}, attempt {roster.attempt}"
    if roster.dealt:
        head += f", tasks of 1/{roster.parts} step are leased, {roster.duplicates} were made twice"
    else:
        head += ", each worker makes its part of every step"
    unit = "TASKS" if roster.dealt else "STEPS"
    columns = ["WORKER", "STEP", unit, f"{unit}/S", "WORK", "LEASE", ""]
    lines = [head, *table_lines(columns, [_row(entry, roster) for entry in roster.workers])]
    if roster.refused and roster.wish is not None:
        lines.append(f"{roster.wish.workers} workers were refused: {roster.refused}")
    elif roster.wish is not None and roster.wish.workers != len(roster.workers):
        lines.append(f"{roster.wish.workers} workers were asked for")
    return lines


def _row(entry: Entry, roster: Roster) -> list[str]:
    one = entry.standing
    lease = f"part {one.rank} of {roster.parts}"
    if roster.dealt:
        lease = "-"
        if entry.lease is not None:
            first, last, count = entry.lease
            lease = f"{first}" if count == 1 else f"{first}..{last} ({count})"
    marks = [("straggler", one.straggler), ("leaving", entry.leaving)]
    marks += [(f"silent for {one.silent_s:.0f} s", one.silent_s >= _SILENT_S)]
    return [
        f"worker-{one.rank}",
        str(one.step),
        str(one.made),
        "-" if one.per_s is None else f"{one.per_s:.1f}",
        "-" if one.step_s is None else f"{one.step_s * 1e3:.1f} ms",
        lease,
        ", ".join(word for word, marked in marks if marked),
    ]


_SILENT_S = 3.0
