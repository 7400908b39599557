"""Calibration text: a file, a data set in the folder of evaluation data, or one on the hub."""

from __future__ import annotations

import gzip
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from torch import Tensor

from lutserve.errors import UserError

DEFAULT = "c4"


@dataclass(frozen=True)
class _DataSet:
    """Where a data set lies: `file` in the data folder, or set, configuration and split on the hub."""

    file: str
    hub: str
    config: str | None
    split: str


NAMED = {
    "c4": _DataSet("c4_train_head1000.jsonl.gz", "allenai/c4", "en", "train"),
    "wikitext2": _DataSet(
        "wikitext2_validation.raw.gz", "Salesforce/wikitext", "wikitext-2-raw-v1", "validation"
    ),
    "pile": _DataSet("pile-10k.jsonl.gz", "NeelNanda/pile-10k", None, "train"),
}
#: documents of a hub data set that are looked at
_DOCUMENTS = 2000


def windows(source: str, model: Path, samples: int, length: int) -> list[Tensor]:
    """Cut calibration text into windows of token ids, evenly spread over the text.

    Args:
        source: a text file (.txt, .raw; .jsonl with a "text" field; each also .gz), a name of NAMED, `pydoc`
            (the help texts inside every CPython), or a data set on the hub (`org/name`).
        model: folder with the tokenizer.
        samples: how many windows.
        length: tokens in a window, the special token that the tokenizer begins a text with included.

    Returns:
        int64 tensors [length].

    Raises:
        UserError: no such text, or fewer than samples * length tokens in it.

    """
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model)
    except (OSError, ValueError) as error:
        raise UserError(f"{model} has no tokenizer that transformers can read: {error}") from None
    start = tokenizer("a").input_ids[:1]
    first = start if start == [tokenizer.bos_token_id] else []
    body = length - len(first)
    needed, ids = samples * body, []
    # Read more than is needed, if there is more, so that the windows do not all come from its beginning.
    for document in _documents(source):
        ids += tokenizer(document, add_special_tokens=False, verbose=False).input_ids
        if len(ids) >= 4 * needed:
            break
    if len(ids) < needed:
        raise UserError(
            f"calibration text {source!r} has {len(ids)} tokens, {samples} x {length} need {needed}; "
            "give more text, fewer --samples or a shorter --sequence-length"
        )
    last = len(ids) - body
    starts = [last * i // max(1, samples - 1) for i in range(samples)]
    return [torch.tensor(first + ids[start : start + body]) for start in starts]


def _documents(source: str) -> Iterator[str]:
    """Pieces of text in order."""
    path = Path(source).expanduser()
    if path.is_file():
        return _file(path)
    if source == "pydoc":
        from pydoc_data.topics import topics

        return (topics[key] for key in sorted(topics))
    known = NAMED.get(source)
    for variable, below in (("LUTSERVE_DATA", ""), ("LUTSERVE_SHARED", "data")):
        folder = os.environ.get(variable)
        if known and folder and (Path(folder) / below / known.file).is_file():
            return _file(Path(folder) / below / known.file)
    if known:
        return _hub(source, known.hub, known.config, known.split)
    if source.count("/") == 1 and not path.suffix:
        return _hub(source, source, None, "train")
    raise UserError(
        f"no calibration text {source!r}; give a file (.txt, .jsonl, also .gz), {', '.join(NAMED)}, pydoc, "
        "or a data set on the hub (org/name)"
    )


def _file(path: Path) -> Iterator[str]:
    try:
        data = path.read_bytes()
        text = (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"cannot read calibration text {path}: {error}") from None
    if ".jsonl" not in path.suffixes:
        # In pieces, because tokenizers slow down on long texts.
        lines = text.splitlines(keepends=True)
        yield from ("".join(lines[i : i + 200]) for i in range(0, len(lines), 200))
        return
    for number, line in enumerate(text.splitlines(), 1):
        try:
            yield json.loads(line)["text"] + "\n\n"
        except (ValueError, KeyError, TypeError):
            raise UserError(f'{path}, line {number}: not a JSON object with a "text"') from None


def _hub(source: str, name: str, config: str | None, split: str) -> Iterator[str]:
    try:
        from datasets import load_dataset  # type: ignore[import-untyped, unused-ignore]

        rows = load_dataset(name, config, split=split, streaming=True)
        return iter([row["text"] + "\n\n" for row in islice(rows, _DOCUMENTS)])
    except ImportError:
        raise UserError(
            f"--calibration {source} is on the hub and needs the package datasets: pip install datasets; "
            "or give a file, or set LUTSERVE_DATA to a folder that has it"
        ) from None
    except Exception as error:  # whatever the hub's client raises when it cannot reach it
        reason = str(error).strip().splitlines()[0]
        raise UserError(
            f"--calibration {source}: cannot read {name} from the hub ({reason}); give a file, `pydoc`, "
            "or set LUTSERVE_DATA to a folder that has it"
        ) from None
