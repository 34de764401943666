"""
How an attention module says where its heads are, so that they can be split. No torch.

    class Attention(nn.Module):
        head_layout = HeadLayout(inwards={"inwards": "3 heads features"}, outwards="outwards")

reads: the outputs of the linear layer `inwards` are query, key and value, one behind the other,
each of them head after head. Its `forward` must not assume that it has all heads: it takes their
number from `self.heads`, and leaves features to be found (`unflatten(-1, (3, self.heads, -1))`).
"""

from collections.abc import Mapping
from dataclasses import dataclass

from distplat.platform.errors import Problem, SpecError


@dataclass(frozen=True)
class HeadLayout:
    """Which linear layers of an attention module make its heads, and which one takes them."""

    inwards: Mapping[str, str]
    """Linear layers whose outputs are heads, by name in the module, and the axes of the outputs:
    `heads features` for one of query, key and value, `3 heads features` for all in one layer, or
    `heads 3 features` where each head's three come together."""
    outwards: str
    """Linear layer whose inputs are heads: `heads features`."""
    count: str = "heads"
    """Attribute of the module with the number of heads; a rank's module gets that of its own."""

    def blocks(self, name: str) -> int:
        """
        Give how many equal parts of a layer's outputs are cut alike.

        Raises:
            SpecError: the axes do not say where the heads are.
        """
        axes = self.inwards[name].split()
        if axes.count("heads") == 1:
            before = axes[: axes.index("heads")]
            if all(axis.isdecimal() and int(axis) for axis in before):
                product = 1
                for axis in before:
                    product *= int(axis)
                return product
        text = f"head_layout: {name} has the axes {self.inwards[name]!r}"
        hint = "write numbers, `heads`, and what a head consists of, such as `3 heads features`"
        raise SpecError(Problem((), text, hint))
