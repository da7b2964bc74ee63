"""What a launch executed, and a model of which resource it keeps busiest. Counts are exact; cycles
are a model.

The model, all of it: a wave-instruction occupies its SIMD's vector pipe 4 cycles (transcendentals
16), scalar slot 4 cycles, its matrix pipe `matrix.cycles` (dense peak rates: bf16 1024 flop a cycle
and SIMD, fp8 2048, fp4 4096). LDS reads 256 bytes a cycle and CU (AMD, rocm.blogs.amd.com, "FP8
GEMM Optimization on AMD CDNA4 Architecture", Table 1: twice CDNA3's) and, as that source names
reads only, takes 128 from writes, atomics, permutes and direct copies. It works in passes over its
64 banks, to which bank conflicts add (`LDS.passes`, taken from one wave of each group). A CU
requests 64 bytes a cycle from its vector cache. HBM delivers 8 TB/s at 2.4 GHz. Work is spread
evenly over as many of 256 CUs as there are workgroups and as many of their 4 SIMDs as there are
waves. Latency, cache capacity, issue limits and clocks under load are not modelled: the table says
what bounds a kernel from below, not its time."""

import re

import numpy as np

from . import matrix

CUS, SIMDS = 256, 4
HBM_BYTES_PER_CYCLE, CACHE_BYTES_PER_CYCLE = 8e12 / 2.4e9, 64
CLASSES = (
    ("matrix", r"v_mfma"),
    ("vector", r"v_"),
    ("lds", r"ds_"),
    ("copy to lds", r"(buffer|global)_load\w*.* lds|global_load_lds"),
    ("vector load", r"(buffer|global|flat)_load"),
    ("vector store", r"(buffer|global|flat)_store"),
    ("atomic", r"(buffer|global|flat)_atomic"),
    ("scratch", r"scratch_"),
    ("scalar load", r"s_(buffer_)?load"),
    ("wait", r"s_waitcnt"),
    ("barrier", r"s_barrier"),
    ("branch", r"s_c?branch"),
    ("nop", r"s_nop"),
    ("scalar", r"s_"),
    ("cache", r"buffer_"),
)
TRANSCENDENTAL = re.compile(r"v_(rcp|rsq|sqrt|exp|log|sin|cos)")


def classify(ins):
    """The class of an instruction, worked out once."""
    if not ins.klass:
        ins.klass = next(name for name, pattern in CLASSES if re.match(pattern, ins.text))
        ins.cycles = {
            "matrix": lambda: matrix.cycles(ins),
            "vector": lambda: 16 if TRANSCENDENTAL.match(ins.op) else 4,
            "scalar": lambda: 4,
        }.get(ins.klass, int)()
    return ins.klass


class Counters:
    """Exact counts of one launch. `instructions`: wave-instructions by class; `cycles`: the model's
    busy cycles, summed over waves, of matrix, vector, scalar and LDS; `tensors`: name -> bytes
    requested ("read", "write") and distinct ("read_unique", "write_unique") with the tensor's
    "size"; `peak_bytes_in_flight`: loads outstanding in one wave; `unwritten_lds_bytes_read`: LDS
    bytes read that nobody wrote (legal where the values are masked off later)."""

    def __init__(
        self,
        program,
        counts,
        lds_cycles,
        conflict_cycles,
        spans,
        peak_bytes_in_flight,
        unwritten_reads,
    ):
        self.program, self.counts, self.lds_cycles, self.conflict_cycles = (
            program,
            counts,
            lds_cycles,
            conflict_cycles,
        )
        self.peak_bytes_in_flight, self.unwritten_lds_bytes_read = (
            peak_bytes_in_flight,
            unwritten_reads,
        )
        self.wave_instructions = int(counts.sum())
        self.instructions, self.cycles = self.total(0, len(counts), 1)
        self.tensors = {
            s.name: {"size": s.size}
            | {k: s.requested[k] for k in ("read", "write")}
            | {f"{k}_unique": s.unique(k) for k in ("read", "write")}
            for s in spans
        }

    def total(self, first, last, divide):
        """Instructions by class and busy cycles of program[first:last], divided by `divide`."""
        instructions, cycles = (
            {},
            {"matrix": 0, "vector": 0, "scalar": 0, "lds": 0, "bank conflicts": 0},
        )
        for pc in range(first, last):
            if n := int(self.counts[pc]):
                ins = self.program.code[pc]
                kind = classify(ins)
                instructions[kind] = instructions.get(kind, 0) + n / divide
                if ins.cycles:
                    cycles[kind] += ins.cycles * n / divide
                cycles["lds"] += int(self.lds_cycles[pc]) / divide
                cycles["bank conflicts"] += int(self.conflict_cycles[pc]) / divide
        return instructions, cycles

    def loop(self):
        """The steady loop: of the innermost loops the one with the most wave-instructions, per wave
        and iteration.

        Returns {"first", "last" (instruction numbers), "iterations" (of all waves together),
        "instructions", "cycles", "waits"}, or None for a kernel that never jumped back."""
        code, counts = self.program.code, self.counts
        backwards = [
            (self.program.labels[ins.operands[0].value], pc)
            for pc, ins in enumerate(code)
            if ins.op.startswith(("s_branch", "s_cbranch")) and counts[pc]
        ]
        # a loop may jump back from several places to its first instruction
        loops = list(
            {first: (first, last) for first, last in sorted(backwards) if first <= last}.values()
        )
        inner = [
            a for a in loops if not any(a != b and a[0] <= b[0] and b[1] <= a[1] for b in loops)
        ]
        if not inner:
            return None
        first, last = max(inner, key=lambda loop: counts[loop[0] : loop[1] + 1].sum())
        instructions, cycles = self.total(first, last + 1, int(counts[first]))
        waits = [ins.text for ins in code[first : last + 1] if ins.op == "s_waitcnt"]
        return {
            "first": first,
            "last": last,
            "iterations": int(counts[first]),
            "instructions": instructions,
            "cycles": cycles,
            "waits": waits,
        }


def resources(launch):
    """Modelled busy cycles of each resource's busiest unit: the largest bounds the kernel from
    below."""
    c = launch.counters
    workgroups = int(np.prod(launch.grid))
    cus = min(CUS, workgroups)
    simds = min(CUS * SIMDS, launch.waves)
    requested = sum(t["read"] + t["write"] for t in c.tensors.values())
    unique = sum(t["read_unique"] + t["write_unique"] for t in c.tensors.values())
    return {
        "matrix": c.cycles["matrix"] / simds,
        "vector": c.cycles["vector"] / simds,
        "scalar": c.cycles["scalar"] / simds,
        "lds": c.cycles["lds"] / cus,
        "vector cache": requested / cus / CACHE_BYTES_PER_CYCLE,
        "hbm": unique / HBM_BYTES_PER_CYCLE,
    }


def kb_in_flight(launch, workgroups):
    """KB that a CU has asked for and waits for, where so many workgroups have work. Resident on it
    is what its 4 SIMDs hold, in whole workgroups, or what there is for 256 CUs."""
    waves = launch.waves // int(np.prod(launch.grid))  # of a workgroup
    most = launch.profile["occupancy"] * SIMDS // waves * waves
    return min(most, workgroups * waves / CUS) * launch.counters.peak_bytes_in_flight / 1000


def table(launch):
    """The launch's static profile, counts, bytes and modelled resources as text."""
    lines = [
        f"{launch.name}  grid {launch.grid}, {launch.waves} waves",
        "  " + ", ".join(f"{k} {v}" for k, v in launch.profile.items()),
    ]
    if (c := launch.counters) is None:
        return lines[0] + "\n" + lines[1] + "\n  compiled only"
    lines.append(
        f"  {c.wave_instructions:,} wave-instructions: "
        + ", ".join(
            f"{k} {round(v):,}" for k, v in sorted(c.instructions.items(), key=lambda kv: -kv[1])
        )
    )
    lines.append(
        f"  peak bytes in flight a wave: {c.peak_bytes_in_flight:,}; LDS bytes read that were "
        "never written: "
        f"{c.unwritten_lds_bytes_read:,}"
    )
    for name, t in c.tensors.items():
        lines.append(
            f"  {name:20} {t['size']:>12,} B  read {t['read']:>13,} (unique {t['read_unique']:,})  "
            f"written {t['write']:,} (unique {t['write_unique']:,})"
        )
    model = resources(launch)
    busiest = max(model, key=model.get)
    lines.append(
        "  modelled cycles of the busiest unit: "
        + ", ".join(f"{'*' if k == busiest else ''}{k} {v:,.0f}" for k, v in model.items())
    )
    if loop := c.loop():
        lines.append(
            f"  steady loop, a wave and iteration ({loop['iterations']:,} in all): "
            + ", ".join(f"{k} {v:.1f}" for k, v in loop["instructions"].items())
        )
        lines.append(
            "    modelled cycles: "
            + ", ".join(f"{k} {v:,.0f}" for k, v in loop["cycles"].items())
            + f"; waits: {', '.join(loop['waits']) or 'none'}"
        )
    return "\n".join(lines)
