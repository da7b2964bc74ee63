"""Tests of checkpoints and tokenizers."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from common import ROOT, TINY, hf_config, make
from safetensors.torch import load_file, save_file

import weights
from gptoss import GPTOSS


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
    monkeypatch.setattr(weights.tiktoken, "get_encoding", lambda name: name)
    assert weights.load_tokenizer(tmp_path) == "o200k_harmony"

    def fail(name):
        raise OSError("no network")

    monkeypatch.setattr(weights.tiktoken, "get_encoding", fail)
    with pytest.raises(weights.CheckpointError, match="tokenizer.json: no such file.*no network"):
        weights.load_tokenizer(tmp_path)
