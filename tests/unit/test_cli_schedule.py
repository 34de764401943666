"""`distplat schedule`: chart, figures, SVG, messages."""

import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import pytest

from distplat.cli.charts import bars_of, chart, pipeline_chart
from distplat.cli.main import run
from distplat.strategies.algorithms.pipeline_schedule import gpipe, one_f_one_b
from distplat.strategies.algorithms.simulate import Costs, Span, simulate

ARGS = ["schedule", "1f1b", "--stages", "2", "--micro-batches", "3"]


def test_prints_the_chart(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(ARGS) == 0
    assert capsys.readouterr().out == (
        "1f1b: 2 stages, 3 micro-batches\n"
        "\n"
        "stage 0  F0 F1 ......B0--- F2 B1--- ...B2---\n"
        "stage 1  ...F0 B0--- F1 B1--- F2 B2--- ......\n"
        "\n"
        "F forward, B backward, then the micro-batch, . idle\n"
        "makespan          12\n"
        "bubble            25.0%\n"
        "peak activations  2, 1 micro-batches, by stage\n"
    )


def test_imports_neither_torch_nor_ray() -> None:
    code = f"""import sys
from distplat.cli.charts import bars_of, pipeline_chart
from distplat.cli.main import run
run({ARGS!r})
sys.exit([name for name in ("torch", "ray") if name in sys.modules] or 0)"""
    process = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False
    )
    assert process.returncode == 0, process.stderr


def test_legend_explains_weights_and_chunks(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["schedule", "zb-h1", *ARGS[2:]]) == 0
    assert "W gradient of the weights" in capsys.readouterr().out
    assert run(["schedule", "interleaved", *ARGS[2:-1], "4", "--virtual", "2"]) == 0
    printed = capsys.readouterr().out
    assert "2 stages of 2 chunks" in printed and "F0'" in printed and "of 1/2 stage" in printed


def test_json_output(capsys: pytest.CaptureFixture[str]) -> None:
    assert run([*ARGS, "-o", "json", "--send", "0.5", "--buffer", "1"]) == 0
    result = json.loads(capsys.readouterr().out)
    spans = result.pop("spans")
    assert result.pop("bubble") == pytest.approx(1 - 18 / (2 * result["makespan"]))
    assert result == {
        "schedule": "1f1b",
        "stages": 2,
        "micro_batches": 3,
        "virtual": 1,
        "makespan": simulate(one_f_one_b(2, 3), Costs(1, 1, 1, 0.5), 1).makespan,
        "peak_activations": [2, 1],
    }
    first = {"kind": "F", "micro_batch": 0, "chunk": 0, "start": 1.5, "end": 2.5}
    assert spans[1][0] == first


def test_durations_are_options(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ["--stages", "1", "--micro-batches", "1", "-o", "json"]
    assert run(["schedule", "zb-h1", *sizes, "--forward=2", "--backward=5", "--weight=1"]) == 0
    (row,) = json.loads(capsys.readouterr().out)["spans"]
    assert [(span["kind"], span["start"], span["end"]) for span in row] == [
        ("F", 0, 2),
        ("B", 2, 6),
        ("W", 6, 7),
    ]


@pytest.mark.parametrize("width", [None, 200, 80, 40, 20, 5])
def test_chart_fits_the_width(width: int | None) -> None:
    spans = simulate(gpipe(3, 12), Costs(1, 1, 1)).spans
    lines = [line.plain for line in chart(spans, width)]
    assert len({len(line) for line in lines}) == 1
    if width is None:
        assert "F11 " in lines[0] and "B11---- " in lines[2]
    elif width > 10:
        assert len(lines[0]) <= width
    for line in lines:  # in order, even if truncated
        numbers = [int(number) for number in re.findall(r"F(\d+)", line)]
        assert numbers == sorted(numbers)


def test_invisibly_short_spans_do_not_shift_others() -> None:
    spans = simulate(one_f_one_b(2, 4), Costs(0.001, 1, 0)).spans
    lines = [line.plain for line in chart(spans, 30)]
    assert [len(line) for line in lines] == [30, 30]
    assert "F" not in lines[0] and lines[0].count("B") == 4


def test_writes_svg(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "chart.svg"
    assert run([*ARGS, "--svg", str(path)]) == 0
    assert "stage 0" in capsys.readouterr().out
    root = ElementTree.fromstring(path.read_text())
    name = "{http://www.w3.org/2000/svg}"
    texts = [text.text or "" for text in root.iter(f"{name}text")]
    assert "1f1b: 2 stages, 3 micro-batches" in texts
    assert any("bubble 25.0%" in text for text in texts)
    assert {"stage 0", "stage 1", "forward", "backward", "idle"} <= {*texts}
    assert {"0", "1", "2"} <= {*texts}  # labels of micro-batches
    assert len([*root.iter(f"{name}title")]) == 12  # one per action
    width = float(root.attrib["viewBox"].split()[2])
    inside = [
        float(x)
        for bar in root.iter(f"{name}g")
        if bar.find(f"{name}title") is not None
        for path in bar.iter(f"{name}path")
        for x in re.findall(r"[ML] (\S+) \S+", path.attrib["d"])
    ]
    assert inside and all(0 <= x <= width for x in inside)


def test_measured_spans_are_relative_to_their_start() -> None:
    spans = simulate(one_f_one_b(2, 2)).spans
    later = [[Span(s.action, s.start + 1e3, s.end + 1e3) for s in row] for row in spans]
    assert [x.plain for x in chart(later)] == [x.plain for x in chart(spans)]
    original, shifted = (pipeline_chart({"a < b": bars_of(rows)}) for rows in (spans, later))
    assert "F1: 1001 to 1002" in shifted
    original, shifted = (re.sub(r"<title>.*?</title>", "", svg) for svg in (original, shifted))
    assert shifted == original
    assert "a &lt; b" in shifted


def test_svg_legend_explains_later_chunks(tmp_path: Path) -> None:
    path = tmp_path / "chart.svg"
    assert (
        run(["schedule", "interleaved", *ARGS[2:-1], "4", "--virtual", "2", "--svg", str(path)])
        == 0
    )
    assert "primes and paler: later chunks" in path.read_text()


def test_svg_needs_matplotlib(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delitem(sys.modules, "distplat.cli.charts")
    monkeypatch.setitem(sys.modules, "matplotlib.style", None)
    assert run([*ARGS, "--svg", str(tmp_path / "chart.svg")]) == 2
    assert "pip install 'distplat[report]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["1f2b", *ARGS[2:]], "schedule: unknown schedule '1f2b'\n  hint: did you mean '1f1b'?"),
        (["interleaved", *ARGS[2:]], "multiples of its 2 stages, got 3: use 2 or 4, or 1f1b"),
        ([*ARGS[1:], "--virtual", "2"], "1f1b has one virtual stage per stage, got 2"),
        ([*ARGS[1:], "--weight", "3"], "--weight 3 is a part of --backward 2, and larger"),
        ([*ARGS[1:], "--forward", "0", "--backward", "0"], "there is nothing to draw"),
        ([*ARGS[1:], "--svg", "no/such/folder.svg"], "--svg: cannot write no/such/folder.svg: No"),
        ([*ARGS[1:], "-o", "xml"], "--output is 'xml'"),
        ([*ARGS[1:], "--stages", "0"], "--stages"),
    ],
)
def test_rejects_invalid_command_lines(
    args: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(["schedule", *args]) == 2
    printed = capsys.readouterr()
    assert message in printed.err
    assert printed.out == ""
