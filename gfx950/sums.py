"""Published rules for the sum inside a matrix instruction, in place of `matrix`'s own, which is
exact and rounds once. AMD documents none for gfx950; `emulate(sums=...)` tells what rests on it.

"chain"  float32 fused multiply-adds in the order of k; with scales a chain from 0 over each block,
         which is scaled and added to C. AMD's emulator rocjitsu does so (mma_exec.h).
"cdna3"  what Microsoft's MMA-Sim found bit for bit on the generation before (arXiv:2511.10909,
         mmasim/simulator): products in groups of 8 (16 bits) or 16 (8 bits, of these the even and
         the odd ones apart), each cut towards zero to 24 bits below the group's largest exponent;
         the sum of the groups' parts is cut towards minus infinity, and so is C before it is added.
         That generation has neither scales nor fp4: here a scale moves its products' exponents, and
         fp4 is treated as 8 bits are.

Operands are `Terms` of A [n, D, K] and B [n, D, K]; C and the result are float32 [n, D, D]."""

from dataclasses import dataclass

import numpy as np

from .isa import E2M1, E4M3, E5M2, f32, f64, fma32

LEAST_EXPONENT = {"bf16": -126, "f16": -14, E4M3: -6, E5M2: -14, E2M1: 0}


@dataclass
class Terms:
    values: np.ndarray  # float64 [n, D, K], without scales
    scales: np.ndarray | None  # float64 [n, D, K / 32]: powers of two, or NaN
    fmt: object  # "bf16" | "f16" | isa.Format

    def scaled(self):
        if self.scales is None:
            return self.values
        blocks = self.values.reshape(*self.scales.shape, 32)
        return (blocks * self.scales[..., None]).reshape(self.values.shape)

    def exponents(self):
        """Of every value with its scale; a zero's is below all others."""
        e = np.maximum(np.frexp(self.values)[1] - 1, LEAST_EXPONENT[self.fmt])
        e = np.where(self.values == 0, -126, e)
        if self.scales is None:
            return e
        log = np.frexp(np.where(np.isnan(self.scales), 1.0, self.scales))[1] - 1
        return e + np.repeat(log, 32, axis=2)


def products(a, b):
    """[n, D, G] and [n, D, G] of a group -> [n, D, D, G]."""
    return a[:, :, None, :], b[:, None, :, :]


def chain(a, b, c):
    def fused(k, total):
        x, y = a.values[:, :, None, k].astype(f32), b.values[:, None, :, k].astype(f32)
        return fma32(*np.broadcast_arrays(x, y), total)

    total = c
    if a.scales is None:
        for k in range(a.values.shape[2]):
            total = fused(k, total)
        return total
    for block in range(a.scales.shape[2]):
        part = np.zeros_like(c)
        for k in range(32 * block, 32 * block + 32):
            part = fused(k, part)
        scale = a.scales[:, :, None, block] * b.scales[:, None, :, block]
        total = total + (part * scale).astype(f32)
    return total


def cut(x, exponent, bits, towards):
    """x to a multiple of 2^(exponent - bits)."""
    unit = exponent - bits
    return np.ldexp(towards(np.ldexp(x, -unit)), unit)


def fused_sum(p, e):
    """Products [..., G] and their exponents -> (their sum, cut, and the largest exponent)."""
    top = e.max(-1)
    return cut(p, top[..., None], 24, np.trunc).sum(-1), top


def cdna3(a, b, c):
    narrow = a.fmt not in ("bf16", "f16")
    group, total = 16 if narrow else 8, c
    xs, ys, es, fs = a.scaled(), b.scaled(), a.exponents(), b.exponents()
    for first in range(0, xs.shape[2], group):
        k = slice(first, first + group)
        x, y = products(xs[..., k], ys[..., k])
        e, f = products(es[..., k], fs[..., k])
        p, e = x * y, e + f
        if narrow:
            (s, top), (odd, other) = (fused_sum(p[..., i::2], e[..., i::2]) for i in (0, 1))
            most = np.maximum(top, other)
            s, top = cut(s, most, 24, np.floor) + cut(odd, most, 24, np.floor), most
        else:
            s, top = fused_sum(p, e)
        wide = total.astype(f64)
        ec = np.where(total == 0, -126, np.maximum(np.frexp(wide)[1] - 1, -126))
        most = np.maximum(top, ec)
        old = cut(wide, most, 24, np.floor)
        if narrow:
            old = np.where(ec >= most - 25, old, 0.0)
        exact = p.sum(-1) + wide
        s = cut(s, most, 31, np.floor) + old
        total = np.where(np.isfinite(exact), s, exact).astype(f32)
    return total


RULES = {"chain": chain, "cdna3": cdna3}
