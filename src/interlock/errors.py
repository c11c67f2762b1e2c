"""The exception tree of Interlock. It knows no transport: edges translate (`interlock.runtime.status`, the gateway's `problems`).

    InterlockError
    ├── InvalidArgument        the caller sent something that can never work
    ├── NotFound               the named resource does not exist
    ├── AlreadyExists          same id, other content
    ├── FailedPrecondition     right request, wrong state of the world: digest mismatch, incompatible signature, quarantined
    │   └── IllegalTransition  an event that the state does not take; nothing changed
    ├── Aborted                lost a race: swap in progress, stale epoch, stale controller
    ├── ResourceExhausted      does not fit, queue full, rate limit; may say when to try again
    ├── Unavailable            nothing ready, draining, a dependency is down; may say when to try again
    ├── DeadlineExceeded       the caller's time ran out
    ├── Cancelled              the caller went away
    ├── Unauthenticated        no key, or an unknown one
    ├── PermissionDenied       a key without the scope
    ├── Unimplemented          known and planned, not built; says what to use instead
    ├── DataLoss               bytes on disk are not the bytes that were written
    └── Internal               our own bug or an engine fault; carries an error id, never internals

`kind` is one of gRPC's code names, `reason` is stable and listed in docs/reference/errors.md, and everything variable in the
message is also in `metadata`, so that a program never has to parse a sentence.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar


class InterlockError(Exception):
    """Something in the world is not as the request needs it.

    Attributes:
        kind: the gRPC code name this maps to.
        reason: UPPER_SNAKE, at most 63 characters, stable across releases.
        metadata: every variable part of the message, as text.
        field: the request field at fault, as a dotted path; empty when no single field is.
        retry_after_seconds: when trying again makes sense; None when it does not or is not known.
    """

    kind: ClassVar[str] = "INTERNAL"
    default_reason: ClassVar[str] = "INTERNAL"

    def __init__(
        self,
        message: str,
        *,
        reason: str | None = None,
        field: str = "",
        retry_after_seconds: float | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.reason = reason or self.default_reason
        self.field = field
        self.retry_after_seconds = retry_after_seconds
        self.metadata: dict[str, str] = dict(metadata or {})


class InvalidArgument(InterlockError):
    """The request can never work as sent; `field` names what to fix."""

    kind = "INVALID_ARGUMENT"
    default_reason = "INVALID_ARGUMENT"


class NotFound(InterlockError):
    """The named resource does not exist."""

    kind = "NOT_FOUND"
    default_reason = "NOT_FOUND"


class AlreadyExists(InterlockError):
    """The id is taken by different content."""

    kind = "ALREADY_EXISTS"
    default_reason = "ALREADY_EXISTS"


class FailedPrecondition(InterlockError):
    """The request is right and the state of the world is not."""

    kind = "FAILED_PRECONDITION"
    default_reason = "FAILED_PRECONDITION"


class IllegalTransition(FailedPrecondition):
    """A state does not take this event. Nothing changed."""

    default_reason = "ILLEGAL_TRANSITION"


class Aborted(InterlockError):
    """The request lost a race; read the current state before trying again."""

    kind = "ABORTED"
    default_reason = "ABORTED"


class ResourceExhausted(InterlockError):
    """A bound was reached: memory, queue, rate, size."""

    kind = "RESOURCE_EXHAUSTED"
    default_reason = "RESOURCE_EXHAUSTED"


class Unavailable(InterlockError):
    """Nobody can answer right now; trying again may work."""

    kind = "UNAVAILABLE"
    default_reason = "UNAVAILABLE"


class DeadlineExceeded(InterlockError):
    """The caller's deadline passed before the answer."""

    kind = "DEADLINE_EXCEEDED"
    default_reason = "DEADLINE_EXCEEDED"


class Cancelled(InterlockError):
    """The caller went away."""

    kind = "CANCELLED"
    default_reason = "CANCELLED"


class Unauthenticated(InterlockError):
    """No API key, or one that is not known."""

    kind = "UNAUTHENTICATED"
    default_reason = "API_KEY_INVALID"


class PermissionDenied(InterlockError):
    """The API key lacks the scope that this verb needs."""

    kind = "PERMISSION_DENIED"
    default_reason = "SCOPE_MISSING"


class Unimplemented(InterlockError):
    """The verb is part of the contract and not built yet; docs/reference/planned.md lists all of them."""

    kind = "UNIMPLEMENTED"
    default_reason = "PLANNED"


class DataLoss(InterlockError):
    """Bytes on disk are not the bytes that were written."""

    kind = "DATA_LOSS"
    default_reason = "DIGEST_MISMATCH"


class Internal(InterlockError):
    """A fault of ours or of an engine. The message carries an error id, never internals."""

    kind = "INTERNAL"
    default_reason = "INTERNAL"


def _tree(root: type[InterlockError]) -> dict[str, type[InterlockError]]:
    return {cls.kind: cls for cls in root.__subclasses__()}


BY_KIND: Mapping[str, type[InterlockError]] = _tree(InterlockError)
"""gRPC code name -> class, for rebuilding an error on the client's side of a wire."""


def as_plain(error: InterlockError) -> dict[str, Any]:
    """An error as JSON, for processes of ours that talk without gRPC."""
    return {
        "kind": error.kind,
        "message": error.message,
        "reason": error.reason,
        "field": error.field,
        "metadata": error.metadata,
    }


def from_plain(body: Mapping[str, Any]) -> InterlockError:
    """The error that `as_plain` was given."""
    return BY_KIND.get(str(body["kind"]), Internal)(
        str(body["message"]), reason=str(body["reason"]), field=str(body["field"]), metadata=body["metadata"]
    )
