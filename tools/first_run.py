"""The first command on a new card: is every kernel right on it, how fast is it, and on a gfx950
(MI350, MI355), which of the emulator's assumptions hold.

    python tools/first_run.py               on a gfx950, or any GPU that Triton drives
    python tools/first_run.py --emulate     without a card: a gfx950, emulated; nothing is timed
    python tools/first_run.py --model 120b --seconds 400 --only card times

card         what it is, and the versions of what drives it
kernels      every operation against the equations (gptoss.EQUATIONS) on the CPU; the same call
             again and again, bit for bit; on a gfx950 also against the emulator, where bits are
             promised: the routing of exact logits and the quantised activations
assumptions  on a gfx950: what docs/emulator.md and the comments of gfx950/ take for granted, each
             as a small kernel that runs on the card and in the emulator
times        tools/bench_ops.py, on a gfx950 tools/bench_moe.py with the peers installed there,
             bench.py for the whole step, tools/peer_gpu.py; each beside its floors

A line a check goes to stdout: right or wrong, holds or differs, timed, noted, skipped, failed. All
of it goes to --json, a file to attach to a report, which is written anew before and after every
check: if the card or the process dies, it names the check that was running. Exit 0; 1 if a kernel
is wrong or something failed; 2 (usage)."""

import argparse
import contextlib
import dataclasses
import functools
import io
import json
import math
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton
import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench_ops

import bench
import gptoss
import moe_nvidia
import weights
from gptoss import EQUATIONS

ROOT = Path(__file__).parents[1]
PARTS = ("card", "kernels", "assumptions", "times")
BAD = ("wrong", "failed")
LEAST_SECONDS = 30  # that a program that times needs to begin at all
# Relative L2 distance from the equations with the same activations. A bf16 result is rounded once,
# 1.5e-3 of it in the mean square (2^-7 / sqrt(12) * 0.68: mantissas are spread over 1 to 2); above
# decode each weighted row is rounded before the sum over a token's experts, 1.5e-3 sqrt(C + 2) with
# C the rows' squares over the square of their sum: up to C = 5.
MOE_LIMIT = 4e-3
# Attention rounds the softmax's shares and the result, and here, as the equations run in float32,
# rotated keys and queries too: four of 1.5e-3, or 1.5 times that where few values decide and their
# mantissas lie near 1.
OPS_LIMIT = 1.5e-3 * math.sqrt(4) * 1.5
# activations, layout of the weights
FORMATS = (
    ("bf16", "hf-bf16"),
    ("bf16", "openai"),
    ("fp8", "openai"),
    ("mxfp8", "openai"),
    ("mxfp4", "openai"),
)
OF_THE_EMULATOR = gptoss.ACTIVATIONS  # whose layers' bits are compared with it
# experts, hidden size, inner size, experts a token, tokens: sizes that are no multiple of a tile
SMALL = [(8, 192, 160, 4, T) for T in (3, 40)]
# the models' own widths, on a card: the equations on the CPU take seconds each
LARGE = [(16, 2880, 2880, 4, T) for T in (1, 16, 300)]


class Report:
    """What was found, kept in a file."""

    def __init__(self, path: Path, settings: dict):
        self.path, self.bad = path, 0
        self.data = {"settings": settings, "running": None, "checks": []}

    def save(self) -> None:
        """As JSON proper: NaN and infinities become text."""
        data = json.loads(json.dumps(self.data), parse_constant=str)
        self.path.write_text(json.dumps(data, indent=1))

    def check(self, part: str, name: str, run: Callable[[], dict]) -> dict:
        """Runs a check, which returns a dict with a "verdict", and prints and keeps that."""
        self.data["running"] = f"{part}: {name}"
        self.save()
        start = time.monotonic()
        try:
            row = run()
        except Exception as error:  # the next check may still work
            row = {"verdict": "failed", "why": f"{type(error).__name__}: {error}"[-2000:]}
        row = {"part": part, "name": name} | row | {"seconds": time.monotonic() - start}
        self.data["checks"].append(row)
        self.data["running"] = None
        self.bad += row["verdict"] in BAD
        self.save()
        shown = {key: row[key] for key in ("error", "limit", "differ", "of", "why") if key in row}
        shown = ", ".join(
            f"{key} {value:.2g}"
            if isinstance(value, float)
            else f"{key} {str(value).splitlines()[0]}"
            for key, value in shown.items()
        )
        print(f"{row['verdict']:8} {part}: {name}" + (f" ({shown})" if shown else ""), flush=True)
        return row


def differing(got, want) -> dict:
    """How many elements of two equally shaped tensors have other bits, and the first of them."""
    got, want = (t.detach().cpu().contiguous().flatten() for t in (got, want))
    a, b = (t.view(torch.uint8).view(-1, t.itemsize) for t in (got, want))
    bad = (a != b).any(1).nonzero()[:, 0].tolist()
    row = {"differ": len(bad), "of": got.numel()}
    if bad:
        at = bad[0]
        first = (str(t.flatten()[at].item()) for t in (got, want))
        row["first"] = dict(zip(("at", "got", "want"), (at, *first), strict=True))
    return row


# --------------------------------------------------------------------------------------------------
# The card


class Card:
    """Where kernels run. `real`: a GPU; else a gfx950, emulated in another order than what it is
    compared with."""

    def __init__(self, emulated: bool):
        self.real = not emulated
        self.device = torch.device("cpu" if emulated else "cuda")

    def active(self):
        if self.real:
            return contextlib.nullcontext()
        import gfx950

        return gfx950.emulate(timing="eager", schedule="skew")

    def target(self):
        return triton.runtime.driver.active.get_current_target()

    def is_gfx950(self) -> bool:
        target = self.target()
        return (target.backend, target.arch) == ("hip", "gfx950")

    def describe(self) -> dict:
        target, row = self.target(), {"verdict": "right" if self.real else "emulated"}
        row |= {"target": f"{target.backend} {target.arch}", "python": platform.python_version()}
        row |= {"torch": torch.__version__, "triton": triton.__version__, "os": platform.platform()}
        row |= {"hip": torch.version.hip, "cuda": torch.version.cuda}
        row |= {"gpu": "gfx950, emulated", "commit": commit()}
        if self.real:
            properties = torch.cuda.get_device_properties(0)
            row |= {"gpu": properties.name, "gpus": torch.cuda.device_count()}
            for name in ("gcnArchName", "total_memory", "multi_processor_count"):
                row[name] = getattr(properties, name, None)
            row["copy_bytes_per_s"] = bench.copy_bandwidth(self.device)
        row["why"] = f"{row['gpu']}, torch {torch.__version__}, triton {triton.__version__}"
        return row


def commit() -> str:
    """Of this repository; empty where it is none."""
    if not shutil.which("git"):
        return ""
    command = ["git", "describe", "--always", "--dirty"]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def emulated(**how):
    """A gfx950 in the emulator's own order: what a card is compared with."""
    import gfx950

    return gfx950.emulate(**how)


# --------------------------------------------------------------------------------------------------
# Kernels against the equations


def operations(card: Card) -> dict[str, gptoss.Ops]:
    """The kernels that the engine can use here, by the file of their layer."""
    triton_ops, auto = (gptoss.choose_ops(name, card.device) for name in ("triton", "auto"))
    nvidia = "moe_nvidia or ops_triton"  # by the number of tokens and the format
    room = nvidia if moe_nvidia.is_supported() else auto.moe.__module__
    return {"ops_triton": triton_ops, room: auto}


@functools.lru_cache(maxsize=2)  # one of SMALL, one of LARGE
def made_experts(E: int, H: int, inner: int, top_k: int, layout: str) -> weights.Experts:
    """One layer of random weights, with static scales for fp8."""
    config = replace(
        weights.published("120b"), num_hidden_layers=1, layer_types=("full_attention",),
        vocab_size=1, num_local_experts=E, num_experts_per_tok=top_k, hidden_size=H,
        intermediate_size=inner,
    )  # fmt: skip
    experts = weights.random(config, layout).experts[0]
    return replace(experts, gate_up_input_scale=0.02, down_input_scale=0.01)


def made_inputs(T: int, E: int, H: int) -> tuple:
    """x [T, H] of rows of many sizes, router weight [E, H] and bias [E], bf16."""
    g = torch.Generator().manual_seed(100 + T)
    x = torch.randn(T, H, generator=g) * torch.randn(T, 1, generator=g).exp()
    router = torch.randn(E, H, generator=g) * H**-0.5
    return x.bfloat16(), router.bfloat16(), torch.randn(E, generator=g).bfloat16()


def moved(thing, device):
    """A tensor, or a dataclass or tuple with tensors in it, on this device."""
    if isinstance(thing, torch.Tensor):
        return thing.to(device)
    if isinstance(thing, tuple):
        parts = [moved(part, device) for part in thing]
        return type(thing)(*parts) if hasattr(thing, "_fields") else tuple(parts)
    if dataclasses.is_dataclass(thing):
        fields = {f.name: moved(getattr(thing, f.name), device) for f in dataclasses.fields(thing)}
        return replace(thing, **fields)
    return thing


def check_layer(card: Card, ops, activations: str, layout: str, sizes: tuple, times: int) -> dict:
    """One MoE layer against the equations, and against itself, again and again."""
    E, H, inner, top_k, T = sizes
    experts, inputs = made_experts(E, H, inner, top_k, layout), made_inputs(T, E, H)
    try:
        packed = ops.prepare(moved(experts, card.device), activations)
    except ValueError as error:
        return {"verdict": "skipped", "why": str(error)}
    there = moved(inputs, card.device)
    results = [ops.moe(*there, packed, top_k, activations, 7.0).cpu() for _ in range(times)]
    want = EQUATIONS.moe(*inputs, EQUATIONS.prepare(experts, activations), top_k, activations, 7.0)
    row = {"error": bench_ops.relative(results[0], want), "limit": MOE_LIMIT, "repeated": times}
    row["other_bits"] = sum(not torch.equal(results[0], again) for again in results[1:])
    row["verdict"] = "right" if row["error"] <= MOE_LIMIT and not row["other_bits"] else "wrong"
    if row["other_bits"]:
        row["why"] = f"{row['other_bits']} of {times - 1} repetitions have other bits"
    return row


def check_operation(bench_: bench_ops.Bench, measure: Callable, config, case) -> dict:
    """Norms, dense layers or attention, as tools/bench_ops.py compares them with the equations."""
    measure(bench_, config, [case])
    rows, bench_.rows = bench_.rows, []
    if failed := [row["failed"] for row in rows if "failed" in row]:
        return {"verdict": "failed", "why": failed[0]}
    # of a tensor: its maximum is NaN where one of them is
    error = torch.tensor([row["error"] for row in rows if row["error"] is not None]).max().item()
    verdict = "right" if error <= OPS_LIMIT else "wrong"
    return {"verdict": verdict, "error": error, "limit": OPS_LIMIT, "rows": rows}


def check_other_operations(report: Report, card: Card) -> None:
    config = weights.published("20b")
    tokens, cases = [1, 64], [(1, 1, 512), (8, 1, 1024), (1, 512, 0), (2, 64, 200)]
    if not card.real:
        config = replace(
            config, hidden_size=96, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
            vocab_size=200,
        )  # fmt: skip
        tokens, cases = [1, 20], [(2, 1, 20), (1, 18, 0)]
    found = bench_ops.Bench(card.device, 600, math.inf, io.StringIO())
    for T in tokens:
        run = functools.partial(check_operation, found, bench_ops.norms, config, T)
        report.check("kernels", f"ops_triton.add_norm, {T} tokens", run)
    run = functools.partial(check_operation, found, bench_ops.linears, config, 1)
    report.check("kernels", "ops_triton.linear, 1 token", run)
    for case in cases:
        name = "ops_triton.attention, {} sequences of {} new and {} cached tokens".format(*case)
        run = functools.partial(check_operation, found, bench_ops.attention, config, case)
        report.check("kernels", name, run)


def check_kernels(report: Report, card: Card) -> None:
    times = 100 if card.real else 2
    for file, ops in operations(card).items():
        for activations, layout in FORMATS:
            for sizes in SMALL + (LARGE if card.real else []):
                E, H, inner, top_k, T = sizes
                name = (
                    f"{file}.moe, {activations}, {layout} weights, {T} tokens, {E} x {H} x {inner}"
                )
                run = functools.partial(check_layer, card, ops, activations, layout, sizes, times)
                if report.check("kernels", name, run)["verdict"] == "skipped":
                    break
    check_other_operations(report, card)
    if card.is_gfx950():
        check_promised_bits(report, card)


# --------------------------------------------------------------------------------------------------
# Bits that are promised, on a gfx950


def written_bits(got, want) -> dict:
    """`differing` in what the emulator wrote: the rest of its results it left as 0xff bytes."""
    got, want = (t.detach().cpu().contiguous().flatten() for t in (got, want))
    there = (want.view(torch.uint8).view(-1, want.itemsize) != 0xFF).any(1)
    return differing(got[there], want[there])


def promised_bits(card: Card, activations: str, T: int) -> dict:
    """The routing and quantised activations of x whose logits are exact in every order of sums:
    experts chosen, rows sorted by expert, tiles, and x as the experts see it."""
    import moe_gluon

    E, H = 32, 192
    x, router, bias = (
        t.float().mul(4).round().clamp(-8, 8).bfloat16() for t in made_inputs(T, E, H)
    )
    x = x * torch.exp2(torch.arange(T) % 7 - 3.0)[:, None].bfloat16()  # still exact
    layout = "hf-bf16" if activations == "bf16" else "openai"
    packed = moe_gluon.prepare(made_experts(E, H, 160, 4, layout), activations)
    got = moe_gluon.gating_gemm(
        *moved((x, router, bias), card.device), moved(packed, card.device), 4
    )
    with emulated():
        want = moe_gluon.gating_gemm(x, router, bias, packed, 4)
    row = {"verdict": "right", "differ": 0, "of": 0}
    for field in dataclasses.fields(want) if dataclasses.is_dataclass(want) else ():
        a, b = getattr(got, field.name), getattr(want, field.name)
        if isinstance(b, torch.Tensor) and b.dtype != torch.float32:  # gates go through exp
            found = written_bits(a, b)
            row["differ"], row["of"] = row["differ"] + found["differ"], row["of"] + found["of"]
            if found["differ"]:
                row |= {"verdict": "wrong", "why": f"{field.name}: {found['first']}"}
    if not row["of"]:
        raise TypeError("gating_gemm did not return a dataclass of tensors")
    return row


def batch_independence(card: Card, activations: str) -> dict:
    """A token's result, alone and as the last of 16, and of 17 and 300."""
    import moe_gluon

    layout = "hf-bf16" if activations == "bf16" else "openai"
    packed = moe_gluon.prepare(made_experts(8, 192, 160, 4, layout), activations)
    packed, (x, router, bias) = moved((packed, made_inputs(300, 8, 192)), card.device)
    row = {"verdict": "right", "differ": 0, "of": 0}
    for few, many in ((1, 16), (17, 300 if card.real else 40)):
        one, all_of = (moe_gluon.moe(x[-T:], router, bias, packed, 4) for T in (few, many))
        found = differing(all_of[-few:], one)
        row["differ"], row["of"] = row["differ"] + found["differ"], row["of"] + found["of"]
    row["verdict"] = "wrong" if row["differ"] else "right"
    return row


def check_promised_bits(report: Report, card: Card) -> None:
    for activations in OF_THE_EMULATOR:
        for T in (4, 40):
            name = f"moe_gluon.gating_gemm, {activations}, {T} tokens, the emulator's bits"
            report.check("kernels", name, functools.partial(promised_bits, card, activations, T))
        name = f"moe_gluon.moe, {activations}, a token's bits in other batches"
        report.check("kernels", name, functools.partial(batch_independence, card, activations))


# --------------------------------------------------------------------------------------------------
# Assumptions of the emulator, on a gfx950


@triton.jit
def instruction_kernel(x, y, z, out, ASM: tl.constexpr, N: tl.constexpr):
    """out = one instruction of x, y and z. A wait state on both sides, which the compiler does not
    put around what it does not see."""
    i = tl.arange(0, N)
    a, b, c = tl.load(x + i), tl.load(y + i), tl.load(z + i)
    r = tl.inline_asm_elementwise(
        "v_mov_b32 $0, 0\ns_nop 1\n" + ASM + "\ns_nop 1", "=&v,v,v,v", [a, b, c], dtype=tl.int32,
        is_pure=True, pack=1,
    )  # fmt: skip
    tl.store(out + i, r)


@triton.jit
def product_kernel(x, y, c, out, M: tl.constexpr, K: tl.constexpr):
    """out [M, M] = x [M, K] y [M, K]^T + c, bf16 operands."""
    m, k = tl.arange(0, M), tl.arange(0, K)
    a = tl.load(x + m[:, None] * K + k[None, :])
    b = tl.load(y + m[None, :] * K + k[:, None])
    at = m[:, None] * M + m[None, :]
    tl.store(out + at, tl.dot(a, b, tl.load(c + at)))


@triton.jit
def scaled_product_kernel(
    x,
    x_scale,
    y,
    y_scale,
    out,
    FX: tl.constexpr,
    FY: tl.constexpr,
    M: tl.constexpr,
    K: tl.constexpr,
):
    """out [M, M] of operands in codes [M, K] or [M, K / 2] (e2m1) with E8M0 scales [M, K / 32]."""
    KX: tl.constexpr = K // 2 if FX == "e2m1" else K
    KY: tl.constexpr = K // 2 if FY == "e2m1" else K
    m, s = tl.arange(0, M), tl.arange(0, K // 32)
    a = tl.load(x + m[:, None] * KX + tl.arange(0, KX)[None, :])
    b = tl.load(y + m[None, :] * KY + tl.arange(0, KY)[:, None])
    sa = tl.load(x_scale + m[:, None] * (K // 32) + s[None, :])
    sb = tl.load(y_scale + m[:, None] * (K // 32) + s[None, :])
    acc = tl.dot_scaled(a, sa, FX, b, sb, FY, tl.zeros((M, M), tl.float32))
    tl.store(out + m[:, None] * M + m[None, :], acc)


# All 160 KB of a compute unit's LDS are two powers of two of dwords: these and a quarter of them
LDS_WORDS = gl.constexpr(32768)


@gluon.jit
def fill_lds_kernel(value):
    layout: gl.constexpr = gl.BlockedLayout([4], [64], [8], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    most = gl.allocate_shared_memory(gl.int32, [LDS_WORDS], shared)
    rest = gl.allocate_shared_memory(gl.int32, [LDS_WORDS // 4], shared)
    most.store(gl.full([LDS_WORDS], 0, gl.int32, layout) + value)
    rest.store(gl.full([LDS_WORDS // 4], 0, gl.int32, layout) + value)


@gluon.jit
def read_lds_kernel(out):
    """A workgroup's LDS_WORDS dwords of LDS, which it has not written."""
    layout: gl.constexpr = gl.BlockedLayout([4], [64], [8], [0])
    shared: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    memory = gl.allocate_shared_memory(gl.int32, [LDS_WORDS], shared)
    at = gl.program_id(0) * LDS_WORDS + gl.arange(0, LDS_WORDS, layout)
    gl.store(out + at, memory.load(layout))


def floats(*values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float32).view(torch.int32)


def bits(*values) -> torch.Tensor:
    return torch.tensor([v - (v >> 31 << 32) for v in values], dtype=torch.int32)


INF, NAN, SNAN, LOW, SIGN = 0x7F800000, 0x7FC00000, 0x7FA00000, 0x007FFFFF, 1 << 31
SPECIAL = bits(
    0, SIGN, 1, SIGN | 1, LOW, SIGN | LOW, 0x00800000, 0x00800001, 0x7E800000, 0x7E800001,
    0x7F000000, 0xFF000000, 0x7F7FFFFF, INF, SIGN | INF, NAN, SIGN | NAN, SNAN, SIGN | SNAN,
    0x3F800000, 0xBF800000, 0x43E00000, 0x43E80000, 0x43E80001, 0x47600000, 0x47700000, 0x3E800000,
)  # fmt: skip


def operands(seed: int, exponents: tuple[int, int]) -> torch.Tensor:
    """1024 float32 as int32: special values, then both signs of exponents in this range."""
    g = torch.Generator().manual_seed(seed)
    n = 1024 - len(SPECIAL)
    values = torch.randint(0, 1 << 23, (n,), generator=g)
    values |= torch.randint(exponents[0] + 127, exponents[1] + 128, (n,), generator=g) << 23
    values |= torch.randint(0, 2, (n,), generator=g) << 31
    return torch.cat([SPECIAL, bits(*values.tolist())])


# what is assumed: instruction ($1, $2, $3 are x, y, z; z is 4.0), exponents of x and y, ULPs it
# may be off
INSTRUCTIONS = {
    "v_rcp_f32 flushes denormals, else within 1 ULP": ("v_rcp_f32 $0, $1", (-126, 127), 1),
    "v_rsq_f32 flushes denormals, else within 1 ULP": ("v_rsq_f32 $0, $1", (-126, 127), 1),
    "v_sqrt_f32 flushes denormals, else within 1 ULP": ("v_sqrt_f32 $0, $1", (-126, 127), 1),
    "v_exp_f32 flushes denormals, else within 1 ULP": ("v_exp_f32 $0, $1", (-10, 6), 1),
    "v_log_f32 flushes denormals, else within 1 ULP": ("v_log_f32 $0, $1", (-126, 127), 1),
    "v_max_f32 of signalling NaN and zeros": ("v_max_f32 $0, $1, $2", (-3, 3), 0),
    "v_min_f32 of signalling NaN and zeros": ("v_min_f32 $0, $1, $2", (-3, 3), 0),
    "v_med3_f32 with a NaN": ("v_med3_f32 $0, $1, $2, $3", (-3, 3), 0),
    "v_cvt_pk_fp8_f32: ties, overflow, NaN": ("v_cvt_pk_fp8_f32 $0, $1, $2", (-12, 10), 0),
    "v_cvt_pk_bf8_f32: ties, overflow, NaN": ("v_cvt_pk_bf8_f32 $0, $1, $2", (-18, 17), 0),
    "v_cvt_scalef32_pk_fp4_f32 by 1.0: ties, saturation, NaN": (
        "v_cvt_scalef32_pk_fp4_f32 $0, $1, $2, 1.0", (-4, 5), 0,
    ),
    "v_cvt_scalef32_pk_fp4_f32 by a register": (
        "v_cvt_scalef32_pk_fp4_f32 $0, $1, $2, $3", (-4, 5), 0,
    ),
    "v_cvt_pk_bf16_f32: ties, NaN": ("v_cvt_pk_bf16_f32 $0, $1, $2", (-126, 127), 0),
}  # fmt: skip


def ulps(got: torch.Tensor, want: torch.Tensor) -> torch.Tensor:
    """Distance of float32 given as int32 bits, in representable values; NaNs are one value, and
    zeros of either sign differ by one."""
    steps = [torch.where(t >= 0, t.long(), -(t.long() & 0x7FFFFFFF) - 1) for t in (got, want)]
    nans = [t.view(torch.float32).isnan() for t in (got, want)]
    distance = (steps[0] - steps[1]).abs()
    distance[nans[0] | nans[1]] = 1 << 40
    distance[nans[0] & nans[1]] = 0
    return distance


def probe_instruction(card: Card, asm: str, exponents: tuple[int, int], allowed: int) -> dict:
    x = operands(0, exponents)
    y = (
        x.roll(1)
        if allowed
        else x[torch.randperm(1024, generator=torch.Generator().manual_seed(1))]
    )
    z = floats(4.0).expand(1024).contiguous()

    def run(device):
        out = torch.zeros(1024, dtype=torch.int32, device=device)
        instruction_kernel[(1,)](*moved((x, y, z), device), out, asm, 1024, num_warps=4)
        return out.cpu()

    got = run(card.device)
    with emulated():
        want = run("cpu")
    distance = ulps(got, want) if allowed else (got != want).long()
    bad = (distance > allowed).nonzero()[:, 0].tolist()
    shown = [
        {name: f"{t[i].item() & 0xFFFFFFFF:#010x}" for name, t in
         (("x", x), ("y", y), ("card", got), ("emulator", want))}
        for i in bad[:8]
    ]  # fmt: skip
    row = {"verdict": "differs" if bad else "holds", "differ": len(bad), "of": 1024}
    row["worst_ulps"] = min(distance.max().item(), 1 << 40) if allowed else None
    return row | ({"first": shown, "why": str(shown[0])} if bad else {})


E2M1 = torch.tensor([0.0, 0.5, 1, 1.5, 2, 3, 4, 6])
FLOAT8 = {"e4m3": torch.float8_e4m3fn, "e5m2": torch.float8_e5m2}


def made_operand(fmt: str, values: torch.Tensor) -> torch.Tensor:
    """Codes of values [M, K] that the format holds exactly."""
    if fmt != "e2m1":
        return values.to(FLOAT8[fmt]).view(torch.uint8)
    codes = (values.abs()[..., None] == E2M1).int().argmax(-1) | (values < 0).int() << 3
    return (codes[:, 0::2] | codes[:, 1::2] << 4).to(torch.uint8)


def scaled_product(device, fx, fy, x, sx, y, sy, shape: int = 16) -> torch.Tensor:
    """By matrix instructions of shape x shape; of fewer than 4 waves' tiles Triton makes bf16."""
    M, K = x.shape
    out = torch.zeros(M, M, device=device)
    given = made_operand(fx, x), sx, made_operand(fy, y), sy
    scaled_product_kernel[(1,)](
        *moved(given, device), out, fx, fy, M, K, num_warps=4, matrix_instr_nonkdim=shape
    )
    return out.cpu()


def probe_scales(card: Card, fx: str, fy: str, shape: int) -> dict:
    """Small integers with another scale in every row and block, among them 0 (2^-127) and 255
    (NaN): the sums are exact in every order, so that the result says where operands and scales
    lie."""
    g = torch.Generator().manual_seed(2)
    M, K = 32, 128
    # Integers that e2m1 has; a row's scales are a permutation of 4 exponents. All terms are
    # multiples of 2^-5, and their sums below 2^12.
    few = torch.tensor([-3.0, -2, -1, 0, 1, 2, 3])
    x, y = (few[torch.randint(0, 7, (M, K), generator=g)] for _ in "xy")
    ex, ey = (torch.stack([torch.randperm(K // 32, generator=g) for _ in range(M)]) for _ in "xy")
    sx, sy = (127 + ex).to(torch.uint8), (125 - ey).to(torch.uint8)
    sx[3], sy[5, 1] = 0, 255
    wide = [
        v.double() * torch.exp2(s.double() - 127).repeat_interleave(32, 1)
        for v, s in ((x, sx), (y, sy))
    ]
    want = wide[0] @ wide[1].T
    want[:, 5] = torch.nan
    got = scaled_product(card.device, fx, fy, x, sx, y, sy, shape).double()
    bad = ~((got == want) | (got.isnan() & want.isnan()))
    row = {"verdict": "differs" if bad.any() else "holds", "differ": int(bad.sum()), "of": M * M}
    row["rows"] = bad.any(1).nonzero()[:, 0].tolist()
    row["columns"] = bad.any(0).nonzero()[:, 0].tolist()
    return row


def probe_sums(card: Card, kind: str) -> dict:
    """Which published rule for the sum inside a matrix instruction gives the card's bits."""
    import gfx950

    g, M, K = torch.Generator().manual_seed(3), 32, 256

    def spread(shape):
        return torch.randn(shape, generator=g) * torch.exp2(
            torch.randint(-5, 6, shape, generator=g)
        )

    if kind == "bf16":
        given = spread((M, K)).bfloat16(), spread((M, K)).bfloat16(), spread((M, M)) * 16

        def run(device):
            out = torch.zeros(M, M, device=device)
            product_kernel[(1,)](*moved(given, device), out, M, K, num_warps=1)
            return out.cpu()
    else:
        fx, fy = kind.split(" x ")
        scales = [torch.randint(117, 138, (M, K // 32), generator=g).to(torch.uint8) for _ in "xy"]
        values = [
            spread((M, K)).clamp(-448, 448).to(FLOAT8["e4m3"]).float()
            if f == "e4m3"
            else E2M1[torch.randint(0, 8, (M, K), generator=g)]
            * (1 - 2 * torch.randint(0, 2, (M, K), generator=g))
            for f in (fx, fy)
        ]

        def run(device):
            return scaled_product(device, fx, fy, values[0], scales[0], values[1], scales[1])

    got, rules = run(card.device), {}
    for rule in ("exact", *gfx950.RULES):
        with emulated(sums=rule):
            rules[rule] = differing(got, run("cpu"))["differ"]
    row = {"verdict": "differs" if rules["exact"] else "holds", "of": M * M, "rules": rules}
    same = [rule for rule, count in rules.items() if not count]
    return row | {"why": f"the bits of {', '.join(same) or 'no rule known here'}; others: {rules}"}


def probe_denormals(card: Card) -> dict:
    """bf16 denormals times 2^120, and a denormal C: a matrix instruction keeps both."""
    M, K = 32, 32
    x = torch.full((M, K), 2.0**-130).bfloat16()
    y = torch.full((M, K), 2.0**120).bfloat16()
    y[1] = 0
    c = torch.full((M, M), 2.0**-140)
    out = torch.zeros(M, M, device=card.device)
    product_kernel[(1,)](*moved((x, y, c), card.device), out, M, K, num_warps=1)
    want = torch.full((M, M), 32 * 2.0**-10)
    want[:, 1] = 2.0**-140
    found = differing(out, want)
    return {"verdict": "differs" if found["differ"] else "holds"} | found


def probe_lds(card: Card) -> dict:
    """What LDS that nobody wrote holds. Nothing rests on it: the row is for the record."""
    groups = 512 if card.real else 1
    out = torch.zeros(groups * LDS_WORDS.value, dtype=torch.int32, device=card.device)
    read_lds_kernel[(groups,)](out, num_warps=8)
    zeros, ones = ((out == value).float().mean().item() for value in (0, -1))
    why = f"{zeros:.0%} of the dwords are 0, {ones:.0%} 0xffffffff"
    return {"verdict": "noted", "why": why}


def probe_filled_lds(card: Card, activations: str) -> dict:
    """A layer's bits after all LDS was filled with zeros, with NaN and with 1.0."""
    ops = gptoss.choose_ops("gluon", card.device)
    layout = "hf-bf16" if activations == "bf16" else "openai"
    packed = ops.prepare(moved(made_experts(8, 192, 160, 4, layout), card.device), activations)
    row = {"verdict": "holds", "differ": 0, "of": 0}
    for T in (4, 40):
        inputs, results = moved(made_inputs(T, 8, 192), card.device), []
        for value in (0, -1, 0x3F803F80):
            fill_lds_kernel[(2048 if card.real else 1,)](value, num_warps=8)
            results.append(ops.moe(*inputs, packed, 4, activations, 7.0))
        for other in results[1:]:
            found = differing(other, results[0])
            row["differ"], row["of"] = row["differ"] + found["differ"], row["of"] + found["of"]
    row["verdict"] = "differs" if row["differ"] else "holds"
    return row


def assumptions(card: Card) -> dict[str, Callable[[], dict]]:
    """What is assumed -> its probe."""
    probes = {
        name: functools.partial(probe_instruction, card, *how) for name, how in INSTRUCTIONS.items()
    }
    for fx, fy in (
        ("e4m3", "e2m1"), ("e2m1", "e4m3"), ("e5m2", "e2m1"), ("e2m1", "e2m1"), ("e4m3", "e4m3"),
    ):  # fmt: skip
        for shape in (16, 32):
            name = f"places and scales of {fx} x {fy}, {shape} x {shape}, scales 0 and 255"
            probes[name] = functools.partial(probe_scales, card, fx, fy, shape)
    for kind in ("bf16", "e4m3 x e2m1", "e2m1 x e2m1"):
        name = f"sums of {kind} are exact and rounded once"
        probes[name] = functools.partial(probe_sums, card, kind)
    probes["matrix instructions keep denormals"] = functools.partial(probe_denormals, card)
    probes["LDS that nobody wrote"] = functools.partial(probe_lds, card)
    for activations in OF_THE_EMULATOR:
        name = f"{activations} layers do not see LDS that they did not write"
        probes[name] = functools.partial(probe_filled_lds, card, activations)
    return probes


def check_assumptions(report: Report, card: Card) -> None:
    if card.is_gfx950():
        for name, probe in assumptions(card).items():
            report.check("assumptions", name, probe)
    else:
        skipped = {"verdict": "skipped", "why": "they are about a gfx950"}
        report.check("assumptions", "all", lambda: skipped)


# --------------------------------------------------------------------------------------------------
# Times


def timing_commands(card: Card, model: str) -> dict[str, list[str]]:
    """What is timed -> the command, which prints JSON with its own floors."""
    ops = ["tools/bench_ops.py", "--model", model]
    step = ["bench.py", "--checkpoint", f"random:{model}", "--json"]
    if not card.is_gfx950():
        peer = ["tools/peer_gpu.py", "--model", model, "--json"]
        return {"operations, decode and prefill": ops, "whole step": step, "peer": peer}
    from bench_moe import MI355_FLOPS

    layer = ["tools/bench_moe.py", "--model", model, "--json", "--activations"]
    return {
        "layer, mxfp8": [*layer, "mxfp8"],
        "layer, fp8, and the peers installed": [*layer, "fp8"],
        "operations, decode and prefill": [*ops, "--flops", str(MI355_FLOPS["bf16"])],
        "whole step": step,
    }


def timed(command: list[str], seconds: float) -> dict:
    """One of these programs, in a process of its own: what it leaves on the card goes with it."""
    if seconds < LEAST_SECONDS:
        return {"verdict": "skipped", "why": "no time is left: --seconds"}
    if "--json" not in command:  # bench_ops prints a line of JSON for each row it has measured
        command = [*command, "--seconds", f"{seconds / 2:.0f}"]
    row = {"command": " ".join(["python", *command])}
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    ) as program:  # fmt: skip
        try:
            out, said = program.communicate(timeout=seconds)
            late = None
        except subprocess.TimeoutExpired:
            program.kill()
            out, said = program.communicate()
            late = f"stopped after {seconds:.0f} s"
    row["result"] = [json.loads(line) for line in out.splitlines() if line.startswith("{")]
    said = (said.strip().splitlines() or ["it says nothing"])[-1]
    if late:
        return row | {"verdict": "timed" if row["result"] else "skipped", "why": late}
    if program.returncode == 0 and row["result"]:
        return row | {"verdict": "timed"}
    return row | {"verdict": "skipped" if ": without " in said else "failed", "why": said}


def check_times(report: Report, card: Card, model: str, seconds: float) -> None:
    if not card.real:
        why = "nothing is timed in the emulator; tools/bench_moe.py counts there"
        report.check("times", "all", lambda: {"verdict": "skipped", "why": why})
        return
    torch.cuda.empty_cache()  # the programs need the card's memory
    end, commands = time.monotonic() + seconds, timing_commands(card, model)
    for n, (name, command) in enumerate(commands.items()):
        share = (end - time.monotonic()) / (len(commands) - n)  # of what is left
        report.check("times", name, functools.partial(timed, command, share))


# --------------------------------------------------------------------------------------------------
# Command line


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--emulate", action="store_true", help="an emulated gfx950 in place of a card")
    add("--only", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=", ".join(PARTS))
    add("--model", choices=bench.SIZES, default="20b", help="whose sizes are timed (default: 20b)")
    add("--seconds", type=float, default=1800.0, help="for all that is timed (default: 1800)")
    add("--json", type=Path, default=Path("first_run.json"), help="default: first_run.json")
    args = parser.parse_args(argv)
    if not (args.emulate or torch.cuda.is_available()):
        print(
            "first_run: PyTorch finds no GPU here; --emulate runs on an emulated gfx950",
            file=sys.stderr,
        )
        return 1
    settings = vars(args) | {"json": str(args.json), "only": list(args.only)}
    card, report = Card(args.emulate), Report(args.json, settings)
    try:
        report.save()
    except OSError as error:
        print(f"first_run: --json: {error}", file=sys.stderr)
        return 1
    with card.active(), torch.inference_mode():
        if "card" in args.only:
            report.check("card", "what it is", card.describe)
        if "kernels" in args.only:
            check_kernels(report, card)
        if "assumptions" in args.only:
            check_assumptions(report, card)
    if "times" in args.only:
        check_times(report, card, args.model, args.seconds)
    print(f"{report.path}: {len(report.data['checks'])} checks, {report.bad} wrong or failed")
    return int(report.bad > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
