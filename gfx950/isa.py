"""Scalar and vector arithmetic of gfx950 as one table: mnemonic -> (destination types, source
types, function).

A function gets numpy arrays of its source types, lanes last, and returns the destination (a tuple
for several). Types: u16 i16 f16 u32 i32 f32 u64 i64 f64 as numpy has them; `b1` a lane mask held in
a scalar register pair; `vcc` the same, implicit; `scc` the scalar condition bit, implicit; `+t` the
destination register read as type t. Semantics: "AMD Instinct MI300 ISA" (CDNA3) chapters 12.1 to
12.12 and "CDNA4 ISA" for what gfx950 adds. Where the hardware is only accurate to 1 ULP (rcp, rsq,
exp, log, sin, cos) the table rounds correctly, and like it flushes float32 denormals."""

import numpy as np

f16, f32, f64 = np.float16, np.float32, np.float64
u8, u16, u32, u64 = np.uint8, np.uint16, np.uint32, np.uint64
i8, i16, i32, i64 = np.int8, np.int16, np.int32, np.int64
NUMPY = {
    t.__name__.replace("uint", "u").replace("int", "i").replace("float", "f"): t
    for t in (f16, f32, f64, u8, u16, u32, u64, i8, i16, i32, i64)
}

# ----------------------------------------------------------------------------------------------
# number formats


class Format:
    """A small float: `ebits` exponent and `mbits` mantissa bits. `inf`: whether the top exponent
    holds infinities and NaNs as in IEEE (e5m2), or only the all-ones code is NaN (e4m3), or every
    code is finite (e2m1): OCP MX 1.0."""

    def __init__(self, ebits, mbits, bias, top):
        self.mbits, self.bias, self.top, self.sign = mbits, bias, top, 1 << (ebits + mbits)
        codes = np.arange(2 * self.sign)
        e, m = (codes >> mbits) & ((1 << ebits) - 1), codes & ((1 << mbits) - 1)
        value = np.where(
            e > 0, np.ldexp(1.0 + m / 2**mbits, e - bias), np.ldexp(m / 2**mbits, 1 - bias)
        )
        magnitude = codes & (self.sign - 1)
        if top == "ieee":
            value[e == (1 << ebits) - 1] = np.nan
            value[magnitude == ((1 << ebits) - 1) << mbits] = np.inf
        elif top == "nan":
            value[magnitude == self.sign - 1] = np.nan
        self.table = np.where(codes & self.sign, -value, value)  # code -> float64
        self.max = value[np.isfinite(value)].max()
        self.nan = self.sign - 1

    def encode(self, x, saturate):
        """Rounds float64 to nearest even. Overflow: the largest finite value if `saturate`, else
        infinity or NaN."""
        a = np.abs(np.where(np.isfinite(x), x, 0.0))
        e = np.where(a > 0, np.maximum(np.frexp(a)[1] - 1, 1 - self.bias), 1 - self.bias)
        q = np.rint(np.ldexp(a, self.mbits - e))  # integer mantissa; 2^(mbits+1) carries over
        code = (q + ((e + self.bias - 1).astype(f64) * 2**self.mbits)).astype(i64)
        top = int(np.flatnonzero(self.table[: self.sign] == self.max)[0])
        over = (code > top) | np.isinf(x)
        # e4m3: NaN follows 448; e5m2: infinity does
        full = top if saturate or self.top == "finite" else top + 1
        code = np.where(over, full, code)
        code = np.where(np.isnan(x), top if self.top == "finite" else self.nan, code)
        return (code + np.where(np.signbit(x), self.sign, 0)).astype(u8)


E4M3, E5M2, E2M1 = Format(4, 3, 7, "nan"), Format(5, 2, 15, "ieee"), Format(2, 1, 1, "finite")


def bf16_bits(x):
    """float32 -> bfloat16 bits, nearest even; a NaN stays a NaN (quiet bit set)."""
    b = np.ascontiguousarray(x, f32).view(u32)
    r = (b + u32(0x7FFF) + ((b >> u32(16)) & u32(1))) >> u32(16)
    return np.where(np.isnan(x), (b >> u32(16)) | u32(0x40), r).astype(u16)


def to_f16(how, x):
    """float32 -> f16; how: 0 to nearest even, 1 up, 2 down, 3 towards zero (the ISA's MODE)."""
    near = quiet(x.astype(f16))
    wide, zero = near.astype(f32), f16(0)
    up, down = np.nextafter(near, f16(np.inf)), np.nextafter(near, f16(-np.inf))
    if how == 1:
        return np.where(wide < x, up, near)
    if how == 2:
        return np.where(wide > x, down, near)
    if how == 3:
        return np.where(np.abs(wide) > np.abs(x), np.nextafter(near, zero), near)
    return near


# by mnemonic, with the rounding mode first
TO_F16 = {
    "v_cvt_f16_f32": to_f16,
    "v_cvt_pk_f16_f32": lambda how, a, b: pack16(
        to_f16(how, a).view(u16), to_f16(how, b).view(u16)
    ),
}


def bf16_value(bits):
    return (bits.astype(u32) << u32(16)).view(f32)


# ----------------------------------------------------------------------------------------------
# helper semantics


def fma32(a, b, c, exponent=0):
    """(a b + c) 2^exponent rounded once. The product is exact in float64; where its sum with c then
    lies on a float32 tie, or falls into the denormals, whose ties lie elsewhere, the float64 sum is
    first rounded to odd, so that no rounding is doubled."""
    p = a.astype(f64) * b
    s = p + c
    bits = s.view(u64)
    doubtful = ((bits & u64(0x1FFFFFFF)) == u64(0x10000000)) | (
        np.abs(s) < np.ldexp(2.0**-126, -exponent)
    )
    if doubtful.any():
        d = s - p
        err = (p - (s - d)) + (c - d)  # TwoSum: s + err is exact
        inexact = doubtful & (err != 0) & np.isfinite(s) & (s != 0)
        odd = np.where((err < 0) == (s < 0), bits, bits - u64(1)) | u64(1)
        s = np.where(inexact, odd, bits).view(f64)
    return np.ldexp(s, exponent).astype(f32)


def fma64(a, b, c, exponent=0):
    """(a b + c) 2^exponent with the product's rounding error (Dekker) added back: within 1 ULP of
    rounding once."""
    p = a * b
    ah = (a * 134217729.0) - ((a * 134217729.0) - a)
    bh = (b * 134217729.0) - ((b * 134217729.0) - b)
    e = ((ah * bh - p) + ah * (b - bh) + (a - ah) * bh) + (a - ah) * (b - bh)
    s = p + c
    d = s - p
    fixed = s + (((p - (s - d)) + (c - d)) + e)
    return np.ldexp(np.where(np.isfinite(fixed), fixed, s), exponent)


def fma16(a, b, c):
    # 22 + 11 bits: exact but for huge exponents
    return (a.astype(f64) * b.astype(f64) + c.astype(f64)).astype(f16)


def float_bits(x):
    return np.ascontiguousarray(x).view({2: u16, 4: u32, 8: u64}[x.dtype.itemsize])


def quiet_bit(x):
    return float_bits(x).dtype.type(1 << (np.finfo(x.dtype).nmant - 1))


def quiet(x):
    """Signalling NaNs made quiet, as every instruction does that makes a float of floats: it is
    numpy's business only where a machine instruction of the host does the work."""
    nan = x != x
    return np.where(nan, (float_bits(x) | quiet_bit(x)).view(x.dtype), x) if nan.any() else x


def signalling(x):
    return (x != x) & (float_bits(x) & quiet_bit(x) == 0)


def pick_zero(r, a, b, op):
    """max(+0, -0) is +0 and min is -0 whatever the order (ISA V_MAX_F32): combine the zeros' sign
    bits."""
    zero = (a == 0) & (b == 0)
    if not zero.any():
        return r
    a, b = np.broadcast_arrays(a, b)
    bits = op(float_bits(a), float_bits(b)).view(r.dtype)
    return np.where(zero, bits, r)


def pick_number(r, a, b):
    """The other operand of a NaN, but a signalling NaN made quiet (ISA V_MAX_F32 in IEEE mode)."""
    if not ((a != a) | (b != b)).any():
        return r
    a, b = np.broadcast_arrays(a, b)
    return np.select([signalling(a), signalling(b), a != a, b != b], [quiet(a), quiet(b), b, a], r)


def fmax(a, b):
    return pick_number(pick_zero(np.fmax(a, b), a, b, np.bitwise_and), a, b)


def fmin(a, b):
    return pick_number(pick_zero(np.fmin(a, b), a, b, np.bitwise_or), a, b)


def maximum(a, b):
    return quiet(pick_zero(np.maximum(a, b), a, b, np.bitwise_and))


def minimum(a, b):
    return quiet(pick_zero(np.minimum(a, b), a, b, np.bitwise_or))


def med3(a, b, c):
    if a.dtype.kind == "f":  # a NaN operand: the minimum of the three
        m = fmax(fmin(a, b), fmin(fmax(a, b), c))
        return np.where(np.isnan(a) | np.isnan(b) | np.isnan(c), fmin(fmin(a, b), c), m)
    return np.maximum(np.minimum(a, b), np.minimum(np.maximum(a, b), c))


def to_int(t):
    """Float -> integer: towards zero, saturating, NaN -> 0 (ISA V_CVT_I32_F32)."""
    info = np.iinfo(t)

    def convert(x):
        x = np.trunc(np.nan_to_num(x.astype(f64), nan=0.0, posinf=np.inf, neginf=-np.inf))
        return np.clip(x, info.min, info.max).astype(t)

    return convert


def flush(x):
    """float32 with denormals made zeros of their sign, which transcendentals do to operand and
    result in every MODE (v_rcp_f32: LLVM PRs 203566, 211017; v_rsq_f32 and v_sqrt_f32: the ROCm
    device libraries scale around it)."""
    return np.where(np.abs(x) < f32(2.0**-126), np.copysign(f32(0), x), x)


def in64(fn):
    """A transcendental evaluated in float64 and rounded to float32, tiny results flushed (ISA
    V_EXP_F32)."""
    return lambda x: flush(fn(x.astype(f64)).astype(f32))


def log2(x):
    return np.log2(np.where(np.abs(x) < 2.0**-126, 0.0, x))


def shl(value, count):
    return value << (count & value.dtype.type(value.dtype.itemsize * 8 - 1))


def shr(value, count):
    return value >> (count & value.dtype.type(value.dtype.itemsize * 8 - 1))


def bfe(value, offset, width):
    """width 0 gives 0; fields past bit 31 are cut (ISA V_BFE_*); sign-extended for signed
    values."""
    t = value.dtype.type
    offset, width = offset.astype(i64) & 31, width.astype(i64) & 31
    v = (value.astype(i64) & 0xFFFFFFFF) if t is u32 else value.astype(i64)
    width_ok = np.where(width > 0, np.minimum(width, 32 - offset), 1)
    field = (v >> offset) & ((np.int64(1) << width_ok) - 1)
    if t is i32:
        field = (field ^ (np.int64(1) << (width_ok - 1))) - (np.int64(1) << (width_ok - 1))
    return np.where(width > 0, field, 0).astype(t)


def s_bfe(value, packed):
    """Offset in bits 0..5, width in bits 16..22 of the second operand (ISA S_BFE_*)."""
    bits, out = value.dtype.itemsize * 8, []
    value, packed = np.broadcast_arrays(value, packed)
    for v, p in zip(value.ravel().tolist(), packed.ravel().tolist(), strict=True):
        offset = p & (bits - 1)
        width = min(p >> 16 & 127, bits - offset)
        x = (v >> offset) & ((1 << width) - 1)
        out.append(
            x - (1 << width) if width and value.dtype.kind == "i" and x >> (width - 1) else x
        )
    return np.array(out, value.dtype).reshape(value.shape)


def reverse_bits(x):
    b = np.unpackbits(x[..., None].view(u8), axis=-1, bitorder="little")
    return np.packbits(b[..., ::-1], axis=-1, bitorder="little").view(x.dtype)[..., 0]


def popcount(x):
    return np.unpackbits(np.ascontiguousarray(x)[..., None].view(u8), axis=-1).sum(-1, dtype=u32)


def first_high(x):
    """Leading zeros; all ones where x is 0 (ISA V_FFBH_U32)."""
    bits = x.dtype.itemsize * 8
    big = np.frexp((x >> x.dtype.type(bits // 2)).astype(f64))[1]
    low = np.frexp((x & x.dtype.type((1 << (bits // 2)) - 1)).astype(f64))[1]
    n = np.where(big > 0, bits // 2 - big, bits - low)
    return np.where(x == 0, -1, n).astype(i32).view(u32)


def first_low(x):
    return np.where(
        x == 0, u32(0xFFFFFFFF), popcount((x & (~x + x.dtype.type(1))) - x.dtype.type(1))
    )


def first_high_signed(x):
    """Leading copies of the sign bit; all ones for 0 and -1 (ISA V_FFBH_I32)."""
    y = np.where(x < 0, ~x, x)
    return first_high(y.view({4: u32, 8: u64}[x.dtype.itemsize]))


def add_carry(a, b, c=0):
    r = a.astype(u64) + b.astype(u64) + np.asarray(c).astype(u64)
    return r.astype(u32), r >> u64(32) != 0


def sub_borrow(a, b, c=0):
    need = b.astype(u64) + np.asarray(c).astype(u64)
    return (a.astype(u64) - need).astype(u32), need > a


def signed_overflow(fn):
    def wrapped(a, b):
        r = fn(a.astype(i64), b.astype(i64))
        return r.astype(i32), r != r.astype(i32)

    return wrapped


def mad64(t):
    def mad(a, b, c):
        p = a.astype(t) * b.astype(t)
        r = p.view(u64) + c
        return r, r < c

    return mad


def perm(a, b, select):
    """Bytes of {a, b} chosen by `select` (ISA V_PERM_B32): 0-3 b's, 4-7 a's, 8-11 a half's sign, 12
    zero, else ones."""
    both = a.astype(u64) << u64(32) | b
    out = np.zeros(np.broadcast_shapes(both.shape, select.shape), u32)
    for i in range(4):
        s = (select >> u32(8 * i)) & u32(0xFF)
        byte = (both >> (u64(8) * np.minimum(s, u32(7)).astype(u64))) & u64(0xFF)
        sign = (both >> (u64(16) * (s & u32(3)).astype(u64) + u64(15))) & u64(1)
        byte = np.where(
            s < 8, byte, np.where(s < 12, sign * u64(0xFF), np.where(s == 12, u64(0), u64(0xFF)))
        )
        out |= byte.astype(u32) << u32(8 * i)
    return out


def div_scale(scale, gap, tiny, exponent_bits):
    """V_DIV_SCALE: the chosen operand, pre-scaled so that the division's Newton steps neither
    overflow nor lose denormals, and whether V_DIV_FMAS must scale back."""

    def fn(s0, den, num):
        t = s0.dtype.type
        s0, den, num = np.broadcast_arrays(s0, den, num)
        lowest = np.finfo(t).tiny
        exp = lambda x: np.frexp(x)[1] - 1 + (1 << (exponent_bits - 1)) - 1  # noqa: E731  biased exponent
        up, down = np.ldexp(s0, scale), np.ldexp(s0, -scale)
        denormal = lambda x: (np.abs(x) < lowest) & (x != 0)  # noqa: E731
        zero = (num == 0) | (den == 0)
        far = exp(num) - exp(den) >= gap
        inv, quo = denormal(t(1) / den.astype(f64)), denormal(num.astype(f64) / den.astype(f64))
        cases = [zero, far, denormal(den), inv & quo, inv, quo, exp(num) <= tiny]
        is_den, is_num = s0 == den, s0 == num
        values = [
            np.full_like(s0, np.nan),
            np.where(is_den, up, s0),
            up,
            np.where(is_den, up, s0),
            down,
            np.where(is_num, up, s0),
            up,
        ]
        flags = [False, True, False, True, False, True, False]
        every = np.ones_like(zero)
        return (
            np.select([*cases, every], [*values, s0]).astype(t),
            np.select([*cases, every], [np.full_like(zero, f) for f in [*flags, False]]),
        )

    return fn


def div_fmas(fma, scale):
    """V_DIV_FMAS: a b + c; with VCC set scaled by 2^scale when the quotient c is 1 or more (the
    denominator had been scaled up), by 2^-scale when it is less (the numerator had). The ISA's
    pseudocode prints 2^32; tinygrad's emulator corrects it likewise, and with this the compiler's
    division is exact, denormals included."""

    def fn(a, b, c, vcc):
        return np.select(
            [vcc & (np.abs(c) >= 1), vcc], [fma(a, b, c, scale), fma(a, b, c, -scale)], fma(a, b, c)
        )

    return fn


def div_fixup(q, den, num):
    """V_DIV_FIXUP: the special cases of num / den; otherwise the quotient with the right sign."""
    t = q.dtype.type
    q, den, num = np.broadcast_arrays(q, den, num)
    sign = np.where(np.signbit(den) ^ np.signbit(num), t(-1), t(1))
    inf_d, inf_n, nan = np.isinf(den), np.isinf(num), t(np.nan)
    return np.select(
        [
            np.isnan(num),
            np.isnan(den),
            ((den == 0) & (num == 0)) | (inf_d & inf_n),
            (den == 0) | inf_n,
            inf_d | (num == 0),
            np.isnan(q),
        ],  # a NaN quotient of finite operands has overflowed
        [quiet(num), quiet(den), -nan, sign * t(np.inf), sign * t(0), sign * t(np.inf)],
        sign * np.abs(q),
    ).astype(t)


def cmp_class(x, mask):
    """V_CMP_CLASS: bits 0 sNaN, 1 qNaN, 2 -inf, 3 -normal, 4 -denormal, 5 -0, 6 +0, 7 +denormal, 8
    +normal, 9 +inf."""
    x, mask = np.broadcast_arrays(x, mask)
    info, neg = np.finfo(x.dtype), np.signbit(x)
    bits = np.ascontiguousarray(x).view({2: u16, 4: u32, 8: u64}[x.dtype.itemsize])
    quiet = (bits >> bits.dtype.type(info.nmant - 1)) & bits.dtype.type(1) != 0
    kind = np.select(
        [np.isnan(x), np.isinf(x), x == 0, np.abs(x) < info.tiny],
        [np.where(quiet, 1, 0), np.where(neg, 2, 9), np.where(neg, 5, 6), np.where(neg, 4, 7)],
        np.where(neg, 3, 8),
    )
    return (mask >> kind.astype(mask.dtype)) & mask.dtype.type(1) != 0


def bitop3(table):
    def fn(a, b, c):
        t = a.dtype.type
        out = t(0)
        for i in range(8):  # index bits: a is the high one
            if table >> i & 1:
                out = out | ((a if i & 4 else ~a) & (b if i & 2 else ~b) & (c if i & 1 else ~c))
        return out + np.zeros_like(a)

    return fn


def prng(x):
    """V_PRNG_B32: one step of a 32-bit Galois LFSR (CDNA4 ISA): shift left, xor 197 when bit 31 was
    set."""
    return (x << u32(1)) ^ np.where(x >> u32(31) != 0, u32(197), u32(0))


def pack16(lo, hi):
    return lo.astype(u16).astype(u32) | hi.astype(u16).astype(u32) << u32(16)


def narrow(t):
    """Saturating conversion to a 16-bit integer."""
    info = np.iinfo(t)
    return lambda x: np.clip(x, max(info.min, np.iinfo(x.dtype).min), info.max).astype(t).view(u16)


def sat8(lo, hi):
    def fn(a, b, shift):
        x, y = (
            np.clip(v >> (shift & u32(31)).astype(i32), lo, hi).astype(i64) & 0xFF for v in (a, b)
        )
        return (x | y << 8).astype(u16)

    return fn


def sext24(x):
    return ((x << i32(8)) >> i32(8)).astype(i64)


def scc(fn):
    """A scalar operation that sets SCC to `result != 0`."""

    def wrapped(*args):
        r = fn(*args)
        return r, r != 0

    return wrapped


def dot2(a_value):
    """D = a0 b0 + a1 b1 + c over two 16-bit halves, summed exactly and rounded once."""

    def fn(a, b, c):
        p = sum(
            a_value((a >> s).astype(u16)).astype(f64) * a_value((b >> s).astype(u16)).astype(f64)
            for s in (u32(0), u32(16))
        )
        return (p + c).astype(f32)

    return fn


def sad_u8(a, b, c):
    x, y = (
        np.ascontiguousarray(v)[..., None].view(u8).astype(i32) for v in np.broadcast_arrays(a, b)
    )
    return np.abs(x - y).sum(-1).astype(u32) + c


# ---------------------------------------------------------------------------------------------- the
# table

ALU = {}


def table(prefix, signature, **functions):
    dst, _, src = signature.partition("=")
    for name, fn in functions.items():
        ALU[prefix + name] = (dst.split(), src.split(), fn)


def mulhi(t):
    return lambda a, b: ((a.astype(t) * b.astype(t)) >> t(32)).astype(a.dtype)


# -- vector, 32-bit float
table(
    "v_",
    "f32 = f32 f32",
    add_f32=np.add,
    sub_f32=np.subtract,
    subrev_f32=lambda a, b: b - a,
    mul_f32=np.multiply,
    max_f32=fmax,
    min_f32=fmin,
    mul_legacy_f32=lambda a, b: np.where((a == 0) | (b == 0), f32(0), a * b),
)
table(
    "v_",
    "f32 = f32 f32 f32",
    fma_f32=fma32,
    med3_f32=med3,
    max3_f32=lambda a, b, c: fmax(fmax(a, b), c),
    min3_f32=lambda a, b, c: fmin(fmin(a, b), c),
    maximum3_f32=lambda a, b, c: maximum(maximum(a, b), c),
    minimum3_f32=lambda a, b, c: minimum(minimum(a, b), c),
    fmamk_f32=lambda a, k, b: fma32(a, k, b),
    fmaak_f32=fma32,
    div_fixup_f32=div_fixup,
)
table("v_", "f32 = f32 f32 +f32", fmac_f32=fma32)
table(
    "v_",
    "f32 = f32",
    rcp_f32=lambda x: flush(f32(1) / flush(x)),
    rcp_iflag_f32=lambda x: flush(f32(1) / flush(x)),
    sqrt_f32=lambda x: np.sqrt(flush(x)),
    rsq_f32=lambda x: (1 / np.sqrt(flush(x).astype(f64))).astype(f32),
    exp_f32=in64(np.exp2),
    log_f32=in64(log2),
    sin_f32=in64(lambda x: np.sin(2 * np.pi * x)),
    cos_f32=in64(lambda x: np.cos(2 * np.pi * x)),
    floor_f32=np.floor,
    ceil_f32=np.ceil,
    trunc_f32=np.trunc,
    rndne_f32=np.rint,
    fract_f32=lambda x: np.minimum(x - np.floor(x), f32(1 - 2.0**-24)),
    frexp_mant_f32=lambda x: quiet(np.where(np.isfinite(x), np.frexp(x)[0], x)),
)
table("v_", "i32 = f32", frexp_exp_i32_f32=lambda x: np.where(np.isfinite(x), np.frexp(x)[1], 0))
table("v_", "f32 = f32 i32", ldexp_f32=np.ldexp)
table("v_", "f32 b1 = f32 f32 f32", div_scale_f32=div_scale(64, 96, 23, 8))
table("v_", "f32 = f32 f32 f32 vcc", div_fmas_f32=div_fmas(fma32, 64))
# -- vector, 64-bit float
table("v_", "f64 = f64 f64", add_f64=np.add, mul_f64=np.multiply, max_f64=fmax, min_f64=fmin)
table("v_", "f64 = f64 f64 f64", fma_f64=fma64, div_fixup_f64=div_fixup)
table("v_", "f64 = f64 f64 +f64", fmac_f64=fma64)
table(
    "v_",
    "f64 = f64",
    rcp_f64=lambda x: 1 / x,
    rsq_f64=lambda x: 1 / np.sqrt(x),
    sqrt_f64=np.sqrt,
    floor_f64=np.floor,
    ceil_f64=np.ceil,
    trunc_f64=np.trunc,
    rndne_f64=np.rint,
    fract_f64=lambda x: np.minimum(x - np.floor(x), 1 - 2.0**-53),
    frexp_mant_f64=lambda x: quiet(np.where(np.isfinite(x), np.frexp(x)[0], x)),
)
table("v_", "i32 = f64", frexp_exp_i32_f64=lambda x: np.where(np.isfinite(x), np.frexp(x)[1], 0))
table("v_", "f64 = f64 i32", ldexp_f64=np.ldexp)
table("v_", "f64 b1 = f64 f64 f64", div_scale_f64=div_scale(128, 768, 53, 11))
table("v_", "f64 = f64 f64 f64 vcc", div_fmas_f64=div_fmas(fma64, 128))
# -- vector, 16-bit
table(
    "v_",
    "f16 = f16 f16",
    add_f16=np.add,
    sub_f16=np.subtract,
    subrev_f16=lambda a, b: b - a,
    mul_f16=np.multiply,
    max_f16=fmax,
    min_f16=fmin,
)
table("v_", "f16 = f16 i16", ldexp_f16=np.ldexp)
table(
    "v_",
    "f16 = f16 f16 f16",
    fma_f16=fma16,
    div_fixup_f16=div_fixup,
    med3_f16=med3,
    max3_f16=lambda a, b, c: fmax(fmax(a, b), c),
    min3_f16=lambda a, b, c: fmin(fmin(a, b), c),
)
table("v_", "f16 = f16 f16 +f16", fmac_f16=fma16)
table(
    "v_",
    "f16 = f16",
    rcp_f16=lambda x: f16(1) / x,
    sqrt_f16=np.sqrt,
    floor_f16=np.floor,
    ceil_f16=np.ceil,
    trunc_f16=np.trunc,
    rndne_f16=np.rint,
    rsq_f16=lambda x: (1 / np.sqrt(x.astype(f64))).astype(f16),
    exp_f16=lambda x: np.exp2(x.astype(f64)).astype(f16),
    log_f16=lambda x: np.log2(x.astype(f64)).astype(f16),
)
table(
    "v_",
    "u16 = u16 u16",
    add_u16=np.add,
    sub_u16=np.subtract,
    subrev_u16=lambda a, b: b - a,
    mul_lo_u16=np.multiply,
    max_u16=np.maximum,
    min_u16=np.minimum,
    lshlrev_b16=lambda a, b: shl(b, a),
    lshrrev_b16=lambda a, b: shr(b, a),
)
table(
    "v_",
    "i16 = i16 i16",
    max_i16=np.maximum,
    min_i16=np.minimum,
    ashrrev_i16=lambda a, b: shr(b, a),
    add_i16=np.add,
    sub_i16=np.subtract,
)
table(
    "v_",
    "u16 = u16 u16 u16",
    mad_u16=lambda a, b, c: a * b + c,
    mad_legacy_u16=lambda a, b, c: a * b + c,
    med3_u16=med3,
)
table("v_", "i16 = i16 i16 i16", mad_i16=lambda a, b, c: a * b + c, med3_i16=med3)
# -- vector, integers
table(
    "v_",
    "u32 = u32",
    mov_b32=lambda a: a,
    not_b32=np.invert,
    bfrev_b32=reverse_bits,
    ffbh_u32=first_high,
    ffbl_b32=first_low,
    accvgpr_read_b32=lambda a: a,
    accvgpr_write_b32=lambda a: a,
    accvgpr_mov_b32=lambda a: a,
    prng_b32=prng,
)
table("v_", "u32 = i32", ffbh_i32=first_high_signed)
table("v_", "u64 = u64", mov_b64=lambda a: a)
table(
    "v_",
    "u32 = u32 u32",
    add_u32=np.add,
    sub_u32=np.subtract,
    subrev_u32=lambda a, b: b - a,
    and_b32=np.bitwise_and,
    or_b32=np.bitwise_or,
    xor_b32=np.bitwise_xor,
    xnor_b32=lambda a, b: ~(a ^ b),
    mul_lo_u32=np.multiply,
    mul_hi_u32=mulhi(u64),
    max_u32=np.maximum,
    min_u32=np.minimum,
    lshlrev_b32=lambda a, b: shl(b, a),
    lshrrev_b32=lambda a, b: shr(b, a),
    bfm_b32=lambda a, b: shl(shl(u32(1), a) - u32(1), b),
    bcnt_u32_b32=lambda a, b: popcount(a) + b,
    mul_u32_u24=lambda a, b: (a & u32(0xFFFFFF)) * (b & u32(0xFFFFFF)),
    mul_hi_u32_u24=lambda a, b: (
        ((a & u32(0xFFFFFF)).astype(u64) * (b & u32(0xFFFFFF))) >> u64(32)
    ).astype(u32),
)
table(
    "v_",
    "i32 = i32 i32",
    max_i32=np.maximum,
    min_i32=np.minimum,
    ashrrev_i32=lambda a, b: shr(b, a),
    mul_hi_i32=mulhi(i64),
    mul_i32_i24=lambda a, b: (sext24(a) * sext24(b)).astype(i32),
    add_i32=np.add,
    sub_i32=np.subtract,
)
table(
    "v_",
    "u32 = u32 u32 u32",
    add3_u32=lambda a, b, c: a + b + c,
    lshl_add_u32=lambda a, b, c: shl(a, b) + c,
    add_lshl_u32=lambda a, b, c: shl(a + b, c),
    lshl_or_b32=lambda a, b, c: shl(a, b) | c,
    and_or_b32=lambda a, b, c: a & b | c,
    or3_b32=lambda a, b, c: a | b | c,
    xad_u32=lambda a, b, c: (a ^ b) + c,
    bfe_u32=bfe,
    bfi_b32=lambda a, b, c: a & b | ~a & c,
    perm_b32=perm,
    max3_u32=lambda a, b, c: np.maximum(np.maximum(a, b), c),
    min3_u32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
    med3_u32=med3,
    sad_u8=sad_u8,
    alignbit_b32=lambda a, b, c: (
        (a.astype(u64) << u64(32) | b) >> (c & u32(31)).astype(u64)
    ).astype(u32),
    alignbyte_b32=lambda a, b, c: (
        (a.astype(u64) << u64(32) | b) >> (u64(8) * (c & u32(3)))
    ).astype(u32),
    mad_u32_u24=lambda a, b, c: (a & u32(0xFFFFFF)) * (b & u32(0xFFFFFF)) + c,
)
table("v_", "i32 = i32 u32 u32", bfe_i32=bfe)
table(
    "v_",
    "i32 = i32 i32 i32",
    max3_i32=lambda a, b, c: np.maximum(np.maximum(a, b), c),
    med3_i32=med3,
    min3_i32=lambda a, b, c: np.minimum(np.minimum(a, b), c),
    mad_i32_i24=lambda a, b, c: (sext24(a) * sext24(b)).astype(i32) + c,
)
table("v_", "u32 = u16 u16 u32", mad_u32_u16=lambda a, b, c: a.astype(u32) * b.astype(u32) + c)
table("v_", "i32 = i16 i16 i32", mad_i32_i16=lambda a, b, c: a.astype(i32) * b.astype(i32) + c)
table(
    "v_",
    "u32 b1 = u32 u32",
    add_co_u32=add_carry,
    sub_co_u32=sub_borrow,
    subrev_co_u32=lambda a, b: sub_borrow(b, a),
)
table(
    "v_",
    "u32 b1 = u32 u32 b1",
    addc_co_u32=add_carry,
    subb_co_u32=sub_borrow,
    subbrev_co_u32=lambda a, b, c: sub_borrow(b, a, c),
)
table("v_", "u32 = u32 u32 b1", cndmask_b32=lambda a, b, c: np.where(c, b, a))
table(
    "v_",
    "u64 = u32 u64",
    lshlrev_b64=lambda a, b: shl(b, a.astype(u64)),
    lshrrev_b64=lambda a, b: shr(b, a.astype(u64)),
)
table("v_", "i64 = u32 i64", ashrrev_i64=lambda a, b: shr(b, a.astype(i64)))
table("v_", "u64 = u64 u32 u64", lshl_add_u64=lambda a, b, c: shl(a, b.astype(u64)) + c)
table("v_", "u64 b1 = u32 u32 u64", mad_u64_u32=mad64(u64))
table("v_", "u64 b1 = i32 i32 u64", mad_i64_i32=mad64(i64))
# -- vector, conversions
for _t in ("i32", "u32"):
    table("v_", f"{_t} = f32", **{f"cvt_{_t}_f32": to_int(NUMPY[_t])})
    table("v_", f"{_t} = f64", **{f"cvt_{_t}_f64": to_int(NUMPY[_t])})
    table("v_", f"f32 = {_t}", **{f"cvt_f32_{_t}": lambda x: x.astype(f32)})
    table("v_", f"f64 = {_t}", **{f"cvt_f64_{_t}": lambda x: x.astype(f64)})
for _t in ("i16", "u16"):
    table("v_", f"{_t} = f16", **{f"cvt_{_t}_f16": to_int(NUMPY[_t])})
    table("v_", f"f16 = {_t}", **{f"cvt_f16_{_t}": lambda x: x.astype(f16)})
for _i in range(4):
    table(
        "v_",
        "f32 = u32",
        **{f"cvt_f32_ubyte{_i}": lambda x, i=_i: ((x >> u32(8 * i)) & u32(0xFF)).astype(f32)},
    )
table("v_", "f16 = f32", cvt_f16_f32=lambda x: x.astype(f16))
table("v_", "f32 = f16", cvt_f32_f16=lambda x: quiet(x.astype(f32)))
table("v_", "f64 = f32", cvt_f64_f32=lambda x: x.astype(f64))
table("v_", "f32 = f64", cvt_f32_f64=lambda x: x.astype(f32))
table("v_", "f32 = u16", cvt_f32_bf16=bf16_value)
table(
    "v_",
    "u32 = f32 f32",
    cvt_pk_bf16_f32=lambda a, b: pack16(bf16_bits(a), bf16_bits(b)),
    cvt_pk_f16_f32=lambda a, b: pack16(a.astype(f16).view(u16), b.astype(f16).view(u16)),
)
table(
    "v_",
    "u32 = f32 f32",
    cvt_pkrtz_f16_f32=lambda a, b: pack16(to_f16(3, a).view(u16), to_f16(3, b).view(u16)),
)
table("v_", "u32 = u32 u32", cvt_pk_u16_u32=lambda a, b: pack16(narrow(u16)(a), narrow(u16)(b)))
table("v_", "u32 = i32 i32", cvt_pk_i16_i32=lambda a, b: pack16(narrow(i16)(a), narrow(i16)(b)))
table("v_", "u32 = u16 u16", pack_b32_f16=pack16)
table("v_", "u16 = i32 i32 u32", ashr_pk_i8_i32=sat8(-128, 127), ashr_pk_u8_i32=sat8(0, 255))
table(
    "v_",
    "f32 = u32 u32 f32",
    dot2_f32_f16=dot2(lambda b: b.view(f16)),
    dot2_f32_bf16=dot2(bf16_value),
)
table(
    "v_",
    "f32 = u32 u32 +f32",
    dot2c_f32_f16=dot2(lambda b: b.view(f16)),
    dot2c_f32_bf16=dot2(bf16_value),
)
# -- vector, comparisons
COMPARE = {
    "lt": np.less,
    "eq": np.equal,
    "le": np.less_equal,
    "gt": np.greater,
    "ge": np.greater_equal,
    "lg": lambda a, b: (a < b) | (a > b),
    "ne": np.not_equal,
    "o": lambda a, b: (a == a) & (b == b),
    "u": lambda a, b: (a != a) | (b != b),
    "nge": lambda a, b: ~(a >= b),
    "nlg": lambda a, b: ~((a < b) | (a > b)),
    "ngt": lambda a, b: ~(a > b),
    "nle": lambda a, b: ~(a <= b),
    "neq": np.not_equal,
    "nlt": lambda a, b: ~(a < b),
}
for _t in ("i16", "u16", "f16", "i32", "u32", "f32", "i64", "u64", "f64"):
    for _c, _f in COMPARE.items():
        table("v_", f"b1 = {_t} {_t}", **{f"cmp_{_c}_{_t}": _f})
        table(
            "v_", f"b1 exec = {_t} {_t}", **{f"cmpx_{_c}_{_t}": lambda a, b, f=_f: (f(a, b),) * 2}
        )
for _t in ("f16", "f32", "f64"):
    table("v_", f"b1 = {_t} u32", **{f"cmp_class_{_t}": cmp_class})
# -- scalar
table(
    "s_",
    "u32 = u32",
    mov_b32=lambda a: a,
    brev_b32=reverse_bits,
    movk_i32=lambda a: a,
    ff1_i32_b32=first_low,
    flbit_i32_b32=first_high,
)
table("s_", "u64 = u64", mov_b64=lambda a: a, brev_b64=reverse_bits)
table("s_", "u32 = u64", ff1_i32_b64=first_low, flbit_i32_b64=first_high)
table("s_", "u32 = i32", flbit_i32=first_high_signed)
table(
    "s_",
    "i32 = u32",
    sext_i32_i8=lambda a: a.astype(i8).astype(i32),
    sext_i32_i16=lambda a: a.astype(i16).astype(i32),
)
table("s_", "u32 scc = u32", not_b32=scc(np.invert), bcnt1_i32_b32=scc(popcount))
table("s_", "u64 scc = u64", not_b64=scc(np.invert))
table("s_", "u32 scc = u64", bcnt1_i32_b64=scc(popcount))
table("s_", "i32 scc = i32", abs_i32=scc(np.abs))
for _t in ("u32", "u64"):
    _b = {"u32": "b32", "u64": "b64"}[_t]
    table(
        "s_",
        f"{_t} scc = {_t} {_t}",
        **{
            f"and_{_b}": scc(np.bitwise_and),
            f"or_{_b}": scc(np.bitwise_or),
            f"xor_{_b}": scc(np.bitwise_xor),
            f"andn2_{_b}": scc(lambda a, b: a & ~b),
            f"orn2_{_b}": scc(lambda a, b: a | ~b),
            f"nand_{_b}": scc(lambda a, b: ~(a & b)),
            f"nor_{_b}": scc(lambda a, b: ~(a | b)),
            f"xnor_{_b}": scc(lambda a, b: ~(a ^ b)),
        },
    )
    table("s_", f"{_t} = {_t} {_t} scc", **{f"cselect_{_b}": lambda a, b, c: np.where(c, a, b)})
    table(
        "s_",
        f"{_t} scc = {_t} u32",
        **{
            f"lshl_{_b}": scc(lambda a, b: shl(a, b.astype(a.dtype))),
            f"lshr_{_b}": scc(lambda a, b: shr(a, b.astype(a.dtype))),
        },
    )
table(
    "s_",
    "i32 scc = i32 i32",
    ashr_i32=scc(lambda a, b: shr(a, b)),
    add_i32=signed_overflow(np.add),
    sub_i32=signed_overflow(np.subtract),
    min_i32=lambda a, b: (np.minimum(a, b), a < b),
    max_i32=lambda a, b: (np.maximum(a, b), a > b),
)
table("s_", "i64 scc = i64 u32", ashr_i64=scc(lambda a, b: shr(a, b.astype(i64))))
table(
    "s_",
    "u32 scc = u32 u32",
    add_u32=add_carry,
    sub_u32=sub_borrow,
    min_u32=lambda a, b: (np.minimum(a, b), a < b),
    max_u32=lambda a, b: (np.maximum(a, b), a > b),
    bfe_u32=scc(s_bfe),
)
table("s_", "u32 scc = u32 u32 scc", addc_u32=add_carry, subb_u32=sub_borrow)
table("s_", "i32 scc = i32 u32", bfe_i32=scc(s_bfe))
table("s_", "u64 scc = u64 u32", bfe_u64=scc(s_bfe))
table("s_", "i32 = i32 i32", mul_i32=np.multiply, mul_hi_i32=mulhi(i64))
table(
    "s_",
    "u32 = u32 u32",
    mul_hi_u32=mulhi(u64),
    pack_ll_b32_b16=pack16,
    pack_lh_b32_b16=lambda a, b: (a & u32(0xFFFF)) | (b & u32(0xFFFF0000)),
    pack_hh_b32_b16=lambda a, b: a >> u32(16) | (b & u32(0xFFFF0000)),
    bfm_b32=lambda a, b: shl(shl(u32(1), a) - u32(1), b),
)
table("s_", "i32 scc = +i32 i32", addk_i32=signed_overflow(np.add))
table("s_", "i32 = +i32 i32", mulk_i32=np.multiply)
for _i in range(1, 5):
    table(
        "s_",
        "u32 scc = u32 u32",
        **{
            f"lshl{_i}_add_u32": lambda a, b, i=_i: (lambda r: (r.astype(u32), r >> u64(32) != 0))(
                (a.astype(u64) << u64(i)) + b
            )
        },
    )
for _t in ("i32", "u32", "u64"):
    for _c in ("eq", "lg", "gt", "ge", "lt", "le"):
        table(
            "s_",
            f"scc = {_t} {_t}",
            **{f"cmp_{_c}_{_t}": COMPARE[_c], f"cmpk_{_c}_{_t}": COMPARE[_c]},
        )
table(
    "s_",
    "scc = u32 u32",
    bitcmp1_b32=lambda a, b: shr(a, b) & u32(1) != 0,
    bitcmp0_b32=lambda a, b: shr(a, b) & u32(1) == 0,
)
table(
    "s_",
    "scc = u64 u32",
    bitcmp1_b64=lambda a, b: shr(a, b.astype(u64)) & u64(1) != 0,
    bitcmp0_b64=lambda a, b: shr(a, b.astype(u64)) & u64(1) == 0,
)
table(
    "s_",
    "u32 = +u32 u32",
    bitset1_b32=lambda d, a: d | u32(1) << (a & u32(31)),
    bitset0_b32=lambda d, a: d & ~(u32(1) << (a & u32(31))),
)
for _n, _f in {
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "andn2": lambda s, e: s & ~e,
}.items():
    table(
        "s_",
        "u64 exec64 scc = u64 exec64",
        **{f"{_n}_saveexec_b64": lambda s, e, f=_f: (e, f(s, e), f(s, e) != 0)},
    )

# -- packed: both halves of a 32-bit register (or of a register pair for f32) at once
PACKED = {
    "add_f16": ("f16", 2, np.add),
    "mul_f16": ("f16", 2, np.multiply),
    "max_f16": ("f16", 2, fmax),
    "min_f16": ("f16", 2, fmin),
    "fma_f16": ("f16", 3, fma16),
    "add_u16": ("u16", 2, np.add),
    "sub_u16": ("u16", 2, np.subtract),
    "mul_lo_u16": ("u16", 2, np.multiply),
    "max_u16": ("u16", 2, np.maximum),
    "min_u16": ("u16", 2, np.minimum),
    "add_i16": ("i16", 2, np.add),
    "sub_i16": ("i16", 2, np.subtract),
    "max_i16": ("i16", 2, np.maximum),
    "min_i16": ("i16", 2, np.minimum),
    "mad_u16": ("u16", 3, lambda a, b, c: a * b + c),
    "mad_i16": ("i16", 3, lambda a, b, c: a * b + c),
    "lshlrev_b16": ("u16", 2, lambda a, b: shl(b, a)),
    "lshrrev_b16": ("u16", 2, lambda a, b: shr(b, a)),
    "ashrrev_i16": ("i16", 2, lambda a, b: shr(b, a)),
    "add_f32": ("f32", 2, np.add),
    "mul_f32": ("f32", 2, np.multiply),
    "fma_f32": ("f32", 3, fma32),
    "maximum3_f16": ("f16", 3, lambda a, b, c: maximum(maximum(a, b), c)),
    "minimum3_f16": ("f16", 3, lambda a, b, c: minimum(minimum(a, b), c)),
}
