"""
`make soak`: one job after the other, each with several random faults, on three hosts.

    chaos_soak.py --minutes 30            hosts as in `chaos_hosts.py`; where they cannot be made,
                                          three Ray nodes on this one
    chaos_soak.py --seed 17 --trials 1    that one again

Exits with 1 if a run went wrong, or if no fault of one fired.
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
from chaos_hosts import ThreeHosts, isolated, possible
from chaos_injector import Deed
from chaos_rows import ALL, HEARTBEAT_S, KILL, SERVED, STEPS, STOP, WIDE, WORLD, Plan, late
from chaos_trial import Outcome, Runs


def main() -> int:
    """Inject faults until the time is over; give the exit code."""
    parser = argparse.ArgumentParser(description="Random faults on three hosts.")
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--trials", type=int, default=10_000, help="at most so many runs")
    parser.add_argument("--seed", type=int, default=1, help="of the first; the next ones follow")
    parser.add_argument("--folder", help="for what the runs leave; default: a new one in /tmp")
    args = parser.parse_args()
    hosts = possible()
    (isolated if hosts else with_token)()
    folder = Path(args.folder or tempfile.mkdtemp(prefix="soak-"))
    where = "three hosts" if hosts else "three Ray nodes on this host"
    print(f"{where}, first seed {args.seed}; what runs leave is in {folder}", flush=True)
    cluster = ThreeHosts() if hosts else OneCluster(3)
    outcomes: list[Outcome] = []
    until = time.monotonic() + args.minutes * 60
    try:
        runs = Runs(cluster, folder)
        while len(outcomes) < args.trials and time.monotonic() < until:
            seed = args.seed + len(outcomes)
            strategy = ALL[seed % len(ALL)]
            plan = random_plan(strategy, Random(seed), hosts)
            outcomes.append(runs.make("soak", strategy, seed, plan))
            print(line(outcomes[-1]), flush=True)
    finally:
        cluster.close()
    print("\n" + summary(outcomes))
    return int(not outcomes or any(one.problems or not one.fired for one in outcomes))


def random_plan(strategy: str, draw: Random, hosts: bool) -> Plan:
    """Draw one to three faults, each some steps after the one before; a checkpoint comes first."""
    step, deeds = late(strategy) + 1, list[Deed]()
    for _ in range(draw.randint(1, 3)):
        step += draw.randint(1, 4)
        moment = draw.choice(("forward", "backward"))
        deeds.append(_draw_deed(strategy, draw, moment, min(step, STEPS - 1), hosts))
    width = draw.choice((16, WIDE))
    return Plan(tuple(deeds), width=width, max_failures=20)


def _draw_deed(strategy: str, draw: Random, moment: str, step: int, hosts: bool) -> Deed:
    rank = draw.randrange(WORLD[strategy])
    victims = ["self"] * 4 + [f"worker-{draw.randrange(WORLD[strategy])}", "node"]
    if strategy in SERVED:
        victims += ["server", "server-manager", "task-scheduler"]
    victim = draw.choice(victims)
    if victim == "node" and hosts:
        action: int | str = draw.choice((KILL, STOP, "cut", "slow"))
        undo_s = draw.choice((1.0, 3.0, HEARTBEAT_S + 3))
        return Deed(moment, rank, step, victim, action, saved=True, undo_s=undo_s)
    action = draw.choice((KILL, KILL, STOP))
    undo_s = draw.choice((0.0, 1.0, HEARTBEAT_S + 3)) if action == signal.SIGSTOP else 0.0
    delay_s = draw.choice((0.0, draw.uniform(0, 0.03)))
    hold = delay_s == 0.0
    return Deed(moment, rank, step, victim, action, hold, delay_s, saved=True, undo_s=undo_s)


def summary(outcomes: list[Outcome]) -> str:
    """Count by strategy: runs, faults that fired, what went wrong, recovery."""
    lines = [
        "| strategy | runs | faults fired | wrong | recovery median | max |",
        "|---|---|---|---|---|---|",
    ]
    for strategy in (*ALL, "all"):
        some = [one for one in outcomes if strategy in (one.strategy, "all")]
        if not some:
            continue
        fired, wrong = sum(len(one.fired) for one in some), sum(bool(one.problems) for one in some)
        times = [one.recovery_s for one in some if one.recovery_s and not one.problems] or [0.0]
        figures = f"{statistics.median(times):.1f} s | {max(times):.1f} s"
        lines.append(f"| {strategy} | {len(some)} | {fired} | {wrong} | {figures} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
