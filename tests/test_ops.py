"""Tests of the equations: number formats, attention, norms and the MoE layer."""

import math
from dataclasses import replace

import pytest
import torch
from common import moe_case, relative

import gptoss
import weights

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_unpack_mxfp4_all_bytes_and_scales():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)  # 16 groups of 32
    for scale in range(256):
        found = gptoss.dequantise_mxfp4(
            packed, torch.full((16, 1), scale, dtype=torch.uint8)
        ).flatten()
        for byte in range(256):
            for nibble, value in zip(
                (byte & 15, byte >> 4), found[2 * byte : 2 * byte + 2].tolist(), strict=True
            ):
                sign = -1.0 if nibble & 8 else 1.0
                exact = sign * math.ldexp(E2M1_VALUES[nibble & 7], scale - 127)
                if scale == 255:
                    assert math.isnan(value)  # the E8M0 code for NaN
                elif abs(exact) > torch.finfo(torch.float32).max:
                    assert value == math.copysign(math.inf, sign)
                else:
                    assert value == exact and math.copysign(1, value) == sign
                    assert not value or torch.tensor(value).bfloat16() == value  # exact in bf16 too


def nearest(values: list[float], x: float) -> set[float]:
    """The values of a grid nearest to x: two where x lies half way."""
    distance = min(abs(v - x) for v in values)
    return {v for v in values if abs(v - x) == distance}


E4M3_VALUES = [
    v for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist() if v == v
]


@pytest.mark.parametrize(
    "activations, grid, emax",
    [
        ("mxfp4", sorted({s * v for v in E2M1_VALUES for s in (1, -1)}), 2),
        ("mxfp8", sorted(set(E4M3_VALUES)), 8),
    ],
)
def test_quantise_mx_rounds_to_nearest_even_and_saturates(activations, grid, emax):
    x = (
        torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-6, 6, 200)[:, None]
    )
    x[0], x[1, 1:], x[2] = 0.0, 0.0, torch.linspace(-7.99, 7.99, 32)
    x[3] = torch.tensor([2.0**emax, *[2.0**emax * k / 64 for k in range(31)]])  # many ties
    found = gptoss.quantise_mx(x, activations)
    # every other code is the even one of a tie
    even = {v for n, v in enumerate(sorted(v for v in grid if v >= 0)) if n % 2 == 0}
    for group, rounded in zip(x.tolist(), found.tolist(), strict=True):
        largest = max(map(abs, group))
        scale = 2.0 ** (math.frexp(largest)[1] - 1 - emax) if largest else 1.0
        for value, result in zip(group, rounded, strict=True):
            allowed = nearest(grid, value / scale)
            assert result / scale in allowed
            if len(allowed) == 2:
                assert abs(result / scale) in even


def test_quantise_fp8_clamps():
    x = torch.tensor([1e9, -1e9, 448.0, 465.0, 0.1, -0.0])
    assert gptoss.quantise_fp8(x, 1.0).tolist()[:4] == [448.0, -448.0, 448.0, 448.0]
    # 232.5 is nearest to 240 in steps of 16
    assert gptoss.quantise_fp8(x, 2.0).tolist()[3] == 2 * 240.0


@pytest.mark.parametrize("activations", ["mxfp8", "mxfp4"])
def test_a_group_with_nan_is_nan(activations):
    """Its scale is, and no other's."""
    x = torch.ones(2, 96)
    x[0, 40] = math.nan
    found = gptoss.quantise_mx(x, activations)
    assert found[0, 32:64].isnan().all() and int(found.isnan().sum()) == 32


@pytest.mark.parametrize("activations", gptoss.ACTIVATIONS)
def test_moe_reference_is_the_equations(activations):
    """Token by token and expert by expert, in float64. float32 sums differ by 1e-6, and may carry
    an intermediate over a rounding step of its format (2^-4 of an element for e4m3, 2^-2 for e2m1),
    in an element of 10^5 or fewer."""
    x, router_weight, router_bias, experts = moe_case()

    def seen(v, scale):
        v = v.float()
        return {"bf16": lambda: v, "fp8": lambda: gptoss.quantise_fp8(v, scale)}.get(
            activations, lambda: gptoss.quantise_mx(v, activations)
        )().double()

    full = gptoss.prepare(experts, "bf16")
    expected = torch.zeros_like(x, dtype=torch.double)
    for t, token in enumerate(x):
        logits = router_weight.double() @ token.double() + router_bias.double()
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[:3]
        shares = logits[chosen].softmax(0)
        for e, share in zip(chosen, shares, strict=True):
            h = full.gate_up_weight[e].double() @ seen(token, 0.02) + full.gate_up_bias[e].double()
            gate, up = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
            a = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            expected[t] += share * (
                full.down_weight[e].double() @ seen(a, 0.5) + full.down_bias[e].double()
            )
    for given in (experts, full):
        found = gptoss.moe_reference(x, router_weight, router_bias, given, 3, activations)
        assert relative(found.double(), expected) < (1e-5 if activations == "bf16" else 1e-3)
    if activations != "bf16":  # and the rounding is there
        plain = gptoss.moe_reference(x, router_weight, router_bias, experts, 3)
        assert relative(plain.double(), expected) > 1e-3


def test_router_ties_go_to_the_smaller_expert():
    """Of small integers every sum is exact in any order, so that equal experts tie in any GEMM."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-4, 5, (9, 96), generator=generator).float()
    row = torch.randint(-4, 5, (1, 96), generator=generator).float()
    bias = torch.tensor([0.0, 3.0, 0.0, 3.0, 3.0])
    for top_k, expected in ((1, [1]), (2, [1, 3]), (4, [1, 3, 4, 0])):
        routing = gptoss.gating(x, row.expand(5, -1), bias, top_k)
        assert routing.chosen.tolist() == [expected] * 9
        assert (routing.gates - bias[expected].double().softmax(0)).abs().max() < 1e-6
        assert list(routing.counts.items()) == [(e, 9) for e in sorted(expected)]


def test_moe_reference_is_the_chain_of_its_stages():
    x, router_weight, router_bias, experts = moe_case()
    routing = gptoss.gating(x, router_weight, router_bias, 3)
    h = gptoss.dispatch_swiglu(x, routing, experts, "mxfp8", 7.0)
    assert h.shape == (27, 160) and torch.equal(gptoss.quantise_mx(h, "mxfp8"), h)
    y = gptoss.combine(h, routing, experts)
    found = gptoss.moe_reference(x, router_weight, router_bias, experts, 3, "mxfp8")
    assert torch.equal(found, y)


@pytest.mark.parametrize("activations, scale, message", [
    ("int8", 1.0, "activations='int8', expected one of"),
    ("fp8", None, "need the static input scales of a Quark checkpoint"),
])  # fmt: skip
def test_what_cannot_be_multiplied_is_named(activations, scale, message):
    x, *router, experts = moe_case()
    experts = replace(experts, gate_up_input_scale=scale)
    for call in (
        lambda: gptoss.EQUATIONS.prepare(experts, activations),
        lambda: gptoss.moe_reference(x, *router, experts, 3, activations),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_nothing_but_the_pool_is_written():
    """Every input of every operation keeps its bits, and the pool changes where the step says."""
    config = weights.published("20b")
    config = replace(config, head_dim=8, num_attention_heads=4, num_key_value_heads=2)
    generator = torch.Generator().manual_seed(0)
    tables = {
        kind: torch.tensor([[2, 5], [3, 0]], dtype=torch.int32) for kind in weights.LAYER_TYPES
    }
    # A sequence of 5 cached tokens and 3 new ones, and one of 2 new ones and padding.
    step = gptoss.Step(torch.tensor([[5, 6, 7], [0, 1, -1]], dtype=torch.int32), tables, 4)
    pool = torch.randn(6 * 4, 2, 2, 8, generator=generator)
    qkv, sinks = torch.randn(6, 64, generator=generator), torch.randn(4, generator=generator)
    given = [qkv, sinks, step.positions, *step.tables.values()]
    before, old = [t.clone() for t in given], pool.clone()
    plan = gptoss.EQUATIONS.plan(step, config)
    out = gptoss.EQUATIONS.attention(qkv, sinks, pool, "full_attention", plan)
    assert out.shape == (6, 32) and out.isfinite().all()
    assert all(torch.equal(a, b) for a, b in zip(given, before, strict=True))
    written = (pool != old).flatten(1).any(1).nonzero()[:, 0].tolist()
    assert written == [3 * 4 + 0, 3 * 4 + 1, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3]
