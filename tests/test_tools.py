"""Tests of the tools: floors by hand, the routing they make up, a small run of each."""

import functools
import itertools
import json
import math
import sys

import bench_moe
import compile_ops
import counts
import first_run
import peer_gpu
import profile_step
import pytest
import torch
import triton
from common import TINY

import bench
import gfx950
import gptoss
import moe_gluon
import moe_nvidia
import ops_triton
import weights
from gfx950 import matrix


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


def test_every_kernel_of_a_step_has_its_kind():
    """In the profile of a step only PyTorch's small operators are of the last kind."""
    c = weights.published("20b")
    with compile_ops.compiling_for("sm_90") as found:
        compile_ops.launch_layer(c, 1)
        compile_ops.launch_moe(moe_nvidia, c, 1)
    *named, rest = profile_step.KINDS
    assert {profile_step.kind_of(kernel.name) for kernel in found} == set(named)
    assert profile_step.kind_of("nvjet_tst_64x8_64x16_4x1_v_bz_TNT") == "dense layers"
    assert profile_step.kind_of("vectorized_elementwise_kernel") == rest
    model = gptoss.GPTOSS(weights.load(TINY))
    c, tokens, context = model.config, 2, 10
    least = profile_step.floors(model, tokens, context, c.num_local_experts / 2)
    assert least["attention"] == tokens * context * 4 * 2 * (
        c.num_key_value_heads * c.head_dim * c.num_hidden_layers
    )
    assert least["experts"] == sum(bench.nbytes(layer.packed) for layer in model.layers) / 2


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


@pytest.fixture
def first_run_on(monkeypatch, tmp_path):
    """first_run.py on an emulated card with little to do -> exit code, its report."""
    file = tmp_path / "report.json"
    monkeypatch.setattr(first_run, "SMALL", [(4, 64, 32, 2, 2)])
    monkeypatch.setattr(first_run, "FORMATS", (("bf16", "openai"), ("mxfp8", "openai")))
    monkeypatch.setattr(first_run, "OF_THE_EMULATOR", ("mxfp4",))

    def run(*only):
        code = first_run.main(["--emulate", "--json", str(file), "--only", *only])
        return code, json.loads(file.read_text())

    return run


def verdicts(report, part):
    return {row["name"]: row["verdict"] for row in report["checks"] if row["part"] == part}


def test_first_run_checks_every_kernel(first_run_on, capsys):
    code, report = first_run_on("card", "kernels", "times")
    assert code == 0 and report["running"] is None
    (card,) = (row for row in report["checks"] if row["part"] == "card")
    assert card["target"] == "hip gfx950" and card["verdict"] == "emulated"
    found = verdicts(report, "kernels")
    # moe_gluon multiplies bf16 activations by bf16 weights only
    assert [name for name, verdict in found.items() if verdict == "skipped"] == [
        "moe_gluon.moe, bf16, openai weights, 2 tokens, 4 x 64 x 32"
    ]
    assert set(found.values()) == {"right", "skipped"}
    kernels = {name.partition(",")[0].partition(" ")[0] for name in found}
    operations = {f"ops_triton.{name}" for name in ("moe", "add_norm", "attention", "linear")}
    assert kernels == operations | {"moe_gluon.moe", "moe_gluon.gating_gemm"}
    assert set(verdicts(report, "times").values()) == {"skipped"}
    assert (
        capsys.readouterr()
        .out.splitlines()[-1]
        .endswith(f"{len(report['checks'])} checks, 0 wrong or failed")
    )


def test_first_run_names_a_wrong_kernel(first_run_on, monkeypatch):
    right = ops_triton.moe

    @functools.wraps(right)
    def moe(*args):
        return right(*args) * (1.1 if args[5] == "mxfp8" else 1)

    monkeypatch.setattr(ops_triton, "moe", moe)
    monkeypatch.setattr(first_run, "check_other_operations", lambda *_: None)
    monkeypatch.setattr(first_run, "check_promised_bits", lambda *_: None)
    code, report = first_run_on("kernels")
    wrong = [name for name, verdict in verdicts(report, "kernels").items() if verdict == "wrong"]
    assert code == 1 and wrong == ["ops_triton.moe, mxfp8, openai weights, 2 tokens, 4 x 64 x 32"]


def test_first_run_holds_assumptions_against_the_card(first_run_on, monkeypatch):
    """A card that sums otherwise, and one bit of whose v_max_f32 is another: these are found, and
    nothing else."""
    how, every, kernel = {"sums": "cdna3"}, first_run.assumptions, first_run.instruction_kernel
    monkeypatch.setattr(first_run.Card, "active", lambda card: gfx950.emulate(**how))
    monkeypatch.setattr(
        first_run,
        "assumptions",
        lambda card: {name: probe for name, probe in every(card).items() if "layers" not in name},
    )

    class OtherKernel:
        def __getitem__(self, grid):
            def launch(x, y, z, out, asm, *args, **options):
                kernel[grid](x, y, z, out, asm, *args, **options)
                if "v_max" in asm and triton.runtime.driver.active.session.sums == "cdna3":
                    out[17] ^= 1

            return launch

    monkeypatch.setattr(first_run, "instruction_kernel", OtherKernel())
    code, report = first_run_on("assumptions")
    rows = {row["name"]: row for row in report["checks"]}
    differ = {name for name, row in rows.items() if row["verdict"] == "differs"}
    sums, largest = (
        {n for n in rows if n.startswith("sums of")},
        "v_max_f32 of signalling NaN and zeros",
    )
    assert code == 0 and differ == sums | {largest}
    (first,) = rows[largest]["first"]
    assert first["x"] == "0x7fa00000" and int(first["card"], 16) ^ int(first["emulator"], 16) == 1
    for name in sums:
        rules = rows[name]["rules"]
        assert rules["cdna3"] == 0 and rules["exact"] and rules["chain"], name
    assert {row["verdict"] for row in rows.values()} == {"holds", "differs", "noted"}


@pytest.mark.parametrize("shape, name", [(16, "16x16x128"), (32, "32x32x64")])
def test_first_run_multiplies_mixed_formats_in_one_instruction(shape, name):
    """What it probes is fp8 times fp4 with scales, not a conversion in front of something else; and
    scales in other places are found."""
    card = first_run.Card(True)
    with gfx950.emulate() as gpu:
        assert first_run.probe_scales(card, "e4m3", "e2m1", shape)["verdict"] == "holds"
    code = [ins for ins in gpu.launches[0].program.code if ins.op.startswith("v_mfma")]
    assert code and all(name in ins.op and "scale" in ins.op for ins in code)
    assert {frozenset((ins.mods.get("cbsz", 0), ins.mods.get("blgp", 0))) for ins in code} == {
        frozenset((0, 4))
    }


def test_first_run_finds_misplaced_scales(monkeypatch):
    """Scales of two neighbouring rows exchanged, everywhere."""
    right = matrix.scales
    monkeypatch.setattr(matrix, "scales", lambda *args: right(*args)[:, torch.arange(16) ^ 1])
    with gfx950.emulate():
        row = first_run.probe_scales(first_run.Card(True), "e2m1", "e2m1", 16)
    assert row["verdict"] == "differs" and len(row["rows"]) == 32


def test_first_run_reports_while_it_runs(tmp_path):
    """Whatever ends the process, the file names what was running."""
    report = first_run.Report(tmp_path / "report.json", {})
    report.check("kernels", "fine", lambda: {"verdict": "right", "error": math.nan})
    assert report.check("kernels", "raises", lambda: 1 / 0)["verdict"] == "failed"

    def dies():
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        report.check("kernels", "dies", dies)
    kept = json.loads((tmp_path / "report.json").read_text())
    assert kept["running"] == "kernels: dies" and report.bad == 1
    assert [row["name"] for row in kept["checks"]] == ["fine", "raises"]
    assert kept["checks"][0]["error"] == "NaN"
    assert "ZeroDivisionError" in kept["checks"][1]["why"]


def test_first_run_compares_bits():
    one, other = torch.tensor([1.0, -0.0, math.nan]), torch.tensor([1.0, 0.0, math.nan])
    found = first_run.differing(one, other)
    assert (found["differ"], found["of"]) == (1, 3)
    assert found["first"] == {"at": 1, "got": "-0.0", "want": "0.0"}
    unwritten = torch.tensor([0, -1, 2], dtype=torch.int32)
    assert first_run.written_bits(torch.tensor([0, 7, 3]).int(), unwritten)["differ"] == 1
    low = first_run.bits(0, 1 << 31, 1, 0x7F800000, 0x7FC00000, 0x7FA00000)
    high = first_run.bits(0, 0, (1 << 31) | 1, 0x7F7FFFFF, 0x7FA00000, 0)
    assert first_run.ulps(low, high).tolist() == [0, 1, 3, 1, 0, 1 << 40]


def test_first_run_keeps_what_a_program_printed(monkeypatch, tmp_path):
    monkeypatch.setattr(first_run, "ROOT", tmp_path)
    program = tmp_path / "program.py"
    program.write_text('import sys\nprint("{}")\nprint("text")\nsys.exit(int(sys.argv[1]))')
    assert first_run.timed(["program.py", "0", "--json"], 60)["result"] == [{}]
    failed = first_run.timed(["program.py", "3", "--json"], 60)
    assert (failed["verdict"], failed["why"]) == ("failed", "it says nothing")
    program.write_text('import sys, time\nprint("{}", flush=True)\ntime.sleep(60)')
    monkeypatch.setattr(first_run, "LEAST_SECONDS", 1)
    late = first_run.timed(["program.py", "--json"], 3)
    assert (late["verdict"], late["why"], late["result"]) == ("timed", "stopped after 3 s", [{}])
    assert first_run.timed(["program.py", "--json"], 0.5)["verdict"] == "skipped"


def test_first_run_refuses_in_one_line(capsys, tmp_path):
    assert first_run.main([]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line == "first_run: PyTorch finds no GPU here; --emulate runs on an emulated gfx950"
    assert first_run.main(["--emulate", "--json", str(tmp_path / "none" / "report.json")]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("first_run: --json: [Errno 2] No such file or directory: ")
