"""Which versions of a model get which share of traffic, with an epoch. Not who loads them, and not how a request is carried.

Rules of this file
- A route has one current epoch per model. It starts at 1, grows by exactly one with each change and never goes back.
- A change names the epoch it was decided on (`expected_epoch`); any other current epoch refuses it: `STALE_EPOCH`.
- No weights at all means that nothing of the model is served. A version stands in a route at most once, with a weight of at least 1.
- Every prefix of the picks keeps each version within one request of its share, for any number of versions.
- A data plane refuses a lower fencing token, then a lower epoch, and takes the same epoch again without a change.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import gcd

from interlock.core.names import check_id
from interlock.errors import Aborted, InvalidArgument

TOTAL_WEIGHT_MAX = 1000
"""Bound of the sum of weights: a pick cycle has at most this many entries, and a share is at least 0.1 %."""


@dataclass(frozen=True, slots=True)
class Weight:
    """The share `weight / sum of weights` of one version."""

    version: str
    weight: int


@dataclass(frozen=True, slots=True)
class Route:
    """The current traffic split of one model; `epoch` 0 is the route of a model that never had one."""

    model: str
    epoch: int
    weights: tuple[Weight, ...] = ()

    def versions(self) -> tuple[str, ...]:
        """The versions that get traffic, in the order of the route."""
        return tuple(w.version for w in self.weights)

    def heaviest(self) -> str | None:
        """The version with the largest share (the first of equals); None when nothing is served."""
        return max(self.weights, key=lambda w: w.weight).version if self.weights else None


def all_to(version: str | None) -> tuple[Weight, ...]:
    """The weights that send everything to one version; no weights for None."""
    return () if version is None else (Weight(version, 100),)


def check_weights(weights: Iterable[Weight], field: str = "weights") -> tuple[Weight, ...]:
    """Returns the weights if they form a route.

    Raises:
        InvalidArgument: `INVALID_WEIGHTS`, naming the entry.
    """
    checked = tuple(weights)
    seen: set[str] = set()
    for i, entry in enumerate(checked):
        where = f"{field}[{i}]"
        check_id(entry.version, f"{where}.version")
        if entry.weight < 1:
            raise _invalid(f"{where}.weight", f"{entry.weight} is below 1; leave a version out to send it nothing")
        if entry.version in seen:
            raise _invalid(f"{where}.version", f"version {entry.version!r} stands in the route twice")
        seen.add(entry.version)
    total = sum(entry.weight for entry in checked)
    if total > TOTAL_WEIGHT_MAX:
        raise _invalid(field, f"the weights sum to {total}; at most {TOTAL_WEIGHT_MAX}")
    return checked


def _invalid(field: str, why: str) -> InvalidArgument:
    return InvalidArgument(f"{field}: {why}", reason="INVALID_WEIGHTS", field=field)


def stale_epoch(model: str, current: int, given: int) -> Aborted:
    """The refusal of a change that was decided on another epoch than the current one."""
    return Aborted(
        f"model {model!r} is at route epoch {current}, not {given}: read the route and decide again",
        reason="STALE_EPOCH",
        metadata={"model": model, "current_epoch": str(current), "given_epoch": str(given)},
    )


def change(current: Route, expected_epoch: int, weights: Iterable[Weight]) -> Route:
    """The compare-and-set: the next route, if `expected_epoch` is the current one.

    Raises:
        Aborted: `STALE_EPOCH`; nothing changed.
        InvalidArgument: `INVALID_WEIGHTS`.
    """
    if expected_epoch != current.epoch:
        raise stale_epoch(current.model, current.epoch, expected_epoch)
    return Route(current.model, current.epoch + 1, check_weights(weights))


def admit(model: str, *, epoch: int, token: int, seen_epoch: int, seen_token: int) -> bool:
    """A data plane's rule for an incoming route; True when it is news, False when it is the one already applied.

    Raises:
        Aborted: `STALE_CONTROLLER` for a token below the highest seen, `STALE_EPOCH` for a lower epoch.
    """
    if token < seen_token:
        raise Aborted(
            f"fencing token {token} is below {seen_token}: another controller has taken over",
            reason="STALE_CONTROLLER",
            metadata={"model": model, "current_token": str(seen_token), "given_token": str(token)},
        )
    if epoch < seen_epoch:
        raise stale_epoch(model, seen_epoch, epoch)
    return epoch > seen_epoch


def cycle(weights: Iterable[Weight]) -> tuple[str, ...]:
    """One full turn of picks: entry `n % len` answers pick `n`. Its length is the sum of the weights over their greatest divisor.

    Earliest deadline first over the windows in which each pick must fall (proportionate fairness on one processor): pick j of a
    version with share s must not come before j/s and not after (j+1)/s. That keeps every prefix within one request of the shares,
    which plain smooth weighted round robin does only for two versions.
    """
    entries = tuple(weights)
    if not entries:
        return ()
    divisor = gcd(*(w.weight for w in entries))
    shares = [w.weight // divisor for w in entries]
    total = sum(shares)
    picked = [0] * len(shares)
    order: list[str] = []
    for n in range(total):
        due = [i for i, share in enumerate(shares) if picked[i] * total // share <= n and picked[i] < share]
        first = min(due, key=lambda i: (-(-(picked[i] + 1) * total // shares[i]), i))
        picked[first] += 1
        order.append(entries[first].version)
    return tuple(order)


class Picker:
    """Picks of one route, in order. Not shared between threads: a replica picks on its event loop."""

    __slots__ = ("_cycle", "_next")

    def __init__(self, weights: Iterable[Weight]) -> None:
        self._cycle = cycle(weights)
        self._next = 0

    def pick(self) -> str | None:
        """The version of the next request; None when the route serves nothing."""
        if not self._cycle:
            return None
        version = self._cycle[self._next]
        self._next = (self._next + 1) % len(self._cycle)
        return version
