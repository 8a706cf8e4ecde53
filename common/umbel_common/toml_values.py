"""Turns TOML text into typed values, with errors that name file, field, and what is accepted."""

import re
import tomllib
from difflib import get_close_matches
from typing import TypeVar

import msgspec
from msgspec import inspect

from umbel_common.errors import ConfigError

T = TypeVar("T")


def parse_toml(text: str, kind: type[T], file: object) -> T:
    """The value that `text` describes.

    Args:
        kind: a `msgspec.Struct`; unknown fields are refused where it forbids them.
        file: where the text came from, for errors; the caller has read it.

    Raises:
        ConfigError: the text is not TOML, or has an unknown or missing field or a wrong value.
    """
    return from_table(read_table(text, file), kind, file)


def read_table(text: str, file: object) -> dict[str, object]:
    """The table that `text` describes.

    Raises:
        ConfigError: the text is not TOML.
    """
    try:
        return tomllib.loads(text)
    # For numbers too long and lists too deep, tomllib raises plain errors.
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            "a configuration file is not valid TOML",
            file=file,
            found=error,
            remedy="put every text in quotes, and name each field once; see https://toml.io",
        ) from None


def from_table(data: dict[str, object], kind: type[T], file: object) -> T:
    """Like `parse_toml`, from a table of `read_table`."""
    try:
        return msgspec.convert(data, kind)
    except msgspec.ValidationError as error:
        raise _config_error(str(error), data, kind, file) from None


def _config_error(message: str, data: object, kind: type, file: object) -> ConfigError:
    """Turns msgspec's message, "what is wrong - at `$.table.field`", into an error of ours."""
    what, _, place = message.partition(" - at ")
    path = re.findall(r"[^.\[\]`$]+|\[\d+\]", place)
    if found := re.fullmatch(r"Object contains unknown field `(.*)`", what):
        return _unknown_field(found[1], path, kind, file)
    if found := re.fullmatch(r"Object missing required field `(.*)`", what):
        missing = _missing([inspect.type_info(kind)], data) or [_dotted([*path, found[1]])]
        if len(missing) > 1:
            return ConfigError(
                "fields are missing", file=file, field=", ".join(missing), remedy="add each of them"
            )
        return ConfigError(
            "a field is missing",
            file=file,
            field=_dotted([*path, found[1]]),
            remedy=f"add it{_to_table(path)}",
        )
    return ConfigError(
        "a field has a wrong value",
        file=file,
        field=_dotted(path) or None,
        found=_shown(data, path),
        accepted=_accepted(what, kind, path),
    )


def _accepted(what: str, kind: type, path: list[str]) -> str:
    expected = re.fullmatch(r"Expected (.*?)(?:, got .*)?", what)
    if expected is None:
        return _choices(kind, path) or what
    described = _descriptions(_types_in(kind, path)) if "matching regex" in what else []
    return described[0] if described else _plain(expected[1])


def _descriptions(types: list[inspect.Type]) -> list[str]:
    """What fields of these types say of their values: the descriptions of `msgspec.Meta`."""
    found = []
    for one in types:
        if isinstance(one, inspect.Metadata):
            found += [
                str(text) for text in [(one.extra_json_schema or {}).get("description")] if text
            ]
            one = one.type
        if isinstance(one, inspect.UnionType):
            found += _descriptions(list(one.types))
    return found


def _missing(types: list[inspect.Type], data: object, above: str = "") -> list[str]:
    """Every field that a table lacks, and that each lacking table would need."""
    structs = [one for one in _alternatives(types) if isinstance(one, inspect.StructType)]
    if len(structs) != 1 or not isinstance(data, dict):
        # Which fields are needed depends on what the table is.
        return []
    found = []
    for field in structs[0].fields:
        name = f"{above}{field.encode_name}"
        if field.encode_name in data:
            found += _missing([field.type], data[field.encode_name], f"{name}.")
        elif field.required:
            found += _missing([field.type], {}, f"{name}.") or [name]
    return found


def _choices(kind: type, path: list[str]) -> str | None:
    """The words that a field may have, if these are few: of a choice, or of the kind of a table."""
    *above, name = path or [""]
    words: list[object] = []
    for one in _types_at(kind, above):
        if isinstance(one, inspect.StructType) and one.tag_field == name:
            words.append(one.tag)
    for one in _types_at(kind, path):
        if isinstance(one, inspect.LiteralType):
            words += one.values
    others = [_OTHERS[type(one)] for one in _types_at(kind, path) if type(one) in _OTHERS]
    return ", ".join([*sorted(map(str, words)), *others]) or None


def _unknown_field(name: str, path: list[str], kind: type, file: object) -> ConfigError:
    known = _fields_at(kind, path)
    close = get_close_matches(name, known, n=1)
    return ConfigError(
        "a field is unknown",
        file=file,
        field=_dotted([*path, name]),
        found=name,
        accepted=", ".join(known),
        remedy=f"did you mean {close[0]}?" if close else "remove it, or see the documentation",
    )


def _types_at(kind: type, path: list[str]) -> list[inspect.Type]:
    """Whatever types the value at `path` may have, each by itself."""
    return _alternatives(_types_in(kind, path))


def _types_in(kind: type, path: list[str]) -> list[inspect.Type]:
    """The types of the value at `path`, as they are written."""
    types: list[inspect.Type] = [inspect.type_info(kind)]
    for step in path:
        types = [
            inner
            for outer in _alternatives(types)
            for inner in _inside(outer, None if step.startswith("[") else step)
        ]
    return types


def _fields_at(kind: type, path: list[str]) -> list[str]:
    """Names of all fields that the table at `path` may have, whichever type it is of."""
    names = [
        field.encode_name
        for outer in _types_at(kind, path)
        if isinstance(outer, inspect.StructType)
        for field in outer.fields
    ]
    return list(dict.fromkeys(names))


def _alternatives(types: list[inspect.Type]) -> list[inspect.Type]:
    plain = [kind.type if isinstance(kind, inspect.Metadata) else kind for kind in types]
    return [
        inner
        for outer in plain
        for inner in (outer.types if isinstance(outer, inspect.UnionType) else (outer,))
    ]


def _inside(outer: inspect.Type, name: str | None) -> list[inspect.Type]:
    """Types of the field `name`; for None, of the elements of an array."""
    match outer:
        case inspect.StructType(fields=fields) if name is not None:
            return [field.type for field in fields if field.encode_name == name]
        case inspect.VarTupleType(item_type=item) | inspect.ListType(item_type=item):
            return [item] if name is None else []
        case inspect.DictType(value_type=value):
            return [value]
        case _:
            return []


def _dotted(path: list[str]) -> str:
    return ".".join(path).replace(".[", "[")


def _to_table(path: list[str]) -> str:
    return f" to the table [{_dotted(path)}]" if path else " at the top of the file"


def _shown(data: object, path: list[str]) -> object:
    """The value at `path`, or None; a whole table or list is named by its type only."""
    for step in path:
        if step.startswith("[") and isinstance(data, list):
            data = data[int(step[1:-1])]
        elif isinstance(data, dict) and step in data:
            data = data[step]
        else:
            return None
    if isinstance(data, dict):
        return "a table"
    return "a list" if isinstance(data, list) else repr(data)


_OTHERS: dict[type, str] = {
    inspect.IntType: "a whole number",
    inspect.FloatType: "a number",
    inspect.VarTupleType: "a list in [ ]",
    inspect.ListType: "a list in [ ]",
    inspect.DictType: "a table",
}
"""What a field may have beside the words of a choice."""


def _plain(expected: str) -> str:
    expected = re.sub(r"`([a-z]+(?: \| [a-z]+)+)`", _each, expected)
    names = {
        "`str`": "a text in quotes",
        "`int`": "a whole number",
        "`float`": "a number",
        "`bool`": "true or false",
        "`array`": "a list in [ ]",
        "`object`": "a table",
    }
    for technical, plain in names.items():
        expected = expected.replace(technical, plain)
    return expected


def _each(types: re.Match[str]) -> str:
    """Several types of JSON as one phrase; a field is left out where null is meant."""
    return " or ".join(f"`{name}`" for name in types[1].split(" | ") if name != "null")
