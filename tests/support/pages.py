"""Files shown on a page of the documentation."""

import re
from pathlib import Path

DOCS = Path(__file__).parents[2] / "docs"
_FILE = re.compile(r"`(\w+\.\w+)`(?:(?!\n\n).)*:\n\n```\w+\n(.*?)```", re.DOTALL)


def files_of(page: str) -> dict[str, str]:
    """Return the files of a page by name, from "`name`, started by ...:" and a code block."""
    return dict(_FILE.findall((DOCS / page).read_text()))
