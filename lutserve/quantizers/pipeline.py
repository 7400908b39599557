"""Take a whole model through quantisation, a decoder block at a time, and write a Hugging Face folder."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import lutserve
from lutserve import checkpoint
from lutserve.errors import UserError
from lutserve.quantizers import calibration, card
from lutserve.quantizers.block import BlockQuantizer, Layer, reader
from lutserve.quantizers.integers import IntegerWeight
from lutserve.quantizers.partial import Partial
from lutserve.quantizers.settings import Settings
from lutserve.quantizers.skeleton import Skeleton, run_block
from lutserve.quantizers.source import Source
from lutserve.quantizers.statistics import Inputs, collect
from lutserve.recipe import Group
from lutserve.search import architecture

#: tokens of each calibration window that formats are chosen with
_ROWS = 32


@dataclass(frozen=True)
class Step:
    """Where the run is: block `block` of `blocks`, doing `what`; `done` of 1 is finished."""

    block: int
    blocks: int
    what: str
    done: float


Watch = Callable[[Step], None]


def quantize(
    model: Path,
    output: Path,
    settings: Settings,
    *,
    text: str = calibration.DEFAULT,
    name: str | None = None,
    watch: Watch = lambda step: None,
    say: Callable[[str], None] = lambda line: None,
) -> None:
    """Quantise a model folder into `output`.

    A killed run goes on where it was when it is repeated; `output` is there when it is whole.

    Args:
        model: Hugging Face folder with 16-bit (or fp32) weights.
        output: folder to make.
        settings: what to do.
        text: calibration text, see `calibration.windows`.
        name: what the model card calls the model; default the folder's name.
        watch: told about every step.
        say: given lines for the user.

    Raises:
        UserError: the model cannot be quantised, there is no calibration text, or the output is in the way.

    """
    if output.exists():
        raise UserError(f"{output} exists; give another folder or remove it")
    source = Source(model)
    skeleton = Skeleton(source)
    windows: list[Tensor] = []
    if settings.calibrated:
        windows = calibration.windows(text, model, settings.samples, settings.length)
    state = {
        "lutserve": lutserve.__version__,
        "settings": settings.to_json(),
        "model": {file.name: file.stat().st_size for file in source.files},
        "config": source.config,
        "calibration": _digest(windows),
    }
    with Partial(output, state) as partial:
        run = _Run(skeleton, settings, partial, watch, say)
        run.blocks(windows)
        layers = partial.reports(len(skeleton.blocks))
        if not layers:
            why = "the recipe names none" if settings.layers else f"--ignore {','.join(settings.ignore)}"
            raise UserError(f"no linear layer left to quantise: {why}")
        config = source.config | {"quantization_config": settings.recipe.to_config()}
        report = {"settings": settings.to_json(), "layers": layers}
        extras = {
            "config.json": json.dumps(config, indent=2) + "\n",
            checkpoint.REPORT: json.dumps(report, indent=1) + "\n",
            "README.md": card.text(name or model.resolve().name, output.name, settings, text, layers),
        }
        partial.finish(run.tensors(), extras, source.companions())


class _Run:
    def __init__(
        self,
        skeleton: Skeleton,
        settings: Settings,
        partial: Partial,
        watch: Watch,
        say: Callable[[str], None],
    ):
        self.skeleton, self.settings, self.partial, self.watch = skeleton, settings, partial, watch
        head_size = getattr(skeleton.config, "head_dim", None)
        if head_size is None and getattr(skeleton.config, "num_attention_heads", None):
            head_size = skeleton.config.hidden_size // skeleton.config.num_attention_heads
        self.quantizer = BlockQuantizer(settings, head_size, say)
        self.recipe = settings.recipe
        self.fused = architecture.fused(skeleton.source.config) if settings.layers else {}

    def blocks(self, windows: list[Tensor]) -> None:
        """Make every block that is not done."""
        total = len(self.skeleton.blocks)
        first = self.partial.done(total, bool(windows))
        if first == total:
            return
        hidden: list[Tensor] = []
        arguments: list[dict[str, Any]] = [{}] * total
        if windows:
            self.watch(Step(first, total, "reading calibration text", 0.0))
            if first:
                _, arguments = self.skeleton.inputs(windows[:1])
                hidden = self.partial.hidden(first)
            else:
                hidden, arguments = self.skeleton.inputs(windows)
        for index in range(first, total):
            self._block(index, total, hidden, arguments[index])

    @torch.no_grad()
    def _block(self, index: int, total: int, hidden: list[Tensor], arguments: dict[str, Any]) -> None:
        """Make block `index`; `hidden`, what enters it, becomes what leaves it."""
        block, linears = self.skeleton.fill(index), self.skeleton.linears(index)
        groups = {name: self._group(index, name) for name in linears}
        groups = {name: group for name, group in groups.items() if group.stored}
        targets = {name: linears[name] for name in groups}
        step = _Progress(self.watch, index, total, len(targets), len(hidden))
        inputs: list[Inputs] = []
        if hidden:
            sample, sequential = hidden[0], self.settings.algo == "gptq"
            with step("calibrating", 0.4):
                rows = _ROWS if self.settings.adaptive else 0
                inputs = collect(block, linears, hidden, arguments, not sequential, step.sample, rows)
            with step("choosing scales", 0.1):
                dtypes = self._dtypes(index, block)
                self.quantizer.fold(block, linears, inputs, sample, arguments, dtypes, groups)
        layers: dict[str, Layer] = {}
        for name, linear in targets.items():
            with step(name, 0.4 / len(targets)):
                entry = reader(inputs, name)
                layers[name] = self.quantizer.round(name, linear.weight, entry, groups[name])
        tensors = self._block_tensors(index, block, layers)
        if hidden and sequential:
            with step("running on", 0.1):
                for name, layer in layers.items():
                    linears[name].weight.copy_(layer.weight.dequantize())
                for i, state in enumerate(hidden):
                    hidden[i] = run_block(block, state, arguments)
                    step.sample()
        self.skeleton.empty(index)
        self.partial.save_block(index, tensors, self._report(index, layers))
        if hidden and index + 1 < total:
            self.partial.save_hidden(index + 1, hidden)
        self.watch(Step(index + 1, total, "", (index + 1) / total))

    def _group(self, index: int, name: str) -> Group:
        """What the recipe makes of a layer, by its own name or that of the fused layer that it is part of."""
        full = self.skeleton.stored_name(index, f"{name}.weight").removesuffix(".weight")
        prefix, parts = self.fused.get(full, (full, ()))
        return self.recipe.group_for(prefix, parts)

    def _dtypes(self, index: int, block: nn.Module) -> dict[str, torch.dtype]:
        stored, dtypes = self.skeleton.stored_name, self.skeleton.dtypes
        return {name: dtypes[stored(index, name)] for name, _ in block.named_parameters()}

    def _block_tensors(self, index: int, block: nn.Module, layers: dict[str, Layer]) -> dict[str, Tensor]:
        """What the checkpoint holds of a block; parameters that are not quantised keep their stored dtype."""
        dtypes = self._dtypes(index, block)
        tensors: dict[str, Tensor] = {}
        for name, parameter in block.named_parameters():
            stored = self.skeleton.stored_name(index, name)
            owner = name.removesuffix(".weight")
            if owner in layers and name.endswith(".weight"):
                layer, weight = stored.removesuffix(".weight"), layers[owner].weight
                if isinstance(weight, IntegerWeight):
                    tensors |= weight.tensors(layer, dtypes[name])
                else:
                    tensors |= checkpoint.layer_tensors(layer, weight)
            else:
                tensors[stored] = parameter.to(dtypes[name])
        return tensors

    def _report(self, index: int, layers: dict[str, Layer]) -> dict[str, Any]:
        report = {}
        for name, layer in layers.items():
            full = self.skeleton.stored_name(index, f"{name}.weight").removesuffix(".weight")
            report[full] = layer.report()
        return report

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """All tensors of the finished checkpoint, those of the blocks last."""
        from safetensors import safe_open

        count = len(self.skeleton.blocks)
        files: list[Any] = [safe_open(self.partial.block(i), framework="pt") for i in range(count)]
        replaced = {
            self.skeleton.stored_name(index, name)
            for index, block in enumerate(self.skeleton.blocks)
            for name, _ in block.named_parameters()
        }
        for name in sorted(self.skeleton.source.names.keys() - replaced):
            yield name, self.skeleton.source.tensor(name)
        for file in files:
            for name in sorted(file.keys()):
                yield name, file.get_tensor(name)


class _Progress:
    """Turns what happens inside one block into steps."""

    def __init__(self, watch: Watch, index: int, total: int, layers: int, samples: int):
        self._watch, self._index, self._total, self._samples = watch, index, total, samples
        # Without calibration only the layers count.
        self._stretch = 1.0 if samples else 2.5
        self._base, self._share, self._seen, self._what = 0.0, 0.0, 0, ""

    @contextmanager
    def __call__(self, what: str, share: float) -> Iterator[None]:
        """A part of the block's work that makes up `share` of it."""
        self._what, self._share, self._seen = what, share * self._stretch, 0
        self._tell(0.0)
        yield
        self._base += self._share

    def sample(self) -> None:
        """One sample more went through."""
        self._seen += 1
        self._tell(self._seen / self._samples)

    def _tell(self, part: float) -> None:
        done = (self._index + min(1.0, self._base + part * self._share)) / self._total
        self._watch(Step(self._index, self._total, self._what, done))


def _digest(windows: list[Tensor]) -> str | None:
    if not windows:
        return None
    return hashlib.sha256(torch.stack(windows).numpy().astype("<i8").tobytes()).hexdigest()
