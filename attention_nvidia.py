"""Attention of a decode step in Gluon for NVIDIA GPUs, sm_80 and newer: bfloat16, heads of 64.

    out = attention(qkv, sinks, pool, kind, plan)     # [T, (N + 2G) D] -> [T, N D], one launch

It has the signature of the operation in gptoss.py, and its pages, plans and letters are those of
ops_triton, which attends wherever `attends` says no.

A step is bound by the bytes of the keys and values, and at short contexts by how many latencies
follow each other. A program takes 128 keys of a sequence's key head, which all are on their way
before it waits for the kernel before: its 4 warps have 32 each, straight in the registers of
mma.m16n8k16's right operand. A warp has a softmax of its own; only at the end do they meet, in
shared memory. Where a sequence has more keys there are more programs, up to 16; each stores its
part, and the last to arrive adds the parts in their order. It lets the next kernel start only after
its own wait: whose weights would come before its keys otherwise.

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

WARPS = gl.constexpr(4)
ROWS = gl.constexpr(16)  # of the matrix instruction: query heads that share a key head
D = gl.constexpr(64)
LOG2E = gl.constexpr(1.4426950408889634)  # exp(x) = 2^(x LOG2E)
LOWEST = gl.constexpr(-1e30)  # below all logits; -inf - -inf would be NaN
KEYS = gl.constexpr(32)  # of a warp that are loaded at once: 8 for each 8 columns of the product
BLOCK = gl.constexpr(128)  # of a program
SPLITS = gl.constexpr(16)  # parts of a sequence's keys, at most
LINE = gl.constexpr(64 + 4)  # of a part's row in memory: elements, top, total


@gluon.constexpr_function
def keys_layout():
    """[WARPS, 4, 8, 4, 8 words]: lane 4 r + c holds the 32 bytes c of key r of each 8."""
    registers, lanes = bits(8, 4, 5) + bits(4, 1, 5), bits(4, 3, 5) + bits(8, 2, 5)
    shape = [WARPS.value, 4, 8, 4, 8]
    return gl.DistributedLinearLayout(registers, lanes, bits(WARPS.value, 0, 5), [], shape)


@gluon.constexpr_function
def values_layout():
    """[WARPS, 4, 4, 2, 8, 4 words]: lane 4 r + c holds the 16 bytes r of keys 2 c and 2 c + 1 of
    each 8."""
    registers = bits(4, 5, 6) + bits(2, 3, 6) + bits(4, 1, 6)
    lanes, shape = bits(4, 2, 6) + bits(8, 4, 6), [WARPS.value, 4, 4, 2, 8, 4]
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
    return gl.DistributedLinearLayout(registers, lanes, [[0, 0]] * 2, [], [ROWS.value, D.value])


@gluon.jit
def slots(table, first, key, C, PAGE: gl.constexpr):
    """Where the pool has the positions first + key, of which no two share a slot; first % C is
    known."""
    index = first + key
    index = gl.where(index >= C, index - C, index)
    return (gl.load(table + index // PAGE) * PAGE + index % PAGE).to(gl.int64)


@gluon.jit
def load_block(pool, table, first, start, length, g, C, G: gl.constexpr, PAGE: gl.constexpr):
    """Keys and values start .. start + BLOCK of a part of `length`, as words of two: int32 [WARPS,
    4, 8, 4, 8] and [WARPS, 4, 4, 2, 8, 4]. Each 8 keys are the next warp's."""
    at_k: gl.constexpr = keys_layout()
    key = start + (iota(1, 4, at_k, 5) * WARPS + iota(0, WARPS, at_k, 5)) * 8 + iota(2, 8, at_k, 5)
    at = slots(table, first, gl.where(key < length, key, 0), C, PAGE) * (G * D) + g * (D // 2)
    at += iota(3, 4, at_k, 5) * 8 + iota(4, 8, at_k, 5)
    k = gl.load(pool + at, mask=key < length, other=0)
    at_v: gl.constexpr = values_layout()
    key = start + (iota(1, 4, at_v, 6) * WARPS + iota(0, WARPS, at_v, 6)) * 8
    key += iota(2, 4, at_v, 6) * 2 + iota(3, 2, at_v, 6)
    at = slots(table, first, gl.where(key < length, key, 0), C, PAGE) * (G * D) + g * (D // 2)
    at += G * (D // 2) + iota(4, 8, at_v, 6) * 4 + iota(5, 4, at_v, 6)
    return k, gl.load(pool + at, mask=key < length, other=0)


@gluon.jit
def attend(q, k, v, start, length, top, total, acc, scale):
    """A block of keys into each warp's running softmax. q bfloat16 [WARPS, 16, 64], the left
    operand; k, v: `load_block`; top, the largest logit so far in powers of 2, and total, the sum of
    2^(logit - top): float32 [WARPS, 16]; acc [WARPS, 16, 64]."""
    product: gl.constexpr = product_layout(WARPS, 1)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    k = halves(k).to(gl.bfloat16, bitcast=True)  # [WARPS, 4, r, c, m, h]
    k = gl.convert_layout(
        k.permute(0, 4, 3, 5, 1, 2).reshape(WARPS, D, KEYS), right, assert_trivial=True
    )
    logits = mma_v2(q, k, gl.full([WARPS, ROWS, KEYS], 0, gl.float32, product)) * scale
    n = iota(2, KEYS, product, 3)
    key = start + (n // 8 * WARPS + iota(0, WARPS, product, 3)) * 8 + n % 8
    logits = gl.where(key < length, logits, -float("inf"))
    new = gl.maximum(top, gl.max(logits, axis=2))
    share, fade = gl.exp2(logits - new[:, :, None]), gl.exp2(top - new)
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    p = gl.convert_layout(share.to(gl.bfloat16), left, assert_trivial=True)
    v = halves(v).to(gl.bfloat16, bitcast=True)  # [WARPS, 4, c, h, r, t // 2, t % 2]
    v = gl.convert_layout(
        v.permute(0, 1, 2, 3, 5, 6, 4).reshape(WARPS, KEYS, D), right, assert_trivial=True
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


@gluon.jit
def part_of(position, z, WINDOW: gl.constexpr):
    """Part z of the keys that a token sees before itself: its first position, its length, and how
    many parts there are, which depends on the position alone."""
    first = 0
    if WINDOW > 0:
        first = gl.maximum(position - WINDOW + 1, 0)
    keys = position - first
    used = gl.minimum(gl.maximum((keys + BLOCK - 1) // BLOCK, 1), SPLITS)
    length = (keys + used - 1) // used
    return first + z * length, gl.minimum(length, keys - z * length), used


@gluon.jit
def attend_to_own(q, own_k, own_v, sink, scale, top, total, acc):
    """The first warp's softmax begins with the token's own key and the sinks. own_k in q's layout;
    own_v points to the value."""
    product: gl.constexpr = product_layout(WARPS, 1)
    rows: gl.constexpr = gl.SliceLayout(2, product)
    logit = gl.sum(gl.sum(q.to(gl.float32) * own_k.to(gl.float32), axis=3), axis=2)
    logit = gl.convert_layout(logit, rows) * scale  # [WARPS, 16]
    n = iota(2, D, product, 3)
    v = gl.load(own_v + n % 8 * 8 + n // 8).to(gl.float32)
    mine = iota(0, WARPS, rows, 2) == 0
    top = gl.where(mine, gl.maximum(logit, sink), top)
    own = gl.where(mine, gl.exp2(logit - top), 0.0)
    return top, gl.where(mine, own + gl.exp2(sink - top), 0.0), own[:, :, None] * v


@gluon.jit
def merge_warps(top, total, acc):
    """Each warp's softmax -> that of all keys: top, total [16, 1] and acc [16, 64], elements in the
    order of memory."""
    best = gl.max(top, axis=0)
    fade = gl.exp2(top - best[None, :])
    total, acc = gl.sum(total * fade, axis=0), gl.sum(acc * fade[:, :, None], axis=0)
    acc = acc.reshape(ROWS, 8, 8).permute(0, 2, 1).reshape(ROWS, D)  # (t, r) -> (r, t)
    acc = gl.convert_layout(acc, results_layout(), assert_trivial=True)
    rows: gl.constexpr = gl.SliceLayout(1, results_layout())
    return gl.convert_layout(best, rows)[:, None], gl.convert_layout(total, rows)[:, None], acc


@gluon.jit(do_not_specialize=["P"])
def decode_kernel(
    qkv, sinks, pool, out, cos, sin, positions, table, parts, arrived, P, scale,
    WINDOW: gl.constexpr, PAGE: gl.constexpr, M: gl.constexpr, G: gl.constexpr,
    SPLIT: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (g, s, z): part z of the keys that sequence s's one token sees, for the M query heads
    of key head g. Part 0 has the token's own key, which it caches, and the sinks. Padding, at the
    end, gets what the first sequence gets: a row that repeats its token then meets no other experts
    than that."""
    product: gl.constexpr = product_layout(WARPS, 1)
    rows: gl.constexpr = gl.SliceLayout(2, product)  # [WARPS, 16]
    g, s, z = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    position = gl.load(positions + s)
    if position < 0:
        return
    first, length, used = part_of(position, z, WINDOW)
    if z >= used:
        return
    table, C = table + s * P, P * PAGE
    first = first % C
    # What is no result of this layer is on its way while the kernel before makes qkv.
    words = pool.to(gl.pointer_type(gl.int32), bitcast=True)
    k, v = load_block(words, table, first, 0, length, g, C, G, PAGE)
    layout: gl.constexpr = queries_layout()
    c, i = iota(2, 4, layout, 4), iota(3, 16, layout, 4)
    cos, sin = cos + s * (D // 2), sin + s * (D // 2)
    cosine, sine = gl.load(cos + c % 2 * 16 + i), gl.load(sin + c % 2 * 16 + i)
    sine = gl.where(c < 2, -sine, sine)
    m = iota(1, ROWS, rows, 2)
    sink = gl.load(sinks + g * M + m, mask=m < M, other=0.0).to(gl.float32) * LOG2E
    if PDL:
        order(START_NEXT)
        order(AWAIT_PREVIOUS)

    qkv += s.to(gl.int64) * ((M * G + 2 * G) * D)
    row = iota(1, ROWS, layout, 4) + 0 * iota(0, WARPS, layout, 4)
    q = rotated(qkv + (g * M + row) * D, c, i, cosine, sine, row < M)
    top = gl.full([WARPS, ROWS], LOWEST, gl.float32, rows)
    total = gl.full([WARPS, ROWS], 0.0, gl.float32, rows)
    acc = gl.full([WARPS, ROWS, D], 0.0, gl.float32, product)
    if z == 0:
        own = qkv + (G * M + g) * D
        own_k = rotated(own, c, i, cosine, sine, c < 4)
        top, total, acc = attend_to_own(q, own_k, own + G * D, sink, scale, top, total, acc)
        slot = slots(table, position % C, 0, C, PAGE) * (2 * G * D) + g * D
        cache_own(own, cos, sin, pool + slot, G)
    q = q.reshape(WARPS, ROWS, 4, 8, 2).permute(0, 1, 3, 2, 4).reshape(WARPS, ROWS, D)
    q = gl.convert_layout(q, gl.DotOperandLayout(0, product, 2), assert_trivial=True)
    for start in range(0, length, BLOCK):
        top, total, acc = attend(q, k, v, start, length, top, total, acc, scale)
        order(STAY)
        k, v = load_block(words, table, first, start + BLOCK, length, g, C, G, PAGE)
    top, total, acc = merge_warps(top, total, acc)

    m, d = iota(0, ROWS, results_layout(), 2), iota(1, D, results_layout(), 2)
    if SPLIT:
        if used > 1:
            parts += (s * G + g) * gl.num_programs(2) * (M * LINE)
            mine = parts + (z * M + m) * LINE
            gl.store(mine + d, acc, mask=m < M)
            gl.store(mine + D, top, mask=m < M)
            gl.store(mine + D + 1, total, mask=m < M)
            if arrive(arrived + s * G + g) == used - 1:
                gl.store(arrived + s * G + g, 0)
                merge_parts(parts, out, s, g, used, positions, M, G)
            return
    store_rows(acc / total, out, m, d, s, g, positions, M, G)


@gluon.jit
def merge_parts(parts, out, s, g, used, positions, M: gl.constexpr, G: gl.constexpr):
    """The last program to arrive adds up the parts in their order, 8 at once. A thread has those of
    some elements."""
    ROW: gl.constexpr = 8 if M <= 8 else 16
    layout: gl.constexpr = gl.BlockedLayout(
        [8, ROW // WARPS, 2], [1, 1, 32], [1, WARPS, 1], [2, 1, 0]
    )
    lines: gl.constexpr = gl.SliceLayout(2, layout)
    flat: gl.constexpr = gl.SliceLayout(0, layout)
    part, m, d = iota(0, 8, lines, 2), iota(1, ROW, lines, 2), iota(2, D, layout, 3)
    best = gl.full([ROW], LOWEST, gl.float32, gl.SliceLayout(0, lines))
    total, acc = gl.zeros_like(best), gl.full([ROW, D], 0.0, gl.float32, flat)
    for first in range(0, used, 8):
        there, line = (first + part < used) & (m < M), parts + ((first + part) * M + m) * LINE
        top = gl.load(line + D, mask=there, other=LOWEST, cache_modifier=".cg")
        totals = gl.load(line + D + 1, mask=there, other=0.0, cache_modifier=".cg")
        theirs = gl.load(
            line[:, :, None] + d, mask=there[:, :, None], other=0.0, cache_modifier=".cg"
        )
        new = gl.maximum(best, gl.max(top, axis=0))
        share, fade = gl.exp2(top - new[None, :]), gl.exp2(best - new)
        best, total = new, total * fade + gl.sum(share * totals, axis=0)
        fade = gl.convert_layout(fade, gl.SliceLayout(1, flat))[:, None]
        acc = acc * fade + gl.sum(share[:, :, None] * theirs, axis=0)
    total = gl.convert_layout(total, gl.SliceLayout(1, flat))
    m, d = iota(0, ROW, flat, 2), iota(1, D, flat, 2)
    store_rows(acc / total[:, None], out, m, d, s, g, positions, M, G)


@gluon.jit
def store_rows(mean, out, m, d, s, g, positions, M: gl.constexpr, G: gl.constexpr):
    """The heads of sequence s and, of the first, those of the padding."""
    into, live, mean = out + (g * M + m) * D + d, m < M, mean.to(gl.bfloat16)
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
    splits = min(triton.cdiv(most, BLOCK.value), SPLITS.value)
    out = qkv.new_empty(T, N * D.value)
    parts = qkv.new_empty(T * G * splits, N // G, LINE.value, dtype=torch.float32)
    decode_kernel[(G, T, splits)](
        qkv.contiguous(), sinks, pool, out, plan.cos, plan.sin, plan.positions, table, parts,
        plan.arrived, table.shape[1], D.value**-0.5 * LOG2E.value, window, plan.page_size, N // G,
        G, splits > 1, pdl, num_warps=WARPS.value, launch_pdl=pdl,
    )  # fmt: skip
    return out
