"""
Every error that distplat raises on purpose, in one tree.

    DistplatError                  exit 70  something distplat did not foresee
    |- SpecError                        2   bad job file, option, argument or task; nothing trained
    |- ClusterUnreachable               3   no Ray there, or none that takes our version or token
    |- UserCodeError                    1   the user's task raised; never retried
    |- ScriptFailed                     1   a script that is run as it is ended with an error
    |- NonFiniteError                   1   a loss or gradient is NaN or infinite; never retried
    |- InfrastructureError              4   a part of the platform was lost
    |  |- ActorLost                         a worker, server node or the server manager died
    |  |- DeadlineExceeded                  a wait ran out; names who was missing
    |  |- Abandoned                         a wait was called off, for another rank was lost
    |  |- CollectiveError                   a collective failed or timed out; names missing ranks
    |  |  `- MismatchError                  ranks are in different operations; never retried
    |  |- PeerLost                          the same, in a function's torch.distributed
    |  |- StateLost                         no rank that is left has a part of the state
    |  `- RestartsExhausted                 failures came back until the restart budget was spent
    |- ProtocolError                    4   a message that must not be applied
    |  |- GapError                          a push is missing before this one
    |  |- StaleError                        a push older than the last one committed
    |  |- FencedError                       a message of an earlier attempt
    |  `- NotReadyError                     a shard that has no parameters yet
    |- StorageError                     5   the run directory, or its copy, could not be written
    `- Interrupted              130/143/129 Ctrl-C, SIGTERM or SIGHUP

Errors cross processes by pickle: every constructor hands all its arguments to `Exception`, so
`DistplatError.__reduce__` can rebuild each of them; a test sends the whole tree round.
"""

import re
import signal
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Self, TextIO

_CONTROL = re.compile(
    r"\x1b\[[0-9;?]*[ -/]*[@-~]"  # colours, cursor
    r"|[\x00-\x08\x0b-\x1f\x7f\x80-\x9f]"
    r"|[\u202a-\u202e\u2066-\u2069]"  # these turn the order of what follows
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """
    Take out of a text what would steer a terminal; ends of lines and tabs stay.

    Everything that a command prints goes through this, for names, errors and logs may be those of
    somebody else.
    """
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))


def encodable(text: str, stream: TextIO) -> str:
    """Write letters that a stream's encoding lacks as `\\u2588`: else its `write` may raise."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with what the user wrote."""

    where: tuple[str | int, ...]
    """Path of the field, for example `("optimizer", "lr")`; empty: the document itself."""
    message: str
    """What is wrong and what is allowed, in one sentence."""
    hint: str = ""
    """What to do about it, for example `did you mean 'momentum'?`."""
    file: str = ""
    line: int = 0
    """1-based; 0: not known."""
    column: int = 0
    """1-based; 0: not known."""

    @property
    def field(self) -> str:
        """The dotted name, for example `optimizer.lr`, fit for a terminal."""
        return ".".join(_visible(str(part)) for part in self.where)

    def __str__(self) -> str:
        """`job.yaml:7:13: optimizer.momentun: unknown field` and, if there is one, a hint line."""
        position = self.file
        if position and self.line:
            position += f":{self.line}:{self.column}"
        head = ": ".join(part for part in (position, self.field, self.message) if part)
        return printable(f"{head}\n  hint: {self.hint}" if self.hint else head)


def _visible(part: str) -> str:
    """Shorten a part of a name and escape what would move the cursor: users' typos come here."""
    plain = part if part.isprintable() else repr(part)[1:-1]
    return plain if len(plain) <= 60 else f"{plain[:57]}..."


class DistplatError(Exception):
    """Root of the tree: catch this to catch all of ours."""

    exit_code: int = 70

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        """Rebuild from `args`: a constructor of our own would otherwise break unpickling."""
        return type(self), self.args

    def _render_traceback_(self) -> list[str]:
        """Give what IPython shows in place of a traceback, whose frames would be all ours."""
        return [f"{type(self).__name__}: {self}"]


class SpecError(DistplatError):
    """The job file, an override or an option is wrong. Holds every problem found, not the first."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        super().__init__(*problems)
        self.problems = tuple(p if isinstance(p, Problem) else Problem((), p) for p in problems)

    def __str__(self) -> str:
        """One line per problem, hints below."""
        return "\n".join(str(problem) for problem in self.problems)


@contextmanager
def naming_path(path: object, *where: str) -> Iterator[None]:
    """
    Tell what the system says of a path that the user gave, for example that it is too long.

    Args:
        path: as it is to be called.
        where: what gave it, for example `--resume`.

    Raises:
        SpecError: the block raised `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise SpecError(Problem(where, f"{path}: {error.strerror or error}")) from None


class ClusterUnreachable(DistplatError):
    """No Ray cluster answers at the address, or none that takes our version or our token."""

    exit_code = 3


class UserCodeError(DistplatError):
    """
    The user's task raised. Carries the user's own traceback as text.

    Args:
        rank: whose; None: no rank's, when its module was imported to be looked at.
        step: in which, from 1; None: before the first.
        summary: the exception and its message; of a long one the middle is left out.
        traceback: with the user's frames only; the summary, if there are none.
        remedy: what to do about it, where that is known.
        evaluating: it was in the evaluation after that step.
        on_ranks: which ranks it was, and where, for example `ranks 1, 3 (node gpu-2, 10.0.0.7)`;
            empty: `rank` alone.
    """

    exit_code = 1

    def __init__(
        self,
        rank: int | None,
        step: int | None,
        summary: str,
        traceback: str,
        remedy: str = "",
        evaluating: bool = False,
        on_ranks: str = "",
    ) -> None:
        super().__init__(rank, step, summary, traceback, remedy, evaluating, on_ranks)
        self.rank, self.step, self.summary, self.traceback = rank, step, summary, traceback
        self.remedy, self.evaluating, self.on_ranks = remedy, evaluating, on_ranks

    def __str__(self) -> str:
        """The traceback first, then what failed where."""
        return f"{self.frames}\n\n{self.text}" if self.frames else self.text

    @property
    def frames(self) -> str:
        """The traceback; empty where it says no more than the summary does."""
        text = self.traceback.rstrip()
        return "" if text == self.summary else text

    @property
    def text(self) -> str:
        """Rank, step and summary, and the remedy on a line of its own."""
        where = "in the evaluation after" if self.evaluating else "in"
        at = "before the first step" if self.step is None else f"{where} step {self.step}"
        at = "in the evaluation before the first step" if self.step == 0 else at
        on = self.on_ranks or f"rank {self.rank}"
        text = f"your task failed on {on}, {at}: {self.summary}"
        if self.rank is None:
            text = f"your task's module cannot be imported: {self.summary}"
        return f"{text}\n  hint: {self.remedy}" if self.remedy else text


class ScriptFailed(DistplatError):
    """A process of a script that is run as it is ended with an error; the text says which."""

    exit_code = 1

    @classmethod
    def of(cls, rank: int, code: int, ended: Collection[int] = ()) -> Self:
        """
        Say how a process ended.

        Args:
            rank: the process's.
            code: its exit code; a negative one is that of a signal.
            ended: ranks that had ended by then, with 0: whoever waits for them fails.
        """
        if code > 0:
            text = f"rank {rank} ended with exit code {code}; its last lines say why"
            return cls(f"{text}. {ranks_text(ended)} had ended before, with 0" if ended else text)
        hint = "; was it the system's out-of-memory killer?" if -code == signal.SIGKILL else ""
        signal_names = {one.value: one.name for one in signal.Signals}
        return cls(f"rank {rank} was killed by {signal_names.get(-code, f'signal {-code}')}{hint}")


class NonFiniteError(DistplatError):
    """A loss or a gradient holds NaN or infinity. Names rank, step and first parameter."""

    exit_code = 1

    def __init__(self, rank: int, step: int, what: str, own_loop: bool = False) -> None:
        super().__init__(rank, step, what, own_loop)
        self.rank, self.step, self.what, self.own_loop = rank, step, what, own_loop

    def __str__(self) -> str:
        """Where it happened, what was found, and what to do."""
        who = f"rank {self.rank}" if self.rank >= 0 else "several ranks"
        advice = (
            "set `clip_norm`; `failure.non_finite: skip` leaves such steps out, `ignore` applies "
            "them"
        )
        if self.own_loop:
            advice = (
                "call `torch.nn.utils.clip_grad_norm_` before the step; `failure.non_finite: "
                "ignore` applies such steps"
            )
        found = f"step {self.step + 1}, {who}: {self.what}; the step was not applied"
        return f"{found} (lower the learning rate or {advice})"


class InfrastructureError(DistplatError):
    """A part of the platform was lost; the user's code is not to blame."""

    exit_code = 4


_DEAD_NODE = re.compile(r"node has died\. Node Id: (\w+)")
"""Ray's words. Its errors have the number nowhere else."""


class ActorLost(InfrastructureError):
    """A process of the job died or no longer answers."""

    def __init__(self, role: str, step: int | None, cause: str, remedy: str = "") -> None:
        super().__init__(role, step, cause, remedy)
        self.role, self.step, self.cause, self.remedy = role, step, cause, remedy

    @property
    def dead_node(self) -> str:
        """Ray's number of the node that died, and this process with it; empty: it stands."""
        match = _DEAD_NODE.search(self.cause)
        return match[1] if match else ""

    def __str__(self) -> str:
        """Who, when, why, and what to do."""
        at = "" if self.step is None else f" after step {self.step}"
        tail = f"; {self.remedy}" if self.remedy else ""
        return f"{self.role} was lost{at}: {self.cause}{tail}"


class DeadlineExceeded(InfrastructureError):
    """A wait ran out. Names what was missing, and the deadline's setting; empty: it has none."""

    def __init__(
        self, what: str, missing: tuple[str, ...], seconds: float, setting: str, remedy: str = ""
    ) -> None:
        super().__init__(what, missing, seconds, setting, remedy)
        self.what, self.missing, self.seconds, self.setting = what, missing, seconds, setting
        self.remedy = remedy

    def __str__(self) -> str:
        """What was waited for, for how long, who did not come, and what to do."""
        missing = ", ".join(self.missing) or "nobody (a late answer)"
        text = f"{self.what}: waited {self.seconds:g} s, missing: {missing}"
        text += f"; `{self.setting}` changes this deadline" if self.setting else ""
        return f"{text}; {self.remedy}" if self.remedy else text


class Abandoned(InfrastructureError):
    """This rank was told to stop: another one was lost, or their number changes. Orders follow."""


class CollectiveError(InfrastructureError):
    """A collective operation failed. Names group, operation, its number and the missing ranks."""

    def __init__(
        self, group: str, operation: str, number: int, missing: tuple[int, ...], cause: str
    ) -> None:
        super().__init__(group, operation, number, missing, cause)
        self.group, self.operation, self.number = group, operation, number
        self.missing, self.cause = missing, cause

    def __str__(self) -> str:
        """`all_reduce #12 of group g: missing ranks 1, 3 (cause)`."""
        ranks = ", ".join(map(str, self.missing)) or "none"
        return (
            f"{self.operation} #{self.number} of group {self.group!r} failed; "
            f"missing ranks: {ranks}; {self.cause}"
        )


class MismatchError(CollectiveError):
    """Ranks are in different operations, or in one with different shapes. No retry helps."""

    def __str__(self) -> str:
        """`all_reduce #12 of group g: ranks do not match: ...`; `missing` are those that differ."""
        return (
            f"{self.operation} #{self.number} of group {self.group!r}: "
            f"ranks do not match: {self.cause}"
        )


class PeerLost(InfrastructureError):
    """torch.distributed, called by a train function, lost another rank."""


class StateLost(InfrastructureError):
    """No rank that is left has a part of the state: all must go back to the last checkpoint."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        """What is lost, and what follows."""
        return f"{self.what} was lost with its ranks: all go back to the last checkpoint"


class RestartsExhausted(InfrastructureError):
    """The run was restarted as often as it may be, and failed again."""

    def __init__(self, reason: str, failures: tuple[str, ...]) -> None:
        super().__init__(reason, failures)
        self.reason, self.failures = reason, failures

    def __str__(self) -> str:
        """Why no further restart is made, then every failure on a line of its own."""
        return "\n  ".join([f"gave up: {self.reason}; failures so far:", *self.failures])


class ProtocolError(DistplatError):
    """A message that a shard must not apply."""

    exit_code = 4


class GapError(ProtocolError):
    """A push came before the one it follows: applying it would lose the one between."""


class StaleError(ProtocolError):
    """A push older than the last one committed: applying it would count it twice."""


class FencedError(ProtocolError):
    """A message of an earlier attempt, from a process that was replaced."""


class NotReadyError(ProtocolError):
    """A shard that holds no parameters yet: a fresh one, or one that was restarted."""


class StorageError(DistplatError):
    """The run directory cannot be written or read."""

    exit_code = 5


class Interrupted(DistplatError):
    """The user (SIGINT), the system (SIGTERM) or an end of the session (SIGHUP) asks for an end."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(signal_number)
        self.signal_number = signal_number
        self.exit_code = 128 + signal_number  # the shell's convention

    def __str__(self) -> str:
        """`interrupted by SIGINT`."""
        names = {1: "SIGHUP", 2: "SIGINT", 15: "SIGTERM"}
        return f"interrupted by {names.get(self.signal_number, self.signal_number)}"


def ranks_text(ranks: Collection[int]) -> str:
    """`rank 1`, or `ranks 1, 3`."""
    return f"{'rank' if len(ranks) == 1 else 'ranks'} {', '.join(map(str, ranks))}"


def nearest(name: str, known: Iterable[str]) -> str | None:
    """
    Give the known name closest to `name`, or None where none is near.

    Case and `-`/`_` do not count as a difference: `Ps_Sync` is near `ps-sync`.
    """
    by_folded = {_fold(k): k for k in known}
    cutoff = 0.6 if len(name) > 2 else 0.5  # one wrong letter of two
    hits = get_close_matches(_fold(name), by_folded, n=1, cutoff=cutoff)
    return by_folded[hits[0]] if hits else None


def hint(name: str, known: Iterable[str], they_are: str = "allowed") -> str:
    """
    Give `did you mean 'ring'? allowed: ps-sync, ring`; without a near name only the list.

    Args:
        name: what was given.
        known: what there is.
        they_are: the word before the list.
    """
    names = sorted(known)
    near = nearest(name, names)
    allowed = f"{they_are}: {', '.join(names)}" if names else f"none is {they_are} here"
    return f"did you mean {near!r}? {allowed}" if near else allowed


def _fold(name: str) -> str:
    return name.casefold().replace("_", "-")
