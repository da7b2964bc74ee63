"""moe_gluon.py under gfx950.emulate(): compiled by this environment's Triton, executed from the assembly.

The oracle is gptoss.moe_reference with the same activations. Nothing here ran on a gfx950."""
import math
import re
import types

import pytest
import torch
import triton
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends.compiler import GPUTarget

import gfx950
import gptoss
import moe_gluon
from moe_gluon import DECODE_TOKENS, FORMATS, PackedExperts, PackedWeight, moe, prepare
from weights import Experts

# The kernels and the oracle round at the same places, to the same values; what is left is the order of float32 sums,
# 2^-24 sqrt(K) relative, and where it tips a bf16 or an activation format's rounding, which few of many values see.
# (The contract allows 4e-3.)
SAME_ROUNDINGS = 1e-3
ORACLE = ("bf16", "fp8", "mxfp8", "mxfp4")  # formats the oracle knows; e5m2 has its own below


def make_experts(E, H, inner, bf16=False, seed=0):
    """Weights that look real: normal with a per-group spread of scales, biases not small."""
    g = torch.Generator().manual_seed(seed)

    def bias(n):
        return torch.randn(E, n, generator=g).mul(0.3).bfloat16()

    def weight(n, k):  # [E, n, k], and its scales
        if bf16:
            return (torch.randn(E, n, k, generator=g) * k**-0.5).bfloat16(), None
        codes = torch.randint(0, 256, (E, n, k // 2), dtype=torch.uint8, generator=g)
        middle = 127 - round(math.log2(3 * k**0.5))  # codes are 3 rms: products of K stay of the order of x
        return codes, torch.randint(middle - 2, middle + 2, (E, n, k // 32), dtype=torch.uint8, generator=g)

    gate_up, gate_up_scale = weight(2 * inner, H)
    down, down_scale = weight(H, inner)
    return Experts(gate_up, gate_up_scale, bias(2 * inner), down, down_scale, bias(H), 0.02, 0.01)


def make_inputs(T, E, H, seed=0):
    g = torch.Generator().manual_seed(seed + 100)
    x = torch.randn(T, H, generator=g) * torch.randn(T, 1, generator=g).exp()
    return (x.bfloat16(), (torch.randn(E, H, generator=g) * H**-0.5).bfloat16(), torch.randn(E, generator=g).bfloat16())


def reference(x, router_weight, router_bias, experts, top_k, activations):
    return gptoss.moe_reference(x, router_weight, router_bias, experts, top_k, activations).float()


def check(got, want):
    error = ((got.float() - want).norm() / want.norm()).item()
    assert error <= SAME_ROUNDINGS, f"relative L2 error {error:.2e}"


def run(T, E, H, inner, top_k, activations, seed=0, **emulate):
    experts, inputs = make_experts(E, H, inner, activations == "bf16", seed), make_inputs(T, E, H, seed)
    packed = prepare(experts, activations)
    with gfx950.emulate(**emulate) as gpu:
        got = moe(*inputs, packed, top_k, activations)
    check(got, reference(*inputs, experts, top_k, activations))
    return got, gpu.launches


# -- packing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activations", ["bf16", "mxfp8"])
@pytest.mark.parametrize("H, inner", [(192, 160), (64, 32), (2880, 96)])
def test_unpack_inverts_pack(activations, H, inner):
    experts = make_experts(3, H, inner, activations == "bf16")
    packed = prepare(experts, activations)
    for got, weight, scale in ((packed.gate_up, experts.gate_up_weight, experts.gate_up_scale),
                               (packed.down, experts.down_weight, experts.down_scale)):
        unpacked, unpacked_scale = got.unpack()
        assert torch.equal(unpacked, weight)
        assert scale is None or torch.equal(unpacked_scale, scale)


def test_packed_bytes_are_where_the_comment_draws_them():
    experts = make_experts(2, 192, 160)
    packed = prepare(experts, "mxfp8").gate_up
    data, scale = packed.data.view(2, -1), packed.scale.view(2, -1)
    for e, n, k in torch.cartesian_prod(torch.arange(2), torch.arange(320), torch.arange(0, 192, 2)).tolist()[::37]:
        at = n // 16 * 16 * 192 // 2 + k // 32 * 256 + n % 16 * 16 + k % 32 // 2
        assert data[e, at] == experts.gate_up_weight[e, n, k // 2]
        at = n // 64 * 64 * 6 + k // 32 * 64 + n % 16 * 4 + n % 64 // 16
        assert scale[e, at] == experts.gate_up_scale[e, n, k // 32]
    assert packed.bias.dtype == torch.float32


def test_prepare_refuses_what_does_not_fit():
    fp4, bf16 = make_experts(2, 64, 32), make_experts(2, 64, 32, bf16=True)
    with pytest.raises(ValueError, match="bf16.*need.*bfloat16.*use fp8 or"):
        prepare(fp4, "bf16")
    with pytest.raises(ValueError, match="use bf16"):
        prepare(bf16, "mxfp8")
    with pytest.raises(ValueError, match="expected one of bf16, fp8"):
        prepare(fp4, "int8")
    fp4.down_input_scale = None
    with pytest.raises(ValueError, match="static input scales"):
        prepare(fp4, "fp8")
    odd = make_experts(2, 64, 48, bf16=True)
    with pytest.raises(ValueError, match="multiples of 32"):
        prepare(odd, "bf16")


def test_moe_refuses_what_the_kernels_do_not_take():
    packed = prepare(make_experts(4, 64, 32), "mxfp8")
    x, router_weight, router_bias = make_inputs(3, 4, 64)
    with pytest.raises(ValueError, match="prepared for 'mxfp8'"):
        moe(x, router_weight, router_bias, packed, 2, "mxfp4")
    with pytest.raises(ValueError, match="float32"):
        moe(x.float(), router_weight, router_bias, packed, 2)
    with pytest.raises(ValueError, match="top_k=5"):
        moe(x, router_weight, router_bias, packed, 5)
    with pytest.raises(ValueError, match=r"\[3, 32\]"):
        moe(x[:, :32], router_weight, router_bias, packed, 2)
    assert moe(x[:0], router_weight, router_bias, packed, 2).shape == (0, 64)
    packed.down.K = 16384
    with pytest.raises(ValueError, match="inner size 16384"):
        moe_gluon.gemm("combine", packed, 1, 2)


# -- routing ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("T, E, top_k", [(1, 8, 4), (16, 8, 8), (5, 32, 4), (16, 128, 4), (13, 128, 8), (3, 128, 1),
                                         (7, 8, 3), (2, 5, 2), (17, 8, 4), (40, 128, 8), (33, 5, 3), (130, 32, 1)])
def test_routing(T, E, top_k):
    """Selection, gates, places and tiles, with ties in every row: experts come in pairs of equal router rows."""
    H = 96
    x, router_weight, router_bias = make_inputs(T, E, H)
    router_weight[1::2] = router_weight[::2][:E // 2]
    router_bias[1::2] = router_bias[::2][:E // 2]
    packed = prepare(make_experts(E, H, 32), "mxfp8")
    with gfx950.emulate():
        routing = moe_gluon.gating_gemm(x, router_weight, router_bias, packed, top_k)
    logits = x.float() @ router_weight.float().T + router_bias.float()
    want, chosen = logits.sort(dim=-1, descending=True, stable=True)
    slots = routing.chosen.shape[1]
    assert torch.equal(routing.chosen[:, :top_k].long(), chosen[:, :top_k])
    torch.testing.assert_close(routing.gates[:, :top_k], want[:, :top_k].softmax(-1))
    expert_of_row, rows = chosen[:, :top_k].flatten().sort(stable=True)
    rows = rows // top_k * slots + rows % top_k
    assert torch.equal(routing.rows[:len(rows)].long(), rows)
    tiles, place = [], 0
    for e, count in zip(*expert_of_row.unique(return_counts=True), strict=True):
        tiles += [(int(e), place + i, min(routing.BM, int(count) - i)) for i in range(0, int(count), routing.BM)]
        place += int(count)
    assert routing.tiles[:int(routing.num_tiles), :3].tolist() == [list(t) for t in tiles]
    assert int(packed.arrived) == 0


def test_a_token_of_nan_harms_no_other():
    experts, (x, router_weight, router_bias) = make_experts(8, 64, 32), make_inputs(4, 8, 64)
    packed = prepare(experts, "mxfp8")
    with gfx950.emulate():
        want = moe(x, router_weight, router_bias, packed, 3)
        x[2] = float("nan")
        got = moe(x, router_weight, router_bias, packed, 3)
    assert torch.equal(got[[0, 1, 3]], want[[0, 1, 3]])  # token 2: what saturates, no fault


def extremes(H):
    """Rows that hit every branch of the formats: zeros, denormals, infinite scale ratios, ties, the largest bf16."""
    x = torch.randn(16, H, generator=torch.Generator().manual_seed(7))
    x[1] = 0
    x[2] *= 1e-39
    x[3] *= 1e37
    ties = torch.tensor([0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5, 6])
    x[4] = torch.cat([ties, -ties]).repeat(H // 16)
    x[5] = torch.arange(H) % 32 + 0.5
    x[6, ::32] = 3e38
    x[7] = -(2.0 ** (torch.arange(H) % 32 - 20))
    x[8] = 240 + torch.arange(H) % 32 * 8
    return x.bfloat16()


@pytest.mark.parametrize("activations", ["fp8", "mxfp8", "mxfp4"])
def test_quantised_activations_are_the_oracles_bits(activations):
    H = 96
    experts = make_experts(4, H, 32)
    x, (_, router_weight, router_bias) = extremes(H), make_inputs(16, 4, H)
    with gfx950.emulate():
        routing = moe_gluon.gating_gemm(x, router_weight, router_bias, prepare(experts, activations), 2)
    if activations == "mxfp4":
        got = gptoss.dequantise_mxfp4(routing.x, routing.x_scale)
    else:
        scale = experts.gate_up_input_scale if activations == "fp8" else \
            gptoss.E8M0[routing.x_scale.long()].repeat_interleave(32, 1)
        got = routing.x.view(torch.float8_e4m3fn).float() * scale
    assert torch.equal(got, gptoss.as_seen(x, activations, experts.gate_up_input_scale))


def e5m2_of(x, activations, static):
    """What gptoss.as_seen would be for the e5m2 formats: (bytes, scale bytes)."""
    if activations == "fp8_e5m2":
        return (x / static).clamp(-57344, 57344).to(torch.float8_e5m2)
    groups = x.unflatten(-1, (-1, 32))
    exponent = ((groups.abs().amax(-1, keepdim=True).view(torch.int32) >> 23) - 127 - 15).clamp(-127, 127)
    return torch.ldexp(groups, -exponent).clamp(-57344, 57344).to(torch.float8_e5m2).flatten(-2)


@pytest.mark.parametrize("activations", ["fp8_e5m2", "mxfp8_e5m2"])
def test_e5m2(activations, monkeypatch):
    """The same layer with e5m2 where e4m3 is: activations bit for bit, and the whole against the oracle."""
    H, experts = 96, make_experts(4, 96, 32)
    x, (_, router_weight, router_bias) = extremes(H), make_inputs(16, 4, H)
    packed = prepare(experts, activations)
    with gfx950.emulate():
        routing = moe_gluon.gating_gemm(x, router_weight, router_bias, packed, 2)
    want = e5m2_of(x.float(), activations, experts.gate_up_input_scale)
    assert torch.equal(routing.x.view(torch.float8_e5m2).float(), want.float())

    def as_seen(x, name, static):
        q = e5m2_of(x.float(), activations, static).float()
        if activations == "fp8_e5m2":
            return q * static
        bits = x.float().unflatten(-1, (-1, 32)).abs().amax(-1, keepdim=True).view(torch.int32)
        return torch.ldexp(q.unflatten(-1, (-1, 32)), ((bits >> 23) - 142).clamp(-127, 127)).flatten(-2)
    monkeypatch.setattr(gptoss, "as_seen", as_seen)
    inputs = make_inputs(5, 4, H)
    with gfx950.emulate():
        got = moe(*inputs, packed, 2)
    check(got, reference(*inputs, experts, 2, "mxfp8"))


# -- the layer ----------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("activations", ORACLE)
@pytest.mark.parametrize("T, E, H, inner, top_k", [
    (1, 8, 192, 160, 4),  # neither is a multiple of 64, of 128, of a step of all waves
    (3, 8, 160, 192, 4), (16, 8, 192, 160, 4), (2, 4, 32, 32, 2),  # fewer K than one wave takes
    (5, 128, 96, 64, 8), (4, 32, 1056, 544, 1), (16, 5, 64, 96, 3),
    (17, 8, 192, 160, 4), (70, 8, 160, 192, 4),  # above the decode regime
])
def test_tails(T, E, H, inner, top_k, activations):
    run(T, E, H, inner, top_k, activations)


@pytest.mark.parametrize("activations", ORACLE)
def test_tall_tiles(activations):
    """150 rows an expert: 64-row tiles, several of an expert, the last ones partly filled."""
    run(300, 8, 192, 160, 4, activations)


@pytest.mark.parametrize("activations", ORACLE)
@pytest.mark.parametrize("T", [1, 2, 3, 8, 16])
def test_full_size(T, activations):
    """H = I = 2880, 22.5 steps of K."""
    run(T, 8, 2880, 2880, 4, activations)


@pytest.mark.parametrize("T", [16, 40])
def test_all_rows_on_one_expert(T):
    experts, (x, router_weight, router_bias) = make_experts(32, 192, 160), make_inputs(T, 32, 192)
    router_bias[13] = 100
    packed = prepare(experts, "mxfp8")
    with gfx950.emulate():
        got = moe(x, router_weight, router_bias, packed, 1)
    check(got, reference(x, router_weight, router_bias, experts, 1, "mxfp8"))


@pytest.mark.parametrize("activations, T", [("mxfp8", 6), ("bf16", 6), ("mxfp4", 16), ("fp8", 20)])
def test_same_bits_under_every_timing_and_schedule(activations, T):
    want, _ = run(T, 8, 192, 160, 4, activations)
    for timing, schedule, order in (("eager", "lockstep", 0), ("lazy", "skew", 0), ("eager", "skew", 0),
                                    ("random", "lockstep", 1), ("lazy", "random", 1), ("random", "random", 2)):
        experts, inputs = make_experts(8, 192, 160, activations == "bf16"), make_inputs(T, 8, 192)
        with gfx950.emulate(timing=timing, schedule=schedule, seed=order):
            got = moe(*inputs, prepare(experts, activations), 4)
        assert torch.equal(got, want), f"{timing}, {schedule}, {order}"


@pytest.mark.parametrize("timing, schedule", [("eager", "skew"), ("random", "lockstep")])
def test_same_bits_at_full_size(timing, schedule):
    want, _ = run(2, 8, 2880, 2880, 4, "mxfp8")
    got, _ = run(2, 8, 2880, 2880, 4, "mxfp8", timing=timing, schedule=schedule)
    assert torch.equal(got, want)


@pytest.mark.parametrize("activations", ["mxfp8", "bf16"])
@pytest.mark.parametrize("sizes", [(1, 2, 7, 16), (17, 40, 300)])  # decode; above, with both heights of tile
def test_a_token_does_not_see_its_batch(sizes, activations):
    experts = make_experts(8, 192, 160, activations == "bf16")
    packed, (x, router_weight, router_bias) = prepare(experts, activations), make_inputs(max(sizes), 8, 192)
    with gfx950.emulate():
        results = [moe(x[-T:], router_weight, router_bias, packed, 4) for T in sizes]
    for T, y in zip(sizes, results, strict=True):
        assert torch.equal(y[-sizes[0]:], results[0]), f"{T} tokens against {sizes[0]}"


class NoHostReads(TorchDispatchMode):
    """Raises for every operator that needs a tensor's values on the host."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if any(s in str(func) for s in ("_local_scalar_dense", "nonzero", "equal", "_to_copy", "unique", "item")):
            raise AssertionError(f"{func} reads device data")
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("T", [4, 40])
def test_nothing_is_read_back_to_the_host(T):
    packed, inputs = prepare(make_experts(8, 192, 160), "mxfp8"), make_inputs(T, 8, 192)
    with gfx950.compile_only(), NoHostReads():
        moe(*inputs, packed, 4)
        with pytest.raises(AssertionError, match="reads device data"):
            inputs[0].sum().item()


# -- public mistakes ------------------------------------------------------------------------------------------------

def guarded(tensor):
    """The same values at the start of a larger storage whose rest is NaN (or 0xFF): a read past the end is seen."""
    beyond = float("nan") if tensor.dtype.is_floating_point else 255
    storage = torch.full((tensor.numel() + 4096,), beyond, dtype=tensor.dtype)
    storage[:tensor.numel()] = tensor.flatten()
    return storage[:tensor.numel()].view(tensor.shape)


@pytest.mark.parametrize("T", [3, 40])
def test_nothing_past_the_logical_sizes_is_used(T):
    """Bias read out of bounds where N is no multiple of the tile: here the last expert's bias is followed by NaN."""
    experts, inputs = make_experts(4, 160, 96), make_inputs(T, 4, 160)
    packed = prepare(experts, "mxfp8")
    for w in (packed.gate_up, packed.down):
        w.data, w.scale, w.bias = guarded(w.data), guarded(w.scale), guarded(w.bias)
    with gfx950.emulate():
        got = moe(*inputs, packed, 4)
    check(got, reference(*inputs, experts, 4, "mxfp8"))


def test_nothing_is_stored_past_n():
    """A tile past N = 160 writing into the next row: rows are stored in any order, so some row would be wrong, and the
    last would leave its tensor, which the emulator faults."""
    for seed in range(3):
        run(40, 4, 160, 96, 4, "mxfp8", seed=seed)


@pytest.mark.parametrize("T", [2, 20])
def test_combine_sums_over_the_slots(T):
    """Experts whose weights are zero give their bias e: a token's output is the gates' weighted sum of its ids."""
    experts, inputs = make_experts(8, 64, 32), make_inputs(T, 8, 64)
    experts.down_weight.zero_()
    experts.down_bias = torch.arange(8.0)[:, None].expand(8, 64).bfloat16().contiguous()
    with gfx950.emulate():
        got = moe(*inputs, prepare(experts, "mxfp8"), 4)
    x, router_weight, router_bias = (t.float() for t in inputs)
    gate, chosen = (x @ router_weight.T + router_bias).topk(4)
    want = (gate.softmax(-1) * chosen).sum(1)
    torch.testing.assert_close(got.float(), want[:, None].expand(T, 64), rtol=2**-8, atol=0)  # bf16 output


@pytest.mark.parametrize("target, supported", [
    (("hip", "gfx950", 64), True), (("hip", "gfx942", 64), False), (("hip", "gfx90a", 64), False),
    (("hip", "gfx1250", 32), False), (("cuda", 90, 32), False)])
def test_only_gfx950_is_supported(target, supported, monkeypatch):
    driver = types.SimpleNamespace(get_current_target=lambda: GPUTarget(*target))
    monkeypatch.setattr(triton.runtime.driver, "_active", driver)
    assert moe_gluon.is_supported() is supported


def test_no_driver_is_not_supported(monkeypatch):
    def fail():
        raise RuntimeError("0 active drivers ([]). There should only be one.")
    monkeypatch.setattr(triton.runtime.driver, "_active", types.SimpleNamespace(get_current_target=fail))
    assert not moe_gluon.is_supported()


@pytest.mark.parametrize("activations", ["fp8", "mxfp8"])
def test_fp8_casts_saturate(activations):
    """Values far beyond 448 times the static scale are the largest e4m3, not NaN."""
    experts, (x, router_weight, router_bias) = make_experts(8, 64, 32), make_inputs(4, 8, 64)
    experts.gate_up_input_scale = experts.down_input_scale = 1e-4
    with gfx950.emulate():
        got = moe(x, router_weight, router_bias, prepare(experts, activations), 4)
    assert got.isfinite().all()
    check(got, reference(x, router_weight, router_bias, experts, 4, activations))


# -- profiles and waits -----------------------------------------------------------------------------------------------

def placeholder(E, activations, H=2880, inner=2880) -> PackedExperts:
    """Packed experts of 120b or 20b sizes, untouched memory."""
    f = FORMATS[activations]

    def weight(N, K):
        if f.weights == torch.bfloat16:
            data, scale = torch.empty(E, N // 16, K // 32, 4, 16, 8, dtype=f.weights), None
        else:
            data = torch.empty(E, N // 16, K // 32, 16, 16, dtype=f.weights)
            scale = torch.empty(E, -(-N // 64), K // 32, 16, 4, dtype=f.weights)
        return PackedWeight(data, scale, torch.empty(E, N), 1.0, N, K)

    return PackedExperts(weight(2 * inner, H), weight(H, inner), activations, torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("E", [32, 128])
@pytest.mark.parametrize("activations", FORMATS)
def test_profiles(activations, E):
    """No spills, no scratch, LDS within 160 KB, for every batch size of the contract at 20b and 120b sizes; and two
    workgroups of the decode GEMMs fit a CU."""
    packed, router_weight = placeholder(E, activations), torch.empty(E, 2880, dtype=torch.bfloat16)
    for T in (1, 2, 4, 8, 16, 32, 64, 512, 1024, 4096, 8192):
        x = torch.empty(T, 2880, dtype=torch.bfloat16)
        with gfx950.compile_only() as gpu:
            moe(x, router_weight, router_weight[:, 0].contiguous(), packed, 4)
        assert len(gpu.launches) == (3 if T <= DECODE_TOKENS else 6)
        for launch in gpu.launches:
            p = launch.profile
            assert p["sgpr_spills"] == p["vgpr_spills"] == p["scratch"] == 0, f"{launch.name} at {T}: {p}"
            assert p["lds"] <= 160 * 1024 and p["occupancy"] >= (2 if T <= DECODE_TOKENS else 1), f"{launch.name}: {p}"


def waits(text):
    """(loop waits, products after the last full drain, products) of a kernel's assembly. Loop waits are the vmcnt of
    the waits inside loops that multiply; a product is a matrix instruction."""
    lines = [line.strip() for line in text.split("\n")]
    labels = {m[1]: i for i, line in enumerate(lines) if (m := re.match(r"(\.LBB\w+):", line))}
    loop_waits = []
    for i, line in enumerate(lines):
        if (m := re.match(r"s_c?branch\S*\s+(\.LBB\w+)", line)) and labels.get(m[1], i) < i:
            body = lines[labels[m[1]]:i]
            if any(b.startswith("v_mfma") for b in body):
                loop_waits += [int(v) for b in body for v in re.findall(r"s_waitcnt.*vmcnt\((\d+)\)", b)]
    products = [i for i, line in enumerate(lines) if line.startswith("v_mfma")]
    drains = [i for i, line in enumerate(lines) if re.match(r"s_waitcnt.*vmcnt\(0\)", line) and i < products[-1]]
    after_drain = sum(p > max((d for d in drains if d > products[0]), default=len(lines)) for p in products)
    return loop_waits, after_drain, len(products)


def compiled(name, T, activations, monkeypatch):
    """One kernel of a layer of 120b size, as `kernel[grid](...)` returned it."""
    kernel, results = getattr(moe_gluon, name), []
    original = kernel.run
    monkeypatch.setattr(kernel, "run", lambda *args, **kwargs: results.append(original(*args, **kwargs)))
    packed, router_weight = placeholder(128, activations), torch.empty(128, 2880, dtype=torch.bfloat16)
    with gfx950.compile_only():
        moe(torch.empty(T, 2880, dtype=torch.bfloat16), router_weight, router_weight[:, 0].contiguous(), packed, 4)
    return results[0]


@pytest.mark.parametrize("activations", ["bf16", "fp8", "mxfp8", "mxfp4"])
def test_the_queue_of_loads_never_drains(activations, monkeypatch):
    """combine: inside its loop, at least two thirds of the loads of its experts stay in flight over every wait.
    dispatch has no loop: the queue is empty only for the last step, all loads having been issued before."""
    combine = compiled("combine_kernel", 1, activations, monkeypatch)
    loop_waits, _, _ = waits(combine.asm["amdgcn"])
    assert loop_waits and min(loop_waits) >= 24, loop_waits
    moe_gluon.assert_no_spills(combine)
    dispatch = compiled("dispatch_kernel", 1, activations, monkeypatch)
    loop_waits, after_drain, products = waits(dispatch.asm["amdgcn"])
    assert not loop_waits and 0 < after_drain <= 8 and products >= 24  # 4 tiles of a step, or 2 x 4 of bf16
    # of mx activations one scale byte a step; those of weights are a dword for four tiles
    assert len(re.findall("buffer_load_ubyte", dispatch.asm["amdgcn"])) == (6 if activations[:2] == "mx" else 0)
    assert moe_gluon.assert_no_spills(dispatch).occupancy >= 2


# -- counters ---------------------------------------------------------------------------------------------------------

def count(T, activations, E=128):
    """One layer of 120b sizes with E experts, random weights (8 distinct, repeated), emulated -> figures."""
    f, packed = FORMATS[activations], placeholder(E, activations)
    for w in (packed.gate_up, packed.down):
        distinct = w.data[:8].view(torch.uint8)
        distinct.copy_(torch.randint(0, 256 if w.scale is not None else 60, distinct.shape, dtype=torch.uint8))
        for i in range(8, E, 8):
            w.data[i:i + 8].view(torch.uint8).copy_(distinct)
        if w.scale is not None:
            w.scale.random_(118, 122)
        w.bias.normal_()
    x, router_weight, router_bias = make_inputs(T, E, 2880)
    router_bias.zero_()  # tokens choose nearly independently, as in FACTS 5
    with gfx950.emulate() as gpu:
        routing = moe_gluon.gating_gemm(x, router_weight, router_bias, packed, 4)
        moe_gluon.combine(*moe_gluon.dispatch_swiglu(routing, packed), routing, packed)
    active = int(routing.num_tiles)
    minimum = active * (packed.gate_up.N + packed.down.N) * 2880 * (2 if f.weights == torch.bfloat16 else 17 / 32)
    requested = {"weights": 0, "others": 0}
    flight = {}
    for launch in gpu.launches:
        for name, t in launch.counters.tensors.items():
            requested["weights" if name in ("w", "w_scale") else "others"] += t["read"]
        workgroups = active * launch.grid[0] if launch.name == "dispatch_kernel" else launch.grid[0]
        waves = launch.waves // (launch.grid[0] * launch.grid[1])  # of a workgroup
        # resident on a CU: what its 4 SIMDs hold, in whole workgroups, or what there is for 256 CUs
        resident = min(launch.profile["occupancy"] * 4 // waves * waves, workgroups * waves / 256)
        flight[launch.name] = workgroups, resident * launch.counters.peak_bytes_in_flight / 1024
    return active, len(gpu.launches), requested["weights"] / minimum, requested["others"] / minimum, flight


@pytest.mark.parametrize("activations", ["fp8", "mxfp8"])
@pytest.mark.parametrize("T", [1, 4, pytest.param(8, marks=pytest.mark.slow), pytest.param(16, marks=pytest.mark.slow)])
def test_decode_counters(T, activations):
    """facts.md FACTS 5's columns, at least as good as asked."""
    active, launches, weight_bytes, other_bytes, flight = count(T, activations)
    print(f"\n{activations}, {T} tokens, {active} experts: {launches} launches, weights x {weight_bytes:.4f}, all else "
          f"x {other_bytes:.3f} of the minimum; " + "; ".join(f"{k} {w} workgroups, {f:.0f} KB in flight a CU"
                                                             for k, (w, f) in flight.items()))
    assert launches == 3 and weight_bytes <= 1.02 and other_bytes <= (0.5 if T == 1 else 0.3)
    for name in ("dispatch_kernel", "combine_kernel"):
        assert flight[name][0] >= 256 and flight[name][1] >= 32
