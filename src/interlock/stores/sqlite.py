"""One SQLite file: WAL, one writer, transactions that are all or nothing, and migrations. It knows no table of anybody's.

Used on the thread that opened it. A write is one short transaction of a few rows; with `synchronous=FULL` it is on disk when the
block ends. A second process on the same file waits up to BUSY_SECONDS for the lock and then fails.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

from interlock.errors import DataLoss, FailedPrecondition, InterlockError

BUSY_SECONDS = 5.0
_UNUSABLE = ("SQLITE_CANTOPEN", "SQLITE_READONLY", "SQLITE_FULL", "SQLITE_IOERR", "SQLITE_PERM")


@contextmanager
def opening(path: Path | str) -> Iterator[None]:
    """Says what is wrong with a file that cannot be used.

    Raises:
        OSError: it cannot be opened or written.
        DataLoss: `DATABASE_CORRUPT`: not a SQLite file, or a damaged one.
    """
    try:
        yield
    except sqlite3.OperationalError as error:
        if error.sqlite_errorname.startswith(_UNUSABLE):
            raise OSError(f"{path}: {error}") from None
        raise
    except sqlite3.DatabaseError as error:
        raise DataLoss(
            f"{path}: {error}; restore it from a backup", reason="DATABASE_CORRUPT", metadata={"path": str(path)}
        ) from None


class Database:
    """An open file at its newest schema. Close it.

    Args:
        migrations: SQL scripts in order; the n-th brings a file from version n to n + 1. Only ever append.
        synchronous: FULL survives power loss, NORMAL only a crash of the process.

    Raises:
        FailedPrecondition: `SCHEMA_NEWER`: the file was written by a newer version of this program.
        OSError: the file cannot be opened or written, saying which.
        DataLoss: `DATABASE_CORRUPT`: not a SQLite file, or a damaged one.
    """

    def __init__(
        self, path: Path | str, migrations: Sequence[str], *, synchronous: Literal["FULL", "NORMAL"] = "FULL"
    ) -> None:
        self.path = str(path)
        if self.path != ":memory:":
            Path(path).parent.mkdir(parents=True, exist_ok=True)
        with opening(self.path):
            self._connection = sqlite3.connect(self.path, timeout=BUSY_SECONDS, isolation_level=None)
        self._connection.row_factory = sqlite3.Row
        self._depth = 0
        try:
            with opening(self.path):
                self._connection.execute("PRAGMA journal_mode=WAL")
                self._connection.execute(f"PRAGMA synchronous={synchronous}")
                self._connection.execute("PRAGMA foreign_keys=ON")
                self._migrate(migrations)
        except (OSError, InterlockError, sqlite3.Error):
            self._connection.close()
            raise

    def _migrate(self, migrations: Sequence[str]) -> None:
        at = int(self._connection.execute("PRAGMA user_version").fetchone()[0])
        if at > len(migrations):
            raise FailedPrecondition(
                f"{self.path} has schema {at}, this program knows {len(migrations)}: use the newer program",
                reason="SCHEMA_NEWER",
                metadata={"path": self.path, "schema": str(at), "known": str(len(migrations))},
            )
        for version, script in enumerate(migrations[at:], start=at + 1):
            # One transaction per step, its version number included: a crash leaves the step done or not begun.
            self._connection.executescript(f"BEGIN IMMEDIATE;\n{script};\nPRAGMA user_version={version};\nCOMMIT;")

    @contextmanager
    def transaction(self) -> Iterator[sqlite3.Connection]:
        """A write transaction: committed at the end of the block, rolled back by any exception. Blocks inside it join it."""
        if self._depth:
            yield self._connection
            return
        self._connection.execute("BEGIN IMMEDIATE")
        self._depth += 1
        try:
            yield self._connection
            self._connection.execute("COMMIT")
        except BaseException:
            if self._connection.in_transaction:  # also after a COMMIT that failed: it leaves the transaction open
                self._connection.execute("ROLLBACK")
            raise
        finally:
            self._depth -= 1

    def all(self, sql: str, *parameters: Any) -> list[sqlite3.Row]:
        """Every row of a query."""
        return self._connection.execute(sql, parameters).fetchall()

    def one(self, sql: str, *parameters: Any) -> sqlite3.Row | None:
        """The first row of a query."""
        row: sqlite3.Row | None = self._connection.execute(sql, parameters).fetchone()
        return row

    def close(self) -> None:
        """Closes the file; the write-ahead log is folded in."""
        self._connection.close()
