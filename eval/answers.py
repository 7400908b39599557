"""Answers that a server has already given, kept on disk so that an interrupted run can go on.

lm-eval has a cache of its own (`use_cache`), but in 0.4.13 it cannot be used with concurrent requests:
rolling log-likelihood requests have no cache key there, and the first answer to one raises TypeError.
"""

from __future__ import annotations

import hashlib
import json
import sqlite3
from pathlib import Path
from typing import Any

from lutserve.errors import UserError


class Answers:
    """A persistent map from a request to its answer, both any JSON value.

    Every answer is on disk when `put` returns: `kill -9` loses none. For one thread only.

    Raises:
        UserError: the file is no database, or cannot be written.

    """

    def __init__(self, path: Path) -> None:
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._db = sqlite3.connect(path, isolation_level=None)
            # In WAL mode a commit is one append without a sync: safe against a killed process (a power
            # cut may lose the last answers, never the file), and fast enough for one commit an answer.
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute("PRAGMA synchronous=NORMAL")
            self._db.execute("CREATE TABLE IF NOT EXISTS answers (request TEXT PRIMARY KEY, answer TEXT)")
        except (OSError, sqlite3.Error) as error:
            raise UserError(
                f"cannot keep answers in {path} ({error}); remove it or use another folder"
            ) from None
        self._path = path

    def get(self, request: Any) -> Any:
        """Return the answer to `request`, or None."""
        row = self._db.execute("SELECT answer FROM answers WHERE request = ?", (digest(request),)).fetchone()
        return None if row is None else json.loads(row[0])

    def put(self, request: Any, answer: Any) -> None:
        """Keep the answer to `request`.

        Raises:
            UserError: it cannot be written.

        """
        try:
            self._db.execute(
                "INSERT OR REPLACE INTO answers VALUES (?, ?)", (digest(request), json.dumps(answer))
            )
        except sqlite3.Error as error:
            raise UserError(
                f"cannot keep answers in {self._path} ({error}); make room and give the same command again"
            ) from None

    def count(self) -> int:
        """Return how many answers there are."""
        count: int = self._db.execute("SELECT COUNT(*) FROM answers").fetchone()[0]
        return count

    def close(self) -> None:
        """Close the file; the answers stay."""
        self._db.close()

    def delete(self) -> None:
        """Close and remove the file."""
        self.close()
        remove(self._path)


def remove(path: Path) -> None:
    """Remove an answer file that nobody has open, if it is there."""
    for suffix in ("", "-wal", "-shm"):
        path.with_name(path.name + suffix).unlink(missing_ok=True)


def digest(value: Any) -> str:
    """Return 32 hex digits that stand for a JSON value (keys in any order)."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:32]
