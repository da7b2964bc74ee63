"""GPT-OSS inference: OpenAI's open-weight mixture-of-experts models with a paged KV cache, in one sitting.

    python gptoss.py --prompt "What is 17 + 25?"

The model card is https://arxiv.org/abs/2508.10925, the semantics are those of https://github.com/openai/gpt-oss
(gpt_oss/torch/model.py); YaRN is https://arxiv.org/abs/2309.00071, the chat format
https://github.com/openai/harmony. Shape letters:

    T  tokens of a step, flat: S sequences of Q tokens each (prefill: S = 1; decode: Q = 1)
    H  hidden size        I  intermediate size     E  experts        V  vocabulary
    N  query heads        G  key/value heads       D  head dim       L  keys a query may see
"""

import argparse
import codecs
import collections
import contextlib
import datetime
import importlib.util
import math
import os
import random
import resource
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace

import tiktoken
import torch
import torch.nn.functional as F

import weights
from weights import MX_GROUP, CheckpointError, Config, Experts

PAGE_SIZE = 16  # tokens of a KV page
MAX_BATCH = 64  # sequences that decode together
PREFILL_TOKENS = 1024  # tokens of a prompt that run together
PREFILL_SCORES = (
    1 << 26
)  # heads x queries x keys: fewer tokens run together where a layer's scores would be more
DENSE_ROWS, DENSE_BYTES = (
    64,
    1 << 24,
)  # (token, slot) pairs that meet all experts, if a layer's first GEMM is so small
EXPAND_BELOW = 1 << 30  # bytes: the experts of a model this small are dequantised once, at load
ACTIVATIONS = ("bf16", "fp8", "mxfp8", "mxfp4")
SWIGLU_ALPHA = (
    1.702  # sigmoid(1.702 x) approximates the normal distribution's CDF (the GELU paper, section 2)
)

# ---------------------------------------------------------------------------------------------------------------
# Number formats (OCP Microscaling Formats v1.0)

E2M1 = torch.tensor(
    [0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6]
)  # value of each fp4 code
E8M0 = torch.ldexp(
    torch.ones(256), torch.arange(256) - 127
)  # value of each scale byte: 2^(s - 127)
E8M0[255] = math.nan


def dequantise_mxfp4(packed: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """mxfp4 to float32, exactly. packed: uint8 [..., K/2], low nibble first; scale: uint8 E8M0 [..., K/32] ->
    [..., K]."""
    codes = torch.arange(256, device=packed.device)
    pairs = E2M1.to(packed.device)[torch.stack([codes & 15, codes >> 4], dim=1)]  # [256, 2]
    values = F.embedding(packed.int(), pairs).view(
        *scale.shape, MX_GROUP
    )  # [..., K/2, 2] -> [..., K/32, 32]
    return (values * F.embedding(scale.int(), E8M0.to(packed.device)[:, None])).flatten(-2)


def quantise_mx(x: torch.Tensor, activations: str) -> torch.Tensor:
    """x [..., K] float32 rounded to mxfp8 (e4m3) or mxfp4 (e2m1), as float32 again. Per group of 32 the scale is
    2^(floor(log2(max |x|)) - emax), OCP MX v1.0 section 6.3; elements round to nearest even and saturate."""
    largest_exponent, largest = (8, 448.0) if activations == "mxfp8" else (2, 6.0)
    groups = x.unflatten(-1, (-1, MX_GROUP))  # [..., K/32, 32]
    bits = groups.abs().amax(-1, keepdim=True).view(torch.int32)
    exponent = ((bits >> 23) - 127 - largest_exponent).clamp(
        -127, 127
    )  # float32's own exponent field is the floor
    scaled = torch.ldexp(groups, -exponent).clamp(-largest, largest)
    rounded = (
        scaled.to(torch.float8_e4m3fn).float() if activations == "mxfp8" else round_e2m1(scaled)
    )
    return torch.ldexp(rounded, exponent).flatten(-2)


def round_e2m1(x: torch.Tensor) -> torch.Tensor:
    """float32 in [-6, 6] to the nearest e2m1 value, ties to even: steps of 0.5 below 2, 1 below 4, 2 above."""
    step = torch.where(x.abs() < 2, 0.5, torch.where(x.abs() < 4, 1.0, 2.0))
    return torch.round(x / step) * step


def quantise_fp8(x: torch.Tensor, scale: float) -> torch.Tensor:
    """x rounded to multiples e4m3 x scale, clamped to +-448 x scale; float32."""
    return (x / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale


# ---------------------------------------------------------------------------------------------------------------
# Mixture of experts


def moe_reference(
    x,
    router_weight,
    router_bias,
    experts: Experts,
    top_k: int,
    activations: str = "bf16",
    swiglu_limit: float = 7.0,
) -> torch.Tensor:
    """The MoE layer as equations: the path of every device without its own kernels, and the kernels' oracle.

    x [T, H]; router_weight [E, H], router_bias [E] -> [T, H] in x's dtype; float32 in between. `activations` is what
    the two expert GEMMs see: "bf16" x and the SwiGLU's result in x's dtype, the others these rounded: "fp8" (with the
    static scales in `experts`), "mxfp8", "mxfp4". Raises ValueError for any other, and for fp8 without scales."""
    if activations not in ACTIVATIONS:
        raise ValueError(f"activations={activations!r}, expected one of {', '.join(ACTIVATIONS)}")
    if activations == "fp8" and experts.gate_up_input_scale is None:
        raise ValueError(
            "activations='fp8' needs the static input scales of a Quark checkpoint; use mxfp8"
        )

    # router: the top_k largest logits of each token, the smaller expert id first where they tie
    logits = F.linear(x.float(), router_weight.float(), router_bias.float())  # [T, E]
    logits, chosen = logits.sort(dim=-1, descending=True, stable=True)
    gate_weight, chosen = logits[:, :top_k].softmax(-1), chosen[:, :top_k]  # [T, k]
    x_in = as_seen(x, activations, experts.gate_up_input_scale)
    if experts.gate_up_weight.dtype == torch.float32 and dense_is_cheaper(
        len(x), top_k, experts.gate_up_weight
    ):
        return moe_dense(x, x_in, gate_weight, chosen, experts, activations, swiglu_limit)
    expert, order = chosen.flatten().sort(stable=True)  # rows: the (token, slot) pairs, by expert
    runs = list(
        collections.Counter(expert.tolist()).items()
    )  # (expert, how many rows), as they lie

    # dispatch: gather the rows, first GEMM, SwiGLU
    x_in = F.embedding(order // top_k, x_in)  # [T*k, H]
    h = expert_linear(
        x_in, runs, experts.gate_up_weight, experts.gate_up_scale, experts.gate_up_bias
    )
    h = swiglu(h, swiglu_limit)  # [T*k, 2I] -> [T*k, I]

    # combine: second GEMM, back to the order of the tokens, weighted sum over the k slots
    h = as_seen(
        h.to(x.dtype) if activations == "bf16" else h, activations, experts.down_input_scale
    )
    y = expert_linear(h, runs, experts.down_weight, experts.down_scale, experts.down_bias)
    y = (
        torch.empty_like(y).index_copy_(0, order, y).view(*gate_weight.shape, -1)
    )  # [T*k, H] -> [T, k, H]
    return (y * gate_weight[..., None]).sum(1).to(x.dtype)


def moe_dense(
    x, x_in, gate_weight, chosen, experts: Experts, activations: str, swiglu_limit: float
) -> torch.Tensor:
    """The same for few tokens of a small model, whose experts are in cache and mostly chosen anyway: all experts
    compute all tokens, two batched GEMMs, and the gate weight of an expert that was not chosen is 0."""
    gate = torch.zeros(len(x), len(experts.down_bias), device=x.device).scatter_(
        1, chosen, gate_weight
    )  # [T, E]
    h = torch.baddbmm(
        experts.gate_up_bias[:, None],
        x_in.expand(gate.shape[1], *x.shape),
        experts.gate_up_weight.mT,
    )
    h = swiglu(h, swiglu_limit)  # [E, T, 2I] -> [E, T, I]
    h = as_seen(
        h.to(x.dtype) if activations == "bf16" else h, activations, experts.down_input_scale
    )
    y = torch.baddbmm(experts.down_bias[:, None], h, experts.down_weight.mT)  # [E, T, H]
    return (y * gate.T[..., None]).sum(0).to(x.dtype)


def dense_is_cheaper(tokens: int, top_k: int, weight: torch.Tensor) -> bool:
    return (
        len(weight) <= tokens * top_k <= DENSE_ROWS
        and weight.numel() * weight.itemsize <= DENSE_BYTES
    )


def swiglu(h: torch.Tensor, limit: float) -> torch.Tensor:
    """[..., 2I], gate and up interleaved -> [..., I]: gate sigmoid(1.702 gate) (up + 1), both clamped before."""
    gate, up = h[..., 0::2].clamp(max=limit), h[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(SWIGLU_ALPHA * gate) * (up + 1)


def as_seen(x: torch.Tensor, activations: str, static_scale: float | None) -> torch.Tensor:
    """x as an expert GEMM sees it, in float32: itself, or rounded to a format."""
    if activations == "bf16":
        return x.float()
    return (
        quantise_fp8(x.float(), static_scale)
        if activations == "fp8"
        else quantise_mx(x.float(), activations)
    )


def expert_linear(x, runs, weight, scale, bias) -> torch.Tensor:
    """x @ weight[e].T + bias[e], for the rows of x [R, in] that belong to expert e: runs [(e, rows)], consecutive. An
    expert is converted to float32 where rows use it and forgotten after. -> float32 [R, out]."""
    outputs = []
    for (e, _), rows in zip(runs, x.split([n for _, n in runs]), strict=True):
        w = weight[e].float() if scale is None else dequantise_mxfp4(weight[e], scale[e])
        outputs.append(F.linear(rows, w, bias[e].float()))
    return torch.cat(outputs)


def expand_experts(experts: Experts) -> Experts:
    """The same experts in float32; in memory [E, in, out], as a CPU's GEMM of few rows likes."""

    def expand(weight, scale):
        full = weight.float() if scale is None else dequantise_mxfp4(weight, scale)
        return full.mT.contiguous().mT

    return replace(
        experts,
        gate_up_weight=expand(experts.gate_up_weight, experts.gate_up_scale),
        gate_up_scale=None,
        down_weight=expand(experts.down_weight, experts.down_scale),
        down_scale=None,
        gate_up_bias=experts.gate_up_bias.float(),
        down_bias=experts.down_bias.float(),
    )


# ---------------------------------------------------------------------------------------------------------------
# Paged KV cache


class KVCache:
    """Keys and values in one pool of pages. A page holds `page_size` tokens, for every layer of one kind: layer i of
    the full-attention layers and layer i of the sliding ones use the same memory of different pages.

    A sequence has a block table per kind. Position p lies at ring index p mod C, C = pages * page_size: a full layer
    has pages for every token, so its ring never wraps; a sliding one stops at ceil(window / page_size) pages and then
    overwrites what has left the window."""

    def __init__(self, config: Config, num_pages: int, page_size: int, device, dtype):
        self.config, self.page_size, self.num_pages, self.peak = config, page_size, num_pages, 0
        self.free = list(range(num_pages, 0, -1))  # page 0 is not given out: it stays zero
        depth = max(config.layer_types.count(kind) for kind in config.layer_types)
        self.pool = torch.zeros(
            depth,
            (1 + num_pages) * page_size,
            2 * config.num_key_value_heads * config.head_dim,
            device=device,
            dtype=dtype,
        )  # a slot holds the keys, then the values, of its token

    def allocate(self, length: int) -> dict[str, list[int]]:
        """Block tables, by kind, for a sequence that may grow to `length` tokens."""
        needed = pages_needed(self.config, length, self.page_size)
        tables = {kind: [self.free.pop() for _ in range(n)] for kind, n in needed.items()}
        self.peak = max(self.peak, self.num_pages - len(self.free))
        return tables

    def release(self, tables: dict[str, list[int]]) -> None:
        for table in tables.values():
            self.free.extend(table)

    def slots(self, tables: list[dict[str, list[int]]], length: int) -> dict[str, torch.Tensor]:
        """Block tables, cut to what `length` tokens use, as pool slots: kind -> [S, 1 + C], slot 0 and then the slots
        in ring order. A shorter table is filled up with page 0."""
        size, device, slots = self.page_size, self.pool.device, {}
        for kind, width in pages_needed(self.config, length, size).items():
            pages = torch.tensor(
                [(table[kind] + [0] * width)[:width] for table in tables], device=device
            )
            slots[kind] = F.pad(
                (pages[..., None] * size + torch.arange(size, device=device)).flatten(1), (1, 0)
            )
        return slots


def pages_needed(config: Config, length: int, page_size: int) -> dict[str, int]:
    """Pages that `length` tokens need, by kind of layer."""
    full, window = -(-length // page_size), -(-config.sliding_window // page_size)
    return {
        kind: full if kind == "full_attention" else min(full, window)
        for kind in sorted(set(config.layer_types))
    }


@dataclass
class Span:
    """What one kind of layers sees in a step."""

    read: (
        torch.Tensor
    )  # [S, 1 + C] pool slots: the zeros of slot 0, then the cached tokens in ring order
    write: torch.Tensor  # [S, min(Q, C)] pool slots of the new tokens that stay cached: the last C
    mask: (
        torch.Tensor
    )  # [S, G, M, Q, L] room for the sinks, then 0 where the query sees the key, else -inf


@dataclass
class Step:
    """The explicit inputs of a forward pass beside its tokens; of fixed shapes if the slots' are."""

    pool: torch.Tensor  # of the KV cache, which the pass writes
    cos: torch.Tensor  # [S, Q, N + 2G, D]
    sin: torch.Tensor  # [S, Q, N + 2G, D], negated in the first half
    spans: dict[str, Span]  # by kind of layer


# ---------------------------------------------------------------------------------------------------------------
# Model


@dataclass
class Layer:
    kind: str  # "sliding_attention" | "full_attention"
    depth: int  # index among the layers of its kind
    attn_norm: torch.Tensor  # [H] float32, times sqrt(H), as is mlp_norm
    qkv_weight: torch.Tensor  # [(N + 2G) D, H]
    qkv_bias: torch.Tensor
    sinks: torch.Tensor  # [N]
    out_weight: torch.Tensor  # [H, N D]
    out_bias: torch.Tensor
    mlp_norm: torch.Tensor
    router_weight: torch.Tensor  # [E, H]
    router_bias: torch.Tensor
    experts: Experts


def rope_tables(config: Config) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Radians per token, and what multiplies their cos and sin, for every element of a token's queries, keys and
    values: [N + 2G, D] each. Values do not turn: frequency 0, factor 1. YaRN (sections 3.2 to 3.4, bounds not
    truncated): pairs that turn often within the initial context keep their frequency, slow ones are interpolated."""
    D, base, context = config.head_dim, config.rope_theta, config.initial_context_length
    frequency = base ** -(torch.arange(0, D, 2, dtype=torch.float32) / D)  # [D/2]
    low, high = (
        D * math.log(context / (turns * 2 * math.pi)) / (2 * math.log(base))
        for turns in (config.rope_beta_fast, config.rope_beta_slow)
    )
    low, high = max(low, 0), min(high, D - 1)
    slow = ((torch.arange(D // 2, dtype=torch.float32) - low) / max(high - low, 0.001)).clamp(0, 1)
    frequency = frequency / config.rope_factor * slow + frequency * (1 - slow)
    concentration = 0.1 * math.log(config.rope_factor) + 1
    turning, G = config.num_attention_heads + config.num_key_value_heads, config.num_key_value_heads
    sign = torch.tensor([-1.0, 1.0]).repeat_interleave(D // 2)  # of sin in rotate's two halves
    return (
        F.pad(torch.cat([frequency, frequency]).expand(turning, D), (0, 0, 0, G)),
        F.pad(torch.full((turning, D), concentration), (0, 0, 0, G), value=1.0),
        concentration * sign,
    )


def rotate(x: torch.Tensor, step: Step) -> torch.Tensor:
    """Rotary embedding of x [S, Q, N + 2G, D] on the pairs (i, i + D/2): (a, b) -> (a cos - b sin, b cos + a sin)."""
    return torch.addcmul(x * step.cos, x.roll(x.shape[-1] // 2, -1), step.sin)


def gluon_for(device: torch.device):
    """The module moe_gluon, if Triton is installed and its active driver is a gfx950, real or emulated, to which
    `device` belongs; else None."""
    if importlib.util.find_spec("triton") is None:
        return None
    import triton

    import moe_gluon

    if not moe_gluon.is_supported():
        return None
    # a driver that does not say where its tensors live is an emulator's
    owner = getattr(
        triton.runtime.driver.active, "get_active_torch_device", lambda: torch.device("cpu")
    )()
    return moe_gluon if owner.type == device.type else None


class GPTOSS:
    """A GPT-OSS model with its weights, and the engine that generates with it."""

    def __init__(
        self,
        checkpoint: weights.Checkpoint,
        device="cpu",
        dtype: torch.dtype | None = None,
        moe: str = "auto",
        activations: str = "auto",
    ):
        self.config, self.layout = checkpoint.config, checkpoint.layout
        try:
            self.device = torch.empty(0, device=device).device
        except (RuntimeError, AssertionError) as error:
            raise ValueError(
                f"device={device!r} cannot be used here: {str(error).splitlines()[0]}"
            ) from error
        if moe not in ("auto", "torch", "gluon"):
            raise ValueError(f"moe={moe!r}, expected auto, torch or gluon")
        self.gluon = (
            None if moe == "torch" else gluon_for(self.device)
        )  # moe_gluon where it can run
        if moe == "gluon" and not self.gluon:
            raise ValueError(
                f"moe='gluon' needs Triton with an active gfx950 (MI350, MI355 or emulated) that owns "
                f"device {self.device}; use moe='torch'"
            )
        self.dtype = dtype or (
            torch.float32 if self.device.type == "cpu" and not self.gluon else torch.bfloat16
        )
        if self.gluon and self.dtype != torch.bfloat16:
            raise ValueError(f"moe='gluon' computes in bfloat16, not in {self.dtype}")
        if activations not in ("auto", *ACTIVATIONS):
            raise ValueError(
                f"activations={activations!r}, expected auto or one of {', '.join(ACTIVATIONS)}"
            )
        if activations == "fp8" and self.layout != "quark":
            raise ValueError(
                f"activations='fp8' needs the static input scales of a Quark checkpoint, this one is "
                f"{self.layout}; use mxfp8"
            )
        if (
            activations == "auto"
        ):  # the kernels multiply mxfp4 weights with 8-bit activations at least
            packed = "mxfp8" if self.gluon else "bf16"
            activations = {"quark": "fp8", "hf-bf16": "bf16"}.get(self.layout, packed)
        self.activations = activations
        self.load(checkpoint)
        self.frequencies, self.cos_scale, self.sin_scale = (
            t.to(self.device) for t in rope_tables(self.config)
        )
        self.root_eps = torch.tensor(
            self.config.hidden_size * self.config.rms_norm_eps, device=self.device
        ).sqrt()
        self.cache: KVCache | None = None  # of the latest generation

    @classmethod
    def from_pretrained(
        cls, path, device="cpu", dtype=None, moe="auto", activations="auto"
    ) -> "GPTOSS":
        """Loads the checkpoint folder `path`. dtype None: bfloat16, but float32 on the torch path of a CPU. moe "auto":
        "gluon" where a gfx950 is Triton's active device, else "torch". activations "auto": "fp8" for Quark's layout;
        else "mxfp8" where the kernels meet mxfp4 weights, "bf16" otherwise. Raises weights.CheckpointError for a bad
        checkpoint, ValueError for a bad argument."""
        return cls(weights.load(path), device, dtype, moe, activations)

    def load(self, checkpoint: weights.Checkpoint) -> None:
        """Moves the weights to the device, a layer at a time. Experts are packed anew for the kernels; for the torch
        path they stay as they are, unless all of them are small."""
        c, dense = self.config, checkpoint.dense
        expanded = (
            3 * c.num_hidden_layers * c.num_local_experts * c.hidden_size * c.intermediate_size
        )
        expand = 4 * expanded <= EXPAND_BELOW
        self.embedding, self.unembedding = (
            dense[n].to(self.device, self.dtype) for n in ("embedding", "unembedding")
        )
        self.norm = dense["norm"].to(self.device, torch.float32) * c.hidden_size**0.5
        self.layers = []
        for n in weights.progress(range(c.num_hidden_layers), f"to {self.device}"):
            named = {f.name: dense[f"{n}.{f.name}"] for f in fields(Layer)[2:-1]}
            named = {
                k: t.to(self.device, torch.float32) * c.hidden_size**0.5
                if "norm" in k
                else t.to(self.device, self.dtype)
                for k, t in named.items()
            }
            named = {
                k: t.mT.contiguous().mT if t.dim() == 2 and expand else t for k, t in named.items()
            }
            experts = replace(
                checkpoint.experts[n],
                **{
                    f.name: t.to(self.device)
                    for f in fields(Experts)
                    if isinstance(t := getattr(checkpoint.experts[n], f.name), torch.Tensor)
                },
            )
            if self.gluon:
                experts = self.gluon.prepare(experts, self.activations)
            elif expand:
                experts = expand_experts(experts)
            kind = c.layer_types[n]
            self.layers.append(Layer(kind, c.layer_types[:n].count(kind), **named, experts=experts))

    # -- forward pass -------------------------------------------------------------------------------------------

    def forward(self, tokens: torch.Tensor, step: Step) -> torch.Tensor:
        """tokens [T] -> final hidden states [T, H]."""
        x = self.embedding[tokens]  # [T, H]
        for layer in self.layers:
            x = x + self.attention(self.rms_norm(x, layer.attn_norm), layer, step)
            x = x + self.moe(self.rms_norm(x, layer.mlp_norm), layer)
        return self.rms_norm(x, self.norm)

    def rms_norm(self, x: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
        """In float32. sqrt(H) sqrt(mean(x^2) + eps) is the hypotenuse of |x| and sqrt(H eps): few, cheap operations.
        `scale` [H] has its factor sqrt(H) already."""
        y = x.float()
        length = torch.hypot(torch.linalg.vector_norm(y, dim=-1, keepdim=True), self.root_eps)
        return (y / length * scale).to(x.dtype)

    def moe(self, x: torch.Tensor, layer: Layer) -> torch.Tensor:
        moe = self.gluon.moe if self.gluon else moe_reference
        return moe(
            x,
            layer.router_weight,
            layer.router_bias,
            layer.experts,
            self.config.num_experts_per_tok,
            self.activations,
            self.config.swiglu_limit,
        )

    def attention(self, x: torch.Tensor, layer: Layer, step: Step) -> torch.Tensor:
        """Grouped-query attention with sinks, over the cached tokens and the step's own. x [T, H] -> [T, H].

        A head's sink is a logit of the softmax that stands for no value: the first of the L keys is all zeros (the
        pool's slot 0), so that its score is what the mask adds, the sink, and its value adds nothing."""
        c, span, pool = self.config, step.spans[layer.kind], step.pool[layer.depth]
        N, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
        S, Q = step.cos.shape[:2]
        M = N // G  # query heads that share a key head
        qkv = F.linear(x, layer.qkv_weight, layer.qkv_bias).view(S, Q, N + 2 * G, D)
        qkv = rotate(qkv, step)
        q, new = qkv[:, :, :N], qkv[:, :, N:].flatten(2)  # [S, Q, N, D], [S, Q, 2*G*D]
        past = F.embedding(span.read, pool) if Q > 1 else None
        pool[span.write] = new[:, -span.write.shape[1] :]
        # a prompt's chunk may overwrite what its own first queries see: it reads the cache before, decode after
        keys = (
            torch.cat([past, new], dim=1) if Q > 1 else F.embedding(span.read, pool)
        )  # [S, L, 2*G*D]
        q = q.view(S, Q, G, M, D).permute(0, 2, 3, 1, 4).reshape(S, G, M * Q, D)
        k, v = keys.view(S, -1, 2, G, D).permute(2, 0, 3, 1, 4)  # [S, G, L, D] each
        span.mask[..., 0] = layer.sinks.view(G, M, 1)
        mask = span.mask.view(S, G, M * Q, -1)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # [S, G, M*Q, D]
        out = out.view(S, G, M, Q, D).permute(0, 3, 1, 2, 4).reshape(S * Q, N * D)
        return F.linear(out, layer.out_weight, layer.out_bias)

    def step(self, cache: KVCache, positions: torch.Tensor, slots: dict[str, torch.Tensor]) -> Step:
        """positions [S, Q], consecutive in a row; slots: kind -> [S, 1 + C], from the cache."""
        c, (S, Q) = self.config, positions.shape
        G = c.num_key_value_heads
        angles = positions[..., None, None] * self.frequencies  # [S, Q, N + 2G, D]
        spans = {}
        for kind, read in slots.items():
            C = read.shape[1] - 1
            # the newest token that lies at each ring index when the layer reads it; negative: none does
            newest = positions[:, :1] - int(Q > 1)
            keys = newest - (newest - torch.arange(C, device=self.device)) % C  # [S, C]
            keys = (torch.cat([keys, positions], 1) if Q > 1 else keys)[:, None]  # [S, 1, L - 1]
            distance = positions[:, :, None] - keys  # [S, Q, L - 1]
            window = c.sliding_window if kind == "sliding_attention" else c.max_position_embeddings
            hidden = (distance < 0) | (distance >= window) | (keys < 0)
            mask = angles.new_zeros(
                S, G, c.num_attention_heads // G, Q, 1 + keys.shape[-1], dtype=self.dtype
            )
            mask[..., 1:].masked_fill_(hidden[:, None, None], -math.inf)
            spans[kind] = Span(read, read.gather(1, positions[:, -C:] % C + 1), mask)
        cos, sin = angles.cos() * self.cos_scale, angles.sin() * self.sin_scale
        return Step(cache.pool, cos.to(self.dtype), sin.to(self.dtype), spans)

    # -- engine -------------------------------------------------------------------------------------------------

    @torch.inference_mode()
    def logits(self, tokens: list[int]) -> torch.Tensor:
        """Teacher-forced logits, float32 [T, V]; row t predicts token t + 1. Raises ValueError for a bad prompt."""
        self.check_prompt(0, tokens, 0)
        pages = sum(pages_needed(self.config, len(tokens), PAGE_SIZE).values())
        cache = KVCache(self.config, pages, PAGE_SIZE, self.device, self.dtype)
        hidden = torch.cat(list(self.prefill(cache, tokens, cache.allocate(len(tokens)))))
        return F.linear(hidden, self.unembedding).float()

    def prefill(
        self, cache: KVCache, tokens: list[int], tables: dict[str, list[int]]
    ) -> Iterator[torch.Tensor]:
        """Runs a prompt through the model in chunks whose score matrix stays bounded; yields hidden states [Q, H]."""
        start = 0
        while start < len(tokens):
            seen = min(start + PREFILL_TOKENS, len(tokens))
            chunk = min(
                PREFILL_TOKENS, max(1, PREFILL_SCORES // (self.config.num_attention_heads * seen))
            )
            end = min(start + chunk, len(tokens))
            positions = torch.arange(start, end, device=self.device)[None]
            step = self.step(cache, positions, cache.slots([tables], end))
            yield self.forward(torch.tensor(tokens[start:end], device=self.device), step)
            start = end

    def generate(self, prompts: list[list[int]], *args, **options) -> list[list[int]]:
        """The new tokens of each prompt, without the stop token. Arguments and errors are those of `stream`."""
        new = [[] for _ in prompts]
        for index, token in self.stream(prompts, *args, **options):
            new[index].append(token)
        return new

    def stream(
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
    ) -> Iterator[tuple[int, int]]:
        """Generates for all prompts at once; yields (prompt index, token) as they come, stop tokens excluded.

        temperature 0 is greedy. A prompt's tokens under a `seed` do not depend on its batch. A prompt is admitted,
        in order, when one of `max_batch` places is free and the pool has the pages for it and its max_new_tokens.
        num_pages None: as many as that takes, within the memory of a GPU. Raises ValueError, before anything runs,
        for an argument out of range and for a prompt that is empty, too long or can never have its pages."""
        if max_new_tokens < 0 or page_size < 1 or max_batch < 1:
            raise ValueError(
                f"{max_new_tokens=} must not be negative, {page_size=} and {max_batch=} must be positive"
            )
        if (
            temperature < 0
            or top_k is not None
            and top_k < 1
            or top_p is not None
            and not 0 < top_p <= 1
        ):
            raise ValueError(
                f"{temperature=} must not be negative, {top_k=} at least 1, {top_p=} in (0, 1]"
            )
        for index, prompt in enumerate(prompts):
            self.check_prompt(index, prompt, max_new_tokens)
        needed = [
            sum(pages_needed(self.config, len(p) + max_new_tokens, page_size).values())
            for p in prompts
        ]
        self.cache = None  # of the generation before: its memory is free for this one
        if num_pages is None:
            num_pages = min(sum(sorted(needed)[-max_batch:]), self.pages_that_fit(page_size))
        for index, pages in enumerate(needed):
            if pages > num_pages:
                raise ValueError(
                    f"prompt {index} needs {pages} pages of {page_size} tokens for "
                    f"{len(prompts[index])} tokens and {max_new_tokens} new ones, the pool has {num_pages}"
                    "; raise num_pages or lower max_new_tokens"
                )
        cache = self.cache = KVCache(self.config, num_pages, page_size, self.device, self.dtype)
        waiting = collections.deque()
        for index in range(len(prompts) if max_new_tokens else 0):
            draws = random.Random(None if seed is None else f"{seed}/{index}")
            waiting.append(
                Sequence(index, list(prompts[index]), max_new_tokens, needed[index], draws)
            )
        return self.run(
            cache, waiting, max_batch, set(stop_tokens or ()), (temperature, top_k, top_p)
        )

    def check_prompt(self, index: int, prompt: list[int], max_new_tokens: int) -> None:
        """Raises ValueError for a prompt that cannot run."""
        if not prompt:
            raise ValueError(f"prompt {index} is empty; it needs at least one token")
        if bad := [t for t in prompt if not 0 <= t < self.config.vocab_size]:
            raise ValueError(
                f"prompt {index} has token {bad[0]}, outside the vocabulary of {self.config.vocab_size}"
            )
        if len(prompt) + max_new_tokens > self.config.max_position_embeddings:
            raise ValueError(
                f"prompt {index} is too long: {len(prompt)} tokens and {max_new_tokens} new ones exceed "
                f"the model's context of {self.config.max_position_embeddings}"
            )

    def pages_that_fit(self, page_size: int) -> int:
        """Pages for 90% of a GPU's free memory; a CPU's is not measured."""
        if self.device.type != "cuda":
            return sys.maxsize
        one = KVCache(self.config, 0, page_size, "meta", self.dtype).pool
        # blocks that PyTorch keeps for reuse are free too, though the driver counts them as taken
        kept = torch.cuda.memory_reserved(self.device) - torch.cuda.memory_allocated(self.device)
        return int(0.9 * (torch.cuda.mem_get_info(self.device)[0] + kept)) // (
            one.numel() * one.itemsize
        )

    @torch.inference_mode()
    def run(
        self, cache: KVCache, waiting: collections.deque, max_batch: int, stop: set[int], sampling
    ) -> Iterator:
        """Continuous batching: prompts are prefilled as soon as they fit, all running ones decode together."""
        running: list[Sequence] = []

        def admissible() -> bool:
            return (
                bool(waiting) and len(running) < max_batch and waiting[0].pages <= len(cache.free)
            )

        while waiting or running:
            while admissible():
                sequence = waiting.popleft()
                sequence.tables = cache.allocate(len(sequence.tokens) + sequence.remaining)
                *_, hidden = self.prefill(cache, sequence.tokens, sequence.tables)
                running.append(sequence)
                yield from self.emit(cache, [sequence], hidden[-1:], running, stop, sampling)
            slots, room = (
                {},
                0,
            )  # tables stay as they are until a sequence leaves or the longest fills its last page
            members = list(running)
            while running and running == members and not admissible():
                length = max(len(sequence.tokens) for sequence in running)
                if length > room:
                    slots = cache.slots([sequence.tables for sequence in running], length)
                    room = -(-length // cache.page_size) * cache.page_size
                positions = torch.tensor(
                    [[len(sequence.tokens) - 1] for sequence in running], device=self.device
                )
                tokens = torch.tensor(
                    [sequence.tokens[-1] for sequence in running], device=self.device
                )
                hidden = self.forward(tokens, self.step(cache, positions, slots))
                yield from self.emit(cache, members, hidden, running, stop, sampling)

    def emit(self, cache, sequences, hidden, running, stop, sampling) -> Iterator[tuple[int, int]]:
        """Samples a token for each sequence from its hidden state [S, H]; those that are done leave `running`."""
        logits = F.linear(hidden, self.unembedding).float()  # [S, V]
        draws = [sequence.random.random() for sequence in sequences]
        for sequence, token in zip(
            sequences, sample(logits, draws, *sampling).tolist(), strict=True
        ):
            sequence.tokens.append(token)
            sequence.remaining -= 1
            if token in stop or not sequence.remaining:
                running.remove(sequence)
                cache.release(sequence.tables)
            if token not in stop:
                yield sequence.index, token


@dataclass(eq=False)
class Sequence:
    """A prompt on its way through the engine."""

    index: int  # among the prompts
    tokens: list[int]  # prompt and generated; all but the newest are cached
    remaining: int  # tokens it may still generate
    pages: int  # that it needs at its longest
    random: random.Random
    tables: dict[str, list[int]] | None = None  # block tables, by kind of layer


def sample(
    logits: torch.Tensor,
    draws: list[float],
    temperature: float,
    top_k: int | None,
    top_p: float | None,
) -> torch.Tensor:
    """One token per row. logits [S, V] float32, draws: S uniform in [0, 1). temperature 0: the largest logit. Else
    inverse transform sampling from softmax(logits / temperature), cut to the top_k likeliest, renormalised, then cut
    to the likeliest whose sum reaches top_p."""
    if temperature == 0:
        return logits.argmax(-1)
    share, token = (logits / temperature).softmax(-1).sort(dim=-1, descending=True, stable=True)
    if top_k is not None:
        share[:, top_k:] = 0
    if top_p is not None:
        share /= share.sum(-1, keepdim=True)
        share[share.cumsum(-1) - share >= top_p] = 0
    total = share.double().cumsum(-1)
    rank = (
        total
        <= torch.tensor(draws, device=total.device, dtype=total.dtype)[:, None] * total[:, -1:]
    ).sum(-1)
    rank = rank.minimum((share > 0).sum(-1) - 1)  # should the product have rounded up to the whole
    return token.gather(1, rank[:, None])[:, 0]


# ---------------------------------------------------------------------------------------------------------------
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


# ---------------------------------------------------------------------------------------------------------------
# Command line


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Generate text with a GPT-OSS model.", allow_abbrev=False
    )
    add = parser.add_argument
    add(
        "--checkpoint",
        default=os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny"),
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
    add("--moe", default="auto", choices=("auto", "torch", "gluon"))
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
    """Generates for the prompts; prints the text on stdout, a single prompt's as it comes and several in order at the
    end, and the statistics on stderr. Returns the final channel of each."""
    ends = tokenizer.special_tokens_set & {"<|return|>", "<|call|>", "<|endoftext|>"}
    stop = {*model.config.eos_token_id, *map(tokenizer.encode_single_token, ends)}
    readers = [Reader(tokenizer, chat) for _ in prompts]
    shown, final, times = [""] * len(prompts), [""] * len(prompts), [[] for _ in prompts]
    start = time.perf_counter()
    for index, token in model.stream(
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
    ):
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
                f"prompt {index}: no final channel within {len(times[index])} tokens; raise --max-new-tokens, or see "
                "--show-reasoning",
                file=sys.stderr,
            )
    report(model, times, start)
    return final


def report(model: GPTOSS, times: list[list[float]], start: float) -> None:
    """One line of statistics on stderr. times: when each token of each prompt came, seconds."""
    mean = lambda values: f"{1e3 * sum(values) / len(values):.2f} ms" if values else "-"  # noqa: E731
    ttft = mean([t[0] - start for t in times if t])
    tpot = mean([(t[-1] - t[0]) / (len(t) - 1) for t in times if len(t) > 1])
    count, seconds = sum(map(len, times)), time.perf_counter() - start
    peak = (
        torch.cuda.max_memory_allocated(model.device)
        if model.device.type == "cuda"
        else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        * (1 if sys.platform == "darwin" else 1024)
    )
    cache = model.cache
    print(
        f"{count} tokens | TTFT {ttft} | TPOT {tpot} | {count / seconds:.1f} tok/s | pages {cache.peak} of "
        f"{cache.num_pages} x {cache.page_size} tokens | peak memory {peak / 2**30:.2f} GiB",
        file=sys.stderr,
    )


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
    import gfx950

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
    if args.emulate and (args.device not in (None, "cpu") or args.moe == "torch"):
        parser.error("--emulate runs the gluon kernels on the cpu: leave out --device and --moe")
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
            moe = "gluon" if args.emulate else args.moe
            dtype = getattr(torch, args.dtype or "", None)
            model = GPTOSS.from_pretrained(args.checkpoint, device, dtype, moe, args.activations)
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
