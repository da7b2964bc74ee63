"""One MoE layer's kernels, 1 to 8192 tokens: counts, floors and, on a gfx950, times.

    python tools/bench_moe.py                      a 120b layer, compiled and emulated on a CPU
    python tools/bench_moe.py --activations fp8    on a gfx950 beside the peers installed there
    python tools/bench_moe.py --ops triton         ops_triton's layer on any GPU, with a peer's

Prints a layer's bytes and FLOP, and the us they take an MI355 at 8 TB/s and its dense matrix rate;
registers, spills, LDS, tile and workgroups of every kernel; and up to 16 tokens the emulator's
counts. Routing is made up so that a given number of experts takes part, equally often. On a gfx950
each layer is replayed as a graph instead, with other experts in every call, and timed; that part
has never run, except for the peers' layers in the emulator. --ops triton times in the same way,
against the bandwidth of a copy on that GPU; no call finds its weights in the cache, as the experts
between two uses of one are more than any GPU caches. Each column says whether it was measured,
counted or modelled."""

import argparse
import collections
import functools
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
import peer_gpu

import gfx950
import moe_gluon
import ops_triton
import weights
from bench import SIZES, copy_bandwidth, device_name, table
from weights import Config

# MI355X (AMD's data sheet): bytes/s, and dense FLOP/s by the wider operand of the matrix
# instruction
MI355_BANDWIDTH = 8e12
MI355_FLOPS = {"bf16": 2.5e15, "fp8": 5.0e15, "mxfp8": 5.0e15, "mxfp4": 10.1e15}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 512, 1024, 4096, 8192)  # tokens of a layer


def expert_bytes(values: int, activations: str) -> int:
    """Of so many values of an expert's weights: bf16, or two e2m1 codes a byte and a scale byte for
    32."""
    return values * 2 if activations == "bf16" else values * 17 // 32


def random_experts(layout: str, experts: int, H: int, inner: int) -> weights.Experts:
    """Made-up experts of one layer, with static scales for fp8."""
    config = replace(
        weights.published("120b"),
        num_hidden_layers=1,
        layer_types=("full_attention",),
        vocab_size=1,
        num_local_experts=experts,
        num_experts_per_tok=min(4, experts),
        hidden_size=H,
        intermediate_size=inner,
    )
    made = weights.random(config, layout).experts[0]
    return replace(made, gate_up_input_scale=0.02, down_input_scale=0.01)


def packed_experts(activations: str, experts: int = 128, H: int = 2880, inner: int = 2880):
    """The same as the kernels read them."""
    layout = "hf-bf16" if activations == "bf16" else "openai"
    return moe_gluon.prepare(random_experts(layout, experts, H, inner), activations)


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose, on average, if they choose evenly and
    independently."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def layer_floor(config: Config, activations: str, tokens: int, active: int) -> dict:
    """What one MoE layer cannot do without: its active experts' weights (without biases), its FLOP,
    and the us of an MI355 for the slower of the two."""
    values = 3 * config.hidden_size * config.intermediate_size  # of an expert
    size = active * expert_bytes(values, activations)
    flop = 2 * tokens * config.num_experts_per_tok * values
    return {
        "weight_bytes": size,
        "flop": flop,
        "floor_us": 1e6 * max(size / MI355_BANDWIDTH, flop / MI355_FLOPS[activations]),
    }


def pinned(config: Config, tokens: int, active: int, first: int, device) -> tuple:
    """x [T, H], router weight [E, H] and bias [E] with which exactly the experts first .. first +
    active - 1 (mod E) take part, equally often: token t chooses the k from t k on. Its class, t mod
    active, is one-hot in the first columns of x, the only ones that the router's weights see."""
    E, H, k = config.num_local_experts, config.hidden_size, config.num_experts_per_tok
    x = torch.empty(tokens, H, dtype=torch.bfloat16, device=device).normal_()
    router = torch.zeros(E, H, dtype=torch.bfloat16, device=device)
    x[:, :active] = torch.nn.functional.one_hot(
        torch.arange(tokens, device=device) % active, active
    ).to(x.dtype)
    c = torch.arange(active, device=device)
    for slot in range(k):
        router[(first + (c * k + slot) % active) % E, c] = 2.0 + k - slot
    return x, router, torch.zeros(E, dtype=torch.bfloat16, device=device)


def tile_size(kernel: str, packed: moe_gluon.PackedExperts) -> str | None:
    """Rows x columns of a workgroup of the expert GEMM that the kernel of this name computes; None
    for a kernel that is none."""
    f = moe_gluon.FORMATS[packed.activations]
    if kernel.startswith("prefill_"):
        return f"{moe_gluon.PREFILL_ROWS.value} x {moe_gluon.PREFILL_COLUMNS.value}"
    if kernel == "dispatch_kernel":
        g = moe_gluon.dispatch_tile(packed.gate_up.K, packed.gate_up.N, f)
    elif kernel == "combine_kernel":
        g = moe_gluon.combine_tile(packed.down.K, packed.down.N, f, top_k=1)
    else:
        return None
    return f"{g.BM} x {g.BN}"


def launch_row(launch, packed) -> dict:
    """What the compiler made of a kernel, and, if it was emulated, what it did."""
    workgroups = math.prod(launch.grid)
    row = {
        "kernel": launch.name,
        "tile": tile_size(launch.name, packed),
        "workgroups": workgroups,
        "waves": launch.waves // workgroups,
    } | launch.profile
    if launch.counters:
        read = {name: tensor["read"] for name, tensor in launch.counters.tensors.items()}
        of_weights, model = read.get("w", 0) + read.get("w_scale", 0), gfx950.resources(launch)
        busiest = max(model, key=model.get)
        row |= {
            "weights_read": of_weights,
            "others_read": sum(read.values()) - of_weights,
            "wave_instructions": launch.counters.wave_instructions,
            "emulated_s": launch.seconds,
            "flight_kb": launch.counters.peak_bytes_in_flight / 1024,
            "busiest": busiest,
            "model_us": model[busiest] / 2.4e3,
        }  # cycles at 2.4 GHz
    return row


def triton_kernels_peer(experts, top_k: int, activations: str) -> Callable:
    """OpenAI's Triton kernels (Triton's repository, python/triton_kernels, as of triton 3.8), with
    bf16 or static e4m3 activations: on a gfx950 fp8, since with bf16 ones they do not compile for
    it in the tiles of up to 1024 tokens. -> layer(x, router_weight, router_bias) -> [T, H]."""
    peer_gpu.add_what_triton_lacks()
    from triton_kernels.matmul import FlexCtx, FnSpecs, FusedActivation, PrecisionConfig, matmul
    from triton_kernels.numerics import InFlexData, OutFlexData
    from triton_kernels.swiglu import swiglu_fn
    from triton_kernels.tensor import (
        FP4,
        convert_layout,
        make_ragged_tensor_metadata,
        wrap_torch_tensor,
    )
    from triton_kernels.tensor_details import layout
    from triton_kernels.topk import topk

    e4m3, device, fp8 = torch.float8_e4m3fn, experts.down_bias.device, activations == "fp8"
    first, second = (
        torch.tensor([s], device=device)
        for s in (experts.gate_up_input_scale, experts.down_input_scale)
    )

    def weight(values, scales, seen, out):
        values = convert_layout(
            wrap_torch_tensor(values.mT, FP4), layout.make_default_matmul_mxfp4_w_layout(-2)
        )
        scales = convert_layout(
            wrap_torch_tensor(scales.mT), layout.make_default_matmul_mxfp4_w_scale_layout(-2)
        )
        return values, PrecisionConfig(
            flex_ctx=FlexCtx(InFlexData(e4m3, seen) if fp8 else InFlexData(), out_data=out),
            b_mx_scale=scales,
            b_microblock_size=32,
            out_dtype=out.dtype or torch.bfloat16,
        )

    up, up_config = weight(
        experts.gate_up_weight,
        experts.gate_up_scale,
        first,
        OutFlexData(e4m3, second) if fp8 else OutFlexData(),
    )
    down, down_config = weight(experts.down_weight, experts.down_scale, second, OutFlexData())
    up_bias, down_bias = experts.gate_up_bias.float(), experts.down_bias.float()
    swiglu = FusedActivation(
        FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.702, 7.0)
    )

    def layer(x, router_weight, router_bias):
        chosen = topk(torch.nn.functional.linear(x, router_weight, router_bias), top_k)
        # [T top_k], the (token, slot) pairs sorted by expert
        order = chosen.mask_metadata.col_sorted_indx
        rows = make_ragged_tensor_metadata(chosen.mask_metadata.col_sum, len(order))
        h = matmul(
            (x / first).to(e4m3) if fp8 else x,
            up,
            up_bias,
            rows,
            gather_indx=order // top_k,
            precision_config=up_config,
            fused_activation=swiglu,
        )
        y = matmul(
            h,
            down,
            down_bias,
            rows,
            scatter_indx=order,
            precision_config=down_config,
            gammas=chosen.vals.flatten()[order],
        )
        return y.view(len(x), top_k, -1).sum(1)  # [T top_k, H] -> [T, H]

    return layer


def tokenspeed_peer(experts, top_k: int, activations: str) -> Callable:
    """TokenSpeed's Gluon kernels for gfx950 (tokenspeed-kernel-amd), whose activations are static
    e4m3, "fp8". -> layer, as above."""
    from tokenspeed_kernel_amd.ops.gfx950.moe.mxfp4 import weight_preprocess
    from tokenspeed_kernel_amd.ops.gfx950.moe.mxfp4.fused import gluon_mxfp_fused_moe

    theirs = torch.nn.Module()
    theirs.w13_input_layout = "interleaved"
    for w, ours in ("w13", "gate_up"), ("w2", "down"):
        for name, field in ("weight", "weight"), ("weight_scale", "scale"), ("weight_bias", "bias"):
            value = torch.nn.Parameter(getattr(experts, f"{ours}_{field}"), requires_grad=False)
            setattr(theirs, f"{w}_{name}", value)
        scale = torch.tensor(
            getattr(experts, f"{ours}_input_scale"), device=experts.down_bias.device
        )
        setattr(theirs, f"{w}_input_scale", scale)
    weight_preprocess.preprocess_gluon_mxfp4_gfx950_moe_weights({}, theirs)
    run = functools.partial(
        gluon_mxfp_fused_moe,
        w13_weight=theirs.w13_weight_triton_tensor,
        w2_weight=theirs.w2_weight_triton_tensor,
        w13_mx_scale=theirs.w13_precision_config.b_mx_scale,
        w2_mx_scale=theirs.w2_precision_config.b_mx_scale,
        w13_bias=theirs.w13_weight_bias,
        w2_bias=theirs.w2_weight_bias,
        w13_act_scale=theirs.w13_act_scale,
        w2_act_scale=theirs.w2_act_scale,
        top_k=top_k,
    )
    return lambda x, router_weight, router_bias: run(
        x, torch.nn.functional.linear(x, router_weight, router_bias)
    )


KERNEL_PEERS = {"triton_kernels": triton_kernels_peer, "tokenspeed": tokenspeed_peer}


def kernel_peers(
    experts, top_k: int, activations: str = "fp8", names=tuple(KERNEL_PEERS)
) -> dict[str, Callable]:
    """Those of the named KERNEL_PEERS that are installed; of the others stderr says why they are
    left out."""
    layers = {}
    for name in names:
        try:
            layers[name] = KERNEL_PEERS[name](experts, top_k, activations)
        except ImportError as error:
            print(f"bench_moe: without {name}: {error}", file=sys.stderr)
    return layers


def graph_times(config: Config, tokens: int, active: int, calls_of: Callable, device) -> dict:
    """us of each of the calls that calls_of(x, router_weight, router_bias) names, of graphs that
    replay them. Every call meets other experts until all had their turn."""
    from triton.testing import do_bench_cudagraph

    calls = collections.defaultdict(list)
    for first in range(0, config.num_local_experts, active):
        for name, call in calls_of(*pinned(config, tokens, active, first, device)).items():
            calls[f"{name}_us"].append(call)
    return {
        name: 1e3 * do_bench_cudagraph(lambda turns=turns: [call() for call in turns]) / len(turns)
        for name, turns in calls.items()
    }


def layer_times(config: Config, tokens: int, active: int, packed, peers, device) -> dict:
    """us of a layer, its launchers and its peers on a gfx950."""

    def calls_of(*x):
        inputs = *x, packed, config.num_experts_per_tok
        routing = moe_gluon.gating_gemm(*inputs)
        h = moe_gluon.dispatch_swiglu(routing, packed)
        return {
            "moe": functools.partial(moe_gluon.moe, *inputs),
            "gating_gemm": functools.partial(moe_gluon.gating_gemm, *inputs),
            "dispatch_swiglu": functools.partial(moe_gluon.dispatch_swiglu, routing, packed),
            "combine": functools.partial(moe_gluon.combine, *h, routing, packed),
        } | {name: functools.partial(layer, *x) for name, layer in peers.items()}

    return graph_times(config, tokens, active, calls_of, device)


LAYER_COLUMNS = [
    ("tokens", "tokens", "d"),
    ("active experts, pinned", "active", "d"),
    ("launches, counted", "launches", "d"),
    ("least weight bytes, counted", "weight_bytes", ",d"),
    ("least FLOP, counted", "flop", ".3g"),
    ("MI355 floor us, modelled", "floor_us", ".1f"),
    ("copy floor us, measured", "copy_us", ".1f"),
    ("us, measured", "moe_us", ".1f"),
    ("triton_kernels us, measured", "triton_kernels_us", ".1f"),
    ("TokenSpeed us, measured", "tokenspeed_us", ".1f"),
    ("gating us, measured", "gating_gemm_us", ".1f"),
    ("dispatch us, measured", "dispatch_swiglu_us", ".1f"),
    ("combine us, measured", "combine_us", ".1f"),
    ("TB/s, measured", "tb_s", ".2f"),
    ("TFLOP/s, measured", "tflop_s", ",.1f"),
    ("/ floor, measured", "of_floor", ".2f"),
    ("/ triton_kernels, measured", "of_triton_kernels", ".2f"),
    ("weights requested / least, counted", "weights_ratio", ".3f"),
    ("all else requested / least, counted", "others_ratio", ".2f"),
    ("busiest resources us, modelled", "model_us", ".1f"),
]
KERNEL_COLUMNS = [
    ("tokens", "tokens", "d"),
    ("kernel", "kernel", ""),
    ("tile", "tile", ""),
    ("waves a workgroup", "waves", "d"),
    ("workgroups, counted", "workgroups", "d"),
    ("VGPR, counted", "vgprs", "d"),
    ("AGPR, counted", "agprs", "d"),
    ("SGPR, counted", "sgprs", "d"),
    ("VGPR spills, counted", "vgpr_spills", "d"),
    ("SGPR spills, counted", "sgpr_spills", "d"),
    ("scratch B, counted", "scratch", "d"),
    ("LDS B, counted", "lds", ",d"),
    ("waves a SIMD, counted", "occupancy", "d"),
    ("wave-instructions, counted", "wave_instructions", ",d"),
    ("KB in flight a wave, counted", "flight_kb", ".1f"),
    ("busiest resource, modelled", "busiest", ""),
    ("its us, modelled", "model_us", ".1f"),
]


def one_layer(config: Config, layout: str, device, seed: int):
    """Made-up experts of one layer, with the input scales that static fp8 needs."""
    one = replace(config, num_hidden_layers=1, vocab_size=1, layer_types=config.layer_types[:1])
    experts = weights.random(one, layout, device, seed).experts[0]
    return replace(experts, gate_up_input_scale=0.02, down_input_scale=0.01)


def triton_layers(size: str, activations: str, device: torch.device, seed: int) -> dict:
    """ops_triton's layer for each of BATCHES, mxfp4 weights, timed; with bf16 activations beside
    triton_kernels' where installed, on the same experts and inputs."""
    config, bandwidth = weights.published(size), copy_bandwidth(device)
    E, top_k = config.num_local_experts, config.num_experts_per_tok
    experts, layers = one_layer(config, "openai", device, seed), []
    packed = ops_triton.prepare(experts, activations)
    names = ["triton_kernels"] if activations == "bf16" else []
    peers = kernel_peers(experts, top_k, activations, names)
    del experts

    def calls_of(*x):
        given = *x, packed, top_k, activations, config.swiglu_limit
        return {"moe": functools.partial(ops_triton.moe, *given)} | {
            name: functools.partial(layer, *x) for name, layer in peers.items()
        }

    for tokens in weights.progress(BATCHES, "layers"):
        active = round(expected_experts(E, top_k, tokens))
        # The weights are packed whatever the activations, so the bytes are those of mxfp4.
        layer = {"tokens": tokens, "active": active} | layer_floor(config, "mxfp4", tokens, active)
        del layer["floor_us"]  # of an MI355
        layer |= graph_times(config, tokens, active, calls_of, device)
        us = layer["moe_us"]
        layer["copy_us"] = 1e6 * layer["weight_bytes"] / bandwidth
        layer |= {"tb_s": layer["weight_bytes"] / us / 1e6, "tflop_s": layer["flop"] / us / 1e6}
        layer["of_floor"] = us / layer["copy_us"]
        if peers:
            layer["of_triton_kernels"] = us / layer["triton_kernels_us"]
        layers.append(layer)
    return {"bandwidth": bandwidth, "layers": layers, "kernels": []}


def kernels(size: str, activations: str, device: torch.device, seed: int) -> dict:
    """A layer for each of BATCHES: compiled, up to 16 tokens emulated; and timed where the device
    is a gfx950, with fp8 activations beside its peers, which have those."""
    on_gfx950 = device.type == "cuda"
    config = weights.published(size)
    E, top_k = config.num_local_experts, config.num_experts_per_tok
    layout = "hf-bf16" if activations == "bf16" else "openai"
    experts = one_layer(config, layout, device, seed)
    packed, layers, rows = moe_gluon.prepare(experts, activations), [], []
    peers = kernel_peers(experts, top_k) if on_gfx950 and activations == "fp8" else {}
    del experts
    for tokens in weights.progress(BATCHES, "kernels"):
        active = round(expected_experts(E, top_k, tokens))
        layer = {"tokens": tokens, "active": active}
        layer |= layer_floor(config, activations, tokens, active)
        emulated = tokens <= moe_gluon.DECODE_TOKENS and not on_gfx950
        with gfx950.emulate() if emulated else gfx950.compile_only() as gpu:
            moe_gluon.moe(*pinned(config, tokens, active, 0, device), packed, top_k)
        new = [{"tokens": tokens} | launch_row(launch, packed) for launch in gpu.launches]
        layer["launches"] = len(new)
        if emulated:
            least = layer["weight_bytes"]
            layer |= {
                "weights_ratio": sum(row["weights_read"] for row in new) / least,
                "others_ratio": sum(row["others_read"] for row in new) / least,
                "model_us": sum(row["model_us"] for row in new),
            }
        if on_gfx950:
            layer |= layer_times(config, tokens, active, packed, peers, device)
            us = layer["moe_us"]
            layer |= {
                "tb_s": layer["weight_bytes"] / us / 1e6,
                "tflop_s": layer["flop"] / us / 1e6,
                "of_floor": us / layer["floor_us"],
            }
        layers.append(layer)
        rows += new
    return {"layers": layers, "kernels": rows}


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], allow_abbrev=False)
    add = parser.add_argument
    add("--ops", default="gluon", choices=("gluon", "triton"), help="whose layer (default: gluon)")
    add("--model", default="120b", choices=SIZES)
    add("--activations", choices=tuple(MI355_FLOPS), help="default: mxfp8; under triton bf16")
    add("--seed", type=int, default=0)
    add("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args(argv)
    cuda, on_triton = torch.cuda.is_available(), args.ops == "triton"
    args.activations = args.activations or ("bf16" if on_triton else "mxfp8")
    if on_triton and not cuda:
        print("bench_moe: --ops triton times on a GPU, and PyTorch finds none", file=sys.stderr)
        return 1
    device = torch.device("cuda" if cuda and (on_triton or moe_gluon.is_supported()) else "cpu")
    measure = triton_layers if on_triton else kernels
    try:
        result = measure(args.model, args.activations, device, args.seed)
    except (ValueError, torch.OutOfMemoryError) as error:
        print(f"bench_moe: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    if args.json:
        what = {"device": device_name(device), "torch": torch.__version__}
        what |= {"triton": triton.__version__, "settings": vars(args)}
        print(json.dumps(what | result))
        return 0
    print(
        f"One MoE layer of {args.model}, {args.activations} activations; {device_name(device)}, "
        f"torch {torch.__version__}, triton {triton.__version__}\n"
    )
    for columns, rows in (LAYER_COLUMNS, result["layers"]), (KERNEL_COLUMNS, result["kernels"]):
        there = [column for column in columns if any(column[1] in row for row in rows)]
        if there:
            print(table(there, rows), end="\n\n")
    if on_triton:
        print(f"A large copy reads and writes {result['bandwidth'] / 1e9:.1f} GB/s.")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
