"""AWQ and SmoothQuant: scales, clip ratios, and where scales are folded."""

from __future__ import annotations

import json
import re

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional
from toy_blocks import ToyModel

from lutserve.errors import UserError
from lutserve.quantizers import awq, folding, rtn
from lutserve.quantizers.smoothquant import smooth_scale
from lutserve.quantizers.statistics import collect


@pytest.fixture(autouse=True)
def one_thread():
    """Many small operations: a second thread costs more than it brings."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def random_tensor(*shape, seed=0):
    return torch.from_numpy(np.random.default_rng(seed).standard_normal(shape).astype(np.float32))


# --- SmoothQuant --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.0, 0.3, 0.5, 1.0])
def test_smoothing_scale_by_hand(alpha):
    x, weights = random_tensor(10).abs(), [random_tensor(4, 10, seed=1), random_tensor(3, 10, seed=2)]
    x[3], weights[0][:, 4], weights[1][:, 4] = 0, 0, 0
    for j, found in enumerate(smooth_scale(x, weights, alpha).tolist()):
        largest = max(abs(w) for weight in weights for w in weight[:, j].tolist())
        expected = 1.0 if j in (3, 4) else max(x[j].item() ** alpha / largest ** (1 - alpha), 1e-5)
        assert found == pytest.approx(expected, rel=1e-6)


def test_full_smoothing_makes_activations_alike():
    x = random_tensor(50).abs() * 100 + 1e-3
    assert (x / smooth_scale(x, [torch.ones(2, 50)], 1.0)).tolist() == pytest.approx([1.0] * 50)


@pytest.mark.parametrize("alpha", [-0.1, 1.5, float("nan")])
def test_smoothing_exponent_out_of_range(alpha):
    with pytest.raises(UserError, match="allowed: 0 to 1"):
        smooth_scale(torch.ones(2), [torch.ones(2, 2)], alpha)


def test_golden_smoothing(shared):
    golden = np.load(shared / "golden/datatypes/smoothquant_scale.npz")
    x, weights = (
        torch.from_numpy(golden["input_absmax"]),
        [torch.from_numpy(golden[f"w{i}"]) for i in range(3)],
    )
    used = torch.cat(weights).abs().amax(0) != 0
    for alpha in (0.25, 0.5, 0.8):
        scale = smooth_scale(x, weights, alpha)
        expected = torch.from_numpy(golden[f"scale_alpha{alpha}"])
        torch.testing.assert_close(scale[used], expected[used], rtol=2e-7, atol=0)
        # The published scale is 0 where all weights are, and dividing by it gives infinity.
        assert (scale[~used] == 1).all() and (expected[~used] == 0).all()


# --- AWQ ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("group", [8, 32, -1])
def test_weight_mean_by_hand(group):
    weights = [random_tensor(3, 20), random_tensor(2, 20, seed=1)]
    weights[0][1, :8] = 0
    size = 20 if group == -1 else group
    rows = [row for weight in weights for row in weight.abs().tolist()]
    for j, found in enumerate(awq.weight_mean(weights, group).tolist()):
        start = j // size * size
        shares = [row[j] / (max(row[start : start + size]) or 1) for row in rows]
        assert found == pytest.approx(sum(shares) / len(shares), rel=1e-6)


def test_channel_scale_by_hand():
    x, w = random_tensor(9).abs() + 0.01, random_tensor(9, seed=1).abs() + 0.01
    raw = [max(a**0.3 / b**0.7, 1e-4) for a, b in zip(x.tolist(), w.tolist(), strict=True)]
    centre = (max(raw) * min(raw)) ** 0.5
    assert awq.channel_scale(x, w, 0.3).tolist() == pytest.approx([s / centre for s in raw], rel=1e-5)
    w[4] = 0  # nothing reads the channel: whatever its scale, it must not spoil the others'
    assert awq.channel_scale(x, w, 0.3).isfinite().all()


def test_the_first_best_exponent_wins():
    calls = []

    def loss(rounded):
        calls.append(rounded)
        return [3.0, 1.0, 2.0, 1.0][len(calls) - 1] if len(calls) <= 4 else 5.0

    weight = random_tensor(4, 32)
    found = awq.search_scale([weight], weight.abs().mean(0), loss, "nf4", 16)
    assert (found.exponent, found.loss, len(calls)) == (0.05, 1.0, 20)
    assert torch.equal(calls[1][0], rtn(weight * found.scale, "nf4", 16).dequantize() / found.scale)


def test_the_first_best_clip_ratio_wins():
    losses = iter([2.0, 2.0, 1.0, 1.0, *[3.0] * 6])
    assert awq.search_clip(random_tensor(4, 32), lambda rounded: next(losses), "nf4", 16) == 0.98


def test_output_error_is_that_of_the_outputs():
    x, difference = random_tensor(50, 12), random_tensor(5, 12, seed=1)
    direct = (x.double() @ difference.double().T).square().sum()
    assert awq.output_error(x.T @ x, difference) == pytest.approx(float(direct), rel=1e-5)
    with pytest.raises(UserError, match="does not fit a hessian"):
        awq.output_error(torch.eye(3), difference)


CASES = ["int4_sym_g16", "int4_asym_g16", "sf4_5_sym_g16", "nf4_sym_g-1"]


@pytest.mark.parametrize("case", CASES)
def test_golden_model(shared, case):
    """Exponents, clip ratios, scaled and final weights of a small model, block by block."""
    folder = shared / "golden/datatypes"
    golden = np.load(folder / "awq_toy_model.npz")
    facts = json.loads((folder / "awq_toy_model.json").read_text())
    exponents = [float(line.rsplit(" ", 1)[1]) for line in facts[case]["best_alpha"]]
    name, scheme, size = re.fullmatch(r"(.*)_(sym|asym)_g(-?\d+)", case).groups()
    form = {"fmt": name, "group_size": int(size), "scheme": scheme}
    model = ToyModel({k[5:]: torch.from_numpy(golden[k]) for k in golden if k.startswith("init|")})
    hidden = list(model.embed(torch.from_numpy(golden["ids"])))
    for block in (0, 1):
        weights = {n: model.parameters[f"layers.{block}.{n}.weight"] for n in ("q", "k", "fc1", "fc2")}
        bias = {n: model.parameters.get(f"layers.{block}.{n}.bias") for n in weights}
        ran = [model.run(x, block) for x in hidden]
        scales = {}
        for names in (("q", "k"), ("fc1",), ("fc2",)):

            def block_loss(rounded, names=names, ran=ran, block=block, hidden=hidden):
                changed = {f"{n}.weight": w for n, w in zip(names, rounded, strict=True)}
                outs = [model.run(x, block, changed)[0] for x in hidden]
                pairs = zip(outs, (out for out, _ in ran), strict=True)
                return sum(float((new - old).square().mean()) for new, old in pairs)

            def layer_loss(rounded, name=names[0], ran=ran, weights=weights, bias=bias):
                total = 0.0
                for _, seen in ran:
                    new, old = (
                        functional.linear(seen[name], w, bias[name]) for w in (*rounded, weights[name])
                    )
                    total += float((new - old).square().mean())
                return total

            mean = torch.cat([seen[names[0]] for _, seen in ran]).abs().mean(0)
            loss = block_loss if len(names) > 1 else layer_loss
            found = awq.search_scale([weights[n] for n in names], mean, loss, **form)
            assert found.exponent == exponents.pop(0)
            scales |= dict.fromkeys(names, found.scale)
        scaled = {n: w * scales[n] for n, w in weights.items()}
        scaled["fc1"] = scaled["fc1"] / scales["fc2"][:, None]
        for n, weight in scaled.items():
            key = f"layers.{block}.{n}"
            expected = torch.from_numpy(golden[f"{case}|scaled_fp|{key}"])
            torch.testing.assert_close(weight, expected, rtol=1e-5, atol=1e-6)
            # The published clip search looks at the inputs as they were before folding.
            x = torch.cat([seen[n] for _, seen in ran])

            def clip_loss(rounded, weight=weight, hessian=x.T @ x):
                return awq.output_error(hessian, rounded - weight)

            ratio = awq.search_clip(weight, clip_loss, **form)
            assert ratio == pytest.approx(facts[case]["clip"][key])
            # What it then rounded codebooks to was int4; `final_intended` is the codebook.
            final = torch.from_numpy(golden[f"{case}|final_intended|{key}"])
            rounded = rtn(weight, **form, quantile=ratio).dequantize()
            torch.testing.assert_close(rounded, final, rtol=1e-4, atol=1e-5)
        hidden = [out for out, _ in ran]
    assert not exponents


# --- folding ------------------------------------------------------------------------------------------------


class RmsNorm(nn.Module):
    def __init__(self, size, offset):
        super().__init__()
        self.weight, self.offset = nn.Parameter(random_tensor(size, seed=9) * 0.2 + 1 - offset), offset

    def forward(self, x):
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * (self.weight + self.offset)


class Block(nn.Module):
    """A decoder block with every kind of place to fold into: two query heads of 8 share each value head."""

    def __init__(self, norm, activation, gated=True, values=16):
        super().__init__()
        torch.manual_seed(0)
        self.ln1, self.ln2 = norm(), norm()
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 16), nn.Linear(32, values)
        self.o = nn.Linear(32, 32)
        self.gate = nn.Linear(32, 48) if gated else None
        self.up, self.down = nn.Linear(32, 48), nn.Linear(48, 32)
        self.activation = activation
        self.requires_grad_(False)

    def forward(self, x):
        h = self.ln1(x)
        q = self.q(h).unflatten(-1, (4, 8)).transpose(1, 2)
        k = self.k(h).unflatten(-1, (2, 8)).transpose(1, 2).repeat_interleave(2, 1)
        v = self.v(h).unflatten(-1, (-1, 8)).transpose(1, 2)
        v = v.repeat_interleave(4 // v.shape[1], 1)
        attention = functional.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.o(attention.transpose(1, 2).flatten(2))
        h = self.ln2(x)
        y = self.up(h) if self.gate is None else self.activation(self.gate(h)) * self.up(h)
        return x + self.down(y if self.gate is not None else self.activation(y))


NORMS = {
    "rms": lambda: RmsNorm(32, 0.0),
    "one plus weight": lambda: RmsNorm(32, 1.0),
    "layer norm": lambda: nn.LayerNorm(32),
}


def folds_of(block, samples):
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    inputs = collect(block, linears, list(samples), {})
    found = {tuple(e.layers): folding.find(block, linears, e, samples[0], {}, 8) for e in inputs}
    return linears, inputs, {k: f and (f.module, f.kind) for k, f in found.items()}, list(found.values())


@pytest.mark.parametrize(
    ("norm", "kind"), [("rms", "scale"), ("one plus weight", "offset"), ("layer norm", "scale")]
)
@pytest.mark.parametrize("values", [16, 32])
def test_where_scales_go_in_a_gated_block(norm, kind, values):
    block = Block(NORMS[norm], functional.silu, values=values)
    before = {name: p.clone() for name, p in block.named_parameters()}
    _, _, found, _ = folds_of(block, random_tensor(3, 1, 20, 32))
    assert found == {
        ("q", "k", "v"): ("ln1", kind),
        ("o",): ("v", "rows"),
        ("gate", "up"): ("ln2", kind),
        ("down",): ("up", "rows"),
    }
    assert all(torch.equal(before[name], p) for name, p in block.named_parameters())


@pytest.mark.parametrize(
    ("activation", "place"), [(functional.relu, ("up", "rows")), (functional.gelu, None)]
)
def test_only_relu_lets_a_scale_through(activation, place):
    block = Block(NORMS["layer norm"], activation, gated=False)
    _, _, found, _ = folds_of(block, random_tensor(2, 1, 20, 32))
    assert found[("down",)] == place


@pytest.mark.parametrize("norm", NORMS)
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16])
def test_folding_changes_nothing_but_the_weights(norm, stored):
    """Scales of a factor of a hundred, 16-bit norm weights, and the block still computes the same."""
    block = Block(NORMS[norm], functional.silu).to(stored).float()
    samples = random_tensor(3, 1, 20, 32)
    before = torch.cat([block(x) for x in samples])
    linears, inputs, _, folds = folds_of(block, samples)
    weights = {name: linear.weight.clone() for name, linear in linears.items()}
    dtypes = {name: stored for name, _ in block.named_parameters()}
    hessians = [entry.hessian.clone() for entry in inputs]
    for number, (entry, fold) in enumerate(zip(inputs, folds, strict=True)):
        scale = fold.tie(torch.exp(2.3 * random_tensor(len(entry.absmax), seed=number).clamp(-1, 1)))
        real = fold.apply(block, scale, dtypes)
        torch.testing.assert_close(real, scale, rtol=0.02, atol=0)
        for name in entry.layers:
            linears[name].weight.mul_(real)
        entry.rescale(real)
        torch.testing.assert_close(
            entry.hessian * real * real[:, None], hessians[number], rtol=1e-3, atol=1e-3
        )
    after = torch.cat([block(x) for x in samples])
    assert (after - before).norm() < 1e-5 * before.norm()
    assert not torch.allclose(linears["q"].weight, weights["q"], rtol=0.1)
    for name in ("ln1", "ln2"):
        weight = block.get_submodule(name).weight
        assert torch.equal(weight, weight.to(stored).float())


def test_shared_heads_share_a_scale():
    fold = folding.Fold("v", "rows", torch.tensor([0, 1, 0, 1, 2, 3, 2, 3]))
    scale = torch.tensor([1.0, 2, 4, 8, 3, 5, 3, 5])
    assert fold.tie(scale).tolist() == pytest.approx([2, 4, 2, 4, 3, 5, 3, 5])
    plain = folding.Fold("v", "rows", torch.arange(8))
    assert torch.equal(plain.tie(scale), scale)


def test_norm_weights_of_zero_stay():
    block = Block(NORMS["rms"], functional.silu)
    block.ln1.weight[3] = 0
    fold = folding.Fold("ln1", "scale", torch.arange(32))
    real = fold.apply(block, torch.full((32,), 2.0), {"ln1.weight": torch.float32})
    assert real[3] == 1 and block.ln1.weight[3] == 0 and (real[4:] == 2).all()


# --- statistics ---------------------------------------------------------------------------------------------


def test_statistics_are_those_of_the_inputs():
    block = Block(NORMS["rms"], functional.silu)
    samples = list(random_tensor(4, 1, 20, 32))
    linears = {n: m for n, m in block.named_modules() if isinstance(m, nn.Linear)}
    hidden, calls = list(samples), []
    inputs = collect(block, linears, hidden, {}, advance=True, progress=lambda: calls.append(1))
    assert [entry.layers for entry in inputs] == [["q", "k", "v"], ["o"], ["gate", "up"], ["down"]]
    assert len(calls) == 4
    x = torch.cat([block.ln1(sample) for sample in samples]).view(-1, 32)
    assert inputs[0].tokens == 80
    torch.testing.assert_close(inputs[0].hessian, x.T @ x)
    torch.testing.assert_close(inputs[0].absmax, x.abs().amax(0))
    torch.testing.assert_close(inputs[0].absmean, x.abs().mean(0))
    for sample, out in zip(samples, hidden, strict=True):
        assert torch.equal(out, block(sample))
