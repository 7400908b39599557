"""The outlier columns of one input: which they are, and what is learnt about them (MixQ, mix8 and mix4).

Source: "locality", section 4 of "MixQ: Taming Dynamic Outliers in Mixed-Precision Quantization by Online
Prediction" (SC'24); the rule itself is ours, docs/mixq.md says why.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from lutserve.kernels import mixq

#: a value is an outlier where it is above this many times the root mean square of its row's other columns
THRESHOLD = 10.0
#: What a column must gain to be worth a 16-bit product. The gain is the mean over rows of (x / rms)^2 above
#: THRESHOLD^2: the square of a row's int8 step goes with the square of its largest value, so this is how much
#: of it the column is to blame for. Frequent outliers gain, and rare ones that are very large.
GAIN = 0.1
#: rows without outliers that every layer is taken to have seen, so that a chance value gains nothing
PRIOR_ROWS = 4096
#: most times one call may look for outliers hidden behind the ones it has just found
ROUNDS = 4
#: most calls with outliers that are passed over between two that teach; the gaps double up to it
PATIENCE = 64


def capacity(k: int) -> int:
    """Most outlier columns a layer of input width k may have: k / 16, at least 64, at most 128 (and k)."""
    return min(k, max(64, min(128, k // 16)))


def places(k: int, columns: torch.Tensor, least: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Return `index`, of at least `least` places, and `keep` of an OutlierSlots of width k.

    columns: int64 [S], on whose device the results are.
    """
    device = columns.device
    mask = torch.ones(-(-k // 32) * 32, dtype=torch.int64, device=device)
    mask[columns] = 0
    words = (mask.view(-1, 32) << torch.arange(32, device=device)).sum(1)
    # Whole tiles of 16 columns keep the number of GEMM shapes small.
    count = -(-max(len(columns), least) // 16) * 16
    index = torch.full((count,), -1, dtype=torch.int32, device=device)
    index[: len(columns)] = columns.to(torch.int32)
    return index, torch.where(words >= 2**31, words - 2**32, words).to(torch.int32)


class OutlierSlots:
    """The outlier columns of one input, calibrated or learnt while serving.

    Every column has a gain, see GAIN; those that gain enough, at most `capacity`, are kept in 16 bit.
    Gains are learnt from calls that meet an unknown outlier, from fewer and fewer of them: learning costs
    more than the call itself. A column leaves when its gain falls below half of what it entered with.

    Attributes:
        index: int32 [S], S a multiple of 16; unused places hold -1.
        keep: int32 [ceil(K / 32)], bit k is 1 where column k stays in the integer part.
        weight: [S, N] in the model's dtype, the weight rows of the columns of `index`, 0 where -1.
        columns: int64 [count], the columns in ascending order.
        misses: calls that met an outlier in no known column.
    """

    def __init__(
        self,
        k: int,
        weight_rows: Callable[[torch.Tensor], torch.Tensor],
        fixed: bool = False,
        device: torch.device | None = None,
    ) -> None:
        """Start empty; `weight_rows(columns)` must return the weight of columns [S] as [S, N].

        It is asked once for each column that gets a place, and may be replaced. fixed: index, keep and weight
        have room for all columns that there may ever be and stay where they are, for CUDA graphs.
        """
        self.fixed = fixed
        self.capacity = capacity(k)
        self.weight_rows = weight_rows
        self.excess = torch.zeros(k, dtype=torch.float32, device=device)
        self.rows = PRIOR_ROWS
        self.misses = self.waiting = self.patience = 0
        self.index = self.keep = torch.empty(0, dtype=torch.int32, device=device)
        self.weight = torch.empty(0)
        self.hold(torch.empty(0, dtype=torch.int64, device=device))

    @property
    def count(self) -> int:
        """How many columns there are."""
        return len(self.columns)

    def seed(self, gain: torch.Tensor) -> None:
        """Start from calibrated gains, fp32 [K], instead of from rows without outliers."""
        self.excess = gain * PRIOR_ROWS
        self._choose()

    def wants(self) -> bool:
        """Count a call that meets an unknown outlier; return whether to learn from it."""
        self.misses += 1
        self.waiting -= 1
        return self.waiting < 0

    def learn(
        self, x: torch.Tensor, prepared: mixq.Prepared, prepare: Callable[[], mixq.Prepared]
    ) -> mixq.Prepared:
        """Learn from x [M, K], prepared with the known columns; return it with the new ones."""
        before, self.rows = self.excess, self.rows + len(x)
        for _ in range(ROUNDS):
            self.excess = before + self._excess(x, prepared)
            if not self._choose():
                break
            # Again, because a large outlier hides a smaller one behind the row's mean square.
            prepared = prepare()
        self.waiting = self.patience = min(2 * self.patience + 1, PATIENCE)
        return prepared

    def _excess(self, x: torch.Tensor, prepared: mixq.Prepared) -> torch.Tensor:
        """Return the sum over rows of ((x / rms)^2 - THRESHOLD^2), where positive, by column [K]."""
        _, scales, side, ratios, _ = prepared
        rms = 127.0 * scales / ratios[:, None]
        above = ratios > THRESHOLD
        excess = ((x[above].float() / rms[above]).square_() - THRESHOLD**2).clamp_min_(0).sum(0)
        known = ((side.float() / rms).square_() - THRESHOLD**2).clamp_min_(0).nan_to_num_(0, 0, 0).sum(0)
        excess[self.columns] = known[self.index >= 0]
        return excess.nan_to_num_(0, 0, 0)

    def _choose(self) -> bool:
        """Publish the columns that gain enough; return whether they are others than before."""
        known = self.columns
        # Twice the gain for a place already held: what is near the limit must not come and go.
        gain = self.excess.index_add(0, known, self.excess[known])
        enough = int((gain >= GAIN * self.rows).sum())
        columns = gain.topk(min(self.capacity, enough)).indices.sort().values
        if torch.equal(columns, known):
            return False
        self.hold(columns)
        return True

    def hold(self, columns: torch.Tensor) -> None:
        """Let the columns, sorted int64 [S], be the outlier columns from now on."""
        index, keep = places(self.excess.numel(), columns, self.capacity if self.fixed else 0)
        # Rows that are held already are moved; reading one out of the packed weight costs a GEMM.
        same = (index[:, None] == self.index) & (index[:, None] >= 0)
        kept = same.any(1)
        fresh = self.weight_rows(index[~kept & (index >= 0)].long())
        weight = fresh.new_zeros(len(index), fresh.shape[1])
        weight[kept] = self.weight[same.int().argmax(1)[kept]] if kept.any() else fresh[:0]
        weight[~kept & (index >= 0)] = fresh
        self.columns = columns
        if self.fixed and self.index.shape == index.shape:
            self.index.copy_(index)
            self.keep.copy_(keep)
            self.weight.copy_(weight)
        else:
            self.index, self.keep, self.weight = index, keep, weight

    def rest(self, x: torch.Tensor) -> torch.Tensor:
        """Return x [M, K] with 0 in the outlier columns; x is left as it is."""
        if not self.fixed:
            return x.index_fill(1, self.columns, 0) if self.count else x
        words = (self.keep[:, None] >> torch.arange(32, dtype=torch.int32, device=x.device)) & 1
        return torch.where(words.flatten()[: x.shape[1]].bool(), x, 0)
