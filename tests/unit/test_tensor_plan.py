"""Tensor-parallel plans: matching of module names and slices, without tensors."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from distplat.platform.errors import SpecError
from distplat.strategies.tensor.parallel_plan import (
    HeadLayout,
    ShardSpec,
    check_styles,
    matches,
    resolve,
    share_out,
    siblings,
    slice_of,
)

GPT = [
    "",
    "embed",
    "blocks",
    *(
        f"blocks.{i}{part}"
        for i in range(2)
        for part in ("", ".attention", ".attention.qkv", ".mlp", ".mlp.up", ".mlp.down")
    ),
    "head",
]


@pytest.mark.parametrize(
    ("pattern", "name", "is_match"),
    [
        ("head", "head", True),
        ("blocks.*.mlp.up", "blocks.11.mlp.up", True),
        ("blocks.*", "blocks.0.mlp", False),  # `*` matches one component
        ("*.mlp.up", "blocks.0.mlp.up", False),
        ("blocks.[01].mlp.up", "blocks.1.mlp.up", True),
        ("blocks.?.mlp.*", "blocks.1.mlp.up", True),
        ("Head", "head", False),
    ],
)
def test_patterns_match_names(pattern: str, name: str, is_match: bool) -> None:
    assert matches(pattern, name) is is_match


def test_resolve_returns_modules_in_the_models_order() -> None:
    plan = {
        "head": "colwise_gather",
        "blocks.*.mlp.down": "rowwise",
        "blocks.*.mlp.up": "colwise",
        "embed": "embedding",
    }
    assert list(resolve(plan, GPT).items()) == [
        ("embed", "embedding"),
        ("blocks.0.mlp.up", "colwise"),
        ("blocks.0.mlp.down", "rowwise"),
        ("blocks.1.mlp.up", "colwise"),
        ("blocks.1.mlp.down", "rowwise"),
        ("head", "colwise_gather"),
    ]


@pytest.mark.parametrize(
    ("plan", "message", "hint"),
    [
        ({"head": "columnwise"}, "head: unknown style 'columnwise'", "did you mean 'colwise'?"),
        ({"heed": "colwise"}, "'heed' names no module", "did you mean 'head'?"),
        ({"block.*.mlp.up": "colwise"}, "names no module", "did you mean 'blocks.*.mlp.up'?"),
        (
            {"blocks.*.mlp.upp": "colwise"},
            "names no module",
            "did you mean 'blocks.*.mlp.up'? in blocks.*.mlp: down, up",
        ),
        ({"blocks.7.mlp.up": "colwise"}, "names no module", "in blocks: 0, 1"),
        ({"embed.weight": "embedding"}, "names no module", "modules: blocks, embed, head"),
        ({"": "heads"}, "is no pattern of module names", "such as"),
        ({"blocks..up": "heads"}, "is no pattern of module names", "such as"),
        (
            {"blocks.*.mlp.up": "colwise", "blocks.0.mlp.*": "rowwise"},
            "blocks.0.mlp.up is colwise by 'blocks.*.mlp.up' and rowwise by 'blocks.0.mlp.*'",
            "one pattern",
        ),
        (
            {"blocks.*.attention": "heads", "blocks.1.attention.qkv": "colwise"},
            "blocks.1.attention.qkv (colwise) lies inside blocks.1.attention (heads)",
            "split one",
        ),
    ],
)
def test_invalid_plan_has_a_message_and_a_hint(
    plan: dict[str, str], message: str, hint: str
) -> None:
    with pytest.raises(SpecError) as caught:
        resolve(plan, GPT)
    assert message in str(caught.value)
    assert hint in str(caught.value)


def test_all_problems_are_reported_at_once() -> None:
    with pytest.raises(SpecError) as caught:
        resolve({"heed": "colwise", "embed": "embeding"}, GPT)
    assert len(caught.value.problems) == 2


def test_two_patterns_may_give_one_module_the_same_style() -> None:
    plan = {"blocks.*.mlp.up": "colwise", "blocks.0.mlp.up": "colwise"}
    assert list(resolve(plan, GPT)) == ["blocks.0.mlp.up", "blocks.1.mlp.up"]


def test_partial_plan_may_name_modules_of_other_stages() -> None:
    plan = {"embed": "embedding", "head": "colwise_gather"}
    assert resolve(plan, ["", "head"], partial=True) == {"head": "colwise_gather"}


def test_problems_name_the_field() -> None:
    problems = check_styles({"a": "rows"}, ("strategy", "tensor_plan"))
    assert problems[0].where == ("strategy", "tensor_plan", "a")


@given(st.integers(1, 40), st.integers(1, 8), st.integers(1, 3), st.integers(1, 5))
def test_slices_cover_all_units_once(units: int, world: int, blocks: int, unit: int) -> None:
    size = units * unit * blocks
    if units < world:
        with pytest.raises(SpecError, match=f"{units} cannot be shared out to {world} ranks"):
            slice_of("m", 0, units, size, 0, world, blocks=blocks)
        return
    specs = [slice_of("m", 0, units, size, r, world, blocks=blocks) for r in range(world)]
    covered = [index for spec in specs for span in spec.ranges() for index in range(*span)]
    assert sorted(covered) == list(range(size))
    assert all(spec.extent > 0 and spec.extent % (blocks * unit) == 0 for spec in specs)
    extents = [spec.extent for spec in specs]
    assert max(extents) - min(extents) <= blocks * unit
    assert [spec.whole for spec in specs] == [world == 1] * world


def test_heads_of_uneven_size_are_rejected() -> None:
    with pytest.raises(SpecError, match="10 features are no 3 heads"):
        slice_of("attention", 0, 3, 10, 0, 2)


def test_each_block_is_sliced_alike() -> None:
    assert ShardSpec(0, 2, 4, 12, blocks=3).ranges() == [(2, 4), (6, 8), (10, 12)]


@given(st.lists(st.integers(0, 100), min_size=1, max_size=12), st.data())
def test_branches_are_balanced(costs: list[int], data: st.DataObject) -> None:
    ranks = data.draw(st.integers(1, len(costs)))
    owners = share_out(costs, ranks)
    assert len(owners) == len(costs)
    assert set(owners) == set(range(ranks))
    loads = [sum(c for c, o in zip(costs, owners, strict=True) if o == r) for r in range(ranks)]
    assert max(loads) <= sum(costs) / ranks + max(costs)  # Graham's bound


def test_most_expensive_branch_has_its_own_rank() -> None:
    assert share_out([1, 10, 2, 3], 2) == [1, 0, 1, 1]


def test_siblings_groups_names_by_parent() -> None:
    assert siblings(["a.x", "b.x", "a.y", "z"]) == {"a": ["a.x", "a.y"], "b": ["b.x"], "": ["z"]}


@pytest.mark.parametrize(
    ("axes", "blocks"),
    [("heads d", 1), ("3 heads d", 3), ("heads 3 d", 1), ("2 2 heads d", 4), ("heads", 1)],
)
def test_head_layout_counts_blocks(axes: str, blocks: int) -> None:
    assert HeadLayout({"qkv": axes}, "out").blocks("qkv") == blocks


@pytest.mark.parametrize("axes", ["3 d", "", "three heads d", "heads heads", "0 heads d"])
def test_head_layout_rejects_invalid_axes(axes: str) -> None:
    with pytest.raises(SpecError, match="head_layout: qkv has the axes"):
        HeadLayout({"qkv": axes}, "out").blocks("qkv")
