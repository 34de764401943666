"""
Entry point of a remote job: `python -m distplat.cli.on_cluster`, in the cluster's Python.

distplat itself is uploaded, its dependencies are not. So this module imports only the standard
library until it has checked that all dependencies are installed.
"""

from __future__ import annotations  # lets an older Python get as far as the version check

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
"""Module -> its package, as in pyproject.toml."""
OLDEST = (3, 11)
EXIT_CODE = 3


def problem() -> str | None:
    """Return what this Python lacks, with the remedy; None: nothing is missing."""
    version = ".".join(map(str, sys.version_info[:3]))
    where = f"the cluster's Python, {sys.executable} ({version})"
    if sys.version_info < OLDEST:
        return f"{where}, is too old: distplat needs {OLDEST[0]}.{OLDEST[1]} or later"
    missing = [package for module, package in NEEDED.items() if find_spec(module) is None]
    if not missing:
        return None
    listed = ", ".join(f'"{package}"' for package in missing)
    return (
        f"{where}, lacks packages that distplat needs: {', '.join(missing)}\n"
        f"install it there, or submit with --runtime-env-json '{{\"pip\": [{listed}]}}'"
    )


def main() -> None:
    """Run the driver of the job in the environment variable."""
    text = problem()
    if text is not None:
        sys.stderr.write(f"error: {text}\n")  # readers of the log remove control characters
        sys.exit(EXIT_CODE)
    from distplat.cli.main import main as command_line

    sys.argv[1:] = ["drive"]
    command_line()


if __name__ == "__main__":
    main()
