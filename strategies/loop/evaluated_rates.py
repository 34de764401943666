"""How ranks and servers come to the same rates, where these go by evaluations."""

from __future__ import annotations

import torch

from distplat.platform.errors import StateLost
from distplat.platform.plateau import Plateau, PlateauState
from distplat.strategies.collective import Collective, gather_values
from distplat.strategies.ports import Shards


def meet_plateau(
    plateau: Plateau,
    version: int,
    group: Collective | None,
    shards: Shards | None,
    device: torch.device,
) -> None:
    """
    Have what the others have, and the servers; every rank calls this when an attempt begins.

    Args:
        plateau: this rank's.
        version: with which the attempt begins.
        group: all ranks; None: there is one.
        shards: the way to the servers; None: there are none.
        device: of the model.

    Raises:
        StateLost: who knew the rates of this version is gone.
    """
    known = [] if plateau.known is None else [plateau.known]
    if version and shards is not None and (told := shards.settings()):
        known.append(PlateauState.of(told))
    if group is not None and group.world > 1:
        every = gather_values(known, group, device)
        known = [PlateauState.of(one) for some in every for one in some]
    if not plateau.meet(version, known):
        raise StateLost("what evaluations made of the learning rate")
