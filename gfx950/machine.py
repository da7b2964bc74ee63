"""The machine: waves that share a program counter run as one numpy operation (a `Group`), a
scheduler picks groups.

A `Machine` holds one slice of the grid: as many workgroups as fit the memory budget, all resident
at once."""

import re

import numpy as np

from . import access, decode, matrix, memory
from .asm import EXEC, SGPR_BIT
from .isa import ALU, i32, i64, u32, u64

# What the instructions of `isa` and `decode` assume of MODE at the kernel's start
ASSUMED = {
    "ieee_mode": 1,
    "dx10_clamp": 1,
    "float_round_mode_32": 0,
    "float_round_mode_16_64": 0,
    "float_denorm_mode_32": 3,
    "float_denorm_mode_16_64": 3,
    "fp16_overflow": 0,
}
RUNNING, AT_BARRIER, ENDED = 0, 1, 2
BARRIER, END = object(), object()  # what a control instruction returns besides a program counter
SPIN = 64  # backward jumps after which waves let the others go first
MAX_WAVES = 512  # of a slice: enough to drown numpy's overhead, few enough for cache
SLICE_BYTES = 1 << 29  # registers and LDS of a slice


class GPUFault(Exception):
    """A fault of the emulated kernel; the message names instruction, Python line, wave, lane and
    address."""


class Group:
    """Waves `ids` of a machine; `g` indexes them in register arrays (a slice where it can, so that
    reads are views)."""

    __slots__ = ("m", "ids", "g", "n", "mask", "member", "view")

    def __init__(self, m, ids):
        self.m, self.ids, self.n = m, ids, len(ids)
        self.view = self.n == m.waves
        self.g = slice(None) if self.view else ids
        self.member = np.zeros(m.waves, bool)
        self.member[ids] = True
        self.refresh_exec()

    def refresh_exec(self):
        lanes = decode.unpack_mask(self.s(EXEC), self.s(EXEC + 1))
        self.mask = None if lanes.all() else lanes

    def mode(self):
        """MODE, which all waves of a group must have set alike."""
        modes = self.m.mode[self.g]
        if (modes != modes[0]).any():
            raise decode.Unsupported("waves that run together in different modes")
        return int(modes[0])

    def v(self, r):
        return self.m.vector[r][self.g]

    def s(self, r):
        return self.m.scalar[r][self.g][:, None]

    def s64(self, r):
        return self.s(r).astype(u64) | self.s(r + 1).astype(u64) << u64(32)

    def scc(self):
        return self.m.scc[self.g][:, None]

    def set_v(self, r, bits, mask):
        register = self.m.vector[r]
        if mask is None:
            register[self.g] = bits
        elif self.view:
            np.copyto(register, bits, where=mask)
        else:
            register[self.g] = np.where(mask, bits, register[self.g])

    def set_s(self, r, bits):
        self.m.scalar[r][self.g] = bits[:, 0] if np.ndim(bits) == 2 else bits
        if r >= EXEC:
            self.refresh_exec()

    def set_s64(self, r, bits):
        self.set_s(r, bits.astype(u32))
        self.set_s(r + 1, (bits >> u64(32)).astype(u32))

    def set_scc(self, value):
        self.m.scc[self.g] = value[:, 0] if np.ndim(value) == 2 else value


# ----------------------------------------------------------------------------------------------
# control flow


def branch(ins):
    """Conditional and unconditional jumps: returns the new program counter, per wave where they
    disagree."""
    target = ins.labels[ins.operands[0].value]
    if ins.op == "s_branch":
        return lambda w: target
    what, truth = re.fullmatch(r"s_cbranch_(scc|vcc|exec)(z|nz|0|1)", ins.op).groups()
    nonzero = truth in ("nz", "1")
    read = {
        "scc": lambda w: w.scc()[:, 0],
        "vcc": lambda w: w.s64(decode.VCC)[:, 0] != 0,
        "exec": lambda w: w.s64(EXEC)[:, 0] != 0,
    }[what]

    def run(w):
        taken = read(w) == nonzero
        if taken.all():
            return target
        if not taken.any():
            return None
        return np.where(taken, target, ins.pc + 1)

    return run


def waitcnt(ins):
    vm, lgkm = ins.mods.get("vmcnt"), ins.mods.get("lgkmcnt")

    def run(w):
        if vm is not None:
            w.m.vm.wait(w, vm)
        if lgkm is not None:
            w.m.ds.wait(w, lgkm)
            if lgkm == 0:
                w.m.smem.wait(w, 0)

    return run


def clock(ins):
    def run(w):
        w.set_s64(ins.operands[0].index, np.uint64(w.m.counts.sum()))

    return run


CONTROL = {
    "s_barrier": lambda ins: lambda w: BARRIER,
    "s_endpgm": lambda ins: lambda w: END,
    "s_waitcnt": waitcnt,
    "s_branch": branch,
    "s_memtime": clock,
    "s_memrealtime": clock,
}
CONTROL |= {f"s_cbranch_{c}": branch for c in ("scc0", "scc1", "vccz", "vccnz", "execz", "execnz")}


SDWA = {"dst_sel", "dst_unused", "src0_sel", "src1_sel"}
DPP = {
    "quad_perm",
    "row_shl",
    "row_shr",
    "row_ror",
    "row_mirror",
    "row_half_mirror",
    "row_bcast",
    "row_newbcast",
    "wave_shl",
    "wave_shr",
    "wave_rol",
    "wave_ror",
    "row_mask",
    "bank_mask",
    "bound_ctrl",
}
# sc0: also return old values
MODIFIERS = [
    (re.compile(pattern), known)
    for pattern, known in (  # what the handlers look at; first match
        (r"v_mfma_.*", {"op_sel", "op_sel_hi", "cbsz", "blgp", "abid"}),
        (r"v_pk_mov_b32", {"op_sel", "op_sel_hi"}),
        (r"v_pk_.*", {"op_sel", "op_sel_hi", "neg_lo", "neg_hi", "clamp"}),
        (r"v_fma_mix.*", {"op_sel", "op_sel_hi", "clamp"}),
        (r"v_bitop3_.*", {"bitop3"}),
        (r"v_cvt_(scalef32_)?(pk_)?\w+_(fp8|bf8|fp4)", {"op_sel", "src0_sel"}),
        (r"v_cvt_(scalef32_)?pk_(fp8|bf8|fp4)_.*", {"op_sel"}),
        (r"v_.*", {"op_sel", "clamp", "mul", "div"} | SDWA | DPP),
        (r"ds_.*", {"offset", "offset0", "offset1"}),
        (r"s_waitcnt", {"vmcnt", "lgkmcnt", "expcnt"}),
        (r"s_(buffer_)?load_.*", {"offset", "glc"}),
        (r"s_.*", set()),
        (r".*", {"offset", "offen", "idxen", "lds", "sc0", "sc1", "nt"}),
    )
]


def build(ins):
    """The Python function of an instruction."""
    run = build_plain(ins)
    return decode.nearest_only(run) if decode.ROUNDS_F16.match(ins.op) else run


def build_plain(ins):
    known = next(known for pattern, known in MODIFIERS if pattern.fullmatch(ins.op))
    if unknown := set(ins.mods) - known:
        raise decode.Unsupported(f"modifier {', '.join(sorted(unknown))}")
    if ins.op in CONTROL:
        return CONTROL[ins.op](ins)
    if ins.op in decode.LANE_OPS:
        return decode.LANE_OPS[ins.op](ins)
    if ins.op in ALU:
        return decode.arithmetic(ins)
    if ins.op.startswith("v_mfma"):
        return matrix.mfma(ins)
    if handler := access.handler(ins.op):
        return handler(ins)
    raise decode.Unsupported("unknown opcode")


def first_run(ins):
    """Decodes at first execution, so that a path never taken may hold anything."""

    def run(w):
        ins.run = build(ins)
        return ins.run(w)

    return run


def prepare(program):
    """Numbers the instructions of a parsed program and makes them runnable. Sets `lds_unit`, the
    bytes that one cell of the LDS shadow stands for: the narrowest access, 4 at most."""
    for pc, ins in enumerate(program.code):
        ins.pc, ins.labels, ins.run = pc, program.labels, first_run(ins)
    widths = [access.access_bytes(i) for i in program.code if i.op.startswith("ds_")]
    program.lds_unit = min([4, *widths])
    return program


# ---------------------------------------------------------------------------------------------- the
# machine


class Machine:
    """Runs a program over a grid. spans: the tensors; kernarg: address of the kernel arguments;
    counters: three int64 arrays, an element per instruction, of wave-instructions, LDS cycles and
    bank-conflict cycles. traced: a workgroup, the instruction numbers of whose first wave go to the
    list `trace`. sums: of `emulate`."""

    def __init__(
        self,
        program,
        spans,
        kernarg,
        grid,
        num_warps,
        lds_size,
        timing,
        schedule,
        rng,
        counters,
        traced=None,
        sums="exact",
    ):
        self.program, self.code, self.timing, self.schedule, self.rng = (
            program,
            program.code,
            timing,
            schedule,
            rng,
        )
        self.grid, self.num_warps, self.lds_size, self.spans, self.kernarg = (
            grid,
            num_warps,
            lds_size,
            spans,
            kernarg,
        )
        d = program.directives
        for name, value in ASSUMED.items():
            if d.get(name, value) != value:
                raise decode.Unsupported(f"a kernel with .amdhsa_{name} {d[name]}")
        self.scratch_size = d.get("private_segment_fixed_size", 0)
        self.registers = program.accum_offset + d.get("agpr_count", 0)
        self.counts, self.lds_cycles, self.conflict_cycles = counters
        self.peak_inflight, self.unwritten_reads, self.conflicts = 0, 0, {}
        self.traced, self.trace, self.sums = traced, [], sums
        self.leader = int(rng.integers(num_warps))  # the wave that runs ahead under "skew"

    def run(self):
        total = int(np.prod(self.grid))
        wave_bytes = self.registers * 256 + self.scratch_size * 64 + 2048
        group_bytes = self.num_warps * wave_bytes + self.lds_size * (
            2 + 17 // self.program.lds_unit
        )
        per_slice = max(1, min(total, MAX_WAVES // self.num_warps, SLICE_BYTES // group_bytes))
        order = self.rng.permutation(total) if self.schedule == "random" else np.arange(total)
        with np.errstate(all="ignore"):
            for start in range(0, total, per_slice):
                self.start(order[start : start + per_slice])
                while self.step():
                    pass

    def start(self, workgroups):
        """Sets the initial state of a slice (LLVM AMDGPUUsage, "Initial Kernel Execution
        State")."""
        d, n = self.program.directives, len(workgroups) * self.num_warps
        self.waves, self.workgroups = n, workgroups
        self.group_of = np.repeat(np.arange(len(workgroups), dtype=i32), self.num_warps)
        self.wave_of = np.tile(np.arange(self.num_warps, dtype=i32), len(workgroups))
        here = np.flatnonzero(workgroups == self.traced)
        self.traced_wave = int(here[0]) * self.num_warps if len(here) else None
        self.vector = list(np.full((self.registers, n, 64), 0xFFFFFFFF, u32))
        self.scalar = list(np.full((128, n), 0xFFFFFFFF, u32))
        self.scc = np.zeros(n, bool)
        self.pc, self.state, self.jumps = np.zeros(n, i64), np.zeros(n, np.int8), np.zeros(n, i64)
        self.inflight, self.pending = np.zeros(n, i64), 0
        self.mode = np.zeros(n, i64)  # MODE's bits beyond the defaults
        self.vm, self.ds, self.smem = memory.Queue(self), memory.Queue(self), memory.Queue(self)
        self.lds = memory.LDS(self, max(self.lds_size, 4), len(workgroups), self.program.lds_unit)
        spans = [*self.spans]
        if self.scratch_size:
            self.scratch_base = 1 << 56
            spans.append(
                memory.Span(
                    "scratch",
                    self.scratch_base,
                    np.full(n * 64 * self.scratch_size, 0xFF, np.uint8),
                )
            )
        self.memory = memory.Memory(spans)

        # work-item id x; y = z = 0
        self.vector[0][:] = (self.wave_of[:, None] * 64 + np.arange(64)).astype(u32)
        # those two stay poison
        first = 2 * (d.get("user_sgpr_dispatch_ptr", 0) + d.get("user_sgpr_queue_ptr", 0))
        self.scalar[first][:], self.scalar[first + 1][:] = (
            self.kernarg & 0xFFFFFFFF,
            self.kernarg >> 32,
        )
        next_s = d["user_sgpr_count"]
        ids = np.unravel_index(workgroups, self.grid[::-1])[::-1]  # x runs fastest
        for axis in range(3):
            if d[f"system_sgpr_workgroup_id_{'xyz'[axis]}"]:
                self.scalar[next_s][:] = ids[axis][self.group_of]
                next_s += 1
        self.groups = {}

    def group(self, ids):
        key = ids.tobytes()
        w = self.groups.get(key)
        if w is None:
            if len(self.groups) > 4096:
                self.groups.clear()
            w = self.groups[key] = Group(self, ids)
        else:
            w.refresh_exec()
        return w

    def lane_order(self, n):
        return self.rng.permutation(n) if self.schedule == "random" else np.arange(n)

    # ------------------------------------------------------------------ scheduling

    def step(self):
        """Picks a group and runs it until it blocks, diverges or meets others. False when every
        wave has ended."""
        able = self.state == RUNNING
        if not able.any():
            return False
        if self.schedule == "random":  # some of the waves at a random place, for a random while
            pc = int(self.pc[self.rng.choice(np.flatnonzero(able))])
            ids = np.flatnonzero(able & (self.pc == pc))
            ids = ids[self.rng.random(len(ids)) < self.rng.uniform(0.1, 1.0)]
            if len(ids):
                self.run_group(self.group(ids), pc, None, True, int(self.rng.integers(1, 200)))
            return True
        turn = self.jumps // SPIN
        first = able & (turn == turn[able].min())
        if self.schedule == "skew" and (ahead := first & (self.wave_of == self.leader)).any():
            first = ahead  # in each workgroup one wave runs whenever it can
        pc = int(self.pc[first].min())  # the hindmost, so that waves join again after a branch
        ids, later = np.flatnonzero(first & (self.pc == pc)), self.pc[first & (self.pc > pc)]
        alone = len(ids) == np.count_nonzero(able)
        self.run_group(
            self.group(ids), pc, int(later.min()) if len(later) else None, not alone, 5_000
        )
        return True

    def run_group(self, w, pc, stop, shared, budget):
        """Runs a group from pc for `budget` instructions or until it reaches `stop`, where others
        wait to be joined. `shared`: others could run; then backward jumps count, so that a loop
        that waits for the others lets them go."""
        code, counts, randomly = self.code, self.counts, self.timing == "random"
        trace = self.trace if self.traced_wave is not None and w.member[self.traced_wave] else None
        for _ in range(budget):
            ins = code[pc]
            counts[pc] += w.n
            if trace is not None:
                trace.append(pc)
            if ins.regs & self.pending:
                self.hazard(w, ins)
            try:
                target = ins.run(w)
            except decode.Unsupported as e:
                raise decode.Unsupported(
                    f"{self.program.name}: {e}\n  {ins.text}\n    at {ins.where}"
                ) from e
            if randomly and self.rng.random() < 0.3:
                self.complete_some()
            if target is None:
                pc += 1
            elif target is BARRIER:
                if not self.barrier(w, pc + 1):
                    return
                pc += 1
            elif target is END:
                for queue in (self.vm, self.ds, self.smem):
                    queue.wait(w, 0)
                self.state[w.ids] = ENDED
                self.release_barriers()
                return
            elif isinstance(target, int):
                if shared and target <= pc:
                    self.jumps[w.ids] += 1
                pc = target
                if stop is not None:
                    break
            else:  # the group parts
                self.jumps[w.ids] += target <= pc
                self.pc[w.ids] = target
                return
            if pc == stop:
                break
        self.pc[w.ids] = pc

    def barrier(self, w, pc):
        """Marks the group as arrived. True when all its waves may go on at once."""
        self.state[w.ids], self.pc[w.ids] = AT_BARRIER, pc
        self.release_barriers()
        return (
            self.schedule == "lockstep"
            and w.n == self.waves
            and bool((self.state == RUNNING).all())
        )

    def release_barriers(self):
        waiting = (self.state == AT_BARRIER).reshape(-1, self.num_warps)
        ended = (self.state == ENDED).reshape(-1, self.num_warps)
        complete = (waiting | ended).all(1) & waiting.any(1)
        if complete.any():
            self.lds.interval[complete] += 1
            self.state[np.repeat(complete, self.num_warps) & (self.state == AT_BARRIER)] = RUNNING

    def complete_some(self):
        """`random` timing: the oldest operations of a random half of the waves complete early."""
        queue = (self.vm, self.ds, self.smem)[self.rng.integers(3)]
        if queue.records:
            ids = np.flatnonzero(self.rng.random(self.waves) < 0.5)
            if len(ids):
                queue.wait(Group(self, ids), int(self.rng.integers(0, 1 + len(queue.records))))

    # ------------------------------------------------------------------ faults

    def hazard(self, w, ins):
        """Raises where the instruction touches a register whose load has not been waited for."""
        for name, queue in (("vm", self.vm), ("ds", self.ds), ("smem", self.smem)):
            for r in queue.records:
                touched, waves = r.regs & ins.regs, r.left & w.member[r.w.ids]
                if touched and waves.any() and not access.only_rewrites(ins, name, r.regs):
                    n = int(waves.argmax())
                    lane = 0 if r.lanes is None else int(r.lanes[n].argmax())
                    address = (
                        0
                        if r.address is None
                        else int(np.broadcast_to(r.address, (r.w.n, 64))[n, lane])
                    )
                    self.fault(
                        ins,
                        r.w.ids[n],
                        lane,
                        address,
                        f"{self.register_names(touched)} used before the load "
                        f"into it was waited for\n  load: {r.ins.text}\n    at {r.ins.where}",
                    )

    def register_names(self, mask):
        bits, accum = (
            [b for b in range(mask.bit_length()) if mask >> b & 1],
            self.program.accum_offset,
        )
        names = [
            f"s{b - SGPR_BIT}" if b >= SGPR_BIT else f"v{b}" if b < accum else f"a{b - accum}"
            for b in bits
        ]
        return ", ".join(names[:4]) + (", ..." if len(names) > 4 else "")

    def fault(self, ins, wave, lane, address, what):
        place = np.unravel_index(self.workgroups[self.group_of[wave]], self.grid[::-1])[::-1]
        raise GPUFault(
            f"{self.program.name}: {what}\n  {ins.text}\n    at {ins.where}\n  wave "
            f"{self.wave_of[wave]} of "
            f"workgroup {tuple(map(int, place))}, lane {int(lane)}, address {address:#x}"
        )
