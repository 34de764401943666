"""Suggestions of similar names."""

import random
import string

import pytest
from pydantic import BaseModel

from distplat.platform import lr_schedules, optimizers, spec
from distplat.platform.errors import hint, nearest

MODELS = sorted(
    {
        value
        for module in (lr_schedules, optimizers, spec)
        for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, BaseModel) and value.model_fields
    },
    key=lambda model: model.__name__,
)


@pytest.mark.parametrize(
    ("name", "known", "expected"),
    [
        ("rnig", ["ps-sync", "ring"], "ring"),
        ("Ps_Sync", ["ps-sync", "ring"], "ps-sync"),
        ("adamw", ["Adam", "AdamW"], "AdamW"),
        ("xr", ["lr", "momentum"], "lr"),
        ("zebra", ["ps-sync", "ring"], None),
        ("", ["ring"], None),
        ("ring", [], None),
    ],
)
def test_nearest(name: str, known: list[str], expected: str | None) -> None:
    assert nearest(name, known) == expected


@pytest.mark.parametrize(
    ("name", "known", "text"),
    [
        ("rnig", ["ring", "ps-sync"], "did you mean 'ring'? allowed: ps-sync, ring"),
        ("zebra", ["ring", "ps-sync"], "allowed: ps-sync, ring"),
        ("zebra", [], "none is allowed here"),
    ],
)
def test_hint(name: str, known: list[str], text: str) -> None:
    assert hint(name, known) == text


def apply_one_edit(word: str, rng: random.Random) -> str:
    """Insert, delete, replace or swap a letter."""
    index, letter = rng.randrange(len(word)), rng.choice(string.ascii_lowercase + "_")
    swapped = word[:index] + word[index : index + 2][::-1] + word[index + 2 :]
    return rng.choice(
        [
            word[:index] + letter + word[index:],
            word[:index] + word[index + 1 :],
            word[:index] + letter + word[index + 1 :],
            swapped,
        ]
    )


@pytest.mark.parametrize("model", MODELS)
def test_suggests_each_field_after_one_edit(model: type[BaseModel]) -> None:
    names, rng = list(model.model_fields), random.Random(1)
    for name in (field for field in names if len(field) > 1):  # an edit may remove all of "d"
        typos = {apply_one_edit(name, rng) for _ in range(300)} - set(names)
        correct = sum(nearest(typo, names) == name for typo in typos)
        required = 0.9 if name == "T_0" else 0.95  # one edit from the beginning of `T_mult`
        assert correct >= required * len(typos), (name, typos)
