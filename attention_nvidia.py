"""Attention of a decode step in Gluon for NVIDIA GPUs, sm_80 and newer: bfloat16, heads of 64.

    out = attention(qkv, sinks, pool, kind, plan)     # [T, (N + 2G) D] -> [T, N D], one launch

It has the signature of the operation in gptoss.py, and its pages, plans and letters are those of
ops_triton, which attends wherever `attends` says no.

A step is bound by the bytes of the keys and values, and at short contexts by how many latencies
follow each other. A program takes up to 512 keys of a sequence's key head, which all are on their
way before it waits for the kernel before: its 8 warps have some each, straight in the registers of
mma.m16n8k16's right operand. A warp has a softmax of its own; only at the end do they meet, in
shared memory. Where a sequence has more keys there are more programs, each stores its part, and the
last to arrive adds the parts in their order.

What a lane loads is in the order of memory, 16 bytes at a time, and the order in which the matrix
instruction sums or stores is chosen for that. With lane 4 r + c:

    q, k      elements 16 c .. 16 c + 15 of rows (heads, keys) r: elements 16 c + 2 m + h stand for
              input 8 m + 2 c + h of the product
    logits    heads r and r + 8, keys 2 c and 2 c + 1 of each 8: also how the second product reads
              its left operand
    v         elements 8 r .. 8 r + 7 of keys 2 c and 2 c + 1 of each 8: element 8 r + t stands for
              column 8 t + r of the product"""

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

from moe_nvidia import (
    AWAIT_PREVIOUS,
    START_NEXT,
    STAY,
    arrive,
    bits,
    halves,
    iota,
    is_supported,
    order,
    product_layout,
)

WARPS = gl.constexpr(8)
ROWS = gl.constexpr(16)  # of the matrix instruction: query heads that share a key head
D = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)  # exp(x) = 2^(x LOG2E)
LOWEST = gl.constexpr(-1e30)  # below all logits; -inf - -inf would be NaN
SPLIT_KEYS = gl.constexpr(512)  # of a part, while there are no more parts
SPLITS = gl.constexpr(16)  # parts of a sequence's keys, at most
# Blocks of keys: eighths a warp, and blocks in flight. One that all of a window fits in, or parts.
SHORT, LONG = (2, 1), (4, 2)


@gluon.constexpr_function
def keys_layout(J):
    """[WARPS, J, 8, 4, 8 words]: lane 4 r + c holds the 32 bytes c of key r of each 8."""
    registers, lanes = bits(8, 4, 5) + bits(J, 1, 5), bits(4, 3, 5) + bits(8, 2, 5)
    shape = [WARPS.value, J, 8, 4, 8]
    return gl.DistributedLinearLayout(registers, lanes, bits(WARPS.value, 0, 5), [], shape)


@gluon.constexpr_function
def values_layout(J):
    """[WARPS, J, 4, 2, 8, 4 words]: lane 4 r + c holds the 16 bytes r of keys 2 c and 2 c + 1 of
    each 8."""
    registers = bits(4, 5, 6) + bits(2, 3, 6) + bits(J, 1, 6)
    lanes, shape = bits(4, 2, 6) + bits(8, 4, 6), [WARPS.value, J, 4, 2, 8, 4]
    return gl.DistributedLinearLayout(registers, lanes, bits(WARPS.value, 0, 6), [], shape)


@gluon.constexpr_function
def queries_layout():
    """[WARPS, 16, 4, 16]: lane 4 r + c holds elements 16 c .. 16 c + 15 of rows r and r + 8; every
    warp all of them."""
    registers, lanes = bits(16, 3, 4) + bits(2, 1, 4, 8), bits(4, 2, 4) + bits(8, 1, 4)
    shape = [WARPS.value, ROWS.value, 4, 16]
    return gl.DistributedLinearLayout(registers, lanes, bits(WARPS.value, 0, 4), [], shape)


@gluon.constexpr_function
def results_layout():
    """[16, 64]: lane 4 r + c holds elements 16 c .. 16 c + 15 of rows r and r + 8; every warp all
    of them."""
    registers, lanes = bits(16, 1, 2) + bits(2, 0, 2, 8), bits(4, 1, 2, 16) + bits(8, 0, 2)
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * 3, [], [ROWS.value, D.value])


@gluon.jit
def slots(table, first, key, C, PAGE: gl.constexpr):
    """Where the pool has the positions first + key, of which no two share a slot; first % C is
    known."""
    index = first + key
    index = gl.where(index >= C, index - C, index)
    return (gl.load(table + index // PAGE) * PAGE + index % PAGE).to(gl.int64)


@gluon.jit
def load_block(
    pool, table, first, start, length, g, C, J: gl.constexpr, G: gl.constexpr, PAGE: gl.constexpr
):
    """Keys and values start .. of a part of `length`, J times 8 a warp, as words of two: int32
    [WARPS, J, 8, 4, 8] and [WARPS, J, 4, 2, 8, 4]."""
    at_k: gl.constexpr = keys_layout(J)
    key = start + (iota(1, J, at_k, 5) * WARPS + iota(0, WARPS, at_k, 5)) * 8 + iota(2, 8, at_k, 5)
    at = slots(table, first, gl.where(key < length, key, 0), C, PAGE) * (G * D) + g * (D // 2)
    at += iota(3, 4, at_k, 5) * 8 + iota(4, 8, at_k, 5)
    k = gl.load(pool + at, mask=key < length, other=0)
    at_v: gl.constexpr = values_layout(J)
    key = start + (iota(1, J, at_v, 6) * WARPS + iota(0, WARPS, at_v, 6)) * 8
    key += iota(2, 4, at_v, 6) * 2 + iota(3, 2, at_v, 6)
    at = slots(table, first, gl.where(key < length, key, 0), C, PAGE) * (G * D) + g * (D // 2)
    at += G * (D // 2) + iota(4, 8, at_v, 6) * 4 + iota(5, 4, at_v, 6)
    return k, gl.load(pool + at, mask=key < length, other=0)


@gluon.jit
def attend(q, k, v, start, length, top, total, acc, scale):
    """A block of keys into each warp's running softmax. q bfloat16 [WARPS, 16, 64], the left
    operand; k, v: `load_block`; top, the largest logit so far in powers of 2, and total, the sum of
    2^(logit - top): float32 [WARPS, 16]; acc [WARPS, 16, 64]."""
    J: gl.constexpr = k.shape[1]
    product: gl.constexpr = product_layout(WARPS, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    k = halves(k).to(gl.bfloat16, bitcast=True)  # [WARPS, J, r, c, m, h]
    k = gl.convert_layout(
        k.permute(0, 4, 3, 5, 1, 2).reshape(WARPS, D, 8 * J), right, assert_trivial=True
    )
    logits = mma_v2(q, k, gl.full([WARPS, ROWS, 8 * J], 0, gl.float32, product)) * scale
    n = iota(2, 8 * J, product, 3)
    key = start + (n // 8 * WARPS + iota(0, WARPS, product, 3)) * 8 + n % 8
    logits = gl.where(key < length, logits, -float("inf"))
    new = gl.maximum(top, gl.max(logits, axis=2))
    share, fade = gl.exp2(logits - new[:, :, None]), gl.exp2(top - new)
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    p = gl.convert_layout(share.to(gl.bfloat16), left, assert_trivial=True)
    v = halves(v).to(gl.bfloat16, bitcast=True)  # [WARPS, J, c, h, r, t // 2, t % 2]
    v = gl.convert_layout(
        v.permute(0, 1, 2, 3, 5, 6, 4).reshape(WARPS, 8 * J, D), right, assert_trivial=True
    )
    return new, total * fade + gl.sum(share, axis=2), mma_v2(p, v, acc * fade[:, :, None])


@gluon.jit
def rotated(head, c, i, cosine, sine, live):
    """Elements 16 c + i of a head after rotary embedding: the pair of element d is (d, d + 32)."""
    x = gl.load(head + c * 16 + i, mask=live, other=0.0).to(gl.float32)
    other = gl.load(head + (c ^ 2) * 16 + i, mask=live, other=0.0).to(gl.float32)
    return (x * cosine + other * sine).to(gl.bfloat16)


@gluon.jit
def cache_own(qkv, cos, sin, slot, G: gl.constexpr):
    """Caches the key and the value of the token itself, which qkv points to."""
    flat: gl.constexpr = gl.BlockedLayout([2], [32], [WARPS], [0])
    d = gl.arange(0, D, flat)
    x = gl.load(qkv + d).to(gl.float32)
    other = gl.load(qkv + (d + D // 2) % D).to(gl.float32)
    sine = gl.load(sin + d % (D // 2))
    k = x * gl.load(cos + d % (D // 2)) + other * gl.where(d < D // 2, -sine, sine)
    gl.store(slot + d, k.to(gl.bfloat16))
    gl.store(slot + G * D + d, gl.load(qkv + G * D + d))


@gluon.jit(do_not_specialize=["P"])
def decode_kernel(
    qkv, sinks, pool, out, cos, sin, positions, table, parts, arrived, P, scale,
    WINDOW: gl.constexpr, PAGE: gl.constexpr, M: gl.constexpr, G: gl.constexpr, J: gl.constexpr,
    AHEAD: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (g, s, z): part z of the keys that sequence s's one token sees, for the M query heads
    of key head g. Part 0 has the token's own key, which it caches, and the sinks. How many parts
    there are depends on the sequence's length alone. In flight are AHEAD blocks of 8 J keys a warp.
    Padding, at the end, gets what the first sequence gets: a row that repeats its token then meets
    no other experts than that."""
    BLOCK: gl.constexpr = WARPS * J * 8
    product: gl.constexpr = product_layout(WARPS, 1)
    rows: gl.constexpr = gl.SliceLayout(2, product)  # [WARPS, 16]
    g, s, z = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if PDL:
        order(START_NEXT)
    position = gl.load(positions + s)
    if position < 0:
        return
    first = 0
    if WINDOW > 0:
        first = gl.maximum(position - WINDOW + 1, 0)
    keys = position - first
    used = gl.minimum(gl.maximum((keys + SPLIT_KEYS - 1) // SPLIT_KEYS, 1), SPLITS)
    if z >= used:
        return
    length = (keys + used - 1) // used  # of a part
    first += z * length
    length = gl.minimum(length, position - first)
    table += s * P
    C = P * PAGE
    first = first % C
    # What is no result of this layer is on its way while the kernel before makes qkv.
    words = pool.to(gl.pointer_type(gl.int32), bitcast=True)
    ks, vs = (), ()
    for j in gl.static_range(AHEAD):
        k, v = load_block(words, table, first, j * BLOCK, length, g, C, J, G, PAGE)
        ks, vs = ks + (k,), vs + (v,)
    layout: gl.constexpr = queries_layout()
    c, i = iota(2, 4, layout, 4), iota(3, 16, layout, 4)
    cosine = gl.load(cos + s * (D // 2) + c % 2 * 16 + i)
    sine = gl.load(sin + s * (D // 2) + c % 2 * 16 + i)
    sine = gl.where(c < 2, -sine, sine)
    m = iota(1, ROWS, rows, 2)
    sink = gl.load(sinks + g * M + m, mask=m < M, other=0.0).to(gl.float32) * LOG2E
    if PDL:
        order(AWAIT_PREVIOUS)
    qkv += s.to(gl.int64) * ((M * G + 2 * G) * D)
    row = iota(1, ROWS, layout, 4) + 0 * iota(0, WARPS, layout, 4)
    q = rotated(qkv + (g * M + row) * D, c, i, cosine, sine, row < M)
    top = gl.full([WARPS, ROWS], LOWEST, gl.float32, rows)
    total = gl.full([WARPS, ROWS], 0.0, gl.float32, rows)
    acc = gl.full([WARPS, ROWS, D], 0.0, gl.float32, product)
    if z == 0:  # the first warp's
        qkv += (G * M + g) * D
        slot = slots(table, position % C, 0, C, PAGE) * (2 * G * D) + g * D
        own_k = rotated(qkv, c, i, cosine, sine, c < 4)
        n = iota(2, D, product, 3)
        n = n % 8 * 8 + n // 8
        own_v = gl.load(qkv + G * D + n)
        cache_own(qkv, cos + s * (D // 2), sin + s * (D // 2), pool + slot, G)
        logit = gl.sum(gl.sum(q.to(gl.float32) * own_k.to(gl.float32), axis=3), axis=2)
        logit = gl.convert_layout(logit, rows) * scale
        mine = iota(0, WARPS, rows, 2) == 0
        top = gl.where(mine, gl.maximum(logit, sink), top)
        own = gl.where(mine, gl.exp2(logit - top), 0.0)
        total = gl.where(mine, own + gl.exp2(sink - top), 0.0)
        acc = own[:, :, None] * own_v.to(gl.float32)
    q = q.reshape(WARPS, ROWS, 4, 8, 2).permute(0, 1, 3, 2, 4).reshape(WARPS, ROWS, D)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, product, 2), assert_trivial=True)
    for start in range(0, length, BLOCK):
        top, total, acc = attend(q, ks[0], vs[0], start, length, top, total, acc, scale)
        order(STAY)
        k, v = load_block(words, table, first, start + AHEAD * BLOCK, length, g, C, J, G, PAGE)
        ks, vs = ks[1:] + (k,), vs[1:] + (v,)
    best = gl.max(top, axis=0)
    fade = gl.exp2(top - best[None, :])
    total, acc = gl.sum(total * fade, axis=0), gl.sum(acc * fade[:, :, None], axis=0)  # [16, 64]

    acc = acc.reshape(ROWS, 8, 8).permute(0, 2, 1).reshape(ROWS, D)  # (t, r) -> (r, t)
    merged: gl.constexpr = results_layout()
    acc = gl.convert_layout(acc, merged, assert_trivial=True)
    heads: gl.constexpr = gl.SliceLayout(1, merged)
    best, total = gl.convert_layout(best, heads)[:, None], gl.convert_layout(total, heads)[:, None]
    m, d = iota(0, ROWS, merged, 2), iota(1, D, merged, 2)
    live = m < M
    if used > 1:
        # a part's rows: their elements, top and total
        LINE: gl.constexpr = D + 4
        parts += (s * G + g) * gl.num_programs(2) * (M * LINE)
        mine = parts + (z * M + m) * LINE
        gl.store(mine + d, acc, mask=live)
        gl.store(mine + D, best, mask=live)
        gl.store(mine + D + 1, total, mask=live)
        if arrive(arrived + s * G + g) < used - 1:
            return
        gl.store(arrived + s * G + g, 0)
        merge_parts(parts, out, s, g, used, positions, M, G)
    else:
        store_rows(acc / total, out, m, d, live, s, g, positions, M, G)


@gluon.jit
def merge_parts(parts, out, s, g, used, positions, M: gl.constexpr, G: gl.constexpr):
    """The last program to arrive adds up the parts, all of which it asks for at once. A thread has
    all parts of some elements."""
    LINE: gl.constexpr = D + 4
    ROW: gl.constexpr = 8 if M <= 8 else 16
    layout: gl.constexpr = gl.BlockedLayout([SPLITS, ROW // 8, 2], [1, 1, 32], [1, 8, 1], [2, 1, 0])
    lines: gl.constexpr = gl.SliceLayout(2, layout)
    part, m = iota(0, SPLITS, lines, 2), iota(1, ROW, lines, 2)
    there, line = (part < used) & (m < M), parts + (part * M + m) * LINE
    tops = gl.load(line + D, mask=there, other=LOWEST, cache_modifier=".cg")
    totals = gl.load(line + D + 1, mask=there, other=0.0, cache_modifier=".cg")
    line = line[:, :, None] + iota(2, D, layout, 3)
    accs = gl.load(line, mask=there[:, :, None], other=0.0, cache_modifier=".cg")
    share = gl.exp2(tops - gl.max(tops, axis=0)[None, :])
    total, acc = gl.sum(share * totals, axis=0), gl.sum(share[:, :, None] * accs, axis=0)
    flat: gl.constexpr = gl.SliceLayout(0, layout)
    total = gl.convert_layout(total, gl.SliceLayout(1, flat))
    m, d = iota(0, ROW, flat, 2), iota(1, D, flat, 2)
    store_rows(acc / total[:, None], out, m, d, m < M, s, g, positions, M, G)


@gluon.jit
def store_rows(mean, out, m, d, live, s, g, positions, M: gl.constexpr, G: gl.constexpr):
    """The heads of sequence s and, of the first, those of the padding."""
    into = out + (g * M + m) * D + d
    mean = mean.to(gl.bfloat16)
    gl.store(into + s.to(gl.int64) * (G * M * D), mean, mask=live)
    if s == 0:
        row = gl.num_programs(1) - 1
        while gl.load(positions + row) < 0:
            gl.store(into + row.to(gl.int64) * (G * M * D), mean, mask=live)
            row -= 1


def attends(qkv: Tensor, sinks: Tensor, pool: Tensor, plan) -> bool:
    """Whether `attention` takes these: a decode step in bfloat16 with heads of 64, at most 16 of
    which share a key head."""
    heads = pool.shape[3] == D and len(sinks) // pool.shape[2] <= ROWS
    return heads and plan.positions.shape[1] == 1 and qkv.dtype == pool.dtype == torch.bfloat16


def attention(qkv: Tensor, sinks: Tensor, pool: Tensor, kind: str, plan) -> Tensor:
    """Rotates queries and keys, attends to the cached tokens and the step's own, and caches these.
    qkv [T, (N + 2G) D]; sinks [N]; pool [slots, 2, G, D], keys and values -> [T, N D]."""
    T, N, G, pdl = len(qkv), len(sinks), pool.shape[2], is_supported(90)
    table, sliding = plan.tables[kind], kind == "sliding_attention"
    window, room = plan.window if sliding else 0, table.shape[1] * plan.page_size
    most = min(room, window) if sliding else room  # keys
    splits = min(triton.cdiv(most, SPLIT_KEYS.value), SPLITS.value)
    out = qkv.new_empty(T, N * D.value)
    parts = qkv.new_empty(T * G * splits, N // G, D.value + 4, dtype=torch.float32)
    J, ahead = SHORT if most <= WARPS.value * 8 * SHORT[0] else LONG
    decode_kernel[(G, T, splits)](
        qkv.contiguous(), sinks, pool, out, plan.cos, plan.sin, plan.positions, table, parts,
        plan.arrived, table.shape[1], D.value**-0.5 * LOG2E.value, window, plan.page_size, N // G,
        G, J, ahead, pdl, num_warps=WARPS.value, launch_pdl=pdl,
    )  # fmt: skip
    return out
