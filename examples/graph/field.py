"""
Graphs of different sizes: a field is measured at some nodes, and a network predicts the rest.

    python field.py runs/RUN/model.safetensors field.png       draw the predictions of a run

The nodes of a graph are random points, with edges from their nearest neighbours. The field is drawn
from a Gaussian process, so the optimal prediction is known: the mean of the process conditioned on
the measurements.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat import Task

SMALLEST, LARGEST = 20, 60
NEIGHBOURS = 5
RANGE, NOISE = (
    0.25,
    0.1,
)  # correlation length of the field, standard deviation of the measurement noise


class Graph(NamedTuple):
    """
    One graph, or several graphs as one disconnected graph.

    Attributes:
        nodes: [nodes, 2]: the measurement, or 0; and whether the node is measured.
        edges: [2, edges]: source and target node.
        offsets: [edges, 3]: horizontal, vertical and total distance.
        graph: [nodes]: graph index of each node.
    """

    nodes: Tensor
    edges: Tensor
    offsets: Tensor
    graph: Tensor


class Fields(Task):
    """
    Predict a field at the nodes without a measurement.

    Args:
        graphs: number of training graphs.
        width: size of a node's vector.
        rounds: number of message-passing rounds.
    """

    def __init__(self, graphs: int = 2_000, width: int = 32, rounds: int = 3) -> None:
        self.graphs, self.width, self.rounds = graphs, width, rounds
        self.best = NodeMean()

    def model(self) -> nn.Module:
        return MessagePassing(self.width, self.rounds)

    def train_data(self) -> Dataset[Any]:
        return Drawn(range(self.graphs))

    def eval_data(self) -> Dataset[Any]:
        return Drawn(range(10_000_000, 10_000_400), best=True)

    def collate(self, samples: Sequence[tuple[Graph, Tensor]]) -> tuple[Graph, Tensor]:
        """Join graphs into one: node indices are offset by the number of nodes before."""
        graphs, targets = zip(*samples, strict=True)
        sizes = torch.tensor([len(graph.nodes) for graph in graphs])
        starts = sizes.cumsum(0) - sizes
        return Graph(
            torch.cat([graph.nodes for graph in graphs]),
            torch.cat([g.edges + start for g, start in zip(graphs, starts, strict=True)], 1),
            torch.cat([graph.offsets for graph in graphs]),
            torch.arange(len(graphs)).repeat_interleave(sizes),
        ), torch.cat(targets)

    def loss(self, outputs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return sum and weight, since workers have different numbers of hidden nodes."""
        hidden = targets[:, 1]
        return (hidden * (outputs - targets[:, 0]) ** 2).sum(), hidden.sum()

    def metrics(self, outputs: Tensor, targets: Tensor) -> Mapping[str, Any]:
        """Return the loss of the optimal prediction, over the hidden nodes of all workers."""
        self.best.update(*self.loss(targets[:, 2], targets))
        return {"best_loss": self.best}


class MessagePassing(nn.Module):
    """
    Message passing along edges, with the mean over the graph as an additional input.

    Args:
        width: size of a node's vector.
        rounds: number of message-passing rounds.
    """

    def __init__(self, width: int, rounds: int) -> None:
        super().__init__()
        self.enter = nn.Linear(2, width)
        self.messages = nn.ModuleList(_layers(2 * width + 3, width) for _ in range(rounds))
        self.updates = nn.ModuleList(_layers(3 * width, width) for _ in range(rounds))
        self.leave = nn.Linear(width, 1)

    def forward(self, batch: Graph) -> Tensor:
        """Return the field at each node, shape [nodes]."""
        nodes, edges, offsets, graph = batch
        values = self.enter(nodes)
        graphs = int(graph[-1]) + 1
        for message, update in zip(self.messages, self.updates, strict=True):
            messages = message(torch.cat([values[edges[0]], values[edges[1]], offsets], 1))
            received = _mean(messages, edges[1], len(nodes))
            graph_mean = _mean(values, graph, graphs)[graph]
            values = values + update(torch.cat([values, received, graph_mean], 1))
        field: Tensor = self.leave(values)
        return field.squeeze(1)


def _layers(inputs: int, width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(inputs, width), nn.GELU(), nn.Linear(width, width))


def _mean(rows: Tensor, group: Tensor, groups: int) -> Tensor:
    """Return the mean of the rows of each group."""
    total = rows.new_zeros(groups, rows.shape[1]).index_add(0, group, rows)
    return total / group.bincount(minlength=groups).clamp(min=1).unsqueeze(1)


class NodeMean:
    """A mean over the nodes of all batches and workers."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.total, self.count = 0.0, 0.0

    def update(self, total: Tensor, count: Tensor) -> None:
        self.total, self.count = self.total + float(total), self.count + float(count)

    def merge(self, other: NodeMean) -> None:
        self.total, self.count = self.total + other.total, self.count + other.count

    def compute(self) -> float:
        return self.total / self.count if self.count else 0.0


class Drawn(Dataset[tuple[Graph, Tensor]]):
    """
    Random graphs, each seeded by its number.

    Args:
        numbers: numbers of the graphs.
        best: whether targets contain the optimal prediction.
    """

    def __init__(self, numbers: range, *, best: bool = False) -> None:
        self.numbers = numbers
        self.draw = cache(lambda index: drawn(numbers[index], best=best)[1:])

    def __len__(self) -> int:
        return len(self.numbers)

    def __getitem__(self, index: int) -> tuple[Graph, Tensor]:
        graph, targets = self.draw(index)
        return graph, targets


def drawn(number: int, *, best: bool = False) -> tuple[Tensor, Graph, Tensor]:
    """
    Draw a graph.

    Returns:
        Positions of the nodes, [n, 2], from 0 to 1; the graph; and targets, [n, 3]: the field,
        whether the node is hidden, and the optimal prediction with `best`, otherwise 0.
    """
    generator = torch.Generator().manual_seed(number)
    size = int(torch.randint(SMALLEST, LARGEST + 1, (), generator=generator))
    places = torch.rand(size, 2, generator=generator, dtype=torch.float64)
    distances = torch.cdist(places, places)
    covariance = torch.exp(-((distances / RANGE) ** 2) / 2)
    root = torch.linalg.cholesky(covariance + 1e-6 * torch.eye(size))
    field = (root @ torch.randn(size, generator=generator, dtype=torch.float64)).float()
    known = torch.rand(size, generator=generator) < 0.5
    known[0], known[1] = True, False  # at least one measured and one hidden node
    measured = (field + NOISE * torch.randn(size, generator=generator)) * known
    nearest = distances.topk(NEIGHBOURS + 1, largest=False).indices[:, 1:]  # without the node
    edges = torch.stack([nearest.flatten(), torch.arange(size).repeat_interleave(NEIGHBOURS)])
    offsets = ((places[edges[0]] - places[edges[1]]) / RANGE).float()
    offsets = torch.cat([offsets, offsets.norm(dim=1, keepdim=True)], 1)
    graph = Graph(
        torch.stack([measured, known.float()], 1), edges, offsets, torch.zeros(size).long()
    )
    guess = best_guess(covariance, measured, known) if best else torch.zeros(size)
    return places, graph, torch.stack([field, (~known).float(), guess], 1)


def best_guess(covariance: Tensor, measured: Tensor, known: Tensor) -> Tensor:
    """Return the mean of the process at all nodes, conditioned on the measurements."""
    among = covariance[known][:, known] + NOISE**2 * torch.eye(int(known.sum()))
    weights: Tensor = torch.linalg.solve(among, measured[known].double())
    return (covariance[:, known] @ weights).float()


def draw(model_file: Path, picture: Path) -> None:
    """Draw the field of two graphs: the true field, the measurements, and the predictions."""
    import matplotlib.pyplot as plt
    from safetensors.torch import load_file

    task = Fields()
    model = task.model()
    model.load_state_dict(load_file(model_file))
    figure, axes = plt.subplots(2, 3, figsize=(9, 5.6), layout="constrained")
    for row, number in zip(axes, (10_000_001, 10_000_004), strict=True):
        places, graph, targets = drawn(number)
        with torch.no_grad():
            filled = torch.where(targets[:, 1] > 0, model(graph), graph.nodes[:, 0])
        known = targets[:, 1] == 0
        shown = {
            "the field": (targets[:, 0], known | True),
            "measured": (graph.nodes[:, 0], known),
            "filled in": (filled, known | True),
        }
        for axis, (title, (values, where)) in zip(row, shown.items(), strict=True):
            axis.plot(*places[graph.edges].permute(2, 0, 1), color="0.85", linewidth=0.6, zorder=0)
            axis.scatter(*places.T, s=18, color="white", edgecolor="0.6", zorder=1)
            points = axis.scatter(
                *places[where].T, c=values[where], s=36, cmap="RdBu", vmin=-2, vmax=2, zorder=2
            )
            axis.set(title=f"{title}, {len(places)} nodes" if axis is row[0] else title)
            axis.set(xticks=[], yticks=[], aspect="equal")
        figure.colorbar(points, ax=row)
    figure.savefig(picture, dpi=110)


if __name__ == "__main__":
    draw(Path(sys.argv[1]), Path(sys.argv[2]))
