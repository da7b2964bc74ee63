"""Executes the PTX that Triton emits for an NVIDIA GPU, as far as the kernels of moe_nvidia.py
and attention_nvidia.py need it, so that they can be checked where there is no such GPU.

    with ptx.emulate("sm_90") as gpu:
        moe_nvidia.moe(...)  # on CPU tensors
    gpu.launches  # of which each has its name, its grid, and the bytes that it asked for

All threads of a program execute an instruction together, programs one after the other in an order
drawn from a seed. A branch that threads of a program take differently, an access that is not
aligned or outside a kernel's tensors and an instruction not known here raise. Barriers therefore
have nothing to do, and races are not found: what is checked is what each lane computes, loads and
stores. Registers hold raw bits. The instructions' meanings are the PTX ISA's
(https://docs.nvidia.com/cuda/parallel-thread-execution/)."""

import itertools
import random
import re
from collections import Counter
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import triton
from compile_ops import driving
from triton.runtime.cache import get_cache_manager

SIZE = {"pred": 1, "b8": 8, "b16": 16, "b32": 32, "b64": 64}
OPERAND = re.compile(r"\{[^}]*\}|\[[^\]]*\]|[^,\s][^,{\[]*")


def parse(text: str) -> tuple[list, dict[str, int]]:
    """Instructions (predicate, negated, opcode's parts, operands) and the labels among them."""
    program, labels = [], {}
    body = text[text.index("\n{") + 2 :]
    for line in re.sub(r"//.*", "", body).splitlines():
        line = line.strip()
        if label := re.fullmatch(r"(\$\w+):", line):
            labels[label[1]] = len(program)
        for part in line.split(";"):
            part = part.strip()
            if not part or part[0] in ".{}$":
                if part.startswith(".section"):
                    return program, labels
                continue
            found = re.fullmatch(r"(?:@(!?)(%\w+)\s+)?([a-z][\w.:]*)\s*(.*)", part)
            operands = [o.strip() for o in OPERAND.findall(found[4])]
            program.append((found[2], found[1] == "!", found[3].split("."), operands))
    return program, labels


def as_type(bits, kind: str):
    """Raw bits, uint64, as numbers of a PTX type; float32 for bf16."""
    if kind == "bf16":
        return (bits.astype(np.uint32) << 16).view(np.float32)
    kind = {"f32": "f4", "pred": "?", "f64": "f8"}.get(kind) or {"s": "i", "u": "u", "b": "u"}[
        kind[0]
    ] + str(int(kind[1:]) // 8)
    if kind == "?":
        return bits != 0
    unsigned = "u" + kind[1:]
    return bits.astype(unsigned).view(kind)


def to_bits(x):
    x = np.ascontiguousarray(x)
    return x.view("u" + str(x.dtype.itemsize)).astype(np.uint64) if x.dtype != bool else x * ONE


ONE = np.uint64(1)


def round_bf16(x):
    """float32 to the bits of the nearest bfloat16, ties to even."""
    return to_bits(torch.from_numpy(np.ascontiguousarray(x)).bfloat16().view(torch.int16).numpy())


def pairs(bits):
    """The two bfloat16 of 32 bits, as float32, [.., 2]."""
    return as_type(np.stack([bits & 0xFFFF, bits >> np.uint64(16)], -1), "bf16")


COMPARE = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal, "nan": lambda a, b: np.isnan(a) | np.isnan(b),
    "neu": lambda a, b: ~(a == b),
}  # fmt: skip


class Program:
    """One program of a launch."""

    def __init__(self, gpu, code, args, threads: int, shared: int, grid, at):
        (self.code, self.labels), self.gpu, self.args, self.n = code, gpu, args, threads
        self.shared = np.zeros(max(shared, 16), np.uint8)
        self.registers, self.warps = {}, threads // 32
        self.waited = ["griddepcontrol", "wait"] not in [op for _, _, op, _ in self.code]
        lane = np.arange(threads, dtype=np.uint64)
        self.special = {"%tid.x": lane, "%ntid.x": self.all(threads), "%laneid": lane % 32}
        for axis, size, i in zip("xyz", grid, at, strict=True):
            self.special |= {f"%ctaid.{axis}": self.all(i), f"%nctaid.{axis}": self.all(size)}

    def all(self, value):
        return np.full(self.n, value & 0xFFFFFFFFFFFFFFFF, np.uint64)

    def run(self):
        at = 0
        while True:
            predicate, negated, op, operands = self.code[at]
            at += 1
            active = np.ones(self.n, bool)
            if predicate:
                active = (self.registers[predicate] != 0) ^ negated
            if op[0] == "ret" or op[0] == "bra":
                if active.any() != active.all():
                    raise ValueError("threads of a program branch differently")
                if active.all():
                    if op[0] == "ret":
                        return
                    at = self.labels[operands[0]]
                continue
            if op[0] == "griddepcontrol":
                self.waited |= op[1] == "wait"
            elif op[0] != "bar":
                with np.errstate(all="ignore"):
                    self.execute(op, operands, active)

    def read(self, name: str):
        if name in self.registers:
            return self.registers[name]
        if name in self.special:
            return self.special[name]
        if name == "global_smem":
            return self.all(0)  # where shared memory begins
        if name.startswith("0f"):
            return self.all(int(name[2:], 16))
        if re.fullmatch(r"-?(0x[0-9A-Fa-f]+|\d+)", name):
            return self.all(int(name, 0))
        raise KeyError(f"register {name} was not written")

    def write(self, name: str, bits, active):
        if name == "_":
            return
        old = self.registers.get(name)
        bits = np.broadcast_to(bits, self.n).astype(np.uint64)
        if not active.all():
            bits = np.where(active, bits, self.all(0xDEADBEEF) if old is None else old)
        self.registers[name] = bits

    def names(self, operand: str) -> list[str]:
        return [n.strip() for n in operand.strip("{}").split(",")]

    def address(self, operand: str):
        base, _, offset = operand.strip("[] ").partition("+")
        return self.read(base.strip()) + self.all(int(offset or "0", 0))

    def execute(self, op, operands, active):
        kind = op[-1]
        if op[0] in ("ld", "st"):
            return self.access(op, operands, active)
        method = getattr(self, op[0], None)
        if method:
            return method(op, operands, active)
        args = [self.read(o) for o in operands[1:]]
        if op[0] in ("and", "or", "xor", "not"):
            a = args[0]
            bits = {
                "and": lambda: a & args[1], "or": lambda: a | args[1], "xor": lambda: a ^ args[1],
                "not": lambda: ~a,
            }[op[0]]()  # fmt: skip
            mask = (1 << SIZE[kind]) - 1
            return self.write(operands[0], bits & np.uint64(mask), active)
        if op[0] == "fma" and kind == "bf16x2":
            a, b, c = (pairs(bits).astype(np.float64) for bits in args)
            low, high = (round_bf16(v.astype(np.float32)) for v in np.moveaxis(a * b + c, -1, 0))
            result = low | high << np.uint64(16)
            return self.write(operands[0], result, active)
        x = [as_type(a, kind) for a in args]
        if op[0] in ("mul", "mad") and kind[0] != "f":
            return self.multiply(op, operands, x, active)
        shift = (args[1] & np.uint64(0xFFFFFFFF)).astype(np.int64) if len(args) > 1 else None
        y = {
            "add": lambda: x[0] + x[1],
            "sub": lambda: x[0] - x[1],
            "mul": lambda: x[0] * x[1],
            "div": lambda: (
                x[0] / x[1] if kind[0] == "f" else np.trunc(x[0] / x[1]).astype(x[0].dtype)
            ),
            "rem": lambda: np.fmod(x[0], x[1]),
            # of a number and NaN the number, as PTX ISA has it
            "min": lambda: (np.minimum if "NaN" in op else np.fmin)(x[0], x[1]),
            "max": lambda: (np.maximum if "NaN" in op else np.fmax)(x[0], x[1]),
            "neg": lambda: -x[0],
            "abs": lambda: np.abs(x[0]),
            "ex2": lambda: np.exp2(x[0]),
            "fma": lambda: (x[0].astype(np.float64) * x[1] + x[2]).astype(np.float32),
            "shl": lambda: (
                x[0] << np.minimum(shift, SIZE[kind] - 1).astype(x[0].dtype)
                if (shift < SIZE[kind]).all()
                else 0 * x[0]
            ),
            "shr": lambda: x[0] >> shift.astype(x[0].dtype),
            "mov": lambda: x[0],
        }[op[0]]()
        self.write(operands[0], to_bits(y), active)

    def multiply(self, op, operands, x, active):
        """Integers: the lower half of the product, the upper half or all of it."""
        bits = int(op[-1][1:])
        product = np.multiply(*(v.astype(object) for v in x[:2]))
        if "hi" in op:
            product = product >> bits
        if op[0] == "mad":
            wide = op[-1][0] + str(2 * bits)
            product = product + (as_type(self.read(operands[3]), wide) if "wide" in op else x[2])
        mask = (1 << (2 * bits if "wide" in op else bits)) - 1
        self.write(operands[0], (product & mask).astype(np.uint64), active)

    # -- moves between types ----------------------------------------------------------------------

    def mov(self, op, operands, active):
        target, source = operands
        if target[0] == "{":  # two halves
            bits, half = self.read(source), np.uint64(SIZE[op[-1]] // 2)
            low, high = self.names(target)
            self.write(low, bits & ((ONE << half) - ONE), active)
            self.write(high, bits >> half, active)
        elif source[0] == "{":
            half = np.uint64(SIZE[op[-1]] // 2)
            low, high = (self.read(n) for n in self.names(source))
            self.write(target, low | high << half, active)
        else:
            self.write(target, self.read(source), active)

    def cvt(self, op, operands, active):
        to, source = op[-2], op[-1]
        x = as_type(self.read(operands[1]), source)
        if to == "bf16":
            bits = round_bf16(x)
        elif to == "bf16x2":  # the upper half first
            low = as_type(self.read(operands[2]), source)
            bits = round_bf16(low) | round_bf16(x) << np.uint64(16)
        elif source == "bf16" or source == to:
            bits = to_bits(x)
        else:
            bits = to_bits(x.astype(as_type(self.all(0), to).dtype))
        self.write(operands[0], bits, active)

    def prmt(self, op, operands, active):
        a, b, selector = (self.read(o) for o in operands[1:])
        both, result = a | b << np.uint64(32), self.all(0)
        for i in range(4):
            nibble = selector >> np.uint64(4 * i) & np.uint64(15)
            byte = both >> (nibble & np.uint64(7)) * np.uint64(8) & np.uint64(255)
            byte = np.where(nibble > 7, (byte >> np.uint64(7)) * np.uint64(255), byte)
            result |= byte << np.uint64(8 * i)
        self.write(operands[0], result, active)

    def bfe(self, op, operands, active):
        x, (start, length) = as_type(self.read(operands[1]), op[-1]), map(int, operands[2:])
        bits = 32
        x = x << x.dtype.type(bits - start - length)
        self.write(operands[0], to_bits(x >> x.dtype.type(bits - length)), active)

    def popc(self, op, operands, active):
        x = self.read(operands[1])
        self.write(operands[0], np.array([int(v).bit_count() for v in x], np.uint64), active)

    def setp(self, op, operands, active):
        a, b = (as_type(self.read(o), op[-1]) for o in operands[1:3])
        self.write(operands[0], COMPARE[op[1]](a, b) * ONE, active)

    def selp(self, op, operands, active):
        a, b, p = (self.read(o) for o in operands[1:])
        self.write(operands[0], np.where(p != 0, a, b), active)

    # -- memory -----------------------------------------------------------------------------------

    def access(self, op, operands, active):
        size = int(op[-1][1:]) // 8
        if op[0] == "ld" and "param" in op:
            number = int(re.search(r"_param_(\d+)", operands[1])[1])
            return self.write(operands[0], self.all(self.args[number]), active)
        names, where = (operands[0], operands[1]) if op[0] == "ld" else (operands[1], operands[0])
        names, at = self.names(names), self.address(where)
        if not active.any():
            return
        at = at[active]
        if (at % np.uint64(size * len(names))).any():
            raise ValueError(f"{'.'.join(op)}: address not aligned")
        offsets = at[:, None].astype(np.int64) + np.arange(size * len(names))
        if "shared" in op:
            memory = self.shared
        else:
            memory, offsets = self.gpu.memory(offsets, op[0], self.waited, "cg" in op)
        if op[0] == "ld":
            raw = memory[offsets].reshape(len(at), len(names), size)
            for i, name in enumerate(names):
                full = np.zeros(self.n, np.uint64)
                full[active] = raw[:, i].copy().view(f"u{size}")[:, 0]
                self.write(name, full, active)
        else:
            for i, name in enumerate(names):
                value = self.read(name)[active].astype(f"u{size}")
                memory[offsets[:, i * size : (i + 1) * size]] = value[:, None].view(np.uint8)

    def atom(self, op, operands, active):
        assert op == "atom.global.gpu.acq_rel.add.u32".split("."), op
        for thread in np.flatnonzero(active):
            at = self.address(operands[1])[thread : thread + 1].astype(np.int64)
            memory, offsets = self.gpu.memory(at[:, None] + np.arange(4), "st", self.waited)
            old = memory[offsets].view(np.uint32)
            self.write(operands[0], int(old[0, 0]) * ONE, np.arange(self.n) == thread)
            memory[offsets] = (old + self.read(operands[2])[thread].astype("u4")).view(np.uint8)

    # -- warps ------------------------------------------------------------------------------------

    def warp(self, name):
        return self.read(name).reshape(self.warps, 32)

    def shfl(self, op, operands, active):
        assert op[2] in ("bfly", "idx") and int(operands[3], 0) == 31 and active.all(), operands
        other = self.warp(operands[2]).astype(np.int64)
        other = (np.arange(32) ^ other) if op[2] == "bfly" else other
        values = np.take_along_axis(self.warp(operands[1]), other & 31, 1)
        self.write(operands[0], values.reshape(-1), active)

    def ldmatrix(self, op, operands, active):
        names, at = self.names(operands[0]), self.address(operands[1]).reshape(self.warps, 32)
        lane = np.arange(32)
        for i, name in enumerate(names):
            start = at[:, 8 * i + lane // 4].astype(np.int64) + lane % 4 * 4
            raw = self.shared[start[..., None] + np.arange(4)]
            self.write(name, raw.view(np.uint32)[..., 0].reshape(-1), active)

    def stmatrix(self, op, operands, active):
        names, at = self.names(operands[1]), self.address(operands[0]).reshape(self.warps, 32)
        lane = np.arange(32)
        for i, name in enumerate(names):
            start = at[:, 8 * i + lane // 4].astype(np.int64) + lane % 4 * 4
            raw = self.warp(name).astype(np.uint32)[..., None].view(np.uint8)
            self.shared[start[..., None] + np.arange(4)] = raw

    def mma(self, op, operands, active):
        """m16n8k16: lane 4 r + c of the operands, see the PTX ISA."""
        assert op[3] == "m16n8k16" and op[-3:] == ["bf16", "bf16", "f32"]
        d, a, b, c = (self.names(o) for o in operands)
        r, t = np.arange(32) // 4, np.arange(32) % 4
        A, B = np.zeros((self.warps, 16, 16)), np.zeros((self.warps, 16, 8))
        C = np.zeros((self.warps, 16, 8))
        for h in range(2):
            for i, name in enumerate(a):
                A[:, r + i % 2 * 8, i // 2 * 8 + 2 * t + h] = pairs(self.warp(name))[..., h]
            for i, name in enumerate(b):
                B[:, i * 8 + 2 * t + h, r] = pairs(self.warp(name))[..., h]
        for i, name in enumerate(c):
            C[:, r + i // 2 * 8, 2 * t + i % 2] = as_type(self.warp(name), "f32")
        D = (A @ B + C).astype(np.float32)
        for i, name in enumerate(d):
            self.write(name, to_bits(D[:, r + i // 2 * 8, 2 * t + i % 2]).reshape(-1), active)


@dataclass
class Launch:
    """Bytes are by tensor; `early` those loaded before a program waited for the kernel before, and
    `cached` those of them that the L1 cache may have given."""

    name: str
    grid: tuple[int, int, int]
    loaded: Counter = field(default_factory=Counter)
    stored: Counter = field(default_factory=Counter)
    early: Counter = field(default_factory=Counter)
    cached: Counter = field(default_factory=Counter)


class Gpu:
    def __init__(self, seed: int):
        self.random, self.launches, self.tensors = random.Random(seed), [], []

    def memory(self, offsets, how: str, waited: bool, past_l1: bool = False):
        """The tensor that holds all these addresses, as bytes, and the offsets in it."""
        launch = self.launches[-1]
        for name, first, data in self.tensors:
            if first <= offsets.min() and offsets.max() < first + len(data):
                (launch.loaded if how == "ld" else launch.stored)[name] += offsets.size
                if not waited and how != "ld":
                    raise PermissionError(f"{launch.name} writes to {name} before it waits")
                if not waited:
                    launch.early[name] += offsets.size
                    launch.cached[name] += 0 if past_l1 else offsets.size
                return data, offsets - first
        raise IndexError(f"{how} outside all tensors: {offsets.min():#x} .. {offsets.max():#x}")

    def launch(self, name, code, metadata, grid, args):
        self.launches.append(Launch(name, grid))
        values, self.tensors = [], []
        for argument, value in args:
            if isinstance(value, torch.Tensor):
                data = value.detach().view(-1).view(torch.uint8).numpy()
                self.tensors.append((argument, value.data_ptr(), data))
                value = value.data_ptr()
            elif isinstance(value, float):
                value = int(np.float32(value).view(np.uint32))
            values.append(value)
        programs = list(itertools.product(*map(range, grid)))
        self.random.shuffle(programs)
        for at in programs:
            threads = 32 * metadata.num_warps
            Program(self, code, values, threads, metadata.shared, grid, at).run()


@contextmanager
def emulate(name: str, seed: int = 0):
    """Inside the block kernels are compiled for the GPU `name` and executed here."""

    class Launcher:
        def __init__(self, src, metadata):
            self.src, self.metadata = src, metadata
            path = get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.ptx")
            self.code = parse(Path(path).read_text())

        def __call__(self, x, y, z, stream, function, packed, launch, enter, leave, *args):
            kinds = self.src.signature.items()
            args = [(n, a) for (n, t), a in zip(kinds, args, strict=True) if t != "constexpr"]
            gpu = triton.runtime.driver.active.state
            gpu.launch(self.src.name, self.code, self.metadata, (x, y, z), args)

    with driving(name, Launcher, Gpu(seed), "cpu", "emulated") as gpu:
        yield gpu
