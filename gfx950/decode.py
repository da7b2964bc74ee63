"""From a parsed instruction to a Python function of a wave group: operand access, modifiers and the
lane operations.

`w` everywhere is a `machine.Group`: n waves at one program counter. `w.v(r)` is vector register r
as uint32 [n, 64], `w.s(r)` scalar register r as uint32 [n, 1]; arithmetic broadcasts the second
against the first."""

import re

import numpy as np

from .asm import EXEC, VCC, Operand
from .isa import (
    ALU,
    E2M1,
    E4M3,
    E5M2,
    NUMPY,
    PACKED,
    TO_F16,
    bf16_bits,
    bf16_value,
    bitop3,
    f16,
    f32,
    f64,
    fma32,
    i8,
    i16,
    i64,
    pack16,
    popcount,
    u8,
    u16,
    u32,
    u64,
)

LANES = np.arange(64)
SIZE = {"b1": 64} | {name: t(0).itemsize * 8 for name, t in NUMPY.items()}
# how the inline constant 1 / (2 pi) is printed, f32 and f64
HALF_TURN = (0.15915494, 0.15915494309189532)


class Unsupported(Exception):
    """An opcode or modifier the emulator does not know."""


# ----------------------------------------------------------------------------------------------
# operands


def pack_mask(lanes):
    """bool [n, 64] -> uint32 [n, 2], lane 0 in the low bit."""
    return np.packbits(lanes, axis=1, bitorder="little").view(u32)


def unpack_mask(lo, hi):
    """two uint32 [n, 1] -> bool [n, 64]."""
    return np.unpackbits(np.concatenate([lo, hi], axis=1).view(u8), axis=1, bitorder="little").view(
        bool
    )


def constant_bits(opd, typename):
    """Bits of an inline constant or literal for an operand of this type (MI300 ISA, "Scalar and
    vector operands")."""
    size = SIZE[typename]
    if opd.kind == "float":
        # by operand width, also where the type is an integer's
        ftype = {16: f16, 32: f32, 64: f64}[size]
        exact = 0.5 / np.pi if opd.value in HALF_TURN else opd.value
        bits = int(ftype(exact).view({f16: u16, f32: u32, f64: u64}[ftype]))
    elif opd.kind == "hex" and typename == "f64":
        bits = opd.value << 32  # a 32-bit literal is the high half of a double
    elif opd.kind == "hex" and typename == "i64":
        bits = opd.value - (opd.value >> 31 << 32)
    else:
        bits = opd.value
    return bits & ((1 << size) - 1)


def read_mask(index):
    return lambda w: unpack_mask(w.s(index), w.s(index + 1))


def write_mask(index):
    """Lanes off in EXEC get 0."""

    def put(w, value, mask):
        value = np.broadcast_to(value, (w.n, 64))
        pair = pack_mask(value if mask is None else value & mask)
        w.set_s(index, pair[:, :1])
        w.set_s(index + 1, pair[:, 1:])

    return put


IMPLICIT = {
    "scc": (lambda w: w.scc(), lambda w, value, mask: w.set_scc(value)),
    "vcc": (read_mask(VCC), None),
    "exec": (None, write_mask(EXEC)),
    "exec64": (lambda w: w.s64(EXEC), lambda w, value, mask: w.set_s64(EXEC, value)),
}  # type -> (read, write)


def reader(opd, typename, half=0, select=None):
    """Function w -> array of this type. `half`: which 16 bits (op_sel); `select`: an SDWA byte or
    word."""
    dtype, size = NUMPY.get(typename), SIZE[typename]
    if typename == "b1":
        return read_mask(opd.index)
    if opd.kind == "name":
        raise Unsupported(f"operand {opd.value}")
    if opd.kind in ("int", "hex", "float"):
        const = np.array(constant_bits(opd, typename), {16: u16, 32: u32, 64: u64}[size])[()]
        raw = lambda w: const  # noqa: E731
    else:
        fetch, r = ("v" if opd.kind == "v" else "s"), opd.index
        if size == 64:

            def raw(w):
                get = getattr(w, fetch)
                return get(r).astype(u64) | get(r + 1).astype(u64) << u64(32)
        else:
            raw = (lambda w: w.v(r)) if fetch == "v" else (lambda w: w.s(r))
        if select and select != "DWORD":
            raw = sdwa_select(raw, select, opd.sext)
        if size == 16:
            shift = u32(16 * half)
            raw = lambda w, raw=raw: (raw(w) >> shift).astype(u16)  # noqa: E731
    sign = {16: u16(1 << 15), 32: u32(1 << 31), 64: u64(1 << 63)}[size]
    if opd.abs:
        raw = lambda w, raw=raw: raw(w) & ~sign  # noqa: E731
    if opd.neg:
        raw = lambda w, raw=raw: raw(w) ^ sign  # noqa: E731
    if typename.startswith("u"):
        return raw
    return lambda w: raw(w).view(dtype)


def sdwa_select(raw, select, signed):
    shift = u32(int(select[-1]) * (8 if select.startswith("BYTE") else 16))
    t = (i8 if signed else u8) if select.startswith("BYTE") else (i16 if signed else u16)
    return lambda w: (raw(w) >> shift).astype(t).astype(u32)


def writer(opd, typename, mods, half=None):
    """Function (w, value, mask) storing value where mask (None: everywhere) allows. `half`: keep
    the other 16 bits."""
    if typename == "b1":
        return write_mask(opd.index)
    dtype, size, r, vector = NUMPY[typename], SIZE[typename], opd.index, opd.kind == "v"
    unsigned = {16: u16, 32: u32, 64: u64}[size]
    finish = output_modifier(typename, mods)
    put = (
        (lambda w, i, bits, mask: w.set_v(i, bits, mask))
        if vector
        else (lambda w, i, bits, mask: w.set_s(i, bits))
    )
    sel, unused = mods.get("dst_sel", "DWORD"), mods.get("dst_unused", "UNUSED_PAD")

    def put_value(w, value, mask):
        bits = finish(np.asarray(value).astype(dtype, copy=False)).view(unsigned)
        if size == 64:
            put(w, r, bits.astype(u32), mask)
            put(w, r + 1, (bits >> u64(32)).astype(u32), mask)
            return
        if size == 16:
            bits = bits.astype(u32)
            if half is not None:
                bits = (w.v(r) & u32(0xFFFF << (16 - 16 * half))) | bits << u32(16 * half)
        if sel != "DWORD":
            shift, field = (
                (8 * int(sel[-1]), 0xFF) if sel.startswith("BYTE") else (16 * int(sel[-1]), 0xFFFF)
            )
            bits = (bits & u32(field)) << u32(shift)
            if unused == "UNUSED_PRESERVE":
                bits = bits | w.v(r) & u32(~(field << shift) & 0xFFFFFFFF)
            elif unused != "UNUSED_PAD":
                raise Unsupported(unused)
        put(w, r, bits, mask)

    return put_value


def output_modifier(typename, mods):
    clamp, mul, div = mods.get("clamp"), mods.get("mul"), mods.get("div")
    if not (clamp or mul or div) or typename[0] != "f":
        return lambda x: x
    factor = NUMPY[typename](mul or 1 / (div or 1))

    def finish(x):
        x = x * factor
        return np.clip(np.nan_to_num(x, nan=0.0), 0, 1).astype(x.dtype) if clamp else x

    return finish


# ---------------------------------------------------------------------------------------------- DPP


def dpp_source(mods):
    """Source lane and validity of every lane under the DPP control (MI300 ISA, "DPP_CTRL")."""
    row, src, valid = LANES & ~15, LANES.copy(), np.ones(64, bool)
    if "quad_perm" in mods:
        src = (LANES & ~3) + np.array(mods["quad_perm"])[LANES & 3]
    elif "row_shl" in mods:
        src = LANES + mods["row_shl"]
        valid = (src & ~15) == row
    elif "row_shr" in mods:
        src = LANES - mods["row_shr"]
        valid = (src & ~15) == row
    elif "row_ror" in mods:
        src = row + ((LANES - mods["row_ror"]) & 15)
    elif "row_mirror" in mods:
        src = row + (15 - (LANES & 15))
    elif "row_half_mirror" in mods:
        src = LANES ^ 7
    elif "row_newbcast" in mods:
        src = row + mods["row_newbcast"]
    elif "row_bcast" in mods:
        width = mods["row_bcast"] + 1  # 16: last lane of the row before; 32: lane 31
        src = (LANES & ~(width - 1)) - 1
        valid = src >= 0
    elif "wave_shr" in mods or "wave_shl" in mods:
        src = LANES + (-1 if "wave_shr" in mods else 1)
        valid = (src >= 0) & (src < 64)
    elif "wave_ror" in mods or "wave_rol" in mods:
        src = (LANES + (-1 if "wave_ror" in mods else 1)) & 63
    else:
        raise Unsupported("DPP control")
    return np.where(valid, src, 0), valid


def with_dpp(read, mods):
    """Returns (reader of the permuted operand, function w -> lanes that may be written)."""
    src, valid = dpp_source(mods)
    rows, banks = mods.get("row_mask", 15), mods.get("bank_mask", 15)
    enabled = ((rows >> (LANES >> 4)) & (banks >> ((LANES & 15) >> 2)) & 1).astype(bool)
    zero = bool(mods.get("bound_ctrl"))

    def usable(w):  # a lane switched off by EXEC is no valid source
        return valid if w.mask is None else valid & w.mask[:, src]

    def permuted(w):
        x = np.broadcast_to(read(w), (w.n, 64))[:, src]
        return np.where(usable(w), x, x.dtype.type(0))

    def writable(w):
        lanes = enabled if zero else enabled & usable(w)
        return np.broadcast_to(lanes, (w.n, 64)) if w.mask is None else w.mask & lanes

    return permuted, writable


# ----------------------------------------------------------------------------------------------
# plain arithmetic

PRESERVE_HIGH = {
    "v_mad_u16",
    "v_mad_i16",
    "v_fma_f16",
    "v_fmac_f16",
    "v_div_fixup_f16",
    "v_max3_f16",
    "v_min3_f16",
    "v_med3_f16",
    "v_med3_i16",
    "v_med3_u16",
    "v_ashr_pk_i8_i32",
    "v_ashr_pk_u8_i32",
}
# The other 16-bit results clear bits 31:16 on gfx9 (LLVM, GCNSubtarget::zeroesHigh16BitsOfDest).


def saturating(fn, typename):
    """Integer add or subtract with the clamp bit: computed wide, then cut to the type's range."""
    info = np.iinfo(NUMPY[typename])
    return lambda *args: np.clip(fn(*[a.astype(i64) for a in args]), info.min, info.max).astype(
        info.dtype
    )


def arithmetic(ins):
    """The table-driven instructions: read the sources, apply the function, write the
    destinations."""
    dst_types, src_types, fn = ALU[ins.op]
    if ins.mods.get("clamp") and dst_types[0][0] != "f":
        if not re.fullmatch(r"v_(add|sub|subrev)_[ui](16|32)", ins.op):
            raise Unsupported("clamp of this integer result")
        fn = saturating(fn, dst_types[0])
    operands, mods, vector = list(ins.operands), ins.mods, ins.op.startswith("v_")
    # a 16-bit constant, printed unsigned, sign-extended
    if re.fullmatch(r"s_(mov|add|mul|cmp)k_\w*i32", ins.op):
        operands[-1] = Operand("int", value=(operands[-1].value & 0xFFFF ^ 0x8000) - 0x8000)
    op_sel = mods.get("op_sel", [0] * 4)
    puts, dst = [], None
    for t in dst_types:
        if t in IMPLICIT:
            puts.append(IMPLICIT[t][1])
            continue
        dst, half = operands.pop(0), None
        if SIZE[t] == 16 and dst.kind == "v":
            has_dst_bit = len(op_sel) > len(src_types)
            if ins.op in PRESERVE_HIGH or has_dst_bit and op_sel[-1]:
                half = op_sel[-1] if has_dst_bit else 0
        puts.append(writer(dst, t, mods, half))
    gets, lanes = [], None
    for i, t in enumerate(src_types):
        if t in IMPLICIT:
            get = IMPLICIT[t][0]
        elif t[0] == "+":
            get = reader(dst, t[1:]) if dst else reader(operands.pop(0), t[1:])
        else:
            half = op_sel[i] if i < len(op_sel) else 0
            if half and SIZE[t] != 16:
                raise Unsupported("op_sel of a wide operand")
            get = reader(operands.pop(0), t, half, mods.get(f"src{i}_sel"))
        if i == 0 and ins.encoding in ("dpp", "e64_dpp"):
            get, lanes = with_dpp(get, mods)
        gets.append(get)
    if operands:
        raise Unsupported("operand count")
    if ins.op in TO_F16:
        (put,), to_f16 = puts, TO_F16[ins.op]
        return lambda w: put(
            w, to_f16(w.mode() >> 2 & 3, *[g(w) for g in gets]), lanes(w) if lanes else w.mask
        )
    if len(puts) == 1:
        (put,) = puts
        if vector:
            return lambda w: put(w, fn(*[g(w) for g in gets]), lanes(w) if lanes else w.mask)
        return lambda w: put(w, fn(*[g(w) for g in gets]), None)

    def several(w):
        mask = (lanes(w) if lanes else w.mask) if vector else None
        for put, value in zip(puts, fn(*[g(w) for g in gets]), strict=True):
            put(w, value, mask)

    return several


# ----------------------------------------------------------------------------------------------
# packed arithmetic


def packed(ins):
    """v_pk_*: op_sel / op_sel_hi choose the half each operand gives to the low / high result;
    neg_lo, neg_hi."""
    typename, count, fn = PACKED[ins.op[5:]]
    dst, *srcs = ins.operands
    mods, wide = ins.mods, typename == "f32"
    lo, hi = mods.get("op_sel", [0] * count), mods.get("op_sel_hi", [1] * count)
    nlo, nhi = mods.get("neg_lo", [0] * count), mods.get("neg_hi", [0] * count)

    def half(opd, which, negate):
        if opd.kind in "vs" and wide:
            opd, which = Operand(opd.kind, opd.index + which), 0
        elif opd.kind == "hex" and not wide:  # a 32-bit literal holds both halves
            opd = Operand("hex", value=opd.value >> (16 * which) & 0xFFFF)
        elif opd.kind not in "vs" and not wide and which:
            opd = Operand("int", value=0)  # inline constants fill the low half only
        get = reader(opd, typename, which)
        return (lambda w: -get(w)) if negate else get

    low = [half(o, lo[i], nlo[i]) for i, o in enumerate(srcs)]
    high = [half(o, hi[i], nhi[i]) for i, o in enumerate(srcs)]
    finish = output_modifier(typename, mods)

    def run(w):
        a, b = finish(fn(*[g(w) for g in low])), finish(fn(*[g(w) for g in high]))
        if wide:
            w.set_v(dst.index, a.view(u32), w.mask)
            w.set_v(dst.index + 1, b.view(u32), w.mask)
        else:
            w.set_v(dst.index, pack16(a.view(u16), b.view(u16)), w.mask)

    return run


def pk_mov(ins):
    dst, a, b = ins.operands
    sel = ins.mods.get("op_sel", [0, 0])

    def word(opd, which):
        return reader(Operand(opd.kind, opd.index + which) if opd.kind in "vs" else opd, "u32")

    low, high = word(a, sel[0]), word(b, sel[1])

    def run(w):
        x, y = low(w), np.array(high(w))
        w.set_v(dst.index, x, w.mask)
        w.set_v(dst.index + 1, y, w.mask)

    return run


def fma_mix(ins):
    """v_fma_mix_f32 / mixlo / mixhi: per operand op_sel_hi says f16 (and op_sel which half) instead
    of f32."""
    dst, *srcs = ins.operands
    sel, is16 = ins.mods.get("op_sel", [0] * 3), ins.mods.get("op_sel_hi", [0] * 3)
    raw = [reader(o, "f16" if is16[i] else "f32", sel[i]) for i, o in enumerate(srcs)]
    out = {
        "v_fma_mix_f32": ("f32", None),
        "v_fma_mixlo_f16": ("f16", 0),
        "v_fma_mixhi_f16": ("f16", 1),
    }[ins.op]
    put = writer(dst, out[0], ins.mods, out[1])
    return lambda w: put(w, fma32(*[np.asarray(g(w)).astype(f32) for g in raw]), w.mask)


# ----------------------------------------------------------------------------------------------
# lanes


def readfirstlane(ins):
    dst, src = ins.operands
    get = reader(src, "u32")

    def run(w):
        x = np.broadcast_to(get(w), (w.n, 64))
        lane = np.zeros(w.n, int) if w.mask is None else w.mask.argmax(1)  # no lane active: lane 0
        w.set_s(dst.index, x[np.arange(w.n), lane][:, None])

    return run


def readlane(ins):
    dst, src, lane = ins.operands
    get, which = reader(src, "u32"), reader(lane, "u32")

    def run(w):
        lanes = np.broadcast_to(which(w), (w.n, 1))[:, 0] & 63
        w.set_s(dst.index, np.broadcast_to(get(w), (w.n, 64))[np.arange(w.n), lanes][:, None])

    return run


def writelane(ins):
    dst, src, lane = ins.operands
    get, which = reader(src, "u32"), reader(lane, "u32")
    return lambda w: w.set_v(dst.index, get(w), LANES == np.broadcast_to(which(w), (w.n, 1)) & 63)


def permlane_swap(ins):
    """v_permlane{16,32}_swap_b32: odd rows of the first register trade places with even rows of the
    second."""
    a, b = ins.operands
    width = 16 if "16" in ins.op else 32
    odd = (LANES & width) != 0

    def run(w):
        x, y = w.v(a.index).copy(), w.v(b.index).copy()
        w.set_v(a.index, np.where(odd, y[:, LANES ^ width], x), w.mask)
        w.set_v(b.index, np.where(odd, y, x[:, LANES ^ width]), w.mask)

    return run


def swap(ins):
    a, b = ins.operands

    def run(w):
        x, y = w.v(a.index).copy(), w.v(b.index).copy()
        w.set_v(a.index, y, w.mask)
        w.set_v(b.index, x, w.mask)

    return run


def mbcnt(ins):
    """Adds the number of set mask bits below this lane (low or high 32 lanes of the mask)."""
    dst, mask, base = ins.operands
    get, add = reader(mask, "u32"), reader(base, "u32")
    below = np.array(
        [((1 << i) - 1 >> (32 if "hi" in ins.op else 0)) & 0xFFFFFFFF for i in range(64)], u32
    )
    return lambda w: w.set_v(
        dst.index, popcount(np.broadcast_to(get(w) & below, (w.n, 64))) + add(w), w.mask
    )


# ----------------------------------------------------------------------------------------------
# small floats

SMALL = {"fp8": E4M3, "bf8": E5M2, "fp4": E2M1}
WIDE = {
    "f32": lambda b: b.view(f32),
    "f16": lambda b: b.astype(u16).view(f16),
    "bf16": lambda b: bf16_value(b.astype(u16)),
}
TO_BITS = {"f16": lambda x: x.astype(f16).view(u16), "bf16": lambda x: bf16_bits(x.astype(f32))}
# Whose results the rounding mode of f16 and f64 may change: all that make one, but for the widening
# conversions, minima, maxima and moves. Matrix instructions always round to nearest.
ROUNDS_F16 = re.compile(
    r"v_(?!cvt_f64|cvt_f32_f16|cvt_(pk_|pkrtz_)?f16_f32|(pk_)?(max|min)|med3|cmp|pack|mfma).*_f(16|64)"
)
FP16_OVFL = 1 << 23  # MODE bit 23: conversions saturate instead of overflowing


def widen(ins):
    """v_cvt[_scalef32][_pk]_{f32,f16,bf16}_{fp8,bf8,fp4}: op_sel (or SDWA) picks the source byte or
    word; the scale operand is a float32 of which only the exponent counts (CDNA4 ISA, "Conversion
    with scale")."""
    parts = ins.op.split("_")
    scaled, pair, wide, fmt = "scalef32" in parts, "pk" in parts, parts[-2], SMALL[parts[-1]]
    dst, src, *scale = ins.operands
    sel = (ins.mods.get("op_sel", [0, 0]) + [0, 0])[:2]
    get = reader(src, "u32", select=ins.mods.get("src0_sel"))
    get_scale = reader(scale[0], "u32") if scaled else None
    step = 4 if fmt is E2M1 else 8
    shift = 16 * sel[0] if pair and step == 8 else 8 * (sel[0] + 2 * sel[1])

    def run(w):
        bits = get(w) >> u32(shift)
        x = [
            fmt.table[bits >> u32(i * step) & u32((1 << step) - 1)] for i in range(2 if pair else 1)
        ]
        if scaled:
            x = [np.ldexp(v, (get_scale(w) >> u32(23) & u32(0xFF)).astype(int) - 127) for v in x]
        if wide == "f32":
            for i, v in enumerate(x):
                w.set_v(dst.index + i, v.astype(f32).view(u32), w.mask)
        elif pair:
            w.set_v(dst.index, pack16(*map(TO_BITS[wide], x)), w.mask)
        else:
            w.set_v(dst.index, TO_BITS[wide](x[0]).astype(u32), w.mask)

    return run


def narrow(ins):
    """v_cvt[_scalef32]_pk_{fp8,bf8,fp4}_{f32,f16,bf16}: round to nearest even into the half (or,
    for fp4, the byte) that op_sel names; the rest of the register stays. With a scale the input is
    divided by 2^exponent(scale)."""
    parts = ins.op.split("_")
    scaled, fmt, wide = "scalef32" in parts, SMALL[parts[-2]], parts[-1]
    dst, *srcs = ins.operands
    scale = srcs.pop() if scaled else None
    sel = ins.mods.get("op_sel", [0, 0, 0, 0])
    width = 8 if fmt is E2M1 else 16
    if fmt is E2M1:
        shift = 8 * (sel[2] + 2 * sel[3])
    else:
        shift = 16 * sel[-1] if len(sel) > len(srcs) else 0
    if wide == "f32":
        gets = [reader(o, "f32") for o in srcs]
    else:
        words = reader(srcs[0], "u32")
        gets = [lambda w, s=s: WIDE[wide](words(w) >> u32(s)) for s in (0, 16)]
    get_scale = reader(scale, "u32") if scaled else None

    def run(w):
        x = [np.broadcast_to(np.asarray(g(w), f64), (w.n, 64)) for g in gets]
        if scaled:
            x = [np.ldexp(v, 127 - (get_scale(w) >> u32(23) & u32(0xFF)).astype(int)) for v in x]
        lo, hi = (fmt.encode(v, bool(w.mode() & FP16_OVFL)).astype(u32) for v in x)
        keep = w.v(dst.index) & u32(~(((1 << width) - 1) << shift) & 0xFFFFFFFF)
        w.set_v(dst.index, keep | (lo | hi << u32(width // 2)) << u32(shift), w.mask)

    return run


# ----------------------------------------------------------------------------------------------
# scalar control


def set_mode(ins):
    """s_setreg_imm32_b32 hwreg(HW_REG_MODE, offset, size). Bits 2 and 3 are the rounding of f16 and
    f64, which conversions to f16 obey; float32's rounding and denormals must keep their IEEE
    values."""
    reg, value = ins.operands
    name, offset, size = ([x.strip() for x in reg.value[6:-1].split(",")] + ["0", "32"])[:3]
    if name != "HW_REG_MODE":
        raise Unsupported("this hardware register")
    offset, size = int(offset), int(size)
    denormals = offset == 4 and size == 2 and value.value == 3
    if offset < 23 and not denormals and (offset, size) != (2, 2):
        raise Unsupported("s_setreg of float32's rounding or of the denormal mode")
    if denormals:
        return lambda w: None
    kept, new = ~(((1 << size) - 1) << offset), value.value << offset

    def run(w):
        w.m.mode[w.g] = w.m.mode[w.g] & kept | new

    return run


def nearest_only(run):
    """An instruction that would obey another rounding mode, which it does not here."""

    def checked(w):
        if w.mode() >> 2 & 3:
            raise Unsupported("this instruction in another rounding mode of f16 and f64")
        run(w)

    return checked


def bitop(ins):
    dst, *srcs = ins.operands
    typename = "u32" if ins.op.endswith("b32") else "u16"
    gets, fn = [reader(o, typename) for o in srcs], bitop3(ins.mods.get("bitop3", 0))
    put = writer(dst, typename, ins.mods)
    return lambda w: put(w, fn(*[g(w) for g in gets]), w.mask)


def nop(ins):
    return lambda w: None


LANE_OPS = {
    "v_readfirstlane_b32": readfirstlane,
    "v_readlane_b32": readlane,
    "v_writelane_b32": writelane,
    "v_permlane16_swap_b32": permlane_swap,
    "v_permlane32_swap_b32": permlane_swap,
    "v_swap_b32": swap,
    "v_mbcnt_lo_u32_b32": mbcnt,
    "v_mbcnt_hi_u32_b32": mbcnt,
    "v_bitop3_b32": bitop,
    "v_bitop3_b16": bitop,
    "v_pk_mov_b32": pk_mov,
    "v_fma_mix_f32": fma_mix,
    "v_fma_mixlo_f16": fma_mix,
    "v_fma_mixhi_f16": fma_mix,
    "s_setreg_imm32_b32": set_mode,
}
LANE_OPS |= {f"v_pk_{name}": packed for name in PACKED}
LANE_OPS |= {
    op: nop for op in ("s_nop", "s_setprio", "s_sleep", "v_nop", "buffer_inv", "buffer_wbl2")
}
for _w in WIDE:
    for _s in SMALL:
        LANE_OPS |= {
            f"v_cvt_scalef32_pk_{_s}_{_w}": narrow,
            f"v_cvt_scalef32_pk_{_w}_{_s}": widen,
            f"v_cvt_scalef32_{_w}_{_s}": widen,
        }
for _s in ("fp8", "bf8"):
    LANE_OPS |= {
        f"v_cvt_pk_{_s}_f32": narrow,
        f"v_cvt_pk_f32_{_s}": widen,
        f"v_cvt_f32_{_s}": widen,
    }
