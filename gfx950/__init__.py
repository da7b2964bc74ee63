"""Run Triton and Gluon kernels compiled for AMD gfx950 on a CPU, from their assembly text,
adversarially.

with gfx950.emulate(timing="lazy", schedule="lockstep", seed=0) as gpu:
    kernel[grid](cpu_tensor, ...)
print(gfx950.table(gpu.launches[-1]))
"""

import ctypes
import time
from contextlib import contextmanager
from dataclasses import dataclass, field

import numpy as np
import torch
import triton
from torch.overrides import TorchFunctionMode
from triton.backends.compiler import GPUTarget
from triton.runtime.cache import get_cache_manager

from .asm import parse
from .counters import Counters, resources, table
from .decode import Unsupported
from .machine import GPUFault, Machine, prepare
from .memory import Span
from .sums import RULES

__all__ = ["GPUFault", "Launch", "Unsupported", "compile_only", "emulate", "resources", "table"]
LDS_BYTES = 160 * 1024


@dataclass
class Launch:
    """What one kernel[grid](...) did. `waves` counts all workgroups; `profile` is static,
    `counters` None when only compiled."""

    name: str
    grid: tuple
    waves: int
    profile: dict
    counters: object = None
    seconds: float = 0.0  # of emulation, nothing to do with the hardware's time
    program: object = field(default=None, repr=False)
    # `emulate(trace=...)`: indices into program.code, as executed
    trace: list = field(default=None, repr=False)


class Utils:
    """The part of a Triton driver that loads binaries: nothing is loaded, the launcher reads the
    assembly."""

    @staticmethod
    def load_binary(name, binary, shared, device):
        # module, function, registers, spills, threads a workgroup may have
        return (name, name, 0, 0, 1024)

    @staticmethod
    def get_device_properties(device):
        return {
            "max_shared_mem": LDS_BYTES,
            "multiprocessor_count": 256,
            "warpSize": 64,
            "arch": "gfx950",
        }


class Launcher:
    """Triton makes one per compiled kernel and keeps it, so it looks up the driver that is active
    at each launch."""

    def __init__(self, src, metadata):
        text = get_cache_manager(metadata.hash).get_file(f"{src.name[:150]}.amdgcn")
        with open(text) as f:
            self.program = prepare(parse(f.read()))
        self.signature, self.num_warps, self.shared = (
            dict(src.signature),
            metadata.num_warps,
            metadata.shared,
        )

    def __call__(
        self, gx, gy, gz, stream, function, packed, launch_metadata, enter_hook, exit_hook, *args
    ):
        triton.runtime.driver.active.launch(
            self, (gx, gy, gz), flatten(self.signature.values(), args, self.signature)
        )


def flatten(types, args, names):
    """Kernel arguments in order, without compile-time constants: [(type, value, name)]."""
    out = []
    for t, a, name in zip(types, args, names, strict=True):
        if isinstance(t, tuple):
            out += flatten(t, a, [f"{name}[{i}]" for i in range(len(t))])
        elif t.startswith("tensordesc"):
            raise Unsupported("tensor descriptors as kernel arguments")
        elif t != "constexpr":
            out.append((t, a, name))
    return out


class Driver:
    """What Triton asks of a driver. The device is no number, so kernels cached for a real GPU stay
    apart."""

    utils, launcher_cls = Utils(), Launcher

    def __init__(self, session):
        self.session = session

    def launch(self, launcher, grid, args):
        self.session.launch(launcher, grid, args)

    def get_current_target(self):
        return GPUTarget("hip", "gfx950", 64)

    def get_current_device(self):
        return "gfx950"

    def get_current_stream(self, device):
        return 0

    def get_active_torch_device(self):
        return torch.device("cpu")

    def get_benchmarker(self):
        """triton.autotune ranks configurations by this: modelled cycles, as no time here means
        anything."""

        def bench(call, quantiles=None, **_):
            call()
            cycles = max(resources(self.session.launches[-1]).values())
            return cycles if quantiles is None else [cycles] * len(quantiles)

        return bench


def scalar_bytes(typename, value, size):
    if typename in ("fp32", "f32"):
        return np.float32(value).tobytes()
    if typename in ("fp64",):
        return np.float64(value).tobytes()
    if typename == "fp16":
        return np.float16(value).tobytes()
    if typename == "bf16":
        return torch.tensor(value, dtype=torch.bfloat16).view(torch.int16).numpy().tobytes()
    return int(value).to_bytes(size, "little", signed=int(value) < 0)


def extent(tensor):
    """Bytes from data_ptr to the end of the last element of a (strided) view."""
    if tensor.numel() == 0:
        return 0
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    return (last + 1) * tensor.element_size()


def tensor_spans(args):
    """One span per tensor, views of one storage that overlap merged. Returns (spans, function
    tensor -> address).

    Kernels see made-up addresses 2^40 apart, so that running off one tensor never lands in the
    next; the low 16 bits are the real ones, which keeps alignment."""
    ranges = []
    for _, a, name in args:
        if hasattr(a, "data_ptr") and extent(a):
            if a.device.type != "cpu":
                raise ValueError(f"{name} is on {a.device}; the emulator takes CPU tensors")
            ranges.append([a.data_ptr(), a.data_ptr() + extent(a), name])
    merged = []
    for lo, hi, name in sorted(ranges):
        if merged and lo < merged[-1][1]:
            merged[-1][1] = max(hi, merged[-1][1])
            merged[-1][2] += f"+{name}" if name not in merged[-1][2].split("+") else ""
        else:
            merged.append([lo, hi, name])
    spans = []
    for i, (lo, hi, name) in enumerate(merged, 1):
        data = np.frombuffer((ctypes.c_uint8 * (hi - lo)).from_address(lo), np.uint8)
        spans.append(Span(name, (i << 40) + (lo & 0xFFFF), data))

    def address(tensor):
        real = tensor.data_ptr()
        return next(
            (
                s.base + real - lo
                for s, (lo, hi, _) in zip(spans, merged, strict=True)
                if lo <= real < hi
            ),
            0,
        )

    return spans, address


KERNARG = 1 << 50  # above every tensor


class Session:
    def __init__(self, timing, schedule, seed, execute, trace=None, sums="exact"):
        self.sums = sums
        self.timing, self.schedule, self.execute, self.trace = timing, schedule, execute, trace
        self.rng, self.launches = np.random.default_rng(seed), []

    def launch(self, launcher, grid, args):
        program, d = launcher.program, launcher.program.directives
        profile = {
            "sgprs": d["sgpr_count"],
            "vgprs": d["vgpr_count"],
            "agprs": d["agpr_count"],
            "sgpr_spills": d["sgpr_spill_count"],
            "vgpr_spills": d["vgpr_spill_count"],
            "scratch": d["private_segment_fixed_size"],
            "lds": launcher.shared,
            "occupancy": d["Occupancy"],
            "code_bytes": d["codeLenInByte"],
        }
        launch = Launch(
            program.name, grid, int(np.prod(grid)) * launcher.num_warps, profile, program=program
        )
        self.launches.append(launch)
        if not self.execute or not launch.waves:
            return
        spans, address = tensor_spans(args)
        kernarg = Span(
            "kernel arguments",
            KERNARG,
            kernel_arguments(program, grid, launcher.num_warps, args, address),
        )
        lists = [np.zeros(len(program.code), np.int64) for _ in range(3)]
        machine = Machine(
            program,
            [*spans, kernarg],
            KERNARG,
            grid,
            launcher.num_warps,
            launcher.shared,
            self.timing,
            self.schedule,
            self.rng,
            lists,
            self.trace,
            self.sums,
        )
        started = time.perf_counter()
        machine.run()
        launch.seconds = time.perf_counter() - started
        launch.trace = None if self.trace is None else machine.trace
        launch.counters = Counters(
            program, *lists, spans, machine.peak_inflight, machine.unwritten_reads
        )


def kernel_arguments(program, grid, num_warps, args, address):
    """The kernarg segment as the assembly's metadata lays it out; Triton appends scratch pointers
    (null here)."""
    data, explicit = np.zeros(max(8, program.directives["kernarg_size"] + 64), np.uint8), iter(args)
    hidden = {f"hidden_block_count_{c}": grid[i] for i, c in enumerate("xyz")}
    hidden |= {
        "hidden_group_size_x": num_warps * 64,
        "hidden_group_size_y": 1,
        "hidden_group_size_z": 1,
        "hidden_grid_dims": 3,
    }
    for offset, size, kind in program.args:
        if kind.startswith("hidden"):
            raw = hidden.get(kind, 0).to_bytes(size, "little")
        else:
            t, value, _ = next(explicit, ("*i8", 0, "scratch"))
            if t.startswith("*"):
                raw = (address(value) if hasattr(value, "data_ptr") else value or 0).to_bytes(
                    8, "little"
                )
            else:
                raw = scalar_bytes(t, value, size)
        data[offset : offset + len(raw)] = np.frombuffer(raw, np.uint8)
    return data


class PoisonEmpty(TorchFunctionMode):
    """Fills what torch.empty and its relatives return with 0xFF bytes, a NaN in every float format
    and -1 in integers, so that an output no kernel wrote is never right by luck."""

    EMPTY = {
        torch.empty,
        torch.empty_like,
        torch.empty_strided,
        torch.Tensor.new_empty,
        torch.Tensor.new_empty_strided,
    }

    def __torch_function__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        if func in self.EMPTY and out.device.type == "cpu" and out.numel() and out.is_contiguous():
            out.detach().view(-1).view(torch.uint8).fill_(255)
        return out


@contextmanager
def activate(session):
    config = triton.runtime.driver
    before = config._active  # `.active` would go looking for a GPU
    config.set_active(Driver(session))
    try:
        yield session
    finally:
        config._active = before


@contextmanager
def emulate(timing="lazy", schedule="lockstep", seed=0, trace=None, sums="exact"):
    """Inside the block every Triton kernel launched on CPU tensors is compiled for gfx950 and its
    assembly executed.

    timing: "lazy" (memory operations complete when a wait forces them), "eager" (at issue),
    "random" (in between). schedule: "lockstep" (waves of a workgroup together), "skew" (one wave
    far ahead), "random". trace: a workgroup, counted along x, then y, then z: each launch then
    keeps the instruction numbers its wave 0 executed, in order, as `launch.trace` (empty where the
    grid is smaller). sums: the rule for sums inside matrix instructions, "exact", or "chain" or
    "cdna3" of `sums`. Raises GPUFault for faults of the kernel and Unsupported for instructions the
    emulator does not know, both naming the Python line."""
    for value, allowed in (
        (timing, ("lazy", "eager", "random")),
        (schedule, ("lockstep", "skew", "random")),
        (sums, ("exact", *RULES)),
    ):
        if value not in allowed:
            raise ValueError(f"{value!r} is none of {allowed}")
    with activate(Session(timing, schedule, seed, True, trace, sums)) as session, PoisonEmpty():
        yield session


@contextmanager
def compile_only():
    """As `emulate`, but launches compile and record their static profile only; tensors may be on
    the meta device."""
    with activate(Session("lazy", "lockstep", 0, execute=False)) as session:
        yield session
