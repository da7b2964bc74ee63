"""Tests of checkpoints and tokenizers."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from common import (
    CONVERT,
    ROOT,
    TINY,
    hf_config,
    make,
    oracle,
    prompt_of,
    random_tensors,
    relative,
    to_bf16,
    to_quark,
    write,
)
from safetensors.torch import load_file, save_file

import weights
from gptoss import GPTOSS, dequantise_mxfp4


def test_transformers_5_config_is_read(tmp_path):
    """transformers 5 writes rope_parameters where 4 wrote rope_theta and rope_scaling."""
    config = hf_config()
    rope = config.pop("rope_scaling") | dict(rope_theta=config.pop("rope_theta"))
    assert weights.Config.from_dict(
        config | dict(rope_parameters=rope)
    ) == weights.Config.from_dict(hf_config())


def spoil_config(path: Path, change) -> None:
    config = json.loads((path / "config.json").read_text())
    change(config)
    (path / "config.json").write_text(json.dumps(config))


def spoil_tensors(path: Path, change) -> None:
    tensors = load_file(path / "model.safetensors")
    change(tensors)
    save_file(tensors, path / "model.safetensors")


def renamed(tensors: dict, old: str, new: str) -> None:
    """Every name that has `old` gets `new` in its place."""
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new, 1) if old else new + name] = tensors.pop(name)


def unpacked(tensors: dict) -> None:
    config = hf_config()
    full = to_bf16(config, dict(tensors))[1]
    tensors.clear()
    tensors.update(full)


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
    rf"model.safetensors: tensor {BIAS} is BF16 \[4\], expected BF16 or F16 or F32 \[5\]": (
        lambda p: spoil_tensors(p, lambda t: t.update({BIAS: t[BIAS][:4].clone()}))
    ),
    rf"tensor {BIAS} is I32 \[5\], expected BF16 or F16 or F32 \[5\]": (
        lambda p: spoil_tensors(p, lambda t: t.update({BIAS: t[BIAS].int()}))
    ),
    "model_type is 'llama', GPT-OSS has 'gpt_oss'": (
        lambda p: spoil_config(p, lambda c: c.update(model_type="llama"))
    ),
    "rope_scaling.rope_type is None, GPT-OSS has 'yarn'": (
        lambda p: spoil_config(p, lambda c: c["rope_scaling"].pop("rope_type"))
    ),
    "rope_scaling.type is 'linear'": (
        lambda p: spoil_config(p, lambda c: c["rope_scaling"].update(type="linear"))
    ),
    "partial_rotary_factor is 0.5": (
        lambda p: spoil_config(p, lambda c: c.update(partial_rotary_factor=0.5))
    ),
    "unknown key logit_softcapping; if it does not change what the model computes, remove it": (
        lambda p: spoil_config(p, lambda c: c.update(logit_softcapping=30.0))
    ),
    "unknown key rope_scaling.long_factor": (
        lambda p: spoil_config(p, lambda c: c["rope_scaling"].update(long_factor=[1.0]))
    ),
    "rope_scaling is 'yarn', expected a table": (
        lambda p: spoil_config(p, lambda c: c.update(rope_scaling="yarn"))
    ),
    "says quant_method mxfp4, but the experts are not packed; .* remove quantization_config": (
        lambda p: spoil_tensors(p, unpacked)
    ),
    "tensor base_model.model.lm_head.weight: .*merge_and_unload": (
        lambda p: spoil_tensors(p, lambda t: renamed(t, "", "base_model.model."))
    ),
    r"tensor layers.0.self_attn.* the names lack `model.`: save GptOssForCausalLM": (
        lambda p: spoil_tensors(p, lambda t: renamed(t, "model.", ""))
    ),
    "gate_up_projs.0.weight: unsloth's names .* save_pretrained_merged": (
        lambda p: spoil_tensors(
            p, lambda t: renamed(t, "gate_up_proj_blocks", "gate_up_projs.0.weight")
        )
    ),
    "gate_up_projs.0.weight: unsloth's names .* 4 bits": lambda p: (  # as they are published
        spoil_config(p, lambda c: c.update(quantization_config=dict(quant_method="bitsandbytes"))),
        spoil_tensors(p, lambda t: renamed(t, "gate_up_proj_blocks", "gate_up_projs.0.weight")),
    ),
    "index.json: does not name model.safetensors, which is there too; remove one": lambda p: (
        p / "model.safetensors.index.json"
    ).write_text('{"weight_map": {"x": "other"}}'),
    "index.json: has no weight_map table of file names": lambda p: (
        p / "model.safetensors.index.json"
    ).write_text('{"weight_map": {"x": 5}}'),
    "generation_config.json: eos_token_id is 'x', expected a list of int": lambda p: (
        p / "generation_config.json"
    ).write_text('{"eos_token_id": "x"}'),
    "tokenizer.json: added_tokens is no list": lambda p: (p / "tokenizer.json").write_text(
        '{"added_tokens": [{"content": "<|return|>"}]}'
    ),
    "config.json: not JSON: .*recursion": lambda p: (p / "config.json").write_text("[" * 100_000),
    "no known layout": lambda p: spoil_tensors(
        p, lambda t: [t.pop(n) for n in list(t) if "gate_up_proj" in n]
    ),
}


@pytest.mark.parametrize("message", SPOILED)
def test_bad_checkpoints_are_named(tmp_path, message):
    SPOILED[message](make(tmp_path))
    with pytest.raises(weights.CheckpointError, match=message):
        GPTOSS.from_pretrained(tmp_path)


NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("change, message", [
    (dict(rms_norm_eps=NAN), "rms_norm_eps is nan, expected a positive float"),
    (dict(rope_theta=INF), "rope_theta is inf, expected a positive float"),
    (dict(rope_theta=1.0), "rope_theta is not above 1"),
    (dict(swiglu_limit=True), "swiglu_limit is True, expected a positive float"),
    (dict(layer_types=1.5), "layer_types is 1.5, expected a list of str"),
    (dict(layer_types=[["a"]]), r"layer_types is \[\['a'\]\], expected a list of str"),
    (dict(eos_token_id="x"), "eos_token_id is 'x', expected a list of int"),
    (dict(eos_token_id=[True]), r"eos_token_id is \[True\], expected a list of int"),
    (dict(rope_scaling=dict(mscale="1")), "rope_scaling.mscale is '1', expected a positive float"),
    (dict(rope_scaling=dict(attention_factor=NAN)), "attention_factor is nan, expected a positive"),
    (dict(rope_parameters=dict(attention_factor=3.0)), "differ in attention_factor"),
    (dict(rope_parameters=dict(mscale=3.0)), "differ in mscale"),
])  # fmt: skip
def test_constants_that_cannot_be_meant_are_named(change, message):
    config = hf_config()
    rope = config["rope_scaling"]
    change = {k: rope | v if isinstance(v, dict) else v for k, v in change.items()}
    with pytest.raises(weights.CheckpointError, match=message):
        weights.Config.from_dict(config | change)


@pytest.mark.parametrize("quantization", ["mxfp4", ["mxfp4"]])
def test_quantisation_that_is_no_table_is_named(tmp_path, quantization):
    spoil_config(make(tmp_path), lambda c: c.update(quantization_config=quantization))
    with pytest.raises(weights.CheckpointError, match="quantization_config is .*expected a table"):
        weights.load(tmp_path)


@pytest.mark.parametrize("whole", [False, True])
def test_what_transformers_writes_is_read(tmp_path, whole):
    """Whether it writes every key or those that differ from its defaults."""
    from transformers import GptOssConfig

    GptOssConfig(**hf_config()).to_json_file(tmp_path / "config.json", use_diff=not whole)
    raw = json.loads((tmp_path / "config.json").read_text())
    assert weights.Config.from_dict(raw) == weights.Config.from_dict(hf_config())


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
            lambda q: q["global_quant_config"]["input_tensors"].update(dtype="fp8_e5m2"),
            "input_tensors.dtype is 'fp8_e5m2'",
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


def test_tokenizer_equals_hugging_face():
    from tokenizers import Tokenizer  # a dependency of transformers

    tokenizer = weights.load_tokenizer(TINY)
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
        ours = tokenizer.encode(text, allowed_special="all")
        assert ours == theirs.encode(text).ids
        assert tokenizer.decode(ours) == text


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
    make(tmp_path)
    monkeypatch.setattr(weights.tiktoken, "get_encoding", lambda name: name)
    assert weights.load_tokenizer(tmp_path) == "o200k_harmony"

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(weights.tiktoken, "get_encoding", fail)
    with pytest.raises(weights.CheckpointError, match="tokenizer.json: no such file.*no network"):
        weights.load_tokenizer(tmp_path)


# --------------------------------------------------------------------------------------------------
# What transformers loads too: logits against it


def logits_of(path, **options) -> torch.Tensor:
    return GPTOSS.from_pretrained(path, **options).logits(prompt_of(60))


def oracle_logits(config: dict, tensors: dict) -> torch.Tensor:
    with torch.no_grad():
        return oracle(config, tensors)(torch.tensor([prompt_of(60)])).logits[0]


@pytest.mark.parametrize("change", [
    dict(attention_factor=1.4),
    dict(attention_factor=1.0),
    dict(mscale=0.7, mscale_all_dim=1.2),
    dict(mscale=1.0, mscale_all_dim=1.0),
    dict(mscale=0.7),  # without effect alone
    dict(mscale=0.7, mscale_all_dim=0.0),
    dict(factor=1.0),
    dict(beta_fast=8.0, beta_slow=2.0),
])  # fmt: skip
def test_every_kind_of_yarn_equals_transformers(tmp_path, change):
    config = hf_config(num_hidden_layers=2)
    config["rope_scaling"] |= change
    tensors = random_tensors(config, 3)
    found = logits_of(write(tmp_path, config, tensors))
    assert relative(found, oracle_logits(config, tensors)) < 1e-4
    if change not in (dict(mscale=0.7), dict(mscale=0.7, mscale_all_dim=0.0)):
        plain = write(tmp_path / "plain", hf_config(num_hidden_layers=2), tensors)
        assert relative(found, logits_of(plain)) > 1e-3  # and the keys matter


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("which", ["all", "router"])
def test_dense_tensors_of_other_dtypes_equal_transformers(tmp_path, dtype, which):
    """float32 values that bf16 does not have are used as they are."""
    config = hf_config(num_hidden_layers=2)
    tensors = random_tensors(config, 4)
    for name, tensor in tensors.items():
        if tensor.dtype == torch.bfloat16 and (which == "all" or "router" in name):
            tensors[name] = (tensor.float() * 1.001).to(dtype)
    found = logits_of(write(tmp_path, config, tensors))
    assert relative(found, oracle_logits(config, tensors)) < 1e-4


def test_float32_experts_equal_transformers(tmp_path):
    config, tensors = to_bf16(hf_config(), random_tensors(hf_config(), 5))
    tensors = {name: tensor.float() for name, tensor in tensors.items()}
    found = logits_of(write(tmp_path, config, tensors))
    assert relative(found, oracle_logits(config, tensors)) < 1e-4


def test_the_index_decides_where_a_tensor_is_repeated(tmp_path):
    path = make(tmp_path, shards=3)
    want = logits_of(path)
    weight_map = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    shard = next(file for file in weight_map.values() if file != weight_map[BIAS])
    tensors = load_file(path / shard)
    save_file(tensors | {BIAS: torch.ones(5).bfloat16()}, path / shard)
    assert torch.equal(logits_of(path), want)


def test_an_adapter_beside_the_model_is_left_alone(tmp_path):
    path = make(tmp_path)
    save_file(
        {"base_model.model.x.lora_A.weight": torch.zeros(1)}, path / "adapter_model.safetensors"
    )
    assert weights.load(path).layout == "hf-mxfp4"


# --------------------------------------------------------------------------------------------------
# Quark


def quark(path, change=lambda config, tensors: None):
    config, tensors = to_quark(hf_config(), random_tensors(hf_config(), 6))
    change(config, tensors)
    return write(path, config, tensors)


def without_scales(config, tensors):
    for name in [name for name in tensors if name.endswith("input_scale")]:
        del tensors[name]


def test_scales_of_a_quantised_cache_are_without_effect(tmp_path):
    def add(config, tensors):
        for name in (
            *("k_proj.output_scale", "v_proj.output_scale", "k_scale", "v_scale"),
            *("attn.k_scale", "attn.v_scale", "k_proj.k_scale", "v_proj.v_scale"),
        ):
            tensors[f"model.layers.0.self_attn.{name}"] = torch.tensor(0.5)

    plain, scaled = quark(tmp_path / "plain"), quark(tmp_path / "scaled", add)
    assert torch.equal(logits_of(plain), logits_of(scaled))


@pytest.mark.parametrize("inputs, activations", [
    (None, "bf16"),
    (dict(dtype="fp4", qscheme="per_group", group_size=32, is_dynamic=True), "mxfp4"),
])  # fmt: skip
def test_quark_without_static_scales(tmp_path, inputs, activations):
    def change(config, tensors):
        without_scales(config, tensors)
        config["quantization_config"]["global_quant_config"]["input_tensors"] = inputs

    model = GPTOSS.from_pretrained(quark(tmp_path, change))
    assert (model.layout, model.activations) == ("quark", activations)
    plain = GPTOSS.from_pretrained(make(tmp_path / "hf", seed=6), activations=activations)
    assert torch.equal(model.logits(prompt_of(20)), plain.logits(prompt_of(20)))


def test_quark_fp8_needs_its_scales(tmp_path):
    with pytest.raises(weights.CheckpointError, match="missing tensor .*input_scale"):
        weights.load(quark(tmp_path, without_scales))


@pytest.mark.parametrize("scale", [0.0, -0.5, float("nan"), float("inf")])
def test_impossible_input_scales_are_named(tmp_path, scale):
    name = "model.layers.1.mlp.experts.2.down_proj.input_scale"
    path = quark(tmp_path, lambda config, tensors: tensors.update({name: torch.tensor(scale)}))
    with pytest.raises(weights.CheckpointError, match=f"{name} is {scale}, expected a positive"):
        weights.load(path)


# --------------------------------------------------------------------------------------------------
# Folders and stop tokens


@pytest.mark.parametrize("make_path, message", [
    (lambda t: t / "nowhere", "nowhere: no such folder; a checkpoint is a folder with config.json"),
    (lambda t: "openai/gpt-oss-20b", "hf download openai/gpt-oss-20b --local-dir gpt-oss-20b"),
    (lambda t: make(t) / "config.json", "config.json: a file; a checkpoint is a folder"),
    (lambda t: "tests/gpt-oss-20b", "no such folder; a checkpoint is a folder with config.json"),
    (lambda t: only(t, "x.gguf"), "x.gguf: GGUF is not read here; download"),
    (lambda t: only(t, "x.gguf") / "x.gguf", "x.gguf: a file; GGUF is not read here"),
    (lambda t: only(make(t), "x.gguf"), "x.gguf: GGUF is not read here"),
    (lambda t: only(make(t), "pytorch_model.bin"), "pickled weights are not read here"),
    (lambda t: only(make(t), "x.txt"), r"no \*.safetensors in this folder"),
    (lambda t: only(t, "x.txt"), "config.json: No such file"),
])  # fmt: skip
def test_what_is_no_checkpoint_is_said_before_any_network(
    tmp_path, monkeypatch, make_path, message
):
    asked = []
    monkeypatch.setattr(weights.tiktoken, "get_encoding", asked.append)
    monkeypatch.chdir(ROOT)
    path = make_path(tmp_path)
    for call in (weights.load, weights.load_tokenizer):
        with pytest.raises(weights.CheckpointError, match=message):
            call(path)
    assert not asked


def only(path: Path, name: str) -> Path:
    """The folder without weights, but for one empty file of that name."""
    (path / "model.safetensors").unlink(missing_ok=True)
    (path / name).write_bytes(b"")
    return path


def test_stop_tokens_come_from_every_file(tmp_path):
    path = make(tmp_path)
    assert weights.load(path).stop_tokens == frozenset()
    spoil_config(path, lambda c: c.update(eos_token_id=[96, 95]))
    (path / "generation_config.json").write_text(json.dumps({"eos_token_id": [94, 96]}))
    raw = json.loads((TINY / "tokenizer.json").read_text())
    (path / "tokenizer.json").write_text(json.dumps(raw))
    ends = {t["id"] for t in raw["added_tokens"] if t["content"] in weights.ENDS}
    assert len(ends) == 3 and weights.load(path).stop_tokens == {94, 95, 96} | ends
    assert GPTOSS.from_pretrained(path).stop_tokens == {94, 95, 96} | ends


# --------------------------------------------------------------------------------------------------
# Made-up weights


@pytest.mark.parametrize("layout", CONVERT)
def test_made_up_weights_are_what_their_file_would_load(tmp_path, layout):
    config = weights.Config.from_dict(hf_config())
    raw = CONVERT[layout](hf_config(), random_tensors(hf_config(), 0))[0]
    write(tmp_path, raw, weights.random_tensors(config, layout, 7))
    made, loaded = weights.random(config, layout, seed=7), weights.load(tmp_path)
    assert (made.layout, made.activations) == (loaded.layout, loaded.activations)
    assert made.dense.keys() == loaded.dense.keys()
    pairs = [(made.dense[name], loaded.dense[name]) for name in made.dense]
    for ours, theirs in zip(made.experts, loaded.experts, strict=True):
        pairs += zip(vars(ours).values(), vars(theirs).values(), strict=True)
    for a, b in pairs:
        assert torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b
    other = weights.random(config, layout, seed=8).dense["embedding"]
    assert not torch.equal(made.dense["embedding"], other)


@pytest.mark.parametrize("layout", ["openai", "hf-bf16"])
def test_made_up_products_stay_of_the_order_of_their_inputs(layout):
    """At the published width: a product of unit inputs has a standard deviation of 1, which e2m1's
    powers of two meet to a factor of 2 either way."""
    config = replace(
        weights.published("20b"), vocab_size=32, num_hidden_layers=1, num_local_experts=4,
        layer_types=weights.LAYER_TYPES[:1],
    )  # fmt: skip
    made = weights.random(config, layout)
    e, dense = made.experts[0], made.dense
    products = [dense["0.qkv_weight"], dense["0.out_weight"], dense["0.router_weight"]]
    for weight, scale in ((e.gate_up_weight, e.gate_up_scale), (e.down_weight, e.down_scale)):
        products.append(weight[0] if scale is None else dequantise_mxfp4(weight[0], scale[0]))
    for weight in products:
        x = torch.randn(8, weight.shape[1], generator=torch.Generator().manual_seed(0))
        assert 0.5 < float((x @ weight.float().T).std()) < 2


@pytest.mark.parametrize("size, layers, experts, parameters", [
    ("20b", 24, 32, 20.91e9),
    ("120b", 36, 128, 116.83e9),
])  # fmt: skip
def test_published_constants_are_those_of_openais_config_file(size, layers, experts, parameters):
    """The keys of original/config.json, and the number of parameters of the model card."""
    openai = dict(
        num_hidden_layers=layers, num_experts=experts, experts_per_token=4, vocab_size=201088,
        hidden_size=2880, intermediate_size=2880, swiglu_limit=7.0, head_dim=64,
        num_attention_heads=64, num_key_value_heads=8, sliding_window=128,
        initial_context_length=4096, rope_theta=150000, rope_scaling_factor=32.0,
        rope_ntk_alpha=1, rope_ntk_beta=32,
    )  # fmt: skip
    config = weights.published(size)
    assert weights.Config.from_dict(openai) == config
    count = 0
    for layer in (None, *range(layers)):
        for stored in weights.tensors_of(config, "hf-bf16", layer):
            count += torch.Size(stored.shape).numel()
    assert round(count / 1e9, 2) == parameters / 1e9
