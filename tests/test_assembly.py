"""What no emulated run can show of the compiled kernels, read off their assembly: the wait states
around inline assembly, which the compiler takes for a black box, the fences between workgroups, and
what spoils a register in the hardware or the compilers of today. Nothing here knows a kernel by
name."""

import collections
import functools
import io
import math
import re
from dataclasses import replace

import bench_ops
import pytest
import torch
import triton
import triton.language as tl
from test_moe_gluon import placeholder
from triton.language.extra.hip import libdevice

import gfx950
import weights
from gfx950 import matrix
from gfx950.asm import Program, parse_instruction
from moe_gluon import DECODE_TOKENS, FORMATS, moe

PARTIAL = re.compile(r"v_cvt_(scalef32_)?pk_(fp8|bf8|fp4)_")  # write a part of their destination
TRANSCENDENTAL = re.compile(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)_")


@functools.cache
def programs(activations):
    """Every kernel of a layer of 120b size in both regimes: [Program]."""
    packed, router_weight = (
        placeholder(128, activations),
        torch.empty(128, 2880, dtype=torch.bfloat16),
    )
    router_bias = router_weight[:, 0].contiguous()
    with gfx950.compile_only() as gpu:
        for tokens in (4, 4 * DECODE_TOKENS):
            x = torch.empty(tokens, 2880, dtype=torch.bfloat16)
            moe(x, router_weight, router_bias, packed, 4)
    return [launch.program for launch in gpu.launches]


every_kernel = pytest.mark.parametrize("activations", FORMATS)


# ------------------------------------------------------------------------------------- instructions


def written(ins):
    """Mask of the registers that a vector instruction writes."""
    count = 2 if "swap" in ins.op else 1
    return functools.reduce(int.__or__, (opd.mask for opd in ins.operands[:count]), 0)


def read(ins):
    first = 0 if PARTIAL.match(ins.op) or "swap" in ins.op or "fmac" in ins.op else 1
    return functools.reduce(int.__or__, (opd.mask for opd in ins.operands[first:]), 0)


def wait_states(ins):
    return ins.operands[0].value + 1 if ins.op == "s_nop" else 1


def predecessors(program):
    """[program counters that may run just before] for each program counter."""
    before = [[] for _ in program.code]
    for pc, ins in enumerate(program.code):
        if re.match(r"s_c?branch", ins.op):
            before[program.labels[ins.operands[0].value]].append(pc)
        if ins.op not in ("s_branch", "s_endpgm") and pc + 1 < len(program.code):
            before[pc + 1].append(pc)
    return before


def sources(program, before, pc, regs, most):
    """(instruction that wrote some of `regs`, wait states between it and pc), over all paths to pc,
    at most `most` wait states back."""
    found, todo = [], [(pc, regs, 0)]
    while todo:
        at, wanted, states = todo.pop()
        for prior in before[at]:
            ins, left = program.code[prior], wanted
            if ins.op.startswith("v_") and written(ins) & wanted:
                found.append((ins, states))
                left &= ~written(ins)
            if left and (further := states + wait_states(ins)) < most:
                todo.append((prior, left, further))
    return found


def states_needed(producer):
    """Wait states before a vector instruction may read what this one wrote, or write it anew (LLVM,
    GCNHazardRecognizer: checkMAIVALUHazards on gfx950 and the hazard of transcendentals; passes are
    4 cycles of the matrix pipe)."""
    if producer.op.startswith("v_mfma"):
        return matrix.cycles(producer) // 4 + 4
    return 1 if TRANSCENDENTAL.match(producer.op) else 0


MOST = 20  # of a 16-pass matrix instruction


def too_early(program):
    """[(consumer, producer, wait states)] of instructions that touch a matrix result, or read a
    transcendental's, before they may. Matrix instructions among themselves have rules of their own,
    and no inline assembly here is one."""
    before, out = predecessors(program), []
    for pc, ins in enumerate(program.code):
        if ins.op.startswith("v_mfma"):
            continue
        for producer, states in sources(program, before, pc, ins.regs, MOST):
            # the memory units wait for transcendentals themselves
            reads = ins.op.startswith("v_") and written(producer) & read(ins)
            if states < states_needed(producer) and (reads or producer.op.startswith("v_mfma")):
                out.append((ins, producer, states))
    return out


def right_behind(program):
    """[(reader, inline assembly)] where a vector instruction reads, with no wait state between,
    what a conversion in inline assembly wrote: a part of a register, which is not forwarded (LLVM,
    GCNHazardRecognizer: checkVALUHazards, the hazard of destination selects)."""
    before = predecessors(program)
    return [
        (ins, producer)
        for pc, ins in enumerate(program.code)
        if ins.op.startswith("v_")
        for producer, _ in sources(program, before, pc, read(ins), 1)
        if producer.inline and PARTIAL.match(producer.op)
    ]


# ------------------------------------------------------------------------------------ wait states


@every_kernel
def test_wait_states(activations):
    """What the compiler cannot see it does not protect: inline assembly that reads a result. The
    compiler's own readers are under the same rule, which so is seen to be its rule."""
    for program in programs(activations):
        assert not [(c.text, p.text, n, c.where) for c, p, n in too_early(program)]
        assert not [(c.text, p.text, c.where) for c, p in right_behind(program)]


@every_kernel
def test_the_rule_is_the_compilers(activations):
    """Some compiler-made reader of a matrix result has exactly the wait states of the rule."""
    slack = collections.Counter()
    for program in programs(activations):
        before = predecessors(program)
        for pc, ins in enumerate(program.code):
            if not ins.op.startswith("v_mfma"):
                for producer, states in sources(program, before, pc, ins.regs, MOST):
                    if producer.op.startswith("v_mfma"):
                        slack[states - states_needed(producer)] += 1
    assert min(slack) == 0, slack


@triton.jit
def convert(x):
    return tl.inline_asm_elementwise(
        "v_cvt_pk_fp8_f32 $0, $1, $1", "=v,v", [x], dtype=tl.int32, is_pure=True, pack=1
    )


@triton.jit
def blind_product_kernel(x, out):
    i = tl.arange(0, 64)[:, None] * 64 + tl.arange(0, 64)[None, :]
    a = tl.load(x + i)
    tl.store(out + i, convert(tl.dot(a, a)))


@triton.jit
def blind_power_kernel(x, out):
    i = tl.arange(0, 64)
    tl.store(out + i, convert(libdevice.fast_expf(tl.load(x + i).to(tl.float32))))


@pytest.mark.parametrize(
    "kernel, producer", [(blind_product_kernel, "v_mfma"), (blind_power_kernel, "v_exp")]
)
def test_blind_inline_assembly_is_found(kernel, producer):
    """Inline assembly that reads what a matrix or transcendental instruction has just written."""
    x, out = torch.empty(64, 64, dtype=torch.bfloat16), torch.empty(64, 64, dtype=torch.int32)
    with gfx950.compile_only() as gpu:
        kernel[(1,)](x, out, num_warps=1)
    found = too_early(gpu.launches[0].program)
    assert found and all(c.inline and p.op.startswith(producer) for c, p, _ in found)


def test_a_conversion_read_right_behind_it_is_found():
    lines = ["v_cvt_pk_fp8_f32 v1, v2, v2", "{}", "v_perm_b32 v1, v1, v3, v4", "s_endpgm"]
    for between, found in (("s_nop 0", 0), ("v_cvt_pk_fp8_f32 v3, v2, v2", 1), (None, 1)):
        code = [
            parse_instruction(line.format(between), f"line {i}", 64)
            for i, line in enumerate(lines)
            if between or line != "{}"
        ]
        for ins in code:
            ins.inline = ins.op.startswith("v_cvt")
        assert len(right_behind(Program("bench", code, {}, [], {}, 64))) == found, between


# ---------------------------------------------------------------------------------------- registers


@every_kernel
def test_matrix_instructions(activations):
    """One opcode an accumulator: between two the compiler puts no wait states (LLVM issue 218363).
    Scales in vector registers: others are read otherwise (LLVM PR 158117)."""
    for program in programs(activations):
        opcodes = collections.defaultdict(set)
        for ins in program.code:
            if ins.op.startswith("v_mfma"):
                dst, _, _, c, *scales = ins.operands
                assert all(s.kind == "v" for s in scales), ins.text
                for register in range(dst.index, dst.index + dst.count):
                    opcodes[register].add(ins.op)
                if c.kind == "v":
                    for register in range(c.index, c.index + c.count):
                        opcodes[register].add(ins.op)
        assert all(len(ops) == 1 for ops in opcodes.values())


@every_kernel
def test_wide_stores(activations):
    """No vector instruction writes the data of a store of three or four dwords right behind it.
    The compiler sees to it where the store's scalar offset is a literal; where it is a register,
    triton 3.7.1's does not (LLVM issue 197267, measured on MI350X)."""
    stores = 0
    for program in programs(activations):
        before = predecessors(program)
        for pc, ins in enumerate(program.code):
            for prior in before[pc] if ins.op.startswith("v_") else ():
                store = program.code[prior]
                if re.match(r"(buffer|global)_store_dwordx[34]", store.op):
                    data = store.operands[0 if store.op.startswith("buffer") else 1]
                    assert not data.mask & written(ins), (store.text, ins.text, ins.where)
        stores += sum("store_dwordx4" in ins.op for ins in program.code)
    assert stores


# ------------------------------------------------------------------------------------------- fences


def broken_fences(code):
    """What is missing around a kernel's atomic by which workgroups tell each other that their
    results are stored (LLVM AMDGPUUsage, "Memory Model GFX942", which gfx950 has): every wave's
    stores awaited before the barrier, the L2 written back before the atomic, what lies in caches
    dropped after it, a barrier before any wave reads the others' results."""
    (atomic,) = [i for i, ins in enumerate(code) if re.match(r"(global|buffer)_atomic_", ins.op)]

    def drained(first, last):
        waits = (ins.mods.get("vmcnt") for ins in code[first:last] if ins.op == "s_waitcnt")
        return 0 in waits

    def last(op, end):
        return max((i for i in range(end) if re.match(op, code[i].op)), default=-1)

    def first(op, start):
        return next((i for i in range(start, len(code)) if re.match(op, code[i].op)), len(code))

    store = r"(buffer|global)_store"
    write_back, barrier = last("buffer_wbl2", atomic), last("s_barrier", atomic)
    invalidate, load = first("buffer_inv", atomic), first(r"(buffer|global)_load", atomic + 1)
    checks = {
        "stores behind the barrier": last(store, atomic) < barrier,
        "stores not awaited before the barrier": drained(last(store, atomic), barrier),
        "no write-back behind the barrier": barrier < write_back,
        "a write-back of another scope": code[write_back].text == "buffer_wbl2 sc1",
        "write-back not awaited": drained(write_back, atomic),
        "the old value is not returned": "sc0" in code[atomic].mods,
        "the atomic is not awaited": drained(atomic, invalidate),
        "no invalidation before the loads": invalidate < load,
        "an invalidation of another scope": code[invalidate].text == "buffer_inv sc1"
        if invalidate < len(code)
        else False,
        "no barrier before the loads": invalidate < first("s_barrier", invalidate) < load,
    }
    return [what for what, holds in checks.items() if not holds]


@every_kernel
def test_fences_between_workgroups(activations):
    """Exactly one kernel of decode meets its other workgroups, none of prefill; what it does about
    caches is whole, and each part is missed when it is gone."""
    meeting = [p for p in programs(activations) if any("atomic" in ins.op for ins in p.code)]
    (program,) = meeting
    assert broken_fences(program.code) == []
    (atomic,) = [i for i, ins in enumerate(program.code) if "atomic" in ins.op]
    removed = []
    for i in range(max(atomic - 200, 0), min(atomic + 20, len(program.code))):
        ins = program.code[i]
        if ins.op.startswith(("buffer_wbl2", "buffer_inv")) or ins.mods.get("vmcnt") == 0:
            rest = program.code[:i] + program.code[i + 1 :]
            if broken := broken_fences(rest):
                removed.append((ins.op, *broken[:1]))
    ops = collections.Counter(op for op, _ in removed)
    assert ops["buffer_wbl2"] == ops["buffer_inv"] == 1 and ops["s_waitcnt"] == 3, removed


def test_kernels_for_any_gpu():
    """The same of ops_triton's kernels, of which several meet other workgroups."""
    config = replace(
        weights.published("20b"), hidden_size=96, intermediate_size=64, vocab_size=200,
        num_local_experts=6, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
    )  # fmt: skip
    with gfx950.emulate() as gpu:
        found = bench_ops.Bench(torch.device("cpu"), 600, math.inf, io.StringIO())
        bench_ops.moe(found, config, [1, 20], [], "bf16", [])
        bench_ops.attention(found, config, [(2, 1, 20), (1, 18, 0)])
        bench_ops.norms(found, config, [1])
        bench_ops.linears(found, config, [1])
    assert not any("failed" in row for row in found.rows)
    meeting = set()
    for program in {id(launch.program): launch.program for launch in gpu.launches}.values():
        assert not too_early(program) and not right_behind(program), program.name
        if any("atomic" in ins.op for ins in program.code):
            assert broken_fences(program.code) == [], program.name
            meeting.add(program.name)
    assert len(meeting) >= 3
