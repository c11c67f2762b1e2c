"""Structured logs: one JSON object per line on standard output, with service, request id and trace id; secrets masked.

Events are constant snake_case strings with key-values, never formatted sentences.
"""

from __future__ import annotations

import logging
import re
import sys
from collections.abc import Mapping, MutableMapping
from typing import Any

import orjson
import structlog
from opentelemetry import trace

_SECRET = re.compile(r"(api[_-]?key|authorization|password|secret|token$)", re.IGNORECASE)
_NOT_SECRET = frozenset({"fencing_token"})
MASK = "***"


def _mask(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    for name in event:
        if _SECRET.search(name) and name not in _NOT_SECRET:
            event[name] = MASK
    return event


def _trace(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    context = trace.get_current_span().get_span_context()
    if context.is_valid:
        event.setdefault("trace_id", f"{context.trace_id:032x}")
        event.setdefault("span_id", f"{context.span_id:016x}")
    return event


def _dumps(event: Any, **_options: Any) -> str:
    return orjson.dumps(event, default=str, option=orjson.OPT_NON_STR_KEYS).decode()


def configure(service: str, level: str = "info", fmt: str = "json") -> None:
    """Sets up structlog and the standard library's logging for this process; call once, first thing."""
    numeric = logging.getLevelNamesMapping()[level.upper()]

    def name_service(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
        event.setdefault("service", service)
        return event

    shared: list[Any] = [
        structlog.contextvars.merge_contextvars,
        name_service,
        structlog.processors.add_log_level,
        structlog.processors.TimeStamper(fmt="iso", utc=True),
        _trace,
        _mask,
    ]
    if fmt == "json":
        tail: list[Any] = [structlog.processors.dict_tracebacks, structlog.processors.JSONRenderer(serializer=_dumps)]
    else:
        tail = [structlog.dev.ConsoleRenderer()]
    structlog.configure(
        processors=[*shared, *tail],
        wrapper_class=structlog.make_filtering_bound_logger(numeric),
        logger_factory=structlog.PrintLoggerFactory(sys.stdout),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stdout)
    handler.setFormatter(
        structlog.stdlib.ProcessorFormatter(foreign_pre_chain=shared, processors=[_drop_private, *tail])
    )
    logging.basicConfig(handlers=[handler], level=max(numeric, logging.WARNING), force=True)


def _drop_private(_logger: object, _method: str, event: MutableMapping[str, Any]) -> Mapping[str, Any]:
    event.pop("_record", None)
    event.pop("_from_structlog", None)
    return event
