"""Resource names: the only place where they are built or taken apart.

    models/{model}                        models/{model}/versions/{version}
    runs/{run}                            runs/{run}/checkpoints/{checkpoint}
    swaps/{swap}

Ids become file names, metric labels and log fields, so one pattern holds for all of them: a letter or digit, then up to 62 of
letters, digits, dot, underscore, hyphen; no dot-dot. What is not an id is refused here and nowhere else.
"""

from __future__ import annotations

import re

from interlock.errors import InvalidArgument

ID_PATTERN = r"[A-Za-z0-9](?:[A-Za-z0-9_-]|\.(?!\.)){0,62}"
_ID = re.compile(ID_PATTERN)


def check_id(value: str, field: str) -> str:
    """Returns `value` if it is a valid id.

    Raises:
        InvalidArgument: `INVALID_ID`, naming `field`.
    """
    if not _ID.fullmatch(value):
        raise InvalidArgument(
            f"{field}: {value[:80]!r} is not an id: a letter or digit, then at most 62 letters, digits, '.', '_' or '-', without '..'",
            reason="INVALID_ID",
            field=field,
            metadata={"value": value[:80]},
        )
    return value


def _build(pairs: tuple[tuple[str, str], ...]) -> str:
    return "/".join(f"{collection}/{check_id(value, collection.removesuffix('s'))}" for collection, value in pairs)


def _parse(name: str, collections: tuple[str, ...], field: str) -> tuple[str, ...]:
    parts = name.split("/")
    if len(parts) != 2 * len(collections) or tuple(parts[::2]) != collections:
        pattern = "/".join(f"{c}/{{{c.removesuffix('s')}}}" for c in collections)
        raise InvalidArgument(
            f"{field}: {name[:200]!r} does not match {pattern}",
            reason="INVALID_NAME",
            field=field,
            metadata={"value": name[:200], "pattern": pattern},
        )
    return tuple(check_id(value, field) for value in parts[1::2])


def model_name(model: str) -> str:
    """`models/{model}`."""
    return _build((("models", model),))


def version_name(model: str, version: str) -> str:
    """`models/{model}/versions/{version}`."""
    return _build((("models", model), ("versions", version)))


def run_name(run: str) -> str:
    """`runs/{run}`."""
    return _build((("runs", run),))


def checkpoint_name(run: str, checkpoint: str) -> str:
    """`runs/{run}/checkpoints/{checkpoint}`."""
    return _build((("runs", run), ("checkpoints", checkpoint)))


def swap_name(swap: str) -> str:
    """`swaps/{swap}`."""
    return _build((("swaps", swap),))


def parse_model(name: str, field: str = "model") -> str:
    """The model id in `models/{model}`."""
    return _parse(name, ("models",), field)[0]


def parse_version(name: str, field: str = "version") -> tuple[str, str]:
    """(model id, version id) in `models/{model}/versions/{version}`."""
    model, version = _parse(name, ("models", "versions"), field)
    return model, version


def parse_run(name: str, field: str = "run") -> str:
    """The run id in `runs/{run}`."""
    return _parse(name, ("runs",), field)[0]


def parse_checkpoint(name: str, field: str = "checkpoint") -> tuple[str, str]:
    """(run id, checkpoint id) in `runs/{run}/checkpoints/{checkpoint}`."""
    run, checkpoint = _parse(name, ("runs", "checkpoints"), field)
    return run, checkpoint


def parse_swap(name: str, field: str = "swap") -> str:
    """The swap id in `swaps/{swap}`."""
    return _parse(name, ("swaps",), field)[0]
