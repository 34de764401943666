"""How a backward is listened to: which parameters' gradients it has finished."""

from collections.abc import Callable

from torch import Tensor
from torch.utils.hooks import RemovableHandle

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.training.flat import FlatModel


def listen(flat: FlatModel, heard: Callable[[int, str], None]) -> list[RemovableHandle]:
    """
    Call `heard` with place and name of each parameter whose gradient a backward has finished.

    Returns:
        Hooks, to be removed when nobody listens any more.
    """

    def hook(place: int, name: str) -> Callable[[Tensor], None]:
        return lambda _: heard(place, name)

    return [
        flat.parameters[place].register_post_accumulate_grad_hook(  # type: ignore[no-untyped-call]
            hook(place, slot.name)
        )
        for place, slot in enumerate(flat.trained_slots)
    ]


def came_again(name: str) -> SpecError:
    """Say that a gradient changed after it was sent."""
    text = f"the gradient of {name!r} came again after it was sent: backward within backward"
    hint = "set `overlap: false`, or use checkpointing with use_reentrant=False"
    return SpecError(Problem(("strategy", "overlap"), text, hint))
