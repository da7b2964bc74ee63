"""GPT-OSS inference: OpenAI's open-weight mixture-of-experts models with a paged KV cache.

    python gptoss.py --prompt "What is 17 + 25?"

The model card is https://arxiv.org/abs/2508.10925, the semantics are those of
https://github.com/openai/gpt-oss (gpt_oss/torch/model.py); YaRN is https://arxiv.org/abs/2309.00071,
the chat format https://github.com/openai/harmony. Shape letters:

    T  tokens of a step, flat: S sequences of Q tokens each (prefill: S = 1; decode: Q = 1)
    H  hidden size        I  intermediate size     E  experts        k  experts of a token
    N  query heads        G  key/value heads       D  head dim       V  vocabulary
    C  cached tokens that a step reads      M  query heads that share a key head: N / G
"""

import os
import signal

if __name__ == "__main__":  # an interrupt while the libraries load ends the process at once
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

import argparse
import codecs
import collections
import contextlib
import datetime
import errno
import functools
import importlib.util
import itertools
import json
import math
import operator
import random
import re
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import tiktoken
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

import weights
from weights import MX_GROUP, CheckpointError, Config, Experts

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny")  # the embedded model
PAGE_SIZE = 16  # tokens of a KV page
MAX_BATCH = 64  # sequences that decode together
PREFILL_TOKENS = 2048  # tokens of prompts that run together
SCORES = 1 << 26  # heads x queries x keys whose attention scores are in memory together
EXPAND_BELOW = 1 << 25  # bytes: a layer's experts that are smaller as float32 are expanded, at load
ACTIVATIONS = ("bf16", "fp8", "mxfp8", "mxfp4")
OPS = ("auto", "torch", "triton", "gluon")
KERNELS = "ops_triton", "moe_gluon", "moe_nvidia", "attention_nvidia"  # rooms; without: equations
SWIGLU_ALPHA = weights.ARCHITECTURE["swiglu_alpha"]


@dataclass(frozen=True)
class Step:
    """What a forward pass is told beside its tokens: S sequences of Q consecutive tokens each.

    A sequence has one block table for each kind of layer. Position p lies at ring index p mod C,
    C = P * page_size: a full layer has pages for every token, so its ring never wraps; a sliding
    layer stops at ceil(window / page_size) pages and then overwrites what has left the window."""

    positions: Tensor  # int32 [S, Q]; -1 is padding, which caches nothing and comes last
    tables: dict[str, Tensor]  # kind of layer -> int32 [S, P], pages in ring order, then page 0
    page_size: int  # tokens


class Ops(NamedTuple):
    """The six operations in which devices differ, and two for ranks that see each other's memory.
    None of them sees a model or a layer, and none writes to anything but the pool and, of the two,
    that memory. EQUATIONS below are their definition."""

    prepare: Callable  # (experts, activations) -> packed; once a layer, at load
    plan: Callable  # (step, config) -> whatever `attention` needs of it; once a step
    add_norm: Callable  # (x [T, H], y [T, H] | None, scale [H], eps) -> (x + y, its RMS norm)
    attention: Callable  # (qkv [T, (N+2G)D], sinks, pool [slots, 2, G, D], kind, plan) -> [T, ND]
    moe: Callable  # (x [T, H], router_weight, router_bias, packed, k, activations, limit) -> [T, H]
    capturable: bool  # no operation waits for the device: a decode step can be a graph
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # that x may have
    linear: Callable = F.linear  # (x [T, K], weight [N, K], bias [N] | None) -> [T, N]
    meet: Callable | None = None  # (rank, ranks, rows, H, device) -> peers; once, at load
    sum_norm: Callable | None = None  # (x, y, scale, eps, peers): add_norm of all ranks' bf16 y


# --------------------------------------------------------------------------------------------------
# Number formats (OCP Microscaling Formats v1.0)

E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6])  # of codes
E8M0 = torch.ldexp(torch.ones(256), torch.arange(256) - 127)  # of scale bytes: 2^(s - 127)
E8M0[255] = math.nan


def dequantise_mxfp4(packed: Tensor, scale: Tensor) -> Tensor:
    """mxfp4 to float32, exactly. packed: uint8 [..., K/2], low nibble first; scale: uint8 E8M0
    [..., K/32] -> [..., K]."""
    codes = torch.stack([packed & 15, packed >> 4], dim=-1)  # [..., K/2, 2]
    values = E2M1.to(packed.device)[codes.int()].view(*scale.shape, MX_GROUP)  # [..., K/32, 32]
    return (values * E8M0.to(packed.device)[scale.int()][..., None]).flatten(-2)


def quantise_mx(x: Tensor, activations: str) -> Tensor:
    """x [..., K] float32 rounded to mxfp8 (e4m3) or mxfp4 (e2m1), as float32 again. Per group of 32
    the scale is 2^(floor(log2(max |x|)) - emax), OCP MX v1.0 section 6.3; elements round to nearest
    even and saturate. A group with NaN has the scale NaN."""
    largest_exponent, largest = (8, 448.0) if activations == "mxfp8" else (2, 6.0)
    groups = x.unflatten(-1, (-1, MX_GROUP))  # [..., K/32, 32]
    largest_of = groups.abs().amax(-1, keepdim=True)  # [..., K/32, 1]
    groups, bits = groups.where(largest_of == largest_of, math.nan), largest_of.view(torch.int32)
    # float32's own exponent field is the floor of the logarithm
    exponent = ((bits >> 23) - 127 - largest_exponent).clamp(-127, 127)
    scaled = torch.ldexp(groups, -exponent).clamp(-largest, largest)
    rounded = scaled.to(torch.float8_e4m3fn).float() if largest == 448 else round_e2m1(scaled)
    return torch.ldexp(rounded, exponent).flatten(-2)


def round_e2m1(x: Tensor) -> Tensor:
    """float32 in [-6, 6] to the nearest e2m1 value, ties to even: steps of 0.5 below 2, 1 below 4,
    2 above."""
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return torch.round(x / step) * step


def quantise_fp8(x: Tensor, scale: float) -> Tensor:
    """x rounded to multiples e4m3 x scale, clamped to +-448 x scale; float32."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


# --------------------------------------------------------------------------------------------------
# The equations: norm and attention


def add_norm(x: Tensor, y: Tensor | None, scale: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """x [T, H] plus y, and the RMS norm of the sum, which is computed in float32."""
    x = x if y is None else x + y
    wide = x.float()
    inverse = torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)  # [T, 1]
    return x, (wide * inverse * scale).to(x.dtype)


@functools.cache
def rope(config: Config, device: torch.device) -> tuple[Tensor, float]:
    """Radians a token of each pair of a head's elements, [D/2], and what multiplies cos and sin.
    YaRN (sections 3.2 to 3.4, bounds not truncated): pairs that turn often within the initial
    context keep their frequency, slow ones are interpolated."""
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


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of heads x [S, Q, heads, D]: a pair is (i, i + D/2)."""
    a, b = x.chunk(2, dim=-1)  # [S, Q, heads, D/2] each
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1).to(x.dtype)


class Span(NamedTuple):
    """Which keys the layers of one kind see in a step."""

    past: Tensor  # int [2 * S * G * C], rows of D in the pool: keys, values; tokens in ring order
    hidden: Tensor  # bool [S, 1, 1, Q, C + Q + 1], what a query does not see: cached, new, the sink
    kept: Tensor  # int [kept], which of the T new tokens stay cached: of more than C the last C
    write: Tensor  # int [kept], their pool slots


class Plan(NamedTuple):
    """What all layers of a step share."""

    cos: Tensor  # float32 [S, Q, 1, D/2]
    sin: Tensor
    spans: dict[str, Span]  # by kind of layer


def plan(step: Step, config: Config) -> Plan:
    """Angles, and for each kind of layer who sees whom."""
    positions, device, G = step.positions.long(), step.positions.device, config.num_key_value_heads
    frequency, factor = rope(config, device)
    angles = positions[:, :, None, None] * frequency  # [S, Q, 1, D/2]
    first, last = positions[:, :1], positions.amax(1, keepdim=True)  # [S, 1] each
    queries, longest = positions[:, :, None], int(first.max())  # [S, Q, 1]
    offsets = torch.arange(step.page_size, device=device)
    heads = torch.arange(2 * G, device=device).view(2, 1, G, 1)  # rows of a slot of the pool
    spans = {}
    for kind, table in step.tables.items():
        slots = (table[:, :, None] * step.page_size + offsets).flatten(1)  # [S, C]
        C, filled = slots.shape[1], slots[:, :longest]  # no ring is filled further
        # The position of the newest token at each ring index; negative: there is none.
        back = (first - 1 - torch.arange(filled.shape[1], device=device)) % C
        keys = torch.cat([first - 1 - back, positions], dim=1)[:, None]  # [S, 1, filled + Q]
        hidden = (keys < 0) | (keys > queries)  # [S, Q, filled + Q]
        if kind == "sliding_attention":
            hidden |= keys <= queries - config.sliding_window
        hidden = F.pad(hidden, (0, 1))[:, None, None]  # [S, 1, 1, Q, filled + Q + 1]
        kept = (positions > (last - C).clamp(min=-1)).flatten().nonzero()[:, 0]
        write = slots.gather(1, positions % C).flatten()[kept]
        past = filled[:, None] * (2 * G) + heads  # [S, filled] -> [2, S, G, filled]
        spans[kind] = Span(past.flatten(), hidden, kept, write)
    return Plan(angles.cos() * factor, angles.sin() * factor, spans)


def attention(qkv: Tensor, sinks: Tensor, pool: Tensor, kind: str, plan: Plan) -> Tensor:
    """Rotates queries and keys, attends to the cached tokens and the step's own, and caches these.
    qkv [T, (N + 2G) D]; sinks [N]; pool [slots, 2, G, D], keys and values -> [T, N D].

    The past is read before anything is written, because a chunk of a prompt may overwrite, in a
    sliding layer's ring, what its own first queries see."""
    (S, Q), N, (G, D) = plan.cos.shape[:2], len(sinks), pool.shape[2:]
    span = plan.spans[kind]
    qk, v = qkv.view(S, Q, N + 2 * G, D).split([N + G, G], dim=2)
    q, k = rotate(qk, plan.cos, plan.sin).split([N, G], dim=2)
    new = torch.stack([k, v], dim=2)  # [S, Q, 2, G, D]
    past = pool.view(-1, D).index_select(0, span.past).view(2, S, G, -1, D)  # [2, S, G, C, D]
    rows = max(1, SCORES // (S * N * span.hidden.shape[-1]))  # queries at once, bounds the memory
    parts = zip(q.split(rows, dim=1), span.hidden.split(rows, dim=3), strict=True)
    out = [attend(q, past, new, sinks, hidden) for q, hidden in parts]
    pool.index_copy_(0, span.write, new.flatten(0, 1).index_select(0, span.kept))
    return torch.cat(out, dim=1).view(S * Q, N * D)


def attend(q: Tensor, past: Tensor, new: Tensor, sinks: Tensor, hidden: Tensor) -> Tensor:
    """Softmax attention in which M = N / G query heads share a key head. A head's sink is one more
    logit of its softmax that stands for no value. q [S, Q, N, D]; keys and values past
    [2, S, G, C, D] and new [S, Q', 2, G, D]; hidden as in Span -> [S, Q, N, D]."""
    (S, Q, N, D), G, C = q.shape, *past.shape[2:4]
    q = q.view(S, Q, G, N // G, D).permute(0, 2, 3, 1, 4).reshape(S, G, -1, D)  # [S, G, M*Q, D]
    (past_k, past_v), (new_k, new_v) = past, new.permute(2, 0, 3, 1, 4)  # [S, G, ..., D] each
    sink = sinks.view(G, -1, 1).expand(S, G, -1, Q).reshape(S, G, -1, 1)  # [S, G, M*Q, 1]
    q = q * D**-0.5
    logits = torch.cat([q @ past_k.mT, q @ new_k.mT, sink], dim=-1).float()
    logits = logits.view(S, G, N // G, Q, -1).masked_fill(hidden, -math.inf)
    share = logits.softmax(-1).to(q.dtype).flatten(2, 3)  # [S, G, M*Q, C + Q' + 1]
    out = share[..., :C] @ past_v + share[..., C:-1] @ new_v  # [S, G, M*Q, D]
    return out.view(S, G, -1, Q, D).permute(0, 3, 1, 2, 4).reshape(S, Q, N, D)


# --------------------------------------------------------------------------------------------------
# The equations: mixture of experts


def prepare(experts: Experts, activations: str) -> Experts:
    """The experts of a layer as the equations multiply them: as they are stored, or, if they are
    small, in float32 once and for all, which makes a step of such a model twice as fast. Raises
    ValueError for unknown activations, and for fp8 without static scales."""
    check_activations(experts, activations)
    values = experts.gate_up_bias.numel() * experts.down_bias.shape[1] * 3 // 2  # E 2I H + E H I
    if 4 * values > EXPAND_BELOW:
        return experts

    def expand(weight, scale):
        full = weight.float() if scale is None else dequantise_mxfp4(weight, scale)
        return full.mT.contiguous().mT  # stored [E, in, out], which a GEMM of few rows reads faster

    return replace(
        experts,
        gate_up_weight=expand(experts.gate_up_weight, experts.gate_up_scale),
        gate_up_scale=None,
        gate_up_bias=experts.gate_up_bias.float(),
        down_weight=expand(experts.down_weight, experts.down_scale),
        down_scale=None,
        down_bias=experts.down_bias.float(),
    )


def check_activations(experts: Experts, activations: str) -> None:
    if activations not in ACTIVATIONS:
        expected = ", ".join(ACTIVATIONS)
        raise ValueError(f"activations={activations!r}, expected one of {expected}")
    if activations == "fp8" and experts.gate_up_input_scale is None:
        raise ValueError(
            "activations='fp8' need the static input scales of a Quark checkpoint; use mxfp8"
        )


def moe_reference(
    x: Tensor,
    router_weight: Tensor,
    router_bias: Tensor,
    experts: Experts,
    top_k: int,
    activations: str = "bf16",
    swiglu_limit: float = 7.0,
) -> Tensor:
    """The MoE layer as equations, in three stages, each of which is the oracle of a kernel's stage.

    x [T, H]; router_weight [E, H], router_bias [E] -> [T, H] in x's dtype; float32 in between.
    `activations` is what the two expert GEMMs see: "bf16" x and the SwiGLU's result in x's dtype,
    the others these rounded: "fp8" (with the static scales in `experts`), "mxfp8", "mxfp4". Raises
    ValueError for any other, and for fp8 without scales."""
    check_activations(experts, activations)
    routing = gating(x, router_weight, router_bias, top_k)
    h = dispatch_swiglu(x, routing, experts, activations, swiglu_limit)
    return combine(h, routing, experts).to(x.dtype)


class Routing(NamedTuple):
    """Which experts see which tokens. A row is a (token, slot) pair, numbered token * k + slot."""

    chosen: Tensor  # int64 [T, k], the experts of a token
    gates: Tensor  # float32 [T, k], their weights
    order: Tensor  # int64 [T*k], the rows by expert
    counts: dict[int, int]  # rows of each expert that has any, in that order


def gating(x: Tensor, router_weight: Tensor, router_bias: Tensor, top_k: int) -> Routing:
    """The experts of each token are those with the largest router logits, the smaller id first
    where they tie; their gate weights are a softmax over these logits alone."""
    logits = F.linear(x.float(), router_weight.float(), router_bias.float())  # [T, E]
    logits, expert = logits.sort(dim=-1, descending=True, stable=True)
    chosen, gates = expert[:, :top_k], logits[:, :top_k].softmax(-1)
    expert, order = chosen.flatten().sort(stable=True)
    return Routing(chosen, gates, order, collections.Counter(expert.tolist()))


def dispatch_swiglu(
    x: Tensor, routing: Routing, experts: Experts, activations: str, swiglu_limit: float
) -> Tensor:
    """x [T, H] through the first GEMM of its experts and SwiGLU: gate sigmoid(1.702 gate) (up + 1),
    both clamped before. -> float32 [T*k, I], rows by expert, as the second GEMM sees them."""
    seen = as_seen(x, activations, experts.gate_up_input_scale)
    rows = seen.index_select(0, routing.order // routing.chosen.shape[1])  # [T*k, H]
    weight, scale, bias = experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias
    h = expert_linear(rows, routing.counts, weight, scale, bias)  # [T*k, 2I]
    gate, up = h[:, 0::2].clamp(max=swiglu_limit), h[:, 1::2].clamp(-swiglu_limit, swiglu_limit)
    h = gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)  # [T*k, I]
    h = h.to(x.dtype) if activations == "bf16" else h
    return as_seen(h, activations, experts.down_input_scale)


def combine(h: Tensor, routing: Routing, experts: Experts) -> Tensor:
    """h from `dispatch_swiglu` through the second GEMM of its experts, and the sum over a token's k
    experts weighted by its gates. -> float32 [T, H]."""
    # [T*k, H]
    y = expert_linear(h, routing.counts, experts.down_weight, experts.down_scale, experts.down_bias)
    y = torch.empty_like(y).index_copy_(0, routing.order, y).view(*routing.gates.shape, -1)
    return (y * routing.gates[..., None]).sum(1)  # [T, k, H] -> [T, H]


def as_seen(x: Tensor, activations: str, scale: float | None) -> Tensor:
    """x as an expert GEMM sees it, in float32: itself, or rounded to a format."""
    if activations == "bf16":
        return x.float()
    return (
        quantise_fp8(x.float(), scale)
        if activations == "fp8"
        else quantise_mx(x.float(), activations)
    )


def expert_linear(x: Tensor, counts: dict[int, int], weight: Tensor, scale, bias) -> Tensor:
    """Rows x [R, in], by expert, each times the weight of its expert, plus the bias. An expert is
    converted to float32 where rows use it and forgotten after. -> float32 [R, out]."""
    outputs = []
    for e, rows in zip(counts, x.split([*counts.values()]), strict=True):
        w = weight[e].float() if scale is None else dequantise_mxfp4(weight[e], scale[e])
        outputs.append(F.linear(rows, w, bias[e].float()))
    return torch.cat(outputs)


EQUATIONS = Ops(prepare, plan, add_norm, attention, moe_reference, capturable=False)


def choose_ops(name: str, device: torch.device) -> Ops:
    """The operations called `name`: "torch", the equations; "triton", ops_triton's kernels;
    "gluon", these with moe_gluon's layer, for gfx950 exactly; "auto": gluon where a gfx950, real or
    emulated, is Triton's active device and `device` belongs to it, triton on any other GPU that
    Triton drives, with moe_nvidia's kernels on NVIDIA's, else torch. Raises ValueError for another
    name, and for what cannot run here."""
    if name not in OPS:
        raise ValueError(f"ops={name!r}, expected one of {', '.join(OPS)}")
    if name == "torch" or name == "auto" and not driven_by_triton(device):
        return EQUATIONS
    if not driven_by_triton(device):
        raise ValueError(
            f"ops={name!r} needs Triton with an active GPU, real or emulated, that owns device "
            f"{device}; use ops='torch'"
        )
    import moe_gluon
    import moe_nvidia
    import ops_triton as t

    triton = Ops(
        t.prepare, t.plan, t.add_norm, t.attention, t.moe, True,
        linear=t.linear, meet=t.meet, sum_norm=t.sum_norm,
    )  # fmt: skip
    if name == "auto" and moe_nvidia.is_supported():
        return nvidia_ops(triton)
    if name == "triton" or name == "auto" and not moe_gluon.is_supported():
        return triton
    if not moe_gluon.is_supported():
        raise ValueError("ops='gluon' needs a gfx950 (MI350, MI355 or emulated); use ops='triton'")
    return triton._replace(prepare=moe_gluon.prepare, moe=moe_gluon.moe, dtypes=(torch.bfloat16,))


def nvidia_ops(triton: Ops) -> Ops:
    """Of ops_triton, with moe_nvidia's kernels for what they multiply, mxfp4 weights and bfloat16
    activations of few tokens, and attention_nvidia's for decode steps. They read the same packed
    experts and the same pages."""
    import attention_nvidia
    import moe_nvidia

    def prepare(experts: Experts, activations: str):
        packed = experts.gate_up_scale is not None and activations == "bf16"
        return (moe_nvidia if packed else triton).prepare(experts, activations)

    def moe(x, router_weight, router_bias, packed, *options):
        few = isinstance(packed, moe_nvidia.Packed) and len(x) <= moe_nvidia.MAX_TOKENS
        few = few and x.dtype == router_weight.dtype == torch.bfloat16
        return (moe_nvidia if few else triton).moe(x, router_weight, router_bias, packed, *options)

    def linear(x, weight, bias=None):
        few = moe_nvidia.multiplies(x, weight)
        return (moe_nvidia if few else triton).linear(x, weight, bias)

    def attention(qkv, sinks, pool, kind, plan):
        attends = attention_nvidia.attends(qkv, sinks, pool, plan)
        return (attention_nvidia if attends else triton).attention(qkv, sinks, pool, kind, plan)

    return triton._replace(prepare=prepare, moe=moe, linear=linear, attention=attention)


def driven_by_triton(device: torch.device) -> bool:
    """Whether Triton and the kernels are there, and its active driver's device is `device`."""
    if not all(map(importlib.util.find_spec, ("triton", *KERNELS))):
        return False
    import triton

    try:
        driver = triton.runtime.driver.active
        driver.get_current_target()
    except RuntimeError:  # Triton has no active driver
        return False
    # A driver that does not say where its tensors live is an emulator's.
    owner = getattr(driver, "get_active_torch_device", None)
    return device.type == (owner().type if owner else "cpu")


# --------------------------------------------------------------------------------------------------
# Tensor parallelism


class Ranks:
    """The processes that share a model, each with its shard of it on a device of its own. All do
    the same and so hold the same tokens. A process alone is rank 0 of one."""

    def __init__(self, shard: weights.Shard = weights.WHOLE, store=None):
        self.shard, self.store, self.said = shard, store, 0
        self.alone = shard.ranks == 1
        self.linked = False  # GPUs of one machine that see each other's memory

    @classmethod
    def join(cls, device: str) -> "Ranks":
        """Meets the ranks that torchrun started, if it did; "cuda" becomes one GPU of each. Raises
        ValueError for another launch of several, and for a device that they cannot use."""
        ranks, gpu = int(os.environ.get("WORLD_SIZE", 1)), device.startswith("cuda")
        if ranks == 1:
            return cls()
        if not dist.is_torchelastic_launched():
            raise ValueError(f"WORLD_SIZE is {ranks}: ranks are started by torchrun only")
        here, cards = int(os.environ["LOCAL_WORLD_SIZE"]), torch.cuda.device_count()
        if gpu and (device != "cuda" or here > cards):
            each = f"each of {here} ranks takes a GPU of its own, this machine has {cards}"
            raise ValueError(f"device={device!r}: {each}; say cuda or cpu, or start fewer ranks")
        if gpu:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        store, rank, ranks = next(dist.rendezvous("env://"))
        backend = "cpu:gloo,cuda:nccl" if gpu else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=ranks)
        joined = cls(weights.Shard(rank, ranks), store)
        pairs = itertools.permutations(range(here), 2)
        if gpu and here == ranks and torch.version.cuda:  # whose kernels were tried
            joined.linked = all(torch.cuda.can_device_access_peer(*pair) for pair in pairs)
        return joined

    def total(self, partial: Tensor) -> Tensor:
        """The sum of all ranks' partial sums, the same bits on every rank."""
        if not self.alone:
            dist.all_reduce(partial)
        return partial

    def joined(self, part: Tensor, size: int) -> Tensor:
        """All ranks' columns beside each other: [T, the shard's of `size`] -> [T, size]."""
        if self.alone:
            return part
        columns = self.shard.of(size)
        return self.total(F.pad(part, (columns.start, size - columns.stop)))

    def agreed(self, tokens: Tensor) -> Tensor:
        """Rank 0's tokens, which others may have drawn from sums in another order."""
        if not self.alone:
            dist.broadcast(tokens, 0)
        return tokens

    def least(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        numbers = torch.tensor(number)
        if not self.alone:
            dist.all_reduce(numbers, dist.ReduceOp.MIN)
        return int(numbers)

    def first(self, make: Callable):
        """What `make` gives on rank 0, however long the others wait for it."""
        if self.alone:
            return make()
        key, self.said = f"said {self.said}", self.said + 1
        if self.shard.rank == 0:
            self.store.set(key, json.dumps(make()))
        self.store.wait([key], datetime.timedelta(days=365))
        return json.loads(self.store.get(key))

    def leave(self) -> None:
        """Ends this process, when all are here, if others share the model."""
        if not self.alone:
            if torch.cuda.is_initialized():
                torch.cuda.synchronize()
            self.least(0)
            sys.stdout.flush()
            os._exit(0)  # to destroy NCCL's group would wait for the graphs that it is part of

    def fail(self, message: str) -> None:
        """Says why this process ends, if it is the first; torchrun ends the others."""
        if "gloo/transport" in message:
            message = f"{message.partition(':')[0]}: another rank ended, see torchrun's report"
        if self.alone or self.store.add("failed", 1) == 1:
            print(message, file=sys.stderr if self.alone else sys.__stderr__, flush=True)
        if not self.alone:
            os._exit(1)  # what waits for other ranks at exit would wait for ever


def hush_other_ranks() -> None:
    """Of several ranks the first alone writes, and an interrupt ends all at once."""
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        if os.environ.get("RANK") != "0":
            sys.stdout = sys.stderr = open(os.devnull, "w")


# --------------------------------------------------------------------------------------------------
# Paged KV cache


class KVCache:
    """Keys and values in one pool of pages. A page holds `page_size` tokens, for every layer of one
    kind: layer i of the full-attention layers and layer i of the sliding ones use the same memory
    of different pages."""

    def __init__(self, config: Config, num_pages: int, page_size: int, device, dtype: torch.dtype):
        self.config, self.page_size, self.num_pages, self.peak = config, page_size, num_pages, 0
        self.free = list(range(num_pages, 0, -1))  # page 0 is not given out: tables end with it
        depth = max(config.layer_types.count(kind) for kind in config.layer_types)
        shape = ((1 + num_pages) * page_size, 2, config.num_key_value_heads, config.head_dim)
        self.pool = torch.zeros(depth, *shape, device=device, dtype=dtype)
        self.graphs: dict[tuple, DecodeGraph] = {}  # they know the pool's address

    def allocate(self, length: int, tables: dict[str, list[int]]) -> dict[str, list[int]]:
        """Block tables, by kind, for a sequence that may grow to `length` tokens; `tables` are what
        it has. A ring that is shorter than it will be has not wrapped."""
        needed, new = pages_needed(self.config, length, self.page_size), {}
        for kind, n in needed.items():
            table = tables.get(kind, [])
            new[kind] = table + [self.free.pop() for _ in range(n - len(table))]
        self.peak = max(self.peak, self.num_pages - len(self.free))
        return new

    def fork(self, tables: dict[str, list[int]]) -> dict[str, list[int]]:
        """Tables for a sequence that goes on from here while these stay as they are: the sliding
        layers' rings, which it will overwrite, are copied; the other pages, to whose end it will
        write, are shared."""
        if "sliding_attention" not in tables:
            return tables
        old = tables["sliding_attention"]
        new = [self.free.pop() for _ in old]
        self.peak = max(self.peak, self.num_pages - len(self.free))
        pages = self.pool.unflatten(1, (-1, self.page_size))  # [depth, pages, page_size, 2, G, D]
        pages[:, new] = pages[:, old]
        return tables | {"sliding_attention": new}

    def release(self, tables: dict[str, list[int]]) -> None:
        for table in tables.values():
            self.free.extend(table)

    def step(self, positions: list[list[int]], tables: list[dict[str, list[int]]]) -> Step:
        """The step of sequences at these positions, of which shorter rows are filled up by padding.
        Tables are cut to the pages that the longest sequence uses."""
        longest, width = 1 + max(row[-1] for row in positions), max(map(len, positions))
        widths = pages_needed(self.config, longest, self.page_size)
        rows = [row + [-1] * (width - len(row)) for row in positions]
        device = self.pool.device
        rows = torch.tensor(rows, dtype=torch.int32, device=device)
        cut = {k: t.to(device) for k, t in block_tables(tables, widths).items()}
        return Step(rows, cut, self.page_size)


def block_tables(tables: list[dict[str, list[int]]], widths: dict[str, int]) -> dict[str, Tensor]:
    """Kind of layer -> int32 [S, width]: tables cut, or filled up with page 0."""
    return {
        kind: torch.tensor([(t[kind] + [0] * width)[:width] for t in tables], dtype=torch.int32)
        for kind, width in widths.items()
    }


def pages_needed(config: Config, length: int, page_size: int) -> dict[str, int]:
    """Pages that `length` tokens need, by kind of layer."""
    full, window = -(-length // page_size), -(-config.sliding_window // page_size)
    return {
        kind: full if kind == "full_attention" else min(full, window)
        for kind in sorted(set(config.layer_types))
    }


# --------------------------------------------------------------------------------------------------
# Model


@dataclass
class Layer:
    kind: str  # "sliding_attention" | "full_attention"
    depth: int  # index among the layers of its kind
    attn_norm: Tensor  # float32 [H]
    qkv_weight: Tensor  # [(N + 2G) D, H]
    qkv_bias: Tensor  # [(N + 2G) D]
    sinks: Tensor  # [N]
    out_weight: Tensor  # [H, N D]
    out_bias: Tensor  # [H]
    mlp_norm: Tensor  # float32 [H]
    router_weight: Tensor  # [E, H]
    router_bias: Tensor  # [E]
    packed: object  # the experts, as ops.prepare made them


class GPTOSS:
    """A GPT-OSS model with its weights."""

    def __init__(
        self,
        checkpoint: weights.Checkpoint,
        device="cpu",
        dtype: torch.dtype | None = None,
        ops: str = "auto",
        activations: str = "auto",
        ranks: Ranks | None = None,
    ):
        self.config, self.layout = checkpoint.config, checkpoint.layout
        self.ranks = ranks or Ranks()
        if checkpoint.shard != self.ranks.shard:
            raise ValueError(f"ranks={self.ranks.shard}, the checkpoint's is {checkpoint.shard}")
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device={device!r} cannot be used here: {reason}") from error
        self.ops = choose_ops(ops, self.device)
        on_cpu = self.device.type == "cpu" and torch.float32 in self.ops.dtypes
        self.dtype = dtype or (torch.float32 if on_cpu else torch.bfloat16)
        if self.dtype not in self.ops.dtypes:
            raise ValueError(f"dtype={self.dtype}, these ops compute in {self.ops.dtypes}")
        self.activations = choose_activations(activations, checkpoint, self.ops)
        self.stop_tokens = checkpoint.stop_tokens
        self.idle: dict[tuple[int, int], KVCache] = {}  # the last engine's cache, for the next one
        meeting = self.ranks.linked and self.ops.meet and self.dtype == torch.bfloat16
        sizes = *self.ranks.shard, MAX_BATCH, self.config.hidden_size
        self.peers = self.ops.meet(*sizes, self.device) if meeting else None
        self.load(checkpoint)

    @classmethod
    def from_pretrained(
        cls, path, device="cpu", dtype=None, ops="auto", activations="auto", ranks=None
    ) -> "GPTOSS":
        """Loads the checkpoint folder `path`. dtype None: bfloat16, but float32 where the equations
        run on a CPU. ops: see `choose_ops`. activations "auto": what the checkpoint was made for,
        "fp8" for Quark's layout and else "bf16", or "mxfp8" where the ops do not multiply these.
        ranks: those of `Ranks.join` that share the model; None: it is this process's alone.
        Raises weights.CheckpointError for a bad checkpoint, ValueError for a bad argument."""
        shard = ranks.shard if ranks else weights.WHOLE
        return cls(weights.load(path, shard), device, dtype, ops, activations, ranks)

    def load(self, checkpoint: weights.Checkpoint) -> None:
        """Moves the weights to the device, a layer at a time. A layer's experts leave the
        checkpoint as they are packed: a card holds them once."""
        c, dense = self.config, checkpoint.dense

        def moved(name: str, dtype=self.dtype) -> Tensor:
            return dense[name].to(self.device, dtype).contiguous()  # a shard may be columns

        self.embedding, self.unembedding = moved("embedding"), moved("unembedding")
        self.norm = moved("norm", torch.float32)
        self.layers = []
        for n in weights.progress(range(c.num_hidden_layers), f"to {self.device}"):
            kind, experts, checkpoint.experts[n] = c.layer_types[n], checkpoint.experts[n], None
            tensors = {f.name: getattr(experts, f.name) for f in fields(Experts)}
            experts = Experts(
                **{k: t.to(self.device) if isinstance(t, Tensor) else t for k, t in tensors.items()}
            )
            self.layers.append(
                Layer(
                    kind=kind,
                    depth=c.layer_types[:n].count(kind),
                    attn_norm=moved(f"{n}.attn_norm", torch.float32),
                    qkv_weight=moved(f"{n}.qkv_weight"),
                    qkv_bias=moved(f"{n}.qkv_bias"),
                    sinks=moved(f"{n}.sinks"),
                    out_weight=moved(f"{n}.out_weight"),
                    out_bias=moved(f"{n}.out_bias"),
                    mlp_norm=moved(f"{n}.mlp_norm", torch.float32),
                    router_weight=moved(f"{n}.router_weight"),
                    router_bias=moved(f"{n}.router_bias"),
                    packed=self.ops.prepare(experts, self.activations),
                )
            )

    def forward(self, tokens: Tensor, step: Step, pool: Tensor) -> Tensor:
        """tokens [T] at the positions of `step` -> final hidden states [T, H]. Reads and writes the
        KV cache's pool [depth, slots, 2, G, D]."""
        ops, c, y = self.ops, self.config, None
        x, plan = self.embedding[tokens], ops.plan(step, c)  # [T, H]
        for layer in self.layers:
            x, h = self.add_norm(x, y, layer.attn_norm)
            qkv = ops.linear(h, layer.qkv_weight, layer.qkv_bias)  # [T, (N + 2G) D]
            a = ops.attention(qkv, layer.sinks, pool[layer.depth], layer.kind, plan)  # [T, N D]
            y = ops.linear(a, layer.out_weight, layer.out_bias)
            x, h = self.add_norm(x, y, layer.mlp_norm)
            router, top_k = (layer.router_weight, layer.router_bias), c.num_experts_per_tok
            y = ops.moe(h, *router, layer.packed, top_k, self.activations, c.swiglu_limit)
        return self.add_norm(x, y, self.norm)[1]

    def add_norm(self, x: Tensor, y: Tensor | None, scale: Tensor) -> tuple[Tensor, Tensor]:
        """x [T, H] plus y, of which each rank has a partial sum, and the norm of the result."""
        eps = self.config.rms_norm_eps
        if y is not None and self.peers and len(y) <= MAX_BATCH:
            return self.ops.sum_norm(x, y, scale, eps, self.peers)
        return self.ops.add_norm(x, y if y is None else self.ranks.total(y), scale, eps)

    def unembed(self, hidden: Tensor) -> Tensor:
        """Hidden states [T, H] -> logits, float32 [T, V]."""
        logits = self.ops.linear(hidden, self.unembedding)  # of the shard's part of V
        return self.ranks.joined(logits, self.config.vocab_size).float()

    def sample(self, hidden: Tensor, draws: Tensor, sampling: "Sampling") -> Tensor:
        """The tokens that follow hidden states [S, H], see `sample`."""
        return self.ranks.agreed(sample(self.unembed(hidden), draws, sampling))

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """Teacher-forced logits, float32 [T, V]; row t predicts token t + 1. Raises ValueError for
        a bad prompt."""
        tokens = self.check_prompt(0, tokens, 0)
        pages = sum(pages_needed(self.config, len(tokens), PAGE_SIZE).values())
        cache = KVCache(self.config, pages, PAGE_SIZE, self.device, self.dtype)
        tables = cache.allocate(len(tokens), {})
        parts, cached = [], 0
        while cached < len(tokens):
            parts.append(self.prefill(cache, [tokens], [tables], [cached])[0])  # [Q, H]
            cached += len(parts[-1])
        return self.unembed(torch.cat(parts))

    def prefill(
        self, cache: KVCache, prompts: list[list[int]], tables: list[dict], cached: list[int]
    ) -> Tensor:
        """Runs the next chunk of each of S prompts, of which the first `cached` tokens are in the
        cache, through the model together -> hidden states [S, Q, H]. A prompt that ends before the
        chunk does is filled up by padding."""
        left = [len(prompt) - n for prompt, n in zip(prompts, cached, strict=True)]
        Q = min(max(PREFILL_TOKENS // len(prompts), 1), max(left))
        positions = [list(range(n, n + min(Q, rest))) for n, rest in zip(cached, left, strict=True)]
        tokens = torch.zeros(len(prompts), Q, dtype=torch.int64)  # [S, Q]
        for row, prompt, chunk in zip(tokens, prompts, positions, strict=True):
            row[: len(chunk)] = torch.tensor(prompt[chunk[0] : chunk[-1] + 1])
        step = cache.step(positions, tables)
        hidden = self.forward(tokens.flatten().to(self.device), step, cache.pool)  # [T, H]
        return hidden.view(*tokens.shape, -1)

    def check_prompt(self, index: int, prompt: list[int], max_new_tokens: int) -> list[int]:
        """The prompt as a list of ints. Raises ValueError or TypeError if it cannot run."""
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError as error:
            wrong = f"prompt {index} is no list of token numbers"
            raise TypeError(f"{wrong} ({error}); encode text with the tokenizer") from error
        if not tokens:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
        vocabulary, context = self.config.vocab_size, self.config.max_position_embeddings
        if bad := [t for t in tokens if not 0 <= t < vocabulary]:
            outside = f"outside the vocabulary of {vocabulary}"
            raise ValueError(f"prompt {index} has token {bad[0]}, {outside}")
        if len(tokens) + max_new_tokens > context:
            raise ValueError(
                f"prompt {index} is too long: {len(tokens)} tokens and max_new_tokens="
                f"{max_new_tokens} exceed the model's context of {context}"
            )
        return tokens

    # -- generation --------------------------------------------------------------------------------

    def generate(self, prompts: list[list[int]], *args, **options) -> list[list[int]]:
        """The new tokens of each prompt. Arguments and errors are those of `engine`."""
        new = [[] for _ in prompts]
        for index, token in self.stream(prompts, *args, **options):
            new[index].append(token)
        return new

    def stream(self, prompts: list[list[int]], *args, **options) -> Iterator[tuple[int, int]]:
        """(prompt index, new token), as they come. Arguments and errors are those of `engine`."""
        return self.engine(prompts, *args, **options).tokens()

    def engine(
        self,
        prompts: list[list[int]],
        max_new_tokens: int,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        seed: int | None = None,
        stop_tokens=None,
        num_pages: int | None = None,
        page_size: int = PAGE_SIZE,
        max_batch: int = MAX_BATCH,
    ) -> "Engine":
        """An engine with these prompts waiting in it.

        temperature 0 is greedy. A prompt's draws under a `seed` depend on nothing but the seed. A
        stop token ends a prompt and is left out; stop_tokens None: the checkpoint's own. num_pages
        None: as many as needed, within the memory there is. Raises ValueError or TypeError, before
        anything runs, for an argument out of range and for a prompt that is empty, too long or can
        never have its pages."""
        check_whole(0, max_new_tokens=max_new_tokens)
        check_whole(1, page_size=page_size, max_batch=max_batch)
        sampling = Sampling(temperature, top_k, top_p, seed)
        stop = self.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
        prompts = [self.check_prompt(i, prompt, max_new_tokens) for i, prompt in enumerate(prompts)]
        if num_pages is None:
            lengths = [len(prompt) + max_new_tokens for prompt in prompts]
            needed = [sum(pages_needed(self.config, n, page_size).values()) for n in lengths]
            num_pages = min(sum(sorted(needed)[-max_batch:]), self.pages_that_fit(page_size))
        engine = Engine(self, num_pages, page_size, max_batch, sampling, stop)
        for prompt in prompts:
            engine.submit(prompt, max_new_tokens)
        return engine

    def pages_that_fit(self, page_size: int) -> int:
        """Pages for 90% of the free memory of a GPU or, where it can be told, of a CPU; of several
        ranks, those that fit on each."""
        if self.device.type == "cuda":
            # Blocks that PyTorch keeps for reuse are free too, though the driver counts them taken.
            free = torch.cuda.mem_get_info(self.device)[0]
            free += torch.cuda.memory_reserved(self.device)
            free -= torch.cuda.memory_allocated(self.device)
        elif os.path.exists("/proc/meminfo"):
            with open("/proc/meminfo") as file:
                free = 1024 * int(file.read().partition("MemAvailable:")[2].split()[0])
            free //= self.ranks.shard.ranks
        else:
            return sys.maxsize
        one = KVCache(self.config, 0, page_size, "meta", self.dtype).pool
        return self.ranks.least(int(0.9 * free) // (one.numel() * one.itemsize))


def check_whole(least: int, **values) -> None:
    """Raises ValueError naming the argument that is not a whole number of at least `least`."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int) or value < least:
            raise ValueError(f"{name}={value!r}, expected a whole number of at least {least}")


def choose_activations(name: str, checkpoint: weights.Checkpoint, ops: Ops) -> str:
    """What the expert GEMMs see. "auto": what the checkpoint was made for, if `ops` multiply it,
    else mxfp8. ops.prepare raises ValueError for what they do not multiply."""
    if name != "auto":
        return name
    try:
        ops.prepare(checkpoint.experts[0], checkpoint.activations)
    except ValueError:
        return "mxfp8"
    return checkpoint.activations


# --------------------------------------------------------------------------------------------------
# Engine


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn. Raises ValueError for a value out of range."""

    temperature: float = 0.0  # 0: the likeliest token
    top_k: int | None = None
    top_p: float | None = None
    seed: int | None = None

    def __post_init__(self):
        for name, value, allowed, expected in (
            ("temperature", self.temperature, lambda t: 0 <= t < math.inf, "a finite number >= 0"),
            ("top_p", self.top_p, lambda p: 0 < p <= 1, "a number in (0, 1]"),
        ):
            if value is not None and not (isinstance(value, (int, float)) and allowed(value)):
                raise ValueError(f"{name}={value!r}, expected {expected}")
        if self.top_k is not None:
            check_whole(1, top_k=self.top_k)
        if self.seed is not None and not isinstance(self.seed, int):
            raise ValueError(f"seed={self.seed!r}, expected a whole number")

    def unseeded(self) -> "Sampling":
        """What decides how a draw becomes a token."""
        return replace(self, seed=None)


@dataclass(eq=False)
class Sequence:
    """A prompt on its way through the engine."""

    index: int  # in the order of submission
    tokens: list[int]  # prompt and generated; all but the newest are cached
    remaining: int  # tokens it may still generate
    random: random.Random
    keep: bool  # whether its prompt stays cached
    cached: int = 0  # tokens of its prompt, while it is prefilled
    tables: dict[str, list[int]] = field(default_factory=dict)  # block tables, by kind of layer


class Prefix(NamedTuple):
    """A prompt that stays cached, for a longer one that begins with it."""

    tokens: list[int]
    tables: dict[str, list[int]]


class Engine:
    """Continuous batching: a prompt waits until one of `max_batch` places is free and the pool has
    the pages for all it may become; prompts are prefilled together as soon as they fit, and all
    running sequences decode together, in a graph where the operations can be captured. The last
    prompt submitted with `keep` stays cached."""

    def __init__(
        self,
        model: GPTOSS,
        num_pages: int,
        page_size: int,
        max_batch: int,
        sampling: Sampling,
        stop_tokens: frozenset[int],
    ):
        check_whole(0, num_pages=num_pages)
        if model.device.type == "meta":
            raise ValueError("device='meta' holds no values, so nothing can be generated on it")
        if num_pages > (fitting := model.pages_that_fit(page_size)):
            raise ValueError(f"num_pages={num_pages} do not fit the free memory, {fitting} do")
        self.model, self.max_batch = model, max_batch
        self.sampling, self.stop_tokens = sampling, stop_tokens
        self.key = num_pages, page_size
        self.cache = model.idle.pop(self.key, None)
        model.idle.clear()  # another pool's memory is free for this one
        if self.cache is None:
            self.cache = KVCache(model.config, *self.key, model.device, model.dtype)
        self.cache.peak = 0
        self.flying: tuple[DecodeGraph, list[Sequence]] | None = None  # the step on its way
        self.waiting: collections.deque[Sequence] = collections.deque()  # have no pages yet
        self.prefilling: list[Sequence] = []
        self.running: list[Sequence] = []  # are decoded
        self.decoded = True  # the last step was no chunk of prompts
        self.prefix: Prefix | None = None
        self.submitted = 0

    def submit(self, prompt: list[int], max_new_tokens: int, keep: bool = False) -> None:
        """Queues a prompt, whose tokens stay cached after it if `keep`, which takes an engine of
        max_batch 1. Raises ValueError if it can never run."""
        index, cache = self.submitted, self.cache
        if keep and self.max_batch > 1:
            raise ValueError(f"keep=True needs max_batch=1, this engine has {self.max_batch}")
        tokens = self.model.check_prompt(index, prompt, max_new_tokens)
        pages = self.pages_of(len(tokens) + max_new_tokens, keep)
        if pages > cache.num_pages:
            raise ValueError(
                f"prompt {index} needs {pages} pages of {cache.page_size} tokens for {len(tokens)} "
                f"tokens and {max_new_tokens} new ones, the pool has {cache.num_pages}; raise "
                "num_pages or lower max_new_tokens"
            )
        self.submitted += 1
        if max_new_tokens:
            draws = random.Random(self.sampling.seed)
            self.waiting.append(Sequence(index, tokens, max_new_tokens, draws, keep))

    def pages_of(self, length: int, keep: bool) -> int:
        """Pages of a sequence that may grow to `length` tokens. The rings of a prompt that stays
        are copied before the answer overwrites them."""
        needed = pages_needed(self.model.config, length, self.cache.page_size)
        return sum(needed.values()) + keep * needed.get("sliding_attention", 0)

    def tokens(self) -> Iterator[tuple[int, int]]:
        """(index of the prompt, its next token), until no prompt is left."""
        while self.unfinished():
            yield from self.step()
        if not self.prefix:
            self.model.idle = {self.key: self.cache}

    def unfinished(self) -> list[Sequence]:
        return [*self.waiting, *self.prefilling, *self.running]

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One forward pass: a chunk of the prompts that are not cached yet, in turn with a token of
        every running sequence. -> (index, token) of every sequence that got a token, stop tokens
        left out."""
        while self.waiting and self.admits(self.waiting[0]):
            self.prefilling.append(self.waiting.popleft())
            self.allocate(self.prefilling[-1])
        self.decoded = not self.prefilling or bool(self.running and not self.decoded)
        if not self.decoded:
            return self.prefill()
        if self.model.ops.capturable and self.model.device.type == "cuda":
            return self.replay()
        return self.emit(list(self.running), self.decode())

    def admits(self, sequence: Sequence) -> bool:
        pages = self.pages_of(len(sequence.tokens) + sequence.remaining, sequence.keep)
        held = sum(map(len, self.prefix.tables.values())) if self.prefix else 0
        batch = len(self.prefilling) + len(self.running)
        return batch < self.max_batch and pages <= len(self.cache.free) + held

    def allocate(self, sequence: Sequence) -> None:
        """Gives a prompt its pages, those of the prefix if it begins with it."""
        tokens, tables = sequence.tokens, {}
        if self.prefix:
            begins = tokens[: len(self.prefix.tokens)] == self.prefix.tokens
            if begins and len(tokens) > len(self.prefix.tokens):
                sequence.cached, tables = len(self.prefix.tokens), self.prefix.tables
            else:
                self.cache.release(self.prefix.tables)
            self.prefix = None
        sequence.tables = self.cache.allocate(len(tokens) + sequence.remaining, tables)

    def prefill(self) -> list[tuple[int, int]]:
        """Caches the next chunk of every prompt; those that are over get their first token."""
        prompts = [s.tokens for s in self.prefilling]
        tables, cached = [s.tables for s in self.prefilling], [s.cached for s in self.prefilling]
        chunks = self.model.prefill(self.cache, prompts, tables, cached)  # [S, Q, H]
        over, last = [], []
        for sequence, chunk in zip(self.prefilling, chunks, strict=True):
            left = len(sequence.tokens) - sequence.cached
            sequence.cached += min(left, len(chunk))
            if left <= len(chunk):
                over.append(sequence)
                last.append(chunk[left - 1])
        if not over:
            return []
        for sequence in over:
            self.prefilling.remove(sequence)
            self.running.append(sequence)
            if sequence.keep:
                self.prefix = Prefix(list(sequence.tokens), sequence.tables)
                sequence.tables = self.cache.fork(sequence.tables)
        return self.emit(over, torch.stack(last))

    def finish(self, sequence: Sequence) -> None:
        """Takes a sequence out of `running` and frees its pages, but for those of the prefix."""
        self.running.remove(sequence)
        kept = self.prefix.tables if sequence.keep else {}
        own = {kind: t for kind, t in sequence.tables.items() if t is not kept.get(kind)}
        self.cache.release(own)

    def decode(self) -> Tensor:
        """Caches the newest token of every running sequence. -> their hidden states, [S, H]."""
        positions = [[len(sequence.tokens) - 1] for sequence in self.running]
        step = self.cache.step(positions, [sequence.tables for sequence in self.running])
        tokens = torch.tensor([s.tokens[-1] for s in self.running], device=self.model.device)
        return self.model.forward(tokens, step, self.cache.pool)

    def replay(self) -> list[tuple[int, int]]:
        """A decode step as a graph. While its tokens come to the host the next step runs already,
        unless a sequence is known to leave or has joined. One that meets a stop token runs one step
        too many, whose token is dropped."""
        if self.flying is None:
            members = list(self.running)
            graph = DecodeGraph.of(self, members)
            graph.load(members)
            graph.launch(members)
            self.flying = graph, members
        graph, members = self.flying
        tokens = graph.landed()
        if members == self.running and all(s.remaining > 1 for s in members):
            graph.launch(members)
        else:
            self.flying = None
        tokens = [token for token, s in zip(tokens(), members, strict=False) if s in self.running]
        return self.accept([s for s in members if s in self.running], tokens)

    def emit(self, sequences: list[Sequence], hidden: Tensor) -> list[tuple[int, int]]:
        """Samples a token for each sequence from its hidden state [S, H]."""
        draws = [sequence.random.random() for sequence in sequences]
        draws = torch.tensor(draws, dtype=torch.float64, device=hidden.device)
        return self.accept(sequences, self.model.sample(hidden, draws, self.sampling).tolist())

    def accept(self, sequences: list[Sequence], tokens: list[int]) -> list[tuple[int, int]]:
        """Appends a token to each sequence; those that are done leave `running` and their pages."""
        emitted = []
        for sequence, token in zip(sequences, tokens, strict=True):
            if token < 0:
                where = f"prompt {sequence.index}, token {len(sequence.tokens)}"
                raise ValueError(f"{where}: the logits are NaN; the checkpoint holds NaN")
            sequence.tokens.append(token)
            sequence.remaining -= 1
            if token in self.stop_tokens or not sequence.remaining:
                self.finish(sequence)
            if token not in self.stop_tokens:
                emitted.append((sequence.index, token))
        return emitted


class DecodeGraph:
    """A decode step of up to `size` sequences as one graph: forward pass, unembedding, sampling,
    and the next step's tokens and positions, all on the device. CUDA and HIP."""

    def __init__(self, engine: Engine, size: int, widths: dict[str, int]):
        self.model, self.sampling, self.widths = engine.model, engine.sampling, widths
        self.pool, device = engine.cache.pool, engine.model.device
        self.tokens = torch.zeros(size, dtype=torch.int64, device=device)
        self.draws = torch.zeros(size, dtype=torch.float64, device=device)
        empty = functools.partial(torch.zeros, dtype=torch.int32, device=device)
        tables = {kind: empty(size, width) for kind, width in widths.items()}
        positions = torch.full((size, 1), -1, dtype=torch.int32, device=device)
        self.step = Step(positions, tables, engine.cache.page_size)
        # Pinned pairs: while one is in use on the device, the host has the other.
        self.pinned = [
            (torch.zeros(size, dtype=torch.int64).pin_memory(), torch.cuda.Event(),
             torch.zeros(size, dtype=torch.float64).pin_memory())
            for _ in range(2)
        ]  # fmt: skip
        self.launched = 0
        side = torch.cuda.Stream()  # compiles and warms up outside the capture
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(2):
                self.run()
        torch.cuda.current_stream().wait_stream(side)
        self.graph = torch.cuda.CUDAGraph()
        # NCCL's watchdog asks for its events meanwhile, from another thread.
        with torch.cuda.graph(self.graph, capture_error_mode="thread_local"):
            self.run()

    @staticmethod
    def of(engine: Engine, sequences: list[Sequence]) -> "DecodeGraph":
        """The engine's graph for these sequences, captured at first use. Batches of more than 16
        are filled up by padding, full tables to a power of two."""
        size = len(sequences)
        size = size if size <= 16 else -(-size // 16) * 16
        longest = max(len(table) for s in sequences for table in s.tables.values())
        page_size = engine.cache.page_size
        length = (1 << (longest - 1).bit_length()) * page_size
        most = engine.model.config.sliding_window + length  # a whole ring, whatever the length
        widths = pages_needed(engine.model.config, length, page_size)
        rings = pages_needed(engine.model.config, most, page_size)
        widths |= {k: w for k, w in rings.items() if k == "sliding_attention"}
        key = size, *widths.values(), engine.sampling.unseeded()
        graphs = engine.cache.graphs
        if key not in graphs:
            graphs[key] = DecodeGraph(engine, size, widths)
        return graphs[key]

    def run(self) -> None:
        hidden = self.model.forward(self.tokens, self.step, self.pool)
        tokens = self.model.sample(hidden, self.draws, self.sampling)
        padding = self.step.positions[:, 0] < 0
        self.tokens.copy_(tokens.where(~padding, tokens[0]).clamp(min=0))
        self.sampled = tokens
        self.step.positions.add_((self.step.positions >= 0).int())

    def load(self, sequences: list[Sequence]) -> None:
        """Puts the sequences in. Padding repeats the first one's token and, as `attention` sees to,
        all that follows from it, so that it meets no expert of its own; it caches nothing."""
        S, empty = len(self.tokens), {kind: [] for kind in self.widths}
        rows = sequences + [None] * (S - len(sequences))
        tokens = [(s or sequences[0]).tokens[-1] for s in rows]
        positions = [[len(s.tokens) - 1 if s else -1] for s in rows]
        tables = block_tables([s.tables if s else empty for s in rows], self.widths)
        self.tokens.copy_(torch.tensor(tokens))
        self.step.positions.copy_(torch.tensor(positions))
        for kind, table in tables.items():
            self.step.tables[kind].copy_(table)

    def launch(self, sequences: list[Sequence]) -> None:
        """One step; its tokens are on their way to the host."""
        tokens, event, draws = self.pinned[self.launched % 2]
        if self.sampling.temperature:
            for row, sequence in enumerate(sequences):
                draws[row] = sequence.random.random()
            self.draws.copy_(draws, non_blocking=True)
        self.graph.replay()
        tokens.copy_(self.sampled, non_blocking=True)
        event.record()
        self.launched += 1

    def landed(self) -> Callable[[], list[int]]:
        """What gives the tokens of the step launched last, once they are here."""
        tokens, event, _ = self.pinned[(self.launched - 1) % 2]

        def read() -> list[int]:
            event.synchronize()
            return tokens.tolist()

        return read


def sample(logits: Tensor, draws: Tensor, sampling: Sampling) -> Tensor:
    """One token per row, -1 for a row that holds NaN. logits [S, V] float32, draws [S] float64,
    uniform in [0, 1). Temperature 0: the largest logit. Else inverse transform sampling from
    softmax(logits / temperature), cut to the top_k likeliest, renormalised, then cut to the
    likeliest whose sum reaches top_p. Nothing waits for the device."""
    largest, token = logits.max(-1, keepdim=True)  # NaN if there is one
    bad = largest.isnan()[:, 0]
    if sampling.temperature == 0:
        return token[:, 0].masked_fill(bad, -1)
    # Differences in float64, so that a temperature near 0 is greedy and does not overflow.
    share = ((logits.double() - largest) / sampling.temperature).softmax(-1).float()
    share, token = share.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        share[:, sampling.top_k :] = 0
    if sampling.top_p is not None:
        share = share / share.sum(-1, keepdim=True)
        share = share.masked_fill(share.cumsum(-1) - share >= sampling.top_p, 0)
    total = share.double().cumsum(-1)
    rank = (total <= draws[:, None] * total[:, -1:]).sum(-1)
    # The product may have rounded up to the whole.
    rank = rank.minimum((share > 0).sum(-1) - 1).clamp(min=0)
    return token.gather(1, rank[:, None])[:, 0].masked_fill(bad, -1)


# --------------------------------------------------------------------------------------------------
# Chat: the Harmony format

SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: {date}\n\nReasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)
EFFORTS = ("low", "medium", "high")


def chat_tokens(
    tokenizer: tiktoken.Encoding,
    turns: list[tuple[str, str]],
    date: str,
    effort: str,
    instructions: str | None = None,
) -> list[int]:
    """A conversation as the tokens a Harmony model continues. turns: ("user" | "assistant", text)
    in order, an assistant's text being its final channel; date: YYYY-MM-DD; effort: low, medium or
    high; instructions: the developer message. Text cannot smuggle in special tokens. Raises
    ValueError for another role or effort, KeyError where the tokenizer has no Harmony tokens."""
    if effort not in EFFORTS:
        raise ValueError(f"effort={effort!r}, expected one of {', '.join(EFFORTS)}")
    for role, _ in turns:
        if role not in ("user", "assistant"):
            raise ValueError(f"role {role!r}, expected user or assistant; use instructions=")
    start, channel, message, end = map(
        tokenizer.encode_single_token, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    )
    messages = [("system", SYSTEM.format(date=date, effort=effort))]
    if instructions is not None:
        messages.append(("developer", f"# Instructions\n\n{instructions}"))
    tokens = []
    for role, text in [*messages, *turns]:
        tokens += [start, *tokenizer.encode_ordinary(role)]
        if role == "assistant":
            tokens += [channel, *tokenizer.encode_ordinary("final")]
        tokens += [message, *tokenizer.encode_ordinary(text), end]
    return tokens + [start, *tokenizer.encode_ordinary("assistant")]


@dataclass(frozen=True)
class Message:
    """One message of a completion."""

    channel: str | None  # "analysis", "commentary", "final", or what the model wrote; None: nothing
    recipient: str | None  # of a tool call, such as "functions.f"
    content_type: str | None  # such as "<|constrain|>json"
    text: str


def parse_completion(tokenizer: tiktoken.Encoding, tokens: list[int]) -> list[Message]:
    """The messages of a completion, with or without its stop token. Whatever the model wrote is in
    one of them: where a header is not well-formed, what is left of it begins the text."""
    reader = Reader(tokenizer)
    for token in tokens:
        reader.read(token)
    reader.close()
    return reader.messages


def parse_header(header: str, role: bool, complete: bool) -> Message:
    """The message that follows a header, without its text, but for words of the header that belong
    nowhere else. role: the header begins with one, after <|start|>. complete: <|message|> followed;
    else the model left the marker out and what is not the channel is its text."""
    assistant = re.match(r"\s*assistant(?![^\s<])", header) if role or complete else None
    words, mark, rest = header[assistant.end() if assistant else 0 :].partition("<|channel|>")
    name = re.match(r"\s+(?:analysis|commentary|final)(?![^\s<])|[^\s<]*", rest).group()
    words, channel = words + rest[len(name) :], name.strip() or None
    if not complete:
        return Message(channel, None, None, words.strip())
    parts = re.sub(r"<\|constrain\|>\s*", " <|constrain|>", words).split()
    types = [part for part in parts if part.startswith("<|constrain|>")]
    parts = [part for part in parts if part not in types]
    named = [index for index, part in enumerate(parts) if part.startswith("to=")]
    # A word without to= is a recipient only in a header that is otherwise well-formed.
    well_formed = (assistant or not role) and (channel or not mark) and len(parts + types) <= 2
    recipient = None
    if named or parts and well_formed:
        index = named[-1] if named else 0
        recipient = parts.pop(index).removeprefix("to=")
        if not types and len(parts[index:]) == 1:  # a type without <|constrain|> comes behind it
            types = [parts.pop()]
    left = "".join(f"{part} " for part in [*parts, *types[1:]])
    return Message(channel, recipient, types[0] if types else None, left)


class Reader:
    """Tells the messages of a completion apart while its tokens come. It begins inside a header,
    since a prompt ends with <|start|>assistant. With chat=False all is the text of one message."""

    def __init__(self, tokenizer: tiktoken.Encoding, chat: bool = True):
        self.tokenizer, self.messages = tokenizer, []  # those that are complete
        names = tokenizer.special_tokens_set if chat else ()
        self.name_of = {tokenizer.encode_single_token(name): name for name in names}
        self.header, self.role = b"", False  # what came of a header, whether it begins with a role
        self.message = None if chat else Message(None, None, None, "")  # whose text is coming
        self.decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self.text = ""

    def read(self, token: int) -> tuple[Message, str] | None:
        """The message whose text the token continues, as its header says, and the piece of text;
        None if the token gives no text."""
        name = self.name_of.get(token)
        if self.message is None:
            if name == "<|message|>":
                header = self.header.decode(errors="replace")
                self.message = parse_header(header, self.role, complete=True)
                return self.give(self.message.text)
            if name in ("<|start|>", "<|end|>", *weights.ENDS):
                piece = self.close()
                self.role = name == "<|start|>"
                return piece
            self.header += self.bytes_of(token)
            return None
        if name in ("<|end|>", *weights.ENDS):
            return self.close()
        return self.give(self.decoder.decode(self.bytes_of(token)))

    def close(self) -> tuple[Message, str] | None:
        """Ends the message: read()'s last piece."""
        if self.message is None:
            header = self.header.decode(errors="replace")
            message = parse_header(header, self.role, complete=False)
            if message.channel is None and not message.text:
                self.header, self.role = b"", False
                return None
            self.message, piece = message, message.text
        else:
            piece = self.decoder.decode(b"", final=True)
        given = self.give(piece)
        self.messages.append(replace(self.message, text=self.text))
        self.header, self.role, self.message, self.text = b"", False, None, ""
        return given

    def give(self, piece: str) -> tuple[Message, str] | None:
        self.text += piece
        return (self.message, piece) if piece else None

    def bytes_of(self, token: int) -> bytes:
        try:
            return self.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # the vocabulary is padded beyond the tokenizer's
            return "\N{REPLACEMENT CHARACTER}".encode()


# --------------------------------------------------------------------------------------------------
# Command line


def whole(least: int) -> Callable[[str], int]:
    """An argument's type: a whole number of at least `least`."""

    def parse(text: str) -> int:
        if not re.fullmatch(r"-?\d+", text) or int(text) < least:
            raise argparse.ArgumentTypeError(f"{text!r} is no whole number of at least {least}")
        return int(text)

    return parse


def number(expected: str, allowed: Callable[[float], bool]) -> Callable[[str], float]:
    def parse(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            value = math.nan
        if not allowed(value):
            raise argparse.ArgumentTypeError(f"{text!r} is no {expected}")
        return value

    return parse


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="gptoss", description="Generate text with a GPT-OSS model.", allow_abbrev=False
    )
    add, positive = parser.add_argument, whole(1)
    where = "checkpoint folder (default: the small model in tiny/)"
    add("--checkpoint", default=TINY, metavar="DIR", help=where)
    what = "may repeat: one batch; - reads standard input"
    add("--prompt", action="append", default=[], metavar="TEXT", help=what)
    add("--chat", action="store_true", help="talk to the model in a terminal")
    add("--raw", action="store_true", help="continue the text as it stands, not as a chat")
    add("--instructions", metavar="TEXT", help="the developer message of a chat")
    what = "print every channel of a chat answer, not the final one only"
    add("--show-reasoning", action="store_true", help=what)
    add("--effort", default="medium", choices=EFFORTS, help="how long a chat model reasons")
    add("--max-new-tokens", type=positive, default=512, metavar="N")
    temperature = number("finite number >= 0", lambda t: 0 <= t < math.inf)
    add("--temperature", type=temperature, default=0.0, help="0 (the default) is greedy")
    add("--top-k", type=positive, metavar="K", help="draw from the K likeliest tokens")
    top_p = number("number in (0, 1]", lambda p: 0 < p <= 1)
    add("--top-p", type=top_p, metavar="P", help="draw from the likeliest whose sum reaches P")
    add("--seed", type=int, metavar="N", help="same seed, same tokens")
    add("--device", help="default: cuda where there is one, else cpu")
    what = "default: float32 on a CPU, bfloat16 elsewhere"
    add("--dtype", choices=("float32", "bfloat16"), help=what)
    add("--ops", default="auto", choices=OPS, help="what computes a layer")
    what = "run the MoE layers' gfx950 kernels, emulated on the CPU: slow, exact"
    add("--emulate", action="store_true", help=what)
    what = "what the expert GEMMs see"
    add("--activations", default="auto", choices=("auto", *ACTIVATIONS), help=what)
    add("--page-size", type=positive, default=PAGE_SIZE, metavar="TOKENS")
    add("--num-pages", type=positive, metavar="N", help="KV pages (default: as many as needed)")
    what = "sequences that decode together"
    add("--max-batch", type=positive, default=MAX_BATCH, metavar="N", help=what)
    return parser


def check_arguments(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    """Ends the process, exit 2, for flags that contradict each other."""
    elsewhere = args.emulate and args.device not in (None, "cpu")
    for wrong, message in (
        (args.chat and args.prompt, "--chat asks for the prompts itself: leave out --prompt"),
        (not args.chat and not args.prompt, "give --prompt TEXT (- is standard input) or --chat"),
        (args.prompt.count("-") > 1, "--prompt - can read standard input only once"),
        (args.chat and args.raw, "--chat needs the chat format: leave out --raw"),
        (args.raw and args.instructions, "--instructions belong to a chat: leave out --raw"),
        (elsewhere, "--emulate runs on the cpu: leave out --device"),
        (args.emulate and args.ops == "torch", "--emulate runs the gluon kernels: leave out --ops"),
    ):
        if wrong:
            parser.error(message)
    for flag in ("top_k", "top_p", "seed"):
        if args.temperature == 0 and getattr(args, flag) is not None:
            say(f"--{flag.replace('_', '-')} has no effect without --temperature")


def say(message: str) -> None:
    print(f"gptoss: {message}", file=sys.stderr)


def read_stdin() -> str:
    """All of standard input, without its last newline: `echo` and editors add one that nobody
    means. Raises ValueError where there is none or it is not UTF-8."""
    if sys.stdin is None:
        raise ValueError("--prompt -: standard input is closed")
    try:
        return sys.stdin.buffer.read().decode().removesuffix("\n").removesuffix("\r")
    except UnicodeDecodeError as error:
        raise ValueError(f"--prompt -: standard input is not UTF-8: {error}") from error


class Answer:
    """The answer to a prompt, as text that grows. Shown is what is meant for the user: the final
    channel, or what has none or goes to a tool in its place; or, if asked for, everything, each
    message with its channel."""

    def __init__(self, tokenizer: tiktoken.Encoding, chat: bool, everything: bool):
        self.reader, self.everything = Reader(tokenizer, chat), everything
        self.text, self.message = "", None  # and the message that it shows last
        self.times: list[float] = []  # when each token came

    def add(self, given: tuple[Message, str] | None) -> None:
        """Takes what the reader gave for a token."""
        message, piece = given or (None, "")
        if message is None:
            return
        for_user = message.channel in ("final", None) or message.recipient is not None
        if for_user or self.everything:
            if message is not self.message:
                label = " to ".join(filter(None, (message.channel, message.recipient)))
                labelled = label and (self.everything or label != "final")
                self.text += "\n" * bool(self.text) + f"{label}: " * bool(labelled)
            self.text, self.message = self.text + piece, message

    def final(self) -> str:
        """What the next turn of the conversation remembers of it."""
        return "".join(m.text for m in self.reader.messages if m.channel in ("final", None))


def answer(engine: Engine, answers: dict[int, Answer]) -> None:
    """Generates for the prompts in the engine; prints on stdout, the first unfinished answer as it
    comes and those behind it in their turn, and the statistics on stderr. answers: by index of the
    prompt."""
    start, waiting, printed = time.perf_counter(), list(answers), ""
    try:
        while engine.unfinished():
            for index, token in engine.step():
                answers[index].times.append(time.perf_counter())
                answers[index].add(answers[index].reader.read(token))
            unfinished = {sequence.index for sequence in engine.unfinished()}
            for index in set(answers) - unfinished:
                answers[index].add(answers[index].reader.close())
            while waiting:
                label = f"[{waiting[0]}] " if len(answers) > 1 else ""
                text = label + answers[waiting[0]].text
                print(text[len(printed) :], end="", flush=True)
                printed = text
                if waiting[0] in unfinished:
                    break
                print(flush=True)
                waiting, printed = waiting[1:], ""
    finally:
        if printed:
            print(flush=True)
        report(engine, [a.times for a in answers.values()], start)


def report(engine: Engine, times: list[list[float]], start: float) -> None:
    """One line of statistics on stderr. times: when each token of each prompt came, seconds."""

    def mean(seconds: list[float]) -> str:
        return f"{1e3 * sum(seconds) / len(seconds):.2f} ms" if seconds else "-"

    ttft = mean([t[0] - start for t in times if t])
    tpot = mean([(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1])
    count, seconds, cache = sum(map(len, times)), time.perf_counter() - start, engine.cache
    print(
        f"{count} tokens | TTFT {ttft} | TPOT {tpot} | {count / seconds:.1f} tok/s | pages "
        f"{cache.peak} of {cache.num_pages} x {cache.page_size} tokens{peak_memory(cache.pool)}",
        file=sys.stderr,
    )


def peak_memory(pool: Tensor) -> str:
    """The most memory used so far, of the pool's GPU or of this process, where it can be told."""
    if pool.is_cuda:
        peak = torch.cuda.max_memory_allocated(pool.device)
    elif importlib.util.find_spec("resource"):  # not on Windows
        import resource

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        peak *= 1 if sys.platform == "darwin" else 1024
    else:
        return ""
    return f" | peak memory {peak / 2**30:.2f} GiB"


def answer_prompts(model: GPTOSS, tokenizer: tiktoken.Encoding, chat: bool, args) -> None:
    """The answers to all --prompt, as one batch."""

    def read() -> tuple[list[str], str]:
        texts = [read_stdin() if text == "-" else text for text in args.prompt]
        return texts, str(datetime.date.today())

    texts, today = model.ranks.first(read)
    if empty := [index for index, text in enumerate(texts) if not text.strip()]:
        raise ValueError(f"prompt {empty[0]} is empty")
    prompts = [
        chat_tokens(tokenizer, [("user", text)], today, args.effort, args.instructions)
        if chat
        else tokenizer.encode_ordinary(text)
        for text in texts
    ]
    sampling = args.temperature, args.top_k, args.top_p, args.seed
    pool = args.num_pages, args.page_size, args.max_batch
    engine = model.engine(prompts, args.max_new_tokens, *sampling, None, *pool)
    answers = {i: Answer(tokenizer, chat, args.show_reasoning) for i in range(len(prompts))}
    answer(engine, answers)
    for index, a in answers.items():
        if a.text or not chat:
            continue
        if len(a.times) == args.max_new_tokens:
            cause = f"no final channel within {len(a.times)} tokens; raise --max-new-tokens"
        else:
            cause = "it ended without a final channel"
        say(f"prompt {index}: {cause}, or see --show-reasoning")


def converse(model: GPTOSS, tokenizer: tiktoken.Encoding, args) -> None:
    """The interactive chat, until end of file. What was said stays cached, so that a turn prefills
    only what is new."""
    if sys.stdin is None:
        raise ValueError("--chat: standard input is closed")
    first, turns, engine = model.ranks.first, [], None
    today = first(lambda: str(datetime.date.today()))
    say("Ctrl-C ends an answer, Ctrl-D the chat")
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        try:
            line = first(sys.stdin.readline)
        except UnicodeDecodeError as error:
            raise ValueError(f"--chat: standard input is not UTF-8: {error}") from error
        if not line:
            return
        if not line.strip():
            continue
        turns.append(("user", line.strip()))
        engine = engine or chat_engine(model, args)
        if not submit_turns(engine, tokenizer, turns, today, args):
            continue
        reply = Answer(tokenizer, True, args.show_reasoning)
        try:
            answer(engine, {engine.submitted - 1: reply})
        except KeyboardInterrupt:  # the engine stopped in the middle of a step
            reply.reader.close()
            engine = None
        turns.append(("assistant", reply.final()))


def chat_engine(model: GPTOSS, args) -> Engine:
    """An engine for one sequence at a time, as long as the model and the memory allow."""
    c, num_pages = model.config, args.num_pages
    if num_pages is None:
        needed = pages_needed(c, c.max_position_embeddings, args.page_size)
        most = sum(needed.values()) + needed.get("sliding_attention", 0)
        num_pages = min(most, model.pages_that_fit(args.page_size))
    sampling = Sampling(args.temperature, args.top_k, args.top_p, args.seed)
    return Engine(model, num_pages, args.page_size, 1, sampling, model.stop_tokens)


def submit_turns(engine: Engine, tokenizer, turns: list[tuple[str, str]], today: str, args) -> bool:
    """Queues the conversation, without its oldest turns if it is too long. False if the last turn
    alone is."""
    while True:
        tokens = chat_tokens(tokenizer, turns, today, args.effort, args.instructions)
        try:
            engine.submit(tokens, args.max_new_tokens, keep=True)
            return True
        except ValueError as error:
            if len(turns) == 1:
                say(as_typed(error))
                turns.clear()
                return False
        del turns[:2]
        say("the conversation became too long: its oldest question and answer are forgotten")


@contextlib.contextmanager
def emulated_gpu():
    """Makes an emulated gfx950 Triton's active device; says on stderr what ran on it."""
    try:
        import gfx950
    except ImportError as error:
        raise ValueError(f"--emulate needs Triton and the emulator in gfx950/: {error}") from error

    with gfx950.emulate() as gpu:
        try:
            yield
        finally:
            counts = collections.Counter(launch.name for launch in gpu.launches)
            executed = sum(
                launch.counters.wave_instructions for launch in gpu.launches if launch.counters
            )
            seconds = sum(launch.seconds for launch in gpu.launches)
            launched = ", ".join(f"{n} {name}" for name, n in counts.items())
            print(
                f"emulated gfx950: {executed:,} wave-instructions in {seconds:.0f} s; launches: "
                f"{launched}",
                file=sys.stderr,
            )


def as_typed(error: Exception) -> str:
    """An error's first line, with arguments named as on the command line."""
    line = str(error).partition("\n")[0]
    for action in arguments()._actions:
        flag = action.option_strings[0]
        if "_" in action.dest:
            line = re.sub(rf"\b{action.dest}\b", flag, line)
        line = re.sub(rf"^({flag}|{action.dest})=", f"{flag} ", line)
    return line


def run(args: argparse.Namespace, device: str, ranks: Ranks) -> None:
    tokenizer = weights.load_tokenizer(args.checkpoint)
    chat = not args.raw and "<|channel|>" in tokenizer.special_tokens_set
    if not chat and (args.chat or args.instructions):
        flag = "--chat" if args.chat else "--instructions"
        raise ValueError(f"{flag} needs a chat model: {args.checkpoint} has no Harmony tokens")
    with emulated_gpu() if args.emulate else contextlib.nullcontext():
        ops = "gluon" if args.emulate else args.ops
        dtype = getattr(torch, args.dtype) if args.dtype else None
        start = time.perf_counter()
        settings = dtype, ops, args.activations
        model = GPTOSS.from_pretrained(args.checkpoint, device, *settings, ranks=ranks)
        if model.device.type == "cuda":
            room = model.pages_that_fit(args.page_size) * args.page_size
            seconds = time.perf_counter() - start
            say(f"loaded in {seconds:.1f} s; the memory left caches {room:,} tokens")
        if args.chat:
            converse(model, tokenizer, args)
        else:
            answer_prompts(model, tokenizer, chat, args)


def main() -> int:
    signal.signal(signal.SIGINT, signal.default_int_handler)
    hush_other_ranks()
    parser, ranks = arguments(), Ranks()
    args = parser.parse_args()
    check_arguments(parser, args)
    cuda = torch.cuda.is_available() and not args.emulate
    device = args.device or ("cuda" if cuda else "cpu")
    try:
        if sys.stdout is None:
            raise OSError(errno.EBADF, "standard output is closed")
        sys.stdout.reconfigure(errors="replace")  # a terminal may lack the answer's characters
        if sys.stdin is not None:
            sys.stdin.reconfigure(encoding="utf-8", errors="strict")
        ranks = Ranks.join(device)
        run(args, device, ranks)
        ranks.leave()
    except (CheckpointError, ValueError, TypeError, RuntimeError) as error:
        ranks.fail(f"gptoss: {as_typed(error)}")
        return 1
    except OSError as error:
        ranks.fail(f"gptoss: {error.filename or 'standard output'}: {error.strerror}")
        return 1
    except KeyboardInterrupt:
        return 130
    finally:
        leave_quietly()
    return 0


def leave_quietly() -> None:
    """What is left in stdout's buffer is dropped if stdout cannot take it, and an interrupt from
    here on ends the process without a traceback."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


if __name__ == "__main__":
    sys.exit(main())
