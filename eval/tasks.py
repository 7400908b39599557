"""Which lm-eval task a name on the command line means."""

from __future__ import annotations

import difflib
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lutserve.errors import UserError

if TYPE_CHECKING:
    from lm_eval.tasks import TaskManager

_LOCAL = "local_"


def local_names(tasks: Sequence[str], data: Path) -> list[str]:
    """Return the names of the task files that `tasks` mean in an offline data folder.

    `piqa` and `local_piqa` both mean `data/tasks/local_piqa.yaml`, the task `local_piqa`.

    Raises:
        UserError: no such folder, or a task that has no file there.

    """
    present = sorted(path.stem for path in (data / "tasks").glob(f"{_LOCAL}*.yaml"))
    if not present:
        raise UserError(f"--data {data}: no task files there (expected {data}/tasks/{_LOCAL}<name>.yaml)")
    short = [name.removeprefix(_LOCAL) for name in present]
    for task in tasks:
        if task.removeprefix(_LOCAL) not in short:
            raise UserError(_unknown(task, short) + f"; {data}/tasks has: {', '.join(short)}")
    return [_LOCAL + task.removeprefix(_LOCAL) for task in tasks]


def manager(tasks: Sequence[str], data: Path | None) -> TaskManager:
    """Return an lm-eval TaskManager that knows all of `tasks`: the data folder's, or lm-eval's own.

    Raises:
        UserError: a task that lm-eval does not know.

    """
    from lm_eval.tasks import TaskManager

    if data is not None:
        # Without lm-eval's own tasks: indexing their thousands of files takes seconds.
        return TaskManager(include_path=str(data / "tasks"), include_defaults=False)
    found = TaskManager()
    for task in tasks:
        if not found.match_tasks([task]):
            raise UserError(_unknown(task, found.all_tasks) + "; see `lm-eval ls tasks`")
    return found


class _OncePerKind(logging.Filter):
    def __init__(self) -> None:
        super().__init__()
        self._seen: set[tuple[int, str]] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        kind = (record.levelno, record.getMessage()[:60])
        new = kind not in self._seen
        self._seen.add(kind)
        return new


_ONCE = _OncePerKind()


def quiet_lm_eval() -> None:
    """Leave of lm-eval's log the errors, and what it says of failing requests once each.

    Its other warnings are about how task files are written, and a dying server would repeat the same
    line for every request.
    """
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    requests = logging.getLogger("lm_eval.models.api_models")
    requests.setLevel(logging.WARNING)
    requests.addFilter(_ONCE)


def _unknown(task: str, known: Iterable[str]) -> str:
    near = difflib.get_close_matches(task, known, n=1)
    return f"unknown task {task!r}" + (f", did you mean {near[0]!r}?" if near else "")
