"""Where the time of a decode step goes on a GPU, kind of kernel by kind, beside each kind's floor.

    python tools/profile_step.py                          both sizes, 1 and 8 prompts of 512 tokens
    python tools/profile_step.py --model 20b --concurrency 1 --context 8192

A step is a replay of the engine's own graph, of made-up weights of the true shapes. us: what a kind
adds to the step, from the end of the kernel before (kernels overlap where one may start while the
one before it runs) to its own end, the median of 20 replays under PyTorch's profiler; idle: gaps in
which no kernel ran, which the profiler lengthens. floor: the bytes that the kind must read over the
bandwidth of a large copy."""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import bench
import gptoss
import weights

REPLAYS = 20
KINDS = {  # of kernels, by parts of their names
    "experts": ("expert_kernel", "dispatch_kernel", "combine_kernel", "sort_kernel", "sum_kernel"),
    "router": ("route_kernel",),
    "attention": ("decode_kernel",),
    "residuals and norms": ("add_norm_kernel", "sum_norm_kernel"),
    "dense layers": ("linear_kernel", "gemm", "gemv", "cutlass", "splitK", "nvjet"),
    "sampling, angles": ("",),
}
COLUMNS = [
    ("kind", "kind", ""),
    ("launches", "launches", "d"),
    ("us", "us", ".0f"),
    ("floor us", "floor", ".0f"),
    ("floor / us", "share", ".0%"),
]


def kind_of(kernel: str) -> str:
    return next(kind for kind, parts in KINDS.items() if any(part in kernel for part in parts))


def kernels(graph: torch.cuda.CUDAGraph) -> list[list[dict]]:
    """The kernels of each replay in order of their start, as Chrome's trace format has them."""
    for _ in range(3):
        graph.replay()
    torch.cuda.synchronize()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(REPLAYS):
            graph.replay()
            torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
    events = sorted((e for e in events if e.get("cat") == "kernel"), key=lambda e: e["ts"])
    each = len(events) // REPLAYS
    return [events[i * each : (i + 1) * each] for i in range(REPLAYS)]


def floors(model: gptoss.GPTOSS, tokens: int, context: int, active: float) -> dict[str, float]:
    """Bytes that the kernels of a kind must read."""
    c, layers = model.config, model.layers
    seen = sum(
        min(context, c.sliding_window) if layer.kind == "sliding_attention" else context
        for layer in layers
    )
    token = 2 * c.num_key_value_heads * c.head_dim * model.embedding.itemsize
    dense = ("qkv_weight", "qkv_bias", "out_weight", "out_bias")
    return {
        "experts": sum(bench.nbytes(layer.packed) for layer in layers)
        * active
        / c.num_local_experts,
        "router": sum(bench.nbytes(layer.router_weight) for layer in layers),
        "attention": tokens * seen * token,
        "dense layers": bench.nbytes(model.unembedding)
        + sum(bench.nbytes(getattr(layer, name)) for layer in layers for name in dense),
    }


def rows(model: gptoss.GPTOSS, concurrency: int, context: int, bandwidth: float) -> list[dict]:
    draw = random.Random(0)
    vocabulary = range(model.config.vocab_size)
    prompts = [draw.choices(vocabulary, k=context) for _ in range(concurrency)]
    active = bench.met_experts(model, prompts)
    replays = kernels(captured(model, prompts))
    launches = Counter(kind_of(e["name"]) for e in replays[0])
    added = {kind: [] for kind in (*KINDS, "idle")}
    for events in replays:
        end, step = events[0]["ts"], Counter()
        for e in events:
            step["idle"] += max(e["ts"] - end, 0)
            last = e["ts"] + e["dur"]
            step[kind_of(e["name"])] += max(last - max(e["ts"], end), 0)
            end = max(end, last)
        for kind, times in added.items():
            times.append(step[kind])
    least = floors(model, concurrency, context, active)
    found = []
    for kind, times in added.items():
        row = {"kind": kind, "launches": launches[kind], "us": statistics.median(times)}
        if kind in least:
            row["floor"] = 1e6 * least[kind] / bandwidth
            row["share"] = row["floor"] / row["us"]
        found.append(row)
    total = {"kind": "step", "launches": sum(launches.values())}
    total |= {"us": sum(r["us"] for r in found), "floor": sum(r.get("floor", 0) for r in found)}
    return [*found, total | {"share": total["floor"] / total["us"]}]


def captured(model: gptoss.GPTOSS, prompts: list[list[int]]) -> torch.cuda.CUDAGraph:
    """The decode step after these prompts, its inputs in place."""
    engine = model.engine(prompts, 2 * REPLAYS, stop_tokens=())
    while len(engine.running) < len(prompts):
        engine.step()
    with torch.inference_mode():
        graph = gptoss.DecodeGraph.of(engine, engine.running)
        graph.load(engine.running)
    return graph.graph


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", choices=bench.SIZES, nargs="+", default=bench.SIZES)
    parser.add_argument("--concurrency", type=bench.positive, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=bench.positive, default=512)
    parser.add_argument("--json", action="store_true", help="print JSON instead of tables")
    args = parser.parse_args()
    gptoss.hush_other_ranks()
    if not torch.cuda.is_available():
        print("profile_step: PyTorch sees no GPU", file=sys.stderr)
        return 1
    ranks, device = gptoss.Ranks.join("cuda"), torch.device("cuda")
    bandwidth = bench.copy_bandwidth(device)
    for size in args.model:
        checkpoint = weights.random(weights.published(size), "openai", device, 0, ranks.shard)
        model = gptoss.GPTOSS(checkpoint, device, ranks=ranks)
        for concurrency in args.concurrency:
            found = rows(model, concurrency, args.context, bandwidth)
            if args.json:
                what = {"model": size, "concurrency": concurrency, "context": args.context}
                print(json.dumps(what | {"rows": found}), flush=True)
            else:
                print(f"\n{size}, {concurrency} x {args.context} tokens\n")
                print(bench.table(COLUMNS, found), flush=True)
        del model, checkpoint
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
