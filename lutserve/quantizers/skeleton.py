"""A Hugging Face model without its weights, whose decoder blocks are filled one at a time."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lutserve.errors import UserError
from lutserve.quantizers.source import Source


class Skeleton:
    """A causal language model with parameters on the meta device, computing in fp32.

    blocks: the decoder blocks in order. dtypes: how each parameter that was loaded is stored.

    UserError for a model whose blocks are not plain `nn.Linear`: experts, or GPT-2's Conv1D.
    """

    def __init__(self, source: Source):
        from transformers import AutoConfig, AutoModelForCausalLM

        self.source = source
        try:
            config = AutoConfig.from_pretrained(source.folder)
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"transformers cannot read {source.folder}: {_line(error)}") from None
        with _no_weights():
            try:
                self.model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
            except ValueError as error:
                raise UserError(f"{source.folder} is no causal language model: {_line(error)}") from None
        self.config = config.get_text_config()
        self.model.requires_grad_(False)
        self.base: str = self.model.base_model_prefix
        self.dtypes: dict[str, torch.dtype] = {}
        self.path, self.blocks = self._find_blocks()
        for block in self.blocks:
            self._check(block)

    def linears(self, index: int) -> dict[str, nn.Linear]:
        """The linear layers of a block by their names within it."""
        found = self.blocks[index].named_modules()
        return {name: module for name, module in found if isinstance(module, nn.Linear)}

    def stored_name(self, index: int, name: str) -> str:
        """The checkpoint's name of a parameter of a block."""
        return self.source.find(f"{self.path}.{index}.{name}", self.base)

    def fill(self, index: int) -> nn.Module:
        """Load the weights of a block, in fp32, and return it."""
        block = self.blocks[index]
        self._fill(block, f"{self.path}.{index}")
        return block

    def empty(self, index: int) -> None:
        """Free the weights of a block."""
        self.blocks[index].to("meta")

    @torch.no_grad()
    def inputs(self, windows: list[Tensor]) -> tuple[list[Tensor], list[dict[str, Any]]]:
        """Hidden states fp32 [1, L, H] that enter the first block, and the other arguments of each block.

        Args:
            windows: token ids [L], all of one length, so that the arguments are the same for all.

        """
        outside = [
            (name, module)
            for name, module in self.model.named_modules()
            if not name.startswith(f"{self.path}.") and module is not self.model.get_output_embeddings()
        ]
        for name, module in outside:
            self._fill(module, name, recurse=False)
        arguments: list[dict[str, Any]] = [{} for _ in self.blocks]
        entering: list[Tensor] = []

        def record(place: int) -> Any:
            def forward(hidden: Tensor, *_: Any, **given: Any) -> Tensor:
                arguments[place] = given
                if place == 0:
                    entering.append(hidden)
                return hidden

            return forward

        for place, block in enumerate(self.blocks):
            block.forward = record(place)
        try:
            base = getattr(self.model, self.base, self.model)
            for window in windows:
                base(input_ids=window[None], use_cache=False)
        finally:
            for block in self.blocks:
                del block.forward
            for _, module in outside:
                for key, parameter in module._parameters.items():
                    if parameter is not None:
                        module._parameters[key] = _meta(parameter)
        return entering, arguments

    def _find_blocks(self) -> tuple[str, nn.ModuleList]:
        depth = getattr(self.config, "num_hidden_layers", None)
        for name, module in self.model.named_modules():
            if isinstance(module, nn.ModuleList) and len(module) == depth:
                return name, module
        raise UserError(f"{self.source.folder}: no list of {depth} decoder blocks in this architecture")

    def _check(self, block: nn.Module) -> None:
        kind = type(self.model).__name__
        if any(parameter.ndim == 3 for parameter in block.parameters()):
            raise UserError(f"{kind} has mixture-of-experts layers, which cannot be quantised offline yet")
        if any(type(module).__name__ == "Conv1D" for module in block.modules()):
            raise UserError(f"{kind} keeps its linear layers transposed (Conv1D), which is not supported")

    def _fill(self, module: nn.Module, prefix: str, recurse: bool = True) -> None:
        for name, owner in module.named_modules(prefix=prefix) if recurse else [(prefix, module)]:
            for key, parameter in owner._parameters.items():
                if parameter is not None:
                    known = self.source.find(f"{name}.{key}", self.base)
                    stored = self.source.tensor(known)
                    self.dtypes[known] = stored.dtype
                    if stored.shape != parameter.shape:
                        raise UserError(f"{name}.{key} is {list(stored.shape)}, not {list(parameter.shape)}")
                    owner._parameters[key] = nn.Parameter(stored.float(), requires_grad=False)
            for key in owner._buffers.keys() - owner._non_persistent_buffers_set:
                if f"{name}.{key}" in self.source.names:
                    owner._buffers[key] = self.source.tensor(f"{name}.{key}")


def run_block(block: nn.Module, hidden: Tensor, arguments: dict[str, Any]) -> Tensor:
    """The hidden states that leave a block, fp32 [1, L, H]."""
    out = block(hidden, **arguments)
    leaving: Tensor = out[0] if isinstance(out, tuple) else out
    return leaving


def _meta(parameter: nn.Parameter) -> nn.Parameter:
    return nn.Parameter(parameter.to("meta"), requires_grad=False)


def _line(error: Exception) -> str:
    return str(error).strip().splitlines()[0]


@contextmanager
def _no_weights() -> Iterator[None]:
    """Make modules with parameters on the meta device; buffers, which hold rotary tables, stay real."""
    register = nn.Module.register_parameter

    def register_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        register(module, name, parameter if parameter is None else _meta(parameter))

    nn.Module.register_parameter = register_meta  # type: ignore[method-assign, assignment]
    try:
        yield
    finally:
        nn.Module.register_parameter = register  # type: ignore[method-assign]
