"""Groups of typed, described, bounded values: what the settings are made of. Knows neither files nor the environment.

A group is a class whose annotated attributes are its fields, made from keyword arguments, checked whole (every mistake is told, each by its
name), and never changed. pydantic does the same and more; it costs a process 0.15 s and 14 MB before its first line, of the 0.6 s and 100 MB that
an inference process may have (measured; it stays in the gateway, which checks strangers' bodies with it).
"""

from __future__ import annotations

import json
import operator
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Literal, dataclass_transform, get_args, get_origin, get_type_hints

_MISSING: Any = object()
_WORDS = {"1": True, "true": True, "yes": True, "on": True, "0": False, "false": False, "no": False, "off": False}


@dataclass(frozen=True, slots=True)
class FieldInfo:
    """What is known of one field; `type` is filled in by its group."""

    default: Any
    make: Callable[[], Any] | None
    at_least: float | None
    above: float | None
    at_most: float | None
    description: str

    def initial(self) -> Any:
        """Its default."""
        return self.make() if self.make is not None else self.default


def Field(  # noqa: N802  reads as the declaration it is
    default: Any = _MISSING,
    *,
    default_factory: Callable[[], Any] | None = None,
    ge: float | None = None,
    gt: float | None = None,
    le: float | None = None,
    description: str = "",
) -> Any:
    """Declares a field: its default, its bounds (at least, above, at most) and its meaning."""
    return FieldInfo(default, default_factory, ge, gt, le, description)


@dataclass_transform(kw_only_default=True, frozen_default=True)
class Group:
    """Base of a group. Subclasses need nothing but their fields.

    Raises:
        ValueError: from the constructor; `str` has one `name: problem` per mistake, joined by "; ".
    """

    fields: ClassVar[Mapping[str, FieldInfo]] = {}
    types: ClassVar[Mapping[str, Any]] = {}

    def __init_subclass__(cls) -> None:
        hints = {name: hint for name, hint in get_type_hints(cls).items() if get_origin(hint) is not ClassVar}
        cls.types = hints
        cls.fields = {name: _declared(getattr(cls, name)) for name in hints}

    def __init__(self, **given: Any) -> None:
        problems = [f"{name}: there is no such setting" for name in given if name not in self.fields]
        for name, info in self.fields.items():
            try:
                value = _checked(given[name], self.types[name], info) if name in given else info.initial()
            except ValueError as error:
                text = str(error)
                inner = isinstance(self.types[name], type) and issubclass(self.types[name], Group)
                problems += [f"{name}.{line}" for line in text.split("; ")] if inner else [f"{name}: {text}"]
            else:
                object.__setattr__(self, name, value)
        if problems:
            raise ValueError("; ".join(problems))

    def __setattr__(self, name: str, value: object) -> None:
        raise AttributeError(f"{type(self).__name__}.{name} can't be changed")

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and vars(other) == vars(self)

    def __hash__(self) -> int:
        return hash(repr(self))

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(f'{name}={value!r}' for name, value in vars(self).items())})"


def _declared(attribute: Any) -> FieldInfo:
    """A plain default is a field without bounds or meaning."""
    return attribute if isinstance(attribute, FieldInfo) else FieldInfo(attribute, None, None, None, None, "")


def _checked(value: Any, kind: Any, info: FieldInfo) -> Any:
    made = convert(value, kind)
    for bound, holds, words in (
        (info.at_least, operator.ge, "at least"),
        (info.above, operator.gt, "above"),
        (info.at_most, operator.le, "at most"),
    ):
        if bound is not None and not holds(made, bound):
            raise ValueError(f"{made!r} must be {words} {bound:g}")
    return made


def convert(value: Any, kind: Any) -> Any:
    """A value as the type of a field. Text, as from the environment, is read as what is meant: numbers, yes and no, JSON for lists and tables.

    Raises:
        ValueError: what it is and what it should be.
    """
    if get_origin(kind) is Literal:
        if value not in get_args(kind):
            raise ValueError(f"{value!r} is none of {', '.join(map(repr, get_args(kind)))}")
        return value
    if isinstance(kind, types.GenericAlias):
        return _container(value, kind)
    if issubclass(kind, Group):
        if isinstance(value, kind):
            return value
        if not isinstance(value, Mapping):
            raise _not(value, "a table", place="*: ")
        return kind(**value)
    return _SCALARS[kind](value)


def _container(value: Any, kind: types.GenericAlias) -> Any:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except ValueError:
            raise _not(value, "JSON") from None
    if kind.__origin__ is list:
        if not isinstance(value, list | tuple):
            raise _not(value, "a list")
        return [convert(each, kind.__args__[0]) for each in value]
    if not isinstance(value, Mapping):
        raise _not(value, "a table")
    return {convert(name, kind.__args__[0]): convert(each, kind.__args__[1]) for name, each in value.items()}


def _not(value: Any, wanted: str, place: str = "") -> ValueError:
    return ValueError(f"{place}{value!r} is not {wanted}")


def _bool(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    found = _WORDS.get(str(value).lower())
    if found is None:
        raise ValueError(f"{value!r} is neither true nor false")
    return found


def _int(value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int | str | float) or (isinstance(value, float) and value % 1):
        raise _not(value, "a whole number")
    try:
        return int(value)
    except ValueError:
        raise _not(value, "a whole number") from None


def _float(value: Any) -> float:
    try:
        if isinstance(value, bool):
            raise TypeError
        return float(value)
    except (TypeError, ValueError):
        raise _not(value, "a number") from None


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise _not(value, "text")
    return value


def _path(value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise _not(value, "a path")
    return Path(value)


_SCALARS: Mapping[Any, Callable[[Any], Any]] = {bool: _bool, int: _int, float: _float, str: _str, Path: _path}
