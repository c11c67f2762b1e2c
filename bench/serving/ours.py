"""Our own entries: a replica's gRPC listener on one core, and the forms in which HTTP is served."""

from __future__ import annotations

from contestants import Contestant

OURS: tuple[Contestant, ...] = ()
