"""
`make chaos`: each fault of docs/faults.md under each strategy, on real processes.

    chaos_grid.py                                     every row and strategy, once
    chaos_grid.py --trials 5 --row F1 --row F11       five trials of each of these rows
    chaos_grid.py --seed 17 --row F7 --strategy ring  repeats that trial
    chaos_grid.py --folder FOLDER                     continues an interrupted grid

Exits with 1 if a trial is wrong, or if a fault did not fire.
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

from chaos_cluster import AnyCluster, OneCluster, SeparateHead, with_token
from chaos_rows import ALL, ROWS
from chaos_trial import Outcome, Runs

OUTCOMES = "outcomes.jsonl"
"""File in a grid's folder with one line per trial."""


def main() -> int:
    """Run the grid; return the exit code."""
    args = _arguments()
    with_token()
    sys.path.append(str(Path(__file__).parent.parent / "support"))  # used by rows in memory
    folder = Path(args.folder or tempfile.mkdtemp(prefix="chaos-"))
    folder.mkdir(parents=True, exist_ok=True)
    print(f"first seed {args.seed}; runs, logs and results are in {folder}", flush=True)
    outcomes = read_outcomes(folder)
    done = {(o.row, o.strategy, o.seed) for o in outcomes}
    deadline = time.monotonic() + args.minutes * 60
    for nodes, separate_head in ((0, False), (1, False), (3, False), (1, True)):
        trials = [
            (name, strategy, seed)
            for name, strategy, seed in _trials(args)
            if (ROWS[name].nodes, ROWS[name].separate_head) == (nodes, separate_head)
            and (name, strategy, seed) not in done
        ]
        if not trials:
            continue
        cluster: AnyCluster | None = (
            SeparateHead() if separate_head else OneCluster(nodes) if nodes else None
        )
        try:
            runs = Runs(cluster, folder / ("separate-head" if separate_head else f"nodes-{nodes}"))
            for name, strategy, seed in trials:
                if time.monotonic() > deadline:
                    break
                outcomes.append(runs.trial(name, strategy, seed))
                record(folder, outcomes[-1])
                print(line(outcomes[-1]), flush=True)
        finally:
            if cluster is not None:
                cluster.close()
    print("\n" + table(outcomes))
    return 0 if outcomes and all(outcome.verdict == "ok" for outcome in outcomes) else 1


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0] if __doc__ else "")
    parser.add_argument("--row", action="append", choices=sorted(ROWS), help="default: all")
    parser.add_argument("--strategy", action="append", choices=ALL, help="default: all")
    parser.add_argument("--trials", type=int, default=1, help="number for each row and strategy")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the first trial; later trials count up"
    )
    parser.add_argument("--minutes", type=float, default=600.0, help="start no trial afterwards")
    parser.add_argument("--folder", help="for the files of runs; default: a new one in /tmp")
    return parser.parse_args()


def record(folder: Path, outcome: Outcome) -> None:
    """Append an outcome to the file."""
    with (folder / OUTCOMES).open("a") as file:
        file.write(json.dumps(asdict(outcome), default=str) + "\n")


def read_outcomes(folder: Path) -> list[Outcome]:
    """Read the outcomes of an interrupted grid, without their faults."""
    path = folder / OUTCOMES
    lines = path.read_text().splitlines() if path.exists() else []
    return [
        Outcome(**{**json.loads(text), "faults": (), "fired": [], "folder": folder})
        for text in lines
    ]


def _trials(args: argparse.Namespace) -> Iterator[tuple[str, str, int]]:
    """Yield row, strategy and seed of each trial, in the order of seeds."""
    for seed in range(args.seed, args.seed + args.trials):
        for name, row in ROWS.items():
            for strategy in row.strategies:
                if name in (args.row or ROWS) and strategy in (args.strategy or ALL):
                    yield name, strategy, seed


def line(outcome: Outcome) -> str:
    """Describe an outcome; with all details unless it is ok."""
    recovery = "-" if outcome.recovery_s is None else f"{outcome.recovery_s:.1f}"
    head = f"{outcome.row:<15} {outcome.strategy:<9} seed {outcome.seed:<4} {outcome.verdict:<9}"
    text = f"{head} recovery {recovery:>5} s, run {outcome.seconds:5.1f} s"
    if outcome.found_s is not None:
        text += f", detected after {outcome.found_s:.1f} s"
    if outcome.verdict == "ok":
        return text
    faults = [f"fault: {fault}" for fault in outcome.faults]
    found = [f"{fired.proof}" for fired in outcome.fired]
    missed = [f"not fired: {fault}" for fault in outcome.not_fired]
    more = [*faults, *found, *missed, *outcome.problems, f"see {outcome.folder}"]
    return "\n    ".join([text, *more])


def table(outcomes: list[Outcome]) -> str:
    """Return Markdown tables with a row per fault and a column per strategy."""
    lines = _rows(outcomes, lambda outcome: outcome.recovery_s)
    detected = [outcome for outcome in outcomes if outcome.found_s is not None]
    if detected:
        lines += ["", "Frozen processes, time until a log reports them:", ""]
        lines += _rows(detected, lambda outcome: outcome.found_s)
    wrong = sum(outcome.verdict == "wrong" for outcome in outcomes)
    missed = sum(outcome.verdict == "not fired" for outcome in outcomes)
    end = f"{len(outcomes)} trials: {wrong} wrong, {missed} not fired"
    return "\n".join([*lines, "", f"{end}; recovery: median (maximum)."])


def _rows(outcomes: list[Outcome], time_of: Callable[[Outcome], float | None]) -> list[str]:
    """Return the lines of a table of times."""
    lines = [f"| row | fault | {' | '.join(ALL)} |", "|---|---|" + "---|" * len(ALL)]
    for name, row in ROWS.items():
        cells = [
            _figures([o for o in outcomes if (o.row, o.strategy) == (name, strategy)], time_of)
            for strategy in ALL
        ]
        if any(cells):
            lines.append(f"| {name} | {row.label} | {' | '.join(cells)} |")
    return lines


def _figures(outcomes: list[Outcome], time_of: Callable[[Outcome], float | None]) -> str:
    """Return `ok/trials median (maximum)` of one row under one strategy."""
    if not outcomes:
        return ""
    ok = [outcome for outcome in outcomes if outcome.verdict == "ok"]
    times = [seconds for outcome in ok if (seconds := time_of(outcome))]
    count = f"{len(ok)}/{len(outcomes)}"
    if not times:
        return count
    longest = f" ({max(times):.1f})" if len(times) > 1 else ""
    return f"{count} {statistics.median(times):.1f}{longest} s"


if __name__ == "__main__":
    sys.exit(main())
