"""Tests of bench.py: the arithmetic of its reports against counts by hand, its errors, and a small
run of each mode."""

import argparse
import itertools
import json
import re
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import pytest
import torch

import bench
from gptoss import GPTOSS
from weights import Config

FEW = ["--input", "20", "--output", "6", "--rounds", "2"]


def config_of(size: str) -> Config:
    return Config.from_dict(bench.random_config(size))


def on_meta(size: str, dtype=torch.bfloat16) -> GPTOSS:
    return GPTOSS(bench.random_checkpoint(config_of(size), "meta"), "meta", dtype, "torch")


# -- arithmetic
# -------------------------------------------------------------------------------------------------------


def test_summary():
    """Two requests: the second is prefilled while the first waits; only steps in which both decode
    are steps."""
    first, second = [0.1, 0.5, 0.52, 0.55, 0.58], [0.4, 0.5, 0.52, 0.55, 0.59]
    assert bench.steps([first, second]) == pytest.approx([0.02, 0.03, 0.03, 0.1, 0.02, 0.03])
    found = bench.summary([[first, second]])
    assert found == pytest.approx(
        {
            "requests": 2,
            "ttft": 250,
            "ttft_p99": 400,
            "tpot": 1e3 * (0.12 + 0.0475) / 2,
            "tpot_p99": 120,
            "step": 30,
            "tokens_per_s": 10 / 0.59,
        }
    )


def test_percentile_is_the_nearest_rank():
    assert bench.percentile(list(range(1, 201)), 99) == 198
    assert bench.percentile([3, 1, 2], 99) == 3 and bench.percentile([3, 1, 2], 50) == 2


@pytest.mark.parametrize("experts, top_k, tokens", [(4, 2, 1), (4, 2, 2), (5, 3, 2), (4, 1, 3)])
def test_expected_experts_is_the_mean_over_all_choices(experts, top_k, tokens):
    choices = list(itertools.combinations(range(experts), top_k))
    counts = [
        len(set(itertools.chain(*chosen))) for chosen in itertools.product(choices, repeat=tokens)
    ]
    assert bench.expected_experts(experts, top_k, tokens) == pytest.approx(
        sum(counts) / len(counts)
    )


def test_bytes_of_a_120b_step_by_hand():
    """One sequence of 576 tokens, bf16 and packed experts."""
    attention = 2 * (5120 * 2880 + 5120 + 64 + 2880 * 4096 + 2880)
    router, norms = 2 * (128 * 2880 + 128), 4 * 2 * 2880
    expert = (3 * 2880 * 2880) // 32 * 17 + 2 * (
        5760 + 2880
    )  # 16 bytes of codes and one of scale for 32 weights
    assert expert == 13_219_200 + 17_280
    seen = 18 * 128 + 18 * 576
    want = 36 * (attention + router + norms + 4 * expert) + seen * 2 * 8 * 64 * 2
    want += (
        2 * 201088 * 2880 + 4 * 2880 + 2 * 2880
    )  # unembedding, final norm, one row of the embedding
    assert want == 5_029_280_640
    assert bench.step_bytes(on_meta("120b"), 1, 576) == pytest.approx(want, abs=1)


def test_bytes_of_a_tiny_step_by_hand():
    """Eight sequences of 100 tokens, float32, experts expanded to float32: what a default run on a
    CPU holds."""
    attention = 384 * 192 + 384 + 8 + 192 * 256 + 192  # (8 + 2 * 2) * 32 = 384 rows of qkv
    expert = 3 * 192 * 160 + 320 + 192
    active = 16 * (1 - 0.75**8)
    layer = attention + 16 * 192 + 16 + 2 * 192 + active * expert
    cache = 8 * (2 * 32 + 2 * 100) * 2 * 2 * 32  # sliding layers see 32 tokens
    want = 4 * (4 * layer + cache + 1024 * 192 + 192 + 8 * 192)
    model = GPTOSS.from_pretrained(bench.TINY)
    assert bench.step_bytes(model, 8, 100) == pytest.approx(want, abs=1)
    assert bench.step_bytes(on_meta("tiny", torch.float32), 8, 100) == bench.step_bytes(
        model, 8, 100
    )


@pytest.mark.parametrize(
    "tokens, active, megabytes, us",
    [(1, 4, 52.9, 6.6), (8, 31, 409.8, 51.2), (8192, 128, 1692.1, 326.1)],
)
def test_floors_of_a_120b_layer(tokens, active, megabytes, us):
    floor = bench.layer_floor(config_of("120b"), "mxfp8", tokens, active)
    assert floor["weight_bytes"] / 1e6 == pytest.approx(megabytes, abs=0.05)
    assert floor["flop"] == 2 * tokens * 4 * 3 * 2880 * 2880
    assert floor["floor_us"] == pytest.approx(us, abs=0.05)


def test_floors_of_other_formats():
    config = config_of("120b")
    assert bench.layer_floor(config, "bf16", 1, 4)["weight_bytes"] == 4 * 3 * 2880 * 2880 * 2
    assert bench.layer_floor(config, "mxfp4", 8192, 128)["floor_us"] == pytest.approx(
        1692.06e6 / 8e12 * 1e6, abs=0.01
    )


@pytest.mark.parametrize(
    "tokens, active, first", [(1, 4, 0), (4, 15, 0), (8, 31, 100), (16, 53, 3), (512, 128, 0)]
)
def test_pinned_routing(tokens, active, first):
    config = config_of("120b")
    x, router_weight, router_bias = bench.pinned(config, tokens, active, first, "cpu")
    logits = x.float() @ router_weight.float().T + router_bias.float()
    chosen = logits.topk(4).indices
    assert sorted(chosen.unique().tolist()) == sorted((first + i) % 128 for i in range(active))
    counts = chosen.flatten().bincount(minlength=128)
    assert counts.max() - counts[counts > 0].min() <= 1


# -- command line
# -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "argv, code, message",
    [
        (
            ["--ab", "speed=1,2"],
            2,
            "expected SETTING=A,B, with a SETTING of moe, activations, dtype, page_size",
        ),
        (["--ab", "moe=torch,cuda"], 2, "--moe: invalid choice: 'cuda'"),
        (["--ab", "page_size=16,0"], 2, "--page-size: '0' is not a positive number"),
        (["--ab", "moe=torch"], 2, "expected SETTING=A,B"),
        (["--ab", "moe=torch,torch"], 2, "expected SETTING=A,B"),
        (["--ab", "moe=torch,gluon", "--peer", "transformers"], 2, "not allowed with"),
        (["--checkpoint", "random:7b"], 2, "random: takes 20b, 120b, tiny"),
        (["--plot", "tpot.png"], 2, "the picture is an SVG"),
        (["--concurrency", "1,0"], 2, "'0' is not a positive number"),
        (["--output", "1"], 2, "nothing to time"),
        (["--kernels", "--checkpoint", "tiny"], 2, "kernels does not take --checkpoint"),
        (["--profile", "--model", "20b"], 2, "profile does not take --model"),
        (["--kernels", "--profile"], 2, "kernels does not take --profile"),
        (["--nonsense"], 2, "unrecognized arguments"),
        (["--device", "nowhere"], 2, "--device: invalid choice: 'nowhere'"),
        (["--checkpoint", "nowhere"], 1, "nowhere/config.json: No such file"),
        (["--activations", "fp8"], 1, "needs the static input scales of a Quark checkpoint"),
        (["--input", "9000"], 1, "prompt 0 is too long"),
        (["--peer", "openai"], 1, "--peer openai loads openai, random; "),
    ],
)
def test_errors_are_one_line(argv, code, message, capsys):
    try:
        found = bench.main(argv)
    except SystemExit as exit:
        found = exit.code
    out, err = capsys.readouterr()
    assert (
        found == code
        and message in err
        and err.startswith("bench: ")
        and err.count("\n") == 1
        and not out
    )


@pytest.mark.parametrize("peer", [None, "transformers"])
def test_what_does_not_fit_is_said_before_anything_is_loaded(peer, capsys, monkeypatch):
    real, devices = torch.empty, set()
    monkeypatch.setattr(bench, "free_bytes", lambda device: 60_000_000_000)
    monkeypatch.setattr(
        torch, "empty", lambda *a, **k: devices.add(str(k.get("device"))) or real(*a, **k)
    )
    argv = ["--checkpoint", "random:120b", "--device", "cpu", "--dtype", "bfloat16"]
    assert bench.main(argv + (["--peer", peer] if peer else [])) == 1
    err = capsys.readouterr().err
    assert "60.0 GB are free" in err and "weights 65.2" in err and err.count("\n") == 1
    assert devices <= {"meta"}
    assert (f"{peer} 233.7" in err) == bool(peer)  # 116.83 billion parameters in bf16


@pytest.mark.parametrize(
    "size, dtype, layout",
    [
        ("120b", torch.bfloat16, "openai"),
        ("20b", torch.float32, "openai"),
        ("tiny", torch.float32, "random"),
    ],
)
def test_the_estimate_of_weights_is_what_the_engine_holds(size, dtype, layout):
    """To 1%: it takes biases and norms for values of `dtype`."""
    args, model = (
        argparse.Namespace(input=512, output=128, concurrency=[1, 8], peer=None),
        on_meta(size, dtype),
    )
    parts = bench.memory(model.config, layout, dtype, args)
    held = sum(map(bench.nbytes, [model.embedding, model.unembedding, model.norm, *model.layers]))
    assert parts["weights"] == pytest.approx(held, rel=0.01)
    assert size != "120b" or sum(parts.values()) < 70e9  # fits a GPU of 80 GB


def test_a_missing_peer_is_one_line(capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert bench.main(["--peer", "transformers", *FEW]) == 1
    err = capsys.readouterr().err
    assert err.startswith("bench: ") and "transformers" in err and err.count("\n") == 1


def test_importing_needs_no_triton():
    subprocess.run(
        [sys.executable, "-c", "import sys; sys.modules['triton'] = None; import bench"], check=True
    )


# -- runs
# -------------------------------------------------------------------------------------------------------------


def run(argv, capsys) -> dict:
    assert bench.main([*argv, "--json"]) == 0
    out, err = capsys.readouterr()
    assert not err
    return json.loads(out)


def test_a_run_on_tiny(capsys, tmp_path):
    picture = tmp_path / "tpot.svg"
    result = run([*FEW, "--concurrency", "1,3", "--plot", str(picture)], capsys)
    assert result["mode"] == "latency" and result["bandwidth"] > 1e8 and result["pairs"] == []
    assert result["settings"]["output"] == 6 and result["torch"] == torch.__version__
    for row, concurrency in zip(result["rows"], (1, 3), strict=True):
        assert list(row) == [
            "system",
            "concurrency",
            "requests",
            "ttft",
            "ttft_p99",
            "tpot",
            "tpot_p99",
            "step",
            "tokens_per_s",
            "step_bytes",
            "floor",
            "share",
        ]
        assert row["concurrency"] == concurrency and row["requests"] == 2 * concurrency
        assert (
            0 < row["ttft"] <= row["ttft_p99"]
            and 0 < row["step"]
            and row["tpot"] <= row["tpot_p99"]
        )
        assert row["share"] == pytest.approx(row["floor"] / row["step"])
    root = ElementTree.parse(picture).getroot()
    assert [line.get("stroke-dasharray") for line in root.findall("{*}polyline")] == ["0", "6"]
    texts = [text.text.strip() for text in root.findall("{*}text")]
    for row in result["rows"]:
        assert any(t.startswith(f"{row['tpot']:.3g}") for t in texts)
        assert any(t.startswith(f"{row['floor']:.3g}") for t in texts)


def test_random_weights_and_ab(capsys):
    result = run(
        [
            *FEW,
            "--checkpoint",
            "random:tiny",
            "--concurrency",
            "2",
            "--ab",
            "dtype=float32,bfloat16",
        ],
        capsys,
    )
    assert [row["system"] for row in result["rows"]] == ["dtype=float32", "dtype=bfloat16"]
    assert [pair["measure"] for pair in result["pairs"]] == ["ttft", "tpot", "step"]
    assert all(0 < pair["lowest"] <= pair["ratio"] <= pair["highest"] for pair in result["pairs"])


def test_requests_that_never_decode_together_have_no_step(capsys):
    result = run([*FEW, "--concurrency", "2", "--ab", "max_batch=1,2"], capsys)
    apart, together = result["rows"]
    assert apart["step"] is None and "share" not in apart and together["share"] > 0
    assert [pair["measure"] for pair in result["pairs"]] == ["ttft", "tpot"]
    assert bench.main([*FEW, "--concurrency", "2", "--ab", "max_batch=1,2"]) == 0
    assert "| max_batch=1 | 2 | 4 |" in capsys.readouterr().out


def test_systems_alternate_with_the_same_prompts(monkeypatch):
    played, model = [], on_meta("tiny")

    def stream(name, prompts, count):
        played.append((name, prompts))
        yield from ((i, 0) for _ in range(count) for i in range(len(prompts)))

    def system(name):
        return bench.System(name, lambda prompts, count: stream(name, prompts, count), model)

    monkeypatch.setattr(bench, "build", lambda *_: [system("a"), system("b")])
    monkeypatch.setattr(bench, "copy_bandwidth", lambda device: 1e9)
    args = bench.arguments().parse_args(["--rounds", "3", "--input", "5", "--output", "4"])
    args.concurrency = [2]
    bench.latency(args, torch.device("cpu"))
    assert "".join(name for name, _ in played) == "abbaabba"
    assert all(a[1] == b[1] for a, b in zip(played[::2], played[1::2], strict=True))
    assert (
        len({tuple(prompt) for _, prompts in played for prompt in prompts}) == 8
    )  # distinct, and new every round


def test_transformers_plays_the_same_tokens(capsys):
    args = bench.arguments().parse_args(
        ["--peer", "transformers", "--input", "20", "--output", "6"]
    )
    args.variants, args.concurrency = {"gptoss": args}, [3]
    ours, theirs = bench.build(args, torch.device("cpu"))
    prompts = [[(7 * i + n) % 1000 for i in range(20)] for n in range(3)]
    assert sorted(ours.stream(prompts, 6)) == sorted(theirs.stream(prompts, 6))


def test_transformers_with_random_weights(capsys):
    result = run(
        [*FEW, "--checkpoint", "random:tiny", "--concurrency", "1", "--peer", "transformers"],
        capsys,
    )
    assert [row["system"] for row in result["rows"]] == ["gptoss", "transformers"]
    assert "floor" not in result["rows"][1] and result["pairs"][0]["systems"] == [
        "gptoss",
        "transformers",
    ]


def test_profile(capsys):
    assert bench.main(["--profile", "--input", "8"]) == 0
    out = capsys.readouterr().out
    assert "| aten::addmm |" in out and "| (Python) |" in out and " others | - |" in out
    rows = [line.strip("| ").split(" | ") for line in out.splitlines() if line.startswith("| ")][
        2:5
    ]
    biggest = ", ".join(f"{operator} {float(share[:-1]):.0f}%" for operator, *_, share in rows)
    found = re.sub(r"\d+%", "%", out.splitlines()[-1])  # shares are rounded once there, twice here
    assert found == "The three biggest: " + re.sub(r"\d+%", "%", biggest)
    result = run(["--profile", "--input", "8"], capsys)
    assert sum(row["share"] for row in result["rows"]) == pytest.approx(1)
    assert sum(row["us"] for row in result["rows"]) == pytest.approx(1e3 * result["step"])


@pytest.fixture
def small_layer(monkeypatch):
    """--kernels at the sizes of tiny/, at 2 tokens emulated and at 40 compiled."""
    real = bench.random_config
    monkeypatch.setattr(bench, "random_config", lambda size: real("tiny"))
    monkeypatch.setattr(bench, "BATCHES", (2, 40))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


def test_kernels(small_layer, capsys):
    result = run(["--kernels", "--model", "20b"], capsys)
    few, many = result["layers"]
    assert few["active"] == 7 and many["active"] == 16  # 16 (1 - 0.75^2), 16 (1 - 0.75^40)
    for layer in (few, many):
        assert layer["launches"] == sum(
            row["tokens"] == layer["tokens"] for row in result["kernels"]
        )
    # nothing may be asked for less than once; scales are padded from 192 and 320 columns to 64s,
    # 17/32 of a byte
    assert 1 <= few["weights_ratio"] <= 1.02 and few["others_ratio"] > 0 and few["model_us"] > 0
    assert "weights_ratio" not in many
    for row in result["kernels"]:
        assert (
            row["vgprs"] > 0
            and row["occupancy"] >= 1
            and ("busiest" in row) == (row["tokens"] == 2)
        )
    assert bench.main(["--kernels", "--model", "20b", "--activations", "bf16"]) == 0
    lines = capsys.readouterr().out.splitlines()
    headers = [line for line, below in itertools.pairwise(lines) if below.startswith("| ---")]
    assert len(headers) == 2
    for header in itertools.chain(*(line.strip("| ").split(" | ") for line in headers)):
        said = header.endswith(("measured", "measured by it", "counted", "modelled"))
        assert said or header in (
            "tokens",
            "active experts, pinned",
            "kernel",
            "tile",
            "waves a workgroup",
        ), header


def test_times_call_every_launcher_with_every_expert(small_layer, monkeypatch):
    """What would be captured on a gfx950, run in the emulator: every call can be repeated."""
    import gfx950
    import moe_gluon

    config, repeated = config_of("tiny"), []
    monkeypatch.setattr(
        "triton.testing.do_bench_cudagraph", lambda call: repeated.append(call() + call()) or 1.0
    )
    packed = moe_gluon.prepare(bench.random_checkpoint(config, "cpu").experts[0], "mxfp8")
    peers = {"peer": lambda x, router_weight, router_bias: x @ router_weight.mT + router_bias}
    with gfx950.emulate():
        times = bench.layer_times(moe_gluon, config, 1, 4, packed, peers, torch.device("cpu"))
    names = ["moe_us", "gating_gemm_us", "dispatch_swiglu_us", "combine_us", "peer_us"]
    assert times == dict.fromkeys(names, 1e3 / 4)
    assert [len(results) for results in repeated] == [8] * 5  # 16 experts, 4 at a time, twice


def test_kernel_peers_that_are_not_installed_are_named(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "triton_kernels", None)
    monkeypatch.setitem(sys.modules, "tokenspeed_kernel_amd", None)
    assert bench.kernel_peers(None, 4) == {}
    assert [line.split(":")[1] for line in capsys.readouterr().err.splitlines()] == [
        " without triton_kernels",
        " without tokenspeed",
    ]
