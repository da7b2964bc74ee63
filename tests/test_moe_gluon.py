"""moe_gluon.py under gfx950.emulate(): compiled by this environment's Triton, executed from the
assembly.

The oracle is gptoss.moe_reference with the same activations. Nothing here ran on a gfx950."""

import ast
import contextlib
import math
import pathlib
import re
import sys
import types
from dataclasses import replace
from unittest import mock

import counts
import pytest
import torch
import triton
from bench_moe import packed_experts
from common import make
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import gfx950
import gptoss
import moe_gluon
import weights
from moe_gluon import DECODE_TOKENS, FORMATS, PackedExperts, PackedWeight, moe, prepare
from weights import load_tokenizer

# The kernels and the oracle round at the same places, to the same values; what is left is the order
# of float32 sums, 2^-24 sqrt(K) relative, and where it tips a bf16 or an activation format's
# rounding, which few of many values see.
SAME_ROUNDINGS = 1e-3
# Above decode the kernels round every weighted row to bf16 before the sum over slots.
# `rounded_rows` is the oracle that does so too, and they are held to SAME_ROUNDINGS of it. Its
# distance from the plain oracle is no property of the kernels: a rounding to 8 bits is off by 2^-7
# / sqrt(12) * 0.68 = 1.5e-3 of the value in the mean square (0.68: where mantissas are spread over
# 1 to 2), the errors of rows are independent, and each oracle rounds a sum of its own: 1.5e-3
# sqrt(C + 2), where C is the sum of the rows' squares over the square of their sum: 1 for
# orthogonal rows, 2.6e-3, and more where they cancel. The contract, against the plain oracle,
# leaves room up to C = 5.
CONTRACT = 4e-3
# triton 3.9.0, which the kernels run under as well, compiles the prefill kernels with spills
PINNED = triton.__version__.startswith("3.7.")
pinned_compiler = pytest.mark.skipif(not PINNED, reason="registers of triton 3.7.1")
ORACLE = ("bf16", "fp8", "mxfp8", "mxfp4")  # formats the oracle knows; e5m2 has its own below


QUICK = [("eager", "skew"), ("random", "lockstep")]  # to be compared with ("lazy", "lockstep")
REST = [
    ("lazy", "skew"),
    ("lazy", "random"),
    ("eager", "lockstep"),
    ("eager", "random"),
    ("random", "skew"),
    ("random", "random"),
]


def make_experts(E, H, inner, bf16=False, seed=0, shard=weights.WHOLE):
    """One layer's experts, or a rank's shard of them, with static scales for fp8."""
    config = replace(
        weights.published("120b"),
        num_hidden_layers=1,
        layer_types=("full_attention",),
        vocab_size=1,
        num_local_experts=E,
        hidden_size=H,
        intermediate_size=inner,
    )
    checkpoint = weights.random(config, "hf-bf16" if bf16 else "openai", seed=seed, shard=shard)
    return replace(checkpoint.experts[0], gate_up_input_scale=0.02, down_input_scale=0.01)


def make_inputs(T, E, H, seed=0):
    g = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(T, H, generator=g) * torch.randn(T, 1, generator=g).exp()
    return (
        x.bfloat16(),
        (torch.randn(E, H, generator=g) * H**-0.5).bfloat16(),
        torch.randn(E, generator=g).bfloat16(),
    )


def reference(x, router_weight, router_bias, experts, top_k, activations):
    return gptoss.moe_reference(x, router_weight, router_bias, experts, top_k, activations).float()


def rounded_rows(x, router_weight, router_bias, experts, top_k, activations):
    """The oracle, one expert at a time, with each weighted row rounded to bf16 before the sum over
    slots."""
    logits = x.float() @ router_weight.float().T + router_bias.float()
    logits, chosen = logits.sort(dim=-1, descending=True, stable=True)
    gates, chosen = logits[:, :top_k].softmax(-1), chosen[:, :top_k]
    rows = torch.zeros(*chosen.shape, x.shape[1])  # [T, top_k, H]
    # float32 x make the oracle's rows float32; h, which would be in x's dtype too, is rounded here
    see = mock.patch.object(gptoss, "as_seen", lambda x, *_: x.bfloat16().float())
    for e in chosen.unique().tolist():
        token, slot = (chosen == e).nonzero(as_tuple=True)
        only_e = (torch.arange(len(router_bias)) == e).float()
        with see if activations == "bf16" else contextlib.nullcontext():
            rows[token, slot] = reference(
                x[token].float(), torch.zeros_like(router_weight), only_e, experts, 1, activations
            )
    return (rows * gates[..., None]).bfloat16().float().sum(1).bfloat16().float()


def relative_error(got, want):
    return ((got.float() - want).norm() / want.norm()).item()


def check(got, *layer):
    """got against the oracles of a layer: (x, router_weight, router_bias, experts, top_k,
    activations)."""
    want = reference(*layer)
    # a single weighted row rounds once, as its sum does
    if len(got) > DECODE_TOKENS and layer[4] > 1:
        assert (error := relative_error(got, want)) <= CONTRACT, f"relative L2 error {error:.2e}"
        want = rounded_rows(*layer)
    assert (error := relative_error(got, want)) <= SAME_ROUNDINGS, (
        f"relative L2 error {error:.2e}, same roundings"
    )


def run_layer(inputs, experts, top_k, activations, **emulate):
    """A layer, emulated and checked -> output, launches."""
    packed = prepare(experts, activations)
    with gfx950.emulate(**emulate) as gpu:
        got = moe(*inputs, packed, top_k, activations)
    check(got, *inputs, experts, top_k, activations)
    return got, gpu.launches


def run(T, E, H, inner, top_k, activations, seed=0, **emulate):
    experts = make_experts(E, H, inner, activations == "bf16", seed)
    return run_layer(make_inputs(T, E, H, seed), experts, top_k, activations, **emulate)


# -- packing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ["bf16", "mxfp8"])
@pytest.mark.parametrize("H, inner", [(192, 160), (64, 32), (2880, 96)])
def test_unpack_inverts_pack(activations, H, inner):
    experts = make_experts(3, H, inner, activations == "bf16")
    packed = prepare(experts, activations)
    for got, weight, scale in (
        (packed.gate_up, experts.gate_up_weight, experts.gate_up_scale),
        (packed.down, experts.down_weight, experts.down_scale),
    ):
        unpacked, unpacked_scale = got.unpack()
        assert torch.equal(unpacked, weight)
        assert scale is None or torch.equal(unpacked_scale, scale)


def test_packed_bytes_are_where_the_comment_draws_them():
    experts = make_experts(2, 192, 160)
    packed = prepare(experts, "mxfp8").gate_up
    data, scale = packed.data.view(2, -1), packed.scale.view(2, -1)
    for e, n, k in torch.cartesian_prod(
        torch.arange(2), torch.arange(320), torch.arange(0, 192, 2)
    ).tolist()[::37]:
        block, t, g, i = n // 64, n // 16 % 4, n // 4 % 4, n % 4
        column = 64 * block + 16 * g + 4 * t + i  # at position n
        at = n // 16 * 16 * 192 // 2 + k // 32 * 256 + n % 16 * 16 + k % 32 // 2
        assert data[e, at] == experts.gate_up_weight[e, column, k // 2]
        at = block * 64 * 6 + k // 32 * 64 + n % 16 * 4 + t
        assert scale[e, at] == experts.gate_up_scale[e, column, k // 32]
    assert packed.bias.dtype == torch.float32


def test_the_worked_example_of_an_address():
    """Position 37 is column 25; k = 256 is byte 128 of its row, scale group 8."""
    experts = make_experts(1, 2880, 32)
    packed, g = (
        prepare(experts, "mxfp8").gate_up,
        moe_gluon.prefill_tile(2880, 64, FORMATS["mxfp8"]),
    )
    assert (g.w_strip, g.w_chunk, g.lane, g.scale_block) == (23040, 256, 16, 5760)
    assert packed.data.flatten()[48208] == experts.gate_up_weight[0, 25, 128]
    assert packed.scale.flatten()[534] == experts.gate_up_scale[0, 25, 8]


def test_prepare_refuses_what_does_not_fit():
    fp4, bf16 = make_experts(2, 64, 32), make_experts(2, 64, 32, bf16=True)
    with pytest.raises(ValueError, match="bf16.*need.*bfloat16.*use fp8 or"):
        prepare(fp4, "bf16")
    with pytest.raises(ValueError, match="use bf16"):
        prepare(bf16, "mxfp8")
    with pytest.raises(ValueError, match="expected one of bf16, fp8"):
        prepare(fp4, "int8")
    fp4.down_input_scale = None
    with pytest.raises(ValueError, match="static input scales"):
        prepare(fp4, "fp8")
    odd = make_experts(2, 64, 48, bf16=True)
    with pytest.raises(ValueError, match="multiples of 32"):
        prepare(odd, "bf16")


def test_moe_refuses_what_the_kernels_do_not_take():
    packed = prepare(make_experts(4, 64, 32), "mxfp8")
    x, router_weight, router_bias = make_inputs(3, 4, 64)
    with pytest.raises(ValueError, match="prepared for 'mxfp8'"):
        moe(x, router_weight, router_bias, packed, 2, "mxfp4")
    with pytest.raises(ValueError, match="float32"):
        moe(x.float(), router_weight, router_bias, packed, 2)
    with pytest.raises(ValueError, match="top_k=5"):
        moe(x, router_weight, router_bias, packed, 5)
    with pytest.raises(ValueError, match=r"\[3, 32\]"):
        moe(x[:, :32], router_weight, router_bias, packed, 2)
    assert moe(x[:0], router_weight, router_bias, packed, 2).shape == (0, 64)
    with pytest.raises(ValueError, match="inner size 16384"):
        moe_gluon.combine_tile(16384, 64, FORMATS["mxfp8"], top_k=4)


# -- routing
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "T, E, top_k",
    [
        (1, 8, 4),
        (16, 8, 8),
        (5, 32, 4),
        (16, 128, 4),
        (13, 128, 8),
        (3, 128, 1),
        (7, 8, 3),
        (2, 5, 2),
        (17, 8, 4),
        (40, 128, 8),
        (33, 5, 3),
        (130, 32, 1),
    ],
)
def test_routing(T, E, top_k):
    """Selection, gates, places and tiles, with ties in every row: experts come in pairs of equal
    router rows."""
    H = 96
    # Small integers, of which every sum is exact in any order: equal rows tie in any GEMM.
    x, router_weight, router_bias = (t.mul(4).round().clamp(-8, 8) for t in make_inputs(T, E, H))
    router_weight[1::2] = router_weight[::2][: E // 2]
    router_bias[1::2] = router_bias[::2][: E // 2]
    packed = prepare(make_experts(E, H, 32), "mxfp8")
    with gfx950.emulate():
        routing = moe_gluon.gating_gemm(x, router_weight, router_bias, packed, top_k)
    logits = x.float() @ router_weight.float().T + router_bias.float()
    want, chosen = logits.sort(dim=-1, descending=True, stable=True)
    slots = routing.chosen.shape[1]
    assert torch.equal(routing.chosen[:, :top_k].long(), chosen[:, :top_k])
    torch.testing.assert_close(routing.gates[:, :top_k], want[:, :top_k].softmax(-1))
    expert_of_row, rows = chosen[:, :top_k].flatten().sort(stable=True)
    rows = rows // top_k * slots + rows % top_k
    assert torch.equal(routing.pairs[: len(rows)].long(), rows)
    tiles, place = [], 0
    for e, count in zip(*expert_of_row.unique(return_counts=True), strict=True):
        tiles += [
            (int(e), place + i, min(routing.BM, int(count) - i))
            for i in range(0, int(count), routing.BM)
        ]
        place += int(count)
    assert routing.tiles[: int(routing.num_tiles), :3].tolist() == [list(t) for t in tiles]
    assert int(packed.arrived) == 0


def spoiled(name, at, value):
    """The arguments of a layer with one value replaced in the tensor `name`."""

    def spoil(x, router_weight, router_bias, experts):
        given = {"x": x, "router_weight": router_weight, "router_bias": router_bias}
        tensor = (given[name] if name in given else getattr(experts, name)).clone()
        tensor[at] = value
        if name in given:
            return *(given | {name: tensor}).values(), experts
        return x, router_weight, router_bias, replace(experts, **{name: tensor})

    return spoil


NAN = [
    ("x", (2, 7), math.nan),
    ("router_weight", (3, 5), math.nan),
    ("router_bias", 3, math.nan),
    ("gate_up_bias", (1, 4), math.nan),
    ("gate_up_bias", (1, 5), math.nan),
    ("down_bias", (1, 4), math.nan),
    *(("gate_up_scale", (1, row, 2), byte) for row in (6, 7) for byte in (254, 255)),
    *(("down_scale", (1, 7, 1), byte) for byte in (254, 255)),
]


@pytest.mark.parametrize("T", [5, 20])
@pytest.mark.parametrize("activations", ORACLE)
def test_nan_surfaces_where_the_oracle_has_it(activations, T):
    """In the same rows and columns, and nowhere else. The scale byte 255 is NaN; 254 makes
    infinities whose sums are."""
    H, inner = 96, 64
    inputs, experts = make_inputs(T, 8, H), make_experts(8, H, inner, activations == "bf16")
    for name, at, value in NAN:
        if activations == "bf16" and "scale" in name:
            continue
        layer = spoiled(name, at, value)(*inputs, experts)
        want = gptoss.moe_reference(*layer, 4, activations)
        with gfx950.emulate():
            got = moe(*layer[:3], prepare(layer[3], activations), 4)
        assert want.isnan().any() and torch.equal(got.isnan(), want.isnan()), (name, at, value)


def extremes(H):
    """Rows that hit every branch of the formats: zeros, denormals, infinite scale ratios, ties, the
    largest bf16."""
    x = torch.randn(16, H, generator=torch.Generator().manual_seed(7))
    x[1] = 0
    x[2] *= 1e-39
    x[3] *= 1e37
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    x[4] = torch.cat([ties, -ties]).repeat(H // 16)
    x[5] = torch.arange(H) % 32 + 0.5
    x[6, ::32] = 3e38
    x[7] = -(2.0 ** (torch.arange(H) % 32 - 20))
    x[8] = 240 + torch.arange(H) % 32 * 8
    return x.bfloat16()


@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "mxfp4"])
def test_quantised_activations_are_the_oracles_bits(activations):
    H = 96
    experts = make_experts(4, H, 32)
    x, (_, router_weight, router_bias) = extremes(H), make_inputs(16, 4, H)
    with gfx950.emulate():
        routing = moe_gluon.gating_gemm(
            x, router_weight, router_bias, prepare(experts, activations), 2
        )
    if activations == "mxfp4":
        got = gptoss.dequantise_mxfp4(routing.x, routing.x_scale[:, : H // 32])
    else:
        scale = (
            experts.gate_up_input_scale
            if activations == "fp8"
            else gptoss.E8M0[routing.x_scale[:, : H // 32].long()].repeat_interleave(32, 1)
        )
        got = routing.x.view(torch.float8_e4m3fn).float() * scale
    assert torch.equal(got, gptoss.as_seen(x, activations, experts.gate_up_input_scale))


def e5m2_of(x, activations, static):
    """What gptoss.as_seen would be for the e5m2 formats: (bytes, scale bytes)."""
    if activations == "fp8_e5m2":
        return (x / static).clamp(-57344, 57344).to(torch.float8_e5m2)
    groups = x.unflatten(-1, (-1, 32))
    exponent = ((groups.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) - 127 - 15).clamp(
        -127, 127
    )
    return torch.ldexp(groups, -exponent).clamp(-57344, 57344).to(torch.float8_e5m2).flatten(-2)


@pytest.mark.parametrize("activations", ["fp8_e5m2", "mxfp8_e5m2"])
def test_e5m2(activations, monkeypatch):
    """The same layer with e5m2 where e4m3 is: activations bit for bit, and the whole against the
    oracle."""
    H, experts = 96, make_experts(4, 96, 32)
    x, (_, router_weight, router_bias) = extremes(H), make_inputs(16, 4, H)
    packed = prepare(experts, activations)
    with gfx950.emulate():
        routing = moe_gluon.gating_gemm(x, router_weight, router_bias, packed, 2)
    want = e5m2_of(x.float(), activations, experts.gate_up_input_scale)
    assert torch.equal(routing.x.view(torch.float8_e5m2).float(), want.float())

    def as_seen(x, name, static):
        q = e5m2_of(x.float(), activations, static).float()
        if activations == "fp8_e5m2":
            return q * static
        bits = x.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).view(torch.int32)
        return torch.ldexp(
            q.unflatten(-1, (-1, 32)), ((bits >> 23) - 142).clamp(-127, 127)
        ).flatten(-2)

    monkeypatch.setattr(gptoss, "as_seen", as_seen)
    inputs = make_inputs(5, 4, H)
    with gfx950.emulate():
        want = moe(*inputs, packed, 2)
    check(want, *inputs, experts, 2, "mxfp8")
    for timing, schedule in QUICK:
        with gfx950.emulate(timing=timing, schedule=schedule):
            assert torch.equal(moe(*inputs, packed, 2), want), f"{timing}, {schedule}"


# -- the layer
# --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("activations", ORACLE)
@pytest.mark.parametrize(
    "T, E, H, inner, top_k",
    [
        (1, 8, 192, 160, 4),  # neither is a multiple of 64, of 128, of a step of all waves
        (3, 8, 160, 192, 4),
        (16, 8, 192, 160, 4),
        (2, 4, 32, 32, 2),  # fewer K than one wave takes
        (5, 128, 96, 64, 8),
        (4, 32, 1056, 544, 1),
        (16, 5, 64, 96, 3),
        (17, 8, 192, 160, 4),
        (70, 8, 160, 192, 4),  # above the decode regime
    ],
)
def test_tails(T, E, H, inner, top_k, activations):
    run(T, E, H, inner, top_k, activations)


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "T, activations",
    [
        (1, "bf16"),
        (1, "mxfp8"),
        (2, "mxfp4"),
        (16, "fp8"),
        slow(1, "fp8"),
        slow(1, "mxfp4"),
        slow(2, "mxfp8"),
        slow(3, "mxfp8"),
        slow(8, "mxfp8"),
        slow(16, "bf16"),
        slow(16, "mxfp8"),
        slow(16, "mxfp4"),
    ],
)
def test_full_size(T, activations):
    """H = I = 2880, 22.5 steps of K."""
    run(T, 8, 2880, 2880, 4, activations)


@pytest.mark.parametrize(
    "T, activations",
    [(17, "mxfp8"), slow(64, "bf16"), slow(129, "fp8"), slow(129, "mxfp4"), slow(512, "mxfp8")],
)
def test_prefill_at_full_size(T, activations):
    """H = I = 2880, every row through each of 4 experts."""
    run(T, 4, 2880, 2880, 4, activations)


@pytest.mark.parametrize(
    "T, H, inner, activations",
    [
        *(slow(64, 288, 2880, a) for a in ORACLE),
        (64, 2880, 288, "fp8"),
        slow(512, 2880, 288, "fp8"),
        slow(512, 2880, 288, "mxfp4"),
        slow(512, 288, 2880, "mxfp8"),
        slow(512, 288, 2880, "bf16"),
    ],
)
def test_prefill_at_full_depth(T, H, inner, activations):
    """K = 2880 in one GEMM and fewer columns: the same steps of fewer tiles of the same kind."""
    run(T, 4, H, inner, 4, activations)


def ragged(E, H):
    """Two experts each for 300 tokens: all go to expert 1, and one to expert 0, 64, 65 and 170 to
    experts 3, 4 and 5, none to expert 2. The first columns of x are the logits. -> inputs of a
    layer of top_k = 2, rows of each expert."""
    rows = [1, 300, 0, 64, 65, 170]
    shuffled = torch.randperm(300, generator=torch.Generator().manual_seed(0))
    second = torch.tensor([0] * 1 + [3] * 64 + [4] * 65 + [5] * 170)[shuffled]
    x = make_inputs(300, E, H)[0]
    x[:, :E] = 2 * torch.eye(E)[1] + torch.eye(E)[second]
    return (x, torch.eye(E, H).bfloat16(), torch.zeros(E)), rows


def requested(rows, N, K, activations):
    """Bytes a prefill GEMM asks for: each tile of rows its expert's weights, each panel of columns
    the rows."""
    f = FORMATS[activations]
    bf16 = f.weights == torch.bfloat16
    tiles = sum(-(-r // moe_gluon.PREFILL_ROWS.value) for r in rows)
    blocks, columns = -(-N // moe_gluon.PREFILL_COLUMNS.value), -(-N // 64) * 64
    return {
        "w": tiles * columns * (K * 2 if bf16 else K // 2),
        "w_scale": 0 if bf16 else tiles * columns * K // 32,
        "x": sum(rows) * blocks * (K * 2 if bf16 else K // 2 if f.element == "e2m1" else K),
        "x_scale": sum(rows) * blocks * -(-K // 128) * 4 if f.scale == "mx" else 0,
    }


@pytest.mark.parametrize(
    "H, inner, activations",
    [
        # fewer steps than in flight; the right half of a tile partly filled
        *((160, 96, a) for a in ORACLE),
        # a last block of columns with no right half (32), or a part of it (192)
        *((288, 224, a) for a in ORACLE),
        # round the loop once (mxfp4), twice, or 7 times (bf16), in both GEMMs; 6.5 blocks of
        # columns
        (800, 832, "mxfp8"),
        slow(800, 832, "fp8"),
        slow(800, 832, "mxfp4"),
        slow(800, 832, "bf16"),
        (2880, 96, "mxfp4"),
        slow(2880, 96, "fp8"),
        slow(2880, 96, "mxfp8"),
        slow(2880, 96, "bf16"),
    ],
)
def test_ragged_splits(H, inner, activations):
    """Experts of no row, of one, of 64 and 65 (a bottom half of one), of several tiles; and the
    bytes they ask for."""
    inputs, rows = ragged(6, H)
    _, launches = run_layer(
        inputs, make_experts(6, H, inner, activations == "bf16"), 2, activations
    )
    for launch, N, K, x in ((launches[3], 2 * inner, H, "x"), (launches[4], H, inner, "h")):
        read = {name: t["read"] for name, t in launch.counters.tensors.items()}
        want = requested(rows, N, K, activations)
        got = {
            "w": read["w"],
            "w_scale": read.get("w_scale", 0),
            "x": read[x],
            "x_scale": read.get(x + "_scale", 0),
        }
        assert got == want, launch.name


@pytest.mark.parametrize(
    "T, rank, ranks, activations",
    [
        (1, 1, 2, "mxfp8"),  # 1440 of 2880
        (2, 1, 4, "mxfp4"),  # 736
        (17, 0, 4, "mxfp8"),  # 704
        slow(1, 0, 8, "bf16"),  # 352
        slow(64, 3, 8, "fp8"),  # 384
    ],
)
def test_a_ranks_shard(T, rank, ranks, activations):
    """Of the real models' layer, of which rank 0 alone has the second bias."""
    shard = weights.Shard(rank, ranks)
    experts = make_experts(4, 2880, 2880, activations == "bf16", shard=shard)
    assert bool(experts.down_bias.any()) == (rank == 0)
    run_layer(make_inputs(T, 4, 2880), experts, 4, activations)


def test_a_shard_that_lies_in_a_file(tmp_path):
    """Its tensors are views: two groups of each row's five."""
    path = make(tmp_path, num_attention_heads=8, num_key_value_heads=4)
    experts = weights.load(path, weights.Shard(3, 4)).experts[0]
    assert not experts.down_weight.is_contiguous() and not experts.down_scale.is_contiguous()
    run_layer(make_inputs(3, 5, 96), experts, 3, "mxfp8")


@pytest.mark.parametrize("T", [16, 40])
def test_all_rows_on_one_expert(T):
    experts, (x, router_weight, router_bias) = make_experts(32, 192, 160), make_inputs(T, 32, 192)
    router_bias[13] = 100
    packed = prepare(experts, "mxfp8")
    with gfx950.emulate():
        got = moe(x, router_weight, router_bias, packed, 1)
    check(got, x, router_weight, router_bias, experts, 1, "mxfp8")


@pytest.mark.parametrize(
    "activations, T, modes",
    [
        ("mxfp8", 6, QUICK),
        ("mxfp4", 16, QUICK),
        ("bf16", 6, QUICK),
        ("fp8", 5, QUICK),
        slow("bf16", 6, REST),
        slow("fp8", 5, REST),
        slow("mxfp8", 6, REST),
        slow("mxfp4", 16, REST),
    ],
)
def test_same_bits_under_every_timing_and_schedule(activations, T, modes):
    want, _ = run(T, 8, 192, 160, 4, activations)
    for timing, schedule in modes:
        got, _ = run(T, 8, 192, 160, 4, activations, timing=timing, schedule=schedule, seed=0)
        assert torch.equal(got, want), f"{timing}, {schedule}"


@pytest.mark.parametrize("modes", [QUICK, slow(REST)], ids=["quick", "rest"])
@pytest.mark.parametrize("activations", ORACLE)
def test_same_bits_of_prefill_under_every_timing_and_schedule(activations, modes):
    """An expert of 128 rows and one of 10; both GEMMs go round their loops (see
    test_ragged_splits)."""
    experts = make_experts(2, 800, 832, activations == "bf16")
    x = make_inputs(138, 2, 800)[0]
    x[:, :2] = torch.eye(2)[(torch.arange(138) % 14 == 13).long() + (torch.arange(138) == 0)]
    inputs = x, torch.eye(2, 800).bfloat16(), torch.zeros(2)
    want, _ = run_layer(inputs, experts, 1, activations)
    for timing, schedule in modes:
        with gfx950.emulate(timing=timing, schedule=schedule):
            got = moe(*inputs, prepare(experts, activations), 1)
        assert torch.equal(got, want), f"{timing}, {schedule}"


@pytest.mark.parametrize("timing, schedule", [("eager", "skew"), slow("random", "lockstep")])
def test_same_bits_at_full_size(timing, schedule):
    want, _ = run(2, 8, 2880, 2880, 4, "mxfp8")
    got, _ = run(2, 8, 2880, 2880, 4, "mxfp8", timing=timing, schedule=schedule)
    assert torch.equal(got, want)


@pytest.mark.parametrize("activations", ["mxfp8", "bf16"])
# decode; above, with both heights of tile
@pytest.mark.parametrize("sizes", [(1, 2, 7, 16), (17, 40, 300)])
def test_a_token_does_not_see_its_batch(sizes, activations):
    experts = make_experts(8, 192, 160, activations == "bf16")
    packed, (x, router_weight, router_bias) = (
        prepare(experts, activations),
        make_inputs(max(sizes), 8, 192),
    )
    with gfx950.emulate():
        results = [moe(x[-T:], router_weight, router_bias, packed, 4) for T in sizes]
    for T, y in zip(sizes, results, strict=True):
        assert torch.equal(y[-sizes[0] :], results[0]), f"{T} tokens against {sizes[0]}"


class NoHostReads(TorchDispatchMode):
    """Raises for every operator that needs a tensor's values on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(
            s in str(func)
            for s in ("_local_scalar_dense", "nonzero", "equal", "_to_copy", "unique", "item")
        ):
            raise AssertionError(f"{func} reads device data")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("T", [4, 40])
def test_nothing_is_read_back_to_the_host(T):
    packed, inputs = prepare(make_experts(8, 192, 160), "mxfp8"), make_inputs(T, 8, 192)
    with gfx950.compile_only(), NoHostReads():
        moe(*inputs, packed, 4)
        with pytest.raises(AssertionError, match="reads device data"):
            inputs[0].sum().item()


def test_it_imports_nothing_of_ours():
    """Who ports the kernels takes this one file."""
    imported = set()
    for node in ast.walk(ast.parse(pathlib.Path(moe_gluon.__file__).read_text())):
        if isinstance(node, ast.Import):
            imported |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            imported.add(node.module.partition(".")[0])
    assert {"torch", "triton"} == imported - sys.stdlib_module_names


# -- public mistakes
# ------------------------------------------------------------------------------------------------


def guarded(tensor):
    """The same values at the start of a larger storage whose rest is NaN (or 0xFF): a read past the
    end is seen."""
    beyond = float("nan") if tensor.dtype.is_floating_point else 255
    storage = torch.full((tensor.numel() + 4096,), beyond, dtype=tensor.dtype)
    storage[: tensor.numel()] = tensor.flatten()
    return storage[: tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("T", [3, 40])
def test_nothing_past_the_logical_sizes_is_used(T):
    """Bias read out of bounds where N is no multiple of the tile: here the last expert's bias is
    followed by NaN."""
    experts, inputs = make_experts(4, 160, 96), make_inputs(T, 4, 160)
    packed = prepare(experts, "mxfp8")
    for w in (packed.gate_up, packed.down):
        w.data, w.scale, w.bias = guarded(w.data), guarded(w.scale), guarded(w.bias)
    with gfx950.emulate():
        got = moe(*inputs, packed, 4)
    check(got, *inputs, experts, 4, "mxfp8")


@pytest.mark.parametrize("T, stored", [(3, ("h", "out")), (40, ("h", "weighted", "out"))])
def test_every_result_is_stored_once(T, stored):
    """A tile past N = 160 or I = 96 writing into the next row would store there twice, and a tile
    cut short would leave bytes out."""
    _, launches = run(T, 4, 160, 96, 4, "mxfp8")
    written = {
        name: t
        for launch in launches
        for name, t in launch.counters.tensors.items()
        if t["write"] and name in stored
    }
    assert set(written) == set(stored)
    for name, t in written.items():
        assert t["write"] == t["write_unique"] == t["size"], name


@pytest.mark.parametrize("T", [2, 20])
def test_combine_sums_over_the_slots(T):
    """Experts whose weights are zero give their bias e: a token's output is the gates' weighted sum
    of its ids."""
    experts, inputs = make_experts(8, 64, 32), make_inputs(T, 8, 64)
    experts.down_weight.zero_()
    experts.down_bias = torch.arange(8.0)[:, None].expand(8, 64).bfloat16().contiguous()
    with gfx950.emulate():
        got = moe(*inputs, prepare(experts, "mxfp8"), 4)
    x, router_weight, router_bias = (t.float() for t in inputs)
    gate, chosen = (x @ router_weight.T + router_bias).topk(4)
    want = (gate.softmax(-1) * chosen).sum(1)
    # bf16 output; above decode each of the rows, none negative, is rounded as well
    rounding = 2**-8 if T <= DECODE_TOKENS else 2**-7 + 2**-16
    torch.testing.assert_close(got.float(), want[:, None].expand(T, 64), rtol=rounding, atol=0)


@pytest.mark.parametrize(
    "target, supported",
    [
        (("hip", "gfx950", 64), True),
        (("hip", "gfx942", 64), False),
        (("hip", "gfx90a", 64), False),
        (("hip", "gfx1250", 32), False),
        (("cuda", 90, 32), False),
    ],
)
def test_only_gfx950_is_supported(target, supported, monkeypatch):
    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget(*target))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    assert moe_gluon.is_supported() is supported


def test_no_driver_is_not_supported(monkeypatch):
    def fail():
        raise RuntimeError("0 active drivers ([]). There should only be one.")

    monkeypatch.setattr(
        triton.runtime.driver, "_active", types.SimpleNamespace(get_current_target=fail)
    )
    assert not moe_gluon.is_supported()


@pytest.mark.parametrize("activations", ["fp8", "mxfp8"])
def test_fp8_casts_saturate(activations):
    """Values far beyond 448 times the static scale are the largest e4m3, not NaN."""
    experts, (x, router_weight, router_bias) = make_experts(8, 64, 32), make_inputs(4, 8, 64)
    experts.gate_up_input_scale = experts.down_input_scale = 1e-4
    with gfx950.emulate():
        got = moe(x, router_weight, router_bias, prepare(experts, activations), 4)
    assert got.isfinite().all()
    check(got, x, router_weight, router_bias, experts, 4, activations)


# -- profiles and waits
# -----------------------------------------------------------------------------------------------


def placeholder(E, activations, H=2880, inner=2880) -> PackedExperts:
    """Packed experts of 120b or 20b sizes, untouched memory."""
    f = FORMATS[activations]

    def weight(N, K):
        if f.weights == torch.bfloat16:
            data, scale = torch.empty(E, N // 16, K // 32, 4, 16, 8, dtype=f.weights), None
        else:
            data = torch.empty(E, N // 16, K // 32, 16, 16, dtype=f.weights)
            scale = torch.empty(E, -(-N // 64), K // 32, 16, 4, dtype=f.weights)
        return PackedWeight(data, scale, torch.empty(E, N), 1.0, N, K)

    return PackedExperts(
        weight(2 * inner, H), weight(H, inner), activations, torch.zeros(1, dtype=torch.int32)
    )


@pytest.mark.parametrize("E", [32, 128])
@pytest.mark.parametrize("activations", FORMATS)
def test_profiles(activations, E):
    """No spills, no scratch, for every batch size of the contract at 20b and 120b sizes; two waves
    of every kernel fit a SIMD by registers, and two workgroups a CU by its 160 KB of LDS."""
    packed, router_weight = placeholder(E, activations), torch.empty(E, 2880, dtype=torch.bfloat16)
    for T in (1, 2, 4, 8, 16, 32, 64, 512, 1024, 4096, 8192):
        x = torch.empty(T, 2880, dtype=torch.bfloat16)
        with gfx950.compile_only() as gpu:
            moe(x, router_weight, router_weight[:, 0].contiguous(), packed, 4)
        assert len(gpu.launches) == (3 if T <= DECODE_TOKENS else 6)
        for launch in gpu.launches:
            p = launch.profile
            if not PINNED and launch.name.startswith("prefill_"):
                continue
            assert p["sgpr_spills"] == p["vgpr_spills"] == p["scratch"] == 0, (
                f"{launch.name} at {T}: {p}"
            )
            assert p["lds"] <= 80 * 1024 and p["occupancy"] >= 2, f"{launch.name}: {p}"


def instructions(text):
    lines = (re.split("[;/]", line)[0].strip() for line in text.split("\n"))
    return [line for line in lines if re.match(r"[a-z]|\.LBB", line)]


def loops(text):
    """The loops of a kernel's assembly that multiply: of each the instructions from its label to
    the last jump back."""
    lines = instructions(text)
    labels, bodies = {line[:-1]: i for i, line in enumerate(lines) if line.startswith(".LBB")}, {}
    for i, line in enumerate(lines):
        if (m := re.match(r"s_c?branch\S*\s+(\.LBB\w+)", line)) and labels[m[1]] < i:
            bodies[m[1]] = lines[labels[m[1]] : i + 1]
    return [body for body in bodies.values() if any(line.startswith("v_mfma") for line in body)]


def vmcnts(lines):
    return [int(m[1]) for line in lines if (m := re.match(r"s_waitcnt.*vmcnt\((\d+)\)", line))]


def after_last_drain(text):
    """(matrix instructions after the last wait for all loads that has one before it, matrix
    instructions)."""
    lines = instructions(text)
    products = [i for i, line in enumerate(lines) if line.startswith("v_mfma")]
    drains = [
        i
        for i, line in enumerate(lines)
        if products[0] < i < products[-1] and vmcnts([line]) == [0]
    ]
    return sum(i > max(drains, default=len(lines)) for i in products), len(products)


def compiled(name, T, activations, monkeypatch):
    """One kernel of a layer of 120b size, as `kernel[grid](...)` returned it."""
    kernel, results = getattr(moe_gluon, name), []
    original = kernel.run
    monkeypatch.setattr(
        kernel, "run", lambda *args, **kwargs: results.append(original(*args, **kwargs))
    )
    packed, router_weight = (
        placeholder(128, activations),
        torch.empty(128, 2880, dtype=torch.bfloat16),
    )
    with gfx950.compile_only():
        moe(
            torch.empty(T, 2880, dtype=torch.bfloat16),
            router_weight,
            router_weight[:, 0].contiguous(),
            packed,
            4,
        )
    return results[0]


@pytest.mark.parametrize("activations", ["bf16", "fp8", "mxfp8", "mxfp4"])
def test_the_queue_of_loads_never_drains(activations, monkeypatch):
    """combine: inside its loop, at least two thirds of the loads of its experts stay in flight over
    every wait. dispatch has no loop: the queue is empty only for the last step, all loads having
    been issued before."""
    combine = compiled("combine_kernel", 1, activations, monkeypatch)
    loop_waits = [n for body in loops(combine.asm["amdgcn"]) for n in vmcnts(body)]
    assert loop_waits and min(loop_waits) >= 24, loop_waits
    moe_gluon.assert_no_spills(combine)
    dispatch = compiled("dispatch_kernel", 1, activations, monkeypatch)
    after_drain, products = after_last_drain(dispatch.asm["amdgcn"])
    assert not loops(dispatch.asm["amdgcn"])
    assert 0 < after_drain <= 8 and products >= 24  # 4 tiles of a step, or 2 x 4 of bf16
    # of mx activations one scale byte a step; those of weights are a dword for four tiles
    assert len(re.findall("buffer_load_ubyte", dispatch.asm["amdgcn"])) == (
        6 if activations[:2] == "mx" else 0
    )
    assert moe_gluon.assert_no_spills(dispatch).occupancy >= 2


RING = {"bf16": 3, "fp8": 2, "mxfp8": 2, "mxfp4": 3}  # steps of K in LDS, in prefill


def waves_copies(activations):
    """Copies that each of 4 waves issues for a step's groups, in order: w left, x top, x bottom, w
    right. A copy takes 1,024 bytes, or 256 of scales. A row of x is 128 bytes of 8-bit values, 64
    of others; a column of w 64."""
    x, w = 64 * (128 if FORMATS[activations].element == "e4m3" else 64) // 4096, 128 * 64 // 4096
    return [w + (activations != "bf16"), x + (activations[:2] == "mx"), x, w]


@pinned_compiler
@pytest.mark.parametrize("kernel", ["prefill_dispatch_kernel", "prefill_combine_kernel"])
@pytest.mark.parametrize("activations", ORACLE)
def test_the_prefill_loop(activations, kernel, monkeypatch):
    """A region: a wait, a barrier, then copies, LDS reads and, behind a branch, 8 matrix
    instructions. The wait leaves in flight what was issued after the group it needs, 4 * RING - 3
    groups: never nothing."""
    compiled_kernel = compiled(kernel, 1024, activations, monkeypatch)
    moe_gluon.assert_no_spills(compiled_kernel)
    (body,) = loops(compiled_kernel.asm["amdgcn"])
    ring, groups = RING[activations], waves_copies(activations)
    # region r reads x bottom, w right, then the next step's w left, x top: the group r + 2; later
    # ones start at r + 3
    want = [sum(groups[(r + 3 + i) % 4] for i in range(4 * ring - 3)) for r in range(4)] * ring
    assert vmcnts(body) == want and min(want) > 0

    barriers = [i for i, line in enumerate(body) if line.startswith("s_barrier")]
    assert len(barriers) == 4 * ring
    for first, last in zip(barriers, [*barriers[1:], len(body)], strict=True):
        # what a wave reads from LDS is in registers before the barrier: its copies may refill what
        # was read before
        assert re.match(r"s_waitcnt.*lgkmcnt\(0\)", body[first - 1]), body[first - 1]
        region = body[first:last]
        products = [i for i, line in enumerate(region) if line.startswith("v_mfma")]
        memory = [i for i, line in enumerate(region) if line.startswith(("ds_read", "buffer_load"))]
        assert len(products) == 8 and products[0] > max(memory)
    copies = [line for line in body if re.match(r"buffer_load.* lds$", line)]
    assert len(copies) == ring * sum(groups)
    assert not [
        line for line in body if line.startswith(("scratch", "ds_write", "global", "buffer_store"))
    ]
    assert len([line for line in body if line.startswith("buffer_load")]) == len(copies)


# -- counters
# --------------------------------------------------------------------------------------------------


# What one layer counts, against what the kernels must do. tools/counts.py prints the figures.


@pytest.fixture(scope="module")
def fp8_layer():
    return packed_experts("fp8")


@pytest.mark.parametrize("T, others", [(1, 0.15), (4, 0.14), slow(8, 0.14), slow(16, 0.17)])
def test_decode_counters(T, others, fp8_layer):
    """Every weight byte once, little else, and enough of it in flight on every CU: 31 KB draw a
    CU's share of 8 TB/s at 1 us."""
    row = counts.decode(T, "fp8", fp8_layer)
    assert row["launches"] == 3 and row["weights"] <= 1.0005 and row["others"] <= others + 0.005
    for name in ("dispatch_kernel", "combine_kernel"):
        workgroups, kb = row["flight"][name]
        assert workgroups >= 256 and kb >= 60


@pinned_compiler
@pytest.mark.parametrize("activations", ["fp8", "mxfp8", slow("mxfp4"), slow("bf16")])
def test_prefill_counters(activations):
    """The matrix pipe is the largest resource of the loop; a tile's vector work outside it is a
    small part."""
    cycles = 16 if activations in ("bf16", "mxfp4") else 32  # of a matrix instruction
    # Least ratios of matrix cycles to LDS reads and to issue, and the most vector work outside the
    # loop; fp4 multiplies twice as fast with the same instructions around it.
    reads, issue, outside = {
        "fp8": (3.8, 3.3, 0.24),
        "mxfp8": (3.6, 2.4, 0.26),
        "mxfp4": (2.3, 1.3, 0.47),
        "bf16": (2.6, 2.1, 0.09),
    }[activations]
    for launch in counts.full_tiles(activations):
        n = counts.figures(launch)
        assert n.loop["matrix"] == 4 * RING[activations] * 8 * cycles
        assert n.loop["conflicts"] == 0
        assert n.loop["matrix"] >= reads * n.loop["lds reads"]
        assert n.loop["matrix"] >= issue * n.loop["issue"]
        assert n.outside["at 4"] <= outside * n.total["matrix"]
        assert n.two >= 0.995


def test_prefill_bytes_counters():
    """test_ragged_splits finds exact what is requested here."""
    for T, tiles in ((1024, 128), (4096, 188)):
        for row in counts.prefill_bytes(T):
            assert row["requested"] == tiles / 128 and row["from_memory"] <= 1.15


# -- a model
# --------------------------------------------------------------------------------------------------


def test_logits_of_tiny_through_the_kernels(monkeypatch):
    """Logits of tiny/ through the kernels against the torch path with the same dtype and
    activations. The kernels may differ from it, at each layer, by the contract's 4e-3; what that
    does to the logits, the torch path itself tells, when noise of that size is added to its layers:
    the most of 3 draws, as it depends on whose experts it tips."""
    path = pathlib.Path(__file__).parents[1] / "tiny"
    text = (path / "README.md").read_text()
    tokens = load_tokenizer(path).encode(text)[:300]
    assert len(tokens) == 300
    with gfx950.emulate() as gpu:
        got = gptoss.GPTOSS.from_pretrained(path, ops="gluon").logits(tokens)
    assert sum(launch.name == "prefill_combine_kernel" for launch in gpu.launches) == 4
    torch_path = gptoss.GPTOSS.from_pretrained(
        path, dtype=torch.bfloat16, ops="torch", activations="mxfp8"
    )
    want, exact, g = (
        torch_path.logits(tokens),
        gptoss.moe_reference,
        torch.Generator().manual_seed(0),
    )

    def noisy(*args, **kwargs):
        y = exact(*args, **kwargs).float()
        noise = torch.randn(y.shape, generator=g)
        return (y + CONTRACT * y.norm() / noise.norm() * noise).bfloat16()

    torch_path.ops = torch_path.ops._replace(moe=noisy)
    allowed = [relative_error(torch_path.logits(tokens), want) for _ in range(3)]
    assert relative_error(got, want) <= max(allowed)
