"""Checks of a cut model with dropout compare it with the whole model, dropout disabled."""

import pytest
import torch
import torch.nn.functional as F
from hybrid_models import CLASSES, Mlp, hybrid_job
from local_run import train
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.model.trials import WithoutDropout
from distplat.strategies.task import Task


class DropoutModel(nn.Module):
    """Uses every dropout of torch, and adds `shift` in training mode only."""

    def __init__(self, shift: float = 0.0) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 12), nn.Linear(12, CLASSES)
        self.lstm = nn.LSTM(12, 12, 2, batch_first=True, dropout=0.5)
        self.attention = nn.MultiheadAttention(12, 2, dropout=0.5, batch_first=True)
        self.shift = shift

    def begin(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.5, self.training)
        x = F.alpha_dropout(x, training=self.training, p=0.3).unsqueeze(1)
        share = 0.5 if self.training else 0.0
        outputs: Tensor = F.scaled_dot_product_attention(x, x, x, None, share)
        return outputs

    def finish(self, x: Tensor) -> Tensor:
        x = self.lstm(x)[0]
        mixed = self.attention(x, x, x, need_weights=False)[0]
        outputs: Tensor = self.head(torch.dropout(mixed, 0.5, self.training).squeeze(1))
        return outputs

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        return self.finish(x + self.shift if self.training else x)


class MethodStage(nn.Module):
    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        children = ("first",) if method == "begin" else ("lstm", "attention", "head")
        for name in children:
            self.add_module(name, model.get_submodule(name))
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = getattr(DropoutModel, self.method)(self, x)
        return outputs


@pytest.mark.parametrize("shift", [0.0, 0.5])
def test_train_only_computation_is_detected_despite_dropout(shift: float) -> None:
    def stages(self: Task, model: nn.Module) -> list[nn.Module]:
        return [MethodStage(model, "begin"), MethodStage(model, "finish")]

    task_type = type("Own", (Mlp,), {"model": lambda self: DropoutModel(shift), "stages": stages})
    job = hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1)
    if not shift:
        train(job, task_type)
        return
    with pytest.raises(SpecError, match="do not compute what DropoutModel does in training"):
        train(job, task_type)


def test_without_dropout_keeps_other_random_functions() -> None:
    x = torch.ones(50)
    with WithoutDropout():
        assert torch.equal(F.dropout(x, p=0.5), x)
        assert torch.equal(F.feature_alpha_dropout(x.view(5, 5, 2), 0.5, True), x.view(5, 5, 2))
        assert not torch.equal(torch.rand(5), torch.rand(5))
    assert not torch.equal(F.dropout(x, 0.5), x)


class AuxiliaryHead(nn.Module):
    """Its auxiliary head reads a detached input."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.auxiliary = (
            nn.Linear(6, 12),
            nn.Linear(12, CLASSES),
            nn.Linear(12, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        outputs: Tensor = self.head(x) + self.auxiliary(x.detach())
        return outputs


class First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first = model.get_submodule("first")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


class Second(nn.Module):
    def __init__(self, model: nn.Module, detaches: bool) -> None:
        super().__init__()
        self.head, self.auxiliary = model.get_submodule("head"), model.get_submodule("auxiliary")
        self.detaches = detaches

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = self.head(x) + self.auxiliary(x.detach() if self.detaches else x)
        return outputs


@pytest.mark.parametrize("detaches", [True, False])
def test_stages_without_the_models_detach_are_refused(detaches: bool) -> None:
    def stages(self: Task, model: nn.Module) -> list[nn.Module]:
        return [First(model), Second(model, detaches)]

    task_type = type("Own", (Mlp,), {"model": lambda self: AuxiliaryHead(), "stages": stages})
    job = hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1)
    if detaches:
        train(job, task_type)
        return
    with pytest.raises(
        SpecError, match=r"give first\.\w+, .* a different gradient than AuxiliaryHead does"
    ):
        train(job, task_type)
