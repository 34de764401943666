"""
Translates pydantic's validation errors to messages for a job file.

Pydantic provides the path of the field, the value, and all errors at once. This module adds ranges
in signs instead of prose, suggestions for typos, and hints about YAML's pitfalls.
"""

import re
import reprlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from distplat.platform.errors import Problem, hint, nearest
from distplat.platform.lr_schedules import REFUSED_SCHEDULES
from distplat.platform.optimizers import REFUSED_OPTIMIZERS
from distplat.platform.yaml_source import FieldPath

MAX_PROBLEMS = 50
MAX_SHOWN = 60

_KINDS = {
    "string_type": "text",
    "int_type": "a whole number",
    "int_parsing": "a whole number",
    "int_from_float": "a whole number",
    "number_not_whole": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "number_is_bool": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "bool_parsing": "true or false",
    "dict_type": "a mapping",
    "model_type": "a mapping",
    "model_attributes_type": "a mapping",
    "list_type": "a list",
    "tuple_type": "a list",
}
_BOUNDS = {
    "greater_than": ("gt", ">"),
    "greater_than_equal": ("ge", ">="),
    "less_than": ("lt", "<"),
    "less_than_equal": ("le", "<="),
}
_LENGTHS = {
    "too_short": ("min_length", "at least", "item"),
    "too_long": ("max_length", "at most", "item"),
    "string_too_short": ("min_length", "at least", "character"),
    "string_too_long": ("max_length", "at most", "character"),
}
_PATTERNS: dict[FieldPath, str] = {
    ("name",): "must be 1 to 63 of a-z, 0-9 and '-', with no '-' at either end",
    ("task",): "must be 'module:Class', 'module:function' or 'script.py --its arguments'",
    ("storage_path",): "must be a path: not empty, no control characters",
}
_REFUSED = {**REFUSED_OPTIMIZERS, **REFUSED_SCHEDULES}
"""Names that select a model of a union elsewhere, and why they are refused here."""
_MUST_BE = re.compile(r"must be (.*) \(got (.*)\)")
_YAML_BOOL = "YAML reads no, off, yes and on as true or false"

_repr = reprlib.Repr()
_repr.maxstring = _repr.maxother = _repr.maxlong = MAX_SHOWN


def problems_of(
    error: ValidationError, model: type[BaseModel], prefix: FieldPath = ()
) -> list[Problem]:
    """
    Convert a validation error to at most `MAX_PROBLEMS` problems, then a count.

    Args:
        error: pydantic's error.
        model: the validated model.
        prefix: its path in the job, for example `("strategy",)`.
    """
    details = error.errors(include_url=False)
    problems = _merged(_problem(detail, model, prefix) for detail in details[:MAX_PROBLEMS])
    if len(details) > MAX_PROBLEMS:
        problems.append(Problem(prefix, f"and {len(details) - MAX_PROBLEMS} more problems"))
    return problems


def _merged(problems: Iterable[Problem]) -> list[Problem]:
    """
    Merge the messages about a field of several types: pydantic reports an error for each type.

    An error about an item of the value replaces them, because then the value's type is right.
    """
    merged: list[Problem] = []
    for item in problems:
        if (
            merged
            and item.where[:-1] == merged[-1].where
            and _MUST_BE.fullmatch(merged[-1].message)
        ):
            merged.pop()
        previous = _MUST_BE.fullmatch(merged[-1].message) if merged else None
        current = _MUST_BE.fullmatch(item.message)
        if previous and current and merged[-1].where == item.where and previous[2] == current[2]:
            message = f"must be {previous[1]} or {current[1]} (got {current[2]})"
            merged[-1] = replace(item, message=message, hint=merged[-1].hint or item.hint)
        else:
            merged.append(item)
    return merged


def format_value(value: object) -> str:
    """Format a value for a message: as YAML, on one line, shortened."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "true" if value else "false"
    try:
        text = _repr.repr(value)
    except ValueError:  # Python refuses to format an int of thousands of digits
        text = "a number of thousands of digits"
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _problem(detail: ErrorDetails, root: type[BaseModel], prefix: FieldPath) -> Problem:
    where, holder, field = _locate(detail["loc"], root)
    error_type, value = detail["type"], detail["input"]
    if error_type.startswith("union_tag") and field is not None:
        where, message, advice = _tag_problem(where, value, field)
    elif error_type == "extra_forbidden":
        known, name = holder.model_fields if holder else (), str(where[-1])
        removed: Mapping[str, str] = getattr(holder, "removed_fields", {})
        message = f"unknown field (value {format_value(value)})"
        advice = removed[name] if name in removed else hint(name, known)
    elif error_type == "literal_error":
        expected = str(detail["ctx"]["expected"])
        near = (
            nearest(value, re.findall(r"'([^']*)'", expected)) if isinstance(value, str) else None
        )
        advice = f"did you mean {near!r}?" if near else _quote_hint(value)
        advice = _REFUSED.get(value, advice) if isinstance(value, str) else advice
        message = f"must be {expected} (got {format_value(value)})"
    elif error_type == "missing":
        message, advice = "required, but missing", ""
    elif error_type.startswith("model_") and field is not None and isinstance(value, str):
        message, advice = (
            f"must be a mapping (got {format_value(value)})",
            "write {name: ..., lr: ...}",
        )
    else:
        message, advice = _wrong_value(where, detail)
    return Problem((*prefix, *where), message, advice)


def _tag_problem(where: FieldPath, value: Any, field: FieldInfo) -> tuple[FieldPath, str, str]:
    """Describe a problem with the name that selects a model of a union."""
    tag_field, known = str(field.discriminator), _tags(field)
    inner = (*where, tag_field)
    if tag_field not in value:
        return inner, "required, but missing", f"allowed: {', '.join(sorted(known))}"
    name = value[tag_field]
    if not isinstance(name, str):
        return inner, f"must be text (got {format_value(name)})", _quote_hint(name)
    kind = next(part for part in reversed(where) if isinstance(part, str))
    message = f"unknown {kind.removesuffix('s')} {format_value(name)}"
    if name in _REFUSED:
        is_row_optimizer = where[0] == "embeddings"  # the reasons are those of the model's
        why = "" if is_row_optimizer else f"{_REFUSED[name]}; "
        return inner, message, f"{why}allowed: {', '.join(known)}"
    return inner, message, hint(name, known)


def _wrong_value(where: FieldPath, detail: ErrorDetails) -> tuple[str, str]:
    """Return message and hint for a value of a wrong type, range or pattern."""
    error_type, value, context = detail["type"], detail["input"], detail.get("ctx", {})
    got = f" (got {format_value(value)})"
    if (where and detail["loc"][-1] == "[key]") or error_type == "invalid_key":
        return f"a key must be text{got}", "quote it"
    if error_type in _KINDS:
        return f"must be {_KINDS[error_type]}{got}", _type_hint(_KINDS[error_type], value)
    if error_type in _BOUNDS:
        name, sign = _BOUNDS[error_type]
        bound = context[name]
        return f"must be {sign} {int(bound) if bound == int(bound) else bound}{got}", ""
    if error_type in _LENGTHS:
        name, sign, unit = _LENGTHS[error_type]
        plural = "s" if context[name] != 1 else ""
        return f"must have {sign} {context[name]} {unit}{plural} (got {len(value)})", ""
    if error_type == "string_pattern_mismatch":
        return _PATTERNS.get(where, f"must match {context['pattern']}") + got, ""
    if error_type in ("value_error", "assertion_error"):  # message of the model's own validator
        return str(context["error"]), ""
    return detail["msg"] + got, _quote_hint(value)


def _type_hint(expected: str, value: object) -> str:
    if expected == "text" and isinstance(value, int | float):
        return _quote_hint(value) or "quote it"
    return _YAML_BOOL if "number" in expected and isinstance(value, bool) else ""


def _quote_hint(value: object) -> str:
    return f"{_YAML_BOOL}: quote it" if isinstance(value, bool) else ""


def _locate(
    loc: tuple[str | int, ...], root: type[BaseModel]
) -> tuple[FieldPath, type[BaseModel] | None, FieldInfo | None]:
    """
    Follow pydantic's location from `root`.

    Returns:
        The path as in the file, without tags of unions; the model with its last part; and the field
        of that part, if any.
    """
    where: list[str | int] = []
    holder: type[BaseModel] | None = None
    model: type[BaseModel] | None = root
    field: FieldInfo | None = None
    for part in loc:
        if part == "[key]":
            break
        if field is not None and field.discriminator and part in _tags(field):
            model, field = _tags(field)[str(part)], None
            continue
        if isinstance(part, str) and field is not None and _has_several_types(field):
            continue  # names the type that was tried
        where.append(part)
        if isinstance(part, int):  # an item of a list: its model is that of the list's field
            field = _item_field(field)
            continue
        holder, field = model, model.model_fields.get(str(part)) if model else None
        model = _model_in(field.annotation) if field else None
    return tuple(where), holder, field


def _item_field(field: FieldInfo | None) -> FieldInfo | None:
    """Return a list's item as a field if a name in it selects its model, else None."""
    item: Any = next(iter(get_args(field.annotation)), None) if field is not None else None
    found = FieldInfo.from_annotation(item) if get_origin(item) is Annotated else None
    return found if found is not None and found.discriminator else None


def _has_several_types(field: FieldInfo) -> bool:
    """Return whether a field accepts several plain types; `X | None` counts as one."""
    kinds = {*get_args(field.annotation)} - {type(None)}
    union = get_origin(field.annotation) in (Union, UnionType)
    return union and len(kinds) > 1 and _model_in(field.annotation) is None


def _model_in(annotation: object) -> type[BaseModel] | None:
    """Return the model of a field, also of an optional one (`Model | None`)."""
    for candidate in get_args(annotation) or (annotation,):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _tags(field: FieldInfo) -> dict[str, type[BaseModel]]:
    """Return the models of a union by the names that select them, in alphabetical order."""
    tag_field = str(field.discriminator)
    models = {
        str(tag): model
        for model in get_args(field.annotation)
        for tag in get_args(model.model_fields[tag_field].annotation)
    }
    return dict(sorted(models.items()))
