"""ops_triton.py under gfx950.emulate(): compiled by this environment's Triton for a gfx950 and
executed from the assembly, against the equations of gptoss.py. Nothing here ran on a GPU."""

import json
import math
import re
from dataclasses import replace

import bench_ops
import compile_ops
import pytest
import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from common import TINY, hf_config, prompt_of, relative

import gfx950
import gptoss
import ops_triton
import weights
from gptoss import EQUATIONS

BF16, FLOAT = torch.bfloat16, torch.float32
MODES = [("lazy", "lockstep"), ("eager", "skew"), ("random", "random")]
modes = pytest.mark.parametrize("timing, schedule", MODES)

# Two float32 sums of K terms in different orders are 2^-24 sqrt(K) apart: 3e-6 for K = 2880, twice
# that through two GEMMs. exp and the square root are a few 2^-24 off.
SAME_SUMS = 1e-5
# In bfloat16 kernels and equations round at the same places; the order of a float32 sum tips a
# rounding now and then, one of 2^-8 in a few values of a hundred.
SAME_ROUNDINGS = 1e-3
# Attention's own two: the softmax's shares before they meet the values, and the result. Each is off
# by 2^-7 / sqrt(12) * 0.68 = 1.5e-3 in the mean square (0.68: mantissas are spread over 1 to 2).
TWO_ROUNDINGS = 1.5e-3 * math.sqrt(2) * 1.4


def normal(*shape, seed=0, dtype=FLOAT):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


# -- norm -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
@pytest.mark.parametrize("T, H, has_y", [(1, 2880, True), (5, 96, True), (3, 33, False)])
@modes
def test_add_norm(T, H, has_y, dtype, timing, schedule):
    x, y = normal(T, H, dtype=dtype), normal(T, H, seed=1, dtype=dtype) if has_y else None
    scale = normal(H, seed=2)
    with gfx950.emulate(timing=timing, schedule=schedule) as gpu:
        total, norm = ops_triton.add_norm(x, y, scale, 1e-5)
    want_total, want_norm = EQUATIONS.add_norm(x, y, scale, 1e-5)
    assert torch.equal(total, want_total) and total.dtype == norm.dtype == dtype
    limit = SAME_SUMS if dtype == FLOAT else SAME_ROUNDINGS
    assert relative(norm.float(), want_norm.float()) < limit
    assert len(gpu.launches) == 1


def test_add_norm_keeps_nan_in_its_row():
    x = normal(3, 96, dtype=BF16)
    x[1, 5] = math.nan
    with gfx950.emulate():
        norm = ops_triton.add_norm(x, None, torch.ones(96), 1e-5)[1]
    assert norm.isnan().all(1).tolist() == [False, True, False]


@pytest.mark.parametrize("rank, ranks, T, H", [(0, 2, 1, 2880), (1, 2, 3, 34), (2, 4, 5, 96)])
@modes
def test_sum_norm(rank, ranks, T, H, timing, schedule):
    """One rank's kernel; what the others write was there before it started. Whole numbers: every
    order of a sum is exact. The emulator has no address for a tensor, and takes the tensor."""
    rows, scale = T + 1, normal(H, seed=2)
    generator = torch.Generator().manual_seed(0)
    x, parts = (
        torch.randint(-9, 10, s, generator=generator).to(BF16) for s in ((T, H), (ranks, T, H))
    )
    inboxes = [torch.zeros(2, ranks, rows, H // 2, dtype=torch.int64) for _ in range(ranks)]
    peers = ops_triton.Peers(
        rank, tuple(inboxes), inboxes[rank], torch.zeros(rows, dtype=torch.int32)
    )
    words = parts.view(torch.int32).long() & 0xFFFFFFFF  # [ranks, T, H/2]
    others = [peer for peer in range(ranks) if peer != rank]
    for call in (1, 2, 3):
        stamped = words + (call << 32)
        inboxes[rank][call % 2, others, :T] = stamped[others]
        with gfx950.emulate(timing=timing, schedule=schedule):
            total, norm = ops_triton.sum_norm(x, parts[rank], scale, 1e-5, peers)
        assert torch.equal(total, (x.float() + parts.float().sum(0)).to(BF16))
        want = EQUATIONS.add_norm(total, None, scale, 1e-5)[1]
        assert relative(norm.float(), want.float()) < SAME_ROUNDINGS
        assert peers.calls.tolist() == [call] * T + [0]
        for peer in others:
            assert torch.equal(inboxes[peer][call % 2, rank, :T], stamped[rank])
    for peer in others:
        inboxes[peer][:, rank, :T] = 0
        assert not inboxes[peer].any()  # and nowhere else


# -- dense layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [BF16, FLOAT])
@pytest.mark.parametrize("N, K, bias", [(7, 96, True), (40, 300, False), (1, 1, True)])
@modes
def test_linear(dtype, N, K, bias, timing, schedule):
    x, weight = normal(1, K, dtype=dtype), normal(N, K, seed=1, dtype=dtype)
    bias = normal(N, seed=2, dtype=dtype) if bias else None
    with gfx950.emulate(timing=timing, schedule=schedule) as gpu:
        got = ops_triton.linear(x, weight, bias)
    want = F.linear(x.float(), weight.float(), None if bias is None else bias.float())
    assert got.dtype == dtype and len(gpu.launches) == 1
    assert relative(got.float(), want) < (SAME_SUMS if dtype == FLOAT else 2.0**-8)  # one rounding


def test_linear_of_more_tokens_is_pytorchs():
    x, weight = normal(3, 64), normal(5, 64, seed=1)
    with gfx950.emulate() as gpu:
        assert torch.equal(ops_triton.linear(x, weight), F.linear(x, weight))
    assert not gpu.launches


# -- attention ------------------------------------------------------------------------------------


class Case:
    """Sequences with `cached` tokens in the pool, each of which adds `new` tokens; rows are filled
    up with -1 to the longest."""

    def __init__(self, cached, new, page, dtype, N=6, G=2, D=20, window=7, seed=0):
        self.config = weights.Config.from_dict(
            hf_config(
                num_attention_heads=N, num_key_value_heads=G, head_dim=D, sliding_window=window
            )
        )
        lengths = [c + n for c, n in zip(cached, new, strict=True)]
        pages = sum(sum(gptoss.pages_needed(self.config, n, page).values()) for n in lengths)
        cache = gptoss.KVCache(self.config, pages, page, "cpu", dtype)
        tables = [cache.allocate(n, {}) for n in lengths]
        positions = [list(range(c, n)) for c, n in zip(cached, lengths, strict=True)]
        self.step = cache.step(positions, tables)
        self.pool = normal(*cache.pool[0].shape, seed=seed, dtype=dtype)
        T = self.step.positions.numel()
        self.qkv = normal(T, (N + 2 * G) * D, seed=seed + 1, dtype=dtype)
        self.sinks = normal(N, seed=seed + 2, dtype=dtype)
        self.shape = N, G, D

    def want(self, kind):
        """The equations in float32, but with queries and keys rotated and rounded as they are
        stored -> output, pool."""
        (N, G, D), (S, Q) = self.shape, self.step.positions.shape
        plan, pool = EQUATIONS.plan(self.step, self.config), self.pool.float()
        qk, v = self.qkv.view(S, Q, N + 2 * G, D).split([N + G, G], dim=2)
        qkv = torch.cat([gptoss.rotate(qk, plan.cos, plan.sin), v], dim=2).float().flatten(2)
        still = plan._replace(cos=torch.ones_like(plan.cos), sin=torch.zeros_like(plan.sin))
        out = EQUATIONS.attention(qkv.flatten(0, 1), self.sinks.float(), pool, kind, still)
        return out, pool

    def check(self, kind, **emulate):
        pool = self.pool.clone()
        with gfx950.emulate(**emulate) as gpu:
            plan = ops_triton.plan(self.step, self.config)
            got = ops_triton.attention(self.qkv, self.sinks, pool, kind, plan)
        assert not plan.arrived.any()
        self.compare(kind, got, pool)
        return got, len(gpu.launches)

    def compare(self, kind, got, pool):
        want, want_pool = self.want(kind)
        real = self.step.positions.flatten() >= 0
        limit = SAME_SUMS if got.dtype == FLOAT else TWO_ROUNDINGS
        assert got.isfinite().all() and got.dtype == self.qkv.dtype
        assert relative(got[real].float(), want[real]) < limit
        # Every slot but those of the new tokens is as it was; a multiplication fused with an
        # addition may tip the rounding of a rotated key.
        written = (want_pool != self.pool.float()).flatten(1).any(1)
        assert torch.equal(pool[~written], self.pool[~written])
        assert torch.equal(pool[:, 1], want_pool[:, 1].to(pool.dtype))
        keys, want_keys = pool[:, 0].float(), want_pool[:, 0]
        ulp = 2.0**-23 if got.dtype == FLOAT else 2.0**-7
        assert ((keys - want_keys).abs() <= ulp * want_keys.abs() + 1e-6).all()
        assert relative(keys, want_keys) < SAME_ROUNDINGS / 2


KINDS = pytest.mark.parametrize("kind", weights.LAYER_TYPES)
DECODE = {  # cached tokens of each sequence, -1: padding of a captured batch; page
    "uneven": ([5, 290, 0], 16),
    "page 1": ([131], 1),
    "page 64": ([1, 63, 64, 200], 64),
    "page 5": ([6, 7, 8], 5),
}


@pytest.mark.parametrize("name", DECODE)
@KINDS
@modes
def test_decode(name, kind, timing, schedule):
    cached, page = DECODE[name]
    case = Case(cached, [1] * len(cached), page, BF16)
    assert case.check(kind, timing=timing, schedule=schedule)[1] == 1


@KINDS
def test_decode_float32(kind):
    Case([5, 290, 0], [1, 1, 1], 16, FLOAT).check(kind)


@pytest.mark.parametrize(
    "N, G, D, kind",
    [
        (8, 1, 64, "full_attention"),
        (8, 1, 64, "sliding_attention"),
        (3, 3, 34, "sliding_attention"),
        (17, 1, 16, "full_attention"),
    ],
)
def test_shapes_of_heads(N, G, D, kind):
    Case([150, 3], [1, 1], 16, BF16, N, G, D, window=130).check(kind)
    Case([150, 3], [4, 2], 16, BF16, N, G, D, window=130).check(kind)


@KINDS
def test_padding_of_a_decode_batch_writes_nothing(kind):
    """And gets what the first sequence gets, whether its keys are in one part or in several."""
    for cached in (20, 290):
        case = Case([cached, 9, 9, 9], [1, 1, 1, 1], 16, BF16)
        case.step.positions[2:] = -1
        case.step.tables[kind][2:] = 0
        out, _ = case.check(kind)
        assert torch.equal(out[2:], out[:1].expand(2, -1)) and not torch.equal(out[1], out[0])


@KINDS
def test_a_sequence_does_not_depend_on_its_batch(kind):
    """Nor on the width of its table, from which the number of programs follows."""
    alone, _ = Case([300], [1], 16, BF16).check(kind)
    case = Case([300, 900], [1, 1], 16, BF16)
    case.qkv[0] = Case([300], [1], 16, BF16).qkv[0]
    slots = case.step.tables[kind][0].long()[:, None] * 16 + torch.arange(16)
    first = Case([300], [1], 16, BF16)
    own = first.step.tables[kind][0].long()[:, None] * 16 + torch.arange(16)
    case.pool[slots[: len(own)].flatten()] = first.pool[own.flatten()]
    together, _ = case.check(kind)
    assert torch.equal(together[0], alone[0])


PREFILL = {  # cached and new tokens of each sequence; page
    "first chunk": ([0, 0], [20, 3], 16),
    "overwrites its ring": ([30, 6], [20, 9], 1),  # a window of 7 is a ring of 7 slots
    "second chunk": ([3, 100], [5, 5], 16),
    "page 64": ([0, 90, 64], [3, 30, 1], 64),
}


@pytest.mark.parametrize(
    "name, kind",
    [
        *((name, "sliding_attention") for name in PREFILL),
        ("second chunk", "full_attention"),
        ("page 64", "full_attention"),
    ],
)
@modes
def test_prefill(name, kind, timing, schedule):
    case = Case(*PREFILL[name], BF16)
    assert case.check(kind, timing=timing, schedule=schedule)[1] == 3


@KINDS
def test_prefill_float32(kind):
    Case([3, 40], [5, 70], 16, FLOAT).check(kind)


@KINDS
def test_padding_sequences_of_a_prefill(kind):
    """A row of -1 alone, and many tiles of queries and of keys."""
    case = Case([0, 0, 70], [150, 1, 90], 16, BF16, N=8, G=1)
    case.step.positions[1] = -1
    case.check(kind)


def test_lengths_do_not_recompile():
    def compiled():
        kernels = ops_triton.decode_kernel, ops_triton.prefill_kernel, ops_triton.cache_kernel
        return [sum(len(c[0]) for c in k.device_caches.values()) for k in kernels]

    with gfx950.emulate():
        for cached, new in (([40], [1]), ([40], [6])):
            case = Case(cached, new, 16, BF16)
            plan = ops_triton.plan(case.step, case.config)
            ops_triton.attention(case.qkv, case.sinks, case.pool, "full_attention", plan)
        before = compiled()
        for cached, new in (([0], [1]), ([520], [1]), ([16, 3], [1, 1]), ([16], [16]), ([1], [17])):
            case = Case(cached, new, 16, BF16)
            plan = ops_triton.plan(case.step, case.config)
            ops_triton.attention(case.qkv, case.sinks, case.pool, "full_attention", plan)
    assert compiled() == before


# -- experts --------------------------------------------------------------------------------------


def make_experts(E, H, inner, bf16=False, seed=0):
    """Codes and scales drawn at random, products of K of the order of x; biases not small."""
    g = torch.Generator().manual_seed(seed)

    def weight(n, k):
        if bf16:
            return (torch.randn(E, n, k, generator=g) * k**-0.5).bfloat16(), None
        middle = 127 - round(math.log2(3 * k**0.5))
        codes = torch.randint(0, 256, (E, n, k // 2), dtype=torch.uint8, generator=g)
        scales = (E, n, k // 32)
        return codes, torch.randint(middle - 2, middle + 2, scales, dtype=torch.uint8, generator=g)

    def bias(n):
        return torch.randn(E, n, generator=g).mul(0.3).bfloat16()

    gate_up, down = weight(2 * inner, H), weight(H, inner)
    return weights.Experts(*gate_up, bias(2 * inner), *down, bias(H), 0.02, 0.01)


def make_inputs(T, E, H, dtype=BF16, seed=0):
    """x, router weight and bias."""
    x = normal(T, H, seed=seed + 100) * normal(T, 1, seed=seed + 101).exp()
    return x.to(dtype), (normal(E, H, seed=seed + 102) * H**-0.5).to(dtype), normal(E, dtype=dtype)


def check_moe(inputs, experts, top_k, activations="bf16", limit=7.0, **emulate):
    packed = ops_triton.prepare(experts, activations)
    with gfx950.emulate(**emulate) as gpu:
        got = ops_triton.moe(*inputs, packed, top_k, activations, limit)
    want = gptoss.moe_reference(*inputs, experts, top_k, activations, limit)
    assert got.dtype == want.dtype and torch.equal(got.isnan(), want.isnan())
    tolerance = SAME_SUMS if got.dtype == FLOAT else SAME_ROUNDINGS
    assert relative(got.float().nan_to_num(), want.float().nan_to_num()) < tolerance
    assert not packed.arrived.any()
    assert len(gpu.launches) == (3 if len(got) <= ops_triton.DECODE_TOKENS else 5)
    return got


def unpacked(weight: ops_triton.Weight):
    """What `dequantised` says of a word, in Python -> codes [E, padded N, padded K], scale bytes
    [E, padded N, padded K / 32]."""
    E, KB, NB = weight.data.shape[:3]
    codes = torch.zeros(E, NB, 2, 8, KB, 2, 2, 2, 4, 2, dtype=torch.int64)
    words = weight.data.long() & 0xFFFFFFFF  # [E, KB, NB, r, c, i]
    words = words.view(E, KB, NB, 8, 4, 2, 2).permute(0, 2, 5, 3, 1, 6, 4)
    for b in (0, 1):
        for a in (0, 1):
            for h in (0, 1):
                half = words >> (16 * h) & 0xFFFF
                if (a, b) == (1, 1):
                    code = (half >> 11 & 8) | (half >> 11 & 4) | (half >> 10 & 3)
                else:
                    half = half << (3 * a + 6 * b)
                    code = (half >> 12 & 8) | (half >> 6 & 7)
                codes[..., b, a, :, h] = code
    scales = weight.scale.view(torch.uint8).view(E, KB, NB, 8, 2, 2).permute(0, 2, 4, 3, 1, 5)
    return codes.reshape(E, NB * 16, KB * 64), scales.reshape(E, NB * 16, KB * 2)


@pytest.mark.parametrize("H, inner", [(96, 160), (64, 32), (2880, 32)])
def test_packed_codes_and_scales_are_where_the_comments_say(H, inner):
    experts = make_experts(2, H, inner)
    packed = ops_triton.prepare(experts, "bf16")
    for weight, codes, scale, bias in (
        (packed.gate_up, experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias),
        (packed.down, experts.down_weight, experts.down_scale, experts.down_bias),
    ):
        got, got_scale = unpacked(weight)
        got_bias = weight.bias
        if weight is packed.gate_up:  # 8 gates, 8 ups -> alternating

            def alternating(x):
                return x.unflatten(1, (-1, 2, 8)).transpose(2, 3).flatten(1, 3)

            got, got_scale, got_bias = map(alternating, (got, got_scale, got_bias))
        want = torch.stack([codes & 15, codes >> 4], -1).flatten(2)
        N, K = want.shape[1:]
        assert torch.equal(got[:, :N, :K], want.long()) and not got[:, N:].any()
        assert not got[:, :, K:].any()
        assert torch.equal(got_scale[:, :N, : K // 32], scale)
        assert torch.equal(got_bias[:, :N], bias.float())
        spent = weight.data.nbytes + weight.scale.nbytes
        padded = -(-N // 16) * 16 * (-(-K // 64) * 64) * 17 // 32
        assert spent == 2 * padded  # and nothing else is kept


@triton.jit
def dequantise_kernel(words, scales, out, WIDE: tl.constexpr):
    """One block of 16 rows x 64 inputs."""
    word, lane = tl.arange(0, 128)[None, :], tl.arange(0, 32)[None, :]
    w = tl.load(words + word).reshape(1, 32, 4)
    w = ops_triton.dequantised(w, tl.load(scales + lane // 4), 1, 1, WIDE, False)
    at = tl.arange(0, 16)[:, None] * 64 + tl.arange(0, 64)[None, :]
    tl.store(out + at, w)


@pytest.mark.parametrize("wide", [False, True])
def test_dequantised_is_exact(wide):
    """Every code under every scale byte; those above 128 need the wide way."""
    for low in range(0, 256 if wide else 129, 32):
        scale = torch.arange(low, low + 32).clamp(max=255 if wide else 128)
        codes = (torch.arange(16 * 32) * 5 + torch.arange(16 * 32) // 7).view(1, 16, 32) % 256
        weight = ops_triton.pack(
            codes.to(torch.uint8), scale.view(1, 16, 2).to(torch.uint8), torch.zeros(1, 16), 1.0, 1
        )
        out = torch.empty(16, 64, dtype=BF16)
        with gfx950.emulate():
            dequantise_kernel[(1,)](weight.data, weight.scale, out, wide, num_warps=1)
        want = gptoss.dequantise_mxfp4(codes.to(torch.uint8), scale.view(1, 16, 2).to(torch.uint8))
        assert torch.equal(out.float().nan_to_num(7e38), want[0].nan_to_num(7e38))
        assert torch.equal(out.signbit(), want[0].signbit()) or scale.max() == 255


def test_weights_without_scales_are_rounded_to_bfloat16():
    bf16 = make_experts(2, 64, 48, bf16=True)
    for dtype in (torch.float32, torch.float16):
        other = replace(bf16, down_weight=bf16.down_weight.to(dtype))
        packed = ops_triton.prepare(other, "bf16").down.data
        want = ops_triton.prepare(replace(bf16, down_weight=other.down_weight.bfloat16()), "bf16")
        assert packed.dtype == torch.bfloat16 and torch.equal(packed, want.down.data)


def test_prepare_refuses_what_the_kernels_do_not_multiply():
    fp4, bf16 = make_experts(2, 64, 32), make_experts(2, 64, 48, bf16=True)
    with pytest.raises(ValueError, match="'int8', expected one of bf16, fp8, mxfp8, mxfp4"):
        ops_triton.prepare(fp4, "int8")
    with pytest.raises(ValueError, match="static input scales"):
        ops_triton.prepare(replace(fp4, down_input_scale=None), "fp8")
    with pytest.raises(ValueError, match="48 inputs are no multiple of 32"):
        ops_triton.prepare(bf16, "mxfp8")
    with pytest.raises(ValueError, match="torch.int32, expected a float"):
        ops_triton.prepare(replace(bf16, down_weight=bf16.down_weight.int()), "bf16")
    packed, (x, *router) = ops_triton.prepare(fp4, "bf16"), make_inputs(3, 2, 64)
    with pytest.raises(ValueError, match="prepared for 'bf16'"):
        ops_triton.moe(x, *router, packed, 2, "mxfp8")
    with pytest.raises(ValueError, match="torch.float16"):
        ops_triton.moe(x.half(), *router, packed, 2, "bf16")
    assert ops_triton.moe(x[:0], *router, packed, 2, "bf16").shape == (0, 64)


@pytest.mark.parametrize(
    "T, E, H, inner, top_k, bf16, activations",
    [
        *((5, 5, 96, 160, 3, False, a) for a in gptoss.ACTIVATIONS),
        *((40, 5, 96, 160, 3, False, a) for a in gptoss.ACTIVATIONS),
        (1, 8, 160, 96, 4, False, "bf16"),
        (16, 40, 64, 32, 1, False, "bf16"),  # fewer tokens than experts
        (3, 4, 96, 64, 2, True, "bf16"),
        (30, 4, 96, 64, 2, True, "mxfp8"),
    ],
)
def test_moe(T, E, H, inner, top_k, bf16, activations):
    experts = make_experts(E, H, inner, bf16)
    check_moe(make_inputs(T, E, H), experts, top_k, activations)


@pytest.mark.parametrize(
    "T, activations, bf16",
    [(4, "mxfp4", False), (30, "bf16", False), (4, "bf16", True), (30, "fp8", True)],
)
def test_moe_float32(T, activations, bf16):
    check_moe(make_inputs(T, 5, 96, FLOAT), make_experts(5, 96, 64, bf16), 3, activations)


@pytest.mark.parametrize("T", [5, 40])
def test_moe_same_bits_under_every_timing_and_schedule(T):
    experts, inputs = make_experts(5, 96, 160), make_inputs(T, 5, 96)
    first, *rest = (
        check_moe(inputs, experts, 3, "mxfp8", timing=timing, schedule=schedule)
        for timing, schedule in MODES
    )
    assert all(torch.equal(first, other) for other in rest)


def test_decode_reads_the_active_experts_once_and_no_other():
    experts, inputs = make_experts(9, 160, 96), make_inputs(3, 9, 160)
    packed = ops_triton.prepare(experts, "bf16")
    with gfx950.emulate() as gpu:
        ops_triton.moe(*inputs, packed, 2)
    active = len(gptoss.gating(*inputs, 2).counts)
    assert active < 9
    for launch, weight in zip(gpu.launches[1:], (packed.gate_up, packed.down), strict=True):
        assert launch.counters.tensors["data"]["read"] == weight.data[:active].nbytes


def test_bf16_weights_of_any_size():
    check_moe(make_inputs(3, 4, 33), make_experts(4, 33, 13, bf16=True), 2)
    check_moe(make_inputs(20, 4, 33), make_experts(4, 33, 13, bf16=True), 2)


@pytest.mark.parametrize("H, inner", [(2880, 32), (32, 2880)])
@pytest.mark.parametrize("T", [2, 17])
def test_moe_at_full_depth(T, H, inner):
    """K = 2880, 22.5 steps of 128, in one GEMM or the other."""
    check_moe(make_inputs(T, 2, H), make_experts(2, H, inner), 2)


def routed(T, E, H, experts_of, top_k, dtype=BF16):
    """Inputs whose tokens choose the experts in the rows of experts_of [T, top_k], in order."""
    x = make_inputs(T, E, H, dtype)[0]
    x[:, :E] = 0
    for slot in range(top_k):
        x[torch.arange(T), experts_of[:, slot]] = 8.0 - slot
    return x, torch.eye(E, H, dtype=dtype), torch.zeros(E, dtype=dtype)


@pytest.mark.parametrize("T", [16, 200])
def test_one_expert_takes_all_and_others_none(T):
    experts_of = torch.tensor([3, 1]).expand(T, 2).clone()
    experts_of[5, 1] = 0
    check_moe(routed(T, 6, 96, experts_of, 2), make_experts(6, 96, 32), 2)


@pytest.mark.parametrize("T", [3, 20])
def test_ties_go_to_the_smaller_expert(T):
    """Router rows are small integers, whose sums are exact in any order. +0 and -0 tie too."""
    x = torch.ones(T, 96, dtype=BF16)
    router = torch.zeros(8, 96, dtype=BF16)
    router[[1, 4, 5], 0] = 1.0
    bias = torch.tensor([0.0, 0.0, -0.0, 0.0, 0.0, 0.0, 2.0, 0.0], dtype=BF16)
    experts = make_experts(8, 96, 32)
    got = check_moe((x, router, bias), experts, 6)  # 6, 1, 4, 5, 0 and 2
    bias[2] = -1  # 3 instead of 2, with the same gates
    other = gptoss.moe_reference(x, router, bias, experts, 6)
    assert relative(got.float(), other.float()) > 10 * SAME_ROUNDINGS


@pytest.mark.parametrize("T", [4, 20])
def test_nan_shows_and_stays_where_it_is(T):
    """In a token, of which every output is NaN, and in a scale, for the tokens of its expert."""
    experts, inputs = make_experts(9, 96, 64), make_inputs(T, 9, 96)
    clean = check_moe(inputs, experts, 2)
    inputs[0][2, 7] = math.nan
    got = check_moe(inputs, experts, 2)
    assert got[2].isnan().all()
    others = torch.arange(T) != 2
    assert torch.equal(got[others], clean[others])
    inputs = make_inputs(T, 9, 96)
    chosen = gptoss.gating(*inputs, 2).chosen
    experts.gate_up_scale[chosen[0, 1], 11, 2] = 255  # of an up row
    got = check_moe(inputs, experts, 2)
    hit = (chosen == chosen[0, 1]).any(1)
    assert got.isnan().all(1).equal(hit) and not hit.all()


@pytest.mark.parametrize("activations", ["bf16", "mxfp8"])
def test_large_scales(activations):
    """Byte 254 is 2^127: products overflow as the equations' do; 140 stays finite."""
    experts, (x, *router) = make_experts(4, 96, 64), make_inputs(4, 4, 96)
    experts.gate_up_scale[2] = 140
    assert ops_triton.prepare(experts, "bf16").gate_up.wide
    check_moe((x * 2.0**-15, *router), experts, 2, activations)
    experts.down_scale[:] = 254
    packed = ops_triton.prepare(experts, activations)
    with gfx950.emulate():
        got = ops_triton.moe(x, *router, packed, 2, activations)
    assert not got.isfinite().any()


@pytest.mark.parametrize("T, more", [(1, 16), (20, 5)])
def test_a_token_does_not_depend_on_its_batch(T, more):
    """Within decode, and above it among batches of one tile."""
    experts = make_experts(6, 96, 64)
    x, *router = make_inputs(T + more, 6, 96)
    packed = ops_triton.prepare(experts, "bf16")
    few, many = (x[:T], x[: T + more]) if T > 16 else (x[:T], x[:16])
    with gfx950.emulate():
        got = [ops_triton.moe(part, *router, packed, 3) for part in (few, many)]
    assert torch.equal(got[0], got[1][:T])


def test_more_pairs_than_a_step_of_the_sort():
    check_moe(make_inputs(1100, 5, 32), make_experts(5, 32, 32), 4)


def test_swiglu_limit():
    check_moe(make_inputs(4, 4, 96), make_experts(4, 96, 64), 2, limit=0.5)


# -- the whole ------------------------------------------------------------------------------------


def test_the_tiny_model_says_what_the_equations_say():
    """Prompts and their greedy tokens through the engine, every kernel emulated."""
    prompts = [prompt_of(9, 200), prompt_of(3, 200, seed=1)]
    want = gptoss.GPTOSS.from_pretrained(TINY, ops="torch", dtype=FLOAT)
    with gfx950.emulate():
        model = gptoss.GPTOSS.from_pretrained(TINY, ops="triton", dtype=FLOAT)
        logits = model.logits(prompts[0])
        tokens = model.generate(prompts, 3, page_size=4, stop_tokens=())
    # a layer's sums are SAME_SUMS apart, and what they are sums of as well
    layers = want.config.num_hidden_layers
    assert relative(logits, want.logits(prompts[0])) < 2 * layers * SAME_SUMS
    assert tokens == want.generate(prompts, 3, page_size=4, stop_tokens=())


def test_the_bench_runs_all_operations(capsys):
    assert bench_ops.main(["--model", "tiny", "--tokens", "1", "2"]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines() if line[0] == "{"]
    assert {row["op"].split()[0] for row in rows if "op" in row} == {
        "add_norm", "attention", "moe", "F.linear", "ops_triton.linear",
    }  # fmt: skip
    assert all(row["error"] < TWO_ROUNDINGS * 1.5 for row in rows if row.get("error"))


# -- compilers ------------------------------------------------------------------------------------


def slow(gpu):
    return pytest.param(gpu, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "gpu", ["sm_90", "gfx950", slow("sm_80"), slow("sm_86"), slow("sm_120"), slow("gfx942")]
)
def test_compiled_for_gpus_that_are_not_here(gpu):
    """At the 120b's sizes nothing spills, and an H100 multiplies mxfp4 weights out of registers,
    without a detour through shared memory after they are dequantised, by fewer than 4 instructions
    each, which is what 132 multiprocessors have at 3 TB/s and 1.4 GHz."""
    config = weights.published("120b")
    for T in (1, 512):
        with compile_ops.compiling_for(gpu) as found:
            compile_ops.launch_layer(config, T)
        assert [k.name for k in found if k.spills] == []
        assert len(found) == (2 + 2 + 2 + 3 if T == 1 else 1 + 6 + 5)
        for k in found:
            if gpu == "sm_90" and k.name == "sum_norm_kernel":  # asks again until all have come
                assert k.loop["LDG"] and "ld.volatile.global.v2.b64" in k.text
            if gpu == "sm_90" and k.name == "expert_kernel":
                loop = k.text[k.text.index("wgmma.fence") : k.text.rindex("wgmma.mma_async")]
                assert "st.shared" not in loop and "cp.async.cg.shared.global" in k.text
                # nothing is in flight when the next step writes to the left operand's registers
                waits = re.findall(r"wgmma\.wait_group\S+ (\d+)", k.text)
                assert waits and set(waits) == {"0"}
                if T == 1:  # a step of 64 x 256 weights, 4 warps
                    assert k.loop["HGMMA"] == 16 and k.loop.total() < 4 * 64 * 256 / 128
