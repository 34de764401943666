"""Execution of plans by one thread per stage, with real layers and channels of one message."""

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
    """One stage: executes the steps of its plan."""

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
                output = output_of(self.schedule, self.stage, step)
                input_ = input_of(self.schedule, self.stage, step)
                assert output is None or output in self.have
                self.have.pop(input_, None) if input_ else None
        assert not self.live and not self.late and not self.have
        return {
            name: torch.as_tensor(parameter.grad)
            for chunk in self.chunks.values()
            for name, parameter in chunk.named_parameters()
        }

    def compute(self, kind: ActionKind, i: int, virtual_stage: int) -> None:
        chunk, key = self.chunks[virtual_stage], (i, virtual_stage)
        if kind is ActionKind.FORWARD:
            activation = Message(Content.ACTIVATION, i, virtual_stage - 1, virtual_stage)
            inputs = (self.have[activation] if virtual_stage else self.inputs[i]).requires_grad_()
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
        gradient_message = Message(Content.GRADIENT, i, virtual_stage + 1, virtual_stage)
        gradient = (
            self.have[gradient_message] if gradient_message in self.have else 2 * outputs.detach()
        )
        if self.schedule.splits_backward:
            torch.autograd.backward(outputs, gradient, inputs=[inputs], retain_graph=True)
            self.late[key] = outputs, gradient
        else:
            torch.autograd.backward(outputs, gradient)
        if virtual_stage:
            self.have[Message(Content.GRADIENT, i, virtual_stage, virtual_stage - 1)] = (
                torch.as_tensor(inputs.grad)
            )


def train_in_one_process(depth: int, micro_batches: int) -> dict[str, Tensor]:
    """Return the gradients of all micro-batches; the loss is the sum of squares."""
    full_model = model(depth)
    for inputs in batches(micro_batches):
        outputs = full_model(inputs)
        torch.autograd.backward(outputs, 2 * outputs.detach())
    return {name: torch.as_tensor(p.grad) for name, p in full_model.named_parameters()}


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
def test_plan_is_bit_identical_to_one_process(
    name: str, stages: int, micro_batches: int, chunks: int, recompute: bool
) -> None:
    schedule = build(name, stages, micro_batches, chunks)
    channels: Any = defaultdict(lambda: Queue(maxsize=1))
    for source in range(stages):
        for target in range(stages):
            channels[source, target]  # created here, because `defaultdict` is not thread-safe
    runners = [Runner(schedule, s, channels, recompute=recompute) for s in range(stages)]
    actual: dict[str, Tensor] = {}
    for gradients in on_ranks(stages, lambda rank: runners[rank].run()):
        actual |= gradients
    expected = train_in_one_process(schedule.depth, micro_batches)
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[key], expected[key]) for key in expected)
