"""The mixture-of-experts layer of GPT-OSS in Gluon, for AMD gfx950 (CDNA4): routing, decode and
prefill kernels.

    packed = prepare(experts, "mxfp8")                               # once, at load
    y = moe(x, router_weight, router_bias, packed, top_k, "mxfp8")   # [T, H] -> [T, H]

Read it from the top: the launchers, the formats and how weights are packed, the tiles, then the
kernels: dispatch, combine and route for decode, then those for prefill.

Decode, a layer of at most 16 tokens, is three launches:

    route      router GEMM, top-k, softmax, list of the active experts;
               other workgroups quantise x meanwhile
    dispatch   gather rows, first GEMM, bias, SwiGLU, quantise;
               a workgroup: one expert, 64 columns, all of K
    combine    second GEMM, bias, gate weight, sum over the slots;
               a workgroup: every active expert, 8 columns

It is bound by the bytes of the active experts' weights, so everything serves one purpose: ask for
each byte once, early, and for nothing else. Weights go from memory straight into the registers of
the matrix instruction's operand: no LDS, no barrier and no copy engine in between. The waves of a
workgroup split K; a wave asks for most or all of its share before it multiplies any of it; partial
sums meet in LDS at the end, in a fixed order.

Prefill, all above, is six: route, select (top-k), sort (pairs by expert), dispatch, combine, sum.
It is bound by matrix instructions wherever an expert has some hundred rows: dispatch and combine
are sliceMN, below, whose matrix instructions hide everything else. It reads the same packed
weights. Results are the same in every run, and a token's do not depend on the batch it is in, while
that stays at 16 tokens or below, or above.

Number formats are OCP MX v1.0
(https://www.opencompute.org/documents/ocp-microscaling-formats-mx-v1-0-spec-final-pdf), operand
layouts the CDNA4 ISA's (https://www.amd.com/en/developer/resources/technical-articles.html). Words:

    T, H, I, E  tokens, hidden size, intermediate size, experts
    K, N        inner and outer size of a GEMM's weight
    slot        the i-th of a token's top_k experts; SLOTS is top_k rounded up to a power of two
    pair        a token and a slot, numbered token * SLOTS + slot
    place       of a pair when they are sorted by expert: the row of the intermediate h
    tile        up to BM consecutive places of one expert
    row         of a matrix: of x, of h, or of a tile
    column      of a weight; position: where the packed weight has it
    group       32 values of K that share a scale
    step        what is multiplied at once of K
"""

import re
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple

import torch
import triton
import triton.experimental.gluon.language as gl
from triton.experimental import gluon
from triton.language import PropagateNan
from triton.language.extra import libdevice

cdna4 = gl.amd.cdna4
# triton 3.9 renamed it
reinterpret = (
    getattr(gl.shared_memory_descriptor, "reinterpret", None)
    or gl.shared_memory_descriptor._reinterpret
)

# chiplets of 32 compute units, each with its own L2, which take workgroups in turn
XCDS = gl.constexpr(8)
MFMA = gl.constexpr(16)  # rows and columns of the matrix instructions used here
# K a wave takes in a step: one v_mfma_scale_f32_16x16x128 or four v_mfma_f32_16x16x32_bf16
STEP = gl.constexpr(128)
GROUP = gl.constexpr(32)  # values of K that share an E8M0 scale
# weight columns dealt among four 16 x 16 products, whose scales are a dword a lane
BLOCK = gl.constexpr(64)
DECODE_TOKENS = 16  # the largest decode batch: one 16-row tile holds whatever an expert gets of it
PREFILL_ROWS = gl.constexpr(128)  # of a prefill tile, which is cut 2 x 2
PREFILL_COLUMNS = gl.constexpr(256)
# Prefill tiles of a column panel in turn: 1.5 MB of 8-bit activations at K = 2880, less than half
# of an L2.
TALL = gl.constexpr(4)
SWIGLU_ALPHA = gl.constexpr(1.702)
LOG2_E = gl.constexpr(1.4426950408889634)
INFINITY = gl.constexpr(0x7F800000)  # float32's bits; larger ones are NaN
ALL = gl.constexpr(PropagateNan.ALL)
UNIT_SCALE = gl.constexpr(127)  # 2^0 in E8M0

# --------------------------------------------------------------------------------------------------
# The layer and its launchers


def is_supported() -> bool:
    """True where Triton's active driver compiles for gfx950, exactly: the instructions used exist
    nowhere else."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # Triton has no active driver
        return False
    return target.backend == "hip" and target.arch == "gfx950"


def moe(
    x, router_weight, router_bias, packed: "PackedExperts", top_k: int,
    activations: str | None = None, swiglu_limit: float = 7.0,
) -> torch.Tensor:  # fmt: skip
    """The whole layer. x bf16 [T, H], router_weight bf16 [E, H], router_bias bf16 or float32 [E] ->
    bf16 [T, H]. `activations`, if given, must be what `packed` was prepared for. Nothing is read
    back to the host. Raises ValueError for what the kernels do not take."""
    if activations not in (None, packed.activations):
        raise ValueError(
            f"activations={activations!r}, but the weights were prepared for {packed.activations!r}"
        )
    check_sizes(x, router_weight, packed, top_k)
    if len(x) == 0:
        return torch.empty_like(x)
    routing = gating_gemm(x.contiguous(), router_weight.contiguous(), router_bias, packed, top_k)
    h, h_scale = dispatch_swiglu(routing, packed, swiglu_limit)
    return combine(h, h_scale, routing, packed)


def check_sizes(x, router_weight, packed: "PackedExperts", top_k: int) -> None:
    """Raises ValueError for what the kernels do not take."""
    E, H = router_weight.shape
    if x.dtype != torch.bfloat16 or router_weight.dtype != torch.bfloat16:
        raise ValueError(
            f"x is {x.dtype} and the router {router_weight.dtype}: the kernels take bfloat16"
        )
    if x.shape[1:] != (H,) or H != packed.gate_up.K or E != len(packed.gate_up.data):
        experts = f"{len(packed.gate_up.data)} of {packed.gate_up.K}"
        raise ValueError(f"x is {list(x.shape)}, the router {E} x {H}, the experts {experts}")
    if not 1 <= top_k <= min(E, 8):
        raise ValueError(f"top_k={top_k}: expected 1 to 8, and no more than the {E} experts")
    if len(x) * triton.next_power_of_2(top_k) * max(H, packed.down.K) * 2 >= 2**31:
        raise ValueError(
            f"{len(x)} tokens at once: split them, an intermediate would exceed 2 GB, a buffer's "
            "range"
        )


@dataclass
class Routing:
    """What `gating_gemm` leaves on the device for the expert GEMMs."""

    x: torch.Tensor  # activations of the first GEMM: bf16 [T, H], or uint8 [T, H], [T, H/2] (e2m1)
    x_scale: torch.Tensor  # uint8 [T, H/32] in mx formats, rows padded to whole dwords
    chosen: torch.Tensor  # int32 [T, SLOTS]: expert ids, the largest logit first
    gates: torch.Tensor  # float32 [T, SLOTS]
    pairs: torch.Tensor  # int32 [T * SLOTS], by place
    tiles: torch.Tensor  # int32 [upper bound, 4]: see load_tile
    num_tiles: torch.Tensor  # int32 [1]
    BM: int
    top_k: int


def empty_routing(x, E: int, packed: "PackedExperts", top_k: int) -> Routing:
    """Room for the routing of x [T, H] to E experts. bf16 activations are x itself."""
    (T, H), slots, f = x.shape, triton.next_power_of_2(top_k), FORMATS[packed.activations]
    BM = DECODE_TOKENS if T <= DECODE_TOKENS else PREFILL_ROWS.value
    integers = {"dtype": torch.int32, "device": x.device}
    num_tiles = torch.empty(1, **integers)
    return Routing(
        *((x, num_tiles) if f.scale == "none" else empty_activations(f, T, H, x.device)),
        chosen=torch.empty(T, slots, **integers),
        gates=torch.empty(T, slots, dtype=torch.float32, device=x.device),
        pairs=torch.empty(T * slots, **integers),
        # no split of the pairs makes more
        tiles=torch.empty(min(T * slots, E + T * slots // BM), 4, **integers),
        num_tiles=num_tiles,
        BM=BM,
        top_k=top_k,
    )


def empty_activations(f: "Format", rows: int, K: int, device) -> tuple[torch.Tensor, torch.Tensor]:
    """Room for rows of K values in a format, and for their scales (one unused byte where it has
    none)."""
    width, dtype = K // 2 if f.element == "e2m1" else K, torch.uint8
    if f.element == "bf16":
        dtype = torch.bfloat16
    scale = (rows, scale_bytes(K)) if f.scale == "mx" else 1
    values = torch.empty(rows, width, dtype=dtype, device=device)
    return values, torch.empty(scale, dtype=torch.uint8, device=device)


def gating_gemm(x, router_weight, router_bias, packed: "PackedExperts", top_k: int) -> Routing:
    """Router GEMM (bf16, float32 sums), top-k, gates, the sort of pairs by expert, x in the
    experts' format: one launch in decode, three above. x bf16 [T, H]; router_weight bf16 [E, H],
    router_bias bf16 or float32 [E]."""
    (T, H), E, f = x.shape, len(router_weight), FORMATS[packed.activations]
    r, decode = empty_routing(x, E, packed, top_k), T <= DECODE_TOKENS
    logits = torch.empty(T, E, dtype=torch.float32, device=x.device)
    g = route_tile(H, E, decode)
    quantising = 0 if f.scale == "none" else H // GROUP.value
    grid = triton.cdiv(E, g.COLUMNS) + quantising, triton.cdiv(T, g.BM)
    router = x, router_weight, router_bias, logits, packed.arrived
    results = r.x, r.x_scale, r.tiles, r.num_tiles, r.pairs, r.chosen, r.gates
    static, settings = packed.gate_up.input_scale, (f.element, f.scale == "mx", top_k, decode, g)
    route_kernel[grid](*router, *results, T, static, *settings, num_warps=g.WAVES)
    if not decode:
        programs = triton.cdiv(T, 16)
        counts = torch.empty(programs, E, dtype=torch.int32, device=x.device)
        select_kernel[(programs,)](
            logits, r.chosen, r.gates, counts, T, E, top_k, BM=16, WAVES=4, num_warps=4
        )
        lists = r.tiles, r.num_tiles, r.pairs
        sizes = programs, len(r.pairs), E, r.BM
        sort_kernel[(E,)](r.chosen, counts, *lists, *sizes, CHUNK=1024, WAVES=4, num_warps=4)
    return r


def dispatch_swiglu(routing: Routing, packed: "PackedExperts", swiglu_limit: float = 7.0):
    """The first expert GEMM of all pairs and SwiGLU -> h, by place, as the second GEMM reads it:
    bf16 or uint8 [T * SLOTS, I] or [T * SLOTS, I/2] (e2m1), and its scales uint8 [T * SLOTS, I/32]
    in mx formats."""
    r, w, f = routing, packed.gate_up, FORMATS[packed.activations]
    T, slots = r.chosen.shape
    h, h_scale = empty_activations(f, T * slots, w.N // 2, w.data.device)
    tensors = r.x, r.x_scale, w.data, w.scale, w.bias, r.tiles, r.num_tiles, r.pairs, h, h_scale
    settings = w.input_scale, packed.down.input_scale, swiglu_limit, slots
    if T <= DECODE_TOKENS:
        g = dispatch_tile(w.K, w.N, f)
        dispatch_kernel[w.N // g.BN, len(r.tiles)](*tensors, *settings, g, num_warps=g.WAVES)
    else:
        g = prefill_tile(w.K, w.N, f)
        grid = prefill_grid(g, routing)
        prefill_dispatch_kernel[grid](*tensors, *settings, g, num_warps=4, waves_per_eu=2)
    return h, h_scale


def combine(h, h_scale, routing: Routing, packed: "PackedExperts") -> torch.Tensor:
    """The second expert GEMM, weighted by the gates and summed over each token's slots, without
    atomics: one launch in decode, two above. h, h_scale from `dispatch_swiglu` -> bf16 [T, H]."""
    r, w, f = routing, packed.down, FORMATS[packed.activations]
    T, slots = r.chosen.shape
    out = torch.empty(T, w.N, dtype=torch.bfloat16, device=h.device)
    tensors = h, h_scale, w.data, w.scale, w.bias, r.tiles, r.num_tiles, r.pairs
    if T <= DECODE_TOKENS:
        g = combine_tile(w.K, w.N, f, r.top_k)
        grid = (triton.cdiv(g.padded // g.COLUMNS, XCDS.value) * XCDS.value,)
        results = r.chosen, r.gates, out
        combine_kernel[grid](*tensors, *results, T, w.input_scale, g, num_warps=g.WAVES)
    else:
        weighted = torch.empty(T * slots, w.N, dtype=torch.bfloat16, device=h.device)
        g = prefill_tile(w.K, w.N, f)
        settings, grid = (r.gates, weighted, w.input_scale, g), prefill_grid(g, routing)
        prefill_combine_kernel[grid](*tensors, *settings, num_warps=4, waves_per_eu=2)
        grid = triton.cdiv(w.N, 2048), T
        sum_slots_kernel[grid](weighted, out, w.N, r.top_k, BN=2048, WAVES=4, num_warps=4)
    return out


def prefill_grid(g: "PrefillTile", routing: Routing) -> tuple[int]:
    """For the most tiles there can be."""
    return (triton.cdiv(len(routing.tiles) * g.panels, XCDS.value) * XCDS.value,)


# --------------------------------------------------------------------------------------------------
# Formats


@dataclass(frozen=True)
class Format:
    """What the expert GEMMs see of their activations, and the storage of the weights these
    multiply."""

    element: str  # "bf16" | "e4m3" | "e5m2" | "e2m1"
    scale: str  # "none" | "static" (one float32 a tensor) | "mx" (E8M0 per 32)
    weights: torch.dtype  # uint8: mxfp4


FORMATS = {
    "bf16": Format("bf16", "none", torch.bfloat16),
    "fp8": Format("e4m3", "static", torch.uint8),
    "fp8_e5m2": Format("e5m2", "static", torch.uint8),
    "mxfp8": Format("e4m3", "mx", torch.uint8),
    "mxfp8_e5m2": Format("e5m2", "mx", torch.uint8),
    "mxfp4": Format("e2m1", "mx", torch.uint8),
}


# --------------------------------------------------------------------------------------------------
# Packed weights
#
# A lane reads 16 bytes of w at once: 32 values of e2m1, the low nibble first, which are one scale
# group, or 8 of bf16. The B operand of v_mfma_scale_f32_16x16x128 is 64 lanes of these: lane L
# holds column L % 16 and K = 32 * (L // 16) .. + 31. So [N, K] is stored as [N/16, K/32, 16, 16
# bytes], and a wave reads 1,024 bytes in a row an instruction:
#
#     byte     0 ........ 15  16 ....... 31       240 ...... 255  256 ....... 271
#     holds    n=0, k=0..31   n=1, k=0..31   ...  n=15, k=0..31   n=0, k=32..63   ...
#     lane     0              1                   15              16
#
# bf16 is the same with 8 values of K in 16 bytes, four of which are v_mfma_f32_16x16x32_bf16's 32
# K: [N/16, K/32, 4, 16, 8 values]. K needs no padding: 2880 is 22.5 steps of 128, and the lanes of
# the missing half are switched off.
#
# Columns are dealt within blocks of 64: n above is a position, and position 16 t + 4 g + i of a
# block is its column 16 g + 4 t + i (`column_of`). The reason is what a lane gets of a product:
# lane L, row L % 16 and four columns, from 4 * (L // 16), of each 16 x 16. Lane 21 (row 5, g = 1):
#
#     16 x 16         t = 0       t = 1       t = 2       t = 3
#     its positions   4 ..... 7   20 ... 23   36 ... 39   52 ... 55
#     are columns     16 ... 19   20 ... 23   24 ... 27   28 ... 31
#
# Dealt so, they are 16 consecutive columns, which it stores at once, gate and up side by side. N is
# padded to blocks of 64 (2880 and 5760 are 45 and 90).
#
# Scales are [N/64, K/32, 16, 4]: the dword of (K group, n) holds the scales of positions n, n + 16,
# n + 32 and n + 48, the four 16 x 16 of a block; the instruction picks its byte by op_sel.
#
# Addresses are sums of strides, which the fields of `Gemm` name. Position n and k of expert e, e2m1
# and K = 2880, where a strip is 16 positions and a chunk their next 16 bytes of K each:
#
#     w_expert * e + w_strip * (n // 16) + w_chunk * (k // 32) + lane * (n % 16) + k % 32 // 2
#     scale_expert * e + scale_block * (n // 64) + 64 * (k // 32) + 4 * (n % 16) + n // 16 % 4
#
#     e = 0, n = 37, k = 256:  w       23,040 * 2 + 256 * 8 + 16 * 5 + 0 = byte 48,208
#                              w_scale  5,760 * 0 +  64 * 8 +  4 * 5 + 2 = byte 534


@dataclass
class PackedWeight:
    """A GEMM's weights of all experts as the kernels read them, N padded to blocks of 64 by
    zeros."""

    data: torch.Tensor  # uint8 [E, N/16, K/32, 16, 16] or bf16 [E, N/16, K/32, 4, 16, 8]
    scale: torch.Tensor | None  # uint8 [E, N/64, K/32, 16, 4]
    bias: torch.Tensor  # float32 [E, N]
    input_scale: float  # of static fp8 activations; 1 for all others
    N: int
    K: int

    def unpack(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """As in the checkpoint: weight uint8 [E, N, K/2] or bf16 [E, N, K], scale uint8 [E, N,
        K/32]."""
        E, groups, N = len(self.data), self.K // GROUP.value, self.N
        if self.scale is None:  # [E, N/64, t, K/32, 4, g, i, 8] -> [E, N/64, g, t, i, K/32, 4, 8]
            weight = self.data.view(E, -1, 4, groups, 4, 4, 4, 8).permute(0, 1, 5, 2, 6, 3, 4, 7)
            return weight.reshape(E, -1, self.K)[:, :N], None
        weight = self.data.view(E, -1, 4, groups, 4, 4, 16).permute(0, 1, 4, 2, 5, 3, 6)
        # from [.., K/32, g, i, t]
        scale = self.scale.view(E, -1, groups, 4, 4, 4).permute(0, 1, 3, 5, 4, 2)
        return weight.reshape(E, -1, self.K // 2)[:, :N], scale.reshape(E, -1, groups)[:, :N]


@dataclass
class PackedExperts:
    """A layer's experts, packed for one format. `arrived` counts workgroups of `route`: see
    last_to_arrive."""

    gate_up: PackedWeight
    down: PackedWeight
    activations: str
    arrived: torch.Tensor  # int32 [1]


def prepare(experts, activations: str) -> PackedExperts:
    """Packs a layer's experts (the fields of weights.Experts) for `activations`, a key of FORMATS,
    on their device. The result is as large as the input, which is left as it was. Raises ValueError
    for an unknown format, weights it does not multiply, missing static scales, or sizes that are no
    multiple of 32."""
    if activations not in FORMATS:
        raise ValueError(f"activations={activations!r}, expected one of {', '.join(FORMATS)}")
    f, dtype = FORMATS[activations], experts.gate_up_weight.dtype
    if dtype != f.weights:
        fitting = [name for name, other in FORMATS.items() if other.weights == dtype]
        raise ValueError(
            f"activations={activations!r} need {f.weights} expert weights, these are {dtype}: "
            f"{'use ' + ' or '.join(fitting) if fitting else 'convert them'}"
        )
    scales = (
        (experts.gate_up_input_scale, experts.down_input_scale)
        if f.scale == "static"
        else (1.0, 1.0)
    )
    if None in scales:
        raise ValueError(
            f"activations={activations!r} need the static input scales of a Quark checkpoint; use "
            "mxfp8"
        )
    gate_up = pack(experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias, scales[0])
    down = pack(experts.down_weight, experts.down_scale, experts.down_bias, scales[1])
    if gate_up.N != 2 * down.K or gate_up.K != down.N:
        raise ValueError(
            f"gate_up is {gate_up.N} x {gate_up.K}, down {down.N} x {down.K}: expected 2I x H and "
            "H x I"
        )
    return PackedExperts(
        gate_up, down, activations, torch.zeros(1, dtype=torch.int32, device=gate_up.data.device)
    )


def nan_where_infinite(weight, scale):
    """The scale bytes, with NaN's in place of those whose group exceeds float32: at 2^126 e2m1's 4
    does, at 2^127 its 2. Such weights are infinities where they are expanded, whose sums are NaN;
    the matrix instruction scales sums instead, and would pass them off as numbers."""
    huge = scale > 252
    if scale.is_meta or not huge.any():
        return scale
    codes = weight.unflatten(-1, (-1, 16))[huge]  # [groups, 16 bytes]
    largest = torch.maximum(codes & 7, codes >> 4 & 7).amax(-1)  # codes rise with magnitudes
    infinite = largest >= torch.where(scale[huge] == 253, 6, 4)
    return scale.masked_scatter(huge, scale[huge].masked_fill(infinite, 255))


def pack(weight, scale, bias, input_scale: float) -> PackedWeight:
    """weight uint8 [E, N, K/2] with scale uint8 [E, N, K/32], or bf16 [E, N, K] with None; bias [E,
    N]."""
    E, N = weight.shape[:2]
    K = weight.shape[2] * (1 if scale is None else 2)
    if N % GROUP.value or K % GROUP.value:
        raise ValueError(
            f"an expert weight of {N} x {K}: both sizes must be multiples of {GROUP.value}"
        )
    groups = K // GROUP.value

    def blocks(rows):  # [E, N, *] -> [E, N/64, g, t, i, *]
        padding = [rows.new_zeros(E, -N % BLOCK.value, *rows.shape[2:])] if N % BLOCK.value else []
        return torch.cat([rows, *padding], 1).view(E, -1, 4, 4, 4, *rows.shape[2:])

    # What a lane reads, 16 bytes, moved as one element. The new orders are [E, N/64, t, K/32, 4, g,
    # i], [E, N/64, t, K/32, g, i] and, of scales, [E, N/64, K/32, g, i, t].
    lanes = weight.contiguous().view(torch.complex128)
    if scale is None:
        data = blocks(lanes.view(E, N, groups, 4)).permute(0, 1, 3, 5, 6, 2, 4).contiguous()
        data = data.view(weight.dtype).view(E, -1, groups, 4, 16, 8)
    else:
        data = blocks(lanes).permute(0, 1, 3, 5, 2, 4).contiguous()
        data = data.view(weight.dtype).view(E, -1, groups, 16, 16)
        scale = blocks(nan_where_infinite(weight, scale))
        scale = scale.permute(0, 1, 5, 2, 4, 3).contiguous().view(E, -1, groups, 16, 4)
    return PackedWeight(data, scale, bias.float().contiguous(), float(input_scale), N, K)


# --------------------------------------------------------------------------------------------------
# Tiles: all that is known of a GEMM when it is compiled
#
# Every size, stride and layout is a plain field, worked out once by the functions below, which are
# the only ones that choose tile sizes. Triton's key of a compiled kernel is the text of the fields.
# eq=False: there is one object of a kind and size (`cache`), so a launch finds its kernel by
# identity, in place of a hash of forty fields.
# Figures are for 120b (H = I = 2880, 4 of 128 experts), mxfp8, triton 3.7.1.


@dataclass(frozen=True, eq=False)
class Gemm:
    """x [*, K] @ w [N, K].T. Strides count stored elements: bf16, bytes, or bytes of two e2m1."""

    K: int
    N: int
    X: str  # element of the activations
    MX: bool  # whether they have E8M0 scales
    STATIC: bool  # whether they have one float32 scale
    W: str  # element of the weights: "bf16" | "e2m1"
    padded: int  # columns of the packed weights: N, up to whole blocks of 64
    lane: int  # elements in 16 bytes: what a lane reads at once
    x_values: int  # values of x in a stored element
    w_values: int  # values of w in a stored element
    x_row: int  # stride of a row of x
    x_scale_row: int  # of a row of its scales
    w_chunk: int  # of the next 16 bytes of a column's K: 16 columns lie between
    w_strip: int  # of the next 16 columns
    w_expert: int
    scale_block: int  # of the next 64 columns
    scale_expert: int


def gemm_fields(K: int, N: int, f: Format) -> dict:
    """The fields of Gemm."""
    bf16 = f.element == "bf16"
    lane, padded, groups = 8 if bf16 else 16, -(-N // BLOCK.value) * BLOCK.value, K // GROUP.value
    x_values, w_values = 2 if f.element == "e2m1" else 1, 1 if bf16 else 2
    return dict(
        K=K,
        N=N,
        X=f.element,
        MX=f.scale == "mx",
        STATIC=f.scale == "static",
        W="bf16" if bf16 else "e2m1",
        padded=padded,
        lane=lane,
        x_values=x_values,
        w_values=w_values,
        x_row=K // x_values,
        x_scale_row=scale_bytes(K),
        w_chunk=MFMA.value * lane,
        w_strip=MFMA.value * K // w_values,
        w_expert=padded * K // w_values,
        scale_block=BLOCK.value * groups,
        scale_expert=padded * groups,
    )


@dataclass(frozen=True, eq=False)
class DecodeTile(Gemm):
    """A workgroup computes BM rows by BN columns, of which COLUMNS exist. Its waves split K: in a
    step, wave w takes K = 128 * (step * WAVES + w) .. + 127.

        K      0 ..... 127   128 ... 255   256 ... 383   384 ... 511   512 ... 639   640 ...
        wave   0, step 0     1, step 0     2, step 0     3, step 0     0, step 1     1, step 1

    Every operand has a leading axis of waves, of which wave w holds element w: so waves work on
    different K while the program reads as one. AHEAD steps are requested before the first is
    multiplied (by combine: all steps of AHEAD experts)."""

    BM: int
    BN: int
    COLUMNS: int
    WAVES: int
    AHEAD: int
    STEPS: int
    acc_registers: int  # of a lane
    # [WAVES, BM, BN]: lane L holds row L % 16, columns 4 * (L // 16) .. + 3 of each 16 x 16
    acc: gl.amd.AMDMFMALayout
    # x [WAVES, BM, 128 K]: lane L holds row L % 16 and the 16 bytes L // 16 of every 64
    x: gl.DotOperandLayout
    # w [WAVES, 128 K, BN]: lane L holds column L % 16 and the 16 bytes L // 16 of every 64
    w: gl.DotOperandLayout
    # [WAVES, BM, 4] and [WAVES, BN, 4]: lane L holds row L % 16 of every 16, K group L // 16
    x_scale: gl.DistributedLinearLayout
    w_scale: gl.DistributedLinearLayout
    # w_scale as it lies in memory, [WAVES, 4 groups, 16, BN/16]: a lane's are consecutive bytes
    w_scale_memory: gl.DistributedLinearLayout
    # acc, read back from LDS: a lane holds all waves' values of BN/16 columns
    partial: gl.BlockedLayout
    # its sum [BM, BN]: lane L of wave w holds row 4 * w + L // 16, BN/16 columns from BN/16 *
    # (L % 16)
    out: gl.SliceLayout


def decode_fields(
    K: int, N: int, f: Format, BM: int, BN: int, COLUMNS: int, WAVES: int, AHEAD: int
) -> dict:
    """The fields of DecodeTile."""
    fields = gemm_fields(K, N, f)
    waves, tiles = WAVES.bit_length() - 1, BN // MFMA.value
    acc = gl.amd.AMDMFMALayout(
        4, [16, 16, 32 if fields["W"] == "bf16" else 128], True, [WAVES, 1, 1]
    )

    def linear(shape, registers, lanes):  # waves along the first axis
        wave = [[1 << i] + [0] * (len(shape) - 1) for i in range(waves)]
        return gl.DistributedLinearLayout(registers, lanes, wave, [], shape)

    def scales(rows):
        registers = [[0, 16 << i, 0] for i in range((rows // 16).bit_length() - 1)]
        lanes = [[0, 1, 0], [0, 2, 0], [0, 4, 0], [0, 8, 0], [0, 0, 1], [0, 0, 2]]
        return linear([WAVES, rows, 4], registers, lanes)

    partial = gl.BlockedLayout([WAVES, 1, tiles], [1, 4, 16], [1, WAVES, 1], [2, 1, 0])
    return fields | dict(
        BM=BM,
        BN=BN,
        COLUMNS=COLUMNS,
        WAVES=WAVES,
        AHEAD=AHEAD,
        STEPS=-(-K // (STEP.value * WAVES)),
        acc_registers=BM * BN // 64,
        acc=acc,
        x=gl.DotOperandLayout(0, acc, fields["lane"]),
        w=gl.DotOperandLayout(1, acc, fields["lane"]),
        x_scale=scales(BM),
        w_scale=scales(BN),
        w_scale_memory=linear(
            [WAVES, 4, 16, tiles],
            [[0, 0, 0, 1 << i] for i in range(tiles.bit_length() - 1)],
            [[0, 0, 1, 0], [0, 0, 2, 0], [0, 0, 4, 0], [0, 0, 8, 0], [0, 1, 0, 0], [0, 2, 0, 0]],
        ),
        partial=partial,
        out=gl.SliceLayout(0, partial),
    )


@cache
def route_tile(H: int, E: int, decode: bool) -> DecodeTile:
    """In decode 4 experts a workgroup: 32 CUs read the router, 23 KB each. Above, reading it once a
    tile counts."""
    rows, columns = (16, 4) if decode else (32, 16)
    return DecodeTile(**decode_fields(H, E, FORMATS["bf16"], rows, 16, columns, WAVES=8, AHEAD=0))


@cache
def dispatch_tile(K: int, N: int, f: Format) -> DecodeTile:
    """64 columns are one scale group of h, and 360 workgroups at one token. All 6 steps of a wave
    are in flight, 28 KB: 192 registers, 2 workgroups a CU. bf16 has 4 times the bytes a column:
    half the columns and steps for the same flight."""
    columns, ahead = (32, 3) if f.element == "bf16" else (64, 6)
    return DecodeTile(**decode_fields(K, N, f, DECODE_TOKENS, columns, columns, 4, ahead))


@dataclass(frozen=True, eq=False)
class CombineTile(DecodeTile):
    """Its workgroup holds all tokens: BM rows, whatever an expert gets of them, are the most."""

    TOP_K: int
    SLOTS: int
    PAIRS: int
    CELLS: int  # floats that the waves leave in LDS: [WAVES, PAIRS, COLUMNS]
    LDS: int  # with a dump behind them for rows and columns that do not exist, [WAVES, BM, BN]
    # [WAVES, BM tokens, SLOTS, COLUMNS]: a lane holds all waves' of a (token, slot, column)
    final: gl.BlockedLayout
    summed: gl.SliceLayout  # [BM tokens, SLOTS, COLUMNS]


@cache
def combine_tile(K: int, N: int, f: Format, top_k: int) -> CombineTile:
    """8 columns are 360 workgroups, with half of each operand's lanes off; 16 would leave 76 of 256
    CUs without work. 8 waves x 3 steps are all of K, so an expert takes 42 registers and 4 are in
    flight: 8 KB a wave, 66 KB a workgroup, 188 registers, one workgroup a CU at a time. Raises
    ValueError for an inner size beyond the registers."""
    waves, most = 8, 6 if f.element == "bf16" else 12
    steps = triton.cdiv(K, waves * STEP.value)
    if steps > most:
        raise ValueError(
            f"inner size {K}: combine holds an expert's steps, up to {most * waves * STEP.value}"
        )
    columns, slots, ahead = 8, triton.next_power_of_2(top_k), min(4, most // steps)
    fields = decode_fields(K, N, f, DECODE_TOKENS, 16, columns, waves, ahead)
    pairs = DECODE_TOKENS * slots
    cells = waves * pairs * columns
    lanes = [1, 64 // (slots * columns), slots, columns]
    final = gl.BlockedLayout([waves, 1, 1, 1], lanes, [1, waves, 1, 1], [3, 2, 1, 0])
    return CombineTile(
        **fields, TOP_K=top_k, SLOTS=slots, PAIRS=pairs, CELLS=cells,
        LDS=triton.next_power_of_2(cells + waves * DECODE_TOKENS * 16), final=final,
        summed=gl.SliceLayout(0, final),
    )  # fmt: skip


@dataclass(frozen=True, eq=False)
class PrefillTile(Gemm):
    """A workgroup of 4 waves computes 128 rows by a panel of 256 columns, cut 2 x 2: see "Prefill"
    below. LDS holds RING steps of K."""

    panels: int
    RING: int
    STEPS: int
    x_step: int  # stride of a step of x: its stored elements of a row
    w_step: int  # of a step of a strip: 1,024 bytes
    chunks: int  # of 16 bytes in a row's step
    # What is inside K in the last step: chunks of x, scale groups of x, lanes of w
    chunks_left: int
    groups_left: int
    lanes_left: int
    # [64, 128]: wave (m, n) holds rows 32 m .. + 31, columns 64 n .. + 63; of each 16 x 16 lane L
    # holds row L % 16, columns 4 * (L // 16) .. + 3
    acc: gl.amd.AMDMFMALayout
    # x [64, x_step]: lane L holds row L % 16 and the 16 bytes L // 16 of every 64
    x: gl.DotOperandLayout
    # w [64 bytes of K, 128]: lane L holds column L % 16 and the 16 bytes L // 16
    w: gl.DotOperandLayout
    # [64, 4]: lane L holds row L % 16, K group L // 16 of its two 16 x 16
    x_scale: gl.DistributedLinearLayout
    # [128, 4]: lane L holds column L % 16, K group L // 16 of its four, bytes of one register
    w_scale: gl.DistributedLinearLayout
    # On the way to LDS. x [64 rows, chunks, 16 bytes]: lanes hold the chunks of a row, then rows
    x_copy: gl.BlockedLayout
    # w [8 strips, 64, 16 bytes]: a wave holds a strip's step, lane L the 16 bytes from 16 L
    w_copy: gl.BlockedLayout
    # x_scale [256 rows, 1, 4 bytes]: lane L of wave w holds the step of row 64 w + L. 128 rows
    # exist, but a wait counts the copies of all waves alike
    x_scale_copy: gl.BlockedLayout
    # w_scale [4 blocks, 64, 4 bytes]: a wave holds a block's step, lane L the dword L
    w_scale_copy: gl.BlockedLayout
    # In LDS, chunk c of row r of x lies at c ^ s, s the exclusive or of these over the bits of r.
    # LDS serves a ds_read_b128 in passes of 16 lanes, the first {0-3, 12-15, 20-27}: two
    # neighbouring chunks of 8 rows each. With rows 32 banks wide, or 16, this is what makes every
    # pass meet all 64 banks.
    swizzle: tuple
    # In LDS: x [64, x_step], swizzled
    x_shared: gl.SharedLinearLayout
    # w [64 bytes of K, 128], as packed: the 64 lanes of a ds_read_b128 read 1,024 bytes in a row
    w_shared: gl.SharedLinearLayout
    # w_scale [128, 4], as packed: a lane's four are one dword
    w_scale_shared: gl.SharedLinearLayout


@cache
def prefill_tile(K: int, N: int, f: Format) -> PrefillTile:
    """RING: as many steps as let two workgroups share the 160 KB of LDS of a compute unit, at 34 KB
    a step with 8-bit activations, 26 KB with fp4, 24 KB with bf16. A copy is in flight for 4 RING -
    3 regions: 5 of 256 matrix cycles with 8-bit activations, else 9 of 128, and twice that while
    two workgroups take turns."""
    fields = gemm_fields(K, N, f)
    lane, step = fields["lane"], 32 if f.element == "bf16" else 128  # K of a matrix instruction
    x_step = step // fields["x_values"]
    chunks = x_step // lane
    swizzle = (0, 1, 2, 4, 0, 0) if chunks == 8 else (0, 0, 2, 3, 0, 0)
    acc = gl.amd.AMDMFMALayout(4, [16, 16, step], True, [2, 2], tiles_per_warp=[2, 4])
    x, w = gl.DotOperandLayout(0, acc, lane), gl.DotOperandLayout(1, acc, lane)

    def copy(of_lane, lanes):
        return gl.BlockedLayout([1, 1, of_lane], lanes, [4, 1, 1], [2, 1, 0])

    def bits(size):  # 1, 2, 4 ..
        return [1 << i for i in range(size.bit_length() - 1)]

    w_bytes = [[i, 0] for i in bits(4 * lane)]  # bits of K in 64 bytes of a column
    return PrefillTile(
        **fields,
        panels=-(-N // PREFILL_COLUMNS.value),
        RING=2 if f.element in ("e4m3", "e5m2") else 3,
        STEPS=-(-K // step),
        x_step=x_step,
        w_step=64 * lane,
        chunks=chunks,
        chunks_left=K // fields["x_values"] % x_step // lane or chunks,
        groups_left=K % step // GROUP.value or 4,
        lanes_left=K % step * 64 // step or 64,
        acc=acc,
        x=x,
        w=w,
        x_scale=cdna4.get_mfma_scale_layout(x, [64, 4]),
        w_scale=cdna4.get_mfma_scale_layout(w, [128, 4]),
        x_copy=copy(lane, [64 // chunks, chunks, 1]),
        w_copy=copy(lane, [1, 64, 1]),
        x_scale_copy=copy(4, [64, 1, 1]),
        w_scale_copy=copy(4, [1, 64, 1]),
        swizzle=swizzle,
        x_shared=gl.SharedLinearLayout(
            [[0, i] for i in bits(x_step)] + [[1 << i, s * lane] for i, s in enumerate(swizzle)]
        ),
        w_shared=gl.SharedLinearLayout(
            w_bytes[:-2] + [[0, i] for i in bits(16)] + w_bytes[-2:] + [[0, 16], [0, 32], [0, 64]]
        ),
        w_scale_shared=gl.SharedLinearLayout(
            [[16, 0], [32, 0], [1, 0], [2, 0], [4, 0], [8, 0], [0, 1], [0, 2], [64, 0]]
        ),
    )


# --------------------------------------------------------------------------------------------------
# Words that all kernels use


@gluon.constexpr_function
def scale_bytes(K):
    """Bytes of a row of activation scales: whole steps of 128 K, so that the scales of a step are
    an aligned dword."""
    return -(-K // STEP.value) * 4


@gluon.constexpr_function
def only(axis, layout):
    """The 1-D layout along one axis of `layout`."""
    for other in reversed(range(layout.rank)):
        layout = layout if other == axis else gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def iota(axis: gl.constexpr, size: gl.constexpr, layout: gl.constexpr):
    """0 .. size - 1 along one axis, broadcastable against a tensor of `layout`."""
    RANK: gl.constexpr = layout.rank
    i = gl.arange(0, size, only(axis, layout))
    for other in gl.static_range(RANK):
        if other != axis:
            i = gl.expand_dims(i, other)
    return i


@gluon.jit
def column_of(n):
    """The column at position n of the packed weights: position 16 t + 4 g + i of 64 is column 16 g
    + 4 t + i."""
    return n // BLOCK * BLOCK + n // 4 % 4 * 16 + n // 16 % 4 * 4 + n % 4


class Tile(NamedTuple):
    """Places first .. first + count - 1, all of one expert."""

    expert: gl.tensor
    first: gl.tensor
    count: gl.tensor


# The list of tiles, int32 [*, 4]: expert, first place, number of places, and one unused, so that a
# tile is 16 bytes. These three alone know it.


@gluon.jit
def load_tile(tiles, t):
    return Tile(gl.load(tiles + 4 * t), gl.load(tiles + 4 * t + 1), gl.load(tiles + 4 * t + 2))


@gluon.jit
def load_tile_from_lds(tiles, t, exists, WAVES: gl.constexpr):
    """Of no places unless it exists."""
    count = gl.where(exists, scalar_of(tiles, 4 * t + 2, WAVES), 0)
    return Tile(scalar_of(tiles, 4 * t, WAVES), scalar_of(tiles, 4 * t + 1, WAVES), count)


@gluon.jit
def store_tiles(tiles, t, expert, first, count, exists):
    """A tensor of tiles."""
    cdna4.buffer_store(expert, tiles, 4 * t, mask=exists)
    cdna4.buffer_store(first, tiles, 4 * t + 1, mask=exists)
    cdna4.buffer_store(count, tiles, 4 * t + 2, mask=exists)


@gluon.jit
def scalar_of(memory, index, WAVES: gl.constexpr):
    """One element of a 1-D LDS tensor, the same in every lane."""
    layout: gl.constexpr = gl.BlockedLayout([1], [64], [WAVES], [0])
    return gl.sum(memory.gather(gl.full([1], index, gl.int32, layout), 0), axis=0)


@gluon.jit
def load_pairs(pairs, tile, size: gl.constexpr, layout: gl.constexpr):
    """int32 [size]: the pairs at a tile's places; nothing is asked for beyond them."""
    place = gl.arange(0, size, layout)
    return cdna4.buffer_load(pairs, tile.first + place, mask=place < tile.count)


# --------------------------------------------------------------------------------------------------
# dispatch, decode: gather, first GEMM, SwiGLU


@gluon.jit
def dispatch_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, h_scale, x_static, h_static,
    LIMIT: gl.constexpr, SLOTS: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """h[place] = swiglu(x[token of place] @ w[expert].T + bias[expert]), quantised for the second
    GEMM. Program (j, t): positions j * BN .. of tile t, which are BN/2 consecutive values of h, and
    in mx formats exactly one scale group."""
    t, j = gl.program_id(1), gl.program_id(0)
    if t >= gl.load(num_tiles):
        return
    tile = load_tile(tiles, t)
    pair = load_pairs(pairs, tile, g.BM, only(1, g.x))
    scale_pair = load_pairs(pairs, tile, g.BM, only(1, g.x_scale))
    # rows without a place ask for no bias
    n = column_of(j * g.BN + iota(1, g.BN, g.out))
    exists = iota(0, g.BM, g.out) < tile.count
    bias = cdna4.buffer_load(bias, tile.expert * g.N + n, mask=exists)
    w, w_scale = weights_at(w, w_scale, tile.expert, j * g.BN, g)
    acc = expert_gemm(x, x_scale, pair, scale_pair, tile.count, w, w_scale, SLOTS, g)
    y = swiglu(acc * x_static + bias, LIMIT)
    if g.STATIC:
        y = y * (1 / h_static)
    store_group(y, h, h_scale, tile.first, tile.count, j, g.N // 2, g.X, g.MX, True)


@gluon.jit
def expert_gemm(
    x, x_scale, pair, scale_pair, count, w, w_scale, SLOTS: gl.constexpr, g: gl.constexpr
):
    """float32 [BM, BN] = x[token of pair] @ w.T over all of K, in g.out. In flight before the first
    product: the weights of AHEAD steps, first because they wait for nothing but the expert's
    number, then the activations, whose pairs were still on their way. After each product, the step
    AHEAD of it is requested."""
    STEPS: gl.constexpr = g.STEPS
    AHEAD: gl.constexpr = min(g.AHEAD, STEPS)
    LANE_ROWS: gl.constexpr = g.BM // MFMA
    acc = gl.full([g.WAVES, g.BM, g.BN], 0, gl.float32, g.acc)
    ws, xs = (), ()  # by step, what was requested: in registers
    for step in gl.static_range(AHEAD):
        ws = ws + (load_w(w, w_scale, g.BN, step, g),)
        acc = pin(acc, g.acc_registers)
    token, scale_token = pin(pair, LANE_ROWS) // SLOTS, pin(scale_pair, LANE_ROWS) // SLOTS
    for step in gl.static_range(AHEAD):
        xs = xs + (load_x(x, x_scale, token, scale_token, count, step, g),)
        acc = pin(acc, g.acc_registers)
    for step in gl.static_range(STEPS):
        acc = multiply(acc, xs[step], ws[step], g)
        if step + AHEAD < STEPS:
            ws = ws + (load_w(w, w_scale, g.BN, step + AHEAD, g),)
            xs = xs + (load_x(x, x_scale, token, scale_token, count, step + AHEAD, g),)
            acc = pin(acc, g.acc_registers)
    return sum_waves(acc, g)


# One step of a GEMM. Only the last step can leave K, and only it is masked for that; a masked lane
# asks memory for nothing and reads 0.


@gluon.jit
def load_x(x, x_scale, row, scale_row, count, step: gl.constexpr, g: gl.constexpr):
    """Rows row[0 .. count - 1] of x [*, K] and its scales [*, K/32]. row, scale_row: the same int32
    [BM], laid out as the rows of g.x and of g.x_scale."""
    LAST: gl.constexpr = (step + 1) * STEP * g.WAVES > g.K
    SIZE: gl.constexpr = STEP // g.x_values
    k = (step * g.WAVES + iota(0, g.WAVES, g.x)) * SIZE + iota(2, SIZE, g.x)
    inside = iota(1, g.BM, g.x) < count
    if LAST:
        inside = inside & (k < g.x_row)
    values = cdna4.buffer_load(x, row[None, :, None] * g.x_row + k, mask=inside)
    if g.MX:
        k = (step * g.WAVES + iota(0, g.WAVES, g.x_scale)) * 4 + iota(2, 4, g.x_scale)
        inside = iota(1, g.BM, g.x_scale) < count
        if LAST:
            inside = inside & (k < g.K // GROUP)
        at = scale_row[None, :, None] * g.x_scale_row + k
        scale = cdna4.buffer_load(x_scale, at, mask=inside)
    else:
        scale = gl.full([g.WAVES, g.BM, 4], UNIT_SCALE, gl.uint8, g.x_scale)
    return values, scale


@gluon.jit
def weights_at(w, w_scale, expert, n, g: gl.constexpr):
    """Where the positions from n (a multiple of 8) of an expert begin in the packed weights and
    scales."""
    w += expert.to(gl.int64) * g.w_expert + n // MFMA * g.w_strip + n % MFMA * g.lane
    if g.W == "e2m1":
        w_scale += expert.to(gl.int64) * g.scale_expert
        w_scale += n // BLOCK * g.scale_block
        if g.COLUMNS % BLOCK != 0:  # otherwise Triton must see that a lane's four bytes are a dword
            w_scale += n % MFMA * 4 + n % BLOCK // MFMA
    return w, w_scale


@gluon.jit
def load_w(w, w_scale, columns, step: gl.constexpr, g: gl.constexpr):
    """`columns` of BN columns from where w and w_scale point, and their scales in the order of
    memory."""
    LAST: gl.constexpr = (step + 1) * STEP * g.WAVES > g.K
    SIZE: gl.constexpr = STEP // g.w_values
    k, n = (step * g.WAVES + iota(0, g.WAVES, g.w)) * SIZE + iota(1, SIZE, g.w), iota(2, g.BN, g.w)
    inside = n < columns
    if LAST:
        inside = inside & (k < g.K // g.w_values)
    at = k // g.lane * g.w_chunk + k % g.lane + n % MFMA * g.lane + n // MFMA * g.w_strip
    values, scale = cdna4.buffer_load(w, at, mask=inside), 0
    if g.W == "e2m1":
        layout: gl.constexpr = g.w_scale_memory
        k = (step * g.WAVES + iota(0, g.WAVES, layout)) * 4 + iota(1, 4, layout)
        n = iota(2, MFMA, layout)
        inside = n < columns
        if LAST:
            inside = inside & (k < g.K // GROUP)
        at = k * BLOCK + n * 4 + iota(3, g.BN // MFMA, layout)
        scale = cdna4.buffer_load(w_scale, at, mask=inside)
    return values, scale


@gluon.jit
def multiply(acc, x, w, g: gl.constexpr):
    """acc + one step of K, from what load_x and load_w returned."""
    w_scale = w[1]
    if g.W == "e2m1":
        # [WAVES, 4, 16, BN/16] -> [WAVES, BN, 4]
        w_scale = w_scale.permute(0, 3, 2, 1).reshape(g.WAVES, g.BN, 4)
        w_scale = gl.convert_layout(w_scale, g.w_scale, assert_trivial=True)
    return mfma(acc, x[0], x[1], w[0], w_scale, g)


@gluon.jit
def mfma(acc, x, x_scale, w, w_scale, g: gl.constexpr):
    """acc + x @ w, scaled."""
    if g.W == "bf16":
        acc = cdna4.mfma(x, w, acc)
    else:
        X: gl.constexpr = g.X
        W: gl.constexpr = g.W
        acc = cdna4.mfma_scaled(x, x_scale, X, w, w_scale, W, acc)
    return acc


@gluon.constexpr_function
def unchanged(n):
    """Constraints of an instruction that returns n registers as they are and, for all LLVM knows,
    touches memory."""
    return ",".join(["=v"] * n + [str(i) for i in range(n)] + ["~{memory}"])


@gluon.jit
def pin(x, registers: gl.constexpr):
    """x, of so many registers a lane, through an empty instruction: loads written above it are
    issued above it, and what uses its result comes after it. Without it LLVM moves loads towards
    their use to save registers (dispatch, mxfp8: 78 for 192, and 23 loads ahead for 50): count
    `buffer_load` before the first `v_mfma` in `compiled.asm["amdgcn"]`."""
    n: gl.constexpr = min(16, registers)
    return gl.inline_asm_elementwise(
        "; pin", unchanged(n), [x], dtype=x.dtype, is_pure=False, pack=n
    )


@gluon.jit
def sum_waves(acc, g: gl.constexpr):
    """acc [WAVES, BM, BN] -> its sum over waves [BM, BN] in g.out: in a lane, so always in one
    order."""
    memory: gl.constexpr = gl.SwizzledSharedLayout(max(1, g.BN // 16), 1, 16, [2, 1, 0])
    partial = gl.allocate_shared_memory(gl.float32, [g.WAVES, g.BM, g.BN], memory, acc)
    gl.barrier()
    return gl.sum(partial.load(g.partial), axis=0)


# Comparisons that keep NaN; gl.minimum and gl.maximum return the other operand. v_maximum3_f32 and
# v_minimum3_f32 are one instruction, like v_max_f32.


@gluon.jit
def at_least(y, bound):
    return gl.maximum(y, bound, propagate_nan=ALL)


@gluon.jit
def at_most(y, bound):
    return gl.minimum(y, bound, propagate_nan=ALL)


@gluon.jit
def swiglu(acc, LIMIT: gl.constexpr):
    """acc [rows, columns], which alternate gate and up -> gate * sigmoid(1.702 gate) * (up + 1),
    clamped, [rows, columns/2]. By the exponential and reciprocal instructions, each within 1 ULP:
    IEEE division is ten instructions a value."""
    gate, up = gl.split(acc.reshape(acc.shape[0], acc.shape[1] // 2, 2))
    gate, up = at_most(gate, LIMIT), at_most(at_least(up, -LIMIT), LIMIT)
    exponential = gl.exp2(gate * (-SWIGLU_ALPHA * LOG2_E))
    return libdevice.fast_dividef(gl.fma(gate, up, gate), 1 + exponential)


@gluon.jit
def quantise(y, X: gl.constexpr, MX: gl.constexpr):
    """float32 y [rows, 32] -> bytes uint8 [rows, 32] (e2m1: [rows, 16], low nibble first), and E8M0
    bytes uint8 [rows]. mx: the scale's exponent is floor(log2(max |y|)) less the element's largest
    (OCP MX 6.3), and a group that holds NaN has the scale that is NaN, since e2m1 has none; static:
    y comes scaled. Elements round to nearest even and saturate: a cast without the clamp would make
    480 a NaN."""
    largest: gl.constexpr = 448.0 if X == "e4m3" else 57344.0 if X == "e5m2" else 6.0
    if MX:
        y, scale = mx_scaled(y, X)
        y = gl.minimum(gl.maximum(y, -largest), largest)
    else:
        scale = 0
        y = at_most(at_least(y, -largest), largest)
    # Triton's own casts also set a mode register, a side effect that makes LLVM read scalars by
    # vector loads.
    if X == "e2m1":
        # Two values to the halves of a byte, by scale 1. Its result may not be read by the next
        # instruction: the LLVMs of triton 3.7.1 and 3.9.0 see to that behind inline assembly, too.
        low, high = gl.split(y.reshape(y.shape[0], y.shape[1] // 2, 2))
        CONVERT: gl.constexpr = "v_cvt_scalef32_pk_fp4_f32 $0, $1, $2, 1.0\ns_nop 0"
        code = gl.inline_asm_elementwise(
            CONVERT, "=v,v,v", [low, high], dtype=gl.int32, is_pure=True, pack=1
        )
    else:
        OPCODE: gl.constexpr = "v_cvt_pk_fp8_f32" if X == "e4m3" else "v_cvt_pk_bf8_f32"
        code = gl.inline_asm_elementwise(
            OPCODE + " $0, $1, $1", "=v,v", [y], dtype=gl.int32, is_pure=True, pack=1
        )
    return (code & 255).to(gl.uint8), scale


@gluon.jit
def nan_or_larger(a, b):
    return gl.maximum(a, b, propagate_nan=ALL)


@gluon.jit
def mx_scaled(y, X: gl.constexpr):
    """float32 y [rows, 32] -> y over its row's scale, and the scale's E8M0 byte, uint8 [rows]."""
    largest_exponent: gl.constexpr = 8 if X == "e4m3" else 15 if X == "e5m2" else 2
    bits = gl.reduce(gl.abs(y), 1, nan_or_larger).to(gl.int32, bitcast=True)
    # float32's own exponent is the floor
    exponent = gl.maximum((bits >> 23) - 127 - largest_exponent, -127)
    y = y * ((127 - exponent) << 23).to(gl.float32, bitcast=True)[:, None]
    return y, gl.where(bits > INFINITY, 255, exponent + 127).to(gl.uint8)


@gluon.jit
def store_group(
    y, out, out_scale, first, count, group, K: gl.constexpr, X: gl.constexpr, MX: gl.constexpr,
    DEALT: gl.constexpr,
):  # fmt: skip
    """Stores `count` rows of float32 y [*, columns], in the format, to rows first .. of out [*, K]:
    the columns from group * columns. DEALT: they are half of a product's positions."""
    COLUMNS: gl.constexpr = y.shape[1]
    if X == "bf16":
        q = y.to(gl.bfloat16)
    else:
        q, scale = quantise(y, X, MX)
    WIDTH: gl.constexpr = q.shape[1]  # stored elements
    row, n = iota(0, q.shape[0], q.type.layout), group * WIDTH + iota(1, WIDTH, q.type.layout)
    if DEALT:
        POSITIONS: gl.constexpr = 2 * COLUMNS // WIDTH  # of a stored element
        n = column_of(n * POSITIONS) // POSITIONS
    cdna4.buffer_store(q, out, (first + row) * (K // COLUMNS * WIDTH) + n, mask=row < count)
    if MX:
        row = gl.arange(0, scale.shape[0], scale.type.layout)
        at = (first + row) * scale_bytes(K) + group
        cdna4.buffer_store(scale, out_scale, at, mask=row < count)


# --------------------------------------------------------------------------------------------------
# combine, decode: second GEMM of every active expert and the sum over a token's slots


@gluon.jit(do_not_specialize=["T"])
def combine_kernel(
    h, h_scale, w, w_scale, bias, tiles, num_tiles, pairs, chosen, gates, out, T, static,
    g: gl.constexpr,
):  # fmt: skip
    """out[token] = sum over slots of gate * (h[place] @ w[expert].T + bias[expert]) for COLUMNS
    positions a program. Loads of AHEAD experts are in flight. A wave leaves its share of K of every
    pair in LDS; at the end the sum runs over waves, then slots, in one order whatever the batch."""
    start = first_position(g)
    if start >= g.padded:
        return
    AHEAD: gl.constexpr = g.AHEAD
    n_tiles = gl.load(num_tiles)
    last = n_tiles - 1
    # What the end needs, and the list of tiles, are requested first.
    token, slot = iota(0, g.BM, g.summed), iota(1, g.SLOTS, g.summed)
    exists = (token < T) & (slot < g.TOP_K)
    expert = cdna4.buffer_load(chosen, token * g.SLOTS + slot, mask=exists)
    gate = cdna4.buffer_load(gates, token * g.SLOTS + slot, mask=exists)
    listed = load_list(tiles, n_tiles, g)
    ring = load_first_experts(tiles, last, h, h_scale, w, w_scale, pairs, start, g)
    n = column_of(start + iota(2, g.COLUMNS, g.summed))
    bias = cdna4.buffer_load(bias, expert * g.N + n, mask=exists & (n < g.N))
    listed, partial = to_lds(listed, g)
    dump = dump_cells(g)
    for i in range(0, n_tiles, AHEAD):
        for j in gl.static_range(AHEAD):
            # a block of its own: LLVM moves none of it up to where its loads would be awaited
            if i + j <= last:
                multiply_expert(ring[j], partial, dump, g)
            t = i + j + AHEAD
            tile = load_tile_from_lds(listed, gl.minimum(t, last), t <= last, g.WAVES)
            loads = load_expert(tile, h, h_scale, w, w_scale, pairs, start, g)
            ring = ring[:j] + (loads,) + ring[j + 1 :]
    gl.barrier()
    acc = sum_partial(partial, T, g)
    y = gl.sum(gl.where(exists, gate * (acc * static + bias), 0), axis=1)  # [tokens, COLUMNS]
    token, n = iota(0, g.BM, y.type.layout), iota(1, g.COLUMNS, y.type.layout)
    n = column_of(start + n)
    cdna4.buffer_store(y.to(gl.bfloat16), out, token * g.N + n, mask=(token < T) & (n < g.N))


@gluon.jit
def first_position(g: gl.constexpr):
    """A chiplet gets a range of positions: neighbours share cache lines of scales and h."""
    PROGRAMS: gl.constexpr = g.padded // g.COLUMNS
    SHARE: gl.constexpr = (PROGRAMS + XCDS - 1) // XCDS
    return (gl.program_id(0) % XCDS * SHARE + gl.program_id(0) // XCDS) * g.COLUMNS


@gluon.jit
def load_list(tiles, n_tiles, g: gl.constexpr):
    """The list of tiles, flat; there are no more than pairs."""
    word = gl.arange(0, 4 * g.PAIRS, gl.BlockedLayout([1], [64], [g.WAVES], [0]))
    return cdna4.buffer_load(tiles, word, mask=word < 4 * n_tiles)


@gluon.jit
def load_first_experts(tiles, last, h, h_scale, w, w_scale, pairs, start, g: gl.constexpr):
    """AHEAD experts' loads, one after another."""
    AHEAD: gl.constexpr = g.AHEAD
    listed, ring = (), ()
    for j in gl.static_range(AHEAD):
        tile = load_tile(tiles, gl.minimum(j, last))
        count = gl.where(j <= last, tile.count, 0)
        listed = listed + (Tile(tile.expert, tile.first, count),)
    zero = gl.full([g.WAVES, g.BM, g.BN], 0, gl.float32, g.acc)
    for j in gl.static_range(AHEAD):
        ring = ring + (load_expert(listed[j], h, h_scale, w, w_scale, pairs, start, g),)
        pin(zero, g.acc_registers)
    return ring


@gluon.jit
def load_expert(tile, h, h_scale, w, w_scale, pairs, start, g: gl.constexpr):
    """All steps of K of COLUMNS positions of a tile's expert, its activations and its pairs.
    Nothing is requested for a tile of no places."""
    STEPS: gl.constexpr = g.STEPS
    columns = gl.where(tile.count > 0, g.COLUMNS, 0)
    w, w_scale = weights_at(w, w_scale, tile.expert, start, g)
    place = tile.first + gl.arange(0, g.BM, only(1, g.x))
    scale_place = tile.first + gl.arange(0, g.BM, only(1, g.x_scale))
    steps = ()
    for step in gl.static_range(STEPS):
        of_w = load_w(w, w_scale, columns, step, g)
        of_h = load_x(h, h_scale, place, scale_place, tile.count, step, g)
        steps = steps + ((of_h, of_w),)
    return steps, load_pairs(pairs, tile, g.BM, only(1, g.acc)), tile.count


@gluon.jit
def to_lds(listed, g: gl.constexpr):
    """The tile list, since a global load in the loop would wait for all loads before it; and the
    cells, float32 [WAVES, PAIRS, COLUMNS], with the dump behind them."""
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    listed = gl.allocate_shared_memory(gl.int32, [4 * g.PAIRS], flat, listed)
    return listed, gl.allocate_shared_memory(gl.float32, [g.LDS], flat)


@gluon.jit
def dump_cells(g: gl.constexpr):
    """[WAVES, BM, BN]: where rows and columns that do not exist are written, so that no lane
    branches: behind the cells, a wave's lanes in 64 different banks."""
    wave, row, n = iota(0, g.WAVES, g.acc), iota(1, g.BM, g.acc), iota(2, g.BN, g.acc)
    return g.CELLS + wave * (g.BM * g.BN) + n % 4 * 64 + n // 4 * g.BM + row


@gluon.jit
def multiply_expert(loads, partial, dump, g: gl.constexpr):
    """Leaves each wave's share of an expert's products in the cells of its pairs."""
    steps, pair, count = loads
    STEPS: gl.constexpr = g.STEPS
    SIZE: gl.constexpr = g.WAVES * g.BM * g.BN
    acc = gl.full([g.WAVES, g.BM, g.BN], 0, gl.float32, g.acc)
    for step in gl.static_range(STEPS):
        acc = multiply(acc, steps[step][0], steps[step][1], g)
    wave, row, n = iota(0, g.WAVES, g.acc), iota(1, g.BM, g.acc), iota(2, g.BN, g.acc)
    cell = (wave * g.PAIRS + pair[None, :, None]) * g.COLUMNS + n
    cell = gl.where((row < count) & (n < g.COLUMNS), cell, dump)
    partial.scatter(acc.reshape(SIZE), cell.reshape(SIZE), 0)


@gluon.jit
def sum_partial(partial, T, g: gl.constexpr):
    """float32 [tokens, SLOTS, COLUMNS]: the cells, summed over waves."""
    token, slot = iota(1, g.BM, g.final), iota(2, g.SLOTS, g.final)
    pair = gl.where((token < T) & (slot < g.TOP_K), token * g.SLOTS + slot, 0)  # pair 0 exists
    cell = (iota(0, g.WAVES, g.final) * g.PAIRS + pair) * g.COLUMNS + iota(3, g.COLUMNS, g.final)
    acc = partial.gather(cell.reshape(g.CELLS), 0).reshape(g.WAVES, g.BM, g.SLOTS, g.COLUMNS)
    return gl.sum(gl.convert_layout(acc, g.final, assert_trivial=True), axis=0)


# --------------------------------------------------------------------------------------------------
# route: decode's router, top-k, list of tiles and quantised x; prefill's router and quantised x


@gluon.jit(do_not_specialize=["T"])
def route_kernel(
    x, router_weight, router_bias, logits, arrived, q, q_scale, tiles, num_tiles, pairs, chosen,
    gates, T, static, X: gl.constexpr, MX: gl.constexpr, TOP_K: gl.constexpr, DECODE: gl.constexpr,
    g: gl.constexpr,
):  # fmt: skip
    """Program (p, m), tokens m * BM .. : the first programs p compute the logits of COLUMNS experts
    each, so that no compute unit reads the router alone; each of the others quantises 32 columns of
    x. In decode, the last program to store its logits selects the experts of all tokens."""
    GATING: gl.constexpr = (g.N + g.COLUMNS - 1) // g.COLUMNS
    first = gl.program_id(1) * g.BM
    if gl.program_id(0) >= GATING:
        quantise_x(x, q, q_scale, first, T, gl.program_id(0) - GATING, static, X, MX, g)
        return
    expert = gl.program_id(0) * g.COLUMNS
    acc = router_gemm(x, router_weight, first, T, expert, g)
    acc = store_logits(acc, router_bias, logits, first, T, expert, g)
    if DECODE:
        if last_to_arrive(arrived, acc, GATING):
            ids, gate, pair = select_experts(logits, 0, T, g.N, TOP_K, g.BM, g.WAVES)
            cdna4.buffer_store(ids, chosen, pair, mask=ids < g.N)
            cdna4.buffer_store(gate, gates, pair, mask=ids < g.N)
            list_tiles(ids.reshape(g.BM * ids.shape[1]), tiles, num_tiles, pairs, g.N, g.WAVES)


@gluon.jit
def quantise_x(
    x, q, q_scale, first, T, group, static, X: gl.constexpr, MX: gl.constexpr, g: gl.constexpr
):
    """A group of K of tokens first .. first + BM - 1."""
    layout: gl.constexpr = gl.BlockedLayout([1, 2], [4, 16], [g.WAVES, 1], [1, 0])
    token, k = first + iota(0, g.BM, layout), group * GROUP + iota(1, GROUP, layout)
    y = cdna4.buffer_load(x, token * g.K + k, mask=token < T).to(gl.float32)
    if not MX:  # exact: x is what it is, while h carries rounding errors of its own
        y = gl.div_rn(y, gl.full(y.shape, static, gl.float32, layout))
    store_group(y, q, q_scale, first, T - first, group, g.K, X, MX, False)


@gluon.jit
def router_gemm(x, router_weight, first, T, expert, g: gl.constexpr):
    """float32 [BM, BN], of which the COLUMNS from `expert` exist, in g.out."""
    STEPS: gl.constexpr = g.STEPS
    token, n = first + gl.arange(0, g.BM, only(1, g.x)), iota(2, g.BN, g.w)
    acc = gl.full([g.WAVES, g.BM, g.BN], 0, gl.float32, g.acc)
    steps = ()
    for step in gl.static_range(STEPS):
        k = (step * g.WAVES + iota(0, g.WAVES, g.w)) * STEP + iota(1, STEP, g.w)
        inside = (n < g.COLUMNS) & (expert + n < g.N) & (k < g.K)
        # rows as they are, 16 bytes a lane
        of_w = cdna4.buffer_load(router_weight, (expert + n) * g.K + k, mask=inside)
        of_x = load_x(x, None, token, token, T - first, step, g)
        steps = steps + ((of_x, (of_w, 0)),)
        acc = pin(acc, g.acc_registers)
    for step in gl.static_range(STEPS):
        acc = multiply(acc, steps[step][0], steps[step][1], g)
    return sum_waves(acc, g)


@gluon.jit
def store_logits(acc, router_bias, logits, first, T, expert, g: gl.constexpr):
    """acc + bias, stored and returned."""
    token, n = first + iota(0, g.BM, g.out), iota(1, g.BN, g.out)
    mine = (n < g.COLUMNS) & (expert + n < g.N)
    acc = acc + cdna4.buffer_load(router_bias, expert + n, mask=mine).to(gl.float32)
    cdna4.buffer_store(acc, logits, token * g.N + expert + n, mask=mine & (token < T))
    return acc


@gluon.jit
def last_to_arrive(arrived, stored, PROGRAMS: gl.constexpr):
    """Whether this program is the last of PROGRAMS to get here, with all that these had `stored`
    before in sight. `arrived` is 0 between launches: the last resets it. A launch that was killed
    leaves it wrong for ever, and so do two launches of a layer at a time, on two streams: make
    another by `prepare`."""
    # a barrier of the workgroup orders LDS only: each wave awaits its own stores before one lane
    # reports them
    gl.inline_asm_elementwise(
        "s_waitcnt vmcnt(0)", "=v,0,~{memory}", [stored], dtype=gl.float32, is_pure=False, pack=1
    )
    gl.barrier()
    last = gl.atomic_add(arrived, 1, sem="acq_rel", scope="gpu") == PROGRAMS - 1
    if last:
        gl.store(arrived, 0)
    return last


@gluon.constexpr_function
def lanes_of(E):
    """The power of two that holds E experts."""
    return max(16, triton.next_power_of_2(E))


@gluon.jit
def select_experts(
    logits, first, T, E: gl.constexpr, TOP_K: gl.constexpr, BM: gl.constexpr, WAVES: gl.constexpr
):
    """Top-k of tokens first .. first + BM - 1, ties to the smaller id, and the softmax over the
    chosen logits. logits float32 [T, E] -> ids int32 [BM, SLOTS] (E: no such pair), gates float32,
    pairs."""
    EXPERTS: gl.constexpr = lanes_of(E)
    SLOTS: gl.constexpr = triton.next_power_of_2(TOP_K)
    layout: gl.constexpr = gl.BlockedLayout([1, max(1, EXPERTS // 64)], [1, 64], [WAVES, 1], [1, 0])
    token, expert = first + iota(0, BM, layout), iota(1, EXPERTS, layout)
    slot = iota(1, SLOTS, layout)
    left = cdna4.buffer_load(logits, token * E + expert, mask=(token < T) & (expert < E))
    # A logit that is NaN makes the token's gates NaN, whichever experts it gets: any that exist.
    is_nan = gl.max((left != left).to(gl.int32), axis=1)[:, None] > 0
    left = gl.where(expert < E, gl.maximum(left, -3e38), float("-inf"))
    largest = gl.where(is_nan, float("nan"), gl.max(left, axis=1)[:, None])
    ids = gl.full([BM, SLOTS], E, gl.int32, layout)
    gate = gl.zeros([BM, SLOTS], gl.float32, layout)
    for s in gl.static_range(TOP_K):
        best = gl.max(left, axis=1)[:, None]
        winner = gl.min(gl.where(left == best, expert, EXPERTS), axis=1)[:, None]
        ids = gl.where((slot == s) & (token < T), winner, ids)
        gate = gl.where(slot == s, gl.exp(best - largest), gate)
        left = gl.where(expert == winner, float("-inf"), left)
    return ids, gate / gl.sum(gate, axis=1)[:, None], token * SLOTS + slot


@gluon.constexpr_function
def square(size, waves):
    """Layout [any, size] of a comparison of all with all."""
    return gl.BlockedLayout([1, max(1, size // 8)], [8, 8], [waves, 1], [1, 0])


@gluon.jit
def list_tiles(ids, tiles, num_tiles, pairs, E: gl.constexpr, WAVES: gl.constexpr):
    """The tiles of a decode batch, one an active expert, in the order of ids; its pairs by place.
    ids int32 [pairs] (E: no such). Every position is a count of smaller ones, so nothing depends on
    who comes first."""
    PAIRS: gl.constexpr = ids.shape[0]
    both: gl.constexpr = square(PAIRS, WAVES)
    pair, other_pair = gl.arange(0, PAIRS, only(0, both)), iota(1, PAIRS, both)
    mine = gl.convert_layout(ids, only(0, both))
    other = gl.convert_layout(ids, only(1, both))[None, :]
    earlier = ((other == mine[:, None]) & (other_pair < pair[:, None])).to(gl.int32)
    place = gl.sum((other < mine[:, None]).to(gl.int32) + earlier, axis=1)
    cdna4.buffer_store(pair, pairs, place, mask=mine < E)
    # the first pair of its expert
    opens = ((gl.sum(earlier, axis=1) == 0) & (mine < E)).to(gl.int32)
    gl.store(num_tiles, gl.sum(opens, axis=0))

    opens = gl.convert_layout(opens, only(1, both))[None, :]
    expert = gl.arange(0, lanes_of(E), only(0, both))
    smaller = (other < expert[:, None]).to(gl.int32)
    count = gl.sum((other == expert[:, None]).to(gl.int32), axis=1)
    t, first = gl.sum(smaller * opens, axis=1), gl.sum(smaller, axis=1)
    store_tiles(tiles, t, expert, first, count, (count > 0) & (expert < E))


# --------------------------------------------------------------------------------------------------
# Prefill: select and sort


@gluon.jit(do_not_specialize=["T"])
def select_kernel(
    logits, chosen, gates, counts, T, E: gl.constexpr, TOP_K: gl.constexpr, BM: gl.constexpr,
    WAVES: gl.constexpr,
):  # fmt: skip
    """Top-k of BM tokens a program, and how many of their pairs each expert gets, counts [programs,
    E]."""
    ids, gate, pair = select_experts(logits, gl.program_id(0) * BM, T, E, TOP_K, BM, WAVES)
    SLOTS: gl.constexpr = ids.shape[1]
    cdna4.buffer_store(ids, chosen, pair, mask=pair < T * SLOTS)
    cdna4.buffer_store(gate, gates, pair, mask=pair < T * SLOTS)
    both: gl.constexpr = square(BM * SLOTS, WAVES)
    ids = gl.convert_layout(ids.reshape(BM * SLOTS), only(1, both))[None, :]
    expert = gl.arange(0, lanes_of(E), only(0, both))
    count = gl.sum((ids == expert[:, None]).to(gl.int32), axis=1)
    cdna4.buffer_store(count, counts, gl.program_id(0) * E + expert, mask=expert < E)


@gluon.jit(do_not_specialize=["programs", "PAIRS"])
def sort_kernel(
    chosen, counts, tiles, num_tiles, pairs, programs, PAIRS, E: gl.constexpr, BM: gl.constexpr,
    CHUNK: gl.constexpr, WAVES: gl.constexpr,
):  # fmt: skip
    """Program e lists the tiles of expert e and, in one pass over the chosen ids, its pairs in
    order."""
    mine = gl.program_id(0)
    place, tile, count = share_of(mine, counts, programs, E, BM, WAVES)
    own = (count + BM - 1) // BM  # tiles
    if mine == E - 1:
        gl.store(num_tiles, tile + own)

    i = gl.arange(0, CHUNK, gl.BlockedLayout([CHUNK // (64 * WAVES)], [64], [WAVES], [0]))
    expert = gl.full([CHUNK], mine, gl.int32, i.type.layout)
    for t in range(0, own, CHUNK):
        left = gl.minimum(count - (t + i) * BM, BM)
        store_tiles(tiles, tile + t + i, expert, place + (t + i) * BM, left, t + i < own)
    for p in range(0, PAIRS, CHUNK):
        ids = cdna4.buffer_load(chosen, p + i, mask=p + i < PAIRS, other=E)
        is_mine = (ids == mine).to(gl.int32)
        before = gl.associative_scan(is_mine, 0, add) - is_mine
        cdna4.buffer_store(p + i, pairs, place + before, mask=is_mine > 0)
        place += gl.sum(is_mine, axis=0)


@gluon.jit
def share_of(mine, counts, programs, E: gl.constexpr, BM: gl.constexpr, WAVES: gl.constexpr):
    """An expert's first place, its first tile, and how many places it has."""
    EXPERTS: gl.constexpr = lanes_of(E)
    lanes: gl.constexpr = gl.BlockedLayout([1, max(1, EXPERTS // 64)], [1, 64], [WAVES, 1], [1, 0])
    expert = gl.arange(0, EXPERTS, only(1, lanes))
    total = gl.zeros([EXPERTS], gl.int32, only(1, lanes))
    for p in range(0, programs, 16):
        program = p + iota(0, 16, lanes)
        inside = (program < programs) & (expert[None, :] < E)
        count = cdna4.buffer_load(counts, program * E + expert[None, :], mask=inside)
        total += gl.sum(count, axis=0)
    place = gl.sum(gl.where(expert < mine, total, 0), axis=0)
    tile = gl.sum(gl.where(expert < mine, (total + BM - 1) // BM, 0), axis=0)
    return place, tile, gl.sum(gl.where(expert == mine, total, 0), axis=0)


@gluon.jit
def add(a, b):
    return a + b


# --------------------------------------------------------------------------------------------------
# Prefill: dispatch and combine, sliceMN
#
# A workgroup of four waves computes a tile of 128 rows by a panel of 256 columns, cut 2 x 2: x into
# top and bottom, w into left and right, 64 rows and 128 columns. All waves multiply a quadrant
# together, 32 rows by 64 columns each.
#
#                            left, 128 columns    right, 128 columns
#     top,    64 rows        x top  x w left      x top  x w right
#     bottom, 64 rows        x bottom x w left    x bottom x w right
#
# Two workgroups fit a compute unit (half its LDS, 256 of 512 registers), because K is short: at
# 2880 a tile is 23 k matrix cycles, and what is outside its loop, one latency of memory and 5 k
# vector cycles, runs under the other's loop.
#
# The four pieces of a step of K are copied from memory to LDS, RING steps ahead, read from there
# into registers one quadrant before they are multiplied, and never pass through registers in
# between. A stage of the ring holds a step.


@gluon.jit
def prefill_dispatch_kernel(
    x, x_scale, w, w_scale, bias, tiles, num_tiles, pairs, h, h_scale, x_static, h_static,
    LIMIT: gl.constexpr, SLOTS: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """What dispatch_kernel does, for a tile and a panel a program."""
    tile, start = tile_of_program(tiles, num_tiles, g)
    if tile.count == 0:
        return
    rows: gl.constexpr = only(0, g.x_copy)
    top = load_pairs(pairs, half_of(tile, 0), 64, rows) // SLOTS
    bottom = load_pairs(pairs, half_of(tile, 1), 64, rows) // SLOTS
    scale_rows = load_pairs(pairs, tile, 256, only(0, g.x_scale_copy)) // SLOTS
    left, right = initial_sums(bias, tile.expert, start, x_static, g)
    p = pipeline(x, x_scale, (top, bottom), scale_rows, tile, w, w_scale, start, g)
    quadrants = sliced_gemm(p, left, right, tile.count, g.N - start, g)
    to = h, h_scale, x_static, h_static, LIMIT
    store_quadrants(quadrants, tile, start, store_swiglu, to, g)


@gluon.jit
def prefill_combine_kernel(
    h, h_scale, w, w_scale, bias, tiles, num_tiles, pairs, gates, weighted, static, g: gl.constexpr
):
    """weighted[pair] = gate[pair] * (h[place] @ w[expert].T + bias[expert]), bf16 [T * SLOTS, N],
    for a tile and a panel a program. In float32 it would be half of all the layer's traffic at 8192
    tokens."""
    tile, start = tile_of_program(tiles, num_tiles, g)
    if tile.count == 0:
        return
    place = tile.first + gl.arange(0, 64, only(0, g.x_copy))
    scale_place = tile.first + gl.arange(0, 256, only(0, g.x_scale_copy))
    left, right = initial_sums(bias, tile.expert, start, static, g)
    p = pipeline(h, h_scale, (place, place + 64), scale_place, tile, w, w_scale, start, g)
    quadrants = sliced_gemm(p, left, right, tile.count, g.N - start, g)
    to = weighted, pairs, gates, static
    store_quadrants(quadrants, tile, start, store_weighted, to, g)


@gluon.jit
def tile_of_program(tiles, num_tiles, g: gl.constexpr):
    """The tile, of 0 places where there is nothing to do, and the panel's first position. The
    number of tiles is known on the device only; the grid is for the most there can be, and a
    program too many costs one load. Nor are programs persistent: the next one's prologue runs under
    the loop of the other workgroup on its compute unit anyhow.

    Workgroups go to the chiplets in turn, so each chiplet gets one range of the order. In it TALL
    tiles take a panel after another: what runs at a time shares the weights of few panels, and TALL
    tiles' rows stay in its L2."""
    PANELS: gl.constexpr = g.panels
    i, num_tiles = gl.program_id(0), gl.load(num_tiles)
    share = (num_tiles * PANELS + XCDS - 1) // XCDS
    turn = i % XCDS * share + i // XCDS
    exists = (i // XCDS < share) & (turn < num_tiles * PANELS)
    first, turn = turn // (TALL * PANELS) * TALL, turn % (TALL * PANELS)
    height = gl.maximum(gl.minimum(num_tiles - first, TALL), 1)
    tile = load_tile(tiles, gl.where(exists, first + turn % height, 0))
    count = gl.where(exists, tile.count, 0)
    return Tile(tile.expert, tile.first, count), turn // height * PREFILL_COLUMNS


@gluon.jit
def half_of(tile, bottom: gl.constexpr):
    """A tile's top or bottom 64 places; the number of places may be 0 or less, or above 64."""
    return Tile(tile.expert, tile.first + 64 * bottom, tile.count - 64 * bottom)


@gluon.jit
def initial_sums(bias, expert, start, static, g: gl.constexpr):
    """What the left and right quadrants start with: in every row the bias, in units of the static
    scale."""
    n = start + column_of(gl.arange(0, 128, only(1, g.acc)))
    bias += expert * g.N
    left = cdna4.buffer_load(bias, n, mask=n < g.N)
    right = cdna4.buffer_load(bias, n + 128, mask=n + 128 < g.N)
    if g.STATIC:
        left, right = left * (1 / static), right * (1 / static)
    zero = gl.zeros([64, 128], gl.float32, g.acc)
    return zero + left[None, :], zero + right[None, :]


class Piece(NamedTuple):
    """Of x or w. For each half of a step the offsets from `source`, where step 0 begins, and which
    of them exist; and the LDS of every stage of the ring."""

    source: gl.tensor
    offsets: tuple
    exists: tuple
    ring: tuple  # of (half, half)


class Scales(NamedTuple):
    """Likewise, of both halves at once."""

    source: gl.tensor
    offsets: gl.tensor
    exists: gl.tensor
    ring: tuple


class Pipeline(NamedTuple):
    """What the verbs share."""

    x: Piece  # top, bottom
    x_scale: Scales
    w: Piece  # left, right
    w_scale: Scales


@gluon.jit
def chunk_of_lane(g: gl.constexpr):
    """[64, chunks, 1]: which chunk of its row a lane copies. Copies to LDS go to consecutive
    places, so the swizzle must be in where they come from."""
    SWIZZLE: gl.constexpr = g.swizzle
    chunk, row = iota(1, g.chunks, g.x_copy), iota(0, 64, g.x_copy)
    for bit in gl.static_range(6):
        chunk = chunk ^ ((row >> bit) % 2 * SWIZZLE[bit])
    return chunk


@gluon.jit
def pipeline(x, x_scale, rows, scale_rows, tile, w, w_scale, start, g: gl.constexpr):
    """For a tile's rows of x [*, K] and the panel from position `start` of its expert's w. rows,
    scale_rows: their numbers, int32, top and bottom [64] as the rows of g.x_copy, all [256] as
    those of g.x_scale_copy."""
    x_rings, w_rings, x_scale_ring, w_scale_ring = rings(x, w, g)
    row = iota(0, 64, g.x_copy)
    at = chunk_of_lane(g) * g.lane + iota(2, g.lane, g.x_copy)
    at = rows[0][:, None, None] * g.x_row + at, rows[1][:, None, None] * g.x_row + at
    x = Piece(x, at, (row < tile.count, row + 64 < tile.count), x_rings)
    at = scale_rows[:, None, None] * g.x_scale_row + iota(2, 4, g.x_scale_copy)
    row = iota(0, 256, g.x_scale_copy)
    x_scale = Scales(x_scale, at, row < gl.minimum(tile.count, 128), x_scale_ring)

    w += tile.expert.to(gl.int64) * g.w_expert + start // MFMA * g.w_strip
    strip, strips = iota(0, 8, g.w_copy), (g.padded - start) // MFMA
    at = strip * g.w_strip + iota(1, 64, g.w_copy) * g.lane + iota(2, g.lane, g.w_copy)
    w = Piece(w, (at, at + 8 * g.w_strip), (strip < strips, strip + 8 < strips), w_rings)
    block = iota(0, 4, g.w_scale_copy)
    at = block * g.scale_block + iota(1, 64, g.w_scale_copy) * 4 + iota(2, 4, g.w_scale_copy)
    if g.W == "e2m1":
        w_scale += tile.expert.to(gl.int64) * g.scale_expert + start * (g.K // GROUP)
    w_scale = Scales(w_scale, at, block < strips // 4, w_scale_ring)
    return Pipeline(x, x_scale, w, w_scale)


@gluon.jit
def rings(x, w, g: gl.constexpr):
    """LDS for RING steps of every piece, as the copies write it."""
    RING: gl.constexpr = g.RING
    flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0])
    x_type: gl.constexpr = x.dtype.element_ty
    w_type: gl.constexpr = w.dtype.element_ty
    x_rings, w_rings, x_scale_ring, w_scale_ring = (), (), (), ()
    for _ in gl.static_range(RING):
        top = gl.allocate_shared_memory(x_type, [64, g.chunks, g.lane], flat)
        bottom = gl.allocate_shared_memory(x_type, [64, g.chunks, g.lane], flat)
        left = gl.allocate_shared_memory(w_type, [8, 64, g.lane], flat)
        right = gl.allocate_shared_memory(w_type, [8, 64, g.lane], flat)
        x_rings, w_rings = x_rings + ((top, bottom),), w_rings + ((left, right),)
        if g.MX:
            x_scale_ring = x_scale_ring + (gl.allocate_shared_memory(gl.uint8, [256, 1, 4], flat),)
        if g.W == "e2m1":
            w_scale_ring = w_scale_ring + (gl.allocate_shared_memory(gl.uint8, [4, 64, 4], flat),)
    return x_rings, w_rings, x_scale_ring, w_scale_ring


# The verbs. A half is 0 (top, left) or 1 (bottom, right). What an issue copies is in LDS, for all
# waves, after the wait for its piece: load_shared_relaxed tells LLVM so, which would drain the
# queue before any other read of LDS. The wait is also the barrier of its region: Triton puts
# s_barrier behind its s_waitcnt. A gl.barrier() would be a second one and, in triton 3.7.1, drain
# the queue as well. The tests read from the assembly that every region has its barrier.


@gluon.jit
def issue_x(p, half: gl.constexpr, step, stage: gl.constexpr, LAST: gl.constexpr, g: gl.constexpr):
    """One piece: half of x; with the top, the scales of both halves. In the LAST step only what is
    inside K."""
    exists = p.x.exists[half]
    if LAST:
        exists = exists & (chunk_of_lane(g) < g.chunks_left)
    copy(p.x.ring[stage][half], p.x.source + step * g.x_step, p.x.offsets[half], exists)
    if g.MX and half == 0:
        scale = p.x_scale
        copy(scale.ring[stage], scale.source + step * 4, scale.offsets, scale.exists)
    cdna4.async_copy.commit_group()


@gluon.jit
def issue_w(p, half: gl.constexpr, step, stage: gl.constexpr, LAST: gl.constexpr, g: gl.constexpr):
    """One piece: half of w; with the left, the scales of both halves. In the LAST step only what is
    inside K."""
    exists = p.w.exists[half]
    if LAST:
        exists = exists & (iota(1, 64, g.w_copy) < g.lanes_left)
    copy(p.w.ring[stage][half], p.w.source + step * g.w_step, p.w.offsets[half], exists)
    if g.W == "e2m1" and half == 0:
        scale, exists = p.w_scale, p.w_scale.exists
        if LAST:
            exists = exists & (iota(1, 64, g.w_scale_copy) < g.lanes_left)
        copy(scale.ring[stage], scale.source + step * 256, scale.offsets, exists)
    cdna4.async_copy.commit_group()


@gluon.jit
def copy(memory, source, offsets, exists):
    cdna4.async_copy.buffer_load_to_shared(memory, source, offsets, mask=exists)


@gluon.jit
def wait(pieces: gl.constexpr):
    """Until all but the newest `pieces` have arrived, and until all waves are here."""
    cdna4.async_copy.wait_group(pieces)


@gluon.jit
def read(memory, ROWS: gl.constexpr, COLUMNS: gl.constexpr, shared: gl.constexpr, to: gl.constexpr):
    """[ROWS, COLUMNS] from LDS, where it lies as `shared` says."""
    memory = reinterpret(memory, memory.dtype, [ROWS, COLUMNS], shared)
    return cdna4.async_copy.load_shared_relaxed(memory, to)


@gluon.jit
def read_x(p, half: gl.constexpr, stage: gl.constexpr, g: gl.constexpr):
    return read(p.x.ring[stage][half], 64, g.x_step, g.x_shared, g.x)


@gluon.jit
def read_w(p, half: gl.constexpr, stage: gl.constexpr, g: gl.constexpr):
    return read(p.w.ring[stage][half], 4 * g.lane, 128, g.w_shared, g.w)


@gluon.jit
def read_x_scales(p, stage: gl.constexpr, LAST: gl.constexpr, g: gl.constexpr):
    """Of top and bottom: their stage is refilled before the bottom is read."""
    top = gl.full([64, 4], UNIT_SCALE, gl.uint8, g.x_scale)
    bottom = top
    if g.MX:
        flat: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        top = read(p.x_scale.ring[stage].slice(0, 64), 64, 4, flat, g.x_scale)
        bottom = read(p.x_scale.ring[stage].slice(64, 64), 64, 4, flat, g.x_scale)
        if LAST:  # nobody wrote those beyond K
            exists = iota(1, 4, g.x_scale) < g.groups_left
            top = gl.where(exists, top, UNIT_SCALE)
            bottom = gl.where(exists, bottom, UNIT_SCALE)
    return top, bottom


@gluon.jit
def read_w_scales(p, stage: gl.constexpr, g: gl.constexpr):
    """Of left and right: their stage is refilled before the right is read."""
    left = gl.full([128, 4], UNIT_SCALE, gl.uint8, g.w_scale)
    right = left
    if g.W == "e2m1":
        left = read(p.w_scale.ring[stage].slice(0, 2), 128, 4, g.w_scale_shared, g.w_scale)
        right = read(p.w_scale.ring[stage].slice(2, 2), 128, 4, g.w_scale_shared, g.w_scale)
    return left, right


@gluon.jit
def more(a, b: gl.constexpr):
    """a > b, of scalars, by a scalar comparison in this very place: knowing that it never changes,
    LLVM would keep the answer in a vector register, at two vector instructions a branch (look for
    s_cmp before every s_cbranch in the loop)."""
    here = gl.inline_asm_elementwise(
        "; compare", "=s,0", [a], dtype=gl.int32, is_pure=False, pack=1
    )
    return here > b


@gluon.jit
def sliced_step(
    p, k, stage: gl.constexpr, LEFT: gl.constexpr, state, rows, columns, g: gl.constexpr
):
    """Step k of K, which is in `stage`, for quadrants of which `rows` and `columns` exist. LEFT
    steps come after it.

        region       1               2               3               4
        wait, read   x bottom k      w right k       w left k+1      x top k+1
        issue        w left k+2      x top k+2       x bottom k+2    w right k+2        (RING = 2)
        multiply     top left        bottom left     top right       bottom right
        of step      x t   w l       x b   w l       x t   w r       x b   w r
        in flight    wr k            wl k+1          xt k+1          xb k+1
                     wl k+1          xt k+1          xb k+1          wr k+1
                     xt k+1          xb k+1          wr k+1          wl k+2
                     xb k+1          wr k+1          wl k+2          xt k+2
                     wr k+1          wl k+2          xt k+2          xb k+2

    "In flight" are the pieces that the wait leaves, the oldest first: what a region reads was
    issued 4 RING - 2 regions before, so 4 RING - 3 came after it.
    Near the end fewer were issued after it: in region r, 4 LEFT + 2 - r. A copy refills the stage
    that was read two regions before: what a region reads is in registers when the next one ends (it
    is multiplied there, or its scales are), and the barrier of the one after that comes after all
    waves have got there. Each piece needs one set of registers, dead a region before it is read
    again. The branches skip quadrants without rows or columns, and LLVM moves no matrix instruction
    across them: each quadrant's run between its own barrier and the next."""
    top_left, bottom_left, top_right, bottom_right, x_top, w_left, x_scales, w_scales = state
    RING: gl.constexpr = g.RING
    NEXT: gl.constexpr = (stage + 1) % RING
    AFTER: gl.constexpr = 4 * RING - 3
    ISSUE: gl.constexpr = LEFT >= RING  # step k + RING exists
    LAST: gl.constexpr = LEFT == RING  # and is the last one
    x_top_scale, x_bottom_scale = x_scales
    w_left_scale, w_right_scale = w_scales

    wait(min(AFTER, 4 * LEFT + 1))
    x_bottom = read_x(p, 1, stage, g)
    if ISSUE:
        issue_w(p, 0, k + RING, stage, LAST, g)
    if more(rows, 0):
        top_left = mfma(top_left, x_top, x_top_scale, w_left, w_left_scale, g)

    wait(min(AFTER, 4 * LEFT))
    w_right = read_w(p, 1, stage, g)
    if ISSUE:
        issue_x(p, 0, k + RING, stage, LAST, g)
    if more(rows, 64):
        bottom_left = mfma(bottom_left, x_bottom, x_bottom_scale, w_left, w_left_scale, g)

    if LEFT > 0:
        wait(min(AFTER, 4 * LEFT - 1))
        w_left, w_scales = read_w(p, 0, NEXT, g), read_w_scales(p, NEXT, g)
    if ISSUE:
        issue_x(p, 1, k + RING, stage, LAST, g)
    if more(columns, 128):
        top_right = mfma(top_right, x_top, x_top_scale, w_right, w_right_scale, g)

    if LEFT > 0:
        wait(min(AFTER, 4 * LEFT - 2))
        x_top, x_scales = read_x(p, 0, NEXT, g), read_x_scales(p, NEXT, LEFT == 1, g)
    if ISSUE:
        issue_w(p, 1, k + RING, stage, LAST, g)
    if more(gl.minimum(2 * rows, columns), 128):
        bottom_right = mfma(bottom_right, x_bottom, x_bottom_scale, w_right, w_right_scale, g)
    return top_left, bottom_left, top_right, bottom_right, x_top, w_left, x_scales, w_scales


@gluon.jit
def sliced_gemm(p, left, right, rows, columns, g: gl.constexpr):
    """The quadrants top left, bottom left, top right, bottom right, float32 [64, 128], over all of
    K; left and right are what they start with."""
    STEPS: gl.constexpr = g.STEPS
    RING: gl.constexpr = g.RING
    AHEAD: gl.constexpr = min(RING, STEPS)
    for s in gl.static_range(AHEAD):
        issue_w(p, 0, s, s, s == STEPS - 1, g)
        issue_x(p, 0, s, s, s == STEPS - 1, g)
        issue_x(p, 1, s, s, s == STEPS - 1, g)
        issue_w(p, 1, s, s, s == STEPS - 1, g)
    wait(4 * AHEAD - 2)  # for the first two pieces
    state = (
        left, left, right, right, read_x(p, 0, 0, g), read_w(p, 0, 0, g),
        read_x_scales(p, 0, STEPS == 1, g), read_w_scales(p, 0, g),
    )  # fmt: skip
    # whole rings before the last step is issued
    LOOP: gl.constexpr = max(0, (STEPS - 1 - RING) // RING * RING)
    for k in range(0, LOOP, RING):
        for stage in gl.static_range(RING):
            state = sliced_step(p, k + stage, stage, STEPS, state, rows, columns, g)
    for k in gl.static_range(LOOP, STEPS):
        state = sliced_step(p, k, k % RING, STEPS - 1 - k, state, rows, columns, g)
    return state[0], state[1], state[2], state[3]


@gluon.jit
def in_order(y):
    """y [64, 128 / v], from 128 positions: its columns in order. Only registers get other names: of
    each of its rows a lane holds 16 / v consecutive columns."""
    v: gl.constexpr = 128 // y.shape[1]
    return y.reshape(64, 2, 4, 4, 4 // v).permute(0, 1, 3, 2, 4).reshape(64, 128 // v)


@gluon.jit
def store_quadrants(quadrants, tile, start, STORE: gl.constexpr, to, g: gl.constexpr):
    """STORE(quadrant, its half of the tile, its first position, *to, g) for those that exist."""
    for right in gl.static_range(2):
        for bottom in gl.static_range(2):
            n = start + 128 * right
            if (tile.count > 64 * bottom) & (g.N > n):
                STORE(quadrants[2 * right + bottom], half_of(tile, bottom), n, *to, g)


@gluon.jit
def store_swiglu(
    acc, part, start, h, h_scale, x_static, h_static, LIMIT: gl.constexpr, g: gl.constexpr
):
    """A quadrant through SwiGLU to the places of `part`, rows of h [*, N/2], from the half of
    position `start`, in the format."""
    if g.STATIC:
        acc = acc * x_static
    y = swiglu(acc, LIMIT)
    if g.X == "bf16":
        q = y.to(gl.bfloat16)
    else:
        if g.STATIC:
            y = y * (1 / h_static)
        # 64 columns are 32 values, in mx formats one scale group
        q, scale = quantise(y.reshape(128, 32), g.X, g.MX)
        q = q.reshape(64, 2 * q.shape[1])
    q = in_order(q)
    POSITIONS: gl.constexpr = 128 // q.shape[1]  # of a stored element
    WIDTH: gl.constexpr = g.N // POSITIONS  # of a row of h
    row, n = iota(0, 64, q.type.layout), start // POSITIONS + iota(1, q.shape[1], q.type.layout)
    exists = (row < part.count) & (n < WIDTH)
    cdna4.buffer_store(q, h, (part.first + row) * WIDTH + n, mask=exists)
    if g.MX:
        scale = scale.reshape(64, 2)
        row, n = iota(0, 64, scale.type.layout), start // BLOCK + iota(1, 2, scale.type.layout)
        exists = (row < part.count) & (n < g.N // BLOCK)
        at = (part.first + row) * scale_bytes(g.N // 2) + n
        cdna4.buffer_store(scale, h_scale, at, mask=exists)


@gluon.jit
def store_weighted(acc, part, start, weighted, pairs, gates, static, g: gl.constexpr):
    """A quadrant of the places of `part`, times their gates, to their pairs' rows of `weighted`,
    from `start`."""
    y = in_order(acc)
    row, n = gl.arange(0, 64, only(0, y.type.layout)), start + iota(1, 128, y.type.layout)
    pair = load_pairs(pairs, part, 64, only(0, y.type.layout))
    gate = cdna4.buffer_load(gates, pair, mask=row < part.count)
    if g.STATIC:
        gate = gate * static
    y = (y * gate[:, None]).to(gl.bfloat16)
    exists = (row < part.count)[:, None] & (n < g.N)
    cdna4.buffer_store(y, weighted, pair[:, None] * g.N + n, mask=exists)


@gluon.jit
def sum_slots_kernel(
    weighted, out, N: gl.constexpr, TOP_K: gl.constexpr, BN: gl.constexpr, WAVES: gl.constexpr
):
    """out[token] = sum of its pairs' rows, in the order of slots."""
    SLOTS: gl.constexpr = triton.next_power_of_2(TOP_K)
    layout: gl.constexpr = gl.BlockedLayout([8], [64], [WAVES], [0])
    token, n = gl.program_id(1), gl.program_id(0) * BN + gl.arange(0, BN, layout)
    weighted += token.to(gl.int64) * (SLOTS * N)
    y = cdna4.buffer_load(weighted, n, mask=n < N).to(gl.float32)
    for slot in gl.static_range(1, TOP_K):
        y += cdna4.buffer_load(weighted, slot * N + n, mask=n < N).to(gl.float32)
    cdna4.buffer_store(y.to(gl.bfloat16), out + token.to(gl.int64) * N, n, mask=n < N)


# --------------------------------------------------------------------------------------------------
# What the compiler made


@dataclass(frozen=True)
class Profile:
    """Of a compiled kernel: registers, spilled registers, scratch bytes a lane, LDS bytes a
    workgroup, waves a SIMD (by registers and LDS, from LLVM), code bytes."""

    sgprs: int
    vgprs: int
    agprs: int
    sgpr_spills: int
    vgpr_spills: int
    scratch: int
    lds: int
    occupancy: int
    code_bytes: int


def static_profile(compiled) -> Profile:
    """`compiled` is what `kernel[grid](...)` returns. Read from its assembly; LDS, which is
    dynamic, from Triton."""
    text = compiled.asm["amdgcn"]

    def number(name):
        return int(re.search(name + r"\s+(\d+)", text).group(1))

    agprs = number(r"\.agpr_count:")
    return Profile(
        number(r"\.sgpr_count:"),
        number(r"\.vgpr_count:") - agprs,
        agprs,
        number(r"\.sgpr_spill_count:"),
        number(r"\.vgpr_spill_count:"),
        number(r"\.private_segment_fixed_size:"),
        compiled.metadata.shared,
        number("; Occupancy:"),
        number("; codeLenInByte ="),
    )


def assert_no_spills(compiled) -> Profile:
    """The profile of a kernel that keeps everything in registers; AssertionError, naming it, for
    one that does not."""
    profile = static_profile(compiled)
    if profile.sgpr_spills or profile.vgpr_spills or profile.scratch:
        raise AssertionError(f"{compiled.metadata.name} spills: {profile}")
    return profile
