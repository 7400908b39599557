"""A 4-bit KV cache in a server: what it holds, and that chunks and cached prefixes change no token."""

from __future__ import annotations

import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from servers import SMALL, client

from lutserve.server.client import Server, running_server

pytestmark = pytest.mark.slow

TEXT = "The river rises in the hills north of the town, where the rain of one night can fill every stream. "
PROMPTS = (TEXT * 3, "A mill stood here. " * 12, TEXT)
#: tokens of the tiny model's cache in 16 bit: 512 MiB by 2 layers, 2 kv heads, 2 * 32 values of 2 bytes
SIXTEEN_BIT = 2**29 // (2 * 2 * 2 * 32 * 2)


def answer(server: Server, prompt: str) -> str:
    ask = {"model": server.model, "max_tokens": 12, "temperature": 0}
    return client(server).completions.create(prompt=prompt, **ask).choices[0].text  # type: ignore[call-overload, no-any-return]


@pytest.mark.parametrize(("scheme", "ratio", "block"), [("nf4", 3.5, 64), ("axcore", 3.2, 1152)])
def test_a_server(tiny: Path, tmp_path: Path, scheme: str, ratio: float, block: int) -> None:
    """Prompts alone, in chunks that others share, and from the prefix cache."""
    args = ["--model", str(tiny), "--kv", scheme, "--max-num-batched-tokens", "96", *SMALL]
    args += ["--block-size", "64"] if block == 64 else []
    with running_server(args, log=tmp_path / "log") as server:
        alone = [answer(server, prompt) for prompt in PROMPTS]
        again = [answer(server, prompt) for prompt in PROMPTS]
        with ThreadPoolExecutor() as pool:
            together = list(pool.map(lambda prompt: answer(server, prompt), PROMPTS))
        http = client(server)._client
        metrics = http.get(f"{server.base_url}/metrics").text
        assert http.get(f"{server.base_url}/lutserve/recipe").json()["kv_cache_scheme"] == scheme
    assert alone == again == together and all(alone)
    blocks = re.search(r'num_gpu_blocks="(\d+)"', metrics)
    assert blocks and ratio < int(blocks[1]) * block / SIXTEEN_BIT < 4
    assert f'site="kv_cache",choice="{scheme}"' in metrics or f'choice="{scheme}",site="kv_cache"' in metrics
    hits = re.search(r"^vllm:prefix_cache_hits_total\S* (\S+)", metrics, re.M)
    assert hits and (float(hits[1]) > 64) == (block == 64)
    log = (tmp_path / "log").read_text()
    assert f"lutserve: KV cache: {scheme}, " in log and f"{block} tokens a block, kernel " in log
