"""From a plain tiled GEMM to the prefill kernel of moe_gluon.py: four kernels, one idea each.

    python tools/steps_prefill.py            runs, checks and counts them; prints the table
    python tools/steps_prefill.py --write    and writes it into docs/porting.md
    python tools/steps_prefill.py --draw F   and draws the steps' loops into folder F

    plain_kernel      a tile of 128 x 256 through registers into LDS, one buffer, two barriers
    ring_kernel       copies from memory straight to LDS, three steps of K, waits by count
    sliced_kernel     the tile cut 2 x 2: a quadrant is multiplied while the next one's is read
    prefill_dispatch_kernel of moe_gluon.py: scales go the same way, the last step is peeled, what
                      does not exist is skipped, chiplets share

Each is all of the first expert GEMM at prefill, mxfp8 activations by mxfp4 weights: rows gathered
by a tile list, bias, SwiGLU, h quantised. The end is moe_gluon.py's in all of them, and so are the
packed weights; "Packed weights" and "Prefill" there say how they lie. A step is 128 of K, and a
piece is what a copy's group holds. Everything runs in the emulator."""

import argparse
import itertools
import math
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
import triton.experimental.gluon.language as gl
from triton.experimental import gluon

sys.path.insert(0, str(Path(__file__).parents[1]))
import counts
import draw_loop
from bench_moe import random_experts
from tables import refresh

import gfx950
import gptoss
import moe_gluon
import weights
from bench import table
from gfx950.counters import classify
from moe_gluon import (
    Tile,
    cdna4,
    column_of,
    half_of,
    iota,
    load_pairs,
    load_tile,
    mfma,
    only,
    reinterpret,
    store_quadrants,
    store_swiglu,
    wait,
)

ROWS = gl.constexpr(128)  # of a tile
COLUMNS = gl.constexpr(256)
STEP = gl.constexpr(128)  # of K, in one matrix instruction
GROUP = gl.constexpr(32)  # of K, that share a scale
RING = gl.constexpr(3)  # steps of K that ring_kernel has in LDS

# --------------------------------------------------------------------------------------------------
# Layouts. Wave (m, n) is number 2 m + n.

# sums [rows, columns]: wave (m, n) holds rows 32 m .. + 31 of every 64 and columns 64 n .. + 63 of
# every 128; lane L of each 16 x 16 holds row L % 16 and columns 4 * (L // 16) .. + 3
ACC = gl.constexpr(gl.amd.AMDMFMALayout(4, [16, 16, 128], True, [2, 2], tiles_per_warp=[2, 4]))
# x [rows, 128 bytes]: lane L holds row L % 16 and the 16 bytes L // 16 of every 64
X = gl.constexpr(gl.DotOperandLayout(0, ACC.value, 16))
# w [64 bytes, columns]: lane L holds column L % 16 and the 16 bytes L // 16
W = gl.constexpr(gl.DotOperandLayout(1, ACC.value, 16))
# On the way to LDS. x [rows, 8 chunks, 16 bytes]: lane L of wave v holds chunk L % 8 of row
# 8 v + L // 8 of every 32
X_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 16], [8, 8, 1], [4, 1, 1], [2, 1, 0]))
# w [strips, 64, 16 bytes]: wave v holds strip v of every 4, lane L its 16 bytes from 16 L
W_COPY = gl.constexpr(gl.BlockedLayout([1, 1, 16], [1, 64, 1], [4, 1, 1], [2, 1, 0]))
# In LDS, as copies write it: byte after byte
FLAT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))


@gluon.constexpr_function
def bits(size):
    """1, 2, 4 .. size / 2."""
    return [1 << i for i in range(size.bit_length() - 1)]


@gluon.constexpr_function
def x_in_lds(rows, swizzled):
    """x [rows, 128 bytes] in LDS: row after row. Swizzled, chunk c of row r lies at
    c ^ (r // 2 % 8)."""
    moved = {2: 16, 4: 32, 8: 64} if swizzled else {}
    row_bits = [[r, moved.get(r, 0)] for r in bits(rows)]
    return gl.SharedLinearLayout([[0, i] for i in bits(128)] + row_bits)


@gluon.constexpr_function
def w_in_lds(columns):
    """w [64 bytes, columns] in LDS, as packed: 16 columns' 16 bytes, four times, strip after
    strip."""
    strip = [[i, 0] for i in bits(16)] + [[0, i] for i in bits(16)] + [[16, 0], [32, 0]]
    return gl.SharedLinearLayout(strip + [[0, i] for i in bits(columns)[4:]])


@gluon.constexpr_function
def w_scales_in_memory(columns):
    """[columns / 64, 4 groups, 16, 4]: wave (m, n) holds block n of every two, lane L the dword of
    group L // 16 and column L % 16, whose bytes are for the four 16 x 16 of the block."""
    registers = [[0, 0, 0, 1], [0, 0, 0, 2]] + [[2, 0, 0, 0]] * (columns == 256)
    lanes = [[0, 0, i, 0] for i in bits(16)] + [[0, 1, 0, 0], [0, 2, 0, 0]]
    waves = [[1, 0, 0, 0], [0, 0, 0, 0]]
    return gl.DistributedLinearLayout(registers, lanes, waves, [], [columns // 64, 4, 16, 4])


# --------------------------------------------------------------------------------------------------
# Words of the three kernels


class Source(NamedTuple):
    """Where a step of x or w comes from: 16 bytes a lane and chunk."""

    base: gl.tensor  # pointer to step 0
    at: gl.tensor  # offsets from there
    exists: gl.tensor  # rows or columns that do
    k: gl.tensor  # the first K of the chunk, within a step
    stride: gl.constexpr  # bytes of a step


class ScaleSource(NamedTuple):
    """Likewise of scales: a byte, or a dword for four 16 x 16."""

    base: gl.tensor
    at: gl.tensor
    exists: gl.tensor
    group: gl.tensor
    stride: gl.constexpr


@gluon.jit
def tile_of_grid(tiles, num_tiles):
    """Program (panel, t): the tile, of 0 places beyond the list, and the panel's first position."""
    t = gl.program_id(1)
    tile = load_tile(tiles, t)
    return Tile(tile.expert, tile.first, gl.where(t < gl.load(num_tiles), tile.count, 0)), (
        gl.program_id(0) * COLUMNS
    )


@gluon.jit
def x_source(
    x, pairs, tile, rows: gl.constexpr, SWIZZLED: gl.constexpr, SLOTS: gl.constexpr, g: gl.constexpr
):
    """Of the first `rows` rows of a tile. Copies to LDS go to consecutive places, so that the
    swizzle must be in where they come from."""
    row, chunk = iota(0, rows, X_COPY), iota(1, 8, X_COPY)
    if SWIZZLED:
        chunk = chunk ^ (row // 2 % 8)
    token = load_pairs(pairs, tile, rows, only(0, X_COPY)) // SLOTS
    at = token[:, None, None] * g.x_row + chunk * 16 + iota(2, 16, X_COPY)
    return Source(x, at, row < tile.count, chunk * 16, STEP)


@gluon.jit
def w_source(w, tile, start, columns: gl.constexpr, g: gl.constexpr):
    """Of the columns at positions start .. of a tile's expert: strips of 16, 1,024 bytes a step."""
    w += tile.expert.to(gl.int64) * g.w_expert + start // 16 * g.w_strip
    strip, lane = iota(0, columns // 16, W_COPY), iota(1, 64, W_COPY)
    at = strip * g.w_strip + lane * 16 + iota(2, 16, W_COPY)
    return Source(w, at, strip < (g.padded - start) // 16, lane // 16 * GROUP, 1024)


@gluon.jit
def x_scale_source(x_scale, pairs, tile, rows: gl.constexpr, SLOTS: gl.constexpr, g: gl.constexpr):
    """Straight to where the matrix instruction reads them: lane L holds row L % 16 of every 16,
    group L // 16."""
    layout: gl.constexpr = cdna4.get_mfma_scale_layout(X, [rows, 4])
    token = load_pairs(pairs, tile, rows, only(0, layout)) // SLOTS
    group = iota(1, 4, layout)
    exists = iota(0, rows, layout) < tile.count
    return ScaleSource(x_scale, token[:, None] * g.x_scale_row + group, exists, group, 4)


@gluon.jit
def w_scale_source(w_scale, tile, start, columns: gl.constexpr, g: gl.constexpr):
    """As `w_scales_in_memory` says."""
    layout: gl.constexpr = w_scales_in_memory(columns)
    w_scale += tile.expert.to(gl.int64) * g.scale_expert + start * (g.K // GROUP)
    block, group = iota(0, columns // 64, layout), iota(1, 4, layout)
    at = block * g.scale_block + group * 64 + iota(2, 16, layout) * 4 + iota(3, 4, layout)
    return ScaleSource(w_scale, at, block < (g.padded - start) // 64, group, 256)


@gluon.jit
def load(source, step, g: gl.constexpr):
    """A step into registers; what is beyond K or does not exist is 0."""
    inside = source.exists & (step * STEP + source.k < g.K)
    return cdna4.buffer_load(source.base + step * source.stride, source.at, mask=inside)


@gluon.jit
def copy(memory, source, step, g: gl.constexpr):
    """The same into LDS, past the registers."""
    inside = source.exists & (step * STEP + source.k < g.K)
    base = source.base + step * source.stride
    cdna4.async_copy.buffer_load_to_shared(memory, base, source.at, mask=inside)


@gluon.jit
def load_scales(source, step, g: gl.constexpr):
    inside = source.exists & (step * STEP + source.group * GROUP < g.K)
    return cdna4.buffer_load(source.base + step * source.stride, source.at, mask=inside)


@gluon.jit
def load_w_scales(source, step, columns: gl.constexpr, g: gl.constexpr):
    """[columns, 4], as the matrix instruction reads them: only registers get other names."""
    scales = load_scales(source, step, g)  # [columns / 64, group, 16, t]
    scales = scales.permute(0, 3, 2, 1).reshape(columns, 4)
    layout: gl.constexpr = cdna4.get_mfma_scale_layout(W, [columns, 4])
    return gl.convert_layout(scales, layout, assert_trivial=True)


@gluon.jit
def bias_of(bias, tile, start, columns: gl.constexpr, g: gl.constexpr):
    """What sums start with: in every row the bias, [1, columns]."""
    n = start + column_of(gl.arange(0, columns, only(1, ACC)))
    return cdna4.buffer_load(bias + tile.expert * g.N, n, mask=n < g.N)[None, :]


@gluon.jit
def quadrants_of(acc):
    """[128, 256] -> top left, bottom left, top right, bottom right, [64, 128]: a lane's registers
    get other names."""
    left, right = gl.split(acc.reshape(2, 64, 2, 128).permute(1, 3, 0, 2))  # [64, 128, bottom]
    top_left, bottom_left = gl.split(left)
    top_right, bottom_right = gl.split(right)
    return (
        gl.convert_layout(top_left, ACC, assert_trivial=True),
        gl.convert_layout(bottom_left, ACC, assert_trivial=True),
        gl.convert_layout(top_right, ACC, assert_trivial=True),
        gl.convert_layout(bottom_right, ACC, assert_trivial=True),
    )


# --------------------------------------------------------------------------------------------------
# Step 0: through registers, one buffer


@gluon.jit
def plain_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, h_scale, LIMIT: gl.constexpr,
    SLOTS: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """h[place] = swiglu(x[token of place] @ w[expert].T + bias[expert]), quantised. In a step all
    that is multiplied next is loaded, awaited, written to LDS, read and multiplied."""
    tile, start = tile_of_grid(tiles, num_tiles)
    if tile.count == 0:
        return
    STEPS: gl.constexpr = g.STEPS
    x = x_source(x, pairs, tile, ROWS, False, SLOTS, g)
    w = w_source(w, tile, start, COLUMNS, g)
    x_scale = x_scale_source(x_scale, pairs, tile, ROWS, SLOTS, g)
    w_scale = w_scale_source(w_scale, tile, start, COLUMNS, g)
    x_lds = gl.allocate_shared_memory(gl.uint8, [ROWS, 8, 16], FLAT)
    w_lds = gl.allocate_shared_memory(gl.uint8, [COLUMNS // 16, 64, 16], FLAT)
    x_view = reinterpret(x_lds, gl.uint8, [ROWS, STEP], x_in_lds(ROWS, False))
    w_view = reinterpret(w_lds, gl.uint8, [64, COLUMNS], w_in_lds(COLUMNS))
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, ACC) + bias_of(bias, tile, start, COLUMNS, g)
    for k in range(STEPS):
        # In flight: this step, until the store below waits for it; nothing while it is multiplied.
        x_step, w_step = load(x, k, g), load(w, k, g)
        x_scales, w_scales = load_scales(x_scale, k, g), load_w_scales(w_scale, k, COLUMNS, g)
        gl.barrier()  # all waves have read step k - 1
        x_lds.store(x_step)
        w_lds.store(w_step)
        gl.barrier()  # all waves have written step k
        acc = mfma(acc, x_view.load(X), x_scales, w_view.load(W), w_scales, g)
    to = h, h_scale, 1.0, 1.0, LIMIT
    store_quadrants(quadrants_of(acc), tile, start, store_swiglu, to, g)


# --------------------------------------------------------------------------------------------------
# Step 1: copies to LDS, a ring, waits by count


@gluon.jit
def ring_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, h_scale, LIMIT: gl.constexpr,
    SLOTS: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """The same. A step's 32 KB are one group of copies, issued two steps before it is multiplied
    into the stage whose step was multiplied last. One barrier a step: the wait's."""
    tile, start = tile_of_grid(tiles, num_tiles)
    if tile.count == 0:
        return
    STEPS: gl.constexpr = g.STEPS
    x = x_source(x, pairs, tile, ROWS, True, SLOTS, g)
    w = w_source(w, tile, start, COLUMNS, g)
    x_scale = x_scale_source(x_scale, pairs, tile, ROWS, SLOTS, g)
    w_scale = w_scale_source(w_scale, tile, start, COLUMNS, g)
    x_ring = gl.allocate_shared_memory(gl.uint8, [RING, ROWS, 8, 16], FLAT)
    w_ring = gl.allocate_shared_memory(gl.uint8, [RING, COLUMNS // 16, 64, 16], FLAT)
    acc = gl.zeros([ROWS, COLUMNS], gl.float32, ACC) + bias_of(bias, tile, start, COLUMNS, g)
    x_scales, w_scales = load_scales(x_scale, 0, g), load_w_scales(w_scale, 0, COLUMNS, g)
    for s in gl.static_range(RING - 1):
        copy_step(x_ring, w_ring, x, w, s, s, g)
    for k in range(STEPS):
        # Step k is in LDS, and all waves have multiplied step k - 1. In flight: step k + 1.
        wait(RING - 2)
        x_next, w_next = load_scales(x_scale, k + 1, g), load_w_scales(w_scale, k + 1, COLUMNS, g)
        # In flight from here: steps k + 1 and k + 2, of which beyond K there are only zeros.
        copy_step(x_ring, w_ring, x, w, k + RING - 1, (k + RING - 1) % RING, g)
        x_step = read(x_ring.index(k % RING), ROWS, STEP, x_in_lds(ROWS, True), X)
        w_step = read(w_ring.index(k % RING), 64, COLUMNS, w_in_lds(COLUMNS), W)
        acc = mfma(acc, x_step, x_scales, w_step, w_scales, g)
        x_scales, w_scales = x_next, w_next
    wait(0)  # for the zeros: they must not arrive when LDS is another workgroup's
    to = h, h_scale, 1.0, 1.0, LIMIT
    store_quadrants(quadrants_of(acc), tile, start, store_swiglu, to, g)


@gluon.jit
def copy_step(x_ring, w_ring, x, w, step, stage, g: gl.constexpr):
    copy(x_ring.index(stage), x, step, g)
    copy(w_ring.index(stage), w, step, g)
    cdna4.async_copy.commit_group()


@gluon.jit
def read(memory, rows: gl.constexpr, columns: gl.constexpr, lds: gl.constexpr, to: gl.constexpr):
    """From LDS, of what a wait has seen arrive: LLVM, which does not know that, would drain the
    queue of copies before it."""
    memory = reinterpret(memory, gl.uint8, [rows, columns], lds)
    return cdna4.async_copy.load_shared_relaxed(memory, to)


# --------------------------------------------------------------------------------------------------
# Step 2: cut 2 x 2


@gluon.jit
def sliced_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, h_scale, LIMIT: gl.constexpr,
    SLOTS: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """The same, a quarter of a step at a time: x top and bottom, w left and right. In a region a
    quadrant is multiplied, what the next one lacks is read from LDS, and what was read in the
    region before last is refilled, for the step after next.

        region       1               2               3               4
        wait, read   x bottom k      w right k       w left k+1      x top k+1
        copy         w left k+2      x top k+2       x bottom k+2    w right k+2
        multiply     top left        bottom left     top right       bottom right

    In flight after each wait: of what was issued last, as many loads as five pieces are. The next
    step's scales, which are loads as well, take the place of some."""
    tile, start = tile_of_grid(tiles, num_tiles)
    if tile.count == 0:
        return
    STEPS: gl.constexpr = g.STEPS
    top, bottom = half_of(tile, 0), half_of(tile, 1)
    xs = x_source(x, pairs, top, 64, True, SLOTS, g), x_source(x, pairs, bottom, 64, True, SLOTS, g)
    ws = w_source(w, tile, start, 128, g), w_source(w, tile, start + 128, 128, g)
    x_scale = (
        x_scale_source(x_scale, pairs, top, 64, SLOTS, g),
        x_scale_source(x_scale, pairs, bottom, 64, SLOTS, g),
    )
    w_scale = (
        w_scale_source(w_scale, tile, start, 128, g),
        w_scale_source(w_scale, tile, start + 128, 128, g),
    )
    x_ring, w_ring = (), ()  # of two steps; of halves
    for _ in gl.static_range(2):
        x_ring += ((x_half(), x_half()),)
        w_ring += ((w_half(), w_half()),)
    for s in gl.static_range(2):
        copy_piece(w_ring[s][0], ws[0], s, g)
        copy_piece(x_ring[s][0], xs[0], s, g)
        copy_piece(x_ring[s][1], xs[1], s, g)
        copy_piece(w_ring[s][1], ws[1], s, g)
    zero = gl.zeros([64, 128], gl.float32, ACC)
    top_left = zero + bias_of(bias, tile, start, 128, g)
    top_right = zero + bias_of(bias, tile, start + 128, 128, g)
    bottom_left, bottom_right = top_left, top_right
    scales = scales_of(x_scale, w_scale, 0, g)
    wait(6)  # in flight: all but the first two pieces
    w_left, x_top = read_w(w_ring[0][0]), read_x(x_ring[0][0])
    for first in range(0, STEPS, 2):
        for s in gl.static_range(2):  # a step of K beyond the last is zeros
            k = first + s
            scales_next = scales_of(x_scale, w_scale, k + 1, g)
            x_top_scale, x_bottom_scale, w_left_scale, w_right_scale = scales

            wait(5)
            x_bottom = read_x(x_ring[s][1])
            copy_piece(w_ring[s][0], ws[0], k + 2, g)
            top_left = mfma(top_left, x_top, x_top_scale, w_left, w_left_scale, g)

            wait(5)
            w_right = read_w(w_ring[s][1])
            copy_piece(x_ring[s][0], xs[0], k + 2, g)
            bottom_left = mfma(bottom_left, x_bottom, x_bottom_scale, w_left, w_left_scale, g)

            wait(5)
            w_left = read_w(w_ring[1 - s][0])
            copy_piece(x_ring[s][1], xs[1], k + 2, g)
            top_right = mfma(top_right, x_top, x_top_scale, w_right, w_right_scale, g)

            wait(5)
            x_top = read_x(x_ring[1 - s][0])
            copy_piece(w_ring[s][1], ws[1], k + 2, g)
            bottom_right = mfma(bottom_right, x_bottom, x_bottom_scale, w_right, w_right_scale, g)
            scales = scales_next
    wait(0)  # for the zeros: they must not arrive when LDS is another workgroup's
    to = h, h_scale, 1.0, 1.0, LIMIT
    quadrants = top_left, bottom_left, top_right, bottom_right
    store_quadrants(quadrants, tile, start, store_swiglu, to, g)


@gluon.jit
def x_half():
    return gl.allocate_shared_memory(gl.uint8, [64, 8, 16], FLAT)


@gluon.jit
def w_half():
    return gl.allocate_shared_memory(gl.uint8, [8, 64, 16], FLAT)


@gluon.jit
def copy_piece(memory, source, step, g: gl.constexpr):
    copy(memory, source, step, g)
    cdna4.async_copy.commit_group()


@gluon.jit
def read_x(memory):
    return read(memory, 64, STEP, x_in_lds(64, True), X)


@gluon.jit
def read_w(memory):
    return read(memory, 64, 128, w_in_lds(128), W)


@gluon.jit
def scales_of(x_scale, w_scale, step, g: gl.constexpr):
    """Of x top and bottom, w left and right."""
    return (
        load_scales(x_scale[0], step, g),
        load_scales(x_scale[1], step, g),
        load_w_scales(w_scale[0], step, 128, g),
        load_w_scales(w_scale[1], step, 128, g),
    )


# --------------------------------------------------------------------------------------------------
# Launchers


def launch(kernel, routing: moe_gluon.Routing, packed: moe_gluon.PackedExperts) -> tuple:
    """One of the three kernels above, a program a panel and tile -> h and its scales, as
    moe_gluon.dispatch_swiglu returns them."""
    r, w, f = routing, packed.gate_up, moe_gluon.FORMATS["mxfp8"]
    pairs, g = r.chosen.numel(), moe_gluon.prefill_tile(w.K, w.N, f)
    h, h_scale = moe_gluon.empty_activations(f, pairs, w.N // 2, w.data.device)
    tensors = r.x, r.x_scale, w.data, w.scale, w.bias, r.tiles, r.num_tiles, r.pairs, h, h_scale
    settings = 7.0, r.chosen.shape[1], g
    kernel[g.panels, len(r.tiles)](*tensors, *settings, num_warps=4, waves_per_eu=2)
    return h, h_scale


# name -> launcher (routing, packed) -> h, h_scale
LAUNCHERS: dict[str, Callable] = {
    "0, plain": lambda *a: launch(plain_kernel, *a),
    "1, ring": lambda *a: launch(ring_kernel, *a),
    "2, sliced": lambda *a: launch(sliced_kernel, *a),
    "3, shipped": moe_gluon.dispatch_swiglu,
}

# --------------------------------------------------------------------------------------------------
# Against the oracle


class Layer(NamedTuple):
    x: torch.Tensor  # bf16 [T, H]
    router_weight: torch.Tensor  # bf16 [E, H]
    router_bias: torch.Tensor  # bf16 [E]
    experts: weights.Experts
    top_k: int


def made_up(T: int, E: int, H: int, inner: int, top_k: int) -> Layer:
    """A layer under which tokens choose their experts nearly independently."""
    g = torch.Generator().manual_seed(0)
    x = torch.randn(T, H, generator=g) * torch.randn(T, 1, generator=g).exp()
    router = torch.randn(E, H, generator=g) * H**-0.5
    experts = random_experts("openai", E, H, inner)
    return Layer(x.bfloat16(), router.bfloat16(), torch.zeros(E).bfloat16(), experts, top_k)


def routed(layer: Layer) -> tuple[moe_gluon.PackedExperts, moe_gluon.Routing]:
    """What a launcher needs, from the kernels of moe_gluon.py. More than 16 tokens."""
    *inputs, experts, top_k = layer
    packed = moe_gluon.prepare(experts, "mxfp8")
    with gfx950.emulate():
        return packed, moe_gluon.gating_gemm(*inputs, packed, top_k)


def emulated(
    name: str, packed: moe_gluon.PackedExperts, routing: moe_gluon.Routing, **emulate
) -> tuple[torch.Tensor, gfx950.Launch]:
    """A step's h, float32 [pairs, inner] by place, and its launch."""
    with gfx950.emulate(**emulate) as gpu:
        h, scale = LAUNCHERS[name](routing, packed)
    h = h.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, GROUP.value))
    scale = scale[:, : h.shape[1], None].view(torch.float8_e8m0fnu).float()
    pairs = (
        len(routing.x) * routing.top_k
    )  # in front of the places that slots beyond top_k would have
    return (h * scale).flatten(-2)[:pairs], gpu.launches[-1]


def expected(layer: Layer) -> torch.Tensor:
    """What the oracle says; but a group that holds NaN is all NaN, as its scale is."""
    x, router_weight, router_bias, experts, top_k = layer
    routing = gptoss.gating(x, router_weight, router_bias, top_k)
    h = gptoss.dispatch_swiglu(x, routing, experts, "mxfp8", 7.0).unflatten(-1, (-1, GROUP.value))
    return h.masked_fill(h.isnan().any(-1, keepdim=True), float("nan")).flatten(-2)


def check(h: torch.Tensor, want: torch.Tensor) -> int:
    """How many values differ from the oracle's. AssertionError where one differs by more than the
    step of its format, or more than one in a thousand do, or a NaN is not where it should be.

    Both round the same sums to e4m3, but for the order of addition: 2^-24 sqrt(K) of a value, which
    tips one of some 10,000 roundings. A step of e4m3 is at most 2^-3 of a value, and where a sum
    tips the scale of its group the coarser of two."""
    assert h.shape == want.shape and torch.equal(h.isnan(), want.isnan())
    h, want = h.nan_to_num(), want.nan_to_num()
    largest = want.unflatten(-1, (-1, GROUP.value)).abs().amax(-1, keepdim=True)
    least = (largest * 2.0**-15).expand(*largest.shape[:-1], GROUP.value).flatten(-2)  # subnormals
    assert ((h - want).abs() <= 2.0**-3 * want.abs() + least).all()
    assert (differ := int((h != want).sum())) <= h.numel() / 1000, differ
    return differ


# --------------------------------------------------------------------------------------------------
# A model of what runs at the same time


class Workgroup:
    """One wave of it, on its way through a traced wave's instructions."""

    def __init__(self, clock: float):
        self.clock, self.position = clock, 0
        self.served: list[float] = []  # when LDS has answered what lgkmcnt counts
        # (position, when it was asked for, when it arrives) of what vmcnt counts
        self.asked: list[tuple[int, float, float]] = []


class Played(NamedTuple):
    matrix: list[tuple[float, float]]  # when the matrix pipe was busy
    flights: dict[int, float]  # position in the trace -> cycles from asking to waiting
    end: float  # when the first workgroup was through


def play(launch, workgroups=1, latency=0.0, tiles=1, delay=0.0) -> Played:
    """The traced wave, once for each of so many workgroups that share a compute unit and start
    `delay` after one another, each a tile after another. Modelled: a wave issues in order, an
    instruction in 4 cycles; waves of a SIMD share its matrix pipe and its vector pipe; LDS serves
    all waves of both in turn; memory answers after `latency` cycles, however much it is asked for.
    Costs are those of gfx950/counters.py."""
    c, waves = launch.counters, launch.waves // math.prod(launch.grid)
    code = [launch.program.code[pc] for pc in launch.trace]
    kinds = [classify(ins) for ins in code]
    of_lds = [waves * c.lds_cycles[pc] / c.counts[pc] for pc in launch.trace]
    groups = [Workgroup(i * delay) for i in range(workgroups)]
    matrix, flights, free = [], {}, dict.fromkeys(("matrix", "vector", "lds"), 0.0)
    while all(group.position < tiles * len(code) for group in groups):
        group = min(groups, key=lambda group: group.clock)
        at = group.position % len(code)
        ins, kind, clock = code[at], kinds[at], group.clock
        if kind in ("matrix", "vector"):
            clock = max(clock, free[kind])
            free[kind] = clock + ins.cycles
            if kind == "matrix":
                matrix.append((clock, clock + ins.cycles))
        elif kind in ("lds", "copy to lds"):
            free["lds"] = max(clock, free["lds"]) + of_lds[at]
        if kind in ("lds", "scalar load"):
            group.served.append(free["lds"] if kind == "lds" else clock)
        elif kind in ("copy to lds", "vector load"):
            group.asked.append((at, clock, clock + latency))
        elif kind in ("vector store", "atomic"):
            group.asked.append((at, clock, clock))
        elif kind == "wait":
            first = len(group.served) - ins.mods.get("lgkmcnt", len(group.served))
            clock = max([clock, *group.served[: max(0, first)]])
            del group.served[: max(0, first)]
            first = len(group.asked) - ins.mods.get("vmcnt", len(group.asked))
            for position, asked, arrives in group.asked[: max(0, first)]:
                flights[position] = clock - asked
                clock = max(clock, arrives)
            del group.asked[: max(0, first)]
        group.clock, group.position = clock + draw_loop.ISSUE, group.position + 1
    return Played(matrix, flights, group.clock)


def matrix_pipe_busy(launch, workgroups: int, latency: float) -> float:
    """The share of time, from when the last workgroup starts until the first has done three tiles;
    two start half a tile apart."""
    delay = play(launch, latency=latency).end / workgroups
    played = play(launch, workgroups, latency, 3, delay)
    start = delay * (workgroups - 1)
    busy = sum(max(0, min(b, played.end) - max(a, start)) for a, b in played.matrix)
    return busy / (played.end - start)


# --------------------------------------------------------------------------------------------------
# The table


def workgroups_a_cu(launch) -> int:
    """By registers, a wave on each SIMD, and by LDS."""
    return min(launch.profile["occupancy"], gfx950.LDS_BYTES // launch.profile["lds"])


def least_flights(launch) -> tuple[float, float]:
    """Of a loop's second turn: the least cycles from asking to waiting, with one workgroup and a
    memory that answers at once; of x and w, and of their scales."""
    loop, flights = launch.counters.loop(), play(launch).flights
    heads = [i for i, pc in enumerate(launch.trace) if pc == loop["first"]]
    found = {True: [], False: []}
    for i in range(heads[1], heads[2]):
        op = launch.program.code[launch.trace[i]].op
        if i in flights:
            found["dwordx4" in op].append(flights[i])
    return min(found[True]), min(found[False])


def grid_order(tiles: int, N: int) -> list[list[tuple[int, int]]]:
    """What `counts.order` is for the last step, for the grid of the others: (tile, panel) that the
    workgroups of each chiplet take, in order."""
    panels = -(-N // COLUMNS.value)
    programs = [(t, panel) for t in range(tiles) for panel in range(panels)]
    return [programs[i :: moe_gluon.XCDS.value] for i in range(moe_gluon.XCDS.value)]


def figures(name: str, launch, short) -> tuple[str, ...]:
    """The cells of ROWS_OF_TABLE. `launch` had a full tile, `short` one of 40 rows; both one
    panel."""
    p, c, loop = launch.profile, launch.counters, launch.counters.loop()
    code = launch.program.code[loop["first"] : loop["last"] + 1]
    cycles, reads = loop["cycles"], [ins.pc for ins in code if ins.op.startswith("ds_read")]
    steps = cycles["matrix"] / 1024  # of K, in an iteration: 32 instructions of 32 cycles
    lds = 4 * sum(int(c.lds_cycles[pc]) for pc in reads) / loop["iterations"]
    issue = 4 * sum(n for kind, n in loop["instructions"].items() if kind != "matrix")
    fit, (values, scales) = workgroups_a_cu(launch), least_flights(launch)
    busy = [matrix_pipe_busy(launch, fit, latency) for latency in LATENCIES]
    matrix = [x.counters.cycles["matrix"] / 4000 for x in (launch, short)]
    order = counts.order if name == "3, shipped" else grid_order
    gate_up, _ = counts.prefill_bytes(4096, order)
    weight_bytes = gate_up["weights"] * gate_up["from_memory"]
    return (
        f"{p['vgprs'] + p['agprs']}; {p['sgpr_spills'] + p['vgpr_spills']}",
        f"{p['lds'] / 1000:.0f}; {fit}",
        f"{lds / steps:.0f}; {4 * cycles['bank conflicts'] / steps:.0f}",
        f"{4 * cycles['lds'] / steps:.0f}",
        f"{loop['instructions']['barrier'] / steps:.0f}; {issue / steps:.0f}",
        f"{values:,.0f}; {scales:,.0f}",
        f"{matrix_pipe_busy(launch, 1, 0):.0%}",
        "; ".join(f"{share:.0%}" for share in busy),
        "; ".join(f"{cycles:.1f} k" for cycles in matrix),
        f"{weight_bytes:,.0f}; {gate_up['x_from_memory']:.0f}",
    )


LATENCIES = (0, 1000, 2400)  # cycles; the last is 1 us at 2.4 GHz
ROWS_OF_TABLE = (
    "registers; spilled ones",
    "LDS KB; workgroups a CU",
    "a step of K, LDS cycles of all waves: reads; of them bank conflicts",
    "with writes, at half the rate",
    "barriers; issue, 4 cycles for all but matrix instructions",
    "cycles from asking to waiting, least: x and w; scales",
    "matrix pipe busy: one workgroup, memory at once",
    "the workgroups that fit, memory after 0; 1,000; 2,400 cycles",
    "matrix cycles of a tile of 128 rows; of 40",
    "MB from memory, 4,096 tokens of a 120b layer: weights; activations",
)


def launches() -> dict[str, tuple]:
    """Of every step gate_up at K = 2880, one panel: a full tile, and one of 40 rows. AssertionError
    where a step does not compute what the oracle does."""
    found = {name: () for name in LAUNCHERS}
    for rows in (128, 40):
        layer = made_up(rows, 1, 2880, 128, 1)
        case, want = routed(layer), expected(layer)
        for name in LAUNCHERS:
            h, launched = emulated(name, *case, trace=0)
            differ = check(h, want)
            print(f"{name}, {rows} rows: {differ} of {h.numel()} values differ", file=sys.stderr)
            found[name] += (launched,)
    return found


LETTERS = {"matrix": "M", "lds": "R", "copy to lds": "C", "vector load": "L", "barrier": "|"}


def in_letters(launch) -> str:
    """A loop's instructions for memory and matrices in their order: L a load, C a copy to LDS, W
    a write to LDS, R a read from there, M a matrix instruction, | a barrier, <n a wait until at
    most n loads are on their way."""
    loop, found = launch.counters.loop(), []
    for ins in launch.program.code[loop["first"] : loop["last"] + 1]:
        letter = "W" if ins.op.startswith("ds_write") else LETTERS.get(classify(ins))
        if ins.klass == "wait" and "vmcnt" in ins.mods:
            letter = f"<{ins.mods['vmcnt']}"
        found += [letter] if letter else []
    runs = [(letter, len([*run])) for letter, run in itertools.groupby(found)]
    return " ".join(f"{n}{letter}" if n > 1 else letter for letter, n in runs)


def steps_table(found: dict[str, tuple] | None = None) -> str:
    """A column a step; then the loops in letters."""
    found = found or launches()
    cells = {name: figures(name, *both) for name, both in found.items()}
    columns = [("gate_up, mxfp8", "what", ""), *((name, name, "") for name in cells)]
    rows = [
        {"what": what} | {name: cells[name][i] for name in cells}
        for i, what in enumerate(ROWS_OF_TABLE)
    ]
    lines = [table(columns, rows), "", "```"]
    for name, (launch, _) in found.items():
        loop = f"{name + ':':13}{in_letters(launch)}"
        lines += textwrap.wrap(loop, 100, subsequent_indent=" " * 13)
    return "\n".join([*lines, "```"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="write it into docs/porting.md")
    parser.add_argument("--draw", metavar="F", type=Path, help="draw the loops into this folder")
    args = parser.parse_args()
    found = launches()
    text = steps_table(found)
    print(text)
    if args.write:
        refresh(counts.DOCS / "porting.md", {"prefill steps": lambda: text}, check=False)
    if args.draw:
        args.draw.mkdir(parents=True, exist_ok=True)
        for name, (launch, _) in found.items():
            file = args.draw / f"{name.replace(', ', '_')}.svg"
            file.write_text(draw_loop.draw(launch, "mxfp8, 128 rows, K = 2880"))


if __name__ == "__main__":
    main()
