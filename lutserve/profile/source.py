"""What a profile begins and ends with: a model, windows of a text, and the file of the report."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from lutserve.errors import UserError
from lutserve.eval.texts import wikitext2


def load(
    model: str, text: str | None, window: int, windows: int | None, dtype: str, **options: Any
) -> tuple[Any, torch.Tensor]:
    """Load a causal language model of transformers, and the token ids to show it.

    Args:
        model: Hugging Face folder or id.
        text: tokenized as a whole and cut into windows without overlap; an incomplete last one is dropped.
            None: random token ids instead, the same ones every time.
        window: tokens in a window.
        windows: how many, from the start; None for all (of a text).
        dtype: bfloat16, float16 or float32.
        options: for `from_pretrained`.

    Returns:
        The model in evaluation mode, and token ids int64 [windows, window].

    Raises:
        UserError: the model cannot be loaded, or the text has not one window.

    """
    import transformers

    if dtype not in ("bfloat16", "float16", "float32"):
        raise UserError(f"--dtype {dtype}; allowed: bfloat16, float16, float32")
    try:
        tokenizer = None if text is None else transformers.AutoTokenizer.from_pretrained(model)
        network = transformers.AutoModelForCausalLM.from_pretrained(
            model, dtype=getattr(torch, dtype), use_safetensors=True, **options
        ).eval()
    except (OSError, ValueError) as error:
        raise UserError(f"cannot load {model}: {str(error).splitlines()[0]}") from None
    if tokenizer is None:
        vocabulary = network.config.get_text_config().vocab_size
        generator = torch.Generator().manual_seed(0)
        return network, torch.randint(vocabulary, (windows or 1, window), generator=generator)
    ids = torch.tensor(tokenizer(text, verbose=False).input_ids)
    parts = ids[: len(ids) // window * window].view(-1, window)[:windows]
    if not len(parts):
        raise UserError(f"the text has {len(ids)} tokens, less than one window of {window}")
    return network, parts


def read_text(data: str) -> str:
    """Return the text that --data names: a text file, "wikitext", or a folder with WikiText-2's test set."""
    if data == "wikitext":
        shared = os.environ.get("LUTSERVE_SHARED")
        folder = os.environ.get("LUTSERVE_DATA") or (f"{shared}/data" if shared else "")
        if not folder:
            raise UserError("--data wikitext needs LUTSERVE_DATA, the folder with wikitext2_test.raw.gz")
        data = folder
    path = Path(data)
    if path.is_dir():
        text: str = wikitext2(path)
        return text
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read --data {data}: {error}") from None


def write(report: dict[str, Any], output: Path) -> None:
    """Write a report as JSON; the file is complete or as it was."""
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        partial_file = output.with_name(f".{output.name}.{os.getpid()}")
        partial_file.write_text(json.dumps(report, indent=1) + "\n")
        partial_file.replace(output)
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}") from None
