"""Scale requests: submitted from any thread, taken once, answered once."""

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


def test_request_is_taken_once_and_pending_until_answered() -> None:
    requests = ScaleRequests()
    assert (requests.take(), requests.status()) == (None, NO_SCALE_REQUEST)
    request = requests.submit(3)
    assert request == ScaleRequest(1, 3)
    assert [requests.take(), requests.take()] == [request, None]
    assert requests.status() == ScaleStatus(request, pending=True)
    requests.answer(1, "no CPU is free")
    assert requests.status() == ScaleStatus(request, "no CPU is free")


def test_answer_to_superseded_request_is_ignored() -> None:
    requests = ScaleRequests()
    requests.submit(3)
    later = requests.submit(2)
    requests.answer(1, "no CPU is free")
    assert requests.status() == ScaleStatus(later, pending=True)
    assert requests.take() == later, "a later request supersedes an earlier one"
    requests.answer(2, "")
    assert requests.status() == ScaleStatus(later)


@pytest.mark.parametrize("later", [0, 2])
def test_duplicate_delivery_is_not_a_later_request(
    later: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The transport delivers the call twice; a request of another caller is reported."""
    requests, reason = ScaleRequests(), "no CPU is free"

    def answer(run: RunName, role: str, method: str, *args: int) -> object:
        if method == "scale":
            first = requests.submit(*args)
            requests.answer(requests.submit(later or args[0]).number, reason)
            return first
        return requests.status() if method == "scale_status" else object()

    monkeypatch.setattr(overview, "_ask", answer)
    expected = f"a later request for {later} workers" if later else reason
    with pytest.raises(SpecError, match=expected):
        overview.scale(RunName("run-1", "run"), 3, 5.0)


def test_request_numbers_are_unique_across_threads() -> None:
    requests = ScaleRequests()
    numbers: list[int] = []

    def submit_many() -> None:
        numbers.extend(requests.submit(2).number for _ in range(200))

    threads = [threading.Thread(target=submit_many) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(numbers) == list(range(1, 801))
