"""
`make soak`: a sequence of jobs with random faults, on three hosts.

    chaos_soak.py --minutes 30            hosts of `chaos_hosts.py`; without namespaces, three Ray
                                          nodes on this host
    chaos_soak.py --seed 17 --trials 1    repeats that trial

Exits with 1 if a trial is wrong, or if no fault of a trial fired.
"""

import argparse
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from random import Random

from chaos_cluster import OneCluster, with_token
from chaos_grid import line
from chaos_hosts import ThreeHosts, can_create_hosts, isolate
from chaos_injector import PlannedFault
from chaos_rows import (
    ALL,
    HEARTBEAT_S,
    KILL,
    SERVED,
    STEPS,
    STOP,
    WIDE,
    WORLD,
    Plan,
    first_checkpoint,
)
from chaos_trial import Outcome, Runs


def main() -> int:
    """Run trials until the time is over; return the exit code."""
    parser = argparse.ArgumentParser(description="Random faults on three hosts.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--trials", type=int, default=10_000, help="maximum number of runs")
    parser.add_argument(
        "--seed", type=int, default=1, help="of the first trial; later trials count up"
    )
    parser.add_argument("--folder", help="for the files of runs; default: a new one in /tmp")
    args = parser.parse_args()
    hosts = can_create_hosts()
    (isolate if hosts else with_token)()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="soak-"))
    where = "three hosts" if hosts else "three Ray nodes on this host"
    print(f"{where}, first seed {args.seed}; files of runs are in {folder}", flush=True)
    cluster = ThreeHosts() if hosts else OneCluster(3)
    outcomes: list[Outcome] = []
    deadline = time.monotonic() + args.minutes * 60
    try:
        runs = Runs(cluster, folder)
        while len(outcomes) < args.trials and time.monotonic() < deadline:
            seed = args.seed + len(outcomes)
            strategy = ALL[seed % len(ALL)]
            plan = random_plan(strategy, Random(seed), hosts)
            outcomes.append(runs.make("soak", strategy, seed, plan))
            print(line(outcomes[-1]), flush=True)
    finally:
        cluster.close()
    print("\n" + summary(outcomes))
    return int(not outcomes or any(o.problems or not o.fired for o in outcomes))


def random_plan(strategy: str, draw: Random, hosts: bool) -> Plan:
    """Draw one to three faults in ascending steps, after the first checkpoint."""
    step, faults = first_checkpoint(strategy) + 1, list[PlannedFault]()
    for _ in range(draw.randint(1, 3)):
        step += draw.randint(1, 4)
        moment = draw.choice(("forward", "backward"))
        faults.append(_draw_fault(strategy, draw, moment, min(step, STEPS - 1), hosts))
    width = draw.choice((16, WIDE))
    return Plan(tuple(faults), width=width, max_failures=20)


def _draw_fault(strategy: str, draw: Random, moment: str, step: int, hosts: bool) -> PlannedFault:
    rank = draw.randrange(WORLD[strategy])
    victims = ["self"] * 4 + [f"worker-{draw.randrange(WORLD[strategy])}", "node"]
    if strategy in SERVED:
        victims += ["server", "server-manager", "task-scheduler"]
    victim = draw.choice(victims)
    if victim == "node" and hosts:
        action: int | str = draw.choice((KILL, STOP, "cut", "slow"))
        undo_s = draw.choice((1.0, 3.0, HEARTBEAT_S + 3))
        return PlannedFault(moment, rank, step, victim, action, saved=True, undo_s=undo_s)
    action = draw.choice((KILL, KILL, STOP))
    undo_s = draw.choice((0.0, 1.0, HEARTBEAT_S + 3)) if action == signal.SIGSTOP else 0.0
    delay_s = draw.choice((0.0, draw.uniform(0, 0.03)))
    hold = delay_s == 0.0
    return PlannedFault(
        moment, rank, step, victim, action, hold, delay_s, saved=True, undo_s=undo_s
    )


def summary(outcomes: list[Outcome]) -> str:
    """Return a Markdown table of runs, fired faults, wrong runs and recovery times."""
    lines = [
        "| strategy | runs | faults fired | wrong | recovery median | max |",
        "|---|---|---|---|---|---|",
    ]
    for strategy in (*ALL, "all"):
        selected = [o for o in outcomes if strategy in (o.strategy, "all")]
        if not selected:
            continue
        fired = sum(len(o.fired) for o in selected)
        wrong = sum(bool(o.problems) for o in selected)
        times = [o.recovery_s for o in selected if o.recovery_s and not o.problems] or [0.0]
        figures = f"{statistics.median(times):.1f} s | {max(times):.1f} s"
        lines.append(f"| {strategy} | {len(selected)} | {fired} | {wrong} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
