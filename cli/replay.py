"""`distplat replay`: make an asynchronous run again, and say whether its model comes out."""

from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from distplat.cli.options import Output, is_json
from distplat.cli.render import to_json
from distplat.cli.tables import print_pairs

_SHOWN = 12


def replay(
    run_directory: Annotated[
        Path, typer.Argument(metavar="RUN_DIRECTORY", help="What `submit` printed.")
    ],
    working_dir: Annotated[
        Path, typer.Option(help="Folder of the task's module; default: the current one.")
    ] = Path("."),
    output: Output = "text",
) -> None:
    """
    Make a `ps-async` run again from its log of updates, in this process.

    Exit code 0: to the same bits. 1: the model differs.
    """
    as_json = is_json(output)
    from distplat.actors.replaying import replay_run  # torch

    found = replay_run(run_directory, working_dir)
    if as_json:
        facts = {
            "run": found.run,
            "same_bits": found.differing is None,
            "updates": found.updates,
            "shards": found.shards,
            "differing": found.differing,
            "difference": found.difference,
            "staleness": [dict(sorted(counts.items())) for counts in found.staleness],
        }
        print(to_json(facts))
    else:
        verdict = "the same bits"
        if found.differing is not None:
            verdict = f"DIFFERS, first in {found.differing}, by up to {found.difference:.3g}"
        rows = [
            ("run", found.run),
            ("updates", f"{found.updates} on each of {found.shards} shards"),
        ]
        rows += [
            (f"staleness of worker-{rank}", _histogram(counts))
            for rank, counts in enumerate(found.staleness)
        ]
        print_pairs([*rows, ("model", verdict)])
    if found.differing is not None:
        raise typer.Exit(1)


def _histogram(counts: Counter[int]) -> str:
    """`0: 12%  1: 80%  2: 8%`."""
    total = max(1, counts.total())
    shown = [f"{value}: {count / total:.0%}" for value, count in sorted(counts.items())]
    more = ["..."] if len(shown) > _SHOWN else []
    return "  ".join([*shown[:_SHOWN], *more])
