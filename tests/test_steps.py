"""tools/steps.py: every step against the equations at sizes with tails, under the emulator's
adversary; what single steps promise; and docs/porting.md, whose tables they print."""

import re
from dataclasses import replace

import pytest
import steps
import tables
import torch
import triton
import triton.language as tl
from common import ROOT

import gfx950
import gptoss
import moe_gluon

PAGE = ROOT / "docs" / "porting.md"
ADVERSARY = dict(timing="lazy", schedule="skew")
each_step = pytest.mark.parametrize("step", steps.STEPS, ids=lambda step: step.__name__)

# Of 6 experts: 2 is every token's, 5 nobody's; K is 1.25 times 128, a token has 3 slots of 4
FEW = torch.tensor([[2, 0, 1], [1, 3, 2], [2, 3, 4], [0, 2, 1], [4, 1, 2]]), 6, 160, 192
# All 16 rows of a tile; K is 1.19 times the 512 that 4 waves take at once, its last wave has none
FULL = torch.tensor([[1]] * 15 + [[0]]), 2, 608, 64
FULL[0][15, 0] = 1


def check(step, *arguments):
    """h against the oracle: the same NaNs, and all else within the rounding of bf16 or, where it is
    quantised to mxfp8 on both sides, the same but for what float32 sums tip to a neighbour."""
    got, _ = steps.emulated(step, *arguments, **ADVERSARY)
    want = steps.oracle(step, *arguments)
    if step is steps.shipped:  # NaN is in the scale: all of its group is
        groups = want.unflatten(-1, (-1, 32))
        want = groups.masked_fill(groups.isnan().any(-1, keepdim=True), torch.nan).flatten(-2)
    assert torch.equal(got.isnan(), want.isnan())
    got, want = got[~want.isnan()], want[~want.isnan()]
    assert (got - want).norm() <= steps.TOLERANCE * want.norm()


@each_step
@pytest.mark.parametrize("shape", [FEW, FULL], ids=["few", "full"])
def test_tails(step, shape):
    check(step, *steps.problem(*shape))


@each_step
def test_scales_at_the_ends(step):
    """NaN in one group, 2^-127 in others. What is NaN leaves its neighbours what they are."""
    x, chosen, experts = steps.problem(*FEW)
    experts.gate_up_scale[1, 7, 3] = 255
    experts.gate_up_scale[2, :, 1] = 0
    check(step, x, chosen, experts)


@triton.jit
def values_kernel(codes, scales, out):
    code, byte = tl.load(codes + tl.arange(0, 16)), tl.load(scales + tl.arange(0, 256))
    at = tl.arange(0, 256)[:, None] * 16 + tl.arange(0, 16)
    tl.store(out + at, steps.e2m1(code)[None, :] * steps.e8m0(byte)[:, None])


def test_step_0_knows_every_weight():
    """All 16 codes under all 256 scales, exactly: infinities, NaN and denormals among them."""
    codes, scales = torch.arange(16, dtype=torch.uint8), torch.arange(256).to(torch.uint8)
    got = torch.empty(256, 16)
    with gfx950.emulate(**ADVERSARY):
        values_kernel[(1,)](codes, scales, got)
    want = gptoss.E2M1 * gptoss.E8M0[:, None]
    assert torch.equal(got.isnan(), want.isnan())
    assert ((got == want) | want.isnan()).all()


@pytest.mark.parametrize("step", steps.STEPS[:2], ids=lambda step: step.__name__)
def test_plain_steps_see_infinite_weights(step):
    """They expand a weight before they multiply, as the equations do: 6 x 2^127 is infinite."""
    x, chosen, experts = steps.problem(*FEW)
    experts.gate_up_scale[1, 6, 2] = 254
    experts.gate_up_weight[1, 6, 32:48] = 0x77
    check(step, x, chosen, experts)


def test_step_0_is_plain_and_short():
    """No Gluon, nothing of moe_gluon, about 40 lines without their docstrings."""
    source = (ROOT / "tools" / "steps.py").read_text()
    source = source[source.index("# Step 0") : source.index("# Step 1")]
    assert "gl." not in source and "gluon" not in source
    source = re.sub(r'""".*?"""', "", source, flags=re.S)
    assert sum(bool(line.strip()) for line in source.splitlines()) <= 60


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("step", steps.STEPS[:2], ids=lambda step: step.__name__)
def test_plain_steps_run_on_any_gpu(step):
    x, chosen, experts = steps.problem(*FEW)
    moved = {
        name: tensor.cuda() for name, tensor in vars(experts).items() if torch.is_tensor(tensor)
    }
    got = step(x.cuda(), chosen.cuda(), replace(experts, **moved)).float().cpu()
    want = steps.oracle(step, x, chosen, experts)
    assert (got - want).norm() <= steps.TOLERANCE * want.norm()


def test_packing_becomes_the_shipped_one():
    """Step 4 packs what moe_gluon.prepare packs, byte for byte."""
    _, _, experts = steps.problem(*FEW)
    w, scale = steps.deal(experts.gate_up_weight, experts.gate_up_scale)
    packed = moe_gluon.prepare(experts, "mxfp8").gate_up
    assert torch.equal(w, packed.data) and torch.equal(scale, packed.scale)


def test_activations_are_the_oracles():
    x = torch.randn(5, 96, generator=torch.Generator().manual_seed(0)) * 300
    x[0, :32], x[1, 3], x[2, :32] = 0, 1e-39, 0.0625
    values, scale = steps.mxfp8(x)
    values = values.view(torch.float8_e4m3fn).float().unflatten(-1, (-1, 32))
    got = (values * gptoss.E8M0[scale.int()][..., None]).flatten(-2)
    assert torch.equal(got, gptoss.quantise_mx(x, "mxfp8"))
    x[4, 40] = torch.nan
    assert steps.mxfp8(x)[1][4].tolist()[1] == 255


def test_the_list_is_what_route_leaves():
    """Tokens that choose as FEW does, 2 first, through the router of moe_gluon."""
    chosen, E, K, N = FEW
    x, _, experts = steps.problem(*FEW)
    router = torch.zeros(E, K).bfloat16()
    logits = torch.zeros(5, E).scatter_(1, chosen, torch.tensor([[3.0, 2.0, 1.0]]).expand(5, 3))
    # token t is the t-th unit vector, so its logits are column t of the router
    x, router[:, :5] = torch.eye(5, K).bfloat16(), logits.T.bfloat16()
    with gfx950.emulate():
        packed = moe_gluon.prepare(experts, "mxfp8")
        routing = moe_gluon.gating_gemm(x, router, torch.zeros(E), packed, 3)
    tiles, num_tiles, pairs = steps.list_tiles(chosen, E)
    n = int(num_tiles)
    assert n == int(routing.num_tiles) == 5
    assert torch.equal(tiles[:n, :3], routing.tiles[:n, :3])
    assert torch.equal(pairs // 3 * 4 + pairs % 3, routing.pairs[: len(pairs)])


def test_a_wrong_step_is_not_counted(monkeypatch):
    def wrong(x, chosen, experts):
        return steps.scaled(x, chosen.flip(0), experts)

    monkeypatch.setattr(steps, "counted_problem", lambda: steps.problem(*FEW))
    with pytest.raises(SystemExit, match="wrong is wrong: relative L2 error"):
        steps.counts(wrong)


@pytest.mark.parametrize(
    "names, lines",
    [
        ("abb", ["a", "b x 2"]),
        ("ababab", ["3 times:", "    a", "    b"]),
        ("aabaabc", ["2 times:", "    a x 2", "    b", "c"]),
    ],
)
def test_repeats_are_folded(names, lines):
    assert steps.folded(list(names)) == lines


@pytest.mark.parametrize(
    "instruction, moved",
    [
        ("ds_read_b128 v[0:3], v4", 64 * 16),
        ("ds_read2st64_b64 v[0:3], v4 offset1:1", 64 * 16),
        ("ds_write_b64 v4, v[0:1]", 64 * 8),
        ("ds_bpermute_b32 v0, v1, v2", 64 * 4),
        ("buffer_load_dword v0, v1, s[0:3], 0 offen", 0),
    ],
)
def test_bytes_through_lds(instruction, moved):
    assert steps.lds_bytes(instruction) == moved


# -- docs/porting.md
# --------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not triton.__version__.startswith("3.7."), reason="counts of triton 3.7.1")
def test_the_page_has_the_tables_of_today(capsys):
    printed = {name for name, _ in tables.MARK.findall(PAGE.read_text())}
    assert {"steps", *(f"step {i}" for i in range(1, 8))} <= printed
    assert tables.refresh(PAGE, steps.TABLES, check=True), capsys.readouterr().out


def test_the_page_names_tests_that_exist():
    files = [*(ROOT / "tests").glob("test_*.py"), ROOT / "test_gptoss.py"]
    defined = {
        name for file in files for name in re.findall(r"^def (test_\w+)", file.read_text(), re.M)
    }
    named = {name for name in re.findall(r"`(test_\w+)`", PAGE.read_text())}
    assert named and named <= defined, named - defined
