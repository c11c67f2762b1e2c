"""Plain data to frozen dataclasses and back: policies from TOML, state from JSON. Not a schema language.

Rules of the file:

- a key that the dataclass does not have is refused, naming the keys it has;
- a value of another type is refused, naming the dotted path and what was expected; an int is taken where a float is wanted, and a
  whole float where an int is (a protobuf Struct knows floats only);
- what `plain` writes, `parse` reads back equal.
"""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import StrEnum
from typing import Any, TypeVar, Union, cast, get_args, get_origin, get_type_hints

from interlock.errors import InvalidArgument

T = TypeVar("T")


def refuse(field: str, problem: str, value: object = None) -> InvalidArgument:
    """An `INVALID_FIELD` error for one field, with the value shortened."""
    return InvalidArgument(
        f"{field or 'value'}: {problem}", reason="INVALID_FIELD", field=field, metadata={"value": repr(value)[:80]}
    )


def parse(cls: type[T], data: object, field: str = "") -> T:
    """An instance of the dataclass `cls` from plain data.

    Raises:
        InvalidArgument: `INVALID_FIELD`, naming the dotted path of the first field at fault.
    """
    if not isinstance(data, Mapping):
        raise refuse(field, f"expected a table of {cls.__name__}, got {type(data).__name__}", data)
    known = {item.name: item for item in fields(cast(Any, cls))}
    for key in data:
        if key not in known:
            raise refuse(_join(field, str(key)), f"unknown key; known are {', '.join(sorted(known))}", data[key])
    hints = get_type_hints(cls)
    values = {name: _value(hints[name], data[name], _join(field, name)) for name in known if name in data}
    missing = [name for name, item in known.items() if name not in data and _required(item)]
    if missing:
        raise refuse(_join(field, missing[0]), "is required")
    try:
        return cls(**values)
    except InvalidArgument as error:
        raise refuse(_join(field, error.field), error.message.split(": ", 1)[-1]) from None


def plain(value: object) -> Any:
    """Plain data (dict, list, str, int, float, bool, None) equal to `value`; enums become their text, tuples lists."""
    if is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in fields(value)}
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, Mapping):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return value


def _required(item: Field[Any]) -> bool:
    return item.default is MISSING and item.default_factory is MISSING


def _join(path: str, name: str) -> str:
    return ".".join(part for part in (path, name) if part)


def _value(kind: Any, data: object, field: str) -> object:
    if kind is Any:
        return data
    origin = get_origin(kind)
    if origin in (Union, types.UnionType):
        return _optional(kind, data, field)
    if origin is tuple:
        return _items(get_args(kind)[0], data, field)
    if origin is not None and issubclass(origin, Mapping):
        return _table(get_args(kind)[1], data, field)
    if is_dataclass(kind):
        return parse(cast(type[object], kind), data, field)
    if isinstance(kind, type) and issubclass(kind, StrEnum):
        return _word(kind, data, field)
    return _scalar(kind, data, field)


def _optional(kind: Any, data: object, field: str) -> object:
    if data is None:
        return None
    return _value(next(arg for arg in get_args(kind) if arg is not type(None)), data, field)


def _items(kind: Any, data: object, field: str) -> tuple[object, ...]:
    if not isinstance(data, (list, tuple)):
        raise refuse(field, f"expected a list, got {type(data).__name__}", data)
    return tuple(_value(kind, item, f"{field}[{index}]") for index, item in enumerate(data))


def _table(kind: Any, data: object, field: str) -> dict[str, object]:
    if not isinstance(data, Mapping):
        raise refuse(field, f"expected a table, got {type(data).__name__}", data)
    return {str(key): _value(kind, item, _join(field, str(key))) for key, item in data.items()}


def _word(kind: type[StrEnum], data: object, field: str) -> StrEnum:
    words = [str(member.value) for member in kind]
    if data not in words:
        raise refuse(field, f"{data!r} is not one of {', '.join(words)}", data)
    return kind(data)


def _scalar(kind: Any, data: object, field: str) -> object:
    if kind is float and isinstance(data, int) and not isinstance(data, bool):
        return float(data)
    if kind is int and isinstance(data, float) and data.is_integer():
        return int(data)
    if not isinstance(data, kind) or (kind is int and isinstance(data, bool)):
        raise refuse(field, f"expected {kind.__name__}, got {data!r:.80}", data)
    return data
