"""A user-defined mapping that stores its items in another mapping, which shallow copies share."""

from collections.abc import Iterator, MutableMapping
from typing import Any

from typing_extensions import override


class WrappedMapping(MutableMapping[str, Any]):
    """
    A view of another mapping.

    Args:
        wrapped: the other mapping.
    """

    def __init__(self, wrapped: MutableMapping[str, Any]) -> None:
        self.wrapped = wrapped

    @override
    def __getitem__(self, key: str) -> Any:
        return self.wrapped[key]

    @override
    def __setitem__(self, key: str, value: Any) -> None:
        self.wrapped[key] = value

    @override
    def __delitem__(self, key: str) -> None:
        del self.wrapped[key]

    @override
    def __iter__(self) -> Iterator[str]:
        return iter(self.wrapped)

    @override
    def __len__(self) -> int:
        return len(self.wrapped)
