"""`register`: the `vllm.general_plugins` entry point."""

from __future__ import annotations

import logging


def register() -> None:
    """Tell vLLM our names.

    vLLM calls this in the API server, in EngineCore and in every worker, possibly more than once and
    before any configuration is known: it only registers, every decision is taken later from the recipe.
    """
    # Imported here because `import lutserve` must work where vLLM is not installed.
    from lutserve.layers import activation, attention, cuda_attention, norm
    from lutserve.quant_methods import config

    activation.register()
    attention.register()
    cuda_attention.register()
    norm.register()
    config.register()
    logging.getLogger("vllm.model_executor.models.utils").addFilter(say_once)


def say_once(record: logging.LogRecord, said: set[str] = set()) -> bool:  # noqa: B006
    """Logging filter: let vLLM's warning of a weight in another dtype through once, not once a tensor.

    Serving an fp16 checkpoint in bf16 is our default on a CPU, and has hundreds of tensors.
    """
    if not str(record.msg).startswith("Attempted to load weight"):
        return True
    new = str(record.msg) not in said
    said.add(str(record.msg))
    return new
