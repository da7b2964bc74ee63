"""Memory instructions: addresses, loads, stores, atomics and copies to LDS, on the storage of
`memory`.

Completion (MI300 ISA, "Data dependency resolution"; LLVM AMDGPUUsage, "Memory Model GFX942"): a
wave's vector memory operations complete in issue order under vmcnt, loads and stores alike; its LDS
operations in issue order under lgkmcnt; scalar loads in any order under the same counter, so that
only lgkmcnt(0) guarantees one. "lazy" completes an operation when a wait forces it, "eager" at
issue, "random" somewhere between. An instruction reads its registers at issue; `finish` moves the
data."""

import re

import numpy as np

from .asm import M0, Operand
from .decode import LANES, Unsupported, reader
from .isa import bf16_bits, bf16_value, f16, f32, f64, i32, i64, u8, u16, u32, u64
from .memory import fetch, rows

WIDTH = {
    "ubyte": (1, 0),
    "sbyte": (1, 8),
    "ushort": (2, 0),
    "sshort": (2, 16),
    "byte": (1, 0),
    "short": (2, 0),
    "dword": (4, 0),
    "dwordx2": (8, 0),
    "dwordx3": (12, 0),
    "dwordx4": (16, 0),
    "u8": (1, 0),
    "i8": (1, 8),
    "b8": (1, 0),
    "u16": (2, 0),
    "i16": (2, 16),
    "b16": (2, 0),
    "b32": (4, 0),
    "b64": (8, 0),
    "b96": (12, 0),
    "b128": (16, 0),
}  # name -> bytes, sign bit to extend from (0: none)


def width(name):
    return WIDTH[name.split("_")[0]]  # ubyte_d16_hi, u16_d16 and so on


def pick(lanes, due):
    """Lanes that are on (None: all) of the waves `due` (None: all)."""
    if due is None:
        return lanes
    return np.repeat(due[:, None], 64, axis=1) if lanes is None else lanes & due[:, None]


def on(array, lanes):
    return array.ravel() if lanes is None else array[lanes]


def pair(read, index):
    return (read(index).astype(u64) | read(index + 1).astype(u64) << u64(32)).view(i64)


# ----------------------------------------------------------------------------------------------
# addresses


def buffer_address(ins, operands):
    """Raw buffer: 48-bit base + soffset + (voffset + imm mod 2^32). A lane is out of range when
    (voffset + imm) + size exceeds num_records - soffset (MI300 ISA, "Range checking"): it loads 0
    and stores nothing."""
    vaddr, rsrc, soffset = operands
    if ins.mods.get("idxen"):
        raise Unsupported("indexed buffer addressing")
    imm, get_soffset = ins.mods.get("offset", 0), reader(soffset, "u32")
    get_voffset = (
        reader(vaddr, "u32") if ins.mods.get("offen") else lambda w: np.zeros((w.n, 64), u32)
    )

    def compute(w, nbytes):
        word1 = w.s(rsrc.index + 1)
        if (word1 & u32(0xBFFF0000)).any():  # bit 30 only asks for another cache placement
            raise Unsupported("buffer descriptor with a stride or swizzle")
        base = pair(w.s, rsrc.index) & 0xFFFFFFFFFFFF
        soff = np.asarray(get_soffset(w)).astype(i64)
        off = (get_voffset(w) + u32(imm)).astype(i64)  # modulo 2^32
        limit = w.s(rsrc.index + 2).astype(i64) - soff
        inside = off + nbytes <= limit
        if ((off < limit) & ~inside).any():  # the hardware would split it by dwords
            raise Unsupported("access across the end of a buffer descriptor")
        return base + soff + off, None if inside.all() else np.broadcast_to(inside, (w.n, 64))

    return compute


def global_address(ins, operands):
    vaddr, saddr = operands
    imm = ins.mods.get("offset", 0)
    if saddr.kind == "s":
        return lambda w, nbytes: (pair(w.s, saddr.index) + w.v(vaddr.index).astype(i64) + imm, None)
    return lambda w, nbytes: (pair(w.v, vaddr.index) + imm, None)


def scratch_address(ins, operands):
    """Private memory: each lane of the slice has its own stretch of one span."""
    gets = [reader(o, "u32") for o in operands if o.kind in "vs"]

    def compute(w, nbytes):
        lane = w.ids[:, None].astype(i64) * 64 + LANES
        own = sum((g(w).astype(i64) for g in gets), ins.mods.get("offset", 0))
        return w.m.scratch_base + lane * w.m.scratch_size + own, None

    return compute


ADDRESS = {
    "buffer": buffer_address,
    "global": global_address,
    "flat": global_address,
    "scratch": scratch_address,
}
NO_OFFSET = Operand("name", value="off")


def split_operands(space, operands):
    """(data register or None, address operands) of a store or atomic without its returned
    register."""
    if space == "buffer":
        return operands[0], operands[1:]
    vaddr, data, *saddr = operands
    return data, [vaddr, *(saddr or [NO_OFFSET])]


class Access:
    """One execution: addresses int64 [n, 64], the lanes that reach memory, and where their bytes
    lie."""

    def __init__(self, w, ins, compute, nbytes, *kinds):
        addr, inside = compute(w, nbytes)
        self.w, self.ins, self.nbytes, self.exec = w, ins, nbytes, w.mask
        self.addr = np.broadcast_to(addr, (w.n, 64))
        self.lanes = w.mask if inside is None else inside if w.mask is None else w.mask & inside
        self.parts = w.m.memory.locate(w, ins, self.addr, nbytes, self.lanes)
        for span, off, _ in self.parts:
            for kind in kinds:
                span.mark(kind, off, nbytes)

    def located(self, due):
        if due is None:
            return self.parts
        return self.w.m.memory.locate(
            self.w, self.ins, self.addr, self.nbytes, pick(self.lanes, due)
        )

    def load(self, due):
        return fetch(self.located(due), self.addr.shape, self.nbytes)

    def push(self, finish, regs=0, loads=True):
        count = 64 if self.lanes is None else self.lanes.sum(1)
        nbytes = np.broadcast_to(np.int64(self.nbytes) * count, (self.w.n,)) if loads else None
        self.w.m.vm.push(self.w, self.ins, finish, regs, nbytes, self.addr, self.lanes)


# ----------------------------------------------------------------------------------------------
# global memory


def extend(values, sign_bit, ins, w, dst):
    """Sign extension, and the d16 forms, which replace one half of the register and keep the
    other."""
    if sign_bit:
        values = ((values.view(i32) << i32(32 - sign_bit)) >> i32(32 - sign_bit)).view(u32)
    if "d16" in ins.op:
        half, old = values[0] & u32(0xFFFF), w.v(dst.index)
        values = [
            old & u32(0xFFFF) | half << u32(16)
            if ins.op.endswith("_hi")
            else old & u32(0xFFFF0000) | half
        ]
    return values


def vector_load(ins):
    space, kind = re.fullmatch(r"(\w+?)_load_(?:lds_)?(\w+)", ins.op).groups()
    nbytes, sign_bit = width(kind)
    if ins.mods.get("lds") or "_lds_" in ins.op:
        return copy_to_lds(ins, space, nbytes)
    dst, *rest = ins.operands
    compute = ADDRESS[space](ins, rest if space != "flat" else [*rest, NO_OFFSET])

    def run(w):
        a = Access(w, ins, compute, nbytes, "read")

        def finish(due):
            for i, value in enumerate(extend(a.load(due), sign_bit, ins, w, dst)):
                w.set_v(dst.index + i, value, pick(a.exec, due))

        a.push(finish, dst.mask)

    return run


def copy_to_lds(ins, space, nbytes):
    """Direct-to-LDS load: lane i's bytes go to M0[17:0] + imm + 4 i, or 16 i of the three- and
    four-dword forms (CDNA4 ISA 9.1.9; there is no two-dword form). Lanes out of the descriptor's
    range write 0 (Triton's masks rely on it), lanes off in EXEC nothing."""
    if nbytes not in (4, 12, 16):
        raise Unsupported("copy to LDS of this width")
    compute, imm = ADDRESS[space](ins, ins.operands), ins.mods.get("offset", 0)
    stride = 4 if nbytes == 4 else 16

    def run(w):
        a, lds = Access(w, ins, compute, nbytes, "read"), w.m.lds
        first = (w.s(M0) & u32(0x3FFFF)).astype(i64) + imm
        target = np.broadcast_to(first + LANES * stride, (w.n, 64))
        target = lds.offsets(w, ins, target, nbytes, a.exec)
        lds.issue_copy(w, ins, on(target, a.exec), nbytes, a.exec)

        def finish(due):
            lanes = pick(a.exec, due)
            lds.land_copy(w, ins, on(target, lanes), nbytes, lanes, rows(a.load(due), lanes))

        a.push(finish)
        w.m.lds_cycles[ins.pc] += w.n * 64 * stride // 128

    return run


def vector_store(ins):
    space, kind = re.fullmatch(r"(\w+?)_store_(\w+)", ins.op).groups()
    nbytes, _ = width(kind)
    data, rest = split_operands(space, ins.operands)
    compute, shift = ADDRESS[space](ins, rest), u32(16 if kind.endswith("_hi") else 0)

    def run(w):
        a = Access(w, ins, compute, nbytes, "write")
        values = np.stack([w.v(data.index + i) >> shift for i in range(max(1, nbytes // 4))])

        def finish(due):
            for span, off, lanes in a.located(due):
                span.scatter(off, rows(values, lanes), nbytes)

        a.push(finish, loads=False)

    return run


def scalar_load(ins):
    if ins.op.startswith("s_buffer"):
        raise Unsupported("scalar buffer loads")
    nbytes = (
        width(ins.op.split("_")[-1])[0]
        if ins.op[-2:] not in ("x8", "16")
        else 32
        if ins.op.endswith("x8")
        else 64
    )
    dst, base, offset = ins.operands
    get_offset, imm = reader(offset, "u32"), ins.mods.get("offset", 0)

    def run(w):
        # [n, 1]
        addr = (pair(w.s, base.index) + np.asarray(get_offset(w)).astype(i64) + imm) & ~np.int64(3)
        parts = w.m.memory.locate(w, ins, addr, nbytes, None)
        for span, off, _ in parts:
            span.mark("read", off, nbytes)

        def finish(due):
            values = fetch(parts, addr.shape, nbytes)[..., 0]  # [words, n]
            for i, value in enumerate(values):
                w.m.scalar[dst.index + i][w.ids if due is None else w.ids[due]] = (
                    value if due is None else value[due]
                )

        w.m.smem.push(w, ins, finish, dst.mask, address=addr)

    return run


# ----------------------------------------------------------------------------------------------
# atomics


def typed(dtype, fn):
    return lambda old, x: fn(old.view(dtype), x.view(dtype)).view(old.dtype)


def signed(fn):
    return lambda old, x: typed(f"i{old.itemsize}", fn)(old, x)


def halves(fn):
    """A 16-bit operation on both halves of uint32 values [k]."""

    def both(old, x):
        old, x = (np.ascontiguousarray(v)[:, None].view(u16) for v in (old, x))  # [k, 2]
        return np.stack([fn(old[:, i], x[:, i]) for i in (0, 1)], 1).view(u32)[:, 0]

    return both


RMW = {
    "add": np.add,
    "sub": np.subtract,
    "umax": np.maximum,
    "umin": np.minimum,
    "smax": signed(np.maximum),
    "smin": signed(np.minimum),
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "swap": lambda old, x: x,
    "inc": lambda old, x: np.where(old >= x, 0, old + 1),
    "dec": lambda old, x: np.where((old == 0) | (old > x), x, old - 1),
    "add_f32": typed(f32, np.add),
    "max_f32": typed(f32, np.fmax),
    "min_f32": typed(f32, np.fmin),
    "add_f64": typed(f64, np.add),
    "max_f64": typed(f64, np.fmax),
    "min_f64": typed(f64, np.fmin),
    "pk_add_f16": halves(lambda a, b: (a.copy().view(f16) + b.copy().view(f16)).view(u16)),
    "pk_add_bf16": halves(lambda a, b: bf16_bits(bf16_value(a) + bf16_value(b))),
}
RMW |= {
    new: RMW[old]
    for new, old in (  # LDS atomics name their type
        ("max_i32", "smax"),
        ("min_i32", "smin"),
        ("max_u32", "umax"),
        ("min_u32", "umin"),
        ("add_u32", "add"),
        ("sub_u32", "sub"),
        ("and_b32", "and"),
        ("or_b32", "or"),
        ("xor_b32", "xor"),
        ("wrxchg_b32", "swap"),
        ("inc_u32", "inc"),
        ("dec_u32", "dec"),
        ("add_u64", "add"),
    )
}


def modify(span, off, words, fn, compare, order):
    """Applies `new = fn(old, data)` (or compare-and-swap) lane by lane in `order`; lanes that share
    an address take turns. words uint32 [k, 1 or 2]; returns the old values uint32 [k, same]."""
    dtype, nbytes = (u32, 4) if words.shape[1] == 1 else (u64, 8)
    data = np.ascontiguousarray(words).view(dtype)[:, 0]
    compare = None if compare is None else np.ascontiguousarray(compare).view(dtype)[:, 0]
    sequence = order[np.argsort(off[order], kind="stable")]  # by address, then by order
    starts = np.r_[True, off[sequence][1:] != off[sequence][:-1]][: off.size]
    turn = np.empty(off.size, int)
    turn[sequence] = np.arange(off.size) - np.maximum.accumulate(
        np.where(starts, np.arange(off.size), 0)
    )
    old = np.zeros(off.size, dtype)
    for t in range(int(turn.max()) + 1 if off.size else 0):
        k = turn == t
        old[k] = np.ascontiguousarray(span.gather(off[k], nbytes)).view(dtype)[:, 0]
        new = (
            fn(old[k], data[k])
            if compare is None
            else np.where(old[k] == compare[k], data[k], old[k])
        )
        span.scatter(off[k], np.ascontiguousarray(new, dtype)[:, None].view(u32), nbytes)
    return old[:, None].view(u32)


def return_old(w, dst, old, lanes_hit, lanes_on):
    """Writes the old values [k, words] of the lanes that reached memory; others that are on get
    0."""
    for i in range(old.shape[1]):
        out = np.zeros((w.n, 64), u32)
        out[lanes_hit if lanes_hit is not None else slice(None)] = (
            old[:, i] if lanes_hit is not None else old[:, i].reshape(w.n, 64)
        )
        w.set_v(dst.index + i, out, lanes_on)


def vector_atomic(ins):
    space, name, x2 = re.fullmatch(r"(\w+?)_atomic_(\w+?)(_x2)?", ins.op).groups()
    words = 2 if x2 or name.endswith("f64") else 1
    operands, dst = list(ins.operands), None
    if ins.mods.get("sc0"):  # returns the old value
        dst = operands[0] if space == "buffer" else operands.pop(0)
    data, rest = split_operands(space, operands)
    if name != "cmpswap" and name not in RMW:
        raise Unsupported("this atomic")
    compute = ADDRESS[space](ins, rest)

    def run(w):
        a = Access(w, ins, compute, 4 * words, "read", "write")
        values = np.stack(
            [w.v(data.index + i) for i in range(2 * words if name == "cmpswap" else words)]
        )

        def finish(due):
            if dst:
                for i in range(words):
                    w.set_v(dst.index + i, np.zeros((1, 1), u32), pick(a.exec, due))
            for span, off, lanes in a.located(due):
                x = rows(values, lanes)
                old = modify(
                    span,
                    off,
                    x[:, :words],
                    RMW.get(name),
                    x[:, words:] if name == "cmpswap" else None,
                    w.m.lane_order(off.size),
                )
                if dst:
                    return_old(w, dst, old, lanes, lanes)

        a.push(finish, Operand("v", dst.index, words).mask if dst else 0, loads=False)

    return run


# ---------------------------------------------------------------------------------------------- LDS


def access_bytes(ins):
    """Bytes a lane touches at once, for the granularity of the race shadow."""
    m = re.fullmatch(r"ds_(?:read|write)(?:2|2st64)?_(\w+)", ins.op)
    return width(m[1])[0] if m else 4


def ds_offsets(ins, nbytes):
    """Byte offsets of the one or two accesses: read2 and write2 count in elements, st64 in 64 of
    them."""
    if "2" in ins.op.split("_")[1]:
        scale = nbytes * (64 if "st64" in ins.op else 1)
        return [ins.mods.get(f"offset{i}", 0) * scale for i in (0, 1)]
    return [ins.mods.get("offset", 0)]


def transpose(values, bits):
    """ds_read_b64_tr_b{16,8,4}: a row of 16 lanes holds 16 x c elements, c a lane, in memory order;
    lane i gets element i of every stored row: out[i][j] = in[(16 j + i) // c][i % c] (for b16, c =
    4: in[4 j + i // 4][i % 4])."""
    # n, 64, elements
    flat = np.ascontiguousarray(values.transpose(1, 2, 0)).view({16: u16, 8: u8, 4: u8}[bits])
    if bits == 4:
        flat = np.stack([flat & 15, flat >> 4], axis=-1).reshape(*flat.shape[:2], -1)
    c = flat.shape[2]
    lane, element = (
        (LANES & ~15)[:, None] + (16 * np.arange(c) + (LANES & 15)[:, None]) // c,
        (LANES % c)[:, None],
    )
    out = flat[:, lane, element]
    if bits == 4:
        out = out[..., 0::2] | out[..., 1::2] << 4
    return np.ascontiguousarray(out).view(u32).transpose(2, 0, 1)


def ds_read(ins):
    kind, bits = re.fullmatch(r"ds_read(?:2|2st64)?_(\w+?)(?:_tr_b(\d+))?", ins.op).groups()
    if bits not in (None, "16", "8", "4"):
        raise Unsupported("this transposing read")
    dst, vaddr = ins.operands
    nbytes, sign_bit = width(kind)
    offsets, words = ds_offsets(ins, nbytes), max(1, nbytes // 4)

    def run(w):
        exec_lanes, lds, base = w.mask, w.m.lds, w.v(vaddr.index).astype(i64)
        if bits and exec_lanes is not None:  # CDNA4 ISA 11.4
            n, lane = np.argwhere(~exec_lanes)[0]
            w.m.fault(
                ins, w.ids[n], lane, int(base[n, lane]), "transposing read with lanes off in EXEC"
            )
        places = [lds.offsets(w, ins, base + o, nbytes, exec_lanes) for o in offsets]
        for o in offsets:
            lds.count(w, ins, base + o, nbytes, exec_lanes)

        def finish(due):
            lanes = pick(exec_lanes, due)
            for i, place in enumerate(places):
                off = on(place, lanes)
                lds.read(w, ins, off, nbytes, lanes)
                values = fetch([(lds.span, off, lanes)], place.shape, nbytes)
                values = transpose(values, int(bits)) if bits else values
                for j, value in enumerate(extend(values, sign_bit, ins, w, dst)):
                    w.set_v(dst.index + i * words + j, value, lanes)

        w.m.ds.push(w, ins, finish, dst.mask, address=base, lanes=exec_lanes)

    return run


def ds_write(ins):
    vaddr, *data = ins.operands
    nbytes, _ = width(re.fullmatch(r"ds_write(?:2|2st64)?_(\w+)", ins.op)[1])
    offsets, words = ds_offsets(ins, nbytes), max(1, nbytes // 4)
    shift, keep = u32(16 if ins.op.endswith("_hi") else 0), u32((1 << 8 * min(4, nbytes)) - 1)

    def run(w):
        exec_lanes, lds, base = w.mask, w.m.lds, w.v(vaddr.index).astype(i64)
        places = [lds.offsets(w, ins, base + o, nbytes, exec_lanes) for o in offsets]
        values = [np.stack([w.v(d.index + i) >> shift & keep for i in range(words)]) for d in data]
        for o in offsets:
            lds.count(w, ins, base + o, nbytes, exec_lanes)

        def finish(due):
            lanes = pick(exec_lanes, due)
            for place, value in zip(places, values, strict=True):
                lds.write(w, ins, on(place, lanes), nbytes, lanes, rows(value, lanes))

        w.m.ds.push(w, ins, finish, address=base, lanes=exec_lanes)

    return run


def ds_atomic(ins):
    name, returns = ins.op[3:].replace("_rtn", ""), "_rtn" in ins.op
    if name not in RMW:
        raise Unsupported("this LDS atomic")
    dst, vaddr, data = ins.operands if returns else [None, *ins.operands]
    words, imm = 2 if name.endswith("64") else 1, ins.mods.get("offset", 0)

    def run(w):
        exec_lanes, lds, base = w.mask, w.m.lds, w.v(vaddr.index).astype(i64) + imm
        place = lds.offsets(w, ins, base, 4 * words, exec_lanes)
        values = np.stack([w.v(data.index + i) for i in range(words)])
        lds.count(w, ins, base, 4 * words, exec_lanes)

        def finish(due):
            lanes = pick(exec_lanes, due)
            off, value = on(place, lanes), rows(values, lanes)
            lds.write(w, ins, off, 4 * words, lanes, value, atomic=True)
            old = modify(lds.span, off, value, RMW[name], None, w.m.lane_order(off.size))
            if returns:
                return_old(w, dst, old, lanes, lanes)

        w.m.ds.push(w, ins, finish, dst.mask if returns else 0, address=base, lanes=exec_lanes)

    return run


def swizzle_lanes(offset):
    """Source lanes of ds_swizzle_b32 (MI300 ISA, DS_SWIZZLE_B32; names: LLVM, "swizzle"): and, or,
    xor masks within 32 lanes, or a quad permutation."""
    if isinstance(offset, str):
        mode, *rest = [x.strip() for x in offset[len("swizzle(") : -1].split(",")]
        if mode == "BITMASK_PERM":  # a character a bit, high first: 0, 1, p(reserve), i(nvert)
            keep, ones, flip = (
                int("".join("01"[c in on] for c in rest[0].strip('"')), 2)
                for on in ("pi", "1", "i")
            )
            return (LANES & 32) + ((LANES & keep | ones) ^ flip)
        n = [int(x) for x in rest]
        return {
            "SWAP": lambda: LANES ^ n[0],
            "REVERSE": lambda: LANES ^ (n[0] - 1),
            "BROADCAST": lambda: (LANES & ~(n[0] - 1)) + n[1],
            "QUAD_PERM": lambda: (LANES & ~3) + np.array(n)[LANES & 3],
        }[mode]()
    if offset & 0x8000:
        return (LANES & ~3) + np.array([offset >> (2 * i) & 3 for i in range(4)])[LANES & 3]
    return (LANES & 32) + ((LANES & 31 & offset | offset >> 5 & 31) ^ (offset >> 10 & 31))


def ds_permute(ins):
    """ds_bpermute (pull), ds_permute (push) and ds_swizzle use the LDS crossbar and not its memory.
    Lanes off in EXEC give 0."""
    dst, *sources = ins.operands
    gets, imm = [reader(o, "u32") for o in sources], ins.mods.get("offset", 0)
    swizzle = swizzle_lanes(imm) if ins.op == "ds_swizzle_b32" else None

    def run(w):
        lanes, x = w.mask, np.broadcast_to(gets[-1](w), (w.n, 64))
        live = x if lanes is None else np.where(lanes, x, u32(0))
        if swizzle is not None:
            out = live[:, swizzle]
        else:
            lane = ((np.broadcast_to(gets[0](w), (w.n, 64)) + u32(imm)) >> u32(2) & u32(63)).astype(
                int
            )
            out = np.zeros_like(x)
            if ins.op == "ds_bpermute_b32":
                out = np.take_along_axis(live, lane, 1)
            else:
                n, source = np.nonzero(np.ones((w.n, 64), bool) if lanes is None else lanes)
                out[n, lane[n, source]] = x[n, source]
        out = out.copy()
        w.m.lds_cycles[ins.pc] += 2 * w.n
        w.m.ds.push(w, ins, lambda due: w.set_v(dst.index, out, pick(lanes, due)), dst.mask)

    return run


def only_rewrites(ins, queue, pending):
    """Whether a load of the same in-order queue touches pending registers only as its destination,
    as the two halves of a d16 pair do."""
    pattern = {
        "vm": r"(buffer|global|flat|scratch)_load",
        "ds": r"ds_(read|bpermute|permute|swizzle)",
    }.get(queue, "$")
    return bool(re.match(pattern, ins.op)) and not any(
        opd.mask & pending for opd in ins.operands[1:]
    )


HANDLERS = [
    (re.compile(pattern), handler)
    for pattern, handler in (
        (r"(buffer|global|flat|scratch)_load_.*", vector_load),
        (r"(buffer|global|flat|scratch)_store_.*", vector_store),
        (r"(buffer|global|flat)_atomic_.*", vector_atomic),
        (r"s_(buffer_)?load_.*", scalar_load),
        (r"ds_read.*", ds_read),
        (r"ds_write.*", ds_write),
        (r"ds_(bpermute|permute|swizzle)_b32", ds_permute),
        (r"ds_.*", ds_atomic),
    )
]


def handler(op):
    """The handler of a memory instruction, or None."""
    return next((h for pattern, h in HANDLERS if pattern.fullmatch(op)), None)
