"""Sum the gradient vector in buckets."""

from distplat.strategies.base import Collective
from distplat.strategies.training.flat import FlatModel


class BucketReducer:
    """All at once, for now."""

    def __init__(
        self,
        flat: FlatModel,
        collective: Collective,
        bucket_bytes: int,
        *,
        overlap: bool = True,
        wire_dtype: str | None = None,
    ) -> None:
        self._flat, self._collective = flat, collective

    def last_backward(self) -> None:
        """See `Reducer`."""

    def finish(self) -> None:
        """See `Reducer`."""
        self._collective.all_reduce(self._flat.grads)

    def figures(self) -> dict[str, float]:
        """See `Reducer`."""
        return {}

    def close(self) -> None:
        """See `Reducer`."""
