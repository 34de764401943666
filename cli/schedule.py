"""`distplat schedule`: simulate and draw a pipeline schedule, without a run."""

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from distplat.cli.common_options import Output, is_json, report_extra
from distplat.platform.errors import SpecError, printable
from distplat.platform.progress import to_json

if TYPE_CHECKING:
    from distplat.strategies.algorithms.pipeline_schedule import PipelineSchedule
    from distplat.strategies.algorithms.simulate import Costs, Simulation


def _option(text: str, minimum: int = 0, **kwargs: Any) -> Any:
    return typer.Option(min=minimum, help=text, **kwargs)


Schedule = Annotated[str, typer.Argument(metavar="NAME", help="gpipe, 1f1b, interleaved or zb-h1.")]
Stages = Annotated[int, _option("Stages of the pipeline.", 1, max=64)]
MicroBatches = Annotated[int, _option("Micro-batches of a step.", 1, max=1024)]
Chunks = Annotated[int | None, _option("Chunks of layers per stage (interleaved).", 1, max=16)]
Forward = Annotated[float, _option("Time of a stage's forward of one micro-batch.")]
Backward = Annotated[float, _option("Time of a stage's backward of one micro-batch.")]
_WEIGHT = "Part of --backward for the weights' gradient (zb-h1)."
Weight = Annotated[float | None, _option(_WEIGHT, show_default="half")]
Send = Annotated[float, _option("Time of a message between stages.")]
_BUFFER = "Maximum number of messages in flight between two stages."
Buffer = Annotated[int | None, _option(_BUFFER, 1, show_default="any")]
_SVG = "Draw the chart into this file; needs the extra `report`."


def schedule(
    name: Schedule,
    stages: Stages,
    micro_batches: MicroBatches,
    virtual: Chunks = None,
    forward: Forward = 1.0,
    backward: Backward = 2.0,
    weight: Weight = None,
    send: Send = 0.0,
    buffer: Buffer = None,
    svg: Annotated[Path | None, typer.Option(help=_SVG)] = None,
    output: Output = "text",
) -> None:
    """Show a pipeline schedule: chart, bubble, live activations."""
    from distplat.strategies.algorithms.pipeline_schedule import build
    from distplat.strategies.algorithms.simulate import simulate

    as_json = is_json(output)
    costs = _costs(forward, backward, weight, send)
    try:
        plan = build(name, stages, micro_batches, virtual)
    except ValueError as error:
        raise SpecError(str(error)) from error
    simulation = simulate(plan, costs, buffer)
    if svg is not None:
        _write(svg, plan, simulation)
    if as_json:
        print(to_json(_facts(plan, simulation)))
    else:
        _print(plan, simulation)


def _costs(forward: float, backward: float, weight: float | None, send: float) -> "Costs":
    from distplat.strategies.algorithms.simulate import Costs

    weight_cost = backward / 2 if weight is None else weight
    if weight_cost > backward:
        text = f"--weight {weight_cost:g} is a part of --backward {backward:g}, and larger"
        raise SpecError(text)
    if forward + backward == 0:
        raise SpecError("--forward and --backward are both 0: there is nothing to draw")
    return Costs(forward, backward - weight_cost, weight_cost, send)


def _facts(plan: "PipelineSchedule", simulation: "Simulation") -> dict[str, Any]:
    return {
        "schedule": plan.name,
        "stages": plan.stages,
        "micro_batches": plan.micro_batches,
        "virtual": plan.chunks,
        "makespan": simulation.makespan,
        "bubble": simulation.bubble,
        "peak_activations": list(simulation.peak_activations),
        "spans": [
            [{**asdict(span.action), "start": span.start, "end": span.end} for span in row]
            for row in simulation.spans
        ],
    }


def _title(plan: "PipelineSchedule") -> str:
    chunks = f" of {plan.chunks} chunks" if plan.chunks > 1 else ""
    return f"{plan.name}: {plan.stages} stages{chunks}, {plan.micro_batches} micro-batches"


def _rows(plan: "PipelineSchedule", simulation: "Simulation") -> list[tuple[str, str]]:
    live = ", ".join(map(str, simulation.peak_activations))
    unit = f" (of 1/{plan.chunks} stage each)" if plan.chunks > 1 else ""
    return [
        ("makespan", f"{simulation.makespan:.4g}"),
        ("bubble", f"{simulation.bubble:.1%}"),
        ("peak activations", f"{live} micro-batches{unit}, by stage"),
    ]


def _print(plan: "PipelineSchedule", simulation: "Simulation") -> None:
    from distplat.actors.view import is_terminal
    from distplat.cli.charts import chart
    from distplat.cli.render import print_pairs, terminal

    console = terminal()
    print(printable(_title(plan)))
    print()
    if console is not None:
        width = (console.width,) if is_terminal(sys.stdout) else ()
        for line in chart(simulation.spans, *width):
            console.print(line, crop=False)
    else:
        for line in chart(simulation.spans):
            print(printable(line.plain.rstrip()))
    print()
    weights = ", W gradient of the weights" if plan.splits_backward else ""
    primes = ", a prime for each further chunk" if plan.chunks > 1 else ""
    print(printable(f"F forward, B backward{weights}, then the micro-batch{primes}, . idle"))
    print_pairs(_rows(plan, simulation))


def _write(path: Path, plan: "PipelineSchedule", simulation: "Simulation") -> None:
    with report_extra():
        from distplat.cli.charts import bars_of, pipeline_chart
    figures = ";  ".join(f"{name} {value}" for name, value in _rows(plan, simulation))
    title = f"{_title(plan)}\n{figures}"
    drawing = pipeline_chart({title: bars_of(simulation.spans)}, themed=False)
    try:
        path.write_text(drawing, encoding="utf-8")
    except OSError as error:
        raise SpecError(f"--svg: cannot write {path}: {error.strerror}") from error
