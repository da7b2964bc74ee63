"""Tests of the tools: floors by hand, the routing they make up, a small run of each."""

import itertools
import sys

import bench_moe
import counts
import peer_gpu
import pytest
import torch
from common import TINY

import gfx950
import moe_gluon
import weights


@pytest.mark.parametrize("experts, top_k, tokens", [(4, 2, 1), (4, 2, 2), (5, 3, 2), (4, 1, 3)])
def test_expected_experts_is_the_mean_over_all_choices(experts, top_k, tokens):
    choices = list(itertools.combinations(range(experts), top_k))
    products = itertools.product(choices, repeat=tokens)
    counts = [len(set(itertools.chain(*chosen))) for chosen in products]
    mean = sum(counts) / len(counts)
    assert bench_moe.expected_experts(experts, top_k, tokens) == pytest.approx(mean)


@pytest.mark.parametrize(
    "tokens, active, megabytes, us",
    [(1, 4, 52.9, 6.6), (8, 31, 409.8, 51.2), (8192, 128, 1692.1, 326.1)],
)
def test_floors_of_a_120b_layer(tokens, active, megabytes, us):
    floor = bench_moe.layer_floor(weights.published("120b"), "mxfp8", tokens, active)
    assert floor["weight_bytes"] / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert floor["flop"] == 2 * tokens * 4 * 3 * 2880 * 2880
    assert floor["floor_us"] == pytest.approx(us, abs=0.05)


def test_floors_of_other_formats():
    config = weights.published("120b")
    bf16 = bench_moe.layer_floor(config, "bf16", 1, 4)
    assert bf16["weight_bytes"] == 4 * 3 * 2880 * 2880 * 2
    mxfp4 = bench_moe.layer_floor(config, "mxfp4", 8192, 128)
    assert mxfp4["floor_us"] == pytest.approx(1692.06e6 / 8e12 * 1e6, abs=0.01)


@pytest.mark.parametrize(
    "tokens, active, first", [(1, 4, 0), (4, 15, 0), (8, 31, 100), (16, 53, 3), (512, 128, 0)]
)
def test_made_up_routing(tokens, active, first):
    config = weights.published("120b")
    x, router_weight, router_bias = bench_moe.pinned(config, tokens, active, first, "cpu")
    logits = x.float() @ router_weight.float().T + router_bias.float()
    chosen = logits.topk(4).indices
    assert sorted(chosen.unique().tolist()) == sorted((first + i) % 128 for i in range(active))
    counts = chosen.flatten().bincount(minlength=128)
    assert counts.max() - counts[counts > 0].min() <= 1


def test_bench_moe(monkeypatch):
    """A layer of the sizes of tiny/, at 2 tokens emulated and at 40 compiled."""
    config = weights.load(TINY).config
    monkeypatch.setattr(weights, "published", lambda size: config)
    monkeypatch.setattr(bench_moe, "BATCHES", (2, 40))
    result = bench_moe.kernels("20b", "mxfp8", torch.device("cpu"), 0)
    few, many = result["layers"]
    assert few["active"] == 7 and many["active"] == 16  # 16 (1 - 0.75^2), 16 (1 - 0.75^40)
    for layer in (few, many):
        rows = [row for row in result["kernels"] if row["tokens"] == layer["tokens"]]
        assert layer["launches"] == len(rows)
        assert any(row["tile"] for row in rows)
        assert all(row["vgprs"] > 0 and row["occupancy"] >= 1 for row in rows)
    # Nothing may be asked for less than once; scales are padded from 192 and 320 columns to 64s,
    # 17/32 of a byte.
    assert 1 <= few["weights_ratio"] <= 1.02 and few["others_ratio"] > 0 and few["model_us"] > 0
    assert "weights_ratio" not in many
    columns = itertools.chain(bench_moe.LAYER_COLUMNS, bench_moe.KERNEL_COLUMNS)
    plain = {"tokens", "active experts, pinned", "kernel", "tile", "waves a workgroup"}
    for header, *_ in columns:
        assert header in plain or header.endswith(("measured", "counted", "modelled")), header


def test_a_drawing_may_only_differ_in_line_numbers():
    old = (counts.DOCS / "loop.svg").read_text()
    assert "moe_gluon.py:" in old
    assert counts.same_drawing(old.replace("moe_gluon.py:1", "moe_gluon.py:2"), old)
    assert not counts.same_drawing(old.replace("v_mfma", "v_mul", 1), old)


def test_a_decode_step_asks_for_what_it_needs():
    """Two layers of the 120b's shapes, a token, few experts."""
    n = counts.decode_step(counts.two_layers(experts=8), 1)
    assert (n["layer"], n["step"], n["spills"]) == (8, 36 * 8 + 1, 0)
    assert n["active"] == [4, 4]
    # 127 cached tokens in a window of 128, else all 512; keys and values of 8 heads of 64, bf16
    assert n["least"]["keys"] == 18 * (127 + 512) * 2 * 8 * 64 * 2
    for kind, most in (("experts", 1.01), ("router", 1.01), ("dense", 1.0), ("keys", 1.1)):
        assert 1 <= n["requested"][kind] / n["least"][kind] <= most


def test_tables_of_another_compiler_are_refused(monkeypatch):
    monkeypatch.setattr("triton.__version__", "3.9.0")
    monkeypatch.setattr(sys, "argv", ["counts.py", "--check"])
    with pytest.raises(SystemExit, match=r"triton 3\.7\.1 compiles, this is 3\.9\.0"):
        counts.main()


def test_times_call_every_launcher_with_every_expert(monkeypatch):
    """What would be captured on a gfx950, run in the emulator: every call can be repeated."""
    checkpoint, repeated = weights.load(TINY), []
    monkeypatch.setattr(
        "triton.testing.do_bench_cudagraph", lambda call: repeated.append(call() + call()) or 1.0
    )
    packed = moe_gluon.prepare(checkpoint.experts[0], "mxfp8")
    peers = {"peer": lambda x, router_weight, router_bias: x @ router_weight.mT + router_bias}
    with gfx950.emulate():
        device = torch.device("cpu")
        times = bench_moe.layer_times(checkpoint.config, 1, 4, packed, peers, device)
    names = ["moe_us", "gating_gemm_us", "dispatch_swiglu_us", "combine_us", "peer_us"]
    assert times == dict.fromkeys(names, 1e3 / 4)
    assert [len(results) for results in repeated] == [8] * 5  # 16 experts, 4 at a time, twice


def test_peers_that_are_not_installed_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton_kernels", None)
    monkeypatch.setitem(sys.modules, "tokenspeed_kernel_amd", None)
    assert bench_moe.kernel_peers(None, 4) == {}
    lines = capsys.readouterr().err.splitlines()
    names = [line.split(":")[1] for line in lines]
    assert names == [" without triton_kernels", " without tokenspeed"]


def test_a_peer_model_that_is_not_installed_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton_kernels", None)
    monkeypatch.setitem(sys.modules, "gpt_oss", None)
    assert peer_gpu.main(["--model", "20b"]) == 1
    captured = capsys.readouterr()
    (line,) = captured.err.splitlines()
    assert line.startswith("peer_gpu: without triton_kernels, gpt_oss: pip install --no-deps ")
    assert "gpt-oss==0.0.9 tokenspeed-triton-kernels==1.0.0.post20260510" in line
    assert captured.out == ""
