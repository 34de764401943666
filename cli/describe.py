"""`distplat strategies`: every architecture this installation knows, and its options."""

from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import to_jsonable_python

from distplat.cli.render import to_json
from distplat.platform.errors import printable
from distplat.strategies.catalog import strategies

_NO_LIMIT = 2**40  # what a field says that means: any number that makes sense
_SIGNS = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}


def print_strategies(*, as_json: bool) -> None:
    """Print names, one line each, and the options with type, default and meaning."""
    found = [_described(name) for name in strategies.names()]
    if as_json:
        print(to_json(found))
        return
    for number, strategy in enumerate(found):
        print(printable(f"{chr(10) if number else ''}{strategy['name']}  {strategy['summary']}"))
        for option in strategy["options"]:
            print(printable(f"    {option['name']}: {option['type']}, default {option['default']}"))
            print(printable(f"        {option['description']}"))


def _described(name: str) -> dict[str, Any]:
    kind = strategies.get(name)
    return {"name": name, "summary": kind.summary, "options": field_rows(kind.options_type)}


def field_rows(model: type[BaseModel]) -> list[dict[str, Any]]:
    """Give name, type, default and description of a model's fields, in words."""
    schema = model.model_json_schema()
    return [
        {
            "name": name,
            "type": " ".join([_type(schema["properties"][name]), *_bounds(field)]),
            "default": "required"
            if field.is_required()
            else to_jsonable_python(field.get_default(call_default_factory=True)),
            "description": " ".join((field.description or "").split()),
        }
        for name, field in model.model_fields.items()
    ]


def _bounds(field: FieldInfo) -> list[str]:
    """Give `1 to 256`, `> 0`; a schema lacks them where a validator of ours stands before."""
    found = {sign: getattr(m, sign) for m in field.metadata for sign in _SIGNS if hasattr(m, sign)}
    if tops := [m.le for m in field.metadata if hasattr(m, "le")]:
        found["le"] = min(tops)
    if found.get("le", 0) >= _NO_LIMIT:
        del found["le"]
    if {"ge", "le"} <= found.keys():
        return [f"{_shown(found['ge'])} to {_shown(found['le'])}"]
    return [", ".join(f"{_SIGNS[sign]} {_shown(at)}" for sign, at in found.items())] * bool(found)


def _shown(bound: float) -> str:
    return str(bound) if isinstance(bound, int) else f"{bound:g}"


def _type(schema: dict[str, Any]) -> str:
    """Put a JSON schema into words a user reads: `integer`, `'gloo' or 'nccl'`."""
    if "anyOf" in schema:
        return " or ".join(_type(part) for part in schema["anyOf"])
    if "const" in schema:
        return repr(schema["const"])
    if "enum" in schema:
        return " or ".join(map(repr, schema["enum"]))
    if isinstance(inner := schema.get("additionalProperties"), dict):
        return f"mapping of text to {_type(inner)}"
    if "items" in schema:
        return f"list of {_type(schema['items'])}"
    return str(schema.get("type", "any"))
