"""Models with tensor-parallel plans, and their training on the ranks of a tensor group."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from rank_threads import on_ranks
from torch import Tensor, nn

from distplat.strategies.collective import Collective
from distplat.strategies.fakes import Fabric
from distplat.strategies.tensor.parallel_layers import gather_full
from distplat.strategies.tensor.parallel_plan import HeadLayout
from distplat.strategies.tensor.parallelize import parallelize


class Gated(nn.Module):
    """Two parallel column layers, as in LLaMA, with sizes that are not divisible by the ranks."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(12, 31), nn.Linear(12, 31), nn.Linear(31, 12)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return x + out


class Attention(nn.Module):
    """Causal attention; one layer computes query, key and value, or only key and value."""

    def __init__(self, width: int, heads: int, *, fused: bool) -> None:
        super().__init__()
        self.n_head = heads
        self.out = nn.Linear(width, width)
        if fused:
            self.qkv = nn.Linear(width, 3 * width, bias=False)
            self.head_layout = HeadLayout({"qkv": "heads 3 size"}, "out", "n_head")
        else:
            self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)
            axes = {"q": "heads size", "kv": "2 heads size"}
            self.head_layout = HeadLayout(axes, "out", "n_head")

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        if hasattr(self, "qkv"):
            qkv = self.qkv(x).view(batch, length, self.n_head, 3, -1)
            q, k, v = qkv.permute(3, 0, 2, 1, 4)
        else:
            q = self.q(x).view(batch, length, self.n_head, -1).transpose(1, 2)
            k, v = self.kv(x).view(batch, length, 2, self.n_head, -1).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(2))
        return out


class Cross(nn.Module):
    """`nn.MultiheadAttention`, sequence first, other key size, mask; weights are used."""

    def __init__(self) -> None:
        super().__init__()
        self.narrow = nn.Linear(12, 8)
        self.attention = nn.MultiheadAttention(12, 4, kdim=8, vdim=8)

    def forward(self, x: Tensor) -> Tensor:
        other = self.narrow(x)
        hidden = torch.ones(x.shape[0], x.shape[0], dtype=torch.bool).triu(1)
        mixed, weights = self.attention(x, other, other, attn_mask=hidden, is_causal=True)
        out: Tensor = mixed + weights.mean()
        return out


class Padded(nn.Module):
    """`nn.MultiheadAttention`, batch first, a bias per head, padded keys."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(12, 4, batch_first=True, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, _ = x.shape
        padding = torch.zeros(batch, length)
        padding[:, -1] = float("-inf")
        bias = torch.linspace(-1, 1, batch * 4 * length * length).view(batch * 4, length, length)
        mixed, weights = self.attention(
            x, x, x, padding, attn_mask=bias, average_attn_weights=False
        )
        out: Tensor = mixed * weights.square().mean()
        return out


class Inception(nn.Module):
    """Branches of different cost: one without parameters, one with running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.mixed = nn.ModuleList(
            [
                nn.Conv2d(3, 4, 1),
                nn.Sequential(nn.Conv2d(3, 8, 1), nn.ReLU(), nn.Conv2d(8, 6, 3, padding=1)),
                nn.Sequential(nn.Conv2d(3, 4, 5, padding=2), nn.BatchNorm2d(4)),
                nn.AvgPool2d(3, 1, 1),
            ]
        )
        self.head = nn.Linear(17, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu_(torch.cat([branch(x) for branch in self.mixed], dim=1))
        out: Tensor = self.head(x.mean(dim=(2, 3)))
        return out


class Bypass(nn.Module):
    """An identity branch, the only branch of its rank, and a residual connection."""

    def __init__(self) -> None:
        super().__init__()
        self.branches = nn.ModuleList([nn.Linear(12, 12), nn.Identity()])

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = x + self.branches[0](x) + self.branches[1](x)
        return out


def tied() -> nn.Module:
    table, head = nn.Embedding(19, 12, padding_idx=3), nn.Linear(12, 19, bias=False)
    head.weight = table.weight
    return nn.Sequential(table, nn.LayerNorm(12), head)


def features(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(1))


def words(*shape: int) -> Tensor:
    return torch.randint(19, shape, generator=torch.Generator().manual_seed(1))


@dataclass(frozen=True)
class Case:
    build: Callable[[], nn.Module]
    plan: Mapping[str, str]
    inputs: Tensor


ENCODER = {
    "layers.*.self_attn": "heads",
    "layers.*.linear1": "colwise",
    "layers.*.linear2": "rowwise",
}


def encoder() -> nn.Module:
    layer = nn.TransformerEncoderLayer(12, 4, 18, dropout=0.0, batch_first=True)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)


CASES = {
    "mlp": Case(
        lambda: nn.Sequential(
            nn.Linear(12, 31), nn.GELU(), nn.Linear(31, 12), nn.LayerNorm(12), nn.Linear(12, 7)
        ),
        {"0": "colwise", "2": "rowwise", "4": "colwise_gather"},
        features(5, 12),
    ),
    "rows of complete inputs": Case(
        lambda: nn.Sequential(nn.Linear(12, 13), nn.Tanh(), nn.Linear(13, 4, bias=False)),
        {"2": "rowwise"},
        features(3, 5, 12),
    ),
    "gated": Case(
        lambda: nn.Sequential(nn.LayerNorm(12), Gated(), Gated()),
        {"*.up": "colwise", "*.gate": "colwise", "*.down": "rowwise"},
        features(5, 12),
    ),
    "embedding": Case(
        lambda: nn.Sequential(nn.Embedding(19, 6, padding_idx=0), nn.Linear(6, 4)),
        {"0": "embedding"},
        words(4, 7),
    ),
    "tied": Case(tied, {"0": "embedding", "2": "colwise_gather"}, words(4, 7)),
    "fused heads": Case(
        lambda: nn.Sequential(nn.LayerNorm(12), Attention(12, 4, fused=True)),
        {"1": "heads"},
        features(2, 5, 12),
    ),
    "heads": Case(
        lambda: nn.Sequential(nn.LayerNorm(12), Attention(12, 4, fused=False)),
        {"1": "heads"},
        features(2, 5, 12),
    ),
    "cross": Case(Cross, {"attention": "heads"}, features(5, 2, 12)),
    "one sequence": Case(Cross, {"attention": "heads"}, features(5, 12)),
    "padded": Case(Padded, {"attention": "heads"}, features(3, 5, 12)),
    "encoder": Case(encoder, ENCODER, features(3, 5, 12)),
    "bypass": Case(
        lambda: nn.Sequential(Bypass(), Gated(), nn.LayerNorm(12), Bypass()),
        {"0.*.*": "branches", "1.up": "colwise", "1.gate": "colwise", "1.down": "rowwise"}
        | {"3.*.*": "branches"},
        features(5, 12),
    ),
    "branches": Case(Inception, {"mixed.*": "branches"}, features(6, 3, 8, 8)),
}


def train_steps(model: nn.Module, inputs: Tensor, steps: int) -> list[Tensor]:
    """Train; return the outputs of each step."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    outputs = []
    for _ in range(steps):
        optimizer.zero_grad()
        outputs.append(model(inputs))
        torch.autograd.backward((outputs[-1] - 0.5).square().mean())
        optimizer.step()
    return [out.detach() for out in outputs]


@dataclass(frozen=True)
class Outcome:
    """Results of a rank after training."""

    outputs: list[Tensor]
    state: dict[str, Tensor]
    """Full tensors, on rank 0."""
    gradients: dict[str, Tensor]
    """Full gradients of the last step, on rank 0."""
    own: dict[str, Tensor]
    """Gradients of replicated parameters."""


def train_whole(case: Case, steps: int) -> Outcome:
    """Train the model in one process."""
    torch.manual_seed(0)
    model = case.build()
    outputs = train_steps(model, case.inputs, steps)
    gradients = _gradients(model)
    return Outcome(outputs, model.state_dict(), gradients, gradients)


def train_split(case: Case, world: int, steps: int) -> list[Outcome]:
    """Train on the ranks of a group; return the results of each."""
    torch.manual_seed(0)
    models = [case.build() for _ in range(world)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    fabric = Fabric(world)
    return on_ranks(
        world, lambda r: _on_rank(models[r], case, fabric.collective(r), steps), timeout_s=60
    )


def _on_rank(model: nn.Module, case: Case, group: Collective, steps: int) -> Outcome:
    specs = parallelize(model, case.plan, group)
    outputs = train_steps(model, case.inputs, steps)
    gradients = _gradients(model)
    own = {name: g for name, g in gradients.items() if name not in specs}
    state = gather_full(model.state_dict(), specs, group)
    return Outcome(outputs, state, gather_full(gradients, specs, group), own)


def _gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return the gradients, zeros for parameters without one, such as branches of other ranks."""
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in model.named_parameters()
    }


class LoneRank:
    """A rank of a group without other ranks, for tests of local computation."""

    def __init__(self, rank: int, world: int) -> None:
        self.rank, self.world, self.sums = rank, world, 0

    def all_reduce(self, tensor: Tensor) -> None:
        """Leave the tensor unchanged."""
        self.sums += 1


Run = Callable[[nn.Module, Collective], dict[str, Tensor]]


def run_split(
    build: Callable[[], nn.Module], plan: Mapping[str, str], run: Run, world: int = 2
) -> list[dict[str, Tensor]]:
    """Split a model over ranks as threads, and return the result of `run` on each."""
    fabric = Fabric(world)
    models = [build() for _ in range(world)]  # in sequence: all models use the same generator

    def body(rank: int) -> dict[str, Tensor]:
        group = fabric.collective(rank)
        parallelize(models[rank], plan, group)
        return run(models[rank], group)

    return on_ranks(world, body)
