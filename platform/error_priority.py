"""Which error explains a failed run, and whether new processes could help."""

from distplat.platform.errors import (
    ActorLost,
    DeadlineExceeded,
    DistplatError,
    InfrastructureError,
    MismatchError,
    SpecError,
    UserCodeError,
)


def repairable(error: DistplatError) -> bool:
    """Say whether new processes could help; nobody would come to a second start either."""
    if isinstance(error, MismatchError):
        return False
    if isinstance(error, DeadlineExceeded) and error.setting == "failure.start_timeout_s":
        return False
    return isinstance(error, InfrastructureError)


def weight(error: DistplatError) -> int:
    """How well an error explains a failed run: the user's own first, a death before its effects."""
    match error:
        case UserCodeError() | SpecError():
            return 3
        case ActorLost():
            return 2
        case DeadlineExceeded():
            return 1
        case _:
            return 0
