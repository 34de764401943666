"""
Attention split by heads, which are independent of each other (Shoeybi et al. 2019).

    x --f--> query, key, value of own heads -> attention -> own rows of the output layer --g--> y
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import override

from distplat.platform.errors import Problem, SpecError
from distplat.strategies.tensor.exchange import (
    Bounds,
    TensorParallelRegion,
    copy_forward,
    gathered,
    sum_forward,
)
from distplat.strategies.tensor.parallel_layers import (
    Parts,
    keep,
    set_class,
    split_columns,
    split_rows,
)
from distplat.strategies.tensor.parallel_plan import HeadLayout, slice_of


def split_heads(name: str, module: nn.Module, region: TensorParallelRegion) -> Parts:
    """
    Reduce an attention module to this rank's heads.

    Args:
        name: in the model, for errors.
        module: torch's `nn.MultiheadAttention`, or a module with a `head_layout`.
        region: of the model.

    Raises:
        SpecError: the module has no head layout, or fewer heads than ranks.
    """
    if type(module).forward is nn.MultiheadAttention.forward:
        assert isinstance(module, nn.MultiheadAttention)
        return _split_multihead(name, module, region)
    layout = getattr(module, "head_layout", None)
    if not isinstance(layout, HeadLayout):
        text = f"{name} ({type(module).__name__}) does not say where its heads are"
        raise SpecError(Problem((), text, _layout_hint(module)))
    heads = _head_count(name, module, layout)
    parts: Parts = {}
    for layer in layout.inwards:
        linear = _layer(name, module, layer)
        own = split_columns(
            f"{name}.{layer}", linear, region, units=heads, blocks=layout.blocks(layer)
        )
        parts |= {f"{layer}.{parameter}": spec for parameter, spec in own.items()}
    linear = _layer(name, module, layout.outwards)
    own = split_rows(f"{name}.{layout.outwards}", linear, region, units=heads)
    parts |= {f"{layout.outwards}.{parameter}": spec for parameter, spec in own.items()}
    group = region.group
    setattr(module, layout.count, slice_of(name, 0, heads, heads, group.rank, group.world).extent)
    return parts


def _layout_hint(module: nn.Module) -> str:
    """Return the hint for a module without `head_layout`, including modules of libraries."""
    layers = [name for name, child in module.named_modules() if isinstance(child, nn.Linear)]
    if not layers:
        return "it has no nn.Linear, and others are not sliced: leave it whole"
    return (
        "give it a `head_layout`, in model() if its class is not yours: which of "
        f"{', '.join(layers)} give heads, and which one takes them (docs/tensor_parallel.md)"
    )


def _head_count(name: str, module: nn.Module, layout: HeadLayout) -> int:
    heads = getattr(module, layout.count, None)
    if isinstance(heads, int):
        return heads
    text = f"{name}: `{layout.count}` is no number of heads (got {heads!r})"
    raise SpecError(Problem((), text, "name the attribute in the `count` of its `head_layout`"))


def _layer(name: str, module: nn.Module, layer: str) -> nn.Module:
    try:
        return module.get_submodule(layer)
    except AttributeError:
        text = f"{name}: its `head_layout` names {layer!r}, which it does not have"
        raise SpecError(Problem((), text, "name linear layers of the module")) from None


def _split_multihead(
    name: str, module: nn.MultiheadAttention, region: TensorParallelRegion
) -> Parts:
    if module.bias_k is not None or module.add_zero_attn:
        text = f"{name}: attention with `add_bias_kv` or `add_zero_attn` cannot be split"
        raise SpecError(Problem((), text, "leave it out of the plan"))
    group = region.group
    heads, size, ranks = module.num_heads, module.embed_dim, range(group.world)
    own = [slice_of(name, 0, heads, size, r, group.world) for r in ranks][group.rank]
    fused = slice_of(name, 0, heads, 3 * size, group.rank, group.world, blocks=3)
    parts: Parts = {}
    if module.in_proj_weight is not None:
        parts["in_proj_weight"] = fused
    else:
        parts |= dict.fromkeys(("q_proj_weight", "k_proj_weight", "v_proj_weight"), own)
    if module.in_proj_bias is not None:
        parts["in_proj_bias"] = fused
    keep(module, parts)
    rows = split_rows(f"{name}.out_proj", module.out_proj, region, units=heads)
    split = set_class(module, SplitMultiheadAttention)
    each = [slice_of(name, 0, heads, heads, r, group.world) for r in ranks]
    split.region = region
    split.bounds = [(spec.start, spec.stop) for spec in each]
    split.num_heads = each[group.rank].extent
    return parts | {f"out_proj.{parameter}": spec for parameter, spec in rows.items()}


class SplitMultiheadAttention(nn.MultiheadAttention):
    """This rank's heads of torch's module, with the same arguments and results."""

    region: TensorParallelRegion
    bounds: Bounds
    """Range of heads, by rank."""

    @override
    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Compute attention; see `nn.MultiheadAttention` for shapes."""
        if is_causal and attn_mask is None:
            raise RuntimeError("is_causal is a hint about attn_mask: give the mask, too")
        batched = query.dim() == 3
        q, k, v = (self._own_heads(t, batched) for t in self._project(query, key, value))
        if key_padding_mask is not None and not batched:
            key_padding_mask = key_padding_mask.unsqueeze(0)
        mask = self._mask(attn_mask, key_padding_mask, q)
        if self.training:
            self.region.begin(q.device)
        dropout = self.dropout if self.training else 0.0
        weights = None
        if need_weights:
            weights = _weights(q, k, mask, dropout)
            mixed = weights @ v
        else:
            mixed = F.scaled_dot_product_attention(q, k, v, mask, dropout)
        mixed = mixed.transpose(1, 2).flatten(2)  # [N, L, own features]
        outputs: Tensor = self.out_proj(mixed if batched else mixed.squeeze(0))
        if batched and not self.batch_first:
            outputs = outputs.transpose(0, 1)
        if weights is not None:
            weights = self._gather_weights(weights, average_attn_weights)
            weights = weights if batched else weights.squeeze(0)
        return outputs, weights

    def _project(self, query: Tensor, key: Tensor, value: Tensor) -> list[Tensor]:
        """Return query, key and value of this rank's heads; backward reduces each input once."""
        inputs = {id(t): copy_forward(t, self.region.group) for t in (query, key, value)}
        biases: list[Tensor | None] = [None] * 3
        if self.in_proj_bias is not None:
            biases = list(self.in_proj_bias.chunk(3))
        if self.in_proj_weight is not None:
            if len(inputs) == 1:
                fused = F.linear(inputs[id(query)], self.in_proj_weight, self.in_proj_bias)
                return list(fused.chunk(3, dim=-1))
            weights = list(self.in_proj_weight.chunk(3))
        else:
            weights = [self.q_proj_weight, self.k_proj_weight, self.v_proj_weight]
        arguments = zip((query, key, value), weights, biases, strict=True)
        return [F.linear(inputs[id(t)], weight, bias) for t, weight, bias in arguments]

    def _own_heads(self, features: Tensor, batched: bool) -> Tensor:
        """[L, N, own features], or batch first, or [L, own features] -> [N, heads, L, size]."""
        if not batched:
            features = features.unsqueeze(0)
        elif not self.batch_first:
            features = features.transpose(0, 1)
        heads = features.view(*features.shape[:-1], self.num_heads, self.head_dim)
        return heads.transpose(1, 2)

    def _mask(self, mask: Tensor | None, padding: Tensor | None, query: Tensor) -> Tensor | None:
        """Return the additive mask of the scores: [L, S], or [N, own heads or 1, L, S]."""
        if mask is not None:
            mask = _additive(mask, query.dtype)
            if mask.dim() == 3:  # [N x all heads, L, S]
                start, stop = self.bounds[self.region.group.rank]
                mask = mask.reshape(-1, self.bounds[-1][1], *mask.shape[1:])[:, start:stop]
        if padding is None:
            return mask
        padding = _additive(padding, query.dtype)[:, None, None, :]
        return padding if mask is None else mask + padding

    def _gather_weights(self, weights: Tensor, average: bool) -> Tensor:
        """[N, own heads, L, S] -> [N, L, S], or [N, all heads, L, S]."""
        if average:
            return sum_forward(weights.sum(1).contiguous(), self.region.group) / self.bounds[-1][1]
        last = gathered(weights.permute(0, 2, 3, 1), self.bounds, self.region.group)
        return last.permute(0, 3, 1, 2)


def _weights(query: Tensor, key: Tensor, mask: Tensor | None, dropout: float) -> Tensor:
    """Return the attention weights, after dropout as in torch."""
    scores = (query * query.shape[-1] ** -0.5) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores + mask
    return F.dropout(scores.softmax(dim=-1), dropout)


def _additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert a boolean mask to an additive one, with minus infinity at masked positions."""
    if mask.dtype != torch.bool:
        return mask.to(dtype)
    return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
