"""`lutserve bench throughput`: MixQ's table of tokens a second by type and batch size, memory and quality.

Servers, their order and the ratios are those of `lutserve bench`; `workloads.batches` is the traffic.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lutserve.benchmarks.report import Report
from lutserve.benchmarks.serve import interleave
from lutserve.benchmarks.workloads import Provider, batches, choose_providers
from lutserve.errors import UserError
from lutserve.eval.ppl import perplexity
from lutserve.eval.texts import wikitext2
from lutserve.models import resolve
from lutserve.server.client import Server
from lutserve.server.launch import check_int4

#: what the published scripts call a type -> our provider
_ALIASES = {"mix": "mix8", "quik": "quik4"}
#: types that exist as folders only
_FOLDERS = ("awq", "gptq", "quik4")
_FP16 = Provider("fp16", ("--method", "none", "--linear16", "vllm", "--dtype", "float16"))
_WINDOW = 2048


def chosen(types: str) -> list[Provider]:
    """Return the providers of --types.

    Raises:
        UserError: an unknown type, one given twice, or one that this machine cannot serve.

    """
    found: dict[str, Provider] = {}
    for part in types.split(","):
        given, equals, folder = part.strip().partition("=")
        name = _ALIASES.get(given, given)
        if name in found:
            raise UserError(f"--types {types}: {given} is there twice")
        if equals:
            config = Path(resolve(folder)) / "config.json"
            check_int4(json.loads(config.read_text()))
            found[name] = Provider(name, folder=folder)
        elif name in _FOLDERS:
            raise UserError(f"--types {given}: it is quantised beforehand; give {given}=DIR")
        elif name == "bitsandbytes":
            raise UserError(f"--types {given}: vLLM has no CPU kernels for it; llm-int8 follows its rule")
        else:
            found[name] = _FP16 if name == "fp16" else choose_providers([name])[0]
    return list(found.values())


def sizes(batch: str) -> list[int]:
    """Return the batch sizes of --batch; UserError if they are none."""
    parts = [part.strip() for part in batch.split(",")]
    if not all(part.isdecimal() and int(part) for part in parts) or len(set(parts)) < len(parts):
        raise UserError(f"--batch {batch}: give whole numbers from 1 on, each once, e.g. 1,8,32")
    return [int(part) for part in parts]


def run(
    *,
    types: str,
    batch: str,
    model: str | None,
    rounds: int,
    output: Path,
    windows: int | None,
    data: Path | None,
    server_args: Sequence[str],
) -> tuple[str, Path]:
    """Measure, and return the table in Markdown and the JSON record; the table lies beside it.

    Args:
        types: see `chosen`; the first is the baseline.
        batch: requests in flight, comma separated.
        model: alias, folder or hub id; None for the random benchmark model.
        rounds: how often everything is measured.
        output: folder for record, table and logs.
        windows: of 2048 tokens for the perplexity; None for no perplexity.
        data: folder with the text for it.
        server_args: more flags for all servers.

    Raises:
        UserError: wrong options, or a server that fails.

    """
    providers, traffic = chosen(types), batches(sizes(batch))
    if model is not None and any(provider.w8a8 for provider in providers):
        raise UserError("vllm-w8a8 serves a form of the default model; leave out it or --model")
    text, quality = "", dict[str, dict[str, float]]()
    if windows is not None:
        if model is None or data is None:
            raise UserError("--with-ppl needs --model (random weights have no quality) and --data FOLDER")
        text = wikitext2(data)
        # A window, and the token that vLLM must generate.
        server_args = ["--max-model-len", str(_WINDOW + 1), *server_args]

    def look(name: str, server: Server) -> None:
        if windows is not None:
            long = perplexity(server.base_url, text, window=_WINDOW, windows=windows)
            # As the published script: windows of 512, of which the second halves count.
            half = perplexity(server.base_url, text, window=512, windows=4 * windows, first=256)
            quality[name] = {"2048": long.ppl, "512": half.ppl}

    report = interleave(output, model, providers, traffic, rounds, server_args, None, look)
    report.setting["perplexity"] = quality
    report.write()
    table = markdown(report, quality)
    report.path.with_suffix(".md").write_text(table + "\n")
    return table, report.path


def markdown(report: Report, quality: dict[str, dict[str, float]]) -> str:
    """Return a row for each type and batch size: medians, ratios to the baseline with their range, memory."""
    rows = {(row.workload, row.provider): row for row in report.rows}
    peaks: dict[str, float] = {}
    for entry in report.runs:
        facts = entry["lutserve"]
        if "peak_bytes" in facts:
            peaks[facts["provider"]] = max(peaks.get(facts["provider"], 0.0), facts["peak_bytes"] / 1e9)
    columns = ["batch", "type", "steps, tokens/s", "decode, tokens/s", "peak memory, GB"]
    columns += ["perplexity, 2048", "perplexity, 512"] if quality else []
    lines = ["| " + " | ".join(columns) + " |", "|" + "---|" * len(columns)]
    for size in dict.fromkeys(name.rpartition("-")[2] for name, _ in rows):
        for provider in dict.fromkeys(name for _, name in rows):
            cells = [size, provider]
            for kind in ("steps", "decode"):
                row = rows[f"{kind}-{size}", provider]
                ratio = f"{row.ratio:.2f}x, {row.ratio_min:.2f}-{row.ratio_max:.2f}"
                cells.append(f"{row.median:.1f}" + (f" ({ratio})" if provider != report.baseline else ""))
            cells.append(f"{peaks[provider]:.2f}" if provider in peaks else "")
            cells += [f"{quality[provider][window]:.3f}" for window in ("2048", "512")] if quality else []
            lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)
