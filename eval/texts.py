"""The texts of perplexities, in the form that the papers use."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

from lutserve.errors import UserError

#: documents of C4 that are joined
_C4_DOCUMENTS = 1000
#: name -> file in a folder with offline data
OFFLINE = {"wikitext2": "wikitext2_test.raw.gz", "c4": "c4_train_head1000.jsonl.gz"}


def text(name: str, data: Path | None) -> str:
    """Return a text.

    Args:
        name: `wikitext2` (test; rows joined by two line ends), `c4` (documents joined by a blank; offline the
            first of the training set, else of the validation set), or a UTF-8 text file (`.gz` too), PTB say.
        data: folder with offline data; None: the Hugging Face hub.

    Raises:
        UserError: no such text or file.

    """
    if name == "wikitext2":
        return wikitext2(data) if data else "\n\n".join(_hub("Salesforce/wikitext", "wikitext-2-raw-v1"))
    if name == "c4":
        return " ".join(_c4(data))
    path = Path(name)
    if not path.is_file():
        raise UserError(f"ppl:{name}: no such text; allowed: wikitext2, c4, or a text file")
    try:
        raw = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        return raw.decode()
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise UserError(f"ppl:{name} is no UTF-8 text ({error})") from None


def wikitext2(folder: Path) -> str:
    """Return the WikiText-2 test text in the papers' form, from `wikitext2_test.raw.gz` in `folder`.

    The rows of the data set ("" for a blank line, else the line with its line end) joined by two line
    ends: 1,294,336 characters.

    Raises:
        UserError: the file is not there.

    """
    lines = _read(folder / OFFLINE["wikitext2"]).removesuffix("\n").split("\n")
    return "\n\n".join(line + "\n" if line.strip() else "" for line in lines)


def _c4(data: Path | None) -> list[str]:
    if data is None:
        return _hub("allenai/c4", "en", "en/c4-validation.00000-of-00008.json.gz")[:_C4_DOCUMENTS]
    return [json.loads(line)["text"] for line in _read(data / OFFLINE["c4"]).splitlines()]


def _read(path: Path) -> str:
    try:
        return gzip.decompress(path.read_bytes()).decode()
    except FileNotFoundError:
        raise UserError(f"{path} does not exist; give the folder with the evaluation data") from None


def _hub(name: str, part: str, file: str | None = None) -> list[str]:
    """Return the texts of a data set on the hub: its test split, or one file."""
    import datasets

    try:
        if file is None:
            rows = datasets.load_dataset(name, part, split="test")
        else:
            rows = datasets.load_dataset(name, data_files={"validation": file}, split="validation")
        return list(rows["text"])
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"cannot load {name} from the hub: {error}; see --data for offline use") from None
