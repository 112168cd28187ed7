"""Turns pydantic's errors into messages that say where, what was given, what is allowed, and the nearest."""

import difflib
import json
from collections.abc import Iterable
from typing import Any, get_args

from pydantic import BaseModel, ValidationError

from mythos_ds.config.schema import RunConfig
from mythos_ds.errors import Coded, Problem

Location = tuple[str | int, ...]
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
_TYPE_NAMES = {
    "integer": "an integer",
    "number": "a number",
    "string": "a string",
    "boolean": "true or false",
    "array": "a list",
    "object": "an object",
    "null": "null",
}
_SHORTEST_PREFIX = 3


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest known word, or nothing."""
    names = list(known)
    lowered = {name.lower(): name for name in names}
    wanted = str(word).lower()
    close = difflib.get_close_matches(wanted, list(lowered), n=1, cutoff=0.6)
    if not close and len(wanted) >= _SHORTEST_PREFIX:
        close = [name for name in lowered if name.startswith(wanted)]
    return f"; did you mean '{lowered[close[0]]}'?" if close else ""


def dotted(location: Location) -> str:
    """`training.lr`, `data.datasets[0].prefix`."""
    text = ""
    for part in location:
        if isinstance(part, int):
            text += f"[{part}]"
        else:
            text += f".{part}" if text else part
    return text


def show(value: Any) -> str:
    """The value as JSON writes it, shortened."""
    text = json.dumps(value, default=repr)
    return text if len(text) <= 60 else text[:57] + "..."


def explain(error: ValidationError) -> list[Problem]:
    """One (key path, message) per wrong place."""
    schema = RunConfig.model_json_schema()
    explained: dict[str, Coded] = {}
    for item in error.errors(include_url=False):
        location = _field_location(item["loc"])
        key = dotted(location)
        if key not in explained:
            explained[key] = _explain_one(schema, location, item)
    # Of a union with a list, pydantic reports the whole value and the wrong element; the element says more.
    wholes = {key for key in explained if any(other.startswith(f"{key}[") for other in explained)}
    return [(key, message) for key, message in explained.items() if key not in wholes]


def allowed_values(schema: dict[str, Any], node: dict[str, Any]) -> str:
    """What a JSON schema node allows, in words."""
    node = _follow(schema, node)
    if "anyOf" in node:
        return " or ".join(allowed_values(schema, option) for option in node["anyOf"])
    if "enum" in node:
        return " or ".join(json.dumps(value) for value in node["enum"])
    if "const" in node:
        return json.dumps(node["const"])
    if "prefixItems" in node:
        return f"a list of {len(node['prefixItems'])} numbers"
    if "items" in node:
        item = _follow(schema, node["items"])
        return f"a list of {_plural(item)}"
    name = _TYPE_NAMES.get(node.get("type", ""), "any value")
    bounds = [f"{sign} {_bound(node[key])}" for key, sign in _BOUNDS.items() if key in node]
    return " ".join([name, " and ".join(bounds)]).strip()


def _bound(value: float) -> str:
    """A bound as short as it is exact."""
    return f"{value:g}" if float(f"{value:g}") == value else str(value)


def _plural(item: dict[str, Any]) -> str:
    if item.get("type") == "object":
        return "{" + ", ".join(item["properties"]) + "}"
    return f"{item['type']}s"


def _explain_one(schema: dict[str, Any], location: Location, item: Any) -> Coded:
    if item["type"] == "extra_forbidden":
        return Coded("MDS101", _unknown_key(schema, location))
    node = _node_at(schema, location)
    allowed = allowed_values(schema, node) if node is not None else item["msg"]
    if item["type"] == "missing" and location == item["loc"]:
        about = (node or {}).get("description")
        return Coded("MDS102", f"missing; required: {allowed}" + (f" ({about.rstrip('.')})" if about else ""))
    given = item["input"]
    return Coded("MDS103", f"{show(given)} given; allowed: {allowed}{_nearest(schema, node or {}, given)}")


def _unknown_key(schema: dict[str, Any], location: Location) -> str:
    name = str(location[-1])
    parent = _node_at(schema, location[:-1]) or schema
    known = list(_container(schema, parent, name).get("properties", {}))
    homes = [section for section in schema["properties"] if _has_property(schema, section, name)]
    hint = f"; it belongs in '{homes[0]}'" if homes else did_you_mean(name, known)
    return f"unknown key{hint}" if hint else f"unknown key; allowed here: {', '.join(known)}"


def _has_property(schema: dict[str, Any], section: str, name: str) -> bool:
    return name in (_node_at(schema, (section,)) or {}).get("properties", {})


def _nearest(schema: dict[str, Any], node: dict[str, Any], given: Any) -> str:
    """The valid value nearest to a wrong one, where there is one."""
    options = [_follow(schema, option) for option in node.get("anyOf", [node])]
    types = {option.get("type") for option in options}
    if isinstance(given, str):
        words = [
            word
            for option in options
            for word in [*option.get("enum", []), option.get("const")]
            if isinstance(word, str)
        ]
        if words:
            return did_you_mean(given, words)
        return _number_in_quotes(given, types)
    if isinstance(given, float) and given.is_integer() and "integer" in types:
        return f"; write {int(given)}"
    if isinstance(given, int | float) and not isinstance(given, bool):
        numbers = [value for option in options for value in option.get("enum", []) if isinstance(value, int)]
        numbers += [option["minimum"] for option in options if given < option.get("minimum", given)]
        numbers += [option["maximum"] for option in options if given > option.get("maximum", given)]
        if numbers:
            return f"; nearest: {min(numbers, key=lambda number: abs(number - given))}"
    return ""


def _number_in_quotes(given: str, types: set[str | None]) -> str:
    if types & {"integer", "number"}:
        try:
            number = float(given)
        except ValueError:
            return ""
        return f"; write {int(number) if number.is_integer() else number} as a number"
    return ""


def _follow(schema: dict[str, Any], node: dict[str, Any]) -> dict[str, Any]:
    """Resolves `$ref`, also where it is the only non-null choice."""
    while "$ref" in node:
        node = schema["$defs"][node["$ref"].rsplit("/", 1)[-1]]
    return node


def _node_at(schema: dict[str, Any], location: Location) -> dict[str, Any] | None:
    node: dict[str, Any] = schema
    for part in location:
        node = _container(schema, node, part)
        child = node.get("items") if isinstance(part, int) else node.get("properties", {}).get(part)
        if child is None:
            return None
        # A description stands beside the reference, the content behind it.
        node = {**_follow(schema, child), **{key: value for key, value in child.items() if key != "$ref"}}
    return node


def _container(schema: dict[str, Any], node: dict[str, Any], part: str | int) -> dict[str, Any]:
    """The choice of an `anyOf` that can hold `part`."""
    wanted = "items" if isinstance(part, int) else "properties"
    for option in [node, *node.get("anyOf", [])]:
        option = _follow(schema, option)
        if wanted in option:
            return option
    return node


def _field_location(location: Location) -> Location:
    """Drops what pydantic appends for the members of a union (`int`, `literal['auto']`) or of a tuple."""
    kept: list[str | int] = []
    model: type[BaseModel] | None = RunConfig
    annotation: Any = None
    for part in location:
        if model is not None:
            kept.append(part)
            field = model.model_fields.get(str(part))
            annotation = field.annotation if field is not None else None
            model = None if _is_list(annotation) else section_type(annotation)
        elif isinstance(part, int) and _is_list(annotation) and getattr(annotation, "__origin__", None) is not tuple:
            kept.append(part)
            model = section_type(annotation)
    return tuple(kept)


def _is_list(annotation: Any) -> bool:
    return any(getattr(option, "__origin__", option) in (list, tuple) for option in [annotation, *get_args(annotation)])


def section_type(annotation: Any) -> type[BaseModel] | None:
    """The section class inside `X`, `X | None` or `list[X] | None`."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    for option in get_args(annotation):
        found = section_type(option)
        if found is not None:
            return found
    return None
