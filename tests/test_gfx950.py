"""The emulated machine: instructions against Python and torch, memory rules, the adversary,
mutants, the driver."""

import bisect
import itertools
import math
import re
import struct
from fractions import Fraction

import numpy as np
import pytest
import torch

import gfx950
from gfx950.asm import Program, parse_instruction
from gfx950.machine import Machine, prepare
from gfx950.memory import Span

F32 = [
    0x00000000,
    0x80000000,
    0x00000001,
    0x807FFFFF,
    0x00800000,
    0x3F800000,
    0x3F800001,
    0xBFC00000,
    0x477FE000,
    0x7F7FFFFF,
    0xFF7FFFFF,
    0x7F800000,
    0xFF800000,
    0x7FC12345,
    0x33800000,
    0xCB000001,
    0x40490FDB,
    0x0DA24260,
]
U32 = [
    0,
    1,
    2,
    31,
    32,
    33,
    0x7FFF,
    0x8000,
    0xFFFF,
    0x00FFFFFF,
    0x01000000,
    0x12345678,
    0x7FFFFFFF,
    0x80000000,
    0x80000001,
    0xDEADBEEF,
    0xFFFFFFFE,
    0xFFFFFFFF,
]
IDS = np.arange(64)
TIMINGS, SCHEDULES = ("lazy", "eager", "random"), ("lockstep", "skew", "random")
MODES = list(itertools.product(TIMINGS, SCHEDULES))


# ------------------------------------------------------------------------------------------ running
# bare instructions


class Bench:
    """A machine for a few instructions: `v` and `s` preset registers, `spans` tensors, `lds` bytes
    of local memory."""

    def __init__(
        self,
        lines,
        v=None,
        s=None,
        spans=(),
        lds=0,
        waves=1,
        timing="lazy",
        schedule="lockstep",
        leader=0,
        scratch=0,
        directives=None,
        sums="exact",
    ):
        code = [
            parse_instruction(line, f"line {i}", 64) for i, line in enumerate([*lines, "s_endpgm"])
        ]
        directives = {"user_sgpr_count": 2, "agpr_count": 64, **(directives or {})}
        directives |= {"private_segment_fixed_size": scratch}
        directives |= {f"system_sgpr_workgroup_id_{c}": 0 for c in "xyz"}
        program = prepare(Program("bench", code, {}, [], directives, 64))
        counters = [np.zeros(len(code), np.int64) for _ in range(3)]
        self.m = Machine(
            program,
            list(spans),
            0,
            (1, 1, 1),
            waves,
            lds,
            timing,
            schedule,
            np.random.default_rng(0),
            counters,
            sums=sums,
        )
        self.m.leader = leader
        self.m.start(np.arange(1))
        for r, x in (v or {}).items():
            self.m.vector[r][:] = np.asarray(x, np.uint32)
        for r, x in (s or {}).items():
            self.m.scalar[r][:] = np.asarray(x, np.uint32)
        with np.errstate(all="ignore"):
            while self.m.step():
                pass

    def v(self, r):
        return self.m.vector[r][0]

    def s(self, r):
        return int(self.m.scalar[r][0])

    def s64(self, r):
        return self.s(r) | self.s(r + 1) << 32


def lanes64(values):
    """Pads a list of register values to whole waves: uint32 [waves, 64]."""
    values = np.array(values, np.uint64)
    padded = np.zeros(-(-len(values) // 64) * 64, np.uint64)
    padded[: len(values)] = values
    return padded.reshape(-1, 64)


def operand_count(text):
    """How many of the operand registers v4, v6, v8 an instruction reads."""
    return len(set(re.findall(r"v\[?([468])\b", text)))


def over(text, operands, result=1):
    """Runs one instruction over operand tuples; operand i sits in v[4 + 2 i : 6 + 2 i]. Returns the
    destination v[0] (v[0:1] when result is 2) per tuple, and vcc bits."""
    columns = [lanes64(c) for c in zip(*operands, strict=True)]
    out, flags = [], []
    for row in range(len(columns[0])):
        v = {0: 0xA5A5A5A5}
        for i, c in enumerate(columns):
            v[4 + 2 * i], v[5 + 2 * i] = c[row] & 0xFFFFFFFF, c[row] >> np.uint64(32)
        b = Bench([text], v, {106: 0, 107: 0})
        bits = b.v(0).astype(np.uint64) | (
            b.v(1).astype(np.uint64) << np.uint64(32) if result == 2 else 0
        )
        out += bits.tolist()
        flags += [b.s64(106) >> i & 1 for i in range(64)]
    return out[: len(operands)], flags[: len(operands)]


def signed(x, bits=32):
    return x - (1 << bits) if x >> (bits - 1) & 1 else x


def as_f32(bits):
    return struct.unpack("<f", struct.pack("<I", bits))[0]


def round_f32(x):
    """Fraction -> float32 bits, nearest even: an integer algorithm that shares nothing with the
    emulator."""
    if x == 0:
        return 0
    sign, x = (1 << 31 if x < 0 else 0), abs(x)
    e = max(math.floor(math.log2(x.numerator) - math.log2(x.denominator)) - 1, -127)
    while x >= Fraction(2) ** (e + 1):
        e += 1
    e = max(e, -126)
    q = x / Fraction(2) ** (e - 23)
    n = q.numerator // q.denominator
    rest = q - n
    n += rest > Fraction(1, 2) or (rest == Fraction(1, 2) and n & 1)
    code = n + (e + 126 << 23) if n >> 23 or e > -126 else n
    return sign | min(code, 0x7F800000)


# ------------------------------------------------------------------------------------------ integer
# instructions

M32 = 0xFFFFFFFF


def bitfield(x, offset, width):
    offset, width = offset & 31, width & 31
    return (x >> offset) & ((1 << width) - 1)


def bitfield_signed(x, offset, width):
    offset, width = offset & 31, width & 31
    got = min(width, 32 - offset)
    return 0 if width == 0 else signed(signed(x) >> offset & ((1 << got) - 1), got)


def permuted_bytes(a, b, sel):
    source = [*b.to_bytes(4, "little"), *a.to_bytes(4, "little")]
    out = []
    for s in sel.to_bytes(4, "little"):
        word = (b & 0xFFFF, b >> 16, a & 0xFFFF, a >> 16)[s & 3]
        out.append(
            source[s] if s < 8 else (255 if word >> 15 else 0) if s < 12 else 0 if s == 12 else 255
        )
    return int.from_bytes(out, "little")


INTEGER = {
    "v_mul_hi_u32_u24_e32 v0, v4, v6": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF) >> 32,
    "v_add_i32 v0, v4, v6": lambda a, b: a + b,
    "v_sub_i32 v0, v4, v6": lambda a, b: a - b,
    "v_add_i16 v0, v4, v6": lambda a, b: a + b & 0xFFFF,
    "v_sub_i16 v0, v4, v6": lambda a, b: a - b & 0xFFFF,
    "v_min3_u32 v0, v4, v6, v8": min,
    "v_med3_u32 v0, v4, v6, v8": lambda *x: sorted(x)[1],
    "v_max3_i32 v0, v4, v6, v8": lambda *x: max(map(signed, x)),
    "v_mad_i32_i24 v0, v4, v6, v8": lambda a, b, c: (
        signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24) + c
    ),
    "v_mad_i32_i16 v0, v4, v6, v8": lambda a, b, c: (
        signed(a & 0xFFFF, 16) * signed(b & 0xFFFF, 16) + c
    ),
    "v_mad_u16 v0, v4, v6, v8": lambda a, b, c: 0xA5A50000 | (a * b + c & 0xFFFF),
    "v_mad_legacy_u16 v0, v4, v6, v8": lambda a, b, c: a * b + c & 0xFFFF,
    "v_med3_i16 v0, v4, v6, v8": lambda *x: (
        0xA5A50000 | sorted(signed(v & 0xFFFF, 16) for v in x)[1] & 0xFFFF
    ),
    "v_med3_u16 v0, v4, v6, v8": lambda *x: 0xA5A50000 | sorted(v & 0xFFFF for v in x)[1],
    "v_ashr_pk_u8_i32 v0, v4, v6, v8": lambda a, b, c: (
        0xA5A50000
        | max(min(signed(a) >> (c & 31), 255), 0)
        | max(min(signed(b) >> (c & 31), 255), 0) << 8
    ),
    "v_bitop3_b16 v0, v4, v6, v8 bitop3:0x96": lambda a, b, c: (a ^ b ^ c) & 0xFFFF,
    "v_add_u32_e32 v0, v4, v6": lambda a, b: a + b,
    "v_sub_u32_e32 v0, v4, v6": lambda a, b: a - b,
    "v_subrev_u32_e32 v0, v4, v6": lambda a, b: b - a,
    "v_sub_u32_e64 v0, v4, v6 clamp": lambda a, b: max(a - b, 0),
    "v_add_u32_e64 v0, v4, v6 clamp": lambda a, b: min(a + b, M32),
    "v_mul_lo_u32 v0, v4, v6": lambda a, b: a * b,
    "v_mul_hi_u32 v0, v4, v6": lambda a, b: a * b >> 32,
    "v_mul_hi_i32 v0, v4, v6": lambda a, b: signed(a) * signed(b) >> 32,
    "v_mul_u32_u24_e32 v0, v4, v6": lambda a, b: (a & 0xFFFFFF) * (b & 0xFFFFFF),
    "v_mul_i32_i24_e32 v0, v4, v6": lambda a, b: (
        signed(a & 0xFFFFFF, 24) * signed(b & 0xFFFFFF, 24)
    ),
    "v_and_b32_e32 v0, v4, v6": lambda a, b: a & b,
    "v_or_b32_e32 v0, v4, v6": lambda a, b: a | b,
    "v_xor_b32_e32 v0, v4, v6": lambda a, b: a ^ b,
    "v_xnor_b32_e32 v0, v4, v6": lambda a, b: ~(a ^ b),
    "v_lshlrev_b32_e32 v0, v4, v6": lambda a, b: b << (a & 31),
    "v_lshrrev_b32_e32 v0, v4, v6": lambda a, b: b >> (a & 31),
    "v_ashrrev_i32_e32 v0, v4, v6": lambda a, b: signed(b) >> (a & 31),
    "v_max_i32_e32 v0, v4, v6": lambda a, b: max(signed(a), signed(b)),
    "v_min_i32_e32 v0, v4, v6": lambda a, b: min(signed(a), signed(b)),
    "v_max_u32_e32 v0, v4, v6": max,
    "v_min_u32_e32 v0, v4, v6": min,
    "v_bcnt_u32_b32 v0, v4, v6": lambda a, b: a.bit_count() + b,
    "v_bfm_b32 v0, v4, v6": lambda a, b: ((1 << (a & 31)) - 1) << (b & 31),
    "v_add_u16_e32 v0, v4, v6": lambda a, b: a + b & 0xFFFF,
    "v_subrev_u16_e32 v0, v4, v6": lambda a, b: b - a & 0xFFFF,
    "v_mul_lo_u16_e32 v0, v4, v6": lambda a, b: a * b & 0xFFFF,
    "v_lshlrev_b16_e32 v0, v4, v6": lambda a, b: b << (a & 15) & 0xFFFF,
    "v_ashrrev_i16_e32 v0, v4, v6": lambda a, b: signed(b & 0xFFFF, 16) >> (a & 15) & 0xFFFF,
    "v_cvt_pk_u16_u32 v0, v4, v6": lambda a, b: min(a, 0xFFFF) | min(b, 0xFFFF) << 16,
    "v_cvt_pk_i16_i32 v0, v4, v6": lambda a, b: (
        (max(min(signed(a), 32767), -32768) & 0xFFFF)
        | (max(min(signed(b), 32767), -32768) & 0xFFFF) << 16
    ),
    "v_pack_b32_f16 v0, v4, v6 op_sel:[1,0,0]": lambda a, b: a >> 16 | (b & 0xFFFF) << 16,
    "v_not_b32_e32 v0, v4": lambda a: ~a,
    "v_bfrev_b32_e32 v0, v4": lambda a: int(f"{a:032b}"[::-1], 2),
    "v_ffbh_u32_e32 v0, v4": lambda a: 32 - a.bit_length() if a else -1,
    "v_ffbl_b32_e32 v0, v4": lambda a: (a & -a).bit_length() - 1 if a else -1,
    "v_ffbh_i32_e32 v0, v4": lambda a: leading_copies(a),
    "v_prng_b32_e32 v0, v4": lambda a: (a << 1) ^ (197 if a >> 31 else 0),
    "v_add3_u32 v0, v4, v6, v8": lambda a, b, c: a + b + c,
    "v_lshl_add_u32 v0, v4, v6, v8": lambda a, b, c: (a << (b & 31)) + c,
    "v_add_lshl_u32 v0, v4, v6, v8": lambda a, b, c: (a + b & M32) << (c & 31),
    "v_lshl_or_b32 v0, v4, v6, v8": lambda a, b, c: a << (b & 31) | c,
    "v_and_or_b32 v0, v4, v6, v8": lambda a, b, c: a & b | c,
    "v_or3_b32 v0, v4, v6, v8": lambda a, b, c: a | b | c,
    "v_xad_u32 v0, v4, v6, v8": lambda a, b, c: (a ^ b) + c,
    "v_bfe_u32 v0, v4, v6, v8": bitfield,
    "v_bfe_i32 v0, v4, v6, v8": bitfield_signed,
    "v_bfi_b32 v0, v4, v6, v8": lambda a, b, c: a & b | ~a & c,
    "v_alignbit_b32 v0, v4, v6, v8": lambda a, b, c: (a << 32 | b) >> (c & 31),
    "v_alignbyte_b32 v0, v4, v6, v8": lambda a, b, c: (a << 32 | b) >> 8 * (c & 3),
    "v_perm_b32 v0, v4, v6, v8": permuted_bytes,
    "v_med3_i32 v0, v4, v6, v8": lambda *x: sorted(map(signed, x))[1],
    "v_max3_u32 v0, v4, v6, v8": max,
    "v_min3_i32 v0, v4, v6, v8": lambda *x: min(map(signed, x)),
    "v_mad_u32_u24 v0, v4, v6, v8": lambda a, b, c: (a & 0xFFFFFF) * (b & 0xFFFFFF) + c,
    "v_mad_u32_u16 v0, v4, v6, v8": lambda a, b, c: (a & 0xFFFF) * (b & 0xFFFF) + c,
    "v_sad_u8 v0, v4, v6, v8": lambda a, b, c: (
        sum(abs(x - y) for x, y in zip(a.to_bytes(4, "big"), b.to_bytes(4, "big"), strict=True)) + c
    ),
    "v_bitop3_b32 v0, v4, v6, v8 bitop3:0xca": lambda a, b, c: a & b | ~a & c,
    "v_bitop3_b32 v0, v4, v6, v8 bitop3:0x96": lambda a, b, c: a ^ b ^ c,
    "v_ashr_pk_i8_i32 v0, v4, v6, v8": lambda a, b, c: (
        0xA5A50000
        | (max(min(signed(a) >> (c & 31), 127), -128) & 255)
        | (max(min(signed(b) >> (c & 31), 127), -128) & 255) << 8
    ),
    "v_mov_b32_sdwa v0, v4 dst_sel:WORD_1 dst_unused:UNUSED_PRESERVE src0_sel:BYTE_2": lambda a: (
        0xA5A5 | (a >> 16 & 255) << 16
    ),
    "v_add_u32_sdwa v0, v4, sext(v6) dst_sel:DWORD src0_sel:WORD_1 src1_sel:BYTE_1": lambda a, b: (
        (a >> 16) + signed(b >> 8 & 255, 8)
    ),
}


@pytest.mark.parametrize("text", INTEGER)
def test_integer(text):
    count = operand_count(text)
    values = U32 if count < 3 else U32[::2] + [0x0C0D0803, 0x07050301]
    cases = list(itertools.product(values, repeat=count))
    got, _ = over(text, cases)
    for case, g in zip(cases, got, strict=True):
        assert g == INTEGER[text](*case) & M32, (text, [hex(x) for x in case], hex(g))


INT16 = {
    "v_sub_u16": lambda a, b: a - b,
    "v_max_u16": max,
    "v_min_u16": min,
    "v_lshrrev_b16": lambda a, b: b >> (a & 15),
    "v_max_i16": lambda a, b: max(signed(a, 16), signed(b, 16)),
    "v_min_i16": lambda a, b: min(signed(a, 16), signed(b, 16)),
    "v_mul_lo_u16": lambda a, b: a * b,
    "v_lshlrev_b16": lambda a, b: b << (a & 15),
    "v_ashrrev_i16": lambda a, b: signed(b, 16) >> (a & 15),
    "v_add_u16": lambda a, b: a + b,
    "v_add_i16": lambda a, b: a + b,
    "v_sub_i16": lambda a, b: a - b,
}


@pytest.mark.parametrize("op", INT16)
def test_packed_and_single_int16(op):
    """The 16-bit form clears the high half; the packed form works on both halves, here crossed by
    op_sel."""
    values = [0, 1, 15, 16, 0x7FFF, 0x8000, 0xFFFF, 0x1234]
    cases = [
        (a | b << 16, c | d << 16)
        for a, b, c, d in itertools.product(values[::2], values, values, values[::3])
    ]
    fn = INT16[op]
    single, _ = over(f"{op} v0, v4, v6", cases)
    packed, _ = over(f"v_pk_{op[2:]} v0, v4, v6 op_sel:[1,0] op_sel_hi:[0,1]", cases)
    for (x, y), s, p in zip(cases, single, packed, strict=True):
        assert s == fn(x & 0xFFFF, y & 0xFFFF) & 0xFFFF
        assert p == (fn(x >> 16, y & 0xFFFF) & 0xFFFF) | (fn(x & 0xFFFF, y >> 16) & 0xFFFF) << 16


def leading_copies(x):
    """Copies of the sign bit at the top, all ones where every bit is a copy."""
    return -1 if x in (0, M32) else 32 - (x ^ M32 if x >> 31 else x).bit_length()


SCALAR = {
    "s_not_b32 s4, s2": lambda a, b: ~a,
    "s_andn2_b32 s4, s2, s3": lambda a, b: a & ~b,
    "s_orn2_b32 s4, s2, s3": lambda a, b: a | ~b,
    "s_nand_b32 s4, s2, s3": lambda a, b: ~(a & b),
    "s_nor_b32 s4, s2, s3": lambda a, b: ~(a | b),
    "s_xnor_b32 s4, s2, s3": lambda a, b: ~(a ^ b),
    "s_bcnt1_i32_b32 s4, s2": lambda a, b: a.bit_count(),
    "s_brev_b32 s4, s2": lambda a, b: int(f"{a:032b}"[::-1], 2),
    "s_sext_i32_i8 s4, s2": lambda a, b: signed(a & 255, 8),
    "s_sext_i32_i16 s4, s2": lambda a, b: signed(a & 0xFFFF, 16),
    "s_flbit_i32 s4, s2": lambda a, b: leading_copies(a),
    "s_ff1_i32_b64 s4, s[2:3]": lambda a, b: (
        ((a | b << 32) & -(a | b << 32)).bit_length() - 1 if a | b else -1
    ),
    "s_flbit_i32_b64 s4, s[2:3]": lambda a, b: 64 - (a | b << 32).bit_length() if a | b else -1,
    "s_min_u32 s4, s2, s3": lambda a, b: min(a, b),
    "s_max_u32 s4, s2, s3": lambda a, b: max(a, b),
    "s_min_i32 s4, s2, s3": lambda a, b: min(signed(a), signed(b)),
    "s_mul_hi_i32 s4, s2, s3": lambda a, b: signed(a) * signed(b) >> 32,
    "s_mul_i32 s4, s2, s3": lambda a, b: a * b,
    "s_abs_i32 s4, s2": lambda a, b: abs(signed(a)),
    "s_lshl_b32 s4, s2, s3": lambda a, b: a << (b & 31),
    "s_lshr_b32 s4, s2, s3": lambda a, b: a >> (b & 31),
    "s_ashr_i32 s4, s2, s3": lambda a, b: signed(a) >> (b & 31),
    "s_bfm_b32 s4, s2, s3": lambda a, b: ((1 << (a & 31)) - 1) << (b & 31),
    "s_pack_lh_b32_b16 s4, s2, s3": lambda a, b: a & 0xFFFF | b & 0xFFFF0000,
    "s_pack_hh_b32_b16 s4, s2, s3": lambda a, b: a >> 16 | b & 0xFFFF0000,
    "s_movk_i32 s4, 0xffe9": lambda a, b: -23,
    "s_movk_i32 s4, 0x7fff": lambda a, b: 0x7FFF,
    "s_addk_i32 s2, 0xffe9": lambda a, b: a - 23,
    "s_mulk_i32 s2, 0xffe9": lambda a, b: a * -23,
    "s_bfe_u64 s[4:5], s[2:3], 0xc001c": lambda a, b: (a | b << 32) >> 28 & 0xFFF,
    "s_ashr_i64 s[4:5], s[2:3], 3": lambda a, b: signed(a | b << 32, 64) >> 3,
    "s_brev_b64 s[4:5], s[2:3]": lambda a, b: int(f"{a | b << 32:064b}"[::-1], 2),
    "s_not_b64 s[4:5], s[2:3]": lambda a, b: ~(a | b << 32),
}


@pytest.mark.parametrize("text", SCALAR)
def test_scalar_unit(text):
    cases = list(itertools.product(U32, repeat=2))
    a, b = zip(*cases, strict=True)
    out = Bench([text], s={2: a, 3: b}, waves=len(cases)).m.scalar
    for i, (x, y) in enumerate(cases):
        first, wide = (2 if "k_i32 s2" in text else 4), "s[4:5]" in text
        got = int(out[first][i]) | (int(out[5][i]) << 32 if wide else 0)
        assert got == SCALAR[text](x, y) & (1 << 64 if wide else 1 << 32) - 1, (
            text,
            hex(x),
            hex(y),
        )


def test_scalar_condition_bit():
    """SCC: carry, signed overflow, or a result that is not 0."""
    cases = list(itertools.product(U32, repeat=2))
    a, b = zip(*cases, strict=True)
    for text, fn in (
        ("s_add_u32 s4, s2, s3", lambda x, y: x + y > M32),
        ("s_sub_u32 s4, s2, s3", lambda x, y: x < y),
        ("s_add_i32 s4, s2, s3", lambda x, y: not -(1 << 31) <= signed(x) + signed(y) < 1 << 31),
        ("s_and_b32 s4, s2, s3", lambda x, y: x & y != 0),
        ("s_min_i32 s4, s2, s3", lambda x, y: signed(x) < signed(y)),
        ("s_cmp_ge_i32 s2, s3", lambda x, y: signed(x) >= signed(y)),
        ("s_cmpk_lt_i32 s2, 0xffe9", lambda x, y: signed(x) < -23),
        ("s_cmpk_gt_u32 s2, 0xffe9", lambda x, y: x > 0xFFE9),
        ("s_cmp_gt_u32 s2, s3", lambda x, y: x > y),
        ("s_bitcmp0_b32 s2, s3", lambda x, y: not x >> (y & 31) & 1),
    ):
        got = Bench([text], s={2: a, 3: b}, waves=len(cases)).m.scc
        assert got.tolist() == [fn(x, y) for x, y in cases], text


WIDE = [
    0,
    1,
    0xFFFFFFFF,
    0x100000000,
    0x7FFFFFFFFFFFFFFF,
    0x8000000000000000,
    0xFFFFFFFFFFFFFFFF,
    0x123456789ABCDEF0,
]


@pytest.mark.parametrize(
    "text, oracle",
    [
        ("v_lshlrev_b64 v[0:1], v4, v[6:7]", lambda a, b: b << (a & 63)),
        ("v_lshrrev_b64 v[0:1], v4, v[6:7]", lambda a, b: b >> (a & 63)),
        ("v_ashrrev_i64 v[0:1], v4, v[6:7]", lambda a, b: signed(b, 64) >> (a & 63)),
        ("v_lshl_add_u64 v[0:1], v[4:5], v6, v[8:9]", lambda a, b, c: (a << (b & 63)) + c),
        ("v_mad_u64_u32 v[0:1], vcc, v4, v6, v[8:9]", lambda a, b, c: (a & M32) * (b & M32) + c),
        (
            "v_mad_i64_i32 v[0:1], vcc, v4, v6, v[8:9]",
            lambda a, b, c: signed(a & M32) * signed(b & M32) + c,
        ),
    ],
)
def test_integer64(text, oracle):
    cases = list(itertools.product(WIDE, repeat=operand_count(text)))
    got, _ = over(text, cases, result=2)
    assert got == [oracle(*c) & (1 << 64) - 1 for c in cases]


def test_carry_chain():
    """64-bit addition and subtraction by halves, carries through vcc."""
    cases = list(itertools.product(WIDE, repeat=2))
    columns = [lanes64(c)[0] for c in zip(*cases, strict=True)]
    regs = {
        4: columns[0] & M32,
        5: columns[0] >> np.uint64(32),
        6: columns[1] & M32,
        7: columns[1] >> np.uint64(32),
    }
    for add, low, high in (
        (1, "v_add_co_u32_e32", "v_addc_co_u32_e32"),
        (-1, "v_sub_co_u32_e32", "v_subb_co_u32_e32"),
    ):
        b = Bench([f"{low} v0, vcc, v4, v6", f"{high} v1, vcc, v5, v7, vcc"], regs)
        got = b.v(0).astype(object) + (b.v(1).astype(object) << 32)
        assert [int(x) for x in got[: len(cases)]] == [
            a + add * c & (1 << 64) - 1 for a, c in cases
        ]


# ------------------------------------------------------------------------------------------ float
# instructions


TINY = Fraction(1, 2**126)  # the smallest normal float32


def exact(fn):
    """An oracle over finite operands in exact rationals; others are left to the IEEE cases
    below."""

    def oracle(*bits):
        if any((b >> 23 & 255) == 255 for b in bits):
            return None
        r = fn(*[Fraction(as_f32(b)) for b in bits])
        return round_f32(r) if r else None  # the sign of a zero is tested below

    return oracle


@pytest.mark.parametrize(
    "text, oracle",
    [
        ("v_add_f32_e32 v0, v4, v6", exact(lambda a, b: a + b)),
        ("v_sub_f32_e32 v0, v4, v6", exact(lambda a, b: a - b)),
        ("v_mul_f32_e32 v0, v4, v6", exact(lambda a, b: a * b)),
        ("v_fma_f32 v0, v4, v6, v8", exact(lambda a, b, c: a * b + c)),
        ("v_fma_f32 v0, -v4, |v6|, -v8", exact(lambda a, b, c: -a * abs(b) - c)),
        ("v_pk_fma_f32 v[0:1], v[4:5], v[6:7], v[8:9]", exact(lambda a, b, c: a * b + c)),
        ("v_fmaak_f32 v0, v4, v6, 0x3e800000", exact(lambda a, b: a * b + Fraction(1, 4))),
        ("v_fmamk_f32 v0, v4, 0x3e800000, v6", exact(lambda a, b: a * Fraction(1, 4) + b)),
        (
            "v_rcp_f32_e32 v0, v4",
            exact(lambda a: 1 / a if a and abs(1 / a) >= TINY <= abs(a) else 0),
        ),
        ("v_cvt_f32_i32_e32 v0, v4", lambda a: round_f32(Fraction(signed(a)))),
        ("v_cvt_f32_u32_e32 v0, v4", lambda a: round_f32(Fraction(a))),
        ("v_cvt_f32_ubyte2_e32 v0, v4", lambda a: round_f32(Fraction(a >> 16 & 255))),
    ],
)
def test_float_exact(text, oracle):
    rng = np.random.default_rng(1)
    values = F32 if "cvt" not in text else U32
    near = (
        rng.integers(0x3F000000, 0x40800000, 40).tolist() + rng.integers(0, 0x01000000, 20).tolist()
    )
    count = operand_count(text)
    cases = list(itertools.product(values, repeat=count)) + [
        tuple(rng.choice(near, count).tolist()) for _ in range(600)
    ]
    got, _ = over(text, cases)
    for case, g in zip(cases, got, strict=True):
        expected = oracle(*case)
        assert expected is None or g == expected, (
            text,
            [hex(x) for x in case],
            hex(g),
            hex(expected),
        )


def test_fma_rounds_once():
    """a b + c where rounding the float64 sum first lands on a float32 tie and then goes the wrong
    way."""
    a, b = 0x3F800001, 0x3F800001  # (1 + u)^2 = 1 + 2u + u^2, u = 2^-23
    cases = [(a, b, 0x27000000 | i) for i in range(64)] + [
        (a, a ^ 1 << 31, 0x3F800000 + i) for i in range(64)
    ]
    cases += [(0x4B800001, 0x3F800001, 0xB4000000 + i) for i in range(64)]
    got, _ = over("v_fma_f32 v0, v4, v6, v8", cases)
    for case, g in zip(cases, got, strict=True):
        x, y, z = (Fraction(as_f32(c)) for c in case)
        assert g == round_f32(x * y + z)


INF, NINF, NAN, P0, N0, ONE = 0x7F800000, 0xFF800000, 0x7FC00000, 0, 0x80000000, 0x3F800000


@pytest.mark.parametrize(
    "text, cases",
    [
        (
            "v_add_f32_e32 v0, v4, v6",
            [(INF, NINF, NAN), (N0, N0, N0), (N0, P0, P0), (NAN, ONE, NAN), (INF, ONE, INF)],
        ),
        ("v_mul_f32_e32 v0, v4, v6", [(INF, P0, NAN), (N0, ONE, N0), (NINF, NINF, INF)]),
        ("v_mul_legacy_f32_e32 v0, v4, v6", [(INF, P0, P0), (NAN, P0, P0)]),
        (
            "v_max_f32_e32 v0, v4, v6",
            [(P0, N0, P0), (N0, P0, P0), (NAN, ONE, ONE), (ONE, NAN, ONE), (NAN, NAN, NAN)],
        ),
        (
            "v_min_f32_e32 v0, v4, v6",
            [(P0, N0, N0), (N0, P0, N0), (NAN, ONE, ONE), (NINF, ONE, NINF)],
        ),
        ("v_maximum3_f32 v0, v4, v6, v6", [(NAN, ONE, NAN), (ONE, INF, INF), (N0, P0, P0)]),
        ("v_minimum3_f32 v0, v4, v6, v6", [(ONE, NAN, NAN), (P0, N0, N0)]),
        ("v_med3_f32 v0, v4, v6, 1.0", [(P0, INF, ONE), (0x3F000000, N0, 0x3F000000)]),
        (
            "v_add_f32_e64 v0, v4, v6 clamp",
            [(ONE, ONE, ONE), (0xBF800000, P0, P0), (NAN, ONE, P0), (0x3F000000, P0, 0x3F000000)],
        ),
        ("v_add_f32_e64 v0, v4, v6 mul:2", [(ONE, ONE, 0x40800000), (INF, ONE, INF)]),
        ("v_add_f32_e64 v0, v4, v6 div:2", [(ONE, ONE, ONE)]),
        (
            "v_div_fixup_f32 v0, v8, v4, v6",
            [(P0, P0, NAN), (P0, ONE, INF), (N0, ONE, NINF), (INF, ONE, P0), (INF, INF, NAN)],
        ),
    ],
)
def test_float_special(text, cases):
    got, _ = over(text, [(a, b, ONE) for a, b, _ in cases])
    for (a, b, expected), g in zip(cases, got, strict=True):
        nan = math.isnan(as_f32(expected)) and math.isnan(as_f32(g))
        assert nan or g == expected, (text, hex(a), hex(b), hex(g))


@pytest.mark.parametrize(
    "op, oracle",
    [
        ("exp", lambda x: 2.0**x),
        ("log", math.log2),
        ("sqrt", math.sqrt),
        ("rsq", lambda x: 1 / math.sqrt(x)),
        ("sin", lambda x: math.sin(2 * math.pi * x)),
        ("cos", lambda x: math.cos(2 * math.pi * x)),
        ("floor", math.floor),
        ("ceil", math.ceil),
        ("trunc", math.trunc),
        ("rndne", round),
        ("fract", lambda x: x - math.floor(x)),
    ],
)
def test_unary_float(op, oracle):
    values = [0.5, 1.0, 1.5, 2.5, 3.25, 100.75, 1e-3, 7.0, 0.1] + (
        [-0.5, -1.5, -2.5] if op not in ("log", "sqrt", "rsq") else []
    )
    bits = [struct.unpack("<I", struct.pack("<f", x))[0] for x in values]
    got, _ = over(f"v_{op}_f32_e32 v0, v4", [(b,) for b in bits])
    for b, g in zip(bits, got, strict=True):
        expected = oracle(as_f32(b))
        assert abs(as_f32(g) - expected) <= abs(expected) * 2.0**-23 + 1e-16


def test_unary_float_special():
    for text, x, expected in (
        ("v_exp_f32_e32 v0, v4", NINF, P0),
        ("v_exp_f32_e32 v0, v4", 0xC3000000, P0),
        ("v_log_f32_e32 v0, v4", P0, NINF),
        ("v_log_f32_e32 v0, v4", 1, NINF),
        ("v_rcp_f32_e32 v0, v4", N0, NINF),
        ("v_rcp_f32_e32 v0, v4", INF, P0),
        ("v_frexp_exp_i32_f32_e32 v0, v4", 0x41000000, 4),
        ("v_frexp_exp_i32_f32_e32 v0, v4", INF, 0),
        ("v_frexp_mant_f32_e32 v0, v4", 0xC1000000, 0xBF000000),
    ):
        assert over(text, [(x,)])[0] == [expected], text


@pytest.mark.parametrize("t, lo, hi", [("i32", -(2**31), 2**31 - 1), ("u32", 0, 2**32 - 1)])
def test_float_to_int_saturates(t, lo, hi):
    values = [
        0.0,
        -0.0,
        0.99,
        -0.99,
        1.5,
        -1.5,
        2147483520.0,
        2147483648.0,
        4294967040.0,
        1e20,
        -1e20,
        -2147483648.0,
    ]
    bits = [struct.unpack("<I", struct.pack("<f", x))[0] for x in values] + [INF, NINF, NAN]
    got, _ = over(f"v_cvt_{t}_f32_e32 v0, v4", [(b,) for b in bits])
    expected = [max(lo, min(hi, math.trunc(as_f32(b)))) for b in bits[:-3]] + [hi, lo, 0]
    assert got == [e & M32 for e in expected]


def test_compare_and_class():
    cases = list(itertools.product(F32, repeat=2))
    for name, fn in (
        ("lt", lambda a, b: a < b),
        ("nlt", lambda a, b: not a < b),
        ("eq", lambda a, b: a == b),
        ("lg", lambda a, b: a < b or a > b),
        ("neq", lambda a, b: a != b),
        ("o", lambda a, b: a == a and b == b),
        ("u", lambda a, b: a != a or b != b),
        ("nge", lambda a, b: not a >= b),
    ):
        _, vcc = over(f"v_cmp_{name}_f32_e32 vcc, v4, v6", cases)
        assert vcc == [int(fn(as_f32(a), as_f32(b))) for a, b in cases], name
    kinds = [
        (0x7F800001, 0),
        (NAN, 1),
        (NINF, 2),
        (0xBF800000, 3),
        (0x80000001, 4),
        (N0, 5),
        (P0, 6),
        (1, 7),
        (ONE, 8),
        (INF, 9),
    ]
    for bits, kind in kinds:
        _, vcc = over(
            "v_cmp_class_f32_e32 vcc, v4, v6", [(bits, 1 << kind), (bits, ~(1 << kind) & 0x3FF)]
        )
        assert vcc == [1, 0]


COMPARISONS = {
    "lt": lambda a, b: a < b,
    "eq": lambda a, b: a == b,
    "le": lambda a, b: a <= b,
    "gt": lambda a, b: a > b,
    "ge": lambda a, b: a >= b,
    "ne": lambda a, b: a != b,
}
COMPARED = {
    "u16": (U32, lambda x: x & 0xFFFF),
    "i16": (U32, lambda x: signed(x & 0xFFFF, 16)),
    "u32": (U32, lambda x: x),
    "i32": (U32, signed),
    "u64": (WIDE, lambda x: x),
    "i64": (WIDE, lambda x: signed(x, 64)),
}


@pytest.mark.parametrize("kind", COMPARED)
def test_integer_comparisons(kind):
    values, meaning = COMPARED[kind]
    cases = list(itertools.product(values, repeat=2))
    registers = "v[4:5], v[6:7]" if kind.endswith("64") else "v4, v6"
    for name, fn in COMPARISONS.items():
        _, vcc = over(f"v_cmp_{name}_{kind}_e32 vcc, {registers}", cases)
        assert vcc == [int(fn(meaning(a), meaning(b))) for a, b in cases], name


def test_double_precision_instructions():
    values = [0.0, -0.0, 1.5, -2.5, 1e300, -1e-300, 5e-324, math.inf, 3.0]
    raw = [struct.unpack("<Q", struct.pack("<d", x))[0] for x in values]
    pairs = list(itertools.product(raw, repeat=2))

    def floats(bits):
        return np.array(bits, np.uint64).view(np.float64)

    with np.errstate(all="ignore"):
        a, b = (floats(c) for c in zip(*pairs, strict=True))
        for op, expected in (
            ("add", a + b),
            ("mul", a * b),
            ("max", np.fmax(a, b)),
            ("min", np.fmin(a, b)),
        ):
            got = floats(over(f"v_{op}_f64 v[0:1], v[4:5], v[6:7]", pairs, result=2)[0])
            assert ((got == expected) | (np.isnan(got) & np.isnan(expected))).all(), op
        x = floats(raw)
        for op, expected in (
            ("sqrt", np.sqrt(x)),
            ("ceil", np.ceil(x)),
            ("floor", np.floor(x)),
            ("rndne", np.rint(x)),
        ):
            got = floats(over(f"v_{op}_f64_e32 v[0:1], v[4:5]", [(r,) for r in raw], result=2)[0])
            assert ((got == expected) | (np.isnan(got) & np.isnan(expected))).all(), op


# ------------------------------------------------------------------------------------------
# conversions

FP4 = [0, 0.5, 1, 1.5, 2, 3, 4, 6]
FP4 += [-x for x in FP4]
SMALL = {"fp8": torch.float8_e4m3fn, "bf8": torch.float8_e5m2}


def bits_of(values, dtype):
    """torch values -> list of register bits."""
    t = torch.as_tensor(values).to(dtype)
    return (
        (t.view(torch.int32).long() & M32).tolist()
        if t.element_size() == 4
        else (t.view(torch.int16).long() & 0xFFFF).tolist()
    )


@pytest.mark.parametrize("fmt", SMALL)
def test_small_float_decode(fmt):
    """All 256 codes, through the plain, SDWA and scaled conversions."""
    expected = torch.arange(256, dtype=torch.uint8).view(SMALL[fmt]).float()
    codes = [(c << 8 | 0x11,) for c in range(256)]
    got = over(f"v_cvt_f32_{fmt}_sdwa v0, v4 src0_sel:BYTE_1", codes)[0]
    assert_same_floats(got, expected)
    scale = 0x3F800000 + (3 << 23) + 12345  # 2^3; the mantissa must not count
    got = over(
        f"v_cvt_scalef32_f32_{fmt} v0, v4, v6 op_sel:[1,0,0]", [(c[0], scale) for c in codes]
    )[0]
    assert_same_floats(got, expected * 8)
    got = over(
        f"v_cvt_scalef32_pk_f32_{fmt} v[0:1], v4, v6 op_sel:[1,0,0]",
        [(c << 24, ONE) for c in range(256)],
        result=2,
    )[0]
    assert_same_floats([g >> 32 for g in got], expected)
    for wide, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        got = over(
            f"v_cvt_scalef32_pk_{wide}_{fmt} v0, v4, v6", [(c << 8, ONE) for c in range(256)]
        )[0]
        high = (
            torch.tensor([g >> 16 for g in got], dtype=torch.int32)
            .to(torch.int16)
            .view(dtype)
            .float()
        )
        assert torch.equal(high.nan_to_num(7), expected.to(dtype).float().nan_to_num(7))


def assert_same_floats(bits, expected):
    got = torch.tensor([as_f32(b) for b in bits])
    assert torch.equal(got.isnan(), expected.isnan()) and torch.equal(
        got.nan_to_num(), expected.nan_to_num()
    )
    assert torch.equal(torch.signbit(got[~got.isnan()]), torch.signbit(expected[~got.isnan()]))


@pytest.mark.parametrize("how", [0, 1, 2, 3])
def test_conversions_to_f16_obey_the_rounding_mode(how):
    """Against exact fractions: every f16 neighbour pair's midpoint and quarters, denormals,
    overflow. The mode is a wave's own, and is set back."""
    codes = torch.arange(0, 0x7C00, 37).short().view(torch.float16).float()
    gap = torch.arange(1, 0x7C01, 37).short().view(torch.float16).float().nan_to_num(posinf=65536.0)
    x = torch.cat(
        [codes, codes + (gap - codes) / 4, (codes + gap) / 2, codes + (gap - codes) * 0.75]
    )
    x = torch.cat([x, torch.tensor([65504.0, 65519.0, 65520.0, 1e30, 1e-30, math.inf])])
    x = torch.cat([x, -x])
    got = []
    for row in lanes64(bits_of(x, torch.float32)):
        b = Bench(
            [
                f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 2, 2), {how}",
                "v_cvt_f16_f32_e32 v0, v4",
                "v_cvt_pk_f16_f32 v1, v4, v4",
                "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 2, 2), 0",
                "v_cvt_f16_f32_e32 v2, v4",
            ],
            {0: 0, 1: 0, 2: 0, 4: row},
        )
        assert np.array_equal(b.v(0) & 0xFFFF, b.v(1) & 0xFFFF)
        assert np.array_equal(b.v(1) & 0xFFFF, b.v(1) >> 16)
        got += list(zip((b.v(0) & 0xFFFF).tolist(), (b.v(2) & 0xFFFF).tolist(), strict=True))
    finite = torch.arange(0x7C00).short().view(torch.float16).double().tolist()
    for value, (found, nearest) in zip(x.tolist(), got, strict=False):
        as_value = [struct.unpack("<e", struct.pack("<H", bits))[0] for bits in (found, nearest)]
        assert as_value[1] == float(torch.tensor(value).half())
        below = finite[bisect.bisect_right(finite, abs(value)) - 1]
        above = (
            below
            if below == abs(value)
            else next((v for v in finite[bisect.bisect_right(finite, abs(value)) :][:1]), math.inf)
        )
        outwards = above if not math.isinf(value) else math.inf
        below = math.inf if math.isinf(value) else below
        towards_zero = how == 3 or (how == 1) == (value < 0)
        want = math.copysign(below if towards_zero else outwards, value)
        assert as_value[0] == (want if how else as_value[1]), value


@pytest.mark.parametrize("instruction", [
    "v_add_f16_e32 v0, v4, v4", "v_fma_f64 v[0:1], v[4:5], v[4:5], v[4:5]",
    "v_pk_add_f16 v0, v4, v4", "v_cvt_f16_u16_e32 v0, v4",
])  # fmt: skip
def test_what_does_not_obey_the_rounding_mode_raises(instruction):
    mode = "s_setreg_imm32_b32 hwreg(HW_REG_MODE, 2, 2), {}"
    Bench([mode.format(3), mode.format(0), instruction], {4: ONE, 5: ONE})
    with pytest.raises(gfx950.Unsupported, match="rounding mode"):
        Bench([mode.format(3), instruction], {4: ONE, 5: ONE})
    with pytest.raises(gfx950.Unsupported, match="float32's rounding"):
        Bench(["s_setreg_imm32_b32 hwreg(HW_REG_MODE, 0, 2), 3"], {})


@pytest.mark.parametrize("fmt, top", [("fp8", 448.0), ("bf8", 57344.0)])
@pytest.mark.parametrize("saturate", [False, True])
def test_small_float_encode(fmt, top, saturate):
    """Every code, every midpoint between two codes and its neighbours, overflow and specials. MODE
    bit 23 saturates."""
    codes = torch.arange(127 if fmt == "fp8" else 124, dtype=torch.uint8).view(SMALL[fmt]).float()
    mid = (codes[1:] + codes[:-1]) / 2
    x = torch.cat(
        [
            codes,
            mid,
            torch.nextafter(mid, mid + 1),
            torch.nextafter(mid, mid - 1),
            torch.tensor([top * 1.03, top * 1.07, 1e30, math.inf, math.nan, 1e-30]),
        ]
    )
    x = torch.cat([x, -x])
    bits = bits_of(x, torch.float32)
    columns = lanes64(bits)
    got = []
    for row in columns:
        b = Bench(
            [
                f"s_setreg_imm32_b32 hwreg(HW_REG_MODE, 23, 1), {int(saturate)}",
                f"v_cvt_pk_{fmt}_f32 v0, v4, v4",
                f"v_cvt_scalef32_pk_{fmt}_f32 v1, v4, v4, v5 op_sel:[0,0,0,1]",
            ],
            {0: 0x77770000, 1: 0x7777, 4: row, 5: ONE},
        )
        assert np.array_equal(b.v(0) >> 16, np.full(64, 0x7777)) and np.array_equal(
            b.v(1) & 0xFFFF, np.full(64, 0x7777)
        )
        assert np.array_equal(b.v(0) & 0xFFFF, b.v(1) >> 16) and np.array_equal(
            b.v(0) & 255, b.v(0) >> 8 & 255
        )
        got += (b.v(0) & 255).tolist()
    expected = (x.clamp(-top, top) if saturate else x).to(SMALL[fmt]).float()
    if fmt == "fp8" and not saturate:
        expected[x.abs() > 464] = math.nan  # e4m3 has no infinity: past the last midpoint lies NaN
    assert_same_floats(
        bits_of(torch.tensor(got[: len(x)], dtype=torch.uint8).view(SMALL[fmt]), torch.float32),
        expected,
    )


def test_fp4_conversions():
    """Every code both ways, ties to even, saturation at 6, op_sel bytes, the scale's exponent."""
    for sel in range(4):
        text = f"v_cvt_scalef32_pk_f32_fp4 v[0:1], v4, v6 op_sel:[{sel & 1},{sel >> 1},0]"
        got = over(
            text, [((c | (15 - c) << 4) << 8 * sel, 0x40000000) for c in range(16)], result=2
        )[0]
        assert [as_f32(g & M32) for g in got] == [2 * v for v in FP4]
        assert [as_f32(g >> 32) for g in got] == [2 * v for v in FP4[::-1]]
    x = [
        0.24,
        0.25,
        0.26,
        0.75,
        1.25,
        1.75,
        2.5,
        3.5,
        5.0,
        5.01,
        7.0,
        1e9,
        -0.75,
        -9.0,
        math.inf,
        -0.0,
    ]
    y = [0, 0, 0.5, 1, 1, 2, 2, 4, 4, 6, 6, 6, -1, -6, 6, -0.0]
    for sel in range(4):
        text = f"v_cvt_scalef32_pk_fp4_f32 v0, v4, v6, v8 op_sel:[0,0,{sel & 1},{sel >> 1}]"
        got = over(
            text, [(b, ONE, 0x40800000) for b in bits_of([4 * v for v in x], torch.float32)]
        )[0]
        assert [FP4[g >> 8 * sel & 15] for g in got] == y
        # 1 / 4 -> 0
        assert all(
            (g >> 8 * sel & 0xF0) == 0 and g | 255 << 8 * sel == 0xA5A5A5A5 | 255 << 8 * sel
            for g in got
        )


def test_bf16_f16_conversions():
    x = torch.tensor(
        [as_f32(b) for b in F32]
        + [1.00390625, 1.01171875, 65504.0, 65519.0, 65520.0, 6e-8, 2.98e-8]
    )
    bits = bits_of(x, torch.float32)
    got = over("v_cvt_pk_bf16_f32 v0, v4, v6", [(b, b) for b in bits])[0]
    finite = ~x.isnan()
    expected = torch.tensor(bits_of(x, torch.bfloat16))
    assert torch.equal(torch.tensor(got)[finite], (expected | expected << 16)[finite])
    assert all(g & 0x7F80 == 0x7F80 and g & 0x7F for g, n in zip(got, x.isnan(), strict=True) if n)
    got = over("v_cvt_f16_f32_e32 v0, v4", [(b,) for b in bits])[0]
    assert torch.equal(torch.tensor(got)[finite], torch.tensor(bits_of(x, torch.float16))[finite])
    halves = [(h,) for h in range(0, 65536, 97)]
    got = over("v_cvt_f32_f16_e32 v0, v4", halves)[0]
    assert_same_floats(
        got,
        torch.tensor([h[0] for h in halves], dtype=torch.int32)
        .to(torch.int16)
        .view(torch.float16)
        .float(),
    )


def test_packed_and_mixed_f16():
    a, b, c = (torch.randn(64, 2, dtype=torch.float16) for _ in range(3))
    regs = {4 + 2 * i: t.view(torch.int32)[:, 0].numpy() for i, t in enumerate((a, b, c))}
    out = Bench(
        [
            "v_pk_fma_f16 v0, v4, v6, v8 op_sel:[1,0,0] op_sel_hi:[0,1,1] neg_lo:[0,0,1]",
            "v_pk_add_f16 v1, v4, 2.0 op_sel_hi:[1,0]",
            "v_fma_mix_f32 v2, v4, v6, v8 op_sel:[1,0,0] op_sel_hi:[1,1,1]",
        ],
        regs,
    )
    lo = (a[:, 1].double() * b[:, 0].double() - c[:, 0].double()).half()
    hi = (a[:, 0].double() * b[:, 1].double() + c[:, 1].double()).half()
    assert torch.equal(
        torch.from_numpy(out.v(0).view(np.float16).reshape(64, 2)), torch.stack([lo, hi], 1)
    )
    assert torch.equal(torch.from_numpy(out.v(1).view(np.float16).reshape(64, 2)), a + 2)
    mixed = (a[:, 1].double() * b[:, 0].double() + c[:, 0].double()).float()
    assert torch.equal(torch.from_numpy(out.v(2).view(np.float32)), mixed)


F16 = [
    0,
    0x8000,
    1,
    0x83FF,
    0x0400,
    0x3C00,
    0x3C01,
    0xBE00,
    0x7BFF,
    0xFBFF,
    0x7C00,
    0xFC00,
    0x7E12,
    0x4248,
    0x2E66,
]


@pytest.mark.parametrize(
    "op, oracle",
    [
        ("add_f16", lambda a, b, c: a + b),
        ("sub_f16", lambda a, b, c: a - b),
        ("subrev_f16", lambda a, b, c: b - a),
        ("mul_f16", lambda a, b, c: a * b),
        ("fma_f16", lambda a, b, c: a * b + c),
        ("max_f16", lambda a, b, c: torch.fmax(a, b)),
        ("min_f16", lambda a, b, c: torch.fmin(a, b)),
        ("rcp_f16", lambda a, b, c: 1 / a),
        ("sqrt_f16", lambda a, b, c: a.sqrt()),
        ("rsq_f16", lambda a, b, c: a.rsqrt()),
        ("exp_f16", lambda a, b, c: torch.exp2(a)),
        ("log_f16", lambda a, b, c: torch.log2(a)),
        ("floor_f16", lambda a, b, c: a.floor()),
        ("ceil_f16", lambda a, b, c: a.ceil()),
        ("trunc_f16", lambda a, b, c: a.trunc()),
        ("rndne_f16", lambda a, b, c: a.round()),
        ("cvt_f16_u16", None),
        ("cvt_f16_i16", None),
        ("max3_f16", None),
        ("med3_f16", None),
        ("pk_mul_f16", lambda a, b, c: a * b),
        ("pk_max_f16", lambda a, b, c: torch.fmax(a, b)),
        ("pk_min_f16", lambda a, b, c: torch.fmin(a, b)),
    ],
)
def test_f16(op, oracle):
    """Against float64 rounded once; a result of three registers keeps the high half of its
    destination."""
    cases = list(itertools.product(F16, repeat=3))[::3]
    values = [
        torch.tensor(c, dtype=torch.int32).to(torch.int16).view(torch.float16).double()
        for c in zip(*cases, strict=True)
    ]
    bits = torch.tensor([c[0] for c in cases])
    if op in ("cvt_f16_u16", "cvt_f16_i16"):
        expected = (bits.double() if op[-3] == "u" else bits.to(torch.int16).double()).half()
    elif op == "max3_f16":
        expected = torch.fmax(torch.fmax(*values[:2]), values[2]).half()
    elif op == "med3_f16":
        expected = torch.stack(values).sort(0)[0][1].half()
        expected[torch.stack(values).isnan().any(0)] = math.nan  # which the check below skips
    else:
        expected = oracle(*values).half()
    count = (
        1
        if op.startswith(
            ("rcp", "sqrt", "rsq", "exp", "log", "floor", "ceil", "trunc", "rndne", "cvt")
        )
        else 3
        if op.startswith(("fma", "max3", "med3"))
        else 2
    )
    suffix = "" if count == 3 or op.startswith("pk") else "_e32"
    got, _ = over(f"v_{op}{suffix} v0, " + ", ".join(["v4", "v6", "v8"][:count]), cases)
    result = torch.tensor(got).to(torch.int32)
    high = result >> 16 & 0xFFFF
    assert (high == (0xA5A5 if count == 3 else high if op.startswith("pk") else 0)).all()
    result = result.to(torch.int16).view(torch.float16)
    same = (result == expected) | (
        expected.isnan() if op == "med3_f16" else expected.isnan() & result.isnan()
    )
    assert same.all(), (
        op,
        [cases[i] for i in (~same).nonzero().flatten()[:5]],
        result[~same][:5],
        expected[~same][:5],
    )


def test_dot2_and_wide_conversions():
    a, b, c = torch.randn(64, 2), torch.randn(64, 2), torch.randn(64)
    for fmt, dtype in (("f16", torch.float16), ("bf16", torch.bfloat16)):
        x, y = a.to(dtype), b.to(dtype)
        regs = {
            4: x.view(torch.int32)[:, 0].numpy().view(np.uint32),
            6: y.view(torch.int32)[:, 0].numpy().view(np.uint32),
            8: c.numpy().view(np.uint32),
            9: c.numpy().view(np.uint32),
        }
        out = Bench([f"v_dot2_f32_{fmt} v0, v4, v6, v8", f"v_dot2c_f32_{fmt}_e32 v9, v4, v6"], regs)
        expected = ((x.double() * y.double()).sum(1) + c).float().numpy().view(np.uint32)
        assert np.array_equal(out.v(0), expected) and np.array_equal(out.v(9), expected)
    doubles = torch.tensor([0.1, -1e300, 3.5e9, -2.5, 1e-40, math.inf], dtype=torch.float64)
    raw = doubles.view(torch.int64).tolist()
    got = over("v_cvt_f32_f64_e32 v0, v[4:5]", [(r & (1 << 64) - 1,) for r in raw])[0]
    assert got == bits_of(doubles.float(), torch.float32)
    got = over("v_cvt_u32_f64_e32 v0, v[4:5]", [(r & (1 << 64) - 1,) for r in raw])[0]
    assert got == [0, 0, 3500000000, 0, 0, M32]
    for byte in (0, 1, 3):
        got = over(f"v_cvt_f32_ubyte{byte}_e32 v0, v4", [(u,) for u in U32])[0]
        assert [as_f32(g) for g in got] == [float(u >> 8 * byte & 255) for u in U32]


def test_moves_between_register_files():
    b = Bench(
        [
            "v_accvgpr_write_b32 a3, v4",
            "v_accvgpr_mov_b32 a4, a3",
            "v_accvgpr_read_b32 v0, a4",
            "v_swap_b32 v0, v5",
            "v_pk_mov_b32 v[6:7], v[4:5], v[4:5] op_sel:[1,0]",
            "v_mov_b64_e32 v[8:9], v[6:7]",
        ],
        {4: IDS, 5: IDS + 64},
    )
    assert (
        np.array_equal(b.v(5), IDS)
        and np.array_equal(b.v(0), IDS + 64)
        and np.array_equal(b.v(64 + 4), IDS)
    )
    assert np.array_equal(b.v(8), IDS) and np.array_equal(b.v(9), IDS)


# ------------------------------------------------------------------------------------------ lanes


@pytest.mark.parametrize(
    "text, source",
    [
        ("v_mov_b32_dpp v0, v4 quad_perm:[1,0,3,2] row_mask:0xf bank_mask:0xf", IDS ^ 1),
        (
            "v_mov_b32_dpp v0, v4 row_shr:3 row_mask:0xf bank_mask:0xf",
            np.where(IDS % 16 < 3, -1, IDS - 3),
        ),
        (
            "v_mov_b32_dpp v0, v4 row_shr:3 row_mask:0xf bank_mask:0xf bound_ctrl:1",
            np.where(IDS % 16 < 3, -2, IDS - 3),
        ),
        (
            "v_mov_b32_dpp v0, v4 row_shl:1 row_mask:0xf bank_mask:0xf bound_ctrl:1",
            np.where(IDS % 16 == 15, -2, IDS + 1),
        ),
        (
            "v_mov_b32_dpp v0, v4 row_ror:8 row_mask:0x5 bank_mask:0xf",
            np.where(IDS // 16 % 2, -1, IDS ^ 8),
        ),
        (
            "v_mov_b32_dpp v0, v4 row_mirror row_mask:0xf bank_mask:0x3",
            np.where(IDS % 16 > 7, -1, IDS ^ 15),
        ),
        ("v_mov_b32_dpp v0, v4 row_half_mirror row_mask:0xf bank_mask:0xf", IDS ^ 7),
        (
            "v_mov_b32_dpp v0, v4 row_bcast:15 row_mask:0xa bank_mask:0xf",
            np.where(IDS // 16 % 2, IDS // 16 * 16 - 1, -1),
        ),
        (
            "v_mov_b32_dpp v0, v4 row_bcast:31 row_mask:0xc bank_mask:0xf",
            np.where(IDS >= 32, 31, -1),
        ),
        ("v_mov_b32_dpp v0, v4 row_newbcast:5 row_mask:0xf bank_mask:0xf", IDS // 16 * 16 + 5),
        ("ds_swizzle_b32 v0, v4 offset:swizzle(SWAP,16)", IDS ^ 16),
        ("ds_swizzle_b32 v0, v4 offset:swizzle(REVERSE,8)", IDS ^ 7),
        ("ds_swizzle_b32 v0, v4 offset:swizzle(BROADCAST,4,2)", (IDS & ~3) + 2),
        ("ds_swizzle_b32 v0, v4 offset:swizzle(QUAD_PERM,3,2,1,0)", IDS ^ 3),
        (
            'ds_swizzle_b32 v0, v4 offset:swizzle(BITMASK_PERM,"pip01")',
            (IDS & 32) | (IDS & 0b10100 | IDS & 0b01000 ^ 0b01000 | 1),
        ),
        ("ds_bpermute_b32 v0, v6, v4", (IDS * 7 + 3) % 64),
    ],
)
def test_lane_permutations(text, source):
    """-1: the lane keeps its old value, -2: it becomes 0."""
    out = Bench(
        [text, "s_waitcnt lgkmcnt(0)"], {0: 999, 4: IDS + 100, 6: (IDS * 7 + 3) % 64 * 4}
    ).v(0)
    assert out.tolist() == [999 if s == -1 else 0 if s == -2 else s + 100 for s in source.tolist()]


def test_lane_moves():
    b = Bench(
        [
            "v_readlane_b32 s4, v4, 7",
            "v_readfirstlane_b32 s5, v4",
            "v_writelane_b32 v0, s4, 9",
            "v_permlane32_swap_b32 v4, v5",
            "v_permlane16_swap_b32 v6, v7",
            "v_mbcnt_lo_u32_b32 v1, -1, 0",
            "v_mbcnt_hi_u32_b32 v1, -1, v1",
            "ds_permute_b32 v2, v8, v9",
            "s_waitcnt lgkmcnt(0)",
        ],
        {0: 1, 4: IDS, 5: IDS + 64, 6: IDS, 7: IDS + 64, 8: (63 - IDS) * 4, 9: IDS},
    )
    assert (b.s(4), b.s(5)) == (7, 0)
    assert b.v(0)[9] == 7 and b.v(0)[8] == 1
    assert b.v(4).tolist() == [*range(32), *range(64, 96)] and b.v(5).tolist() == [
        *range(32, 64),
        *range(96, 128),
    ]
    assert b.v(6)[16:32].tolist() == [*range(64, 80)] and b.v(7)[:16].tolist() == [*range(16, 32)]
    assert np.array_equal(b.v(1), IDS) and np.array_equal(b.v(2), 63 - IDS)


def test_exec_masks_writes_and_sources():
    b = Bench(
        [
            "s_mov_b64 exec, 0xf0",
            "v_mov_b32_e32 v0, v4",
            "v_readfirstlane_b32 s4, v4",
            "v_mov_b32_dpp v1, v4 row_shr:1 row_mask:0xf bank_mask:0xf",
            "v_cmp_eq_u32_e64 s[6:7], v4, v4",
            "s_and_saveexec_b64 s[8:9], 0x30",
            "v_mov_b32_e32 v2, v4",
            "v_cmpx_lt_u32_e32 vcc, 4, v4",
            "v_mov_b32_e32 v3, v4",
        ],
        {0: 7, 1: 7, 2: 7, 3: 7, 4: IDS},
    )
    assert b.v(0).tolist() == [i if 4 <= i < 8 else 7 for i in range(64)]
    assert b.s(4) == 4 and b.s64(6) == 0xF0 and b.s64(8) == 0xF0
    # lane 4's source is off
    assert b.v(1).tolist() == [i - 1 if 5 <= i < 8 else 7 for i in range(64)]
    assert b.v(2).tolist() == [i if 4 <= i < 6 else 7 for i in range(64)]
    assert b.v(3).tolist() == [5 if i == 5 else 7 for i in range(64)] and b.s64(106) == 0x20


def test_scalar():
    b = Bench(
        [
            "s_add_u32 s4, s2, s3",
            "s_addc_u32 s5, s2, 0",
            "s_sub_i32 s6, 0, s2",
            "s_bfe_u32 s7, s2, 0x80010",
            "s_bfe_i32 s8, s2, 0x80018",
            "s_lshl2_add_u32 s9, 3, 5",
            "s_ashr_i32 s10, s2, 4",
            "s_cmp_lt_i32 s2, 0",
            "s_cselect_b32 s11, 1, 2",
            "s_movk_i32 s12, 0xff00",
            "s_mul_hi_u32 s13, s2, s3",
            "s_bcnt1_i32_b64 s14, s[2:3]",
            "s_ff1_i32_b32 s15, 0x80",
            "s_flbit_i32_b32 s16, 0x80",
            "s_bitcmp1_b32 s2, 31",
            "s_cselect_b64 s[18:19], -1, 0",
            "s_pack_ll_b32_b16 s20, s2, s3",
        ],
        s={2: 0xFEDCBA98, 3: 0x80000001},
    )
    assert [b.s(i) for i in range(4, 17)] == [
        0x7EDCBA99,
        0xFEDCBA99,
        0x01234568,
        0xDC,
        0xFFFFFFFE,
        17,
        0xFFEDCBA9,
        1,
        0xFFFFFF00,
        0xFEDCBA98 * 0x80000001 >> 32,
        0xFEDCBA98.bit_count() + 2,
        7,
        24,
    ]
    assert b.s64(18) == (1 << 64) - 1 and b.s(20) == 0x0001BA98


# ------------------------------------------------------------------------------------------ matrix
# instructions

MFMA = [
    ("f32_16x16x32_bf16", 16, 32, 8),
    ("f32_32x32x16_bf16", 32, 16, 8),
    ("f32_16x16x32_f16", 16, 32, 8),
    ("f32_32x32x16_f16", 32, 16, 8),
    ("f32_16x16x16_bf16", 16, 16, 4),
    ("f32_32x32x8_f16", 32, 8, 4),
    ("f32_16x16x32_fp8_bf8", 16, 32, 8),
    ("f32_32x32x16_bf8_fp8", 32, 16, 8),
    ("f32_16x16x4_f32", 16, 4, 1),
    ("f32_32x32x2_f32", 32, 2, 1),
    ("i32_16x16x64_i8", 16, 64, 16),
    ("i32_32x32x32_i8", 32, 32, 16),
]
DTYPE = {
    "bf16": torch.bfloat16,
    "f16": torch.float16,
    "fp8": torch.float8_e4m3fn,
    "bf8": torch.float8_e5m2,
    "f32": torch.float32,
    "i8": torch.int8,
}


def lane_registers(matrix, per_lane):
    """[D, K] of any dtype -> uint32 [registers, 64]: lane D g + i holds row i, per_lane values from
    k = per_lane g."""
    d, k = matrix.shape
    out = torch.stack(
        [matrix[lane % d, lane // d * per_lane : (lane // d + 1) * per_lane] for lane in range(64)]
    )
    return out.contiguous().view(torch.uint8).numpy().view(np.uint32).T


def result_matrix(bench, first, d):
    """Accumulator registers -> [D, D] as raw uint32."""
    out = np.zeros((d, d), np.uint32)
    for r in range(d * d // 64):
        for lane in range(64):
            row = 4 * (lane // 16) + r if d == 16 else 8 * (r // 4) + 4 * (lane // 32) + r % 4
            out[row, lane % d] = bench.v(first + r)[lane]
    return out


@pytest.mark.parametrize("name, d, k, per_lane", MFMA)
def test_mfma(name, d, k, per_lane):
    """Small integers, so that every product and sum is exact and the layout alone is on trial."""
    rng = torch.Generator().manual_seed(0)
    kinds = name.split(f"x{k}_")[1].split("_")
    kinds = kinds * 2 if len(kinds) == 1 else kinds
    a, b = (torch.randint(-4, 5, (d, k), generator=rng).to(DTYPE[t]) for t in kinds)
    c = torch.randint(-99, 99, (d, d), generator=rng)
    exact_result = a.double() @ b.double().T + c
    regs = {4 + i: r for i, r in enumerate(lane_registers(a, per_lane))}
    regs |= {12 + i: r for i, r in enumerate(lane_registers(b, per_lane))}
    raw = c.to(torch.int32 if name.startswith("i32") else torch.float32)
    n = d * d // 64
    for r in range(n):
        regs[20 + r] = [
            raw.view(torch.int32)[
                4 * (lane // 16) + r if d == 16 else 8 * (r // 4) + 4 * (lane // 32) + r % 4,
                lane % d,
            ].item()
            & M32
            for lane in range(64)
        ]
    words = len(lane_registers(a, per_lane))
    reg = lambda first, count: f"v{first}" if count == 1 else f"v[{first}:{first + count - 1}]"  # noqa: E731
    out = Bench(
        [
            f"v_mfma_{name} {reg(20, n)}, {reg(4, words)}, {reg(12, words)}, {reg(20, n)}",
            f"v_mfma_{name} a[0:{n - 1}], {reg(4, words)}, {reg(12, words)}, 0",
        ],
        regs,
    )
    view = np.int32 if name.startswith("i32") else np.float32
    assert np.array_equal(result_matrix(out, 20, d).view(view), exact_result.numpy())
    assert np.array_equal(result_matrix(out, 64, d).view(view), (exact_result - c).numpy())


def test_mfma_result_over_its_accumulator():
    """Four-register results may overlap C shifted: C is read whole before D is written."""
    one = np.uint32(0x3F803F80)  # two bf16 ones
    regs = {
        **{r: one for r in range(4, 12)},
        **{r: np.float32(r).view(np.uint32) for r in range(20, 26)},
    }
    for first in (21, 19):
        out = Bench(
            [f"v_mfma_f32_16x16x32_bf16 v[{first}:{first + 3}], v[4:7], v[8:11], v[20:23]"], regs
        )
        assert [out.v(first + i).view(np.float32)[0] for i in range(4)] == [52, 53, 54, 55]


F8F6F4 = {"e4m3": (0, torch.float8_e4m3fn), "e5m2": (1, torch.float8_e5m2), "e2m1": (4, None)}


def scaled_operand(fmt, d, k, generator):
    """Random codes and a different scale for every (row, block): (registers, scale codes [D, K/32],
    values float64)."""
    if fmt == "e2m1":
        codes = torch.randint(0, 16, (d, k), generator=generator)
        values = torch.tensor(FP4, dtype=torch.float64)[codes]
        packed = (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)  # low nibble first
        regs = np.zeros((8, 64), np.uint32)
        for lane in range(64):  # lane D g + i: row i, k = 32 g ... 32 g + 31
            g = lane // d
            regs[:4, lane] = packed[lane % d, 16 * g : 16 * g + 16].numpy().view(np.uint32)
        regs = regs[:4]
    else:
        codes = (
            torch.randint(0, 120, (d, k), generator=generator).to(torch.uint8)
            | torch.randint(0, 2, (d, k), generator=generator).to(torch.uint8) << 7
        )
        values = codes.view(F8F6F4[fmt][1]).double()
        regs = np.zeros((8, 64), np.uint32)
        for lane in range(64):  # two halves of 16 bytes: k = 16 g ... and K/2 + 16 g ...
            g, row = lane // d, codes[lane % d]
            both = torch.cat(
                [row[16 * g : 16 * g + 16], row[k // 2 + 16 * g : k // 2 + 16 * g + 16]]
            )
            regs[:, lane] = both.numpy().view(np.uint32)
    order = torch.randperm(d * k // 32, generator=generator).view(d, k // 32)
    scale = 64 + order % 120  # distinct within a row; E8M0
    return regs, scale, values * torch.exp2(scale.double() - 127).repeat_interleave(32, 1)


@pytest.mark.parametrize("fa, fb", list(itertools.product(F8F6F4, repeat=2)))
@pytest.mark.parametrize("d, k", [(16, 128), (32, 64)])
def test_scaled_mfma(fa, fb, d, k):
    """Every format pair with a different scale in every block, scale bytes selected by op_sel and
    op_sel_hi."""
    generator = torch.Generator().manual_seed(3)
    (ra, sa, va), (rb, sb, vb) = (scaled_operand(f, d, k, generator) for f in (fa, fb))
    expected = (va @ vb.T).numpy()
    n = d * d // 64
    for byte_a, byte_b in ((0, 3), (2, 1)):
        regs = {4 + i: r for i, r in enumerate(ra)} | {12 + i: r for i, r in enumerate(rb)}
        # lane D g + i: the scale of row i, block g
        for reg, s, byte in ((20, sa, byte_a), (21, sb, byte_b)):
            regs[reg] = [
                (s[lane % d, lane // d].item() << 8 * byte) | (0x7F7F7F7F & ~(255 << 8 * byte))
                for lane in range(64)
            ]
        text = (
            f"v_mfma_scale_f32_{d}x{d}x{k}_f8f6f4 v[24:{23 + n}], v[4:{3 + len(ra)}], "
            f"v[12:{11 + len(rb)}], 0, "
            f"v20, v21 "
            f"op_sel:[{byte_a & 1},{byte_b & 1},0] op_sel_hi:[{byte_a >> 1},{byte_b >> 1},0] "
            f"cbsz:{F8F6F4[fa][0]} blgp:{F8F6F4[fb][0]}"
        )
        got = result_matrix(Bench([text], regs), 24, d).view(np.float32)
        assert np.array_equal(got, expected.astype(np.float32)) or np.allclose(
            got, expected, rtol=2.0**-23, atol=0
        )


def test_transposing_reads():
    """A 16 x c matrix of elements in memory order, a column to each lane."""
    data = np.arange(64 * 8, dtype=np.uint8)
    for bits, count in ((16, 4), (8, 8), (4, 16)):
        b = Bench(
            [
                "ds_write_b64 v4, v[6:7]",
                "s_waitcnt lgkmcnt(0)",
                f"ds_read_b64_tr_b{bits} v[0:1], v4",
                "s_waitcnt lgkmcnt(0)",
            ],
            {4: IDS * 8, 6: data.view(np.uint32)[0::2], 7: data.view(np.uint32)[1::2]},
            lds=512,
        )
        if bits == 4:
            elements = np.stack([data & 15, data >> 4], 1).reshape(4, 16, 16)  # block, row, lane
        else:
            elements = data.view({16: np.uint16, 8: np.uint8}[bits]).reshape(4, count, 16)
        expected = elements.transpose(0, 2, 1).reshape(64, count)
        if bits == 4:
            expected = expected[:, 0::2] | expected[:, 1::2] << 4
        got = np.stack([b.v(0), b.v(1)], 1)
        assert np.array_equal(got.view(expected.dtype).reshape(expected.shape), expected)


# ------------------------------------------------------------------------------------------ memory
# rules

BASE = 1 << 40


def tensor(values, name="x"):
    return Span(name, BASE, np.array(values, np.uint32).view(np.uint8))


def addresses(reg=4, step=4, offset=0):
    """Registers reg, reg + 1: lane i's 64-bit address BASE + offset + step i."""
    return {reg: np.uint32(offset) + IDS * step, reg + 1: np.full(64, BASE >> 32)}


LOADS = ["global_load_dword v0, v[4:5], off", "global_load_dword v1, v[4:5], off offset:4"]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_vector_loads_complete_in_order(schedule):
    x = tensor(range(65))
    wait = ["s_waitcnt vmcnt(1)", "v_mov_b32_e32 v2, v0"]
    b = Bench([*LOADS, *wait], addresses(), spans=[x], schedule=schedule)
    assert b.v(2).tolist() == list(range(64))
    with pytest.raises(
        gfx950.GPUFault, match=r"v1 used before the load(.|\n)*line 1(.|\n)*line 3(.|\n)*lane 0"
    ):
        Bench([*LOADS, wait[0], "v_mov_b32_e32 v2, v1"], addresses(), spans=[x], schedule=schedule)
    # overwriting it is as bad: the load lands later
    with pytest.raises(gfx950.GPUFault, match="v0 used before"):
        Bench([*LOADS, "v_mov_b32_e32 v0, 0"], addresses(), spans=[x], schedule=schedule)
    Bench(
        [*LOADS, "v_mov_b32_e32 v2, v1"], addresses(), spans=[x], timing="eager", schedule=schedule
    )


def test_scalar_loads_may_come_out_of_order():
    x = tensor(range(65))
    lines = [
        "s_load_dword s8, s[2:3], 0x4",
        "ds_write_b32 v6, v6",
        "ds_read_b32 v0, v6",
        "s_waitcnt lgkmcnt({})",
    ]
    s, v = {2: 0, 3: BASE >> 32}, {6: IDS * 4}
    b = Bench(
        [x.format(0) for x in lines] + ["s_mov_b32 s9, s8", "v_mov_b32_e32 v1, v0"],
        v,
        s,
        [x],
        lds=256,
    )
    assert b.s(9) == 1 and b.v(1)[5] == 20
    with pytest.raises(gfx950.GPUFault, match="s8 used before"):
        Bench([x.format(1) for x in lines] + ["s_mov_b32 s9, s8"], v, s, [x], lds=256)
    # one may be outstanding: the read, or the scalar load
    with pytest.raises(gfx950.GPUFault, match="v0 used before"):
        Bench([x.format(1) for x in lines] + ["v_mov_b32_e32 v1, v0"], v, s, [x], lds=256)


def test_d16_loads_pair_up_without_a_wait():
    x = tensor([0x44332211 + i for i in range(66)])
    b = Bench(
        [
            "global_load_short_d16 v0, v[4:5], off",
            "global_load_short_d16_hi v0, v[4:5], off offset:4",
            "s_waitcnt vmcnt(0)",
            "global_load_sbyte v1, v[4:5], off offset:3",
            "global_load_ushort v2, v[4:5], off offset:1",
            "s_waitcnt vmcnt(0)",
        ],
        addresses(),
        spans=[x],
    )
    assert hex(b.v(0)[0]) == "0x22122211" and hex(b.v(2)[0]) == "0x3322" and b.v(1)[0] == 0x44


def test_stores_are_as_late_as_waits_allow():
    """A store, then a load by the same wave (in order), and by another wave that was told too
    early."""
    x = tensor(np.zeros(64))
    b = Bench(
        [
            "global_store_dword v[4:5], v6, off",
            "global_load_dword v0, v[4:5], off",
            "s_waitcnt vmcnt(0)",
        ],
        {**addresses(), 6: IDS + 7},
        spans=[x],
    )
    assert np.array_equal(b.v(0), IDS + 7)
    for wait, seen in (("s_nop 0", 0), ("s_waitcnt vmcnt(0)", 9)):
        x = tensor(np.zeros(64))
        lines = [
            "v_cmp_gt_u32_e32 vcc, 64, v0",
            "s_and_saveexec_b64 s[4:5], vcc",
            "global_store_dword v[4:5], v6, off",
            wait,
            "s_mov_b64 exec, s[4:5]",
            "s_barrier",
            "global_load_dword v1, v[4:5], off",
            "s_waitcnt vmcnt(0)",
        ]
        b = Bench(lines, {**addresses(), 6: 9}, spans=[x], waves=2, schedule="skew", leader=1)
        assert b.m.vector[1][1].tolist() == [seen] * 64


def descriptor(records):
    return {8: 0, 9: BASE >> 32, 10: records, 11: 0x27000}


def test_buffer_range():
    """Lanes beyond num_records load 0 and store nothing; a store in range but outside the tensor
    faults."""
    x = tensor(range(64))
    v = {4: IDS * 8, 6: IDS + 500}
    b = Bench(
        [
            "buffer_load_dword v0, v4, s[8:11], 0 offen offset:4",
            "s_waitcnt vmcnt(0)",
            "buffer_store_dword v6, v4, s[8:11], 4 offen",
            "s_waitcnt vmcnt(0)",
        ],
        v,
        descriptor(64),
        [x],
    )
    assert b.v(0).tolist() == [2 * i + 1 if 8 * i + 8 <= 64 else 0 for i in range(64)]
    assert x.data.view(np.uint32).tolist() == [
        500 + i // 2 if i % 2 and 4 * i < 64 else i for i in range(64)
    ]
    with pytest.raises(
        gfx950.GPUFault, match=r"outside every tensor: byte 256 of x, which has 256(.|\n)*lane 32"
    ):
        Bench(["buffer_store_dword v6, v4, s[8:11], 0 offen"], v, descriptor(0x7FFFFFFE), [x])
    with pytest.raises(gfx950.Unsupported, match=r"stride(.|\n)*line 0"):
        Bench(["buffer_load_dword v0, v4, s[8:11], 0 offen"], v, descriptor(64) | {9: 1 << 16}, [x])


@pytest.mark.parametrize("timing", TIMINGS)
def test_copy_to_lds(timing):
    """M0 + offset + 16 lane; lanes off in EXEC leave LDS alone, lanes out of range write 0."""
    x = tensor(range(256))
    lines = [
        "ds_write_b128 v6, v[8:11]",
        "s_waitcnt lgkmcnt(0)",
        "s_mov_b32 m0, 16",
        "s_mov_b64 exec, 0xff",
        "buffer_load_dwordx4 v4, s[8:11], 0 offen lds",
        "s_mov_b64 exec, -1",
        "{}",
        "ds_read_b128 v[0:3], v6",
        "s_waitcnt lgkmcnt(0)",
    ]
    v = {4: IDS * 16, 6: IDS * 16, **{r: 77 for r in range(8, 12)}}
    b = Bench(
        [x.format("s_waitcnt vmcnt(0)") for x in lines],
        v,
        descriptor(64),
        [x],
        lds=1024 + 16,
        timing=timing,
    )
    assert b.v(2).tolist() == [77, 2, 6, 10, 14, 0, 0, 0, 0] + [77] * 55
    if timing == "lazy":
        with pytest.raises(
            gfx950.GPUFault, match=r"copy to it is in flight(.|\n)*lane 1, address 0x10"
        ):
            Bench(
                [x.format("s_nop 0") for x in lines],
                v,
                descriptor(64),
                [x],
                lds=1024 + 16,
                timing=timing,
            )


@pytest.mark.parametrize("timing, schedule", MODES)
def test_lds_races(timing, schedule):
    """Each wave writes its own part and reads the other's: right with a barrier, a race without, in
    every mode."""
    v = {6: IDS * 4}
    lines = [
        "v_lshlrev_b32_e32 v7, 2, v0",
        "v_xor_b32_e32 v8, 0x100, v7",
        "ds_write_b32 v7, v0",
        "s_waitcnt lgkmcnt(0)",
        "{}",
        "ds_read_b32 v1, v8",
        "s_waitcnt lgkmcnt(0)",
    ]
    b = Bench(
        [x.format("s_barrier") for x in lines],
        v,
        lds=512,
        waves=2,
        timing=timing,
        schedule=schedule,
    )
    assert np.array_equal(b.m.vector[1][0], IDS + 64) and np.array_equal(b.m.vector[1][1], IDS)
    with pytest.raises(gfx950.GPUFault, match="race"):
        Bench(
            [x.format("s_nop 0") for x in lines],
            v,
            lds=512,
            waves=2,
            timing=timing,
            schedule=schedule,
        )
    rewrite = [
        *lines[:4],
        "s_barrier",
        *lines[5:],
        "{}",
        "ds_write_b32 v7, v1",
        "s_waitcnt lgkmcnt(0)",
    ]
    Bench(
        [x.format("s_barrier") for x in rewrite],
        v,
        lds=512,
        waves=2,
        timing=timing,
        schedule=schedule,
    )
    with pytest.raises(gfx950.GPUFault, match="race"):
        Bench(
            [x.format("s_nop 0") for x in rewrite],
            v,
            lds=512,
            waves=2,
            timing=timing,
            schedule=schedule,
        )


@pytest.mark.parametrize(
    "text, nbytes",
    [
        ("buffer_load_dword v4, s[8:11], 0 offen lds", 4),
        ("global_load_lds_dword v[14:15], off", 4),
        ("global_load_lds_dwordx4 v[14:15], off", 16),
    ],
)
def test_copy_to_lds_widths(text, nbytes):
    x = tensor(range(256))
    v = {4: IDS * nbytes, 14: IDS * nbytes, 15: BASE >> 32}
    b = Bench(
        ["s_mov_b32 m0, 0", text, "s_waitcnt vmcnt(0)"], v, descriptor(1024), [x], lds=64 * nbytes
    )
    assert np.array_equal(b.m.lds.span.data, x.data[: 64 * nbytes])


def test_lds_widths():
    """Every width of LDS access round trips; read2 and write2 count in elements, the st64 forms in
    64 of them."""
    v = {4: IDS * 16, **{r: IDS * 1000 + r for r in range(8, 12)}}
    for bits, words in ((32, 1), (64, 2), (96, 3), (128, 4)):
        regs = "v8" if words == 1 else f"v[8:{7 + words}]"
        out = "v0" if words == 1 else f"v[0:{words - 1}]"
        b = Bench(
            [
                f"ds_write_b{bits} v4, {regs}",
                "s_waitcnt lgkmcnt(0)",
                f"ds_read_b{bits} {out}, v4",
                "s_waitcnt lgkmcnt(0)",
            ],
            v,
            lds=1024,
        )
        assert all(np.array_equal(b.v(i), IDS * 1000 + 8 + i) for i in range(words))
    b = Bench(
        [
            "ds_write2_b32 v4, v8, v9 offset1:3",
            "ds_write2st64_b64 v5, v[8:9], v[10:11] offset0:2 offset1:4",
            "s_waitcnt lgkmcnt(0)",
            "ds_read2st64_b32 v[0:1], v4",
            "ds_read_b32 v6, v4 offset:12",
            "s_waitcnt lgkmcnt(0)",
        ],
        {**v, 5: IDS * 8},
        lds=4096,
    )
    assert np.array_equal(b.v(6), IDS * 1000 + 9) and np.array_equal(b.v(0), IDS * 1000 + 8)
    words = b.m.lds.span.data.view(np.uint32)
    assert np.array_equal(words[256:384:2], IDS * 1000 + 8) and np.array_equal(
        words[513:640:2], IDS * 1000 + 11
    )
    b = Bench(
        [
            "ds_write_b8 v4, v8 offset:1",
            "ds_write_b16 v4, v9 offset:2",
            "ds_write_b16_d16_hi v4, v10 offset:4",
            "s_waitcnt lgkmcnt(0)",
            "ds_read_u8 v0, v4 offset:1",
            "ds_read_i16 v1, v4 offset:2",
            "ds_read_u16_d16_hi v2, v4 offset:4",
            "s_waitcnt lgkmcnt(0)",
        ],
        {4: IDS * 16, 8: 0xFFFFFF85, 9: 0x12348001, 10: 0xABCD0000, 2: 0x1111},
        lds=1024,
    )
    assert (b.v(0) == 0x85).all() and (b.v(1) == 0xFFFF8001).all() and (b.v(2) == 0xABCD1111).all()


def test_lds_cycles():
    """The model of `counters`: 256 bytes a cycle reading, 128 writing and copying, an extra pass
    for each conflict."""
    x = tensor(range(256))
    # 16 rows of 256 bytes, 16-byte columns swizzled by the row
    rows = IDS % 16 * 256 + (IDS // 16 ^ IDS % 16) * 16
    # addresses of the lanes, or their stride in bytes -> cycles in all, of them for conflicts
    cases = (
        ("ds_read_b32 v0, v4", 4, 1, 0),
        ("ds_read_b64 v[0:1], v4", 8, 2, 0),
        ("ds_read_b128 v[0:3], v4", 16, 4, 0),
        ("ds_read_b128 v[0:3], v4", 32, 8, 4),  # 16 lanes a pass on every other 4 banks
        ("ds_read2_b32 v[0:1], v4 offset1:64", 4, 2, 0),
        ("ds_read_b128 v[0:3], v4", rows, 4, 0),
        (
            "ds_read_b128 v[0:3], v4",
            IDS % 16 * 272 + IDS // 16 * 16,
            8,
            4,
        ),  # passes cross the 16 lanes of a column
        ("ds_write_b128 v4, v[8:11]", IDS % 16 * 272 + IDS // 16 * 16, 8, 0),
        ("ds_read_b32 v0, v4", 256, 64, 63),  # all in one bank
        ("ds_read_b32 v0, v4", 0, 1, 0),  # one dword for all
        ("ds_write_b32 v4, v8", 4, 2, 0),
        ("ds_write_b128 v4, v[8:11]", 16, 8, 0),
        ("ds_write_b128 v4, v[8:11]", 32, 16, 8),
        ("ds_add_u32 v4, v8", 4, 2, 0),
        ("global_load_lds_dwordx4 v[14:15], off", 16, 8, 0),
    )
    for text, at, cycles, conflicts in cases:
        at = IDS * at if isinstance(at, int) else at
        v = {4: at, 14: at, 15: BASE >> 32}
        b = Bench(
            ["s_mov_b32 m0, 0", text],
            v,
            spans=[x],
            lds=1 << 14,
            waves=3,
            schedule="lockstep",
            timing="eager",
        )
        assert (b.m.lds_cycles.sum(), b.m.conflict_cycles.sum()) == (3 * cycles, 3 * conflicts), (
            text
        )


def test_scratch():
    """Private memory: every lane its own bytes."""
    b = Bench(
        [
            "scratch_store_dword off, v4, s4 offset:4",
            "scratch_load_dword v0, v6, off",
            "s_waitcnt vmcnt(0)",
        ],
        {4: IDS + 5, 6: 12},
        {4: 8},
        scratch=16,
    )
    assert np.array_equal(b.v(0), IDS + 5)
    with pytest.raises(gfx950.GPUFault, match="of scratch"):
        Bench(["scratch_store_dword off, v4, s4 offset:4"], {4: IDS}, {4: 16}, scratch=16)


def test_lds_bounds_and_uninitialised():
    with pytest.raises(gfx950.GPUFault, match=r"beyond 128 allocated(.|\n)*lane 32, address 0x80"):
        Bench(["ds_write_b32 v4, v4"], {4: IDS * 4}, lds=128)
    b = Bench(["ds_read_b32 v0, v4", "s_waitcnt lgkmcnt(0)"], {4: IDS * 4}, lds=256)
    assert np.isnan(b.v(0).view(np.float32)).all() and b.m.unwritten_reads == 256


def test_equal_bytes_from_two_waves_are_no_race():
    Bench(["ds_write_b32 v4, v4"], {4: IDS * 4}, lds=256, waves=2)
    with pytest.raises(gfx950.GPUFault, match="two waves"):
        Bench(["ds_write_b32 v4, v0"], {4: IDS * 4}, lds=256, waves=2)


def test_atomics_take_turns():
    """64 lanes of 4 waves on 4 addresses: sums, and old values that are a permutation of the
    running count."""
    x = tensor(np.zeros(4))
    one = {6: 1, 4: IDS % 4 * 4, 5: BASE >> 32}
    b = Bench(
        ["global_atomic_add v1, v[4:5], v6, off sc0", "s_waitcnt vmcnt(0)"],
        one,
        spans=[x],
        waves=4,
        schedule="random",
    )
    assert x.data.view(np.uint32).tolist() == [64] * 4
    for a in range(4):
        assert sorted(b.m.vector[1][:, a::4].ravel().tolist()) == list(range(64))
    with pytest.raises(gfx950.GPUFault, match="v1 used before"):
        Bench(["global_atomic_add v1, v[4:5], v6, off sc0", "v_mov_b32_e32 v2, v1"], one, spans=[x])
    x = tensor(np.zeros(128))
    Bench(
        [
            "global_atomic_cmpswap_x2 v[4:5], v[6:9], off",
            "global_atomic_cmpswap_x2 v[4:5], v[10:13], off",
        ],
        {**addresses(step=8), 6: 5, 7: 6, 8: 0, 9: 0, 10: 1, 11: 1, 12: 5, 13: IDS % 2 * 6},
        spans=[x],
    )
    assert x.data.view(np.uint32).reshape(-1, 2).tolist() == [
        [1, 1] if i % 2 else [5, 6] for i in range(64)
    ]


def test_unknown_opcode_names_its_line():
    with pytest.raises(gfx950.Unsupported, match=r"v_frobnicate_b32 v0, v1(.|\n)*line 1"):
        Bench(["s_nop 0", "v_frobnicate_b32 v0, v1"])
    with pytest.raises(gfx950.Unsupported, match="6-bit"):
        Bench(["v_mfma_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], 0 cbsz:2"])
    Bench(["s_endpgm", "v_frobnicate_b32 v0, v1"])  # never reached


def test_unknown_modifiers_raise():
    for line, what in (
        ("v_add_f32_e64 v0, v4, v6 wobble:3", "wobble"),
        ("v_cvt_pk_fp8_f32 v0, v4, v6 clamp", "clamp"),
        ("v_add_u32_e64 v0, v4, v6 op_sel:[1,0,0]", "op_sel"),
        ("s_waitcnt 0xc07f", "0xc07f"),
        ("ds_read_b32 v0, v4 gds", "gds"),
        ("v_mad_u64_u32 v[0:1], vcc, v4, v6, v[8:9] clamp", "clamp"),
    ):
        with pytest.raises(gfx950.Unsupported, match=rf"{what}(.|\n)*line 0"):
            Bench([line])


def test_inline_constants():
    """A constant takes the operand's width: 1.0 is a half, a float or a double; literals fill as
    their type says."""
    b = Bench(
        [
            "v_mov_b64_e32 v[0:1], 1.0",
            "s_mov_b64 s[4:5], 0.5",
            "v_add_f16_e32 v2, 1.0, v4",
            "v_mul_f32_e32 v3, 0.15915494, v5",
            "v_add_f64 v[6:7], 0x40000000, v[8:9]",
            "s_and_b64 s[6:7], s[2:3], 0xffff0000",
            "v_add_u32_e32 v10, -16, v4",
        ],
        {4: 0x4000, 5: 0x3F800000, 8: 0, 9: 0},
        {2: M32, 3: M32},
    )
    assert (b.v(1)[0], b.v(0)[0], b.s64(4), b.v(2)[0]) == (
        0x3FF00000,
        0,
        0x3FE0000000000000,
        0x4200,
    )
    assert (b.v(3)[0], b.v(7)[0], b.s64(6), b.v(10)[0]) == (
        0x3E22F983,
        0x40000000,
        0xFFFF0000,
        0x3FF0,
    )
