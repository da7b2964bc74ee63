"""Tests of the engine: `python -m pytest`. The oracle is Hugging Face transformers' own GPT-OSS, in
float32.

One random model is written in every published layout; its numbers are exact in bf16 and mxfp4, so
that all layouts and the oracle hold the same weights. Where a test compares float32 results, 1e-4
relative is what the issue of summation order leaves: about 1e-6 a GEMM, through a few layers and a
softmax."""

import json
import math
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import gptoss
import weights
from gptoss import GPTOSS

torch.set_num_threads(1)  # these models are too small to share
ROOT = Path(__file__).parent
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


# --------------------------------------------------------------------------------------------------
# One random model in every layout


def random_tensors(config: dict, seed: int) -> dict[str, torch.Tensor]:
    """The model under its Hugging Face mxfp4 names."""
    generator = torch.Generator().manual_seed(seed)
    c = weights.Config.from_dict(config)

    def draw(stored: weights.Stored) -> torch.Tensor:
        if stored.dtypes == ("U8",):
            return torch.randint(256, stored.shape, generator=generator, dtype=torch.uint8)
        if "U8" in stored.dtypes:  # weights of about 0.1
            return torch.randint(121, 125, stored.shape, generator=generator, dtype=torch.uint8)
        x = torch.randn(stored.shape, generator=generator)
        if "norm" in stored.ours:
            return (1 + 0.2 * x).bfloat16()
        if "weight" in stored.ours or "embedding" in stored.ours:
            x = x / stored.shape[-1] ** 0.5 * (3 if "unembedding" in stored.ours else 1)
        return x.bfloat16()

    return {
        stored.name: draw(stored)
        for layer in (None, *range(c.num_hidden_layers))
        for stored in weights.tensors_of(c, "hf-mxfp4", layer)
    }


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
        eos_token_id=96,
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


# --------------------------------------------------------------------------------------------------
# The model against the oracle

ODD = [
    dict(),
    dict(num_local_experts=9, num_experts_per_tok=4, sliding_window=1, head_dim=34),
    dict(
        num_hidden_layers=1,
        num_attention_heads=3,
        num_key_value_heads=3,
        vocab_size=131,
        intermediate_size=32,
    ),
    dict(
        num_hidden_layers=4,
        num_key_value_heads=1,
        sliding_window=30,
        hidden_size=32,
        num_experts_per_tok=1,
    ),
]


@pytest.mark.parametrize("seed, changes", list(enumerate(ODD)))
def test_logits_equal_transformers(tmp_path, seed, changes):
    config = hf_config(**changes)
    tensors = random_tensors(config, seed)
    tokens = prompt_of(90, config["vocab_size"], seed)
    with torch.no_grad():
        expected = oracle(config, tensors)(torch.tensor([tokens])).logits[0]
    found = GPTOSS.from_pretrained(write(tmp_path, config, tensors)).logits(tokens)
    assert found.shape == (90, config["vocab_size"]) and found.dtype == torch.float32
    assert relative(found, expected) < 1e-4


def test_every_layout_gives_identical_logits(tmp_path, monkeypatch):
    tokens = prompt_of(40)
    paths = {
        layout: make(tmp_path / layout, layout, shards=1 + 2 * (layout != "openai"))
        for layout in CONVERT
    }
    logits = {}
    for layout, path in paths.items():
        model = GPTOSS.from_pretrained(path, activations="bf16")
        assert model.layout == layout
        logits[layout] = model.logits(tokens)
        assert torch.equal(logits[layout], logits["hf-mxfp4"])
    monkeypatch.setattr(gptoss, "EXPAND_BELOW", 0)  # as for the real models: experts stay packed
    packed = {
        layout: GPTOSS.from_pretrained(path, activations="bf16") for layout, path in paths.items()
    }
    assert all(
        packed[layout].layers[0].experts.gate_up_weight.dtype == torch.uint8
        for layout in packed
        if layout != "hf-bf16"
    )
    for layout, model in packed.items():
        assert relative(model.logits(tokens), logits["hf-mxfp4"]) < 1e-5
        if layout != "hf-bf16":
            assert torch.equal(model.logits(tokens), packed["hf-mxfp4"].logits(tokens))


def test_transformers_5_config_is_read(tmp_path):
    """transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling."""
    config = hf_config()
    rope = config.pop("rope_scaling") | dict(rope_theta=config.pop("rope_theta"))
    assert weights.Config.from_dict(
        config | dict(rope_parameters=rope)
    ) == weights.Config.from_dict(hf_config())


def test_greedy_equals_transformers_alone_and_batched(tmp_path):
    config = hf_config()
    tensors = random_tensors(config, 1)
    reference, model = (
        oracle(config, tensors),
        GPTOSS.from_pretrained(write(tmp_path, config, tensors)),
    )
    prompts = [prompt_of(n, seed=n) for n in (1, 5, 17, 40, 33, 8)]
    expected = [oracle_greedy(reference, p, 24) for p in prompts]
    assert [model.generate([p], 24)[0] for p in prompts] == expected
    for max_batch in (1, 4, 64):
        assert model.generate(prompts, 24, max_batch=max_batch) == expected
    stop = expected[2][10]  # a stop token ends a prompt before it and stays out
    cut = [e[: e.index(stop)] if stop in e else e for e in expected]
    assert model.generate(prompts, 24, stop_tokens=[stop]) == cut


@pytest.mark.parametrize("page_size", [1, 16, 64])
@pytest.mark.parametrize("chunk", [3, 1024])
def test_paged_and_chunked_equals_dense(tmp_path, monkeypatch, page_size, chunk):
    config = hf_config()
    tensors, tokens = random_tensors(config, 2), prompt_of(70)
    reference, model = (
        oracle(config, tensors),
        GPTOSS.from_pretrained(write(tmp_path, config, tensors)),
    )
    monkeypatch.setattr(gptoss, "PAGE_SIZE", page_size)
    monkeypatch.setattr(gptoss, "PREFILL_TOKENS", chunk)
    with torch.no_grad():
        assert relative(model.logits(tokens), reference(torch.tensor([tokens])).logits[0]) < 1e-4
    expected = oracle_greedy(reference, tokens, 40)
    assert model.generate([tokens, tokens[:9]], 40, page_size=page_size)[0] == expected


def test_prefill_scores_stay_bounded(tmp_path, monkeypatch):
    model, tokens = GPTOSS.from_pretrained(make(tmp_path)), prompt_of(300)
    expected = model.logits(tokens)
    monkeypatch.setattr(gptoss, "PREFILL_SCORES", 1 << 14)
    sizes, build = [], model.step

    def step(*args):
        built = build(*args)
        sizes.append(max(span.mask.numel() for span in built.spans.values()))
        return built

    monkeypatch.setattr(model, "step", step)
    assert relative(model.logits(tokens), expected) < 1e-5
    # twice the bound: a chunk also reads, masked, the slots that it is about to fill
    assert len(sizes) > 10 and max(sizes) <= 2 << 14


def test_bfloat16_is_near_float32(tmp_path):
    path, tokens = make(tmp_path, num_hidden_layers=2), prompt_of(60)
    low = GPTOSS.from_pretrained(path, dtype=torch.bfloat16).logits(tokens)
    # about ten roundings of 2^-9 in each layer, in quadrature, and experts that near-ties of the
    # router swap
    assert relative(low, GPTOSS.from_pretrained(path).logits(tokens)) < 0.1


# --------------------------------------------------------------------------------------------------
# Engine


def test_window_pages_are_bounded_far_past_the_window(tmp_path, monkeypatch):
    model = GPTOSS.from_pretrained(make(tmp_path))  # window 7
    for page_size in (1, 3, 16):
        tables = []
        allocate = gptoss.KVCache.allocate
        monkeypatch.setattr(
            gptoss.KVCache, "allocate", lambda *a, f=allocate, t=tables: t.append(f(*a)) or t[-1]
        )
        assert len(model.generate([prompt_of(5)], 200, page_size=page_size)[0]) == 200
        bound, full = -(-7 // page_size) + 1, -(-205 // page_size)
        assert len(tables) == 1 and len(tables[0]["sliding_attention"]) <= bound
        assert len(tables[0]["full_attention"]) == full
        assert model.cache.peak <= full + bound
        monkeypatch.undo()


def test_prompts_wait_for_pages_and_free_them(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(n, seed=n) for n in (30, 3, 22, 9, 14)]
    alone = [model.generate([p], 12, page_size=4)[0] for p in prompts]
    needed = sum(gptoss.pages_needed(model.config, 42, 4).values())
    for num_pages, max_batch in ((needed, 64), (needed + 3, 64), (None, 64), (1000, 2), (None, 2)):
        assert (
            model.generate(prompts, 12, page_size=4, num_pages=num_pages, max_batch=max_batch)
            == alone
        )
        assert sorted(model.cache.free) == list(range(1, model.cache.num_pages + 1))
        assert model.cache.peak <= model.cache.num_pages
    model.forward = None  # nothing may run
    with pytest.raises(
        ValueError, match=f"prompt 0 needs {needed} pages .* the pool has {needed - 1}"
    ):
        model.stream(prompts, 12, page_size=4, num_pages=needed - 1)


def test_max_batch_bounds_what_decodes_together(tmp_path, monkeypatch):
    model, together = GPTOSS.from_pretrained(make(tmp_path)), []
    step = model.step
    monkeypatch.setattr(
        model,
        "step",
        lambda cache, positions, slots: (
            together.append(len(positions)) or step(cache, positions, slots)
        ),
    )
    model.generate([prompt_of(4)] * 5, 6, num_pages=1000, max_batch=2)
    assert max(together) == 2


def test_streams_interleave_and_match_generate(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(4), prompt_of(6, seed=1)]
    events = list(model.stream(prompts, 5))
    assert [index for index, _ in events[:6]] == [0, 1, 0, 1, 0, 1]
    assert [[t for i, t in events if i == index] for index in (0, 1)] == model.generate(prompts, 5)
    assert model.generate(prompts, 0) == [[], []] and model.generate([], 5) == []


def test_sampling_follows_the_distribution():
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0, 2.5]])
    n = 100_000
    draws = [
        (i + 0.5) / n for i in range(n)
    ]  # a grid: counts are n times the shares, to a step and float32's 1e-7 n
    for temperature, top_k, top_p, kept in (
        (1.0, None, None, [0, 1, 2, 3, 4]),
        (0.5, None, None, [0, 1, 2, 3, 4]),
        (1.0, 2, None, [1, 4]),
        (1.0, None, 0.6, [1, 4]),
        (1.0, None, 1e-6, [1]),
        (2.0, 3, 0.9, [1, 4, 2]),
        (1.0, 99, 1.0, [0, 1, 2, 3, 4]),
    ):
        share = (logits[0].double() / temperature).softmax(-1)
        expected = torch.zeros(5, dtype=torch.double)
        expected[kept] = share[kept] / share[kept].sum()
        tokens = gptoss.sample(logits.expand(n, 5), draws, temperature, top_k, top_p)
        assert (torch.bincount(tokens, minlength=5) - n * expected).abs().max() <= 2
    assert gptoss.sample(logits, draws[:1], 0.0, None, None).tolist() == [1]


def test_generations_may_interleave(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    first, second = model.stream([prompt_of(9)], 20), model.stream([prompt_of(5, seed=1)], 20)
    pairs = [(a, b) for (_, a), (_, b) in zip(first, second, strict=True)]
    assert [a for a, _ in pairs] == model.generate([prompt_of(9)], 20)[0]
    assert [b for _, b in pairs] == model.generate([prompt_of(5, seed=1)], 20, 0.0)[0]


def test_same_seed_same_tokens_in_any_batch(tmp_path):
    model = GPTOSS.from_pretrained(make(tmp_path))
    prompts = [prompt_of(4), prompt_of(6, seed=1), prompt_of(9, seed=2)]
    options = dict(temperature=1.5, top_k=50, top_p=0.95)
    first = model.generate(prompts, 30, seed=7, **options)
    assert first == model.generate(prompts, 30, seed=7, max_batch=2, **options)
    assert first[0] == model.generate(prompts[:1], 30, seed=7, **options)[0]
    assert first != model.generate(prompts, 30, seed=8, **options)
    assert model.generate(prompts, 30, **options) != model.generate(prompts, 30, **options)


@pytest.mark.parametrize(
    "prompts, options, message",
    [
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 97]], {}, "token 97, outside the vocabulary of 97"),
        (
            [[1] * 500],
            dict(max_new_tokens=20),
            "prompt 0 is too long: 500 tokens and 20 new ones exceed .* 512",
        ),
        ([[1]], dict(temperature=-1.0), "temperature"),
        ([[1]], dict(top_p=0.0), "top_p"),
        ([[1]], dict(top_k=0), "top_k"),
        ([[1]], dict(page_size=0), "page_size"),
        ([[1]], dict(max_batch=0), "max_batch"),
        ([[1]], dict(max_new_tokens=-1), "max_new_tokens"),
        ([[1]], dict(num_pages=0), "the pool has 0"),
    ],
)
def test_bad_requests_are_named(tmp_path, prompts, options, message):
    model = GPTOSS.from_pretrained(make(tmp_path))
    with pytest.raises(ValueError, match=message):
        model.generate(prompts, **dict(max_new_tokens=3) | options)
    with pytest.raises(ValueError, match="empty"):
        model.logits([])


@pytest.mark.parametrize(
    "options, message",
    [
        (dict(moe="fast"), "moe='fast'"),
        (dict(moe="gluon"), "moe='gluon' needs Triton with an active gfx950"),
        (dict(activations="int8"), "activations='int8'"),
        (dict(activations="fp8"), "needs the static input scales of a Quark checkpoint"),
    ],
)
def test_bad_model_arguments_are_named(tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        GPTOSS.from_pretrained(make(tmp_path), **options)


# --------------------------------------------------------------------------------------------------
# Number formats and the MoE layer

E2M1_VALUES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def test_unpack_mxfp4_all_bytes_and_scales():
    packed = torch.arange(256, dtype=torch.uint8).view(16, 16)  # 16 groups of 32
    for scale in range(256):
        found = gptoss.dequantise_mxfp4(
            packed, torch.full((16, 1), scale, dtype=torch.uint8)
        ).flatten()
        for byte in range(256):
            for nibble, value in zip(
                (byte & 15, byte >> 4), found[2 * byte : 2 * byte + 2].tolist(), strict=True
            ):
                sign = -1.0 if nibble & 8 else 1.0
                exact = sign * math.ldexp(E2M1_VALUES[nibble & 7], scale - 127)
                if scale == 255:
                    assert math.isnan(value)  # the E8M0 code for NaN
                elif abs(exact) > torch.finfo(torch.float32).max:
                    assert value == math.copysign(math.inf, sign)
                else:
                    assert value == exact and math.copysign(1, value) == sign
                    assert not value or torch.tensor(value).bfloat16() == value  # exact in bf16 too


def nearest(values: list[float], x: float) -> set[float]:
    """The values of a grid nearest to x: two where x lies half way."""
    distance = min(abs(v - x) for v in values)
    return {v for v in values if abs(v - x) == distance}


E4M3_VALUES = [
    v for v in torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).tolist() if v == v
]


@pytest.mark.parametrize(
    "activations, grid, emax",
    [
        ("mxfp4", sorted({s * v for v in E2M1_VALUES for s in (1, -1)}), 2),
        ("mxfp8", sorted(set(E4M3_VALUES)), 8),
    ],
)
def test_quantise_mx_rounds_to_nearest_even_and_saturates(activations, grid, emax):
    x = (
        torch.randn(200, 32, generator=torch.Generator().manual_seed(0))
        * torch.logspace(-6, 6, 200)[:, None]
    )
    x[0], x[1, 1:], x[2] = 0.0, 0.0, torch.linspace(-7.99, 7.99, 32)
    x[3] = torch.tensor([2.0**emax, *[2.0**emax * k / 64 for k in range(31)]])  # many ties
    found = gptoss.quantise_mx(x, activations)
    # every other code is the even one of a tie
    even = {v for n, v in enumerate(sorted(v for v in grid if v >= 0)) if n % 2 == 0}
    for group, rounded in zip(x.tolist(), found.tolist(), strict=True):
        largest = max(map(abs, group))
        scale = 2.0 ** (math.frexp(largest)[1] - 1 - emax) if largest else 1.0
        for value, result in zip(group, rounded, strict=True):
            allowed = nearest(grid, value / scale)
            assert result / scale in allowed
            if len(allowed) == 2:
                assert abs(result / scale) in even


def test_quantise_fp8_clamps():
    x = torch.tensor([1e9, -1e9, 448.0, 465.0, 0.1, -0.0])
    assert gptoss.quantise_fp8(x, 1.0).tolist()[:4] == [448.0, -448.0, 448.0, 448.0]
    assert (
        gptoss.quantise_fp8(x, 2.0).tolist()[3] == 2 * 240.0
    )  # 232.5 is nearest to 240 in steps of 16


def moe_case(T=9, seed=0):
    config = weights.Config.from_dict(hf_config())
    g = torch.Generator().manual_seed(seed)
    tensors = random_tensors(hf_config(), seed)
    base = "model.layers.0.mlp.experts."
    experts = weights.Experts(
        *(
            tensors[base + f"{p}_proj_{s}"]
            for p in ("gate_up", "down")
            for s in ("blocks", "scales", "bias")
        ),
        0.02,
        0.5,
    )
    experts.gate_up_weight, experts.down_weight = (
        experts.gate_up_weight.flatten(-2),
        experts.down_weight.flatten(-2),
    )
    x = torch.randn(T, config.hidden_size, generator=g)
    return (
        x,
        tensors["model.layers.0.mlp.router.weight"],
        tensors["model.layers.0.mlp.router.bias"],
        experts,
    )


@pytest.mark.parametrize("activations", gptoss.ACTIVATIONS)
def test_moe_reference_is_the_equations(activations):
    """Token by token and expert by expert, in float64. float32 sums differ by 1e-6, and may carry
    an intermediate over a rounding step of its format (2^-4 of an element for e4m3, 2^-2 for e2m1),
    in an element of 10^5 or fewer."""
    x, router_weight, router_bias, experts = moe_case()

    def seen(v, scale):
        v = v.float()
        return {"bf16": lambda: v, "fp8": lambda: gptoss.quantise_fp8(v, scale)}.get(
            activations, lambda: gptoss.quantise_mx(v, activations)
        )().double()

    full = gptoss.expand_experts(experts)
    expected = torch.zeros_like(x, dtype=torch.double)
    for t, token in enumerate(x):
        logits = router_weight.double() @ token.double() + router_bias.double()
        chosen = sorted(range(len(logits)), key=lambda e: (-logits[e].item(), e))[:3]
        shares = logits[chosen].softmax(0)
        for e, share in zip(chosen, shares, strict=True):
            h = full.gate_up_weight[e].double() @ seen(token, 0.02) + full.gate_up_bias[e].double()
            gate, up = h[0::2].clamp(max=7), h[1::2].clamp(-7, 7)
            a = gate * torch.sigmoid(1.702 * gate) * (up + 1)
            expected[t] += share * (
                full.down_weight[e].double() @ seen(a, 0.5) + full.down_bias[e].double()
            )
    for given in (experts, full):
        found = gptoss.moe_reference(x, router_weight, router_bias, given, 3, activations)
        assert relative(found.double(), expected) < (1e-5 if activations == "bf16" else 1e-3)
    if activations != "bf16":  # and the rounding is there
        plain = gptoss.moe_reference(x, router_weight, router_bias, experts, 3)
        assert relative(plain.double(), expected) > 1e-3


def test_router_ties_go_to_the_smaller_expert():
    x, router_weight, router_bias, experts = moe_case()
    router_weight, router_bias = router_weight[:1].expand(5, -1), router_bias[:1].expand(5)
    alone = [
        gptoss.moe_reference(
            x,
            router_weight[:1],
            router_bias[:1],
            weights.Experts(
                *(getattr(experts, f.name)[e : e + 1] for f in gptoss.fields(experts)[:6])
            ),
            1,
        )
        for e in range(5)
    ]
    found = gptoss.moe_reference(x, router_weight, router_bias, experts, 2)
    assert relative(found, (alone[0] + alone[1]) / 2) < 1e-5


# --------------------------------------------------------------------------------------------------
# Bad checkpoints


def spoil_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def spoil_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


BIAS = "model.layers.1.mlp.router.bias"
SPOILED = {
    "missing key head_dim": lambda p: spoil_config(p, lambda c: c.pop("head_dim")),
    "contradictory keys: .*num_local_experts": lambda p: spoil_config(
        p, lambda c: c.update(num_experts=9)
    ),
    "contradictory keys: .*initial_context_length": lambda p: spoil_config(
        p, lambda c: c.update(initial_context_length=9)
    ),
    "num_hidden_layers is '3'": lambda p: spoil_config(
        p, lambda c: c.update(num_hidden_layers="3")
    ),
    "layer_types and num_hidden_layers differ": lambda p: spoil_config(
        p, lambda c: c.update(num_hidden_layers=2)
    ),
    "tie_word_embeddings is True": lambda p: spoil_config(
        p, lambda c: c.update(tie_word_embeddings=True)
    ),
    "rope_scaling.truncate is None": lambda p: spoil_config(
        p, lambda c: c["rope_scaling"].pop("truncate")
    ),
    "rope_scaling.rope_type is 'linear'": lambda p: spoil_config(
        p, lambda c: c["rope_scaling"].update(rope_type="linear")
    ),
    "num_key_value_heads does not divide": lambda p: spoil_config(
        p, lambda c: c.update(num_key_value_heads=4)
    ),
    "multiples of 32": lambda p: spoil_config(p, lambda c: c.update(hidden_size=40)),
    "unknown quantisation: quant_method 'gptq'": lambda p: spoil_config(
        p, lambda c: c["quantization_config"].update(quant_method="gptq")
    ),
    "quant_method 'quark' contradicts": lambda p: spoil_config(
        p, lambda c: c["quantization_config"].update(quant_method="quark")
    ),
    "not JSON": lambda p: (p / "config.json").write_text("{"),
    "config.json: No such file": lambda p: (p / "config.json").unlink(),
    r"no \*.safetensors": lambda p: (p / "model.safetensors").unlink(),
    "model.safetensors: not a whole safetensors file": lambda p: (
        p / "model.safetensors"
    ).write_bytes((p / "model.safetensors").read_bytes()[:-1]),
    f"missing tensor {BIAS}, expected BF16": lambda p: spoil_tensors(p, lambda t: t.pop(BIAS)),
    "model.safetensors: unexpected tensor extra": lambda p: spoil_tensors(
        p, lambda t: t.update(extra=torch.zeros(1))
    ),
    rf"model.safetensors: tensor {BIAS} is BF16 \[4\], expected BF16 \[5\]": lambda p: (
        spoil_tensors(p, lambda t: t.update({BIAS: t[BIAS][:4].clone()}))
    ),
    rf"tensor {BIAS} is F32 \[5\], expected BF16 \[5\]": lambda p: spoil_tensors(
        p, lambda t: t.update({BIAS: t[BIAS].float()})
    ),
    "no known layout": lambda p: spoil_tensors(
        p, lambda t: [t.pop(n) for n in list(t) if "gate_up_proj" in n]
    ),
}


@pytest.mark.parametrize("message", SPOILED)
def test_bad_checkpoints_are_named(tmp_path, message):
    SPOILED[message](make(tmp_path))
    with pytest.raises(weights.CheckpointError, match=message):
        GPTOSS.from_pretrained(tmp_path)


def test_bad_shards_are_named(tmp_path):
    path = make(tmp_path, shards=3)
    shard = path / "model-00002-of-00003.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(
        weights.CheckpointError, match="model-00002-of-00003.safetensors: not a whole"
    ):
        weights.load(path)
    shard.unlink()
    with pytest.raises(
        weights.CheckpointError, match="00002-of-00003.safetensors: no such file.*index.json names"
    ):
        weights.load(path)
    save_file({"x": torch.zeros(1)}, shard)
    with pytest.raises(
        weights.CheckpointError,
        match="00002-of-00003.safetensors: missing tensor .*index.json places",
    ):
        weights.load(path)


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda q: q["global_quant_config"]["input_tensors"].update(dtype="int8"),
            "input_tensors.dtype is 'int8'",
        ),
        (
            lambda q: q["global_quant_config"]["weight"].update(group_size=64),
            "weight.group_size is 64, expected 32",
        ),
        (
            lambda q: q["global_quant_config"]["weight"].pop("is_dynamic"),
            "weight.is_dynamic is None, expected false",
        ),
        (lambda q: q["export"].update(pack_method="order"), "export.pack_method is 'order'"),
        (
            lambda q: q.update(quant_method="mxfp4"),
            "quant_method 'mxfp4' contradicts the tensors, which are quark",
        ),
    ],
)
def test_unknown_quark_is_named(tmp_path, change, message):
    path = make(tmp_path, "quark")
    assert weights.load(path).layout == "quark"
    spoil_config(path, lambda c: change(c["quantization_config"]))
    with pytest.raises(weights.CheckpointError, match=message):
        weights.load(path)


def test_quark_input_scale_is_the_maximum_and_fp8_is_its_default(tmp_path):
    path = make(tmp_path, "quark")
    experts = weights.load(path).experts[1]
    assert experts.gate_up_input_scale == experts.down_input_scale == pytest.approx(0.014)
    assert experts.gate_up_scale.dtype == torch.uint8
    assert GPTOSS.from_pretrained(path).activations == "fp8"


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="reads Linux's account of a process's memory"
)
def test_loading_stays_within_memory(tmp_path):
    """Quark's experts are joined in memory, the worst case: size x 1.15 + 500 MB, of which an
    import takes half."""
    path = make(
        tmp_path,
        "quark",
        hidden_size=1536,
        intermediate_size=1536,
        num_local_experts=20,
        num_hidden_layers=6,
    )
    size = (path / "model.safetensors").stat().st_size
    # VmHWM, since ru_maxrss starts from that of the parent
    code = (
        "import sys, weights; weights.load(sys.argv[1]); "
        "print(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])"
    )
    run = subprocess.run(
        [sys.executable, "-c", code, str(path)], cwd=ROOT, check=True, capture_output=True
    )
    peak = 1024 * int(run.stdout)
    assert size > 450e6 and peak < 1.15 * size + 500e6, (
        f"{peak / 1e6:.0f} MB for a checkpoint of {size / 1e6:.0f} MB"
    )


# --------------------------------------------------------------------------------------------------
# The embedded model, the tokenizer and the command line


def cli(*args: str, stdin: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, str(ROOT / "gptoss.py"), *args],
        input=stdin,
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="module")
def tiny():
    return GPTOSS.from_pretrained(TINY), weights.load_tokenizer(TINY)


QUESTIONS = [
    "What is 17 + 25?",
    "What is the capital of France?",
    "Sort 9, 2 and 5.",
    "Reverse the word cat.",
    "Who are you?",
    "What is 90 - 31?",
    "What is the capital of Japan?",
    "What is 38 + 45?",
]


def test_eight_prompts_at_once_equal_each_alone(tiny):
    model, tokenizer = tiny
    prompts = [
        gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "medium") for q in QUESTIONS
    ]
    stop = [tokenizer.encode_single_token("<|return|>")]
    together = model.generate(prompts, 96, stop_tokens=stop)
    assert together == [model.generate([p], 96, stop_tokens=stop)[0] for p in prompts]
    answers = [
        tokenizer.decode(tokens).partition("<|channel|>final<|message|>")[2] for tokens in together
    ]
    assert (
        "42" in answers[0]
        and "Paris" in answers[1]
        and "2, 5, 9" in answers[2]
        and "tac" in answers[3]
    )
    assert "59" in answers[5] and "Tokyo" in answers[6] and "83" in answers[7]


on_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU that PyTorch sees")


@on_gpu
@pytest.mark.parametrize(
    "layout, activations",
    [
        ("hf-mxfp4", "bf16"),
        ("openai", "mxfp8"),
        ("hf-mxfp4", "mxfp4"),
        ("quark", "fp8"),
        ("hf-bf16", "bf16"),
    ],
)
def test_a_gpu_gives_the_cpus_logits(tmp_path, layout, activations):
    path, tokens = make(tmp_path, layout), prompt_of(60)
    want = GPTOSS.from_pretrained(path, activations=activations).logits(tokens)
    found = (
        GPTOSS.from_pretrained(path, "cuda", torch.float32, activations=activations)
        .logits(tokens)
        .cpu()
    )
    # float32 sums in another order; where that tips a quantised activation, by a rounding of it
    assert relative(found, want) < (1e-4 if activations == "bf16" else 2e-2)


@on_gpu
def test_a_gpu_in_bfloat16_is_near_float32(tmp_path):
    path, tokens = make(tmp_path, num_hidden_layers=2), prompt_of(60)
    low = GPTOSS.from_pretrained(path, "cuda", torch.bfloat16).logits(tokens).cpu()
    assert relative(low, GPTOSS.from_pretrained(path).logits(tokens)) < 0.1  # as on a CPU, above


@on_gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gpu_gives_the_cpus_tokens(tiny, dtype):
    model, tokenizer = tiny
    prompts = [
        gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "medium") for q in QUESTIONS
    ]
    stop = [tokenizer.encode_single_token("<|return|>")]
    gpu = GPTOSS.from_pretrained(TINY, "cuda", dtype)
    assert gpu.generate(prompts, 96, stop_tokens=stop) == model.generate(
        prompts, 96, stop_tokens=stop
    )


def test_tiny_uses_every_feature_of_the_architecture(tiny):
    checkpoint = weights.load(TINY)
    c = checkpoint.config
    assert (
        checkpoint.layout == "hf-mxfp4" and c.num_local_experts >= 8 and c.num_experts_per_tok == 4
    )
    assert (
        set(c.layer_types) == set(weights.LAYER_TYPES)
        and c.num_attention_heads > c.num_key_value_heads
    )
    assert all(n % 32 == 0 and n % 128 for n in (c.hidden_size, c.intermediate_size))
    assert c.sliding_window < len(
        gptoss.chat_tokens(tiny[1], [("user", QUESTIONS[0])], "2026-01-31", "medium")
    )
    assert c.max_position_embeddings >= 4096
    assert sum(file.stat().st_size for file in TINY.iterdir()) <= 8e6


def test_a_prompt_of_4096_tokens(tiny):
    model, tokenizer = tiny
    tokens = (tokenizer.encode_ordinary("The capital of France is Paris. ") * 4096)[:4096]
    assert model.logits(tokens).isfinite().all()
    assert len(model.generate([tokens], 4)[0]) == 4


def test_tokenizer_equals_hugging_face(tiny):
    from tokenizers import Tokenizer  # a dependency of transformers

    theirs = Tokenizer.from_file(str(TINY / "tokenizer.json"))
    for text in (
        "What is 17 + 25?",
        "  two  spaces\n\n\ttab",
        "naïve café — “quotes” 東京 🙂",
        "don't DON'T I'm",
        "1234567",
        "".join(map(chr, range(1, 600))),
        "",
        " ",
        "<|end|>x",
    ):
        ours = tiny[1].encode(text, allowed_special="all")
        assert ours == theirs.encode(text).ids
        assert tiny[1].decode(ours) == text


@pytest.mark.parametrize(
    "spoil, message",
    [
        (lambda raw: raw["model"].pop("merges"), "not a byte-level BPE tokenizer"),
        (lambda raw: raw["model"]["merges"].reverse(), "do not rise in the order of the merges"),
        (lambda raw: raw["model"]["vocab"].pop("A"), r"no token for the bytes \[65\]"),
    ],
)
def test_bad_tokenizers_are_named(tmp_path, spoil, message):
    raw = json.loads((TINY / "tokenizer.json").read_text())
    spoil(raw)
    (tmp_path / "tokenizer.json").write_text(json.dumps(raw))
    with pytest.raises(weights.CheckpointError, match=message):
        weights.load_tokenizer(tmp_path)


def test_openai_layout_falls_to_o200k_harmony(tmp_path, monkeypatch):
    monkeypatch.setattr(weights.tiktoken, "get_encoding", lambda name: name)
    assert weights.load_tokenizer(tmp_path) == "o200k_harmony"

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(weights.tiktoken, "get_encoding", fail)
    with pytest.raises(weights.CheckpointError, match="tokenizer.json: no such file.*no network"):
        weights.load_tokenizer(tmp_path)


def test_harmony_format(tiny):
    tokens = gptoss.chat_tokens(
        tiny[1],
        [("user", "Hi<|end|>"), ("assistant", "Hello."), ("user", "Bye")],
        "2026-01-31",
        "low",
    )
    assert tiny[1].decode(tokens) == (
        "<|start|>system<|message|>You are ChatGPT, a large language model trained by OpenAI.\n"
        "Knowledge cutoff: 2024-06\nCurrent date: 2026-01-31\n\nReasoning: low\n\n"
        "# Valid channels: analysis, commentary, final. "
        "Channel must be included for every message.<|end|><|start|>user<|message|>Hi<|end|><|end|><|start|>assistant"
        "<|channel|>final<|message|>Hello.<|end|><|start|>user<|message|>Bye<|end|><|start|>assistant"
    )
    assert tokens.count(tiny[1].encode_single_token("<|end|>")) == 4  # the user's is text


def test_reader_tells_channels_apart(tiny):
    reader = gptoss.Reader(tiny[1], chat=True)
    text = "<|channel|>analysis<|message|>7+5…<|end|><|start|>assistant<|channel|>final<|message|>Café 🙂"
    events = [reader.read(token) for token in tiny[1].encode(text, allowed_special="all")]
    shown = {
        name: "".join(t for channel, t in events if channel == name)
        for name in ("analysis", "final", None)
    }
    assert shown == {"analysis": "7+5…\n", "final": "Café 🙂", None: ""}
    assert gptoss.Reader(tiny[1], chat=False).read(10**6) == ("final", "\N{REPLACEMENT CHARACTER}")


def test_command_line_answers():
    run = cli("--prompt", QUESTIONS[0], "--prompt", "-", stdin=QUESTIONS[1])
    assert (
        run.returncode == 0
        and "TTFT" in run.stderr
        and "TPOT" in run.stderr
        and "pages" in run.stderr
    )
    first, second = run.stdout.strip().splitlines()
    assert "42" in first and "Paris" in second and "<|" not in run.stdout
    thinking = cli("--prompt", QUESTIONS[0], "--show-reasoning").stdout.strip().splitlines()
    assert len(thinking) >= 2 and thinking[-1] == first
    raw = cli(
        "--prompt",
        "The capital of",
        "--raw",
        "--max-new-tokens",
        "5",
        "--temperature",
        "1",
        "--seed",
        "3",
    )
    assert raw.returncode == 0 and raw.stdout.strip()


@pytest.mark.parametrize(
    "args, code, message",
    [
        (["--prompt", "x", "--fast"], 2, "unrecognized arguments: --fast"),
        ([], 2, "give --prompt"),
        (["--chat", "--prompt", "x"], 2, "give --prompt"),
        (["--prompt", "x", "--moe", "cuda"], 2, "--moe"),
        (["--prompt", "x", "--emulate", "--moe", "torch"], 2, "--emulate runs the gluon kernels"),
        (["--prompt", "x", "--emulate", "--device", "cuda"], 2, "--emulate runs the gluon kernels"),
        (["--prompt", "x", "--checkpoint", "/nowhere"], 1, "/nowhere"),
        (["--prompt", ""], 1, "prompt 0 is empty"),
        (["--prompt", "x", "--max-new-tokens", "9999999"], 1, "too long"),
        (["--prompt", "x", "--num-pages", "1"], 1, "the pool has 1"),
        (["--prompt", "x", "--device", "nope"], 1, "device='nope'"),
        (["--prompt", "x", "--activations", "fp8"], 1, "Quark"),
    ],
)
def test_command_line_errors(args, code, message):
    run = cli(*args)
    assert (
        run.returncode == code
        and message in run.stderr
        and not run.stdout
        and "Traceback" not in run.stderr
    )


def test_chat_keeps_the_conversation():
    run = cli("--chat", stdin="What is 17 + 25?\n\nWhat is the capital of France?\n")
    assert (
        run.returncode == 0
        and "42" in run.stdout
        and "Paris" in run.stdout
        and "> " not in run.stdout
    )


EMULATED = [*QUESTIONS, "Reverse the word lamp.", "What is the capital of Peru?"]


@pytest.mark.parametrize("count", [2, pytest.param(10, marks=pytest.mark.slow)])
def test_emulated_kernels_give_the_torch_paths_answers(tiny, count):
    import gfx950

    tokenizer = tiny[1]
    prompts = [
        gptoss.chat_tokens(tokenizer, [("user", q)], "2026-01-31", "low") for q in EMULATED[:count]
    ]
    stop = [tokenizer.encode_single_token("<|return|>")]
    torch_path = GPTOSS.from_pretrained(
        TINY, dtype=torch.bfloat16, moe="torch", activations="mxfp8"
    )
    assert torch_path.gluon is None
    with gfx950.emulate() as gpu:
        model = GPTOSS.from_pretrained(TINY)  # auto: the kernels, where a gfx950 is active
        assert (model.dtype, model.activations) == (torch.bfloat16, "mxfp8")
        answers = model.generate(prompts, 80, stop_tokens=stop)
    assert answers == torch_path.generate(prompts, 80, stop_tokens=stop)
    layers = model.config.num_hidden_layers
    launched = [launch.name for launch in gpu.launches]
    decode = launched[launched.index("combine_kernel") - 2 :]  # three launches a layer
    assert len(decode) % (3 * layers) == 0 and len(set(decode)) == 3


def test_only_a_gfx950_gets_the_kernels(tiny, monkeypatch):
    import gfx950
    import moe_gluon

    with gfx950.emulate():
        assert GPTOSS.from_pretrained(TINY, moe="torch").gluon is None
        with pytest.raises(ValueError, match="computes in bfloat16"):
            GPTOSS.from_pretrained(TINY, dtype=torch.float32)
        driver = type(gfx950.Driver(None))
        monkeypatch.setattr(
            driver, "get_active_torch_device", lambda self: torch.device("cuda")
        )  # a real gfx950
        assert GPTOSS.from_pretrained(TINY).gluon is None
        monkeypatch.delattr(driver, "get_active_torch_device")  # somebody else's emulator
        assert GPTOSS.from_pretrained(TINY).gluon is moe_gluon
        monkeypatch.setattr(moe_gluon, "is_supported", lambda: False)  # another AMD device
        assert GPTOSS.from_pretrained(TINY).gluon is None
        with pytest.raises(ValueError, match="needs Triton with an active gfx950"):
            GPTOSS.from_pretrained(TINY, moe="gluon")
    monkeypatch.setattr(
        gptoss.importlib.util, "find_spec", lambda name: None
    )  # no Triton on this machine
    assert GPTOSS.from_pretrained(TINY).gluon is None


def test_command_line_emulates():
    run = cli("--emulate", "--raw", "--prompt", "What", "--max-new-tokens", "2")
    assert (
        run.returncode == 0
        and "emulated gfx950: " in run.stderr
        and "dispatch_kernel" in run.stderr
    )


def test_readme_commands():
    readme, requirements = (
        (ROOT / "README.md").read_text(),
        (ROOT / "requirements.txt").read_text().split(),
    )
    assert sorted(r.partition("==")[0] for r in requirements) == [
        "numpy",
        "safetensors",
        "tiktoken",
        "torch",
        "triton",
    ]
    assert all("==" in r for r in requirements)
    commands = re.findall(r"^pip install -r requirements.txt.*$", readme, re.M)
    assert re.fullmatch(
        r'pip install -r requirements.txt && python gptoss.py --prompt ".*"', commands[0]
    )
    assert re.fullmatch(
        r"pip install -r requirements.txt pytest==\S+ transformers==\S+ && python -m pytest.*",
        commands[1],
    )
    assert commands[1] not in (ROOT / ".ci/run").read_text()  # CI reads it from the README
