"""The five operations of a forward pass as Triton kernels, for every GPU that Triton compiles for.

`prepare`, `plan`, `add_norm`, `attention` and `moe` have the signatures and the results of the
operations of the same names in gptoss.py, which are their definition; none of them reads anything
back from the device, so that a decode step can be captured as a graph. The letters are gptoss.py's:

    T  tokens of a step, S sequences of Q each       H  hidden size       I  intermediate size
    N  query heads       G  key/value heads          D  head dim          E  experts
    M  query heads that share a key head: N / G      k  experts of a token
    P  pages of a block table                        C  tokens it has room for: P * page_size
    pair  a token and one of its k slots: pair = token * k + slot

Each kernel accumulates in float32. Where programs share a sum, each stores its part, and the last
one to arrive at a counter adds the parts in a fixed order: results do not change from run to run.
"""

import functools
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

capturable = True
ACTIVATIONS = ("bf16", "fp8", "mxfp8", "mxfp4")
GROUP = tl.constexpr(32)  # values that share a scale (OCP Microscaling Formats v1.0, 5.2)
DECODE_TOKENS = 16  # up to here: one tile of tokens meets the weights of each active expert
SPLITS, SPLIT_KEYS = 16, tl.constexpr(128)  # programs for the keys of a sequence; keys for each


def next_power(n: int, least: int = 1) -> int:
    return max(triton.next_power_of_2(n), least)


def on_hip() -> bool:
    return triton.runtime.driver.active.get_current_target().backend == "hip"


@triton.jit
def arrive(counter, lane, HIP: tl.constexpr):
    """Adds 1 to a counter after everything that this program has stored, and makes what earlier
    arrivals stored visible to it -> how many came before. `lane` is any tensor that all warps
    hold."""
    if HIP:  # its barrier orders local memory only: each wave has to await its own stores
        tl.inline_asm_elementwise(
            "s_waitcnt vmcnt(0)", "=v,0,~{memory}", [lane], dtype=tl.int32, is_pure=False, pack=1
        )
    tl.debug_barrier()
    return tl.atomic_add(counter, 1, sem="acq_rel", scope="gpu")


# --------------------------------------------------------------------------------------------------
# Residual and norm


@triton.jit
def add_norm_kernel(
    x, y, scale, total, norm, H, eps, HAS_Y: tl.constexpr, BLOCK: tl.constexpr
):
    """A program a row."""
    h = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * H + h
    row = tl.load(x + at, mask=h < H, other=0.0)
    if HAS_Y:
        row = (row.to(tl.float32) + tl.load(y + at, mask=h < H, other=0.0).to(tl.float32)).to(
            row.dtype
        )
        tl.store(total + at, row, mask=h < H)
    wide = row.to(tl.float32)
    inverse = 1 / tl.sqrt_rn(tl.sum(wide * wide, 0) / H + eps)
    wide = wide * inverse * tl.load(scale + h, mask=h < H, other=0.0)
    tl.store(norm + at, wide.to(norm.dtype.element_ty), mask=h < H)


def add_norm(x: Tensor, y: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, H] plus y, and the RMS norm of the sum times scale, float32 [H]; one launch."""
    x, y = x.contiguous(), None if y is None else y.contiguous()
    total, norm = x if y is None else torch.empty_like(x), torch.empty_like(x)
    T, H = x.shape
    block = next_power(H)
    warps = min(max(block // 512, 1), 16)
    if T:
        add_norm_kernel[(T,)](
            x, y, scale, total, norm, H, eps, y is not None, block, num_warps=warps
        )
    return total, norm


# --------------------------------------------------------------------------------------------------
# Attention


@dataclass(frozen=True)
class Plan:
    """What all layers of a step share, on the device."""

    cos: Tensor  # float32 [T, D/2]
    sin: Tensor
    positions: Tensor  # int32 [S, Q]
    newest: Tensor | None  # int32 [S], the last position of each sequence, where Q > 1
    tables: dict[str, Tensor]
    page_size: int
    window: int
    arrived: Tensor  # int32 [S * G], zero between launches


@functools.cache
def rope(config, device: torch.device) -> tuple[Tensor, float]:
    """Radians a token of each pair of a head's elements, [D/2], and what multiplies cos and sin:
    YaRN (https://arxiv.org/abs/2309.00071, sections 3.2 to 3.4, bounds not truncated)."""
    D, base, context = config.head_dim, config.rope_theta, config.initial_context_length
    frequency = base ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)  # [D/2]
    low, high = (
        D * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (config.rope_beta_fast, config.rope_beta_slow)
    )
    low, high = max(low, 0), min(high, D - 1)
    slow = (torch.arange(D // 2, dtype=torch.float32) - low) / max(high - low, 0.001)
    slow = slow.clamp(0, 1)
    frequency = frequency / config.rope_factor * slow + frequency * (1 - slow)
    return frequency.to(device), 0.1 * math.log(config.rope_factor) + 1


def plan(step, config) -> Plan:
    """step: positions int32 [S, Q], -1 for padding; tables, kind of layer -> int32 [S, P];
    page_size. Rows of positions are consecutive, padding comes last."""
    S, Q = step.positions.shape
    frequency, factor = rope(config, step.positions.device)
    angles = step.positions.view(-1, 1) * frequency  # [T, D/2]
    return Plan(
        cos=angles.cos() * factor,
        sin=angles.sin() * factor,
        positions=step.positions.contiguous(),
        newest=step.positions.amax(1) if Q > 1 else None,
        tables={kind: table.contiguous() for kind, table in step.tables.items()},
        page_size=step.page_size,
        window=config.sliding_window,
        arrived=step.positions.new_zeros(S * config.num_key_value_heads),
    )


@triton.jit
def rotated(head, cos, sin, d, live, D: tl.constexpr):
    """A head's elements d after rotary embedding, in its dtype: the pair of element i is
    (i, i + D/2). head, cos, sin: pointers to the first element, broadcast against d."""
    HALF: tl.constexpr = D // 2
    first = d < HALF
    x = tl.load(head + d, mask=live, other=0.0)
    other = tl.load(head + tl.where(first, d + HALF, d - HALF), mask=live, other=0.0)
    turn = tl.where(first, d, d - HALF)
    c, s = tl.load(cos + turn, mask=live, other=0.0), tl.load(sin + turn, mask=live, other=0.0)
    s = tl.where(first, -s, s)
    return (x.to(tl.float32) * c + other.to(tl.float32) * s).to(x.dtype)


@triton.jit
def cached(pool, table, position, g, C, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, live):
    """Pointers to the keys of head g at these positions; the values are G * D further."""
    index = position % C
    page = tl.load(table + index // PAGE, mask=live, other=0)
    slot = (page * PAGE + index % PAGE).to(tl.int64)
    return pool + slot * (2 * G * D) + g * D


@triton.jit
def attend(q, k, v, seen, top, total, acc, scale):
    """A tile of keys into a running softmax. q [R, D], k and v [L, D], seen [R, L]; top, the
    largest logit so far in powers of 2, and total, sum of 2^(logit - top): float32 [R]; acc
    [R, D]."""
    logits = tl.dot(q, k.T, input_precision="ieee") * scale  # [R, L]
    logits = tl.where(seen, logits, -float("inf"))
    new = tl.maximum(top, tl.max(logits, 1))
    share, fade = tl.exp2(logits - new[:, None]), tl.exp2(top - new)
    acc = acc * fade[:, None] + tl.dot(share.to(v.dtype), v, input_precision="ieee")
    return new, total * fade + tl.sum(share, 1), acc


@triton.jit(do_not_specialize=["P"])
def decode_kernel(
    qkv,
    sinks,
    pool,
    out,
    cos,
    sin,
    positions,
    table,
    parts,
    arrived,
    P,
    scale,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
    SPLITS: tl.constexpr,
    HIP: tl.constexpr,
):
    """Program (g, s, z): part z of the keys that sequence s's one token sees, for the M query heads
    of key head g. Part 0 has the token's own key, which it caches, and the sinks. How many parts
    there are depends on the sequence's length alone."""
    LOG2E: tl.constexpr = 1.4426950408889634
    g, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + s)
    m, d = tl.arange(0, ROWS), tl.arange(0, COLUMNS)
    live = (m[:, None] < M) & (d[None, :] < D)
    into = out + (s * G * M + g * M + m[:, None]) * D + d[None, :]
    if position < 0:
        if z == 0:
            tl.store(into, tl.zeros([ROWS, COLUMNS], out.dtype.element_ty), mask=live)
        return
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    used = tl.minimum(tl.maximum(tl.cdiv(position - first, SPLIT_KEYS), 1), SPLITS)
    if z >= used:
        return

    cos += s * (D // 2)
    sin += s * (D // 2)
    qkv += s.to(tl.int64) * ((M * G + 2 * G) * D)
    q = rotated(qkv + (g * M + m[:, None]) * D, cos, sin, d[None, :], live, D)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    table += s * P
    C = P * PAGE
    if z == 0:
        qkv += (G * M + g) * D
        own_k = rotated(qkv, cos, sin, d, d < D, D)
        own_v = tl.load(qkv + G * D + d, mask=d < D, other=0.0)
        at = cached(pool, table, position, g, C, G, D, PAGE, True) + d
        tl.store(at, own_k, mask=d < D)
        tl.store(at + G * D, own_v, mask=d < D)
        logit = tl.sum(q.to(tl.float32) * own_k.to(tl.float32)[None, :], 1) * scale
        sink = tl.load(sinks + g * M + m, mask=m < M, other=0.0).to(tl.float32) * LOG2E
        top = tl.maximum(logit, sink)
        own = tl.exp2(logit - top)
        total = own + tl.exp2(sink - top)
        acc = own[:, None] * own_v.to(tl.float32)[None, :]

    length = tl.cdiv(tl.cdiv(position - first, used), KEYS) * KEYS  # of a part
    begin = first + z * length
    end = tl.minimum(begin + length, position)
    for start in tl.range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        at = cached(pool, table, key, g, C, G, D, PAGE, key < end)[:, None] + d[None, :]
        there = (key[:, None] < end) & (d[None, :] < D)
        k = tl.load(at, mask=there, other=0.0)
        v = tl.load(at + G * D, mask=there, other=0.0)
        top, total, acc = attend(q, k, v, (key < end)[None, :], top, total, acc, scale)

    if used > 1:
        # a part's rows: top and total in two columns beyond its D
        row = (((s * G + g) * SPLITS) * ROWS + m) * (COLUMNS + 2)
        mine = parts + row + z * ROWS * (COLUMNS + 2)
        tl.store(mine[:, None] + d[None, :], acc)
        tl.store(mine + COLUMNS, top)
        tl.store(mine + COLUMNS + 1, total)
        if arrive(arrived + s * G + g, m, HIP) < used - 1:
            return
        tl.store(arrived + s * G + g, 0)
        top = tl.load(parts + row + COLUMNS)
        total = tl.load(parts + row + COLUMNS + 1)
        acc = tl.load(parts + row[:, None] + d[None, :])
        for part in range(1, used):
            theirs = parts + row + part * ROWS * (COLUMNS + 2)
            their_top = tl.load(theirs + COLUMNS)
            new = tl.maximum(top, their_top)
            fade, their_fade = tl.exp2(top - new), tl.exp2(their_top - new)
            total = total * fade + tl.load(theirs + COLUMNS + 1) * their_fade
            their_acc = tl.load(theirs[:, None] + d[None, :])
            acc = acc * fade[:, None] + their_acc * their_fade[:, None]
            top = new
    tl.store(into, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)


@triton.jit(do_not_specialize=["Q", "P"])
def prefill_kernel(
    qkv,
    keys,
    sinks,
    pool,
    out,
    cos,
    sin,
    positions,
    table,
    Q,
    P,
    scale,
    WINDOW: tl.constexpr,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    HEADS: tl.constexpr,
    QUERIES: tl.constexpr,
    COLUMNS: tl.constexpr,
    KEYS: tl.constexpr,
):
    """Program (tile, g, s): QUERIES tokens of sequence s and the M query heads of key head g, over
    the cached keys before the chunk and then the chunk's own, rotated, in `keys` [T, G, D]."""
    LOG2E: tl.constexpr = 1.4426950408889634
    # the last tiles see the most keys: they start first
    tile, g, s = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = tl.arange(0, HEADS * QUERIES)
    m, d = row % HEADS, tl.arange(0, COLUMNS)
    query = tile * QUERIES + row // HEADS
    positions += s * Q
    position = tl.load(positions + query, mask=query < Q, other=-1)
    token = s.to(tl.int64) * Q + query
    live = ((m < M) & (query < Q))[:, None] & (d[None, :] < D)
    WIDTH: tl.constexpr = (M * G + 2 * G) * D  # of a token in qkv
    q = rotated(
        qkv + token[:, None] * WIDTH + (g * M + m[:, None]) * D,
        cos + token[:, None] * (D // 2),
        sin + token[:, None] * (D // 2),
        d[None, :],
        live,
        D,
    )
    sink = tl.load(sinks + g * M + m, mask=m < M, other=0.0).to(tl.float32) * LOG2E
    top, total = sink, tl.full([HEADS * QUERIES], 1.0, tl.float32)  # the sink's own share
    acc = tl.zeros([HEADS * QUERIES, COLUMNS], tl.float32)

    begin = tl.load(positions)  # of the chunk: the cached tokens are those before
    first, first_own = 0, 0
    if WINDOW > 0:
        first = tl.maximum(begin + tile * QUERIES - WINDOW + 1, 0)
        first_own = tl.maximum(tile * QUERIES - WINDOW + 1, 0) // KEYS * KEYS
    table += s * P
    for start in tl.range(first, begin, KEYS):
        key = start + tl.arange(0, KEYS)
        at = cached(pool, table, key, g, P * PAGE, G, D, PAGE, key < begin)[:, None] + d[None, :]
        there = (key[:, None] < begin) & (d[None, :] < D)
        k = tl.load(at, mask=there, other=0.0)
        v = tl.load(at + G * D, mask=there, other=0.0)
        seen = (key < begin)[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen &= key[None, :] > position[:, None] - WINDOW
        top, total, acc = attend(q, k, v, seen, top, total, acc, scale)

    values = qkv + (M * G + G + g) * D
    for start in tl.range(first_own, tl.minimum((tile + 1) * QUERIES, Q), KEYS):
        own = start + tl.arange(0, KEYS)
        key = tl.load(positions + own, mask=own < Q, other=-1)
        at = s.to(tl.int64) * Q + own
        there = (own[:, None] < Q) & (d[None, :] < D)
        k = tl.load(keys + (at[:, None] * G + g) * D + d[None, :], mask=there, other=0.0)
        v = tl.load(values + at[:, None] * WIDTH + d[None, :], mask=there, other=0.0)
        seen = (key >= 0)[None, :] & (key[None, :] <= position[:, None])
        if WINDOW > 0:
            seen &= key[None, :] > position[:, None] - WINDOW
        top, total, acc = attend(q, k, v, seen, top, total, acc, scale)
    into = out + (token[:, None] * (G * M) + g * M + m[:, None]) * D + d[None, :]
    tl.store(into, (acc / total[:, None]).to(out.dtype.element_ty), mask=live)


@triton.jit
def rotate_keys_kernel(
    qkv, cos, sin, keys, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr
):
    """Program (token, g)."""
    token, g, d = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.arange(0, COLUMNS)
    head = qkv + (token * (M * G + 2 * G) + M * G + g) * D
    k = rotated(head, cos + token * (D // 2), sin + token * (D // 2), d, d < D, D)
    tl.store(keys + (token * G + g) * D + d, k, mask=d < D)


@triton.jit(do_not_specialize=["Q", "P"])
def cache_kernel(
    qkv,
    keys,
    pool,
    positions,
    newest,
    table,
    Q,
    P,
    PAGE: tl.constexpr,
    M: tl.constexpr,
    G: tl.constexpr,
    D: tl.constexpr,
    COLUMNS: tl.constexpr,
):
    """Program (token, g): of more new tokens than the table has room for the last stay."""
    token, g, d = tl.program_id(0), tl.program_id(1), tl.arange(0, COLUMNS)
    s, C = token // Q, P * PAGE
    position = tl.load(positions + token)
    if (position < 0) | (position <= tl.load(newest + s) - C):
        return
    token = token.to(tl.int64)
    at = cached(pool, table + s * P, position, g, C, G, D, PAGE, True) + d
    k = tl.load(keys + (token * G + g) * D + d, mask=d < D)
    v = tl.load(qkv + (token * (M * G + 2 * G) + M * G + G + g) * D + d, mask=d < D)
    tl.store(at, k, mask=d < D)
    tl.store(at + G * D, v, mask=d < D)


def attention(qkv: Tensor, sinks: Tensor, pool: Tensor, kind: str, plan: Plan) -> Tensor:
    """Rotates queries and keys, attends to the cached tokens and the step's own, and caches these.
    qkv [T, (N + 2G) D]; sinks [N]; pool [slots, 2, G, D], keys and values -> [T, N D].

    One launch where Q = 1. For chunks three: the keys are rotated, attention reads what was cached
    before, and only then is the pool written, where a sliding layer's ring may overwrite what the
    chunk's first queries saw."""
    (S, Q), N, (G, D) = plan.positions.shape, len(sinks), pool.shape[2:]
    T, M, columns = S * Q, N // G, next_power(D, 16)
    qkv, table = qkv.contiguous(), plan.tables[kind]
    P, sliding = table.shape[1], kind == "sliding_attention"
    window = plan.window if sliding else 0
    scale = D**-0.5 * math.log2(math.e)
    out = qkv.new_empty(T, N * D)
    if not T:
        return out
    step = (plan.cos, plan.sin, plan.positions)
    if Q == 1:
        room = P * plan.page_size
        splits = min(triton.cdiv(min(room, window) if sliding else room, SPLIT_KEYS.value), SPLITS)
        rows = next_power(M, 16)
        parts = qkv.new_empty(S * G * splits, rows, columns + 2, dtype=torch.float32)
        decode_kernel[(G, S, splits)](
            qkv, sinks, pool, out, *step, table, parts, plan.arrived, P, scale, window,
            plan.page_size, M, G, D, rows, columns, 64, splits, on_hip(), num_warps=4,
        )  # fmt: skip
        return out
    keys = qkv.new_empty(T, G, D)
    rotate_keys_kernel[(T, G)](qkv, plan.cos, plan.sin, keys, M, G, D, columns, num_warps=1)
    heads = next_power(M)
    queries = max((128 if qkv.dtype == torch.bfloat16 else 32) // heads, 1)
    queries = max(min(queries, next_power(Q)), 16 // heads)
    prefill_kernel[(triton.cdiv(Q, queries), G, S)](
        qkv, keys, sinks, pool, out, *step, table, Q, P, scale, window, plan.page_size, M, G, D,
        heads, queries, columns, 64 if qkv.dtype == torch.bfloat16 else 32, num_warps=4,
    )  # fmt: skip
    cache_kernel[(T, G)](
        qkv, keys, pool, plan.positions, plan.newest, table, Q, P, plan.page_size, M, G, D, columns,
        num_warps=1,
    )  # fmt: skip
    return out
