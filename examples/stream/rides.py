"""
A stream of hourly rides from bicycle stations, read from Parquet files.

    python rides.py data                       write the files
    python rides.py data runs/RUN/model.safetensors rides.png       draw the predictions of a run

The numbers of rides are generated from a known model: a rate for each station, hour, weekday and
temperature, and a Poisson draw. So the optimal loss is known.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor, nn
from torch.utils.data import IterableDataset

from distplat import Task

STATIONS, FILES, ROWS, GROUP = 40, 6, 20_000, 4_000


class Rides(Task):
    """
    Predict the rides of an hour at a station.

    Args:
        folder: folder of the files, relative to this file.
        width: size of the hidden layers.
    """

    def __init__(self, folder: str = "data", width: int = 64) -> None:
        self.folder, self.width = Path(__file__).parent / folder, width

    def model(self) -> nn.Module:
        return Rate(self.width)

    def train_data(self) -> Rows:
        return Rows(sorted(self.folder.glob("train-*.parquet")))

    def eval_data(self) -> Rows:
        return Rows([self.folder / "held-out.parquet"])

    def collate(self, rows: Sequence[Mapping[str, Any]]) -> tuple[tuple[Tensor, Tensor], Tensor]:
        """Decode a worker's own rows; rows of other workers are read but not decoded."""
        stations = torch.tensor([row["station"] for row in rows])
        times = np.array([row["time"] for row in rows], "datetime64[h]").astype(np.int64)
        numbers = [*_features(times, np.array([row["celsius"] for row in rows]))]
        facts = torch.tensor(np.stack(numbers, 1), dtype=torch.float32)
        counts = torch.tensor([(row["rides"], row["rate"]) for row in rows], dtype=torch.float32)
        return (stations, facts), counts

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(*batch[0])

    def loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return nn.functional.poisson_nll_loss(outputs, batch[1][:, 0])

    def metrics(self, outputs: Tensor, batch: Any) -> Mapping[str, float]:
        """Return the loss with the true rates."""
        rides, rate = batch[1].unbind(1)
        return {"best_loss": float(nn.functional.poisson_nll_loss(rate.log(), rides))}


class Rate(nn.Module):
    """The logarithm of a station's rate of rides in an hour."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.station = nn.Embedding(STATIONS, 8)
        self.layers = nn.Sequential(
            nn.Linear(8 + 6, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, 1),
        )

    def forward(self, stations: Tensor, facts: Tensor) -> Tensor:
        log_rates: Tensor = self.layers(torch.cat([self.station(stations), facts], 1))
        return log_rates.squeeze(1)


class Rows(IterableDataset[dict[str, Any]]):
    """
    The rows of several files in sequence, with a resumable position.

    Args:
        files: paths in the order of reading.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        if not files:
            raise FileNotFoundError("no Parquet files: write them by `python rides.py data`")
        self.files = files
        self._next = self._start = (0, 0, 0)  #: file, row group, row

    def __iter__(self) -> Iterator[dict[str, Any]]:
        start, self._start = self._start, (0, 0, 0)
        for number, path in enumerate(self.files):
            file = pq.ParquetFile(path)
            for group in range(file.num_row_groups):
                if (number, group) < start[:2]:
                    continue
                first = start[2] if (number, group) == start[:2] else 0
                rows = file.read_row_group(group).to_pylist()
                for place in range(first, len(rows)):
                    self._next = number, group, place + 1
                    yield rows[place]

    def state_dict(self) -> dict[str, Any]:
        """Return the position of the next row."""
        return {"next": list(self._next)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue at a saved position."""
        file, group, row = state["next"]
        self._next = self._start = (file, group, row)


def _features(hours: Any, celsius: Any) -> Iterator[Any]:
    """Yield time of day and of week as sine and cosine, a weekend flag, and the temperature."""
    for period in (24, 168):
        angle = 2 * math.pi * (hours % period) / period
        yield np.sin(angle)
        yield np.cos(angle)
    yield (hours // 24 + 3) % 7 >= 5  # 1970 began on a Thursday
    yield celsius / 20 - 0.5


def rates(stations: Any, hours: Any, celsius: Any) -> Any:
    """Return the expected rides: commuters on weekdays, leisure on weekends, fewer in the cold."""
    hour, weekend = hours % 24, (hours // 24 + 3) % 7 >= 5
    commuters = (1 + stations % 5) * (_bump(hour - 8, 1.5) + _bump(hour - 17.5, 2))
    strollers = (1 + stations % 3) * _bump(hour - 14, 4)
    return np.where(weekend, strollers, commuters + 0.2 * strollers) * np.exp(celsius / 25) + 0.1


def _bump(distance: Any, width: float) -> Any:
    return np.exp(-((distance / width) ** 2))


def write(folder: Path, rows: int = ROWS) -> None:
    """Write files of `rows` rows each, with the same content every time."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, name in enumerate([*(f"train-{n}" for n in range(FILES)), "held-out"]):
        rng = np.random.default_rng(number)
        stations, hours = rng.integers(0, STATIONS, rows), rng.integers(0, 8760, rows)
        celsius = 12 - 10 * np.cos(hours / 8760 * 2 * math.pi) + rng.normal(0, 4, rows)
        time = np.datetime64("2025-01-01T00", "h") + hours
        rate = rates(stations, time.astype(np.int64), celsius)
        columns = {
            "station": stations,
            "time": time.astype(str),
            "celsius": celsius.round(1),
            "rides": rng.poisson(rate),
            "rate": rate,
        }
        pq.write_table(pa.table(columns), folder / f"{name}.parquet", row_group_size=GROUP)


def draw(model_file: Path, picture: Path) -> None:
    """Draw the true and the learnt rates of a week at two stations."""
    import matplotlib.pyplot as plt
    from safetensors.torch import load_file

    model = Rate(Rides().width)
    model.load_state_dict(load_file(model_file))
    first = np.datetime64("2025-05-05T00", "h").astype(np.int64)
    hours, celsius = np.arange(first, first + 168), np.full(168, 18.0)
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.8), sharey=True, layout="constrained")
    for axis, station in zip(axes, (5, 14), strict=True):
        stations = np.full(168, station)
        facts = torch.tensor(np.stack([*_features(hours, celsius)], 1), dtype=torch.float32)
        with torch.no_grad():
            learnt = model(torch.tensor(stations), facts).exp().numpy()
        axis.plot(rates(stations, hours, celsius), color="0.6", label="as they are made")
        axis.plot(learnt, color="tab:blue", linewidth=1, label="learnt")
        axis.set(title=f"station {station}, a week in May at 18 °C", xlabel="hour of the week")
    axes[0].set_ylabel("rides an hour")
    axes[1].legend(loc="upper right", framealpha=1.0)
    axes[0].set_ylim(0, 16)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    if len(sys.argv) == 4:
        draw(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        write(Path(sys.argv[1]))
