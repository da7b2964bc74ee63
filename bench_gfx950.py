"""Emulation speed: scaled GEMMs of GPT-OSS 120b shapes (fp8 x mxfp4), with wave-instructions per second.

python bench_gfx950.py
"""

import time

import torch

import gfx950
from test_gfx950_kernels import run_scaled_matmul

SHAPES = (
    ("gate_up of one expert, 32 tokens", 32, 5760, 2880, (32, 64, 128)),
    ("gate_up of 4 experts, 1 token", 1, 4 * 5760, 2880, (16, 64, 128)),
    ("down of 4 experts, 1 token", 1, 4 * 2880, 2880, (16, 64, 128)),
)


def main():
    torch.manual_seed(0)
    for what, m, n, k, tile in SHAPES:
        started = time.perf_counter()
        with gfx950.emulate() as gpu:
            options = {"tile": tile, "num_warps": 1, "matrix_instr_nonkdim": 16}
            c, expected, _ = run_scaled_matmul("e4m3", "e2m1", m, n, k, **options)
        (launch,) = gpu.launches
        total, count = time.perf_counter() - started, launch.counters.wave_instructions
        error = ((c - expected).norm() / expected.norm()).item()
        print(f"{what}: {m} x {n} x {k}")
        print(f"  {launch.seconds:.1f} s emulated, {total:.1f} s with compiling and checking")
        print(f"  {count:,} wave-instructions, {count / launch.seconds / 1e6:.2f} million a second")
        print(f"  relative L2 error against float64 {error:.1e}")
        print(gfx950.table(launch), "\n")


if __name__ == "__main__":
    main()
