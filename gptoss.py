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

import argparse
import codecs
import collections
import contextlib
import datetime
import functools
import importlib.util
import math
import os
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, fields, replace
from typing import NamedTuple

import tiktoken
import torch
import torch.nn.functional as F
from torch import Tensor

import weights
from weights import MX_GROUP, CheckpointError, Config, Experts

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny")  # the embedded model
PAGE_SIZE = 16  # tokens of a KV page
MAX_BATCH = 64  # sequences that decode together
PREFILL_TOKENS = 1024  # tokens of a prompt that run together
SCORES = 1 << 26  # heads x queries x keys whose attention scores are in memory together
EXPAND_BELOW = 1 << 25  # bytes: a layer's experts that are smaller as float32 are expanded, at load
ACTIVATIONS = ("bf16", "fp8", "mxfp8", "mxfp4")
OPS = ("auto", "torch", "gluon")
SWIGLU_ALPHA = weights.ARCHITECTURE["swiglu_alpha"]


@dataclass(frozen=True)
class Step:
    """What a forward pass is told beside its tokens: S sequences of Q consecutive tokens each.

    A sequence has one block table for each kind of layer. Position p lies at ring index p mod C,
    C = P * page_size: a full layer has pages for every token, so its ring never wraps; a sliding
    layer stops at ceil(window / page_size) pages and then overwrites what has left the window."""

    positions: Tensor  # int32 [S, Q]; -1 is padding, which caches nothing
    tables: dict[str, Tensor]  # kind of layer -> int32 [S, P], pages in ring order, then page 0
    page_size: int  # tokens


class Ops(NamedTuple):
    """The five operations in which devices differ. None of them sees a model or a layer, and none
    writes to anything but the pool. EQUATIONS below are their definition."""

    prepare: Callable  # (experts, activations) -> packed; once a layer, at load
    plan: Callable  # (step, config) -> whatever `attention` needs of it; once a step
    add_norm: Callable  # (x [T, H], y [T, H] | None, scale [H], eps) -> (x + y, its RMS norm)
    attention: Callable  # (qkv [T, (N+2G)D], sinks, pool [slots, 2, G, D], kind, plan) -> [T, ND]
    moe: Callable  # (x [T, H], router_weight, router_bias, packed, k, activations, limit) -> [T, H]
    capturable: bool  # no operation waits for the device: a decode step can be a graph
    dtypes: tuple[torch.dtype, ...] = (torch.float32, torch.bfloat16)  # that x may have


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
    even and saturate."""
    largest_exponent, largest = (8, 448.0) if activations == "mxfp8" else (2, 6.0)
    groups = x.unflatten(-1, (-1, MX_GROUP))  # [..., K/32, 32]
    bits = groups.abs().amax(-1, keepdim=True).view(torch.int32)
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
    return frequency.to(device), 0.1 * math.log(config.rope_factor) + 1


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
    """The operations called `name`: "torch", the equations; "gluon", the gfx950 kernels of the MoE
    layer and the equations for the rest; "auto", gluon where a gfx950, real or emulated, is
    Triton's active device and `device` belongs to it, else torch. Raises ValueError for another
    name, and for what cannot run here."""
    if name not in OPS:
        raise ValueError(f"ops={name!r}, expected one of {', '.join(OPS)}")
    if name == "torch" or not on_gfx950(device):
        if name == "gluon":
            raise ValueError(
                "ops='gluon' needs Triton with an active gfx950 (MI350, MI355 or emulated) that "
                f"owns device {device}; use ops='torch'"
            )
        return EQUATIONS
    import moe_gluon

    return EQUATIONS._replace(
        prepare=moe_gluon.prepare, moe=moe_gluon.moe, dtypes=(torch.bfloat16,)
    )


def on_gfx950(device: torch.device) -> bool:
    """Whether Triton is installed and its active driver is a gfx950 to which `device` belongs."""
    if importlib.util.find_spec("triton") is None or importlib.util.find_spec("moe_gluon") is None:
        return False
    import triton

    import moe_gluon

    if not moe_gluon.is_supported():
        return False
    # A driver that does not say where its tensors live is an emulator's.
    owner = getattr(triton.runtime.driver.active, "get_active_torch_device", None)
    return device.type == (owner().type if owner else "cpu")


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

    def allocate(self, length: int) -> dict[str, list[int]]:
        """Block tables, by kind, for a sequence that may grow to `length` tokens."""
        needed = pages_needed(self.config, length, self.page_size)
        tables = {kind: [self.free.pop() for _ in range(n)] for kind, n in needed.items()}
        self.peak = max(self.peak, self.num_pages - len(self.free))
        return tables

    def release(self, tables: dict[str, list[int]]) -> None:
        for table in tables.values():
            self.free.extend(table)

    def step(self, positions: list[list[int]], tables: list[dict[str, list[int]]]) -> Step:
        """The step of sequences at these positions. Tables are cut to the pages that the longest
        sequence uses, and shorter ones filled up with page 0."""
        longest = 1 + max(row[-1] for row in positions)
        device, cut = self.pool.device, {}
        for kind, width in pages_needed(self.config, longest, self.page_size).items():
            pages = [(table[kind] + [0] * width)[:width] for table in tables]
            cut[kind] = torch.tensor(pages, dtype=torch.int32, device=device)
        return Step(torch.tensor(positions, dtype=torch.int32, device=device), cut, self.page_size)


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
    ):
        self.config, self.layout = checkpoint.config, checkpoint.layout
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
        self.activations = choose_activations(activations, checkpoint.experts[0], self.ops)
        self.stop_tokens = frozenset(self.config.eos_token_id)
        self.load(checkpoint)

    @classmethod
    def from_pretrained(
        cls, path, device="cpu", dtype=None, ops="auto", activations="auto"
    ) -> "GPTOSS":
        """Loads the checkpoint folder `path`. dtype None: bfloat16, but float32 where the equations
        run on a CPU. ops: see `choose_ops`. activations "auto": what the checkpoint was made for,
        "fp8" for Quark's layout and else "bf16", or "mxfp8" where the ops do not multiply these.
        Raises weights.CheckpointError for a bad checkpoint, ValueError for a bad argument."""
        return cls(weights.load(path), device, dtype, ops, activations)

    def load(self, checkpoint: weights.Checkpoint) -> None:
        """Moves the weights to the device, a layer at a time."""
        c, dense = self.config, checkpoint.dense

        def moved(name: str, dtype=self.dtype) -> Tensor:
            return dense[name].to(self.device, dtype)

        self.embedding, self.unembedding = moved("embedding"), moved("unembedding")
        self.norm = moved("norm", torch.float32)
        self.layers = []
        for n in weights.progress(range(c.num_hidden_layers), f"to {self.device}"):
            kind, experts = c.layer_types[n], checkpoint.experts[n]
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
            x, h = ops.add_norm(x, y, layer.attn_norm, c.rms_norm_eps)
            qkv = F.linear(h, layer.qkv_weight, layer.qkv_bias)  # [T, (N + 2G) D]
            a = ops.attention(qkv, layer.sinks, pool[layer.depth], layer.kind, plan)  # [T, N D]
            y = F.linear(a, layer.out_weight, layer.out_bias)
            x, h = ops.add_norm(x, y, layer.mlp_norm, c.rms_norm_eps)
            router, top_k = (layer.router_weight, layer.router_bias), c.num_experts_per_tok
            y = ops.moe(h, *router, layer.packed, top_k, self.activations, c.swiglu_limit)
        return ops.add_norm(x, y, self.norm, c.rms_norm_eps)[1]

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> Tensor:
        """Teacher-forced logits, float32 [T, V]; row t predicts token t + 1. Raises ValueError for
        a bad prompt."""
        self.check_prompt(0, tokens, 0)
        pages = sum(pages_needed(self.config, len(tokens), PAGE_SIZE).values())
        cache = KVCache(self.config, pages, PAGE_SIZE, self.device, self.dtype)
        hidden = torch.cat(list(self.prefill(cache, tokens, cache.allocate(len(tokens)))))
        return F.linear(hidden, self.unembedding).float()

    def prefill(
        self, cache: KVCache, tokens: list[int], tables: dict[str, list[int]]
    ) -> Iterator[Tensor]:
        """Runs a prompt through the model in chunks; yields the hidden states [Q, H] of each."""
        for start in range(0, len(tokens), PREFILL_TOKENS):
            chunk = tokens[start : start + PREFILL_TOKENS]
            step = cache.step([list(range(start, start + len(chunk)))], [tables])
            yield self.forward(torch.tensor(chunk, device=self.device), step, cache.pool)

    def check_prompt(self, index: int, prompt: list[int], max_new_tokens: int) -> None:
        """Raises ValueError for a prompt that cannot run."""
        if not prompt:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
        if bad := [t for t in prompt if not 0 <= t < self.config.vocab_size]:
            raise ValueError(
                f"prompt {index} has token {bad[0]}, outside the vocabulary of "
                f"{self.config.vocab_size}"
            )
        if len(prompt) + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"prompt {index} is too long: {len(prompt)} tokens and {max_new_tokens} new ones "
                f"exceed the model's context of {self.config.max_position_embeddings}"
            )

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

        temperature 0 is greedy. A prompt's tokens under a `seed` do not depend on its batch. A stop
        token ends a prompt and is left out; stop_tokens None: the checkpoint's own. num_pages None:
        as many as needed, within the memory of a GPU. Raises ValueError, before anything runs, for
        an argument out of range and for a prompt that is empty, too long or can never have its
        pages."""
        if max_new_tokens < 0 or page_size < 1 or max_batch < 1:
            raise ValueError(
                f"{max_new_tokens=} must not be negative, {page_size=} and {max_batch=} must be "
                "positive"
            )
        sampling = Sampling(temperature, top_k, top_p, seed)
        stop = self.stop_tokens if stop_tokens is None else frozenset(stop_tokens)
        for index, prompt in enumerate(prompts):
            self.check_prompt(index, prompt, max_new_tokens)
        if num_pages is None:
            lengths = [len(prompt) + max_new_tokens for prompt in prompts]
            needed = [sum(pages_needed(self.config, n, page_size).values()) for n in lengths]
            num_pages = min(sum(sorted(needed)[-max_batch:]), self.pages_that_fit(page_size))
        engine = Engine(self, num_pages, page_size, max_batch, sampling, stop)
        for prompt in prompts:
            engine.submit(prompt, max_new_tokens)
        return engine

    def pages_that_fit(self, page_size: int) -> int:
        """Pages for 90% of a GPU's free memory; a CPU's is not measured."""
        if self.device.type != "cuda":
            return sys.maxsize
        one = KVCache(self.config, 0, page_size, "meta", self.dtype).pool
        # Blocks that PyTorch keeps for reuse are free too, though the driver counts them as taken.
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        free = torch.cuda.mem_get_info(self.device)[0] + kept
        return int(0.9 * free) // (one.numel() * one.itemsize)


def choose_activations(name: str, experts: Experts, ops: Ops) -> str:
    """What the expert GEMMs see. "auto": what the checkpoint was made for, if `ops` multiply it,
    else mxfp8. Raises ValueError for what they do not multiply."""
    if name != "auto":
        return name
    published = "bf16" if experts.gate_up_input_scale is None else "fp8"
    try:
        ops.prepare(experts, published)
    except ValueError:
        return "mxfp8"
    return published


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
        temperature, top_k, top_p = self.temperature, self.top_k, self.top_p
        if temperature < 0:
            raise ValueError(f"{temperature=} must not be negative")
        if top_k is not None and top_k < 1:
            raise ValueError(f"{top_k=} must be at least 1")
        if top_p is not None and not 0 < top_p <= 1:
            raise ValueError(f"{top_p=} must be in (0, 1]")


@dataclass(eq=False)
class Sequence:
    """A prompt on its way through the engine."""

    index: int  # in the order of submission
    tokens: list[int]  # prompt and generated; all but the newest are cached
    remaining: int  # tokens it may still generate
    random: random.Random
    tables: dict[str, list[int]] = field(default_factory=dict)  # block tables, by kind of layer


class Engine:
    """Continuous batching: a prompt waits until one of `max_batch` places is free and the pool has
    the pages for all it may become; prompts are prefilled as soon as they fit, one by one, and all
    running sequences decode together."""

    def __init__(
        self,
        model: GPTOSS,
        num_pages: int,
        page_size: int,
        max_batch: int,
        sampling: Sampling,
        stop_tokens: frozenset[int],
    ):
        self.model, self.max_batch = model, max_batch
        self.sampling, self.stop_tokens = sampling, stop_tokens
        self.cache = KVCache(model.config, num_pages, page_size, model.device, model.dtype)
        self.waiting: collections.deque[Sequence] = collections.deque()
        self.running: list[Sequence] = []
        self.submitted = 0

    def submit(self, tokens: list[int], max_new_tokens: int) -> None:
        """Queues a prompt. Raises ValueError if it can never run."""
        index, cache = self.submitted, self.cache
        self.model.check_prompt(index, tokens, max_new_tokens)
        length = len(tokens) + max_new_tokens
        pages = sum(pages_needed(self.model.config, length, cache.page_size).values())
        if pages > cache.num_pages:
            raise ValueError(
                f"prompt {index} needs {pages} pages of {cache.page_size} tokens for {len(tokens)} "
                f"tokens and {max_new_tokens} new ones, the pool has {cache.num_pages}; raise "
                "num_pages or lower max_new_tokens"
            )
        self.submitted += 1
        if max_new_tokens:
            seed = self.sampling.seed
            draws = random.Random(None if seed is None else f"{seed}/{index}")
            self.waiting.append(Sequence(index, list(tokens), max_new_tokens, draws))

    def tokens(self) -> Iterator[tuple[int, int]]:
        """(index of the prompt, its next token), until no prompt is left."""
        while self.waiting or self.running:
            yield from self.step()

    @torch.inference_mode()
    def step(self) -> list[tuple[int, int]]:
        """One forward pass of the first waiting prompt, if it fits, else of all running sequences.
        -> (index, token) of every sequence that got a token, stop tokens left out."""
        if self.waiting and self.admits(self.waiting[0]):
            sequence = self.waiting.popleft()
            self.running.append(sequence)
            return self.emit([sequence], self.prefill(sequence))
        return self.emit(list(self.running), self.decode())

    def admits(self, sequence: Sequence) -> bool:
        length = len(sequence.tokens) + sequence.remaining
        pages = pages_needed(self.model.config, length, self.cache.page_size)
        return len(self.running) < self.max_batch and sum(pages.values()) <= len(self.cache.free)

    def prefill(self, sequence: Sequence) -> Tensor:
        """Caches a prompt. -> the hidden state of its last token, [1, H]."""
        sequence.tables = self.cache.allocate(len(sequence.tokens) + sequence.remaining)
        for hidden in self.model.prefill(self.cache, sequence.tokens, sequence.tables):
            last = hidden[-1:]
        return last

    def decode(self) -> Tensor:
        """Caches the newest token of every running sequence. -> their hidden states, [S, H]."""
        positions = [[len(sequence.tokens) - 1] for sequence in self.running]
        step = self.cache.step(positions, [sequence.tables for sequence in self.running])
        tokens = torch.tensor([s.tokens[-1] for s in self.running], device=self.model.device)
        return self.model.forward(tokens, step, self.cache.pool)

    def emit(self, sequences: list[Sequence], hidden: Tensor) -> list[tuple[int, int]]:
        """Samples a token for each sequence from its hidden state [S, H]; those that are done leave
        `running` and their pages."""
        logits = F.linear(hidden, self.model.unembedding).float()  # [S, V]
        draws = [sequence.random.random() for sequence in sequences]
        tokens, emitted = sample(logits, draws, self.sampling).tolist(), []
        for sequence, token in zip(sequences, tokens, strict=True):
            sequence.tokens.append(token)
            sequence.remaining -= 1
            if token in self.stop_tokens or not sequence.remaining:
                self.running.remove(sequence)
                self.cache.release(sequence.tables)
            if token not in self.stop_tokens:
                emitted.append((sequence.index, token))
        return emitted


def sample(logits: Tensor, draws: list[float], sampling: Sampling) -> Tensor:
    """One token per row. logits [S, V] float32, draws: S uniform in [0, 1). Temperature 0: the
    largest logit. Else inverse transform sampling from softmax(logits / temperature), cut to the
    top_k likeliest, renormalised, then cut to the likeliest whose sum reaches top_p."""
    if sampling.temperature == 0:
        return logits.argmax(-1)
    share = (logits / sampling.temperature).softmax(-1)
    share, token = share.sort(dim=-1, descending=True, stable=True)
    if sampling.top_k is not None:
        share[:, sampling.top_k :] = 0
    if sampling.top_p is not None:
        share /= share.sum(-1, keepdim=True)
        share[share.cumsum(-1) - share >= sampling.top_p] = 0
    total = share.double().cumsum(-1)
    draw = torch.tensor(draws, device=total.device, dtype=total.dtype)[:, None]
    rank = (total <= draw * total[:, -1:]).sum(-1)
    # The product may have rounded up to the whole.
    rank = rank.minimum((share > 0).sum(-1) - 1)
    return token.gather(1, rank[:, None])[:, 0]


# --------------------------------------------------------------------------------------------------
# Chat: the Harmony format

SYSTEM = (
    "You are ChatGPT, a large language model trained by OpenAI.\nKnowledge cutoff: 2024-06\n"
    "Current date: {date}\n\nReasoning: {effort}\n\n"
    "# Valid channels: analysis, commentary, final. Channel must be included for every message."
)


def chat_tokens(
    tokenizer: tiktoken.Encoding, turns: list[tuple[str, str]], date: str, effort: str
) -> list[int]:
    """A conversation as the tokens a Harmony model continues. turns: ("user" | "assistant", text) in order, an
    assistant's text being its final channel; date: YYYY-MM-DD; effort: low, medium or high. Text cannot smuggle in
    special tokens. Raises KeyError where the tokenizer has no Harmony tokens."""
    start, channel, message, end = map(
        tokenizer.encode_single_token, ("<|start|>", "<|channel|>", "<|message|>", "<|end|>")
    )
    tokens = []
    for role, text in [("system", SYSTEM.format(date=date, effort=effort)), *turns]:
        tokens += [start, *tokenizer.encode_ordinary(role)]
        if role == "assistant":
            tokens += [channel, *tokenizer.encode_ordinary("final")]
        tokens += [message, *tokenizer.encode_ordinary(text), end]
    return tokens + [start, *tokenizer.encode_ordinary("assistant")]


class Reader:
    """Turns generated tokens into text as they come, and tells a chat model's channels apart."""

    def __init__(self, tokenizer: tiktoken.Encoding, chat: bool):
        self.tokenizer = tokenizer
        self.name_of = {
            tokenizer.encode_single_token(name): name for name in tokenizer.special_tokens_set
        }
        self.chat, self.channel, self.header = chat, None if chat else "final", None
        self.decode = codecs.getincrementaldecoder("utf-8")("replace").decode

    def read(self, token: int) -> tuple[str | None, str]:
        """The channel the token belongs to, None between messages, and the text it completes."""
        try:
            piece = self.tokenizer.decode_single_token_bytes(token)
        except KeyError:  # the vocabulary is padded beyond the tokenizer's
            piece = "\N{REPLACEMENT CHARACTER}".encode()
        name = self.name_of.get(token) if self.chat else None
        if name == "<|channel|>":
            self.channel, self.header = None, b""
        elif name == "<|message|>":  # "analysis", or "commentary to=tool"
            self.channel, self.header = (
                (self.header or b"final").decode(errors="replace").split()[0],
                None,
            )
        elif name in ("<|end|>", "<|start|>"):
            ended, self.channel = self.channel, None
            return ended, "\n" if ended else ""
        elif self.header is not None:
            self.header += piece
        elif self.channel and name is None:
            return self.channel, self.decode(piece)
        return None, ""


# --------------------------------------------------------------------------------------------------
# Command line


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Generate text with a GPT-OSS model.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default=TINY,
        metavar="DIR",
        help="checkpoint folder (default: the small model in tiny/)",
    )
    add(
        "--prompt",
        action="append",
        metavar="TEXT",
        help="may repeat: one batch; - reads standard input",
    )
    add("--chat", action="store_true", help="talk to the model in a terminal")
    add(
        "--raw", action="store_true", help="continue the text as it stands, without the chat format"
    )
    add(
        "--show-reasoning",
        action="store_true",
        help="print every channel of a chat answer, not the final one only",
    )
    add(
        "--effort",
        default="medium",
        choices=("low", "medium", "high"),
        help="how long a chat model reasons",
    )
    add("--max-new-tokens", type=int, default=512, metavar="N")
    add("--temperature", type=float, default=0.0, help="0 (the default) is greedy")
    add("--top-k", type=int, metavar="K")
    add("--top-p", type=float, metavar="P")
    add("--seed", type=int, metavar="N", help="same seed, same tokens")
    add("--device", help="default: cuda where there is one, else cpu")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: float32 on a CPU, bfloat16 elsewhere",
    )
    add("--ops", default="auto", choices=OPS, help="what computes a layer")
    add(
        "--emulate",
        action="store_true",
        help="run the MoE layers' gfx950 kernels, emulated on the CPU: slow, exact",
    )
    add(
        "--activations",
        default="auto",
        choices=("auto", *ACTIVATIONS),
        help="what the expert GEMMs see",
    )
    add("--page-size", type=int, default=PAGE_SIZE, metavar="TOKENS")
    add(
        "--num-pages",
        type=int,
        metavar="N",
        help="KV pages in the pool (default: as many as needed)",
    )
    add(
        "--max-batch",
        type=int,
        default=MAX_BATCH,
        metavar="N",
        help="sequences that decode together",
    )
    return parser


def answer(
    model: GPTOSS, tokenizer: tiktoken.Encoding, prompts: list[list[int]], args, chat: bool
) -> list[str]:
    """Generates for the prompts; prints the text on stdout, a single prompt's as it comes and
    several in order at the end, and the statistics on stderr. Returns the final channel of each."""
    ends = tokenizer.special_tokens_set & {"<|return|>", "<|call|>", "<|endoftext|>"}
    stop = model.stop_tokens.union(map(tokenizer.encode_single_token, ends))
    engine = model.engine(
        prompts,
        args.max_new_tokens,
        args.temperature,
        args.top_k,
        args.top_p,
        args.seed,
        stop,
        args.num_pages,
        args.page_size,
        args.max_batch,
    )
    readers = [Reader(tokenizer, chat) for _ in prompts]
    shown, final, times = [""] * len(prompts), [""] * len(prompts), [[] for _ in prompts]
    start = time.perf_counter()
    for index, token in engine.tokens():
        times[index].append(time.perf_counter())
        channel, text = readers[index].read(token)
        final[index] += text if channel == "final" else ""
        if channel == "final" or channel and args.show_reasoning:
            shown[index] += text
            if len(prompts) == 1:
                print(text, end="", flush=True)
    print("" if len(prompts) == 1 and shown[0] else "\n".join(shown))
    for index, text in enumerate(final):
        if chat and not text:
            print(
                f"prompt {index}: no final channel within {len(times[index])} tokens; raise "
                "--max-new-tokens, or see --show-reasoning",
                file=sys.stderr,
            )
    report(engine, times, start)
    return final


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


def converse(model: GPTOSS, tokenizer: tiktoken.Encoding, args) -> None:
    """The interactive chat, until end of file."""
    turns: list[tuple[str, str]] = []
    print("Ctrl-D ends the chat.", file=sys.stderr)
    while True:
        print("> ", end="", file=sys.stderr, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            turns.append(("user", line.strip()))
            tokens = chat_tokens(tokenizer, turns, str(datetime.date.today()), args.effort)
            turns.append(("assistant", answer(model, tokenizer, [tokens], args, chat=True)[0]))


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
            print(
                f"emulated gfx950: {executed:,} wave-instructions in {seconds:.0f} s; launches: "
                + ", ".join(f"{n} {name}" for name, n in counts.items()),
                file=sys.stderr,
            )


def main() -> int:
    parser = arguments()
    args = parser.parse_args()
    if bool(args.prompt) == args.chat:
        parser.error("give --prompt TEXT (may repeat, - reads standard input) or --chat")
    if args.emulate and (args.device not in (None, "cpu") or args.ops == "torch"):
        parser.error("--emulate runs the gluon kernels on the cpu: leave out --device and --ops")
    try:
        tokenizer = weights.load_tokenizer(args.checkpoint)
        chat = not args.raw and "<|channel|>" in tokenizer.special_tokens_set
        if args.chat and not chat:
            raise ValueError(
                "--chat needs a chat model: a tokenizer with the Harmony tokens, and no --raw"
            )
        texts = [sys.stdin.read() if text == "-" else text for text in args.prompt or ()]
        today = str(datetime.date.today())
        if empty := [index for index, text in enumerate(texts) if not text.strip()]:
            raise ValueError(f"prompt {empty[0]} is empty")
        with emulated_gpu() if args.emulate else contextlib.nullcontext():
            device = args.device or (
                "cuda" if torch.cuda.is_available() and not args.emulate else "cpu"
            )
            ops = "gluon" if args.emulate else args.ops
            dtype = getattr(torch, args.dtype or "", None)
            model = GPTOSS.from_pretrained(args.checkpoint, device, dtype, ops, args.activations)
            if args.chat:
                converse(model, tokenizer, args)
            else:
                answer(
                    model,
                    tokenizer,
                    [
                        chat_tokens(tokenizer, [("user", text)], today, args.effort)
                        if chat
                        else tokenizer.encode_ordinary(text)
                        for text in texts
                    ],
                    args,
                    chat,
                )
    except (CheckpointError, ValueError) as error:
        print(f"gptoss: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
