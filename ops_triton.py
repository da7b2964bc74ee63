"""The six operations of a forward pass as Triton kernels, for every GPU that Triton compiles for.

`prepare`, `plan`, `add_norm`, `linear`, `attention` and `moe` have the signatures and the results
of the operations of the same names in gptoss.py, which are their definition; none of them reads
anything back from the device, so that a decode step can be captured as a graph. The letters are
gptoss.py's:

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
from dataclasses import dataclass
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

capturable = True
ACTIVATIONS = ("bf16", "fp8", "mxfp8", "mxfp4")
LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = 2^(x LOG2E)
GROUP = tl.constexpr(32)  # values that share a scale (OCP Microscaling Formats v1.0, 5.2)
DECODE_TOKENS = 16  # up to here: one tile of tokens meets the weights of each active expert
SPLITS = tl.constexpr(16)  # parts of a sequence's keys, at most
SPLIT_KEYS = tl.constexpr(128)  # of a part, while there are no more parts


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


def overlapping() -> dict:
    """Launch options under which a kernel starts while the one before still runs, where a GPU can:
    programmatic dependent launch of sm_90 and newer (CUDA C++ Programming Guide, "Programmatic
    Dependent Launch and Synchronization")."""
    target = triton.runtime.driver.active.get_current_target()
    if target.backend == "cuda" and target.arch >= 90:
        return {"PDL": True, "launch_pdl": True}
    return {"PDL": False}


@triton.jit
def await_earlier(PDL: tl.constexpr):
    """Before a kernel's first access to what others write: lets the next one start, and waits until
    the one before is done. As that has waited too, so is everything before it."""
    if PDL:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()


# --------------------------------------------------------------------------------------------------
# Residual and norm


@triton.jit
def add_norm_kernel(
    x, y, scale, total, norm, H, eps, HAS_Y: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr
):
    """A program a row."""
    await_earlier(PDL)
    h = tl.arange(0, BLOCK)
    at = tl.program_id(0).to(tl.int64) * H + h
    wide = tl.load(x + at, mask=h < H, other=0.0).to(tl.float32)
    if HAS_Y:
        wide += tl.load(y + at, mask=h < H, other=0.0).to(tl.float32)
        row = wide.to(total.dtype.element_ty)  # which is what the next layers see
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
            x, y, scale, total, norm, H, eps, y is not None, block, num_warps=warps, **overlapping()
        )
    return total, norm


# The same of partial sums that several GPUs hold. An all-reduce and then the kernel above are more
# latencies in a row than this: each GPU writes its part into the memory of the others and norms. A
# word of data travels with the number of the call in one access of 8 bytes: who finds the number
# has the data, and nobody waits for writes to be done before a signal follows.


class Peers(NamedTuple):
    """What one rank sees of the memory through which ranks of one machine add up partial sums."""

    rank: int
    inboxes: tuple[int, ...]  # addresses: of every rank's `inbox`, which no tensor of ours can be
    inbox: Tensor  # int64 [2, ranks, rows, H/2], by odd and even calls and by who wrote it
    calls: Tensor  # int32 [rows], of this rank: how often each row was summed


def meet(rank: int, ranks: int, rows: int, H: int, device) -> Peers:
    """Memory for rows of H bfloat16 that all of `ranks` see; all of them call this together."""
    from torch.distributed import _symmetric_memory as symmetric_memory  # where there are GPUs

    shape, group = (2, ranks, rows, H // 2), torch.distributed.group.WORLD
    inbox = symmetric_memory.empty(*shape, dtype=torch.int64, device=device).zero_()
    handle = symmetric_memory.rendezvous(inbox, group)
    inboxes = tuple(handle.get_buffer(r, shape, torch.int64).data_ptr() for r in range(ranks))
    torch.cuda.synchronize(device)
    torch.distributed.barrier(group)  # nobody writes before all are zero
    return Peers(rank, inboxes, inbox, torch.zeros(rows, dtype=torch.int32, device=device))


@triton.jit
def sum_norm_kernel(
    x, y, scale, total, norm, inboxes, calls, W, eps, rows, RANK: tl.constexpr,
    RANKS: tl.constexpr, BLOCK: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """A program a row of W words, each two values. A call's words are written again two calls
    later, which no rank makes before all have read them: it waits for the call between, which a
    rank takes part in when it is done with this one."""
    await_earlier(PDL)
    t, w, rank = tl.program_id(0), tl.arange(0, BLOCK), tl.arange(0, RANKS)
    at, there = t.to(tl.int64) * W + w, w < W
    call = tl.load(calls + t, volatile=True) + 1
    part = tl.load(y + at, mask=there, other=0).to(tl.int64) & 0xFFFFFFFF
    part = part | (call.to(tl.int64) << 32)
    turn = (call & 1) * RANKS
    for peer in tl.static_range(RANKS):
        if peer != RANK:
            inbox = tl.multiple_of(tl.cast(inboxes[peer], tl.pointer_type(tl.int64)), 16)
            tl.store(inbox + (turn + RANK) * rows * W + at, part, mask=there)
    x_low, x_high = opened(tl.load(x + at, mask=there, other=0))
    scale_low = tl.load(scale + 2 * w, mask=there, other=0.0)
    scale_high = tl.load(scale + 2 * w + 1, mask=there, other=0.0)

    # every rank's part in the same place: the same sum, bit by bit, on each
    inbox = tl.multiple_of(tl.cast(inboxes[RANK], tl.pointer_type(tl.int64)), 16)
    inbox += turn * rows * W + rank[:, None] * (rows * W) + at[None, :]
    theirs = (rank != RANK)[:, None] & there[None, :]
    part = tl.broadcast_to(part[None, :], (RANKS, BLOCK))
    parts = tl.load(inbox, mask=theirs, other=part, volatile=True)
    while tl.max(tl.max(((parts >> 32).to(tl.int32) != call).to(tl.int32), 1), 0) != 0:
        parts = tl.load(inbox, mask=theirs, other=part, volatile=True)
    tl.debug_barrier()  # all warps have read it
    tl.store(calls + t, call)
    low, high = opened(parts.to(tl.int32))
    # which is what the next layers see
    low = (x_low + tl.sum(low, 0)).to(tl.bfloat16)
    high = (x_high + tl.sum(high, 0)).to(tl.bfloat16)
    h, row = tl.arange(0, 2 * BLOCK), t.to(tl.int64) * (2 * W)
    tl.store(total + row + h, tl.interleave(low, high), mask=h < 2 * W)
    low, high = low.to(tl.float32), high.to(tl.float32)
    inverse = 1 / tl.sqrt_rn(tl.sum(low * low + high * high, 0) / (2 * W) + eps)
    low, high = low * inverse * scale_low, high * inverse * scale_high
    both = tl.interleave(low.to(tl.bfloat16), high.to(tl.bfloat16))
    tl.store(norm + row + h, both, mask=h < 2 * W)


@triton.jit
def opened(word):
    """int32 words of two bfloat16 -> both as float32, the lower half first."""
    low, high = word << 16, word & -65536
    return low.to(tl.float32, bitcast=True), high.to(tl.float32, bitcast=True)


def sum_norm(x: Tensor, y: Tensor, scale: Tensor, eps: float, peers: Peers):
    """`add_norm` of x, which every rank has, and the sum of all ranks' y, which is never stored.
    bfloat16, at most as many rows as the peers have memory for. NVIDIA's GPUs: for AMD's, Triton
    3.7.1 may move a volatile load out of its loop."""
    x, y = x.contiguous(), y.contiguous()
    total, norm = torch.empty_like(x), torch.empty_like(x)
    T, W = len(x), x.shape[1] // 2
    rows, block = len(peers.calls), next_power(W)
    sum_norm_kernel[(T,)](
        x.view(torch.int32), y.view(torch.int32), scale, total, norm, peers.inboxes, peers.calls, W,
        eps, rows, peers.rank, len(peers.inboxes), block, num_warps=8, **overlapping(),
    )  # fmt: skip
    return total, norm


# --------------------------------------------------------------------------------------------------
# Dense layers


@triton.jit
def linear_kernel(
    x, weight, bias, out, N, K: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    HAS_BIAS: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program n: BN rows of the weights, all K of them at once, times one token."""
    r, k = tl.program_id(0) * BN + tl.arange(0, BN), tl.arange(0, BK)
    there = (r < N)[:, None] & (k < K)[None, :]
    # Weights are no kernel's result: they are on their way while the one before still makes x.
    w = tl.load(weight + r.to(tl.int64)[:, None] * K + k[None, :], mask=there, other=0.0)
    await_earlier(PDL)
    y = tl.sum(w.to(tl.float32) * tl.load(x + k, mask=k < K, other=0.0).to(tl.float32), 1)
    if HAS_BIAS:
        y += tl.load(bias + r, mask=r < N, other=0.0).to(tl.float32)
    tl.store(out + r, y.to(out.dtype.element_ty), mask=r < N)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x [T, K], weight [N, K], bias [N] -> [T, N] in x's dtype. One token: one launch, and bytes
    over bandwidth; the weights may be read before earlier launches are done. More: PyTorch's."""
    if len(x) != 1:
        return torch.nn.functional.linear(x, weight, bias)
    N, K = weight.shape
    out = x.new_empty(1, N)
    # A program asks for all of x: 8 rows halve that and hold as many bytes in flight a lane where
    # a warp has 64 of them. 4 are as fast as 8 on NVIDIA's.
    rows = 8 if on_hip() else 4
    linear_kernel[(triton.cdiv(N, rows),)](
        x.contiguous(), weight, bias, out, N, K, rows, next_power(K), bias is not None,
        num_warps=4, **overlapping(),
    )  # fmt: skip
    return out


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
    return frequency.to(device), config.rope_attention_factor


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
def turn(cos, sin, d, live, D: tl.constexpr):
    """What a head's elements d and those of their pairs are multiplied by. cos, sin: pointers to
    the first element, broadcast against d."""
    first = d < D // 2
    at = tl.where(first, d, d - D // 2)
    c, s = tl.load(cos + at, mask=live, other=0.0), tl.load(sin + at, mask=live, other=0.0)
    return c, tl.where(first, -s, s)


@triton.jit
def rotated(head, c, s, d, live, D: tl.constexpr):
    """A head's elements d after rotary embedding, in its dtype: the pair of element i is
    (i, i + D/2). head: pointer to the first element, c, s: `turn`, broadcast against d."""
    x = tl.load(head + d, mask=live, other=0.0)
    other = tl.load(head + tl.where(d < D // 2, d + D // 2, d - D // 2), mask=live, other=0.0)
    return (x.to(tl.float32) * c + other.to(tl.float32) * s).to(x.dtype)


@triton.jit
def cached(pool, table, position, g, C, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr):
    """Pointers to the keys of head g at these positions; the values are G * D further."""
    index = position % C
    page = tl.load(table + index // PAGE)
    slot = (page * PAGE + index % PAGE).to(tl.int64)
    return pool + slot * (2 * G * D) + g * D


@triton.jit
def load_cached(
    pool, table, key, end, g, d, C, G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr
):
    """Keys and values [L, COLUMNS] of head g at positions `key` [L] before `end`."""
    at = cached(pool, table, key, g, C, G, D, PAGE)[:, None] + d[None, :]
    there = (key[:, None] < end) & (d[None, :] < D)
    return tl.load(at, mask=there, other=0.0), tl.load(at + G * D, mask=there, other=0.0)


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
    qkv, sinks, pool, out, cos, sin, positions, table, parts, arrived, P, scale,
    WINDOW: tl.constexpr, PAGE: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr, HIP: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Program (g, s, z): part z of the keys that sequence s's one token sees, for the M query heads
    of key head g. Part 0 has the token's own key, which it caches, and the sinks. How many parts
    there are depends on the sequence's length alone. Padding, at the end, gets what the first
    sequence gets: a row that repeats its token then meets no other experts than that."""
    g, s, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position = tl.load(positions + s)
    if position < 0:
        return
    first = 0
    if WINDOW > 0:
        first = tl.maximum(position - WINDOW + 1, 0)
    used = tl.minimum(tl.maximum(tl.cdiv(position - first, SPLIT_KEYS), 1), SPLITS)
    if z >= used:
        return
    length = tl.cdiv(position - first, used)  # of a part
    begin = first + z * length
    end = tl.minimum(begin + length, position)
    m, d, key = tl.arange(0, ROWS), tl.arange(0, COLUMNS), begin + tl.arange(0, KEYS)
    live = (m[:, None] < M) & (d[None, :] < D)
    table += s * P
    C = P * PAGE
    # What is no result of this layer is on its way while the kernel before makes qkv.
    k, v = load_cached(pool, table, key, end, g, d, C, G, D, PAGE)
    slot = cached(pool, table, position, g, C, G, D, PAGE)
    column = d[None, :]
    inside = column < D
    cosine, sine = turn(cos + s * (D // 2), sin + s * (D // 2), column, inside, D)
    sink = tl.load(sinks + g * M + m, mask=m < M, other=0.0).to(tl.float32) * LOG2E
    await_earlier(PDL)

    qkv += s.to(tl.int64) * ((M * G + 2 * G) * D)
    q = rotated(qkv + (g * M + m[:, None]) * D, cosine, sine, column, live, D)
    top = tl.full([ROWS], -float("inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, COLUMNS], tl.float32)
    if z == 0:
        qkv += (G * M + g) * D
        own_k = rotated(qkv, cosine, sine, column, inside, D)  # [1, COLUMNS]
        own_v = tl.load(qkv + G * D + column, mask=inside, other=0.0)
        tl.store(slot + column, own_k, mask=inside)
        tl.store(slot + G * D + column, own_v, mask=inside)
        logit = tl.sum(q.to(tl.float32) * own_k.to(tl.float32), 1) * scale
        top = tl.maximum(logit, sink)
        own = tl.exp2(logit - top)
        total = own + tl.exp2(sink - top)
        acc = own[:, None] * own_v.to(tl.float32)

    # No part is empty but the only one of a sequence's first token.
    top, total, acc = attend(q, k, v, (key < end)[None, :], top, total, acc, scale)
    for start in tl.range(begin + KEYS, end, KEYS):
        key = start + tl.arange(0, KEYS)
        k, v = load_cached(pool, table, key, end, g, d, C, G, D, PAGE)
        top, total, acc = attend(q, k, v, (key < end)[None, :], top, total, acc, scale)

    if used > 1:
        # a part's rows: top and total beyond its columns, which stay multiples of 16 bytes
        row = (((s * G + g) * tl.num_programs(2)) * ROWS + m) * (COLUMNS + 4)
        mine = parts + row + z * ROWS * (COLUMNS + 4)
        tl.store(mine[:, None] + d[None, :], acc)
        tl.store(mine + COLUMNS, top)
        tl.store(mine + COLUMNS + 1, total)
        if arrive(arrived + s * G + g, m, HIP) < used - 1:
            return
        tl.store(arrived + s * G + g, 0)
        # All parts at once: in a loop the latencies of its loads would add up.
        part = tl.arange(0, SPLITS)[:, None]
        theirs = parts + row[None, :] + part * (ROWS * (COLUMNS + 4))  # [SPLITS, ROWS]
        there = (part < used) & (m[None, :] < M)
        tops = tl.load(theirs + COLUMNS, mask=there, other=-float("inf"))
        totals = tl.load(theirs + COLUMNS + 1, mask=there, other=0.0)
        theirs = tl.load(theirs[:, :, None] + d[None, None, :], mask=there[:, :, None], other=0.0)
        share = tl.exp2(tops - tl.maximum(tl.max(tops, 0), -1e30)[None, :])
        total = tl.sum(share * totals, 0)
        acc = tl.sum(share[:, :, None] * theirs, 0)
    into = out + (s * G * M + g * M + m[:, None]) * D + d[None, :]
    mean = (acc / total[:, None]).to(out.dtype.element_ty)
    tl.store(into, mean, mask=live)
    if s == 0:
        row = tl.num_programs(1) - 1
        while tl.load(positions + row) < 0:
            tl.store(into + row * (G * M * D), mean, mask=live)
            row -= 1


@triton.jit(do_not_specialize=["Q", "P"])
def prefill_kernel(
    qkv, keys, sinks, pool, out, cos, sin, positions, table, Q, P, scale, WINDOW: tl.constexpr,
    PAGE: tl.constexpr, M: tl.constexpr, G: tl.constexpr, D: tl.constexpr, HEADS: tl.constexpr,
    QUERIES: tl.constexpr, COLUMNS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Program (tile, g, s): QUERIES tokens of sequence s and the M query heads of key head g, over
    the cached keys before the chunk and then the chunk's own, rotated, in `keys` [T, G, D]."""
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
    angles = token[:, None] * (D // 2)
    cosine, sine = turn(cos + angles, sin + angles, d[None, :], live, D)
    head = qkv + token[:, None] * WIDTH + (g * M + m[:, None]) * D
    q = rotated(head, cosine, sine, d[None, :], live, D)
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
        k, v = load_cached(pool, table, key, begin, g, d, P * PAGE, G, D, PAGE)
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
    c, s = turn(cos + token * (D // 2), sin + token * (D // 2), d, d < D, D)
    k = rotated(head, c, s, d, d < D, D)
    tl.store(keys + (token * G + g) * D + d, k, mask=d < D)


@triton.jit(do_not_specialize=["Q", "P"])
def cache_kernel(
    qkv, keys, pool, positions, newest, table, Q, P, PAGE: tl.constexpr, M: tl.constexpr,
    G: tl.constexpr, D: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Program (token, g): of more new tokens than the table has room for the last stay."""
    token, g, d = tl.program_id(0), tl.program_id(1), tl.arange(0, COLUMNS)
    s, C = token // Q, P * PAGE
    position = tl.load(positions + token)
    if (position < 0) | (position <= tl.load(newest + s) - C):
        return
    token = token.to(tl.int64)
    at = cached(pool, table + s * P, position, g, C, G, D, PAGE) + d
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
    scale = D**-0.5 * LOG2E.value
    out = qkv.new_empty(T, N * D)
    if not T:
        return out
    step = (plan.cos, plan.sin, plan.positions)
    if Q == 1:
        room = P * plan.page_size
        most = min(room, window) if sliding else room  # keys
        splits = min(triton.cdiv(most, SPLIT_KEYS.value), SPLITS.value)
        rows, tile = next_power(M, 16), SPLIT_KEYS.value
        if on_hip():  # whose scalar registers hold no more masks
            tile //= 2
        parts = qkv.new_empty(S * G * splits, rows, columns + 4, dtype=torch.float32)
        decode_kernel[(G, S, splits)](
            qkv, sinks, pool, out, *step, table, parts, plan.arrived, P, scale, window,
            plan.page_size, M, G, D, rows, columns, tile, on_hip(), num_warps=4, **overlapping(),
        )  # fmt: skip
        return out
    keys = qkv.new_empty(T, G, D)
    rotate_keys_kernel[(T, G)](qkv, plan.cos, plan.sin, keys, M, G, D, columns, num_warps=1)
    heads = next_power(M)
    queries = max((128 if qkv.dtype == torch.bfloat16 else 32) // heads, 1)
    prefill_kernel[(triton.cdiv(Q, queries), G, S)](
        qkv, keys, sinks, pool, out, *step, table, Q, P, scale, window, plan.page_size, M, G, D,
        heads, queries, columns, 64 if qkv.dtype == torch.bfloat16 else 32, num_warps=8,
    )  # fmt: skip
    cache_kernel[(T, G)](
        qkv, keys, pool, plan.positions, plan.newest, table, Q, P, plan.page_size, M, G, D, columns,
        num_warps=1,
    )  # fmt: skip
    return out


# --------------------------------------------------------------------------------------------------
# Experts' weights


@dataclass
class Weight:
    """One projection of all experts, its rows padded to a multiple of 16. Of gate_up each 16 rows
    are 8 gates and then their 8 ups, so that a thread of the GEMM has both.

    mxfp4, blocks of 16 rows x 64 inputs: data int32 [E, K/64, N/16, 8, 4, 4]; word (r, c, i) of a
    block has the codes of row r + 8 (i // 2) and of the inputs 32 (i % 2) + 16 b + 8 a + 2 c + h,
    which are what lane 4 r + c holds of an NVIDIA matrix instruction's left operand: a lane loads
    16 bytes, and a warp 512 in a row. `spread` says where a word has the code of (a, b, h). scale
    int32 [E, K/64, N/16, 8]: byte i of word r is for word (r, c, i).

    bf16: data [E, N, K], scale None."""

    data: Tensor
    scale: Tensor | None
    bias: Tensor  # float32 [E, padded N]
    input_scale: float  # what the quantised inputs are multiples of
    wide: bool  # some scale byte is above 128: two multiplications, see `dequantised`
    N: int  # rows, without padding
    K: int


@dataclass
class Packed:
    """A layer's experts, made for one kind of activations. `arrived` counts programs and is zero
    between launches."""

    gate_up: Weight
    down: Weight
    activations: str
    arrived: Tensor  # int32


def prepare(experts, activations: str) -> Packed:
    """Packs a layer's experts (the fields of weights.Experts) on their device, 16 experts at a
    time; weights without scales are rounded to bfloat16. The result is as large as the input, which
    is left as it was. Raises ValueError for what the kernels do not multiply."""
    if activations not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"activations={activations!r}, expected one of {expected}")
    scales = 1.0, 1.0
    if activations == "fp8":
        scales = experts.gate_up_input_scale, experts.down_input_scale
        if None in scales:
            raise ValueError(
                "activations='fp8' need the static input scales of a Quark checkpoint; use mxfp8"
            )
    for weight, scale in (
        (experts.gate_up_weight, experts.gate_up_scale),
        (experts.down_weight, experts.down_scale),
    ):
        K = weight.shape[2] * (1 if scale is None else 2)
        if weight.is_floating_point() != (scale is None):
            raise ValueError(
                f"expert weights are {weight.dtype}, expected a float, or uint8 with scales"
            )
        if K % GROUP.value and (scale is not None or activations.startswith("mx")):
            raise ValueError(
                f"an expert's {K} inputs are no multiple of {GROUP.value}, which share a scale"
            )
    gate_up = pack(
        experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias, scales[0], 2
    )
    down = pack(experts.down_weight, experts.down_scale, experts.down_bias, scales[1], 1)
    return Packed(gate_up, down, activations, down.bias.new_zeros(1 << 12, dtype=torch.int32))


def pack(weight: Tensor, scale: Tensor | None, bias: Tensor, input_scale: float, pair: int):
    """weight [E, N, ...] and its scale and bias; pair 2: rows alternate gate and up -> Weight."""
    E, N, _ = weight.shape
    K = weight.shape[2] * (1 if scale is None else 2)

    def rows(x):  # [e, N, ...] -> [e, padded N, ...], gates and ups apart in each 16
        padded = x.new_zeros(len(x), -(-N // 16) * 16, *x.shape[2:])
        padded[:, :N] = x
        order = torch.arange(padded.shape[1], device=x.device).view(-1, 16 // pair, pair)
        return padded.index_select(1, order.mT.flatten())

    bias = rows(bias.float())
    if scale is None:
        return Weight(rows(weight.bfloat16()), None, bias, input_scale, False, N, K)
    blocks = -(-K // 64), bias.shape[1] // 16  # [K/64, N/16]
    data = torch.empty(E, *blocks, 8, 4, 4, dtype=torch.int32, device=weight.device)
    scales = torch.empty(E, *blocks, 8, dtype=torch.int32, device=weight.device)
    for e in range(0, E, 16):
        part = rows(weight[e : e + 16])  # [e, N, K/2]
        part = torch.nn.functional.pad(part, (0, blocks[0] * 32 - K // 2))
        # [e, N/16, i // 2, r, K/64, i % 2, b, a, c], a byte is h = 0 and 1
        part = part.view(-1, blocks[1], 2, 8, blocks[0], 2, 2, 2, 4)
        words = sum(spread(part[..., b, a, :], a, b) for a in (0, 1) for b in (0, 1))
        words = words.permute(0, 4, 1, 3, 6, 2, 5)  # [e, K/64, N/16, r, c, i // 2, i % 2]
        data[e : e + 16] = words.reshape(-1, *data.shape[1:])
        part = rows(scale[e : e + 16])  # [e, N, K/32]
        part = torch.nn.functional.pad(part, (0, blocks[0] * 2 - K // 32))
        part = part.view(-1, blocks[1], 2, 8, blocks[0], 2).permute(0, 4, 1, 3, 2, 5)
        scales[e : e + 16] = part.reshape(-1, *blocks, 8, 4).view(torch.int32)[..., 0]
    return Weight(data, scales, bias, input_scale, bool((scale > 128).any()), N, K)


def spread(byte: Tensor, a: int, b: int) -> Tensor:
    """Both codes (sign, two bits of exponent, mantissa) of a byte to where a word has them: the
    first in its lower 16 bits, the second in its upper ones. Sign and magnitude of (a, b) = (0, 0)
    are at bits 15 and 8..6, where bfloat16 has them, those of (1, 0) and (0, 1) 3 and 6 bits lower,
    and those of (1, 1) in the bits left: 14, 13, 11, 10."""
    v = byte.int()
    v = (v & 15) | (v >> 4 << 16)
    sign, magnitude = v & 0x80008, v & 0x70007
    if (a, b) == (1, 1):
        return (sign << 11) | ((v & 0x40004) << 11) | ((v & 0x30003) << 10)
    lower = 3 * a + 6 * b
    return (sign << (12 - lower)) | (magnitude << (6 - lower))


@triton.jit
def times(pair, factor, CUDA: tl.constexpr):
    """Two bfloat16 in an int32, each times that of `factor` -> both, bfloat16."""
    pair, factor = tl.broadcast(pair, factor)
    if CUDA:  # one instruction for both; adds -0, which changes nothing, as sm_80 multiplies so
        product = tl.inline_asm_elementwise(
            "{ .reg .b32 z; mov.b32 z, 0x80008000; fma.rn.bf16x2 $0, $1, $2, z; }",
            "=r,r,r", [pair, factor], dtype=tl.int32, is_pure=True, pack=1,
        )  # fmt: skip
        return halves(product)
    first, second = halves(pair)
    factor, _ = halves(factor)
    return first * factor, second * factor


@triton.jit
def halves(pair):
    """The bfloat16 in the lower and in the upper half of an int32."""
    first = (pair & 0xFFFF).to(tl.int16).to(tl.bfloat16, bitcast=True)
    return first, (pair >> 16).to(tl.int16).to(tl.bfloat16, bitcast=True)


@triton.jit
def dequantised(
    words, scales, KB: tl.constexpr, NB: tl.constexpr, WIDE: tl.constexpr, CUDA: tl.constexpr
):
    """words int32 [KB, NB * 32, 4], scales int32 [KB, NB * 32] -> bfloat16 [NB * 16, KB * 64].

    A code's sign and magnitude where bfloat16 has its sign and the low end of its exponent are the
    code's value times 2^-126, also where it is subnormal. One multiplication by 2^126 and the
    scale, 2^(byte - 127), puts that right. Their product has a bfloat16 up to byte 128. `WIDE`
    multiplies by each, and byte 255 is NaN."""
    SIGN_AND_MAGNITUDE: tl.constexpr = 0x81C081C0 - (1 << 32)
    i = tl.arange(0, 4) * 8
    byte = (scales[:, :, None] >> i[None, None, :]) & 255
    factor = byte + 126
    if WIDE:
        factor = tl.full(byte.shape, 126 + 127, tl.int32)
        byte = tl.where(byte == 255, 0x7FC0, tl.where(byte == 0, 0x40, byte << 7)) * 0x10001
    factor = factor * 0x800080
    code00 = words & SIGN_AND_MAGNITUDE
    code10 = (words << 3) & SIGN_AND_MAGNITUDE
    code01 = (words << 6) & SIGN_AND_MAGNITUDE
    code11 = (words << 1) & (0x80008000 - (1 << 32))
    code11 |= ((words >> 5) & 0x01000100) | ((words >> 4) & 0x00C000C0)
    a00 = value(code00, factor, byte, WIDE, CUDA)  # [KB, NB * 32, i, h]
    a10 = value(code10, factor, byte, WIDE, CUDA)
    a01 = value(code01, factor, byte, WIDE, CUDA)
    a11 = value(code11, factor, byte, WIDE, CUDA)
    w = tl.join(tl.join(a00, a01), tl.join(a10, a11))  # [KB, NB * 32, i, h, b, a]
    w = w.reshape(KB, NB, 8, 4, 2, 2, 2, 2, 2)  # block of K, of N, r, c, i // 2, i % 2, h, b, a
    return w.permute(1, 4, 2, 0, 5, 7, 8, 3, 6).reshape(NB * 16, KB * 64)


@triton.jit
def value(code, factor, byte, WIDE: tl.constexpr, CUDA: tl.constexpr):
    """What the two codes of each int32 stand for, as bfloat16 -> [..., 2]."""
    first, second = times(code, factor, CUDA)
    if WIDE:
        scale, _ = halves(byte)
        scale, _ = tl.broadcast(scale, first)
        first, second = first * scale, second * scale
    return tl.join(first, second)


# --------------------------------------------------------------------------------------------------
# Mixture of experts


@triton.jit
def quantised(x, scale, ACTIVATIONS: tl.constexpr):
    """float32 x [groups, 32, columns] rounded to mxfp8 (e4m3) or mxfp4 (e2m1) along its groups, or
    to e4m3 in units of scale: float32 again, and exact in bfloat16, but for multiples of the units
    as they are. Elements round to nearest even and saturate."""
    MX: tl.constexpr = ACTIVATIONS != "fp8"
    FP4: tl.constexpr = ACTIVATIONS == "mxfp4"
    LARGEST: tl.constexpr = 6.0 if FP4 else 448.0
    LARGEST_EXPONENT: tl.constexpr = 2 if FP4 else 8
    MANTISSA: tl.constexpr = 1 if FP4 else 3
    LEAST: tl.constexpr = 127 if FP4 else 121  # exponent field of the smallest normal value
    if MX:  # float32's own exponent field is the floor of the logarithm
        bits = tl.max(x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)[:, None, :]
        exponent = tl.maximum((bits >> 23) - 127 - LARGEST_EXPONENT, -127)
        x = tl.where(bits > 0x7F800000, float("nan"), x)  # a group with NaN has the scale NaN
        x = x * ((127 - exponent) << 23).to(tl.float32, bitcast=True)
    else:
        x = tl.div_rn(x, tl.zeros_like(x) + scale)
    NAN: tl.constexpr = tl.PropagateNan.ALL
    x = tl.minimum(tl.maximum(x, -LARGEST, propagate_nan=NAN), LARGEST, propagate_nan=NAN)
    # adding and subtracting 1.5 * 2^23 steps rounds to a step
    field = tl.maximum((x.to(tl.int32, bitcast=True) >> 23) & 255, LEAST)
    magic = (((field + 23 - MANTISSA) << 23) | 0x400000).to(tl.float32, bitcast=True)
    x = (x + magic) - magic
    if MX:
        power = tl.where(exponent == -127, 0x400000, (exponent + 127) << 23)
        x = x * power.to(tl.float32, bitcast=True)
    return x


@triton.jit(do_not_specialize=["T"])
def route_kernel(
    x, router_weight, router_bias, logits, chosen, gates, experts, rows, count, seen, arrived, T,
    scale, H: tl.constexpr, E: tl.constexpr, TOP_K: tl.constexpr, EXPERTS: tl.constexpr,
    PART: tl.constexpr, TOKENS: tl.constexpr, STEP: tl.constexpr, ACTIVATIONS: tl.constexpr,
    DECODE: tl.constexpr, HIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (p, z, b): logits of EXPERTS experts for TOKENS tokens over part z of H, PART long;
    p = 0 rounds this part of x to `seen`, as the first GEMM sees it. The last program of a block of
    tokens to arrive adds the parts up and selects each token's experts. In decode it then lists the
    active experts, and for each of them a row of pairs, by token, -1 for those not routed to it."""
    await_earlier(PDL)
    PADDED_E: tl.constexpr = triton.next_power_of_2(E)
    p, z, block = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    token = block * TOKENS + tl.arange(0, TOKENS)
    e = p * EXPERTS + tl.arange(0, EXPERTS)
    acc = tl.zeros([EXPERTS, TOKENS], tl.float32)
    for start in tl.range(z * PART, min(z * PART + PART, H), STEP):
        k = start + tl.arange(0, STEP)
        w = tl.load(
            router_weight + e[:, None] * H + k[None, :],
            mask=(e < E)[:, None] & (k < H)[None, :],
            other=0.0,
        )
        there = (token < T)[:, None] & (k < H)[None, :]
        at = token.to(tl.int64)[:, None] * H + k[None, :]
        tile = tl.load(x + at, mask=there, other=0.0)
        acc = tl.dot(w, tile.T, acc, input_precision="ieee")
        if ACTIVATIONS != "bf16":
            if p == 0:
                groups = tile.to(tl.float32).reshape(TOKENS * STEP // GROUP, GROUP, 1)
                rounded = quantised(groups, scale, ACTIVATIONS).reshape(TOKENS, STEP)
                tl.store(seen + at, rounded.to(seen.dtype.element_ty), mask=there)
    at = (z * T + token[None, :]) * E + e[:, None]
    tl.store(logits + at, acc, mask=(e < E)[:, None] & (token < T)[None, :])

    programs = tl.num_programs(0) * tl.num_programs(1)
    if arrive(arrived + block, tl.arange(0, TOKENS), HIP) < programs - 1:
        return
    tl.store(arrived + block, 0)
    e = tl.arange(0, PADDED_E)
    there = (token < T)[:, None] & (e < E)[None, :]
    total = tl.zeros([TOKENS, PADDED_E], tl.float32)
    for part in tl.static_range((H + PART - 1) // PART):
        terms = logits + (part * T + token[:, None]) * E + e[None, :]
        total += tl.load(terms, mask=there, other=0.0)
    total += tl.load(router_bias + e, mask=e < E, other=0.0).to(tl.float32)[None, :]
    # integers in the order of the logits, of which none is -0, as sums begin at 0; NaN above all
    bits = total.to(tl.int32, bitcast=True)
    order = tl.where(total != total, 0x7FFFFFFF, bits ^ ((bits >> 31) & 0x7FFFFFFF))
    order = tl.where(e[None, :] < E, order, -0x80000000)
    slots = tl.arange(0, triton.next_power_of_2(TOP_K))
    ids = tl.zeros([TOKENS, slots.shape[0]], tl.int32)
    gate = tl.full([TOKENS, slots.shape[0]], -float("inf"), tl.float32)
    slot_of = tl.full([TOKENS, PADDED_E], -1, tl.int32)
    for slot in tl.static_range(TOP_K):
        largest = tl.max(order, 1)
        first = tl.min(tl.where(order == largest[:, None], e[None, :], PADDED_E), 1)
        hit = e[None, :] == first[:, None]
        logit = tl.sum(tl.where(hit, total, 0.0), 1)
        ids = tl.where(slots[None, :] == slot, first[:, None], ids)
        gate = tl.where(slots[None, :] == slot, logit[:, None], gate)
        slot_of = tl.where(hit & there, slot, slot_of)
        order = tl.where(hit, -0x80000000, order)
        if slot == 0:
            top = logit
    gate = tl.exp(gate - top[:, None])
    gate = tl.where((slots < TOP_K)[None, :], gate, 0.0)
    gate = gate / tl.sum(gate, 1)[:, None]
    at = token[:, None] * TOP_K + slots[None, :]
    there = (token < T)[:, None] & (slots < TOP_K)[None, :]
    tl.store(chosen + at, ids, mask=there)
    tl.store(gates + at, gate, mask=there)
    if DECODE:
        active = (tl.max(slot_of, 0) >= 0).to(tl.int32)  # [PADDED_E]
        place = tl.cumsum(active, 0) - active
        tl.store(experts + place, e, mask=active > 0)
        tl.store(count, tl.sum(active, 0))
        pair = tl.where(slot_of >= 0, token[:, None] * TOP_K + slot_of, -1)
        at = place[None, :] * TOKENS + token[:, None]
        tl.store(rows + at, pair, mask=(active > 0)[None, :] & (token[:, None] < TOKENS))


@triton.jit(do_not_specialize=["R"])
def sort_kernel(
    chosen, experts, rows, count, R, E: tl.constexpr, BM: tl.constexpr, STEP: tl.constexpr
):
    """Program e lists its expert's pairs, of all R, in tiles of BM: rows [tiles, BM], filled up
    with -1, and experts [tiles]. count: of all tiles."""
    e, step = tl.program_id(0), tl.arange(0, STEP)
    bins = tl.arange(0, triton.next_power_of_2(E + 1))
    counts = tl.zeros_like(bins)
    for start in range(0, R, STEP):
        pair = start + step
        expert = tl.load(chosen + pair, mask=pair < R, other=E)
        counts += tl.histogram(expert, triton.next_power_of_2(E + 1))
    tiles = tl.where(bins < E, tl.cdiv(counts, BM), 0)
    before = tl.sum(tl.where(bins < e, tiles, 0), 0)
    mine = tl.sum(tl.where(bins == e, tiles, 0), 0)
    tl.store(count, tl.sum(tiles, 0))  # every program stores the same
    rows += before.to(tl.int64) * BM
    place = 0
    for start in range(0, R, STEP):
        pair = start + step
        hit = (tl.load(chosen + pair, mask=pair < R, other=E) == e).to(tl.int32)
        tl.store(rows + place + tl.cumsum(hit, 0) - hit, pair, mask=hit > 0)
        place += tl.sum(hit, 0)
    rest = place + tl.arange(0, BM)
    tl.store(rows + rest, tl.full([BM], -1, tl.int32), mask=rest < mine * BM)
    for start in range(0, mine, STEP):
        tl.store(experts + before + start + step, tl.zeros_like(step) + e, mask=start + step < mine)


@triton.jit
def mx_load(
    inputs, live, data, scales, n, b, end, K: tl.constexpr, BLOCKS: tl.constexpr, KB: tl.constexpr,
    NB: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Blocks b to b + KB of K: words and scales of NB blocks of rows from n * NB on, of BLOCKS in
    all, and the inputs of the pairs. MASKED: none of the blocks from `end` on."""
    block = b + tl.arange(0, KB)[:, None]
    word = n * (NB * 128) + tl.arange(0, NB * 128)[None, :]
    lane = n * (NB * 32) + tl.arange(0, NB * 32)[None, :]
    words, lanes = data + block * (BLOCKS * 128) + word, scales + block * (BLOCKS * 8) + lane // 4
    if MASKED or BLOCKS % NB:
        words = tl.load(words, mask=(word < BLOCKS * 128) & (block < end), other=0)
        lanes = tl.load(lanes, mask=(lane < BLOCKS * 32) & (block < end), other=0)
    else:
        words, lanes = tl.load(words), tl.load(lanes)
    k = b * 64 + tl.arange(0, KB * 64)[None, :]
    there = live[:, None]
    if MASKED or K % 64:
        there &= k < min(end * 64, K)
    return words, lanes, tl.load(inputs[:, None] + k, mask=there, other=0.0)


@triton.jit
def mx_dot(
    acc, words, lanes, tokens, KB: tl.constexpr, NB: tl.constexpr, WIDE: tl.constexpr,
    HIP: tl.constexpr,
):  # fmt: skip
    w = dequantised(words.reshape(KB, NB * 32, 4), lanes, KB, NB, WIDE, not HIP)
    acc = tl.dot(w.to(tokens.dtype), tokens.T, acc, input_precision="ieee")
    if not HIP:
        # Reading the sum here makes Triton await the matrix instructions. Before 3.7 it let those
        # of Hopper go on while the next step wrote to the registers of their left operand, and
        # rarely a tile was wrong (https://github.com/triton-lang/triton/issues/9433).
        acc = tl.inline_asm_elementwise(
            "mov.f32 $0, $1;", "=f,f", [acc], dtype=tl.float32, is_pure=True, pack=1
        )
    return acc


@triton.jit(do_not_specialize=["T"])
def expert_kernel(
    x, data, scales, bias, gates, experts, rows, count, h, out, arrived, T, input_scale, limit,
    down_scale, N: tl.constexpr, K: tl.constexpr, TOP_K: tl.constexpr, ACTIVATIONS: tl.constexpr,
    DISPATCH: tl.constexpr, DECODE: tl.constexpr, MX: tl.constexpr, WIDE: tl.constexpr,
    BN: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, SPLIT: tl.constexpr, STAGES: tl.constexpr,
    HIP: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Program (n, tile, z): BN rows of the tile's expert times the inputs of its BM pairs, over
    part z of SPLIT of K; weights are the left operand, pairs the columns. DISPATCH: the first GEMM,
    bias and SwiGLU -> h [pairs, N/2], as the second GEMM sees it. Else the second GEMM and bias,
    times the gate weight -> h float32 [SPLIT, pairs, N]; in decode, the last program for these rows
    to arrive adds up the parts and the TOP_K pairs of each token -> out [T, N]."""
    await_earlier(PDL)
    NB: tl.constexpr = BN // 16
    BLOCKS: tl.constexpr = (N + 15) // 16  # of 16 rows
    n, tile, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    column = tl.arange(0, BM)
    # all three at once: beyond the last tile there is memory, but nothing in it
    tiles = tl.load(count)
    expert = tl.load(experts + tile).to(tl.int64)
    pair = tl.load(rows + tile.to(tl.int64) * BM + column)
    if tile >= tiles:
        return
    live = pair >= 0
    row = tl.maximum(pair, 0).to(tl.int64)
    inputs = x + (row // TOP_K if DISPATCH else row) * K  # [BM]
    acc = tl.zeros([BN, BM], tl.float32)
    if MX:
        KB: tl.constexpr = BK // 64
        K_BLOCKS: tl.constexpr = (K + 63) // 64
        data += expert * (K_BLOCKS * BLOCKS * 128)
        scales += expert * (K_BLOCKS * BLOCKS * 8)
        # Whole steps, of which program z has its share, and the rest, which the last one adds: its
        # loads are on their way meanwhile.
        STEPS: tl.constexpr = K // BK
        SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT
        REST: tl.constexpr = K_BLOCKS - STEPS * KB
        if REST > 0:
            RB: tl.constexpr = triton.next_power_of_2(REST)
            rest_end = tl.where(z == SPLIT - 1, K_BLOCKS, 0)
            words, lanes, tokens = mx_load(
                inputs, live, data, scales, n, STEPS * KB, rest_end, K, BLOCKS, RB, NB, True
            )
        end = min((z + 1) * SHARE, STEPS) * KB
        for b in tl.range(z * SHARE * KB, end, KB, num_stages=STAGES):
            w, s, x_tile = mx_load(inputs, live, data, scales, n, b, end, K, BLOCKS, KB, NB, False)
            acc = mx_dot(acc, w, s, x_tile, KB, NB, WIDE, HIP)
        if REST > 0:
            acc = mx_dot(acc, words, lanes, tokens, RB, NB, WIDE, HIP)
    else:
        r = n * BN + tl.arange(0, BN)
        k = tl.arange(0, BK)
        data += expert * (BLOCKS * 16 * K)
        STEPS: tl.constexpr = (K + BK - 1) // BK
        SHARE: tl.constexpr = (STEPS + SPLIT - 1) // SPLIT * BK
        for start in tl.range(z * SHARE, min(z * SHARE + SHARE, K), BK, num_stages=STAGES):
            at = start + k
            there = (r < BLOCKS * 16)[:, None] & (at < K)[None, :]
            w = tl.load(data + r[:, None] * K + at[None, :], mask=there, other=0.0)
            tokens = tl.load(
                inputs[:, None] + at[None, :], mask=live[:, None] & (at < K)[None, :], other=0.0
            )
            acc = tl.dot(w.to(tokens.dtype), tokens.T, acc, input_precision="ieee")

    r = n * BN + tl.arange(0, BN)
    first = (r < BLOCKS * 16) & (z == 0)
    bs = tl.load(bias + expert * (BLOCKS * 16) + r, mask=first, other=0.0)
    acc = acc * input_scale + bs[:, None]
    if DISPATCH:
        NAN: tl.constexpr = tl.PropagateNan.ALL
        gate, up = tl.split(acc.reshape(NB, 2, 8, BM).permute(0, 2, 3, 1))  # [NB, 8, BM]
        gate = tl.minimum(gate, limit, propagate_nan=NAN)
        up = tl.minimum(tl.maximum(up, -limit, propagate_nan=NAN), limit, propagate_nan=NAN)
        y = gate / (1 + tl.exp(-1.702 * gate)) * (up + 1)
        if ACTIVATIONS != "bf16":
            y = quantised(y.reshape(BN // 64, 32, BM), down_scale, ACTIVATIONS)
        r = n * (BN // 2) + tl.arange(0, BN // 2)
        at = row[None, :] * (N // 2) + r[:, None]
        y = y.reshape(BN // 2, BM).to(h.dtype.element_ty)
        tl.store(h + at, y, mask=live[None, :] & (r < N // 2)[:, None])
    else:
        gate = tl.load(gates + row)
        at = (z * T * TOP_K + row)[None, :] * N + r[:, None]
        tl.store(h + at, acc * gate[None, :], mask=live[None, :] & (r < N)[:, None])
        if DECODE:
            if arrive(arrived + n, column, HIP) == tiles * SPLIT - 1:
                tl.store(arrived + n, 0)
                there = (column < T)[:, None] & (r < N)[None, :]
                total = summed(h, column, r, there, T, N, TOP_K, SPLIT)
                at_out = column[:, None] * N + r[None, :]
                tl.store(out + at_out, total.to(out.dtype.element_ty), mask=there)


@triton.jit
def summed(h, token, r, there, T, N: tl.constexpr, TOP_K: tl.constexpr, SPLIT: tl.constexpr):
    """Sum over the parts and pairs of each token, in order: h float32 [SPLIT, T * TOP_K, N] ->
    [tokens, rows]."""
    at = token.to(tl.int64)[:, None] * (TOP_K * N) + r[None, :]
    total = tl.zeros(there.shape, tl.float32)
    for z in tl.static_range(SPLIT):
        for slot in tl.static_range(TOP_K):
            total += tl.load(h + at + (z * T * TOP_K + slot) * N, mask=there, other=0.0)
    return total


@triton.jit(do_not_specialize=["T"])
def sum_kernel(h, out, T, N: tl.constexpr, TOP_K: tl.constexpr, BN: tl.constexpr):
    """Program (token, n): the sum over a token's pairs, above decode."""
    token = tl.program_id(0) + tl.arange(0, 1)
    r = tl.program_id(1) * BN + tl.arange(0, BN)
    there = (r < N)[None, :]
    total = summed(h, token, r, there, T, N, TOP_K, 1)
    at = token.to(tl.int64)[:, None] * N + r[None, :]
    tl.store(out + at, total.to(out.dtype.element_ty), mask=there)


class Tile(NamedTuple):
    """How `expert_kernel` cuts a GEMM: BN rows of weights, BM pairs, steps of BK inputs; K split
    over so many programs (the second GEMM, in decode)."""

    BN: int
    BM: int
    BK: int
    warps: int
    stages: int
    split: int = 1


def tiles_for(T: int, rows: float, mxfp4: bool, dtype: torch.dtype, hip: bool) -> tuple[Tile, Tile]:
    """The tiles of the two GEMMs, of equal BM, for T tokens of a dtype and `rows` pairs an expert
    in the mean. mxfp4: the weights are, else bfloat16."""
    if dtype == torch.float32:  # multiplied without the matrix units: the sums of IEEE's float32
        first = second = Tile(64, 16, 64, 4, 1)
    elif T <= DECODE_TOKENS:
        first, second = Tile(64, 16, 256, 4, 4), Tile(64, 16, 256, 4, 4, 2)
    elif rows <= 8:
        first = second = Tile(128, 16, 128, 8, 4)
    elif rows <= 24:
        first = second = Tile(128, 32, 128, 8, 4)
    elif rows <= 48:
        first = second = Tile(128, 64, 64, 8, 4)
    else:
        first = second = Tile(128, 128, 64, 8, 4)
    if not mxfp4 or hip:  # to fit into the local memory of all; to registers, where HIP prefetches
        BK, stages = (128, 2) if mxfp4 else (64, 2 if hip else 3)
        first, second = (
            t._replace(BK=min(t.BK, BK), stages=min(t.stages, stages)) for t in (first, second)
        )
    return first, second


def moe(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    packed: Packed,
    top_k: int,
    activations: str = "bf16",
    swiglu_limit: float = 7.0,
) -> Tensor:
    """x [T, H]; router_weight [E, H], router_bias [E] -> [T, H] in x's dtype, bfloat16 or float32.

    Three launches up to DECODE_TOKENS, five above. A token's result does not depend on the other
    tokens up to DECODE_TOKENS, nor above where `tiles_for` chooses the same tiles. ValueError for
    experts that were prepared for other activations, for x of another dtype and for too many
    tokens."""
    if packed.activations != activations:
        raise ValueError(
            f"experts were prepared for {packed.activations!r} activations, not for {activations!r}"
        )
    if x.dtype not in (torch.bfloat16, torch.float32):
        raise ValueError(f"x is {x.dtype}, the kernels take bfloat16 and float32")
    (T, H), E, x = x.shape, len(router_weight), x.contiguous()
    if T > 32 * len(packed.arrived):
        raise ValueError(f"{T} tokens at once, the kernels take {32 * len(packed.arrived)}")
    out = torch.empty_like(x)
    if not T:
        return out
    R, inner, decode, hip = T * top_k, packed.down.K, T <= DECODE_TOKENS, on_hip()
    cuts = tiles_for(T, R / E, packed.down.scale is not None, x.dtype, hip)
    BM, split = cuts[0].BM, cuts[1].split if decode else 1
    tiles = min(R, E) if decode else R // BM + min(R, E)  # at most

    def new(*shape, dtype=torch.int32):
        return x.new_empty(shape, dtype=dtype)

    chosen, gates = new(R), new(R, dtype=torch.float32)
    experts, rows, count = new(tiles), new(tiles, BM), new(1)
    seen = x if activations == "bf16" else torch.empty_like(x)
    tokens, size, part = (BM, 16, 384) if decode else (32, 32, H)
    parts = triton.cdiv(H, part)
    logits = new(parts, T, E, dtype=torch.float32)
    route_kernel[(triton.cdiv(E, size), parts, triton.cdiv(T, tokens))](
        x, router_weight, router_bias, logits, chosen, gates, experts, rows, count, seen,
        packed.arrived, T, packed.gate_up.input_scale, H, E, top_k, size, part, tokens, 128,
        activations, decode, hip, num_warps=4, num_stages=2 if hip else 3, **overlapping(),
    )  # fmt: skip
    if not decode:
        step, warps = (1024, 4) if R <= 1024 else (4096, 8)
        sort_kernel[(E,)](chosen, experts, rows, count, R, E, BM, step, num_warps=warps)

    h, y = new(R, inner, dtype=x.dtype), new(split, R, H, dtype=torch.float32)
    for weight, source, target, tile in (
        (packed.gate_up, seen, h, cuts[0]._replace(split=1)),
        (packed.down, h, y, cuts[1]._replace(split=split)),
    ):
        expert_kernel[(triton.cdiv(weight.bias.shape[1], tile.BN), tiles, tile.split)](
            source, weight.data, weight.scale, weight.bias, gates, experts, rows, count, target,
            out, packed.arrived, T, weight.input_scale, swiglu_limit, packed.down.input_scale,
            weight.N, weight.K, top_k, activations, weight is packed.gate_up, decode,
            weight.scale is not None, weight.wide, *tile[:3], tile.split, tile.stages, hip,
            num_warps=tile.warps, **overlapping(),
        )  # fmt: skip
    if not decode:
        sum_kernel[(T, triton.cdiv(H, 1024))](y, out, T, H, top_k, 1024, num_warps=4)
    return out
