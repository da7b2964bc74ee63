"""Times an all-reduce in a graph, the sum of a layer's partial sums over the ranks of a model.

    torchrun --nproc-per-node 2 tools/bench_allreduce.py            [rows, 2880] in bfloat16
    torchrun --nproc-per-node 2 tools/bench_allreduce.py --rows 1 8 --columns 201088

NCCL's (or RCCL's); PyTorch's symmetric memory, one_shot_all_reduce, where each GPU reads the other
ones' partial sums, alone and with the copy into the buffer that they read; ops_triton.sum_norm,
which adds the residual and norms as well, and add_norm, which follows any of the others, both of
hidden states only. us: a call
of a graph of 100, the median of 20 replays, on rank 0. On a CPU the calls are timed as they are,
through gloo. The table goes to stdout, errors to stderr; exit 0 or 1."""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))
import gptoss
from bench import table

CALLS, ROUNDS = 100, 20
NORM_COLUMNS = 8192  # more are logits, which are summed and not normed


def us(call: Callable, cuda: bool) -> float:
    """Of one call."""
    for _ in range(3):  # makes connections
        call()
    if not cuda:
        start = time.perf_counter()
        for _ in range(CALLS):
            call()
        return 1e6 * (time.perf_counter() - start) / CALLS
    torch.cuda.synchronize()
    graph, times = torch.cuda.CUDAGraph(), []
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):
        for _ in range(CALLS):
            call()
    for n in range(3 + ROUNDS):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        graph.replay()
        end.record()
        torch.cuda.synchronize()
        if n >= 3:
            times.append(1e3 * start.elapsed_time(end) / CALLS)
    return statistics.median(times)


def measure(ranks: gptoss.Ranks, rows: int, columns: int, device: str) -> dict:
    """A row of the table."""
    partial = torch.zeros(rows, columns, dtype=torch.bfloat16, device=device)
    row = {"rows": rows, "kB": partial.nbytes / 1e3}
    row["nccl"] = us(lambda: dist.all_reduce(partial), partial.is_cuda)
    if ranks.linked:
        from torch.distributed import _symmetric_memory as symmetric_memory

        import ops_triton

        name = dist.group.WORLD.group_name
        seen = symmetric_memory.empty(rows, columns, dtype=partial.dtype, device=partial.device)
        symmetric_memory.rendezvous(seen, dist.group.WORLD)

        def one_shot() -> None:
            torch.ops.symm_mem.one_shot_all_reduce(seen, "sum", name)

        def copied() -> None:
            seen.copy_(partial)
            one_shot()

        row |= {"one_shot": us(one_shot, True), "copied": us(copied, True)}
        if columns > NORM_COLUMNS:
            return row
        x, scale = torch.zeros_like(partial), torch.ones(columns, device=partial.device)
        row["add_norm"] = us(lambda: ops_triton.add_norm(x, partial, scale, 1e-5), True)
        if rows <= gptoss.MAX_BATCH:
            peers = ops_triton.meet(*ranks.shard, rows, columns, partial.device)
            row["sum_norm"] = us(lambda: ops_triton.sum_norm(x, partial, scale, 1e-5, peers), True)
    return row


def main() -> int:
    gptoss.hush_other_ranks()
    parser = argparse.ArgumentParser(description="Time an all-reduce.", allow_abbrev=False)
    rows = [1, 8, 16, 32, 64, 128, 512, 2048]
    parser.add_argument("--rows", type=int, nargs="+", default=rows, metavar="N")
    parser.add_argument("--columns", type=int, default=2880, metavar="N")
    parser.add_argument(
        "--device", choices=("cpu", "cuda"), help="default: cuda where there is one"
    )
    args, ranks = parser.parse_args(), gptoss.Ranks()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        ranks = gptoss.Ranks.join(device)
        if ranks.alone:
            raise ValueError("one rank has nothing to sum: torchrun --nproc-per-node 2 ...")
        measured = [measure(ranks, n, args.columns, device) for n in args.rows]
    except (ValueError, RuntimeError) as error:
        ranks.fail(f"bench_allreduce: {str(error).splitlines()[0]}")
        return 1
    kinds = ("NCCL", "nccl"), ("one shot", "one_shot"), ("with its copy", "copied")
    columns = [("rows", "rows", "d"), ("kB", "kB", ",.1f")]
    kinds += ("add_norm", "add_norm"), ("sum_norm", "sum_norm")
    columns += [(f"{header} us", key, ".1f") for header, key in kinds]
    where = torch.cuda.get_device_name() if device == "cuda" else "CPUs, gloo in NCCL's place"
    system = f"{ranks.shard.ranks} ranks, {where}, torch {torch.__version__}"
    print(f"{system}, bfloat16, {args.columns} columns\n\n{table(columns, measured)}")
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main())
