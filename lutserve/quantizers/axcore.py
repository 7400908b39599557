"""Every block of a weight in the 4-bit float that suits it best ("AxCore", MICRO'25, section 5).

A block is 64 output rows by one group of input columns. Its format (E3M0, E2M1 or E1M2) is the one whose
approximate products make the smallest error in the layer's output.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lutserve.errors import UserError
from lutserve.kernels.axcore_reference import BLOCK, Dequant
from lutserve.luts.fpma import FP4, Compensation
from lutserve.quantizers.axcore_errors import Precision, expected_errors, gram_errors, replayed_errors
from lutserve.quantizers.fp4 import Fp4Weight, checked, quantize


def axcore(
    weight: Tensor,
    group_size: int = 64,
    dequant: Dequant = "exact",
    x: Tensor | None = None,
    precision: Precision = "float32",
    compensation: Compensation = True,
) -> Fp4Weight:
    """Quantise a weight in the best format of each block.

    Args:
        weight: [N, K], N a multiple of 64; any floating dtype.
        group_size: input columns of a block, a divisor of K.
        dequant: as in `quantize`.
        x: [M, K] activations that the error is measured with. Without them it is the expected error for
            independent activations of mean zero and exact scales, which needs the weight alone.
        precision: of the errors, float16 to reproduce the published choice (needs x).
        compensation: of the products, as in `fpma.products`.

    Raises:
        UserError: as `quantize`; N is no multiple of 64.

    """
    half, group = checked(weight, group_size)
    if len(half) % BLOCK:
        raise UserError(f"{len(half)} output rows are no multiple of {BLOCK}, the rows of a block")
    candidates = [quantize(half, fmt.name, group, dequant) for fmt in FP4]
    if x is None:
        exact = [quantize(half, fmt.name, group) for fmt in FP4] if dequant == "fpma" else candidates
        errors = expected_errors(half, exact, compensation)
    elif dequant == "exact" and precision == "float32":
        errors = gram_errors(half, candidates, x, compensation)
    else:
        errors = replayed_errors(half, candidates, x, dequant, precision, compensation)
    # numpy takes the first of equal errors.
    types = torch.from_numpy(errors.numpy().argmin(-1).astype(np.uint8))
    rows = types.long().repeat_interleave(BLOCK, 0)[None]
    codes = torch.stack([c.codes.view(*c.scales.shape, group) for c in candidates])
    chosen = codes.gather(0, rows[..., None].expand(1, *codes.shape[1:]))
    scales = torch.stack([c.scales for c in candidates]).gather(0, rows)[0]
    return Fp4Weight(chosen.view(half.shape), scales, types, group)
