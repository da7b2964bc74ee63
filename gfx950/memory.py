"""Storage: the tensors of a launch, the LDS of a slice with its race shadow, the queues of
outstanding operations."""

import numpy as np

from .isa import i32, i64, u8, u32


class Span:
    """A range of bytes with word views, and marks of what was read and written for the
    distinct-byte counts."""

    def __init__(self, name, base, data):
        self.name, self.base, self.data, self.size, self.end = (
            name,
            base,
            data,
            data.size,
            base + data.size,
        )
        self.words = data[: data.size // 4 * 4].view(u32) if base % 4 == 0 else None
        self.quads = (
            data[: data.size // 16 * 16].view(u32).reshape(-1, 4) if base % 16 == 0 else None
        )
        self.requested = {"read": 0, "write": 0}
        self.marks = {"read": {}, "write": {}}

    def gather(self, off, nbytes):
        """off int64 [k] -> uint32 [k, max(1, nbytes / 4)], a byte or half word zero-extended."""
        low = int(np.bitwise_or.reduce(off)) if off.size else 0
        if nbytes == 16 and self.quads is not None and low % 16 == 0:
            return self.quads[off >> 4]
        if nbytes >= 4 and self.words is not None and low % 4 == 0:
            return self.words[(off >> 2)[:, None] + np.arange(nbytes // 4)]
        out = np.zeros((off.size, max(4, nbytes)), u8)
        out[:, :nbytes] = self.data[off[:, None] + np.arange(nbytes)]
        return out.view(u32)

    def scatter(self, off, values, nbytes):
        """values uint32 [k, words]; where two lanes name one byte the higher lane wins."""
        low = int(np.bitwise_or.reduce(off)) if off.size else 0
        if nbytes >= 4 and self.words is not None and low % 4 == 0:
            self.words[(off >> 2)[:, None] + np.arange(nbytes // 4)] = values
        else:
            self.data[off[:, None] + np.arange(nbytes)] = np.ascontiguousarray(values).view(u8)[
                :, :nbytes
            ]

    def mark(self, kind, off, nbytes):
        """Counts an access. Marks are kept per access width, so that wide aligned accesses cost one
        mark."""
        self.requested[kind] += off.size * nbytes
        aligned = nbytes != 12 and not (int(np.bitwise_or.reduce(off)) if off.size else 0) % nbytes
        unit = nbytes if aligned else 1
        marks = self.marks[kind].setdefault(unit, np.zeros(0, bool))
        if not marks.size:
            marks = self.marks[kind][unit] = np.zeros(-(-self.size // unit), bool)
        marks[off // unit if aligned else off[:, None] + np.arange(nbytes)] = True

    def unique(self, kind):
        """Distinct bytes marked."""
        if len(self.marks[kind]) == 1:
            ((unit, marks),) = self.marks[kind].items()
            return int(np.count_nonzero(marks)) * unit
        seen = np.zeros(self.size, bool)
        for unit, marks in self.marks[kind].items():
            seen |= np.repeat(marks, unit)[: self.size]
        return int(np.count_nonzero(seen))


class Memory:
    """Spans by address."""

    def __init__(self, spans):
        self.spans = sorted(spans, key=lambda s: s.base)
        self.bases, self.ends = (
            np.array([getattr(s, a) for s in self.spans], i64) for a in ("base", "end")
        )

    def locate(self, w, ins, addr, nbytes, mask):
        """int64 [n, lanes] addresses -> [(span, offsets [k], bool [n, lanes] or None for all)].
        Faults outside."""
        flat = addr.ravel() if mask is None else addr[mask]
        if not flat.size:
            return []
        lowest, highest = int(flat.min()), int(flat.max()) + nbytes
        i = int(np.searchsorted(self.bases, lowest, "right")) - 1
        if i >= 0 and highest <= self.ends[i]:
            return [(self.spans[i], flat - self.bases[i], mask)]
        mask = np.ones(addr.shape, bool) if mask is None else mask
        which = np.searchsorted(self.bases, addr, "right") - 1
        bad = ((which < 0) | (addr + nbytes > self.ends[which])) & mask
        if bad.any():
            n, lane = np.argwhere(bad)[0]
            at, near = int(addr[n, lane]), self.spans[max(int(which[n, lane]), 0)]
            w.m.fault(
                ins,
                w.ids[n],
                lane,
                at,
                f"access of {nbytes} bytes outside every tensor: byte {at - near.base} "
                f"of {near.name}, which has {near.size}",
            )
        return [
            (self.spans[s], addr[lanes] - self.bases[s], lanes)
            for s in np.unique(which[mask])
            for lanes in [(which == s) & mask]
        ]


def fetch(parts, shape, nbytes):
    """Gathers located parts into uint32 [words, n, lanes], zero where no lane asked."""
    count = max(1, nbytes // 4)
    if len(parts) == 1 and parts[0][2] is None:
        return parts[0][0].gather(parts[0][1], nbytes).reshape(*shape, count).transpose(2, 0, 1)
    out = np.zeros((count, *shape), u32)
    for span, off, lanes in parts:
        out[:, lanes] = span.gather(off, nbytes).T
    return out


def rows(values, lanes):
    """uint32 [words, n, 64] -> [k, words] of the lanes that are on."""
    return (values.reshape(len(values), -1) if lanes is None else values[:, lanes]).T


# ----------------------------------------------------------------------------------------------
# completion


class Record:
    """One issued memory operation of a group of waves. `left`: the waves for which it has not
    completed."""

    __slots__ = ("w", "seq", "left", "finish", "regs", "ins", "nbytes", "address", "lanes")

    def __init__(self, w, seq, ins, finish, regs, nbytes, address, lanes):
        self.w, self.seq, self.ins, self.finish, self.regs = w, seq, ins, finish, regs
        self.nbytes, self.address, self.lanes, self.left = (
            nbytes,
            address,
            lanes,
            np.ones(w.n, bool),
        )


class Queue:
    """Operations outstanding under one counter, of all waves. Each wave's complete in the order it
    issued them."""

    def __init__(self, machine):
        self.m, self.records, self.issued = machine, [], np.zeros(machine.waves, i64)

    def push(self, w, ins, finish, regs=0, nbytes=None, address=None, lanes=None):
        """finish(due) transfers the data of the group's waves `due` (bool [n], None: all). regs:
        registers it will write; nbytes int64 [n]: bytes a wave is loading."""
        nbytes = np.zeros(w.n, i64) if nbytes is None else nbytes
        record = Record(w, self.issued[w.g].copy(), ins, finish, regs, nbytes, address, lanes)
        self.issued[w.g] += 1
        self.m.inflight[w.g] += nbytes
        self.m.peak_inflight = max(self.m.peak_inflight, int(self.m.inflight.max()))
        if self.m.timing == "eager":
            finish(None)
            record.finish, record.regs = lambda due: None, 0
        self.records.append(record)
        self.m.pending |= record.regs

    def wait(self, w, keep):
        """Completes all but the latest `keep` operations of each wave of the group."""
        for r in self.records:
            due = r.left & (r.seq < self.issued[r.w.g] - keep)
            if r.w is not w:
                due &= w.member[r.w.ids]
            if due.any():
                r.finish(None if due.all() else due)
                self.m.inflight[r.w.ids[due]] -= r.nbytes[due]
                r.left &= ~due
        self.records = [r for r in self.records if r.left.any()]
        self.m.pending = 0
        for queue in (self.m.vm, self.m.ds, self.m.smem):
            for r in queue.records:
                self.m.pending |= r.regs


# ---------------------------------------------------------------------------------------------- LDS


# The lanes of the four passes of ds_read_b128 (the ROCm blog that `counters` names, "LDS Access:
# Bank Conflicts")
HALVES = (
    [*range(4), *range(12, 16), *range(20, 28)],
    [*range(4, 12), *range(16, 20), *range(28, 32)],
)
READ_B128 = np.concatenate([np.array(half) + first for half in HALVES for first in (0, 32)])


class LDS:
    """Local memory of the slice's workgroups as one span, and its shadow. The shadow keeps for each
    unit of bytes the last writer and reader as (barrier interval << 5 | wave + 1), which
    instructions those were, and how many direct copies to it are in flight. Two waves that touch a
    byte in one interval, one writing, race. Bytes start as 0xFF, a NaN in every float format but
    fp4; reading them is counted, not reported, as masked-off rows may be read."""

    MANY, ATOMIC = 31, 30  # in place of a wave: several readers; atomics, which may meet

    def __init__(self, machine, size, workgroups, unit):
        self.m, self.size, self.unit, self.stride = machine, size, unit, -(-size // 16) * 16
        self.span = Span("LDS", 0, np.full(self.stride * workgroups, 0xFF, u8))
        self.writer, self.reader, self.write_pc, self.read_pc = np.zeros(
            (4, self.span.size // unit), i32
        )
        self.copies = np.zeros(self.span.size // unit, np.int8)
        self.interval = np.ones(workgroups, i32)

    def offsets(self, w, ins, addr, nbytes, lanes):
        """Byte address int64 [n, 64] in the workgroup -> offset in the span. Faults beyond the
        allocation."""
        bad = (addr < 0) | (addr + nbytes > self.size)
        bad = bad if lanes is None else bad & lanes
        if bad.any():
            n, lane = np.argwhere(bad)[0]
            w.m.fault(
                ins,
                w.ids[n],
                lane,
                int(addr[n, lane]),
                f"LDS access of {nbytes} bytes beyond {self.size} allocated",
            )
        return addr + self.m.group_of[w.ids][:, None].astype(i64) * self.stride

    def shadow(self, w, off, nbytes, lanes):
        """Shadow indices [k, units] and tags [k, 1] of an access."""
        tag = self.interval[self.m.group_of[w.ids]] << 5 | (self.m.wave_of[w.ids] + 1)
        tag = np.broadcast_to(tag[:, None], (w.n, 64))
        tag = (tag.ravel() if lanes is None else tag[lanes])[:, None]
        return (off // self.unit)[:, None] + np.arange(max(1, nbytes // self.unit)), tag

    @staticmethod
    def clash(old, tag):
        """Same barrier interval, another wave."""
        return (old >> 5 == tag >> 5) & (old != tag)

    def check(self, bad, w, ins, off, lanes, what, other_pc):
        if not bad.any():
            return
        k, unit = np.argwhere(bad)[0]
        n, lane = np.argwhere(np.ones((w.n, 64), bool) if lanes is None else lanes)[k]
        other = self.m.code[int(other_pc[k, unit])]
        what += f"\n  other access: {other.text}\n    at {other.where}"
        self.m.fault(ins, w.ids[n], lane, int(off[k]) % self.stride, what)

    def read(self, w, ins, off, nbytes, lanes):
        idx, tag = self.shadow(w, off, nbytes, lanes)
        last = self.writer[idx]
        if self.copies.any():
            self.check(
                self.copies[idx] > 0,
                w,
                ins,
                off,
                lanes,
                "LDS byte read while a copy to it is in flight: a wait is missing or too loose",
                self.write_pc[idx],
            )
        self.check(
            self.clash(last, tag),
            w,
            ins,
            off,
            lanes,
            "race: LDS byte read that another wave wrote with no barrier between",
            self.write_pc[idx],
        )
        self.m.unwritten_reads += int(np.count_nonzero(last == 0)) * self.unit
        new = np.where(self.clash(self.reader[idx], tag), tag | self.MANY, tag)
        self.reader[idx] = new
        if (shared := self.reader[idx] != new).any():  # several waves of this very instruction
            self.reader[idx[shared]] |= self.MANY
        self.read_pc[idx] = ins.pc

    def write(self, w, ins, off, nbytes, lanes, values, atomic=False):
        """Stores values [k, words]; an atomic's caller modifies the bytes itself. Two waves writing
        equal bytes do not race: Triton stores replicated tiles so."""
        idx, tag = self.shadow(w, off, nbytes, lanes)
        if atomic:
            tag = (tag & ~31) | self.ATOMIC
        self.check(
            self.clash(self.reader[idx], tag),
            w,
            ins,
            off,
            lanes,
            "race: LDS byte written that another wave read with no barrier between",
            self.read_pc[idx],
        )
        if (bad := self.clash(self.writer[idx], tag)).any():
            bad &= (self.span.gather(off, nbytes) != values).any(1)[:, None]
            self.check(
                bad,
                w,
                ins,
                off,
                lanes,
                "race: LDS byte written by two waves with no barrier between",
                self.write_pc[idx],
            )
        self.writer[idx], self.write_pc[idx] = tag, ins.pc
        if atomic:
            return
        self.span.scatter(off, values, nbytes)
        if (bad := self.writer[idx] != tag).any():  # several waves of this very instruction
            bad &= (self.span.gather(off, nbytes) != values).any(1)[:, None]
            self.check(
                bad,
                w,
                ins,
                off,
                lanes,
                "race: LDS byte written by two waves with no barrier between",
                self.write_pc[idx],
            )

    def issue_copy(self, w, ins, off, nbytes, lanes):
        """A direct copy may land at any moment from its issue on: no other wave may still be
        reading there."""
        idx, tag = self.shadow(w, off, nbytes, lanes)
        self.check(
            self.clash(self.reader[idx], tag),
            w,
            ins,
            off,
            lanes,
            "race: copy to an LDS byte that another wave read with no barrier between",
            self.read_pc[idx],
        )
        if self.m.timing != "eager":
            self.copies[idx] += 1
            self.write_pc[idx] = ins.pc

    def land_copy(self, w, ins, off, nbytes, lanes, values):
        self.write(w, ins, off, nbytes, lanes, values)
        if self.m.timing != "eager":
            self.copies[self.shadow(w, off, nbytes, lanes)[0]] -= 1

    @staticmethod
    def passes(addr, nbytes, op):
        """Model: 64 banks of 4 bytes; a wave's lanes go in passes of at most 256 bytes, in order
        but for ds_read_b128; a bank asked for k different dwords in a pass costs k - 1 extra ones.
        Returns (passes without conflicts, extra passes)."""
        lanes = {8: 32, 12: 16, 16: 16}.get(nbytes, 64)
        addr = addr[READ_B128] if op == "ds_read_b128" else addr
        words = (addr[:, None] // 4 + np.arange(max(1, nbytes // 4))).reshape(64 // lanes, -1)
        return len(words), sum(int(np.bincount(np.unique(p) % 64).max()) - 1 for p in words)

    def count(self, w, ins, addr, nbytes, lanes):
        """LDS cycles, modelled on the group's first wave: a pass takes 1 reading and 2 writing
        (`counters`)."""
        a = (
            addr[0]
            if lanes is None
            else np.where(lanes[0], addr[0], addr[0][int(lanes[0].argmax())])
        )
        key = ins.pc, int(a[0]) % 256, (a - a[0]).tobytes()
        if key not in self.m.conflicts:
            self.m.conflicts[key] = self.passes(a, nbytes, ins.op)
        passes, extra = self.m.conflicts[key]
        cycles = w.n if ins.op.startswith("ds_read") else 2 * w.n
        self.m.lds_cycles[ins.pc] += cycles * (passes + extra)
        self.m.conflict_cycles[ins.pc] += cycles * extra
