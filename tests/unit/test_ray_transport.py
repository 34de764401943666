"""RayTransport maps errors of Ray; tests/cluster/ tests that Ray raises them."""

from typing import Any

import pytest
import ray

from distplat.actors.ray_transport import RayTransport
from distplat.actors.transport import ActorDied, AnswerPending, Unanswered
from distplat.platform.errors import StaleError


@pytest.mark.parametrize(
    ("raised", "expected", "text"),
    [
        (ray.exceptions.GetTimeoutError("late"), AnswerPending, ""),
        (ray.exceptions.ActorUnavailableError("no word", None), Unanswered, "no word"),
        (ray.exceptions.ActorDiedError(), ActorDied, str(ray.exceptions.ActorDiedError())),
        (ray.exceptions.OwnerDiedError("ab", None, ""), ActorDied, "OwnerDiedError"),
        (ray.exceptions.RayTaskError("push", "", StaleError("push 2")), StaleError, "push 2"),
    ],
)
def test_get_maps_errors_of_ray(
    monkeypatch: pytest.MonkeyPatch, raised: Exception, expected: type[Exception], text: str
) -> None:
    def get(reference: Any, timeout: float) -> Any:
        raise raised

    monkeypatch.setattr(ray, "get", get)
    with pytest.raises(expected) as caught:
        RayTransport().get(object(), 1.0)
    assert text in str(caught.value)
