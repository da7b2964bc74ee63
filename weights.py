"""GPT-OSS checkpoints of every published layout into tensors, and their tokenizer.

    hf-mxfp4   openai/gpt-oss-20b, -120b           experts packed as `*_blocks` and `*_scales`
    openai     the `original/` folder of those     fused qkv, names `block.{n}.*`
    quark      amd/gpt-oss-120b-w-mxfp4-a-fp8      tensors per expert, static FP8 activation scales
    hf-bf16    an unquantised Hugging Face export  experts as [E, in, out]

Files are memory-mapped (safetensors) and packed experts stay packed. Shape letters, here and in
gptoss.py: V vocabulary, H hidden size, I intermediate size, D head dim, E experts, T tokens."""

import dataclasses
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, get_args, get_type_hints

import tiktoken
import torch
from safetensors import SafetensorError, safe_open

ENDS = ("<|return|>", "<|call|>", "<|endoftext|>")  # Harmony's, after which a completion is over
MX_GROUP = 32  # values that share one E8M0 scale (OCP Microscaling Formats v1.0, 5.2)


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, the tensor or key, and what was
    expected."""


# --------------------------------------------------------------------------------------------------
# Config

# What this engine computes; a config that says otherwise is refused.
ARCHITECTURE = {
    "model_type": "gpt_oss",
    "tie_word_embeddings": False,
    "attention_bias": True,
    "hidden_act": "silu",
    "swiglu_alpha": 1.702,
    "partial_rotary_factor": 1.0,
}
ROPE = {"rope_type": "yarn", "type": "yarn", "truncate": False, "partial_rotary_factor": 1.0}
# Keys that change nothing here: training, bookkeeping, what the caller or another file decides.
WITHOUT_EFFECT = """
architectures attention_dropout bos_token_id pad_token_id dtype torch_dtype initializer_range
output_router_logits router_aux_loss_coef use_cache transformers_version quantization_config
output_attentions output_hidden_states return_dict chunk_size_feed_forward is_encoder_decoder
id2label label2id problem_type _name_or_path _attn_implementation _attn_implementation_autoset
unsloth_fixed unsloth_version max_length temperature top_k top_p do_sample
""".split()
LAYER_TYPES = ("sliding_attention", "full_attention")


def stored_at(*paths: str):
    """A field of Config and the keys of config.json that may hold it; dots go into nested
    tables."""
    return dataclasses.field(metadata={"paths": paths})


@dataclass(frozen=True)
class Config:
    """The model's constants, from either config.json schema: Hugging Face's (of transformers 4 or
    5) or OpenAI's."""

    vocab_size: int = stored_at("vocab_size")
    hidden_size: int = stored_at("hidden_size")
    intermediate_size: int = stored_at("intermediate_size")
    num_hidden_layers: int = stored_at("num_hidden_layers")
    num_attention_heads: int = stored_at("num_attention_heads")
    num_key_value_heads: int = stored_at("num_key_value_heads")
    head_dim: int = stored_at("head_dim")
    num_local_experts: int = stored_at("num_local_experts", "num_experts")
    num_experts_per_tok: int = stored_at("num_experts_per_tok", "experts_per_token")
    # keys that a query of a sliding layer sees, its own included
    sliding_window: int = stored_at("sliding_window")
    swiglu_limit: float = stored_at("swiglu_limit")
    rope_theta: float = stored_at(
        "rope_theta", "rope_parameters.rope_theta", "rope_scaling.rope_theta"
    )
    rope_factor: float = stored_at(
        "rope_scaling.factor", "rope_parameters.factor", "rope_scaling_factor"
    )
    rope_beta_fast: float = stored_at(
        "rope_scaling.beta_fast", "rope_parameters.beta_fast", "rope_ntk_beta"
    )
    rope_beta_slow: float = stored_at(
        "rope_scaling.beta_slow", "rope_parameters.beta_slow", "rope_ntk_alpha"
    )
    # tokens, before YaRN
    initial_context_length: int = stored_at(
        "rope_scaling.original_max_position_embeddings",
        "initial_context_length",
        "rope_parameters.original_max_position_embeddings",
    )
    # what multiplies cos and sin
    rope_attention_factor: float = stored_at(
        "rope_scaling.attention_factor", "rope_parameters.attention_factor"
    )
    max_position_embeddings: int = stored_at("max_position_embeddings")  # tokens
    rms_norm_eps: float = stored_at("rms_norm_eps")
    layer_types: tuple[str, ...] = stored_at("layer_types")
    eos_token_id: tuple[int, ...] = stored_at("eos_token_id")

    @classmethod
    def from_dict(cls, raw: dict, source: str = "config.json") -> "Config":
        """From a parsed config.json. Raises CheckpointError naming the key that is missing or
        contradictory."""
        check_keys(raw, source)
        values, types = {}, get_type_hints(cls)
        for field in dataclasses.fields(cls):
            paths = field.metadata["paths"]
            found = {path: v for path in paths if (v := lookup(raw, path)) is not None}
            value = next(iter(found.values())) if found else cls.unstated(field.name, raw, values)
            if value is None:
                raise CheckpointError(f"{source}: missing key {' or '.join(paths)}")
            values[field.name], expected = typed(value, types[field.name])
            if values[field.name] is None:
                path = next(iter(found), paths[0])
                raise CheckpointError(f"{source}: {path} is {value!r}, expected {expected}")
            if any(other != value for other in found.values()):
                raise CheckpointError(f"{source}: contradictory keys: {found}")
        c = cls(**values)
        for wrong, message in (
            (
                c.num_attention_heads % c.num_key_value_heads,
                "num_key_value_heads does not divide num_attention_heads",
            ),
            (c.head_dim % 2, "head_dim is odd, rotary embedding needs halves"),
            (c.rope_theta <= 1, "rope_theta is not above 1, so no pair turns slower than another"),
            (
                c.num_experts_per_tok > c.num_local_experts,
                "num_experts_per_tok exceeds num_local_experts",
            ),
            (
                len(c.layer_types) != c.num_hidden_layers,
                "layer_types and num_hidden_layers differ in length",
            ),
            (
                set(c.layer_types) - set(LAYER_TYPES),
                f"layer_types has entries other than {LAYER_TYPES}",
            ),
        ):
            if wrong:
                raise CheckpointError(f"{source}: {message}")
        return c

    @staticmethod
    def unstated(name: str, raw: dict, earlier: dict):
        """The value of a key that a schema leaves to its code (None: it must be there), given the
        fields before it."""
        if name == "rope_attention_factor":
            return yarn_attention_factor(raw, earlier["rope_factor"])
        if name == "layer_types":
            return [LAYER_TYPES[n % 2] for n in range(earlier["num_hidden_layers"])]
        if "rope_scaling_factor" not in raw:  # Hugging Face's schema
            return () if name == "eos_token_id" else None
        if name == "max_position_embeddings":
            return int(earlier["initial_context_length"] * earlier["rope_factor"])
        # return, endoftext, call
        return {"rms_norm_eps": 1e-5, "eos_token_id": (200002, 199999, 200012)}.get(name)


def typed(value, kind) -> tuple:
    """`value` as a field of Config of type `kind`, or None where it is no such thing, and what was
    expected. Numbers are positive and finite; one item may stand for a list of one."""
    if kind in (int, float):
        number = isinstance(value, (int, kind)) and not isinstance(value, bool)
        fits = number and 0 < value < math.inf
        return value if fits else None, f"a positive {kind.__name__}"
    item = get_args(kind)[0]
    items = tuple(value) if isinstance(value, (list, tuple)) else (value,)
    fits = all(type(i) is item for i in items)
    return items if fits else None, f"a list of {item.__name__}"


def check_keys(raw: dict, source: str) -> None:
    """Raises CheckpointError for a key that says something else than what is computed here, or of
    which nothing is known."""
    wrong = "{}: {} is {!r}, GPT-OSS has {!r}"
    for key, required in ARCHITECTURE.items():
        if (found := raw.get(key)) is not None and found != required:
            raise CheckpointError(wrong.format(source, key, found, required))
    used = {path for field in dataclasses.fields(Config) for path in field.metadata["paths"]}
    known = used | set(ARCHITECTURE) | set(WITHOUT_EFFECT)
    for table in ("rope_scaling", "rope_parameters"):
        if (rope := raw.get(table)) is None:
            continue
        if not isinstance(rope, dict):
            raise CheckpointError(f"{source}: {table} is {rope!r}, expected a table")
        for key, required in ROPE.items():
            if key in rope and rope[key] != required:
                raise CheckpointError(wrong.format(source, f"{table}.{key}", rope[key], required))
        # transformers takes an absent type for plain rotary embedding, an absent truncate for true.
        for keys in (("rope_type", "type"), ("truncate",)):
            if not any(key in rope for key in keys):
                path = f"{table}.{keys[0]}"
                raise CheckpointError(wrong.format(source, path, None, ROPE[keys[0]]))
        for key in ("mscale", "mscale_all_dim"):
            if rope.get(key) and typed(rope[key], float)[0] is None:
                raise CheckpointError(
                    f"{source}: {table}.{key} is {rope[key]!r}, expected a positive float"
                )
        known |= {table} | {f"{table}.{key}" for key in (*ROPE, "mscale", "mscale_all_dim")}
    # transformers reads rope_scaling alone where both are; here they must say the same.
    old, new = (raw.get(table) or {} for table in ("rope_scaling", "rope_parameters"))
    differing = [key for key in old | new if old.get(key) != new.get(key) and key != "rope_theta"]
    if old and new and differing:
        raise CheckpointError(
            f"{source}: contradictory keys: rope_scaling and rope_parameters differ in "
            f"{differing[0]}"
        )
    stated = [key for key, value in raw.items() if value is not None]
    nested = [f"{t}.{key}" for t in ("rope_scaling", "rope_parameters") for key in raw.get(t) or ()]
    if unknown := [key for key in stated + nested if key not in known]:
        raise CheckpointError(
            f"{source}: unknown key {unknown[0]}; if it does not change what the model computes, "
            "remove it"
        )


def yarn_attention_factor(raw: dict, factor: float) -> float:
    """YaRN's concentration (section 3.4), or the ratio that `mscale` and `mscale_all_dim` make of
    it, as transformers' _compute_yarn_parameters has it."""
    rope = raw.get("rope_scaling") or raw.get("rope_parameters") or {}
    mscale, all_dim = rope.get("mscale"), rope.get("mscale_all_dim")

    def concentration(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0

    if mscale and all_dim:
        return concentration(mscale) / concentration(all_dim)
    return concentration(1)


def published(size: str) -> Config:
    """The constants of gpt-oss-20b or gpt-oss-120b, from their config.json. size: "20b", "120b"."""
    layers, experts = {"20b": (24, 32), "120b": (36, 128)}[size]
    return Config(
        vocab_size=201088,
        hidden_size=2880,
        intermediate_size=2880,
        num_hidden_layers=layers,
        num_attention_heads=64,
        num_key_value_heads=8,
        head_dim=64,
        num_local_experts=experts,
        num_experts_per_tok=4,
        sliding_window=128,
        swiglu_limit=7.0,
        rope_theta=150000.0,
        rope_factor=32.0,
        rope_beta_fast=32.0,
        rope_beta_slow=1.0,
        rope_attention_factor=0.1 * math.log(32) + 1,
        initial_context_length=4096,
        max_position_embeddings=131072,
        rms_norm_eps=1e-5,
        layer_types=LAYER_TYPES * (layers // 2),
        eos_token_id=(200002, 199999, 200012),
    )


def lookup(table: dict, path: str):
    """The value at a dotted path of nested tables, None where there is none."""
    for key in path.split("."):
        table = table.get(key) if isinstance(table, dict) else None
    return table


# --------------------------------------------------------------------------------------------------
# What a checkpoint becomes


class Shard(NamedTuple):
    """The part of a model that one rank of several has: heads with their keys and values, experts'
    intermediate values in whole groups of 32, rows of the unembedding. Of a bias that is added to
    a sum over the ranks rank 0 has all and the others zeros. Everything else is whole."""

    rank: int = 0
    ranks: int = 1

    def of(self, count: int, width: int = 1, begin: int = 0) -> slice:
        """Its indices of `count` units of `width` in a row that starts at `begin`."""
        first, end = (count * n // self.ranks for n in (self.rank, self.rank + 1))
        return slice(begin + width * first, begin + width * end)

    def config(self, whole: Config) -> Config:
        """The constants of this part. Raises CheckpointError where ranks cannot share a model."""
        G, groups = whole.num_key_value_heads, -(-whole.intermediate_size // MX_GROUP)
        possible = [n for n in range(1, G + 1) if G % n == 0 and n <= groups]
        if self.ranks not in possible:
            raise CheckpointError(
                f"{self.ranks} ranks cannot share a model of {G} key/value heads and {groups} "
                f"groups of {MX_GROUP} intermediate values; {possible} can"
            )
        return dataclasses.replace(
            whole,
            num_attention_heads=whole.num_attention_heads // self.ranks,
            num_key_value_heads=G // self.ranks,
            intermediate_size=len(range(whole.intermediate_size)[self.of(groups, MX_GROUP)]),
        )

    def cut(self, stored: "Stored", tensor: torch.Tensor, whole: Config) -> torch.Tensor:
        """Its part of a stored tensor: a view, but for a fused qkv."""
        if self.rank and stored.ours.endswith(("out_bias", "down_bias")):
            return torch.zeros_like(tensor)
        N, G, D = whole.num_attention_heads, whole.num_key_value_heads, whole.head_dim
        groups = -(-whole.intermediate_size // MX_GROUP)
        parts = {
            "logits": [self.of(whole.vocab_size)],
            "heads": [self.of(N)],
            "Q": [self.of(N, D)],
            "KV": [self.of(G, D)],
            "QKV": [self.of(N, D), self.of(G, D, N * D), self.of(G, D, (N + G) * D)],
            "I": [self.of(groups, MX_GROUP)],
            "2I": [self.of(groups, 2 * MX_GROUP)],
            "I/2": [self.of(groups, MX_GROUP // 2)],
            "I/32": [self.of(groups)],
        }
        for axis, dimension in enumerate(stored.dimensions if self.ranks > 1 else ()):
            if slices := parts.get(dimension):
                pieces = [tensor[(slice(None),) * axis + (piece,)] for piece in slices]
                tensor = pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)
        return tensor


WHOLE = Shard()


@dataclass
class Experts:
    """One layer's experts, as stored. Rows of gate_up interleave gate (even) and up (odd), in
    Quark's checkpoint too: TokenSpeed's loader of one tensor an expert copies its rows as they are,
    and its kernels, with which its GPQA score was measured, take them as interleaved.

    mxfp4: two e2m1 codes a byte, the low nibble first; one E8M0 scale byte s (value 2^(s-127)) per
    32 inputs."""

    gate_up_weight: torch.Tensor  # uint8 [E, 2I, H/2], or bf16 [E, 2I, H]
    gate_up_scale: torch.Tensor | None  # uint8 [E, 2I, H/32]
    gate_up_bias: torch.Tensor  # [E, 2I]
    down_weight: torch.Tensor  # uint8 [E, H, I/2], or bf16 [E, H, I]
    down_scale: torch.Tensor | None  # uint8 [E, H, I/32]
    down_bias: torch.Tensor  # [E, H]
    gate_up_input_scale: float | None = (
        None  # Quark's static FP8 scales: the maximum over the experts
    )
    down_input_scale: float | None = None


@dataclass
class Checkpoint:
    """A loaded checkpoint. `dense` maps our names to bf16 tensors: embedding and unembedding [V,
    H], norm [H], and for layer l `{l}.attn_norm` [H], `{l}.qkv_weight` [(heads + 2 kv_heads) * D,
    H], `{l}.qkv_bias`, `{l}.sinks` [heads], `{l}.out_weight` [H, heads * D], `{l}.out_bias` [H],
    `{l}.mlp_norm` [H], `{l}.router_weight` [E, H], `{l}.router_bias` [E]."""

    config: Config
    layout: str  # "hf-mxfp4" | "openai" | "quark" | "hf-bf16"
    dense: dict[str, torch.Tensor]
    experts: list[Experts]  # one per layer
    activations: str  # what its expert GEMMs were made to see: "bf16", "fp8" or "mxfp4"
    stop_tokens: frozenset[int]  # after which a completion is over
    shard: Shard  # of the model: what `config`'s heads and intermediate size and all tensors are


# Every tensor of every layout: its stored name, our name, its dtype, its shape. {l} counts layers,
# {e} experts. Rows of one name are joined: q, k, v along their rows, Quark's experts by stacking.
HF = """
model.embed_tokens.weight                           embedding           bf16  V H
lm_head.weight                                      unembedding         bf16  logits H
model.norm.weight                                   norm                bf16  H
model.layers.{l}.input_layernorm.weight             {l}.attn_norm       bf16  H
model.layers.{l}.self_attn.q_proj.weight            {l}.qkv_weight      bf16  Q H
model.layers.{l}.self_attn.k_proj.weight            {l}.qkv_weight      bf16  KV H
model.layers.{l}.self_attn.v_proj.weight            {l}.qkv_weight      bf16  KV H
model.layers.{l}.self_attn.q_proj.bias              {l}.qkv_bias        bf16  Q
model.layers.{l}.self_attn.k_proj.bias              {l}.qkv_bias        bf16  KV
model.layers.{l}.self_attn.v_proj.bias              {l}.qkv_bias        bf16  KV
model.layers.{l}.self_attn.sinks                    {l}.sinks           bf16  heads
model.layers.{l}.self_attn.o_proj.weight            {l}.out_weight      bf16  H Q
model.layers.{l}.self_attn.o_proj.bias              {l}.out_bias        bf16  H
model.layers.{l}.post_attention_layernorm.weight    {l}.mlp_norm        bf16  H
model.layers.{l}.mlp.router.weight                  {l}.router_weight   bf16  E H
model.layers.{l}.mlp.router.bias                    {l}.router_bias     bf16  E
"""
LAYOUTS = {
    "hf-mxfp4": HF
    + """
model.layers.{l}.mlp.experts.gate_up_proj_blocks    {l}.gate_up_weight  u8    E 2I H/32 16
model.layers.{l}.mlp.experts.gate_up_proj_scales    {l}.gate_up_scale   e8m0  E 2I H/32
model.layers.{l}.mlp.experts.gate_up_proj_bias      {l}.gate_up_bias    bf16  E 2I
model.layers.{l}.mlp.experts.down_proj_blocks       {l}.down_weight     u8    E H I/32 16
model.layers.{l}.mlp.experts.down_proj_scales       {l}.down_scale      e8m0  E H I/32
model.layers.{l}.mlp.experts.down_proj_bias         {l}.down_bias       bf16  E H
""",
    "hf-bf16": HF
    + """
model.layers.{l}.mlp.experts.gate_up_proj           {l}.gate_up_weight  bf16  E H 2I
model.layers.{l}.mlp.experts.gate_up_proj_bias      {l}.gate_up_bias    bf16  E 2I
model.layers.{l}.mlp.experts.down_proj              {l}.down_weight     bf16  E I H
model.layers.{l}.mlp.experts.down_proj_bias         {l}.down_bias       bf16  E H
""",
    "quark": HF
    + """
model.layers.{l}.mlp.experts.{e}.gate_up_proj.weight        {l}.gate_up_weight       u8     2I H/2
model.layers.{l}.mlp.experts.{e}.gate_up_proj.weight_scale  {l}.gate_up_scale        e8m0   2I H/32
model.layers.{l}.mlp.experts.{e}.gate_up_proj.bias          {l}.gate_up_bias         bf16   2I
model.layers.{l}.mlp.experts.{e}.gate_up_proj.input_scale   {l}.gate_up_input_scale  float
model.layers.{l}.mlp.experts.{e}.down_proj.weight           {l}.down_weight          u8     H I/2
model.layers.{l}.mlp.experts.{e}.down_proj.weight_scale     {l}.down_scale           e8m0   H I/32
model.layers.{l}.mlp.experts.{e}.down_proj.bias             {l}.down_bias            bf16   H
model.layers.{l}.mlp.experts.{e}.down_proj.input_scale      {l}.down_input_scale     float
""",
    "openai": """
embedding.weight                      embedding           bf16  V H
unembedding.weight                    unembedding         bf16  logits H
norm.scale                            norm                bf16  H
block.{l}.attn.norm.scale             {l}.attn_norm       bf16  H
block.{l}.attn.qkv.weight             {l}.qkv_weight      bf16  QKV H
block.{l}.attn.qkv.bias               {l}.qkv_bias        bf16  QKV
block.{l}.attn.sinks                  {l}.sinks           bf16  heads
block.{l}.attn.out.weight             {l}.out_weight      bf16  H Q
block.{l}.attn.out.bias               {l}.out_bias        bf16  H
block.{l}.mlp.norm.scale              {l}.mlp_norm        bf16  H
block.{l}.mlp.gate.weight             {l}.router_weight   bf16  E H
block.{l}.mlp.gate.bias               {l}.router_bias     bf16  E
block.{l}.mlp.mlp1_weight.blocks      {l}.gate_up_weight  u8    E 2I H/32 16
block.{l}.mlp.mlp1_weight.scales      {l}.gate_up_scale   e8m0  E 2I H/32
block.{l}.mlp.mlp1_bias               {l}.gate_up_bias    bf16  E 2I
block.{l}.mlp.mlp2_weight.blocks      {l}.down_weight     u8    E H I/32 16
block.{l}.mlp.mlp2_weight.scales      {l}.down_scale      e8m0  E H I/32
block.{l}.mlp.mlp2_bias               {l}.down_bias       bf16  E H
""",
}
DTYPES = {
    "bf16": ("BF16", "F16", "F32"),
    "u8": ("U8",),
    "e8m0": ("U8", "F8_E8M0"),
    "float": ("F32", "BF16", "F16"),
}
# endings of names that tell the layouts apart
MARKS = {
    "hf-mxfp4": "mlp.experts.gate_up_proj_blocks",
    "hf-bf16": "mlp.experts.gate_up_proj",
    "quark": "mlp.experts.0.gate_up_proj.weight",
    "openai": "mlp.mlp1_weight.blocks",
}


# Scales for a quantised KV cache, which this engine does not have: without effect on what is
# computed in the model's dtype.
CACHE_SCALES = r"\.self_attn\.([kv]_proj\.(output|[kv])_scale|(attn\.)?[kv]_scale)$"
# Names that other tools write, and what to do about them.
REMEDIES = {
    r"^base_model\.model\.|\.lora_[AB]\.": (
        "this is an adapter or a model wrapped for one; merge it (peft: merge_and_unload) and save "
        "the result"
    ),
    r"mlp\.experts\.(gate_up|down)_projs\.": (
        "unsloth's names for experts in 4 bits; save the model with its save_pretrained_merged "
        "instead"
    ),
    r"^layers\.\d+\.self_attn": "the names lack `model.`: save GptOssForCausalLM, not its .model",
}


@dataclass
class Stored:
    """A tensor as its layout wants it stored."""

    name: str
    ours: str
    dtypes: tuple[str, ...]  # safetensors' names of the dtypes it may have
    shape: tuple[int, ...]
    dimensions: tuple[str, ...]  # what the table calls those of the shape


def tensors_of(
    config: Config, layout: str, layer: int | None, activations: str = "fp8"
) -> list[Stored]:
    """What the layout stores for one layer, or (None) outside the layers. Quark's stores scales for
    fp8 activations only."""
    c = config
    q, kv = c.num_attention_heads * c.head_dim, c.num_key_value_heads * c.head_dim
    size = {
        "V": c.vocab_size,
        "logits": c.vocab_size,
        "H": c.hidden_size,
        "E": c.num_local_experts,
        "heads": c.num_attention_heads,
        "16": MX_GROUP // 2,
        "Q": q,
        "KV": kv,
        "QKV": q + 2 * kv,
        "I": c.intermediate_size,
        "2I": 2 * c.intermediate_size,
        "H/2": c.hidden_size // 2,
        "H/32": c.hidden_size // MX_GROUP,
        "I/2": c.intermediate_size // 2,
        "I/32": c.intermediate_size // MX_GROUP,
    }
    stored = []
    for row in LAYOUTS[layout].strip().splitlines():
        if row and ("{l}" in row) == (layer is not None):
            name, ours, dtype, *shape = row.split()
            if dtype == "float" and activations != "fp8":
                continue
            for e in range(c.num_local_experts if "{e}" in name else 1):
                stored.append(
                    Stored(
                        name.format(l=layer, e=e),
                        ours.format(l=layer),
                        DTYPES[dtype],
                        tuple(size[s] for s in shape),
                        tuple(shape),
                    )
                )
    return stored


# --------------------------------------------------------------------------------------------------
# Reading


def load(path: str | Path, shard: Shard = WHOLE) -> Checkpoint:
    """Loads the checkpoint in folder `path`, or a shard of it. Tensors are memory-mapped views of
    its files, but for those that are joined (Hugging Face's q, k, v; Quark's experts; a shard of a
    fused qkv), which are copied into memory a layer at a time.

    Raises CheckpointError for anything missing, unexpected, contradictory or damaged."""
    path = Path(path)
    check_folder(path)
    raw, source = read_json(path / "config.json"), path / "config.json"
    config = Config.from_dict(raw, str(source))
    files = find_files(path)
    layout = decide_layout(path, raw, files)
    activations = quark_activations(source, raw) if layout == "quark" else "bf16"
    packed = layout != "hf-bf16"
    if packed and (config.hidden_size % MX_GROUP or config.intermediate_size % MX_GROUP):
        raise CheckpointError(
            f"{source}: hidden_size and intermediate_size must be multiples of {MX_GROUP}, the "
            "group that shares a scale"
        )
    layers = (None, *range(config.num_hidden_layers))
    check(path, files, [t for n in layers for t in tensors_of(config, layout, n, activations)])

    def read_group(group: list[Stored]) -> list[torch.Tensor]:
        # A view of a memory-mapped file: what is not in the shard is not read.
        return [shard.cut(s, t, config) for s, t in zip(group, read(files, group), strict=True)]

    checkpoint = assemble(config, shard, layout, activations, read_group, "loading")
    return dataclasses.replace(checkpoint, stop_tokens=checkpoint.stop_tokens | find_stops(path))


def check_folder(path: Path) -> None:
    """Raises CheckpointError for what cannot be a checkpoint's folder, saying what to do."""
    gguf = "GGUF is not read here; download the *.safetensors checkpoint, openai/gpt-oss-20b say"
    if path.is_file():
        remedy = "a checkpoint is a folder, name the one it lies in"
        raise CheckpointError(f"{path}: a file; {gguf if path.suffix == '.gguf' else remedy}")
    if not path.exists():
        remedy = "a checkpoint is a folder with config.json and *.safetensors"
        if re.fullmatch(r"[\w.-]+/[\w.-]+", str(path)) and not path.parent.exists():
            remedy = f"to have it from Hugging Face: hf download {path} --local-dir {path.name}"
        raise CheckpointError(f"{path}: no such folder; {remedy}")
    if not any(path.glob("*.safetensors")):
        for ending, remedy in (
            ("gguf", gguf),
            ("bin", "pickled weights are not read here; save the model with safetensors"),
        ):
            if file := next(path.glob(f"*.{ending}"), None):
                raise CheckpointError(f"{file}: {remedy}")


def find_stops(path: Path) -> frozenset[int]:
    """Stop tokens that a checkpoint names elsewhere than in config.json: generation_config.json's
    and, of the tokenizer's own, ENDS."""
    stops, file = [], path / "generation_config.json"
    named = read_json(file).get("eos_token_id") if file.exists() else None
    if named is not None:
        tokens, expected = typed(named, tuple[int, ...])
        if tokens is None:
            raise CheckpointError(f"{file}: eos_token_id is {named!r}, expected {expected}")
        stops += tokens
    file = path / "tokenizer.json"
    added = (read_json(file).get("added_tokens") or []) if file.exists() else []
    try:
        stops += [token["id"] for token in added if token["content"] in ENDS]
    except (KeyError, TypeError) as error:
        raise CheckpointError(f"{file}: added_tokens is no list of contents and ids") from error
    return frozenset(stops)


def random(
    config: Config, layout: str, device="cpu", seed: int = 0, shard: Shard = WHOLE
) -> Checkpoint:
    """Made-up weights of true shapes, on `device`, as a checkpoint of that layout, or a shard of
    it, would load; on "meta", the shapes alone. They are drawn a layer at a time, and packed
    experts are never held unpacked."""
    generator = None if device == "meta" else torch.Generator(device).manual_seed(seed)

    def draw_group(group: list[Stored]) -> list[torch.Tensor]:
        return [draw_part(stored) for stored in group]

    def draw_part(stored: Stored) -> torch.Tensor:
        whole = draw(stored, device, generator)
        part = shard.cut(stored, whole, config)
        return part if part is whole else part.clone()  # which lets the whole go

    activations = "fp8" if layout == "quark" else "bf16"
    return assemble(config, shard, layout, activations, draw_group, "random weights")


def random_tensors(config: Config, layout: str, seed: int = 0) -> dict[str, torch.Tensor]:
    """The tensors of `random` under their stored names, to be written to a file."""
    generator = torch.Generator().manual_seed(seed)
    layers = (None, *range(config.num_hidden_layers))
    groups = [tensors_of(config, layout, layer) for layer in layers]
    return {stored.name: draw(stored, "cpu", generator) for group in groups for stored in group}


def draw(stored: Stored, device, generator: torch.Generator | None) -> torch.Tensor:
    """Weights under which the products of a layer stay of the order of its inputs."""
    options = {"generator": generator, "device": device}
    if stored.dtypes == DTYPES["u8"]:
        return torch.randint(256, stored.shape, dtype=torch.uint8, **options)
    if stored.dtypes == DTYPES["e8m0"]:
        inputs = stored.shape[-1] * MX_GROUP
        # The sixteen e2m1 values have a standard deviation of 2.6.
        middle = 127 - round(math.log2(2.6 * inputs**0.5))
        return torch.randint(middle - 2, middle + 2, stored.shape, dtype=torch.uint8, **options)
    if stored.dtypes == DTYPES["float"]:
        return 0.01 + 0.01 * torch.rand(stored.shape, **options)
    x = torch.randn(stored.shape, dtype=torch.bfloat16, **options)
    if "norm" in stored.ours:
        return 1 + 0.2 * x
    if "bias" in stored.ours:
        # Small beside what differs from token to token, so that these choose experts nearly
        # independently.
        return 0.1 * x
    if "sinks" in stored.ours:
        return x
    inputs = stored.shape[-2 if len(stored.shape) == 3 else -1]  # unpacked experts are [E, in, out]
    return x * ((3 if stored.ours == "unembedding" else 1) / inputs**0.5)


def assemble(
    config: Config, shard: Shard, layout: str, activations: str, read_group: Callable, label: str
) -> Checkpoint:
    """A checkpoint, a layer at a time. `read_group` gives the shard of each of a list of Stored."""
    part, names = shard.config(config), [field.name for field in dataclasses.fields(Experts)]
    dense, experts = {}, []
    for layer in progress((None, *range(config.num_hidden_layers)), label):
        group, parts = tensors_of(config, layout, layer, activations), {}
        for stored, tensor in zip(group, read_group(group), strict=True):
            parts.setdefault(stored.ours, []).append(tensor)
        joined = {ours: join(ours, tensors) for ours, tensors in parts.items()}
        if layer is not None:
            fields = {name: joined.pop(f"{layer}.{name}", None) for name in names}
            experts.append(as_experts(layout, layer, fields))
        dense |= joined
    stop_tokens = frozenset(config.eos_token_id)
    return Checkpoint(part, layout, dense, experts, activations, stop_tokens, shard)


def join(ours: str, tensors: list[torch.Tensor]) -> torch.Tensor:
    """q, k and v along their rows; Quark's experts stacked; what is alone, as it is."""
    if len(tensors) == 1:
        return tensors[0]
    return torch.cat(tensors) if "qkv" in ours else torch.stack(tensors)


def read(files: dict[str, Path], group: list[Stored]) -> list[torch.Tensor]:
    """The tensors of a group. What will be joined is read through maps of its own, so that its
    pages leave memory with them."""
    rows = Counter(stored.ours for stored in group)
    maps: dict[tuple[Path, bool], safe_open] = {}
    tensors = []
    for stored in group:
        key = files[stored.name], rows[stored.ours] > 1
        if key not in maps:
            maps[key] = open_file(key[0])
        tensor = maps[key].get_tensor(stored.name).reshape(stored.shape)
        scale = tensor.dtype == torch.float8_e8m0fnu  # a byte: reinterpreted, never converted
        tensors.append(tensor.view(torch.uint8) if scale else tensor)
    return tensors


def as_experts(layout: str, layer: int, fields: dict) -> Experts:
    """The layer's expert tensors in the shapes of Experts: all views."""
    for name in ("gate_up", "down"):
        if layout == "hf-bf16":
            # [E, in, out] -> [E, out, in]
            fields[f"{name}_weight"] = fields[f"{name}_weight"].transpose(1, 2)
        elif layout == "quark" and (scales := fields[f"{name}_input_scale"]) is not None:
            for e, scale in enumerate(scales.flatten().tolist()):
                if not 0 < scale < math.inf:
                    where = f"model.layers.{layer}.mlp.experts.{e}.{name}_proj.input_scale"
                    raise CheckpointError(f"{where} is {scale}, expected a positive number")
            fields[f"{name}_input_scale"] = float(scales.float().max())  # [E] -> one
        elif layout != "quark":
            # [E, out, in/32, 16] -> [E, out, in/2]
            fields[f"{name}_weight"] = fields[f"{name}_weight"].flatten(-2)
    return Experts(**fields)


def decide_layout(path: Path, raw: dict, names: Iterable[str]) -> str:
    """The layout, from the tensor names and config.json's quantization_config; a contradiction
    raises."""
    source, quantization = path / "config.json", raw.get("quantization_config") or {}
    if not isinstance(quantization, dict):
        raise CheckpointError(
            f"{source}: quantization_config is {quantization!r}, expected a table"
        )
    method = str(quantization.get("quant_method", "")).lower()
    found = [layout for layout, mark in MARKS.items() if any(name.endswith(mark) for name in names)]
    for ending, remedy in REMEDIES.items():
        if name := next((name for name in names if re.search(ending, name)), None):
            raise CheckpointError(f"{path}: tensor {name}: {remedy}")
    if method not in ("", "mxfp4", "quark"):
        raise CheckpointError(
            f"{source}: unknown quantisation: quant_method {method!r}, expected mxfp4 or quark; "
            "save the model dequantised, in bf16"
        )
    if len(found) != 1:
        raise CheckpointError(
            f"{path}: {'several layouts' if found else 'no known layout'} by the names of its "
            f"tensors; the endings that decide are {MARKS}"
        )
    if found[0] == "hf-bf16" and method == "mxfp4":
        raise CheckpointError(
            f"{source}: says quant_method mxfp4, but the experts are not packed; if they were "
            "unpacked on purpose, remove quantization_config"
        )
    allowed = {
        "hf-mxfp4": ("", "mxfp4"),
        "openai": ("", "mxfp4"),
        "quark": ("quark",),
        "hf-bf16": ("",),
    }[found[0]]
    if method not in allowed:
        raise CheckpointError(
            f"{source}: quant_method {method!r} contradicts the tensors, which are {found[0]}"
        )
    return found[0]


def quark_activations(source: Path, raw: dict) -> str:
    """What a Quark checkpoint's expert GEMMs are to see: "fp8" (static scales), "mxfp4" or, without
    activation quantisation, "bf16". Raises unless its weights are fp4 with E8M0 scales per 32."""
    quantization = raw["quantization_config"]
    inputs = lookup(quantization, "global_quant_config.input_tensors")
    fp8 = inputs and "fp8" in str(lookup(inputs, "dtype")).lower()
    dynamic = {
        "global_quant_config.input_tensors.dtype": "fp4|mxfp4",
        "global_quant_config.input_tensors.qscheme": "per_group",
        "global_quant_config.input_tensors.group_size": str(MX_GROUP),
        "global_quant_config.input_tensors.is_dynamic": "true",
    }
    static = {
        "global_quant_config.input_tensors.dtype": "fp8(_e4m3(fn)?)?",
        "global_quant_config.input_tensors.is_dynamic": "false|none",
    }
    for path, allowed in {
        **({} if not inputs else static if fp8 else dynamic),
        "global_quant_config.weight.dtype": "fp4|mxfp4",
        "global_quant_config.weight.qscheme": "per_group",
        "global_quant_config.weight.group_size": str(MX_GROUP),
        "global_quant_config.weight.scale_format": "e8m0",
        "global_quant_config.weight.is_dynamic": "false",
        "export.pack_method": "reorder",
        "export.weight_format": "real_quantized",
    }.items():
        found = lookup(quantization, path)
        if not re.fullmatch(allowed, str(found).lower()):
            raise CheckpointError(
                f"{source}: unknown quantisation: quantization_config.{path} is {found!r}, "
                f"expected {allowed}"
            )
    return "fp8" if fp8 else "mxfp4" if inputs else "bf16"


def read_json(file: Path) -> dict:
    """A JSON object from `file`; raises CheckpointError naming the file."""
    try:
        value = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(
            f"{file}: {error.strerror}; a checkpoint is a folder with config.json and *.safetensors"
        ) from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{file}: holds a {type(value).__name__}, expected a JSON object")
    return value


def find_files(path: Path) -> dict[str, Path]:
    """Name of every tensor -> the file that holds it; the shard index, where there is one, must
    agree."""
    index, whole = path / "model.safetensors.index.json", path / "model.safetensors"
    shards = [whole] if whole.exists() else sorted(path.glob("*.safetensors"))
    weight_map = {}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        named = weight_map.values() if isinstance(weight_map, dict) else ()
        if not named or not all(isinstance(shard, str) for shard in named):
            raise CheckpointError(f"{index}: has no weight_map table of file names")
        # transformers reads the one file where both are there, which may be of another model.
        if whole.exists() and whole.name not in named:
            raise CheckpointError(
                f"{index}: does not name {whole.name}, which is there too; remove one of the two"
            )
        shards = [path / shard for shard in sorted(set(weight_map.values()))]
    if not shards:
        raise CheckpointError(f"{path}: no *.safetensors in this folder")
    files: dict[str, Path] = {}
    for shard in shards:
        if not shard.exists():
            raise CheckpointError(
                f"{shard}: no such file, but {index.name} names this shard; download it"
            )
        for name in open_file(shard).keys():
            if name in weight_map:
                if weight_map[name] == shard.name:
                    files[name] = shard
            elif name in files:
                raise CheckpointError(f"{shard}: tensor {name} is in {files[name].name} too")
            else:
                files[name] = shard
    for name, shard in weight_map.items():
        if files.get(name) != path / shard:
            raise CheckpointError(
                f"{path / shard}: missing tensor {name}, which {index.name} places there"
            )
    return files


def open_file(file: Path):
    """safe_open with an error that names the file; a truncated shard fails here."""
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({error}); download it again"
        ) from error


def check(path: Path, files: dict[str, Path], expected: list[Stored]) -> None:
    """Accounts for every tensor: raises on one that is missing, unexpected, or of another shape or
    dtype."""
    headers = {file: open_file(file) for file in set(files.values())}
    for stored in expected:
        want = f"expected {' or '.join(stored.dtypes)} {list(stored.shape)}"
        if stored.name not in files:
            raise CheckpointError(f"{path}: missing tensor {stored.name}, {want}")
        file = files[stored.name]
        found = headers[file].get_slice(stored.name)
        shape, dtype = tuple(found.get_shape()), found.get_dtype()
        # a scalar may be stored as [1]
        if (
            shape != stored.shape
            and not (stored.shape == () and shape == (1,))
            or dtype not in stored.dtypes
        ):
            raise CheckpointError(f"{file}: tensor {stored.name} is {dtype} {list(shape)}, {want}")
    extra = set(files) - {stored.name for stored in expected}
    if unexpected := sorted(name for name in extra if not re.search(CACHE_SCALES, name)):
        more = f" and {len(unexpected) - 1} more" if len(unexpected) > 1 else ""
        raise CheckpointError(
            f"{files[unexpected[0]]}: unexpected tensor {unexpected[0]}{more}; config.json has no "
            "place for it"
        )


def progress(items: Collection, label: str) -> Iterator:
    """Passes `items` through, with a bar on stderr where that is a terminal."""
    for done, item in enumerate(items, 1):
        yield item
        if sys.stderr.isatty():
            bar = f"{'#' * (30 * done // len(items)):30}"
            end = "\r\033[K" if done == len(items) else ""
            print(f"\r{label} [{bar}] {done}/{len(items)}", end=end, file=sys.stderr, flush=True)


# --------------------------------------------------------------------------------------------------
# Tokenizer


def byte_of_character() -> dict[str, int]:
    """The printable characters that stand for bytes in a byte-level BPE vocabulary (GPT-2's
    encoder.py): a byte that prints stands for itself, the others take the code points from 256 on,
    in order."""
    printable = [
        *range(ord("!"), ord("~") + 1),
        *range(ord("¡"), ord("¬") + 1),
        *range(ord("®"), ord("ÿ") + 1),
    ]
    others = [b for b in range(256) if b not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(others)}


def load_tokenizer(path: str | Path) -> tiktoken.Encoding:
    """The checkpoint's own tokenizer.json (byte-level BPE) as a tiktoken encoding; for OpenAI's
    layout, which has none, tiktoken's o200k_harmony. Raises CheckpointError where neither can be
    had."""
    check_folder(Path(path))
    file = Path(path) / "tokenizer.json"
    if not file.exists():
        # What will not load is said before tiktoken asks the network.
        read_json(Path(path) / "config.json")
        find_files(Path(path))
        try:
            return tiktoken.get_encoding("o200k_harmony")
        except Exception as error:  # tiktoken passes on whatever its download raised
            raise CheckpointError(
                f"{file}: no such file, and tiktoken's o200k_harmony cannot be had ({error}); copy "
                "tokenizer.json from the Hugging Face checkpoint beside config.json"
            ) from error
    raw = read_json(file)
    try:
        model, steps = raw["model"], raw["pre_tokenizer"]
        steps = steps.get("pretokenizers", [steps])
        pattern = next(step["pattern"]["Regex"] for step in steps if step["type"] == "Split")
        byte_of = byte_of_character()
        specials = {token["content"]: token["id"] for token in raw["added_tokens"]}
        ranks = {
            bytes(byte_of[character] for character in token): rank
            for token, rank in model["vocab"].items()
            if token not in specials
        }
        merges = [
            merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]
        ]
        order = [model["vocab"][left + right] for left, right in merges]
    except (KeyError, TypeError, StopIteration, AttributeError, ValueError) as error:
        raise CheckpointError(
            f"{file}: not a byte-level BPE tokenizer with a Split pattern "
            f"({type(error).__name__}: {error})"
        ) from error
    # tiktoken merges the lowest id first, so ids must rise with the merges
    if order != sorted(order):
        raise CheckpointError(f"{file}: token ids do not rise in the order of the merges")
    if missing := [b for b in range(256) if bytes([b]) not in ranks]:
        raise CheckpointError(f"{file}: no token for the bytes {missing}")
    return tiktoken.Encoding(
        name=str(file), pat_str=pattern, mergeable_ranks=ranks, special_tokens=specials
    )
