"""Finished cells on disk: one JSON object a line, none lost and none twice."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from lutserve.errors import UserError

Row = dict[str, Any]


class Full(UserError):
    """The store cannot be written: nothing more can be kept, so a run must end."""


def read(folder: Path) -> list[Row]:
    """Return the finished cells of a folder, in the order in which they were finished.

    Raises:
        UserError: there is no store, or a line in its middle is damaged.

    """
    path = folder / "cells.jsonl"
    try:
        whole, _ = _parse(path)
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}; give a folder of `lutserve eval`") from None
    return whole


def _parse(path: Path) -> tuple[list[Row], int]:
    """Return the rows, and how many bytes they take; what follows is a line that a kill has cut."""
    data = path.read_bytes()
    end = data.rfind(b"\n") + 1
    rows = []
    for number, line in enumerate(data[:end].splitlines(), 1):
        try:
            row = json.loads(line)
            row["cell"], row["metrics"]
        except (ValueError, LookupError, TypeError):
            raise UserError(f"{path}, line {number} is no finished cell; remove the line") from None
        rows.append(row)
    return rows, end


class Store:
    """The finished cells of one folder, open for one run."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._path = folder / "cells.jsonl"
        self._path.touch()
        found, self._size = _parse(self._path)
        self.rows = {row["cell"]: row for row in found}

    def add(self, row: Row) -> None:
        """Keep a finished cell; it is on the disk when this returns.

        Raises:
            Full: it could not be written; the file is as it was.

        """
        line = json.dumps(row, allow_nan=False).encode() + b"\n"
        try:
            with self._path.open("r+b") as file:
                # Also cuts off what an interrupted write has left.
                file.truncate(self._size)
                file.seek(self._size)
                file.write(line)
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            os.truncate(self._path, self._size)
            raise Full(
                f"cannot write {self._path}: {error.strerror}; make room and give the same command again"
            ) from None
        self._size += len(line)
        self.rows[row["cell"]] = row


@contextmanager
def opened(folder: Path) -> Iterator[Store]:
    """Open a folder's store, made if need be, for this process alone.

    Raises:
        UserError: the folder cannot be written, another run uses it, or its store is damaged.

    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder / ".lock", timeout=0):
            yield Store(folder)
    except Timeout:
        raise UserError(f"{folder} is in use by another `lutserve eval`; choose another --output") from None
    except (PermissionError, FileExistsError, NotADirectoryError) as error:
        raise UserError(f"cannot write to {folder}: {error.strerror}; choose another --output") from None
