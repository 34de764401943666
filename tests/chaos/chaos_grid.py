"""
`make chaos`: faults of every kind, under every strategy, on real processes, and a table.

    chaos_grid.py                                     every row and strategy, once
    chaos_grid.py --trials 5 --row F1 --row F11       five of each of these
    chaos_grid.py --seed 17 --row F7 --strategy ring  that trial again
    chaos_grid.py --folder FOLDER                     what is left of a grid that was broken off

Exits with 1 if a trial went wrong, or if a fault did not fire.
"""

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path

from chaos_cluster import AnyCluster, HeadApart, OneCluster, with_token
from chaos_rows import ALL, ROWS
from chaos_trial import Outcome, Runs

OUTCOMES = "outcomes.jsonl"
"""File of a grid's folder: a line for each trial."""


def main() -> int:
    """Run the grid as the command line says; give the exit code."""
    args = _arguments()
    with_token()
    sys.path.append(str(Path(__file__).parent.parent / "support"))  # for rows in memory
    folder = Path(args.folder or tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"first seed {args.seed}; runs, logs and results are in {folder}", flush=True)
    outcomes = earlier(folder)
    done = {(one.row, one.strategy, one.seed) for one in outcomes}
    deadline = time.monotonic() + args.minutes * 60
    for nodes, apart in ((0, False), (1, False), (3, False), (1, True)):
        wanted = [
            (name, strategy, seed)
            for name, strategy, seed in _trials(args)
            if (ROWS[name].nodes, ROWS[name].apart) == (nodes, apart)
            and (name, strategy, seed) not in done
        ]
        if not wanted:
            continue
        cluster: AnyCluster | None = HeadApart() if apart else OneCluster(nodes) if nodes else None
        try:
            runs = Runs(cluster, folder / ("apart" if apart else f"nodes-{nodes}"))
            for name, strategy, seed in wanted:
                if time.monotonic() > deadline:
                    break
                outcomes.append(runs.trial(name, strategy, seed))
                note(folder, outcomes[-1])
                print(line(outcomes[-1]), flush=True)
        finally:
            if cluster is not None:
                cluster.close()
    print("\n" + table(outcomes))
    return 0 if outcomes and all(one.verdict == "ok" for one in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="default: all")
    parser.add_argument("--strategy", action="append", choices=ALL, help="default: all")
    parser.add_argument("--trials", type=int, default=1, help="of each row and strategy")
    parser.add_argument("--seed", type=int, default=1, help="of the first; the next ones follow")
    parser.add_argument("--minutes", type=float, default=600.0, help="begin no trial after that")
    parser.add_argument("--folder", help="for what runs leave; default: a new one in /tmp")
    return parser.parse_args()


def note(folder: Path, outcome: Outcome) -> None:
    """Write an outcome down."""
    with (folder / OUTCOMES).open("a") as file:
        file.write(json.dumps(asdict(outcome), default=str) + "\n")


def earlier(folder: Path) -> list[Outcome]:
    """Read the outcomes of a grid that was broken off; what is told of their deeds is not read."""
    path = folder / OUTCOMES
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        Outcome(**{**json.loads(text), "deeds": (), "fired": [], "folder": folder})
        for text in lines
    ]


def _trials(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Give row, strategy and seed of each trial, one of everything before a second one."""
    for seed in range(args.seed, args.seed + args.trials):
        for name, row in ROWS.items():
            for strategy in row.strategies:
                if name in (args.row or ROWS) and strategy in (args.strategy or ALL):
                    yield name, strategy, seed


def line(outcome: Outcome) -> str:
    """Say what came of a trial, and of one that is not well everything."""
    recovery = "-" if outcome.recovery_s is None else f"{outcome.recovery_s:.1f}"
    head = f"{outcome.row:<15} {outcome.strategy:<9} seed {outcome.seed:<4} {outcome.verdict:<9}"
    text = f"{head} recovery {recovery:>5} s, run {outcome.seconds:5.1f} s"
    if outcome.found_s is not None:
        text += f", found after {outcome.found_s:.1f} s"
    if outcome.verdict == "ok":
        return text
    deeds = [f"deed: {deed}" for deed in outcome.deeds]
    found = [f"{fired.proof}" for fired in outcome.fired]
    missed = [f"not fired: {one}" for one in outcome.not_fired]
    more = [*deeds, *found, *missed, *outcome.problems, f"see {outcome.folder}"]
    return "\n    ".join([text, *more])


def table(outcomes: list[Outcome]) -> str:
    """Make tables in Markdown: a row for each fault, a column for each strategy."""
    lines = _rows(outcomes, lambda one: one.recovery_s)
    found = [one for one in outcomes if one.found_s is not None]
    if found:
        lines += ["", "Frozen processes, until a log says so:", ""]
        lines += _rows(found, lambda one: one.found_s)
    wrong = sum(one.verdict == "wrong" for one in outcomes)
    missed = sum(one.verdict == "not fired" for one in outcomes)
    end = f"{len(outcomes)} trials: {wrong} wrong, {missed} without their fault"
    return "\n".join([*lines, "", f"{end}; recovery: median, and the longest of several."])


def _rows(outcomes: list[Outcome], time_of: Callable[[Outcome], float | None]) -> list[str]:
    """Give the lines of one table of times."""
    lines = [f"| row | fault | {' | '.join(ALL)} |", "|---|---|" + "---|" * len(ALL)]
    for name, row in ROWS.items():
        cells = [
            _figures(
                [one for one in outcomes if (one.row, one.strategy) == (name, strategy)], time_of
            )
            for strategy in ALL
        ]
        if any(cells):
            lines.append(f"| {name} | {row.what} | {' | '.join(cells)} |")
    return lines


def _figures(outcomes: list[Outcome], time_of: Callable[[Outcome], float | None]) -> str:
    """Give `ok/trials, median to maximum` of one row under one strategy."""
    if not outcomes:
        return ""
    good = [one for one in outcomes if one.verdict == "ok"]
    times = [seconds for one in good if (seconds := time_of(one))]
    count = f"{len(good)}/{len(outcomes)}"
    if not times:
        return count
    longest = f" ({max(times):.1f})" if len(times) > 1 else ""
    return f"{count} {statistics.median(times):.1f}{longest} s"


if __name__ == "__main__":
    sys.exit(main())
