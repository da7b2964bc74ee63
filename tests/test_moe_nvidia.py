"""moe_nvidia.py against the equations of gptoss.py: its PTX, which this environment's Triton makes
for an H100, executed by ptx.py, and where there is an NVIDIA GPU the kernels on that."""

import contextlib
import math
import re
from dataclasses import replace

import compile_ops
import ptx
import pytest
import torch
import triton.experimental.gluon.language as gl
from common import relative
from test_ops_triton import SAME_ROUNDINGS, make_experts, make_inputs, routed
from triton.experimental import gluon

import gptoss
import moe_nvidia
import ops_triton
import weights

CUDA = pytest.param(
    "cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no NVIDIA GPU")
)
devices = pytest.mark.parametrize("device", ["sm_90", CUDA])


@contextlib.contextmanager
def running_on(device: str, seed: int = 0):
    """Yields where the tensors are to be, and the emulated GPU."""
    if device == "cuda":
        yield "cuda", None
    else:
        with ptx.emulate(device, seed) as gpu:
            yield "cpu", gpu


def run(device, inputs, experts, top_k, limit=7.0, seed=0):
    """-> the layer's result, and the launches where they are emulated."""
    with running_on(device, seed) as (place, gpu):
        fields = {name: getattr(experts, name) for name in vars(experts)}
        moved = {n: x.to(place) for n, x in fields.items() if isinstance(x, torch.Tensor)}
        packed = moe_nvidia.prepare(replace(experts, **moved), "bf16")
        y = moe_nvidia.moe(*(x.to(place) for x in inputs), packed, top_k, "bf16", limit)
        assert y.dtype == torch.bfloat16 and not packed.arrived.any()
    assert gpu is None or len(gpu.launches) == 3
    return y.cpu(), gpu and {launch.name.split("_")[0]: launch for launch in gpu.launches}


def check(device, inputs, experts, top_k, limit=7.0):
    got, launches = run(device, inputs, experts, top_k, limit)
    want = gptoss.moe_reference(*inputs, experts, top_k, "bf16", limit)
    assert torch.equal(got.isnan(), want.isnan())
    finite = want.isfinite()
    assert torch.equal(got[~finite & ~got.isnan()], want[~finite & ~want.isnan()])  # infinities
    assert relative(got[finite].float(), want[finite].float()) < SAME_ROUNDINGS
    return got, launches


def choosing(T, E, H, experts_of):
    """Inputs whose token t chooses the two experts_of(t), in order."""
    return routed(T, E, H, torch.tensor([experts_of(token) for token in range(T)]), 2)


# -- weights --------------------------------------------------------------------------------------


@pytest.mark.parametrize("H, inner", [(96, 160), (64, 32), (2880, 32)])
def test_packed_like_those_of_ops_triton(H, inner):
    """Whose tests compare the order with the comments."""
    experts = make_experts(18, H, inner)
    ours, theirs = (room.prepare(experts, "bf16") for room in (moe_nvidia, ops_triton))
    for name in ("gate_up", "down"):
        a, b = vars(getattr(ours, name)), vars(getattr(theirs, name))
        assert a.keys() == b.keys()
        for key, value in a.items():
            same = torch.equal if isinstance(value, torch.Tensor) else (lambda x, y: x == y)
            assert same(value, b[key]), (name, key)
    assert ours.arrived.dtype == torch.int32 and not ours.arrived.any()


def test_prepare_refuses_what_the_kernels_do_not_multiply():
    fp4 = make_experts(2, 64, 32)
    with pytest.raises(ValueError, match="'fp8'"):
        moe_nvidia.prepare(fp4, "fp8")
    with pytest.raises(ValueError, match="torch.bfloat16, expected mxfp4"):
        moe_nvidia.prepare(make_experts(2, 64, 32, bf16=True), "bf16")
    odd = replace(fp4, down_weight=fp4.down_weight[:, :40], down_scale=fp4.down_scale[:, :40])
    with pytest.raises(ValueError, match="40 x 32: expected multiples of 32"):
        moe_nvidia.prepare(odd, "bf16")


def test_moe_refuses_what_the_kernels_do_not_multiply():
    experts = make_experts(2, 64, 32)
    packed, (x, *router) = moe_nvidia.prepare(experts, "bf16"), make_inputs(1, 2, 64)
    with pytest.raises(ValueError, match="not for 'fp8'"):
        moe_nvidia.moe(x, *router, packed, 2, "fp8")
    with pytest.raises(ValueError, match="x is torch.float32"):
        moe_nvidia.moe(x.float(), *router, packed, 2)
    with pytest.raises(ValueError, match="tokens at once"):
        moe_nvidia.moe(x.expand(moe_nvidia.MAX_TOKENS + 1, -1), *router, packed, 2)


@gluon.jit
def dequantise_kernel(words, scales, out, g: gl.constexpr):
    """One block of 16 rows x 64 inputs."""
    layout: gl.constexpr = moe_nvidia.words_layout(1, 1)
    flat: gl.constexpr = gl.SliceLayout(2, layout)
    lane = moe_nvidia.iota(1, 32, layout, 3)
    words = gl.load(words + lane * 4 + moe_nvidia.iota(2, 4, layout, 3))
    scales = gl.load(scales + moe_nvidia.iota(1, 32, flat, 2) // 4)
    left: gl.constexpr = gl.DotOperandLayout(0, moe_nvidia.product_layout(1, 1), 2)
    w = moe_nvidia.dequantise(words, scales, left, g)
    row, k = moe_nvidia.iota(1, 16, left, 3), moe_nvidia.iota(2, 64, left, 3)
    gl.store(out + row * 64 + k, w)


@pytest.mark.parametrize("wide", [False, True])
@devices
def test_dequantised_is_exact(device, wide):
    """Every code under every scale that the variant takes; 32 scales a block."""
    generator = torch.Generator().manual_seed(0)
    g = moe_nvidia.Gemm(1, 1, 1, 1, 0, 16, 64, wide)
    for first in range(0, 256 if wide else 129, 32):
        codes = torch.randint(0, 256, (1, 16, 32), dtype=torch.uint8, generator=generator)
        codes[0, :, :8] = codes[0, :, 16:24] = (
            torch.arange(16)
            .view(8, 2)
            .mul(  # all of a row
                torch.tensor([1, 16])
            )
            .sum(1)
        )
        scale = torch.arange(first, first + 32).clamp(max=255 if wide else 128)
        scale = scale.view(1, 16, 2).to(torch.uint8)
        w = moe_nvidia.pack(codes, scale, torch.zeros(1, 16), 1)
        with running_on(device) as (place, _):
            out = torch.zeros(16, 64, dtype=torch.bfloat16, device=place)
            dequantise_kernel[(1,)](w.data.to(place), w.scale.to(place), out, g, num_warps=1)
        want = gptoss.dequantise_mxfp4(codes, scale)[0]
        assert torch.equal(out.cpu().float().isnan(), want.isnan())
        assert torch.equal(out.cpu().float().nan_to_num(1.0), want.nan_to_num(1.0))
        assert w.wide == (int(scale.max()) > 128)


# -- the layer ------------------------------------------------------------------------------------


@pytest.fixture(params=["whole", "shard"])
def cuts(request, monkeypatch):
    """Experts of these tests' sizes are cut like a shard; with the same code like whole ones."""
    if request.param == "whole":
        monkeypatch.setattr(moe_nvidia, "WHOLE_ROWS", 0)


@pytest.mark.parametrize(
    "T, E, H, inner, top_k",
    [  # inner and hidden sizes of whole blocks of 64 and not
        (1, 5, 96, 160, 2),
        (8, 5, 96, 160, 3),
        (6, 6, 128, 96, 4),
        (7, 40, 64, 64, 4),
        (3, 3, 32, 32, 1),
    ],
)
@devices
def test_moe(cuts, device, T, E, H, inner, top_k):
    check(device, make_inputs(T, E, H), make_experts(E, H, inner), top_k)


@pytest.mark.parametrize("T", [1, 2, 5, 8])
@pytest.mark.parametrize("E", [32, 128])
@pytest.mark.parametrize("device", [CUDA])
def test_moe_at_full_size(device, T, E):
    check(device, make_inputs(T, E, 2880), make_experts(E, 2880, 2880), 4)


@pytest.mark.parametrize("T", [1, 8])
@pytest.mark.parametrize("inner", [1440, 704, 736, 352, 384])
@pytest.mark.parametrize("device", [CUDA])
def test_moe_of_a_ranks_shard(device, T, inner):
    """What one of two, four or eight ranks has of a layer."""
    check(device, make_inputs(T, 32, 2880), make_experts(32, 2880, inner), 4)


@pytest.mark.slow
def test_moe_at_full_depth():
    check("sm_90", make_inputs(1, 4, 2880), make_experts(4, 2880, 64), 4)
    check("sm_90", make_inputs(1, 4, 64), make_experts(4, 64, 2880), 4)


@devices
def test_one_expert_takes_all_and_others_none(device):
    inputs = choosing(8, 6, 96, lambda token: [4, 1])
    check(device, inputs, make_experts(6, 96, 64), 2)


@devices
def test_ties_go_to_the_smaller_expert(device):
    x, router, bias = make_inputs(3, 40, 64)
    router[20:], bias[20:] = router[:20], bias[:20]
    check(device, (x, router, bias), make_experts(40, 64, 32), 3)


@devices
def test_nan_shows_and_stays_where_it_is(device):
    inputs, experts = make_inputs(4, 5, 96), make_experts(5, 96, 64)
    inputs[0][1, 70] = math.nan
    got, _ = check(device, inputs, experts, 2)
    assert got.isnan().all(1).tolist() == [False, True, False, False]


@devices
def test_scales_of_all_sizes(device):
    """Up to 2^127 and NaN: some results are infinite, some NaN, and others not."""
    inputs = choosing(4, 4, 96, lambda token: [token, (token + 1) % 4])
    experts = make_experts(4, 96, 64)
    experts.gate_up_scale[0, ::7, 0] = 0
    experts.gate_up_scale[1, 6::16, 1] = 140
    experts.down_scale[2, 5] = 255
    experts.down_scale[1, 9] = 200
    experts.down_scale[3, 3, 0] = 254
    got, _ = check(device, inputs, experts, 2)
    assert got[1, 5].isnan() and got[2, 5].isnan() and got[0, 5].isfinite()
    assert got[2:, 3].isinf().any() or got[2:, 3].isnan().any()


@devices
def test_swiglu_limit(device):
    inputs = make_inputs(2, 4, 96)
    experts = make_experts(4, 96, 64)
    near, _ = check(device, inputs, experts, 2, limit=0.25)
    far, _ = check(device, inputs, experts, 2, limit=100.0)
    assert relative(near.float(), far.float()) > 0.1


@devices
def test_same_bits_in_every_run(device):
    """The programs of a launch are executed in another order under every seed; each reads what
    another GPU kernel might have left in memory."""
    inputs, experts = make_inputs(8, 6, 96), make_experts(6, 96, 64)
    first, _ = run(device, inputs, experts, 3)
    for seed in range(1, 4 if device == "cuda" else 3):
        assert torch.equal(run(device, inputs, experts, 3, seed=seed)[0], first)


@pytest.mark.parametrize("T", [1, 2])
@devices
def test_a_token_does_not_depend_on_its_batch(cuts, device, T):
    """As many warps split K whatever the tokens are: the order of every sum is the same."""
    few, many = (moe_nvidia.cuts_for(n, 128, 96) for n in (T, 8))
    assert [cut.WK for cut in few] == [cut.WK for cut in many]
    (x, *router), experts = make_inputs(8, 6, 96), make_experts(6, 96, 64)
    few, _ = run(device, (x[:T], *router), experts, 3)
    many, _ = run(device, (x, *router), experts, 3)
    assert torch.equal(few, many[:T])


def test_the_active_experts_are_read_once_and_no_other(cuts):
    inputs = choosing(8, 6, 96, lambda token: [4, token % 2])
    _, launches = run("sm_90", inputs, make_experts(6, 96, 64), 2)
    for name, N, K in (("dispatch", 128, 96), ("combine", 96, 64)):
        blocks = 3 * N // 16 * -(-K // 64)  # of three experts
        assert launches[name].loaded["data"] == blocks * 512
        assert launches[name].loaded["scale"] == blocks * 32 * 4  # the lanes of a row ask together


def test_what_is_read_before_the_kernel_before_is_done():
    """Weights, and in combine what `route` wrote, for which dispatch waited before it let combine
    start. ptx.py raises where anything is written."""
    _, launches = run("sm_90", make_inputs(3, 5, 96), make_experts(5, 96, 64), 2)
    lists = {"experts", "sizes", "rows", "count", "gates"}
    assert set(launches["route"].early) == {"router_weight"}
    assert set(launches["dispatch"].early) == set()
    assert set(launches["combine"].early) == {"data", "scale", "bias", *lists}
    # L1 is not emptied between `route` and a combine that starts early.
    cached = launches["combine"].cached
    assert {name for name in cached if cached[name]} == {"data", "scale", "bias"}
    # Programs are executed one after the other: in what order dispatch waits and lets combine start
    # is in its text.
    with compile_ops.compiling_for("sm_90") as found:
        compile_ops.launch_moe(moe_nvidia, weights.published("20b"), 1)
    order = re.findall(r"griddepcontrol\.(\w+)", found[1].text)
    assert found[1].name == "dispatch_kernel" and order == ["wait", "launch_dependents"]


# -- dense layers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("T, N, K, biased", [(2, 40, 64, True), (8, 16, 576, False)])
@devices
def test_linear(device, T, N, K, biased):
    x, weight, bias = make_inputs(T, N, K)
    bias = bias if biased else None
    assert moe_nvidia.multiplies(x, weight)
    with running_on(device) as (place, gpu):
        moved = (t if t is None else t.to(place) for t in (x, weight, bias))
        got = moe_nvidia.linear(*moved).cpu()
    want = torch.nn.functional.linear(
        x.float(), weight.float(), None if bias is None else bias.float()
    )
    # the result's own rounding, 2^-8 / sqrt(12) of a value in the mean square, and a little more
    assert got.dtype == torch.bfloat16 and relative(got.float(), want) < 2.0**-8
    if gpu:
        assert set(gpu.launches[0].early) == {"weight"}


def test_linear_leaves_the_rest_to_others():
    x, weight, _ = make_inputs(2, 16, 64)
    assert not moe_nvidia.multiplies(x[:1], weight) and not moe_nvidia.multiplies(x.float(), weight)
    assert not moe_nvidia.multiplies(x[:, :32], weight[:, :32])
    assert not moe_nvidia.multiplies(x[:1].expand(9, -1), weight)


# -- the compiler ---------------------------------------------------------------------------------


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "gpu, model, T",
    [
        ("sm_90", "120b", 1),
        ("sm_90", "120b", 8),
        slow("sm_80", "120b", 1),
        slow("sm_80", "120b", 8),
        slow("sm_120", "20b", 8),
    ],
)
def test_compiled_for_gpus_that_are_not_here(gpu, model, T):
    """Nothing spills. Weights are loaded 16 bytes a lane, and nothing lies between memory and the
    matrix instruction's operands: in the loop there is no shared memory, no barrier and no shuffle.
    A weight costs fewer than 3.5 instructions, of which 132 multiprocessors have 4.3 at 3 TB/s and
    1.4 GHz."""
    c = weights.published(model)
    with compile_ops.compiling_for(gpu) as found:
        compile_ops.launch_moe(moe_nvidia, c, T)
    assert [k.name for k in found] == ["route_kernel", "dispatch_kernel", "combine_kernel"]
    for kernel, cut in zip(
        found[1:], moe_nvidia.cuts_for(T, 2 * c.intermediate_size, c.hidden_size), strict=True
    ):
        assert kernel.spills == 0
        assert not {"LDS", "STS", "LDSM", "BAR", "SHFL", "LDL", "STL"} & set(kernel.loop)
        products = cut.AHEAD * cut.NB * 4
        assert kernel.loop["HMMA"] == products
        # 16-byte loads of weights and inputs, and one of 4 bytes for the scales of each block
        assert kernel.loop["LDG"] == cut.AHEAD * (2 * cut.NB + 2)
        assert kernel.loop.total() < 3.5 * cut.AHEAD * cut.NB * 32
        loop = kernel.text[kernel.text.index("mma.sync") : kernel.text.rindex("mma.sync")]
        assert "ld.global.v4.b32" in loop and "ld.global.v2" not in loop


def test_loads_stay_ahead_of_the_products():
    """ptxas moves the loads of all steps down to one place, the loop's end, unless it is kept from
    it: then their latency is a step's, not that of all steps ahead. Kept from it, it still moves
    some; a loop in which it moves none has a branch a step and takes 3% more of a model's step."""
    with compile_ops.compiling_for("sm_90") as found:
        compile_ops.launch_moe(moe_nvidia, weights.published("120b"), 8)
    for kernel in found[1:]:
        order = "".join(i[0] for i in kernel.order if i in ("LDG", "HMMA"))  # L and H
        assert max(map(len, order.split("H"))) <= order.count("L") * 2 / 3
