"""An actor's handle that only notes what is asked of it."""

from typing import Any


class Told:
    """Takes any call `told.name.remote(...)`, and notes it as `(name, ...)`."""

    def __init__(self) -> None:
        self.told: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> None:
                self.told.append((name, *args))

        return Method
