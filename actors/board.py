"""The port `Board` over Ray's key-value store; who ends a run takes all of its words back."""

from distplat.actors import compat
from distplat.actors.messages import rendezvous_key


class RayBoard:
    """
    The board of one run.

    Args:
        run: its name.
    """

    def __init__(self, run: str) -> None:
        self._run = run

    def first(self, name: str, value: bytes) -> bytes:
        """See `Board`."""
        key = rendezvous_key(f"{self._run}#{name}")
        compat.put_first(key, value)
        found = compat.get(key)
        return value if found is None else found
