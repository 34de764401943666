"""Stages that pass pytrees of tensors and constants: as a plain loop, or refused by name."""

from typing import Any

import pytest
import torch
from hybrid_models import BATCH, grid_of, hybrid_job, merge_parts
from local_run import LocalRun, train
from plain_loss import mean_loss
from torch import Tensor, nn
from torch.utils.data import Dataset

from distplat.platform.errors import SpecError
from distplat.platform.progress import EvalReport, StepReport
from distplat.strategies.pipeline.values import Packing, ValueLayout
from distplat.strategies.task import Task

STEPS = 3
SAMPLES = BATCH + 5
"""The second batch is smaller, so that micro-batches have three sizes."""
LENGTH, WIDTH = 3, 4


class Sequences(Dataset[Any]):
    """Its inputs are dicts of tensors."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator).double()
        self.mask = torch.randint(0, 2, (SAMPLES, LENGTH), generator=generator)
        self.targets = torch.randn(SAMPLES, 2, generator=generator).double()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return {"x": self.x[index], "mask": self.mask[index]}, self.targets[index]


class Enter(nn.Module):
    """Creates the values that the blocks pass on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        hidden = self.linear(inputs["x"])
        angle = torch.arange(LENGTH, dtype=torch.float64).outer(torch.ones(WIDTH).double())
        context = {
            "mask": inputs["mask"],
            "rotary": (angle.cos(), angle.sin()),
            "skip": hidden.tanh(),
            "unused": hidden * 2,
            "causal": True,
            "cache": None,
        }
        return hidden, context


class Block(nn.Module):
    """Changes one value in place, reads others, and passes all of them on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Any) -> Any:
        hidden, context = value
        assert context["causal"] is True and context["cache"] is None
        hidden += 0.5
        cos, sin = context["rotary"]
        turned = hidden * cos + hidden.flip(-1) * sin
        hidden = self.linear(turned.tanh()) * context["mask"].unsqueeze(-1)
        return hidden + self.gate(context["skip"]), context


class Leave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)

    def forward(self, value: Any) -> Tensor:
        hidden, context = value
        outputs: Tensor = self.linear((hidden + context["skip"]).mean(1))
        return outputs


class TreeTask(Task):
    """Its blocks pass on floats, ints, constants, and an unused tensor."""

    block: type[nn.Module] = Block

    def model(self) -> nn.Module:
        return nn.Sequential(Enter(), *(self.block() for _ in range(3)), Leave()).double()

    def train_data(self) -> Dataset[Any]:
        return Sequences()

    def eval_data(self) -> Dataset[Any]:
        return Sequences()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class CrossAttention(nn.Module):
    """A decoder block, which reads the encoder's output and passes it on."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, value: Any) -> Any:
        hidden, memory = value
        return hidden + self.attention(hidden, memory, memory, need_weights=False)[0], memory


class EncoderDecoder(nn.Module):
    """Not a `Sequential`."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = Enter()
        self.blocks = nn.ModuleList(CrossAttention() for _ in range(3))
        self.leave = Leave()

    def forward(self, inputs: Any) -> Tensor:
        hidden, context = self.enter(inputs)
        memory = context["skip"]
        for block in self.blocks:
            hidden, _ = block((hidden, memory))
        outputs: Tensor = self.leave((hidden, {"skip": memory}))
        return outputs


class First(nn.Module):
    def __init__(self, enter: nn.Module) -> None:
        super().__init__()
        self.enter = enter

    def forward(self, inputs: Any) -> Any:
        hidden, context = self.enter(inputs)
        return hidden, context["skip"]


class Last(nn.Module):
    def __init__(self, leave: nn.Module) -> None:
        super().__init__()
        self.leave = leave

    def forward(self, value: Any) -> Any:
        return self.leave((value[0], {"skip": value[1]}))


class EncoderDecoderTask(TreeTask):
    def model(self) -> nn.Module:
        return EncoderDecoder().double()

    def stages(self, model: Any) -> list[nn.Module]:
        return [First(model.enter), *model.blocks, Last(model.leave)]


def plain_loop(task_type: type[Task]) -> tuple[dict[str, Tensor], float]:
    """Return the trained model and its mean loss over all samples."""
    task, data = task_type(), Sequences()
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = slice(step % 2 * BATCH, step % 2 * BATCH + BATCH)
        inputs = {"x": data.x[batch].clone(), "mask": data.mask[batch]}
        torch.autograd.backward(mean_loss(task, model(inputs), data.targets[batch]))
        optimizer.step()
    with torch.no_grad():
        outputs = model({"x": data.x.clone(), "mask": data.mask})
        loss = float(mean_loss(task, outputs, data.targets))
    return {name: value.detach() for name, value in model.state_dict().items()}, loss


def run_of(task_type: type[Task], stages: int = 2, **options: Any) -> LocalRun:
    strategy, workers = grid_of(stages, 1, 1, **options)
    job = hybrid_job(strategy, workers, steps=STEPS, data={"shuffle": False})
    return train(job, task_type)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("task_type", [TreeTask, EncoderDecoderTask])
@pytest.mark.parametrize(
    ("stages", "options"),
    [
        (2, {"schedule": "gpipe"}),
        (2, {"schedule": "1f1b", "cut": "auto"}),
        (2, {"schedule": "interleaved"}),
        (2, {"schedule": "zb-h1"}),
        (2, {"recompute": True}),
        (4, {"schedule": "gpipe"}),
        (4, {"schedule": "1f1b", "recompute": True}),
        (4, {"schedule": "zb-h1"}),
    ],
    ids=str,
)
def test_trees_match_plain_loop(
    task_type: type[Task], stages: int, options: dict[str, Any]
) -> None:
    run = run_of(task_type, stages, **options)
    found, (expected, loss) = merge_parts(run), plain_loop(task_type)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name
    reports = [r for r in run.reports[-1] if isinstance(r, EvalReport) and r.samples]
    assert reports[-1].sums["loss"] / SAMPLES == pytest.approx(loss, rel=1e-10)


class SlicedBlock(Block):
    """A block with a pair of layers for tensor slices."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, value: Any) -> Any:
        hidden, context = super().forward(value)
        return hidden + self.down(self.up(hidden).tanh()), context


@pytest.mark.parametrize("data", [1, 2])
def test_trees_with_tensor_slices_match_plain_loop(data: int) -> None:
    task_type = type("Sliced", (TreeTask,), {"block": SlicedBlock})
    plan = {"*.up": "colwise", "*.down": "rowwise"}
    strategy, workers = grid_of(2, 2, data, tensor_plan=plan)
    job = hybrid_job(strategy, workers, steps=STEPS, data={"shuffle": False})
    found, (expected, _) = merge_parts(train(job, task_type)), plain_loop(task_type)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


class RotaryBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.linear(hidden).unflatten(-1, (-1, 2)))
        return hidden + torch.view_as_real(pairs * angles).flatten(-2)


class Rotary(nn.Module):
    """Its blocks take complex angles, a non-persistent buffer; another buffer is unused."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(RotaryBlock() for _ in range(4))
        angles = torch.polar(torch.ones(WIDTH // 2), torch.arange(1.0, 1 + WIDTH // 2))
        self.register_buffer("angles", angles.to(torch.complex128), persistent=False)
        self.register_buffer("version", torch.tensor(3))
        self.leave = nn.Linear(WIDTH, 2)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x, self.angles)
        outputs: Tensor = self.leave(x.mean(1))
        return outputs


class Spectrum(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: dict[str, Tensor]) -> Tensor:
        spectrum: Tensor = torch.fft.fft(self.linear(inputs["x"].mean(1)))
        return spectrum


class RealPlusImag(nn.Module):
    def forward(self, spectrum: Tensor) -> Tensor:
        return spectrum.real + spectrum.imag


class RotaryTask(TreeTask):
    """Its first stage passes complex constants on."""

    def model(self) -> nn.Module:
        return Rotary().double()

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch[0])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets[1])


class SpectrumTask(TreeTask):
    """A complex tensor that needs a gradient crosses the cut."""

    def model(self) -> nn.Module:
        layers = Spectrum(), nn.Identity(), RealPlusImag(), nn.Linear(WIDTH, 2)
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("task_type", [RotaryTask, SpectrumTask])
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_complex_tensors_and_buffers_match_plain_loop(
    task_type: type[Task], options: dict[str, Any]
) -> None:
    cut = ["blocks.2"] if task_type is RotaryTask else ["2"]
    found = merge_parts(run_of(task_type, cut=cut, **options))
    task = task_type()
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = Sequences()
    for step in range(STEPS):
        optimizer.zero_grad()
        batch = slice(step % 2 * BATCH, step % 2 * BATCH + BATCH)
        inputs = {"x": data.x[batch], "mask": data.mask[batch]}
        outputs = model(**inputs) if task_type is RotaryTask else model(inputs)
        torch.autograd.backward(nn.functional.mse_loss(outputs, data.targets[batch]))
        optimizer.step()
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


class ChangingBlock(Block):
    """Passes on another structure in training."""

    changed: dict[str, Any]

    def forward(self, value: Any) -> Any:
        hidden, context = super().forward(value)
        if self.training:
            context = {**context, **self.changed}
        return hidden, context


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"causal": False}, r"\[1\]\['causal'\] is False, not True"),
        ({"causal": 1}, r"\[1\]\['causal'\] is 1, not True"),
        ({"cache": "full"}, r"\[1\]\['cache'\] is 'full', not None"),
        ({"cache": (1, 2)}, r"it is \(\*, {.*'cache': \(\*, \*\)}\), not \(\*, {.*'cache': \*}\)"),
        ({"mask": None}, r"\[1\]\['mask'\] is None, not int64 \[\d, 3\]"),
        ({"skip": torch.zeros(7)}, r"\[1\]\['skip'\] is float32 \[7\], not float64 \[\d, 3, 4\]"),
    ],
    ids=str,
)
def test_changed_structure_is_refused(changed: dict[str, Any], message: str) -> None:
    block = type("Made", (ChangingBlock,), {"changed": changed})
    with pytest.raises(
        SpecError, match="the input of virtual stage 1 differs from the first.*" + message
    ):
        run_of(type("Made", (TreeTask,), {"block": block}), cut=["2"])


def test_unexpected_gradient_is_refused() -> None:
    value = torch.ones(2, requires_grad=True), torch.ones(2)
    layout = ValueLayout.of(1, value)
    with pytest.raises(SpecError, match=r"virtual stage 1 .*\[1\] needs a gradient"):
        layout.tensors((value[0], value[0] * 2))
    assert len(layout.tensors((value[1], value[1]))) == 2, "an absent gradient is accepted"


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ((torch.ones(1), object()), r"virtual stage 3 has object at \[1\]"),
        ({"a": 1}, r"virtual stage 3 has no tensor \(dict\)"),
        (torch.ones(1, dtype=torch.uint16), "virtual stage 3 has a tensor of torch.uint16,"),
        ([torch.eye(2).to_sparse()], r"virtual stage 3 has a tensor of torch.sparse_coo at \[0\]"),
        (
            {(1, 2): torch.ones(1)},
            r"virtual stage 3 has containers that cannot be serialized, .*\{\(1, 2\): \*\}",
        ),
        (
            (nn.utils.rnn.pack_sequence([torch.ones(2)]), None),
            r"virtual stage 3 has containers that cannot be serialized, .*PackedSequence",
        ),
    ],
    ids=["object", "constants", "uint16", "sparse", "keys", "packed"],
)
def test_unsupported_values_are_refused(value: Any, message: str) -> None:
    with pytest.raises(SpecError, match=message):
        ValueLayout.of(3, value)


def test_layout_serialization_round_trip() -> None:
    value = [torch.ones(2, 3, requires_grad=True), {"n": float("nan"), "i": torch.arange(5)}, None]
    layout = ValueLayout.from_bytes(2, ValueLayout.of(2, value).to_bytes())
    assert layout.gradient_indices == [0]
    tensors = layout.tensors(value)
    restored = layout.value(tensors)
    assert restored[0] is value[0] and restored[1]["i"] is tensors[1] and restored[2] is None


def test_all_floats_get_a_gradient_if_none_requires_it() -> None:
    assert ValueLayout.of(1, (torch.ones(1), torch.arange(2), torch.ones(3))).gradient_indices == [
        0,
        2,
    ]


@pytest.mark.parametrize(
    ("tensors", "size"),
    [
        ([torch.randn(2, 3), torch.arange(5, dtype=torch.int8), torch.tensor(2.5).double()], 136),
        ([torch.ones(3, 2).t(), torch.tensor([True])], 65),
        ([torch.ones(0, 4), torch.ones(1)], 4),
    ],
    ids=["types", "strides", "empty"],
)
def test_packing_several_tensors(tensors: list[Tensor], size: int) -> None:
    packing = Packing([(tensor.dtype, tuple(tensor.shape)) for tensor in tensors])
    message = packing.pack(tensors)
    assert packing.form == (torch.uint8, (size,)) == (message.dtype, tuple(message.shape))
    for unpacked, expected in zip(packing.unpack(message), tensors, strict=True):
        assert unpacked.dtype == expected.dtype and torch.equal(unpacked, expected)


def test_packing_one_tensor_does_not_copy() -> None:
    tensor = torch.ones(2, 3)
    packing = Packing([(tensor.dtype, (2, 3))])
    assert packing.pack([tensor]) is tensor and packing.unpack(tensor)[0] is tensor
    assert Packing([]).form is None, "there is no message"


class SingleTensorTask(TreeTask):
    """Passes on a single tensor."""

    def model(self) -> nn.Module:
        class HiddenOnly(Enter):
            def forward(self, inputs: dict[str, Tensor]) -> Any:
                return super().forward(inputs)[0]

        layers = HiddenOnly(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(LENGTH * WIDTH, 2)).double()


@pytest.mark.parametrize(
    ("task_type", "values", "gradients"),
    [
        (SingleTensorTask, lambda n: 96 * n, lambda n: 96 * n),
        # hidden, mask, cos and sin, skip, unused; gradients of hidden, skip and unused
        (TreeTask, lambda n: sum(map(aligned, [96 * n, 24 * n, 96, 96, 96 * n])) + 96 * n,
         lambda n: 2 * aligned(96 * n) + 96 * n),
    ],
    ids=["one tensor", "tree"],
)  # fmt: skip
def test_bytes_sent_between_stages(task_type: type[Task], values: Any, gradients: Any) -> None:
    run = run_of(task_type, cut=["2"], micro_batches=4)
    sent = [
        next(r for r in reports if isinstance(r, StepReport) and r.step == 2).figures
        for reports in run.reports
    ]
    assert [figures["stage_sent_bytes"] for figures in sent] == [4 * values(4), 4 * gradients(4)]


def aligned(size: int) -> int:
    """Round up to the offset of the next tensor in a message."""
    return -(-size // 64) * 64
