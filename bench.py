"""How fast it is, from end to end.

    python bench.py                                   tiny/ on the CPU
    python bench.py --checkpoint random:20b           made-up weights of the true shapes, on a GPU
    python bench.py --ab page_size=16,64              two settings alternating, and their ratios
    python bench.py --peer transformers               the same against Hugging Face transformers
    torchrun --nproc-per-node 2 bench.py --checkpoint random:120b      a model on two GPUs

A round submits `concurrency` distinct random prompts at once and takes --output greedy tokens of
each; the first round is warm-up, and only its first token is reported: what has not been compiled
yet is compiled before it. TTFT is the time to a request's first token, waiting for the prompts
before it included. TPOT is (t_last - t_first) / (n - 1) of a request. A step is the median interval
between two tokens of a request while all of them decode. The floor is the bytes that a step must
read at the bandwidth of a large copy, measured on the device; of several ranks, what rank 0 reads.

Tables go to stdout, progress and errors to stderr; exit 0, 1 (bad checkpoint, no memory), 2
(usage), 130 (interrupted). --json prints the rows instead; times are ms unless named otherwise.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import math
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch.utils import benchmark

import gptoss
import weights
from gptoss import GPTOSS, TINY
from weights import CheckpointError, Config

SIZES = ("20b", "120b")  # published
SETTINGS = ("ops", "activations", "dtype", "page_size", "max_batch")  # that --ab compares


# --------------------------------------------------------------------------------------------------
# Arithmetic: what timestamps say, what a step must read


def steps(requests: list[list[float]]) -> list[float]:
    """The intervals between consecutive tokens while every request of the round decodes."""
    begin, end = max(times[0] for times in requests), min(times[-1] for times in requests)
    pairs = (pair for times in requests for pair in itertools.pairwise(times))
    return [b - a for a, b in pairs if a >= begin and b <= end]


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank: of fewer than 100 values, p99 is the largest."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def summary(rounds: list[list[list[float]]]) -> dict:
    """Rounds of requests of timestamps (seconds since the round began) -> a row's figures, ms.
    `tpot_low` and `tpot_high` are the smallest and largest median of a round."""
    requests = [times for requests in rounds for times in requests]
    first = [1e3 * times[0] for times in requests]
    each = [
        [1e3 * (times[-1] - times[0]) / (len(times) - 1) for times in requests]
        for requests in rounds
    ]
    medians = [statistics.median(tpots) for tpots in each]
    rest = [tpot for tpots in each for tpot in tpots]
    speed = [sum(map(len, requests)) / max(times[-1] for times in requests) for requests in rounds]
    gaps = [gap for requests in rounds for gap in steps(requests)]
    return {
        "requests": len(requests),
        "ttft": statistics.median(first),
        "ttft_p99": percentile(first, 99),
        "tpot": statistics.median(rest),
        "tpot_p99": percentile(rest, 99),
        "tpot_low": min(medians),
        "tpot_high": max(medians),
        "step": 1e3 * statistics.median(gaps) if gaps else None,
        "tokens_per_s": statistics.median(speed),
    }


def nbytes(thing) -> int:
    """Bytes of a tensor, or of all tensors in a dataclass."""
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.itemsize
    return sum(map(nbytes, vars(thing).values())) if dataclasses.is_dataclass(thing) else 0


def met_experts(model: GPTOSS, prompts: list[list[int]]) -> float:
    """Distinct experts a layer, in the mean, that a decode step after these prompts reads."""
    engine, ops, met = model.engine(prompts, 2, stop_tokens=()), model.ops, []

    def moe(x, router_weight, router_bias, packed, top_k, *rest):
        met.append(len(gptoss.gating(x, router_weight, router_bias, top_k).chosen.unique()))
        return ops.moe(x, router_weight, router_bias, packed, top_k, *rest)

    while engine.waiting or engine.prefilling:
        engine.step()
    model.ops = ops._replace(moe=moe, capturable=False)
    engine.step()
    model.ops = ops
    return statistics.mean(met)


def step_bytes(model: GPTOSS, tokens: int, context: int, active: float) -> float:
    """Bytes that a decode step must read, each once: `tokens` sequences with `context` tokens each
    in the cache. As the model stores them: `active` experts a layer, all else of every layer, the
    unembedding, a row of the embedding per token, and the keys and values that are visible."""
    c, total = model.config, nbytes(model.unembedding) + nbytes(model.norm)
    total += tokens * c.hidden_size * model.embedding.itemsize
    for layer in model.layers:
        experts = nbytes(layer.packed)
        total += nbytes(layer) - experts + experts * active / c.num_local_experts
        seen = min(context, c.sliding_window) if layer.kind == "sliding_attention" else context
        total += tokens * seen * 2 * c.num_key_value_heads * c.head_dim * model.embedding.itemsize
    return total


# --------------------------------------------------------------------------------------------------
# Systems: what is timed, and on what


@dataclasses.dataclass
class System:
    """Something that generates. stream(prompts, n) yields (prompt index, token), n tokens of each
    prompt."""

    name: str
    stream: Callable[[list[list[int]], int], Iterator[tuple[int, int]]]
    model: GPTOSS | None = None  # None: a peer


def device_name(device: torch.device) -> str:
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of the best of 30 large copies on the device: other programs can
    slow many of them."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    tensors = {"source": source, "target": torch.zeros_like(source)}
    threads = torch.get_num_threads()
    timer = benchmark.Timer("target.copy_(source)", globals=tensors, num_threads=threads)
    repeats = 20 if device.type == "cuda" else 1  # a GPU's copies are short
    return 2 * source.numel() / min(timer.timeit(repeats).mean for _ in range(30))


def build(args, device: torch.device, ranks: gptoss.Ranks) -> list[System]:
    """The systems that the command line asks for."""
    if args.peer and not ranks.alone:
        raise ValueError("--peer runs in one process: leave out torchrun")
    systems = []
    for name, v in args.variants.items():
        if args.checkpoint.startswith("random:"):
            size = args.checkpoint.removeprefix("random:")
            config = weights.load(TINY).config if size == "tiny" else weights.published(size)
            checkpoint = weights.random(config, "openai", device, args.seed, ranks.shard)
        else:
            checkpoint = weights.load(args.checkpoint, ranks.shard)
        dtype = getattr(torch, v.dtype) if v.dtype else None
        model = GPTOSS(checkpoint, device, dtype, v.ops, v.activations, ranks)
        stream = functools.partial(
            model.stream, stop_tokens=(), page_size=v.page_size, max_batch=v.max_batch
        )
        systems.append(System(name, stream, model))
    if args.peer:
        systems.append(transformers_peer(args.checkpoint, checkpoint.config, systems[0].model))
    return systems


def transformers_peer(checkpoint: str, config: Config, ours: GPTOSS) -> System:
    """Hugging Face transformers: the same checkpoint with its experts unpacked, or random weights
    of its own. All prompts, of one length, are one batch."""
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    if checkpoint.startswith("random:"):
        values = {k: list(v) if isinstance(v, tuple) else v for k, v in vars(config).items()}
        theirs = GptOssConfig(
            **{k: v for k, v in values.items() if not k.startswith("rope")},
            rope_parameters={
                "rope_type": "yarn",
                "rope_theta": config.rope_theta,
                "factor": config.rope_factor,
                "beta_fast": config.rope_beta_fast,
                "beta_slow": config.rope_beta_slow,
                "truncate": False,
                "original_max_position_embeddings": config.initial_context_length,
            },
        )
        with torch.device(ours.device):
            model = GptOssForCausalLM._from_config(theirs, dtype=ours.dtype)
        for parameter in model.parameters():
            parameter.data.normal_(0, 0.02)
    else:
        quantised = "quantization_config" in weights.read_json(Path(checkpoint) / "config.json")
        options = {"quantization_config": Mxfp4Config(dequantize=True)} if quantised else {}
        model = GptOssForCausalLM.from_pretrained(checkpoint, dtype=ours.dtype, **options)
    model = model.to(ours.device).eval()

    @torch.inference_mode()
    def stream(prompts, count):
        tokens, past = torch.tensor(prompts, device=ours.device), None
        for _ in range(count):
            out = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)  # [S, 1]
            yield from enumerate(tokens[:, 0].tolist())

    return System("transformers", stream)


# --------------------------------------------------------------------------------------------------
# Measuring


def play(system: System, prompts: list[list[int]], count: int) -> list[list[float]]:
    """One round -> when each token of each prompt came, in seconds since they were submitted."""
    times = [[] for _ in prompts]
    start = time.perf_counter()
    for index, _ in system.stream(prompts, count):
        times[index].append(time.perf_counter() - start)
    if {len(t) for t in times} != {count}:
        raise ValueError(f"{system.name} did not give {count} tokens of every prompt")
    return times


def measure(args, systems: list[System], bandwidth: float) -> tuple[list[dict], list[dict]]:
    """Systems alternate within a round (A B, B A, ...); every round has new prompts. -> a row for
    each system and concurrency, and the ratios of paired rounds."""
    draw, vocabulary = random.Random(args.seed), range(systems[0].model.config.vocab_size)
    rows, pairs = [], []
    for concurrency in args.concurrency:
        played = [[] for _ in systems]
        for n in weights.progress(range(args.rounds + 1), f"concurrency {concurrency}"):
            prompts = [draw.choices(vocabulary, k=args.input) for _ in range(concurrency)]
            for system, rounds in list(zip(systems, played, strict=True))[:: -1 if n % 2 else 1]:
                rounds.append(play(system, prompts, args.output))
        cold = [1e3 * min(times[0] for times in rounds[0]) for rounds in played]
        played = [rounds[1:] for rounds in played]  # without the warm-up
        for system, rounds, first in zip(systems, played, cold, strict=True):
            row = {"system": system.name, "concurrency": concurrency} | summary(rounds)
            row["ttft_cold"] = first
            if system.model and row["step"]:
                # The cache grows from input to input + output tokens: its mean.
                active = met_experts(system.model, prompts)
                size = step_bytes(system.model, concurrency, args.input + args.output // 2, active)
                row |= {"experts": active, "step_bytes": size, "floor": 1e3 * size / bandwidth}
                row["share"] = row["floor"] / row["step"]
            rows.append(row)
        if len(systems) == 2:
            a, b = ([summary([requests]) for requests in rounds] for rounds in played)
            for figure in ("ttft", "tpot"):
                ratios = [right[figure] / left[figure] for left, right in zip(a, b, strict=True)]
                pair = {"concurrency": concurrency, "figure": figure.upper()}
                pair |= {"ratio": statistics.median(ratios)}
                pairs.append(pair | {"lowest": min(ratios), "highest": max(ratios)})
    return rows, pairs


def table(columns: list[tuple[str, str, str]], rows: list[dict]) -> str:
    """Markdown. Columns are (header, key, format); a value that a row lacks is -."""
    lines = [[header for header, *_ in columns], ["---"] * len(columns)]
    lines += [
        [format(row[key], form) if row.get(key) is not None else "-" for _, key, form in columns]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


COLUMNS = [
    ("system", "system", ""),
    ("concurrency", "concurrency", "d"),
    ("TTFT ms, median", "ttft", ".1f"),
    ("p99", "ttft_p99", ".1f"),
    ("of the warm-up", "ttft_cold", ",.0f"),
    ("TPOT ms, median", "tpot", ".2f"),
    ("lowest round", "tpot_low", ".2f"),
    ("highest", "tpot_high", ".2f"),
    ("p99", "tpot_p99", ".2f"),
    ("step ms", "step", ".2f"),
    ("output tok/s", "tokens_per_s", ".1f"),
    ("experts a layer", "experts", ".1f"),
    ("bytes a step", "step_bytes", ",.0f"),
    ("floor ms", "floor", ".3f"),
    ("floor / step", "share", ".1%"),
]
PAIR_COLUMNS = [
    ("paired ratio of", "figure", ""),
    ("concurrency", "concurrency", "d"),
    ("median", "ratio", ".3f"),
    ("lowest", "lowest", ".3f"),
    ("highest", "highest", ".3f"),
]


# --------------------------------------------------------------------------------------------------
# Command line


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Time GPT-OSS inference.", allow_abbrev=False)
    parser.error = lambda message: parser.exit(2, f"bench: {message}\n")  # without the usage
    add = parser.add_argument
    where = "folder (default: tiny/), or weights made on the device: random:20b, :120b or :tiny"
    add("--checkpoint", default=TINY, metavar="DIR", help=where)
    add("--device", help="default: cuda where there is one and --checkpoint is given, else cpu")
    add("--dtype", choices=("float32", "bfloat16"), help="default: the engine's")
    add("--ops", default="auto", choices=gptoss.OPS)
    add("--activations", default="auto", choices=("auto", *gptoss.ACTIVATIONS))
    add("--page-size", default=gptoss.PAGE_SIZE, type=positive, metavar="TOKENS")
    add("--max-batch", default=gptoss.MAX_BATCH, type=positive, metavar="N")
    add("--concurrency", default="1,8", metavar="N,..", help="prompts at once (default: 1,8)")
    add("--input", default=512, type=positive, metavar="N", help="tokens a prompt (default: 512)")
    add("--output", default=128, type=positive, metavar="N", help="new ones (default: 128)")
    add("--rounds", default=5, type=positive, metavar="N", help="after the warm-up (default: 5)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and weights (default: 0)")
    versus = parser.add_mutually_exclusive_group().add_argument
    versus("--ab", metavar="SETTING=A,B", help=f"compare two values of {', '.join(SETTINGS)}")
    versus("--peer", choices=("transformers",), help="compare with another implementation")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


def parse(argv: list[str]) -> argparse.Namespace:
    """The command line, with `variants`: name of each system of ours -> its settings."""
    parser = arguments()
    args = parser.parse_args(argv)
    settings = dict(vars(args))
    if args.output == 1:
        parser.error("--output 1 leaves nothing to time after the first token")
    if args.checkpoint.startswith("random:") and args.checkpoint[7:] not in (*SIZES, "tiny"):
        parser.error(f"--checkpoint {args.checkpoint}: random: takes {', '.join(SIZES)} or tiny")
    try:
        args.concurrency = [positive(text) for text in args.concurrency.split(",")]
    except argparse.ArgumentTypeError as error:
        parser.error(f"--concurrency: {error}")
    args.settings, args.variants = settings, {"gptoss": args}
    if args.ab:  # the same command line twice, with one option more
        name, _, values = args.ab.partition("=")
        a, *rest = values.split(",")
        if name not in SETTINGS or len(rest) != 1 or a == rest[0]:
            expected = f"SETTING=A,B, with a SETTING of {', '.join(SETTINGS)}"
            parser.error(f"--ab {args.ab}: expected {expected}")
        option = f"--{name.replace('_', '-')}"
        args.variants = {
            f"{name}={value}": parser.parse_args([*argv, option, value]) for value in (a, *rest)
        }
    return args


def one_line(error: BaseException, args: argparse.Namespace) -> str:
    """What went wrong and, where memory ran out, what to do."""
    text = str(error).strip() or type(error).__name__
    # PyTorch has no exception of its own for a CPU without memory.
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in text:
        return (
            f"out of memory with --checkpoint {args.checkpoint}: lower --concurrency or --input, "
            "or use a larger --device"
        )
    return text.splitlines()[0]


def main(argv: list[str]) -> int:
    gptoss.hush_other_ranks()
    args, ranks = parse(argv), gptoss.Ranks()
    cuda = torch.cuda.is_available() and args.checkpoint != TINY
    try:
        name = args.device or ("cuda" if cuda else "cpu")
        device, ranks = torch.device(name), gptoss.Ranks.join(name)
        start = time.perf_counter()
        systems = build(args, device, ranks)
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # weights may still be drawn or packed
        loaded, pages = time.perf_counter() - start, systems[0].model.pages_that_fit(args.page_size)
        bandwidth = copy_bandwidth(device)
        rows, pairs = measure(args, systems, bandwidth)
    except (CheckpointError, ValueError, ImportError, OSError, RuntimeError, MemoryError) as error:
        ranks.fail(f"bench: {one_line(error, args)}")
        return 1
    except KeyboardInterrupt:
        print("bench: interrupted", file=sys.stderr)
        return 130
    if args.json:
        versions = {"device": device_name(device), "torch": torch.__version__}
        result = versions | {"ranks": ranks.shard.ranks, "settings": args.settings}
        result |= {"loaded_s": loaded, "cache_pages": pages, "bandwidth": bandwidth}
        print(json.dumps(result | {"rows": rows, "pairs": pairs}))
    else:
        print(
            f"{Path(args.checkpoint).name}; {ranks.shard.ranks} x {device_name(device)}, torch "
            f"{torch.__version__}; {args.input} tokens in, {args.output} out, greedy; "
            f"{args.rounds} rounds after one of warm-up; loaded in {loaded:.1f} s; the memory left "
            f"caches {pages:,} pages, {pages * args.page_size:,} tokens\n\n"
            f"{table(COLUMNS, rows)}\n\nA large copy reads and writes {bandwidth / 1e9:.1f} GB/s."
        )
        if pairs:
            print(f"\n{systems[1].name} / {systems[0].name}, round by round:\n")
            print(table(PAIR_COLUMNS, pairs))
    ranks.leave()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
