"""Frozen dataclasses to plain JSON and back, by their type hints. For rows of our own stores; wire formats are protobuf's business.

Fields that a stored row lacks take their defaults, so a dataclass may grow; a field that the class has lost is dropped.
"""

from __future__ import annotations

import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, fields, is_dataclass
from enum import Enum
from functools import cache
from typing import Any, TypeVar

from interlock.errors import DataLoss

T = TypeVar("T")


def dumps(value: Any) -> str:
    """JSON of a dataclass made of dataclasses, enums, tuples, mappings, strings, numbers and None."""
    return json.dumps(_plain(value), separators=(",", ":"), sort_keys=True)


def _plain(value: Any) -> Any:
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, tuple | list | frozenset):
        return [_plain(item) for item in value]
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    return value


def loads(cls: type[T], text: str) -> T:
    """The dataclass that `dumps` wrote.

    Raises:
        DataLoss: `ROW_CORRUPT`, naming the class.
    """
    try:
        return typing.cast(T, _build(cls, json.loads(text)))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataLoss(f"a stored {cls.__name__} cannot be read: {error!r}", reason="ROW_CORRUPT") from error


@cache
def _hints(cls: type) -> dict[str, tuple[Field[Any], Any]]:
    hints = typing.get_type_hints(cls)
    return {f.name: (f, hints[f.name]) for f in fields(cls)}


def _build(hint: Any, value: Any) -> Any:
    if is_dataclass(hint):
        known = _hints(typing.cast(type, hint))
        lacking = [n for n, (f, _) in known.items() if n not in value and f.default is f.default_factory is MISSING]
        if lacking:
            raise KeyError(lacking[0])
        return hint(**{name: _build(known[name][1], item) for name, item in value.items() if name in known})  # type: ignore[operator]
    origin, arguments = typing.get_origin(hint), typing.get_args(hint)
    if origin in (typing.Union, types.UnionType):
        return None if value is None else _build(next(a for a in arguments if a is not type(None)), value)
    if origin is tuple:
        return tuple(_build(arguments[0], item) for item in value)
    if origin is frozenset:
        return frozenset(_build(arguments[0], item) for item in value)
    if origin is not None and issubclass(origin, Mapping):
        return {k: _build(arguments[1], v) for k, v in value.items()}
    if isinstance(hint, type) and issubclass(hint, Enum | float):
        return hint(value)
    return value


def plain(text: str) -> dict[str, str]:
    """A flat table that `dumps` wrote."""
    return {str(k): str(v) for k, v in json.loads(text).items()}
