"""Times the six operations of ops_triton.py on a GPU, one by one, against their byte floors.

    python tools/bench_ops.py --model 120b              every operation, at 1 to 8192 tokens
    python tools/bench_ops.py --only moe --tokens 1 8 --variants 64,16,128,4,5 64,16,256,4,3
    python tools/bench_ops.py --json ops.jsonl --seconds 240    stops early rather than late

An operation is captured as a graph of several calls, each with other inputs, weights or pages, so
that the L2 cache does not help, and the graph is replayed. us: the median replay over its calls;
floor: the bytes that a call cannot avoid over the bandwidth of a copy, measured first, or its FLOP
over --flops, whichever is more. error: relative L2 against the equations in float32 on the same
device. A line of JSON is written as soon as it is measured; the table follows at the end. A variant
BN,BM,BK,warps,stages[,split] replaces the choice of `ops_triton.tiles_for`. Of moe_nvidia, which is
timed beside it where it runs, --nvidia replaces `cuts_for`: dispatch's NB,WN,WK,AHEAD,X_AHEAD
[:combine's].

    python tools/bench_ops.py --only moe --tokens 1 8 --nvidia 1,1,4,6,1 1,1,4,4,1:1,1,8,3,1

Without a GPU --model tiny runs everything once in the emulator, which times nothing."""

import argparse
import contextlib
import itertools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import astuple, replace
from functools import partial
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
import triton

sys.path.insert(0, str(Path(__file__).parents[1]))
import attention_nvidia
import gptoss
import moe_nvidia
import ops_triton
import weights

ROTATED = 100_000_000  # bytes: twice an H100's L2 cache lies between two uses of the same data
PAGE = 16


class Bench:
    """Measures, writes and keeps rows until its time is over."""

    def __init__(self, device: torch.device, seconds: float, flops: float, output):
        self.device, self.flops, self.output, self.rows = device, flops, output, []
        self.end = time.monotonic() + seconds
        self.bandwidth = None
        self.bandwidth = self.copy_bandwidth() if device.type == "cuda" else math.inf

    def copy_bandwidth(self) -> float:
        """Bytes/s, read and written, of a large copy."""
        source = torch.empty(1 << 29, dtype=torch.uint8, device=self.device)
        target = torch.empty_like(source)
        return 2e6 * source.numel() / self.us([lambda: target.copy_(source)] * 5)

    def us(self, calls: list[Callable]) -> float | None:
        """The time of one of these calls in a graph of all; None where nothing can be timed."""
        for call in calls[:2]:  # compiles
            call()
        if self.device.type != "cuda":
            return None
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times = []
        for n in range(23):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            torch.cuda.synchronize()
            if n > 2:
                times.append(1e3 * start.elapsed_time(end) / len(calls))
        return statistics.median(times)

    def row(self, op: str, calls: list[Callable], nbytes=0.0, flop=0.0, error=None, **what) -> None:
        """error: a function that compares a call with the equations."""
        row = {"op": op, **what, "bytes": round(nbytes), "flop": flop}
        if time.monotonic() > self.end:
            row["skipped"] = "out of time"
        else:
            try:
                row["error"] = error() if error else None
                row["us"] = self.us(calls)
                row["floor"] = 1e6 * max(nbytes / self.bandwidth, flop / self.flops)
                if row["us"]:
                    row["share"] = row["floor"] / row["us"]
            except Exception as failure:  # the next row may still work
                row["failed"] = f"{type(failure).__name__}: {str(failure).strip()[-300:]}"
        self.rows.append(row)
        print(json.dumps(row), file=self.output, flush=True)


def relative(got, want) -> float:
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def new(device, *shape):
    return torch.randn(shape, device=device, dtype=torch.bfloat16)


def copies(nbytes: float, most: int = 32) -> int:
    """How many sets of data keep the cache from helping; calls of a graph."""
    return int(min(max(ROTATED // max(nbytes, 1), 2), most))


def norms(bench: Bench, c, tokens: list[int]) -> None:
    scale = torch.rand(c.hidden_size, device=bench.device)
    for T in tokens:
        nbytes = 8 * T * c.hidden_size
        data = [new(bench.device, 2, T, c.hidden_size) for _ in range(copies(nbytes))]
        calls = [lambda x=x, y=y: ops_triton.add_norm(x, y, scale, 1e-5) for x, y in data]

        def error(calls=calls, data=data):
            return relative(calls[0]()[1], gptoss.add_norm(*data[0], scale, 1e-5)[1])

        bench.row("add_norm", calls, nbytes, error=error, T=T)


def linears(bench: Bench, c, tokens: list[int]) -> None:
    """The dense GEMMs, PyTorch's and ours."""
    heads = (c.num_attention_heads + 2 * c.num_key_value_heads) * c.head_dim
    shapes = dict(
        qkv=(heads, c.hidden_size),
        out=(c.hidden_size, c.num_attention_heads * c.head_dim),
        unembedding=(c.vocab_size, c.hidden_size),
    )
    for name, (N, K) in shapes.items():
        nbytes = 2 * N * K
        data = [new(bench.device, N, K) for _ in range(copies(nbytes, 8))]
        bias = new(bench.device, N)
        for T in tokens:
            x, flop = new(bench.device, T, K), 2.0 * T * N * K
            kernels = [("F.linear", F.linear)]
            if T == 1:
                kernels.append(("ops_triton.linear", ops_triton.linear))
            elif moe_nvidia.is_supported() and moe_nvidia.multiplies(x, data[0]):
                kernels.append(("moe_nvidia.linear", moe_nvidia.linear))
            for label, linear in kernels:

                def error(x=x, w=data[0], bias=bias, linear=linear):
                    want = F.linear(x.float(), w.float(), bias.float())
                    return relative(linear(x, w, bias), want)

                calls = [lambda w=w, x=x, bias=bias, f=linear: f(x, w, bias) for w in data]
                bench.row(f"{label} {name}", calls, nbytes, flop, error, T=T)


def attention(bench: Bench, c, cases: list[tuple[int, int, int]]) -> None:
    """Cases: sequences, new tokens of each, cached tokens of each."""
    N, G, D = c.num_attention_heads, c.num_key_value_heads, c.head_dim
    sinks = new(bench.device, N)
    for S, Q, cached in cases:
        positions = torch.arange(cached, cached + Q, device=bench.device, dtype=torch.int32)
        positions = positions.expand(S, Q).contiguous()
        needed, tables, page = gptoss.pages_needed(c, cached + Q, PAGE), {}, 1
        for kind, width in needed.items():
            order = torch.randperm(S * width, device=bench.device).int() + page
            tables[kind], page = order.view(S, width), page + S * width
        step = gptoss.Step(positions, tables, PAGE)
        qkv = new(bench.device, S * Q, (N + 2 * G) * D)
        for kind in tables:
            seen = min(cached, c.sliding_window) if kind == "sliding_attention" else cached
            nbytes = 4 * G * D * S * (seen + Q) + 2 * S * Q * (2 * N + 2 * G) * D
            flop = (
                4.0
                * S
                * N
                * D
                * sum(
                    min(p + 1, c.sliding_window if kind == "sliding_attention" else p + 1)
                    for p in range(cached, cached + Q)
                )
            )
            size = page * PAGE * 4 * G * D  # bytes of a pool
            pools = [
                new(bench.device, page * PAGE, 2, G, D)
                for _ in range(min(copies(nbytes), max(1, 8_000_000_000 // size)))
            ]
            plan = ops_triton.plan(step, c)

            rooms = {"attention": ops_triton}
            if moe_nvidia.is_supported() and attention_nvidia.attends(qkv, sinks, pools[0], plan):
                rooms["attention_nvidia"] = attention_nvidia
            for name, room in rooms.items():

                def call(pool, room=room, kind=kind, plan=plan, qkv=qkv):
                    return room.attention(qkv, sinks, pool, kind, plan)

                def error(pool=pools[0], kind=kind, step=step, qkv=qkv, call=call):
                    mine, theirs = pool.clone(), pool.float()
                    want = gptoss.attention(
                        qkv.float(), sinks.float(), theirs, kind, gptoss.plan(step, c)
                    )
                    got = call(mine)
                    return max(relative(got, want), relative(mine, theirs))

                small = S * Q * (cached + Q) * N < 1 << 31  # the equations hold all scores
                bench.row(
                    f"{name} {kind.split('_')[0]}",
                    [lambda pool=pool, call=call: call(pool) for pool in pools],
                    nbytes, flop, error if small else None, T=S * Q, S=S, cached=cached,
                )  # fmt: skip


def moe(bench: Bench, c, tokens: list[int], variants: list, activations: str, nvidia: list) -> None:
    one = replace(c, num_hidden_layers=1, layer_types=("full_attention",), vocab_size=1)
    layers = [
        weights.random(one, "openai", bench.device, seed).experts[0]
        for seed in range(1 if c.num_local_experts > 64 else 3)
    ]
    layers = [replace(e, gate_up_input_scale=0.02, down_input_scale=0.02) for e in layers]
    started = time.monotonic()
    packed = [ops_triton.prepare(e, activations) for e in layers]
    if bench.device.type == "cuda":
        torch.cuda.synchronize()
    print(json.dumps({"prepare": time.monotonic() - started, "layers": len(packed)}), flush=True)
    layers = layers[:1]  # of which the first is compared
    H, E, k = c.hidden_size, c.num_local_experts, c.num_experts_per_tok
    router = torch.randn(E, H, device=bench.device).mul(H**-0.5).bfloat16()
    bias = torch.zeros(E, device=bench.device, dtype=torch.bfloat16)
    chosen_by = ops_triton.tiles_for
    for T in tokens:
        data = [new(bench.device, T, H) for _ in range(20 if T <= 64 else 3)]
        active = statistics.mean(len(gptoss.gating(x, router, bias, k).counts) for x in data)
        values = 3 * H * c.intermediate_size  # of an expert
        nbytes, flop = active * values * 17 / 32, 2.0 * T * k * values

        step = max(1, T // 16)  # the equations expand each expert of their few tokens
        want = gptoss.moe_reference(data[0][::step], router, bias, layers[0], k, activations)

        def calls_of(room, data=data):
            def call(x, p):
                return room.moe(x, router, bias, p, k, activations, c.swiglu_limit)

            pairs = zip(data, itertools.cycle(packed))
            return [lambda x=x, p=p: call(x, p) for x, p in pairs]

        calls = calls_of(ops_triton)

        def error(calls=calls, step=step, want=want):
            return relative(calls[0]()[::step], want)

        for variant in [None, *variants]:
            if variant and T <= ops_triton.DECODE_TOKENS and variant.BM != 16:
                continue
            tiles = chosen_by(T, T * k / E, True, torch.bfloat16, ops_triton.on_hip())
            tiles = (variant, variant) if variant else tiles
            with mock.patch.object(ops_triton, "tiles_for", lambda *_, tiles=tiles: tiles):
                cut = " ".join(",".join(map(str, tile)) for tile in tiles)
                bench.row(
                    "moe", calls, nbytes, flop, error, T=T, active=round(active, 1), tile=cut,
                    chosen=variant is None,
                )  # fmt: skip
                if variant is None and bench.device.type == "cuda":
                    kernels(bench, calls, T)
        if T > moe_nvidia.MAX_TOKENS or activations != "bf16" or not moe_nvidia.is_supported():
            continue
        calls = calls_of(moe_nvidia)  # which reads ops_triton's packed experts
        for variant in [None, *nvidia]:
            cuts = variant or moe_nvidia.cuts_for(T, 2 * c.intermediate_size, H)
            with mock.patch.object(moe_nvidia, "cuts_for", lambda *_, cuts=cuts: cuts):
                cut = ":".join(",".join(map(str, astuple(cut))) for cut in cuts)
                bench.row(
                    "moe_nvidia", calls, nbytes, flop, partial(error, calls), T=T,
                    active=round(active, 1), tile=cut, chosen=variant is None,
                )  # fmt: skip
                if variant is None:
                    kernels(bench, calls, T)


def kernels(bench: Bench, calls: list[Callable], T: int) -> None:
    """A row for each kernel of a call, as the profiler times it: without what lies between."""
    try:
        for call in calls:
            call()
        torch.cuda.synchronize()
        activities = [torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            for call in calls:
                call()
            torch.cuda.synchronize()
        events = [e for e in profile.events() if e.device_type.name == "CUDA"]
        events = [e for e in events if e.name.endswith("_kernel")]  # ours
        events.sort(key=lambda e: e.time_range.start)
        launches = len(events) // len(calls)
        for n in range(launches):
            same = events[n::launches]
            us = statistics.median(e.time_range.elapsed_us() for e in same)
            row = {"op": f"  {n} {same[0].name}", "T": T, "us": us}
            bench.rows.append(row)
            print(json.dumps(row), file=bench.output, flush=True)
    except Exception as failure:  # no profiler here: the sums above stand
        print(f"no profile: {failure}", file=sys.stderr)


def table(rows: list[dict]) -> str:
    columns = [
        ("operation", "op", ""), ("T", "T", "d"), ("S", "S", "d"), ("cached", "cached", "d"),
        ("tile", "tile", ""), ("us", "us", ".1f"), ("floor", "floor", ".1f"),
        ("floor / us", "share", ".0%"), ("error", "error", ".1e"), ("", "failed", ""),
        ("", "skipped", ""),
    ]  # fmt: skip
    lines = ["| " + " | ".join(name for name, *_ in columns) + " |", "| --- " * len(columns) + "|"]
    for row in rows:
        cells = [format(row[key], f) if row.get(key) is not None else "" for _, key, f in columns]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


OPS = ("add_norm", "linear", "attention", "moe")


def tile(text: str) -> ops_triton.Tile:
    return ops_triton.Tile(*map(int, text.split(",")))


def nvidia_cuts(text: str) -> tuple[moe_nvidia.Cut, moe_nvidia.Cut]:
    cuts = [moe_nvidia.Cut(*map(int, cut.split(","))) for cut in text.split(":")]
    return cuts[0], cuts[-1]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=["20b", "120b", "tiny"], default="120b")
    parser.add_argument("--only", nargs="+", choices=OPS, default=OPS)
    parser.add_argument("--tokens", nargs="+", type=int)
    parser.add_argument("--activations", default="bf16", choices=ops_triton.ACTIVATIONS)
    parser.add_argument("--variants", nargs="+", type=tile, default=[])
    parser.add_argument("--nvidia", nargs="+", type=nvidia_cuts, default=[])
    parser.add_argument("--seconds", type=float, default=300.0)
    parser.add_argument("--flops", type=float, default=990e12, help="dense bf16 FLOP/s")
    parser.add_argument("--json", type=Path, help="lines are also printed")
    args = parser.parse_args(argv)
    if args.model == "tiny":
        import gfx950

        c = replace(
            weights.published("20b"), hidden_size=96, intermediate_size=64, vocab_size=200,
            num_local_experts=6, num_attention_heads=8, num_key_value_heads=2, head_dim=16,
        )  # fmt: skip
        few, many, device, gpu = [1, 20], [1, 20], torch.device("cpu"), gfx950.emulate()
        cases = [(2, 1, 20), (1, 18, 0)]
    else:
        c, device, gpu = (
            weights.published(args.model),
            torch.device("cuda"),
            contextlib.nullcontext(),
        )
        few, many = [1, 8, 64], [1, 2, 4, 8, 16, 64, 512, 2048, 8192]
        cases = [(1, 1, 512), (8, 1, 1024), (1, 1, 8192), (1, 1, 100000), (64, 1, 1024)]
        cases += [(1, 512, 0), (1, 2048, 0), (8, 512, 0), (1, 512, 8192)]
        print(torch.cuda.get_device_name(), torch.__version__, triton.__version__, flush=True)
    few, many = args.tokens or few, args.tokens or many
    with gpu, contextlib.ExitStack() as stack, torch.inference_mode():
        output = stack.enter_context(args.json.open("a")) if args.json else sys.stdout
        bench = Bench(device, args.seconds, args.flops, output)
        print(json.dumps({"copy TB/s": bench.bandwidth / 1e12}), flush=True)
        if "moe" in args.only:
            moe(bench, c, many, args.variants, args.activations, args.nvidia)
        if "attention" in args.only:
            attention(bench, c, cases)
        if "add_norm" in args.only:
            norms(bench, c, few)
        if "linear" in args.only:
            linears(bench, c, few)
    print(table(bench.rows))
    return int(any("failed" in row for row in bench.rows))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
