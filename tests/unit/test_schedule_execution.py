"""Plans followed step by step by threads with real layers and channels of one message."""

from collections import defaultdict
from queue import Queue
from typing import Any

import pytest
import torch
from rank_threads import on_ranks
from torch import Tensor, nn

from distplat.strategies.algorithms.pipeline_schedule import (
    ActionKind,
    Content,
    Message,
    PipelineSchedule,
    Recv,
    Send,
    build,
    input_of,
    output_of,
    with_communication,
)
from distplat.strategies.model.layers import Stage, layers_of
from distplat.strategies.model.module_options import recomputed

WAIT_S = 60.0
WIDTH = 6


def model(depth: int) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        *(nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(depth))
    ).double()


def batches(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(3, WIDTH, generator=generator).double() for _ in range(count)]


class Runner:
    """One stage: does what its list says, and nothing else."""

    def __init__(
        self, schedule: PipelineSchedule, stage: int, channels: Any, *, recompute: bool
    ) -> None:
        self.schedule, self.stage, self.channels = schedule, stage, channels
        self.recompute = recompute
        layers = layers_of(model(schedule.depth))
        virtual_stages = range(stage, schedule.depth, schedule.stages)
        self.chunks = {
            virtual_stage: Stage(layers[virtual_stage : virtual_stage + 1])
            for virtual_stage in virtual_stages
        }
        self.inputs = batches(schedule.micro_batches)
        self.have: dict[Message, Tensor] = {}
        self.live: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}
        self.late: dict[tuple[int, int], tuple[Tensor, Tensor]] = {}

    def run(self) -> dict[str, Tensor]:
        for step in with_communication(self.schedule).steps[self.stage]:
            if isinstance(step, Send):
                sent = step.message, self.have.pop(step.message)
                self.channels[self.stage, step.to].put(sent, timeout=WAIT_S)
            elif isinstance(step, Recv):
                message, tensor = self.channels[step.source, self.stage].get(timeout=WAIT_S)
                assert message == step.message
                self.have[message] = tensor
            else:
                self.compute(
                    step.kind, step.micro_batch, self.schedule.virtual_stage(self.stage, step)
                )
                made = output_of(self.schedule, self.stage, step)
                needed = input_of(self.schedule, self.stage, step)
                assert made is None or made in self.have
                self.have.pop(needed, None) if needed else None
        assert not self.live and not self.late and not self.have
        named = [pair for chunk in self.chunks.values() for pair in chunk.named_parameters()]
        return {name: torch.as_tensor(parameter.grad) for name, parameter in named}

    def compute(self, kind: ActionKind, i: int, virtual_stage: int) -> None:
        chunk, key = self.chunks[virtual_stage], (i, virtual_stage)
        if kind is ActionKind.FORWARD:
            before = Message(Content.ACTIVATION, i, virtual_stage - 1, virtual_stage)
            inputs = (self.have[before] if virtual_stage else self.inputs[i]).requires_grad_()
            outputs = recomputed(chunk, inputs) if self.recompute else chunk(inputs)
            self.live[key] = inputs, outputs
            if virtual_stage < self.schedule.depth - 1:
                self.have[Message(Content.ACTIVATION, i, virtual_stage, virtual_stage + 1)] = (
                    outputs.detach()
                )
            return
        if kind is ActionKind.WEIGHT:
            outputs, gradient = self.late.pop(key)
            torch.autograd.backward(outputs, gradient, inputs=[*chunk.parameters()])
            return
        inputs, outputs = self.live.pop(key)
        behind = Message(Content.GRADIENT, i, virtual_stage + 1, virtual_stage)
        gradient = self.have[behind] if behind in self.have else 2 * outputs.detach()
        if self.schedule.splits_backward:
            torch.autograd.backward(outputs, gradient, inputs=[inputs], retain_graph=True)
            self.late[key] = outputs, gradient
        else:
            torch.autograd.backward(outputs, gradient)
        if virtual_stage:
            self.have[Message(Content.GRADIENT, i, virtual_stage, virtual_stage - 1)] = (
                torch.as_tensor(inputs.grad)
            )


def alone(depth: int, micro_batches: int) -> dict[str, Tensor]:
    """One process, one micro-batch after the other; the loss is the sum of squares."""
    whole = model(depth)
    for inputs in batches(micro_batches):
        outputs = whole(inputs)
        torch.autograd.backward(outputs, 2 * outputs.detach())
    return {name: torch.as_tensor(p.grad) for name, p in whole.named_parameters()}


@pytest.mark.parametrize("recompute", [False, True], ids=["kept", "recomputed"])
@pytest.mark.parametrize(
    ("name", "stages", "micro_batches", "chunks"),
    [
        ("gpipe", 3, 5, 1),
        ("1f1b", 3, 5, 1),
        ("1f1b", 4, 2, 1),
        ("zb-h1", 3, 5, 1),
        ("interleaved", 2, 6, 2),  # activations and gradients share the channels
        ("interleaved", 3, 6, 3),
        ("interleaved", 1, 3, 2),  # nothing to send
    ],
)
def test_a_plan_gives_the_bits_of_one_process(
    name: str, stages: int, micro_batches: int, chunks: int, recompute: bool
) -> None:
    schedule = build(name, stages, micro_batches, chunks)
    channels: Any = defaultdict(lambda: Queue(maxsize=1))
    for source in range(stages):
        for target in range(stages):
            channels[source, target]  # made here, not by two threads at once
    runners = [Runner(schedule, s, channels, recompute=recompute) for s in range(stages)]
    found: dict[str, Tensor] = {}
    for gradients in on_ranks(stages, lambda rank: runners[rank].run()):
        found |= gradients
    expected = alone(schedule.depth, micro_batches)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[key], expected[key]) for key in expected)
