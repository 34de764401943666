"""
One stage of one replica follows its list: computes, sends, receives, as the schedule says.

Deadlock is impossible by construction: the lists run to their ends with room for one message per
channel (`algorithms/schedule_messages.py`), and every channel has room for one at least.
"""

from typing import Any

import torch
from torch import Tensor

from distplat.strategies.algorithms.schedule_messages import Plan
from distplat.strategies.pipeline.interfaces import Source, Span, Tail
from distplat.strategies.pipeline.limits import Reached
from distplat.strategies.pipeline.run import Run, StageContext
from distplat.strategies.pipeline.trial import untouched


class Executor:
    """
    Runs plans on one rank.

    Args:
        seat: where it is.
        reached: watches what backward reaches.
    """

    def __init__(self, seat: StageContext, reached: Reached) -> None:
        self._seat, self._reached = seat, reached
        self._sizes: set[int] = set()  #: of micro-batches whose shapes are agreed
        self.spans: list[Span] = []  #: of the plan that ran last

    def train(self, plan: Plan, source: Source, tail: Tail) -> None:
        """
        Run a step's forwards and backwards; gradients are added to what is there.

        Raises:
            CollectiveError: a stage is missing.
            SpecError: see `Reached`.
        """
        self._agree_on_shapes(source)
        self._mode(training=True)
        self.spans = Run(self._seat, plan, source, tail, self._reached.look).run()
        self._reached.stepped()

    @torch.no_grad()
    def evaluate(self, plan: Plan, source: Source) -> None:
        """
        Run forwards alone; `source.loss` takes the outputs.

        Raises:
            CollectiveError: a stage is missing.
        """
        self._agree_on_shapes(source)
        self._mode(training=False)
        Run(self._seat, plan, source, None).run()

    def _mode(self, *, training: bool) -> None:
        for chunk in self._seat.chunks.values():
            chunk.set_mode(training=training)

    @torch.no_grad()
    def _agree_on_shapes(self, source: Source) -> None:
        """Pass one micro-batch of each new size through the model, stage after stage."""
        if self._seat.depth == 1:
            return
        first = {size: number for number, size in reversed([*enumerate(source.sizes)])}
        for size in sorted(first.keys() - self._sizes):
            self._mode(training=False)
            chunks: Any = self._seat.chunks.values()
            with untouched(*chunks):
                self._pass_through(source, size, first[size])
            self._sizes.add(size)

    def _pass_through(self, source: Source, size: int, number: int) -> None:
        arrived: Tensor | None = None  # from a chunk of this rank
        for place, chunk in self._seat.chunks.items():
            if place == 0:
                inputs = source.peek(number).clone()  # a layer may work in place
            elif arrived is not None:
                inputs = arrived
            else:
                inputs = self._seat.channel.hear((place, size), (place - 1) % self._seat.stages)
            arrived = None
            if place + 1 == self._seat.depth:
                continue
            with self._seat.context():
                outputs = chunk.run(inputs, 0)
            self._seat.channel.learn((place + 1, size), outputs)
            to = (place + 1) % self._seat.stages
            if to == self._seat.stage:
                arrived = outputs
            else:
                self._seat.channel.tell((place + 1, size), to)
        self._seat.channel.finish()
