"""From the equations to the shipped decode kernel, in eight steps: the first GEMM of the experts
and SwiGLU (gptoss.dispatch_swiglu) for AMD gfx950. docs/porting.md is the text to this file.

    python tools/steps.py                     emulates every step, checks it, prints its counts
    python tools/steps.py --step 3            of that one
    python tools/steps.py --step 3 --shape    its loads, waits and products, in order
    python tools/steps.py --step 3 --assembly all instructions, and how often they were executed
    python tools/steps.py --write             the tables of docs/porting.md

Every step is a function of the same arguments with the same result, and a whole kernel:

    x        bf16 [T, K], T <= 16          the tokens
    chosen   int [T, k]                    the experts of each token
    experts  weights.Experts, mxfp4        as the checkpoint has them
    -> h     [T * k, N/2]                  SwiGLU(x @ w.T + bias), sorted by expert

Names are those of moe_gluon.py: a pair is a token and one of its experts; a place is a pair's
position when pairs are sorted by expert; a tile is the places of one expert. K = H is the inner
size of the GEMM, N = 2I its outer size: columns of the product, which are rows of the stored weight
and alternate gate and up. 32 values of K, a group, share a scale."""

import argparse
import collections
import functools
import re
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.experimental.gluon.language as gl
import triton.language as tl
from triton.experimental import gluon

sys.path.insert(0, str(Path(__file__).parents[1]))
from bench_moe import expert_bytes, random_experts
from tables import refresh

import gfx950
import gptoss
import moe_gluon
from bench import table
from gfx950.counters import kb_in_flight
from moe_gluon import iota, load_tile

cdna4 = gl.amd.cdna4
load = cdna4.buffer_load
LIMIT = tl.constexpr(7.0)  # of SwiGLU
NAN = tl.constexpr(tl.PropagateNan.ALL)

# --------------------------------------------------------------------------------------------------
# Step 0: the equations in plain Triton. A program is a pair and BI values of its h


@triton.jit
def e2m1(code):
    """What a code of 4 bits stands for: 0, .5, 1, 1.5, 2, 3, 4, 6, and the same with a sign."""
    c = (code & 7).to(tl.float32)
    magnitude = tl.where(c < 4, c * 0.5, tl.where(c < 6, c - 2, c * 2 - 8))
    return tl.where(code < 8, magnitude, -magnitude)


@triton.jit
def e8m0(byte):
    """2^(byte - 127). Float32's exponent field holds it but for its two ends."""
    bits = byte.to(tl.int32) << 23
    bits = tl.where(byte == 0, 1 << 22, tl.where(byte == 255, 0x7FC00000, bits))
    return bits.to(tl.float32, bitcast=True)


@triton.jit
def swiglu(gate, up):
    """Minimum and maximum that return NaN if either operand is NaN."""
    gate, up = tl.minimum(gate, LIMIT, NAN), tl.clamp(up, -LIMIT, LIMIT, NAN)
    return gate * tl.sigmoid(1.702 * gate) * (up + 1)


@triton.jit
def times_rows(x, w, w_scale, row, exists, K: tl.constexpr, BK: tl.constexpr):
    """float32 [rows]: x [K] times these rows of w [*, K/2] with w_scale [*, K/32]."""
    acc = tl.zeros(row.shape, tl.float32)
    for k in range(0, K // 2, BK // 2):  # a byte is two values of K, the low nibble first
        k += tl.arange(0, BK // 2)
        inside = exists[:, None] & (k < K // 2)
        even = tl.load(x + 2 * k, mask=k < K // 2, other=0).to(tl.float32)
        odd = tl.load(x + 2 * k + 1, mask=k < K // 2, other=0).to(tl.float32)
        codes = tl.load(w + row[:, None] * (K // 2) + k, mask=inside, other=0)
        scale = e8m0(tl.load(w_scale + row[:, None] * (K // 32) + k // 16, mask=inside, other=0))
        products = even * (e2m1(codes & 15) * scale) + odd * (e2m1(codes >> 4) * scale)
        acc += tl.sum(products, 1)
    return acc


@triton.jit
def plain_kernel(
    x, w, w_scale, bias, chosen, places, h, K: tl.constexpr, N: tl.constexpr, TOP_K: tl.constexpr,
    BI: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    pair, i = tl.program_id(1), tl.program_id(0) * BI + tl.arange(0, BI)
    gate_row = tl.load(chosen + pair).to(tl.int64) * N + 2 * i
    gate = times_rows(x + pair // TOP_K * K, w, w_scale, gate_row, i < N // 2, K, BK)
    up = times_rows(x + pair // TOP_K * K, w, w_scale, gate_row + 1, i < N // 2, K, BK)
    gate += tl.load(bias + gate_row, mask=i < N // 2, other=0).to(tl.float32)
    up += tl.load(bias + gate_row + 1, mask=i < N // 2, other=0).to(tl.float32)
    y = swiglu(gate, up).to(tl.bfloat16)
    tl.store(h + tl.load(places + pair) * (N // 2) + i, y, mask=i < N // 2)


def plain(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts)
    places = chosen.flatten().argsort(stable=True).argsort()
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias
    grid = triton.cdiv(N // 2, 16), T * top_k
    plain_kernel[grid](x, *weight, chosen.int(), places.int(), h, K, N, top_k, BI=16, BK=256)
    return h


def sizes(experts, block: int = 2) -> tuple[int, int]:
    """K and N, which has to be whole blocks."""
    E, N, K = experts.gate_up_weight.shape
    if N % block:
        raise ValueError(f"{N} columns: this step takes a multiple of {block}")
    return K * 2, N


# --------------------------------------------------------------------------------------------------
# Step 1: a program is an active expert and BN columns: whoever chose it, its weights are read once


@triton.jit
def tiled_kernel(
    x, w, w_scale, bias, tiles, num_tiles, pairs, h, K: tl.constexpr, N: tl.constexpr,
    TOP_K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
):  # fmt: skip
    t, n = tl.program_id(1), tl.program_id(0) * BN + tl.arange(0, BN)
    if t >= tl.load(num_tiles):  # the grid is for the most tiles there can be
        return
    expert, first = tl.load(tiles + 4 * t), tl.load(tiles + 4 * t + 1)
    count = tl.load(tiles + 4 * t + 2)
    place, exists = first + tl.arange(0, 16), tl.arange(0, 16) < count
    token = tl.load(pairs + place, mask=exists, other=0) // TOP_K
    row = expert.to(tl.int64) * N + n
    acc = tl.zeros([16, BN], tl.float32)
    for start in range(0, K, BK):
        k, byte = start + tl.arange(0, BK), start // 2 + tl.arange(0, BK // 2)
        group = start // 32 + tl.arange(0, BK // 32)
        rows = tl.load(x + token[:, None] * K + k, mask=exists[:, None] & (k < K), other=0)
        inside = (n < N)[:, None] & (byte < K // 2)
        codes = tl.load(w + row[:, None] * (K // 2) + byte, mask=inside, other=0)
        inside = (n < N)[:, None] & (group < K // 32)
        scale = tl.load(w_scale + row[:, None] * (K // 32) + group, mask=inside, other=127)
        values = tl.join(e2m1(codes & 15), e2m1(codes >> 4)).reshape(BN, BK // 32, 32)
        columns = (values * e8m0(scale)[:, :, None]).reshape(BN, BK).to(tl.bfloat16)  # exact
        acc = tl.dot(rows, columns.T, acc)
    acc += tl.load(bias + row, mask=n < N, other=0).to(tl.float32)[None, :]
    gate, up = tl.split(acc.reshape(16, BN // 2, 2))
    i = tl.program_id(0) * (BN // 2) + tl.arange(0, BN // 2)
    y = swiglu(gate, up).to(tl.bfloat16)
    tl.store(h + place[:, None] * (N // 2) + i, y, mask=exists[:, None] & (i < N // 2))


def tiled(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts)
    lists = list_tiles(chosen, len(experts.gate_up_weight))
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias
    grid = triton.cdiv(N, 64), len(lists[0])
    tiled_kernel[grid](x, *weight, *lists, h, K, N, top_k, BN=64, BK=128)
    return h


def list_tiles(chosen, E: int):
    """What moe_gluon.route_kernel leaves on the device: tiles int32 [most, 4] (expert, first place,
    places, unused), how many there are, and the pairs by place. An expert is a token's at most
    once, so 16 tokens make one tile of it."""
    expert, pairs = chosen.flatten().sort(stable=True)
    active, count = expert.unique(return_counts=True)
    tiles = torch.full((min(E, len(pairs)), 4), -1, device=chosen.device)
    tiles[: len(active), :3] = torch.stack([active, count.cumsum(0) - count, count], 1)
    num_tiles = torch.tensor([len(active)], dtype=torch.int32, device=chosen.device)
    return tiles.int(), num_tiles, pairs.int()


# --------------------------------------------------------------------------------------------------
# Step 2: the instruction that multiplies fp8 by fp4 and both by their scales, through Gluon


@gluon.jit
def scaled_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, K: gl.constexpr, N: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    """A workgroup of 4 waves: 16 rows by 64 columns, 16 of them a wave's."""
    # The product [16, 64]: lane L holds row L % 16 and 4 columns from 4 * (L // 16) of its wave's.
    ACC: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [1, 4])
    # Its operands x [16, 128] and w [64 bytes, 64]: lane L holds row (column) L % 16 and, of every
    # 64 bytes of K, the 16 bytes L // 16.
    X: gl.constexpr = gl.DotOperandLayout(0, ACC, 16)
    W: gl.constexpr = gl.DotOperandLayout(1, ACC, 16)
    # Their scales [16, 4] and [64, 4]: lane L holds row L % 16 (of every 16), group L // 16.
    XS: gl.constexpr = cdna4.get_mfma_scale_layout(X, [16, 4])
    WS: gl.constexpr = cdna4.get_mfma_scale_layout(W, [64, 4])
    # The same x [16, 128] and w [64, 64 bytes] as memory is read: 16 lanes a row of x, 8 bytes
    # each; 4 lanes a row of w, 16 bytes each.
    XM: gl.constexpr = gl.BlockedLayout([1, 8], [4, 16], [4, 1], [1, 0])
    WM: gl.constexpr = gl.BlockedLayout([1, 16], [16, 4], [4, 1], [1, 0])

    t, n = gl.program_id(1), gl.program_id(0) * 64
    if t >= gl.load(num_tiles):
        return
    expert, first, count = load_tile(tiles, t)
    w += (expert.to(gl.int64) * N + n) * (K // 2)
    w_scale += (expert.to(gl.int64) * N + n) * (K // 32)
    # Where the first 128 of K are. iota(axis, size, layout) is 0 .. size - 1 along that axis.
    k, exists = iota(1, 128, XM), iota(0, 16, XM) < count
    x_at = load_tokens(pairs, first, count, TOP_K, XM) * K + k
    x_group, scale_exists = iota(1, 4, XS), iota(0, 16, XS) < count
    xs_at = load_tokens(pairs, first, count, TOP_K, XS) * (K // 32) + x_group
    byte, w_group = iota(1, 64, WM), iota(1, 4, WS)
    w_at = iota(0, 64, WM) * (K // 2) + byte
    ws_at = iota(0, 64, WS) * (K // 32) + w_group

    acc = gl.zeros([16, 64], gl.float32, ACC)
    for start in range(0, K, 128):
        # a lane that is masked off asks memory for nothing and reads 0
        rows = load(x, x_at + start, exists & (k + start < K))
        inside = scale_exists & (x_group + start // 32 < K // 32)
        x_scales = load(x_scale, xs_at + start // 32, inside)
        columns = load(w, w_at + start // 2, byte + start // 2 < K // 2)
        w_scales = load(w_scale, ws_at + start // 32, w_group + start // 32 < K // 32)
        rows = gl.convert_layout(rows, X)
        columns = gl.convert_layout(columns.permute(1, 0), W)
        acc = cdna4.mfma_scaled(rows, x_scales, "e4m3", columns, w_scales, "e2m1", acc)
    acc += load(bias, expert * N + n + iota(1, 64, ACC), None)
    store_swiglu(acc, h, first, count, n // 2, N)


@gluon.jit
def load_tokens(pairs, first, count, TOP_K: gl.constexpr, layout: gl.constexpr):
    """int32 [16, 1]: the token at each place of a tile."""
    return load_pairs(pairs, first, count, layout) // TOP_K


@gluon.jit
def load_pairs(pairs, first, count, layout: gl.constexpr):
    ROWS: gl.constexpr = layout.rank - 2
    i = iota(ROWS, 16, layout)
    return load(pairs, first + i, i < count)


@gluon.jit
def store_swiglu(acc, h, first, count, i, N: gl.constexpr):
    """acc [16, 64], columns in their order, to 32 values of h from i. moe_gluon.swiglu is step 0's,
    by fewer instructions."""
    y = moe_gluon.swiglu(acc, LIMIT).to(gl.bfloat16)
    row = iota(0, 16, y.type.layout)
    at = (first + row) * (N // 2) + i + iota(1, 32, y.type.layout)
    cdna4.buffer_store(y, h, at, mask=row < count)


def scaled(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts, 64)
    lists = list_tiles(chosen, len(experts.gate_up_weight))
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias.float()
    grid = N // 64, len(lists[0])
    scaled_kernel[grid](*mxfp8(x), *weight, *lists, h, K, N, top_k, num_warps=4)
    return h


def mxfp8(x):
    """x [T, K] -> e4m3 bytes [T, K], E8M0 bytes [T, K/32]. The scale's exponent is that of the
    group's largest value less 8, e4m3's own largest (OCP MX 6.3); values round to even and
    saturate."""
    groups = x.float().unflatten(-1, (-1, 32))  # [T, K/32, 32]
    bits = groups.abs().amax(-1).view(torch.int32)  # of a group with NaN: NaN
    exponent = ((bits >> 23) - 127 - 8).clamp(min=-127)
    values = torch.ldexp(groups, -exponent[..., None]).clamp(-448, 448).to(torch.float8_e4m3fn)
    scale = torch.where(bits > 0x7F800000, 255, exponent + 127).to(torch.uint8)
    return values.view(torch.uint8).flatten(-2), scale


# --------------------------------------------------------------------------------------------------
# Step 3: weights in the order of the instruction's operand, so memory to registers and no LDS


@gluon.jit
def packed_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, K: gl.constexpr, N: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [1, 4])
    X: gl.constexpr = gl.DotOperandLayout(0, ACC, 16)
    W: gl.constexpr = gl.DotOperandLayout(1, ACC, 16)
    XS: gl.constexpr = cdna4.get_mfma_scale_layout(X, [16, 4])
    WS: gl.constexpr = cdna4.get_mfma_scale_layout(W, [64, 4])

    t, n = gl.program_id(1), gl.program_id(0) * 64
    if t >= gl.load(num_tiles):
        return
    expert, first, count = load_tile(tiles, t)
    w += (expert.to(gl.int64) * N + n) * (K // 2)
    w_scale += (expert.to(gl.int64) * N + n) * (K // 32)
    k, exists = iota(1, 128, X), iota(0, 16, X) < count
    x_at = load_tokens(pairs, first, count, TOP_K, X) * K + k
    x_group, scale_exists = iota(1, 4, XS), iota(0, 16, XS) < count
    xs_at = load_tokens(pairs, first, count, TOP_K, XS) * (K // 32) + x_group
    # w [N/16, K/32, 16, 16]: a strip is 16 columns, in which 16 bytes of each follow one another
    byte, column, w_group = iota(0, 64, W), iota(1, 64, W), iota(1, 4, WS)
    w_at = column // 16 * (16 * K // 2) + byte // 16 * 256 + column % 16 * 16 + byte % 16
    ws_at = iota(0, 64, WS) * (K // 32) + w_group

    acc = gl.zeros([16, 64], gl.float32, ACC)
    for start in range(0, K, 128):
        rows = load(x, x_at + start, exists & (k + start < K))
        inside = scale_exists & (x_group + start // 32 < K // 32)
        x_scales = load(x_scale, xs_at + start // 32, inside)
        columns = load(w, w_at + start // 32 * 256, byte + start // 2 < K // 2)
        w_scales = load(w_scale, ws_at + start // 32, w_group + start // 32 < K // 32)
        acc = cdna4.mfma_scaled(rows, x_scales, "e4m3", columns, w_scales, "e2m1", acc)
    acc += load(bias, expert * N + n + iota(1, 64, ACC), None)
    store_swiglu(acc, h, first, count, n // 2, N)


def packed(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts, 64)
    lists = list_tiles(chosen, len(experts.gate_up_weight))
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = in_strips(experts.gate_up_weight), experts.gate_up_scale, experts.gate_up_bias.float()
    grid = N // 64, len(lists[0])
    packed_kernel[grid](*mxfp8(x), *weight, *lists, h, K, N, top_k, num_warps=4)
    return h


def in_strips(w):
    """[E, N, K/2] -> [E, N/16, K/32, 16, 16]: the 64 lanes of a load read 1,024 bytes in a row."""
    E, N, width = w.shape
    return w.view(E, N // 16, 16, width // 16, 16).transpose(2, 3).contiguous()


# --------------------------------------------------------------------------------------------------
# Step 4: columns dealt in blocks of 64: a lane has 16 neighbours, and 4 scales in a dword


@gluon.jit
def dealt_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, K: gl.constexpr, N: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    """A workgroup of one wave: 16 rows by a block of 64 columns."""
    ACC: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [1, 1])
    X: gl.constexpr = gl.DotOperandLayout(0, ACC, 16)
    W: gl.constexpr = gl.DotOperandLayout(1, ACC, 16)
    XS: gl.constexpr = cdna4.get_mfma_scale_layout(X, [16, 4])
    WS: gl.constexpr = cdna4.get_mfma_scale_layout(W, [64, 4])
    # Scales of w as they lie in memory, [4 groups, 16, 4 strips]: lane L reads the dword L
    DWORD: gl.constexpr = gl.BlockedLayout([1, 1, 4], [4, 16, 1], [1, 1, 1], [2, 1, 0])

    t, n = gl.program_id(1), gl.program_id(0) * 64
    if t >= gl.load(num_tiles):
        return
    expert, first, count = load_tile(tiles, t)
    w += (expert.to(gl.int64) * N + n) * (K // 2)
    w_scale += (expert.to(gl.int64) * N + n) * (K // 32)
    k, exists = iota(1, 128, X), iota(0, 16, X) < count
    x_at = load_tokens(pairs, first, count, TOP_K, X) * K + k
    x_group, scale_exists = iota(1, 4, XS), iota(0, 16, XS) < count
    xs_at = load_tokens(pairs, first, count, TOP_K, XS) * (K // 32) + x_group
    byte, position, w_group = iota(0, 64, W), iota(1, 64, W), iota(0, 4, DWORD)
    w_at = position // 16 * (16 * K // 2) + byte // 16 * 256 + position % 16 * 16 + byte % 16
    ws_at = w_group * 64 + iota(1, 16, DWORD) * 4 + iota(2, 4, DWORD)

    acc = gl.zeros([16, 64], gl.float32, ACC)
    for start in range(0, K, 128):
        rows = load(x, x_at + start, exists & (k + start < K))
        inside = scale_exists & (x_group + start // 32 < K // 32)
        x_scales = load(x_scale, xs_at + start // 32, inside)
        columns = load(w, w_at + start // 32 * 256, byte + start // 2 < K // 2)
        w_scales = load(w_scale, ws_at + start // 32 * 64, w_group + start // 32 < K // 32)
        w_scales = w_scales.permute(2, 1, 0).reshape(64, 4)  # position 16 t + c is strip t, c
        w_scales = gl.convert_layout(w_scales, WS, assert_trivial=True)  # no lane moves a byte
        acc = cdna4.mfma_scaled(rows, x_scales, "e4m3", columns, w_scales, "e2m1", acc)
    acc += load(bias, expert * N + n + column_of(iota(1, 64, ACC)), None)
    store_swiglu(in_order(acc), h, first, count, n // 2, N)


@gluon.jit
def column_of(position):
    """Position 16 t + 4 g + i of a block is its column 16 g + 4 t + i."""
    return position // 4 % 4 * 16 + position // 16 * 4 + position % 4


@gluon.jit
def in_order(acc):
    """[16, 64]: the registers of 64 positions under their columns' names."""
    return acc.reshape(16, 4, 4, 4).permute(0, 2, 1, 3).reshape(16, 64)  # t, g, i to g, t, i


def dealt(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts, 64)
    lists = list_tiles(chosen, len(experts.gate_up_weight))
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = *deal(experts.gate_up_weight, experts.gate_up_scale), experts.gate_up_bias.float()
    grid = N // 64, len(lists[0])
    dealt_kernel[grid](*mxfp8(x), *weight, *lists, h, K, N, top_k, num_warps=1)
    return h


def deal(w, scale):
    """[E, N, K/2], [E, N, K/32] -> [E, N/16, K/32, 16, 16], [E, N/64, K/32, 16, 4]: strips of
    columns by position; the scales of a block's 4 strips are the bytes of a dword."""
    E, N, groups = scale.shape
    # [E, N/64, g, t, i, *], as column 16 g + 4 t + i
    w, scale = w.view(E, N // 64, 4, 4, 4, -1), scale.view(E, N // 64, 4, 4, 4, groups)
    w = w.transpose(2, 3).reshape(E, N, -1)  # t, g, i
    scale = scale.permute(0, 1, 5, 2, 4, 3)  # [E, N/64, K/32, g, i, t]
    return in_strips(w), scale.reshape(E, N // 64, groups, 16, 4)


# --------------------------------------------------------------------------------------------------
# Step 5: K split over the waves of a workgroup


@gluon.jit
def split_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, K: gl.constexpr, N: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    """A workgroup of 4 waves: 16 rows by a block of 64 columns. Every tensor has a leading axis, of
    which a wave holds one element: of every 512 of K, wave v multiplies 128 * v .. + 127."""
    ACC: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [4, 1, 1])  # [4, 16, 64]
    X: gl.constexpr = gl.DotOperandLayout(0, ACC, 16)  # [4, 16, 128]
    W: gl.constexpr = gl.DotOperandLayout(1, ACC, 16)  # [4, 64 bytes, 64]
    # [4, 16, 4], [4, 64, 4], [4, 4 groups, 16, 4 strips]: in a wave as before. What each bit of the
    # number of a register, lane and wave adds to the index:
    ROWS: gl.constexpr = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 0, 1], [0, 0, 2]]
    WAVES: gl.constexpr = [[1, 0, 0], [2, 0, 0]]
    STRIPS: gl.constexpr = [[0, 16, 0], [0, 32, 0]]
    XS: gl.constexpr = gl.DistributedLinearLayout([], ROWS, WAVES, [], [4, 16, 4])
    WS: gl.constexpr = gl.DistributedLinearLayout(STRIPS, ROWS, WAVES, [], [4, 64, 4])
    DWORD: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 4, 16, 1], [4, 1, 1, 1], [3, 2, 1, 0])

    t, n = gl.program_id(1), gl.program_id(0) * 64
    if t >= gl.load(num_tiles):
        return
    expert, first, count = load_tile(tiles, t)
    w += (expert.to(gl.int64) * N + n) * (K // 2)
    w_scale += (expert.to(gl.int64) * N + n) * (K // 32)
    k, exists = iota(0, 4, X) * 128 + iota(2, 128, X), iota(1, 16, X) < count
    x_at = load_tokens(pairs, first, count, TOP_K, X) * K + k
    x_group, scale_exists = iota(0, 4, XS) * 4 + iota(2, 4, XS), iota(1, 16, XS) < count
    xs_at = load_tokens(pairs, first, count, TOP_K, XS) * (K // 32) + x_group
    byte, position = iota(0, 4, W) * 64 + iota(1, 64, W), iota(2, 64, W)
    w_at = position // 16 * (16 * K // 2) + byte // 16 * 256 + position % 16 * 16 + byte % 16
    w_group = iota(0, 4, DWORD) * 4 + iota(1, 4, DWORD)
    ws_at = w_group * 64 + iota(2, 16, DWORD) * 4 + iota(3, 4, DWORD)

    acc = gl.zeros([4, 16, 64], gl.float32, ACC)
    for start in range(0, K, 512):
        rows = load(x, x_at + start, exists & (k + start < K))
        inside = scale_exists & (x_group + start // 32 < K // 32)
        x_scales = load(x_scale, xs_at + start // 32, inside)
        columns = load(w, w_at + start // 32 * 256, byte + start // 2 < K // 2)
        w_scales = load(w_scale, ws_at + start // 32 * 64, w_group + start // 32 < K // 32)
        w_scales = w_scales.permute(0, 3, 2, 1).reshape(4, 64, 4)
        w_scales = gl.convert_layout(w_scales, WS, assert_trivial=True)
        acc = cdna4.mfma_scaled(rows, x_scales, "e4m3", columns, w_scales, "e2m1", acc)
    acc = sum_waves(acc)
    acc += load(bias, expert * N + n + column_of(iota(1, 64, SUM)), None)
    store_swiglu(in_order(acc), h, first, count, n // 2, N)


# [4, 16, 64]: a lane holds all waves' values of 4 columns; and [16, 64], its sum over waves
TOGETHER = gl.constexpr(gl.BlockedLayout([4, 1, 4], [1, 4, 16], [1, 4, 1], [2, 1, 0]))
SUM = gl.constexpr(gl.SliceLayout(0, TOGETHER.value))


@gluon.jit
def sum_waves(acc):
    """[4, 16, 64] -> [16, 64] by way of LDS. A lane reads the same 4 columns of all waves and adds
    them in the order of waves: one order, so the same bits in every run."""
    # rows turned against each other, by 4 columns each, so that lanes meet in no bank
    PLACES: gl.constexpr = gl.SwizzledSharedLayout(4, 1, 16, [2, 1, 0])
    memory = gl.allocate_shared_memory(gl.float32, [4, 16, 64], PLACES, acc)
    gl.barrier()
    return gl.sum(memory.load(TOGETHER), axis=0)


def split(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts, 64)
    lists = list_tiles(chosen, len(experts.gate_up_weight))
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = *deal(experts.gate_up_weight, experts.gate_up_scale), experts.gate_up_bias.float()
    grid = N // 64, len(lists[0])
    split_kernel[grid](*mxfp8(x), *weight, *lists, h, K, N, top_k, num_warps=4)
    return h


# --------------------------------------------------------------------------------------------------
# Step 6: ask for everything before the first product


@gluon.jit
def ahead_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, K: gl.constexpr, N: gl.constexpr,
    TOP_K: gl.constexpr,
):  # fmt: skip
    ACC: gl.constexpr = gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [4, 1, 1])
    X: gl.constexpr = gl.DotOperandLayout(0, ACC, 16)
    W: gl.constexpr = gl.DotOperandLayout(1, ACC, 16)
    ROWS: gl.constexpr = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 0, 1], [0, 0, 2]]
    WAVES: gl.constexpr = [[1, 0, 0], [2, 0, 0]]
    STRIPS: gl.constexpr = [[0, 16, 0], [0, 32, 0]]
    XS: gl.constexpr = gl.DistributedLinearLayout([], ROWS, WAVES, [], [4, 16, 4])
    WS: gl.constexpr = gl.DistributedLinearLayout(STRIPS, ROWS, WAVES, [], [4, 64, 4])
    DWORD: gl.constexpr = gl.BlockedLayout([1, 1, 1, 4], [1, 4, 16, 1], [4, 1, 1, 1], [3, 2, 1, 0])

    t, n = gl.program_id(1), gl.program_id(0) * 64
    if t >= gl.load(num_tiles):
        return
    expert, first, count = load_tile(tiles, t)
    # First what the loads of x and the end wait for: memory answers in the order of the requests.
    pair = load_pairs(pairs, first, count, X)
    scale_pair = load_pairs(pairs, first, count, XS)
    n += column_of(iota(1, 64, SUM))
    bias = load(bias, expert * N + n, None)
    # Then all weights, which wait for the expert's number alone. A tuple holds what was asked for;
    # when it is compiled no loop is left.
    w += (expert.to(gl.int64) * N + gl.program_id(0) * 64) * (K // 2)
    w_scale += (expert.to(gl.int64) * N + gl.program_id(0) * 64) * (K // 32)
    byte, position = iota(0, 4, W) * 64 + iota(1, 64, W), iota(2, 64, W)
    w_at = position // 16 * (16 * K // 2) + byte // 16 * 256 + position % 16 * 16 + byte % 16
    w_group = iota(0, 4, DWORD) * 4 + iota(1, 4, DWORD)
    ws_at = w_group * 64 + iota(2, 16, DWORD) * 4 + iota(3, 4, DWORD)
    acc, weights = gl.zeros([4, 16, 64], gl.float32, ACC), ()
    for start in gl.static_range(0, K, 512):
        columns = load(w, w_at + start // 32 * 256, byte + start // 2 < K // 2)
        w_scales = load(w_scale, ws_at + start // 32 * 64, w_group + start // 32 < K // 32)
        weights = weights + ((columns, w_scales),)
        acc = pin(acc, 16)
    # Then all of x.
    k, exists = iota(0, 4, X) * 128 + iota(2, 128, X), iota(1, 16, X) < count
    x_at = pin(pair, 1) // TOP_K * K + k
    x_group, scale_exists = iota(0, 4, XS) * 4 + iota(2, 4, XS), iota(1, 16, XS) < count
    xs_at = pin(scale_pair, 1) // TOP_K * (K // 32) + x_group
    activations = ()
    for start in gl.static_range(0, K, 512):
        rows = load(x, x_at + start, exists & (k + start < K))
        inside = scale_exists & (x_group + start // 32 < K // 32)
        x_scales = load(x_scale, xs_at + start // 32, inside)
        activations = activations + ((rows, x_scales),)
        acc = pin(acc, 16)
    for start in gl.static_range(0, K, 512):
        columns, w_scales = weights[start // 512]
        rows, x_scales = activations[start // 512]
        w_scales = w_scales.permute(0, 3, 2, 1).reshape(4, 64, 4)
        w_scales = gl.convert_layout(w_scales, WS, assert_trivial=True)
        acc = cdna4.mfma_scaled(rows, x_scales, "e4m3", columns, w_scales, "e2m1", acc)
    acc = sum_waves(acc) + bias
    store_swiglu(in_order(acc), h, first, count, gl.program_id(0) * 32, N)


@gluon.constexpr_function
def unchanged(registers):
    """Constraints of an instruction that returns its operands, so many registers, as they are and,
    for all the compiler knows, touches memory."""
    return ",".join(["=v"] * registers + [str(i) for i in range(registers)] + ["~{memory}"])


@gluon.jit
def pin(x, registers: gl.constexpr):
    """x, of so many registers a lane, through an empty instruction. Loads written above it are
    issued above it, and what uses its result is computed below it. Without it LLVM moves loads down
    to their uses, to save registers."""
    SAME: gl.constexpr = unchanged(registers)
    return gl.inline_asm_elementwise(
        "; pin", SAME, [x], dtype=x.dtype, is_pure=False, pack=registers
    )


def ahead(x, chosen, experts):
    (T, top_k), (K, N) = chosen.shape, sizes(experts, 64)
    lists = list_tiles(chosen, len(experts.gate_up_weight))
    h = torch.empty(T * top_k, N // 2, dtype=torch.bfloat16, device=x.device)
    weight = *deal(experts.gate_up_weight, experts.gate_up_scale), experts.gate_up_bias.float()
    grid = N // 64, len(lists[0])
    ahead_kernel[grid](*mxfp8(x), *weight, *lists, h, K, N, top_k, num_warps=4)
    return h


# --------------------------------------------------------------------------------------------------
# Step 7: the shipped kernel, which also quantises h


def shipped(x, chosen, experts):
    """-> h as the second GEMM reads it: e4m3 bytes [T * k, N/2] and their scales [T * k, N/64]."""
    T, top_k = chosen.shape
    SLOTS = triton.next_power_of_2(top_k)  # a pair's number is token * SLOTS + slot
    tiles, num_tiles, pairs = list_tiles(chosen, len(experts.gate_up_weight))
    pairs = pairs // top_k * SLOTS + pairs % top_k
    slots = chosen.new_empty(T, SLOTS)
    values, scale = mxfp8(x)
    scale = F.pad(scale, (0, moe_gluon.scale_bytes(x.shape[1]) - scale.shape[1]))  # whole dwords
    routing = moe_gluon.Routing(
        values, scale, slots, None, pairs, tiles, num_tiles, BM=moe_gluon.DECODE_TOKENS, top_k=top_k
    )
    h, h_scale = moe_gluon.dispatch_swiglu(routing, moe_gluon.prepare(experts, "mxfp8"))
    return h[: T * top_k], h_scale[: T * top_k]


# --------------------------------------------------------------------------------------------------
# What runs, checks and counts the steps

plain.activations = tiled.activations = "bf16"  # what a step multiplies; the others mxfp8
STEPS = (plain, tiled, scaled, packed, dealt, split, ahead, shipped)
DOCS = Path(__file__).parents[1] / "docs"


def problem(chosen, E: int, K: int, N: int) -> tuple:
    """The arguments of a step for tokens that chose these of E made-up experts."""
    x = torch.randn(len(chosen), K, generator=torch.Generator().manual_seed(0))
    return x.bfloat16(), chosen, random_experts("openai", E, K, N // 2)


def counted_problem() -> tuple:
    """K of the 120b model, 4 blocks of its 90 of columns; 4 tokens, 8 pairs, 4 of 8 experts."""
    return problem(torch.tensor([[0, 1], [1, 2], [1, 5], [2, 5]]), E=8, K=2880, N=256)


def oracle(step, x, chosen, experts) -> torch.Tensor:
    """float32 [T * k, N/2]: the equations, of x as the step's GEMM sees it. Steps 0 and 1, and what
    has `activations` "bf16", multiply bf16, the others mxfp8; of these only the shipped one rounds
    h to mxfp8."""
    expert, order = chosen.flatten().sort(stable=True)
    routing = gptoss.Routing(chosen, None, order, collections.Counter(expert.tolist()))
    activations = "mxfp8" if step is shipped else "bf16"
    if step is not shipped and getattr(step, "activations", "mxfp8") != "bf16":
        x = gptoss.quantise_mx(x.float(), "mxfp8")
    return gptoss.dispatch_swiglu(x, routing, experts, activations, LIMIT.value)


def emulated(step, *arguments, **modes):
    """-> h as float32, and the launch."""
    with gfx950.emulate(**modes) as gpu:
        h = step(*arguments)
    if step is shipped:
        values, scale = h[0].view(torch.float8_e4m3fn).float(), h[1][:, : h[0].shape[1] // 32]
        h = (values.unflatten(-1, (-1, 32)) * gptoss.E8M0[scale.int()][..., None]).flatten(-2)
    (launch,) = gpu.launches
    return h.float(), launch


# h in bf16 is off by at most half of its last of 8 bits, which bounds the norm of the error as
# well. The same roundings to mxfp8 are the same values, but where the order of float32 sums tips
# one: 1 of 10^5.
TOLERANCE = 2**-9


def error(step, got, arguments) -> float:
    """Relative, L2."""
    want = oracle(step, *arguments)
    return float((got - want).norm() / want.norm())


@functools.cache
def counts(step) -> dict:
    """What the emulator counts of a step, of all waves together."""
    arguments = counted_problem()
    x, chosen, experts = arguments
    h, launch = emulated(step, *arguments)
    found = error(step, h, arguments)
    if not found <= TOLERANCE:  # nor NaN
        sys.exit(f"{step.__name__} is wrong: relative L2 error {found:.1e}")
    print(f"{step.__name__}: relative L2 error {found:.1e}", file=sys.stderr)
    c, p, (K, N) = launch.counters, launch.profile, sizes(experts)
    active, waves = len(chosen.unique()), launch.waves // (launch.grid[0] * launch.grid[1])
    busy = launch.grid[0] * (chosen.numel() if step is plain else active)  # programs with work
    read = {name: t["read"] for name, t in c.tensors.items()}
    weights = read.pop("w") + read.pop("w_scale")
    run = collections.Counter()
    for ins, n in zip(launch.program.code, c.counts.tolist(), strict=True):
        run[ins.text] += n
    return {
        "weights": weights / (active * expert_bytes(N * K, "mxfp8")),
        "others": sum(read.values()) / 1000,
        "stored": sum(t["write"] for t in c.tensors.values()) / 1000,
        "flight": kb_in_flight(launch, busy * 5760 // N),  # were N that of 120b
        "loads": c.instructions["vector load"],
        "stores": c.instructions["vector store"],
        "drains": sum(n for text, n in run.items() if "vmcnt(0)" in text) / (busy * waves),
        "matrix": c.cycles["matrix"],
        "vector": c.instructions["vector"],
        "lds": sum(n * lds_bytes(text) for text, n in run.items()) / 1000,
        "conflicts": c.cycles["bank conflicts"],
        "registers": p["vgprs"] + p["agprs"],
        "spills": p["vgpr_spills"] + p["sgpr_spills"],
        "waves": waves,
    }


def lds_bytes(instruction: str) -> int:
    """That 64 lanes move through LDS."""
    found = re.match(r"ds_(?:read|write|bpermute)(2?)\w*_b(\d+)", instruction)
    return 64 * (1 + bool(found[1])) * int(found[2]) // 8 if found else 0


ROWS = {
    "weights": ("weight bytes requested / least", ".3f"),
    "others": ("all other bytes requested, KB", ",.0f"),
    "stored": ("bytes stored, KB", ",.1f"),
    "loads": ("load instructions", ",.0f"),
    "stores": ("store instructions", ",.0f"),
    "waves": ("waves of a workgroup", "d"),
    "flight": ("KB in flight a CU, modelled", ".0f"),
    "drains": ("waits a wave for all it asked for", ".0f"),
    "matrix": ("matrix cycles", ",.0f"),
    "vector": ("vector instructions", ",.0f"),
    "lds": ("KB through LDS", ",.0f"),
    "conflicts": ("bank conflict cycles", ",.0f"),
    "registers": ("registers a lane", "d"),
    "spills": ("spilled registers", "d"),
}


def steps_table(steps, rows=tuple(ROWS)) -> str:
    """A column a step."""
    columns = [("", "what", "")]
    columns += [(f"{STEPS.index(s)} {s.__name__}", s.__name__, "") for s in steps]
    lines = []
    for row in rows:
        what, form = ROWS[row]
        lines.append({"what": what} | {s.__name__: format(counts(s)[row], form) for s in steps})
    return table(columns, lines)


def bytes_table() -> str:
    """Who asks for what in the shipped kernel."""
    _, launch = emulated(shipped, *counted_problem())
    rows = [
        {"tensor": f"`{name}`", "requested": t["read"] + t["write"]}
        | {"distinct": t["read_unique"] + t["write_unique"], "why": WHY[name]}
        for name, t in launch.counters.tensors.items()
    ]
    rows.sort(key=lambda row: (-row["requested"], row["tensor"]))
    columns = [("tensor", "tensor", ""), ("bytes requested", "requested", ",d")]
    return table([*columns, ("distinct", "distinct", ",d"), ("which are", "why", "")], rows)


# Of the counted problem: 16 programs with work, 4 blocks of columns by 4 experts, of 4 waves each
WHY = {
    "w": "16 programs x 64 columns x 1,440 bytes of two values",
    "w_scale": "16 programs x 64 columns x 90 groups",
    "x": "8 pairs x 4 blocks x 2,880 bytes: every block asks for the rows again",
    "x_scale": "8 pairs x 4 blocks x 90 groups",
    "bias": "8 pairs x 4 blocks x 64 columns x 4 bytes: the lanes of every row ask",
    "pairs": "8 pairs x 4 blocks x 16 lanes x 4 bytes: 4 lanes of each of 4 waves hold a row",
    "tiles": "16 programs x 4 waves x 3 numbers of 4 bytes",
    "num_tiles": "32 programs x 4 waves x 4 bytes: those without work ask, too",
    "h": "stored: 8 pairs x 128 values",
    "h_scale": "stored: 8 pairs x 4 groups",
}


def body(step) -> list:
    """The instructions of the steady loop, or where there is none of the whole kernel."""
    _, launch = emulated(step, *counted_problem())
    loop = launch.counters.loop()
    return launch.program.code[loop["first"] : loop["last"] + 1] if loop else launch.program.code


def products(step) -> str:
    """The matrix instructions."""
    return "\n".join(ins.text for ins in body(step) if ins.op.startswith("v_mfma"))


def shape(step) -> str:
    """What touches memory or multiplies, in order, with what is waited for."""
    wanted = re.compile(r"buffer_(load|store)|global_|ds_|v_mfma|s_waitcnt|s_barrier")
    names = [ins.text if ins.op == "s_waitcnt" else ins.op for ins in body(step)]
    return "\n".join(folded([name for name in names if wanted.match(name)]))


def folded(names: list[str]) -> list[str]:
    """Lines, in which what comes several times in a row stands once."""
    lines, i = [], 0

    def covers(period):
        block, times = names[i : i + period], 1
        while names[i + period * times : i + period * (times + 1)] == block:
            times += 1
        return (period * times if times > 1 else 1), -period

    while i < len(names):
        length, period = max(covers(period) for period in range(1, 17))
        period = -period if length > 1 else 1
        times, block = length // period, names[i : i + period]
        if period > 1:
            lines += [f"{times} times:", *("    " + line for line in folded(block))]
        else:
            lines.append(block[0] if times == 1 else f"{block[0]} x {times}")
        i += length
    return lines


# What each step is about
CHANGES = {
    1: ("weights", "others", "vector", "matrix", "lds", "registers"),
    2: ("vector", "matrix", "lds", "conflicts", "registers", "flight"),
    3: ("lds", "conflicts", "others", "loads", "flight"),
    4: ("loads", "others", "vector", "stores", "waves", "flight"),
    5: ("waves", "flight", "drains", "lds", "stores"),
    6: ("flight", "drains", "registers"),
    7: ("stored", "vector", "flight", "registers"),
}
TABLES = {
    "steps": lambda: steps_table(STEPS),
    "bytes of the shipped kernel": bytes_table,
    **{
        f"step {i}": functools.partial(steps_table, STEPS[i - 1 : i + 1], rows)
        for i, rows in CHANGES.items()
    },
    **{
        f"shape of step {i}": lambda step=step: f"```\n{shape(step)}\n```"
        for i, step in enumerate(STEPS)
    },
    **{
        f"products of step {i}": lambda step=step: f"```\n{products(step)}\n```"
        for i, step in enumerate(STEPS)
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description="The decode kernel in steps, emulated.")
    parser.add_argument("--step", type=int, choices=range(len(STEPS)), help="only this one")
    parser.add_argument("--shape", action="store_true", help="loads, waits and products, in order")
    parser.add_argument("--assembly", action="store_true", help="instructions, how often executed")
    parser.add_argument("--write", action="store_true", help="write the tables of docs/porting.md")
    args = parser.parse_args()
    chosen = STEPS if args.step is None else STEPS[args.step : args.step + 1]
    if args.write:
        refresh(DOCS / "porting.md", TABLES, check=False)
    elif args.shape:
        for step in chosen:
            print(f"{step.__name__}\n{shape(step)}\n")
    elif args.assembly:
        for step in chosen:
            _, launch = emulated(step, *counted_problem())
            for ins, n in zip(launch.program.code, launch.counters.counts.tolist(), strict=True):
                print(f"{n:>8}  {ins.text}")
    else:
        print(steps_table(chosen))
    return 0


if __name__ == "__main__":
    sys.exit(main())
