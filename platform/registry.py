"""
A registry: names to things, filled by decorators, by a folder and by other packages.

It is an instance, not a global: each process builds its own and only names travel between
processes. Finding what there is to register is handed in as `discover`, called once, at the first
look-up, so that a module may import the registry that will import it.
"""

from collections.abc import Callable
from typing import Generic, TypeVar

from distplat.platform.errors import Problem, SpecError
from distplat.platform.suggest import hint

T = TypeVar("T")
U = TypeVar("U")


class Registry(Generic[T]):
    """
    Named things of one kind.

    Args:
        kind: what is registered, for messages (`strategy`).
        discover: registers everything there is; called before the first look-up.
    """

    def __init__(self, kind: str, discover: Callable[[], None] = lambda: None) -> None:
        self.kind = kind
        self._discover: Callable[[], None] | None = discover
        self._things: dict[str, T] = {}

    def register(self, name: str) -> Callable[[U], U]:
        """
        Register what is decorated under `name`; the same thing twice is fine.

        Raises:
            SpecError: another thing has the name already.
        """

        def add(thing: U) -> U:
            present = self._things.get(name)
            if present is not None and _origin(present) != _origin(thing):
                raise SpecError(
                    f"{self.kind} {name!r} is already {_origin(present)}; "
                    f"give {_origin(thing)} another name"
                )
            self._things[name] = thing  # type: ignore[assignment]
            return thing

        return add

    def get(self, name: str) -> T:
        """
        Look a name up.

        Raises:
            SpecError: nobody registered it; says what is known and what is near.
        """
        self._ensure_discovered()
        if name not in self._things:
            message = f"unknown {self.kind} {name!r}"
            raise SpecError(Problem((self.kind,), message, hint(name, self._things)))
        return self._things[name]

    def names(self) -> list[str]:
        """Give all registered names in alphabetical order."""
        self._ensure_discovered()
        return sorted(self._things)

    def _ensure_discovered(self) -> None:
        if self._discover is not None:
            discover, self._discover = self._discover, None  # it may look names up itself
            try:
                discover()
            except BaseException:
                self._discover = discover  # or the next look-up would find an empty registry
                raise


def _origin(thing: object) -> str:
    """Where a thing was defined: equal for one class reached through two imports."""
    module = getattr(thing, "__module__", type(thing).__module__)
    return f"{module}.{getattr(thing, '__qualname__', repr(thing))}"
