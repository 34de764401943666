"""
The first lines of a remote job: `python -m distplat.cli.on_cluster`, in the cluster's own Python.

distplat itself is shipped, what it imports is not. So nothing but the standard library is imported
here before it is known that the rest is there.
"""

from __future__ import annotations  # an older Python is to get as far as its name

import sys
from importlib.util import find_spec

NEEDED = {
    "ray": "ray[default]",
    "torch": "torch",
    "numpy": "numpy",
    "cloudpickle": "cloudpickle",
    "pydantic": "pydantic",
    "typer": "typer",
    "rich": "rich",
    "yaml": "pyyaml",
    "safetensors": "safetensors",
    "fsspec": "fsspec",
    "tensorboard": "tensorboard",
    "typing_extensions": "typing-extensions",
}
"""Module -> the package that has it, as pyproject.toml names it."""
OLDEST = (3, 11)
EXIT_CODE = 3


def problem() -> str | None:
    """Say what this Python lacks, and the remedy; None: nothing."""
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"the cluster's Python, {sys.executable} ({version})"
    if sys.version_info < OLDEST:
        return f"{where}, is too old: distplat needs {OLDEST[0]}.{OLDEST[1]} or later"
    gone = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if not gone:
        return None
    listed = ", ".join(f'"{package}"' for package in gone)
    return (
        f"{where}, lacks what distplat needs: {', '.join(gone)}\n"
        f"install it there, or submit with --runtime-env-json '{{\"pip\": [{listed}]}}'"
    )


def main() -> None:
    """Be the driver of the job that the environment holds."""
    text = problem()
    if text is not None:
        sys.stderr.write(f"error: {text}\n")  # who reads the log makes it harmless
        sys.exit(EXIT_CODE)
    from distplat.cli.main import main as command_line

    sys.argv[1:] = ["drive"]
    command_line()


if __name__ == "__main__":
    main()
