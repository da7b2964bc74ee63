"""The mixture-of-experts layer of GPT-OSS in Gluon for NVIDIA GPUs, sm_80 and newer: mxfp4 weights,
bfloat16 activations, 1 to 8 tokens; and dense layers of 2 to 8.

    packed = prepare(experts, "bf16")                                 # once, at load
    y = moe(x, router_weight, router_bias, packed, top_k, "bf16")     # [T, H] -> [T, H]

So few tokens are bound by the bytes of the active experts' weights. A layer is three launches:

    route      router GEMM, top-k, softmax, list of the active experts' tiles;
               other programs put x into the order in which `dispatch` reads it
    dispatch   gather rows, first GEMM, bias, SwiGLU
    combine    second GEMM, bias, gate weight; the last program for some columns sums over the slots

Weights go from memory straight into the registers of mma.m16n8k16's left operand: a lane loads 16
bytes, which are the operands of four instructions, 16 rows of weights x 64 inputs a warp. Tokens
are the right operand, 8 columns. No shared memory, no barrier and no change of layout lies in
between; the warps of a program split K, several loads of each are in flight, and the warps' sums
meet in shared memory at the end, in a fixed order. That order depends on K and on how many warps
split it, which is the same for 1 to 8 tokens: a token's result does not depend on its batch, and is
the same in every run.

With PDL (programmatic dependent launch, sm_90 and newer) a kernel starts while the one before it
still runs, asks for the weights that it will need, and waits for that one only then. Since each
waits, all that came before is done by then, too. `dispatch` lets `combine` start after its own
wait: so `route` is done, and `combine` knows the experts whose weights it asks for. The letters:

    T  tokens     H  hidden size    I  intermediate size     E  experts    k  experts of a token
    N, K   outer and inner size of a GEMM's weight
    pair   a token and one of its k slots: pair = token * k + slot
    tile   the pairs of one expert, at most one of each token
    block  16 rows of weights x 64 inputs

Number formats are OCP MX v1.0, the operands of mma.m16n8k16 those of the PTX ISA ("Matrix Fragments
for mma.m16n8k16")."""

from dataclasses import astuple, dataclass

import torch
import triton
import triton.experimental.gluon.language as gl
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon.language.nvidia.ampere import mma_v2

# triton 3.7 renamed it
barrier = getattr(gl, "barrier", None) or gl.thread_barrier

MAX_TOKENS = 8  # above, ops_triton's layer is faster (docs/performance.md)
GROUP = 32  # inputs that share a scale
COLUMNS = gl.constexpr(MAX_TOKENS)  # of the matrix instruction: tokens, or the pairs of a tile
ROUTE_WARPS = gl.constexpr(8)  # of which each selects the experts of one token
LINEAR_WARPS = gl.constexpr(8)


def is_supported(least: int = 80) -> bool:
    """True where Triton's active driver compiles for NVIDIA's sm_80, or `least`, or newer."""
    try:
        target = triton.runtime.driver.active.get_current_target()
    except RuntimeError:  # Triton has no active driver
        return False
    return target.backend == "cuda" and target.arch >= least


# --------------------------------------------------------------------------------------------------
# Experts' weights


@dataclass
class Weight:
    """One projection of all experts. Of gate_up each 16 rows are 8 gates and then their 8 ups, so
    that a lane of the product has both.

    data int32 [E, K/64, N/16, 8, 4, 4]; word (r, c, i) of a block has the codes of row r + 8 (i //
    2) and of the inputs 32 (i % 2) + 16 b + 8 a + 2 c + h: what lane 4 r + c holds of the matrix
    instruction's left operand. `spread` says where a word has the code of (a, b, h). scale int32
    [E, K/64, N/16, 8]: byte i of word r is for word (r, c, i). Inputs beyond K are zeros.

    These are the fields and the order of ops_triton.Weight: one copy serves both."""

    data: Tensor
    scale: Tensor
    bias: Tensor  # float32 [E, N]
    input_scale: float  # 1: bfloat16 has none
    wide: bool  # some scale byte is above 128: two multiplications, see `dequantise`
    N: int
    K: int


@dataclass
class Packed:
    """A layer's experts. `arrived` counts programs and is zero between launches."""

    gate_up: Weight
    down: Weight
    activations: str
    arrived: Tensor  # int32


def prepare(experts, activations: str) -> Packed:
    """Packs a layer's experts (the fields of weights.Experts) on their device, 16 experts at a
    time. The result is as large as the input, which is left as it was. Raises ValueError for what
    the kernels do not multiply: activations other than "bf16", weights other than mxfp4, sizes that
    are no multiple of 32."""
    if activations != "bf16":
        raise ValueError(f"activations={activations!r}: these kernels multiply bf16 only")
    weights = [
        (experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias),
        (experts.down_weight, experts.down_scale, experts.down_bias),
    ]
    for weight, scale, _ in weights:
        if weight.dtype != torch.uint8 or scale is None:
            raise ValueError(f"expert weights are {weight.dtype}, expected mxfp4 in uint8")
        N, K = weight.shape[1], 2 * weight.shape[2]
        if N % GROUP or K % GROUP:
            raise ValueError(f"an expert weight of {N} x {K}: expected multiples of {GROUP}")
    gate_up, down = (pack(*w, pair) for w, pair in zip(weights, (2, 1), strict=True))
    counters = max(1 + down.N // 16, 1 << 12)  # of route and of combine; ops_triton needs as many
    return Packed(gate_up, down, activations, down.bias.new_zeros(counters, dtype=torch.int32))


def pack(weight: Tensor, scale: Tensor, bias: Tensor, pair: int) -> Weight:
    """weight uint8 [E, N, K/2], scale uint8 [E, N, K/32], bias [E, N]; pair 2: rows alternate gate
    and up, and are put apart."""
    (E, N, _), K = weight.shape, 2 * weight.shape[2]
    order = torch.arange(N, device=weight.device).view(-1, 16 // pair, pair).mT.flatten()
    blocks = -(-K // 64), N // 16
    data = torch.empty(E, *blocks, 8, 4, 4, dtype=torch.int32, device=weight.device)
    scales = torch.empty(E, *blocks, 8, dtype=torch.int32, device=weight.device)
    for e in range(0, E, 16):
        part = weight[e : e + 16].index_select(1, order)  # [e, N, K/2]
        part = torch.nn.functional.pad(part, (0, blocks[0] * 32 - K // 2))
        # [e, N/16, i // 2, r, K/64, i % 2, b, a, c], a byte is h = 0 and 1
        part = part.view(-1, blocks[1], 2, 8, blocks[0], 2, 2, 2, 4)
        words = sum(spread(part[..., b, a, :], a, b) for a in (0, 1) for b in (0, 1))
        words = words.permute(0, 4, 1, 3, 6, 2, 5)  # [e, K/64, N/16, r, c, i // 2, i % 2]
        data[e : e + 16] = words.reshape(-1, *data.shape[1:])
        part = scale[e : e + 16].index_select(1, order)  # [e, N, K/32]
        part = torch.nn.functional.pad(part, (0, blocks[0] * 2 - K // GROUP))
        part = part.view(-1, blocks[1], 2, 8, blocks[0], 2).permute(0, 4, 1, 3, 2, 5)
        scales[e : e + 16] = part.reshape(-1, *blocks, 8, 4).view(torch.int32)[..., 0]
    bias = bias.float().index_select(1, order)
    return Weight(data, scales, bias, 1.0, bool((scale > 128).any()), N, K)


def spread(byte: Tensor, a: int, b: int) -> Tensor:
    """Both codes (sign, two bits of exponent, mantissa) of a byte to where a word has them: the
    first in its lower 16 bits, the second in its upper ones. Sign and magnitude of (a, b) = (0, 0)
    are at bits 15 and 8..6, where bfloat16 has them, those of (1, 0) and (0, 1) 3 and 6 bits lower,
    and those of (1, 1) in the bits left: 14, 13, 11, 10."""
    v = byte.int()
    v = (v & 15) | (v >> 4 << 16)
    sign, magnitude = v & 0x80008, v & 0x70007
    if (a, b) == (1, 1):
        return (sign << 11) | ((v & 0x40004) << 11) | ((v & 0x30003) << 10)
    lower = 3 * a + 6 * b
    return (sign << (12 - lower)) | (magnitude << (6 - lower))


# --------------------------------------------------------------------------------------------------
# The cut of a GEMM, and its layouts


@dataclass(frozen=True)
class Cut:
    """How a program multiplies 16 * NB * WN rows of weights by a tile: its warps are WN
    beside each other, of NB blocks each, times WK along K. In a step warp k of these takes block
    step * WK + k of K. The weights of AHEAD steps are in flight, and the inputs of X_AHEAD beside
    those of the step at hand. WK decides the order of the sum over K, and so its last bits."""

    NB: int
    WN: int
    WK: int
    AHEAD: int
    X_AHEAD: int


@dataclass(frozen=True)
class Gemm(Cut):
    """x [*, K] @ w [N, K].T. WIDE: see `dequantise`."""

    N: int
    K: int
    WIDE: bool


@gluon.constexpr_function
def bits(n, axis, rank, unit=1):
    """The bases of a linear layout that count to n, a power of two, in units along an axis."""
    return [[unit << i if a == axis else 0 for a in range(rank)] for i in range(n.bit_length() - 1)]


@gluon.constexpr_function
def product_layout(WK, WN):
    """[WK, rows, columns]: lane 4 r + c holds rows r and r + 8 and columns 2 c and 2 c + 1 of each
    16 x 8."""
    return gl.NVMMADistributedLayout([2, 0], [WK, WN, 1], [1, 16, 8])


@gluon.constexpr_function
def words_layout(WK, WN):
    """Blocks of weights as memory has them, [WK, 32 lanes * blocks, 4 words]: lane L holds the 16
    bytes L of each block."""
    return gl.BlockedLayout([1, 1, 4], [1, 32, 1], [WK, WN, 1], [2, 1, 0])


@gluon.constexpr_function
def right_layout(WK, WN):
    """Blocks of inputs as memory has them, [8, WK, 4, 8 words]: lane 4 r + c holds the 32 bytes c
    of column r; the WN warps that share a block of K hold the same."""
    registers, lanes = bits(8, 3, 4), bits(4, 2, 4) + bits(8, 0, 4)
    warps = [[0, 0, 0, 0]] * (WN.bit_length() - 1) + bits(WK, 1, 4)
    return gl.DistributedLinearLayout(registers, lanes, warps, [], [8, WK, 4, 8])


@gluon.constexpr_function
def left_layout(WK):
    """Rows of bfloat16 weights as memory has them, [WK, 16 rows, 4, 8 words]: lane 4 r + c holds
    the 32 bytes c of rows r and r + 8."""
    registers, lanes = bits(8, 3, 4) + bits(2, 1, 4, 8), bits(4, 2, 4) + bits(8, 1, 4)
    return gl.DistributedLinearLayout(registers, lanes, bits(WK, 0, 4), [], [WK, 16, 4, 8])


@gluon.constexpr_function
def only(axis, layout, rank):
    """The 1-D layout along one axis of `layout`."""
    for other in reversed(range(rank)):
        layout = layout if other == axis else gl.SliceLayout(other, layout)
    return layout


@gluon.jit
def iota(axis: gl.constexpr, size: gl.constexpr, layout: gl.constexpr, rank: gl.constexpr):
    """0 .. size - 1 along one axis, broadcastable against a tensor of `layout`."""
    i = gl.arange(0, size, only(axis, layout, rank))
    for other in gl.static_range(rank):
        if other != axis:
            i = gl.expand_dims(i, other)
    return i


# --------------------------------------------------------------------------------------------------
# Operands
#
# Lane 4 r + c of the matrix instruction's left operand holds inputs 8 m + 2 c + h of rows r and r +
# 8 of a block, m < 8, h < 2, and of the right operand the same inputs of column r: eight words of
# two bfloat16. So that they are 32 consecutive bytes, the inputs of the expert GEMMs are stored
# with word 4 m + c of a block's 32 at 8 c + m. The GEMMs of bfloat16 weights need no such order:
# they take word 8 c + m of both operands for 4 m + c, which changes the order of their sums only.

DEQUANTISE_OPERANDS = gl.constexpr(",".join(["=&r"] * 16 + ["r"] * 12))


@gluon.constexpr_function
def dequantise_asm(wide):
    """PTX of `dequantise` for the four words $16 .. $19 of a lane, whose scales are the bytes of
    $20: code (a, b) of word i becomes $(4 (a + 2 b) + i)."""
    lines = [".reg .b32 one, two, factor, scale, zero; .reg .pred special;"]
    lines += ["mov.b32 zero, 0x80008000; mov.b32 factor, 0x7E807E80;"]
    for i in range(4):
        word, codes = f"${16 + i}", [f"${i}", f"${4 + i}", f"${8 + i}", f"${12 + i}"]
        lines += [
            f"and.b32 {codes[0]}, {word}, 0x81C081C0;",
            f"shl.b32 one, {word}, 3; and.b32 {codes[1]}, one, 0x81C081C0;",
            f"shl.b32 one, {word}, 6; and.b32 {codes[2]}, one, 0x81C081C0;",
            f"shl.b32 one, {word}, 1; and.b32 one, one, 0x80008000;",
            f"shr.u32 two, {word}, 5; and.b32 two, two, 0x01000100; or.b32 one, one, two;",
            f"shr.u32 two, {word}, 4; and.b32 two, two, 0x00C000C0; or.b32 {codes[3]}, one, two;",
            f"prmt.b32 scale, $20, 0, {0x4440 + i:#x};",
        ]
        if wide:
            lines += [
                "mul.lo.u32 two, scale, 0x00800080; setp.eq.u32 special, scale, 255;",
                "selp.b32 two, 0x7FC07FC0, two, special; setp.eq.u32 special, scale, 0;",
                "selp.b32 scale, 0x00400040, two, special;",
            ]
        else:
            lines += ["mad.lo.u32 factor, scale, 0x00800080, 0x3F003F00;"]
        for code in codes:  # sm_80 multiplies two bfloat16 only so; adding -0 changes nothing
            lines += [f"fma.rn.bf16x2 {code}, {code}, factor, zero;"]
            lines += [f"fma.rn.bf16x2 {code}, {code}, scale, zero;"] if wide else []
    return "{\n" + "\n".join(lines) + "\n}"


@gluon.jit
def dequantise(words, scales, left: gl.constexpr, g: gl.constexpr):
    """words int32 [WK, 32 NB, 4] of NB blocks, scales int32 [WK, 32 NB] -> bfloat16 [WK, 16 NB,
    64], the left operand.

    A code's sign and magnitude where bfloat16 has its sign and the low end of its exponent are the
    code's value times 2^-126, also where it is subnormal. One multiplication by 2^126 and the
    scale, 2^(byte - 127), puts that right. Their product has a bfloat16 up to byte 128. WIDE
    multiplies by each, and byte 255 is NaN."""
    NB: gl.constexpr = g.NB * g.WN
    ASM: gl.constexpr = dequantise_asm(g.WIDE)
    words = halves(words).reshape(g.WK, 32 * NB, 8)
    flat: gl.constexpr = gl.SliceLayout(2, words.type.layout)
    scales = gl.convert_layout(scales, flat, assert_trivial=True)
    words, scales = gl.broadcast(words, scales[:, :, None])
    a0b0, a1b0, a0b1, a1b1 = gl.inline_asm_elementwise(
        ASM, DEQUANTISE_OPERANDS, [words, scales], is_pure=True, pack=8,
        dtype=(gl.bfloat16, gl.bfloat16, gl.bfloat16, gl.bfloat16),
    )  # fmt: skip
    w = gl.join(gl.join(a0b0, a0b1), gl.join(a1b0, a1b1))  # [WK, 32 NB, (i, h), b, a]
    w = w.reshape(g.WK, NB, 8, 4, 2, 2, 2, 2, 2)  # k, block, r, c, i // 2, i % 2, h, b, a
    w = w.permute(0, 1, 4, 2, 5, 7, 8, 3, 6).reshape(g.WK, 16 * NB, 64)
    return gl.convert_layout(w, left, assert_trivial=True)


@gluon.jit
def halves(words):
    """int32 [..] -> int16 [.., 2], the lower half first. No instruction: words that were loaded as
    int16 would be taken apart and put together again."""
    low, high = gl.inline_asm_elementwise(
        "mov.b32 {$0, $1}, $2;", "=h,=h,r", [words], dtype=(gl.int16, gl.int16), is_pure=True,
        pack=1,
    )  # fmt: skip
    return gl.join(low, high)


@gluon.jit
def left_operand(w, left: gl.constexpr):
    """int32 [WK, 16, 4 (c), 8 (m)] -> bfloat16 [WK, 16, 64 (m, c, h)]."""
    WK: gl.constexpr = w.shape[0]
    w = halves(w).to(gl.bfloat16, bitcast=True).permute(0, 1, 3, 2, 4).reshape(WK, 16, 64)
    return gl.convert_layout(w, left, assert_trivial=True)


@gluon.jit
def right_operand(x, right: gl.constexpr):
    """int32 [8, WK, 4 (c), 8 (m)] -> bfloat16 [WK, 64 (m, c, h), 8]."""
    WK: gl.constexpr = x.shape[1]
    x = halves(x).to(gl.bfloat16, bitcast=True).permute(1, 3, 2, 4, 0).reshape(WK, 64, COLUMNS)
    return gl.convert_layout(x, right, assert_trivial=True)


# --------------------------------------------------------------------------------------------------
# The GEMM of a tile

STAY = gl.constexpr("bar.warp.sync 0xFFFFFFFF; // $0")
AWAIT_PREVIOUS = gl.constexpr("griddepcontrol.wait; // $0")
START_NEXT = gl.constexpr("griddepcontrol.launch_dependents; // $0")


@gluon.jit
def order(INSTRUCTION: gl.constexpr):
    """An instruction that accesses to memory are not moved across. STAY costs nothing, as a warp is
    together anyway: without it ptxas moves loads down towards their use, to save registers."""
    gl.inline_asm_elementwise(
        INSTRUCTION, "=r,~{memory}", [], dtype=gl.int32, is_pure=False, pack=1
    )


@gluon.jit
def load_weights(data, scale, step, ahead: gl.constexpr, g: gl.constexpr):
    """Words and scales of the blocks of step + ahead; data and scale point to those of `step`."""
    layout: gl.constexpr = words_layout(g.WK, g.WN)
    ROW: gl.constexpr = g.WK * (g.N // 16) * 8  # words r of a step's blocks
    block = (step + ahead) * g.WK + iota(0, g.WK, layout, 3)
    words = gl.load(data + ahead * ROW * 16, mask=block < (g.K + 63) // 64, other=0)
    block = (step + ahead) * g.WK + iota(0, g.WK, gl.SliceLayout(2, layout), 2)
    return words, gl.load(scale + ahead * ROW, mask=block < (g.K + 63) // 64, other=0)


@gluon.jit
def load_inputs(x, live, step, ahead: gl.constexpr, g: gl.constexpr):
    """Inputs of the blocks of step + ahead; x points to those of `step`. Columns that are not live
    and what lies beyond K are zeros."""
    layout: gl.constexpr = right_layout(g.WK, g.WN)
    block = (step + ahead) * g.WK + iota(1, g.WK, layout, 4)
    inside = block < (g.K + 63) // 64
    if g.K % 64 != 0:  # the upper half of the last block is missing
        inside = block * 64 + iota(3, 8, layout, 4) // 4 * 32 < g.K
    return gl.load(x + ahead * (g.WK * 32), mask=live & inside, other=0)


@gluon.jit
def expert_gemm(
    x, row, live, data, scale, expert, n, steps, PDL: gl.constexpr, g: gl.constexpr
):  # fmt: skip
    """float32 [16 NB WN, 8]: rows of an expert's weight, from 16 NB WN n on, times 8 rows of x,
    over all of K. row, live [8, 1, 1, 1]. PDL: the kernel before this one makes x. `steps` is
    known only at launch, so that the loop stays one."""
    NB: gl.constexpr = g.NB * g.WN
    AHEAD: gl.constexpr = g.AHEAD
    X_AHEAD: gl.constexpr = g.X_AHEAD
    BLOCKS: gl.constexpr = g.N // 16  # of N
    SIZE: gl.constexpr = (g.K + 63) // 64 * BLOCKS * 8  # words r of an expert
    product: gl.constexpr = product_layout(g.WK, g.WN)
    left: gl.constexpr = gl.DotOperandLayout(0, product, 2)
    right: gl.constexpr = gl.DotOperandLayout(1, product, 2)
    gl.static_assert(BLOCKS % NB == 0)

    layout: gl.constexpr = words_layout(g.WK, g.WN)
    at = iota(0, g.WK, layout, 3) * BLOCKS * 128 + n * (NB * 128)
    data += expert.to(gl.int64) * (SIZE * 16)
    data = data + (at + iota(1, 32 * NB, layout, 3) * 4 + iota(2, 4, layout, 3))
    flat: gl.constexpr = gl.SliceLayout(2, layout)
    at = iota(0, g.WK, flat, 2) * BLOCKS * 8 + n * (NB * 8)
    scale += expert.to(gl.int64) * SIZE
    scale = scale + (at + iota(1, 32 * NB, flat, 2) // 4)
    layout_x: gl.constexpr = right_layout(g.WK, g.WN)
    at = iota(1, g.WK, layout_x, 4) * 32 + iota(2, 4, layout_x, 4) * 8 + iota(3, 8, layout_x, 4)
    x = x + (gl.where(live, row, 0) * ((g.K + 63) // 64 * 32) + at)

    ws, xs = (), ()
    for j in gl.static_range(AHEAD):
        ws = ws + (load_weights(data, scale, 0, j, g),)
    if PDL:
        order(AWAIT_PREVIOUS)
    for j in gl.static_range(X_AHEAD):
        xs = xs + (load_inputs(x, live, 0, j, g),)
    acc = gl.full([g.WK, 16 * NB, COLUMNS], 0, gl.float32, product)
    for step in range(0, steps, AHEAD):
        for j in gl.static_range(AHEAD):
            xs = xs + (load_inputs(x, live, step, j + X_AHEAD, g),)
            order(STAY)
            w = dequantise(ws[0][0], ws[0][1], left, g)
            acc = mma_v2(w, right_operand(xs[0], right), acc)
            ws, xs = ws[1:] + (load_weights(data, scale, step, j + AHEAD, g),), xs[1:]
            order(STAY)
        data += AHEAD * g.WK * BLOCKS * 128
        scale += AHEAD * g.WK * BLOCKS * 8
        x += AHEAD * g.WK * 32
    return gl.sum(acc, axis=0)


@gluon.jit
def arrive(counter):
    """Adds 1 to a counter after everything that this program has stored, and makes what earlier
    arrivals stored visible to it -> how many came before."""
    barrier()
    return gl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


# --------------------------------------------------------------------------------------------------
# route


@gluon.jit
def reorder(x, seen, T, z, H: gl.constexpr, PART: gl.constexpr):
    """Part z, PART blocks long, of x, as words of two bfloat16 -> seen, rows of whole
    blocks with word 4 m + c of a block at 8 c + m."""
    WARPS: gl.constexpr = ROUTE_WARPS
    layout: gl.constexpr = gl.BlockedLayout([COLUMNS, 1, 1], [1, 1, 32], [1, WARPS, 1], [2, 1, 0])
    token, word = iota(0, COLUMNS, layout, 3), iota(2, 32, layout, 3)
    for start in gl.static_range(0, PART, WARPS):
        block = start + iota(1, WARPS, layout, 3)
        live = (token < T) & (block < PART) & ((z * PART + block) * 32 + word < H // 2)
        values = gl.load(x + token * (H // 2) + (z * PART + block) * 32 + word, mask=live)
        at = token * ((H + 63) // 64 * 32) + (z * PART + block) * 32 + word % 4 * 8 + word // 4
        gl.store(seen + at, values, mask=live)


@gluon.jit
def route_gemm(
    x, w, T, e, z, H: gl.constexpr, E: gl.constexpr, PART: gl.constexpr, PDL: gl.constexpr
):
    """float32 [16, 8]: logits of experts e .. for all tokens, over part z of H. x, w: words of
    two bfloat16."""
    WARPS: gl.constexpr = ROUTE_WARPS
    product: gl.constexpr = product_layout(WARPS, 1)
    left: gl.constexpr = left_layout(WARPS)
    right: gl.constexpr = right_layout(WARPS, 1)
    e, token = e + iota(1, 16, left, 4), iota(0, COLUMNS, right, 4)
    ws, xs = (), ()
    for start in gl.static_range(0, PART, WARPS):
        block = start + iota(0, WARPS, left, 4)
        k = (z * PART + block) * 32 + iota(2, 4, left, 4) * 8 + iota(3, 8, left, 4)
        live = (block < PART) & (k < H // 2) & (e < E)
        ws = ws + (gl.load(w + e * (H // 2) + k, mask=live, other=0),)
    if PDL:
        order(AWAIT_PREVIOUS)
    for start in gl.static_range(0, PART, WARPS):
        block = start + iota(1, WARPS, right, 4)
        k = (z * PART + block) * 32 + iota(2, 4, right, 4) * 8 + iota(3, 8, right, 4)
        live = (block < PART) & (k < H // 2) & (token < T)
        xs = xs + (gl.load(x + token * (H // 2) + k, mask=live, other=0),)
    order(STAY)
    acc = gl.full([WARPS, 16, COLUMNS], 0, gl.float32, product)
    if T > 0:  # always: no product moves up from here, between the loads
        for step in gl.static_range(len(ws)):
            a = left_operand(ws[step], gl.DotOperandLayout(0, product, 2))
            acc = mma_v2(a, right_operand(xs[step], gl.DotOperandLayout(1, product, 2)), acc)
    return gl.sum(acc, axis=0)


@gluon.jit
def select_experts(
    logits, router_bias, T, E: gl.constexpr, TOP_K: gl.constexpr, PARTS: gl.constexpr
):
    """The k experts of largest logit, the smaller id first where they tie, of each token, and the
    softmax over these logits. logits float32 [PARTS, T, E] -> ids int32 [8, SLOTS], gates
    float32."""
    SLOTS: gl.constexpr = triton.next_power_of_2(TOP_K)
    PADDED_E: gl.constexpr = triton.next_power_of_2(E)
    # a warp holds a token
    layout: gl.constexpr = gl.BlockedLayout(
        [1, max(1, PADDED_E // 32)], [1, 32], [ROUTE_WARPS, 1], [1, 0]
    )
    token, e = iota(0, COLUMNS, layout, 2), iota(1, PADDED_E, layout, 2)
    total = gl.zeros([COLUMNS, PADDED_E], gl.float32, layout)
    for part in gl.static_range(PARTS):
        at = logits + (part * T + token) * E + e
        total += gl.load(at, mask=(token < T) & (e < E), other=0.0)
    total += gl.load(router_bias + e, mask=e < E, other=0.0).to(gl.float32)
    # Integers in the order of the logits, of which none is -0, as sums begin at 0; NaN above all;
    # below them, in a longer integer, what is larger for smaller ids.
    code = total.to(gl.int32, bitcast=True)
    code = gl.where(total != total, 0x7FFFFFFF, code ^ ((code >> 31) & 0x7FFFFFFF))
    code = gl.where(e < E, code, -0x80000000)
    left = (code.to(gl.int64) << 32) | (PADDED_E - 1 - e).to(gl.int64)
    slot = iota(1, SLOTS, layout, 2)
    ids = gl.full([COLUMNS, SLOTS], 0, gl.int32, layout)
    gates = gl.full([COLUMNS, SLOTS], 0.0, gl.float32, layout)
    for s in gl.static_range(TOP_K):
        best = gl.max(left, axis=1)[:, None]
        left = gl.where(left == best, -0x8000000000000000, left)
        code = (best >> 32).to(gl.int32)
        logit = (code ^ ((code >> 31) & 0x7FFFFFFF)).to(gl.float32, bitcast=True)
        if s == 0:
            largest = logit
        ids = gl.where(slot == s, PADDED_E - 1 - best.to(gl.int32), ids)
        gates = gl.where(slot == s, gl.exp(logit - largest), gates)
    return ids, gates / gl.sum(gates, axis=1)[:, None]


@gluon.jit
def list_tiles(expert, experts, sizes, rows, count, E: gl.constexpr, TOP_K: gl.constexpr):
    """expert int32 [ROWS], of each token's SLOTS, E where there is none -> tiles, in the order of
    experts and tokens: experts and sizes [tiles], rows [tiles, 8], pairs; count. Every position is
    a count of smaller ones, so that nothing depends on who comes first."""
    ROWS: gl.constexpr = expert.shape[0]
    SLOTS: gl.constexpr = triton.next_power_of_2(TOP_K)
    square: gl.constexpr = gl.BlockedLayout(
        [1, max(1, ROWS // 4)], [8, 4], [ROUTE_WARPS, 1], [1, 0]
    )
    along: gl.constexpr = only(1, square, 2)
    down: gl.constexpr = only(0, square, 2)
    i, other = gl.arange(0, ROWS, down), gl.arange(0, ROWS, along)[None, :]
    expert, theirs = gl.convert_layout(expert, down), gl.convert_layout(expert, along)[None, :]
    same = theirs == expert[:, None]
    size = gl.sum(same.to(gl.int32), axis=1)
    rank = gl.sum((same & (other < i[:, None])).to(gl.int32), axis=1)
    opens = (expert < E) & (rank == 0)
    opener = gl.convert_layout(gl.where(opens, expert, E), along)[None, :]
    tile = gl.sum((opener < expert[:, None]).to(gl.int32), axis=1)
    pair = i // SLOTS * TOP_K + i % SLOTS
    gl.store(rows + tile * COLUMNS + rank, pair, mask=expert < E)
    gl.store(experts + tile, expert, mask=opens)
    gl.store(sizes + tile, size, mask=opens)
    gl.store(count, gl.sum(opens.to(gl.int32), axis=0))


@gluon.jit(do_not_specialize=["T"])
def route_kernel(
    x, router_weight, router_bias, seen, logits, gates, experts, sizes, rows, count, arrived, T,
    H: gl.constexpr, E: gl.constexpr, TOP_K: gl.constexpr, PARTS: gl.constexpr, PDL: gl.constexpr,
):  # fmt: skip
    """Program (p, z): the logits of 16 experts over part z of H; the last p puts x into the order
    of `dispatch` instead. The last program to store its logits selects the experts and lists the
    tiles."""
    PART: gl.constexpr = ((H + 63) // 64 + PARTS - 1) // PARTS  # blocks
    SLOTS: gl.constexpr = triton.next_power_of_2(TOP_K)
    p, z = gl.program_id(0), gl.program_id(1)
    if PDL:
        order(START_NEXT)
    if p == (E + 15) // 16:
        if PDL:
            order(AWAIT_PREVIOUS)
        reorder(x, seen, T, z, H, PART)
        return
    acc = route_gemm(x, router_weight, T, p * 16, z, H, E, PART, PDL)
    summed: gl.constexpr = acc.type.layout
    e, token = p * 16 + iota(0, 16, summed, 2), iota(1, COLUMNS, summed, 2)
    gl.store(logits + (z * T + token) * E + e, acc, mask=(token < T) & (e < E))
    if arrive(arrived) < (E + 15) // 16 * PARTS - 1:
        return
    gl.store(arrived, 0)
    ids, gate = select_experts(logits, router_bias, T, E, TOP_K, PARTS)
    layout: gl.constexpr = ids.type.layout
    token, slot = iota(0, COLUMNS, layout, 2), iota(1, SLOTS, layout, 2)
    live = (token < T) & (slot < TOP_K)
    gl.store(gates + token * TOP_K + slot, gate, mask=live)
    expert = gl.where(live, ids, E).reshape(COLUMNS * SLOTS)
    list_tiles(expert, experts, sizes, rows, count, E, TOP_K)


# --------------------------------------------------------------------------------------------------
# Dense layers


@gluon.jit(do_not_specialize=["T"])
def linear_kernel(
    x, weight, bias, out, T, N: gl.constexpr, K: gl.constexpr, HAS_BIAS: gl.constexpr,
    PDL: gl.constexpr,
):  # fmt: skip
    """Program n: 16 rows of the weights times the tokens. The warps split K, and all weights are on
    their way while the kernel before makes x. x, weight: words of two bfloat16."""
    WARPS: gl.constexpr = LINEAR_WARPS
    product: gl.constexpr = product_layout(WARPS, 1)
    left: gl.constexpr = left_layout(WARPS)
    right: gl.constexpr = right_layout(WARPS, 1)
    BLOCKS: gl.constexpr = K // 64
    if PDL:
        order(START_NEXT)
    r = gl.program_id(0) * 16 + iota(1, 16, left, 4)
    weight = weight + (r.to(gl.int64) * (K // 2) + iota(2, 4, left, 4) * 8 + iota(3, 8, left, 4))
    ws, xs = (), ()
    for start in gl.static_range(0, BLOCKS, WARPS):
        block = start + iota(0, WARPS, left, 4)
        ws = ws + (gl.load(weight + block * 32, mask=(r < N) & (block < BLOCKS), other=0),)
    if PDL:
        order(AWAIT_PREVIOUS)
    token = iota(0, COLUMNS, right, 4)
    x = x + (token * (K // 2) + iota(2, 4, right, 4) * 8 + iota(3, 8, right, 4))
    for start in gl.static_range(0, BLOCKS, WARPS):
        block = start + iota(1, WARPS, right, 4)
        xs = xs + (gl.load(x + block * 32, mask=(token < T) & (block < BLOCKS), other=0),)
    acc = gl.full([WARPS, 16, COLUMNS], 0, gl.float32, product)
    for step in gl.static_range(len(ws)):
        a = left_operand(ws[step], gl.DotOperandLayout(0, product, 2))
        acc = mma_v2(a, right_operand(xs[step], gl.DotOperandLayout(1, product, 2)), acc)
    y = gl.sum(acc, axis=0)
    summed: gl.constexpr = y.type.layout
    r, token = gl.program_id(0) * 16 + iota(0, 16, summed, 2), iota(1, COLUMNS, summed, 2)
    if HAS_BIAS:
        y += gl.load(bias + r, mask=r < N, other=0.0).to(gl.float32)
    gl.store(out + token * N + r, y.to(gl.bfloat16), mask=(token < T) & (r < N))


def multiplies(x: Tensor, weight: Tensor) -> bool:
    """Whether `linear` takes these: bfloat16, 2 to 8 tokens, whole blocks of K."""
    few = 1 < len(x) <= MAX_TOKENS and weight.shape[1] % 64 == 0
    return few and x.dtype == weight.dtype == torch.bfloat16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N], see `multiplies` -> [T, N]. One launch; the weights may be
    read before earlier launches are done."""
    T, (N, K), pdl = len(x), weight.shape, is_supported(90)
    out = x.new_empty(T, N)
    linear_kernel[(triton.cdiv(N, 16),)](
        x.contiguous().view(torch.int32), weight.view(torch.int32), bias, out, T, N, K,
        bias is not None, pdl, num_warps=LINEAR_WARPS.value, launch_pdl=pdl,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------
# dispatch and combine


@gluon.jit
def swiglu(gate, up, limit):
    """gate sigmoid(1.702 gate) (up + 1), both clamped before; NaN stays NaN."""
    gate = gl.where(gate > limit, limit, gate)
    up = gl.where(up > limit, limit, gl.where(up < -limit, -limit, up))
    return gate / (1 + gl.exp(-1.702 * gate)) * (up + 1)


@gluon.jit(do_not_specialize=["steps"])
def dispatch_kernel(
    x, data, scale, bias, experts, sizes, rows, count, h, limit, steps, TOP_K: gl.constexpr,
    PDL: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """Program (n, tile): 16 NB WN rows of the first GEMM for the tile's pairs, and SwiGLU -> h
    bfloat16, rows of whole blocks in the order of `combine`."""
    NB: gl.constexpr = g.NB * g.WN
    n, tile = gl.program_id(0), gl.program_id(1)
    if PDL:
        order(AWAIT_PREVIOUS)
        order(START_NEXT)
    # all at once: beyond the last tile there is memory, but nothing in it
    tiles, expert, size = gl.load(count), gl.load(experts + tile), gl.load(sizes + tile)
    column = iota(0, COLUMNS, right_layout(g.WK, g.WN), 4)
    pair = gl.load(rows + tile * COLUMNS + column)
    order(STAY)
    if tile >= tiles:
        return
    r = n * (16 * NB) + iota(0, 16 * NB, gl.SliceLayout(0, product_layout(g.WK, g.WN)), 2)
    b = gl.load(bias + expert * g.N + r)
    live = column < size
    acc = expert_gemm(x, pair // TOP_K, live, data, scale, expert, n, steps, False, g) + b
    gate, up = gl.split(acc.reshape(NB, 2, 8, COLUMNS).permute(0, 2, 3, 1))  # [NB, 8, 8 pairs]
    y = swiglu(gate, up, limit).to(gl.bfloat16)
    layout: gl.constexpr = y.type.layout
    column = iota(2, COLUMNS, layout, 3)
    pair = gl.load(rows + tile * COLUMNS + column, mask=column < size, other=0)
    # value i of octet m: half i % 2 of the word 4 m + i // 2
    m, i = n * NB + iota(0, NB, layout, 3), iota(1, 8, layout, 3)
    at = m // 8 * 64 + (i // 2 * 8 + m % 8) * 2 + i % 2
    gl.store(h + pair * ((g.N // 2 + 63) // 64 * 64) + at, y, mask=column < size)


@gluon.jit(do_not_specialize=["T", "steps"])
def combine_kernel(
    h, data, scale, bias, gates, experts, sizes, rows, count, y, out, arrived, T, steps,
    TOP_K: gl.constexpr, PDL: gl.constexpr, g: gl.constexpr,
):  # fmt: skip
    """Program (n, tile): 16 NB WN rows of the second GEMM for the tile's pairs, times their gate
    weights -> y float32 [pairs, N]. The last program of these rows to arrive sums over each token's
    pairs -> out [T, N]."""
    summed: gl.constexpr = gl.SliceLayout(0, product_layout(g.WK, g.WN))
    BN: gl.constexpr = 16 * g.NB * g.WN
    n, tile = gl.program_id(0), gl.program_id(1)
    if PDL:
        order(START_NEXT)
    # past the L1 cache, which was not emptied since `route` wrote these
    tiles = gl.load(count, cache_modifier=".cg")
    expert = gl.load(experts + tile, cache_modifier=".cg")
    size = gl.load(sizes + tile, cache_modifier=".cg")
    column = iota(0, COLUMNS, right_layout(g.WK, g.WN), 4)
    row = gl.load(rows + tile * COLUMNS + column, cache_modifier=".cg")
    order(STAY)
    if tile >= tiles:
        return
    live, r = iota(1, COLUMNS, summed, 2) < size, n * BN + iota(0, BN, summed, 2)
    pair = rows + tile * COLUMNS + iota(1, COLUMNS, summed, 2)
    pair = gl.load(pair, mask=live, other=0, cache_modifier=".cg")
    gate, b = gl.load(gates + pair, cache_modifier=".cg"), gl.load(bias + expert * g.N + r)
    acc = expert_gemm(h, row, column < size, data, scale, expert, n, steps, PDL, g) + b
    gl.store(y + pair * g.N + r, acc * gate, mask=live)
    if arrive(arrived + 1 + n) == tiles - 1:
        gl.store(arrived + 1 + n, 0)
        sum_pairs(y, out, T, n, TOP_K, g)


@gluon.jit
def sum_pairs(y, out, T, n, TOP_K: gl.constexpr, g: gl.constexpr):
    """The sums over each token's pairs, in order, of y float32 [pairs, N] -> 16 NB WN columns of
    out [T, N]."""
    WARPS: gl.constexpr = g.WK * g.WN
    BN: gl.constexpr = 16 * g.NB * g.WN
    layout: gl.constexpr = gl.BlockedLayout([1, 1], [2, 16], [WARPS, 1], [1, 0])
    r = n * BN + iota(1, BN, layout, 2)
    for start in range(0, T, 2 * WARPS):
        token = start + iota(0, 2 * WARPS, layout, 2)
        total = gl.zeros([2 * WARPS, BN], gl.float32, layout)
        for slot in gl.static_range(TOP_K):
            total += gl.load(y + (token * TOP_K + slot) * g.N + r, mask=token < T, other=0.0)
        gl.store(out + token * g.N + r, total.to(gl.bfloat16), mask=token < T)


# --------------------------------------------------------------------------------------------------
# The layer


ROUTE_PARTS = 3  # of the router's K
WHOLE_ROWS = 4096  # of the first GEMM: with fewer an expert is a shard, or small


def cuts_for(T: int, *sizes: int) -> tuple[Cut, Cut]:
    """The cuts of dispatch and of combine for T tokens and these N: of the 120b's step, and of the
    layer on a rank's shard, the fastest on an H100 (docs/performance.md). Their WK does not depend
    on T."""
    if sizes[0] < WHOLE_ROWS or sizes[0] % 64:  # wide programs would be too few, or do not divide
        return Cut(1, 1, 4, 4, 2), Cut(1, 1, 4, 4, 2) if T == 1 else Cut(2, 1, 4, 3, 1)
    return Cut(1, 4, 2, 3, 1) if T == 1 else Cut(2, 1, 2, 3, 1), Cut(1, 1, 4, 4, 2)


def moe(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    packed: Packed,
    top_k: int,
    activations: str = "bf16",
    swiglu_limit: float = 7.0,
) -> Tensor:
    """x bfloat16 [T, H], T at most MAX_TOKENS; router_weight bfloat16 [E, H], router_bias [E] ->
    [T, H]. Three launches. A token's result does not depend on the other tokens. ValueError for
    experts that were prepared for other activations, for x of another dtype and for too many
    tokens."""
    if packed.activations != activations:
        raise ValueError(
            f"experts were prepared for {packed.activations!r} activations, not for {activations!r}"
        )
    if x.dtype != torch.bfloat16 or router_weight.dtype != torch.bfloat16:
        raise ValueError(f"x is {x.dtype}, the router {router_weight.dtype}: expected bfloat16")
    (T, H), E, x = x.shape, len(router_weight), x.contiguous()
    if T > MAX_TOKENS:
        raise ValueError(f"{T} tokens at once, the kernels take {MAX_TOKENS}")
    out = torch.empty_like(x)
    if not T:
        return out
    up, down, R = packed.gate_up, packed.down, T * top_k
    first, second = (
        Gemm(*astuple(cut), w.N, w.K, w.wide)
        for cut, w in zip(cuts_for(T, up.N, down.N), (up, down), strict=True)
    )
    tiles, pdl = min(R, E), is_supported(90)  # at most so many

    def new(*shape, dtype=torch.int32):
        return x.new_empty(shape, dtype=dtype)

    def launch(kernel, g, *arguments) -> None:
        steps = triton.cdiv(triton.cdiv(g.K, 64), g.WK)
        grid = g.N // (16 * g.NB * g.WN), tiles
        kernel[grid](*arguments, steps, top_k, pdl, g, num_warps=g.WK * g.WN, launch_pdl=pdl)

    # activations of the expert GEMMs, in words of two bfloat16 and whole blocks
    seen, h = new(T, triton.cdiv(H, 64) * 32), new(R, triton.cdiv(down.K, 64) * 32)
    experts, sizes, rows, count = new(tiles), new(tiles), new(tiles, COLUMNS.value), new(1)
    listed = experts, sizes, rows, count
    gates = new(R, dtype=torch.float32)
    logits, y = (new(*s, dtype=torch.float32) for s in ((ROUTE_PARTS, T, E), (R, H)))
    route_kernel[(triton.cdiv(E, 16) + 1, ROUTE_PARTS)](
        x.view(torch.int32), router_weight.contiguous().view(torch.int32), router_bias, seen,
        logits, gates, *listed, packed.arrived, T, H, E, top_k, ROUTE_PARTS, pdl,
        num_warps=ROUTE_WARPS.value, launch_pdl=pdl,
    )  # fmt: skip
    launch(
        dispatch_kernel, first, seen, up.data, up.scale, up.bias, *listed, h.view(torch.bfloat16),
        swiglu_limit,
    )  # fmt: skip
    launch(
        combine_kernel, second, h, down.data, down.scale, down.bias, gates, *listed, y, out,
        packed.arrived, T,
    )  # fmt: skip
    return out
