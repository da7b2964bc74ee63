"""How fast it is: the engine from end to end, and the MoE kernels beside what an MI355 could do.

    python bench.py                                         tiny/ on the CPU: TTFT, TPOT, bytes a step, bandwidth
    python bench.py --checkpoint random:20b --device cuda   random weights of the true shapes, made on the device
    python bench.py --ab page_size=16,64                    two settings alternating, and the ratios of their rounds
    python bench.py --checkpoint DIR --peer transformers    the same against another implementation
    python bench.py --profile                               where the time of a decode step goes, by operator
    python bench.py --kernels                               one MoE layer's gfx950 kernels, 1 to 8192 tokens

A round submits `concurrency` distinct random prompts at once and takes --output greedy tokens of
each, stop tokens included; the first round is warm-up and left out. TTFT contains waiting for the
prompts before, TPOT = (t_last - t_first) / (n - 1) for the prefill of those behind. A step is the
median interval between two tokens of a request while all decode, which they never do where --ab
max_batch keeps them apart.

Tables go to stdout, progress and errors to stderr; exit 0, 1 (bad checkpoint, no memory), 2
(usage). --json prints the rows of the tables instead, with the keys in *_COLUMNS; times are ms
unless named otherwise."""

import argparse
import collections
import dataclasses
import functools
import itertools
import json
import math
import os
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
from gptoss import GPTOSS, KVCache
from weights import Checkpoint, CheckpointError, Config, Experts

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny")
SIZES = {"20b": (24, 32), "120b": (36, 128)}  # layers, experts; all else is equal
PROFILED_STEPS, PROFILE_ROWS = 8, 15

# MI355X (AMD's data sheet): bytes/s, and dense FLOP/s by the wider operand of the matrix
# instruction
MI355_BANDWIDTH = 8e12
MI355_FLOPS = {"bf16": 2.5e15, "fp8": 5.0e15, "mxfp8": 5.0e15, "mxfp4": 10.1e15}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 512, 1024, 4096, 8192)  # tokens of a layer
EMULATED = 16  # the largest of them that is emulated
# TokenSpeed's README (https://github.com/lightseekorg/tokenspeed, read off its plot): us of a 120b
# layer with fp8 activations through its Gluon kernels on one MI355X, and how many experts its
# tokens met
PUBLISHED = {
    "20b": {},
    "120b": {
        1: (25.9, 4),
        2: (33.4, 8),
        4: (50.8, 15),
        8: (102, 31),
        16: (160, 53),
        512: (376, 128),
        1024: (424, 128),
        4096: (821, 128),
        8192: (1373, 128),
    },
}
SETTINGS = ("moe", "activations", "dtype", "page_size", "max_batch")  # that --ab compares


# --------------------------------------------------------------------------------------------------
# Arithmetic: what timestamps say, what a step must read


def steps(requests: list[list[float]]) -> list[float]:
    """The intervals between consecutive tokens while every request of the round decodes."""
    begin, end = max(times[0] for times in requests), min(times[-1] for times in requests)
    return [
        b - a for times in requests for a, b in itertools.pairwise(times) if a >= begin and b <= end
    ]


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank: of fewer than 100 values, p99 is the largest."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def summary(rounds: list[list[list[float]]]) -> dict:
    """Rounds of requests of timestamps (seconds since the round began) -> the figures of a row,
    ms."""
    requests = [times for requests in rounds for times in requests]
    first = [1e3 * times[0] for times in requests]
    rest = [1e3 * (times[-1] - times[0]) / (len(times) - 1) for times in requests]
    speed = [sum(map(len, requests)) / max(times[-1] for times in requests) for requests in rounds]
    gaps = [gap for requests in rounds for gap in steps(requests)]
    return {
        "requests": len(requests),
        "ttft": statistics.median(first),
        "ttft_p99": percentile(first, 99),
        "tpot": statistics.median(rest),
        "tpot_p99": percentile(rest, 99),
        "step": 1e3 * statistics.median(gaps) if gaps else None,
        "tokens_per_s": statistics.median(speed),
    }


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose, on average, if they choose evenly and
    independently."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def nbytes(thing) -> int:
    """Bytes of a tensor, or of all tensors in a dataclass."""
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.itemsize
    return sum(map(nbytes, vars(thing).values())) if dataclasses.is_dataclass(thing) else 0


def step_bytes(model: GPTOSS, tokens: int, context: int) -> float:
    """Bytes that a decode step must read, each once: `tokens` sequences with `context` tokens each
    in the cache. As the model stores them: the expected active experts, all else of every layer,
    the unembedding, a row of the embedding per token, and the keys and values that are visible."""
    c, total = model.config, nbytes(model.unembedding) + nbytes(model.norm)
    total += tokens * c.hidden_size * model.embedding.itemsize
    active = expected_experts(c.num_local_experts, c.num_experts_per_tok, tokens)
    for layer in model.layers:
        experts = nbytes(layer.experts)
        total += nbytes(layer) - experts + experts * active / c.num_local_experts
        seen = min(context, c.sliding_window) if layer.kind == "sliding_attention" else context
        total += tokens * seen * 2 * c.num_key_value_heads * c.head_dim * model.embedding.itemsize
    return total


# --------------------------------------------------------------------------------------------------
# The device, and random models made on it


def device_name(device: torch.device) -> str:
    cpu = f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    return torch.cuda.get_device_name(device) if device.type == "cuda" else cpu


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of the best of 30 large copies on the device: other programs can
    slow many of them."""
    source = torch.ones(1 << 28, dtype=torch.uint8, device=device)
    tensors = {"source": source, "target": torch.zeros_like(source)}
    timer = benchmark.Timer(
        "target.copy_(source)", globals=tensors, num_threads=torch.get_num_threads()
    )
    repeats = 20 if device.type == "cuda" else 1  # a GPU's copies are short
    return 2 * source.numel() / min(timer.timeit(repeats).mean for _ in range(30))


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation can have; of a CPU's without /proc, all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if os.path.exists("/proc/meminfo"):
        return 1024 * int(
            Path("/proc/meminfo").read_text().partition("MemAvailable:")[2].split()[0]
        )
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def random_config(size: str) -> dict:
    """A config.json: of tiny/, or with the published constants of the 20b or the 120b."""
    raw = weights.read_json(Path(TINY) / "config.json")
    del raw["quantization_config"]
    if size == "tiny":
        return raw
    layers, experts = SIZES[size]
    yarn = raw["rope_scaling"] | {"original_max_position_embeddings": 4096}
    return raw | {
        "num_hidden_layers": layers,
        "num_local_experts": experts,
        "vocab_size": 201088,
        "hidden_size": 2880,
        "intermediate_size": 2880,
        "head_dim": 64,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "sliding_window": 128,
        "initial_context_length": 4096,
        "max_position_embeddings": 131072,
        "rope_scaling": yarn,
        "layer_types": ["sliding_attention", "full_attention"] * (layers // 2),
    }


def random_checkpoint(config: Config, device, layout: str = "openai") -> Checkpoint:
    """A checkpoint that was never on a disk, made on `device` as it is stored: mxfp4 experts as
    bytes, all else bf16. Of the layout hf-bf16 only the experts are of use: it splits q, k and
    v."""
    tensors, experts = {}, []
    for layer in weights.progress((None, *range(config.num_hidden_layers)), "random weights"):
        for stored in weights.tensors_of(config, layout, layer):
            dtype = torch.uint8 if "U8" in stored.dtypes else torch.bfloat16
            tensor = tensors[stored.ours] = torch.empty(stored.shape, dtype=dtype, device=device)
            if (
                "scale" in stored.ours
            ):  # 2^-9 to 2^-5: products of 2880 stay of the order of their inputs
                tensor.random_(118, 123)
            elif dtype == torch.uint8:
                tensor.random_(0, 256)
            else:
                tensor.fill_(1) if "norm" in stored.ours else tensor.normal_(0, 0.02)
        if layer is not None:
            fields = {
                f.name: tensors.pop(f"{layer}.{f.name}", None) for f in dataclasses.fields(Experts)
            }
            experts.append(weights.as_experts(layout, fields))
    return Checkpoint(config, layout, tensors, experts)


# --------------------------------------------------------------------------------------------------
# Systems: what is timed


@dataclasses.dataclass
class System:
    """Something that generates. stream(prompts, n) yields (prompt index, token), n tokens of each
    prompt."""

    name: str
    stream: Callable[[list[list[int]], int], Iterator[tuple[int, int]]]
    model: GPTOSS | None = None  # None: a peer


def memory(c: Config, layout: str, dtype: torch.dtype, args) -> dict[str, float]:
    """Bytes, by part, of the engine at its largest concurrency, and of the peer, whose experts are
    not packed."""
    experts = 3 * c.num_hidden_layers * c.num_local_experts * c.hidden_size * c.intermediate_size
    of_expert = (
        4 if 4 * experts <= gptoss.EXPAND_BELOW else 2 if layout == "hf-bf16" else 17 / 32
    )  # bytes a value
    dense = sum(
        math.prod(stored.shape)
        for layer in (None, *range(c.num_hidden_layers))
        for stored in weights.tensors_of(c, "openai", layer)
        if "U8" not in stored.dtypes
    )
    pages = sum(gptoss.pages_needed(c, args.input + args.output, gptoss.PAGE_SIZE).values())
    cache = KVCache(c, max(args.concurrency) * pages, gptoss.PAGE_SIZE, "meta", dtype)
    # 20 bytes, two masks and three float32 copies, a score of a prompt's chunk, whose keys are up
    # to two chunks; three float32 copies of an expert's first weight
    scores = min(2 * c.num_attention_heads * args.input**2, 2 * gptoss.PREFILL_SCORES)
    parts = {
        "weights": dense * dtype.itemsize + experts * of_expert,
        "KV cache": nbytes(cache.pool),
        "working memory": 20 * scores + 4 * 3 * 2 * c.intermediate_size * c.hidden_size,
    }
    return parts | ({args.peer: (dense + experts) * dtype.itemsize} if args.peer else {})


def build(args, device: torch.device) -> list[System]:
    """The systems that the command line asks for. That they fit the device is checked before a
    weight is loaded."""
    path, random_size = (
        Path(args.checkpoint),
        args.checkpoint.startswith("random:") and args.checkpoint[7:],
    )
    raw = random_config(random_size) if random_size else weights.read_json(path / "config.json")
    config = Config.from_dict(raw, str(path / "config.json"))
    layout = "random" if random_size else weights.decide_layout(path, raw, weights.find_files(path))
    make_peer, layouts = PEERS.get(args.peer, (None, (layout,)))
    if layout not in layouts:
        raise ValueError(
            f"--peer {args.peer} loads {', '.join(layouts)}; {args.checkpoint} is {layout}"
        )
    default = torch.float32 if device.type == "cpu" else torch.bfloat16
    variants = {
        name: (getattr(torch, v.dtype or "", default), v.moe, v.activations)
        for name, v in args.variants.items()
    }
    distinct, parts = set(variants.values()), collections.Counter()
    for dtype, *_ in distinct:
        parts.update(memory(config, layout, dtype, args))
    needed, free = sum(parts.values()), free_bytes(device)
    if needed > free:
        pieces = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items())
        raise ValueError(
            f"{path} needs {needed / 1e9:.1f} GB on {device} ({pieces}), {free / 1e9:.1f} GB are free"
        )

    torch.manual_seed(args.seed)
    peers = [make_peer(args.checkpoint, raw, device, dtype)] if make_peer else []
    checkpoint = random_checkpoint(config, device) if random_size else weights.load(path)
    models = {variant: GPTOSS(checkpoint, device, *variant) for variant in distinct}
    return [
        System(
            name,
            functools.partial(
                models[variants[name]].stream, page_size=v.page_size, max_batch=v.max_batch
            ),
            models[variants[name]],
        )
        for name, v in args.variants.items()
    ] + peers


def randomise(model: torch.nn.Module):
    for parameter in model.parameters():
        parameter.data.normal_(0, 0.02)


def transformers_peer(checkpoint: str, raw: dict, device, dtype) -> System:
    """Hugging Face transformers: the same checkpoint, its mxfp4 experts in `dtype`, or random
    weights of its own. All prompts, of one length, are one batch."""
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config

    if checkpoint.startswith("random:"):
        with torch.device(device):
            model = GptOssForCausalLM._from_config(GptOssConfig(**raw), dtype=dtype)
        randomise(model)
    else:
        options = (
            {"quantization_config": Mxfp4Config(dequantize=True)}
            if "quantization_config" in raw
            else {}
        )
        model = GptOssForCausalLM.from_pretrained(checkpoint, dtype=dtype, **options).to(device)
    model.eval()

    @torch.inference_mode()
    def stream(prompts, count):
        tokens, past = torch.tensor(prompts, device=device), None
        for _ in range(count):
            out = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)  # [S, 1]
            yield from enumerate(tokens[:, 0].tolist())

    return System("transformers", stream)


def openai_peer(checkpoint: str, raw: dict, device, dtype) -> System:
    """OpenAI's reference, gpt_oss.torch, in bf16. It has neither a KV cache nor batches: every
    token recomputes its sequence, and the sequences take turns."""
    from gpt_oss.torch.model import ModelConfig, Transformer

    if checkpoint.startswith("random:"):
        # YaRN's constants are named otherwise; theirs by default are the published ones
        values = raw | {
            "num_experts": raw["num_local_experts"],
            "experts_per_token": raw["num_experts_per_tok"],
        }
        values = {
            field.name: values[field.name]
            for field in dataclasses.fields(ModelConfig)
            if field.name in values
        }
        model = Transformer(ModelConfig(**values), device)
        randomise(model)
    else:
        model = Transformer.from_checkpoint(checkpoint, device=device)

    @torch.inference_mode()
    def stream(prompts, count):
        sequences = [list(prompt) for prompt in prompts]
        for _ in range(count):
            for index, sequence in enumerate(sequences):
                sequence.append(model(torch.tensor(sequence, device=device))[-1].argmax().item())
                yield index, sequence[-1]

    return System("openai", stream)


PEERS = {
    "transformers": (
        transformers_peer,
        ("hf-mxfp4", "hf-bf16", "random"),
    ),  # and the layouts that it loads
    "openai": (openai_peer, ("openai", "random")),
}


# --------------------------------------------------------------------------------------------------
# End to end


def play(system: System, prompts: list[list[int]], count: int) -> list[list[float]]:
    """One round -> when each token of each prompt came, in seconds since the prompts were
    submitted."""
    times = [[] for _ in prompts]
    start = time.perf_counter()
    for index, _ in system.stream(prompts, count):
        times[index].append(time.perf_counter() - start)
    assert {len(t) for t in times} == {count}, (
        f"{system.name} did not give {count} tokens of every prompt"
    )
    return times


def table(columns: list[tuple[str, str, str]], rows: list[dict]) -> str:
    """Markdown. Columns are (header, key, format); one that no row has is left out, a value that a
    row lacks is -."""
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [[header for header, *_ in columns], ["---"] * len(columns)]
    lines += [
        [format(row[key], form) if row.get(key) is not None else "-" for _, key, form in columns]
        for row in rows
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LATENCY_COLUMNS = [
    ("system", "system", ""),
    ("concurrency", "concurrency", "d"),
    ("requests", "requests", "d"),
    ("TTFT ms, median", "ttft", ".1f"),
    ("p99", "ttft_p99", ".1f"),
    ("TPOT ms, median", "tpot", ".2f"),
    ("p99", "tpot_p99", ".2f"),
    ("step ms, median", "step", ".2f"),
    ("output tok/s", "tokens_per_s", ".1f"),
    ("bytes a step", "step_bytes", ",.0f"),
    ("floor ms", "floor", ".3f"),
    ("share of bandwidth", "share", ".1%"),
]
PAIR_COLUMNS = [
    ("paired ratio of", "measure", ""),
    ("concurrency", "concurrency", "d"),
    ("median", "ratio", ".3f"),
    ("lowest", "lowest", ".3f"),
    ("highest", "highest", ".3f"),
]


def latency(args, device: torch.device) -> tuple[dict, list[str]]:
    """The end-to-end mode: systems alternate within a round (A B, B A, ...); every round has new
    prompts. -> what --json prints, and the text, as in all modes."""
    systems = build(args, device)
    bandwidth, draw = copy_bandwidth(device), random.Random(args.seed)
    vocabulary = range(systems[0].model.config.vocab_size)
    rows, pairs = [], []
    for concurrency in args.concurrency:
        played = [[] for _ in systems]
        for n in weights.progress(range(args.rounds + 1), f"concurrency {concurrency}"):
            prompts = [draw.choices(vocabulary, k=args.input) for _ in range(concurrency)]
            for system, rounds in list(zip(systems, played, strict=True))[:: -1 if n % 2 else 1]:
                rounds.append(play(system, prompts, args.output))
        played = [rounds[1:] for rounds in played]  # without the warm-up
        for system, rounds in zip(systems, played, strict=True):
            row = {"system": system.name, "concurrency": concurrency} | summary(rounds)
            if (
                system.model and row["step"]
            ):  # the cache grows from input to input + output tokens: its mean
                size = step_bytes(system.model, concurrency, args.input + args.output // 2)
                row |= {"step_bytes": size, "floor": 1e3 * size / bandwidth}
                row["share"] = row["floor"] / row["step"]
            rows.append(row)
        if len(systems) == 2:
            a, b = ([summary([requests]) for requests in rounds] for rounds in played)
            for measure in (
                ("ttft", "tpot", "step") if a[0]["step"] and b[0]["step"] else ("ttft", "tpot")
            ):
                ratios = [right[measure] / left[measure] for left, right in zip(a, b, strict=True)]
                pairs.append(
                    {
                        "systems": [s.name for s in systems],
                        "concurrency": concurrency,
                        "measure": measure,
                        "ratio": statistics.median(ratios),
                        "lowest": min(ratios),
                        "highest": max(ratios),
                    }
                )
    text = [
        f"{Path(args.checkpoint).name}; {device_name(device)}; {args.input} tokens in, {args.output} out, greedy; "
        f"{args.rounds} rounds after one of warm-up",
        table(LATENCY_COLUMNS, rows),
        f"A large copy reads and writes {bandwidth / 1e9:.1f} GB/s. The floor is a step's bytes at that bandwidth; "
        "the share is floor / step.",
    ]
    if pairs:
        text += [
            f"{systems[1].name} / {systems[0].name}, round by round:",
            table(PAIR_COLUMNS, pairs),
        ]
    if args.plot:
        Path(args.plot).write_text(plot(rows))
    return {"bandwidth": bandwidth, "rows": rows, "pairs": pairs}, text


def plot(rows: list[dict]) -> str:
    """TPOT over concurrency as an SVG, ms on a logarithmic axis; dashed: the bandwidth floor."""
    names = {"tpot": "TPOT", "floor": "bandwidth floor"}
    values = [row[key] for row in rows for key in names if key in row]
    scale = 320 / math.log(2 * max(values) / min(values))  # pixels a factor of e
    counts = sorted({row["concurrency"] for row in rows})
    x_of = {count: 60 + 600 * n / len(counts) for n, count in enumerate(counts)}
    out = [
        '<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 900 400" font-family="sans-serif" font-size="12">',
        '<rect width="900" height="400" fill="white"/><text x="20" y="20">ms a token</text>',
    ]
    out += [f'<text x="{x:.0f}" y="390">c = {count}</text>' for count, x in x_of.items()]
    for system, key in itertools.product(dict.fromkeys(row["system"] for row in rows), names):
        shown = [row for row in rows if row["system"] == system and key in row]
        points = [
            (x_of[row["concurrency"]], 350 - scale * math.log(row[key] / min(values)))
            for row in shown
        ]
        path, dash = " ".join(f"{x:.0f},{y:.0f}" for x, y in points), 6 if key == "floor" else 0
        out.append(
            f'<polyline points="{path}" fill="none" stroke="black" stroke-dasharray="{dash}"/>'
        )
        for row, (x, y) in zip(shown, points, strict=True):
            label = f"{system}: {names[key]}" if row is shown[-1] else ""
            out.append(f'<text x="{x:.0f}" y="{y - 6:.0f}">{row[key]:.3g} {label}</text>')
    return "\n".join([*out, "</svg>\n"])


OPERATOR_COLUMNS = [
    ("operator", "operator", ""),
    ("calls a step", "calls", "g"),
    ("us a step", "us", ".1f"),
    ("share", "share", ".1%"),
]


def profile(args, device: torch.device) -> tuple[dict, list[str]]:
    """Mean of a few decode steps of one sequence, by operator. On a GPU an operator's time is its
    kernels', and what is left of a step that was timed without the profiler is the GPU waiting for
    the host; on a CPU it is the operator's own, and what is left is Python, both slower for being
    watched."""
    system, gpu = build(args, device)[0], device.type == "cuda"
    prompt = random.Random(args.seed).choices(range(system.model.config.vocab_size), k=args.input)
    stream = system.stream([prompt], 3 + 2 * PROFILED_STEPS)

    def step_us(count):
        start = time.perf_counter()
        for _ in range(count):
            next(stream)
        return 1e6 * (time.perf_counter() - start) / count

    step_us(3)  # the prompt, and warm-up
    step = step_us(PROFILED_STEPS)
    with torch.profiler.profile() as watched:
        slower = step_us(PROFILED_STEPS)
    step, spent = (step, "self_device_time_total") if gpu else (slower, "self_cpu_time_total")
    events = [
        (
            e.key,
            e.count / PROFILED_STEPS,
            getattr(e, spent) / PROFILED_STEPS,
            e.device_type.name == "CPU",
        )
        for e in watched.key_averages()
    ]
    rows = [(key, count, us) for key, count, us, operator in events if operator and us > 0]
    if gpu:  # Triton launches kernels without an operator
        loose = sum(us for *_, us, operator in events if not operator) - sum(us for *_, us in rows)
        rows.append(("(kernels of no operator)", 0, max(0.0, loose)))
    rows.append(
        ("(the GPU waits)" if gpu else "(Python)", 0, max(0.0, step - sum(us for *_, us in rows)))
    )
    rows = [
        {"operator": key, "calls": count, "us": us, "share": us / step}
        for key, count, us in sorted(rows, key=lambda row: -row[2])
    ]
    shown, rest = rows[:PROFILE_ROWS], rows[PROFILE_ROWS:]
    others = {"operator": f"{len(rest)} others"} | {
        key: sum(row[key] for row in rest) for key in ("us", "share")
    }
    return {"step": step / 1e3, "rows": rows}, [
        f"{Path(args.checkpoint).name}; {device_name(device)}; a decode step of one sequence after {args.input} "
        f"tokens: {step / 1e3:.2f} ms",
        table(OPERATOR_COLUMNS, shown + [others] * bool(rest)),
        "The three biggest: "
        + ", ".join(f"{row['operator']} {row['share']:.0%}" for row in rows[:3]),
    ]


# --------------------------------------------------------------------------------------------------
# Kernels


def layer_floor(config: Config, activations: str, tokens: int, active: int) -> dict:
    """What one MoE layer cannot do without: its active experts' weights (without biases), its FLOP,
    and the us of an MI355 for the slower of the two."""
    values = 3 * config.hidden_size * config.intermediate_size  # of an expert
    size = active * values * 2 if activations == "bf16" else active * values * 17 // 32
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


def tile(moe_gluon, kernel: str, packed) -> str | None:
    """Rows x columns of an expert GEMM's workgroup. No other function knows how moe_gluon describes
    its tiles."""
    if kernel.startswith("prefill_"):
        return "128 x 256"
    if kernel.startswith(("dispatch_", "combine_")):
        g = moe_gluon.gemm(kernel.partition("_")[0], packed)
        return f"{g.BM} x {g.BN}"


def launch_row(gfx950, launch) -> dict:
    """What the compiler made of a kernel, and, if it was emulated, what it did."""
    workgroups = math.prod(launch.grid)
    row = {
        "kernel": launch.name,
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


def triton_kernels_peer(experts, top_k: int) -> Callable:
    """OpenAI's Triton kernels (Triton's repository, python/triton_kernels, as of triton 3.8), with
    static e4m3 activations: with bf16 ones they do not compile for gfx950 in the tiles of up to
    1024 tokens. -> layer(x, router_weight, router_bias) -> [T, H]."""
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

    e4m3, device = torch.float8_e4m3fn, experts.down_bias.device
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
            flex_ctx=FlexCtx(InFlexData(e4m3, seen), out_data=out),
            b_mx_scale=scales,
            b_microblock_size=32,
            out_dtype=out.dtype or torch.bfloat16,
        )

    up, up_config = weight(
        experts.gate_up_weight, experts.gate_up_scale, first, OutFlexData(e4m3, second)
    )
    down, down_config = weight(experts.down_weight, experts.down_scale, second, OutFlexData())
    up_bias, down_bias = experts.gate_up_bias.float(), experts.down_bias.float()
    swiglu = FusedActivation(
        FnSpecs("swiglu", swiglu_fn, ("alpha", "limit"), reduction_n=2), (1.702, 7.0)
    )

    def layer(x, router_weight, router_bias):
        chosen = topk(torch.nn.functional.linear(x, router_weight, router_bias), top_k)
        order = (
            chosen.mask_metadata.col_sorted_indx
        )  # [T top_k], the (token, slot) pairs sorted by expert
        rows = make_ragged_tensor_metadata(chosen.mask_metadata.col_sum, len(order))
        h = matmul(
            (x / first).to(e4m3),
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


def tokenspeed_peer(experts, top_k: int) -> Callable:
    """TokenSpeed's Gluon kernels for gfx950 (tokenspeed-kernel-amd), static e4m3 activations. ->
    layer, as above."""
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


def kernel_peers(experts, top_k: int) -> dict[str, Callable]:
    """Those of KERNEL_PEERS that are installed; of the others stderr says why they are left out."""
    layers = {}
    for name, peer in KERNEL_PEERS.items():
        try:
            layers[name] = peer(experts, top_k)
        except ImportError as error:
            print(f"bench: without {name}: {error}", file=sys.stderr)
    return layers


def layer_times(moe_gluon, config: Config, tokens: int, active: int, packed, peers, device) -> dict:
    """us of a layer, its launchers and its peers on a gfx950, of graphs that replay calls. Every
    call meets other experts until all had their turn: none comes from a cache."""
    from triton.testing import do_bench_cudagraph

    top_k, calls = config.num_experts_per_tok, collections.defaultdict(list)
    for first in range(0, config.num_local_experts, active):
        x = pinned(config, tokens, active, first, device)
        inputs = *x, packed, top_k
        routing = moe_gluon.gating_gemm(*inputs)
        h = moe_gluon.dispatch_swiglu(routing, packed)
        for name, *given in (
            ("moe", *inputs),
            ("gating_gemm", *inputs),
            ("dispatch_swiglu", routing, packed),
            ("combine", *h, routing, packed),
        ):
            calls[f"{name}_us"].append(functools.partial(getattr(moe_gluon, name), *given))
        for name, layer in peers.items():
            calls[f"{name}_us"].append(functools.partial(layer, *x))
    return {
        name: 1e3 * do_bench_cudagraph(lambda turns=turns: [call() for call in turns]) / len(turns)
        for name, turns in calls.items()
    }


LAYER_COLUMNS = [
    ("tokens", "tokens", "d"),
    ("active experts, pinned", "active", "d"),
    ("launches, counted", "launches", "d"),
    ("least weight bytes, counted", "weight_bytes", ",d"),
    ("least FLOP, counted", "flop", ".3g"),
    ("MI355 floor us, modelled", "floor_us", ".1f"),
    ("TokenSpeed us, measured by it", "published_us", "g"),
    ("us, measured", "moe_us", ".1f"),
    ("triton_kernels us, measured", "triton_kernels_us", ".1f"),
    ("TokenSpeed us, measured", "tokenspeed_us", ".1f"),
    ("gating us, measured", "gating_gemm_us", ".1f"),
    ("dispatch us, measured", "dispatch_swiglu_us", ".1f"),
    ("combine us, measured", "combine_us", ".1f"),
    ("TB/s, measured", "tb_s", ".2f"),
    ("TFLOP/s, measured", "tflop_s", ",.1f"),
    ("/ floor, measured", "of_floor", ".2f"),
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


def kernels(args, device: torch.device) -> tuple[dict, list[str]]:
    """A layer for each of BATCHES: compiled, up to 16 tokens emulated; and timed where the device
    is a gfx950, with fp8 activations beside its peers, which have those."""
    import gfx950
    import moe_gluon

    on_gfx950 = device.type == "cuda" and moe_gluon.is_supported()
    device = device if on_gfx950 else torch.device("cpu")
    config = Config.from_dict(random_config(args.model))
    E, top_k = config.num_local_experts, config.num_experts_per_tok
    activations = (
        "mxfp8" if args.activations == "auto" else args.activations
    )  # the engine's choice for mxfp4 weights
    torch.manual_seed(args.seed)
    experts = random_checkpoint(
        dataclasses.replace(config, num_hidden_layers=1, vocab_size=1),
        device,
        "hf-bf16" if activations == "bf16" else "openai",
    ).experts[0]
    experts.gate_up_input_scale, experts.down_input_scale = 0.02, 0.01  # for static fp8
    packed, layers, rows = moe_gluon.prepare(experts, activations), [], []
    peers = kernel_peers(experts, top_k) if on_gfx950 and activations == "fp8" else {}
    del experts
    for tokens in weights.progress(BATCHES, "kernels"):
        published, active = PUBLISHED[args.model].get(
            tokens, (None, round(expected_experts(E, top_k, tokens)))
        )
        layer = layer_floor(config, activations, tokens, active)
        layer |= {"tokens": tokens, "active": active, "published_us": published}
        emulated = tokens <= EMULATED and not on_gfx950
        with gfx950.emulate() if emulated else gfx950.compile_only() as gpu:
            moe_gluon.moe(*pinned(config, tokens, active, 0, device), packed, top_k)
        new = [
            {"tokens": tokens, "tile": tile(moe_gluon, launch.name, packed)}
            | launch_row(gfx950, launch)
            for launch in gpu.launches
        ]
        layer["launches"] = len(new)
        if emulated:
            layer |= {
                "weights_ratio": sum(row["weights_read"] for row in new) / layer["weight_bytes"],
                "others_ratio": sum(row["others_read"] for row in new) / layer["weight_bytes"],
                "model_us": sum(row["model_us"] for row in new),
            }
        if on_gfx950:
            layer |= layer_times(moe_gluon, config, tokens, active, packed, peers, device)
            us = layer["moe_us"]
            layer |= {
                "tb_s": layer["weight_bytes"] / us / 1e6,
                "tflop_s": layer["flop"] / us / 1e6,
                "of_floor": us / layer["floor_us"],
            }
        layers.append(layer)
        rows += new
    return {"layers": layers, "kernels": rows}, [
        f"One MoE layer of {args.model}, {activations} activations; {device_name(device)}",
        table(LAYER_COLUMNS, layers),
        table(KERNEL_COLUMNS, rows),
    ]


# --------------------------------------------------------------------------------------------------
# Command line


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Time GPT-OSS inference, or its MoE kernels.", allow_abbrev=False
    )
    parser.error = lambda message: parser.exit(
        2, f"bench: {message}\n"
    )  # one line, without the usage
    add = parser.add_argument
    add(
        "--checkpoint",
        default=TINY,
        metavar="DIR",
        help="folder (default: tiny/), or random:20b, random:120b, "
        "random:tiny: random weights of the true shapes, made on the device",
    )
    add(
        "--device",
        choices=("cpu", "cuda")[: 1 + torch.cuda.is_available()],
        help="default: cuda where there is one and --checkpoint is given, else cpu",
    )
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="default: float32 on a CPU, bfloat16 elsewhere",
    )
    add("--moe", default="auto", choices=("auto", "torch", "gluon"))
    add(
        "--activations",
        default="auto",
        choices=("auto", *gptoss.ACTIVATIONS),
        help="auto: mxfp8 with --kernels",
    )
    add("--page-size", default=gptoss.PAGE_SIZE, type=positive, metavar="TOKENS")
    add(
        "--max-batch",
        default=gptoss.MAX_BATCH,
        type=positive,
        metavar="N",
        help="sequences that decode together",
    )
    add(
        "--concurrency",
        type=lambda text: [*map(positive, text.split(","))],
        metavar="N,..",
        help="default: 1,8, with --plot 1,2,4,8,16",
    )
    add(
        "--input", default=512, type=positive, metavar="N", help="tokens of a prompt (default: 512)"
    )
    add(
        "--output",
        type=positive,
        metavar="N",
        help="tokens generated for each (default: 128, with --peer openai 8)",
    )
    add(
        "--rounds",
        default=5,
        type=positive,
        metavar="N",
        help="of each concurrency, after the warm-up (default: 5)",
    )
    add("--seed", type=int, default=0, metavar="N", help="of prompts and weights (default: 0)")
    versus = parser.add_mutually_exclusive_group().add_argument
    versus("--ab", metavar="SETTING=A,B", help=f"compare two values of {', '.join(SETTINGS)}")
    versus("--peer", choices=PEERS, help="compare with another implementation")
    add("--plot", metavar="FILE.svg", help="draw TPOT over concurrency")
    add("--profile", action="store_true", help="a decode step by operator")
    add(
        "--kernels",
        action="store_true",
        help="the gfx950 kernels of one MoE layer; on a gfx950 and with "
        "--activations fp8, triton_kernels and TokenSpeed beside them",
    )
    add(
        "--model", default="120b", choices=SIZES, help="whose layer --kernels takes (default: 120b)"
    )
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


ENGINE = {"checkpoint", "device", "seed", "input", *SETTINGS}
MODES = {
    kernels: {"model", "device", "seed", "activations"},
    profile: ENGINE,  # the options that each takes
    latency: ENGINE | {"concurrency", "output", "rounds", "ab", "peer", "plot"},
}


def main(argv: list[str]) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    run = kernels if args.kernels else profile if args.profile else latency
    mode = run.__name__
    given = {name for name, value in vars(args).items() if value != parser.get_default(name)}
    if unused := sorted(given - MODES[run] - {mode, "json"}):
        parser.error(f"{mode} does not take --{unused[0]}")
    if args.output == 1:
        parser.error("--output 1 leaves nothing to time after the first token")
    if args.plot and not args.plot.endswith(".svg"):
        parser.error(f"--plot {args.plot}: the picture is an SVG, name it *.svg")
    if args.checkpoint.startswith("random:") and args.checkpoint[7:] not in (*SIZES, "tiny"):
        parser.error(f"--checkpoint {args.checkpoint}: random: takes {', '.join(SIZES)}, tiny")
    args.concurrency = args.concurrency or ([1, 2, 4, 8, 16] if args.plot else [1, 8])
    args.output = args.output or (
        8 if args.peer == "openai" else 128
    )  # openai: minutes a request, having no KV cache
    settings, args.variants = dict(vars(args)), {"gptoss": args}
    if args.ab:  # the same command line twice, with one option more
        name, _, values = args.ab.partition("=")
        values = values.split(",")
        if name not in SETTINGS or len(values) != 2 or values[0] == values[1]:
            parser.error(
                f"--ab {args.ab}: expected SETTING=A,B, with a SETTING of {', '.join(SETTINGS)}"
            )
        args.variants = {
            f"{name}={value}": parser.parse_args([*argv, f"--{name.replace('_', '-')}", value])
            for value in values
        }
    cuda = torch.cuda.is_available() and ("checkpoint" in given or args.kernels)
    device = torch.device(args.device or ("cuda" if cuda else "cpu"))
    try:
        result, text = run(args, device)
        result |= {
            "mode": mode,
            "device": device_name(device),
            "torch": torch.__version__,
            "settings": settings,
        }
        print(json.dumps(result) if args.json else "\n\n".join(text))
    except (CheckpointError, ValueError, ImportError, OSError, torch.OutOfMemoryError) as error:
        print(f"bench: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
