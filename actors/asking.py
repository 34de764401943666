"""
Calls to the server group whose answer may get lost on its way: asked again until one comes.

Ray says `ActorUnavailableError` when it does not know whether a call was carried out. Every call
that is made here may be made twice: pushes and pulls are numbered (`platform/ledger.py`), the rest
gives the same answer again. `docs/decisions/asking_again.md` says why Ray's own retries do not do.
"""

import logging
import time
from collections.abc import Callable, Sequence
from typing import Any

import ray

from distplat.platform.errors import ActorLost, DeadlineExceeded

logger = logging.getLogger(__name__)

AGAIN_S = 0.05
"""Pause before a call is made again."""
LOOK_S = 0.1
"""How often who waits looks round."""
Call = Callable[[], Any]
"""Makes a call to an actor; gives the reference to its answer."""


def ask(
    what: str,
    calls: Sequence[Call],
    names: Sequence[str],
    limit_s: float,
    setting: str,
    look: Callable[[], object] | None = None,
) -> list[Any]:
    """
    Make calls side by side, and wait for their answers.

    Args:
        what: is asked, for messages.
        calls: may each be made more than once.
        names: of who is asked, one for each call.
        limit_s: deadline of all of them.
        setting: the field of `failure` that changes it.
        look: called ten times a second while an answer is missing; what it raises ends the wait.

    Raises:
        ActorLost, DeadlineExceeded: somebody is gone, or frozen.
        DistplatError: what the other side raised.
    """
    until = time.monotonic() + limit_s
    open_calls = [call() for call in calls]
    answers: list[Any] = [None] * len(calls)
    for index, call in enumerate(calls):
        while True:
            try:
                if look is not None:
                    _watch(open_calls[index], until, look)
                left = max(0.0, until - time.monotonic())
                answers[index] = ray.get(open_calls[index], timeout=left)
                break
            except ray.exceptions.GetTimeoutError:
                late = ray.wait(open_calls, num_returns=len(calls), timeout=0)[1]
                missing = tuple(names[open_calls.index(one)] for one in late)
                raise DeadlineExceeded(what, missing, limit_s, f"failure.{setting}") from None
            except ray.exceptions.ActorUnavailableError:
                if time.monotonic() > until:
                    missing = (names[index],)
                    raise DeadlineExceeded(what, missing, limit_s, f"failure.{setting}") from None
                logger.warning("%s: no answer from %s, asking again", what, names[index])
                time.sleep(AGAIN_S)
                open_calls[index] = call()
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayActorError as error:
                cause = str(error).strip().splitlines()[0]
                raise ActorLost(names[index], None, cause) from None
    return answers


def _watch(call: Any, until: float, look: Callable[[], object]) -> None:
    """Return when the call is answered or it is too late."""
    while time.monotonic() < until and not ray.wait([call], timeout=LOOK_S)[0]:
        look()
