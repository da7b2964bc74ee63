"""Matrix instructions: v_mfma_* and v_mfma_scale_*.

Operand layout (MI300 ISA, "Matrix Arithmetic Instructions"; CDNA4 ISA for f8f6f4). For a D x D x K
instruction, lane = D * g + i holds row i of A (or column i of B), and of its K values those of
group g:

    16-bit, 32-bit, plain 8-bit:  k = per_lane * g + j
    f8f6f4, fp4 (16 bytes):       k = 32 g + j
    f8f6f4, 8-bit (32 bytes):     k = 16 g + j for the first 16 bytes, K/2 + 16 g + j for the others

    lane group g, 16x16x128:         0      1      2      3      0      1      2      3
    8-bit bytes               k: |0..15|16..31|32..47|48..63|64..79|80..95|96..111|112..127|
                                 '---- bytes 0..15 of each --''---- bytes 16..31 of each --'
    and for groups 0, 1, 2, 3:
    fp4 nibbles               k: |  0..31     |  32..63     |  64..95     |  96..127       |
    scale byte of lane (i, g) k: |  0..31     |  32..63     |  64..95     |  96..127       |

so the scale of lane (i, g) is for row i and logical block g, bytes of which lie in other lanes when
operands are 8-bit. D x D results: 16x16 register r of lane (col, g) is row 4 g + r; 32x32 it is row
8 (r // 4) + 4 g + r % 4.

Rounding model: products and sums in float64, the accumulator added last, one rounding to float32.
The hardware's own accumulation order is not documented; results may differ from it in the last
bits. `sums` has published rules for other machines, which may take its place."""

import re

import numpy as np

from .asm import Operand
from .decode import SMALL, Unsupported, reader
from .isa import E2M1, E4M3, E5M2, NUMPY, bf16_value, f16, f32, f64, i8, u8, u16, u32, u64
from .sums import LEAST_EXPONENT, RULES, Terms

NAME = re.compile(r"v_mfma_(scale_)?(f32|f64|i32)_(\d+)x\d+x(\d+)_(?:(\d+)b_)?(.+)")
SELECT = {
    0: E4M3,
    1: E5M2,
    4: E2M1,
}  # cbsz (A) and blgp (B) of f8f6f4; 2 and 3 are the 6-bit formats
# byte -> (low, high) nibble
FP4_PAIR = np.stack([np.tile(E2M1.table, 16), np.repeat(E2M1.table, 16)], axis=1)
FLOPS_PER_CYCLE = {
    "bf16": 1024,
    "f16": 1024,
    "i8": 2048,
    "f32": 64,
    "f64": 32,
    "fp4": 4096,
    "f8": 2048,
}


def lane_values(w, opd, fmt):
    """The K values a lane holds, in register order: float64 [n, 64, per_lane]."""
    raw = np.stack([w.v(opd.index + i) for i in range(opd.count)], axis=-1)  # [n, 64, registers]
    if fmt == "f64":
        return (raw[..., 0].astype(u64) | raw[..., 1].astype(u64) << u64(32)).view(f64)[..., None]
    if fmt == "f32":
        return raw.view(f32).astype(f64)
    if fmt == "bf16":
        return bf16_value(raw.view(u16)).astype(f64)
    if fmt == "f16":
        return raw.view(f16).astype(f64)
    if fmt == "i8":
        return raw.view(i8).astype(f64)
    if fmt is E2M1:
        return FP4_PAIR[raw.view(u8)].reshape(*raw.shape[:2], -1)  # [n, 64, 2 * bytes]
    return fmt.table[raw.view(u8)]


def logical(x, dim, halves):
    """[n, 64, per_lane] -> [n, dim, K] in logical K order (`halves`: 8-bit operands of f8f6f4)."""
    n, groups = len(x), 64 // dim
    if halves:
        x = x.reshape(n, groups, dim, 2, 16).transpose(0, 2, 3, 1, 4)  # n, row, half, g, j
    else:
        x = x.reshape(n, groups, dim, -1).transpose(0, 2, 1, 3)  # n, row, g, j
    return np.ascontiguousarray(x).reshape(n, dim, -1)


def scales(w, get, byte, dim):
    """E8M0 scales float64 [n, dim, K // 32]: byte `byte` of each lane; code 255 is NaN (OCP MX
    1.0)."""
    codes = (np.broadcast_to(get(w), (w.n, 64)) >> u32(8 * byte)).astype(u8)
    values = np.where(codes == 255, np.nan, np.ldexp(1.0, codes.astype(int) - 127))
    return values.reshape(w.n, 64 // dim, dim).transpose(0, 2, 1)


def formats(ins):
    kind = NAME.fullmatch(ins.op)[6]
    if kind == "f8f6f4":
        selects = ins.mods.get("cbsz", 0), ins.mods.get("blgp", 0)
        if not set(selects) <= set(SELECT):
            raise Unsupported("6-bit matrix operands")
        return SELECT[selects[0]], SELECT[selects[1]]
    if "_" in kind and not kind.endswith("_1k"):
        return tuple(SMALL[t] for t in kind.split("_"))
    return (kind.removesuffix("_1k"),) * 2


def cycles(ins):
    """Cycles of the matrix pipe at the dense peak rates; the slower operand decides."""
    m = NAME.fullmatch(ins.op)
    dim, k, blocks = int(m[3]), int(m[4]), int(m[5] or 1)
    fmts = formats(ins)
    rate = FLOPS_PER_CYCLE[
        "fp4" if fmts == (E2M1, E2M1) else fmts[0] if isinstance(fmts[0], str) else "f8"
    ]
    return max(16 if m[2] != "f64" else 32, 2 * dim * dim * k * blocks // rate)


def mfma(ins):
    m = NAME.fullmatch(ins.op)
    if not m or m[5] and (m[3], m[5]) != ("4", "16"):
        raise Unsupported("this matrix shape")
    scaled, out, dim = bool(m[1]), m[2], int(m[3])
    if m[6] != "f8f6f4" and (ins.mods.get("cbsz") or ins.mods.get("blgp") or ins.mods.get("abid")):
        raise Unsupported("operand broadcast of a matrix instruction")
    fmt_a, fmt_b = formats(ins)
    dst, a, b, c, *scale = ins.operands
    halves = [m[6] == "f8f6f4" and f is not E2M1 for f in (fmt_a, fmt_b)]
    if scaled:
        # LLVM (PR 158117): of a scalar or a constant the hardware takes other bits than a byte
        if any(s.kind != "v" for s in scale):
            raise Unsupported("scales outside vector registers")
        lo, hi = ins.mods.get("op_sel", [0, 0]), ins.mods.get("op_sel_hi", [0, 0])
        get_scale = [reader(s, "u32") for s in scale]
        byte = [lo[i] + 2 * hi[i] for i in (0, 1)]
    regs, wide = 4 if dim != 32 else 16, 2 if out == "f64" else 1
    dtype, add_in = NUMPY[out], np.int64 if out == "i32" else f64
    constant = c.kind != "v"
    get_c = (
        reader(c, out)
        if constant
        else [reader(Operand("v", c.index + wide * r, wide), out) for r in range(regs)]
    )

    def operand(w, opd, fmt, i):
        values = logical(lane_values(w, opd, fmt), dim, halves[i])
        return Terms(values, scales(w, get_scale[i], byte[i], dim) if scaled else None, fmt)

    # The registers of a result or of C [regs, n, 64], in the order of rows and columns
    split, to_registers, shape = {
        (16, 1): ((4, 4, 16), (2, 0, 1, 3), (4, 4, 16)),  # row = 4 g + r
        (16, 2): ((4, 4, 16), (1, 0, 2, 3), (4, 4, 16)),  # float64: row = 4 r + g
        (32, 1): ((4, 2, 4, 32), (1, 3, 0, 2, 4), (4, 4, 2, 32)),  # row = 8 q + 4 g + r
        (4, 1): (None, None, None),
    }[dim, wide]

    def in_registers(d):  # [n, row, column]
        return d.reshape(len(d), *split).transpose(to_registers).reshape(regs, len(d), 64)

    def in_rows(registers):
        n = registers.shape[1]
        apart = registers.reshape(*shape[:-2], n, *shape[-2:])
        return apart.transpose(np.argsort(to_registers)).reshape(n, dim, dim)

    def by_rule(w, rule):
        """The result's registers where another rule than the exact sum is asked for."""
        c = get_c(w) if constant else np.stack([get(w) for get in get_c])
        c = in_rows(np.broadcast_to(c, (regs, w.n, 64)))
        d = RULES[rule](operand(w, a, fmt_a, 0), operand(w, b, fmt_b, 1), c.astype(f32))
        return list(np.ascontiguousarray(in_registers(d)))

    ruled = out == "f32" and dim != 4 and fmt_a in LEAST_EXPONENT

    def run(w):
        if ruled and w.m.sums != "exact":
            return put(w, by_rule(w, w.m.sums))
        if dim == 4:  # 16 independent blocks: lane = 4 block + i
            x, y = (
                lane_values(w, o, f).reshape(w.n, 16, 4, -1) for o, f in ((a, fmt_a), (b, fmt_b))
            )
            # row, n, lane
            d = np.matmul(x, y.swapaxes(-1, -2)).transpose(2, 0, 1, 3).reshape(4, w.n, 64)
        else:
            # n, row, col
            x, y = operand(w, a, fmt_a, 0).scaled(), operand(w, b, fmt_b, 1).scaled()
            d = in_registers(np.matmul(x, y.swapaxes(1, 2)))
        acc = get_c(w) if constant else [get(w) for get in get_c]
        results = [
            (d[r].astype(add_in) + (acc if constant else acc[r])).astype(dtype) for r in range(regs)
        ]
        put(w, results)

    def put(w, results):
        # C is read before any of D is written: they may overlap
        for r, value in enumerate(results):
            bits = value.view(u64 if wide == 2 else u32)
            for half in range(wide):
                w.set_v(
                    dst.index + wide * r + half,
                    (bits >> bits.dtype.type(32 * half)).astype(u32),
                    None,
                )

    return run
