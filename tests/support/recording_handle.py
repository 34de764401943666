"""An actor's handle that records its calls and makes none."""

from typing import Any


class RecordingHandle:
    """Takes any call `handle.name.remote(...)`, and records it as `(name, ...)`."""

    def __init__(self) -> None:
        self.calls: list[tuple[Any, ...]] = []

    def __getattr__(self, name: str) -> Any:
        class Method:
            @staticmethod
            def remote(*args: Any) -> None:
                self.calls.append((name, *args))

        return Method
