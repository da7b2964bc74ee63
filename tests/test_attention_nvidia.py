"""attention_nvidia.py against the equations of gptoss.py: its PTX, executed by ptx.py, and where
there is an NVIDIA GPU the kernel on that."""

from dataclasses import replace

import compile_ops
import ptx
import pytest
import torch
from test_moe_nvidia import devices, running_on, slow
from test_ops_triton import Case

import attention_nvidia
import gptoss
import ops_triton
import weights

KINDS = pytest.mark.parametrize("kind", weights.LAYER_TYPES)


def make(cached, page=16, N=16, G=2, window=128):
    return Case(cached, [1] * len(cached), page, torch.bfloat16, N, G, 64, window)


def run(case, device, kind, seed=0, pool=None):
    """-> the result, the pool after it and, where it is emulated, the launch."""
    with running_on(device, seed) as (place, gpu):
        moved = (case.qkv, case.sinks, case.pool.clone() if pool is None else pool)
        qkv, sinks, pool = (x.to(place) for x in moved)
        step = replace(
            case.step,
            positions=case.step.positions.to(place),
            tables={k: table.to(place) for k, table in case.step.tables.items()},
        )
        plan = ops_triton.plan(step, case.config)
        assert attention_nvidia.attends(qkv, sinks, pool, plan)
        got = attention_nvidia.attention(qkv, sinks, pool, kind, plan)
        assert not plan.arrived.any()
    return got.cpu(), pool.cpu(), gpu and gpu.launches[0]


def check(case, device, kind):
    got, pool, launch = run(case, device, kind)
    case.compare(kind, got, pool)
    return got, launch


@pytest.mark.parametrize(
    "cached, page",
    [([5, 290, 0], 16), ([131], 1), ([1, 63, 64, 200], 64), ([700], 16), ([6, 255, 256, 257], 5)],
)
@KINDS
@devices
def test_decode(device, kind, cached, page):
    check(make(cached, page), device, kind)


@pytest.mark.parametrize("N, G", [(8, 1), (3, 3), (32, 2)])
@KINDS
@devices
def test_shapes_of_heads(device, kind, N, G):
    check(make([150, 3], 16, N, G), device, kind)


@pytest.mark.parametrize("window", [7, 300])
@devices
def test_windows(device, window):
    """Rings that are shorter and longer than a block of keys, and have been round."""
    check(make([5, 600], 16, window=window), device, "sliding_attention")


@devices
def test_many_parts(device):
    """More keys than one block in each of 16 parts."""
    check(make([9000], 64, 8, 1), device, "full_attention")


@KINDS
@devices
def test_padding_of_a_decode_batch_writes_nothing(device, kind):
    """And gets what the first sequence gets, whether its keys are in one part or in several."""
    for cached in (20, 600):
        case = make([cached, 9, 9, 9], 16, 8, 1)
        case.step.positions[2:] = -1
        case.step.tables[kind][2:] = 0
        out, _ = check(case, device, kind)
        assert torch.equal(out[2:], out[:1].expand(2, -1)) and not torch.equal(out[1], out[0])


@devices
def test_a_sequence_does_not_depend_on_its_batch(device):
    """Nor on the width of its table, from which the number of programs follows."""
    first = make([600], 16, 8, 1)
    alone, _ = check(first, device, "full_attention")
    case = make([600, 1200], 16, 8, 1)
    case.qkv[0] = first.qkv[0]
    slots = case.step.tables["full_attention"][0].long()[:, None] * 16 + torch.arange(16)
    own = first.step.tables["full_attention"][0].long()[:, None] * 16 + torch.arange(16)
    case.pool[slots[: len(own)].flatten()] = first.pool[own.flatten()]
    together, _ = check(case, device, "full_attention")
    assert torch.equal(together[0], alone[0])


@devices
def test_same_bits_in_every_run(device):
    """Whichever part arrives last."""
    case = make([1500], 16, 8, 1)
    first = run(case, device, "full_attention")[0]
    for seed in range(1, 4):
        assert torch.equal(run(case, device, "full_attention", seed)[0], first)


@devices
def test_nan_stays_in_its_sequence(device):
    case = make([40, 40], 16, 8, 1)
    case.qkv[1, 3] = float("nan")
    got = run(case, device, "full_attention")[0]
    assert got[0].isfinite().all() and got[1, :64].isnan().all()


@KINDS
def test_bytes(kind):
    """Each visible key and value is read once, before the kernel before is done; what that makes,
    only after."""
    case = make([700], 16)
    launch = run(case, "sm_90", kind)[2]
    keys = 127 if kind == "sliding_attention" else 700
    assert launch.loaded["pool"] == keys * 2 * 2 * 64 * 2  # keys and values, heads, elements, bytes
    assert launch.early["pool"] == launch.loaded["pool"]
    assert launch.stored["out"] == 16 * 64 * 2  # by the last to arrive alone
    assert set(launch.early) == {"pool", "table", "positions", "cos", "sin", "sinks"}


@pytest.mark.parametrize("gpu", ["sm_90", slow("sm_80"), slow("sm_86"), slow("sm_120")])
def test_compiled_for_gpus_that_are_not_here(gpu):
    """Nothing spills, keys and values are loaded 16 bytes a lane, and only the warps' results meet
    in shared memory: no barrier lies between the two products of a block."""
    with compile_ops.compiling_for(gpu) as found:
        compile_ops.launch_attention(attention_nvidia, weights.published("120b"), 1)
    assert [k.name for k in found] == ["decode_kernel"] * 2
    for k in found:
        assert k.spills == 0
        products = k.text[k.text.index("mma.sync") : k.text.rindex("mma.sync")]
        assert "bar.sync" not in products and ".shared" not in products
        # 4 of keys' 32 bytes for 8 heads' rows, and 8 of values' 16, before and in the loop
        assert k.text.count("ld.global.v4.b32") >= 2 * 16


def test_decode_steps_on_nvidia_are_its(monkeypatch):
    """And chunks of prompts ops_triton's."""
    for room in (attention_nvidia, ops_triton):
        monkeypatch.setattr(room, "attention", lambda *_, name=room.__name__: name)
    with ptx.emulate("sm_90"):
        ops = gptoss.choose_ops("auto", torch.device("cpu"))
    case = make([5])
    plan = ops_triton.plan(case.step, case.config)
    chunk = replace(plan, positions=plan.positions.expand(1, 2))
    arguments = case.qkv, case.sinks, case.pool, "full_attention"
    assert ops.attention(*arguments, plan) == "attention_nvidia"
    assert ops.attention(*arguments, chunk) == "ops_triton"


def test_what_it_does_not_take():
    case = make([5])
    plan = ops_triton.plan(case.step, case.config)
    assert attention_nvidia.attends(case.qkv, case.sinks, case.pool, plan)
    assert not attention_nvidia.attends(case.qkv.float(), case.sinks, case.pool, plan)
    assert not attention_nvidia.attends(case.qkv, case.sinks, case.pool[..., :32], plan)
    chunk = replace(plan, positions=plan.positions.expand(1, 2))
    assert not attention_nvidia.attends(case.qkv, case.sinks, case.pool, chunk)
