"""Tests of bench.py: the arithmetic of its reports against counts by hand, its errors, and small
runs."""

import importlib
import json
import random
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from common import ROOT, TINY

import bench
import gptoss
import weights
from gptoss import GPTOSS, Ranks

FEW = ["--input", "20", "--output", "6", "--rounds", "2"]


def on_meta(config: weights.Config, dtype) -> GPTOSS:
    return GPTOSS(weights.random(config, "openai", "meta"), "meta", dtype, "torch")


def tiny_config() -> weights.Config:
    return weights.load(TINY).config


# --------------------------------------------------------------------------------------------------
# Arithmetic


def test_summary():
    """Two requests: the second is prefilled while the first waits; only steps in which both decode
    are steps."""
    first, second = [0.1, 0.5, 0.52, 0.55, 0.58], [0.4, 0.5, 0.52, 0.55, 0.59]
    assert bench.steps([first, second]) == pytest.approx([0.02, 0.03, 0.03, 0.1, 0.02, 0.03])
    assert bench.summary([[first, second], [second]]) == pytest.approx(
        {
            "requests": 3,
            "ttft": 400,
            "ttft_p99": 400,
            "tpot": 47.5,
            "tpot_p99": 120,
            "tpot_low": 47.5,
            "tpot_high": (120 + 47.5) / 2,
            "step": 30,
            "tokens_per_s": (10 / 0.59 + 5 / 0.59) / 2,
        }
    )


def test_percentile_is_the_nearest_rank():
    assert bench.percentile(list(range(1, 201)), 99) == 198
    assert bench.percentile([3, 1, 2], 99) == 3 and bench.percentile([3, 1, 2], 50) == 2


def test_bytes_of_a_120b_step_by_hand():
    """One sequence of 576 tokens, bf16 and packed experts."""
    attention = 2 * (5120 * 2880 + 5120 + 64 + 2880 * 4096 + 2880)
    router, norms = 2 * (128 * 2880 + 128), 4 * 2 * 2880
    # 16 bytes of codes and one of scale for 32 weights, and biases.
    expert = (3 * 2880 * 2880) // 32 * 17 + 2 * (5760 + 2880)
    seen = 18 * 128 + 18 * 576
    want = 36 * (attention + router + norms + 4 * expert) + seen * 2 * 8 * 64 * 2
    want += 2 * 201088 * 2880 + 4 * 2880 + 2 * 2880  # unembedding, final norm, a row of embedding
    assert want == 5_029_280_640
    model = on_meta(weights.published("120b"), torch.bfloat16)
    assert bench.step_bytes(model, 1, 576, 4) == pytest.approx(want, abs=1)


def test_experts_that_are_met():
    """One token meets four experts a layer; of two tokens each layer's union is counted."""
    model = GPTOSS.from_pretrained(TINY)
    ops = model.ops
    assert bench.met_experts(model, [[5, 6, 7]]) == 4 and model.ops is ops
    both = bench.met_experts(model, [[5, 6, 7], [300, 400, 500]])
    assert 4 < both <= 8
    assert bench.met_experts(model, [[5, 6, 7], [5, 6, 7]]) == 4


def test_bytes_of_a_tiny_step_by_hand():
    """Eight sequences of 100 tokens, float32, experts expanded to float32: what a default run on a
    CPU holds."""
    attention = 384 * 192 + 384 + 8 + 192 * 256 + 192  # (8 + 2 * 2) * 32 = 384 rows of qkv
    expert = 3 * 192 * 160 + 320 + 192
    active = 16 * (1 - 0.75**8)
    layer = attention + 16 * 192 + 16 + 2 * 192 + active * expert
    cache = 8 * (2 * 32 + 2 * 100) * 2 * 2 * 32  # sliding layers see 32 tokens
    want = 4 * (4 * layer + cache + 1024 * 192 + 192 + 8 * 192)
    for model in (GPTOSS.from_pretrained(TINY), on_meta(tiny_config(), torch.float32)):
        assert bench.step_bytes(model, 8, 100, active) == pytest.approx(want, abs=1)


# --------------------------------------------------------------------------------------------------
# Command line


@pytest.mark.parametrize("argv, code, message", [
    (["--ab", "speed=1,2"], 2, "expected SETTING=A,B, with a SETTING of ops, activations, dtype"),
    (["--ab", "ops=torch,cuda"], 2, "--ops: invalid choice: 'cuda'"),
    (["--ab", "page_size=16,0"], 2, "--page-size: '0' is not a positive number"),
    (["--ab", "ops=torch"], 2, "expected SETTING=A,B"),
    (["--ab", "ops=torch,torch"], 2, "expected SETTING=A,B"),
    (["--ab", "ops=torch,gluon", "--peer", "transformers"], 2, "not allowed with"),
    (["--checkpoint", "random:7b"], 2, "random: takes 20b, 120b or tiny"),
    (["--concurrency", "1,0"], 2, "--concurrency: '0' is not a positive number"),
    (["--output", "1"], 2, "nothing to time"),
    (["--nonsense"], 2, "unrecognized arguments"),
    (["--device", "nowhere"], 1, "nowhere"),
    (["--checkpoint", "nowhere"], 1, "nowhere: no such folder"),
    (["--activations", "fp8"], 1, "need the static input scales of a Quark checkpoint"),
    (["--input", "9000"], 1, "prompt 0 is too long"),
])  # fmt: skip
def test_errors_are_one_line(argv, code, message, capsys):
    try:
        found = bench.main(argv)
    except SystemExit as exit:
        found = exit.code
    out, err = capsys.readouterr()
    assert (found, out) == (code, "") and message in err
    assert err.startswith("bench: ") and err.count("\n") == 1


def test_a_missing_peer_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(["--peer", "transformers", *FEW]) == 1
    err = capsys.readouterr().err
    assert err.startswith("bench: ") and "transformers" in err and err.count("\n") == 1


@pytest.mark.parametrize("error", [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
    RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried"),
    MemoryError(),
])  # fmt: skip
def test_no_memory_is_one_line_that_says_what_to_do(error, capsys, monkeypatch):
    def build(*_):
        raise error

    monkeypatch.setattr(bench, "build", build)
    assert bench.main(["--checkpoint", "random:120b", "--device", "cpu"]) == 1
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1
    assert err.startswith("bench: out of memory with --checkpoint random:120b: lower --concurrency")


def test_made_up_sequences_choose_their_experts_nearly_independently():
    """Eight tokens that chose 4 of 32 at random would meet 32 (1 - (1 - 4/32)^8) = 21; sequences
    that all follow the biases meet 9."""
    config = replace(
        weights.published("20b"), hidden_size=288, intermediate_size=96, num_attention_heads=8,
        num_key_value_heads=2, num_hidden_layers=6, vocab_size=2000,
        layer_types=weights.published("20b").layer_types[:6],
    )  # fmt: skip
    model = gptoss.GPTOSS(weights.random(config, "openai"), "cpu", torch.float32)
    draw = random.Random(0)
    prompts = [draw.choices(range(2000), k=32) for _ in range(8)]
    assert 17 < bench.met_experts(model, prompts) < 23


def test_an_error_without_words_is_named(capsys, monkeypatch):
    def build(*_):
        raise RuntimeError

    monkeypatch.setattr(bench, "build", build)
    assert bench.main([]) == 1 and capsys.readouterr().err == "bench: RuntimeError\n"


def test_interrupted(capsys, monkeypatch):
    def measure(args, systems, bandwidth):
        raise KeyboardInterrupt

    monkeypatch.setattr(bench, "measure", measure)
    assert bench.main([]) == 130
    assert capsys.readouterr() == ("", "bench: interrupted\n")


def test_importing_needs_no_triton():
    code = "import sys; sys.modules['triton'] = None; import bench"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


# --------------------------------------------------------------------------------------------------
# Runs


def run(argv, capsys) -> dict:
    assert bench.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def test_a_run_on_tiny(capsys):
    result = run([*FEW, "--concurrency", "1,3"], capsys)
    assert result["bandwidth"] > 1e8 and result["loaded_s"] > 0 and result["pairs"] == []
    assert result["cache_pages"] > 0
    assert result["settings"]["output"] == 6 and result["torch"] == torch.__version__
    for row, concurrency in zip(result["rows"], (1, 3), strict=True):
        assert {key for _, key, _ in bench.COLUMNS} <= set(row)
        assert row["concurrency"] == concurrency and row["requests"] == 2 * concurrency
        assert 0 < row["ttft"] <= row["ttft_p99"] and 0 < row["step"]
        assert row["tpot_low"] <= row["tpot_high"] <= row["tpot_p99"]
        assert row["share"] == pytest.approx(row["floor"] / row["step"])


def test_random_weights_and_ab(capsys):
    argv = ["--checkpoint", "random:tiny", "--concurrency", "2", "--device", "cpu"]
    result = run([*FEW, *argv, "--ab", "dtype=float32,bfloat16"], capsys)
    assert [row["system"] for row in result["rows"]] == ["dtype=float32", "dtype=bfloat16"]
    assert [pair["figure"] for pair in result["pairs"]] == ["TTFT", "TPOT"]
    assert all(0 < pair["lowest"] <= pair["ratio"] <= pair["highest"] for pair in result["pairs"])


def test_requests_that_never_decode_together_have_no_step(capsys):
    argv = [*FEW, "--concurrency", "2", "--ab", "max_batch=1,2"]
    apart, together = run(argv, capsys)["rows"]
    assert apart["step"] is None and "share" not in apart and together["share"] > 0
    assert bench.main(argv) == 0
    assert "| max_batch=1 | 2 |" in capsys.readouterr().out


def test_systems_alternate_with_the_same_prompts(monkeypatch):
    played, model = [], on_meta(tiny_config(), torch.float32)
    monkeypatch.setattr(bench, "met_experts", lambda model, prompts: 4)

    def system(name):
        def stream(prompts, count):
            played.append((name, prompts))
            yield from ((i, 0) for _ in range(count) for i in range(len(prompts)))

        return bench.System(name, stream, model)

    args = bench.parse(["--rounds", "3", "--input", "5", "--output", "4", "--concurrency", "2"])
    bench.measure(args, [system("a"), system("b")], 1e9)
    assert "".join(name for name, _ in played) == "abbaabba"
    assert all(a[1] == b[1] for a, b in zip(played[::2], played[1::2], strict=True))
    # Distinct, and new every round.
    assert len({tuple(prompt) for _, prompts in played for prompt in prompts}) == 8


def test_transformers_plays_the_same_tokens():
    args = bench.parse(["--peer", "transformers", "--input", "20", "--output", "6"])
    ours, theirs = bench.build(args, torch.device("cpu"), Ranks())
    prompts = [[(7 * i + n) % 1000 for i in range(20)] for n in range(3)]
    assert sorted(ours.stream(prompts, 6)) == sorted(theirs.stream(prompts, 6))


def test_transformers_with_random_weights(capsys):
    argv = ["--checkpoint", "random:tiny", "--concurrency", "1", "--device", "cpu"]
    result = run([*FEW, *argv, "--peer", "transformers"], capsys)
    assert [row["system"] for row in result["rows"]] == ["gptoss", "transformers"]
    assert "floor" not in result["rows"][1] and len(result["pairs"]) == 2


# --------------------------------------------------------------------------------------------------
# tools/bench_moe.py --ops triton


@pytest.fixture
def bench_moe():
    pytest.importorskip("triton")
    return importlib.import_module("bench_moe")


def test_a_layer_of_ops_triton(bench_moe, monkeypatch):
    """What would be captured on a GPU, run in the emulator; the times are made up."""
    gfx950, config, layers = importlib.import_module("gfx950"), tiny_config(), []

    def graph_ms(call):
        layers.append(call())
        return 2e-3 if len(layers) % 2 else 8e-3  # ms of a graph of four or one calls

    monkeypatch.setattr(weights, "published", lambda size: config)
    monkeypatch.setattr(bench_moe, "BATCHES", (1, 20))
    monkeypatch.setattr(bench_moe, "copy_bandwidth", lambda device: 1e12)
    monkeypatch.setattr("triton.testing.do_bench_cudagraph", graph_ms)
    monkeypatch.setitem(
        bench_moe.KERNEL_PEERS, "triton_kernels",
        lambda experts, top_k, activations: lambda x, router_weight, router_bias: x @ x.mT,
    )  # fmt: skip
    with gfx950.emulate():
        result = bench_moe.triton_layers("20b", "bf16", torch.device("cpu"), 0)
    few, many = result["layers"]
    # 16 experts: four calls of four distinct ones, then one of all.
    assert (few["active"], many["active"]) == (4, 16)
    assert [len(outputs) for outputs in layers] == [4, 4, 1, 1]
    assert all(out.shape == (1, 192) and out.isfinite().all() for out in layers[0])
    assert len({tuple(out.flatten().tolist()) for out in layers[0]}) == 4
    assert few["moe_us"] == 0.5 and few["triton_kernels_us"] == 2 == 4 * 0.5
    assert few["weight_bytes"] == 4 * 3 * 192 * 160 * 17 // 32
    assert few["copy_us"] == pytest.approx(few["weight_bytes"] / 1e6)
    assert few["of_floor"] == pytest.approx(0.5 / few["copy_us"])
    assert few["of_triton_kernels"] == 0.25 and "floor_us" not in few


def test_ops_triton_without_a_gpu_is_one_line(bench_moe, capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert bench_moe.main(["--ops", "triton"]) == 1
    assert capsys.readouterr() == (
        "", "bench_moe: --ops triton times on a GPU, and PyTorch finds none\n"
    )  # fmt: skip
