"""Stages that hand on trees of tensors and constants: equal to a plain loop, or refused by name."""

from typing import Any

import pytest
import torch
from hybrid_models import BATCH, grid_of, hybrid_job, whole
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
"""The second batch is short: micro-batches of three sizes."""
LENGTH, WIDTH = 3, 4


class Sequences(Dataset[Any]):
    """Inputs of several tensors, as a dict."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(1)
        self.x = torch.randn(SAMPLES, LENGTH, WIDTH, generator=generator).double()
        self.mask = torch.randint(0, 2, (SAMPLES, LENGTH), generator=generator)
        self.targets = torch.randn(SAMPLES, 2, generator=generator).double()

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, at: int) -> Any:
        return {"x": self.x[at], "mask": self.mask[at]}, self.targets[at]


class Enter(nn.Module):
    """Gives what the blocks hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, inputs: dict[str, Tensor]) -> Any:
        hidden = self.linear(inputs["x"])
        angle = torch.arange(LENGTH, dtype=torch.float64).outer(torch.ones(WIDTH).double())
        around = {
            "mask": inputs["mask"],
            "rotary": (angle.cos(), angle.sin()),
            "skip": hidden.tanh(),
            "unused": hidden * 2,
            "causal": True,
            "cache": None,
        }
        return hidden, around


class Block(nn.Module):
    """Works in place on one part, reads others, hands all of them on."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.gate = nn.Linear(WIDTH, WIDTH)

    def forward(self, value: Any) -> Any:
        hidden, around = value
        assert around["causal"] is True and around["cache"] is None
        hidden += 0.5
        cos, sin = around["rotary"]
        turned = hidden * cos + hidden.flip(-1) * sin
        hidden = self.linear(turned.tanh()) * around["mask"].unsqueeze(-1)
        return hidden + self.gate(around["skip"]), around


class Leave(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, 2)

    def forward(self, value: Any) -> Tensor:
        hidden, around = value
        outputs: Tensor = self.linear((hidden + around["skip"]).mean(1))
        return outputs


class Carrying(Task):
    """Blocks that hand on floats, ints, constants, and what nobody uses."""

    block: type[nn.Module] = Block

    def model(self) -> nn.Module:
        return nn.Sequential(Enter(), *(self.block() for _ in range(3)), Leave()).double()

    def train_data(self) -> Dataset[Any]:
        return Sequences()

    def eval_data(self) -> Dataset[Any]:
        return Sequences()

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets)


class Across(nn.Module):
    """A decoder's block: reads what the encoder gave, which all blocks hand on."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 1, batch_first=True)

    def forward(self, value: Any) -> Any:
        hidden, memory = value
        return hidden + self.attention(hidden, memory, memory, need_weights=False)[0], memory


class EncoderDecoder(nn.Module):
    """No `Sequential`, with a `forward` of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.enter = Enter()
        self.blocks = nn.ModuleList(Across() for _ in range(3))
        self.leave = Leave()

    def forward(self, inputs: Any) -> Tensor:
        hidden, around = self.enter(inputs)
        memory = around["skip"]
        for block in self.blocks:
            hidden, _ = block((hidden, memory))
        outputs: Tensor = self.leave((hidden, {"skip": memory}))
        return outputs


class First(nn.Module):
    def __init__(self, enter: nn.Module) -> None:
        super().__init__()
        self.enter = enter

    def forward(self, inputs: Any) -> Any:
        hidden, around = self.enter(inputs)
        return hidden, around["skip"]


class Last(nn.Module):
    def __init__(self, leave: nn.Module) -> None:
        super().__init__()
        self.leave = leave

    def forward(self, value: Any) -> Any:
        return self.leave((value[0], {"skip": value[1]}))


class Attending(Carrying):
    def model(self) -> nn.Module:
        return EncoderDecoder().double()

    def stages(self, model: Any) -> list[nn.Module]:
        return [First(model.enter), *model.blocks, Last(model.leave)]


def plain(kind: type[Task]) -> tuple[dict[str, Tensor], float]:
    """Give the trained model, and its mean loss over all samples."""
    task, data = kind(), Sequences()
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        here = slice(step % 2 * BATCH, step % 2 * BATCH + BATCH)
        inputs = {"x": data.x[here].clone(), "mask": data.mask[here]}
        torch.autograd.backward(mean_loss(task, model(inputs), data.targets[here]))
        optimizer.step()
    with torch.no_grad():
        outputs = model({"x": data.x.clone(), "mask": data.mask})
        loss = float(mean_loss(task, outputs, data.targets))
    return {name: value.detach() for name, value in model.state_dict().items()}, loss


def run_of(kind: type[Task], stages: int = 2, **options: Any) -> LocalRun:
    chosen, workers = grid_of(stages, 1, 1, **options)
    job = hybrid_job(chosen, workers, steps=STEPS, data={"shuffle": False})
    return train(job, kind)


@pytest.mark.sweep(3)
@pytest.mark.parametrize("kind", [Carrying, Attending])
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
def test_trees_give_what_one_process_gives(
    kind: type[Task], stages: int, options: dict[str, Any]
) -> None:
    run = run_of(kind, stages, **options)
    found, (expected, loss) = whole(run), plain(kind)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name
    reports = [r for r in run.reports[-1] if isinstance(r, EvalReport) and r.samples]
    assert reports[-1].sums["loss"] / SAMPLES == pytest.approx(loss, rel=1e-10)


class Wide(Block):
    """A block with a pair of layers that slices share."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, value: Any) -> Any:
        hidden, around = super().forward(value)
        return hidden + self.down(self.up(hidden).tanh()), around


@pytest.mark.parametrize("data", [1, 2])
def test_slices_hand_on_trees_too(data: int) -> None:
    kind = type("Sliced", (Carrying,), {"block": Wide})
    plan = {"*.up": "colwise", "*.down": "rowwise"}
    chosen, workers = grid_of(2, 2, data, tensor_plan=plan)
    job = hybrid_job(chosen, workers, steps=STEPS, data={"shuffle": False})
    found, (expected, _) = whole(train(job, kind)), plain(kind)
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


class Turned(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor, angles: Tensor) -> Tensor:
        pairs = torch.view_as_complex(self.linear(hidden).unflatten(-1, (-1, 2)))
        return hidden + torch.view_as_real(pairs * angles).flatten(-2)


class Rotary(nn.Module):
    """Its blocks are given complex angles; one buffer is not saved, and one is not read."""

    angles: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Turned() for _ in range(4))
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


class Folded(nn.Module):
    def forward(self, spectrum: Tensor) -> Tensor:
        return spectrum.real + spectrum.imag


class Turning(Carrying):
    """Dicts of a model with blocks, whose first stage hands on complex constants."""

    def model(self) -> nn.Module:
        return Rotary().double()

    def forward(self, model: nn.Module, batch: Any) -> Any:
        return model(**batch[0])

    def loss(self, outputs: Any, targets: Any) -> Tensor:
        return nn.functional.mse_loss(outputs, targets[1])


class Transformed(Carrying):
    """One complex tensor crosses, to which a gradient comes back."""

    def model(self) -> nn.Module:
        layers = Spectrum(), nn.Identity(), Folded(), nn.Linear(WIDTH, 2)
        return nn.Sequential(*layers).double()


@pytest.mark.parametrize("kind", [Turning, Transformed])
@pytest.mark.parametrize("options", [{}, {"recompute": True}], ids=str)
def test_complex_tensors_cross_and_buffers_are_saved_as_of_the_whole(
    kind: type[Task], options: dict[str, Any]
) -> None:
    cut = ["blocks.2"] if kind is Turning else ["2"]
    found = whole(run_of(kind, cut=cut, **options))
    task = kind()
    torch.manual_seed(5)
    model = task.model()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    data = Sequences()
    for step in range(STEPS):
        optimizer.zero_grad()
        here = slice(step % 2 * BATCH, step % 2 * BATCH + BATCH)
        inputs = {"x": data.x[here], "mask": data.mask[here]}
        outputs = model(**inputs) if kind is Turning else model(inputs)
        torch.autograd.backward(nn.functional.mse_loss(outputs, data.targets[here]))
        optimizer.step()
    expected = model.state_dict()
    assert found.keys() == expected.keys()
    for name in expected:
        assert (found[name] - expected[name]).abs().max() < 1e-10, name


class Otherwise(Block):
    """Hands on another form in training."""

    changed: dict[str, Any]

    def forward(self, value: Any) -> Any:
        hidden, around = super().forward(value)
        if self.training:
            around = {**around, **self.changed}
        return hidden, around


@pytest.mark.parametrize(
    ("changed", "told"),
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
def test_another_form_than_agreed_is_told(changed: dict[str, Any], told: str) -> None:
    block = type("Made", (Otherwise,), {"changed": changed})
    with pytest.raises(
        SpecError, match="the input of virtual stage 1 differs from the first.*" + told
    ):
        run_of(type("Made", (Carrying,), {"block": block}), cut=["2"])


def test_a_gradient_that_would_be_lost_is_told() -> None:
    value = torch.ones(2, requires_grad=True), torch.ones(2)
    layout = ValueLayout.of(1, value)
    with pytest.raises(SpecError, match=r"virtual stage 1 .*\[1\] needs a gradient"):
        layout.tensors((value[0], value[0] * 2))
    assert len(layout.tensors((value[1], value[1]))) == 2, "one that is not there is no loss"


@pytest.mark.parametrize(
    ("value", "told"),
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
def test_values_that_no_message_takes_are_refused(value: Any, told: str) -> None:
    with pytest.raises(SpecError, match=told):
        ValueLayout.of(3, value)


def test_a_form_that_was_told_is_the_same() -> None:
    value = [torch.ones(2, 3, requires_grad=True), {"n": float("nan"), "i": torch.arange(5)}, None]
    layout = ValueLayout.from_bytes(2, ValueLayout.of(2, value).to_bytes())
    assert layout.gradient_indices == [0]
    tensors = layout.tensors(value)
    again = layout.value(tensors)
    assert again[0] is value[0] and again[1]["i"] is tensors[1] and again[2] is None


def test_where_no_tensor_needs_a_gradient_all_floats_get_one() -> None:
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
def test_several_tensors_are_one_message(tensors: list[Tensor], size: int) -> None:
    packing = Packing([(one.dtype, tuple(one.shape)) for one in tensors])
    message = packing.pack(tensors)
    assert packing.form == (torch.uint8, (size,)) == (message.dtype, tuple(message.shape))
    for found, known in zip(packing.unpack(message), tensors, strict=True):
        assert found.dtype == known.dtype and torch.equal(found, known)


def test_one_tensor_is_the_message_itself() -> None:
    tensor = torch.ones(2, 3)
    packing = Packing([(tensor.dtype, (2, 3))])
    assert packing.pack([tensor]) is tensor and packing.unpack(tensor)[0] is tensor
    assert Packing([]).form is None, "nothing to send"


class Lone(Carrying):
    """Hands on one tensor."""

    def model(self) -> nn.Module:
        class Taken(Enter):
            def forward(self, inputs: dict[str, Tensor]) -> Any:
                return super().forward(inputs)[0]

        layers = Taken(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Flatten()
        return nn.Sequential(*layers, nn.Linear(LENGTH * WIDTH, 2)).double()


@pytest.mark.parametrize(
    ("kind", "values", "gradients"),
    [
        (Lone, lambda n: 96 * n, lambda n: 96 * n),
        # hidden, mask, cos and sin, skip, unused; gradients of hidden, skip and unused
        (Carrying, lambda n: sum(map(up, [96 * n, 24 * n, 96, 96, 96 * n])) + 96 * n,
         lambda n: 2 * up(96 * n) + 96 * n),
    ],
    ids=["one", "tree"],
)  # fmt: skip
def test_bytes_between_stages(kind: type[Task], values: Any, gradients: Any) -> None:
    run = run_of(kind, cut=["2"], micro_batches=4)
    sent = [
        next(r for r in reports if isinstance(r, StepReport) and r.step == 2).figures
        for reports in run.reports
    ]
    assert [figures["stage_sent_bytes"] for figures in sent] == [4 * values(4), 4 * gradients(4)]


def up(size: int) -> int:
    """Give where the next tensor begins in a message."""
    return -(-size // 64) * 64
