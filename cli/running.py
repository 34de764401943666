"""`distplat scale`, and the roles in `distplat status`: runs are asked through Ray itself."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from typing import TYPE_CHECKING, Annotated

import typer

from distplat.cli.address import bring_token, host_and_port, target_of
from distplat.cli.options import Address, Output, is_json
from distplat.cli.render import to_json
from distplat.platform.errors import Problem, SpecError, printable

if TYPE_CHECKING:
    from distplat.actors.overview import Overview

_HERE = ("127.0.0.1", "localhost", "::1")


def scale(
    job: Annotated[str, typer.Argument(metavar="JOB", help="Name of the job, or of its run.")],
    workers: Annotated[
        int, typer.Option("--workers", metavar="N", help="How many workers there are to be.")
    ],
    address: Address = None,
    wait_s: Annotated[
        float, typer.Option("--wait-s", min=0, help="How long to wait for it; 0: not at all.")
    ] = 120.0,
    output: Output = "text",
) -> None:
    """
    Have workers join or leave a `ps-async` or `ps-sync` run.

    No other worker is restarted. Under `ps-async` nobody is disturbed; under `ps-sync` all change
    between two steps, once newcomers are ready. To be called on a machine of the cluster.
    """
    as_json = is_json(output)
    with joined(address):
        from distplat.actors.overview import one_run
        from distplat.actors.overview import scale as change
        from distplat.cli.roles import role_facts, role_lines

        run = one_run(job)
        roster = change(run, workers, wait_s)
    from distplat.actors.overview import Overview

    seen = Overview(run.run, run.job, None, roster)
    if as_json:
        print(to_json(role_facts(seen)))
    else:
        print(printable("\n".join(role_lines(seen))))


def roles_of(address: str | None, name: str) -> Overview:
    """
    Ask how the roles of a run are doing.

    Args:
        address: see `joined`.
        name: of the job, or of the run.

    Raises:
        SpecError: there is no such run, or several; or the address is not for this.
        InfrastructureError: the cluster, or a role, does not answer.
    """
    with joined(address):
        from distplat.actors.overview import one_run, overview

        return overview(one_run(name))


@contextmanager
def joined(address: str | None) -> Iterator[None]:
    """
    Be connected to the Ray in which runs go on; it must have a part on this machine.

    Args:
        address: as given; a job API's URL stands for the cluster on this machine that it serves.

    Raises:
        SpecError: it cannot be joined from here.
        ClusterUnreachable: nothing runs there.
    """
    target = target_of(address, os.environ)
    if target.origin and target.kind == "local":
        text = "a local Ray belongs to the run that started it"
        raise SpecError(Problem((target.origin,), text, "leave --address out, or give HOST:6379"))
    if target.kind == "jobs" and host_and_port(target.address)[0] not in _HERE:
        text = f"{target.address} is a job API, and this needs a machine of the cluster"
        raise SpecError(Problem((target.origin,), text, "call it there, without --address"))
    bring_token(target)
    from distplat.cli.join import connected

    with (
        redirect_stdout(sys.stderr),
        connected(target.address if target.kind == "driver" else "auto", {}),
    ):
        yield
