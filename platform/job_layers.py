"""
The layers a job is made of, and where each value in it came from.

Later layers win: file, environment, overrides. The idea of layers that remember the origin of each
value is that of `git config --show-origin`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from distplat.platform.errors import Problem, SpecError
from distplat.platform.spec_messages import show
from distplat.platform.yaml_source import MAX_DEPTH, FieldPath, parse_yaml

ENV_PREFIX = "DISTPLAT_"
RESERVED_VARIABLES = {"DISTPLAT_JOB_ID", "DISTPLAT_TESTING", "DISTPLAT_FAILPOINT"}
"""Variables with our prefix that are no settings of a job."""

Place = tuple[str, int, int]
"""File, line and column; the name of the variable or override, 0 and 0 for what is in no file."""

_STRATEGY_NAME = {("strategy",), ("strategy", "name")}


@dataclass(frozen=True)
class Setting:
    """One value given outside the file."""

    path: FieldPath
    source: str
    """What to call it in messages: `DISTPLAT_SEED`, `--set seed`."""
    text: str
    """The value, in YAML."""


def from_environment(environ: Mapping[str, str]) -> list[Setting]:
    """Read `DISTPLAT_SCALING__NUM_WORKERS=4` as the setting `scaling.num_workers`."""
    return [
        Setting(tuple(name.removeprefix(ENV_PREFIX).lower().split("__")), name, text)
        for name, text in sorted(environ.items())
        if name.startswith(ENV_PREFIX) and name not in RESERVED_VARIABLES
    ]


def from_overrides(overrides: Sequence[str]) -> tuple[list[Setting], list[Problem]]:
    """Read `a.b=c`; give also what could not be read."""
    settings, found = [], []
    for override in overrides:
        name, equals, text = override.partition("=")
        path = tuple(part.strip() for part in name.split("."))
        if equals and all(path):
            settings.append(Setting(path, f"--set {'.'.join(path)}", text))
        else:
            message = f"must be field=value or field.subfield=value (got {show(override)})"
            found.append(Problem((), message, file="--set"))
    return settings, found


@dataclass
class Draft:
    """A job in the making: plain values and their places. It owns `data` and changes it."""

    file: str
    """What to call the lowest layer; empty: it is no file."""
    data: dict[str, object]
    places: dict[FieldPath, Place] = field(default_factory=dict)

    def apply(self, settings: Sequence[Setting]) -> list[Problem]:
        """
        Lay one layer over what is there, and give what could not be applied.

        A strategy's new name comes before its options, whatever the order they are written in:
        it drops the options of the layers below, which were meant for another strategy.
        """
        found: list[Problem] = []
        for setting in sorted(settings, key=lambda one: one.path not in _STRATEGY_NAME):
            try:
                value, _ = parse_yaml(setting.text, setting.source)
                self._set(setting.path, value, setting.source)
            except SpecError as error:
                found.extend(error.problems)
        return found

    def locate(self, problem: Problem) -> Problem:
        """Add the place of the problem's field, or of the nearest field around it."""
        if problem.file:
            return problem
        for length in range(len(problem.where), 0, -1):
            place = self.places.get(problem.where[:length])
            if place is not None:
                return replace(problem, file=place[0], line=place[1], column=place[2])
        return replace(problem, file=self.file)

    def _set(self, path: FieldPath, value: object, source: str) -> None:
        """
        Set one field, making the mappings around it.

        Raises:
            SpecError: something around it is there and no mapping, or it is too deep.
        """
        if len(path) > MAX_DEPTH:
            raise SpecError(Problem((), f"nested deeper than {MAX_DEPTH}", file=source))
        if path[0] == "strategy":
            path = self._open_strategy(path, value, source)
        here = self.data
        for length, part in enumerate(path[:-1], 1):
            inner = here.get(str(part))
            if inner is None:
                inner = {}
                self.places[path[:length]] = (source, 0, 0)
            if not isinstance(inner, dict):
                around = ".".join(map(str, path[:length]))
                message = f"cannot be set: {around} is {show(inner)}, not a mapping"
                raise SpecError(Problem(path, message, file=source))
            here[str(part)] = inner
            here = inner
        here[str(path[-1])] = value
        self._move(path, source)

    def _open_strategy(self, path: FieldPath, value: object, source: str) -> FieldPath:
        """Make `strategy` a mapping, without the options of a strategy that is replaced."""
        present = self.data.get("strategy")
        if isinstance(present, str):
            present = self.data["strategy"] = {"name": present}
        if path == ("strategy",) and isinstance(value, str):
            path = ("strategy", "name")
        same = isinstance(present, dict) and present.get("name") == value
        if path == ("strategy", "name") and not same:
            self.data["strategy"] = {}
            self._move(("strategy",), source)
        return path

    def _move(self, path: FieldPath, source: str) -> None:
        """Let a field and all below it come from `source`."""
        below = [place for place in self.places if place[: len(path)] == path]
        for place in below:
            del self.places[place]
        self.places[path] = (source, 0, 0)
