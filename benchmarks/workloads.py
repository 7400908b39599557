"""What `lutserve bench` measures, as data: workloads (what is asked) and providers (who is asked)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from lutserve import methods
from lutserve.errors import UserError


@dataclass(frozen=True)
class Workload:
    """A kind of traffic, and the one number that it yields."""

    name: str
    #: "decode": tokens a second while all requests generate; "prefill": prompt tokens a second
    metric: Literal["decode", "prefill"]
    input_len: int
    output_len: int
    #: requests in flight
    concurrency: int
    prompts: int

    def arguments(self, seed: int) -> list[str]:
        """Return the flags of `vllm bench serve` that make this traffic."""
        flags = {
            "--random-input-len": self.input_len,
            "--random-output-len": self.output_len,
            "--num-prompts": self.prompts,
            "--max-concurrency": self.concurrency,
            "--seed": seed,
        }
        return [
            "--dataset-name",
            "random",
            "--ignore-eos",
            *(str(part) for pair in flags.items() for part in pair),
        ]

    def value(self, result: Mapping[str, Any]) -> float:
        """Return tokens a second from the result of `vllm bench serve`.

        Decode speed is taken from the median time between tokens, so that the prefill does not count.
        """
        if self.metric == "decode":
            return 1000.0 * self.concurrency / float(result["median_tpot_ms"])
        return float(result["total_input_tokens"]) / float(result["duration"])


WORKLOADS: dict[str, Workload] = {
    workload.name: workload
    for workload in (
        Workload("decode-1", "decode", input_len=16, output_len=64, concurrency=1, prompts=3),
        Workload("decode-8", "decode", input_len=16, output_len=64, concurrency=8, prompts=8),
        Workload("prefill", "prefill", input_len=1024, output_len=1, concurrency=1, prompts=4),
    )
}


def batches(sizes: Sequence[int]) -> list[Workload]:
    """Return the workloads of `lutserve bench throughput`, two for each batch size.

    steps-B is MixQ's own benchmark as a server can do it: B sequences from one token each, a step is one
    token more for all of them, the speed is B by the median step. The published script throws the history
    away after every step; here there are at most 32 tokens of it. decode-B has 128 tokens before and 64 to
    generate.
    """
    return [
        Workload(f"{name}-{size}", "decode", before, after, size, prompts=max(size, 3))
        for name, before, after in (("steps", 1, 32), ("decode", 128, 64))
        for size in sizes
    ]


@dataclass(frozen=True)
class Provider:
    """One server configuration."""

    name: str
    #: flags of `lutserve serve`, besides the model and what all providers share
    arguments: tuple[str, ...] = ()
    #: serve the compressed-tensors W8A8 form of the model instead of the model
    w8a8: bool = False
    #: a folder to serve instead of the model, for what is quantised beforehand
    folder: str = ""


#: the first one is the baseline of all ratios
PROVIDERS: dict[str, Provider] = {
    provider.name: provider
    for provider in (
        Provider("bf16", ("--method", "none", "--linear16", "vllm")),
        Provider("vllm-w8a8", ("--method", "none"), w8a8=True),
        Provider("mix8", ("--method", "mix8")),
        Provider("bf16+nli-4", ("--method", "none", "--linear16", "vllm", "--lut", "nli-4")),
        Provider("mix8+nli-4", ("--method", "mix8", "--lut", "nli-4")),
    )
}


def choose_providers(names: Sequence[str] | None) -> list[Provider]:
    """Return the providers called `names`, in that order (None: all): of PROVIDERS, or any `--method`.

    Raises:
        UserError: a name is neither.

    """
    named = {}
    for name in PROVIDERS if names is None else names:
        try:
            named[name] = PROVIDERS.get(name) or Provider(methods.get(name).name, ("--method", name))
        except UserError as error:
            raise UserError(f"unknown provider {name!r}; allowed: {', '.join(PROVIDERS)}; {error}") from None
    return list(named.values())


def choose(names: Sequence[str] | None, known: Mapping[str, Any], kind: str) -> list[Any]:
    """Return the entries of `known` called `names`, in that order (None: all); UserError for others."""
    for name in names or ():
        if name not in known:
            raise UserError(f"unknown {kind} {name!r}; allowed: {', '.join(known)}")
    return [known[name] for name in (known if names is None else names)]
