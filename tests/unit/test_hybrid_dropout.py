"""What a model with dropout does in training alone, before it is cut: compared without dropout."""

import pytest
import torch
import torch.nn.functional as F
from hybrid_models import CLASSES, Mlp, hybrid_job
from local_run import train
from torch import Tensor, nn

from distplat.platform.errors import SpecError
from distplat.strategies.model.trials import WithoutDropout
from distplat.strategies.task import Task


class Attentive(nn.Module):
    """Drops in every way that torch has, and in training alone does more than its layers."""

    def __init__(self, more: float = 0.0) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(6, 12), nn.Linear(12, CLASSES)
        self.lstm = nn.LSTM(12, 12, 2, batch_first=True, dropout=0.5)
        self.attention = nn.MultiheadAttention(12, 2, dropout=0.5, batch_first=True)
        self.more = more

    def begin(self, x: Tensor) -> Tensor:
        x = F.dropout(self.first(x), 0.5, self.training)
        x = F.alpha_dropout(x, training=self.training, p=0.3).unsqueeze(1)
        share = 0.5 if self.training else 0.0
        made: Tensor = F.scaled_dot_product_attention(x, x, x, None, share)
        return made

    def go_on(self, x: Tensor) -> Tensor:
        x = self.lstm(x)[0]
        mixed = self.attention(x, x, x, need_weights=False)[0]
        made: Tensor = self.head(torch.dropout(mixed, 0.5, self.training).squeeze(1))
        return made

    def forward(self, x: Tensor) -> Tensor:
        x = self.begin(x)
        return self.go_on(x + self.more if self.training else x)


class Called(nn.Module):
    def __init__(self, model: nn.Module, method: str) -> None:
        super().__init__()
        own = ("first",) if method == "begin" else ("lstm", "attention", "head")
        for name in own:
            self.add_module(name, model.get_submodule(name))
        self.method = method

    def forward(self, x: Tensor) -> Tensor:
        outputs: Tensor = getattr(Attentive, self.method)(self, x)
        return outputs


@pytest.mark.parametrize("more", [0.0, 0.5])
def test_what_a_model_with_dropout_does_in_training_alone_is_seen(more: float) -> None:
    def stages(self: Task, model: nn.Module) -> list[nn.Module]:
        return [Called(model, "begin"), Called(model, "go_on")]

    kind = type("Own", (Mlp,), {"model": lambda self: Attentive(more), "stages": stages})
    job = hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1)
    if not more:
        train(job, kind)
        return
    with pytest.raises(SpecError, match="do not compute what Attentive does in training"):
        train(job, kind)


def test_what_draws_beside_dropout_draws_on() -> None:
    x = torch.ones(50)
    with WithoutDropout():
        assert torch.equal(F.dropout(x, p=0.5), x)
        assert torch.equal(F.feature_alpha_dropout(x.view(5, 5, 2), 0.5, True), x.view(5, 5, 2))
        assert not torch.equal(torch.rand(5), torch.rand(5))
    assert not torch.equal(F.dropout(x, 0.5), x)


class Observed(nn.Module):
    """Has a second head that does not train what it looks at."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.head, self.beside = (
            nn.Linear(6, 12),
            nn.Linear(12, CLASSES),
            nn.Linear(12, 1),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = torch.tanh(self.first(x))
        made: Tensor = self.head(x) + self.beside(x.detach())
        return made


class First(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.first = model.get_submodule("first")

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.first(x))


class Second(nn.Module):
    def __init__(self, model: nn.Module, detaches: bool) -> None:
        super().__init__()
        self.head, self.beside = model.get_submodule("head"), model.get_submodule("beside")
        self.detaches = detaches

    def forward(self, x: Tensor) -> Tensor:
        made: Tensor = self.head(x) + self.beside(x.detach() if self.detaches else x)
        return made


@pytest.mark.parametrize("detaches", [True, False])
def test_stages_that_leave_out_a_detach_are_refused(detaches: bool) -> None:
    def stages(self: Task, model: nn.Module) -> list[nn.Module]:
        return [First(model), Second(model, detaches)]

    kind = type("Own", (Mlp,), {"model": lambda self: Observed(), "stages": stages})
    job = hybrid_job({"pipeline": 2, "cut": "even"}, 2, steps=1)
    if detaches:
        train(job, kind)
        return
    with pytest.raises(
        SpecError, match=r"give first\.\w+, .* a different gradient than Observed does"
    ):
        train(job, kind)
