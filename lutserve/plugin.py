"""`register`: the `vllm.general_plugins` entry point."""

from __future__ import annotations


def register() -> None:
    """Tell vLLM our names.

    vLLM calls this in the API server, in EngineCore and in every worker, possibly more than once and
    before any configuration is known: it only registers, every decision is taken later from the recipe.
    """
    # Imported here because `import lutserve` must work where vLLM is not installed.
    from lutserve.layers import activation
    from lutserve.quant_methods import config

    activation.register()
    config.register()
