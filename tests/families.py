"""One tiny random model of every family, made by transformers with a fixed seed.

Run as a script with a JSON request, this file scores prompts with vLLM in this process:
`[{"folder": ..., "recipe": ..., "prompts": [[token, ...], ...], "eager": true}, ...]`, and prints for every
entry the log-probabilities of the prompts' tokens and the tables in use.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

from lutserve import luts

TABLE = luts.lut_table
SIZES: dict[str, Any] = {
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,  # the smallest that vLLM's CPU attention takes
    "vocab_size": 384,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GPT2: dict[str, Any] = {"n_embd": 128, "n_inner": 192, "n_layer": 2, "n_head": 4, "n_positions": 256}
OPT: dict[str, Any] = {"ffn_dim": 192, "word_embed_proj_dim": 128, "dropout": 0.0}
EXPERTS: dict[str, Any] = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}

#: family -> class of its configuration, what it adds to SIZES
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", {}),
    "qwen2": ("Qwen2Config", {}),
    "qwen3": ("Qwen3Config", {}),
    "gemma": ("GemmaConfig", {"hidden_act": "gelu_pytorch_tanh"}),
    "gpt2": ("GPT2Config", GPT2),
    "opt-relu": ("OPTConfig", OPT),
    "opt-gelu": ("OPTConfig", OPT | {"activation_function": "gelu"}),
    "qwen3_moe": ("Qwen3MoeConfig", EXPERTS | {"norm_topk_prob": True}),
}


def write(folder: Path, family: str, dtype: torch.dtype = torch.float16) -> Path:
    """Write the tiny model of a family as a Hugging Face folder with a tokenizer, and return it."""
    import transformers
    from tiny import _tokenizer

    name, extra = FAMILIES[family]
    config = getattr(transformers, name)(**SIZES | {"tie_word_embeddings": False} | extra)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(sum(map(ord, family)))
    for key, value in model.named_parameters():
        noise = torch.randn(value.shape, generator=generator)
        if value.dim() > 1:
            # Wide enough that gates and scores reach the curved parts of their functions.
            value.data = noise * 1.6 / value.shape[-1] ** 0.5
        elif key.endswith("bias") or family == "gemma":
            value.data = 0.1 * noise
        else:
            value.data = 1 + 0.1 * noise
    model.to(dtype).save_pretrained(folder)
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=_tokenizer(SIZES["vocab_size"]), bos_token="<|im_start|>", eos_token="<|im_end|>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def prompts(count: int = 4, length: int = 48) -> list[list[int]]:
    """Random prompts."""
    generator = torch.Generator().manual_seed(5)
    return torch.randint(3, SIZES["vocab_size"], (count, length), generator=generator).tolist()


def bent_rsqrt(function: str, spec: str, dtype: torch.dtype) -> torch.Tensor:
    """`luts.lut_table`, but up to 20 % off for rsqrt (a smooth wave over [1, 4)): an effect plain to see."""
    table = TABLE(function, spec, dtype)
    if function == "rsqrt":
        m = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(torch.float16).float().clamp(1, 4)
        table = (table.float() * (1 + 0.2 * torch.sin(torch.pi * m.log2()))).to(dtype)
    return table


def score(request: dict[str, Any]) -> dict[str, Any]:
    """Log-probabilities of every prompt's tokens but the first, by vLLM with a recipe."""
    from vllm import LLM, SamplingParams

    from lutserve.layers import saturation, sites

    sites.luts.lut_table = bent_rsqrt if request.get("bent") else TABLE
    if request.get("narrow"):
        saturation.luts.input_range = lambda function, spec: (-0.5, 0.5)
    sites.REPORTS.clear()
    saturation.COUNTERS.clear()
    recipe = request.get("recipe")
    llm = LLM(
        request["folder"],
        enforce_eager=request.get("eager", True),
        max_model_len=128,
        max_num_seqs=8,
        dtype=request.get("dtype", "float16"),
        kv_cache_memory_bytes=64 << 20,
        additional_config={"lutserve": recipe} if recipe else {},
        enable_prefix_caching=False,
    )
    params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
    answers = llm.generate([{"prompt_token_ids": ids} for ids in request["prompts"]], params, use_tqdm=False)
    scores = [
        [chances[token].logprob for token, chances in zip(ids[1:], answer.prompt_logprobs[1:], strict=True)]
        for ids, answer in zip(request["prompts"], answers, strict=True)
    ]
    llm.llm_engine.engine_core.shutdown()
    return {
        "scores": scores,
        "sites": [[r.module, r.site, r.function, r.spec] for r in sites.REPORTS.values()],
        "saturations": saturation.totals(),
    }


if __name__ == "__main__":
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    requests = json.load(sys.stdin)
    if all(request.get("eager", True) for request in requests):
        os.environ["TORCHDYNAMO_DISABLE"] = "1"  # vLLM would compile its log-softmax
    results = [score(request) for request in requests]
    Path(sys.argv[1]).write_text(json.dumps(results))
