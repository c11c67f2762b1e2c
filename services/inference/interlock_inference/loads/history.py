"""What earlier loads taught this replica, on disk: how much memory a version took, and which one was being loaded when the process died.

A load inside the serving process that kills it would kill it again after every restart. So its name is written down before, and taken out
after; a name that is found at the next start is loaded in a child first, until it has been loaded well.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import structlog

from interlock.stores.artifacts import write_durably

FORMAT = 1
MEASURED_MAX = 256  # versions; the oldest go
_log = structlog.get_logger(__name__)


class LoadHistory:
    """The file of one replica. Losing it costs a guess and a trial, so an unreadable one is begun anew."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._peaks, self._doubtful = self._read()

    def _read(self) -> tuple[dict[str, int], set[str]]:
        try:
            body = json.loads(self._path.read_bytes())
            if body["format"] != FORMAT:
                raise ValueError(f"format {body['format']!r} is not {FORMAT}")
            return {str(k): int(v) for k, v in body["peak_bytes"].items()}, {str(name) for name in body["doubtful"]}
        except FileNotFoundError:
            return {}, set()
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            _log.warning("load_history_unreadable", path=str(self._path), problem=repr(error))
            return {}, set()

    @property
    def peak_bytes(self) -> Mapping[str, int]:
        """Digest -> what its last load took at its peak."""
        return self._peaks

    def is_doubtful(self, name: str) -> bool:
        """True when this version was being loaded while a process died."""
        return name in self._doubtful

    def doubt(self, name: str) -> None:
        """Before a load that a crash would not survive. Blocks for an fsync."""
        self._doubtful.add(name)
        self._write()

    def survived(self, name: str) -> None:
        """After it, however it ended: the process is alive. Blocks for an fsync, if there was a doubt."""
        if name in self._doubtful:
            self._doubtful.discard(name)
            self._write()

    def note(self, digest: str, peak_bytes: int) -> None:
        """What a load took. Blocks for an fsync, if that is news."""
        if self._peaks.get(digest) == peak_bytes:
            return
        self._peaks.pop(digest, None)
        self._peaks[digest] = peak_bytes
        while len(self._peaks) > MEASURED_MAX:
            del self._peaks[next(iter(self._peaks))]
        self._write()

    def _write(self) -> None:
        body = {"format": FORMAT, "peak_bytes": self._peaks, "doubtful": sorted(self._doubtful)}
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_durably(self._path, json.dumps(body).encode())
