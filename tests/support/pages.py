"""The files that a page of the documentation shows."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_FILE = re.compile(r"`(\w+\.\w+)`(?:(?!\n\n).)*:\n\n```\w+\n(.*?)```", re.DOTALL)


def files_of(page: str) -> dict[str, str]:
    """Give the text of each file of a page, by name: "`name`, started by ...:" and a block."""
    return dict(_FILE.findall((DOCS / page).read_text()))
