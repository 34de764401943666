"""Did-you-mean: near names are found, far ones are not."""

import random
import string

import pytest
from pydantic import BaseModel

from distplat.platform import lr_schedules, optimizers, spec
from distplat.platform.errors import hint, nearest

MODELS = sorted(
    {
        thing
        for module in (lr_schedules, optimizers, spec)
        for thing in vars(module).values()
        if isinstance(thing, type) and issubclass(thing, BaseModel) and thing.model_fields
    },
    key=lambda model: model.__name__,
)


@pytest.mark.parametrize(
    ("name", "known", "near"),
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
def test_nearest(name: str, known: list[str], near: str | None) -> None:
    assert nearest(name, known) == near


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


def one_edit(word: str, chance: random.Random) -> str:
    """Insert, delete, replace or swap letters, as fingers do."""
    at, letter = chance.randrange(len(word)), chance.choice(string.ascii_lowercase + "_")
    swapped = word[:at] + word[at : at + 2][::-1] + word[at + 2 :]
    return chance.choice(
        [
            word[:at] + letter + word[at:],
            word[:at] + word[at + 1 :],
            word[:at] + letter + word[at + 1 :],
            swapped,
        ]
    )


@pytest.mark.parametrize("model", MODELS)
def test_every_field_is_found_again_after_one_edit(model: type[BaseModel]) -> None:
    names, chance = list(model.model_fields), random.Random(1)
    for name in (one for one in names if len(one) > 1):  # "d": nothing of it is left in a typo
        typos = {one_edit(name, chance) for _ in range(300)} - set(names)
        right = sum(nearest(typo, names) == name for typo in typos)
        least = 0.9 if name == "T_0" else 0.95  # a letter away from what `T_mult` begins with
        assert right >= least * len(typos), (name, typos)
