"""
All exceptions of distplat, as one class hierarchy.

    DistplatError                  exit 70  an error that distplat did not foresee
    |- SpecError                        2   invalid job file, option, argument or task; no training
    |- ClusterUnreachable               3   no Ray cluster, or one with another version or token
    |- UserCodeError                    1   the user's task raised; never retried
    |- ScriptFailed                     1   a user's script exited with an error
    |- NonFiniteError                   1   a loss or gradient is NaN or infinite; never retried
    |- InfrastructureError              4   a part of the platform was lost
    |  |- ActorLost                         a worker, server node or the server manager died
    |  |- DeadlineExceeded                  a wait timed out; names the missing roles
    |  |- Abandoned                         a wait was canceled because another rank was lost
    |  |- CollectiveError                   a collective failed or timed out; names missing ranks
    |  |  `- MismatchError                  ranks call different operations; never retried
    |  |- PeerLost                          the same, in a train function's torch.distributed
    |  |- StateLost                         no surviving rank has a part of the state
    |  `- RestartsExhausted                 failures exhausted the restart budget
    |- ProtocolError                    4   a message that must not be applied
    |  |- GapError                          a push is missing before this one
    |  |- StaleError                        a push older than the last committed one
    |  |- FencedError                       a message of an earlier attempt
    |  `- NotReadyError                     a shard without parameters
    |- StorageError                     5   the run directory, or its copy, could not be written
    `- Interrupted              130/143/129 Ctrl-C, SIGTERM or SIGHUP

Exceptions cross processes by pickle: every constructor passes all its arguments to `Exception`, so
`DistplatError.__reduce__` can rebuild each of them; a test pickles the whole hierarchy.
"""

# Importable without site-packages, hence without `typing_extensions.override`.
# mypy: disable-error-code="explicit-override"

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
    r"|[\u202a-\u202e\u2066-\u2069]"  # bidirectional controls, which reorder the text after them
)
_SURROGATE = re.compile(r"[\ud800-\udfff]")


def printable(text: str) -> str:
    """
    Remove terminal control sequences from a text; line ends and tabs stay.

    Every output of a command passes through here, because names, errors and logs may come from
    other users.
    """
    return _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))


def encodable(text: str, stream: TextIO) -> str:
    """Escape letters that a stream's encoding lacks as `\\u2588`; `write` may raise otherwise."""
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


@dataclass(frozen=True)
class Problem:
    """One problem in the user's input."""

    where: tuple[str | int, ...]
    """Path of the field, for example `("optimizer", "lr")`; empty: the document itself."""
    message: str
    """The problem and the allowed values, in one sentence."""
    hint: str = ""
    """How to fix it, for example `did you mean 'momentum'?`."""
    file: str = ""
    line: int = 0
    """1-based; 0: unknown."""
    column: int = 0
    """1-based; 0: unknown."""

    @property
    def field(self) -> str:
        """Dotted name, for example `optimizer.lr`, safe for a terminal."""
        return ".".join(_visible(str(part)) for part in self.where)

    def __str__(self) -> str:
        """`job.yaml:7:13: optimizer.momentun: unknown field`, and a hint line if there is one."""
        position = self.file
        if position and self.line:
            position += f":{self.line}:{self.column}"
        head = ": ".join(part for part in (position, self.field, self.message) if part)
        return printable(f"{head}\n  hint: {self.hint}" if self.hint else head)


def _visible(part: str) -> str:
    """Shorten a part of a name and escape non-printable characters."""
    plain = part if part.isprintable() else repr(part)[1:-1]
    return plain if len(plain) <= 60 else f"{plain[:57]}..."


class DistplatError(Exception):
    """Base class of all exceptions of distplat."""

    exit_code: int = 70

    def __reduce__(self) -> tuple[type[Self], tuple[object, ...]]:
        """Rebuild from `args`; the default fails for constructors with other signatures."""
        return type(self), self.args

    def _render_traceback_(self) -> list[str]:
        """Return the message for IPython instead of a traceback of internal frames."""
        return [f"{type(self).__name__}: {self}"]


class SpecError(DistplatError):
    """The job file, an override or an option is wrong. Holds all problems, not only the first."""

    exit_code = 2

    def __init__(self, *problems: Problem | str) -> None:
        super().__init__(*problems)
        self.problems = tuple(p if isinstance(p, Problem) else Problem((), p) for p in problems)

    def __str__(self) -> str:
        """One line per problem, with hints below."""
        return "\n".join(str(problem) for problem in self.problems)


@contextmanager
def naming_path(path: object, *where: str) -> Iterator[None]:
    """
    Convert an `OSError` about a user's path, for example a too long one, to a `SpecError`.

    Args:
        path: name of the path in the message.
        where: field or option with the path, for example `--resume`.

    Raises:
        SpecError: the block raised `OSError`.
    """
    try:
        yield
    except OSError as error:
        raise SpecError(Problem(where, f"{path}: {error.strerror or error}")) from None


class ClusterUnreachable(DistplatError):
    """No Ray cluster answers at the address, or one with another version or token."""

    exit_code = 3


class UserCodeError(DistplatError):
    """
    The user's task raised. Holds the user's traceback as text.

    Args:
        rank: the rank; None: the task's module failed to import outside of a rank.
        step: the step, from 1; None: before the first step.
        summary: the exception and its message; the middle of a long message is omitted.
        traceback: the user's frames; equal to the summary if there are none.
        remedy: a hint, if known.
        evaluating: whether it raised in the evaluation after that step.
        on_ranks: affected ranks and nodes, for example `ranks 1, 3 (node gpu-2, 10.0.0.7)`; empty:
            only `rank`.
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
        """The traceback, then rank, step and summary."""
        return f"{self.frames}\n\n{self.text}" if self.frames else self.text

    @property
    def frames(self) -> str:
        """The traceback; empty if it adds nothing to the summary."""
        text = self.traceback.rstrip()
        return "" if text == self.summary else text

    @property
    def text(self) -> str:
        """Rank, step and summary, with the remedy on a line of its own."""
        where = "in the evaluation after" if self.evaluating else "in"
        at = "before the first step" if self.step is None else f"{where} step {self.step}"
        at = "in the evaluation before the first step" if self.step == 0 else at
        on = self.on_ranks or f"rank {self.rank}"
        text = f"your task failed on {on}, {at}: {self.summary}"
        if self.rank is None:
            text = f"your task's module cannot be imported: {self.summary}"
        return f"{text}\n  hint: {self.remedy}" if self.remedy else text


class ScriptFailed(DistplatError):
    """A process of a user's script exited with an error."""

    exit_code = 1

    @classmethod
    def of(cls, rank: int, code: int, ended: Collection[int] = ()) -> Self:
        """
        Build the error for a process.

        Args:
            rank: of the process.
            code: its exit code; negative: the number of a signal.
            ended: ranks that exited with 0 before: other ranks that wait for them fail.
        """
        if code > 0:
            text = f"rank {rank} ended with exit code {code}; its last lines say why"
            return cls(f"{text}. {ranks_text(ended)} had ended before, with 0" if ended else text)
        hint = "; was it the system's out-of-memory killer?" if -code == signal.SIGKILL else ""
        signal_names = {s.value: s.name for s in signal.Signals}
        return cls(f"rank {rank} was killed by {signal_names.get(-code, f'signal {-code}')}{hint}")


class NonFiniteError(DistplatError):
    """A loss or a gradient is NaN or infinite. Names rank, step and first parameter."""

    exit_code = 1

    def __init__(self, rank: int, step: int, what: str, own_loop: bool = False) -> None:
        super().__init__(rank, step, what, own_loop)
        self.rank, self.step, self.what, self.own_loop = rank, step, what, own_loop

    def __str__(self) -> str:
        """Step, rank, value, and how to avoid it."""
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
    """A part of the platform was lost; not an error of the user's code."""

    exit_code = 4


_DEAD_NODE = re.compile(r"node has died\. Node Id: (\w+)")
"""Ray's message, the only place of the node's id."""


class ActorLost(InfrastructureError):
    """A process of the job died or does not answer."""

    def __init__(self, role: str, step: int | None, cause: str, remedy: str = "") -> None:
        super().__init__(role, step, cause, remedy)
        self.role, self.step, self.cause, self.remedy = role, step, cause, remedy

    @property
    def dead_node(self) -> str:
        """Ray's id of the node that died with this process; empty: the node lives."""
        match = _DEAD_NODE.search(self.cause)
        return match[1] if match else ""

    def __str__(self) -> str:
        """Role, step, cause and remedy."""
        at = "" if self.step is None else f" after step {self.step}"
        tail = f"; {self.remedy}" if self.remedy else ""
        return f"{self.role} was lost{at}: {self.cause}{tail}"


class DeadlineExceeded(InfrastructureError):
    """A wait timed out. Names the missing roles and the deadline's field, if it has one."""

    def __init__(
        self, what: str, missing: tuple[str, ...], seconds: float, setting: str, remedy: str = ""
    ) -> None:
        super().__init__(what, missing, seconds, setting, remedy)
        self.what, self.missing, self.seconds, self.setting = what, missing, seconds, setting
        self.remedy = remedy

    def __str__(self) -> str:
        """What was waited for and how long, the missing roles, and the remedy."""
        missing = ", ".join(self.missing) or "none (a late answer)"
        text = f"{self.what}: waited {self.seconds:g} s, missing: {missing}"
        text += f"; `{self.setting}` changes this deadline" if self.setting else ""
        return f"{text}; {self.remedy}" if self.remedy else text


class Abandoned(InfrastructureError):
    """This rank was told to stop: another rank was lost, or the number of ranks changes."""


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
    """Ranks call different operations, or one with different shapes; never retried."""

    def __str__(self) -> str:
        """`all_reduce #12 of group g: ranks do not match: ...`; `missing`: the differing ranks."""
        return (
            f"{self.operation} #{self.number} of group {self.group!r}: "
            f"ranks do not match: {self.cause}"
        )


class PeerLost(InfrastructureError):
    """torch.distributed, called by a train function, lost another rank."""


class StateLost(InfrastructureError):
    """No surviving rank has a part of the state: all ranks must return to the last checkpoint."""

    def __init__(self, what: str) -> None:
        super().__init__(what)
        self.what = what

    def __str__(self) -> str:
        """The lost state, and the consequence."""
        return f"{self.what} was lost with its ranks: the run rolls back to the last checkpoint"


class RestartsExhausted(InfrastructureError):
    """The run failed again after its restart budget was exhausted."""

    def __init__(self, reason: str, failures: tuple[str, ...]) -> None:
        super().__init__(reason, failures)
        self.reason, self.failures = reason, failures

    def __str__(self) -> str:
        """Why there is no further restart, then one line per failure."""
        return "\n  ".join([f"gave up: {self.reason}; failures so far:", *self.failures])


class ProtocolError(DistplatError):
    """A message that a shard must not apply."""

    exit_code = 4


class GapError(ProtocolError):
    """A push arrived before its predecessor: applying it would lose the missing one."""


class StaleError(ProtocolError):
    """A push older than the last committed one: applying it would count it twice."""


class FencedError(ProtocolError):
    """A message of an earlier attempt, from a process that was replaced."""


class NotReadyError(ProtocolError):
    """A shard without parameters: new, or restarted."""


class StorageError(DistplatError):
    """The run directory cannot be written or read."""

    exit_code = 5


class Interrupted(DistplatError):
    """The run was interrupted by SIGINT, SIGTERM or SIGHUP."""

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
    Return the known name closest to `name`, or None if none is close.

    Case and `-`/`_` are ignored: `Ps_Sync` is close to `ps-sync`.
    """
    by_folded = {_fold(k): k for k in known}
    cutoff = 0.6 if len(name) > 2 else 0.5  # allows one wrong letter of two
    hits = get_close_matches(_fold(name), by_folded, n=1, cutoff=cutoff)
    return by_folded[hits[0]] if hits else None


def hint(name: str, known: Iterable[str], label: str = "allowed") -> str:
    """
    Return `did you mean 'ring'? allowed: ps-sync, ring`; without a close name only the list.

    Args:
        name: the given name.
        known: all valid names.
        label: the word before the list.
    """
    names = sorted(known)
    near = nearest(name, names)
    allowed = f"{label}: {', '.join(names)}" if names else f"none is {label} here"
    return f"did you mean {near!r}? {allowed}" if near else allowed


def _fold(name: str) -> str:
    return name.casefold().replace("_", "-")
