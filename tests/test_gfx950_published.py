"""The emulator against what AMD and others publish about gfx950, each formula transcribed from the
source named and sharing nothing with gfx950/. None of the sources was run here.

ISA: "AMD Instinct MI300 ISA" (CDNA3) and "CDNA4 ISA". rocjitsu: AMD's emulator, ROCm/rocm-systems,
emulation/rocjitsu/lib/rocjitsu/src/rocjitsu/isa/arch/amdgpu/shared/."""

import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from test_gfx950 import BASE, IDS, M32, Bench, as_f32, descriptor, over, round_f32, tensor
from test_moe_gluon import run

import gfx950
from gfx950.memory import LDS

# ---------------------------------------------------------------------------------- matrix operands


def input_place(dim, k_size, i, k, bits):
    """rocjitsu, mma/layout.h, input_loc of one block: element (i, k) of an operand -> lane and
    number of the element in the lane's registers."""
    lanes = 64 // dim
    per_lane = k_size // lanes
    if per_lane > 16 and bits >= 8:
        chunk = k // 16
        return chunk % lanes * dim + i, chunk // lanes * 16 + k % 16
    return k // per_lane * dim + i, k % per_lane


def output_place(dim, i, j):
    """rocjitsu, mma/layout.h, output_loc_32 of one block: register and lane of row i, column j."""
    rows = 64 // dim
    return i // (4 * rows) * 4 + i % 4, i // 4 % rows * dim + j


def scale_place(dim, i, block):
    """rocjitsu, mma_exec.h, exec_f32_scaled_mixed: the lane of the scale of row i's block."""
    return dim * block + i


def operand_registers(codes, dim, k_size, bits):
    """Codes [dim, K] of `bits` bits each -> registers uint32 [count, 64]."""
    out = np.zeros((k_size * dim // 64 * bits // 32, 64), np.uint64)
    for i, k in itertools.product(range(dim), range(k_size)):
        lane, element = input_place(dim, k_size, i, k, bits)
        out[element * bits // 32, lane] |= int(codes[i, k]) << element * bits % 32
    return out.astype(np.uint32)


def result(bench, first, dim):
    out = np.zeros((dim, dim), np.float32)
    for i, j in itertools.product(range(dim), repeat=2):
        register, lane = output_place(dim, i, j)
        out[i, j] = bench.v(first + register)[lane : lane + 1].view(np.float32)[0]
    return out


def span(first, count):
    return f"v[{first}:{first + count - 1}]"


E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, 0, -0.5, -1, -1.5, -2, -3, -4, -6]).double()
# name -> bits, value of cbsz or blgp, float64 values of codes
ELEMENT = {
    "fp8": (8, 0, lambda codes: codes.to(torch.uint8).view(torch.float8_e4m3fn).double()),
    "bf8": (8, 1, lambda codes: codes.to(torch.uint8).view(torch.float8_e5m2).double()),
    "fp4": (4, 4, lambda codes: E2M1[codes]),
    "bf16": (16, None, lambda codes: codes.to(torch.int16).view(torch.bfloat16).double()),
}


def small_codes(name, shape, generator):
    """Codes of small integers, of which sums are exact in every order and rounding."""
    integers = torch.randint(-3, 4, shape, generator=generator)
    if name == "fp4":
        return torch.tensor([0xD, 0xC, 0xA, 0, 2, 4, 5])[integers + 3]  # -3 ... 3
    dtype, view = {
        "fp8": (torch.float8_e4m3fn, torch.uint8),
        "bf8": (torch.float8_e5m2, torch.uint8),
        "bf16": (torch.bfloat16, torch.int16),
    }[name]
    return integers.to(dtype).view(view).long() & 0xFFFF


@pytest.mark.parametrize(
    "text, dim, k_size, a, b",
    [
        ("v_mfma_f32_16x16x32_bf16", 16, 32, "bf16", "bf16"),
        ("v_mfma_f32_32x32x16_bf16", 32, 16, "bf16", "bf16"),
        ("v_mfma_f32_16x16x32_fp8_bf8", 16, 32, "fp8", "bf8"),
        ("v_mfma_f32_32x32x16_bf8_fp8", 32, 16, "bf8", "fp8"),
    ],
)
def test_operand_and_result_places(text, dim, k_size, a, b):
    generator = torch.Generator().manual_seed(0)
    x, y = (small_codes(name, (dim, k_size), generator) for name in (a, b))
    (bits_a, _, value_a), (bits_b, _, value_b) = ELEMENT[a], ELEMENT[b]
    rx, ry = operand_registers(x, dim, k_size, bits_a), operand_registers(y, dim, k_size, bits_b)
    regs = {4 + i: r for i, r in enumerate(rx)} | {12 + i: r for i, r in enumerate(ry)}
    n = dim * dim // 64
    line = f"{text} {span(24, n)}, {span(4, len(rx))}, {span(12, len(ry))}, 0"
    want = value_a(x) @ value_b(y).T
    assert np.array_equal(result(Bench([line], regs), 24, dim), want.numpy())


@pytest.mark.parametrize("a, b", list(itertools.product(("fp8", "bf8", "fp4"), repeat=2)))
@pytest.mark.parametrize("dim, k_size", [(16, 128), (32, 64)])
def test_places_and_scales_of_scaled_operands(a, b, dim, k_size, sums="exact"):
    """Another scale in every row and block, of which no permutation of K common to A and B leaves
    the result as it is; scale 0 is 2^-127 (FlyDSL PR 744, on hardware), 255 is NaN (OCP MX 1.0)."""
    generator = torch.Generator().manual_seed(1)
    blocks = k_size // 32
    x, y = (small_codes(name, (dim, k_size), generator) for name in (a, b))
    # products of 2^-5 to 2^5 * 9 in a sum: exact in float32 in every order
    ex, ey = (torch.randint(0, 6, (dim, blocks), generator=generator) for _ in "xy")
    scale_x, scale_y = 127 - ex, 127 + ey
    scale_x[3], scale_y[7] = 0, 240  # 2^-127 and 2^113
    scale_y[5, 1] = 255
    (bits_a, select_a, value_a), (bits_b, select_b, value_b) = ELEMENT[a], ELEMENT[b]
    rx, ry = operand_registers(x, dim, k_size, bits_a), operand_registers(y, dim, k_size, bits_b)
    regs = {4 + i: r for i, r in enumerate(rx)} | {12 + i: r for i, r in enumerate(ry)}
    regs |= {20: np.zeros(64, np.uint32), 21: np.zeros(64, np.uint32)}
    for i, block in itertools.product(range(dim), range(blocks)):
        regs[20][scale_place(dim, i, block)] = int(scale_x[i, block])
        regs[21][scale_place(dim, i, block)] = int(scale_y[i, block])
    n = dim * dim // 64
    line = (
        f"v_mfma_scale_f32_{dim}x{dim}x{k_size}_f8f6f4 {span(24, n)}, {span(4, len(rx))}, "
        f"{span(12, len(ry))}, 0, v20, v21 op_sel_hi:[0,0,0] cbsz:{select_a} blgp:{select_b}"
    )
    want = torch.zeros(dim, dim, dtype=torch.float64)
    for block in range(blocks):
        k = slice(32 * block, 32 * block + 32)
        exponent = scale_x[:, block, None] + scale_y[None, :, block] - 254
        part = (value_a(x[:, k]) @ value_b(y[:, k]).T) * torch.exp2(exponent.double())
        want += part.masked_fill(scale_y[None, :, block] == 255, torch.nan)
    got = result(Bench([line], regs, sums=sums), 24, dim)
    assert np.array_equal(got, want.float().numpy(), equal_nan=True)
    assert np.isnan(got[:, 5]).all() and np.isfinite(np.delete(got, 5, 1)).all()
    assert 0 < abs(got[3, 7]) < 1 and 0 < np.abs(np.delete(got[3], (5, 7))).max() < 2.0**-100


@pytest.mark.parametrize("scales", ["s4, v21", "v20, 1.0", "v20, s4", "0x7f, v21"])
def test_scales_outside_vector_registers_are_refused(scales):
    """LLVM PR 158117: the hardware takes bits 30:23 of them; LLVM allows vector registers only."""
    line = f"v_mfma_scale_f32_16x16x128_f8f6f4 v[0:3], v[4:11], v[12:19], 0, {scales} cbsz:0"
    with pytest.raises(gfx950.Unsupported, match="scales outside vector registers"):
        Bench([line])


# ----------------------------------------------------------------- other rules for the sum inside


def exponent(x, least):
    """floor(log2 |x|), at least `least`; of a zero -126."""
    return max(math.frexp(x)[1] - 1, least) if x else -126


def cut(x, unit, rounding):
    return rounding(Fraction(x) / Fraction(2) ** unit) * Fraction(2) ** unit


def rounded(x):
    """Fraction -> the nearest float32; the sums here are far from its ends, and not zero."""
    return Fraction(as_f32(round_f32(x))) if x else Fraction(0)


def mma_sim_group(x, y, c, least, narrow):
    """microsoft/MMA-Sim, mmasim/simulator/arithmetic.py, amd_fused_dot_rd_add with 24 fraction
    bits, of one group of products [(value, value)]; `least`: the formats' smallest exponents."""

    def fused(pairs):
        e = [exponent(a, least[0]) + exponent(b, least[1]) for a, b in pairs]
        top = max(e)
        return sum(cut(a * b, top - 24, math.trunc) for a, b in pairs), top

    pairs = [(Fraction(a), Fraction(b)) for a, b in zip(x, y, strict=True)]
    ec = exponent(c, -126)
    if narrow:
        (even, e), (odd, f) = fused(pairs[0::2]), fused(pairs[1::2])
        top = max(e, f)
        s = cut(even, top - 24, math.floor) + cut(odd, top - 24, math.floor)
    else:
        s, top = fused(pairs)
    most = max(top, ec)
    kept = 0 if narrow and ec < most - 25 else cut(c, most - 24, math.floor)
    return rounded(cut(s, most - 31, math.floor) + kept)


def by_mma_sim(x, y, c, kind):
    least = {"bf16": -126, "fp8": -6}[kind]
    group, total = 8 if kind == "bf16" else 16, Fraction(c)
    for k in range(0, len(x), group):
        total = mma_sim_group(x[k : k + group], y[k : k + group], total, (least,) * 2, group == 16)
    return total


def by_chain(x, y, c, kind):
    """rocjitsu, mma_exec.h: fused multiply-adds in order."""
    total = Fraction(c)
    for a, b in zip(x, y, strict=True):
        total = rounded(Fraction(a) * Fraction(b) + total)
    return total


def emulated_sums(name, kind, k_size, x, y, c, sums):
    """D = x y^T + c of one 16 x 16 instruction, by this rule."""
    bits, _, _ = ELEMENT[kind]
    rx, ry = operand_registers(x, 16, k_size, bits), operand_registers(y, 16, k_size, bits)
    regs = {4 + i: r for i, r in enumerate(rx)} | {12 + i: r for i, r in enumerate(ry)}
    regs |= {24 + r: np.zeros(64, np.uint32) for r in range(4)}
    for i, j in itertools.product(range(16), repeat=2):
        register, lane = output_place(16, i, j)
        regs[24 + register][lane] = c[i, j].view(np.uint32)
    line = f"v_mfma_{name} v[24:27], {span(4, len(rx))}, {span(12, len(ry))}, v[24:27]"
    return result(Bench([line], regs, sums=sums), 24, 16)


@pytest.mark.parametrize("sums, oracle", [("cdna3", by_mma_sim), ("chain", by_chain)])
@pytest.mark.parametrize(
    "name, kind, k_size", [("f32_16x16x32_bf16", "bf16", 32), ("f32_16x16x32_fp8_fp8", "fp8", 32)]
)
def test_other_sums(name, kind, k_size, sums, oracle):
    """Values of many magnitudes, against the rule in exact fractions, and unlike the exact sum."""
    generator = torch.Generator().manual_seed(4)

    def codes():
        spread = torch.randn(16, k_size, generator=generator)
        spread *= torch.exp2(torch.randint(-7, 8, (16, k_size), generator=generator))
        if kind == "bf16":
            return spread.bfloat16().view(torch.int16).long() & 0xFFFF
        return spread.clamp(-448, 448).to(torch.float8_e4m3fn).view(torch.uint8).long()

    x, y = codes(), codes()
    c = (torch.randn(16, 16, generator=generator) * 1000).numpy()
    got = emulated_sums(name, kind, k_size, x, y, c, sums)
    xs, ys = (ELEMENT[kind][2](t).tolist() for t in (x, y))
    want = [
        [float(oracle(a, b, float(c[i, j]), kind)) for j, b in enumerate(ys)]
        for i, a in enumerate(xs)
    ]
    assert np.array_equal(got, np.array(want, np.float32))
    exact = emulated_sums(name, kind, k_size, x, y, c, "exact")
    # of K + 1 terms of up to 2^30, a rounding of 2^-24 each
    assert 0 < np.abs(got - exact).max() <= (k_size + 1) * 2.0**-24 * 2.0**30


@pytest.mark.parametrize("sums", ["cdna3", "chain"])
@pytest.mark.parametrize("a, b", [("fp8", "fp4"), ("fp4", "fp4")])
def test_other_sums_agree_where_all_are_exact(a, b, sums):
    test_places_and_scales_of_scaled_operands(a, b, 16, 128, sums)
    test_places_and_scales_of_scaled_operands(a, b, 32, 64, sums)


@pytest.mark.parametrize("sums", ["cdna3", "chain"])
@pytest.mark.parametrize(
    "T, activations", [(3, "bf16"), (3, "mxfp8"), (20, "mxfp8"), (20, "mxfp4")]
)
def test_layers_do_not_rest_on_the_rule_for_sums(T, activations, sums):
    """moe_gluon's layers are as near the equations, within the roundings that both make."""
    run(T, 8, 192, 160, 4, activations, sums=sums)


# ----------------------------------------------------------------------------- memory and its range


def elements_in_range(voffset, imm, soffset, records, elements):
    """rocjitsu, addr_calc_buffer.h, gfx9_buffer_elems_in_range and buffer_offset_part, "follow
    gfx950 hardware": voffset + imm in 32 bits, soffset added wide, dword by dword."""
    offset = (voffset + imm) % 2**32 + soffset
    return offset, 0 if offset >= records else min(elements, (records - offset) // 4)


def test_buffer_range_of_rocjitsu():
    data = np.arange(1024, dtype=np.uint32) + 1
    cases = itertools.product(
        (0, 4, 96, 100, 2000, 2**31, 2**32 - 64, 2**32 - 4), (0, 64), (0, 96), (0, 100, 160, 4096)
    )
    refused = 0
    for voffset, imm, soffset, records in cases:
        for name, count in (("dword", 1), ("dwordx2", 2), ("dwordx4", 4)):
            offset, inside = elements_in_range(voffset, imm, soffset, records, count)
            line = f"buffer_load_{name} v[0:{count - 1}], v4, s[8:11], s4 offen offset:{imm}"
            run = lambda: Bench(  # noqa: E731
                [line, "s_waitcnt vmcnt(0)"],  # noqa: B023
                {4: voffset},  # noqa: B023
                descriptor(records) | {4: soffset},  # noqa: B023
                [tensor(data)],
            )
            if 0 < inside < count:  # stricter than hardware, which loads the dwords inside
                with pytest.raises(gfx950.Unsupported, match="across the end"):
                    run()
                refused += 1
                continue
            want = [int(data[offset // 4 + i]) if inside else 0 for i in range(count)]
            bench = run()
            assert [int(bench.v(i)[0]) for i in range(count)] == want, line
    assert refused


@pytest.mark.parametrize("words, stride", [(1, 4), (3, 16), (4, 16)])
@pytest.mark.parametrize("space", ["buffer", "global"])
def test_copies_to_lds(words, stride, space):
    """CDNA4 ISA 9.1.9: M0[17:0] + offset + 4 * lane, 16 * lane for three and four dwords; the
    offset moves the global side, too (rocm-systems issue 10192)."""
    x = tensor(np.arange(512))
    kind = "dword" if words == 1 else f"dwordx{words}"
    line = {
        "buffer": f"buffer_load_{kind} v4, s[8:11], 0 offen offset:32 lds",
        "global": f"global_load_lds_{kind} v[14:15], off offset:32",
    }[space]
    at = IDS * 4 * words
    b = Bench(
        ["s_mov_b32 m0, 0x40080", line, "s_waitcnt vmcnt(0)"],  # bit 18 is no part of the address
        {4: at, 14: at, 15: BASE >> 32},
        descriptor(2048),
        [x],
        lds=2048,
    )
    want = np.full(512, M32, np.uint32)
    for lane in range(64):
        first = (128 + 32 + stride * lane) // 4
        want[first : first + words] = np.arange(words) + 8 + words * lane
    assert np.array_equal(b.m.lds.span.data.view(np.uint32), want)


@pytest.mark.parametrize("kind", ["dwordx2", "ubyte", "sshort"])
def test_copies_to_lds_of_other_widths_are_refused(kind):
    line = f"buffer_load_{kind} v4, s[8:11], 0 offen lds"
    with pytest.raises(gfx950.Unsupported, match="copy to LDS of this width"):
        Bench(["s_mov_b32 m0, 0", line], {4: IDS * 8}, descriptor(1024), [tensor(range(256))])


def transposed(source, bits):
    """rocjitsu, ds_transpose.h, transpose_b64_tr_b8 and _b16: [64, 8 / bytes] -> the same."""
    out = np.zeros_like(source)
    for lane, n in itertools.product(range(64), range(source.shape[1])):
        if bits == 8:
            out[lane, n] = source[(lane & ~15 | lane >> 3 & 1) + 2 * n, lane & 7]
        else:
            out[lane, n] = source[(lane & ~15 | lane >> 2 & 3) + 4 * n, lane & 3]
    return out


@pytest.mark.parametrize("bits", [8, 16])
def test_transposing_reads_of_rocjitsu(bits):
    rng = np.random.default_rng(0)
    data = rng.integers(0, 256, 512, dtype=np.uint8)
    words = data.view(np.uint32).reshape(64, 2)
    lines = ["ds_write_b64 v4, v[6:7]", "s_waitcnt lgkmcnt(0)"]
    lines += [f"ds_read_b64_tr_b{bits} v[0:1], v4", "s_waitcnt lgkmcnt(0)"]
    b = Bench(lines, {4: IDS * 8, 6: words[:, 0], 7: words[:, 1]}, lds=512)
    source = data.view({8: np.uint8, 16: np.uint16}[bits]).reshape(64, -1)
    got = np.stack([b.v(0), b.v(1)], 1).view(source.dtype)
    assert np.array_equal(got, transposed(source, bits))


def test_transposing_reads_need_all_lanes():
    """CDNA4 ISA 11.4: EXEC must be all ones."""
    lines = ["s_mov_b64 exec, 0xff", "ds_read_b64_tr_b8 v[0:1], v4", "s_waitcnt lgkmcnt(0)"]
    with pytest.raises(gfx950.GPUFault, match=r"lanes off in EXEC(.|\n)*lane 8, address 0x40"):
        Bench(lines, {4: IDS * 8}, lds=512)


# Lanes that ds_read_b128 serves together (Triton PR 11365, measured on MI350)
PASSES = (
    ((0, 3), (12, 15), (20, 27)),
    ((32, 35), (44, 47), (52, 59)),
    ((4, 11), (16, 19), (28, 31)),
    ((36, 43), (48, 51), (60, 63)),
)


def test_passes_of_ds_read_b128():
    """Two lanes on different rows of the same banks cost a pass more exactly where they are served
    together; all other lanes read one address on other banks."""
    group = {
        lane: n
        for n, ranges in enumerate(PASSES)
        for first, last in ranges
        for lane in range(first, last + 1)
    }
    assert sorted(group) == list(range(64))
    for one, other in itertools.combinations(range(64), 2):
        at = np.full(64, 64)
        at[one], at[other] = 0, 256
        together = group[one] == group[other]
        assert LDS.passes(at, 16, "ds_read_b128") == (4, together), (one, other)


# ------------------------------------------------------------------------------- conversions, VALU

NAN8, INF, NAN, SNAN = 0x7F, 0x7F800000, 0x7FC00000, 0x7FA00000


@pytest.mark.parametrize(
    "text, cases",
    [
        # ISA: without FP16_OVFL overflow is NaN in e4m3, which has no infinity (Triton PRs 7327
        # and 7337; SGLang PR 37140 on gfx950); 464 is the tie above 448
        (
            "v_cvt_pk_fp8_f32 v0, v4, v4",
            {
                0x3F800000: 0x38,
                0x40000000: 0x40,
                0x43E00000: 0x7E,  # 448
                0x43E80000: 0x7E,  # 464
                0x43E80001: NAN8,
                0xC3E80001: 0xFF,
                INF: NAN8,
                INF | 1 << 31: 0xFF,
                NAN: NAN8,
                0x3A800000: 0x00,  # 2^-10, the tie below the smallest
                0x3A800001: 0x01,
            },
        ),
        # tinygrad, test/amd/hw/test_cdna_vop3.py, with gfx950's own results beside it
        (
            "v_cvt_pk_bf8_f32 v0, v4, v4",
            {0x3F800000: 0x3C, 0x47600000: 0x7B, 0x47700000: 0x7C, INF: 0x7C, INF | 1 << 31: 0xFC},
        ),
    ],
)
def test_conversions_to_8_bits(text, cases):
    """Both results, and the other half of the register kept (`over` starts it as 0xa5a5)."""
    got, _ = over(text, [(x,) for x in cases])
    assert got == [0xA5A50000 | code * 0x101 for code in cases.values()]


def test_a_packed_conversion_of_tinygrad():
    """test_cdna_vop3.py: 1.0 and 2.0 into the low half of 0xdeadbeef."""
    b = Bench(["v_cvt_pk_fp8_f32 v0, v4, v6"], {0: 0xDEADBEEF, 4: 0x3F800000, 6: 0x40000000})
    assert int(b.v(0)[0]) == 0xDEAD4038


def test_conversions_to_4_bits():
    """CDNA4 ISA, V_CVT_SCALEF32_PK_FP4_F32: divided by 2^exponent of the scale, to nearest even,
    saturating; a NaN becomes the largest value with its sign; other bytes stay."""
    cases = {
        0x3F800000: 2,
        0x3E800000: 0,  # 0.25, the tie below 0.5
        0x3E800001: 1,
        0x40A00000: 6,  # 5, the tie of 4 and 6
        0x40C00000: 7,
        INF: 7,
        NAN: 7,
        NAN | 1 << 31: 15,
    }
    got, _ = over("v_cvt_scalef32_pk_fp4_f32 v0, v4, v4, 1.0", [(x,) for x in cases])
    assert got == [0xA5A5A500 | code * 0x11 for code in cases.values()]
    got, _ = over("v_cvt_scalef32_pk_fp4_f32 v0, v4, v4, 4.0", [(0x40C00000,)])  # 6 / 4
    assert got == [0xA5A5A533]


def test_transcendentals_flush_denormals():
    """LLVM PRs 203566 and 211017: v_rcp_f32 flushes operand and result in every mode; the ROCm
    device libraries scale around v_rsq_f32 and v_sqrt_f32 below 2^-126 (sqrtF.cl, rsqrtF.cl)."""
    sign = 1 << 31
    for op, cases in {
        "rcp": {
            0x7F000000: 0,  # 2^127
            0xFF000000: sign,
            0x7E800000: 0x00800000,  # 2^126 -> 2^-126
            0x00400000: INF,  # 2^-127
            0x807FFFFF: INF | sign,
            0x00800000: 0x7E800000,
        },
        "rcp_iflag": {0x7F000000: 0, 1: INF},
        "rsq": {0x007FFFFF: INF, 1 | sign: INF | sign, 0x00800000: 0x5F000000},
        "sqrt": {0x007FFFFF: 0, 1 | sign: sign, 0x00800000: 0x20000000},
    }.items():
        got, _ = over(f"v_{op}_f32_e32 v0, v4", [(x,) for x in cases])
        assert got == list(cases.values()), op


def test_signalling_nans():
    """MI300 ISA, V_MAX_F32, V_MAX3_F32, V_MED3_F32 in IEEE mode: a signalling NaN is returned,
    quiet, first; then the operand that is a number. Of three operands the pairwise results are
    combined, so that a number behind it wins over the NaN made quiet."""
    one, two = 0x3F800000, 0x40000000
    quiet = SNAN | 0x00400000
    for text, cases in {
        "v_{}_f32_e32 v0, v4, v6": {(SNAN, one): quiet, (one, SNAN): quiet, (SNAN, NAN): quiet},
        "v_{}3_f32 v0, v4, v6, v8": {
            (SNAN, one, two): two,
            (one, SNAN, two): two,
            (one, two, SNAN): quiet,
        },
    }.items():
        for op in ("max", "min"):
            got, _ = over(text.format(op), list(cases))
            assert got == list(cases.values()), (text, op)
    got, _ = over("v_med3_f32 v0, v4, v6, v8", [(NAN, two, one), (one, two, SNAN)])
    assert got == [one, quiet]
    got, _ = over("v_max_f16_e32 v0, v4, v6", [(0x7D00, 0x3C00), (0x3C00, 0x7D00), (0x7E00, 1)])
    assert got == [0x7F00, 0x7F00, 1]
    for op in ("v_cvt_f16_f32_e32", "v_frexp_mant_f32_e32", "v_mul_f32_e32", "v_rcp_f32_e32"):
        (got,), _ = over(f"{op} v0, v4" + ", v4" * ("mul" in op), [(SNAN,)])
        assert got == (0x7F00 if "f16" in op else quiet), op
    # 65 operands: whole registers of them, which numpy may treat otherwise than one
    got, _ = over("v_max_f32_e32 v0, v4, v6", [(SNAN, one)] * 65)
    assert got == [quiet] * 65


@pytest.mark.parametrize("name, value", [("ieee_mode", 0), ("float_denorm_mode_32", 0)])
def test_a_kernel_in_another_mode_is_refused(name, value):
    with pytest.raises(gfx950.Unsupported, match=f"amdhsa_{name} {value}"):
        Bench(["s_nop 0"], directives={name: value})
