"""The files of a model on this machine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lutserve.errors import UserError

_FILES = ["*.safetensors", "*.json", "*.model", "*.txt", "*.jinja", "*.py", "LICENSE*"]


def folder_of(resolved: str, say: Callable[[str], None]) -> Path:
    """Return the folder of what `lutserve.models.resolve` returned; a hub id is downloaded if it is not here.

    Without a connection, what is in the hub's cache is taken. UserError if there is nothing, or the hub
    does not give the model.
    """
    if Path(resolved).is_dir():
        return Path(resolved)
    from huggingface_hub import list_repo_files, snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError

    try:
        names = list_repo_files(resolved)
    except HfHubHTTPError as error:
        raise UserError(f"the hub does not give {resolved}: {_line(error)}") from None
    except Exception as error:  # offline mode, or whatever the HTTP client raises without a connection
        try:
            return Path(snapshot_download(resolved, allow_patterns=_FILES, local_files_only=True))
        except LocalEntryNotFoundError:
            raise UserError(
                f"cannot reach the hub for {resolved} ({_line(error)}); give a folder on this machine"
            ) from None
    weights = [] if any(name.endswith(".safetensors") for name in names) else ["*.bin"]
    say(f"{resolved}: downloading what is not in the hub's cache yet")
    return Path(snapshot_download(resolved, allow_patterns=_FILES + weights))


def _line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
