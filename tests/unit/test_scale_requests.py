"""Requests for another number of workers: asked from any thread, taken once, answered once."""

import threading

import pytest

from distplat.actors import overview
from distplat.actors.overview import RunName
from distplat.platform.errors import SpecError
from distplat.platform.scaling import (
    NO_SCALE_REQUEST,
    ScaleRequest,
    ScaleRequests,
    ScaleStatus,
)


def test_a_request_is_taken_once_and_is_pending_until_it_is_answered() -> None:
    requests = ScaleRequests()
    assert (requests.take(), requests.status()) == (None, NO_SCALE_REQUEST)
    request = requests.submit(3)
    assert request == ScaleRequest(1, 3)
    assert [requests.take(), requests.take()] == [request, None]
    assert requests.status() == ScaleStatus(request, pending=True)
    requests.answer(1, "no CPU is free")
    assert requests.status() == ScaleStatus(request, "no CPU is free")


def test_the_answer_to_an_earlier_request_comes_too_late() -> None:
    requests = ScaleRequests()
    requests.submit(3)
    later = requests.submit(2)
    requests.answer(1, "no CPU is free")
    assert requests.status() == ScaleStatus(later, pending=True)
    assert requests.take() == later, "the one before counts no more"
    requests.answer(2, "")
    assert requests.status() == ScaleStatus(later)


@pytest.mark.parametrize("meanwhile", [0, 2])
def test_who_asks_is_no_rival_of_itself(meanwhile: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The call is carried out twice on its way; what another one asks for is told."""
    requests, refused = ScaleRequests(), "no CPU is free"

    def ask(run: RunName, role: str, method: str, *args: int) -> object:
        if method == "scale":
            first = requests.submit(*args)
            requests.answer(requests.submit(meanwhile or args[0]).number, refused)
            return first
        return requests.status() if method == "scale_status" else object()

    monkeypatch.setattr(overview, "_ask", ask)
    told = f"a later request for {meanwhile} workers" if meanwhile else refused
    with pytest.raises(SpecError, match=told):
        overview.scale(RunName("run-1", "run"), 3, 5.0)


def test_requests_of_many_threads_have_numbers_of_their_own() -> None:
    requests = ScaleRequests()
    numbers: list[int] = []

    def ask() -> None:
        numbers.extend(requests.submit(2).number for _ in range(200))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 801))
