"""The documentation is up to date, its links resolve, and its quoted tests exist."""

import importlib.util
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [p for p in ROOT.glob("**/*.md") if not {".venv", "node_modules"} & set(p.parts)]


def test_job_file_reference_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("job_file_page", ROOT / "docs" / "job_file.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    assert (ROOT / "docs" / "job_file.md").read_text() == module.page()


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


def test_make_bench_runs_every_benchmark() -> None:
    _, _, bench = (ROOT / "Makefile").read_text().partition("\nbench: ")
    executed = {*re.findall(r"benchmarks/(\w+\.py)", bench)}
    existing = {path.name for path in (ROOT / "benchmarks").glob("*.py")} - {"common.py"}
    page = (ROOT / "docs" / "benchmarks.md").read_text()
    described = {*re.findall(r"(?m)^## .*\(`benchmarks/(\w+\.py)`\)$", page)}
    assert executed == existing == described


def test_guarantees_name_existing_tests() -> None:
    text = (ROOT / "docs" / "guarantees.md").read_text()
    references = re.findall(r"`(test_\w+\.py)::(test_\w+)`", text)
    rows = [line for line in text.splitlines() if line.startswith("|") and "---" not in line]
    headers = [line for line in rows if line.startswith("| what |")]
    assert len(references) >= len(rows) - len(headers) > 10
    for row in set(rows) - set(headers):
        assert re.search(r"`test_\w+\.py::test_\w+`", row), f"no test: {row}"
    for file, test in references:
        (path,) = [*ROOT.glob(f"tests/*/{file}")]
        assert f"\ndef {test}(" in path.read_text(), f"{file}::{test}"
