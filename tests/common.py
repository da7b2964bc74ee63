"""Makers that the tests share."""

import json
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file

import gptoss
import weights

ROOT = Path(__file__).parents[1]
TINY = ROOT / "tiny"
SMALL = dict(
    vocab_size=97,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=20,
    num_local_experts=5,
    num_experts_per_tok=3,
    sliding_window=7,
    initial_context_length=64,
)


def random_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """The model under its Hugging Face mxfp4 names."""
    return weights.random_tensors(weights.Config.from_dict(config), "hf-mxfp4", seed)


def hf_config(**changes) -> dict:
    c = SMALL | changes
    context = c.pop("initial_context_length")
    return c | dict(
        model_type="gpt_oss",
        swiglu_limit=7.0,
        rms_norm_eps=1e-5,
        rope_theta=150000.0,
        tie_word_embeddings=False,
        attention_bias=True,
        hidden_act="silu",
        max_position_embeddings=context * 8,
        initial_context_length=context,
        layer_types=[weights.LAYER_TYPES[n % 2] for n in range(c["num_hidden_layers"])],
        rope_scaling=dict(
            rope_type="yarn",
            factor=8.0,
            beta_fast=32.0,
            beta_slow=1.0,
            truncate=False,
            original_max_position_embeddings=context,
        ),
        quantization_config=dict(quant_method="mxfp4", modules_to_not_convert=[]),
    )


def to_openai(config: dict, tensors: dict) -> tuple[dict, dict]:
    c = weights.Config.from_dict(config)
    renamed = {
        "num_local_experts",
        "num_experts_per_tok",
        "rms_norm_eps",
        "max_position_embeddings",
        "layer_types",
        "eos_token_id",
        "rope_scaling",
        "quantization_config",
        "model_type",
    }
    openai = {key: value for key, value in config.items() if key not in renamed} | dict(
        num_experts=c.num_local_experts,
        experts_per_token=c.num_experts_per_tok,
        rope_scaling_factor=c.rope_factor,
        rope_ntk_alpha=c.rope_beta_slow,
        rope_ntk_beta=c.rope_beta_fast,
    )
    renamed = {}
    for layer in (None, *range(c.num_hidden_layers)):
        ours = {}
        for stored in weights.tensors_of(c, "hf-mxfp4", layer):
            ours.setdefault(stored.ours, []).append(tensors[stored.name])
        for stored in weights.tensors_of(c, "openai", layer):
            renamed[stored.name] = torch.cat(ours[stored.ours])
    return openai, renamed


def to_quark(config: dict, tensors: dict) -> tuple[dict, dict]:
    weight = dict(
        dtype="fp4", qscheme="per_group", group_size=32, scale_format="e8m0", is_dynamic=False
    )
    quantization = dict(
        quant_method="quark",
        exclude=["lm_head"],
        export=dict(pack_method="reorder", weight_format="real_quantized"),
        global_quant_config=dict(
            weight=weight,
            input_tensors=dict(dtype="fp8_e4m3", qscheme="per_tensor", is_dynamic=False),
        ),
    )
    renamed = {}
    for name, tensor in tensors.items():
        if ".experts." not in name:
            renamed[name] = tensor
            continue
        base, _, tail = name.partition("experts.")  # "gate_up_proj_blocks"
        proj, _, part = tail.rpartition("_")
        for e in range(tensor.shape[0]):
            stem = f"{base}experts.{e}.{proj}."
            if part == "blocks":
                renamed[stem + "weight"] = tensor[e].flatten(-2).clone()
                renamed[stem + "input_scale"] = torch.tensor(0.01 + 0.001 * e)
            elif part == "scales":  # as Quark exports them
                renamed[stem + "weight_scale"] = tensor[e].clone().view(torch.float8_e8m0fnu)
            else:
                renamed[stem + "bias"] = tensor[e].clone()
    return config | dict(quantization_config=quantization), renamed


def to_bf16(config: dict, tensors: dict) -> tuple[dict, dict]:
    renamed = {}
    for name, tensor in tensors.items():
        if name.endswith("_blocks"):
            scale = tensors[name.replace("_blocks", "_scales")]
            full = gptoss.dequantise_mxfp4(tensor.flatten(-2), scale).bfloat16()
            renamed[name.removesuffix("_blocks")] = full.transpose(
                1, 2
            ).contiguous()  # [E, in, out]
        elif not name.endswith("_scales"):
            renamed[name] = tensor
    return {k: v for k, v in config.items() if k != "quantization_config"}, renamed


CONVERT = {
    "hf-mxfp4": lambda config, tensors: (config, tensors),
    "openai": to_openai,
    "quark": to_quark,
    "hf-bf16": to_bf16,
}


def write(path: Path, config: dict, tensors: dict, shards: int = 1) -> Path:
    path.mkdir(parents=True, exist_ok=True)
    (path / "config.json").write_text(json.dumps(config))
    if shards == 1:
        save_file(tensors, path / "model.safetensors")
        return path
    names = sorted(tensors)
    weight_map = {
        name: f"model-{n * shards // len(names) + 1:05}-of-{shards:05}.safetensors"
        for n, name in enumerate(names)
    }
    for shard in set(weight_map.values()):
        save_file(
            {name: tensors[name] for name in names if weight_map[name] == shard}, path / shard
        )
    (path / "model.safetensors.index.json").write_text(json.dumps(dict(weight_map=weight_map)))
    return path


def make(path: Path, layout: str = "hf-mxfp4", seed: int = 0, shards: int = 1, **changes) -> Path:
    config = hf_config(**changes)
    return write(path, *CONVERT[layout](config, random_tensors(config, seed)), shards=shards)


def oracle(config: dict, tensors: dict):
    """transformers' model with these weights, float32, plain attention."""
    from transformers import GptOssConfig, GptOssForCausalLM

    config, tensors = to_bf16(config, tensors)
    model = GptOssForCausalLM._from_config(
        GptOssConfig(**config), attn_implementation="eager", dtype=torch.float32
    )
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model.eval()


def oracle_greedy(model, prompt: list[int], count: int) -> list[int]:
    tokens = torch.tensor([prompt])
    out = model.generate(
        tokens,
        attention_mask=torch.ones_like(tokens),
        max_new_tokens=count,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    return out[0, len(prompt) :].tolist()


def prompt_of(length: int, vocab: int = 97, seed: int = 0) -> list[int]:
    return torch.randint(vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).norm() / b.norm())


def moe_case(T=9, seed=0):
    """x [T, H] and the router and experts of a random model's first layer."""
    checkpoint = weights.random(weights.Config.from_dict(hf_config()), "hf-mxfp4", seed=seed)
    experts = replace(checkpoint.experts[0], gate_up_input_scale=0.02, down_input_scale=0.5)
    x = torch.randn(T, checkpoint.config.hidden_size, generator=torch.Generator().manual_seed(seed))
    return x, checkpoint.dense["0.router_weight"], checkpoint.dense["0.router_bias"], experts
