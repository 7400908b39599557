"""The unfinished output folder: what is done stays done when the process is killed.

Every file is written under another name and renamed, so what is there is whole. DIR.partial holds
`state.json` (what is being made), `block-0007.safetensors` for each finished block, and
`hidden-0008.safetensors`, the calibration data as it enters the next one.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
from collections.abc import Iterable
from pathlib import Path
from types import TracebackType
from typing import Any

from torch import Tensor

from lutserve.errors import UserError

#: bytes in a weight file; a larger tensor gets one of its own
_SHARD = 1 << 29


class Partial:
    """`output`.partial, locked against a second process while it is open as a context manager."""

    def __init__(self, output: Path, state: dict[str, Any]):
        self.output = output
        self.folder = output.with_name(f"{output.name}.partial")
        self._state = state
        self._lock = -1

    def __enter__(self) -> Partial:
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UserError(f"cannot write {self.folder}: {error.strerror}") from None
        # The system lets go of the lock when the process dies, and a folder leaves no file behind.
        self._lock = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise UserError(f"another process is writing {self.folder}; wait for it") from None
        self._match_state()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        os.close(self._lock)

    def _match_state(self) -> None:
        file = self.folder / "state.json"
        text = json.dumps(self._state, indent=1, sort_keys=True) + "\n"
        if not file.exists():
            self._write_text(file, text)
        elif file.read_text() != text:
            old = json.loads(file.read_text())
            keys = sorted(k for k in {*old, *self._state} if old.get(k) != self._state.get(k))
            raise UserError(
                f"{self.folder} holds the beginning of another run (different: {', '.join(keys)}); "
                "remove it to start anew, or repeat the command that made it"
            )

    def done(self, blocks: int, calibrated: bool) -> int:
        """How many blocks need not be made again."""
        count = 0
        while count < blocks and self.block(count).exists():
            count += 1
        # Without what enters the next block the ones before have to be gone through again.
        while 0 < count < blocks and calibrated and not self._hidden(count).exists():
            count -= 1
        return count

    def block(self, index: int) -> Path:
        """The file of a finished block."""
        return self.folder / f"block-{index:04d}.safetensors"

    def _hidden(self, index: int) -> Path:
        return self.folder / f"hidden-{index:04d}.safetensors"

    def save_block(self, index: int, tensors: dict[str, Tensor], report: dict[str, Any]) -> None:
        """Store a finished block with the errors of its layers."""
        # One key only: several would be written in an order that changes from run to run.
        self._write(self.block(index), tensors, {"report": json.dumps(report)})

    def save_hidden(self, index: int, hidden: list[Tensor]) -> None:
        """Store what enters block `index`, and forget what entered the one before."""
        self._write(self._hidden(index), {f"{i:06d}": sample for i, sample in enumerate(hidden)}, {})
        self._hidden(index - 1).unlink(missing_ok=True)

    def hidden(self, index: int) -> list[Tensor]:
        """What enters block `index`, as `save_hidden` stored it."""
        from safetensors.torch import load_file

        samples = load_file(self._hidden(index))
        return [samples[key] for key in sorted(samples)]

    def reports(self, blocks: int) -> dict[str, dict[str, Any]]:
        """The errors of all layers of all finished blocks."""
        from safetensors import safe_open

        merged: dict[str, dict[str, Any]] = {}
        for index in range(blocks):
            with safe_open(self.block(index), framework="pt") as file:
                merged |= json.loads(file.metadata()["report"])
        return merged

    def finish(
        self, tensors: Iterable[tuple[str, Tensor]], extras: dict[str, str], copies: list[Path]
    ) -> None:
        """Write the final folder under its own name and remove the unfinished one.

        Args:
            tensors: every tensor by name, in the order to store them; read one at a time.
            extras: small files, name to text.
            copies: files to copy.

        """
        final = self.folder / "final"
        shutil.rmtree(final, ignore_errors=True)
        final.mkdir()
        for file in copies:
            shutil.copyfile(file, final / file.name)
        for name, text in extras.items():
            (final / name).write_text(text)
        self._write_shards(final, tensors)
        final.rename(self.output)
        shutil.rmtree(self.folder)

    def _write_shards(self, final: Path, tensors: Iterable[tuple[str, Tensor]]) -> None:
        shards: list[list[str]] = []
        total, held = 0, 0
        waiting: dict[str, Tensor] = {}

        def write() -> None:
            self._write(final / f"shard-{len(shards)}", waiting, {"format": "pt"})
            shards.append(list(waiting))
            waiting.clear()

        for name, tensor in tensors:
            if waiting and held + tensor.nbytes > _SHARD:
                write()
                held = 0
            waiting[name] = tensor.contiguous()
            held += tensor.nbytes
            total += tensor.nbytes
        write()
        if len(shards) == 1:
            (final / "shard-0").rename(final / "model.safetensors")
            return
        places: dict[str, str] = {}
        for number, names in enumerate(shards):
            file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
            (final / f"shard-{number}").rename(final / file)
            places |= dict.fromkeys(names, file)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (final / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    def _write(self, file: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
        from safetensors.torch import save_file

        temporary = file.with_suffix(".tmp")
        save_file(tensors, temporary, metadata=metadata)
        # Written for its owner alone; whoever serves it may be someone else.
        temporary.chmod(0o644)
        temporary.rename(file)

    def _write_text(self, file: Path, text: str) -> None:
        temporary = file.with_suffix(".tmp")
        temporary.write_text(text)
        temporary.rename(file)
