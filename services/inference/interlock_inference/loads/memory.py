"""Whether there is room for a load: by what it was measured to need, against what this machine, container and configuration leave.

A version's need is what the last load of the same bytes took; before the first, its files' size times `LOAD_FACTOR`. Available is the least of
three: the machine's available memory, what the container's limit leaves, and what the replica's own limit leaves over what it holds now.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import psutil

from interlock.errors import ResourceExhausted

LOAD_FACTOR = 2  # while a session is built, the file's initialisers and the session's own copies stand side by side
RETRY_SECONDS = 5.0
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True, slots=True)
class Need:
    """What a load takes at its peak; `measured` says whether that was seen or is a guess from the size of the files."""

    peak_bytes: int
    measured: bool


@dataclass(frozen=True, slots=True)
class Room:
    """What there is. `bound_by` names what sets the limit: `machine`, `container` or `memory_limit_mb`."""

    available_bytes: int
    limit_bytes: int
    bound_by: str


def guess(size_bytes: int) -> Need:
    """Before anything was measured."""
    return Need(size_bytes * LOAD_FACTOR, measured=False)


def room(limit_bytes: int, held_bytes: int, cgroup: Path | None = None) -> Room:
    """What is available now.

    Args:
        limit_bytes: of this replica and its children; 0 for none.
        held_bytes: what they hold.
        cgroup: folder of this process's control group; found when None.
    """
    machine = psutil.virtual_memory()
    rooms = [Room(machine.available, machine.total, "machine")]
    container = _container(_own_cgroup() if cgroup is None else cgroup)
    if container is not None:
        rooms.append(container)
    if limit_bytes:
        rooms.append(Room(max(0, limit_bytes - held_bytes), limit_bytes, "memory_limit_mb"))
    return min(rooms, key=lambda each: each.available_bytes)


def _own_cgroup() -> Path:
    """Version 2 only: one line, `0::/path`. In a container the path is seen as the root."""
    try:
        path = Path("/proc/self/cgroup").read_text().partition("0::/")[2].splitlines()[0]
    except (OSError, IndexError):
        return CGROUP
    return CGROUP / path if (CGROUP / path / "memory.max").exists() else CGROUP


def _container(folder: Path) -> Room | None:
    """None where there is no limit. Clean file pages count as available: the kernel gives them back before it kills."""
    try:
        limit = (folder / "memory.max").read_text().strip()
        if limit == "max":
            return None
        used = int((folder / "memory.current").read_text())
        files = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except OSError:
        return None
    return Room(max(0, int(limit) - used + int(files.get("inactive_file", 0))), int(limit), "container")


def check(what: str, need: Need, now: Room, reserve_bytes: int, held: Mapping[str, int]) -> None:
    """Holds a need and the reserve against what there is.

    Args:
        held: bytes by the version that holds them.

    Raises:
        ResourceExhausted: `DOES_NOT_FIT`, with every number.
    """
    if need.peak_bytes + reserve_bytes <= now.available_bytes:
        return
    needed_is = "measured" if need.measured else f"{LOAD_FACTOR} times its files"
    holding = ", ".join(f"{name} {size >> 20} MiB" for name, size in held.items()) or "no version"
    raise ResourceExhausted(
        f"{what} needs {need.peak_bytes} bytes to load ({needed_is}) and {reserve_bytes} are kept in reserve; "
        f"{now.available_bytes} of {now.limit_bytes} are available ({now.bound_by}); held by {holding}",
        reason="DOES_NOT_FIT",
        retry_after_seconds=RETRY_SECONDS if need.peak_bytes + reserve_bytes <= now.limit_bytes else None,
        metadata={
            "needed_bytes": str(need.peak_bytes),
            "reserve_bytes": str(reserve_bytes),
            "available_bytes": str(now.available_bytes),
            "limit_bytes": str(now.limit_bytes),
            "bound_by": now.bound_by,
            "measured": str(need.measured).lower(),
            **{f"held_by {name}": str(size) for name, size in held.items()},
        },
    )
