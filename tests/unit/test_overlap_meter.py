"""Communication time hidden by backward, measured with a fake clock."""

from types import SimpleNamespace

import pytest

from distplat.strategies.fakes import Fabric
from distplat.strategies.reduction import base
from distplat.strategies.reduction.base import Meter, OverlapMeter


@pytest.mark.parametrize(
    ("starts", "finish", "end", "busy", "casting", "exposed", "hidden"),
    [
        ([10.0], 14.0, 14.0, 4.0, 0.0, 0.0, 4.0),  # entirely hidden
        ([10.0], 14.0, 15.0, 5.0, 0.0, 1.0, 4.0),  # the last second is exposed
        ([10.0], 14.0, 14.0, 1.0, 0.0, 0.0, 1.0),  # ends long before the end of backward
        ([10.0, 13.0], 14.0, 16.0, 4.5, 0.0, 2.0, 2.5),  # two operations with a pause between
        ([14.5], 14.0, 16.0, 1.5, 0.0, 2.0, 0.0),  # no operation started early
        ([], 14.0, 14.0, 0.0, 0.0, 0.0, 0.0),  # no operation
        ([10.0], 14.0, 16.0, 5.5, 0.5, 1.5, 4.0),  # half a second of finish() was casting
        ([10.0], 14.0, 15.0, 9.0, 0.0, 1.0, 4.0),  # concurrent operations counted separately
        ([10.0], 14.0, 15.0, 0.0, 0.0, 1.0, 0.0),  # the group does not measure
    ],
)
def test_meter_splits_hidden_and_exposed_time(
    monkeypatch: pytest.MonkeyPatch,
    starts: list[float],
    finish: float,
    end: float,
    busy: float,
    casting: float,
    exposed: float,
    hidden: float,
) -> None:
    clock = SimpleNamespace(now=9.0)
    monkeypatch.setattr(base, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    group = Fabric(1).collective(0)
    group.traffic.working_s = 100.0  # of earlier steps
    meter = OverlapMeter(group)
    for offset in (0.0, 100.0):  # a step does not affect the next
        meter.begin()
        events = [(start, meter.start) for start in starts] + [(finish, meter.finish)]
        for time, callback in sorted(events, key=lambda event: event[0]):
            clock.now = offset + time
            callback()
        clock.now = offset + end
        group.traffic.waiting_s += busy / 4
        group.traffic.working_s += busy * 3 / 4
        meter.end(casting)
        figures = meter.figures()
        assert (figures["exposed_s"], figures["hidden_s"]) == pytest.approx((exposed, hidden))
        total = exposed + hidden
        assert figures["hidden_fraction"] == pytest.approx(hidden / total if total else 0.0)


def test_lap_counts_since_the_last_lap() -> None:
    group = Fabric(1).collective(0)
    group.traffic.sent_bytes = 100
    meter = Meter(group)
    group.traffic.sent_bytes += 5
    group.traffic.received_bytes += 6
    group.traffic.waiting_s += 0.5
    group.traffic.working_s += 0.25
    expected = {"sent_bytes": 5, "received_bytes": 6, "waiting_s": 0.5, "working_s": 0.25}
    assert meter.lap() == expected
    assert not any(meter.lap().values())
