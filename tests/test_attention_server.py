"""Softmax tables in real models: the embedded one through the server, tiny ones against vLLM itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny as models
from servers import SMALL, client

from lutserve.recipe import from_flags
from lutserve.server.client import Server, running_server

pytestmark = pytest.mark.slow

COUNT = " one, two, three, four, five, six, seven, eight, nine, ten,"
PROMPTS = (
    COUNT * 6,
    "The sun rises in the east and sets in the west. " * 8 + "The sun rises in the",
    COUNT * 5,
)
SOFTMAX = ("--model", "smollm2-135m", "--lut", "nli-4", "--lut-sites", "softmax_exp")


def answers(server: Server) -> list[str]:
    ask = {"model": server.model, "max_tokens": 12, "temperature": 0}
    return [client(server).completions.create(prompt=p, **ask).choices[0].text for p in PROMPTS]  # type: ignore[call-overload]


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Whole prompts in one step, nothing cached."""
    log = tmp_path_factory.mktemp("plain") / "log"
    with running_server([*SOFTMAX, "--no-enable-prefix-caching", *SMALL], log=log) as server:
        yield server


def test_the_embedded_model_answers_sensibly(plain: Server) -> None:
    ask = {"model": plain.model, "temperature": 0}
    question = [{"role": "user", "content": "What is the capital of France?"}]
    answer = client(plain).chat.completions.create(messages=question, max_tokens=16, **ask)  # type: ignore[call-overload]
    assert "Paris" in answer.choices[0].message.content
    texts = answers(plain)
    assert texts[0].startswith(" one, two, three") and texts[1].startswith(" east and sets in the west")
    assert plain.log
    assert (
        "attention: softmax_exp nli-4, softmax_recip exact, sum float32, kernel cpu/" in plain.log.read_text()
    )


def test_cached_prefixes_and_chunked_prefill_change_no_text(plain: Server, tmp_path: Path) -> None:
    chunked = ["--enable-prefix-caching", "--max-num-batched-tokens", "40", "--block-size", "32"]
    with running_server([*SOFTMAX, *chunked, *SMALL], log=tmp_path / "log") as server:
        first, again = answers(server), answers(server)
        metrics = client(server)._client.get(f"{server.base_url}/metrics").text
    assert first == answers(plain)
    assert again == first
    hits = [line for line in metrics.splitlines() if line.startswith("vllm:prefix_cache_hits_total")]
    assert hits and float(hits[0].rpartition(" ")[2]) > 100


def test_a_folder_with_a_recipe_compiled(tiny: Path, tmp_path: Path) -> None:
    """Plain `vllm serve DIR`, compiled, with all of the softmax's options in config.json."""
    folder = tmp_path / "with-recipe"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((tiny / "config.json").read_text())
    sites = "softmax_exp,softmax_recip"
    config["quantization_config"] = from_flags(
        lut="nli-32", lut_sites=sites, softmax_sum="float16"
    ).to_config()
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    args = [str(folder), "--dtype", "bfloat16", "--served-model-name", "m", *SMALL]
    program = [sys.executable, "-m", "lutserve.server.vllm_cli", "serve"]
    with running_server(args, log=tmp_path / "log", program=program) as server:
        answer = client(server).completions.create(model="m", prompt="The river", max_tokens=4, temperature=0)
        assert answer.usage and answer.usage.completion_tokens == 4
    log = (tmp_path / "log").read_text()
    assert "attention: softmax_exp nli-32, softmax_recip nli-32, sum float16, kernel cpu/" in log


# With a table for a layer that no model has, every layer computes the exact rule of our kernel.
OURS = {"lutserve": {"luts": {"layers.999.softmax_exp": "nli-4"}}}
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    model, extra, options = sys.argv[1], json.loads(sys.argv[2]), json.loads(sys.argv[3])
    llm = LLM(model, enforce_eager=True, max_model_len=512, kv_cache_memory_bytes=2**28,
              additional_config=extra, **options)
    prompts = [[3 + (7 * i * i + 5 * n) % 500 for i in range(n)] for n in (1, 5, 40, 130, 300)]
    params = SamplingParams(temperature=0, max_tokens=20, prompt_logprobs=0, logprobs=0, ignore_eos=True)
    found = []
    for out in llm.generate([{"prompt_token_ids": ids} for ids in prompts], params):
        ids = list(out.prompt_token_ids)
        scores = [step[token].logprob for token, step in zip(ids[1:], out.prompt_logprobs[1:])]
        found.append([scores, list(out.outputs[0].token_ids)])
    print("FOUND", json.dumps(found))
"""


def logprobs(
    folder: Path, script: Path, extra: dict[str, object], **options: object
) -> list[list[list[float]]]:
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "TORCHDYNAMO_DISABLE": "1"}
    command = [sys.executable, str(script), str(folder), json.dumps(extra), json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=600)
    assert "FOUND" in done.stdout, done.stderr[-3000:]
    if extra:
        assert "attention: softmax_exp exact" in done.stdout + done.stderr
    found: list[list[list[float]]] = json.loads(done.stdout.split("FOUND", 1)[1])
    return found


@pytest.mark.parametrize("kind", ["sliding", "mixed"])
def test_exact_equals_vllm_in_models_with_a_window(tmp_path: Path, kind: str) -> None:
    """All layers with a sliding window, and one of each kind; fp16, whose roundings are fine."""
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu"}
    config |= {"tie_word_embeddings": False, "sliding_window": 24}
    if kind == "sliding":
        config |= {"architectures": ["MistralForCausalLM"], "model_type": "mistral"}
    else:
        config |= {"layer_types": ["sliding_attention", "full_attention"]}
    sizes = {"hidden": 128, "intermediate": 256, "layers": 2, "vocab": 512}
    folder = models._write(tmp_path / "model", config, "float16", **sizes)
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    want = logprobs(folder, script, {}, dtype="float16")
    for options in ({}, {"max_num_batched_tokens": 64, "max_num_seqs": 8}):
        found = logprobs(folder, script, OURS, dtype="float16", **options)
        for (scores, tokens), (exact, greedy) in zip(found, want, strict=True):
            assert tokens == greedy
            assert all(abs(a - b) < 0.02 for a, b in zip(scores, exact, strict=True))
    folder_config = json.loads((folder / "config.json").read_text()) | {"sliding_window": None}
    (folder / "config.json").write_text(json.dumps(folder_config | {"layer_types": None}))
    unlimited = logprobs(folder, script, {}, dtype="float16")
    assert any(abs(a - b) > 0.1 for a, b in zip(unlimited[-1][0], want[-1][0], strict=True)), "no window?"
