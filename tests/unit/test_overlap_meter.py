"""What counts as hidden behind backward, on a clock that is set by hand."""

from types import SimpleNamespace

import pytest

from distplat.strategies.fakes import Fabric
from distplat.strategies.reduction import base
from distplat.strategies.reduction.base import Meter, OverlapMeter


@pytest.mark.parametrize(
    ("starts", "finish", "end", "busy", "casting", "exposed", "hidden"),
    [
        ([10.0], 14.0, 14.0, 4.0, 0.0, 0.0, 4.0),  # all of it behind backward
        ([10.0], 14.0, 15.0, 5.0, 0.0, 1.0, 4.0),  # the last second not
        ([10.0], 14.0, 14.0, 1.0, 0.0, 0.0, 1.0),  # over long before the end of backward
        ([10.0, 13.0], 14.0, 16.0, 4.5, 0.0, 2.0, 2.5),  # two, with a pause between
        ([14.5], 14.0, 16.0, 1.5, 0.0, 2.0, 0.0),  # nothing left early
        ([], 14.0, 14.0, 0.0, 0.0, 0.0, 0.0),  # nothing left at all
        ([10.0], 14.0, 16.0, 5.5, 0.5, 1.5, 4.0),  # half a second of finish() was casting
        ([10.0], 14.0, 15.0, 9.0, 0.0, 1.0, 4.0),  # a group that counts side by side
        ([10.0], 14.0, 15.0, 0.0, 0.0, 1.0, 0.0),  # a group that does not count
    ],
)
def test_hidden_and_exposed(
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
    for later in (0.0, 100.0):  # a step leaves nothing behind for the next
        meter.begin()
        moments = [(at, meter.start) for at in starts] + [(finish, meter.finish)]
        for at, happens in sorted(moments, key=lambda moment: moment[0]):
            clock.now = later + at
            happens()
        clock.now = later + end
        group.traffic.waiting_s += busy / 4
        group.traffic.working_s += busy * 3 / 4
        meter.end(casting)
        found = meter.figures()
        assert (found["exposed_s"], found["hidden_s"]) == pytest.approx((exposed, hidden))
        whole = exposed + hidden
        assert found["hidden_fraction"] == pytest.approx(hidden / whole if whole else 0.0)


def test_a_lap_counts_from_the_last_one() -> None:
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
