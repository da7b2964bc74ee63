"""Whole kernels, unmodified Triton and Gluon, on the emulated gfx950 against torch; pipelines and
mutants."""

import itertools
import math
import re
from pathlib import Path
from xml.etree import ElementTree

import draw_loop
import numpy as np
import pytest
import torch
import triton
import triton.language as tl
from torch.nn import functional as F
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.language.extra import libdevice

import gfx950
from gfx950.asm import parse_instruction
from gfx950.machine import first_run
from gfx950.memory import Queue

MODES = list(itertools.product(("lazy", "eager", "random"), ("lockstep", "skew", "random")))
QUICK = [("lazy", "lockstep"), ("eager", "skew"), ("random", "random")]
MODE_PARAMS = [pytest.param(*m, marks=[] if m in QUICK else [pytest.mark.slow]) for m in MODES]
CASES = {}


def case(fn):
    """Registers a generator of (result, expected, absolute tolerance)."""
    CASES[fn.__name__] = fn
    return fn


def agrees(result, expected, tolerance):
    result, expected = result.double(), expected.double()
    same = (result == expected) | (result.isnan() & expected.isnan())
    return bool((same | ((result - expected).abs() <= tolerance)).all())


# ------------------------------------------------------------------------------------------
# ordinary Triton kernels


@triton.jit
def add_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) + tl.load(y + i, mask=i < n), mask=i < n)


@case
def vector_add():
    for n in (1, 255, 1000, 150_001):  # the last in several slices
        x, y, out = torch.randn(n), torch.randn(n), torch.empty(n)
        add_kernel[(triton.cdiv(n, 256),)](x, y, out, n, 256)
        yield out, x + y, 0


@triton.jit
def softmax_kernel(
    x,
    out,
    n,
    BLOCK: tl.constexpr,
    LOAD_EXTRA: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    SKIP: tl.constexpr,
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n + LOAD_EXTRA, other=-float("inf")).to(tl.float32)
    e = tl.exp(v - tl.max(v, 0))
    if row != SKIP:
        tl.store(
            out + row * n + i, (e / tl.sum(e, 0)).to(out.dtype.element_ty), mask=i < n + STORE_EXTRA
        )


def run_softmax(load_extra=0, store_extra=0, skip=-1):
    for dtype, tolerance in ((torch.float32, 1e-7), (torch.bfloat16, 2.0**-9)):
        x = torch.randn(9, 100, dtype=dtype)
        out = torch.empty_like(x)
        softmax_kernel[(9,)](x, out, 100, 128, load_extra, store_extra, skip)
        yield out, x.float().softmax(1).to(dtype), tolerance


@case
def softmax():
    yield from run_softmax()


@triton.jit
def layernorm_kernel(x, weight, bias, out, n, eps, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    mask = i < n
    v = tl.load(x + row * n + i, mask=mask, other=0.0).to(tl.float32)
    d = tl.where(mask, v - tl.sum(v, 0) / n, 0.0)
    y = d * tl.rsqrt(tl.sum(d * d, 0) / n + eps) * tl.load(weight + i, mask=mask) + tl.load(
        bias + i, mask=mask
    )
    tl.store(out + row * n + i, y.to(out.dtype.element_ty), mask=mask)


@case
def layernorm():
    # 1 ULP near 4
    for dtype, tolerance in (
        (torch.float32, 2e-6),
        (torch.bfloat16, 2.0**-5),
        (torch.float16, 2.0**-8),
    ):
        x, w, b = (
            torch.randn(7, 200, dtype=dtype),
            torch.randn(200, dtype=dtype),
            torch.randn(200, dtype=dtype),
        )
        out = torch.empty_like(x)
        layernorm_kernel[(7,)](x, w, b, out, 200, 1e-5, 256)
        yield out, F.layer_norm(x.float(), (200,), w.float(), b.float()).to(dtype), tolerance


@triton.jit
def matmul_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    stride_am,
    stride_ak,
    stride_bk,
    stride_bn,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOAD_EXTRA: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    SKIP: tl.constexpr,
):
    tiles_n = tl.cdiv(N, BN)
    m = tl.program_id(0) // tiles_n * BM + tl.arange(0, BM)
    n = tl.program_id(0) % tiles_n * BN + tl.arange(0, BN)
    k = tl.arange(0, BK)
    integer: tl.constexpr = a.dtype.element_ty == tl.int8
    acc = tl.zeros((BM, BN), tl.int32 if integer else tl.float32)
    for start in range(0, K, BK):
        x = tl.load(
            a + m[:, None] * stride_am + (start + k)[None, :] * stride_ak,
            mask=(m[:, None] < M) & (start + k[None, :] < K + LOAD_EXTRA),
            other=0 if integer else 0.0,
        )
        y = tl.load(
            b + (start + k)[:, None] * stride_bk + n[None, :] * stride_bn,
            mask=(n[None, :] < N) & (start + k[:, None] < K + LOAD_EXTRA),
            other=0 if integer else 0.0,
        )
        acc = tl.dot(x, y, acc, out_dtype=acc.dtype)
    if tl.program_id(0) != SKIP:
        tl.store(
            c + m[:, None] * N + n[None, :],
            acc.to(c.dtype.element_ty),
            mask=(m[:, None] < M) & (n[None, :] < N + STORE_EXTRA),
        )


def run_matmul(dtype, load_extra=0, store_extra=0, skip=-1, transposed=False, **options):
    m, n, k = 70, 50, 200  # tails in every dimension
    if dtype == torch.int8:
        a, b = (
            torch.randint(-128, 127, (m, k), dtype=dtype),
            torch.randint(-128, 127, (k, n), dtype=dtype),
        )
    else:
        a, b = torch.randn(m, k).to(dtype), torch.randn(k, n).to(dtype)
    b = b.t().contiguous().t() if transposed else b
    c = torch.empty(m, n, dtype=torch.int32 if dtype == torch.int8 else torch.float32)
    matmul_kernel[(triton.cdiv(m, 32) * triton.cdiv(n, 32),)](
        a,
        b,
        c,
        m,
        n,
        k,
        *a.stride(),
        *b.stride(),
        32,
        32,
        64,
        load_extra,
        store_extra,
        skip,
        **options,
    )
    expected = a.double() @ b.double()
    return (
        c,
        expected,
        0 if dtype == torch.int8 else 2.0**-22 * (a.double().abs() @ b.double().abs()).max(),
    )


@case
def matmul():
    for dtype in (
        torch.bfloat16,
        torch.float16,
        torch.float32,
        torch.int8,
        torch.float8_e4m3fn,
        torch.float8_e5m2,
    ):
        for transposed, shape in ((False, 16), (True, 32)):
            yield run_matmul(dtype, transposed=transposed, matrix_instr_nonkdim=shape)
    yield run_matmul(torch.bfloat16, num_stages=3, num_warps=8)


@triton.jit
def scaled_matmul_kernel(
    a,
    a_scale,
    b,
    b_scale,
    c,
    M,
    N,
    K,
    FA: tl.constexpr,
    FB: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    LOAD_EXTRA: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    SKIP: tl.constexpr,
):
    PA: tl.constexpr = 2 if FA == "e2m1" else 1
    PB: tl.constexpr = 2 if FB == "e2m1" else 1
    m = tl.program_id(0) * BM + tl.arange(0, BM)
    n = tl.program_id(1) * BN + tl.arange(0, BN)
    acc = tl.zeros((BM, BN), tl.float32)
    for k in range(0, K, BK):
        ka, kb, ks = (
            k // PA + tl.arange(0, BK // PA),
            k // PB + tl.arange(0, BK // PB),
            k // 32 + tl.arange(0, BK // 32),
        )
        x = tl.load(
            a + m[:, None] * (K // PA) + ka[None, :],
            mask=(m[:, None] < M + LOAD_EXTRA) & (ka[None, :] < K // PA),
        )
        y = tl.load(
            b + n[None, :] * (K // PB) + kb[:, None],
            mask=(n[None, :] < N) & (kb[:, None] < K // PB),
        )
        xs = tl.load(
            a_scale + m[:, None] * (K // 32) + ks[None, :],
            mask=(m[:, None] < M) & (ks[None, :] < K // 32),
            other=0,
        )
        ys = tl.load(
            b_scale + n[:, None] * (K // 32) + ks[None, :],
            mask=(n[:, None] < N) & (ks[None, :] < K // 32),
            other=0,
        )
        acc = tl.dot_scaled(x, xs, FA, y, ys, FB, acc)
    if tl.program_id(1) != SKIP:
        tl.store(
            c + m[:, None] * N + n[None, :],
            acc,
            mask=(m[:, None] < M) & (n[None, :] < N + STORE_EXTRA),
        )


FP4 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def random_operand(rows, k, fmt):
    """(codes, E8M0 scales, float64 values) of a random [rows, k] operand."""
    scale = torch.randint(120, 134, (rows, k // 32), dtype=torch.uint8)
    if fmt == "e2m1":
        codes = torch.randint(0, 256, (rows, k // 2), dtype=torch.uint8)
        values = torch.stack([FP4[(codes & 15).long()], FP4[(codes >> 4).long()]], -1).view(rows, k)
    else:
        values = torch.randn(rows, k).to(FLOAT8[fmt])
        codes = values.view(torch.uint8)
    return codes, scale, values.double() * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)


def run_scaled_matmul(
    fa, fb, m=40, n=72, k=288, load_extra=0, store_extra=0, skip=-1, tile=(32, 32, 128), **options
):
    (a, sa, va), (b, sb, vb), c = (
        random_operand(m, k, fa),
        random_operand(n, k, fb),
        torch.empty(m, n),
    )
    scaled_matmul_kernel[(triton.cdiv(m, tile[0]), triton.cdiv(n, tile[1]))](
        a, sa, b, sb, c, m, n, k, fa, fb, *tile, load_extra, store_extra, skip, **options
    )
    return c, va @ vb.T, 2.0**-22 * (va.abs() @ vb.abs().T).max()


@case
def scaled_matmul():
    for fa, fb in itertools.product(("e4m3", "e5m2", "e2m1"), repeat=2):
        yield run_scaled_matmul(fa, fb, matrix_instr_nonkdim=16)
    yield run_scaled_matmul("e4m3", "e2m1", matrix_instr_nonkdim=32)


@triton.jit
def attention_kernel(
    q,
    k,
    v,
    out,
    n,
    scale,
    D: tl.constexpr,
    BM: tl.constexpr,
    BN: tl.constexpr,
    LOAD_EXTRA: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    SKIP: tl.constexpr,
):
    head = tl.program_id(1) * n * D
    rows, d = tl.program_id(0) * BM + tl.arange(0, BM), tl.arange(0, D)
    query = tl.load(q + head + rows[:, None] * D + d[None, :], mask=rows[:, None] < n, other=0.0)
    top, total = tl.full((BM,), -float("inf"), tl.float32), tl.zeros((BM,), tl.float32)
    acc = tl.zeros((BM, D), tl.float32)
    for start in range(0, tl.minimum(n, (tl.program_id(0) + 1) * BM), BN):
        cols = start + tl.arange(0, BN)
        key = tl.load(
            k + head + cols[None, :] * D + d[:, None],
            mask=cols[None, :] < n + LOAD_EXTRA,
            other=0.0,
        )
        s = tl.where(
            (rows[:, None] >= cols[None, :]) & (cols[None, :] < n),
            tl.dot(query, key) * scale,
            -float("inf"),
        )
        new_top = tl.maximum(top, tl.max(s, 1))
        p, shrink = tl.exp2(s - new_top[:, None]), tl.exp2(top - new_top)
        total, top = total * shrink + tl.sum(p, 1), new_top
        value = tl.load(
            v + head + cols[:, None] * D + d[None, :], mask=cols[:, None] < n, other=0.0
        )
        acc = tl.dot(p.to(value.dtype), value, acc * shrink[:, None])
    if tl.program_id(0) != SKIP:
        tl.store(
            out + head + rows[:, None] * D + d[None, :],
            (acc / total[:, None]).to(out.dtype.element_ty),
            mask=rows[:, None] < n + STORE_EXTRA,
        )


def run_attention(d=64, load_extra=0, store_extra=0, skip=-1):
    n = 100
    q, k, v = (torch.randn(2, n, d, dtype=torch.bfloat16) for _ in range(3))
    out = torch.empty_like(q)
    attention_kernel[(4, 2)](
        q, k, v, out, n, d**-0.5 * math.log2(math.e), d, 32, 32, load_extra, store_extra, skip
    )
    expected = F.scaled_dot_product_attention(q.float(), k.float(), v.float(), is_causal=True)
    return out, expected.bfloat16(), 2.0**-5  # two bf16 ULPs near 2: p and the output are rounded


@case
def flash_attention():
    yield run_attention()
    yield run_attention(128)


@triton.jit
def scan_kernel(x, sums, products, reverse, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    at = tl.program_id(0) * n + i
    v = tl.load(x + at, mask=i < n, other=0.0)
    tl.store(sums + at, tl.cumsum(v, 0), mask=i < n)
    tl.store(products + at, tl.cumprod(v, 0), mask=i < n)
    tl.store(reverse + at, tl.cumsum(v, 0, reverse=True), mask=i < n)


@case
def cumulative():
    x = torch.rand(3, 500) + 0.5
    sums, products, reverse = (torch.empty_like(x) for _ in range(3))
    scan_kernel[(3,)](x, sums, products, reverse, 500, 512)
    yield sums, x.cumsum(1), 1e-3
    yield products / x.cumprod(1), torch.ones_like(x), 1e-4
    yield reverse, x.flip(1).cumsum(1).flip(1), 1e-3


@triton.jit
def recurrence(a1, b1, a2, b2):
    return a1 * a2, b1 * a2 + b2


@triton.jit
def recurrence_kernel(a, b, out, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    _, h = tl.associative_scan((tl.load(a + i), tl.load(b + i)), 0, recurrence)
    tl.store(out + i, h)


@case
def linear_recurrence():
    a, b, out, h, expected = torch.rand(256), torch.randn(256), torch.empty(256), 0, []
    recurrence_kernel[(1,)](a, b, out, 256)
    for i in range(256):
        h = a[i] * h + b[i]
        expected.append(h)
    yield out, torch.stack(expected), 1e-5


@triton.jit
def sort_kernel(
    x,
    out,
    top,
    n,
    BLOCK: tl.constexpr,
    LOAD_EXTRA: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    SKIP: tl.constexpr,
):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n + LOAD_EXTRA, other=-30000)
    tl.store(out + row * BLOCK + i, tl.sort(v))
    j = tl.arange(0, 16)
    if row != SKIP:
        tl.store(top + row * 8 + j, tl.topk(v, 16), mask=j < 8 + STORE_EXTRA)


def run_sort(dtype=torch.float32, load_extra=0, store_extra=0, skip=-1):
    x = (torch.randn(4, 120) * 1000).to(dtype)
    out, top = torch.empty(4, 128, dtype=dtype), torch.empty(4, 8, dtype=dtype)
    sort_kernel[(4,)](x, out, top, 120, 128, load_extra, store_extra, skip)
    yield out[:, 8:], x.sort(1)[0], 0
    yield top, x.topk(8, 1)[0], 0


@case
def sort_and_topk():
    for dtype in (torch.float32, torch.int32, torch.int64, torch.float16):
        yield from run_sort(dtype)


@triton.jit
def extremes_kernel(x, largest_at, smallest_at, largest, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    value, index = tl.max(
        tl.load(x + row * n + i, mask=i < n, other=-float("inf")), 0, return_indices=True
    )
    tl.store(largest + row, value)
    tl.store(largest_at + row, index)
    tl.store(
        smallest_at + row, tl.argmin(tl.load(x + row * n + i, mask=i < n, other=float("inf")), 0)
    )


@case
def argmax_argmin():
    x, at, low = (
        torch.randn(9, 300),
        torch.empty(9, dtype=torch.int32),
        torch.empty(9, dtype=torch.int32),
    )
    x[:, 50] = x[:, 20] = 9  # a tie: the smaller index wins
    top = torch.empty(9)
    extremes_kernel[(9,)](x, at, low, top, 300, 512)
    yield at, torch.full((9,), 20), 0
    yield low, x.argmin(1), 0
    yield top, x.amax(1), 0


@triton.jit
def gather_scatter_kernel(x, index, gathered, scattered, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    at = tl.load(index + i, mask=i < n, other=0)
    v = tl.load(x + at, mask=i < n)
    tl.store(gathered + i, v, mask=i < n)
    tl.store(scattered + at, v * 2, mask=i < n)


@case
def gather_scatter():
    for dtype in (torch.int32, torch.int64):
        x, index = torch.randn(1000), torch.randperm(1000)[:700]
        gathered, scattered, expected = torch.empty(700), torch.zeros(1000), torch.zeros(1000)
        gather_scatter_kernel[(6,)](x, index.to(dtype), gathered, scattered, 700, 128)
        expected[index] = 2 * x[index]
        yield gathered, x[index], 0
        yield scattered, expected, 0


@triton.jit
def gather_lanes_kernel(x, index, out, M: tl.constexpr, N: tl.constexpr):
    at = tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(out + at, tl.gather(tl.load(x + at), tl.load(index + at), 1))


@case
def gather_in_registers():
    x, index, out = torch.randn(32, 64), torch.randint(0, 64, (32, 64)), torch.empty(32, 64)
    gather_lanes_kernel[(1,)](x, index.int(), out, 32, 64)
    yield out, x.gather(1, index), 0


@triton.jit
def paged_kernel(
    cache,
    table,
    out,
    length,
    PAGE: tl.constexpr,
    D: tl.constexpr,
    LOAD_EXTRA: tl.constexpr,
    STORE_EXTRA: tl.constexpr,
    SKIP: tl.constexpr,
):
    seq, d = tl.program_id(0), tl.arange(0, D)
    for i in range(length + STORE_EXTRA):
        page = tl.load(table + seq * 8 + i // PAGE)
        if i != SKIP:
            tl.store(
                out + (seq * length + i) * D + d,
                tl.load(cache + (page * PAGE + i % PAGE + LOAD_EXTRA) * D + d),
            )


def run_paged(load_extra=0, store_extra=0, skip=-1):
    cache, table = torch.randn(32, 16, 64, dtype=torch.bfloat16), torch.randperm(32).view(4, 8)
    out = torch.empty(4, 100, 64, dtype=torch.bfloat16)
    paged_kernel[(4,)](cache, table, out, 100, 16, 64, load_extra, store_extra, skip)
    yield out, cache[table].view(4, 128, 64)[:, :100], 0


@case
def paged_gather():
    yield from run_paged()


@triton.jit
def histogram_kernel(x, counts, weights, largest, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0)
    tl.atomic_add(counts + v, 1, mask=i < n)
    tl.atomic_add(weights + v, v.to(tl.float32) * 0.5, mask=i < n)
    tl.atomic_max(largest, tl.max(v, 0))


@case
def histogram_by_atomics():
    x, counts = torch.randint(0, 17, (1000,), dtype=torch.int32), torch.zeros(17, dtype=torch.int32)
    weights, largest = torch.zeros(17), torch.zeros(1, dtype=torch.int32)
    histogram_kernel[(8,)](x, counts, weights, largest, 1000, 128)
    expected = torch.bincount(x, minlength=17)
    yield counts, expected, 0
    yield weights, expected * torch.arange(17) * 0.5, 0
    yield largest, x.max()[None], 0


@triton.jit
def block_histogram_kernel(x, out, N: tl.constexpr, BINS: tl.constexpr):
    tl.store(out + tl.arange(0, BINS), tl.histogram(tl.load(x + tl.arange(0, N)), BINS))


@case
def histogram_in_lds():
    x, out = torch.randint(0, 32, (512,), dtype=torch.int32), torch.empty(32, dtype=torch.int32)
    block_histogram_kernel[(1,)](x, out, 512, 32)
    yield out, torch.bincount(x, minlength=32), 0


@triton.jit
def atomics_kernel(half, brain, wide, double, count, low, bits, cas, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.atomic_add(half + i % 4, tl.full((BLOCK,), 1.0, tl.float16))
    tl.atomic_add(brain + i % 4, tl.full((BLOCK,), 1.0, tl.bfloat16))
    tl.atomic_add(wide + i % 4, i.to(tl.int64) * 1000000007)
    tl.atomic_add(double + i * 0, i.to(tl.float64))
    tl.atomic_add(count + i * 0, i)
    tl.atomic_min(low + i * 0, -i)
    tl.atomic_or(bits + i * 0, 1 << (i % 31))
    tl.atomic_cas(cas + i, i % 2, tl.full((BLOCK,), 7, tl.int32))


@case
def atomics():
    i = torch.arange(128)
    half, brain = torch.zeros(4, dtype=torch.float16), torch.zeros(4, dtype=torch.bfloat16)
    wide, double = torch.zeros(4, dtype=torch.int64), torch.zeros(1, dtype=torch.float64)
    count, low, bits, cas = (torch.zeros(k, dtype=torch.int32) for k in (1, 1, 1, 128))
    atomics_kernel[(1,)](half, brain, wide, double, count, low, bits, cas, 128)
    yield half, torch.full((4,), 32), 0
    yield brain, torch.full((4,), 32), 0
    yield wide, torch.stack([i[r::4].sum() for r in range(4)]) * 1000000007, 0
    yield (
        torch.cat([double, count, low, bits]),
        torch.tensor([i.sum(), i.sum(), -127, 2**31 - 1]),
        0,
    )
    yield cas, torch.where(i % 2 == 0, 7, 0), 0


@triton.jit
def integer_kernel(a, b, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x, y = tl.load(a + i, mask=i < n, other=1), tl.load(b + i, mask=i < n, other=1)
    tl.store(out + i, x * y + x // y, mask=i < n)
    tl.store(out + n + i, x % y, mask=i < n)
    tl.store(out + 2 * n + i, (x << 3) ^ (y >> 2), mask=i < n)
    tl.store(out + 3 * n + i, tl.where(x > y, x & y, x | y), mask=i < n)


@case
def integer_arithmetic():
    for dtype, limit in ((torch.int64, 2**40), (torch.int32, 2**30), (torch.int16, 30000)):
        a = torch.randint(-limit, limit, (300,), dtype=dtype)
        b = torch.randint(1, limit // 3, (300,), dtype=dtype) * torch.where(
            torch.rand(300) < 0.5, -1, 1
        ).to(dtype)
        out = torch.empty(4, 300, dtype=dtype)
        integer_kernel[(3,)](a, b, out, 300, 128)
        q = torch.div(a, b, rounding_mode="trunc")
        yield (
            out,
            torch.stack(
                [a * b + q, a - q * b, (a << 3) ^ (b >> 2), torch.where(a > b, a & b, a | b)]
            ),
            0,
        )


@triton.jit
def bits_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0).to(tl.uint32, bitcast=True)
    tl.store(out + i, tl.umulhi(v, v), mask=i < n)
    tl.store(out + n + i, (v >> 7) ^ ~v, mask=i < n)


@case
def unsigned_bits():
    x = torch.randint(0, 2**32, (200,))
    out = torch.empty(2, 200, dtype=torch.int32)
    bits_kernel[(1,)](x.to(torch.int32), out, 200, 256)
    high = torch.tensor([int(v) ** 2 >> 32 for v in x])
    yield out.long() & 0xFFFFFFFF, torch.stack([high, ((x >> 7) ^ ~x) & 0xFFFFFFFF]), 0


@triton.jit
def collatz_kernel(x, out):
    v, steps = tl.load(x + tl.program_id(0)), 0
    while v != 1:
        if v % 2 == 0:
            v = v // 2
        else:
            v = 3 * v + 1
        steps += 1
    tl.store(out + tl.program_id(0), steps)


@case
def while_loop():
    def collatz(v):
        return 0 if v == 1 else 1 + collatz(v // 2 if v % 2 == 0 else 3 * v + 1)

    x, out = torch.arange(1, 40, dtype=torch.int32), torch.empty(39, dtype=torch.int32)
    collatz_kernel[(39,)](x, out)
    yield out, torch.tensor([collatz(v) for v in range(1, 40)]), 0


@triton.jit
def math_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=1.0)
    p = tl.abs(v) + 0.1
    tl.store(out + i, tl.sin(v), mask=i < n)
    tl.store(out + n + i, tl.cos(v), mask=i < n)
    tl.store(out + 2 * n + i, tl.log(p), mask=i < n)
    tl.store(out + 3 * n + i, tl.exp(v), mask=i < n)
    tl.store(out + 4 * n + i, tl.erf(v), mask=i < n)
    tl.store(out + 5 * n + i, libdevice.tanh(v), mask=i < n)
    tl.store(out + 6 * n + i, tl.floor(v) + tl.ceil(v * 3), mask=i < n)
    tl.store(out + 7 * n + i, tl.sigmoid(v), mask=i < n)
    tl.store(out + 8 * n + i, libdevice.pow(p, v), mask=i < n)
    tl.store(out + 9 * n + i, tl.log2(p) + tl.exp2(v), mask=i < n)


@case
def transcendentals():
    x, out = torch.randn(500) * 3, torch.empty(10, 500)
    math_kernel[(4,)](x, out, 500, 128)
    v, p = x.double(), (x.abs() + 0.1).double()
    expected = torch.stack(
        [
            v.sin(),
            v.cos(),
            p.log(),
            v.exp(),
            v.erf(),
            v.tanh(),
            v.floor() + (x * 3).ceil(),
            v.sigmoid(),
            p**v,
            p.log2() + torch.exp2(v),
        ]
    )
    yield (out - expected) / (expected.abs() + 1e-3), torch.zeros_like(out), 2e-5


@triton.jit
def correctly_rounded_kernel(x, y, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    a, b = tl.load(x + i, mask=i < n, other=1.0), tl.load(y + i, mask=i < n, other=1.0)
    tl.store(out + i, tl.div_rn(a, b), mask=i < n)
    tl.store(out + n + i, tl.sqrt_rn(tl.abs(a)), mask=i < n)


@case
def division_and_square_root():
    """The compiler's whole Newton sequences with div_scale, div_fmas, div_fixup: bit for bit,
    denormals included."""
    exponents = torch.linspace(-44, 38, 700).double()
    x = (torch.randn(700).double() * 10**exponents).float()
    y = (torch.randn(700).double() * 10 ** exponents[torch.randperm(700)]).float()
    special = torch.tensor([0.0, -0.0, math.inf, -math.inf, math.nan, 1.0, 1e-45])
    x, y = torch.cat([x, special.repeat(7)]), torch.cat([y, special.repeat_interleave(7)])
    out = torch.empty(2, len(x))
    correctly_rounded_kernel[(6,)](x, y, out, len(x), 128)
    # numpy, as torch's vectorised square root is off by one ULP at times
    with np.errstate(all="ignore"):
        yield out, torch.from_numpy(np.stack([x.numpy() / y.numpy(), np.sqrt(x.abs().numpy())])), 0


@triton.jit
def double_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    v = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(out + i, tl.exp(v) / (v * v + 1) + tl.sqrt(tl.abs(v)), mask=i < n)
    tl.store(out + n + i, tl.sum(v, 0) + v * v, mask=i < n)
    tl.store(out + 2 * n + i, v.to(tl.int64).to(tl.float64), mask=i < n)


@case
def double_precision():
    x, out = torch.randn(100, dtype=torch.float64) * 3, torch.empty(3, 100, dtype=torch.float64)
    double_kernel[(1,)](x, out, 100, 128)
    yield (
        out,
        torch.stack([x.exp() / (x * x + 1) + x.abs().sqrt(), x.sum() + x * x, x.trunc()]),
        1e-12,
    )


@triton.jit
def random_kernel(out, n, seed, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.randint(seed, i), mask=i < n)


def philox(counter, key):
    """Philox4x32-10 (Salmon et al. 2011): the first word."""
    c, k = [counter, 0, 0, 0], [key, 0]
    for _ in range(10):
        a, b = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [b >> 32 ^ c[1] ^ k[0], b & 0xFFFFFFFF, a >> 32 ^ c[3] ^ k[1], a & 0xFFFFFFFF]
        k = [k[0] + 0x9E3779B9 & 0xFFFFFFFF, k[1] + 0xBB67AE85 & 0xFFFFFFFF]
    return c[0]


@case
def random_numbers():
    out = torch.empty(300, dtype=torch.int32)
    random_kernel[(3,)](out, 300, 42, 128)
    yield out.long() & 0xFFFFFFFF, torch.tensor([philox(i, 42) for i in range(300)]), 0


@triton.jit
def cast_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n, other=0.0).to(out.dtype.element_ty), mask=i < n)


@case
def casts():
    x = torch.cat(
        [
            torch.randn(400) * 100,
            torch.tensor(
                [
                    0.0,
                    -0.0,
                    448,
                    463,
                    465,
                    1e5,
                    -1e5,
                    57344,
                    61440,
                    1e-3,
                    2.0**-9,
                    2.0**-10,
                    2.0**-16,
                    2.0**-17,
                    math.nan,
                    1e-20,
                ]
            ),
        ]
    )
    for source in (torch.float32, torch.bfloat16, torch.float16):
        v = x.to(source)
        for dtype in (
            torch.float16,
            torch.bfloat16,
            torch.float64,
            torch.float8_e4m3fn,
            torch.float8_e5m2,
            torch.int8,
            torch.int32,
        ):
            given = v if dtype.is_floating_point else v.nan_to_num().clamp(-100, 100)
            out = torch.empty(len(v), dtype=dtype)
            cast_kernel[(7,)](given, out, len(v), 64)
            # Triton's casts saturate
            top = {torch.float8_e4m3fn: 448, torch.float8_e5m2: 57344}.get(dtype, math.inf)
            yield out, given.float().clamp(-top, top).to(dtype), 0
    for dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
        codes, out = torch.arange(256, dtype=torch.uint8).view(dtype), torch.empty(256)
        cast_kernel[(4,)](codes, out, 256, 64)
        yield out, codes.float(), 0


@triton.jit
def transpose_kernel(x, out, M, N, BLOCK: tl.constexpr):
    r = (tl.program_id(0) * BLOCK + tl.arange(0, BLOCK))[:, None]
    c = (tl.program_id(1) * BLOCK + tl.arange(0, BLOCK))[None, :]
    v = tl.load(x + r * N + c, mask=(r < M) & (c < N))
    tl.store(
        out + tl.trans(c) * M + tl.trans(r), tl.trans(v), mask=(tl.trans(c) < N) & (tl.trans(r) < M)
    )


@case
def transpose():
    for dtype in (torch.float32, torch.float16, torch.uint8):
        x, out = (torch.rand(70, 90) * 100).to(dtype), torch.empty(90, 70, dtype=dtype)
        transpose_kernel[(3, 3)](x, out, 70, 90, 32)
        yield out, x.t(), 0


@triton.jit
def reductions_kernel(x, cols, rows, total, M: tl.constexpr, N: tl.constexpr):
    v = tl.load(x + tl.arange(0, M)[:, None] * N + tl.arange(0, N)[None, :])
    tl.store(cols + tl.arange(0, N), tl.sum(v, 0))
    tl.store(rows + tl.arange(0, M), tl.max(v, 1))
    tl.store(total, tl.sum(v))


@case
def reductions():
    for warps in (1, 4, 8):
        x, cols, rows, total = torch.randn(64, 32), torch.empty(32), torch.empty(64), torch.empty(1)
        reductions_kernel[(1,)](x, cols, rows, total, 64, 32, num_warps=warps)
        yield cols, x.sum(0), 1e-5
        yield rows, x.amax(1), 0
        yield total, x.sum()[None], 1e-4


@triton.jit
def cross_entropy_kernel(x, target, out, n, BLOCK: tl.constexpr):
    row, i = tl.program_id(0), tl.arange(0, BLOCK)
    v = tl.load(x + row * n + i, mask=i < n, other=-float("inf")).to(tl.float32)
    top = tl.max(v, 0)
    tl.store(
        out + row,
        tl.log(tl.sum(tl.exp(v - top), 0))
        + top
        - tl.load(x + row * n + tl.load(target + row)).to(tl.float32),
    )


@case
def cross_entropy():
    x, target, out = (
        torch.randn(20, 1000, dtype=torch.bfloat16),
        torch.randint(0, 1000, (20,)),
        torch.empty(20),
    )
    cross_entropy_kernel[(20,)](x, target, out, 1000, 1024)
    yield out, F.cross_entropy(x.float(), target, reduction="none"), 1e-5


@triton.jit
def reorder_kernel(x, out, N: tl.constexpr):
    i = tl.arange(0, N)
    v = tl.load(x + i)
    even, odd = tl.split(tl.reshape(v, (N // 2, 2)))
    tl.store(out + i, tl.interleave(odd, even))
    tl.store(out + N + i, tl.flip(v, 0))
    tl.store(out + 2 * N + i, tl.reshape(tl.join(even, odd).permute(1, 0), (N,)))


@case
def join_split_flip():
    x, out = torch.randn(256), torch.empty(3, 256)
    reorder_kernel[(1,)](x, out, 256)
    pairs = x.view(-1, 2)
    yield out, torch.stack([pairs.flip(1).flatten(), x.flip(0), pairs.t().flatten()]), 0


@triton.jit
def split_k_kernel(a, b, c, N, K, SPLIT: tl.constexpr, B: tl.constexpr):
    m, n = tl.program_id(0) * B + tl.arange(0, B), tl.program_id(1) * B + tl.arange(0, B)
    acc = tl.zeros((B, B), tl.float32)
    for k in range(tl.program_id(2) * (K // SPLIT), (tl.program_id(2) + 1) * (K // SPLIT), B):
        kk = k + tl.arange(0, B)
        acc += tl.dot(
            tl.load(a + m[:, None] * K + kk[None, :]), tl.load(b + kk[:, None] * N + n[None, :])
        )
    tl.atomic_add(c + m[:, None] * N + n[None, :], acc)


@case
def split_k():
    a, b, c = (
        torch.randn(64, 256, dtype=torch.float16),
        torch.randn(256, 64, dtype=torch.float16),
        torch.zeros(64, 64),
    )
    split_k_kernel[(2, 2, 4)](a, b, c, 64, 256, 4, 32)
    yield c, a.float() @ b.float(), 1e-4


@triton.jit
def lock_kernel(lock, count):
    while tl.atomic_cas(lock, 0, 1) == 1:
        pass
    tl.store(count, tl.load(count) + 1)
    tl.debug_barrier()
    tl.atomic_xchg(lock, 0)


@case
def spin_lock():
    lock, count = torch.zeros(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int32)
    lock_kernel[(12,)](lock, count, num_warps=1)
    yield count, torch.tensor([12]), 0


@triton.jit
def last_arriver_kernel(x, partial, arrived, out, n, GROUPS: tl.constexpr, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(partial + tl.program_id(0), tl.sum(tl.load(x + i, mask=i < n, other=0.0), 0))
    tl.debug_barrier()
    if tl.atomic_add(arrived, 1) == GROUPS - 1:
        tl.store(out, tl.sum(tl.load(partial + tl.arange(0, GROUPS), volatile=True), 0))


@case
def last_workgroup_reduces():
    x, partial, arrived, out = (
        torch.randn(2000),
        torch.empty(32),
        torch.zeros(1, dtype=torch.int32),
        torch.empty(1),
    )
    last_arriver_kernel[(32,)](x, partial, arrived, out, 2000, 32, 64)
    yield out, x.sum()[None], 1e-4


@triton.autotune([triton.Config({"BLOCK": 64}), triton.Config({"BLOCK": 1024})], key=["n"])
@triton.jit
def tuned_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out + i, tl.load(x + i, mask=i < n) * 2, mask=i < n)


@case
def autotuned():
    x, out = torch.randn(1000), torch.empty(1000)
    tuned_kernel[lambda meta: (triton.cdiv(1000, meta["BLOCK"]),)](x, out, 1000)
    yield out, x * 2, 0


@pytest.mark.parametrize("timing, schedule", MODE_PARAMS)
@pytest.mark.parametrize("name", CASES)
def test_ordinary_kernel(name, timing, schedule):
    torch.manual_seed(0)
    with gfx950.emulate(timing, schedule) as gpu:
        for i, (result, expected, tolerance) in enumerate(CASES[name]()):
            assert agrees(result, expected, tolerance), f"result {i}"
    assert gpu.launches


# ------------------------------------------------------------------------------------------ Gluon
# pipelines

copies = gl.amd.cdna4.async_copy


@gluon.jit
def pipeline_kernel(
    a,
    b,
    c,
    M,
    N,
    K,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    BUFFERS: gl.constexpr,
    LOOSE: gl.constexpr,
):
    """C = A B^T in bf16 with BUFFERS tiles of direct-to-LDS copies in flight or in use. LOOSE > 0
    waits for too few."""
    mma: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 32], True, [2, 2])
    load: gl.constexpr = gl.BlockedLayout([1, 8], [8, 8], [4, 1], [1, 0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(8, 1, 8, [1, 0])
    m0, n0 = gl.program_id(0) * BM, gl.program_id(1) * BN
    tile_a = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BM, BK], shared)
    tile_b = gl.allocate_shared_memory(gl.bfloat16, [BUFFERS, BN, BK], shared)
    m = (m0 + gl.arange(0, BM, gl.SliceLayout(1, load)))[:, None]
    n = (n0 + gl.arange(0, BN, gl.SliceLayout(1, load)))[:, None]
    k = gl.arange(0, BK, gl.SliceLayout(0, load))[None, :]
    acc = gl.zeros([BM, BN], gl.float32, mma)
    for t in gl.static_range(BUFFERS - 1):
        copies.buffer_load_to_shared(
            tile_a.index(t), a, m * K + t * BK + k, mask=(m < M) & (t * BK + k < K)
        )
        copies.buffer_load_to_shared(
            tile_b.index(t), b, n * K + t * BK + k, mask=(n < N) & (t * BK + k < K)
        )
        copies.commit_group()
    for t in range(gl.cdiv(K, BK)):
        copies.wait_group(BUFFERS - 2 + LOOSE)  # the compiler adds the barrier
        x = copies.load_shared_relaxed(tile_a.index(t % BUFFERS), gl.DotOperandLayout(0, mma, 8))
        y = copies.load_shared_relaxed(
            tile_b.index(t % BUFFERS).permute([1, 0]), gl.DotOperandLayout(1, mma, 8)
        )
        u = t + BUFFERS - 1
        copies.buffer_load_to_shared(
            tile_a.index(u % BUFFERS), a, m * K + u * BK + k, mask=(m < M) & (u * BK + k < K)
        )
        copies.buffer_load_to_shared(
            tile_b.index(u % BUFFERS), b, n * K + u * BK + k, mask=(n < N) & (u * BK + k < K)
        )
        copies.commit_group()
        acc = gl.amd.cdna4.mfma(x, y, acc)
    copies.wait_group(0)
    row = (m0 + gl.arange(0, BM, gl.SliceLayout(1, mma)))[:, None]
    col = (n0 + gl.arange(0, BN, gl.SliceLayout(0, mma)))[None, :]
    gl.amd.cdna4.buffer_store(acc, c, row * N + col, mask=(row < M) & (col < N))


def run_pipeline(buffers, loose=0):
    generator = torch.Generator().manual_seed(0)
    m, n, k = 100, 72, 272
    a, b = (torch.randn(r, k, generator=generator, dtype=torch.bfloat16) for r in (m, n))
    c = torch.empty(m, n)
    pipeline_kernel[(2, 2)](a, b, c, m, n, k, 64, 64, 64, buffers, loose)
    return c, a.double() @ b.double().T, 2.0**-22 * (a.double().abs() @ b.double().abs().T).max()


@pytest.mark.parametrize("buffers", [2, 3])
def test_pipeline_identical_in_every_mode(buffers):
    results = []
    for timing, schedule in MODES:
        with gfx950.emulate(timing, schedule, seed=7):
            c, expected, tolerance = run_pipeline(buffers)
        assert agrees(c, expected, tolerance), (timing, schedule)
        results.append(c)
    assert all(torch.equal(c, results[0]) for c in results)


@pytest.mark.parametrize("buffers", [2, 3])
def test_loose_wait_passes_eager_and_is_caught_lazy(buffers):
    for schedule in ("lockstep", "skew", "random"):
        with gfx950.emulate("eager", schedule):
            assert agrees(*run_pipeline(buffers, loose=1))
        with gfx950.emulate("lazy", schedule), pytest.raises(gfx950.GPUFault) as fault:
            run_pipeline(buffers, loose=1)
        # by the file's name alone: Triton's cache keeps the folder in which the kernel was first
        # compiled
        source, first = Path(__file__).name, pipeline_kernel.fn.__code__.co_firstlineno
        lines = [
            int(x) - first for x in re.findall(rf"{re.escape(source)}:(\d+)", str(fault.value))
        ]
        body = pipeline_kernel.src.splitlines()
        read, copy = (
            next(i for i, text in enumerate(body) if word in text)
            for word in ("load_shared_relaxed", "buffer_load_to_shared")
        )
        offset = lines[1] - read  # co_firstlineno counts from the decorator, src from `def`
        assert 0 <= offset <= 1 and lines[0] - offset in (copy, copy + 1), str(fault.value)
        assert re.search(
            r"wave \d of workgroup \(\d, \d, 0\), lane \d+, address 0x", str(fault.value)
        )


@gluon.jit
def scaled_pipeline_kernel(
    a,
    b,
    b_scale,
    c,
    N,
    K: gl.constexpr,
    BM: gl.constexpr,
    BN: gl.constexpr,
    BK: gl.constexpr,
    LOOSE: gl.constexpr,
):
    """C = A (B scaled)^T, A e4m3, B mxfp4 [N, K/2], K a multiple of BK; copies double-buffered,
    scales in registers."""
    mma: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [1, 4])
    # BK is 256: a wave copies 4 rows
    load_a: gl.constexpr = gl.BlockedLayout([1, 16], [4, 16], [4, 1], [1, 0])
    load_b: gl.constexpr = gl.BlockedLayout([1, 16], [8, 8], [4, 1], [1, 0])
    left: gl.constexpr = gl.DotOperandLayout(0, mma, 16)
    right: gl.constexpr = gl.DotOperandLayout(1, mma, 16)
    scales: gl.constexpr = gl.amd.cdna4.get_mfma_scale_layout(right, [BN, BK // 32])
    tile_a = gl.allocate_shared_memory(
        gl.float8e4nv, [2, BM, BK], gl.SwizzledSharedLayout(16, 1, 4, [1, 0])
    )
    tile_b = gl.allocate_shared_memory(
        gl.uint8, [2, BN, BK // 2], gl.SwizzledSharedLayout(16, 1, 8, [1, 0])
    )
    n0 = gl.program_id(0) * BN
    m, ka = (
        gl.arange(0, BM, gl.SliceLayout(1, load_a))[:, None],
        gl.arange(0, BK, gl.SliceLayout(0, load_a))[None, :],
    )
    n = (n0 + gl.arange(0, BN, gl.SliceLayout(1, load_b)))[:, None]
    kb = gl.arange(0, BK // 2, gl.SliceLayout(0, load_b))[None, :]
    ns = (n0 + gl.arange(0, BN, gl.SliceLayout(1, scales)))[:, None]
    ks = gl.arange(0, BK // 32, gl.SliceLayout(0, scales))[None, :]
    acc = gl.zeros([BM, BN], gl.float32, mma)
    copies.buffer_load_to_shared(tile_a.index(0), a, m * K + ka)
    copies.buffer_load_to_shared(tile_b.index(0), b, n * (K // 2) + kb)
    copies.commit_group()
    for t in range(K // BK):
        copies.wait_group(LOOSE)
        x = copies.load_shared_relaxed(tile_a.index(t % 2), left)
        y = copies.load_shared_relaxed(tile_b.index(t % 2).permute([1, 0]), right)
        u = t + 1
        more = u * BK < K
        copies.buffer_load_to_shared(
            tile_a.index(u % 2), a, m * K + u * BK + ka, mask=(m >= 0) & more
        )
        copies.buffer_load_to_shared(
            tile_b.index(u % 2), b, n * (K // 2) + u * (BK // 2) + kb, mask=(n >= 0) & more
        )
        copies.commit_group()
        s = gl.amd.cdna4.buffer_load(b_scale, ns * (K // 32) + t * (BK // 32) + ks)
        acc = gl.amd.cdna4.mfma_scaled(x, None, "e4m3", y, s, "e2m1", acc)
    row = gl.arange(0, BM, gl.SliceLayout(1, mma))[:, None]
    col = (n0 + gl.arange(0, BN, gl.SliceLayout(0, mma)))[None, :]
    gl.amd.cdna4.buffer_store(acc, c, row * N + col)


def run_scaled_pipeline(loose=0):
    (b, scale, values), a = (
        random_operand(256, 768, "e2m1"),
        torch.randn(32, 768).to(torch.float8_e4m3fn),
    )
    c = torch.empty(32, 256)
    scaled_pipeline_kernel[(2,)](a, b, scale, c, 256, 768, 32, 128, 256, loose)
    return c, a.double() @ values.T, 2.0**-22 * (a.double().abs() @ values.abs().T).max()


@pytest.mark.parametrize("timing, schedule", MODE_PARAMS)
def test_scaled_pipeline(timing, schedule):
    with gfx950.emulate(timing, schedule):
        assert agrees(*run_scaled_pipeline())
    with gfx950.emulate(timing, schedule):
        if timing == "lazy":
            with pytest.raises(gfx950.GPUFault, match="in flight|race"):
                run_scaled_pipeline(loose=1)
        elif timing == "eager":
            assert agrees(*run_scaled_pipeline(loose=1))


# ------------------------------------------------------------------------------------------ mutants


def caught(run, modes=(("lazy", "lockstep"),)):
    """Whether some mode raises a fault or gives a wrong result."""
    for mode in modes:
        torch.manual_seed(0)
        try:
            with gfx950.emulate(*mode):
                results = run()
                results = [results] if isinstance(results, tuple) else list(results)
        except gfx950.GPUFault:
            return True
        if not all(agrees(*r) for r in results):
            return True
    return False


MUTATED = {
    "softmax": run_softmax,
    "bf16 matmul": lambda **kw: run_matmul(torch.bfloat16, **kw),
    "scaled matmul": lambda **kw: run_scaled_matmul("e4m3", "e2m1", **kw),
    "attention": run_attention,
    "top-k": run_sort,
    "paged gather": run_paged,
}


@pytest.mark.parametrize("name", MUTATED)
@pytest.mark.parametrize("change", [{"load_extra": 1}, {"store_extra": 1}, {"skip": 0}])
def test_mask_store_and_output_mutants(name, change):
    """A load mask off by one, a store out of bounds, an output tile never written. torch.empty is
    poisoned, so that the last shows."""
    assert not caught(MUTATED[name])
    assert caught(lambda: MUTATED[name](**change))


def replace(program, pc, text):
    """Swaps one instruction for another and returns the old one."""
    old = program.code[pc]
    new = parse_instruction(text, old.where, program.accum_offset)
    new.pc, new.labels, new.run = pc, program.labels, first_run(new)
    program.code[pc] = new
    return old


def never_binds(run, pc, counter):
    """Whether a wait could be one looser with no effect: at no execution was it this wait that
    completed its oldest."""
    bound, original = [], Queue.wait

    def watch(queue, w, keep):
        if watch.pc == pc and queue is getattr(queue.m, counter):
            bound.append(
                any(
                    (r.left & (r.seq == queue.issued[r.w.g] - keep - 1) & w.member[r.w.ids]).any()
                    for r in queue.records
                )
            )
        original(queue, w, keep)

    watch.pc = None
    with pytest.MonkeyPatch.context() as patch, gfx950.emulate():
        patch.setattr(Queue, "wait", watch)
        with gfx950.compile_only() as gpu:
            list_or_tuple(run())
        code = gpu.launches[0].program.code
        inner = code[pc].run

        def here(w):
            watch.pc = pc
            try:
                return inner(w)
            finally:
                watch.pc = None

        code[pc].run = here
        try:
            list_or_tuple(run())
        finally:
            code[pc].run = inner
    return not any(bound)


def list_or_tuple(results):
    return results if isinstance(results, tuple) else list(results)


SWEPT = {
    "bf16 matmul": lambda: run_matmul(torch.bfloat16),
    "attention": run_attention,
    "layernorm": CASES["layernorm"],
    "paged gather": run_paged,
    "top-k": run_sort,
    "double buffer": lambda: run_pipeline(2),
    "triple buffer": lambda: run_pipeline(3),
    "scaled pipeline": run_scaled_pipeline,
}
HARD_MODES = (("lazy", "lockstep"), ("lazy", "skew"), ("eager", "skew"), ("random", "random"))


@pytest.mark.parametrize("name", SWEPT)
def test_every_wait_one_looser(name):
    """Each s_waitcnt of the compiled kernel, each counter, one looser: caught, or it never had to
    wait for that one."""
    run = SWEPT[name]
    with gfx950.emulate() as gpu:
        list_or_tuple(run())
    program, tried = gpu.launches[0].program, 0
    drain = gpu.launches[0].counters.loop()["last"] if "buffer" in name else len(program.code)
    # past its loop a pipeline drains copies that nobody reads
    for pc, ins in enumerate(program.code[:drain]):
        for counter, queue in (("vmcnt", "vm"), ("lgkmcnt", "ds")):
            if ins.op == "s_waitcnt" and counter in ins.mods:
                old = replace(
                    program,
                    pc,
                    re.sub(
                        rf"{counter}\((\d+)\)",
                        lambda m, c=counter: f"{c}({int(m[1]) + 1})",
                        ins.text,
                    ),
                )
                try:
                    found = caught(run, HARD_MODES)
                finally:
                    program.code[pc] = old
                assert found or never_binds(run, pc, queue), f"{old.text} at {old.where}"
                tried += 1
    assert tried


# Triton 3.9 double-buffers the tiles of tl.dot and keeps a barrier that this makes redundant.
ALL_BARRIERS_NEEDED = ["attention", "layernorm", "top-k"] + [
    "bf16 matmul"
] * triton.__version__.startswith("3.7")


@pytest.mark.parametrize("name", ALL_BARRIERS_NEEDED)
def test_every_barrier_removed(name):
    run = SWEPT[name]
    with gfx950.emulate() as gpu:
        list_or_tuple(run())
    program, counts = gpu.launches[0].program, gpu.launches[0].counters.counts
    barriers = [pc for pc, ins in enumerate(program.code) if ins.op == "s_barrier" and counts[pc]]
    for pc in barriers:
        old = replace(program, pc, "s_nop 0")
        try:
            assert caught(run, HARD_MODES), f"barrier at {old.where}"
        finally:
            program.code[pc] = old
    assert barriers


@pytest.mark.parametrize("buffers", [2, 3])
def test_pipeline_barrier_removed(buffers):
    """A barrier of the loop protects both the tile that arrived and the tile about to be
    overwritten."""
    with gfx950.emulate() as gpu:
        run_pipeline(buffers)
    program, loop = gpu.launches[0].program, gpu.launches[0].counters.loop()
    barriers = [i for i in range(loop["first"], loop["last"]) if program.code[i].op == "s_barrier"]
    for pc in barriers:
        old = replace(program, pc, "s_nop 0")
        try:
            assert caught(lambda: run_pipeline(buffers), [("lazy", "lockstep")])
            assert caught(lambda: run_pipeline(buffers), [("eager", "skew")])
        finally:
            program.code[pc] = old
    assert barriers


# ------------------------------------------------------------------------------------------
# counters


def test_counters():
    with gfx950.emulate() as gpu:
        c, *_ = run_pipeline(3)
    (launch,) = gpu.launches
    counters, m, n, k = launch.counters, 100, 72, 272
    assert (
        launch.waves == 16
        and launch.grid == (2, 2, 1)
        and launch.profile["lds"] == 3 * 2 * 64 * 64 * 2
    )
    # waves x K tiles x MFMAs of a 32 x 32 x 64 tile
    assert counters.instructions["matrix"] == 16 * 5 * 8
    assert counters.cycles["matrix"] == 16 * counters.instructions["matrix"]
    a, b, out = (counters.tensors[name] for name in "abc")
    # once per column of tiles
    assert (a["read"], a["read_unique"], a["size"]) == (2 * m * k * 2, m * k * 2, m * k * 2)
    assert (b["read"], b["read_unique"]) == (2 * n * k * 2, n * k * 2)
    assert out == {
        "size": m * n * 4,
        "read": 0,
        "read_unique": 0,
        "write": m * n * 4,
        "write_unique": m * n * 4,
    }
    # two tiles, four 16-byte copies a lane each
    assert counters.peak_bytes_in_flight == 2 * 4 * 1024
    loop = counters.loop()
    assert (
        loop["instructions"]["matrix"] == 8
        and loop["instructions"]["copy to lds"] == 4
        and loop["iterations"] == 16 * 5
    )
    assert "vmcnt(4)" in " ".join(loop["waits"]) and "vmcnt(0)" not in " ".join(loop["waits"])
    text = gfx950.table(launch)
    assert "pipeline_kernel" in text and "*" in text and max(gfx950.resources(launch).values()) > 0


@pytest.mark.parametrize("timing, schedule", QUICK)
def test_trace(timing, schedule):
    x, steps = torch.tensor([1, 6, 7, 9], dtype=torch.int32), [0, 8, 16, 19]
    total = 0
    for workgroup in range(4):  # of one wave each, so that the traces together are all that ran
        with gfx950.emulate(timing, schedule, trace=workgroup) as gpu:
            collatz_kernel[(4,)](x, torch.empty(4, dtype=torch.int32), num_warps=1)
        (launch,) = gpu.launches
        code, trace = launch.program.code, launch.trace
        assert trace[0] == 0 and code[trace[-1]].op == "s_endpgm"
        # the loop's test has one more
        assert np.bincount(trace).max() in (steps[workgroup], steps[workgroup] + 1)
        jumps = {(a, b) for a, b in itertools.pairwise(trace) if b != a + 1}
        assert all(code[a].op.startswith(("s_branch", "s_cbranch")) for a, b in jumps)
        total += np.bincount(trace, minlength=len(code))
    assert np.array_equal(total, launch.counters.counts)

    with gfx950.emulate(timing, schedule, trace=4) as gpu:
        run_pipeline(3)  # 4 workgroups: 0 to 3
        a, b, c = (
            torch.ones(64, 320).bfloat16(),
            torch.ones(320, 320).bfloat16(),
            torch.empty(64, 320),
        )
        pipeline_kernel[(1, 5)](a, b, c, 64, 320, 320, 64, 64, 64, 3, 0)
    small, large = gpu.launches
    loop = large.counters.loop()
    assert (
        small.trace == []
        and large.trace.count(loop["first"]) == large.trace.count(loop["last"]) == 320 // 64
    )
    assert np.array_equal(
        20 * np.bincount(large.trace, minlength=len(large.program.code)), large.counters.counts
    )
    with gfx950.emulate(timing, schedule) as gpu:
        run_pipeline(3)
    assert gpu.launches[0].trace is None


def drawn_pipeline(K):
    a, b, c = torch.ones(64, K).bfloat16(), torch.ones(64, K).bfloat16(), torch.empty(64, 64)
    with gfx950.emulate(trace=0) as gpu:
        pipeline_kernel[(1, 1)](a, b, c, 64, 64, K, 64, 64, 64, 3, 0)
    return gpu.launches[0], draw_loop.draw(gpu.launches[0], "64 < 65")


def test_draw_loop():
    launch, svg = drawn_pipeline(320)
    root = ElementTree.fromstring(svg)
    width, height = float(root.get("width")), float(root.get("height"))
    texts, boxes = ([e for e in root.iter() if e.tag.endswith(tag)] for tag in ("}text", "}rect"))
    shown = [t.text for t in texts]
    assert {"matrix", "LDS", "copy to LDS", "vector ALU", "scalar", "wait, barrier"} < set(shown)
    assert (
        "global memory" not in shown
        and "vmcnt(4) lgkmcnt(0)" in shown
        and any("64 < 65" in text for text in shown)
    )
    assert any("matrix 128," in text for text in shown)  # 8 MFMAs of 16 cycles an iteration
    lefts = [float(b.get("x", 0)) for b in boxes]
    assert all(
        x >= 0 and x + float(b.get("width")) <= width for x, b in zip(lefts, boxes, strict=True)
    )
    assert all(float(b.get("y", 0)) + float(b.get("height")) <= height for b in boxes)
    spans = [
        (x, x + float(b.get("width")))
        for x, b in zip(lefts, boxes, strict=True)
        if b.get("class") == "c0"
    ]
    # one matrix pipe
    assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
    tips = [b[0].text.split()[0] for b in boxes if len(b)]
    loop = launch.counters.loop()
    body = [ins.op for ins in launch.program.code[loop["first"] : loop["last"] + 1]]
    for op in ("s_barrier", "s_waitcnt", "buffer_load_dwordx4"):  # all of two iterations
        assert tips.count(op) == 2 * body.count(op) > 0
    # names lines, not this machine's folders
    assert "test_gfx950_kernels.py:" in svg and str(Path.cwd()) not in svg
    with pytest.raises(SystemExit, match="enters pipeline_kernel's loop 3 times, 4 needed"):
        drawn_pipeline(192)


@triton.jit
def strided_lds_kernel(x, out, STRIDE: tl.constexpr):
    i = tl.arange(0, 64)
    tl.store(out + i, tl.load(x + i * STRIDE))


def test_requested_and_unique_bytes():
    x, out = torch.randn(64 * 4), torch.empty(64)
    with gfx950.emulate() as gpu:
        strided_lds_kernel[(8,)](x, out, 4, num_warps=1)
    t = gpu.launches[0].counters.tensors["x"]
    assert t["read"] == 8 * 256 and t["read_unique"] == 256 and t["size"] == 1024


# ------------------------------------------------------------------------------------------ the
# driver


def test_driver_is_restored_and_nests():
    before = triton.runtime.driver._active
    with gfx950.emulate(), gfx950.compile_only():
        target = triton.runtime.driver.active.get_current_target()
        assert (target.backend, target.arch, target.warp_size) == ("hip", "gfx950", 64)
    assert triton.runtime.driver._active is before
    with pytest.raises(gfx950.GPUFault), gfx950.emulate():
        list(run_softmax(store_extra=1))
    assert triton.runtime.driver._active is before


def test_compile_only_needs_no_memory():
    big = torch.empty(1 << 34, device="meta", dtype=torch.bfloat16)
    with gfx950.compile_only() as gpu:
        pipeline_kernel[(1 << 16, 1)](
            big, big, big.float(), 1 << 20, 1 << 14, 1 << 14, 64, 64, 64, 3, 0
        )
    (launch,) = gpu.launches
    assert launch.counters is None and launch.grid == (1 << 16, 1, 1) and launch.waves == 4 << 16
    assert (
        launch.profile["vgpr_spills"] == 0
        and launch.profile["vgprs"] > 0
        and launch.profile["occupancy"] >= 1
    )
    assert "compiled only" in gfx950.table(launch)


@triton.jit
def arguments_kernel(
    out, i8: tl.int8, u16: tl.uint16, i64, f, flag: tl.int1, pair, N: tl.constexpr
):
    tl.store(out, i8)
    tl.store(out + 1, u16)
    tl.store(out + 2, i64)
    tl.store(out + 3, (f * 8).to(tl.int64))
    tl.store(out + 4, flag.to(tl.int64))
    tl.store(out + 5, tl.load(pair[0]) + pair[1] + N)
    tl.store(out + 6, tl.num_programs(0) * 100 + tl.num_programs(1) * 10 + tl.num_programs(2))


def test_argument_kinds():
    out = torch.zeros(7, dtype=torch.int64)
    with gfx950.emulate():
        arguments_kernel[(2, 3, 4)](
            out,
            -5,
            65000,
            -(1 << 40),
            2.625,
            True,
            (torch.tensor([40], dtype=torch.int64), 7),
            1000,
        )
    assert out.tolist() == [-5, 65000, -(1 << 40), 21, 1, 1047, 234]


def test_bad_arguments():
    with pytest.raises(ValueError, match="'later' is none of"):
        gfx950.emulate(timing="later").__enter__()
    with (
        gfx950.emulate(),
        pytest.raises(
            gfx950.GPUFault, match=r"outside every tensor: byte 400 of out, which has 400"
        ),
    ):
        add_kernel[(1,)](torch.randn(200), torch.randn(200), torch.empty(100), 200, 256)


def test_fault_names_line_wave_lane_address():
    with gfx950.emulate(), pytest.raises(gfx950.GPUFault) as fault:
        add_kernel[(2,)](torch.randn(500), torch.randn(500), torch.empty(300), 500, 256)
    line = (
        next(i for i, text in enumerate(add_kernel.src.splitlines()) if "tl.store" in text)
        + add_kernel.starting_line_number
    )
    text = str(fault.value)
    assert f"test_gfx950_kernels.py:{line + 1}" in text or f"test_gfx950_kernels.py:{line}" in text
    # element 300 = 256 + 44
    assert re.search(r"wave 0 of workgroup \(1, 0, 0\), lane 44, address 0x", text)


def test_empty_tensors_are_poisoned():
    with gfx950.emulate():
        assert (
            torch.empty(3, 5).isnan().all()
            and torch.empty_like(torch.zeros(4, dtype=torch.bfloat16)).isnan().all()
        )
        assert (torch.empty(4, dtype=torch.int32) == -1).all()
    assert not np.isnan(torch.zeros(3).numpy()).any()


@triton.jit
def to_f16_kernel(x, out, HOW: tl.constexpr):
    i = tl.arange(0, 256)
    tl.store(out + i, tl.load(x + i).to(tl.float16, fp_downcast_rounding=HOW))


def test_a_conversion_towards_zero():
    """Triton sets the rounding mode around it and sets it back."""
    x = torch.randn(256, generator=torch.Generator().manual_seed(0)) * torch.logspace(-8, 4, 256)
    near, zero = torch.empty(256, dtype=torch.float16), torch.empty(256, dtype=torch.float16)
    with gfx950.emulate():
        to_f16_kernel[(1,)](x, near, "rtne")
        to_f16_kernel[(1,)](x, zero, "rtz")
    assert torch.equal(near, x.half())
    assert (zero.float().abs() <= x.abs()).all() and (zero != near).any()
    beyond = torch.nextafter(zero.float().half(), x.sign().half() * math.inf).float()
    assert (beyond.abs() > x.abs()).all()
