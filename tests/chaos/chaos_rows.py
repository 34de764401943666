"""
The rows of the fault grid: the fault, its time, and the expected end of the run.

A row draws the time of its fault from a generator, so a seed determines a trial. Row names are the
numbers in docs/faults.md.
"""

import signal
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from random import Random
from typing import Any

from chaos_injector import STARVE, PlannedFault

STEPS, EVERY, BATCH = 24, 4, 12
KILL, STOP = int(signal.SIGKILL), int(signal.SIGSTOP)
HEARTBEAT_S, COLLECTIVE_S, STEP_S = 8.0, 5.0, 20.0
"""Deadlines of a trial; the first applicable one detects a frozen process."""
STORAGE_S = 6.0
"""`storage_timeout_s` on a small disk."""
MICRO_BATCHES = 2
WIDE = 768
"""Width of a model with an exchange of some milliseconds, and longer checkpoints."""

STRATEGIES: dict[str, dict[str, Any]] = {
    "ring": {"name": "ring", "timeout_s": COLLECTIVE_S},
    "ps-sync": {"name": "ps-sync", "num_servers": 2},
    "ps-async": {"name": "ps-async", "num_servers": 2, "staleness": 2},
    "hybrid": {
        "name": "hybrid",
        "pipeline": 2,
        "data": 2,
        "micro_batches": MICRO_BATCHES,
        "cut": ["2"],
        "timeout_s": COLLECTIVE_S,
    },
}
WORLD = {"ring": 2, "ps-sync": 2, "ps-async": 2, "hybrid": 4}
ALL = tuple(STRATEGIES)
SERVED = ("ps-sync", "ps-async")
SYNCHRONOUS = ("ring", "ps-sync", "hybrid")
STORES_AT = {"hybrid": {"data_strategy": "ps-sync", "num_servers": 1}}
"""Options that add servers to a strategy without servers."""


@dataclass(frozen=True)
class Plan:
    """One trial of a row."""

    faults: tuple[PlannedFault, ...]
    options: Mapping[str, Any] = field(default_factory=dict)
    """Options of the strategy, added to those of `STRATEGIES`."""
    width: int = 16
    codes: tuple[int, ...] = (0,)
    """Expected exit codes."""
    resumes: bool = False
    """Whether the run ends and is resumed."""
    damage: str = ""
    """Damage to the newest checkpoint before the run is resumed: `flip` or `cut`; empty: none."""
    small_disk: bool = False
    """Whether the run directory is on a separate small disk."""
    pause_s: float = 0.02
    """Minimum duration of each step, in seconds."""
    max_failures: int = 6
    quiet: bool = False
    """Whether no failure may be reported."""
    saves: bool = False
    """Whether the run saves a checkpoint of its last step when it ends."""


@dataclass(frozen=True)
class Row:
    """One fault of docs/faults.md."""

    name: str
    label: str
    strategies: tuple[str, ...]
    plan: Callable[[str, Random], Plan]
    nodes: int = 1
    """Nodes of the cluster; 0: the row needs no cluster, and its plan is not used."""
    separate_head: bool = False
    """Whether the cluster's head is in a separate process, so that it can be killed."""


ROWS: dict[str, Row] = {}


def row(
    name: str,
    label: str,
    strategies: tuple[str, ...] = ALL,
    nodes: int = 1,
    separate_head: bool = False,
) -> Callable[[Callable[[str, Random], Plan]], Callable[[str, Random], Plan]]:
    """Register a function as the plan of a row."""

    def register(plan: Callable[[str, Random], Plan]) -> Callable[[str, Random], Plan]:
        ROWS[name] = Row(name, label, strategies, plan, nodes, separate_head)
        return plan

    return register


def rank_of(strategy: str, draw: Random) -> int:
    return draw.randrange(WORLD[strategy])


def some_step(draw: Random) -> int:
    """Draw a step, neither the first nor one of the last; often at a checkpoint."""
    return draw.choice((1, 2, EVERY - 1, EVERY, 7, 2 * EVERY, 11, 13))


def first_checkpoint(strategy: str) -> int:
    """
    Return the number of forwards after which a held rank does not delay the first checkpoint.

    Under `ps-async` a rank may have computed both parts of the first steps.
    """
    return 2 * EVERY if strategy == "ps-async" else EVERY


def step_after_checkpoint(strategy: str, draw: Random) -> int:
    """Draw a step after the first checkpoint."""
    return some_step(draw) + first_checkpoint(strategy)


def inside(draw: Random) -> str:
    return draw.choice(("forward", "backward"))


@row("F1-setup", "SIGKILL a worker while it builds the model or loads its data")
def _(strategy: str, draw: Random) -> Plan:
    return Plan((PlannedFault(draw.choice(("model", "data")), rank_of(strategy, draw)),))


@row("F1", "SIGKILL a worker in forward or backward")
def _(strategy: str, draw: Random) -> Plan:
    return Plan((PlannedFault(inside(draw), rank_of(strategy, draw), some_step(draw)),))


@row("F1-last", "SIGKILL a worker in the last step", SYNCHRONOUS)
def _(strategy: str, draw: Random) -> Plan:
    return Plan((PlannedFault(inside(draw), rank_of(strategy, draw), STEPS - 1),))


@row("F1-eval", "SIGKILL a worker in an evaluation")
def _(strategy: str, draw: Random) -> Plan:
    return Plan((PlannedFault("evaluation", 0),))


@row("F2", "SIGKILL a worker during its push", ("ps-sync", "ps-async", "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    return _in_exchange(strategy, rank_of(strategy, draw), draw)


@row(
    "F3",
    "SIGKILL a worker that has pushed to all servers and waits for the update",
    ("ps-sync", "hybrid"),
)
def _(strategy: str, draw: Random) -> Plan:
    """Hold a rank before its push, and kill a rank of another replica, which waits for it."""
    rank = draw.choice((0, WORLD[strategy] - 1))
    other = WORLD[strategy] - 1 - rank
    fault = PlannedFault("backward", rank, some_step(draw), f"worker-{other}", delay_s=0.5)
    return Plan((fault,), STORES_AT.get(strategy, {}))


@row("F4", "SIGKILL a rank other than 0 in an all-reduce", ("ring", "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    return _in_exchange(strategy, draw.randrange(1, WORLD[strategy]), draw, served=False)


@row("F5", "SIGKILL rank 0 in an all-reduce", ("ring", "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    return _in_exchange(strategy, 0, draw, served=False)


def _in_exchange(strategy: str, rank: int, draw: Random, served: bool = True) -> Plan:
    """Kill a rank after its backward, at a random time within the duration of an exchange."""
    delay = draw.uniform(0, 0.03)
    options = STORES_AT.get(strategy, {}) if served else {}
    fault = PlannedFault("backward", rank, some_step(draw), hold=False, delay_s=delay)
    return Plan((fault,), options, WIDE)


@row(
    "F6",
    "SIGKILL a rank between the forward of a micro-batch and its backward",
    ("hybrid",),
)
def _(strategy: str, draw: Random) -> Plan:
    forwards = MICRO_BATCHES * some_step(draw) + draw.randrange(MICRO_BATCHES)
    return Plan((PlannedFault("between", rank_of(strategy, draw), forwards),))


@row("F7-worker", "SIGKILL a worker while a checkpoint is written")
def _(strategy: str, draw: Random) -> Plan:
    return _while_writing(f"worker-{rank_of(strategy, draw)}", draw)


@row("F7-server", "SIGKILL a server while a checkpoint is written", SERVED)
def _(strategy: str, draw: Random) -> Plan:
    return _while_writing("server", draw)


@row("F7", "SIGKILL the controller while it writes a checkpoint; resume")
def _(strategy: str, draw: Random) -> Plan:
    return _while_writing("controller", draw, resumes=True, codes=(4,))


def _while_writing(victim: str, draw: Random, **more: Any) -> Plan:
    saved = PlannedFault("partial", victim=victim, delay_s=draw.uniform(0, 0.02), saved=True)
    return Plan((saved,), width=WIDE, **more)


@row("F8", "SIGKILL the replacement of a lost worker while it builds the model")
def _(strategy: str, draw: Random) -> Plan:
    rank = rank_of(strategy, draw)
    return Plan((PlannedFault(inside(draw), rank, some_step(draw)), PlannedFault("renewed", rank)))


@row("F8-other", "SIGKILL another worker while a lost worker is replaced")
def _(strategy: str, draw: Random) -> Plan:
    rank = rank_of(strategy, draw)
    other = (rank + draw.randrange(1, WORLD[strategy])) % WORLD[strategy]
    first = PlannedFault(inside(draw), rank, step_after_checkpoint(strategy, draw), saved=True)
    return Plan((first, PlannedFault("renewed", rank, victim=f"worker-{other}")))


@row("F9", "SIGKILL all workers at once")
def _(strategy: str, draw: Random) -> Plan:
    step = step_after_checkpoint(strategy, draw)
    return Plan((PlannedFault(inside(draw), 0, step, victim="workers", saved=True),))


@row("F10", "SIGKILL a server without a backup", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    return _servers(strategy, "server", draw)


@row("F12", "SIGKILL all servers, primaries and backups", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    return _servers(strategy, "servers", draw, replication=2)


def _servers(strategy: str, victim: str, draw: Random, **options: Any) -> Plan:
    options = {**STORES_AT.get(strategy, {}), **options}
    hold, delay = draw.choice(((True, 0.0), (False, draw.uniform(0, 0.03))))
    step = step_after_checkpoint(strategy, draw)
    fault = PlannedFault(inside(draw), 0, step, victim, hold=hold, delay_s=delay, saved=True)
    return Plan((fault,), options, WIDE)


@row(
    "F11",
    "SIGKILL the primary of a replicated shard, in some trials also the promoted backup",
    (*SERVED, "hybrid"),
)
def _(strategy: str, draw: Random) -> Plan:
    options = {**STORES_AT.get(strategy, {}), "replication": 2}
    step = some_step(draw)
    faults = [PlannedFault(inside(draw), 0, step, "primary")]
    if draw.random() < 0.5:
        faults.append(PlannedFault("forward", 0, step + 2, "primary"))
    return Plan(tuple(faults), options, WIDE)


@row("F13", "SIGKILL the server manager", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault(inside(draw), 0, some_step(draw), "server-manager")
    return Plan((fault,), STORES_AT.get(strategy, {}))


@row("F13-scheduler", "SIGKILL the task scheduler", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault(inside(draw), 0, some_step(draw), "task-scheduler")
    return Plan((fault,), STORES_AT.get(strategy, {}))


@row("F13-controller", "SIGKILL the controller; resume")
def _(strategy: str, draw: Random) -> Plan:
    return _ended(strategy, "controller", KILL, draw, codes=(4,))


@row("F14", "SIGKILL the driver; resume")
def _(strategy: str, draw: Random) -> Plan:
    return _ended(strategy, "driver", KILL, draw, codes=(-signal.SIGKILL,))


@row("F16", "SIGINT to the driver: a checkpoint of the last step; resume")
def _(strategy: str, draw: Random) -> Plan:
    more: dict[str, Any] = {"codes": (130,), "saves": True, "pause_s": 0.1}
    return _ended(strategy, "driver", int(signal.SIGINT), draw, **more)


@row("F17", "SIGTERM to the driver: a checkpoint of the last step; resume")
def _(strategy: str, draw: Random) -> Plan:
    more: dict[str, Any] = {"codes": (143,), "saves": True, "pause_s": 0.1}
    return _ended(strategy, "driver", int(signal.SIGTERM), draw, **more)


def _ended(strategy: str, victim: str, number: int, draw: Random, **more: Any) -> Plan:
    """End the run once a checkpoint exists; the rank of the moment waits until then."""
    step = step_after_checkpoint(strategy, draw)
    fault = PlannedFault(inside(draw), 0, step, victim, number, saved=True)
    return Plan((fault,), resumes=True, **more)


@row("F18", "SIGTERM to a worker")
def _(strategy: str, draw: Random) -> Plan:
    return Plan(
        (
            PlannedFault(
                inside(draw), rank_of(strategy, draw), some_step(draw), action=int(signal.SIGTERM)
            ),
        )
    )


@row("F22", "SIGSTOP a worker permanently")
def _(strategy: str, draw: Random) -> Plan:
    return Plan(
        (PlannedFault(inside(draw), rank_of(strategy, draw), some_step(draw), action=STOP),)
    )


@row("F22-back", "SIGSTOP a worker, SIGCONT after its deadline: its messages are rejected")
def _(strategy: str, draw: Random) -> Plan:
    undo = HEARTBEAT_S + draw.uniform(0, 4)
    rank, step = rank_of(strategy, draw), some_step(draw)
    return Plan((PlannedFault(inside(draw), rank, step, action=STOP, undo_s=undo),))


@row("F23", "SIGSTOP a worker for 1.5 s, less than any deadline: no failure is reported")
def _(strategy: str, draw: Random) -> Plan:
    rank, step = rank_of(strategy, draw), some_step(draw)
    return Plan((PlannedFault(inside(draw), rank, step, action=STOP, undo_s=1.5),), quiet=True)


@row("F24", "SIGSTOP a server permanently, with a backup or without", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    replication = draw.choice((1, 2))
    options = {**STORES_AT.get(strategy, {}), "replication": replication}
    victim = "primary" if replication == 2 else "server"
    fault = PlannedFault(
        inside(draw), 0, step_after_checkpoint(strategy, draw), victim, STOP, saved=True
    )
    return Plan((fault,), options)


@row("F24-manager", "SIGSTOP the server manager permanently", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault(inside(draw), 0, some_step(draw), "server-manager", STOP)
    return Plan((fault,), STORES_AT.get(strategy, {}))


@row("F24-scheduler", "SIGSTOP the task scheduler permanently", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault(inside(draw), 0, some_step(draw), "task-scheduler", STOP)
    return Plan((fault,), STORES_AT.get(strategy, {}))


@row("F24-controller", "SIGSTOP the controller permanently; resume")
def _(strategy: str, draw: Random) -> Plan:
    return _ended(strategy, "controller", STOP, draw, codes=(4,))


@row("F24-driver", "SIGSTOP the driver for longer than a deadline, then SIGCONT")
def _(strategy: str, draw: Random) -> Plan:
    undo = HEARTBEAT_S + 2
    fault = PlannedFault(inside(draw), 0, some_step(draw), "driver", STOP, undo_s=undo)
    return Plan((fault,), quiet=True)


@row("F28", "the disk is full for 0.1 s during a checkpoint")
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault("forward", 0, some_step(draw), "disk", "fill", undo_s=0.1)
    return Plan((fault,), width=WIDE, small_disk=True)


@row("F28-for-good", "the disk stays full: exit code 5")
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault("forward", 0, some_step(draw), "disk", "fill")
    return Plan((fault,), width=WIDE, small_disk=True, codes=(5,))


@row("F29", "the run directory is deleted: exit code 5")
def _(strategy: str, draw: Random) -> Plan:
    return _without_disk(strategy, "remove", draw)


@row("F29-read-only", "the disk becomes read-only: exit code 5")
def _(strategy: str, draw: Random) -> Plan:
    return _without_disk(strategy, "read-only", draw)


@row("F29-hangs", "the disk stops responding: exit code 5")
def _(strategy: str, draw: Random) -> Plan:
    return _without_disk(strategy, "hang", draw)


def _without_disk(strategy: str, action: str, draw: Random) -> Plan:
    saved = draw.random() < 0.5
    step = step_after_checkpoint(strategy, draw) if saved else some_step(draw)
    fault = PlannedFault(inside(draw), 0, step, "disk", action, saved=saved)
    return Plan((fault,), small_disk=True, codes=(5,))


@row("F30", "the newest checkpoint of a stopped run is damaged; resume from the previous one")
def _(strategy: str, draw: Random) -> Plan:
    fault = PlannedFault("forward", 0, 3 * EVERY + 2, "driver", int(signal.SIGINT), saved=True)
    damage = draw.choice(("flip", "cut"))
    return Plan((fault,), resumes=True, codes=(130,), damage=damage, pause_s=0.1)


@row("F32", "the kernel's OOM killer kills a server, or a worker if the strategy has no servers")
def _(strategy: str, draw: Random) -> Plan:
    if strategy in SERVED:
        step, victim = step_after_checkpoint(strategy, draw), "server"
    else:
        step, victim = some_step(draw), f"worker-{rank_of(strategy, draw)}"
    fault = PlannedFault("forward", 0, step, victim, STARVE, hold=False, saved=victim == "server")
    return Plan((fault,))


@row("F34", "a task raises an exception: exit code 1 at once")
def _(strategy: str, draw: Random) -> Plan:
    return _user(strategy, "raise", draw, codes=(1,))


@row("F35-exit", "a task calls sys.exit(0): exit code 1")
def _(strategy: str, draw: Random) -> Plan:
    return _user(strategy, "exit", draw, codes=(1,))


@row("F35", "a task once calls os._exit(0), crashes in C or does not return")
def _(strategy: str, draw: Random) -> Plan:
    return _user(strategy, draw.choice(("quit", "segfault", "loop")), draw)


def _user(strategy: str, action: str, draw: Random, **more: Any) -> Plan:
    fault = PlannedFault("forward", rank_of(strategy, draw), some_step(draw), action=action)
    return Plan((fault,), **more)


@row("F40", "a worker dies in the same step repeatedly: exit code 4", SYNCHRONOUS)
def _(strategy: str, draw: Random) -> Plan:
    """Under `ps-async` other workers compute the lost task, which counts as progress."""
    rank, step = rank_of(strategy, draw), some_step(draw)
    return Plan(tuple(PlannedFault("forward", rank, step) for _ in range(3)), codes=(4,))


@row("F41", "the clock of a worker's process jumps by an hour: no failure is reported")
def _(strategy: str, draw: Random) -> Plan:
    return _user(strategy, "clock", draw, quiet=True)


@row("F9-two", "SIGKILL a worker and a server at the same moment", (*SERVED, "hybrid"))
def _(strategy: str, draw: Random) -> Plan:
    rank, step = rank_of(strategy, draw), step_after_checkpoint(strategy, draw)
    first = PlannedFault(inside(draw), 0, step, "server", saved=True)
    second = PlannedFault(first.moment, 0, step, f"worker-{rank}", hold=False)
    return Plan((second, first), STORES_AT.get(strategy, {}))


@row("F19", "SIGKILL a node with workers", nodes=3)
def _(strategy: str, draw: Random) -> Plan:
    return _node(strategy, draw)


@row("F20", "SIGSTOP a node's raylet for 12 s, then SIGCONT", nodes=3)
def _(strategy: str, draw: Random) -> Plan:
    return _node(strategy, draw, action=STOP, undo_s=12.0)


def _node(strategy: str, draw: Random, **more: Any) -> Plan:
    """
    Kill or freeze a node, whose processes survive for a while.

    Under `hybrid` the run does not wait for them, so the steps must outlast Ray's detection.
    """
    if strategy != "hybrid":
        step, pause_s = step_after_checkpoint(strategy, draw), 0.02
    else:
        step, pause_s = EVERY + draw.randrange(4), 1.5
    return Plan((PlannedFault(inside(draw), 0, step, "node", saved=True, **more),), pause_s=pause_s)


@row("F21", "SIGKILL the head of the cluster; resume on a new one", separate_head=True)
def _(strategy: str, draw: Random) -> Plan:
    """Workers survive: the remaining steps must take longer than the deadline of the loss."""
    fault = PlannedFault(inside(draw), 0, EVERY + draw.randrange(4), "head", KILL, saved=True)
    return Plan((fault,), resumes=True, codes=(4,), pause_s=1.5)


def _no_plan(strategy: str, draw: Random) -> Plan:
    """See `chaos_messages.py` and `chaos_inputs.py`."""
    return Plan(())


_LOSSY = "in memory: 25 % of requests and 25 % of replies are lost, some are late or repeated"
row("F25", _LOSSY, (*SERVED, "hybrid"), 0)(_no_plan)
row("B1", "200 mutated job files: exit code 0 or 2", ("ring",), 0)(_no_plan)
row(
    "B2", "12 damaged checkpoints to resume from: exit code 2 or 5, or the same model", ("ring",), 0
)(_no_plan)
