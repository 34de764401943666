"""The rows of a run's figures, and their means."""

import pytest

from distplat.cli.figures import StepFigures, figure_rows, mean_figures, restart_text
from distplat.platform.progress import FailureEvent, StepSummary


def step(number: int, **figures: float) -> StepSummary:
    return StepSummary(number, 0, 1.0, 8, {"data": 0.1}, 3, figures)


def test_means_exclude_the_first_step() -> None:
    history = [step(0, a=100.0), step(1, a=1.0, b=5.0), step(2, a=3.0)]
    assert mean_figures(history) == {"a": 2.0, "b": 5.0}
    assert mean_figures(history[:1]) == {"a": 100.0}
    assert mean_figures([]) == {}


TRAFFIC = {"sent_bytes": 84e6, "exposed_s": 0.01, "waiting_s": 0.0012, "working_s": 0.0104}


SERVERS = {
    "apply_s": 0.002,
    "queue_s": 0.001,
    "queue_depth": 2.0,
    "in_bytes": 8.0,
    "out_bytes": 4.0,
}


@pytest.mark.parametrize(
    ("figures", "rows"),
    [
        ({}, []),
        ({"sent_bytes": 0.0, "exposed_s": 0.0, "optimizer_state_bytes": 0.0}, []),
        ({**TRAFFIC, "sent_bytes": 0.0}, []),  # one rank: no exchange
        (
            {
                "pipeline_s": 0.2,
                "stage_busy_s": 0.17,
                "bubble_ideal": 0.111,
                "stage_sent_bytes": 2e6,
                "stage_received_bytes": 1e6,
            },
            [("pipeline", "15% bubble, 11% with equal stages; 2 MB between stages per step")],
        ),
        (
            TRAFFIC,
            [
                ("exchange", "84 MB sent per worker and step"),
                ("", "1.2 ms waiting, 10.4 ms working"),
            ],
        ),
        (
            SERVERS,
            [
                (
                    "servers",
                    "2 ms applying, 1 ms queue, 2 deep; 8 B in, 4 B out per worker and step",
                ),
            ],
        ),
        (
            {**TRAFFIC, "hidden_fraction": 0.625, "optimizer_state_bytes": 1234.0},
            [
                ("exchange", "84 MB sent per worker and step"),
                ("", "1.2 ms waiting, 10.4 ms working; 62% behind backward"),
                ("memory", "1.23 kB of optimizer state per worker"),
            ],
        ),
        (
            {
                "sent_bytes": 10.0,
                "saved_bytes": 990.0,
                "compress_s": 0.02,
                "saved_s": -0.005,
                "error_norm": 0.12345,
            },
            [
                ("exchange", "10 B sent per worker and step"),
                (
                    "compression",
                    "99% of the bytes saved, 20 ms compressing, 5 ms lost per step, "
                    "error norm 0.12",
                ),
            ],
        ),
    ],
)
def test_figure_rows(figures: StepFigures, rows: list[tuple[str, str]]) -> None:
    assert figure_rows(figures) == rows


def test_restart_text() -> None:
    failures = [
        FailureEvent(1, 9, "killed", ("worker-1",), 0.0),
        FailureEvent(2, 0, "killed", ("worker-0", "worker-1"), 0.0),
        FailureEvent(3, 5, "network", (), 0.0),
    ]
    assert [*map(restart_text, failures)] == [
        "worker-1 replaced, resumed after step 9",
        "worker-0, worker-1 replaced, resumed after step 0",
        "no actor replaced, resumed after step 5",
    ]
