"""A real server, a real client."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import httpx
import openai
import pytest
import torch
from servers import KEY, SMALL, client
from transformers import LlamaForCausalLM

from lutserve.kernels import isa
from lutserve.recipe import from_flags
from lutserve.server.client import Server, running_server

pytestmark = pytest.mark.slow
PROMPT = "The river rises in the hills"


def test_completion(guarded: Server) -> None:
    answer = client(guarded).completions.create(
        model=guarded.model, prompt=PROMPT, max_tokens=8, temperature=0
    )
    assert answer.usage and answer.usage.completion_tokens == 8
    assert answer.choices[0].finish_reason == "length"
    again = client(guarded).completions.create(
        model=guarded.model, prompt=PROMPT, max_tokens=8, temperature=0
    )
    assert again.choices[0].text == answer.choices[0].text


def test_chat(guarded: Server) -> None:
    messages = [{"role": "user", "content": "How far is it?"}]
    answer = client(guarded).chat.completions.create(model=guarded.model, messages=messages, max_tokens=5)  # type: ignore[arg-type]
    assert answer.usage and answer.usage.completion_tokens <= 5
    assert answer.choices[0].message.role == "assistant"


def test_a_stream_gives_the_text_of_the_plain_answer(guarded: Server) -> None:
    ask = {"model": guarded.model, "prompt": PROMPT, "max_tokens": 20, "temperature": 0}
    whole = client(guarded).completions.create(**ask).choices[0].text  # type: ignore[call-overload]
    chunks = list(client(guarded).completions.create(**ask, stream=True))  # type: ignore[call-overload]
    assert "".join(chunk.choices[0].text for chunk in chunks) == whole
    assert len(chunks) > 5


def test_echo_with_logprobs_scores_the_prompt(guarded: Server) -> None:
    tokens = [5, 77, 300, 12, 5]
    answer = client(guarded).completions.create(
        model=guarded.model, prompt=tokens, max_tokens=1, echo=True, logprobs=1, temperature=0
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs and logprobs.token_logprobs
    assert logprobs.token_logprobs[0] is None
    assert len(logprobs.token_logprobs) == len(tokens) + 1
    assert all(-100 < value <= 0 for value in logprobs.token_logprobs[1:])


def test_n_and_stop(guarded: Server) -> None:
    many = client(guarded).completions.create(model=guarded.model, prompt=PROMPT, max_tokens=6, n=3, seed=1)
    assert [choice.index for choice in many.choices] == [0, 1, 2]
    ask = {"model": guarded.model, "prompt": PROMPT, "temperature": 0}
    text = client(guarded).completions.create(**ask, max_tokens=12).choices[0].text  # type: ignore[call-overload]
    stop = text[3:5]
    cut = client(guarded).completions.create(**ask, max_tokens=12, stop=[stop]).choices[0]  # type: ignore[call-overload]
    assert cut.finish_reason == "stop"
    assert cut.text == text[: text.index(stop)]


def test_concurrent_requests_each_get_their_own_answer(guarded: Server) -> None:
    async def ask(many: openai.AsyncOpenAI, length: int) -> int:
        answer = await many.completions.create(
            model=guarded.model, prompt=PROMPT, max_tokens=length, extra_body={"ignore_eos": True}
        )
        assert answer.usage
        return answer.usage.completion_tokens

    async def scene() -> list[int]:
        async with openai.AsyncOpenAI(base_url=f"{guarded.base_url}/v1", api_key=KEY, max_retries=0) as many:
            return await asyncio.gather(*(ask(many, length) for length in range(1, 25)))

    assert asyncio.run(scene()) == list(range(1, 25))


def test_a_client_that_leaves_in_mid_stream_frees_its_place(guarded: Server) -> None:
    stream = client(guarded).completions.create(
        model=guarded.model, prompt=PROMPT, max_tokens=480, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    stream.close()
    deadline = time.monotonic() + 30
    while metric(guarded, "vllm:num_requests_running") > 0:
        assert time.monotonic() < deadline
        time.sleep(0.1)


def metric(server: Server, name: str) -> float:
    """Sum of a metric over its labels."""
    lines = get(server, "/metrics").text.splitlines()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith((name + "{", name + " ")))


def get(server: Server, path: str, key: str | None = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.get(server.base_url + path, headers=headers, timeout=60)


def test_every_route_but_health_needs_the_key(guarded: Server) -> None:
    paths = get(guarded, "/openapi.json").json()["paths"]
    routes = [(method, path) for path, methods in paths.items() for method in methods]
    assert {"/invocations", "/tokenize", "/metrics", "/lutserve/recipe", "/v1/completions"} <= set(paths)
    for method, path in [*routes, ("get", "/docs"), ("get", "/no-such-route")]:
        answer = httpx.request(
            method.upper(), guarded.base_url + path.replace("{", "").replace("}", ""), timeout=60
        )
        assert answer.status_code == (200 if path == "/health" else 401), (method, path)
    with pytest.raises(openai.AuthenticationError):
        client(guarded, key="wrong").models.list()


def test_recipe_layers_and_metrics(guarded: Server) -> None:
    assert get(guarded, "/lutserve/recipe").json() == from_flags(method="mix8", lut="nli-4").to_config()
    layers = get(guarded, "/lutserve/layers").json()
    assert {layer["group"] for layer in layers} == {
        "qkv_proj",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        "lm_head",
    }
    for layer in layers:
        method = "none" if layer["group"] == "lm_head" else "mix8"
        assert layer["method"] == method and layer["kernel"].startswith("int8 ") == (method == "mix8")
    text = get(guarded, "/metrics").text
    assert 'lutserve:recipe_info{choice="mix8",site="linear:default",table=""} 1.0' in text
    assert 'choice="nli-4",site="silu",table="' in text
    assert 'choice="nli-4",site="softmax_exp",table="' in text
    assert 'lutserve:build_info{version="' in text
    assert 8 < metric(guarded, "lutserve:weight_bits_mean") < 12
    for name in ("lutserve:outlier_columns", "lutserve:outlier_misses_total"):
        assert name + '{group="down_proj"}' in text


def test_start_up_lines_name_method_kernel_and_bits(guarded: Server) -> None:
    assert guarded.log
    log = guarded.log.read_text()
    for group in ("qkv_proj", "o_proj", "gate_up_proj", "down_proj"):
        assert f"lutserve: {group} x2: method mix8, kernel int8 " in log
    assert "lutserve is ready at " in log and "client = OpenAI(" in log


PLAIN = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    options = {"dtype": "bfloat16", "enforce_eager": True, "max_model_len": 512}
    llm = LLM(sys.argv[1], kv_cache_memory_bytes=2**29, **options)
    params = SamplingParams(temperature=0, max_tokens=32, ignore_eos=True)
    outs = llm.generate([{"prompt_token_ids": ids} for ids in json.loads(sys.argv[2])], params)
    print("TOKENS", json.dumps([list(out.outputs[0].token_ids) for out in outs]))
"""


def test_method_none_equals_plain_vllm_and_sigterm_drains(tiny: Path, tmp_path: Path) -> None:
    prompts = [[7, 8, 9], [300, 301, 17, 4, 4, 99], list(range(3, 120))]
    script = tmp_path / "plain.py"
    script.write_text(PLAIN)
    # No plugin of ours in this process: vLLM as it is.
    env = {
        **os.environ,
        "VLLM_PLUGINS": "",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "TORCHDYNAMO_DISABLE": "1",
    }
    command = [sys.executable, str(script), str(tiny), json.dumps(prompts)]
    plain = subprocess.run(command, capture_output=True, text=True, env=env, timeout=600)
    assert "TOKENS" in plain.stdout, plain.stderr[-3000:]
    expected = json.loads(plain.stdout.split("TOKENS", 1)[1])

    # Sums in vLLM's own order too: token for token is more than a GEMM of ours can promise.
    args = ["--model", str(tiny), "--method", "none", "--linear16", "vllm", *SMALL]
    with running_server(args, log=tmp_path / "log") as server:
        for prompt, tokens in zip(prompts, expected, strict=True):
            answer = client(server).completions.create(
                model=server.model,
                prompt=prompt,
                max_tokens=32,
                temperature=0,
                extra_body={"ignore_eos": True, "return_token_ids": True},
            )
            assert answer.choices[0].token_ids == tokens  # type: ignore[attr-defined]

        stream = client(server).completions.create(
            model=server.model,
            prompt=PROMPT,
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        assert server.pid
        os.kill(server.pid, signal.SIGTERM)
        wait_until(lambda: get(server, "/health", key=None).status_code == 503)
        with pytest.raises(openai.InternalServerError) as refused:
            client(server).completions.create(model=server.model, prompt=PROMPT, max_tokens=1)
        assert refused.value.status_code == 503
        usage = [chunk.usage for chunk in stream if chunk.usage]
        assert usage and usage[-1].completion_tokens == 400
        ended = os.waitid(os.P_PID, server.pid, os.WEXITED | os.WNOWAIT)
        assert ended and (ended.si_code, ended.si_status) == (os.CLD_EXITED, 0)


@pytest.mark.skipif("float16" not in isa.slow_16_bit(), reason="vLLM's fp16 GEMM is not slow here")
def test_an_fp16_model_is_multiplied_by_linear16(tiny: Path, tmp_path: Path) -> None:
    tokens = [7, 300, 12, 5, 77, 401, 5, 99]
    model = LlamaForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    exact = model(torch.tensor([tokens])).logits[0].log_softmax(-1)
    expected = [exact[i, token].item() for i, token in enumerate(tokens[1:])]
    args = ["--model", str(tiny), "--dtype", "float16", *SMALL]
    with running_server(args, log=tmp_path / "log") as server:
        answer = client(server).completions.create(
            model=server.model, prompt=tokens, max_tokens=1, echo=True, logprobs=1, temperature=0
        )
        assert answer.choices[0].logprobs and answer.choices[0].logprobs.token_logprobs
        assert answer.choices[0].logprobs.token_logprobs[1 : len(tokens)] == pytest.approx(expected, abs=0.05)
        layers = get(server, "/lutserve/layers", key=None).json()
        assert {layer["group"] for layer in layers} == {
            "qkv_proj",
            "o_proj",
            "gate_up_proj",
            "down_proj",
            "lm_head",
        }
        assert all(layer["kernel"].startswith("linear16 cpu/") for layer in layers)
    log = (tmp_path / "log").read_text()
    for group in ("qkv_proj x2", "lm_head x1"):
        assert f"lutserve: {group}: method none, kernel linear16 cpu/" in log


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_a_folder_with_a_recipe_needs_no_flag(tiny: Path, tmp_path: Path) -> None:
    """Plain `vllm serve DIR` finds the recipe in config.json, and compiled mode serves it."""
    folder = tmp_path / "with-recipe"
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).symlink_to(file)
    config = json.loads((tiny / "config.json").read_text())
    config["quantization_config"] = from_flags(method="mix8", lut="nli-4").to_config()
    (folder / "config.json").unlink()
    (folder / "config.json").write_text(json.dumps(config))
    args = [str(folder), "--dtype", "bfloat16", "--served-model-name", "m", *SMALL]
    program = [sys.executable, "-m", "lutserve.server.vllm_cli", "serve"]
    with running_server(args, log=tmp_path / "log", program=program) as server:
        answer = client(server).completions.create(
            model="m", prompt=PROMPT, max_tokens=4, temperature=0, logprobs=1
        )
        assert answer.choices[0].logprobs
        text = httpx.get(f"{server.base_url}/metrics").text
        assert 'lutserve:recipe_info{choice="mix8",site="linear:default",table=""} 1.0' in text
    assert "lutserve: qkv_proj x2: method mix8" in (tmp_path / "log").read_text()
