"""How fast it is: the engine from end to end, and the MoE kernels beside what an MI355 could do.

    python bench.py                                         tiny/ on the CPU: TTFT, TPOT, bytes a step, bandwidth
    python bench.py --checkpoint random:20b --device cuda   random weights of the true shapes, made on the device
    python bench.py --ab page_size=16,64                    two settings alternating, and the ratios of their rounds
    python bench.py --checkpoint DIR --peer transformers    the same against another implementation
    python bench.py --profile                               where the time of a decode step goes, by operator
    python bench.py --kernels                               one MoE layer's gfx950 kernels, 1 to 8192 tokens

A round submits `concurrency` distinct random prompts at once and takes --output greedy tokens of each, stop tokens
included. The first round is warm-up and left out. A token's time is taken when it is on the host, which waits for the
device. Of a request whose tokens come at t_0 .. t_(n-1), counted from the submission:

    TTFT  t_0: includes waiting for the prompts before it, which the engine prefills one by one
    TPOT  (t_(n-1) - t_0) / (n - 1): includes waiting for the prefill of the prompts behind it
    step  one decode step: the median interval between two tokens of a request while all requests decode, which
          they never do where --ab max_batch keeps them apart

Markdown tables go to stdout, progress and errors to stderr; exit 0, 1 (bad checkpoint, no memory), 2 (usage). --json
prints one object instead: {"mode", "device", "versions", "settings"} and, times in ms unless named otherwise,
    latency  "bandwidth" (bytes/s), "rows": [{"system", "concurrency", "requests", "ttft", "ttft_p99", "tpot",
             "tpot_p99", "step", "tokens_per_s", "step_bytes", "floor", "share"}], without the last three for a peer;
             "pairs": [{"systems", "concurrency", "measure", "ratio", "lowest", "highest"}]
    profile  "step", "rows": [{"operator", "calls", "us", "share"}]
    kernels  "layers": [{"tokens", "active", "launches", "weight_bytes", "flop", "floor_us", ...}] and "kernels", a
             launch each: the keys of LAYER_, PROFILE_ and COUNTER_COLUMNS
"""
import argparse
import contextlib
import dataclasses
import functools
import importlib
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
from dataclasses import dataclass
from html import escape
from pathlib import Path

import torch

import gptoss
import weights
from gptoss import GPTOSS, KVCache
from weights import Checkpoint, CheckpointError, Config, Experts

TINY = os.path.join(os.path.dirname(os.path.abspath(__file__)), "tiny")
SIZES = {"20b": (24, 32), "120b": (36, 128)}  # layers, experts; all else is equal
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
OPENAI_TOKENS = 8  # of a request to the peer "openai", which has no KV cache
PROFILED_STEPS = 8

# MI355X (AMD's data sheet): bytes/s, and dense FLOP/s by the wider operand of the matrix instruction
MI355_BANDWIDTH = 8e12
MI355_FLOPS = {"bf16": 2.5e15, "fp8": 5.0e15, "mxfp8": 5.0e15, "mxfp4": 10.1e15}
BATCHES = (1, 2, 4, 8, 16, 32, 64, 512, 1024, 4096, 8192)  # tokens of a layer
EMULATED = 16  # the largest of them that is emulated
# TokenSpeed's README (https://github.com/lightseekorg/tokenspeed, read off its plot): us of a 120b layer with fp8
# activations through its Gluon kernels on one MI355X, and how many experts its tokens met
PUBLISHED_US = {1: 25.9, 2: 33.4, 4: 50.8, 8: 102, 16: 160, 512: 376, 1024: 424, 2048: 598, 4096: 821, 8192: 1373}
PUBLISHED_ACTIVE = {1: 4, 2: 8, 4: 15, 8: 31, 16: 53}


def find_device(name: str) -> torch.device:
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {name!r} cannot be used here: {str(error).splitlines()[0]}") from error


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    with contextlib.suppress(OSError, StopIteration), open("/proc/cpuinfo") as file:
        model = next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
        return f"{model}, {torch.get_num_threads()} threads"
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def note(text: str) -> None:
    """Progress, on a terminal."""
    if sys.stderr.isatty():
        print(f"\r\033[K{text}", end="", file=sys.stderr, flush=True)


# ---------------------------------------------------------------------------------------------------------------
# Arithmetic: what timestamps say, what a step must read

def tpot(times: list[float]) -> float:
    """Time per output token of a request, from when its tokens came."""
    return (times[-1] - times[0]) / (len(times) - 1)


def steps(requests: list[list[float]]) -> list[float]:
    """The intervals between consecutive tokens while every request of the round decodes."""
    begin, end = max(times[0] for times in requests), min(times[-1] for times in requests)
    return [b - a for times in requests for a, b in itertools.pairwise(times) if a >= begin and b <= end]


def percentile(values: list[float], percent: float) -> float:
    """By nearest rank: of fewer than 100 values, p99 is the largest."""
    return sorted(values)[math.ceil(percent / 100 * len(values)) - 1]


def summary(rounds: list[list[list[float]]]) -> dict:
    """Rounds of requests of timestamps (seconds since the round began) -> the figures of a row, ms."""
    requests = [times for requests in rounds for times in requests]
    first, rest = [1e3 * times[0] for times in requests], [1e3 * tpot(times) for times in requests]
    speed = [sum(map(len, requests)) / max(times[-1] for times in requests) for requests in rounds]
    gaps = [gap for requests in rounds for gap in steps(requests)]  # none if they never decoded all together
    return {"requests": len(requests), "ttft": statistics.median(first), "ttft_p99": percentile(first, 99),
            "tpot": statistics.median(rest), "tpot_p99": percentile(rest, 99),
            "step": 1e3 * statistics.median(gaps) if gaps else None,
            "tokens_per_s": statistics.median(speed)}


def expected_experts(experts: int, top_k: int, tokens: int) -> float:
    """Distinct experts that `tokens` tokens choose, on average, if they choose evenly and independently."""
    return experts * (1 - (1 - top_k / experts) ** tokens)


def nbytes(thing) -> int:
    """Bytes of a tensor, or of all tensors in a dataclass or list."""
    if isinstance(thing, torch.Tensor):
        return thing.numel() * thing.itemsize
    parts = thing if isinstance(thing, list) else vars(thing).values() if dataclasses.is_dataclass(thing) else ()
    return sum(map(nbytes, parts))


def step_bytes(model: GPTOSS, tokens: int, context: int) -> float:
    """Bytes that a decode step must read, each once: `tokens` sequences with `context` tokens each in the cache. As
    the model stores them: the expected active experts, all else of every layer, the unembedding, a row of the
    embedding per token, and the keys and values that are visible."""
    c, total = model.config, nbytes(model.unembedding) + nbytes(model.norm)
    total += tokens * c.hidden_size * model.embedding.itemsize
    active = expected_experts(c.num_local_experts, c.num_experts_per_tok, tokens)
    for layer in model.layers:
        experts, seen = nbytes(layer.experts), context
        total += nbytes(layer) - experts + experts * active / c.num_local_experts
        if layer.kind == "sliding_attention":
            seen = min(context, c.sliding_window)
        total += tokens * seen * 2 * c.num_key_value_heads * c.head_dim * model.embedding.itemsize
    return total


# ---------------------------------------------------------------------------------------------------------------
# Models: random weights, and whether they fit

def random_config(size: str) -> dict:
    """A config.json: of tiny/, or with the published constants of the 20b or the 120b."""
    raw = weights.read_json(Path(TINY) / "config.json")
    del raw["quantization_config"]
    if size == "tiny":
        return raw
    layers, experts = SIZES[size]
    yarn = raw["rope_scaling"] | {"original_max_position_embeddings": 4096}
    return raw | {"num_hidden_layers": layers, "num_local_experts": experts, "vocab_size": 201088, "hidden_size": 2880,
                  "intermediate_size": 2880, "head_dim": 64, "num_attention_heads": 64, "num_key_value_heads": 8,
                  "sliding_window": 128, "initial_context_length": 4096, "max_position_embeddings": 131072,
                  "rope_scaling": yarn, "layer_types": ["sliding_attention", "full_attention"] * (layers // 2)}


def random_layer(config: Config, layer: int | None, device, packed: bool = True) -> tuple[dict, Experts | None]:
    """Random tensors of one layer, or (None) of what is outside the layers, made on `device` as they are stored: mxfp4
    experts as bytes, or bf16 ones if not `packed`; all else bf16."""
    def make(stored):
        shape = stored.shape
        if "U8" not in stored.dtypes:
            tensor = torch.empty(shape, dtype=torch.bfloat16, device=device)
            return tensor.fill_(1) if "norm" in stored.ours else tensor.normal_(0, 0.02)
        if "scale" in stored.ours:  # 2^-9 to 2^-5: products of 2880 stay of the order of their inputs
            return torch.empty(shape, dtype=torch.uint8, device=device).random_(118, 123) if packed else None
        if packed:
            return torch.empty(shape, dtype=torch.uint8, device=device).random_(0, 256)
        return torch.empty(*shape[:-1], weights.MX_GROUP, dtype=torch.bfloat16, device=device).normal_(0, 0.02)

    tensors = {stored.ours: make(stored) for stored in weights.tensors_of(config, "openai", layer)}
    if layer is None:
        return tensors, None
    names = [field.name for field in dataclasses.fields(Experts)]
    return tensors, weights.as_experts("openai", {name: tensors.pop(f"{layer}.{name}", None) for name in names})


def random_checkpoint(config: Config, device, packed: bool = True) -> Checkpoint:
    """A checkpoint that was never on a disk, of OpenAI's layout."""
    dense, experts = random_layer(config, None, device)[0], []
    for layer in weights.progress(range(config.num_hidden_layers), "random weights"):
        tensors, layer_experts = random_layer(config, layer, device, packed)
        dense |= tensors
        experts.append(layer_experts)
    return Checkpoint(config, "openai" if packed else "hf-bf16", dense, experts)


def free_bytes(device: torch.device) -> int:
    """Memory that an allocation can have; of a CPU's without /proc, all there is."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    with contextlib.suppress(OSError), open("/proc/meminfo") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("MemAvailable"))
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def check_fit(what: str, device: torch.device, parts: dict[str, float]) -> None:
    """Raises ValueError, naming both sizes, if the parts (name -> bytes) are more than the device has free."""
    needed, free = sum(parts.values()), free_bytes(device)
    if needed > free:
        pieces = ", ".join(f"{name} {size / 1e9:.1f}" for name, size in parts.items() if size)
        raise ValueError(f"{what} needs {needed / 1e9:.1f} GB on {device} ({pieces}), {free / 1e9:.1f} GB are free")


def footprint(config: Config, layout: str, dtype: torch.dtype, kernels: bool, made: bool, args) -> dict[str, float]:
    """Bytes by part of a model and of its largest run: the engine's own allocations, made on the meta device."""
    checkpoint = random_checkpoint(config, "meta", packed=layout != "hf-bf16")
    model = GPTOSS(checkpoint, "meta", dtype, "torch")
    pages = gptoss.pages_needed(config, args.input + args.output, gptoss.PAGE_SIZE).values()
    cache = nbytes(KVCache(config, max(args.concurrency) * sum(pages), gptoss.PAGE_SIZE, "meta", dtype).pool)
    # the largest temporaries: a prompt's attention, two masks and three float32 copies of its scores; or an expert's
    # first GEMM, float32 weights three times and five times the rows they yield
    queries = min(args.input, gptoss.PREFILL_TOKENS)
    scores = min(config.num_attention_heads * queries * (args.input + queries), 2 * gptoss.PREFILL_SCORES)
    rows = 3 * config.hidden_size + 5 * queries * config.num_experts_per_tok
    working = max(scores * (2 * dtype.itemsize + 12), 4 * 2 * config.intermediate_size * rows)
    if made:  # what the checkpoint, on the same device, and the model hold twice until the cache is made
        twice = (kernels and nbytes(checkpoint.experts)) + (dtype.itemsize > 2 and nbytes([*checkpoint.dense.values()]))
        working = max(working, twice - cache)
    return {"weights": model_bytes(model), "KV cache": cache, "working memory": working}


def model_bytes(model: GPTOSS) -> int:
    return nbytes([model.embedding, model.unembedding, model.norm, *model.layers])


def peer_footprint(peer: str, config: Config, dtype: torch.dtype, args) -> dict[str, float]:
    """The same for a peer, whose experts are not packed."""
    model = GPTOSS(random_checkpoint(config, "meta", packed=False), "meta", torch.bfloat16, "torch")
    if peer == "transformers":
        return {peer: model_bytes(model) * dtype.itemsize / 2}
    # it gathers the first weights of every token of a sequence
    gathered = (args.input + OPENAI_TOKENS) * config.num_experts_per_tok * 2 * config.intermediate_size
    return {peer: model_bytes(model), "the weights it gathers": gathered * config.hidden_size * 2}


def copy_bandwidth(device: torch.device) -> float:
    """Bytes/s, read and written, of the best of several large copies on the device."""
    size, repeats, best = (1 << 29, 4, math.inf) if device.type == "cuda" else (1 << 28, 1, math.inf)
    source = torch.ones(size, dtype=torch.uint8, device=device)
    target = torch.zeros_like(source)
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(30):
        wait()
        start = time.perf_counter()
        for _ in range(repeats):
            target.copy_(source)
        wait()
        best = min(best, (time.perf_counter() - start) / repeats)
    del source, target
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the engine asks the device for what is free
    return 2 * size / best


# ---------------------------------------------------------------------------------------------------------------
# Systems: what is timed

@dataclass
class System:
    """Something that generates. stream(prompts, n) yields (prompt index, token), n tokens of each prompt."""
    name: str
    stream: Callable[[list[list[int]], int], Iterator[tuple[int, int]]]
    model: GPTOSS | None = None  # None: a peer
    most: int = sys.maxsize  # tokens of a request


# name -> the values it takes, or int: any positive number
SETTINGS = {"moe": ("auto", "torch", "gluon"), "activations": ("auto", *gptoss.ACTIVATIONS), "dtype": tuple(DTYPES),
            "page_size": int, "max_batch": int}


def ab_setting(text: str) -> tuple[str, list]:
    """Parses setting=A,B."""
    name, _, values = text.partition("=")
    kind, values = SETTINGS.get(name), values.split(",")
    if kind is None:
        raise argparse.ArgumentTypeError(f"unknown setting {name!r}, expected one of {', '.join(SETTINGS)}")
    if len(values) != 2 or values[0] == values[1]:
        raise argparse.ArgumentTypeError(f"{text!r}: expected two different values, {name}=A,B")
    for value in values:
        if not (value.isdecimal() and int(value) > 0 if kind is int else value in kind):
            expected = "a positive number" if kind is int else f"one of {', '.join(kind)}"
            raise argparse.ArgumentTypeError(f"{name}={value}: expected {expected}")
    return name, [int(value) if kind is int else value for value in values]


def find_model(checkpoint: str) -> tuple[dict, Config, str]:
    """config.json, parsed too, and the layout of a folder or of random:SIZE. No weight is read."""
    if checkpoint.startswith("random:"):
        raw = random_config(checkpoint.removeprefix("random:"))
        return raw, Config.from_dict(raw), "openai"
    folder = Path(checkpoint)
    raw = weights.read_json(folder / "config.json")
    config = Config.from_dict(raw, str(folder / "config.json"))
    return raw, config, weights.decide_layout(folder, raw, weights.find_files(folder))


def build(args, device: torch.device) -> list[System]:
    """The systems that the command line asks for. That they fit the device is checked before a weight is loaded."""
    raw, config, layout = find_model(args.checkpoint)
    made = args.checkpoint.startswith("random:")
    name, values = args.ab or (None, [None])
    of_model = name in ("moe", "activations", "dtype")  # the other settings share a model
    variants, parts = [], {}
    for value in values if of_model else [None]:
        chosen = {"moe": args.moe, "activations": args.activations, "dtype": args.dtype, name: value}
        kernels = chosen["moe"] != "torch" and gptoss.gluon_for(device) is not None
        dtype = DTYPES[chosen["dtype"] or ("float32" if device.type == "cpu" and not kernels else "bfloat16")]
        variants.append((dtype, chosen["moe"], chosen["activations"]))
        for part, size in footprint(config, layout, dtype, kernels, made, args).items():
            parts[part] = parts.get(part, 0) + size
    if args.peer:
        try:
            importlib.import_module(PEERS[args.peer][0])
        except ImportError as error:
            raise ValueError(f"--peer {args.peer} cannot be imported: {error}") from error
        parts |= peer_footprint(args.peer, config, variants[0][0], args)
    check_fit(args.checkpoint, device, parts)

    torch.manual_seed(args.seed)
    checkpoint = random_checkpoint(config, device) if made else weights.load(args.checkpoint)
    models = [GPTOSS(checkpoint, device, *variant) for variant in variants]
    del checkpoint
    systems = []
    for value, model in zip(values, models * (len(values) // len(models)), strict=True):
        stream = model.stream if name is None or of_model else functools.partial(model.stream, **{name: value})
        systems.append(System(f"{name}={value}" if name else "gptoss", stream, model))
    if args.peer:
        folder = None if made else args.checkpoint
        systems.append(PEERS[args.peer][1](raw, config, layout, folder, device, variants[0][0]))
    return systems


def randomise(module: torch.nn.Module) -> None:
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.normal_(0, 0.02)


def transformers_peer(raw: dict, config: Config, layout: str, folder: str | None, device, dtype) -> System:
    """Hugging Face transformers: the same checkpoint, its mxfp4 experts in `dtype`; or its own random weights. All
    prompts, of one length, are one batch."""
    from transformers import GptOssConfig, GptOssForCausalLM, Mxfp4Config
    if folder is None:
        with torch.device(device):
            model = GptOssForCausalLM._from_config(GptOssConfig(**raw), dtype=dtype)
        randomise(model)
    elif layout in ("openai", "quark"):
        raise ValueError(f"--peer transformers does not load the layout {layout}")
    else:
        options = {"quantization_config": Mxfp4Config(dequantize=True)} if layout == "hf-mxfp4" else {}
        model = GptOssForCausalLM.from_pretrained(folder, dtype=dtype, **options).to(device)
    model.eval()

    @torch.inference_mode()
    def stream(prompts, count):
        tokens, past = torch.tensor(prompts, device=device), None
        for _ in range(count):
            out = model(input_ids=tokens, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, tokens = out.past_key_values, out.logits[:, -1:].argmax(-1)  # [S, 1]
            yield from enumerate(tokens[:, 0].tolist())
    return System("transformers", stream)


def openai_peer(raw: dict, config: Config, layout: str, folder: str | None, device, dtype) -> System:
    """OpenAI's reference, gpt_oss.torch, in bf16. It has neither a KV cache nor batches: every token recomputes its
    sequence, and the sequences take turns."""
    from gpt_oss.torch.model import ModelConfig, Transformer
    if folder is None:
        renamed = {"num_experts": "num_local_experts", "experts_per_token": "num_experts_per_tok",
                   "rope_scaling_factor": "rope_factor", "rope_ntk_alpha": "rope_beta_slow",
                   "rope_ntk_beta": "rope_beta_fast"}
        values = {field.name: getattr(config, renamed.get(field.name, field.name))
                  for field in dataclasses.fields(ModelConfig)}
        model = Transformer(ModelConfig(**values), device)
        randomise(model)
    elif layout != "openai":
        raise ValueError(f"--peer openai loads the layout openai, {folder} is {layout}")
    else:
        model = Transformer.from_checkpoint(folder, device=device)

    @torch.inference_mode()
    def stream(prompts, count):
        sequences = [list(prompt) for prompt in prompts]
        for _ in range(count):
            for index, sequence in enumerate(sequences):
                sequence.append(model(torch.tensor(sequence, device=device))[-1].argmax().item())
                yield index, sequence[-1]
    return System(f"openai, {OPENAI_TOKENS} tokens", stream, most=OPENAI_TOKENS)


PEERS = {"transformers": ("transformers", transformers_peer), "openai": ("gpt_oss.torch.model", openai_peer)}


# ---------------------------------------------------------------------------------------------------------------
# End to end

def play(system: System, prompts: list[list[int]], count: int) -> list[list[float]]:
    """One round -> when each token of each prompt came, in seconds since the prompts were submitted."""
    count, times = min(count, system.most), [[] for _ in prompts]
    start = time.perf_counter()
    for index, _ in system.stream(prompts, count):
        times[index].append(time.perf_counter() - start)
    assert {len(t) for t in times} == {count}, f"{system.name} did not give {count} tokens of every prompt"
    return times


def latency(args, device: torch.device) -> dict:
    """The end-to-end mode: systems alternate within a round (A B, B A, ...); every round has new prompts."""
    systems = build(args, device)
    bandwidth = copy_bandwidth(device)
    vocabulary, draw = systems[0].model.config.vocab_size, random.Random(args.seed)
    rows, pairs = [], []
    for concurrency in args.concurrency:
        played = {system.name: [] for system in systems}
        for n in range(args.rounds + 1):
            prompts = [[draw.randrange(vocabulary) for _ in range(args.input)] for _ in range(concurrency)]
            for system in systems if n % 2 == 0 else systems[::-1]:
                note(f"concurrency {concurrency}, {f'round {n} of {args.rounds}' if n else 'warm-up'}: {system.name}")
                played[system.name].append(play(system, prompts, args.output))
        for system in systems:
            row = {"system": system.name, "concurrency": concurrency} | summary(played[system.name][1:])
            if system.model and row["step"]:  # the cache grows from input to input + output tokens: its mean
                size = step_bytes(system.model, concurrency, args.input + args.output // 2)
                row |= {"step_bytes": size, "floor": 1e3 * size / bandwidth,
                        "share": size / bandwidth / (row["step"] / 1e3)}
            rows.append(row)
        if len(systems) == 2:
            a, b = ([summary([requests]) for requests in played[system.name][1:]] for system in systems)
            for measure in ("ttft", "tpot", "step") if a[0]["step"] and b[0]["step"] else ("ttft", "tpot"):
                ratios = [right[measure] / left[measure] for left, right in zip(a, b, strict=True)]
                pairs.append({"systems": [s.name for s in systems], "concurrency": concurrency, "measure": measure,
                              "ratio": statistics.median(ratios), "lowest": min(ratios), "highest": max(ratios)})
    note("")
    return {"mode": "latency", "bandwidth": bandwidth, "rows": rows, "pairs": pairs}


def model_name(args) -> str:
    return "tiny/" if args.checkpoint == TINY else args.checkpoint


def table(columns: list[tuple[str, str, str]], rows: list[dict]) -> str:
    """Markdown. A column is a header, a key and a format; one that no row has is left out, a value that a row lacks
    shows as -."""
    columns = [column for column in columns if any(row.get(column[1]) is not None for row in rows)]
    lines = [[header for header, *_ in columns], ["---"] * len(columns)]
    lines += [[format(row[key], form) if row.get(key) is not None else "-" for _, key, form in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


LATENCY_COLUMNS = [
    ("system", "system", ""), ("concurrency", "concurrency", "d"), ("requests", "requests", "d"),
    ("TTFT ms, median", "ttft", ".1f"), ("p99", "ttft_p99", ".1f"), ("TPOT ms, median", "tpot", ".2f"),
    ("p99", "tpot_p99", ".2f"), ("step ms, median", "step", ".2f"), ("output tok/s", "tokens_per_s", ".1f"),
    ("bytes a step", "step_bytes", ",.0f"), ("floor ms", "floor", ".3f"), ("share of bandwidth", "share", ".1%")]
PAIR_COLUMNS = [("paired ratio of", "measure", ""), ("concurrency", "concurrency", "d"),
                ("median", "ratio", ".3f"), ("lowest", "lowest", ".3f"), ("highest", "highest", ".3f")]


def latency_text(result: dict, args) -> str:
    text = [f"{model_name(args)}; {result['device']}; {args.input} tokens in, {args.output} out, greedy; "
            f"{args.rounds} rounds after one of warm-up", table(LATENCY_COLUMNS, result["rows"]),
            f"A large copy reads and writes {result['bandwidth'] / 1e9:.1f} GB/s. The floor is a step's bytes at that "
            "bandwidth; the share is floor / step."]
    if result["pairs"]:
        first, second = result["pairs"][0]["systems"]
        text += [f"{second} / {first}, round by round:", table(PAIR_COLUMNS, result["pairs"])]
    return "\n\n".join(text)


def plot(rows: list[dict]) -> str:
    """TPOT over concurrency as an SVG, both axes logarithmic: a line a system, dashes for the bandwidth floor."""
    series = {}
    for row in rows:
        series.setdefault(f"{row['system']}: TPOT", []).append((row["concurrency"], row["tpot"]))
        if "floor" in row:
            series.setdefault(f"{row['system']}: bandwidth floor", []).append((row["concurrency"], row["floor"]))
    xs, ys = zip(*itertools.chain(*series.values()), strict=True)
    low = math.floor(math.log10(min(ys)))
    high = max(math.ceil(math.log10(max(ys))), low + 1)
    x = lambda v: 70 + 500 * math.log2(v / min(xs)) / max(1, math.log2(max(xs) / min(xs)))  # noqa: E731
    y = lambda v: 330 - 300 * (math.log10(v) - low) / (high - low)  # noqa: E731
    out = ['<svg xmlns="http://www.w3.org/2000/svg" width="600" height="400" font-family="sans-serif" font-size="12">',
           '<rect width="600" height="400" fill="white"/>', '<text x="70" y="20">ms a token, over concurrency</text>']
    for value in (m * 10.0**e for e in range(low, high + 1) for m in (1, 2, 5) if m * 10.0**e <= 10.0**high):
        out.append(f'<path d="M70 {y(value):.1f}H570" stroke="#ddd"/><text x="62" y="{y(value) + 4:.1f}" '
                   f'text-anchor="end">{value:g}</text>')
    out += [f'<text x="{x(value):.1f}" y="348" text-anchor="middle">{value}</text>' for value in sorted(set(xs))]
    for n, (name, points) in enumerate(series.items()):
        color = ("#c33", "#333", "#36c", "#888")[n % 4]
        dash = ' stroke-dasharray="6 4"' if "floor" in name else ""
        line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
        out.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"{dash}/>')
        out += [f'<circle cx="{x(a):.1f}" cy="{y(b):.1f}" r="3" fill="{color}"/>' for a, b in points]
        out.append(f'<text x="{70 + 250 * (n % 2)}" y="{370 + 18 * (n // 2)}" fill="{color}">{escape(name)}</text>')
    return "\n".join([*out, "</svg>\n"])


# ---------------------------------------------------------------------------------------------------------------
# Profile

def profile(args, device: torch.device) -> dict:
    """Mean of a few decode steps of one sequence. On a GPU an operator's time is its kernels', and what is left of a
    step that was timed without the profiler is the GPU waiting; on a CPU it is the operator itself and what is left is
    Python, both slower for being watched."""
    from torch.autograd import DeviceType
    from torch.profiler import ProfilerActivity
    system, gpu, draw = build(args, device)[0], device.type == "cuda", random.Random(args.seed)
    prompt = [draw.randrange(system.model.config.vocab_size) for _ in range(args.input)]
    stream = system.stream([prompt], 3 + 2 * PROFILED_STEPS)

    def timed():
        start = time.perf_counter()
        for _ in range(PROFILED_STEPS):
            next(stream)
        return 1e6 * (time.perf_counter() - start) / PROFILED_STEPS

    for _ in range(3):  # the prompt, and warm-up
        next(stream)
    step = timed()
    activities = [ProfilerActivity.CPU] + [ProfilerActivity.CUDA] * gpu
    with torch.profiler.profile(activities=activities) as watched:
        slower = timed()
    step = step if gpu else slower
    spent = "self_device_time_total" if gpu else "self_cpu_time_total"
    events = [(e.key, e.count / PROFILED_STEPS, getattr(e, spent) / PROFILED_STEPS, e.device_type == DeviceType.CPU)
              for e in watched.key_averages()]
    rows = [(key, count, us) for key, count, us, operator in events if operator and us > 0]
    if gpu:  # a kernel belongs to an operator, or to none if Triton launched it
        loose = sum(us for *_, us, operator in events if not operator) - sum(us for *_, us in rows)
        rows += [("(kernels of no operator)", 0, loose)] if loose > 0.001 * step else []
    rest = "(the GPU waits for the host)" if gpu else "(Python between the operators)"
    rows.append((rest, 0, max(0.0, step - sum(us for *_, us in rows))))
    rows = [{"operator": key, "calls": count, "us": us, "share": us / step}
            for key, count, us in sorted(rows, key=lambda row: -row[2])]
    return {"mode": "profile", "step": step / 1e3, "rows": rows}


PROFILE_ROWS = 15
OPERATOR_COLUMNS = [("operator", "operator", ""), ("calls a step", "calls", "g"), ("us a step", "us", ".1f"),
                    ("share", "share", ".1%")]


def profile_text(result: dict, args) -> str:
    shown, rest = result["rows"][:PROFILE_ROWS], result["rows"][PROFILE_ROWS:]
    others = {"operator": f"{len(rest)} others"} | {key: sum(row[key] for row in rest) for key in ("us", "share")}
    return "\n\n".join([f"{model_name(args)}; {result['device']}; a decode step of one sequence after {args.input} "
                        f"tokens: {result['step']:.2f} ms", table(OPERATOR_COLUMNS, shown + [others] * bool(rest)),
                        "The three biggest: " + ", ".join(f"{r['operator']} {r['share']:.0%}" for r in shown[:3])])


# ---------------------------------------------------------------------------------------------------------------
# Kernels

def layer_floor(config: Config, activations: str, tokens: int, active: int) -> dict:
    """What one MoE layer cannot do without: its active experts' weights (without biases), its FLOP, and the us of an
    MI355 for the slower of the two."""
    values = 3 * config.hidden_size * config.intermediate_size  # of an expert
    size = active * values * 2 if activations == "bf16" else active * values * 17 // 32
    flop = 2 * tokens * config.num_experts_per_tok * values
    return {"weight_bytes": size, "flop": flop,
            "floor_us": 1e6 * max(size / MI355_BANDWIDTH, flop / MI355_FLOPS[activations])}


def active_experts(config: Config, tokens: int) -> int:
    """As many as in the published measurement, where that says; else the expected number."""
    if config.num_local_experts == 128 and tokens in PUBLISHED_ACTIVE:
        return PUBLISHED_ACTIVE[tokens]
    return round(expected_experts(config.num_local_experts, config.num_experts_per_tok, tokens))


def pinned(config: Config, tokens: int, active: int, first: int, device) -> tuple:
    """x [T, H], router weight [E, H] and bias [E] with which exactly the experts first .. first + active - 1 (mod E)
    take part, equally often: token t chooses the k from t k on. Its class, t mod active, is one-hot in the first
    columns of x, the only ones that the router's weights see."""
    E, H, k = config.num_local_experts, config.hidden_size, config.num_experts_per_tok
    x = torch.empty(tokens, H, dtype=torch.bfloat16, device=device).normal_()
    router = torch.zeros(E, H, dtype=torch.bfloat16, device=device)
    classes = torch.arange(tokens, device=device) % active
    x[:, :active] = torch.nn.functional.one_hot(classes, active).to(x.dtype)
    c = torch.arange(active, device=device)
    for slot in range(k):
        router[(first + (c * k + slot) % active) % E, c] = 2.0 + k - slot
    return x, router, torch.zeros(E, dtype=torch.bfloat16, device=device)


def launchers(moe_gluon, inputs: tuple, packed, top_k: int) -> Iterator[tuple[str, Callable]]:
    """The layer's public launchers, each to be called before the next is taken."""
    made = {}

    def call(name, *args):
        made[name] = getattr(moe_gluon, name)(*args)

    yield "gating_gemm", lambda: call("gating_gemm", *inputs, packed, top_k)
    yield "dispatch_swiglu", lambda: call("dispatch_swiglu", made["gating_gemm"], packed)
    yield "combine", lambda: call("combine", *made["dispatch_swiglu"], made["gating_gemm"], packed)


def launched(moe_gluon, gpu, inputs: tuple, packed, top_k: int) -> list[tuple[str, object]]:
    """Runs a layer -> what it launched: (launcher, launch)."""
    pairs = []
    for name, call in launchers(moe_gluon, inputs, packed, top_k):
        before = len(gpu.launches)
        call()
        pairs += [(name, launch) for launch in gpu.launches[before:]]
    return pairs


def compiled_row(moe_gluon, launcher: str, launch, packed, tokens: int, top_k: int) -> dict:
    """What the compiler made of a launch. The tile is the table's, for the launcher's kernel that multiplies."""
    tile, table_name = "", {"dispatch_swiglu": "dispatch", "combine": "combine"}.get(launcher)
    if table_name and any(instruction.op.startswith("v_mfma") for instruction in launch.program.code):
        g = moe_gluon.gemm(table_name, packed, tokens, top_k)
        tile = f"{g.BM} x {g.BN}"
    workgroups = math.prod(launch.grid)
    return {"tokens": tokens, "launcher": launcher, "kernel": launch.name, "tile": tile, "workgroups": workgroups,
            "waves": launch.waves // workgroups} | launch.profile


def counted_row(gfx950, launch, weight_sizes: set[int]) -> dict:
    """What the emulator counted in a launch, and its model's us. A tensor is a weight if it is as large as one."""
    read = {True: 0, False: 0}
    for tensor in launch.counters.tensors.values():
        read[tensor["size"] in weight_sizes] += tensor["read"]
    workgroups, model = math.prod(launch.grid), gfx950.resources(launch)
    waves, busiest = launch.waves // workgroups, max(model, key=model.get)
    # waves on a CU: what its 4 SIMDs hold, in whole workgroups, or what there is for 256 CUs
    resident = min(launch.profile["occupancy"] * 4 // waves * waves, launch.waves / 256)
    flight = launch.counters.peak_bytes_in_flight / 1024
    return {"weights_read": read[True], "others_read": read[False], "flight_wave_kb": flight,
            "flight_cu_kb": resident * flight, "wave_instructions": launch.counters.wave_instructions,
            "emulated_s": launch.seconds,
            "busiest": busiest, "model_us": model[busiest] / 2.4e3}


def replay_us(calls: list[Callable], repeats: int = 20) -> float:
    """us a call, of a graph of all calls on the GPU."""
    for call in calls:  # compiles
        call()
    graph, start, end = torch.cuda.CUDAGraph(), *(torch.cuda.Event(enable_timing=True) for _ in range(2))
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    graph.replay()
    start.record()
    for _ in range(repeats):
        graph.replay()
    end.record()
    torch.cuda.synchronize()
    return 1e3 * start.elapsed_time(end) / repeats / len(calls)


def layer_times(moe_gluon, config: Config, tokens: int, active: int, packed, device) -> dict:
    """us of a layer on a gfx950. Every call meets other experts until all had their turn: none comes from a cache."""
    turns = [pinned(config, tokens, active, first, device) for first in range(0, config.num_local_experts, active)]
    calls = {"moe": [lambda turn=turn: moe_gluon.moe(*turn, packed, config.num_experts_per_tok) for turn in turns]}
    for turn in turns:
        for name, call in launchers(moe_gluon, turn, packed, config.num_experts_per_tok):
            call()
            calls.setdefault(name, []).append(call)
    return {f"{name}_us": replay_us(these) for name, these in calls.items()}


def kernels(args, device: torch.device) -> dict:
    """Profiles from compiling, on the meta device; then times on a gfx950, or else counters of the emulator."""
    try:
        import gfx950
        import moe_gluon
    except ImportError as error:
        raise ValueError(f"--kernels cannot be imported: {error}; install triton") from error
    config = Config.from_dict(random_config(args.model))
    top_k, on_gfx950 = config.num_experts_per_tok, device.type == "cuda" and moe_gluon.is_supported()
    device = device if on_gfx950 else torch.device("cpu")

    def prepared(where):
        _, experts = random_layer(config, 0, where, packed=args.activations != "bf16")
        experts.gate_up_input_scale, experts.down_input_scale = 0.02, 0.01  # for static fp8
        return moe_gluon.prepare(experts, args.activations)

    layers, rows, meta = [], [], prepared("meta")
    check_fit(f"a layer of {args.model}", device, {"experts as stored": nbytes(meta), "as packed": nbytes(meta)})
    torch.manual_seed(args.seed)
    packed = prepared(device)
    weight_sizes = {nbytes(t) for w in (packed.gate_up, packed.down) for t in (w.data, w.scale) if t is not None}
    for tokens in BATCHES:
        note(f"{tokens} tokens")
        active = active_experts(config, tokens)
        layer = {"tokens": tokens, "active": active} | layer_floor(config, args.activations, tokens, active)
        least, flop = layer["weight_bytes"], layer["flop"]
        layer |= {"weight_mb": least / 1e6, "gflop": flop / 1e9}
        if args.model == "120b" and tokens in PUBLISHED_US:
            layer["published_us"] = PUBLISHED_US[tokens]
        with gfx950.compile_only() as gpu:
            new = [compiled_row(moe_gluon, launcher, launch, meta, tokens, top_k) for launcher, launch in
                   launched(moe_gluon, gpu, pinned(config, tokens, active, 0, "meta"), meta, top_k)]
        layer["launches"] = len(new)
        if on_gfx950:
            layer |= layer_times(moe_gluon, config, tokens, active, packed, device)
            us = layer["moe_us"]
            layer |= {"tb_s": least / us / 1e6, "tflop_s": flop / us / 1e6, "of_floor": us / layer["floor_us"]}
        elif tokens <= EMULATED:
            with gfx950.emulate() as gpu:
                counted = [counted_row(gfx950, launch, weight_sizes) for _, launch in
                           launched(moe_gluon, gpu, pinned(config, tokens, active, 0, device), packed, top_k)]
            new = [row | count for row, count in zip(new, counted, strict=True)]
            layer |= {"weights_ratio": sum(row["weights_read"] for row in counted) / least,
                      "others_ratio": sum(row["others_read"] for row in counted) / least,
                      "model_us": sum(row["model_us"] for row in counted)}
        layers.append(layer)
        rows += new
    note("")
    return {"mode": "kernels", "device": device_name(device), "layers": layers, "kernels": rows}


LAYER_COLUMNS = [
    ("tokens", "tokens", "d"), ("active experts, pinned", "active", "d"), ("launches, counted", "launches", "d"),
    ("least weight MB, counted", "weight_mb", ",.1f"), ("least GFLOP, counted", "gflop", ",.1f"),
    ("MI355 floor us, modelled", "floor_us", ".1f"), ("TokenSpeed us, measured by it", "published_us", "g"),
    ("us, measured", "moe_us", ".1f"), ("gating us, measured", "gating_gemm_us", ".1f"),
    ("dispatch us, measured", "dispatch_swiglu_us", ".1f"), ("combine us, measured", "combine_us", ".1f"),
    ("TB/s, measured", "tb_s", ".2f"), ("TFLOP/s, measured", "tflop_s", ",.1f"),
    ("/ floor, measured", "of_floor", ".2f"),
    ("weights requested / least, counted", "weights_ratio", ".3f"),
    ("all else requested / least, counted", "others_ratio", ".2f"),
    ("busiest resources us, modelled", "model_us", ".1f")]
PROFILE_COLUMNS = [
    ("kernel", "kernel", ""), ("tokens", "tokens", ""), ("tile", "tile", ""), ("waves a workgroup", "waves", "d"),
    ("workgroups, counted", "workgroups", ""), ("VGPR, counted", "vgprs", "d"), ("AGPR, counted", "agprs", "d"),
    ("SGPR, counted", "sgprs", "d"), ("VGPR spills, counted", "vgpr_spills", "d"),
    ("SGPR spills, counted", "sgpr_spills", "d"), ("scratch B, counted", "scratch", "d"),
    ("LDS B, counted", "lds", ",d"),
    ("waves a SIMD, counted", "occupancy", "d")]
COUNTER_COLUMNS = [
    ("tokens", "tokens", "d"), ("kernel", "kernel", ""), ("wave-instructions, counted", "wave_instructions", ",d"),
    ("KB in flight a wave, counted", "flight_wave_kb", ".1f"), ("KB in flight a CU, modelled", "flight_cu_kb", ".0f"),
    ("busiest resource, modelled", "busiest", ""), ("its us, modelled", "model_us", ".1f")]


def kernels_text(result: dict, args) -> str:
    layers, rows = result["layers"], result["kernels"]
    same = {}  # launches of one compiled kernel
    for row in rows:
        key = tuple(row[key] for _, key, _ in PROFILE_COLUMNS if key not in ("tokens", "workgroups"))
        same.setdefault(key, []).append(row)
    profiles = [group[0] | {key: ", ".join(str(row[key]) for row in group) for key in ("tokens", "workgroups")}
                for group in same.values()]
    text = [f"One MoE layer of {args.model}, {args.activations} activations; {result['device']}",
            table(LAYER_COLUMNS, layers), table(PROFILE_COLUMNS, profiles)]
    if emulated := [row for row in rows if "model_us" in row]:
        count, seconds = (sum(row[key] for row in emulated) for key in ("wave_instructions", "emulated_s"))
        text += [table(COUNTER_COLUMNS, emulated), f"Emulated {count:,} wave-instructions in {seconds:.0f} s: "
                 f"{count / seconds / 1e6:.2f} million a second."]
    return "\n\n".join(text)


# ---------------------------------------------------------------------------------------------------------------
# Command line

class Parser(argparse.ArgumentParser):
    def error(self, message):  # one line, without the usage
        self.exit(2, f"bench: {message}\n")


def positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a positive number")
    return int(text)


def several(text: str) -> list[int]:
    return [positive(part) for part in text.split(",")]


def checkpoint(text: str) -> str:
    if text.startswith("random:") and text.removeprefix("random:") not in (*SIZES, "tiny"):
        raise argparse.ArgumentTypeError(f"{text!r}: random: takes {', '.join(SIZES)}, tiny")
    return text


def svg(text: str) -> str:
    if not text.endswith(".svg"):
        raise argparse.ArgumentTypeError(f"{text!r}: the picture is an SVG, name it *.svg")
    return text


def arguments() -> argparse.ArgumentParser:
    parser = Parser(description="Time GPT-OSS inference, or its MoE kernels.", allow_abbrev=False)
    add = parser.add_argument
    add("--checkpoint", type=checkpoint, metavar="DIR", help="folder (default: tiny/), or random:20b, random:120b, "
        "random:tiny: random weights of the true shapes, made on the device")
    add("--device", help="default: cuda where there is one and --checkpoint is given, else cpu")
    add("--dtype", choices=DTYPES, help="default: float32 on a CPU, bfloat16 elsewhere")
    add("--moe", choices=SETTINGS["moe"], help="default: auto")
    add("--activations", choices=SETTINGS["activations"], help="default: auto; mxfp8 with --kernels")
    add("--concurrency", type=several, metavar="N,..", help="default: 1,8, with --plot 1,2,4,8,16")
    add("--input", type=positive, metavar="N", help="tokens of a prompt (default: 512)")
    add("--output", type=positive, metavar="N", help="tokens generated for each (default: 128)")
    add("--rounds", type=positive, metavar="N", help="of each concurrency, without the warm-up (default: 5)")
    add("--seed", type=int, default=0, metavar="N", help="of prompts and weights (default: 0)")
    add("--ab", type=ab_setting, metavar="SETTING=A,B", help=f"compare two values of {', '.join(SETTINGS)}")
    add("--peer", choices=PEERS, help="compare with another implementation")
    add("--plot", type=svg, metavar="FILE.svg", help="draw TPOT over concurrency")
    add("--profile", action="store_true", help="a decode step by operator")
    add("--kernels", action="store_true", help="the gfx950 kernels of one MoE layer")
    add("--model", choices=SIZES, help="whose layer --kernels takes (default: 120b)")
    add("--json", action="store_true", help="print JSON instead of tables")
    return parser


MODELS = {"checkpoint", "device", "dtype", "moe", "activations", "input"}
MODES = {"kernels": (kernels, kernels_text, {"model", "activations"}), "profile": (profile, profile_text, MODELS),
         "latency": (latency, latency_text, MODELS | {"concurrency", "output", "rounds", "ab", "peer", "plot"})}
DEFAULTS = {"checkpoint": TINY, "moe": "auto", "input": 512, "output": 128, "rounds": 5, "concurrency": [1, 8],
            "activations": "auto", "model": "120b"}


def main(argv: list[str] | None = None) -> int:
    parser = arguments()
    args = parser.parse_args(argv)
    if args.kernels and args.profile:
        parser.error("--kernels and --profile are two modes")
    mode = "kernels" if args.kernels else "profile" if args.profile else "latency"
    run, text, takes = MODES[mode]
    given = {name for name, value in vars(args).items() if value is not None} - {"seed", "json", "kernels", "profile"}
    if unused := sorted(given - takes):
        parser.error(f"{mode} does not take --{unused[0]}")
    if args.ab and args.peer:
        parser.error("--ab and --peer each compare two systems: give one")
    if args.ab and args.ab[0] in given:
        parser.error(f"--ab {args.ab[0]} and --{args.ab[0]}: give one")
    if args.output == 1:
        parser.error("--output 1 leaves nothing to time after the first token")
    name = args.device or ("cuda" if torch.cuda.is_available() and (args.checkpoint or args.kernels) else "cpu")
    if args.plot and not args.concurrency:
        args.concurrency = [1, 2, 4, 8, 16]
    if args.kernels and args.activations in (None, "auto"):
        args.activations = "mxfp8"  # the engine's choice for mxfp4 weights
    vars(args).update({key: value for key, value in DEFAULTS.items() if getattr(args, key) is None})
    try:
        device = find_device(name)
        versions = {"python": platform.python_version(), "torch": torch.__version__}
        result = {"device": device_name(device), "versions": versions, "settings": vars(args)} | run(args, device)
        print(json.dumps(result) if args.json else text(result, args))
        if args.plot:
            Path(args.plot).write_text(plot(result["rows"]))
    except (CheckpointError, ValueError, OSError, torch.OutOfMemoryError) as error:
        note("")
        print(f"bench: {str(error).splitlines()[0]}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
