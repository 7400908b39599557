"""Whole models on a GPU through vLLM's `LLM`, each configuration in a process of its own.

    python -m lutserve.benchmarks.gpu_models FOLDER {auto,dummy} BACKEND    # one of `gpu`'s: prints JSON

The shape of Llama-3-8B with weights that vLLM invents (`load_format=dummy`: speed only), and SmolLM2-135M as
it is, whose greedy answer is compared with that of fp16. Prompts are token ids, so no tokenizer is needed.
AxCore is not here: its layers choose formats on the CPU while a model loads, for minutes at this size.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lutserve import kv_formats, models
from lutserve.benchmarks.models import w8a8_config
from lutserve.benchmarks.stage import lines_of
from lutserve.errors import UserError
from lutserve.recipe import Recipe, from_flags

LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "bos_token_id": 128000,
    "eos_token_id": 128001,
}
_WEIGHTS4 = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "group", "group_size": 128}
_W4A16 = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "quantization_status": "compressed",
    "config_groups": {"group_0": {"targets": ["Linear"], "weights": _WEIGHTS4}},
    "ignore": ["lm_head"],
}
#: requests, input and output tokens of each
WORKLOADS = {"prefill": (8, 1024, 1), "decode 1": (1, 32, 128), "decode 16": (16, 32, 128)}
#: serving with tables is to be at least this fast, relative to fp16
LUT_TARGET = 0.9
BASELINE, LUTS = "vLLM fp16", "nli-4"
ROUNDS, ANSWER = 3, 32
#: seconds without which no model is worth starting: vLLM compiles, and captures CUDA graphs
_LEAST = 90


@dataclass(frozen=True)
class Configuration:
    """What is served: a recipe of ours, or a form of vLLM's, None for the model as it is."""

    recipe: Recipe | None = None
    theirs: dict[str, Any] | None = None

    @property
    def quantization(self) -> dict[str, Any] | None:
        """What `config.json` says."""
        return self.theirs if self.recipe is None else self.recipe.to_config()

    @property
    def backend(self) -> str:
        """Attention backend, "auto" for vLLM's choice."""
        return kv_formats.ATTENTION_BACKEND if self.recipe and self.recipe.attends else "auto"


def configurations() -> dict[str, Configuration]:
    """Return them by name, the baseline first, then what has a target."""
    return {
        BASELINE: Configuration(),
        LUTS: Configuration(from_flags(lut="nli-4")),
        "mix8": Configuration(from_flags(method="mix8")),
        "nf4": Configuration(from_flags(method="nf4")),
        "vLLM W8A8": Configuration(theirs=w8a8_config()),
        "vLLM W4A16": Configuration(theirs=_W4A16),
        "int4+a8": Configuration(from_flags(method="int4+a8")),
    }


def measure_all(logs: Path, seconds: float) -> Iterator[dict[str, Any]]:
    """Yield model, configuration and results of each, or why it `failed` or was `skipped`, for so long."""
    end = time.monotonic() + seconds
    with tempfile.TemporaryDirectory() as scratch:
        for name, configuration in configurations().items():
            folder = _variant(Path(scratch) / f"llama-{name.replace(' ', '-')}", LLAMA_3_8B, configuration)
            yield _measure("Llama-3-8B, dummy weights", name, configuration, folder, "dummy", logs, end)
        try:
            real = models.prepare_embedded()
        except UserError as error:
            yield {"model": models.DEFAULT, "skipped": str(error)}
            return
        shape, answer = json.loads((real / "config.json").read_text()), None
        for name, configuration in configurations().items():
            if configuration.theirs is not None:  # vLLM's forms are checkpoints, which we do not have
                continue
            folder = _variant(Path(scratch) / f"smollm2-{name.replace(' ', '-')}", shape, configuration)
            for file in real.iterdir():
                if file.name != "config.json":
                    (folder / file.name).symlink_to(file)
            found = _measure(models.DEFAULT, name, configuration, folder, "auto", logs, end)
            if name == BASELINE:
                answer = found.get("answer")
            elif answer and "answer" in found:
                pairs = zip(answer, found["answer"], strict=True)
                found["equal_tokens"] = next((i for i, (a, b) in enumerate(pairs) if a != b), ANSWER)
            yield found


def _variant(folder: Path, shape: Mapping[str, Any], configuration: Configuration) -> Path:
    folder.mkdir()
    config = configuration.quantization
    whole = dict(shape) | ({} if config is None else {"quantization_config": config})
    (folder / "config.json").write_text(json.dumps(whole))
    return folder


def _measure(
    model: str,
    name: str,
    configuration: Configuration,
    folder: Path,
    load_format: str,
    logs: Path,
    end: float,
) -> dict[str, Any]:
    found: dict[str, Any] = {"model": model, "configuration": name}
    left = end - time.monotonic()
    if left < _LEAST:
        return found | {"skipped": "no time left; give --models more seconds"}
    command = [sys.executable, "-m", "lutserve.benchmarks.gpu_models", str(folder), load_format]
    stage = lines_of([*command, configuration.backend], left, logs / f"{folder.name}.log")
    return found | ({"failed": stage.failed} if stage.failed else stage.records[-1])


def run(folder: str, load_format: str, backend: str) -> dict[str, Any]:
    """Return tokens/s of each workload (median and all rounds), and the greedy answer to a fixed prompt."""
    from vllm import LLM, SamplingParams

    llm = LLM(
        model=folder,
        load_format=load_format,
        dtype="float16",
        skip_tokenizer_init=True,
        max_model_len=2048,
        enable_prefix_caching=False,
        gpu_memory_utilization=0.8,
        attention_backend=backend,
    )

    def generate(requests: int, length: int, tokens: int, seed: int) -> list[list[int]]:
        prompts = [
            {"prompt_token_ids": [(7 * i + 131 * j + seed) % 30000 + 5 for i in range(length)]}
            for j in range(requests)
        ]
        greedy = SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True, detokenize=False)
        return [list(out.outputs[0].token_ids) for out in llm.generate(prompts, greedy, use_tqdm=False)]

    results: dict[str, Any] = {"answer": generate(1, 64, ANSWER, 0)[0], "tokens_per_s": {}}
    for name, (requests, length, tokens) in WORKLOADS.items():
        generate(requests, length, tokens, 1)
        rates = []
        for number in range(ROUNDS):
            start = time.perf_counter()
            generate(requests, length, tokens, 2 + number)
            count = requests * (length if tokens == 1 else tokens)
            rates.append(round(count / (time.perf_counter() - start), 1))
        results["tokens_per_s"][name] = {"median": statistics.median(rates), "rounds": rates}
    return results


if __name__ == "__main__":
    print(json.dumps(run(*sys.argv[1:])))
